//! The devices of a machine: the buses, PCI, virtio, the PC's legacy parts, ACPI.

pub mod acpi;
pub mod ahci;
pub mod bus;
pub mod device_ram;
pub mod display;
pub mod dma;
pub mod flash;
pub mod fw_cfg;
pub mod input;
pub mod irq;
pub mod legacy;
pub mod pci;
pub mod smbios;
pub mod storage;
#[cfg(test)]
mod test_vm;
pub mod virtio;
