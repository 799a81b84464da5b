//! One command of an initiator, and what it comes to.

use lodge_disk::{Disk, Op};
use lodge_memory::GuestMemory;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::job::Job;
use super::sense::Sense;
use crate::dma::Scatter;

/// A command descriptor block, padded with zeroes. Commands of more than 16 bytes are not supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cdb([u8; 16]);

impl Cdb {
    /// The first 16 bytes of what the initiator sent.
    pub fn new(bytes: &[u8]) -> Self {
        let mut cdb = [0; 16];
        for (to, from) in cdb.iter_mut().zip(bytes) {
            *to = *from;
        }
        Self(cdb)
    }

    /// The operation code.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// Byte `at` (0..16; zero beyond).
    pub fn u8(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// The big-endian number of `bytes` (up to 8) bytes at `at`.
    fn number(&self, at: usize, bytes: usize) -> u64 {
        (at..at + bytes).fold(0, |value, at| value << 8 | u64::from(self.u8(at)))
    }

    /// Two bytes at `at`.
    pub fn u16(&self, at: usize) -> u16 {
        self.number(at, 2) as u16
    }

    /// Three bytes at `at`.
    pub fn u24(&self, at: usize) -> u32 {
        self.number(at, 3) as u32
    }

    /// Four bytes at `at`.
    pub fn u32(&self, at: usize) -> u32 {
        self.number(at, 4) as u32
    }

    /// Eight bytes at `at`.
    pub fn u64(&self, at: usize) -> u64 {
        self.number(at, 8)
    }
}

/// What an initiator asks of a logical unit.
pub struct Command<'a> {
    /// What to do.
    pub cdb: Cdb,
    /// Guest RAM.
    pub memory: &'a GuestMemory,
    /// Where data for the unit comes from.
    pub data_out: &'a Scatter,
    /// Where data of the unit goes.
    pub data_in: &'a Scatter,
    /// Sense of the command before, where the transport keeps it until it is asked for (ATAPI).
    pub held_sense: Option<Sense>,
}

impl Command<'_> {
    /// The first `len` bytes of the data that was sent, or as many as there are.
    pub fn parameters(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len.min(usize::try_from(self.data_out.len()).unwrap_or(len))];
        let got = self.data_out.read(self.memory, 0, &mut data);
        data.truncate(got);
        data
    }
}

/// The end of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// What went wrong: the status is CHECK CONDITION.
    pub sense: Option<Sense>,
    /// Data for the initiator, already cut to the allocation length.
    pub data: Vec<u8>,
    /// Bytes that moved through the data buffers; `data` not included.
    pub transferred: u64,
    /// The initiator's buffer is too small, or missing, for what the command has to move. Nothing was done.
    pub overrun: bool,
}

impl Reply {
    /// Success without data.
    pub fn good() -> Self {
        Self::default()
    }

    /// Success with data: at most `allocation` bytes of it.
    pub fn data(mut data: Vec<u8>, allocation: usize) -> Self {
        data.truncate(allocation);
        Self { data, ..Self::default() }
    }

    /// Writes the data into the initiator's buffer; returns the bytes that moved in all.
    pub fn deliver(&self, memory: &GuestMemory, data_in: &Scatter) -> u64 {
        self.transferred + data_in.write(memory, 0, &self.data) as u64
    }

    /// CHECK CONDITION.
    pub fn check(sense: Sense) -> Self {
        Self { sense: Some(sense), ..Self::default() }
    }
}

/// What a command comes to.
pub enum Action {
    /// It has ended.
    Done(Reply),
    /// The disk has to do something first; the end of the job is the end of the command.
    Work(Medium, Job),
}

impl Action {
    /// Success without data.
    pub fn good() -> Self {
        Self::Done(Reply::good())
    }

    /// Success with at most `allocation` bytes of `data`.
    pub fn data(data: Vec<u8>, allocation: usize) -> Self {
        Self::Done(Reply::data(data, allocation))
    }

    /// The initiator's buffer is too small.
    pub fn overrun() -> Self {
        Self::Done(Reply { overrun: true, ..Reply::default() })
    }
}

/// A disk image in a drive. Each insertion is another medium.
#[derive(Clone)]
pub struct Medium {
    id: u64,
    disk: Arc<dyn Disk>,
}

impl Medium {
    /// A medium of its own for `disk`.
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), disk }
    }

    /// By which the medium is known in this process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The image.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }
}

/// Whether an operation changes the disk.
pub(super) fn changes(op: &Op) -> bool {
    matches!(op, Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_big_endian_and_bounded() {
        let cdb = Cdb::new(&[0x28, 1, 2, 3, 4, 5]);
        assert_eq!((cdb.opcode(), cdb.u16(1), cdb.u24(1)), (0x28, 0x102, 0x10203));
        assert_eq!(cdb.u32(2), 0x02030405);
        assert_eq!(cdb.u64(0), 0x2801_0203_0405_0000);
        assert_eq!((cdb.u8(16), cdb.u64(15)), (0, 0));
        assert_eq!(Cdb::new(&[1; 32]).u64(12), 0x0101_0101_0000_0000);
    }
}
