//! Running machines are asked by `lodge ctl`, and by raw lines on their control sockets.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use lodge_tests::{Guest, Run, host, patience};
use nix::sys::signal::Signal;

/// A runtime directory of the test's own, so that it sees its own machines only.
struct Place {
    folder: tempfile::TempDir,
}

/// What a command printed, and its exit code.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn run(&self) -> Run {
        Run::busybox().with_runtime(self.folder.path())
    }

    fn start(&self, name: &str) -> Guest {
        self.run().args(["--name", name]).start()
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join("lodge").join(format!("{name}.sock"))
    }

    fn ctl<const N: usize>(&self, args: [&str; N]) -> Said {
        let mut command = Command::new(host::lodge());
        command.arg("ctl").args(args);
        let output = host::output(command.env("XDG_RUNTIME_DIR", self.folder.path()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = Said {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        };
        host::assert_no_panic(&said.err);
        said
    }

    /// Asks something that must be done; gives what is printed.
    fn ok<const N: usize>(&self, args: [&str; N]) -> String {
        let said = self.ctl(args);
        assert_eq!(said.code, Some(0), "lodge ctl {args:?}: {}", said.err);
        said.out
    }

    /// Asks something that must be refused; gives the message.
    fn refused<const N: usize>(&self, code: i32, args: [&str; N]) -> String {
        let said = self.ctl(args);
        assert_eq!(said.code, Some(code), "lodge ctl {args:?}: {}{}", said.out, said.err);
        assert!(said.err.starts_with("lodge: "), "{}", said.err);
        said.err
    }
}

/// A connection of a program that knows no protocol.
struct Raw {
    socket: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Raw {
    fn new(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        let reader = BufReader::new(socket.try_clone().unwrap());
        Self { socket, reader }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line
    }

    fn ask(&mut self, line: &str) -> String {
        self.socket.write_all(line.as_bytes()).unwrap();
        self.line()
    }
}

fn call(method: &str) -> String {
    format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"{method}\"}}\n")
}

#[test]
fn a_machine_is_paused_resumed_reset_and_ended() {
    let place = Place::new();
    let mut guest = place.start("web");
    guest.busybox_shell();
    let status = place.ok(["web", "status"]);
    let expected =
        format!("web is running: 1 vCPU, 256M of memory, no display, process {}\n", guest.pid());
    assert_eq!(status, expected);
    assert_eq!(place.ok(["web"]), expected, "what is asked for without an action");
    let json = place.ok(["web", "status", "--json"]);
    assert!(
        json.starts_with("{\"name\":\"web\",") && json.contains("\"state\":\"running\""),
        "{json}"
    );

    assert_eq!(place.ok(["web", "pause"]), "web is paused\n");
    let twice = place.refused(1, ["web", "pause"]);
    assert!(twice.contains("cannot pause a machine that is paused"), "{twice}");
    guest.send("echo AL''IVE\n");
    assert!(place.ok(["web"]).starts_with("web is paused:"));
    assert!(!guest.rest().contains("ALIVE"), "the guest ran: {}", guest.report());
    assert_eq!(place.ok(["web", "resume"]), "web is running\n");
    guest.expect("ALIVE");
    let twice = place.refused(1, ["web", "resume"]);
    assert!(twice.contains("cannot resume a machine that is running"), "{twice}");

    assert_eq!(place.ok(["web", "send-key", "ctrl-a", "ret"]), "");
    let unknown = place.refused(1, ["web", "send-key", "ret", "anykey"]);
    assert!(unknown.contains("there is no key \"anykey\""), "{unknown}");

    guest.ok("touch /tmp/here");
    assert_eq!(place.ok(["web", "reset"]), "web was reset and is running\n");
    guest.busybox_shell();
    assert_eq!(guest.run("test -e /tmp/here").status, 1, "memory is as after power-up");

    assert_eq!(place.ok(["web", "quit"]), "web has ended\n");
    assert!(!place.socket("web").exists(), "the name is free at once");
    guest.ends_with(130);
    let gone = place.refused(2, ["web", "status"]);
    assert!(gone.contains("no machine named web runs"), "{gone}");
}

#[test]
fn the_power_button_is_pressed_and_a_watcher_sees_it_all() {
    let place = Place::new();
    let button = "/sys/firmware/acpi/interrupts/ff_pwr_btn";
    let wait =
        format!("echo WAITING; until grep -q STS {button}; do sleep 0.2; done; echo PRESSED");
    let mut guest = place.run().args(["--name", "web"]).commands(&wait).start();
    guest.expect("WAITING");
    let mut watcher = Raw::new(&place.socket("web"));
    let now = watcher.ask(&call("watch"));
    assert!(now.contains("\"result\":{\"state\":\"running\"}"), "{now}");
    place.ok(["web", "pause"]);
    place.ok(["web", "resume"]);
    let said = place.ok(["web", "power-button"]);
    assert_eq!(said, "the guest of web was asked to power off\n");
    guest.expect("PRESSED");
    guest.ends_with(0);
    for part in [
        "{\"event\":\"state\",\"state\":\"paused\"}",
        "{\"event\":\"state\",\"state\":\"running\"}",
        "{\"event\":\"state\",\"state\":\"stopping\"}",
        "{\"event\":\"stopped\",\"reason\":\"the guest powered off\",\"exit_code\":0}",
    ] {
        let line = watcher.line();
        assert_eq!(
            line,
            format!("{{\"jsonrpc\":\"2.0\",\"method\":\"event\",\"params\":{part}}}\n")
        );
    }
    assert_eq!(watcher.line(), "", "the connection ends with the machine");
}

#[test]
fn a_reboot_is_seen_by_lodge_ctl_watch() {
    let place = Place::new();
    let mut guest = place.start("web");
    guest.busybox_shell();
    let mut command = Command::new(host::lodge());
    command.args(["ctl", "web", "watch"]).env("XDG_RUNTIME_DIR", place.folder.path());
    let mut watch = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert_eq!(next(), "web is running");
    guest.send("reboot -f\n");
    assert_eq!(next(), "web was reset by its guest");
    guest.busybox_shell();
    guest.power_off("poweroff -f");
    assert_eq!(next(), "web has ended: the guest powered off");
    assert_eq!(watch.wait().unwrap().code(), Some(0));
}

#[test]
fn nonsense_on_the_socket_harms_nobody() {
    let place = Place::new();
    let mut guest = place.start("web");
    guest.busybox_shell();
    let path = place.socket("web");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let folder = path.parent().unwrap();
    assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);

    let mut raw = Raw::new(&path);
    for (line, code) in [
        ("GET / HTTP/1.1\r\n", -32700),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\n", -32700),
        ("[]\n", -32600),
        ("{}\n", -32600),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"migrate\"}\n", -32601),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"pause\",\"params\":{\"x\":1}}\n", -32602),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"resume\"}\n", -32000),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"screendump\",\"params\":{\"path\":\"/x.png\"}}\n",
            -32002,
        ),
    ] {
        let answer = raw.ask(line);
        assert!(answer.contains(&format!("\"code\":{code},")), "{line}: {answer}");
    }
    // A line that never ends.
    let mut endless = Raw::new(&path);
    let sent = (0..64).all(|_| endless.socket.write_all(&[b' '; 1 << 16]).is_ok());
    let answer = endless.line();
    assert!(!sent || answer.contains("longer than"), "{answer}");
    // Half lines whose clients do not come to an end, and those of clients that are gone.
    let half = || {
        let mut half = UnixStream::connect(&path).unwrap();
        // It may be told off already.
        let _ = half.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":");
        half
    };
    let halves: Vec<_> = (0..100).map(|_| half()).collect();
    (0..50).for_each(|_| drop(half()));
    assert!(raw.ask(&call("status")).contains("\"state\":\"running\""), "who is there is served");
    let crowded = place.refused(1, ["web", "status"]);
    assert!(crowded.contains("16 connections are open"), "{crowded}");
    drop((endless, halves));
    host::wait_until("there is room again", || place.ctl(["web", "status"]).code == Some(0));
    assert!(guest.ok("echo alive").contains("alive"));
    guest.power_off("poweroff -f");
}

#[test]
fn two_machines_cannot_have_one_name_and_those_without_a_name_can() {
    let place = Place::new();
    assert_eq!(place.ok([]), "no machine runs\n");
    let (mut web, mut one) = (place.start("web"), place.run().start());
    web.busybox_shell();
    one.busybox_shell();
    let message = place.run().args(["--name", "web"]).refused(4);
    assert!(message.contains("a machine named web runs already"), "{message}");
    assert!(place.ok(["guest"]).starts_with(&format!("guest-{} is running:", one.pid())));
    let mut two = place.run().start();
    two.busybox_shell();

    let list = place.ok([]);
    let names: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let mut unnamed = [&one, &two].map(|guest| format!("guest-{}", guest.pid()));
    unnamed.sort();
    assert_eq!(names, ["NAME", &unnamed[0], &unnamed[1], "web"], "{list}");
    let json = place.ok(["--json"]);
    assert_eq!(json.matches("\"state\":\"running\"").count(), 3, "{json}");
    for (args, part) in [
        (["guest", "pause"], "no machine named guest runs"),
        (["wob", "pause"], "these run: guest-"),
    ] {
        let message = place.refused(2, args);
        assert!(message.contains(part), "{message}");
    }
    let message = place.refused(2, ["pause"]);
    assert!(message.contains("no machine is named"), "{message}");

    // A machine that is killed leaves its socket, which is in nobody's way.
    web.signal(Signal::SIGKILL);
    web.wait();
    assert!(place.socket("web").exists());
    assert!(!place.ok([]).contains("web"));
    let gone = place.refused(2, ["web"]);
    assert!(gone.contains("no machine named web runs"), "{gone}");
    let mut web = place.start("web");
    web.busybox_shell();
    assert!(place.ok(["web"]).starts_with("web is running:"));
}

#[test]
fn the_socket_is_where_it_is_asked_for_or_nowhere() {
    let place = Place::new();
    let path = place.folder.path().join("here.sock");
    let mut guest = place.run().arg("--control").arg(&path).start();
    guest.busybox_shell();
    assert!(place.ok([host::text(&path), "status"]).contains(" is running:"));
    assert_eq!(place.ok([]), "no machine runs\n", "it is not where machines are looked for");
    let message = place.run().arg("--control").arg(&path).refused(4);
    assert!(message.contains("another machine's"), "{message}");
    let message = place.run().args(["--control", "/no/such/folder/x.sock"]).refused(2);
    assert!(
        message.contains("/no/such/folder/x.sock") && message.contains("--control"),
        "{message}"
    );
    guest.power_off("poweroff -f");
    assert!(!path.exists());

    let mut guest = place.run().args(["--control", "none"]).start();
    guest.busybox_shell();
    assert_eq!(place.ok([]), "no machine runs\n");
    assert!(!place.folder.path().join("lodge").exists());
    guest.power_off("poweroff -f");
}

#[test]
fn a_screendump_is_a_picture_of_the_display() {
    let place = Place::new();
    let mut guest = place.run().args(["--name", "web", "--video", "vga"]).start();
    guest.busybox_shell();
    let file = place.folder.path().join("a b.png");
    let said = place.ok(["web", "screendump", host::text(&file)]);
    let png = fs::read(&file).unwrap();
    assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"));
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    // IHDR: ISO/IEC 15948, section 11.2.2.
    assert_eq!(said, format!("'{}': {}x{} pixels\n", file.display(), number(16), number(20)));
    let message = place.refused(1, ["web", "screendump", "/no/such/folder/a.png"]);
    assert!(message.contains("/no/such/folder/a.png"), "{message}");
    guest.power_off("poweroff -f");
}
