//! The thread that owns an image's metadata: queues ask, it answers.
//!
//! Queues do not ask for what the tables in memory tell, so a write-back here holds up only requests that
//! need new clusters or tables.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chain::{Chain, Segment};
use super::metadata::{Clear, Metadata, Outcome, Piece, TABLE_CACHE};
use super::writer::{Writer, Written};
use crate::Buffer;
use crate::engine::Engines;

/// Messages that are taken before transfers are looked at again.
const BATCH: usize = 64;

/// What queues ask.
pub(super) enum Ask {
    /// Where these bytes come from.
    Resolve { offset: u64, len: u64 },
    /// Write the buffers from `offset` on. With `zero` they are zeroes, and need not be written where the disk reads so. The
    /// asking request holds the generation of this number.
    Write { offset: u64, len: u64, buffers: Vec<Buffer>, zero: bool, generation: u64 },
    /// Clear whole clusters.
    Clear { clusters: Range<u64>, how: Clear },
    /// Make everything durable.
    Flush,
}

/// What is answered.
pub(super) enum Answer {
    Segments(Vec<Segment>),
    Done,
    /// There is no metadata to write: the queue syncs the data itself.
    SyncData,
}

/// Where a queue's answers come in.
pub(super) struct Mailbox {
    answers: Mutex<Vec<(u64, io::Result<Answer>)>>,
    event: EventFd,
}

impl Mailbox {
    pub(super) fn new(event: EventFd) -> Self {
        Self { answers: Mutex::default(), event }
    }

    pub(super) fn take(&self) -> Vec<(u64, io::Result<Answer>)> {
        std::mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who asked: a queue, and which of its steps.
pub(super) struct Sender {
    mailbox: Arc<Mailbox>,
    token: u64,
}

impl Sender {
    fn answer(self, answer: io::Result<Answer>) {
        let mut answers = self.mailbox.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.push((self.token, answer));
        drop(answers);
        // It can only fail when its counter is full, and then it is readable anyway.
        let _ = self.mailbox.event.write(1);
    }
}

struct Message {
    ask: Ask,
    from: Sender,
}

/// The way to the owner. With its last handle the metadata is written back and the thread ends.
pub(super) struct Owner {
    sender: Option<mpsc::Sender<Message>>,
    wake: EventFd,
    thread: Option<thread::JoinHandle<()>>,
}

impl Owner {
    /// Starts the thread. An image that is only read has no `metadata` to change.
    pub(super) fn start(
        chain: Arc<Chain>,
        metadata: Option<Metadata>,
        engines: &Engines,
    ) -> crate::Result<Self> {
        let event = || crate::Error::queue("make an event descriptor");
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(event())?;
        let copy = wake.try_clone().map_err(event())?;
        let writer = Writer::new(engines.engine(&wake)?, chain.clone());
        let (sender, receiver) = mpsc::channel();
        let desk = Desk {
            chain,
            metadata,
            writer,
            wake: copy,
            parked: Vec::new(),
            ready: VecDeque::new(),
        };
        let thread = thread::Builder::new()
            .name("disk-metadata".to_owned())
            .spawn(move || desk.run(&receiver))
            .map_err(crate::Error::queue("start a thread"))?;
        Ok(Self { sender: Some(sender), wake, thread: Some(thread) })
    }

    /// Asks; the answer comes into the mailbox under `token`.
    pub(super) fn ask(&self, ask: Ask, token: u64, mailbox: &Arc<Mailbox>) {
        let message = Message { ask, from: Sender { mailbox: mailbox.clone(), token } };
        let sent = match &self.sender {
            Some(sender) => sender.send(message).map_err(|e| e.0),
            None => Err(message),
        };
        if let Err(Message { from, .. }) = sent {
            return from.answer(Err(io::Error::other("the metadata's owner has ended")));
        }
        // As in `Sender::answer`.
        let _ = self.wake.write(1);
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.sender = None;
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // An error would be the thread's panic, which it has printed.
            let _ = thread.join();
        }
    }
}

struct Desk {
    chain: Arc<Chain>,
    metadata: Option<Metadata>,
    writer: Writer,
    wake: EventFd,
    /// Requests in the way of which a write is, to be tried again when one ends.
    parked: Vec<Message>,
    /// Requests to be gone on with.
    ready: VecDeque<Message>,
}

impl Desk {
    fn run(mut self, receiver: &Receiver<Message>) {
        while self.turn(receiver) {
            if self.ready.is_empty() && !self.writer.has_ended() {
                self.sleep();
            }
        }
        // Queues end after their requests, and this after the queues: nothing is under way.
        let Some(metadata) = &mut self.metadata else { return };
        if let Err(e) = metadata.close() {
            tracing::error!(path = %self.path(), error = %e,
                "the disk's last changes could not be written");
        }
    }

    /// Does what there is to do, but nothing for long; whether anybody may still ask.
    fn turn(&mut self, receiver: &Receiver<Message>) -> bool {
        // Nothing to read is no error: there was work, so nobody waited.
        let _: io::Result<u64> = self.wake.read();
        let written = self.writer.advance();
        written.into_iter().for_each(|w| self.written(w));
        for _ in 0..self.ready.len() {
            if let Some(message) = self.ready.pop_front() {
                self.handle(message);
            }
        }
        for _ in 0..BATCH {
            match receiver.try_recv() {
                Ok(message) => self.handle(message),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        // There may be more.
        let _ = self.wake.write(1);
        true
    }

    fn sleep(&self) {
        let mut poll = libc::pollfd { fd: self.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid `pollfd`. Whatever it returns, looking for work is harmless.
        unsafe { libc::poll(&mut poll, 1, -1) };
    }

    /// The data of a write is where it belongs, or is not: links its new clusters, or gives them up.
    fn written(&mut self, Written { from, runs, result }: Written) {
        let mut result = result;
        if let Some(metadata) = &mut self.metadata {
            let written = result.is_ok();
            for id in runs {
                // Each is ended, whatever becomes of the others.
                result = metadata.finish(id, written).and(result);
            }
        }
        from.answer(result.map(|()| Answer::Done));
        self.ready.extend(self.parked.drain(..));
        self.tidy();
    }

    fn handle(&mut self, Message { ask, from }: Message) {
        match self.answer(ask) {
            Ok(Reply::Now(answer)) => from.answer(Ok(answer)),
            Ok(Reply::Park(ask)) => self.parked.push(Message { ask, from }),
            Ok(Reply::More(ask)) => self.ready.push_back(Message { ask, from }),
            Ok(Reply::Write { buffers, pieces, generation }) => {
                self.writer.begin(from, buffers, pieces, generation);
            }
            Err(e) => from.answer(Err(e)),
        }
        self.tidy();
    }

    fn answer(&mut self, ask: Ask) -> io::Result<Reply> {
        let Some(metadata) = &mut self.metadata else {
            return match ask {
                Ask::Resolve { offset, len } => {
                    let segments = self.chain.resolve(offset, len, &|_| Ok(()))?;
                    Ok(Reply::Now(Answer::Segments(segments)))
                }
                _ => Err(io::Error::from_raw_os_error(libc::EROFS)),
            };
        };
        Ok(match ask {
            Ask::Resolve { offset, len } => {
                Reply::Now(Answer::Segments(metadata.resolve(offset, len)?))
            }
            Ask::Write { offset, len, buffers, zero, generation } => {
                match metadata.prepare(offset, len, zero)? {
                    Outcome::Done(pieces) => Reply::Write { buffers, pieces, generation },
                    Outcome::Busy => {
                        Reply::Park(Ask::Write { offset, len, buffers, zero, generation })
                    }
                }
            }
            Ask::Clear { clusters, how } => match metadata.clear(clusters.clone(), how)? {
                Outcome::Done(rest) if rest.is_empty() => Reply::Now(Answer::Done),
                Outcome::Done(rest) => Reply::More(Ask::Clear { clusters: rest, how }),
                Outcome::Busy => Reply::Park(Ask::Clear { clusters, how }),
            },
            Ask::Flush if metadata.is_dirty() => {
                metadata.commit()?;
                Reply::Now(Answer::Done)
            }
            Ask::Flush => Reply::Now(Answer::SyncData),
        })
    }

    /// Keeps memory bounded.
    fn tidy(&mut self) {
        let result = self.metadata.as_mut().map_or(Ok(()), Metadata::tidy);
        if let Err(e) = result {
            // All of it stays in memory, and the next flush tells the guest.
            tracing::error!(path = %self.path(), error = %e,
                "the disk's metadata cannot be written now");
        }
        let mine = usize::from(self.metadata.is_some());
        for map in self.chain.layers.iter().skip(mine).filter_map(|l| l.map.as_ref()) {
            map.trim((TABLE_CACHE >> map.geometry.cluster_bits).max(4), |_| false);
        }
    }

    fn path(&self) -> std::path::Display<'_> {
        self.chain.layers[0].image.path.display()
    }
}

enum Reply {
    Now(Answer),
    /// An unfinished write is in the way.
    Park(Ask),
    /// A part is done; this is the rest.
    More(Ask),
    /// To be carried out.
    Write {
        buffers: Vec<Buffer>,
        pieces: Vec<Piece>,
        generation: u64,
    },
}
