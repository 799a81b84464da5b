//! Integer arithmetic and data movement.

use iced_x86::{Instruction, Mnemonic, Register};

use super::operand::{
    self, address, gpr, mask, modify, modify_locked, read, reg, set_gpr, set_reg, sign_bit,
    sign_extend, size, write,
};
use super::sse;
use crate::fault::{Exec, Fault};
use crate::flags;
use crate::state::{Cpu, reg as r};

/// Flags of an addition of `size` bytes.
pub fn flags_add(cpu: &mut Cpu, size: usize, a: u64, b: u64, res: u64) {
    match size {
        1 => cpu.flags_add::<1>(a, b, res),
        2 => cpu.flags_add::<2>(a, b, res),
        4 => cpu.flags_add::<4>(a, b, res),
        _ => cpu.flags_add::<8>(a, b, res),
    }
}

/// Flags of a subtraction of `size` bytes.
pub fn flags_sub(cpu: &mut Cpu, size: usize, a: u64, b: u64, res: u64) {
    match size {
        1 => cpu.flags_sub::<1>(a, b, res),
        2 => cpu.flags_sub::<2>(a, b, res),
        4 => cpu.flags_sub::<4>(a, b, res),
        _ => cpu.flags_sub::<8>(a, b, res),
    }
}

/// Flags of a logical operation of `size` bytes.
pub fn flags_logic(cpu: &mut Cpu, size: usize, res: u64) {
    flags_res_cf_of(cpu, size, res, false, false);
}

/// ZF, SF and PF of `res`, CF and OF as given.
pub fn flags_res_cf_of(cpu: &mut Cpu, size: usize, res: u64, cf: bool, of: bool) {
    cpu.flags_res_cf_of::<8>(sign_extend(res, size), cf, of);
}

/// The two-operand operations of the first opcodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alu {
    /// ADD.
    Add,
    /// ADC.
    Adc,
    /// SUB and CMP.
    Sub,
    /// SBB.
    Sbb,
    /// AND and TEST.
    And,
    /// OR.
    Or,
    /// XOR.
    Xor,
}

impl Alu {
    fn result(self, a: u64, b: u64, carry: u64) -> u64 {
        match self {
            Self::Add => a.wrapping_add(b),
            Self::Adc => a.wrapping_add(b).wrapping_add(carry),
            Self::Sub => a.wrapping_sub(b),
            Self::Sbb => a.wrapping_sub(b).wrapping_sub(carry),
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
        }
    }

    fn flags(self, cpu: &mut Cpu, size: usize, a: u64, b: u64, res: u64) {
        match self {
            Self::Add | Self::Adc => flags_add(cpu, size, a, b, res),
            Self::Sub | Self::Sbb => flags_sub(cpu, size, a, b, res),
            Self::And | Self::Or | Self::Xor => flags_logic(cpu, size, res),
        }
    }
}

/// ADD, ADC, SUB, SBB, AND, OR, XOR.
pub fn alu(cpu: &mut Cpu, insn: &Instruction, op: Alu) -> Exec {
    let z = size(insn, 0);
    let b = read(cpu, insn, 1)? & mask(z);
    let carry = cpu.cf().into();
    let a = modify(cpu, insn, |a| Some(op.result(a, b, carry)))?;
    op.flags(cpu, z, a, b, op.result(a, b, carry) & mask(z));
    Ok(())
}

/// CMP and TEST: flags only.
pub fn compare(cpu: &mut Cpu, insn: &Instruction, op: Alu) -> Exec {
    let z = size(insn, 0);
    let b = read(cpu, insn, 1)? & mask(z);
    let a = read(cpu, insn, 0)?;
    op.flags(cpu, z, a, b, op.result(a, b, 0) & mask(z));
    Ok(())
}

/// INC and DEC: all flags but CF.
pub fn inc_dec(cpu: &mut Cpu, insn: &Instruction, op: Alu) -> Exec {
    let z = size(insn, 0);
    let cf = cpu.cf();
    let a = modify(cpu, insn, |a| Some(op.result(a, 1, 0)))?;
    op.flags(cpu, z, a, 1, op.result(a, 1, 0) & mask(z));
    cpu.set_cf(cf);
    Ok(())
}

/// NEG.
pub fn neg(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let a = modify(cpu, insn, |a| Some(a.wrapping_neg()))?;
    flags_sub(cpu, z, 0, a, a.wrapping_neg() & mask(z));
    Ok(())
}

/// NOT.
pub fn not(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    modify(cpu, insn, |a| Some(!a)).map(drop)
}

/// MOV between general-purpose registers, memory and immediates.
pub fn mov(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = read(cpu, insn, 1)?;
    write(cpu, insn, 0, value)
}

/// MOVSX and MOVSXD. (MOVZX is MOV: what is read has zeroes above.)
pub fn movsx(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = read(cpu, insn, 1)?;
    let value = sign_extend(value, size(insn, 1));
    write(cpu, insn, 0, value)
}

/// MOVBE and BSWAP swap bytes.
fn swap_bytes(value: u64, size: usize) -> u64 {
    value.swap_bytes() >> (64 - 8 * size)
}

/// MOVBE.
pub fn movbe(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if !cpu.has(super::Feature::Movbe) {
        return Err(Fault::UD);
    }
    let value = read(cpu, insn, 1)?;
    write(cpu, insn, 0, swap_bytes(value, size(insn, 0)))
}

/// BSWAP. Of 16 bits the manual leaves it undefined; processors give 0.
pub fn bswap(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let register = insn.op0_register();
    let value = match register.size() {
        2 => 0,
        z => swap_bytes(gpr(cpu, register), z),
    };
    set_gpr(cpu, register, value);
    Ok(())
}

/// XCHG: with memory always atomic.
pub fn xchg(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    // The encoder's order of operands is free: memory, if any, is operand 0.
    let register = insn.op1_register();
    let value = gpr(cpu, register);
    let old = modify_locked(cpu, insn, true, |_| Some(value))?;
    set_gpr(cpu, register, old);
    Ok(())
}

/// XADD.
pub fn xadd(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let register = insn.op1_register();
    let b = gpr(cpu, register);
    if operand::is_register(insn, 0) {
        // With one register twice, the sum stays.
        let a = gpr(cpu, insn.op0_register());
        set_gpr(cpu, register, a);
        set_gpr(cpu, insn.op0_register(), a.wrapping_add(b));
        flags_add(cpu, z, a, b, a.wrapping_add(b) & mask(z));
        return Ok(());
    }
    let a = modify(cpu, insn, |a| Some(a.wrapping_add(b)))?;
    set_gpr(cpu, register, a);
    flags_add(cpu, z, a, b, a.wrapping_add(b) & mask(z));
    Ok(())
}

/// CMPXCHG.
pub fn cmpxchg(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let wanted = reg(cpu, r::RAX, z);
    let new = gpr(cpu, insn.op1_register());
    let old = modify(cpu, insn, |old| (old == wanted).then_some(new))?;
    if old != wanted {
        set_reg(cpu, r::RAX, z, old);
    }
    flags_sub(cpu, z, wanted, old, wanted.wrapping_sub(old) & mask(z));
    Ok(())
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    let others = cpu.status_flags() & !flags::ZF;
    cpu.set_status_flags(others | if zf { flags::ZF } else { 0 });
}

/// CMPXCHG8B.
pub fn cmpxchg8b(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let pair = |cpu: &Cpu, high, low| reg(cpu, high, 4) << 32 | reg(cpu, low, 4);
    let (wanted, new) = (pair(cpu, r::RDX, r::RAX), pair(cpu, r::RCX, r::RBX));
    let old = modify(cpu, insn, |old| (old == wanted).then_some(new))?;
    if old != wanted {
        set_reg(cpu, r::RAX, 4, old);
        set_reg(cpu, r::RDX, 4, old >> 32);
    }
    set_zf(cpu, old == wanted);
    Ok(())
}

/// CMPXCHG16B: #GP(0) unless aligned.
pub fn cmpxchg16b(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let pair = |cpu: &Cpu, high, low| u128::from(cpu.regs[high]) << 64 | u128::from(cpu.regs[low]);
    let (wanted, new) = (pair(cpu, r::RDX, r::RAX), pair(cpu, r::RCX, r::RBX));
    let lin = sse::aligned(cpu, insn, address(cpu, insn, 16, true), 16)?;
    let old = cpu.rmw::<u128>(lin, insn.has_lock_prefix(), |old| (old == wanted).then_some(new))?;
    if old != wanted {
        cpu.regs[r::RAX] = old as u64;
        cpu.regs[r::RDX] = (old >> 64) as u64;
    }
    set_zf(cpu, old == wanted);
    Ok(())
}

/// LEA.
pub fn lea(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if operand::is_register(insn, 1) {
        return Err(Fault::UD);
    }
    let at = operand::offset(cpu, insn);
    set_gpr(cpu, insn.op0_register(), at);
    Ok(())
}

/// CMOVcc: memory is read, and a 32-bit register's upper half cleared, whatever the condition.
pub fn cmov(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = read(cpu, insn, 1)?;
    let register = insn.op0_register();
    let value = if condition(cpu, insn) { value } else { gpr(cpu, register) };
    set_gpr(cpu, register, value);
    Ok(())
}

/// SETcc.
pub fn setcc(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = condition(cpu, insn).into();
    write(cpu, insn, 0, value)
}

/// Whether the condition in the instruction's name holds.
pub fn condition(cpu: &Cpu, insn: &Instruction) -> bool {
    // The decoder counts conditions as the encoding does, from 1.
    cpu.condition((insn.condition_code() as u8).wrapping_sub(1) & 15)
}

/// CBW, CWDE, CDQE: RAX sign-extended from its half of `to` bytes.
pub fn extend_accumulator(cpu: &mut Cpu, to: usize) -> Exec {
    let value = sign_extend(reg(cpu, r::RAX, to / 2), to / 2);
    set_reg(cpu, r::RAX, to, value);
    Ok(())
}

/// CWD, CDQ, CQO: RDX becomes the sign of RAX.
pub fn extend_into_rdx(cpu: &mut Cpu, size: usize) -> Exec {
    let negative = cpu.regs[r::RAX] & sign_bit(size) != 0;
    set_reg(cpu, r::RDX, size, if negative { u64::MAX } else { 0 });
    Ok(())
}

/// XLAT.
pub fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = operand::load_operand(cpu, insn, 1)?;
    set_reg(cpu, r::RAX, 1, value);
    Ok(())
}

/// LAHF.
pub fn lahf(cpu: &mut Cpu) -> Exec {
    let value = cpu.status_flags() & 0xff | flags::FIXED;
    set_gpr(cpu, Register::AH, value);
    Ok(())
}

/// SAHF.
pub fn sahf(cpu: &mut Cpu) -> Exec {
    let of = cpu.status_flags() & flags::OF;
    let low = gpr(cpu, Register::AH);
    cpu.set_status_flags(low & flags::STATUS & 0xff | of);
    Ok(())
}

/// SALC (undocumented, but every processor has it): AL becomes CF, sign-extended.
pub fn salc(cpu: &mut Cpu) -> Exec {
    let value = if cpu.cf() { 0xff } else { 0 };
    set_reg(cpu, r::RAX, 1, value);
    Ok(())
}

/// ADCX and ADOX: an addition with a carry chain of its own.
pub fn adcx_adox(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if !cpu.has(super::Feature::Adx) {
        return Err(Fault::UD);
    }
    let b = read(cpu, insn, 1)?;
    let register = insn.op0_register();
    let a = gpr(cpu, register);
    let in_of = insn.mnemonic() == Mnemonic::Adox;
    let carry = if in_of { cpu.of() } else { cpu.cf() };
    let sum = u128::from(a) + u128::from(b) + u128::from(carry);
    set_gpr(cpu, register, sum as u64);
    let out = sum >> (8 * register.size()) != 0;
    let (cf, of) = if in_of { (cpu.cf(), out) } else { (out, cpu.of()) };
    cpu.set_cf_of(cf, of);
    Ok(())
}

/// CRC32 (the Castagnoli polynomial, bits reflected).
pub fn crc32(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let value = read(cpu, insn, 1)?;
    let register = insn.op0_register();
    let mut crc = gpr(cpu, register) as u32;
    for byte in &value.to_le_bytes()[..size(insn, 1)] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
        }
    }
    set_gpr(cpu, register, crc.into());
    Ok(())
}

/// BOUND: #BR unless the index is inside of the signed bounds in memory.
pub fn bound(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = insn.op0_register().size();
    let index = sign_extend(gpr(cpu, insn.op0_register()), z) as i64;
    let segment = operand::segment(cpu, insn);
    let mut bounds = [0i64; 2];
    for (i, bound) in bounds.iter_mut().enumerate() {
        let at = operand::offset_plus(cpu, insn, (i * z) as u64);
        let lin = cpu.linear(segment, at, z as u64, false)?;
        *bound = sign_extend(operand::load(cpu, lin, z)?, z) as i64;
    }
    if index < bounds[0] || index > bounds[1] {
        return Err(Fault::new(crate::fault::vector::BR));
    }
    Ok(())
}

/// CMC, CLC, STC: CF becomes `cf`.
pub fn set_carry(cpu: &mut Cpu, cf: bool) -> Exec {
    cpu.set_cf(cf);
    Ok(())
}

/// CLD and STD.
pub fn set_direction(cpu: &mut Cpu, down: bool) -> Exec {
    cpu.sys_flags = cpu.sys_flags & !flags::DF | if down { flags::DF } else { 0 };
    Ok(())
}

/// What an instruction with a memory operand that it only checks does (cache-line flushes): a load, thrown away.
pub fn touch(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    operand::load_operand(cpu, insn, 1).map(drop)
}
