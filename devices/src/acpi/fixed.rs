//! The tables of fixed layout: FADT, MADT, MCFG.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;

use super::{AcpiSetup, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::legacy::{
    CF9_PORT, GPE0_BLOCK, GPE0_LEN, PM_TIMER_BLOCK, PM1_CONTROL_BLOCK, PM1_EVENT_BLOCK,
    ResetControl, SCI_GSI,
};

/// FADT's fields that hold addresses of tables: `(offset, bytes)` of FIRMWARE_CTRL, DSDT and X_DSDT
/// (ACPI 6.5, table 5.9). X_FIRMWARE_CTRL must be zero when FIRMWARE_CTRL is not.
pub(super) const FADT_POINTERS: [(usize, usize); 3] = [(36, 4), (40, 4), (140, 8)];

const PM1_EVENT_LEN: u8 = 4;
const PM1_CONTROL_LEN: u8 = 2;
const PM_TIMER_LEN: u8 = 4;
/// The CMOS register of the century.
const CENTURY: u8 = 0x32;
/// IAPC_BOOT_ARCH: there are ISA devices; there is an i8042; there is no VGA.
const BOOT_LEGACY_DEVICES: u16 = 1;
const BOOT_8042: u16 = 1 << 1;
const BOOT_NO_VGA: u16 = 1 << 2;
/// More than 100 and 1000 microseconds: there are no C2 and C3.
const NO_C2: u16 = 0x0fff;
const NO_C3: u16 = 0x0fff;

fn io(len: u8, access_size: AccessSize, port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, len.saturating_mul(8), 0, access_size, port.into())
}

/// FADT (ACPI 6.5, 5.2.9), with FACS and DSDT at these offsets into the tables.
pub(super) fn fadt(setup: &AcpiSetup, facs: u32, dsdt: u32) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .gpe_info(GPE0_BLOCK.into(), 0, GPE0_LEN, 0, 0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is a fixed feature (its flag clear); there is no sleep button.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.firmware_ctrl = facs.into();
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_BLOCK).into();
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_BLOCK).into();
    fadt.pm_tmr_blk = u32::from(PM_TIMER_BLOCK).into();
    fadt.pm1_evt_len = PM1_EVENT_LEN;
    fadt.pm1_cnt_len = PM1_CONTROL_LEN;
    fadt.pm_tmr_len = PM_TIMER_LEN;
    fadt.x_pm1a_evt_blk = io(PM1_EVENT_LEN, AccessSize::WordAccess, PM1_EVENT_BLOCK);
    fadt.x_pm1a_cnt_blk = io(PM1_CONTROL_LEN, AccessSize::WordAccess, PM1_CONTROL_BLOCK);
    fadt.x_pm_tmr_blk = io(PM_TIMER_LEN, AccessSize::DwordAccess, PM_TIMER_BLOCK);
    fadt.x_gpe0_blk = io(GPE0_LEN, AccessSize::ByteAccess, GPE0_BLOCK);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY;
    let no_vga = if setup.vga { 0 } else { BOOT_NO_VGA };
    fadt.iapc_boot_arch = (BOOT_LEGACY_DEVICES | BOOT_8042 | no_vga).into();
    fadt.reset_reg = io(1, AccessSize::ByteAccess, CF9_PORT);
    fadt.reset_value = ResetControl::RESET_VALUE;
    fadt.finalize()
}

const LAPIC_BASE: u32 = 0xfee0_0000;
const IOAPIC_BASE: u32 = 0xfec0_0000;
/// APIC ids from here up do not fit into a LAPIC entry (FFH is broadcast).
const FIRST_X2APIC_ID: u32 = 255;
/// MADT's flag for a PIC pair beside the APICs.
const PCAT_COMPAT: u32 = 1;
/// MPS INTI flags (ACPI 6.5, table 5.26).
const CONFORMS_TO_BUS: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// MADT (ACPI 6.5, 5.2.12).
pub(super) fn madt(setup: &AcpiSetup) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&LAPIC_BASE.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..setup.vcpus {
        match u8::try_from(id) {
            Ok(id) if u32::from(id) < FIRST_X2APIC_ID => {
                let lapic = ProcessorLocalApic::new(id, id, EnabledStatus::Enabled);
                madt.append_slice(&bytes(&lapic));
            }
            _ => madt.append_slice(&x2apic(id)),
        }
    }
    madt.append_slice(&bytes(&IoApic::new(0, IOAPIC_BASE, 0)));
    // The PIT's output is on pin 2, where a PC has it; the SCI is not an ISA interrupt.
    madt.append_slice(&source_override(0, 2, CONFORMS_TO_BUS));
    madt.append_slice(&source_override(SCI_GSI as u8, SCI_GSI, ACTIVE_HIGH_LEVEL));
    // LINT1 of every LAPIC is NMI.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    if setup.vcpus > FIRST_X2APIC_ID {
        madt.append_slice(&[0xa, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    madt.as_slice().to_vec()
}

/// Processor Local x2APIC (ACPI 6.5, 5.2.12.12): the UID is the id.
fn x2apic(id: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[..2].copy_from_slice(&[9, 16]);
    entry[4..8].copy_from_slice(&id.to_le_bytes());
    entry[8] = 1;
    entry[12..].copy_from_slice(&id.to_le_bytes());
    entry
}

/// Interrupt Source Override (ACPI 6.5, 5.2.12.5).
fn source_override(irq: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let mut entry = [2, 10, 0, irq, 0, 0, 0, 0, 0, 0];
    entry[4..8].copy_from_slice(&gsi.to_le_bytes());
    entry[8..].copy_from_slice(&flags.to_le_bytes());
    entry
}

/// MCFG (PCI Firmware Specification 3.3, 4.1.2).
pub(super) fn mcfg(setup: &AcpiSetup) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(setup.ecam_base, 0, 0, u8::MAX);
    mcfg
}
