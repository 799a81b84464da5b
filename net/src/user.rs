//! A user-mode network: a `passt` process of our own turns the guest's frames into ordinary sockets of the host.
//! It needs no rights and no set-up.
//!
//! ```text
//!  virtio-net ── User ── relay ── passt ── TCP, UDP, ICMP sockets of the host
//!                   [length u32 big-endian][frame] [length][frame] ...
//! ```
//!
//! What the guest sees, always the same:
//!
//! | address | is |
//! | --- | --- |
//! | 10.0.2.15/24 | the guest, by DHCP |
//! | 10.0.2.2 ([`GATEWAY`]) | the gateway, and the host's loopback: 10.0.2.2:80 is 127.0.0.1:80 of the host |
//! | the host's resolvers | DNS, by DHCP |
//!
//! IPv6 is the host's own prefix, when the host has a default route for it. A frame may be as long as
//! 65 549 bytes without its header (the MTU told by DHCP is 65520): a card wants large or mergeable receive buffers.
//!
//! passt ends when its end of the socket pair is closed, and so with this process, however that ends. (A signal at the
//! parent's death would be wrong: it comes when the *thread* that started passt ends.)

mod guard;
mod passt;
mod relay;
mod stream;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, RawFd};

use crate::backend::check_offloads;
use crate::{Backend, Buffer, Offloads, Result};
use passt::Passt;
use stream::Framed;

/// The guest's gateway; connections to it reach the loopback address of the host.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// What is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    /// Of which protocol.
    pub protocol: Protocol,
    /// The host's address to listen on. [`Forward::tcp`] takes the loopback address: what is open to the
    /// whole network should have been asked for.
    pub address: IpAddr,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl Forward {
    /// A TCP port of the host's loopback address.
    pub fn tcp(host: u16, guest: u16) -> Self {
        let address = Ipv4Addr::LOCALHOST.into();
        Self { protocol: Protocol::Tcp, address, host, guest }
    }
}

/// What the user-mode network should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserOptions {
    /// The card's hardware address.
    pub mac: [u8; 6],
    /// Ports to forward.
    pub forwards: Vec<Forward>,
}

/// A user-mode network, for one queue pair.
#[derive(Debug)]
pub struct User {
    stream: Framed,
    passt: Passt,
}

impl User {
    /// Starts passt and waits until it answers.
    ///
    /// # Errors
    /// When passt is not installed or does not start (with what it says), or a port is taken.
    pub fn open(options: &UserOptions) -> Result<Self> {
        let (mut passt, stream) = Passt::start(&options.forwards)?;
        let mut stream = Framed::new(stream);
        passt.wait_until_ready(&mut stream, options.mac)?;
        passt::check_forwards(&options.forwards, &passt)?;
        Ok(Self { stream, passt })
    }

    fn explain(&self, e: io::Error) -> io::Error {
        use io::ErrorKind::{BrokenPipe, UnexpectedEof};
        match e.kind() {
            kind @ (BrokenPipe | UnexpectedEof) => {
                io::Error::new(kind, format!("passt has gone: {}", self.passt.said()))
            }
            _ => e,
        }
    }
}

impl AsRawFd for User {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Backend for User {
    unsafe fn receive(&mut self, bufs: &mut [Buffer]) -> io::Result<Option<usize>> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.receive(bufs) }.map_err(|e| self.explain(e))
    }

    unsafe fn send(&mut self, bufs: &[Buffer]) -> io::Result<bool> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.send(bufs) }.map_err(|e| self.explain(e))
    }

    fn wants_write(&self) -> bool {
        self.stream.wants_write()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush().map_err(|e| self.explain(e))
    }

    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }

    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()> {
        check_offloads(accepted, Offloads::empty())
    }
}
