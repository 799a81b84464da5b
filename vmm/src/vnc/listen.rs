//! Where a server listens: a TCP address, or a Unix socket whose file is its own.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::peer::Socket;

/// Where to listen: `HOST:PORT` (port 0: any that is free) or `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let named = !path.is_empty();
            return named.then(|| Self::Unix(path.into())).ok_or_else(|| wrong(text));
        }
        let addresses = text.to_socket_addrs().map_err(|_| wrong(text))?;
        addresses.into_iter().next().map(Self::Tcp).ok_or_else(|| wrong(text))
    }
}

fn wrong(text: &str) -> String {
    format!("'{text}' is no place to listen at: say HOST:PORT, 127.0.0.1:5901 say, or unix:PATH")
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that listens; a Unix socket's file goes with it.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket and its file.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Begins to listen.
    ///
    /// # Errors
    /// The address is in use or not this host's; the file exists, or cannot be made.
    pub fn open(listen: &Listen) -> io::Result<Self> {
        let listener = match listen {
            Listen::Tcp(address) => Self::Tcp(TcpListener::bind(address)?),
            Listen::Unix(path) => {
                remove_stale(path);
                Self::Unix(UnixListener::bind(path)?, path.clone())
            }
        };
        match &listener {
            Self::Tcp(tcp) => tcp.set_nonblocking(true)?,
            Self::Unix(unix, _) => unix.set_nonblocking(true)?,
        }
        Ok(listener)
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is dead.
    pub fn place(&self) -> io::Result<Listen> {
        match self {
            Self::Tcp(tcp) => tcp.local_addr().map(Listen::Tcp),
            Self::Unix(_, path) => Ok(Listen::Unix(path.clone())),
        }
    }

    /// A connection, if there is one, with a name for messages.
    ///
    /// # Errors
    /// The host's.
    pub fn accept(&self) -> io::Result<Option<(Socket, String)>> {
        let accepted = match self {
            Self::Tcp(tcp) => tcp.accept().and_then(|(socket, address)| {
                socket.set_nonblocking(false)?;
                Ok((Socket::Tcp(socket), address.to_string()))
            }),
            Self::Unix(unix, path) => unix.accept().and_then(|(socket, _)| {
                socket.set_nonblocking(false)?;
                Ok((Socket::Unix(socket), format!("unix:{}", path.display())))
            }),
        };
        match accepted {
            Ok(accepted) => Ok(Some(accepted)),
            Err(error) => match error.kind() {
                // It was quicker to go than we to look.
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(error),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(tcp) => tcp.as_fd(),
            Self::Unix(unix, _) => unix.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // It may be gone already.
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes a socket's file that nobody listens at any more; anything else stays, and is in the way.
fn remove_stale(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    let refused = || {
        UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    if is_socket && refused() {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        let tcp = Listen::Tcp("127.0.0.1:5901".parse().unwrap());
        assert_eq!("127.0.0.1:5901".parse(), Ok(tcp.clone()));
        assert_eq!(tcp.to_string(), "127.0.0.1:5901");
        let unix = Listen::Unix("/run/a b".into());
        assert_eq!("unix:/run/a b".parse(), Ok(unix.clone()));
        assert_eq!(unix.to_string(), "unix:/run/a b");
        for bad in ["", "unix:", "5901", "127.0.0.1", "127.0.0.1:99999"] {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }

    #[test]
    fn stale_sockets_are_replaced_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vnc");
        let listen = Listen::Unix(path.clone());
        // Left by a program that was killed.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::open(&listen).unwrap();
        let busy = Listener::open(&listen).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(Listener::open(&listen).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
