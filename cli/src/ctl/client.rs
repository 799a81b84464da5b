//! A connection to a machine.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use lodge_model::control::wire::{Message, WireError, call_line, read_message};
use lodge_model::control::{Event, MAX_LINE, Request};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::Value;

/// A machine answers at once, but for a pause under load.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection.
pub struct Client {
    socket: BufReader<UnixStream>,
    id: u64,
}

impl Client {
    /// Connects to the socket at `path`, without waiting.
    ///
    /// # Errors
    /// Nobody is there, or does not let us in.
    pub fn connect(path: &Path) -> io::Result<Self> {
        // A machine that is stopped (SIGSTOP) accepts nobody, and a full queue would hold us up for ever.
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        let socket = UnixStream::from(fd);
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut client = Self { socket: BufReader::new(socket), id: 0 };
        client.wait_at_most(PATIENCE)?;
        Ok(client)
    }

    /// Waits so long for an answer from now on.
    ///
    /// # Errors
    /// The time is zero.
    pub fn wait_at_most(&mut self, time: Duration) -> io::Result<()> {
        self.socket.get_ref().set_read_timeout(Some(time))
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The connection's; in the inner result what the machine says against it.
    pub fn ask(&mut self, request: &Request) -> io::Result<Result<Value, WireError>> {
        self.id += 1;
        let line = call_line(self.id, request)?;
        // A machine that refuses the connection says why before it closes it.
        let sent = self.socket.get_mut().write_all(line.as_bytes());
        loop {
            match self.read() {
                Ok(Message::Answer { id, result }) if id == self.id || id.is_null() => {
                    return Ok(result);
                }
                Ok(Message::Answer { .. } | Message::Event(_)) => {}
                Err(error) => return Err(sent.err().unwrap_or(error)),
            }
        }
    }

    /// Waits for the next event, however long; nothing is one of an unknown kind.
    ///
    /// # Errors
    /// The connection's.
    pub fn next_event(&mut self) -> io::Result<Option<Event>> {
        self.socket.get_ref().set_read_timeout(None)?;
        loop {
            if let Message::Event(event) = self.read()? {
                return Ok(event);
            }
        }
    }

    /// Waits until the machine ends the connection.
    pub fn wait_for_end(mut self) {
        // Whatever happens to the connection is its end.
        let _ = io::copy(&mut self.socket, &mut io::sink());
    }

    fn read(&mut self) -> io::Result<Message> {
        let mut line = Vec::new();
        (&mut self.socket).take(MAX_LINE as u64).read_until(b'\n', &mut line).map_err(|error| {
            match error.kind() {
                // What a socket says when its time limit is over.
                io::ErrorKind::WouldBlock => {
                    io::Error::new(io::ErrorKind::TimedOut, "it was waited for long enough")
                }
                _ => error,
            }
        })?;
        if line.is_empty() {
            let what = "the connection has ended";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        }
        Ok(read_message(&line)?)
    }
}
