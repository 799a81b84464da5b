//! What a spec has to be held against: the facts of this host.
//!
//! Gathering asks the system, validating does not: [`crate::validate`] is a pure function of a
//! spec and these facts, and is tested with invented ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::size::MemorySize;
use crate::spec::{Console, Display, MachineSpec, Net};

/// What is known of the host, as far as a spec touches it.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// All of the host's memory; `None` where it cannot be told.
    pub memory: Option<MemorySize>,
    /// The files and devices that the spec names.
    pub files: BTreeMap<PathBuf, FileFact>,
    /// The host's network interfaces that are taps.
    pub taps: BTreeSet<String>,
    /// The host's other network interfaces.
    pub other_interfaces: BTreeSet<String>,
}

/// What is known of a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FileFact {
    /// Nothing is there; whether its directory is.
    Missing {
        /// The directory that it would be in exists.
        has_parent: bool,
    },
    /// It is a directory.
    Directory,
    /// It is neither a file nor a block device: a pipe, a socket, a terminal.
    Special,
    /// A file or a block device.
    File {
        /// Its device and inode numbers: two paths with the same ones are one file.
        id: (u64, u64),
        /// Why it cannot be opened for reading, if so.
        unreadable: Option<String>,
        /// Why it cannot be opened for writing, if so.
        unwritable: Option<String>,
    },
    /// It cannot be told, for this reason (a directory above it is closed, ...).
    Unknown(String),
}

impl FileFact {
    /// Looks at `path`. Opens it to know its rights, changes nothing.
    pub fn of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt;
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
                let has_parent = parent.is_none_or(Path::is_dir);
                return Self::Missing { has_parent };
            }
            Err(error) => return Self::Unknown(plain(&error)),
        };
        let kind = meta.file_type();
        if kind.is_dir() {
            Self::Directory
        } else if kind.is_file() || kind.is_block_device() {
            // Only these are opened: to open a pipe waits, to open a tape winds.
            let why = |result: io::Result<File>| result.err().map(|error| plain(&error));
            Self::File {
                id: (meta.dev(), meta.ino()),
                unreadable: why(File::open(path)),
                unwritable: why(OpenOptions::new().write(true).open(path)),
            }
        } else {
            Self::Special
        }
    }
}

impl HostFacts {
    /// Asks the host about all that `spec` names.
    pub fn gather(spec: &MachineSpec) -> Self {
        let mut facts = Self { memory: total_memory(), ..Self::default() };
        let console = match &spec.console {
            Console::File(path) => Some(path),
            Console::Stdio | Console::None => None,
        };
        let boot = [spec.boot.kernel.as_ref(), spec.boot.initrd.as_ref()];
        let disks = spec.disks.iter().map(|disk| &disk.path);
        let cdroms = spec.cdroms.iter().filter_map(|drive| drive.path.as_ref());
        let vnc = match &spec.display {
            Display::None => [None; 3],
            Display::Vnc(vnc) => {
                [&vnc.password_file, &vnc.tls_cert, &vnc.tls_key].map(Option::as_ref)
            }
        };
        let vnc = vnc.into_iter().flatten();
        for path in boot.into_iter().flatten().chain(console).chain(disks).chain(cdroms).chain(vnc)
        {
            facts.files.entry(path.clone()).or_insert_with(|| FileFact::of(path));
        }
        if spec.nets.iter().any(|net| matches!(net, Net::Tap(_))) {
            facts.gather_interfaces();
        }
        facts
    }

    fn gather_interfaces(&mut self) {
        // Without /proc no interface is known, and validation says that the tap does not exist.
        let list = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
        for name in interfaces(&list) {
            // /sys shows the interfaces of the network namespace that it was mounted in, which need not be ours: what
            // it does not show may be a tap, and who opens it will tell.
            let folder = Path::new("/sys/class/net").join(name);
            let set = match !folder.exists() || is_tap(&folder) {
                true => &mut self.taps,
                false => &mut self.other_interfaces,
            };
            set.insert(name.to_owned());
        }
    }
}

/// The names in a `/proc/net/dev`: two lines of headings, then `  name: numbers`.
fn interfaces(list: &str) -> impl Iterator<Item = &str> {
    let lines = list.lines().skip(2);
    // A name can have no colon and no space; an alias (`eth0:1`) is no interface and not listed.
    lines.filter_map(|line| Some(line.split_once(':')?.0.trim()))
}

/// An error's text without Rust's `(os error N)`.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_lowercase().chain(chars).collect())
}

/// Whether the interface with this folder under /sys is a tap: `tun_flags` has IFF_TAP (2).
fn is_tap(folder: &Path) -> bool {
    let Ok(text) = fs::read_to_string(folder.join("tun_flags")) else { return false };
    let flags = u32::from_str_radix(text.trim().trim_start_matches("0x"), 16);
    flags.is_ok_and(|flags| flags & 2 != 0)
}

fn total_memory() -> Option<MemorySize> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)
}

/// The `MemTotal` of /proc/meminfo (proc_meminfo(5): in units of 1024 bytes, though it says kB).
fn parse_meminfo(text: &str) -> Option<MemorySize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(MemorySize::bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Disk;

    #[test]
    fn meminfo() {
        let text = "MemTotal:       24689764 kB\nMemFree:  1 kB\n";
        assert_eq!(parse_meminfo(text), Some(MemorySize::bytes(24689764 * 1024)));
        for bad in ["", "MemTotal: x kB", "MemTotal: 5 MB", "MemTotal: 99999999999999999999 kB"] {
            assert_eq!(parse_meminfo(bad), None, "{bad}");
        }
    }

    #[test]
    fn interfaces_are_the_names_of_the_list() {
        let list = "Inter-|   Receive     |  Transmit\n face |bytes    packets|bytes\n    \
                    lo:  153 2 0 0\n  tap-a.1: 0 0\n";
        assert_eq!(interfaces(list).collect::<Vec<_>>(), ["lo", "tap-a.1"]);
        assert_eq!(interfaces("").count(), 0);
        let mut facts = HostFacts::default();
        facts.gather_interfaces();
        assert!(facts.other_interfaces.contains("lo"), "{facts:?}");
    }

    #[test]
    fn facts_of_real_paths() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk.img");
        fs::write(&file, b"x").unwrap();
        let link = folder.path().join("link.img");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(FileFact::of(folder.path()), FileFact::Directory);
        assert_eq!(FileFact::of(Path::new("/dev/null")), FileFact::Special);
        let missing = |path: &str| FileFact::of(&folder.path().join(path));
        assert_eq!(missing("no"), FileFact::Missing { has_parent: true });
        assert_eq!(missing("no/no"), FileFact::Missing { has_parent: false });
        assert!(matches!(missing("disk.img/no"), FileFact::Unknown(_)));
        let FileFact::File { id, unreadable: None, unwritable: None } = FileFact::of(&file) else {
            panic!("a file of ours can be read and written");
        };
        assert!(matches!(FileFact::of(&link), FileFact::File { id: same, .. } if same == id));
        assert_eq!(fs::read(&file).unwrap(), b"x", "looking changes nothing");
    }

    #[test]
    fn gathers_what_the_spec_names() {
        let mut spec = MachineSpec::default();
        spec.boot.kernel = Some("/nonexistent/kernel".into());
        spec.disks.push(Disk { path: "/".into(), ..Disk::default() });
        spec.console = Console::File("/nonexistent".into());
        let facts = HostFacts::gather(&spec);
        assert_eq!(facts.files.len(), 3);
        assert_eq!(facts.files[Path::new("/")], FileFact::Directory);
        assert!(facts.memory.is_some());
    }

    #[test]
    fn errors_read_as_part_of_a_sentence() {
        let error = io::Error::from_raw_os_error(13);
        assert_eq!(plain(&error), "permission denied");
    }
}
