//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and SWAPGS.
//!
//! Their segments are flat and come from MSRs, not from descriptors:
//!
//! ```text
//!   STAR    63:48 SYSRET's base (32-bit CS; +8 SS; +16 64-bit CS)    47:32 SYSCALL's CS (+8 SS)
//!   SYSENTER_CS   CS; +8 SS; SYSEXIT: +16 CS, +24 SS; 64-bit: +32 CS, +40 SS
//! ```

use super::operand::reg;
use crate::events::DR6_BS;
use crate::fault::{Exec, Fault};
use crate::flags;
use crate::mem::canonical;
use crate::state::{Cpu, Segment, cr, reg as r, seg as s};

/// A flat code segment: 64-bit, or 32-bit.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    let size = if long { 0xa09b } else { 0xc09b };
    Segment { base: 0, limit: u32::MAX, selector, attr: size | u16::from(dpl) << 5 }
}

/// A flat stack segment.
fn flat_stack(selector: u16, dpl: u8) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attr: 0xc093 | u16::from(dpl) << 5 }
}

/// SYSCALL and SYSRET look at TF when they are done: SFMASK can keep the kernel's entry from being trapped, and after
/// SYSRET the trap comes at once, as if the SYSCALL had just ended.
fn trap_by_new_flags(cpu: &mut Cpu) {
    if cpu.sys_flags & flags::TF != 0 {
        cpu.pending_debug |= DR6_BS;
    }
}

fn enter(cpu: &mut Cpu, cs: u16, ss: u16, dpl: u8, long: bool) {
    let rpl = u16::from(dpl);
    cpu.segs[s::CS] = flat_code(cs & !3 | rpl, dpl, long);
    cpu.segs[s::SS] = flat_stack(ss & !3 | rpl, dpl);
    cpu.update_mode();
    cpu.leave = true;
}

/// SYSCALL, as Intel's processors have it: in 64-bit code only.
pub fn syscall(cpu: &mut Cpu) -> Exec {
    if cpu.efer & cr::EFER_SCE == 0 || cpu.mode.bits != 64 {
        return Err(Fault::UD);
    }
    cpu.regs[r::RCX] = cpu.next_rip;
    cpu.regs[r::R11] = cpu.rflags() & !flags::RF;
    cpu.change_flags(0, cpu.msrs.sfmask | flags::RF);
    let cs = (cpu.msrs.star >> 32) as u16;
    enter(cpu, cs, (cs & !3).wrapping_add(8), 0, true);
    cpu.next_rip = cpu.msrs.lstar;
    trap_by_new_flags(cpu);
    Ok(())
}

/// SYSRET: to 64-bit code with REX.W, else to 32-bit code.
pub fn sysret(cpu: &mut Cpu, long: bool) -> Exec {
    if cpu.efer & cr::EFER_SCE == 0 || cpu.mode.bits != 64 {
        return Err(Fault::UD);
    }
    cpu.require_ring0()?;
    let target = reg(cpu, r::RCX, if long { 8 } else { 4 });
    if !canonical(target) {
        return Err(Fault::GP0);
    }
    let known = flags::STATUS
        | flags::TF
        | flags::IF
        | flags::DF
        | flags::IOPL
        | flags::NT
        | flags::AC
        | flags::VIF
        | flags::VIP
        | flags::ID;
    cpu.change_flags(cpu.regs[r::R11] & known, known | flags::RF | flags::VM);
    let base = (cpu.msrs.star >> 48) as u16;
    let cs = if long { base.wrapping_add(16) } else { base };
    enter(cpu, cs, base.wrapping_add(8), 3, long);
    cpu.next_rip = target;
    trap_by_new_flags(cpu);
    Ok(())
}

/// SYSENTER.
pub fn sysenter(cpu: &mut Cpu) -> Exec {
    let cs = cpu.msrs.sysenter_cs as u16;
    if !cpu.mode.protected || cs & 0xfffc == 0 {
        return Err(Fault::GP0);
    }
    let long = cpu.mode.long;
    cpu.change_flags(0, flags::VM | flags::IF | flags::RF);
    enter(cpu, cs, (cs & !3).wrapping_add(8), 0, long);
    let part = if long { u64::MAX } else { 0xffff_ffff };
    cpu.regs[r::RSP] = cpu.msrs.sysenter_esp & part;
    cpu.next_rip = cpu.msrs.sysenter_eip & part;
    Ok(())
}

/// SYSEXIT: to 64-bit code with REX.W, else to 32-bit code.
pub fn sysexit(cpu: &mut Cpu, long: bool) -> Exec {
    let base = cpu.msrs.sysenter_cs as u16;
    if !cpu.mode.protected || base & 0xfffc == 0 || cpu.mode.cpl != 0 {
        return Err(Fault::GP0);
    }
    let size = if long { 8 } else { 4 };
    let (rip, rsp) = (reg(cpu, r::RDX, size), reg(cpu, r::RCX, size));
    if long && !(canonical(rip) && canonical(rsp)) {
        return Err(Fault::GP0);
    }
    let cs = base.wrapping_add(if long { 32 } else { 16 });
    enter(cpu, cs, cs.wrapping_add(8), 3, long);
    cpu.regs[r::RSP] = rsp;
    cpu.next_rip = rip;
    Ok(())
}

/// SWAPGS.
pub fn swapgs(cpu: &mut Cpu) -> Exec {
    if cpu.mode.bits != 64 {
        return Err(Fault::UD);
    }
    cpu.require_ring0()?;
    std::mem::swap(&mut cpu.segs[s::GS].base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}
