//! Who is connected: a thread that accepts connections, and the list of those that are there.
//!
//! ```text
//!   accepted --> newcomer --secure--> client --> gone
//!                   |        |
//!                   |        +-- 32 clients are there: told so
//!                   +-- more than 64 newcomers: the oldest goes
//! ```
//!
//! Newcomers cannot keep others out, however many they are: who knows what to say is a client at once.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::client;
use super::listen::Listener;
use super::mailbox::Mailbox;
use super::peer::{Peer, Socket};
use super::security::{Policy, secure};
use super::session::Around;
use crate::display::Viewer;

/// Clients at a time.
const MOST_CLIENTS: usize = 32;
/// Connections at a time that have not yet shown who they are.
const MOST_NEWCOMERS: usize = 64;

/// What the threads of a server share.
pub struct Server {
    /// What clients must do.
    pub policy: Policy,
    /// What they see and where their input goes.
    pub around: Arc<Around>,
    /// Who is connected.
    pub guests: Mutex<Guests>,
}

/// Who is connected.
#[derive(Default)]
pub struct Guests {
    /// In the order in which they came.
    list: Vec<Guest>,
    next: u64,
}

struct Guest {
    number: u64,
    peer: Arc<Peer>,
    /// Newcomers have none.
    mailbox: Option<Arc<Mailbox>>,
}

impl Guest {
    fn dismiss(&self) {
        if let Some(mailbox) = &self.mailbox {
            mailbox.close();
        }
        self.peer.close();
    }
}

impl Server {
    fn guests(&self) -> MutexGuard<'_, Guests> {
        // Each change is one call of Vec.
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clients that are there.
    pub fn clients(&self) -> usize {
        self.guests().clients().count()
    }

    /// Accepts connections until `stop` is written to, then ends them all.
    pub fn run(self: &Arc<Self>, listener: &Listener, stop: &EventFd) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while wait(listener, stop) {
            threads.retain(|thread| !thread.is_finished());
            match listener.accept() {
                Ok(Some((socket, name))) => match self.receive(socket, name) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => tracing::warn!(%error, "cannot serve a VNC client"),
                },
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a VNC client");
                    // Out of descriptors, most likely: not at full speed.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
        self.guests().list.iter().for_each(Guest::dismiss);
        for thread in threads {
            // A panic of the thread has been reported by its own message.
            let _ = thread.join();
        }
    }

    /// Starts a thread for a newcomer.
    fn receive(self: &Arc<Self>, socket: Socket, name: String) -> io::Result<JoinHandle<()>> {
        let peer = Arc::new(Peer::new(socket)?);
        let number = self.guests().add(peer.clone());
        let server = self.clone();
        let thread = std::thread::Builder::new().name("vnc-in".into()).spawn(move || {
            match server.serve(&peer, number, &name) {
                Ok(()) => tracing::info!(client = name, "a VNC client has left"),
                Err(reason) => tracing::info!(client = name, %reason, "a VNC connection has ended"),
            }
            peer.close();
            server.guests().remove(number);
        });
        thread.inspect_err(|_| self.guests().remove(number))
    }

    fn serve(&self, peer: &Arc<Peer>, number: u64, name: &str) -> io::Result<()> {
        let mailbox = Arc::new(Mailbox::default());
        secure(peer, &self.policy, || self.guests().admit(number, &mailbox))?;
        let [shared] = peer.read_array()?;
        if shared == 0 {
            self.guests().only(number);
        }
        tracing::info!(client = name, shared = shared != 0, "a VNC client is here");
        let viewer: Arc<dyn Viewer> = mailbox.clone();
        self.around.display.attach(Arc::downgrade(&viewer));
        client::serve(peer, &self.around, &mailbox)
    }
}

impl Guests {
    fn clients(&self) -> impl Iterator<Item = &Guest> {
        self.list.iter().filter(|guest| guest.mailbox.is_some())
    }

    /// A newcomer; where they are too many, the oldest one goes.
    fn add(&mut self, peer: Arc<Peer>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.list.push(Guest { number, peer, mailbox: None });
        let newcomers = self.list.len() - self.clients().count();
        if newcomers > MOST_NEWCOMERS
            && let Some(oldest) = self.list.iter().position(|guest| guest.mailbox.is_none())
        {
            self.list.remove(oldest).dismiss();
        }
        number
    }

    /// A newcomer becomes a client, or is told why not.
    fn admit(&mut self, number: u64, mailbox: &Arc<Mailbox>) -> Result<(), String> {
        if self.clients().count() >= MOST_CLIENTS {
            return Err(format!("{MOST_CLIENTS} clients are connected, and more cannot be"));
        }
        let guest = self.list.iter_mut().find(|guest| guest.number == number);
        let guest = guest.ok_or("the server is busy")?;
        guest.mailbox = Some(mailbox.clone());
        Ok(())
    }

    /// All clients but one must go.
    fn only(&self, number: u64) {
        self.clients().filter(|guest| guest.number != number).for_each(Guest::dismiss);
    }

    fn remove(&mut self, number: u64) {
        self.list.retain(|guest| guest.number != number);
    }
}

/// Waits for a connection. False if it is over.
fn wait(listener: &Listener, stop: &EventFd) -> bool {
    let mut fds = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
    ];
    // A signal is no reason to end; accepting finds nothing then.
    let _ = poll(&mut fds, PollTimeout::NONE);
    !fds[1].any().unwrap_or(false)
}
