//! The PC's interrupt controllers and timer: PIC pair, IOAPIC, LAPICs, PIT.

pub mod lapic;

use crate::shared::Shared;

/// PIC pair, IOAPIC and PIT of one VM.
#[derive(Default)]
pub struct Chip {}

impl Chip {
    /// In its state after reset.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Shared {
    /// A load by vCPU `me` from the LAPIC's or IOAPIC's registers; false if `gpa` is none of them.
    pub fn chip_mmio_read(&self, _me: u32, _gpa: u64, _buf: &mut [u8]) -> bool {
        false
    }
    /// A store by vCPU `me` to the LAPIC's or IOAPIC's registers; false if `gpa` is none of them.
    pub fn chip_mmio_write(&self, _me: u32, _gpa: u64, _buf: &[u8]) -> bool {
        false
    }
    /// `IN` from the PIC's or PIT's ports; false if `port` is none of them.
    pub fn chip_pio_read(&self, _port: u16, _buf: &mut [u8]) -> bool {
        false
    }
    /// `OUT` to the PIC's or PIT's ports; false if `port` is none of them.
    pub fn chip_pio_write(&self, _port: u16, _buf: &[u8]) -> bool {
        false
    }
}
