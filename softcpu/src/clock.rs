//! Host time.

/// The host's time-stamp counter.
#[inline(always)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 and a process may execute it on Linux unless it asked not to.
    unsafe { core::arch::x86_64::_rdtsc() }
}
