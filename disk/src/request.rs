//! The two traits of a disk, and the requests and completions that cross them.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::Result;

/// A piece of memory that a request reads from or writes to.
///
/// It is a raw pointer because guest memory is shared with running vCPUs: no Rust reference to it may
/// exist. Who submits a request promises what [`DiskQueue::submit`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// First byte.
    pub ptr: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: a buffer is an address and a length; who may use the memory is settled by the contract of
// `DiskQueue::submit`, which does not depend on the thread.
unsafe impl Send for Buffer {}

/// What is asked of a disk. Offsets and lengths are bytes from the start of the guest's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fills `buffers`, in order, from `offset` on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where the data goes.
        buffers: Vec<Buffer>,
    },
    /// Writes `buffers`, in order, from `offset` on.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where the data comes from; it is only read.
        buffers: Vec<Buffer>,
    },
    /// Makes every write that completed before this was submitted durable.
    Flush,
    /// Says that the guest no longer needs the range. It may read as anything it read as before, or
    /// as zeroes, afterwards.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the space may be given back to the host.
        unmap: bool,
    },
}

/// One request. The `id` is the submitter's and comes back in the [`Completion`]; two requests in
/// flight in one queue should not share one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The submitter's name for the request.
    pub id: u64,
    /// What to do.
    pub op: Op,
}

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// The [`Request::id`].
    pub id: u64,
    /// Bytes read or written in full (0 for a flush), or why not. After an error the contents of the range (of
    /// the buffers, for a read) are unknown; other requests and the queue go on unharmed.
    pub result: io::Result<u64>,
}

/// What a disk can do beyond reading, writing and flushing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// [`Op::Discard`] gives space back to the host.
    pub discard: bool,
    /// [`Op::WriteZeroes`] is cheaper than writing zeroes. It works in any case on a writable disk.
    pub write_zeroes: bool,
}

/// A disk image or block device that is open, locked and checked. Dropping the last handle (the
/// `Arc<dyn Disk>` and all queues) writes back metadata, closes the files and releases the locks.
pub trait Disk: Send + Sync {
    /// Size that the guest sees, in bytes; a multiple of [`Disk::block_size`].
    fn size(&self) -> u64;

    /// Whether writing requests are refused (with `EROFS`, in their completion).
    fn read_only(&self) -> bool;

    /// Logical block size in bytes: 512 or 4096. Requests of any alignment work; this is what to
    /// tell the guest.
    fn block_size(&self) -> u32;

    /// What the disk can do.
    fn capabilities(&self) -> Capabilities;

    /// Makes a queue, for one thread. Any number of queues work on one disk in parallel.
    ///
    /// # Errors
    /// When the kernel grants no more rings, threads, memory or descriptors.
    fn queue(&self) -> Result<Box<dyn DiskQueue>>;
}

/// One thread's asynchronous way to a disk.
///
/// The life of a request: [`submit`](DiskQueue::submit), then [`completion_fd`](DiskQueue::completion_fd) becomes
/// readable, then [`complete`](DiskQueue::complete) reports it. Requests of a queue run in parallel and end in any order;
/// a request sees the effects of those that completed before it was submitted, on any queue.
///
/// Dropping a queue waits for what is in flight, so that no buffer is touched afterwards.
pub trait DiskQueue: Send {
    /// Starts a request. It never blocks on the disk. What is wrong with the request itself (outside of the disk, write to a
    /// read-only disk) is told by its completion, so that callers have one path for errors.
    ///
    /// # Errors
    /// When the queue itself can take no request any more (the kernel refuses the submission); there will
    /// be no completion for this one then.
    ///
    /// # Safety
    /// Each buffer must be valid memory for its length until the request's completion was
    /// returned by [`complete`](DiskQueue::complete) or the queue was dropped. Others (vCPUs) may read and write it meanwhile,
    /// but no Rust reference to it may exist.
    unsafe fn submit(&mut self, request: Request) -> Result<()>;

    /// Readable (poll, epoll) when [`complete`](DiskQueue::complete) should be called. `complete` reads (resets) it; the caller need not.
    fn completion_fd(&self) -> &EventFd;

    /// Appends all requests that ended since the last call to `out`; never blocks. It also moves requests on that
    /// need several steps, so it may be woken and return nothing.
    fn complete(&mut self, out: &mut Vec<Completion>);

    /// How many requests were submitted and not yet returned by [`complete`](DiskQueue::complete).
    fn in_flight(&self) -> usize;
}

/// Whether a request can be done at all on a disk of `size` bytes: its range and its right to write.
pub(crate) fn check(op: &Op, size: u64, read_only: bool) -> io::Result<()> {
    let total = |b: &[Buffer]| b.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len as u64));
    let (offset, len, writes) = match op {
        Op::Read { offset, buffers } => (*offset, total(buffers), false),
        Op::Write { offset, buffers } => (*offset, total(buffers), true),
        Op::Flush => (0, Some(0), false),
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
            (*offset, Some(*len), true)
        }
    };
    if writes && read_only {
        return Err(io::Error::from_raw_os_error(libc::EROFS));
    }
    match len.and_then(|len| offset.checked_add(len)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the request leaves the disk")),
    }
}
