//! What firmware and systems do with the controller, the keyboard and the mouse.

use std::sync::Arc;

use super::*;
use crate::bus::BusDevice;
use crate::input::{Button, InputDevice, InputEvent, Key, RANGE};
use crate::legacy::PowerRequest;
use crate::legacy::testing::{TestLine, TestPower, hammer};

const A: Key = Key(30);
/// What a silent device says.
const NOTHING: [u8; 0] = [];
const UP: Key = Key(103);

struct Pc {
    controller: Arc<I8042>,
    data: Arc<dyn BusDevice>,
    command: Arc<dyn BusDevice>,
    power: Arc<TestPower>,
    irq_1: Arc<TestLine>,
    irq_12: Arc<TestLine>,
}

impl Pc {
    fn new() -> Self {
        let (power, irq_1, irq_12) = (Arc::default(), Arc::default(), Arc::default());
        let power: Arc<TestPower> = power;
        let irq_1: Arc<TestLine> = irq_1;
        let irq_12: Arc<TestLine> = irq_12;
        let controller = I8042::new(power.clone(), irq_1.clone(), irq_12.clone());
        let (data, command) = (controller.data_port(), controller.command_port());
        Self { controller, data, command, power, irq_1, irq_12 }
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.command.read(0, &mut byte);
        byte[0]
    }

    fn read(&self) -> u8 {
        let mut byte = [0];
        self.data.read(0, &mut byte);
        byte[0]
    }

    /// Everything that waits: of the keyboard or the controller, and of the mouse.
    fn drain(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut keyboard, mut mouse) = (Vec::new(), Vec::new());
        for _ in 0..10_000 {
            match self.status() & 0x21 {
                0x21 => mouse.push(self.read()),
                1 => keyboard.push(self.read()),
                _ => return (keyboard, mouse),
            }
        }
        panic!("the controller never gets empty");
    }

    fn keyboard(&self) -> Vec<u8> {
        let (keyboard, mouse) = self.drain();
        assert!(mouse.is_empty(), "{mouse:x?}");
        keyboard
    }

    fn mouse(&self) -> Vec<u8> {
        let (keyboard, mouse) = self.drain();
        assert!(keyboard.is_empty(), "{keyboard:x?}");
        mouse
    }

    /// A command to the controller, and its answer.
    fn control(&self, bytes: &[u8]) -> Vec<u8> {
        self.command.write(0, &bytes[..1]);
        for byte in &bytes[1..] {
            self.data.write(0, &[*byte]);
        }
        self.keyboard()
    }

    /// Bytes to the keyboard, and what it says.
    fn to_keyboard(&self, bytes: &[u8]) -> Vec<u8> {
        let mut said = Vec::new();
        for byte in bytes {
            self.data.write(0, &[*byte]);
            said.extend(self.keyboard());
        }
        said
    }

    fn to_mouse(&self, bytes: &[u8]) -> Vec<u8> {
        let mut said = Vec::new();
        for byte in bytes {
            self.command.write(0, &[0xd4]);
            self.data.write(0, &[*byte]);
            said.extend(self.mouse());
        }
        said
    }

    fn send(&self, events: &[InputEvent]) {
        self.controller.send(events);
    }

    fn press(&self, key: Key) -> Vec<u8> {
        self.send(&[InputEvent::Key(key, true)]);
        self.keyboard()
    }

    fn release(&self, key: Key) -> Vec<u8> {
        self.send(&[InputEvent::Key(key, false)]);
        self.keyboard()
    }
}

#[test]
fn seabios_starts_the_keyboard() {
    let pc = Pc::new();
    assert_eq!(pc.control(&[0xad]), NOTHING);
    assert_eq!(pc.control(&[0xa7]), NOTHING);
    assert_eq!(pc.control(&[0xaa]), [0x55]);
    assert_ne!(pc.status() & 4, 0, "the self test has passed");
    assert_eq!(pc.control(&[0xab]), [0]);
    pc.control(&[0x60, 0x30]);
    assert_eq!(pc.to_keyboard(&[0xff]), [0xfa, 0xaa]);
    assert_eq!(pc.to_keyboard(&[0xf5, 0xf0, 0x02]), [0xfa; 3]);
    assert_eq!(pc.press(A), NOTHING, "not yet");
    pc.control(&[0x60, 0x61]);
    assert_eq!(pc.to_keyboard(&[0xf4]), [0xfa]);
    let edges = pc.irq_1.edges();
    assert_eq!((pc.press(A), pc.release(A)), (vec![0x1e], vec![0x9e]));
    assert_eq!((pc.press(UP), pc.release(UP)), (vec![0xe0, 0x48], vec![0xe0, 0xc8]));
    assert_eq!(pc.irq_1.edges() - edges, 6, "each byte is an edge");
    assert!(!pc.irq_1.level());
    assert_eq!(pc.irq_12.edges(), 0);
}

#[test]
fn linux_finds_the_mouse_port() {
    let pc = Pc::new();
    // i8042_controller_check, _init and i8042_check_aux.
    let control = pc.control(&[0x20])[0];
    pc.control(&[0x60, control | 0x30]);
    assert_eq!(pc.control(&[0x20]), [control | 0x30]);
    pc.command.write(0, &[0xd3]);
    pc.data.write(0, &[0x5a]);
    assert_eq!(
        (pc.status() & 0x21, pc.drain().1),
        (0x21, vec![0x5a]),
        "it comes back as the mouse's"
    );
    assert_eq!(pc.control(&[0xa9]), [0]);
    pc.control(&[0xa7]);
    assert_eq!(pc.control(&[0x20])[0] & 0x20, 0x20);
    pc.control(&[0xa8]);
    assert_eq!(pc.control(&[0x20])[0] & 0x20, 0);
    // The interrupt is tried out with a byte that comes back.
    pc.control(&[0x60, (control & !0x20) | 2]);
    pc.command.write(0, &[0xd3]);
    pc.data.write(0, &[0xa5]);
    assert!(pc.irq_12.level());
    assert_eq!(pc.mouse(), [0xa5]);
    assert!(!pc.irq_12.level());
    // A byte that waits interrupts as soon as that is allowed.
    pc.control(&[0x60, 0x40]);
    pc.command.write(0, &[0xd2]);
    pc.data.write(0, &[0x12]);
    assert!(!pc.irq_1.level());
    pc.command.write(0, &[0x60]);
    pc.data.write(0, &[0x41]);
    assert!(pc.irq_1.level());
    assert_eq!(pc.keyboard(), [0x12]);
    assert_eq!(pc.read(), 0x12, "the last byte stays to be seen");
}

#[test]
fn psmouse_finds_wheel_and_buttons() {
    let pc = Pc::new();
    assert_eq!(pc.to_mouse(&[0xf2]), [0xfa, 0]);
    assert_eq!(pc.to_mouse(&[0xf6]), [0xfa]);
    assert_eq!(pc.to_mouse(&[0xe1]), [0xfe], "not a TrackPoint");
    assert_eq!(
        pc.to_mouse(&[0xe8, 0, 0xe6, 0xe6, 0xe6, 0xe9]),
        [0xfa, 0xfa, 0xfa, 0xfa, 0xfa, 0xfa, 0, 0, 100]
    );
    assert_eq!(pc.to_mouse(&[0xff]), [0xfa, 0xaa, 0]);
    assert_eq!(pc.to_mouse(&[0xf3, 200, 0xf3, 100, 0xf3, 80]), [0xfa; 6]);
    assert_eq!(pc.to_mouse(&[0xf2]), [0xfa, 3]);
    assert_eq!(pc.to_mouse(&[0xf3, 200, 0xf3, 200, 0xf3, 80]), [0xfa; 6]);
    assert_eq!(pc.to_mouse(&[0xf2]), [0xfa, 4]);
    assert_eq!(pc.to_mouse(&[0xf3, 100, 0xe8, 3, 0xe6, 0xf4]), [0xfa; 6]);
    assert_eq!(pc.to_mouse(&[0xe9]), [0xfa, 0x20, 3, 100]);
    pc.send(&[InputEvent::Moved { dx: 3, dy: -4 }, InputEvent::Wheel(1)]);
    assert_eq!(pc.mouse(), [0x08, 3, 4, 0x0f], "up is positive; the wheel's up is negative");
    pc.send(&[InputEvent::Button(Button::Side, true), InputEvent::Button(Button::Extra, true)]);
    assert_eq!(pc.mouse(), [8, 0, 0, 0x10, 8, 0, 0, 0x30]);
}

#[test]
fn packets_carry_large_movements_and_every_click() {
    let pc = Pc::new();
    assert_eq!(pc.to_mouse(&[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4]), [0xfa; 7]);
    let edges = pc.irq_12.edges();
    pc.send(&[InputEvent::Moved { dx: -300, dy: 10 }, InputEvent::Wheel(-9)]);
    assert_eq!(pc.mouse(), [0x38, 1, 0xf6, 7, 0x18, 0xd3, 0, 2]);
    assert_eq!(pc.irq_12.edges() - edges, 8);
    pc.send(&[InputEvent::Moved { dx: 1, dy: 0 }]);
    for _ in 0..3 {
        pc.send(&[InputEvent::Button(Button::Left, true)]);
        pc.send(&[InputEvent::Button(Button::Left, false)]);
    }
    pc.send(&[InputEvent::Button(Button::Right, true), InputEvent::Button(Button::Middle, true)]);
    let packets = pc.mouse();
    let buttons: Vec<u8> = packets.chunks(4).map(|packet| packet[0]).collect();
    assert_eq!(buttons, [8, 9, 8, 9, 8, 9, 8, 0xa, 0xe]);
}

#[test]
fn places_become_movements_in_the_picture() {
    let pc = Pc::new();
    pc.to_mouse(&[0xf4]);
    pc.send(&[InputEvent::At { x: RANGE / 2, y: RANGE / 2 }]);
    pc.drain();
    pc.send(&[InputEvent::At { x: RANGE / 2 + 33, y: RANGE / 2 - 43 }]);
    assert_eq!(pc.mouse(), [0x08, 1, 1]);
    pc.controller.set_picture_size(2048, 1536);
    pc.send(&[InputEvent::At { x: 0, y: 0 }]);
    pc.drain();
    pc.send(&[InputEvent::At { x: RANGE, y: u16::MAX }]);
    let packets = pc.mouse();
    let sum = |sign: u8, at: usize| -> i32 {
        let one = |p: &[u8]| i32::from(p[at]) - if p[0] & sign != 0 { 256 } else { 0 };
        packets.chunks(3).map(one).sum()
    };
    assert_eq!((sum(0x10, 1), sum(0x20, 2)), (2047, -1535));
    pc.controller.set_picture_size(0, u32::MAX);
    pc.send(&[InputEvent::At { x: 5, y: 5 }, InputEvent::At { x: 500, y: 500 }]);
    pc.drain();
}

#[test]
fn remote_and_wrap_modes() {
    let pc = Pc::new();
    assert_eq!(pc.to_mouse(&[0xf0]), [0xfa]);
    pc.send(&[InputEvent::Moved { dx: 5, dy: 0 }, InputEvent::Moved { dx: 5, dy: 0 }]);
    assert_eq!(pc.mouse(), NOTHING, "only when asked");
    assert_eq!(pc.to_mouse(&[0xeb, 0xeb]), [0xfa, 8, 10, 0, 0xfa, 8, 0, 0]);
    assert_eq!(pc.to_mouse(&[0xfe]), [0xfa, 8, 0, 0]);
    assert_eq!(pc.to_mouse(&[0xe9]), [0xfa, 0x40, 2, 100]);
    assert_eq!(
        pc.to_mouse(&[0xee, 0x12, 0xf4, 0xec, 0xe7, 0xea, 0xf4]),
        [0xfa, 0x12, 0xf4, 0xfa, 0xfa, 0xfa, 0xfa]
    );
    pc.send(&[InputEvent::Moved { dx: 4, dy: 10 }]);
    assert_eq!(pc.mouse(), [0x28, 6, 0xec], "doubled");
    assert_eq!(pc.to_mouse(&[0xe8, 7]), [0xfa, 0xfe], "no such resolution");
    // A command in the middle of a packet ends it.
    pc.send(&[InputEvent::Moved { dx: 1, dy: 1 }]);
    pc.read();
    pc.command.write(0, &[0xd4]);
    pc.data.write(0, &[0xf5]);
    assert_eq!(pc.mouse().last(), Some(&0xfa));
}

#[test]
fn scan_code_sets_and_keyboard_commands() {
    let pc = Pc::new();
    assert_eq!(pc.to_keyboard(&[0xf2]), [0xfa, 0xab, 0x41], "translated");
    assert_eq!(pc.to_keyboard(&[0xf0, 0]), [0xfa, 0xfa, 0x41], "set 2, translated");
    pc.control(&[0x60, 0x01]);
    assert_eq!(pc.to_keyboard(&[0xf2]), [0xfa, 0xab, 0x83]);
    assert_eq!((pc.press(UP), pc.release(UP)), (vec![0xe0, 0x75], vec![0xe0, 0xf0, 0x75]));
    assert_eq!(pc.to_keyboard(&[0xf0, 3, 0xf0, 0]), [0xfa, 0xfa, 0xfa, 0xfa, 3]);
    assert_eq!((pc.press(UP), pc.release(UP)), (vec![0x63], vec![0xf0, 0x63]));
    assert_eq!(pc.to_keyboard(&[0xfd, 0x63, 0x1c]), [0xfa; 3]);
    assert_eq!(
        (pc.press(UP), pc.release(UP), pc.press(A), pc.release(A)),
        (vec![0x63], vec![], vec![0x1c], vec![])
    );
    assert_eq!(pc.to_keyboard(&[0xf8]), [0xfa]);
    assert_eq!((pc.press(A), pc.release(A)), (vec![0x1c], vec![0xf0, 0x1c]));
    assert_eq!(pc.to_keyboard(&[0xf0, 1]), [0xfa; 2]);
    assert_eq!((pc.press(A), pc.release(A)), (vec![0x1e], vec![0x9e]));
    assert_eq!(pc.to_keyboard(&[0xf0, 9]), [0xfa, 0xfe]);
    assert_eq!(pc.to_keyboard(&[0xed, 7, 0xf3, 0x20]), [0xfa; 4]);
    assert_eq!((pc.controller.save().keyboard.leds, pc.controller.save().keyboard.rate), (7, 0x20));
    assert_eq!(pc.to_keyboard(&[0xed, 0xee, 0xef]), [0xfa, 0xee, 0xfe], "a command is a command");
    assert_eq!(pc.to_keyboard(&[0xfe]), [0xfe], "the last byte again");
    assert_eq!(pc.to_keyboard(&[0xf5]), [0xfa]);
    assert_eq!((pc.press(A), pc.controller.wants(&InputEvent::Key(A, true))), (vec![], false));
    assert_eq!(pc.to_keyboard(&[0xf6]), [0xfa]);
    assert_eq!(pc.press(A), [0x1c], "set 2 again, and on");
}

#[test]
fn pause_and_print_screen() {
    let pc = Pc::new();
    let (pause, print, control, alt) = (Key(119), Key(99), Key(29), Key(56));
    assert_eq!(
        (pc.press(pause), pc.release(pause)),
        (vec![0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5], vec![])
    );
    assert_eq!(pc.press(print), [0xe0, 0x2a, 0xe0, 0x37]);
    assert_eq!(pc.release(print), [0xe0, 0xb7, 0xe0, 0xaa]);
    pc.press(control);
    assert_eq!(pc.press(pause), [0xe0, 0x46, 0xe0, 0xc6]);
    assert_eq!(pc.press(print), [0xe0, 0x37]);
    pc.release(control);
    assert_eq!(pc.release(print), [0xe0, 0xb7], "up as it went down");
    pc.press(alt);
    assert_eq!((pc.press(print), pc.release(print)), (vec![0x54], vec![0xd4]));
}

#[test]
fn a_full_keyboard_says_so_and_lets_every_key_go() {
    let pc = Pc::new();
    pc.control(&[0x60, 0x01]);
    for code in 2..30 {
        pc.send(&[InputEvent::Key(Key(code), true)]);
    }
    for code in 2..30 {
        pc.send(&[InputEvent::Key(Key(code), false)]);
    }
    assert!(pc.controller.save().keyboard.keys.len() <= 17);
    let said = pc.keyboard();
    let presses = said.iter().position(|byte| *byte == 0).expect("an overrun");
    let released = said[presses + 1..].chunks(2).map(|pair| {
        assert_eq!(pair[0], 0xf0);
        pair[1]
    });
    let (mut pressed, mut released) = (said[..presses].to_vec(), released.collect::<Vec<_>>());
    pressed.sort();
    released.sort();
    assert_eq!(pressed.len(), 17, "sixteen, and the one in the controller");
    assert_eq!(pressed, released);
    let keyboard = pc.controller.save().keyboard;
    assert!(keyboard.held.is_empty() && keyboard.owed.is_empty());
    // Repetitions are keys as well.
    assert_eq!(
        (pc.press(A), pc.press(A), pc.release(A)),
        (vec![0x1c], vec![0x1c], vec![0xf0, 0x1c])
    );
}

#[test]
fn answers_come_before_keys() {
    let pc = Pc::new();
    pc.send(&[InputEvent::Key(UP, true), InputEvent::Key(A, true)]);
    pc.data.write(0, &[0xed]);
    pc.data.write(0, &[0]);
    assert_eq!(pc.keyboard(), [0xe0, 0xfa, 0xfa, 0x48, 0x1e]);
    pc.send(&[InputEvent::Key(A, true)]);
    pc.command.write(0, &[0xad]);
    pc.command.write(0, &[0x20]);
    assert_eq!((pc.read(), pc.read()), (0x1e, 0x53), "with the keyboard held back");
    pc.send(&[InputEvent::Key(A, false)]);
    assert_eq!(pc.status() & 1, 0);
    pc.command.write(0, &[0xae]);
    assert_eq!(pc.keyboard(), [0x9e]);
}

#[test]
fn the_ways_to_reset() {
    let pc = Pc::new();
    assert_eq!(pc.status() & 3, 0, "nothing to read, ready for a command");
    pc.command.write(0, &[0xfe]);
    assert_eq!(pc.power.take(), [PowerRequest::Reset]);
    pc.command.write(0, &[0xff]);
    pc.data.write(0, &[0]);
    assert_eq!(pc.power.take(), [], "pulsing nothing, and a byte for the keyboard");
    pc.drain();
    assert_eq!(pc.control(&[0xd0]), [0xc3]);
    pc.command.write(0, &[0xd1]);
    pc.data.write(0, &[0xdd]);
    assert_eq!(pc.power.take(), []);
    assert_eq!(pc.control(&[0xd0])[0] & 3, 1, "A20 as it was asked for");
    pc.control(&[0xdf]);
    assert_eq!(pc.control(&[0xd0])[0] & 3, 3);
    pc.command.write(0, &[0xd1]);
    pc.data.write(0, &[0xfe]);
    assert_eq!(pc.power.take(), [PowerRequest::Reset]);
    pc.controller.reset();
    assert_eq!(pc.controller.save(), I8042State::default());
}

#[test]
fn saved_in_the_middle_it_goes_on() {
    let pc = Pc::new();
    pc.to_mouse(&[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4]);
    pc.send(&[InputEvent::Key(UP, true), InputEvent::Key(A, true)]);
    pc.send(&[InputEvent::Moved { dx: 700, dy: 3 }, InputEvent::Button(Button::Left, true)]);
    pc.send(&[InputEvent::Key(UP, false)]);
    pc.data.write(0, &[0xed]);
    pc.command.write(0, &[0x61]);
    pc.read();
    let text = serde_json::to_string(&pc.controller.save()).unwrap();
    let other = Pc::new();
    other.controller.restore(&serde_json::from_str(&text).unwrap());
    assert_eq!(other.irq_1.level(), pc.irq_1.level());
    for pc in [&pc, &other] {
        pc.data.write(0, &[0x77]);
        pc.data.write(0, &[0x02]);
    }
    assert_eq!(pc.drain(), other.drain());
    assert_eq!(pc.controller.save(), other.controller.save());
    assert_eq!(pc.controller.save().keyboard.leds, 2);
    let empty: I8042State = serde_json::from_str("{}").unwrap();
    assert_eq!(empty, I8042State::default());
    // A file that says too much.
    let mut state = empty;
    state.keyboard.keys = vec![0xf0; 5000].into();
    state.keyboard.scan_code_set = 77;
    state.mouse.reports =
        vec![Report { dx: i32::MIN, dy: i32::MAX, wheel: 0, buttons: 9 }; 500].into();
    state.mouse.enabled = true;
    pc.controller.restore(&state);
    pc.send(&[InputEvent::Moved { dx: i32::MIN, dy: i32::MAX }, InputEvent::Key(A, true)]);
    pc.drain();
}

#[test]
fn random_accesses_do_no_harm() {
    let pc = Pc::new();
    let mut seed = 88_172_645_463_325_252_u64;
    for round in 0..60_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let [kind, byte, low, high, ..] = seed.to_le_bytes();
        let word = u16::from_le_bytes([low, high]);
        match kind % 12 {
            0 => pc.command.write(0, &[byte]),
            1 => pc.command.write(0, &[0xd4]),
            2 | 3 => pc.data.write(0, &[byte]),
            4 => pc.data.write(0, &[0xe0 | byte]),
            5 => pc.send(&[InputEvent::Key(Key(word % 300), byte & 1 != 0)]),
            6 => pc.send(&[InputEvent::Moved { dx: seed as i32, dy: (seed >> 32) as i32 }]),
            7 => pc.send(&[
                InputEvent::Button(Button::Extra, byte & 1 != 0),
                InputEvent::Wheel(seed as i32),
            ]),
            8 => pc.send(&[InputEvent::At { x: word, y: !word }]),
            9 => pc.controller.set_picture_size(seed as u32, u32::from(byte)),
            _ => {
                pc.status();
                pc.read();
            }
        }
        let state = pc.controller.save();
        assert!(state.keyboard.keys.len() <= 17 && state.keyboard.answers.len() <= 16);
        assert!(state.mouse.bytes.len() <= 16 && state.mouse.reports.len() <= 32);
        assert!(state.keyboard.held.len() <= 256 && state.keyboard.owed.len() <= 256);
        let full = state.output.is_some();
        assert_eq!(pc.status() & 1 != 0, full);
        assert!(full || !(pc.irq_1.level() || pc.irq_12.level()), "round {round}");
    }
    pc.power.take();
    hammer(&*pc.data, 1, 10_000);
    hammer(&*pc.command, 1, 10_000);
    // And then it works again.
    pc.controller.reset();
    assert_eq!(pc.press(A), [0x1e]);
}
