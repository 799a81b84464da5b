//! A command of the driver as it lies in a chain (section 5.6.6.1).
//!
//! ```text
//!   readable: lun 8, id 8, attribute 1, priority 1, crn 1, CDB (cdb_size) | data for the unit
//!   writable: sense_len 4, resid 4, qualifier 2, status 1, response 1, sense (sense_size) | data of the unit
//! ```

use lodge_memory::GuestMemory;

use super::super::Chain;
use super::targets::{Address, Match};
use super::{MOST_CDB, MOST_SENSE};
use crate::dma::Scatter;
use crate::storage::{Cdb, Sense};

/// Bytes before the CDB, and before the sense data.
const HEAD: usize = 19;
const RESPONSE_HEAD: usize = 12;

/// Responses (section 5.6.6.1), and those of task management functions (section 5.6.6.2).
pub(super) mod response {
    pub const OK: u8 = 0;
    pub const OVERRUN: u8 = 1;
    pub const ABORTED: u8 = 2;
    pub const BAD_TARGET: u8 = 3;
    pub const RESET: u8 = 4;
    pub const FAILURE: u8 = 9;
    pub const FUNCTION_COMPLETE: u8 = 0;
    pub const FUNCTION_SUCCEEDED: u8 = 10;
    pub const FUNCTION_REJECTED: u8 = 11;
    pub const INCORRECT_LUN: u8 = 12;
}

/// SAM-5 status CHECK CONDITION.
const CHECK_CONDITION: u8 = 2;

/// A command, and where its answer goes.
pub(super) struct Request {
    pub chain: Chain,
    /// Where the command is for; `None`: nowhere.
    pub at: Option<Address>,
    pub id: u64,
    pub cdb: Cdb,
    pub data_out: Scatter,
    pub data_in: Scatter,
    /// Room for sense data.
    sense: usize,
}

/// The single level LUN of section 5.6.6.1: 1, target, LUN in two bytes, zeroes.
pub(super) fn address(lun: [u8; 8]) -> Option<Address> {
    let [1, target, high, low, ..] = lun else { return None };
    // Peripheral or flat addressing.
    (high & 0x80 == 0).then_some((target, u16::from_be_bytes([high & 0x3f, low])))
}

impl Request {
    /// Reads a command. `None`: the chain is too short for the head or the answer.
    pub(super) fn parse(
        memory: &GuestMemory,
        chain: Chain,
        cdb_size: u32,
        sense_size: u32,
    ) -> Option<Self> {
        let (cdb_size, sense) =
            (cdb_size.min(MOST_CDB) as usize, sense_size.min(MOST_SENSE) as usize);
        let mut head = [0; HEAD + MOST_CDB as usize];
        let head = &mut head[..HEAD + cdb_size];
        let answer = (RESPONSE_HEAD + sense) as u64;
        if chain.read(memory, 0, head) < head.len() || chain.writable_len() < answer {
            return None;
        }
        let mut lun = [0; 8];
        lun.copy_from_slice(&head[..8]);
        let mut id = [0; 8];
        id.copy_from_slice(&head[8..16]);
        Some(Self {
            at: address(lun),
            id: u64::from_le_bytes(id),
            cdb: Cdb::new(&head[HEAD..]),
            data_out: Scatter::of(&chain.readable, head.len() as u64),
            data_in: Scatter::of(&chain.writable, answer),
            sense,
            chain,
        })
    }

    /// Whether the command is one of those that are meant.
    pub(super) fn matches(&self, wanted: &Match) -> bool {
        self.at.is_some_and(|(target, lun)| {
            target == wanted.target
                && wanted.lun.is_none_or(|wanted| wanted == lun)
                && wanted.id.is_none_or(|wanted| wanted == self.id)
        })
    }

    /// Writes the answer; `moved` bytes went through the data buffers. Returns how many bytes of the chain were
    /// written.
    pub(super) fn answer(
        &self,
        memory: &GuestMemory,
        response: u8,
        sense: Option<(Sense, bool)>,
        moved: u64,
    ) -> u32 {
        let mut data = vec![0; RESPONSE_HEAD];
        if let Some((sense, descriptor)) = sense {
            let mut bytes = sense.encode(descriptor);
            bytes.truncate(self.sense);
            data[..4].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            data[10] = CHECK_CONDITION;
            data.extend_from_slice(&bytes);
        }
        let left = (self.data_in.len() + self.data_out.len()).saturating_sub(moved);
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        data[4..8].copy_from_slice(&left.to_le_bytes());
        data[11] = response;
        self.chain.write(memory, 0, &data);
        let read = if self.data_in.is_empty() { 0 } else { moved };
        u32::try_from((RESPONSE_HEAD + self.sense) as u64 + read).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn luns_have_one_level() {
        assert_eq!(address([1, 5, 0, 3, 0, 0, 0, 0]), Some((5, 3)));
        assert_eq!(address([1, 5, 0x41, 2, 0, 0, 0, 0]), Some((5, 0x102)));
        assert_eq!(address([0, 5, 0, 3, 0, 0, 0, 0]), None);
        assert_eq!(address([1, 5, 0xc1, 1, 0, 0, 0, 0]), None, "well-known units");
    }
}
