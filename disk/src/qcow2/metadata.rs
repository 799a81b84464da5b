//! What the owner of an image's metadata does with it: allocate, link, clear, write back.
//!
//! The file must be right whenever the host loses power, so changes reach it in this order, with a sync after
//! each step:
//!
//! ```text
//!  1. refcounts of clusters that are used now      (lost after this: a leak)
//!  2. L2 tables, that refer to those clusters and no longer to freed ones
//!  3. L1 entries of new L2 tables
//!  4. refcounts of clusters that nothing refers to any more; only now they are given out again, and
//!     only when no request that began before is still under way (it may write to its old place)
//! ```

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::chain::{Chain, Segment, Source};
use super::corrupt;
use super::map::{COPIED, Cluster, Found, Map, OFFSET_MASK, Table, ZERO};
use super::metafile::MetaFile;
use super::refcounts::Refcounts;

/// L2 tables in memory, in bytes, for each image.
pub(super) const TABLE_CACHE: usize = 4 << 20;
/// Freed clusters that wait for a write-back before it is made on their account.
const MAX_FREED: usize = 4096;
/// Most bytes that one allocation covers.
const MAX_RUN: u64 = 64 << 20;

/// A request holds the generation in which it began, until it ends.
pub(super) type Generation = Arc<u64>;

/// The current generation.
#[derive(Default)]
pub(super) struct Generations(Mutex<Generation>);

impl Generations {
    pub(super) fn enter(&self) -> Generation {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins a new one; returns the one before.
    fn turn(&self) -> Weak<u64> {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = Arc::new(**current + 1);
        Arc::downgrade(&std::mem::replace(&mut *current, next))
    }
}

/// What to do with the next bytes of a write.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Write them here.
    InPlace { host: u64, len: u64 },
    /// Write them to new clusters, that will be linked when that is done.
    New(NewRun),
}

/// New clusters for a part of a write.
///
/// ```text
///   host ─> [ head | the guest's data | tail ]  whole clusters
/// ```
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NewRun {
    /// By this it is linked.
    pub(super) id: u64,
    /// Offset in the file.
    pub(super) host: u64,
    /// What the clusters hold before the data, and where it comes from.
    pub(super) head: Vec<Segment>,
    pub(super) len: u64,
    /// What they hold after the data.
    pub(super) tail: Vec<Segment>,
    /// They read as zeroes: zeroes need not be written.
    pub(super) fresh: bool,
}

/// An answer, or that an unfinished write is in the way.
#[derive(Debug)]
pub(super) enum Outcome<T> {
    Done(T),
    Busy,
}

/// Clusters that wait to be linked.
struct Pending {
    /// Guest clusters, by number.
    guest: Range<u64>,
    /// The first one's cluster in the file.
    host: u64,
}

/// A way to clear clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// They may read as before or as zeroes.
    Discard,
    /// They read as zeroes.
    Zero,
}

/// Everything that may change.
pub(super) struct Metadata {
    chain: Arc<Chain>,
    generations: Arc<Generations>,
    pub(super) file: MetaFile,
    refcounts: Refcounts,
    l1_offset: u64,
    /// L2 tables that differ from the file, and which of their entries.
    dirty: HashMap<usize, Range<usize>>,
    dirty_l1: BTreeSet<usize>,
    pending: HashMap<u64, Pending>,
    next_id: u64,
    /// Clusters with a reference less, in memory.
    freed: Vec<u64>,
    /// The same, in the file too; their former users are those of the generation and of all before.
    quarantine: VecDeque<(Weak<u64>, Vec<u64>)>,
    /// The last write-back failed: a flush tries again, not every request.
    stuck: bool,
}

impl Metadata {
    pub(super) fn new(
        chain: Arc<Chain>,
        generations: Arc<Generations>,
        file: MetaFile,
        refcounts: Refcounts,
        l1_offset: u64,
    ) -> Self {
        Self {
            chain,
            generations,
            file,
            refcounts,
            l1_offset,
            dirty: HashMap::new(),
            dirty_l1: BTreeSet::new(),
            pending: HashMap::new(),
            next_id: 0,
            freed: Vec::new(),
            quarantine: VecDeque::new(),
            stuck: false,
        }
    }

    /// Settles where `len` bytes from `offset` on are written. With `zero`, they are zeroes; nothing is to be done where it reads so.
    pub(super) fn prepare(
        &mut self,
        offset: u64,
        len: u64,
        zero: bool,
    ) -> io::Result<Outcome<Vec<Piece>>> {
        let bits = self.map().geometry.cluster_bits;
        if self.is_busy(offset >> bits..(offset + len).div_ceil(1 << bits)) {
            return Ok(Outcome::Busy);
        }
        if zero && self.resolve(offset, len)?.iter().all(|s| s.source == Source::Zero) {
            return Ok(Outcome::Done(Vec::new()));
        }
        self.reclaim();
        if self.stuck && self.dirty.len() > self.most_tables() {
            // There is no room for more changes in memory, so who wants one hears why.
            self.commit()?;
        }
        let mut pieces = Vec::new();
        let made = self.prepare_pieces(offset, len, &mut pieces);
        if let Err(e) = made {
            for piece in pieces {
                if let Piece::New(run) = piece {
                    self.finish(run.id, false)?;
                }
            }
            return Err(e);
        }
        Ok(Outcome::Done(pieces))
    }

    fn prepare_pieces(&mut self, offset: u64, len: u64, out: &mut Vec<Piece>) -> io::Result<()> {
        let geometry = self.map().geometry;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (l1, l2) = geometry.indices(at);
            let table = self.table_to_write(l1)?;
            let cluster = self.decode(&table, l2)?;
            let size = geometry.cluster_size();
            if let Cluster::Data { offset: host, ours: true } = cluster {
                let n = (size - at % size).min(end - at);
                let host = host + at % size;
                match out.last_mut() {
                    Some(Piece::InPlace { host: h, len }) if *h + *len == host => *len += n,
                    _ => out.push(Piece::InPlace { host, len: n }),
                }
                at += n;
                continue;
            }
            // How many clusters of this table cannot be written in place.
            let most = ((end - 1) / size - at / size + 1)
                .min((geometry.table_len() - l2) as u64)
                .min((MAX_RUN / size).max(1));
            let mut want = 1;
            while want < most
                && !matches!(
                    self.decode(&table, l2 + want as usize)?,
                    Cluster::Data { ours: true, .. }
                )
            {
                want += 1;
            }
            let run = self.new_run(at, end, want)?;
            at += run.len;
            out.push(Piece::New(run));
        }
        Ok(())
    }

    fn new_run(&mut self, at: u64, end: u64, want: u64) -> io::Result<NewRun> {
        let geometry = self.map().geometry;
        let (bits, size) = (geometry.cluster_bits, geometry.cluster_size());
        // What is kept of the first and the last cluster; looked up first, since that may fail.
        let start = at / size * size;
        let head = self.resolve(start, at - start)?;
        let run = self.refcounts.allocate(&self.file, want)?;
        let count = run.clusters.end - run.clusters.start;
        self.map().raise_limit(run.clusters.end << bits);
        let stop = (start + count * size).min(end);
        let tail = match self.resolve(stop, start + count * size - stop) {
            Ok(tail) => tail,
            Err(e) => {
                self.release_all(run.clusters)?;
                return Err(e);
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        let first = start >> bits;
        let (guest, host) = (first..first + count, run.clusters.start);
        self.pending.insert(id, Pending { guest, host });
        Ok(NewRun { id, host: host << bits, head, len: stop - at, tail, fresh: run.fresh })
    }

    /// The data of a new run was written, or could not be: links its clusters or frees them.
    pub(super) fn finish(&mut self, id: u64, written: bool) -> io::Result<()> {
        let Some(pending) = self.pending.remove(&id) else { return Ok(()) };
        let count = pending.guest.end - pending.guest.start;
        let linked = if written { self.link(&pending) } else { Ok(()) };
        if !written || linked.is_err() {
            self.release_all(pending.host..pending.host + count)?;
        }
        linked
    }

    fn link(&mut self, pending: &Pending) -> io::Result<()> {
        let bits = self.map().geometry.cluster_bits;
        // A run lies in one table. All that can fail comes first: a run is linked as a whole or not at all.
        let (l1, first) = self.map().geometry.indices(pending.guest.start << bits);
        let table = self.table_to_write(l1)?;
        let count = (pending.guest.end - pending.guest.start) as usize;
        let old: Vec<Cluster> =
            (first..first + count).map(|l2| self.decode(&table, l2)).collect::<io::Result<_>>()?;
        for (i, cluster) in old.into_iter().enumerate() {
            table.set(first + i, ((pending.host + i as u64) << bits) | COPIED);
            self.free(cluster);
        }
        self.note_dirty(l1, first..first + count);
        Ok(())
    }

    /// Clears whole clusters, of which the last one may reach beyond the disk. Does a part of them and returns the rest.
    pub(super) fn clear(
        &mut self,
        clusters: Range<u64>,
        how: Clear,
    ) -> io::Result<Outcome<Range<u64>>> {
        if self.is_busy(clusters.clone()) {
            return Ok(Outcome::Busy);
        }
        let geometry = self.map().geometry;
        let backing = self.chain.has_backing();
        if geometry.version < 3 && backing {
            // There is no way to say "zeroes", and what is below must not show again.
            return match how {
                Clear::Discard => Ok(Outcome::Done(clusters.end..clusters.end)),
                Clear::Zero => Err(io::ErrorKind::Unsupported.into()),
            };
        }
        let per_table = geometry.table_len() as u64;
        let mut at = clusters.start;
        for _ in 0..64 {
            if at >= clusters.end {
                break;
            }
            let stop = ((at / per_table + 1) * per_table).min(clusters.end);
            self.clear_in_table(at, (stop - at) as usize, how, backing)?;
            at = stop;
        }
        Ok(Outcome::Done(at..clusters.end))
    }

    fn clear_in_table(
        &mut self,
        cluster: u64,
        count: usize,
        how: Clear,
        backing: bool,
    ) -> io::Result<()> {
        let (l1, first) = self.map().geometry.indices(cluster << self.map().geometry.cluster_bits);
        // What is unallocated reads as before when it is discarded; without a file below also as zeroes.
        let keep_unallocated = how == Clear::Discard || !backing;
        if keep_unallocated && matches!(self.map().table(l1), Found::Nothing) {
            return Ok(());
        }
        let table = self.table_to_write(l1)?;
        let entry = if backing { ZERO } else { 0 };
        for l2 in first..first + count {
            let old = self.decode(&table, l2)?;
            let done = match old {
                Cluster::Unallocated => keep_unallocated,
                Cluster::Zero(None) => true,
                _ => false,
            };
            if !done {
                table.set(l2, entry);
                self.free(old);
                self.note_dirty(l1, l2..l2 + 1);
            }
        }
        Ok(())
    }

    /// Whether a flush must write metadata.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.dirty_l1.is_empty() || self.refcounts.is_dirty()
    }

    /// Makes everything durable that was done, data and metadata, in the order that the module's head tells. After an
    /// error it can be tried again.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        self.stuck = true;
        self.refcounts.commit(&self.file)?;
        if !self.dirty.is_empty() || !self.dirty_l1.is_empty() {
            self.write_tables()?;
        }
        if !self.freed.is_empty() {
            let freed = std::mem::take(&mut self.freed);
            self.quarantine.push_back((self.generations.turn(), freed));
        }
        self.stuck = false;
        self.reclaim();
        Ok(())
    }

    /// Writes everything back, with no request under way any more.
    pub(super) fn close(&mut self) -> io::Result<()> {
        // Freed clusters are given back only after the first write-back, and that is to be written too.
        for _ in 0..3 {
            self.reclaim();
            if !self.is_dirty() {
                break;
            }
            self.commit()?;
        }
        Ok(())
    }

    fn write_tables(&mut self) -> io::Result<()> {
        for (&index, range) in &self.dirty {
            let Found::Table(table) = self.chain.top().table(index) else {
                return Err(corrupt("a changed table that was forgotten"));
            };
            let offset = self.chain.top().l1(index) & OFFSET_MASK;
            self.file.write(&table.bytes(range.clone()), offset + range.start as u64 * 8)?;
        }
        self.file.sync()?;
        if !self.dirty_l1.is_empty() {
            for &index in &self.dirty_l1 {
                let entry = self.chain.top().l1(index);
                self.file.write(&entry.to_be_bytes(), self.l1_offset + index as u64 * 8)?;
            }
            self.file.sync()?;
        }
        self.dirty.clear();
        self.dirty_l1.clear();
        Ok(())
    }

    /// Gives back the clusters that nobody uses any more.
    fn reclaim(&mut self) {
        while self.quarantine.front().is_some_and(|(g, _)| g.strong_count() == 0) {
            let (_, clusters) = self.quarantine.pop_front().unwrap_or_default();
            let mut hole = 0..0;
            for cluster in clusters {
                let free = self.refcounts.release(&self.file, cluster).unwrap_or_else(|e| {
                    tracing::error!(error = %e, cluster, "a freed cluster is lost");
                    false
                });
                if free && cluster == hole.end {
                    hole.end += 1;
                } else if free {
                    self.punch(std::mem::replace(&mut hole, cluster..cluster + 1));
                }
            }
            self.punch(hole);
        }
    }

    fn punch(&self, hole: Range<u64>) {
        if !hole.is_empty() {
            let bits = self.map().geometry.cluster_bits;
            self.file.punch(hole.start << bits, (hole.end - hole.start) << bits);
        }
    }

    /// Keeps memory bounded; called between requests.
    pub(super) fn tidy(&mut self) -> io::Result<()> {
        self.reclaim();
        let most = self.most_tables();
        if !self.stuck && (self.dirty.len() > most / 2 || self.freed.len() > MAX_FREED) {
            self.commit()?;
        }
        self.refcounts.trim();
        self.map().trim(most, |i| self.dirty.contains_key(&i));
        Ok(())
    }

    fn most_tables(&self) -> usize {
        (TABLE_CACHE >> self.map().geometry.cluster_bits).max(4)
    }

    fn map(&self) -> &Map {
        self.chain.top()
    }

    fn is_busy(&self, clusters: Range<u64>) -> bool {
        self.pending.values().any(|p| p.guest.start < clusters.end && clusters.start < p.guest.end)
    }

    /// Reads an entry, and refuses one that leads into the metadata.
    fn decode(&self, table: &Table, l2: usize) -> io::Result<Cluster> {
        let geometry = self.map().geometry;
        let cluster = geometry.decode(table.get(l2), self.map().limit())?;
        let host = match cluster {
            Cluster::Data { offset, .. } | Cluster::Zero(Some(offset)) => offset,
            _ => return Ok(cluster),
        };
        match self.refcounts.is_reserved(host >> geometry.cluster_bits) {
            true => Err(corrupt("data in the place of metadata")),
            false => Ok(cluster),
        }
    }

    /// The L2 table, made or copied first if it is not there or not ours alone.
    fn table_to_write(&mut self, l1: usize) -> io::Result<Arc<Table>> {
        let entry = self.map().l1(l1);
        let old = match self.map().table(l1) {
            Found::Nothing => None,
            Found::Table(table) => Some(table),
            Found::NotLoaded(offset) => Some(self.load(l1, offset)?),
        };
        if let Some(table) = &old
            && entry & COPIED != 0
        {
            return Ok(table.clone());
        }
        let bits = self.map().geometry.cluster_bits;
        let cluster = self.refcounts.allocate_metadata(&self.file)?;
        self.map().raise_limit((cluster + 1) << bits);
        let all = 0..self.map().geometry.table_len();
        let table = match old {
            Some(table) => {
                let old = (entry & OFFSET_MASK) >> bits;
                self.refcounts.unreserve(old);
                self.freed.push(old);
                table
            }
            None => self.map().insert(l1, Table::parse(&vec![0; all.len() * 8])),
        };
        self.map().set_l1(l1, (cluster << bits) | COPIED);
        self.dirty_l1.insert(l1);
        self.note_dirty(l1, all);
        Ok(table)
    }

    fn load(&self, l1: usize, offset: u64) -> io::Result<Arc<Table>> {
        self.chain.load(0, l1, offset, &|table| self.check(table))
    }

    /// Queues write in place where a table says, without asking: none of its entries may lead into the metadata.
    fn check(&self, table: &Table) -> io::Result<()> {
        (0..self.map().geometry.table_len()).try_for_each(|l2| self.decode(table, l2).map(drop))
    }

    /// Where bytes come from.
    pub(super) fn resolve(&self, offset: u64, len: u64) -> io::Result<Vec<Segment>> {
        self.chain.resolve(offset, len, &|table| self.check(table))
    }

    fn note_dirty(&mut self, l1: usize, entries: Range<usize>) {
        let range = self.dirty.entry(l1).or_insert_with(|| entries.clone());
        *range = range.start.min(entries.start)..range.end.max(entries.end);
    }

    /// Notes that the image no longer refers to what a cluster had.
    fn free(&mut self, old: Cluster) {
        let bits = self.map().geometry.cluster_bits;
        match old {
            Cluster::Unallocated | Cluster::Zero(None) => {}
            Cluster::Data { offset, .. } | Cluster::Zero(Some(offset)) => {
                self.freed.push(offset >> bits);
            }
            Cluster::Compressed { offset, len } => {
                self.freed.extend(offset >> bits..=(offset + len as u64 - 1) >> bits);
            }
        }
    }

    /// Takes back clusters that nothing ever referred to.
    fn release_all(&mut self, clusters: Range<u64>) -> io::Result<()> {
        clusters.into_iter().try_for_each(|c| self.refcounts.release(&self.file, c).map(drop))
    }
}
