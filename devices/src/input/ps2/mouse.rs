//! The mouse: movements, buttons and the wheel become packets, commands are answered.
//!
//! ```text
//!   byte 0   Y overflow, X overflow, Y sign, X sign, 1, middle, right, left
//!   byte 1   X, to the right        byte 2   Y, up
//!   byte 3   wheel (8 bits), down; or 0, 0, extra, side, wheel (4 bits)
//!            with a wheel or with five buttons only
//! ```
//!
//! IBM's PS/2 Hardware Interface Technical Reference, "Mouse". A driver that sets the sample rate to 200, 100, 80
//! gets a wheel, 200, 200, 80 five buttons (Microsoft's IntelliMouse and IntelliMouse Explorer). There is no sample
//! clock: the next packet is made when the last one was taken, of all that moved meanwhile.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::input::{Button, InputEvent, RANGE};

/// Packets to come that differ in their buttons; beyond that clicks are lost.
const REPORTS: usize = 32;
/// Answers and one packet.
const BYTES: usize = 16;
/// How far a movement adds up while nobody reads.
const FARTHEST: i32 = 10_000;
/// The most that one packet says of a movement, and of the wheel.
const STEP: i32 = 255;
const WHEEL_STEP: i32 = 7;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

const STANDARD: u8 = 0;
const WHEEL: u8 = 3;
const EXPLORER: u8 = 4;

mod command {
    pub const SCALING_1_1: u8 = 0xe6;
    pub const SCALING_2_1: u8 = 0xe7;
    pub const SET_RESOLUTION: u8 = 0xe8;
    pub const STATUS: u8 = 0xe9;
    pub const STREAM_MODE: u8 = 0xea;
    pub const READ: u8 = 0xeb;
    pub const UNWRAP: u8 = 0xec;
    pub const WRAP: u8 = 0xee;
    pub const REMOTE_MODE: u8 = 0xf0;
    pub const IDENTIFY: u8 = 0xf2;
    pub const SET_RATE: u8 = 0xf3;
    pub const ENABLE: u8 = 0xf4;
    pub const DISABLE: u8 = 0xf5;
    pub const DEFAULTS: u8 = 0xf6;
    pub const RESEND: u8 = 0xfe;
    pub const RESET: u8 = 0xff;
}

/// What the next byte is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Argument {
    /// Counts a millimetre.
    Resolution,
    /// Samples a second.
    Rate,
}

/// A movement, and the buttons that are down at its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// To the right.
    pub dx: i32,
    /// Down.
    pub dy: i32,
    /// Wheel notches, away from the person.
    pub wheel: i32,
    /// Bit 0 left, 1 right, 2 middle, 3 side, 4 extra.
    pub buttons: u8,
}

impl Report {
    fn moves(&self) -> bool {
        (self.dx, self.dy, self.wheel) != (0, 0, 0)
    }
}

/// What is saved of the mouse; also what it works on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MouseState {
    /// In stream mode: movements become packets.
    pub enabled: bool,
    /// Packets are made when asked for only.
    pub remote: bool,
    /// Every byte comes back.
    pub wrap: bool,
    /// Movements grow with their speed.
    pub doubled: bool,
    /// 0 standard, 3 with a wheel, 4 with five buttons.
    pub id: u8,
    /// Samples a second.
    pub rate: u8,
    /// 0 to 3: 1, 2, 4, 8 counts a millimetre.
    pub resolution: u8,
    /// The last rates that were set, the newest one last.
    pub knocks: [u8; 3],
    /// What the next byte from the guest is for.
    pub argument: Option<Argument>,
    /// Buttons that are down.
    pub buttons: u8,
    /// Movements that are not packets yet.
    pub reports: VecDeque<Report>,
    /// What the guest has not taken of answers and the current packet.
    pub bytes: VecDeque<u8>,
    /// The last answer or packet, for a guest that asks once more.
    pub last: Vec<u8>,
    /// Where the pointer was put last, in pixels.
    pub place: Option<(i32, i32)>,
}

impl Default for MouseState {
    /// As after power-up.
    fn default() -> Self {
        Self {
            enabled: false,
            remote: false,
            wrap: false,
            doubled: false,
            id: STANDARD,
            rate: 100,
            resolution: 2,
            knocks: [0; 3],
            argument: None,
            buttons: 0,
            reports: VecDeque::new(),
            bytes: VecDeque::new(),
            last: Vec::new(),
            place: None,
        }
    }
}

fn bit(button: Button) -> u8 {
    match button {
        Button::Left => 1 << 0,
        Button::Right => 1 << 1,
        Button::Middle => 1 << 2,
        Button::Side => 1 << 3,
        Button::Extra => 1 << 4,
    }
}

/// A coordinate of 0..=[`RANGE`] in a picture with so many pixels.
fn pixel(at: u16, pixels: u32) -> i32 {
    let last = u64::from(pixels.saturating_sub(1));
    // At most as many as there are, which is far below 2^31 (checked where the size is set).
    (u64::from(at.min(RANGE)) * last / u64::from(RANGE)) as i32
}

/// Scaling 2:1 (the reference's table): small movements stay, others double.
fn double(distance: i32) -> i32 {
    let size = match distance.abs() {
        size @ 0..=1 => size,
        2 => 1,
        3 => 3,
        4 => 6,
        5 => 9,
        size => size * 2,
    };
    size * distance.signum()
}

impl MouseState {
    /// Brings what was read from a file into the limits that hold here.
    pub(super) fn sanitise(&mut self) {
        self.reports.truncate(REPORTS);
        self.bytes.truncate(BYTES);
        self.last.truncate(BYTES);
        for report in &mut self.reports {
            for distance in [&mut report.dx, &mut report.dy, &mut report.wheel] {
                *distance = (*distance).clamp(-FARTHEST, FARTHEST);
            }
        }
    }

    /// Whether the guest wants to hear of the mouse.
    pub(super) fn is_on(&self) -> bool {
        (self.enabled || self.remote) && !self.wrap
    }

    /// Something happens to the mouse; the picture has this many columns and rows.
    pub(super) fn event(&mut self, event: &InputEvent, picture: (u32, u32)) {
        let mut report = Report::default();
        match *event {
            InputEvent::Key(..) => return,
            InputEvent::Button(button, true) => self.buttons |= bit(button),
            InputEvent::Button(button, false) => self.buttons &= !bit(button),
            InputEvent::Moved { dx, dy } => (report.dx, report.dy) = (dx, dy),
            InputEvent::Wheel(notches) => report.wheel = notches,
            InputEvent::At { x, y } => {
                let place = (pixel(x, picture.0), pixel(y, picture.1));
                let last = self.place.replace(place).unwrap_or(place);
                (report.dx, report.dy) =
                    (place.0.saturating_sub(last.0), place.1.saturating_sub(last.1));
            }
        }
        report.buttons = self.buttons;
        if self.is_on() {
            self.report(report);
        }
    }

    fn report(&mut self, report: Report) {
        let is_full = self.reports.len() >= REPORTS;
        let fits = |last: &&mut Report| is_full || last.buttons == report.buttons;
        if let Some(last) = self.reports.back_mut().filter(fits) {
            let add = |sum: i32, more: i32| sum.saturating_add(more).clamp(-FARTHEST, FARTHEST);
            last.dx = add(last.dx, report.dx);
            last.dy = add(last.dy, report.dy);
            last.wheel = add(last.wheel, report.wheel);
            last.buttons = report.buttons;
            return;
        }
        let clamp = |distance: i32| distance.clamp(-FARTHEST, FARTHEST);
        self.reports.push_back(Report {
            dx: clamp(report.dx),
            dy: clamp(report.dy),
            wheel: clamp(report.wheel),
            buttons: report.buttons,
        });
    }

    /// Whether [`MouseState::take`] has something.
    pub(super) fn has_byte(&self) -> bool {
        !self.bytes.is_empty() || self.streams() && !self.reports.is_empty()
    }

    fn streams(&self) -> bool {
        self.enabled && !self.remote && !self.wrap
    }

    /// The next byte for the guest.
    pub(super) fn take(&mut self) -> Option<u8> {
        if self.bytes.is_empty() && self.streams() && !self.reports.is_empty() {
            let packet = self.packet();
            self.say(&packet);
        }
        self.bytes.pop_front()
    }

    /// The next packet, of as much as it can say.
    fn packet(&mut self) -> Vec<u8> {
        let buttons = self.buttons;
        let (mut step, mut buttons) = (Report::default(), buttons);
        if let Some(front) = self.reports.front_mut() {
            buttons = front.buttons;
            step.dx = front.dx.clamp(-STEP, STEP);
            step.dy = front.dy.clamp(-STEP, STEP);
            step.wheel = front.wheel.clamp(-WHEEL_STEP, WHEEL_STEP);
            front.dx -= step.dx;
            front.dy -= step.dy;
            front.wheel -= step.wheel;
            if self.id == STANDARD {
                front.wheel = 0;
            }
            if !front.moves() {
                self.reports.pop_front();
            }
        }
        let (mut dx, mut dy) = (step.dx, -step.dy);
        if self.doubled && !self.remote {
            (dx, dy) = (double(dx).clamp(-STEP, STEP), double(dy).clamp(-STEP, STEP));
        }
        let sign = |distance: i32, bit: u8| if distance < 0 { 1 << bit } else { 0 };
        let mut packet = vec![1 << 3 | buttons & 7 | sign(dx, 4) | sign(dy, 5), dx as u8, dy as u8];
        let wheel = (-step.wheel) as u8;
        match self.id {
            WHEEL => packet.push(wheel),
            EXPLORER => packet.push(wheel & 0xf | (buttons & 0x18) << 1),
            _ => {}
        }
        packet
    }

    fn say(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() <= BYTES {
            self.bytes.extend(bytes);
            self.last = bytes.to_vec();
        }
    }

    fn forget(&mut self) {
        self.reports.clear();
        self.bytes.clear();
    }

    /// What F6 makes of it.
    fn defaults(&mut self) {
        self.enabled = false;
        self.remote = false;
        self.doubled = false;
        self.rate = 100;
        self.resolution = 2;
        self.knocks = [0; 3];
        self.reports.clear();
    }

    /// The guest sends a byte. What it has not read of a packet is gone.
    pub(super) fn write(&mut self, byte: u8) {
        self.bytes.clear();
        if self.wrap && !matches!(byte, command::RESET | command::UNWRAP) {
            return self.say(&[byte]);
        }
        match self.argument.take() {
            Some(argument) if byte < command::SCALING_1_1 => self.argument(argument, byte),
            _ => self.command(byte),
        }
    }

    fn argument(&mut self, argument: Argument, byte: u8) {
        match argument {
            Argument::Resolution if byte > 3 => return self.say(&[RESEND]),
            Argument::Resolution => self.resolution = byte,
            Argument::Rate => {
                self.rate = byte;
                self.knocks = [self.knocks[1], self.knocks[2], byte];
                match self.knocks {
                    [200, 100, 80] => self.id = WHEEL,
                    [200, 200, 80] => self.id = EXPLORER,
                    _ => {}
                }
            }
        }
        self.say(&[ACK]);
    }

    fn command(&mut self, byte: u8) {
        match byte {
            command::SCALING_1_1 => self.doubled = false,
            command::SCALING_2_1 => self.doubled = true,
            command::SET_RESOLUTION => self.argument = Some(Argument::Resolution),
            command::STATUS => {
                let status = self.status();
                return self.say(&[ACK, status, self.resolution, self.rate]);
            }
            command::STREAM_MODE => self.remote = false,
            command::READ => {
                let packet = self.packet();
                return self.say(&[&[ACK], &packet[..]].concat());
            }
            command::UNWRAP => self.wrap = false,
            command::WRAP => {
                self.forget();
                self.wrap = true;
            }
            command::REMOTE_MODE => {
                self.forget();
                self.remote = true;
            }
            command::IDENTIFY => return self.say(&[ACK, self.id]),
            command::SET_RATE => self.argument = Some(Argument::Rate),
            command::ENABLE => {
                self.forget();
                self.enabled = true;
            }
            command::DISABLE => {
                self.forget();
                self.enabled = false;
            }
            command::DEFAULTS => self.defaults(),
            command::RESEND => {
                let last = std::mem::take(&mut self.last);
                return self.say(&last);
            }
            command::RESET => {
                // The hand stays where it is.
                let (buttons, place) = (self.buttons, self.place);
                *self = Self { buttons, place, ..Self::default() };
                return self.say(&[ACK, SELF_TEST_PASSED, self.id]);
            }
            _ => return self.say(&[RESEND]),
        }
        self.say(&[ACK]);
    }

    /// The first byte that E9 says.
    fn status(&self) -> u8 {
        let flag = |set: bool, bit: u8| u8::from(set) << bit;
        flag(self.remote, 6)
            | flag(self.enabled, 5)
            | flag(self.doubled, 4)
            | flag(self.buttons & bit(Button::Left) != 0, 2)
            | flag(self.buttons & bit(Button::Middle) != 0, 1)
            | flag(self.buttons & bit(Button::Right) != 0, 0)
    }
}
