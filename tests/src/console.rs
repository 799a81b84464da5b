//! What a guest, or a program, has printed so far.

use std::io::Read;
use std::slice::SliceIndex;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Text that grows while somebody waits for it; its lines end with a line feed alone.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<(Mutex<Text>, Condvar)>);

#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    ended: bool,
}

/// What waiting for a text came to.
pub(crate) enum Found {
    /// It ends at this byte.
    At(usize),
    /// It is not there, and nothing will come any more.
    Ended,
    /// It did not come in time.
    NotYet,
}

impl Console {
    /// Collects what comes from `source`, in a thread that ends when it does.
    pub(crate) fn collect(source: impl Read + Send + 'static) -> Self {
        let console = Self::default();
        let writer = console.clone();
        thread::spawn(move || writer.fill(source));
        console
    }

    fn fill(&self, mut source: impl Read) {
        let mut buffer = [0; 4096];
        loop {
            // A terminal whose other end is closed gives EIO: that is its end too.
            let count = source.read(&mut buffer).unwrap_or(0);
            let mut text = self.lock();
            // A serial line ends its lines with both, a terminal perhaps adds a third.
            text.bytes.extend(buffer[..count].iter().filter(|byte| **byte != b'\r'));
            text.ended = count == 0;
            self.0.1.notify_all();
            if text.ended {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Text> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `wanted` behind the byte `from`.
    pub(crate) fn wait_for(&self, wanted: &str, from: usize, limit: Duration) -> Found {
        let end = Instant::now() + limit;
        let mut text = self.lock();
        loop {
            let rest = text.bytes.get(from..).unwrap_or_default();
            if let Some(at) = rest.windows(wanted.len()).position(|w| w == wanted.as_bytes()) {
                return Found::At(from + at + wanted.len());
            }
            if text.ended {
                return Found::Ended;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Found::NotYet;
            }
            let woken = self.0.1.wait_timeout(text, left);
            text = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until nothing will come any more; says whether that is so.
    pub(crate) fn wait_for_end(&self, limit: Duration) -> bool {
        let text = self.lock();
        let woken = self.0.1.wait_timeout_while(text, limit, |text| !text.ended);
        woken.unwrap_or_else(PoisonError::into_inner).0.ended
    }

    /// What was printed in this range of bytes.
    pub(crate) fn text(&self, range: impl SliceIndex<[u8], Output = [u8]>) -> String {
        let text = self.lock();
        let bytes = text.bytes.get(range).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// The number of bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// The last lines, for a message.
    pub(crate) fn tail(&self) -> String {
        let text = self.text(0..);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Write, pipe};

    #[test]
    fn text_is_found_across_reads_and_only_once() {
        let (reader, mut writer) = pipe().unwrap();
        let console = Console::collect(reader);
        writer.write_all(b"one log").unwrap();
        let soon = Duration::from_millis(50);
        assert!(matches!(console.wait_for("login:", 0, soon), Found::NotYet));
        writer.write_all(b"in: two").unwrap();
        let Found::At(at) = console.wait_for("login:", 0, Duration::from_secs(60)) else {
            panic!("not found");
        };
        assert_eq!(at, 10);
        assert!(matches!(console.wait_for("login:", at, soon), Found::NotYet));
        drop(writer);
        assert!(matches!(console.wait_for("login:", at, Duration::from_secs(60)), Found::Ended));
        assert!(console.wait_for_end(Duration::from_secs(60)));
        assert_eq!(console.text(at..), " two");
    }
}
