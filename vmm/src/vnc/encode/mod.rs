//! Pictures as bytes: rectangles in the encodings that clients know (RFC 6143, section 7.7, and rfbproto).
//!
//! ```text
//!   what changed --pieces--> Piece --Translator--> values --+-- Raw
//!                                                           +-- Zlib: the same, deflated
//!                                                           +-- ZRLE: tiles of 64 x 64, deflated
//!                                                           +-- Tight: one colour, few colours, many (or JPEG)
//! ```
//!
//! A piece is small enough to be looked at and sent on its own; each is a rectangle of the update.

mod palette;
mod tight;
mod zlib;
mod zrle;

use lodge_devices::display::{Cursor, Picture, Rect};

use self::tight::Tight;
use self::zlib::Deflater;
use self::zrle::Zrle;
use super::pixels::{PixelFormat, Translator};

/// Encoding numbers (RFC 6143, section 7.7; rfbproto, Encodings).
pub mod number {
    /// Pixels as they are.
    pub const RAW: i32 = 0;
    /// From elsewhere in the client's picture.
    pub const COPY_RECT: i32 = 1;
    /// Deflated pixels.
    pub const ZLIB: i32 = 6;
    /// Tight.
    pub const TIGHT: i32 = 7;
    /// Tiles, run lengths, deflated.
    pub const ZRLE: i32 = 16;
    /// The pointer's shape with a mask.
    pub const CURSOR: i32 = -239;
    /// The pointer's shape with alpha.
    pub const CURSOR_WITH_ALPHA: i32 = -314;
}

/// How pixels travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Raw,
    /// Deflated.
    Zlib,
    /// Tiles with palettes and run lengths, deflated.
    Zrle,
    /// The best of several ways for each piece.
    Tight,
}

/// The rectangle of what has no place and no size.
pub const EMPTY: Rect = Rect { x: 0, y: 0, width: 0, height: 0 };

/// What a client would like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How pixels travel.
    pub encoding: Encoding,
    /// zlib's level, 1 to 9.
    pub level: u32,
    /// JPEG's quality, 1 to 100, where the client takes JPEG.
    pub jpeg: Option<u8>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { encoding: Encoding::Raw, level: 1, jpeg: None }
    }
}

/// A piece of a picture in a client's format.
struct Piece<'a> {
    width: usize,
    height: usize,
    /// The client's pixel values, row by row.
    values: &'a [u32],
    /// The same as 0x00RRGGBB.
    colours: &'a [u32],
    format: &'a PixelFormat,
}

/// What encodes for one connection, with its streams.
pub struct Encoder {
    settings: Settings,
    translator: Translator,
    zlib: Option<Deflater>,
    zrle: Zrle,
    tight: Tight,
    colours: Vec<u32>,
    values: Vec<u32>,
    bytes: Vec<u8>,
}

impl Encoder {
    /// An encoder for the server's own format and Raw.
    pub fn new() -> Self {
        Self {
            settings: Settings::default(),
            translator: Translator::new(PixelFormat::NATIVE),
            zlib: None,
            zrle: Zrle::default(),
            tight: Tight::default(),
            colours: Vec::new(),
            values: Vec::new(),
            bytes: Vec::new(),
        }
    }

    /// From now on pixels have this format.
    pub fn set_format(&mut self, format: PixelFormat) {
        self.translator = Translator::new(format);
    }

    /// From now on pixels travel like this.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Cuts a rectangle into pieces.
    pub fn pieces(&self, rect: Rect) -> impl Iterator<Item = Rect> + use<> {
        let (width, height) = match self.settings.encoding {
            Encoding::Raw | Encoding::Zlib => (2048, 32),
            Encoding::Zrle => (2048, zrle::TILE as u32),
            Encoding::Tight => (256, 128),
        };
        cut(rect.y, rect.height, height).flat_map(move |(y, height)| {
            cut(rect.x, rect.width, width).map(move |(x, width)| Rect { x, y, width, height })
        })
    }

    /// Appends `rect` of `picture`, which must be inside; true if it lost something on the way. `exact` forbids that.
    pub fn encode(
        &mut self,
        picture: &Picture,
        rect: Rect,
        exact: bool,
        out: &mut Vec<u8>,
    ) -> bool {
        self.load(picture, rect);
        let piece = Piece {
            width: rect.width as usize,
            height: rect.height as usize,
            values: &self.values,
            colours: &self.colours,
            format: self.translator.format(),
        };
        let level = self.settings.level;
        match self.settings.encoding {
            Encoding::Raw => {
                header(rect, number::RAW, out);
                piece.format.pixel().put_all(piece.values, out);
            }
            Encoding::Zlib => {
                header(rect, number::ZLIB, out);
                self.bytes.clear();
                piece.format.pixel().put_all(piece.values, &mut self.bytes);
                let stream = self.zlib.get_or_insert_with(|| Deflater::new(level));
                with_length(out, |out| stream.append(&self.bytes, level, out));
            }
            Encoding::Zrle => {
                header(rect, number::ZRLE, out);
                self.zrle.encode(&piece, level, out);
            }
            Encoding::Tight => {
                header(rect, number::TIGHT, out);
                let jpeg = self.settings.jpeg.filter(|_| !exact);
                return self.tight.encode(&piece, level, jpeg, out);
            }
        }
        false
    }

    /// Copies the piece's pixels, and translates them.
    fn load(&mut self, picture: &Picture, rect: Rect) {
        self.colours.clear();
        let (left, width) = (rect.x as usize, rect.width as usize);
        let rows = picture.pixels.chunks_exact(picture.width.max(1) as usize);
        for row in rows.skip(rect.y as usize).take(rect.height as usize) {
            self.colours.extend_from_slice(&row[left..left + width]);
        }
        self.values.clear();
        self.translator.translate(&self.colours, &mut self.values);
    }

    /// Appends the pointer's shape for a client that takes a mask; none hides it (rfbproto, Cursor Pseudo-encoding).
    pub fn cursor(&self, cursor: Option<&Cursor>, out: &mut Vec<u8>) {
        header(cursor.map_or(EMPTY, shape), number::CURSOR, out);
        let Some(cursor) = cursor else { return };
        let mut values = Vec::new();
        let colours: Vec<u32> = cursor.pixels.iter().map(|pixel| pixel & 0xff_ffff).collect();
        self.translator.translate(&colours, &mut values);
        self.translator.format().pixel().put_all(&values, out);
        for row in cursor.pixels.chunks(cursor.width as usize) {
            out.extend(row.chunks(8).map(|pixels| {
                let bits = pixels.iter().enumerate();
                bits.fold(0_u8, |mask, (i, pixel)| mask | (u8::from(pixel >> 31 != 0) << (7 - i)))
            }));
        }
    }
}

/// Appends the pointer's shape for a client that takes alpha (rfbproto, Cursor With Alpha Pseudo-encoding).
pub fn cursor_with_alpha(cursor: Option<&Cursor>, out: &mut Vec<u8>) {
    header(cursor.map_or(EMPTY, shape), number::CURSOR_WITH_ALPHA, out);
    out.extend(number::RAW.to_be_bytes());
    for pixel in cursor.map_or(&[][..], |cursor| &cursor.pixels) {
        let [a, r, g, b] = pixel.to_be_bytes();
        let scaled = |part| ((u32::from(part) * u32::from(a) + 127) / 255) as u8;
        out.extend([scaled(r), scaled(g), scaled(b), a]);
    }
}

/// The rectangle that tells a cursor's size and hot spot.
fn shape(cursor: &Cursor) -> Rect {
    Rect { x: cursor.hot_x, y: cursor.hot_y, width: cursor.width, height: cursor.height }
}

/// Appends a rectangle's header. Its numbers fit into 16 bits.
pub fn header(rect: Rect, encoding: i32, out: &mut Vec<u8>) {
    for number in [rect.x, rect.y, rect.width, rect.height] {
        out.extend((number as u16).to_be_bytes());
    }
    out.extend(encoding.to_be_bytes());
}

/// Appends a CopyRect: `rect` is what is at `from_y` in the same columns (RFC 6143, section 7.7.2).
pub fn copy_rect(rect: Rect, from_y: u32, out: &mut Vec<u8>) {
    header(rect, number::COPY_RECT, out);
    out.extend((rect.x as u16).to_be_bytes());
    out.extend((from_y as u16).to_be_bytes());
}

/// Appends what `write` writes, its length in four bytes before it.
fn with_length(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend([0; 4]);
    write(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Cuts `len` from `start` into parts of at most `most`: (start, length) of each.
fn cut(start: u32, len: u32, most: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..len.div_ceil(most)).map(move |i| (start + i * most, most.min(len - i * most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor() -> Cursor {
        // Two columns and a bit more than a mask's byte.
        let mut pixels = vec![0xff11_2233; 18];
        pixels[9] = 0x8080_4020;
        pixels[10] = 0x0012_3456;
        Cursor { width: 9, height: 2, hot_x: 3, hot_y: 1, pixels }
    }

    #[test]
    fn pieces_cover_a_rectangle_once() {
        let mut encoder = Encoder::new();
        for encoding in [Encoding::Raw, Encoding::Zlib, Encoding::Zrle, Encoding::Tight] {
            encoder.set(Settings { encoding, ..Settings::default() });
            let rect = Rect { x: 5, y: 7, width: 4100, height: 300 };
            let mut hits = vec![0; 4100 * 300];
            for piece in encoder.pieces(rect) {
                assert!(piece.width <= 2048 && piece.width > 0 && piece.height > 0);
                for y in piece.y..piece.y + piece.height {
                    for x in piece.x..piece.x + piece.width {
                        hits[((y - 7) * 4100 + x - 5) as usize] += 1;
                    }
                }
            }
            assert!(hits.iter().all(|hit| *hit == 1), "{encoding:?}");
        }
    }

    #[test]
    fn a_cursor_has_a_mask() {
        let mut out = Vec::new();
        Encoder::new().cursor(Some(&cursor()), &mut out);
        assert_eq!(out[..8], [0, 3, 0, 1, 0, 9, 0, 2]);
        assert_eq!(out[8..12], (-239_i32).to_be_bytes());
        assert_eq!(out.len(), 12 + 18 * 4 + 2 * 2);
        assert_eq!(out[12..16], [0x33, 0x22, 0x11, 0]);
        assert_eq!(out[12 + 18 * 4..], [0xff, 0x80, 0b1011_1111, 0x80]);
        out.clear();
        Encoder::new().cursor(None, &mut out);
        assert_eq!((out.len(), &out[..8]), (12, &[0; 8][..]));
    }

    #[test]
    fn a_cursor_has_alpha() {
        let mut out = Vec::new();
        cursor_with_alpha(Some(&cursor()), &mut out);
        assert_eq!(out.len(), 16 + 18 * 4);
        assert_eq!(out[16..20], [0x11, 0x22, 0x33, 0xff]);
        assert_eq!(out[16 + 36..16 + 44], [0x40, 0x20, 0x10, 0x80, 0, 0, 0, 0]);
        out.clear();
        cursor_with_alpha(None, &mut out);
        assert_eq!(out.len(), 16);
    }
}
