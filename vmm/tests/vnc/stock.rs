//! Stock clients as judges: what they save is what the guest shows. Each is asked for in a test of its own, which is
//! skipped where the client is not installed:
//!
//! | client | from | judges |
//! | --- | --- | --- |
//! | vncdotool | PyPI, in `cargo xtask setup`'s Python environment | Raw, ZRLE, CopyRect, password, keys, pointer |
//! | gvnccapture (gtk-vnc) | Debian's gvncviewer | Tight with JPEG, sizes |
//! | vncsnapshot (TightVNC) | Debian's vncsnapshot | Tight with and without JPEG, version 3.3 |

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lodge_devices::display::Picture;
use lodge_devices::input::{Button, InputEvent, Key};
use lodge_vmm::vnc::VncOptions;

use crate::host::{Canvas, Host, options};
use crate::pictures::{mixed, photo, text};

/// Draws text that scrolls, until it is told to show its last picture.
struct Animation {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Animation {
    fn start(canvas: Arc<Canvas>, last: Picture) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut line = 0;
            while !stopped.load(Ordering::SeqCst) {
                line += 1;
                canvas.show(&text(last.width, last.height, line));
                std::thread::sleep(Duration::from_millis(10));
            }
            canvas.show(&last);
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

/// A program of the tools' Python environment.
fn tool(name: &str) -> Option<PathBuf> {
    let path = lodge_guests::cache().ok()?.join("tools/bin").join(name);
    path.exists().then_some(path)
}

/// A program of the host.
fn program(name: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.exists())
}

fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn read_png(path: &Path) -> Picture {
    let file = std::io::BufReader::new(File::open(path).unwrap());
    let mut decoder = png::Decoder::new(file);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    let samples = info.color_type.samples();
    assert!(samples >= 3, "{:?}", info.color_type);
    let pixels = bytes.chunks(samples).map(|p| u32::from_be_bytes([0, p[0], p[1], p[2]])).collect();
    Picture { width: info.width, height: info.height, pixels }
}

fn read_jpeg(path: &Path) -> Picture {
    let file = std::io::BufReader::new(File::open(path).unwrap());
    let mut decoder = jpeg_decoder::Decoder::new(file);
    let bytes = decoder.decode().unwrap();
    let info = decoder.info().unwrap();
    let pixels = bytes.chunks(3).map(|p| u32::from_be_bytes([0, p[0], p[1], p[2]])).collect();
    Picture { width: info.width.into(), height: info.height.into(), pixels }
}

/// The mean difference of a colour.
fn error(a: &Picture, b: &Picture) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let bytes = |picture: &Picture| -> Vec<u8> {
        picture.pixels.iter().flat_map(|pixel| pixel.to_be_bytes()).collect()
    };
    let (a, b) = (bytes(a), bytes(b));
    let sum: u64 = a.iter().zip(&b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / (a.len() as f64 * 0.75)
}

#[test]
fn vncdotool_sees_types_and_points() {
    let Some(vncdo) = tool("vncdo") else {
        println!("SKIPPED: vncdotool is not in the tools' environment: run `cargo xtask setup`");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let with_password = VncOptions { password: Some("sesame".into()), ..options() };
    for options in [options(), with_password] {
        let last = mixed(640, 480);
        let host = Host::with(&options, &text(640, 480, 0));
        let vncdo = |args: &[&str]| {
            let mut command = Command::new(&vncdo);
            command.args(["-s", &format!("127.0.0.1::{}", host.address().port()), "--nocursor"]);
            if let Some(password) = &options.password {
                command.args(["-p", password]);
            }
            run(command.args(["-t", "60"]).args(args));
        };
        let animation = Animation::start(host.canvas.clone(), last.clone());
        let file = folder.path().join("screen.png");
        let path = file.to_str().unwrap();
        // While everything moves, and again when it rests.
        vncdo(&["capture", path, "capture", path, "capture", path]);
        let moving = read_png(&file);
        assert_eq!((moving.width, moving.height), (640, 480));
        animation.end();
        vncdo(&["capture", path]);
        assert!(read_png(&file) == last, "vncdotool sees something else");
        // It waits for exactly this picture, by itself, with incremental updates.
        vncdo(&["expect", path, "0"]);

        let press = |code, key| [InputEvent::Key(Key(code), key)];
        vncdo(&["key", "a", "key", "enter", "key", "f12", "key", "ctrl-alt-del"]);
        let keys = [
            press(30, true),
            press(30, false),
            press(28, true),
            press(28, false),
            press(88, true),
            press(88, false),
            press(29, true),
            press(56, true),
            press(111, true),
            press(111, false),
            press(56, false),
            press(29, false),
        ];
        host.sink.expect(keys.as_flattened());
        vncdo(&["move", "639", "0", "click", "3"]);
        host.sink.expect(&[
            InputEvent::At { x: 0x7fff, y: 0 },
            InputEvent::Button(Button::Right, true),
            InputEvent::Button(Button::Right, false),
        ]);
    }
}

#[test]
fn gtk_vnc_sees_the_picture() {
    let Some(capture) = program("gvnccapture") else {
        println!("SKIPPED: gvnccapture is not installed: Debian's package gvncviewer has it");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for picture in [mixed(800, 600), text(1024, 768, 9), mixed(321, 77)] {
        let host = Host::new(&picture);
        let file = folder.path().join("screen.png");
        let place = format!("127.0.0.1:{}", i32::from(host.address().port()) - 5900);
        run(Command::new(&capture).args(["-q", &place]).arg(&file));
        let seen = read_png(&file);
        let off = error(&seen, &picture);
        // It takes JPEG.
        assert!(off < 3.0, "{off} off");
        host.wait_for_clients(0);
    }
}

#[test]
fn tightvnc_sees_the_picture() {
    let Some(snapshot) = program("vncsnapshot") else {
        println!("SKIPPED: vncsnapshot is not installed: Debian's package of this name has it");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for picture in [mixed(800, 600), photo(640, 480)] {
        let host = Host::new(&picture);
        let place = format!("127.0.0.1:{}", i32::from(host.address().port()) - 5900);
        for arguments in [
            &["-encodings", "tight", "-nojpeg"][..],
            &["-encodings", "tight", "-jpeg", "-vncQuality", "8"],
            &["-encodings", "raw"],
        ] {
            let file = folder.path().join("screen.jpg");
            let mut command = Command::new(&snapshot);
            command.args(["-quiet", "-quality", "100"]).args(arguments).arg(&place).arg(&file);
            run(&mut command);
            // Its file is a JPEG anyway.
            let off = error(&read_jpeg(&file), &picture);
            assert!(off < 6.0, "{arguments:?}: {off} off");
        }
    }
}
