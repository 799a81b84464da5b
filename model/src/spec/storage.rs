//! Disks and CD-ROM drives.

use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::is_false;

/// A disk: on the command line `FILE[,format=raw|qcow2][,readonly][,serial=S][,bus=virtio|scsi|sata]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The image file or block device.
    pub path: PathBuf,
    /// The image's format. Without it the image's first bytes decide; say it for a raw image
    /// that a guest you do not trust has written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The guest can only read it, and so can others at the same time.
    #[serde(default, skip_serializing_if = "is_false")]
    pub readonly: bool,
    /// The serial number that the guest sees, up to 20 printable ASCII characters; Linux makes
    /// `/dev/disk/by-id/virtio-SERIAL` of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// What the disk is connected to [default: virtio].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<DiskBus>,
}

/// How a disk's bytes are kept in a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// What a disk or a drive is connected to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// A virtio block device of its own: the fastest. Not for CD-ROM drives.
    Virtio,
    /// The machine's virtio SCSI controller: for many disks.
    Scsi,
    /// The chipset's SATA controller, which systems without virtio drivers know: six disks and drives. With UEFI or
    /// a kernel of one's own: the BIOS stands still in front of it.
    Sata,
}

impl fmt::Display for DiskBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Virtio => "virtio",
            Self::Scsi => "scsi",
            Self::Sata => "sata",
        })
    }
}

/// A CD-ROM drive: on the command line `FILE[,bus=scsi|sata]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cdrom {
    /// The ISO image in it. Without it the drive is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What the drive is connected to, `scsi` or `sata` [default: scsi].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<DiskBus>,
}
