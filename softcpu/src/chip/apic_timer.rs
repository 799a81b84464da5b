//! The local APIC's timer (SDM volume 3, 12.5.4).
//!
//! Kept as one number, the host TSC at which it runs out; the count that the guest reads follows from
//! that. The timer's clock has 1 GHz, before the divider.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock;

/// The timer's clock in Hz, as CPUID leaves 15H and 4000_0010H tell it.
pub const TIMER_HZ: u64 = 1_000_000_000;
/// No deadline.
pub const NEVER: u64 = u64::MAX;

/// How the timer counts (LVT timer register, bits 18:17).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Down to zero, once.
    OneShot,
    /// And again.
    Periodic,
    /// Until the TSC reaches IA32_TSC_DEADLINE.
    TscDeadline,
}

impl Mode {
    /// From the LVT timer register. The reserved fourth value counts as one-shot.
    pub fn of_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// The divisor that a divide configuration register stands for.
fn divisor(register: u32) -> u64 {
    let bits = register & 3 | register >> 1 & 4;
    if bits == 7 { 1 } else { 2 << bits }
}

/// `count` of the divided clock, in host TSC ticks; at least one.
fn ticks(count: u32, divide: u32) -> u64 {
    clock::nanos_to_ticks(u64::from(count) * divisor(divide) * (clock::NANOS / TIMER_HZ)).max(1)
}

/// The timer. Only its own vCPU's thread changes it.
pub struct Timer {
    deadline: AtomicU64,
    /// IA32_TSC_DEADLINE while armed.
    guest: AtomicU64,
}

impl Default for Timer {
    fn default() -> Self {
        Self { deadline: AtomicU64::new(NEVER), guest: AtomicU64::new(0) }
    }
}

impl Timer {
    fn set(&self, deadline: u64, guest: u64) {
        self.deadline.store(deadline, Ordering::Relaxed);
        self.guest.store(guest, Ordering::Relaxed);
    }

    /// Disarms it.
    pub fn stop(&self) {
        self.set(NEVER, 0);
    }

    /// The host TSC at which it runs out, or [`NEVER`].
    #[inline]
    pub fn deadline(&self) -> u64 {
        self.deadline.load(Ordering::Relaxed)
    }

    /// IA32_TSC_DEADLINE; 0 if not armed.
    pub fn guest_deadline(&self) -> u64 {
        self.guest.load(Ordering::Relaxed)
    }

    /// Counts down from `count`; 0 stops it.
    pub fn start(&self, now: u64, count: u32, divide: u32) {
        if count == 0 {
            return self.stop();
        }
        self.set(now.saturating_add(ticks(count, divide)).min(NEVER - 1), 0);
    }

    /// Runs out when the guest's TSC (host's plus `offset`) reaches `guest`; 0 stops it.
    pub fn arm_tsc(&self, guest: u64, offset: u64) {
        if guest == 0 {
            return self.stop();
        }
        let host = i128::from(guest) - i128::from(offset as i64);
        self.set(host.clamp(0, i128::from(NEVER - 1)) as u64, guest);
    }

    /// Whether it has run out by `now`; a periodic one is wound up again. Periods that were missed are one.
    pub fn expired(&self, now: u64, mode: Mode, initial: u32, divide: u32) -> bool {
        let at = self.deadline();
        if at == NEVER || at > now {
            return false;
        }
        if mode == Mode::Periodic && initial != 0 {
            let period = ticks(initial, divide);
            let periods = (now - at) / period + 1;
            self.set(at.saturating_add(periods.saturating_mul(period)).min(NEVER - 1), 0);
        } else {
            self.stop();
        }
        true
    }

    /// The current-count register.
    pub fn current(&self, now: u64, mode: Mode, initial: u32, divide: u32) -> u32 {
        let at = self.deadline();
        if at == NEVER || mode == Mode::TscDeadline {
            return 0;
        }
        let left = match (at.checked_sub(now), mode) {
            (Some(left), _) => left,
            // Past the end, but nobody has looked yet.
            (None, Mode::Periodic) => {
                let period = ticks(initial, divide);
                period - (now - at) % period
            }
            (None, _) => 0,
        };
        let count = clock::ticks_to_nanos(left) / (divisor(divide) * (clock::NANOS / TIMER_HZ));
        u32::try_from(count).unwrap_or(u32::MAX).min(initial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(n: u64) -> u64 {
        clock::nanos_to_ticks(n * 1000)
    }

    #[test]
    fn divisors() {
        let all = [0, 1, 2, 3, 8, 9, 10, 11].map(divisor);
        assert_eq!(all, [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn one_shot_runs_out_once() {
        let timer = Timer::default();
        timer.start(1000, 100_000, 0xb);
        assert_eq!(timer.deadline(), 1000 + us(100));
        let half = 1000 + us(50);
        let current = timer.current(half, Mode::OneShot, 100_000, 0xb);
        assert!((49_990..=50_010).contains(&current), "{current}");
        assert!(!timer.expired(half, Mode::OneShot, 100_000, 0xb));
        assert!(timer.expired(1000 + us(101), Mode::OneShot, 100_000, 0xb));
        assert!(!timer.expired(1000 + us(900), Mode::OneShot, 100_000, 0xb));
        assert_eq!(timer.current(1000 + us(900), Mode::OneShot, 100_000, 0xb), 0);
    }

    #[test]
    fn periodic_keeps_its_phase() {
        let timer = Timer::default();
        // 1000 x 16 ns.
        timer.start(0, 1000, 3);
        let period = us(16);
        assert!(timer.expired(period, Mode::Periodic, 1000, 3));
        assert_eq!(timer.deadline(), 2 * period);
        // Late by a few periods: once, and the phase stays.
        assert!(timer.expired(5 * period + 7, Mode::Periodic, 1000, 3));
        assert_eq!(timer.deadline(), 6 * period);
        assert!(timer.current(7 * period - 1, Mode::Periodic, 1000, 3) < 3);
    }

    #[test]
    fn the_tsc_deadline_is_the_guests() {
        let timer = Timer::default();
        timer.arm_tsc(500, 100u64.wrapping_neg());
        assert_eq!((timer.deadline(), timer.guest_deadline()), (600, 500));
        timer.arm_tsc(u64::MAX, 0);
        assert_ne!(timer.deadline(), NEVER);
        timer.arm_tsc(5, 10);
        assert!(timer.expired(1, Mode::TscDeadline, 0, 0), "in the past");
        assert_eq!(timer.guest_deadline(), 0);
        timer.arm_tsc(0, 0);
        assert_eq!(timer.deadline(), NEVER);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let timer = Timer::default();
        timer.start(u64::MAX - 3, u32::MAX, 10);
        assert_ne!(timer.deadline(), NEVER);
        timer.start(0, 1, 0xb);
        assert!(timer.expired(u64::MAX - 1, Mode::Periodic, 1, 0xb));
        timer.current(u64::MAX, Mode::Periodic, 1, 0xb);
    }
}
