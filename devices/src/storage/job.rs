//! What a command needs of the disk, as a sequence of requests to it.
//!
//! ```text
//!   Job: [step] [step] ...        e.g. write, flush, compare
//!          |  one request at a time
//!          v
//!        Lane --> DiskQueue --> ended: the step goes on, or the next one begins
//! ```
//!
//! Reads and writes go between the disk and guest RAM directly. What cannot (comparing, patterns, CD sectors
//! with their frames) goes through a small buffer of the job's own, a piece at a time.

use std::collections::VecDeque;
use std::io;

use lodge_disk::{Buffer, Op};
use lodge_memory::GuestMemory;

use super::cdrom::sector::Frame;
use crate::dma::Scatter;

/// Bytes of the job's own buffer at most.
const PIECE: u64 = 1 << 20;
/// User data of a CD sector.
const CD_SECTOR: u64 = 2048;

/// Why a job ended early.
#[derive(Debug)]
pub enum Fault {
    /// The disk failed, reading.
    Read(io::Error),
    /// The disk failed, writing.
    Write(io::Error),
    /// The data differ from this byte on.
    Differs(u64),
}

/// Requests to a disk, one after the other.
#[derive(Debug, Default)]
pub struct Job {
    steps: VecDeque<Step>,
    /// Bytes that went through the initiator's buffers.
    transferred: u64,
    /// Our own memory, for the steps that need it. It is written by the disk while a request is under way.
    buffer: Vec<u8>,
}

#[derive(Debug)]
enum Step {
    /// Requests without data.
    Plain(VecDeque<Op>),
    Read(Transfer),
    Write(Transfer),
    Fill(Fill),
    Compare(Compare),
    Sectors(Sectors),
}

/// A request between the disk and guest RAM.
#[derive(Debug)]
struct Transfer {
    offset: u64,
    /// Bytes of the disk.
    len: u64,
    /// Bytes after those, which the disk does not have: they read as zeroes.
    zeroes: u64,
    data: Scatter,
    submitted: bool,
}

/// One block, again and again.
#[derive(Debug)]
struct Fill {
    block: Vec<u8>,
    offset: u64,
    left: u64,
}

/// The disk's data against the initiator's.
#[derive(Debug)]
struct Compare {
    offset: u64,
    left: u64,
    data: Scatter,
    /// Where in `data` the next piece is.
    at: u64,
}

/// CD sectors with more than their user data.
#[derive(Debug)]
struct Sectors {
    frame: Frame,
    next: u32,
    left: u32,
    data: Scatter,
    at: u64,
    size: u64,
}

impl Job {
    /// A job of one step.
    fn new(step: Step) -> Self {
        Self { steps: [step].into(), ..Self::default() }
    }

    /// Reads `len` bytes at `offset` into the first bytes of `data`; what lies behind `size`, the end of the
    /// disk, reads as zeroes.
    pub fn read(offset: u64, len: u64, data: &Scatter, size: u64) -> Self {
        let there = size.saturating_sub(offset).min(len);
        let (zeroes, data) = (len - there, data.clone());
        Self::new(Step::Read(Transfer { offset, len: there, zeroes, data, submitted: false }))
    }

    /// Writes the first `len` bytes of `data` at `offset`.
    pub fn write(offset: u64, len: u64, data: &Scatter) -> Self {
        let data = data.clone();
        Self::new(Step::Write(Transfer { offset, len, zeroes: 0, data, submitted: false }))
    }

    /// Compares `len` bytes at `offset` with the first ones of `data`.
    pub fn compare(offset: u64, len: u64, data: &Scatter) -> Self {
        Self::new(Step::Compare(Compare { offset, left: len, data: data.clone(), at: 0 }))
    }

    /// Makes what was written durable.
    pub fn flush() -> Self {
        Self::ops([Op::Flush].into())
    }

    /// Requests without data, in order.
    pub fn ops(ops: VecDeque<Op>) -> Self {
        Self::new(Step::Plain(ops))
    }

    /// Writes `block` again and again, `len` bytes (a multiple of its length) at `offset`.
    pub fn fill(offset: u64, len: u64, block: Vec<u8>) -> Self {
        Self::new(Step::Fill(Fill { block, offset, left: len }))
    }

    /// Reads `count` CD sectors from `first` on, with what `frame` says of each; what lies behind `size`, the end
    /// of the disk, reads as zeroes.
    pub(super) fn sectors(first: u32, count: u32, frame: Frame, data: &Scatter, size: u64) -> Self {
        let data = data.clone();
        Self::new(Step::Sectors(Sectors { frame, next: first, left: count, data, at: 0, size }))
    }

    /// This job, and then the other one.
    pub fn then(mut self, other: Self) -> Self {
        self.steps.extend(other.steps);
        self
    }

    /// Bytes that went through the initiator's buffers so far.
    pub fn transferred(&self) -> u64 {
        self.transferred
    }

    /// The first request, or `None` if there is nothing to do.
    pub(super) fn begin(&mut self, memory: &GuestMemory) -> Result<Option<Op>, Fault> {
        self.advance(memory, false)
    }

    /// The last request has ended as `result` says: the next one, or `None` at the end.
    pub(super) fn ended(
        &mut self,
        memory: &GuestMemory,
        result: io::Result<u64>,
    ) -> Result<Option<Op>, Fault> {
        let error = match result {
            Ok(_) => return self.advance(memory, true),
            Err(error) => error,
        };
        match self.steps.front() {
            Some(Step::Read(step)) => {
                // The disk may have written before it failed.
                step.data.wrote(memory, step.len);
                Err(Fault::Read(error))
            }
            Some(Step::Compare(_) | Step::Sectors(_)) => Err(Fault::Read(error)),
            _ => Err(Fault::Write(error)),
        }
    }

    fn advance(&mut self, memory: &GuestMemory, mut ended: bool) -> Result<Option<Op>, Fault> {
        while let Some(step) = self.steps.front_mut() {
            if std::mem::take(&mut ended) {
                self.transferred += step.ended(memory, &self.buffer)?;
            }
            match step.next(memory, &mut self.buffer)? {
                Some(op) => return Ok(Some(op)),
                None => self.steps.pop_front(),
            };
        }
        Ok(None)
    }
}

/// Guest RAM that is not where it was when the list was made; it cannot be.
fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}

/// The job's buffer with `len` bytes, as the disk has it.
fn own(buffer: &mut Vec<u8>, len: u64) -> Vec<Buffer> {
    buffer.resize(len as usize, 0);
    vec![Buffer { ptr: buffer.as_mut_ptr(), len: buffer.len() }]
}

impl Step {
    /// The step's next request.
    fn next(&mut self, memory: &GuestMemory, buffer: &mut Vec<u8>) -> Result<Option<Op>, Fault> {
        match self {
            Self::Plain(ops) => Ok(ops.pop_front()),
            Self::Read(step) if step.submitted || step.len == 0 => Ok(None),
            Self::Write(step) if step.submitted || step.len == 0 => Ok(None),
            Self::Read(step) => {
                step.submitted = true;
                let buffers = step.data.buffers(memory, 0, step.len);
                let buffers = buffers.ok_or_else(|| Fault::Read(gone()))?;
                Ok(Some(Op::Read { offset: step.offset, buffers }))
            }
            Self::Write(step) => {
                step.submitted = true;
                let buffers = step.data.buffers(memory, 0, step.len);
                let buffers = buffers.ok_or_else(|| Fault::Write(gone()))?;
                Ok(Some(Op::Write { offset: step.offset, buffers }))
            }
            Self::Fill(step) => Ok(step.next(buffer)),
            Self::Compare(step) => Ok((step.left > 0).then(|| {
                let buffers = own(buffer, step.left.min(PIECE));
                Op::Read { offset: step.offset, buffers }
            })),
            Self::Sectors(step) => Ok((step.left > 0).then(|| {
                let len = u64::from(step.left).min(PIECE / CD_SECTOR) * CD_SECTOR;
                let offset = u64::from(step.next) * CD_SECTOR;
                buffer.clear();
                let mut buffers = own(buffer, len);
                buffers[0].len = len.min(step.size.saturating_sub(offset)) as usize;
                Op::Read { offset, buffers }
            })),
        }
    }

    /// The request that [`Step::next`] gave has ended well; returns how many bytes went through the initiator's
    /// buffers.
    fn ended(&mut self, memory: &GuestMemory, buffer: &[u8]) -> Result<u64, Fault> {
        match self {
            Self::Plain(_) | Self::Fill(_) => Ok(0),
            Self::Read(step) => {
                step.data.wrote(memory, step.len);
                let zeroes = vec![0; step.zeroes.min(PIECE) as usize];
                step.data.write(memory, step.len, &zeroes);
                Ok(step.len + step.zeroes)
            }
            Self::Write(step) => Ok(step.len),
            Self::Compare(step) => step.ended(memory, buffer),
            Self::Sectors(step) => Ok(step.ended(memory, buffer)),
        }
    }
}

impl Fill {
    fn next(&mut self, buffer: &mut Vec<u8>) -> Option<Op> {
        if self.left == 0 || self.block.is_empty() {
            return None;
        }
        let block = self.block.len() as u64;
        let len = self.left.min(PIECE / block * block);
        let buffers = own(buffer, len);
        for part in buffer.chunks_mut(self.block.len()) {
            part.copy_from_slice(&self.block[..part.len()]);
        }
        let offset = self.offset;
        self.offset += len;
        self.left -= len;
        Some(Op::Write { offset, buffers })
    }
}

impl Compare {
    fn ended(&mut self, memory: &GuestMemory, buffer: &[u8]) -> Result<u64, Fault> {
        let mut theirs = vec![0; buffer.len()];
        let got = self.data.read(memory, self.at, &mut theirs);
        let differs = buffer.iter().zip(&theirs[..got]).position(|(a, b)| a != b);
        if let Some(at) = differs.or((got < buffer.len()).then_some(got)) {
            return Err(Fault::Differs(self.at + at as u64));
        }
        let len = buffer.len() as u64;
        self.offset += len;
        self.at += len;
        self.left -= len;
        Ok(len)
    }
}

impl Sectors {
    fn ended(&mut self, memory: &GuestMemory, buffer: &[u8]) -> u64 {
        let mut out = Vec::with_capacity(buffer.len() + buffer.len() / 4);
        for data in buffer.chunks(CD_SECTOR as usize) {
            self.frame.encode(self.next, data, &mut out);
            self.next += 1;
            self.left -= 1;
        }
        let written = self.data.write(memory, self.at, &out) as u64;
        self.at += written;
        written
    }
}
