//! Pixels as they travel: values of a format, and ZRLE's tiles.

/// A pixel format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    pub bits: u8,
    pub depth: u8,
    pub big: bool,
    pub max: [u16; 3],
    pub shift: [u8; 3],
}

impl Format {
    pub const NATIVE: Self =
        Self { bits: 32, depth: 24, big: false, max: [255; 3], shift: [16, 8, 0] };

    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&[self.bits, self.depth, self.big.into(), 1]);
        for i in 0..3 {
            bytes[4 + 2 * i..6 + 2 * i].copy_from_slice(&self.max[i].to_be_bytes());
            bytes[10 + i] = self.shift[i];
        }
        bytes
    }

    /// The value of a colour 0xRRGGBB: the nearest that there is.
    pub fn value(&self, colour: u32) -> u32 {
        (0..3).fold(0, |value, i| {
            let part = f64::from(colour >> (16 - 8 * i) & 0xff) / 255.0;
            let scaled = (part * f64::from(self.max[i])).round() as u32;
            value | scaled << self.shift[i]
        })
    }

    pub fn read(&self, bytes: &[u8]) -> u32 {
        let mut bytes = bytes.to_vec();
        if self.big {
            bytes.reverse();
        }
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    /// Bytes of a CPIXEL, and how far its value is shifted.
    fn cpixel(&self) -> (usize, u32) {
        let used = (0..3).fold(0, |used, i| used | u32::from(self.max[i]) << self.shift[i]);
        match self.bits {
            32 if self.depth <= 24 && used < 1 << 24 => (3, 0),
            32 if self.depth <= 24 && used & 0xff == 0 => (3, 8),
            bits => (usize::from(bits / 8), 0),
        }
    }

    fn read_cpixel(&self, bytes: &mut &[u8]) -> u32 {
        let (len, shift) = self.cpixel();
        self.read(take(bytes, len)) << shift
    }

    fn has_rgb_tpixel(&self) -> bool {
        self.bits == 32 && self.depth == 24 && self.max == [255; 3]
    }

    pub fn tpixel_len(&self) -> usize {
        if self.has_rgb_tpixel() { 3 } else { usize::from(self.bits / 8) }
    }

    pub fn read_tpixel(&self, bytes: &[u8]) -> u32 {
        match (self.has_rgb_tpixel(), bytes) {
            (true, &[r, g, b]) => self.value(u32::from_be_bytes([0, r, g, b])),
            _ => self.read(bytes),
        }
    }
}

/// The first bytes of what is left.
fn take<'a>(bytes: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (first, rest) = bytes.split_at(len);
    *bytes = rest;
    first
}

/// The values of the tile that comes next.
pub fn zrle_tile(format: &Format, left: &mut &[u8], width: usize, height: usize) -> Vec<u32> {
    let area = width * height;
    let kind = take(left, 1)[0];
    let run = |left: &mut &[u8]| {
        let mut len = 1;
        loop {
            let byte = take(left, 1)[0];
            len += usize::from(byte);
            if byte < 255 {
                return len;
            }
        }
    };
    let size = match kind {
        1..=16 => kind.into(),
        130.. => usize::from(kind) - 128,
        0 | 128 => 0,
        other => panic!("subencoding {other}"),
    };
    let palette: Vec<u32> = (0..size).map(|_| format.read_cpixel(left)).collect();
    let mut tile = Vec::new();
    match kind {
        0 => tile.extend((0..area).map(|_| format.read_cpixel(left))),
        1 => tile.resize(area, palette[0]),
        2..=16 => {
            let bits = [1, 2, 4][usize::from(size > 2) + usize::from(size > 4)];
            for _ in 0..height {
                let row = take(left, (width * bits).div_ceil(8));
                let index = |x: usize| {
                    let at = x * bits;
                    usize::from(row[at / 8] >> (8 - bits - at % 8)) & ((1 << bits) - 1)
                };
                tile.extend((0..width).map(|x| palette[index(x)]));
            }
        }
        128 => {
            while tile.len() < area {
                let value = format.read_cpixel(left);
                let len = run(left);
                tile.resize(tile.len() + len, value);
            }
        }
        _ => {
            while tile.len() < area {
                let index = take(left, 1)[0];
                let len = if index & 0x80 != 0 { run(left) } else { 1 };
                tile.resize(tile.len() + len, palette[usize::from(index & 0x7f)]);
            }
        }
    }
    tile
}
