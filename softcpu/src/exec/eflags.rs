//! PUSHF, POPF, CLI and STI: who may change which flag.
//!
//! | | CPL 0 | CPL <= IOPL | CPL > IOPL | virtual-8086, IOPL 3 | virtual-8086, IOPL < 3 |
//! | --- | --- | --- | --- | --- | --- |
//! | POPF changes IOPL | yes | no | no | no | #GP, or VIF for IF with CR4.VME |
//! | POPF changes IF | yes | yes | no | yes | |
//! | CLI, STI | IF | IF | #GP, or VIF with CR4.PVI | IF | #GP, or VIF with CR4.VME |

use iced_x86::{Code, Instruction};

use super::operand::mask;
use crate::fault::{Exec, Fault};
use crate::flags::{AC, DF, FIXED, ID, IF, IOPL, NT, RF, STATUS, TF, VIF, VIP, VM};
use crate::state::{Cpu, cr};

impl Cpu {
    /// RFLAGS.IOPL.
    #[inline]
    pub fn iopl(&self) -> u8 {
        (self.sys_flags >> 12 & 3) as u8
    }

    /// Sets those bits of RFLAGS that `changed` names, and does what hangs on them.
    pub fn change_flags(&mut self, value: u64, changed: u64) {
        let before = self.sys_flags;
        if changed & STATUS != 0 {
            let kept = self.status_flags() & !changed;
            self.set_status_flags(value & changed & STATUS | kept);
        }
        let changed = changed & !STATUS & !FIXED;
        self.sys_flags = before & !changed | value & changed;
        let different = before ^ self.sys_flags;
        if different & (VM | AC) != 0 {
            self.update_mode();
        }
        if different & (VM | AC | TF | IF) != 0 {
            self.leave = true;
        }
    }
}

fn image_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

/// PUSHF, PUSHFD, PUSHFQ.
pub fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = image_size(insn);
    let flags = cpu.rflags();
    if cpu.mode.v86 && cpu.iopl() < 3 {
        if z != 2 || cpu.cr4 & cr::CR4_VME == 0 {
            return Err(Fault::GP0);
        }
        let virtual_if = if flags & VIF != 0 { IF } else { 0 };
        return cpu.push(2, flags & !IF | virtual_if | IOPL);
    }
    cpu.push(z, flags & !(VM | RF))
}

/// POPF, POPFD, POPFQ.
pub fn popf(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let z = image_size(insn);
    if cpu.mode.v86 && cpu.iopl() < 3 {
        return popf_virtual(cpu, z);
    }
    let mut image = cpu.peek(z, 0)?;
    let mut changed = STATUS | TF | DF | NT | AC | ID | RF;
    // RF is always cleared.
    image &= !RF;
    if cpu.mode.cpl <= cpu.iopl() {
        changed |= IF;
    }
    if cpu.mode.cpl == 0 {
        changed |= IOPL | VIF | VIP;
        image &= !(VIF | VIP);
    }
    cpu.drop_stack(z as u64);
    cpu.change_flags(image, changed & mask(z));
    Ok(())
}

/// POPF in virtual-8086 mode with IOPL below 3 and CR4.VME: IF goes to VIF.
fn popf_virtual(cpu: &mut Cpu, z: usize) -> Exec {
    if z != 2 || cpu.cr4 & cr::CR4_VME == 0 {
        return Err(Fault::GP0);
    }
    let image = cpu.peek(2, 0)?;
    if image & TF != 0 || image & IF != 0 && cpu.sys_flags & VIP != 0 {
        return Err(Fault::GP0);
    }
    let virtual_if = if image & IF != 0 { VIF } else { 0 };
    cpu.drop_stack(2);
    cpu.change_flags(image | virtual_if, STATUS | TF | DF | NT | VIF);
    Ok(())
}

/// Which flag CLI and STI change: IF, or VIF where the kernel lets CPL 3 have one of its own.
fn interrupt_flag(cpu: &Cpu) -> Exec<u64> {
    if cpu.mode.cpl <= cpu.iopl() {
        return Ok(IF);
    }
    let virtual_allowed = match cpu.mode.v86 {
        true => cpu.cr4 & cr::CR4_VME != 0,
        false => cpu.mode.cpl == 3 && cpu.cr4 & cr::CR4_PVI != 0,
    };
    if virtual_allowed { Ok(VIF) } else { Err(Fault::GP0) }
}

/// CLI.
pub fn cli(cpu: &mut Cpu) -> Exec {
    let flag = interrupt_flag(cpu)?;
    cpu.sys_flags &= !flag;
    Ok(())
}

/// STI: interrupts are held back for one more instruction.
pub fn sti(cpu: &mut Cpu) -> Exec {
    let flag = interrupt_flag(cpu)?;
    if flag == VIF && cpu.sys_flags & VIP != 0 {
        return Err(Fault::GP0);
    }
    if flag == IF && cpu.sys_flags & IF == 0 {
        cpu.inhibit.shadow = true;
        cpu.leave = true;
    }
    cpu.sys_flags |= flag;
    Ok(())
}
