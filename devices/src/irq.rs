//! Interrupt lines, and how several devices share one.
//!
//! ```text
//!   Line (device A) --set(true)--+
//!   Line (device B) --set(true)--+--> OR --> Vm::set_irq(gsi, level)
//!   Line (device C) -------------+
//! ```
//!
//! A line is high for as long as at least one of the devices on it asserts it, as wires of
//! level-triggered interrupts are. Dropping a [`Line`] releases it.

use std::sync::{Arc, Mutex};

use lodge_accel::Vm;

/// Pins of the IOAPIC.
pub const GSI_COUNT: u32 = 24;

/// All interrupt lines of a machine.
pub struct Lines {
    vm: Arc<dyn Vm>,
    /// How many devices assert each line. The lock also orders the calls into the accelerator.
    asserted: [Mutex<u32>; GSI_COUNT as usize],
}

impl Lines {
    /// The lines into `vm`'s interrupt controllers; all low.
    pub fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Self { vm, asserted: std::array::from_fn(|_| Mutex::new(0)) })
    }

    /// One device's connection to line `gsi`; `None` if there is no such line.
    pub fn line(self: &Arc<Self>, gsi: u32) -> Option<Line> {
        (gsi < GSI_COUNT).then(|| Line { lines: self.clone(), gsi, level: Mutex::new(false) })
    }
}

/// One device's end of an interrupt line.
pub struct Line {
    lines: Arc<Lines>,
    gsi: u32,
    level: Mutex<bool>,
}

impl Line {
    /// Which line this is (an IOAPIC pin).
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Asserts or releases the line on this device's behalf. Repeating a level does nothing.
    pub fn set(&self, level: bool) {
        let mut own = self.level.lock().unwrap_or_else(|e| e.into_inner());
        if *own == level {
            return;
        }
        *own = level;
        // `gsi` was checked when the line was made.
        let Some(count) = self.lines.asserted.get(self.gsi as usize) else { return };
        let mut count = count.lock().unwrap_or_else(|e| e.into_inner());
        let before = *count;
        *count = if level { before.saturating_add(1) } else { before.saturating_sub(1) };
        if (before == 0) != (*count == 0)
            && let Err(error) = self.lines.vm.set_irq(self.gsi, *count != 0)
        {
            tracing::error!(gsi = self.gsi, level, %error, "cannot set an interrupt line");
        }
    }

    /// Raises the line and releases it again: one edge, if nobody else holds the line high.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_vm::TestVm;

    #[test]
    fn a_shared_line_is_high_until_the_last_device_releases_it() {
        let vm = Arc::new(TestVm::default());
        let lines = Lines::new(vm.clone());
        let (a, b) = (lines.line(20).unwrap(), lines.line(20).unwrap());
        assert!(lines.line(GSI_COUNT).is_none());
        a.set(true);
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(vm.irqs(), [(20, true)]);
        drop(b);
        assert_eq!(vm.irqs(), [(20, true), (20, false)]);
        a.pulse();
        assert_eq!(vm.irqs()[2..], [(20, true), (20, false)]);
    }
}
