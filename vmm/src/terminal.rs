//! The terminal in which a machine was started: raw while the machine runs, with a few keys of its own.
//!
//! ```text
//!   Ctrl-A X   end the machine          Ctrl-A H   tell the keys
//!   Ctrl-A P   press the power button   Ctrl-A Ctrl-A   send Ctrl-A to the guest
//! ```

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use lodge_devices::legacy::Serial;
use lodge_model::state::MachineRequest;
use nix::sys::termios::{self, SetArg, Termios};

use crate::control::Message;

const CTRL_A: u8 = 1;
const HELP: &str = "\r\nlodge: Ctrl-A X ends the machine, Ctrl-A P presses its power button,\r\n\
                    lodge: Ctrl-A Ctrl-A sends Ctrl-A to the guest, Ctrl-A H shows this.\r\n";

/// Makes the terminal raw, and what it was when dropped. Does nothing where standard input is no terminal.
pub struct RawTerminal {
    before: Option<Termios>,
}

impl RawTerminal {
    /// Makes the terminal raw.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { before: None });
        }
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        // Messages of the host keep their line ends; the guest sends its own carriage returns anyhow.
        raw.output_flags |= termios::OutputFlags::OPOST;
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // The terminal may be gone; there is nobody to tell.
            let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// What a byte from the terminal means.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Guest(u8),
    Ask(MachineRequest),
    Help,
    Nothing,
}

/// Finds the keys that are not for the guest.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn take(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.escaped) {
            self.escaped = byte == CTRL_A;
            return if self.escaped { Key::Nothing } else { Key::Guest(byte) };
        }
        match byte {
            b'x' | b'X' => Key::Ask(MachineRequest::End),
            b'p' | b'P' => Key::Ask(MachineRequest::PowerButton),
            b'h' | b'H' | b'?' => Key::Help,
            CTRL_A => Key::Guest(CTRL_A),
            _ => Key::Nothing,
        }
    }
}

/// Reads standard input for the guest until it ends, in a thread of its own. Keys are only looked for where it is a
/// terminal: what is piped in goes to the guest as it is.
///
/// # Errors
/// The host has no thread to give.
pub fn read_input(serial: Arc<Serial>, control: Sender<Message>) -> io::Result<()> {
    let terminal = io::stdin().is_terminal();
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut keys = Keys::default();
        let mut buffer = [0; 256];
        loop {
            let n = match io::stdin().read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot read standard input");
                    return;
                }
            };
            let mut for_guest = Vec::with_capacity(n);
            for &byte in &buffer[..n] {
                match if terminal { keys.take(byte) } else { Key::Guest(byte) } {
                    Key::Guest(byte) => for_guest.push(byte),
                    Key::Nothing => {}
                    Key::Help => {
                        let _ = io::stderr().write_all(HELP.as_bytes());
                    }
                    Key::Ask(request) => {
                        if control.send(Message::Ask(request)).is_err() {
                            return;
                        }
                    }
                }
            }
            send(&serial, &for_guest);
        }
    })?;
    Ok(())
}

fn send(serial: &Serial, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let taken = serial.input(bytes);
        bytes = &bytes[taken..];
        if taken == 0 {
            serial.wait_for_input_room(Duration::from_secs(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_after_ctrl_a_are_ours() {
        let mut keys = Keys::default();
        let mut take = |bytes: &[u8]| bytes.iter().map(|b| keys.take(*b)).collect::<Vec<_>>();
        assert_eq!(take(b"ax"), [Key::Guest(b'a'), Key::Guest(b'x')]);
        assert_eq!(take(b"\x01x"), [Key::Nothing, Key::Ask(MachineRequest::End)]);
        assert_eq!(take(b"\x01P"), [Key::Nothing, Key::Ask(MachineRequest::PowerButton)]);
        assert_eq!(take(b"\x01h"), [Key::Nothing, Key::Help]);
        assert_eq!(take(b"\x01\x01x"), [Key::Nothing, Key::Guest(CTRL_A), Key::Guest(b'x')]);
        assert_eq!(take(b"\x01q"), [Key::Nothing, Key::Nothing]);
    }
}
