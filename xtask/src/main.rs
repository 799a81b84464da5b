//! `cargo xtask`: what developers and CI do with this repository, one subcommand each.
//!
//! | module | command |
//! | --- | --- |
//! | [`setup`] | installs what the others need, only what is missing |
//! | [`up`] | builds all and starts a Debian guest in the terminal |
//! | [`test`] | every check that CI runs |
//! | [`bench`] | measures, prints a table, writes `target/bench.json` |
//! | [`docs`] | writes the generated pages anew |
//! | `guest` | builds a guest and prints its folder |
#![forbid(unsafe_code)]

mod bench;
mod build;
mod docs;
mod junit;
mod process;
mod setup;
mod test;
mod up;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// What developers and CI do with this repository.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the Debian packages and tools that the other commands need, only what is missing.
    Setup,
    Up(up::Args),
    Test(test::Args),
    Bench(bench::Args),
    Docs(docs::Args),
    /// Build a guest, or take it from the cache, and print its folder.
    Guest {
        /// Its name; without one, all are listed.
        name: Option<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Setup => setup::all().map(|()| ExitCode::SUCCESS),
        Command::Up(args) => up::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Docs(args) => docs::run(&args),
        Command::Guest { name } => guest(name.as_deref()),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}

fn guest(name: Option<&str>) -> Result<ExitCode> {
    match name {
        Some(name) => {
            let recipe = lodge_guests::recipe(name)?;
            setup::packages(recipe.packages)?;
            println!("{}", recipe.ready()?.display());
        }
        None => {
            for recipe in lodge_guests::RECIPES {
                println!("{:12} {}", recipe.name, recipe.about);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
