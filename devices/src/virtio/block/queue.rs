//! One queue of a block device, in its thread: chains in, requests to the disk, completions back.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lodge_disk::{Completion, Disk, DiskQueue, Op, Request};
use vmm_sys_util::epoll::EventSet;

use super::super::chain::{Malformed, wrote};
use super::super::worker::{Handler, Poll, wait_readable};
use super::super::{Chain, Error, Virtqueue};
use super::request::{ID_BYTES, Limits, Status, Work, parse};

/// Token of the completions' eventfd.
const COMPLETIONS: u32 = 0;

/// A request that the disk has.
struct Pending {
    chain: Chain,
    /// A write that has to be durable before the driver is told: the flush comes next.
    flush_after: bool,
    /// Bytes of guest RAM that the disk fills.
    reads: u64,
}

/// What exists while the queue runs.
struct Running {
    /// Before `queue`, which keeps guest RAM mapped: dropping it waits for what is in flight.
    disk: Box<dyn DiskQueue>,
    queue: Virtqueue,
    limits: Limits,
    /// By request id; a free place is `None`.
    pending: Vec<Option<Pending>>,
    completions: Vec<Completion>,
    /// A failure was told: a full disk fails as often as the guest tries.
    complained: bool,
}

/// The handler of one queue.
pub(super) struct BlockQueue {
    disk: Arc<dyn Disk>,
    serial: [u8; ID_BYTES],
    writeback: Arc<AtomicBool>,
    running: Option<Running>,
}

impl BlockQueue {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        serial: [u8; ID_BYTES],
        writeback: Arc<AtomicBool>,
    ) -> Self {
        Self { disk, serial, writeback, running: None }
    }
}

impl Running {
    /// Takes what the driver offers and starts it.
    fn take(&mut self, serial: &[u8; ID_BYTES], writeback: bool) {
        let Self { disk, queue, limits, pending, .. } = self;
        queue.process(|queue, chain| {
            match parse(queue.memory(), &chain, *limits) {
                None => queue.fail(Malformed::Request),
                Some(Work::Done(status)) => finish(queue, &chain, status),
                Some(Work::Id) => {
                    let room = (chain.writable_len() - 1).min(ID_BYTES as u64) as usize;
                    chain.write(queue.memory(), 0, &serial[..room]);
                    finish(queue, &chain, Status::Ok);
                }
                Some(Work::Disk(op)) => {
                    let changes = matches!(
                        op,
                        Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. }
                    );
                    let reads = match op {
                        Op::Read { .. } => chain.writable_len() - 1,
                        _ => 0,
                    };
                    let request = Pending { chain, flush_after: changes && !writeback, reads };
                    submit(queue, &mut **disk, pending, op, request);
                }
            }
            true
        });
    }

    /// Answers what the disk has finished.
    fn complete(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.disk.complete(&mut completions);
        for completion in completions.drain(..) {
            self.completed(completion);
        }
        self.completions = completions;
        self.queue.notify();
    }

    fn completed(&mut self, completion: Completion) {
        let slot = usize::try_from(completion.id).ok().and_then(|id| self.pending.get_mut(id));
        let Some(mut request) = slot.and_then(Option::take) else {
            tracing::error!(id = completion.id, "a disk finished a request it was not given");
            return;
        };
        // The disk may have written before it failed.
        wrote(self.queue.memory(), &request.chain.writable, request.reads);
        match completion.result {
            Ok(_) if request.flush_after => {
                request.flush_after = false;
                submit(&mut self.queue, &mut *self.disk, &mut self.pending, Op::Flush, request);
            }
            Ok(_) => finish(&mut self.queue, &request.chain, Status::Ok),
            Err(error) => {
                if std::mem::replace(&mut self.complained, true) {
                    tracing::debug!(%error, "a disk request failed");
                } else {
                    tracing::warn!(%error, "a disk request failed (told once for each queue)");
                }
                finish(&mut self.queue, &request.chain, Status::IoError);
            }
        }
    }
}

/// Gives `op` to the disk, with `request` waiting for its end.
fn submit(
    queue: &mut Virtqueue,
    disk: &mut dyn DiskQueue,
    pending: &mut Vec<Option<Pending>>,
    op: Op,
    request: Pending,
) {
    let id = match pending.iter().position(Option::is_none) {
        Some(free) => free,
        None => {
            pending.push(None);
            pending.len() - 1
        }
    };
    // SAFETY: the buffers are parts of guest RAM, checked when the chain was walked. It stays mapped
    // while the queue exists (it holds an Arc of it), and the queue is kept until nothing is in
    // flight. Nobody makes Rust references to guest RAM.
    match unsafe { disk.submit(Request { id: id as u64, op }) } {
        Ok(()) => pending[id] = Some(request),
        Err(error) => {
            tracing::warn!(%error, "a disk took no request");
            finish(queue, &request.chain, Status::IoError);
        }
    }
}

/// Writes the status byte and gives the chain back.
fn finish(queue: &mut Virtqueue, chain: &Chain, status: Status) {
    let len = chain.writable_len();
    chain.write(queue.memory(), len - 1, &[status as u8]);
    // After an error nothing is promised of what lies before the status.
    let written = if status == Status::Ok { u32::try_from(len).unwrap_or(u32::MAX) } else { 1 };
    queue.push(chain.head, written);
}

impl Handler for BlockQueue {
    fn start(&mut self, _slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error> {
        let disk = self.disk.queue()?;
        poll.add(disk.completion_fd().as_raw_fd(), EventSet::IN, COMPLETIONS)
            .map_err(Error::host("wait for a disk"))?;
        let limits = Limits {
            size: self.disk.size(),
            read_only: self.disk.read_only(),
            discard: self.disk.capabilities().discard,
        };
        let (pending, completions) = (Vec::new(), Vec::new());
        let complained = false;
        self.running = Some(Running { disk, queue, limits, pending, completions, complained });
        Ok(())
    }

    fn kicked(&mut self, _slot: usize, _poll: &Poll) {
        let writeback = self.writeback.load(Ordering::Relaxed);
        if let Some(running) = &mut self.running {
            running.take(&self.serial, writeback);
        }
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) {
        if let Some(running) = &mut self.running {
            running.complete();
        }
    }

    fn stop(&mut self, _slot: usize, poll: &Poll) -> Option<Virtqueue> {
        let mut running = self.running.take()?;
        poll.remove(running.disk.completion_fd().as_raw_fd());
        running.complete();
        while running.disk.in_flight() > 0 {
            wait_readable(running.disk.completion_fd().as_raw_fd());
            running.complete();
        }
        Some(running.queue)
    }
}
