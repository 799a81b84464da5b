//! What tests with real guests are made of. The tests themselves are in `tests/`, a file each for
//! a kind of guest; later ones are meant to be written with the same parts.
//!
//! ```text
//!   Run (flags of `lodge run`) --start--> Guest (process, console) --shell--> run("ls") -> Output
//!    |                                      |
//!    +--refused--> the message              +-- expect(text), send(keys), signal, wait -> exit code
//! ```
//!
//! - The programs are the release build, in the folder that `LODGE_BIN` names (`cargo xtask test`
//!   sets it): the interpreter of a debug build is ten times slower.
//! - Nothing waits for a fixed time. Everything that waits ends with a panic that shows the
//!   console's last lines, after [`patience`].
//! - A guest ends with its [`Guest`], whatever the test does.
#![forbid(unsafe_code)]

mod console;
mod elf;
mod guest;
pub mod host;
mod run;
pub mod screen;
mod shell;

pub use elf::pvh_payload;
pub use guest::Guest;
pub use run::Run;
pub use shell::Output;

use std::time::Duration;

/// How long a test waits for one thing: far longer than a busy machine needs for it.
/// `LODGE_PATIENCE` is another number of seconds.
pub fn patience() -> Duration {
    let seconds = std::env::var("LODGE_PATIENCE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(240))
}

/// Says that a test cannot run here, and ends the function that it is in: `cargo xtask test` counts the test as skipped.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        println!("SKIPPED: {}", format_args!($($why)*));
        return;
    }};
}
