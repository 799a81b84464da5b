//! A thread between passt and the network card that reads ahead.
//!
//! ```text
//!   passt <== socket pair ==> relay (keeps up to 32 MiB) <== socket pair ==> card
//! ```
//!
//! Debian 12's passt drops frames that do not fit into its socket and then sends whole TCP windows again, over and over
//! where the guest is slow. A socket's room is the host's to give (`net.core.wmem_max`, 208 KiB); a guest's windows
//! are larger (6 MiB for a connection of Linux). So what passt sends is taken at once and kept here.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The most that is kept for the guest. Beyond, passt has to wait, or drop.
const FOR_GUEST: usize = 32 << 20;
/// The most that is kept for passt, which hardly ever lets it wait.
const FOR_PASST: usize = 256 << 10;
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// A queue that was full and is empty again gives its memory back beyond this.
const KEPT: usize = 1 << 20;

/// Starts the thread; gives the card's end, which does not block. The thread ends, and closes passt's socket, when
/// the card's end is closed; it closes the card's end when passt has ended and all it said was delivered.
pub(super) fn start(passt: UnixStream) -> io::Result<UnixStream> {
    let (card, ours) = UnixStream::pair()?;
    for socket in [&passt, &card, &ours] {
        socket.set_nonblocking(true)?;
    }
    let run = move || {
        if let Err(error) = relay(&passt, &ours) {
            tracing::debug!(%error, "the way to passt has ended");
        }
    };
    thread::Builder::new().name("passt relay".into()).spawn(run)?;
    Ok(card)
}

/// One direction.
struct Pipe<'a> {
    from: &'a UnixStream,
    to: &'a UnixStream,
    kept: VecDeque<u8>,
    most: usize,
    /// Nothing more comes.
    ended: bool,
}

impl<'a> Pipe<'a> {
    fn new(from: &'a UnixStream, to: &'a UnixStream, most: usize) -> Self {
        Self { from, to, kept: VecDeque::new(), most, ended: false }
    }

    fn wants_read(&self) -> bool {
        !self.ended && self.kept.len() < self.most
    }

    fn wants_write(&self) -> bool {
        !self.kept.is_empty()
    }

    fn read(&mut self, chunk: &mut [u8]) -> io::Result<()> {
        while self.wants_read() {
            match self.from.read(chunk) {
                Ok(0) => self.ended = true,
                Ok(n) => self.kept.extend(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => self.ended = true,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while self.wants_write() {
            let (front, _) = self.kept.as_slices();
            match self.to.write(front) {
                Ok(n) => drop(self.kept.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.kept.is_empty() && self.kept.capacity() > KEPT {
            self.kept = VecDeque::new();
        }
        Ok(())
    }
}

fn relay(passt: &UnixStream, card: &UnixStream) -> io::Result<()> {
    let mut inward = Pipe::new(passt, card, FOR_GUEST);
    let mut outward = Pipe::new(card, passt, FOR_PASST);
    let mut chunk = vec![0; CHUNK];
    loop {
        inward.read(&mut chunk)?;
        inward.write()?;
        outward.read(&mut chunk)?;
        outward.write()?;
        if outward.ended || inward.ended && inward.kept.is_empty() {
            return Ok(());
        }
        let interest = |read: &Pipe, write: &Pipe| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, read.wants_read());
            flags.set(PollFlags::POLLOUT, write.wants_write());
            flags
        };
        let interests = [(card, interest(&outward, &inward)), (passt, interest(&inward, &outward))];
        // Where nothing is wanted a socket whose other end has gone would be ready all the time.
        let mut wait: Vec<_> = interests
            .iter()
            .filter(|(_, flags)| !flags.is_empty())
            .map(|(socket, flags)| PollFd::new(socket.as_fd(), *flags))
            .collect();
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_reads_yet_is_kept_and_in_order() {
        let (mut passt, theirs) = UnixStream::pair().unwrap();
        let mut card = start(theirs).unwrap();
        let sent: Vec<u8> =
            (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as u8).collect();
        // The writer blocks if the relay does not take it all although nobody reads.
        passt.write_all(&sent).unwrap();
        card.set_nonblocking(false).unwrap();
        let mut got = vec![0; sent.len()];
        card.read_exact(&mut got).unwrap();
        assert!(got == sent);
        card.write_all(b"back").unwrap();
        let mut back = [0; 4];
        passt.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"back");
    }

    #[test]
    fn each_end_hears_that_the_other_has_gone() {
        let (mut passt, theirs) = UnixStream::pair().unwrap();
        let mut card = start(theirs).unwrap();
        card.set_nonblocking(false).unwrap();
        passt.write_all(b"last words").unwrap();
        drop(passt);
        let mut said = String::new();
        card.read_to_string(&mut said).unwrap();
        assert_eq!(said, "last words");

        let (mut passt, theirs) = UnixStream::pair().unwrap();
        drop(start(theirs).unwrap());
        assert_eq!(passt.read(&mut [0; 8]).unwrap(), 0);
    }
}
