//! The passt process: how it is started, how we know that it works, what it says, how it ends.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::guard::Guard;
use super::relay;
use super::stream::Framed;
use super::{Forward, GATEWAY, GUEST, Protocol};
use crate::{Buffer, Error, HEADER_LEN, Result};

/// The gateway's hardware address. Passt would take that of the host's card, which a host without a default route lacks.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";
/// How long passt may take until it answers; it takes some milliseconds.
const START: Duration = Duration::from_secs(10);
/// How long it may take to end when its socket is closed.
const END: Duration = Duration::from_secs(2);
/// How many of its last lines are kept, to be shown when it fails.
const LINES: usize = 8;

/// A passt process. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Passt {
    child: Child,
    guard: Option<Guard>,
    lines: Arc<Mutex<VecDeque<String>>>,
    log: Option<thread::JoinHandle<()>>,
}

impl Passt {
    /// Starts passt; the stream is the way to it, and does not block.
    pub(super) fn start(forwards: &[Forward]) -> Result<(Self, UnixStream)> {
        for forward in forwards {
            try_to_listen(forward).map_err(|e| port_error(forward, e))?;
        }
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make a pair of sockets"))?;
        let mut command = Command::new("passt");
        command
            .args(arguments(theirs.as_raw_fd(), has_default_route(), forwards))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C at our terminal is not for passt: the guest may want to end its connections.
            .process_group(0);
        let fd = theirs.as_raw_fd();
        // SAFETY: between fork and exec only `fcntl` is called, which is async-signal-safe, on a
        // descriptor that `theirs` keeps open until after the fork.
        unsafe {
            command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let mut child = command.spawn().map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::NoPasst,
            _ => Error::io("start passt")(e),
        })?;
        let guard = Guard::new(child.id()).map_err(|e| {
            // Nobody knows of it yet.
            let _ = child.kill();
            let _ = child.wait();
            Error::io("start a shell to watch over passt")(e)
        })?;
        let lines = Arc::<Mutex<VecDeque<String>>>::default();
        let log = child.stderr.take().map(|stderr| {
            let lines = lines.clone();
            thread::spawn(move || keep_lines(stderr, &lines))
        });
        let card = relay::start(ours).map_err(Error::io("start the thread beside passt"))?;
        Ok((Self { child, guard: Some(guard), lines, log }, card))
    }

    /// Asks passt for the gateway's hardware address until it answers. What is asked is what a
    /// guest asks first, so this tells whether frames go both ways.
    pub(super) fn wait_until_ready(&mut self, stream: &mut Framed, mac: [u8; 6]) -> Result<()> {
        let mut frame = arp_request(mac);
        let bufs = [Buffer { ptr: frame.as_mut_ptr(), len: frame.len() }];
        // SAFETY: `frame` outlives the call. The stream is new: there is room for 54 bytes.
        let sent = unsafe { stream.send(&bufs) };
        let end = Instant::now() + START;
        let result = sent.and_then(|_| {
            loop {
                while let Some(frame) = stream.next_frame()? {
                    if is_arp_reply(frame) {
                        return Ok(());
                    }
                }
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ErrorKind::TimedOut.into());
                }
                wait_readable(stream.as_raw_fd(), left)?;
            }
        });
        result.map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::TimedOut => {
                self.finish();
                Error::Passt { said: self.said() }
            }
            _ => Error::io("talk to passt")(e),
        })
    }

    /// The last lines that passt wrote.
    pub(super) fn said(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match lines.is_empty() {
            true => "nothing".to_owned(),
            false => lines.iter().map(String::as_str).collect::<Vec<_>>().join("; "),
        }
    }

    /// Waits until it has ended, by force after a while, and until its last line was read.
    fn finish(&mut self) {
        // Before the process is waited for: its number is nobody else's until then.
        self.guard = None;
        let end = Instant::now() + END;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                // It fails only for a process that ended meanwhile.
                let _ = self.child.kill();
                let _ = self.child.wait();
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        if let Some(log) = self.log.take() {
            let _ = log.join();
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Passt's command line. Without a default route there is no card to take addresses from; all that is needed
/// is given here, so the loopback interface does.
fn arguments(fd: RawFd, default_route: bool, forwards: &[Forward]) -> Vec<String> {
    let mut list = vec!["--foreground".to_owned(), "--stderr".to_owned()];
    let mut add = |key: &str, value: String| list.extend([key.to_owned(), value]);
    add("--fd", fd.to_string());
    add("--mac-addr", GATEWAY_MAC.to_owned());
    add("--address", GUEST.to_string());
    add("--netmask", "24".to_owned());
    add("--gateway", GATEWAY.to_string());
    if !default_route {
        add("--interface", "lo".to_owned());
    }
    for (protocol, key) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        let mut any = false;
        for f in forwards.iter().filter(|f| f.protocol == protocol) {
            any = true;
            let address = match f.address {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED) => String::new(),
                address => format!("{address}/"),
            };
            add(key, format!("{address}{}:{}", f.host, f.guest));
        }
        if !any {
            // Said explicitly: otherwise UDP ports follow the TCP ones.
            add(key, "none".to_owned());
        }
    }
    list
}

/// Whether this thread's network namespace has a default route for IPv4.
fn has_default_route() -> bool {
    // "Iface Destination Gateway Flags ...", numbers in hexadecimal. Without the file, let passt say what is wrong.
    fs::read_to_string("/proc/thread-self/net/route").map_or(true, |table| {
        table.lines().skip(1).any(|line| line.split_ascii_whitespace().nth(1) == Some("00000000"))
    })
}

/// Listens for a moment where a port is to be forwarded: passt says nothing about a port that it cannot have.
fn try_to_listen(forward: &Forward) -> io::Result<()> {
    let address = SocketAddr::new(forward.address, forward.host);
    match forward.protocol {
        Protocol::Tcp => TcpListener::bind(address).map(drop),
        Protocol::Udp => UdpSocket::bind(address).map(drop),
    }
}

fn port_error(forward: &Forward, e: io::Error) -> Error {
    let (address, port) = (forward.address, forward.host);
    match e.kind() {
        ErrorKind::AddrInUse => Error::PortTaken { address, port },
        ErrorKind::PermissionDenied => Error::PortDenied { address, port },
        _ => Error::io(format!("listen on port {port} of {address}"))(e),
    }
}

/// Sees that passt listens everywhere it should: then nobody else can.
pub(super) fn check_forwards(forwards: &[Forward], passt: &Passt) -> Result<()> {
    for forward in forwards {
        if try_to_listen(forward).is_ok() {
            // Some system lets us and not passt, which gives up its rights first.
            tracing::warn!(said = passt.said(), "passt does not listen");
            return Err(Error::PortDenied { address: forward.address, port: forward.host });
        }
    }
    Ok(())
}

/// Keeps what passt says; what it says about the missing system log says nothing about the network.
fn keep_lines(stderr: ChildStderr, lines: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(stderr).split(b'\n').map_while(io::Result::ok) {
        let line = String::from_utf8_lossy(&line).trim().to_owned();
        if line.is_empty() || line.starts_with("Failed to send ") || line.contains("run as root") {
            continue;
        }
        tracing::debug!(target: "passt", "{line}");
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

fn wait_readable(fd: RawFd, timeout: Duration) -> io::Result<()> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let millis = timeout.as_millis().clamp(1, 60_000) as libc::c_int;
    // SAFETY: one valid `pollfd`.
    match unsafe { libc::poll(&mut poll, 1, millis) } {
        -1 => match io::Error::last_os_error() {
            e if e.kind() == ErrorKind::Interrupted => Ok(()),
            e => Err(e),
        },
        _ => Ok(()),
    }
}

/// Who has the gateway's address? (RFC 826), with the virtio header.
fn arp_request(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    // Type ARP; Ethernet, IPv4, address lengths; request.
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(GUEST.octets());
    frame.extend([0; 6]);
    frame.extend(GATEWAY.octets());
    frame
}

fn is_arp_reply(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_everything() {
        let forwards = [
            Forward::tcp(2222, 22),
            Forward { address: Ipv4Addr::UNSPECIFIED.into(), ..Forward::tcp(8080, 80) },
        ];
        let line = arguments(5, false, &forwards).join(" ");
        assert!(line.contains("--fd 5 "), "{line}");
        assert!(line.contains("--interface lo"), "{line}");
        assert!(line.contains("--tcp-ports 127.0.0.1/2222:22 --tcp-ports 8080:80"), "{line}");
        assert!(line.ends_with("--udp-ports none"), "{line}");
        assert!(!arguments(5, true, &[]).join(" ").contains("--interface"));
    }
}
