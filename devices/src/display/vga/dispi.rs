//! The Bochs VBE registers: graphics modes beyond those of IBM's VGA (QEMU's "Standard VGA", Bochs' VBE display
//! interface 5).
//!
//! ```text
//!   0 id   1 width   2 height   3 bits   4 enable   5 bank   6 virtual width   7 virtual height   8 x   9 y
//!   A memory in 64 KiB units (read-only)
//!
//!   frame buffer   +--------- virtual width ---------+
//!                  |   (x, y) +--- width ---+        |
//!                  |          | the screen  | height |
//!                  |          +-------------+        |
//!                  +---------------------------------+ virtual height: as many lines as the memory has
//! ```

use serde::{Deserialize, Serialize};

use super::super::{MOST_PIXELS, MOST_SIDE};

mod index {
    pub const ID: u16 = 0;
    pub const WIDTH: u16 = 1;
    pub const HEIGHT: u16 = 2;
    pub const BITS: u16 = 3;
    pub const ENABLE: u16 = 4;
    pub const BANK: u16 = 5;
    pub const VIRTUAL_WIDTH: u16 = 6;
    pub const VIRTUAL_HEIGHT: u16 = 7;
    pub const X: u16 = 8;
    pub const Y: u16 = 9;
    pub const MEMORY: u16 = 0xa;
}
/// How many registers there are.
pub(super) const REGISTERS: u64 = 11;
/// Bits of the enable register.
const ENABLED: u16 = 1 << 0;
const GET_CAPABILITIES: u16 = 1 << 1;
const DAC_8BIT: u16 = 1 << 5;
const NO_CLEAR: u16 = 1 << 7;
/// The interface's versions.
const FIRST_ID: u16 = 0xb0c0;
const LAST_ID: u16 = 0xb0c5;
/// Bytes of a bank.
pub(super) const BANK: u64 = 64 << 10;

/// The registers, as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dispi {
    /// The register that port 1CE chose.
    pub index: u16,
    /// The version that the guest wants.
    pub id: u16,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// Bits of a pixel: 4, 8, 15, 16, 24 or 32.
    pub bits: u16,
    /// Flags.
    pub enable: u16,
    /// The 64 KiB of the frame buffer that the legacy window shows.
    pub bank: u16,
    /// Columns in memory.
    pub virtual_width: u16,
    /// The first column shown.
    pub x: u16,
    /// The first row shown.
    pub y: u16,
}

impl Default for Dispi {
    fn default() -> Self {
        Self {
            index: 0,
            id: LAST_ID,
            width: 0,
            height: 0,
            bits: 8,
            enable: 0,
            bank: 0,
            virtual_width: 0,
            x: 0,
            y: 0,
        }
    }
}

/// What a write to the registers asks of the rest of the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// A mode was set.
    Enabled {
        /// The memory on the screen is to become black.
        clear: bool,
    },
}

/// A mode that fits into the memory, whatever the registers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub width: u32,
    pub height: u32,
    pub virtual_width: u32,
    pub virtual_height: u32,
    pub x: u32,
    pub y: u32,
    pub bits: u32,
}

impl Geometry {
    /// Bytes of a row in memory (four planes together, with 4 bits).
    pub fn stride(&self) -> u64 {
        row_bytes(self.virtual_width, self.bits)
    }
}

/// Bytes of `pixels` pixels in a row.
fn row_bytes(pixels: u32, bits: u32) -> u64 {
    match bits {
        // Four planes of a bit for each pixel.
        4 => u64::from(pixels.div_ceil(8)) * 4,
        _ => u64::from(pixels) * u64::from(bits.div_ceil(8)),
    }
}

impl Dispi {
    /// Makes what was read from a file one of the depths that there are.
    pub(super) fn sanitize(&mut self) {
        if !matches!(self.bits, 4 | 8 | 15 | 16 | 24 | 32) {
            self.bits = 8;
        }
    }

    /// Whether a mode is set.
    pub(super) fn enabled(&self) -> bool {
        self.enable & ENABLED != 0
    }

    /// Whether colours of the DAC have 8 bits for each component, not 6.
    pub(super) fn dac_8bit(&self) -> bool {
        self.enable & DAC_8BIT != 0
    }

    /// Where the legacy window begins in the frame buffer.
    pub(super) fn bank_offset(&self) -> u64 {
        u64::from(self.bank) * BANK
    }

    /// The mode that is set, cut to what `vram` bytes can hold. `None` if there is none, or nothing of it fits.
    pub(super) fn geometry(&self, vram: u64) -> Option<Geometry> {
        let width = u32::from(self.width).min(MOST_SIDE);
        let bits = u32::from(self.bits);
        if !self.enabled() || width == 0 || self.height == 0 || bits == 0 {
            return None;
        }
        let virtual_width = u32::from(self.virtual_width).max(width);
        let lines = vram / row_bytes(virtual_width, bits);
        let virtual_height = u32::try_from(lines).unwrap_or(u32::MAX).min(0xffff);
        let height = u32::from(self.height).min(virtual_height).min(MOST_SIDE);
        let height = height.min(MOST_PIXELS / width);
        if height == 0 {
            return None;
        }
        let y = u32::from(self.y).min(virtual_height - height);
        // Rows may go on in the next one of the memory, but not beyond its end.
        let end = u64::from(y + height) * row_bytes(virtual_width, bits);
        let fits = end + row_bytes(self.x.into(), bits) <= vram;
        let x = if fits { self.x.into() } else { u32::from(self.x).min(virtual_width - width) };
        Some(Geometry { width, height, virtual_width, virtual_height, x, y, bits })
    }

    /// Reads register `index`.
    pub(super) fn read(&self, index: u16, vram: u64) -> u16 {
        let most = self.enable & GET_CAPABILITIES != 0;
        let shown = self.geometry(vram);
        let shown = |pick: fn(&Geometry) -> u32, raw: u16| shown.map_or(raw, |g| pick(&g) as u16);
        match index {
            index::ID => self.id,
            index::WIDTH | index::HEIGHT if most => MOST_SIDE as u16,
            index::BITS if most => 32,
            index::WIDTH => self.width,
            index::HEIGHT => self.height,
            index::BITS => self.bits,
            index::ENABLE => self.enable,
            index::BANK => self.bank,
            index::VIRTUAL_WIDTH => shown(|g| g.virtual_width, self.virtual_width),
            index::VIRTUAL_HEIGHT => shown(|g| g.virtual_height, 0),
            index::X => shown(|g| g.x, self.x),
            index::Y => shown(|g| g.y, self.y),
            index::MEMORY => (vram / BANK).min(0xffff) as u16,
            _ => 0,
        }
    }

    /// Writes register `index`; values that make no sense are not taken.
    pub(super) fn write(&mut self, index: u16, value: u16, vram: u64) -> Effect {
        match index {
            index::ID if (FIRST_ID..=LAST_ID).contains(&value) => self.id = value,
            index::WIDTH if u32::from(value) <= MOST_SIDE => self.width = value,
            index::HEIGHT if u32::from(value) <= MOST_SIDE => self.height = value,
            index::BITS => match value {
                0 => self.bits = 8,
                4 | 8 | 15 | 16 | 24 | 32 => self.bits = value,
                _ => {}
            },
            index::ENABLE => return self.set_enable(value),
            index::BANK if u64::from(value) < vram / BANK => self.bank = value,
            index::VIRTUAL_WIDTH => self.virtual_width = value,
            index::X => self.x = value,
            index::Y => self.y = value,
            _ => {}
        }
        Effect::None
    }

    fn set_enable(&mut self, value: u16) -> Effect {
        let before = std::mem::replace(&mut self.enable, value);
        match (before & ENABLED != 0, value & ENABLED != 0) {
            (false, true) => {
                (self.virtual_width, self.x, self.y) = (self.width, 0, 0);
                Effect::Enabled { clear: value & NO_CLEAR == 0 }
            }
            (true, false) => {
                self.bank = 0;
                Effect::None
            }
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VRAM: u64 = 1 << 20;

    fn mode(width: u16, height: u16, bits: u16) -> Dispi {
        let mut dispi = Dispi::default();
        dispi.write(index::WIDTH, width, VRAM);
        dispi.write(index::HEIGHT, height, VRAM);
        dispi.write(index::BITS, bits, VRAM);
        assert_eq!(dispi.write(index::ENABLE, ENABLED, VRAM), Effect::Enabled { clear: true });
        dispi
    }

    #[test]
    fn modes_fit_the_memory() {
        let dispi = mode(640, 480, 8);
        let shown = dispi.geometry(VRAM).unwrap();
        assert_eq!((shown.width, shown.height, shown.stride()), (640, 480, 640));
        assert_eq!(dispi.read(index::VIRTUAL_HEIGHT, VRAM), 1638);
        // 4 KiB a row: 256 of them.
        assert_eq!(mode(1024, 768, 32).geometry(VRAM).unwrap().height, 256);
        assert_eq!(mode(1024, 768, 4).geometry(VRAM).unwrap().stride(), 512);
        assert_eq!(mode(0, 480, 8).geometry(VRAM), None);
        let mut wide = mode(640, 480, 32);
        wide.write(index::VIRTUAL_WIDTH, 0xffff, VRAM);
        assert_eq!(wide.geometry(VRAM).unwrap().height, 4);
        assert_eq!(wide.read(index::VIRTUAL_WIDTH, VRAM), 0xffff);
    }

    #[test]
    fn the_screen_stays_inside() {
        let mut dispi = mode(640, 480, 8);
        dispi.write(index::VIRTUAL_WIDTH, 800, VRAM);
        dispi.write(index::X, 1000, VRAM);
        dispi.write(index::Y, 60000, VRAM);
        let shown = dispi.geometry(VRAM).unwrap();
        assert_eq!((shown.x, shown.y), (160, 1310 - 480));
        assert_eq!(dispi.read(index::X, VRAM), 160);
        dispi.write(index::Y, 0, VRAM);
        assert_eq!(dispi.read(index::X, VRAM), 1000, "into the next rows");
        dispi.write(index::VIRTUAL_WIDTH, 100, VRAM);
        assert_eq!(dispi.read(index::VIRTUAL_WIDTH, VRAM), 640, "never less than the width");
    }

    #[test]
    fn registers_take_what_makes_sense() {
        let mut dispi = Dispi::default();
        for id in [0xb0c0, 0xb0c4, 0xb0c5] {
            dispi.write(index::ID, id, VRAM);
            assert_eq!(dispi.read(index::ID, VRAM), id);
        }
        dispi.write(index::ID, 0x1234, VRAM);
        dispi.write(index::BITS, 17, VRAM);
        dispi.write(index::WIDTH, 0xffff, VRAM);
        dispi.write(index::BANK, 16, VRAM);
        assert_eq!(dispi, Dispi::default());
        dispi.write(index::BANK, 15, VRAM);
        assert_eq!(dispi.bank_offset(), 15 << 16);
        assert_eq!(dispi.read(index::MEMORY, VRAM), 16);
        dispi.write(index::ENABLE, GET_CAPABILITIES, VRAM);
        assert_eq!([1, 2, 3].map(|i| dispi.read(i, VRAM)), [8192, 8192, 32]);
        let effect = dispi.write(index::ENABLE, ENABLED | NO_CLEAR, VRAM);
        assert_eq!(effect, Effect::Enabled { clear: false });
        assert_eq!(dispi.write(index::ENABLE, ENABLED | DAC_8BIT, VRAM), Effect::None);
        assert!(dispi.dac_8bit());
        dispi.write(index::ENABLE, 0, VRAM);
        assert_eq!(dispi.bank_offset(), 0);
    }
}
