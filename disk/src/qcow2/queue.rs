//! A queue on a qcow2 image. Data goes straight between the guest's buffers and the files; only what the
//! tables in memory do not tell is asked of the metadata's owner.
//!
//! ```text
//!  read:   look up ──(not loaded: ask)──> segments ──> zeroes | file | inflate ──> ended
//!  write:  in place? ──> file ──────────────────────────────────────────────────> ended
//!          else ask ──> pieces ──> read what is kept ──> file ──> ask to link ──> ended
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libc::iovec;
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Missed, Segment, Source};
use super::inflate::Inflater;
use super::metadata::{Clear, Generation, Generations, NewRun, Piece};
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
    read_offset: u64,
    /// What is written: the request's own data, or the zeroes at both ends of a range of clusters.
    parts: Vec<Part>,
    runs: Vec<RunState>,
    /// Steps that did not end yet.
    pending: usize,
    error: Option<io::Error>,
    /// Clusters that were in use when this began are not given out again while it lives.
    generation: Generation,
}

struct Part {
    offset: u64,
    len: u64,
    buffers: Vec<Buffer>,
    zero: bool,
}

/// New clusters that are being filled.
struct RunState {
    run: NewRun,
    /// The part of the write that goes there, and from which of its bytes on.
    part: usize,
    skip: u64,
    /// What is kept around the data.
    head: Vec<u8>,
    tail: Vec<u8>,
    /// Reads of what is kept that did not end yet.
    pending: usize,
}

/// What an answer or a transfer belongs to.
enum Step {
    /// Asked where to read.
    Resolve { request: usize },
    /// Asked where to write a part.
    Prepare { request: usize, part: usize },
    /// Asked to link the runs, clear clusters, flush: the answer says all.
    Ask { request: usize },
    /// Data on its way.
    Transfer { request: usize },
    /// Deflated data on its way; for the guest, or (`run`) for what is kept around new data.
    Inflate {
        request: usize,
        run: Option<usize>,
        data: Box<[u8]>,
        source: Source,
        target: Vec<iovec>,
    },
    /// What is kept around new data is on its way.
    Keep { request: usize, run: usize },
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

// SAFETY: the raw pointers in `steps` are addresses of guest buffers and of this queue's own heap memory; neither
// depends on the thread.
unsafe impl Send for Queue {}

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
        let mut active = Active {
            id,
            total: 0,
            target: Vec::new(),
            read_offset: 0,
            parts: Vec::new(),
            runs: Vec::new(),
            // One for this function itself: nothing ends before everything has begun.
            pending: 1,
            error: None,
            generation: match op {
                // It touches no clusters, and those that it makes free need not wait for it.
                Op::Flush => Generation::default(),
                _ => self.generations.enter(),
            },
        };
        match op {
            Op::Read { offset, buffers } => {
                active.total = buffers.iter().map(|b| b.len as u64).sum();
                (active.read_offset, active.target) = (offset, buffers);
                let request = self.requests.insert(active);
                self.read(request);
                self.step_ended(request, Ok(()));
            }
            Op::Write { offset, buffers } => {
                active.total = buffers.iter().map(|b| b.len as u64).sum();
                let len = active.total;
                active.parts.push(Part { offset, len, buffers, zero: false });
                self.write_parts(active);
            }
            Op::Flush => {
                let request = self.requests.insert(active);
                if !self.read_only {
                    self.ask(request, Ask::Flush, Step::Ask { request });
                }
                self.step_ended(request, Ok(()));
            }
            Op::Discard { offset, len } => self.clear(active, offset, len, Clear::Discard),
            Op::WriteZeroes { offset, len, .. } => self.clear(active, offset, len, Clear::Zero),
        }
    }

    fn read(&mut self, request: usize) {
        let active = &self.requests[request];
        let (offset, len) = (active.read_offset, active.total);
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
            let target = iov::slice(&self.requests[request].target, skip, len);
            skip += len;
            self.fetch(request, None, source, target);
        }
    }

    /// Brings bytes from where they are to `target`, for the guest or for one of the request's runs.
    fn fetch(&mut self, request: usize, run: Option<usize>, source: Source, target: Vec<iovec>) {
        match source {
            // SAFETY: guest buffers are valid by the contract of `submit`, what runs keep is this queue's own.
            Source::Zero => unsafe { iov::zero(&target) },
            Source::File { layer, offset } => {
                let step = match run {
                    None => Step::Transfer { request },
                    Some(run) => Step::Keep { request, run },
                };
                self.transfer(request, layer, Io::Read { offset, buffers: target }, step);
            }
            Source::Compressed { layer, offset, len, within } => {
                let generation = *self.requests[request].generation;
                if let Some(bytes) = self.inflater.cached(layer, offset, generation) {
                    // SAFETY: as above; what was inflated is elsewhere.
                    unsafe { iov::copy(&bytes[within as usize..], &target) };
                    return;
                }
                let mut data = vec![0; len].into_boxed_slice();
                let buffers = vec![iovec { iov_base: data.as_mut_ptr().cast(), iov_len: len }];
                let source = Source::Compressed { layer, offset, len, within };
                let step = Step::Inflate { request, run, data, source, target };
                self.transfer(request, layer, Io::Read { offset, buffers }, step);
            }
        }
    }

    /// Writes the parts: in place where that is known to be possible, else where the owner says.
    fn write_parts(&mut self, active: Active) {
        let request = self.requests.insert(active);
        for part in 0..self.requests[request].parts.len() {
            let Part { offset, len, zero, .. } = self.requests[request].parts[part];
            match self.chain.top().in_place(offset, len) {
                Ok(Some(places)) => {
                    let pieces = places.into_iter().map(|(host, len)| Piece::InPlace { host, len });
                    self.write_pieces(request, part, pieces.collect());
                }
                Ok(None) => {
                    let step = Step::Prepare { request, part };
                    self.ask(request, Ask::Prepare { offset, len, zero }, step);
                }
                Err(e) => self.fail(request, e),
            }
        }
        self.step_ended(request, Ok(()));
    }

    fn write_pieces(&mut self, request: usize, part: usize, pieces: Vec<Piece>) {
        let mut skip = 0;
        for piece in pieces {
            match piece {
                Piece::InPlace { host, len } => {
                    let buffers =
                        iov::slice(&self.requests[request].parts[part].buffers, skip, len);
                    skip += len;
                    let write = Io::Write { offset: host, buffers };
                    self.transfer(request, 0, write, Step::Transfer { request });
                }
                Piece::New(run) => {
                    let start = skip;
                    skip += run.len;
                    self.begin_run(request, part, start, run);
                }
            }
        }
    }

    /// Fetches what new clusters keep; then their data can be written.
    fn begin_run(&mut self, request: usize, part: usize, skip: u64, run: NewRun) {
        let keep = |segments: &[Segment]| -> Vec<u8> {
            let zeroes = run.fresh && segments.iter().all(|s| s.source == Source::Zero);
            let len: u64 = if zeroes { 0 } else { segments.iter().map(|s| s.len).sum() };
            vec![0; len as usize]
        };
        let (head, tail) = (keep(&run.head), keep(&run.tail));
        let mut wanted = Vec::new();
        for (bytes, segments) in [(&head, &run.head), (&tail, &run.tail)] {
            let mut at = 0;
            for Segment { len, source } in segments.iter().filter(|_| !bytes.is_empty()) {
                let slice = &bytes[at..at + *len as usize];
                at += *len as usize;
                let iov_base = slice.as_ptr().cast_mut().cast();
                wanted.push((source.clone(), vec![iovec { iov_base, iov_len: slice.len() }]));
            }
        }
        // The heap memory of `head` and `tail` does not move with them.
        let state = RunState { run, part, skip, head, tail, pending: 1 };
        let index = self.requests[request].runs.len();
        self.requests[request].runs.push(state);
        for (source, target) in wanted {
            if source != Source::Zero {
                self.fetch(request, Some(index), source, target);
            }
        }
        self.kept(request, index);
    }

    /// A fetch of what a run keeps has ended, or all have begun: after the last, the run is written.
    fn kept(&mut self, request: usize, index: usize) {
        let active = &mut self.requests[request];
        active.runs[index].pending -= 1;
        if active.runs[index].pending > 0 || active.error.is_some() {
            return;
        }
        let state = &active.runs[index];
        let mut buffers = Vec::new();
        let kept = |bytes: &[u8]| iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        buffers.push(kept(&state.head));
        buffers.extend(iov::slice(&active.parts[state.part].buffers, state.skip, state.run.len));
        buffers.push(kept(&state.tail));
        let head: u64 = state.run.head.iter().map(|s| s.len).sum();
        // Zeroes of fresh clusters are there already.
        let offset = state.run.host + head - state.head.len() as u64;
        let write = Io::Write { offset, buffers };
        self.transfer(request, 0, write, Step::Transfer { request });
    }

    /// Whole clusters are cleared; zeroes are written to what is left at both ends.
    fn clear(&mut self, mut active: Active, offset: u64, len: u64, how: Clear) {
        active.total = len;
        let map = self.chain.top();
        let (bits, size) = (map.geometry.cluster_bits, map.geometry.cluster_size());
        let end = offset + len;
        let mut clusters = offset.div_ceil(size)..end >> bits;
        if end == map.geometry.size {
            clusters.end = end.div_ceil(size);
        }
        if clusters.is_empty() || (map.geometry.version < 3 && self.chain.has_backing()) {
            clusters = 0..0;
        }
        if how == Clear::Zero {
            let (first, last) = match clusters.is_empty() {
                true => (offset..end, end..end),
                false => (offset..clusters.start << bits, (clusters.end << bits).min(end)..end),
            };
            for range in [first, last].into_iter().filter(|r| !r.is_empty()) {
                let len = range.end - range.start;
                let buffers = zeroes(len);
                active.parts.push(Part { offset: range.start, len, buffers, zero: true });
            }
        }
        active.pending += 1;
        // The parts begin first: `write_parts` ends the step that `begin` counted, this function its own.
        let request = self.next_request();
        self.write_parts(active);
        if !clusters.is_empty() {
            self.ask(request, Ask::Clear { clusters, how }, Step::Ask { request });
        }
        self.step_ended(request, Ok(()));
    }

    fn next_request(&self) -> usize {
        self.requests.next_index()
    }

    fn ask(&mut self, request: usize, ask: Ask, step: Step) {
        self.requests[request].pending += 1;
        let token = self.steps.insert(step) as u64;
        self.owner.ask(ask, token, &self.mailbox);
    }

    fn transfer(&mut self, request: usize, layer: usize, io: Io, step: Step) {
        match &step {
            Step::Keep { run, .. } | Step::Inflate { run: Some(run), .. } => {
                self.requests[request].runs[*run].pending += 1;
            }
            _ => {}
        }
        self.requests[request].pending += 1;
        let token = self.steps.insert(step);
        let file = &self.chain.layers[layer].image.file;
        // SAFETY: guest buffers are valid until the request's completion, by the contract of `DiskQueue::submit`; memory of ours
        // (in `steps` and `requests`) is kept until the step has ended. `drop` waits for all.
        let submitted = unsafe { self.engine.submit(file, token as u64, io) };
        if let Err(e) = submitted {
            self.transferred(Done { token: token as u64, result: Err(e) });
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
        let active = &mut self.requests[request];
        active.pending -= 1;
        if active.pending > 0 {
            return;
        }
        if !active.runs.is_empty() {
            let runs = active.runs.drain(..).map(|r| r.run.id).collect();
            let written = active.error.is_none();
            self.ask(request, Ask::Finish { runs, written }, Step::Ask { request });
            return;
        }
        let Some(active) = self.requests.remove(request) else { return };
        let result = active.error.map_or(Ok(active.total), Err);
        self.ended.push(Completion { id: active.id, result });
    }

    fn answered(&mut self, token: u64, answer: io::Result<Answer>) {
        let Some(step) = self.steps.remove(token as usize) else { return };
        let (Step::Resolve { request }
        | Step::Prepare { request, .. }
        | Step::Ask { request }
        | Step::Transfer { request }
        | Step::Inflate { request, .. }
        | Step::Keep { request, .. }) = step;
        let result = match (answer, step) {
            (Ok(Answer::Segments(segments)), Step::Resolve { .. }) => {
                self.read_segments(request, segments);
                Ok(())
            }
            (Ok(Answer::Pieces(pieces)), Step::Prepare { part, .. }) => {
                self.write_pieces(request, part, pieces);
                Ok(())
            }
            (Ok(Answer::SyncData), _) => {
                self.transfer(request, 0, Io::Sync, Step::Transfer { request });
                Ok(())
            }
            (Ok(_), _) => Ok(()),
            (Err(e), _) => Err(e),
        };
        self.step_ended(request, result);
    }

    fn transferred(&mut self, done: Done) {
        let Some(step) = self.steps.remove(done.token as usize) else { return };
        let result = done.result.map(drop);
        match step {
            Step::Transfer { request } => self.step_ended(request, result),
            Step::Keep { request, run } => self.fetched(request, Some(run), result),
            Step::Inflate { request, run, data, source, target } => {
                let result = result.and_then(|()| self.inflate(request, &data, source, &target));
                self.fetched(request, run, result);
            }
            // These wait for an answer, not for a transfer.
            Step::Resolve { request } | Step::Prepare { request, .. } | Step::Ask { request } => {
                self.step_ended(request, result);
            }
        }
    }

    fn fetched(&mut self, request: usize, run: Option<usize>, result: io::Result<()>) {
        if let Err(e) = result {
            self.fail(request, e);
        }
        if let Some(run) = run {
            self.kept(request, run);
        }
        self.step_ended(request, Ok(()));
    }

    fn inflate(
        &mut self,
        request: usize,
        data: &[u8],
        source: Source,
        target: &[iovec],
    ) -> io::Result<()> {
        let Source::Compressed { layer, offset, within, .. } = source else { return Ok(()) };
        let size = self.chain.layers[layer].map.as_ref().map_or(0, |m| m.geometry.cluster_size());
        let generation = *self.requests[request].generation;
        let bytes = self.inflater.inflate(layer, offset, generation, data, size as usize)?;
        // SAFETY: guest buffers are valid by the contract of `submit`, what runs keep is this queue's own.
        unsafe { iov::copy(&bytes[within as usize..], target) };
        Ok(())
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
