//! What can go wrong when a network is opened, in words for the user who asked for it.

use std::io;
use std::net::IpAddr;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused something.
    #[error("cannot {action}")]
    Io {
        /// What was being done to what.
        action: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no interface of that name.
    #[error(
        "there is no network interface {name:?}; make a tap with \
         `ip tuntap add dev {name} mode tap user $USER && ip link set {name} up`"
    )]
    NoSuchTap {
        /// The name.
        name: String,
    },
    /// The name cannot be one of an interface.
    #[error("{name:?} is no name for a network interface: 1 to 15 bytes, no `/`, no spaces")]
    BadName {
        /// The name.
        name: String,
    },
    /// The interface is there and is something else.
    #[error(
        "the network interface {name} is no tap, or not one for {queues} queue(s); \
         make one with `ip tuntap add dev NAME mode tap{}`",
        if *queues > 1 { " multi_queue" } else { "" }
    )]
    NotATap {
        /// The interface.
        name: String,
        /// How many queues were asked for.
        queues: usize,
    },
    /// Another process holds the tap.
    #[error("the tap {name} is in use by another process (one machine for each tap)")]
    TapBusy {
        /// The interface.
        name: String,
    },
    /// The tap belongs to somebody else.
    #[error(
        "no right to use the tap {name}; as root, give it to this user with \
         `ip tuntap add dev {name} mode tap user $USER`, and see that /dev/net/tun can be opened"
    )]
    TapDenied {
        /// The interface.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The program for the user-mode network is not installed.
    #[error("the user-mode network needs passt, which is not installed: `apt install passt`")]
    NoPasst,
    /// Passt ended, or does not answer.
    #[error("the user-mode network does not start: passt says: {said}")]
    Passt {
        /// The last lines that it wrote.
        said: String,
    },
    /// The port to be forwarded is not free.
    #[error("port {port} of {address} cannot be forwarded: it is in use on this host")]
    PortTaken {
        /// The host's address.
        address: IpAddr,
        /// The host's port.
        port: u16,
    },
    /// The port to be forwarded is one of those for root.
    #[error(
        "port {port} of {address} cannot be forwarded: this user may not listen there; \
         take one from 1024 on, or lower the sysctl net.ipv4.ip_unprivileged_port_start"
    )]
    PortDenied {
        /// The host's address.
        address: IpAddr,
        /// The host's port.
        port: u16,
    },
}

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { action: action.into(), source }
    }
}
