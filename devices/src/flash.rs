//! Flash memory that UEFI firmware keeps its variables in: an Intel-style parallel NOR chip (CFI command set 1;
//! JEDEC JESD68, Intel "Common Flash Interface and Command Sets", AP-646).
//!
//! ```text
//!             FF, 00                 10, 40          data
//!   Array <----------- Status <--- Program <-------+
//!     |  loads are plain memory      20            | D0
//!     +------- 70, 50 --> Status   Erase ----------+--> Status
//!     +------- 90 --> Identity     E8  Buffer: count, data.., D0 --> Status
//!     +------- 98 --> Query
//! ```
//!
//! In the array state the memory is mapped into the guest and only stores come here; in all others loads do too.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::device_ram::DeviceRam;

/// Bytes that are erased together.
pub const BLOCK: u64 = 4096;
/// Bytes that a buffered write takes at most.
const BUFFER: u64 = 256;
const READY: u8 = 1 << 7;
const ERASED: u8 = 0xff;
/// Intel, 28F128.
const IDENTITY: [u8; 2] = [0x89, 0x18];

mod command {
    pub const ARRAY: [u8; 2] = [0xff, 0x00];
    pub const PROGRAM: [u8; 2] = [0x10, 0x40];
    pub const ERASE: u8 = 0x20;
    pub const CLEAR_STATUS: u8 = 0x50;
    pub const READ_STATUS: u8 = 0x70;
    pub const IDENTITY: u8 = 0x90;
    pub const QUERY: u8 = 0x98;
    pub const BUFFER: u8 = 0xe8;
    pub const CONFIRM: u8 = 0xd0;
}

/// What the chip does with the next access.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlashMode {
    /// Loads give the contents; stores are commands.
    #[default]
    Array,
    /// Loads give the status.
    Status,
    /// Loads give the maker and the device.
    Identity,
    /// Loads give the query table.
    Query,
    /// The next store is data.
    Program,
    /// The next store confirms.
    Erase,
    /// The next store is the number of accesses - 1.
    BufferCount,
    /// So many bytes of the buffer are yet to come.
    BufferData(u16),
    /// The next store confirms.
    BufferConfirm,
}

/// What is saved of the chip, beside its contents (which are in the machine's file).
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlashState {
    /// What the next access does.
    pub mode: FlashMode,
    /// The status register.
    pub status: u8,
    /// Stores collected for a buffered write: offset and byte.
    pub buffer: Vec<(u64, u8)>,
}

/// Hears of every change of the contents: offset and new bytes. Called in vCPU threads.
pub type OnChange = Box<dyn Fn(u64, &[u8]) + Send + Sync>;

/// The chip.
pub struct Flash {
    ram: Arc<DeviceRam>,
    changed: OnChange,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    state: FlashState,
    /// Where the bus has it.
    base: Option<u64>,
}

impl Flash {
    /// A chip with the contents of `ram`, which is read-only for the guest and not mapped yet.
    pub fn new(ram: Arc<DeviceRam>, changed: OnChange) -> Arc<Self> {
        Arc::new(Self { ram, changed, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What is to be saved.
    pub fn save(&self) -> FlashState {
        self.lock().state.clone()
    }

    /// Puts it into a saved state.
    pub fn restore(&self, state: &FlashState) {
        let mut inner = self.lock();
        inner.state = state.clone();
        inner.state.buffer.truncate(BUFFER as usize);
        self.show(&inner);
    }

    /// After power-up; the contents stay.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.state = FlashState::default();
        self.show(&inner);
    }

    /// Maps the contents in the array state, and not in others.
    fn show(&self, inner: &Inner) {
        self.ram.map(inner.base.filter(|_| inner.state.mode == FlashMode::Array));
    }

    fn store(&self, offset: u64, bytes: &[u8]) {
        self.ram.write_at(offset, bytes);
        (self.changed)(offset, bytes);
    }

    /// Programming only clears bits.
    fn program(&self, offset: u64, data: &[u8]) {
        let mut bytes = vec![0; data.len()];
        self.ram.read_at(offset, &mut bytes);
        bytes.iter_mut().zip(data).for_each(|(byte, new)| *byte &= new);
        self.store(offset, &bytes);
    }

    fn command(&self, state: &mut FlashState, command: u8) {
        state.mode = match command {
            command if command::ARRAY.contains(&command) => FlashMode::Array,
            command if command::PROGRAM.contains(&command) => FlashMode::Program,
            command::ERASE => FlashMode::Erase,
            command::CLEAR_STATUS => {
                state.status = 0;
                FlashMode::Status
            }
            command::READ_STATUS => FlashMode::Status,
            command::IDENTITY => FlashMode::Identity,
            command::QUERY => FlashMode::Query,
            command::BUFFER => {
                state.buffer.clear();
                state.status |= READY;
                FlashMode::BufferCount
            }
            // What the chip does not know leaves it as it is after power-up.
            _ => FlashMode::Array,
        };
    }

    fn take(&self, state: &mut FlashState, offset: u64, data: &[u8]) {
        let first = data.first().copied().unwrap_or(0);
        match state.mode {
            FlashMode::Array | FlashMode::Status | FlashMode::Identity | FlashMode::Query => {
                self.command(state, first);
            }
            FlashMode::Program => {
                self.program(offset, data);
                state.status |= READY;
                state.mode = FlashMode::Status;
            }
            FlashMode::Erase => {
                if first == command::CONFIRM {
                    self.store(offset & !(BLOCK - 1), &[ERASED; BLOCK as usize]);
                }
                state.status |= READY;
                state.mode = FlashMode::Status;
            }
            FlashMode::BufferCount => state.mode = FlashMode::BufferData(u16::from(first) + 1),
            FlashMode::BufferData(left) => {
                let bytes = data.iter().zip(offset..).map(|(byte, at)| (at, *byte));
                state.buffer.extend(bytes.take(left.into()));
                let left = left.saturating_sub(data.len() as u16);
                state.mode = match left {
                    0 => FlashMode::BufferConfirm,
                    left => FlashMode::BufferData(left),
                };
            }
            FlashMode::BufferConfirm => {
                let buffer = std::mem::take(&mut state.buffer);
                if first == command::CONFIRM {
                    buffer.iter().for_each(|(at, byte)| self.program(*at, &[*byte]));
                }
                state.status |= READY;
                state.mode = FlashMode::Status;
            }
        }
    }

    /// Byte `at` of the query table.
    fn query(&self, at: u64) -> u8 {
        let blocks = (self.ram.bytes() / BLOCK - 1) as u16;
        let size = self.ram.bytes().next_power_of_two().trailing_zeros() as u8;
        match at {
            0x10 => b'Q',
            0x11 => b'R',
            0x12 => b'Y',
            // Command set 1; the extended table is at 31H.
            0x13 => 1,
            0x15 => 0x31,
            // 3.0 to 3.6 volts; typical times as powers of two, in microseconds and milliseconds; most times.
            0x1b => 0x30,
            0x1c => 0x36,
            0x1f | 0x20 => 4,
            0x21 => 10,
            0x23..=0x25 => 2,
            0x27 => size,
            0x2a => BUFFER.trailing_zeros() as u8,
            // One region of equal blocks.
            0x2c => 1,
            0x2d => blocks as u8,
            0x2e => (blocks >> 8) as u8,
            0x2f => (BLOCK >> 8) as u8,
            0x30 => (BLOCK >> 16) as u8,
            0x31 => b'P',
            0x32 => b'R',
            0x33 => b'I',
            0x34 => b'1',
            0x35 => b'0',
            _ => 0,
        }
    }
}

impl BusDevice for Flash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        match inner.state.mode {
            FlashMode::Array => self.ram.read_at(offset, data),
            FlashMode::Identity => {
                for (byte, at) in data.iter_mut().zip(offset..) {
                    *byte = IDENTITY.get((at & 0xff) as usize).copied().unwrap_or(0);
                }
            }
            FlashMode::Query => {
                for (byte, at) in data.iter_mut().zip(offset..) {
                    *byte = self.query(at & 0xff);
                }
            }
            _ => data.fill(inner.state.status),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        let before = inner.state.mode;
        self.take(&mut inner.state, offset, data);
        if (before == FlashMode::Array) != (inner.state.mode == FlashMode::Array) {
            self.show(&inner);
        }
    }

    fn mapped(&self, base: Option<u64>) {
        let mut inner = self.lock();
        inner.base = base;
        self.show(&inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::AddressSpace;
    use crate::device_ram::Access;
    use crate::legacy::testing::hammer;
    use crate::test_vm::TestVm;

    const BASE: u64 = 0xffc0_0000;

    struct Chip {
        vm: Arc<TestVm>,
        flash: Arc<Flash>,
        space: AddressSpace,
        changes: Arc<Mutex<Vec<(u64, usize)>>>,
    }

    fn chip() -> Chip {
        let vm = Arc::new(TestVm::new(false));
        let ram = DeviceRam::new(vm.clone(), 2, 4 * BLOCK, Access::ReadOnly).unwrap();
        ram.write_at(0, &vec![0xa5; 4 * BLOCK as usize]);
        let changes: Arc<Mutex<Vec<_>>> = Arc::default();
        let log = changes.clone();
        let changed = move |at, bytes: &[u8]| log.lock().unwrap().push((at, bytes.len()));
        let flash = Flash::new(ram, Box::new(changed));
        let space = AddressSpace::default();
        space.insert(BASE, 4 * BLOCK, flash.clone()).unwrap();
        Chip { vm, flash, space, changes }
    }

    impl Chip {
        fn put(&self, at: u64, bytes: &[u8]) {
            bytes.iter().for_each(|byte| self.space.write(BASE + at, &[*byte]));
        }
        fn get(&self, at: u64) -> u8 {
            let mut byte = [0];
            self.space.read(BASE + at, &mut byte);
            byte[0]
        }
        fn plain(&self) -> bool {
            self.vm.slot(2).is_some()
        }
    }

    /// As OVMF finds out that this is flash, not RAM or ROM.
    #[test]
    fn firmware_recognizes_it() {
        let chip = chip();
        assert!(chip.plain());
        let before = chip.get(7);
        chip.put(7, &[0x50]);
        assert_eq!((chip.get(7), before), (0, 0xa5));
        chip.put(7, &[0x70]);
        assert_eq!(chip.get(7), 0);
        chip.put(7, &[0xff]);
        assert_eq!((chip.get(7), chip.plain()), (0xa5, true));
    }

    #[test]
    fn bytes_are_programmed_and_blocks_erased() {
        let chip = chip();
        chip.put(0x1005, &[0x20, 0xd0]);
        assert_eq!((chip.get(0), chip.plain()), (READY, false));
        chip.put(0x1005, &[0x10, 0x3c]);
        chip.put(0x1005, &[0x10, 0x0f]);
        chip.put(0, &[0xff]);
        assert_eq!((chip.get(0x1005), chip.get(0x1fff), chip.get(0x2000)), (0x0c, 0xff, 0xa5));
        assert_eq!(*chip.changes.lock().unwrap(), [(0x1000, 4096), (0x1005, 1), (0x1005, 1)]);
        // Without the second word nothing is erased.
        chip.put(0x2000, &[0x20, 0xff, 0xff]);
        assert_eq!(chip.get(0x2000), 0xa5);
    }

    #[test]
    fn a_buffer_is_programmed_at_once() {
        let chip = chip();
        chip.put(0x1000, &[0x20, 0xd0, 0xe8, 2]);
        for (at, byte) in [(0x1000, 1), (0x1001, 2), (0x1002, 3)] {
            chip.put(at, &[byte]);
        }
        chip.put(0x1000, &[0xd0, 0xff]);
        assert_eq!([0x1000, 0x1001, 0x1002, 0x1003].map(|at| chip.get(at)), [1, 2, 3, 0xff]);
    }

    #[test]
    fn it_says_who_it_is() {
        let chip = chip();
        chip.put(0, &[0x90]);
        assert_eq!((chip.get(0), chip.get(1)), (0x89, 0x18));
        chip.put(0, &[0x98]);
        assert_eq!(
            [0x10, 0x11, 0x12, 0x27, 0x2d].map(|at| chip.get(at)),
            [b'Q', b'R', b'Y', 14, 3]
        );
    }

    #[test]
    fn a_reset_leaves_the_contents_and_a_restore_the_mode() {
        let chip = chip();
        chip.put(0, &[0x10, 0x11, 0x10]);
        let state = chip.flash.save();
        chip.flash.reset();
        assert_eq!((chip.get(0), chip.plain()), (0x01, true));
        chip.flash.restore(&state);
        assert!(!chip.plain());
        chip.put(1, &[0x24, 0xff]);
        assert_eq!(chip.get(1), 0x24);
        hammer(&*chip.flash, 4 * BLOCK, 50_000);
        assert!(chip.flash.save().buffer.len() <= BUFFER as usize + 8);
    }
}
