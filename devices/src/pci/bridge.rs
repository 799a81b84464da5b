//! The chipset's own functions, by which firmware and kernels recognise the board: the Q35 host
//! bridge at 00:00.0 and the ICH9 LPC bridge at 00:1f.0.
//!
//! Here they only have their identity and the registers with one right value; a function with live
//! registers of its own can take their place through [`super::Root::replace`].

use super::Bdf;
use super::config::Identity;
use super::endpoint::{Endpoint, EndpointBuilder};
use super::root::{ECAM_BASE, Function};
use crate::legacy::PM_BASE;

/// Where the host bridge is.
pub const HOST_BRIDGE: Bdf = Bdf::on_root(0);
/// Where the LPC bridge is.
pub const ICH9_LPC: Bdf = Bdf::on_root(31);

const INTEL: u16 = 0x8086;
/// Subsystem of QEMU's boards, which guests' drivers know to be a virtual machine.
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);
/// PCIEXBAR, offset 60H: bit 0 enables, bits 2:1 = 0 is 256 MiB (Intel 3 Series, 5.1.17).
const PCIEXBAR: usize = 0x60;

/// PAM0 to PAM6: whether C0000..FFFFF reads and writes RAM (Intel 3 Series, 5.1.22).
const PAM: usize = 0x90;
/// Of the LPC bridge: where the PM block is, and bit 7 of the next that it is there (ICH9, 13.1.15 and 13.1.16).
const PMBASE: usize = 0x40;
const ACPI_CNTL: usize = 0x44;
const ACPI_EN: u8 = 1 << 7;
/// PIRQA to PIRQD and PIRQE to PIRQH: bit 7 off leads one to the PIC's line in bits 3:0 (ICH9, 13.1.17).
const PIRQ: [usize; 2] = [0x60, 0x68];
const PIRQ_OFF: u8 = 1 << 7;

/// A function that only says what it is.
pub struct IdentityFunction(Endpoint);

impl IdentityFunction {
    /// A function with this endpoint and nothing else.
    pub fn new(endpoint: Endpoint) -> Self {
        Self(endpoint)
    }
}

impl Function for IdentityFunction {
    fn endpoint(&self) -> &Endpoint {
        &self.0
    }
    fn reset(&self) {
        self.0.reset();
    }
}

/// The host bridge's identity (8086:29C0), with ECAM shown as enabled.
pub fn host_bridge() -> EndpointBuilder {
    let mut builder = EndpointBuilder::new(&Identity {
        vendor: INTEL,
        device: 0x29c0,
        class: 0x06_00_00,
        revision: 0,
        subsystem: SUBSYSTEM,
        multifunction: false,
    });
    builder.config().set_u32(PCIEXBAR, ECAM_BASE as u32 | 1);
    // What is below 1 MiB is RAM, always; firmware sets these all the same and looks at them.
    builder.config().set_writable(PAM, &[0x33; 7]);
    builder
}

/// The LPC bridge's identity (8086:2918), with the PM block shown where it is.
pub fn ich9_lpc() -> EndpointBuilder {
    let mut builder = EndpointBuilder::new(&Identity {
        vendor: INTEL,
        device: 0x2918,
        class: 0x06_01_00,
        revision: 2,
        subsystem: SUBSYSTEM,
        multifunction: true,
    });
    let config = builder.config();
    // Bit 0 says that it is a port.
    config.set_u32(PMBASE, u32::from(PM_BASE) | 1);
    config.set_u8(ACPI_CNTL, ACPI_EN);
    for at in PIRQ {
        config.set_u32(at, u32::from_le_bytes([PIRQ_OFF; 4]));
        config.set_writable(at, &[0x8f; 4]);
    }
    builder
}
