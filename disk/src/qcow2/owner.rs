//! The thread that owns an image's metadata: queues ask, it answers.
//!
//! Queues do not ask for what the tables in memory tell, so a write-back here holds up only requests that
//! need new clusters or tables.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Segment};
use super::metadata::{Clear, Metadata, Outcome, Piece, TABLE_CACHE};

/// What queues ask.
pub(super) enum Ask {
    /// Where these bytes come from.
    Resolve { offset: u64, len: u64 },
    /// Where these bytes are to be written.
    Prepare { offset: u64, len: u64, zero: bool },
    /// The runs of a write were written, or not.
    Finish { runs: Vec<u64>, written: bool },
    /// Clear whole clusters.
    Clear { clusters: Range<u64>, how: Clear },
    /// Make everything durable.
    Flush,
}

/// What is answered.
pub(super) enum Answer {
    Segments(Vec<Segment>),
    Pieces(Vec<Piece>),
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

    fn put(&self, token: u64, answer: io::Result<Answer>) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push((token, answer));
        // It can only fail when its counter is full, and then it is readable anyway.
        let _ = self.event.write(1);
    }
}

struct Message {
    ask: Ask,
    token: u64,
    from: Arc<Mailbox>,
}

/// The way to the owner. With its last handle the metadata is written back and the thread ends.
pub(super) struct Owner {
    sender: Option<Sender<Message>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Owner {
    /// Starts the thread. An image that is only read has no `metadata` to change.
    pub(super) fn start(chain: Arc<Chain>, metadata: Option<Metadata>) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name("disk-metadata".to_owned()).spawn(move || {
            let (parked, ready) = (Vec::new(), VecDeque::new());
            Desk { chain, metadata, parked, ready }.run(&receiver);
        })?;
        Ok(Self { sender: Some(sender), thread: Some(thread) })
    }

    /// Asks; the answer comes into the mailbox under `token`.
    pub(super) fn ask(&self, ask: Ask, token: u64, from: &Arc<Mailbox>) {
        let message = Message { ask, token, from: from.clone() };
        let sent = match &self.sender {
            Some(sender) => sender.send(message).map_err(|e| e.0),
            None => Err(message),
        };
        if let Err(Message { token, from, .. }) = sent {
            from.put(token, Err(io::Error::other("the metadata's owner has ended")));
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            // An error would be the thread's panic, which it has printed.
            let _ = thread.join();
        }
    }
}

struct Desk {
    chain: Arc<Chain>,
    metadata: Option<Metadata>,
    /// Requests in the way of which a write is, to be tried again when one ends.
    parked: Vec<Message>,
    /// Requests to be gone on with.
    ready: VecDeque<Message>,
}

impl Desk {
    fn run(mut self, receiver: &Receiver<Message>) {
        loop {
            // One of each in turn, so that a long job does not hold up the others, nor they it.
            let mut idle = true;
            if let Some(message) = self.ready.pop_front() {
                self.handle(message);
                idle = false;
            }
            if let Ok(message) = receiver.try_recv() {
                self.handle(message);
                idle = false;
            }
            if idle {
                match receiver.recv() {
                    Ok(message) => self.handle(message),
                    Err(_) => break,
                }
            }
        }
        self.close();
    }

    fn close(&mut self) {
        let Some(metadata) = &mut self.metadata else { return };
        if let Err(e) = metadata.close() {
            tracing::error!(path = %self.chain.layers[0].image.path.display(), error = %e,
                "the disk's last changes could not be written");
        }
    }

    fn handle(&mut self, message: Message) {
        let Message { ask, token, from } = message;
        let ended = matches!(ask, Ask::Finish { .. });
        match self.answer(ask) {
            Ok(Reply::Now(answer)) => from.put(token, Ok(answer)),
            Ok(Reply::Park(ask)) => self.parked.push(Message { ask, token, from }),
            Ok(Reply::More(ask)) => self.ready.push_back(Message { ask, token, from }),
            Err(e) => from.put(token, Err(e)),
        }
        if ended {
            self.ready.extend(self.parked.drain(..));
        }
        match &mut self.metadata {
            Some(metadata) => {
                if let Err(e) = metadata.tidy() {
                    // All of it stays in memory, and the guest's next flush tells the guest.
                    tracing::error!(path = %self.chain.layers[0].image.path.display(), error = %e,
                        "the disk's metadata cannot be written now");
                }
            }
            None => self.trim(0),
        }
        self.trim(1);
    }

    /// Forgets tables of the layers from `first` on that were not used lately.
    fn trim(&self, first: usize) {
        for map in self.chain.layers.iter().skip(first).filter_map(|l| l.map.as_ref()) {
            map.trim((TABLE_CACHE >> map.geometry.cluster_bits).max(4), |_| false);
        }
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
            Ask::Prepare { offset, len, zero } => match metadata.prepare(offset, len, zero)? {
                Outcome::Done(pieces) => Reply::Now(Answer::Pieces(pieces)),
                Outcome::Busy => Reply::Park(Ask::Prepare { offset, len, zero }),
            },
            Ask::Finish { runs, written } => {
                // Each is ended, whatever becomes of the others.
                let ended: Vec<_> = runs.iter().map(|&id| metadata.finish(id, written)).collect();
                ended.into_iter().collect::<io::Result<()>>()?;
                Reply::Now(Answer::Done)
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
}

enum Reply {
    Now(Answer),
    /// An unfinished write is in the way.
    Park(Ask),
    /// A part is done; this is the rest.
    More(Ask),
}
