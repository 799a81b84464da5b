//! What a screenshot of a text mode says, read by the font that the display's BIOS brings.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;

/// Where Debian has the display's BIOS, with the font of 8x16 pixels in it.
const ROM: &str = "/usr/share/seabios/vgabios-stdvga.bin";
/// The letter A in that font, by which it is found.
const LETTER_A: [u8; 16] =
    [0, 0, 0x10, 0x38, 0x6c, 0xc6, 0xc6, 0xfe, 0xc6, 0xc6, 0xc6, 0xc6, 0, 0, 0, 0];
/// Rows of a character, and its columns on the screen.
const HEIGHT: usize = 16;

/// A picture: its width and its pixels, rows from the top, as 0xRRGGBB.
pub struct Picture {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    pixels: Vec<u32>,
}

impl Picture {
    /// Reads a PNG, if it is there and whole.
    pub fn read(path: &Path) -> Option<Self> {
        let decoder = png::Decoder::new(BufReader::new(File::open(path).ok()?));
        let mut reader = decoder.read_info().ok()?;
        let mut bytes = vec![0; reader.output_buffer_size()?];
        let info = reader.next_frame(&mut bytes).ok()?;
        let step = info.color_type.samples();
        assert!(step >= 3, "a picture in colours");
        let pixel = |p: &[u8]| u32::from_be_bytes([0, p[0], p[1], p[2]]);
        let pixels = bytes[..info.buffer_size()].chunks(step).map(pixel).collect();
        Some(Self { width: info.width as usize, height: info.height as usize, pixels })
    }

    /// The text on it, a line each, if it is of a mode with characters of 8 or 9 by 16 pixels (720x400, 640x480).
    pub fn text(&self) -> String {
        let font = font();
        let columns = if self.width.is_multiple_of(9) { 9 } else { 8 };
        let line = |row: usize| {
            let cell = |column: usize| self.character(&font, column * columns, row * HEIGHT);
            (0..self.width / columns).map(cell).collect::<String>().trim_end().to_owned()
        };
        (0..self.height / HEIGHT).map(line).collect::<Vec<_>>().join("\n")
    }

    /// The character at a place: what differs from the cell's first pixel is ink, or the other way round.
    fn character(&self, font: &HashMap<[u8; HEIGHT], char>, x: usize, y: usize) -> char {
        let paper = self.pixels[y * self.width + x];
        let row = |r: usize| {
            let at = (y + r) * self.width + x;
            (0..8).fold(0u8, |bits, i| bits << 1 | u8::from(self.pixels[at + i] != paper))
        };
        let glyph: [u8; HEIGHT] = std::array::from_fn(row);
        let inverse = glyph.map(|row| !row);
        font.get(&glyph).or_else(|| font.get(&inverse)).copied().unwrap_or('?')
    }
}

/// Printable ASCII characters by their pixels.
fn font() -> HashMap<[u8; HEIGHT], char> {
    let rom = fs::read(ROM).unwrap_or_else(|error| panic!("{ROM}: {error} (package seabios)"));
    let a = rom.windows(HEIGHT).position(|w| w == LETTER_A).expect("the ROM has a font");
    let glyph = |c: u8| -> [u8; HEIGHT] {
        let at = a + (usize::from(c) - usize::from(b'A')) * HEIGHT;
        rom[at..at + HEIGHT].try_into().unwrap()
    };
    let before = |c: u8| -> [u8; HEIGHT] {
        let at = a - (usize::from(b'A') - usize::from(c)) * HEIGHT;
        rom[at..at + HEIGHT].try_into().unwrap()
    };
    (b' '..=b'~').map(|c| (if c < b'A' { before(c) } else { glyph(c) }, char::from(c))).collect()
}
