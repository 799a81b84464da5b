//! The trait of a network backend: frames in, frames out, and what the kernel may leave undone in them.

use std::io;
use std::os::fd::AsRawFd;

/// Length of `virtio_net_hdr_v1` (VIRTIO 1.2, section 5.1.6) that precedes each frame: flags, GSO type,
/// header length, GSO size, checksum start, checksum offset, number of buffers (all little-endian).
pub const HEADER_LEN: usize = 12;

/// A piece of memory that a frame is taken from or put into.
///
/// It is a raw pointer because guest memory is shared with running vCPUs: no Rust reference to it may exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// First byte.
    pub ptr: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: a buffer is an address and a length; who may use the memory is settled by the contracts of
// `Backend::receive` and `Backend::send`, which do not depend on the thread.
unsafe impl Send for Buffer {}

bitflags::bitflags! {
    /// What may be left undone in a frame, to be finished by hardware or never (within one host).
    ///
    /// As [`Backend::offloads`]: what the backend can take from the guest and give to it. As
    /// [`Backend::set_offloads`]: what the guest's driver is ready to receive (`VIRTIO_NET_F_GUEST_*`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// A partial checksum (`VIRTIO_NET_F_CSUM`, `VIRTIO_NET_F_GUEST_CSUM`).
        const CHECKSUM = 1 << 0;
        /// Large TCP over IPv4. Needs `CHECKSUM`.
        const TSO4 = 1 << 1;
        /// Large TCP over IPv6. Needs `CHECKSUM`.
        const TSO6 = 1 << 2;
        /// Large TCP with congestion notification. Needs `TSO4` or `TSO6`.
        const ECN = 1 << 3;
        /// Large UDP, segmented (`VIRTIO_NET_F_GUEST_USO4` and `_USO6`). Needs `CHECKSUM`.
        const USO = 1 << 4;
    }
}

/// One queue pair's way to a network. The descriptor ([`AsRawFd`]) is for epoll: readable when
/// [`receive`](Backend::receive) may have something, writable when [`send`](Backend::send) may go on. It
/// stays the same while the backend lives.
///
/// Nothing here blocks. Each frame begins with a header of [`HEADER_LEN`] bytes.
pub trait Backend: Send + AsRawFd {
    /// Puts the next frame, header first, into `bufs` in order and returns its length (with the header), or `None`
    /// when there is none now. A frame longer than all of `bufs` is lost and is reported as an error of
    /// kind `InvalidData`; a caller that offers 65562 bytes never sees that. The header's number
    /// of buffers is 1; who spreads a frame over several virtio buffers changes it.
    ///
    /// # Errors
    /// `UnexpectedEof` when the network has gone for good; others as the system says. The caller stops asking on those.
    ///
    /// # Safety
    /// Each buffer must be valid memory for its length during the call. Others (vCPUs) may use it meanwhile, but no
    /// Rust reference to it may exist.
    unsafe fn receive(&mut self, bufs: &mut [Buffer]) -> io::Result<Option<usize>>;

    /// Sends the frame, header first, in `bufs`, and returns whether it was taken: `false` means that there is
    /// no room now; ask again with the same frame when the descriptor is writable (or drop it).
    ///
    /// # Errors
    /// `InvalidInput` for a frame that is no frame (shorter than the headers, too long, impossible offload): it is lost,
    /// others are not affected. `BrokenPipe` when the network has gone for good.
    ///
    /// # Safety
    /// As for [`receive`](Backend::receive).
    unsafe fn send(&mut self, bufs: &[Buffer]) -> io::Result<bool>;

    /// Whether something accepted by [`send`](Backend::send) still waits for room in the network: then [`flush`](Backend::flush) wants to be called
    /// when the descriptor is writable, even if the guest sends nothing more.
    fn wants_write(&self) -> bool {
        false
    }

    /// Moves on what [`wants_write`](Backend::wants_write) tells of.
    ///
    /// # Errors
    /// As for [`send`](Backend::send).
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// What the backend can do, fixed for its life.
    fn offloads(&self) -> Offloads;

    /// Says what the guest's driver accepts in frames that it receives.
    ///
    /// # Errors
    /// `InvalidInput` for what [`offloads`](Backend::offloads) lacks; others as the system says.
    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()>;
}
