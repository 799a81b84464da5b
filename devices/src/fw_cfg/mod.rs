//! The firmware configuration device: what firmware is told of the machine, as numbered items and named files.
//!
//! ```text
//!   510  selector, 16 bits, write       511  data, a byte at a time
//!   514  DMA address, 64 bits big-endian; the write of its low half (518) starts
//!
//!   0000  "QEMU"      0005  CPUs        0019  the directory: names, sizes and numbers of files
//!   0001  features    000E  boot menu   0020..  files: etc/e820, etc/acpi/tables, bootorder, ...
//! ```
//!
//! SeaBIOS, OVMF, iPXE and Linux know it from QEMU ("QEMU Firmware Configuration Device", docs/specs/fw_cfg).

mod acpi;
mod items;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use lodge_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

pub use acpi::add_acpi;
pub use items::{Item, Items, key};

use crate::bus::BusDevice;

/// The first of its ports.
pub const FW_CFG_PORT: u16 = 0x510;
/// How many ports it has.
pub const FW_CFG_LEN: u64 = 12;

/// What a read of the DMA address register gives: "QEMU CFG".
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// Bits of a DMA request's control word.
mod control {
    pub const ERROR: u32 = 1;
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}
/// Offsets from [`FW_CFG_PORT`].
const DATA: u64 = 1;
const DMA: u64 = 4;
/// The most that is copied at once, so that a request does not need its size in host memory.
const CHUNK: usize = 1 << 16;

/// What is saved of the device. The items come from the machine anew.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FwCfgState {
    /// The item that is selected.
    pub selected: u16,
    /// How far it was read.
    pub offset: u32,
    /// The high half of the DMA address, if it was written.
    pub dma_high: u32,
}

/// The device.
pub struct FwCfg {
    memory: Arc<GuestMemory>,
    items: RwLock<Items>,
    state: Mutex<FwCfgState>,
}

impl FwCfg {
    /// A device with these items.
    pub fn new(memory: Arc<GuestMemory>, items: Items) -> Arc<Self> {
        let items = RwLock::new(items);
        Arc::new(Self { memory, items, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, FwCfgState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts a file in the place of one of that name. The firmware sees it at its next start.
    pub fn replace_file(&self, name: &str, bytes: Vec<u8>) {
        self.items.write().unwrap_or_else(PoisonError::into_inner).add_file(name, bytes);
    }

    /// What is to be saved.
    pub fn save(&self) -> FwCfgState {
        *self.lock()
    }

    /// Puts it into a saved state.
    pub fn restore(&self, state: &FwCfgState) {
        *self.lock() = *state;
    }

    /// After power-up.
    pub fn reset(&self) {
        *self.lock() = FwCfgState::default();
    }

    /// Reads on in the selected item; beyond its end there are zeros.
    fn read_next(&self, state: &mut FwCfgState, data: &mut [u8]) {
        let items = self.items.read().unwrap_or_else(PoisonError::into_inner);
        let got = items.read(state.selected, state.offset.into(), data);
        data[got..].fill(0);
        state.offset = state.offset.saturating_add(data.len() as u32);
    }

    /// Carries out the request at guest-physical `at` and writes its result there.
    fn dma(&self, state: &mut FwCfgState, at: u64) {
        let mut request = [0; 16];
        if self.memory.read_slice(&mut request, GuestAddress(at)).is_err() {
            return;
        }
        let word = |i: usize| u32::from_be_bytes([0, 1, 2, 3].map(|n| request[i + n]));
        let (what, length) = (word(0), word(4));
        let address = u64::from(word(8)) << 32 | u64::from(word(12));
        if what & control::SELECT != 0 {
            state.selected = (what >> 16) as u16;
            state.offset = 0;
        }
        let done = if what & control::READ != 0 {
            self.dma_read(state, address, length)
        } else if what & control::WRITE != 0 {
            // No item takes what the guest writes.
            false
        } else {
            if what & control::SKIP != 0 {
                state.offset = state.offset.saturating_add(length);
            }
            true
        };
        let result = if done { 0 } else { control::ERROR };
        // The request was read from there, so the guest can be told there.
        let _ = self.memory.write_slice(&result.to_be_bytes(), GuestAddress(at));
    }

    fn dma_read(&self, state: &mut FwCfgState, address: u64, length: u32) -> bool {
        // A guest may ask for 4 GiB of zeros: what it gets ends with its memory.
        let mut chunk = vec![0; CHUNK.min(length as usize)];
        let mut done = 0u64;
        while done < length.into() {
            let now = chunk.len().min((u64::from(length) - done) as usize);
            self.read_next(state, &mut chunk[..now]);
            let Some(to) = address.checked_add(done) else { return false };
            if self.memory.write_slice(&chunk[..now], GuestAddress(to)).is_err() {
                return false;
            }
            done += now as u64;
        }
        true
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            DATA => self.read_next(&mut self.lock(), data),
            DMA.. => {
                for (byte, at) in data.iter_mut().zip(offset - DMA..) {
                    *byte = DMA_SIGNATURE.get(at as usize).copied().unwrap_or(0);
                }
            }
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (0, &[low, high]) => {
                state.selected = u16::from_le_bytes([low, high]);
                state.offset = 0;
            }
            (DMA, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (8, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let at = u64::from(std::mem::take(&mut state.dma_high)) << 32 | u64::from(low);
                self.dma(&mut state, at);
            }
            (DMA, &[a, b, c, d, e, f, g, h]) => {
                self.dma(&mut state, u64::from_be_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::hammer;
    use lodge_memory::RamLayout;

    fn device() -> (Arc<GuestMemory>, Arc<FwCfg>) {
        let memory = lodge_memory::allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
        let mut items = Items::new();
        items.set_u16(key::CPUS, 4);
        items.add_file("etc/b", vec![1, 2, 3]);
        items.add_file("etc/a", vec![9; 100_000]);
        (memory.clone(), FwCfg::new(memory, items))
    }

    fn read(device: &FwCfg, count: usize) -> Vec<u8> {
        (0..count)
            .map(|_| {
                let mut byte = [0];
                device.read(DATA, &mut byte);
                byte[0]
            })
            .collect()
    }

    fn select(device: &FwCfg, key: u16) {
        device.write(0, &key.to_le_bytes());
    }

    fn request(memory: &GuestMemory, device: &FwCfg, what: u32, length: u32, to: u64) -> u32 {
        let mut bytes = what.to_be_bytes().to_vec();
        bytes.extend(length.to_be_bytes());
        bytes.extend(to.to_be_bytes());
        memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
        device.write(DMA, &0u32.to_be_bytes());
        device.write(8, &0x1000u32.to_be_bytes());
        let mut result = [0; 4];
        memory.read_slice(&mut result, GuestAddress(0x1000)).unwrap();
        u32::from_be_bytes(result)
    }

    #[test]
    fn items_are_read_a_byte_at_a_time() {
        let (_, device) = device();
        assert_eq!(read(&device, 5), *b"QEMU\0");
        select(&device, key::FEATURES);
        assert_eq!(read(&device, 4), [3, 0, 0, 0]);
        select(&device, key::CPUS);
        assert_eq!(read(&device, 3), [4, 0, 0]);
        select(&device, 0x7777);
        assert_eq!(read(&device, 2), [0, 0]);
        let mut signature = [0; 8];
        device.read(DMA, &mut signature[..4]);
        device.read(8, &mut signature[4..]);
        assert_eq!(signature, *b"QEMU CFG");
    }

    #[test]
    fn the_directory_leads_to_the_files() {
        let (memory, device) = device();
        select(&device, key::DIRECTORY);
        assert_eq!(read(&device, 4), [0, 0, 0, 2]);
        let entry = read(&device, 64);
        assert_eq!(entry[..4], 100_000u32.to_be_bytes());
        assert_eq!(entry[8..14], *b"etc/a\0");
        let second = read(&device, 64);
        let key = u16::from_be_bytes([second[4], second[5]]);
        select(&device, key);
        assert_eq!(read(&device, 4), [1, 2, 3, 0]);
        // All of the first at once, then on from its middle.
        let key = u32::from(u16::from_be_bytes([entry[4], entry[5]])) << 16;
        let what = key | control::SELECT | control::READ;
        assert_eq!(request(&memory, &device, what, 100_000, 0x2000), 0);
        let mut data = vec![0; 100_001];
        memory.read_slice(&mut data, GuestAddress(0x2000)).unwrap();
        assert!(data[..100_000].iter().all(|b| *b == 9) && data[100_000] == 0);
        assert_eq!(request(&memory, &device, key | control::SELECT | control::SKIP, 99_999, 0), 0);
        assert_eq!(read(&device, 2), [9, 0]);
    }

    #[test]
    fn requests_that_cannot_be_are_refused() {
        let (memory, device) = device();
        for (what, length, to) in [
            (control::READ, 0x1000, 0xf_f800),
            (control::READ, u32::MAX, 0x8000),
            (control::READ, 8, u64::MAX - 3),
            (control::WRITE, 1, 0x8000),
        ] {
            assert_eq!(request(&memory, &device, what, length, to), control::ERROR);
        }
        // A request beyond memory is dropped.
        device.write(DMA, &u64::MAX.to_be_bytes());
        hammer(&*device, FW_CFG_LEN, 20_000);
    }

    #[test]
    fn what_is_saved_goes_on_elsewhere() {
        let (_, first) = device();
        select(&first, 0);
        read(&first, 2);
        let (_, second) = device();
        second.restore(&first.save());
        assert_eq!(read(&second, 2), *b"MU");
        second.reset();
        assert_eq!(second.save(), FwCfgState::default());
    }
}
