//! Host time: the time-stamp counter, which deadlines are given in, and what it means in seconds.
//!
//! The guest's TSC runs at the host's frequency, so a deadline of the guest is one of the host after
//! an addition. Only sleeping needs real time.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Nanoseconds in a second.
pub const NANOS: u64 = 1_000_000_000;
/// How long the measurement of the TSC's frequency takes: with both ends known to some 100 ns, the
/// result is right to 10^-5.
const MEASURE: Duration = Duration::from_millis(8);
/// How long checking a frequency that the host tells takes.
const CHECK: Duration = Duration::from_millis(1);

/// The host's time-stamp counter.
#[inline(always)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 and a process may execute it on Linux unless it asked not to.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The frequency of the host's time-stamp counter in Hz. The first call takes up to 10 ms.
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| match told_hz() {
        Some(told) if told.abs_diff(measured_hz(CHECK)) < told / 500 => told,
        _ => measured_hz(MEASURE),
    })
}

/// What the host's CPUID says: leaf 15H (SDM volume 2), or a hypervisor's timing leaf 4000_0010H.
fn told_hz() -> Option<u64> {
    let max = __cpuid(0).eax;
    if max >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    let hypervisor = __cpuid_count(1, 0).ecx & 1 << 31 != 0;
    if hypervisor && (0x4000_0010..0x4000_1000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz != 0).then_some(u64::from(khz) * 1000);
    }
    None
}

fn measured_hz(time: Duration) -> u64 {
    let (tsc, begin) = together();
    let wait = Duration::from_micros(100);
    while begin.elapsed() < time {
        std::thread::sleep(wait);
    }
    let (tsc_end, end) = together();
    let nanos = end.duration_since(begin).as_nanos().max(1);
    let ticks = u128::from(tsc_end.wrapping_sub(tsc));
    u64::try_from(ticks * u128::from(NANOS) / nanos).unwrap_or(u64::MAX).max(1)
}

/// Both clocks at one moment: of some readings that with the least time around it.
fn together() -> (u64, Instant) {
    let mut best = (u64::MAX, 0, Instant::now());
    for _ in 0..16 {
        let before = host_tsc();
        let now = Instant::now();
        let after = host_tsc();
        let around = after.wrapping_sub(before);
        if around < best.0 {
            best = (around, before.wrapping_add(around / 2), now);
        }
    }
    (best.1, best.2)
}

/// When the host's TSC will be at `tsc`: now, if it is already beyond.
pub fn instant_of(tsc: u64) -> Instant {
    let now = Instant::now();
    let ahead = tsc.saturating_sub(host_tsc());
    // A year ahead at most, so that the sum is always representable.
    let nanos = ticks_to_nanos(ahead).min(365 * 86_400 * NANOS);
    now + Duration::from_nanos(nanos + 1)
}

/// TSC ticks as nanoseconds, rounded down. So nanoseconds made ticks and nanoseconds again are what they were.
pub fn ticks_to_nanos(ticks: u64) -> u64 {
    let nanos = u128::from(ticks) * u128::from(NANOS) / u128::from(tsc_hz());
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

/// Nanoseconds as TSC ticks, rounded up.
pub fn nanos_to_ticks(nanos: u64) -> u64 {
    let ticks = (u128::from(nanos) * u128::from(tsc_hz())).div_ceil(u128::from(NANOS));
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The host's CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_nanos() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours. The call cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec * NANOS as i64 + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_that_of_a_cpu() {
        assert!((100_000_000..20_000_000_000).contains(&tsc_hz()), "{}", tsc_hz());
    }

    #[test]
    fn conversions_round_trip_and_saturate() {
        if tsc_hz() >= NANOS {
            for nanos in [0, 1, 2, 3, 999, 1_000_001, u64::MAX >> 4] {
                assert_eq!(ticks_to_nanos(nanos_to_ticks(nanos)), nanos);
            }
        }
        assert_eq!(nanos_to_ticks(0), 0);
        assert!(ticks_to_nanos(u64::MAX) > 0 && nanos_to_ticks(u64::MAX) > 0);
    }

    #[test]
    fn an_instant_in_the_past_is_now() {
        let before = Instant::now();
        let at = instant_of(0);
        assert!(at >= before && at <= Instant::now());
        // The far future must not overflow.
        assert!(instant_of(u64::MAX) > before);
    }
}
