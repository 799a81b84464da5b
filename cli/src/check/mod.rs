//! `lodge host check`: what this host offers to machines, and what to do about what it does not.
//!
//! Each fact is one [`Finding`], made by one small function of [`virt`] (what virtualization
//! needs) or [`system`] (everything around it); this file only runs and prints them.

mod system;
mod virt;

use std::process::ExitCode;

use lodge_model::exit::ExitStatus;
use serde::Serialize;

use crate::failure::Failure;

/// Print what this host offers to machines, and what to do about what is missing.
///
/// Each line is ok, a warning (works, but slower or with less) or missing (something cannot be
/// used at all). The exit code is 1 if anything is missing.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON: a list of objects with name, status, found and help.
    #[arg(long)]
    json: bool,
}

/// How good or bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Missing,
}

/// One line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Finding {
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do; empty where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    help: String,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), help: String::new() }
    }

    fn warning(name: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, found: found.into(), help: help.into() }
    }

    fn missing(name: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { name, status: Status::Missing, found: found.into(), help: help.into() }
    }
}

/// Runs all checks and prints them.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let mut findings = virt::findings();
    findings.extend(system::findings());
    if args.json {
        let json = serde_json::to_string_pretty(&findings).map_err(|error| {
            Failure::failed(format!("cannot write the findings as JSON: {error}"), "")
        })?;
        println!("{json}");
    } else {
        print!("{}", table(&findings));
    }
    let missing = findings.iter().any(|finding| finding.status == Status::Missing);
    Ok(if missing { ExitStatus::Failed } else { ExitStatus::Ok }.into())
}

/// The findings as lines for people: status, name, what was found; below it what to do.
fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Finding { name, status, found, help } in findings {
        let status = match status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Missing => "missing",
        };
        text += &format!("{status:8} {name:width$}  {found}\n");
        if !help.is_empty() {
            text += &format!("{:8} {:width$}  help: {help}\n", "", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_says_what_to_do() {
        let findings =
            [Finding::ok("CPU", "fine"), Finding::missing("huge pages", "none", "do this")];
        let expected = "\
ok       CPU         fine
missing  huge pages  none
                     help: do this
";
        assert_eq!(table(&findings), expected);
    }
}
