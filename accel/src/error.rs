//! Why an accelerator could not do what it was asked to.

use std::io;

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an accelerator could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The accelerator cannot be used on this host; the text says what is missing and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The host refused a step.
    #[error("{accel}: {step} failed")]
    Host {
        /// `kvm` or `soft`.
        accel: &'static str,
        /// What was being done.
        step: String,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The request itself makes no sense to the accelerator.
    #[error("{0}")]
    Invalid(String),
    /// The guest stopped in a way that it cannot go on from; the text says where and why.
    #[error("the guest cannot go on: {0}")]
    Guest(String),
}
