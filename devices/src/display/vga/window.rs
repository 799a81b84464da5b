//! The memory at A0000..BFFFF: what a store there does to the four planes, and what a load gives.
//!
//! ```text
//!   graphics 6, bits 3:2   A0000 +-------+ 0  +-------+ 1   .        2   .        3
//!                                |       |    | bank  |     .            .
//!                          B0000 |       |    +-------+     +-------+    .
//!                          B8000 |       |        .         +-------+    +-------+
//!                          C0000 +-------+        .             .        +-------+
//!
//!   address a        chained: byte a         odd/even: byte a & 1 of cell a / 2     planar: byte a of all planes
//!   frame buffer     a                       (a & ~1) * 2 + (a & 1)                 a * 4 + plane
//! ```
//!
//! IBM VGA, "Graphics Controller". The planes lie interleaved in the frame buffer, so that the linear frame buffer of
//! a 256-colour mode is what the chained window shows.

use super::state::{MISC_MEMORY, VgaState, graphics, sequencer};
use crate::device_ram::DeviceRam;

/// Bytes from A0000 to C0000.
pub(super) const WINDOW_BYTES: u64 = 128 << 10;
/// Addresses of a plane.
const PLANE: u64 = 64 << 10;

/// How addresses lead to planes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Chained,
    OddEven,
    Planar,
}

/// The bytes of all planes that a set of them has: bit `n` is FFH in byte `n`.
fn expand(planes: u8) -> u32 {
    (0..4).filter(|plane| planes & 1 << plane != 0).fold(0, |all, plane| all | 0xff << (8 * plane))
}

/// The same byte in all planes.
fn spread(value: u8) -> u32 {
    u32::from(value) * 0x0101_0101
}

impl VgaState {
    fn layout(&self) -> Layout {
        if self.sequencer[sequencer::MEMORY_MODE] & sequencer::CHAIN_4 != 0 {
            Layout::Chained
        } else if self.graphics[graphics::MODE] & graphics::ODD_EVEN != 0 {
            Layout::OddEven
        } else {
            Layout::Planar
        }
    }

    /// The address in the window's memory of `len` bytes at `offset` from A0000; `None` if nobody answers there.
    fn locate(&self, offset: u64, len: u64) -> Option<u64> {
        if self.misc & MISC_MEMORY == 0 {
            return None;
        }
        let (start, end, base) = match self.graphics[graphics::MISC] >> 2 & 3 {
            0 => (0, WINDOW_BYTES, 0),
            1 if self.dispi.enabled() => (0, 0x1_0000, self.dispi.bank_offset()),
            1 => (0, 0x1_0000, 0),
            2 => (0x1_0000, 0x1_8000, 0),
            _ => (0x1_8000, 0x2_0000, 0),
        };
        (offset >= start && offset + len <= end).then(|| offset - start + base)
    }

    /// Where the four planes' bytes of an address are in the frame buffer, and which of them it reaches.
    fn planes(&self, layout: Layout, address: u64) -> (u64, u8) {
        // Without a VBE mode there are 64 KiB in each plane, and addresses go round.
        let wrap = |at: u64| if self.dispi.enabled() { at } else { at & (PLANE * 4 - 1) };
        match layout {
            Layout::Chained => (wrap(address) & !3, 1 << (address & 3)),
            Layout::OddEven => (wrap((address & !1) << 1), 0b0101 << (address & 1)),
            Layout::Planar => (wrap(address << 2), 0b1111),
        }
    }

    /// Whether a store goes to the planes as it is.
    fn is_plain_write(&self) -> bool {
        let gr = &self.graphics;
        gr[graphics::MODE] & 3 == 0
            && gr[graphics::ENABLE_SET_RESET] == 0
            && gr[graphics::ROTATE] == 0
            && gr[graphics::BIT_MASK] == 0xff
    }

    /// What a store of `value` gives in all planes, before the plane mask.
    fn compute(&self, value: u8) -> u32 {
        let gr = &self.graphics;
        let rotated = value.rotate_right(u32::from(gr[graphics::ROTATE] & 7));
        let set = expand(gr[graphics::SET_RESET]);
        let (data, mask) = match gr[graphics::MODE] & 3 {
            0 => {
                let enable = expand(gr[graphics::ENABLE_SET_RESET]);
                (spread(rotated) & !enable | set & enable, gr[graphics::BIT_MASK])
            }
            1 => return self.latch,
            2 => (expand(value & 15), gr[graphics::BIT_MASK]),
            _ => (set, gr[graphics::BIT_MASK] & rotated),
        };
        let data = match gr[graphics::ROTATE] >> 3 & 3 {
            0 => data,
            1 => data & self.latch,
            2 => data | self.latch,
            _ => data ^ self.latch,
        };
        let mask = spread(mask);
        data & mask | self.latch & !mask
    }

    /// A store to the window.
    pub(super) fn write_window(&mut self, vram: &DeviceRam, offset: u64, data: &[u8]) {
        let Some(address) = self.locate(offset, data.len() as u64) else {
            // An access that leaves the window at an end.
            if data.len() > 1 {
                for (at, byte) in (offset..).zip(data.chunks(1)) {
                    self.write_window(vram, at, byte);
                }
            }
            return;
        };
        let layout = self.layout();
        let map_mask = self.sequencer[sequencer::MAP_MASK];
        let plain = self.is_plain_write();
        // What most stores are, at once: 256-colour pixels, and whole cells of text.
        if layout == Layout::Chained && map_mask == 15 && plain {
            vram.write_at(address, data);
            return;
        }
        if layout == Layout::OddEven
            && map_mask == 3
            && plain
            && (address | data.len() as u64) & 1 == 0
        {
            for (cell, at) in data.chunks_exact(2).zip((address..).step_by(2)) {
                vram.write_at(self.planes(layout, at).0, cell);
            }
            return;
        }
        for (address, value) in (address..).zip(data) {
            let (at, reached) = self.planes(layout, address);
            let new = if plain { spread(*value) } else { self.compute(*value) };
            merge(vram, at, expand(map_mask & reached), new);
        }
    }

    /// A load from the window. It fills the latches.
    pub(super) fn read_window(&mut self, vram: &DeviceRam, offset: u64, data: &mut [u8]) {
        let Some(address) = self.locate(offset, data.len() as u64) else {
            match data {
                [byte] => *byte = 0xff,
                _ => {
                    for (at, byte) in (offset..).zip(data.chunks_mut(1)) {
                        self.read_window(vram, at, byte);
                    }
                }
            }
            return;
        };
        let layout = self.layout();
        for (address, byte) in (address..).zip(data) {
            let (at, _) = self.planes(layout, address);
            let mut planes = [0; 4];
            vram.read_at(at, &mut planes);
            self.latch = u32::from_le_bytes(planes);
            let chosen = self.graphics[graphics::READ_MAP];
            *byte = match layout {
                Layout::Chained => planes[(address & 3) as usize],
                _ if self.graphics[graphics::MODE] & graphics::READ_COMPARE != 0 => self.compare(),
                Layout::OddEven => planes[usize::from(chosen & 2 | (address & 1) as u8)],
                Layout::Planar => planes[usize::from(chosen & 3)],
            };
        }
    }

    /// Read mode 1: which of the eight pixels in the latches have the colour that is looked for.
    fn compare(&self) -> u8 {
        let differs = (self.latch ^ expand(self.graphics[graphics::COLOR_COMPARE]))
            & expand(self.graphics[graphics::COLOR_CARE]);
        let [a, b, c, d] = differs.to_le_bytes();
        !(a | b | c | d)
    }
}

/// Stores the bytes of `new` that `mask` has.
fn merge(vram: &DeviceRam, at: u64, mask: u32, new: u32) {
    if mask == 0 || at >= vram.bytes() {
        return;
    }
    let mut old = [0; 4];
    if mask != u32::MAX {
        vram.read_at(at, &mut old);
    }
    let value = u32::from_le_bytes(old) & !mask | new & mask;
    vram.write_at(at, &value.to_le_bytes());
}
