//! Opening a disk: what the path names, which format it has, the lock, and then the format's own checks.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::EngineChoice;
use crate::raw::RawDisk;
use crate::{Disk, Error, Result, lock, qcow2};

/// How an image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// Which disk to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// The image file or block device.
    pub path: PathBuf,
    /// Its format. Without one, a file that begins with qcow2's magic is qcow2 and any other is raw. State
    /// it for raw images whose guest you do not trust: a guest can write that magic.
    pub format: Option<Format>,
    /// Opens it for reading only, and lets others read it too.
    pub read_only: bool,
    /// How the host's files are read and written.
    pub engine: EngineChoice,
}

impl OpenOptions {
    /// A writable disk whose format is looked up.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let (format, read_only, engine) = (None, false, EngineChoice::Auto);
        Self { path: path.into(), format, read_only, engine }
    }
}

/// Opens and locks a disk.
///
/// # Errors
/// Each names the file and the way out; see [`Error`].
pub fn open(options: &OpenOptions) -> Result<Arc<dyn Disk>> {
    let image = ImageFile::open(&options.path, options.read_only)?;
    match options.format.map_or_else(|| image.probe(), Ok)? {
        Format::Raw => Ok(Arc::new(RawDisk::new(image, options.engine)?)),
        Format::Qcow2 => Ok(Arc::new(qcow2::Qcow2Disk::new(image, options.engine)?)),
    }
}

/// A file or device that is open and locked.
pub(crate) struct ImageFile {
    pub(crate) file: Arc<File>,
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    /// Length in bytes.
    pub(crate) len: u64,
    /// Logical block size of a device, 512 for a file.
    pub(crate) block_size: u32,
    /// Device and inode, by which the same file is known under another name.
    pub(crate) identity: (u64, u64),
}

impl ImageFile {
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self> {
        // Looked at before it is opened: opening a FIFO waits, opening a device may do things.
        check_kind(path, &fs::metadata(path).map_err(Error::io("open", path))?)?;
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY) if !read_only => {
                    Error::NotWritable { path: path.to_owned(), source }
                }
                _ => Error::Io { action: "open", path: path.to_owned(), source },
            })?;
        let metadata = file.metadata().map_err(Error::io("look at", path))?;
        check_kind(path, &metadata)?;
        lock::acquire(&file, path, read_only)?;
        let len = file.seek(SeekFrom::End(0)).map_err(Error::io("measure", path))?;
        let block_size = if metadata.file_type().is_block_device() {
            device_block_size(&file).map_err(Error::io("ask the block size of", path))?
        } else {
            512
        };
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            read_only,
            len,
            block_size,
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// Whether the file begins with qcow2's magic.
    pub(crate) fn has_qcow2_magic(&self) -> Result<bool> {
        let mut magic = [0; 4];
        if self.len < 4 {
            return Ok(false);
        }
        self.file.read_exact_at(&mut magic, 0).map_err(Error::io("read", &self.path))?;
        Ok(magic == qcow2::MAGIC)
    }

    fn probe(&self) -> Result<Format> {
        Ok(if self.has_qcow2_magic()? { Format::Qcow2 } else { Format::Raw })
    }
}

fn check_kind(path: &Path, metadata: &fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a socket"
    };
    Err(Error::NotADisk { path: path.to_owned(), what })
}

/// Logical block size of a device: 512 or 4096 (a larger one is told to the guest as 4096; requests of any
/// alignment work, since they go through the page cache).
fn device_block_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the address given.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET as _, &mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(if size <= 512 { 512 } else { 4096 })
}
