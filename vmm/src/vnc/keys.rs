//! From what clients call keys to Linux event codes, the places on the keyboard.
//!
//! ```text
//!   XT scan code (QEMU's extended key event) --> code             whatever the layouts are
//!   X11 keysym (RFC 6143, section 7.5.4)     --> code and Shift   as on a US keyboard
//! ```

use lodge_devices::input::Key;

/// `KEY_LEFTSHIFT`.
pub const LEFT_SHIFT: Key = Key(42);
/// `KEY_RIGHTSHIFT`.
pub const RIGHT_SHIFT: Key = Key(54);
/// `KEY_CAPSLOCK`.
pub const CAPS_LOCK: Key = Key(58);

/// The key of an XT scan code: one byte, or with bit 7 set the byte after 0xe0 (rfbproto, QEMU Extended Key Event
/// Message).
pub fn of_scancode(code: u32) -> Option<Key> {
    let key = match code {
        // Linux took the codes of these over.
        0x01..=0x53 | 0x56..=0x58 => code as u16,
        0x54 | 0xb7 => 99,
        0x59 => 117,
        0x5d => 183,
        0x5e => 184,
        0x5f => 185,
        0x70 => 93,
        0x71 => 123,
        0x72 => 122,
        0x73 => 89,
        0x79 => 92,
        0x7b => 94,
        0x7d => 124,
        0x7e => 121,
        0x90 => 165,
        0x99 => 163,
        0x9c => 96,
        0x9d => 97,
        0xa0 => 113,
        0xa1 => 140,
        0xa2 => 164,
        0xa4 => 166,
        0xae => 114,
        0xb0 => 115,
        0xb2 => 172,
        0xb5 => 98,
        0xb8 => 100,
        0xc6 => 119,
        0xc7..=0xc9 => (code - 0xc7 + 102) as u16,
        0xcb => 105,
        0xcd => 106,
        0xcf..=0xd3 => (code - 0xcf + 107) as u16,
        0xdb => 125,
        0xdc => 126,
        0xdd => 127,
        0xde => 116,
        0xdf => 142,
        0xe3 => 143,
        0xe5 => 217,
        0xe6 => 156,
        0xe7 => 173,
        0xe8 => 128,
        0xe9 => 159,
        0xea => 158,
        0xeb => 157,
        0xec => 155,
        0xed => 226,
        _ => return None,
    };
    Some(Key(key))
}

/// What a keysym needs of the Shift keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// They change nothing: Enter, the arrows.
    Any,
    /// One must be down.
    Down,
    /// None may be down.
    Up,
    /// A small letter: as `Up`, with Caps Lock the other way round.
    Small,
    /// A capital letter: as `Down`, with Caps Lock the other way round.
    Capital,
}

/// The digits' and signs' keys of a US keyboard, from left to right and top to bottom, without and with Shift, and the
/// first one's code.
const ROWS: [(u16, &[u8], &[u8]); 4] = [
    (2, b"1234567890-=", b"!@#$%^&*()_+"),
    (16, b"qwertyuiop[]", b"QWERTYUIOP{}"),
    (30, b"asdfghjkl;'`", b"ASDFGHJKL:\"~"),
    (43, b"\\zxcvbnm,./", b"|ZXCVBNM<>?"),
];

/// The key of a keysym on a US keyboard, and what it needs of Shift.
pub fn of_keysym(keysym: u32) -> Option<(Key, Shift)> {
    if let Ok(sign @ 0x20..=0x7e) = u8::try_from(keysym) {
        return of_sign(sign);
    }
    // Characters outside of Latin-1 have 0x0100_0000 added; some clients do so with all.
    if let 0x0100_0020..=0x0100_007e = keysym {
        return of_sign(keysym as u8);
    }
    of_function(keysym).map(|code| (Key(code), Shift::Any))
}

fn of_sign(sign: u8) -> Option<(Key, Shift)> {
    if sign == b' ' {
        return Some((Key(57), Shift::Any));
    }
    ROWS.iter().find_map(|(first, plain, shifted)| {
        let place = |signs: &[u8]| signs.iter().position(|other| *other == sign);
        let (at, shift) = match place(plain) {
            Some(at) => (at, if sign.is_ascii_lowercase() { Shift::Small } else { Shift::Up }),
            None if sign.is_ascii_uppercase() => (place(shifted)?, Shift::Capital),
            None => (place(shifted)?, Shift::Down),
        };
        Some((Key(first + at as u16), shift))
    })
}

/// Keys without a character (X11's `keysymdef.h` and `XF86keysym.h`).
fn of_function(keysym: u32) -> Option<u16> {
    Some(match keysym {
        0xff08 => 14,
        0xff09 | 0xfe20 => 15,
        0xff0a | 0xff0d => 28,
        0xff13 | 0xff6b => 119,
        0xff14 => 70,
        0xff15 | 0xff61 => 99,
        0xff1b => 1,
        0xff21 | 0xff23 => 92,
        0xff22 => 94,
        0xff27 => 93,
        0xff31 => 122,
        0xff34 => 123,
        0xff50 => 102,
        0xff51 => 105,
        0xff52 => 103,
        0xff53 => 106,
        0xff54 => 108,
        0xff55 => 104,
        0xff56 => 109,
        0xff57 => 107,
        0xff63 => 110,
        0xff67 => 127,
        0xff7f => 69,
        // The number pad, with Num Lock (digits) and without (what is below them).
        0xff80 => 57,
        0xff89 => 15,
        0xff8d => 96,
        0xff95 | 0xffb7 => 71,
        0xff96 | 0xffb4 => 75,
        0xff97 | 0xffb8 => 72,
        0xff98 | 0xffb6 => 77,
        0xff99 | 0xffb2 => 80,
        0xff9a | 0xffb9 => 73,
        0xff9b | 0xffb3 => 81,
        0xff9c | 0xffb1 => 79,
        0xff9d | 0xffb5 => 76,
        0xff9e | 0xffb0 => 82,
        0xff9f | 0xffae => 83,
        0xffaa => 55,
        0xffab => 78,
        0xffac => 121,
        0xffad => 74,
        0xffaf => 98,
        0xffbd => 117,
        0xffbe..=0xffc7 => (keysym - 0xffbe + 59) as u16,
        0xffc8 => 87,
        0xffc9 => 88,
        0xffca..=0xffd5 => (keysym - 0xffca + 183) as u16,
        0xffe1 => 42,
        0xffe2 => 54,
        0xffe3 => 29,
        0xffe4 => 97,
        0xffe5 => 58,
        0xffe7 | 0xffeb => 125,
        0xffe8 | 0xffec => 126,
        0xffe9 => 56,
        // The right Alt key is also Mode_switch and AltGr.
        0xffea | 0xff7e | 0xfe03 => 100,
        0xffff => 111,
        0x1008_ff11 => 114,
        0x1008_ff12 => 113,
        0x1008_ff13 => 115,
        0x1008_ff14 => 164,
        0x1008_ff15 => 166,
        0x1008_ff16 => 165,
        0x1008_ff17 => 163,
        0x1008_ff2a => 116,
        0x1008_ff2f => 142,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scancodes_are_places() {
        for (scancode, code) in [
            (0x1e, 30),
            (0x39, 57),
            (0x54, 99),
            (0xb7, 99),
            (0x9d, 97),
            (0xc8, 103),
            (0xcb, 105),
            (0xcd, 106),
            (0xd0, 108),
            (0xcf, 107),
            (0xd3, 111),
            (0xc7, 102),
            (0xc9, 104),
            (0xc6, 119),
            (0xdb, 125),
        ] {
            assert_eq!(of_scancode(scancode), Some(Key(code)), "{scancode:#x}");
        }
        for none in [0, 0x55, 0x7f, 0x80, 0x100, u32::MAX] {
            assert_eq!(of_scancode(none), None);
        }
    }

    #[test]
    fn every_sign_has_a_key() {
        for sign in 0x20..0x7f {
            let (key, _) = of_keysym(sign).unwrap_or_else(|| panic!("{sign:#x}"));
            assert!((2..=57).contains(&key.0));
            assert_eq!(of_keysym(sign), of_keysym(sign + 0x0100_0000));
        }
        // Codes of input-event-codes.h.
        for (sign, code, shift) in [
            ('a', 30, Shift::Small),
            ('Z', 44, Shift::Capital),
            ('1', 2, Shift::Up),
            ('0', 11, Shift::Up),
            ('=', 13, Shift::Up),
            ('!', 2, Shift::Down),
            ('~', 41, Shift::Down),
            ('`', 41, Shift::Up),
            ('\\', 43, Shift::Up),
            ('|', 43, Shift::Down),
            ('"', 40, Shift::Down),
            ('?', 53, Shift::Down),
            ('[', 26, Shift::Up),
            (':', 39, Shift::Down),
            (' ', 57, Shift::Any),
            ('m', 50, Shift::Small),
        ] {
            assert_eq!(of_keysym(sign.into()), Some((Key(code), shift)), "{sign}");
        }
    }

    #[test]
    fn other_keys_do_not_care_for_shift() {
        for (keysym, code) in [
            (0xff0d, 28),
            (0xff1b, 1),
            (0xffbe, 59),
            (0xffc7, 68),
            (0xffc8, 87),
            (0xffc9, 88),
            (0xffca, 183),
            (0xff51, 105),
            (0xffff, 111),
            (0xffb0, 82),
            (0xff8d, 96),
        ] {
            assert_eq!(of_keysym(keysym), Some((Key(code), Shift::Any)), "{keysym:#x}");
        }
        assert_eq!(of_keysym(0), None);
        assert_eq!(of_keysym(0xe4), None);
    }
}
