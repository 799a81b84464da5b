//! PCI Express in the shape of Intel's Q35: one root bus, every device on it an integrated endpoint.
//!
//! ```text
//!   CF8/CFC --+                        +-- 00:00.0  host bridge (8086:29C0)
//!             +--> Root (slots of bus 0) +-- 00:01.0 .. 00:1e.0  devices
//!   ECAM -----+                        +-- 00:1f.0  ICH9 LPC (8086:2918)
//!                   |
//!                   +-- Function --> Endpoint: config space, BARs, MSI-X, INTx
//!                                        |  BARs, as the guest moves them
//!                                        v
//!                                    SystemBus
//! ```
//!
//! There may be no firmware (a kernel is started directly), so [`Root::add`] assigns every BAR from
//! the machine's [`Windows`]; those are the reset values, and firmware or the guest may move them. The
//! same windows and the same interrupt routing ([`intx_gsi`]) go into the ACPI tables.

mod bridge;
mod config;
mod endpoint;
mod intx;
mod msi;
mod msix;
mod root;
mod windows;

pub use bridge::{HOST_BRIDGE, ICH9_LPC, IdentityFunction, host_bridge, ich9_lpc};
pub use config::{ConfigSpace, ConfigState, Identity};
pub use endpoint::{Bar, BarKind, Changes, Endpoint, EndpointBuilder, EndpointState};
pub use intx::{Intx, intx_gsi};
pub use msi::Msi;
pub use msix::{Msix, MsixState, MsixVector};
pub use root::{ECAM_BASE, ECAM_SIZE, Function, Root, Slot};
pub use windows::{Allocator, IO_WINDOW, MMIO32_WINDOW, Windows};

/// A function's place: bus, device (slot) and function number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Bus, 0 for the root bus.
    pub bus: u8,
    /// Device (slot), 0..32.
    pub device: u8,
    /// Function, 0..8.
    pub function: u8,
}

impl Bdf {
    /// Function 0 of `device` on the root bus.
    pub const fn on_root(device: u8) -> Self {
        Self { bus: 0, device, function: 0 }
    }
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{:x}", self.bus, self.device, self.function)
    }
}

/// Why the machine's PCI bus cannot be as asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No slot is left.
    #[error("all slots of the PCI root bus are taken; use fewer devices")]
    NoSlot,
    /// The slot is in use or does not exist.
    #[error("PCI slot {0} is taken or does not exist; choose another (1 to 30), or none")]
    Slot(Bdf),
    /// A BAR finds no room.
    #[error("no room for {bytes:#x} bytes of PCI device {at} in the {window} window")]
    NoRoom {
        /// The device.
        at: Bdf,
        /// What its BAR needs.
        bytes: u64,
        /// Which window is full.
        window: &'static str,
    },
    /// The fixed ranges of the PCI bus are taken by something else.
    #[error("cannot put PCI configuration access on the bus")]
    Bus(#[from] crate::bus::Overlap),
    /// A display's memory cannot be a BAR.
    #[error("a frame buffer of {0} bytes: it must be a power of two from 1 MiB to 256 MiB")]
    FrameBuffer(u64),
    /// What was saved does not fit this device.
    #[error("saved PCI state does not fit the device: {0}")]
    State(&'static str),
}
