//! Starting a machine as a PC starts: with BIOS (SeaBIOS) or UEFI (OVMF) firmware, as distributions package them.
//!
//! ```text
//!   E_0000..10_0000     BIOS: the ROM's last 128 KiB, copied into RAM as a chipset shadows it
//!   FFC0_0000..         UEFI: the variables, flash memory in a file of the machine's own
//!   ..1_0000_0000       the ROM; the boot processor starts 16 bytes below 4 GiB
//!
//!   fw_cfg              what the firmware is told: memory, CPUs, ACPI, SMBIOS, boot order
//! ```

mod files;
mod variables;

use std::path::Path;
use std::sync::Arc;

use lodge_accel::Vm;
use lodge_devices::acpi::AcpiTables;
use lodge_devices::bus::SystemBus;
use lodge_devices::device_ram::{Access, DeviceRam, slots};
use lodge_devices::fw_cfg::{FW_CFG_LEN, FW_CFG_PORT, FwCfg, Items, add_acpi, key};
use lodge_devices::smbios::{self, SmbiosSetup};
use lodge_memory::{GuestMemory, RamLayout};
use lodge_model::spec::{FirmwareKind, MachineSpec};
use vm_memory::{Bytes, GuestAddress};

pub use files::{Error, display_rom};
use variables::Variables;

/// The ROM ends here.
const ROM_END: u64 = 1 << 32;
/// What of a BIOS is seen below 1 MiB.
const SHADOW_BYTES: usize = 128 << 10;
const SHADOW_END: u64 = 1 << 20;
/// E820's types (ACPI 6.5, table 15.3).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// The file that lists what to boot from, a device path a line.
const BOOT_ORDER: &str = "bootorder";
/// The screen goes to this port too: SeaBIOS, where there is no display.
const SERIAL_CONSOLE: &str = "etc/sercon-port";
const COM1: u16 = 0x3f8;
/// For how many milliseconds the boot menu is offered.
const MENU_WAIT: &str = "etc/boot-menu-wait";
const MENU_MILLISECONDS: u16 = 3000;

/// What firmware is told of.
pub struct Platform<'a> {
    /// The machine's name, CPUs and boot options.
    pub spec: &'a MachineSpec,
    /// Where RAM is.
    pub ram: &'a RamLayout,
    /// Guest-physical ranges that are not RAM, though nothing else says so.
    pub reserved: &'a [std::ops::Range<u64>],
    /// The ACPI tables.
    pub acpi: &'a AcpiTables,
    /// The SMBIOS tables.
    pub smbios: &'a SmbiosSetup,
    /// There is no display: show the firmware's screen on the serial port.
    pub serial_screen: bool,
}

/// The firmware of a machine.
pub struct Firmware {
    rom: Arc<DeviceRam>,
    /// BIOS: what is copied below 1 MiB at each start.
    shadow: Option<Vec<u8>>,
    variables: Option<Variables>,
    fw_cfg: Arc<FwCfg>,
}

impl Firmware {
    /// Reads firmware of `kind` and puts it, its variables and fw_cfg on `bus`.
    ///
    /// # Errors
    /// A package is missing, or the variables' file cannot be used; each names the file and the way out.
    pub fn new(
        kind: FirmwareKind,
        platform: &Platform<'_>,
        bus: &SystemBus,
        vm: &Arc<dyn Vm>,
        memory: &Arc<GuestMemory>,
    ) -> Result<Self, Error> {
        let found = files::find(kind)?;
        let image = files::read_rom(found.code)?;
        let start = ROM_END - image.len() as u64;
        let rom =
            DeviceRam::new(vm.clone(), slots::FIRMWARE, image.len() as u64, Access::ReadOnly)?;
        rom.write_at(0, &image);
        bus.mmio.insert(start, image.len() as u64, rom.clone())?;
        let variables = match found.variables {
            Some(template) => {
                let path = platform.spec.variables_path();
                Some(Variables::open(&path, Path::new(template), start, bus, vm)?)
            }
            None => None,
        };
        let shadow = (kind == FirmwareKind::Bios)
            .then(|| image[image.len() - SHADOW_BYTES.min(image.len())..].to_vec());
        let fw_cfg = FwCfg::new(memory.clone(), items(platform));
        bus.pio.insert(FW_CFG_PORT.into(), FW_CFG_LEN, fw_cfg.clone())?;
        Ok(Self { rom, shadow, variables, fw_cfg })
    }

    /// Says what to boot from, best first: Open Firmware device paths.
    pub fn set_boot_order(&self, paths: &[String]) {
        // The list ends with a zero byte.
        let mut text = paths.join("\n").into_bytes();
        text.push(0);
        self.fw_cfg.replace_file(BOOT_ORDER, text);
    }

    /// Makes it ready for a start: power-up or reset.
    ///
    /// # Errors
    /// Less than 1 MiB of guest memory.
    pub fn power_up(&self, memory: &GuestMemory) -> Result<(), Error> {
        if let Some(shadow) = &self.shadow {
            let at = SHADOW_END - shadow.len() as u64;
            memory.write_slice(shadow, GuestAddress(at)).map_err(Error::Memory)?;
        }
        self.fw_cfg.reset();
        if let Some(variables) = &self.variables {
            variables.reset();
        }
        tracing::debug!(bytes = self.rom.bytes(), "firmware is ready");
        Ok(())
    }

    /// Makes the variables durable. The machine is over or stands still.
    pub fn flush(&self) {
        if let Some(variables) = &self.variables {
            variables.flush();
        }
    }
}

fn items(platform: &Platform<'_>) -> Items {
    let mut items = Items::new();
    let cpus = u16::try_from(platform.spec.cpus).unwrap_or(u16::MAX);
    items.set_u16(key::CPUS, cpus);
    items.set_u16(key::MAX_CPUS, cpus);
    let ram: u64 = platform.ram.spans().iter().map(|(_, bytes)| bytes).sum();
    items.set_bytes(key::RAM, ram.to_le_bytes().to_vec());
    items.set_bytes(key::UUID, platform.smbios.uuid.to_vec());
    items.set_u16(key::BOOT_MENU, platform.spec.boot.menu.into());
    // S3 and S4 are off, and what S5 is called; in the order S0..S5.
    items.add_file("etc/system-states", vec![0x80, 0, 0, 1, 2, 0x80]);
    items.add_file("etc/e820", e820(platform));
    let structures = smbios::structures(platform.smbios);
    items.add_file("etc/smbios/smbios-anchor", smbios::entry_point(0, structures.len()).to_vec());
    items.add_file("etc/smbios/smbios-tables", structures);
    add_acpi(&mut items, platform.acpi);
    if platform.spec.boot.menu {
        items.add_file(MENU_WAIT, MENU_MILLISECONDS.to_le_bytes().to_vec());
    }
    if platform.serial_screen {
        items.add_file(SERIAL_CONSOLE, COM1.to_le_bytes().to_vec());
    }
    items
}

/// RAM as firmware counts it, and what must not be used: firmware makes the guest's map of it.
fn e820(platform: &Platform<'_>) -> Vec<u8> {
    let ram = platform.ram.spans().into_iter().map(|(start, bytes)| (start, bytes, E820_RAM));
    let reserved = platform.reserved.iter().map(|r| (r.start, r.end - r.start, E820_RESERVED));
    let entry = |(start, bytes, kind): (u64, u64, u32)| {
        [&start.to_le_bytes()[..], &bytes.to_le_bytes(), &kind.to_le_bytes()].concat()
    };
    ram.chain(reserved).flat_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e820_has_twenty_bytes_an_entry() {
        let layout = RamLayout::pc(3 << 30).unwrap();
        let spec = MachineSpec::default();
        let windows = lodge_devices::pci::Windows::new(1 << 30, 40);
        let acpi = AcpiTables::new(&lodge_devices::acpi::AcpiSetup {
            vcpus: 1,
            windows,
            ecam_base: 0xb000_0000,
            intx_gsi: |_, _| 16,
            serial: Vec::new(),
            vga: false,
        });
        let smbios = SmbiosSetup {
            uuid: [0; 16],
            serial: String::new(),
            version: String::new(),
            vcpus: 1,
            ram: layout.clone(),
        };
        let reserved = std::slice::from_ref(&(0xfeff_c000..0xff00_0000));
        let bytes = e820(&Platform {
            spec: &spec,
            ram: &layout,
            reserved,
            acpi: &acpi,
            smbios: &smbios,
            serial_screen: false,
        });
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[20..28], (4u64 << 30).to_le_bytes());
        assert_eq!(bytes[36..40], 1u32.to_le_bytes());
        assert_eq!(bytes[48..60], [&0x4000u64.to_le_bytes()[..], &[2, 0, 0, 0]].concat());
    }
}
