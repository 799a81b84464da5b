//! The devices of a machine: the buses, PCI, virtio, the PC's legacy parts, ACPI.

pub mod bus;
