//! What is behind a disk: image files and block devices, read and written asynchronously.
//!
//! ```text
//!   virtqueue thread 0 ── DiskQueue ──┐ own io_uring, own completion eventfd
//!   virtqueue thread 1 ── DiskQueue ──┤
//!                                     └── Disk: size, lock, (qcow2) the owner of the metadata
//! ```
//!
//! [`Disk`] is the image, shared by all; [`DiskQueue`] is one thread's way to it. Nothing here knows
//! of virtio, and nothing blocks the thread that submits.

mod engine;
mod error;
mod iov;
mod lock;
mod open;
mod qcow2;
mod raw;
mod request;

pub use engine::EngineChoice;
pub use error::{Error, Result};
pub use open::{Format, OpenOptions, open};
pub use request::{Buffer, Capabilities, Completion, Disk, DiskQueue, Op, Request};
