//! The common configuration structure: what each register reads as and what a write to it does.
//!
//! VIRTIO 1.2, section 4.1.4.3.

use serde::{Deserialize, Serialize};

use super::super::QueueState;

/// Offsets of the registers.
pub(super) mod reg {
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
    pub const QUEUE_NOTIFY_DATA: u64 = 56;
    /// Bytes of the structure.
    pub const END: usize = 60;
}

/// One queue's registers, and where it stands while it does not run; also as saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The largest size the device allows; 0: the queue does not exist.
    pub max_size: u16,
    /// The size the driver chose.
    pub size: u16,
    /// The driver enabled the queue.
    pub enabled: bool,
    /// MSI-X vector (FFFFH: none).
    pub vector: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
    /// Where the queue goes on.
    #[serde(default)]
    pub position: QueueState,
    /// The device has it.
    #[serde(skip)]
    pub(super) running: bool,
}

impl QueueRegisters {
    /// As after reset: the size is the largest one.
    pub(super) fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, vector: super::interrupts::NO_VECTOR, ..Self::default() }
    }

    /// The driver writes the queue's size: only powers of two up to the largest are taken.
    pub(super) fn set_size(&mut self, size: u16) {
        if !self.enabled && size <= self.max_size && size.is_power_of_two() {
            self.size = size;
        }
    }

    /// The driver writes half of one of the addresses.
    pub(super) fn set_address(&mut self, offset: u64, value: u32) {
        if self.enabled {
            return;
        }
        let address = match offset & !7 {
            reg::QUEUE_DESC => &mut self.descriptors,
            reg::QUEUE_DRIVER => &mut self.driver,
            reg::QUEUE_DEVICE => &mut self.device,
            _ => return,
        };
        let shift = (offset & 4) * 8;
        *address = *address & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_up_to_the_largest() {
        let mut queue = QueueRegisters::new(256);
        for bad in [0, 3, 255, 512, 0x8000] {
            queue.set_size(bad);
            assert_eq!(queue.size, 256);
        }
        queue.set_size(64);
        assert_eq!(queue.size, 64);
        queue.enabled = true;
        queue.set_size(128);
        queue.set_address(reg::QUEUE_DESC, 0x1000);
        assert_eq!((queue.size, queue.descriptors), (64, 0));
    }

    #[test]
    fn addresses_are_written_in_halves() {
        let mut queue = QueueRegisters::new(256);
        queue.set_address(reg::QUEUE_DRIVER + 4, 0x1234);
        queue.set_address(reg::QUEUE_DRIVER, 0x8765_4320);
        assert_eq!(queue.driver, 0x1234_8765_4320);
        assert_eq!((queue.descriptors, queue.device), (0, 0));
    }
}
