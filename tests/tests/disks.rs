//! What guests write is what the host finds, whatever the image; judged by `qemu-img` and e2fsprogs.
//! The guest is the busybox one.

use std::fs;
use std::path::Path;

use lodge_tests::{Run, host, skip};

const MIB: usize = 1 << 20;

/// What `yes TEXT` prints, so many bytes of it.
fn yes(text: &str, length: usize) -> Vec<u8> {
    format!("{text}\n").bytes().cycle().take(length).collect()
}

/// The guest writes here and there in sizes of all kinds, syncs, discards; after the power-off the host must read
/// the same.
fn patterns(format: &str) {
    let folder = tempfile::tempdir().unwrap();
    let disk = host::image(folder.path(), format, 64);
    let commands = "set -e; D=/dev/vda; \
        yes first | dd of=$D bs=1M count=4 iflag=fullblock conv=fsync 2>&1; \
        yes second | dd of=$D bs=512 count=3 seek=16383 iflag=fullblock oflag=direct 2>&1; \
        yes third | dd of=$D bs=65536 count=9 seek=300 iflag=fullblock conv=fsync 2>&1; \
        yes last | dd of=$D bs=1M count=1 seek=63 iflag=fullblock conv=fsync 2>&1; \
        blkdiscard -o 1048576 -l 2097152 $D; \
        sync; echo 3 > /proc/sys/vm/drop_caches; md5sum $D";
    let run = Run::busybox().cpus(2).disk(&disk, "").commands(commands);
    let mut guest = run.start();
    guest.expect("LODGE-RUN-EXIT=0");
    guest.ends_with(0);
    let mut expected = vec![0; 64 * MIB];
    let mut put =
        |at: usize, bytes: Vec<u8>| expected[at..at + bytes.len()].copy_from_slice(&bytes);
    put(0, yes("first", 4 * MIB));
    put(16383 * 512, yes("second", 3 * 512));
    put(300 * 65536, yes("third", 9 * 65536));
    put(63 * MIB, yes("last", MIB));
    put(MIB, vec![0; 2 * MIB]);
    let found = host::bytes(&disk);
    assert_eq!(found.len(), expected.len());
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!("byte {at:#x} is {}, not {}\n{}", found[at], expected[at], guest.report());
    }
    // What the guest itself read back, past its cache.
    let file = folder.path().join("expected");
    fs::write(&file, &expected).unwrap();
    let sum = host::ok("md5sum", &[host::text(&file)]);
    assert!(guest.text().contains(sum.split(' ').next().unwrap()), "{}", guest.report());
    if format == "qcow2" {
        host::assert_clean(&disk);
    } else {
        use std::os::unix::fs::MetadataExt;
        let kept = fs::metadata(&disk).unwrap().blocks() * 512;
        assert!(kept < 5 * MIB as u64, "discarded blocks are given back: {kept} bytes are kept");
    }
}

#[test]
fn patterns_on_a_raw_disk() {
    patterns("raw");
}

#[test]
fn patterns_on_a_qcow2_disk() {
    patterns("qcow2");
}

/// A disk of this format with an empty ext4 on it.
fn with_ext4(folder: &Path, format: &str, mib: u64) -> std::path::PathBuf {
    let raw = host::image(folder, "raw", mib);
    host::ok("/sbin/mke2fs", &["-q", "-F", "-t", "ext4", "-L", "data", host::text(&raw)]);
    if format == "raw" {
        return raw;
    }
    let disk = folder.join("ext4.qcow2");
    host::ok("qemu-img", &["convert", "-O", format, host::text(&raw), host::text(&disk)]);
    disk
}

/// The file systems of both are whole on the host, and the files in them.
#[test]
fn file_systems_on_two_disks_are_whole_on_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    for folder in [&a, &b] {
        fs::create_dir(folder).unwrap();
    }
    let disks = [with_ext4(&a, "raw", 64), with_ext4(&b, "qcow2", 64)];
    let commands = "set -e; mkdir /a /b; mount -t ext4 -o discard /dev/vda /a; mount -t ext4 -o discard /dev/vdb /b; \
        for d in /a /b; do (yes $d | head -c 9999999 > $d/kept; yes $d | head -c 20000000 > $d/gone; sync; \
        for i in $(seq 300); do echo $i > $d/small$i; done; mkdir $d/deep; mv $d/small1 $d/deep/; rm $d/gone; sync) & done; \
        wait; md5sum /a/kept /b/kept; umount /a /b";
    let mut guest =
        Run::busybox().cpus(2).disk(&disks[0], "").disk(&disks[1], "").commands(commands).start();
    guest.expect("LODGE-RUN-EXIT=0");
    guest.ends_with(0);
    host::assert_clean(&disks[1]);
    for (disk, name) in disks.iter().zip(["/a", "/b"]) {
        let raw = folder.path().join("raw");
        fs::write(&raw, host::bytes(disk)).unwrap();
        host::ok("/sbin/e2fsck", &["-f", "-n", host::text(&raw)]);
        let kept = folder.path().join("kept");
        let dump = format!("dump /kept {}", host::text(&kept));
        host::ok("/sbin/debugfs", &["-R", &dump, host::text(&raw)]);
        assert!(fs::read(&kept).unwrap() == yes(name, 9_999_999), "{name}/kept differs");
        let list = host::ok("/sbin/debugfs", &["-R", "ls -p /deep", host::text(&raw)]);
        assert!(list.contains("/small1/"), "{list}");
        let list = host::ok("/sbin/debugfs", &["-R", "ls -p /", host::text(&raw)]);
        assert!(list.contains("/small300/") && !list.contains("/gone/"), "{list}");
    }
}

#[test]
fn an_overlay_leaves_its_backing_file_alone() {
    let folder = tempfile::tempdir().unwrap();
    let base = host::image(folder.path(), "qcow2", 16);
    let write = ["-c", "write -q -P 66 0 4M", "-c", "write -q -P 67 9M 1M", host::text(&base)];
    host::ok("qemu-io", &[&["-f", "qcow2"], write.as_slice()].concat());
    let before = fs::read(&base).unwrap();
    let overlay = host::overlay(folder.path(), &base);
    let commands = "set -e; head -c 4 /dev/vda; echo; yes new | dd of=/dev/vda bs=1000 seek=1000 count=7 conv=fsync";
    let mut guest = Run::busybox().disk(&overlay, "").commands(commands).start();
    guest.expect("BBBB\n");
    guest.expect("LODGE-RUN-EXIT=0");
    guest.ends_with(0);
    assert!(fs::read(&base).unwrap() == before, "the backing file has changed");
    host::assert_clean(&overlay);
    let mut expected = vec![0; 16 * MIB];
    expected[..4 * MIB].fill(66);
    expected[9 * MIB..10 * MIB].fill(67);
    expected[1_000_000..1_007_000].copy_from_slice(&yes("new", 7000));
    assert!(host::bytes(&overlay) == expected);
}

#[test]
fn a_readonly_disk_cannot_be_written_and_can_be_shared() {
    let folder = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2"] {
        let disk = host::image(folder.path(), format, 8);
        host::ok("qemu-io", &["-f", format, "-c", "write -q -P 82 0 1M", host::text(&disk)]);
        let before = fs::read(&disk).unwrap();
        let run = Run::busybox().disk(&disk, ",readonly");
        let mut first = run.start();
        first.busybox_shell();
        // The second machine reads it while the first has it.
        let commands =
            "cat /sys/block/vda/ro; head -c 4 /dev/vda; echo; echo x > /dev/vda || echo REFUSED";
        let mut second = run.clone().commands(commands).start();
        second.expect("1\nRRRR\n");
        second.expect("REFUSED");
        second.ends_with(0);
        assert_ne!(first.run("dd if=/dev/zero of=/dev/vda bs=512 count=1 oflag=direct").status, 0);
        assert_ne!(first.run("blkdiscard /dev/vda").status, 0);
        // One that writes may not come while it is being read.
        let message = Run::busybox().disk(&disk, "").refused(4);
        assert!(message.contains(host::text(&disk)), "{message}");
        first.power_off("poweroff -f");
        assert!(fs::read(&disk).unwrap() == before, "{format}: the image has changed");
    }
}

#[test]
fn the_guest_sees_serial_numbers_and_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let raw = host::image(folder.path(), "raw", 3);
    // The size of a disk is a number of sectors, and not a round one.
    fs::File::options().write(true).open(&raw).unwrap().set_len(1_000_448).unwrap();
    let qcow2 = host::image(folder.path(), "qcow2", 5000);
    let commands = "cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial; echo; blockdev --getsize64 /dev/vda; blockdev --getsize64 /dev/vdb";
    let mut guest = Run::busybox()
        .disk(&raw, ",format=raw,serial=twenty-characters-20")
        .disk(&qcow2, ",serial=B")
        .commands(commands)
        .start();
    guest.expect("twenty-characters-20\nB\n1000448\n5242880000\n");
    guest.ends_with(0);
}

#[test]
fn two_machines_cannot_write_one_image() {
    let folder = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2"] {
        let disk = host::image(folder.path(), format, 8);
        let run = Run::busybox().disk(&disk, "");
        let mut first = run.start();
        first.expect("LODGE-GUEST-READY");
        let message = run.refused(4);
        assert!(message.contains(host::text(&disk)), "{message}");
        assert!(message.contains(&format!("process {}", first.pid())), "{message}");
        let message = Run::busybox().disk(&disk, ",readonly").refused(4);
        assert!(message.contains(host::text(&disk)), "{message}");
        first.expect(" # ");
        first.power_off("poweroff -f");
        let mut third = run.commands("echo THIRD > /dev/vda; sync").start();
        third.ends_with(0);
        assert!(host::bytes(&disk).starts_with(b"THIRD\n"));
    }
}

/// A host without room gives the guest I/O errors on that disk; the guest, its other disk, and what was written
/// before are not touched.
#[test]
fn a_full_host_disk_is_an_io_error_in_the_guest() {
    if !host::is_root() {
        skip!("a small file system has to be mounted, which needs root");
    }
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    for format in ["raw", "qcow2"] {
        host::with_small_disk(&small, 8, || {
            let full = host::image(&small, format, 64);
            let other = host::image(folder.path(), format, 64);
            let mut guest = Run::busybox().disk(&full, "").disk(&other, "").start();
            guest.busybox_shell();
            // By its path: the shell's own `yes` writes line by line.
            guest.ok("/bin/yes early | dd of=/dev/vda bs=1M count=2 iflag=fullblock conv=fsync");
            let late = guest.run(
                "/bin/yes late | dd of=/dev/vda bs=1M count=16 seek=4 iflag=fullblock conv=fsync",
            );
            assert_ne!(late.status, 0, "{}", late.text);
            assert!(late.text.contains("error"), "{}", late.text);
            guest.ok("/bin/yes other | dd of=/dev/vdb bs=1M count=8 iflag=fullblock conv=fsync");
            guest.ok("echo 3 > /proc/sys/vm/drop_caches");
            let head = guest.ok("head -c 6 /dev/vda");
            assert!(head.contains("early"), "{head}");
            // With room again, the disk works again.
            host::ok("mount", &["-o", "remount,size=64M", host::text(&small)]);
            guest.ok(
                "/bin/yes again | dd of=/dev/vda bs=1M count=16 seek=4 iflag=fullblock conv=fsync",
            );
            let guest = guest.power_off("poweroff -f");
            host::assert_no_panic(&guest.messages());
            for disk in [&full, &other] {
                if format == "qcow2" {
                    host::assert_clean(disk);
                }
            }
            // Read in place: there is no room beside it in every case.
            let copy = folder.path().join("copy");
            host::ok("qemu-img", &["convert", "-O", "raw", host::text(&full), host::text(&copy)]);
            let bytes = fs::read(&copy).unwrap();
            assert!(bytes[..2 * MIB] == yes("early", 2 * MIB));
            assert!(bytes[4 * MIB..20 * MIB] == yes("again", 16 * MIB));
            assert!(host::bytes(&other)[..8 * MIB] == yes("other", 8 * MIB));
        });
    }
}
