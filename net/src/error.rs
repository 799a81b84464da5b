//! What can go wrong when a network is opened, in words for the user who asked for it.

use std::io;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused something.
    #[error("cannot {action}")]
    Io {
        /// What was being done to what.
        action: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}
