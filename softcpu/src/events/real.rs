//! Delivery through the interrupt vector table of real mode.
//!
//! ```text
//!   IVT entry: offset, segment (16 bits each)        stack: FLAGS, CS, IP
//! ```

use super::{Event, idt_error};
use crate::fault::{Exec, Fault, vector};
use crate::flags;
use crate::state::{Cpu, seg};

impl Cpu {
    pub(super) fn deliver_real(&mut self, event: &Event) -> Exec {
        let entry = u64::from(event.vector) * 4;
        if entry + 3 > self.idtr.limit.into() {
            return Err(Fault::with_error(vector::GP, idt_error(event.vector)));
        }
        let at = self.table_address(self.idtr.base, entry);
        let target: u32 = self.load_sys(at)?;
        self.enter_real_handler(event, target, event.flags)?;
        self.sys_flags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
        Ok(())
    }

    /// Pushes the frame with `image` as FLAGS and goes to `target`, segment and offset.
    pub(super) fn enter_real_handler(&mut self, event: &Event, target: u32, image: u64) -> Exec {
        let offset = u64::from(target & 0xffff);
        if offset > self.segs[seg::CS].limit.into() {
            return Err(Fault::GP0);
        }
        let cs = self.segs[seg::CS].selector;
        self.push_all(2, &[image, cs.into(), event.return_rip])?;
        self.segs[seg::CS].load_real((target >> 16) as u16);
        self.next_rip = offset;
        Ok(())
    }
}
