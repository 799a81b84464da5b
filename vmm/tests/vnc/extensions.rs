//! Sizes, cursors, fences, names, input, several clients.

use std::time::Duration;

use lodge_devices::display::{Cursor, Picture, Rect};
use lodge_devices::input::{Button, InputEvent, Key};

use crate::client::*;
use crate::host::Host;
use crate::pictures::{mixed, text};

#[test]
fn sizes_follow_the_guest() {
    let host = Host::new(&mixed(640, 480));
    for encodings in [&[ZRLE, DESKTOP_SIZE][..], &[TIGHT, EXTENDED_DESKTOP_SIZE, DESKTOP_SIZE]] {
        host.canvas.show(&mixed(640, 480));
        let mut client = host.client(encodings);
        for (width, height) in [(640, 480), (1024, 300), (33, 700), (800, 600)] {
            let picture = mixed(width, height);
            host.canvas.show(&picture);
            client.ask(true);
            client.until(|client| client.pixels == picture.pixels);
            assert_eq!((client.width, client.height), (width as usize, height as usize));
        }
    }
}

#[test]
fn a_size_comes_without_pixels() {
    let host = Host::new(&mixed(64, 48));
    let mut client = host.client(&[RAW, DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE]);
    // A full request is answered with the size first.
    client.ask(false);
    let got = client.update();
    assert_eq!(got.len(), 1);
    assert_eq!((got[0].encoding, got[0].x, got[0].y), (EXTENDED_DESKTOP_SIZE, 0, 0));
    assert_eq!(got[0].data, [0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 48, 0, 0, 0, 0]);
    assert!(client.update().iter().all(|rect| rect.encoding == RAW));
    host.canvas.show(&mixed(80, 48));
    client.ask(true);
    let got = client.update();
    assert_eq!((got.len(), got[0].encoding, got[0].width), (1, EXTENDED_DESKTOP_SIZE, 80));
}

#[test]
fn clients_that_cannot_change_size_keep_theirs() {
    let first = mixed(300, 200);
    let host = Host::new(&first);
    let mut client = host.client(&[ZRLE]);
    client.until(|client| client.pixels == first.pixels);
    for (width, height) in [(200, 300), (500, 500), (300, 100)] {
        let picture = mixed(width, height);
        host.canvas.show(&picture);
        let mut fitted = Picture::black(300, 200);
        for y in 0..height.min(200) {
            for x in 0..width.min(300) {
                fitted.pixels[(y * 300 + x) as usize] = picture.pixels[(y * width + x) as usize];
            }
        }
        client.until(|client| client.pixels == fitted.pixels);
    }
}

#[test]
fn no_picture_is_black() {
    let host = Host::new(&Picture::default());
    let mut client = host.client(&[ZRLE, DESKTOP_SIZE]);
    assert_eq!((client.width, client.height), (640, 480));
    client.ask(false);
    client.update();
    assert!(client.pixels.iter().all(|pixel| *pixel == 0));
    let picture = mixed(320, 200);
    host.canvas.show(&picture);
    client.until(|client| client.pixels == picture.pixels);
}

#[test]
fn wishes_for_a_size_go_to_the_guest() {
    let host = Host::new(&mixed(640, 480));
    let mut client = host.client(&[RAW, EXTENDED_DESKTOP_SIZE]);
    let wish = |width: u16, height: u16, screen_width: u16| {
        let mut message = vec![251, 0];
        message.extend([width, height].map(u16::to_be_bytes).as_flattened());
        message.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        message.extend([screen_width, height].map(u16::to_be_bytes).as_flattened());
        message.extend([0; 4]);
        message
    };
    let mut answer = |width, height, screen_width| {
        client.send(&wish(width, height, screen_width));
        let got = client.update();
        assert_eq!((got.len(), got[0].encoding, got[0].x), (1, EXTENDED_DESKTOP_SIZE, 1));
        got[0].y
    };
    assert_eq!(answer(5000, 10, 5000), 1);
    assert_eq!(answer(800, 600, 400), 3);
    assert_eq!(answer(0, 600, 0), 3);
    assert_eq!(answer(800, 600, 800), 4);
    assert_eq!(host.canvas.wished(), [(5000, 10), (800, 600)]);
    client.until(|client| (client.width, client.height) == (800, 600));
}

#[test]
fn cursors_are_the_clients_to_draw() {
    let host = Host::new(&mixed(64, 64));
    let pixels = vec![0xff00_ff00, 0x8080_8080, 0, 0xffff_ffff, 0, 0xff00_0001];
    let cursor = Cursor { width: 3, height: 2, hot_x: 1, hot_y: 1, pixels };
    let cursors = |got: &[Got], encoding| {
        let found = got.iter().filter(|rect| rect.encoding == encoding).cloned();
        found.collect::<Vec<Got>>()
    };
    let mut masked = host.client(&[RAW, CURSOR]);
    let mut alpha = host.client(&[RAW, CURSOR, CURSOR_WITH_ALPHA]);
    for client in [&mut masked, &mut alpha] {
        client.ask(false);
        assert!(cursors(&client.update(), CURSOR).is_empty());
        client.ask(true);
    }
    host.canvas.point(Some(cursor.clone()));
    let got = cursors(&masked.update(), CURSOR);
    assert_eq!((got[0].x, got[0].y, got[0].width, got[0].height), (1, 1, 3, 2));
    assert_eq!(got[0].data[..4], [0, 0xff, 0, 0]);
    assert_eq!(got[0].data[24..], [0b1100_0000, 0b1010_0000]);
    let got = cursors(&alpha.update(), CURSOR_WITH_ALPHA);
    assert_eq!(got[0].data[..8], [0, 0xff, 0, 0xff, 0x40, 0x40, 0x40, 0x80]);
    // Who comes later gets it too, in its own format.
    let mut late = host.client(&[RAW, CURSOR]);
    late.set_format(Format {
        bits: 16,
        depth: 16,
        big: true,
        max: [31, 63, 31],
        shift: [11, 5, 0],
    });
    late.ask(false);
    assert_eq!(cursors(&late.update(), CURSOR)[0].data[..2], [0x07, 0xe0]);
    // Hidden, and impossible.
    for gone in [None, Some(Cursor { width: 4, ..cursor })] {
        masked.ask(true);
        host.canvas.point(gone);
        let got = cursors(&masked.update(), CURSOR);
        assert_eq!((got[0].width, got[0].height, got[0].data.len()), (0, 0, 0));
    }
}

#[test]
fn fences_come_back_in_order() {
    let host = Host::new(&mixed(200, 200));
    let mut client = host.client(&[RAW, FENCE]);
    assert_eq!(client.listen(), Said::Fence(1 << 31, Vec::new()));
    client.fence(1 << 31 | 1 << 30 | 0b011, b"abc");
    assert_eq!(client.listen(), Said::Fence(0b011, b"abc".to_vec()));
    // With SyncNext, the answer comes with the next message: nothing between is in the new format.
    client.continuous(true);
    client.update();
    let small = Format { bits: 8, depth: 8, big: false, max: [7, 7, 3], shift: [0, 3, 6] };
    for (format, y) in [(small, 0), (Format::NATIVE, 50), (small, 100)] {
        host.canvas.fill(Rect { x: 0, y, width: 200, height: 20 }, 0x11_2233 + y);
        client.fence(1 << 31 | 0b100, b"sync");
        client.send(&[&[0, 0, 0, 0][..], &format.bytes()].concat());
        while client.listen() != Said::Fence(0b100, b"sync".to_vec()) {}
        client.format = format;
        client.ask(false);
        client.update();
    }
    // A fence before something that is no order.
    client.fence(1 << 31 | 0b100, b"x");
    client.pointer(0, 1, 1);
    while client.listen() != Said::Fence(0b100, b"x".to_vec()) {}
}

#[test]
fn updates_come_without_questions() {
    let host = Host::new(&text(320, 200, 0));
    for encodings in [&[ZRLE, FENCE, CONTINUOUS][..], &[ZRLE, CONTINUOUS]] {
        let mut client = host.client(encodings);
        while client.listen() != Said::EndOfContinuous {}
        client.continuous(true);
        for line in 0..30 {
            let picture = text(320, 200, line);
            host.canvas.show(&picture);
            while client.pixels != picture.pixels {
                client.update();
            }
        }
        // Incremental questions are for nothing now, full ones are not.
        client.ask(true);
        client.ask(false);
        client.update();
        client.continuous(false);
        while client.listen() != Said::EndOfContinuous {}
        host.canvas.show(&text(320, 200, 50));
        client.ask(true);
        client.update();
        assert_eq!(client.pixels, text(320, 200, 50).pixels);
    }
}

#[test]
fn few_updates_are_on_their_way() {
    let host = Host::new(&Picture::black(64, 64));
    let mut client = host.client(&[RAW, FENCE, CONTINUOUS]);
    while client.listen() != Said::EndOfContinuous {}
    client.continuous(true);
    // The client says nothing to the fences: it has not arrived there.
    let mut updates = 0;
    let mut read = |client: &mut Client| {
        let kind = client.bytes(1)[0];
        match kind {
            0 => {
                let head = client.bytes(3);
                for _ in 0..head[2] {
                    let head = client.bytes(12);
                    let size = |at| usize::from(u16::from_be_bytes([head[at], head[at + 1]]));
                    client.bytes(size(4) * size(6) * 4);
                }
                updates += 1;
            }
            248 => {
                client.bytes(9);
            }
            other => panic!("{other}"),
        }
        updates
    };
    for i in 0..4 {
        host.canvas.fill(Rect { x: 0, y: 0, width: 16, height: 16 }, i + 1);
        while read(&mut client) != i as usize + 1 {}
        // The fence after it.
        read(&mut client);
    }
    host.canvas.fill(Rect { x: 0, y: 0, width: 16, height: 16 }, 9);
    std::thread::sleep(Duration::from_millis(150));
    // The answer to this is the next thing that comes: there was no fifth update.
    client.fence(1 << 31, b"");
    assert_eq!(client.bytes(9), [248, 0, 0, 0, 0, 0, 0, 0, 0]);
    client.fence(1, &[1]);
    assert_eq!(client.update().len(), 1);
}

#[test]
fn names_change() {
    let host = Host::new(&mixed(64, 64));
    let mut client = host.client(&[RAW, DESKTOP_NAME]);
    client.ask(false);
    client.update();
    host.server.set_name("näme");
    client.ask(true);
    let got = client.update();
    assert_eq!((got[0].encoding, got[0].data.as_slice()), (DESKTOP_NAME, "näme".as_bytes()));
}

#[test]
fn keys_and_pointers_reach_the_guest() {
    use InputEvent::{At, Wheel};
    let key = |code, down| InputEvent::Key(Key(code), down);
    let host = Host::new(&Picture::black(641, 481));
    let mut client = host.client(&[RAW, EXTENDED_KEYS, SIDE_BUTTONS]);
    client.ask(false);
    let got = client.update();
    assert!(got.iter().any(|rect| rect.encoding == EXTENDED_KEYS));
    assert!(got.iter().any(|rect| rect.encoding == SIDE_BUTTONS));
    client.key('A'.into(), true);
    client.key('A'.into(), false);
    host.sink.expect(&[key(42, true), key(30, true), key(42, false), key(30, false)]);
    client.send(&[255, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xcd]);
    host.sink.expect(&[key(106, true)]);
    client.pointer(1, 320, 480);
    host.sink.expect(&[At { x: 0x3fff, y: 0x7fff }, InputEvent::Button(Button::Left, true)]);
    client.pointer(0b1001, 320, 480);
    client.send(&[5, 0x81, 0x01, 0x40, 0x01, 0xe0, 0b10]);
    host.sink.expect(&[Wheel(1), InputEvent::Button(Button::Extra, true)]);
    drop(client);
    let released = [key(106, false)];
    let buttons = [Button::Left, Button::Extra].map(|button| InputEvent::Button(button, false));
    host.sink.expect(&[&released[..], &buttons].concat());
}

#[test]
fn mice_without_places_get_movements() {
    let host = Host::new(&Picture::black(640, 480));
    host.sink.set_only_moves();
    let mut client = host.client(&[RAW, POINTER_MOTION]);
    client.ask(false);
    let got = client.update();
    let motion = got.iter().find(|rect| rect.encoding == POINTER_MOTION).unwrap();
    assert_eq!(motion.x, 0);
    client.pointer(0, 0x7fff - 5, 0x7fff + 7);
    host.sink.expect(&[InputEvent::Moved { dx: -5, dy: 7 }]);
    // Who does not know this is watched.
    let mut other = host.client(&[RAW]);
    other.pointer(0, 100, 100);
    other.pointer(0, 103, 90);
    host.sink.expect(&[InputEvent::Moved { dx: 3, dy: -10 }]);
}

#[test]
fn a_client_that_does_not_share_is_alone() {
    let host = Host::new(&mixed(64, 64));
    let mut first = host.client(&[RAW]);
    let mut second = host.client(&[RAW]);
    host.wait_for_clients(2);
    for client in [&mut first, &mut second] {
        client.ask(false);
        client.update();
    }
    let mut alone = Client::start(crate::host::secured(host.connect()), false);
    for client in [&mut first, &mut second] {
        assert!(crate::host::read_all(&mut client.stream).is_empty());
    }
    host.wait_for_clients(1);
    alone.ask(false);
    alone.update();
}

#[test]
fn stopping_ends_everything() {
    let host = Host::new(&mixed(64, 64));
    let mut clients: Vec<_> = (0..5).map(|_| host.client(&[ZRLE])).collect();
    let mut half = host.connect();
    clients[0].ask(false);
    clients[0].update();
    let address = host.address();
    drop(host.server);
    for client in &mut clients {
        crate::host::read_all(&mut client.stream);
    }
    crate::host::read_all(&mut half);
    assert!(std::net::TcpStream::connect(address).is_err());
    // The display is there without a server.
    assert_eq!(host.display.picture(), mixed(64, 64));
}
