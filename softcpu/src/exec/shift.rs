//! Shifts and rotates.
//!
//! Counts are taken modulo 32 (64 with 64-bit operands). A count of 0 leaves all flags, though memory is still
//! written. OF is computed for every count as processors do for a count of 1.

use iced_x86::{Instruction, Mnemonic};

use super::int::flags_res_cf_of;
use super::operand::{mask, modify, read, sign_bit, sign_extend, size};
use crate::fault::Exec;
use crate::state::Cpu;

fn count_mask(size: usize) -> u64 {
    if size == 8 { 63 } else { 31 }
}

/// SHL, SHR, SAR.
pub fn shift(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let n = read(cpu, insn, 1)? & count_mask(z);
    let kind = insn.mnemonic();
    let result = |a: u64| -> (u64, bool) {
        // 128 bits, so that counts beyond the operand's width need no care.
        let wide = match kind {
            Mnemonic::Shr => u128::from(a) << 64 >> n,
            Mnemonic::Sar => ((i128::from(sign_extend(a, z) as i64) << 64) >> n) as u128,
            _ => {
                let wide = u128::from(a) << n;
                return (wide as u64 & mask(z), wide >> (8 * z) & 1 != 0);
            }
        };
        ((wide >> 64) as u64 & mask(z), wide >> 63 & 1 != 0)
    };
    let a = modify(cpu, insn, |a| Some(result(a).0))?;
    if n == 0 {
        return Ok(());
    }
    let (res, cf) = result(a);
    let sign = sign_bit(z);
    let of = match kind {
        Mnemonic::Shr => a & sign != 0,
        Mnemonic::Sar => false,
        _ => (res & sign != 0) ^ cf,
    };
    flags_res_cf_of(cpu, z, res, cf, of);
    Ok(())
}

/// ROL and ROR.
pub fn rotate(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let width = 8 * z as u64;
    let n = read(cpu, insn, 1)? & count_mask(z);
    let left = insn.mnemonic() == Mnemonic::Rol;
    let by = if left { n % width } else { (width - n % width) % width };
    let result = |a: u64| {
        let wide = u128::from(a) << by;
        (wide | wide >> width) as u64 & mask(z)
    };
    let a = modify(cpu, insn, |a| Some(result(a)))?;
    if n == 0 {
        return Ok(());
    }
    let res = result(a);
    let top = res & sign_bit(z) != 0;
    let (cf, of) = match left {
        true => (res & 1 != 0, top ^ (res & 1 != 0)),
        false => (top, top ^ (res & sign_bit(z) >> 1 != 0)),
    };
    cpu.set_cf_of(cf, of);
    Ok(())
}

/// RCL and RCR: rotates of one bit more, CF.
pub fn rotate_through_carry(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let width = 8 * z as u64 + 1;
    let n = read(cpu, insn, 1)? & count_mask(z);
    let left = insn.mnemonic() == Mnemonic::Rcl;
    let by = if left { n % width } else { (width - n % width) % width };
    let carry = cpu.cf();
    let result = |a: u64| -> (u64, bool) {
        let all = u128::from(carry) << (8 * z) | u128::from(a);
        // At most 65 + 64 bits: what a left shift loses comes back on the right.
        let rotated = if by == 0 { all } else { all << by | all >> (width - by) };
        (rotated as u64 & mask(z), rotated >> (8 * z) & 1 != 0)
    };
    let a = modify(cpu, insn, |a| Some(result(a).0))?;
    if n == 0 {
        return Ok(());
    }
    let (res, cf) = result(a);
    let top = res & sign_bit(z) != 0;
    let of = top ^ if left { cf } else { res & sign_bit(z) >> 1 != 0 };
    cpu.set_cf_of(cf, of);
    Ok(())
}

/// SHLD and SHRD. Counts beyond 16 with 16-bit operands (undefined) go on into the first operand again.
pub fn double_shift(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let width = 8 * z as u32;
    let fill = read(cpu, insn, 1)?;
    let n = (read(cpu, insn, 2)? & count_mask(z)) as u32;
    let left = insn.mnemonic() == Mnemonic::Shld;
    let result = |a: u64| -> (u64, bool) {
        if n == 0 {
            return (a, false);
        }
        if z == 2 {
            return match left {
                true => {
                    let all = (a << 32 | fill << 16 | a) << n;
                    (all >> 32 & 0xffff, all >> 48 & 1 != 0)
                }
                false => {
                    let all = a << 32 | fill << 16 | a;
                    (all >> n & 0xffff, all >> (n - 1) & 1 != 0)
                }
            };
        }
        match left {
            true => {
                let all = (u128::from(a) << width | u128::from(fill)) << (n - 1);
                let last = all >> (2 * width - 1) & 1 != 0;
                ((all << 1 >> width) as u64 & mask(z), last)
            }
            false => {
                let all = (u128::from(fill) << width | u128::from(a)) >> (n - 1);
                ((all >> 1) as u64 & mask(z), all & 1 != 0)
            }
        }
    };
    let a = modify(cpu, insn, |a| Some(result(a).0))?;
    if n == 0 {
        return Ok(());
    }
    let (res, cf) = result(a);
    let of = (res ^ a) & sign_bit(z) != 0;
    flags_res_cf_of(cpu, z, res, cf, of);
    Ok(())
}
