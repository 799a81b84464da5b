//! Interrupt messages between APICs: who is meant, and how a message ends at a vCPU (SDM volume 3,
//! 12.6 "Issuing Interprocessor Interrupts" and 12.11 "Message Signalled Interrupts").

use std::sync::atomic::Ordering;

use super::lapic::Lapic;
use crate::shared::{Port, Shared, attention};

/// Delivery modes.
#[allow(missing_docs)]
pub mod mode {
    pub const FIXED: u8 = 0;
    pub const LOWEST: u8 = 1;
    pub const SMI: u8 = 2;
    pub const NMI: u8 = 4;
    pub const INIT: u8 = 5;
    pub const STARTUP: u8 = 6;
    pub const EXTINT: u8 = 7;
    /// The field's width.
    pub const MASK: u8 = 7;
}

/// An interrupt on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// APIC id, or a set of logical ids.
    pub destination: u32,
    /// `destination` is logical.
    pub logical: bool,
    /// `destination` is an x2APIC's, 32 bits wide; otherwise 8 bits, FFH meaning all.
    pub wide: bool,
    /// [`mode`].
    pub mode: u8,
    /// Vector, where the mode has one.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
    /// The level.
    pub assert: bool,
}

/// Destination shorthands (ICR bits 19:18).
mod shorthand {
    pub const NONE: u64 = 0;
    pub const SELF: u64 = 1;
    pub const ALL: u64 = 2;
}

impl Message {
    /// From an interrupt command register; in xAPIC mode the destination is in bits 63:56.
    pub fn from_icr(icr: u64, x2apic: bool) -> Self {
        let high = (icr >> 32) as u32;
        let level = icr & 1 << 15 != 0;
        Self {
            destination: if x2apic { high } else { high >> 24 },
            logical: icr & 1 << 11 != 0,
            wide: x2apic,
            mode: (icr >> 8) as u8 & mode::MASK,
            vector: icr as u8,
            level,
            assert: !level || icr & 1 << 14 != 0,
        }
    }

    /// From what a device writes where.
    pub fn from_msi(address: u64, data: u32) -> Self {
        // Bits 63:40 of the address hold destination bits 31:8 where a platform has them.
        let high = (address >> 40) as u32 & 0x00ff_ffff;
        let level = data & 1 << 15 != 0;
        Self {
            destination: (address >> 12) as u32 & 0xff | high << 8,
            logical: address & 1 << 2 != 0,
            wide: high != 0,
            mode: (data >> 8) as u8 & mode::MASK,
            vector: data as u8,
            level,
            assert: !level || data & 1 << 14 != 0,
        }
    }

    fn to_all(self) -> bool {
        !self.logical && self.destination == if self.wide { u32::MAX } else { 0xff }
    }

    /// Whether this is for `lapic`.
    pub fn is_for(self, lapic: &Lapic) -> bool {
        if !lapic.enabled() {
            // A LAPIC that is off hears INIT, NMI and SIPI by its id only.
            return !self.logical && (self.to_all() || self.destination == lapic.id());
        }
        if self.logical {
            lapic.matches_logical(self.destination, self.wide)
        } else {
            self.to_all() || self.destination == lapic.id()
        }
    }
}

impl Shared {
    /// Delivers to every LAPIC that is meant; says whether any accepted.
    pub fn deliver(&self, message: Message) -> bool {
        if message.mode == mode::LOWEST {
            return self.deliver_lowest(message);
        }
        // The common case, by its index: ids are indices.
        if !message.logical && !message.to_all() {
            return self
                .ports()
                .get(message.destination as usize)
                .is_some_and(|port| accept(port, message));
        }
        let mut any = false;
        for port in self.ports().iter().filter(|port| message.is_for(&port.lapic)) {
            any |= accept(port, message);
        }
        any
    }

    /// The LAPIC that is busy with the least important thing gets it; between equals they take turns.
    fn deliver_lowest(&self, message: Message) -> bool {
        let n = self.ports().len();
        let first = self.chip.turn.fetch_add(1, Ordering::Relaxed) as usize;
        let chosen = (0..n)
            .map(|i| &self.ports()[(first.wrapping_add(i)) % n])
            .filter(|port| port.lapic.software_enabled() && message.is_for(&port.lapic))
            .min_by_key(|port| port.lapic.processor_priority());
        chosen.is_some_and(|port| accept(port, message))
    }

    /// vCPU `me` has written its interrupt command register.
    pub fn send_ipi(&self, me: u32, icr: u64) {
        let Some(sender) = self.ports().get(me as usize) else { return };
        let message = Message::from_icr(icr, sender.lapic.x2apic());
        match icr >> 18 & 3 {
            shorthand::NONE => {
                self.deliver(message);
            }
            shorthand::SELF => {
                // Only fixed interrupts may be sent to oneself (SDM volume 3, table 12-3).
                if message.mode == mode::FIXED {
                    accept(sender, message);
                }
            }
            which => {
                for (i, port) in self.ports().iter().enumerate() {
                    if which == shorthand::ALL || i as u32 != me {
                        accept(port, message);
                    }
                }
            }
        }
    }
}

/// One vCPU takes a message; says whether it could.
fn accept(port: &Port, message: Message) -> bool {
    match message.mode {
        mode::FIXED | mode::LOWEST => {
            if !port.lapic.accept(message.vector, message.level) {
                return false;
            }
            port.notify(attention::INTERRUPT);
        }
        mode::NMI => port.notify(attention::NMI),
        // The level de-assert of an INIT synchronises arbitration ids, which no longer exist.
        mode::INIT if message.assert => port.notify(attention::INIT),
        mode::STARTUP => {
            port.sipi_vector.store(message.vector, Ordering::SeqCst);
            port.notify(attention::SIPI);
        }
        // There is no SMM; ExtINT comes over the PIC's own wire.
        _ => return false,
    }
    true
}
