//! Where interrupts go: lines to the PIC pair and the IOAPIC, messages of eventfds by routes of their own.
//!
//! ```text
//!   GSI  0       PIC IRQ 0 and IOAPIC pin 2   fixed: the PIT; the MADT overrides IRQ 0 so
//!   GSI  1       PIC and IOAPIC pin           fixed
//!   GSI  2       nothing: the PIC's cascade   fixed
//!   GSI  3..16   PIC pair and IOAPIC pin      fixed
//!   GSI 16..24   IOAPIC pin                   fixed
//!   GSI 24..     a message each               made by add, freed by remove
//! ```
//!
//! The kernel takes the table as a whole, so it is written again for each change. Its own first table
//! has the PIT at pin 0, so ours is written before a vCPU runs.

use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::refused;
use crate::error::{Error, Result};
use crate::vm::{Msi, Trigger};

/// Pins of the IOAPIC.
pub(super) const PINS: u32 = 24;

/// The pin that the PIT's IRQ 0 is wired to.
const PIT_PIN: u32 = 2;

struct Binding {
    fd: RawFd,
    trigger: Trigger,
    gsi: u32,
}

/// Who raises what.
pub(super) struct Routes {
    bindings: Vec<Binding>,
    /// The largest table that the kernel takes, in entries.
    limit: usize,
}

impl Routes {
    /// Installs what a PC always has.
    pub(super) fn new(vm: &VmFd, limit: usize) -> Result<Self> {
        let routes = Self { bindings: Vec::new(), limit };
        routes.write(vm)?;
        Ok(routes)
    }

    pub(super) fn add(&mut self, vm: &VmFd, fd: &EventFd, trigger: Trigger) -> Result<()> {
        if self.find(fd, trigger).is_some() {
            return Err(Error::Invalid(format!("this eventfd raises {trigger:?} already")));
        }
        let gsi = match trigger {
            Trigger::Gsi(pin) if pin < PINS => pin,
            Trigger::Gsi(pin) => {
                return Err(Error::Invalid(format!("IRQ line {pin}: the lines are 0 to 23")));
            }
            Trigger::Msi(_) => self.free_gsi(),
        };
        self.bindings.push(Binding { fd: fd.as_raw_fd(), trigger, gsi });
        let result = self
            .write(vm)
            .and_then(|()| vm.register_irqfd(fd, gsi).map_err(refused("adding an irqfd")));
        if result.is_err() {
            self.bindings.pop();
        }
        result
    }

    pub(super) fn remove(&mut self, vm: &VmFd, fd: &EventFd, trigger: Trigger) -> Result<()> {
        let at = self
            .find(fd, trigger)
            .ok_or_else(|| Error::Invalid(format!("this eventfd does not raise {trigger:?}")))?;
        vm.unregister_irqfd(fd, self.bindings[at].gsi).map_err(refused("removing an irqfd"))?;
        self.bindings.swap_remove(at);
        self.write(vm)
    }

    fn find(&self, fd: &EventFd, trigger: Trigger) -> Option<usize> {
        let fd = fd.as_raw_fd();
        self.bindings.iter().position(|b| b.fd == fd && b.trigger == trigger)
    }

    fn free_gsi(&self) -> u32 {
        (PINS..)
            .find(|gsi| self.bindings.iter().all(|b| b.gsi != *gsi))
            .expect("fewer bindings than numbers")
    }

    fn write(&self, vm: &VmFd) -> Result<()> {
        let entries = table(self.bindings.iter().filter_map(|b| match b.trigger {
            Trigger::Msi(msi) => Some((b.gsi, msi)),
            Trigger::Gsi(_) => None,
        }));
        if entries.len() > self.limit {
            return Err(Error::Invalid(format!(
                "{} interrupt routes are more than this kernel takes ({})",
                entries.len(),
                self.limit
            )));
        }
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Invalid(format!("{} interrupt routes", entries.len())))?;
        vm.set_gsi_routing(&table).map_err(refused("routing interrupts"))
    }
}

/// The whole table: what a PC always has, then messages.
fn table(messages: impl Iterator<Item = (u32, Msi)>) -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi: u32, irqchip: u32, pin: u32| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    // Nothing raises IRQ 2, which is the slave's place at the master.
    let master = (0..8).filter(|i| *i != 2).map(|i| pin(i, KVM_IRQCHIP_PIC_MASTER, i));
    let slave = (8..16).map(|i| pin(i, KVM_IRQCHIP_PIC_SLAVE, i - 8));
    let ioapic = (0..PINS)
        .filter(|i| *i != PIT_PIN)
        .map(|i| pin(i, KVM_IRQCHIP_IOAPIC, if i == 0 { PIT_PIN } else { i }));
    let messages = messages.map(|(gsi, msi)| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: msi.address as u32,
                address_hi: (msi.address >> 32) as u32,
                data: msi.data,
                ..Default::default()
            },
        },
        ..Default::default()
    });
    master.chain(slave).chain(ioapic).chain(messages).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_pc_and_the_messages() {
        let msi = Msi { address: 0x1_fee0_1000, data: 0x4041 };
        let table = table([(24, msi)].into_iter());
        assert_eq!(table.len(), 15 + 23 + 1);
        let last = table[38];
        assert_eq!((last.gsi, last.type_), (24, KVM_IRQ_ROUTING_MSI));
        // SAFETY: a message's entry, by its type.
        let msi = unsafe { last.u.msi };
        assert_eq!((msi.address_lo, msi.address_hi, msi.data), (0xfee0_1000, 1, 0x4041));
    }

    #[test]
    fn lines_go_where_the_madt_says() {
        let table = table([].into_iter());
        let of = |gsi: u32| -> Vec<(u32, u32)> {
            let entries = table.iter().filter(|entry| entry.gsi == gsi);
            // SAFETY: all are chips' pins: there is no message in the table.
            let pins = entries.map(|entry| unsafe { entry.u.irqchip });
            pins.map(|pin| (pin.irqchip, pin.pin)).collect()
        };
        assert_eq!(of(0), [(KVM_IRQCHIP_PIC_MASTER, 0), (KVM_IRQCHIP_IOAPIC, 2)]);
        assert_eq!(of(2), [], "pin 2 is the PIT's alone");
        assert_eq!(of(4), [(KVM_IRQCHIP_PIC_MASTER, 4), (KVM_IRQCHIP_IOAPIC, 4)]);
        assert_eq!(of(9), [(KVM_IRQCHIP_PIC_SLAVE, 1), (KVM_IRQCHIP_IOAPIC, 9)]);
        assert_eq!(of(23), [(KVM_IRQCHIP_IOAPIC, 23)]);
    }
}
