//! A LAPIC's state as it is saved and restored.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{LVTS, Lapic, Mode, PAGE, base, lvt_bits, reg};
use crate::walk::PHYSICAL_BITS;

impl Lapic {
    /// The register page as it is saved: register `r` at offset `r`. The id is all 32 bits
    /// of an x2APIC and bits 31:24 of an xAPIC.
    pub fn page(&self, now: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        for offset in (0..PAGE as u32).step_by(16) {
            let value = match offset {
                reg::ID if self.x2apic() => self.id,
                reg::ID => self.id << 24,
                _ => self.common_read(offset, now).unwrap_or(0),
            };
            page[offset as usize..][..4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    /// Puts a saved page in place, with IA32_APIC_BASE. IA32_TSC_DEADLINE comes after it. False, and no
    /// change, if `apic_base` makes no sense.
    pub fn restore(&self, apic_base: u64, page: &[u8; PAGE], now: u64) -> bool {
        let known = base::BSP | base::X2APIC | base::ENABLE | ((1 << PHYSICAL_BITS) - 1) & !0xfff;
        let modes = apic_base & (base::X2APIC | base::ENABLE);
        if apic_base & !known != 0 || modes == base::X2APIC {
            return false;
        }
        self.base.store(apic_base, Ordering::SeqCst);
        self.init();
        let value = |offset: u32| {
            let at = offset as usize;
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        self.set(reg::TPR, value(reg::TPR) & 0xff);
        if !self.x2apic() {
            self.set(reg::LDR, value(reg::LDR) & 0xff00_0000);
            self.set(reg::DFR, value(reg::DFR) | 0x0fff_ffff);
        }
        self.set(reg::SVR, value(reg::SVR) & 0x3ff);
        self.set(reg::ESR, value(reg::ESR) & 0xff);
        self.set(reg::ICR, value(reg::ICR) & 0x000c_cfff);
        self.set(reg::ICR_HIGH, value(reg::ICR_HIGH));
        for lvt in LVTS {
            self.set(lvt, value(lvt) & lvt_bits(lvt));
        }
        for (first, words) in
            [(reg::ISR, Some(&self.isr_words)), (reg::TMR, None), (reg::IRR, Some(&self.irr_words))]
        {
            self.restore_vectors(first, words, &value);
        }
        self.set(reg::DIVIDE, value(reg::DIVIDE) & 0xb);
        self.set(reg::INITIAL_COUNT, value(reg::INITIAL_COUNT));
        if self.timer_mode() != Mode::TscDeadline {
            let left = value(reg::CURRENT_COUNT).min(value(reg::INITIAL_COUNT));
            self.timer.start(now, left, value(reg::DIVIDE));
        }
        true
    }

    fn restore_vectors(&self, first: u32, words: Option<&AtomicU32>, value: &impl Fn(u32) -> u32) {
        for word in 0..8 {
            // Vectors 0 to 15 do not exist.
            let bits = value(first + 16 * word) & if word == 0 { 0xffff_0000 } else { u32::MAX };
            self.set(first + 16 * word, bits);
            if let Some(words) = words.filter(|_| bits != 0) {
                words.fetch_or(1 << word, Ordering::SeqCst);
            }
        }
    }
}
