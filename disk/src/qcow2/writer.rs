//! Writes that need new clusters, carried out by the metadata's owner itself.
//!
//! ```text
//!  prepared ──> read what the clusters keep ──> write them whole ──> link them ──> answered
//! ```
//!
//! Queues could write the data themselves; but then a queue whose thread looks away, with new clusters half
//! filled, would hold up all others that need the same clusters. This way every write that began also ends.

use std::fs::File;
use std::io;
use std::sync::Arc;

use libc::iovec;

use super::chain::{Chain, Segment, Source};
use super::fetch::{Deflated, Fetch, fetch};
use super::inflate::Inflater;
use super::metadata::{NewRun, Piece};
use super::owner::Sender;
use super::slab::Slab;
use crate::engine::{Done, Engine, Io};
use crate::{Buffer, iov};

/// A write under way.
struct Job {
    from: Sender,
    buffers: Vec<Buffer>,
    runs: Vec<RunState>,
    /// Transfers that did not end yet.
    pending: usize,
    error: Option<io::Error>,
}

/// New clusters that are being filled.
struct RunState {
    run: NewRun,
    /// Where in the buffers their data begins.
    skip: u64,
    /// What is kept around the data; empty where it is zeroes that are there already.
    head: Vec<u8>,
    tail: Vec<u8>,
    /// Reads of what is kept that did not end yet.
    pending: usize,
}

/// What a transfer belongs to.
enum Step {
    Data { job: usize },
    Keep { job: usize, run: usize, deflated: Option<Deflated> },
}

/// A write that has ended.
pub(super) struct Written {
    pub(super) from: Sender,
    /// Runs to be linked, or to be given up after an error.
    pub(super) runs: Vec<u64>,
    pub(super) result: io::Result<()>,
}

/// The writes under way.
pub(super) struct Writer {
    /// First, so that it is dropped first: it waits for all transfers.
    engine: Box<dyn Engine>,
    chain: Arc<Chain>,
    file: Arc<File>,
    jobs: Slab<Job>,
    steps: Slab<Step>,
    inflater: Inflater,
    ended: Vec<Written>,
}

impl Writer {
    pub(super) fn new(engine: Box<dyn Engine>, chain: Arc<Chain>) -> Self {
        let file = chain.layers[0].image.file.clone();
        let (jobs, steps) = (Slab::default(), Slab::default());
        Self { engine, chain, file, jobs, steps, inflater: Inflater::default(), ended: Vec::new() }
    }

    /// Begins a write. The buffers are valid until it was answered, by the contract of `DiskQueue::submit`.
    pub(super) fn begin(
        &mut self,
        from: Sender,
        buffers: Vec<Buffer>,
        pieces: Vec<Piece>,
        generation: u64,
    ) {
        // One pending for this function itself: nothing ends before everything has begun.
        let job = Job { from, buffers, runs: Vec::new(), pending: 1, error: None };
        let job = self.jobs.insert(job);
        let mut skip = 0;
        for piece in pieces {
            match piece {
                Piece::InPlace { host, len } => {
                    let buffers = iov::slice(&self.jobs[job].buffers, skip, len);
                    skip += len;
                    self.transfer(job, 0, Io::Write { offset: host, buffers }, Step::Data { job });
                }
                Piece::New(run) => {
                    let start = skip;
                    skip += run.len;
                    self.begin_run(job, start, run, generation);
                }
            }
        }
        self.step_ended(job, Ok(()));
    }

    /// Goes on with what has been transferred; returns the writes that ended.
    pub(super) fn advance(&mut self) -> Vec<Written> {
        let mut done = Vec::new();
        self.engine.reap(&mut done);
        done.into_iter().for_each(|d| self.transferred(d));
        std::mem::take(&mut self.ended)
    }

    /// Whether [`Writer::advance`] has something to return at once: a write may need no transfer at all.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Fetches what new clusters keep; then they can be written.
    fn begin_run(&mut self, job: usize, skip: u64, run: NewRun, generation: u64) {
        let keep = |segments: &[Segment]| -> Vec<u8> {
            let there = run.fresh && segments.iter().all(|s| s.source == Source::Zero);
            let len: u64 = if there { 0 } else { segments.iter().map(|s| s.len).sum() };
            vec![0; len as usize]
        };
        let (mut head, mut tail) = (keep(&run.head), keep(&run.tail));
        let mut wanted = Vec::new();
        for (bytes, segments) in [(&mut head, &run.head), (&mut tail, &run.tail)] {
            let mut rest = &mut bytes[..];
            for segment in segments {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at_mut(segment.len as usize);
                rest = after;
                let iov_base = piece.as_mut_ptr().cast();
                wanted.push((segment.source.clone(), iovec { iov_base, iov_len: piece.len() }));
            }
        }
        let state = RunState { run, skip, head, tail, pending: 1 };
        let index = self.jobs[job].runs.len();
        self.jobs[job].runs.push(state);
        for (source, target) in wanted.into_iter().filter(|(s, _)| *s != Source::Zero) {
            // SAFETY: `target` is heap memory of `head` or `tail`, which stays where it is until the job has ended.
            match unsafe { fetch(source, vec![target], &self.inflater, generation) } {
                Fetch::Done => {}
                Fetch::Read { layer, io, then } => {
                    self.jobs[job].runs[index].pending += 1;
                    let step = Step::Keep { job, run: index, deflated: then };
                    self.transfer(job, layer, io, step);
                }
            }
        }
        self.kept(job, index);
    }

    /// A fetch has ended, or all have begun: after the last, the run is written.
    fn kept(&mut self, job: usize, index: usize) {
        let active = &mut self.jobs[job];
        active.runs[index].pending -= 1;
        if active.runs[index].pending > 0 || active.error.is_some() {
            return;
        }
        let state = &mut active.runs[index];
        let kept =
            |bytes: &mut [u8]| iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut buffers = vec![kept(&mut state.head)];
        buffers.extend(iov::slice(&active.buffers, state.skip, state.run.len));
        buffers.push(kept(&mut state.tail));
        let head: u64 = state.run.head.iter().map(|s| s.len).sum();
        let offset = state.run.host + head - state.head.len() as u64;
        self.transfer(job, 0, Io::Write { offset, buffers }, Step::Data { job });
    }

    fn transfer(&mut self, job: usize, layer: usize, io: Io, step: Step) {
        self.jobs[job].pending += 1;
        let token = self.steps.insert(step) as u64;
        let file = if layer == 0 { &self.file } else { &self.chain.layers[layer].image.file };
        // SAFETY: guest buffers are valid until the write is answered; memory of ours (in `steps` and `jobs`) is kept until
        // the transfer has ended; dropping the engine, which is dropped first, waits for all.
        if let Err(e) = unsafe { self.engine.submit(file, token, io) } {
            self.transferred(Done { token, result: Err(e) });
        }
    }

    fn transferred(&mut self, done: Done) {
        let mut result = done.result.map(drop);
        match self.steps.remove(done.token as usize) {
            None => {}
            Some(Step::Data { job }) => self.step_ended(job, result),
            Some(Step::Keep { job, run, deflated }) => {
                if let Some(deflated) = deflated {
                    let chain = &self.chain;
                    result = result.and_then(|()| deflated.finish(chain, &mut self.inflater));
                }
                if let Err(e) = result {
                    self.jobs[job].error.get_or_insert(e);
                }
                self.kept(job, run);
                self.step_ended(job, Ok(()));
            }
        }
    }

    /// A transfer of the job has ended; with the last one, the job has.
    fn step_ended(&mut self, job: usize, result: io::Result<()>) {
        let active = &mut self.jobs[job];
        if let Err(e) = result {
            active.error.get_or_insert(e);
        }
        active.pending -= 1;
        if active.pending > 0 {
            return;
        }
        let Some(Job { from, runs, error, .. }) = self.jobs.remove(job) else { return };
        let runs = runs.iter().map(|r| r.run.id).collect();
        self.ended.push(Written { from, runs, result: error.map_or(Ok(()), Err) });
    }
}
