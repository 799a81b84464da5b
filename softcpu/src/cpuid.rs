//! What CPUID tells the guest.

/// Family, model and stepping: CPUID leaf 1, EAX.
pub fn signature() -> u32 {
    0x0001_06a3
}
