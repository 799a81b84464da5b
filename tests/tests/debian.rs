//! A real Debian 12, unmodified kernel and systemd: it boots, is used, and powers off.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;

use lodge_tests::{Run, host};
use nix::sys::signal::Signal;

/// A file of 1 MiB and one byte, so that the last block is not whole.
fn thing() -> Vec<u8> {
    (0..(1u32 << 20) + 1).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn md5(path: &Path) -> String {
    let sum = host::ok("md5sum", &[host::text(path)]);
    sum.split(' ').next().unwrap().to_owned()
}

/// The first line of a guest's sshd, through a forwarded port.
fn ssh_banner(port: u16) -> String {
    let mut banner = String::new();
    host::wait_until("sshd answers", || {
        let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return false };
        // As ssh does, say who is there. Debian 12's passt completes the handshake with
        // the guest only when the client has said something.
        stream.write_all(b"SSH-2.0-lodge\r\n").unwrap();
        stream.set_read_timeout(Some(lodge_tests::patience())).unwrap();
        banner.clear();
        BufReader::new(stream).read_line(&mut banner).is_ok_and(|count| count > 0)
    });
    banner
}

/// Takes the file `path` out of the root file system of a powered-off guest's disk.
fn take_out(image: &Path, path: &str, to: &Path) {
    // The third partition starts at this sector (guests/debian/build.sh).
    const ROOT_START: u64 = 135_168;
    let disk = image.with_extension("disk");
    let root = image.with_extension("root");
    host::ok("qemu-img", &["convert", "-O", "raw", host::text(image), host::text(&disk)]);
    let input = format!("if={}", host::text(&disk));
    let output = format!("of={}", host::text(&root));
    let skip = format!("skip={}", ROOT_START * 512);
    host::ok(
        "dd",
        &[&input, &output, &skip, "iflag=skip_bytes", "bs=1M", "conv=sparse", "status=none"],
    );
    fs::remove_file(&disk).unwrap();
    host::ok("/sbin/e2fsck", &["-f", "-n", host::text(&root)]);
    let dump = format!("dump {path} {}", host::text(to));
    host::ok("/sbin/debugfs", &["-R", &dump, host::text(&root)]);
}

#[test]
fn debian_boots_works_and_powers_off() {
    let folder = tempfile::tempdir().unwrap();
    let disk = host::overlay(folder.path(), &host::guest("debian").join("disk.qcow2"));
    let served = folder.path().join("served");
    fs::write(&served, thing()).unwrap();
    let server = host::WebServer::start(thing());
    let ssh = host::free_port();
    let mut guest =
        Run::debian(&disk).cpus(2).arg("--net").arg(format!("user,forward={ssh}:22")).start();
    guest.debian_login();
    assert_eq!(guest.ok("nproc").trim(), "2");

    // 256 MiB on the disk, synced, and what they are.
    guest.ok("head -c 268435456 /dev/urandom > /var/tmp/big; sync -f /var/tmp/big");
    let sum = guest.ok("md5sum /var/tmp/big | cut -d ' ' -f 1").trim().to_owned();
    assert_eq!(sum.len(), 32, "{sum}");
    guest.ok("echo 3 > /proc/sys/vm/drop_caches");
    guest.ok(&format!("echo '{sum}  /var/tmp/big' | md5sum -c"));

    // The network, from inside and from outside. The card has its address when it has a route.
    guest.ok("until ip route show default | grep -q default; do sleep 1; done");
    guest.ok(&format!("curl -sS -o /var/tmp/thing http://10.0.2.2:{}/thing", server.port));
    assert!(guest.ok("md5sum /var/tmp/thing").contains(&md5(&served)));
    assert!(ssh_banner(ssh).starts_with("SSH-2.0-OpenSSH"));

    // User space of some size.
    let list = guest.ok("apt list --installed 2>/dev/null | cat");
    assert!(list.contains("systemd/now") && list.lines().count() > 100, "{list}");
    let python = guest.ok("python3 -c 'import hashlib, json; print(json.dumps({\"sum\": sum(range(1000)), \
        \"pi\": round(sum(1 / (16 ** k) * (4 / (8 * k + 1) - 2 / (8 * k + 4) - 1 / (8 * k + 5) - 1 / (8 * k + 6)) for k in range(12)), 12), \
        \"md5\": hashlib.md5(b\"lodge\").hexdigest()}))'");
    let lodge = host::ok("sh", &["-c", "printf lodge | md5sum"]);
    let expected =
        format!("{{\"sum\": 499500, \"pi\": 3.14159265359, \"md5\": \"{}\"}}", &lodge[..32]);
    assert_eq!(python.trim(), expected);
    let failed = guest.ok("systemctl list-units --failed --no-legend --plain");
    assert_eq!(failed.trim(), "", "units that failed");
    let guest = guest.power_off("poweroff");
    host::assert_no_panic(&guest.messages());
    let text = guest.text();
    for bad in ["BUG:", "Oops", "Call Trace", "I/O error", "soft lockup", "EXT4-fs error"] {
        assert!(!text.contains(bad), "the kernel complains: {bad}\n{text}");
    }

    host::assert_clean(&disk);
    let big = folder.path().join("big");
    take_out(&disk, "/var/tmp/big", &big);
    assert_eq!(fs::metadata(&big).unwrap().len(), 256 << 20);
    assert_eq!(md5(&big), sum, "the file on the host is the one in the guest");
}

#[test]
fn slow_the_power_button_shuts_debian_down() {
    let folder = tempfile::tempdir().unwrap();
    let disk = host::overlay(folder.path(), &host::guest("debian").join("disk.qcow2"));
    let mut guest = Run::debian(&disk).cpus(2).start();
    guest.debian_login();
    guest.ok("echo kept > /root/kept");
    guest.signal(Signal::SIGTERM);
    guest.expect("Power down");
    guest.ends_with(0);
    host::assert_clean(&disk);
    let kept = folder.path().join("kept");
    take_out(&disk, "/root/kept", &kept);
    assert_eq!(fs::read_to_string(&kept).unwrap(), "kept\n");
}

#[test]
fn slow_debian_reboots_and_keeps_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let disk = host::overlay(folder.path(), &host::guest("debian").join("disk.qcow2"));
    let mut guest = Run::debian(&disk).cpus(2).start();
    guest.debian_login();
    guest.ok("echo kept > /root/kept");
    guest.send("reboot\n");
    guest.debian_login();
    assert_eq!(guest.ok("cat /root/kept").trim(), "kept");
    guest.power_off("poweroff");
    host::assert_clean(&disk);
}
