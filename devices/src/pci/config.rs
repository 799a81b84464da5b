//! A function's configuration space: 256 bytes with, for each bit, whether a write changes or clears it.
//!
//! ```text
//!   00  vendor, device, command, status, class, header type
//!   10  BAR 0 .. BAR 5
//!   2c  subsystem; 30 expansion ROM; 34 first capability; 3c interrupt line and pin
//!   40  capabilities, each: id, offset of the next one, registers
//! ```
//!
//! PCI Local Bus 3.0, section 6.1 and 6.7. Bytes 100H to FFFH of an Express function read as zero: no
//! extended capabilities.

use serde::{Deserialize, Serialize};

/// Bytes of configuration space that are kept.
pub const SIZE: usize = 256;
/// Offsets of the standard header's registers.
pub(super) mod reg {
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BAR0: usize = 0x10;
    pub const ROM: usize = 0x30;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    pub const FIRST_CAPABILITY: usize = 0x40;
}
/// Bits of the command register.
pub(super) mod command {
    pub const IO: u16 = 1;
    pub const MEMORY: u16 = 2;
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// I/O, memory, bus master, parity, SERR, INTx disable.
    pub const WRITABLE: u16 = 0x0547;
}
/// Bits of the status register.
pub(super) mod status {
    pub const INTERRUPT: u16 = 1 << 3;
    pub const CAPABILITIES: u16 = 1 << 4;
    /// Error bits that software clears by writing ones.
    pub const WRITE_TO_CLEAR: u16 = 0xf900;
}

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface: 0xCCSSPP.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id and subsystem id.
    pub subsystem: (u16, u16),
    /// Other functions may share the slot.
    pub multifunction: bool,
}

/// The bytes, and what writes do to them.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    write_to_clear: [u8; SIZE],
    last_capability: Option<usize>,
    free: usize,
}

/// What is saved of a configuration space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigState {
    /// All 256 bytes; only the writable bits are taken back.
    pub bytes: Vec<u8>,
}

impl ConfigSpace {
    /// A type 0 header for `identity`, with nothing enabled.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            write_to_clear: [0; SIZE],
            last_capability: None,
            free: reg::FIRST_CAPABILITY,
        };
        space.set_u16(0x00, identity.vendor);
        space.set_u16(0x02, identity.device);
        space.set_u32(0x08, identity.class << 8 | u32::from(identity.revision));
        space.bytes[reg::HEADER_TYPE] = if identity.multifunction { 0x80 } else { 0 };
        space.set_u16(0x2c, identity.subsystem.0);
        space.set_u16(0x2e, identity.subsystem.1);
        space.set_writable(reg::COMMAND, &command::WRITABLE.to_le_bytes());
        space.set_writable(0x0c, &[0xff]); // cache line size
        space.set_writable(reg::INTERRUPT_LINE, &[0xff]);
        let clear = status::WRITE_TO_CLEAR.to_le_bytes();
        space.write_to_clear[reg::STATUS..reg::STATUS + 2].copy_from_slice(&clear);
        space
    }

    /// Appends a capability: its registers after the id and the next pointer, and which of their
    /// bits are writable (missing bytes: none). Returns its offset; `None` if the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let at = self.free;
        let end = at + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return None;
        }
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.set_writable(at + 2, writable);
        let link = self.last_capability.map_or(reg::CAPABILITIES, |last| last + 1);
        self.bytes[link] = at as u8;
        self.set_u16(reg::STATUS, self.u16(reg::STATUS) | status::CAPABILITIES);
        self.last_capability = Some(at);
        self.free = end.next_multiple_of(4);
        Some(at)
    }

    /// Makes the bits set in `mask`, from `offset` on, writable. Bytes outside are ignored.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        for (slot, mask) in self.writable.iter_mut().skip(offset).zip(mask) {
            *slot = *mask;
        }
    }

    /// Reads; bytes from 100H on are zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(i)).copied().unwrap_or(0);
        }
    }

    /// Writes as a guest does: read-only bits stay.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, &value) in data.iter().enumerate() {
            let Some(byte) = self.bytes.get_mut(offset.saturating_add(i)) else { return };
            let (writable, clear) = (self.writable[offset + i], self.write_to_clear[offset + i]);
            *byte = (*byte & !writable | value & writable) & !(value & clear);
        }
    }

    /// The register at `offset` (inside the 256 bytes).
    pub fn u16(&self, offset: usize) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The register at `offset` (inside the 256 bytes).
    pub fn u32(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Sets a byte as the device does, whatever is writable.
    pub fn set_u8(&mut self, offset: usize, value: u8) {
        self.set(offset, &[value]);
    }

    /// Sets a register as the device does, whatever is writable.
    pub fn set_u16(&mut self, offset: usize, value: u16) {
        self.set(offset, &value.to_le_bytes());
    }

    /// Sets a register as the device does, whatever is writable.
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        self.set(offset, &value.to_le_bytes());
    }

    fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    /// What is saved.
    pub fn state(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Takes back the writable bits of a saved space.
    pub fn restore(&mut self, state: &ConfigState) {
        for (i, value) in state.bytes.iter().enumerate().take(SIZE) {
            let writable = self.writable[i];
            self.bytes[i] = self.bytes[i] & !writable | value & writable;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x018000,
        revision: 1,
        subsystem: (0x1af4, 0x40),
        multifunction: false,
    };

    #[test]
    fn only_writable_bits_change() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.write(0, &[0; 4]);
        assert_eq!(space.u32(0), 0x1042_1af4);
        assert_eq!(space.u32(8), 0x0180_0001);
        space.write(reg::COMMAND, &0xffff_ffffu32.to_le_bytes());
        assert_eq!(space.u16(reg::COMMAND), command::WRITABLE);
        space.write(0xfe, &[1, 2, 3, 4]);
        space.write(usize::MAX, &[1, 2]);
        let mut out_of_range = [1; 4];
        space.read(0x100, &mut out_of_range);
        assert_eq!(out_of_range, [0; 4]);
    }

    #[test]
    fn error_bits_clear_by_ones() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.set_u16(reg::STATUS, 0xf900);
        space.write(reg::STATUS, &0x8000u16.to_le_bytes());
        assert_eq!(space.u16(reg::STATUS), 0x7900);
    }

    #[test]
    fn capabilities_are_linked_and_bounded() {
        let mut space = ConfigSpace::new(&IDENTITY);
        assert_eq!(space.add_capability(9, &[1; 7], &[0; 7]), Some(0x40));
        assert_eq!(space.add_capability(0x11, &[2; 2], &[0xf0]), Some(0x4c));
        assert_eq!(space.bytes[reg::CAPABILITIES], 0x40);
        assert_eq!(space.bytes[0x41], 0x4c);
        assert_eq!(space.bytes[0x4d], 0);
        assert_ne!(space.u16(reg::STATUS) & status::CAPABILITIES, 0);
        space.write(0x4e, &[0xff, 0xff]);
        assert_eq!(space.u16(0x4e), 0x02f2);
        assert_eq!(space.add_capability(9, &[0; 200], &[]), None);
    }

    #[test]
    fn a_restored_space_keeps_its_identity() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.write(reg::COMMAND, &[2, 0]);
        let mut state = space.state();
        state.bytes[0] = 0;
        let mut other = ConfigSpace::new(&IDENTITY);
        other.restore(&state);
        assert_eq!(other.u16(0), 0x1af4);
        assert_eq!(other.u16(reg::COMMAND), 2);
    }
}
