//! IRET in all modes.
//!
//! ```text
//!   stack, from the top: IP, CS, FLAGS [, SP, SS [, ES, DS, FS, GS]]
//!                                       |         to virtual-8086 mode
//!                                       to an outer level; always in 64-bit mode
//! ```

use iced_x86::{Code, Instruction};

use super::far::{self, Return, check_offset, return_segment};
use super::operand::mask;
use super::seg::{rpl, v86_segment};
use super::task;
use crate::fault::{Exec, Fault};
use crate::flags::{AC, DF, FIXED, ID, IF, IOPL, NT, RF, STATUS, TF, VIF, VIP, VM};
use crate::state::{Cpu, cr, reg as r, seg as s};

/// IRET, IRETD, IRETQ. Whatever comes of it, NMIs are let in again.
pub fn iret(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let size = match insn.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    cpu.inhibit.nmi = false;
    cpu.leave = true;
    match (cpu.mode.protected, cpu.mode.v86) {
        (false, _) => iret_real(cpu, size),
        (true, true) => iret_v86(cpu, size),
        (true, false) => iret_protected(cpu, size),
    }
}

/// The three words every IRET takes: IP, CS, FLAGS.
fn frame(cpu: &mut Cpu, size: usize) -> Exec<(u64, u16, u64)> {
    let z = size as u64;
    let (ip, cs) = (cpu.peek(size, 0)?, cpu.peek(size, z)?);
    Ok((ip, cs as u16, cpu.peek(size, 2 * z)?))
}

fn iret_real(cpu: &mut Cpu, size: usize) -> Exec {
    let (ip, cs, image) = frame(cpu, size)?;
    check_offset(cpu, &cpu.segs[s::CS], ip)?;
    cpu.drop_stack(3 * size as u64);
    far::go_real(cpu, cs, ip);
    let changed = STATUS | TF | IF | DF | IOPL | NT | RF | AC | ID;
    cpu.change_flags(image, changed & mask(size));
    Ok(())
}

fn iret_v86(cpu: &mut Cpu, size: usize) -> Exec {
    let vme = cpu.cr4 & cr::CR4_VME != 0 && size == 2;
    if cpu.iopl() < 3 && !vme {
        return Err(Fault::GP0);
    }
    let (ip, cs, mut image) = frame(cpu, size)?;
    check_offset(cpu, &cpu.segs[s::CS], ip)?;
    let mut changed = (STATUS | TF | IF | DF | NT | RF | AC | ID) & mask(size);
    if cpu.iopl() < 3 {
        if image & TF != 0 || image & IF != 0 && cpu.sys_flags & VIP != 0 {
            return Err(Fault::GP0);
        }
        changed = changed & !IF | VIF;
        image |= if image & IF != 0 { VIF } else { 0 };
    }
    cpu.drop_stack(3 * size as u64);
    far::go_real(cpu, cs, ip);
    cpu.change_flags(image, changed);
    Ok(())
}

/// Which flags an IRET of `size` bytes at level `cpl` loads.
fn changed_flags(cpu: &Cpu, cpl: u8, size: usize) -> u64 {
    let mut changed = STATUS | TF | DF | NT | RF | AC | ID;
    if cpl <= cpu.iopl() {
        changed |= IF;
    }
    if cpl == 0 {
        changed |= IOPL | VIF | VIP;
    }
    changed & mask(size)
}

fn iret_protected(cpu: &mut Cpu, size: usize) -> Exec {
    if cpu.sys_flags & NT != 0 {
        return match cpu.mode.long {
            true => Err(Fault::GP0),
            false => task::return_to_caller(cpu),
        };
    }
    let (offset, selector, image) = frame(cpu, size)?;
    let cpl = cpu.mode.cpl;
    if image & VM != 0 && size == 4 && cpl == 0 && !cpu.mode.long {
        return to_v86(cpu, offset, selector, image);
    }
    let cs = return_segment(cpu, selector)?;
    let changed = changed_flags(cpu, cpl, size);
    let z = size as u64;
    if rpl(selector) == cpl && cpu.mode.bits != 64 {
        check_offset(cpu, &cs, offset)?;
        cpu.drop_stack(3 * z);
        cpu.segs[s::CS] = cs;
        cpu.next_rip = offset;
    } else {
        let (rsp, ss) = (cpu.peek(size, 3 * z)?, cpu.peek(size, 4 * z)? as u16);
        far::return_outward(cpu, Return { cs, offset, ss, rsp, size, released: 0 })?;
    }
    cpu.change_flags(image, changed);
    cpu.update_mode();
    Ok(())
}

/// To virtual-8086 mode.
fn to_v86(cpu: &mut Cpu, offset: u64, cs: u16, image: u64) -> Exec {
    let mut words = [0; 6];
    for (i, word) in words.iter_mut().enumerate() {
        *word = cpu.peek(4, 12 + 4 * i as u64)?;
    }
    let [esp, ss, es, ds, fs, gs] = words;
    let selectors = [es as u16, cs, ss as u16, ds as u16, fs as u16, gs as u16];
    if offset & 0xffff != offset {
        return Err(Fault::GP0);
    }
    cpu.segs = selectors.map(v86_segment);
    cpu.regs[r::RSP] = esp;
    cpu.next_rip = offset;
    cpu.set_rflags(image | FIXED);
    Ok(())
}
