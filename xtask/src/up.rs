//! `cargo xtask up`: from a fresh clone to a Debian's login prompt in this terminal.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::build;
use crate::process::{call, shown};
use crate::setup;

/// Install what is needed, build Lodge, make a Debian 12 guest, and start it in this terminal.
///
/// The guest's disk is kept: what is written in it is there at the next start.
#[derive(clap::Args)]
pub struct Args {
    /// Throw the guest's disk away and start with a new one.
    #[arg(long)]
    fresh: bool,

    /// More flags for `lodge run`, such as `-- --cpus 4 --accel soft`.
    #[arg(last = true)]
    more: Vec<String>,
}

/// The port of this host that leads to the guest's sshd.
const SSH_PORT: u16 = 2222;

/// Does it all, and becomes `lodge run`.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::for_up()?;
    let bin = build::release()?;
    let guest = lodge_guests::ready("debian")?;
    let disk = own_disk(&guest, args.fresh)?;
    let mut lodge = Command::new(bin.join("lodge"));
    lodge.args(["run", "--name", "debian", "--cpus", "2", "--memory", "1G"]);
    lodge.arg("--kernel").arg(guest.join("vmlinuz"));
    lodge.arg("--initrd").arg(guest.join("initrd.img"));
    lodge.args(["--cmdline", "root=LABEL=lodge-root ro console=ttyS0"]);
    lodge.arg("--disk").arg(&disk);
    let ssh = TcpListener::bind((Ipv4Addr::LOCALHOST, SSH_PORT)).is_ok();
    match ssh {
        true => lodge.arg("--net").arg(format!("user,forward={SSH_PORT}:22")),
        false => lodge.args(["--net", "user"]),
    };
    lodge.args(&args.more);
    eprintln!("xtask: {}", shown(&lodge));
    eprintln!("xtask: log in as root with the password root; `poweroff` or Ctrl-A X ends it");
    match ssh {
        true => eprintln!("xtask: or from here: ssh -p {SSH_PORT} root@127.0.0.1"),
        false => eprintln!("xtask: no ssh from here: port {SSH_PORT} is in use"),
    }
    let error = lodge.exec();
    bail!("cannot run `{}`: {error}", shown(&lodge));
}

/// A copy of the guest's disk that keeps what is written to it; one for each version of the guest.
fn own_disk(guest: &Path, fresh: bool) -> Result<PathBuf> {
    let version = guest.file_name().context("the guest's folder has no name")?;
    let folder = lodge_guests::cache()?.join("up").join(version);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let disk = folder.join("disk.qcow2");
    if fresh || !disk.exists() {
        let partial = folder.join("disk.partial");
        let from = guest.join("disk.qcow2");
        call(Command::new("cp").arg("--reflink=auto").args([&from, &partial]))?;
        fs::rename(&partial, &disk).with_context(|| format!("cannot make {}", disk.display()))?;
    }
    Ok(disk)
}
