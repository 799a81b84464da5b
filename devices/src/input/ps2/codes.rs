//! Scan codes: what a keyboard says for each key, in the three sets there are.
//!
//! ```text
//!   key (Linux) --> set 1 --inverse of the controller's table--> set 2
//!               +-> set 3, for the keys that it has
//! ```
//!
//! A code is one byte, or one after E0. A released key is set 1's code with bit 7 set, and F0 before the others'.

use crate::input::Key;

/// Scan code set 1, as an original PC's and what the controller makes of set 2.
pub(super) const SET_1: u8 = 1;
/// Scan code set 2, what keyboards speak by themselves.
pub(super) const SET_2: u8 = 2;
/// Scan code set 3, without prefixes.
pub(super) const SET_3: u8 = 3;

/// Comes before a code of the keys that the first keyboards did not have.
pub(super) const EXTENDED: u8 = 0xe0;
/// Comes before the code of a released key, in sets 2 and 3.
pub(super) const RELEASE: u8 = 0xf0;
/// Set in the code of a released key, in set 1.
pub(super) const RELEASE_BIT: u8 = 0x80;

const F7: u16 = 65;
const SYSRQ: u16 = 99;
const PAUSE: u16 = 119;
/// Korean keyboards' two keys, which say nothing when they are released.
const HANGEUL: u16 = 122;
const HANJA: u16 = 123;

/// Keys that change what others say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Modifiers {
    pub shift: bool,
    pub control: bool,
    pub alt: bool,
}

/// What the controller makes of set 2 for those who want set 1 (its "scan code translation"); bytes from 85 on stay
/// as they are.
const TRANSLATION: [u8; 0x85] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
    0x80, 0x81, 0x82, 0x41, 0x54,
];

/// Set 3, by Linux's code; 0 where it has none.
const SET_3_CODES: [u8; 128] = [
    0x00, 0x08, 0x16, 0x1e, 0x26, 0x25, 0x2e, 0x36, 0x3d, 0x3e, 0x46, 0x45, 0x4e, 0x55, 0x66, 0x0d,
    0x15, 0x1d, 0x24, 0x2d, 0x2c, 0x35, 0x3c, 0x43, 0x44, 0x4d, 0x54, 0x5b, 0x5a, 0x11, 0x1c, 0x1b,
    0x23, 0x2b, 0x34, 0x33, 0x3b, 0x42, 0x4b, 0x4c, 0x52, 0x0e, 0x12, 0x5c, 0x1a, 0x22, 0x21, 0x2a,
    0x32, 0x31, 0x3a, 0x41, 0x49, 0x4a, 0x59, 0x7e, 0x19, 0x29, 0x14, 0x07, 0x0f, 0x17, 0x1f, 0x27,
    0x2f, 0x37, 0x3f, 0x47, 0x4f, 0x76, 0x5f, 0x6c, 0x75, 0x7d, 0x84, 0x6b, 0x73, 0x74, 0x7c, 0x69,
    0x72, 0x7a, 0x70, 0x71, 0x00, 0x00, 0x13, 0x56, 0x5e, 0x00, 0x00, 0x00, 0x86, 0x87, 0x85, 0x00,
    0x79, 0x58, 0x77, 0x57, 0x39, 0x00, 0x6e, 0x63, 0x6f, 0x61, 0x6a, 0x65, 0x60, 0x6d, 0x67, 0x64,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x62, 0x00, 0x00, 0x00, 0x00, 0x00, 0x8b, 0x8c, 0x8d,
];

/// The controller's translation of one byte.
pub(super) fn translate(byte: u8) -> u8 {
    TRANSLATION.get(usize::from(byte)).copied().unwrap_or(byte)
}

/// Set 1: whether E0 comes before it, and the code. PrintScreen and Pause are not in here.
fn set_1(key: Key) -> Option<(bool, u8)> {
    let plain = |code: u8| Some((false, code));
    let extended = |code: u8| Some((true, code));
    match key.0 {
        // Linux took the codes of the first keyboards over.
        code @ (1..=83 | 86..=88) => plain(code as u8),
        85 => plain(0x76),                                       // Zenkaku/Hankaku
        89 => plain(0x73),                                       // RO
        90 => plain(0x78),                                       // Katakana
        91 => plain(0x77),                                       // Hiragana
        92 => plain(0x79),                                       // Henkan
        93 => plain(0x70),                                       // Katakana/Hiragana
        94 => plain(0x7b),                                       // Muhenkan
        95 => plain(0x5c),                                       // keypad's Japanese comma
        96 => extended(0x1c),                                    // keypad's Enter
        97 => extended(0x1d),                                    // right Control
        98 => extended(0x35),                                    // keypad's slash
        100 => extended(0x38),                                   // right Alt
        code @ 102..=104 => extended((code - 102) as u8 + 0x47), // Home, Up, Page Up
        105 => extended(0x4b),                                   // Left
        106 => extended(0x4d),                                   // Right
        code @ 107..=111 => extended((code - 107) as u8 + 0x4f), // End, Down, Page Down, Insert, Delete
        113 => extended(0x20),                                   // mute
        114 => extended(0x2e),                                   // volume down
        115 => extended(0x30),                                   // volume up
        116 => extended(0x5e),                                   // power
        117 => plain(0x59),                                      // keypad's equal sign
        121 => plain(0x7e),                                      // keypad's comma
        124 => plain(0x7d),                                      // Yen
        code @ 125..=127 => extended((code - 125) as u8 + 0x5b), // left and right Meta, Menu
        128 => extended(0x68),                                   // stop
        140 => extended(0x21),                                   // calculator
        142 => extended(0x5f),                                   // sleep
        143 => extended(0x63),                                   // wake up
        155 => extended(0x6c),                                   // mail
        156 => extended(0x66),                                   // bookmarks
        157 => extended(0x6b),                                   // computer
        158 => extended(0x6a),                                   // back
        159 => extended(0x69),                                   // forward
        163 => extended(0x19),                                   // next song
        164 => extended(0x22),                                   // play, pause
        165 => extended(0x10),                                   // previous song
        166 => extended(0x24),                                   // stop the song
        172 => extended(0x32),                                   // home page
        173 => extended(0x67),                                   // refresh
        code @ 183..=185 => plain((code - 183) as u8 + 0x5d),    // F13 to F15
        217 => extended(0x65),                                   // search
        226 => extended(0x6d),                                   // media
        _ => None,
    }
}

/// The key's one code in set 1, with bit 7 set where E0 comes before it.
pub(in crate::input) fn scan_code(key: Key) -> Option<u8> {
    match key.0 {
        SYSRQ => Some(0xb7),
        PAUSE => Some(0xc6),
        _ => set_1(key).map(|(extended, code)| if extended { code | RELEASE_BIT } else { code }),
    }
}

/// Set 2's code for one of set 1.
fn inverse(code: u8) -> u8 {
    let place = TRANSLATION.iter().take(0x80).position(|translated| *translated == code);
    // Every code below 80 is in the table, once.
    place.unwrap_or_default() as u8
}

/// The bytes of one code of set 1 or 2.
fn prefixed(set: u8, key: Key, extended: bool, code: u8, down: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(3);
    if extended {
        bytes.push(EXTENDED);
    }
    if set == SET_1 {
        bytes.push(if down { code } else { code | RELEASE_BIT });
        return bytes;
    }
    if !down {
        bytes.push(RELEASE);
    }
    // F7 is the one key that set 2 has beyond 7F.
    bytes.push(if key.0 == F7 { 0x83 } else { inverse(code) });
    bytes
}

/// The code of `key` in set 3, if it has one.
pub(super) fn set_3(key: Key) -> Option<u8> {
    let extra = match key.0 {
        code @ 183..=185 => (code - 183) as u8 + 0x7f, // F13 to F15
        _ => 0,
    };
    let code = SET_3_CODES.get(usize::from(key.0)).copied().filter(|_| extra == 0).unwrap_or(extra);
    (code != 0).then_some(code)
}

/// What the keyboard says when `key` goes down or up; nothing for keys that it does not have.
pub(super) fn bytes(set: u8, key: Key, down: bool, with: Modifiers) -> Vec<u8> {
    if set == SET_3 {
        return match set_3(key) {
            Some(code) if down => vec![code],
            Some(code) => vec![RELEASE, code],
            None => Vec::new(),
        };
    }
    match key.0 {
        SYSRQ => print_screen(set, down, with),
        PAUSE => pause(set, down, with),
        HANGEUL if down => vec![0xf2],
        HANJA if down => vec![0xf1],
        HANGEUL | HANJA => Vec::new(),
        _ => set_1(key)
            .map_or_else(Vec::new, |(extended, code)| prefixed(set, key, extended, code, down)),
    }
}

/// PrintScreen is another key with Alt, and comes inside of a Shift that nobody pressed without any of the others.
fn print_screen(set: u8, down: bool, with: Modifiers) -> Vec<u8> {
    let bytes: &[u8] = match (set == SET_1, down) {
        (true, true) if with.alt => &[0x54],
        (true, false) if with.alt => &[0xd4],
        (false, true) if with.alt => &[0x84],
        (false, false) if with.alt => &[0xf0, 0x84],
        (true, true) if with.shift || with.control => &[0xe0, 0x37],
        (true, false) if with.shift || with.control => &[0xe0, 0xb7],
        (false, true) if with.shift || with.control => &[0xe0, 0x7c],
        (false, false) if with.shift || with.control => &[0xe0, 0xf0, 0x7c],
        (true, true) => &[0xe0, 0x2a, 0xe0, 0x37],
        (true, false) => &[0xe0, 0xb7, 0xe0, 0xaa],
        (false, true) => &[0xe0, 0x12, 0xe0, 0x7c],
        (false, false) => &[0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12],
    };
    bytes.to_vec()
}

/// Pause says all it has to say when it goes down; with Control it is Break.
fn pause(set: u8, down: bool, with: Modifiers) -> Vec<u8> {
    let bytes: &[u8] = match (set == SET_1, with.control) {
        _ if !down => &[],
        (true, true) => &[0xe0, 0x46, 0xe0, 0xc6],
        (false, true) => &[0xe0, 0x7e, 0xe0, 0xf0, 0x7e],
        (true, false) => &[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5],
        (false, false) => &[0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77],
    };
    bytes.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Modifiers = Modifiers { shift: false, control: false, alt: false };

    /// What the controller's translation makes of a sequence of set 2.
    fn translated(codes: &[u8]) -> Vec<u8> {
        let mut released = 0;
        let mut all = Vec::new();
        for byte in codes {
            if *byte == RELEASE {
                released = RELEASE_BIT;
            } else {
                all.push(translate(*byte) | std::mem::take(&mut released));
            }
        }
        all
    }

    #[test]
    fn set_2_translated_is_set_1_for_every_key() {
        let all = [
            NONE,
            Modifiers { shift: true, ..NONE },
            Modifiers { control: true, ..NONE },
            Modifiers { alt: true, ..NONE },
        ];
        let mut keys = 0;
        for (code, with) in (0..768).flat_map(|code| all.map(|with| (code, with))) {
            for down in [true, false] {
                let two = bytes(SET_2, Key(code), down, with);
                let one = bytes(SET_1, Key(code), down, with);
                assert_eq!(translated(&two), one, "key {code}, down: {down}, {with:?}");
                keys += usize::from(!two.is_empty());
            }
        }
        assert!(keys > 105 * 8);
    }

    #[test]
    fn codes_are_those_of_the_books() {
        for (key, one, two, three) in [
            (30, &[0x1e][..], &[0x1c][..], Some(0x1c)),      // A
            (1, &[0x01], &[0x76], Some(0x08)),               // Esc
            (28, &[0x1c], &[0x5a], Some(0x5a)),              // Enter
            (65, &[0x41], &[0x83], Some(0x37)),              // F7
            (60, &[0x3c], &[0x06], Some(0x0f)),              // F2
            (87, &[0x57], &[0x78], Some(0x56)),              // F11
            (88, &[0x58], &[0x07], Some(0x5e)),              // F12
            (86, &[0x56], &[0x61], Some(0x13)),              // the 102nd key
            (97, &[0xe0, 0x1d], &[0xe0, 0x14], Some(0x58)),  // right Control
            (103, &[0xe0, 0x48], &[0xe0, 0x75], Some(0x63)), // Up
            (111, &[0xe0, 0x53], &[0xe0, 0x71], Some(0x64)), // Delete
            (127, &[0xe0, 0x5d], &[0xe0, 0x2f], Some(0x8d)), // Menu
            (172, &[0xe0, 0x32], &[0xe0, 0x3a], None),       // home page
            (115, &[0xe0, 0x30], &[0xe0, 0x32], None),       // volume up
            (122, &[0xf2], &[0xf2], None),                   // Hangeul
            (0, &[], &[], None),
            (84, &[], &[], None),
            (700, &[], &[], None),
        ] {
            assert_eq!(bytes(SET_1, Key(key), true, NONE), one, "key {key}");
            assert_eq!(bytes(SET_2, Key(key), true, NONE), two, "key {key}");
            assert_eq!(set_3(Key(key)), three, "key {key}");
        }
        assert_eq!(bytes(SET_1, Key(103), false, NONE), [0xe0, 0xc8]);
        assert_eq!(bytes(SET_2, Key(103), false, NONE), [0xe0, 0xf0, 0x75]);
        assert_eq!(bytes(SET_3, Key(103), false, NONE), [0xf0, 0x63]);
        assert!(bytes(SET_1, Key(PAUSE), false, NONE).is_empty());
    }

    #[test]
    fn no_two_keys_say_the_same() {
        for set in [SET_1, SET_2, SET_3] {
            let mut seen = std::collections::HashMap::new();
            for code in 0..768 {
                let said = bytes(set, Key(code), true, NONE);
                if !said.is_empty() {
                    assert_eq!(seen.insert(said, code), None, "set {set}, key {code}");
                }
            }
        }
    }
}
