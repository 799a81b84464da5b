//! Whether a machine makes sense on this host: the step after parsing.
//!
//! All problems are collected, so that the user mends them in one go. Each names the field as
//! the spec spells it, and the way out.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::host::{FileFact, HostFacts};
use crate::net::{PortForward, Protocol};
use crate::size::MemorySize;
use crate::spec::{
    Cdrom, Console, Disk, DiskBus, Display, FirmwareKind, MachineSpec, Net, TapNet, Vnc, VncAddress,
};

/// The most vCPUs a machine can have: interrupt messages name 8-bit APIC IDs (no interrupt
/// remapping), 255 of which is the broadcast.
pub const MAX_CPUS: u32 = 254;
/// The least memory: below it no kernel finds room.
pub const MIN_MEMORY: MemorySize = MemorySize::mib(4);
/// Memory comes in pages of this many bytes.
pub const PAGE: u64 = 4096;
/// The longest kernel command line in bytes, without the final zero: x86 Linux's
/// COMMAND_LINE_SIZE.
pub const MAX_CMDLINE: usize = 2047;
/// The longest disk serial number in bytes: virtio 1.2, 5.2.6.1, VIRTIO_BLK_T_GET_ID.
pub const MAX_SERIAL: usize = 20;
/// The longest name of a machine.
pub const MAX_NAME: usize = 63;
/// Ports of the chipset's SATA controller.
pub const MAX_SATA: usize = 6;
/// The most disks and network cards together: each is a function on the PCI bus, beside the
/// chipset's own.
pub const MAX_DEVICES: usize = 24;

/// One thing that is wrong with a spec.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The field, as in `disks[1].path`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
    /// What to do.
    pub help: String,
}

/// Everything that is wrong with a spec; never empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.what)
    }
}

impl fmt::Display for Problems {
    /// A line for each problem, followed by its way out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let start = if index == 0 { "" } else { "\n" };
            write!(f, "{start}{problem}\n  help: {}", problem.help)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

impl MachineSpec {
    /// Whether the machine makes sense on a host with these facts.
    ///
    /// # Errors
    /// Everything that is wrong, each with its field and the way out.
    pub fn validate(&self, host: &HostFacts) -> Result<(), Problems> {
        let mut check = Check { host, problems: Vec::new() };
        check.name(&self.name);
        check.cpus(self.cpus);
        check.memory(self.memory);
        check.boot(self);
        check.disks(&self.disks);
        check.cdroms(&self.cdroms, &self.disks);
        check.sata(self);
        check.display(self);
        check.console(self);
        check.nets(self);
        let own = |disk: &&Disk| !matches!(disk.bus, Some(DiskBus::Sata | DiskBus::Scsi));
        let devices = self.disks.iter().filter(own).count() + self.nets.len();
        if devices > MAX_DEVICES {
            let what = format!("{devices} disks and network cards together are too many");
            check.add("disks", what, format!("the PCI bus has room for {MAX_DEVICES} of them"));
        }
        if check.problems.is_empty() { Ok(()) } else { Err(Problems(check.problems)) }
    }
}

/// A validation under way.
struct Check<'a> {
    host: &'a HostFacts,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn add(&mut self, field: impl Into<String>, what: impl Into<String>, help: impl Into<String>) {
        self.problems.push(Problem { field: field.into(), what: what.into(), help: help.into() });
    }

    fn name(&mut self, name: &str) {
        let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !starts || name.len() > MAX_NAME || !name.chars().all(inner) {
            let help = format!(
                "use 1 to {MAX_NAME} letters, digits, '.', '_' or '-', the first a letter or digit"
            );
            self.add("name", format!("{name:?} cannot be a machine's name"), help);
        }
    }

    fn cpus(&mut self, cpus: u32) {
        if cpus == 0 || cpus > MAX_CPUS {
            let what = format!("a machine cannot have {cpus} CPUs");
            self.add("cpus", what, format!("use 1 to {MAX_CPUS}"));
        }
    }

    fn memory(&mut self, memory: MemorySize) {
        if memory < MIN_MEMORY {
            let what = format!("{memory} of memory is too little for a guest");
            self.add("memory", what, format!("use {MIN_MEMORY} or more; a Debian wants 512M"));
        } else if !memory.as_bytes().is_multiple_of(PAGE) {
            let what = format!("{memory} is no whole number of pages");
            self.add("memory", what, format!("use a multiple of {PAGE} bytes"));
        }
        if let Some(all) = self.host.memory.filter(|all| memory > *all) {
            let what = format!("{memory} is more than the host has");
            let mib = MemorySize::mib(all.as_bytes() >> 20);
            self.add("memory", what, format!("the whole host has {mib}; use less than that"));
        }
    }

    fn boot(&mut self, spec: &MachineSpec) {
        let boot = &spec.boot;
        let bootable = !spec.disks.is_empty() || !spec.cdroms.is_empty() || !spec.nets.is_empty();
        match &boot.kernel {
            Some(kernel) => self.readable("boot.kernel", kernel),
            None if bootable || boot.firmware.is_some() => {}
            None => self.add(
                "boot",
                "there is nothing to start",
                "give an installer with --cdrom FILE.iso, a disk with --disk FILE, or a Linux kernel with --kernel FILE",
            ),
        }
        if boot.kernel.is_some() && boot.firmware.is_some() {
            let help = "leave --firmware away: the kernel is started without any";
            self.add(
                "boot.firmware",
                "firmware does not start kernels that are given as files",
                help,
            );
        }
        if boot.kernel.is_none() && boot.initrd.is_some() {
            self.add(
                "boot.initrd",
                "there is an initrd, but no kernel",
                "give the kernel with --kernel FILE",
            );
        }
        for (field, list) in [("boot.order", &boot.order), ("boot.once", &boot.once)] {
            if let Some(twice) = list.iter().enumerate().find(|(i, kind)| list[..*i].contains(kind))
            {
                self.add(field, format!("'{}' is in it twice", twice.1), "name each kind once");
            }
        }
        if let Some(initrd) = &boot.initrd {
            self.readable("boot.initrd", initrd);
        }
        if boot.cmdline.len() > MAX_CMDLINE {
            let what = format!("the command line is {} bytes long", boot.cmdline.len());
            self.add("boot.cmdline", what, format!("Linux reads {MAX_CMDLINE} bytes at most"));
        }
        if boot.cmdline.contains('\0') {
            self.add(
                "boot.cmdline",
                "it contains a zero byte",
                "Linux would stop there: remove it",
            );
        }
    }

    /// `path` is a file or block device that exists; returns whether it is.
    fn exists(&mut self, field: &str, path: &Path) -> bool {
        let shown = path.display();
        if path.as_os_str().is_empty() {
            self.add(field, "the file's name is empty", "give the path of a file");
            return false;
        }
        let (what, help) = match self.host.files.get(path) {
            Some(FileFact::File { .. }) => return true,
            // Gathered for another spec: the one who opens the file will tell.
            None => return false,
            Some(FileFact::Missing { .. }) => (
                format!("'{shown}' does not exist"),
                "check the path; it is relative to where you are",
            ),
            Some(FileFact::Directory) => {
                (format!("'{shown}' is a directory"), "give a file or a block device")
            }
            Some(FileFact::Special) => (
                format!("'{shown}' is neither a file nor a block device"),
                "give a file or a block device",
            ),
            Some(FileFact::Unknown(why)) => (
                format!("cannot look at '{shown}': {why}"),
                "check the directories that lead to it",
            ),
        };
        self.add(field, what, help);
        false
    }

    fn readable(&mut self, field: &str, path: &Path) {
        if !self.exists(field, path) {
            return;
        }
        if let Some(FileFact::File { unreadable: Some(why), .. }) = self.host.files.get(path) {
            let what = format!("cannot read '{}': {why}", path.display());
            let help = "give yourself the right to read it (chmod, chown, or a group that has it)";
            self.add(field, what, help);
        }
    }

    fn disks(&mut self, disks: &[Disk]) {
        let mut seen: BTreeMap<(u64, u64), usize> = BTreeMap::new();
        let mut serials: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, disk) in disks.iter().enumerate() {
            let field = format!("disks[{index}].path");
            self.readable(&field, &disk.path);
            if let Some(FileFact::File { id, unwritable, unreadable }) =
                self.host.files.get(&disk.path)
            {
                if let (Some(why), None, false) = (unwritable, unreadable, disk.readonly) {
                    let what = format!("cannot write '{}': {why}", disk.path.display());
                    let help = "give yourself the right to write it, or add ',readonly'";
                    self.add(&field, what, help);
                }
                if let Some(first) = seen.insert(*id, index)
                    && !(disk.readonly && disks[first].readonly)
                {
                    let what = format!("'{}' is also disk {first}", disk.path.display());
                    let help = "give each disk an image of its own, or make both readonly";
                    self.add(&field, what, help);
                }
            }
            if let Some(serial) = &disk.serial {
                self.serial(index, serial);
                if let Some(first) = serials.insert(serial, index) {
                    let what = format!("disk {first} has the serial number {serial:?} too");
                    let help = "give each disk its own: the guest names disks by it";
                    self.add(format!("disks[{index}].serial"), what, help);
                }
            }
        }
    }

    fn cdroms(&mut self, cdroms: &[Cdrom], disks: &[Disk]) {
        for (index, drive) in cdroms.iter().enumerate() {
            if drive.bus == Some(DiskBus::Virtio) {
                let what = "a virtio block device cannot be a CD-ROM drive";
                self.add(format!("cdroms[{index}].bus"), what, "use sata or scsi");
            }
            let Some(path) = &drive.path else { continue };
            let field = format!("cdroms[{index}].path");
            self.readable(&field, path);
            let id = |path: &Path| match self.host.files.get(path) {
                Some(FileFact::File { id, .. }) => Some(*id),
                _ => None,
            };
            let own = id(path);
            let same = |disk: &Disk| !disk.readonly && own.is_some() && id(&disk.path) == own;
            if let Some(disk) = disks.iter().position(same) {
                let what = format!("'{}' is also disk {disk}, which is written", path.display());
                self.add(
                    field,
                    what,
                    "give the disk an image of its own, or add ',readonly' to it",
                );
            }
        }
    }

    fn sata(&mut self, spec: &MachineSpec) {
        let disks = spec.disks.iter().filter(|disk| disk.bus == Some(DiskBus::Sata)).count();
        let drives = spec.cdroms.iter().filter(|drive| drive.bus == Some(DiskBus::Sata)).count();
        if disks + drives > MAX_SATA {
            let what = format!("{} disks and CD-ROM drives on SATA are too many", disks + drives);
            self.add("disks", what, format!("SATA has {MAX_SATA} ports; give some bus=scsi"));
        }
        if disks + drives > 0 && spec.boot.firmware_kind() == Some(FirmwareKind::Bios) {
            let what = "the BIOS stands still in front of this SATA controller";
            self.add("disks", what, "use bus=scsi, or --firmware uefi");
        }
    }

    fn display(&mut self, spec: &MachineSpec) {
        let Display::Vnc(Vnc { listen, password_file, tls_cert, tls_key }) = &spec.display else {
            return;
        };
        let files =
            [("password-file", password_file), ("tls-cert", tls_cert), ("tls-key", tls_key)];
        for (key, path) in files {
            if let Some(path) = path {
                self.readable(&format!("display.vnc.{key}"), path);
            }
        }
        if tls_cert.is_some() != tls_key.is_some() {
            let what = "a certificate and its key belong together, and one is missing";
            self.add("display.vnc", what, "give both tls-cert=FILE and tls-key=FILE, or none");
        }
        // What a viewer types goes to the guest: that is for nobody else on the network.
        if let VncAddress::Tcp(address) = listen
            && !address.ip().is_loopback()
            && password_file.is_none()
        {
            let what = format!("{address} lets everybody who reaches this host use the machine");
            let help =
                "listen on 127.0.0.1 or unix:PATH (and come by ssh), or give a password-file";
            self.add("display.vnc.listen", what, help);
        }
    }

    fn serial(&mut self, index: usize, serial: &str) {
        let printable = serial.bytes().all(|b| b.is_ascii_graphic());
        if serial.is_empty() || serial.len() > MAX_SERIAL || !printable {
            let what = format!("{serial:?} cannot be a serial number");
            let help = format!("use 1 to {MAX_SERIAL} printable ASCII characters, no spaces");
            self.add(format!("disks[{index}].serial"), what, help);
        }
    }

    fn console(&mut self, spec: &MachineSpec) {
        let Console::File(path) = &spec.console else { return };
        let shown = path.display();
        match self.host.files.get(path) {
            Some(FileFact::Missing { has_parent: true }) | None => {}
            Some(FileFact::Missing { has_parent: false }) => {
                let what = format!("the directory of '{shown}' does not exist");
                self.add("console.file", what, "make it first (mkdir -p)");
            }
            Some(FileFact::File { id, unwritable, .. }) => {
                if let Some(why) = unwritable {
                    let what = format!("cannot write '{shown}': {why}");
                    self.add("console.file", what, "give another file, or the right to write it");
                }
                let id = *id;
                if let Some(other) = self.same_file(spec, id) {
                    let what = format!("'{shown}' is the machine's {other} too");
                    self.add("console.file", what, "give the console a file of its own");
                }
            }
            Some(FileFact::Directory | FileFact::Special | FileFact::Unknown(_)) => {
                self.exists("console.file", path);
            }
        }
    }

    /// What else in the spec is the file with this identity.
    fn same_file(&self, spec: &MachineSpec, id: (u64, u64)) -> Option<String> {
        let is = |path: &PathBuf| matches!(self.host.files.get(path), Some(FileFact::File { id: other, .. }) if *other == id);
        if spec.boot.kernel.as_ref().is_some_and(is) {
            return Some("kernel".into());
        }
        if spec.boot.initrd.as_ref().is_some_and(is) {
            return Some("initrd".into());
        }
        spec.disks.iter().position(|disk| is(&disk.path)).map(|index| format!("disk {index}"))
    }

    fn nets(&mut self, spec: &MachineSpec) {
        let mut macs = BTreeMap::new();
        let mut taps = BTreeMap::new();
        let mut forwards: Vec<(usize, PortForward)> = Vec::new();
        for (index, net) in spec.nets.iter().enumerate() {
            let kind = match net {
                Net::User(_) => "user",
                Net::Tap(_) => "tap",
            };
            let mac = spec.mac_of(index);
            let field = format!("nets[{index}].{kind}.mac");
            if !mac.is_usable() {
                let help = "use one whose first byte is even, as in 52:54:00:12:34:56";
                self.add(field, format!("{mac} names no single card"), help);
            } else if let Some(first) = macs.insert(mac, index) {
                let what = format!("network card {first} has {mac} too");
                self.add(field, what, "give each card an address of its own");
            }
            match net {
                Net::Tap(tap) => {
                    self.tap(index, tap);
                    if let Some(first) = taps.insert(&tap.name, index) {
                        let what = format!("network card {first} uses '{}' too", tap.name);
                        let help = "give each card a tap of its own";
                        self.add(format!("nets[{index}].tap.name"), what, help);
                    }
                }
                Net::User(user) => {
                    for forward in &user.forward {
                        self.forward(index, forward, &forwards);
                        forwards.push((index, *forward));
                    }
                }
            }
        }
    }

    fn tap(&mut self, index: usize, tap: &TapNet) {
        let field = format!("nets[{index}].tap.name");
        let name = &tap.name;
        if self.host.taps.contains(name) {
            return;
        }
        // Linux's dev_valid_name(): IFNAMSIZ is 16 with the final zero.
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if name.is_empty() || name.len() > 15 || name.contains(bad) || name == "." || name == ".." {
            let help = "use 1 to 15 characters without spaces, '/' or ':'";
            self.add(field, format!("{name:?} cannot be an interface's name"), help);
        } else if self.host.other_interfaces.contains(name) {
            let help = "give a tap; to reach the network of this interface, bridge a tap with it";
            self.add(field, format!("the interface '{name}' is no tap"), help);
        } else {
            let help = format!("make it, as root: ip tuntap add dev {name} mode tap user $USER");
            self.add(field, format!("there is no tap '{name}' on this host"), help);
        }
    }

    fn forward(&mut self, index: usize, forward: &PortForward, others: &[(usize, PortForward)]) {
        let clash = others.iter().find(|(_, other)| {
            let same = other.host == forward.host && other.protocol == forward.protocol;
            let any = other.address.is_unspecified() || forward.address.is_unspecified();
            same && (any || other.address == forward.address)
        });
        if let Some((first, other)) = clash {
            let protocol = match forward.protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
            };
            let what = format!(
                "{forward} wants the host's {protocol} port {}, which network card {first} \
                 forwards already ({other})",
                forward.host
            );
            self.add(format!("nets[{index}].user.forward"), what, "use another port of the host");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::MacAddr;
    use crate::spec::{BootDevice, UserNet};

    fn file(inode: u64) -> FileFact {
        FileFact::File { id: (1, inode), unreadable: None, unwritable: None }
    }

    fn host() -> HostFacts {
        let files = [
            ("/k", file(1)),
            ("/a", file(2)),
            ("/same-as-a", file(2)),
            ("/b", file(3)),
            ("/dir", FileFact::Directory),
            ("/pipe", FileFact::Special),
            ("/no", FileFact::Missing { has_parent: true }),
            ("/no/no", FileFact::Missing { has_parent: false }),
            ("/closed/x", FileFact::Unknown("permission denied".into())),
            (
                "/secret",
                FileFact::File {
                    id: (1, 4),
                    unreadable: Some("permission denied".into()),
                    unwritable: Some("permission denied".into()),
                },
            ),
            (
                "/rom",
                FileFact::File {
                    id: (1, 5),
                    unreadable: None,
                    unwritable: Some("read-only file system".into()),
                },
            ),
        ];
        HostFacts {
            memory: Some(MemorySize::gib(8)),
            files: files.into_iter().map(|(path, fact)| (path.into(), fact)).collect(),
            taps: ["tap0".to_owned()].into(),
            other_interfaces: ["eth0".to_owned()].into(),
        }
    }

    fn good() -> MachineSpec {
        let mut spec = MachineSpec::default();
        spec.boot.kernel = Some("/k".into());
        spec
    }

    fn disk(path: &str) -> Disk {
        Disk { path: path.into(), ..Disk::default() }
    }

    /// Changes a good spec and returns the fields that are complained about.
    fn fields(change: impl FnOnce(&mut MachineSpec)) -> Vec<String> {
        let mut spec = good();
        change(&mut spec);
        let problems = spec.validate(&host()).err().map_or_else(Vec::new, |problems| problems.0);
        for problem in &problems {
            assert!(!problem.what.is_empty() && !problem.help.is_empty(), "{problem:?}");
        }
        problems.into_iter().map(|problem| problem.field).collect()
    }

    #[test]
    fn a_good_machine_passes() {
        assert_eq!(
            fields(|spec| {
                spec.cpus = MAX_CPUS;
                spec.memory = MemorySize::gib(8);
                spec.disks = vec![disk("/a"), disk("/b")];
                spec.disks[0].serial = Some("x".repeat(20));
                spec.disks.push(Disk { readonly: true, ..disk("/rom") });
                let forward = vec![PortForward::tcp(80, 80), "80:80/udp".parse().unwrap()];
                spec.nets.push(Net::User(UserNet { forward, mac: None }));
                spec.nets.push(Net::Tap(TapNet { name: "tap0".into(), mac: None }));
                spec.console = Console::File("/no".into());
            }),
            [""; 0]
        );
    }

    #[test]
    fn numbers_have_limits() {
        assert_eq!(fields(|s| s.cpus = 0), ["cpus"]);
        assert_eq!(fields(|s| s.cpus = 255), ["cpus"]);
        assert_eq!(fields(|s| s.memory = MemorySize::bytes(0)), ["memory"]);
        assert_eq!(fields(|s| s.memory = MemorySize::bytes((64 << 20) + 1)), ["memory"]);
        assert_eq!(fields(|s| s.memory = MemorySize::gib(9)), ["memory"]);
        assert_eq!(fields(|s| s.memory = MemorySize::bytes(u64::MAX)), ["memory", "memory"]);
        assert_eq!(fields(|s| s.boot.cmdline = "x".repeat(2048)), ["boot.cmdline"]);
        assert_eq!(fields(|s| s.boot.cmdline = "a\0b".into()), ["boot.cmdline"]);
        assert_eq!(fields(|s| s.disks = vec![disk("/elsewhere"); 25]), ["disks"]);
    }

    #[test]
    fn names_are_plain() {
        for name in ["", "-x", "a b", "a/b", "é", &"x".repeat(64)] {
            assert_eq!(fields(|s| s.name = name.into()), ["name"], "{name}");
        }
        for name in ["a", "web-1.example_x", &"x".repeat(63)] {
            assert_eq!(fields(|s| s.name = name.into()), [""; 0], "{name}");
        }
    }

    #[test]
    fn files_must_be_there_and_open() {
        for path in ["/no", "/no/no", "/dir", "/pipe", "/closed/x", "/secret", ""] {
            assert_eq!(fields(|s| s.boot.kernel = Some(path.into())), ["boot.kernel"], "{path}");
            assert_eq!(fields(|s| s.boot.initrd = Some(path.into())), ["boot.initrd"], "{path}");
            assert_eq!(fields(|s| s.disks = vec![disk(path)]), ["disks[0].path"], "{path}");
        }
        assert_eq!(fields(|s| s.boot.kernel = None), ["boot"]);
        assert_eq!(fields(|s| s.disks = vec![disk("/rom")]), ["disks[0].path"]);
        let firmware = |s: &mut MachineSpec, kind| {
            s.boot.kernel = None;
            s.boot.firmware = kind;
        };
        assert!(fields(|s| firmware(s, Some(FirmwareKind::Uefi))).is_empty());
        assert_eq!(fields(|s| s.boot.firmware = Some(FirmwareKind::Bios)), ["boot.firmware"]);
        assert_eq!(fields(|s| s.boot.firmware = Some(FirmwareKind::Uefi)), ["boot.firmware"]);
        let order = vec![BootDevice::Disk, BootDevice::Cdrom, BootDevice::Disk];
        assert_eq!(fields(|s| s.boot.once = order), ["boot.once"]);
        let initrd_alone = |s: &mut MachineSpec| {
            firmware(s, Some(FirmwareKind::Bios));
            s.boot.initrd = Some("/a".into());
        };
        assert_eq!(fields(initrd_alone), ["boot.initrd"]);
    }

    #[test]
    fn drives() {
        let drive = |path: &str, bus| Cdrom { path: Some(path.into()), bus };
        let with = |drives: Vec<Cdrom>| fields(|s| s.cdroms = drives);
        assert!(with(vec![drive("/rom", None), Cdrom::default()]).is_empty());
        assert_eq!(with(vec![drive("/no", None)]), ["cdroms[0].path"]);
        assert_eq!(with(vec![drive("/rom", Some(DiskBus::Virtio))]), ["cdroms[0].bus"]);
        let sata = drive("/rom", Some(DiskBus::Sata));
        assert!(with(vec![sata.clone(); 6]).is_empty());
        assert_eq!(with(vec![sata.clone(); 7]), ["disks"]);
        let bios = |s: &mut MachineSpec| {
            s.boot.kernel = None;
            s.cdroms = vec![sata];
        };
        assert_eq!(fields(bios), ["disks"]);
        let shared = |readonly| {
            fields(|s| {
                s.disks = vec![Disk { readonly, ..disk("/a") }];
                s.cdroms = vec![drive("/same-as-a", None)];
            })
        };
        assert_eq!(shared(false), ["cdroms[0].path"]);
        assert!(shared(true).is_empty());
    }

    #[test]
    fn displays() {
        let vnc = |listen: &str, change: fn(&mut Vnc)| {
            let listen = listen.parse().unwrap();
            let mut vnc = Vnc { listen, password_file: None, tls_cert: None, tls_key: None };
            change(&mut vnc);
            fields(|s| s.display = Display::Vnc(vnc))
        };
        assert!(vnc("127.0.0.1:5901", |_| ()).is_empty());
        assert!(vnc("unix:/x", |_| ()).is_empty());
        assert_eq!(vnc("0.0.0.0:5901", |_| ()), ["display.vnc.listen"]);
        assert!(vnc("0.0.0.0:5901", |v| v.password_file = Some("/rom".into())).is_empty());
        assert_eq!(
            vnc("[::1]:1", |v| v.password_file = Some("/no".into())),
            ["display.vnc.password-file"]
        );
        assert_eq!(vnc("[::1]:1", |v| v.tls_cert = Some("/rom".into())), ["display.vnc"]);
    }

    #[test]
    fn two_writers_are_refused() {
        assert_eq!(fields(|s| s.disks = vec![disk("/a"), disk("/same-as-a")]), ["disks[1].path"]);
        let shared = |path| Disk { readonly: true, ..disk(path) };
        let with = |a, b| fields(|s| s.disks = vec![a, b]);
        assert_eq!(with(shared("/a"), shared("/same-as-a")), [""; 0]);
        assert_eq!(with(shared("/a"), disk("/a")), ["disks[1].path"]);
    }

    #[test]
    fn serials_are_short_and_apart() {
        for serial in ["", "has space", &"x".repeat(21), "ü"] {
            let disks = vec![Disk { serial: Some(serial.into()), ..disk("/a") }];
            assert_eq!(fields(|s| s.disks = disks), ["disks[0].serial"], "{serial}");
        }
        let with = |path| Disk { serial: Some("S".into()), ..disk(path) };
        assert_eq!(fields(|s| s.disks = vec![with("/a"), with("/b")]), ["disks[1].serial"]);
    }

    #[test]
    fn consoles_write_only_to_files_of_their_own() {
        let with = |path: &str| fields(|s| s.console = Console::File(path.into()));
        assert_eq!(with("/b"), [""; 0]);
        for path in ["/no/no", "/dir", "/rom", "/k", "/closed/x"] {
            assert_eq!(with(path), ["console.file"], "{path}");
        }
        let twice = fields(|s| {
            s.disks.push(disk("/a"));
            s.console = Console::File("/same-as-a".into());
        });
        assert_eq!(twice, ["console.file"]);
    }

    #[test]
    fn cards() {
        let tap = |name: &str| Net::Tap(TapNet { name: name.into(), mac: None });
        for name in ["", "eth0", "tap1", "a name", "x/y", "much-too-long-name"] {
            assert_eq!(fields(|s| s.nets = vec![tap(name)]), ["nets[0].tap.name"], "{name}");
        }
        assert_eq!(fields(|s| s.nets = vec![tap("tap0"), tap("tap0")]), ["nets[1].tap.name"]);
        let user = |forward: &[&str], mac| {
            let forward = forward.iter().map(|text| text.parse().unwrap()).collect();
            Net::User(UserNet { forward, mac })
        };
        let mac = Some(MacAddr([2, 0, 0, 0, 0, 1]));
        let same = vec![user(&[], mac), user(&[], mac)];
        assert_eq!(fields(|s| s.nets = same), ["nets[1].user.mac"]);
        let group = vec![user(&[], Some(MacAddr([1, 0, 0, 0, 0, 1])))];
        assert_eq!(fields(|s| s.nets = group), ["nets[0].user.mac"]);
        let clash = vec![user(&["80:1"], None), user(&["0.0.0.0:80:2"], None)];
        assert_eq!(fields(|s| s.nets = clash), ["nets[1].user.forward"]);
        let apart = vec![user(&["80:1", "10.0.0.1:80:2", "80:1/udp"], None)];
        assert_eq!(fields(|s| s.nets = apart), [""; 0]);
    }

    #[test]
    fn all_problems_come_at_once_each_with_a_way_out() {
        let mut spec = MachineSpec { cpus: 0, name: "-".into(), ..MachineSpec::default() };
        spec.disks.push(disk("/no"));
        let problems = spec.validate(&host()).unwrap_err();
        assert_eq!(problems.0.len(), 3);
        let text = problems.to_string();
        assert_eq!(text.lines().count(), 6, "{text}");
        assert!(text.contains("disks[0].path: '/no' does not exist\n  help: check"), "{text}");
    }
}
