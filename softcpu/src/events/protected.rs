//! Delivery through a gate of the IDT outside of long mode (SDM volume 3, 6.12), from virtual-8086 mode too.
//!
//! ```text
//!   same level        inner level            from virtual-8086 mode
//!   EFLAGS            old SS                 GS
//!   CS                old ESP                FS
//!   EIP               EFLAGS                 DS
//!   (error code)      CS                     ES
//!                     EIP                    old SS, then as for an inner level
//!                     (error code)
//! ```

use super::{Event, idt_error};
use crate::exec::seg::{self, kind};
use crate::exec::task::{self, Switch};
use crate::fault::{Exec, Fault, vector};
use crate::flags;
use crate::state::{Cpu, Segment, cr, reg, seg as s};

impl Cpu {
    pub(super) fn deliver_protected(&mut self, event: &Event) -> Exec {
        let error = idt_error(event.vector);
        let entry = u64::from(event.vector) * 8;
        if entry + 7 > self.idtr.limit.into() {
            return Err(Fault::with_error(vector::GP, error));
        }
        let at = self.table_address(self.idtr.base, entry);
        let gate = seg::Descriptor { raw: self.load_sys(at)?, at };
        let is_gate = matches!(
            gate.kind(),
            kind::TASK_GATE
                | kind::INTERRUPT_GATE16
                | kind::TRAP_GATE16
                | kind::INTERRUPT_GATE
                | kind::TRAP_GATE
        );
        if !is_gate || event.software && gate.dpl() < self.mode.cpl {
            return Err(Fault::with_error(vector::GP, error));
        }
        if !gate.present() {
            return Err(Fault::with_error(vector::NP, error));
        }
        if gate.kind() == kind::TASK_GATE {
            let return_rip = event.return_rip;
            let switch = Switch::Interrupt { error: event.error, flags: event.flags };
            return task::switch_through_gate(self, &gate, switch, return_rip);
        }
        self.deliver_through_gate(event, &gate)
    }

    fn deliver_through_gate(&mut self, event: &Event, gate: &seg::Descriptor) -> Exec {
        let selector = gate.gate_selector();
        let mut descriptor = self.descriptor_or(selector, Fault::gp(selector))?;
        let cs = descriptor.segment(selector);
        let conforming = cs.kind() & 4 != 0;
        if !cs.is_code() || cs.dpl() > self.mode.cpl {
            return Err(Fault::gp(selector));
        }
        if !cs.present() {
            return Err(Fault::np(selector));
        }
        let cpl = if conforming { self.mode.cpl } else { cs.dpl() };
        if self.mode.v86 && cpl != 0 {
            return Err(Fault::gp(selector));
        }
        let target = gate.gate_offset();
        if target > cs.limit.into() {
            return Err(Fault::GP0);
        }
        let inner = if cpl < self.mode.cpl { Some(self.inner_stack(cpl)?) } else { None };
        self.mark_descriptor(&mut descriptor, 1)?;
        let cs = descriptor.segment(selector & !3 | u16::from(cpl));
        self.enter_handler(event, gate, cs, inner)?;
        self.next_rip = target;
        let mut cleared = flags::TF | flags::NT | flags::RF | flags::VM;
        if matches!(gate.kind(), kind::INTERRUPT_GATE | kind::INTERRUPT_GATE16) {
            cleared |= flags::IF;
        }
        self.sys_flags &= !cleared;
        self.update_mode();
        Ok(())
    }

    /// Switches to the handler's segments and stack and pushes the frame.
    fn enter_handler(
        &mut self,
        event: &Event,
        gate: &seg::Descriptor,
        cs: Segment,
        inner: Option<(Segment, u64)>,
    ) -> Exec {
        let checkpoint = self.checkpoint();
        let mut frame = Frame::default();
        let v86 = self.mode.v86;
        if let Some((ss, esp)) = inner {
            if v86 {
                for index in [s::GS, s::FS, s::DS, s::ES] {
                    frame.push(self.segs[index].selector.into());
                    self.segs[index] = seg::null(0, 0);
                }
            }
            frame.push(self.segs[s::SS].selector.into());
            frame.push(self.regs[reg::RSP]);
            self.segs[s::SS] = ss;
            self.regs[reg::RSP] = esp;
        }
        frame.push(event.flags);
        frame.push(self.segs[s::CS].selector.into());
        frame.push(event.return_rip);
        if let Some(error) = event.error {
            frame.push(error.into());
        }
        self.segs[s::CS] = cs;
        self.sys_flags &= !flags::VM;
        self.update_mode();
        let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
        self.push_all(size, frame.words()).map_err(|fault| {
            self.roll_back(&checkpoint);
            match inner {
                Some((ss, _)) if fault == Fault::SS0 => Fault::ss(ss.selector),
                _ => fault,
            }
        })
    }

    /// INT n in virtual-8086 mode: to the 8086 program's own handler where CR4.VME and the TSS's map say so (SDM
    /// volume 3, 20.3), else to the monitor by IOPL.
    pub(crate) fn v86_interrupt(&mut self, vector: u8) -> Exec {
        if self.cr4 & cr::CR4_VME == 0 || self.redirected_to_monitor(vector)? {
            if self.iopl() < 3 {
                return Err(Fault::GP0);
            }
            return self.software_interrupt(vector);
        }
        let target: u32 = self.load(u64::from(vector) * 4)?;
        let mut image = self.rflags();
        let mut cleared = flags::TF | flags::IF;
        if self.iopl() < 3 {
            let virtual_if = if image & flags::VIF != 0 { flags::IF } else { 0 };
            image = image & !flags::IF | flags::IOPL | virtual_if;
            cleared = flags::TF | flags::VIF;
        }
        let event =
            Event { vector, error: None, software: true, return_rip: self.next_rip, flags: image };
        self.enter_real_handler(&event, target, image)?;
        self.change_flags(0, cleared);
        Ok(())
    }

    /// The bit of `vector` in the TSS's interrupt redirection map, the 32 bytes below the I/O permission map.
    fn redirected_to_monitor(&mut self, vector: u8) -> Exec<bool> {
        let limit = u64::from(self.tr.limit);
        if limit < 103 {
            return Err(Fault::GP0);
        }
        let map: u16 = self.load_sys(self.table_address(self.tr.base, 102))?;
        let at = u64::from(map) + u64::from(vector / 8);
        if at < 32 || at - 32 > limit {
            return Err(Fault::GP0);
        }
        let bits: u8 = self.load_sys(self.table_address(self.tr.base, at - 32))?;
        Ok(bits >> (vector & 7) & 1 != 0)
    }
}

/// What is pushed, first to last.
#[derive(Default)]
struct Frame {
    words: [u64; 10],
    len: usize,
}

impl Frame {
    fn push(&mut self, word: u64) {
        self.words[self.len] = word;
        self.len += 1;
    }
    fn words(&self) -> &[u64] {
        &self.words[..self.len]
    }
}
