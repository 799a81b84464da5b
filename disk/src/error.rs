//! What can go wrong when a disk is opened, in words for the user who gave its path.

use std::io;
use std::path::PathBuf;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a disk cannot be opened or used. Errors of single requests are `io::Error`s in their completions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused something.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was being done, as "open".
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
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
