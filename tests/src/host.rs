//! The host's side of a test: programs, images, namespaces, a web server.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use crate::patience;

/// The release build of `lodge`.
pub fn lodge() -> PathBuf {
    let Some(folder) = std::env::var_os("LODGE_BIN") else {
        panic!(
            "LODGE_BIN is not set: run this with `cargo xtask test`, or set it to the folder of a release build"
        );
    };
    let lodge = Path::new(&folder).join("lodge");
    assert!(lodge.is_file(), "LODGE_BIN has no program 'lodge': {}", lodge.display());
    lodge
}

/// The runtime directory of machines that have none of their own: apart from the host's, so that tests that list
/// machines see only theirs.
pub fn runtime() -> PathBuf {
    let folder = std::env::temp_dir().join("lodge-tests-runtime");
    fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    folder
}

/// The folder of a guest, built if it is not there.
pub fn guest(name: &str) -> PathBuf {
    lodge_guests::ready(name).unwrap_or_else(|error| panic!("the guest {name}: {error}"))
}

/// Whether this is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Runs a program; gives what it printed, whatever its exit status.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs a program, which must succeed; gives what it printed.
pub fn ok(program: &str, args: &[&str]) -> String {
    let output = output(Command::new(program).args(args));
    let both = |out: &[u8]| String::from_utf8_lossy(out).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        both(&output.stdout),
        both(&output.stderr)
    );
    both(&output.stdout)
}

/// A path as text: tests make no others.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a test's paths are UTF-8")
}

/// `qemu-img check`: what it says, and its exit code (0 clean, 2 corrupt, 3 leaks only).
pub fn check(image: &Path) -> (i32, String) {
    let output = output(Command::new("qemu-img").args(["check", text(image)]));
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

/// Panics unless the image is clean, without even a leak.
pub fn assert_clean(image: &Path) {
    let (code, said) = check(image);
    assert_eq!(code, 0, "qemu-img check {}: {said}", image.display());
}

/// An empty image of `mib` MiB: `raw` (a hole) or `qcow2`.
pub fn image(folder: &Path, format: &str, mib: u64) -> PathBuf {
    let path = folder.join(format!("disk.{format}"));
    ok("qemu-img", &["create", "-q", "-f", format, text(&path), &format!("{mib}M")]);
    path
}

/// A new image over `base`, which stays as it is.
pub fn overlay(folder: &Path, base: &Path) -> PathBuf {
    let path = folder.join("overlay.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(base), text(&path)];
    ok("qemu-img", &args);
    path
}

/// All bytes of an image as the guest sees them.
pub fn bytes(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("bytes");
    ok("qemu-img", &["convert", "-O", "raw", text(image), text(&raw)]);
    let bytes = fs::read(&raw).expect("the converted image can be read");
    fs::remove_file(&raw).expect("it can be removed");
    bytes
}

/// Panics if a program that was to fail in order has panicked.
pub fn assert_no_panic(said: &str) {
    for bad in ["panicked at", "RUST_BACKTRACE", "core dumped"] {
        assert!(!said.contains(bad), "a panic: {said}");
    }
}

/// A TCP port of the loopback that is free now. Somebody else may take it before it is used: so
/// may it be with every port.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback has a port");
    listener.local_addr().expect("it has an address").port()
}

/// Waits until `done`.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + patience();
    while !done() {
        assert!(Instant::now() < end, "still not so: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Whether there is a process with this number that is not over.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // "pid (name) state ...": a name can have brackets in it.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// Runs a test in a network namespace of its own, with a loopback interface only; it goes with the
/// test. Needs root.
pub fn in_network_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    in_namespace(CloneFlags::CLONE_NEWNET, || {
        ok("ip", &["link", "set", "lo", "up"]);
        test()
    })
}

/// Runs a test in a mount namespace of its own with `folder` a file system in memory of so many
/// MiB; it goes with the test. Needs root.
pub fn with_small_disk<T: Send>(folder: &Path, mib: u64, test: impl FnOnce() -> T + Send) -> T {
    in_namespace(CloneFlags::CLONE_NEWNS, || {
        ok("mount", &["--make-rprivate", "/"]);
        ok("mount", &["-t", "tmpfs", "-o", &format!("size={mib}M"), "tmpfs", text(folder)]);
        test()
    })
}

fn in_namespace<T: Send>(kind: CloneFlags, test: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // Only this thread, and what it starts, is in the new namespace.
            unshare(kind).unwrap_or_else(|error| panic!("unshare({kind:?}): {error}"));
            test()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A web server on the loopback that gives one thing, whatever is asked for.
pub struct WebServer {
    /// Its port.
    pub port: u16,
}

impl WebServer {
    /// Starts it; it ends with the process.
    pub fn start(body: Vec<u8>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback is up");
        let port = listener.local_addr().expect("it has an address").port();
        let body = Arc::new(body);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let body = body.clone();
                // A client that goes away is its own affair.
                thread::spawn(move || drop(answer(stream, &body)));
            }
        });
        Self { port }
    }
}

fn answer(mut stream: TcpStream, body: &[u8]) -> std::io::Result<()> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

/// Asks a web server for a thing until it gives one.
pub fn fetch(address: Ipv4Addr, port: u16, path: &str) -> Vec<u8> {
    let mut body = Vec::new();
    wait_until("a web server answers", || match try_to_fetch(address, port, path) {
        Ok(Some(got)) => {
            body = got;
            true
        }
        _ => false,
    });
    body
}

fn try_to_fetch(address: Ipv4Addr, port: u16, path: &str) -> std::io::Result<Option<Vec<u8>>> {
    let mut stream = TcpStream::connect((address, port))?;
    stream.set_read_timeout(Some(patience()))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end_of_head = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let good = answer.starts_with(b"HTTP/1.0 200") || answer.starts_with(b"HTTP/1.1 200");
    Ok(end_of_head.filter(|_| good).map(|at| answer.split_off(at + 4)))
}
