//! The 8254 programmable interval timer (Intel data sheet 231164) and port 61H, which gates its
//! counter 2 to the speaker.
//!
//! ```text
//!   1.193182 MHz --+--> counter 0 --> IRQ 0
//!                  +--> counter 1     (once: memory refresh)
//!   61H bit 0 -----+--> counter 2 --> 61H bit 5, speaker
//! ```
//!
//! Nothing ticks: what a counter shows is computed from when it was loaded. Time is the caller's,
//! in nanoseconds ([`crate::clock::monotonic_nanos`]).

use crate::clock::NANOS;

/// The counters' input frequency in Hz.
pub const PIT_HZ: u64 = 1_193_182;
/// [`Channel::load_time`] of a counter that does not count (nothing loaded, or not triggered).
pub const NOT_COUNTING: i64 = i64::MAX;
/// The refresh bit of port 61H toggles this often.
const REFRESH_NANOS: i64 = 15_085;

const LSB: u8 = 1;
const MSB: u8 = 2;
/// Low byte, then high byte: the low one is next.
const BOTH: u8 = 3;
/// Low byte, then high byte: the high one is next.
const BOTH_HIGH: u8 = 4;

/// One counter. The fields are its state, in the form in which it is saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Channel {
    /// Reload value, 1..=65536 (0 stands for 65536); counted in binary also when `bcd`.
    pub count: u32,
    /// Latched count.
    pub latched_count: u16,
    /// Which bytes of the latch remain to be read: 0 none, 1 low, 2 high, 3 both.
    pub count_latched: u8,
    /// A latched status waits.
    pub status_latched: bool,
    /// The latched status.
    pub status: u8,
    /// Which byte the next read gives: 1 low, 2 high, 3 low then high, 4 the high one of both.
    pub read_state: u8,
    /// Which byte the next write sets, likewise.
    pub write_state: u8,
    /// The low byte while waiting for the high one.
    pub write_latch: u8,
    /// Access mode (1 low, 2 high, 3 both).
    pub rw_mode: u8,
    /// Mode 0..=5.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// The gate input.
    pub gate: bool,
    /// When counting began, in nanoseconds, or [`NOT_COUNTING`].
    pub load_time: i64,
    /// When the gate stopped the counting (modes 0 and 4).
    pub paused_at: Option<i64>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            rw_mode: BOTH,
            read_state: BOTH,
            write_state: BOTH,
            mode: 3,
            gate,
            load_time: NOT_COUNTING,
            ..Self::default()
        }
    }

    fn reload(&self) -> u64 {
        match self.count {
            0 if self.bcd => 10_000,
            0 => 0x1_0000,
            n => u64::from(n),
        }
    }

    /// Ticks since counting began; none if it did not.
    fn ticks(&self, now: i64) -> Option<u64> {
        if self.load_time == NOT_COUNTING {
            return None;
        }
        let nanos = self.paused_at.unwrap_or(now).saturating_sub(self.load_time).max(0) as u64;
        Some((u128::from(nanos) * u128::from(PIT_HZ) / u128::from(NANOS)) as u64)
    }

    /// The counting element.
    fn value(&self, now: i64) -> u16 {
        let reload = self.reload();
        let Some(ticks) = self.ticks(now) else { return self.digits(reload) };
        let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
        self.digits(match self.mode {
            2 => reload - ticks % reload,
            3 => reload - 2 * ticks % reload,
            _ => (reload + wrap - ticks % wrap) % wrap,
        })
    }

    /// A count as the bus shows it.
    fn digits(&self, count: u64) -> u16 {
        if !self.bcd {
            return count as u16;
        }
        let digit = |over: u64| (count / over % 10) as u16;
        digit(1) | digit(10) << 4 | digit(100) << 8 | digit(1000) << 12
    }

    /// The other way round. Digits over 9 count as what they are.
    fn count_of(&self, value: u16) -> u32 {
        if !self.bcd {
            return u32::from(value);
        }
        [1u32, 10, 100, 1000]
            .iter()
            .enumerate()
            .map(|(i, weight)| u32::from(value >> (4 * i) & 15) * weight)
            .sum()
    }

    /// The output.
    pub fn out(&self, now: i64) -> bool {
        let reload = self.reload();
        let Some(ticks) = self.ticks(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => ticks >= reload,
            2 => !self.gate || ticks % reload != reload - 1,
            3 => !self.gate || ticks % reload < reload.div_ceil(2),
            _ => ticks != reload,
        }
    }

    /// How often the output rose since counting began.
    fn rises(&self, now: i64) -> u64 {
        let reload = self.reload();
        let Some(ticks) = self.ticks(now) else { return 0 };
        match self.mode {
            0 | 1 => u64::from(ticks >= reload),
            2 | 3 if !self.gate => 0,
            2 | 3 => ticks / reload,
            _ => u64::from(ticks > reload),
        }
    }

    /// When the output rises next, in nanoseconds.
    fn next_rise(&self, now: i64) -> Option<i64> {
        let reload = self.reload();
        let ticks = self.ticks(now)?;
        let at = match self.mode {
            0 | 1 => reload,
            2 | 3 => (ticks / reload + 1) * reload,
            _ => reload + 1,
        };
        if at <= ticks || !self.gate {
            return None;
        }
        let nanos = (u128::from(at) * u128::from(NANOS)).div_ceil(u128::from(PIT_HZ));
        i64::try_from(nanos).ok()?.checked_add(self.load_time)
    }

    fn control(&mut self, value: u8) {
        self.rw_mode = value >> 4 & 3;
        self.read_state = self.rw_mode;
        self.write_state = self.rw_mode;
        self.mode = match value >> 1 & 7 {
            mode @ 0..6 => mode,
            mode => mode & 3,
        };
        self.bcd = value & 1 != 0;
        self.count_latched = 0;
        self.status_latched = false;
        self.load_time = NOT_COUNTING;
        self.paused_at = None;
    }

    fn write(&mut self, value: u8, now: i64) {
        match self.write_state {
            LSB => self.load(u16::from(value), now),
            MSB => self.load(u16::from(value) << 8, now),
            BOTH => {
                self.write_latch = value;
                self.write_state = BOTH_HIGH;
                if self.mode == 0 {
                    // The first byte stops the counting (data sheet, mode 0).
                    self.load_time = NOT_COUNTING;
                }
            }
            _ => {
                self.write_state = BOTH;
                self.load(u16::from(value) << 8 | u16::from(self.write_latch), now);
            }
        }
    }

    fn load(&mut self, value: u16, now: i64) {
        self.count = self.count_of(value);
        // Modes 1 and 5 wait for the gate.
        if !matches!(self.mode, 1 | 5) {
            self.start(now);
        }
    }

    fn start(&mut self, now: i64) {
        self.load_time = now;
        self.paused_at = (!self.gate && matches!(self.mode, 0 | 4)).then_some(now);
    }

    fn set_gate(&mut self, gate: bool, now: i64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            0 | 4 if falls => self.paused_at = Some(now),
            0 | 4 if rises => {
                if let (Some(at), true) = (self.paused_at.take(), self.load_time != NOT_COUNTING) {
                    self.load_time = self.load_time.saturating_add(now.saturating_sub(at));
                }
            }
            1 | 5 if rises => self.start(now),
            2 | 3 if rises && self.load_time != NOT_COUNTING => self.start(now),
            _ => {}
        }
    }

    fn read(&mut self, now: i64) -> u8 {
        if std::mem::take(&mut self.status_latched) {
            return self.status;
        }
        match self.count_latched {
            0 => self.read_live(now),
            MSB => {
                self.count_latched = 0;
                (self.latched_count >> 8) as u8
            }
            both_or_low => {
                self.count_latched = if both_or_low == LSB { 0 } else { MSB };
                self.latched_count as u8
            }
        }
    }

    fn read_live(&mut self, now: i64) -> u8 {
        let value = self.value(now);
        match self.read_state {
            BOTH => {
                self.read_state = BOTH_HIGH;
                value as u8
            }
            BOTH_HIGH => {
                self.read_state = BOTH;
                (value >> 8) as u8
            }
            MSB => (value >> 8) as u8,
            _ => value as u8,
        }
    }

    fn latch_count(&mut self, now: i64) {
        if self.count_latched == 0 {
            self.latched_count = self.value(now);
            self.count_latched = self.rw_mode;
        }
    }

    fn latch_status(&mut self, now: i64) {
        if !self.status_latched {
            let null = self.load_time == NOT_COUNTING;
            self.status = u8::from(self.out(now)) << 7
                | u8::from(null) << 6
                | self.rw_mode << 4
                | self.mode << 1
                | u8::from(self.bcd);
            self.status_latched = true;
        }
    }

    /// Saved state made safe: what a guest could not have made is brought into range, and a counter
    /// loaded in this host's future (another host's past) begins now.
    fn restored(mut self, now: i64) -> Self {
        self.count = self.count.min(0x1_0000);
        self.mode = self.mode.min(5);
        self.rw_mode = if matches!(self.rw_mode, LSB..=BOTH) { self.rw_mode } else { BOTH };
        self.count_latched = self.count_latched.min(BOTH);
        if self.load_time != NOT_COUNTING && self.load_time > now {
            self.load_time = now;
        }
        if !self.gate && matches!(self.mode, 0 | 4) && self.paused_at.is_none() {
            self.paused_at = Some(now);
        }
        self
    }
}

/// The three counters and port 61H.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pit {
    channels: [Channel; 3],
    speaker: bool,
    /// Rises of counter 0's output that have been told already.
    told: u64,
}

/// What to do with IRQ 0 after the PIT was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Irq0 {
    /// The output rose since the last time: the line goes down and up.
    pub edge: bool,
    /// The line's level now.
    pub level: bool,
}

impl Default for Pit {
    fn default() -> Self {
        let channel = Channel::new;
        Self { channels: [channel(true), channel(true), channel(false)], speaker: false, told: 0 }
    }
}

impl Pit {
    /// Whether `port` is the PIT's.
    pub fn claims(port: u16) -> bool {
        matches!(port, 0x40..=0x43 | 0x61)
    }

    /// `IN` at time `now`.
    pub fn read(&mut self, port: u16, now: i64) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now),
            0x61 => {
                let refresh = now.div_euclid(REFRESH_NANOS) & 1;
                u8::from(self.channels[2].gate)
                    | u8::from(self.speaker) << 1
                    | (refresh as u8) << 4
                    | u8::from(self.channels[2].out(now)) << 5
            }
            _ => 0xff,
        }
    }

    /// `OUT` at time `now`. [`Pit::poll`] comes next.
    pub fn write(&mut self, port: u16, value: u8, now: i64) {
        match port {
            0x40..=0x42 => {
                let index = usize::from(port - 0x40);
                self.channels[index].write(value, now);
                if index == 0 {
                    self.told = 0;
                }
            }
            0x43 => self.control(value, now),
            _ => {
                self.speaker = value & 2 != 0;
                self.channels[2].set_gate(value & 1 != 0, now);
            }
        }
    }

    fn control(&mut self, value: u8, now: i64) {
        let which = usize::from(value >> 6);
        if which == 3 {
            // Read-back: both latches, of any counters.
            for (i, channel) in self.channels.iter_mut().enumerate() {
                if value >> (i + 1) & 1 == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(now);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now);
                }
            }
            return;
        }
        if value & 0x30 == 0 {
            self.channels[which].latch_count(now);
            return;
        }
        self.channels[which].control(value);
        if which == 0 {
            self.told = 0;
        }
    }

    /// What IRQ 0 does by `now`. Ticks that came too close together to be told apart are one.
    pub fn poll(&mut self, now: i64) -> Irq0 {
        let rises = self.channels[0].rises(now);
        let edge = rises > self.told;
        self.told = rises;
        Irq0 { edge, level: self.channels[0].out(now) }
    }

    /// When [`Pit::poll`] is due, in nanoseconds.
    pub fn next_deadline(&self, now: i64) -> Option<i64> {
        self.channels[0].next_rise(now)
    }

    /// The counters, and whether the speaker is on.
    pub fn state(&self) -> ([Channel; 3], bool) {
        (self.channels, self.speaker)
    }

    /// Puts saved state in place. IRQ 0 is not raised for what had happened before.
    pub fn set_state(&mut self, channels: [Channel; 3], speaker: bool, now: i64) {
        self.channels = channels.map(|channel| channel.restored(now));
        self.speaker = speaker;
        self.told = self.channels[0].rises(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first nanosecond at which `n` ticks have passed since 0.
    fn at(n: u64) -> i64 {
        (n * NANOS).div_ceil(PIT_HZ) as i64
    }

    fn with(control: u8, count: u16) -> Pit {
        let mut pit = Pit::default();
        let port = 0x40 + u16::from(control >> 6);
        pit.write(0x43, control, 0);
        pit.write(port, count as u8, 0);
        pit.write(port, (count >> 8) as u8, 0);
        pit
    }

    fn latched(pit: &mut Pit, channel: u8, now: i64) -> u16 {
        pit.write(0x43, channel << 6, now);
        let port = 0x40 + u16::from(channel);
        u16::from(pit.read(port, now)) | u16::from(pit.read(port, now)) << 8
    }

    #[test]
    fn mode_2_gives_a_pulse_every_period() {
        let mut pit = with(0x34, 1000);
        assert_eq!(pit.poll(0), Irq0 { edge: false, level: true });
        assert_eq!(pit.next_deadline(0), Some(at(1000)));
        assert!(!pit.poll(at(999)).level);
        assert_eq!(pit.poll(at(1000)), Irq0 { edge: true, level: true });
        assert_eq!(pit.poll(at(1001)), Irq0 { edge: false, level: true });
        assert_eq!(pit.next_deadline(at(1001)), Some(at(2000)));
        // Two periods late: one interrupt.
        assert!(pit.poll(at(4500)).edge);
        assert!(!pit.poll(at(4600)).edge);
        assert_eq!(latched(&mut pit, 0, at(5250)), 750);
    }

    #[test]
    fn mode_3_is_a_square_wave_counting_by_two() {
        let mut pit = with(0x36, 0);
        assert!(pit.poll(at(0x7fff)).level);
        assert!(!pit.poll(at(0x8000)).level);
        assert_eq!(latched(&mut pit, 0, at(0x4000)), 0x8000);
        assert!(pit.poll(at(0x1_0000)).edge);
    }

    #[test]
    fn mode_0_ends_once() {
        let mut pit = with(0x30, 500);
        assert_eq!(pit.poll(0), Irq0 { edge: false, level: false });
        assert_eq!(pit.next_deadline(0), Some(at(500)));
        assert_eq!(pit.poll(at(500)), Irq0 { edge: true, level: true });
        assert_eq!(pit.next_deadline(at(500)), None);
        assert_eq!(pit.poll(at(90_000)), Irq0 { edge: false, level: true });
        assert_eq!(latched(&mut pit, 0, at(501)), 0xffff);
        // A new count starts it again; its first byte takes the output down.
        pit.write(0x40, 10, at(600));
        assert!(!pit.poll(at(600)).level);
        assert_eq!(pit.next_deadline(at(600)), None);
        pit.write(0x40, 0, at(600));
        assert!(pit.next_deadline(at(600)).is_some());
    }

    #[test]
    fn mode_4_strobes_low_for_a_tick() {
        let mut pit = with(0x38, 100);
        assert!(pit.poll(at(99)).level);
        assert!(!pit.poll(at(100)).level);
        assert_eq!(pit.poll(at(101)), Irq0 { edge: true, level: true });
    }

    #[test]
    fn channel_2_counts_while_its_gate_is_open() {
        // As Linux calibrates: gate on, mode 0, wait for OUT2 in port 61H.
        let mut pit = with(0xb0, 2000);
        assert_eq!(latched(&mut pit, 2, at(1500)), 2000, "the gate is closed");
        pit.write(0x61, 1, 0);
        assert_eq!(pit.read(0x61, at(100)) & 0x21, 0x01);
        assert_eq!(latched(&mut pit, 2, at(1500)), 500);
        pit.write(0x61, 0, at(1500));
        assert_eq!(latched(&mut pit, 2, at(1800)), 500);
        pit.write(0x61, 1, at(1800));
        assert_eq!(pit.read(0x61, at(2290)) & 0x20, 0);
        assert_eq!(pit.read(0x61, at(2302)) & 0x20, 0x20);
    }

    #[test]
    fn modes_1_and_5_wait_for_the_gate() {
        for (control, low_from, low_to) in [(0xb2, 0, 300), (0xba, 300, 301)] {
            let mut pit = with(control, 300);
            assert_eq!(pit.read(0x61, at(400)) & 0x20, 0x20);
            pit.write(0x61, 1, 0);
            for (tick, high) in [(low_from, false), (low_to, true), (low_to + 900, true)] {
                let out = pit.read(0x61, at(tick)) & 0x20 != 0;
                assert_eq!(out, high, "control {control:#x}, tick {tick}");
            }
            // Retriggered.
            pit.write(0x61, 0, at(1000));
            pit.write(0x61, 1, at(1000));
            assert_eq!(pit.read(0x61, at(1000 + low_from) + 400) & 0x20, 0);
        }
    }

    #[test]
    fn reading_back_latches_status_and_count() {
        let mut pit = with(0x34, 1000);
        pit.write(0x43, 0xc2, at(10));
        assert_eq!(pit.read(0x40, at(500)), 0xb4);
        assert_eq!(pit.read(0x40, at(500)), 990u16 as u8);
        assert_eq!(pit.read(0x40, at(500)), (990u16 >> 8) as u8);
        // Live reads afterwards.
        assert_eq!(pit.read(0x40, at(500)), 500u16 as u8);
        pit.write(0x43, 0x34, at(600));
        pit.write(0x43, 0xe2, at(600));
        assert_eq!(pit.read(0x40, at(600)) & 0xc0, 0xc0, "null count");
    }

    #[test]
    fn a_latch_holds_until_it_is_read() {
        let mut pit = with(0x34, 1000);
        pit.write(0x43, 0, at(10));
        pit.write(0x43, 0, at(20));
        assert_eq!(pit.read(0x40, at(30)), 990u16 as u8);
        assert_eq!(pit.read(0x40, at(40)), 3);
    }

    #[test]
    fn bcd_counts_in_tens() {
        let mut pit = with(0x35, 0x1000);
        assert_eq!(latched(&mut pit, 0, at(1)), 0x0999);
        assert_eq!(pit.next_deadline(0), Some(at(1000)));
        let mut zero = with(0x35, 0);
        assert_eq!(latched(&mut zero, 0, at(1)), 0x9999);
    }

    #[test]
    fn one_byte_access_modes() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x14, 0);
        pit.write(0x40, 200, 0);
        assert_eq!((pit.read(0x40, at(50)), pit.read(0x40, at(50))), (150, 150));
        pit.write(0x43, 0x24, 0);
        pit.write(0x40, 2, 0);
        assert_eq!(pit.read(0x40, at(1)), 1);
        assert_eq!(pit.next_deadline(0), Some(at(512)));
    }

    #[test]
    fn the_refresh_bit_toggles() {
        let mut pit = Pit::default();
        assert_ne!(pit.read(0x61, 0) & 0x10, pit.read(0x61, REFRESH_NANOS) & 0x10);
    }

    #[test]
    fn state_survives_and_does_not_tick_twice() {
        let mut pit = with(0x34, 1000);
        assert!(pit.poll(at(1500)).edge);
        let (channels, speaker) = pit.state();
        let mut copy = Pit::default();
        copy.set_state(channels, speaker, at(1600));
        assert_eq!(copy.state(), pit.state());
        assert!(!copy.poll(at(1600)).edge);
        assert_eq!(copy.next_deadline(at(1600)), Some(at(2000)));
        // From a host that has been up for longer.
        let mut young = Pit::default();
        let future = channels.map(|c| Channel { load_time: at(1_000_000), ..c });
        young.set_state(future, speaker, 7);
        assert_eq!(young.next_deadline(7), Some(7 + at(1000)));
    }

    #[test]
    fn absurd_saved_state_does_no_harm() {
        let wild = Channel {
            count: u32::MAX,
            count_latched: 9,
            read_state: 77,
            write_state: 77,
            rw_mode: 200,
            mode: 99,
            load_time: i64::MIN,
            ..Channel::default()
        };
        let mut pit = Pit::default();
        pit.set_state([wild; 3], true, i64::MAX);
        for port in 0x40..0x43 {
            pit.read(port, 0);
            pit.write(port, 1, 0);
        }
        pit.poll(i64::MAX);
        pit.next_deadline(i64::MAX);
    }
}
