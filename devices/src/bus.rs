//! The buses: which device answers at which port or guest-physical address.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use lodge_memory::Bus;

/// A device, or a part of one, that answers in a range of ports or addresses.
///
/// Called from vCPU threads, several at once: state is behind the device's own lock. Accesses are
/// 1, 2, 4 or 8 bytes, little-endian, at any alignment. Nothing in here may block for long.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
    /// The range now begins at `base`, or nowhere. For what is mapped into the guest as well.
    fn mapped(&self, base: Option<u64>) {
        let _ = base;
    }
}

/// Two devices want the same address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the range {base:#x}..{end:#x} overlaps one that is taken ({other:#x})")]
pub struct Overlap {
    /// First address of the range that was refused.
    pub base: u64,
    /// One past its last address.
    pub end: u64,
    /// Where the range in its way begins.
    pub other: u64,
}

struct Entry {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space: ports, or guest-physical addresses outside of RAM.
#[derive(Default)]
pub struct AddressSpace {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl AddressSpace {
    /// Lets `device` answer at `base..base + len`.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let end = base.saturating_add(len);
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        let before = ranges.range(..end).next_back();
        if let Some((&other, entry)) = before
            && other.saturating_add(entry.len) > base
        {
            return Err(Overlap { base, end, other });
        }
        ranges.insert(base, Entry { len, device: device.clone() });
        drop(ranges);
        device.mapped(Some(base));
        Ok(())
    }

    /// Takes away the range that begins at `base`; says whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        let removed = self.ranges.write().unwrap_or_else(|e| e.into_inner()).remove(&base);
        if let Some(entry) = &removed {
            entry.device.mapped(None);
        }
        removed.is_some()
    }

    /// The device at `address`, the offset into it, and how many bytes it answers from there.
    fn find(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(|e| e.into_inner());
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset < entry.len).then(|| (entry.device.clone(), offset, entry.len - offset))
    }

    /// Reads; an access that leaves a device's range goes on byte by byte, and where nobody answers the
    /// bytes are FFH.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset, left)) if left >= data.len() as u64 => device.read(offset, data),
            None if data.len() <= 1 => data.fill(0xff),
            _ if data.len() > 1 => {
                for (i, byte) in data.chunks_mut(1).enumerate() {
                    self.read(address.wrapping_add(i as u64), byte);
                }
            }
            _ => data.fill(0xff),
        }
    }

    /// Writes; split as [`AddressSpace::read`] does, and dropped where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((device, offset, left)) if left >= data.len() as u64 => device.write(offset, data),
            _ if data.len() > 1 => {
                for (i, byte) in data.chunks(1).enumerate() {
                    self.write(address.wrapping_add(i as u64), byte);
                }
            }
            _ => {}
        }
    }
}

/// The machine's two address spaces, as the accelerator's vCPUs see them.
///
/// It exists, empty, before the VM does; devices join later and come and go while it runs.
#[derive(Default)]
pub struct SystemBus {
    /// I/O ports.
    pub pio: AddressSpace,
    /// Guest-physical addresses outside of RAM.
    pub mmio: AddressSpace,
}

impl Bus for SystemBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);
    impl BusDevice for Log {
        fn read(&self, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = offset as u8 + i as u8;
            }
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn ranges_do_not_overlap_and_can_be_removed() {
        let space = AddressSpace::default();
        let log: Arc<Log> = Arc::default();
        space.insert(0x10, 8, log.clone()).unwrap();
        for (base, len) in [(0x10, 1), (0x8, 9), (0x17, 1), (0x0, 0x100)] {
            assert!(space.insert(base, len, log.clone()).is_err(), "{base:#x}+{len:#x}");
        }
        space.insert(0x18, 8, log.clone()).unwrap();
        assert!(space.remove(0x10));
        assert!(!space.remove(0x10));
        space.insert(0x10, 8, log).unwrap();
    }

    #[test]
    fn an_access_across_a_border_is_split() {
        let space = AddressSpace::default();
        let log: Arc<Log> = Arc::default();
        space.insert(0x10, 4, log.clone()).unwrap();
        let mut data = [0; 4];
        space.read(0x12, &mut data);
        assert_eq!(data, [2, 3, 0xff, 0xff]);
        space.write(0xf, &[9, 8]);
        assert_eq!(*log.0.lock().unwrap(), [(0, vec![8])]);
        space.read(0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
