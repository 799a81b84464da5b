//! A driver: finds the device's structures by its capabilities, negotiates, sets queues up.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use lodge_devices::virtio::{feature, status};
use lodge_memory::{Bus, GuestMemory};
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, wait};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Offsets in the common configuration structure.
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

/// How the driver wants its interrupts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interrupts {
    Msix,
    Intx,
}

/// Queues and what else the driver allocates lie from here on; requests have their data elsewhere.
const FIRST_PAGE: u64 = 0x40_0000;

/// A driver at work.
pub struct Driver {
    pub machine: Machine,
    pub common: u64,
    pub isr: u64,
    pub config: u64,
    notify: u64,
    notify_step: u64,
    pub features: u64,
    pub queues: Vec<Ring>,
    next_page: u64,
}

impl Driver {
    /// Maps BAR 0 and finds the structures.
    pub fn new(machine: Machine) -> Self {
        let bar = u64::from(machine.config_u32(0x10) & !0xf);
        machine.config_write(4, &[6, 0]);
        let mut at = HashMap::new();
        let mut step = 0;
        for cap in machine.capabilities(9) {
            let kind = machine.config_u8(cap + 3);
            assert_eq!(machine.config_u8(cap + 4), 0, "all in BAR 0");
            at.insert(kind, bar + u64::from(machine.config_u32(cap + 8)));
            if kind == 2 {
                step = u64::from(machine.config_u32(cap + 16));
            }
        }
        Self {
            machine,
            common: at[&1],
            notify: at[&2],
            isr: at[&3],
            config: at[&4],
            notify_step: step,
            features: 0,
            queues: Vec::new(),
            next_page: FIRST_PAGE,
        }
    }

    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut data = [0; N];
        self.machine.bus.mmio_read(gpa, &mut data);
        data
    }

    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.machine.bus.mmio_write(gpa, data);
    }

    pub fn common_u8(&self, register: u64) -> u8 {
        self.read::<1>(self.common + register)[0]
    }

    pub fn common_u16(&self, register: u64) -> u16 {
        u16::from_le_bytes(self.read(self.common + register))
    }

    pub fn common_u32(&self, register: u64) -> u32 {
        u32::from_le_bytes(self.read(self.common + register))
    }

    pub fn set_u8(&self, register: u64, value: u8) {
        self.write(self.common + register, &[value]);
    }

    pub fn set_u16(&self, register: u64, value: u16) {
        self.write(self.common + register, &value.to_le_bytes());
    }

    pub fn set_u32(&self, register: u64, value: u32) {
        self.write(self.common + register, &value.to_le_bytes());
    }

    pub fn status(&self) -> u8 {
        self.common_u8(common::STATUS)
    }

    pub fn set_status(&self, value: u8) {
        self.set_u8(common::STATUS, value);
    }

    pub fn reset(&mut self) {
        self.set_status(0);
        assert_eq!(self.status(), 0, "a reset is complete when it reads as such");
        self.queues.clear();
    }

    /// Resets, and uses the RAM of the queues again.
    pub fn next_round(&mut self) {
        self.reset();
        self.next_page = FIRST_PAGE;
    }

    pub fn offered(&self) -> u64 {
        self.set_u32(common::DEVICE_FEATURE_SELECT, 0);
        let low = self.common_u32(common::DEVICE_FEATURE);
        self.set_u32(common::DEVICE_FEATURE_SELECT, 1);
        u64::from(self.common_u32(common::DEVICE_FEATURE)) << 32 | u64::from(low)
    }

    pub fn choose(&mut self, features: u64) {
        self.features = features;
        self.set_u32(common::DRIVER_FEATURE_SELECT, 0);
        self.set_u32(common::DRIVER_FEATURE, features as u32);
        self.set_u32(common::DRIVER_FEATURE_SELECT, 1);
        self.set_u32(common::DRIVER_FEATURE, (features >> 32) as u32);
    }

    /// From reset to FEATURES_OK; says whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.choose(features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// From reset to DRIVER_OK with all queues.
    pub fn start(&mut self, features: u64, interrupts: Interrupts) {
        assert!(self.negotiate(features), "the device takes its own features");
        if interrupts == Interrupts::Msix {
            self.enable_msix();
        }
        for index in 0..self.common_u16(common::NUM_QUEUES) {
            self.set_up_queue(index, 64);
        }
        self.set_status(self.status() | status::DRIVER_OK);
        assert_eq!(self.status(), 15);
    }

    /// From reset to DRIVER_OK with everything the device has, except what makes drivers differ.
    pub fn start_all(&mut self) {
        let features = self.offered();
        self.start(features, Interrupts::Msix);
    }

    /// Vector `n` (n: queue, the last one: configuration) sends data 0x40 + n.
    pub fn enable_msix(&self) {
        let cap = self.machine.capabilities(0x11)[0];
        let vectors = u64::from(self.machine.config_u16(cap + 2) & 0x7ff) + 1;
        for vector in 0..vectors {
            self.program(vector, false);
        }
        self.machine.config_write(cap + 2, &0x8000u16.to_le_bytes());
        self.set_u16(common::CONFIG_VECTOR, vectors as u16 - 1);
        assert_eq!(self.common_u16(common::CONFIG_VECTOR), vectors as u16 - 1);
    }

    fn msix(&self, register: u64) -> u64 {
        let cap = self.machine.capabilities(0x11)[0];
        let bar = u64::from(self.machine.config_u32(0x10) & !0xf);
        bar + u64::from(self.machine.config_u32(cap + register) & !7)
    }

    pub fn program(&self, vector: u64, masked: bool) {
        let entry = self.msix(4) + 16 * vector;
        self.write(entry, &0xfee0_0000u32.to_le_bytes());
        self.write(entry + 4, &[0; 4]);
        self.write(entry + 8, &(0x40 + vector as u32).to_le_bytes());
        self.write(entry + 12, &u32::from(masked).to_le_bytes());
    }

    pub fn pending(&self) -> u64 {
        u64::from_le_bytes(self.read(self.msix(8)))
    }

    /// How often the vector of `n` was sent.
    pub fn interrupts(&self, n: u32) -> usize {
        self.machine.vm.msis().iter().filter(|msi| msi.data == 0x40 + n).count()
    }

    /// A few pages of RAM that nobody else uses.
    pub fn allocate(&mut self, bytes: u64) -> u64 {
        let at = self.next_page;
        self.next_page += bytes.next_multiple_of(4096);
        assert!(self.next_page <= super::RAM, "the test has RAM left");
        at
    }

    /// Selects a queue, chooses its size and place, and enables it.
    pub fn set_up_queue(&mut self, index: u16, size: u16) {
        self.set_u16(common::QUEUE_SELECT, index);
        assert_ne!(self.common_u16(common::QUEUE_SIZE), 0);
        self.set_u16(common::QUEUE_SIZE, size);
        assert_eq!(self.common_u16(common::QUEUE_SIZE), size);
        let at = self.allocate(3 * 4096);
        let memory = self.machine.memory.clone();
        for page in 0..3 {
            memory.write_slice(&[0; 4096], GuestAddress(at + 4096 * page)).unwrap();
        }
        self.place(at, at + 4096, at + 8192);
        self.set_u16(common::QUEUE_VECTOR, index);
        assert_eq!(self.common_u16(common::QUEUE_VECTOR), index);
        let offset = u64::from(self.common_u16(common::QUEUE_NOTIFY_OFF));
        self.set_u16(common::QUEUE_ENABLE, 1);
        assert_eq!(self.common_u16(common::QUEUE_ENABLE), 1);
        self.queues.push(Ring {
            memory,
            index,
            size,
            table: at,
            avail: at + 4096,
            used: at + 8192,
            notify: self.notify + offset * self.notify_step,
            next: 0,
            seen: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        });
    }

    /// Writes the addresses of the selected queue.
    pub fn place(&self, table: u64, avail: u64, used: u64) {
        for (register, value) in [
            (common::QUEUE_DESC, table),
            (common::QUEUE_DRIVER, avail),
            (common::QUEUE_DEVICE, used),
        ] {
            self.set_u32(register, value as u32);
            self.set_u32(register + 4, (value >> 32) as u32);
        }
    }

    /// Tells the device of new chains in queue `index`.
    pub fn kick(&self, index: usize) {
        let ring = &self.queues[index];
        self.write(ring.notify, &ring.index.to_le_bytes());
    }

    /// Offers a chain, kicks, and waits for its end; returns the used length.
    pub fn ask(&mut self, index: usize, parts: &[(u64, u32, u16)]) -> u32 {
        let head = self.queues[index].add(parts);
        self.kick(index);
        let mut len = None;
        wait("a used chain", || {
            if let Some((used, bytes)) = self.queues[index].take_used() {
                assert_eq!(used, head);
                len = Some(bytes);
            }
            len.is_some()
        });
        len.unwrap()
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.machine.memory
    }

    /// The usual features: all that is offered, without index-based suppression.
    pub fn simple_features(&self) -> u64 {
        self.offered() & !feature::EVENT_IDX
    }
}

/// The driver's end of a split ring.
pub struct Ring {
    pub memory: Arc<GuestMemory>,
    pub index: u16,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    pub notify: u64,
    /// The next available index.
    pub next: u16,
    /// The next used index to look at.
    pub seen: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl Ring {
    pub fn descriptor(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Writes descriptor `index` of the table.
    pub fn set(&self, index: u16, (gpa, len, flags, next): (u64, u32, u16, u16)) {
        self.descriptor(self.table + 16 * u64::from(index), gpa, len, flags, next);
    }

    /// Free descriptors.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Offers a chain of (address, bytes, flags but NEXT); returns its head.
    pub fn add(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let indices: Vec<u16> =
            parts.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (i, &(gpa, len, flags)) in parts.iter().enumerate() {
            match indices.get(i + 1) {
                Some(&next) => self.set(indices[i], (gpa, len, flags | NEXT, next)),
                None => self.set(indices[i], (gpa, len, flags, 0)),
            }
        }
        let head = indices[0];
        assert!(self.chains.insert(head, indices).is_none());
        self.offer(head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.next % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next = self.next.wrapping_add(1);
        self.publish(self.next);
    }

    /// Writes the available index.
    pub fn publish(&self, index: u16) {
        self.memory.store(index, GuestAddress(self.avail + 2), Ordering::SeqCst).unwrap();
    }

    /// Sets the flags of the available ring (1: no interrupts).
    pub fn set_flags(&self, flags: u16) {
        self.memory.store(flags, GuestAddress(self.avail), Ordering::SeqCst).unwrap();
    }

    /// Sets the index whose use interrupts (with EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.memory.store(index, GuestAddress(at), Ordering::SeqCst).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(self.used + 2), Ordering::SeqCst).unwrap()
    }

    /// The next used chain: head and bytes written. One that was not offered fails the test.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.seen % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        let chain = self.chains.remove(&head).expect("the device used what was offered, once");
        self.free.extend(chain);
        Some((head, len))
    }

    /// As [`Ring::take_used`], with the address of the chain's first buffer in the place of its head.
    pub fn used_head(&mut self) -> Option<(u64, u32)> {
        let (head, len) = self.take_used()?;
        let at = self.table + 16 * u64::from(head);
        Some((self.memory.read_obj(GuestAddress(at)).unwrap(), len))
    }
}
