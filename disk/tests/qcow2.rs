//! qcow2 images: made, filled and judged by QEMU's tools (Debian: qemu-utils).

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::{ENGINES, Guest, Model, buffers, options, stress_with, wait};
use lodge_disk::{Disk, Error, Format, Op, OpenOptions, Request, open};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const MIB: u64 = 1 << 20;

fn qemu_img(arguments: &[&str]) -> (i32, String) {
    let out = Command::new("qemu-img").args(arguments).output();
    let out = out.expect("this test needs qemu-img (Debian: qemu-utils)");
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text.into_owned())
}

fn must(arguments: &[&str]) {
    let (code, text) = qemu_img(arguments);
    assert_eq!(code, 0, "qemu-img {arguments:?}: {text}");
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn create(path: &Path, size: u64, opts: &str) {
    must(&["create", "-q", "-f", "qcow2", "-o", opts, str(path), &size.to_string()]);
}

/// No errors, and no leaks unless they are allowed.
fn check(path: &Path, leaks: bool) {
    let (code, text) = qemu_img(&["check", "-f", "qcow2", str(path)]);
    assert!(code == 0 || (leaks && code == 3), "qemu-img check: {code}: {text}");
}

/// What the guest sees, as QEMU reads it.
fn content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("judge");
    must(&["convert", "-f", "qcow2", "-O", "raw", str(path), str(&raw)]);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

fn failed(o: &OpenOptions) -> String {
    let mut text = String::new();
    let error = open(o).err().expect("it must be refused");
    let mut next: Option<&dyn std::error::Error> = Some(&error);
    while let Some(e) = next {
        text += &format!("{e}: ");
        next = e.source();
    }
    text
}

#[test]
fn random_parallel_requests_leave_what_a_model_says_and_a_clean_image() {
    let kinds = [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=1024,refcount_bits=64",
        "cluster_size=8192,preallocation=metadata",
    ];
    for (i, kind) in kinds.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let size = if kind.contains("2M") { 32 * MIB } else { 8 * MIB };
        create(&path, size, kind);
        let mut model = Model::of(vec![0; size as usize]);
        // Twice, so that the second finds what the first has left.
        for engine in ENGINES {
            let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
            assert_eq!(disk.size(), size);
            stress_with(&*disk, 1000, i as u64 * 2 + engine as u64, &mut model);
            drop(disk);
            check(&path, false);
            model.check(0, &content(&path));
        }
    }
}

#[test]
fn overlays_of_all_kinds_read_what_is_below_and_keep_it() {
    for (i, (kind, base_kind)) in [
        ("compat=1.1", "raw"),
        ("compat=1.1,cluster_size=4096", "qcow2"),
        ("compat=0.10", "qcow2"),
        ("compat=1.1", "compressed"),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base"), dir.path().join("a.qcow2"));
        // Shorter than the overlay, and not of whole clusters.
        let data = pattern(3 * MIB + 1024, i as u64);
        let raw = dir.path().join("raw");
        fs::write(&raw, &data).unwrap();
        let format = match base_kind {
            "raw" => {
                fs::rename(&raw, &base).unwrap();
                "raw"
            }
            "qcow2" => {
                must(&["convert", "-f", "raw", "-O", "qcow2", str(&raw), str(&base)]);
                "qcow2"
            }
            _ => {
                must(&["convert", "-c", "-f", "raw", "-O", "qcow2", str(&raw), str(&base)]);
                "qcow2"
            }
        };
        // Named relative to the overlay's folder.
        let size = (8 * MIB).to_string();
        let o = format!("{kind},backing_file=base,backing_fmt={format}");
        must(&["create", "-q", "-f", "qcow2", "-o", &o, str(&path), &size]);
        let before = fs::read(&base).unwrap();
        let mut bytes = data.clone();
        bytes.resize(8 << 20, 0);
        let mut model = Model::of(bytes);
        for engine in ENGINES {
            let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
            model.check(0, &Guest::new(&*disk).read(0, 8 << 20).unwrap());
            stress_with(&*disk, 800, i as u64, &mut model);
            drop(disk);
            check(&path, false);
            model.check(0, &content(&path));
        }
        assert!(before == fs::read(&base).unwrap(), "the base must not change");
    }
}

#[test]
fn compressed_images_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("a.qcow2"));
    let mut data: Vec<u8> = (0..8 * MIB).map(|i| (i / 4099) as u8).collect();
    data[..MIB as usize].copy_from_slice(&pattern(MIB, 1));
    fs::write(&raw, &data).unwrap();
    for kind in ["cluster_size=65536", "cluster_size=4096", "cluster_size=2M"] {
        must(&["convert", "-c", "-O", "qcow2", "-o", kind, str(&raw), str(&path)]);
        let mut model = Model::of(data.clone());
        let disk = open(&options(&path)).unwrap();
        stress_with(&*disk, 1000, 5, &mut model);
        drop(disk);
        check(&path, false);
        model.check(0, &content(&path));
    }
}

#[test]
fn a_flush_makes_data_and_metadata_durable_and_discards_give_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, 64 * MIB, "cluster_size=65536");
    let disk = open(&options(&path)).unwrap();
    let mut guest = Guest::new(&*disk);
    let data = pattern(32 * MIB, 1);
    guest.write(MIB, &data).unwrap();
    guest.flush().unwrap();
    // A copy of the file at this moment is what a power failure would leave, at worst.
    let copy = dir.path().join("copy.qcow2");
    fs::copy(&path, &copy).unwrap();
    check(&copy, false);
    assert!(content(&copy)[MIB as usize..33 << 20] == data);
    let blocks = |p: &Path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(p).unwrap());
    let full = blocks(&path);
    guest.discard(0, 64 * MIB).unwrap();
    guest.flush().unwrap();
    guest.flush().unwrap();
    assert!(blocks(&path) < full / 8, "{} of {full} blocks", blocks(&path));
    let len = fs::metadata(&path).unwrap().len();
    guest.write(0, &data).unwrap();
    assert_eq!(guest.read(0, data.len()).unwrap(), data);
    drop((guest, disk));
    assert!(fs::metadata(&path).unwrap().len() < len + 3 * MIB, "freed clusters are used again");
    check(&path, false);
}

#[test]
fn the_refcount_table_grows_with_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    // A table of one cluster of 512 bytes covers 64 blocks of 64 clusters (2 MiB) with 64-bit counts.
    create(&path, 48 * MIB, "cluster_size=512,refcount_bits=64");
    let disk = open(&options(&path)).unwrap();
    let mut guest = Guest::new(&*disk);
    let data = pattern(40 * MIB, 3);
    for (i, piece) in data.chunks(1 << 20).enumerate() {
        guest.write((i as u64) << 20, piece).unwrap();
        if i % 7 == 0 {
            guest.flush().unwrap();
            check_live(&path);
        }
    }
    drop((guest, disk));
    check(&path, false);
    assert!(content(&path)[..data.len()] == data);
}

/// Checks the image while we have it open, by a copy.
fn check_live(path: &Path) {
    let copy = path.with_extension("live");
    fs::copy(path, &copy).unwrap();
    check(&copy, true);
}

#[test]
fn a_full_host_fails_that_request_and_the_image_stays_clean() {
    let dir = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let Some(full) = common::SmallFs::mount(dir.path(), 8 << 20) else { return };
        let path = full.path().join("a.qcow2");
        create(&path, 64 * MIB, "cluster_size=65536");
        let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
        let mut guest = Guest::new(&*disk);
        let data = pattern(MIB, 1);
        guest.write(0, &data).unwrap();
        let mut refused = 0;
        for i in 1..32 {
            if let Err(e) = guest.write(i * 2 * MIB, &data) {
                assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{e}");
                refused += 1;
            }
        }
        assert!(refused > 20, "{refused}");
        guest.write(4096, &data[..4096]).unwrap();
        assert_eq!(guest.read(4096, 4096).unwrap(), &data[..4096]);
        guest.flush().unwrap();
        guest.discard(0, 64 * MIB).unwrap();
        guest.flush().unwrap();
        guest.flush().unwrap();
        guest.write(32 * MIB, &data).unwrap();
        assert_eq!(guest.read(32 * MIB, MIB as usize).unwrap(), data);
        drop((guest, disk));
        check(&path, true);
    }
}

#[test]
fn reads_and_writes_of_allocated_clusters_do_not_wait_for_others() {
    // Not a measurement: a queue whose thread looks away must not keep another from working, even while it has
    // new clusters under way.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, 64 * MIB, "cluster_size=65536");
    let disk = open(&options(&path)).unwrap();
    let mut guest = Guest::new(&*disk);
    guest.write(0, &[1; 65536]).unwrap();
    let mut data = vec![2u8; 1 << 20];
    let mut stuck = disk.queue().unwrap();
    let op = Op::Write { offset: 8 * MIB, buffers: buffers(&mut data, 65536) };
    // SAFETY: `data` outlives the queue's use of it: `wait` below ends it.
    unsafe { stuck.submit(Request { id: 9, op }).unwrap() };
    guest.write(100, &[3; 1000]).unwrap();
    guest.write(32 * MIB, &[4; 1000]).unwrap();
    // The very clusters that the other queue has asked for.
    guest.write(9 * MIB, &[5; 1000]).unwrap();
    guest.write_zeroes(9 * MIB + 65536 - 10, 20, true).unwrap();
    guest.flush().unwrap();
    assert_eq!(guest.read(100, 1000).unwrap(), [3; 1000]);
    let mut out = Vec::new();
    wait(&mut *stuck, &mut out);
    assert!(out[0].result.is_ok());
    drop(stuck);
    assert!(guest.read(8 * MIB, 1 << 20).unwrap() == data);
    drop((guest, disk));
    check(&path, false);
}

#[test]
fn what_cannot_be_opened_safely_is_refused_and_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let refused = |what: &str, writable_only: bool| {
        let before = fs::read(&path).unwrap();
        let text = failed(&options(&path));
        assert!(text.contains(what) && text.contains("a.qcow2"), "{what}: {text}");
        let read_only = OpenOptions { read_only: true, ..options(&path) };
        assert_eq!(open(&read_only).is_ok(), writable_only, "{what}");
        assert!(before == fs::read(&path).unwrap(), "{what}: it must not be written");
    };
    create(&path, MIB, "compat=1.1");
    must(&["snapshot", "-c", "one", str(&path)]);
    refused("internal snapshots", true);
    create(&path, MIB, "compat=1.1");
    must(&["bitmap", "--add", str(&path), "b0"]);
    refused("bitmaps", true);
    create(&path, MIB, "compat=1.1,compression_type=zstd");
    refused("compressed with something newer", false);
    create(&path, MIB, "compat=1.1,extended_l2=on");
    refused("subclusters", false);
    let data = dir.path().join("data.raw");
    create(&path, MIB, &format!("data_file={}", str(&data)));
    refused("another file", false);
    create(&path, MIB, "compat=1.1");
    let set = |at, bytes: &[u8]| {
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(bytes, at).unwrap();
    };
    set(79, &[1]);
    refused("marked dirty", true);
    set(79, &[2]);
    refused("marked corrupt", false);
    set(72, &[0x80, 0, 0, 0, 0, 0, 0, 0]);
    refused("unknown incompatible features", false);
    set(72, &[0; 8]);
    set(7, &[9]);
    refused("version 9", false);
}

#[test]
fn unknown_autoclear_features_are_cleared_by_a_writer_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, MIB, "compat=1.1");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[0x40], 88).unwrap();
    let bits = || {
        let mut byte = [0];
        file.read_exact_at(&mut byte, 88).unwrap();
        byte[0]
    };
    drop(open(&OpenOptions { read_only: true, ..options(&path) }).unwrap());
    assert_eq!(bits(), 0x40);
    drop(open(&options(&path)).unwrap());
    assert_eq!(bits(), 0);
}

#[test]
fn backing_files_that_cannot_be_had_are_told_with_both_names() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.img"), dir.path().join("a.qcow2"));
    fs::write(&base, vec![1; MIB as usize]).unwrap();
    let overlay = |o: &str| {
        let _ = fs::remove_file(&path);
        let size = MIB.to_string();
        must(&["create", "-q", "-u", "-f", "qcow2", "-o", o, str(&path), &size]);
    };
    overlay("backing_file=base.img,backing_fmt=raw");
    drop(open(&options(&path)).unwrap());
    fs::rename(&base, dir.path().join("gone")).unwrap();
    let text = failed(&options(&path));
    assert!(text.contains("base.img") && text.contains("a.qcow2"), "{text}");
    assert!(text.contains("No such file"), "{text}");

    overlay("backing_file=a.qcow2,backing_fmt=qcow2");
    assert!(matches!(
        open(&options(&path)),
        Err(Error::Backing { .. } | Error::BackingLoop { .. })
    ));
    let read_only = OpenOptions { read_only: true, ..options(&path) };
    assert!(matches!(open(&read_only), Err(Error::BackingLoop { .. })));

    overlay("backing_file=nbd://host/x,backing_fmt=raw");
    assert!(failed(&options(&path)).contains("is not named by a path"));
    create(&base, MIB, "compat=1.1");
    overlay("backing_file=base.img,backing_fmt=vmdk");
    assert!(failed(&options(&path)).contains("vmdk"));

    // Two machines may share a base; nobody may write it meanwhile.
    overlay("backing_file=base.img,backing_fmt=qcow2");
    let _first = open(&options(&path)).unwrap();
    assert!(matches!(open(&options(&base)), Err(Error::Locked { .. })));
    let second = dir.path().join("b.qcow2");
    let o = "backing_file=base.img,backing_fmt=qcow2";
    must(&["create", "-q", "-u", "-f", "qcow2", "-o", o, str(&second), &MIB.to_string()]);
    assert!(open(&options(&second)).is_ok());
}

#[test]
fn a_backing_file_is_not_guessed_to_be_qcow2() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.img"), dir.path().join("a.qcow2"));
    create(&base, MIB, "compat=1.1");
    let o = "backing_file=base.img,backing_fmt=qcow2,compat=0.10";
    must(&["create", "-q", "-f", "qcow2", "-o", o, str(&path), &MIB.to_string()]);
    // Takes the extension that tells the format away.
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut header = [0; 512];
    file.read_exact_at(&mut header, 0).unwrap();
    let at = header.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    file.write_all_at(&[0, 0, 0, 1], at as u64).unwrap();
    drop(file);
    assert!(failed(&options(&path)).contains("does not say of which format"));
    fs::write(&base, vec![7; MIB as usize]).unwrap();
    let disk = open(&options(&path)).unwrap();
    assert_eq!(Guest::new(&*disk).read(0, 3).unwrap(), [7; 3]);
}

#[test]
fn truncated_images_are_refused_or_fail_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, 4 * MIB, "cluster_size=4096");
    let disk = open(&options(&path)).unwrap();
    Guest::new(&*disk).write(0, &pattern(4 * MIB, 1)).unwrap();
    drop(disk);
    let whole = fs::read(&path).unwrap();
    let forced = OpenOptions { format: Some(Format::Qcow2), ..options(&path) };
    for len in [0, 3, 4, 50, 100, 104, 511, 4096, 8192, 12288, 16384, 100_000, 2 << 20, 4 << 20] {
        fs::write(&path, &whole[..len]).unwrap();
        match open(&forced) {
            Err(e) => assert!(format!("{e}").contains("a.qcow2"), "{e}"),
            Ok(disk) => assert!(Guest::new(&*disk).read(0, 4 << 20).is_err(), "{len}"),
        }
    }
    fs::write(&path, vec![0; 65536]).unwrap();
    assert!(failed(&forced).contains("format=raw"));
}

/// Changes bytes where they hurt most: header, L1, L2, refcounts. Nothing may panic, hang or take much memory.
#[test]
fn damaged_images_end_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut rng = StdRng::seed_from_u64(7);
    for kind in ["cluster_size=4096", "cluster_size=512,compat=0.10", "cluster_size=65536"] {
        create(&path, 2 * MIB, kind);
        let disk = open(&options(&path)).unwrap();
        Guest::new(&*disk).write(0, &pattern(MIB, 1)).unwrap();
        drop(disk);
        let whole = fs::read(&path).unwrap();
        let be64 = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
        let (l1, refs) = (be64(40) as usize, be64(48) as usize);
        let l2 = (be64(l1) & 0x00ff_ffff_ffff_fe00) as usize;
        let block = be64(refs) as usize;
        let values =
            [0, 1, 0x200, 0x1000, 1 << 62, u64::MAX, 1 << 63, refs as u64, l2 as u64 | 1 << 63];
        for round in 0..150 {
            let mut bytes = whole.clone();
            for _ in 0..rng.random_range(1..4) {
                let (start, len) = [(0, 112), (l1, 64), (l2, 512), (refs, 64), (block, 512)]
                    [rng.random_range(0..5usize)];
                let at = start + rng.random_range(0..len / 8) * 8;
                if rng.random() {
                    let value = values[rng.random_range(0..values.len())];
                    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
                } else {
                    bytes[at + rng.random_range(0..8usize)] ^= 1 << rng.random_range(0..8u32);
                }
            }
            fs::write(&path, &bytes).unwrap();
            let forced = OpenOptions { format: Some(Format::Qcow2), ..options(&path) };
            let Ok(disk) = open(&forced) else { continue };
            if disk.size() > 64 * MIB {
                continue;
            }
            let mut guest = Guest::new(&*disk);
            for step in 0..20 {
                let offset = rng.random_range(0..disk.size());
                let len = rng.random_range(1..=(disk.size() - offset).min(200_000));
                // Whether they fail is up to the damage.
                let _ = match (step + round) % 5 {
                    0 => guest.read(offset, len as usize).map(drop),
                    1 => guest.discard(offset, len).map(drop),
                    2 => guest.write_zeroes(offset, len, true).map(drop),
                    3 => guest.flush().map(drop),
                    _ => guest.write(offset, &vec![1; len as usize]).map(drop),
                };
            }
        }
    }
}

/// Not a test of its own: what the crash test runs as a process, to be killed.
#[test]
fn crash_writer() {
    let Ok(path) = std::env::var("LODGE_CRASH_IMAGE") else { return };
    let seed = std::env::var("LODGE_CRASH_SEED").unwrap().parse().unwrap();
    let disk = open(&options(path.as_ref())).unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut queues: Vec<_> = (0..2).map(|_| disk.queue().unwrap()).collect();
    let mut id = 0;
    loop {
        // A stamp in each of some clusters, among other requests; then a flush, and the word that it is safe.
        let stamp = rng.random::<u64>();
        let mut data: Vec<Vec<u8>> = Vec::new();
        let mut waiting = [0; 2];
        let slots: Vec<u64> = (0..8).map(|i| i * 8 + rng.random_range(0..8)).collect();
        for &slot in &slots {
            data.push(stamp.to_le_bytes().repeat(512));
            let op = Op::Write {
                offset: slot * 65536 + 4096,
                buffers: buffers(data.last_mut().unwrap(), 4096),
            };
            let queue = (slot % 2) as usize;
            // SAFETY: `data` lives until all are waited for.
            unsafe { queues[queue].submit(Request { id, op }).unwrap() };
            waiting[queue] += 1;
            id += 1;
        }
        for _ in 0..8 {
            // Beyond the stamps: cleared and written at random.
            let offset = 8 * MIB + rng.random_range(0..64) * 65536;
            let op = match rng.random_range(0..3u32) {
                0 => Op::Discard { offset, len: 3 * 65536 },
                1 => Op::WriteZeroes { offset, len: 100_000, unmap: true },
                _ => {
                    data.push(vec![1; 70_000]);
                    Op::Write { offset, buffers: buffers(data.last_mut().unwrap(), 4096) }
                }
            };
            // SAFETY: as above.
            unsafe { queues[0].submit(Request { id, op }).unwrap() };
            waiting[0] += 1;
            id += 1;
        }
        for (queue, waiting) in queues.iter_mut().zip(waiting) {
            let mut out = Vec::new();
            while out.len() < waiting {
                wait(&mut **queue, &mut out);
            }
            assert!(out.iter().all(|c| c.result.is_ok()));
        }
        // SAFETY: no buffers.
        unsafe { queues[1].submit(Request { id, op: Op::Flush }).unwrap() };
        wait(&mut *queues[1], &mut Vec::new());
        let mut line = format!("flushed {stamp}");
        slots.iter().for_each(|s| line += &format!(" {s}"));
        println!("{line}");
        std::io::stdout().flush().unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_no_corruption_and_all_that_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("a.qcow2");
    let mut rng = StdRng::seed_from_u64(99);
    create(&path, 16 * MIB, "cluster_size=65536");
    let mut flushes = 0;
    for round in 0..25 {
        if round % 8 == 0 {
            create(&path, 16 * MIB, "cluster_size=65536");
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_writer", "--nocapture"])
            .env("LODGE_CRASH_IMAGE", &path)
            .env("LODGE_CRASH_SEED", round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let reader = thread::spawn(move || {
            let lines: Vec<String> = output.lines().map_while(Result::ok).collect();
            lines
        });
        thread::sleep(Duration::from_millis(rng.random_range(20..250)));
        child.kill().unwrap();
        child.wait().unwrap();
        let lines = reader.join().unwrap();
        // A machine that is started again at once must get its disk.
        drop(open(&OpenOptions { read_only: true, ..options(&path) }).unwrap());
        check(&path, true);
        // The last stamp of each slot that was flushed; the one after may have been on its way.
        let bytes = content(&path);
        let last = lines.iter().rev().find_map(|l| Some(l.split_once("flushed ")?.1.to_owned()));
        if let Some(last) = last {
            flushes += 1;
            let mut words = last.split(' ').map(|w| w.parse::<u64>().unwrap());
            let stamp = words.next().unwrap();
            for slot in words {
                let at = (slot * 65536 + 4096) as usize;
                let seen = &bytes[at..at + 4096];
                let whole = seen.chunks(8).all(|c| c == &seen[..8]);
                let newer = whole && seen[..8] != [0; 8];
                assert!(seen == stamp.to_le_bytes().repeat(512) || newer, "slot {slot}");
            }
        }
        // Leaks are all that may be wrong; without them the image is like new.
        let _ = qemu_img(&["check", "-r", "leaks", str(&path)]);
        check(&path, false);
    }
    assert!(flushes > 5, "the writers must get to work: {flushes}");
}

#[test]
fn many_queues_on_one_disk_see_each_others_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, 16 * MIB, "cluster_size=65536");
    let disk = open(&options(&path)).unwrap();
    thread::scope(|scope| {
        for t in 0..4u64 {
            let disk: &dyn Disk = &*disk;
            scope.spawn(move || {
                let mut guest = Guest::new(disk);
                // Each in its own quarter of every cluster.
                for i in 0..256 {
                    let data = pattern(16384, t * 1000 + i);
                    guest.write(i * 65536 + t * 16384, &data).unwrap();
                    if i % 50 == 0 {
                        guest.flush().unwrap();
                    }
                }
            });
        }
    });
    let mut guest = Guest::new(&*disk);
    for i in 0..256 {
        let expected: Vec<u8> = (0..4).flat_map(|t| pattern(16384, t * 1000 + i)).collect();
        assert!(guest.read(i * 65536, 65536).unwrap() == expected, "cluster {i}");
    }
    drop((guest, disk));
    check(&path, false);
}
