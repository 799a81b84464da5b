//! A queue on a qcow2 image. Data goes straight between the guest's buffers and the files; only what the
//! tables in memory do not tell is asked of the metadata's owner.
//!
//! ```text
//!  read:   look up ──(not loaded: ask)──> segments ──> zeroes | file | inflate ──> ended
//!  write:  in place? ──> file ──────────────────────────────────────────────────> ended
//!          else ask the owner, which writes ────────────────────────────────────> ended
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Missed, Segment};
use super::fetch::{Deflated, Fetch, fetch};
use super::inflate::Inflater;
use super::metadata::{Clear, Generation, Generations};
use super::owner::{Answer, Ask, Mailbox, Owner};
use super::slab::Slab;
use crate::engine::{Done, Engine, Io};
use crate::request::check;
use crate::{Buffer, Completion, DiskQueue, Error, Op, Request, Result, iov};

/// Memory that zeroes are written from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A request under way.
struct Active {
    id: u64,
    total: u64,
    /// What a read fills.
    target: Vec<Buffer>,
    /// Steps that did not end yet.
    pending: usize,
    error: Option<io::Error>,
    /// Clusters that were in use when this began are not given out again while it lives.
    generation: Generation,
}

/// What an answer or a transfer belongs to.
enum Step {
    /// Asked where to read.
    Resolve { request: usize },
    /// Asked to do something: the answer says all.
    Ask { request: usize },
    /// Data on its way; when it is compressed, inflate it.
    Transfer { request: usize, deflated: Option<Deflated> },
}

/// The queue.
pub(super) struct Queue {
    /// First, so that it is dropped first.
    engine: Box<dyn Engine>,
    pub(super) event: EventFd,
    mailbox: Arc<Mailbox>,
    chain: Arc<Chain>,
    owner: Arc<Owner>,
    generations: Arc<Generations>,
    read_only: bool,
    requests: Slab<Active>,
    steps: Slab<Step>,
    inflater: Inflater,
    ended: Vec<Completion>,
    in_flight: usize,
}

impl Queue {
    pub(super) fn new(
        engine: Box<dyn Engine>,
        event: EventFd,
        chain: Arc<Chain>,
        owner: Arc<Owner>,
        generations: Arc<Generations>,
        read_only: bool,
    ) -> Result<Self> {
        let copy = event.try_clone().map_err(Error::queue("share an event descriptor"))?;
        Ok(Self {
            engine,
            event,
            mailbox: Arc::new(Mailbox::new(copy)),
            chain,
            owner,
            generations,
            read_only,
            requests: Slab::default(),
            steps: Slab::default(),
            inflater: Inflater::default(),
            ended: Vec::new(),
            in_flight: 0,
        })
    }

    fn begin(&mut self, id: u64, op: Op) {
        let total = |b: &[Buffer]| b.iter().map(|b| b.len as u64).sum();
        let generation = match op {
            // It touches no clusters, and those that it makes free need not wait for it.
            Op::Flush => Generation::default(),
            _ => self.generations.enter(),
        };
        // One pending for this function itself: nothing ends before everything has begun.
        let active =
            Active { id, total: 0, target: Vec::new(), pending: 1, error: None, generation };
        let request = self.requests.insert(active);
        match op {
            Op::Read { offset, buffers } => {
                self.requests[request].total = total(&buffers);
                self.requests[request].target = buffers;
                self.read(request, offset);
            }
            Op::Write { offset, buffers } => {
                let len = total(&buffers);
                self.requests[request].total = len;
                self.write(request, offset, len, buffers, false);
            }
            Op::Flush if self.read_only => {}
            Op::Flush => self.ask(request, Ask::Flush, Step::Ask { request }),
            Op::Discard { offset, len } => self.clear(request, offset, len, Clear::Discard),
            Op::WriteZeroes { offset, len, .. } => self.clear(request, offset, len, Clear::Zero),
        }
        self.step_ended(request, Ok(()));
    }

    fn read(&mut self, request: usize, offset: u64) {
        let len = self.requests[request].total;
        match self.chain.look_up(offset, len) {
            Ok(segments) => self.read_segments(request, segments),
            Err(Missed::Table(..)) => {
                self.ask(request, Ask::Resolve { offset, len }, Step::Resolve { request });
            }
            Err(Missed::Failed(e)) => self.fail(request, e),
        }
    }

    fn read_segments(&mut self, request: usize, segments: Vec<Segment>) {
        let mut skip = 0;
        for Segment { len, source } in segments {
            let active = &self.requests[request];
            let target = iov::slice(&active.target, skip, len);
            skip += len;
            // SAFETY: guest buffers are valid until the completion, by the contract of `submit`.
            match unsafe { fetch(source, target, &self.inflater, *active.generation) } {
                Fetch::Done => {}
                Fetch::Read { layer, io, then } => self.transfer(request, layer, io, then),
            }
        }
    }

    /// Writes in place where that is known to be possible; else the owner does it.
    fn write(&mut self, request: usize, offset: u64, len: u64, buffers: Vec<Buffer>, zero: bool) {
        match self.chain.top().in_place(offset, len) {
            Ok(Some(places)) => {
                let mut skip = 0;
                for (offset, len) in places {
                    let buffers = iov::slice(&buffers, skip, len);
                    skip += len;
                    self.transfer(request, 0, Io::Write { offset, buffers }, None);
                }
            }
            Ok(None) => {
                let generation = *self.requests[request].generation;
                let ask = Ask::Write { offset, len, buffers, zero, generation };
                self.ask(request, ask, Step::Ask { request });
            }
            Err(e) => self.fail(request, e),
        }
    }

    /// Whole clusters are cleared; zeroes are written to what is left at both ends.
    fn clear(&mut self, request: usize, offset: u64, len: u64, how: Clear) {
        self.requests[request].total = len;
        let geometry = self.chain.top().geometry;
        let (bits, size) = (geometry.cluster_bits, geometry.cluster_size());
        let end = offset + len;
        let mut clusters = offset.div_ceil(size)..end >> bits;
        if end == geometry.size {
            clusters.end = end.div_ceil(size);
        }
        if clusters.is_empty() || (geometry.version < 3 && self.chain.has_backing()) {
            // With a file below, version 2 cannot say that a cluster is zeroes: they are written.
            clusters = 0..0;
        }
        if how == Clear::Zero {
            let ends = match clusters.is_empty() {
                true => [offset..end, end..end],
                false => [offset..clusters.start << bits, (clusters.end << bits).min(end)..end],
            };
            for range in ends.into_iter().filter(|r| !r.is_empty()) {
                let len = range.end - range.start;
                self.write(request, range.start, len, zeroes(len), true);
            }
        }
        if !clusters.is_empty() {
            self.ask(request, Ask::Clear { clusters, how }, Step::Ask { request });
        }
    }

    fn ask(&mut self, request: usize, ask: Ask, step: Step) {
        self.requests[request].pending += 1;
        let token = self.steps.insert(step) as u64;
        self.owner.ask(ask, token, &self.mailbox);
    }

    fn transfer(&mut self, request: usize, layer: usize, io: Io, deflated: Option<Deflated>) {
        self.requests[request].pending += 1;
        let token = self.steps.insert(Step::Transfer { request, deflated }) as u64;
        let file = &self.chain.layers[layer].image.file;
        // SAFETY: guest buffers are valid until the request's completion, by the contract of `DiskQueue::submit`; memory of
        // ours (in `steps`) is kept until the transfer has ended. `drop` waits for all.
        if let Err(e) = unsafe { self.engine.submit(file, token, io) } {
            self.transferred(Done { token, result: Err(e) });
        }
    }

    fn fail(&mut self, request: usize, e: io::Error) {
        self.requests[request].error.get_or_insert(e);
    }

    /// A step of the request has ended; with the last one, the request has.
    fn step_ended(&mut self, request: usize, result: io::Result<()>) {
        if let Err(e) = result {
            self.fail(request, e);
        }
        self.requests[request].pending -= 1;
        if self.requests[request].pending > 0 {
            return;
        }
        let Some(active) = self.requests.remove(request) else { return };
        let result = active.error.map_or(Ok(active.total), Err);
        self.ended.push(Completion { id: active.id, result });
    }

    fn answered(&mut self, token: u64, answer: io::Result<Answer>) {
        let Some(step) = self.steps.remove(token as usize) else { return };
        let (Step::Resolve { request } | Step::Ask { request } | Step::Transfer { request, .. }) =
            step;
        let result = answer.map(|answer| match answer {
            Answer::Segments(segments) => self.read_segments(request, segments),
            Answer::SyncData => self.transfer(request, 0, Io::Sync, None),
            Answer::Done => {}
        });
        self.step_ended(request, result);
    }

    fn transferred(&mut self, done: Done) {
        let Some(step) = self.steps.remove(done.token as usize) else { return };
        let mut result = done.result.map(drop);
        let (Step::Resolve { request } | Step::Ask { request } | Step::Transfer { request, .. }) =
            step;
        if let Step::Transfer { deflated: Some(deflated), .. } = step {
            let chain = &self.chain;
            result = result.and_then(|()| deflated.finish(chain, &mut self.inflater));
        }
        self.step_ended(request, result);
    }
}

impl DiskQueue for Queue {
    unsafe fn submit(&mut self, request: Request) -> Result<()> {
        let Request { id, op } = request;
        self.in_flight += 1;
        match check(&op, self.chain.top().geometry.size, self.read_only) {
            Ok(()) => self.begin(id, op),
            Err(e) => self.ended.push(Completion { id, result: Err(e) }),
        }
        if !self.ended.is_empty() {
            // It can only fail when its counter is full, and then it is readable anyway.
            let _ = self.event.write(1);
        }
        Ok(())
    }

    fn completion_fd(&self) -> &EventFd {
        &self.event
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        // Nothing to read is no error: the caller may look without having been woken.
        let _: io::Result<u64> = self.event.read();
        for (token, answer) in self.mailbox.take() {
            self.answered(token, answer);
        }
        let mut done = Vec::new();
        self.engine.reap(&mut done);
        done.into_iter().for_each(|d| self.transferred(d));
        self.in_flight -= self.ended.len();
        out.append(&mut self.ended);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut out = Vec::new();
        while self.in_flight > 0 {
            let fd = self.event.as_raw_fd();
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid `pollfd`. Whatever it returns, looking is harmless.
            unsafe { libc::poll(&mut poll, 1, 100) };
            self.complete(&mut out);
        }
    }
}

/// Buffers of `len` zeroes in all. They are only written from.
fn zeroes(len: u64) -> Vec<Buffer> {
    let whole = ZEROES.len() as u64;
    let piece = |len: u64| Buffer { ptr: ZEROES.as_ptr().cast_mut(), len: len as usize };
    let mut list = vec![piece(whole); (len / whole) as usize];
    list.push(piece(len % whole));
    list
}
