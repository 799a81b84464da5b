//! What a machine is asked to be.
//!
//! Every field here is a flag of `lodge run`, a key of a spec file and a row of `docs/spec.md`;
//! the doc comments are the users' reference. Adding a field means adding it here, a flag in
//! `cli`, a check in [`crate::validate`] where one makes sense, and writing the page anew.

mod boot;
mod screen;
mod storage;

use std::fmt;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::control::place::ControlPlace;
use crate::net::{MacAddr, PortForward};
use crate::size::MemorySize;

pub use boot::{BadBoot, Boot, BootDevice, BootFlag, DEFAULT_CMDLINE, FirmwareKind};
pub use screen::{BadVncAddress, Display, Video, Vnc, VncAddress};
pub use storage::{Cdrom, Disk, DiskBus, DiskFormat};

/// What a machine is called that was given no name.
pub const DEFAULT_NAME: &str = "guest";

/// A machine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MachineSpec {
    /// What the machine is called, in messages and as its process's name: letters, digits, `.`,
    /// `_` and `-`, up to 63 of them, the first a letter or digit.
    pub name: String,
    /// How many vCPUs the guest has. More than the host has is allowed, and slow.
    pub cpus: u32,
    /// How much memory the guest has.
    pub memory: MemorySize,
    /// What runs the vCPUs.
    pub accel: Accel,
    /// What the machine starts with.
    pub boot: Boot,
    /// Where the guest's serial port (COM1, `ttyS0` in Linux) is connected to.
    pub console: Console,
    /// The disks, in the order in which the guest finds them: virtio block devices are `vda`,
    /// `vdb`, ... in Linux, the others `sda`, `sdb`, ...
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// The CD-ROM drives.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cdroms: Vec<Cdrom>,
    /// The network cards, in the order in which the guest finds them: virtio network devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<Net>,
    /// The display that the guest finds. Without it a machine with firmware has `vga`, and one that starts a kernel
    /// directly has none unless somebody sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub video: Option<Video>,
    /// Who sees the display.
    pub display: Display,
    /// A file (PNG) for the display's last picture, written when the machine ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub screenshot: Option<PathBuf>,
    /// The Unix socket at which `lodge ctl` reaches the machine, or `none`. Without it `lodge/NAME.sock` in the user's
    /// runtime directory, where a machine that was given no name is `guest-` and the number of its process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<ControlPlace>,
    /// The guest can end the machine by writing a value to port F4H, which becomes the exit code:
    /// for test guests.
    #[serde(skip_serializing_if = "is_false")]
    pub debug_exit: bool,
}

impl Default for MachineSpec {
    fn default() -> Self {
        Self {
            name: DEFAULT_NAME.into(),
            cpus: 1,
            memory: MemorySize::gib(1),
            accel: Accel::default(),
            boot: Boot::default(),
            console: Console::default(),
            disks: Vec::new(),
            cdroms: Vec::new(),
            video: None,
            display: Display::default(),
            screenshot: None,
            control: None,
            nets: Vec::new(),
            debug_exit: false,
        }
    }
}

/// What runs vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where it runs the guest's kernel natively (it is measured), the software CPU elsewhere.
    #[default]
    Auto,
    /// The host's KVM, or an error that says what is missing.
    Kvm,
    /// The software CPU.
    Soft,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        })
    }
}

/// A network card.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Net {
    /// A network of the machine's own, with DHCP and DNS, that reaches what the host reaches. It
    /// needs no rights; the program `passt` carries it. On the command line
    /// `user[,forward=[ADDRESS:]HOSTPORT:GUESTPORT[/udp]]...[,mac=MAC]`.
    User(UserNet),
    /// A tap interface of the host. On the command line `tap=NAME[,mac=MAC]`.
    Tap(TapNet),
}

impl Net {
    /// The MAC address that was asked for.
    pub fn mac(&self) -> Option<MacAddr> {
        match self {
            Self::User(user) => user.mac,
            Self::Tap(tap) => tap.mac,
        }
    }
}

/// A card on a network of the machine's own.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UserNet {
    /// Ports of the host that lead to ports of the guest, each
    /// `[ADDRESS:]HOSTPORT:GUESTPORT[/udp]`. Without an address only programs on the same host
    /// reach it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<PortForward>,
    /// The card's MAC address. Without it one is made up from the machine's name and the card's
    /// place, the same each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// A card on a tap interface of the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapNet {
    /// The interface's name. It must exist: `ip tuntap add dev NAME mode tap user USER`.
    pub name: String,
    /// The card's MAC address. Without it one is made up from the machine's name and the card's
    /// place, the same each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// Where a serial port leads to.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// The terminal in which the machine was started, in raw mode: Ctrl-A X ends the machine,
    /// Ctrl-A H tells the other keys.
    #[default]
    Stdio,
    /// What the guest prints is added to this file; it reads nothing. On the command line
    /// `file=PATH`.
    File(PathBuf),
    /// Nowhere: what the guest prints is lost, and it reads nothing.
    None,
}

impl MachineSpec {
    /// Reads a spec file.
    ///
    /// # Errors
    /// What is wrong with it, and where: not TOML, an unknown key, a value of another kind.
    pub fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The spec as a file that [`Self::from_toml`] reads back to the same.
    ///
    /// # Errors
    /// A path is not UTF-8, which TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The MAC address of the card at `index`: what was asked for, or else one made from the
    /// machine's name and the card's place. Made-up ones are locally administered (IEEE 802,
    /// bit 1 of the first byte).
    pub fn mac_of(&self, index: usize) -> MacAddr {
        if let Some(mac) = self.nets.get(index).and_then(Net::mac) {
            return mac;
        }
        // FNV-1a: spreads names well, and is the same in every release, as guests name their
        // interfaces and leases by the address.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in self.name.bytes().chain((index as u64).to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let [a, b, c, d, ..] = (hash ^ (hash >> 32)).to_le_bytes();
        MacAddr([0x52, 0x54, a, b, c, d])
    }

    /// The display that the guest finds.
    pub fn video_kind(&self) -> Video {
        self.video.unwrap_or(match (self.boot.firmware_kind(), &self.display) {
            (None, Display::None) => Video::None,
            _ => Video::Vga,
        })
    }

    /// Where the UEFI variables are: where the spec says, or else in the user's state directory (XDG Base
    /// Directory Specification) under the machine's name.
    pub fn variables_path(&self) -> PathBuf {
        if let Some(path) = &self.boot.uefi_vars {
            return path.clone();
        }
        let home = || std::env::home_dir().unwrap_or_else(|| "/var/lib".into());
        let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        let state = state.filter(|path| path.is_absolute());
        let state = state.unwrap_or_else(|| home().join(".local/state"));
        state.join("lodge").join(&self.name).join("uefi-vars.fd")
    }

    /// The files that the spec names.
    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let boot = &mut self.boot;
        let boot = [boot.kernel.as_mut(), boot.initrd.as_mut(), boot.uefi_vars.as_mut()];
        let console = match &mut self.console {
            Console::File(path) => Some(path),
            Console::Stdio | Console::None => None,
        };
        let display = match &mut self.display {
            Display::None => Vec::new(),
            Display::Vnc(vnc) => {
                let socket = match &mut vnc.listen {
                    VncAddress::Unix(path) => Some(path),
                    VncAddress::Tcp(_) => None,
                };
                let files = [&mut vnc.password_file, &mut vnc.tls_cert, &mut vnc.tls_key];
                files.into_iter().filter_map(Option::as_mut).chain(socket).collect()
            }
        };
        let disks = self.disks.iter_mut().map(|disk| &mut disk.path);
        let cdroms = self.cdroms.iter_mut().filter_map(|drive| drive.path.as_mut());
        let control = match &mut self.control {
            Some(ControlPlace::Path(path)) => Some(path),
            Some(ControlPlace::None) | None => None,
        };
        let others = console.into_iter().chain(self.screenshot.as_mut()).chain(control);
        boot.into_iter().flatten().chain(others).chain(display).chain(disks).chain(cdroms)
    }

    /// Makes the paths absolute, against `base`: a spec file's paths are relative to the file.
    pub fn resolve_paths(&mut self, base: &Path) {
        for path in self.paths_mut() {
            if !path.as_os_str().is_empty() {
                *path = base.join(&*path);
            }
        }
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> MachineSpec {
        MachineSpec {
            name: "web".into(),
            cpus: 2,
            memory: MemorySize::mib(1536),
            accel: Accel::Soft,
            boot: Boot {
                kernel: Some("/k".into()),
                initrd: Some("/i".into()),
                cmdline: "quiet \"x\"".into(),
                firmware: Some(FirmwareKind::Uefi),
                uefi_vars: Some("/v".into()),
                order: vec![BootDevice::Network],
                once: vec![BootDevice::Cdrom],
                menu: true,
            },
            console: Console::File("/tmp/log".into()),
            disks: vec![
                Disk { path: "/a.qcow2".into(), ..Disk::default() },
                Disk {
                    path: "/b.raw".into(),
                    format: Some(DiskFormat::Raw),
                    readonly: true,
                    serial: Some("S1".into()),
                    bus: Some(DiskBus::Scsi),
                },
            ],
            cdroms: vec![Cdrom { path: Some("/i.iso".into()), bus: None }, Cdrom::default()],
            video: Some(Video::Virtio),
            display: Display::Vnc(Vnc {
                listen: VncAddress::Unix("/s".into()),
                password_file: Some("/p".into()),
                tls_cert: None,
                tls_key: None,
            }),
            screenshot: Some("/s.png".into()),
            control: Some(ControlPlace::Path("/c.sock".into())),
            nets: vec![
                Net::User(UserNet { forward: vec![PortForward::tcp(2222, 22)], mac: None }),
                Net::User(UserNet::default()),
                Net::Tap(TapNet { name: "tap0".into(), mac: Some(MacAddr([2, 0, 0, 0, 0, 1])) }),
            ],
            debug_exit: true,
        }
    }

    #[test]
    fn toml_and_json_read_back_what_they_wrote() {
        for spec in [MachineSpec::default(), full()] {
            assert_eq!(MachineSpec::from_toml(&spec.to_toml().unwrap()).unwrap(), spec);
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<MachineSpec>(&json).unwrap(), spec);
        }
    }

    #[test]
    fn the_form_of_a_file_is_this() {
        let text = r#"
            memory = "512M"
            console = { file = "/tmp/log" }
            [boot]
            kernel = "/boot/vmlinuz"
            [[disks]]
            path = "/a.img"
            [[nets]]
            user = { forward = ["2222:22"] }
            [[nets]]
            tap = { name = "tap0" }
        "#;
        let spec = MachineSpec::from_toml(text).unwrap();
        assert_eq!(spec.cpus, 1);
        assert_eq!(spec.memory, MemorySize::mib(512));
        assert_eq!(spec.boot.cmdline, DEFAULT_CMDLINE);
        assert_eq!(spec.disks[0].path, Path::new("/a.img"));
        assert_eq!(spec.nets.len(), 2);
    }

    #[test]
    fn unknown_keys_are_refused_everywhere() {
        for text in [
            "cpu = 1",
            "[boot]\nkernal = \"x\"",
            "[[disks]]\npath = \"x\"\nread_only = true",
            "[[nets]]\nuser = { port = 1 }",
            "[[nets]]\ntap = { name = \"t\", ip = 1 }",
            "[[nets]]\nbridge = { name = \"t\" }",
        ] {
            let error = MachineSpec::from_toml(text).unwrap_err().to_string();
            assert!(error.contains("unknown"), "{text}: {error}");
        }
    }

    #[test]
    fn made_up_macs_differ_and_last() {
        let mut spec = full();
        let first = spec.mac_of(0);
        assert!(first.is_usable());
        assert_ne!(first, spec.mac_of(1));
        assert_eq!(spec.mac_of(2), MacAddr([2, 0, 0, 0, 0, 1]));
        assert_eq!(first, full().mac_of(0));
        spec.name = "web2".into();
        assert_ne!(first, spec.mac_of(0));
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let mut spec = MachineSpec::from_toml(
            "console = { file = \"log\" }\n[boot]\nkernel = \"k\"\n[[disks]]\npath = \"/abs\"",
        )
        .unwrap();
        spec.resolve_paths(Path::new("/base"));
        assert_eq!(spec.boot.kernel.as_deref(), Some(Path::new("/base/k")));
        assert_eq!(spec.boot.initrd, None);
        assert_eq!(spec.console, Console::File("/base/log".into()));
        assert_eq!(spec.disks[0].path, Path::new("/abs"));
    }
}
