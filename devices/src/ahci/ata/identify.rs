//! IDENTIFY DEVICE (ATA8-ACS, section 7.18).

use super::super::text;
use super::{AtaDisk, AtaState, HEADS, MULTIPLE, TRACK, TRIM_BLOCKS};
use crate::storage::naa;

/// 512 bytes as words.
pub(in super::super) struct Words(pub [u16; 256]);

impl Words {
    pub fn new() -> Self {
        Self([0; 256])
    }

    /// Text of `words` words: two characters in each, the first one in the high byte, filled with spaces.
    pub fn text(&mut self, at: usize, words: usize, text: &str) {
        let mut bytes = text.bytes().filter(|b| b.is_ascii_graphic() || *b == b' ');
        for word in &mut self.0[at..at + words] {
            let mut next = || bytes.next().unwrap_or(b' ');
            *word = u16::from_be_bytes([next(), next()]);
        }
    }

    /// A number over several words, the lowest one first.
    pub fn number(&mut self, at: usize, words: usize, value: u64) {
        for (shift, word) in self.0[at..at + words].iter_mut().enumerate() {
            *word = (value >> (16 * shift)) as u16;
        }
    }

    /// The transfer modes that there are, and which one is chosen (words 63 and 88).
    pub fn transfer_modes(&mut self, mode: u8) {
        self.0[63] = 0x0007 | if mode & 0xf8 == 0x20 { 0x100 << (mode & 7) } else { 0 };
        self.0[88] = 0x003f | if mode & 0xf8 == 0x40 { 0x100 << (mode & 7) } else { 0 };
    }

    /// The bytes, with signature and checksum in the last word.
    pub fn finish(mut self) -> Vec<u8> {
        self.0[255] = 0xa5;
        let mut data: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        let sum = data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        data[511] = sum.wrapping_neg();
        data
    }
}

impl AtaDisk {
    pub(super) fn identify(&self, state: &AtaState) -> Vec<u8> {
        let mut words = Words::new();
        self.geometry(&mut words, state);
        words.text(10, 10, &self.serial);
        words.text(23, 4, text::FIRMWARE);
        words.text(27, 20, text::DISK);
        words.transfer_modes(state.transfer_mode);
        self.command_sets(&mut words, state);
        let w = &mut words.0;
        w[0] = 0x0040; // a fixed disk
        w[47] = 0x8000 | u16::from(MULTIPLE);
        w[48] = 0x4000;
        w[49] = 0x0f00; // DMA, LBA, IORDY
        w[50] = 0x4000;
        w[53] = 0x0007;
        w[59] = if state.multiple > 0 { 0x0100 | u16::from(state.multiple) } else { 0 };
        w[64] = 0x0003; // PIO 3 and 4
        w[65..69].fill(120); // nanoseconds of a cycle
        w[75] = 31; // queue depth - 1
        w[76] = 0x010e; // NCQ; 1.5, 3 and 6 Gb/s
        w[77] = 0x0006; // now 6 Gb/s
        w[80] = 0x01f0; // ATA/ATAPI-4 to ATA8-ACS
        w[105] = TRIM_BLOCKS;
        w[106] = 0x6003; // 8 logical sectors in a physical one
        w[209] = 0x4000;
        w[217] = 0x0001; // nothing rotates
        words.number(60, 2, self.sectors.min(0x0fff_ffff));
        words.number(100, 4, self.sectors);
        if self.discards() {
            words.0[169] = 0x0001; // trim
        }
        words.finish()
    }

    fn geometry(&self, words: &mut Words, state: &AtaState) {
        let cylinders = |heads: u8, track: u8| {
            (self.sectors / (u64::from(heads) * u64::from(track)).max(1)).clamp(2, 16383) as u16
        };
        let w = &mut words.0;
        (w[1], w[3], w[6]) = (cylinders(HEADS, TRACK), HEADS.into(), TRACK.into());
        let (heads, track) = state.geometry;
        (w[54], w[55], w[56]) = (cylinders(heads, track), heads.into(), track.into());
        let current = u64::from(w[54]) * u64::from(heads) * u64::from(track);
        words.number(57, 2, current);
    }

    /// Words 82 to 87 and 119 to 120: what there is, and what is on.
    fn command_sets(&self, words: &mut Words, state: &AtaState) {
        let flag = |on: bool, bit: u16| if on { 1 << bit } else { 0 };
        let serial: Vec<u8> = self.serial.bytes().filter(u8::is_ascii_graphic).collect();
        let named = flag(!serial.is_empty(), 8);
        let w = &mut words.0;
        // SMART, power management, write cache, look-ahead, NOP.
        w[82] = 1 | 1 << 3 | 1 << 5 | 1 << 6;
        // Advanced power management, 48 bits, FLUSH CACHE (EXT).
        w[83] = 1 << 14 | 1 << 3 | 1 << 10 | 1 << 12 | 1 << 13;
        // SMART error log and self-test log, general purpose logging, writes with FUA.
        w[84] = 1 << 14 | 1 | 1 << 1 | 1 << 5 | 1 << 6 | named;
        w[85] = flag(state.smart, 0) | 1 << 3 | flag(state.writeback, 5) | flag(state.lookahead, 6);
        w[86] = flag(state.power_level > 0, 3) | 1 << 10 | 1 << 12 | 1 << 13;
        w[87] = w[84];
        w[91] = state.power_level.into();
        if named != 0 {
            for (at, part) in naa(&serial).to_be_bytes().chunks(2).enumerate() {
                w[108 + at] = u16::from_be_bytes([part[0], part[1]]);
            }
        }
    }
}
