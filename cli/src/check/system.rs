//! What surrounds virtualization: memory, huge pages, io_uring, networking, limits, tools.

use std::fs::{self, OpenOptions};
use std::io;

use lodge_model::MemorySize;

use super::Finding;
use crate::launch::is_program;

pub fn findings() -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    let limits = read("/proc/self/limits");
    let mut findings = vec![
        memory(&meminfo),
        huge_pages(&meminfo, &read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        io_uring(),
        tun(OpenOptions::new().read(true).write(true).open("/dev/net/tun").err()),
        open_files(&limits),
    ];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |tool: &str| std::env::split_paths(&path).any(|dir| is_program(&dir.join(tool)));
    findings.extend(TOOLS.iter().map(|known| tool(known, has(known.name))));
    findings
}

/// A field of /proc/meminfo in bytes, where its unit is kB, or as it is.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    match line.trim().strip_suffix(" kB") {
        Some(kib) => kib.trim().parse::<u64>().ok()?.checked_mul(1024),
        None => line.trim().parse().ok(),
    }
}

fn memory(meminfo: &str) -> Finding {
    const NAME: &str = "memory";
    let (Some(total), Some(free)) = (field(meminfo, "MemTotal"), field(meminfo, "MemAvailable"))
    else {
        return Finding::warning(NAME, "cannot be told", "mount /proc");
    };
    let mib = |bytes: u64| MemorySize::mib(bytes >> 20);
    let found = format!("{} available of {}", mib(free), mib(total));
    if free < 1 << 30 {
        Finding::warning(NAME, found, "end something else, or give machines little memory")
    } else {
        Finding::ok(NAME, found)
    }
}

/// Guest memory is shared memory: transparent huge pages for it have a setting of their own.
fn huge_pages(meminfo: &str, shmem: &str) -> Finding {
    const NAME: &str = "huge pages";
    let chosen = shmem.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    let chosen = chosen.map_or("", |(word, _)| word);
    let reserved = field(meminfo, "HugePages_Total").unwrap_or(0);
    let free = field(meminfo, "HugePages_Free").unwrap_or(0);
    if reserved > 0 {
        return Finding::ok(NAME, format!("{reserved} reserved, {free} of them free"));
    }
    match chosen {
        "always" | "within_size" | "advise" | "force" => {
            Finding::ok(NAME, format!("none reserved; transparent ones for guests: {chosen}"))
        }
        _ => Finding::warning(
            NAME,
            "none reserved, and no transparent ones for guests: memory is a little slower",
            "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

/// Whether io_uring can be used: a ring is made, as containers and sysctls forbid it in many ways.
fn io_uring() -> Finding {
    const NAME: &str = "io_uring";
    match io_uring::IoUring::new(2) {
        Ok(_) => Finding::ok(NAME, "can be used"),
        Err(error) => {
            let help = match error.raw_os_error() {
                Some(nix::libc::EPERM) => {
                    "as root: sysctl kernel.io_uring_disabled=0 (in a container: allow it there)"
                }
                Some(nix::libc::ENOSYS) => "run a kernel with CONFIG_IO_URING (5.1 or newer)",
                _ => "look at the limits of this user (ulimit -l, ulimit -n)",
            };
            let found = format!("cannot be used ({error}): disks use threads, slower");
            Finding::warning(NAME, found, help)
        }
    }
}

fn tun(error: Option<io::Error>) -> Finding {
    const NAME: &str = "taps";
    match error {
        None => Finding::ok(NAME, "/dev/net/tun can be used"),
        Some(error) if error.kind() == io::ErrorKind::NotFound => Finding::missing(
            NAME,
            "/dev/net/tun does not exist: --net tap cannot be used",
            "as root: modprobe tun",
        ),
        Some(error) => Finding::warning(
            NAME,
            format!("cannot open /dev/net/tun ({error}): --net tap cannot be used"),
            "give yourself the right to it (chmod or a udev rule), or use --net user",
        ),
    }
}

/// A machine's files: images, queues' event descriptors, rings; 1024 is enough for a small one.
const ENOUGH_FILES: u64 = 1024;

fn open_files(limits: &str) -> Finding {
    const NAME: &str = "open files";
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    match line.and_then(|line| line.split_whitespace().next()) {
        None => Finding::warning(NAME, "the limit cannot be told", "mount /proc"),
        Some("unlimited") => Finding::ok(NAME, "no limit"),
        Some(text) => match text.parse::<u64>() {
            Ok(limit) if limit >= ENOUGH_FILES => Finding::ok(NAME, format!("up to {limit}")),
            _ => Finding::warning(
                NAME,
                format!("only {text} for each process"),
                format!("raise the limit: ulimit -n {ENOUGH_FILES}, or limits.conf"),
            ),
        },
    }
}

/// A program that Lodge or its users call.
struct Tool {
    name: &'static str,
    package: &'static str,
    /// What needs it.
    needed_for: &'static str,
    /// Lodge itself calls it.
    essential: bool,
}

const TOOLS: [Tool; 3] = [
    Tool { name: "passt", package: "passt", needed_for: "--net user", essential: true },
    Tool { name: "ip", package: "iproute2", needed_for: "making taps", essential: false },
    Tool {
        name: "qemu-img",
        package: "qemu-utils",
        needed_for: "making and checking disk images",
        essential: false,
    },
];

fn tool(tool: &Tool, found: bool) -> Finding {
    let Tool { name, package, needed_for, essential } = *tool;
    if found {
        return Finding::ok(name, format!("installed (for {needed_for})"));
    }
    let found = format!("not installed: needed for {needed_for}");
    let help = format!("apt-get install {package}");
    if essential {
        Finding::missing(name, found, help)
    } else {
        Finding::warning(name, found, help)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    const MEMINFO: &str = "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\nHugePages_Total: 0\n";

    #[test]
    fn memory_is_told_in_units() {
        let finding = memory(MEMINFO);
        assert_eq!((finding.status, finding.found.as_str()), (Status::Ok, "2G available of 4G"));
        assert_eq!(memory("MemTotal: 1 kB\nMemAvailable: 1 kB").status, Status::Warning);
        assert_eq!(memory("").status, Status::Warning);
    }

    #[test]
    fn huge_pages_of_both_kinds() {
        let never = "always within_size advise [never] deny force";
        assert_eq!(huge_pages(MEMINFO, never).status, Status::Warning);
        assert_eq!(huge_pages(MEMINFO, "").status, Status::Warning);
        assert_eq!(huge_pages(MEMINFO, "always [advise] never").status, Status::Ok);
        let reserved = "HugePages_Total: 8\nHugePages_Free: 3\n";
        assert_eq!(huge_pages(reserved, never).found, "8 reserved, 3 of them free");
    }

    #[test]
    fn limits() {
        let line = |soft: &str| format!("Max open files            {soft}      20000   files\n");
        assert_eq!(open_files(&line("20000")).status, Status::Ok);
        assert_eq!(open_files(&line("unlimited")).status, Status::Ok);
        assert_eq!(open_files(&line("256")).status, Status::Warning);
        assert_eq!(open_files("").status, Status::Warning);
    }

    #[test]
    fn taps_and_tools() {
        assert_eq!(tun(None).status, Status::Ok);
        assert_eq!(tun(Some(io::ErrorKind::NotFound.into())).status, Status::Missing);
        assert_eq!(tun(Some(io::ErrorKind::PermissionDenied.into())).status, Status::Warning);
        assert_eq!(tool(&TOOLS[0], true).status, Status::Ok);
        assert_eq!(tool(&TOOLS[0], false).status, Status::Missing);
        assert_eq!(tool(&TOOLS[2], false).help, "apt-get install qemu-utils");
    }
}
