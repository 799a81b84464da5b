//! The card without PCI: registers behind one lock, the frame buffer, what the display thread has drawn.
//!
//! ```text
//!   MMIO   000 EDID | 400 ports 3C0..3DF | 500 VBE registers, 2 bytes each | 600 size, 604 byte order of pixels
//! ```

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::super::edid::{EDID_BYTES, edid};
use super::super::paint::Painter;
use super::super::{Picture, Screen, Update};
use super::dispi::{self, Effect};
use super::mode::Mode;
use super::pixels::{self, Written};
use super::state::{VgaState, attribute, crtc, graphics, sequencer};
use super::text::{self, Phase};
use super::{MMIO_BYTES, window};
use crate::bus::BusDevice;
use crate::device_ram::DeviceRam;
use crate::pci::{Bar, BarKind, EndpointBuilder};

/// The legacy ranges: VGA's ports, VBE's ports, and the window.
const PORTS: u64 = 0x3b0;
const PORTS_LEN: u64 = 0x30;
const DISPI_PORTS: u64 = 0x1ce;
const DISPI_PORTS_LEN: u64 = 4;
const WINDOW: u64 = 0xa_0000;
/// Places in the MMIO range.
const MMIO_PORTS: u64 = 0x400;
const MMIO_PORTS_END: u64 = 0x420;
const MMIO_DISPI: u64 = 0x500;
const MMIO_DISPI_END: u64 = MMIO_DISPI + 2 * dispi::REGISTERS;
const MMIO_EXTENDED: u64 = 0x600;
const MMIO_BYTE_ORDER: u64 = 0x604;
/// Bytes of the extended registers, which the first of them says, and the values of the second.
const EXTENDED_BYTES: u32 = 8;
const BIG_ENDIAN: u32 = 0xbebe_bebe;
const LITTLE_ENDIAN: u32 = 0x1e1e_1e1e;
/// The picture's size before any mode was set.
const FIRST_SIZE: (u32, u32) = (720, 400);

/// What a card is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CardConfig {
    /// The mode that the monitor likes best: columns and rows.
    pub preferred: (u32, u32),
}

impl Default for CardConfig {
    fn default() -> Self {
        Self { preferred: (1280, 800) }
    }
}

/// What the display thread has drawn.
#[derive(Default)]
struct Drawn {
    mode: Option<Mode>,
    text: text::Drawn,
}

/// The card.
pub struct Card {
    vram: Arc<DeviceRam>,
    edid: [u8; EDID_BYTES],
    state: Mutex<VgaState>,
    drawn: Mutex<Drawn>,
    /// From where retraces and blinking count.
    start: Instant,
}

impl Card {
    /// A card with this frame buffer, which should have a power of two of bytes and at least 256 KiB.
    pub fn new(vram: Arc<DeviceRam>, config: &CardConfig) -> Arc<Self> {
        Arc::new(Self {
            vram,
            edid: edid(config.preferred.0, config.preferred.1),
            state: Mutex::default(),
            drawn: Mutex::default(),
            start: Instant::now(),
        })
    }

    /// Gives a PCI function the card's frame buffer (BAR 0), ports, window and, if it has bytes, ROM. The MMIO
    /// range ([`Card::mmio`]) goes where the function likes.
    pub fn attach(self: &Arc<Self>, builder: &mut EndpointBuilder, rom: Vec<u8>) {
        let frame_buffer = Bar {
            kind: BarKind::Memory32Prefetchable,
            bytes: self.vram.bytes(),
            handler: self.vram.clone(),
        };
        builder.bar(0, frame_buffer);
        builder.fixed(BarKind::Io, PORTS, PORTS_LEN, Arc::new(Ports(self.clone())));
        let dispi = Arc::new(DispiPorts(self.clone()));
        builder.fixed(BarKind::Io, DISPI_PORTS, DISPI_PORTS_LEN, dispi);
        let memory = Arc::new(Window(self.clone()));
        builder.fixed(BarKind::Memory32, WINDOW, window::WINDOW_BYTES, memory);
        if !rom.is_empty() {
            builder.rom(rom);
        }
    }

    /// What answers in the 4 KiB of MMIO.
    pub fn mmio(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Mmio(self.clone()))
    }

    /// The frame buffer. What is in it is saved as memory is, apart from [`Card::save`].
    pub fn frame_buffer(&self) -> &Arc<DeviceRam> {
        &self.vram
    }

    /// What is saved of the registers.
    pub fn save(&self) -> VgaState {
        self.lock().clone()
    }

    /// Takes back what [`Card::save`] gave.
    pub fn restore(&self, saved: &VgaState) {
        let mut saved = saved.clone();
        saved.sanitize();
        *self.lock() = saved;
        self.redraw();
    }

    /// As after power-on. The frame buffer keeps what it has, as memory does.
    pub fn reset(&self) {
        *self.lock() = VgaState::default();
    }

    /// The next [`Screen::refresh`] draws everything.
    pub fn redraw(&self) {
        self.drawn().mode = None;
    }

    fn lock(&self) -> MutexGuard<'_, VgaState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn drawn(&self) -> MutexGuard<'_, Drawn> {
        self.drawn.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn input_status(&self) -> u8 {
        super::registers::input_status(self.start.elapsed().as_nanos() as u64)
    }

    /// Reads neighbouring ports, byte by byte.
    fn read_ports(&self, first: u64, data: &mut [u8]) {
        let status = self.input_status();
        let mut state = self.lock();
        for (port, byte) in (first..).zip(data) {
            *byte = state.read_port(port as u16, status);
        }
    }

    /// Writes neighbouring ports, byte by byte: a word is index and data.
    fn write_ports(&self, first: u64, data: &[u8]) {
        let mut state = self.lock();
        for (port, byte) in (first..).zip(data) {
            state.write_port(port as u16, *byte);
        }
    }

    fn read_dispi(&self, index: u16) -> u16 {
        self.lock().dispi.read(index, self.vram.bytes())
    }

    fn write_dispi(&self, index: u16, value: u16) {
        let mut state = self.lock();
        let vram = self.vram.bytes();
        if let Effect::Enabled { clear } = state.dispi.write(index, value, vram) {
            let Some(shown) = state.dispi.geometry(vram) else { return };
            state.follow_vbe(shown.width, shown.height, shown.stride(), shown.bits);
            if clear {
                self.clear(shown.stride() * u64::from(shown.height));
            }
        }
    }

    /// Makes the first `bytes` of the frame buffer zero.
    fn clear(&self, bytes: u64) {
        const ZEROES: [u8; 16 << 10] = [0; 16 << 10];
        let bytes = bytes.min(self.vram.bytes());
        for at in (0..bytes).step_by(ZEROES.len()) {
            let len = (bytes - at).min(ZEROES.len() as u64) as usize;
            self.vram.write_at(at, &ZEROES[..len]);
        }
    }

    /// Draws what is on the screen `ms` milliseconds after some time.
    fn refresh_at(&self, picture: &mut Picture, ms: u64) -> Update {
        let mode = self.lock().mode(self.vram.bytes());
        let mut drawn = self.drawn();
        let drawn = &mut *drawn;
        // Taken before anything is read: what is written from now on is in the next answer.
        let pages = self.vram.take_dirty();
        let (width, height) = match &mode {
            Mode::Blank if picture.width > 0 => (picture.width, picture.height),
            Mode::Blank => FIRST_SIZE,
            Mode::Text(text) => (text.width(), text.height),
            Mode::Planes(planes) => (planes.width, planes.height),
            Mode::Linear(linear) => (linear.width, linear.height),
        };
        let mut painter = Painter::new(picture, width, height);
        let before = drawn.mode.as_ref();
        match &mode {
            Mode::Blank => {
                if painter.fresh() || before != Some(&mode) {
                    painter.clear();
                }
            }
            Mode::Text(now) => {
                let same = matches!(before, Some(Mode::Text(then)) if now.looks_like(then));
                let all = painter.fresh() || !same;
                // IBM's modes show the first 256 KiB: 64 pages.
                let written = pages.first().is_some_and(|word| *word != 0);
                let phase = Phase::at(ms);
                text::draw(now, phase, &self.vram, &mut drawn.text, &mut painter, written, all);
            }
            Mode::Planes(now) => {
                let all = painter.fresh() || before != Some(&mode);
                let written = Written { pages: &pages, all };
                pixels::draw_planes(now, &self.vram, &written, &mut painter);
            }
            Mode::Linear(now) => {
                let all = painter.fresh() || before != Some(&mode);
                let written = Written { pages: &pages, all };
                pixels::draw_linear(now, &self.vram, &written, &mut painter);
            }
        }
        let update = painter.finish();
        drawn.mode = Some(mode);
        update
    }
}

impl VgaState {
    /// Puts IBM's registers where a VBE mode of this size would have them, for software that looks at them or that
    /// draws through the window.
    fn follow_vbe(&mut self, width: u32, height: u32, stride: u64, bits: u32) {
        let last = height - 1;
        let gr = &mut self.graphics;
        gr[graphics::MISC] = gr[graphics::MISC] & !0x0c | 0x04 | graphics::IS_GRAPHICS;
        // Stores go to memory as they are.
        gr[graphics::MODE] &= !(graphics::PACKED | graphics::INTERLEAVED | 3);
        for register in [graphics::SET_RESET, graphics::ENABLE_SET_RESET, graphics::ROTATE] {
            gr[register] = 0;
        }
        gr[graphics::BIT_MASK] = 0xff;
        self.crtc[crtc::MODE] |= 0x03;
        self.crtc[crtc::OFFSET] = (stride / 8).min(255) as u8;
        self.crtc[crtc::DISPLAY_END_H] = (width / 8).saturating_sub(1).min(255) as u8;
        self.crtc[crtc::DISPLAY_END_V] = last as u8;
        let overflow = (last >> 7 & 0x02 | last >> 3 & 0x40) as u8;
        self.crtc[crtc::OVERFLOW] = self.crtc[crtc::OVERFLOW] & !0x42 | overflow | 0x10;
        self.crtc[crtc::MAX_SCAN] = self.crtc[crtc::MAX_SCAN] & !0x9f | 0x40;
        self.crtc[crtc::LINE_COMPARE] = 0xff;
        self.crtc[crtc::START_HIGH..crtc::START_HIGH + 2].fill(0);
        self.sequencer[sequencer::CLOCKING] &= !(sequencer::HALF_CLOCK | sequencer::SCREEN_OFF);
        self.sequencer[sequencer::MAP_MASK] = 0x0f;
        if bits == 4 {
            self.sequencer[sequencer::MEMORY_MODE] &= !sequencer::CHAIN_4;
        } else {
            self.graphics[graphics::MODE] |= graphics::PACKED;
            self.sequencer[sequencer::MEMORY_MODE] |= sequencer::CHAIN_4;
        }
        self.attribute[attribute::PLANES] |= 0x0f;
    }
}

impl Screen for Card {
    fn refresh(&self, picture: &mut Picture) -> Update {
        self.refresh_at(picture, self.start.elapsed().as_millis() as u64)
    }

    fn suggest_size(&self, _width: u32, _height: u32) -> bool {
        false
    }
}

#[cfg(test)]
impl Card {
    /// [`Screen::refresh`] at a time of the test's choice.
    pub(super) fn refresh_then(&self, picture: &mut Picture, ms: u64) -> Update {
        self.refresh_at(picture, ms)
    }
}

/// VGA's ports, from 3B0 on.
struct Ports(Arc<Card>);

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_ports(PORTS + offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_ports(PORTS + offset, data);
    }
}

/// VBE's ports: index at 1CE, data at 1CF and 1D0, 16 bits each.
struct DispiPorts(Arc<Card>);

impl BusDevice for DispiPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let index = self.0.lock().dispi.index;
        let value = match offset {
            0 => index,
            1 | 2 => self.0.read_dispi(index),
            _ => return,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let value = match *data {
            [low] => low.into(),
            [low, high, ..] => u16::from_le_bytes([low, high]),
            [] => return,
        };
        match offset {
            0 => self.0.lock().dispi.index = value,
            1 | 2 => {
                let index = self.0.lock().dispi.index;
                self.0.write_dispi(index, value);
            }
            _ => {}
        }
    }
}

/// Memory from A0000 to C0000.
struct Window(Arc<Card>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.lock().read_window(&self.0.vram, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().write_window(&self.0.vram, offset, data);
    }
}

/// The MMIO range.
struct Mmio(Arc<Card>);

impl Mmio {
    /// The byte at `offset` where reading has no effect.
    fn byte(&self, offset: u64) -> u8 {
        let card = &self.0;
        match offset {
            0..MMIO_PORTS => card.edid.get(offset as usize).copied().unwrap_or(0),
            MMIO_DISPI..MMIO_DISPI_END => {
                let index = (offset - MMIO_DISPI) / 2;
                card.read_dispi(index as u16).to_le_bytes()[(offset & 1) as usize]
            }
            MMIO_EXTENDED..MMIO_BYTE_ORDER => {
                EXTENDED_BYTES.to_le_bytes()[(offset - MMIO_EXTENDED) as usize]
            }
            MMIO_BYTE_ORDER..0x608 => {
                let big = card.lock().big_endian;
                (if big { BIG_ENDIAN } else { LITTLE_ENDIAN }).to_le_bytes()[0]
            }
            _ => 0xff,
        }
    }
}

impl BusDevice for Mmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let offset = offset % MMIO_BYTES;
        if (MMIO_PORTS..MMIO_PORTS_END).contains(&offset) {
            let room = ((MMIO_PORTS_END - offset) as usize).min(data.len());
            data[room..].fill(0xff);
            self.0.read_ports(offset - MMIO_PORTS + 0x3c0, &mut data[..room]);
            return;
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = self.byte(at);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset % MMIO_BYTES, data) {
            (offset @ MMIO_PORTS..MMIO_PORTS_END, _) => {
                let room = ((MMIO_PORTS_END - offset) as usize).min(data.len());
                self.0.write_ports(offset - MMIO_PORTS + 0x3c0, &data[..room]);
            }
            // Registers of 16 bits; a byte alone is nobody's.
            (offset @ MMIO_DISPI..MMIO_DISPI_END, _) if offset % 2 == 0 => {
                for (index, value) in ((offset - MMIO_DISPI) / 2..).zip(data.chunks_exact(2)) {
                    self.0.write_dispi(index as u16, u16::from_le_bytes([value[0], value[1]]));
                }
            }
            (MMIO_BYTE_ORDER, &[a, b, c, d]) => match u32::from_le_bytes([a, b, c, d]) {
                BIG_ENDIAN => self.0.lock().big_endian = true,
                LITTLE_ENDIAN => self.0.lock().big_endian = false,
                _ => {}
            },
            _ => {}
        }
    }
}
