//! What is saved of the device.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What is saved of a virtio display.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuState {
    /// The size that the viewer would like.
    pub preferred: (u32, u32),
    /// The driver was told of another size and has not acknowledged it.
    pub event: bool,
    /// The driver's pictures.
    pub resources: Vec<GpuResource>,
    /// What is on the screen, if the driver shows something.
    pub scanout: Option<GpuScanout>,
    /// The pointer's shape, if it is to be seen.
    pub cursor: Option<GpuCursor>,
    /// Where the pointer is.
    pub position: (u32, u32),
}

/// A resource, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuResource {
    /// The driver's number for it.
    pub id: u32,
    /// The format's number in the specification.
    pub format: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The guest's memory behind it: address and bytes of each piece.
    #[serde(default)]
    pub backing: Option<Vec<(u64, u32)>>,
    /// Its bytes; none if all are zero.
    #[serde(default)]
    pub pixels: Pixels,
}

/// The part of a resource that is on the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuScanout {
    /// Which resource.
    pub resource: u32,
    /// Its first column on the screen.
    pub x: u32,
    /// Its first row on the screen.
    pub y: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// The pointer, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuCursor {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The pixel that points.
    pub hot: (u32, u32),
    /// Pixels as 0xAARRGGBB, in bytes, the blue one first.
    pub pixels: Pixels,
}

/// Bytes that are written as base64 (RFC 4648, section 4), and as nothing if all are zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pixels(pub Vec<u8>);

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

impl Serialize for Pixels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::new();
        if self.0.iter().any(|byte| *byte != 0) {
            text.reserve(self.0.len().div_ceil(3) * 4);
            for three in self.0.chunks(3) {
                let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
                let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
                for i in 0..4 {
                    let sextet = (bits >> (18 - 6 * i) & 63) as usize;
                    text.push(if i <= three.len() { ALPHABET[sextet].into() } else { '=' });
                }
            }
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Pixels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        decode(text.as_bytes()).map(Self).ok_or_else(|| D::Error::custom("this is not base64"))
    }
}

fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut values = [None; 256];
    for (value, letter) in (0u32..).zip(ALPHABET) {
        values[usize::from(*letter)] = Some(value);
    }
    let padding = text.iter().rev().take_while(|letter| **letter == b'=').count();
    if !text.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for four in text[..text.len() - padding].chunks(4) {
        let mut bits = 0;
        for i in 0..4 {
            bits =
                bits << 6 | four.get(i).map_or(Some(0), |letter| values[usize::from(*letter)])?;
        }
        bytes.extend_from_slice(&bits.to_be_bytes()[1..four.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_text_and_back() {
        for (bytes, text) in [
            (&b"foobar"[..], "Zm9vYmFy"),
            (b"fooba", "Zm9vYmE="),
            (b"foob", "Zm9vYg=="),
            (b"\0", ""),
        ] {
            let written = serde_json::to_string(&Pixels(bytes.to_vec())).unwrap();
            assert_eq!(written, format!("\"{text}\""));
            let read: Pixels = serde_json::from_str(&written).unwrap();
            assert_eq!(read.0, if text.is_empty() { b"" } else { bytes });
        }
        let all: Vec<u8> = (0..=255).collect();
        let text = serde_json::to_string(&Pixels(all.clone())).unwrap();
        assert_eq!(serde_json::from_str::<Pixels>(&text).unwrap().0, all);
        for bad in ["\"A\"", "\"AA=A\"", "\"A===\"", "\"AA*A\"", "\"\u{e9}AA\""] {
            assert!(serde_json::from_str::<Pixels>(bad).is_err(), "{bad}");
        }
    }
}
