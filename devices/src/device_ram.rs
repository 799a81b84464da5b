//! Memory of a device's own that the guest's CPUs reach without leaving guest code: frame buffers, ROM, flash.
//!
//! ```text
//!   BAR set up, ROM placed --> mapped(Some(base)) --> a memory slot of the accelerator: plain loads and stores
//!   BAR taken away         --> mapped(None)       --> no slot; the bytes stay
//! ```

use std::sync::{Arc, Mutex, MutexGuard};

use lodge_accel::{MemorySlot, Vm};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use crate::bus::BusDevice;

const PAGE: u64 = 4096;

/// The accelerator's extra memory slots, by what they are for. A later one lies over an earlier one.
pub mod slots {
    /// The display's frame buffer.
    pub const VIDEO: u32 = 0;
    /// The firmware's code.
    pub const FIRMWARE: u32 = 1;
    /// The firmware's variables.
    pub const VARIABLES: u32 = 2;
}

/// Why there is no such memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes of device memory; is the host out of memory?")]
pub struct Error {
    bytes: u64,
    #[source]
    source: vm_memory::mmap::MmapRegionError,
}

/// What may be done to the memory by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Load and store.
    ReadWrite,
    /// Load; stores come to the bus.
    ReadOnly,
}

struct State {
    mapped: Option<u64>,
    /// Written pages: by devices, and what was collected of vCPUs when the slot was taken away.
    dirty: Vec<u64>,
}

/// A device's memory; zero at first.
pub struct DeviceRam {
    vm: Arc<dyn Vm>,
    slot: u32,
    access: Access,
    memory: MmapRegion,
    state: Mutex<State>,
}

impl DeviceRam {
    /// `bytes` (rounded up to whole pages) of memory for accelerator slot `slot` ([`slots`]), not mapped yet.
    ///
    /// # Errors
    /// The host has no such memory.
    pub fn new(vm: Arc<dyn Vm>, slot: u32, bytes: u64, access: Access) -> Result<Arc<Self>, Error> {
        let bytes = bytes.next_multiple_of(PAGE);
        let memory = usize::try_from(bytes).unwrap_or(usize::MAX);
        let memory = MmapRegion::new(memory).map_err(|source| Error { bytes, source })?;
        let dirty = vec![0; bytes.div_ceil(PAGE * 64) as usize];
        let state = Mutex::new(State { mapped: None, dirty });
        Ok(Arc::new(Self { vm, slot, access, memory, state }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.memory.size() as u64
    }

    /// All of it, for reading without copies. Writes through this are not noted: use [`DeviceRam::write_at`].
    pub fn memory(&self) -> VolatileSlice<'_> {
        self.memory.as_volatile_slice()
    }

    /// Reads; what is beyond the end is FFH.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) {
        let inside = usize::try_from(offset).ok().and_then(|at| self.memory().offset(at).ok());
        let got = inside.map_or(0, |slice| slice.copy_to(data));
        data[got..].fill(0xff);
    }

    /// Writes for a device, and notes the pages as written; what is beyond the end is dropped.
    pub fn write_at(&self, offset: u64, data: &[u8]) {
        let Ok(at) = usize::try_from(offset) else { return };
        let Ok(written) = self.memory().write(data, at) else { return };
        if written == 0 {
            return;
        }
        let mut state = self.lock();
        for page in offset / PAGE..=(offset + written as u64 - 1) / PAGE {
            state.dirty[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Pages written by the guest or a device since the last call, and forgets them: bit `i % 64` of word `i / 64`.
    pub fn take_dirty(&self) -> Vec<u64> {
        let mut state = self.lock();
        self.collect(&mut state);
        let clean = vec![0; state.dirty.len()];
        std::mem::replace(&mut state.dirty, clean)
    }

    /// Adds what vCPUs wrote.
    fn collect(&self, state: &mut State) {
        if state.mapped.is_none() || self.access == Access::ReadOnly {
            return;
        }
        match self.vm.take_slot_dirty(self.slot) {
            Ok(words) => state.dirty.iter_mut().zip(words).for_each(|(word, more)| *word |= more),
            Err(error) => {
                tracing::warn!(%error, "the accelerator does not tell what was written");
                state.dirty.fill(u64::MAX);
            }
        }
    }

    /// Shows the memory at guest-physical `base`, or no longer.
    pub fn map(&self, base: Option<u64>) {
        let mut state = self.lock();
        if state.mapped == base {
            return;
        }
        self.collect(&mut state);
        let slot = base.map(|gpa| MemorySlot {
            gpa,
            bytes: self.bytes(),
            host: self.memory.as_ptr(),
            readonly: self.access == Access::ReadOnly,
        });
        // SAFETY: the memory is unmapped by drop alone, which takes the slot away first.
        match unsafe { self.vm.set_memory(self.slot, slot) } {
            Ok(()) => state.mapped = base,
            // The bus still leads here, so that the guest goes on, slowly.
            Err(error) => {
                tracing::warn!(%error, base, "device memory is not mapped");
                state.mapped = None;
            }
        }
    }
}

impl Drop for DeviceRam {
    fn drop(&mut self) {
        self.map(None);
    }
}

/// What answers where the slot is not there (yet), and follows the bus with the slot.
impl BusDevice for DeviceRam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read_at(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.access == Access::ReadWrite {
            self.write_at(offset, data);
        }
    }

    fn mapped(&self, base: Option<u64>) {
        self.map(base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::AddressSpace;
    use crate::test_vm::TestVm;

    #[test]
    fn the_slot_follows_the_bus() {
        let vm = Arc::new(TestVm::new(false));
        let ram = DeviceRam::new(vm.clone(), 3, 5000, Access::ReadWrite).unwrap();
        let space = AddressSpace::default();
        assert_eq!((ram.bytes(), vm.slot(3).is_none()), (8192, true));
        space.insert(0x10000, 8192, ram.clone()).unwrap();
        let slot = vm.slot(3).unwrap();
        assert_eq!((slot.gpa, slot.bytes, slot.readonly), (0x10000, 8192, false));
        space.write(0x11000, &[1, 2, 3]);
        assert!(space.remove(0x10000));
        assert!(vm.slot(3).is_none());
        let mut data = [0; 4];
        ram.read_at(0x1000, &mut data);
        assert_eq!(data, [1, 2, 3, 0]);
        ram.read_at(8190, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        assert_eq!(ram.take_dirty(), [0b10]);
        assert_eq!(ram.take_dirty(), [0]);
        ram.map(Some(0x4000));
        drop(space);
        drop(ram);
        assert!(vm.slot(3).is_none(), "nothing leads to memory that is gone");
    }

    #[test]
    fn rom_is_not_written_by_the_guest() {
        let vm = Arc::new(TestVm::new(false));
        let rom = DeviceRam::new(vm.clone(), 1, 4096, Access::ReadOnly).unwrap();
        rom.write_at(0, &[7]);
        rom.write(0, &[8]);
        rom.map(Some(0xfffff000));
        assert!(vm.slot(1).unwrap().readonly);
        let mut data = [0];
        rom.read(0, &mut data);
        assert_eq!(data, [7]);
    }
}
