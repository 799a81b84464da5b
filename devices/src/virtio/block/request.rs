//! What a driver asks of a block device, read from a chain and checked.
//!
//! ```text
//!   readable: type u32, reserved u32, sector u64 | data to write, or ranges
//!   writable: data that is read, or the id       | status u8
//! ```
//!
//! VIRTIO 1.2, section 5.2.6. How the driver cuts this into descriptors does not matter.

use lodge_disk::{Buffer, Op};
use lodge_memory::GuestMemory;

use super::super::Chain;
use super::super::chain::{host, slice};
use super::{RANGE_SECTORS, SECTOR};

/// Bytes of the header.
const HEADER: u64 = 16;
/// Bytes of the serial number.
pub(super) const ID_BYTES: usize = 20;
/// Host buffers of one request at most (the kernel's IOV_MAX).
const MOST_BUFFERS: usize = 1024;
/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Flag of a range: the space may be given back.
const UNMAP: u32 = 1;

/// The status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What has to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Something for the disk.
    Disk(Op),
    /// The serial number.
    Id,
    /// Nothing; this is the answer.
    Done(Status),
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of the disk.
    pub size: u64,
    pub read_only: bool,
    pub discard: bool,
}

impl Limits {
    /// The byte offset of a range of `len` bytes at `sector`, if the disk has it.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        (len.is_multiple_of(SECTOR) && offset.checked_add(len)? <= self.size).then_some(offset)
    }
}

/// Reads a request. `None`: header or status byte are missing, so that it cannot even be refused.
pub(super) fn parse(memory: &GuestMemory, chain: &Chain, limits: Limits) -> Option<Work> {
    let mut header = [0; HEADER as usize];
    if chain.read(memory, 0, &mut header) < header.len() || chain.writable_len() == 0 {
        return None;
    }
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let work = match u32::from_le_bytes([a, b, c, d]) {
        IN => read(memory, chain, limits, sector),
        OUT if limits.read_only => None,
        OUT => write(memory, chain, limits, sector),
        FLUSH => Some(Work::Disk(Op::Flush)),
        GET_ID => Some(Work::Id),
        kind @ (DISCARD | WRITE_ZEROES) if !limits.read_only => {
            range(memory, chain, limits, kind == DISCARD)
        }
        DISCARD | WRITE_ZEROES => None,
        _ => Some(Work::Done(Status::Unsupported)),
    };
    Some(work.unwrap_or(Work::Done(Status::IoError)))
}

fn read(memory: &GuestMemory, chain: &Chain, limits: Limits, sector: u64) -> Option<Work> {
    let len = chain.writable_len() - 1;
    let offset = limits.offset(sector, len)?;
    let buffers = host(memory, slice(&chain.writable, 0, len), |ptr, len| Buffer { ptr, len })?;
    data(buffers, |buffers| Op::Read { offset, buffers })
}

fn write(memory: &GuestMemory, chain: &Chain, limits: Limits, sector: u64) -> Option<Work> {
    let len = chain.readable_len() - HEADER;
    let offset = limits.offset(sector, len)?;
    let buffers =
        host(memory, slice(&chain.readable, HEADER, len), |ptr, len| Buffer { ptr, len })?;
    data(buffers, |buffers| Op::Write { offset, buffers })
}

fn data(buffers: Vec<Buffer>, op: impl FnOnce(Vec<Buffer>) -> Op) -> Option<Work> {
    match buffers.len() {
        0 => Some(Work::Done(Status::Ok)),
        1..=MOST_BUFFERS => Some(Work::Disk(op(buffers))),
        _ => None,
    }
}

/// Discard and write zeroes: one range, as the configuration says.
fn range(memory: &GuestMemory, chain: &Chain, limits: Limits, discard: bool) -> Option<Work> {
    let mut segment = [0; 16];
    if chain.readable_len() != HEADER + 16 || chain.read(memory, HEADER, &mut segment) < 16 {
        return None;
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    // A discard has no flags; unknown ones are unsupported, not wrong.
    if flags & !UNMAP != 0 || discard && (flags != 0 || !limits.discard) {
        return Some(Work::Done(Status::Unsupported));
    }
    if sectors > RANGE_SECTORS {
        return None;
    }
    let len = u64::from(sectors) * SECTOR;
    let offset = limits.offset(sector, len)?;
    Some(match (len, discard) {
        (0, _) => Work::Done(Status::Ok),
        (_, true) => Work::Disk(Op::Discard { offset, len }),
        (_, false) => Work::Disk(Op::WriteZeroes { offset, len, unmap: flags & UNMAP != 0 }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Segment;
    use lodge_memory::{RamLayout, allocate};
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    const LIMITS: Limits = Limits { size: 16 * SECTOR, read_only: false, discard: true };

    fn ask(kind: u32, sector: u64, more: &[u8], writable: u32, limits: Limits) -> Option<Work> {
        let memory: Arc<GuestMemory> = allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(more);
        memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
        let segments = |gpa, len| if len > 0 { vec![Segment { gpa, len }] } else { vec![] };
        let chain = Chain {
            head: 0,
            readable: segments(0x1000, bytes.len() as u32),
            writable: segments(0x8000, writable),
        };
        parse(&memory, &chain, limits)
    }

    fn range_bytes(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    const ERROR: Option<Work> = Some(Work::Done(Status::IoError));
    const UNSUPPORTED: Option<Work> = Some(Work::Done(Status::Unsupported));

    #[test]
    fn reads_and_writes_stay_on_the_disk() {
        let Some(Work::Disk(Op::Read { offset, buffers })) = ask(IN, 3, &[], 1025, LIMITS) else {
            panic!("a read");
        };
        assert_eq!((offset, buffers.len(), buffers[0].len), (1536, 1, 1024));
        assert_eq!(ask(IN, 15, &[], 1025, LIMITS), ERROR);
        assert_eq!(ask(IN, u64::MAX, &[], 513, LIMITS), ERROR);
        assert_eq!(ask(IN, 0, &[], 514, LIMITS), ERROR, "half a sector");
        assert_eq!(ask(IN, 0, &[], 1, LIMITS), Some(Work::Done(Status::Ok)));
        assert!(matches!(
            ask(OUT, 15, &[1; 512], 1, LIMITS),
            Some(Work::Disk(Op::Write { offset: 7680, .. }))
        ));
        assert_eq!(ask(OUT, 16, &[1; 512], 1, LIMITS), ERROR);
        assert_eq!(ask(OUT, 0, &[1; 512], 1, Limits { read_only: true, ..LIMITS }), ERROR);
    }

    #[test]
    fn ranges_are_checked() {
        let op = |kind, bytes: &[u8], limits| ask(kind, 0, bytes, 1, limits);
        assert_eq!(
            op(DISCARD, &range_bytes(8, 8, 0), LIMITS),
            Some(Work::Disk(Op::Discard { offset: 4096, len: 4096 }))
        );
        assert_eq!(
            op(WRITE_ZEROES, &range_bytes(0, 1, 1), LIMITS),
            Some(Work::Disk(Op::WriteZeroes { offset: 0, len: 512, unmap: true }))
        );
        assert_eq!(op(DISCARD, &range_bytes(8, 9, 0), LIMITS), ERROR);
        assert_eq!(op(DISCARD, &range_bytes(0, u32::MAX, 0), LIMITS), ERROR);
        assert_eq!(op(DISCARD, &range_bytes(0, 1, 1), LIMITS), UNSUPPORTED);
        assert_eq!(op(WRITE_ZEROES, &range_bytes(0, 1, 2), LIMITS), UNSUPPORTED);
        assert_eq!(op(DISCARD, &[0; 15], LIMITS), ERROR);
        assert_eq!(op(DISCARD, &[0; 32], LIMITS), ERROR);
        let fixed = Limits { discard: false, ..LIMITS };
        assert_eq!(op(DISCARD, &range_bytes(0, 1, 0), fixed), UNSUPPORTED);
        assert_eq!(op(WRITE_ZEROES, &range_bytes(0, 0, 0), LIMITS), Some(Work::Done(Status::Ok)));
    }

    #[test]
    fn a_request_without_header_or_status_has_no_answer() {
        assert_eq!(ask(99, 0, &[], 1, LIMITS), UNSUPPORTED);
        assert_eq!(ask(FLUSH, 0, &[], 0, LIMITS), None);
        let memory = allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
        let short = Chain {
            head: 0,
            readable: vec![Segment { gpa: 0, len: 15 }],
            writable: vec![Segment { gpa: 64, len: 1 }],
        };
        assert_eq!(parse(&memory, &short, LIMITS), None);
    }
}
