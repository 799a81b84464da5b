//! `lodge run`: from flags and a spec file to a spec, and from there to `lodge-vmm`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lodge_model::MemorySize;
use lodge_model::control::place::ControlPlace;
use lodge_model::exit::{self, ExitStatus};
use lodge_model::host::HostFacts;
use lodge_model::keyvalue;
use lodge_model::spec::{
    Accel, BootFlag, Cdrom, Console, Disk, DiskBus, Display, FirmwareKind, MachineSpec, Net, Video,
};
use serde::Deserialize;

use crate::failure::{Failure, chain};
use crate::launch;

/// Run a machine in this terminal until its guest powers off.
///
/// The machine is one process and lives as long as this command. In the terminal, Ctrl-A X ends
/// it and Ctrl-A H tells the other keys. SIGTERM presses its power button; a second one ends it.
#[derive(clap::Args)]
#[command(after_long_help = long_help())]
pub struct Args {
    /// What the machine is called [default: guest].
    #[arg(long)]
    name: Option<String>,

    /// How many vCPUs the guest has [default: 1].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<u32>,

    /// How much memory the guest has, such as 512M or 4G [default: 1G].
    #[arg(long, value_name = "SIZE", value_parser = parse::<MemorySize>, allow_negative_numbers = true)]
    memory: Option<MemorySize>,

    /// What runs the vCPUs: auto, kvm or soft [default: auto].
    ///
    /// auto takes KVM where it runs guest kernels natively (that is measured) and the software
    /// CPU elsewhere, and says which.
    #[arg(long, value_name = "ACCEL", value_parser = parse::<Accel>)]
    accel: Option<Accel>,

    /// A CD-ROM drive with this ISO image in it: FILE[,bus=scsi|sata]. Can be given several times.
    #[arg(long = "cdrom", value_name = "CDROM", value_parser = parse::<Cdrom>)]
    cdroms: Vec<Cdrom>,

    /// What the machine starts with: bios or uefi [default: bios; none with --kernel].
    #[arg(long, value_name = "FIRMWARE", value_parser = parse::<FirmwareKind>)]
    firmware: Option<FirmwareKind>,

    /// The file with the UEFI variables [default: one in the state directory, by the machine's name].
    #[arg(long, value_name = "FILE")]
    uefi_vars: Option<PathBuf>,

    /// Start with fresh UEFI variables; the old ones are kept in FILE.old.
    #[arg(long)]
    reset_uefi_vars: bool,

    /// What the firmware boots from: order=disk,cdrom,network (that is the default), once=cdrom for the first
    /// start alone, menu to offer a choice; several of these with commas.
    #[arg(long, value_name = "BOOT", value_parser = str::parse::<BootFlag>)]
    boot: Option<BootFlag>,

    /// Who sees the display: none, vnc=ADDRESS:PORT or vnc=unix:PATH [default: none].
    ///
    /// With vnc also: password-file=F (its first line is the password), tls-cert=F,tls-key=F.
    #[arg(long, value_name = "DISPLAY", value_parser = parse::<Display>)]
    display: Option<Display>,

    /// The display that the guest finds: vga, virtio or none [default: vga].
    #[arg(long, value_name = "VIDEO", value_parser = parse::<Video>)]
    video: Option<Video>,

    /// Write the display's last picture to this file when the machine ends.
    #[arg(long, value_name = "FILE.png")]
    screenshot: Option<PathBuf>,

    /// The Unix socket for lodge ctl, or none [default: NAME.sock in the user's runtime directory].
    #[arg(long, value_name = "PATH", value_parser = str::parse::<ControlPlace>)]
    control: Option<ControlPlace>,

    /// What disks are connected to that do not say it: virtio, scsi or sata [default: virtio].
    #[arg(long, value_name = "BUS", value_parser = parse::<DiskBus>)]
    bus: Option<DiskBus>,

    /// The Linux kernel to start: a bzImage or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// The kernel's command line [default: console=ttyS0].
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// A disk: FILE[,format=raw|qcow2][,readonly][,serial=S][,bus=B]. Can be given several times.
    #[arg(long = "disk", value_name = "DISK", value_parser = parse::<Disk>)]
    disks: Vec<Disk>,

    /// A network card: user[,forward=HOST:GUEST]... or tap=NAME[,mac=M]. Can be given several
    /// times.
    ///
    /// user is a network of the machine's own that reaches what this host reaches and needs no
    /// rights; forward leads from a port of this host to one of the guest:
    /// [ADDRESS:]HOSTPORT:GUESTPORT[/udp], for programs on this host only unless an address
    /// is given. tap is an interface of this host that exists already.
    #[arg(long = "net", value_name = "NET", value_parser = parse::<Net>)]
    nets: Vec<Net>,

    /// Where the guest's serial port leads to: stdio, file=PATH or none [default: stdio].
    #[arg(long, value_name = "CONSOLE", value_parser = parse::<Console>)]
    console: Option<Console>,

    /// Let the guest end the machine by a write to port F4H: for test guests.
    #[arg(long)]
    debug_exit: bool,

    /// Read the machine from this file first; flags then take the place of what it says.
    ///
    /// Any --disk takes the place of all disks in the file, any --net of all network cards.
    /// Paths in the file are relative to the file.
    #[arg(long, value_name = "FILE.toml")]
    spec: Option<PathBuf>,

    /// Print the machine as a file for --spec, and do not run it.
    #[arg(long)]
    print_spec: bool,
}

fn long_help() -> String {
    format!(
        "\
Examples:
  Install a system from an ISO onto a new disk (qemu-img create -f qcow2 new.qcow2 20G), seen with any VNC viewer:
      lodge run --memory 2G --cdrom debian-12.iso --disk new.qcow2 --net user \\
          --display vnc=127.0.0.1:5901
  Debian's kernel and a RAM disk, nothing else:
      lodge run --kernel vmlinuz --initrd initrd.img
  A Debian disk with a network, reached by ssh -p 2222 root@127.0.0.1:
      lodge run --cpus 2 --memory 1G --disk debian.qcow2 --net user,forward=2222:22 \\
          --kernel vmlinuz --initrd initrd.img --cmdline 'root=LABEL=lodge-root console=ttyS0'
  Keep a machine as a file, change one thing of it later:
      lodge run --disk debian.qcow2 --kernel vmlinuz --print-spec > web.toml
      lodge run --spec web.toml --memory 2G

A value with a comma in it is quoted: --disk '\"a,b.img\",readonly'.
docs/spec.md tells all keys of a spec file.

Exit codes:
{}",
        exit::table(2)
    )
}

/// A flag's value, in the form that the spec's struct gives it.
fn parse<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, keyvalue::Error> {
    keyvalue::from_str(text)
}

/// Runs the machine that the flags describe. Returns only where there is nothing to run or it
/// failed: a machine takes this process over.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let print = args.print_spec;
    let fresh_variables = args.reset_uefi_vars;
    let mut spec = args.into_spec()?;
    if print {
        let here = std::env::current_dir().map_err(|error| {
            Failure::failed(
                format!("cannot tell the current directory: {error}"),
                "change to a directory that exists",
            )
        })?;
        spec.resolve_paths(&here);
        let text = spec.to_toml().map_err(|error| {
            Failure::failed(
                format!("cannot write the machine as TOML: {error}"),
                "a path is not UTF-8: rename it",
            )
        })?;
        print!("{text}");
        return Ok(ExitStatus::Ok.into());
    }
    spec.validate(&HostFacts::gather(&spec)).map_err(|problems| {
        let list = problems.to_string().replace('\n', "\n  ");
        Failure::request(format!("the machine cannot be made as asked:\n  {list}"), "")
    })?;
    if fresh_variables {
        reset_variables(&spec)?;
    }
    Err(launch::take_over(&spec))
}

/// Puts the UEFI variables aside, so that the machine makes fresh ones.
fn reset_variables(spec: &MachineSpec) -> Result<(), Failure> {
    let path = spec.variables_path();
    let mut old = path.as_os_str().to_owned();
    old.push(".old");
    match fs::rename(&path, &old) {
        Ok(()) => eprintln!("lodge: the old UEFI variables are in '{}'", Path::new(&old).display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            let what = format!("cannot put the UEFI variables '{}' aside: {error}", path.display());
            return Err(Failure::request(what, "check the rights of its directory"));
        }
    }
    Ok(())
}

impl Args {
    fn into_spec(self) -> Result<MachineSpec, Failure> {
        let mut spec = match &self.spec {
            Some(path) => read_spec(path)?,
            None => MachineSpec::default(),
        };
        fn set<T>(field: &mut T, flag: Option<T>) {
            if let Some(value) = flag {
                *field = value;
            }
        }
        set(&mut spec.name, self.name);
        set(&mut spec.cpus, self.cpus);
        set(&mut spec.memory, self.memory);
        set(&mut spec.accel, self.accel);
        set(&mut spec.boot.kernel, self.kernel.map(Some));
        set(&mut spec.boot.initrd, self.initrd.map(Some));
        set(&mut spec.boot.cmdline, self.cmdline);
        set(&mut spec.disks, Some(self.disks).filter(|disks| !disks.is_empty()));
        set(&mut spec.nets, Some(self.nets).filter(|nets| !nets.is_empty()));
        set(&mut spec.cdroms, Some(self.cdroms).filter(|drives| !drives.is_empty()));
        set(&mut spec.boot.firmware, self.firmware.map(Some));
        set(&mut spec.boot.uefi_vars, self.uefi_vars.map(Some));
        if let Some(boot) = self.boot {
            set(&mut spec.boot.order, boot.order);
            set(&mut spec.boot.once, boot.once);
            spec.boot.menu |= boot.menu;
        }
        set(&mut spec.display, self.display);
        set(&mut spec.video, self.video.map(Some));
        set(&mut spec.screenshot, self.screenshot.map(Some));
        set(&mut spec.control, self.control.map(Some));
        if let Some(bus) = self.bus {
            spec.disks.iter_mut().for_each(|disk| disk.bus = disk.bus.or(Some(bus)));
        }
        set(&mut spec.console, self.console);
        spec.debug_exit |= self.debug_exit;
        Ok(spec)
    }
}

fn read_spec(path: &Path) -> Result<MachineSpec, Failure> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| {
        let help = "check the path; 'lodge run --print-spec' prints such a file";
        Failure::request(format!("cannot read the spec file '{shown}': {error}"), help)
    })?;
    let mut spec = MachineSpec::from_toml(&text).map_err(|error| {
        let message = format!("cannot understand the spec file '{shown}': {}", chain(&error));
        Failure::request(message.trim_end(), "docs/spec.md tells all keys of a spec file")
    })?;
    if let Some(folder) = path.parent() {
        spec.resolve_paths(folder);
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use lodge_model::net::PortForward;
    use lodge_model::spec::{BootDevice, DiskFormat, TapNet, UserNet};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn spec(flags: &[&str]) -> MachineSpec {
        let line = [&["run"], flags].concat();
        Line::try_parse_from(line).unwrap().args.into_spec().unwrap()
    }

    #[test]
    fn no_flags_are_the_defaults() {
        assert_eq!(spec(&[]), MachineSpec::default());
    }

    #[test]
    fn each_flag_is_a_field() {
        let line = "--name web --cpus 2 --memory 512M --accel soft --kernel k --initrd i \
                    --cmdline -quiet --disk a --disk b,format=raw,readonly,bus=scsi --console file=log \
                    --bus sata --cdrom c.iso --video virtio --firmware uefi --uefi-vars v --boot once=cdrom,menu \
                    --control c.sock \
                    --net user,forward=2222:22 --net tap=t0,mac=52:54:00:00:00:01";
        let made = spec(&line.split_whitespace().collect::<Vec<_>>());
        let mut expected = MachineSpec {
            name: "web".into(),
            cpus: 2,
            memory: MemorySize::mib(512),
            accel: Accel::Soft,
            console: Console::File("log".into()),
            disks: vec![
                Disk { path: "a".into(), bus: Some(DiskBus::Sata), ..Disk::default() },
                Disk {
                    path: "b".into(),
                    format: Some(DiskFormat::Raw),
                    readonly: true,
                    bus: Some(DiskBus::Scsi),
                    ..Disk::default()
                },
            ],
            cdroms: vec![Cdrom { path: Some("c.iso".into()), bus: None }],
            video: Some(Video::Virtio),
            nets: vec![
                Net::User(UserNet { forward: vec![PortForward::tcp(2222, 22)], mac: None }),
                Net::Tap(TapNet {
                    name: "t0".into(),
                    mac: Some("52:54:00:00:00:01".parse().unwrap()),
                }),
            ],
            ..MachineSpec::default()
        };
        expected.boot.kernel = Some("k".into());
        expected.boot.initrd = Some("i".into());
        expected.boot.cmdline = "-quiet".into();
        expected.boot.firmware = Some(FirmwareKind::Uefi);
        expected.boot.uefi_vars = Some("v".into());
        expected.boot.once = vec![BootDevice::Cdrom];
        expected.boot.menu = true;
        expected.control = Some(ControlPlace::Path("c.sock".into()));
        assert_eq!(made, expected);
    }

    #[test]
    fn flags_take_the_place_of_the_files_fields() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.toml");
        let text = "cpus = 4\nmemory = \"2G\"\n[[disks]]\npath = \"a\"\n[[disks]]\npath = \"/b\"";
        fs::write(&file, text).unwrap();
        let name = file.to_str().unwrap();
        let made = spec(&["--spec", name, "--cpus", "2"]);
        assert_eq!((made.cpus, made.memory), (2, MemorySize::gib(2)));
        assert_eq!(made.disks[0].path, folder.path().join("a"));
        assert_eq!(made.disks[1].path, Path::new("/b"));
        let made = spec(&["--spec", name, "--disk", "c"]);
        assert_eq!(made.disks.len(), 1);
        assert_eq!(made.disks[0].path, Path::new("c"));
    }
}
