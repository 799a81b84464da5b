//! The devices of a machine: the buses, PCI, virtio, the PC's legacy parts, ACPI.

pub mod bus;
pub mod irq;
pub mod legacy;
pub mod pci;
#[cfg(test)]
mod test_vm;
