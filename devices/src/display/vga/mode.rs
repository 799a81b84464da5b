//! What the registers mean for the screen, as a value: two equal modes look the same over the same memory.
//!
//! ```text
//!   VBE set --------------------> Linear (8 to 32 bits), Planes (4 bits)
//!   graphics 6 bit 0 set -------> Planes: 16 colours, CGA's interleaved 4, 256 colours packed
//!                    clear -----> Text
//!   palette off, nothing set ---> Blank
//! ```

use super::dispi::Geometry;
use super::state::{VgaState, attribute, crtc, graphics, sequencer};

/// Addresses of a plane.
pub(super) const PLANE_MASK: u32 = 0xffff;

/// What is on the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
    /// Nothing.
    Blank,
    /// Characters.
    Text(Box<Text>),
    /// Pixels of the four planes, as the CRT controller says.
    Planes(Box<Planes>),
    /// Pixels in the linear frame buffer.
    Linear(Box<Linear>),
}

/// A text mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Text {
    pub columns: u32,
    /// Lines of the picture.
    pub height: u32,
    /// Dots of a character, 8 or 9, and whether each is two pixels wide.
    pub dots: u32,
    pub double_width: bool,
    /// Lines of a character, 1 to 32, and whether each is drawn twice.
    pub cell: u32,
    pub double_height: bool,
    /// Frame buffer offsets of the font for characters without and with attribute bit 3.
    pub fonts: [u64; 2],
    pub colors: [u32; 16],
    pub line_graphics: bool,
    /// Attribute bit 7 blinks.
    pub blink: bool,
    /// The line on which underlined characters have their line.
    pub underline: u32,
    /// The row of characters that is the first of the lower part, which begins at address 0.
    pub split: Option<u32>,
    pub place: TextPlace,
}

/// What may change in a text mode without drawing everything again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TextPlace {
    /// Address of the first character, and from one row to the next.
    pub start: u32,
    pub pitch: u32,
    /// Address of the cursor, its first and its last line.
    pub cursor: Option<(u32, u8, u8)>,
}

/// How the planes' bits become pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shift {
    /// A bit of each plane for a pixel: 16 colours.
    Planar,
    /// Two bits of planes 0 and 2, then of 1 and 3: CGA's 4 colours.
    Interleaved,
    /// A byte: 256 colours.
    Packed,
}

/// A mode in which the CRT controller walks through the planes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planes {
    /// Pixels of the picture.
    pub width: u32,
    pub height: u32,
    pub shift: Shift,
    /// Picture columns for each pixel.
    pub repeat: u32,
    /// Each line is drawn twice.
    pub double_scan: bool,
    /// Lines for each row of addresses, minus one.
    pub max_scan: u32,
    /// The line in that row where the picture begins.
    pub preset: u32,
    pub start: u32,
    pub pitch: u32,
    /// Address bits that lines of a row replace, for scan bit 0 and 1 (CGA's and Hercules' interleaving).
    pub replaced: [Option<u32>; 2],
    /// Pixels that the picture is shifted to the left, and whether the lower part is not.
    pub panning: u32,
    pub panning_ends: bool,
    /// The last line before the lower part, which begins at address 0.
    pub line_compare: u32,
    /// Addresses go round at the end of 64 KiB (IBM's VGA), or later.
    pub wrap: u32,
    pub palette: Box<[u32; 256]>,
}

/// A format of pixels in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Format {
    /// Numbers of colours.
    Palette(Box<[u32; 256]>),
    /// 5, 5, 5 bits.
    Rgb555,
    /// 5, 6, 5 bits.
    Rgb565,
    /// Blue, green, red.
    Bgr24,
    /// Blue, green, red, unused.
    Bgrx32,
}

impl Format {
    /// Bytes of a pixel.
    pub fn bytes(&self) -> usize {
        match self {
            Format::Palette(_) => 1,
            Format::Rgb555 | Format::Rgb565 => 2,
            Format::Bgr24 => 3,
            Format::Bgrx32 => 4,
        }
    }
}

/// A VBE mode with pixels one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Linear {
    pub width: u32,
    pub height: u32,
    /// Offset of the first pixel, and bytes from one row to the next.
    pub start: u64,
    pub stride: u64,
    pub format: Format,
    /// Pixels of 16 and 32 bits have their high byte first.
    pub big_endian: bool,
}

/// A component of the DAC's colours, as 8 bits.
fn widen(value: u8, bits8: bool) -> u32 {
    if bits8 { value.into() } else { u32::from(value & 0x3f) << 2 | u32::from(value & 0x3f) >> 4 }
}

impl VgaState {
    /// Colour `index` of the DAC, masked, as 0x00RRGGBB.
    fn dac_color(&self, index: u8) -> u32 {
        let at = usize::from(index & self.dac_mask) * 3;
        let bits8 = self.dispi.dac_8bit();
        let [r, g, b] =
            [0, 1, 2].map(|i| self.dac.get(at + i).map_or(0, |value| widen(*value, bits8)));
        r << 16 | g << 8 | b
    }

    /// The colours of the 16 attributes.
    fn colors(&self) -> [u32; 16] {
        let mode = self.attribute[attribute::MODE];
        let select = self.attribute[attribute::COLOR_SELECT];
        let enabled = self.attribute[attribute::PLANES] & 15;
        std::array::from_fn(|i| {
            let entry = self.attribute[i & usize::from(enabled)];
            let low = match mode & attribute::SELECT_54 != 0 {
                true => entry & 0x0f | (select & 3) << 4,
                false => entry & 0x3f,
            };
            self.dac_color(low | (select & 0x0c) << 4)
        })
    }

    fn colors256(&self) -> Box<[u32; 256]> {
        Box::new(std::array::from_fn(|i| self.dac_color(i as u8)))
    }

    fn crtc16(&self, high: usize) -> u32 {
        u32::from(self.crtc[high]) << 8 | u32::from(self.crtc[high + 1])
    }

    /// Lines on the screen.
    fn lines(&self) -> u32 {
        let overflow = u32::from(self.crtc[crtc::OVERFLOW]);
        let low = u32::from(self.crtc[crtc::DISPLAY_END_V]);
        (low | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1
    }

    /// The last line before the split.
    fn line_compare(&self) -> u32 {
        let overflow = u32::from(self.crtc[crtc::OVERFLOW]);
        let scan = u32::from(self.crtc[crtc::MAX_SCAN]);
        u32::from(self.crtc[crtc::LINE_COMPARE]) | (overflow & 0x10) << 4 | (scan & 0x40) << 3
    }

    /// What is on the screen of a card with `vram` bytes.
    pub(super) fn mode(&self, vram: u64) -> Mode {
        if self.attribute_index & attribute::SCREEN == 0 {
            return Mode::Blank;
        }
        if self.dispi.enabled() {
            return match self.dispi.geometry(vram) {
                Some(shown) if shown.bits == 4 => Mode::Planes(Box::new(self.vbe_planes(&shown))),
                Some(shown) => Mode::Linear(Box::new(self.linear(&shown))),
                None => Mode::Blank,
            };
        }
        let off = self.sequencer[sequencer::CLOCKING] & sequencer::SCREEN_OFF != 0;
        // Registers as after power-on are no mode.
        if off || self.crtc[crtc::DISPLAY_END_H] == 0 || self.lines() == 1 {
            Mode::Blank
        } else if self.graphics[graphics::MISC] & graphics::IS_GRAPHICS != 0 {
            Mode::Planes(Box::new(self.planes_mode()))
        } else {
            Mode::Text(Box::new(self.text()))
        }
    }

    fn text(&self) -> Text {
        let clocking = self.sequencer[sequencer::CLOCKING];
        let scan = self.crtc[crtc::MAX_SCAN];
        let attribute_mode = self.attribute[attribute::MODE];
        let cell = u32::from(scan & 0x1f) + 1;
        let double_height = scan & 0x80 != 0;
        let fonts = self.sequencer[sequencer::FONTS];
        let height = self.lines();
        let lines = cell << u32::from(double_height);
        // A split in the middle of a row of characters begins with the next one.
        let split = (self.line_compare() + 1 < height).then(|| self.line_compare() / lines + 1);
        Text {
            columns: u32::from(self.crtc[crtc::DISPLAY_END_H]) + 1,
            height,
            dots: if clocking & sequencer::EIGHT_DOTS != 0 { 8 } else { 9 },
            double_width: clocking & sequencer::HALF_CLOCK != 0,
            cell,
            double_height,
            fonts: [
                font_offset(fonts & 3 | fonts >> 2 & 4),
                font_offset(fonts >> 2 & 3 | fonts >> 3 & 4),
            ],
            colors: self.colors(),
            line_graphics: attribute_mode & attribute::LINE_GRAPHICS != 0,
            blink: attribute_mode & attribute::BLINK != 0,
            underline: u32::from(self.crtc[crtc::UNDERLINE] & 0x1f),
            split,
            place: self.text_place(),
        }
    }

    fn text_place(&self) -> TextPlace {
        let (first, last) = (self.crtc[crtc::CURSOR_START], self.crtc[crtc::CURSOR_END] & 0x1f);
        let shown = first & 0x20 == 0 && first & 0x1f <= last;
        TextPlace {
            start: self.crtc16(crtc::START_HIGH),
            pitch: u32::from(self.crtc[crtc::OFFSET]) * 2,
            cursor: shown.then(|| (self.crtc16(crtc::CURSOR_HIGH), first & 0x1f, last)),
        }
    }

    fn planes_mode(&self) -> Planes {
        let mode = self.graphics[graphics::MODE];
        let double =
            1 + u32::from(self.sequencer[sequencer::CLOCKING] & sequencer::HALF_CLOCK != 0);
        let (shift, repeat) = if mode & graphics::PACKED != 0 {
            (Shift::Packed, 2 * double)
        } else if mode & graphics::INTERLEAVED != 0 {
            (Shift::Interleaved, double)
        } else {
            (Shift::Planar, double)
        };
        let scan = self.crtc[crtc::MAX_SCAN];
        let crtc_mode = self.crtc[crtc::MODE];
        // Bit 13 or 14 of a byte address; of the address of a word, one less.
        let byte_mode = u32::from(crtc_mode >> 6 & 1);
        let preset = self.crtc[crtc::PRESET_SCAN];
        let colors = self.colors();
        Planes {
            width: (u32::from(self.crtc[crtc::DISPLAY_END_H]) + 1) * 8 * double,
            height: self.lines(),
            shift,
            repeat,
            double_scan: scan & 0x80 != 0,
            max_scan: u32::from(scan & 0x1f),
            preset: u32::from(preset & 0x1f),
            start: self.crtc16(crtc::START_HIGH) + u32::from(preset >> 5 & 3),
            pitch: u32::from(self.crtc[crtc::OFFSET]) * 2,
            replaced: [
                (crtc_mode & 1 == 0).then_some(12 + byte_mode),
                (crtc_mode & 2 == 0).then_some(13),
            ],
            panning: u32::from(self.attribute[attribute::PANNING] & 7),
            panning_ends: self.attribute[attribute::MODE] & attribute::PANNING_ENDS != 0,
            line_compare: self.line_compare(),
            wrap: PLANE_MASK,
            palette: match shift {
                Shift::Packed => self.colors256(),
                _ => Box::new(std::array::from_fn(|i| colors[i & 15])),
            },
        }
    }

    fn vbe_planes(&self, shown: &Geometry) -> Planes {
        let colors = self.colors();
        let pitch = (shown.stride() / 4) as u32;
        Planes {
            width: shown.width,
            height: shown.height,
            shift: Shift::Planar,
            repeat: 1,
            double_scan: false,
            max_scan: 0,
            preset: 0,
            start: shown.y * pitch + shown.x / 8,
            pitch,
            replaced: [None; 2],
            panning: shown.x % 8,
            panning_ends: false,
            line_compare: u32::MAX,
            wrap: u32::MAX >> 2,
            palette: Box::new(std::array::from_fn(|i| colors[i & 15])),
        }
    }

    fn linear(&self, shown: &Geometry) -> Linear {
        let format = match shown.bits {
            15 => Format::Rgb555,
            16 => Format::Rgb565,
            24 => Format::Bgr24,
            32 => Format::Bgrx32,
            _ => Format::Palette(self.colors256()),
        };
        let stride = shown.stride();
        Linear {
            width: shown.width,
            height: shown.height,
            start: u64::from(shown.y) * stride + u64::from(shown.x) * format.bytes() as u64,
            stride,
            format,
            big_endian: self.big_endian,
        }
    }
}

/// Where font `map` begins in the frame buffer: in plane 2, at these multiples of 8 KiB.
fn font_offset(map: u8) -> u64 {
    const AT: [u64; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    AT[usize::from(map & 7)] * 0x2000 * 4 + 2
}
