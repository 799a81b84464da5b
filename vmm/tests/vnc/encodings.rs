//! Every encoding in every pixel format: what the client has is what the guest shows.

use lodge_devices::display::{Picture, Rect};

use crate::client::{COPY_RECT, Client, Format, RAW, TIGHT, ZLIB, ZRLE};
use crate::host::Host;
use crate::pictures::{Random, mixed, noise, photo, text};

const FORMATS: [Format; 9] = [
    Format::NATIVE,
    Format { shift: [0, 8, 16], ..Format::NATIVE },
    Format { big: true, ..Format::NATIVE },
    Format { big: true, shift: [24, 16, 8], ..Format::NATIVE },
    Format { shift: [24, 16, 8], ..Format::NATIVE },
    Format { depth: 32, shift: [20, 10, 0], max: [1023, 1023, 1023], ..Format::NATIVE },
    Format { bits: 16, depth: 16, big: false, max: [31, 63, 31], shift: [11, 5, 0] },
    Format { bits: 16, depth: 15, big: true, max: [31, 31, 31], shift: [0, 5, 10] },
    Format { bits: 8, depth: 8, big: false, max: [7, 7, 3], shift: [0, 3, 6] },
];

/// Whether the client has exactly this, in its format.
fn has(client: &Client, picture: &Picture) -> bool {
    let same = |(value, colour): (&u32, &u32)| *value == client.format.value(*colour);
    (client.width, client.height) == (picture.width as usize, picture.height as usize)
        && client.pixels.iter().zip(&picture.pixels).all(same)
}

fn check(client: &Client, picture: &Picture, what: &str) {
    let differing = client
        .pixels
        .iter()
        .zip(&picture.pixels)
        .filter(|(value, colour)| **value != client.format.value(**colour))
        .count();
    assert_eq!(differing, 0, "{what}: so many pixels differ");
    assert!(has(client, picture), "{what}");
}

#[test]
fn lossless_encodings_are_exact() {
    let picture = mixed(715, 389);
    let host = Host::new(&picture);
    for encoding in [RAW, ZLIB, ZRLE, TIGHT] {
        for format in FORMATS {
            let mut client = host.client(&[encoding]);
            client.set_format(format);
            client.ask(false);
            let got = client.update();
            assert!(got.iter().all(|rect| rect.encoding == encoding));
            check(&client, &picture, &format!("{encoding} in {format:?}"));
        }
    }
}

#[test]
fn levels_change_while_a_client_is_there() {
    let host = Host::new(&mixed(300, 200));
    for encoding in [ZLIB, ZRLE, TIGHT] {
        let mut client = host.client(&[encoding]);
        for (i, level) in [-256, -247, -250, -256, -251].into_iter().enumerate() {
            client.set_encodings(&[encoding, level]);
            let picture = if i % 2 == 0 { photo(300, 200) } else { mixed(300, 200) };
            host.canvas.show(&picture);
            client.ask(false);
            client.update();
            check(&client, &picture, &format!("{encoding}, level {level}"));
        }
    }
}

#[test]
fn a_client_without_encodings_gets_raw() {
    let picture = mixed(100, 80);
    let host = Host::new(&picture);
    let mut client = Client::start(crate::host::secured(host.connect()), true);
    assert_eq!((client.name.as_str(), client.width, client.height), ("test", 100, 80));
    client.ask(false);
    assert!(client.update().iter().all(|rect| rect.encoding == RAW));
    check(&client, &picture, "raw");
}

/// The largest difference of a colour, and the mean one.
fn error(client: &Client, picture: &Picture) -> (u32, f64) {
    let mut sum = 0;
    let mut worst = 0;
    for (a, b) in client.pixels.iter().zip(&picture.pixels) {
        for (a, b) in a.to_be_bytes().into_iter().zip(b.to_be_bytes()) {
            let difference = u32::from(a.abs_diff(b));
            sum += difference;
            worst = worst.max(difference);
        }
    }
    (worst, f64::from(sum) / (picture.pixels.len() * 3) as f64)
}

#[test]
fn photographs_lose_a_little_until_they_rest() {
    let picture = photo(640, 480);
    let host = Host::new(&picture);
    let mut sizes = Vec::new();
    for (quality, bound) in [(-32, 12.0), (-26, 6.0), (-23, 3.0)] {
        let mut client = host.client(&[TIGHT, quality]);
        let before = client.received;
        client.ask(false);
        client.update();
        sizes.push(client.received - before);
        assert!(client.jpegs > 0, "no JPEG");
        let (_, mean) = error(&client, &picture);
        assert!(mean > 0.0 && mean < bound, "quality {quality}: {mean} off");
        // What rests becomes exact.
        client.until(|client| has(client, &picture));
    }
    assert!(sizes.is_sorted(), "better is not larger: {sizes:?}");
}

#[test]
fn jpeg_is_only_for_those_who_take_it() {
    let picture = photo(320, 240);
    let host = Host::new(&picture);
    let mut client = host.client(&[TIGHT]);
    client.ask(false);
    client.update();
    assert_eq!(client.jpegs, 0);
    check(&client, &picture, "without a quality");
    let mut client = host.client(&[TIGHT, -26]);
    client.set_format(FORMATS[8]);
    client.ask(false);
    client.update();
    assert_eq!(client.jpegs, 0);
    check(&client, &picture, "in 8 bits");
    // Text stays sharp beside it.
    let host = Host::new(&text(320, 240, 3));
    let mut client = host.client(&[TIGHT, -32]);
    client.ask(false);
    client.update();
    check(&client, &text(320, 240, 3), "text");
}

#[test]
fn text_that_scrolls_is_copied() {
    for encoding in [RAW, ZRLE, TIGHT] {
        let host = Host::new(&text(800, 600, 0));
        let mut client = host.client(&[encoding, COPY_RECT]);
        client.ask(false);
        client.update();
        for line in [1, 2, 10, 4, 3, 30] {
            let before = client.received;
            let picture = text(800, 600, line);
            host.canvas.show(&picture);
            client.ask(true);
            let got = client.update();
            check(&client, &picture, &format!("{encoding}, line {line}"));
            let copied: usize =
                got.iter().filter(|rect| rect.encoding == COPY_RECT).map(|rect| rect.height).sum();
            assert!(copied > 100, "line {line}: {got:?}");
            assert!(client.received - before < 800 * 600 * 4);
        }
    }
}

#[test]
fn changes_anywhere_arrive() {
    let mut random = Random(1);
    let mut picture = noise(500, 400);
    let host = Host::new(&picture);
    let mut clients: Vec<Client> =
        [RAW, ZRLE, TIGHT].into_iter().map(|e| host.client(&[e, COPY_RECT])).collect();
    for client in &mut clients {
        client.ask(false);
        client.update();
        check(client, &picture, "at first");
    }
    for round in 0..40 {
        let (x, y) = (random.next() % 499, random.next() % 399);
        let rect = Rect {
            x,
            y,
            width: 1 + random.next() % (500 - x).min(90),
            height: 1 + random.next() % (400 - y).min(90),
        };
        let colour = random.next() & 0xff_ffff;
        for row in y..y + rect.height {
            let at = (row * 500 + x) as usize;
            picture.pixels[at..at + rect.width as usize].fill(colour);
        }
        host.canvas.fill(rect, colour);
        for client in &mut clients {
            let before = client.received;
            client.ask(true);
            client.update();
            check(client, &picture, &format!("round {round}"));
            let most = (rect.width + 96) * (rect.height + 32) * 4 + 1000;
            assert!(client.received - before < most as usize, "far more than {rect:?}");
        }
    }
}

#[test]
fn parts_are_sent_when_they_are_asked_for() {
    let first = mixed(400, 300);
    let host = Host::new(&first);
    let mut client = host.client(&[ZRLE]);
    let area = |x: usize, y: usize| (100..250).contains(&x) && (50..170).contains(&y);
    client.ask_area(false, [100, 50, 150, 120]);
    let got = client.update();
    // Tiles around the area, no more.
    assert!(
        got.iter().all(|r| r.x >= 96 && r.y >= 48 && r.x + r.width <= 256 && r.y + r.height <= 176)
    );
    let inside = |client: &Client, picture: &Picture| {
        (0..400 * 300)
            .filter(|i| area(i % 400, i / 400))
            .all(|i| client.pixels[i] == picture.pixels[i])
    };
    assert!(inside(&client, &first));
    client.ask(false);
    client.update();
    check(&client, &first, "whole");
    // A change outside of what is asked for stays until it is asked for.
    let mut second = first.clone();
    second.pixels[299 * 400 + 399] ^= 0xffffff;
    second.pixels[60 * 400 + 120] ^= 0xffffff;
    host.canvas.show(&second);
    client.ask_area(true, [100, 50, 150, 120]);
    client.update();
    assert!(inside(&client, &second) && !has(&client, &second));
    client.ask(true);
    client.update();
    check(&client, &second, "rest");
}

#[test]
fn a_colour_map_is_given_to_those_who_want_one() {
    let picture = mixed(64, 64);
    let host = Host::new(&picture);
    let mut client = host.client(&[RAW]);
    client.format = Format { bits: 8, depth: 8, big: false, max: [7, 7, 3], shift: [5, 2, 0] };
    let mut format = client.format.bytes();
    format[3] = 0;
    client.send(&[&[0, 0, 0, 0][..], &format].concat());
    client.ask(false);
    let crate::client::Said::ColourMap(map) = client.listen() else { panic!("no colour map") };
    assert_eq!(map.len(), 6 * 256);
    client.update();
    check(&client, &picture, "mapped");
}
