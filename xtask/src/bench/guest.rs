//! Running a guest for a measurement, in Lodge or in QEMU, and watching what it prints.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Bench;
use crate::process::shown;

/// A guest that prints more slowly than this is given up.
const LIMIT: Duration = Duration::from_secs(300);

/// QEMU's own translator, with a CPU like the software CPU's: the thing to be held against.
pub fn qemu() -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "Nehalem", "-machine", "q35", "-nodefaults"]);
    command.args(["-display", "none", "-no-reboot", "-serial", "stdio"]);
    command
}

/// `lodge run` on the software CPU.
pub fn lodge(bench: &Bench) -> Command {
    let mut command = Command::new(bench.bin.join("lodge"));
    command.args(["run", "--accel", "soft"]);
    command
}

/// A line that a guest printed, and when, from the start of its process.
pub struct Line {
    pub at: Duration,
    pub text: String,
}

/// Starts a guest and returns its lines up to the first with `last` in it; then ends the guest.
pub fn lines_until(command: &mut Command, last: &str) -> Result<Vec<Line>> {
    let shown = shown(command);
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run `{shown}`"))?;
    let stdout = child.stdout.take().context("the guest has no output")?;
    let (send, receive) = mpsc::channel();
    // Ends when the guest's output does, at the latest when the child is killed below.
    let reader = thread::spawn(move || {
        for text in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&text).trim_end().to_owned();
            if send.send(Line { at: start.elapsed(), text }).is_err() {
                return;
            }
        }
    });
    let mut lines: Vec<Line> = Vec::new();
    let found = loop {
        match receive.recv_timeout(LIMIT.saturating_sub(start.elapsed())) {
            Ok(line) => lines.push(line),
            Err(_) => break false,
        }
        if lines.last().is_some_and(|line| line.text.contains(last)) {
            break true;
        }
    };
    // It may have ended by itself.
    let _ = child.kill();
    child.wait().with_context(|| format!("cannot wait for `{shown}`"))?;
    drop(receive);
    let _ = reader.join();
    if !found {
        let tail = lines.iter().rev().take(5).rev().map(|line| line.text.as_str());
        let tail = tail.collect::<Vec<_>>().join("\n");
        bail!("`{shown}` did not print '{last}'; its last lines are:\n{tail}");
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_until_the_last_one() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo a; echo b; echo END; exec sleep 1000"]);
        let lines = lines_until(&mut command, "END").unwrap();
        let texts: Vec<_> = lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(texts, ["a", "b", "END"]);
        let error = lines_until(Command::new("echo").arg("x"), "END").err().unwrap();
        assert!(error.to_string().contains("did not print 'END'"), "{error}");
    }
}
