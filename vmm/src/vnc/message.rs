//! What clients say after the handshake (RFC 6143, section 7.5, and rfbproto's extensions), as a pure function from
//! bytes to messages.
//!
//! Lengths that a client claims are checked before anything is kept for them: the longest message that is ever
//! buffered is a full list of encodings, 256 KiB.

use super::pixels::PixelFormat;

/// The longest text that a client may paste. It is read past: guests have no clipboard here.
const LONGEST_TEXT: u32 = 1 << 20;
/// The longest payload of a fence (rfbproto, ClientFence).
const LONGEST_FENCE: usize = 64;

/// A rectangle as a client says it: not checked against any picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Left.
    pub x: u16,
    /// Top.
    pub y: u16,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A message of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Pixels shall have this format.
    SetPixelFormat(PixelFormat),
    /// Encodings and extensions that it knows, the best first.
    SetEncodings(Vec<i32>),
    /// It wants to see something.
    UpdateRequest {
        /// Only what changed.
        incremental: bool,
        /// Where.
        area: Area,
    },
    /// A key, by an X11 keysym and, if the client knows, the place on the keyboard as an XT scan code.
    Key {
        /// The keysym.
        keysym: u32,
        /// The scan code; 0 is none.
        scancode: u32,
        /// Down or up.
        down: bool,
    },
    /// The pointer.
    Pointer {
        /// Buttons that are down, the first one in bit 0; 7 and 8 are those at the side.
        buttons: u16,
        /// From the left, or by how much.
        x: u16,
        /// From the top, or by how much.
        y: u16,
    },
    /// Text of its clipboard; so many bytes of it follow.
    CutText(u32),
    /// Updates of an area without requests, or with (none).
    ContinuousUpdates(Option<Area>),
    /// A fence, or the answer to one.
    Fence {
        /// Its flags.
        flags: u32,
        /// What comes back with the answer.
        payload: Vec<u8>,
    },
    /// It wants a picture of this size.
    SetDesktopSize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
        /// One screen that fills it.
        simple: bool,
    },
}

/// What there is at the beginning of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// Too little.
    Incomplete,
    /// A message, and how many bytes it takes.
    Complete(Message, usize),
}

/// Reads the first message of `bytes`. `side_buttons`: the client may send pointer messages with a second byte of
/// buttons.
///
/// # Errors
/// What is wrong with it. There is no way to find the next message then.
pub fn parse(bytes: &[u8], side_buttons: bool) -> Result<Parsed, &'static str> {
    let mut reader = Reader { bytes, at: 0 };
    match reader.message(side_buttons) {
        Ok(message) => Ok(Parsed::Complete(message, reader.at)),
        Err(Stop::Incomplete) => Ok(Parsed::Incomplete),
        Err(Stop::Bad(why)) => Err(why),
    }
}

enum Stop {
    Incomplete,
    Bad(&'static str),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let end = self.at + len;
        let part = self.bytes.get(self.at..end).ok_or(Stop::Incomplete)?;
        self.at = end;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, Stop> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, Stop> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn area(&mut self) -> Result<Area, Stop> {
        Ok(Area { x: self.u16()?, y: self.u16()?, width: self.u16()?, height: self.u16()? })
    }

    fn message(&mut self, side_buttons: bool) -> Result<Message, Stop> {
        Ok(match self.u8()? {
            0 => {
                self.take(3)?;
                Message::SetPixelFormat(PixelFormat::parse(&self.array()?).map_err(Stop::Bad)?)
            }
            2 => {
                self.take(1)?;
                let count = usize::from(self.u16()?);
                let numbers = self.take(4 * count)?.as_chunks::<4>().0;
                Message::SetEncodings(numbers.iter().map(|n| i32::from_be_bytes(*n)).collect())
            }
            3 => Message::UpdateRequest { incremental: self.u8()? != 0, area: self.area()? },
            4 => {
                let down = self.u8()? != 0;
                self.take(2)?;
                Message::Key { keysym: self.u32()?, scancode: 0, down }
            }
            5 => self.pointer(side_buttons)?,
            6 => {
                self.take(3)?;
                match self.u32()? {
                    len @ 0..=LONGEST_TEXT => Message::CutText(len),
                    _ => return Err(Stop::Bad("a clipboard of more than 1 MiB")),
                }
            }
            150 => {
                let enable = self.u8()? != 0;
                let area = self.area()?;
                Message::ContinuousUpdates(enable.then_some(area))
            }
            248 => self.fence()?,
            251 => self.desktop_size()?,
            255 => match self.u8()? {
                0 => {
                    let down = self.u16()? != 0;
                    Message::Key { keysym: self.u32()?, scancode: self.u32()?, down }
                }
                _ => return Err(Stop::Bad("a QEMU message that was not offered")),
            },
            _ => return Err(Stop::Bad("a message of a type that was not offered")),
        })
    }

    fn pointer(&mut self, side_buttons: bool) -> Result<Message, Stop> {
        let buttons = u16::from(self.u8()?);
        let (x, y) = (self.u16()?, self.u16()?);
        // rfbproto, PointerEvent: the eighth bit says that a byte follows, which has the eighth button and more.
        let buttons = match side_buttons && buttons & 0x80 != 0 {
            true => buttons & 0x7f | u16::from(self.u8()?) << 7,
            false => buttons,
        };
        Ok(Message::Pointer { buttons, x, y })
    }

    fn fence(&mut self) -> Result<Message, Stop> {
        self.take(3)?;
        let flags = self.u32()?;
        let len = usize::from(self.u8()?);
        if len > LONGEST_FENCE {
            return Err(Stop::Bad("a fence of more than 64 bytes"));
        }
        Ok(Message::Fence { flags, payload: self.take(len)?.to_vec() })
    }

    fn desktop_size(&mut self) -> Result<Message, Stop> {
        self.take(1)?;
        let (width, height) = (self.u16()?, self.u16()?);
        let screens = self.u8()?;
        self.take(1)?;
        let mut simple = screens == 1;
        for _ in 0..screens {
            self.u32()?;
            let screen = self.area()?;
            self.u32()?;
            simple &= screen == Area { x: 0, y: 0, width, height };
        }
        Ok(Message::SetDesktopSize { width, height, simple })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(bytes: &[u8]) -> Message {
        match parse(bytes, false) {
            Ok(Parsed::Complete(message, used)) if used == bytes.len() => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_are_read() {
        let format = [&[0, 0, 0, 0][..], &PixelFormat::NATIVE.to_bytes()].concat();
        assert_eq!(whole(&format), Message::SetPixelFormat(PixelFormat::NATIVE));
        let encodings = [2, 0, 0, 2, 0, 0, 0, 16, 0xff, 0xff, 0xff, 0x21];
        assert_eq!(whole(&encodings), Message::SetEncodings(vec![16, -223]));
        let area = Area { x: 1, y: 2, width: 0x300, height: 4 };
        let request = [3, 1, 0, 1, 0, 2, 3, 0, 0, 4];
        assert_eq!(whole(&request), Message::UpdateRequest { incremental: true, area });
        let key = Message::Key { keysym: 0xff0d, scancode: 0, down: true };
        assert_eq!(whole(&[4, 1, 9, 9, 0, 0, 0xff, 0x0d]), key);
        let key = Message::Key { keysym: 0x61, scancode: 0x1e, down: false };
        assert_eq!(whole(&[255, 0, 0, 0, 0, 0, 0, 0x61, 0, 0, 0, 0x1e]), key);
        let pointer = Message::Pointer { buttons: 0x81, x: 0x102, y: 3 };
        assert_eq!(whole(&[5, 0x81, 1, 2, 0, 3]), pointer);
        assert_eq!(whole(&[6, 0, 0, 0, 0, 0x10, 0, 0]), Message::CutText(1 << 20));
        let on = [150, 1, 0, 1, 0, 2, 3, 0, 0, 4];
        assert_eq!(whole(&on), Message::ContinuousUpdates(Some(area)));
        assert_eq!(whole(&[150, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Message::ContinuousUpdates(None));
        let fence = [248, 0, 0, 0, 0x80, 0, 0, 1, 2, 7, 8];
        let payload = vec![7, 8];
        assert_eq!(whole(&fence), Message::Fence { flags: 0x8000_0001, payload });
        let size = |x| {
            let head = [251, 0, 4, 0, 3, 0, 1, 0];
            [&head[..], &[0, 0, 0, 5, 0, x, 0, 0, 4, 0, 3, 0, 0, 0, 0, 0]].concat()
        };
        for (x, simple) in [(0, true), (1, false)] {
            let expected = Message::SetDesktopSize { width: 0x400, height: 0x300, simple };
            assert_eq!(whole(&size(x)), expected);
        }
    }

    #[test]
    fn a_byte_more_of_buttons() {
        let bytes = [5, 0x81, 0, 1, 0, 2, 0b11];
        let expected = Message::Pointer { buttons: 0b1_1000_0001, x: 1, y: 2 };
        assert_eq!(parse(&bytes, true), Ok(Parsed::Complete(expected, 7)));
        assert_eq!(parse(&bytes[..6], true), Ok(Parsed::Incomplete));
    }

    #[test]
    fn what_was_not_offered_or_is_too_long_is_refused() {
        let bad: [&[u8]; 6] = [
            &[1],
            &[77, 0, 0],
            &[255, 1],
            &[6, 0, 0, 0, 0, 0x10, 0, 1],
            &[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xfc],
            &[248, 0, 0, 0, 0, 0, 0, 0, 65],
        ];
        for bytes in bad {
            assert!(parse(bytes, false).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            kind in proptest::sample::select(vec![0_u8, 2, 3, 4, 5, 6, 150, 248, 251, 255]),
            side_buttons: bool,
        ) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Ok(Parsed::Complete(_, used)) = parse(&bytes, side_buttons) {
                prop_assert!(used > 0 && used <= bytes.len());
                // A message that is cut short is incomplete, never another one.
                for len in 0..used {
                    prop_assert_eq!(parse(&bytes[..len], side_buttons), Ok(Parsed::Incomplete));
                }
            }
        }
    }
}
