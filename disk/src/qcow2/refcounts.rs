//! Which clusters of the file are taken, and how often they are referred to.
//!
//! ```text
//!   refcount table entry ──> refcount block: one count of 1 to 64 bits for each cluster of the file
//! ```
//!
//! Changes are made in memory and written by [`Refcounts::commit`]. Until then the file may say that
//! a cluster is free which is not; so nothing in the file may refer to the cluster before that.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::Range;

use super::corrupt;
use super::header::{Header, MAX_REFCOUNT_TABLE, REFCOUNT_TABLE_FIELD};
use super::metafile::MetaFile;

/// Blocks that are kept in memory, in bytes.
const CACHE: usize = 2 << 20;
/// Bits 9 to 63 of a table entry are an offset.
const BLOCK_MASK: u64 = !0x1ff;
/// Offsets must fit into the entries of L2 tables.
const MAX_OFFSET: u64 = 1 << 55;

struct Block {
    counts: Vec<u8>,
    /// Bytes that differ from the file.
    dirty: Option<Range<usize>>,
    used: bool,
}

/// The refcounts of an image that is written.
pub(super) struct Refcounts {
    cluster_bits: u32,
    order: u32,
    table: Vec<u64>,
    table_offset: u64,
    dirty_entries: BTreeSet<usize>,
    /// The table has outgrown its place; this is where it was.
    moved_from: Option<Range<u64>>,
    blocks: HashMap<usize, Block>,
    /// No cluster before this is free.
    hint: u64,
    /// No cluster from this on was ever written: they read as zeroes.
    virgin: u64,
    /// Clusters of metadata. None of them is ever given out, whatever damaged refcounts say.
    reserved: HashSet<u64>,
}

/// Clusters that were given out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) clusters: Range<u64>,
    /// They were never written and read as zeroes.
    pub(super) fresh: bool,
}

impl Refcounts {
    /// Reads the table. `metadata` are the offsets of the L2 tables.
    pub(super) fn open(
        file: &MetaFile,
        header: &Header,
        file_len: u64,
        metadata: impl Iterator<Item = u64>,
    ) -> io::Result<Self> {
        let bits = header.cluster_bits;
        let mut bytes = vec![0; (header.refcount_table_clusters as usize) << bits];
        file.read(&mut bytes, header.refcount_table_offset)?;
        let table: Vec<u64> = bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
        let virgin = file_len.div_ceil(1 << bits);
        let mut this = Self {
            cluster_bits: bits,
            order: header.refcount_order,
            table_offset: header.refcount_table_offset,
            table,
            dirty_entries: BTreeSet::new(),
            moved_from: None,
            blocks: HashMap::new(),
            hint: 0,
            virgin,
            reserved: HashSet::from([0]),
        };
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let tables =
            [(header.refcount_table_offset, bytes.len() as u64), (header.l1_offset, l1_bytes)];
        for (offset, len) in tables {
            for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
                this.reserve(cluster)?;
            }
        }
        let blocks: Vec<u64> =
            this.table.iter().map(|e| e & BLOCK_MASK).filter(|&e| e != 0).collect();
        for offset in blocks.into_iter().chain(metadata) {
            if offset % (1 << bits) != 0 || offset >> bits >= virgin {
                return Err(corrupt("a refcount block or L2 table where none can be"));
            }
            this.reserve(offset >> bits)?;
        }
        Ok(this)
    }

    /// Makes the cluster one of metadata.
    pub(super) fn reserve(&mut self, cluster: u64) -> io::Result<()> {
        match self.reserved.insert(cluster) {
            true => Ok(()),
            false => Err(corrupt("a cluster that is used for two tables")),
        }
    }

    /// Whether the cluster is one of metadata.
    pub(super) fn is_reserved(&self, cluster: u64) -> bool {
        self.reserved.contains(&cluster)
    }

    /// Makes the cluster an ordinary one.
    pub(super) fn unreserve(&mut self, cluster: u64) {
        self.reserved.remove(&cluster);
    }

    /// Gives out up to `want` clusters in a row, at least one, each with a count of 1.
    pub(super) fn allocate(&mut self, file: &MetaFile, want: u64) -> io::Result<Run> {
        let mut at = self.hint;
        loop {
            if at << self.cluster_bits >= MAX_OFFSET {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            let index = (at >> self.block_bits()) as usize;
            if index >= self.table.len() {
                at = self.grow(file, at)?;
                continue;
            }
            if self.table[index] & BLOCK_MASK == 0 {
                self.add_block(file, index, at)?;
                at += 1;
                continue;
            }
            let block_end = (index as u64 + 1) << self.block_bits();
            match self.find_free(file, index, at..block_end)? {
                Some(first) => return self.take(file, index, first, want.min(block_end - first)),
                None => {
                    at = block_end;
                    self.hint = at;
                    self.trim();
                }
            }
        }
    }

    /// Gives out one cluster for metadata, with room for it on the host.
    pub(super) fn allocate_metadata(&mut self, file: &MetaFile) -> io::Result<u64> {
        let cluster = self.allocate(file, 1)?.clusters.start;
        let size = 1 << self.cluster_bits;
        if let Err(e) = file.reserve(cluster << self.cluster_bits, size) {
            self.release(file, cluster)?;
            return Err(e);
        }
        self.reserve(cluster)?;
        Ok(cluster)
    }

    /// Takes one reference away; whether the cluster is free now.
    pub(super) fn release(&mut self, file: &MetaFile, cluster: u64) -> io::Result<bool> {
        let count = self.count(file, cluster)?;
        let Some(less) = count.checked_sub(1) else {
            return Err(corrupt("a cluster that is used and has no refcount"));
        };
        self.set(file, cluster, less)?;
        if less == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(less == 0)
    }

    /// Whether the file lacks changes.
    pub(super) fn is_dirty(&self) -> bool {
        self.moved_from.is_some()
            || !self.dirty_entries.is_empty()
            || self.blocks.values().any(|b| b.dirty.is_some())
    }

    /// Makes all changes durable, and everything else written before; in an order in which the file is
    /// right at every moment. After an error all of it is still to be written.
    pub(super) fn commit(&mut self, file: &MetaFile) -> io::Result<()> {
        for (&index, block) in &self.blocks {
            if let Some(range) = &block.dirty {
                let offset = self.table[index] & BLOCK_MASK;
                file.write(&block.counts[range.clone()], offset + range.start as u64)?;
            }
        }
        if self.moved_from.is_some() {
            let bytes: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write(&bytes, self.table_offset)?;
            file.sync()?;
            let clusters = (bytes.len() >> self.cluster_bits) as u32;
            let field = [&self.table_offset.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
            file.write(&field, REFCOUNT_TABLE_FIELD)?;
        } else if !self.dirty_entries.is_empty() {
            file.sync()?;
            for &index in &self.dirty_entries {
                let offset = self.table_offset + index as u64 * 8;
                file.write(&self.table[index].to_be_bytes(), offset)?;
            }
        }
        file.sync()?;
        self.dirty_entries.clear();
        for block in self.blocks.values_mut() {
            block.dirty = None;
        }
        for cluster in self.moved_from.take().into_iter().flatten() {
            self.reserved.remove(&cluster);
            self.release(file, cluster)?;
        }
        Ok(())
    }

    /// Forgets blocks that the file has too, when there are many.
    pub(super) fn trim(&mut self) {
        if self.blocks.len() << self.cluster_bits > CACHE.max(4 << self.cluster_bits) {
            self.blocks.retain(|_, b| std::mem::take(&mut b.used) || b.dirty.is_some());
        }
    }

    /// Clusters of a block, as a power of two.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    fn block(&mut self, file: &MetaFile, index: usize) -> io::Result<&mut Block> {
        let offset = match self.table.get(index).map(|e| e & BLOCK_MASK) {
            None | Some(0) => return Err(corrupt("a cluster that is used and has no refcount")),
            Some(offset) => offset,
        };
        let block = match self.blocks.entry(index) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => {
                let mut counts = vec![0; 1 << self.cluster_bits];
                file.read(&mut counts, offset)?;
                e.insert(Block { counts, dirty: None, used: true })
            }
        };
        block.used = true;
        Ok(block)
    }

    fn count(&mut self, file: &MetaFile, cluster: u64) -> io::Result<u64> {
        let (bits, order) = (self.block_bits(), self.order);
        let index = usize::try_from(cluster >> bits).unwrap_or(usize::MAX);
        let block = self.block(file, index)?;
        Ok(get(&block.counts, order, cluster & ((1 << bits) - 1)))
    }

    fn set(&mut self, file: &MetaFile, cluster: u64, count: u64) -> io::Result<()> {
        let (bits, order) = (self.block_bits(), self.order);
        let block = self.block(file, (cluster >> bits) as usize)?;
        let changed = put(&mut block.counts, order, cluster & ((1 << bits) - 1), count);
        block.dirty = Some(match block.dirty.take() {
            Some(d) => d.start.min(changed.start)..d.end.max(changed.end),
            None => changed,
        });
        Ok(())
    }

    fn find_free(
        &mut self,
        file: &MetaFile,
        index: usize,
        range: Range<u64>,
    ) -> io::Result<Option<u64>> {
        let (bits, order) = (self.block_bits(), self.order);
        let block = self.block(file, index)?;
        Ok(range.into_iter().find(|c| get(&block.counts, order, c & ((1 << bits) - 1)) == 0))
    }

    /// Takes the free cluster `first` and those after it, up to `want` in the same block, as long as they are free and as
    /// fresh as the first.
    fn take(&mut self, file: &MetaFile, index: usize, first: u64, want: u64) -> io::Result<Run> {
        let fresh = first >= self.virgin;
        let (bits, order, virgin) = (self.block_bits(), self.order, self.virgin);
        let block = self.block(file, index)?;
        let mut end = first;
        while end < first + want
            && get(&block.counts, order, end & ((1 << bits) - 1)) == 0
            && (end >= virgin) == fresh
        {
            end += 1;
        }
        for cluster in first..end {
            if self.is_reserved(cluster) {
                return Err(corrupt("metadata that has no refcount"));
            }
            self.set(file, cluster, 1)?;
        }
        self.hint = end;
        self.virgin = self.virgin.max(end);
        Ok(Run { clusters: first..end, fresh })
    }

    /// Makes the block for clusters that had none, in the cluster `at`. None of its clusters is used.
    fn add_block(&mut self, file: &MetaFile, index: usize, at: u64) -> io::Result<()> {
        file.reserve(at << self.cluster_bits, 1 << self.cluster_bits)?;
        self.reserve(at)?;
        let counts = vec![0; 1 << self.cluster_bits];
        let dirty = Some(0..counts.len());
        self.blocks.insert(index, Block { counts, dirty, used: true });
        self.table[index] = at << self.cluster_bits;
        self.dirty_entries.insert(index);
        self.virgin = self.virgin.max(at + 1);
        self.set(file, at, 1)
    }

    /// Gives the table a larger place, from the cluster `at` on: the first that the table does not cover. Returns the first
    /// cluster after it.
    ///
    /// ```text
    ///  at: [new blocks][new table] next
    /// ```
    fn grow(&mut self, file: &MetaFile, at: u64) -> io::Result<u64> {
        if self.moved_from.is_some() {
            // Its last move must be over before the next.
            self.commit(file)?;
        }
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let (bits, block_bits) = (self.cluster_bits, self.block_bits());
        let old_clusters = ((self.table.len() * 8) >> bits) as u64;
        let first_block = at >> block_bits;
        let needed = ((first_block + 2) * 8).div_ceil(1 << bits);
        let clusters = (old_clusters * 2).max(needed);
        if clusters << bits > MAX_REFCOUNT_TABLE.max(1 << bits) {
            return Err(full());
        }
        // Blocks for the new blocks and the new table themselves.
        let mut blocks = 1;
        while (at + blocks + clusters - 1) >> block_bits >= first_block + blocks {
            blocks += 1;
        }
        let end = at + blocks + clusters;
        let entries = (clusters << bits) / 8;
        if first_block + blocks > entries {
            return Err(full());
        }
        file.reserve(at << bits, (blocks + clusters) << bits)?;
        let old = self.table_offset >> bits..(self.table_offset >> bits) + old_clusters;
        self.table.resize(entries as usize, 0);
        for i in 0..blocks {
            let index = (first_block + i) as usize;
            let counts = vec![0; 1 << bits];
            let dirty = Some(0..counts.len());
            self.blocks.insert(index, Block { counts, dirty, used: true });
            self.table[index] = (at + i) << bits;
        }
        for cluster in at..end {
            self.reserve(cluster)?;
            self.set(file, cluster, 1)?;
        }
        self.virgin = self.virgin.max(end);
        self.table_offset = (at + blocks) << bits;
        self.moved_from = Some(old);
        Ok(end)
    }
}

/// The count of the cluster `index` of a block. Counts of less than a byte begin at its low bits.
fn get(counts: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    if order < 3 {
        let per_byte = 8usize >> order;
        let shift = (index % per_byte) << order;
        return u64::from(counts[index / per_byte]) >> shift & ((1 << (1 << order)) - 1);
    }
    let size = 1 << (order - 3);
    counts[index * size..][..size].iter().fold(0, |v, &b| v << 8 | u64::from(b))
}

/// Sets a count; returns the bytes that changed.
fn put(counts: &mut [u8], order: u32, index: u64, count: u64) -> Range<usize> {
    let index = index as usize;
    if order < 3 {
        let per_byte = 8usize >> order;
        let shift = (index % per_byte) << order;
        let mask = ((1u16 << (1 << order)) - 1) << shift;
        let byte = &mut counts[index / per_byte];
        *byte = (*byte & !(mask as u8)) | (count as u8) << shift;
        return index / per_byte..index / per_byte + 1;
    }
    let size = 1 << (order - 3);
    let range = index * size..(index + 1) * size;
    counts[range.clone()].copy_from_slice(&count.to_be_bytes()[8 - size..]);
    range
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_do_not_touch_each_other() {
        for order in 0..=6 {
            let mut counts = vec![0xff; 512];
            let all = (512 * 8) >> order;
            for i in 0..all {
                put(&mut counts, order, i, 0);
            }
            assert!(counts.iter().all(|&b| b == 0), "order {order}");
            for i in (0..all).step_by(3) {
                assert!(put(&mut counts, order, i, 1).len() == (1usize << order).div_ceil(8));
            }
            for i in 0..all {
                assert_eq!(get(&counts, order, i), u64::from(i % 3 == 0), "order {order}");
            }
        }
    }
}
