//! What can go wrong when a disk is opened, in words for the user who gave its path.

use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a disk cannot be opened or used. Errors of single requests are `io::Error`s in their completions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused something.
    #[error("cannot {action} the disk {}", path.display())]
    Io {
        /// What was being done, as "open".
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image cannot be written by this user, or at all.
    #[error(
        "the disk {} cannot be opened for writing; give `readonly`, or change its permissions",
        path.display()
    )]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The path names something that no disk can be.
    #[error("{} is {what}; a disk is an image file or a block device", path.display())]
    NotADisk {
        /// What was given.
        path: PathBuf,
        /// What it is, as "a directory".
        what: &'static str,
    },
    /// Somebody else has the image.
    #[error("the disk {} is in use by {}; {}", path.display(), holder(*pid), lock_advice(*read_only))]
    Locked {
        /// The image.
        path: PathBuf,
        /// Who holds it, when that could be found.
        pid: Option<u32>,
        /// Whether it was to be opened for reading only.
        read_only: bool,
    },
    /// The image is not what its format demands: truncated, damaged, or not of that format.
    #[error("{} is not a usable {format} image: {reason}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The image uses something that is not supported here.
    #[error("{} cannot be used: {reason}", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it uses and what to do.
        reason: String,
    },
    /// The file under an overlay cannot be used.
    #[error("the backing file {} of {} cannot be used", backing.display(), image.display())]
    Backing {
        /// The overlay that names it.
        image: PathBuf,
        /// The file that it names.
        backing: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<Error>,
    },
    /// Each image names the next as its backing file, in a circle or without end.
    #[error("the chain of backing files of {} comes back to {} or is too long", image.display(), backing.display())]
    BackingLoop {
        /// The overlay at which that was noticed.
        image: PathBuf,
        /// The file that it names.
        backing: PathBuf,
    },
    /// A queue could not be made or used.
    #[error("cannot {action} for a disk's queue")]
    Queue {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { action, path: path.to_owned(), source }
    }

    /// An [`Error::Queue`], for `map_err`.
    pub(crate) fn queue(action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Queue { action, source }
    }
}

fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) if pid == std::process::id() => "this machine itself (given twice?)".to_owned(),
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

fn lock_advice(read_only: bool) -> &'static str {
    if read_only {
        "it is being written there, stop that first"
    } else {
        "two machines may share an image only if both open it with `readonly`"
    }
}
