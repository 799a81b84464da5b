//! Power failures: everything that the owner writes is noted, and images are made of what a disk could hold if the
//! power went at some moment: all that was synced, and any part of what was written since. `qemu-img check`
//! judges: leaks are allowed, corruptions are not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::chain::{Chain, Layer};
use super::header::REFCOUNT_TABLE_FIELD;
use super::metadata::{Clear, Generations, Metadata, NewRun, Outcome, Piece};
use super::metafile::Event;
use super::{open_metadata, parse};
use crate::open::ImageFile;

fn create(path: &Path, size: u64, opts: &str) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", opts])
        .arg(path)
        .arg(size.to_string())
        .status();
    assert!(made.expect("this test needs qemu-img (Debian: qemu-utils)").success());
}

/// Runs random requests as the owner's thread would; returns what was written, in order.
fn work(path: &Path, rng: &mut StdRng, steps: usize) -> Vec<Event> {
    let image = ImageFile::open(path, false).unwrap();
    let (header, map) = parse(&image).unwrap();
    let chain = Arc::new(Chain { layers: vec![Layer { image, map: Some(map) }] });
    let generations = Arc::<Generations>::default();
    let mut metadata = open_metadata(&chain, &generations, &header).unwrap();
    let geometry = chain.top().geometry;
    let (size, bits) = (geometry.size, geometry.cluster_bits);
    let mut open_runs: Vec<NewRun> = Vec::new();
    let mut held = Vec::new();
    for _ in 0..steps {
        match rng.random_range(0..12u32) {
            0..5 => {
                let offset = rng.random_range(0..size);
                let len = rng.random_range(1..=(size - offset).min((20 << bits).max(128 << 10)));
                if let Outcome::Done(pieces) = metadata.prepare(offset, len, false).unwrap() {
                    let runs = pieces.into_iter().filter_map(|p| match p {
                        Piece::New(run) => Some(run),
                        Piece::InPlace { .. } => None,
                    });
                    open_runs.extend(runs);
                }
            }
            5..8 if !open_runs.is_empty() => {
                let run = open_runs.swap_remove(rng.random_range(0..open_runs.len()));
                let written = rng.random_bool(0.9);
                if written {
                    write_data(&chain, &metadata, &run);
                }
                metadata.finish(run.id, written).unwrap();
            }
            8 | 9 => {
                let first = rng.random_range(0..size >> bits);
                let count = rng.random_range(1..=((size >> bits) - first).min(30));
                let how = if rng.random() { Clear::Discard } else { Clear::Zero };
                // An unfinished write may be in its way; another time, then.
                let _ = metadata.clear(first..first + count, how).unwrap();
            }
            // Requests that go on while others begin and end.
            10 => held.push(generations.enter()),
            _ => {
                held.truncate(rng.random_range(0..=held.len()));
                metadata.commit().unwrap();
            }
        }
        metadata.tidy().unwrap();
    }
    for run in open_runs {
        metadata.finish(run.id, false).unwrap();
    }
    held.clear();
    metadata.close().unwrap();
    metadata.file.log.into_inner().unwrap()
}

fn write_data(chain: &Chain, metadata: &Metadata, run: &NewRun) {
    let kept: u64 = run.head.iter().chain(&run.tail).map(|s| s.len).sum();
    let bytes = vec![0xda; (kept + run.len) as usize];
    chain.layers[0].image.file.write_all_at(&bytes, run.host).unwrap();
    metadata.file.log.lock().unwrap().push(Event::Write(run.host, bytes));
}

fn apply(file: &File, event: &Event) {
    match event {
        Event::Write(offset, bytes) => file.write_all_at(bytes, *offset).unwrap(),
        Event::Punch(offset, len) => {
            let end = file.metadata().unwrap().len().min(offset + len);
            let zeroes = vec![0; end.saturating_sub(*offset) as usize];
            file.write_all_at(&zeroes, *offset).unwrap();
        }
        Event::Sync => {}
    }
}

fn check(path: &Path, what: &str) {
    let out = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    let code = out.status.code();
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(code == Some(0) || code == Some(3), "{what}: {text}");
}

/// Returns how often the refcount table has moved.
fn fail_everywhere(opts: &str, size: u64, steps: usize, seed: u64) -> usize {
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("a.qcow2"), dir.path().join("crash.qcow2"));
    create(&path, size, opts);
    let before = fs::read(&path).unwrap();
    let log = work(&path, &mut rng, steps);
    check(&path, "at the end");
    assert!(log.iter().filter(|e| matches!(e, Event::Sync)).count() > 20, "too little happened");
    // Anywhere, and more often just after the refcount table has moved.
    let moved = |e: &Event| matches!(e, Event::Write(REFCOUNT_TABLE_FIELD, _));
    let moves: Vec<usize> = (0..log.len()).filter(|&i| moved(&log[i])).collect();
    for round in 0..60 {
        let crash = match moves.get(round % 8) {
            Some(at) => at + 1,
            None => rng.random_range(0..=log.len()),
        };
        let synced = log[..crash].iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
        fs::write(&copy, &before).unwrap();
        let file = File::options().read(true).write(true).open(&copy).unwrap();
        log[..synced].iter().for_each(|e| apply(&file, e));
        let share = rng.random_range(0.0..1.0);
        for event in &log[synced..crash] {
            if rng.random_bool(share) {
                apply(&file, event);
            }
        }
        check(&copy, &format!("{opts}, seed {seed}, power lost at {crash} of {}", log.len()));
    }
    moves.len()
}

#[test]
fn power_may_fail_at_any_moment() {
    fail_everywhere("cluster_size=4096", 4 << 20, 400, 1);
    fail_everywhere("cluster_size=65536", 64 << 20, 400, 2);
    fail_everywhere("cluster_size=4096,compat=0.10", 4 << 20, 400, 3);
}

#[test]
fn power_may_fail_while_the_refcount_table_moves() {
    // The first table covers 2 MiB.
    let moves = fail_everywhere("cluster_size=512,refcount_bits=64", 12 << 20, 4000, 4);
    assert!(moves > 0);
}
