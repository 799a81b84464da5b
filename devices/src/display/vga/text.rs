//! Text modes: cells of a character and its colours, glyphs from plane 2, the cursor.
//!
//! ```text
//!   frame buffer   char attr glyph -   char attr glyph -   ...     one address of the four planes after the other
//!   attribute      bit 7 blinks or background, 6:4 background, 3 foreground and font, 2:0 foreground
//! ```
//!
//! What was drawn is remembered cell by cell, so that a change costs what it changes.

use super::super::Rect;
use super::super::paint::Painter;
use super::mode::{PLANE_MASK, Text, TextPlace};
use crate::device_ram::DeviceRam;

/// Characters of a font, and lines that each has there.
const GLYPHS: usize = 256;
const GLYPH_LINES: usize = 32;
const FONT_BYTES: usize = GLYPHS * GLYPH_LINES;
/// Characters 192 to 223 are line graphics.
const LINE_GRAPHICS: std::ops::RangeInclusive<u8> = 0xc0..=0xdf;
/// How long the cursor is there and not there: 16 frames of 60 Hz. Characters blink half as often.
const CURSOR_BLINK_MS: u64 = 267;

/// What blinks is to be seen now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Phase {
    pub cursor: bool,
    pub text: bool,
}

impl Phase {
    /// The phase `ms` milliseconds after some time.
    pub fn at(ms: u64) -> Self {
        let half = ms / CURSOR_BLINK_MS;
        Self { cursor: half & 1 == 0, text: half & 2 == 0 }
    }
}

/// What makes a cell look as it does: character, attribute, and these.
mod key {
    /// The cursor is on it, with its first and last line from these bits on.
    pub const CURSOR: u32 = 1 << 16;
    pub const FIRST: u32 = 17;
    pub const LAST: u32 = 22;
    /// It blinks, and is not to be seen now.
    pub const HIDDEN: u32 = 1 << 27;
    /// It was never drawn.
    pub const NONE: u32 = u32::MAX;
}

/// What was drawn.
pub(super) struct Drawn {
    cells: Vec<u32>,
    fonts: [Vec<u8>; 2],
    place: Option<(TextPlace, Phase)>,
}

impl Default for Drawn {
    fn default() -> Self {
        let font = || vec![0; FONT_BYTES];
        Self { cells: Vec::new(), fonts: [font(), font()], place: None }
    }
}

impl Drawn {
    /// Forgets everything.
    pub fn forget(&mut self) {
        self.cells.clear();
        self.place = None;
    }
}

/// Draws `mode` in `phase`. `written` says that memory may have changed; `all`, that nothing drawn before is of use.
pub(super) fn draw(
    mode: &Text,
    phase: Phase,
    vram: &DeviceRam,
    drawn: &mut Drawn,
    painter: &mut Painter<'_>,
    written: bool,
    all: bool,
) {
    if all {
        drawn.forget();
    }
    let place = Some((mode.place, phase));
    if !written && drawn.place == place {
        return;
    }
    drawn.place = place;
    let mut changed = [[false; GLYPHS]; 2];
    for (font, (offset, changed)) in drawn.fonts.iter_mut().zip(mode.fonts.iter().zip(&mut changed))
    {
        read_font(vram, *offset, font, changed);
    }
    let lines = mode.cell << u32::from(mode.double_height);
    let rows = mode.height.div_ceil(lines);
    drawn.cells.resize((rows * mode.columns) as usize, key::NONE);
    let Drawn { cells, fonts, .. } = drawn;
    let mut bytes = vec![0; mode.columns as usize * 4];
    for (row, cells) in (0..rows).zip(cells.chunks_exact_mut(mode.columns as usize)) {
        let address = mode.row_address(row);
        read_cells(vram, address, &mut bytes);
        let mut touched: Option<(u32, u32)> = None;
        for (column, (cell, old)) in (0..).zip(bytes.chunks_exact(4).zip(cells)) {
            let key = mode.key(address.wrapping_add(column) & PLANE_MASK, cell, phase);
            let font = usize::from(cell[1] >> 3 & 1);
            if key == *old && !changed[font][usize::from(cell[0])] {
                continue;
            }
            *old = key;
            mode.draw_cell(painter, (column, row), key, &fonts[font]);
            touched = Some((touched.map_or(column, |(first, _)| first), column));
        }
        if let Some((first, last)) = touched {
            let width = mode.cell_width();
            let y = row * lines;
            let height = lines.min(mode.height - y);
            painter.mark(Rect { x: first * width, y, width: (last + 1 - first) * width, height });
        }
    }
}

impl Text {
    /// Columns of the picture for each character.
    fn cell_width(&self) -> u32 {
        self.dots << u32::from(self.double_width)
    }

    /// Columns of the picture.
    pub fn width(&self) -> u32 {
        self.columns * self.cell_width()
    }

    /// Whether another mode looks the same but for what may move.
    pub fn looks_like(&self, other: &Text) -> bool {
        *self == Text { place: self.place, ..other.clone() }
    }

    fn row_address(&self, row: u32) -> u32 {
        let place = &self.place;
        let address = match self.split {
            Some(split) if row >= split => (row - split) * place.pitch,
            _ => place.start + row * place.pitch,
        };
        address & PLANE_MASK
    }

    fn key(&self, address: u32, cell: &[u8], phase: Phase) -> u32 {
        let mut key = u32::from(cell[0]) | u32::from(cell[1]) << 8;
        if let Some((at, first, last)) = self.place.cursor
            && at == address
            && phase.cursor
        {
            key |= key::CURSOR | u32::from(first) << key::FIRST | u32::from(last) << key::LAST;
        }
        if self.blink && cell[1] & 0x80 != 0 && !phase.text {
            key |= key::HIDDEN;
        }
        key
    }

    fn draw_cell(
        &self,
        painter: &mut Painter<'_>,
        (column, row): (u32, u32),
        key: u32,
        font: &[u8],
    ) {
        let (character, attribute) = (key as u8, (key >> 8) as u8);
        let background = attribute >> 4 & if self.blink { 7 } else { 15 };
        let background = self.colors[usize::from(background)];
        let foreground = match key & key::HIDDEN {
            0 => self.colors[usize::from(attribute & 15)],
            _ => background,
        };
        let cursor = key & key::CURSOR != 0;
        let cursor_lines = key >> key::FIRST & 31..=key >> key::LAST & 31;
        let underlined = attribute & 0x77 == 1;
        let ninth = self.line_graphics && LINE_GRAPHICS.contains(&character);
        let glyph = &font[usize::from(character) * GLYPH_LINES..][..GLYPH_LINES];
        let (x, width) = (column * self.cell_width(), self.cell_width() as usize);
        let scale = u32::from(self.double_height);
        for line in 0..self.cell << scale {
            let scan = line >> scale;
            let bits = u32::from(glyph[scan as usize % GLYPH_LINES]);
            let mut dots = bits << 1 | if ninth { bits & 1 } else { 0 };
            if cursor && cursor_lines.contains(&scan) || underlined && scan == self.underline {
                dots = 0x1ff;
            }
            let pixels = painter.line(x, row * (self.cell << scale) + line);
            for (i, pixel) in pixels.iter_mut().take(width).enumerate() {
                let dot = i >> u32::from(self.double_width);
                *pixel = if dots & 0x100 >> dot != 0 { foreground } else { background };
            }
        }
    }
}

/// Reads the cells from `address` on; addresses go round at the end of the planes.
fn read_cells(vram: &DeviceRam, address: u32, bytes: &mut [u8]) {
    let until_end = ((PLANE_MASK + 1 - address) * 4) as usize;
    let (first, rest) = bytes.split_at_mut(bytes.len().min(until_end));
    vram.read_at(u64::from(address) * 4, first);
    vram.read_at(0, rest);
}

/// Reads a font from plane 2 and notes which glyphs are others now.
fn read_font(vram: &DeviceRam, offset: u64, font: &mut [u8], changed: &mut [bool; GLYPHS]) {
    let mut planes = [0; GLYPH_LINES * 4];
    for (i, (glyph, changed)) in font.chunks_exact_mut(GLYPH_LINES).zip(changed).enumerate() {
        vram.read_at(offset + (i * planes.len()) as u64, &mut planes);
        for (line, planes) in glyph.iter_mut().zip(planes.chunks_exact(4)) {
            *changed |= *line != planes[0];
            *line = planes[0];
        }
    }
}
