//! A client's connection: TCP or Unix, plain or within TLS, read by one thread and written by another.
//!
//! ```text
//!   reader --- read ---+                             +--- read ---+
//!                      +-- TLS (locked for moments) --+            +-- socket
//!   writer --- write --+                             +--- write --+
//! ```
//!
//! Nobody holds TLS's lock while it waits for the socket, so that a client that reads slowly can still send.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ServerConfig, ServerConnection};

/// A client that takes nothing for so long is gone.
const LONGEST_WRITE: Duration = Duration::from_secs(30);
/// Plain bytes that are encrypted at a time: a TLS record.
const RECORD: usize = 16 << 10;

/// A stream of either kind.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
}

impl Socket {
    /// Sets what both kinds need: a limit for writing; for TCP, no delay, and a look whether the other side is there.
    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => {
                tcp.set_nodelay(true)?;
                setsockopt(&tcp.as_fd(), sockopt::KeepAlive, &true)?;
                setsockopt(&tcp.as_fd(), sockopt::TcpKeepIdle, &60)?;
                tcp.set_write_timeout(Some(LONGEST_WRITE))
            }
            Self::Unix(unix) => unix.set_write_timeout(Some(LONGEST_WRITE)),
        }
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.set_read_timeout(timeout),
            Self::Unix(unix) => unix.set_read_timeout(timeout),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // It fails only where the other side was quicker.
        let _ = match self {
            Self::Tcp(tcp) => tcp.shutdown(how),
            Self::Unix(unix) => unix.shutdown(how),
        };
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(tcp) => (&mut &*tcp).read(buffer),
            Self::Unix(unix) => (&mut &*unix).read(buffer),
        }
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let written = match self {
            Self::Tcp(tcp) => (&mut &*tcp).write_all(bytes),
            Self::Unix(unix) => (&mut &*unix).write_all(bytes),
        };
        written.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => io::Error::new(ErrorKind::TimedOut, "it does not read"),
            _ => error,
        })
    }
}

/// A connection.
pub struct Peer {
    socket: Socket,
    deadline: Mutex<Option<Instant>>,
    tls: OnceLock<Mutex<ServerConnection>>,
}

impl Peer {
    /// A connection that was just accepted.
    ///
    /// # Errors
    /// The socket is dead already.
    pub fn new(socket: Socket) -> io::Result<Self> {
        socket.prepare()?;
        Ok(Self { socket, deadline: Mutex::default(), tls: OnceLock::new() })
    }

    /// What reading takes from now on, in all, before it fails; none for as long as it wants.
    ///
    /// # Errors
    /// The socket is dead.
    pub fn set_time_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        *lock(&self.deadline) = limit.map(|limit| Instant::now() + limit);
        self.socket.set_read_timeout(None)
    }

    fn read_socket(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(deadline) = *lock(&self.deadline) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::new(ErrorKind::TimedOut, "it took too long"));
                }
                self.socket.set_read_timeout(Some(left))?;
            }
            match self.socket.read(buffer) {
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                result => return result,
            }
        }
    }

    /// Reads what is there, at least a byte; 0 at the end. One thread at a time.
    ///
    /// # Errors
    /// The socket's, TLS's, or the time limit.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = self.tls.get() else { return self.read_socket(buffer) };
        let mut sealed = [0; 4096];
        loop {
            match lock(tls).reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
            let n = self.read_socket(&mut sealed)?;
            if n == 0 {
                return Ok(0);
            }
            let mut left = &sealed[..n];
            let mut tls = lock(tls);
            while !left.is_empty() {
                tls.read_tls(&mut left)?;
                tls.process_new_packets().map_err(io::Error::other)?;
            }
        }
    }

    /// Reads exactly as much as fits.
    ///
    /// # Errors
    /// As [`Peer::read`], or the connection ends before.
    pub fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read(buffer)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => buffer = &mut buffer[n..],
            }
        }
        Ok(())
    }

    /// Reads so many bytes.
    ///
    /// # Errors
    /// As [`Peer::read_exact`].
    pub fn read_array<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut array = [0; N];
        self.read_exact(&mut array)?;
        Ok(array)
    }

    /// Writes all of it. One thread at a time.
    ///
    /// # Errors
    /// The socket's, or the client does not read.
    pub fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = self.tls.get() else { return self.socket.write_all(bytes) };
        for part in bytes.chunks(RECORD) {
            let mut sealed = Vec::with_capacity(RECORD + 64);
            {
                let mut tls = lock(tls);
                tls.writer().write_all(part)?;
                while tls.wants_write() {
                    tls.write_tls(&mut sealed)?;
                }
            }
            self.socket.write_all(&sealed)?;
        }
        Ok(())
    }

    /// Goes on within TLS. Nothing else may read or write meanwhile.
    ///
    /// # Errors
    /// The handshake fails.
    pub fn start_tls(&self, config: Arc<ServerConfig>) -> io::Result<()> {
        struct Through<'a>(&'a Peer);
        impl Read for Through<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0.read_socket(buffer)
            }
        }
        impl Write for Through<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.socket.write_all(bytes).map(|()| bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut Through(self))?;
        }
        // There is no second time: the handshake's caller is the only one.
        let _ = self.tls.set(Mutex::new(tls));
        Ok(())
    }

    /// Ends the connection at once; who reads or writes fails.
    pub fn close(&self) {
        self.socket.shutdown(Shutdown::Both);
    }

    /// Ends the connection so that the last words arrive: what the client still sends is read for a moment, because a
    /// socket that is closed with something unread takes back what was written.
    pub fn part(&self) {
        self.socket.shutdown(Shutdown::Write);
        let mut buffer = [0; 1024];
        if self.set_time_limit(Some(Duration::from_secs(1))).is_ok() {
            for _ in 0..64 {
                if !matches!(self.read_socket(&mut buffer), Ok(1..)) {
                    break;
                }
            }
        }
        self.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each holder finishes its change in one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
