//! A virtual machine of the software CPU.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use lodge_memory::page_table;
use lodge_softcpu::Shared;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::ioevents::IoEventBus;
use super::irqfd::IrqFds;
use super::slots::Slots;
use super::vcpu::SoftVcpu;
use super::{chips, lock};
use crate::error::{Error, Result};
use crate::state::ChipState;
use crate::vm::{Capabilities, IoEvent, MemorySlot, Msi, Trigger, Vcpu, VcpuSetup, Vm, VmSetup};

/// The most vCPUs of a machine: APIC ids of 8 bits, FFH being all.
pub const MAX_VCPUS: u32 = 255;
/// Pins of the IOAPIC.
const PINS: u32 = 24;

/// A virtual machine of the software CPU.
pub struct SoftVm {
    shared: Arc<Shared>,
    bus: Arc<IoEventBus>,
    slots: Mutex<Slots>,
    /// Written pages are asked for.
    logging: AtomicBool,
    irqfds: Mutex<Option<IrqFds>>,
    created: Mutex<Vec<u32>>,
    /// The TSC offset that vCPUs restored together have in common.
    tsc: Arc<Mutex<Option<u64>>>,
}

impl SoftVm {
    /// Makes a VM with the interrupt controllers of a PC and the memory of `setup`.
    ///
    /// # Errors
    /// A number of vCPUs that it cannot have.
    pub fn new(setup: VmSetup) -> Result<Arc<Self>> {
        if setup.vcpus == 0 || setup.vcpus > MAX_VCPUS {
            return Err(Error::Invalid(format!(
                "{} vCPUs: the software CPU gives a machine 1 to {MAX_VCPUS}",
                setup.vcpus
            )));
        }
        let bus = Arc::new(IoEventBus::new(setup.bus));
        Ok(Arc::new(Self {
            shared: Shared::new(setup.memory, bus.clone(), setup.vcpus),
            bus,
            slots: Mutex::default(),
            logging: AtomicBool::new(false),
            irqfds: Mutex::default(),
            created: Mutex::default(),
            tsc: Arc::default(),
        }))
    }
}

fn pin(gsi: u32) -> Result<()> {
    if gsi < PINS {
        return Ok(());
    }
    Err(Error::Invalid(format!("IRQ line {gsi}: the lines are 0 to 23")))
}

impl Vm for SoftVm {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "soft",
            ioeventfd: true,
            max_vcpus: MAX_VCPUS,
            physical_bits: lodge_softcpu::walk::PHYSICAL_BITS as u8,
        }
    }

    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>> {
        let VcpuSetup::Reset = setup;
        let mut created = lock(&self.created);
        let vcpus = self.shared.ports().len() as u32;
        if index >= vcpus || created.contains(&index) {
            return Err(Error::Invalid(format!("vCPU {index} of {vcpus}: each one is made once")));
        }
        created.push(index);
        Ok(Box::new(SoftVcpu::new(self.shared.clone(), index, self.tsc.clone())))
    }

    fn set_irq(&self, gsi: u32, level: bool) -> Result<()> {
        pin(gsi)?;
        self.shared.set_irq(gsi, level);
        Ok(())
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        super::irqfd::raise(&self.shared, Trigger::Msi(msi));
        Ok(())
    }

    /// The same descriptor number must be given to [`Vm::remove_irqfd`].
    fn add_irqfd(&self, fd: &EventFd, trigger: Trigger) -> Result<()> {
        if let Trigger::Gsi(gsi) = trigger {
            pin(gsi)?;
        }
        let mut irqfds = lock(&self.irqfds);
        if let Some(irqfds) = &mut *irqfds {
            return irqfds.add(fd, trigger);
        }
        irqfds.insert(IrqFds::start(self.shared.clone())?).add(fd, trigger)
    }

    fn remove_irqfd(&self, fd: &EventFd, trigger: Trigger) -> Result<()> {
        match &mut *lock(&self.irqfds) {
            Some(irqfds) => irqfds.remove(fd, trigger),
            None => Err(Error::Invalid(format!("this eventfd does not raise {trigger:?}"))),
        }
    }

    fn add_ioeventfd(&self, fd: &EventFd, at: IoEvent) -> Result<()> {
        self.bus.add(fd, at)
    }

    fn remove_ioeventfd(&self, fd: &EventFd, at: IoEvent) -> Result<()> {
        self.bus.remove(fd, at)
    }

    unsafe fn set_memory(&self, slot: u32, memory: Option<MemorySlot>) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { lock(&self.slots).set(&self.shared, slot, memory) }
    }

    fn take_slot_dirty(&self, slot: u32) -> Result<Vec<u64>> {
        let dirty = lock(&self.slots).take_dirty(slot);
        // A vCPU writes unseen only to pages that are marked.
        if dirty.iter().any(|&word| word != 0) {
            self.shared.revoke_writes();
        }
        Ok(dirty)
    }

    /// Pages are always marked; this begins a new record.
    fn set_dirty_log(&self, on: bool) -> Result<()> {
        if !self.logging.swap(on, Ordering::SeqCst) && on {
            self.take_dirty()?;
        }
        Ok(())
    }

    fn take_dirty(&self) -> Result<Vec<Vec<u64>>> {
        let memory = &self.shared.memory;
        if !self.logging.load(Ordering::SeqCst) {
            let words = |pages: usize| vec![0; pages.div_ceil(64)];
            return Ok(memory.iter().map(|region| words(page_table(region).len())).collect());
        }
        let dirty = memory.iter().map(|region| page_table(region).take_dirty()).collect();
        // What vCPUs still write unseen until this returns is in pages that are in `dirty`, which the
        // caller reads afterwards.
        self.shared.revoke_writes();
        Ok(dirty)
    }

    fn chip_state(&self) -> Result<ChipState> {
        Ok(chips::from_soft(&self.shared.chip_state()))
    }

    fn set_chip_state(&self, state: &ChipState) -> Result<()> {
        self.shared.set_chip_state(&chips::to_soft(state)?);
        Ok(())
    }
}
