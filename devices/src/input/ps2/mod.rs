//! The PC's first keyboard and mouse: an i8042 controller with a PS/2 keyboard and a PS/2 mouse behind it.
//!
//! ```text
//!   InputEvent --> Keyboard --set 1, 2 or 3--+                 +--> port 60, IRQ 1
//!                                            +--> I8042 buffer +
//!   InputEvent --> Mouse ------packets-------+   (one byte)    +--> port 60, IRQ 12
//!
//!   port 64  status, commands        port 60  data: of the controller, the keyboard, or (command D4) the mouse
//! ```
//!
//! What they do is IBM's PS/2 Hardware Interface Technical Reference ("Keyboard and Auxiliary Device Controller",
//! "Keyboards", "Mouse"), with the wheel and the side buttons as Microsoft's IntelliMouse has them.

mod codes;
mod controller;
mod keyboard;
mod mouse;
#[cfg(test)]
mod tests;

pub(super) use codes::scan_code;
pub use controller::{
    I8042, I8042_DATA_PORT, I8042_STATUS_PORT, I8042State, KEYBOARD_IRQ, MOUSE_IRQ, Reply,
};
pub use keyboard::{Argument as KeyboardArgument, KeyboardState};
pub use mouse::{Argument as MouseArgument, MouseState, Report};
