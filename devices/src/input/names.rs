//! Names of keys, and texts that say which to press: `ctrl-alt-f2`, `ret`, `shift-b`.
//!
//! The names are those of QEMU's `sendkey` and of common sense; letters, digits and signs are themselves, as on a
//! US keyboard. A number (`0x3b`, `59`) is an XT scan code, from 0x80 on one after E0, where it is no digit.

use super::{InputEvent, Key};

/// The most keys that are pressed together.
const MOST: usize = 16;
const LEFT_SHIFT: Key = Key(42);

/// A text that says no keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyNameError {
    /// Nothing has this name.
    #[error("there is no key \"{0}\"; examples: a, ret, esc, f2, ctrl-alt-delete, shift-minus")]
    Unknown(String),
    /// Nothing between two hyphens, or no text at all.
    #[error("a key's name is missing in \"{0}\"; the hyphen's own name is minus")]
    Empty(String),
    /// More than a person has fingers.
    #[error("\"{0}\" presses more than {MOST} keys together")]
    TooMany(String),
}

/// Names, by Linux's code; several for some.
const NAMES: &[(u16, &[&str])] = &[
    (1, &["esc", "escape"]),
    (12, &["minus"]),
    (13, &["equal", "equals"]),
    (14, &["backspace", "bksp"]),
    (15, &["tab"]),
    (26, &["bracket_left", "leftbracket"]),
    (27, &["bracket_right", "rightbracket"]),
    (28, &["ret", "return", "enter"]),
    (29, &["ctrl", "control", "ctrl_l", "leftctrl"]),
    (39, &["semicolon"]),
    (40, &["apostrophe", "quote"]),
    (41, &["grave_accent", "grave"]),
    (42, &["shift", "shift_l", "leftshift"]),
    (43, &["backslash"]),
    (51, &["comma"]),
    (52, &["dot", "period"]),
    (53, &["slash"]),
    (54, &["shift_r", "rightshift"]),
    (55, &["asterisk", "kp_multiply"]),
    (56, &["alt", "alt_l", "leftalt"]),
    (57, &["spc", "space"]),
    (58, &["caps_lock", "capslock"]),
    (69, &["num_lock", "numlock"]),
    (70, &["scroll_lock", "scrolllock"]),
    (71, &["kp_7"]),
    (72, &["kp_8"]),
    (73, &["kp_9"]),
    (74, &["kp_subtract"]),
    (75, &["kp_4"]),
    (76, &["kp_5"]),
    (77, &["kp_6"]),
    (78, &["kp_add"]),
    (79, &["kp_1"]),
    (80, &["kp_2"]),
    (81, &["kp_3"]),
    (82, &["kp_0"]),
    (83, &["kp_decimal"]),
    (86, &["less", "102nd"]),
    (87, &["f11"]),
    (88, &["f12"]),
    (89, &["ro"]),
    (91, &["hiragana"]),
    (92, &["henkan"]),
    (93, &["katakanahiragana"]),
    (94, &["muhenkan"]),
    (95, &["kp_comma"]),
    (96, &["kp_enter"]),
    (97, &["ctrl_r", "rightctrl"]),
    (98, &["kp_divide"]),
    (99, &["print", "sysrq", "prtsc", "printscreen"]),
    (100, &["alt_r", "rightalt", "altgr"]),
    (102, &["home"]),
    (103, &["up"]),
    (104, &["pgup", "pageup"]),
    (105, &["left"]),
    (106, &["right"]),
    (107, &["end"]),
    (108, &["down"]),
    (109, &["pgdn", "pagedown"]),
    (110, &["insert", "ins"]),
    (111, &["delete", "del"]),
    (113, &["audiomute", "mute"]),
    (114, &["volumedown"]),
    (115, &["volumeup"]),
    (116, &["power"]),
    (117, &["kp_equals"]),
    (119, &["pause", "break"]),
    (122, &["lang1", "hangeul"]),
    (123, &["lang2", "hanja"]),
    (124, &["yen"]),
    (125, &["meta_l", "meta", "win", "super"]),
    (126, &["meta_r"]),
    (127, &["menu", "compose"]),
    (128, &["stop"]),
    (140, &["calculator"]),
    (142, &["sleep"]),
    (143, &["wake"]),
    (155, &["mail"]),
    (156, &["ac_bookmarks"]),
    (157, &["computer"]),
    (158, &["ac_back"]),
    (159, &["ac_forward"]),
    (163, &["audionext"]),
    (164, &["audioplay"]),
    (165, &["audioprev"]),
    (166, &["audiostop"]),
    (172, &["ac_home"]),
    (173, &["ac_refresh"]),
    (226, &["mediaselect"]),
];

/// What the keys of the four rows print, alone and with Shift, from a code on.
const ROWS: &[(u16, &str, &str)] = &[
    (2, "1234567890-=", "!@#$%^&*()_+"),
    (16, "qwertyuiop[]", "QWERTYUIOP{}"),
    (30, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (43, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (57, " ", ""),
];

/// The key that prints `sign` on a US keyboard, and whether with Shift.
pub fn of_sign(sign: char) -> Option<(Key, bool)> {
    ROWS.iter().find_map(|(first, plain, shifted)| {
        let place = |row: &str| row.chars().position(|other| other == sign);
        let (at, shift) = match place(plain) {
            Some(at) => (at, false),
            None => (place(shifted)?, true),
        };
        Some((Key(first + at as u16), shift)) // A row has a dozen keys.
    })
}

/// The keys of one name: Shift as well, where a sign needs it.
fn of_name(name: &str) -> Option<Vec<Key>> {
    let mut chars = name.chars();
    if let (Some(sign), None) = (chars.next(), chars.next()) {
        let (key, shift) = of_sign(sign)?;
        return Some(if shift { vec![LEFT_SHIFT, key] } else { vec![key] });
    }
    let small = name.to_ascii_lowercase();
    let named = NAMES.iter().find(|(_, names)| names.contains(&small.as_str()));
    if let Some((code, _)) = named {
        return Some(vec![Key(*code)]);
    }
    if let Some(number) = small.strip_prefix('f').and_then(|number| number.parse::<u16>().ok()) {
        return match number {
            1..=10 => Some(vec![Key(58 + number)]),
            13..=15 => Some(vec![Key(170 + number)]),
            _ => None,
        };
    }
    let number = match small.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16).ok()?,
        None => small.parse().ok()?,
    };
    of_scan_code(number).map(|key| vec![key])
}

/// The key of a scan code of set 1, with bit 7 for those after E0.
fn of_scan_code(code: u8) -> Option<Key> {
    (1..=u16::from(u8::MAX)).map(Key).find(|key| super::ps2::scan_code(*key) == Some(code))
}

/// The keys that one text presses together, in their order: `ctrl-alt-f2`.
///
/// # Errors
/// When a part is no key's name, or there are none or too many.
pub fn keys(text: &str) -> Result<Vec<Key>, KeyNameError> {
    let mut keys: Vec<Key> = Vec::new();
    // A hyphen alone, and one at the end after another, is the key.
    let (text, last) = match text {
        "-" => ("", Some("-")),
        _ => match text.strip_suffix("--") {
            Some(before) if !before.is_empty() => (before, Some("-")),
            _ => (text, None),
        },
    };
    let parts = text.split('-').filter(|_| !(text.is_empty() && last.is_some()));
    for part in parts.chain(last) {
        if part.is_empty() {
            return Err(KeyNameError::Empty(text.into()));
        }
        let more = of_name(part).ok_or_else(|| KeyNameError::Unknown(part.into()))?;
        for key in more {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        if keys.len() > MOST {
            return Err(KeyNameError::TooMany(text.into()));
        }
    }
    Ok(keys)
}

/// What a person does to type `text`: texts of [`keys`] with spaces between them, one after the other. The keys of
/// each go down in their order, and up in the other one.
///
/// # Errors
/// As [`keys`], and when there is nothing but spaces. Nothing is pressed then.
pub fn strokes(text: &str) -> Result<Vec<InputEvent>, KeyNameError> {
    let mut events = Vec::new();
    for chord in text.split_whitespace() {
        let keys = keys(chord)?;
        events.extend(keys.iter().map(|key| InputEvent::Key(*key, true)));
        events.extend(keys.iter().rev().map(|key| InputEvent::Key(*key, false)));
    }
    if events.is_empty() {
        return Err(KeyNameError::Empty(text.into()));
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(text: &str) -> Vec<u16> {
        keys(text).unwrap_or_else(|e| panic!("{text}: {e}")).iter().map(|key| key.0).collect()
    }

    #[test]
    fn names_are_keys() {
        for (text, expected) in [
            ("ctrl-alt-f2", &[29, 56, 60][..]),
            ("ctrl-alt-delete", &[29, 56, 111]),
            ("ret", &[28]),
            ("a", &[30]),
            ("A", &[42, 30]),
            ("shift-b", &[42, 48]),
            ("shift-B", &[42, 48]),
            ("SHIFT-ESC", &[42, 1]),
            ("1", &[2]),
            ("0", &[11]),
            ("!", &[42, 2]),
            ("-", &[12]),
            ("ctrl--", &[29, 12]),
            ("minus", &[12]),
            ("_", &[42, 12]),
            ("\\", &[43]),
            ("z", &[44]),
            ("?", &[42, 53]),
            ("`", &[41]),
            ("f1", &[59]),
            ("f10", &[68]),
            ("f12", &[88]),
            ("f13", &[183]),
            ("spc", &[57]),
            ("print", &[99]),
            ("alt-sysrq-b", &[56, 99, 48]),
            ("kp_enter", &[96]),
            ("0x3b", &[59]),
            ("0xc8", &[103]),
            ("59", &[59]),
        ] {
            assert_eq!(codes(text), expected, "{text}");
        }
        for bad in ["f11x", "f0", "f16", "foo", "ctrl-foo", "é", "0x100", "256", "0x00", "ctrl -"]
        {
            assert!(matches!(keys(bad), Err(KeyNameError::Unknown(_))), "{bad}");
        }
        for bad in ["", "ctrl-", "-a", "a---b", "--"] {
            assert!(matches!(keys(bad), Err(KeyNameError::Empty(_))), "{bad}: {:?}", keys(bad));
        }
        let many: Vec<String> = ('a'..='z').map(String::from).collect();
        assert!(matches!(keys(&many.join("-")), Err(KeyNameError::TooMany(_))));
    }

    #[test]
    fn every_name_is_one_key_that_the_keyboard_has() {
        let mut seen = std::collections::HashSet::new();
        for (code, names) in NAMES {
            for name in *names {
                assert!(seen.insert(*name), "{name} twice");
                assert_eq!(codes(name), [*code], "{name}");
            }
        }
        for sign in ' '..='~' {
            assert!(of_sign(sign).is_some(), "{sign}");
        }
    }

    #[test]
    fn strokes_go_down_and_up() {
        let press = |code| InputEvent::Key(Key(code), true);
        let release = |code| InputEvent::Key(Key(code), false);
        assert_eq!(
            strokes(" ctrl-c ret").unwrap(),
            [press(29), press(46), release(46), release(29), press(28), release(28)]
        );
        assert!(strokes("a nothing").is_err());
        assert!(matches!(strokes("  "), Err(KeyNameError::Empty(_))));
    }
}
