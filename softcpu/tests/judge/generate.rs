//! Cases: an instruction form, a random encoding of it, a state to begin with; or a run of instructions.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use super::case::{
    Bits, CODE, CODE_MAX, CODE_OFFSET, Case, DATA, State, USER_DS, USER32_CS, USER64_CS, ldt,
};
use super::compare::undefined_after;
use super::forms::{codes, encode, has_memory, in_runs_unfit, unfit};
use super::operands::{
    Taken, acceptable_state, aim, bit_offset, fill_fx, implicit_operands, note_target,
    stay_out_of_64_bits,
};
use super::random::Rng;

/// Makes cases of one mode.
pub struct Generator {
    pub bits: Bits,
    codes: Vec<Code>,
    /// Of [`Code`], whether it is judged.
    allowed: Vec<bool>,
}

/// An instruction with what the registers must be for its memory operand.
struct Made {
    bytes: Vec<u8>,
    insn: Instruction,
}

impl Generator {
    /// For a mode; `only` keeps the forms whose name contains it.
    pub fn new(bits: Bits, only: Option<&str>) -> Self {
        let keep = |code: &Code| only.is_none_or(|part| format!("{code:?}").contains(part));
        let codes: Vec<_> = codes(bits).into_iter().filter(keep).collect();
        let mut allowed = vec![false; Code::values().len()];
        for code in &codes {
            allowed[*code as usize] = true;
        }
        assert!(!codes.is_empty(), "no instruction form is left");
        Self { bits, codes, allowed }
    }

    /// How many forms there are.
    pub fn forms(&self) -> usize {
        self.codes.len()
    }

    /// The case of `seed`: about form number `index`.
    pub fn single(&self, index: usize, seed: u64) -> Option<(Case, Vec<Instruction>)> {
        let mut rng = Rng::new(seed);
        let code = self.codes[index % self.codes.len()];
        let mut case = self.begin(&mut rng, seed);
        let made = self.make(&mut rng, code, case.start.rip)?;
        let insn = self.append(&mut rng, &mut case, made, &mut Taken::default());
        case.step = insn.flow_control() != FlowControl::Next;
        Some((case, vec![insn]))
    }

    /// The case of `seed`: a run of up to 20 instructions that do not branch.
    pub fn run(&self, seed: u64) -> (Case, Vec<Instruction>) {
        let mut rng = Rng::new(seed);
        let mut case = self.begin(&mut rng, seed);
        // Which of two accesses is the misaligned one comes out in single instructions.
        case.start.rflags &= !(1 << 18);
        let wanted = 5 + rng.below(16) as usize;
        let mut all = Vec::new();
        let mut taken = Taken::default();
        for _ in 0..wanted * 20 {
            if all.len() == wanted || case.code_len as usize + 16 > CODE_MAX {
                break;
            }
            let code = rng.pick(&self.codes);
            let ip = case.start.rip + u64::from(case.code_len);
            let Some(made) = self.make(&mut rng, code, ip) else { continue };
            let insn = &made.insn;
            // No instruction may read flags that are undefined by then.
            let fits = insn.flow_control() == FlowControl::Next
                && !in_runs_unfit(insn)
                && insn.rflags_read() & undefined_after(&all) == 0;
            if fits {
                all.push(self.append(&mut rng, &mut case, made, &mut taken));
            }
        }
        (case, all)
    }

    fn begin(&self, rng: &mut Rng, seed: u64) -> Case {
        let mut start = State::zero();
        start.rip = CODE_OFFSET + if self.bits == Bits::B16 { 0 } else { CODE };
        start.selectors = match self.bits {
            Bits::B64 => [0, USER64_CS, USER_DS, 0, 0, 0],
            Bits::B32 => {
                let limited = rng.chance(10);
                let data = if limited { rng.pick(&[ldt(2), ldt(4), ldt(9)]) } else { USER_DS };
                let ss = if rng.chance(10) { rng.pick(&[ldt(1), ldt(2)]) } else { USER_DS };
                [USER_DS, USER32_CS, ss, data, ldt(3), rng.pick(&[ldt(2), ldt(5)])]
            }
            Bits::B16 => {
                let ds = if rng.chance(15) { rng.pick(&[ldt(4), ldt(9), 0]) } else { ldt(1) };
                let ss = if rng.chance(15) { rng.pick(&[ldt(2), ldt(9)]) } else { ldt(1) };
                [ldt(1), ldt(0), ss, ds, ldt(3), rng.pick(&[ldt(2), ldt(5)])]
            }
        };
        if self.bits == Bits::B64 {
            start.bases = [DATA + 0x800, DATA + rng.below(0x1000)];
        }
        for i in 0..16 {
            start.regs[i] = self.register(rng, i);
        }
        start.rflags = 0x202 | rng.next() & 0x8d5;
        if rng.chance(12) {
            start.rflags |= 0x400;
        }
        if rng.chance(2) {
            start.rflags |= 1 << 18;
        }
        fill_fx(rng, &mut start);
        for word in start.data.chunks_exact_mut(8) {
            let value = if rng.chance(30) { 0 } else { rng.lane() };
            word.copy_from_slice(&value.to_le_bytes());
        }
        Case {
            bits: self.bits,
            step: false,
            count: 0,
            code_len: 0,
            code: [0xcc; CODE_MAX],
            target: 0,
            seed,
            start,
        }
    }

    /// A register's value before anything is known about the instruction.
    fn register(&self, rng: &mut Rng, i: usize) -> u64 {
        let flat = if self.bits == Bits::B16 { 0 } else { DATA };
        match i {
            // The stack: in the arena, nearly always.
            4 => {
                let inside = flat + 0x800 + rng.below(0x100) * 8;
                match rng.below(20) {
                    0 => flat + rng.below(0x2010),
                    1 => rng.integer(),
                    _ => inside,
                }
            }
            5..=7 if !rng.chance(25) => flat + 0x400 + rng.below(0x1800),
            1 if rng.chance(50) => rng.below(40),
            _ if rng.chance(15) => flat + rng.below(0x2000),
            _ => rng.integer(),
        }
    }

    /// Encodes an instance of `code` with random operands.
    fn make(&self, rng: &mut Rng, code: Code, ip: u64) -> Option<Made> {
        for _ in 0..8 {
            let mut bytes = encode(rng, code.op_code(), self.bits);
            let bits = self.bits as u32;
            let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE);
            let insn = decoder.decode();
            if insn.is_invalid() || !self.allowed[insn.code() as usize] || unfit(&insn, self.bits) {
                continue;
            }
            let offsets = decoder.get_constant_offsets(&insn);
            bytes.truncate(insn.len());
            if offsets.has_immediate() && rng.chance(60) {
                let value = rng.integer().to_le_bytes();
                let at = offsets.immediate_offset();
                bytes[at..at + offsets.immediate_size()]
                    .copy_from_slice(&value[..offsets.immediate_size()]);
            }
            if insn.mnemonic() == Mnemonic::Enter {
                let at = offsets.immediate_offset();
                bytes[at + 1] &= 1;
                bytes[at + 2] &= if rng.chance(80) { 3 } else { 63 };
            }
            let insn = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE).decode();
            if insn.is_invalid() || !self.allowed[insn.code() as usize] || unfit(&insn, self.bits) {
                continue;
            }
            return Some(Made { bytes, insn });
        }
        None
    }

    /// Adds the instruction to the case. Registers that none before it has used are set so that its operands are good
    /// ones.
    fn append(&self, rng: &mut Rng, case: &mut Case, made: Made, taken: &mut Taken) -> Instruction {
        let Made { mut bytes, mut insn } = made;
        let first = case.count == 0;
        if first {
            implicit_operands(rng, case, &insn, self.bits);
        }
        if has_memory(&insn) && !rng.chance(if first { 3 } else { 1 }) {
            let ip = insn.ip();
            let bits = self.bits as u32;
            let mut decoder = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE);
            let again = decoder.decode();
            let offsets = decoder.get_constant_offsets(&again);
            aim(rng, case, &insn, &mut bytes, &offsets, taken);
            insn = Decoder::with_ip(bits, &bytes, ip, DecoderOptions::NONE).decode();
        }
        if first {
            bit_offset(rng, case, &insn);
            note_target(case, &insn);
            acceptable_state(rng, case, &insn);
            stay_out_of_64_bits(case, &insn);
        }
        taken.note(&insn);
        let at = case.code_len as usize;
        case.code[at..at + bytes.len()].copy_from_slice(&bytes);
        case.code_len += bytes.len() as u32;
        case.count += 1;
        insn
    }
}
