//! A guest's view: modes are set and drawn through ports, the window and the frame buffer, and looked at.

use std::sync::Arc;

use lodge_memory::Bus;

use super::*;
use crate::bus::SystemBus;
use crate::device_ram::{Access, DeviceRam};
use crate::display::{Picture, Rect, Screen, Update};
use crate::irq::Lines;
use crate::pci::{Bdf, Function, Root, Slot, Windows};
use crate::test_vm::TestVm;

const VRAM: u64 = 4 << 20;
/// Where BAR 0 and BAR 2 are put.
const LFB: u64 = 0xd000_0000;
const MMIO: u64 = 0xd100_0000;
const CURSOR_OFF: u64 = 267;

/// Miscellaneous output, sequencer, CRT controller, graphics controller and attribute controller of a mode, as IBM's
/// BIOS sets them.
struct Preset {
    misc: u8,
    sequencer: [u8; 5],
    crtc: [u8; 25],
    graphics: [u8; 9],
    attribute: [u8; 20],
}

const TEXT_80X25: Preset = Preset {
    misc: 0x67,
    sequencer: [3, 0, 3, 0, 2],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0, 0x4f, 0x0d, 0x0e, 0, 0, 0, 0, 0x9c,
        0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x10, 0x0e, 0, 0xff],
    attribute: [
        0, 1, 2, 3, 4, 5, 0x14, 7, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c, 0, 0x0f, 8,
    ],
};

const PLANAR_640X480: Preset = Preset {
    misc: 0xe3,
    sequencer: [3, 1, 0x0f, 0, 6],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0x0b, 0x3e, 0, 0x40, 0, 0, 0, 0, 0, 0, 0xea, 0x8c,
        0xdf, 0x28, 0, 0xe7, 0x04, 0xe3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0, 5, 0x0f, 0xff],
    attribute: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1, 0, 0x0f, 0],
};

const PACKED_320X200: Preset = Preset {
    misc: 0x63,
    sequencer: [3, 1, 0x0f, 0, 0x0e],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0, 0x41, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e,
        0x8f, 0x28, 0x40, 0x96, 0xb9, 0xa3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x40, 5, 0x0f, 0xff],
    attribute: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x41, 0, 0x0f, 0],
};

const CGA_320X200: Preset = Preset {
    misc: 0x63,
    sequencer: [3, 9, 3, 0, 2],
    crtc: [
        0x2d, 0x27, 0x28, 0x90, 0x2b, 0x80, 0xbf, 0x1f, 0, 0xc1, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e,
        0x8f, 0x14, 0, 0x96, 0xb9, 0xa2, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x30, 0x0f, 0, 0xff],
    attribute: [0, 3, 5, 7, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1, 0, 3, 0],
};

const CGA_640X200: Preset = Preset {
    sequencer: [3, 1, 1, 0, 6],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0, 0xc1, 0, 0, 0, 0, 0, 0, 0x9c, 0x8e,
        0x8f, 0x28, 0, 0x96, 0xb9, 0xc2, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0, 0x0d, 0, 0xff],
    attribute: [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 1, 0, 1, 0],
    ..CGA_320X200
};

/// A machine with a card, and a picture of its screen.
struct Rig {
    bus: Arc<SystemBus>,
    root: Arc<Root>,
    vga: Arc<Vga>,
    at: Bdf,
    vm: Arc<TestVm>,
    picture: Picture,
}

impl Rig {
    fn new() -> Self {
        let vm = Arc::new(TestVm::new(false));
        let bus = Arc::new(SystemBus::default());
        let root = Root::new(&bus, Lines::new(vm.clone()), Windows::new(1 << 30, 40)).unwrap();
        let ram = DeviceRam::new(vm.clone(), 0, VRAM, Access::ReadWrite).unwrap();
        let vga = Vga::new(ram, vec![0x55, 0xaa, 1], &CardConfig::default()).unwrap();
        let at = root.add(Slot::FirstFree, vga.clone()).unwrap();
        for (register, value) in [(0x10, LFB as u32), (0x18, MMIO as u32), (4, 3)] {
            root.config_write(at, register, &value.to_le_bytes());
        }
        Self { bus, root, vga, at, vm, picture: Picture::default() }
    }

    fn out(&self, port: u16, value: u8) {
        self.bus.pio_write(port, &[value]);
    }

    fn input(&self, port: u16) -> u8 {
        let mut data = [0];
        self.bus.pio_read(port, &mut data);
        data[0]
    }

    /// Index and data with one access.
    fn indexed(&self, port: u16, index: u8, value: u8) {
        self.bus.pio_write(port, &[index, value]);
    }

    fn vbe(&self, index: u16, value: u16) {
        self.bus.pio_write(0x1ce, &index.to_le_bytes());
        self.bus.pio_write(0x1cf, &value.to_le_bytes());
    }

    fn vbe_mode(&self, width: u16, height: u16, bits: u16) {
        self.attribute(0x20, None);
        self.vbe(4, 0);
        for (index, value) in [(1, width), (2, height), (3, bits), (4, 0x41)] {
            self.vbe(index, value);
        }
    }

    fn attribute(&self, index: u8, value: Option<u8>) {
        self.input(0x3da);
        self.input(0x3ba);
        self.out(0x3c0, index);
        if let Some(value) = value {
            self.out(0x3c0, value);
        }
    }

    fn color(&self, index: u8, rgb: [u8; 3]) {
        self.out(0x3c8, index);
        rgb.iter().for_each(|value| self.out(0x3c9, *value));
    }

    /// Sets a mode, with grey for colour `n`: `4 * n` (of 6 bits: `n` modulo 64).
    fn preset(&self, preset: &Preset) {
        self.out(0x3c2, preset.misc);
        let numbered = |values: &[u8], port| {
            (0..).zip(values).for_each(|(index, value)| self.indexed(port, index, *value));
        };
        numbered(&preset.sequencer, 0x3c4);
        self.indexed(0x3d4, 0x11, 0);
        numbered(&preset.crtc, 0x3d4);
        numbered(&preset.graphics, 0x3ce);
        for (index, value) in (0..).zip(&preset.attribute) {
            self.attribute(index, Some(*value));
        }
        self.attribute(0x14, Some(0));
        self.attribute(0x20, None);
        (0..=255).for_each(|index| self.color(index, [index & 63; 3]));
    }

    fn write(&self, gpa: u64, data: &[u8]) {
        for (at, data) in (gpa..).step_by(4).zip(data.chunks(4)) {
            self.bus.mmio_write(at, data);
        }
    }

    fn read(&self, gpa: u64) -> u8 {
        let mut data = [0];
        self.bus.mmio_read(gpa, &mut data);
        data[0]
    }

    /// Loads a glyph into font 0 as a BIOS does, with plane 2 alone at A0000.
    fn glyph(&self, character: u8, lines: &[u8]) {
        self.indexed(0x3c4, 2, 4);
        self.indexed(0x3c4, 4, 7);
        self.indexed(0x3ce, 4, 2);
        self.indexed(0x3ce, 5, 0);
        self.indexed(0x3ce, 6, 4);
        for (at, line) in (0xa0000 + 32 * u64::from(character)..).zip(lines) {
            self.write(at, &[*line]);
        }
        self.indexed(0x3c4, 2, 3);
        self.indexed(0x3c4, 4, 2);
        self.indexed(0x3ce, 4, 0);
        self.indexed(0x3ce, 5, 0x10);
        self.indexed(0x3ce, 6, 0x0e);
    }

    /// Draws, at a moment when what blinks is to be seen.
    fn refresh(&mut self) -> Update {
        self.refresh_at(0)
    }

    fn refresh_at(&mut self, ms: u64) -> Update {
        self.vga.card().refresh_then(&mut self.picture, ms)
    }

    fn pixel(&self, x: u32, y: u32) -> u32 {
        self.picture.pixels[(y * self.picture.width + x) as usize]
    }

    fn row(&self, y: u32, count: u32) -> Vec<u32> {
        (0..count).map(|x| self.pixel(x, y)).collect()
    }

    fn size(&self) -> (u32, u32) {
        (self.picture.width, self.picture.height)
    }
}

/// Grey of DAC value `n`.
fn grey(n: u32) -> u32 {
    (n << 2 | n >> 4) * 0x01_0101
}

/// A glyph that is different for each character and line.
fn test_glyph(character: u8) -> [u8; 16] {
    std::array::from_fn(|line| character.wrapping_mul(7) ^ (line as u8).wrapping_mul(0x1d) | 1)
}

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect { x, y, width, height }
}

fn text_rig() -> Rig {
    let rig = Rig::new();
    rig.preset(&TEXT_80X25);
    rig.indexed(0x3d4, 0x0a, 0x20); // no cursor
    for character in 0..=255 {
        rig.glyph(character, &test_glyph(character));
    }
    rig
}

/// Checks a character's 9 by 16 pixels.
fn assert_glyph(rig: &Rig, (column, row): (u32, u32), character: u8, fg: u32, bg: u32) {
    for (line, bits) in (0..).zip(test_glyph(character)) {
        for dot in 0..9u32 {
            let set = match dot {
                8 => (0xc0..=0xdf).contains(&character) && bits & 1 != 0,
                _ => bits & 0x80 >> dot != 0,
            };
            let expected = if set { fg } else { bg };
            let (x, y) = (column * 9 + dot, row * 16 + line);
            assert_eq!(rig.pixel(x, y), expected, "{character:#x} at {column},{row}: {dot},{line}");
        }
    }
}

#[test]
fn hello_has_the_pixels_of_its_glyphs() {
    let mut rig = text_rig();
    let update = rig.refresh();
    assert_eq!((rig.size(), update.resized), ((720, 400), true));
    assert_eq!(update.dirty, [rect(0, 0, 720, 400)]);
    assert_eq!(rig.refresh().dirty, []);
    for (at, character) in (0xb8000 + 160 + 20..).step_by(2).zip(*b"Hello\xc4\xe0") {
        rig.write(at, &[character, 0x1e]);
    }
    let update = rig.refresh();
    assert_eq!((update.resized, update.dirty), (false, vec![rect(90, 16, 63, 16)]));
    for (column, character) in (10..).zip(*b"Hello\xc4\xe0") {
        // Attribute 1E: colour 14 is DAC 3E, colour 1 is DAC 1.
        assert_glyph(&rig, (column, 1), character, grey(0x3e), grey(1));
    }
    // The same text again is no change; another glyph is one wherever it is used.
    rig.write(0xb8000 + 180, b"H");
    assert_eq!(rig.refresh().dirty, []);
    rig.write(0xb8000, b"H\x1e");
    rig.glyph(b'H', &[0xff; 16]);
    assert_eq!(rig.refresh().dirty, [rect(0, 0, 9, 16), rect(90, 16, 9, 16)]);
    assert_eq!(rig.row(0, 9), [&[grey(0x3e); 8][..], &[grey(1)]].concat());
    // What was written can be read.
    assert_eq!((rig.read(0xb8000), rig.read(0xb8001)), (b'H', 0x1e));
}

#[test]
fn cells_are_written_in_every_size() {
    let mut rig = text_rig();
    rig.bus.mmio_write(0xb8000, &[b'a', 0x07, b'b', 0x07, b'c', 0x07, b'd', 0x07]);
    rig.bus.mmio_write(0xb8009, &[0x70, b'f']);
    rig.bus.mmio_write(0xb8008, b"e");
    rig.refresh();
    for (column, character) in (0..4).zip(*b"abcd") {
        assert_glyph(&rig, (column, 0), character, grey(7), grey(0));
    }
    assert_glyph(&rig, (4, 0), b'e', grey(0), grey(7));
    let mut data = [0; 8];
    rig.bus.mmio_read(0xb8003, &mut data);
    assert_eq!(data, [7, b'c', 7, b'd', 7, b'e', 0x70, b'f']);
}

#[test]
fn the_cursor_and_the_start_move() {
    let mut rig = text_rig();
    rig.write(0xb8000, b"A\x07B\x07");
    rig.refresh();
    for (index, value) in [(0x0a, 14), (0x0b, 15), (0x0e, 0), (0x0f, 1)] {
        rig.indexed(0x3d4, index, value);
    }
    assert_eq!(rig.refresh().dirty, [rect(9, 0, 9, 16)]);
    assert_eq!(rig.row(14, 18)[9..], [grey(7); 9]);
    assert_ne!(rig.row(13, 18)[9..], [grey(7); 9]);
    assert_eq!(rig.refresh_at(CURSOR_OFF).dirty, [rect(9, 0, 9, 16)]);
    assert_glyph(&rig, (1, 0), b'B', grey(7), grey(0));
    // One row further in memory: all that is different is drawn.
    rig.indexed(0x3d4, 0x0d, 80);
    rig.write(0xb8000 + 160, b"C\x07");
    rig.refresh_at(CURSOR_OFF);
    assert_glyph(&rig, (0, 0), b'C', grey(7), grey(0));
}

#[test]
fn a_split_begins_at_address_0() {
    let mut rig = text_rig();
    rig.write(0xb8000, b"A\x07");
    rig.indexed(0x3d4, 0x0c, 8);
    rig.indexed(0x3d4, 9, 0x0f); // bit 9 of line compare
    rig.indexed(0x3d4, 7, 0x1f); // bit 8
    rig.indexed(0x3d4, 0x18, 0x3f); // 13FH: the row that begins at line 320
    rig.refresh();
    assert_glyph(&rig, (0, 20), b'A', grey(7), grey(0));
    assert_eq!(rig.pixel(0, 0), 0);
}

#[test]
fn attributes_blink_or_are_bright() {
    let mut rig = text_rig();
    rig.write(0xb8000, b"A\x97");
    rig.refresh();
    assert_glyph(&rig, (0, 0), b'A', grey(7), grey(1));
    assert_eq!(rig.refresh_at(2 * CURSOR_OFF).dirty, [rect(0, 0, 9, 16)]);
    assert!((0..16).all(|y| rig.row(y, 9) == [grey(1); 9]), "the character is gone");
    rig.attribute(0x10, Some(4));
    rig.attribute(0x20, None);
    rig.refresh_at(2 * CURSOR_OFF);
    assert_glyph(&rig, (0, 0), b'A', grey(7), grey(0x39));
}

#[test]
fn other_text_sizes() {
    let mut rig = text_rig();
    rig.write(0xb8000, b"A\x07");
    // 80x50: cells of 8 lines.
    rig.indexed(0x3d4, 9, 0x47);
    rig.refresh();
    assert_eq!((rig.size(), rig.pixel(0, 8)), ((720, 400), 0));
    // 8 dots.
    rig.indexed(0x3c4, 1, 1);
    rig.refresh();
    assert_eq!(rig.size(), (640, 400));
    // 40 columns of doubled dots.
    rig.indexed(0x3c4, 1, 9);
    rig.indexed(0x3d4, 0x11, 0x0e);
    rig.indexed(0x3d4, 1, 39);
    let update = rig.refresh();
    assert_eq!((rig.size(), update.resized), ((640, 400), false));
    let bits = test_glyph(b'A')[0];
    let dots: Vec<u32> =
        (0..16).map(|x| if bits & 0x80 >> (x / 2) != 0 { grey(7) } else { 0 }).collect();
    assert_eq!(rig.row(0, 16), dots);
    // Two fonts: attribute bit 3 chooses.
    rig.indexed(0x3c4, 3, 0x04);
    rig.write(0xb8000, b"A\x0f");
    rig.refresh();
    assert_eq!(rig.row(0, 16), [0; 16], "there is no font in the second place");
}

#[test]
fn a_screen_of_text_scrolls() {
    let mut rig = text_rig();
    let line = |n: u64| [b'0' + (n % 10) as u8, 7].repeat(80);
    for n in 0..25 {
        rig.write(0xb8000 + 160 * n, &line(n));
    }
    rig.refresh();
    for at in (0..160 * 24).step_by(2) {
        let mut cell = [0; 2];
        rig.bus.mmio_read(0xb8000 + 160 + at, &mut cell);
        rig.bus.mmio_write(0xb8000 + at, &cell);
    }
    rig.refresh();
    for row in 0..24 {
        assert_glyph(&rig, (79, row), b'0' + ((row + 1) % 10) as u8, grey(7), 0);
    }
}

#[test]
fn chained_256_colors() {
    let mut rig = Rig::new();
    rig.preset(&PACKED_320X200);
    rig.color(5, [63, 0, 21]);
    rig.write(0xa0000 + 320 * 3, &[0, 1, 5, 255]);
    rig.refresh();
    assert_eq!(rig.size(), (640, 400));
    let expected = [0, 0, grey(1), grey(1), 0xff0055, 0xff0055, grey(63), grey(63), 0];
    assert_eq!(rig.row(6, 9), expected);
    assert_eq!(rig.row(7, 9), expected, "each line twice");
    assert_eq!((rig.pixel(2, 5), rig.pixel(2, 8)), (0, 0));
    // A pixel more is drawn where it is.
    rig.write(0xa0000 + 320 * 199 + 319, &[7]);
    assert_eq!(rig.refresh().dirty, [rect(638, 398, 2, 2)]);
    // The pixel mask, and 8-bit colours.
    rig.out(0x3c6, 0x04);
    rig.refresh();
    assert_eq!(rig.row(6, 8), [0, 0, 0, 0, grey(4), grey(4), grey(4), grey(4)]);
    // The frame buffer shows the same bytes.
    assert_eq!(rig.read(LFB + 320 * 3 + 2), 5);
}

#[test]
fn unchained_256_colors() {
    let mut rig = Rig::new();
    rig.preset(&PACKED_320X200);
    rig.indexed(0x3c4, 4, 6);
    rig.indexed(0x3d4, 0x14, 0);
    rig.indexed(0x3d4, 0x17, 0xe3);
    for plane in 0..4 {
        rig.indexed(0x3c4, 2, 1 << plane);
        rig.write(0xa0000 + 80 * 240, &[10 + plane]);
    }
    // The second page, 240 lines further.
    let start = 80u16 * 240;
    rig.indexed(0x3d4, 0x0c, (start >> 8) as u8);
    rig.indexed(0x3d4, 0x0d, start as u8);
    rig.refresh();
    let expected: Vec<u32> = (0..8).map(|x| grey(10 + x / 2)).collect();
    assert_eq!(rig.row(0, 8), expected);
    // A copy through the latches.
    rig.indexed(0x3c4, 2, 15);
    rig.indexed(0x3ce, 5, 0x41);
    rig.read(0xa0000 + 80 * 240);
    rig.write(0xa0000 + 80 * 240 + 1, &[0]);
    rig.refresh();
    assert_eq!(rig.row(0, 16)[8..], expected);
    // One pixel of panning (two of the register).
    rig.attribute(0x13, Some(2));
    rig.attribute(0x20, None);
    rig.refresh();
    assert_eq!(rig.row(0, 14), [&expected[2..], &expected].concat());
}

#[test]
fn sixteen_colors_in_planes() {
    let mut rig = Rig::new();
    rig.preset(&PLANAR_640X480);
    let at = 0xa0000 + 80 * 100;
    let row = |rig: &mut Rig| {
        rig.refresh();
        assert_eq!(rig.size(), (640, 480));
        rig.row(100, 8)
    };
    // Write mode 0 with planes 0 and 2: colour 5 where the bits are.
    rig.indexed(0x3c4, 2, 5);
    rig.write(at, &[0b1010_0000]);
    assert_eq!(row(&mut rig), [grey(5), 0, grey(5), 0, 0, 0, 0, 0]);
    rig.indexed(0x3c4, 2, 15);
    // Set/reset with a bit mask: the other pixels come from the latches.
    rig.indexed(0x3ce, 0, 9);
    rig.indexed(0x3ce, 1, 15);
    rig.indexed(0x3ce, 8, 0b0100_0001);
    rig.read(at);
    rig.write(at, &[0]);
    assert_eq!(row(&mut rig), [5, 9, 5, 0, 0, 0, 0, 9].map(grey));
    // XOR.
    rig.indexed(0x3ce, 3, 0x18);
    rig.indexed(0x3ce, 8, 0xff);
    rig.read(at);
    rig.write(at, &[0]);
    assert_eq!(row(&mut rig), [12, 0, 12, 9, 9, 9, 9, 0].map(grey));
    // Write mode 2: a colour for the pixels of the mask.
    rig.indexed(0x3ce, 3, 0);
    rig.indexed(0x3ce, 5, 2);
    rig.indexed(0x3ce, 8, 0xf0);
    rig.read(at);
    rig.write(at, &[6]);
    assert_eq!(row(&mut rig), [6, 6, 6, 6, 9, 9, 9, 0].map(grey));
    // Write mode 3: the data is a mask for the set/reset colour; it is rotated.
    rig.indexed(0x3ce, 0, 3);
    rig.indexed(0x3ce, 3, 4);
    rig.indexed(0x3ce, 5, 3);
    rig.indexed(0x3ce, 8, 0x3f);
    rig.read(at);
    rig.write(at, &[0x1e]);
    assert_eq!(row(&mut rig), [6, 6, 3, 6, 9, 9, 9, 3].map(grey));
    // Read mode 1: where is colour 6, with all planes and with plane 3 ignored?
    rig.indexed(0x3ce, 2, 6);
    rig.indexed(0x3ce, 5, 8);
    rig.indexed(0x3ce, 7, 15);
    assert_eq!(rig.read(at), 0b1101_0000);
    rig.indexed(0x3ce, 2, 1);
    rig.indexed(0x3ce, 7, 7);
    assert_eq!(rig.read(at), 0b0000_1110);
    // Read mode 0: a plane.
    rig.indexed(0x3ce, 5, 0);
    rig.indexed(0x3ce, 4, 3);
    assert_eq!(rig.read(at), 0b0000_1110);
}

#[test]
fn cga_lines_are_interleaved() {
    let mut rig = Rig::new();
    rig.preset(&CGA_320X200);
    // Even lines from B8000 on, odd ones from BA000 on; colours 0, 3, 5, 7.
    rig.write(0xb8000, &[0b00_01_10_11, 0b11_00_00_00]);
    rig.write(0xba000, &[0b11_11_11_11]);
    rig.write(0xb8000 + 80, &[0b01_01_01_01]);
    rig.refresh();
    assert_eq!(rig.size(), (640, 400));
    let wide = |colors: &[u32]| -> Vec<u32> { colors.iter().flat_map(|n| [grey(*n); 2]).collect() };
    assert_eq!(rig.row(0, 16), wide(&[0, 3, 5, 7, 7, 0, 0, 0]));
    assert_eq!(rig.row(1, 16), rig.row(0, 16));
    assert_eq!(rig.row(2, 16), wide(&[7, 7, 7, 7, 0, 0, 0, 0]));
    assert_eq!(rig.row(4, 8), wide(&[3, 3, 3, 3]));
    rig.preset(&CGA_640X200);
    rig.vga.card().frame_buffer().write_at(0, &[0; 0x20000]);
    rig.write(0xb8000, &[0b1010_0000]);
    rig.write(0xba000, &[0b0000_0101]);
    rig.refresh();
    assert_eq!(rig.row(0, 8), [7, 0, 7, 0, 0, 0, 0, 0].map(grey));
    assert_eq!(rig.row(2, 8), [0, 0, 0, 0, 0, 7, 0, 7].map(grey));
}

#[test]
fn vbe_depths() {
    let mut rig = Rig::new();
    rig.preset(&PACKED_320X200);
    let pixels: [(u16, &[u8], &[u32]); 6] = [
        (8, &[1, 2, 63], &[grey(1), grey(2), grey(63)]),
        (15, &[0x1f, 0x7c, 0xe0, 0x03], &[0xff00ff, 0x00ff00]),
        (16, &[0x1f, 0xf8, 0xe0, 0x07, 0x01, 0], &[0xff00ff, 0x00ff00, 8]),
        (24, &[1, 2, 3, 4, 5, 6], &[0x030201, 0x060504]),
        (32, &[1, 2, 3, 0xff, 4, 5, 6, 0], &[0x030201, 0x060504]),
        (4, &[0b1000_0000, 0b1100_0000], &[grey(3), grey(2)]),
    ];
    for (bits, bytes, expected) in pixels {
        rig.vbe_mode(648, 300, bits);
        assert_eq!(rig.refresh().resized, bits == 8, "{bits}");
        assert_eq!(rig.size(), (648, 300));
        assert!(rig.picture.pixels.iter().all(|pixel| *pixel == 0), "{bits}: cleared");
        // The second line, through BAR 0.
        let stride = if bits == 4 { 648 / 2 } else { 648 * u64::from(bits.div_ceil(8)) };
        rig.write(LFB + stride, bytes);
        assert_eq!(rig.refresh().dirty.len(), 1, "{bits}");
        assert_eq!(rig.row(1, expected.len() as u32), expected, "{bits}");
    }
    // An 8-bit DAC.
    rig.vbe_mode(640, 300, 8);
    rig.vbe(4, 0x61);
    rig.color(9, [1, 2, 255]);
    rig.write(LFB, &[9]);
    rig.refresh();
    assert_eq!(rig.pixel(0, 0), 0x0102ff);
    // Without clearing.
    rig.vbe(4, 0);
    rig.vbe(4, 0xe1);
    rig.refresh();
    assert_eq!(rig.pixel(0, 0), 0x0102ff);
}

#[test]
fn vbe_panning_banks_and_byte_order() {
    let mut rig = Rig::new();
    rig.vbe_mode(640, 480, 16);
    rig.vbe(6, 1000);
    rig.vbe(8, 100);
    rig.vbe(9, 50);
    let at = (50 * 1000 + 100) * 2u64;
    rig.write(LFB + at, &[0xff, 0xff, 0x00, 0xf8]);
    rig.refresh();
    assert_eq!(rig.row(0, 3), [0xffffff, 0xff0000, 0]);
    // The same pixel through the window: bank 1.
    rig.out(0x3c2, 3);
    rig.vbe(5, (at >> 16) as u16);
    assert_eq!(rig.read(0xa0000 + (at & 0xffff) + 3), 0xf8);
    rig.write(0xa0000 + (at & 0xffff) + 4, &[0x1f, 0]);
    assert_eq!(rig.refresh().dirty, [rect(2, 0, 1, 1)]);
    assert_eq!(rig.pixel(2, 0), 0x0000ff);
    rig.write(MMIO + 0x604, &0xbebe_bebeu32.to_le_bytes());
    rig.refresh();
    assert_eq!(rig.row(0, 3), [0xffffff, 0x001cc6, 0x18e300], "00F8 and 1F00");
    rig.write(MMIO + 0x604, &0x1e1e_1e1eu32.to_le_bytes());
    rig.refresh();
    assert_eq!(rig.row(0, 3), [0xffffff, 0xff0000, 0x0000ff]);
}

#[test]
fn dirty_pages_become_rows() {
    let mut rig = Rig::new();
    rig.vbe_mode(1024, 768, 32);
    rig.refresh();
    assert_eq!(rig.refresh().dirty, []);
    rig.write(LFB + 4096 * 10 + 400, &[1, 1, 1, 1]);
    rig.write(LFB + 4096 * 700 + 4092, &[1, 1, 1, 1]);
    rig.write(LFB + 4096 * 600, &[0; 4]);
    assert_eq!(rig.refresh().dirty, [rect(100, 10, 1, 1), rect(1023, 700, 1, 1)]);
    // A new, empty picture gets everything.
    rig.picture = Picture::default();
    let update = rig.refresh();
    assert_eq!((update.resized, update.dirty), (true, vec![rect(0, 0, 1024, 768)]));
    assert_eq!(rig.pixel(100, 10), 0x010101);
}

#[test]
fn a_screen_that_is_off_is_black() {
    let mut rig = Rig::new();
    let update = rig.refresh();
    assert_eq!((rig.size(), update.resized), ((720, 400), true));
    assert_eq!(rig.refresh().dirty, []);
    rig.vbe_mode(640, 480, 32);
    rig.write(LFB, &[0xff; 4]);
    rig.refresh();
    rig.attribute(0, None);
    assert_eq!(rig.refresh().dirty, [rect(0, 0, 1, 1)]);
    assert_eq!((rig.size(), rig.pixel(0, 0)), ((640, 480), 0));
    rig.attribute(0x20, None);
    assert_eq!(rig.refresh().dirty, [rect(0, 0, 1, 1)]);
    assert!(!rig.vga.card().suggest_size(100, 100));
}

#[test]
fn the_function_is_qemus() {
    let rig = Rig::new();
    let mut id = [0; 12];
    for (at, part) in (0..).step_by(4).zip(id.chunks_mut(4)) {
        rig.root.config_read(rig.at, at, part);
    }
    assert_eq!((&id[..4], &id[8..]), (&[0x34, 0x12, 0x11, 0x11][..], &[2, 0, 0, 3][..]));
    let slot = rig.vm.slot(0).unwrap();
    assert_eq!((slot.gpa, slot.bytes), (LFB, VRAM));
    // EDID, the ports and VBE's registers by MMIO.
    let block: Vec<u8> = (0..128).map(|at| rig.read(MMIO + at)).collect();
    assert_eq!(block, crate::display::edid::edid(1280, 800));
    assert_eq!(rig.read(MMIO + 200), 0);
    rig.bus.mmio_write(MMIO + 0x404, &[2, 15]);
    assert_eq!(rig.input(0x3c5), 15);
    rig.bus.mmio_write(MMIO + 0x500 + 2, &[0, 4, 0, 3]);
    let mut data = [0; 4];
    rig.bus.mmio_read(MMIO + 0x502, &mut data);
    assert_eq!(data, [0, 4, 0, 3]);
    rig.bus.pio_write(0x1ce, &[0xa, 0]);
    let mut word = [0; 2];
    for port in [0x1cf, 0x1d0] {
        rig.bus.pio_read(port, &mut word);
        assert_eq!(u16::from_le_bytes(word), (VRAM >> 16) as u16);
    }
    rig.bus.mmio_read(MMIO + 0x600, &mut data);
    assert_eq!(data, [8, 0, 0, 0]);
    rig.bus.mmio_read(MMIO + 0x604, &mut data);
    assert_eq!(data, [0x1e; 4]);
    // Nothing answers once decoding is off.
    rig.root.config_write(rig.at, 4, &[0, 0]);
    assert_eq!((rig.input(0x3c5), rig.read(0xb8000)), (0xff, 0xff));
    assert!(rig.vm.slot(0).is_none());
    let ram = DeviceRam::new(rig.vm.clone(), 1, 3 << 20, Access::ReadWrite).unwrap();
    assert!(Vga::new(ram, Vec::new(), &CardConfig::default()).is_err());
}

#[test]
fn a_saved_card_shows_the_same() {
    let mut rig = text_rig();
    rig.write(0xb8000, b"S\x4f");
    rig.indexed(0x3d4, 0x0f, 0x12);
    rig.refresh();
    let text = serde_json::to_string(&rig.vga.save()).unwrap();
    let mut memory = vec![0; VRAM as usize];
    rig.vga.card().frame_buffer().read_at(0, &mut memory);
    let mut other = Rig::new();
    other.vga.card().frame_buffer().write_at(0, &memory);
    other.refresh();
    other.vga.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    other.refresh();
    assert_eq!(other.picture, rig.picture);
    assert_eq!(serde_json::to_string(&other.vga.save()).unwrap(), text);
    // A reset is as after power-on.
    other.root.reset();
    assert_eq!(other.vga.save().card, VgaState::default());
    other.refresh();
    assert_eq!(other.picture, Picture::black(720, 400));
    // Nonsense is made harmless.
    let mut bad = rig.vga.save();
    bad.card.dac.clear();
    bad.card.attribute_index = 0xff;
    bad.card.sequencer_index = 0xff;
    bad.card.graphics_index = 0xff;
    bad.card.dac_step = 0xff;
    bad.card.dispi =
        Dispi { bits: 0xffff, enable: 1, width: 0xffff, height: 0xffff, ..Dispi::default() };
    other.vga.restore(&bad).unwrap();
    for port in 0x3b0..0x3e0 {
        other.input(port);
        other.out(port, 0xff);
    }
    other.refresh();
}

/// Random registers, memory and configuration: no panic, and pictures of a bounded size.
#[test]
fn nothing_that_a_guest_does_breaks_it() {
    let mut rig = Rig::new();
    let mut seed = 11u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed ^ seed >> 29) >> 16
    };
    for round in 0..400 {
        match round % 4 {
            0 => rig.preset(&TEXT_80X25),
            1 => rig.preset(&PLANAR_640X480),
            2 => rig.preset(&CGA_320X200),
            _ => rig.preset(&PACKED_320X200),
        }
        for _ in 0..200 {
            let len = 1usize << (random() % 4);
            let data = random().to_le_bytes();
            let wild = random() % 3 == 0;
            match random() % 8 {
                0 => rig.bus.pio_write(0x3b0 + (random() % 0x30) as u16, &data[..len.min(4)]),
                1 => rig.indexed(0x3d4, (random() % 32) as u8, data[0]),
                2 => rig.indexed(0x3ce, (random() % 9) as u8, data[0]),
                3 => rig.indexed(0x3c4, (random() % 5) as u8, data[0]),
                4 if wild => rig.vbe((random() % 12) as u16, data[0] as u16 * 16),
                4 => rig.attribute((random() % 32) as u8, Some(data[0])),
                5 => rig.bus.mmio_write(0xa0000 + random() % 0x20000, &data[..len]),
                6 => rig.bus.mmio_read(0xa0000 + random() % 0x20000, &mut [0; 8][..len]),
                _ if wild => rig.bus.mmio_write(MMIO + random() % 0x1000, &data[..len]),
                _ => rig.bus.mmio_write(LFB + random() % VRAM, &data[..len]),
            }
            rig.bus.mmio_read(MMIO + random() % 0x1000, &mut [0; 8][..len]);
            rig.bus.pio_read(0x1ce + (random() % 4) as u16, &mut [0; 4][..len.min(4)]);
        }
        rig.attribute(0x20, None);
        rig.out(0x3c2, 0x67);
        rig.refresh_at(random());
        let (width, height) = rig.size();
        assert!(width <= 8192 && height <= 8192 && width * height <= 1 << 24);
        if random() % 8 == 0 {
            let register = (random() % 0x40) as usize;
            rig.root.config_write(rig.at, register, &random().to_le_bytes()[..4]);
            rig.root.reset();
            for (register, value) in [(0x10, LFB as u32), (0x18, MMIO as u32), (4, 3)] {
                rig.root.config_write(rig.at, register, &value.to_le_bytes());
            }
        }
    }
    // The largest that registers can ask for.
    rig.vbe_mode(8192, 8192, 8);
    rig.refresh();
    assert_eq!(rig.size(), (8192, 512));
    rig.vbe_mode(8192, 1, 32);
    rig.vbe(6, 0xffff);
    rig.vbe(9, 0xffff);
    rig.refresh();
    assert_eq!(rig.size(), (8192, 1));
    assert!(rig.vga.endpoint().bar(0).is_some());
}
