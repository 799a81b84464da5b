//! Operands: registers by name, effective addresses, loads and stores whose size the instruction says.
//!
//! Values are `u64` with the bits beyond the operand's size zero when they were read; writing ignores those bits.

use iced_x86::{Instruction, OpKind, Register};

use crate::fault::{Exec, Fault};
use crate::mem::Word;
use crate::state::{Cpu, seg};

const AL: usize = Register::AL as usize;
const AX: usize = Register::AX as usize;
const EAX: usize = Register::EAX as usize;
const RAX: usize = Register::RAX as usize;
const ES: usize = Register::ES as usize;

/// All bits of an operand of `size` bytes.
#[inline(always)]
pub fn mask(size: usize) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The top bit of an operand of `size` bytes.
#[inline(always)]
pub fn sign_bit(size: usize) -> u64 {
    1 << (8 * size - 1)
}

/// `value` of `size` bytes, sign-extended.
#[inline(always)]
pub fn sign_extend(value: u64, size: usize) -> u64 {
    match size {
        1 => value as i8 as u64,
        2 => value as i16 as u64,
        4 => value as i32 as u64,
        _ => value,
    }
}

/// Where a byte register lies: index of the whole register, and shift.
#[inline(always)]
fn byte_register(register: usize) -> (usize, u32) {
    match register - AL {
        low @ 0..4 => (low, 0),
        high @ 4..8 => (high - 4, 8),
        other => (other - 4, 0),
    }
}

/// Reads a general-purpose register of any size, AH to BH included.
#[inline]
pub fn gpr(cpu: &Cpu, register: Register) -> u64 {
    let number = register as usize;
    if number >= RAX {
        cpu.regs[number - RAX]
    } else if number >= EAX {
        cpu.regs[number - EAX] & 0xffff_ffff
    } else if number >= AX {
        cpu.regs[number - AX] & 0xffff
    } else {
        let (whole, shift) = byte_register(number);
        cpu.regs[whole] >> shift & 0xff
    }
}

/// Writes a general-purpose register of any size: 32 bits clear the upper half, smaller ones leave the rest.
#[inline]
pub fn set_gpr(cpu: &mut Cpu, register: Register, value: u64) {
    let number = register as usize;
    if number >= RAX {
        cpu.regs[number - RAX] = value;
    } else if number >= EAX {
        cpu.regs[number - EAX] = value & 0xffff_ffff;
    } else if number >= AX {
        let whole = &mut cpu.regs[number - AX];
        *whole = *whole & !0xffff | value & 0xffff;
    } else {
        let (whole, shift) = byte_register(number);
        let whole = &mut cpu.regs[whole];
        *whole = *whole & !(0xff << shift) | (value & 0xff) << shift;
    }
}

/// Reads the low `size` bytes of general-purpose register `index` (RAX is 0).
#[inline(always)]
pub fn reg(cpu: &Cpu, index: usize, size: usize) -> u64 {
    cpu.regs[index] & mask(size)
}

/// Writes the low `size` bytes of general-purpose register `index`, as [`set_gpr`] does.
#[inline(always)]
pub fn set_reg(cpu: &mut Cpu, index: usize, size: usize, value: u64) {
    let whole = &mut cpu.regs[index];
    *whole = match size {
        1 | 2 => *whole & !mask(size) | value & mask(size),
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// The index in [`Cpu::segs`] of a segment register.
#[inline(always)]
pub fn segment_index(register: Register) -> usize {
    match (register as usize).wrapping_sub(ES) {
        index @ 0..6 => index,
        _ => seg::DS,
    }
}

/// The size in bytes of operand `i`, a register or memory.
#[inline]
pub fn size(insn: &Instruction, i: u32) -> usize {
    match insn.op_kind(i) {
        OpKind::Register => insn.op_register(i).size(),
        _ => insn.memory_size().size(),
    }
}

/// The instruction's operand `i` is a register.
#[inline]
pub fn is_register(insn: &Instruction, i: u32) -> bool {
    insn.op_kind(i) == OpKind::Register
}

/// The bits that the instruction's effective addresses have.
#[inline]
fn address_mask(insn: &Instruction) -> u64 {
    let of = |register: Register| match register as usize {
        n if n >= RAX => u64::MAX,
        n if n >= EAX => 0xffff_ffff,
        _ => 0xffff,
    };
    match (insn.memory_base(), insn.memory_index()) {
        (Register::None, Register::None) => mask(insn.memory_displ_size() as usize),
        (Register::None, index) => of(index),
        (base, _) => of(base),
    }
}

/// The effective address of the memory operand moved by `delta` bytes: an offset in its segment.
#[inline]
pub fn offset_plus(cpu: &Cpu, insn: &Instruction, delta: u64) -> u64 {
    let mut at = insn.memory_displacement64().wrapping_add(delta);
    let base = insn.memory_base();
    match base {
        Register::None => {}
        Register::RIP => return at,
        Register::EIP => return at & 0xffff_ffff,
        base => at = at.wrapping_add(gpr(cpu, base)),
    }
    let index = insn.memory_index();
    if index != Register::None {
        let scale = insn.memory_index_scale();
        at = at.wrapping_add(gpr(cpu, index).wrapping_mul(scale.into()));
    }
    at & address_mask(insn)
}

/// The effective address of the memory operand: an offset in its segment.
#[inline]
pub fn offset(cpu: &Cpu, insn: &Instruction) -> u64 {
    offset_plus(cpu, insn, 0)
}

/// The linear address of the memory operand of `size` bytes, checked against its segment (or for being canonical).
#[inline]
pub fn address(cpu: &Cpu, insn: &Instruction, size: usize, write: bool) -> Exec<u64> {
    cpu.linear(segment(cpu, insn), offset(cpu, insn), size as u64, write)
}

/// The index in [`Cpu::segs`] of the memory operand's segment. 64-bit mode ignores the prefixes of ES, CS, SS and DS, so that a non-canonical
/// address is #SS or #GP by the base register alone.
#[inline]
pub fn segment(cpu: &Cpu, insn: &Instruction) -> usize {
    if cpu.mode.bits != 64 || !insn.has_segment_prefix() || insn.segment_prefix() >= Register::FS {
        return segment_index(insn.memory_segment());
    }
    match insn.memory_base().full_register() {
        Register::RSP | Register::RBP => seg::SS,
        _ => seg::DS,
    }
}

/// Loads `size` bytes at linear address `lin`.
#[inline]
pub fn load(cpu: &mut Cpu, lin: u64, size: usize) -> Exec<u64> {
    Ok(match size {
        1 => cpu.load::<u8>(lin)?.into(),
        2 => cpu.load::<u16>(lin)?.into(),
        4 => cpu.load::<u32>(lin)?.into(),
        _ => cpu.load::<u64>(lin)?,
    })
}

/// Stores `size` bytes at linear address `lin`.
#[inline]
pub fn store(cpu: &mut Cpu, lin: u64, size: usize, value: u64) -> Exec {
    match size {
        1 => cpu.store(lin, value as u8),
        2 => cpu.store(lin, value as u16),
        4 => cpu.store(lin, value as u32),
        _ => cpu.store(lin, value),
    }
}

/// Loads the memory operand.
#[inline]
pub fn load_operand(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Exec<u64> {
    let lin = address(cpu, insn, size, false)?;
    load(cpu, lin, size)
}

/// Stores into the memory operand.
#[inline]
pub fn store_operand(cpu: &mut Cpu, insn: &Instruction, size: usize, value: u64) -> Exec {
    let lin = address(cpu, insn, size, true)?;
    store(cpu, lin, size, value)
}

/// Reads operand `i`: a general-purpose register, memory of the size that the instruction says, or an immediate,
/// extended to 64 bits.
#[inline]
pub fn read(cpu: &mut Cpu, insn: &Instruction, i: u32) -> Exec<u64> {
    match insn.op_kind(i) {
        OpKind::Register => Ok(gpr(cpu, insn.op_register(i))),
        OpKind::Memory => load_operand(cpu, insn, insn.memory_size().size()),
        _ => insn.try_immediate(i).map_err(|_| Fault::UD),
    }
}

/// Writes operand `i`, a general-purpose register or memory.
#[inline]
pub fn write(cpu: &mut Cpu, insn: &Instruction, i: u32, value: u64) -> Exec {
    if is_register(insn, i) {
        set_gpr(cpu, insn.op_register(i), value);
        return Ok(());
    }
    store_operand(cpu, insn, insn.memory_size().size(), value)
}

/// Applies `f` to operand 0 and writes what it gives; gives the old value. Atomic with a LOCK prefix. Where `f` gives
/// nothing, memory is written with what it held and a register is left alone.
#[inline]
pub fn modify(cpu: &mut Cpu, insn: &Instruction, f: impl FnMut(u64) -> Option<u64>) -> Exec<u64> {
    modify_locked(cpu, insn, insn.has_lock_prefix(), f)
}

/// As [`modify`], atomic if `locked`.
pub fn modify_locked(
    cpu: &mut Cpu,
    insn: &Instruction,
    locked: bool,
    mut f: impl FnMut(u64) -> Option<u64>,
) -> Exec<u64> {
    if is_register(insn, 0) {
        let register = insn.op0_register();
        let old = gpr(cpu, register);
        if let Some(new) = f(old) {
            set_gpr(cpu, register, new);
        }
        return Ok(old);
    }
    let size = insn.memory_size().size();
    let lin = address(cpu, insn, size, true)?;
    modify_at(cpu, lin, size, locked, f)
}

/// Applies `f` to `size` bytes at linear address `lin`, as [`modify`] does.
#[inline]
pub fn modify_at(
    cpu: &mut Cpu,
    lin: u64,
    size: usize,
    locked: bool,
    mut f: impl FnMut(u64) -> Option<u64>,
) -> Exec<u64> {
    fn of<T: Word>(
        cpu: &mut Cpu,
        lin: u64,
        locked: bool,
        f: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Exec<u64> {
        Ok(cpu.rmw::<T>(lin, locked, |old| f(old.to_u64()).map(T::from_u64))?.to_u64())
    }
    match size {
        1 => of::<u8>(cpu, lin, locked, &mut f),
        2 => of::<u16>(cpu, lin, locked, &mut f),
        4 => of::<u32>(cpu, lin, locked, &mut f),
        _ => of::<u64>(cpu, lin, locked, &mut f),
    }
}

/// The width of the instruction's addresses in bytes, for instructions with implicit memory operands.
#[inline]
pub fn implicit_address_size(insn: &Instruction) -> usize {
    insn.op_code().address_size() as usize / 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bits: u32, bytes: &[u8]) -> Instruction {
        Decoder::with_ip(bits, bytes, 0x100, DecoderOptions::NONE).decode()
    }

    #[test]
    fn registers_of_every_size() {
        let mut cpu = Cpu::for_tests();
        cpu.regs[3] = 0x1122_3344_5566_7788;
        assert_eq!(gpr(&cpu, Register::BL), 0x88);
        assert_eq!(gpr(&cpu, Register::BH), 0x77);
        assert_eq!(gpr(&cpu, Register::BX), 0x7788);
        assert_eq!(gpr(&cpu, Register::EBX), 0x5566_7788);
        set_gpr(&mut cpu, Register::BH, 0x1ee);
        assert_eq!(cpu.regs[3], 0x1122_3344_5566_ee88);
        set_gpr(&mut cpu, Register::BX, 0x9_1234);
        assert_eq!(cpu.regs[3], 0x1122_3344_5566_1234);
        set_gpr(&mut cpu, Register::EBX, u64::MAX);
        assert_eq!(cpu.regs[3], 0xffff_ffff);
        cpu.regs[4] = 0xabcd;
        assert_eq!(gpr(&cpu, Register::SPL), 0xcd);
        assert_eq!(gpr(&cpu, Register::AH), 0);
        set_gpr(&mut cpu, Register::R15L, 0x42);
        assert_eq!((gpr(&cpu, Register::R15L), cpu.regs[15]), (0x42, 0x42));
    }

    #[test]
    fn addresses_wrap_at_their_size() {
        let mut cpu = Cpu::for_tests();
        cpu.regs[3] = 0xffff_ffff_ffff_fff0;
        cpu.regs[6] = 0x20;
        // mov al, [bx+si+1]; mov al, [ebx+esi*4+1]; mov al, [rbx+rsi*4+1]; mov al, [rip+5]
        assert_eq!(offset(&cpu, &decode(16, &[0x8a, 0x40, 1])), 0x11);
        assert_eq!(offset(&cpu, &decode(64, &[0x67, 0x8a, 0x44, 0xb3, 1])), 0x71);
        assert_eq!(offset(&cpu, &decode(64, &[0x8a, 0x44, 0xb3, 1])), 0x71);
        assert_eq!(offset(&cpu, &decode(64, &[0x8a, 0x05, 5, 0, 0, 0])), 0x10b);
        // mov al, [0xfffffff0] with 32-bit, sign-extended 64-bit and 16-bit addresses
        let displacement = [0xf0, 0xff, 0xff, 0xff];
        let with = |prefix: &[u8]| [prefix, &displacement].concat();
        assert_eq!(offset(&cpu, &decode(32, &with(&[0x8a, 0x05]))), 0xffff_fff0);
        assert_eq!(offset(&cpu, &decode(64, &with(&[0x67, 0x8a, 0x04, 0x25]))), 0xffff_fff0);
        assert_eq!(offset(&cpu, &decode(64, &with(&[0x8a, 0x04, 0x25]))), 0xffff_ffff_ffff_fff0);
        assert_eq!(offset(&cpu, &decode(16, &[0x8a, 0x06, 0xf0, 0xff])), 0xfff0);
    }

    #[test]
    fn the_frame_registers_mean_the_stack_segment() {
        let mut cpu = Cpu::for_tests();
        cpu.segs[seg::SS].base = 0x5000;
        cpu.segs[seg::FS].base = 0x7000;
        cpu.regs[5] = 0x10;
        // mov al, [bp]; mov al, fs:[bp]
        assert_eq!(address(&cpu, &decode(16, &[0x8a, 0x46, 0]), 1, false), Ok(0x5010));
        assert_eq!(address(&cpu, &decode(16, &[0x64, 0x8a, 0x46, 0]), 1, false), Ok(0x7010));
        cpu.regs[5] = 0xffff;
        assert_eq!(address(&cpu, &decode(16, &[0x8a, 0x46, 0]), 2, false), Err(Fault::SS0));
    }
}
