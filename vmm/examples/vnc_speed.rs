//! What a VNC client costs: frames a second and CPU time of the server's threads, for pictures that change all the time.
//!
//! ```text
//!   cargo run --release -p lodge-vmm --example vnc_speed
//! ```
//!
//! The client is the tests' own, in this process; its thread's time is not counted.

#[path = "../tests/vnc/client.rs"]
#[allow(dead_code)]
mod client;
#[path = "../tests/vnc/format.rs"]
#[allow(dead_code)]
mod format;
#[path = "../tests/vnc/host.rs"]
#[allow(dead_code)]
mod host;
#[path = "../tests/vnc/pictures.rs"]
#[allow(dead_code)]
mod pictures;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lodge_devices::display::Picture;

use client::{COPY_RECT, RAW, TIGHT, ZRLE};
use host::Host;
use pictures::{noise, photo, text};

const WIDTH: u32 = 1024;
const HEIGHT: u32 = 768;
const TIME: Duration = Duration::from_secs(3);
/// Between two pictures of the guest: 60 a second.
const PERIOD: Duration = Duration::from_micros(16_667);

/// CPU time of this process's threads of this name, so far.
fn cpu(name: &str) -> Duration {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if read("comm").trim() == name {
            let times = read("schedstat");
            let first = times.split_whitespace().next().and_then(|time| time.parse().ok());
            sum += Duration::from_nanos(first.unwrap_or(0));
        }
    }
    sum
}

fn measure(what: &str, frames: &[Picture], encodings: &[i32]) {
    let host = Host::new(&frames[0]);
    let mut client = host.client(encodings);
    client.ask(false);
    client.update();
    let stop = Arc::new(AtomicBool::new(false));
    let (canvas, stopped) = (host.canvas.clone(), stop.clone());
    let before = (cpu("display"), cpu("vnc-out"), client.received);
    let mut updates = 0;
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for frame in frames.iter().cycle() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                canvas.show(frame);
                std::thread::sleep(PERIOD);
            }
        });
        while start.elapsed() < TIME {
            client.ask(true);
            client.update();
            updates += 1;
        }
        stop.store(true, Ordering::SeqCst);
    });
    let took = start.elapsed().as_secs_f64();
    let (display, writer) = (cpu("display") - before.0, cpu("vnc-out") - before.1);
    let share = |time: Duration| 100.0 * time.as_secs_f64() / took;
    let each = |time: Duration| time.as_secs_f64() * 1000.0 / f64::from(updates);
    println!(
        "{what:28} {:5.1} frames/s  {:6.0} KiB each  display {:4.1} % ({:.2} ms each)  writer {:4.1} % ({:.2} ms each)",
        f64::from(updates) / took,
        (client.received - before.2) as f64 / 1024.0 / f64::from(updates),
        share(display),
        each(display),
        share(writer),
        each(writer),
    );
}

fn main() {
    let scroll: Vec<Picture> = (0..40).map(|i| text(WIDTH, HEIGHT, i)).collect();
    let pages: Vec<Picture> = (0..20).map(|i| text(WIDTH, HEIGHT, 60 * i)).collect();
    let film: Vec<Picture> = (0..20)
        .map(|i| {
            let mut picture = photo(WIDTH, HEIGHT);
            picture.pixels.rotate_left(5 * i);
            picture
        })
        .collect();
    let snow: Vec<Picture> = (0..4)
        .map(|i| {
            let mut picture = noise(WIDTH, HEIGHT);
            picture.pixels.rotate_left(5 * i);
            picture
        })
        .collect();
    println!("{WIDTH} x {HEIGHT}, 60 pictures a second");
    measure("scroll, Tight, CopyRect", &scroll, &[TIGHT, COPY_RECT, -26]);
    measure("scroll, ZRLE, CopyRect", &scroll, &[ZRLE, COPY_RECT]);
    measure("scroll, Tight", &scroll, &[TIGHT, -26]);
    measure("scroll, ZRLE", &scroll, &[ZRLE]);
    measure("pages, Tight, CopyRect", &pages, &[TIGHT, COPY_RECT, -26]);
    for (level, name) in [(-256, 0), (-254, 2), (-250, 6), (-247, 9)] {
        measure(&format!("pages, Tight, level {name}"), &pages, &[TIGHT, -26, level]);
        measure(&format!("pages, ZRLE, level {name}"), &pages, &[ZRLE, level]);
    }
    measure("pages, Raw", &pages, &[RAW]);
    measure("film, Tight, quality 6", &film, &[TIGHT, -26]);
    measure("film, Tight, quality 9", &film, &[TIGHT, -23]);
    measure("film, Tight, lossless", &film, &[TIGHT]);
    measure("film, ZRLE", &film, &[ZRLE]);
    measure("snow, Raw", &snow, &[RAW]);
    idle(&scroll[0]);
}

/// What a client costs that waits for something to happen.
fn idle(picture: &Picture) {
    let host = Host::new(picture);
    let mut client = host.client(&[TIGHT]);
    client.ask(false);
    client.update();
    client.ask(true);
    let before = cpu("display") + cpu("vnc-out");
    std::thread::sleep(TIME);
    let used = cpu("display") + cpu("vnc-out") - before;
    println!("nothing: {:.2} % for both threads", 100.0 * used.as_secs_f64() / TIME.as_secs_f64());
}
