//! What CPUID tells the guest (SDM volume 2, CPUID).
//!
//! A Nehalem by family and model, as operating systems have no special paths for it, with what x86-64-v2
//! has and the newer things that make guests quicker: PCID, INVPCID, fast short REP strings, x2APIC,
//! TSC deadlines. With [`crate::msr::ARCH_CAPABILITIES`] it says that it has none of the hardware bugs
//! that kernels work around.
//!
//! Time: leaf 15H gives the TSC's frequency and the APIC timer's, so nothing needs to be calibrated;
//! 8000_0007H and TSC_ADJUST make the TSC a clock that needs no watchdog. The hypervisor's signature is
//! KVM's, without any of its features but the one that drops delays on port 80H: it is what lets Linux
//! use x2APIC mode without interrupt remapping, and its leaf 4000_0010H has both frequencies too.

use std::sync::OnceLock;

use crate::chip::apic_timer::TIMER_HZ;
use crate::clock;
use crate::state::{Cpu, cr};
use crate::walk::PHYSICAL_BITS;

/// Family, model and stepping: CPUID leaf 1, EAX.
pub fn signature() -> u32 {
    0x0001_06a3
}

/// The bits of XCR0 that can be set: x87 and SSE.
pub const XCR0: u64 = 3;
/// Bytes of an XSAVE area with both: legacy region and header.
pub const XSAVE_BYTES: u32 = 576;

const MAX_BASIC: u32 = 0x16;
const MAX_HYPERVISOR: u32 = 0x4000_0010;
const MAX_EXTENDED: u32 = 0x8000_0008;
/// KVM_FEATURE_NOP_IO_DELAY.
const KVM_FEATURES: u32 = 1 << 1;
const BRAND: &[u8; 48] =
    b"Lodge software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Bits that follow the state of the CPU.
const APIC: u32 = 1 << 9;
const OSXSAVE: u32 = 1 << 27;

/// SSE3, SSSE3, CX16, PCID, SSE4.1, SSE4.2, x2APIC, POPCNT, TSC deadline, XSAVE, hypervisor.
const LEAF_1_ECX: u32 = bits(&[0, 9, 13, 17, 19, 20, 21, 23, 24, 26, 31]);
/// x87, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH, MMX, FXSR, SSE,
/// SSE2, self snoop.
const LEAF_1_EDX: u32 =
    bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27]);
/// FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, no FCS and FDS, SMAP.
const LEAF_7_EBX: u32 = bits(&[0, 1, 7, 9, 10, 13, 20]);
/// UMIP.
const LEAF_7_ECX: u32 = bits(&[2]);
/// Fast short REP MOV, IBRS and IBPB, STIBP, ARCH_CAPABILITIES.
const LEAF_7_EDX: u32 = bits(&[4, 26, 27, 29]);
/// Fast zero-length REP MOVSB, fast short REP STOSB.
const LEAF_7_1_EAX: u32 = bits(&[10, 11]);
/// BHI_CTRL: SPEC_CTRL.BHI_DIS_S exists, so kernels do not clear branch history by software.
const LEAF_7_2_EDX: u32 = bits(&[4]);
/// LAHF and SAHF in 64-bit mode, PREFETCHW.
const EXTENDED_1_ECX: u32 = bits(&[0, 8]);
/// SYSCALL, NX, pages of 1 GiB, RDTSCP, long mode.
const EXTENDED_1_EDX: u32 = bits(&[11, 20, 26, 27, 29]);

const fn bits(numbers: &[u32]) -> u32 {
    let mut all = 0;
    let mut i = 0;
    while i < numbers.len() {
        all |= 1 << numbers[i];
        i += 1;
    }
    all
}

impl Cpu {
    /// EAX, EBX, ECX, EDX for `leaf` and `subleaf`.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match leaf {
            0x4000_0000..=MAX_HYPERVISOR => hypervisor(leaf),
            0x8000_0000..=MAX_EXTENDED => extended(leaf),
            0..=MAX_BASIC => self.basic(leaf, subleaf),
            // Beyond the last leaf an Intel CPU gives the last basic one.
            _ => self.basic(MAX_BASIC, subleaf),
        }
    }

    fn basic(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match (leaf, subleaf) {
            (0, _) => text(MAX_BASIC, [b"Genu", b"ntel", b"ineI"]),
            (1, _) => self.leaf_1(),
            // Descriptors of TLBs; the caches are in leaf 4.
            (2, _) => [0x5503_5a01, 0x00f0_b2ff, 0, 0x00ca_0000],
            (4, _) => self.cache(subleaf),
            // ARAT: the APIC timer never stops.
            (6, _) => [1 << 2, 0, 0, 0],
            (7, 0) => [2, LEAF_7_EBX, LEAF_7_ECX, LEAF_7_EDX],
            (7, 1) => [LEAF_7_1_EAX, 0, 0, 0],
            (7, 2) => [0, 0, 0, LEAF_7_2_EDX],
            (0xb, _) => self.topology(subleaf),
            (0xd, 0) => [XCR0 as u32, XSAVE_BYTES, XSAVE_BYTES, 0],
            // XSAVEOPT.
            (0xd, 1) => [1, 0, 0, 0],
            (0x15, _) => {
                let (over, by) = tsc_ratio();
                [by, over, TIMER_HZ as u32, 0]
            }
            (0x16, _) => {
                let mhz = (clock::tsc_hz() / 1_000_000) as u32;
                [mhz, mhz, 100, 0]
            }
            _ => [0; 4],
        }
    }

    fn vcpus(&self) -> u32 {
        self.shared.ports().len() as u32
    }

    fn leaf_1(&self) -> [u32; 4] {
        let n = self.vcpus();
        // CLFLUSH lines of 8 x 8 bytes, ids for all vCPUs, this one's id.
        let ebx = 8 << 8 | n.next_power_of_two().min(255) << 16 | (self.index & 0xff) << 24;
        let osxsave = if self.cr4 & cr::CR4_OSXSAVE != 0 { OSXSAVE } else { 0 };
        let lapic = &self.shared.ports()[self.index as usize].lapic;
        let apic = if lapic.enabled() { APIC } else { 0 };
        let several = if n > 1 { 1 << 28 } else { 0 };
        [signature(), ebx, LEAF_1_ECX | osxsave, LEAF_1_EDX | apic | several]
    }

    /// Leaf 4: 32 KiB of L1 for data and for code, 256 KiB of L2, 8 MiB of L3 for all.
    fn cache(&self, subleaf: u32) -> [u32; 4] {
        let ids = self.vcpus().next_power_of_two().min(64) - 1;
        let (kind, level, sharing, ways, sets, flags) = match subleaf {
            0 => (1, 1, 0, 8, 64, 0),
            1 => (2, 1, 0, 4, 128, 0),
            2 => (3, 2, 0, 8, 512, 0),
            // Inclusive of lower levels.
            3 => (3, 3, ids, 16, 8192, 2),
            _ => return [0; 4],
        };
        let self_initializing = 1 << 8;
        let eax = kind | level << 5 | self_initializing | sharing << 14 | ids << 26;
        [eax, (ways - 1) << 22 | (64 - 1), sets - 1, flags]
    }

    /// Leaf 0BH: one thread in each core, all cores in one package.
    fn topology(&self, subleaf: u32) -> [u32; 4] {
        let n = self.vcpus();
        let (shift, count, kind) = match subleaf {
            0 => (0, 1, 1),
            1 => (n.next_power_of_two().trailing_zeros(), n, 2),
            _ => (0, 0, 0),
        };
        [shift, count, kind << 8 | subleaf & 0xff, self.index]
    }
}

fn hypervisor(leaf: u32) -> [u32; 4] {
    match leaf {
        0x4000_0000 => text(MAX_HYPERVISOR, [b"KVMK", b"VMKV", b"M\0\0\0"]),
        0x4000_0001 => [KVM_FEATURES, 0, 0, 0],
        0x4000_0010 => [(clock::tsc_hz() / 1000) as u32, (TIMER_HZ / 1000) as u32, 0, 0],
        _ => [0; 4],
    }
}

fn extended(leaf: u32) -> [u32; 4] {
    match leaf {
        0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
        0x8000_0001 => [0, 0, EXTENDED_1_ECX, EXTENDED_1_EDX],
        0x8000_0002..=0x8000_0004 => {
            let at = (leaf - 0x8000_0002) as usize * 16;
            let word = |i: usize| {
                let at = at + 4 * i;
                u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
            };
            [word(0), word(1), word(2), word(3)]
        }
        // L2: 256 KiB, 8 ways, lines of 64 bytes.
        0x8000_0006 => [0, 0, 256 << 16 | 6 << 12 | 64, 0],
        // The TSC is invariant.
        0x8000_0007 => [0, 0, 0, 1 << 8],
        0x8000_0008 => [PHYSICAL_BITS | 48 << 8, 0, 0, 0],
        _ => [0; 4],
    }
}

/// A leaf of text: EBX, ECX, EDX. A vendor's reads in the order EBX, EDX, ECX.
fn text(max: u32, words: [&[u8; 4]; 3]) -> [u32; 4] {
    let [b, c, d] = words.map(|word| u32::from_le_bytes(*word));
    [max, b, c, d]
}

/// `(numerator, denominator)` of the TSC's frequency over the APIC timer's. Linux multiplies the numerator by
/// the timer's kHz in 32 bits, so it is at most 4294; the result is right to some 10^-7.
fn tsc_ratio() -> (u32, u32) {
    static RATIO: OnceLock<(u32, u32)> = OnceLock::new();
    *RATIO.get_or_init(|| ratio(clock::tsc_hz(), TIMER_HZ))
}

fn ratio(hz: u64, of: u64) -> (u32, u32) {
    let limit = u64::from(u32::MAX) / (of / 1000);
    let error = |(n, d): (u64, u64)| (n * of).abs_diff(d * hz) as f64 / d as f64;
    let best = (1..=limit)
        .map(|d| ((d * hz + of / 2) / of, d))
        .filter(|(n, _)| (1..=limit).contains(n))
        .min_by(|a, b| error(*a).total_cmp(&error(*b)));
    let (n, d) = best.unwrap_or((1, 1));
    (n as u32, d as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::Shared;
    use std::sync::Arc;

    fn cpus(n: u32) -> Vec<Box<Cpu>> {
        let layout = lodge_memory::RamLayout::new(1 << 20).unwrap();
        let memory = lodge_memory::allocate(&layout).unwrap();
        let shared = Shared::new(memory, Arc::new(lodge_memory::NoBus), n);
        (0..n).map(|i| Cpu::new(shared.clone(), i)).collect()
    }

    fn bytes(words: &[u32]) -> String {
        let all: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        String::from_utf8(all).unwrap().trim_end_matches('\0').to_owned()
    }

    #[test]
    fn names() {
        let cpu = Cpu::for_tests();
        let [max, b, c, d] = cpu.cpuid(0, 0);
        assert_eq!((max, bytes(&[b, d, c]).as_str()), (0x16, "GenuineIntel"));
        let [max, b, c, d] = cpu.cpuid(0x4000_0000, 0);
        assert_eq!((max, bytes(&[b, c, d]).as_str()), (0x4000_0010, "KVMKVMKVM"));
        let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|l| cpu.cpuid(l, 0)).collect();
        assert_eq!(bytes(&brand), "Lodge software CPU");
    }

    #[test]
    fn some_bits_follow_the_state() {
        let mut cpu = Cpu::for_tests();
        assert_eq!(cpu.cpuid(1, 0)[2] & OSXSAVE, 0);
        cpu.cr4 |= cr::CR4_OSXSAVE;
        assert_ne!(cpu.cpuid(1, 0)[2] & OSXSAVE, 0);
        assert_ne!(cpu.cpuid(1, 0)[3] & APIC, 0);
        cpu.shared.ports()[0].lapic.set_apic_base(0xfee0_0000);
        assert_eq!(cpu.cpuid(1, 0)[3] & APIC, 0);
    }

    #[test]
    fn topology_has_every_vcpu() {
        let cpus = cpus(6);
        for (i, cpu) in cpus.iter().enumerate() {
            assert_eq!(cpu.cpuid(0xb, 0), [0, 1, 0x100, i as u32]);
            assert_eq!(cpu.cpuid(0xb, 1), [3, 6, 0x201, i as u32]);
            assert_eq!(cpu.cpuid(0xb, 2), [0, 0, 2, i as u32]);
            let leaf = cpu.cpuid(1, 0);
            assert_eq!((leaf[1] >> 24, leaf[1] >> 16 & 255), (i as u32, 8));
            assert_ne!(leaf[3] & 1 << 28, 0);
        }
        assert_eq!(Cpu::for_tests().cpuid(0xb, 1), [0, 1, 0x201, 0]);
        assert_eq!(Cpu::for_tests().cpuid(1, 0)[3] & 1 << 28, 0);
    }

    #[test]
    fn caches_have_their_sizes() {
        let cpu = Cpu::for_tests();
        let size = |i| {
            let [_, b, c, _] = cpu.cpuid(4, i);
            ((b >> 22) + 1) * ((b & 0xfff) + 1) * (c + 1)
        };
        assert_eq!([0, 1, 2, 3].map(size), [32 << 10, 32 << 10, 256 << 10, 8 << 20]);
        assert_eq!(cpu.cpuid(4, 4), [0; 4]);
    }

    #[test]
    fn the_ratio_is_close_and_fits_linux() {
        for hz in [1_000_000_000, 2_595_124_000, 2_100_000_017, 3_999_999_999, 800_000_000] {
            let (n, d) = ratio(hz, TIMER_HZ);
            let khz = 1_000_000u32.checked_mul(n).unwrap() / d;
            let error = u64::from(khz).abs_diff(hz / 1000);
            assert!(error <= 2, "{hz}: {n}/{d} gives {khz} kHz");
        }
        assert_eq!(ratio(2_600_000_000, TIMER_HZ), (13, 5));
    }

    #[test]
    fn leaves_beyond_the_last() {
        let cpu = Cpu::for_tests();
        let last = cpu.cpuid(0x16, 0);
        for leaf in [0x17, 0x3fff_ffff, 0x4000_0011, 0x8000_0009, u32::MAX] {
            assert_eq!(cpu.cpuid(leaf, 0), last, "leaf {leaf:#x}");
        }
    }
}
