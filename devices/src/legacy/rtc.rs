//! The real-time clock and its battery-backed memory (Motorola MC146818A, as in every PC's chipset).
//!
//! ```text
//!   70  index (bits 0..7), NMI mask (bit 7)        71  the register chosen
//!
//!   00 second  01 alarm   02 minute  03 alarm   04 hour  05 alarm
//!   06 weekday 07 day     08 month   09 year    0A..0D control     32 century
//!   0E..7F memory: 0F shutdown status, 15..18, 30, 31, 34, 35, 5B..5D memory sizes, 5F vCPUs - 1
//! ```
//!
//! The guest's time is the host's plus an offset, which changes when the guest sets the clock. Flags (periodic,
//! alarm, update-ended) are brought up to date when somebody looks; a timer runs only while the
//! guest has an interrupt enabled. The weekday follows from the date: writes to it are ignored.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::IrqLine;
use super::calendar::DateTime;
use super::timer::Timer;
use crate::bus::BusDevice;

/// First of the RTC's [`RTC_PORTS_LEN`] ports.
pub const RTC_PORTS: u16 = 0x70;
/// How many ports the RTC has.
pub const RTC_PORTS_LEN: u64 = 2;
/// The RTC's ISA interrupt.
pub const RTC_IRQ: u32 = 8;

const SECOND: i64 = 1_000_000_000;
/// UIP is set this long before the time changes (MC146818A, "Update Cycle"), in nanoseconds.
const UPDATE: i64 = 244_000;
/// The time base of the periodic interrupt, Hz.
const TICKS: i64 = 32_768;

mod reg {
    pub const SECOND: u8 = 0;
    pub const SECOND_ALARM: u8 = 1;
    pub const MINUTE: u8 = 2;
    pub const MINUTE_ALARM: u8 = 3;
    pub const HOUR: u8 = 4;
    pub const HOUR_ALARM: u8 = 5;
    pub const WEEKDAY: u8 = 6;
    pub const DAY: u8 = 7;
    pub const MONTH: u8 = 8;
    pub const YEAR: u8 = 9;
    pub const A: u8 = 0xa;
    pub const B: u8 = 0xb;
    pub const C: u8 = 0xc;
    pub const D: u8 = 0xd;
    pub const CENTURY: u8 = 0x32;
}
/// Register A: the next change of the time is near.
const A_UIP: u8 = 1 << 7;
const A_RATE: u8 = 0x0f;
/// Register A's divider: all of 11x hold the clock.
const A_DIVIDER_RESET: u8 = 0x60;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24H: u8 = 1 << 1;
/// Register B's interrupt enables and register C's flags: periodic, alarm, update ended.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATED: u8 = 1 << 4;
const FLAGS: u8 = PERIODIC | ALARM | UPDATED;
const C_IRQ: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
/// An alarm register from here up matches everything.
const ANY: u8 = 0xc0;

/// Where the time comes from.
pub trait WallClock: Send + Sync {
    /// Nanoseconds since 1970-01-01 00:00:00 UTC.
    fn now(&self) -> i64;
}

/// The host's clock.
#[derive(Debug, Default, Clone, Copy)]
pub struct HostClock;

impl WallClock for HostClock {
    fn now(&self) -> i64 {
        let nanos = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()),
            Err(before) => i64::try_from(before.duration().as_nanos()).map(|n| -n),
        };
        nanos.unwrap_or(i64::MAX)
    }
}

/// What firmware and old systems read from the CMOS memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RtcSetup {
    /// Bytes of RAM below 4 GiB.
    pub low_ram: u64,
    /// Bytes of RAM from 4 GiB on.
    pub high_ram: u64,
    /// vCPUs at boot.
    pub vcpus: u32,
    /// Seconds that the guest's clock is ahead of UTC at first (for guests that keep local time).
    pub utc_offset: i32,
}

/// What is saved of the RTC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RtcState {
    /// Registers and memory 00..80; time registers are not kept here.
    pub memory: Vec<u8>,
    /// The register chosen by port 70.
    pub index: u8,
    /// Port 70's bit 7.
    pub nmi_masked: bool,
    /// Nanoseconds that the guest's clock is ahead of the host's; unused while it is held.
    pub offset: i64,
    /// The time and the nanoseconds into the second, while the guest holds the clock.
    pub held: Option<(DateTime, i64)>,
}

impl Default for RtcState {
    fn default() -> Self {
        let mut memory = vec![0; 128];
        memory[usize::from(reg::A)] = 0x26;
        memory[usize::from(reg::B)] = B_24H;
        Self { memory, index: 0, nmi_masked: false, offset: 0, held: None }
    }
}

struct State {
    saved: RtcState,
    /// The guest's time up to which the flags are right.
    seen: i64,
}

/// The RTC. Its range is [`RTC_PORTS_LEN`] ports from [`RTC_PORTS`].
pub struct Rtc {
    state: Mutex<State>,
    clock: Arc<dyn WallClock>,
    line: Arc<dyn IrqLine>,
    timer: Timer,
}

impl Rtc {
    /// A clock that shows `clock`'s time and interrupts through `line`.
    pub fn new(setup: &RtcSetup, clock: Arc<dyn WallClock>, line: Arc<dyn IrqLine>) -> Arc<Self> {
        let mut saved =
            RtcState { offset: i64::from(setup.utc_offset) * SECOND, ..Default::default() };
        fill_memory(&mut saved.memory, setup);
        let state = State { seen: clock.now().saturating_add(saved.offset), saved };
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let timer = Timer::new("rtc", move || weak.upgrade().and_then(|rtc| rtc.due()));
            Self { state: Mutex::new(state), clock, line, timer }
        })
    }

    /// Whether the guest masks NMIs through port 70.
    pub fn nmi_masked(&self) -> bool {
        self.lock().saved.nmi_masked
    }

    /// Sets a byte of the memory (0EH..80H) from outside, such as the boot order. Others are ignored.
    pub fn set_memory(&self, index: u8, value: u8) {
        if (reg::D + 1..128).contains(&index) && index != reg::CENTURY {
            let mut state = self.lock();
            state.saved.set(index, value);
            fill_checksum(&mut state.saved.memory);
        }
    }

    /// As after a hardware reset: interrupts off; time and memory stay.
    pub fn reset(&self) {
        let mut state = self.lock();
        let b = state.saved.get(reg::B) & !FLAGS;
        state.saved.set(reg::B, b);
        state.saved.set(reg::C, 0);
        state.saved.nmi_masked = false;
        self.follow(&mut state);
    }

    /// Stops the timer, so that no interrupt comes while the machine is paused or saved.
    pub fn pause(&self) {
        self.timer.arm(None);
    }

    /// Goes on after [`Rtc::pause`].
    pub fn resume(&self) {
        self.follow(&mut self.lock());
    }

    /// What is saved.
    pub fn save(&self) -> RtcState {
        let mut state = self.lock();
        let now = self.clock.now();
        state.advance(now);
        state.saved.clone()
    }

    /// Puts back what [`Rtc::save`] gave. The clock goes on from the host's present time.
    pub fn restore(&self, saved: &RtcState) {
        let mut state = self.lock();
        state.saved = saved.clone();
        state.saved.memory.resize(128, 0);
        state.saved.index &= 0x7f;
        state.seen = self.clock.now().saturating_add(saved.offset);
        self.follow(&mut state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The timer fired.
    fn due(&self) -> Option<Duration> {
        let mut state = self.lock();
        let now = self.clock.now();
        state.advance(now);
        self.line.set_level(state.saved.interrupt());
        state.until_next(now)
    }

    /// After a change: the interrupt line and the timer.
    fn follow(&self, state: &mut State) {
        let now = self.clock.now();
        state.advance(now);
        self.line.set_level(state.saved.interrupt());
        self.timer.arm(state.until_next(now));
    }

    fn read_data(&self) -> u8 {
        let mut state = self.lock();
        let now = self.clock.now();
        let index = state.saved.index;
        match index {
            reg::A => {
                let near = state.saved.held.is_none()
                    && now.saturating_add(state.saved.offset).rem_euclid(SECOND) >= SECOND - UPDATE;
                state.saved.get(reg::A) | if near { A_UIP } else { 0 }
            }
            reg::C => {
                state.advance(now);
                let irq = if state.saved.interrupt() { C_IRQ } else { 0 };
                let value = state.saved.get(reg::C) | irq;
                state.saved.set(reg::C, 0);
                self.follow(&mut state);
                value
            }
            reg::D => D_VALID,
            _ if is_time(index) => {
                let time = state.saved.time(now).0;
                state.saved.encode(index, time)
            }
            _ => state.saved.get(index),
        }
    }

    fn write_data(&self, value: u8) {
        let mut state = self.lock();
        let now = self.clock.now();
        let index = state.saved.index;
        state.advance(now);
        match index {
            reg::A => {
                state.saved.set(reg::A, value & !A_UIP);
                state.hold_or_go(now);
            }
            reg::B => {
                // SET also takes back the enable of the update interrupt (MC146818A, register B).
                let value = if value & B_SET != 0 { value & !UPDATED } else { value };
                state.saved.set(reg::B, value);
                state.hold_or_go(now);
            }
            reg::C | reg::D => return,
            _ if is_time(index) => {
                let (mut time, into_second) = state.saved.time(now);
                state.saved.decode(index, value, &mut time);
                state.set_time(time, into_second, now);
            }
            _ => state.saved.set(index, value),
        }
        if index <= reg::B || index == reg::CENTURY {
            self.follow(&mut state);
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = if port == 1 { self.read_data() } else { 0xff };
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (port, &byte) in (offset..).zip(data) {
            match port {
                0 => {
                    let mut state = self.lock();
                    state.saved.index = byte & 0x7f;
                    state.saved.nmi_masked = byte & 0x80 != 0;
                }
                1 => self.write_data(byte),
                _ => {}
            }
        }
    }
}

fn is_time(index: u8) -> bool {
    matches!(
        index,
        reg::SECOND
            | reg::MINUTE
            | reg::HOUR
            | reg::WEEKDAY
            | reg::DAY
            | reg::MONTH
            | reg::YEAR
            | reg::CENTURY
    )
}

fn fill_memory(memory: &mut [u8], setup: &RtcSetup) {
    let mut word = |index: usize, value: u64| {
        let value = value.min(0xffff) as u16;
        memory[index..index + 2].copy_from_slice(&value.to_le_bytes());
    };
    let above = |start: u64| setup.low_ram.saturating_sub(start);
    word(0x15, 640);
    word(0x17, above(1 << 20) >> 10);
    word(0x30, above(1 << 20) >> 10);
    word(0x34, above(16 << 20) >> 16);
    let high = (setup.high_ram >> 16).min(0xff_ffff).to_le_bytes();
    memory[0x5b..0x5e].copy_from_slice(&high[..3]);
    // Equipment: a coprocessor.
    memory[0x14] = 2;
    memory[0x5f] = setup.vcpus.saturating_sub(1).min(255) as u8;
    fill_checksum(memory);
}

/// The sum of 10H..2EH is at 2EH, big-endian (IBM PC AT Technical Reference).
fn fill_checksum(memory: &mut [u8]) {
    let sum: u16 = memory[0x10..0x2e].iter().map(|&b| u16::from(b)).sum();
    memory[0x2e..0x30].copy_from_slice(&sum.to_be_bytes());
}

impl RtcState {
    fn get(&self, index: u8) -> u8 {
        self.memory.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn set(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    fn interrupt(&self) -> bool {
        self.get(reg::B) & self.get(reg::C) & FLAGS != 0
    }

    /// The guest's time at the host's `now`, and the nanoseconds into the second.
    fn time(&self, now: i64) -> (DateTime, i64) {
        self.held.unwrap_or_else(|| {
            let time = now.saturating_add(self.offset);
            (DateTime::from_seconds(time.div_euclid(SECOND)), time.rem_euclid(SECOND))
        })
    }

    fn binary(&self) -> bool {
        self.get(reg::B) & B_BINARY != 0
    }

    fn number(&self, value: u8) -> u8 {
        if self.binary() { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.get(reg::B) & B_24H != 0 {
            return self.number(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.number((hour + 11) % 12 + 1) | afternoon
    }

    /// How time register `index` shows `time`.
    fn encode(&self, index: u8, time: DateTime) -> u8 {
        match index {
            reg::SECOND => self.number(time.second),
            reg::MINUTE => self.number(time.minute),
            reg::HOUR => self.hour(time.hour),
            reg::WEEKDAY => self.number(time.weekday()),
            reg::DAY => self.number(time.day),
            reg::MONTH => self.number(time.month),
            reg::YEAR => self.number((time.year % 100) as u8),
            _ => self.number((time.year / 100 % 100) as u8),
        }
    }

    /// Takes a write of `value` to time register `index` into `time`.
    fn decode(&self, index: u8, value: u8, time: &mut DateTime) {
        let number = |v: u8| if self.binary() { v } else { (v >> 4) * 10 + (v & 0x0f) };
        match index {
            reg::SECOND => time.second = number(value),
            reg::MINUTE => time.minute = number(value),
            reg::HOUR if self.get(reg::B) & B_24H != 0 => time.hour = number(value),
            reg::HOUR => {
                let afternoon = if value & 0x80 != 0 { 12 } else { 0 };
                time.hour = number(value & 0x7f) % 12 + afternoon;
            }
            reg::DAY => time.day = number(value),
            reg::MONTH => time.month = number(value),
            reg::YEAR => time.year = time.year / 100 * 100 + u16::from(number(value) % 100),
            reg::CENTURY => time.year = u16::from(number(value) % 100) * 100 + time.year % 100,
            _ => {}
        }
    }

    /// Whether the alarm goes off in the second that begins at `seconds`.
    fn alarm_matches(&self, seconds: i64) -> bool {
        let of_day = seconds.rem_euclid(86_400);
        let time = DateTime {
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
            ..Default::default()
        };
        [
            (reg::SECOND_ALARM, reg::SECOND),
            (reg::MINUTE_ALARM, reg::MINUTE),
            (reg::HOUR_ALARM, reg::HOUR),
        ]
        .into_iter()
        .all(|(alarm, shown)| {
            let wanted = self.get(alarm);
            wanted >= ANY || wanted == self.encode(shown, time)
        })
    }

    /// Seconds from `seconds` (exclusive) to the next alarm, at most a day.
    fn next_alarm(&self, seconds: i64, at_most: i64) -> Option<i64> {
        (1..=at_most.min(86_400)).find(|after| self.alarm_matches(seconds.saturating_add(*after)))
    }

    /// Ticks of 1/32768 s between periodic interrupts (MC146818A, table 5).
    fn period(&self) -> Option<i64> {
        match self.get(reg::A) & A_RATE {
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }
}

/// `a * b / c` without overflow in between; saturates.
fn scale(a: i64, b: i64, c: i64) -> i64 {
    let value = (i128::from(a) * i128::from(b)).div_euclid(i128::from(c));
    value.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

impl State {
    /// Sets the flags for everything that happened up to the host's `now`.
    fn advance(&mut self, now: i64) {
        let saved = &mut self.saved;
        let now = now.saturating_add(saved.offset);
        let before = std::mem::replace(&mut self.seen, now);
        if saved.held.is_some() || now <= before {
            return;
        }
        let mut flags = saved.get(reg::C);
        if let Some(period) = saved.period() {
            let tick = |time| scale(time, TICKS, SECOND).div_euclid(period);
            if tick(now) != tick(before) {
                flags |= PERIODIC;
            }
        }
        let (first, last) = (before.div_euclid(SECOND), now.div_euclid(SECOND));
        if first != last {
            flags |= UPDATED;
            if flags & ALARM == 0 && saved.next_alarm(first, last - first).is_some() {
                flags |= ALARM;
            }
        }
        saved.set(reg::C, flags);
    }

    /// How long until an enabled interrupt that is not raised yet.
    fn until_next(&self, now: i64) -> Option<Duration> {
        let saved = &self.saved;
        if saved.held.is_some() || saved.interrupt() {
            return None;
        }
        let now = now.saturating_add(saved.offset);
        let second = now.div_euclid(SECOND);
        let enabled = |bit| saved.get(reg::B) & bit != 0;
        let periodic = saved.period().filter(|_| enabled(PERIODIC)).map(|period| {
            let next = (scale(now, TICKS, SECOND).div_euclid(period) + 1).saturating_mul(period);
            // Rounded up, so that the flag is set when the timer looks.
            scale(next, SECOND, TICKS).saturating_add(1)
        });
        let updated = enabled(UPDATED).then(|| (second + 1).saturating_mul(SECOND));
        let alarm = enabled(ALARM).then(|| saved.next_alarm(second, 86_400)).flatten();
        let alarm = alarm.map(|after| (second + after).saturating_mul(SECOND));
        let next = [periodic, updated, alarm].into_iter().flatten().min()?;
        Some(Duration::from_nanos(u64::try_from(next.saturating_sub(now)).unwrap_or(0)))
    }

    /// Registers A or B changed: holds the clock or lets it go.
    fn hold_or_go(&mut self, now: i64) {
        let divider = self.saved.get(reg::A) & A_DIVIDER_RESET == A_DIVIDER_RESET;
        let hold = divider || self.saved.get(reg::B) & B_SET != 0;
        match self.saved.held {
            None if hold => self.saved.held = Some(self.saved.time(now)),
            Some((time, into_second)) if !hold => {
                self.saved.held = None;
                self.set_time(time, into_second, now);
            }
            _ => {}
        }
        // The first update comes half a second after the divider's reset ends.
        if let Some((_, into_second)) = &mut self.saved.held
            && divider
        {
            *into_second = SECOND / 2;
        }
    }

    fn set_time(&mut self, time: DateTime, into_second: i64, now: i64) {
        if self.saved.held.is_some() {
            self.saved.held = Some((time, into_second));
            return;
        }
        let guest = time.to_seconds().saturating_mul(SECOND).saturating_add(into_second);
        self.saved.offset = guest.saturating_sub(now);
        self.seen = guest;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestLine, hammer};
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::time::Instant;

    /// 2026-11-23 14:05:09 UTC, a Monday.
    const START: i64 = 1_795_442_709;

    #[derive(Default)]
    struct Clock(AtomicI64);
    impl WallClock for Clock {
        fn now(&self) -> i64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    const SETUP: RtcSetup =
        RtcSetup { low_ram: 0x8000_0000, high_ram: 1 << 30, vcpus: 4, utc_offset: 0 };

    fn new_rtc() -> (Arc<Rtc>, Arc<Clock>, Arc<TestLine>) {
        let clock = Arc::new(Clock((START * SECOND).into()));
        let line: Arc<TestLine> = Arc::default();
        (Rtc::new(&SETUP, clock.clone(), line.clone()), clock, line)
    }

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    fn shown(rtc: &Rtc) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| get(rtc, index))
    }

    #[test]
    fn shows_the_time_in_all_forms() {
        let (rtc, clock, _) = new_rtc();
        assert_eq!(shown(&rtc), [0x20, 0x26, 0x11, 0x23, 2, 0x14, 5, 9]);
        set(&rtc, 0xb, B_24H | B_BINARY);
        assert_eq!(shown(&rtc), [20, 26, 11, 23, 2, 14, 5, 9]);
        set(&rtc, 0xb, 0);
        assert_eq!(get(&rtc, 4), 0x82);
        clock.0.fetch_add(-3 * 3600 * SECOND, Ordering::Relaxed);
        assert_eq!(get(&rtc, 4), 0x11);
        set(&rtc, 0xb, B_BINARY);
        clock.0.fetch_add(13 * 3600 * SECOND, Ordering::Relaxed);
        assert_eq!(get(&rtc, 4), 12, "midnight");
        assert_eq!(get(&rtc, 0xd), 0x80);
    }

    #[test]
    fn an_update_is_announced() {
        let (rtc, clock, _) = new_rtc();
        assert_eq!(get(&rtc, 0xa), 0x26);
        clock.0.fetch_add(SECOND - UPDATE, Ordering::Relaxed);
        assert_eq!(get(&rtc, 0xa), 0xa6);
        assert_eq!(get(&rtc, 0), 9);
        clock.0.fetch_add(UPDATE, Ordering::Relaxed);
        assert_eq!((get(&rtc, 0xa), get(&rtc, 0)), (0x26, 0x10));
        assert_eq!(get(&rtc, 0xc), UPDATED | PERIODIC);
        assert_eq!(get(&rtc, 0xc), 0);
    }

    /// The way of Linux (mc146818_set_time): SET, divider reset, fields, divider, SET clear.
    #[test]
    fn the_guest_sets_the_clock() {
        let (rtc, clock, _) = new_rtc();
        set(&rtc, 0xb, B_SET | B_24H);
        set(&rtc, 0xa, 0x76);
        for (index, value) in
            [(9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58), (0x32, 0x19)]
        {
            set(&rtc, index, value);
        }
        clock.0.fetch_add(3600 * SECOND, Ordering::Relaxed);
        assert_eq!(shown(&rtc), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58], "it is held");
        set(&rtc, 0xb, B_24H);
        set(&rtc, 0xa, 0x26);
        clock.0.fetch_add(3 * SECOND / 2, Ordering::Relaxed);
        assert_eq!(shown(&rtc), [0x20, 0, 1, 1, 7, 0, 0, 0], "half a second after 23:59:58.5");
        let saved = rtc.save();
        let (other, _, _) = new_rtc();
        other.restore(&serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap());
        assert_eq!(other.save(), saved);
    }

    #[test]
    fn alarms_match_with_wild_cards() {
        let (rtc, clock, _) = new_rtc();
        set(&rtc, reg::HOUR_ALARM, 0xff);
        set(&rtc, reg::MINUTE_ALARM, 0x06);
        set(&rtc, reg::SECOND_ALARM, 0x00);
        clock.0.fetch_add(50 * SECOND, Ordering::Relaxed);
        assert_eq!(get(&rtc, 0xc) & ALARM, 0, "14:05:59");
        set(&rtc, 0xb, B_24H | ALARM);
        let state = rtc.lock();
        assert_eq!(state.until_next(clock.now()), Some(Duration::from_secs(1)));
        drop(state);
        clock.0.fetch_add(3600 * SECOND, Ordering::Relaxed);
        assert_eq!(get(&rtc, 0xc) & (ALARM | C_IRQ), ALARM | C_IRQ);
        set(&rtc, reg::SECOND_ALARM, 0x77);
        assert_eq!(rtc.lock().until_next(clock.now()), None, "no such second");
        assert_eq!(rtc.lock().saved.next_alarm(0, i64::MAX), None);
    }

    #[test]
    fn interrupts_come_with_the_hosts_time() {
        let line: Arc<TestLine> = Arc::default();
        let rtc = Rtc::new(&SETUP, Arc::new(HostClock), line.clone());
        set(&rtc, 0xb, B_24H | PERIODIC);
        let end = Instant::now() + Duration::from_secs(30);
        for round in 1..=3 {
            while line.edges() < round && Instant::now() < end {
                std::thread::yield_now();
            }
            assert_eq!((line.level(), line.edges()), (true, round));
            assert_eq!(get(&rtc, 0xc) & (C_IRQ | PERIODIC), C_IRQ | PERIODIC);
        }
        rtc.pause();
        get(&rtc, 0xc);
        rtc.reset();
        assert!(!line.level());
    }

    #[test]
    fn memory_sizes_and_checksum() {
        let (rtc, _, _) = new_rtc();
        let word = |i| u16::from(get(&rtc, i)) | u16::from(get(&rtc, i + 1)) << 8;
        assert_eq!((word(0x15), word(0x17), word(0x34), word(0x5b)), (640, 0xffff, 0x7f00, 0x4000));
        assert_eq!((get(&rtc, 0x5d), get(&rtc, 0x5f)), (0, 3));
        set(&rtc, 0x0f, 0x0a);
        assert_eq!(get(&rtc, 0x8f), 0x0a, "the top bit is the NMI mask");
        assert!(rtc.nmi_masked());
        rtc.set_memory(0x2d, 7);
        rtc.set_memory(0xb, 0xff);
        let sum: u16 = (0x10..0x2e).map(|i| u16::from(get(&rtc, i))).sum();
        assert_eq!(word(0x2e).swap_bytes(), sum);
        assert_eq!(get(&rtc, 0xb), B_24H);
    }

    #[test]
    fn nothing_that_a_guest_writes_breaks_it() {
        let (rtc, clock, _) = new_rtc();
        for round in 0..200i64 {
            hammer(&*rtc, 2, 200);
            clock.0.store(round.wrapping_mul(0x0123_4567_89ab_cdef), Ordering::Relaxed);
        }
        rtc.restore(&RtcState { memory: vec![], index: 0xff, offset: i64::MIN, ..rtc.save() });
        hammer(&*rtc, 2, 1000);
    }
}
