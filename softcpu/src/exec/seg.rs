//! Descriptors, and loading segment registers (SDM volume 3, chapters 3 and 5).
//!
//! ```text
//!   63      56 55  52 51  48 47         40 39      16 15       0
//!  +----------+------+------+-------------+----------+----------+
//!  | base 31:24 G D L A| limit | P DPL S type | base 23:0 | limit 15:0 |
//!  +----------+------+------+-------------+----------+----------+
//!  in long mode LDT, TSS and call-gate descriptors have 8 bytes more: bits 63:32 of the base
//! ```

use iced_x86::Instruction;

use super::operand;
use crate::fault::{Exec, Fault};
use crate::mem::canonical;
use crate::state::{Cpu, Segment, seg as s};

/// Descriptor types of system segments.
#[allow(missing_docs)]
pub mod kind {
    pub const TSS16: u16 = 1;
    pub const LDT: u16 = 2;
    pub const TSS16_BUSY: u16 = 3;
    pub const CALL_GATE16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const INTERRUPT_GATE16: u16 = 6;
    pub const TRAP_GATE16: u16 = 7;
    /// 64-bit in long mode.
    pub const TSS: u16 = 9;
    pub const TSS_BUSY: u16 = 11;
    /// 64-bit in long mode.
    pub const CALL_GATE: u16 = 12;
    pub const INTERRUPT_GATE: u16 = 14;
    pub const TRAP_GATE: u16 = 15;
}

/// The attributes that segments have in virtual-8086 mode: present, writable data, DPL 3.
const V86_DATA: u16 = 0xf3;

/// A descriptor and where it lies.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// The 8 bytes.
    pub raw: u64,
    /// Their linear address.
    pub at: u64,
}

impl Descriptor {
    /// As a segment register holds it.
    pub fn segment(&self, selector: u16) -> Segment {
        let attr = (self.raw >> 40) as u16 & 0xf0ff;
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        let base = self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000;
        let granular = attr & 1 << 15 != 0;
        let limit = if granular { limit << 12 | 0xfff } else { limit };
        Segment { base, limit, selector, attr }
    }

    /// A gate's target selector.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// A gate's offset, bits 31:0; 16-bit gates have 15:0 only.
    pub fn gate_offset(&self) -> u64 {
        let wide = self.raw >> 43 & 1 != 0;
        self.raw & 0xffff | if wide { self.raw >> 32 & 0xffff_0000 } else { 0 }
    }

    /// A call gate's number of parameters.
    pub fn gate_parameters(&self) -> usize {
        (self.raw >> 32 & 31) as usize
    }

    /// P.
    pub fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }

    /// DPL.
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    /// S and the type, 5 bits: 16 and more are code and data.
    pub fn kind(&self) -> u16 {
        (self.raw >> 40 & 31) as u16
    }
}

/// The requested privilege level of a selector.
#[inline]
pub fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// Selectors 0 to 3 name no descriptor.
#[inline]
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// A segment register after loading a null selector.
pub fn null(selector: u16, dpl: u8) -> Segment {
    Segment { base: 0, limit: 0, selector, attr: u16::from(dpl) << 5 }
}

impl Cpu {
    /// The descriptor that `selector` names; none if it is beyond its table.
    pub fn descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let (base, limit) = if selector & 4 != 0 {
            if !self.ldtr.present() {
                return Ok(None);
            }
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        };
        if u32::from(selector | 7) > limit {
            return Ok(None);
        }
        let at = self.table_address(base, u64::from(selector & !7));
        Ok(Some(Descriptor { raw: self.load_sys(at)?, at }))
    }

    /// As [`Cpu::descriptor`]; `fault` is raised for a null selector or one beyond its table.
    pub fn descriptor_or(&mut self, selector: u16, fault: Fault) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(fault);
        }
        self.descriptor(selector)?.ok_or(fault)
    }

    /// The linear address of entry `offset` of a table at `base`.
    pub fn table_address(&self, base: u64, offset: u64) -> u64 {
        let at = base.wrapping_add(offset);
        if self.mode.long { at } else { at & 0xffff_ffff }
    }

    /// Bits 63:32 of the base (or offset) of a 16-byte descriptor; #GP(selector) if it is not within its table or its
    /// upper half has a type.
    pub fn upper_half(&mut self, selector: u16, descriptor: &Descriptor) -> Exec<u64> {
        let limit = if selector & 4 != 0 { self.ldtr.limit } else { self.gdtr.limit.into() };
        if u32::from(selector | 7) + 8 > limit {
            return Err(Fault::gp(selector));
        }
        let upper: u64 = self.load_sys(descriptor.at.wrapping_add(8))?;
        if upper >> 40 & 31 != 0 {
            return Err(Fault::gp(selector));
        }
        Ok(upper << 32)
    }

    /// Sets bits of the type in a descriptor in memory: "accessed" (1) or "busy" (2).
    pub fn mark_descriptor(&mut self, descriptor: &mut Descriptor, bits: u64) -> Exec {
        if descriptor.raw >> 40 & bits == bits {
            return Ok(());
        }
        let at = descriptor.at.wrapping_add(5);
        let byte: u8 = self.load_sys(at)?;
        self.store_sys(at, byte | bits as u8)?;
        descriptor.raw |= bits << 40;
        Ok(())
    }

    /// Loads ES, SS, DS, FS or GS with all checks.
    pub fn load_segment(&mut self, index: usize, selector: u16) -> Exec {
        if !self.mode.protected || self.mode.v86 {
            self.segs[index].load_real(selector);
            return Ok(());
        }
        let segment = if index == s::SS {
            self.check_stack_segment(selector)?
        } else {
            self.check_data_segment(selector)?
        };
        self.segs[index] = segment;
        if index == s::SS {
            self.update_mode();
        }
        if self.mode.bits != 64 {
            self.leave = true;
        }
        Ok(())
    }

    fn check_data_segment(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(null(selector, 0));
        }
        let mut descriptor = self.descriptor_or(selector, Fault::gp(selector))?;
        let segment = descriptor.segment(selector);
        let conforming = segment.is_code() && segment.kind() & 4 != 0;
        let privileged = segment.dpl() < self.mode.cpl.max(rpl(selector));
        if !segment.is_user() || !segment.readable() || !conforming && privileged {
            return Err(Fault::gp(selector));
        }
        if !segment.present() {
            return Err(Fault::np(selector));
        }
        self.mark_descriptor(&mut descriptor, 1)?;
        Ok(descriptor.segment(selector))
    }

    /// SS as MOV, POP and LSS load it: at the current privilege level.
    fn check_stack_segment(&mut self, selector: u16) -> Exec<Segment> {
        let cpl = self.mode.cpl;
        if is_null(selector) {
            // Only 64-bit code below CPL 3 does without one.
            if self.mode.bits == 64 && cpl < 3 && rpl(selector) == cpl {
                return Ok(null(selector, cpl));
            }
            return Err(Fault::GP0);
        }
        self.stack_segment(selector, cpl, Fault::gp(selector), Fault::ss(selector))
    }

    /// The stack segment `selector` for code at level `cpl`; `bad` and `absent` are the faults to raise.
    pub fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        bad: Fault,
        absent: Fault,
    ) -> Exec<Segment> {
        let mut descriptor = self.descriptor_or(selector, bad)?;
        let segment = descriptor.segment(selector);
        let fits = segment.is_user() && segment.writable() && segment.dpl() == cpl;
        if !fits || rpl(selector) != cpl {
            return Err(bad);
        }
        if !segment.present() {
            return Err(absent);
        }
        self.mark_descriptor(&mut descriptor, 1)?;
        Ok(descriptor.segment(selector))
    }

    /// Gives all segment registers what virtual-8086 mode needs; selectors stay.
    pub fn set_v86_segments(&mut self) {
        for segment in &mut self.segs {
            *segment = v86_segment(segment.selector);
        }
    }

    /// On a return to an outer level: data segments that it may not use become null.
    pub fn drop_inner_segments(&mut self) {
        for index in [s::ES, s::DS, s::FS, s::GS] {
            let segment = self.segs[index];
            let conforming = segment.is_code() && segment.kind() & 4 != 0;
            if segment.is_user() && !conforming && segment.dpl() < self.mode.cpl {
                let base = segment.base;
                self.segs[index] = null(0, 0);
                // In long mode the bases of FS and GS are not the selector's business.
                if self.mode.long && index >= s::FS {
                    self.segs[index].base = base;
                }
            }
        }
    }
}

/// A segment register as virtual-8086 mode has it.
pub fn v86_segment(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xffff, selector, attr: V86_DATA }
}

/// MOV and POP to a segment register.
pub fn load_by_instruction(cpu: &mut Cpu, index: usize, selector: u16) -> Exec {
    if index == s::CS {
        return Err(Fault::UD);
    }
    cpu.load_segment(index, selector)?;
    if index == s::SS {
        cpu.inhibit.shadow = true;
        cpu.leave = true;
    }
    Ok(())
}

/// MOV to a segment register.
pub fn mov_to_segment(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let index = operand::segment_index(insn.op0_register());
    if index == s::CS {
        return Err(Fault::UD);
    }
    let selector = match operand::is_register(insn, 1) {
        true => operand::gpr(cpu, insn.op1_register()),
        false => operand::load_operand(cpu, insn, 2)?,
    };
    load_by_instruction(cpu, index, selector as u16)
}

/// MOV from a segment register: 16 bits to memory, zero-extended to a register.
pub fn mov_from_segment(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let selector = cpu.segs[operand::segment_index(insn.op1_register())].selector;
    if operand::is_register(insn, 0) {
        operand::set_gpr(cpu, insn.op0_register(), selector.into());
        return Ok(());
    }
    operand::store_operand(cpu, insn, 2, selector.into())
}

/// A far pointer in memory: offset of `size` bytes, then the selector.
pub fn far_pointer(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Exec<(u16, u64)> {
    let segment = operand::segment(cpu, insn);
    let lin = cpu.linear(segment, operand::offset(cpu, insn), size as u64, false)?;
    let offset = operand::load(cpu, lin, size)?;
    let at = operand::offset_plus(cpu, insn, size as u64);
    let lin = cpu.linear(segment, at, 2, false)?;
    Ok((cpu.load::<u16>(lin)?, offset))
}

/// LDS, LES, LFS, LGS, LSS.
pub fn load_far_pointer(cpu: &mut Cpu, insn: &Instruction, index: usize) -> Exec {
    let register = insn.op0_register();
    let (selector, offset) = far_pointer(cpu, insn, register.size())?;
    cpu.load_segment(index, selector)?;
    if index == s::SS {
        cpu.leave = true;
    }
    operand::set_gpr(cpu, register, offset);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE. 64-bit code only; #UD without CR4.FSGSBASE.
pub fn fs_gs_base(cpu: &mut Cpu, insn: &Instruction, index: usize, write: bool) -> Exec {
    if cpu.mode.bits != 64 || cpu.cr4 & crate::state::cr::CR4_FSGSBASE == 0 {
        return Err(Fault::UD);
    }
    let register = insn.op0_register();
    if !write {
        operand::set_gpr(cpu, register, cpu.segs[index].base);
        return Ok(());
    }
    let base = operand::gpr(cpu, register);
    if !canonical(base) {
        return Err(Fault::GP0);
    }
    cpu.segs[index].base = base;
    Ok(())
}
