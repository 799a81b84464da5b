//! Descriptor chains: what the driver offers in one request, checked as a whole before any of it is used.
//!
//! ```text
//!   head -> descriptor -> descriptor -> ... (queue's table)
//!              |  INDIRECT
//!              +-> table of descriptors, the rest of the chain; not nested
//!
//!   Chain { readable: [segments the device reads], writable: [segments it writes] }, in this order
//! ```
//!
//! VIRTIO 1.2, sections 2.7.4 to 2.7.5. Each descriptor is read once; later changes by the guest have
//! no effect on what was checked.

use lodge_memory::GuestMemory;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use crate::dma::Segment;
pub(super) use crate::dma::{host, length, slice, wrote};

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What a driver may not do with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A head or next index is outside of its table.
    #[error("a descriptor index is outside of its table")]
    Index,
    /// The chain has more descriptors than its table: it is a loop.
    #[error("the chain loops")]
    Loop,
    /// The chain describes 4 GiB or more.
    #[error("the chain is longer than 2^32 bytes")]
    TooLong,
    /// A buffer or table is not in RAM.
    #[error("a buffer or table is outside of RAM")]
    Address,
    /// A readable buffer follows a writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect descriptor was not negotiated, is nested, has a successor, or an odd size.
    #[error("an indirect descriptor is not allowed here or has a bad size")]
    Indirect,
    /// The request has no room for what every request of the device has (header, status).
    #[error("the request is too short")]
    Request,
    /// The available index runs ahead by more than the queue's size, or the rings cannot be read.
    #[error("the available ring is not sane")]
    Ring,
}

/// One request of the driver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// The head's index, which goes into the used ring.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
}

/// A descriptor table: the queue's own, or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    gpa: u64,
    entries: u32,
}

impl Table {
    fn get(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, Malformed> {
        if u32::from(index) >= self.entries {
            return Err(Malformed::Index);
        }
        let at = self.gpa.checked_add(DESCRIPTOR * u64::from(index)).ok_or(Malformed::Address)?;
        memory.read_obj(GuestAddress(at)).map_err(|_| Malformed::Address)
    }

    fn indirect(memory: &GuestMemory, descriptor: &Descriptor) -> Result<Self, Malformed> {
        let bytes = u64::from(descriptor.len());
        let entries = bytes / DESCRIPTOR;
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR) || entries > 1 << 16 {
            return Err(Malformed::Indirect);
        }
        if !memory.check_range(descriptor.addr(), bytes as usize) {
            return Err(Malformed::Address);
        }
        Ok(Self { gpa: descriptor.addr().0, entries: entries as u32 })
    }
}

impl Chain {
    /// Walks the chain that begins at `head` of the table at `table` with `size` entries.
    pub fn walk(
        memory: &GuestMemory,
        table: u64,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<Self, Malformed> {
        let mut chain = Self { head, ..Self::default() };
        let mut table = Table { gpa: table, entries: size.into() };
        let (mut index, mut seen, mut total, mut nested) = (head, 0u32, 0u64, false);
        loop {
            let descriptor = table.get(memory, index)?;
            seen += 1;
            if seen > table.entries {
                return Err(Malformed::Loop);
            }
            let flags = descriptor.flags();
            if flags & INDIRECT != 0 {
                if nested || !indirect || flags & NEXT != 0 {
                    return Err(Malformed::Indirect);
                }
                table = Table::indirect(memory, &descriptor)?;
                (index, seen, nested) = (0, 0, true);
                continue;
            }
            total += u64::from(descriptor.len());
            if total > u64::from(u32::MAX) {
                return Err(Malformed::TooLong);
            }
            chain.push(memory, &descriptor)?;
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), Malformed> {
        let writable = descriptor.flags() & WRITE != 0;
        if !writable && !self.writable.is_empty() {
            return Err(Malformed::Order);
        }
        if descriptor.len() == 0 {
            return Ok(());
        }
        if !memory.check_range(descriptor.addr(), descriptor.len() as usize) {
            return Err(Malformed::Address);
        }
        let segment = Segment { gpa: descriptor.addr().0, len: descriptor.len() };
        if writable { &mut self.writable } else { &mut self.readable }.push(segment);
        Ok(())
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        length(&self.readable)
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        length(&self.writable)
    }

    /// Reads from the readable part, `offset` bytes from its start; returns how many bytes there were.
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in slice(&self.readable, offset, data.len() as u64) {
            let part = &mut data[done..done + piece.len as usize];
            if memory.read_slice(part, GuestAddress(piece.gpa)).is_err() {
                break; // Checked when the chain was walked; RAM does not go away.
            }
            done += part.len();
        }
        done
    }

    /// Writes to the writable part, `offset` bytes from its start; returns how many bytes fitted.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for piece in slice(&self.writable, offset, data.len() as u64) {
            let part = &data[done..done + piece.len as usize];
            if memory.write_slice(part, GuestAddress(piece.gpa)).is_err() {
                break; // Checked when the chain was walked; RAM does not go away.
            }
            done += part.len();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_memory::{RamLayout, allocate, page_table};
    use std::sync::Arc;

    const TABLE: u64 = 0x1000;

    fn ram() -> Arc<GuestMemory> {
        allocate(&RamLayout::new(1 << 20).unwrap()).unwrap()
    }

    fn put(
        memory: &GuestMemory,
        table: u64,
        index: u64,
        (gpa, len, flags, next): (u64, u32, u16, u16),
    ) {
        let descriptor = Descriptor::new(gpa, len, flags, next);
        memory.write_obj(descriptor, GuestAddress(table + 16 * index)).unwrap();
    }

    fn walk(
        memory: &GuestMemory,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> Result<Chain, Malformed> {
        for (index, descriptor) in descriptors.iter().enumerate() {
            put(memory, TABLE, index as u64, *descriptor);
        }
        Chain::walk(memory, TABLE, 4, 0, true)
    }

    #[test]
    fn readable_then_writable() {
        let memory = ram();
        let chain = walk(
            &memory,
            &[
                (0x2000, 16, NEXT, 2),
                (0, 0, 0, 0),
                (0x3000, 8, NEXT | WRITE, 3),
                (0x4000, 0, WRITE, 0),
            ],
        )
        .unwrap();
        assert_eq!(chain.readable, [Segment { gpa: 0x2000, len: 16 }]);
        assert_eq!(chain.writable, [Segment { gpa: 0x3000, len: 8 }], "empty buffers are left out");
        assert_eq!(chain.write(&memory, 6, &[1, 2, 3]), 2);
        assert_eq!(chain.write(&memory, 8, &[1, 2, 3]), 0);
        let mut data = [9; 4];
        assert_eq!(chain.read(&memory, 14, &mut data), 2);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3006)).unwrap(), 0x0201);
    }

    #[test]
    fn malformed_chains_are_refused() {
        let memory = ram();
        for (descriptors, expected) in [
            (vec![(0x2000, 16, NEXT, 0)], Malformed::Loop),
            (vec![(0x2000, 16, NEXT, 1), (0x2000, 16, NEXT, 0)], Malformed::Loop),
            (vec![(0x2000, 16, NEXT, 4)], Malformed::Index),
            (vec![(0xffff8, 16, 0, 0)], Malformed::Address),
            (vec![(u64::MAX - 3, 16, 0, 0)], Malformed::Address),
            (vec![(0x2000, 16, NEXT | WRITE, 1), (0x3000, 1, 0, 0)], Malformed::Order),
            (vec![(0, 1 << 20, NEXT, 1), (0, u32::MAX, 0, 0)], Malformed::TooLong),
            (vec![(0x2000, 15, INDIRECT, 0)], Malformed::Indirect),
            (vec![(0x2000, 0, INDIRECT, 0)], Malformed::Indirect),
            (vec![(0x2000, 16, INDIRECT | NEXT, 1)], Malformed::Indirect),
            (vec![(0xffff8, 32, INDIRECT, 0)], Malformed::Address),
            (vec![(0x2000, 0xffff_fff0, INDIRECT, 0)], Malformed::Indirect),
        ] {
            assert_eq!(walk(&memory, &descriptors), Err(expected), "{descriptors:?}");
        }
        assert_eq!(Chain::walk(&memory, TABLE, 4, 4, true), Err(Malformed::Index));
        assert_eq!(Chain::walk(&memory, u64::MAX - 15, 4, 1, true), Err(Malformed::Address));
    }

    #[test]
    fn indirect_tables_are_bounded_and_not_nested() {
        let memory = ram();
        let indirect = [(0x2000, 32, INDIRECT, 0)];
        put(&memory, 0x2000, 0, (0x3000, 4, NEXT, 1));
        put(&memory, 0x2000, 1, (0x4000, 4, WRITE, 0));
        let chain = walk(&memory, &indirect).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (4, 4));
        assert_eq!(Chain::walk(&memory, TABLE, 4, 0, false), Err(Malformed::Indirect));
        put(&memory, 0x2000, 1, (0x4000, 4, NEXT, 0));
        assert_eq!(walk(&memory, &indirect), Err(Malformed::Loop));
        put(&memory, 0x2000, 1, (0x4000, 4, NEXT, 2));
        assert_eq!(walk(&memory, &indirect), Err(Malformed::Index));
        put(&memory, 0x2000, 1, (0x2000, 16, INDIRECT, 0));
        assert_eq!(walk(&memory, &indirect), Err(Malformed::Indirect));
    }

    #[test]
    fn writes_past_vm_memory_are_marked() {
        let memory = ram();
        let segments = [Segment { gpa: 0x2ff0, len: 0x20 }, Segment { gpa: 0x8000, len: 0x1000 }];
        let pieces: Vec<_> = slice(&segments, 0x10, 0x20).collect();
        assert_eq!(
            pieces,
            [Segment { gpa: 0x3000, len: 0x10 }, Segment { gpa: 0x8000, len: 0x10 }]
        );
        let table = page_table(memory.iter().next().unwrap());
        table.take_dirty();
        wrote(&memory, &segments, 0x20);
        assert_eq!(table.take_dirty()[0], 0b1100);
        assert_eq!(host(&memory, segments.into_iter(), |_, len| len), Some(vec![0x20, 0x1000]));
    }
}
