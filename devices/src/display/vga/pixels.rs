//! Graphics modes: from the bytes of a line to its pixels.
//!
//! ```text
//!   Planar       plane 0..3 bit 7 | bit 6 | ...          eight pixels of an address, a bit from each plane
//!   Interleaved  planes 0, 2: 7:6 | 5:4 | 3:2 | 1:0, then planes 1, 3
//!   Packed       plane 0 | plane 1 | plane 2 | plane 3   four pixels of an address, a byte each
//! ```

use super::super::paint::Painter;
use super::mode::{Format, Linear, Planes, Shift};
use crate::device_ram::DeviceRam;

/// Bytes of a page, of which the memory knows whether it was written.
const PAGE: u64 = 4096;

/// Which pages of the frame buffer were written.
pub(super) struct Written<'a> {
    pub pages: &'a [u64],
    /// All of them count as such.
    pub all: bool,
}

impl Written<'_> {
    /// Whether one of `bytes` bytes from `offset` on may have changed.
    fn touches(&self, offset: u64, bytes: u64) -> bool {
        if self.all || bytes == 0 {
            return self.all;
        }
        (offset / PAGE..=(offset + bytes - 1) / PAGE).any(|page| {
            let word = self.pages.get((page / 64) as usize).copied().unwrap_or(0);
            word & 1 << (page % 64) != 0
        })
    }
}

/// Draws the lines of a VBE mode that were written.
pub(super) fn draw_linear(
    mode: &Linear,
    vram: &DeviceRam,
    written: &Written<'_>,
    painter: &mut Painter<'_>,
) {
    let len = mode.width as usize * mode.format.bytes();
    let mut bytes = vec![0; len];
    let mut pixels = vec![0; mode.width as usize];
    for y in 0..mode.height {
        let offset = mode.start + u64::from(y) * mode.stride;
        if !written.touches(offset, len as u64) {
            continue;
        }
        vram.read_at(offset, &mut bytes);
        mode.convert(&bytes, &mut pixels);
        painter.row(0, y, &pixels);
    }
}

impl Linear {
    /// The pixels of a line's bytes.
    fn convert(&self, bytes: &[u8], pixels: &mut [u32]) {
        let word = |bytes: &[u8]| match self.big_endian {
            true => u16::from_be_bytes([bytes[0], bytes[1]]),
            false => u16::from_le_bytes([bytes[0], bytes[1]]),
        };
        let each = bytes.chunks_exact(self.format.bytes()).zip(pixels);
        match &self.format {
            Format::Palette(palette) => {
                each.for_each(|(b, pixel)| *pixel = palette[usize::from(b[0])]);
            }
            Format::Rgb555 => each.for_each(|(b, pixel)| {
                let value = u32::from(word(b));
                *pixel = five(value >> 10) << 16 | five(value >> 5) << 8 | five(value);
            }),
            Format::Rgb565 => each.for_each(|(b, pixel)| {
                let value = u32::from(word(b));
                let green = value >> 5 & 63;
                *pixel = five(value >> 11) << 16 | (green << 2 | green >> 4) << 8 | five(value);
            }),
            Format::Bgr24 => each.for_each(|(b, pixel)| {
                *pixel = u32::from_le_bytes([b[0], b[1], b[2], 0]);
            }),
            Format::Bgrx32 if self.big_endian => each.for_each(|(b, pixel)| {
                *pixel = u32::from_be_bytes([0, b[1], b[2], b[3]]);
            }),
            Format::Bgrx32 => each.for_each(|(b, pixel)| {
                *pixel = u32::from_le_bytes([b[0], b[1], b[2], 0]);
            }),
        }
    }
}

/// The low five bits, as eight.
fn five(value: u32) -> u32 {
    let value = value & 31;
    value << 3 | value >> 2
}

/// Draws the lines of a mode with planes that were written.
pub(super) fn draw_planes(
    mode: &Planes,
    vram: &DeviceRam,
    written: &Written<'_>,
    painter: &mut Painter<'_>,
) {
    let source_pixels = mode.width.div_ceil(mode.repeat);
    let for_address = if mode.shift == Shift::Packed { 4 } else { 8 };
    // One address more, for what panning shifts in.
    let addresses = source_pixels.div_ceil(for_address) + 1;
    let mut bytes = vec![0; addresses as usize * 4];
    let mut source = vec![0; (addresses * for_address) as usize];
    let mut pixels = vec![0; mode.width as usize];
    for y in 0..mode.height {
        let (address, panning) = mode.line(y);
        if !mode.touched(address, addresses, written) {
            continue;
        }
        mode.read(vram, address, &mut bytes);
        mode.shift_out(&bytes, &mut source);
        let source = source.iter().skip(panning as usize);
        for (group, color) in pixels.chunks_mut(mode.repeat as usize).zip(source) {
            group.fill(*color);
        }
        painter.row(0, y, &pixels);
    }
}

impl Planes {
    /// The address where line `y` begins, and how many pixels of it are shifted out.
    fn line(&self, y: u32) -> (u32, u32) {
        let below = y > self.line_compare;
        let (start, scan) = match below {
            true => (0, (y - self.line_compare - 1) >> u32::from(self.double_scan)),
            false => (self.start, (y >> u32::from(self.double_scan)) + self.preset),
        };
        let (row, line) = (scan / (self.max_scan + 1), scan % (self.max_scan + 1));
        let mut address = start.wrapping_add(row.wrapping_mul(self.pitch));
        for (bit, replaced) in self.replaced.iter().enumerate() {
            if let Some(at) = replaced {
                address = address & !(1 << at) | (line >> bit & 1) << at;
            }
        }
        let panning = match self.shift {
            _ if below && self.panning_ends => 0,
            Shift::Packed => self.panning / 2,
            _ => self.panning,
        };
        (address & self.wrap, panning)
    }

    /// Where `addresses` addresses from `address` on are in the frame buffer: all, or up to the end of the planes and
    /// the rest from 0 on.
    fn pieces(&self, address: u32, addresses: u32) -> [(u64, u64); 2] {
        let end = u64::from(self.wrap) + 1;
        let first = u64::from(addresses).min(end - u64::from(address));
        [(u64::from(address) * 4, first * 4), (0, (u64::from(addresses) - first) * 4)]
    }

    fn touched(&self, address: u32, addresses: u32, written: &Written<'_>) -> bool {
        let pieces = self.pieces(address, addresses);
        pieces.into_iter().any(|(offset, bytes)| written.touches(offset, bytes))
    }

    fn read(&self, vram: &DeviceRam, address: u32, bytes: &mut [u8]) {
        let [(offset, first), (rest, _)] = self.pieces(address, bytes.len() as u32 / 4);
        let (head, tail) = bytes.split_at_mut(first as usize);
        vram.read_at(offset, head);
        vram.read_at(rest, tail);
    }

    /// The colours of a line's bytes, before they are repeated.
    fn shift_out(&self, bytes: &[u8], pixels: &mut [u32]) {
        match self.shift {
            Shift::Packed => {
                for (byte, pixel) in bytes.iter().zip(pixels) {
                    *pixel = self.palette[usize::from(*byte)];
                }
            }
            Shift::Planar => {
                for (planes, pixels) in bytes.chunks_exact(4).zip(pixels.chunks_exact_mut(8)) {
                    for (i, pixel) in pixels.iter_mut().enumerate() {
                        let bit = |plane: usize| usize::from(planes[plane] >> (7 - i) & 1) << plane;
                        *pixel = self.palette[bit(0) | bit(1) | bit(2) | bit(3)];
                    }
                }
            }
            Shift::Interleaved => {
                for (planes, pixels) in bytes.chunks_exact(4).zip(pixels.chunks_exact_mut(8)) {
                    for (i, pixel) in pixels.iter_mut().enumerate() {
                        let two =
                            |plane: usize| usize::from(planes[plane] >> (6 - 2 * (i % 4)) & 3);
                        *pixel = self.palette[two(i / 4) | two(i / 4 + 2) << 2];
                    }
                }
            }
        }
    }
}
