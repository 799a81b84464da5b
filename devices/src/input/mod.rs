//! Keyboards and pointers: from what a viewer does to what a guest's driver reads.
//!
//! ```text
//!   VNC, send-key --> InputEvent --> Hub --+--> virtio keyboard, tablet
//!                                          +--> USB tablet
//!                                          +--> PS/2 keyboard, mouse
//! ```

mod hub;
pub mod names;
pub mod ps2;

pub use hub::Hub;

/// A key, by its Linux event code (`KEY_*` of `input-event-codes.h`): the place on the keyboard, whatever is
/// printed on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u16);

/// A button of a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Button {
    /// The first one.
    Left,
    /// The one between.
    Middle,
    /// The second one.
    Right,
    /// At the side: back.
    Side,
    /// At the side: forward.
    Extra,
}

/// The largest coordinate of [`InputEvent::At`].
pub const RANGE: u16 = 0x7fff;

/// One thing that a person does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InputEvent {
    /// A key goes down or up.
    Key(Key, bool),
    /// A button goes down or up.
    Button(Button, bool),
    /// The pointer is at `x` (0 left ..= [`RANGE`] right), `y` (0 top ..= [`RANGE`] bottom) of the picture.
    At {
        /// From the left.
        x: u16,
        /// From the top.
        y: u16,
    },
    /// The pointer has moved by this many pixels, right and down being positive.
    Moved {
        /// To the right.
        dx: i32,
        /// Down.
        dy: i32,
    },
    /// The wheel has turned by this many notches, up (away from the person) being positive.
    Wheel(i32),
}

/// A device that takes events.
pub trait InputDevice: Send + Sync {
    /// Whether the guest's driver listens to this device for `event` now.
    fn wants(&self, event: &InputEvent) -> bool;

    /// Whether the pointer goes to where [`InputEvent::At`] says. Where it does not, places are made into movements
    /// that the guest may scale, and viewers better send movements.
    fn has_places(&self) -> bool {
        false
    }

    /// Takes events that belong together (a movement and a button, say). Never blocks; when the guest does not read,
    /// the oldest movements are merged and what then does not fit is dropped.
    fn send(&self, events: &[InputEvent]);
}
