//! MSI-X: a table of messages, a mask for each, and the pending bits of those that are masked.
//!
//! PCI Local Bus 3.0, section 6.8.2.
//!
//! ```text
//!   signal(v) --> enabled, neither v nor the function masked --> Vm::signal_msi
//!             +-> masked --> pending bit; sent when both masks are off
//! ```

use std::sync::{Arc, Mutex, MutexGuard};

use lodge_accel::{Msi, Vm};
use serde::{Deserialize, Serialize};

/// Bytes of a table entry.
pub(super) const ENTRY: u64 = 16;
/// Message control: function mask and enable.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
/// The writable bits of message control.
pub(super) const CONTROL_WRITABLE: u16 = FUNCTION_MASK | ENABLE;

/// One entry of the table, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MsixVector {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The entry's mask bit.
    pub masked: bool,
    /// An interrupt waits for the masks to go.
    pub pending: bool,
}

impl Default for MsixVector {
    /// As after reset: masked.
    fn default() -> Self {
        Self { address: 0, data: 0, masked: true, pending: false }
    }
}

/// What is saved of a function's MSI-X.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MsixState {
    /// The table.
    pub vectors: Vec<MsixVector>,
}

struct Inner {
    vectors: Vec<MsixVector>,
    enabled: bool,
    masked: bool,
}

/// A function's MSI-X table and pending bits.
pub struct Msix {
    vm: Arc<dyn Vm>,
    inner: Mutex<Inner>,
}

impl Msix {
    /// A table of `vectors` entries (1..=2048), all masked, disabled.
    pub fn new(vm: Arc<dyn Vm>, vectors: u16) -> Arc<Self> {
        let vectors = vec![MsixVector::default(); vectors.clamp(1, 2048).into()];
        Arc::new(Self { vm, inner: Mutex::new(Inner { vectors, enabled: false, masked: false }) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Entries of the table.
    pub fn vectors(&self) -> u16 {
        self.lock().vectors.len() as u16
    }

    /// Whether the guest enabled MSI-X; if not, INTx is in use.
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Sends the message of `vector`, now or when it is unmasked. A vector outside of the table
    /// (also FFFFH, virtio's "none") and a disabled MSI-X do nothing.
    pub fn signal(&self, vector: u16) {
        let mut inner = self.lock();
        if !inner.enabled {
            return;
        }
        let masked = inner.masked;
        let Some(entry) = inner.vectors.get_mut(usize::from(vector)) else { return };
        if masked || entry.masked {
            entry.pending = true;
        } else {
            self.send(entry);
        }
    }

    fn send(&self, entry: &MsixVector) {
        let message = Msi { address: entry.address, data: entry.data };
        if let Err(error) = self.vm.signal_msi(message) {
            tracing::warn!(?message, %error, "cannot deliver an MSI");
        }
    }

    fn send_unmasked(&self, inner: &mut Inner) {
        if !inner.enabled || inner.masked {
            return;
        }
        for entry in inner.vectors.iter_mut().filter(|entry| entry.pending && !entry.masked) {
            entry.pending = false;
            self.send(entry);
        }
    }

    /// Message control was written.
    pub fn set_control(&self, control: u16) {
        let mut inner = self.lock();
        inner.enabled = control & ENABLE != 0;
        inner.masked = control & FUNCTION_MASK != 0;
        self.send_unmasked(&mut inner);
    }

    /// Reads the table at a byte offset.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            *byte = usize::try_from(at / ENTRY)
                .ok()
                .and_then(|index| inner.vectors.get(index))
                .map_or(0, |entry| entry.bytes()[(at % ENTRY) as usize]);
        }
    }

    /// Writes the table at a byte offset.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (i, &value) in data.iter().enumerate() {
            let at = offset.saturating_add(i as u64);
            let entry =
                usize::try_from(at / ENTRY).ok().and_then(|index| inner.vectors.get_mut(index));
            if let Some(entry) = entry {
                entry.set_byte((at % ENTRY) as usize, value);
            }
        }
        self.send_unmasked(&mut inner);
    }

    /// Reads the pending bit array at a byte offset. Writes to it have no effect.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let first = usize::try_from(offset.saturating_add(i as u64).saturating_mul(8));
            let entries = first.ok().and_then(|first| inner.vectors.get(first..)).unwrap_or(&[]);
            *byte = entries
                .iter()
                .take(8)
                .enumerate()
                .fold(0, |bits, (bit, entry)| bits | u8::from(entry.pending) << bit);
        }
    }

    /// As after power-on. Message control itself lies in configuration space.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.vectors.fill(MsixVector::default());
        inner.enabled = false;
        inner.masked = false;
    }

    /// What is saved.
    pub fn state(&self) -> MsixState {
        MsixState { vectors: self.lock().vectors.clone() }
    }

    /// Takes back what was saved, with message control as configuration space has it. Pending
    /// interrupts that nothing masks are sent.
    pub fn restore(&self, state: &MsixState, control: u16) {
        {
            let mut inner = self.lock();
            for (entry, saved) in inner.vectors.iter_mut().zip(&state.vectors) {
                *entry = saved.clone();
            }
        }
        self.set_control(control);
    }
}

impl MsixVector {
    fn bytes(&self) -> [u8; ENTRY as usize] {
        let mut bytes = [0; ENTRY as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12] = self.masked.into();
        bytes
    }

    fn set_byte(&mut self, at: usize, value: u8) {
        let shift = at % 8 * 8;
        match at {
            // Bits 1:0 of the address are zero.
            0 => self.address = self.address & !0xff | u64::from(value & !3),
            1..8 => self.address = self.address & !(0xff << shift) | u64::from(value) << shift,
            8..12 => {
                let shift = (at - 8) * 8;
                self.data = self.data & !(0xff << shift) | u32::from(value) << shift;
            }
            12 => self.masked = value & 1 != 0,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_vm::TestVm;

    fn program(msix: &Msix, vector: u64, address: u64, data: u32, masked: bool) {
        msix.write_table(vector * ENTRY, &address.to_le_bytes());
        msix.write_table(vector * ENTRY + 8, &data.to_le_bytes());
        msix.write_table(vector * ENTRY + 12, &u32::from(masked).to_le_bytes());
    }

    #[test]
    fn masked_vectors_stay_pending_until_unmasked() {
        let vm = Arc::new(TestVm::default());
        let msix = Msix::new(vm.clone(), 10);
        program(&msix, 9, 0xfee0_1003, 0x41, true);
        msix.signal(9);
        assert!(!msix.state().vectors[9].pending, "disabled: nothing happens");
        msix.set_control(ENABLE);
        msix.signal(9);
        msix.signal(9);
        msix.signal(10);
        msix.signal(0xffff);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0, 2, 0, 0, 0, 0, 0, 0]);
        assert!(vm.msis().is_empty());
        msix.write_table(9 * ENTRY + 12, &[0]);
        assert_eq!(vm.msis(), [Msi { address: 0xfee0_1000, data: 0x41 }]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_everything_back() {
        let vm = Arc::new(TestVm::default());
        let msix = Msix::new(vm.clone(), 2);
        program(&msix, 0, 0xfee0_0000, 1, false);
        program(&msix, 1, 0xfee0_0000, 2, false);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.signal(1);
        msix.signal(0);
        assert!(vm.msis().is_empty());
        let (state, other_vm) = (msix.state(), Arc::new(TestVm::default()));
        msix.set_control(ENABLE);
        assert_eq!(vm.msis().iter().map(|msi| msi.data).collect::<Vec<_>>(), [1, 2]);
        let other = Msix::new(other_vm.clone(), 2);
        other.restore(&state, ENABLE);
        assert_eq!(other_vm.msis().len(), 2, "what was pending survives a restore");
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let msix = Msix::new(Arc::new(TestVm::default()), 1);
        msix.write_table(u64::MAX - 2, &[1; 8]);
        msix.write_table(13, &[0xff; 8]);
        let mut data = [0xaa; 8];
        msix.read_table(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_pending(u64::MAX, &mut data);
        msix.read_table(8, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 1, 0, 0, 0]);
    }
}
