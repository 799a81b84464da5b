//! The local APIC.

/// One vCPU's local APIC.
pub struct Lapic {}

impl Lapic {
    /// In its state after reset; `index` is the initial APIC id.
    pub fn new(_index: u32) -> Self {
        Self {}
    }
}
