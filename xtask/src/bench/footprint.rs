//! What a machine costs the host: time to its first instruction, memory beside the guest's, CPU while it idles.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Bench;
use super::guest::{self, lines_until};
use super::table::{Goal, Row};

/// Starts of each, in turns; the median counts.
const STARTS: usize = 9;
/// How long a guest settles after it is up, and how long it is watched then.
const SETTLE: Duration = Duration::from_secs(5);
const WATCH: Duration = Duration::from_secs(20);

pub fn rows(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = vec![start(bench)?];
    rows.extend(idle(bench)?);
    Ok(rows)
}

/// From the start of the process to the guest's first output, which its first instructions make.
fn start(bench: &Bench) -> Result<Row> {
    let kernel = lodge_guests::ready("bench")?.join("first.elf");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let mut qemu = guest::qemu();
        qemu.args(["-m", "512", "-kernel"]).arg(&kernel);
        theirs.push(to_first(&mut qemu)?);
        let mut lodge = guest::lodge(bench);
        lodge.args(["--memory", "512M", "--kernel"]).arg(&kernel);
        ours.push(to_first(&mut lodge)?);
    }
    Ok(Row {
        name: "start to the first guest instruction".into(),
        value: median(ours),
        unit: "s",
        against: Some(("QEMU TCG", median(theirs))),
        goal: Goal::AtMost(1.0),
    })
}

fn to_first(command: &mut Command) -> Result<f64> {
    let lines = lines_until(command, "FIRST")?;
    Ok(lines.last().context("the guest printed nothing")?.at.as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A Linux guest that has nothing to do: its process's memory beside the guest's RAM, and the CPU it takes.
fn idle(bench: &Bench) -> Result<Vec<Row>> {
    let folder = lodge_guests::ready("busybox")?;
    let mut command = guest::lodge(bench);
    command.args(["--memory", "512M", "--kernel"]).arg(folder.join("vmlinuz"));
    command.arg("--initrd").arg(folder.join("initrd.img"));
    command.args(["--cmdline", "console=ttyS0 quiet lodge.run=\"echo IDLE; sleep 1000000\""]);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run lodge")?;
    let mut running = Running(child);
    running.wait_for("IDLE")?;
    thread::sleep(SETTLE);
    // `lodge run` becomes `lodge-vmm`: the process is the same.
    let process = Path::new("/proc").join(running.0.id().to_string());
    let before = cpu_seconds(&process)?;
    thread::sleep(WATCH);
    let used = cpu_seconds(&process)? - before;
    Ok(vec![
        Row {
            name: "memory beside guest RAM, 1 vCPU, direct boot".into(),
            value: memory_beside_ram(&process)?,
            unit: "MiB",
            against: None,
            goal: Goal::AtMost(20.0),
        },
        Row {
            name: "CPU of an idle guest, of one core".into(),
            value: 100.0 * used / WATCH.as_secs_f64(),
            unit: "%",
            against: None,
            goal: Goal::AtMost(2.0),
        },
    ])
}

/// A child that ends with its owner.
struct Running(Child);

impl Running {
    fn wait_for(&mut self, text: &str) -> Result<()> {
        let stdout = self.0.stdout.take().context("the guest has no output")?;
        let mut lines = BufReader::new(stdout).split(b'\n').map_while(Result::ok);
        if lines.any(|line| String::from_utf8_lossy(&line).contains(text)) {
            // What comes later is read too, or the guest would wait for somebody to do so.
            thread::spawn(move || lines.for_each(drop));
            return Ok(());
        }
        bail!("the guest ended without printing '{text}'")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// User and system time of a process so far (proc(5), `stat` fields 14 and 15), in seconds.
fn cpu_seconds(process: &Path) -> Result<f64> {
    let stat = fs::read_to_string(process.join("stat")).context("the guest's process is gone")?;
    // The name, field 2, may hold anything; it ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat is not as proc(5) says")?;
    let ticks: Vec<f64> =
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    // USER_HZ is 100 on every x86 Linux.
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

/// MiB of the process that are resident and not guest RAM.
fn memory_beside_ram(process: &Path) -> Result<f64> {
    let smaps = fs::read_to_string(process.join("smaps")).context("cannot read smaps")?;
    let mut kib = 0.0;
    let mut guest_ram = false;
    for line in smaps.lines() {
        if line.split_whitespace().next().is_some_and(|first| first.contains('-')) {
            guest_ram = line.contains("memfd:lodge-ram");
        } else if let Some(rest) = line.strip_prefix("Rss:")
            && !guest_ram
        {
            kib += rest.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0);
        }
    }
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory_and_time() {
        let me = Path::new("/proc/self");
        assert!(memory_beside_ram(me).unwrap() > 0.5);
        let before = cpu_seconds(me).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(200) {
            std::hint::black_box(0);
        }
        assert!(cpu_seconds(me).unwrap() >= before);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
