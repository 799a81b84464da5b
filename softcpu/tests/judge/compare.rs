//! Which differences count.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use super::case::{Bits, Case, DATA, DATA_LEN, FX, Outcome};

/// The status flags and DF, TF, AC, NT, ID, IOPL: all but RF and IF, which user code cannot see or the signal frame
/// does not tell.
const RFLAGS: u64 = 0x0024_7dd5 & !0x200;

/// iced's bits to those of RFLAGS.
fn to_rflags(bits: u32) -> u64 {
    let table = [
        (RflagsBits::OF, 1u64 << 11),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::DF, 1 << 10),
        (RflagsBits::AC, 1 << 18),
    ];
    table.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, flag)| all | flag)
}

/// The flags that are undefined after `insn`, as bits of iced: its own table, and what that leaves out.
pub fn undefined_flags(insn: &Instruction) -> u32 {
    let mut bits = insn.rflags_undefined();
    match insn.mnemonic() {
        // By more than one bit, OF; from the operand's width on, CF. The count is not known here.
        Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Sal => {
            bits |= RflagsBits::AF;
            let one = insn.op_count() > 1
                && insn.op1_kind() == OpKind::Immediate8
                && insn.immediate8() == 1;
            if !one {
                bits |= RflagsBits::OF | RflagsBits::CF;
            }
        }
        Mnemonic::Shld | Mnemonic::Shrd => {
            bits |= RflagsBits::OF | RflagsBits::AF;
            if insn.op0_kind() == OpKind::Register && insn.op0_register().size() == 2
                || insn.memory_size().size() == 2
            {
                bits |= RflagsBits::CF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::PF;
            }
        }
        Mnemonic::Rcl | Mnemonic::Rcr | Mnemonic::Rol | Mnemonic::Ror => bits |= RflagsBits::OF,
        _ => {}
    }
    bits
}

/// The flags that are undefined after a run, as bits of iced.
pub fn undefined_after(insns: &[Instruction]) -> u32 {
    insns.iter().fold(0, |before, insn| {
        let undefined = undefined_flags(insn);
        // What may leave flags alone for a count of zero makes nothing defined.
        let counts = insn.op_count() > 1 && insn.op_register(insn.op_count() - 1) == Register::CL
            || insn.has_rep_prefix()
            || insn.has_repne_prefix();
        if counts { before | undefined } else { before & !insn.rflags_modified() | undefined }
    })
}

/// The differences between what the host's CPU did and what ours did, in words. Empty if there are none that count.
pub fn differences(
    case: &Case,
    insns: &[Instruction],
    host: &Outcome,
    ours: &Outcome,
) -> Vec<String> {
    let mut out = Vec::new();
    // Of a run, the instruction that the host was at in the end, and those before it.
    let at = insns.iter().position(|i| i.ip() == host.end.rip);
    let executed = match at {
        Some(at) if host.vector.is_some() && insns.len() > 1 => &insns[..at],
        _ => insns,
    };
    let insns = match at {
        Some(at) if host.vector.is_some() => &insns[at..=at],
        _ => &insns[insns.len() - 1..],
    };
    // The host may restore components that the guest has not.
    let restore =
        insns.last().is_some_and(|i| matches!(i.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64));
    let header = (case.target.wrapping_sub(DATA) as usize).wrapping_add(512);
    let components = case.start.data.get(header..header.saturating_add(8));
    if restore && components.is_some_and(|b| b[0] & !3 != 0 || b[1..].iter().any(|b| *b != 0)) {
        return out;
    }
    // AMD has a bit of MXCSR that allows misaligned operands. The guest has not.
    if host.end.fx[26] & 2 != 0 {
        return out;
    }
    let last = insns.last().map(Instruction::mnemonic).unwrap_or(Mnemonic::INVALID);
    // What reads several things from memory, checks them and may fault for each, in no documented order.
    use Mnemonic as M;
    let several = matches!(
        last,
        M::Enter
            | M::Retf
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Call
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
    );
    // The frame pointer of a 32-bit ENTER on a 16-bit stack: SP by Intel's manual, ESP on AMD.
    let small_stack = super::case::LDT
        .get(usize::from(case.start.selectors[2] >> 3))
        .is_some_and(|e| case.start.selectors[2] & 4 != 0 && !e.big);
    if insns.last().is_some_and(|i| i.code() == Code::Enterd_imm16_imm8) && small_stack {
        return out;
    }
    // ARPL may or may not write an operand that it does not change.
    if (several || last == M::Arpl) && host.vector.is_some() && ours.vector.is_some() {
        return out;
    }
    if last == M::Arpl
        && host.vector.is_none()
        && host.end.rflags & 0x40 == 0
        && ours.vector.is_some()
    {
        return out;
    }
    // Whether bytes that are masked out may fault is not documented.
    let masked = matches!(last, Mnemonic::Maskmovdqu | Mnemonic::Maskmovq);
    if masked && host.vector == Some(14) && ours.vector.is_none() {
        return out;
    }
    // An area of state may be found misaligned, beyond its segment or not present.
    let area = insns.last().is_some_and(is_large);
    let either = |v: Option<u8>| matches!(v, Some(12..=14));
    if area && host.vector != ours.vector && either(host.vector) && either(ours.vector) {
        return out;
    }
    if host.vector != ours.vector {
        out.push(format!("exception: host {:?}, ours {:?}", host.vector, ours.vector));
        return out;
    }
    let faulted = host.vector.is_some();
    if let Some(vector) = host.vector {
        // The kernel says "present" of all of its own addresses, so as not to tell which are.
        let unknown = u64::from(vector == 14 && host.cr2 >= 0x7fff_ffff_f000);
        if matches!(vector, 8 | 10..=14 | 17) && (host.error ^ ours.error) & !unknown != 0 {
            out.push(format!("error code: host {:#x}, ours {:#x}", host.error, ours.error));
        }
        // Of large operands and those with a mask, CR2 may be any byte of them.
        let coarse = insns.last().is_some_and(is_large);
        // They may wrap at the end of the address space, or at that of 16-bit offsets.
        let apart = host.cr2.wrapping_sub(ours.cr2);
        let near = coarse
            && ((apart as i32).unsigned_abs() < 0x400 || (apart as i16).unsigned_abs() < 0x400);
        if vector == 14 && host.cr2 != ours.cr2 && !near {
            out.push(format!("CR2: host {:#x}, ours {:#x}", host.cr2, ours.cr2));
        }
    }
    // POPA may have loaded some registers before it faults; it is restarted.
    let partly = faulted && matches!(last, M::Popa | M::Popad);
    let undefined = to_rflags(undefined_after(executed));
    let undefined = if faulted && std::ptr::eq(executed, insns) { 0 } else { undefined };
    if !partly {
        registers(case, insns, undefined, host, ours, &mut out);
    }
    floating(case, insns, host, ours, &mut out);
    // Below a stack pointer that does not move in the end, anything may be written.
    if !(faulted && last == Mnemonic::Enter) {
        memory(case, insns, host, ours, &mut out);
    }
    out
}

fn is_large(insn: &Instruction) -> bool {
    let masked = matches!(insn.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq);
    let state = matches!(
        insn.mnemonic(),
        Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
    );
    masked || state || insn.memory_size().size() >= 10 && insn.memory_size().size() != 16
}

fn uses_mm(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_register(i).is_mm())
}

fn registers(
    case: &Case,
    insns: &[Instruction],
    undefined_flags: u64,
    host: &Outcome,
    ours: &Outcome,
    out: &mut Vec<String>,
) {
    let (h, o) = (&host.end, &ours.end);
    if h.rip != o.rip {
        out.push(format!("RIP: host {:#x}, ours {:#x}", h.rip, o.rip));
    }
    let (count, mask) = if case.bits == Bits::B64 { (16, u64::MAX) } else { (8, 0xffff_ffff) };
    let undefined = if host.vector.is_some() { None } else { undefined_register(case, insns) };
    for i in (0..count).filter(|i| Some(*i) != undefined) {
        let mask = mask & !undefined_bits(insns, i);
        if (h.regs[i] ^ o.regs[i]) & mask != 0 {
            let name = Register::values().nth(Register::RAX as usize + i);
            out.push(format!(
                "{:?}: host {:#x}, ours {:#x}",
                name.unwrap_or_default(),
                h.regs[i],
                o.regs[i]
            ));
        }
    }
    // Whoever does not single-step has no TF.
    let flags = RFLAGS & !undefined_flags & if case.step { !0x100 } else { u64::MAX };
    if (h.rflags ^ o.rflags) & flags != 0 {
        out.push(format!("RFLAGS: host {:#x}, ours {:#x}", h.rflags & flags, o.rflags & flags));
    }
    let segments = ["ES", "CS", "SS", "DS", "FS", "GS"];
    for (i, name) in segments.iter().enumerate() {
        // The kernel's IRET makes any null selector 0.
        let null = h.selectors[i] == 0 && o.selectors[i] < 4;
        if h.selectors[i] != o.selectors[i] && !null {
            out.push(format!("{name}: host {:#x}, ours {:#x}", h.selectors[i], o.selectors[i]));
        }
    }
    for i in 0..2 {
        let name = segments[4 + i];
        if case.bits == Bits::B64 && h.selectors[4 + i] == 0 && h.bases[i] != o.bases[i] {
            out.push(format!("{name} base: host {:#x}, ours {:#x}", h.bases[i], o.bases[i]));
        }
    }
}

/// Bits of register `i` that are undefined: 19:16 of what LAR gives.
fn undefined_bits(insns: &[Instruction], i: usize) -> u64 {
    let lar = |insn: &Instruction| {
        insn.mnemonic() == Mnemonic::Lar
            && insn.op0_register().full_register() as usize == Register::RAX as usize + i
    };
    if insns.last().is_some_and(lar) { 0xf_0000 } else { 0 }
}

fn is_double_16(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Shld_rm16_r16_CL
            | Code::Shrd_rm16_r16_CL
            | Code::Shld_rm16_r16_imm8
            | Code::Shrd_rm16_r16_imm8
    )
}

/// A destination whose value is undefined: of SHLD and SHRD of 16 bits by more than 16.
fn undefined_register(_case: &Case, insns: &[Instruction]) -> Option<usize> {
    let insn = insns.last()?;
    (is_double_16(insn) && insn.op0_kind() == OpKind::Register)
        .then(|| insn.op0_register().full_register() as usize - Register::RAX as usize)
}

fn floating(
    case: &Case,
    insns: &[Instruction],
    host: &Outcome,
    ours: &Outcome,
    out: &mut Vec<String>,
) {
    let (h, o) = (&host.end.fx, &ours.end.fx);
    let part = |name: &str, from: usize, len: usize, out: &mut Vec<String>| {
        if h[from..from + len] != o[from..from + len] {
            let hex =
                |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
            out.push(format!(
                "{name}: host {}, ours {}",
                hex(&h[from..from + len]),
                hex(&o[from..from + len])
            ));
        }
    };
    // Whether a fault comes before or after the transition to MMX, and which element of a dot product is the first to
    // raise an exception, is not documented.
    let faulted = host.vector.is_some();
    let last = insns.last();
    if !(faulted && last.is_some_and(uses_mm)) {
        part("FCW", 0, 2, out);
        part("FSW", 2, 2, out);
        part("FTW", 4, 1, out);
        for i in 0..8 {
            part(&format!("ST({i})"), 32 + 16 * i, 10, out);
        }
    }
    let dot = last.is_some_and(|i| matches!(i.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd));
    // Whether an unmasked overflow or underflow is inexact too is asked of a result with an unbounded exponent.
    let inexact = if host.vector == Some(19) { 0x20 } else { 0 };
    if !(faulted && dot) && (h[24] | inexact, h[25]) != (o[24] | inexact, o[25]) {
        part("MXCSR", 24, 4, out);
    }
    let xmm = if case.bits == Bits::B64 { 16 } else { 8 };
    for i in 0..xmm {
        part(&format!("XMM{i}"), 160 + 16 * i, 16, out);
    }
    debug_assert_eq!(160 + 16 * 16, FX);
}

/// The bytes that hold pointers, opcodes or reserved items in what the instruction stores.
fn unjudged(insns: &[Instruction]) -> &'static [(u64, u64)] {
    let Some(insn) = insns.last() else { return &[] };
    match insn.code() {
        Code::Fnstenv_m14byte | Code::Fnsave_m94byte => &[(6, 14)],
        Code::Fnstenv_m28byte | Code::Fnsave_m108byte => &[(12, 28)],
        // FOP, FIP, FDP; MXCSR_MASK; the unused upper parts of the ST registers.
        Code::Fxsave_m512byte
        | Code::Fxsave64_m512byte
        | Code::Xsave_mem
        | Code::Xsave64_mem
        | Code::Xsaveopt_mem
        | Code::Xsaveopt64_mem => &[(6, 24), (28, 32)],
        _ => &[],
    }
}

fn memory(
    case: &Case,
    insns: &[Instruction],
    host: &Outcome,
    ours: &Outcome,
    out: &mut Vec<String>,
) {
    // SHLD and SHRD of 16 bits by more than 16 leave anything.
    let double = insns.last().is_some_and(is_double_16);
    if host.end.data == ours.end.data || double {
        return;
    }
    let masked = unjudged(insns);
    let mut shown = 0;
    for i in 0..DATA_LEN {
        let (h, o) = (host.end.data[i], ours.end.data[i]);
        let offset = (DATA + i as u64).wrapping_sub(case.target);
        if h == o || masked.iter().any(|(from, to)| (*from..*to).contains(&offset)) {
            continue;
        }
        shown += 1;
        if shown <= 12 {
            out.push(format!("memory {:#x}: host {h:02x}, ours {o:02x}", DATA + i as u64));
        }
    }
    if shown > 12 {
        out.push(format!("... {shown} bytes of memory"));
    }
}
