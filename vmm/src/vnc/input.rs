//! A client's keyboard and pointer: from its messages to what the guest's devices are told.
//!
//! - Keys with a scan code go through as they are. Keysyms become keys of a US keyboard, with Shift pressed (or let go)
//!   around them where the keysym needs it: many programs send "A" without ever pressing Shift.
//! - A pointer's place is where it is, or how far it went where the guest's mouse knows no places.
//! - What a client holds when it goes is let go.

use std::collections::BTreeSet;
use std::sync::Arc;

use lodge_devices::input::{Button, InputEvent, Key, RANGE};

use super::keys::{self, CAPS_LOCK, LEFT_SHIFT, RIGHT_SHIFT, Shift};

/// Where input goes: to the guest's devices.
pub trait InputSink: Send + Sync {
    /// Takes events that belong together. Must not wait for the guest.
    fn send(&self, events: &[InputEvent]);

    /// Whether the guest listens to a pointer that has places ([`InputEvent::At`]). Where it does not, clients are asked
    /// for movements, or their places are made into movements.
    fn takes_places(&self) -> bool {
        true
    }
}

impl<F: Fn(&[InputEvent]) + Send + Sync> InputSink for F {
    fn send(&self, events: &[InputEvent]) {
        self(events);
    }
}

/// Bits of the protocol's button mask (RFC 6143, section 7.5.5; rfbproto, ExtendedMouseButtons) that are buttons.
const BUTTONS: [(u16, Button); 5] = [
    (1 << 0, Button::Left),
    (1 << 1, Button::Middle),
    (1 << 2, Button::Right),
    (1 << 7, Button::Side),
    (1 << 8, Button::Extra),
];
/// Bits that are the wheel, one notch for each time that they are set.
const WHEEL: [(u16, i32); 2] = [(1 << 3, 1), (1 << 4, -1)];
/// No movement, where places are movements (rfbproto, QEMU Pointer Motion Change Pseudo-encoding).
const NO_MOVE: i32 = 0x7fff;
/// More keys than a keyboard has are not held.
const MOST_HELD: usize = 256;

/// How a client says where its pointer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Motion {
    /// Where it is on a picture of this size.
    Place(u32, u32),
    /// How far it went.
    Distance,
}

/// What one client does.
pub struct Input {
    sink: Arc<dyn InputSink>,
    held: BTreeSet<Key>,
    /// Caps Lock, as far as this client has switched it.
    caps: bool,
    buttons: u16,
    place: Option<(u16, u16)>,
}

impl Input {
    /// A client that holds nothing.
    pub fn new(sink: Arc<dyn InputSink>) -> Self {
        Self { sink, held: BTreeSet::new(), caps: false, buttons: 0, place: None }
    }

    /// A key goes down or up; a scan code of 0 is none.
    pub fn key(&mut self, keysym: u32, scancode: u32, down: bool) {
        if let Some(key) = keys::of_scancode(scancode) {
            return self.press(key, down);
        }
        let Some((key, shift)) = keys::of_keysym(keysym) else {
            return tracing::debug!(keysym, scancode, "a VNC client's key is on no keyboard");
        };
        if !down || !self.has_wrong_shift(shift) {
            return self.press(key, down);
        }
        let shifts: Vec<Key> =
            [LEFT_SHIFT, RIGHT_SHIFT].into_iter().filter(|key| self.held.contains(key)).collect();
        let mut events = Vec::with_capacity(5);
        // Either the held ones go up around the key, or one goes down.
        let around =
            if shifts.is_empty() { (&[LEFT_SHIFT][..], true) } else { (&shifts[..], false) };
        events.extend(around.0.iter().map(|key| InputEvent::Key(*key, around.1)));
        events.push(InputEvent::Key(key, true));
        events.extend(around.0.iter().map(|key| InputEvent::Key(*key, !around.1)));
        self.hold(key, true);
        self.sink.send(&events);
    }

    fn has_wrong_shift(&self, shift: Shift) -> bool {
        let wanted = match shift {
            Shift::Any => return false,
            Shift::Up => false,
            Shift::Down => true,
            Shift::Small => self.caps,
            Shift::Capital => !self.caps,
        };
        let is_down = self.held.contains(&LEFT_SHIFT) || self.held.contains(&RIGHT_SHIFT);
        wanted != is_down
    }

    fn press(&mut self, key: Key, down: bool) {
        // A second "down" is the client's repetition of a held key, which a guest's firmware wants to see.
        if self.hold(key, down) {
            self.sink.send(&[InputEvent::Key(key, down)]);
        }
    }

    /// Remembers what is held. False if nothing held is let go.
    fn hold(&mut self, key: Key, down: bool) -> bool {
        if !down {
            return self.held.remove(&key);
        }
        let is_new = self.held.len() < MOST_HELD && self.held.insert(key);
        if key == CAPS_LOCK && is_new {
            self.caps = !self.caps;
        }
        true
    }

    /// The pointer moves, or its buttons do.
    pub fn pointer(&mut self, buttons: u16, x: u16, y: u16, motion: Motion) {
        let mut events = Vec::with_capacity(8);
        self.motion(x, y, motion, &mut events);
        for (bit, button) in BUTTONS {
            if (buttons ^ self.buttons) & bit != 0 {
                events.push(InputEvent::Button(button, buttons & bit != 0));
            }
        }
        for (bit, notches) in WHEEL {
            if buttons & !self.buttons & bit != 0 {
                events.push(InputEvent::Wheel(notches));
            }
        }
        self.buttons = buttons;
        if !events.is_empty() {
            self.sink.send(&events);
        }
    }

    fn motion(&mut self, x: u16, y: u16, motion: Motion, events: &mut Vec<InputEvent>) {
        let moved = |dx, dy| (dx, dy) != (0, 0);
        match motion {
            Motion::Distance => {
                let (dx, dy) = (i32::from(x) - NO_MOVE, i32::from(y) - NO_MOVE);
                events.extend(moved(dx, dy).then_some(InputEvent::Moved { dx, dy }));
            }
            Motion::Place(width, height) => {
                let last = self.place.replace((x, y));
                if last == Some((x, y)) {
                    return;
                }
                if self.sink.takes_places() {
                    events.push(InputEvent::At { x: scale(x, width), y: scale(y, height) });
                } else if let Some((last_x, last_y)) = last {
                    let dx = i32::from(x) - i32::from(last_x);
                    let dy = i32::from(y) - i32::from(last_y);
                    events.push(InputEvent::Moved { dx, dy });
                }
            }
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let keys = self.held.iter().map(|key| InputEvent::Key(*key, false));
        let down = BUTTONS.into_iter().filter(|(bit, _)| self.buttons & bit != 0);
        let buttons = down.map(|(_, button)| InputEvent::Button(button, false));
        let events: Vec<_> = keys.chain(buttons).collect();
        if !events.is_empty() {
            self.sink.send(&events);
        }
    }
}

/// A pixel's column or row, of so many, as a place of the input devices.
fn scale(at: u16, of: u32) -> u16 {
    let last = of.saturating_sub(1).max(1);
    // At most RANGE, which fits.
    (u32::from(at).min(last) * u32::from(RANGE) / last) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use InputEvent::{At, Moved, Wheel};
    use std::sync::Mutex;

    #[derive(Default)]
    struct Sink {
        events: Mutex<Vec<InputEvent>>,
        only_moves: bool,
    }

    impl InputSink for Sink {
        fn send(&self, events: &[InputEvent]) {
            self.events.lock().unwrap().extend(events);
        }

        fn takes_places(&self) -> bool {
            !self.only_moves
        }
    }

    impl Sink {
        fn take(&self) -> Vec<InputEvent> {
            std::mem::take(&mut self.events.lock().unwrap())
        }

        /// Keys as numbers, negative ones go up.
        fn keys(&self) -> Vec<i32> {
            let number = |event| match event {
                InputEvent::Key(Key(code), true) => i32::from(code),
                InputEvent::Key(Key(code), false) => -i32::from(code),
                other => panic!("{other:?}"),
            };
            self.take().into_iter().map(number).collect()
        }
    }

    fn input() -> (Arc<Sink>, Input) {
        let sink = Arc::new(Sink::default());
        (sink.clone(), Input::new(sink))
    }

    #[test]
    fn shift_is_pressed_where_a_keysym_needs_it() {
        let (sink, mut input) = input();
        let mut sym = |keysym: u32, down| {
            input.key(keysym, 0, down);
            sink.keys()
        };
        assert_eq!(sym('a'.into(), true), [30]);
        assert_eq!(sym('a'.into(), false), [-30]);
        assert_eq!(sym('A'.into(), true), [42, 30, -42]);
        assert_eq!(sym('A'.into(), false), [-30]);
        assert_eq!(sym('?'.into(), true), [42, 53, -42]);
        assert_eq!(sym('/'.into(), false), [-53]);
        // With Shift held by the client.
        assert_eq!(sym(0xffe2, true), [54]);
        assert_eq!(sym('A'.into(), true), [30]);
        assert_eq!(sym('A'.into(), false), [-30]);
        // A slash with Shift, as on a German keyboard.
        assert_eq!(sym('/'.into(), true), [-54, 53, 54]);
        assert_eq!(sym('/'.into(), false), [-53]);
        assert_eq!(sym(0xff09, true), [15]);
        assert_eq!(sym(0xff09, false), [-15]);
        assert_eq!(sym(0xffe2, false), [-54]);
        // With Caps Lock: capitals need no Shift, signs still do.
        assert_eq!(sym(0xffe5, true), [58]);
        assert_eq!(sym(0xffe5, false), [-58]);
        assert_eq!(sym('A'.into(), true), [30]);
        assert_eq!(sym('a'.into(), true), [42, 30, -42]);
        assert_eq!(sym('!'.into(), true), [42, 2, -42]);
        assert_eq!(sym('1'.into(), true), [2]);
        assert!(sym(0x1234, true).is_empty());
    }

    #[test]
    fn scancodes_need_no_layout() {
        let (sink, mut input) = input();
        input.key('A'.into(), 0x1e, true);
        input.key('A'.into(), 0x1e, true);
        input.key(0, 0x1e, false);
        input.key(0, 0x1e, false);
        assert_eq!(sink.keys(), [30, 30, -30]);
        // One that no keyboard has: the keysym tells.
        input.key('b'.into(), 0x7f, true);
        assert_eq!(sink.keys(), [48]);
    }

    #[test]
    fn what_is_held_is_let_go_at_the_end() {
        let (sink, mut input) = input();
        input.key(0xffe3, 0, true);
        input.key('c'.into(), 0, true);
        input.key('c'.into(), 0, false);
        input.pointer(0b101, 0, 0, Motion::Place(10, 10));
        sink.take();
        drop(input);
        let events = sink.take();
        assert_eq!(events.len(), 3);
        for event in [
            InputEvent::Key(Key(29), false),
            InputEvent::Button(Button::Left, false),
            InputEvent::Button(Button::Right, false),
        ] {
            assert!(events.contains(&event), "{event:?}");
        }
    }

    #[test]
    fn places_are_scaled() {
        let (sink, mut input) = input();
        let size = Motion::Place(640, 480);
        input.pointer(0, 639, 479, size);
        assert_eq!(sink.take(), [At { x: RANGE, y: RANGE }]);
        input.pointer(1, 0, 0, size);
        assert_eq!(sink.take(), [At { x: 0, y: 0 }, InputEvent::Button(Button::Left, true)]);
        input.pointer(1, 0, 0, size);
        assert_eq!(sink.take(), []);
        input.pointer(0b1_1000_0000, 60_000, 60_000, size);
        assert_eq!(sink.take().len(), 4);
        input.pointer(0, 5, 5, Motion::Place(0, 1));
        sink.take();
    }

    #[test]
    fn the_wheel_turns_once_for_each_press() {
        let (sink, mut input) = input();
        let size = Motion::Place(640, 480);
        input.pointer(0, 1, 1, size);
        sink.take();
        for buttons in [0b1000, 0b1000, 0, 0b1_0000, 0] {
            input.pointer(buttons, 1, 1, size);
        }
        assert_eq!(sink.take(), [Wheel(1), Wheel(-1)]);
    }

    #[test]
    fn mice_are_told_movements() {
        let sink = Arc::new(Sink { only_moves: true, ..Sink::default() });
        let mut input = Input::new(sink.clone());
        input.pointer(0, 100, 100, Motion::Place(640, 480));
        input.pointer(0, 90, 105, Motion::Place(640, 480));
        assert_eq!(sink.take(), [Moved { dx: -10, dy: 5 }]);
        input.pointer(0, 0x7fff, 0x7fff, Motion::Distance);
        input.pointer(0, 0x7ffe, 0x8001, Motion::Distance);
        assert_eq!(sink.take(), [Moved { dx: -1, dy: 2 }]);
    }
}
