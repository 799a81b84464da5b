//! ACPI power management in the shape of ICH9's PM block (ACPI 6.5, 4.8; ICH9 datasheet, 13.8.3).
//!
//! ```text
//!   600  PM1_STS  602  PM1_EN    604  PM1_CNT (SLP_TYP, SLP_EN; SCI_EN is always set)
//!   608  PM_TMR, 32 bits, 3.579545 MHz
//!   620  GPE0_STS (64 bits)      628  GPE0_EN
//!   630  SMI_EN, read-only: there is no system management mode
//!
//!   status AND enable, any bit --> SCI, level on GSI 9
//! ```
//!
//! ACPI mode is on from the start (FADT's SMI_CMD is 0), so nothing has to be switched on. Only S5
//! (soft off) exists; its SLP_TYP is 0, as firmware made for this chipset expects.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::timer::Timer;
use super::{IrqLine, PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// First of the block's [`PM_LEN`] ports.
pub const PM_BASE: u16 = 0x600;
/// How many ports the block has.
pub const PM_LEN: u64 = 0x80;
/// PM1a_EVT_BLK, 4 bytes.
pub const PM1_EVENT_BLOCK: u16 = PM_BASE;
/// PM1a_CNT_BLK, 2 bytes.
pub const PM1_CONTROL_BLOCK: u16 = PM_BASE + 4;
/// PM_TMR_BLK, 4 bytes.
pub const PM_TIMER_BLOCK: u16 = PM_BASE + 8;
/// GPE0_BLK, [`GPE0_LEN`] bytes: statuses, then enables.
pub const GPE0_BLOCK: u16 = PM_BASE + 0x20;
/// Bytes of GPE0_BLK.
pub const GPE0_LEN: u8 = 16;
/// The interrupt of ACPI events, level-triggered and active high.
pub const SCI_GSI: u32 = 9;
/// SLP_TYP of S5.
pub const S5_SLEEP_TYPE: u8 = 0;

/// The PM timer's frequency, Hz.
const TIMER_HZ: u64 = 3_579_545;
const NANOS: u64 = 1_000_000_000;
/// The timer's status bit is set when this bit of the count changes.
const TIMER_MSB: u32 = 31;

const STATUS_TIMER: u16 = 1;
const POWER_BUTTON: u16 = 1 << 8;
/// TMR, BM, GBL, PWRBTN, SLPBTN, RTC, PCIEXP_WAKE, WAK.
const STATUS_BITS: u16 = 0xc731;
/// TMR, GBL, PWRBTN, SLPBTN, RTC.
const ENABLE_BITS: u16 = 0x0721;
const SCI_EN: u16 = 1;
/// BM_RLD and SLP_TYP keep what is written.
const CONTROL_BITS: u16 = 0x1c02;
/// SLP_EN in PM1_CNT's second byte, and SLP_TYP's place there.
const SLP_EN_HIGH: u8 = 1 << 5;
const SLP_TYP_HIGH: u8 = 2;
/// APMC_EN set tells SeaBIOS that SMM is set up already, so that it leaves it alone.
const SMI_EN: u32 = 1 << 5;

/// What is saved of the PM block.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PmState {
    /// PM1_STS.
    pub status: u16,
    /// PM1_EN.
    pub enable: u16,
    /// PM1_CNT without SCI_EN.
    pub control: u16,
    /// GPE0_STS.
    pub gpe_status: u64,
    /// GPE0_EN.
    pub gpe_enable: u64,
    /// Ticks that the timer has counted since it began.
    pub ticks: u64,
}

/// The PM block. Its range is [`PM_LEN`] ports from [`PM_BASE`].
pub struct PowerManagement {
    /// `ticks` in here: up to where the timer's status bit is right.
    state: Mutex<PmState>,
    start: Instant,
    /// Ticks to add to those since `start`.
    base: AtomicU64,
    sci: Arc<dyn IrqLine>,
    power: Arc<dyn PowerSink>,
    overflow: Timer,
}

impl PowerManagement {
    /// A block that interrupts through `sci` and asks `power` to power off.
    pub fn new(sci: Arc<dyn IrqLine>, power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let overflow = Timer::new("pm-timer", move || weak.upgrade().and_then(|pm| pm.due()));
            Self {
                state: Mutex::default(),
                start: Instant::now(),
                base: AtomicU64::new(0),
                sci,
                power,
                overflow,
            }
        })
    }

    /// Presses the power button. A guest that listens shuts down and powers off; others never notice.
    pub fn press_power_button(&self) {
        let mut state = self.lock();
        state.status |= POWER_BUTTON;
        self.drive(&state);
    }

    /// Raises general-purpose event `event` (0..64).
    pub fn raise_gpe(&self, event: u32) {
        let mut state = self.lock();
        state.gpe_status |= 1u64.checked_shl(event).unwrap_or(0);
        self.drive(&state);
    }

    /// As after a hardware reset; the timer goes on.
    pub fn reset(&self) {
        let mut state = self.lock();
        *state = PmState { ticks: self.ticks(), ..PmState::default() };
        self.follow(&state);
    }

    /// Stops the timer's event, so that none comes while the machine is paused or saved.
    pub fn pause(&self) {
        self.overflow.arm(None);
    }

    /// Goes on after [`PowerManagement::pause`].
    pub fn resume(&self) {
        self.follow(&self.lock());
    }

    /// What is saved.
    pub fn save(&self) -> PmState {
        let mut state = self.lock();
        self.advance(&mut state);
        *state
    }

    /// Puts back what [`PowerManagement::save`] gave; the timer goes on from the count saved.
    pub fn restore(&self, saved: &PmState) {
        let mut state = self.lock();
        self.base.store(saved.ticks.wrapping_sub(self.since_start()), Ordering::Relaxed);
        *state = *saved;
        state.status &= STATUS_BITS;
        state.enable &= ENABLE_BITS;
        state.control &= CONTROL_BITS;
        self.follow(&state);
    }

    fn lock(&self) -> MutexGuard<'_, PmState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_start(&self) -> u64 {
        let elapsed = self.start.elapsed();
        // Whole seconds apart, so that nothing overflows in this universe's lifetime.
        elapsed.as_secs().wrapping_mul(TIMER_HZ)
            + u64::from(elapsed.subsec_nanos()) * TIMER_HZ / NANOS
    }

    /// The timer's count in full; the guest sees its low 32 bits.
    fn ticks(&self) -> u64 {
        self.since_start().wrapping_add(self.base.load(Ordering::Relaxed))
    }

    /// Sets the timer's status bit if the count's top bit changed since the last look.
    fn advance(&self, state: &mut PmState) {
        let now = self.ticks();
        let before = std::mem::replace(&mut state.ticks, now);
        if now >> TIMER_MSB != before >> TIMER_MSB {
            state.status |= STATUS_TIMER;
        }
    }

    fn drive(&self, state: &PmState) {
        let pm1 = state.status & state.enable & ENABLE_BITS != 0;
        self.sci.set_level(pm1 || state.gpe_status & state.gpe_enable != 0);
    }

    /// After a change: the SCI and the timer.
    fn follow(&self, state: &PmState) {
        self.drive(state);
        self.overflow.arm(Self::until_overflow(state));
    }

    fn until_overflow(state: &PmState) -> Option<Duration> {
        if state.enable & !state.status & STATUS_TIMER == 0 {
            return None;
        }
        let left = (1 << TIMER_MSB) - (state.ticks & ((1 << TIMER_MSB) - 1));
        // Rounded up, so that the bit has changed when the timer looks.
        Some(Duration::from_nanos(left * NANOS / TIMER_HZ + 300))
    }

    fn due(&self) -> Option<Duration> {
        let mut state = self.lock();
        self.advance(&mut state);
        self.drive(&state);
        Self::until_overflow(&state)
    }

    fn sleep(&self, sleep_type: u8) {
        if sleep_type == S5_SLEEP_TYPE {
            self.power.request(PowerRequest::PowerOff);
        } else {
            tracing::warn!(sleep_type, "the guest asks for a sleep state that does not exist");
        }
    }
}

impl PmState {
    fn read_byte(&self, offset: u64) -> u8 {
        let byte = |bytes: &[u8], at: u64| {
            usize::try_from(at).ok().and_then(|at| bytes.get(at)).copied().unwrap_or(0)
        };
        match offset {
            0..=1 => byte(&self.status.to_le_bytes(), offset),
            2..=3 => byte(&self.enable.to_le_bytes(), offset - 2),
            4..=5 => byte(&(self.control | SCI_EN).to_le_bytes(), offset - 4),
            8..=11 => byte(&(self.ticks as u32).to_le_bytes(), offset - 8),
            0x20..=0x27 => byte(&self.gpe_status.to_le_bytes(), offset - 0x20),
            0x28..=0x2f => byte(&self.gpe_enable.to_le_bytes(), offset - 0x28),
            0x30..=0x33 => byte(&SMI_EN.to_le_bytes(), offset - 0x30),
            _ => 0,
        }
    }

    /// Takes a byte; gives SLP_TYP if it starts a sleep.
    fn write_byte(&mut self, offset: u64, value: u8) -> Option<u8> {
        let put16 = |old: u16, high: bool, value: u8| {
            if high {
                old & 0x00ff | u16::from(value) << 8
            } else {
                old & 0xff00 | u16::from(value)
            }
        };
        match offset {
            0..=1 => self.status &= !(u16::from(value) << (8 * offset)),
            2..=3 => self.enable = put16(self.enable, offset == 3, value) & ENABLE_BITS,
            4..=5 => {
                self.control = put16(self.control, offset == 5, value) & CONTROL_BITS;
                let sleep = offset == 5 && value & SLP_EN_HIGH != 0;
                return sleep.then_some(value >> SLP_TYP_HIGH & 7);
            }
            0x20..=0x27 => self.gpe_status &= !(u64::from(value) << (8 * (offset - 0x20))),
            0x28..=0x2f => {
                let shift = 8 * (offset - 0x28);
                self.gpe_enable = self.gpe_enable & !(0xff << shift) | u64::from(value) << shift;
            }
            _ => {}
        }
        None
    }
}

impl BusDevice for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Firmware polls the timer millions of times: no lock for it.
        if offset == 8
            && let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *data = (self.ticks() as u32).to_le_bytes();
            return;
        }
        let mut state = self.lock();
        self.advance(&mut state);
        for (at, byte) in (offset..).zip(data) {
            *byte = state.read_byte(at);
        }
        self.drive(&state);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        self.advance(&mut state);
        let mut sleep = None;
        for (at, &byte) in (offset..).zip(data) {
            sleep = state.write_byte(at, byte).or(sleep);
        }
        self.follow(&state);
        drop(state);
        if let Some(sleep_type) = sleep {
            self.sleep(sleep_type);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestLine, TestPower, hammer};
    use super::*;

    fn new_pm() -> (Arc<PowerManagement>, Arc<TestLine>, Arc<TestPower>) {
        let (line, power) = (Arc::<TestLine>::default(), Arc::<TestPower>::default());
        (PowerManagement::new(line.clone(), power.clone()), line, power)
    }

    fn word(pm: &PowerManagement, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_interrupts_until_it_is_acknowledged() {
        let (pm, sci, _) = new_pm();
        pm.press_power_button();
        assert!(!sci.level(), "nobody listens yet");
        pm.write(0, &POWER_BUTTON.to_le_bytes());
        pm.write(2, &0xffffu16.to_le_bytes());
        assert_eq!(word(&pm, 2), ENABLE_BITS);
        pm.press_power_button();
        assert!(sci.level());
        assert_eq!(word(&pm, 0), POWER_BUTTON);
        pm.write(0, &[0xff]);
        assert!(sci.level(), "the other byte");
        pm.write(1, &[1]);
        assert_eq!((sci.level(), word(&pm, 0)), (false, 0));
    }

    #[test]
    fn soft_off_and_nothing_else_ends_the_machine() {
        let (pm, _, power) = new_pm();
        assert_eq!(word(&pm, 4), SCI_EN);
        pm.write(4, &0x1c01u16.to_le_bytes());
        assert_eq!(word(&pm, 4), 0x1c01);
        pm.write(4, &0x3c01u16.to_le_bytes());
        assert_eq!(power.take(), [], "SLP_TYP 7 is no state of ours");
        pm.write(4, &0x2001u16.to_le_bytes());
        assert_eq!(power.take(), [PowerRequest::PowerOff]);
        assert_eq!(word(&pm, 4), SCI_EN, "SLP_EN is not kept");
        pm.write(5, &[0x20]);
        assert_eq!(power.take(), [PowerRequest::PowerOff]);
    }

    #[test]
    fn the_timer_counts_and_is_saved() {
        let (pm, sci, _) = new_pm();
        let count = |pm: &PowerManagement| {
            let mut data = [0; 4];
            pm.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let first = count(&pm);
        while count(&pm) == first {}
        assert!(count(&pm).wrapping_sub(first) < 0x8000_0000);
        pm.restore(&PmState { ticks: 0x7fff_fff0, enable: 1, ..PmState::default() });
        let end = Instant::now() + Duration::from_secs(30);
        while !sci.level() && Instant::now() < end {
            std::thread::yield_now();
        }
        assert!(sci.level(), "the top bit changed");
        assert_eq!(word(&pm, 0), STATUS_TIMER);
        let saved = pm.save();
        assert!(saved.ticks >= 0x8000_0000);
        let (other, line, _) = new_pm();
        other.restore(&serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap());
        assert!(line.level() && count(&other) >= saved.ticks as u32);
        other.reset();
        assert!(!line.level());
    }

    #[test]
    fn general_purpose_events() {
        let (pm, sci, _) = new_pm();
        pm.raise_gpe(33);
        pm.raise_gpe(64);
        assert!(!sci.level());
        pm.write(0x2c, &[2]);
        assert!(sci.level());
        assert_eq!((word(&pm, 0x24), word(&pm, 0x2c)), (2, 2));
        pm.write(0x20, &u64::MAX.to_le_bytes());
        assert!(!sci.level());
        let mut smi = [0; 4];
        pm.write(0x30, &[0; 4]);
        pm.read(0x30, &mut smi);
        assert_eq!(u32::from_le_bytes(smi), SMI_EN);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let (pm, _, _) = new_pm();
        hammer(&*pm, PM_LEN, 20_000);
        pm.restore(&PmState { ticks: u64::MAX, status: 0xffff, enable: 0xffff, ..pm.save() });
        hammer(&*pm, PM_LEN, 20_000);
    }
}
