//! Frames over a byte stream: each is preceded by its length, 32 bits, big-endian. Reads and writes may
//! end anywhere.

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::backend::{self, ETHERNET_HEADER};
use crate::{Buffer, HEADER_LEN};

/// Longest frame without its virtio header: the longest IP packet, an Ethernet header and a VLAN tag.
const MAX_FRAME: usize = 65535 + ETHERNET_HEADER + 4;
/// Bytes before each frame.
const PREFIX: usize = 4;
/// Bytes that are read ahead: one of the longest frames, or many small ones.
const READ_AHEAD: usize = 2 * (MAX_FRAME + PREFIX);

/// The stream, with what was read ahead and what is still to be written.
#[derive(Debug)]
pub(super) struct Framed {
    stream: UnixStream,
    input: Box<[u8]>,
    /// What of `input` was read and not yet taken.
    start: usize,
    end: usize,
    /// The rest of a frame of which the stream took only a part.
    output: Vec<u8>,
}

impl Framed {
    /// Takes a stream that does not block.
    pub(super) fn new(stream: UnixStream) -> Self {
        let input = vec![0; READ_AHEAD].into_boxed_slice();
        Self { stream, input, start: 0, end: 0, output: Vec::new() }
    }

    /// The next whole frame, if it is there. It is gone at the next call.
    pub(super) fn next_frame(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            let ready = &self.input[self.start..self.end];
            if let Some((prefix, rest)) = ready.split_first_chunk::<PREFIX>() {
                let len = u32::from_be_bytes(*prefix) as usize;
                if len > MAX_FRAME {
                    // There is no way to find the next frame's beginning.
                    let text = format!("a frame of {len} bytes from passt");
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
                }
                if rest.len() >= len {
                    let frame = self.start + PREFIX..self.start + PREFIX + len;
                    self.start = frame.end;
                    if len >= ETHERNET_HEADER {
                        return Ok(Some(&self.input[frame]));
                    }
                    continue;
                }
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Reads what there is; whether there was anything.
    fn fill(&mut self) -> io::Result<bool> {
        // What is left is less than one frame, so half of the buffer is free after this.
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match self.stream.read(&mut self.input[self.end..]) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.end += n;
                Ok(true)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(false)
            }
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                Err(ErrorKind::UnexpectedEof.into())
            }
            Err(e) => Err(e),
        }
    }

    /// # Safety
    /// As for `Backend::receive`.
    pub(super) unsafe fn receive(&mut self, bufs: &mut [Buffer]) -> io::Result<Option<usize>> {
        let Some(frame) = self.next_frame()? else { return Ok(None) };
        let len = HEADER_LEN + frame.len();
        if len > backend::total(bufs) {
            return Err(io::Error::new(ErrorKind::InvalidData, "a frame longer than the buffers"));
        }
        let mut header = [0; HEADER_LEN];
        header[HEADER_LEN - 2] = 1;
        // SAFETY: the caller's promise; `header` and `frame` are ours.
        unsafe {
            backend::write_at(bufs, 0, &header);
            backend::write_at(bufs, HEADER_LEN, frame);
        }
        Ok(Some(len))
    }

    /// # Safety
    /// As for `Backend::send`.
    pub(super) unsafe fn send(&mut self, bufs: &[Buffer]) -> io::Result<bool> {
        let invalid = |what| Err(io::Error::new(ErrorKind::InvalidInput, what));
        let len = backend::total(bufs);
        if !(HEADER_LEN + ETHERNET_HEADER..=HEADER_LEN + MAX_FRAME).contains(&len) {
            return invalid("the frame is too short or too long");
        }
        if bufs.len() > backend::MAX_BUFFERS {
            // SAFETY: the caller's promise.
            let mut whole = unsafe { backend::gather(bufs) };
            // SAFETY: `whole` outlives the call.
            return unsafe { self.send(&[Buffer { ptr: whole.as_mut_ptr(), len }]) };
        }
        let mut header = [0; HEADER_LEN];
        // SAFETY: the caller's promise.
        unsafe { backend::read_front(bufs, &mut header) };
        // Bit 0 of the flags asks for a checksum, the second byte for segmentation; neither was offered.
        if header[0] & 1 != 0 || header[1] != 0 {
            return invalid("the frame wants an offload that was not offered");
        }
        self.flush()?;
        if self.wants_write() {
            return Ok(false);
        }
        let frame_len = (len - HEADER_LEN) as u32;
        let mut prefix = frame_len.to_be_bytes();
        let list = after_header(bufs, &mut prefix);
        let whole = PREFIX + frame_len as usize;
        // SAFETY: the caller's promise for `bufs`; `prefix` lives longer than the call.
        let written = match unsafe { write(&self.stream, &list) } {
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(false);
            }
            Err(e) => return Err(e),
        };
        if written < whole {
            // SAFETY: the caller's promise.
            let frame = unsafe { backend::gather(bufs) };
            self.output.extend(prefix.iter().chain(&frame[HEADER_LEN..]).skip(written));
        }
        Ok(true)
    }

    pub(super) fn wants_write(&self) -> bool {
        !self.output.is_empty()
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.wants_write() {
            let rest = libc::iovec {
                iov_base: self.output.as_mut_ptr().cast(),
                iov_len: self.output.len(),
            };
            // SAFETY: `output` is valid and not touched during the call.
            match unsafe { write(&self.stream, &[rest]) } {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl AsRawFd for Framed {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// `prefix`, and then the buffers without the virtio header.
fn after_header(bufs: &[Buffer], prefix: &mut [u8; PREFIX]) -> Vec<libc::iovec> {
    let mut list = vec![libc::iovec { iov_base: prefix.as_mut_ptr().cast(), iov_len: PREFIX }];
    let mut skip = HEADER_LEN;
    for b in bufs {
        let cut = skip.min(b.len);
        skip -= cut;
        if cut < b.len {
            let iov_base = b.ptr.wrapping_add(cut).cast();
            list.push(libc::iovec { iov_base, iov_len: b.len - cut });
        }
    }
    list
}

/// Writes without waiting and without SIGPIPE. `BrokenPipe` when the other end has gone.
///
/// # Safety
/// What the list points to must be valid for reads.
unsafe fn write(stream: &UnixStream, list: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: `msghdr` is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_ptr().cast_mut();
    message.msg_iovlen = list.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message points to `list`, which the call only reads; the rest is the caller's promise.
    let n = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, flags) };
    match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => {
            let e = io::Error::last_os_error();
            match e.kind() {
                ErrorKind::ConnectionReset => Err(io::Error::new(ErrorKind::BrokenPipe, e)),
                _ => Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (Framed, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        (Framed::new(a), b)
    }

    fn receive(framed: &mut Framed, room: usize) -> io::Result<Option<Vec<u8>>> {
        let mut memory = vec![0xee; room];
        let mut bufs: Vec<_> =
            memory.chunks_mut(100).map(|c| Buffer { ptr: c.as_mut_ptr(), len: c.len() }).collect();
        // SAFETY: `memory` outlives the call.
        let n = unsafe { framed.receive(&mut bufs)? };
        Ok(n.map(|n| memory[..n].to_vec()))
    }

    fn send(framed: &mut Framed, frame: &[u8]) -> io::Result<bool> {
        let mut memory = frame.to_vec();
        let bufs: Vec<_> =
            memory.chunks_mut(7).map(|c| Buffer { ptr: c.as_mut_ptr(), len: c.len() }).collect();
        // SAFETY: `memory` outlives the call.
        unsafe { framed.send(&bufs) }
    }

    fn frame(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    #[test]
    fn frames_arrive_whole_however_the_stream_cuts_them() {
        let (mut framed, mut other) = pair();
        let frames = [frame(14, 1), frame(60, 2), frame(MAX_FRAME, 3), frame(1514, 4)];
        let mut bytes = Vec::new();
        for f in &frames {
            bytes.extend((f.len() as u32).to_be_bytes());
            bytes.extend(f);
        }
        // A frame that is none, between others, is left out.
        bytes.extend([0, 0, 0, 3, 1, 2, 3]);
        let mut seen = Vec::new();
        for (i, piece) in bytes.chunks(1009).enumerate() {
            for byte in piece.chunks(if i == 0 { 1 } else { 1009 }) {
                other.write_all(byte).unwrap();
                while let Some(f) = receive(&mut framed, 70_000).unwrap() {
                    seen.push(f);
                }
            }
        }
        assert_eq!(seen.len(), frames.len());
        for (seen, sent) in seen.iter().zip(&frames) {
            assert_eq!(seen[..HEADER_LEN], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(&seen[HEADER_LEN..], &sent[..]);
        }
        drop(other);
        assert_eq!(receive(&mut framed, 2000).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_frame_too_long_for_the_buffers_is_lost_alone() {
        let (mut framed, mut other) = pair();
        for (len, seed) in [(1000u32, 1), (50, 2)] {
            other.write_all(&len.to_be_bytes()).unwrap();
            other.write_all(&frame(len as usize, seed)).unwrap();
        }
        assert_eq!(receive(&mut framed, 500).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(receive(&mut framed, 500).unwrap().unwrap()[HEADER_LEN..], frame(50, 2));
        assert!(receive(&mut framed, 500).unwrap().is_none());
        other.write_all(&[0xff; 8]).unwrap();
        assert_eq!(receive(&mut framed, 500).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_full_stream_takes_whole_frames_later_and_never_waits() {
        let (mut framed, mut other) = pair();
        let body = frame(60_001, 9);
        let with_header = [vec![0; HEADER_LEN], body.clone()].concat();
        let mut taken = 0;
        while send(&mut framed, &with_header).unwrap() {
            taken += 1;
            assert!(taken < 1000, "the stream must fill up");
        }
        let mut bytes: Vec<u8> = Vec::new();
        let mut chunk = vec![0; 50_000];
        other.set_nonblocking(true).unwrap();
        while bytes.len() < taken * (body.len() + PREFIX) {
            if let Ok(n) = other.read(&mut chunk) {
                bytes.extend(&chunk[..n]);
            }
            framed.flush().unwrap();
        }
        assert!(!framed.wants_write());
        for frame in bytes.chunks(body.len() + PREFIX) {
            assert_eq!(frame[..PREFIX], (body.len() as u32).to_be_bytes());
            assert!(frame[PREFIX..] == body);
        }
        assert!(send(&mut framed, &with_header).unwrap());
        drop(other);
        assert_eq!(send(&mut framed, &with_header).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn frames_that_are_none_are_refused() {
        let (mut framed, _other) = pair();
        let refused = |framed: &mut Framed, frame: &[u8]| send(framed, frame).unwrap_err().kind();
        assert_eq!(refused(&mut framed, &[]), ErrorKind::InvalidInput);
        assert_eq!(refused(&mut framed, &[0; HEADER_LEN + 13]), ErrorKind::InvalidInput);
        assert_eq!(
            refused(&mut framed, &vec![0; HEADER_LEN + MAX_FRAME + 1]),
            ErrorKind::InvalidInput
        );
        let mut offload = [0; 100];
        offload[1] = 1;
        assert_eq!(refused(&mut framed, &offload), ErrorKind::InvalidInput);
        assert!(send(&mut framed, &[0; HEADER_LEN + 14]).unwrap());
    }
}
