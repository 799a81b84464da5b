//! Starting a Linux kernel without firmware: the kernel, its initrd and command line go into guest
//! memory beside the tables that firmware would have left, and the boot processor starts in it.
//!
//! ```text
//!   bzImage --> Linux boot protocol, 64-bit entry (32-bit entry for kernels without one)
//!   ELF     --> PVH, 32-bit entry
//!
//!   500     GDT                    1_0000..2_0000  command line
//!   6000    PVH start info         9_FC00..10_0000 reserved: E_0000 ACPI, F_0000 RSDP, SMBIOS
//!   7000    Linux's zero page      10_0000..       kernel, where it wants to be
//!   9000    page tables            ..end           initrd, as high as the kernel reaches
//! ```

mod bzimage;
mod elf;
mod entry;
mod files;
mod map;

use std::ops::Range;
use std::path::{Path, PathBuf};

use lodge_devices::acpi::{AcpiTables, BadPlace};
use lodge_devices::smbios::{self, SmbiosSetup};
use lodge_memory::{GuestMemory, RamLayout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use entry::{EntryState, prepare};
pub use map::{MapEntry, MapKind, memory_map};

use files::Source;

/// What to start.
#[derive(Debug, Clone, Copy)]
pub struct DirectBoot<'a> {
    /// A bzImage, or an ELF `vmlinux` with a PVH entry.
    pub kernel: &'a Path,
    /// The initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// The machine that the kernel is told of.
#[derive(Debug, Clone, Copy)]
pub struct Platform<'a> {
    /// Where RAM is.
    pub ram: &'a RamLayout,
    /// Guest-physical ranges that are neither RAM nor PCI's to give away, such as ECAM.
    pub reserved: &'a [Range<u64>],
    /// The ACPI tables.
    pub acpi: &'a AcpiTables,
    /// The SMBIOS tables.
    pub smbios: &'a SmbiosSetup,
}

/// Why a guest cannot be started directly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("cannot read the {what} '{path}'")]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// Something that is not a file, such as a directory.
    #[error("the {what} '{path}' is not a regular file")]
    NotAFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The file is not a kernel for this machine.
    #[error(
        "'{path}' is not a Linux kernel that can be started: {reason} (give a bzImage, such as \
         /boot/vmlinuz-..., or an ELF vmlinux with a PVH entry)"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        reason: &'static str,
    },
    /// Its boot protocol is too old.
    #[error(
        "the kernel '{path}' speaks version {major}.{minor:02} of the boot protocol; 2.06 (Linux \
         2.6.22) or newer is needed"
    )]
    TooOld {
        /// The file.
        path: PathBuf,
        /// The version's parts.
        major: u8,
        /// As above.
        minor: u8,
    },
    /// The file ends too early.
    #[error("the {what} '{path}' is truncated: it has {have} bytes, its headers speak of {need}")]
    Truncated {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its bytes.
        have: u64,
        /// How many there must be.
        need: u64,
    },
    /// There is no room for it in RAM.
    #[error(
        "the {what} '{path}' does not fit into the guest's memory: it needs {bytes} bytes there \
         ({why}); give the machine more memory"
    )]
    NoRoom {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Bytes of guest memory that it takes.
        bytes: u64,
        /// What is in the way.
        why: String,
    },
    /// The command line is too long for the kernel.
    #[error("the command line has {have} bytes; the kernel '{path}' takes {max}")]
    CommandLine {
        /// The kernel.
        path: PathBuf,
        /// Bytes of the command line.
        have: usize,
        /// The most it can be.
        max: usize,
    },
    /// The command line has a zero byte, which would end it.
    #[error("the command line has a zero byte in it")]
    ZeroByte,
    /// The machine's tables do not fit where they go.
    #[error("the machine's {what} take {have} bytes; there is room for {max}: use fewer vCPUs")]
    Tables {
        /// `ACPI tables` or `SMBIOS tables`.
        what: &'static str,
        /// Their bytes.
        have: usize,
        /// The most they can be.
        max: u64,
    },
    /// The ACPI tables cannot be placed.
    #[error(transparent)]
    Acpi(#[from] BadPlace),
    /// Guest memory is not where it must be: there is less than 1 MiB.
    #[error("cannot write the {what} into guest memory at {gpa:#x}: give the machine more memory")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Where.
        gpa: u64,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
}

/// Where things are (see the module's picture).
mod at {
    pub const GDT: u64 = 0x500;
    pub const PVH_INFO: u64 = 0x6000;
    pub const ZERO_PAGE: u64 = 0x7000;
    pub const PAGE_TABLES: u64 = 0x9000;
    pub const COMMAND_LINE: u64 = 0x1_0000;
    pub const COMMAND_LINE_END: u64 = 0x2_0000;
    pub const ACPI: u64 = 0xe_0000;
    pub const RSDP: u64 = 0xf_0000;
    pub const SMBIOS: u64 = 0xf_0040;
    pub const KERNEL: u64 = 0x10_0000;
}

/// Puts everything into guest memory and says how the boot processor is to start.
///
/// The whole of memory may hold anything before; a machine that is reset is loaded again.
///
/// # Errors
/// Each names the file and what to do.
pub fn load(
    memory: &GuestMemory,
    boot: &DirectBoot<'_>,
    platform: &Platform<'_>,
) -> Result<EntryState, Error> {
    if boot.cmdline.as_bytes().contains(&0) {
        return Err(Error::ZeroByte);
    }
    let mut kernel = Source::open("kernel", boot.kernel)?;
    let initrd = boot.initrd.map(|path| Source::open("initrd", path)).transpose()?;
    let head = kernel.head()?;
    let map = memory_map(platform.ram, platform.reserved);
    let target =
        Target { memory, low_ram: low_ram(platform.ram), map: &map, cmdline: boot.cmdline };
    let entry = if head.starts_with(elf::MAGIC) {
        elf::load(&target, &mut kernel, initrd)?
    } else {
        bzimage::load(&target, &mut kernel, &head, initrd)?
    };
    write_tables(memory, platform)?;
    Ok(entry)
}

/// Where the loaders put things.
struct Target<'a> {
    memory: &'a GuestMemory,
    /// Where RAM below 4 GiB ends.
    low_ram: u64,
    map: &'a [MapEntry],
    cmdline: &'a str,
}

impl Target<'_> {
    fn write(&self, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), Error> {
        write(self.memory, what, gpa, bytes)
    }

    /// Writes the command line, which the kernel takes up to `max` bytes of, and its final zero.
    fn write_cmdline(&self, kernel: &Source, max: usize) -> Result<(), Error> {
        let room = (at::COMMAND_LINE_END - at::COMMAND_LINE - 1) as usize;
        let (have, max) = (self.cmdline.len(), max.min(room));
        if have > max {
            return Err(Error::CommandLine { path: kernel.path().into(), have, max });
        }
        let mut bytes = self.cmdline.as_bytes().to_vec();
        bytes.push(0);
        self.write("command line", at::COMMAND_LINE, &bytes)
    }

    /// Puts the initrd as high as possible: above `kernel_end`, its last byte at `last` or below.
    /// Returns its address and bytes.
    fn load_initrd(&self, initrd: Source, kernel_end: u64, last: u64) -> Result<(u64, u64), Error> {
        let bytes = initrd.bytes();
        let limit = self.low_ram.min(last.saturating_add(1));
        let start = limit.checked_sub(bytes).map(|start| start & !(lodge_memory::PAGE_SIZE - 1));
        let Some(start) = start.filter(|start| *start >= kernel_end) else {
            let why = format!("the kernel ends at {kernel_end:#x}, the initrd must at {limit:#x}");
            return Err(initrd.no_room(bytes, why));
        };
        initrd.read_into(self.memory, 0, bytes, start)?;
        Ok((start, bytes))
    }
}

fn write(memory: &GuestMemory, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), Error> {
    let write = memory.write_slice(bytes, GuestAddress(gpa));
    write.map_err(|source| Error::Memory { what, gpa, source })
}

fn low_ram(ram: &RamLayout) -> u64 {
    ram.spans().first().map_or(0, |(start, bytes)| start.saturating_add(*bytes))
}

/// ACPI tables, RSDP and SMBIOS, where an operating system looks for them by itself.
fn write_tables(memory: &GuestMemory, platform: &Platform<'_>) -> Result<(), Error> {
    let fits = |what, have: usize, max: u64| {
        if have as u64 > max { Err(Error::Tables { what, have, max }) } else { Ok(()) }
    };
    fits("ACPI tables", platform.acpi.tables.len(), at::RSDP - at::ACPI)?;
    for (gpa, bytes) in platform.acpi.place(at::ACPI, at::RSDP)? {
        write(memory, "ACPI tables", gpa, &bytes)?;
    }
    let smbios = smbios::place(platform.smbios, at::SMBIOS);
    fits("SMBIOS tables", smbios.len(), at::KERNEL - at::SMBIOS)?;
    write(memory, "SMBIOS tables", at::SMBIOS, &smbios)
}

#[cfg(test)]
mod tests;
