//! INTx: a function's interrupt pin, for guests and firmware without MSI-X.

use std::sync::Mutex;

use crate::irq::Line;

/// The first of the IOAPIC pins that PCI interrupts use (PIRQA), and how many there are.
const FIRST_GSI: u32 = 16;
const PIRQS: u32 = 8;

/// The IOAPIC pin of interrupt pin `pin` (1 = INTA .. 4 = INTD) of slot `slot` on the root bus.
///
/// Neighbouring slots get different lines. ACPI's `_PRT` is made from this same function.
pub fn intx_gsi(slot: u8, pin: u8) -> u32 {
    FIRST_GSI + (u32::from(slot) + u32::from(pin.saturating_sub(1))) % PIRQS
}

/// A function's INTx pin: what the device wants, and what the command register and MSI-X allow.
#[derive(Default)]
pub struct Intx {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    pending: bool,
    blocked: bool,
    line: Option<Line>,
}

impl Inner {
    fn update(&self) {
        if let Some(line) = &self.line {
            line.set(self.pending && !self.blocked);
        }
    }
}

impl Intx {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The device has (or no longer has) an interrupt pending.
    pub fn set(&self, pending: bool) {
        let mut inner = self.lock();
        inner.pending = pending;
        inner.update();
    }

    /// Whether the device has an interrupt pending (the status register's bit 3).
    pub fn pending(&self) -> bool {
        self.lock().pending
    }

    /// The command register's INTx disable bit, or MSI-X, keeps the pin low.
    pub fn block(&self, blocked: bool) {
        let mut inner = self.lock();
        inner.blocked = blocked;
        inner.update();
    }

    /// Wires the pin to a line, or takes it off.
    pub fn connect(&self, line: Option<Line>) {
        let mut inner = self.lock();
        inner.line = line;
        inner.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::Lines;
    use crate::test_vm::TestVm;
    use std::sync::Arc;

    #[test]
    fn routing_stays_within_the_pirqs() {
        for slot in 0..32 {
            for pin in 1..=4 {
                assert!((16..24).contains(&intx_gsi(slot, pin)));
            }
        }
        assert_eq!(intx_gsi(1, 1), 17);
        assert_eq!(intx_gsi(1, 2), intx_gsi(2, 1));
    }

    #[test]
    fn a_blocked_pin_is_low_and_comes_back() {
        let vm = Arc::new(TestVm::default());
        let intx = Intx::default();
        intx.connect(Lines::new(vm.clone()).line(17));
        intx.set(true);
        intx.block(true);
        assert!(intx.pending());
        intx.block(false);
        intx.connect(None);
        assert_eq!(vm.irqs(), [(17, true), (17, false), (17, true), (17, false)]);
    }
}
