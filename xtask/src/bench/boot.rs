//! Debian's cloud kernel to its init, one vCPU: the software CPU against QEMU's translator.

use std::process::Command;

use anyhow::{Context, Result};

use super::Bench;
use super::guest::{self, lines_until};
use super::table::{Goal, Row};

pub fn rows(bench: &Bench) -> Result<Vec<Row>> {
    let folder = lodge_guests::ready("busybox")?;
    let kernel = |command: &mut Command, dash: &str, cmdline: &str| {
        command.arg(format!("{dash}kernel")).arg(folder.join("vmlinuz"));
        command.arg(format!("{dash}initrd")).arg(folder.join("initrd.img"));
        command.args([format!("{dash}{cmdline}"), "console=ttyS0".into()]);
    };
    let mut qemu = guest::qemu();
    qemu.args(["-m", "512"]);
    kernel(&mut qemu, "-", "append");
    let mut lodge = guest::lodge(bench);
    lodge.args(["--memory", "512M"]);
    kernel(&mut lodge, "--", "cmdline");
    let against = to_init(&mut qemu)?;
    let value = to_init(&mut lodge)?;
    Ok(vec![Row {
        name: "Debian cloud kernel to its init, 1 vCPU".into(),
        value,
        unit: "s",
        against: Some(("QEMU TCG", against)),
        goal: Goal::AtMost(4.0),
    }])
}

/// Seconds from the start of the process until the guest's init speaks.
fn to_init(command: &mut Command) -> Result<f64> {
    let lines = lines_until(command, "LODGE-GUEST-READY")?;
    Ok(lines.last().context("the guest printed nothing")?.at.as_secs_f64())
}
