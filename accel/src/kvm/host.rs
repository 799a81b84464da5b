//! `/dev/kvm`: is it there, may we use it, does it offer what a machine needs.
//!
//! What goes wrong here is what users meet first, so each failure says what is missing and the way
//! out: a module, a right, a firmware setting, nested virtualization, a newer kernel.

use std::ffi::CString;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, VmFd};

use super::refused;
use crate::error::{Error, Result};

/// Where the device node is on every distribution.
const DEVICE: &str = "/dev/kvm";

/// What a machine cannot do without; all of it is in Linux 4.12 and later on any CPU of the last
/// fifteen years.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What the host's CPU says of virtualization, from `/proc/cpuinfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostCpu {
    /// `GenuineIntel`, `AuthenticAMD`, ...
    pub vendor: String,
    /// The model's name for people.
    pub model: String,
    /// Intel VT-x is there and not switched off by the firmware.
    pub vmx: bool,
    /// AMD-V is there.
    pub svm: bool,
    /// The host is itself a guest of some hypervisor.
    pub guest: bool,
}

impl HostCpu {
    /// Asks `/proc/cpuinfo`; unknown fields stay empty.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_owned())
            })
        };
        let flags = field("flags").unwrap_or_default();
        let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
        Self {
            vendor: field("vendor_id").unwrap_or_default(),
            model: field("model name").unwrap_or_default(),
            vmx: has("vmx"),
            svm: has("svm"),
            guest: has("hypervisor"),
        }
    }

    /// The kernel module that would drive this CPU.
    fn module(&self) -> &'static str {
        if self.vendor.contains("Intel") { "kvm_intel" } else { "kvm_amd" }
    }
}

/// What [`probe`] found out about a usable KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The device node.
    pub path: PathBuf,
    /// The module behind it (`kvm_intel`, `kvm_amd`, ...), empty when unknown.
    pub module: String,
    /// KVM's API version (12 everywhere).
    pub api_version: i32,
    /// The most vCPUs a VM can have.
    pub max_vcpus: u32,
    /// The most vCPUs that the kernel recommends (the host's own CPUs).
    pub recommended_vcpus: u32,
    /// Memory slots of a VM.
    pub memory_slots: u32,
    /// Guest writes can signal an eventfd whatever their size.
    pub ioeventfd: bool,
    /// A guest can be given another TSC frequency than the host's.
    pub tsc_scaling: bool,
    /// Guests could be given VT-x or AMD-V.
    pub nested: bool,
}

/// An open `/dev/kvm` that offers everything a machine needs.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    path: PathBuf,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self> {
        Self::open_at(Path::new(DEVICE))
    }

    /// Opens the device node at `path` and checks version and capabilities.
    pub fn open_at(path: &Path) -> Result<Self> {
        let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| {
            Error::Invalid(format!("{}: the path holds a zero byte", path.display()))
        })?;
        let raw = kvm_ioctls::Kvm::open_with_cloexec_at(c_path, true)
            .map_err(|e| Error::Unavailable(why_not(path, &e.into(), &HostCpu::read())))?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { kvm_ioctls::Kvm::from_raw_fd(raw) };
        let kvm = Self { fd, path: path.to_owned() };
        kvm.check()?;
        Ok(kvm)
    }

    fn check(&self) -> Result<()> {
        let path = self.path.display();
        let version = self.fd.get_api_version();
        if version < 0 {
            return Err(Error::Unavailable(format!(
                "{path} is not a KVM device: it must be character device 10, 232 (`ls -l {path}`)"
            )));
        }
        if version != KVM_API_VERSION as i32 {
            return Err(Error::Unavailable(format!(
                "{path} speaks version {version} of KVM's interface, not {KVM_API_VERSION}: \
                 this kernel is not supported"
            )));
        }
        let missing: Vec<_> = REQUIRED
            .iter()
            .filter(|(cap, _)| !self.fd.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Unavailable(format!(
            "{path} lacks {}: run a newer kernel, or `--accel soft`",
            missing.join(", ")
        )))
    }

    /// The descriptor, for everything that is asked of KVM as a whole.
    pub(super) fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }

    /// An empty VM.
    pub(super) fn create_vm(&self) -> Result<VmFd> {
        loop {
            match self.fd.create_vm() {
                Ok(vm) => return Ok(vm),
                // A signal came while the kernel was at it.
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) if e.errno() == libc::EBUSY => {
                    return Err(Error::Unavailable(
                        "another hypervisor on this host (VirtualBox, VMware?) holds the CPU's \
                         virtualization: stop its machines first"
                            .into(),
                    ));
                }
                Err(e) => return Err(refused("creating a VM")(e)),
            }
        }
    }

    /// What this KVM offers.
    pub fn facts(&self) -> Probe {
        let int = |cap: Cap| u32::try_from(self.fd.check_extension_int(cap)).unwrap_or(0);
        Probe {
            path: self.path.clone(),
            module: vendor_module(Path::new("/sys/module")),
            api_version: self.fd.get_api_version(),
            max_vcpus: self.max_vcpus(),
            recommended_vcpus: int(Cap::NrVcpus),
            memory_slots: int(Cap::NrMemslots),
            ioeventfd: self.ioeventfd(),
            tsc_scaling: int(Cap::TscControl) != 0,
            nested: int(Cap::NestedState) != 0,
        }
    }

    /// The most vCPUs a VM can have; 255 is what 8-bit APIC ids allow.
    pub(super) fn max_vcpus(&self) -> u32 {
        u32::try_from(self.fd.get_max_vcpus()).unwrap_or(u32::MAX).min(255)
    }

    /// Whether VMCALL works in a guest's kernel. It does everywhere but with kvm_pvm, which executes
    /// it over and over (`docs/kvm.md`).
    pub(super) fn hypercalls(&self) -> bool {
        !vendor_module(Path::new("/sys/module")).contains("kvm_pvm")
    }

    /// Whether writes of any size can signal an eventfd.
    pub(super) fn ioeventfd(&self) -> bool {
        self.fd.check_extension(Cap::Ioeventfd) && self.fd.check_extension(Cap::IoeventfdNoLength)
    }
}

/// Opens `/dev/kvm` and says what it offers, or why it cannot be used.
pub fn probe() -> Result<Probe> {
    Ok(Kvm::open()?.facts())
}

/// The loaded module behind KVM: `kvm_intel`, `kvm_amd`, or another one.
fn vendor_module(modules: &Path) -> String {
    let Ok(entries) = std::fs::read_dir(modules) else { return String::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    found.sort();
    found.join(" ")
}

/// Why `path` cannot be opened, and what to do about it.
fn why_not(path: &Path, error: &io::Error, cpu: &HostCpu) -> String {
    let shown = path.display();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            let reason = if cpu.vmx || cpu.svm {
                let module = cpu.module();
                format!(
                    "the module {module} is not loaded; `modprobe {module}` as root loads it (if \
                     that fails, switch on Intel VT-x or AMD-V in the firmware's settings)"
                )
            } else if cpu.guest {
                "this host is itself a virtual machine and nested virtualization is off; switch \
                 it on for this machine on the host above (kvm_intel.nested=1 or \
                 kvm_amd.nested=1, and a CPU model that passes vmx or svm on)"
                    .into()
            } else {
                "the CPU shows neither Intel VT-x nor AMD-V; switch it on in the firmware's \
                 settings (BIOS or UEFI setup: \"Virtualization Technology\", \"SVM mode\")"
                    .into()
            };
            format!("no usable KVM at {shown}: {reason}")
        }
        Some(libc::EACCES | libc::EPERM) => {
            format!("no right to use {shown}: {}", which_right(path))
        }
        _ => format!("cannot open {shown}: {error}"),
    }
}

/// What gives the right to open `path`.
fn which_right(path: &Path) -> String {
    let Ok(meta) = std::fs::metadata(path) else {
        return "run as a user who may read and write it".into();
    };
    let group_may = meta.mode() & 0o060 == 0o060;
    match group_name(meta.gid(), &std::fs::read_to_string("/etc/group").unwrap_or_default()) {
        Some(group) if group_may && meta.gid() != 0 => format!(
            "it belongs to the group {group}; `sudo usermod -aG {group} $USER` lets you in after \
             the next log-in"
        ),
        _ => "its rights let only root in; `chgrp kvm` and `chmod 660` it (Debian's udev does so \
              when it runs), or run as root"
            .into(),
    }
}

fn group_name(gid: u32, groups: &str) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse::<u32>().ok()?;
        (id == gid).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor : 0\nvendor_id\t: GenuineIntel\nmodel name : Xeon\n\
                         flags : fpu vmx sse\n";

    fn reason(errno: i32, cpu: &HostCpu) -> String {
        why_not(Path::new("/nonexistent/kvm"), &io::Error::from_raw_os_error(errno), cpu)
    }

    #[test]
    fn cpuinfo_is_understood() {
        let cpu = HostCpu::parse(INTEL);
        assert_eq!((cpu.vmx, cpu.svm, cpu.guest), (true, false, false));
        assert_eq!(cpu.model, "Xeon");
        assert_eq!(HostCpu::parse(""), HostCpu::default());
    }

    #[test]
    fn a_missing_device_says_what_is_missing() {
        let intel = HostCpu::parse(INTEL);
        assert!(reason(libc::ENOENT, &intel).contains("modprobe kvm_intel"));
        let guest = HostCpu { guest: true, ..Default::default() };
        assert!(reason(libc::ENOENT, &guest).contains("nested virtualization is off"));
        assert!(reason(libc::ENODEV, &HostCpu::default()).contains("firmware"));
        assert!(reason(libc::EACCES, &intel).contains("no right"));
        assert!(reason(libc::EMFILE, &intel).contains("cannot open"));
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:106:me,you\n";
        assert_eq!(group_name(106, groups).as_deref(), Some("kvm"));
        assert_eq!(group_name(7, groups), None);
    }

    /// The test's process may be root's, who may open everything: then without that right.
    #[test]
    fn a_device_without_rights_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("lodge-kvm-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
        let attempt = path.clone();
        // Rights are a thread's, and end with it.
        let result = std::thread::spawn(move || {
            // SAFETY: plain system calls that change this thread alone.
            unsafe {
                if libc::geteuid() == 0 {
                    assert_eq!(libc::syscall(libc::SYS_setresuid, -1, 65534, -1), 0);
                }
            }
            Kvm::open_at(&attempt).map(drop)
        })
        .join()
        .unwrap();
        std::fs::remove_file(&path).unwrap();
        let Err(Error::Unavailable(why)) = result else { panic!("it was opened: {result:?}") };
        assert!(why.contains("no right to use") && why.contains("chmod 660"), "{why}");
    }

    #[test]
    fn what_is_not_kvm_is_refused() {
        let Err(Error::Unavailable(why)) = Kvm::open_at(Path::new("/dev/null")) else {
            panic!("/dev/null passed for KVM")
        };
        assert!(why.contains("not a KVM device"), "{why}");
        let gone = Kvm::open_at(Path::new("/nonexistent/kvm")).unwrap_err().to_string();
        assert!(gone.contains("/nonexistent/kvm"), "{gone}");
    }
}
