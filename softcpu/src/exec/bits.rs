//! Bit tests and bit scans.

use iced_x86::{Instruction, Mnemonic};

use super::Feature;
use super::int::{flags_logic, flags_res_cf_of};
use super::operand::{self, gpr, is_register, modify_at, read, set_gpr, sign_extend, size};
use crate::fault::Exec;
use crate::state::Cpu;

/// BT, BTS, BTR, BTC. A bit number in a register reaches beyond a memory operand, in both directions.
pub fn bit_test(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = size(insn, 0);
    let width = 8 * z as u64;
    let number = read(cpu, insn, 1)?;
    let bit = 1u64 << (number & (width - 1));
    let kind = insn.mnemonic();
    let change = |old: u64| match kind {
        Mnemonic::Bts => old | bit,
        Mnemonic::Btr => old & !bit,
        _ => old ^ bit,
    };
    let old = if is_register(insn, 0) {
        let register = insn.op0_register();
        let old = gpr(cpu, register);
        if kind != Mnemonic::Bt {
            set_gpr(cpu, register, change(old));
        }
        old
    } else {
        let elements = match is_register(insn, 1) {
            true => sign_extend(number, z) as i64 >> width.trailing_zeros(),
            false => 0,
        };
        let at = operand::offset_plus(cpu, insn, elements.wrapping_mul(z as i64) as u64);
        let segment = operand::segment(cpu, insn);
        let lin = cpu.linear(segment, at, z as u64, kind != Mnemonic::Bt)?;
        match kind {
            Mnemonic::Bt => operand::load(cpu, lin, z)?,
            _ => modify_at(cpu, lin, z, insn.has_lock_prefix(), |old| Some(change(old)))?,
        }
    };
    cpu.set_cf(old & bit != 0);
    Ok(())
}

/// BSF and BSR. The destination stays as it is if there is no bit set.
pub fn scan(cpu: &mut Cpu, insn: &Instruction, forward: bool) -> Exec {
    let value = read(cpu, insn, 1)?;
    if value != 0 {
        let bit = if forward { value.trailing_zeros() } else { 63 - value.leading_zeros() };
        set_gpr(cpu, insn.op0_register(), bit.into());
    }
    let z = size(insn, 0);
    flags_logic(cpu, z, value);
    Ok(())
}

/// TZCNT and LZCNT: BSF and BSR on a processor that does not know them.
pub fn count_zeros(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let trailing = insn.mnemonic() == Mnemonic::Tzcnt;
    if !cpu.has(if trailing { Feature::Bmi1 } else { Feature::Lzcnt }) {
        return scan(cpu, insn, trailing);
    }
    let value = read(cpu, insn, 1)?;
    let z = size(insn, 0);
    let width = 8 * z as u32;
    let count = match trailing {
        true => value.trailing_zeros().min(width),
        false => value.leading_zeros() - (64 - width),
    };
    set_gpr(cpu, insn.op0_register(), count.into());
    flags_res_cf_of(cpu, z, count.into(), value == 0, false);
    Ok(())
}

/// POPCNT.
pub fn popcnt(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = read(cpu, insn, 1)?;
    set_gpr(cpu, insn.op0_register(), value.count_ones().into());
    // ZF by the source, the others clear; a zero has even parity, so PF needs a result that has not.
    let zf = if value == 0 { crate::flags::ZF } else { 0 };
    cpu.set_status_flags(zf);
    Ok(())
}
