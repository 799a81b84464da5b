//! One job as a sequence of system calls: what is next, and what a result means. Short transfers go on, reads beyond
//! the end of a file are zeroes, and zeroing tries the cheap ways before it writes zeroes.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use libc::iovec;

/// Most buffers that one system call takes (`UIO_MAXIOV`).
const MAX_IOV: usize = 1024;
/// Most bytes that one zeroing or discarding call covers, so that none runs for very long.
const MAX_RANGE: u64 = 1 << 30;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What to do with a file. Offsets and lengths are bytes in the host's file.
pub(crate) enum Io {
    Read { offset: u64, buffers: Vec<iovec> },
    Write { offset: u64, buffers: Vec<iovec> },
    Sync,
    Discard { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
}

/// The ways to zero a range or give it back, each the next one's predecessor when the file does not know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Punch,
    PunchOnly,
    ZeroRange,
    Write,
}

enum Kind {
    Read,
    Write,
    Sync,
    Range(Way),
}

/// A job under way.
pub(crate) struct Job {
    pub(crate) file: Arc<File>,
    pub(crate) token: u64,
    kind: Kind,
    offset: u64,
    /// Bytes done.
    done: u64,
    /// Bytes asked for.
    total: u64,
    /// What is left of the buffers, from `first` on.
    buffers: Vec<iovec>,
    first: usize,
}

// SAFETY: the pointers in `buffers` are only used by the system calls made for this job; that the memory stays
// valid on any thread is the contract of `Engine::submit`.
unsafe impl Send for Job {}

/// One system call to make. The pointers live as long as the job is not touched.
pub(crate) enum Call {
    Readv { fd: RawFd, iov: *const iovec, count: u32, offset: u64 },
    Writev { fd: RawFd, iov: *const iovec, count: u32, offset: u64 },
    Fdatasync { fd: RawFd },
    Fallocate { fd: RawFd, mode: i32, offset: u64, len: u64 },
}

impl Job {
    pub(crate) fn new(file: Arc<File>, token: u64, io: Io) -> Self {
        let total_of = |b: &[iovec]| b.iter().map(|v| v.iov_len as u64).sum();
        let (kind, offset, total, buffers) = match io {
            Io::Read { offset, buffers } => (Kind::Read, offset, total_of(&buffers), buffers),
            Io::Write { offset, buffers } => (Kind::Write, offset, total_of(&buffers), buffers),
            Io::Sync => (Kind::Sync, 0, 0, Vec::new()),
            Io::Discard { offset, len } => (Kind::Range(Way::PunchOnly), offset, len, Vec::new()),
            Io::Zero { offset, len, unmap } => {
                let way = if unmap { Way::Punch } else { Way::ZeroRange };
                (Kind::Range(way), offset, len, Vec::new())
            }
        };
        let mut job = Self { file, token, kind, offset, done: 0, total, buffers, first: 0 };
        job.skip_empty();
        job
    }

    /// Whether there is nothing to do at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.total == 0 && !matches!(self.kind, Kind::Sync)
    }

    /// The call to make now.
    pub(crate) fn next(&mut self) -> Call {
        use std::os::fd::AsRawFd;
        let fd = self.file.as_raw_fd();
        let offset = self.offset.saturating_add(self.done);
        let left = self.total - self.done;
        match self.kind {
            Kind::Sync => Call::Fdatasync { fd },
            Kind::Range(Way::Write) => {
                self.fill_with_zeroes(left);
                let (iov, count) = self.iov();
                Call::Writev { fd, iov, count, offset }
            }
            Kind::Range(way) => {
                let mode = match way {
                    Way::Punch | Way::PunchOnly => libc::FALLOC_FL_PUNCH_HOLE,
                    Way::ZeroRange | Way::Write => libc::FALLOC_FL_ZERO_RANGE,
                };
                let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
                Call::Fallocate { fd, mode, offset, len: left.min(MAX_RANGE) }
            }
            Kind::Read => {
                let (iov, count) = self.iov();
                Call::Readv { fd, iov, count, offset }
            }
            Kind::Write => {
                let (iov, count) = self.iov();
                Call::Writev { fd, iov, count, offset }
            }
        }
    }

    /// Takes the result of the call made last (as the kernel gives it: negative is an error number), and
    /// returns how the job ended, or `None` when there is another call to make.
    pub(crate) fn advance(&mut self, result: i64) -> Option<io::Result<u64>> {
        if result < 0 {
            return self.failed((-result).try_into().unwrap_or(libc::EIO));
        }
        match self.kind {
            Kind::Sync => return Some(Ok(0)),
            Kind::Read if result == 0 => {
                self.zero_rest();
                self.done = self.total;
            }
            Kind::Write | Kind::Range(Way::Write) if result == 0 => {
                return Some(Err(io::ErrorKind::WriteZero.into()));
            }
            Kind::Range(Way::Write) => self.done += (result as u64).min(self.total - self.done),
            Kind::Range(_) => self.done += (self.total - self.done).min(MAX_RANGE),
            Kind::Read | Kind::Write => self.consume(result as u64),
        }
        (self.done >= self.total).then_some(Ok(self.total))
    }

    /// After an error: again, another way, or the end.
    fn failed(&mut self, errno: i32) -> Option<io::Result<u64>> {
        if matches!(errno, libc::EINTR | libc::EAGAIN) {
            return None;
        }
        // EINVAL is what a block device says to a range that is not aligned to its blocks.
        let unknown =
            matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV);
        if let Kind::Range(way) = &mut self.kind
            && unknown
        {
            match way {
                // A discard is a hint: a file that cannot take it has nothing to complain of.
                Way::PunchOnly => return Some(Ok(self.total)),
                Way::Punch => *way = Way::ZeroRange,
                Way::ZeroRange => *way = Way::Write,
                Way::Write => return Some(Err(io::Error::from_raw_os_error(errno))),
            }
            return None;
        }
        Some(Err(io::Error::from_raw_os_error(errno)))
    }

    fn iov(&self) -> (*const iovec, u32) {
        let rest = &self.buffers[self.first..];
        (rest.as_ptr(), rest.len().min(MAX_IOV) as u32)
    }

    fn fill_with_zeroes(&mut self, left: u64) {
        self.buffers.clear();
        self.first = 0;
        let mut left = left.min((MAX_IOV * ZEROES.len()) as u64) as usize;
        while left > 0 {
            let iov_len = left.min(ZEROES.len());
            // The cast drops `const`: only `writev` sees this buffer, and it only reads.
            self.buffers.push(iovec { iov_base: ZEROES.as_ptr() as *mut _, iov_len });
            left -= iov_len;
        }
    }

    fn skip_empty(&mut self) {
        while self.buffers.get(self.first).is_some_and(|v| v.iov_len == 0) {
            self.first += 1;
        }
    }

    /// Takes `bytes` from the front of the buffers.
    fn consume(&mut self, mut bytes: u64) {
        self.done = self.done.saturating_add(bytes).min(self.total);
        while bytes > 0 {
            let Some(v) = self.buffers.get_mut(self.first) else { break };
            let step = bytes.min(v.iov_len as u64) as usize;
            // SAFETY: `step` is at most the buffer's length, so the result is within it or one past its end.
            v.iov_base = unsafe { v.iov_base.cast::<u8>().add(step) }.cast();
            v.iov_len -= step;
            bytes -= step as u64;
            if v.iov_len == 0 {
                self.first += 1;
            }
        }
        self.skip_empty();
    }

    /// A read met the end of the file: what is left reads as zeroes.
    fn zero_rest(&mut self) {
        for v in &self.buffers[self.first..] {
            // SAFETY: the contract of `Engine::submit`: the memory is valid until the job is returned.
            unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), 0, v.iov_len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(io: Io) -> Job {
        Job::new(Arc::new(tempfile::tempfile().unwrap()), 1, io)
    }

    fn iov(data: &mut [u8]) -> iovec {
        iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }
    }

    #[test]
    fn a_short_read_goes_on_and_the_end_of_the_file_is_zeroes() {
        let (mut a, mut b) = ([1u8; 10], [2u8; 10]);
        let buffers = vec![iov(&mut a), iov(&mut []), iov(&mut b)];
        let mut read = job(Io::Read { offset: 100, buffers });
        assert!(matches!(read.next(), Call::Readv { count: 3, offset: 100, .. }));
        assert!(read.advance(-i64::from(libc::EINTR)).is_none());
        assert!(read.advance(12).is_none());
        let Call::Readv { iov, count: 1, offset: 112, .. } = read.next() else { panic!() };
        // SAFETY: the job has one buffer left.
        assert_eq!(unsafe { (*iov).iov_len }, 8);
        assert_eq!(read.advance(0).unwrap().unwrap(), 20);
        assert_eq!((a, b), ([1; 10], [2, 2, 0, 0, 0, 0, 0, 0, 0, 0]));
    }

    #[test]
    fn more_buffers_than_a_call_takes_go_in_several() {
        let mut bytes = vec![0u8; 3000];
        let buffers = bytes.chunks_mut(1).map(iov).collect();
        let mut write = job(Io::Write { offset: 0, buffers });
        assert!(matches!(write.next(), Call::Writev { count: 1024, .. }));
        assert!(write.advance(1024).is_none());
        assert!(matches!(write.next(), Call::Writev { count: 1024, offset: 1024, .. }));
        assert!(write.advance(1024).is_none());
        assert!(matches!(write.next(), Call::Writev { count: 952, offset: 2048, .. }));
        assert_eq!(write.advance(952).unwrap().unwrap(), 3000);
    }

    #[test]
    fn zeroing_tries_the_cheap_ways_first() {
        let len = (64 << 20) + 5;
        let mut zero = job(Io::Zero { offset: 7, len, unmap: true });
        let no = -i64::from(libc::EOPNOTSUPP);
        assert!(
            matches!(zero.next(), Call::Fallocate { mode, .. } if mode & libc::FALLOC_FL_PUNCH_HOLE != 0)
        );
        assert!(zero.advance(no).is_none());
        assert!(
            matches!(zero.next(), Call::Fallocate { mode, .. } if mode & libc::FALLOC_FL_ZERO_RANGE != 0)
        );
        assert!(zero.advance(no).is_none());
        assert!(matches!(zero.next(), Call::Writev { count: 1024, offset: 7, .. }));
        assert!(zero.advance(64 << 20).is_none());
        assert!(matches!(zero.next(), Call::Writev { count: 1, .. }));
        assert_eq!(zero.advance(5).unwrap().unwrap(), len);
        let mut full = job(Io::Zero { offset: 0, len: 512, unmap: false });
        full.next();
        assert!(full.advance(-i64::from(libc::ENOSPC)).unwrap().is_err());
        let mut hint = job(Io::Discard { offset: 0, len: 512 });
        hint.next();
        assert_eq!(hint.advance(no).unwrap().unwrap(), 512);
    }
}
