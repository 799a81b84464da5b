//! The PC's interrupt controllers and timer: PIC pair, IOAPIC, LAPICs, PIT.
//!
//! ```text
//!  IRQ line n (set_irq) --+--> PIC pair --INTR--> LINT0 of a LAPIC (virtual wire)
//!  PIT --> IRQ 0          +--> IOAPIC pin n (IRQ 0: pin 2) --message--+
//!  MSI (signal_msi) --------------------------------------------------+--> LAPIC --> vCPU
//!  IPI (interrupt command register) ----------------------------------+
//! ```
//!
//! Every call may come from any thread. A delivery ends with [`crate::shared::Port::notify`]. Locks
//! are held for a few instructions only; inside of them only a LAPIC (which has none) and a port's
//! sleep lock are touched.

pub mod apic_timer;
pub mod ioapic;
pub mod ipi;
pub mod lapic;
pub mod pic;
pub mod pit;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::clock;
use crate::shared::{Port, Shared, attention};
use ioapic::{IOAPIC_BASE, IOAPIC_SIZE, Ioapic, IoapicState};
use ipi::Message;
use lapic::{Effect, Lint};
use pic::{Pic, PicPair};
use pit::{Channel, Pit};

pub use apic_timer::NEVER;

/// The IOAPIC pin that IRQ 0 is wired to (the MADT tells the guest).
const IRQ0_PIN: u32 = 2;

/// PIC pair, IOAPIC and PIT of one VM.
pub struct Chip {
    pics: Mutex<PicPair>,
    pit: Mutex<Pit>,
    ioapic: Mutex<Ioapic>,
    /// INTR, as of the last look at the PIC pair.
    intr: AtomicBool,
    /// The host TSC at which the PIT wants to be looked at.
    pit_deadline: AtomicU64,
    /// Whose turn it is among equals in lowest-priority delivery.
    turn: AtomicU32,
    /// The machine's chips are somebody else's, behind the bus.
    elsewhere: AtomicBool,
}

/// Saved state of all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChipState {
    /// Master and slave.
    pub pics: [Pic; 2],
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The PIT's counters.
    pub pit: [Channel; 3],
    /// Port 61H bit 1.
    pub speaker: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Default for Chip {
    fn default() -> Self {
        Self {
            pics: Mutex::default(),
            pit: Mutex::default(),
            ioapic: Mutex::default(),
            intr: AtomicBool::new(false),
            pit_deadline: AtomicU64::new(NEVER),
            turn: AtomicU32::new(0),
            elsewhere: AtomicBool::new(false),
        }
    }
}

impl Chip {
    /// In its state after reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// The host TSC at which vCPU 0 must call [`Shared::poll_pit`], or [`NEVER`].
    #[inline]
    pub fn deadline(&self) -> u64 {
        self.pit_deadline.load(Ordering::Relaxed)
    }

    /// INTA to the PIC pair: the vector. The vCPU looks for more afterwards.
    pub fn acknowledge_pic(&self) -> u8 {
        let mut pics = lock(&self.pics);
        let vector = pics.acknowledge();
        self.intr.store(pics.output(), Ordering::SeqCst);
        vector
    }
}

impl Shared {
    // Lines and messages.

    /// Sets the level of IRQ line `gsi` (0..24). Lines below 16 go to the PIC pair too. IRQ 0 is on the
    /// IOAPIC's pin 2, so line 2 is nowhere.
    pub fn set_irq(&self, gsi: u32, level: bool) {
        if gsi < 16 {
            let mut pics = lock(&self.chip.pics);
            pics.set_irq(gsi as u8, level);
            self.pic_changed(pics);
        }
        let pin = match gsi {
            0 => IRQ0_PIN,
            IRQ0_PIN => return,
            n => n,
        };
        lock(&self.chip.ioapic).set_line(pin as usize, level, &mut |m: Message| self.deliver(m));
    }

    /// Delivers a message-signalled interrupt; says whether a LAPIC took it. What is written elsewhere than to
    /// FEEx_xxxxH (an address that the guest has not set yet) is not for LAPICs.
    pub fn signal_msi(&self, address: u64, data: u32) -> bool {
        address as u32 >> 20 == 0xfee && self.deliver(Message::from_msi(address, data))
    }

    /// Publishes INTR.
    fn pic_changed(&self, pics: MutexGuard<'_, PicPair>) {
        let now = pics.output();
        let before = self.chip.intr.swap(now, Ordering::SeqCst);
        drop(pics);
        if !now {
            return;
        }
        for port in self.ports() {
            if port.lapic.hears_pic() {
                port.notify(attention::INTERRUPT);
            } else if !before {
                match port.lapic.lint0() {
                    Lint::Nothing => {}
                    Lint::Interrupt => port.notify(attention::INTERRUPT),
                    Lint::Nmi => port.notify(attention::NMI),
                }
            }
        }
    }

    /// The PIC pair has an interrupt for vCPU `me`. Cheap. It comes before the LAPIC's own, as its wire
    /// passes the LAPIC by.
    #[inline]
    pub fn extint(&self, me: u32) -> bool {
        self.chip.intr.load(Ordering::SeqCst) && self.port(me).lapic.hears_pic()
    }

    fn port(&self, me: u32) -> &Port {
        &self.ports()[me as usize]
    }

    /// Does what a register write of vCPU `me`'s LAPIC asks for.
    pub fn apic_effect(&self, me: u32, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Recheck => self.recheck(me),
            Effect::Ipi(icr) => self.send_ipi(me, icr),
            Effect::Eoi(vector) => {
                if let Some(vector) = vector {
                    lock(&self.chip.ioapic).eoi(vector, &mut |m: Message| self.deliver(m));
                }
                if self.port(me).lapic.pending().is_some() {
                    self.recheck(me);
                }
            }
        }
    }

    /// vCPU `me` itself looks again; it is awake.
    fn recheck(&self, me: u32) {
        self.port(me).attention.fetch_or(attention::INTERRUPT, Ordering::SeqCst);
    }

    /// Raises IRQ 0 if the PIT's time has come by `now` (host TSC). vCPU 0 calls this.
    pub fn poll_pit(&self, now: u64) {
        if self.chip.deadline() <= now {
            self.bring_up(lock(&self.chip.pit), clock::monotonic_nanos());
        }
    }

    /// Brings IRQ 0 up to `now` (nanoseconds) and sets the PIT's deadline.
    fn bring_up(&self, mut pit: MutexGuard<'_, Pit>, now: i64) {
        let irq = pit.poll(now);
        self.set_pit_deadline(&pit, now);
        // The lines are set under the PIT's lock, so that levels arrive in their order.
        if irq.edge {
            self.set_irq(0, false);
            self.set_irq(0, true);
        }
        self.set_irq(0, irq.level);
    }

    fn set_pit_deadline(&self, pit: &Pit, now: i64) {
        let deadline = pit.next_deadline(now).map_or(NEVER, |at| {
            let ahead = at.saturating_sub(now).max(0) as u64;
            clock::host_tsc().saturating_add(clock::nanos_to_ticks(ahead))
        });
        self.chip.pit_deadline.store(deadline, Ordering::Relaxed);
    }

    // Registers.

    /// The machine's interrupt controllers and PIT are not these ones but somebody else's (KVM's): from now on their
    /// registers and ports are the bus's.
    pub fn leave_chips_to_bus(&self) {
        self.chip.elsewhere.store(true, Ordering::Relaxed);
    }

    fn chips_are_elsewhere(&self) -> bool {
        self.chip.elsewhere.load(Ordering::Relaxed)
    }

    /// A load by vCPU `me` from the LAPIC's or IOAPIC's registers; false if `gpa` is none of them.
    pub fn chip_mmio_read(&self, me: u32, gpa: u64, buf: &mut [u8]) -> bool {
        if self.chips_are_elsewhere() {
            return false;
        }
        if let Some(offset) = gpa.checked_sub(IOAPIC_BASE).filter(|o| *o < IOAPIC_SIZE) {
            lock(&self.chip.ioapic).read(offset, buf);
            return true;
        }
        let lapic = &self.port(me).lapic;
        let Some(offset) = apic_offset(lapic, gpa) else { return false };
        buf.fill(0);
        // Registers are 32 bits wide in 16 bytes; a part of one reads as that part.
        let bytes = lapic.read(offset & !0xf, clock::host_tsc()).to_le_bytes();
        for (byte, at) in buf.iter_mut().zip(offset & 0xf..4) {
            *byte = bytes[at as usize];
        }
        true
    }

    /// A store by vCPU `me` to the LAPIC's or IOAPIC's registers; false if `gpa` is none of them.
    pub fn chip_mmio_write(&self, me: u32, gpa: u64, buf: &[u8]) -> bool {
        if self.chips_are_elsewhere() {
            return false;
        }
        if let Some(offset) = gpa.checked_sub(IOAPIC_BASE).filter(|o| *o < IOAPIC_SIZE) {
            let mut ioapic = lock(&self.chip.ioapic);
            ioapic.write(offset, buf, &mut |m: Message| self.deliver(m));
            return true;
        }
        let lapic = &self.port(me).lapic;
        let Some(offset) = apic_offset(lapic, gpa) else { return false };
        // Other than aligned 32-bit stores are undefined (SDM volume 3, 12.4.1); narrower ones do nothing.
        if offset & 0xf == 0
            && let Some(&[a, b, c, d]) = buf.get(..4)
        {
            let value = u32::from_le_bytes([a, b, c, d]);
            let effect = lapic.write(offset, value, clock::host_tsc());
            self.apic_effect(me, effect);
        }
        true
    }

    /// `IN` from the PIC's or PIT's ports; false if `port` is none of them.
    pub fn chip_pio_read(&self, port: u16, buf: &mut [u8]) -> bool {
        if self.chips_are_elsewhere() || !claims(port) {
            return false;
        }
        // A wider access is several of a byte, as on the ISA bus.
        for (i, byte) in buf.iter_mut().enumerate() {
            let port = port.wrapping_add(i as u16);
            *byte = if PicPair::claims(port) {
                let mut pics = lock(&self.chip.pics);
                let value = pics.read(port);
                self.pic_changed(pics);
                value
            } else if Pit::claims(port) {
                lock(&self.chip.pit).read(port, clock::monotonic_nanos())
            } else {
                0xff
            };
        }
        true
    }

    /// `OUT` to the PIC's or PIT's ports; false if `port` is none of them.
    pub fn chip_pio_write(&self, port: u16, buf: &[u8]) -> bool {
        if self.chips_are_elsewhere() || !claims(port) {
            return false;
        }
        for (i, &byte) in buf.iter().enumerate() {
            let port = port.wrapping_add(i as u16);
            if PicPair::claims(port) {
                let mut pics = lock(&self.chip.pics);
                pics.write(port, byte);
                self.pic_changed(pics);
            } else if Pit::claims(port) {
                self.write_pit(port, byte);
            }
        }
        true
    }

    fn write_pit(&self, port: u16, value: u8) {
        let now = clock::monotonic_nanos();
        let mut pit = lock(&self.chip.pit);
        pit.write(port, value, now);
        if matches!(port, 0x40 | 0x43) {
            self.bring_up(pit, now);
            // vCPU 0 keeps the time; it may sleep until another deadline.
            self.ports()[0].notify(attention::INTERRUPT);
        }
    }

    // State.

    /// The state of PIC pair, IOAPIC and PIT. vCPUs must not be running.
    pub fn chip_state(&self) -> ChipState {
        let (pit, speaker) = lock(&self.chip.pit).state();
        ChipState {
            pics: lock(&self.chip.pics).pics,
            ioapic: lock(&self.chip.ioapic).state(),
            pit,
            speaker,
        }
    }

    /// Puts saved state in place. vCPUs must not be running.
    pub fn set_chip_state(&self, state: &ChipState) {
        lock(&self.chip.ioapic).set_state(&state.ioapic);
        let mut pics = lock(&self.chip.pics);
        pics.set_state(state.pics);
        self.pic_changed(pics);
        let now = clock::monotonic_nanos();
        let mut pit = lock(&self.chip.pit);
        pit.set_state(state.pit, state.speaker, now);
        // The line's level is part of the PIC's and IOAPIC's state: only the deadline is new.
        self.set_pit_deadline(&pit, now);
        self.ports()[0].notify(attention::INTERRUPT);
    }

    /// PIC pair, IOAPIC and PIT as after power-up. vCPUs must not be running.
    pub fn reset_chip(&self) {
        *lock(&self.chip.pics) = PicPair::default();
        *lock(&self.chip.pit) = Pit::default();
        *lock(&self.chip.ioapic) = Ioapic::default();
        self.chip.intr.store(false, Ordering::SeqCst);
        self.chip.pit_deadline.store(NEVER, Ordering::Relaxed);
    }
}

fn claims(port: u16) -> bool {
    PicPair::claims(port) || Pit::claims(port)
}

fn apic_offset(lapic: &lapic::Lapic, gpa: u64) -> Option<u32> {
    let offset = gpa.checked_sub(lapic.window()?)?;
    (offset < 0x1000).then_some(offset as u32)
}

#[cfg(test)]
mod tests;
