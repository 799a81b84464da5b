//! Pixels as a client wants them (RFC 6143, section 7.4).
//!
//! ```text
//!   0x00RRGGBB --Translator--> pixel value of the client's format --Wire--> 1, 2, 3 or 4 bytes
//! ```
//!
//! The encodings work on pixel values, so that they see the colours that the client sees.

/// What a client wants pixels to be, `PIXEL_FORMAT` of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelFormat {
    /// Bits of a pixel: 8, 16 or 32.
    bits: u8,
    /// Bits of it that are used.
    depth: u8,
    big_endian: bool,
    /// The client asked for a colour map: it is given one for the colours of [`PixelFormat::MAPPED`].
    mapped: bool,
    /// The largest red, green and blue.
    max: [u16; 3],
    /// How far they are shifted to the left.
    shift: [u8; 3],
}

impl PixelFormat {
    /// The server's own format.
    pub const NATIVE: Self = Self {
        bits: 32,
        depth: 24,
        big_endian: false,
        mapped: false,
        max: [255; 3],
        shift: [16, 8, 0],
    };

    /// What a client with a colour map gets: three bits of red and green, two of blue.
    const MAPPED: Self = Self {
        bits: 8,
        depth: 8,
        big_endian: false,
        mapped: true,
        max: [7, 7, 3],
        shift: [5, 2, 0],
    };

    /// Reads the protocol's 16 bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8; 16]) -> Result<Self, &'static str> {
        let max = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let format = Self {
            bits: bytes[0],
            depth: bytes[1],
            big_endian: bytes[2] != 0,
            mapped: false,
            max: [max(4), max(6), max(8)],
            shift: [bytes[10], bytes[11], bytes[12]],
        };
        if !matches!(format.bits, 8 | 16 | 32) {
            return Err("a pixel format with other than 8, 16 or 32 bits a pixel");
        }
        if bytes[3] == 0 {
            let mapped = format.bits == 8;
            return mapped.then_some(Self::MAPPED).ok_or("a colour map for more than 8 bits");
        }
        let fits = |(&max, &shift): (&u16, &u8)| {
            max > 0 && u64::from(max) << shift.min(32) < 1_u64 << format.bits
        };
        if !format.max.iter().zip(&format.shift).all(fits) {
            return Err("a pixel format whose colours do not fit into a pixel");
        }
        Ok(format)
    }

    /// The protocol's 16 bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        let [r, g, b] = self.max.map(u16::to_be_bytes);
        let [rs, gs, bs] = self.shift;
        let flags = [u8::from(self.big_endian), u8::from(!self.mapped)];
        let head = [self.bits, self.depth, flags[0], flags[1]];
        [
            head[0], head[1], head[2], head[3], r[0], r[1], g[0], g[1], b[0], b[1], rs, gs, bs, 0,
            0, 0,
        ]
    }

    /// Bits of a pixel.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// `SetColourMapEntries` (section 7.6.2) for a client that asked for a colour map.
    pub fn colour_map(&self) -> Option<Vec<u8>> {
        if !self.mapped {
            return None;
        }
        let mut message = vec![1, 0, 0, 0, 1, 0];
        for value in 0..256_u32 {
            for (&max, &shift) in self.max.iter().zip(&self.shift) {
                let part = (value >> shift) & u32::from(max);
                let scaled = part * 0xffff / u32::from(max);
                message.extend((scaled as u16).to_be_bytes());
            }
        }
        Some(message)
    }

    /// A whole pixel, `PIXEL`.
    pub fn pixel(&self) -> Wire {
        let mut shifts = [0, 8, 16, 24];
        let bytes = self.bits / 8;
        if self.big_endian {
            shifts[..usize::from(bytes)].reverse();
        }
        Wire { shifts, bytes }
    }

    /// ZRLE's `CPIXEL` (section 7.7.5): without a byte that is never used.
    pub fn cpixel(&self) -> Wire {
        let used = (0..3).fold(0, |used, i| used | u32::from(self.max[i]) << self.shift[i]);
        if self.bits != 32 || self.depth > 24 {
            return self.pixel();
        }
        let mut shifts = match used {
            _ if used >> 24 == 0 => [0, 8, 16, 24],
            _ if used & 0xff == 0 => [8, 16, 24, 0],
            _ => return self.pixel(),
        };
        if self.big_endian {
            shifts[..3].reverse();
        }
        Wire { shifts, bytes: 3 }
    }

    /// Tight's `TPIXEL`: red, green and blue, where each has a byte.
    pub fn tpixel(&self) -> Wire {
        let is_888 = self.max == [255; 3] && self.shift.iter().all(|shift| shift % 8 == 0);
        if self.bits != 32 || self.depth != 24 || !is_888 {
            return self.pixel();
        }
        let [r, g, b] = self.shift;
        Wire { shifts: [r, g, b, 0], bytes: 3 }
    }
}

/// How a pixel value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wire {
    /// How far each byte is from the value's end, in bits.
    shifts: [u8; 4],
    bytes: u8,
}

impl Wire {
    /// Bytes of a pixel.
    pub fn bytes(&self) -> usize {
        self.bytes.into()
    }

    /// Writes one pixel.
    pub fn put(&self, value: u32, out: &mut Vec<u8>) {
        let all = self.shifts.map(|shift| (value >> shift) as u8);
        out.extend_from_slice(&all[..usize::from(self.bytes)]);
    }

    /// Writes many pixels.
    pub fn put_all(&self, values: &[u32], out: &mut Vec<u8>) {
        // A count that the compiler knows makes each a tight loop.
        match self.bytes {
            1 => self.put_known::<1>(values, out),
            2 => self.put_known::<2>(values, out),
            3 => self.put_known::<3>(values, out),
            _ => self.put_known::<4>(values, out),
        }
    }

    fn put_known<const N: usize>(&self, values: &[u32], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + values.len() * N, 0);
        for (bytes, value) in out[start..].as_chunks_mut::<N>().0.iter_mut().zip(values) {
            for (byte, shift) in bytes.iter_mut().zip(self.shifts) {
                *byte = (value >> shift) as u8;
            }
        }
    }
}

/// From the picture's pixels to a client's pixel values.
pub struct Translator {
    format: PixelFormat,
    /// What each red, green and blue adds to the value; none if values are the picture's pixels.
    tables: Option<Box<[[u32; 256]; 3]>>,
}

impl Translator {
    /// A translator to `format`.
    pub fn new(format: PixelFormat) -> Self {
        let native = PixelFormat::NATIVE;
        let same = format.max == native.max && format.shift == native.shift;
        let tables = (!same).then(|| {
            let mut tables = Box::new([[0; 256]; 3]);
            for (i, table) in tables.iter_mut().enumerate() {
                let max = u32::from(format.max[i]);
                for (part, entry) in (0_u32..).zip(table.iter_mut()) {
                    *entry = ((part * max + 127) / 255) << format.shift[i];
                }
            }
            tables
        });
        Self { format, tables }
    }

    /// The client's format.
    pub fn format(&self) -> &PixelFormat {
        &self.format
    }

    /// Appends the values of `pixels`.
    pub fn translate(&self, pixels: &[u32], values: &mut Vec<u32>) {
        let Some(tables) = &self.tables else {
            return values.extend_from_slice(pixels);
        };
        values.extend(pixels.iter().map(|pixel| {
            let [_, r, g, b] = pixel.to_be_bytes();
            tables[0][usize::from(r)] | tables[1][usize::from(g)] | tables[2][usize::from(b)]
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: [u8; 13]) -> Result<PixelFormat, &'static str> {
        let mut whole = [0; 16];
        whole[..13].copy_from_slice(&bytes);
        PixelFormat::parse(&whole)
    }

    fn wire(wire: Wire, value: u32) -> Vec<u8> {
        let (mut one, mut many) = (Vec::new(), Vec::new());
        wire.put(value, &mut one);
        wire.put_all(&[value, value], &mut many);
        assert_eq!([one.clone(), one.clone()].concat(), many);
        assert_eq!(one.len(), wire.bytes());
        one
    }

    #[test]
    fn formats_survive_the_wire() {
        let native = PixelFormat::NATIVE;
        assert_eq!(PixelFormat::parse(&native.to_bytes()), Ok(native));
    }

    #[test]
    fn impossible_formats_are_refused() {
        for bad in [
            [24, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0],
            [0; 13],
            [16, 16, 0, 1, 0, 31, 0, 63, 0, 31, 12, 5, 0],
            [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 255, 8, 0],
            [32, 24, 0, 1, 0, 0, 0, 255, 0, 255, 16, 8, 0],
            [16, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn bytes_come_in_the_clients_order() {
        let native = PixelFormat::NATIVE;
        assert_eq!(wire(native.pixel(), 0x11_2233), [0x33, 0x22, 0x11, 0]);
        assert_eq!(wire(native.cpixel(), 0x11_2233), [0x33, 0x22, 0x11]);
        assert_eq!(wire(native.tpixel(), 0x11_2233), [0x11, 0x22, 0x33]);
        // Big endian, colours in the upper three bytes.
        let upper = parse([32, 24, 1, 1, 0, 255, 0, 255, 0, 255, 24, 16, 8]).unwrap();
        assert_eq!(wire(upper.pixel(), 0x1122_3300), [0x11, 0x22, 0x33, 0]);
        assert_eq!(wire(upper.cpixel(), 0x1122_3300), [0x11, 0x22, 0x33]);
        assert_eq!(wire(upper.tpixel(), 0x1122_3300), [0x11, 0x22, 0x33]);
        let r565 = parse([16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0]).unwrap();
        assert_eq!(wire(r565.tpixel(), 0x1234), [0x12, 0x34]);
        assert_eq!(wire(r565.cpixel(), 0x1234), [0x12, 0x34]);
        // A depth of 32: nothing can be left out.
        let deep = parse([32, 32, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0]).unwrap();
        assert_eq!((deep.cpixel().bytes(), deep.tpixel().bytes()), (4, 4));
    }

    #[test]
    fn colours_are_scaled() {
        let r565 = parse([16, 16, 0, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0]).unwrap();
        let mut values = Vec::new();
        Translator::new(r565).translate(&[0xff_ffff, 0, 0xff_0000, 0x80_8080], &mut values);
        assert_eq!(values, [0xffff, 0, 0xf800, 16 << 11 | 32 << 5 | 16]);
        values.clear();
        Translator::new(PixelFormat::NATIVE).translate(&[0x12_3456], &mut values);
        assert_eq!(values, [0x12_3456]);
    }

    #[test]
    fn a_colour_map_is_made_where_one_is_asked_for() {
        let mapped = parse([8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let map = mapped.colour_map().unwrap();
        assert_eq!(map.len(), 6 + 256 * 6);
        assert_eq!(map[..6], [1, 0, 0, 0, 1, 0]);
        assert_eq!(map[6..12], [0; 6]);
        assert_eq!(map[map.len() - 6..], [0xff; 6]);
        assert_eq!(PixelFormat::NATIVE.colour_map(), None);
    }
}
