//! The guest's side for tests: a machine with one virtio device, a driver that works through PCI as a
//! kernel does, and doubles for what is behind devices.
#![allow(dead_code)] // Each test program uses a part of it.

pub mod backends;
pub mod driver;
#[path = "../../src/test_vm.rs"]
pub mod test_vm;

use std::sync::Arc;
use std::time::{Duration, Instant};

use lodge_devices::bus::SystemBus;
use lodge_devices::irq::Lines;
use lodge_devices::pci::{Bdf, ECAM_BASE, Root, Slot, Windows};
use lodge_devices::virtio::{VirtioDevice, VirtioPci};
use lodge_memory::{Bus, GuestMemory, RamLayout, allocate};

use test_vm::TestVm;

/// Bytes of guest RAM.
pub const RAM: u64 = 16 << 20;

/// A machine with one virtio device.
pub struct Machine {
    pub bus: Arc<SystemBus>,
    pub memory: Arc<GuestMemory>,
    pub vm: Arc<TestVm>,
    pub root: Arc<Root>,
    pub device: Arc<VirtioPci>,
    pub at: Bdf,
}

impl Machine {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::over(device, allocate(&RamLayout::new(RAM).unwrap()).unwrap(), false)
    }

    /// A machine over RAM that exists; `ioeventfd` says what its accelerator can do.
    pub fn over(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>, ioeventfd: bool) -> Self {
        let vm = Arc::new(TestVm::new(ioeventfd));
        let bus = Arc::new(SystemBus::default());
        let root = Root::new(&bus, Lines::new(vm.clone()), Windows::new(RAM, 40)).unwrap();
        let device = VirtioPci::new(device, memory.clone(), vm.clone()).unwrap();
        let at = root.add(Slot::FirstFree, device.clone()).unwrap();
        Self { bus, memory, vm, root, device, at }
    }

    fn config(&self, register: u64) -> u64 {
        ECAM_BASE + (u64::from(self.at.device) << 15) + register
    }

    pub fn config_read(&self, register: u64, data: &mut [u8]) {
        self.bus.mmio_read(self.config(register), data);
    }

    pub fn config_u32(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.config_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn config_u16(&self, register: u64) -> u16 {
        let mut data = [0; 2];
        self.config_read(register, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn config_u8(&self, register: u64) -> u8 {
        let mut data = [0];
        self.config_read(register, &mut data);
        data[0]
    }

    pub fn config_write(&self, register: u64, data: &[u8]) {
        self.bus.mmio_write(self.config(register), data);
    }

    /// Offsets of the capabilities with this id, in order.
    pub fn capabilities(&self, id: u8) -> Vec<u64> {
        let mut found = Vec::new();
        let mut at = u64::from(self.config_u8(0x34));
        for _ in 0..64 {
            if at == 0 {
                return found;
            }
            if self.config_u8(at) == id {
                found.push(at);
            }
            at = u64::from(self.config_u8(at + 1));
        }
        panic!("the list of capabilities loops");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.root.remove_all();
    }
}

/// Waits until `done`; a test that waits for longer than this has found a hang.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Small reproducible randomness.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = self.0 >> 18 ^ self.0;
        x.rotate_right((self.0 >> 59) as u32)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
