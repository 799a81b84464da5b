//! `lodge`: the command line. Each command is one short-lived process that owns nothing.
//!
//! | module | command |
//! | --- | --- |
//! | [`run`] | `lodge run`: flags and a spec file become a spec, which `lodge-vmm` gets |
//! | [`ctl`] | `lodge ctl`: asks a running machine |
//! | [`check`] | `lodge host check`: what this host offers |
#![forbid(unsafe_code)]

mod check;
mod ctl;
mod failure;
mod launch;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;

/// Virtual machines on this host.
#[derive(Parser)]
#[command(name = "lodge", version, propagate_version = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Ctl(ctl::Args),
    Host(HostArgs),
}

/// Look at this host.
#[derive(clap::Args)]
struct HostArgs {
    #[command(subcommand)]
    command: HostCommand,
}

#[derive(Subcommand)]
enum HostCommand {
    Check(check::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => run::run(*args),
        Command::Ctl(args) => ctl::run(args),
        Command::Host(HostArgs { command: HostCommand::Check(args) }) => check::run(&args),
    };
    done.unwrap_or_else(|failure: Failure| {
        eprint!("{failure}");
        failure.status.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
