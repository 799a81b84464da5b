use super::*;
use crate::legacy::{COM1, COM2};
use crate::pci::{ECAM_BASE, intx_gsi};
use std::process::Command;

fn setup(vcpus: u32) -> AcpiSetup {
    AcpiSetup {
        vcpus,
        windows: Windows::new(6 << 30, 40),
        ecam_base: ECAM_BASE,
        intx_gsi,
        serial: vec![COM1, COM2],
        vga: false,
    }
}

const TABLES: u64 = 0xe_0000;
const RSDP: u64 = 0xf_0000;

/// A guest's view: follows the pointers as an operating system does.
struct Guest([(u64, Vec<u8>); 2]);

impl Guest {
    fn at(&self, gpa: u64, len: usize) -> &[u8] {
        let (base, bytes) =
            self.0.iter().find(|(base, b)| (*base..*base + b.len() as u64).contains(&gpa)).unwrap();
        &bytes[(gpa - base) as usize..][..len]
    }
    fn number(&self, gpa: u64, len: usize) -> u64 {
        self.at(gpa, len).iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
    }
    /// A table's bytes, its checksum checked.
    fn table(&self, gpa: u64, signature: &[u8]) -> &[u8] {
        let table = self.at(gpa, self.number(gpa + 4, 4) as usize);
        assert_eq!(&table[..4], signature);
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "{signature:?}");
        table
    }
}

#[test]
fn pointers_and_checksums_hold_wherever_the_tables_are() {
    for (tables, rsdp) in [(TABLES, RSDP), (0x7fff_0000, 0xe_0000), (0x40, 0x10)] {
        let acpi = AcpiTables::new(&setup(2));
        let guest = Guest(acpi.place(tables, rsdp).unwrap());
        assert_eq!(guest.at(rsdp, 8), b"RSD PTR ");
        for len in [20, 36] {
            let sum = guest.at(rsdp, len).iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
            assert_eq!(sum, 0);
        }
        let xsdt = guest.number(rsdp + 24, 8);
        assert_eq!(guest.table(xsdt, b"XSDT").len(), 36 + 3 * 8);
        let listed = [0, 1, 2].map(|i| guest.number(xsdt + 36 + 8 * i, 8));
        let fadt = listed[0];
        assert_eq!(guest.table(fadt, b"FACP").len(), 276);
        let [facs, dsdt, x_facs, x_dsdt] =
            [(36, 4), (40, 4), (132, 8), (140, 8)].map(|(at, len)| guest.number(fadt + at, len));
        assert_eq!((guest.at(facs, 4), x_facs, dsdt), (&b"FACS"[..], 0, x_dsdt));
        assert!(facs.is_multiple_of(64));
        guest.table(dsdt, b"DSDT");
        guest.table(listed[1], b"APIC");
        let mcfg = guest.table(listed[2], b"MCFG");
        assert_eq!(mcfg[44..56], [0, 0, 0, 0xb0, 0, 0, 0, 0, 0, 0, 0, 255]);
    }
}

#[test]
fn bad_places_are_refused() {
    let acpi = AcpiTables::new(&setup(1));
    for (tables, rsdp) in [(0xe_0010, RSDP), (TABLES, 0xf_0008), (0xffff_ffc0, RSDP), (!63, RSDP)] {
        assert!(acpi.place(tables, rsdp).is_err(), "{tables:#x} {rsdp:#x}");
    }
}

#[test]
fn madt_lists_every_cpu_once() {
    for vcpus in [1, 2, 255, 300] {
        let madt = fixed::madt(&setup(vcpus));
        let mut at = 44;
        let mut ids = Vec::new();
        let mut others = Vec::new();
        while at < madt.len() {
            let entry = &madt[at..at + usize::from(madt[at + 1])];
            match entry[0] {
                0 => ids.push(u32::from(entry[3])),
                9 => ids.push(u32::from_le_bytes(entry[4..8].try_into().unwrap())),
                kind => others.push(kind),
            }
            at += entry.len();
        }
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        let expected: &[u8] = if vcpus > 255 { &[1, 2, 2, 4, 0xa] } else { &[1, 2, 2, 4] };
        assert_eq!(others, expected);
    }
}

#[test]
fn the_tables_fit_where_direct_boot_puts_them() {
    assert!(AcpiTables::new(&setup(255)).tables.len() < 0xf000);
}

/// The judge is ACPICA, which Linux has inside: it must disassemble, compile and execute our AML.
/// Needs `iasl` and `acpiexec` (Debian: acpica-tools).
#[test]
fn acpica_accepts_the_tables() {
    let dir = std::env::temp_dir().join(format!("lodge-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).current_dir(&dir).output();
        let output =
            output.unwrap_or_else(|e| panic!("{program}: {e}; install Debian's acpica-tools"));
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {text}");
        text.into_owned()
    };
    let guest = Guest(AcpiTables::new(&setup(3)).place(TABLES, RSDP).unwrap());
    let xsdt = guest.number(RSDP + 24, 8);
    let fadt = guest.number(xsdt + 36, 8);
    let tables = [
        ("xsdt", guest.table(xsdt, b"XSDT")),
        ("fadt", guest.table(fadt, b"FACP")),
        ("madt", guest.table(guest.number(xsdt + 44, 8), b"APIC")),
        ("mcfg", guest.table(guest.number(xsdt + 52, 8), b"MCFG")),
        ("dsdt", guest.table(guest.number(fadt + 40, 4), b"DSDT")),
    ];
    for (name, bytes) in tables {
        std::fs::write(dir.join(format!("{name}.aml")), bytes).unwrap();
        let text = run("iasl", &["-d", &format!("{name}.aml")]);
        for bad in ["Error", "rror:", "Invalid", "nvalid ", "Incorrect checksum", "unknown"] {
            assert!(!text.contains(bad), "{name}: {text}");
        }
    }
    let text = run("iasl", &["-p", "again", "dsdt.dsl"]);
    assert!(text.contains("0 Errors, 0 Warnings"), "{text}");

    let osc = "evaluate \\_SB.PCI0._OSC (5B4DDB33F71F1C4096577441C03DD766) 1 3 \
               (000000001F0000001F000000)";
    let commands = format!(
        "evaluate \\_SB.PCI0._CRS;evaluate \\_SB.PCI0._PRT;evaluate \\_S5;\
         evaluate \\_SB.PCI0.ISA.COM1._CRS;evaluate \\_SB.C002._UID;{osc}"
    );
    let text = run("acpiexec", &["-b", &commands, "dsdt.aml"]);
    for bad in ["AE_", "ACPI Error", "ACPI Warning", "failed"] {
        assert!(!text.contains(bad), "{bad}: {text}");
    }
    let routes = text.matches("[Package] Contains 4 Elements").count();
    assert_eq!(routes, 128 + 1, "32 slots of 4 pins, and _S5: {text}");
    // Granted all that was asked for but the SHPC, and said that something was refused.
    assert!(text.contains("10 00 00 00 1F 00 00 00 1D 00 00 00"), "{text}");
    std::fs::remove_dir_all(&dir).unwrap();
}
