//! The i8042: one byte between two devices and the CPU.
//!
//! ```text
//!   answer of the controller --+
//!   keyboard, if its port is on+--> output buffer --> port 60
//!   mouse, if its port is on --+     | from the mouse?   yes: IRQ 12, no: IRQ 1, where the command byte allows it
//! ```
//!
//! An interrupt line is high while its byte waits, and goes down between two bytes: each byte is an edge.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::codes::{self, RELEASE, RELEASE_BIT};
use super::{KeyboardState, MouseState};
use crate::bus::BusDevice;
use crate::input::{InputDevice, InputEvent};
use crate::legacy::{IrqLine, PowerRequest, PowerSink};

/// The data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The status and command port.
pub const I8042_STATUS_PORT: u16 = 0x64;
/// The keyboard's ISA interrupt.
pub const KEYBOARD_IRQ: u32 = 1;
/// The mouse's ISA interrupt.
pub const MOUSE_IRQ: u32 = 12;

/// More columns or rows than this are none.
const LARGEST_PICTURE: u32 = 1 << 16;
const DEFAULT_PICTURE: (u32, u32) = (1024, 768);

/// Bits of the status register.
mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const COMMAND: u8 = 1 << 3;
    pub const UNLOCKED: u8 = 1 << 4;
    pub const FROM_MOUSE: u8 = 1 << 5;
}

/// Bits of the command byte.
mod control {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const MOUSE_INTERRUPT: u8 = 1 << 1;
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_OFF: u8 = 1 << 4;
    pub const MOUSE_OFF: u8 = 1 << 5;
    pub const TRANSLATE: u8 = 1 << 6;
    /// As firmware leaves it, so that systems without firmware find a keyboard that works.
    pub const POWER_UP: u8 = KEYBOARD_INTERRUPT | MOUSE_INTERRUPT | TRANSLATE;
}

/// Bits of the output port.
mod output_port {
    pub const NO_RESET: u8 = 1 << 0;
    /// A20 is always open here; the bit is kept to be read.
    pub const A20: u8 = 1 << 1;
    pub const KEYBOARD_FULL: u8 = 1 << 4;
    pub const MOUSE_FULL: u8 = 1 << 5;
    /// The lines to the keyboard, at rest.
    pub const LINES: u8 = 0xc0;
    pub const POWER_UP: u8 = NO_RESET | A20 | LINES;
}

mod command {
    pub const READ_MEMORY: u8 = 0x20;
    pub const READ_MEMORY_END: u8 = 0x3f;
    pub const WRITE_MEMORY: u8 = 0x60;
    pub const WRITE_MEMORY_END: u8 = 0x7f;
    pub const TEST_PASSWORD: u8 = 0xa4;
    pub const MOUSE_OFF: u8 = 0xa7;
    pub const MOUSE_ON: u8 = 0xa8;
    pub const TEST_MOUSE: u8 = 0xa9;
    pub const SELF_TEST: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const KEYBOARD_OFF: u8 = 0xad;
    pub const KEYBOARD_ON: u8 = 0xae;
    pub const READ_INPUT_PORT: u8 = 0xc0;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub const WRITE_AS_KEYBOARD: u8 = 0xd2;
    pub const WRITE_AS_MOUSE: u8 = 0xd3;
    pub const WRITE_TO_MOUSE: u8 = 0xd4;
    pub const CLOSE_A20: u8 = 0xdd;
    pub const OPEN_A20: u8 = 0xdf;
    pub const READ_TEST_INPUTS: u8 = 0xe0;
    /// F0..FF pulse those of the output port's low four bits that are clear in the command.
    pub const PULSE: u8 = 0xf0;
}

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0;
const NO_PASSWORD: u8 = 0xf1;
/// Bit 7: the keyboard is not locked.
const INPUT_PORT: u8 = 0x80;

/// A byte for the output buffer, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The byte.
    pub byte: u8,
    /// It is the mouse's.
    pub from_mouse: bool,
}

/// What is saved of an [`I8042`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct I8042State {
    /// The controller's memory; its first byte is the command byte.
    pub memory: [u8; 32],
    /// Bits 0 to 3, 6 and 7 of the output port.
    pub output_port: u8,
    /// The last write went to the command port.
    pub command_last: bool,
    /// The command that takes the next byte at the data port.
    pub awaits_data: Option<u8>,
    /// What waits at the data port.
    pub output: Option<Reply>,
    /// What the data port reads as while nothing waits there.
    pub last: u8,
    /// The controller's own answer, which is the next byte.
    pub answer: Option<Reply>,
    /// Translation: F0 came, the next code is one of a released key.
    pub release_seen: bool,
    /// The keyboard.
    pub keyboard: KeyboardState,
    /// The mouse.
    pub mouse: MouseState,
}

impl Default for I8042State {
    /// As after power-up.
    fn default() -> Self {
        let mut memory = [0; 32];
        memory[0] = control::POWER_UP;
        Self {
            memory,
            output_port: output_port::POWER_UP,
            command_last: true,
            awaits_data: None,
            output: None,
            last: 0,
            answer: None,
            release_seen: false,
            keyboard: KeyboardState::default(),
            mouse: MouseState::default(),
        }
    }
}

impl I8042State {
    fn has(&self, bits: u8) -> bool {
        self.memory[0] & bits != 0
    }

    fn set(&mut self, bits: u8, on: bool) {
        if on {
            self.memory[0] |= bits;
        } else {
            self.memory[0] &= !bits;
        }
    }

    fn answer(&mut self, byte: u8) {
        self.answer = Some(Reply { byte, from_mouse: false });
    }

    /// The next byte for an empty output buffer.
    fn next(&mut self) -> Option<Reply> {
        if let Some(answer) = self.answer.take() {
            return Some(answer);
        }
        while !self.has(control::KEYBOARD_OFF) && self.keyboard.has_byte() {
            let byte = self.keyboard.take()?;
            if let Some(byte) = self.translate(byte) {
                return Some(Reply { byte, from_mouse: false });
            }
        }
        if self.has(control::MOUSE_OFF) || !self.mouse.has_byte() {
            return None;
        }
        Some(Reply { byte: self.mouse.take()?, from_mouse: true })
    }

    /// Set 2 becomes set 1, if the guest wants it: F0 goes, and marks the code after it.
    fn translate(&mut self, byte: u8) -> Option<u8> {
        if !self.has(control::TRANSLATE) {
            self.release_seen = false;
            return Some(byte);
        }
        if byte == RELEASE {
            self.release_seen = true;
            return None;
        }
        let released = if std::mem::take(&mut self.release_seen) { RELEASE_BIT } else { 0 };
        Some(codes::translate(byte) | released)
    }

    fn fill(&mut self) {
        if self.output.is_none() {
            self.output = self.next();
        }
    }

    fn status(&self) -> u8 {
        let full = match self.output {
            Some(Reply { from_mouse: true, .. }) => status::OUTPUT_FULL | status::FROM_MOUSE,
            Some(_) => status::OUTPUT_FULL,
            None => 0,
        };
        let system = if self.has(control::SYSTEM) { status::SYSTEM } else { 0 };
        let command = if self.command_last { status::COMMAND } else { 0 };
        status::UNLOCKED | full | system | command
    }

    fn output_port(&self) -> u8 {
        let full = match self.output {
            Some(Reply { from_mouse: true, .. }) => output_port::MOUSE_FULL,
            Some(_) => output_port::KEYBOARD_FULL,
            None => 0,
        };
        self.output_port & !(output_port::MOUSE_FULL | output_port::KEYBOARD_FULL) | full
    }

    /// The levels of the keyboard's and the mouse's interrupt.
    fn levels(&self) -> (bool, bool) {
        let Some(reply) = self.output else { return (false, false) };
        let keyboard = self.has(control::KEYBOARD_INTERRUPT) && !self.has(control::KEYBOARD_OFF);
        let mouse = self.has(control::MOUSE_INTERRUPT) && !self.has(control::MOUSE_OFF);
        (!reply.from_mouse && keyboard, reply.from_mouse && mouse)
    }

    /// A byte at the command port; `true` asks for a reset.
    fn command(&mut self, byte: u8) -> bool {
        self.command_last = true;
        self.awaits_data = None;
        match byte {
            command::READ_MEMORY..=command::READ_MEMORY_END => {
                self.answer(self.memory[usize::from(byte & 0x1f)]);
            }
            command::WRITE_MEMORY..=command::WRITE_MEMORY_END
            | command::WRITE_OUTPUT_PORT
            | command::WRITE_AS_KEYBOARD
            | command::WRITE_AS_MOUSE
            | command::WRITE_TO_MOUSE => self.awaits_data = Some(byte),
            command::TEST_PASSWORD => self.answer(NO_PASSWORD),
            command::MOUSE_OFF => self.set(control::MOUSE_OFF, true),
            command::MOUSE_ON => self.set(control::MOUSE_OFF, false),
            command::TEST_MOUSE | command::TEST_KEYBOARD => self.answer(PORT_TEST_PASSED),
            command::SELF_TEST => {
                self.set(control::SYSTEM, true);
                self.answer(SELF_TEST_PASSED);
            }
            command::KEYBOARD_OFF => self.set(control::KEYBOARD_OFF, true),
            command::KEYBOARD_ON => self.set(control::KEYBOARD_OFF, false),
            command::READ_INPUT_PORT => self.answer(INPUT_PORT),
            command::READ_OUTPUT_PORT => self.answer(self.output_port()),
            command::CLOSE_A20 => self.output_port &= !output_port::A20,
            command::OPEN_A20 => self.output_port |= output_port::A20,
            command::READ_TEST_INPUTS => self.answer(0),
            command::PULSE.. => return byte & output_port::NO_RESET == 0,
            _ => {}
        }
        false
    }

    /// A byte at the data port; `true` asks for a reset.
    fn data(&mut self, byte: u8) -> bool {
        self.command_last = false;
        match self.awaits_data.take() {
            Some(command @ command::WRITE_MEMORY..=command::WRITE_MEMORY_END) => {
                self.memory[usize::from(command & 0x1f)] = byte;
            }
            Some(command::WRITE_OUTPUT_PORT) => {
                self.output_port = byte | output_port::NO_RESET;
                return byte & output_port::NO_RESET == 0;
            }
            Some(command::WRITE_AS_KEYBOARD) => self.answer(byte),
            Some(command::WRITE_AS_MOUSE) => self.answer = Some(Reply { byte, from_mouse: true }),
            Some(command::WRITE_TO_MOUSE) => {
                // Talking to a device turns its port on.
                self.set(control::MOUSE_OFF, false);
                self.mouse.write(byte);
            }
            _ => {
                self.set(control::KEYBOARD_OFF, false);
                self.keyboard.write(byte);
            }
        }
        false
    }
}

struct Inner {
    state: I8042State,
    picture: (u32, u32),
}

/// The controller with its keyboard and its mouse.
pub struct I8042 {
    inner: Mutex<Inner>,
    power: Arc<dyn PowerSink>,
    keyboard_irq: Arc<dyn IrqLine>,
    mouse_irq: Arc<dyn IrqLine>,
}

/// One of the controller's two ports.
struct Port {
    controller: Arc<I8042>,
    is_command: bool,
}

impl I8042 {
    /// A controller that asks `power` for resets, with its lines [`KEYBOARD_IRQ`] and [`MOUSE_IRQ`].
    pub fn new(
        power: Arc<dyn PowerSink>,
        keyboard_irq: Arc<dyn IrqLine>,
        mouse_irq: Arc<dyn IrqLine>,
    ) -> Arc<Self> {
        let inner = Inner { state: I8042State::default(), picture: DEFAULT_PICTURE };
        Arc::new(Self { inner: Mutex::new(inner), power, keyboard_irq, mouse_irq })
    }

    /// What answers at [`I8042_DATA_PORT`] (one byte).
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { controller: self.clone(), is_command: false })
    }

    /// What answers at [`I8042_STATUS_PORT`] (one byte).
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { controller: self.clone(), is_command: true })
    }

    /// The picture that the pointer's places are in has this many columns and rows (1024 by 768 at first).
    pub fn set_picture_size(&self, width: u32, height: u32) {
        let mut inner = self.lock();
        let picture = (width.min(LARGEST_PICTURE), height.min(LARGEST_PICTURE));
        if inner.picture != picture {
            inner.picture = picture;
            // Pixels of another picture tell of no movement.
            inner.state.mouse.place = None;
        }
    }

    /// Back to power-up.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.state = I8042State::default();
        self.set_levels(&inner.state);
    }

    /// What is saved.
    pub fn save(&self) -> I8042State {
        self.lock().state.clone()
    }

    /// Puts back what [`I8042::save`] gave; the lines follow.
    pub fn restore(&self, state: &I8042State) {
        let mut inner = self.lock();
        inner.state = state.clone();
        inner.state.keyboard.sanitise();
        inner.state.mouse.sanitise();
        self.set_levels(&inner.state);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_levels(&self, state: &I8042State) {
        let (keyboard, mouse) = state.levels();
        self.keyboard_irq.set_level(keyboard);
        self.mouse_irq.set_level(mouse);
    }

    /// Changes the state; what there is to read then, is read next.
    fn change(&self, change: impl FnOnce(&mut I8042State) -> bool) {
        let reset = {
            let mut inner = self.lock();
            let reset = change(&mut inner.state);
            inner.state.fill();
            self.set_levels(&inner.state);
            reset
        };
        if reset {
            self.power.request(PowerRequest::Reset);
        }
    }

    fn read_data(&self) -> u8 {
        let mut inner = self.lock();
        let state = &mut inner.state;
        if let Some(reply) = state.output.take() {
            state.last = reply.byte;
            // Down, so that the next byte is an edge.
            self.set_levels(state);
            state.fill();
            self.set_levels(state);
            return reply.byte;
        }
        state.last
    }
}

impl BusDevice for Port {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let controller = &self.controller;
        data.fill(match self.is_command {
            true => controller.lock().state.status(),
            false => controller.read_data(),
        });
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        if self.is_command {
            self.controller.change(|state| state.command(byte));
        } else {
            self.controller.change(|state| state.data(byte));
        }
    }
}

impl InputDevice for I8042 {
    fn wants(&self, event: &InputEvent) -> bool {
        let state = &self.lock().state;
        match event {
            InputEvent::Key(..) => state.keyboard.enabled,
            _ => state.mouse.is_on(),
        }
    }

    fn send(&self, events: &[InputEvent]) {
        let mut inner = self.lock();
        let Inner { state, picture } = &mut *inner;
        for event in events {
            match event {
                InputEvent::Key(key, down) => state.keyboard.key(*key, *down),
                event => state.mouse.event(event, *picture),
            }
        }
        state.fill();
        self.set_levels(state);
    }
}
