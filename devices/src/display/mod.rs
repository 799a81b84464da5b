//! What a guest shows, as a picture that somebody outside looks at.
//!
//! ```text
//!   VGA, virtio-gpu --- Screen::refresh ---> Picture + what changed ---> VNC clients, screenshots
//!   (vCPU threads)                           (one owner: the display thread)
//! ```
//!
//! The picture is pulled, not pushed: a guest draws as quickly as it likes, and nothing is computed while
//! nobody looks.

use std::sync::Arc;

pub mod edid;
pub(crate) mod paint;
pub mod vga;

/// The most columns or rows of a picture.
pub const MOST_SIDE: u32 = 8192;
/// The most pixels of a picture (64 MiB of them in this process).
pub const MOST_PIXELS: u32 = 1 << 24;

/// A rectangle of a picture, in pixels from its upper left corner. Never empty, never outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rect {
    /// Columns left of it.
    pub x: u32,
    /// Rows above it.
    pub y: u32,
    /// Its columns.
    pub width: u32,
    /// Its rows.
    pub height: u32,
}

/// A picture: rows from top to bottom, without gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width * height` pixels as 0x00RRGGBB.
    pub pixels: Vec<u32>,
}

impl Picture {
    /// A black picture.
    pub fn black(width: u32, height: u32) -> Self {
        Self { width, height, pixels: vec![0; width as usize * height as usize] }
    }

    /// All of it; nothing if it has no pixel.
    pub fn whole(&self) -> Option<Rect> {
        let rect = Rect { x: 0, y: 0, width: self.width, height: self.height };
        (self.width > 0 && self.height > 0).then_some(rect)
    }
}

/// A mouse pointer that the guest leaves to its display to draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The pixel that points, from the left.
    pub hot_x: u32,
    /// The pixel that points, from the top.
    pub hot_y: u32,
    /// `width * height` pixels as 0xAARRGGBB, not premultiplied.
    pub pixels: Vec<u32>,
}

/// What [`Screen::refresh`] changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// The picture has another size; all of it is in `dirty` then.
    pub resized: bool,
    /// What was drawn, without overlaps.
    pub dirty: Vec<Rect>,
    /// The pointer's new shape, if it has one; `Some(None)` hides it.
    pub cursor: Option<Option<Arc<Cursor>>>,
}

/// Something with a picture.
pub trait Screen: Send + Sync {
    /// Brings `picture` up to date and says what changed since the last call. One caller at a time, always with
    /// the same picture (or a new, empty one: then everything is drawn).
    fn refresh(&self, picture: &mut Picture) -> Update;

    /// Tells the guest which size its viewer would like. False if this screen cannot.
    fn suggest_size(&self, width: u32, height: u32) -> bool;
}
