//! Cases: an opcode of the decoder's table, random prefixes and operands, registers chosen so that most memory operands
//! hit the arena, and values at the edges.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction,
    MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
};

use super::case::{
    Bits, CODE, CODE_MAX, CODE_OFFSET, Case, DATA, RO, State, USER_DS, USER32_CS, USER64_CS, ldt,
};
use super::random::Rng;

/// What a guest may use without the CPU having been told more: x86-64-v2 and what is judged beside it.
fn shown(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::MULTIBYTENOP
            | F::CMOV
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::POPCNT
            | F::CX8
            | F::CMPXCHG16B
            | F::FXSR
            | F::XSAVE
            | F::XSAVEOPT
            | F::FSGSBASE
            | F::PAUSE
            | F::CLFSH
            | F::PREFETCHW
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
    )
}

/// Left out, each for a reason.
fn excluded(code: Code, bits: Bits) -> bool {
    use Mnemonic as M;
    let info = code.op_code();
    match code.mnemonic() {
        // Different by design: time, identification, what the kernel answers.
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Xgetbv | M::Rdrand | M::Rdseed => true,
        M::Syscall | M::Sysenter | M::Int | M::Into | M::Int1 | M::Int3 => true,
        // Linux answers for the processor (UMIP).
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => true,
        // The decoder's notation for what is two instructions; what other makers had.
        M::Fstenv
        | M::Fsave
        | M::Fstcw
        | M::Fstsw
        | M::Fclex
        | M::Finit
        | M::Feni
        | M::Fdisi
        | M::Fsetpm
        | M::Frstpm
        | M::Fstdw
        | M::Fstsg
        | M::Fnstdw
        | M::Fnstsg => true,
        // Far pointers with 64-bit offsets are Intel's alone; MOVSXD to 16 bits reads 32 on AMD.
        _ if matches!(
            code,
            Code::Jmp_m1664
                | Code::Call_m1664
                | Code::Lfs_r64_m1664
                | Code::Lgs_r64_m1664
                | Code::Lss_r64_m1664
                | Code::Movsxd_r16_rm16
        ) =>
        {
            true
        }
        // BSWAP of 16 bits is undefined.
        M::Bswap if code == Code::Bswap_r16 => true,
        // Reserved NOPs that CET and MPX have taken, and UD0's operand, differ from maker to maker.
        M::Reservednop | M::Ud0 | M::Ud1 => true,
        // In 64-bit mode an operand-size prefix on near branches means something else on AMD.
        _ if bits == Bits::B64
            && info.operand_size() == 16
            && code.op_code().flow_control_is_near() =>
        {
            true
        }
        _ => false,
    }
}

trait NearBranch {
    fn flow_control_is_near(&self) -> bool;
}

impl NearBranch for OpCodeInfo {
    fn flow_control_is_near(&self) -> bool {
        let far = self
            .op_kinds()
            .iter()
            .any(|k| matches!(k, OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2));
        self.code().flow_control() != FlowControl::Next && !far
    }
}

/// The forms that are judged in a mode.
pub fn codes(bits: Bits) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let in_mode = match bits {
                Bits::B16 => info.mode16(),
                Bits::B32 => info.mode32(),
                Bits::B64 => info.mode64(),
            };
            code.encoding() == EncodingKind::Legacy
                && info.is_instruction()
                && in_mode
                && code.cpuid_features().iter().all(|f| shown(*f))
                && !excluded(*code, bits)
        })
        .collect()
}

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
        let made = self.make(&mut rng, code, case.start.rip, true)?;
        let insn = self.place(&mut rng, &mut case, made);
        case.step = insn.flow_control() != FlowControl::Next;
        Some((case, vec![insn]))
    }

    /// The case of `seed`: a run of up to 20 instructions that do not branch.
    pub fn run(&self, seed: u64) -> (Case, Vec<Instruction>) {
        let mut rng = Rng::new(seed);
        let mut case = self.begin(&mut rng, seed);
        let wanted = 5 + rng.below(16) as usize;
        let mut all = Vec::new();
        // Status flags that no instruction may read any more because they are undefined.
        let mut undefined = 0;
        for _ in 0..wanted * 20 {
            if all.len() == wanted || case.code_len as usize + 16 > CODE_MAX {
                break;
            }
            let code = rng.pick(&self.codes);
            let ip = case.start.rip + u64::from(case.code_len);
            let Some(made) = self.make(&mut rng, code, ip, all.is_empty()) else { continue };
            let insn = &made.insn;
            let fits = insn.flow_control() == FlowControl::Next
                && !in_runs_unfit(insn)
                && insn.rflags_read() & undefined == 0;
            if !fits {
                continue;
            }
            if super::compare::undefined_flags(insn) == 0 && !counts(insn) {
                undefined &= !insn.rflags_modified();
            }
            undefined |= super::compare::undefined_flags(insn);
            let insn = self.append(&mut rng, &mut case, made, all.is_empty());
            all.push(insn);
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
    fn make(&self, rng: &mut Rng, code: Code, ip: u64, _first: bool) -> Option<Made> {
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

    fn place(&self, rng: &mut Rng, case: &mut Case, made: Made) -> Instruction {
        self.append(rng, case, made, true)
    }

    /// Adds the instruction to the case; while the registers are still free, makes its memory operand hit.
    fn append(&self, rng: &mut Rng, case: &mut Case, made: Made, free: bool) -> Instruction {
        let Made { mut bytes, mut insn } = made;
        if free {
            implicit_operands(rng, case, &insn, self.bits);
        }
        if has_memory(&insn) && !rng.chance(3) {
            let ip = insn.ip();
            let mut decoder = Decoder::with_ip(self.bits as u32, &bytes, ip, DecoderOptions::NONE);
            let again = decoder.decode();
            let offsets = decoder.get_constant_offsets(&again);
            aim(rng, case, &insn, &mut bytes, &offsets, free);
            insn = Decoder::with_ip(self.bits as u32, &bytes, ip, DecoderOptions::NONE).decode();
        }
        if free {
            bit_offset(rng, case, &insn);
        }
        let at = case.code_len as usize;
        case.code[at..at + bytes.len()].copy_from_slice(&bytes);
        case.code_len += bytes.len() as u32;
        case.count += 1;
        insn
    }
}

fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Shifts and rotates by a count that is not known beforehand, and repeated string instructions, may leave flags.
fn counts(insn: &Instruction) -> bool {
    insn.op_count() > 1 && insn.op_register(insn.op_count() - 1) == Register::CL
        || insn.has_rep_prefix()
        || insn.has_repne_prefix()
}

/// Not within a run: what makes the flags, the stack or the segments something else for the rest of it.
fn in_runs_unfit(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Popf
            | M::Popfd
            | M::Popfq
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Fnstenv
            | M::Fnsave
            | M::Fxsave
            | M::Fxsave64
            | M::Bsf
            | M::Bsr
            | M::Shld
            | M::Shrd
            | M::Aaa
            | M::Aas
            | M::Daa
            | M::Das
    ) || (0..insn.op_count()).any(|i| insn.op_register(i).is_segment_register())
}

/// Encodings that decode, but whose meaning the makers do not agree about.
fn unfit(insn: &Instruction, bits: Bits) -> bool {
    let near = matches!(
        insn.flow_control(),
        FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Call
            | FlowControl::IndirectCall
            | FlowControl::Return
    );
    let state = matches!(
        insn.mnemonic(),
        Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
    );
    let names = |register: Register| {
        insn.memory_base().full_register() == register
            || insn.memory_index().full_register() == register
    };
    // LOCK MOV CR8, an AMD extension.
    insn.has_lock_prefix() && insn.mnemonic() == Mnemonic::Mov
        // XCHG R8, RAX or PAUSE.
        || insn.mnemonic() == Mnemonic::Pause && insn.len() > 2
        // AMD lets SHA's operands be unaligned, Intel does not.
        || insn.cpuid_features() == [CpuidFeature::SHA] && has_memory(insn)
        // EDX:EAX must be what the guest may ask for.
        || state && (names(Register::RAX) || names(Register::RDX))
        || near && bits == Bits::B64 && insn.code().op_code().operand_size() == 16
}

/// Encodes `info` with random prefixes, ModRM and the rest.
fn encode(rng: &mut Rng, info: &OpCodeInfo, bits: Bits) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    if rng.chance(15) {
        bytes.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    let default = if bits == Bits::B16 { 16 } else { 32 };
    let other_size = match info.operand_size() {
        0 => info.mandatory_prefix() == MandatoryPrefix::None && rng.chance(6),
        64 => false,
        size => size != default,
    };
    if other_size {
        bytes.push(0x66);
    }
    let address = match bits {
        Bits::B16 => 16,
        Bits::B32 => 32,
        Bits::B64 => 64,
    };
    if if info.address_size() == 0 { rng.chance(12) } else { info.address_size() != address } {
        bytes.push(0x67);
    }
    if info.can_use_lock_prefix() && rng.chance(25) {
        bytes.push(0xf0);
    }
    if info.can_use_rep_prefix() && rng.chance(50) {
        bytes.push(0xf3);
    } else if info.can_use_repne_prefix() && rng.chance(50) {
        bytes.push(0xf2);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        _ => {}
    }
    if bits == Bits::B64 && (info.operand_size() == 64 || rng.chance(40)) {
        let wide = info.operand_size() == 64 && !(info.default_op_size64() && rng.chance(80));
        bytes.push(0x40 | u8::from(wide) << 3 | rng.next() as u8 & 7);
    }
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    use OpCodeOperandKind as K;
    let in_opcode = info.op_kinds().iter().any(|k| {
        matches!(k, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
    });
    let register = if in_opcode { rng.next() as u8 & 7 } else { 0 };
    let opcode = info.op_code();
    if info.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
    }
    bytes.push(opcode as u8 | register);
    let mut modrm = rng.next() as u8;
    if rng.chance(35) {
        modrm |= 0xc0;
    }
    if info.group_index() >= 0 {
        modrm = modrm & 0xc7 | (info.group_index() as u8) << 3;
    }
    bytes.push(modrm);
    for _ in 0..3 {
        bytes.extend(rng.next().to_le_bytes());
    }
    bytes
}

/// Gives registers that the instruction uses without naming them values that make sense.
fn implicit_operands(rng: &mut Rng, case: &mut Case, insn: &Instruction, bits: Bits) {
    use Mnemonic as M;
    let flat = if bits == Bits::B16 { 0 } else { DATA };
    let regs = &mut case.start.regs;
    let string = insn.is_string_instruction();
    if (insn.has_rep_prefix() || insn.has_repne_prefix()) && string {
        regs[1] = match rng.below(10) {
            0 => 0,
            1 => 0x1_0000_0000 + rng.below(4),
            2 => rng.below(0x800),
            _ => rng.below(24),
        };
    }
    if string || matches!(insn.mnemonic(), M::Maskmovdqu | M::Maskmovq) {
        for i in [6, 7] {
            regs[i] = match rng.below(16) {
                0 => flat + 0x1ff0 + rng.below(0x20),
                1 => flat + rng.below(0x10),
                2 => flat + 0x0ff0 + rng.below(0x20),
                _ => flat + 0x100 + rng.below(0x1d00),
            };
        }
        if rng.chance(15) {
            regs[6] = regs[7].wrapping_add(rng.below(16)).wrapping_sub(8);
        }
    }
    // What alignment checks ask of operands beyond 8 bytes differs.
    let unclear = matches!(insn.mnemonic(), M::Enter | M::Maskmovq | M::Maskmovdqu);
    if unclear || !matches!(insn.memory_size().size(), 0 | 1 | 2 | 4 | 8) {
        case.start.rflags &= !(1 << 18);
    }
    let regs = &mut case.start.regs;
    match insn.mnemonic() {
        // Whether the permission or the count comes first differs.
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => regs[1] = 1 + rng.below(4),
        M::Xlatb => regs[3] = flat + rng.below(0x1f00),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xrstor | M::Xrstor64 => {
            // The host has more components than the guest is shown.
            (regs[0], regs[2]) = (rng.below(4), 0);
        }
        M::Div | M::Idiv if rng.chance(70) => {
            // A quotient that mostly fits.
            regs[2] = match rng.below(4) {
                0 => 0,
                1 => u64::MAX,
                _ => rng.below(16),
            };
            if rng.chance(50) {
                regs[0] &= 0xfff;
            }
        }
        M::Iret | M::Iretd | M::Iretq | M::Retf => {}
        _ => {}
    }
    let selector = segment_operand(insn);
    if let Some(register) = selector {
        regs[register] = regs[register] & !0xffff | u64::from(selector_value(rng));
    }
}

/// The register that holds a selector to be loaded or looked at.
fn segment_operand(insn: &Instruction) -> Option<usize> {
    use Mnemonic as M;
    let takes = matches!(insn.mnemonic(), M::Lar | M::Lsl | M::Verr | M::Verw)
        || insn.op0_register().is_segment_register();
    let i = insn.op_count().checked_sub(1)?;
    let register = insn.op_register(i);
    (takes && insn.op_kind(i) == OpKind::Register && register.is_gpr())
        .then(|| register.full_register() as usize - Register::RAX as usize)
        .filter(|n| *n < 16)
}

/// Selectors worth loading.
pub fn selector_value(rng: &mut Rng) -> u16 {
    if rng.chance(60) {
        return ldt(rng.below(11) as u16) & !(rng.below(12) as u16 / 9);
    }
    rng.pick(&[
        0, 1, 3, 0x2b, 0x28, 0x23, 0x33, 0x10, 0x18, 0x1b, 0x40, 0x50, 0x63, 0x83, 0xffff, 0x57,
    ])
}

/// BT and its kin reach far with a register as bit offset: keep most of them in the arena.
fn bit_offset(rng: &mut Rng, case: &mut Case, insn: &Instruction) {
    use Mnemonic as M;
    let bit = matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
    if !bit || insn.op0_kind() != OpKind::Memory || insn.op1_kind() != OpKind::Register {
        return;
    }
    let register = insn.op1_register().full_register() as usize - Register::RAX as usize;
    let names = [insn.memory_base(), insn.memory_index()];
    if names.contains(&insn.op1_register().full_register()) || rng.chance(15) {
        return;
    }
    if names.iter().any(|r| r.full_register() == insn.op1_register().full_register()) {
        return;
    }
    case.start.regs[register] = rng.below(0x1000).wrapping_sub(0x800);
}

/// The base of the segment that the memory operand lies in.
fn segment_base(case: &Case, insn: &Instruction) -> u64 {
    let register = insn.memory_segment();
    let number = (register as usize).wrapping_sub(Register::ES as usize);
    if case.bits == Bits::B64 {
        return match register {
            Register::FS => case.start.bases[0],
            Register::GS => case.start.bases[1],
            _ => 0,
        };
    }
    let selector = case.start.selectors.get(number).copied().unwrap_or(0);
    if selector & 4 == 0 {
        return 0;
    }
    super::case::LDT.get(usize::from(selector >> 3)).map_or(0, |entry| entry.base)
}

/// Where the memory operand is to lie.
fn target(rng: &mut Rng, insn: &Instruction) -> u64 {
    let size = insn.memory_size().size().max(1) as u64;
    let size = if size > 0x200 { 64 } else { size };
    let inside = DATA + 0x200 + rng.below(0x1a00);
    let align = match insn.memory_size().size() {
        0 => 64,
        n if n >= 512 => 64,
        _ => size.next_power_of_two(),
    };
    match rng.below(40) {
        // Across the end, across the pages, read-only, nowhere.
        0 | 1 => DATA + 0x2000 - rng.below(size + 4),
        2 | 3 => DATA + 0x1000 - rng.below(size + 1),
        4 | 5 => RO + rng.below(0x1000 - size) & !(align - 1),
        6 => rng.integer(),
        7 => DATA - 1 - rng.below(8),
        8..=15 => inside,
        _ => inside & !(align - 1),
    }
}

/// Chooses base, index or displacement so that the operand lies at a chosen place.
fn aim(
    rng: &mut Rng,
    case: &mut Case,
    insn: &Instruction,
    bytes: &mut [u8],
    offsets: &iced_x86::ConstantOffsets,
    free: bool,
) {
    let linear = target(rng, insn);
    case.target = linear;
    let wanted = linear.wrapping_sub(segment_base(case, insn));
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let full = |r: Register| r.full_register() as usize - Register::RAX as usize;
    let mut patch = |value: u64| {
        let (at, len) = (offsets.displacement_offset(), offsets.displacement_size());
        if len >= 2 {
            bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
    };
    let scale = u64::from(insn.memory_index_scale());
    match (base, index) {
        (Register::RIP | Register::EIP, _) => patch(wanted.wrapping_sub(insn.next_ip())),
        (Register::None, Register::None) => patch(wanted),
        _ if !free => {}
        (Register::None, index) => {
            let value = rng.below(64);
            set_address(case, index, value);
            patch(wanted.wrapping_sub(value * scale));
        }
        (base, index) => {
            let displacement = insn.memory_displacement64();
            if index != Register::None && full(index) == full(base) {
                return;
            }
            let mut scaled = 0;
            if index != Register::None {
                let value = if rng.chance(85) { rng.below(64) } else { rng.integer() };
                set_address(case, index, value);
                scaled = value.wrapping_mul(scale);
            }
            set_address(case, base, wanted.wrapping_sub(scaled).wrapping_sub(displacement));
        }
    }
}

/// Sets as much of a register as an address of its size uses.
fn set_address(case: &mut Case, register: Register, value: u64) {
    let slot = &mut case.start.regs[register.full_register() as usize - Register::RAX as usize];
    let mask = match register.size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    *slot = *slot & !mask | value & mask;
}

/// x87 and SSE state: mostly with exceptions masked, sometimes not, rarely with one pending.
fn fill_fx(rng: &mut Rng, start: &mut State) {
    let fcw: u16 = match rng.below(10) {
        0..=5 => 0x37f,
        6 | 7 => 0x7f | (rng.below(16) as u16) << 8,
        _ => rng.next() as u16 & 0xf3f | 0x40,
    };
    let mut fsw = (rng.below(8) as u16) << 11 | rng.next() as u16 & 0x4700;
    if rng.chance(20) {
        fsw |= rng.next() as u16 & 0x3f;
    }
    if !rng.chance(3) {
        fsw &= fcw | !0x3f;
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    if fsw & 1 != 0 && rng.chance(30) {
        fsw |= 0x40;
    }
    let ftw = match rng.below(4) {
        0 => rng.next() as u8,
        1 => 0,
        _ => 0xff,
    };
    let mxcsr: u32 = match rng.below(10) {
        0..=5 => 0x1f80,
        6 | 7 => 0x1f80 | rng.next() as u32 & 0xe07f,
        _ => rng.next() as u32 & 0xffff,
    };
    let mxcsr = if rng.chance(30) { mxcsr | rng.next() as u32 & 0x3f } else { mxcsr };
    let fx = &mut start.fx;
    fx[0..2].copy_from_slice(&fcw.to_le_bytes());
    fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    fx[4] = ftw;
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for i in 0..8 {
        fx[32 + 16 * i..42 + 16 * i].copy_from_slice(&rng.extended());
    }
    for word in fx[160..].chunks_exact_mut(8) {
        word.copy_from_slice(&rng.lane().to_le_bytes());
    }
}
