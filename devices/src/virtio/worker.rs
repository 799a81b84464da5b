//! An I/O thread: a small epoll loop that works on one or a few queues.
//!
//! ```text
//!   Idle(handler) --first queue starts--> Running(thread has the handler)
//!                 <--last queue stops----
//! ```
//!
//! The thread lives for as long as a queue runs. Commands come over a channel and are answered; so a
//! stop returns only when the handler has finished what was in flight.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Error, QueueResources, QueueState, Virtqueue};

/// What a worker does with its queues. Called in the worker's thread.
pub trait Handler: Send + 'static {
    /// Takes queue `slot` and registers other descriptors it needs. A call of
    /// [`Handler::kicked`] follows.
    fn start(&mut self, slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error>;

    /// The driver notified queue `slot`, or the queue just started.
    fn kicked(&mut self, slot: usize, poll: &Poll);

    /// A descriptor registered as `token` is ready.
    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll);

    /// Finishes what is in flight on queue `slot`, gives its descriptors up, and returns the queue.
    fn stop(&mut self, slot: usize, poll: &Poll) -> Option<Virtqueue>;
}

/// Tokens below this one are the loop's own.
const OWN_TOKENS: u64 = 1 << 32;
const COMMAND: u64 = 0;

/// The descriptors a worker waits for.
pub struct Poll(Epoll);

impl Poll {
    fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new()?))
    }

    /// Waits for `events` on `fd`; [`Handler::ready`] gets `token`.
    pub fn add(&self, fd: RawFd, events: EventSet, token: u32) -> io::Result<()> {
        let event = EpollEvent::new(events, OWN_TOKENS + u64::from(token));
        self.0.ctl(ControlOperation::Add, fd, event)
    }

    /// Changes what is waited for.
    pub fn modify(&self, fd: RawFd, events: EventSet, token: u32) -> io::Result<()> {
        let event = EpollEvent::new(events, OWN_TOKENS + u64::from(token));
        self.0.ctl(ControlOperation::Modify, fd, event)
    }

    /// Waits no more. A descriptor that is not there is no error.
    pub fn remove(&self, fd: RawFd) {
        // The only failures are those of a descriptor that is not registered.
        let _ = self.0.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn add_own(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
    }
}

enum Command {
    Start {
        slot: usize,
        queue: Box<Virtqueue>,
        answer: Sender<Result<(), Error>>,
    },
    Stop {
        slot: usize,
        answer: Sender<Option<QueueState>>,
    },
    /// Only wakes the handler ([`Handler::ready`] with this token).
    Wake(u64),
    Quit,
}

struct Running<H> {
    thread: JoinHandle<H>,
    commands: Sender<Command>,
    wake: EventFd,
    slots: Vec<usize>,
}

/// A thread with a [`Handler`], or the handler at rest.
pub struct Worker<H> {
    name: String,
    idle: Option<H>,
    running: Option<Running<H>>,
}

impl<H: Handler> Worker<H> {
    /// A worker at rest. Its thread will be called `name` (15 characters are seen).
    pub fn new(name: impl Into<String>, handler: H) -> Self {
        Self { name: name.into(), idle: Some(handler), running: None }
    }

    /// The handler, while no queue runs.
    pub fn handler(&mut self) -> Option<&mut H> {
        self.idle.as_mut()
    }

    /// The handler, while no queue runs.
    pub fn idle(&self) -> Option<&H> {
        self.idle.as_ref()
    }

    /// Starts a queue as the handler's `slot`.
    pub fn start(
        &mut self,
        slot: usize,
        resources: &QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        let queue = Box::new(Virtqueue::new(resources, state)?);
        if self.running.is_none() {
            self.spawn()?;
        }
        let started = match &mut self.running {
            Some(running) => {
                let (answer, wait) = channel();
                running.slots.push(slot);
                running.send(Command::Start { slot, queue, answer });
                wait.recv().unwrap_or(Err(Error::State("the I/O thread has ended")))
            }
            None => Err(Error::State("the I/O thread has ended")),
        };
        if started.is_err() {
            self.forget(slot);
        }
        started
    }

    /// Stops the queue in `slot`; returns when nothing is in flight.
    pub fn stop(&mut self, slot: usize) -> Option<QueueState> {
        let running = self.running.as_ref().filter(|running| running.slots.contains(&slot))?;
        let (answer, wait) = channel();
        running.send(Command::Stop { slot, answer });
        let state = wait.recv().ok().flatten();
        self.forget(slot);
        state
    }

    /// Makes the handler look at `token` ([`Handler::ready`], with no events), if the thread runs.
    pub fn wake(&self, token: u32) {
        if let Some(running) = &self.running {
            running.send(Command::Wake(token.into()));
        }
    }

    fn spawn(&mut self) -> Result<(), Error> {
        let poll = Poll::new().map_err(Error::host("create an epoll instance"))?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(Error::host("create an eventfd"))?;
        poll.add_own(wake.as_raw_fd(), COMMAND).map_err(Error::host("wait for an eventfd"))?;
        let theirs = wake.try_clone().map_err(Error::host("duplicate an eventfd"))?;
        let handler = self.idle.take().ok_or(Error::State("the I/O thread has ended"))?;
        let (commands, inbox) = channel();
        // The handler travels by channel, so that it is not lost when there is no thread to be had.
        let (give, take) = channel::<H>();
        let spawned = std::thread::Builder::new().name(self.name.clone()).spawn(move || {
            let handler = take.recv().expect("the sender waits until the handler is sent");
            Loop { handler, poll, inbox, wake: theirs, kicks: Vec::new() }.run()
        });
        match spawned {
            Ok(thread) => {
                // The thread is waiting for exactly this; it cannot have gone away.
                let _ = give.send(handler);
                self.running = Some(Running { thread, commands, wake, slots: Vec::new() });
                Ok(())
            }
            Err(source) => {
                self.idle = Some(handler);
                Err(Error::Host { step: "start an I/O thread", source })
            }
        }
    }

    /// A slot is free again; after the last one the thread ends and the handler comes home.
    fn forget(&mut self, slot: usize) {
        let Some(running) = &mut self.running else { return };
        running.slots.retain(|other| *other != slot);
        if running.slots.is_empty()
            && let Some(running) = self.running.take()
        {
            running.send(Command::Quit);
            match running.thread.join() {
                Ok(handler) => self.idle = Some(handler),
                Err(_) => tracing::error!(thread = self.name, "an I/O thread has failed"),
            }
        }
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.send(Command::Quit);
            // A thread that panicked has said so already.
            let _ = running.thread.join();
        }
    }
}

impl<H> Running<H> {
    fn send(&self, command: Command) {
        // Fails only when the thread has panicked; the answer's channel then tells.
        let _ = self.commands.send(command);
        // Fails only when the counter is full, and then the thread is awake.
        let _ = self.wake.write(1);
    }
}

/// The thread's side.
struct Loop<H> {
    handler: H,
    poll: Poll,
    inbox: Receiver<Command>,
    wake: EventFd,
    kicks: Vec<(usize, EventFd)>,
}

impl<H: Handler> Loop<H> {
    fn run(mut self) -> H {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.poll.0.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "an I/O thread cannot wait");
                    return self.handler;
                }
            };
            for event in &events[..count.min(16)] {
                if !self.dispatch(event) {
                    return self.handler;
                }
            }
        }
    }

    /// Handles one event; `false` ends the thread.
    fn dispatch(&mut self, event: &EpollEvent) -> bool {
        match event.data() {
            COMMAND => return self.commands(),
            token @ 1..OWN_TOKENS => {
                let slot = (token - 1) as usize;
                // An event of a queue that was stopped by an earlier event of this round is stale.
                if let Some((_, kick)) = self.kicks.iter().find(|(other, _)| *other == slot) {
                    let _ = kick.read(); // Nothing to read: a kick that was seen already.
                    self.handler.kicked(slot, &self.poll);
                }
            }
            token => self.handler.ready(token - OWN_TOKENS, event.event_set(), &self.poll),
        }
        true
    }

    fn commands(&mut self) -> bool {
        let _ = self.wake.read(); // Only resets the counter.
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Start { slot, queue, answer } => {
                    let started = self.start(slot, *queue);
                    let go = started.is_ok();
                    let _ = answer.send(started); // The other side waits, or has gone.
                    if go {
                        self.handler.kicked(slot, &self.poll);
                    }
                }
                Command::Stop { slot, answer } => {
                    self.unregister(slot);
                    let state = self.handler.stop(slot, &self.poll).map(|queue| queue.state());
                    let _ = answer.send(state); // The other side waits, or has gone.
                }
                Command::Wake(token) => self.handler.ready(token, EventSet::empty(), &self.poll),
                Command::Quit => return false,
            }
        }
        true
    }

    fn start(&mut self, slot: usize, queue: Virtqueue) -> Result<(), Error> {
        // A descriptor of its own: epoll knows a descriptor by its number.
        let kick = queue.kick().try_clone().map_err(Error::host("duplicate an eventfd"))?;
        let token = slot as u64 + 1;
        self.poll.add_own(kick.as_raw_fd(), token).map_err(Error::host("wait for a queue"))?;
        self.kicks.push((slot, kick));
        let started = self.handler.start(slot, queue, &self.poll);
        if started.is_err() {
            self.unregister(slot);
        }
        started
    }

    fn unregister(&mut self, slot: usize) {
        if let Some(at) = self.kicks.iter().position(|(other, _)| *other == slot) {
            let (_, kick) = self.kicks.swap_remove(at);
            self.poll.remove(kick.as_raw_fd());
        }
    }
}

/// Waits until `fd` is readable, in a worker that has nothing else to do.
pub(super) fn wait_readable(fd: RawFd) {
    let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, as the count says. An early return (a signal) only means that the
    // caller looks once more.
    unsafe { libc::poll(&mut wait, 1, -1) };
}
