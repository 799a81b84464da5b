//! What the device holds.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Numbers of the items that are not files.
pub mod key {
    /// "QEMU".
    pub const SIGNATURE: u16 = 0x00;
    /// Bit 0: data port, bit 1: DMA.
    pub const FEATURES: u16 = 0x01;
    /// The machine's UUID, 16 bytes.
    pub const UUID: u16 = 0x02;
    /// Bytes of RAM, 64 bits.
    pub const RAM: u16 = 0x03;
    /// CPUs at power-up, 16 bits.
    pub const CPUS: u16 = 0x05;
    /// Bytes of the kernel behind its real-mode part, 32 bits.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Bytes of the initrd, 32 bits.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// 16 bits: whether to show a boot menu.
    pub const BOOT_MENU: u16 = 0x0e;
    /// The largest APIC id + 1, 16 bits.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The kernel behind its real-mode part.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The initrd.
    pub const INITRD_DATA: u16 = 0x12;
    /// Bytes of the command line with its final zero, 32 bits.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The command line with its final zero.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// Bytes of the kernel's real-mode part, 32 bits.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The kernel's real-mode part.
    pub const SETUP_DATA: u16 = 0x18;
    /// The directory of files.
    pub const DIRECTORY: u16 = 0x19;
    /// The first file.
    pub const FIRST_FILE: u16 = 0x20;
}

const FEATURES: u32 = 0b11;
/// A name in the directory, with its final zero.
const NAME_LEN: usize = 56;

/// What is behind a number.
pub enum Item {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A part of a file of the host, which is read when the guest does (a kernel, an initrd).
    File {
        /// The file.
        file: File,
        /// Where the part begins.
        start: u64,
        /// Its bytes.
        len: u64,
    },
}

impl Item {
    /// Its bytes.
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    /// Reads at `offset`; gives how many bytes there were.
    fn read(&self, offset: u64, data: &mut [u8]) -> usize {
        let left = self.len().saturating_sub(offset);
        let count = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if count == 0 {
            return 0;
        }
        let data = &mut data[..count];
        match self {
            Self::Bytes(bytes) => data.copy_from_slice(&bytes[offset as usize..][..count]),
            Self::File { file, start, .. } => {
                if let Err(error) = file.read_exact_at(data, start + offset) {
                    tracing::warn!(%error, "a file for the firmware cannot be read: it reads zeros");
                    data.fill(0);
                }
            }
        }
        count
    }
}

/// All items by number, and the files' names.
#[derive(Default)]
pub struct Items {
    numbered: BTreeMap<u16, Item>,
    /// Files, in the order of their names: that is how firmware may expect the directory.
    files: BTreeMap<String, Vec<u8>>,
    /// `files` with their numbers, and the directory.
    built: BTreeMap<u16, Item>,
}

impl Items {
    /// The signature, the features, and no file.
    pub fn new() -> Self {
        let mut this = Self::default();
        this.set(key::SIGNATURE, Item::Bytes(b"QEMU".to_vec()));
        this.set_u32(key::FEATURES, FEATURES);
        this.build();
        this
    }

    /// Sets item `key` (not one of files').
    pub fn set(&mut self, key: u16, item: Item) {
        self.numbered.insert(key, item);
    }

    /// Sets item `key` to these bytes.
    pub fn set_bytes(&mut self, key: u16, bytes: Vec<u8>) {
        self.set(key, Item::Bytes(bytes));
    }

    /// Sets item `key` to a number of 16 bits.
    pub fn set_u16(&mut self, key: u16, value: u16) {
        self.set_bytes(key, value.to_le_bytes().to_vec());
    }

    /// Sets item `key` to a number of 32 bits.
    pub fn set_u32(&mut self, key: u16, value: u32) {
        self.set_bytes(key, value.to_le_bytes().to_vec());
    }

    /// Adds a file, or replaces it. `name` has at most 55 bytes.
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) {
        debug_assert!(name.len() < NAME_LEN, "{name}");
        self.files.insert(name.into(), bytes);
        self.build();
    }

    fn build(&mut self) {
        self.built.clear();
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, (name, bytes)) in (key::FIRST_FILE..).zip(&self.files) {
            directory.extend((bytes.len() as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(NAME_LEN, 0);
            directory.extend(padded);
            self.built.insert(key, Item::Bytes(bytes.clone()));
        }
        self.built.insert(key::DIRECTORY, Item::Bytes(directory));
    }

    /// Reads item `key` at `offset`; gives how many bytes there were.
    pub(super) fn read(&self, key: u16, offset: u64, data: &mut [u8]) -> usize {
        let item = self.numbered.get(&key).or_else(|| self.built.get(&key));
        item.map_or(0, |item| item.read(offset, data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_part_of_a_file_is_read_when_asked_for() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut items = Items::new();
        items.set(key::KERNEL_DATA, Item::File { file, start: 3, len: 4 });
        let mut data = [0; 8];
        assert_eq!(items.read(key::KERNEL_DATA, 1, &mut data), 3);
        assert_eq!(data[..3], *b"456");
        assert_eq!(items.read(key::KERNEL_DATA, 4, &mut data), 0);
        assert_eq!(items.read(key::KERNEL_DATA, u64::MAX, &mut data), 0);
    }
}
