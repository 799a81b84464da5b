//! Numbers that find mistakes. Everything follows from one seed.

/// SplitMix64.
pub struct Rng(u64);

const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    31,
    32,
    33,
    63,
    64,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
];

const F32: [u32; 18] = [
    0,
    0x8000_0000,
    1,
    0x8000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    0xffff_ffff,
    0x4f00_0000,
    0xcf00_0000,
    0x3f00_0000,
    0x4b00_0001,
];

const F64: [u64; 18] = [
    0,
    1 << 63,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x7ff0_0000_0000_0001,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0000_0000,
    0x43e0_0000_0000_0000,
    0xc3e0_0000_0000_0000,
    0x3690_0000_0000_0000,
    0x3fe0_0000_0000_0000,
];

impl Rng {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// 0..n.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True in `percent` of 100.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer: an edge of some width, its negative, a neighbour, a small or a random one.
    pub fn integer(&mut self) -> u64 {
        let edge = self.pick(&EDGES);
        match self.below(8) {
            0 | 1 => edge,
            2 => edge.wrapping_neg(),
            3 => edge.wrapping_add(self.below(3)).wrapping_sub(1),
            4 => self.below(256),
            5 => self.next() >> self.below(64),
            // The halves separately.
            6 => edge << 32 | self.pick(&EDGES) & 0xffff_ffff,
            _ => self.next(),
        }
    }

    /// 64 bits of a vector: integers, or one double, or two singles.
    pub fn lane(&mut self) -> u64 {
        let single = |rng: &mut Self| {
            let low = rng.next();
            match rng.below(6) {
                0 => low as u32,
                // Of a moderate exponent, so that sums and products are in range.
                1 | 2 => low as u32 & 0x807f_ffff | (120 + rng.below(16) as u32) << 23,
                // Near the smallest and the largest.
                3 => low as u32 & 0x807f_ffff | rng.pick(&[0u32, 1, 2, 24, 253, 254]) << 23,
                _ => rng.pick(&F32),
            }
        };
        match self.below(8) {
            0 => self.integer(),
            1 => self.next(),
            2 | 3 => self.pick(&F64),
            4 => self.next() & 0x800f_ffff_ffff_ffff | (1016 + self.below(64)) << 52,
            5 => {
                let exponent = self.pick(&[0u64, 1, 2, 53, 0x380, 0x381, 0x47e, 2045, 2046]);
                self.next() & 0x800f_ffff_ffff_ffff | exponent << 52
            }
            _ => u64::from(single(self)) << 32 | u64::from(single(self)),
        }
    }

    /// An x87 register.
    pub fn extended(&mut self) -> [u8; 10] {
        let sign = (self.below(2) as u16) << 15;
        let (exponent, mantissa) = match self.below(12) {
            0 => (0, 0),
            1 => (0x7fff, 1 << 63),
            2 => (0x7fff, self.pick(&[3u64 << 62, 1 << 63 | 1, 3 << 62 | 5])),
            3 => (0, self.pick(&[1u64, 1 << 62, u64::MAX >> 1, 1 << 63])),
            4 => (0x3fff, 1 << 63),
            // Integers of every size.
            5 => {
                let shift = self.below(66);
                (0x3fff + shift as u16, self.next() | 1 << 63)
            }
            6 => (self.next() as u16 & 0x7fff, self.next()),
            7 => (
                self.pick(&[1u16, 2, 0x3c01, 0x3f81, 0x407e, 0x43fe, 0x7ffe]),
                self.next() | 1 << 63,
            ),
            _ => (0x3fff - 8 + self.below(16) as u16, self.next() | 1 << 63),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&(sign | exponent).to_le_bytes());
        bytes
    }
}
