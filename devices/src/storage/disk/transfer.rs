//! Reading, writing and verifying blocks (SBC-3, section 5).

use super::super::command::{Action, Cdb, Command};
use super::super::job::Job;
use super::super::opcode as op;
use super::super::sense::Sense;
use super::{Outcome, ScsiDisk};

/// Bit of byte 1: do not end in the cache.
const FUA: u8 = 0x08;
/// Bits of byte 1: protection information, of which there is none.
const PROTECT: u8 = 0xe0;

/// Blocks that a command names, as bytes of the disk.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub offset: u64,
    pub len: u64,
}

/// First block and number of blocks, wherever this command has them.
fn blocks(cdb: &Cdb) -> (u64, u64) {
    match cdb.opcode() >> 5 {
        // 6 bytes: 21 bits of address; a length of 0 means 256.
        0 => {
            let count = match cdb.u8(4) {
                0 => 256,
                count => count.into(),
            };
            (u64::from(cdb.u24(1) & 0x1f_ffff), count)
        }
        4 => (cdb.u64(2), cdb.u32(10).into()),
        5 => (cdb.u32(2).into(), cdb.u32(6).into()),
        _ => (cdb.u32(2).into(), cdb.u16(7).into()),
    }
}

impl ScsiDisk {
    /// The blocks that a command names, if the disk has them.
    pub(super) fn range(&self, cdb: &Cdb) -> Result<Range, Sense> {
        let (first, count) = blocks(cdb);
        self.bytes(first, count)
    }

    /// `count` blocks from `first` on, if the disk has them.
    pub(super) fn bytes(&self, first: u64, count: u64) -> Result<Range, Sense> {
        match first.checked_add(count) {
            Some(end) if end <= self.blocks => {
                let block = u64::from(self.block);
                // Within the disk, whose size in bytes is a u64.
                Ok(Range { offset: first * block, len: count * block })
            }
            _ => Err(Sense::OUT_OF_RANGE.at(first)),
        }
    }

    /// Refuses protection information, for commands that have the field.
    fn unprotected(cdb: &Cdb) -> Result<(), Sense> {
        let short = matches!(cdb.opcode(), op::READ_6 | op::WRITE_6);
        if !short && cdb.u8(1) & PROTECT != 0 {
            return Err(Sense::invalid_field(1));
        }
        Ok(())
    }

    pub(super) fn read(&self, command: &Command<'_>) -> Outcome {
        Self::unprotected(&command.cdb)?;
        let range = self.range(&command.cdb)?;
        if range.len > command.data_in.len() {
            return Ok(Action::overrun());
        }
        if range.len == 0 {
            return Ok(Action::good());
        }
        let end = range.offset + range.len; // Within the disk.
        self.work(Job::read(range.offset, range.len, command.data_in, end))
    }

    /// The blocks of a write, unless there are none or the initiator's data is too short.
    fn to_write(&self, command: &Command<'_>) -> Result<Result<Range, Action>, Sense> {
        Self::unprotected(&command.cdb)?;
        self.writable()?;
        let range = self.range(&command.cdb)?;
        Ok(match range.len {
            0 => Err(Action::good()),
            len if len > command.data_out.len() => Err(Action::overrun()),
            _ => Ok(range),
        })
    }

    pub(super) fn write(&self, command: &Command<'_>) -> Outcome {
        let range = match self.to_write(command)? {
            Ok(range) => range,
            Err(end) => return Ok(end),
        };
        let short = command.cdb.opcode() == op::WRITE_6;
        let force = !short && command.cdb.u8(1) & FUA != 0;
        self.durable(Job::write(range.offset, range.len, command.data_out), force)
    }

    pub(super) fn write_verify(&self, command: &Command<'_>) -> Outcome {
        let check = byte_check(&command.cdb)?;
        let range = match self.to_write(command)? {
            Ok(range) => range,
            Err(end) => return Ok(end),
        };
        let written = Job::write(range.offset, range.len, command.data_out).then(Job::flush());
        self.work(if check {
            written.then(Job::compare(range.offset, range.len, command.data_out))
        } else {
            written
        })
    }

    pub(super) fn verify(&self, command: &Command<'_>) -> Outcome {
        Self::unprotected(&command.cdb)?;
        let check = byte_check(&command.cdb)?;
        let range = self.range(&command.cdb)?;
        if !check || range.len == 0 {
            // What the host's storage holds is not ours to check.
            return Ok(Action::good());
        }
        if range.len > command.data_out.len() {
            return Ok(Action::overrun());
        }
        self.work(Job::compare(range.offset, range.len, command.data_out))
    }

    pub(super) fn synchronize(&self, cdb: &Cdb) -> Outcome {
        self.range(cdb)?;
        if self.read_only() {
            return Ok(Action::good());
        }
        self.work(Job::flush())
    }
}

/// Whether the initiator's data shall be compared (the BYTCHK field).
fn byte_check(cdb: &Cdb) -> Result<bool, Sense> {
    match cdb.u8(1) >> 1 & 3 {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Sense::invalid_field(1)),
    }
}
