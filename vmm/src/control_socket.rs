//! The control socket: where `lodge ctl` and others reach a running machine ([`lodge_model::control`]).
//!
//! ```text
//!                  listener thread
//!   connect ---->  own user or root?  at most 16?
//!                        | starts
//!                        v                    Message::Call
//!   lines <------> connection thread  -----------------------------> control thread (owns the machine)
//!     ^                  |       ^------------ reply -------------------+
//!     |                  +-- screendump, send-key --> Display, InputSink| try_send
//!     +----------- watcher thread <---- queue of events (bounded) ------+
//! ```
//!
//! The control thread waits for nobody here: a reply goes into a queue that has room for it, and a watcher that does not
//! read its events loses its connection. What a client sends can do harm only to its own connection.
//!
//! | module | is about |
//! | --- | --- |
//! | this one | who is connected |
//! | `claim` | the socket's file |
//! | `conversation` | what one client asks, and gets |

mod claim;
mod conversation;

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use lodge_model::control::Status;
use lodge_model::control::place::{ControlPlace, control_name};
use lodge_model::control::wire::{Code, WireError, answer_line};
use lodge_model::spec::{MachineSpec, Video};
use lodge_model::state::MachineState;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use serde_json::Value;

use self::claim::SocketFile;
use self::conversation::Conversation;
use crate::control::Message;
use crate::display::Display;
use crate::vnc::InputSink;

/// Connections at a time.
const MOST_CONNECTIONS: usize = 16;
/// A client that does not read what it asked for is given so long.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another machine has the name.
    #[error(
        "a machine named {name} runs already (its control socket is '{path}'): give this one another name with --name"
    )]
    Taken {
        /// The machine's name.
        name: String,
        /// The socket.
        path: PathBuf,
    },
    /// Another machine has the socket that was asked for.
    #[error(
        "the control socket '{path}' is another machine's: give another path with --control PATH"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error(
        "cannot make the control socket '{path}': give another path with --control PATH, or none with --control none"
    )]
    Make {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The host has no thread or descriptor to give.
    #[error("cannot start the control socket's thread")]
    Host(#[source] io::Error),
}

/// A control socket that is the machine's, and not served yet: who connects waits.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
    about: Status,
}

impl ControlSocket {
    /// Makes the socket that the spec asks for, if any.
    ///
    /// # Errors
    /// Another machine has it, or it cannot be made.
    pub fn claim(spec: &MachineSpec) -> Result<Option<Self>, Error> {
        let pid = std::process::id();
        let name = control_name(spec, pid);
        let claimed = match &spec.control {
            Some(ControlPlace::None) => return Ok(None),
            Some(ControlPlace::Path(path)) => SocketFile::claim(path),
            None => SocketFile::claim(&claim::default_path(&name)?).map_err(|error| match error {
                Error::InUse { path } => Error::Taken { name: name.clone(), path },
                error => error,
            }),
        };
        let (listener, file) = claimed?;
        let about = Status {
            name,
            pid,
            state: MachineState::Created,
            cpus: spec.cpus,
            memory: spec.memory,
            display: spec.video_kind() != Video::None,
        };
        Ok(Some(Self { listener, file, about }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Begins to serve it. What is asked goes to `control`; `display` is for pictures, `input` for keys.
    ///
    /// # Errors
    /// The host has no thread or descriptor to give.
    pub fn serve(
        self,
        control: Sender<Message>,
        display: Option<Arc<Display>>,
        input: Arc<dyn InputSink>,
    ) -> Result<ControlServer, Error> {
        let Self { listener, file, about } = self;
        let stop = Arc::new(EventFd::new().map_err(|errno| Error::Host(errno.into()))?);
        listener.set_nonblocking(true).map_err(Error::Host)?;
        let (open, next) = (Mutex::default(), AtomicU64::new(0));
        let server = Server { control, display, input, about, open, next };
        let until = stop.clone();
        let thread = std::thread::Builder::new()
            .name("ctl".into())
            .spawn(move || Arc::new(server).run(&listener, &until))
            .map_err(Error::Host)?;
        Ok(ControlServer { file: Some(file), stop, thread: Some(thread) })
    }
}

/// A control socket that is served. When it is dropped its file is removed, those that are connected get the answers
/// that are under way, and their connections end. The receiver of its messages must be gone by then.
#[derive(Debug)]
pub struct ControlServer {
    file: Option<SocketFile>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // First, so that the name is free when the last client sees its connection end.
        self.file = None;
        // Its counter is at most 1: there is room.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its own message.
            let _ = thread.join();
        }
    }
}

/// What the threads share.
struct Server {
    control: Sender<Message>,
    display: Option<Arc<Display>>,
    input: Arc<dyn InputSink>,
    /// All but the state lasts.
    about: Status,
    open: Mutex<Vec<Arc<UnixStream>>>,
    /// The next client's number.
    next: AtomicU64,
}

impl Server {
    fn open(&self) -> MutexGuard<'_, Vec<Arc<UnixStream>>> {
        // Each change is one call of Vec.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts connections until `stop` is written to, then ends them all.
    fn run(self: Arc<Self>, listener: &UnixListener, stop: &EventFd) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while wait(listener, stop) {
            threads.retain(|thread| !thread.is_finished());
            let received = match listener.accept() {
                Ok((socket, _)) => self.receive(socket),
                Err(error) => match error.kind() {
                    // It was quicker to go than we to look.
                    ErrorKind::WouldBlock
                    | ErrorKind::Interrupted
                    | ErrorKind::ConnectionAborted => Ok(None),
                    _ => Err(error),
                },
            };
            match received {
                Ok(thread) => threads.extend(thread),
                Err(error) => {
                    tracing::warn!(%error, "cannot serve a connection to the control socket");
                    // Out of descriptors or threads, most likely: not at full speed.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        for socket in self.open().iter() {
            // Only what comes in: an answer that is under way is still sent. It may be closed already.
            let _ = socket.shutdown(std::net::Shutdown::Read);
        }
        for thread in threads {
            // A panic of the thread has been reported by its own message.
            let _ = thread.join();
        }
    }

    /// Starts a thread for a client, or tells it why not.
    fn receive(self: &Arc<Self>, socket: UnixStream) -> io::Result<Option<JoinHandle<()>>> {
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(WRITE_LIMIT))?;
        if let Some(why) = self.refusal(&socket)? {
            tracing::info!("a connection to the control socket is refused: {why}");
            let error = WireError::new(Code::Refused, why);
            // It fits the new socket's buffer; a client that is gone does not miss it.
            let _ = (&socket).write_all(answer_line(&Value::Null, &Err(error)).as_bytes());
            return Ok(None);
        }
        let socket = Arc::new(socket);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open().push(socket.clone());
        let (server, ours) = (self.clone(), socket.clone());
        let thread = std::thread::Builder::new().name("ctl-client".into()).spawn(move || {
            match Conversation::new(number, &ours, &server).run() {
                Ok(()) => tracing::debug!("a client of the control socket has left"),
                Err(error) => tracing::info!(%error, "a control connection has ended"),
            }
            server.close(&ours);
        });
        thread.map(Some).inspect_err(|_| self.close(&socket))
    }

    fn close(&self, socket: &Arc<UnixStream>) {
        self.open().retain(|other| !Arc::ptr_eq(other, socket));
        // It may be closed already.
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }

    /// Why a client is not served, if it is not.
    fn refusal(&self, socket: &UnixStream) -> io::Result<Option<String>> {
        let uid = getsockopt(socket, PeerCredentials)?.uid();
        if uid != 0 && uid != geteuid().as_raw() {
            return Ok(Some("this machine is another user's".into()));
        }
        let full = self.open().len() >= MOST_CONNECTIONS;
        Ok(full.then(|| {
            format!("{MOST_CONNECTIONS} connections are open, and more cannot be: close one")
        }))
    }
}

/// Waits for a connection. False if it is over.
fn wait(listener: &UnixListener, stop: &EventFd) -> bool {
    let mut fds = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
    ];
    // A signal is no reason to end; accepting finds nothing then.
    let _ = poll(&mut fds, PollTimeout::NONE);
    !fds[1].any().unwrap_or(false)
}

#[cfg(test)]
mod tests;
