//! Model-specific registers: which ones are saved, in what order they come back, and what happens
//! to one that the host refuses.

use std::collections::BTreeSet;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::host::Kvm;
use super::refused;
use crate::error::Result;

pub(super) const IA32_MISC_ENABLE: u32 = 0x1a0;
pub(super) const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// What a saved machine needs and KVM's list leaves out: memory types, TSC_AUX.
const BESIDE_THE_LIST: &[std::ops::RangeInclusive<u32>] = &[
    0x200..=0x20f, // variable MTRRs
    0x250..=0x250, // fixed MTRRs
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,             // PAT
    0x2ff..=0x2ff,             // MTRR default type
    0x6e0..=0x6e0,             // TSC deadline
    0xc000_0103..=0xc000_0103, // TSC_AUX
];

/// In KVM's list and left alone: performance counters, AMX's XFD, LBR and PT, which are not offered;
/// VMX capabilities, which follow from CPUID; Hyper-V's, which are not enabled; KVM's write-only
/// acknowledgement of asynchronous page faults.
const NOT_OURS: &[std::ops::RangeInclusive<u32>] = &[
    0xc1..=0xc8,
    0x186..=0x18d,
    0x1c4..=0x1c5,
    0x1c8..=0x1c8,
    0x309..=0x30c,
    0x38d..=0x390,
    0x3f1..=0x3f2,
    0x480..=0x493,
    0x4c1..=0x4c8,
    0x560..=0x587,
    0x14ce..=0x14cf,
    0x4000_0000..=0x4000_01ff,
    0x4b56_4d07..=0x4b56_4d07,
    0xc000_0300..=0xc000_0303,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
];

fn within(ranges: &[std::ops::RangeInclusive<u32>], index: u32) -> bool {
    ranges.iter().any(|range| range.contains(&index))
}

/// The registers that are worth asking for on this host.
pub(super) fn candidates(kvm: &Kvm) -> Result<Vec<u32>> {
    let listed =
        kvm.fd().get_msr_index_list().map_err(refused("listing model-specific registers"))?;
    Ok(select(listed.as_slice()))
}

fn select(listed: &[u32]) -> Vec<u32> {
    let beside = BESIDE_THE_LIST.iter().cloned().flatten();
    let all: BTreeSet<u32> = listed.iter().copied().chain(beside).collect();
    all.into_iter().filter(|index| !within(NOT_OURS, *index)).collect()
}

/// The ones among `wanted` that this vCPU has, with their values. KVM stops at the first one that it
/// does not have; that one is left out.
pub(super) fn get(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let mut msrs = entries(chunk.iter().map(|index| (*index, 0)))?;
        let done = vcpu.get_msrs(&mut msrs).map_err(refused("reading model-specific registers"))?;
        let done = done.min(chunk.len());
        values.extend(msrs.as_slice()[..done].iter().map(|msr| (msr.index, msr.data)));
        let skip = usize::from(done < chunk.len());
        rest = &rest[done + skip..];
    }
    Ok(values)
}

/// Sets what the host takes; gives back what it refused.
pub(super) fn set(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<Vec<(u32, u64)>> {
    let mut refused_ones = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let msrs = entries(chunk.iter().copied())?;
        let done = vcpu.set_msrs(&msrs).map_err(refused("setting model-specific registers"))?;
        let done = done.min(chunk.len());
        let skip = usize::from(done < chunk.len());
        refused_ones.extend_from_slice(&chunk[done..done + skip]);
        rest = &rest[done + skip..];
    }
    Ok(refused_ones)
}

/// Sets `values` in an order that works: the deadline after the clock that it is measured by. A
/// refused one that already has its value does no harm; another one is told to the log, as the guest
/// may do without it (and the host whose state this was may be another model).
pub(super) fn restore(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<()> {
    let (late, early): (Vec<_>, Vec<_>) =
        values.iter().copied().partition(|(index, _)| *index == IA32_TSC_DEADLINE);
    for part in [early, late] {
        for (index, value) in set(vcpu, &part)? {
            let now = get(vcpu, &[index])?.first().map(|(_, now)| *now);
            if now != Some(value) {
                tracing::warn!(
                    "the host refuses {value:#x} for model-specific register {index:#x} (it is {now:x?})"
                );
            }
        }
    }
    Ok(())
}

fn entries(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs> {
    let list: Vec<_> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&list)
        .map_err(|e| refused("a list of model-specific registers")(std::io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_selection_has_what_a_machine_needs_and_nothing_twice() {
        let chosen = select(&[0x10, 0x277, 0xc1, 0x480, 0x4b56_4d01, 0x4b56_4d07]);
        for index in [0x10, 0x277, 0x2ff, 0x6e0, 0x4b56_4d01] {
            assert_eq!(chosen.iter().filter(|i| **i == index).count(), 1, "{index:#x}");
        }
        for index in [0xc1, 0x480, 0x4b56_4d07] {
            assert!(!chosen.contains(&index), "{index:#x}");
        }
    }
}
