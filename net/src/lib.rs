//! What is behind a network card: a tap interface of the host, or a user-mode network (passt).
//!
//! ```text
//!   virtio-net queue pair ── Backend ─┬─ Tap:  the kernel's bridge, routes, firewall
//!                                     └─ User: sockets of the host, by a passt process of our own
//! ```
//!
//! Every frame is preceded by the 12-byte `virtio_net_hdr_v1` in both directions, whatever the backend.

mod backend;
mod error;
mod tap;
mod user;

pub use backend::{Backend, Buffer, HEADER_LEN, Offloads};
pub use error::{Error, Result};
pub use tap::Tap;
pub use user::{Forward, GATEWAY, GUEST, Protocol, User, UserOptions};
