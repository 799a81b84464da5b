//! Operands: registers chosen so that most memory operands hit the arena, and values at the edges.

use iced_x86::{
    Code, ConstantOffsets, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::case::{Bits, Case, DATA, DATA_LEN, RO, State, USER64_CS, ldt};
use super::forms::has_memory;
use super::random::Rng;

/// What the instructions of a run have done with the general-purpose registers so far: a bit for each.
#[derive(Default)]
pub struct Taken {
    used: u32,
    changed: u32,
}

impl Taken {
    pub fn note(&mut self, insn: &Instruction) {
        let mut factory = InstructionInfoFactory::new();
        for used in factory.info(insn).used_registers() {
            if !used.register().is_gpr() {
                continue;
            }
            let bit = 1 << full(used.register());
            self.used |= bit;
            if used.access() != OpAccess::Read {
                self.changed |= bit;
            }
        }
    }

    /// The register may still be given any value.
    fn free(&self, register: Register) -> bool {
        self.used >> full(register) & 1 == 0
    }

    /// The register still has the value that it began with.
    fn known(&self, register: Register) -> bool {
        self.changed >> full(register) & 1 == 0
    }
}

/// The number of a general-purpose register of any size.
pub fn full(register: Register) -> usize {
    register.full_register() as usize - Register::RAX as usize
}

/// Gives registers that the instruction uses without naming them values that make sense.
pub fn implicit_operands(rng: &mut Rng, case: &mut Case, insn: &Instruction, bits: Bits) {
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
    // So does whether a store that an unmasked exception keeps from happening is checked.
    let x87 =
        matches!(insn.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp);
    if unclear || x87 || !matches!(insn.memory_size().size(), 0 | 1 | 2 | 4 | 8) {
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
fn selector_value(rng: &mut Rng) -> u16 {
    if rng.chance(60) {
        return ldt(rng.below(11) as u16) & !(rng.below(12) as u16 / 9);
    }
    rng.pick(&[
        0, 1, 3, 0x2b, 0x28, 0x23, 0x33, 0x10, 0x18, 0x1b, 0x40, 0x50, 0x63, 0x83, 0xffff, 0x57,
    ])
}

/// BT and its kin reach far with a register as bit offset: keep most of them in the arena.
pub fn bit_offset(rng: &mut Rng, case: &mut Case, insn: &Instruction) {
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
        4 | 5 => (RO + rng.below(0x1000 - size)) & !(align - 1),
        6 => rng.integer(),
        7 => DATA - 1 - rng.below(8),
        8..=15 => inside,
        _ => inside & !(align - 1),
    }
}

/// Chooses base, index or displacement so that the operand lies at a chosen place.
pub fn aim(
    rng: &mut Rng,
    case: &mut Case,
    insn: &Instruction,
    bytes: &mut [u8],
    offsets: &ConstantOffsets,
    taken: &Taken,
) {
    let linear = target(rng, insn);
    case.target = linear;
    let wanted = linear.wrapping_sub(segment_base(case, insn));
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let width = offsets.displacement_size();
    let mut patch = |value: u64| {
        let at = offsets.displacement_offset();
        if width >= 2 {
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
    };
    match (base, index) {
        (Register::RIP | Register::EIP, _) => return patch(wanted.wrapping_sub(insn.next_ip())),
        (Register::None, Register::None) => return patch(wanted),
        _ => {}
    }
    let mut scaled = 0;
    if index != Register::None {
        if base != Register::None && full(index) == full(base) {
            return;
        }
        let value = if rng.chance(85) { rng.below(64) } else { rng.integer() };
        if taken.free(index) {
            set_address(case, index, value);
        } else if !taken.known(index) {
            return;
        }
        scaled = address_part(case, index).wrapping_mul(scale);
    }
    let displacement = insn.memory_displacement64();
    if base == Register::None {
        return patch(wanted.wrapping_sub(scaled));
    }
    if taken.free(base) {
        return set_address(case, base, wanted.wrapping_sub(scaled).wrapping_sub(displacement));
    }
    if taken.known(base) {
        patch(wanted.wrapping_sub(scaled).wrapping_sub(address_part(case, base)));
    }
}

/// Notes where the memory operand lies with the registers as they are.
pub fn note_target(case: &mut Case, insn: &Instruction) {
    let part = |register: Register| match register {
        Register::None | Register::RIP | Register::EIP => 0,
        register => address_part(case, register),
    };
    let scaled = part(insn.memory_index()).wrapping_mul(insn.memory_index_scale().into());
    let offset =
        insn.memory_displacement64().wrapping_add(part(insn.memory_base())).wrapping_add(scaled);
    let sizes = [insn.memory_base(), insn.memory_index()].map(|r| r.size());
    let offset = match sizes.iter().max() {
        Some(2) => offset & 0xffff,
        Some(4) => offset & 0xffff_ffff,
        _ => offset,
    };
    case.target = segment_base(case, insn).wrapping_add(offset);
}

/// A far branch, RETF or IRET of 16- or 32-bit code finds another selector where that of 64-bit code is: with a state so
/// strange, a process does not always survive its next signal.
pub fn stay_out_of_64_bits(case: &mut Case, insn: &Instruction) {
    let size = match insn.code() {
        Code::Jmp_m1616 | Code::Call_m1616 | Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Jmp_m1632 | Code::Call_m1632 | Code::Retfd | Code::Retfd_imm16 | Code::Iretd => 4,
        _ => return,
    };
    if case.bits == Bits::B64 {
        return;
    }
    let at = if has_memory(insn) {
        case.target
    } else {
        let ss = case.start.selectors[2];
        let entry = super::case::LDT.get(usize::from(ss >> 3)).filter(|_| ss & 4 != 0);
        let mask = if entry.is_none_or(|entry| entry.big) { 0xffff_ffff } else { 0xffff };
        entry.map_or(0, |entry| entry.base) + (case.start.regs[4] & mask)
    };
    let at = at.wrapping_add(size).wrapping_sub(DATA) as usize;
    if let Some(low) = case.start.data.get_mut(at).filter(|low| **low & !3 == USER64_CS as u8 & !3)
    {
        *low ^= 0x80;
    }
}

/// Makes what FXRSTOR, XRSTOR and LDMXCSR read mostly acceptable. The components asked for are those of the guest: the
/// host has more.
pub fn acceptable_state(rng: &mut Rng, case: &mut Case, insn: &Instruction) {
    use Mnemonic as M;
    let header = matches!(insn.mnemonic(), M::Xrstor | M::Xrstor64);
    let at = match insn.mnemonic() {
        M::Ldmxcsr => 0,
        M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 => 24,
        _ => return,
    };
    let area = case.target.wrapping_sub(DATA) as usize;
    if area >= DATA_LEN {
        return;
    }
    let data = &mut case.start.data;
    let Some(mxcsr) = data.get_mut(area + at..area + at + 4) else {
        return;
    };
    let reserved = if rng.chance(10) { 1u32 << (16 + rng.below(16)) } else { 0 };
    mxcsr.copy_from_slice(&(rng.next() as u32 & 0xffff | reserved).to_le_bytes());
    let Some(bytes) = data.get_mut(area + 512..area + 576).filter(|_| header) else { return };
    bytes.fill(0);
    bytes[0] = rng.below(4) as u8;
    if rng.chance(10) {
        bytes[16 + rng.below(8) as usize] = 1;
    }
}

/// As much of a register's value as an address of its size uses.
fn address_part(case: &Case, register: Register) -> u64 {
    let value = case.start.regs[full(register)];
    match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Sets as much of a register as an address of its size uses.
fn set_address(case: &mut Case, register: Register, value: u64) {
    let slot = &mut case.start.regs[full(register)];
    let mask = match register.size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    *slot = *slot & !mask | value & mask;
}

/// x87 and SSE state: mostly with exceptions masked, sometimes not, rarely with one pending.
pub fn fill_fx(rng: &mut Rng, start: &mut State) {
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
