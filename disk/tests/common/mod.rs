//! A guest for the tests: it submits, waits and keeps a model of what the disk should hold.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use lodge_disk::{Buffer, Completion, Disk, DiskQueue, EngineChoice, Op, OpenOptions, Request};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Both engines. io_uring is asked for by name: where it is not allowed, the tests say so loudly.
pub const ENGINES: [EngineChoice; 2] = [EngineChoice::IoUring, EngineChoice::Threads];

pub fn options(path: &Path) -> OpenOptions {
    OpenOptions::new(path)
}

/// Pieces of `data`, at most `size` bytes each.
pub fn buffers(data: &mut [u8], size: usize) -> Vec<Buffer> {
    data.chunks_mut(size).map(|c| Buffer { ptr: c.as_mut_ptr(), len: c.len() }).collect()
}

/// Waits (at most a minute) until the queue has something, and takes it.
pub fn wait(queue: &mut dyn DiskQueue, out: &mut Vec<Completion>) {
    let before = out.len();
    while out.len() == before {
        let mut poll = libc::pollfd {
            fd: queue.completion_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, 60_000) };
        assert!(ready != 0, "no completion within a minute; {} in flight", queue.in_flight());
        queue.complete(out);
    }
}

/// One request at a time.
pub struct Guest {
    queue: Box<dyn DiskQueue>,
}

impl Guest {
    pub fn new(disk: &dyn Disk) -> Self {
        Self { queue: disk.queue().unwrap() }
    }

    pub fn run(&mut self, op: Op) -> io::Result<u64> {
        // SAFETY: the callers' buffers outlive this call, which waits for the completion.
        unsafe { self.queue.submit(Request { id: 42, op }).unwrap() };
        let mut out = Vec::new();
        wait(&mut *self.queue, &mut out);
        assert_eq!((out.len(), out[0].id, self.queue.in_flight()), (1, 42, 0));
        out.pop().unwrap().result
    }

    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0xee; len];
        let buffers = buffers(&mut data, 4096);
        let n = self.run(Op::Read { offset, buffers })?;
        assert_eq!(n, len as u64);
        Ok(data)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<u64> {
        let mut data = data.to_vec();
        let buffers = buffers(&mut data, 65536);
        self.run(Op::Write { offset, buffers })
    }

    pub fn flush(&mut self) -> io::Result<u64> {
        self.run(Op::Flush)
    }

    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<u64> {
        self.run(Op::Discard { offset, len })
    }

    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<u64> {
        self.run(Op::WriteZeroes { offset, len, unmap })
    }
}

/// What is known of the disk: bytes, and whether they are (a discarded range may read as it did, or as zeroes).
pub struct Model {
    pub bytes: Vec<u8>,
    known: Vec<bool>,
}

impl Model {
    pub fn of(bytes: Vec<u8>) -> Self {
        let known = vec![true; bytes.len()];
        Self { bytes, known }
    }

    pub fn check(&self, offset: usize, seen: &[u8]) {
        for (i, &byte) in seen.iter().enumerate() {
            let at = offset + i;
            let right = byte == self.bytes[at] || (!self.known[at] && byte == 0);
            assert!(right, "byte {at:#x}: {byte:#x} instead of {:#x}", self.bytes[at]);
        }
    }
}

struct Pending {
    queue: usize,
    data: Vec<u8>,
    op: Op,
    range: (u64, u64),
}

/// Thousands of random requests, up to 16 at a time on three queues. Those in flight together overlap
/// only when both read, so a model can tell what must come out.
pub fn stress(disk: &dyn Disk, count: usize, seed: u64) {
    let mut guest = Guest::new(disk);
    let bytes = guest.read(0, disk.size() as usize).unwrap();
    drop(guest);
    let mut model = Model::of(bytes);
    stress_with(disk, count, seed, &mut model);
}

pub fn stress_with(disk: &dyn Disk, count: usize, seed: u64, model: &mut Model) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut queues: Vec<_> = (0..3).map(|_| disk.queue().unwrap()).collect();
    let mut pending: HashMap<u64, Pending> = HashMap::new();
    let size = disk.size();
    for id in 0..count as u64 {
        while pending.len() >= 16 {
            take(&mut queues, &mut pending, model);
        }
        let Some((kind, offset, len)) = pick(&mut rng, size, &pending) else {
            take(&mut queues, &mut pending, model);
            continue;
        };
        let mut data = vec![0u8; if kind < 7 { len as usize } else { 0 }];
        if kind < 4 {
            rng.fill(&mut data[..]);
        }
        let piece = rng.random_range(1..9) * 512;
        let op = match kind {
            0..4 => Op::Write { offset, buffers: buffers(&mut data, piece) },
            4..7 => Op::Read { offset, buffers: buffers(&mut data, piece) },
            7 => Op::Discard { offset, len },
            8 => Op::WriteZeroes { offset, len, unmap: rng.random() },
            _ => Op::Flush,
        };
        let queue = rng.random_range(0..queues.len());
        let range = if kind < 9 { (offset, len) } else { (0, 0) };
        // SAFETY: `data` is kept in `pending` until the completion; its heap memory does not move.
        unsafe { queues[queue].submit(Request { id, op: op.clone() }).unwrap() };
        pending.insert(id, Pending { queue, data, op, range });
    }
    while !pending.is_empty() {
        take(&mut queues, &mut pending, model);
    }
    let mut guest = Guest::new(disk);
    model.check(0, &guest.read(0, size as usize).unwrap());
}

fn pick(rng: &mut StdRng, size: u64, pending: &HashMap<u64, Pending>) -> Option<(u32, u64, u64)> {
    for _ in 0..20 {
        let kind = rng.random_range(0..10u32);
        let longest = if rng.random_bool(0.1) { 600 << 10 } else { 24 << 10 };
        let unit = if rng.random_bool(0.8) { 512 } else { 1 };
        let offset = rng.random_range(0..size) / unit * unit;
        let len = (rng.random_range(1..longest) / unit * unit).max(unit).min(size - offset);
        let reads = (4..7).contains(&kind);
        let clash = pending.values().any(|p| {
            let both_read = reads && matches!(p.op, Op::Read { .. });
            let (other, other_len) = p.range;
            !both_read && offset < other + other_len && other < offset + len
        });
        if !clash {
            return Some((kind, offset, len));
        }
    }
    None
}

fn take(queues: &mut [Box<dyn DiskQueue>], pending: &mut HashMap<u64, Pending>, model: &mut Model) {
    let busy = pending.values().next().expect("something is in flight").queue;
    let mut out = Vec::new();
    wait(&mut *queues[busy], &mut out);
    for done in out {
        let Pending { op, data, range: (offset, len), .. } = pending.remove(&done.id).unwrap();
        let done = done.result.unwrap();
        let range = offset as usize..(offset + len) as usize;
        match op {
            Op::Read { .. } => model.check(range.start, &data),
            Op::Write { .. } => {
                model.bytes[range.clone()].copy_from_slice(&data);
                model.known[range].fill(true);
            }
            Op::WriteZeroes { .. } => {
                model.bytes[range.clone()].fill(0);
                model.known[range].fill(true);
            }
            Op::Discard { .. } => model.known[range].fill(false),
            Op::Flush => assert_eq!(done, 0),
        }
        assert_eq!(done, len);
    }
}

/// A file system of a few MiB, to be filled. Needs root.
pub struct SmallFs {
    path: PathBuf,
}

impl SmallFs {
    pub fn mount(dir: &Path, size: u64) -> Option<Self> {
        // SAFETY: always succeeds.
        if unsafe { libc::geteuid() } != 0 {
            println!("SKIPPED: mounting a small file system needs root");
            return None;
        }
        let path = dir.join("small");
        std::fs::create_dir_all(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&path)
            .status();
        assert!(mounted.unwrap().success(), "cannot mount a tmpfs");
        Some(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // Lazily: when a test fails, the disk may still be open here.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
