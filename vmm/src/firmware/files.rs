//! Where the host keeps firmware.

use std::fs;
use std::path::{Path, PathBuf};

use lodge_model::spec::{FirmwareKind, Video};

/// The least and the most a ROM can have: 64 KiB hold the reset vector, below 16 MiB are the interrupt controllers.
const ROM_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 20;
const PAGE: u64 = 4096;

/// Why there is no firmware.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the places has it.
    #[error("there is no {what} on this host ({}): install the package '{package}'", .places.join(", "))]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        places: Vec<&'static str>,
        /// Debian's package.
        package: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read the firmware '{path}'")]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// A file is no firmware.
    #[error("'{path}' is no firmware: it has {bytes} bytes, not a number of pages up to 16 MiB")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        bytes: u64,
    },
    /// The variables' file cannot be made or written.
    #[error("cannot keep the UEFI variables in '{path}'")]
    Variables {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The variables' file is damaged.
    #[error(
        "the UEFI variables in '{path}' are damaged ({reason}): restore the file from a backup, or start once with \
         --reset-uefi-vars, which keeps the old file beside it and forgets the boot entries in it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another machine has them.
    #[error(
        "the UEFI variables in '{path}' are used by another machine: end it, or give this one a name or file of its own \
         (--name, --uefi-vars)"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// No memory for it on the host.
    #[error(transparent)]
    DeviceRam(#[from] lodge_devices::device_ram::Error),
    /// Something else is at its address.
    #[error(transparent)]
    Bus(#[from] lodge_devices::bus::Overlap),
    /// Guest memory ends below 1 MiB.
    #[error("the guest's memory has no room for firmware: give it 4 MiB or more")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Firmware of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// The ROM's file.
    pub code: &'static str,
    /// The template of its variables, if it keeps any.
    pub variables: Option<&'static str>,
}

const BIOS: [Found; 2] = [
    Found { code: "/usr/share/seabios/bios-256k.bin", variables: None },
    Found { code: "/usr/share/qemu/bios-256k.bin", variables: None },
];

const UEFI: [Found; 3] = [
    Found {
        code: "/usr/share/OVMF/OVMF_CODE_4M.fd",
        variables: Some("/usr/share/OVMF/OVMF_VARS_4M.fd"),
    },
    Found {
        code: "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        variables: Some("/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    },
    Found {
        code: "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
        variables: Some("/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    },
];

const DISPLAY_ROMS: [(Video, &str, &str); 2] = [
    (Video::Vga, "/usr/share/seabios/vgabios-stdvga.bin", "/usr/share/qemu/vgabios-stdvga.bin"),
    (Video::Virtio, "/usr/share/seabios/vgabios-virtio.bin", "/usr/share/qemu/vgabios-virtio.bin"),
];

/// Where the firmware is: in Debian's places, then in those of others.
pub(super) fn find(kind: FirmwareKind) -> Result<Found, Error> {
    let (list, what, package): (&[Found], _, _) = match kind {
        FirmwareKind::Bios => (&BIOS, "BIOS (SeaBIOS)", "seabios"),
        FirmwareKind::Uefi => (&UEFI, "UEFI firmware (OVMF)", "ovmf"),
    };
    let there = |found: &&Found| {
        Path::new(found.code).exists()
            && found.variables.is_none_or(|file| Path::new(file).exists())
    };
    list.iter().find(there).copied().ok_or_else(|| Error::Missing {
        what,
        places: list.iter().map(|found| found.code).collect(),
        package,
    })
}

/// The ROM at `path`.
pub(super) fn read_rom(path: &str) -> Result<Vec<u8>, Error> {
    let image = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let bytes = image.len() as u64;
    if !ROM_BYTES.contains(&bytes) || !bytes.is_multiple_of(PAGE) {
        return Err(Error::Size { path: path.into(), bytes });
    }
    Ok(image)
}

/// The BIOS extension that a display carries, with which a BIOS shows anything.
///
/// # Errors
/// The package is missing, or the file cannot be read.
pub fn display_rom(video: Video) -> Result<Vec<u8>, Error> {
    let Some((_, first, second)) = DISPLAY_ROMS.iter().find(|rom| rom.0 == video) else {
        return Ok(Vec::new());
    };
    let path = [*first, *second].into_iter().find(|path| Path::new(path).exists());
    let path = path.ok_or(Error::Missing {
        what: "BIOS for the display",
        places: vec![first, second],
        package: "seabios",
    })?;
    fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}
