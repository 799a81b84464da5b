//! Commands on ranges without data of their own: UNMAP and WRITE SAME (SBC-3, sections 5.28, 5.43).

use std::collections::VecDeque;

use lodge_disk::Op;

use super::super::command::{Action, Command};
use super::super::job::Job;
use super::super::opcode as op;
use super::super::sense::Sense;
use super::{Outcome, ScsiDisk};

/// Descriptors of one UNMAP at most.
pub(super) const MOST_DESCRIPTORS: u32 = 256;
/// Bytes of one unmapped range, and of one WRITE SAME, at most: 1 GiB.
pub(super) const MOST_RANGE_BYTES: u64 = 1 << 30;
/// Bytes of the parameter list's head, and of a descriptor.
const HEAD: usize = 8;
const DESCRIPTOR: usize = 16;

impl ScsiDisk {
    pub(super) fn unmap(&self, command: &Command<'_>) -> Outcome {
        const ANCHOR: u8 = 1;
        if command.cdb.u8(1) & ANCHOR != 0 {
            return Err(Sense::invalid_field(1));
        }
        let len = usize::from(command.cdb.u16(7));
        if len == 0 {
            return Ok(Action::good());
        }
        if command.data_out.len() < len as u64 {
            return Ok(Action::overrun());
        }
        let list = command.parameters(len);
        if list.len() < HEAD {
            return Err(Sense::PARAMETER_LENGTH);
        }
        let all = usize::from(u16::from_be_bytes([list[0], list[1]])) + 2;
        let descriptors = usize::from(u16::from_be_bytes([list[2], list[3]]));
        if list.len() < all || list.len() < descriptors + HEAD || descriptors % DESCRIPTOR != 0 {
            return Err(Sense::PARAMETER_LENGTH);
        }
        if descriptors / DESCRIPTOR > MOST_DESCRIPTORS as usize {
            return Err(Sense::invalid_parameter(2));
        }
        let mut ops = VecDeque::new();
        // All of them are checked before anything happens.
        for part in list[HEAD..HEAD + descriptors].chunks_exact(DESCRIPTOR) {
            let (first, count) = part.split_at(8);
            let first = first.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let count = count[..4].iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let range = self.bytes(first, count)?;
            if range.len > MOST_RANGE_BYTES {
                return Err(Sense::invalid_parameter(HEAD as u16));
            }
            if range.len > 0 {
                ops.push_back(Op::Discard { offset: range.offset, len: range.len });
            }
        }
        if ops.is_empty() {
            return Ok(Action::good());
        }
        self.durable(Job::ops(ops), false)
    }

    pub(super) fn write_same(&self, command: &Command<'_>) -> Outcome {
        const NO_DATA: u8 = 0x01;
        const UNMAP: u8 = 0x08;
        let flags = command.cdb.u8(1);
        let long = command.cdb.opcode() == op::WRITE_SAME_16;
        // Protection, anchor, and the obsolete LBDATA and PBDATA.
        let refused = if long { !(NO_DATA | UNMAP) } else { !UNMAP };
        if flags & refused != 0 || flags & UNMAP != 0 && !self.discards() {
            return Err(Sense::invalid_field(1));
        }
        self.writable()?;
        let range = self.range(&command.cdb)?;
        if range.len == 0 || range.len > MOST_RANGE_BYTES {
            return Err(Sense::invalid_field(if long { 10 } else { 7 }));
        }
        let block = match flags & NO_DATA != 0 {
            true => vec![0; self.block as usize],
            false if command.data_out.len() < u64::from(self.block) => {
                return Ok(Action::overrun());
            }
            false => command.parameters(self.block as usize),
        };
        let (offset, len) = (range.offset, range.len);
        let job = if block.iter().all(|byte| *byte == 0) {
            let unmap = flags & UNMAP != 0;
            Job::ops([Op::WriteZeroes { offset, len, unmap }].into())
        } else {
            Job::fill(offset, len, block)
        };
        self.durable(job, false)
    }
}
