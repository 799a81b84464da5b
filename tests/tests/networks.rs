//! Guests on networks: passt's, and taps of the test's own. The guest is the busybox one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use lodge_tests::host::{self, WebServer};
use lodge_tests::{Run, skip};

/// 3 MB that no compression and no zeroes make easy.
fn noise() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..3_000_000).map(|_| next()).collect()
}

fn md5(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let sum = host::ok("md5sum", &[host::text(file.path())]);
    sum.split(' ').next().unwrap().to_owned()
}

#[test]
fn user_network_reaches_the_host_and_is_reached() {
    let body = noise();
    let sum = md5(&body);
    let server = WebServer::start(body.clone());
    let forward = host::free_port();
    let mut guest =
        Run::busybox().cpus(2).arg("--net").arg(format!("user,forward={forward}:7")).start();
    guest.busybox_shell();
    let helpers = guest.children();
    assert!(!helpers.is_empty(), "passt runs");
    guest.ok("net-up");
    // The host's loopback is behind the gateway's address.
    let url = format!("http://10.0.2.2:{}/thing", server.port);
    let printed = guest.ok(&format!("wget -q -O /tmp/thing {url} && md5sum /tmp/thing"));
    assert!(printed.contains(&sum), "{printed}");
    // From the host to the guest: the guest's own web server gives it back.
    guest.ok("httpd -p 7 -h /tmp");
    assert!(
        host::fetch(Ipv4Addr::LOCALHOST, forward, "/thing") == body,
        "another thing comes back"
    );
    let guest = guest.power_off("poweroff -f");
    host::wait_until("passt ends with the machine", || {
        !helpers.iter().any(|pid| host::is_alive(*pid))
    });
    drop(guest);
    TcpListener::bind((Ipv4Addr::LOCALHOST, forward)).expect("the forwarded port is free again");
}

#[test]
fn a_forwarded_port_that_is_taken_is_named() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let message = Run::busybox().arg("--net").arg(format!("user,forward={port}:22")).refused(4);
    assert!(message.contains(&port.to_string()) && message.contains("in use"), "{message}");
}

#[test]
fn a_missing_passt_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = Run::busybox().args(["--net", "user"]).with_path(folder.path()).refused(2);
    assert!(message.contains("apt install passt"), "{message}");
}

#[test]
fn a_tap_carries_frames_both_ways_and_is_busy_meanwhile() {
    if !host::is_root() {
        skip!("a network namespace with a tap needs root");
    }
    host::in_network_namespace(|| {
        host::ok("ip", &["tuntap", "add", "dev", "lodge0", "mode", "tap"]);
        host::ok("ip", &["addr", "add", "192.0.2.1/24", "dev", "lodge0"]);
        host::ok("ip", &["link", "set", "lodge0", "up"]);
        let body = noise();
        let sum = md5(&body);
        let run = Run::busybox().cpus(2).args(["--net", "tap=lodge0,mac=52:54:00:00:00:77"]);
        let mut guest = run.start();
        guest.busybox_shell();
        assert!(guest.ok("cat /sys/class/net/eth0/address").contains("52:54:00:00:00:77"));
        guest.ok("ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up");
        guest.ok("ping -c 3 -W 20 192.0.2.1");
        // Segments larger than a frame: offloads in both directions.
        let listener = TcpListener::bind((Ipv4Addr::new(192, 0, 2, 1), 7000)).unwrap();
        let sender = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&body).unwrap();
            drop(stream);
            let (mut stream, _) = listener.accept().unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            (body, back)
        });
        let printed = guest.ok("nc 192.0.2.1 7000 < /dev/null > /tmp/thing; md5sum /tmp/thing");
        assert!(printed.contains(&sum), "{printed}");
        guest.ok("nc 192.0.2.1 7000 < /tmp/thing");
        let (sent, back) = sender.join().unwrap();
        assert!(sent == back, "{} bytes came back", back.len());
        guest.ok("httpd -h /tmp");
        let fetched = host::fetch(Ipv4Addr::new(192, 0, 2, 2), 80, "/thing");
        assert!(fetched == sent, "the guest gives another thing");
        let socket = UdpSocket::bind((Ipv4Addr::new(192, 0, 2, 1), 7001)).unwrap();
        socket.set_read_timeout(Some(lodge_tests::patience())).unwrap();
        guest.ok(
            "syslogd -R 192.0.2.1:7001; until [ -S /dev/log ]; do sleep 0.1; done; logger datagram",
        );
        let mut buffer = [0; 1000];
        // syslogd tells of its own start first.
        let mut next = || {
            let count = socket.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..count]).into_owned()
        };
        while !next().contains("datagram") {}
        let message = run.refused(4);
        assert!(message.contains("lodge0") && message.contains("in use"), "{message}");
        guest.power_off("poweroff -f");
        // The tap was there before and is there after.
        host::ok("ip", &["link", "show", "lodge0"]);
    });
}

#[test]
fn two_cards_have_their_own_addresses() {
    let mut guest = Run::busybox()
        .args(["--net", "user", "--net", "user,mac=52:54:00:00:00:78"])
        .commands("cat /sys/class/net/eth0/address /sys/class/net/eth1/address; net-up eth1 2>/dev/null && ip addr show eth1")
        .start();
    guest.expect("nics=eth0,eth1,\n");
    let first = guest.expect("\n");
    assert_ne!(first, "52:54:00:00:00:78");
    guest.expect("52:54:00:00:00:78\n");
    guest.expect("inet 10.0.2.");
    guest.ends_with(0);
}
