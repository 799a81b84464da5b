//! The I/O APIC (82093AA data sheet 290566) with 24 pins, version 20H: with an EOI register.
//!
//! ```text
//!   line --edge--------------------> message to LAPICs
//!   line --level, not remote IRR---> message, remote IRR = 1
//!             EOI of that vector ------------> remote IRR = 0; line still up: again
//! ```

use super::ipi::{Message, mode};

/// Where its registers are.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of the register page.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Pins.
pub const PINS: usize = 24;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOIR: u64 = 0x40;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR cannot be written.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
/// What an entry has: bits 0..17 and the destination.
const ENTRY: u64 = 0xff00_0000_0001_ffff;

/// The I/O APIC. What it wants delivered comes back from each call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ioapic {
    id: u8,
    select: u8,
    /// Lines asserted, bit for pin.
    lines: u32,
    redirection: [u64; PINS],
}

/// Saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoapicState {
    /// APIC id.
    pub id: u32,
    /// IOREGSEL.
    pub select: u32,
    /// Lines asserted, bit for pin.
    pub irr: u32,
    /// The redirection entries.
    pub redirection: [u64; PINS],
}

/// Takes a message; says whether any LAPIC accepted it.
pub trait Sink {
    /// Delivers.
    fn deliver(&mut self, message: Message) -> bool;
}

impl<F: FnMut(Message) -> bool> Sink for F {
    fn deliver(&mut self, message: Message) -> bool {
        self(message)
    }
}

impl Default for Ioapic {
    fn default() -> Self {
        Self { id: 0, select: 0, lines: 0, redirection: [MASKED; PINS] }
    }
}

impl Ioapic {
    /// A load of `buf.len()` bytes at `offset` into the page.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let value = match offset & !3 {
            IOREGSEL => u32::from(self.select),
            IOWIN => self.register(),
            _ => 0,
        };
        let bytes = (u64::from(value) >> (8 * (offset & 3))).to_le_bytes();
        buf.fill(0);
        let n = buf.len().min(bytes.len());
        buf[..n].copy_from_slice(&bytes[..n]);
    }

    fn register(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id & 15) << 24,
            1 => VERSION,
            n => match self.redirection.get(usize::from(n.wrapping_sub(0x10) >> 1)) {
                Some(entry) if n >= 0x10 => (entry >> (32 * (n & 1))) as u32,
                _ => 0,
            },
        }
    }

    /// A store at `offset` into the page.
    pub fn write(&mut self, offset: u64, buf: &[u8], sink: &mut impl Sink) {
        // Registers are 32 bits wide; a wider store writes the first one, a byte is enough for the selector.
        let mut bytes = [0; 4];
        let n = buf.len().min(4);
        bytes[..n].copy_from_slice(&buf[..n]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.select = value as u8,
            IOWIN => self.set_register(value, sink),
            EOIR => self.eoi(value as u8, sink),
            _ => {}
        }
    }

    fn set_register(&mut self, value: u32, sink: &mut impl Sink) {
        let n = self.select;
        if n == 0 {
            self.id = (value >> 24) as u8 & 15;
        }
        let pin = usize::from(n.wrapping_sub(0x10) >> 1);
        if n < 0x10 || pin >= PINS {
            return;
        }
        let old = self.redirection[pin];
        let shift = 32 * (n & 1);
        let mut new = old & !(0xffff_ffff << shift) | u64::from(value) << shift;
        new = new & ENTRY & !READ_ONLY | old & READ_ONLY;
        if new & LEVEL == 0 {
            // Software for I/O APICs without EOI register clears remote IRR by going through edge mode.
            new &= !REMOTE_IRR;
        }
        self.redirection[pin] = new;
        if new & LEVEL != 0 {
            self.service_level(pin, sink);
        }
    }

    /// Sets the level of a pin's line.
    pub fn set_line(&mut self, pin: usize, level: bool, sink: &mut impl Sink) {
        let Some(&entry) = self.redirection.get(pin) else { return };
        let bit = 1 << pin;
        let rose = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if entry & LEVEL != 0 {
            self.service_level(pin, sink);
        } else if rose && entry & MASKED == 0 {
            sink.deliver(message(entry));
        }
    }

    fn service_level(&mut self, pin: usize, sink: &mut impl Sink) {
        let entry = self.redirection[pin];
        let up = self.lines & 1 << pin != 0;
        if up && entry & (MASKED | REMOTE_IRR) == 0 && sink.deliver(message(entry)) {
            self.redirection[pin] |= REMOTE_IRR;
        }
    }

    /// An interrupt of `vector` has ended at a LAPIC, or software says so.
    pub fn eoi(&mut self, vector: u8, sink: &mut impl Sink) {
        for pin in 0..PINS {
            let entry = self.redirection[pin];
            if entry & LEVEL != 0 && entry & REMOTE_IRR != 0 && entry as u8 == vector {
                self.redirection[pin] &= !REMOTE_IRR;
                self.service_level(pin, sink);
            }
        }
    }

    /// Its state.
    pub fn state(&self) -> IoapicState {
        IoapicState {
            id: u32::from(self.id),
            select: u32::from(self.select),
            irr: self.lines,
            redirection: self.redirection,
        }
    }

    /// Puts saved state in place.
    pub fn set_state(&mut self, state: &IoapicState) {
        self.id = state.id as u8 & 15;
        self.select = state.select as u8;
        self.lines = state.irr & ((1 << PINS) - 1);
        self.redirection = state.redirection.map(|entry| entry & ENTRY);
    }
}

fn message(entry: u64) -> Message {
    Message {
        destination: (entry >> 56) as u32,
        logical: entry & LOGICAL != 0,
        wide: false,
        mode: (entry >> 8) as u8 & mode::MASK,
        vector: entry as u8,
        level: entry & LEVEL != 0,
        assert: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Log(Vec<Message>, bool);
    impl Sink for Log {
        fn deliver(&mut self, message: Message) -> bool {
            self.0.push(message);
            self.1
        }
    }
    impl Log {
        fn vectors(&mut self) -> Vec<u8> {
            self.0.drain(..).map(|m| m.vector).collect()
        }
    }

    fn select(apic: &mut Ioapic, log: &mut Log, register: u8, value: u32) {
        apic.write(IOREGSEL, &[register], log);
        apic.write(IOWIN, &value.to_le_bytes(), log);
    }

    fn read(apic: &mut Ioapic, log: &mut Log, register: u8) -> u32 {
        apic.write(IOREGSEL, &u32::from(register).to_le_bytes(), log);
        let mut buf = [0; 4];
        apic.read(IOWIN, &mut buf);
        u32::from_le_bytes(buf)
    }

    #[test]
    fn registers_read_back() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], true));
        assert_eq!(read(&mut apic, &mut log, 1), 0x0017_0020);
        assert_eq!(read(&mut apic, &mut log, 0x10), 0x1_0000);
        select(&mut apic, &mut log, 0, 0x0500_0000);
        assert_eq!(read(&mut apic, &mut log, 0), 0x0500_0000);
        select(&mut apic, &mut log, 0x3f, 0x7700_0000);
        select(&mut apic, &mut log, 0x3e, 0x0001_f9ab);
        assert_eq!(read(&mut apic, &mut log, 0x3f), 0x7700_0000);
        assert_eq!(read(&mut apic, &mut log, 0x3e), 0x0001_a9ab, "read-only bits stay");
        for beyond in [3, 0x0f, 0x40, 0xff] {
            select(&mut apic, &mut log, beyond, u32::MAX);
            assert_eq!(read(&mut apic, &mut log, beyond), 0);
        }
    }

    #[test]
    fn an_edge_is_one_message() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], true));
        apic.set_line(4, true, &mut log);
        assert!(log.0.is_empty(), "masked edges are lost");
        select(&mut apic, &mut log, 0x18, 0x0000_0934);
        select(&mut apic, &mut log, 0x19, 0x0300_0000);
        assert!(log.0.is_empty());
        apic.set_line(4, false, &mut log);
        apic.set_line(4, true, &mut log);
        apic.set_line(4, true, &mut log);
        let expected = Message {
            destination: 3,
            logical: true,
            wide: false,
            mode: mode::LOWEST,
            vector: 0x34,
            level: false,
            assert: true,
        };
        assert_eq!(log.0, [expected]);
    }

    #[test]
    fn a_level_comes_again_after_eoi() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], true));
        select(&mut apic, &mut log, 0x10 + 2 * 17, 0x8051);
        apic.set_line(17, true, &mut log);
        assert_eq!(log.vectors(), [0x51]);
        assert_eq!(read(&mut apic, &mut log, 0x10 + 2 * 17), 0xc051);
        apic.set_line(17, false, &mut log);
        apic.set_line(17, true, &mut log);
        assert!(log.0.is_empty(), "remote IRR holds it back");
        apic.eoi(0x50, &mut log);
        assert!(log.0.is_empty());
        apic.eoi(0x51, &mut log);
        assert_eq!(log.vectors(), [0x51]);
        apic.set_line(17, false, &mut log);
        apic.write(EOIR, &0x51u32.to_le_bytes(), &mut log);
        assert!(log.0.is_empty());
        assert_eq!(read(&mut apic, &mut log, 0x10 + 2 * 17), 0x8051);
    }

    #[test]
    fn unmasking_a_level_that_is_up_delivers() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], true));
        select(&mut apic, &mut log, 0x10, 0x1_8040);
        apic.set_line(0, true, &mut log);
        assert!(log.0.is_empty());
        select(&mut apic, &mut log, 0x10, 0x8040);
        assert_eq!(log.vectors(), [0x40]);
        // Through edge mode, as for old I/O APICs.
        select(&mut apic, &mut log, 0x10, 0x1_0040);
        select(&mut apic, &mut log, 0x10, 0x8040);
        assert_eq!(log.vectors(), [0x40]);
    }

    #[test]
    fn what_nobody_accepts_is_tried_again() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], false));
        select(&mut apic, &mut log, 0x10, 0x8040);
        apic.set_line(0, true, &mut log);
        assert_eq!(read(&mut apic, &mut log, 0x10), 0x8040, "no remote IRR");
        log.1 = true;
        apic.set_line(0, true, &mut log);
        assert_eq!(log.vectors(), [0x40, 0x40]);
    }

    #[test]
    fn a_line_beyond_the_last_is_nothing() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], true));
        apic.set_line(24, true, &mut log);
        apic.set_line(usize::MAX, true, &mut log);
        assert_eq!(apic, Ioapic::default());
    }

    #[test]
    fn state_survives() {
        let (mut apic, mut log) = (Ioapic::default(), Log(vec![], true));
        select(&mut apic, &mut log, 0x10 + 2 * 17, 0x8051);
        apic.set_line(17, true, &mut log);
        let mut copy = Ioapic::default();
        copy.set_state(&apic.state());
        assert_eq!(copy, apic);
    }
}
