//! DSDT: the machine in AML.
//!
//! ```text
//!   \_SB  C000, C001, ..    ACPI0007, a vCPU each
//!         MRES              PNP0C02, ECAM's addresses
//!         PCI0              PNP0A08, the root bus: _CRS windows, _PRT interrupts, _OSC
//!           ISA             00:1f.0
//!             COM1, ..      PNP0501
//!             RTC           PNP0B00
//!             KBD, MOU      PNP0303, PNP0F13
//!   \_S5                    soft off
//! ```

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder,
    Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiSetup, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::input::ps2::{I8042_DATA_PORT, I8042_STATUS_PORT, KEYBOARD_IRQ, MOUSE_IRQ};
use crate::legacy::{RTC_IRQ, RTC_PORTS, RTC_PORTS_LEN, S5_SLEEP_TYPE, SERIAL_LEN, SerialPort};
use crate::pci::ICH9_LPC;

/// Revision 2 or more makes AML's integers 64 bits wide.
const DSDT_REVISION: u8 = 2;
const ECAM_BYTES: u32 = 256 << 20;
/// PCI's configuration ports.
const PCI_CONFIG: u16 = 0xcf8;
const PCI_CONFIG_LEN: u8 = 8;
const VGA_MEMORY: (u32, u32) = (0xa_0000, 0xb_ffff);
const SLOTS: u8 = 32;
const PINS: u8 = 4;

/// DSDT, its checksum not final.
pub(super) fn dsdt(setup: &AcpiSetup) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&system_bus(setup));
    let sleep_type = usize::from(S5_SLEEP_TYPE);
    let s5 = Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO]);
    table.append_slice(&bytes(&Name::new("\\_S5_".into(), &s5)));
    table.as_slice().to_vec()
}

fn system_bus(setup: &AcpiSetup) -> Vec<u8> {
    let mut children = Vec::new();
    for id in 0..setup.vcpus {
        children.extend(cpu(id));
    }
    if let Ok(ecam) = u32::try_from(setup.ecam_base) {
        let reserved = Memory32Fixed::new(true, ecam, ECAM_BYTES);
        children.extend(device("MRES", "PNP0C02", &ResourceTemplate::new(vec![&reserved]), 0));
    }
    children.extend(root_bus(setup));
    Scope::raw("\\_SB_".into(), children)
}

/// A device of nothing but an id, a unique number among those with the same id, and resources.
fn device(name: &str, id: &str, resources: &dyn Aml, uid: usize) -> Vec<u8> {
    bytes(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), resources),
        ],
    ))
}

fn cpu(id: u32) -> Vec<u8> {
    bytes(&Device::new(
        // Four characters for any id below 4096.
        format!("C{:03X}", id & 0xfff).as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &(id as usize))],
    ))
}

fn root_bus(setup: &AcpiSetup) -> Vec<u8> {
    let crs = resources(setup);
    let prt = interrupt_routing(setup.intx_gsi);
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(crs.iter().map(|r| &**r).collect())),
            &Name::new("_PRT".into(), &prt),
            &Osc,
            &Raw(isa_bridge(setup)),
        ],
    ))
}

/// The root bus's windows (ACPI 6.5, 6.4.3.5).
fn resources(setup: &AcpiSetup) -> Vec<Box<dyn Aml>> {
    use AddressSpaceCacheable::{Cacheable, NotCacheable};
    let after = PCI_CONFIG + u16::from(PCI_CONFIG_LEN);
    let mut list: Vec<Box<dyn Aml>> = vec![
        Box::new(AddressSpace::<u16>::new_bus_number(0, 255)),
        Box::new(IO::new(PCI_CONFIG, PCI_CONFIG, 1, PCI_CONFIG_LEN)),
        Box::new(AddressSpace::<u16>::new_io(0, PCI_CONFIG - 1, None)),
        Box::new(AddressSpace::<u16>::new_io(after, 0xffff, None)),
        Box::new(AddressSpace::<u32>::new_memory(
            Cacheable,
            true,
            VGA_MEMORY.0,
            VGA_MEMORY.1,
            None,
        )),
    ];
    let low = &setup.windows.mmio32;
    let last = low.end.saturating_sub(1);
    if let (false, Ok(start), Ok(last)) = (low.is_empty(), low.start.try_into(), last.try_into()) {
        list.push(Box::new(AddressSpace::<u32>::new_memory(NotCacheable, true, start, last, None)));
    }
    let high = &setup.windows.mmio64;
    if !high.is_empty() {
        let (start, last) = (high.start, high.end - 1);
        list.push(Box::new(AddressSpace::<u64>::new_memory(Cacheable, true, start, last, None)));
    }
    list
}

/// _PRT: each slot's pins, straight to the IOAPIC (ACPI 6.5, 6.2.13).
fn interrupt_routing(intx_gsi: fn(u8, u8) -> u32) -> PackageBuilder {
    let mut routing = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..PINS {
            // The address of any function of the slot; pins count from 0 here.
            let address = u32::from(slot) << 16 | 0xffff;
            let gsi = intx_gsi(slot, pin + 1);
            let entry: [&dyn Aml; 4] = [&address, &pin, &ZERO, &gsi];
            routing.add_element(&Package::new(entry.to_vec()));
        }
    }
    routing
}

fn isa_bridge(setup: &AcpiSetup) -> Vec<u8> {
    let address = u32::from(ICH9_LPC.device) << 16 | u32::from(ICH9_LPC.function);
    let mut children = bytes(&Name::new("_ADR".into(), &address));
    for (index, port) in (1..).zip(setup.serial.iter().take(9)) {
        children.extend(serial(index, port));
    }
    let resources = isa_resources(RTC_PORTS, RTC_PORTS_LEN as u8, RTC_IRQ);
    children.extend(device("RTC_", "PNP0B00", &Raw(resources), 0));
    let data = IO::new(I8042_DATA_PORT, I8042_DATA_PORT, 1, 1);
    let command = IO::new(I8042_STATUS_PORT, I8042_STATUS_PORT, 1, 1);
    let irq = Interrupt::new(true, true, false, false, KEYBOARD_IRQ);
    let keyboard = ResourceTemplate::new(vec![&data, &command, &irq]);
    children.extend(device("KBD_", "PNP0303", &keyboard, 0));
    // The mouse shares the keyboard's ports.
    let irq = Interrupt::new(true, true, false, false, MOUSE_IRQ);
    children.extend(device("MOU_", "PNP0F13", &ResourceTemplate::new(vec![&irq]), 0));
    bytes(&Device::new("ISA_".into(), vec![&Raw(children)]))
}

fn serial(index: usize, port: &SerialPort) -> Vec<u8> {
    let resources = isa_resources(port.base, SERIAL_LEN as u8, port.irq);
    device(&format!("COM{index}"), "PNP0501", &Raw(resources), index)
}

fn isa_resources(port: u16, len: u8, irq: u32) -> Vec<u8> {
    let ports = IO::new(port, port, 1, len);
    let interrupt = Interrupt::new(true, true, false, false, irq);
    bytes(&ResourceTemplate::new(vec![&ports, &interrupt]))
}

/// AML that is encoded already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// _OSC (PCI Firmware Specification 3.3, 4.5.1): the operating system gets native control of hot plug,
/// power management events, error reporting and the PCI Express capability.
struct Osc;

impl Osc {
    const UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
    /// Hot plug, PME, AER, PCI Express capability; not the SHPC, there is none.
    const GRANTED: u8 = 0x1d;
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;
}

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (uuid, revision, buffer, control) = (Arg(0), Arg(1), Arg(3), Local(0));
        let (status, wanted) = (Path::new("CDW1"), Path::new("CDW3"));
        let (first, third) = (0u8, 8u8);
        let (granted, one) = (Self::GRANTED, 1u8);
        let flag = |bit| Or::new(&status, &status, bit);
        let pci = Uuid::new(Self::UUID);
        let known = Equal::new(&uuid, &pci);
        Method::new(
            "_OSC".into(),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &buffer, &first),
                &If::new(
                    &known,
                    vec![
                        &CreateDWordField::new(&wanted, &buffer, &third),
                        &And::new(&control, &wanted, &granted),
                        &If::new(
                            &NotEqual::new(&revision, &one),
                            vec![&flag(&Self::UNKNOWN_REVISION)],
                        ),
                        &If::new(&NotEqual::new(&wanted, &control), vec![&flag(&Self::MASKED)]),
                        &Store::new(&wanted, &control),
                    ],
                ),
                &Else::new(vec![&flag(&Self::UNKNOWN_UUID)]),
                &Return::new(&buffer),
            ],
        )
        .to_aml_bytes(sink);
    }
}
