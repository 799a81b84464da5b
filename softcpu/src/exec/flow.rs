//! Near jumps, calls and returns.

use iced_x86::{Code, Instruction, OpKind};

use super::{far, int, operand};
use crate::fault::{Exec, Fault};
use crate::mem::canonical;
use crate::state::{Cpu, reg as r, seg as s};

/// Goes to `target`, an offset in CS: #GP(0) if it is not canonical or beyond the limit.
#[inline]
pub fn go(cpu: &mut Cpu, target: u64) -> Exec {
    check(cpu, target)?;
    cpu.next_rip = target;
    Ok(())
}

#[inline]
fn check(cpu: &Cpu, target: u64) -> Exec {
    let ok = match cpu.mode.bits {
        64 => canonical(target),
        _ => target <= cpu.segs[s::CS].limit.into(),
    };
    if ok { Ok(()) } else { Err(Fault::GP0) }
}

/// Where a near JMP or CALL goes, and its operand size.
fn near_target(cpu: &mut Cpu, insn: &Instruction) -> Exec<(u64, usize)> {
    let size = match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => return Ok((operand::read(cpu, insn, 0)?, operand::size(insn, 0))),
    };
    Ok((insn.near_branch_target(), size))
}

/// JMP, near or far.
pub fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    match insn.code() {
        Code::Jmp_ptr1616
        | Code::Jmp_ptr1632
        | Code::Jmp_m1616
        | Code::Jmp_m1632
        | Code::Jmp_m1664 => far::jmp(cpu, insn),
        _ => {
            let (target, _) = near_target(cpu, insn)?;
            go(cpu, target)
        }
    }
}

/// CALL, near or far.
pub fn call(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    match insn.code() {
        Code::Call_ptr1616
        | Code::Call_ptr1632
        | Code::Call_m1616
        | Code::Call_m1632
        | Code::Call_m1664 => far::call(cpu, insn),
        _ => {
            let (target, size) = near_target(cpu, insn)?;
            check(cpu, target)?;
            cpu.push(size, cpu.next_rip)?;
            cpu.next_rip = target;
            Ok(())
        }
    }
}

/// Near RET.
pub fn ret(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let size = match insn.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let target = cpu.peek(size, 0)?;
    go(cpu, target)?;
    cpu.drop_stack(size as u64 + released(insn));
    Ok(())
}

/// How many bytes of parameters a RET takes off the stack.
pub fn released(insn: &Instruction) -> u64 {
    if insn.op_count() == 0 { 0 } else { insn.immediate16().into() }
}

/// Jcc.
pub fn jcc(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if int::condition(cpu, insn) { go(cpu, insn.near_branch_target()) } else { Ok(()) }
}

/// The size in bytes of the counter of LOOPcc and JrCXZ: the address size.
fn counter_size(insn: &Instruction) -> usize {
    operand::implicit_address_size(insn)
}

/// LOOP, LOOPE, LOOPNE (`zf`: what ZF must be).
pub fn loop_cc(cpu: &mut Cpu, insn: &Instruction, zf: Option<bool>) -> Exec {
    let size = counter_size(insn);
    let count = operand::reg(cpu, r::RCX, size).wrapping_sub(1) & operand::mask(size);
    if count != 0 && zf.is_none_or(|zf| cpu.zf() == zf) {
        go(cpu, insn.near_branch_target())?;
    }
    operand::set_reg(cpu, r::RCX, size, count);
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ.
pub fn jcxz(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if operand::reg(cpu, r::RCX, counter_size(insn)) != 0 {
        return Ok(());
    }
    go(cpu, insn.near_branch_target())
}
