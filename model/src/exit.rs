//! How `lodge run` and `lodge-vmm` end: the one table of exit codes.

use std::fmt;

/// How a program ends. [`ExitStatus::code`] is its exit code, [`TABLE`] what the help prints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ExitStatus {
    /// The guest powered off, or the command did what was asked for.
    Ok,
    /// Something went wrong that the other codes do not tell.
    Failed,
    /// The request was wrong: a flag, a spec file, a file that it names.
    BadRequest,
    /// The accelerator that was asked for cannot be used on this host.
    NoAccelerator,
    /// Something that the machine needs is in use: an image is locked, a tap or a port taken.
    Busy,
    /// The guest crashed: a triple fault, or an instruction that cannot be executed.
    GuestCrashed,
    /// A test guest wrote this value, 1 to 255, to the debug exit port.
    DebugExit(u8),
    /// The machine was ended from outside before the guest powered off.
    Ended,
}

/// The exit codes and what they mean, for `--help` and the documentation.
pub const TABLE: [(&str, &str); 8] = [
    ("0", "the guest powered off (or a test guest wrote 0 to the debug exit port)"),
    ("1", "something failed; the message says what"),
    ("2", "the request is wrong: a flag, the spec file, or a file that it names"),
    ("3", "the accelerator asked for cannot be used on this host"),
    ("4", "something that the machine needs is in use: an image, a tap, a port"),
    ("5", "the guest crashed"),
    ("65 to 127", "a test guest wrote 1 to 63 (64 to 255: 127) to the debug exit port"),
    ("130", "the machine was ended before the guest powered off (Ctrl-A X, a second SIGTERM)"),
];

impl ExitStatus {
    /// The code that the process exits with.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok | Self::DebugExit(0) => 0,
            Self::Failed => 1,
            Self::BadRequest => 2,
            Self::NoAccelerator => 3,
            Self::Busy => 4,
            Self::GuestCrashed => 5,
            Self::DebugExit(value) => 64 + value.min(63),
            Self::Ended => 130,
        }
    }
}

impl From<ExitStatus> for std::process::ExitCode {
    fn from(status: ExitStatus) -> Self {
        status.code().into()
    }
}

/// Why a machine stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExitReason {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest crashed; the text says how.
    Crashed(String),
    /// A test guest wrote this value to the debug exit port.
    DebugExit(u8),
    /// It was ended from outside.
    Ended,
    /// The host could not run it any further; the text says why.
    Failed(String),
}

impl ExitReason {
    /// How the program that ran the machine ends.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::PoweredOff => ExitStatus::Ok,
            Self::Crashed(_) => ExitStatus::GuestCrashed,
            Self::DebugExit(0) => ExitStatus::Ok,
            Self::DebugExit(value) => ExitStatus::DebugExit(*value),
            Self::Ended => ExitStatus::Ended,
            Self::Failed(_) => ExitStatus::Failed,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Crashed(how) => write!(f, "the guest crashed: {how}"),
            Self::DebugExit(value) => write!(f, "the guest wrote {value} to the debug exit port"),
            Self::Ended => f.write_str("the machine was ended"),
            Self::Failed(why) => write!(f, "the machine cannot go on: {why}"),
        }
    }
}

/// The table as lines of text, each after `indent` spaces.
pub fn table(indent: usize) -> String {
    let width = TABLE.iter().map(|(code, _)| code.len()).max().unwrap_or(0);
    TABLE
        .iter()
        .map(|(code, meaning)| format!("{:indent$}{code:width$}  {meaning}\n", ""))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_apart() {
        let mut codes = vec![
            ExitStatus::Ok.code(),
            ExitStatus::Failed.code(),
            ExitStatus::BadRequest.code(),
            ExitStatus::NoAccelerator.code(),
            ExitStatus::Busy.code(),
            ExitStatus::GuestCrashed.code(),
            ExitStatus::Ended.code(),
        ];
        codes.extend((1..=63).map(|v| ExitStatus::DebugExit(v).code()));
        let all = codes.len();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), all);
        assert_eq!(ExitStatus::DebugExit(255).code(), 127);
        assert_eq!(ExitReason::DebugExit(0).status().code(), 0);
    }
}
