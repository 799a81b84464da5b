//! Jobs on a ring of the queue's own.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::job::{Call, Job};
use super::{Done, Engine, Io};

/// Submissions that the ring holds. The kernel makes room for twice as many completions: no more jobs than
/// entries are in the kernel at once, so completions never overflow.
const ENTRIES: u32 = 256;

/// Whether this process may have rings that can do what is needed here.
pub(crate) fn probe() -> io::Result<()> {
    let ring = IoUring::new(2)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed =
        [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    if needed.iter().all(|&code| probe.is_supported(code)) && ring.params().is_feature_nodrop() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"))
    }
}

/// A ring and the jobs in it.
pub(crate) struct Uring {
    ring: IoUring,
    /// Jobs in the kernel; the index is their `user_data`.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that wait for a place in the ring.
    waiting: VecDeque<Job>,
    in_kernel: usize,
    /// Jobs that needed no call at all.
    ended: Vec<Done>,
    event: EventFd,
}

impl Uring {
    pub(crate) fn new(event: &EventFd) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            jobs: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            in_kernel: 0,
            ended: Vec::new(),
            event: event.try_clone()?,
        })
    }

    /// Puts the job's next call into the ring. There is room: `in_kernel` is below `ENTRIES`.
    fn push(&mut self, mut job: Job) {
        let call = job.next();
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[index] = Some(job);
        self.in_kernel += 1;
        let entry = entry(&call).user_data(index as u64);
        loop {
            // SAFETY: the job, which owns the vectors, stays in `jobs` until its completion is seen (also in `drop`); what
            // they point to is valid by the contract of `Engine::submit`.
            match unsafe { self.ring.submission().push(&entry) } {
                Ok(()) => return,
                Err(_) => self.enter(0),
            }
        }
    }

    /// Hands over what is in the submission ring, and waits for `wanted` completions.
    fn enter(&mut self, wanted: usize) {
        loop {
            match self.ring.submitter().submit_and_wait(wanted) {
                Ok(_) => return,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // EAGAIN and EBUSY: short of memory, or completions must be taken first. The entries stay in
                // the ring; jobs already in the kernel wake us to try again, and without any we wait a little.
                Err(e) => {
                    if self.in_kernel > self.ring.submission().len() {
                        return;
                    }
                    tracing::warn!(error = %e, "io_uring takes no requests now");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    /// Fills the ring from `waiting`.
    fn pump(&mut self) {
        while self.in_kernel < ENTRIES as usize
            && let Some(job) = self.waiting.pop_front()
        {
            self.push(job);
        }
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }
}

fn entry(call: &Call) -> squeue::Entry {
    match *call {
        Call::Readv { fd, iov, count, offset } => {
            opcode::Readv::new(types::Fd(fd), iov, count).offset(offset).build()
        }
        Call::Writev { fd, iov, count, offset } => {
            opcode::Writev::new(types::Fd(fd), iov, count).offset(offset).build()
        }
        Call::Fdatasync { fd } => {
            opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build()
        }
        Call::Fallocate { fd, mode, offset, len } => {
            opcode::Fallocate::new(types::Fd(fd), len).mode(mode).offset(offset).build()
        }
    }
}

impl Engine for Uring {
    unsafe fn submit(&mut self, file: &Arc<File>, token: u64, io: Io) -> io::Result<()> {
        let job = Job::new(file.clone(), token, io);
        if job.is_empty() {
            self.ended.push(Done { token, result: Ok(0) });
            return self.event.write(1);
        }
        self.waiting.push_back(job);
        self.pump();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Done>) {
        out.append(&mut self.ended);
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            let index = entry.user_data() as usize;
            let Some(mut job) = self.jobs.get_mut(index).and_then(Option::take) else { continue };
            self.free.push(index);
            self.in_kernel -= 1;
            match job.advance(entry.result().into()) {
                Some(result) => out.push(Done { token: job.token, result }),
                None => self.waiting.push_front(job),
            }
        }
        self.pump();
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let mut out = Vec::new();
        loop {
            self.reap(&mut out);
            if self.in_kernel == 0 {
                break;
            }
            self.enter(1);
        }
    }
}
