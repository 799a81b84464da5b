//! The registers as the guest reads and writes them, by MMIO and by MSR.

use std::sync::atomic::Ordering;

use super::{Effect, LVTS, Lapic, MASKED, Mode, SOFTWARE_ENABLE, error, lvt_bits, mode, reg};

const VERSION: u32 = 0x0005_0014;
/// Reserved bits of an x2APIC's interrupt command register.
const ICR_RESERVED: u64 = 0xfff3_2000;

impl Lapic {
    /// Reads the register at `offset` of an xAPIC's page.
    pub fn read(&self, offset: u32, now: u64) -> u32 {
        match offset {
            reg::ID => self.id << 24,
            reg::APR => 0,
            reg::EOI | reg::SELF_IPI => 0,
            _ => match self.common_read(offset, now) {
                Some(value) => value,
                None => {
                    self.raise_error(error::REGISTER);
                    0
                }
            },
        }
    }

    /// Registers that both modes read alike.
    pub(super) fn common_read(&self, offset: u32, now: u64) -> Option<u32> {
        Some(match offset {
            reg::VERSION => VERSION,
            reg::PPR => u32::from(self.processor_priority()),
            reg::CURRENT_COUNT => self.current_count(now),
            reg::TPR
            | reg::LDR
            | reg::DFR
            | reg::SVR
            | reg::ESR
            | reg::ICR
            | reg::ICR_HIGH
            | reg::INITIAL_COUNT
            | reg::DIVIDE => self.get(offset),
            reg::ISR..=reg::IRR_END | reg::LVT_TIMER..=reg::LVT_ERROR => self.get(offset),
            _ => return None,
        })
    }

    fn current_count(&self, now: u64) -> u32 {
        let (initial, divide) = (self.get(reg::INITIAL_COUNT), self.get(reg::DIVIDE));
        self.timer.current(now, self.timer_mode(), initial, divide)
    }

    /// Writes the register at `offset` of an xAPIC's page.
    pub fn write(&self, offset: u32, value: u32, now: u64) -> Effect {
        match offset {
            // The id is the hardware's.
            reg::ID | reg::VERSION | reg::PPR | reg::APR | reg::CURRENT_COUNT => Effect::None,
            reg::LDR => {
                self.set(reg::LDR, value & 0xff00_0000);
                Effect::None
            }
            reg::DFR => {
                self.set(reg::DFR, value | 0x0fff_ffff);
                Effect::None
            }
            reg::ICR_HIGH => {
                self.set(reg::ICR_HIGH, value & 0xff00_0000);
                Effect::None
            }
            reg::ICR => {
                let high = u64::from(self.get(reg::ICR_HIGH));
                self.command(high << 32 | u64::from(value))
            }
            _ => match self.common_write(offset, value, now) {
                Some(effect) => effect,
                None => {
                    self.raise_error(error::REGISTER);
                    Effect::Recheck
                }
            },
        }
    }

    fn command(&self, icr: u64) -> Effect {
        self.set(reg::ICR, icr as u32 & 0x000c_cfff);
        self.set(reg::ICR_HIGH, (icr >> 32) as u32);
        let fixed = (icr >> 8) as u8 & mode::MASK <= mode::LOWEST;
        if fixed && (icr as u8) < 16 {
            self.raise_error(error::SEND_VECTOR);
            return Effect::Recheck;
        }
        Effect::Ipi(icr)
    }

    /// Registers that both modes write alike.
    fn common_write(&self, offset: u32, value: u32, now: u64) -> Option<Effect> {
        Some(match offset {
            reg::TPR => self.set_tpr(value as u8),
            reg::EOI => self.eoi(),
            reg::SVR => {
                self.set(reg::SVR, value & 0x3ff);
                if value & SOFTWARE_ENABLE == 0 {
                    for lvt in LVTS {
                        self.at(lvt).fetch_or(MASKED, Ordering::Relaxed);
                    }
                }
                Effect::Recheck
            }
            reg::ESR => {
                self.set(reg::ESR, self.errors.swap(0, Ordering::SeqCst));
                Effect::None
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                self.write_lvt(offset, value, now);
                Effect::Recheck
            }
            reg::INITIAL_COUNT => {
                if self.timer_mode() != Mode::TscDeadline {
                    self.set(reg::INITIAL_COUNT, value);
                    self.timer.start(now, value, self.get(reg::DIVIDE));
                }
                Effect::Recheck
            }
            reg::DIVIDE => {
                self.run_timer(now);
                let left = self.current_count(now);
                self.set(reg::DIVIDE, value & 0xb);
                if self.timer_mode() != Mode::TscDeadline {
                    self.timer.start(now, left, value);
                }
                Effect::Recheck
            }
            _ => return None,
        })
    }

    fn write_lvt(&self, offset: u32, value: u32, now: u64) {
        let mut new = value & lvt_bits(offset);
        if !self.software_enabled() {
            new |= MASKED;
        }
        if offset == reg::LVT_TIMER {
            // What ran out before goes by the old entry.
            self.run_timer(now);
            let tsc = |lvt| Mode::of_lvt(lvt) == Mode::TscDeadline;
            if tsc(new) != tsc(self.get(offset)) {
                self.timer.stop();
                self.set(reg::INITIAL_COUNT, 0);
            }
        }
        self.set(offset, new);
    }

    /// RDMSR of an x2APIC register; none where that is a #GP.
    pub fn read_msr(&self, index: u32, now: u64) -> Option<u64> {
        if !self.x2apic() {
            return None;
        }
        let offset = (index & 0xff) << 4;
        Some(match offset {
            reg::ID => u64::from(self.id),
            reg::ICR => u64::from(self.get(reg::ICR_HIGH)) << 32 | u64::from(self.get(reg::ICR)),
            reg::DFR | reg::ICR_HIGH => return None,
            _ => u64::from(self.common_read(offset, now)?),
        })
    }

    /// WRMSR to an x2APIC register; none where that is a #GP.
    pub fn write_msr(&self, index: u32, value: u64, now: u64) -> Option<Effect> {
        if !self.x2apic() {
            return None;
        }
        let offset = (index & 0xff) << 4;
        let allowed = match offset {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            // The masks stand for what may be written; delivery status is read-only.
            reg::LVT_TIMER..=reg::LVT_ERROR => u64::from(lvt_bits(offset) | 1 << 12 | 1 << 14),
            reg::INITIAL_COUNT => u64::from(u32::MAX),
            reg::DIVIDE => 0xb,
            reg::ICR => !ICR_RESERVED,
            _ => return None,
        };
        if value & !allowed != 0 {
            return None;
        }
        Some(match offset {
            reg::ICR => self.command(value),
            // Shorthand "self", fixed, edge.
            reg::SELF_IPI => {
                let (icr, high) = (self.get(reg::ICR), self.get(reg::ICR_HIGH));
                let effect = self.command(1 << 18 | 1 << 14 | value);
                self.set(reg::ICR, icr);
                self.set(reg::ICR_HIGH, high);
                effect
            }
            _ => self.common_write(offset, value as u32, now)?,
        })
    }
}
