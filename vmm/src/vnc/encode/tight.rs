//! The Tight encoding (rfbproto, Tight Encoding).
//!
//! ```text
//!   colours    sent as                             zlib stream
//!   1          fill: the colour                    -
//!   2          palette, a bit for each pixel       1
//!   few        palette, a byte for each pixel      2
//!   many       JPEG, where the client takes it     -
//!              all pixels                          0
//! ```
//!
//! A stream for each kind, because like compresses like. Where the client takes JPEG, "few" is fewer: text and
//! buttons stay sharp, pictures are small.

use jpeg_encoder::{ColorType, SamplingFactor};

use super::Piece;
use super::palette::{MOST, Palette};
use super::zlib::Deflater;

const FILL: u8 = 0x80;
const JPEG: u8 = 0x90;
/// A filter's number follows.
const FILTER: u8 = 0x40;
const PALETTE: u8 = 1;
/// Shorter data travels as it is.
const LEAST_DEFLATED: usize = 12;
/// Colours up to which a piece is text or buttons rather than a photograph.
const FEW_WITH_JPEG: usize = 96;
/// Pixels from which JPEG's tables are worth their bytes.
const LEAST_JPEG: usize = 4096;

/// The streams and scratch memory of a connection.
#[derive(Default)]
pub struct Tight {
    streams: [Option<Deflater>; 3],
    palette: Palette,
    filtered: Vec<u8>,
    packed: Vec<u8>,
}

impl Tight {
    /// Appends a piece without its header; true if it lost something on the way.
    pub fn encode(
        &mut self,
        piece: &Piece<'_>,
        level: u32,
        jpeg: Option<u8>,
        out: &mut Vec<u8>,
    ) -> bool {
        let area = piece.values.len();
        let jpeg = jpeg.filter(|_| area >= LEAST_JPEG && piece.format.bits() > 8);
        // A palette of as many colours as pixels saves nothing.
        let most = if jpeg.is_some() { FEW_WITH_JPEG } else { MOST }.min(area / 8).max(2);
        let few = self.palette.fill(piece.values, most);
        let wire = piece.format.tpixel();
        match (few, self.palette.colours()) {
            (true, &[colour]) => {
                out.push(FILL);
                wire.put(colour, out);
            }
            (true, colours) => {
                let stream = if colours.len() == 2 { 1 } else { 2 };
                out.extend([stream << 4 | FILTER, PALETTE, (colours.len() - 1) as u8]);
                wire.put_all(colours, out);
                self.filter(piece);
                self.deflate(stream, level, out);
            }
            (false, _) => {
                if jpeg.is_some_and(|quality| self.jpeg(piece, quality, out)) {
                    return true;
                }
                out.push(0);
                self.filtered.clear();
                wire.put_all(piece.values, &mut self.filtered);
                self.deflate(0, level, out);
            }
        }
        false
    }

    /// Pixels as numbers of the palette's colours.
    fn filter(&mut self, piece: &Piece<'_>) {
        self.filtered.clear();
        let palette = &self.palette;
        if let &[_, one] = palette.colours() {
            for row in piece.values.chunks(piece.width) {
                self.filtered.extend(row.chunks(8).map(|eight| {
                    let bits = eight.iter().enumerate();
                    bits.fold(0_u8, |byte, (i, value)| byte | (u8::from(*value == one) << (7 - i)))
                }));
            }
            return;
        }
        let mut last = (piece.values[0], palette.index(piece.values[0]));
        self.filtered.extend(piece.values.iter().map(|&value| {
            if value != last.0 {
                last = (value, palette.index(value));
            }
            last.1
        }));
    }

    fn deflate(&mut self, stream: u8, level: u32, out: &mut Vec<u8>) {
        if self.filtered.len() < LEAST_DEFLATED {
            return out.extend_from_slice(&self.filtered);
        }
        self.packed.clear();
        let stream = self.streams[usize::from(stream)].get_or_insert_with(|| Deflater::new(level));
        stream.append(&self.filtered, level, &mut self.packed);
        length(self.packed.len(), out);
        out.extend_from_slice(&self.packed);
    }

    fn jpeg(&mut self, piece: &Piece<'_>, quality: u8, out: &mut Vec<u8>) -> bool {
        self.filtered.clear();
        self.filtered.extend(piece.colours.iter().flat_map(|colour| colour.to_le_bytes()));
        self.packed.clear();
        let mut encoder = jpeg_encoder::Encoder::new(&mut self.packed, quality);
        // Below this the eye does not see where colour was left out.
        encoder.set_sampling_factor(match quality {
            0..=79 => SamplingFactor::F_2_2,
            _ => SamplingFactor::F_1_1,
        });
        let (width, height) = (piece.width as u16, piece.height as u16);
        if encoder.encode(&self.filtered, width, height, ColorType::Bgra).is_err() {
            return false;
        }
        out.push(JPEG);
        length(self.packed.len(), out);
        out.extend_from_slice(&self.packed);
        true
    }
}

/// Tight's compact length: seven bits in each of two bytes, eight in a third.
fn length(len: usize, out: &mut Vec<u8>) {
    let low = (len & 0x7f) as u8;
    let middle = (len >> 7 & 0x7f) as u8;
    match len {
        0..=0x7f => out.push(low),
        0x80..=0x3fff => out.extend([low | 0x80, middle]),
        _ => out.extend([low | 0x80, middle | 0x80, (len >> 14) as u8]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vnc::pixels::PixelFormat;

    fn encode(values: &[u32], width: usize, jpeg: Option<u8>) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        let height = values.len() / width;
        let format = &PixelFormat::NATIVE;
        let piece = Piece { width, height, values, colours: values, format };
        let lossy = Tight::default().encode(&piece, 1, jpeg, &mut out);
        (out, lossy)
    }

    #[test]
    fn lengths_are_compact() {
        let of = |len| {
            let mut out = Vec::new();
            length(len, &mut out);
            out
        };
        assert_eq!(of(0), [0]);
        assert_eq!(of(127), [127]);
        assert_eq!(of(128), [0x80, 1]);
        assert_eq!(of(10_000), [0x90, 0x4e]);
        assert_eq!(of(16_383), [0xff, 0x7f]);
        assert_eq!(of(16_384), [0x80, 0x80, 1]);
        assert_eq!(of(4_194_303), [0xff, 0xff, 0xff]);
    }

    #[test]
    fn the_number_of_colours_decides() {
        assert_eq!(encode(&[0x11_2233; 64], 8, None), (vec![FILL, 0x11, 0x22, 0x33], false));
        let two = [1, 2, 1, 1, 1, 1, 1, 1, 2, 2];
        // Five rows of two columns, a byte each: too short to deflate.
        let expected = [0x50, 1, 1, 0, 0, 1, 0, 0, 2, 0x40, 0, 0, 0, 0xc0];
        assert_eq!(encode(&two, 2, None), (expected.to_vec(), false));
        let few: Vec<u32> = (0..64 * 64).map(|i| i % 50).collect();
        assert_eq!(encode(&few, 64, Some(90)).0[..3], [0x60, 1, 49]);
        let many: Vec<u32> = (0..64 * 64).map(|i| i * 77).collect();
        assert_eq!(encode(&many, 64, None).0[0], 0);
        let (jpeg, lossy) = encode(&many, 64, Some(90));
        assert!(lossy);
        assert_eq!((jpeg[0], &jpeg[3..5]), (JPEG, &[0xff, 0xd8][..]));
        // Too small for JPEG's tables.
        assert!(!encode(&many[..1024], 32, Some(90)).1);
    }
}
