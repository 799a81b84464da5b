//! The local APIC, xAPIC and x2APIC (SDM volume 3, chapter 12).
//!
//! ```text
//!   IPIs, MSIs, IOAPIC          timer, LINT0, errors (LVT)
//!   from any thread                  own thread
//!         |  accept()                     |
//!         v                               v
//!        IRR -- pending(): above the processor priority? -- acknowledge() --> ISR -- EOI --> gone
//! ```
//!
//! Registers are atomics: the own vCPU's thread writes all of them, other threads set bits of IRR and
//! TMR and read what decides about destinations. So nothing here takes a lock.

mod registers;
mod state;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::apic_timer::{Mode, Timer};
use super::ipi::mode;
use crate::shared::Shared;
use crate::walk::PHYSICAL_BITS;

pub use super::apic_timer::NEVER;

/// Where the registers are after reset.
pub const APIC_BASE: u64 = 0xfee0_0000;
/// Bytes of the saved register page.
pub const PAGE: usize = 1024;

/// Bits of IA32_APIC_BASE.
#[allow(missing_docs)]
pub mod base {
    pub const BSP: u64 = 1 << 8;
    pub const X2APIC: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
}

/// Offsets of registers in the page; an x2APIC's MSR is 800H + offset / 16.
#[allow(missing_docs)]
pub mod reg {
    pub const ID: u32 = 0x020;
    pub const VERSION: u32 = 0x030;
    pub const TPR: u32 = 0x080;
    pub const APR: u32 = 0x090;
    pub const PPR: u32 = 0x0a0;
    pub const EOI: u32 = 0x0b0;
    pub const LDR: u32 = 0x0d0;
    pub const DFR: u32 = 0x0e0;
    pub const SVR: u32 = 0x0f0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const IRR_END: u32 = 0x270;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERFORMANCE: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Bits of the error status register.
mod error {
    pub const SEND_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_VECTOR: u32 = 1 << 6;
    pub const REGISTER: u32 = 1 << 7;
}

const LVTS: [u32; 6] = [
    reg::LVT_TIMER,
    reg::LVT_THERMAL,
    reg::LVT_PERFORMANCE,
    reg::LVT_LINT0,
    reg::LVT_LINT1,
    reg::LVT_ERROR,
];
const MASKED: u32 = 1 << 16;
const SOFTWARE_ENABLE: u32 = 1 << 8;

/// What others must do after a register was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// An interrupt may be deliverable that was not before.
    Recheck,
    /// Send this interrupt command.
    Ipi(u64),
    /// An interrupt has ended; the IOAPIC is told the vector if it was level-triggered.
    Eoi(Option<u8>),
}

/// What a rise on LINT0 comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lint {
    /// Nothing.
    Nothing,
    /// A fixed interrupt is in IRR now.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
}

/// One vCPU's local APIC.
pub struct Lapic {
    id: u32,
    base: AtomicU64,
    regs: [AtomicU32; 64],
    /// Bit `i`: word `i` of IRR may not be zero.
    irr_words: AtomicU32,
    /// Bit `i`: word `i` of ISR is not zero.
    isr_words: AtomicU32,
    /// Errors since the last write to the error status register.
    errors: AtomicU32,
    timer: Timer,
}

impl Lapic {
    /// In its state after reset; `index` is the APIC id.
    pub fn new(index: u32) -> Self {
        let lapic = Self {
            id: index,
            base: AtomicU64::new(0),
            regs: std::array::from_fn(|_| AtomicU32::new(0)),
            irr_words: AtomicU32::new(0),
            isr_words: AtomicU32::new(0),
            errors: AtomicU32::new(0),
            timer: Timer::default(),
        };
        lapic.reset();
        lapic
    }

    /// Hardware reset.
    pub fn reset(&self) {
        let bsp = if self.id == 0 { base::BSP } else { 0 };
        self.base.store(APIC_BASE | base::ENABLE | bsp, Ordering::SeqCst);
        self.init();
    }

    /// What an INIT does: as reset, but IA32_APIC_BASE stays (SDM volume 3, 12.4.7.3).
    pub fn init(&self) {
        for register in &self.regs {
            register.store(0, Ordering::Relaxed);
        }
        self.set(reg::DFR, u32::MAX);
        self.set(reg::SVR, 0xff);
        for lvt in LVTS {
            self.set(lvt, MASKED);
        }
        if self.is_bsp() {
            // What firmware would do: the boot processor hears the PIC.
            self.set(reg::LVT_LINT0, u32::from(mode::EXTINT) << 8);
        }
        self.errors.store(0, Ordering::Relaxed);
        self.irr_words.store(0, Ordering::Relaxed);
        self.isr_words.store(0, Ordering::Relaxed);
        self.timer.stop();
        self.set_logical_id();
    }

    #[inline]
    fn at(&self, offset: u32) -> &AtomicU32 {
        &self.regs[(offset >> 4 & 63) as usize]
    }

    #[inline]
    fn get(&self, offset: u32) -> u32 {
        self.at(offset).load(Ordering::Relaxed)
    }

    fn set(&self, offset: u32, value: u32) {
        self.at(offset).store(value, Ordering::Relaxed);
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// Not switched off in IA32_APIC_BASE.
    pub fn enabled(&self) -> bool {
        self.apic_base() & base::ENABLE != 0
    }

    /// In x2APIC mode.
    pub fn x2apic(&self) -> bool {
        self.apic_base() & (base::ENABLE | base::X2APIC) == base::ENABLE | base::X2APIC
    }

    fn is_bsp(&self) -> bool {
        self.apic_base() & base::BSP != 0
    }

    /// Enabled, also in the spurious-interrupt vector register: takes fixed interrupts.
    pub fn software_enabled(&self) -> bool {
        self.enabled() && self.get(reg::SVR) & SOFTWARE_ENABLE != 0
    }

    /// The page that the registers of an xAPIC are in; none in the other modes.
    pub fn window(&self) -> Option<u64> {
        let value = self.apic_base();
        (value & (base::ENABLE | base::X2APIC) == base::ENABLE).then_some(value & !0xfff)
    }

    /// Writes IA32_APIC_BASE; false (and no change) where that is a #GP (SDM volume 3, 12.12.5).
    pub fn set_apic_base(&self, value: u64) -> bool {
        let known = base::BSP | base::X2APIC | base::ENABLE | ((1 << PHYSICAL_BITS) - 1) & !0xfff;
        let mode = |base: u64| (base & base::ENABLE != 0, base & base::X2APIC != 0);
        let old = self.apic_base();
        let allowed = match (mode(old), mode(value)) {
            (_, (false, true)) => false,
            ((true, true), (true, false)) => false,
            ((false, _), (true, true)) => false,
            _ => value & !known == 0,
        };
        if !allowed {
            return false;
        }
        self.base.store(value, Ordering::SeqCst);
        match (mode(old).0, mode(value).0) {
            // Switched off, it forgets; on again, it is as after power-up.
            (true, false) | (false, true) => self.init(),
            _ => self.set_logical_id(),
        }
        true
    }

    /// An x2APIC's logical id follows from its id (SDM volume 3, 12.12.10.2).
    fn set_logical_id(&self) {
        if self.x2apic() {
            self.set(reg::LDR, (self.id >> 4) << 16 | 1 << (self.id & 15));
        }
    }

    /// Whether a logical destination includes this LAPIC. `wide`: the destination is 32 bits.
    pub fn matches_logical(&self, destination: u32, wide: bool) -> bool {
        let ldr = self.get(reg::LDR);
        let all = if wide { u32::MAX } else { 0xff };
        if self.x2apic() {
            return destination == all
                || destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0;
        }
        let (ldr, destination) = (ldr >> 24, if destination == all { 0xff } else { destination });
        if self.get(reg::DFR) >> 28 == 0xf {
            return destination & ldr & 0xff != 0;
        }
        let cluster = destination >> 4;
        (cluster == 0xf || cluster == ldr >> 4) && destination & ldr & 0xf != 0
    }

    // Interrupts.

    /// Takes a fixed interrupt, from any thread; the caller notifies the vCPU. False if it does not take it.
    pub fn accept(&self, vector: u8, level: bool) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < 16 {
            self.raise_error(error::RECEIVE_VECTOR);
            return false;
        }
        let (word, bit) = (u32::from(vector >> 5), 1 << (vector & 31));
        let tmr = self.at(reg::TMR + 16 * word);
        if level {
            tmr.fetch_or(bit, Ordering::SeqCst);
        } else if tmr.load(Ordering::Relaxed) & bit != 0 {
            tmr.fetch_and(!bit, Ordering::SeqCst);
        }
        self.at(reg::IRR + 16 * word).fetch_or(bit, Ordering::SeqCst);
        self.irr_words.fetch_or(1 << word, Ordering::SeqCst);
        true
    }

    fn highest(&self, first: u32, words: u32) -> Option<u8> {
        let mut words = words;
        while words != 0 {
            let word = 31 - words.leading_zeros();
            let bits = self.get(first + 16 * word);
            if bits != 0 {
                return Some((32 * word + 31 - bits.leading_zeros()) as u8);
            }
            words &= !(1 << word);
        }
        None
    }

    fn in_service(&self) -> Option<u8> {
        self.highest(reg::ISR, self.isr_words.load(Ordering::Relaxed))
    }

    /// The processor priority (PPR).
    pub fn processor_priority(&self) -> u8 {
        let tpr = self.tpr();
        let served = self.in_service().unwrap_or(0) & 0xf0;
        if tpr & 0xf0 >= served { tpr } else { served }
    }

    /// The vector that the processor would take now if it takes interrupts.
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        let words = self.irr_words.load(Ordering::SeqCst);
        if words == 0 || !self.enabled() {
            return None;
        }
        let vector = self.highest(reg::IRR, words)?;
        (vector & 0xf0 > self.processor_priority() & 0xf0).then_some(vector)
    }

    /// The processor has taken `vector`, which [`Lapic::pending`] gave.
    pub fn acknowledge(&self, vector: u8) {
        let (word, bit) = (u32::from(vector >> 5), 1 << (vector & 31));
        let irr = self.at(reg::IRR + 16 * word);
        if irr.fetch_and(!bit, Ordering::SeqCst) & !bit == 0 {
            self.irr_words.fetch_and(!(1 << word), Ordering::SeqCst);
            // Somebody may have set a bit of the word in between, and its summary before it was cleared.
            if irr.load(Ordering::SeqCst) != 0 {
                self.irr_words.fetch_or(1 << word, Ordering::SeqCst);
            }
        }
        self.at(reg::ISR + 16 * word).fetch_or(bit, Ordering::Relaxed);
        self.isr_words.fetch_or(1 << word, Ordering::Relaxed);
    }

    fn eoi(&self) -> Effect {
        let Some(vector) = self.in_service() else { return Effect::Eoi(None) };
        let (word, bit) = (u32::from(vector >> 5), 1 << (vector & 31));
        let isr = self.at(reg::ISR + 16 * word);
        if isr.fetch_and(!bit, Ordering::Relaxed) & !bit == 0 {
            self.isr_words.fetch_and(!(1 << word), Ordering::Relaxed);
        }
        let level = self.get(reg::TMR + 16 * word) & bit != 0;
        Effect::Eoi(level.then_some(vector))
    }

    /// The task priority.
    pub fn tpr(&self) -> u8 {
        self.get(reg::TPR) as u8
    }

    /// Sets the task priority.
    pub fn set_tpr(&self, value: u8) -> Effect {
        self.set(reg::TPR, u32::from(value));
        if self.pending().is_some() { Effect::Recheck } else { Effect::None }
    }

    /// CR8: the task priority's upper half.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr() >> 4)
    }

    fn raise_error(&self, bits: u32) {
        if self.errors.fetch_or(bits, Ordering::SeqCst) & bits == bits {
            return;
        }
        let lvt = self.get(reg::LVT_ERROR);
        // A bad vector here must not raise the next error.
        if lvt & MASKED == 0 && lvt as u8 >= 16 {
            self.accept(lvt as u8, false);
        }
    }

    /// Whether the PIC's interrupts come to this vCPU: LINT0 is a virtual wire, or there is no LAPIC
    /// between.
    pub fn hears_pic(&self) -> bool {
        if !self.enabled() {
            return self.is_bsp();
        }
        let lvt = self.get(reg::LVT_LINT0);
        lvt & MASKED == 0 && (lvt >> 8) as u8 & mode::MASK == mode::EXTINT
    }

    /// The PIC's output rose.
    pub fn lint0(&self) -> Lint {
        let lvt = self.get(reg::LVT_LINT0);
        if !self.enabled() || lvt & MASKED != 0 {
            return Lint::Nothing;
        }
        match (lvt >> 8) as u8 & mode::MASK {
            mode::FIXED if self.accept(lvt as u8, false) => Lint::Interrupt,
            mode::NMI => Lint::Nmi,
            _ => Lint::Nothing,
        }
    }

    // Timer. `now` is the host's TSC.

    fn timer_mode(&self) -> Mode {
        Mode::of_lvt(self.get(reg::LVT_TIMER))
    }

    /// The host TSC at which the timer interrupts next, or [`NEVER`].
    #[inline]
    pub fn deadline(&self) -> u64 {
        if self.get(reg::LVT_TIMER) & MASKED == 0 { self.timer.deadline() } else { NEVER }
    }

    /// Lets a timer that has run out interrupt. Only the own vCPU's thread calls this.
    pub fn poll_timer(&self, shared: &Shared, now: u64) {
        if self.run_timer(now) {
            shared.apic_effect(self.id, Effect::Recheck);
        }
    }

    /// Winds the timer forward; says whether it interrupted.
    fn run_timer(&self, now: u64) -> bool {
        let lvt = self.get(reg::LVT_TIMER);
        let (initial, divide) = (self.get(reg::INITIAL_COUNT), self.get(reg::DIVIDE));
        self.timer.expired(now, Mode::of_lvt(lvt), initial, divide)
            && lvt & MASKED == 0
            && self.accept(lvt as u8, false)
    }

    /// IA32_TSC_DEADLINE: the guest's TSC, 0 if not armed.
    pub fn tsc_deadline(&self) -> u64 {
        if self.timer_mode() == Mode::TscDeadline { self.timer.guest_deadline() } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE. Guest TSC = host TSC + `offset`.
    pub fn set_tsc_deadline(&self, guest: u64, offset: u64) {
        if self.timer_mode() == Mode::TscDeadline {
            self.timer.arm_tsc(guest, offset);
        }
    }
}

/// The bits that software can set in an entry of the local vector table (SDM volume 3, figure 12-8).
fn lvt_bits(offset: u32) -> u32 {
    match offset {
        reg::LVT_TIMER => 0x0007_00ff,
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x0001_a7ff,
        reg::LVT_ERROR => 0x0001_00ff,
        _ => 0x0001_07ff,
    }
}

#[cfg(test)]
mod tests;
