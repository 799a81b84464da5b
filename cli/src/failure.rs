//! How a command fails: one message, the way out, and the exit code.

use std::error::Error;
use std::fmt;

use lodge_model::exit::ExitStatus;

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    /// The exit code's meaning.
    pub status: ExitStatus,
    /// What was being done to what, and why it failed.
    pub message: String,
    /// What the user can do.
    pub help: String,
}

impl Failure {
    /// The request is wrong.
    pub fn request(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { status: ExitStatus::BadRequest, message: message.into(), help: help.into() }
    }

    /// Something failed that is not the request's fault.
    pub fn failed(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { status: ExitStatus::Failed, message: message.into(), help: help.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "lodge: {}", self.message)?;
        if self.help.is_empty() { Ok(()) } else { writeln!(f, "  help: {}", self.help) }
    }
}

/// An error and what caused it, in one line: `a: b: c`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
