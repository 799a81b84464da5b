//! `cargo xtask docs`: the pages that are made from code.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::process::root;

/// Write the generated pages of docs/ anew.
#[derive(clap::Args)]
pub struct Args {
    /// Write nothing; fail if a page is stale.
    #[arg(long)]
    check: bool,
}

impl Args {
    /// `--check`.
    pub const CHECK: Self = Self { check: true };
}

/// The pages, and what they should hold.
fn pages() -> [(&'static str, String); 1] {
    [("docs/spec.md", lodge_model::reference::markdown())]
}

/// Writes or checks all pages.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for (name, wanted) in pages() {
        let path = root().join(name);
        if fs::read_to_string(&path).is_ok_and(|have| have == wanted) {
            continue;
        }
        if args.check {
            eprintln!("xtask: {name} is stale: run `cargo xtask docs`");
            code = ExitCode::FAILURE;
        } else {
            fs::write(&path, wanted).with_context(|| format!("cannot write {name}"))?;
            eprintln!("xtask: wrote {name}");
        }
    }
    Ok(code)
}
