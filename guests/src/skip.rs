//! Tests that cannot run here say so, and are counted.

use std::fs::OpenOptions;
use std::io::Write;

/// Tells that the calling test cannot run on this host and why; the test returns after it.
///
/// `cargo xtask test` names a file in `LODGE_SKIPS`: it prints the lines and counts them, so that
/// nobody takes such a test for one that passed.
///
/// # Panics
/// The file is named and cannot be written: a skip that nobody sees is a failure.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let line = format!("{}: {why}\n", thread.name().unwrap_or("a test"));
    eprint!("skipped: {line}");
    if let Some(path) = std::env::var_os("LODGE_SKIPS") {
        // One write, so that lines of tests that run at the same time stay whole.
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        if let Err(error) = written {
            panic!("cannot tell of a skipped test in LODGE_SKIPS={}: {error}", path.display());
        }
    }
}
