//! Where a serial port's bytes go: a bounded buffer, and a thread that empties it into a writer.
//!
//! ```text
//!   vCPU --push--> [ buffer, 64 KiB ] --thread--> writer (terminal, file, socket)
//!          full: the guest sees a busy transmitter and waits by itself;
//!          one that writes all the same is held for STALL_BOUND, once, then loses bytes
//! ```
//!
//! Nothing is lost as long as the guest looks whether the transmitter is ready, however slow the
//! reader is. A guest that does not look (Linux's console does for 10 ms a byte, then goes on) is
//! held back for a quarter of a second; when even then no byte was taken, the reader counts as
//! stalled and what the guest writes is dropped, without another wait, until the reader takes
//! something.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that may wait for the reader.
const CAPACITY: usize = 64 << 10;
/// The writer thread says that there is room again when no more than this is left.
const LOW_WATER: usize = CAPACITY / 2;
/// The longest that a byte written into a full buffer holds its vCPU.
const STALL_BOUND: Duration = Duration::from_millis(250);
/// How long dropping the output waits for the reader to take the rest.
const CLOSE_BOUND: Duration = Duration::from_secs(1);
/// How long to wait before trying again on a writer that does not block.
const RETRY: Duration = Duration::from_millis(2);

type Notify = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The writer thread holds bytes that it has not written yet.
    writing: bool,
    /// A push timed out and nothing was taken since.
    stalled: bool,
    /// The writer failed: everything is dropped.
    broken: bool,
    /// No more bytes will come.
    closed: bool,
    /// A push or a look at the buffer found it full; somebody wants to hear of room.
    was_full: bool,
    lost: u64,
    notify: Option<Notify>,
}

impl Queue {
    fn has_room(&self) -> bool {
        // A reader that is gone never makes the guest wait.
        self.broken || self.bytes.len() < CAPACITY
    }
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There are bytes, or there will be no more.
    filled: Condvar,
    /// Bytes were taken.
    emptied: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way out of a serial port. Dropping it waits a little for the reader to take the rest.
pub struct SerialOutput {
    shared: Arc<Shared>,
    name: String,
}

impl SerialOutput {
    /// An output into `writer`, by a thread called `name`. Errors if there is no thread to be had.
    pub fn new(name: &str, writer: Box<dyn Write + Send>) -> io::Result<Self> {
        let shared: Arc<Shared> = Arc::default();
        let theirs = shared.clone();
        let title: String = name.chars().take(15).collect();
        let log_name = name.to_owned();
        thread::Builder::new().name(title).spawn(move || drain(&theirs, writer, &log_name))?;
        Ok(Self { shared, name: name.into() })
    }

    /// An output that drops everything.
    pub fn none() -> Self {
        let shared: Arc<Shared> = Arc::default();
        shared.lock().broken = true;
        Self { shared, name: "none".into() }
    }

    /// Sets who is told when a full buffer has room again.
    pub(super) fn on_room(&self, notify: Notify) {
        self.shared.lock().notify = Some(notify);
    }

    /// Whether the next [`SerialOutput::push`] is sure not to wait.
    pub(super) fn has_room(&self) -> bool {
        let mut queue = self.shared.lock();
        let room = queue.has_room();
        queue.was_full |= !room;
        room
    }

    /// Sends a byte; in a full buffer it waits as the module says.
    pub(super) fn push(&self, byte: u8) {
        let mut queue = self.shared.lock();
        if queue.bytes.len() >= CAPACITY && !queue.broken && !queue.stalled {
            queue = self.wait_for_room(queue);
        }
        if queue.broken {
            return;
        }
        if queue.bytes.len() >= CAPACITY {
            queue.lost += 1;
            return;
        }
        queue.bytes.push_back(byte);
        if queue.bytes.len() == 1 {
            self.shared.filled.notify_one();
        }
    }

    fn wait_for_room<'a>(&self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        let end = Instant::now() + STALL_BOUND;
        while queue.bytes.len() >= CAPACITY && !queue.broken {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())
            else {
                queue.stalled = true;
                tracing::warn!(name = self.name, "nobody reads the serial output: bytes get lost");
                break;
            };
            let wait = self.shared.emptied.wait_timeout(queue, left);
            queue = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue
    }

    /// Bytes that were lost because the reader stalled.
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }

    /// Waits until the writer has everything, at most `bound`; says whether it has.
    pub fn flush(&self, bound: Duration) -> bool {
        let end = Instant::now() + bound;
        let mut queue = self.shared.lock();
        while !queue.broken && (queue.writing || !queue.bytes.is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let wait = self.shared.emptied.wait_timeout(queue, left);
            queue = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for SerialOutput {
    fn drop(&mut self) {
        {
            let mut queue = self.shared.lock();
            queue.closed = true;
            queue.notify = None;
        }
        self.shared.filled.notify_one();
        // The thread is not joined: a reader that never reads would hold us for ever.
        if !self.flush(CLOSE_BOUND) {
            tracing::warn!(name = self.name, "the last serial output was not read in time");
        }
    }
}

fn drain(shared: &Shared, mut writer: Box<dyn Write + Send>, name: &str) {
    let mut chunk = Vec::with_capacity(4096);
    loop {
        {
            let mut queue = shared.lock();
            queue.writing = false;
            shared.emptied.notify_all();
            while queue.bytes.is_empty() {
                if queue.closed {
                    return;
                }
                queue = shared.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let take = queue.bytes.len().min(4096);
            chunk.clear();
            chunk.extend(queue.bytes.drain(..take));
            queue.writing = true;
        }
        let result = write_all(&mut *writer, &chunk);
        let notify = {
            let mut queue = shared.lock();
            if let Err(error) = result {
                tracing::warn!(name, %error, "the serial output cannot be written any more");
                queue.broken = true;
                queue.bytes.clear();
            }
            queue.stalled = false;
            shared.emptied.notify_all();
            let tell = queue.was_full && (queue.bytes.len() <= LOW_WATER || queue.broken);
            tell.then(|| {
                queue.was_full = false;
                queue.notify.clone()
            })
        };
        if let Some(notify) = notify.flatten() {
            notify();
        }
    }
}

/// `write_all` and `flush` on a writer that may be in non-blocking mode, as a shared terminal can be.
fn write_all(writer: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match writer.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(e) => return Err(e),
        }
    }
    loop {
        match writer.flush() {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            done => return done,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::mpsc::{self, Receiver, SyncSender};

    /// A writer whose reader takes what it is told to take.
    pub struct Slow(pub SyncSender<Vec<u8>>);
    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    pub fn slow() -> (SerialOutput, Receiver<Vec<u8>>) {
        let (sender, receiver) = mpsc::sync_channel(0);
        (SerialOutput::new("test-out", Box::new(Slow(sender))).unwrap(), receiver)
    }

    #[test]
    fn all_bytes_arrive_in_order() {
        let (out, receiver) = slow();
        let reader = thread::spawn(move || receiver.iter().flatten().collect::<Vec<u8>>());
        let sent: Vec<u8> = (0..200_000u32).map(|i| (i * 7) as u8).collect();
        for &byte in &sent {
            out.push(byte);
        }
        drop(out);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_stalled_reader_costs_bytes_but_no_second_wait() {
        let (out, receiver) = slow();
        // The thread holds the first byte, the buffer the rest.
        out.push(b'x');
        while !out.shared.lock().writing {
            thread::yield_now();
        }
        while out.has_room() {
            out.push(b'x');
        }
        assert!(!out.has_room());
        for _ in 0..10_000 {
            out.push(b'y');
        }
        assert_eq!(out.lost(), 10_000);
        assert!(!out.flush(Duration::from_millis(1)));
        receiver.recv().unwrap();
        receiver.recv().unwrap();
        out.push(b'z');
        assert_eq!(out.lost(), 10_000);
        let rest = thread::spawn(move || receiver.iter().flatten().collect::<Vec<u8>>());
        drop(out);
        assert_eq!(rest.join().unwrap().last(), Some(&b'z'));
    }

    #[test]
    fn a_broken_reader_is_no_obstacle() {
        let (out, receiver) = slow();
        drop(receiver);
        for _ in 0..3 * CAPACITY {
            out.push(b'x');
        }
        assert!(out.flush(Duration::from_secs(30)));
        assert!(out.has_room());
        let none = SerialOutput::none();
        none.push(1);
        assert!(none.has_room() && none.flush(Duration::ZERO));
    }
}
