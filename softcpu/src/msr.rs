//! Model-specific registers (SDM volume 4).
//!
//! What is not here raises #GP, which every kernel survives where it matters; the first access to each
//! is noted in the log.

use std::collections::HashSet;
use std::sync::Mutex;

use crate::chip::lapic::Effect;
use crate::clock;
use crate::fault::{Exec, Fault};
use crate::mem::canonical;
use crate::state::{Cpu, cr, seg};
use crate::walk::PHYSICAL_BITS;

/// Register numbers.
#[allow(missing_docs)]
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const EBL_CR_POWERON: u32 = 0x2a;
    pub const CORE_THREAD_COUNT: u32 = 0x35;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH: u32 = 0x1db;
    pub const MTRR_PHYS: u32 = 0x200;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K: u32 = 0x258;
    pub const MTRR_FIX4K: u32 = 0x268;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const MC0_CTL: u32 = 0x400;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC: u32 = 0x800;
    pub const X2APIC_END: u32 = 0x8ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}
use index::*;

/// IA32_ARCH_CAPABILITIES: nothing is speculated here, so none of the bugs is there. In the order of the
/// bits: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO,
/// FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;
/// Machine-check banks. None of them ever reports anything.
pub const MC_BANKS: usize = 4;
/// IBRS, STIBP, SSBD, BHI_DIS_S.
const SPEC_CTRL_BITS: u64 = 1 | 1 << 1 | 1 << 2 | 1 << 10;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRR_CAPABILITIES: u64 = 8 | 1 << 8 | 1 << 10;
/// The microcode's revision, in the upper half.
const MICROCODE: u64 = 1 << 32;
/// MISC_ENABLE: no branch trace store, no precise events.
const MISC_FIXED: u64 = 1 << 11 | 1 << 12;
/// MISC_ENABLE bits that are only stored: fast strings, TM1, PMU, EIST, MONITOR, CPUID limit, xTPR.
const MISC_STORED: u64 = 1 | 1 << 3 | 1 << 7 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
const EFER_BITS: u64 = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;

/// The registers that are saved with a vCPU, in an order in which they can be restored. What has a
/// field of its own elsewhere (EFER, APIC_BASE, FS and GS bases) is not among them.
pub fn saved() -> impl Iterator<Item = u32> {
    let single = [
        TSC,
        TSC_ADJUST,
        SPEC_CTRL,
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        MCG_STATUS,
        MISC_ENABLE,
        PAT,
        MTRR_DEF_TYPE,
        STAR,
        LSTAR,
        CSTAR,
        SFMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
        MTRR_FIX64K,
        MTRR_FIX16K,
        MTRR_FIX16K + 1,
    ];
    let banks = (0..MC_BANKS as u32).map(|bank| MC0_CTL + 4 * bank);
    single
        .into_iter()
        .chain(MTRR_FIX4K..MTRR_FIX4K + 8)
        .chain(MTRR_PHYS..MTRR_PHYS + 16)
        .chain(banks)
        .chain([TSC_DEADLINE])
}

impl Cpu {
    /// RDMSR.
    pub fn read_msr(&mut self, index: u32) -> Exec<u64> {
        let lapic = &self.shared.ports()[self.index as usize].lapic;
        Ok(match index {
            TSC => self.tsc(),
            TSC_ADJUST => self.msrs.tsc_adjust,
            APIC_BASE => lapic.apic_base(),
            TSC_DEADLINE => lapic.tsc_deadline(),
            X2APIC..=X2APIC_END => lapic.read_msr(index, clock::host_tsc()).ok_or(Fault::GP0)?,
            EFER => self.efer,
            STAR => self.msrs.star,
            LSTAR => self.msrs.lstar,
            CSTAR => self.msrs.cstar,
            SFMASK => self.msrs.sfmask,
            FS_BASE => self.segs[seg::FS].base,
            GS_BASE => self.segs[seg::GS].base,
            KERNEL_GS_BASE => self.msrs.kernel_gs_base,
            TSC_AUX => self.msrs.tsc_aux,
            SYSENTER_CS => self.msrs.sysenter_cs,
            SYSENTER_ESP => self.msrs.sysenter_esp,
            SYSENTER_EIP => self.msrs.sysenter_eip,
            PAT => self.msrs.pat,
            SPEC_CTRL => self.msrs.spec_ctrl,
            MISC_ENABLE => self.msrs.misc_enable | MISC_FIXED,
            _ => return self.read_platform(index),
        })
    }

    /// What the platform and firmware see: memory types, machine checks, facts.
    fn read_platform(&self, index: u32) -> Exec<u64> {
        let ratio = clock::tsc_hz() / 100_000_000;
        let vcpus = self.shared.ports().len() as u64;
        Ok(match index {
            index::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
            MTRR_CAP => MTRR_CAPABILITIES,
            MTRR_DEF_TYPE => self.msrs.mtrr_def_type,
            MCG_CAP => MC_BANKS as u64,
            MCG_STATUS => self.msrs.mcg_status,
            // Ratios of 100 MHz: the highest without turbo, the lowest.
            PLATFORM_INFO => (ratio & 0xff) << 8 | 1 << 40,
            BIOS_SIGN_ID => MICROCODE,
            CORE_THREAD_COUNT => vcpus << 16 | vcpus,
            PLATFORM_ID | EBL_CR_POWERON | DEBUGCTL => 0,
            // Last branch and last exception, from and to: not recorded.
            LAST_BRANCH..0x1df => 0,
            _ if let Some(i) = bank_register(index) => match i {
                (bank, 0) => self.msrs.mc_ctl[bank],
                _ => 0,
            },
            _ => {
                if let Some(i) = fixed_range(index) {
                    return Ok(self.msrs.mtrr_fixed[i]);
                }
                if let Some((i, mask)) = variable_range(index) {
                    let ranges =
                        if mask { &self.msrs.mtrr_physmask } else { &self.msrs.mtrr_physbase };
                    return Ok(ranges[i]);
                }
                unknown("RDMSR", index);
                return Err(Fault::GP0);
            }
        })
    }

    /// WRMSR.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Exec {
        match index {
            TSC => self.move_tsc(value.wrapping_sub(self.tsc())),
            TSC_ADJUST => self.move_tsc(value.wrapping_sub(self.msrs.tsc_adjust)),
            APIC_BASE => {
                let port = &self.shared.ports()[self.index as usize];
                check(port.lapic.set_apic_base(value))?;
                self.shared.apic_effect(self.index, Effect::Recheck);
            }
            TSC_DEADLINE => {
                let lapic = &self.shared.ports()[self.index as usize].lapic;
                lapic.set_tsc_deadline(value, self.tsc_offset);
            }
            X2APIC..=X2APIC_END => {
                let lapic = &self.shared.ports()[self.index as usize].lapic;
                let effect = lapic.write_msr(index, value, clock::host_tsc()).ok_or(Fault::GP0)?;
                self.shared.apic_effect(self.index, effect);
            }
            EFER => return self.write_efer(value),
            STAR => self.msrs.star = value,
            LSTAR => self.msrs.lstar = address(value)?,
            CSTAR => self.msrs.cstar = address(value)?,
            SFMASK => self.msrs.sfmask = value & 0xffff_ffff,
            FS_BASE => self.segs[seg::FS].base = address(value)?,
            GS_BASE => self.segs[seg::GS].base = address(value)?,
            KERNEL_GS_BASE => self.msrs.kernel_gs_base = address(value)?,
            TSC_AUX => {
                check(value >> 32 == 0)?;
                self.msrs.tsc_aux = value;
            }
            SYSENTER_CS => self.msrs.sysenter_cs = value & 0xffff_ffff,
            SYSENTER_ESP => self.msrs.sysenter_esp = address(value)?,
            SYSENTER_EIP => self.msrs.sysenter_eip = address(value)?,
            PAT => {
                check(value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)))?;
                self.msrs.pat = value;
            }
            SPEC_CTRL => {
                check(value & !SPEC_CTRL_BITS == 0)?;
                self.msrs.spec_ctrl = value;
            }
            PRED_CMD => check(value & !1 == 0)?,
            MISC_ENABLE => self.msrs.misc_enable = value & MISC_STORED,
            _ => return self.write_platform(index, value),
        }
        Ok(())
    }

    fn write_platform(&mut self, index: u32, value: u64) -> Exec {
        match index {
            MTRR_DEF_TYPE => {
                check(value & !0xcff == 0 && memory_type(value as u8))?;
                self.msrs.mtrr_def_type = value;
            }
            MCG_STATUS => {
                check(value & !7 == 0)?;
                self.msrs.mcg_status = value;
            }
            // Single-stepping by branches and branch records are not there; the bits read as zero.
            DEBUGCTL => check(value & !3 == 0)?,
            // No microcode is taken; the sequence that asks for the revision writes zero first.
            BIOS_UPDT_TRIG | BIOS_SIGN_ID | EBL_CR_POWERON => {}
            _ if let Some((bank, register)) = bank_register(index) => match register {
                0 => self.msrs.mc_ctl[bank] = value,
                // Status, address, other: only to be cleared.
                _ => check(value == 0)?,
            },
            _ => return self.write_mtrr(index, value),
        }
        Ok(())
    }

    fn write_mtrr(&mut self, index: u32, value: u64) -> Exec {
        if let Some(i) = fixed_range(index) {
            check(value.to_le_bytes().into_iter().all(memory_type))?;
            self.msrs.mtrr_fixed[i] = value;
            return Ok(());
        }
        let Some((i, mask)) = variable_range(index) else {
            unknown("WRMSR", index);
            return Err(Fault::GP0);
        };
        check(value >> PHYSICAL_BITS == 0)?;
        if mask {
            check(value & 0x7ff == 0)?;
            self.msrs.mtrr_physmask[i] = value;
        } else {
            check(value & 0xf00 == 0 && memory_type(value as u8))?;
            self.msrs.mtrr_physbase[i] = value;
        }
        Ok(())
    }

    /// Moves the guest's TSC by `delta`; TSC_ADJUST says by how much in all (SDM volume 3, 18.17.3).
    fn move_tsc(&mut self, delta: u64) {
        self.tsc_offset = self.tsc_offset.wrapping_add(delta);
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
        self.rearm_deadline();
    }

    /// The deadline is the guest's TSC, which has moved against the host's.
    fn rearm_deadline(&self) {
        let lapic = &self.shared.ports()[self.index as usize].lapic;
        lapic.set_tsc_deadline(lapic.tsc_deadline(), self.tsc_offset);
    }

    fn write_efer(&mut self, value: u64) -> Exec {
        check(value & !EFER_BITS == 0)?;
        let changed = self.efer ^ value;
        check(changed & cr::EFER_LME == 0 || self.cr0 & cr::CR0_PG == 0)?;
        // LMA is the processor's: writes to it do nothing.
        self.efer = value & !cr::EFER_LMA | self.efer & cr::EFER_LMA;
        self.update_mode();
        if changed & cr::EFER_NXE != 0 {
            self.flush_tlb_all();
        }
        Ok(())
    }

    /// Puts a saved register in place: as [`Cpu::write_msr`], but without what a write causes.
    pub fn restore_msr(&mut self, index: u32, value: u64) -> Exec {
        match index {
            TSC => {
                self.tsc_offset = value.wrapping_sub(clock::host_tsc());
                self.rearm_deadline();
            }
            TSC_ADJUST => self.msrs.tsc_adjust = value,
            _ => return self.write_msr(index, value),
        }
        Ok(())
    }
}

fn check(allowed: bool) -> Exec {
    if allowed { Ok(()) } else { Err(Fault::GP0) }
}

fn address(value: u64) -> Exec<u64> {
    check(canonical(value))?;
    Ok(value)
}

/// A memory type that MTRRs may name.
fn memory_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

fn fixed_range(index: u32) -> Option<usize> {
    match index {
        MTRR_FIX64K => Some(0),
        MTRR_FIX16K..0x25a => Some((index - MTRR_FIX16K) as usize + 1),
        MTRR_FIX4K..0x270 => Some((index - MTRR_FIX4K) as usize + 3),
        _ => None,
    }
}

/// Which variable range, and whether it is the mask.
fn variable_range(index: u32) -> Option<(usize, bool)> {
    let i = index.checked_sub(MTRR_PHYS).filter(|i| *i < 16)?;
    Some(((i >> 1) as usize, i & 1 != 0))
}

/// Which machine-check bank, and which of its four registers.
fn bank_register(index: u32) -> Option<(usize, u32)> {
    let i = index.checked_sub(MC0_CTL).filter(|i| *i < 4 * MC_BANKS as u32)?;
    Some(((i >> 2) as usize, i & 3))
}

fn unknown(what: &str, index: u32) {
    static SEEN: Mutex<Option<HashSet<u32>>> = Mutex::new(None);
    let mut seen = SEEN.lock().unwrap_or_else(|e| e.into_inner());
    let seen = seen.get_or_insert_default();
    // A guest may try them all: a few are enough to know.
    if seen.len() < 256 && seen.insert(index) {
        tracing::debug!("{what} {index:#x}: no such register, #GP");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_saved_registers_round_trip() {
        let mut cpu = Cpu::for_tests();
        cpu.write_msr(PAT, 0x0007_0106_0007_0406).unwrap();
        cpu.write_msr(MTRR_PHYS + 3, 0xff_c000_0800).unwrap();
        cpu.write_msr(MTRR_FIX4K + 7, 0x0606_0606_0606_0606).unwrap();
        cpu.write_msr(LSTAR, 0xffff_8000_0000_1000).unwrap();
        let saved: Vec<_> = saved().map(|i| (i, cpu.read_msr(i).unwrap())).collect();
        let mut copy = Cpu::for_tests();
        for &(index, value) in &saved {
            copy.restore_msr(index, value).unwrap();
        }
        for &(index, value) in saved.iter().filter(|(i, _)| *i != TSC) {
            assert_eq!(copy.read_msr(index), Ok(value), "register {index:#x}");
        }
        assert!(copy.read_msr(TSC).unwrap() >= saved[0].1);
    }

    #[test]
    fn the_tsc_moves_with_its_adjustment() {
        let mut cpu = Cpu::for_tests();
        let far = 1 << 50;
        cpu.write_msr(TSC, far).unwrap();
        let now = cpu.read_msr(TSC).unwrap();
        assert!(now >= far && now < far + (1 << 40));
        let adjust = cpu.read_msr(TSC_ADJUST).unwrap();
        assert_ne!(adjust, 0);
        cpu.write_msr(TSC_ADJUST, adjust.wrapping_sub(1 << 49)).unwrap();
        assert!(cpu.read_msr(TSC).unwrap() < far);
        cpu.restore_msr(TSC_ADJUST, 5).unwrap();
        assert_eq!(cpu.read_msr(TSC_ADJUST), Ok(5));
        assert!(cpu.read_msr(TSC).unwrap() >= 1 << 49, "the TSC stays");
    }

    #[test]
    fn a_deadline_follows_the_tsc() {
        let mut cpu = Cpu::for_tests();
        cpu.write_msr(APIC_BASE, 0xfee0_0d00).unwrap();
        cpu.write_msr(0x80f, 0x1ff).unwrap();
        cpu.write_msr(0x832, 0x4_0040).unwrap();
        let goal = cpu.tsc() + (1 << 40);
        cpu.write_msr(TSC_DEADLINE, goal).unwrap();
        let shared = cpu.shared.clone();
        let before = shared.ports()[0].lapic.deadline();
        cpu.write_msr(TSC_ADJUST, 1 << 39).unwrap();
        assert_eq!(shared.ports()[0].lapic.deadline(), before - (1 << 39));
        assert_eq!(cpu.read_msr(TSC_DEADLINE), Ok(goal));
    }

    #[test]
    fn efer_keeps_its_rules() {
        let mut cpu = Cpu::for_tests();
        cpu.write_msr(EFER, cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE).unwrap();
        assert_eq!(cpu.read_msr(EFER), Ok(cr::EFER_LME | cr::EFER_NXE), "LMA cannot be set");
        for reserved in [1, 7, 9, 12, 16, 32, 63] {
            assert_eq!(cpu.write_msr(EFER, 1 << reserved), Err(Fault::GP0), "bit {reserved}");
        }
        cpu.cr0 |= cr::CR0_PG;
        assert_eq!(cpu.write_msr(EFER, 0), Err(Fault::GP0), "not while paging");
        cpu.write_msr(EFER, cr::EFER_LME | cr::EFER_SCE).unwrap();
    }

    #[test]
    fn bad_values_are_refused() {
        let mut cpu = Cpu::for_tests();
        for (index, value) in [
            (LSTAR, 1 << 47),
            (FS_BASE, 0x8000_0000_0000),
            (PAT, 2),
            (PAT, 3 << 56),
            (TSC_AUX, 1 << 32),
            (SPEC_CTRL, 1 << 3),
            (PRED_CMD, 2),
            (MTRR_DEF_TYPE, 0x1000),
            (MTRR_DEF_TYPE, 2),
            (MTRR_PHYS, 1 << PHYSICAL_BITS),
            (MTRR_PHYS + 1, 1),
            (MTRR_FIX64K, 7),
            (MC0_CTL + 1, 1),
            (MTRR_CAP, 0),
            (index::ARCH_CAPABILITIES, 0),
            (APIC_BASE, 1),
            (0x808, 0),
            (0xdead_beef, 0),
        ] {
            assert_eq!(cpu.write_msr(index, value), Err(Fault::GP0), "register {index:#x}");
        }
        for index in [PRED_CMD, 0x802, 0x480, 0xc001_0015, 0x4b56_4d00, MC0_CTL + 16] {
            assert_eq!(cpu.read_msr(index), Err(Fault::GP0), "register {index:#x}");
        }
    }

    #[test]
    fn facts() {
        let mut cpu = Cpu::for_tests();
        assert_eq!(cpu.read_msr(MTRR_CAP), Ok(0x508));
        assert_eq!(cpu.read_msr(index::ARCH_CAPABILITIES).map(|v| v & 0x21), Ok(0x21));
        assert_eq!(cpu.read_msr(MISC_ENABLE), Ok(0x1801));
        assert_eq!(cpu.read_msr(BIOS_SIGN_ID), Ok(1 << 32));
        assert_eq!(cpu.read_msr(APIC_BASE), Ok(0xfee0_0900));
        assert_eq!(cpu.read_msr(CORE_THREAD_COUNT), Ok(0x1_0001));
    }

    #[test]
    fn no_register_number_panics() {
        let mut cpu = Cpu::for_tests();
        let ranges = [0..0x1000, 0xc000_0000..0xc000_0200, 0xc001_0000..0xc001_0100];
        for index in ranges.into_iter().flatten() {
            let value = cpu.read_msr(index).unwrap_or(0);
            let _ = cpu.write_msr(index, value);
            let _ = cpu.write_msr(index, u64::MAX);
        }
    }
}
