//! A VGA with the Bochs VBE extensions: what firmware, boot loaders, installers and consoles draw on.
//!
//! ```text
//!   ports 3B0..3DF -----+                         +--> Mode (what is on the screen)
//!   ports 1CE..1D1 -----+--> Card: registers -----+            |
//!   BAR 2 (MMIO) -------+      |    (one lock)                 v
//!   memory A0000..BFFFF ----- planes --> frame buffer --> text, pixels --> Picture
//!   BAR 0 -------------------------------^ (mapped into the guest: no exits)
//! ```
//!
//! Text and IBM's graphics modes come through the window at A0000, one access at a time; VBE modes are drawn by the
//! guest in BAR 0. [`Card`] is the part without PCI, which a virtio display can have too; [`Vga`] is the PCI function
//! that QEMU calls "standard VGA" (docs/specs/standard-vga of QEMU), for which SeaBIOS, OVMF and Linux have drivers.

mod card;
mod dispi;
mod function;
mod mode;
mod pixels;
mod registers;
mod state;
mod text;
mod window;

#[cfg(test)]
mod tests;

pub use card::{Card, CardConfig};
pub use dispi::Dispi;
pub(crate) use function::check_frame_buffer;
pub use function::{Vga, VgaFunctionState};
pub use state::VgaState;

/// Bytes of the MMIO range with EDID, ports and VBE registers.
pub const MMIO_BYTES: u64 = 4096;
