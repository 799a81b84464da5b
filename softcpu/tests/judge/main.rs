//! The host's CPU as judge: every unprivileged instruction form, natively and on the software CPU, from the same state.
//!
//! `LODGE_JUDGE_CASES=N` runs N cases in each mode (default: a few seconds' worth), `LODGE_JUDGE_SEED=N` begins with
//! another seed, `LODGE_JUDGE_ONLY=Name` keeps the forms whose name ([`iced_x86::Code`]) contains Name,
//! `LODGE_JUDGE_ALL=1` goes on after a form's first mismatch and prints a table.
//!
//! The cases need nothing but Linux on x86-64 with 16-bit segments (CONFIG_X86_16BIT).

mod case;
mod compare;
mod forms;
mod generate;
mod native;
mod operands;
mod random;
mod soft;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use case::{Bits, Case, Outcome};
use generate::Generator;
use iced_x86::{Formatter, Instruction, IntelFormatter};
use lodge_softcpu::vcpu::Vcpu;
use lodge_softcpu::{Fault, flags};
use native::{BATCH, Native};
use random::Rng;
use soft::{Blocks, Interpreter, Soft, Subject};

fn number(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return default };
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{name} is not a number: {text}"))
}

fn text(insn: &Instruction) -> String {
    let mut out = String::new();
    IntelFormatter::new().format(insn, &mut out);
    out
}

/// One mismatch, with all that it takes to look into it.
fn describe(
    case: &Case,
    insns: &[Instruction],
    subject: &str,
    differences: &[String],
    host: &Outcome,
) -> String {
    use std::fmt::Write;
    let mut out =
        format!("\n{subject} and the host differ ({:?}, seed {:#x}):\n", case.bits, case.seed);
    let mut at = 0;
    for insn in insns {
        let bytes = &case.code()[at..at + insn.len()];
        at += insn.len();
        let _ = writeln!(out, "    {:<40} {:?}  {bytes:02x?}", text(insn), insn.code());
    }
    let start = &case.start;
    for (i, names) in ["rax rcx rdx rbx", "rsp rbp rsi rdi", "r8 r9 r10 r11", "r12 r13 r14 r15"]
        .iter()
        .enumerate()
    {
        for (j, name) in names.split(' ').enumerate() {
            let _ = write!(out, "  {name:>3}={:016x}", start.regs[i * 4 + j]);
        }
        out.push('\n');
    }
    let fx = &start.fx;
    let word = |at: usize| u16::from_le_bytes([fx[at], fx[at + 1]]);
    let _ = writeln!(
        out,
        "  rflags={:x} selectors(es cs ss ds fs gs)={:x?} bases={:x?} target={:#x} fcw={:x} fsw={:x} ftw={:x} mxcsr={:x}",
        start.rflags,
        start.selectors,
        start.bases,
        case.target,
        word(0),
        word(2),
        fx[4],
        word(24),
    );
    for insn in insns {
        for i in 0..insn.op_count() {
            let number = insn.op_register(i) as usize;
            let xmm = number.wrapping_sub(iced_x86::Register::XMM0 as usize);
            if xmm < 16 {
                let bytes: String = fx[160 + 16 * xmm..176 + 16 * xmm]
                    .iter()
                    .rev()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                let _ = writeln!(out, "  xmm{xmm}={bytes}");
            }
        }
    }
    let at = case.target.wrapping_sub(case::DATA) as usize;
    let end = at.saturating_add(16).min(case::DATA_LEN);
    if let Some(bytes) = start.data.get(at..end).filter(|b| !b.is_empty()) {
        let _ = writeln!(out, "  memory operand: {bytes:02x?}");
    }
    let _ = writeln!(
        out,
        "  host: vector {:?} error {:#x} cr2 {:#x} rip {:#x}",
        host.vector, host.error, host.cr2, host.end.rip
    );
    for difference in differences {
        let _ = writeln!(out, "  -> {difference}");
    }
    out
}

/// The case went where the host's kernel and loader have put something, at other places each time.
fn strays(host: &Outcome, ours: &Outcome) -> bool {
    let elsewhere = 0x5500_0000_0000..0x8000_0000_0000u64;
    let there_too = host.vector == Some(14) && host.cr2 == ours.cr2;
    ours.vector == Some(14) && !there_too && elsewhere.contains(&ours.cr2)
}

/// What a judging came to.
struct Verdict {
    cases: u64,
    forms: usize,
    mismatches: BTreeMap<String, (u64, String)>,
}

/// Judges `subject` on `cases` cases: single instructions of every form, or runs.
fn judge(bits: Bits, subject: &mut dyn Subject, cases: u64, runs: bool) -> Verdict {
    let only = std::env::var("LODGE_JUDGE_ONLY").ok();
    let generator = Generator::new(bits, only.as_deref());
    let first = number("LODGE_JUDGE_SEED", 1 << 32);
    let mut native = Native::start();
    let mut soft = Soft::new();
    let mut verdict = Verdict { cases: 0, forms: 0, mismatches: BTreeMap::new() };
    let mut seen = std::collections::BTreeSet::new();
    let mut next = 0;
    while next < cases {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH && next < cases {
            let seed = first + next;
            let made = if runs {
                Some(generator.run(seed))
            } else {
                generator.single(seed as usize, seed)
            };
            next += 1;
            batch.extend(made.filter(|(_, insns)| !insns.is_empty()));
        }
        let all: Vec<_> = batch.iter().map(|(case, _)| case.clone()).collect();
        let outcomes = native.run(&all);
        for ((case, insns), host) in batch.iter().zip(&outcomes) {
            if subject.passes_over(case, host) {
                continue;
            }
            verdict.cases += 1;
            seen.extend(insns.iter().map(|i| i.code() as usize));
            let ours = catch_unwind(AssertUnwindSafe(|| soft.run(case, subject)));
            let found = match &ours {
                Ok(ours) => compare::differences(case, insns, host, ours),
                Err(_) => vec!["a panic (its message is above)".into()],
            };
            if !found.is_empty() && !ours.is_ok_and(|ours| strays(host, &ours)) {
                let name = if runs { "run".into() } else { format!("{:?}", insns[0].code()) };
                let report = describe(case, insns, subject.name(), &found, host);
                verdict.mismatches.entry(name).or_insert((0, report)).0 += 1;
            }
        }
    }
    verdict.forms = seen.len();
    println!(
        "{bits:?}: {} cases, {} of {} forms, {} with mismatches",
        verdict.cases,
        verdict.forms,
        generator.forms(),
        verdict.mismatches.len()
    );
    verdict
}

fn report(verdict: &Verdict) {
    let all = std::env::var("LODGE_JUDGE_ALL").is_ok();
    let shown = if all { usize::MAX } else { 5 };
    for (name, (count, text)) in verdict.mismatches.iter().take(shown) {
        println!("{name}: {count} times, the first:{text}");
    }
    assert!(
        verdict.mismatches.is_empty(),
        "{} forms differ from the host's CPU: {:?}",
        verdict.mismatches.len(),
        verdict
            .mismatches
            .iter()
            .map(|(name, (count, _))| format!("{name} {count}"))
            .collect::<Vec<_>>()
    );
}

/// Cases in a mode, by default.
fn cases() -> u64 {
    number("LODGE_JUDGE_CASES", 100_000)
}

#[test]
fn single_instructions_64() {
    report(&judge(Bits::B64, &mut Interpreter, cases(), false));
}

#[test]
fn single_instructions_32() {
    report(&judge(Bits::B32, &mut Interpreter, cases(), false));
}

#[test]
fn single_instructions_16() {
    report(&judge(Bits::B16, &mut Interpreter, cases(), false));
}

#[test]
fn runs_64() {
    report(&judge(Bits::B64, &mut Interpreter, cases() / 5, true));
}

#[test]
fn runs_32() {
    report(&judge(Bits::B32, &mut Interpreter, cases() / 5, true));
}

#[test]
fn runs_16() {
    report(&judge(Bits::B16, &mut Interpreter, cases() / 5, true));
}

#[test]
fn single_instructions_64_in_blocks() {
    report(&judge(Bits::B64, &mut Blocks, cases(), false));
}

#[test]
fn single_instructions_32_in_blocks() {
    report(&judge(Bits::B32, &mut Blocks, cases(), false));
}

#[test]
fn single_instructions_16_in_blocks() {
    report(&judge(Bits::B16, &mut Blocks, cases(), false));
}

#[test]
fn runs_64_in_blocks() {
    report(&judge(Bits::B64, &mut Blocks, cases() / 5, true));
}

#[test]
fn runs_32_in_blocks() {
    report(&judge(Bits::B32, &mut Blocks, cases() / 5, true));
}

#[test]
fn runs_16_in_blocks() {
    report(&judge(Bits::B16, &mut Blocks, cases() / 5, true));
}

/// Whatever bytes there are, at any privilege and in any mode, the answer is a state or a fault, never a panic.
#[test]
fn no_bytes_make_it_panic() {
    let count = cases() / 5;
    let mut rng = Rng::new(number("LODGE_JUDGE_SEED", 7));
    let mut soft = Soft::new();
    let generators = [Bits::B16, Bits::B32, Bits::B64].map(|bits| Generator::new(bits, None));
    for i in 0..count {
        let generator = rng.pick(&[0usize, 1, 2]);
        let (mut case, _) = generators[generator].run(rng.next());
        let privileged = rng.chance(50);
        if rng.chance(70) {
            // Prefixes and escapes are what makes random bytes long.
            for byte in &mut case.code {
                *byte = match rng.below(4) {
                    0 => rng
                        .pick(&[0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x0f, 0x38, 0x3a, 0x48, 0xc4, 0xc5]),
                    _ => rng.next() as u8,
                };
            }
            case.code_len = 64;
        }
        case.count = 4;
        let bytes = format!("{:?} {privileged} {:02x?}", case.bits, case.code());
        let result =
            catch_unwind(AssertUnwindSafe(|| soft.run_as(&case, &mut Interpreter, privileged)));
        assert!(result.is_ok(), "case {i}: a panic in {bytes}");
        if privileged {
            // It may have changed anything.
            soft = Soft::new();
        }
    }
}

/// An interpreter with one mistake.
struct Wrong;

impl Subject for Wrong {
    fn name(&self) -> &'static str {
        "the wrong one"
    }

    fn run(&mut self, vcpu: &mut Vcpu, case: &Case) -> Result<(), Fault> {
        Interpreter.run(vcpu, case)?;
        let cpu = vcpu.cpu();
        // One flag, in one of 16 results.
        if cpu.regs[0] & 15 == 3 {
            cpu.set_status_flags(cpu.status_flags() ^ flags::PF);
        }
        Ok(())
    }
}

#[test]
fn a_wrong_subject_is_caught() {
    let verdict = judge(Bits::B64, &mut Wrong, 3000, false);
    assert!(!verdict.mismatches.is_empty());
}
