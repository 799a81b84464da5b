//! What is behind a network card: a tap interface of the host, or a user-mode network (passt).
//!
//! ```text
//!   virtio-net queue pair ── Backend ── tap: the kernel's bridge, routes, firewall
//!                                   └── user: a Unix stream to a passt process of our own
//! ```
//!
//! Every frame is preceded by the 12-byte `virtio_net_hdr_v1` in both directions, whatever the backend.

mod backend;
mod error;

pub use backend::{Backend, Buffer, HEADER_LEN, Offloads};
pub use error::{Error, Result};
