//! RFLAGS, with the six status flags kept lazily.
//!
//! An arithmetic instruction leaves two words behind, and flags are computed when somebody asks:
//!
//! ```text
//! lf_res   the result, sign-extended to 64 bits     ZF = (res == 0), SF = its sign, PF = its low byte
//! lf_aux   bit 63  carry out of the top bit (CF)
//!          bit 62  carry into the top bit           OF = bit 63 ^ bit 62
//!          bit 61  SF is the opposite of res's sign
//!          bits 15:8  xor-ed into res's low byte before its parity is taken
//!          bit 3   carry out of bit 3 (AF)
//! ```
//!
//! The corrections (61 and 15:8) are zero after arithmetic; they let POPF, SAHF or COMISD set any
//! combination (ZF with SF, say).

use crate::state::Cpu;

/// Carry.
pub const CF: u64 = 1 << 0;
/// Bit 1 is always set.
pub const FIXED: u64 = 1 << 1;
/// Parity of the result's low byte.
pub const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Single step.
pub const TF: u64 = 1 << 8;
/// Interrupts enabled.
pub const IF: u64 = 1 << 9;
/// String instructions go down.
pub const DF: u64 = 1 << 10;
/// Overflow.
pub const OF: u64 = 1 << 11;
/// I/O privilege level, two bits.
pub const IOPL: u64 = 3 << 12;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume: no instruction breakpoint for one instruction.
pub const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// Alignment check, and SMAP override.
pub const AC: u64 = 1 << 18;
/// Virtual interrupt flag.
pub const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// CPUID exists.
pub const ID: u64 = 1 << 21;
/// The flags that are kept lazily.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

const AUX_CF: u64 = 1 << 63;
const AUX_INTO: u64 = 1 << 62;
const AUX_SIGN: u64 = 1 << 61;
const AUX_AF: u64 = 1 << 3;

/// The low `Z` bytes of `v`.
#[inline(always)]
pub fn trunc<const Z: u8>(v: u64) -> u64 {
    match Z {
        1 => v & 0xff,
        2 => v & 0xffff,
        4 => v & 0xffff_ffff,
        _ => v,
    }
}

/// The low `Z` bytes of `v`, sign-extended.
#[inline(always)]
pub fn sext<const Z: u8>(v: u64) -> u64 {
    match Z {
        1 => v as i8 as i64 as u64,
        2 => v as i16 as i64 as u64,
        4 => v as i32 as i64 as u64,
        _ => v,
    }
}

#[inline(always)]
fn aux_of_carries<const Z: u8>(carries: u64) -> u64 {
    (carries << (64 - 8 * Z as u32)) & (AUX_CF | AUX_INTO) | carries & AUX_AF
}

impl Cpu {
    /// Flags of an addition of `Z` bytes: `res` = `a` + `b` (+ carry).
    #[inline(always)]
    pub fn flags_add<const Z: u8>(&mut self, a: u64, b: u64, res: u64) {
        self.lf_res = sext::<Z>(res);
        self.lf_aux = aux_of_carries::<Z>((a & b) | ((a | b) & !res));
    }

    /// Flags of a subtraction of `Z` bytes: `res` = `a` - `b` (- borrow).
    #[inline(always)]
    pub fn flags_sub<const Z: u8>(&mut self, a: u64, b: u64, res: u64) {
        self.lf_res = sext::<Z>(res);
        self.lf_aux = aux_of_carries::<Z>((!a & b) | ((!a | b) & res));
    }

    /// Flags of AND, OR, XOR, TEST of `Z` bytes: CF, OF and AF are cleared.
    #[inline(always)]
    pub fn flags_logic<const Z: u8>(&mut self, res: u64) {
        self.lf_res = sext::<Z>(res);
        self.lf_aux = 0;
    }

    /// ZF, SF and PF of `res` (`Z` bytes), CF and OF as given, AF cleared.
    #[inline(always)]
    pub fn flags_res_cf_of<const Z: u8>(&mut self, res: u64, cf: bool, of: bool) {
        self.lf_res = sext::<Z>(res);
        self.set_cf_of_in_aux(0, cf, of);
    }

    #[inline(always)]
    fn set_cf_of_in_aux(&mut self, keep: u64, cf: bool, of: bool) {
        self.lf_aux = keep | (cf as u64) << 63 | ((cf ^ of) as u64) << 62;
    }

    /// Sets CF and OF, keeps the others (rotates).
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.set_cf_of_in_aux(self.lf_aux & !(AUX_CF | AUX_INTO), cf, of);
    }

    /// Sets CF, keeps the others.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.lf_aux & AUX_CF != 0
    }
    /// OF.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.lf_aux ^ self.lf_aux << 1) & AUX_CF != 0
    }
    /// ZF.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.lf_res == 0
    }
    /// SF.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        ((self.lf_res ^ self.lf_aux << 2) as i64) < 0
    }
    /// PF.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.lf_res ^ self.lf_aux >> 8) as u8).count_ones() & 1 == 0
    }
    /// AF.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.lf_aux & AUX_AF != 0
    }
    /// SF != OF, which is "less".
    #[inline(always)]
    pub fn less(&self) -> bool {
        ((self.lf_res ^ self.lf_aux << 2 ^ self.lf_aux ^ self.lf_aux << 1) as i64) < 0
    }

    /// Condition `cc` as encoded in Jcc, SETcc and CMOVcc (SDM volume 2, appendix B, table B-10).
    #[inline(always)]
    pub fn condition(&self, cc: u8) -> bool {
        let holds = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.less(),
            _ => self.less() || self.zf(),
        };
        holds ^ (cc & 1 != 0)
    }

    /// The status flags, as bits of RFLAGS.
    pub fn status_flags(&self) -> u64 {
        let bit = |set: bool, flag: u64| if set { flag } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Sets the status flags from bits of RFLAGS; other bits are ignored.
    pub fn set_status_flags(&mut self, flags: u64) {
        self.lf_res = if flags & ZF != 0 { 0 } else { 1 };
        let sign = if flags & SF != 0 { AUX_SIGN } else { 0 };
        let af = if flags & AF != 0 { AUX_AF } else { 0 };
        // The parity of 0 is even, of 1 odd: flip one bit where that is not what is wanted.
        let even = self.lf_res == 0;
        let parity = if even != (flags & PF != 0) { 1 << 8 } else { 0 };
        self.set_cf_of_in_aux(sign | af | parity, flags & CF != 0, flags & OF != 0);
    }

    /// RFLAGS as PUSHF would show it to software.
    pub fn rflags(&self) -> u64 {
        self.sys_flags | self.status_flags()
    }

    /// Sets all of RFLAGS; bits that do not exist are dropped. [`Cpu::update_mode`] is called.
    pub fn set_rflags(&mut self, flags: u64) {
        let system = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
        self.set_status_flags(flags);
        self.sys_flags = flags & system | FIXED;
        self.update_mode();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_status_flags_survives() {
        let mut cpu = Cpu::for_tests();
        for bits in 0..64u64 {
            let flags = [CF, PF, AF, ZF, SF, OF]
                .iter()
                .enumerate()
                .filter(|(i, _)| bits >> i & 1 != 0)
                .fold(0, |all, (_, flag)| all | flag);
            cpu.set_status_flags(flags);
            assert_eq!(cpu.status_flags(), flags);
        }
    }

    #[test]
    fn byte_arithmetic_gives_the_manuals_flags() {
        let mut cpu = Cpu::for_tests();
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                let sum = a + b;
                cpu.flags_add::<1>(a, b, sum & 0xff);
                assert_eq!(cpu.cf(), sum > 255);
                assert_eq!(cpu.af(), (a & 15) + (b & 15) > 15);
                assert_eq!(cpu.of(), (a as i8).checked_add(b as i8).is_none());
                assert_eq!(cpu.sf(), sum & 0x80 != 0);
                assert_eq!(cpu.zf(), sum & 0xff == 0);
                cpu.flags_sub::<1>(a, b, a.wrapping_sub(b) & 0xff);
                assert_eq!(cpu.cf(), a < b);
                assert_eq!(cpu.af(), (a & 15) < (b & 15));
                assert_eq!(cpu.of(), (a as i8).checked_sub(b as i8).is_none());
                assert_eq!(cpu.less(), (a as i8) < (b as i8));
            }
        }
    }
}
