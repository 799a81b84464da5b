//! The moves between XMM registers, memory and general-purpose registers: done without the host's instruction.

use iced_x86::{Instruction, OpKind, Register};

use super::sse::{address, check_sse, load, number};
use super::sse_forms::{Form, Kind};
use super::{mmx, operand};
use crate::fault::{Exec, Fault};
use crate::state::Cpu;

fn is_xmm(register: Register) -> bool {
    (Register::XMM0 as usize..=Register::XMM15 as usize).contains(&(register as usize))
}

/// A register's value, zero-extended to 16 bytes.
fn register(cpu: &Cpu, register: Register) -> [u64; 2] {
    if is_xmm(register) {
        return cpu.fx.xmm[number(register)];
    }
    [operand::gpr(cpu, register), 0]
}

/// Operand 1: a register, or memory of `size` bytes, zero-extended.
#[inline]
fn source(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec<[u64; 2]> {
    if insn.op1_kind() == OpKind::Register {
        return Ok(register(cpu, insn.op1_register()));
    }
    let size = insn.memory_size().size();
    let lin = address(cpu, insn, form, size, false)?;
    load(cpu, lin, size)
}

fn store_16(cpu: &mut Cpu, insn: &Instruction, form: &Form, value: [u64; 2]) -> Exec {
    let lin = address(cpu, insn, form, 16, true)?;
    cpu.store(lin, u128::from(value[1]) << 64 | u128::from(value[0]))
}

/// Executes a move.
pub(super) fn execute(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    match form.kind {
        Kind::StoreInteger => {
            let value = operand::gpr(cpu, insn.op1_register());
            return operand::store_operand(cpu, insn, insn.memory_size().size(), value);
        }
        Kind::MaskedStore => return masked(cpu, insn),
        Kind::StoreMmx => {
            mmx::check(cpu)?;
            let value = mmx::get(cpu, mmx::number(insn.op1_register()));
            operand::store_operand(cpu, insn, 8, value)?;
            mmx::enter(cpu);
            return Ok(());
        }
        _ => check_sse(cpu)?,
    }
    match form.kind {
        Kind::Load16 | Kind::LoadZero => {
            let value = source(cpu, insn, form)?;
            // MOVQ copies the low half of a register only.
            let high = if form.kind == Kind::Load16 { value[1] } else { 0 };
            cpu.fx.xmm[number(insn.op0_register())] = [value[0], high];
        }
        Kind::LoadScalar => load_scalar(cpu, insn, form)?,
        Kind::LoadHalf { high } => {
            let value = source(cpu, insn, form)?;
            cpu.fx.xmm[number(insn.op0_register())][usize::from(high)] = value[0];
        }
        Kind::ShiftBytes { left } => {
            let bits = u32::from(insn.immediate8()) * 8;
            let words = &mut cpu.fx.xmm[number(insn.op0_register())];
            let value = u128::from(words[1]) << 64 | u128::from(words[0]);
            let shifted = if left { value.checked_shl(bits) } else { value.checked_shr(bits) };
            let value = shifted.unwrap_or(0);
            *words = [value as u64, (value >> 64) as u64];
        }
        _ => store(cpu, insn, form)?,
    }
    Ok(())
}

fn load_scalar(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    let value = source(cpu, insn, form)?;
    let from_register = insn.op1_kind() == OpKind::Register;
    let dst = &mut cpu.fx.xmm[number(insn.op0_register())];
    if from_register {
        merge(dst, value, insn.memory_size().size());
    } else {
        *dst = value;
    }
    Ok(())
}

/// Replaces the low `size` bytes (4 or 8).
fn merge(dst: &mut [u64; 2], value: [u64; 2], size: usize) {
    let mask = operand::mask(size);
    dst[0] = dst[0] & !mask | value[0] & mask;
}

/// Operand 1 is an XMM register, operand 0 anything.
fn store(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    let value = cpu.fx.xmm[number(insn.op1_register())];
    let size = insn.memory_size().size();
    if insn.op0_kind() != OpKind::Register {
        return match form.kind {
            Kind::Store16 => store_16(cpu, insn, form, value),
            Kind::StoreHalf { high } => {
                operand::store_operand(cpu, insn, size, value[usize::from(high)])
            }
            _ => operand::store_operand(cpu, insn, size, value[0]),
        };
    }
    let to = insn.op0_register();
    match form.kind {
        Kind::Store16 => cpu.fx.xmm[number(to)] = value,
        Kind::StoreScalar => merge(&mut cpu.fx.xmm[number(to)], value, size),
        Kind::StoreQuad => cpu.fx.xmm[number(to)] = [value[0], 0],
        Kind::StoreLow => operand::set_gpr(cpu, to, value[0]),
        _ => return Err(Fault::UD),
    }
    Ok(())
}

fn masked(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let (data, mask) = (insn.op1_register(), insn.op2_register());
    if is_xmm(data) {
        check_sse(cpu)?;
        let (data, mask) = (cpu.fx.xmm[number(data)], cpu.fx.xmm[number(mask)]);
        return mmx::masked_store(cpu, insn, data, mask, 16);
    }
    mmx::check(cpu)?;
    let [data, mask] = [data, mask].map(|r| [mmx::get(cpu, mmx::number(r)), 0]);
    mmx::masked_store(cpu, insn, data, mask, 8)?;
    mmx::enter(cpu);
    Ok(())
}
