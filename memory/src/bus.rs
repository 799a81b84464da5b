//! What a vCPU reaches that is not RAM.

/// Port and memory-mapped I/O, called in the vCPU's own thread.
///
/// Accesses are 1, 2, 4 or 8 bytes (ports: 1, 2 or 4), little-endian, and never cross a
/// device's border in a way the bus cannot split. Nothing here may block for long: slow work
/// belongs to the I/O threads. Reads of nothing return all ones; writes to nothing are dropped.
pub trait Bus: Send + Sync {
    /// `IN`: reads `data.len()` bytes from `port`.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`: writes `data` to `port`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A load from guest-physical address `gpa` where there is no RAM.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A store to guest-physical address `gpa` where there is no RAM.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// A bus with nothing on it.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoBus;

impl Bus for NoBus {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}
