//! Ports for debugging: the POST code and, for tests, an exit with a value.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// The POST code's port (one byte wide here).
pub const POST_PORT: u16 = 0x80;
/// The debug exit's port, 4 bytes wide.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Port 80H: takes what firmware reports of its progress, and Linux's delays.
#[derive(Debug, Default)]
pub struct PostCode(AtomicU8);

impl PostCode {
    /// The last code written.
    pub fn last(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

impl BusDevice for PostCode {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.last());
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&code) = data.first() {
            self.0.store(code, Ordering::Relaxed);
        }
    }
}

/// A port on which a test guest ends the machine with a value. Not part of a machine unless asked for.
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl DebugExit {
    /// A port that asks `power` for [`PowerRequest::DebugExit`].
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { power }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        let value = data.iter().take(4).rev().fold(0, |value, &b| value << 8 | u32::from(b));
        self.power.request(PowerRequest::DebugExit(value));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestPower, hammer};
    use super::*;

    #[test]
    fn exits_with_the_value_written() {
        let power: Arc<TestPower> = Arc::default();
        let exit = DebugExit::new(power.clone());
        exit.write(0, &[3]);
        exit.write(0, &[1, 2]);
        exit.write(0, &[1, 2, 3, 4]);
        let values = [3, 0x201, 0x0403_0201].map(PowerRequest::DebugExit);
        assert_eq!(power.take(), values);
        hammer(&exit, 4, 1000);
    }

    #[test]
    fn the_post_code_is_kept() {
        let post = PostCode::default();
        post.write(0, &[0x42]);
        let mut data = [0];
        post.read(0, &mut data);
        assert_eq!((data, post.last()), ([0x42], 0x42));
        hammer(&post, 1, 1000);
    }
}
