//! Delivery through a gate of the IDT in long mode (SDM volume 3, 6.14).
//!
//! ```text
//!   gate (16 bytes): offset 63:32 | offset 31:16, P DPL type, IST | selector, offset 15:0
//!   stack, aligned to 16 bytes before it: SS, RSP, RFLAGS, CS, RIP, (error code)
//! ```

use super::{Event, idt_error};
use crate::exec::seg::{self, kind};
use crate::fault::{Exec, Fault, vector};
use crate::flags;
use crate::mem::canonical;
use crate::state::{Cpu, Segment, reg, seg as s};

impl Cpu {
    pub(super) fn deliver_long(&mut self, event: &Event) -> Exec {
        let error = idt_error(event.vector);
        let entry = u64::from(event.vector) * 16;
        if entry + 15 > self.idtr.limit.into() {
            return Err(Fault::with_error(vector::GP, error));
        }
        let at = self.idtr.base.wrapping_add(entry);
        let gate = seg::Descriptor { raw: self.load_sys(at)?, at };
        if !matches!(gate.kind(), kind::INTERRUPT_GATE | kind::TRAP_GATE)
            || event.software && gate.dpl() < self.mode.cpl
        {
            return Err(Fault::with_error(vector::GP, error));
        }
        if !gate.present() {
            return Err(Fault::with_error(vector::NP, error));
        }
        let upper: u64 = self.load_sys(at.wrapping_add(8))?;
        let target = gate.gate_offset() | upper << 32;
        let (cs, cpl) = self.handler_segment(gate.gate_selector())?;
        let rsp = self.handler_stack(&gate, cpl)?;
        if !canonical(target) {
            return Err(Fault::GP0);
        }
        self.enter_long_handler(event, cs, cpl, rsp)?;
        self.next_rip = target;
        let mut cleared = flags::TF | flags::NT | flags::RF | flags::VM;
        if gate.kind() == kind::INTERRUPT_GATE {
            cleared |= flags::IF;
        }
        self.sys_flags &= !cleared;
        Ok(())
    }

    /// The handler's code segment and privilege level.
    fn handler_segment(&mut self, selector: u16) -> Exec<(Segment, u8)> {
        let mut descriptor = self.descriptor_or(selector, Fault::gp(selector))?;
        let segment = descriptor.segment(selector);
        let fits = segment.is_code() && segment.dpl() <= self.mode.cpl;
        if !fits || !segment.long() || segment.big() {
            return Err(Fault::gp(selector));
        }
        if !segment.present() {
            return Err(Fault::np(selector));
        }
        self.mark_descriptor(&mut descriptor, 1)?;
        let conforming = segment.kind() & 4 != 0;
        let cpl = if conforming { self.mode.cpl } else { segment.dpl() };
        Ok((descriptor.segment(selector & !3 | u16::from(cpl)), cpl))
    }

    /// Where the handler's stack begins.
    fn handler_stack(&mut self, gate: &seg::Descriptor, cpl: u8) -> Exec<u64> {
        let ist = gate.raw >> 32 & 7;
        let rsp = match ist {
            0 if cpl == self.mode.cpl => self.regs[reg::RSP],
            0 => self.tss_stack_long(cpl)?,
            _ => self.load_tss_long(28 + 8 * ist)?,
        };
        if !canonical(rsp) {
            return Err(Fault::SS0);
        }
        Ok(rsp & !15)
    }

    fn enter_long_handler(&mut self, event: &Event, cs: Segment, cpl: u8, rsp: u64) -> Exec {
        let (old_cs, old_ss) = (self.segs[s::CS].selector, self.segs[s::SS].selector);
        let frame = [
            old_ss.into(),
            self.regs[reg::RSP],
            event.flags,
            old_cs.into(),
            event.return_rip,
            event.error.unwrap_or(0).into(),
        ];
        let checkpoint = self.checkpoint();
        if cpl != self.mode.cpl {
            self.segs[s::SS] = seg::null(cpl.into(), cpl);
        }
        self.segs[s::CS] = cs;
        self.regs[reg::RSP] = rsp;
        self.update_mode();
        let words = if event.error.is_some() { 6 } else { 5 };
        self.push_all(8, &frame[..words]).inspect_err(|_| self.roll_back(&checkpoint))
    }
}
