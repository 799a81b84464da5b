//! What is left after a machine that was killed: nothing but its disk, and that is whole.

use std::net::{Ipv4Addr, TcpListener};

use lodge_tests::{Run, host};
use nix::sys::signal::Signal;

/// Writes that make qcow2 change its metadata all the time: new clusters all over, discards, flushes.
const STORM: &str = "i=0; while true; do \
    dd if=/dev/vdb of=/dev/vda bs=64k count=4 seek=$((i * 37 % 4000)) conv=fsync 2>/dev/null; \
    blkdiscard -o $((i * 53 % 4000 * 65536)) -l 131072 /dev/vda; \
    i=$((i + 1)); [ $((i % 20)) = 0 ] && echo ROUND $i; done";

#[test]
fn a_killed_machine_leaves_a_whole_image_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.raw");
    std::fs::write(&source, vec![0x5a; 1 << 20]).unwrap();
    let disk = host::image(folder.path(), "qcow2", 512);
    // Each time at another place of the storm, and on what the time before has left.
    for round in [1, 3, 5] {
        let forward = host::free_port();
        let mut guest = Run::busybox()
            .cpus(2)
            .disk(&disk, "")
            .disk(&source, ",format=raw,readonly")
            .arg("--net")
            .arg(format!("user,forward={forward}:22"))
            .commands(STORM)
            .start();
        guest.expect(&format!("ROUND {}\n", round * 20));
        let children = guest.children();
        assert!(!children.is_empty(), "passt runs");
        guest.signal(Signal::SIGKILL);
        assert_eq!(guest.wait(), -9);
        host::wait_until("passt and whatever else it had started are gone", || {
            !children.iter().any(|pid| host::is_alive(*pid))
        });
        TcpListener::bind((Ipv4Addr::LOCALHOST, forward)).expect("the port is free again");
        let (code, said) = host::check(&disk);
        assert!(code == 0 || code == 3, "no corruption, leaks at most: {code}: {said}");
    }
    // The lock is free, and the image can be used on.
    let commands = "set -e; yes after | dd of=/dev/vda bs=1M count=8 iflag=fullblock conv=fsync; head -c 6 /dev/vda";
    let mut guest = Run::busybox().disk(&disk, "").commands(commands).start();
    guest.expect("after\n");
    guest.expect("LODGE-RUN-EXIT=0");
    guest.ends_with(0);
    assert!(host::bytes(&disk).starts_with(b"after\nafter\n"));
}

#[test]
fn what_was_synced_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2"] {
        let disk = host::image(folder.path(), format, 256);
        let commands = "yes kept | dd of=/dev/vda bs=1M count=20 seek=3 iflag=fullblock conv=fsync; echo SYNCED; \
                        yes more | dd of=/dev/vda bs=1M seek=100 count=100 iflag=fullblock";
        let mut guest = Run::busybox().disk(&disk, "").commands(commands).start();
        guest.expect("SYNCED");
        guest.signal(Signal::SIGKILL);
        assert_eq!(guest.wait(), -9);
        let bytes = host::bytes(&disk);
        let expected: Vec<u8> = b"kept\n".iter().copied().cycle().take(20 << 20).collect();
        assert!(bytes[3 << 20..23 << 20] == expected, "{format}: what was synced is not there");
    }
}

#[test]
fn an_ended_machine_has_written_what_it_took() {
    // Ctrl-A X and a second SIGTERM finish what is under way: the image is clean, without leaks.
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source.raw");
    std::fs::write(&source, vec![0x5a; 1 << 20]).unwrap();
    let disk = host::image(folder.path(), "qcow2", 512);
    let mut guest = Run::busybox()
        .cpus(2)
        .disk(&disk, "")
        .disk(&source, ",format=raw,readonly")
        .commands(STORM)
        .start();
    guest.expect("ROUND 40");
    guest.signal(Signal::SIGTERM);
    guest.signal(Signal::SIGINT);
    guest.ends_with(130);
    host::assert_clean(&disk);
}
