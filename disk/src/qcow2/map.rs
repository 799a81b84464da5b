//! Where a guest's cluster is: the L1 table, and those L2 tables that are in memory.
//!
//! ```text
//!  guest offset:  [ L1 index | L2 index | offset in cluster ]
//!  L1 entry ──> L2 table ──> L2 entry ──> cluster in the file
//! ```
//!
//! Queues read all of this in parallel with no help of anybody; only the metadata's owner changes it.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::corrupt;
use super::header::Header;

/// Bits 9 to 55: an offset in the file.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Nobody else refers to this cluster: it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3).
pub(super) const ZERO: u64 = 1;

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Look in the backing file; zeroes without one.
    Unallocated,
    /// Zeroes. A cluster may be reserved for it all the same, at this offset.
    Zero(Option<u64>),
    /// At this offset; to be written in place only if `ours`.
    Data { offset: u64, ours: bool },
    /// Deflated, `len` bytes at most from `offset` on.
    Compressed { offset: u64, len: usize },
}

/// The numbers that the layout follows from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) cluster_bits: u32,
    pub(super) version: u32,
    /// Guest disk in bytes.
    pub(super) size: u64,
}

impl Geometry {
    pub(super) fn of(header: &Header) -> Self {
        let Header { cluster_bits, version, size, .. } = *header;
        Self { cluster_bits, version, size }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(super) fn table_len(&self) -> usize {
        1 << (self.cluster_bits - 3)
    }

    /// L1 and L2 index of a guest offset, which is within the disk.
    pub(super) fn indices(&self, offset: u64) -> (usize, usize) {
        let cluster = offset >> self.cluster_bits;
        let l1 = cluster >> (self.cluster_bits - 3);
        (l1 as usize, cluster as usize & (self.table_len() - 1))
    }

    /// Reads an L2 entry. `limit` is the end of the file: nothing can be beyond it.
    pub(super) fn decode(&self, entry: u64, limit: u64) -> io::Result<Cluster> {
        if entry & COMPRESSED != 0 {
            // "Compressed Clusters Descriptor": sector count above the offset.
            let shift = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << shift) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> shift;
            let len = (sectors + 1) * 512 - offset % 512;
            if offset >= limit {
                return Err(corrupt("a compressed cluster beyond the file's end"));
            }
            return Ok(Cluster::Compressed { offset, len: len as usize });
        }
        let offset = entry & OFFSET_MASK;
        if !offset.is_multiple_of(self.cluster_size())
            || offset.saturating_add(self.cluster_size()) > limit
        {
            return Err(corrupt("a cluster where none can be"));
        }
        let at = (offset != 0).then_some(offset);
        match (entry & ZERO != 0, at) {
            (true, _) if self.version < 3 => Err(corrupt("a zero cluster in version 2")),
            (true, at) => Ok(Cluster::Zero(at)),
            (false, None) => Ok(Cluster::Unallocated),
            (false, Some(offset)) => Ok(Cluster::Data { offset, ours: entry & COPIED != 0 }),
        }
    }
}

/// An L2 table in memory.
#[derive(Debug)]
pub(super) struct Table {
    entries: Box<[AtomicU64]>,
    used: AtomicBool,
}

impl Table {
    /// From the bytes of the file.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let entries = bytes.as_chunks().0.iter().map(|b| AtomicU64::new(u64::from_be_bytes(*b)));
        Self { entries: entries.collect(), used: AtomicBool::new(true) }
    }

    pub(super) fn get(&self, index: usize) -> u64 {
        self.entries[index].load(Ordering::Acquire)
    }

    /// Only the owner calls it.
    pub(super) fn set(&self, index: usize, entry: u64) {
        self.entries[index].store(entry, Ordering::Release);
    }

    /// Some of the entries as bytes of the file.
    pub(super) fn bytes(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        range.flat_map(|i| self.get(i).to_be_bytes()).collect()
    }
}

/// What a look at the map found.
#[derive(Debug)]
pub(super) enum Found {
    /// There is no table: all of its clusters are unallocated.
    Nothing,
    /// The table.
    Table(Arc<Table>),
    /// It must be loaded first, from this offset.
    NotLoaded(u64),
}

/// The tables of one image.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) geometry: Geometry,
    l1: Box<[AtomicU64]>,
    tables: RwLock<HashMap<usize, Arc<Table>>>,
    /// End of the file, rounded up to clusters; it grows when clusters are allocated.
    limit: AtomicU64,
}

impl Map {
    pub(super) fn new(geometry: Geometry, l1: &[u64], file_len: u64) -> Self {
        let limit = file_len.next_multiple_of(geometry.cluster_size());
        Self {
            geometry,
            l1: l1.iter().map(|&e| AtomicU64::new(e)).collect(),
            tables: RwLock::default(),
            limit: AtomicU64::new(limit),
        }
    }

    /// The L1 entry; 0 for one that is not there.
    pub(super) fn l1(&self, index: usize) -> u64 {
        self.l1.get(index).map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// Only the owner calls it, with an index that exists.
    pub(super) fn set_l1(&self, index: usize, entry: u64) {
        self.l1[index].store(entry, Ordering::Release);
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Acquire)
    }

    pub(super) fn raise_limit(&self, to: u64) {
        self.limit.fetch_max(to, Ordering::AcqRel);
    }

    pub(super) fn table(&self, index: usize) -> Found {
        match self.l1(index) & OFFSET_MASK {
            0 => Found::Nothing,
            offset => {
                let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
                match tables.get(&index) {
                    Some(table) => {
                        table.used.store(true, Ordering::Relaxed);
                        Found::Table(table.clone())
                    }
                    None => Found::NotLoaded(offset),
                }
            }
        }
    }

    pub(super) fn insert(&self, index: usize, table: Table) -> Arc<Table> {
        let table = Arc::new(table);
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.insert(index, table.clone());
        table
    }

    /// Forgets tables that were not used lately, when there are more than `most`. Those that `keep` tells (they
    /// differ from the file) stay. A queue that still looks at one sees what was true when it began.
    pub(super) fn trim(&self, most: usize, keep: impl Fn(usize) -> bool) {
        if self.tables.read().unwrap_or_else(PoisonError::into_inner).len() <= most {
            return;
        }
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|&i, t| t.used.swap(false, Ordering::Relaxed) || keep(i));
        let mut surplus = tables.len().saturating_sub(most);
        tables.retain(|&i, _| {
            let drop = surplus > 0 && !keep(i);
            surplus -= usize::from(drop);
            !drop
        });
    }

    /// Where the guest's bytes from `offset` on can be written in place: `None` when the owner is needed.
    pub(super) fn in_place(&self, offset: u64, len: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (l1, mut l2) = self.geometry.indices(at);
            let Found::Table(table) = self.table(l1) else { return Ok(None) };
            while at < end && l2 < self.geometry.table_len() {
                let within = at % self.geometry.cluster_size();
                let n = (self.geometry.cluster_size() - within).min(end - at);
                let cluster = self.geometry.decode(table.get(l2), self.limit())?;
                let Cluster::Data { offset: host, ours: true } = cluster else { return Ok(None) };
                match out.last_mut() {
                    Some((start, len)) if *start + *len == host + within => *len += n,
                    _ => out.push((host + within, n)),
                }
                at += n;
                l2 += 1;
            }
        }
        Ok(Some(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { cluster_bits: 16, version: 3, size: 1 << 32 };

    #[test]
    fn entries_are_read_as_the_format_says() {
        let decode = |entry| GEOMETRY.decode(entry, 1 << 40);
        assert_eq!(decode(0).unwrap(), Cluster::Unallocated);
        assert_eq!(decode(1).unwrap(), Cluster::Zero(None));
        assert_eq!(decode(0x5_0001).unwrap(), Cluster::Zero(Some(0x5_0000)));
        let data = |ours| Cluster::Data { offset: 0x5_0000, ours };
        assert_eq!(decode(0x5_0000).unwrap(), data(false));
        assert_eq!(decode(0x5_0000 | COPIED).unwrap(), data(true));
        // 8 bits of sectors from bit 54 on.
        let entry = COMPRESSED | 3 << 54 | 0x12_3456;
        let len = 4 * 512 - 0x56;
        assert_eq!(decode(entry).unwrap(), Cluster::Compressed { offset: 0x12_3456, len });
        assert!(decode(0x5_0200).is_err(), "not at a cluster");
        assert!(decode(1 << 40).is_err(), "beyond the file");
        assert!(Geometry { version: 2, ..GEOMETRY }.decode(1, 1 << 40).is_err());
        for i in 0..64 {
            for j in 0..64 {
                for bits in 9..=21 {
                    let geometry = Geometry { cluster_bits: bits, ..GEOMETRY };
                    let _ = geometry.decode(1 << i | 1 << j, u64::MAX);
                }
            }
        }
    }

    #[test]
    fn clusters_in_a_row_are_one_piece() {
        let map = Map::new(GEOMETRY, &[0x3_0000 | COPIED, 0], 0x100_0000);
        assert!(map.in_place(0, 4096).unwrap().is_none(), "not loaded");
        let table = Table::parse(&[0; 65536]);
        for (i, at) in [0x10_0000, 0x11_0000, 0x20_0000].into_iter().enumerate() {
            table.set(i, at | COPIED);
        }
        map.insert(0, table);
        let pieces = map.in_place(0x8000, 0x2_0000).unwrap().unwrap();
        assert_eq!(pieces, [(0x10_8000, 0x1_8000), (0x20_0000, 0x8000)]);
        assert!(map.in_place(0x2_0000, 0x1_0001).unwrap().is_none(), "one is unallocated");
        map.trim(0, |_| false);
        map.trim(0, |_| false);
        assert!(matches!(map.table(0), Found::NotLoaded(0x3_0000)));
        assert!(matches!(map.table(1), Found::Nothing));
    }
}
