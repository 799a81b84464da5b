//! A virtual machine of the host's KVM.

use std::sync::{Arc, Mutex};

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X2APIC_API,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_cpuid_entry2,
    kvm_enable_cap, kvm_msi, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use lodge_memory::{Bus, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use super::cpuid::{self, Machine};
use super::gate::{Gate, lock};
use super::routes::{PINS, Routes};
use super::slots::Slots;
use super::vcpu::KvmVcpu;
use super::{Kvm, chips, finish, msrs, refused, state};
use crate::error::{Error, Result};
use crate::state::ChipState;
use crate::vm::{Capabilities, IoEvent, MemorySlot, Msi, Trigger, Vcpu, VcpuSetup, Vm, VmSetup};

/// Guest-physical pages that KVM keeps for itself: the identity map, then the TSS, as VT-x needs
/// them for real mode on old CPUs. They lie below 16 MiB of firmware and above the LAPIC. The guest's
/// memory map (E820, UEFI) must not offer them.
pub const RESERVED_GPA: u64 = 0xfeff_c000;
/// Bytes at [`RESERVED_GPA`].
pub const RESERVED_BYTES: u64 = 0x4000;
const TSS_GPA: u64 = RESERVED_GPA + 0x1000;

/// Choices that only this backend has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Show the guest VT-x or AMD-V if the host's KVM can nest.
    pub nested: bool,
}

/// What the VM and its vCPUs share.
pub(super) struct Shared {
    pub fd: VmFd,
    pub memory: Arc<GuestMemory>,
    pub bus: Arc<dyn Bus>,
    pub gate: Gate,
    pub layout: state::Layout,
    pub supported_cpuid: Vec<kvm_cpuid_entry2>,
    pub slots: Mutex<Slots>,
    /// Instructions that KVM lacks are finished on this; made when the first one comes.
    pub machine: Mutex<Option<finish::Machine>>,
    pub vcpus: u32,
    tsc_deadline: bool,
    nested: bool,
    hypercalls: bool,
}

impl Shared {
    /// What CPUID is computed from, for vCPU `index`.
    pub(super) fn cpu_facts(&self, index: u32, tsc_khz: Option<u32>) -> Machine {
        Machine {
            index,
            vcpus: self.vcpus,
            tsc_khz,
            tsc_deadline: self.tsc_deadline,
            nested: self.nested,
            hypercalls: self.hypercalls,
            host: cpuid::host_leaves(),
        }
    }
}

/// A virtual machine of the host's KVM.
pub struct KvmVm {
    shared: Arc<Shared>,
    routes: Mutex<Routes>,
    created: Mutex<Vec<u32>>,
    capabilities: Capabilities,
}

impl Kvm {
    /// Makes a VM with the interrupt controllers of a PC and the memory of `setup`.
    pub fn new_vm(&self, setup: VmSetup, options: Options) -> Result<Arc<KvmVm>> {
        let max_vcpus = self.max_vcpus();
        if setup.vcpus == 0 || setup.vcpus > max_vcpus {
            return Err(Error::Invalid(format!(
                "{} vCPUs: this host's KVM gives a machine 1 to {max_vcpus}",
                setup.vcpus
            )));
        }
        let fd = self.create_vm()?;
        enable_capabilities(&fd);
        fd.set_identity_map_address(RESERVED_GPA).map_err(refused("placing the identity map"))?;
        fd.set_tss_address(TSS_GPA as usize).map_err(refused("placing the TSS"))?;
        fd.create_irq_chip().map_err(refused("creating the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(refused("creating the PIT"))?;
        let supported = self
            .fd()
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("asking for the CPUID that KVM supports"))?;
        let routes = fd.check_extension_int(Cap::IrqRouting).max(0) as usize;
        let slots = Slots::new(setup.memory.clone(), (RESERVED_GPA, RESERVED_GPA + RESERVED_BYTES));
        let shared = Arc::new(Shared {
            layout: layout(&fd, msrs::candidates(self)?),
            supported_cpuid: CpuId::as_slice(&supported).to_vec(),
            slots: Mutex::new(slots),
            gate: Gate::default(),
            machine: Mutex::default(),
            memory: setup.memory,
            bus: setup.bus,
            vcpus: setup.vcpus,
            tsc_deadline: fd.check_extension(Cap::TscDeadlineTimer),
            nested: options.nested,
            hypercalls: self.hypercalls(),
            fd,
        });
        lock(&shared.slots).apply(&shared.fd, &shared.gate)?;
        Ok(Arc::new(KvmVm {
            routes: Mutex::new(Routes::new(&shared.fd, routes)?),
            shared,
            created: Mutex::default(),
            capabilities: Capabilities {
                name: "kvm",
                ioeventfd: self.ioeventfd(),
                max_vcpus,
                physical_bits: physical_bits(CpuId::as_slice(&supported)),
            },
        }))
    }
}

/// The width of guest-physical addresses that can be used: leaf 8000_0008H, which guests are given as the
/// host's KVM has it. Bits 23:16 say so where the host's page tables reach less far than its addresses.
fn physical_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    let leaf = supported.iter().find(|entry| entry.function == 0x8000_0008);
    // Without the leaf it is 36 bits (SDM volume 3, 4.1.4).
    let Some(leaf) = leaf else { return 36 };
    match (leaf.eax as u8, (leaf.eax >> 16) as u8) {
        (all, 0) => all,
        (all, mapped) => all.min(mapped),
    }
}

/// Switches on what is better on, where the kernel has it.
fn enable_capabilities(fd: &VmFd) {
    let wishes = [
        // All 32 bits of an x2APIC id, in messages and in the LAPIC's saved page.
        (
            KVM_CAP_X2APIC_API,
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK),
        ),
        // An emulation failure at any privilege level comes to us instead of a #UD to the guest.
        (KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1),
        // No performance counters, as CPUID says.
        (KVM_CAP_PMU_CAPABILITY, u64::from(KVM_PMU_CAP_DISABLE)),
    ];
    for (cap, argument) in wishes {
        if fd.check_extension_raw(cap.into()) <= 0 {
            continue;
        }
        let wish = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
        if let Err(error) = fd.enable_cap(&wish) {
            tracing::debug!("KVM offers capability {cap} and refuses it: {error}");
        }
    }
}

fn layout(fd: &VmFd, msrs: Vec<u32>) -> state::Layout {
    let xsave2 = fd.check_extension_int(Cap::Xsave2).max(0) as usize;
    state::Layout {
        xsave_bytes: xsave2.max(4096),
        xsave2: xsave2 != 0,
        xcrs: fd.check_extension(Cap::Xcrs),
        msrs,
    }
}

impl KvmVm {
    fn io_event(at: IoEvent) -> IoEventAddress {
        match at {
            IoEvent::Pio(port) => IoEventAddress::Pio(port.into()),
            IoEvent::Mmio(gpa) => IoEventAddress::Mmio(gpa),
        }
    }

    fn needs_ioeventfd(&self) -> Result<()> {
        if self.capabilities.ioeventfd {
            return Ok(());
        }
        Err(Error::Invalid("this host's KVM cannot signal eventfds on guest writes".into()))
    }
}

impl Vm for KvmVm {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>> {
        let VcpuSetup::Reset = setup;
        let mut created = lock(&self.created);
        if index >= self.shared.vcpus || created.contains(&index) {
            return Err(Error::Invalid(format!(
                "vCPU {index} of {}: each one is made once",
                self.shared.vcpus
            )));
        }
        let vcpu = KvmVcpu::new(self.shared.clone(), index)?;
        created.push(index);
        Ok(Box::new(vcpu))
    }

    fn set_irq(&self, gsi: u32, level: bool) -> Result<()> {
        if gsi >= PINS {
            return Err(Error::Invalid(format!("IRQ line {gsi}: the lines are 0 to 23")));
        }
        self.shared.fd.set_irq_line(gsi, level).map_err(refused(format!("setting IRQ line {gsi}")))
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        match self.shared.fd.signal_msi(message) {
            Ok(_) => Ok(()),
            // No LAPIC is addressed (-1), or the address cannot be one (EINVAL): as on the bus of a
            // PC, nobody takes the message.
            Err(e) if matches!(e.errno(), libc::EPERM | libc::EINVAL) => {
                tracing::debug!("nobody takes {msi:x?}");
                Ok(())
            }
            Err(e) => Err(refused("sending a message-signalled interrupt")(e)),
        }
    }

    /// The same descriptor number must be given to [`Vm::remove_irqfd`].
    fn add_irqfd(&self, fd: &EventFd, trigger: Trigger) -> Result<()> {
        lock(&self.routes).add(&self.shared.fd, fd, trigger)
    }

    fn remove_irqfd(&self, fd: &EventFd, trigger: Trigger) -> Result<()> {
        lock(&self.routes).remove(&self.shared.fd, fd, trigger)
    }

    fn add_ioeventfd(&self, fd: &EventFd, at: IoEvent) -> Result<()> {
        self.needs_ioeventfd()?;
        self.shared
            .fd
            .register_ioevent(fd, &Self::io_event(at), NoDatamatch)
            .map_err(refused(format!("adding an ioeventfd at {at:x?}")))
    }

    fn remove_ioeventfd(&self, fd: &EventFd, at: IoEvent) -> Result<()> {
        self.needs_ioeventfd()?;
        self.shared
            .fd
            .unregister_ioevent(fd, &Self::io_event(at), NoDatamatch)
            .map_err(refused(format!("removing the ioeventfd at {at:x?}")))
    }

    unsafe fn set_memory(&self, slot: u32, memory: Option<MemorySlot>) -> Result<()> {
        let shared = &self.shared;
        let mut slots = lock(&shared.slots);
        // SAFETY: the caller's promise is passed on.
        let result = unsafe { slots.set(&shared.fd, &shared.gate, slot, memory) };
        finish::show_slots(shared, &slots);
        result
    }

    fn take_slot_dirty(&self, slot: u32) -> Result<Vec<u64>> {
        lock(&self.shared.slots).take_slot_dirty(&self.shared.fd, slot)
    }

    fn set_dirty_log(&self, on: bool) -> Result<()> {
        lock(&self.shared.slots).set_logging(&self.shared.fd, on)
    }

    fn take_dirty(&self) -> Result<Vec<Vec<u64>>> {
        lock(&self.shared.slots).take_dirty(&self.shared.fd)
    }

    fn chip_state(&self) -> Result<ChipState> {
        chips::save(&self.shared.fd)
    }

    fn set_chip_state(&self, state: &ChipState) -> Result<()> {
        chips::restore(&self.shared.fd, state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_as_wide_as_page_tables_reach() {
        let bits = |eax| {
            physical_bits(&[kvm_cpuid_entry2 { function: 0x8000_0008, eax, ..Default::default() }])
        };
        assert_eq!(bits(0x3030), 48);
        assert_eq!(bits(0x30_3934), 48);
        assert_eq!(bits(0x34_392e), 46);
        assert_eq!(physical_bits(&[]), 36);
    }
}
