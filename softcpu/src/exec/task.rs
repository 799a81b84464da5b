//! Task-state segments: inner stacks, and task switches (SDM volume 3, chapter 7).
//!
//! ```text
//!   32-bit TSS                            16-bit TSS            64-bit TSS
//!   00 link                               00 link               04 RSP0 .. RSP2
//!   04 ESP0, SS0 .. ESP2, SS2             02 SP0, SS0 .. SS2    24h IST1 .. IST7
//!   1Ch CR3  20h EIP  24h EFLAGS          0Eh IP  10h FLAGS     66h I/O map
//!   28h EAX ECX EDX EBX ESP EBP ESI EDI   12h AX .. DI
//!   48h ES CS SS DS FS GS  60h LDT        22h ES CS SS DS  2Ah LDT
//!   64h T  66h I/O map
//! ```

use super::seg::{self, Descriptor, is_null, kind, rpl};
use crate::events::DR6_BT;
use crate::fault::{Exec, Fault};
use crate::flags::{NT, VM};
use crate::state::{Cpu, Segment, cr, seg as s};

/// DR7: L0 to L3 and LE.
const DR7_LOCAL: u64 = 0x155;

/// What causes a task switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// JMP.
    Jump,
    /// CALL: the new task returns to the old one.
    Call,
    /// IRET with NT set.
    Return,
    /// An exception or interrupt through a task gate; `flags` is what the old task's EFLAGS are saved as.
    Interrupt {
        /// The error code to push on the new task's stack.
        error: Option<u32>,
        /// EFLAGS as saved.
        flags: u64,
    },
}

impl Switch {
    /// The new task is nested in the old one.
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Interrupt { .. })
    }
}

/// A task-state segment, 16- or 32-bit.
#[derive(Clone, Copy)]
struct Tss {
    base: u64,
    /// 2 or 4: of one field.
    size: usize,
}

impl Tss {
    fn at(&self, offset: u64) -> u64 {
        self.base.wrapping_add(offset) & 0xffff_ffff
    }
    /// Offset of EIP; EFLAGS and the general-purpose registers follow.
    fn ip(&self) -> u64 {
        if self.size == 4 { 0x20 } else { 0x0e }
    }
    fn selectors(&self) -> u64 {
        self.ip() + 10 * self.size as u64
    }
    fn segments(&self) -> usize {
        if self.size == 4 { 6 } else { 4 }
    }
    fn ldt(&self) -> u64 {
        self.selectors() + (self.segments() * self.size) as u64
    }
    fn least_limit(&self) -> u32 {
        if self.size == 4 { 0x67 } else { 0x2b }
    }
}

/// A task's registers as its TSS has them.
struct Image {
    cr3: u64,
    ip: u64,
    flags: u64,
    regs: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

fn load_field(cpu: &mut Cpu, at: u64, size: usize) -> Exec<u64> {
    Ok(match size {
        2 => cpu.load_sys::<u16>(at)?.into(),
        4 => cpu.load_sys::<u32>(at)?.into(),
        _ => cpu.load_sys::<u64>(at)?,
    })
}

fn store_field(cpu: &mut Cpu, at: u64, size: usize, value: u64) -> Exec {
    match size {
        2 => cpu.store_sys(at, value as u16),
        _ => cpu.store_sys(at, value as u32),
    }
}

impl Cpu {
    /// A 64-bit field of the TSS of long mode; #TS(TR) beyond its limit.
    pub(crate) fn load_tss_long(&mut self, offset: u64) -> Exec<u64> {
        if offset + 7 > self.tr.limit.into() {
            return Err(Fault::ts(self.tr.selector));
        }
        self.load_sys(self.tr.base.wrapping_add(offset))
    }

    /// RSP of level `cpl` in the TSS of long mode. #SS(0) if it is not canonical.
    pub(crate) fn tss_stack_long(&mut self, cpl: u8) -> Exec<u64> {
        let rsp = self.load_tss_long(4 + 8 * u64::from(cpl))?;
        if crate::mem::canonical(rsp) { Ok(rsp) } else { Err(Fault::SS0) }
    }

    /// SS:ESP of level `cpl` in a 16- or 32-bit TSS, checked.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Exec<(Segment, u64)> {
        let z = if self.tr.kind() & 8 != 0 { 4 } else { 2 };
        let offset = z * (1 + 2 * u64::from(cpl));
        if offset + 2 * z - 1 > self.tr.limit.into() {
            return Err(Fault::ts(self.tr.selector));
        }
        let at = self.table_address(self.tr.base, offset);
        let esp = load_field(self, at, z as usize)?;
        let selector = load_field(self, at.wrapping_add(z), 2)? as u16;
        let fault = Fault::ts(selector);
        let ss = self.stack_segment(selector, cpl, fault, Fault::ss(selector))?;
        Ok((ss, esp))
    }
}

/// Whether a JMP or CALL to `descriptor` switches tasks.
pub fn is_task(cpu: &Cpu, descriptor: &Descriptor) -> bool {
    !cpu.mode.long
        && matches!(
            descriptor.kind(),
            kind::TASK_GATE | kind::TSS | kind::TSS16 | kind::TSS_BUSY | kind::TSS16_BUSY
        )
}

/// JMP or CALL to a TSS or a task gate.
pub fn switch_by_instruction(
    cpu: &mut Cpu,
    selector: u16,
    descriptor: &Descriptor,
    how: Switch,
) -> Exec {
    if descriptor.dpl() < cpu.mode.cpl.max(rpl(selector)) {
        return Err(Fault::gp(selector));
    }
    let return_rip = cpu.next_rip;
    if descriptor.kind() == kind::TASK_GATE {
        if !descriptor.present() {
            return Err(Fault::np(selector));
        }
        return switch_through_gate(cpu, descriptor, how, return_rip);
    }
    switch(cpu, selector, *descriptor, how, return_rip)
}

/// To the task that task gate `gate` names; the old task goes on at `return_rip`.
pub fn switch_through_gate(cpu: &mut Cpu, gate: &Descriptor, how: Switch, return_rip: u64) -> Exec {
    let selector = gate.gate_selector();
    let fault = Fault::gp(selector);
    if selector & 4 != 0 {
        return Err(fault);
    }
    let descriptor = cpu.descriptor_or(selector, fault)?;
    switch(cpu, selector, descriptor, how, return_rip)
}

/// IRET with NT: back to the task that the link names.
pub fn return_to_caller(cpu: &mut Cpu) -> Exec {
    let at = cpu.table_address(cpu.tr.base, 0);
    let selector: u16 = cpu.load_sys(at)?;
    let fault = Fault::ts(selector);
    if selector & 4 != 0 {
        return Err(fault);
    }
    let descriptor = cpu.descriptor_or(selector, fault)?;
    let return_rip = cpu.next_rip;
    switch(cpu, selector, descriptor, Switch::Return, return_rip)
}

/// The task switch itself. What fails before the new task's state is loaded is the old task's fault; what fails after
/// that is raised in the new task, at its EIP.
fn switch(
    cpu: &mut Cpu,
    selector: u16,
    mut descriptor: Descriptor,
    how: Switch,
    return_rip: u64,
) -> Exec {
    let segment = descriptor.segment(selector);
    let wanted = if how == Switch::Return { 2 } else { 0 };
    let is_tss = !segment.is_user() && segment.kind() & 5 == 1 && segment.kind() & 2 == wanted;
    if !is_tss {
        let returns = how == Switch::Return;
        return Err(if returns { Fault::ts(selector) } else { Fault::gp(selector) });
    }
    if !segment.present() {
        return Err(Fault::np(selector));
    }
    let new = tss(&segment);
    if segment.limit < new.least_limit() {
        return Err(Fault::ts(selector));
    }
    let image = load_image(cpu, new)?;
    save_old_task(cpu, how, return_rip)?;
    if how.nests() {
        let link = cpu.tr.selector;
        store_field(cpu, new.at(0), 2, link.into())?;
    }
    if how != Switch::Return {
        cpu.mark_descriptor(&mut descriptor, 2)?;
    }
    cpu.tr = descriptor.segment(selector);
    enter_task(cpu, new, image, how)
}

fn tss(segment: &Segment) -> Tss {
    Tss { base: segment.base, size: if segment.kind() & 8 != 0 { 4 } else { 2 } }
}

fn load_image(cpu: &mut Cpu, tss: Tss) -> Exec<Image> {
    let z = tss.size;
    let field =
        |cpu: &mut Cpu, from: u64, i: usize| load_field(cpu, tss.at(from + (i * z) as u64), z);
    let mut image = Image {
        cr3: 0,
        ip: field(cpu, tss.ip(), 0)?,
        flags: field(cpu, tss.ip(), 1)?,
        regs: [0; 8],
        selectors: [0; 6],
        ldt: field(cpu, tss.ldt(), 0)? as u16,
        trap: false,
    };
    for i in 0..8 {
        image.regs[i] = field(cpu, tss.ip(), 2 + i)?;
    }
    for i in 0..tss.segments() {
        image.selectors[i] = field(cpu, tss.selectors(), i)? as u16;
    }
    if z == 4 {
        image.cr3 = field(cpu, 0x1c, 0)?;
        image.trap = field(cpu, 0x64, 0)? & 1 != 0;
    }
    Ok(image)
}

/// Saves the old task's registers, and clears its busy bit if it does not go on.
fn save_old_task(cpu: &mut Cpu, how: Switch, return_rip: u64) -> Exec {
    let old = tss(&cpu.tr);
    let z = old.size;
    if cpu.tr.limit < old.least_limit() {
        return Err(Fault::ts(cpu.tr.selector));
    }
    let mut flags = match how {
        Switch::Interrupt { flags, .. } => flags,
        _ => cpu.rflags(),
    };
    if how == Switch::Return {
        flags &= !NT;
    }
    let mut fields = [0; 16];
    fields[0] = return_rip;
    fields[1] = flags;
    fields[2..10].copy_from_slice(&cpu.regs[..8]);
    for i in 0..old.segments() {
        fields[10 + i] = cpu.segs[i].selector.into();
    }
    let count = 10 + old.segments();
    // All pages before any byte.
    for offset in [old.ip(), old.ldt() - 1] {
        cpu.translate(old.at(offset), cpu.system_access(true))?;
    }
    for (i, value) in fields[..count].iter().enumerate() {
        let at = old.at(old.ip() + (i * z) as u64);
        // Selectors are 16 bits; the other half of their field is left.
        let size = if i >= 10 { 2 } else { z };
        store_field(cpu, at, size, *value)?;
    }
    if !how.nests()
        && let Some(descriptor) = cpu.descriptor(cpu.tr.selector)?
    {
        let at = descriptor.at.wrapping_add(5);
        let byte: u8 = cpu.load_sys(at)?;
        cpu.store_sys(at, byte & !2)?;
    }
    Ok(())
}

/// Loads the new task's state. From the first assignment on, faults are the new task's.
fn enter_task(cpu: &mut Cpu, new: Tss, image: Image, how: Switch) -> Exec {
    let mut flags = image.flags;
    if how.nests() {
        flags |= NT;
    }
    cpu.cr0 |= cr::CR0_TS;
    if new.size == 4 && cpu.cr0 & cr::CR0_PG != 0 && image.cr3 != cpu.cr3 {
        // PAE's PDPTEs are loaded with it; a bad one is the new task's fault.
        cpu.set_cr3(image.cr3)?;
    }
    cpu.rip = image.ip;
    cpu.next_rip = image.ip;
    for (index, value) in image.regs.into_iter().enumerate() {
        cpu.regs[index] = if new.size == 4 { value } else { value | 0xffff_0000 };
    }
    // The privilege level is that of CS; until it is loaded SS is a stand-in for it.
    let cpl = if flags & VM != 0 && new.size == 4 { 3 } else { rpl(image.selectors[s::CS]) };
    for index in 0..6 {
        cpu.segs[index] = seg::null(image.selectors[index], cpl);
    }
    // Local breakpoints are the old task's.
    cpu.dr[7] &= !DR7_LOCAL;
    cpu.set_rflags(if new.size == 4 { flags } else { flags & 0xffff });
    cpu.leave = true;
    if image.trap {
        cpu.pending_debug |= DR6_BT;
    }
    load_ldt(cpu, image.ldt)?;
    if cpu.mode.v86 {
        cpu.set_v86_segments();
        cpu.update_mode();
    } else {
        load_task_segments(cpu, &image.selectors, cpl)?;
    }
    if image.ip > cpu.segs[s::CS].limit.into() {
        return Err(Fault::GP0);
    }
    if let Switch::Interrupt { error: Some(error), .. } = how {
        cpu.push(new.size, error.into())?;
    }
    Ok(())
}

fn load_ldt(cpu: &mut Cpu, selector: u16) -> Exec {
    cpu.ldtr = seg::null(selector, 0);
    if is_null(selector) {
        return Ok(());
    }
    let fault = Fault::ts(selector);
    if selector & 4 != 0 {
        return Err(fault);
    }
    let descriptor = cpu.descriptor_or(selector, fault)?;
    if descriptor.kind() != kind::LDT || !descriptor.present() {
        return Err(fault);
    }
    cpu.ldtr = descriptor.segment(selector);
    Ok(())
}

/// CS, SS and the data segments, with #TS where loading by an instruction has #GP.
fn load_task_segments(cpu: &mut Cpu, selectors: &[u16; 6], cpl: u8) -> Exec {
    let selector = selectors[s::CS];
    let fault = Fault::ts(selector);
    let mut descriptor = cpu.descriptor_or(selector, fault)?;
    let cs = descriptor.segment(selector);
    let allowed = match cs.kind() & 4 != 0 {
        true => cs.dpl() <= cpl,
        false => cs.dpl() == cpl,
    };
    if !cs.is_code() || !allowed {
        return Err(fault);
    }
    if !cs.present() {
        return Err(Fault::np(selector));
    }
    let ss = selectors[s::SS];
    let stack = cpu.stack_segment(ss, cpl, Fault::ts(ss), Fault::ss(ss))?;
    cpu.mark_descriptor(&mut descriptor, 1)?;
    cpu.segs[s::CS] = descriptor.segment(selector);
    cpu.segs[s::SS] = stack;
    cpu.update_mode();
    for index in [s::ES, s::DS, s::FS, s::GS] {
        cpu.load_segment(index, selectors[index]).map_err(|fault| match fault.vector {
            crate::fault::vector::GP => Fault::ts(selectors[index]),
            _ => fault,
        })?;
    }
    Ok(())
}

/// Whether the I/O permission map of the TSS lets `size` ports from `port` through (SDM volume 1, 19.5.2).
pub fn io_map_allows(cpu: &mut Cpu, port: u16, size: usize) -> Exec<bool> {
    let limit = u64::from(cpu.tr.limit);
    if cpu.tr.kind() & 8 == 0 || limit < 103 {
        return Ok(false);
    }
    let map: u16 = cpu.load_sys(cpu.table_address(cpu.tr.base, 102))?;
    let at = u64::from(map) + u64::from(port >> 3);
    if at + 1 > limit {
        return Ok(false);
    }
    let bits: u16 = cpu.load_sys(cpu.table_address(cpu.tr.base, at))?;
    let wanted = (1u16 << size) - 1;
    Ok(bits >> (port & 7) & wanted == 0)
}
