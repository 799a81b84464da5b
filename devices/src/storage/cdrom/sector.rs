//! A CD sector as it is on the disc: mode 1, 2352 bytes (ECMA-130, section 14 and annex A).
//!
//! ```text
//!   0     12       16                2064  2068      2076      2248      2352
//!   | sync | header | user data (2048) | EDC | zeroes | P parity | Q parity |
//! ```

/// Bytes of a whole sector.
const BYTES: usize = 2352;
const HEADER: usize = 12;
const DATA: usize = 16;
const EDC: usize = 2064;
const P_PARITY: usize = 2076;
const Q_PARITY: usize = 2248;
/// Frames of a second, and how far the first block is from the disc's time zero.
const FRAMES: u32 = 75;
const PREGAP: u32 = 2 * FRAMES;

/// Which parts of a sector are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    sync: bool,
    header: bool,
    data: bool,
    parity: bool,
}

impl Frame {
    /// The flags of READ CD's byte 9; `None` for parts that do not lie next to each other, and for error
    /// flags, which there are none of.
    pub fn parse(flags: u8) -> Option<Self> {
        let frame = Self {
            sync: flags & 0x80 != 0,
            header: flags & 0x20 != 0, // bit 6 alone: a subheader, which mode 1 does not have
            data: flags & 0x10 != 0,
            parity: flags & 0x08 != 0,
        };
        let parts = [frame.sync, frame.header, frame.data, frame.parity];
        // From one part to the next there is at most one beginning.
        let begins = parts.iter().zip([false].iter().chain(&parts));
        let contiguous = begins.filter(|(now, before)| **now && !**before).count() <= 1;
        (contiguous && flags & 0x07 == 0).then_some(frame)
    }

    /// Whether only the user data is wanted.
    pub fn only_data(self) -> bool {
        self == Self { sync: false, header: false, data: true, parity: false }
    }

    /// Bytes of each sector.
    pub fn bytes(self) -> usize {
        [(self.sync, 12), (self.header, 4), (self.data, 2048), (self.parity, 288)]
            .iter()
            .filter(|(wanted, _)| *wanted)
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// Appends the wanted parts of sector `lba`, whose user data is `data`.
    pub fn encode(self, lba: u32, data: &[u8], out: &mut Vec<u8>) {
        let sector = whole(lba, data);
        for (wanted, part) in [
            (self.sync, 0..HEADER),
            (self.header, HEADER..DATA),
            (self.data, DATA..EDC),
            (self.parity, EDC..BYTES),
        ] {
            if wanted {
                out.extend_from_slice(&sector[part]);
            }
        }
    }
}

/// Minute, second and frame of a block. Beyond what a CD holds the minute stays at its largest value.
pub fn msf(lba: u32) -> [u8; 3] {
    let at = lba.saturating_add(PREGAP);
    let minute = u8::try_from(at / FRAMES / 60).unwrap_or(u8::MAX);
    [minute, (at / FRAMES % 60) as u8, (at % FRAMES) as u8]
}

/// The block at a minute, second and frame; `None` before the first one.
pub fn from_msf(minute: u8, second: u8, frame: u8) -> Option<u32> {
    let at = (u32::from(minute) * 60 + u32::from(second)) * FRAMES + u32::from(frame);
    at.checked_sub(PREGAP)
}

fn whole(lba: u32, data: &[u8]) -> [u8; BYTES] {
    let mut sector = [0; BYTES];
    sector[1..11].fill(0xff);
    for (to, from) in sector[HEADER..].iter_mut().zip(msf(lba)) {
        *to = ((from / 10 % 10) << 4) | (from % 10);
    }
    sector[15] = 1;
    for (to, from) in sector[DATA..EDC].iter_mut().zip(data) {
        *to = *from;
    }
    let edc = checksum(&sector[..EDC]);
    sector[EDC..EDC + 4].copy_from_slice(&edc.to_le_bytes());
    // P: 86 columns of 24 bytes; Q: 52 diagonals of 43 bytes, which also cover P.
    parity(&mut sector, P_PARITY, 86, 24, |word, at| word + 86 * at);
    parity(&mut sector, Q_PARITY, 52, 43, |word, at| {
        let (pair, byte) = (word / 2, word % 2);
        (86 * pair + byte + 88 * at) % (52 * 43)
    });
    sector
}

/// The CRC of annex A.3: x^32 + x^31 + x^16 + x^15 + x^4 + x^3 + x + 1, lowest bit first.
fn checksum(data: &[u8]) -> u32 {
    data.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 != 0 { crc >> 1 ^ 0xd801_8001 } else { crc >> 1 }
        })
    })
}

/// Times x in the field of annex A.4: bytes modulo x^8 + x^4 + x^3 + x^2 + 1.
fn double(value: u8) -> u8 {
    value << 1 ^ if value & 0x80 != 0 { 0x1d } else { 0 }
}

/// Divided by x + 1: the inverse of that is f4H.
fn divide(mut value: u8) -> u8 {
    const INVERSE: u8 = 0xf4;
    let mut result = 0;
    for bit in 0..8 {
        if INVERSE >> bit & 1 != 0 {
            result ^= value;
        }
        value = double(value);
    }
    result
}

/// Two parity bytes for each of `words` code words of `len` bytes; `place` says where in the sector, from its header
/// on, byte number `at` of a word is. The word with both has the roots 1 and x.
fn parity(
    sector: &mut [u8; BYTES],
    to: usize,
    words: usize,
    len: usize,
    place: impl Fn(usize, usize) -> usize,
) {
    for word in 0..words {
        let (mut sum, mut weighted) = (0, 0);
        for at in 0..len {
            let byte = sector[HEADER + place(word, at)];
            sum ^= byte;
            weighted = double(weighted ^ byte);
        }
        // weighted + sum of (first parity times x) + second = 0, and sum + first + second = 0.
        let first = divide(double(weighted) ^ sum);
        sector[to + word] = first;
        sector[to + words + word] = first ^ sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector() -> [u8; BYTES] {
        let data: Vec<u8> = (0..2048u32).map(|i| ((i * i) >> 3) as u8).collect();
        whole(16, &data)
    }

    #[test]
    fn time_and_blocks_are_the_same_thing() {
        assert_eq!(msf(0), [0, 2, 0]);
        assert_eq!(msf(4350), [1, 0, 0]);
        assert_eq!(from_msf(1, 0, 0), Some(4350));
        assert_eq!(from_msf(0, 1, 74), None);
        assert_eq!(msf(u32::MAX)[0], 255);
    }

    #[test]
    fn every_code_word_checks() {
        let sector = sector();
        assert_eq!(sector[HEADER..DATA], [0x00, 0x02, 0x16, 0x01]);
        assert_eq!(checksum(&sector[..EDC + 4]), 0);
        assert_ne!(sector[EDC..EDC + 4], [0; 4]);
        let zero = |bytes: &[u8]| {
            let sum = bytes.iter().fold(0, |sum, byte| sum ^ byte);
            let weighted = bytes.iter().fold(0, |sum, byte| double(sum) ^ byte);
            sum == 0 && weighted == 0
        };
        for column in 0..86 {
            let word: Vec<u8> = (0..26).map(|row| sector[HEADER + column + 86 * row]).collect();
            assert!(zero(&word), "P {column}");
        }
        for diagonal in 0..52 {
            let start = diagonal / 2 * 86 + diagonal % 2;
            let mut word: Vec<u8> =
                (0..43).map(|at| sector[HEADER + (start + 88 * at) % 2236]).collect();
            word.push(sector[Q_PARITY + diagonal]);
            word.push(sector[Q_PARITY + 52 + diagonal]);
            assert!(zero(&word), "Q {diagonal}");
        }
    }

    #[test]
    fn parts_are_contiguous() {
        for (flags, bytes) in [
            (0x10, 2048),
            (0xf8, 2352),
            (0x00, 0),
            (0x20, 4),
            (0x40, 0),
            (0x18, 2336),
            (0xb0, 2064),
        ] {
            let frame = Frame::parse(flags).unwrap();
            assert_eq!(frame.bytes(), bytes, "{flags:#x}");
            let mut out = Vec::new();
            frame.encode(0, &[7; 2048], &mut out);
            assert_eq!(out.len(), bytes);
        }
        for flags in [0x90, 0x88, 0x28, 0x12, 0x14] {
            assert_eq!(Frame::parse(flags), None, "{flags:#x}");
        }
        assert!(Frame::parse(0x10).unwrap().only_data());
        let mut out = Vec::new();
        Frame::parse(0xf8).unwrap().encode(16, &sector()[DATA..EDC], &mut out);
        assert_eq!(out, sector());
    }
}
