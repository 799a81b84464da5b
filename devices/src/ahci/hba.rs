//! The controller's own registers and its interrupt (AHCI 1.3.1, sections 3.1 and 10.7).
//!
//! ```text
//!   port: PxIS & PxIE != 0 --> pending --> IS (sticky, cleared by writing ones) --> GHC.IE --> INTx level, or
//!                                                                  a bit that rises --> MSI
//! ```

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::pci::{Intx, Msi};

/// Ports of the controller.
pub const PORTS: usize = 6;
/// Command slots of a port.
pub(super) const SLOTS: u32 = 32;

/// Offsets of the registers.
pub(super) mod reg {
    pub const CAP: u64 = 0x00;
    pub const GHC: u64 = 0x04;
    pub const IS: u64 = 0x08;
    pub const PI: u64 = 0x0c;
    pub const VS: u64 = 0x10;
    /// Where the ports' registers begin, and how many bytes each has.
    pub const PORTS: u64 = 0x100;
    pub const PORT_BYTES: u64 = 0x80;
}

/// Bits of GHC.
pub(super) const HR: u32 = 1;
const IE: u32 = 1 << 1;
const AE: u32 = 1 << 31;

/// CAP: 64-bit addresses, NCQ, command list override, 6 Gb/s, AHCI only, PIO multiple DRQ blocks.
const CAPABILITIES: u32 = 1 << 31
    | 1 << 30
    | 1 << 24
    | 3 << 20
    | 1 << 18
    | 1 << 15
    | (SLOTS - 1) << 8
    | (PORTS as u32 - 1);
/// VS: 1.3.1.
const VERSION: u32 = 0x0001_0301;

/// What is saved of the controller's own registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HbaState {
    /// GHC.IE.
    pub interrupts: bool,
    /// IS.
    pub is: u32,
}

#[derive(Default)]
struct Inner {
    state: HbaState,
    /// Ports with an interrupt that they want to tell.
    pending: u32,
}

/// The registers.
pub(super) struct Hba {
    inner: Mutex<Inner>,
    intx: Arc<Intx>,
    msi: Arc<Msi>,
}

impl Hba {
    pub(super) fn new(intx: Arc<Intx>, msi: Arc<Msi>) -> Self {
        Self { inner: Mutex::default(), intx, msi }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes IS and the interrupt follow what the ports say.
    fn follow(&self, inner: &mut Inner, was_enabled: bool) {
        let new = inner.pending & !inner.state.is;
        inner.state.is |= inner.pending;
        let raised = inner.state.interrupts && inner.state.is != 0;
        self.intx.set(raised);
        if raised && (new != 0 || !was_enabled) {
            self.msi.signal(0);
        }
    }

    /// Whether `port` has an interrupt that is not masked.
    pub(super) fn set_pending(&self, port: usize, pending: bool) {
        let mut inner = self.lock();
        let bit = 1u32 << port;
        if pending {
            inner.pending |= bit;
        } else {
            inner.pending &= !bit;
        }
        self.follow(&mut inner, true);
    }

    /// A register below the ports'. HR is not known here.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            reg::CAP => CAPABILITIES,
            reg::GHC => AE | if self.lock().state.interrupts { IE } else { 0 },
            reg::IS => self.lock().state.is,
            reg::PI => (1 << PORTS) - 1,
            reg::VS => VERSION,
            _ => 0,
        }
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        let mut inner = self.lock();
        let was_enabled = inner.state.interrupts;
        match offset {
            reg::GHC => inner.state.interrupts = value & IE != 0,
            // What a port still wants to tell comes back at once.
            reg::IS => inner.state.is &= !value,
            _ => return,
        }
        self.follow(&mut inner, was_enabled);
    }

    pub(super) fn reset(&self) {
        *self.lock() = Inner::default();
        self.intx.set(false);
    }

    pub(super) fn state(&self) -> HbaState {
        self.lock().state
    }

    /// Takes back what was saved, after the ports have.
    pub(super) fn restore(&self, state: HbaState) {
        let mut inner = self.lock();
        inner.state = state;
        self.intx.set(state.interrupts && state.is != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{EndpointBuilder, Identity};
    use crate::test_vm::TestVm;

    #[test]
    fn an_interrupt_that_comes_while_one_is_handled_is_told() {
        let vm = Arc::new(TestVm::default());
        let msi = Msi::new(vm.clone(), 1);
        let mut builder = EndpointBuilder::new(&Identity {
            vendor: 1,
            device: 1,
            class: 0,
            revision: 0,
            subsystem: (0, 0),
            multifunction: false,
        });
        let intx = builder.interrupt_pin(1);
        let at = builder.msi(&msi);
        let endpoint = builder.build();
        let hba = Hba::new(intx.clone(), msi);
        hba.set_pending(2, true);
        assert!(!intx.pending(), "IE is off");
        endpoint.write(at + 2, &[1, 0]);
        hba.write(reg::GHC, IE);
        assert_eq!((vm.msis().len(), intx.pending()), (1, true));
        // The handler reads IS and clears the port; another interrupt comes; then it clears IS.
        hba.set_pending(2, false);
        hba.set_pending(2, true);
        assert_eq!(vm.msis().len(), 1, "IS has not fallen");
        hba.write(reg::IS, 4);
        assert_eq!((hba.read(reg::IS), vm.msis().len()), (4, 2));
        hba.set_pending(2, false);
        assert_eq!(hba.read(reg::IS), 4, "sticky");
        hba.write(reg::IS, 4);
        assert!(!intx.pending());
    }
}
