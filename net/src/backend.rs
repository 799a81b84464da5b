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
    /// of buffers is 1; who spreads a frame over several virtio buffers changes it. No more than 1023 buffers are used.
    ///
    /// Frames may have been read ahead: ask until there is none, and, when that was not possible (no buffers), ask
    /// again later without waiting for the descriptor.
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

    /// Says whether the driver uses this queue pair. A network that spreads its frames over several
    /// backends gives none to one that is not active; a new backend is active.
    ///
    /// # Errors
    /// As the system says.
    fn set_active(&mut self, active: bool) -> io::Result<()> {
        let _ = active;
        Ok(())
    }
}

/// Length of an Ethernet header: two addresses and a type.
pub(crate) const ETHERNET_HEADER: usize = 14;

/// Length of a list of buffers.
pub(crate) fn total(bufs: &[Buffer]) -> usize {
    bufs.iter().fold(0, |sum, b| sum.saturating_add(b.len))
}

/// Most buffers that one system call takes (`UIO_MAXIOV`), and one to spare for the caller's own.
pub(crate) const MAX_BUFFERS: usize = 1023;

/// All of the list in one piece: a guest may cut its frames into more pieces than a system call takes.
///
/// # Safety
/// As for [`Backend::send`].
pub(crate) unsafe fn gather(bufs: &[Buffer]) -> Vec<u8> {
    let mut whole = vec![0; total(bufs)];
    // SAFETY: the caller's promise.
    unsafe { read_front(bufs, &mut whole) };
    whole
}

/// The form that system calls take.
pub(crate) fn iovecs(bufs: &[Buffer]) -> Vec<libc::iovec> {
    bufs.iter().map(|b| libc::iovec { iov_base: b.ptr.cast(), iov_len: b.len }).collect()
}

/// Copies `data` to the list from the byte `skip` on; what does not fit is left out.
///
/// # Safety
/// As for [`Backend::receive`], and the memory must not overlap `data`.
pub(crate) unsafe fn write_at(bufs: &[Buffer], mut skip: usize, mut data: &[u8]) {
    for b in bufs {
        if skip >= b.len {
            skip -= b.len;
            continue;
        }
        let n = data.len().min(b.len - skip);
        // SAFETY: `skip + n` is at most the buffer's length; the rest is the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), b.ptr.add(skip), n) };
        data = &data[n..];
        skip = 0;
        if data.is_empty() {
            break;
        }
    }
}

/// Copies the first bytes of the list to `data`; returns how many there were.
///
/// # Safety
/// As for [`Backend::send`], and the memory must not overlap `data`.
pub(crate) unsafe fn read_front(bufs: &[Buffer], data: &mut [u8]) -> usize {
    let mut at = 0;
    for b in bufs {
        let n = b.len.min(data.len() - at);
        // SAFETY: `n` is at most both lengths; the rest is the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(b.ptr, data[at..].as_mut_ptr(), n) };
        at += n;
    }
    at
}

/// Whether a driver may accept these offloads from a backend that has `offered`.
pub(crate) fn check_offloads(accepted: Offloads, offered: Offloads) -> io::Result<()> {
    if offered.contains(accepted) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no such offload: {accepted:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_found_across_buffers() {
        let mut bytes = [0u8; 12];
        let at = bytes.as_mut_ptr();
        let list = [5, 0, 4, 3].map({
            let mut start = 0;
            move |len| {
                start += len;
                Buffer { ptr: at.wrapping_add(start - len), len }
            }
        });
        assert_eq!(total(&list), 12);
        // SAFETY: the list lies in `bytes`.
        unsafe {
            write_at(&list, 4, b"abcdefghijk");
            assert_eq!(std::slice::from_raw_parts(at, 12), b"\0\0\0\0abcdefgh");
            let mut front = [0; 7];
            assert_eq!(read_front(&list, &mut front), 7);
            assert_eq!(&front, b"\0\0\0\0abc");
            assert_eq!(read_front(&list, &mut [0; 100]), 12);
        }
    }
}
