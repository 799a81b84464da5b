//! qcow2 images, versions 2 and 3 (QEMU `docs/interop/qcow2.txt`), with backing files.
//!
//! ```text
//!  queue ─┐  reads tables in memory, data straight to and from the files
//!  queue ─┼──> Chain: image ──> backing file ──> ...
//!         │
//!         └──> Owner, a thread: loads tables, fills new clusters, writes metadata back
//! ```
//!
//! Only the owner changes metadata. What it must keep to, so that the image is right whenever the host
//! loses power, is told in [`metadata`].
//!
//! Not supported, and refused before anything is written: encryption, external data files, subclusters, zstd, images
//! marked corrupt, unknown features; and for writing: internal snapshots, dirty bitmaps, images marked dirty.

mod chain;
mod fetch;
mod header;
mod inflate;
mod map;
mod metadata;
mod metafile;
mod owner;
#[cfg(test)]
mod power;
mod queue;
mod refcounts;
mod slab;
mod writer;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::{EngineChoice, Engines};
use crate::open::ImageFile;
use crate::{Capabilities, Disk, DiskQueue, Error, Result};
use chain::{Chain, Layer};
use header::{Backing, Header, Refusal};
use map::{Geometry, Map};
use metadata::{Generations, Metadata};
use metafile::MetaFile;
use owner::Owner;
use refcounts::Refcounts;

/// The first four bytes of every qcow2 image.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest chain of backing files.
const MAX_CHAIN: usize = 64;

/// An error of a request that met something in the image that cannot be.
fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the qcow2 image has {what}"))
}

/// The disk.
pub(crate) struct Qcow2Disk {
    engines: Engines,
    chain: Arc<Chain>,
    owner: Arc<Owner>,
    generations: Arc<Generations>,
}

impl Qcow2Disk {
    pub(crate) fn new(image: ImageFile, engine: EngineChoice) -> Result<Self> {
        let (header, map) = parse(&image)?;
        let mut seen = HashSet::from([image.identity]);
        let mut layers = vec![Layer { image, map: Some(map) }];
        open_backing(&mut layers, header.backing.clone(), &mut seen)?;
        let chain = Arc::new(Chain { layers });
        let generations = Arc::<Generations>::default();
        let engines = Engines::new(engine)?;
        // The last thing that can fail, since it may write.
        let metadata = match chain.layers[0].image.read_only {
            true => None,
            false => Some(open_metadata(&chain, &generations, &header)?),
        };
        let owner = Owner::start(chain.clone(), metadata, &engines)?;
        Ok(Self { engines, chain, owner: Arc::new(owner), generations })
    }

    fn read_only_image(&self) -> bool {
        self.chain.layers[0].image.read_only
    }
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.chain.top().geometry.size
    }

    fn read_only(&self) -> bool {
        self.read_only_image()
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn capabilities(&self) -> Capabilities {
        let clears = self.chain.top().geometry.version >= 3 || !self.chain.has_backing();
        let can = clears && !self.read_only_image();
        Capabilities { discard: can, write_zeroes: can }
    }

    fn queue(&self) -> Result<Box<dyn DiskQueue>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(Error::queue("make an event descriptor"))?;
        let engine = self.engines.engine(&event)?;
        Ok(Box::new(queue::Queue::new(
            engine,
            event,
            self.chain.clone(),
            self.owner.clone(),
            self.generations.clone(),
            self.read_only_image(),
        )?))
    }
}

fn damaged(image: &ImageFile, reason: impl Into<String>) -> Error {
    Error::Damaged { path: image.path.clone(), format: "qcow2", reason: reason.into() }
}

/// Reads and checks the header and the L1 table.
fn parse(image: &ImageFile) -> Result<(Header, Map)> {
    let read = |bytes: &mut [u8], offset| {
        chain::read_padded(image, bytes, offset).map_err(Error::io("read", &image.path))
    };
    let mut first = vec![0; image.len.min(2 << 20) as usize];
    read(&mut first, 0)?;
    let header = Header::parse(&first, image.len, image.read_only).map_err(|e| match e {
        Refusal::Damaged(reason) => damaged(image, reason),
        Refusal::Unsupported(reason) => Error::Unsupported { path: image.path.clone(), reason },
    })?;
    let mut bytes = vec![0; header.l1_entries as usize * 8];
    read(&mut bytes, header.l1_offset)?;
    let l1: Vec<u64> = bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
    let geometry = Geometry::of(&header);
    let map = Map::new(geometry, &l1, image.len);
    chain::check_l1(&l1, geometry.cluster_size(), map.limit()).map_err(|e| damaged(image, e))?;
    Ok((header, map))
}

fn open_metadata(
    chain: &Arc<Chain>,
    generations: &Arc<Generations>,
    header: &Header,
) -> Result<Metadata> {
    let image = &chain.layers[0].image;
    let file = MetaFile::new(image.file.clone());
    let tables = (0..header.l1_entries as usize)
        .map(|i| chain.top().l1(i) & map::OFFSET_MASK)
        .filter(|&offset| offset != 0);
    let refcounts =
        Refcounts::open(&file, header, image.len, tables).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => {
                damaged(image, format!("{e}; try `qemu-img check -r all`"))
            }
            _ => Error::Io { action: "read the refcounts of", path: image.path.clone(), source: e },
        })?;
    if header.autoclear != 0 {
        // None of these features is kept up to date here, and clearing them tells others so.
        file.write(&[0; 8], header::AUTOCLEAR_OFFSET)
            .and_then(|()| file.sync())
            .map_err(Error::io("write the header of", &image.path))?;
    }
    Ok(Metadata::new(chain.clone(), generations.clone(), file, refcounts, header.l1_offset))
}

/// Opens the backing files, one after the other.
fn open_backing(
    layers: &mut Vec<Layer>,
    mut next: Option<Backing>,
    seen: &mut HashSet<(u64, u64)>,
) -> Result<()> {
    while let Some(backing) = next.take() {
        let image = &layers[layers.len() - 1].image;
        let path = backing_path(image, &backing.name)?;
        let wrap = |source| Error::Backing {
            image: image.path.clone(),
            backing: path.clone(),
            source: Box::new(source),
        };
        let below = ImageFile::open(&path, true).map_err(wrap)?;
        if !seen.insert(below.identity) || layers.len() >= MAX_CHAIN {
            return Err(Error::BackingLoop { image: image.path.clone(), backing: path });
        }
        let map = match is_qcow2(image, &below, backing.format.as_deref())? {
            false => None,
            true => {
                let (header, map) = parse(&below).map_err(wrap)?;
                next = header.backing;
                Some(map)
            }
        };
        layers.push(Layer { image: below, map });
    }
    Ok(())
}

/// Where the backing file is: a relative name starts from the folder of the image that names it.
fn backing_path(image: &ImageFile, name: &str) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err(Error::Unsupported {
            path: image.path.clone(),
            reason: format!("its backing file {name:?} is not named by a path"),
        });
    }
    Ok(image.path.parent().unwrap_or(Path::new("")).join(name))
}

/// The format of a backing file. It is not guessed when the guess could be wrong: whoever once wrote to a raw
/// file as a guest could make it look like an image that leads to any file of the host.
fn is_qcow2(image: &ImageFile, backing: &ImageFile, format: Option<&str>) -> Result<bool> {
    let unsupported = |reason| Error::Unsupported { path: image.path.clone(), reason };
    let name = backing.path.display();
    match format {
        Some("raw" | "file" | "host_device") => Ok(false),
        Some("qcow2") => Ok(true),
        Some(other) => {
            Err(unsupported(format!("its backing file {name} is of the format {other:?}")))
        }
        None if backing.has_qcow2_magic()? => Err(unsupported(format!(
            "it does not say of which format its backing file {name} is; \
             say it with `qemu-img rebase -u -b FILE -F qcow2 IMAGE`"
        ))),
        None => Ok(false),
    }
}
