//! System instructions: descriptor tables, protection checks, CPUID, time, MSRs, interrupts by software, HLT.

use iced_x86::{Code, Instruction, Mnemonic as M};

use super::control::{self, check_umip, store_or_set};
use super::operand::{self, gpr, set_gpr};
use super::seg::{self, is_null, kind, rpl};
use super::{Feature, int, iret, syscall};
use crate::fault::{Exec, Fault, vector};
use crate::flags;
use crate::mem::canonical;
use crate::state::{Activity, Cpu, TableRegister, cr, reg as r};

/// Executes a system instruction; none if it is not one.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Option<Exec> {
    Some(match insn.mnemonic() {
        M::Int => interrupt(cpu, insn.immediate8()),
        M::Int3 => cpu.software_interrupt(vector::BP),
        M::Into if cpu.of() => cpu.software_interrupt(vector::OF),
        M::Into => Ok(()),
        M::Int1 => cpu.int1(),
        M::Iret | M::Iretd | M::Iretq => iret::iret(cpu, insn),
        M::Retf => super::far::ret(cpu, insn),
        M::Syscall => syscall::syscall(cpu),
        M::Sysret => syscall::sysret(cpu, false),
        M::Sysretq => syscall::sysret(cpu, true),
        M::Sysenter => syscall::sysenter(cpu),
        M::Sysexit => syscall::sysexit(cpu, false),
        M::Sysexitq => syscall::sysexit(cpu, true),
        M::Swapgs => syscall::swapgs(cpu),
        M::Hlt => hlt(cpu),
        M::Cpuid => cpuid(cpu),
        M::Rdtsc => rdtsc(cpu),
        M::Rdtscp => rdtscp(cpu),
        M::Rdpmc => Err(Fault::GP0),
        M::Rdmsr => rdmsr(cpu),
        M::Wrmsr => wrmsr(cpu),
        M::Clts => control::clts(cpu),
        M::Lmsw => control::lmsw(cpu, insn),
        M::Smsw => control::smsw(cpu, insn),
        M::Invlpg => control::invlpg(cpu, insn),
        M::Invpcid => control::invpcid(cpu, insn),
        M::Xgetbv => control::xgetbv(cpu),
        M::Xsetbv => control::xsetbv(cpu),
        M::Invd | M::Wbinvd | M::Wbnoinvd => cpu.require_ring0(),
        M::Stac => set_ac(cpu, true),
        M::Clac => set_ac(cpu, false),
        M::Lgdt => load_table(cpu, insn, |cpu, table| cpu.gdtr = table),
        M::Lidt => load_table(cpu, insn, |cpu, table| cpu.idtr = table),
        M::Sgdt => store_table(cpu, insn, cpu.gdtr),
        M::Sidt => store_table(cpu, insn, cpu.idtr),
        M::Lldt | M::Ltr | M::Sldt | M::Str | M::Lar | M::Lsl | M::Verr | M::Verw | M::Arpl => {
            selectors(cpu, insn)
        }
        M::Lfence | M::Mfence | M::Sfence | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1
        | M::Prefetcht2 | M::Prefetchw | M::Prefetch | M::Prefetchwt1 | M::Cldemote
        // Without CET these are no-operations.
        | M::Rdsspd | M::Rdsspq => Ok(()),
        M::Clflush => int::touch(cpu, insn),
        M::Clflushopt if cpu.has(Feature::Clflushopt) => int::touch(cpu, insn),
        M::Clwb if cpu.has(Feature::Clwb) => int::touch(cpu, insn),
        _ => return None,
    })
}

/// INT n.
fn interrupt(cpu: &mut Cpu, vector: u8) -> Exec {
    if cpu.mode.v86 { cpu.v86_interrupt(vector) } else { cpu.software_interrupt(vector) }
}

fn hlt(cpu: &mut Cpu) -> Exec {
    cpu.require_ring0()?;
    cpu.activity = Activity::Halted;
    cpu.leave = true;
    Ok(())
}

fn cpuid(cpu: &mut Cpu) -> Exec {
    let (leaf, subleaf) = (cpu.regs[r::RAX] as u32, cpu.regs[r::RCX] as u32);
    let [a, b, c, d] = cpu.cpuid(leaf, subleaf);
    for (index, value) in [(r::RAX, a), (r::RBX, b), (r::RCX, c), (r::RDX, d)] {
        cpu.regs[index] = value.into();
    }
    Ok(())
}

fn check_tsd(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr::CR4_TSD != 0 && cpu.mode.protected { cpu.require_ring0() } else { Ok(()) }
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.regs[r::RAX] = value & 0xffff_ffff;
    cpu.regs[r::RDX] = value >> 32;
}

fn rdtsc(cpu: &mut Cpu) -> Exec {
    check_tsd(cpu)?;
    let now = cpu.tsc();
    set_edx_eax(cpu, now);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu) -> Exec {
    if !cpu.has(Feature::Rdtscp) {
        return Err(Fault::UD);
    }
    rdtsc(cpu)?;
    cpu.regs[r::RCX] = cpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

fn rdmsr(cpu: &mut Cpu) -> Exec {
    cpu.require_ring0()?;
    let value = cpu.read_msr(cpu.regs[r::RCX] as u32)?;
    set_edx_eax(cpu, value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu) -> Exec {
    cpu.require_ring0()?;
    let value = operand::reg(cpu, r::RDX, 4) << 32 | operand::reg(cpu, r::RAX, 4);
    cpu.write_msr(cpu.regs[r::RCX] as u32, value)?;
    cpu.leave = true;
    Ok(())
}

/// STAC and CLAC: #UD above CPL 0.
fn set_ac(cpu: &mut Cpu, on: bool) -> Exec {
    if !cpu.has(Feature::Smap) || cpu.mode.cpl != 0 {
        return Err(Fault::UD);
    }
    cpu.sys_flags = cpu.sys_flags & !flags::AC | if on { flags::AC } else { 0 };
    cpu.update_mode();
    Ok(())
}

/// LGDT and LIDT. A 16-bit operand size takes 24 bits of the base.
fn load_table(
    cpu: &mut Cpu,
    insn: &Instruction,
    set: impl FnOnce(&mut Cpu, TableRegister),
) -> Exec {
    cpu.require_ring0()?;
    let size = if cpu.mode.bits == 64 { 8 } else { 4 };
    let at = operand::address(cpu, insn, 2 + size, false)?;
    let limit: u16 = cpu.load(at)?;
    let mut base = operand::load(cpu, at.wrapping_add(2), size)?;
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if !canonical(base) {
        return Err(Fault::GP0);
    }
    set(cpu, TableRegister { base, limit });
    Ok(())
}

/// SGDT and SIDT. All 32 bits of the base are stored whatever the operand size.
fn store_table(cpu: &mut Cpu, insn: &Instruction, table: TableRegister) -> Exec {
    check_umip(cpu)?;
    let size = if cpu.mode.bits == 64 { 8 } else { 4 };
    let at = operand::address(cpu, insn, 2 + size, true)?;
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let access = cpu.access(true);
    cpu.write_lin(at, &bytes[..2 + size], access)
}

/// The instructions that take or give a selector; all are #UD in real and virtual-8086 mode.
fn selectors(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if !cpu.mode.protected || cpu.mode.v86 {
        return Err(Fault::UD);
    }
    match insn.mnemonic() {
        M::Lldt => lldt(cpu, insn),
        M::Ltr => ltr(cpu, insn),
        M::Sldt | M::Str => {
            check_umip(cpu)?;
            let register = if insn.mnemonic() == M::Str { &cpu.tr } else { &cpu.ldtr };
            let selector = register.selector.into();
            store_or_set(cpu, insn, selector)
        }
        M::Lar => lar_lsl(cpu, insn, true),
        M::Lsl => lar_lsl(cpu, insn, false),
        M::Verr => verify(cpu, insn, false),
        M::Verw => verify(cpu, insn, true),
        _ => arpl(cpu, insn),
    }
}

/// A selector in a register of any size, or in 16 bits of memory.
fn selector_operand(cpu: &mut Cpu, insn: &Instruction, i: u32) -> Exec<u16> {
    if operand::is_register(insn, i) {
        return Ok(gpr(cpu, insn.op_register(i)) as u16);
    }
    Ok(operand::load_operand(cpu, insn, 2)? as u16)
}

fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    cpu.require_ring0()?;
    let selector = selector_operand(cpu, insn, 0)?;
    if is_null(selector) {
        cpu.ldtr = seg::null(selector, 0);
        return Ok(());
    }
    let fault = Fault::gp(selector);
    if selector & 4 != 0 {
        return Err(fault);
    }
    let descriptor = cpu.descriptor_or(selector, fault)?;
    if descriptor.kind() != kind::LDT {
        return Err(fault);
    }
    if !descriptor.present() {
        return Err(Fault::np(selector));
    }
    cpu.ldtr = system_segment(cpu, selector, &descriptor)?;
    Ok(())
}

/// A system segment as a register holds it, with the 64-bit base of long mode.
fn system_segment(
    cpu: &mut Cpu,
    selector: u16,
    descriptor: &seg::Descriptor,
) -> Exec<crate::state::Segment> {
    let mut segment = descriptor.segment(selector);
    if cpu.mode.long {
        segment.base |= cpu.upper_half(selector, descriptor)?;
        if !canonical(segment.base) {
            return Err(Fault::gp(selector));
        }
    }
    Ok(segment)
}

fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    cpu.require_ring0()?;
    let selector = selector_operand(cpu, insn, 0)?;
    let fault = Fault::gp(selector);
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    if selector & 4 != 0 {
        return Err(fault);
    }
    let mut descriptor = cpu.descriptor_or(selector, fault)?;
    let available = match descriptor.kind() {
        kind::TSS => true,
        kind::TSS16 => !cpu.mode.long,
        _ => false,
    };
    if !available {
        return Err(fault);
    }
    if !descriptor.present() {
        return Err(Fault::np(selector));
    }
    let segment = system_segment(cpu, selector, &descriptor)?;
    cpu.mark_descriptor(&mut descriptor, 2)?;
    cpu.tr = segment;
    cpu.tr.attr |= 2;
    Ok(())
}

/// The descriptor of `selector` if LAR, LSL, VERR and VERW may see it at this privilege level.
fn visible(cpu: &mut Cpu, selector: u16) -> Exec<Option<seg::Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(descriptor) = cpu.descriptor(selector)? else { return Ok(None) };
    let conforming_code = descriptor.kind() & 0x1c == 0x1c;
    let reachable = conforming_code || descriptor.dpl() >= cpu.mode.cpl.max(rpl(selector));
    Ok(reachable.then_some(descriptor))
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    cpu.change_flags(if zf { flags::ZF } else { 0 }, flags::ZF);
}

/// LAR (access rights) and LSL (limit). ZF says whether the descriptor is visible and of a fitting type.
fn lar_lsl(cpu: &mut Cpu, insn: &Instruction, rights: bool) -> Exec {
    let selector = selector_operand(cpu, insn, 1)?;
    let found = visible(cpu, selector)?.filter(|descriptor| {
        let long = cpu.mode.long;
        match descriptor.kind() {
            16.. => true,
            kind::LDT | kind::TSS | kind::TSS_BUSY => true,
            kind::TSS16 | kind::TSS16_BUSY => !long,
            kind::CALL_GATE16 | kind::TASK_GATE => rights && !long,
            kind::CALL_GATE => rights,
            _ => false,
        }
    });
    if let Some(descriptor) = found {
        let value = match rights {
            true => descriptor.raw >> 32 & 0x00f0_ff00,
            false => descriptor.segment(selector).limit.into(),
        };
        set_gpr(cpu, insn.op0_register(), value);
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

/// VERR and VERW: ZF says whether the segment may be read or written.
fn verify(cpu: &mut Cpu, insn: &Instruction, write: bool) -> Exec {
    let selector = selector_operand(cpu, insn, 0)?;
    let ok = visible(cpu, selector)?.is_some_and(|descriptor| {
        let segment = descriptor.segment(selector);
        segment.is_user() && if write { segment.writable() } else { segment.readable() }
    });
    set_zf(cpu, ok);
    Ok(())
}

/// ARPL: raises the RPL of operand 0 to that of operand 1.
fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let wanted = gpr(cpu, insn.op1_register()) & 3;
    let raise = |old: u64| (old & 3 < wanted).then_some(old & !3 | wanted);
    let old = operand::modify(cpu, insn, raise)?;
    set_zf(cpu, old & 3 < wanted);
    Ok(())
}
