//! Backends against the real things: the kernel's tap and passt, in network namespaces of the tests' own.
//! Needs root, `ip` (iproute2) and `passt`.

use std::net::{TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use lodge_net::{
    Backend, Buffer, Error, Forward, GATEWAY, GUEST, HEADER_LEN, Offloads, Tap, User, UserOptions,
};

const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// Runs `test` in a network namespace that has a loopback interface and nothing else, and that goes with the
/// thread and the processes in it.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    // SAFETY: always succeeds.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: network namespaces need root");
        return;
    }
    let thread = thread::spawn(|| {
        // SAFETY: only this thread moves to the new namespace.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "unshare(CLONE_NEWNET)");
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.expect("this test needs ip (Debian: iproute2)").success(), "ip {arguments}");
}

/// Waits until the kernel sends through the tap `t0`: it begins a moment after the tap was opened, and drops
/// what it would have sent before.
fn wait_until_up() {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        let shown = Command::new("ip").args(["link", "show", "t0"]).output();
        let shown = shown.expect("this test needs ip (Debian: iproute2)").stdout;
        if String::from_utf8_lossy(&shown).contains("state UP") {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("the tap does not come up");
}

/// The next frame without its header.
fn receive(backend: &mut dyn Backend) -> Option<Vec<u8>> {
    let mut memory = vec![0xee; 70_000];
    let (a, b) = memory.split_at_mut(11);
    let mut bufs = [a, b].map(|s| Buffer { ptr: s.as_mut_ptr(), len: s.len() });
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        // SAFETY: `memory` outlives the call.
        if let Some(n) = unsafe { backend.receive(&mut bufs) }.unwrap() {
            assert_eq!(&memory[10..12], [1, 0], "the number of buffers");
            return Some(memory[HEADER_LEN..n].to_vec());
        }
        let mut poll = libc::pollfd { fd: backend.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, 1000) };
    }
    None
}

/// Receives until `wanted` takes a frame.
fn expect<T>(backend: &mut dyn Backend, what: &str, wanted: impl Fn(&[u8]) -> Option<T>) -> T {
    for _ in 0..100 {
        let Some(frame) = receive(backend) else { break };
        if let Some(found) = wanted(&frame) {
            return found;
        }
    }
    panic!("no {what} came");
}

fn send(backend: &mut dyn Backend, header: [u8; HEADER_LEN], frame: &[u8]) {
    let mut memory = [&header[..], frame].concat();
    let bufs: Vec<_> =
        memory.chunks_mut(13).map(|c| Buffer { ptr: c.as_mut_ptr(), len: c.len() }).collect();
    // SAFETY: `memory` outlives the call.
    assert!(unsafe { backend.send(&bufs) }.unwrap());
}

fn arp(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend(from);
    frame.extend([0; 6]);
    frame.extend(to);
    frame
}

/// The answer's hardware address.
fn arp_answer(frame: &[u8]) -> Option<[u8; 6]> {
    (frame[12..14] == [8, 6] && frame[20..22] == [0, 2]).then(|| frame[22..28].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An IPv4 UDP frame. With `partial`, the checksum is left to the host, as VIRTIO_NET_HDR_F_NEEDS_CSUM wants it.
fn udp(
    to_mac: [u8; 6],
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
    data: &[u8],
    partial: bool,
) -> Vec<u8> {
    let len = (8 + data.len()) as u16;
    let mut segment = Vec::new();
    for v in [from.1, to.1, len, 0] {
        segment.extend(v.to_be_bytes());
    }
    segment.extend(data);
    let pseudo = sum(&from.0) + sum(&to.0) + 17 + u32::from(len);
    let check = if partial { fold(pseudo) } else { !fold(pseudo + sum(&segment)) };
    segment[6..8].copy_from_slice(&check.to_be_bytes());
    let mut header = vec![0x45, 0];
    header.extend((20 + len).to_be_bytes());
    header.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    header.extend(from.0);
    header.extend(to.0);
    let check = !fold(sum(&header));
    header[10..12].copy_from_slice(&check.to_be_bytes());
    [&to_mac[..], &MAC, &[8, 0], &header, &segment].concat()
}

/// The data of a UDP frame to our port.
fn udp_data(frame: &[u8], port: u16) -> Option<Vec<u8>> {
    let ours = frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == port.to_be_bytes();
    ours.then(|| frame[42..].to_vec())
}

fn message(error: Error) -> String {
    error.to_string()
}

#[test]
fn a_tap_carries_frames_both_ways() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        ip("addr add 192.168.77.1/24 dev t0");
        ip("link set t0 up");
        let mut tap = Tap::open("t0", 1).unwrap().remove(0);
        wait_until_up();
        assert!(tap.offloads().contains(Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6));
        let (guest, host) = ([192, 168, 77, 2], [192, 168, 77, 1]);
        send(&mut tap, [0; HEADER_LEN], &arp(guest, host));
        let mac = expect(&mut tap, "ARP answer", arp_answer);

        let socket = UdpSocket::bind("192.168.77.1:7000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        tap.set_offloads(Offloads::CHECKSUM | Offloads::TSO4).unwrap();
        // Needs a checksum: from byte 34 (the UDP header), to be put 6 bytes later.
        let header = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
        send(&mut tap, header, &udp(mac, (guest, 5000), (host, 7000), b"a question", true));
        let mut data = [0; 100];
        let (n, from) = socket.recv_from(&mut data).unwrap();
        assert_eq!(
            (&data[..n], from.to_string().as_str()),
            (&b"a question"[..], "192.168.77.2:5000")
        );
        socket.send_to(b"an answer", from).unwrap();
        // The kernel asks for our address first.
        let answer = loop {
            let frame = receive(&mut tap).expect("an answer");
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 1] {
                let mut reply = arp(guest, host);
                reply[21] = 2;
                reply[..6].copy_from_slice(&mac);
                reply[32..38].copy_from_slice(&mac);
                send(&mut tap, [0; HEADER_LEN], &reply);
            } else if let Some(data) = udp_data(&frame, 5000) {
                break data;
            }
        };
        assert_eq!(answer, b"an answer");

        let mut pieces = udp(mac, (guest, 5000), (host, 7000), &[7; 1300], false);
        pieces.splice(0..0, [0; HEADER_LEN]);
        let bufs: Vec<_> =
            pieces.iter_mut().map(|b| Buffer { ptr: std::ptr::from_mut(b), len: 1 }).collect();
        // SAFETY: `pieces` outlives the call.
        assert!(unsafe { tap.send(&bufs) }.unwrap(), "more pieces than a system call takes");
        assert_eq!(socket.recv_from(&mut data).unwrap().0, 100);

        // SAFETY: no buffers.
        assert!(unsafe { tap.send(&[]) }.is_err(), "no frame at all");
        ip("link set t0 down");
        send(&mut tap, [0; HEADER_LEN], &arp(guest, host));
        ip("link del t0");
        let mut byte = 0u8;
        let bufs = &mut [Buffer { ptr: &raw mut byte, len: 1 }];
        // SAFETY: `byte` outlives the call.
        let gone = unsafe { tap.receive(bufs) }.unwrap_err();
        assert_eq!(gone.kind(), std::io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_tap_gives_its_frames_to_active_queues_only() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap multi_queue");
        ip("addr add 192.168.77.1/24 dev t0");
        ip("link set t0 up");
        ip("neigh add 192.168.77.2 lladdr 02:00:00:00:00:01 dev t0");
        let mut taps = Tap::open("t0", 3).unwrap();
        wait_until_up();
        for tap in &mut taps[1..] {
            tap.set_active(false).unwrap();
            tap.set_active(false).unwrap();
            tap.set_offloads(Offloads::CHECKSUM).unwrap();
        }
        // Many flows, which the kernel would spread over all queues.
        let ask = || {
            let socket = UdpSocket::bind("192.168.77.1:0").unwrap();
            for port in 5000..5040 {
                socket.send_to(b"x", ("192.168.77.2", port)).unwrap();
            }
        };
        let is_asked = |frame: &[u8], port| udp_data(frame, port).map(|_| ());
        ask();
        for port in 5000..5040 {
            expect(&mut taps[0], "datagram", |frame| is_asked(frame, port));
        }
        taps[0].set_active(false).unwrap();
        taps[2].set_active(true).unwrap();
        ask();
        for port in 5000..5040 {
            expect(&mut taps[2], "datagram", |frame| is_asked(frame, port));
        }
    });
}

#[test]
fn a_frame_longer_than_the_buffers_is_reported_and_lost() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        ip("addr add 192.168.77.1/24 dev t0");
        ip("link set t0 up");
        ip("neigh add 192.168.77.2 lladdr 02:00:00:00:00:01 dev t0");
        let mut tap = Tap::open("t0", 1).unwrap().remove(0);
        wait_until_up();
        let socket = UdpSocket::bind("192.168.77.1:7000").unwrap();
        socket.send_to(&[1; 1000], "192.168.77.2:5000").unwrap();
        socket.send_to(&[2; 10], "192.168.77.2:5000").unwrap();
        let mut memory = [0u8; 500];
        let mut bufs = [Buffer { ptr: memory.as_mut_ptr(), len: memory.len() }];
        let (mut long, mut short) = (0, 0);
        while short == 0 {
            // SAFETY: `memory` outlives the call.
            match unsafe { tap.receive(&mut bufs) } {
                Ok(Some(n)) if memory[HEADER_LEN + 12..n][..2] == [8, 0] => short += 1,
                Ok(_) => {}
                Err(e) => {
                    assert_eq!(e.kind(), std::io::ErrorKind::InvalidData);
                    long += 1;
                }
            }
        }
        assert_eq!((long, short), (1, 1));
    });
}

#[test]
fn taps_that_cannot_be_had_are_told_apart() {
    in_namespace(|| {
        let failed = |name: &str, queues| message(Tap::open(name, queues).unwrap_err());
        let missing = failed("t9", 1);
        assert!(missing.contains("ip tuntap add dev t9 mode tap"), "{missing}");
        assert!(matches!(Tap::open("t9", 1), Err(Error::NoSuchTap { .. })), "it must not be made");
        assert!(failed("lo", 1).contains("lo is no tap"));
        assert!(failed("", 1).contains("is no name"));
        assert!(failed("a-name-that-is-too-long", 1).contains("is no name"));
        ip("tuntap add dev t0 mode tap");
        let _one = Tap::open("t0", 1).unwrap();
        assert!(failed("t0", 1).contains("t0 is in use"));
        assert!(failed("t0", 2).contains("multi_queue"));
        ip("tuntap add dev t1 mode tap multi_queue");
        assert_eq!(Tap::open("t1", 1).unwrap().len(), 1);
        assert_eq!(Tap::open("t1", 4).unwrap().len(), 4);
        ip("tuntap add dev t2 mode tun");
        assert!(failed("t2", 1).contains("t2 is no tap"));
    });
}

/// One DHCP message (RFC 2131) to passt; its answer's type and the address that it gives.
fn dhcp(user: &mut User, kind: u8) -> (u8, [u8; 4]) {
    let mut bootp = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78];
    bootp.resize(28, 0);
    bootp.extend(MAC);
    bootp.resize(236, 0);
    bootp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, kind, 55, 3, 1, 3, 6, 255]);
    let frame = udp([0xff; 6], ([0; 4], 68), ([255; 4], 67), &bootp, false);
    send(user, [0; HEADER_LEN], &frame);
    let answer = expect(user, "DHCP answer", |f| udp_data(f, 68));
    let options = &answer[240..];
    let router = options.windows(6).any(|w| w == [3, 4, 10, 0, 2, 2]);
    assert!(router, "the gateway must be {GATEWAY}");
    let kind = options.windows(3).find(|w| w[..2] == [53, 1]).expect("a message type")[2];
    (kind, answer[16..20].try_into().unwrap())
}

#[test]
fn passt_gives_the_guest_an_address_and_the_hosts_loopback() {
    in_namespace(|| {
        let forwards = vec![Forward::tcp(2222, 22)];
        let mut user = User::open(&UserOptions { mac: MAC, forwards }).unwrap();
        assert_eq!(user.offloads(), Offloads::empty());
        assert_eq!(dhcp(&mut user, 1), (2, GUEST.octets()));
        assert_eq!(dhcp(&mut user, 3), (5, GUEST.octets()));

        send(&mut user, [0; HEADER_LEN], &arp(GUEST.octets(), GATEWAY.octets()));
        let mac = expect(&mut user, "ARP answer", arp_answer);
        let socket = UdpSocket::bind("127.0.0.1:7000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let to = (GATEWAY.octets(), 7000);
        let question = udp(mac, (GUEST.octets(), 5000), to, b"a question", false);
        send(&mut user, [0; HEADER_LEN], &question);
        let mut data = [0; 100];
        let (n, from) = socket.recv_from(&mut data).unwrap();
        assert_eq!(&data[..n], b"a question");
        assert!(from.ip().is_loopback(), "{from}");
        socket.send_to(b"an answer", from).unwrap();
        assert_eq!(expect(&mut user, "answer", |f| udp_data(f, 5000)), b"an answer");

        // A connection to the forwarded port arrives as a SYN to port 22.
        let _connection = TcpStream::connect("127.0.0.1:2222").unwrap();
        expect(&mut user, "SYN", |f| {
            let tcp = f[12..14] == [8, 0] && f[23] == 6;
            (tcp && f[36..38] == [0, 22] && f[47] & 0x12 == 0x02).then_some(())
        });
    });
}

#[test]
fn ports_that_cannot_be_forwarded_are_told() {
    in_namespace(|| {
        let _taken = std::net::TcpListener::bind("127.0.0.1:2222").unwrap();
        let open = |forward| User::open(&UserOptions { mac: MAC, forwards: vec![forward] });
        let text = message(open(Forward::tcp(2222, 22)).unwrap_err());
        assert!(text.contains("port 2222 of 127.0.0.1") && text.contains("in use"), "{text}");
        let _first = open(Forward::tcp(2223, 22)).unwrap();
        let text = message(open(Forward::tcp(2223, 22)).unwrap_err());
        assert!(text.contains("in use"), "{text}");
        let everywhere = Forward { address: [0, 0, 0, 0].into(), ..Forward::tcp(2224, 22) };
        let _second = open(everywhere).unwrap();
        let nowhere = Forward { address: [192, 0, 2, 77].into(), ..Forward::tcp(2225, 22) };
        let text = message(open(nowhere).unwrap_err());
        assert!(text.contains("port 2225 of 192.0.2.77"), "{text}");
        let low = Forward::tcp(23, 23);
        match open(low) {
            // Root's rights are given up by passt before it listens, by some versions.
            Err(e) => assert!(message(e).contains("may not listen"), "the reason"),
            Ok(_) => drop(TcpStream::connect("127.0.0.1:23").unwrap()),
        }
    });
}

#[test]
fn passt_ends_with_its_network() {
    in_namespace(|| {
        let children = || {
            let all = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
            all.split_whitespace().count()
        };
        let before = children();
        let user = User::open(&UserOptions { mac: MAC, forwards: vec![] }).unwrap();
        // Passt, and the shell that watches over it.
        assert_eq!(children(), before + 2);
        drop(user);
        assert_eq!(children(), before);
    });
}
