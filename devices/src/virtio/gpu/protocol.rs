//! The device's messages (VIRTIO 1.2, section 5.7.6): structures of little-endian words, by their place.
//!
//! ```text
//!   header (24 bytes)   type u32 | flags u32 | fence u64 | context u32 | ring u8 | padding
//!   rectangle           x | y | width | height
//! ```

use super::super::{Chain, Malformed};
use lodge_memory::GuestMemory;

/// Bytes of the header.
pub const HEADER: usize = 24;
/// Flag: the answer carries the request's fence.
const FLAG_FENCE: u32 = 1 << 0;
/// Requests.
pub mod request {
    pub const GET_DISPLAY_INFO: u32 = 0x100;
    pub const RESOURCE_CREATE_2D: u32 = 0x101;
    pub const RESOURCE_UNREF: u32 = 0x102;
    pub const SET_SCANOUT: u32 = 0x103;
    pub const RESOURCE_FLUSH: u32 = 0x104;
    pub const TRANSFER_TO_HOST_2D: u32 = 0x105;
    pub const RESOURCE_ATTACH_BACKING: u32 = 0x106;
    pub const RESOURCE_DETACH_BACKING: u32 = 0x107;
    pub const GET_EDID: u32 = 0x10a;
    pub const UPDATE_CURSOR: u32 = 0x300;
    pub const MOVE_CURSOR: u32 = 0x301;
}
/// Scanouts that the display information has room for.
pub const SCANOUTS: usize = 16;
/// Bytes of the answers with data, header included.
pub const DISPLAY_INFO: usize = HEADER + 24 * SCANOUTS;
pub const EDID_ANSWER: usize = HEADER + 8 + 1024;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Ok,
    DisplayInfo,
    Edid,
    /// Not specified, or not known.
    Unspecified,
    OutOfMemory,
    InvalidScanout,
    InvalidResource,
    InvalidParameter,
}

impl Code {
    pub fn number(self) -> u32 {
        match self {
            Code::Ok => 0x1100,
            Code::DisplayInfo => 0x1101,
            Code::Edid => 0x1104,
            Code::Unspecified => 0x1200,
            Code::OutOfMemory => 0x1201,
            Code::InvalidScanout => 0x1202,
            Code::InvalidResource => 0x1203,
            Code::InvalidParameter => 0x1205,
        }
    }
}

/// A rectangle as the driver says it: anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub x: u32,
    pub y: u32,
    pub width: u32,
    pub height: u32,
}

impl Area {
    /// Whether it has pixels and all of them are within `width` by `height`.
    pub fn fits(&self, width: u32, height: u32) -> bool {
        let inside =
            |at: u32, len: u32, most| len > 0 && at.checked_add(len).is_some_and(|end| end <= most);
        inside(self.x, self.width, width) && inside(self.y, self.height, height)
    }
}

/// A request's readable part.
pub struct Message<'a> {
    pub memory: &'a GuestMemory,
    pub chain: &'a Chain,
    header: [u8; HEADER],
}

impl<'a> Message<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// There is none: nothing can be answered.
    pub fn read(memory: &'a GuestMemory, chain: &'a Chain) -> Result<Self, Malformed> {
        let mut header = [0; HEADER];
        match chain.read(memory, 0, &mut header) {
            HEADER => Ok(Self { memory, chain, header }),
            _ => Err(Malformed::Request),
        }
    }

    /// What is asked for.
    pub fn kind(&self) -> u32 {
        let [a, b, c, d, ..] = self.header;
        u32::from_le_bytes([a, b, c, d])
    }

    /// The `N` words from `offset` on (the header's end is 24).
    ///
    /// # Errors
    /// The request is shorter.
    pub fn words<const N: usize>(&self, offset: u64) -> Result<[u32; N], Code> {
        let mut words = [0; N];
        for (at, word) in (offset..).step_by(4).zip(&mut words) {
            let mut bytes = [0; 4];
            if self.chain.read(self.memory, at, &mut bytes) < 4 {
                return Err(Code::InvalidParameter);
            }
            *word = u32::from_le_bytes(bytes);
        }
        Ok(words)
    }

    /// The rectangle after the header.
    ///
    /// # Errors
    /// The request is shorter.
    pub fn area(&self) -> Result<Area, Code> {
        let [x, y, width, height] = self.words(HEADER as u64)?;
        Ok(Area { x, y, width, height })
    }

    /// Answers; `data` follows the header. Returns how many bytes were written.
    pub fn answer(&self, code: Code, data: &[u8]) -> u32 {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&code.number().to_le_bytes());
        let [_, _, _, _, a, b, c, d, ..] = self.header;
        if u32::from_le_bytes([a, b, c, d]) & FLAG_FENCE != 0 {
            header[4..8].copy_from_slice(&FLAG_FENCE.to_le_bytes());
            header[8..].copy_from_slice(&self.header[8..]);
        }
        let mut written = self.chain.write(self.memory, 0, &header);
        if written == HEADER {
            written += self.chain.write(self.memory, HEADER as u64, data);
        }
        written as u32
    }
}

/// Where the components of a pixel of four bytes are: red, green, blue, and alpha if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    pub red: usize,
    pub green: usize,
    pub blue: usize,
    pub alpha: Option<usize>,
}

impl Format {
    /// The format with this number; names in the specification say the bytes' order in memory.
    pub fn new(number: u32) -> Option<Self> {
        let format = |red, green, blue, alpha| Some(Self { red, green, blue, alpha });
        match number {
            1 => format(2, 1, 0, Some(3)),   // B8G8R8A8
            2 => format(2, 1, 0, None),      // B8G8R8X8
            3 => format(1, 2, 3, Some(0)),   // A8R8G8B8
            4 => format(1, 2, 3, None),      // X8R8G8B8
            67 => format(0, 1, 2, Some(3)),  // R8G8B8A8
            68 => format(3, 2, 1, None),     // X8B8G8R8
            121 => format(3, 2, 1, Some(0)), // A8B8G8R8
            134 => format(0, 1, 2, None),    // R8G8B8X8
            _ => None,
        }
    }

    /// A pixel as 0xAARRGGBB.
    pub fn convert(&self, pixel: [u8; 4]) -> u32 {
        let alpha = self.alpha.map_or(0xff, |at| pixel[at]);
        u32::from_be_bytes([alpha, pixel[self.red], pixel[self.green], pixel[self.blue]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_fit_without_overflow() {
        let area = |x, y, width, height| Area { x, y, width, height };
        assert!(area(0, 0, 10, 20).fits(10, 20));
        for bad in [(1, 0, 10, 20), (0, 1, 10, 20), (0, 0, 0, 1), (0, 0, 1, 0)] {
            assert!(!area(bad.0, bad.1, bad.2, bad.3).fits(10, 20));
        }
        assert!(!area(u32::MAX, 0, 2, 1).fits(u32::MAX, 1));
    }

    #[test]
    fn formats_say_the_order_in_memory() {
        let pixel = [1, 2, 3, 4];
        for (number, expected) in [
            (1, 0x04030201),
            (2, 0xff030201),
            (3, 0x01020304),
            (4, 0xff020304),
            (67, 0x04010203),
            (68, 0xff040302),
            (121, 0x01040302),
            (134, 0xff010203),
        ] {
            assert_eq!(Format::new(number).unwrap().convert(pixel), expected, "{number}");
        }
        assert_eq!(Format::new(5), None);
    }
}
