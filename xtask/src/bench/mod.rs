//! `cargo xtask bench`: measures Lodge against something in the same run, prints a table, writes
//! `target/bench.json`.
//!
//! A row is one number and what it is held against; each is a function in a module of its own,
//! listed in [`ROWS`]. Rows give ratios to something measured a moment before or after on the
//! same machine, because times of different machines and hours do not compare.

mod boot;
mod footprint;
mod guest;
mod kernels;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::build;
use crate::setup;
use table::{Row, Verdict};

/// Measure, print a table of ratios, write target/bench.json.
#[derive(clap::Args)]
pub struct Args {
    /// Only the rows of the groups whose names contain one of these.
    filter: Vec<String>,
}

/// What a group of rows needs to measure.
struct Bench {
    /// The folder with `lodge` and `lodge-vmm`.
    bin: PathBuf,
}

/// A group of rows and the function that measures them.
type Group = (&'static str, fn(&Bench) -> Result<Vec<Row>>);

/// All groups, in the order in which they run.
const ROWS: [Group; 3] =
    [("kernels", kernels::rows), ("boot", boot::rows), ("footprint", footprint::rows)];

/// Measures and prints. Fails where a row misses its goal, after all have run.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::for_tests(false)?;
    let bench = Bench { bin: build::release()? };
    let chosen = |name: &str| {
        args.filter.is_empty() || args.filter.iter().any(|part| name.contains(part.as_str()))
    };
    let mut rows = Vec::new();
    for (name, measure) in ROWS.into_iter().filter(|(name, _)| chosen(name)) {
        eprintln!("xtask: measuring {name}");
        rows.extend(measure(&bench).with_context(|| format!("cannot measure {name}"))?);
    }
    print!("{}", table::text(&rows));
    let path = build::target()?.join("bench.json");
    let json = serde_json::to_string_pretty(&table::json(&rows))?;
    fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("xtask: wrote {}", path.display());
    let missed = rows.iter().any(|row| row.verdict() == Verdict::Missed);
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
