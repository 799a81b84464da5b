//! MM registers, which are the x87 registers (SDM volume 1, 9.2 and 9.5).
//!
//! MMi is physical register i, whatever the top of the x87 stack is. An MMX instruction makes TOP 0 and all registers
//! valid, so ST(i) and MMi coincide then.

use iced_x86::{Instruction, Register};

use super::{x87, x87_env};
use crate::fault::{Exec, Fault};
use crate::state::{Cpu, cr};

/// #UD, #NM or #MF where an MMX instruction may not be executed.
pub(super) fn check(cpu: &Cpu) -> Exec {
    if cpu.cr0 & cr::CR0_EM != 0 {
        return Err(Fault::UD);
    }
    if cpu.cr0 & cr::CR0_TS != 0 {
        return Err(Fault::NM);
    }
    x87::check_pending(cpu)
}

/// The number of an MM register.
pub(super) fn number(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::MM0 as usize) & 7
}

fn top(cpu: &Cpu) -> usize {
    usize::from(cpu.fx.fsw >> 11 & 7)
}

/// Reads MM`i`.
pub(super) fn get(cpu: &Cpu, i: usize) -> u64 {
    let bytes = &cpu.fx.st[(i + 8 - top(cpu)) & 7];
    u64::from_le_bytes([
        bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
    ])
}

/// What every MMX instruction but EMMS does to the x87 state.
pub(super) fn enter(cpu: &mut Cpu) {
    let status = cpu.fx.fsw & !(7 << 11);
    x87_env::set_status(&mut cpu.fx, status);
    cpu.fx.ftw = 0xff;
}

/// Writes MM`i`, after [`enter`]; the exponent becomes all ones.
pub(super) fn set(cpu: &mut Cpu, i: usize, value: u64) {
    let register = &mut cpu.fx.st[i];
    register[..8].copy_from_slice(&value.to_le_bytes());
    register[8..10].fill(0xff);
}

/// EMMS: all registers are empty.
pub(super) fn emms(cpu: &mut Cpu) -> Exec {
    check(cpu)?;
    enter(cpu);
    cpu.fx.ftw = 0;
    Ok(())
}

/// MASKMOVQ (8 bytes) and MASKMOVDQU (16): stores the bytes whose mask byte has bit 7 set, at DS:rDI.
pub(super) fn masked_store(
    cpu: &mut Cpu,
    insn: &Instruction,
    source: [u64; 2],
    mask: [u64; 2],
    size: usize,
) -> Exec {
    let byte = |words: [u64; 2], i: usize| (words[i / 8] >> (8 * (i % 8))) as u8;
    let chosen = |i: &usize| byte(mask, *i) & 0x80 != 0;
    let offset = super::operand::gpr(cpu, rdi(insn));
    let segment = super::operand::segment(cpu, insn);
    let lin = cpu.linear(segment, offset, size as u64, true)?;
    let (first, last) = ((0..size).find(chosen), (0..size).rfind(chosen));
    let (Some(first), Some(last)) = (first, last) else { return Ok(()) };
    // Both pages before the first byte, so that a fault leaves nothing half done.
    let access = cpu.access(true);
    for i in [first, last] {
        cpu.translate(cpu.linear_plus(lin, i as u64), access)?;
    }
    for i in (first..=last).filter(chosen) {
        cpu.store(cpu.linear_plus(lin, i as u64), byte(source, i))?;
    }
    Ok(())
}

fn rdi(insn: &Instruction) -> Register {
    match insn.op0_kind() {
        iced_x86::OpKind::MemorySegDI => Register::DI,
        iced_x86::OpKind::MemorySegEDI => Register::EDI,
        _ => Register::RDI,
    }
}

impl Cpu {
    /// `by` bytes on from linear address `lin`.
    pub(super) fn linear_plus(&self, lin: u64, by: u64) -> u64 {
        let next = lin.wrapping_add(by);
        if self.mode.bits == 64 { next } else { next & 0xffff_ffff }
    }
}
