//! What CPUID tells the guest: what KVM supports, less what is not offered, plus the topology.
//!
//! The guest has one package with one die; each vCPU is a core with one thread; its APIC id is its
//! index. A leaf that KVM leaves empty because only the monitor can know it is filled here, a leaf
//! that would contradict the guest's own topology or show what is not saved (AMX, CET, PMU, SGX,
//! PT) or not offered (VT-x, AMD-V) is emptied. Intel SDM volume 2, CPUID; AMD APM volume 3,
//! appendix E; `Documentation/virt/kvm/x86/cpuid.rst` for 4000_0000H.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// KVM's LAPIC timers count nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What the leaves are computed from.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    /// This vCPU's index, which is its APIC id.
    pub index: u32,
    /// How many there are.
    pub vcpus: u32,
    /// The guest's TSC, if its frequency is known.
    pub tsc_khz: Option<u32>,
    /// The LAPIC timer has its TSC-deadline mode.
    pub tsc_deadline: bool,
    /// Offer VT-x or AMD-V if KVM does.
    pub nested: bool,
    /// VMCALL and VMMCALL work in the guest's kernel.
    pub hypercalls: bool,
    /// Leaves 8000_0002H to 8000_0006H of the host (name and caches): EAX, EBX, ECX, EDX.
    pub host: [[u32; 4]; 5],
}

impl Machine {
    /// Bits of an APIC id.
    fn id_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }
}

/// The leaves that are copied from the host's own CPU.
pub(super) fn host_leaves() -> [[u32; 4]; 5] {
    std::array::from_fn(|i| {
        let leaf = __cpuid(0x8000_0002 + i as u32);
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    })
}

/// Leaf 1, ECX: XSAVE.
const XSAVE: u32 = 1 << 26;

/// Takes back what KVM shows the guest (`shown`, KVM_GET_CPUID2) beyond what was asked for in `asked`
/// (KVM_SET_CPUID2). None should, but kvm_pvm adds the host's own features, even ones that it cannot
/// hold itself (`docs/kvm.md`). A bit of leaf 1 cannot be hidden there, a whole leaf can. True if `asked`
/// is another table now, to be set once more.
pub(super) fn take_back(asked: &mut Vec<kvm_cpuid_entry2>, shown: &[kvm_cpuid_entry2]) -> bool {
    let feature_bits = |entries: &[kvm_cpuid_entry2], function: u32| {
        let leaf = entries.iter().find(|e| e.function == function && e.index == 0);
        leaf.map_or((0, 0), |leaf| (leaf.ebx, leaf.ecx))
    };
    let surplus = |function: u32| {
        let (asked, shown) = (feature_bits(asked, function), feature_bits(shown, function));
        (shown.0 & !asked.0, shown.1 & !asked.1)
    };
    // KVM itself computes OSXSAVE in leaf 1 and OSPKE in ECX of leaf 7, but nothing in EBX of leaf 7.
    let xsave = surplus(1).1 & XSAVE != 0;
    let structured = surplus(7).0 != 0;
    if structured {
        // Without the leaf there are none of its features.
        asked.retain(|leaf| leaf.function != 7);
    }
    if xsave {
        // A CPU whose leaves end before 0DH has no XSAVE, whatever leaf 1 says, and so no AVX: kernels look
        // at both, as firmware may limit the leaves.
        for leaf in asked.iter_mut().filter(|leaf| leaf.function == 0) {
            leaf.eax = leaf.eax.min(0xc);
        }
        asked.retain(|leaf| !(0xd..0x4000_0000).contains(&leaf.function));
    }
    if xsave || structured {
        tracing::debug!("KVM adds to the guest's CPUID: XSAVE {xsave}, leaf 7 {structured}");
    }
    xsave || structured
}

fn set_bits(value: &mut u32, shift: u32, width: u32, bits: u32) {
    let mask = ((1u64 << width) - 1) as u32;
    *value = *value & !(mask << shift) | (bits.min(mask) << shift);
}

fn set_bit(value: &mut u32, bit: u32, on: bool) {
    set_bits(value, bit, 1, on.into());
}

fn clear(value: &mut u32, bits: &[u32]) {
    bits.iter().for_each(|bit| set_bit(value, *bit, false));
}

struct Table {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Table {
    fn get(&mut self, function: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries.iter_mut().find(|entry| entry.function == function)
    }

    /// Replaces a leaf by these subleaves; one subleaf is a leaf without index.
    fn replace(&mut self, function: u32, subleaves: &[[u32; 4]]) {
        self.entries.retain(|entry| entry.function != function);
        let flags = if subleaves.len() > 1 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        for (index, &[eax, ebx, ecx, edx]) in (0..).zip(subleaves) {
            self.entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            });
        }
    }

    fn max_basic(&mut self) -> u32 {
        self.get(0).map_or(0, |leaf| leaf.eax)
    }

    fn max_extended(&mut self) -> u32 {
        self.get(0x8000_0000).map_or(0, |leaf| leaf.eax)
    }

    fn vendor_is(&mut self, name: &[u8; 12]) -> bool {
        self.get(0).is_some_and(|leaf| {
            let text = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
            text.as_flattened() == name
        })
    }
}

/// The guest's CPUID for one vCPU, from what KVM_GET_SUPPORTED_CPUID gave.
pub(super) fn build(supported: &[kvm_cpuid_entry2], machine: &Machine) -> Vec<kvm_cpuid_entry2> {
    let mut table = Table { entries: supported.to_vec() };
    let intel = table.vendor_is(b"GenuineIntel");
    features(&mut table, machine);
    hidden(&mut table, machine.nested);
    xsave(&mut table);
    topology(&mut table, machine, intel);
    if intel {
        frequencies(&mut table, machine);
    } else {
        amd_topology(&mut table, machine);
    }
    caches(&mut table, machine);
    host_identity(&mut table, machine);
    hypervisor(&mut table, machine);
    table.entries.sort_by_key(|entry| (entry.function, entry.index));
    table.entries
}

/// Leaves 1, 7 and 8000_0001H.
fn features(table: &mut Table, machine: &Machine) {
    if let Some(leaf) = table.get(1) {
        set_bits(&mut leaf.ebx, 8, 8, 8); // CLFLUSH line, in 8 bytes
        set_bits(&mut leaf.ebx, 16, 8, 1 << machine.id_bits());
        set_bits(&mut leaf.ebx, 24, 8, machine.index);
        // DTES64, MONITOR, DS_CPL, SMX, EIST, TM2, SDBG, PDCM
        clear(&mut leaf.ecx, &[2, 3, 4, 6, 7, 8, 11, 15]);
        if !machine.nested {
            clear(&mut leaf.ecx, &[5]); // VMX
        }
        set_bit(&mut leaf.ecx, 24, machine.tsc_deadline);
        set_bit(&mut leaf.ecx, 31, true); // hypervisor
        clear(&mut leaf.edx, &[21, 22, 29, 31]); // DS, ACPI, TM, PBE
        set_bit(&mut leaf.edx, 28, machine.vcpus > 1); // HTT
    }
    for leaf in table.entries.iter_mut().filter(|leaf| leaf.function == 7) {
        match leaf.index {
            0 => {
                clear(&mut leaf.ebx, &[2, 25]); // SGX, PT
                clear(&mut leaf.ecx, &[7, 30]); // CET shadow stacks, SGX_LC
                clear(&mut leaf.edx, &[15, 19, 20, 22, 24, 25]); // hybrid, LBR, IBT, AMX
            }
            1 => clear(&mut leaf.eax, &[8, 21]), // ArchPerfmonExt, AMX_FP16
            _ => {}
        }
    }
    if let Some(leaf) = table.get(0x8000_0001) {
        // IBS, SKINIT, WDT, LWP, performance counters (core, NB, data access, L3)
        clear(&mut leaf.ecx, &[10, 12, 13, 15, 23, 24, 26, 28]);
        if !machine.nested {
            clear(&mut leaf.ecx, &[2]); // SVM
        }
    }
}

/// Leaves whose feature is not offered.
fn hidden(table: &mut Table, nested: bool) {
    // MONITOR, PMU, resource control, SGX, PT, hybrid, LBR, AMX, PMU again, AMD's memory encryption,
    // AMD's PMU, and AMD's second way to tell the topology (the guest falls back to 0BH).
    let mut leaves = vec![
        5,
        0xa,
        0xf,
        0x10,
        0x12,
        0x14,
        0x1a,
        0x1b,
        0x1c,
        0x1d,
        0x1e,
        0x23,
        0x8000_001b,
        0x8000_001c,
        0x8000_001f,
        0x8000_0020,
        0x8000_0022,
        0x8000_0023,
        0x8000_0026,
    ];
    if !nested {
        leaves.push(0x8000_000a);
    }
    table.entries.retain(|entry| !leaves.contains(&entry.function) || entry.index == 0);
    for leaf in table.entries.iter_mut().filter(|leaf| leaves.contains(&leaf.function)) {
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
    }
}

/// Leaf 0DH without AMX (17, 18: permission would have to be asked for, and 8 KiB saved) and
/// without supervisor state (CET: 11, 12; PT: 8; LBR: 15). Where KVM holds nothing but x87 and SSE (no
/// XSAVE in leaf 1) it is empty, whatever KVM says in it.
fn xsave(table: &mut Table) {
    if table.get(1).is_none_or(|leaf| leaf.ecx & XSAVE == 0) {
        if table.get(0xd).is_some() {
            table.replace(0xd, &[[0; 4]]);
        }
        return;
    }
    const AMX: u32 = 3 << 17;
    const SUPERVISOR: u32 = 1 << 8 | 3 << 11 | 1 << 15;
    const GONE: [u32; 6] = [8, 11, 12, 15, 17, 18];
    table.entries.retain(|e| e.function != 0xd || !GONE.contains(&e.index));
    let user: Vec<_> =
        table.entries.iter().filter(|e| e.function == 0xd && e.index > 1).copied().collect();
    for leaf in table.entries.iter_mut().filter(|e| e.function == 0xd) {
        match leaf.index {
            0 => {
                leaf.eax &= !AMX;
                // The standard format's size is where its last component ends.
                let end = user.iter().filter(|e| leaf.eax & (1u32.wrapping_shl(e.index)) != 0);
                leaf.ecx = end.map(|e| e.ebx.saturating_add(e.eax)).max().unwrap_or(0).max(576);
            }
            1 => {
                clear(&mut leaf.eax, &[4]); // XFD
                leaf.ecx &= !SUPERVISOR;
            }
            _ => {}
        }
    }
}

/// Leaves 0BH and 1FH: no threads, one level of cores.
fn topology(table: &mut Table, machine: &Machine, intel: bool) {
    let levels = [
        [0, 1, 1 << 8, machine.index],
        [machine.id_bits(), machine.vcpus, 2 << 8 | 1, machine.index],
        [0, 0, 2, machine.index],
    ];
    let max = table.max_basic();
    if max >= 0xb {
        table.replace(0xb, &levels);
    }
    if intel && max >= 0x1f {
        table.replace(0x1f, &levels);
    } else {
        table.entries.retain(|entry| entry.function != 0x1f);
    }
}

/// Leaves 15H and 16H. The "crystal" is what the LAPIC timer counts, as the SDM has it.
fn frequencies(table: &mut Table, machine: &Machine) {
    let Some(khz) = machine.tsc_khz else { return };
    let max = table.max_basic();
    if max >= 0x15 {
        table.replace(0x15, &[[APIC_BUS_KHZ, khz, APIC_BUS_KHZ * 1000, 0]]);
    }
    if max >= 0x16 {
        let mhz = (khz + 500) / 1000;
        table.replace(0x16, &[[mhz, mhz, 100, 0]]);
    }
}

/// Leaves 8000_0001H, 8000_0008H and 8000_001EH.
fn amd_topology(table: &mut Table, machine: &Machine) {
    let mut topoext = false;
    if let Some(leaf) = table.get(0x8000_0001) {
        set_bit(&mut leaf.ecx, 1, machine.vcpus > 1); // CmpLegacy
        topoext = leaf.ecx & 1 << 22 != 0;
    }
    if let Some(leaf) = table.get(0x8000_0008) {
        set_bits(&mut leaf.ecx, 0, 8, machine.vcpus - 1);
        set_bits(&mut leaf.ecx, 12, 4, machine.id_bits());
    }
    if topoext && table.max_extended() >= 0x8000_001e {
        table.replace(0x8000_001e, &[[machine.index, machine.index & 0xff, 0, 0]]);
    }
}

/// Leaves 4 (Intel) and 8000_001DH (AMD): the last level is shared by all, the others by nobody.
fn caches(table: &mut Table, machine: &Machine) {
    let all = (1 << machine.id_bits()) - 1;
    for leaf in &mut table.entries {
        let cache = leaf.eax & 0x1f != 0;
        if !cache || !matches!(leaf.function, 4 | 0x8000_001d) {
            continue;
        }
        let level = leaf.eax >> 5 & 7;
        set_bits(&mut leaf.eax, 14, 12, if level >= 3 { all } else { 0 });
        if leaf.function == 4 {
            set_bits(&mut leaf.eax, 26, 6, all); // core ids in the package
        }
    }
}

/// The CPU's name, and its caches where KVM leaves them out.
fn host_identity(table: &mut Table, machine: &Machine) {
    let max = table.max_extended();
    for (function, values) in (0x8000_0002..).zip(machine.host) {
        let empty =
            table.get(function).is_none_or(|l| (l.eax, l.ebx, l.ecx, l.edx) == (0, 0, 0, 0));
        if function <= max && (empty || function <= 0x8000_0004) {
            table.replace(function, &[values]);
        }
    }
}

/// Leaves 4000_0000H: KVM's signature and features, and VMware's leaf of frequencies.
fn hypervisor(table: &mut Table, machine: &Machine) {
    let max = if machine.tsc_khz.is_some() { 0x4000_0010 } else { 0x4000_0001 };
    table.entries.retain(|e| !(0x4000_0002..=0x4000_ffff).contains(&e.function));
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    table.replace(0x4000_0000, &[[max, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]]);
    if let Some(leaf) = table.get(0x4000_0001)
        && !machine.hypercalls
    {
        clear(&mut leaf.eax, &[7, 11, 13]); // PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD
    }
    if let Some(khz) = machine.tsc_khz {
        table.replace(0x4000_0010, &[[khz, APIC_BUS_KHZ, 0, 0]]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [max, word(0), word(8), word(4)])
    }

    fn machine(index: u32, vcpus: u32) -> Machine {
        Machine {
            index,
            vcpus,
            tsc_khz: Some(2_500_000),
            tsc_deadline: true,
            nested: false,
            hypercalls: true,
            host: [[0x41; 4], [0x42; 4], [0x43; 4], [5; 4], [6; 4]],
        }
    }

    fn get(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let entry = table.iter().find(|e| e.function == function && e.index == index);
        entry.map(|e| [e.eax, e.ebx, e.ecx, e.edx]).unwrap_or_else(|| panic!("{function:#x}"))
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(b"GenuineIntel", 0x1f),
            leaf(1, 0, [0x806f8, 0, 1 << 5 | 1 << 21 | XSAVE, 0]),
            leaf(4, 0, [0x1c00_4121, 0, 0, 0]),
            leaf(4, 3, [0xfc1f_c163, 0, 0, 0]),
            leaf(7, 0, [2, 1 << 25, 1 << 7, 1 << 24]),
            leaf(0xa, 0, [0x0830_0805, 0, 0, 0]),
            leaf(0xd, 0, [0x6_00e7, 0x2b00, 0x2b00, 0]),
            leaf(0xd, 1, [0x1f, 0, 0x1800, 0]),
            leaf(0xd, 2, [0x100, 0x240, 0, 0]),
            leaf(0xd, 7, [0x400, 0x680, 0, 0]),
            leaf(0xd, 18, [0x2000, 0xb00, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0008, 0, [0x3930, 0, 0, 0]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        ]
    }

    #[test]
    fn intel_topology_and_frequencies() {
        let table = build(&intel(), &machine(2, 3));
        let [_, ebx, ecx, edx] = get(&table, 1, 0);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff), (2, 4));
        assert_eq!(ecx & 1 << 5, 0);
        assert_ne!(ecx & 1 << 31, 0);
        assert_ne!(edx & 1 << 28, 0);
        assert_eq!(get(&table, 0xb, 0), [0, 1, 0x100, 2]);
        assert_eq!(get(&table, 0xb, 1), [2, 3, 0x201, 2]);
        assert_eq!(get(&table, 0x1f, 1), [2, 3, 0x201, 2]);
        assert_eq!(get(&table, 4, 0)[0], 0x0c00_0121);
        assert_eq!(get(&table, 4, 3)[0], 0x0c00_c163);
        let [denominator, numerator, crystal, _] = get(&table, 0x15, 0).map(u64::from);
        assert_eq!(crystal * numerator / denominator, 2_500_000_000);
        assert_eq!(get(&table, 0x16, 0)[0], 2500);
        assert_eq!(get(&table, 0x4000_0010, 0), [2_500_000, 1_000_000, 0, 0]);
        assert_eq!(get(&table, 0x8000_0003, 0), [0x42; 4]);
    }

    #[test]
    fn what_is_not_offered_is_hidden() {
        let table = build(&intel(), &machine(0, 1));
        assert_eq!(get(&table, 7, 0)[1..], [0, 0, 0]);
        assert_eq!(get(&table, 0xa, 0), [0; 4]);
        assert_eq!(get(&table, 0xd, 0)[0], 0xe7);
        assert_eq!(get(&table, 0xd, 0)[2], 0xa80);
        assert_eq!(get(&table, 0xd, 1), [0xf, 0, 0, 0]);
        assert!(!table.iter().any(|e| e.function == 0xd && e.index == 18));
        assert_eq!(get(&table, 1, 0)[3] & 1 << 28, 0);
        assert_eq!(get(&table, 0x4000_0001, 0)[0], 0x0100_7efb);
        let silent = build(&intel(), &Machine { hypercalls: false, ..machine(0, 1) });
        assert_eq!(get(&silent, 0x4000_0001, 0)[0], 0x0100_567b);
        let nested = Machine { nested: true, ..machine(0, 1) };
        assert_ne!(get(&build(&intel(), &nested), 1, 0)[2] & 1 << 5, 0);
    }

    #[test]
    fn without_xsave_there_is_no_leaf_of_its_states() {
        let mut supported = intel();
        supported[1].ecx &= !XSAVE;
        let table = build(&supported, &machine(0, 1));
        assert_eq!(get(&table, 0xd, 0), [0; 4]);
        assert_eq!(table.iter().filter(|e| e.function == 0xd).count(), 1);
        assert_eq!(get(&table, 0x15, 0)[1], 2_500_000, "the leaves behind it stay");
    }

    #[test]
    fn what_kvm_adds_is_taken_back() {
        let mut supported = intel();
        supported[1].ecx &= !XSAVE;
        let asked = build(&supported, &machine(0, 1));
        let with = |changes: &[(u32, u32, u32)]| {
            let mut shown = asked.clone();
            for &(function, ebx, ecx) in changes {
                let leaf = shown.iter_mut().find(|e| e.function == function).unwrap();
                (leaf.ebx, leaf.ecx) = (leaf.ebx | ebx, leaf.ecx | ecx);
            }
            shown
        };
        let mut table = asked.clone();
        // OSXSAVE and OSPKE follow from CR4.
        assert!(!take_back(&mut table, &with(&[(1, 0, 1 << 27), (7, 0, 1 << 4)])));
        assert_eq!(table, asked);
        assert!(take_back(&mut table, &with(&[(7, 1 << 20, 0)])));
        assert!(!table.iter().any(|e| e.function == 7));
        assert_eq!(get(&table, 0, 0)[0], 0x1f);
        assert!(take_back(&mut table, &with(&[(1, 0, XSAVE)])));
        assert_eq!(get(&table, 0, 0)[0], 0xc);
        assert!(!table.iter().any(|e| (0xd..0x4000_0000).contains(&e.function)));
        assert_eq!(get(&table, 0x4000_0010, 0)[0], 2_500_000);
    }

    #[test]
    fn amd_topology_is_told_in_its_own_leaves() {
        let supported = [
            vendor(b"AuthenticAMD", 0x10),
            leaf(1, 0, [0xb0_0f21, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 1 << 2 | 1 << 22, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0x7001, 0]),
            leaf(0x8000_000a, 0, [1, 2, 3, 4]),
            leaf(0x8000_001d, 3, [0x4163, 0, 0, 0]),
            leaf(0x8000_001f, 0, [1, 2, 3, 4]),
        ];
        let table = build(&supported, &machine(5, 6));
        assert_eq!(get(&table, 0x8000_0001, 0)[2], 1 << 1 | 1 << 22);
        assert_eq!(get(&table, 0x8000_0008, 0)[2], 0x3005);
        assert_eq!(get(&table, 0x8000_001e, 0), [5, 5, 0, 0]);
        assert_eq!(get(&table, 0x8000_001d, 3)[0], 0x1_c163);
        assert_eq!(get(&table, 0x8000_000a, 0), [0; 4]);
        assert_eq!(get(&table, 0x8000_001f, 0), [0; 4]);
        assert_eq!(get(&table, 0x8000_0005, 0), [5; 4]);
        assert_eq!(get(&table, 0xb, 1), [3, 6, 0x201, 5]);
        assert!(!table.iter().any(|e| e.function == 0x15 || e.function == 0x1f));
    }

    #[test]
    fn many_vcpus_do_not_overflow_the_narrow_fields() {
        let table = build(&intel(), &machine(254, 255));
        assert_eq!(get(&table, 1, 0)[1] >> 16, 0xfeff);
        assert_eq!(get(&table, 4, 3)[0] >> 26, 63);
        assert_eq!(get(&table, 0xb, 1), [8, 255, 0x201, 254]);
    }
}
