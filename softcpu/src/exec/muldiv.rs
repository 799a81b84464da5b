//! Multiplication, division and decimal arithmetic.

use iced_x86::{Instruction, Mnemonic};

use super::int::{flags_logic, flags_res_cf_of};
use super::operand::{gpr, mask, read, reg, set_gpr, set_reg, sign_extend, size};
use crate::fault::{Exec, Fault};
use crate::flags;
use crate::state::{Cpu, reg as r};

/// Writes a double-width value to AX, or to RDX and RAX.
fn set_pair(cpu: &mut Cpu, z: usize, value: u128) {
    if z == 1 {
        set_reg(cpu, r::RAX, 2, value as u64);
    } else {
        set_reg(cpu, r::RAX, z, value as u64);
        set_reg(cpu, r::RDX, z, (value >> (8 * z)) as u64);
    }
}

/// AX, or RDX and RAX, as one value.
fn pair(cpu: &Cpu, z: usize) -> u128 {
    if z == 1 {
        return reg(cpu, r::RAX, 2).into();
    }
    u128::from(reg(cpu, r::RDX, z)) << (8 * z) | u128::from(reg(cpu, r::RAX, z))
}

/// MUL.
pub fn mul(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let b = read(cpu, insn, 0)?;
    let product = u128::from(reg(cpu, r::RAX, z)) * u128::from(b);
    set_pair(cpu, z, product);
    let high = product >> (8 * z) != 0;
    flags_res_cf_of(cpu, z, product as u64, high, high);
    Ok(())
}

/// IMUL with one, two or three operands.
pub fn imul(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let (a, b) = match insn.op_count() {
        1 => (reg(cpu, r::RAX, z), read(cpu, insn, 0)?),
        2 => (gpr(cpu, insn.op0_register()), read(cpu, insn, 1)?),
        _ => (read(cpu, insn, 1)?, read(cpu, insn, 2)?),
    };
    let wide = |v: u64| i128::from(sign_extend(v, z) as i64);
    let product = wide(a) * wide(b);
    if insn.op_count() == 1 {
        set_pair(cpu, z, product as u128);
    } else {
        set_gpr(cpu, insn.op0_register(), product as u64);
    }
    let lost = wide(product as u64) != product;
    flags_res_cf_of(cpu, z, product as u64, lost, lost);
    Ok(())
}

fn set_quotient(cpu: &mut Cpu, z: usize, quotient: u64, remainder: u64) {
    if z == 1 {
        set_reg(cpu, r::RAX, 2, (remainder & 0xff) << 8 | quotient & 0xff);
    } else {
        set_reg(cpu, r::RAX, z, quotient);
        set_reg(cpu, r::RDX, z, remainder);
    }
}

/// DIV: #DE by zero or if the quotient is too large.
pub fn div(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let b = u128::from(read(cpu, insn, 0)?);
    let a = pair(cpu, z);
    let quotient = a.checked_div(b).ok_or(Fault::DE)?;
    if quotient > mask(z).into() {
        return Err(Fault::DE);
    }
    set_quotient(cpu, z, quotient as u64, (a % b) as u64);
    Ok(())
}

/// IDIV: #DE by zero or if the quotient does not fit.
pub fn idiv(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let b = i128::from(sign_extend(read(cpu, insn, 0)?, z) as i64);
    let unused = 128 - 16 * z as u32;
    let a = (pair(cpu, z) << unused) as i128 >> unused;
    let quotient = a.checked_div(b).ok_or(Fault::DE)?;
    if i128::from(sign_extend(quotient as u64, z) as i64) != quotient {
        return Err(Fault::DE);
    }
    set_quotient(cpu, z, quotient as u64, (a % b) as u64);
    Ok(())
}

/// Sets SF, ZF and PF by AL, and CF and AF as given.
fn decimal_flags(cpu: &mut Cpu, cf: bool, af: bool) {
    flags_logic(cpu, 1, reg(cpu, r::RAX, 1));
    let others = cpu.status_flags() & !(flags::CF | flags::AF);
    let bit = |set: bool, flag| if set { flag } else { 0 };
    cpu.set_status_flags(others | bit(cf, flags::CF) | bit(af, flags::AF));
}

/// DAA and DAS.
pub fn daa_das(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let (al, cf) = (reg(cpu, r::RAX, 1), cpu.cf());
    let low = al & 15 > 9 || cpu.af();
    let high = al > 0x99 || cf;
    let adjust = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let add = insn.mnemonic() == Mnemonic::Daa;
    let result = if add { al.wrapping_add(adjust) } else { al.wrapping_sub(adjust) };
    set_reg(cpu, r::RAX, 1, result);
    // DAS also carries when its first step borrows.
    let borrow = !add && low && al < 6;
    decimal_flags(cpu, high || borrow, low);
    Ok(())
}

/// AAA and AAS.
pub fn aaa_aas(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let ax = reg(cpu, r::RAX, 2);
    let adjust = ax & 15 > 9 || cpu.af();
    let ax = match (adjust, insn.mnemonic() == Mnemonic::Aaa) {
        (false, _) => ax,
        (true, true) => ax.wrapping_add(0x106),
        (true, false) => ax.wrapping_sub(0x106),
    };
    set_reg(cpu, r::RAX, 2, ax & 0xff0f);
    decimal_flags(cpu, adjust, adjust);
    Ok(())
}

/// AAM: #DE if the base is 0.
pub fn aam(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let base = u64::from(insn.immediate8());
    let al = reg(cpu, r::RAX, 1);
    let tens = al.checked_div(base).ok_or(Fault::DE)?;
    set_reg(cpu, r::RAX, 2, (tens << 8) | (al % base));
    flags_logic(cpu, 1, al % base);
    Ok(())
}

/// AAD.
pub fn aad(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let ax = reg(cpu, r::RAX, 2);
    let al = ((ax & 0xff) + (ax >> 8) * u64::from(insn.immediate8())) & 0xff;
    set_reg(cpu, r::RAX, 2, al);
    flags_logic(cpu, 1, al);
    Ok(())
}
