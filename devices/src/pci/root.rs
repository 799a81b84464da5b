//! The root bus: which function is in which slot, and the two ways to its configuration space.
//!
//! ```text
//!   ECAM:        B000_0000 + bus << 20 | device << 15 | function << 12 | register (0..FFFH)
//!   mechanism 1: CF8 = 1 << 31 | bus << 16 | device << 11 | function << 8 | register & FCH; CFC..CFF data
//! ```
//!
//! PCI Express 3.0, section 7.2.2; PCI Local Bus 3.0, section 3.2.2.3.2.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};

use super::bridge::{HOST_BRIDGE, ICH9_LPC, IdentityFunction, host_bridge, ich9_lpc};
use super::endpoint::{BarKind, Endpoint};
use super::windows::{Allocator, Windows};
use super::{Bdf, Error};
use crate::bus::{BusDevice, SystemBus};
use crate::irq::Lines;

/// Where ECAM begins (what OVMF and SeaBIOS choose on this board).
pub const ECAM_BASE: u64 = 0xb000_0000;
/// Its size: 256 buses of 1 MiB.
pub const ECAM_SIZE: u64 = 256 << 20;
/// The ports of mechanism 1: address here, data four above.
const CONFIG_ADDRESS: u64 = 0xcf8;
const ENABLE: u32 = 1 << 31;
/// Slots of a bus.
const SLOTS: u8 = 32;

/// A PCI function. Called from vCPU threads, several at once.
pub trait Function: Send + Sync {
    /// Its configuration space, BARs and interrupts.
    fn endpoint(&self) -> &Endpoint;

    /// Reads configuration space: `data` lies within one dword.
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.endpoint().read(offset, data);
    }

    /// Writes configuration space: `data` lies within one dword.
    fn config_write(&self, offset: usize, data: &[u8]) {
        self.endpoint().write(offset, data);
    }

    /// The machine was reset.
    fn reset(&self);

    /// The function was taken out of its slot for good: it ends its threads and lets go of the host's
    /// resources.
    fn removed(&self) {}
}

/// Where a function shall go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The lowest free slot from 1 on: the same devices in the same order get the same slots.
    FirstFree,
    /// This one.
    At(Bdf),
}

/// The allocators behind the windows.
pub(super) struct Room {
    io: Allocator,
    mmio32: Allocator,
    mmio64: Allocator,
}

impl Room {
    pub(super) fn allocate(&mut self, at: Bdf, kind: BarKind, bytes: u64) -> Result<u64, Error> {
        let (found, window) = match kind {
            BarKind::Io => (self.io.allocate(bytes), "I/O port"),
            BarKind::Memory32 | BarKind::Memory32Prefetchable => {
                (self.mmio32.allocate(bytes), "32-bit memory")
            }
            BarKind::Memory64 => (
                self.mmio64.allocate(bytes).or_else(|| self.mmio32.allocate(bytes)),
                "64-bit memory",
            ),
        };
        found.ok_or(Error::NoRoom { at, bytes, window })
    }

    pub(super) fn free(&mut self, base: u64) {
        // The windows do not overlap except ports with nothing: only one of them has it.
        self.io.free(base);
        self.mmio32.free(base);
        self.mmio64.free(base);
    }
}

/// The root complex with its one bus.
pub struct Root {
    bus: Weak<SystemBus>,
    lines: Arc<Lines>,
    windows: Windows,
    room: Mutex<Room>,
    functions: RwLock<BTreeMap<Bdf, Arc<dyn Function>>>,
    /// The latch behind port CF8.
    address: AtomicU32,
    reset_control: RwLock<Option<Arc<dyn BusDevice>>>,
}

impl Root {
    /// The root complex, on `bus` with ECAM and mechanism 1, with the chipset's own functions.
    pub fn new(
        bus: &Arc<SystemBus>,
        lines: Arc<Lines>,
        windows: Windows,
    ) -> Result<Arc<Self>, Error> {
        let room = Room {
            io: Allocator::new(windows.io.clone()),
            mmio32: Allocator::new(windows.mmio32.clone()),
            mmio64: Allocator::new(windows.mmio64.clone()),
        };
        let root = Arc::new(Self {
            bus: Arc::downgrade(bus),
            lines,
            windows,
            room: Mutex::new(room),
            functions: RwLock::default(),
            address: AtomicU32::new(0),
            reset_control: RwLock::new(None),
        });
        bus.mmio.insert(ECAM_BASE, ECAM_SIZE, Arc::new(Ecam(root.clone())))?;
        bus.pio.insert(CONFIG_ADDRESS, 8, Arc::new(Mechanism1(root.clone())))?;
        root.insert(HOST_BRIDGE, Arc::new(IdentityFunction::new(host_bridge().build())))?;
        root.insert(ICH9_LPC, Arc::new(IdentityFunction::new(ich9_lpc().build())))?;
        Ok(root)
    }

    /// The windows that BARs are assigned from.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// The reset control register (port CF9, offset 0 of `device`) lies within the ports of mechanism 1:
    /// byte accesses to it go there.
    pub fn set_reset_control(&self, device: Arc<dyn BusDevice>) {
        *self.reset_control.write().unwrap_or_else(|e| e.into_inner()) = Some(device);
    }

    /// Plugs a function in and assigns its BARs; returns where it is.
    pub fn add(&self, slot: Slot, function: Arc<dyn Function>) -> Result<Bdf, Error> {
        let at = match slot {
            Slot::At(at) if at.bus != 0 || at.device >= SLOTS || at.function >= 8 => {
                return Err(Error::Slot(at));
            }
            Slot::At(at) => at,
            Slot::FirstFree => self.first_free().ok_or(Error::NoSlot)?,
        };
        self.insert(at, function)?;
        Ok(at)
    }

    fn first_free(&self) -> Option<Bdf> {
        let functions = self.functions.read().unwrap_or_else(|e| e.into_inner());
        (1..SLOTS)
            .find(|device| !functions.keys().any(|at| at.bus == 0 && at.device == *device))
            .map(Bdf::on_root)
    }

    fn insert(&self, at: Bdf, function: Arc<dyn Function>) -> Result<(), Error> {
        let bus = self.bus.upgrade().ok_or(Error::Slot(at))?;
        let mut functions = self.functions.write().unwrap_or_else(|e| e.into_inner());
        if functions.contains_key(&at) {
            return Err(Error::Slot(at));
        }
        let mut room = self.room.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(error) = function.endpoint().attach(at, &bus, &self.lines, &mut room) {
            function.endpoint().detach(&mut room);
            return Err(error);
        }
        functions.insert(at, function);
        Ok(())
    }

    /// Puts another function at a place that is taken (a chipset function with live registers).
    pub fn replace(&self, at: Bdf, function: Arc<dyn Function>) -> Result<(), Error> {
        self.remove(at);
        self.insert(at, function)
    }

    /// Takes a function out: its BARs answer no more, its interrupt line is released, its threads end.
    pub fn remove(&self, at: Bdf) -> Option<Arc<dyn Function>> {
        let function = {
            let mut functions = self.functions.write().unwrap_or_else(|e| e.into_inner());
            functions.remove(&at)?
        };
        function.endpoint().detach(&mut self.room.lock().unwrap_or_else(|e| e.into_inner()));
        function.removed();
        Some(function)
    }

    /// Takes everything out, when the machine ends: breaks the circle of VM, bus and devices.
    pub fn remove_all(&self) {
        for (at, _) in self.functions() {
            self.remove(at);
        }
    }

    /// All functions, by place.
    pub fn functions(&self) -> Vec<(Bdf, Arc<dyn Function>)> {
        let functions = self.functions.read().unwrap_or_else(|e| e.into_inner());
        functions.iter().map(|(at, function)| (*at, function.clone())).collect()
    }

    /// The machine was reset: the latch and every function.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        for (_, function) in self.functions() {
            function.reset();
        }
    }

    /// The latch behind port CF8, to be saved.
    pub fn config_address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets the latch behind port CF8, as saved.
    pub fn set_config_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    fn find(&self, at: Bdf) -> Option<Arc<dyn Function>> {
        self.functions.read().unwrap_or_else(|e| e.into_inner()).get(&at).cloned()
    }

    /// Reads configuration space; ones where no function is.
    pub fn config_read(&self, at: Bdf, offset: usize, data: &mut [u8]) {
        match self.find(at) {
            Some(function) => {
                for (at, part) in dwords(offset, data.len()) {
                    function.config_read(at, &mut data[part]);
                }
            }
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space.
    pub fn config_write(&self, at: Bdf, offset: usize, data: &[u8]) {
        if let Some(function) = self.find(at) {
            for (at, part) in dwords(offset, data.len()) {
                function.config_write(at, &data[part]);
            }
        }
    }
}

/// Splits an access at dword borders: the offset of each part, and which bytes it has.
fn dwords(offset: usize, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let at = offset + done;
            let start = done;
            done = len.min(start + 4 - at % 4);
            (at, start..done)
        })
    })
}

struct Ecam(Arc<Root>);

impl Ecam {
    fn target(offset: u64) -> (Bdf, usize) {
        let at = Bdf {
            bus: (offset >> 20) as u8,
            device: (offset >> 15) as u8 & 31,
            function: (offset >> 12) as u8 & 7,
        };
        (at, offset as usize & 0xfff)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (at, register) = Self::target(offset);
        self.0.config_read(at, register, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let (at, register) = Self::target(offset);
        self.0.config_write(at, register, data);
    }
}

struct Mechanism1(Arc<Root>);

impl Mechanism1 {
    /// The place of the data window, if the latch enables it.
    fn target(&self, offset: u64) -> Option<(Bdf, usize)> {
        let address = self.0.config_address();
        let at = Bdf {
            bus: (address >> 16) as u8,
            device: (address >> 11) as u8 & 31,
            function: (address >> 8) as u8 & 7,
        };
        let register = (address & 0xfc) as usize + (offset & 3) as usize;
        (address & ENABLE != 0).then_some((at, register))
    }

    /// Whether an access is one to the reset control register, and who has it.
    fn reset_control(&self, offset: u64, len: usize) -> Option<Arc<dyn BusDevice>> {
        if offset != 1 || len != 1 {
            return None;
        }
        self.0.reset_control.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl BusDevice for Mechanism1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match offset {
            0 if data.len() == 4 => {
                data.copy_from_slice(&self.0.config_address().to_le_bytes());
            }
            0..4 => {
                if let Some(device) = self.reset_control(offset, data.len()) {
                    device.read(0, data);
                }
            }
            _ => {
                if let Some((at, register)) = self.target(offset) {
                    self.0.config_read(at, register, data);
                }
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Only a dword write reaches the latch; others are for the ports below it.
            (0, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]);
                self.0.set_config_address(address & 0x80ff_fffc);
            }
            (0..4, _) => {
                if let Some(device) = self.reset_control(offset, data.len()) {
                    device.write(0, data);
                }
            }
            _ => {
                if let Some((at, register)) = self.target(offset) {
                    self.0.config_write(at, register, data);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
