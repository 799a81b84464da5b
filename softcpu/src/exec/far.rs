//! Far jumps, calls and returns (SDM volume 3, 5.8).
//!
//! ```text
//!   selector --> code segment             same level
//!            |-> call gate --> code       same level, or (CALL) an inner one with its stack from the TSS
//!            |-> TSS, task gate           task switch (not in long mode)
//! ```

use iced_x86::{Code, Instruction, OpKind};

use super::flow::released;
use super::seg::{self, Descriptor, far_pointer, is_null, kind, rpl};
use super::task::{self, Switch};
use crate::fault::{Exec, Fault};
use crate::mem::canonical;
use crate::state::{Cpu, Segment, reg as r, seg as s};

/// Where a far JMP or CALL goes, and its operand size.
fn far_target(cpu: &mut Cpu, insn: &Instruction) -> Exec<(u16, u64, usize)> {
    match insn.op0_kind() {
        OpKind::FarBranch16 => {
            return Ok((insn.far_branch_selector(), insn.far_branch16().into(), 2));
        }
        OpKind::FarBranch32 => {
            return Ok((insn.far_branch_selector(), insn.far_branch32().into(), 4));
        }
        _ => {}
    }
    let size = match insn.code() {
        Code::Jmp_m1616 | Code::Call_m1616 => 2,
        Code::Jmp_m1632 | Code::Call_m1632 => 4,
        _ => 8,
    };
    let (selector, offset) = far_pointer(cpu, insn, size)?;
    Ok((selector, offset, size))
}

fn is_real(cpu: &Cpu) -> bool {
    !cpu.mode.protected || cpu.mode.v86
}

/// #GP(0) unless `offset` lies in code segment `cs`.
pub fn check_offset(cpu: &Cpu, cs: &Segment, offset: u64) -> Exec {
    let ok = match cpu.mode.long && cs.long() {
        true => canonical(offset),
        false => offset <= cs.limit.into(),
    };
    if ok { Ok(()) } else { Err(Fault::GP0) }
}

/// Sets CS at the current privilege level.
fn set_cs(cpu: &mut Cpu, cs: Segment) {
    cpu.segs[s::CS] = cs;
    cpu.update_mode();
    cpu.leave = true;
}

/// In real and virtual-8086 mode: CS is loaded, its limit stays.
pub fn go_real(cpu: &mut Cpu, selector: u16, offset: u64) {
    cpu.segs[s::CS].load_real(selector);
    cpu.next_rip = offset;
    cpu.leave = true;
}

/// Far JMP.
pub fn jmp(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let (selector, offset, _) = far_target(cpu, insn)?;
    if is_real(cpu) {
        check_offset(cpu, &cpu.segs[s::CS], offset)?;
        go_real(cpu, selector, offset);
        return Ok(());
    }
    let descriptor = target_descriptor(cpu, selector)?;
    if descriptor.kind() >= 16 {
        let cs = direct_segment(cpu, selector, descriptor)?;
        check_offset(cpu, &cs, offset)?;
        set_cs(cpu, cs);
        cpu.next_rip = offset;
        return Ok(());
    }
    if task::is_task(cpu, &descriptor) {
        return task::switch_by_instruction(cpu, selector, &descriptor, Switch::Jump);
    }
    let gate = open_call_gate(cpu, selector, &descriptor)?;
    // A jump through a gate does not change the level.
    let conforming = gate.cs.kind() & 4 != 0;
    if !conforming && gate.cs.dpl() != cpu.mode.cpl {
        return Err(Fault::gp(descriptor.gate_selector()));
    }
    let cs = accessed(cpu, gate.cs.selector, gate.descriptor, cpu.mode.cpl)?;
    check_offset(cpu, &cs, gate.offset)?;
    set_cs(cpu, cs);
    cpu.next_rip = gate.offset;
    Ok(())
}

/// Far CALL.
pub fn call(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let (selector, offset, size) = far_target(cpu, insn)?;
    let return_to = [cpu.segs[s::CS].selector.into(), cpu.next_rip];
    if is_real(cpu) {
        check_offset(cpu, &cpu.segs[s::CS], offset)?;
        cpu.push_all(size, &return_to)?;
        go_real(cpu, selector, offset);
        return Ok(());
    }
    let descriptor = target_descriptor(cpu, selector)?;
    if descriptor.kind() >= 16 {
        let cs = direct_segment(cpu, selector, descriptor)?;
        return call_same_level(cpu, cs, offset, size, &return_to);
    }
    if task::is_task(cpu, &descriptor) {
        return task::switch_by_instruction(cpu, selector, &descriptor, Switch::Call);
    }
    let gate = open_call_gate(cpu, selector, &descriptor)?;
    let conforming = gate.cs.kind() & 4 != 0;
    if !conforming && gate.cs.dpl() < cpu.mode.cpl {
        return call_inner(cpu, &descriptor, &gate, &return_to);
    }
    let cs = accessed(cpu, gate.cs.selector, gate.descriptor, cpu.mode.cpl)?;
    call_same_level(cpu, cs, gate.offset, gate.size, &return_to)
}

fn call_same_level(
    cpu: &mut Cpu,
    cs: Segment,
    offset: u64,
    size: usize,
    return_to: &[u64],
) -> Exec {
    check_offset(cpu, &cs, offset)?;
    let checkpoint = cpu.checkpoint();
    set_cs(cpu, cs);
    cpu.push_all(size, return_to).inspect_err(|_| cpu.roll_back(&checkpoint))?;
    cpu.next_rip = offset;
    Ok(())
}

fn target_descriptor(cpu: &mut Cpu, selector: u16) -> Exec<Descriptor> {
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    cpu.descriptor_or(selector, Fault::gp(selector))
}

/// The code segment that a JMP or CALL names directly.
fn direct_segment(cpu: &mut Cpu, selector: u16, descriptor: Descriptor) -> Exec<Segment> {
    let segment = descriptor.segment(selector);
    let cpl = cpu.mode.cpl;
    let allowed = match segment.kind() & 4 != 0 {
        true => segment.dpl() <= cpl,
        false => rpl(selector) <= cpl && segment.dpl() == cpl,
    };
    let two_sizes = cpu.mode.long && segment.long() && segment.big();
    if !segment.is_code() || !allowed || two_sizes {
        return Err(Fault::gp(selector));
    }
    if !segment.present() {
        return Err(Fault::np(selector));
    }
    accessed(cpu, selector, descriptor, cpl)
}

/// The segment with its accessed bit set and `cpl` as its selector's RPL.
fn accessed(cpu: &mut Cpu, selector: u16, mut descriptor: Descriptor, cpl: u8) -> Exec<Segment> {
    cpu.mark_descriptor(&mut descriptor, 1)?;
    Ok(descriptor.segment(selector & !3 | u16::from(cpl)))
}

/// Where a call gate leads.
struct Gate {
    descriptor: Descriptor,
    cs: Segment,
    offset: u64,
    size: usize,
}

fn open_call_gate(cpu: &mut Cpu, selector: u16, gate: &Descriptor) -> Exec<Gate> {
    let long = cpu.mode.long;
    let is_gate = match gate.kind() {
        kind::CALL_GATE => true,
        kind::CALL_GATE16 => !long,
        _ => false,
    };
    if !is_gate || gate.dpl() < cpu.mode.cpl.max(rpl(selector)) {
        return Err(Fault::gp(selector));
    }
    if !gate.present() {
        return Err(Fault::np(selector));
    }
    let mut offset = gate.gate_offset();
    if long {
        offset |= cpu.upper_half(selector, gate)?;
    }
    let target = gate.gate_selector();
    let descriptor = target_descriptor(cpu, target)?;
    let cs = descriptor.segment(target);
    if !cs.is_code() || cs.dpl() > cpu.mode.cpl || long && (!cs.long() || cs.big()) {
        return Err(Fault::gp(target));
    }
    if !cs.present() {
        return Err(Fault::np(target));
    }
    let size = match gate.kind() {
        kind::CALL_GATE16 => 2,
        _ if long => 8,
        _ => 4,
    };
    Ok(Gate { descriptor, cs, offset, size })
}

/// CALL through a gate to an inner level: a new stack, the old one's pointer on it, parameters copied.
fn call_inner(cpu: &mut Cpu, descriptor: &Descriptor, gate: &Gate, return_to: &[u64; 2]) -> Exec {
    let cpl = gate.cs.dpl();
    let (ss, rsp) = match cpu.mode.long {
        true => (seg::null(cpl.into(), cpl), cpu.tss_stack_long(cpl)?),
        false => cpu.inner_stack(cpl)?,
    };
    let mut frame = [0; 2 + 31 + 2];
    frame[0] = cpu.segs[s::SS].selector.into();
    frame[1] = cpu.regs[r::RSP];
    let parameters = if cpu.mode.long { 0 } else { descriptor.gate_parameters() };
    for i in 0..parameters {
        frame[1 + parameters - i] = cpu.peek(gate.size, (i * gate.size) as u64)?;
    }
    frame[2 + parameters..4 + parameters].copy_from_slice(return_to);
    let cs = accessed(cpu, gate.cs.selector, gate.descriptor, cpl)?;
    check_offset(cpu, &cs, gate.offset)?;
    let checkpoint = cpu.checkpoint();
    cpu.segs[s::SS] = ss;
    cpu.regs[r::RSP] = rsp;
    set_cs(cpu, cs);
    cpu.push_all(gate.size, &frame[..4 + parameters]).map_err(|fault| {
        cpu.roll_back(&checkpoint);
        if fault == Fault::SS0 { Fault::ss(ss.selector) } else { fault }
    })?;
    cpu.next_rip = gate.offset;
    Ok(())
}

/// Far RET.
pub fn ret(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let size = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let released = released(insn);
    let offset = cpu.peek(size, 0)?;
    let selector = cpu.peek(size, size as u64)? as u16;
    let taken = 2 * size as u64 + released;
    if is_real(cpu) {
        check_offset(cpu, &cpu.segs[s::CS], offset)?;
        cpu.drop_stack(taken);
        go_real(cpu, selector, offset);
        return Ok(());
    }
    let cs = return_segment(cpu, selector)?;
    if rpl(selector) == cpu.mode.cpl {
        check_offset(cpu, &cs, offset)?;
        cpu.drop_stack(taken);
        set_cs(cpu, cs);
        cpu.next_rip = offset;
        return Ok(());
    }
    let rsp = cpu.peek(size, taken)?;
    let ss = cpu.peek(size, taken + size as u64)? as u16;
    return_outward(cpu, Return { cs, offset, ss, rsp, size, released })
}

/// The code segment that RETF or IRET returns to.
pub fn return_segment(cpu: &mut Cpu, selector: u16) -> Exec<Segment> {
    let mut descriptor = target_descriptor(cpu, selector)?;
    let segment = descriptor.segment(selector);
    let allowed = match segment.kind() & 4 != 0 {
        true => segment.dpl() <= rpl(selector),
        false => segment.dpl() == rpl(selector),
    };
    let two_sizes = cpu.mode.long && segment.long() && segment.big();
    if !segment.is_code() || !allowed || rpl(selector) < cpu.mode.cpl || two_sizes {
        return Err(Fault::gp(selector));
    }
    if !segment.present() {
        return Err(Fault::np(selector));
    }
    cpu.mark_descriptor(&mut descriptor, 1)?;
    Ok(descriptor.segment(selector))
}

/// A return that loads SS:RSP from the stack.
pub struct Return {
    /// The code segment.
    pub cs: Segment,
    /// The offset in it.
    pub offset: u64,
    /// The stack segment's selector.
    pub ss: u16,
    /// The stack pointer.
    pub rsp: u64,
    /// Operand size in bytes.
    pub size: usize,
    /// Bytes of parameters to take off the new stack.
    pub released: u64,
}

/// Returns to `to`'s code and stack, at the level that its selector says; data segments of inner levels are
/// dropped.
pub fn return_outward(cpu: &mut Cpu, to: Return) -> Exec {
    let cpl = rpl(to.cs.selector);
    let long_code = cpu.mode.long && to.cs.long();
    let ss = if is_null(to.ss) && long_code && cpl < 3 {
        if rpl(to.ss) != cpl {
            return Err(Fault::gp(to.ss));
        }
        seg::null(to.ss, cpl)
    } else if is_null(to.ss) {
        return Err(Fault::GP0);
    } else {
        cpu.stack_segment(to.ss, cpl, Fault::gp(to.ss), Fault::ss(to.ss))?
    };
    check_offset(cpu, &to.cs, to.offset)?;
    let outward = cpl > cpu.mode.cpl;
    cpu.segs[s::SS] = ss;
    set_cs(cpu, to.cs);
    set_returned_sp(cpu, &to);
    if outward {
        cpu.drop_inner_segments();
    }
    cpu.next_rip = to.offset;
    Ok(())
}

/// A 16-bit stack takes SP only; a 32-bit one takes a 16-bit image zero-extended.
fn set_returned_sp(cpu: &mut Cpu, to: &Return) {
    let image = to.rsp & super::operand::mask(to.size);
    cpu.set_sp(image);
    cpu.drop_stack(to.released);
}
