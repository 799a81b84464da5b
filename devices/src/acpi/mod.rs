//! What the guest's operating system is told of the machine: the ACPI tables (ACPI 6.5).
//!
//! ```text
//!   RSDP --> XSDT --> FADT --> DSDT  (AML: PCI, its windows and interrupts, serial ports, CPUs)
//!                 |        +-> FACS
//!                 +-> MADT  (LAPICs, IOAPIC, interrupt overrides)
//!                 +-> MCFG  (ECAM)
//! ```
//!
//! [`AcpiTables::new`] computes the tables from the machine, each pointer still an offset into the
//! tables. Either the machine places them itself ([`AcpiTables::place`], for a kernel that is started
//! directly), or firmware does, from the same bytes, pointers and checksums.

mod dsdt;
mod fixed;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::legacy::SerialPort;
use crate::pci::Windows;

const OEM_ID: [u8; 6] = *b"LODGE ";
const OEM_TABLE_ID: [u8; 8] = *b"LODGEPC ";
const OEM_REVISION: u32 = 1;

/// FACS must be aligned to this (ACPI 6.5, 5.2.10); all tables are, once their start is.
pub const TABLES_ALIGNMENT: u64 = 64;
/// RSDP must be aligned to this (ACPI 6.5, 5.2.5.1).
pub const RSDP_ALIGNMENT: u64 = 16;

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct AcpiSetup {
    /// vCPUs; their APIC ids are 0, 1, 2, ...
    pub vcpus: u32,
    /// Where PCI devices' BARs may lie.
    pub windows: Windows,
    /// ECAM's first address; it covers buses 0..=255.
    pub ecam_base: u64,
    /// The GSI of a root bus slot's interrupt pin (1 = INTA .. 4 = INTD).
    pub intx_gsi: fn(slot: u8, pin: u8) -> u32,
    /// Serial ports, in the order of the guest's names for them.
    pub serial: Vec<SerialPort>,
    /// There is a VGA-compatible display.
    pub vga: bool,
}

/// One of the two pieces that the tables consist of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blob {
    /// [`AcpiTables::rsdp`].
    Rsdp,
    /// [`AcpiTables::tables`].
    Tables,
}

/// A little-endian field that holds an offset into [`AcpiTables::tables`] and is to hold an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pointer {
    /// Where the field is.
    pub blob: Blob,
    /// The field's offset in it.
    pub offset: usize,
    /// The field's bytes, 4 or 8.
    pub bytes: usize,
}

/// A byte that makes the sum of a range zero, to be computed when the pointers are final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    /// What it is about.
    pub blob: Blob,
    /// Where the byte is (it holds zero until then).
    pub offset: usize,
    /// The range that is summed up; it has the byte in it.
    pub range: Range<usize>,
}

/// The tables cannot be placed there.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "ACPI tables of {bytes} bytes cannot be at {tables:#x} with RSDP at {rsdp:#x}: they must be \
     aligned to 64 and 16 bytes and end below 4 GiB"
)]
pub struct BadPlace {
    /// The tables' bytes.
    pub bytes: usize,
    /// Where the tables were to be.
    pub tables: u64,
    /// Where RSDP was to be.
    pub rsdp: u64,
}

/// The tables, not placed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// RSDP.
    pub rsdp: Vec<u8>,
    /// Everything else.
    pub tables: Vec<u8>,
    /// All pointers, in an order in which they can be resolved.
    pub pointers: Vec<Pointer>,
    /// All checksums, to be computed in this order after the pointers.
    pub checksums: Vec<Checksum>,
}

/// Bytes 4..8 of a table's header are its length, byte 9 its checksum (ACPI 6.5, 5.2.6).
const HEADER_CHECKSUM: usize = 9;
const HEADER_LEN: usize = 36;
/// XsdtAddress in RSDP, and its two checksums (ACPI 6.5, 5.2.5.3).
const RSDP_XSDT: usize = 24;
const RSDP_CHECKSUM: (usize, usize) = (8, 20);
const RSDP_EXTENDED_CHECKSUM: (usize, usize) = (32, 36);

impl AcpiTables {
    /// The tables for a machine.
    pub fn new(setup: &AcpiSetup) -> Self {
        let mut this = Self {
            rsdp: Vec::new(),
            tables: Vec::new(),
            pointers: Vec::new(),
            checksums: Vec::new(),
        };
        let facs = this.append(&bytes(&FACS::new()));
        let dsdt = this.table(&dsdt::dsdt(setup));
        let fadt = this.table(&bytes(&fixed::fadt(setup, facs as u32, dsdt as u32)));
        for (field, len) in fixed::FADT_POINTERS {
            this.pointers.push(Pointer { blob: Blob::Tables, offset: fadt + field, bytes: len });
        }
        let listed =
            [fadt, this.table(&fixed::madt(setup)), this.table(&bytes(&fixed::mcfg(setup)))];
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for offset in listed {
            xsdt.add_entry(offset as u64);
        }
        let xsdt = this.table(&bytes(&xsdt));
        for i in 0..listed.len() {
            let offset = xsdt + HEADER_LEN + 8 * i;
            this.pointers.push(Pointer { blob: Blob::Tables, offset, bytes: 8 });
        }
        this.add_rsdp(xsdt as u64);
        this
    }

    /// Appends `bytes`, aligned, and says where.
    fn append(&mut self, bytes: &[u8]) -> usize {
        let offset = self.tables.len().next_multiple_of(TABLES_ALIGNMENT as usize);
        self.tables.resize(offset, 0);
        self.tables.extend_from_slice(bytes);
        offset
    }

    /// Appends a table with a standard header.
    fn table(&mut self, bytes: &[u8]) -> usize {
        let start = self.append(bytes);
        let offset = start + HEADER_CHECKSUM;
        self.tables[offset] = 0;
        let range = start..start + bytes.len();
        self.checksums.push(Checksum { blob: Blob::Tables, offset, range });
        start
    }

    fn add_rsdp(&mut self, xsdt: u64) {
        self.rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
        self.pointers.push(Pointer { blob: Blob::Rsdp, offset: RSDP_XSDT, bytes: 8 });
        for (offset, end) in [RSDP_CHECKSUM, RSDP_EXTENDED_CHECKSUM] {
            self.rsdp[offset] = 0;
            self.checksums.push(Checksum { blob: Blob::Rsdp, offset, range: 0..end });
        }
    }

    /// The final bytes, with the tables at `tables` and RSDP at `rsdp`: `(gpa, bytes)` of each.
    pub fn place(&self, tables: u64, rsdp: u64) -> Result<[(u64, Vec<u8>); 2], BadPlace> {
        let end = tables.checked_add(self.tables.len() as u64);
        if !tables.is_multiple_of(TABLES_ALIGNMENT)
            || !rsdp.is_multiple_of(RSDP_ALIGNMENT)
            || end.is_none_or(|end| end > 1 << 32)
        {
            return Err(BadPlace { bytes: self.tables.len(), tables, rsdp });
        }
        let mut done = self.clone();
        for pointer in &self.pointers {
            let field = pointer.offset..pointer.offset + pointer.bytes;
            let field = &mut done.blob(pointer.blob)[field];
            let mut value = [0; 8];
            value[..pointer.bytes].copy_from_slice(field);
            let value = u64::from_le_bytes(value) + tables;
            field.copy_from_slice(&value.to_le_bytes()[..pointer.bytes]);
        }
        for checksum in &self.checksums {
            let blob = done.blob(checksum.blob);
            let sum = blob[checksum.range.clone()].iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
            blob[checksum.offset] = sum.wrapping_neg();
        }
        Ok([(tables, done.tables), (rsdp, done.rsdp)])
    }

    fn blob(&mut self, blob: Blob) -> &mut [u8] {
        match blob {
            Blob::Rsdp => &mut self.rsdp,
            Blob::Tables => &mut self.tables,
        }
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
