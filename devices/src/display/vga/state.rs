//! The registers of a VGA, as they are and as they are saved.

use serde::{Deserialize, Serialize};

use super::dispi::Dispi;

/// Numbers of the registers that other parts use.
pub(super) mod sequencer {
    pub const CLOCKING: usize = 1;
    pub const MAP_MASK: usize = 2;
    pub const FONTS: usize = 3;
    pub const MEMORY_MODE: usize = 4;
    /// Clocking: characters are 8 dots wide, not 9; dots are doubled; the screen is off.
    pub const EIGHT_DOTS: u8 = 1 << 0;
    pub const HALF_CLOCK: u8 = 1 << 3;
    pub const SCREEN_OFF: u8 = 1 << 5;
    /// Memory mode: the two low address bits choose the plane.
    pub const CHAIN_4: u8 = 1 << 3;
}

/// CRT controller.
pub(super) mod crtc {
    pub const DISPLAY_END_H: usize = 0x01;
    pub const OVERFLOW: usize = 0x07;
    pub const PRESET_SCAN: usize = 0x08;
    pub const MAX_SCAN: usize = 0x09;
    pub const CURSOR_START: usize = 0x0a;
    pub const CURSOR_END: usize = 0x0b;
    pub const START_HIGH: usize = 0x0c;
    pub const CURSOR_HIGH: usize = 0x0e;
    pub const V_SYNC_END: usize = 0x11;
    pub const DISPLAY_END_V: usize = 0x12;
    pub const OFFSET: usize = 0x13;
    pub const UNDERLINE: usize = 0x14;
    pub const MODE: usize = 0x17;
    pub const LINE_COMPARE: usize = 0x18;
    /// Registers of the CRT controller.
    pub const COUNT: usize = 0x19;
}

/// Graphics controller.
pub(super) mod graphics {
    pub const SET_RESET: usize = 0;
    pub const ENABLE_SET_RESET: usize = 1;
    pub const COLOR_COMPARE: usize = 2;
    pub const ROTATE: usize = 3;
    pub const READ_MAP: usize = 4;
    pub const MODE: usize = 5;
    pub const MISC: usize = 6;
    pub const COLOR_CARE: usize = 7;
    pub const BIT_MASK: usize = 8;
    /// Mode: compare colours on reads; even and odd addresses are in different planes; shifting as CGA; 256 colours.
    pub const READ_COMPARE: u8 = 1 << 3;
    pub const ODD_EVEN: u8 = 1 << 4;
    pub const INTERLEAVED: u8 = 1 << 5;
    pub const PACKED: u8 = 1 << 6;
    /// Miscellaneous: graphics, not text.
    pub const IS_GRAPHICS: u8 = 1 << 0;
}

/// Attribute controller.
pub(super) mod attribute {
    pub const MODE: usize = 0x10;
    pub const PLANES: usize = 0x12;
    pub const PANNING: usize = 0x13;
    pub const COLOR_SELECT: usize = 0x14;
    /// Registers of the attribute controller.
    pub const COUNT: usize = 0x15;
    /// Index register: the palette goes to the screen, not to the CPU.
    pub const SCREEN: u8 = 1 << 5;
    /// Mode: the ninth dot of line graphics; attribute bit 7 blinks; panning ends at the split; bits 4 and 5 of
    /// colours come from the colour select register.
    pub const LINE_GRAPHICS: u8 = 1 << 2;
    pub const BLINK: u8 = 1 << 3;
    pub const PANNING_ENDS: u8 = 1 << 5;
    pub const SELECT_54: u8 = 1 << 7;
}

/// Miscellaneous output: CRT controller at 3Dx, not 3Bx; the CPU reaches the memory.
pub(super) const MISC_COLOR: u8 = 1 << 0;
pub(super) const MISC_MEMORY: u8 = 1 << 1;

/// Colours of the DAC, each three bytes.
pub(super) const DAC_BYTES: usize = 256 * 3;

/// What is saved of a VGA's registers. Its frame buffer is memory, and saved as such.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VgaState {
    /// Miscellaneous output (3C2).
    pub misc: u8,
    /// Feature control (3DA).
    pub feature: u8,
    /// Video subsystem enable (3C3).
    pub enable: u8,
    /// Sequencer (3C4): chosen register, and all of them.
    pub sequencer_index: u8,
    /// See [`VgaState::sequencer_index`].
    pub sequencer: [u8; 8],
    /// CRT controller (3D4): chosen register, and all of them.
    pub crtc_index: u8,
    /// See [`VgaState::crtc_index`].
    pub crtc: [u8; crtc::COUNT],
    /// Graphics controller (3CE): chosen register, and all of them.
    pub graphics_index: u8,
    /// See [`VgaState::graphics_index`].
    pub graphics: [u8; 16],
    /// Attribute controller (3C0): chosen register with the screen's bit, and all of them.
    pub attribute_index: u8,
    /// See [`VgaState::attribute_index`].
    pub attribute: [u8; attribute::COUNT],
    /// The next write to 3C0 is data.
    pub attribute_data: bool,
    /// DAC: colour that the next reads are of.
    pub dac_read: u8,
    /// DAC: colour that the next writes are of.
    pub dac_write: u8,
    /// DAC: 3 when reading, 0 when writing (3C7).
    pub dac_mode: u8,
    /// DAC: which of the three components comes next.
    pub dac_step: u8,
    /// DAC: components written before the last one.
    pub dac_pending: [u8; 2],
    /// DAC: 256 times red, green, blue.
    pub dac: Vec<u8>,
    /// DAC: pixels are masked with this (3C6).
    pub dac_mask: u8,
    /// The four planes' bytes at the last read.
    pub latch: u32,
    /// Bochs VBE.
    pub dispi: Dispi,
    /// Pixels of the frame buffer are big-endian.
    pub big_endian: bool,
}

impl Default for VgaState {
    /// As after power-on: nothing is shown until somebody sets a mode.
    fn default() -> Self {
        Self {
            misc: 0,
            feature: 0,
            enable: 1,
            sequencer_index: 0,
            sequencer: [0; 8],
            crtc_index: 0,
            crtc: [0; crtc::COUNT],
            graphics_index: 0,
            graphics: [0; 16],
            attribute_index: 0,
            attribute: [0; attribute::COUNT],
            attribute_data: false,
            dac_read: 0,
            dac_write: 0,
            dac_mode: 0,
            dac_step: 0,
            dac_pending: [0; 2],
            dac: vec![0; DAC_BYTES],
            dac_mask: 0xff,
            latch: 0,
            dispi: Dispi::default(),
            big_endian: false,
        }
    }
}

impl VgaState {
    /// Makes what was read from a file safe to index with.
    pub(super) fn sanitize(&mut self) {
        self.sequencer_index &= 7;
        self.graphics_index &= 15;
        self.attribute_index &= 0x3f;
        self.dac_step %= 3;
        self.dac.resize(DAC_BYTES, 0);
        self.dispi.sanitize();
    }
}
