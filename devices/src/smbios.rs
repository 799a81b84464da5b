//! What the guest is told of its maker and hardware: SMBIOS 3 tables (DMTF DSP0134 3.6).
//!
//! ```text
//!   entry point "_SM3_" (found by scanning F0000..100000) --> structures, each
//!     type, length, handle | fields | strings, each ended by 0 | 0
//! ```

use lodge_memory::RamLayout;

/// Where guests look for the entry point, 16-byte aligned: this and the following 64 KiB.
pub const SMBIOS_AREA: u64 = 0xf_0000;
/// Bytes of the area.
pub const SMBIOS_AREA_LEN: u64 = 0x1_0000;

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmbiosSetup {
    /// The machine's UUID, in the order in which it is written as text.
    pub uuid: [u8; 16],
    /// The machine's serial number; empty for none.
    pub serial: String,
    /// The version of this program, as the product's.
    pub version: String,
    /// vCPUs.
    pub vcpus: u32,
    /// RAM.
    pub ram: RamLayout,
}

const VENDOR: &str = "Lodge";
const PRODUCT: &str = "Lodge PC";
/// The longest string that SMBIOS wants read (DSP0134, 6.1.3).
const MAX_STRING: usize = 64;

/// Handles, one for each structure.
mod handle {
    pub const BIOS: u16 = 0;
    pub const SYSTEM: u16 = 0x100;
    pub const CHASSIS: u16 = 0x300;
    pub const PROCESSOR: u16 = 0x400;
    pub const MEMORY_ARRAY: u16 = 0x1000;
    pub const MEMORY_DEVICE: u16 = 0x1100;
    pub const MAPPED: u16 = 0x1300;
    pub const BOOT: u16 = 0x2000;
    pub const END: u16 = 0x7f00;
}

/// "Not provided" as a handle, and "unknown" in many one-byte fields.
const NO_HANDLE: u16 = 0xfffe;
const UNKNOWN: u8 = 2;
const OTHER: u8 = 1;

/// Bytes of RAM as a PC counts them.
fn ram_bytes(setup: &SmbiosSetup) -> u64 {
    setup.ram.spans().iter().map(|(_, bytes)| bytes).sum()
}

/// The structures, without an entry point: what firmware wants.
pub fn structures(setup: &SmbiosSetup) -> Vec<u8> {
    let mut bytes = Vec::new();
    for structure in [bios(setup), system(setup), chassis(), processor(setup), memory_array(setup)]
    {
        structure.append(&mut bytes);
    }
    memory_device(setup).append(&mut bytes);
    for (index, region) in (0..).zip(setup.ram.spans()) {
        memory_array_mapped(index, region).append(&mut bytes);
    }
    boot().append(&mut bytes);
    Structure::new(127, handle::END).append(&mut bytes);
    bytes
}

/// The entry point for structures of `len` bytes at `gpa` (DSP0134, 5.2.2).
pub fn entry_point(gpa: u64, len: usize) -> [u8; 24] {
    let mut entry = [0; 24];
    entry[..5].copy_from_slice(b"_SM3_");
    // Its own length; version 3.6.0; entry point revision 1.
    entry[6..11].copy_from_slice(&[24, 3, 6, 0, 1]);
    entry[12..16].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    entry[16..].copy_from_slice(&gpa.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg();
    entry
}

/// Entry point and structures as they lie from `gpa` (16-byte aligned) on.
pub fn place(setup: &SmbiosSetup, gpa: u64) -> Vec<u8> {
    let structures = structures(setup);
    let mut bytes = entry_point(gpa.saturating_add(32), structures.len()).to_vec();
    bytes.resize(32, 0);
    bytes.extend(structures);
    bytes
}

struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let mut this = Self { bytes: vec![kind, 0], strings: Vec::new(), count: 0 };
        this.u16(handle);
        this
    }

    fn u8s(&mut self, values: &[u8]) {
        self.bytes.extend_from_slice(values);
    }
    fn u16(&mut self, value: u16) {
        self.u8s(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.u8s(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.u8s(&value.to_le_bytes());
    }

    /// A string's number; 0 for an empty one. What could not be printed is left out.
    fn string(&mut self, text: &str) {
        let text: String =
            text.chars().filter(|c| matches!(c, ' '..='~')).take(MAX_STRING).collect();
        if text.is_empty() {
            return self.u8s(&[0]);
        }
        self.count += 1;
        self.u8s(&[self.count]);
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
    }

    fn append(mut self, to: &mut Vec<u8>) {
        // No structure here has more than some 50 bytes of fields.
        self.bytes[1] = self.bytes.len() as u8;
        to.append(&mut self.bytes);
        if self.strings.is_empty() {
            to.push(0);
        }
        to.append(&mut self.strings);
        to.push(0);
    }
}

/// Type 0, firmware.
fn bios(setup: &SmbiosSetup) -> Structure {
    let mut s = Structure::new(0, handle::BIOS);
    s.string(VENDOR);
    s.string(&setup.version);
    s.u16(0xe800);
    // No release date; a ROM of 64 KiB.
    s.u8s(&[0, 0]);
    // Characteristics are not supported; ACPI is; this is a virtual machine.
    s.u64(1 << 3);
    s.u8s(&[1, 0x18]);
    // No release and embedded controller numbers; no extended ROM size.
    s.u8s(&[0xff; 4]);
    s.u16(0);
    s
}

/// Type 1, system.
fn system(setup: &SmbiosSetup) -> Structure {
    let mut s = Structure::new(1, handle::SYSTEM);
    s.string(VENDOR);
    s.string(PRODUCT);
    s.string(&setup.version);
    s.string(&setup.serial);
    // The first three fields are little-endian (DSP0134, 7.2.1).
    for range in [0..4, 4..6, 6..8] {
        s.bytes.extend(setup.uuid[range].iter().rev());
    }
    s.u8s(&setup.uuid[8..]);
    // Woken up by the power switch; no SKU, no family.
    s.u8s(&[6, 0, 0]);
    s
}

/// Type 3, chassis.
fn chassis() -> Structure {
    let mut s = Structure::new(3, handle::CHASSIS);
    s.string(VENDOR);
    // Other; no version, serial number, tag; all states safe; security none.
    s.u8s(&[OTHER, 0, 0, 0, 3, 3, 3, 3]);
    s.u32(0);
    // Height, cords and contained elements: none told. No SKU.
    s.u8s(&[0, 0, 0, 0, 0]);
    s
}

/// Type 4, processor: one socket with all vCPUs.
fn processor(setup: &SmbiosSetup) -> Structure {
    let mut s = Structure::new(4, handle::PROCESSOR);
    s.string("CPU 0");
    // A central processor of another family.
    s.u8s(&[3, OTHER]);
    s.string(VENDOR);
    // CPUID says what it is.
    s.u64(0);
    s.u8s(&[0, 0]);
    // Clock, highest and present speed: unknown.
    for _ in 0..3 {
        s.u16(0);
    }
    // Populated and enabled; upgrade: other.
    s.u8s(&[0x41, OTHER]);
    for _ in 0..3 {
        s.u16(0xffff);
    }
    s.u8s(&[0, 0, 0]);
    let few = u8::try_from(setup.vcpus).unwrap_or(0xff);
    s.u8s(&[few; 3]);
    // 64 bits, many cores, hardware threads are cores.
    s.u16(0x0c);
    // Family 2: other.
    s.u16(OTHER.into());
    let many = u16::try_from(setup.vcpus).unwrap_or(u16::MAX);
    for _ in 0..3 {
        s.u16(many);
    }
    s
}

/// Type 16, the memory array.
fn memory_array(setup: &SmbiosSetup) -> Structure {
    let mut s = Structure::new(16, handle::MEMORY_ARRAY);
    // On the system board, system memory, multi-bit ECC; capacity in the extended field.
    s.u8s(&[3, 3, 6]);
    s.u32(0x8000_0000);
    s.u16(NO_HANDLE);
    s.u16(1);
    s.u64(ram_bytes(setup));
    s
}

/// Type 17, one memory device with all of it.
fn memory_device(setup: &SmbiosSetup) -> Structure {
    let mebibytes = ram_bytes(setup) >> 20;
    let mut s = Structure::new(17, handle::MEMORY_DEVICE);
    s.u16(handle::MEMORY_ARRAY);
    s.u16(NO_HANDLE);
    // Total and data width unknown.
    s.u16(0xffff);
    s.u16(0xffff);
    // 7FFFH: see the extended size.
    s.u16(u16::try_from(mebibytes).unwrap_or(u16::MAX).min(0x7fff));
    // A DIMM, in no set.
    s.u8s(&[9, 0]);
    s.string("DIMM 0");
    s.string("");
    // RAM, type detail other.
    s.u8s(&[7]);
    s.u16(UNKNOWN.into());
    s.u16(0);
    s.string(VENDOR);
    // No serial number, tag, part number, rank.
    s.u8s(&[0, 0, 0, 0]);
    s.u32(if mebibytes >= 0x7fff { u32::try_from(mebibytes).unwrap_or(0x7fff_ffff) } else { 0 });
    // Speed and voltages unknown.
    for _ in 0..4 {
        s.u16(0);
    }
    s
}

/// Type 19, where memory is mapped.
fn memory_array_mapped(index: u16, (start, bytes): (u64, u64)) -> Structure {
    let mut s = Structure::new(19, handle::MAPPED.saturating_add(index));
    // Addresses in the extended fields.
    s.u32(u32::MAX);
    s.u32(0);
    s.u16(handle::MEMORY_ARRAY);
    s.u8s(&[1]);
    s.u64(start);
    s.u64(start.saturating_add(bytes).saturating_sub(1));
    s
}

/// Type 32, how the last boot went: no errors.
fn boot() -> Structure {
    let mut s = Structure::new(32, handle::BOOT);
    s.u8s(&[0; 7]);
    s
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn setup(ram: u64) -> SmbiosSetup {
        SmbiosSetup {
            uuid: std::array::from_fn(|i| 0x10 + i as u8),
            serial: "S-1\n2".into(),
            version: "1.2.3".into(),
            vcpus: 4,
            ram: RamLayout::new(ram).unwrap(),
        }
    }

    /// `(type, handle, fields, strings)` of each structure.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, u16, Vec<u8>, Vec<String>)> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (fields, rest) = bytes.split_at(bytes[1].into());
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap() + 2;
            let strings = rest[..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            let strings = strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect();
            let number = u16::from_le_bytes([fields[2], fields[3]]);
            all.push((fields[0], number, fields.to_vec(), strings));
            bytes = &rest[end..];
        }
        all
    }

    #[test]
    fn every_structure_is_there_with_its_length() {
        let all = parse(&structures(&setup(40 << 30)));
        let kinds: Vec<_> = all.iter().map(|s| (s.0, s.2.len())).collect();
        // Lengths of DSP0134's versions: 2.4+, 2.4+, 2.7+, 3.0+, 2.7+, 2.8+, 2.7+, all, all.
        let lengths = [
            (0, 0x1a),
            (1, 0x1b),
            (3, 0x16),
            (4, 0x30),
            (16, 0x17),
            (17, 0x28),
            (19, 0x1f),
            (19, 0x1f),
            (32, 11),
            (127, 4),
        ];
        assert_eq!(kinds, lengths);
        let mut handles: Vec<_> = all.iter().map(|s| s.1).collect();
        handles.dedup();
        assert_eq!(handles.len(), all.len());
        let system = &all[1];
        assert_eq!(system.3, ["Lodge", "Lodge PC", "1.2.3", "S-12"]);
        assert_eq!(system.2[8..18], [0x13, 0x12, 0x11, 0x10, 0x15, 0x14, 0x17, 0x16, 0x18, 0x19]);
        assert_eq!(all[5].2[12..14], [0xff, 0x7f]);
        assert_eq!(all[5].2[28..32], (40u32 << 10).to_le_bytes());
    }

    /// The judge is dmidecode, from a file as it dumps them. Needs `dmidecode` (Debian: dmidecode).
    #[test]
    fn dmidecode_reads_them() {
        let tables = structures(&setup(2 << 30));
        let mut dump = entry_point(32, tables.len()).to_vec();
        dump.resize(32, 0);
        dump.extend(tables);
        let file = std::env::temp_dir().join(format!("lodge-smbios-{}", std::process::id()));
        std::fs::write(&file, dump).unwrap();
        let output = Command::new("dmidecode").arg("--from-dump").arg(&file).output();
        std::fs::remove_file(&file).unwrap();
        let output =
            output.unwrap_or_else(|e| panic!("dmidecode: {e}; install Debian's dmidecode"));
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        for wanted in [
            "SMBIOS 3.6.0 present",
            "UUID: 10111213-1415-1617-1819-1a1b1c1d1e1f",
            "Product Name: Lodge PC",
            "System is a virtual machine",
            "ACPI is supported",
            "Core Count: 4",
            "Maximum Capacity: 2 GB",
            "Size: 2 GB",
            "Range Size: 2 GB",
            "End Of Table",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        for bad in ["invalid", "broken", "truncated", "TRUNCATED", "BAD"] {
            assert!(!text.to_lowercase().contains(&bad.to_lowercase()), "{bad}: {text}");
        }
    }

    #[test]
    fn the_entry_point_sums_to_zero() {
        let bytes = place(&setup(1 << 30), SMBIOS_AREA);
        assert_eq!(bytes[..24].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        assert_eq!(bytes[16..24], (SMBIOS_AREA + 32).to_le_bytes());
        assert_eq!(bytes[12..16], ((bytes.len() - 32) as u32).to_le_bytes());
    }
}
