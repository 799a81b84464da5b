//! Requests that cannot be carried out end in one clear message that names the thing and the way out, with the exit
//! code that the help promises, and never in a panic. No guest runs here.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use lodge_tests::{Run, host, skip};

/// A folder with a kernel that would start, so that what is wrong is what the test made wrong.
struct Place {
    folder: tempfile::TempDir,
    kernel: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Readable for those without rights too.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let kernel = folder.path().join("kernel.elf");
        // mov al, 1; out 0f4h, al; hlt: it would end with exit code 65.
        fs::write(&kernel, lodge_tests::pvh_payload(&[0xb0, 1, 0xe6, 0xf4, 0xf4])).unwrap();
        Self { folder, kernel }
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn run(&self) -> Run {
        Run::kernel(&self.kernel).args(["--memory", "64M", "--debug-exit"])
    }

    /// A qcow2 image with some data in it.
    fn qcow2(&self, name: &str, options: &[&str]) -> PathBuf {
        let path = self.folder.path().join(name);
        let create = [&["create", "-q", "-f", "qcow2"], options, &[host::text(&path), "16M"]];
        host::ok("qemu-img", &create.concat());
        path
    }
}

/// The message is one block that has all `parts`: what is wrong, and what to do.
fn assert_tells(message: &str, parts: &[&str]) {
    assert!(message.starts_with("lodge: "), "no message of Lodge's: {message}");
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    assert!(message.lines().count() <= 6, "more than one message: {message}");
}

#[test]
fn the_place_itself_would_run() {
    Place::new().run().start().ends_with(65);
}

#[test]
fn files_that_are_not_there_or_not_files() {
    let place = Place::new();
    let folder = host::text(place.folder.path()).to_owned();
    let none = place.folder.path().join("none");
    let fifo = place.folder.path().join("fifo");
    host::ok("mkfifo", &[host::text(&fifo)]);
    for (run, thing) in [
        (Run::kernel(&none), "none"),
        (Run::kernel(place.folder.path()), folder.as_str()),
        (Run::kernel(&fifo), "fifo"),
        (Run::kernel("/dev/zero".as_ref()), "/dev/zero"),
        (place.run().arg("--initrd").arg(&none), "none"),
        (place.run().arg("--initrd").arg(place.folder.path()), folder.as_str()),
        (place.run().disk(&none, ""), "none"),
        (place.run().disk(place.folder.path(), ""), folder.as_str()),
        (place.run().disk(place.folder.path(), ",readonly"), folder.as_str()),
        (place.run().disk(&fifo, ""), "fifo"),
        (place.run().disk("/dev/null".as_ref(), ""), "/dev/null"),
        (place.run().disk("/dev/tty".as_ref(), ""), "/dev/tty"),
        (Run::new().arg("--spec").arg(&none), "none"),
        (Run::new().arg("--spec").arg(place.folder.path()), folder.as_str()),
        (place.run().args(["--console", "file=/no/such/folder/log"]), "/no/such/folder"),
        (place.run().args(["--console"]).arg(format!("file={folder}")), folder.as_str()),
    ] {
        assert_tells(&run.refused(2), &[thing, "help:"]);
    }
}

#[test]
fn files_without_the_right_to_use_them() {
    if !host::is_root() {
        skip!("another user's files need root to be made");
    }
    let place = Place::new();
    let secret = place.file("secret", [0; 4096]);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let read_only = place.file("read-only", [0; 4096]);
    let closed = place.folder.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::write(closed.join("inside"), [0; 4096]).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let bin = copy_for_nobody(place.folder.path());
    let cases = [
        (vec!["--kernel", host::text(&secret)], "secret"),
        (vec!["--kernel", host::text(&place.kernel), "--initrd", host::text(&secret)], "secret"),
        (vec!["--kernel", host::text(&place.kernel), "--disk", host::text(&secret)], "secret"),
        (vec!["--kernel", host::text(&place.kernel), "--disk", host::text(&read_only)], "readonly"),
        (vec!["--kernel", "closed/inside"], "closed/inside"),
        (vec!["--spec", host::text(&secret)], "secret"),
        (vec!["--kernel", host::text(&place.kernel), "--console", "file=new.log"], "new.log"),
    ];
    for (flags, thing) in cases {
        let mut command = as_nobody(&bin, &["run", "--accel", "soft"]);
        let output = host::output(command.args(&flags).current_dir(place.folder.path()));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {message}");
        assert_tells(&message, &[thing]);
        let hints = ["help:", "permission", "Permission", "right"];
        assert!(hints.iter().any(|hint| message.contains(hint)), "no way out: {message}");
    }
    // What it may read, it can run: read-only.
    let flags = [
        "run",
        "--accel",
        "soft",
        "--memory",
        "64M",
        "--debug-exit",
        "--disk",
        "read-only,readonly,format=raw",
    ];
    let mut command = as_nobody(&bin, &flags);
    let output =
        host::output(command.arg("--kernel").arg(&place.kernel).current_dir(place.folder.path()));
    assert_eq!(output.status.code(), Some(65), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Copies of the programs that everybody can reach: root's home may be closed.
fn copy_for_nobody(folder: &Path) -> PathBuf {
    let from = host::lodge();
    for name in ["lodge", "lodge-vmm"] {
        fs::copy(from.with_file_name(name), folder.join(name)).unwrap();
    }
    folder.join("lodge")
}

fn as_nobody(bin: &Path, args: &[&str]) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(bin);
    // `nobody` of Debian.
    command.args(args).uid(65534).gid(65534);
    command
}

#[test]
fn kvm_without_the_right_to_it() {
    if !Path::new("/dev/kvm").exists() {
        let message = Place::new().run().args(["--accel", "kvm"]).refused(3);
        assert_tells(&message, &["/dev/kvm"]);
        return;
    }
    if !host::is_root() {
        skip!("a user without rights on /dev/kvm needs root to be had");
    }
    let mode = fs::metadata("/dev/kvm").unwrap().permissions().mode();
    if mode & 0o006 != 0 {
        skip!("everybody may use /dev/kvm on this host");
    }
    let place = Place::new();
    let bin = copy_for_nobody(place.folder.path());
    let mut command = as_nobody(&bin, &["run", "--accel", "kvm", "--memory", "64M", "--kernel"]);
    let output = host::output(command.arg(&place.kernel));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert_tells(&message, &["/dev/kvm", "kvm"]);
    assert!(
        ["group", "chgrp", "usermod"].iter().any(|way| message.contains(way)),
        "no way out: {message}"
    );
    // auto takes the software CPU there, and says why.
    let flags = ["run", "--memory", "64M", "--debug-exit", "--kernel"];
    let output = host::output(as_nobody(&bin, &flags).arg(&place.kernel));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{message}");
    assert!(message.contains("software CPU") && message.contains("/dev/kvm"), "{message}");
}

#[test]
fn kernels_that_are_none() {
    let place = Place::new();
    let real = fs::read(host::guest("busybox").join("vmlinuz")).unwrap();
    let cut = |length: usize| &real[..length];
    for (name, bytes) in [
        ("empty", vec![]),
        ("text", b"#!/bin/sh\necho hello\n".repeat(1000)),
        ("zeroes", vec![0; 100_000]),
        ("program", fs::read("/bin/true").unwrap()),
        ("half-header", cut(600).to_vec()),
        ("half-setup", cut(0x3000).to_vec()),
        ("half-kernel", cut(real.len() / 2).to_vec()),
        ("half-elf", fs::read(&place.kernel).unwrap()[..100].to_vec()),
        ("cut-elf", fs::read(&place.kernel).unwrap()[..0x1001].to_vec()),
    ] {
        let path = place.file(name, bytes);
        let message = Run::kernel(&path).args(["--memory", "256M"]).refused(2);
        assert_tells(&message, &[name]);
        assert!(message.contains("kernel"), "{message}");
    }
}

#[test]
fn kernel_headers_with_any_byte_changed_never_panic() {
    let place = Place::new();
    // A payload that ends at once where the change does not matter, and a bzImage's header.
    let elf = fs::read(&place.kernel).unwrap();
    for at in (16..196).step_by(3) {
        let mut bytes = elf.clone();
        bytes[at] ^= 0xff;
        let path = place.file("changed", bytes);
        let run = Run::kernel(&path).args(["--memory", "64M", "--debug-exit", "--console", "none"]);
        // An entry that points elsewhere is a guest of its own making: it crashes or spins.
        let mut guest = run.start();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !guest.has_ended() && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(10));
            if guest.messages().contains("accelerator is") {
                guest.signal(nix::sys::signal::Signal::SIGTERM);
                guest.signal(nix::sys::signal::Signal::SIGINT);
                break;
            }
        }
        let code = guest.wait();
        host::assert_no_panic(&guest.messages());
        assert!([0, 2, 5, 65, 130].contains(&code), "byte {at}: {code}: {}", guest.report());
    }
}

#[test]
fn initrds_and_command_lines_that_do_not_fit() {
    let place = Place::new();
    let big = place.folder.path().join("big.img");
    File::create(&big).unwrap().set_len(300 << 20).unwrap();
    let guest = host::guest("busybox");
    let message = Run::linux(&guest.join("vmlinuz"), &big).args(["--memory", "256M"]).refused(2);
    assert_tells(&message, &["big.img", "memory"]);
    let message = Run::linux(&guest.join("vmlinuz"), &guest.join("initrd.img"))
        .args(["--memory", "4M"])
        .refused(2);
    assert_tells(&message, &["vmlinuz", "memory"]);
    let message = place.run().arg("--cmdline").arg("x".repeat(5000)).refused(2);
    assert_tells(&message, &["5000", "help:"]);
}

#[test]
fn numbers_and_words_that_cannot_be() {
    let place = Place::new();
    for (flags, parts) in [
        (["--memory", "0"], ["memory", "512M"]),
        (["--memory", "1000T"], ["more than the host has", "help:"]),
        (["--cpus", "0"], ["cpus", "1 to 254"]),
        (["--cpus", "255"], ["255 CPUs", "1 to 254"]),
        (["--name", "../x"], ["../x", "help:"]),
        (["--net", "tap=lodge-none0"], ["lodge-none0", "ip tuntap add"]),
        (["--net", "tap=lo"], ["lo", "help:"]),
        (["--net", "tap=a/b"], ["a/b", "help:"]),
    ] {
        assert_tells(&place.run().args(flags).refused(2), &parts);
    }
    // The command line's own parser has its own form.
    for (flags, part) in [
        (["--memory", "much"], "512M"),
        (["--memory", "-1"], "--memory"),
        (["--memory", "99999999999999999999G"], "--memory"),
        (["--cpus", "-1"], "--cpus"),
        (["--cpus", "4294967296"], "--cpus"),
        (["--accel", "hvf"], "auto, kvm, soft"),
        (["--console", "tty"], "stdio, file, none"),
        (["--disk", "a,b=c"], "unknown key 'b'"),
        (["--disk", ""], "name is empty"),
        (["--disk", "a,format=vmdk"], "vmdk"),
        (["--net", "bridge=b"], "user, tap"),
        (["--net", "user,forward=99999:1"], "99999"),
        (["--net", "user,mac=zz"], "zz"),
        (["--bogus", "x"], "--bogus"),
    ] {
        let message = place.run().args(flags).refused(2);
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn spec_files_that_are_wrong() {
    let place = Place::new();
    for (name, text, parts) in [
        ("key.toml", "cpu = 2\n", ["key.toml", "cpu"]),
        ("inner.toml", "[[disks]]\npath = \"x\"\nread_only = true\n", ["inner.toml", "read_only"]),
        ("type.toml", "cpus = \"two\"\n", ["type.toml", "cpus"]),
        ("range.toml", "cpus = -1\n", ["range.toml", "cpus"]),
        ("syntax.toml", "cpus = \n", ["syntax.toml", "line 1"]),
        ("nothing.toml", "", ["boot:", "--kernel FILE"]),
        ("lost.toml", "[boot]\nkernel = \"lost\"\n", ["lost", "does not exist"]),
    ] {
        let path = place.file(name, text);
        let message = Run::new().arg("--spec").arg(&path).refused(2);
        assert_tells(&message, &parts);
        assert!(message.contains("help:"), "no way out: {message}");
    }
    let path = place.file("bytes.toml", [0xff, 0xfe, 0, 1]);
    assert_tells(&Run::new().arg("--spec").arg(&path).refused(2), &["bytes.toml"]);
    let path = place.file("deep.toml", format!("name = {}", "[".repeat(100_000)));
    assert_tells(&Run::new().arg("--spec").arg(&path).refused(2), &["deep.toml"]);
}

#[test]
fn one_thing_given_twice() {
    let place = Place::new();
    let disk = place.file("disk", [0; 4096]);
    let link = place.folder.path().join("link");
    std::os::unix::fs::symlink(&disk, &link).unwrap();
    let message = place.run().disk(&disk, ",format=raw").disk(&link, ",format=raw").refused(2);
    assert_tells(&message, &["link", "disk 0", "help:"]);
    let other = place.file("other", [0; 4096]);
    let message = place.run().disk(&disk, ",serial=S").disk(&other, ",serial=S").refused(2);
    assert_tells(&message, &["serial", "help:"]);
    let console = format!("file={}", disk.display());
    let message = place.run().disk(&disk, "").args(["--console"]).arg(console).refused(2);
    assert_tells(&message, &["disk", "help:"]);
}

#[test]
fn qcow2_images_that_cannot_be_used() {
    let place = Place::new();
    let good = place.qcow2("good.qcow2", &[]);
    host::ok("qemu-io", &["-f", "qcow2", "-c", "write -q -P 1 0 4M", host::text(&good)]);
    let bytes = fs::read(&good).unwrap();
    let changed = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    };
    // Offsets of the qcow2 specification's header.
    for (name, bytes) in [
        ("cut-header", bytes[..50].to_vec()),
        ("cut-tables", bytes[..100_000].to_vec()),
        ("version", changed(4, &9u32.to_be_bytes())),
        ("cluster-bits", changed(20, &40u32.to_be_bytes())),
        ("huge", changed(24, &u64::MAX.to_be_bytes())),
        ("aes-encrypted", changed(32, &1u32.to_be_bytes())),
        ("luks-encrypted", changed(32, &2u32.to_be_bytes())),
        ("l1-size", changed(36, &u32::MAX.to_be_bytes())),
        ("l1-place", changed(40, &0x7fff_ffff_ffff_0000u64.to_be_bytes())),
        ("refcount-place", changed(48, &3u64.to_be_bytes())),
        ("corrupt", changed(72, &2u64.to_be_bytes())),
        ("unknown-feature", changed(72, &(1u64 << 60).to_be_bytes())),
        ("refcount-order", changed(96, &30u32.to_be_bytes())),
    ] {
        let path = place.file(name, &bytes);
        for keys in [",format=qcow2", ",format=qcow2,readonly"] {
            let message = place.run().disk(&path, keys).refused(2);
            assert_tells(&message, &[name]);
        }
        assert!(fs::read(&path).unwrap() == bytes, "{name} was written");
    }
    let raw = place.file("raw", vec![0x33; 1 << 20]);
    assert_tells(&place.run().disk(&raw, ",format=qcow2").refused(2), &["raw"]);
}

#[test]
fn backing_files_that_are_gone_or_circular() {
    let place = Place::new();
    let base = place.qcow2("base.qcow2", &[]);
    let overlay = host::overlay(place.folder.path(), &base);
    fs::rename(&base, place.folder.path().join("moved")).unwrap();
    let message = place.run().disk(&overlay, "").refused(2);
    assert_tells(&message, &["base.qcow2", "overlay.qcow2"]);
    // Now the overlay's backing file is the overlay.
    std::os::unix::fs::symlink(&overlay, &base).unwrap();
    let message = place.run().disk(&overlay, "").refused(2);
    assert_tells(&message, &["overlay.qcow2"]);
}

#[test]
fn qcow2_headers_with_any_byte_changed_never_panic() {
    let place = Place::new();
    let good = place.qcow2("good.qcow2", &["-o", "cluster_size=4096"]);
    host::ok("qemu-io", &["-f", "qcow2", "-c", "write -q -P 1 0 64k", host::text(&good)]);
    let bytes = fs::read(&good).unwrap();
    for at in (0..112).chain((4096..5 * 4096).step_by(331)) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0xff;
        let path = place.file("changed", bytes);
        // The payload reads nothing: the machine starts (65) or is refused.
        let mut guest = place.run().disk(&path, ",format=qcow2").start();
        let code = guest.wait();
        host::assert_no_panic(&guest.messages());
        assert!([2, 65].contains(&code), "byte {at}: {code}: {}", guest.report());
        if code == 2 {
            assert_tells(&guest.messages(), &["changed"]);
        }
    }
}

#[test]
fn disks_of_no_size() {
    let place = Place::new();
    let empty = place.file("empty", []);
    let mut guest = place.run().disk(&empty, ",format=raw").start();
    let code = guest.wait();
    host::assert_no_panic(&guest.messages());
    assert!([2, 65].contains(&code), "{code}: {}", guest.report());
    if code == 2 {
        assert_tells(&guest.messages(), &["empty"]);
    }
}
