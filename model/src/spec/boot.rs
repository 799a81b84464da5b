//! What a machine starts with: a kernel, or firmware and what that boots from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::is_false;

/// The kernel command line where none is given: without a console on the serial port the
/// user would see nothing.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// What a machine starts with: firmware, as a PC does, or a Linux kernel directly.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Boot {
    /// The firmware. Without it a machine with a kernel starts that directly, and one without a kernel has a BIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<FirmwareKind>,
    /// The file with the UEFI variables, made when there is none. Without it they are in the user's state directory,
    /// under the machine's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uefi_vars: Option<PathBuf>,
    /// What the firmware tries to boot from, best first. Disks of one kind are tried in their order.
    #[serde(default = "default_order")]
    pub order: Vec<BootDevice>,
    /// What it tries before the order, at the first start only: a reset goes by the order alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub once: Vec<BootDevice>,
    /// Offer the firmware's boot menu for some seconds.
    #[serde(skip_serializing_if = "is_false")]
    pub menu: bool,
    /// The kernel to start: a bzImage (`/boot/vmlinuz-...`) or an ELF `vmlinux` with a PVH entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk to hand to the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl Default for Boot {
    fn default() -> Self {
        Self {
            firmware: None,
            uefi_vars: None,
            order: default_order(),
            once: Vec::new(),
            menu: false,
            kernel: None,
            initrd: None,
            cmdline: DEFAULT_CMDLINE.into(),
        }
    }
}

impl Boot {
    /// The firmware that the machine has, if any.
    pub fn firmware_kind(&self) -> Option<FirmwareKind> {
        self.firmware.or_else(|| self.kernel.is_none().then_some(FirmwareKind::Bios))
    }
}

/// A disk first: an installer's disk is empty at the first start, and has the system at the second.
fn default_order() -> Vec<BootDevice> {
    vec![BootDevice::Disk, BootDevice::Cdrom, BootDevice::Network]
}

/// A PC's firmware.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FirmwareKind {
    /// A BIOS (SeaBIOS), as PCs had it until about 2012.
    Bios,
    /// UEFI (OVMF), as PCs have it since.
    Uefi,
}

/// A kind of device to boot from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BootDevice {
    /// The disks.
    Disk,
    /// The CD-ROM drives.
    Cdrom,
    /// The network cards, by PXE.
    Network,
}

impl fmt::Display for BootDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
            Self::Network => "network",
        })
    }
}

/// The command line's `order=cdrom,disk,network`, `once=cdrom`, `menu`, in any combination, parted by commas.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BootFlag {
    /// [`Boot::order`], where it was given.
    pub order: Option<Vec<BootDevice>>,
    /// [`Boot::once`], where it was given.
    pub once: Option<Vec<BootDevice>>,
    /// [`Boot::menu`].
    pub menu: bool,
}

/// A word that has no place in `--boot`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "'{0}' has no place here: use order=cdrom,disk,network or once=cdrom or menu, or several of these with commas"
)]
pub struct BadBoot(String);

impl FromStr for BootFlag {
    type Err = BadBoot;

    fn from_str(text: &str) -> Result<Self, BadBoot> {
        let mut flag = Self::default();
        let mut list: Option<&mut Vec<BootDevice>> = None;
        for word in text.split(',') {
            let device = match word.split_once('=') {
                Some(("order", first)) => {
                    list = Some(flag.order.insert(Vec::new()));
                    first
                }
                Some(("once", first)) => {
                    list = Some(flag.once.insert(Vec::new()));
                    first
                }
                None if word == "menu" => {
                    flag.menu = true;
                    continue;
                }
                _ => word,
            };
            let device = match device {
                "disk" => BootDevice::Disk,
                "cdrom" => BootDevice::Cdrom,
                "network" => BootDevice::Network,
                _ => return Err(BadBoot(word.into())),
            };
            list.as_mut().ok_or_else(|| BadBoot(word.into()))?.push(device);
        }
        Ok(flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use BootDevice::{Cdrom, Disk, Network};

    #[test]
    fn the_flag_takes_lists_with_commas() {
        let flag: BootFlag = "order=cdrom,disk,network,once=cdrom,menu".parse().unwrap();
        assert_eq!(flag.order, Some(vec![Cdrom, Disk, Network]));
        assert_eq!((flag.once, flag.menu), (Some(vec![Cdrom]), true));
        let flag: BootFlag = "menu".parse().unwrap();
        assert_eq!((flag.order, flag.menu), (None, true));
        for bad in ["", "disk", "order=", "order=cdrom,usb", "twice=disk", "menu,disk"] {
            assert!(bad.parse::<BootFlag>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_kernel_needs_no_firmware_but_may_have_one() {
        let mut boot = Boot::default();
        assert_eq!(boot.firmware_kind(), Some(FirmwareKind::Bios));
        boot.kernel = Some("k".into());
        assert_eq!(boot.firmware_kind(), None);
        boot.firmware = Some(FirmwareKind::Uefi);
        assert_eq!(boot.firmware_kind(), Some(FirmwareKind::Uefi));
    }
}
