//! Where BARs may lie, and who has which part of it.
//!
//! ```text
//!   RAM | ECAM B000_0000 | 32-bit window C000_0000..FEC0_0000 | IOAPIC, LAPIC, flash | RAM | 64-bit window
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

/// I/O ports that PCI devices may be given. Ports of the chipset lie below.
pub const IO_WINDOW: Range<u64> = 0xc000..0x1_0000;
/// The 32-bit memory window: after ECAM, before the IOAPIC.
pub const MMIO32_WINDOW: Range<u64> = 0xc000_0000..0xfec0_0000;

/// Bytes of the 64-bit window, where the guest's physical addresses reach that far.
const MMIO64_BYTES: u64 = 64 << 30;
const GIB: u64 = 1 << 30;

/// The address windows of a machine's PCI bus; the source for the allocator and for ACPI's `_CRS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub mmio32: Range<u64>,
    /// Memory above RAM; empty where the guest's physical addresses do not reach.
    pub mmio64: Range<u64>,
}

impl Windows {
    /// The windows for a machine whose RAM ends at `ram_end` (exclusive) and whose CPUs have
    /// `physical_bits` of physical address.
    pub fn new(ram_end: u64, physical_bits: u8) -> Self {
        let limit = 1u64.checked_shl(physical_bits.into()).unwrap_or(u64::MAX);
        let start = ram_end.max(4 * GIB).checked_next_multiple_of(GIB).unwrap_or(limit).min(limit);
        let end = start.saturating_add(MMIO64_BYTES).min(limit);
        Self { io: IO_WINDOW, mmio32: MMIO32_WINDOW, mmio64: start..end }
    }
}

/// First-fit allocation of naturally aligned ranges in one window.
#[derive(Debug)]
pub struct Allocator {
    window: Range<u64>,
    taken: BTreeMap<u64, u64>,
}

impl Allocator {
    /// An empty allocator over `window`.
    pub fn new(window: Range<u64>) -> Self {
        Self { window, taken: BTreeMap::new() }
    }

    /// The lowest free range of `bytes` (a power of two), aligned to its size.
    pub fn allocate(&mut self, bytes: u64) -> Option<u64> {
        if !bytes.is_power_of_two() {
            return None;
        }
        let mut at = self.window.start.checked_next_multiple_of(bytes)?;
        for (&base, &len) in &self.taken {
            if at.checked_add(bytes)? <= base {
                break;
            }
            at = at.max((base + len).checked_next_multiple_of(bytes)?);
        }
        if at.checked_add(bytes)? > self.window.end {
            return None;
        }
        self.taken.insert(at, bytes);
        Some(at)
    }

    /// Gives back what [`Allocator::allocate`] returned.
    pub fn free(&mut self, base: u64) {
        self.taken.remove(&base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_64_bit_window_lies_above_ram_and_within_reach() {
        let small = Windows::new(1 << 30, 40);
        assert_eq!(small.mmio64, 4 * GIB..68 * GIB);
        let big = Windows::new(100 * GIB + 5, 40);
        assert_eq!(big.mmio64.start, 101 * GIB);
        let full = Windows::new(64 * GIB, 36);
        assert!(full.mmio64.is_empty());
        assert!(!Windows::new(1 << 30, 64).mmio64.is_empty());
    }

    #[test]
    fn ranges_are_aligned_reused_and_bounded() {
        let mut room = Allocator::new(0x1000..0x10000);
        assert_eq!(room.allocate(0x1000), Some(0x1000));
        assert_eq!(room.allocate(0x4000), Some(0x4000));
        assert_eq!(room.allocate(0x2000), Some(0x2000));
        assert_eq!(room.allocate(0x8000), Some(0x8000));
        assert_eq!(room.allocate(0x10), None);
        room.free(0x2000);
        assert_eq!(room.allocate(0x1000), Some(0x2000));
        assert_eq!(room.allocate(0x1000), Some(0x3000));
        assert_eq!(room.allocate(3), None);
        assert_eq!(Allocator::new(4 << 30..4 << 30).allocate(16), None);
    }
}
