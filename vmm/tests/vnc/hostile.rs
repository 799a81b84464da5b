//! Clients that do what they should not: only their own connection suffers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::client::{CONTINUOUS, Client, FENCE, RAW, TIGHT, ZRLE};
use crate::host::{Host, read, read_all, secured};
use crate::pictures::{Random, mixed, noise};

/// A client that behaves still gets the picture, whatever the others do.
fn serves(host: &Host) {
    let mut client = host.client(&[ZRLE]);
    client.ask(false);
    client.update();
    assert_eq!(client.pixels, host.display.picture().pixels);
}

/// More than any test here needs, and far less than what would pile up without limits.
const MOST_MEMORY: usize = 256 << 20;

/// The process's memory in use, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn garbage_ends_a_connection() {
    let host = Host::new(&mixed(64, 64));
    let mut random = Random(3);
    for len in [1, 3, 12, 13, 100, 10_000] {
        let mut stream = host.connect();
        let garbage: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        // The server may be gone before all is written.
        let _ = stream.write_all(&garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let said = read_all(&mut stream);
        assert!(said.starts_with(b"RFB 003.008\n"), "{said:?}");
    }
    for after in [&[0, 0, 0, 0, 24][..], &[99], &[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[255, 7]] {
        let mut client = host.client(&[RAW]);
        let message = [after, &[0; 40]].concat();
        client.send(&message);
        read_all(&mut client.stream);
    }
    serves(&host);
}

#[test]
fn any_messages_are_survived() {
    let host = Host::new(&mixed(64, 48));
    let mut runner =
        TestRunner::new(Config { cases: 150, failure_persistence: None, ..Config::default() });
    let kinds = proptest::sample::select(vec![0_u8, 2, 3, 3, 3, 4, 5, 6, 150, 248, 251, 255]);
    let message = (kinds, proptest::collection::vec(any::<u8>(), 0..60))
        .prop_map(|(kind, rest)| [&[kind][..], &rest].concat());
    let messages = proptest::collection::vec(message, 1..20);
    let run = runner.run(&messages, |messages| {
        let mut stream = secured(host.connect());
        let mut sent = vec![1];
        // Everything that the server knows, so that everything can be hit.
        sent.extend([2, 0, 0, 9]);
        for encoding in [TIGHT, 1, -223, -308, -239, -312, -313, -316, -257] {
            sent.extend(encoding.to_be_bytes());
        }
        sent.extend(messages.concat());
        let _ = stream.write_all(&sent);
        let mut buffer = [0; 4096];
        let _ = stream.read(&mut buffer);
        Ok(())
    });
    run.unwrap();
    serves(&host);
    host.wait_for_clients(0);
}

#[test]
fn a_hundred_half_handshakes_keep_nobody_out() {
    let host = Host::new(&mixed(64, 64));
    let half: Vec<TcpStream> = (0..100)
        .map(|i| {
            let mut stream = host.connect();
            // Each at another step.
            stream.write_all(&b"RFB 003.008\n\x01"[..i % 14]).unwrap();
            stream
        })
        .collect();
    serves(&host);
    for mut stream in half {
        // Some were crowded out, all were greeted if they were heard at all.
        stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        let mut greeting = [0; 12];
        if stream.read_exact(&mut greeting).is_ok() {
            assert_eq!(&greeting, b"RFB 003.008\n");
        }
    }
    serves(&host);
}

#[test]
fn the_33rd_client_is_told_why() {
    let host = Host::new(&mixed(64, 64));
    let mut clients: Vec<Client> = (0..32).map(|_| host.client(&[RAW])).collect();
    host.wait_for_clients(32);
    let mut stream = host.connect();
    assert_eq!(read::<12>(&mut stream), *b"RFB 003.008\n");
    stream.write_all(b"RFB 003.008\n\x01").unwrap();
    assert_eq!(read::<2>(&mut stream), [1, 1]);
    assert_eq!(read::<4>(&mut stream), [0, 0, 0, 1]);
    let reason = read_all(&mut stream);
    assert_eq!(str::from_utf8(&reason[4..]), Ok("32 clients are connected, and more cannot be"));
    for client in &mut clients {
        client.ask(false);
        client.update();
    }
    clients.pop();
    host.wait_for_clients(31);
    serves(&host);
}

#[test]
fn clients_that_never_read_slow_nobody() {
    let host = Host::new(&noise(1024, 768));
    let silent: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = host.client(&[RAW, FENCE, CONTINUOUS]);
            client.ask(false);
            client.continuous(true);
            client
        })
        .collect();
    let before = resident();
    let mut client = host.client(&[RAW]);
    for i in 0..60 {
        let mut picture = noise(1024, 768);
        picture.pixels.rotate_left(i + 1);
        host.canvas.show(&picture);
        client.ask(i == 0);
        client.update();
        client.until(|client| client.pixels == picture.pixels);
    }
    // Each of them may keep a picture and what is on its way, whatever happens meanwhile.
    let grown = resident().saturating_sub(before);
    assert!(grown < MOST_MEMORY, "{} MiB more", grown >> 20);
    // Stopping does not wait for them.
    drop(host);
    drop(silent);
}

#[test]
fn answers_that_nobody_reads_have_a_limit() {
    let host = Host::new(&noise(1024, 768));
    let before = resident();
    let mut client = host.client(&[RAW, FENCE]);
    let fence = [&[248, 0, 0, 0, 0x80, 0, 0, 1, 64][..], &[7; 64]].concat();
    let flood = fence.repeat(1000);
    // Fences that pile up behind a picture which is not read; then the server gives up.
    client.ask(false);
    let mut gone = false;
    for _ in 0..100_000 {
        if client.stream.write_all(&flood).is_err() {
            gone = true;
            break;
        }
    }
    assert!(gone, "the server took 7 GB of fences");
    assert!(resident().saturating_sub(before) < MOST_MEMORY);
    serves(&host);
}

#[test]
fn questions_are_cheap() {
    let host = Host::new(&mixed(640, 480));
    let mut client = host.client(&[ZRLE]);
    let before = resident();
    // Many at once are one; half of them are for areas that do not exist.
    let mut questions = Vec::new();
    for i in 0..50_000_u32 {
        questions.extend([3, 1, 0xff, 0xff, 0, 0, 0xff, 0xff, (i >> 8) as u8, i as u8]);
        questions.extend([3, 1, 0, 0, 0, 0, 2, 0x80, 1, 0xe0]);
    }
    client.send(&questions);
    client.ask(false);
    while client.pixels != mixed(640, 480).pixels {
        client.update();
    }
    assert!(resident().saturating_sub(before) < MOST_MEMORY);
    serves(&host);
}

#[test]
fn a_long_text_is_read_past() {
    let host = Host::new(&mixed(64, 64));
    let mut client = host.client(&[RAW]);
    client.send(&[6, 0, 0, 0, 0, 0x10, 0, 0]);
    // It looks like messages, and is none.
    client.send(&vec![99; 1 << 20]);
    client.send(&[6, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3]);
    client.ask(false);
    client.update();
    assert_eq!(client.pixels, mixed(64, 64).pixels);
    // Formats that cannot be, and lists of encodings that mean nothing.
    client.set_encodings(&(0..65_535).map(|i| i * 7 + 1000).collect::<Vec<_>>());
    client.ask(false);
    client.update();
}
