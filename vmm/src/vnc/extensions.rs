//! What a client says that it knows, and the rectangles and messages by which the server answers (rfbproto,
//! Pseudo-encodings).
//!
//! | number | extension | here |
//! | --- | --- | --- |
//! | -23 .. -32, -412 .. -512 | JPEG quality | from it on, Tight uses JPEG; what stays still is sent again without loss |
//! | -223, -308 | DesktopSize, ExtendedDesktopSize | the picture's size follows the guest's; wishes go to the guest |
//! | -224 | LastRect | nothing to do: the number of rectangles is always known before they are sent |
//! | -239, -314 | Cursor, Cursor With Alpha | the guest's pointer |
//! | -247 .. -256 | compression level | zlib's |
//! | -257 | QEMU Pointer Motion Change | movements where the guest's mouse knows no places |
//! | -258 | QEMU Extended Key Event | scan codes |
//! | -307 | DesktopName | the machine's name |
//! | -312, -313 | Fence, ContinuousUpdates | updates without questions, a few on their way at a time |
//! | -316 | ExtendedMouseButtons | both buttons at the side |

use super::encode::{Encoding, Settings, header, number};
use lodge_devices::display::Rect;

const DESKTOP_SIZE: i32 = -223;
const POINTER_MOTION: i32 = -257;
const EXTENDED_KEYS: i32 = -258;
const DESKTOP_NAME: i32 = -307;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
const FENCE: i32 = -312;
const CONTINUOUS_UPDATES: i32 = -313;
/// A pointer message may have a second byte of buttons.
pub const SIDE_BUTTONS: i32 = -316;

/// JPEG's quality for each of the protocol's ten levels.
const QUALITY: [u8; 10] = [20, 30, 40, 50, 60, 70, 78, 85, 92, 96];

/// Statuses of ExtendedDesktopSize.
pub mod status {
    /// The screen's size is not to be changed.
    pub const PROHIBITED: u16 = 1;
    /// Not one screen that fills the picture.
    pub const INVALID_LAYOUT: u16 = 3;
    /// The guest was told; what it makes of it will be seen.
    pub const FORWARDED: u16 = 4;
}

/// Flags of a fence.
pub mod fence {
    /// The next message and what follows the answer belong together.
    pub const SYNC_NEXT: u32 = 1 << 2;
    /// BlockBefore, BlockAfter and SyncNext.
    pub const KNOWN: u32 = 0b111;
    /// BlockBefore.
    pub const BLOCK_BEFORE: u32 = 1;
    /// It is to be answered.
    pub const REQUEST: u32 = 1 << 31;
}

/// What a client knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extensions {
    /// How pixels travel.
    pub settings: Settings,
    /// CopyRect.
    pub copy_rect: bool,
    /// Cursor.
    pub cursor: bool,
    /// Cursor With Alpha.
    pub cursor_with_alpha: bool,
    /// DesktopSize.
    pub desktop_size: bool,
    /// ExtendedDesktopSize.
    pub extended_desktop_size: bool,
    /// DesktopName.
    pub desktop_name: bool,
    /// QEMU Pointer Motion Change.
    pub pointer_motion: bool,
    /// QEMU Extended Key Event.
    pub extended_keys: bool,
    /// ExtendedMouseButtons.
    pub side_buttons: bool,
    /// Fence.
    pub fence: bool,
    /// ContinuousUpdates.
    pub continuous_updates: bool,
}

impl Extensions {
    /// Reads a client's list, the best first. Of two levels the last counts.
    pub fn parse(numbers: &[i32]) -> Self {
        let mut known = Self::default();
        let mut encoding = None;
        let mut fine = None;
        let settings = &mut known.settings;
        for &number in numbers {
            let found = match number {
                number::RAW => Some(Encoding::Raw),
                number::ZLIB => Some(Encoding::Zlib),
                number::TIGHT => Some(Encoding::Tight),
                number::ZRLE => Some(Encoding::Zrle),
                _ => None,
            };
            encoding = encoding.or(found);
            match number {
                number::COPY_RECT => known.copy_rect = true,
                number::CURSOR => known.cursor = true,
                number::CURSOR_WITH_ALPHA => known.cursor_with_alpha = true,
                // Both ranges are ten levels, the lowest number being the lowest level.
                -32..=-23 => settings.jpeg = Some(QUALITY[(number + 32) as usize]),
                -512..=-412 => fine = Some((number + 512).max(1) as u8),
                -256..=-247 => settings.level = (number + 256).max(1) as u32,
                DESKTOP_SIZE => known.desktop_size = true,
                EXTENDED_DESKTOP_SIZE => known.extended_desktop_size = true,
                DESKTOP_NAME => known.desktop_name = true,
                POINTER_MOTION => known.pointer_motion = true,
                EXTENDED_KEYS => known.extended_keys = true,
                SIDE_BUTTONS => known.side_buttons = true,
                FENCE => known.fence = true,
                CONTINUOUS_UPDATES => known.continuous_updates = true,
                _ => {}
            }
        }
        settings.jpeg = fine.or(settings.jpeg);
        settings.encoding = encoding.unwrap_or(Encoding::Raw);
        known
    }

    /// Whether the client can follow the picture's size.
    pub fn resizes(&self) -> bool {
        self.desktop_size || self.extended_desktop_size
    }
}

/// Rectangles without pixels for the next update.
#[derive(Debug, Default)]
pub struct Extras {
    /// The rectangles.
    pub bytes: Vec<u8>,
    /// How many they are.
    pub count: usize,
}

impl Extras {
    /// Adds what `write` writes as one rectangle.
    pub fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.count += 1;
    }

    fn add_empty(&mut self, x: u32, encoding: i32) {
        self.add(|out| header(Rect { x, y: 0, width: 0, height: 0 }, encoding, out));
    }

    /// Scan codes are welcome.
    pub fn extended_keys(&mut self) {
        self.add_empty(0, EXTENDED_KEYS);
    }

    /// More buttons are welcome.
    pub fn side_buttons(&mut self) {
        self.add_empty(0, SIDE_BUTTONS);
    }

    /// The pointer's movements are wanted, or its places.
    pub fn pointer_motion(&mut self, distances: bool) {
        self.add_empty(u32::from(!distances), POINTER_MOTION);
    }

    /// The desktop's name.
    pub fn desktop_name(&mut self, name: &str) {
        self.add_empty(0, DESKTOP_NAME);
        self.bytes.extend((name.len() as u32).to_be_bytes());
        self.bytes.extend(name.as_bytes());
    }

    /// The picture's size; for who knows ExtendedDesktopSize, also why it is told and what became of a wish.
    pub fn desktop_size(&mut self, extended: bool, reason: u16, status: u16, size: (u32, u32)) {
        let (width, height) = size;
        if !extended {
            let rect = Rect { x: 0, y: 0, width, height };
            return self.add(|out| header(rect, DESKTOP_SIZE, out));
        }
        let rect = Rect { x: reason.into(), y: status.into(), width, height };
        self.add(|out| header(rect, EXTENDED_DESKTOP_SIZE, out));
        // One screen, number 0, that fills the picture.
        self.bytes.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.bytes.extend((width as u16).to_be_bytes());
        self.bytes.extend((height as u16).to_be_bytes());
        self.bytes.extend([0; 4]);
    }
}

/// A fence, or the answer to one.
pub fn fence_message(flags: u32, payload: &[u8], out: &mut Vec<u8>) {
    out.extend([248, 0, 0, 0]);
    out.extend(flags.to_be_bytes());
    // At most 64 bytes: the client's message had a limit.
    out.push(payload.len() as u8);
    out.extend_from_slice(payload);
}

/// Updates come only when asked for.
pub const END_OF_CONTINUOUS_UPDATES: u8 = 150;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let known = Extensions::parse(&[1, 5, 16, 7, 0, -26, -254, -223, -312, 99, i32::MIN]);
        let settings = Settings { encoding: Encoding::Zrle, level: 2, jpeg: Some(78) };
        let expected = Extensions {
            settings,
            copy_rect: true,
            desktop_size: true,
            fence: true,
            ..Extensions::default()
        };
        assert_eq!(known, expected);
        assert!(known.resizes());
        assert_eq!(Extensions::parse(&[]), Extensions::default());
        let jpeg = |numbers: &[i32]| Extensions::parse(numbers).settings.jpeg;
        assert_eq!(jpeg(&[-32]), Some(20));
        assert_eq!(jpeg(&[-23]), Some(96));
        assert_eq!(jpeg(&[-512]), Some(1));
        assert_eq!(jpeg(&[-412, -32]), Some(100));
        assert_eq!(jpeg(&[-33, -22, -411, -513]), None);
        assert_eq!(Extensions::parse(&[-256]).settings.level, 1);
        assert_eq!(Extensions::parse(&[-247]).settings.level, 9);
    }

    #[test]
    fn sizes_are_told() {
        let mut extras = Extras::default();
        extras.desktop_size(false, 1, 4, (640, 480));
        assert_eq!(extras.bytes, [0, 0, 0, 0, 2, 128, 1, 224, 0xff, 0xff, 0xff, 0x21]);
        let mut extras = Extras::default();
        extras.desktop_size(true, 1, 4, (640, 480));
        assert_eq!(extras.bytes.len(), 12 + 4 + 16);
        assert_eq!(extras.bytes[..8], [0, 1, 0, 4, 2, 128, 1, 224]);
        assert_eq!(extras.bytes[24..28], [2, 128, 1, 224]);
        assert_eq!(extras.count, 1);
    }

    #[test]
    fn a_name_is_one_rectangle() {
        let mut extras = Extras::default();
        extras.desktop_name("web");
        assert_eq!((extras.count, extras.bytes.len()), (1, 12 + 4 + 3));
    }
}
