//! Frame information structures: what host and device send to each other (Serial ATA 3.1, section 10.3).

use serde::{Deserialize, Serialize};

/// Bits of the status register.
pub(super) mod status {
    pub const ERR: u8 = 0x01;
    pub const DRQ: u8 = 0x08;
    pub const SEEK: u8 = 0x10;
    pub const DF: u8 = 0x20;
    pub const READY: u8 = 0x40;
    pub const BUSY: u8 = 0x80;
    /// A device that waits for a command.
    pub const IDLE: u8 = READY | SEEK;
}

/// Bits of the error register.
pub(super) mod error {
    /// The command was aborted.
    pub const ABORT: u8 = 0x04;
    /// There are no such sectors.
    pub const NOT_FOUND: u8 = 0x10;
    /// The data could not be read.
    pub const UNCORRECTABLE: u8 = 0x40;
}

/// Types of FISes, and the I bit of their second byte.
const HOST: u8 = 0x27;
const DEVICE: u8 = 0x34;
const DMA_SETUP: u8 = 0x41;
const PIO_SETUP: u8 = 0x5f;
const DEVICE_BITS: u8 = 0xa1;
const INTERRUPT: u8 = 0x40;
const TO_HOST: u8 = 0x20;

/// A register FIS from the host: a command, or a write to device control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostFis(pub [u8; 64]);

impl HostFis {
    /// Whether it is one at all.
    pub fn is_valid(&self) -> bool {
        self.0[0] == HOST
    }
    /// It has a command; otherwise it has device control.
    pub fn is_command(&self) -> bool {
        self.0[1] & 0x80 != 0
    }
    pub fn command(&self) -> u8 {
        self.0[2]
    }
    pub fn feature(&self) -> u8 {
        self.0[3]
    }
    /// The 16 bits of features.
    pub fn features(&self) -> u16 {
        u16::from_le_bytes([self.0[3], self.0[11]])
    }
    pub fn device(&self) -> u8 {
        self.0[7]
    }
    /// The 48 bits of address.
    pub fn lba(&self) -> u64 {
        let f = &self.0;
        u64::from_le_bytes([f[4], f[5], f[6], f[8], f[9], f[10], 0, 0])
    }
    /// The 16 bits of count.
    pub fn count(&self) -> u16 {
        u16::from_le_bytes([self.0[12], self.0[13]])
    }
    /// Device control: software reset.
    pub fn resets(&self) -> bool {
        self.0[15] & 4 != 0
    }
}

/// The device's registers, as it sends them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskFile {
    /// Status.
    pub status: u8,
    /// Error.
    pub error: u8,
    /// Address, 48 bits.
    pub lba: u64,
    /// Device.
    pub device: u8,
    /// Count.
    pub count: u16,
}

impl TaskFile {
    /// The registers that a command left, with success and no other value.
    pub(super) fn good(fis: &HostFis) -> Self {
        let (lba, device, count) = (fis.lba(), fis.device(), fis.count());
        Self { status: status::IDLE, error: 0, lba, device, count }
    }

    /// The same with an error.
    pub(super) fn failed(fis: &HostFis, error: u8) -> Self {
        Self { status: status::READY | status::ERR, error, ..Self::good(fis) }
    }

    /// Whether it tells of an error.
    pub(super) fn is_error(&self) -> bool {
        self.status & (status::ERR | status::DF) != 0
    }

    fn registers(&self, kind: u8, flags: u8, status: u8) -> [u8; 20] {
        let lba = self.lba.to_le_bytes();
        let count = self.count.to_le_bytes();
        let mut fis = [0; 20];
        fis[..4].copy_from_slice(&[kind, flags, status, self.error]);
        fis[4..8].copy_from_slice(&[lba[0], lba[1], lba[2], self.device]);
        fis[8..11].copy_from_slice(&lba[3..6]);
        fis[12..14].copy_from_slice(&count);
        fis
    }

    /// The register FIS.
    pub(super) fn to_host(self, interrupt: bool) -> [u8; 20] {
        self.registers(DEVICE, if interrupt { INTERRUPT } else { 0 }, self.status)
    }

    /// The PIO setup FIS before the last block of data, of `bytes`; this is the device's state after it.
    pub(super) fn pio_setup(self, to_host: bool, bytes: u16) -> [u8; 20] {
        let flags = INTERRUPT | if to_host { TO_HOST } else { 0 };
        let mut fis = self.registers(PIO_SETUP, flags, status::IDLE | status::DRQ);
        fis[15] = self.status;
        fis[16..18].copy_from_slice(&bytes.to_le_bytes());
        fis
    }
}

/// The set device bits FIS: queued commands have ended.
pub(super) fn device_bits(tf: &TaskFile, ended: u32) -> [u8; 8] {
    let [a, b, c, d] = ended.to_le_bytes();
    [DEVICE_BITS, INTERRUPT, tf.status & 0x77, tf.error, a, b, c, d]
}

/// The DMA setup FIS of a queued command.
pub(super) fn dma_setup(tag: u8, to_host: bool, bytes: u32) -> [u8; 28] {
    let mut fis = [0; 28];
    fis[0] = DMA_SETUP;
    fis[1] = if to_host { TO_HOST } else { 0 };
    fis[4] = tag;
    fis[20..24].copy_from_slice(&bytes.to_le_bytes());
    fis
}
