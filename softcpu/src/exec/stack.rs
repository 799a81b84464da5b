//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and the primitives that calls and interrupts use.

use iced_x86::{Code, Instruction, OpKind};

use super::operand::{self, is_register, segment_index, set_gpr, set_reg};
use super::seg;
use crate::fault::Exec;
use crate::state::{Cpu, reg as r, seg as s};

impl Cpu {
    /// RSP, ESP or SP: the part that the stack uses.
    #[inline]
    pub fn sp(&self) -> u64 {
        self.regs[r::RSP] & self.mode.stack_mask
    }

    /// Sets the part of RSP that the stack uses.
    #[inline]
    pub fn set_sp(&mut self, value: u64) {
        let used = self.mode.stack_mask;
        let kept = if used == 0xffff { !used } else { 0 };
        self.regs[r::RSP] = self.regs[r::RSP] & kept | value & used;
    }

    /// Pushes `size` bytes.
    #[inline]
    pub fn push(&mut self, size: usize, value: u64) -> Exec {
        let sp = self.sp().wrapping_sub(size as u64) & self.mode.stack_mask;
        let lin = self.linear(s::SS, sp, size as u64, true)?;
        operand::store(self, lin, size, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pushes several values of `size` bytes, the first one first. On a fault RSP is as before; memory below it may
    /// have changed.
    pub fn push_all(&mut self, size: usize, values: &[u64]) -> Exec {
        let mut sp = self.sp();
        for value in values {
            sp = sp.wrapping_sub(size as u64) & self.mode.stack_mask;
            let lin = self.linear(s::SS, sp, size as u64, true)?;
            operand::store(self, lin, size, *value)?;
        }
        self.set_sp(sp);
        Ok(())
    }

    /// The value of `size` bytes that lies `depth` bytes above the top of the stack.
    #[inline]
    pub fn peek(&mut self, size: usize, depth: u64) -> Exec<u64> {
        let sp = self.sp().wrapping_add(depth) & self.mode.stack_mask;
        let lin = self.linear(s::SS, sp, size as u64, false)?;
        operand::load(self, lin, size)
    }

    /// Moves the stack pointer up by `bytes`.
    #[inline]
    pub fn drop_stack(&mut self, bytes: u64) {
        self.set_sp(self.sp().wrapping_add(bytes));
    }
}

/// How many bytes a PUSH or POP moves.
fn push_size(insn: &Instruction) -> usize {
    insn.stack_pointer_increment().unsigned_abs() as usize
}

/// PUSH.
pub fn push(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = match insn.op0_kind() {
        OpKind::Register if insn.op0_register().is_segment_register() => {
            cpu.segs[segment_index(insn.op0_register())].selector.into()
        }
        _ => operand::read(cpu, insn, 0)?,
    };
    cpu.push(push_size(insn), value)
}

/// POP.
pub fn pop(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = push_size(insn);
    let value = cpu.peek(z, 0)?;
    let rsp = cpu.regs[r::RSP];
    cpu.drop_stack(z as u64);
    let done = if !is_register(insn, 0) {
        // The address is computed with the stack pointer as it is after the POP.
        operand::store_operand(cpu, insn, z, value)
    } else if insn.op0_register().is_segment_register() {
        seg::load_by_instruction(cpu, segment_index(insn.op0_register()), value as u16)
    } else {
        set_gpr(cpu, insn.op0_register(), value);
        Ok(())
    };
    if done.is_err() {
        cpu.regs[r::RSP] = rsp;
    }
    done
}

/// PUSHA and PUSHAD.
pub fn pusha(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = if insn.code() == Code::Pushaw { 2 } else { 4 };
    let mut values = [0; 8];
    values.copy_from_slice(&cpu.regs[..8]);
    cpu.push_all(z, &values)
}

/// POPA and POPAD: all but SP.
pub fn popa(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = if insn.code() == Code::Popaw { 2 } else { 4 };
    let mut values = [0; 8];
    for (i, value) in values.iter_mut().rev().enumerate() {
        *value = cpu.peek(z, (i * z) as u64)?;
    }
    for (index, value) in values.into_iter().enumerate() {
        if index != r::RSP {
            set_reg(cpu, index, z, value);
        }
    }
    cpu.drop_stack(8 * z as u64);
    Ok(())
}

fn frame_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Enterw_imm16_imm8 | Code::Leavew => 2,
        Code::Enterd_imm16_imm8 | Code::Leaved => 4,
        _ => 8,
    }
}

/// ENTER, with up to 31 levels of nesting.
pub fn enter(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let rsp = cpu.regs[r::RSP];
    make_frame(cpu, insn).inspect_err(|_| cpu.regs[r::RSP] = rsp)
}

/// One push at a time: the old frame, which is read meanwhile, may lie where the new one comes to lie.
fn make_frame(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = frame_size(insn);
    let level = usize::from(insn.immediate8_2nd() & 31);
    let frame = cpu.sp().wrapping_sub(z as u64) & cpu.mode.stack_mask;
    cpu.push(z, cpu.regs[r::RBP])?;
    for i in 1..level {
        let at = cpu.regs[r::RBP].wrapping_sub((i * z) as u64) & cpu.mode.stack_mask;
        let lin = cpu.linear(s::SS, at, z as u64, false)?;
        let value = operand::load(cpu, lin, z)?;
        cpu.push(z, value)?;
    }
    if level > 0 {
        cpu.push(z, frame)?;
    }
    let sp = cpu.sp().wrapping_sub(insn.immediate16().into()) & cpu.mode.stack_mask;
    // The new top of the stack must be writable, so that what comes next does not fault.
    let lin = cpu.linear(s::SS, sp, z as u64, true)?;
    cpu.translate(lin, cpu.access(true))?;
    cpu.set_sp(sp);
    set_reg(cpu, r::RBP, z, frame);
    Ok(())
}

/// LEAVE.
pub fn leave(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = frame_size(insn);
    let at = cpu.regs[r::RBP] & cpu.mode.stack_mask;
    let lin = cpu.linear(s::SS, at, z as u64, false)?;
    let value = operand::load(cpu, lin, z)?;
    cpu.set_sp(at.wrapping_add(z as u64) & cpu.mode.stack_mask);
    set_reg(cpu, r::RBP, z, value);
    Ok(())
}
