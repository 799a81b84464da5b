//! What a disk says of itself: vital product data and capacity (SBC-3, sections 5.16, 6.6).

use super::super::command::Action;
use super::ScsiDisk;
use super::ranges::{MOST_DESCRIPTORS, MOST_RANGE_BYTES};

/// Blocks of one read or write at most, as the initiator is told.
const MOST_BLOCKS: u32 = 0xffff;
/// Bytes that images and files give back or write at best.
const PHYSICAL: u32 = 4096;

impl ScsiDisk {
    /// All vital product data pages beside 00H.
    pub(super) fn pages(&self) -> Vec<(u8, Vec<u8>)> {
        let identity = self.identity();
        vec![
            (0x80, identity.serial_page()),
            (0x83, identity.designators()),
            (0xb0, identity.page(0xb0, &self.block_limits())),
            (0xb1, identity.page(0xb1, &characteristics())),
            (0xb2, identity.page(0xb2, &self.provisioning())),
        ]
    }

    /// Logical blocks in a physical one.
    fn granularity(&self) -> u32 {
        (PHYSICAL / self.block).max(1)
    }

    /// Page B0H (SBC-3, section 6.6.4), without its head.
    fn block_limits(&self) -> [u8; 60] {
        let mut body = [0; 60];
        // Offsets are those of the page, with its head of 4 bytes.
        let mut put = |at: usize, value: u32| {
            body[at - 4..at].copy_from_slice(&value.to_be_bytes());
        };
        let most = (MOST_RANGE_BYTES / u64::from(self.block)) as u32;
        // WSNZ: a write same of no blocks is not one "to the end". Then the optimal granularity.
        put(4, 1 << 24 | self.granularity());
        put(8, MOST_BLOCKS);
        if self.discards() {
            put(20, most);
            put(24, MOST_DESCRIPTORS);
            put(28, self.granularity());
            put(32, 1 << 31); // an alignment of 0 is valid
        }
        if !self.read_only() {
            put(40, most); // the low half of the maximum write same length
        }
        body
    }

    /// Page B2H (SBC-3, section 6.6.6), without its head: what can be unmapped, and by what.
    fn provisioning(&self) -> [u8; 4] {
        const UNMAP: u8 = 0x80;
        const WRITE_SAME_16: u8 = 0x40;
        const WRITE_SAME_10: u8 = 0x20;
        const THIN: u8 = 2;
        if self.discards() {
            // Not LBPRZ: what is unmapped may read as before.
            [0, UNMAP | WRITE_SAME_16 | WRITE_SAME_10, THIN, 0]
        } else {
            [0; 4]
        }
    }

    pub(super) fn capacity_10(&self) -> Action {
        let last = u32::try_from(self.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
        let data = [last.to_be_bytes(), self.block.to_be_bytes()].concat();
        let all = data.len();
        Action::data(data, all)
    }

    pub(super) fn capacity_16(&self) -> Vec<u8> {
        const PROVISIONED: u8 = 0x80;
        let mut data = vec![0; 32];
        data[..8].copy_from_slice(&self.blocks.saturating_sub(1).to_be_bytes());
        data[8..12].copy_from_slice(&self.block.to_be_bytes());
        data[13] = self.granularity().trailing_zeros() as u8;
        data[14] = if self.discards() { PROVISIONED } else { 0 };
        data
    }
}

/// Page B1H (SBC-3, section 6.6.2), without its head: nothing rotates.
fn characteristics() -> [u8; 60] {
    let mut body = [0; 60];
    body[..2].copy_from_slice(&1u16.to_be_bytes());
    body
}
