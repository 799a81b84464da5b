//! ACPI tables for firmware: the bytes, and a script of 128-byte commands that says where they go, which fields are
//! pointers and which are checksums.

use super::Items;
use crate::acpi::{AcpiTables, Blob, TABLES_ALIGNMENT};

const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
const SCRIPT: &str = "etc/table-loader";

const COMMAND_LEN: usize = 128;
const NAME_LEN: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Where an allocation goes: anywhere below 4 GiB, or F0000..100000.
const ZONE_HIGH: u8 = 1;
const ZONE_F_SEGMENT: u8 = 2;
const RSDP_ALIGNMENT: u32 = 16;

fn name(blob: Blob) -> &'static str {
    match blob {
        Blob::Rsdp => RSDP,
        Blob::Tables => TABLES,
    }
}

/// One command: its number and its fields one after another.
fn command(number: u32, files: &[&str], fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    for file in files {
        let end = bytes.len() + NAME_LEN;
        bytes.extend(file.as_bytes());
        bytes.resize(end, 0);
    }
    bytes.extend(fields.concat());
    bytes.resize(COMMAND_LEN, 0);
    bytes
}

/// Adds `tables` and the script to `items`.
pub fn add_acpi(items: &mut Items, tables: &AcpiTables) {
    let allocate = |file, alignment: u32, zone: u8| {
        command(ALLOCATE, &[file], &[&alignment.to_le_bytes(), &[zone]])
    };
    let mut script = allocate(TABLES, TABLES_ALIGNMENT as u32, ZONE_HIGH);
    script.extend(allocate(RSDP, RSDP_ALIGNMENT, ZONE_F_SEGMENT));
    for pointer in &tables.pointers {
        // All point into the tables; what the field holds is the offset there.
        let fields: [&[u8]; 2] = [&(pointer.offset as u32).to_le_bytes(), &[pointer.bytes as u8]];
        script.extend(command(ADD_POINTER, &[name(pointer.blob), TABLES], &fields));
    }
    for sum in &tables.checksums {
        let words = [sum.offset, sum.range.start, sum.range.len()];
        let words = words.map(|word| (word as u32).to_le_bytes());
        script.extend(command(ADD_CHECKSUM, &[name(sum.blob)], &[&words.concat()]));
    }
    items.add_file(TABLES, tables.tables.clone());
    items.add_file(RSDP, tables.rsdp.clone());
    items.add_file(SCRIPT, script);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::AcpiSetup;
    use crate::fw_cfg::key;
    use crate::pci::{ECAM_BASE, Windows, intx_gsi};
    use std::collections::HashMap;

    fn file(items: &Items, wanted: &str) -> Vec<u8> {
        let mut directory = vec![0; 4 + 64 * 16];
        items.read(key::DIRECTORY, 0, &mut directory);
        let entry = directory[4..]
            .chunks(64)
            .find(|entry| entry[8..].starts_with(format!("{wanted}\0").as_bytes()))
            .unwrap();
        let mut bytes = vec![0; u32::from_be_bytes(entry[..4].try_into().unwrap()) as usize];
        items.read(u16::from_be_bytes([entry[4], entry[5]]), 0, &mut bytes);
        bytes
    }

    /// A loader as firmware has one, written from the interface's description.
    fn load(items: &Items) -> HashMap<String, (u64, Vec<u8>)> {
        let mut loaded: HashMap<String, (u64, Vec<u8>)> = HashMap::new();
        let mut next = 0x7fe0_0000;
        for command in file(items, SCRIPT).chunks(COMMAND_LEN) {
            let word = |at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap());
            let text = |at: usize| {
                let name = &command[at..at + NAME_LEN];
                String::from_utf8(name.iter().copied().take_while(|b| *b != 0).collect()).unwrap()
            };
            match word(0) {
                ALLOCATE => {
                    let bytes = file(items, &text(4));
                    let at = if command[64] == ZONE_F_SEGMENT { 0xf_5a60 } else { next };
                    next += (bytes.len() as u64).next_multiple_of(4096);
                    loaded.insert(text(4), (at, bytes));
                }
                ADD_POINTER => {
                    let base = loaded[&text(60)].0;
                    let (at, len) = (word(116) as usize, command[120] as usize);
                    let field = &mut loaded.get_mut(&text(4)).unwrap().1[at..at + len];
                    let mut value = [0; 8];
                    value[..len].copy_from_slice(field);
                    let value = u64::from_le_bytes(value) + base;
                    field.copy_from_slice(&value.to_le_bytes()[..len]);
                }
                ADD_CHECKSUM => {
                    let blob = &mut loaded.get_mut(&text(4)).unwrap().1;
                    let range = word(64) as usize..(word(64) + word(68)) as usize;
                    let sum = blob[range].iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
                    let at = word(60) as usize;
                    blob[at] = blob[at].wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
        loaded
    }

    #[test]
    fn firmware_ends_with_the_same_tables_as_a_direct_boot() {
        let tables = AcpiTables::new(&AcpiSetup {
            vcpus: 3,
            windows: Windows::new(1 << 30, 40),
            ecam_base: ECAM_BASE,
            intx_gsi,
            serial: Vec::new(),
            vga: true,
        });
        let mut items = Items::new();
        add_acpi(&mut items, &tables);
        let loaded = load(&items);
        let (at, bytes) = &loaded[TABLES];
        let (rsdp_at, rsdp) = &loaded[RSDP];
        let placed = tables.place(*at, *rsdp_at).unwrap();
        assert_eq!(placed[0], (*at, bytes.clone()));
        assert_eq!(placed[1], (*rsdp_at, rsdp.clone()));
    }
}
