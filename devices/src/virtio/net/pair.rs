//! One queue pair in its thread, with the backend behind it.
//!
//! ```text
//!   backend --receive--> frame (one at a time) --> receive queue; no buffers: wait for a kick
//!   transmit queue --send--> backend; no room: wait until it is writable
//! ```

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use lodge_memory::GuestMemory;
use lodge_net::{Backend, Buffer, HEADER_LEN, Offloads};
use vmm_sys_util::epoll::EventSet;

use super::super::chain::host;
use super::super::worker::{Handler, Poll};
use super::super::{Chain, Error, Virtqueue};
use super::{Shared, control};

/// Slots of the worker.
pub(super) const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
pub(super) const CONTROL: usize = 2;
/// Tokens.
const BACKEND: u32 = 0;
const UPDATE: u32 = 1;
/// A header, an Ethernet header with a tag, and 64 KiB of payload.
const MOST_FRAME: usize = 65_562;
/// Offset of the number of buffers in the header.
const NUM_BUFFERS: usize = 10;
/// Frames received before other events have their turn.
const BUDGET: usize = 256;
/// Host buffers of one frame at most (the kernel's IOV_MAX).
const MOST_BUFFERS: usize = 1024;

/// A frame that came from the backend, and how much of the buffer it fills; 0: none.
struct Frame {
    bytes: Box<[u8]>,
    len: usize,
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
enum Delivery {
    Done,
    /// The driver has offered too few buffers.
    Wait,
}

/// The handler of a queue pair.
pub(super) struct Pair {
    index: usize,
    backend: Box<dyn Backend>,
    shared: Arc<Shared>,
    queues: [Option<Virtqueue>; 3],
    mergeable: bool,
    frame: Frame,
    /// The backend had no room for a frame.
    blocked: bool,
    /// The network has gone for good.
    dead: bool,
    /// What the backend was told last of whether the driver uses this pair.
    active: bool,
    /// What epoll waits for on the backend.
    watched: EventSet,
}

impl Pair {
    pub(super) fn new(index: usize, backend: Box<dyn Backend>, shared: Arc<Shared>) -> Self {
        let mut pair = Self {
            index,
            backend,
            shared,
            queues: [None, None, None],
            mergeable: false,
            frame: Frame { bytes: vec![0; MOST_FRAME].into_boxed_slice(), len: 0 },
            blocked: false,
            dead: false,
            active: true,
            watched: EventSet::empty(),
        };
        pair.reset();
        pair
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self) {
        self.frame.len = 0;
        self.blocked = false;
        self.set_features(false, Offloads::empty());
        self.follow_active();
    }

    pub(super) fn set_features(&mut self, mergeable: bool, accepted: Offloads) {
        self.mergeable = mergeable;
        if let Err(error) = self.backend.set_offloads(accepted) {
            tracing::warn!(%error, ?accepted, "a network did not take the driver's offloads");
        }
    }

    /// Tells the backend when the driver begins or ends to use this pair. Before each use: the driver's
    /// kick may be seen before the news that the pair is active.
    fn follow_active(&mut self) {
        let active = self.index < usize::from(self.shared.active.load(Ordering::SeqCst));
        if active == self.active {
            return;
        }
        match self.backend.set_active(active) {
            Ok(()) => self.active = active,
            Err(error) => tracing::warn!(%error, "a network's queue cannot be switched"),
        }
    }

    /// Makes epoll wait for what there is to wait for.
    fn watch(&mut self, poll: &Poll) {
        let mut wanted = EventSet::empty();
        if !self.dead && self.active {
            if self.queues[RECEIVE].is_some() && self.frame.len == 0 {
                wanted |= EventSet::IN;
            }
            if self.blocked || self.backend.wants_write() {
                wanted |= EventSet::OUT;
            }
        }
        if wanted == self.watched {
            return;
        }
        let fd = self.backend.as_raw_fd();
        let done = if wanted.is_empty() {
            poll.remove(fd);
            Ok(())
        } else if self.watched.is_empty() {
            poll.add(fd, wanted, BACKEND)
        } else {
            poll.modify(fd, wanted, BACKEND)
        };
        match done {
            Ok(()) => self.watched = wanted,
            Err(error) => tracing::error!(%error, "cannot wait for a network"),
        }
    }

    /// The network has gone: the guest sees the cable pulled.
    fn lost(&mut self, error: &io::Error) {
        tracing::warn!(%error, "a network has gone");
        self.dead = true;
        self.shared.set_link(false);
    }

    /// Frames go to the guest for as long as there are both frames and buffers.
    fn receive(&mut self) {
        self.follow_active();
        let link = self.shared.link.load(Ordering::SeqCst);
        if let Some(queue) = &mut self.queues[RECEIVE] {
            queue.mute(); // Kicks are of interest only while a frame waits.
        }
        for _ in 0..BUDGET {
            if self.frame.len == 0 && !self.fetch() {
                break;
            }
            if !link {
                self.frame.len = 0; // The cable is pulled.
                continue;
            }
            let Some(queue) = &mut self.queues[RECEIVE] else { break };
            let bytes = &mut self.frame.bytes[..self.frame.len];
            match deliver(queue, bytes, self.mergeable) {
                Delivery::Done => self.frame.len = 0,
                Delivery::Wait => break, // The driver kicks when it has more.
            }
        }
        if let Some(queue) = &mut self.queues[RECEIVE] {
            queue.notify();
        }
    }

    /// Gets the next frame from the backend; `false` if there is none now.
    fn fetch(&mut self) -> bool {
        if self.dead || !self.active {
            return false;
        }
        loop {
            let mut buffer =
                [Buffer { ptr: self.frame.bytes.as_mut_ptr(), len: self.frame.bytes.len() }];
            // SAFETY: the buffer is ours, valid for its length, and not used otherwise during the call.
            match unsafe { self.backend.receive(&mut buffer) } {
                Ok(Some(len)) if (HEADER_LEN..=MOST_FRAME).contains(&len) => {
                    self.frame.len = len;
                    return true;
                }
                // A frame that is no frame, or too long: it is lost.
                Ok(Some(_)) => {}
                Err(error) if error.kind() == ErrorKind::InvalidData => {}
                Ok(None) => return false,
                Err(error) => {
                    self.lost(&error);
                    return false;
                }
            }
        }
    }

    /// Frames go to the backend for as long as there are frames and room.
    fn transmit(&mut self) {
        self.follow_active();
        let Self { queues, backend, shared, blocked, dead, active, .. } = self;
        let Some(queue) = &mut queues[TRANSMIT] else { return };
        let link = shared.link.load(Ordering::SeqCst) && !*dead && *active;
        *blocked = false;
        let mut lost = None;
        queue.process(|queue, chain| {
            // With the cable pulled, or on a pair that is not in use, frames go nowhere.
            let taken = if link && lost.is_none() {
                send(backend.as_mut(), queue.memory(), &chain)
            } else {
                Ok(true)
            };
            match taken {
                Ok(false) => {
                    *blocked = true;
                    return false;
                }
                Err(error) if error.kind() != ErrorKind::InvalidInput => lost = Some(error),
                _ => {}
            }
            queue.push(chain.head, 0);
            true
        });
        if let Some(error) = lost {
            self.lost(&error);
        }
    }

    fn control(&mut self) {
        let Some(queue) = &mut self.queues[CONTROL] else { return };
        let shared = &self.shared;
        queue.process(|queue, chain| {
            let written = control::execute(queue.memory(), &chain, shared);
            queue.push(chain.head, written);
            true
        });
    }
}

/// Sends the frame of a chain. A frame that is none is told as `InvalidInput`.
fn send(backend: &mut dyn Backend, memory: &GuestMemory, chain: &Chain) -> io::Result<bool> {
    let buffers = host(memory, chain.readable.iter().copied(), |ptr, len| Buffer { ptr, len });
    let buffers = buffers.unwrap_or_default();
    if chain.readable_len() <= HEADER_LEN as u64 || buffers.len() > MOST_BUFFERS {
        return Err(ErrorKind::InvalidInput.into());
    }
    // SAFETY: the buffers are parts of guest RAM, checked when the chain was walked, which stays
    // mapped while the queue exists. Nobody makes Rust references to guest RAM.
    unsafe { backend.send(&buffers) }
}

/// Puts a frame into the driver's buffers: one chain, or with mergeable buffers as many as it takes.
fn deliver(queue: &mut Virtqueue, frame: &mut [u8], mergeable: bool) -> Delivery {
    let mut chains: Vec<Chain> = Vec::with_capacity(1);
    let mut room = 0;
    while room < frame.len() as u64 {
        // A driver that offers endless empty chains breaks the rules; the frame is lost.
        if chains.len() > usize::from(queue.size()) {
            break;
        }
        let Some(chain) = queue.pop() else {
            // Asked for here, before the chains go back: the kick shall come for the next one.
            if queue.unmute() {
                continue;
            }
            chains.iter().for_each(|_| queue.unpop());
            return Delivery::Wait;
        };
        room += chain.writable_len();
        chains.push(chain);
        if !mergeable {
            break;
        }
    }
    let fits = room >= frame.len() as u64;
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    frame[NUM_BUFFERS..HEADER_LEN].copy_from_slice(&count.to_le_bytes());
    let mut done = 0;
    for chain in &chains {
        // A frame that does not fit a lone buffer is lost, and the buffer comes back empty.
        let rest = if fits { &frame[done..] } else { &[] };
        let written = chain.write(queue.memory(), 0, rest);
        queue.push(chain.head, written as u32);
        done += written;
    }
    Delivery::Done
}

impl Handler for Pair {
    fn start(&mut self, slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error> {
        if self.queues.iter().all(Option::is_none) {
            // A fresh epoll instance: it knows nothing of the backend yet.
            self.watched = EventSet::empty();
            self.follow_active();
            if let Some(update) = self.shared.update.get(self.index) {
                poll.add(update.as_raw_fd(), EventSet::IN, UPDATE)
                    .map_err(Error::host("wait for an eventfd"))?;
            }
        }
        if let Some(place) = self.queues.get_mut(slot) {
            *place = Some(queue);
        }
        self.watch(poll);
        Ok(())
    }

    fn kicked(&mut self, slot: usize, poll: &Poll) {
        match slot {
            RECEIVE => self.receive(),
            TRANSMIT => self.transmit(),
            _ => self.control(),
        }
        self.watch(poll);
    }

    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) {
        if token == u64::from(UPDATE) {
            if let Some(update) = self.shared.update.get(self.index) {
                let _ = update.read(); // Only resets the counter.
            }
            self.follow_active();
        } else {
            let broken = EventSet::ERROR | EventSet::HANG_UP;
            if events.intersects(EventSet::OUT | broken) {
                match self.backend.flush() {
                    Err(error) if error.kind() != ErrorKind::InvalidInput => self.lost(&error),
                    _ => {}
                }
                if self.blocked {
                    self.transmit();
                }
            }
            if events.intersects(EventSet::IN | broken) {
                self.receive();
            }
        }
        self.watch(poll);
    }

    fn stop(&mut self, slot: usize, poll: &Poll) -> Option<Virtqueue> {
        let queue = self.queues.get_mut(slot)?.take();
        if slot == TRANSMIT {
            self.blocked = false;
        }
        self.watch(poll);
        if self.queues.iter().all(Option::is_none)
            && let Some(update) = self.shared.update.get(self.index)
        {
            poll.remove(update.as_raw_fd());
            poll.remove(self.backend.as_raw_fd());
            self.watched = EventSet::empty();
        }
        queue
    }
}
