//! One I/O thread's way to its disks: jobs begin, their requests run, and they end in any order.
//!
//! ```text
//!   Lane::start(medium, job, tag) --> DiskQueue of that medium (made when it is first needed)
//!                                         |
//!   Lane::complete() <-- epoll <-- eventfd of each DiskQueue
//! ```
//!
//! A lane's descriptor ([`AsRawFd`]) is readable when [`Lane::complete`] has something to do.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use lodge_disk::{Completion, DiskQueue, Op, Request};
use lodge_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::command::{Medium, changes};
use super::job::{Fault, Job};

/// A job that has ended.
pub struct Ended<T> {
    /// What the submitter called it.
    pub tag: T,
    /// The job, which knows what was transferred.
    pub job: Job,
    /// How it ended.
    pub result: Result<(), Fault>,
}

struct Running<T> {
    tag: T,
    job: Job,
    medium: u64,
}

/// A medium in use.
struct Open {
    medium: u64,
    queue: Box<dyn DiskQueue>,
}

/// The disks of one I/O thread, with the jobs that they have.
pub struct Lane<T> {
    /// Before `memory`, which keeps guest RAM mapped, and before `running`, which owns what else requests
    /// use: dropping a queue waits for what is in flight.
    open: Vec<Open>,
    memory: Arc<GuestMemory>,
    /// By request id; a free place is `None`.
    running: Vec<Option<Running<T>>>,
    free: Vec<usize>,
    epoll: Epoll,
    completions: Vec<Completion>,
    /// A failure was told: a full disk fails as often as the guest tries.
    complained: bool,
}

impl<T> Lane<T> {
    /// A lane without disks.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(memory: Arc<GuestMemory>) -> io::Result<Self> {
        Ok(Self {
            open: Vec::new(),
            memory,
            running: Vec::new(),
            free: Vec::new(),
            epoll: Epoll::new()?,
            completions: Vec::new(),
            complained: false,
        })
    }

    /// Guest RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Jobs that have begun and not ended.
    pub fn in_flight(&self) -> usize {
        self.running.len() - self.free.len()
    }

    /// The tags of the jobs that have begun and not ended.
    pub fn tags(&mut self) -> impl Iterator<Item = &mut T> {
        self.running.iter_mut().flatten().map(|running| &mut running.tag)
    }

    /// Begins a job. One that ends at once is returned.
    pub fn start(&mut self, medium: &Medium, mut job: Job, tag: T) -> Option<Ended<T>> {
        let op = match job.begin(&self.memory) {
            Ok(Some(op)) => op,
            end => return Some(Ended { tag, job, result: end.map(drop) }),
        };
        let id = self.free.pop().unwrap_or_else(|| {
            self.running.push(None);
            self.running.len() - 1
        });
        let writes = changes(&op);
        let submitted = self.queue(medium).and_then(|open| submit(open, id, op));
        match submitted {
            Ok(()) => {
                self.running[id] = Some(Running { tag, job, medium: medium.id() });
                None
            }
            Err(error) => {
                self.free.push(id);
                Some(Ended { tag, job, result: Err(refused(&error, writes)) })
            }
        }
    }

    /// The queue of a medium.
    fn queue(&mut self, medium: &Medium) -> lodge_disk::Result<&mut Open> {
        if let Some(at) = self.open.iter().position(|open| open.medium == medium.id()) {
            return Ok(&mut self.open[at]);
        }
        let queue = medium.disk().queue()?;
        let event = EpollEvent::new(EventSet::IN, medium.id());
        let fd = queue.completion_fd().as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, fd, event).map_err(|source| {
            lodge_disk::Error::Queue { action: "wait for completions", source }
        })?;
        self.open.push(Open { medium: medium.id(), queue });
        let last = self.open.len() - 1;
        Ok(&mut self.open[last])
    }

    /// Moves jobs on and returns those that ended; never blocks.
    pub fn complete(&mut self) -> Vec<Ended<T>> {
        let mut out = Vec::new();
        if let [open] = &self.open[..] {
            // There is nothing to ask.
            let medium = open.medium;
            self.complete_medium(medium, &mut out);
            return out;
        }
        let mut events = [EpollEvent::default(); 16];
        // An error is an interruption, which only means to look again later.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count.min(16)] {
            self.complete_medium(event.data(), &mut out);
        }
        out
    }

    /// Waits until jobs have ended, and returns them; returns at once if there are none.
    pub fn wait(&mut self) -> Vec<Ended<T>> {
        while self.in_flight() > 0 {
            let mut event = [EpollEvent::default()];
            if matches!(self.epoll.wait(-1, &mut event), Ok(1..)) {
                let mut out = Vec::new();
                self.complete_medium(event[0].data(), &mut out);
                if !out.is_empty() {
                    return out;
                }
            }
        }
        Vec::new()
    }

    fn complete_medium(&mut self, medium: u64, out: &mut Vec<Ended<T>>) {
        let Some(at) = self.open.iter().position(|open| open.medium == medium) else { return };
        let mut completions = std::mem::take(&mut self.completions);
        self.open[at].queue.complete(&mut completions);
        for completion in completions.drain(..) {
            out.extend(self.completed(at, completion));
        }
        self.completions = completions;
    }

    fn completed(&mut self, at: usize, completion: Completion) -> Option<Ended<T>> {
        let id = usize::try_from(completion.id).ok()?;
        let Some(mut running) = self.running.get_mut(id).and_then(Option::take) else {
            tracing::error!(id, "a disk finished a request it was not given");
            return None;
        };
        if let Err(error) = &completion.result {
            if std::mem::replace(&mut self.complained, true) {
                tracing::debug!(%error, "a disk request failed");
            } else {
                tracing::warn!(%error, "a disk request failed (told once for each thread)");
            }
        }
        let result = match running.job.ended(&self.memory, completion.result) {
            Ok(Some(op)) => {
                let writes = changes(&op);
                match submit(&mut self.open[at], id, op) {
                    Ok(()) => {
                        self.running[id] = Some(running);
                        return None;
                    }
                    Err(error) => Err(refused(&error, writes)),
                }
            }
            end => end.map(drop),
        };
        self.free.push(id);
        Some(Ended { tag: running.tag, job: running.job, result })
    }

    /// Lets go of all media but those that `keep` names; `false` if one that has jobs is left.
    pub fn tidy(&mut self, keep: &[u64]) -> bool {
        let (running, epoll) = (&self.running, &self.epoll);
        let mut all = true;
        self.open.retain(|open| {
            if keep.contains(&open.medium) {
                return true;
            }
            let busy = running.iter().flatten().any(|running| running.medium == open.medium);
            if !busy {
                let fd = open.queue.completion_fd().as_raw_fd();
                // The descriptor goes with the queue in any case.
                let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            }
            all &= !busy;
            busy
        });
        all
    }
}

impl<T> AsRawFd for Lane<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

fn submit(open: &mut Open, id: usize, op: Op) -> lodge_disk::Result<()> {
    // SAFETY: the buffers are parts of guest RAM, checked when the scatter list was made, or the job's own
    // vector, whose heap memory stays where it is and is only looked at when the request has ended. RAM stays
    // mapped and jobs are kept while the lane exists, and it drops its queues, which wait, before both.
    unsafe { open.queue.submit(Request { id: id as u64, op }) }
}

/// The disk took no request.
fn refused(error: &lodge_disk::Error, writes: bool) -> Fault {
    tracing::warn!(%error, "a disk took no request");
    let error = io::Error::other("the disk took no request");
    if writes { Fault::Write(error) } else { Fault::Read(error) }
}
