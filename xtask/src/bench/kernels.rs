//! Nine small integer programs and one with floating point, in a bare guest: the software CPU
//! against QEMU's translator and against the host's own CPU, and in instructions a second.
//!
//! The time of a run is the host's, from the line printed before it to its own: the guests' TSCs
//! need not tick alike.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Bench;
use super::guest::{self, Line, lines_until};
use super::table::{Goal, Row, geometric_mean};

/// The runs of each program in a guest.
const RUNS: usize = 3;

pub fn rows(bench: &Bench) -> Result<Vec<Row>> {
    let folder = lodge_guests::ready("bench")?;
    let mut rows = Vec::new();
    for (name, guest, flat, count) in [
        ("integer programs", "bench-serial.elf", "kernels.bin", 9),
        ("floating-point program", "fp-serial.elf", "fp.bin", 1),
    ] {
        let mut qemu = guest::qemu();
        qemu.args(["-m", "64", "-device", "isa-debug-exit,iobase=0xf4", "-kernel"]);
        let mut lodge = guest::lodge(bench);
        lodge.args(["--memory", "64M", "--kernel"]);
        let mut native = Command::new(folder.join("native"));
        native.arg(folder.join(flat)).arg(count.to_string());
        let native = measure(&mut native, count)?;
        let qemu = measure(qemu.arg(folder.join(guest)), count)?;
        let lodge = measure(lodge.arg(folder.join(guest)), count)?;
        ensure!(native.results == qemu.results, "QEMU computes {name} otherwise than the host");
        ensure!(native.results == lodge.results, "Lodge computes {name} otherwise than the host");
        let instructions = instructions(&folder.join(guest), count)?;
        let rates: Vec<f64> =
            instructions.iter().zip(&lodge.seconds).map(|(n, time)| n / time / 1e6).collect();
        // The goal is for the integer programs.
        let goal = if count > 1 { Goal::AtLeast(450.0) } else { Goal::None };
        rows.push(Row {
            name: format!("{name}, million instructions a second"),
            value: geometric_mean(&rates),
            unit: "M/s",
            against: None,
            goal,
        });
        let row = |against, other: &Measured| Row {
            name: format!("{name}, time"),
            value: geometric_mean(&lodge.seconds),
            unit: "s",
            against: Some((against, geometric_mean(&other.seconds))),
            goal: Goal::None,
        };
        rows.extend([row("QEMU TCG", &qemu), row("native", &native)]);
    }
    Ok(rows)
}

/// How many instructions each program has. QEMU counts them: with `-icount shift=0` its TSC ticks
/// once for each, so that the guest prints them as ticks.
fn instructions(guest: &Path, count: usize) -> Result<Vec<f64>> {
    let mut qemu = guest::qemu();
    qemu.args(["-icount", "shift=0", "-m", "64", "-device", "isa-debug-exit,iobase=0xf4"]);
    let lines = lines_until(qemu.arg("-kernel").arg(guest), "LODGE-BENCH done")?;
    let runs = runs(&lines, count)?;
    let ticks = |line: &&Line| {
        let ticks = line.text.split("ticks=").nth(1).and_then(|rest| rest.split(' ').next());
        let ticks = ticks.and_then(|ticks| u64::from_str_radix(ticks, 16).ok());
        ticks.map(|ticks| ticks as f64).context("a line has no ticks")
    };
    runs.iter().step_by(RUNS).map(ticks).collect()
}

/// The lines of the programs' runs.
fn runs(lines: &[Line], count: usize) -> Result<Vec<&Line>> {
    let is_run = |line: &&Line| line.text.contains("LODGE-BENCH kernel=");
    let runs: Vec<&Line> = lines.iter().filter(is_run).collect();
    ensure!(runs.len() == count * RUNS, "{} runs were printed, not {}", runs.len(), count * RUNS);
    Ok(runs)
}

/// What a run of all programs gave.
struct Measured {
    /// Of each program, its best time.
    seconds: Vec<f64>,
    /// Of each program, what it computed.
    results: Vec<String>,
}

fn measure(command: &mut Command, count: usize) -> Result<Measured> {
    let lines = lines_until(command, "LODGE-BENCH done")?;
    let runs = runs(&lines, count)?;
    let mut measured = Measured { seconds: Vec::new(), results: Vec::new() };
    for program in runs.chunks(RUNS) {
        // The first run has no line of the same program before it, and warms up.
        let times = program.windows(2).map(|pair| (pair[1].at - pair[0].at).as_secs_f64());
        measured.seconds.push(times.fold(f64::INFINITY, f64::min));
        let result = program[0].text.split("result=").nth(1).context("a line has no result")?;
        measured.results.push(result.to_owned());
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_read_from_the_lines() {
        let run = |program: usize| {
            format!("echo LODGE-BENCH kernel={program} ticks=1 result=a{program}; sleep 0.01; ")
        };
        let script = [run(0).repeat(3), run(1).repeat(3), "echo LODGE-BENCH done".into()].concat();
        let measured = measure(Command::new("sh").args(["-c", &script]), 2).unwrap();
        assert_eq!(measured.results, ["a0", "a1"]);
        assert!(measured.seconds.iter().all(|seconds| seconds.is_finite() && *seconds > 0.0));
        assert!(measure(Command::new("sh").args(["-c", &script]), 3).is_err());
    }
}
