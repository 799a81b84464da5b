//! An image and the files under it, and from which of them each byte of the guest's disk comes.
//!
//! ```text
//!   layer 0: the image ── unallocated? ──> layer 1: its backing file ── ... ──> nothing: zeroes
//! ```

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::corrupt;
use super::map::{Cluster, Found, Map, OFFSET_MASK, Table};
use crate::open::ImageFile;

/// One file of the chain.
pub(super) struct Layer {
    pub(super) image: ImageFile,
    /// A raw file has none.
    pub(super) map: Option<Map>,
}

/// Where some bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Zero,
    File {
        layer: usize,
        offset: u64,
    },
    /// From the byte `within` on in what `len` bytes at `offset` inflate to.
    Compressed {
        layer: usize,
        offset: u64,
        len: usize,
        within: u64,
    },
}

/// Some bytes of the guest's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) len: u64,
    pub(super) source: Source,
}

/// Why a look-up found no answer.
#[derive(Debug)]
pub(super) enum Missed {
    /// An L2 table must be loaded first: layer, index, offset.
    Table(usize, usize, u64),
    Failed(io::Error),
}

impl From<io::Error> for Missed {
    fn from(e: io::Error) -> Self {
        Self::Failed(e)
    }
}

/// The files, the image first.
pub(super) struct Chain {
    pub(super) layers: Vec<Layer>,
}

impl Chain {
    /// The image's own map.
    pub(super) fn top(&self) -> &Map {
        self.layers[0].map.as_ref().expect("the first layer is qcow2: that is how a chain is made")
    }

    /// Whether unallocated clusters of the image are looked for in another file.
    pub(super) fn has_backing(&self) -> bool {
        self.layers.len() > 1
    }

    /// Where the bytes come from, as far as the tables in memory tell.
    pub(super) fn look_up(&self, offset: u64, len: u64) -> Result<Vec<Segment>, Missed> {
        let mut out = Vec::new();
        self.look_up_in(0, offset, len, &mut out)?;
        Ok(out)
    }

    /// Where the bytes come from; loads what is missing. Only the owner calls it. Tables of the image itself must
    /// pass `check`.
    pub(super) fn resolve(
        &self,
        offset: u64,
        len: u64,
        check: &dyn Fn(&Table) -> io::Result<()>,
    ) -> io::Result<Vec<Segment>> {
        loop {
            match self.look_up(offset, len) {
                Ok(segments) => return Ok(segments),
                Err(Missed::Failed(e)) => return Err(e),
                // Nothing forgets tables while this goes on, so it ends.
                Err(Missed::Table(layer, index, at)) => drop(self.load(layer, index, at, check)?),
            }
        }
    }

    /// Loads an L2 table. Only the owner calls it.
    pub(super) fn load(
        &self,
        layer: usize,
        index: usize,
        offset: u64,
        check: &dyn Fn(&Table) -> io::Result<()>,
    ) -> io::Result<Arc<Table>> {
        let Layer { image, map: Some(map) } = &self.layers[layer] else {
            return Err(corrupt("a table of a raw image"));
        };
        let size = map.geometry.cluster_size();
        if !offset.is_multiple_of(size) || offset.saturating_add(size) > map.limit() {
            return Err(corrupt("an L2 table where none can be"));
        }
        let mut bytes = vec![0; size as usize];
        read_padded(image, &mut bytes, offset)?;
        let table = Table::parse(&bytes);
        if layer == 0 {
            check(&table)?;
        }
        Ok(map.insert(index, table))
    }

    fn look_up_in(
        &self,
        layer: usize,
        offset: u64,
        len: u64,
        out: &mut Vec<Segment>,
    ) -> Result<(), Missed> {
        let Some(Layer { image, map }) = self.layers.get(layer) else {
            push(out, len, Source::Zero);
            return Ok(());
        };
        let size = map.as_ref().map_or(image.len, |m| m.geometry.size);
        let inside = size.saturating_sub(offset).min(len);
        match map {
            Some(map) => self.look_up_clusters(layer, map, offset, inside, out)?,
            None => push(out, inside, Source::File { layer, offset }),
        }
        push(out, len - inside, Source::Zero);
        Ok(())
    }

    fn look_up_clusters(
        &self,
        layer: usize,
        map: &Map,
        offset: u64,
        len: u64,
        out: &mut Vec<Segment>,
    ) -> Result<(), Missed> {
        let geometry = map.geometry;
        let (mut at, end) = (offset, offset + len);
        // Unallocated bytes before `at` that were not yet looked for below.
        let mut below = 0;
        while at < end {
            let (l1, mut l2) = geometry.indices(at);
            let table = match map.table(l1) {
                Found::NotLoaded(offset) => return Err(Missed::Table(layer, l1, offset)),
                Found::Table(table) => table,
                Found::Nothing => {
                    let clusters = (geometry.table_len() - l2) as u64;
                    let table_end = (at >> geometry.cluster_bits) + clusters;
                    let n = (table_end << geometry.cluster_bits).min(end) - at;
                    below += n;
                    at += n;
                    continue;
                }
            };
            while at < end && l2 < geometry.table_len() {
                let within = at % geometry.cluster_size();
                let n = (geometry.cluster_size() - within).min(end - at);
                let cluster = geometry.decode(table.get(l2), map.limit())?;
                if cluster == Cluster::Unallocated {
                    below += n;
                } else {
                    self.look_up_below(layer, at, &mut below, out)?;
                    push(out, n, source(cluster, layer, within));
                }
                at += n;
                l2 += 1;
            }
        }
        self.look_up_below(layer, at, &mut below, out)
    }

    /// The `below` bytes before `at`, in the layers below this one.
    fn look_up_below(
        &self,
        layer: usize,
        at: u64,
        below: &mut u64,
        out: &mut Vec<Segment>,
    ) -> Result<(), Missed> {
        match std::mem::take(below) {
            0 => Ok(()),
            n => self.look_up_in(layer + 1, at - n, n, out),
        }
    }
}

/// The source of a cluster that is not unallocated.
fn source(cluster: Cluster, layer: usize, within: u64) -> Source {
    match cluster {
        Cluster::Data { offset, .. } => Source::File { layer, offset: offset + within },
        Cluster::Compressed { offset, len } => Source::Compressed { layer, offset, len, within },
        Cluster::Zero(_) | Cluster::Unallocated => Source::Zero,
    }
}

/// Adds a segment, as a part of the last one when it goes on there.
fn push(out: &mut Vec<Segment>, len: u64, source: Source) {
    if len == 0 {
        return;
    }
    if let Some(last) = out.last_mut() {
        let goes_on = match (&last.source, &source) {
            (Source::Zero, Source::Zero) => true,
            (Source::File { layer: a, offset: x }, Source::File { layer: b, offset: y }) => {
                a == b && x + last.len == *y
            }
            _ => false,
        };
        if goes_on {
            last.len += len;
            return;
        }
    }
    out.push(Segment { len, source });
}

/// Reads metadata; what is beyond the file's end is zeroes.
pub(super) fn read_padded(image: &ImageFile, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        match image.file.read_at(&mut bytes[at..], offset + at as u64) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes[at..].fill(0);
    Ok(())
}

/// Checks an L1 table as it is in the file.
pub(super) fn check_l1(l1: &[u64], cluster_size: u64, limit: u64) -> Result<(), String> {
    for (i, entry) in l1.iter().enumerate() {
        let offset = entry & OFFSET_MASK;
        if !offset.is_multiple_of(cluster_size) {
            return Err(format!("L1 entry {i} points to {offset:#x}, which is no cluster"));
        }
        if offset.saturating_add(cluster_size) > limit {
            return Err(format!(
                "L1 entry {i} points to {offset:#x}, beyond the file; is it truncated?"
            ));
        }
    }
    Ok(())
}
