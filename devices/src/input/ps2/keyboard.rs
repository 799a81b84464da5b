//! The keyboard: keys become scan codes in a small buffer, commands are answered.
//!
//! ```text
//!   Key --> codes --> keys (16 bytes, then an overrun code) --+
//!                                                             +--> the controller, answers first
//!   commands ------> answers ---------------------------------+
//! ```
//!
//! IBM's PS/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-Key)". Keys do not repeat by
//! themselves: who types sends the repetitions.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::codes::{self, Modifiers, SET_1, SET_2, SET_3};
use crate::input::Key;

/// Bytes of scan codes that the keyboard keeps.
const BUFFER: usize = 16;
/// The longest answer has three bytes; nobody sends commands without reading.
const ANSWERS: usize = 16;
/// Keys that can be held, or wait to be let go.
const MOST_KEYS: usize = 256;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const ECHO: u8 = 0xee;
const SELF_TEST_PASSED: u8 = 0xaa;
/// What a keyboard is (F2): 83 is one of the 101-key kind.
const IDENTITY: [u8; 2] = [0xab, 0x83];
/// 500 ms until the first repetition, 10.9 a second.
const DEFAULT_RATE: u8 = 0x2b;

mod command {
    pub const SET_LEDS: u8 = 0xed;
    pub const ECHO: u8 = 0xee;
    pub const SCAN_CODE_SET: u8 = 0xf0;
    pub const IDENTIFY: u8 = 0xf2;
    pub const SET_RATE: u8 = 0xf3;
    pub const ENABLE: u8 = 0xf4;
    pub const DISABLE: u8 = 0xf5;
    pub const DEFAULTS: u8 = 0xf6;
    pub const ALL_TYPEMATIC: u8 = 0xf7;
    pub const ALL_MAKE_BREAK: u8 = 0xf8;
    pub const ALL_MAKE: u8 = 0xf9;
    pub const ALL_TYPEMATIC_MAKE_BREAK: u8 = 0xfa;
    pub const KEY_TYPEMATIC: u8 = 0xfb;
    pub const KEY_MAKE_BREAK: u8 = 0xfc;
    pub const KEY_MAKE: u8 = 0xfd;
    pub const RESEND: u8 = 0xfe;
    pub const RESET: u8 = 0xff;
}

/// What the next byte is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Argument {
    /// The lights.
    Leds,
    /// The scan code set.
    ScanCodeSet,
    /// How fast keys repeat.
    Rate,
    /// Keys of set 3 that say, or do not say, when they are let go.
    KeyType {
        /// They say it.
        says_release: bool,
    },
}

/// What is saved of the keyboard; also what it works on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyboardState {
    /// Keys become scan codes.
    pub enabled: bool,
    /// 1, 2 or 3.
    pub scan_code_set: u8,
    /// Bit 0 scroll lock, 1 num lock, 2 caps lock.
    pub leds: u8,
    /// As the guest set it.
    pub rate: u8,
    /// What the next byte from the guest is for.
    pub argument: Option<Argument>,
    /// Scan codes that the guest has not taken.
    pub keys: VecDeque<u8>,
    /// Answers to commands that the guest has not taken.
    pub answers: VecDeque<u8>,
    /// The byte that was taken last.
    pub last: u8,
    /// Keys (Linux codes) that the guest knows to be down.
    pub held: BTreeSet<u16>,
    /// Keys that went up while there was no room to say so.
    pub owed: BTreeSet<u16>,
    /// Codes of set 3 that say nothing when the key is let go.
    pub silent: BTreeSet<u8>,
    /// Which modifiers PrintScreen went down with: shift, control, alt.
    pub print_screen: [bool; 3],
}

impl Default for KeyboardState {
    /// As after power-up.
    fn default() -> Self {
        Self {
            enabled: true,
            scan_code_set: SET_2,
            leds: 0,
            rate: DEFAULT_RATE,
            argument: None,
            keys: VecDeque::new(),
            answers: VecDeque::new(),
            last: 0,
            held: BTreeSet::new(),
            owed: BTreeSet::new(),
            silent: BTreeSet::new(),
            print_screen: [false; 3],
        }
    }
}

const SYSRQ: u16 = 99;

impl KeyboardState {
    /// Brings what was read from a file into the limits that hold here.
    pub(super) fn sanitise(&mut self) {
        self.keys.truncate(BUFFER + 1);
        self.answers.truncate(ANSWERS);
        while self.held.len() > MOST_KEYS {
            self.held.pop_last();
        }
        while self.owed.len() > MOST_KEYS {
            self.owed.pop_last();
        }
        if !(SET_1..=SET_3).contains(&self.scan_code_set) {
            self.scan_code_set = SET_2;
        }
    }

    /// A key goes down, once more or for the first time, or up.
    pub(super) fn key(&mut self, key: Key, down: bool) {
        if !self.enabled {
            self.held.remove(&key.0);
            return;
        }
        if !down && !self.held.contains(&key.0) {
            return; // The guest never heard of it.
        }
        let bytes = self.codes(key, down);
        // Who waits to be let go comes first.
        let is_full = !self.owed.is_empty() || self.keys.len() + bytes.len() > BUFFER;
        match (is_full, down) {
            (true, true) => self.overrun(),
            (true, false) => {
                self.held.remove(&key.0);
                self.owed.insert(key.0);
            }
            (false, true) if bytes.is_empty() || self.held.len() >= MOST_KEYS => {}
            (false, _) => {
                if down {
                    self.held.insert(key.0);
                } else {
                    self.held.remove(&key.0);
                }
                self.keys.extend(bytes);
            }
        }
    }

    fn modifiers(&self) -> Modifiers {
        let one_of = |keys: [u16; 2]| keys.iter().any(|key| self.held.contains(key));
        Modifiers { shift: one_of([42, 54]), control: one_of([29, 97]), alt: one_of([56, 100]) }
    }

    fn codes(&mut self, key: Key, down: bool) -> Vec<u8> {
        let mut with = self.modifiers();
        if key.0 == SYSRQ {
            // It goes up as what it went down as.
            if down {
                self.print_screen = [with.shift, with.control, with.alt];
            }
            let [shift, control, alt] = self.print_screen;
            with = Modifiers { shift, control, alt };
        }
        let is_silent = || codes::set_3(key).is_some_and(|code| self.silent.contains(&code));
        if self.scan_code_set == SET_3 && !down && is_silent() {
            return Vec::new();
        }
        codes::bytes(self.scan_code_set, key, down, with)
    }

    /// The buffer is full: its end says so, once.
    fn overrun(&mut self) {
        let code = if self.scan_code_set == SET_1 { 0xff } else { 0 };
        if self.keys.len() <= BUFFER && self.keys.back() != Some(&code) {
            self.keys.push_back(code);
        }
    }

    /// Whether [`KeyboardState::take`] has something.
    pub(super) fn has_byte(&self) -> bool {
        !self.answers.is_empty() || !self.keys.is_empty()
    }

    /// The next byte for the guest.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = match self.answers.pop_front() {
            Some(byte) => byte,
            None => {
                let byte = self.keys.pop_front()?;
                self.pay();
                byte
            }
        };
        self.last = byte;
        Some(byte)
    }

    /// Says of keys that they went up, as there is room again.
    fn pay(&mut self) {
        while let Some(key) = self.owed.first().copied() {
            let bytes = self.codes(Key(key), false);
            if self.keys.len() + bytes.len() > BUFFER {
                return;
            }
            self.owed.remove(&key);
            self.keys.extend(bytes);
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.answers.len() + bytes.len() <= ANSWERS {
            self.answers.extend(bytes);
        }
    }

    fn forget_keys(&mut self) {
        self.keys.clear();
        self.held.clear();
        self.owed.clear();
    }

    /// What F5, F6 and FF make of it.
    fn defaults(&mut self, enabled: bool) {
        self.forget_keys();
        self.enabled = enabled;
        self.scan_code_set = SET_2;
        self.rate = DEFAULT_RATE;
        self.silent.clear();
    }

    /// The guest sends a byte.
    pub(super) fn write(&mut self, byte: u8) {
        // From ED on a byte is a command, whatever was expected.
        match self.argument.take() {
            Some(argument) if byte < command::SET_LEDS => self.argument(argument, byte),
            _ => self.command(byte),
        }
    }

    fn argument(&mut self, argument: Argument, byte: u8) {
        match (argument, byte) {
            (Argument::Leds, 0..=0x7f) => self.leds = byte & 7,
            (Argument::Rate, 0..=0x7f) => self.rate = byte,
            (Argument::ScanCodeSet, 0) => return self.answer(&[ACK, self.scan_code_set]),
            (Argument::ScanCodeSet, SET_1..=SET_3) => {
                self.forget_keys();
                self.scan_code_set = byte;
            }
            (Argument::KeyType { says_release }, _) => {
                if says_release {
                    self.silent.remove(&byte);
                } else {
                    self.silent.insert(byte);
                }
                self.argument = Some(argument); // Until a command comes.
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
    }

    fn command(&mut self, byte: u8) {
        match byte {
            command::SET_LEDS => self.argument = Some(Argument::Leds),
            command::ECHO => return self.answer(&[ECHO]),
            command::SCAN_CODE_SET => self.argument = Some(Argument::ScanCodeSet),
            command::IDENTIFY => return self.answer(&[ACK, IDENTITY[0], IDENTITY[1]]),
            command::SET_RATE => self.argument = Some(Argument::Rate),
            command::ENABLE => {
                self.forget_keys();
                self.enabled = true;
            }
            command::DISABLE => self.defaults(false),
            command::DEFAULTS => self.defaults(true),
            command::ALL_TYPEMATIC | command::ALL_MAKE => self.silent = (0..=0xff).collect(),
            command::ALL_MAKE_BREAK | command::ALL_TYPEMATIC_MAKE_BREAK => self.silent.clear(),
            command::KEY_TYPEMATIC | command::KEY_MAKE => {
                self.argument = Some(Argument::KeyType { says_release: false });
            }
            command::KEY_MAKE_BREAK => {
                self.argument = Some(Argument::KeyType { says_release: true });
            }
            command::RESEND => return self.answer(&[self.last]),
            command::RESET => {
                *self = Self::default();
                return self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
    }
}
