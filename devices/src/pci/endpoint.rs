//! What every function of ours has: configuration space, BARs that follow what the guest writes,
//! an expansion ROM, MSI-X and an interrupt pin.
//!
//! ```text
//!   config write --> ConfigSpace --> BARs changed? decode changed? --> SystemBus (remove, insert)
//!                                --> MSI-X control, INTx disable    --> Msix, Intx
//! ```

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};

use super::config::{command, reg, status};
use super::intx::{Intx, intx_gsi};
use super::msi::Msi;
use super::msix::{CONTROL_WRITABLE, Msix, MsixState};
use super::root::Room;
use super::{Bdf, ConfigSpace, ConfigState, Error, Identity};
use crate::bus::{AddressSpace, BusDevice, SystemBus};
use crate::irq::Lines;

/// Number of BARs of a type 0 header.
const BARS: usize = 6;
/// The expansion ROM register's enable bit.
const ROM_ENABLE: u32 = 1;
const CAP_MSI: u8 = 0x05;
const CAP_MSIX: u8 = 0x11;
const CAP_EXPRESS: u8 = 0x10;

/// What kind of range a BAR asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB, not prefetchable.
    Memory32,
    /// Memory below 4 GiB, prefetchable.
    Memory32Prefetchable,
    /// Memory anywhere, prefetchable; takes two BAR registers.
    Memory64,
}

/// A base address register.
pub struct Bar {
    /// What it asks for.
    pub kind: BarKind,
    /// Bytes: a power of two, at least 16 (memory) or 4 (ports).
    pub bytes: u64,
    /// Who answers there.
    pub handler: Arc<dyn BusDevice>,
}

impl Bar {
    /// The read-only low bits of the register.
    fn flags(&self) -> u32 {
        match self.kind {
            BarKind::Io => 0b01,
            BarKind::Memory32 => 0,
            BarKind::Memory32Prefetchable => 0b1000,
            BarKind::Memory64 => 0b1100,
        }
    }

    fn space<'a>(&self, bus: &'a SystemBus) -> &'a AddressSpace {
        if self.kind == BarKind::Io { &bus.pio } else { &bus.mmio }
    }

    /// One past the last address such a BAR can decode.
    fn limit(&self) -> u64 {
        match self.kind {
            BarKind::Io => 1 << 16,
            BarKind::Memory32 | BarKind::Memory32Prefetchable => 1 << 32,
            BarKind::Memory64 => 1 << 52,
        }
    }
}

/// What says where a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// BAR with this number.
    Bar(usize),
    /// The expansion ROM base address register.
    Rom,
    /// Nothing: it is always there (the legacy addresses of VGA, say).
    Fixed(u64),
}

impl Place {
    /// The base address register, if there is one.
    fn register(self) -> Option<usize> {
        match self {
            Place::Bar(index) => Some(reg::BAR0 + 4 * index),
            Place::Rom => Some(reg::ROM),
            Place::Fixed(_) => None,
        }
    }
}

/// A range of the function's: a BAR's, the ROM's, or one at a fixed address.
struct Range {
    place: Place,
    bar: Bar,
    /// Where it answers now.
    mapped: Option<u64>,
    /// What it was given by [`Endpoint::attach`].
    assigned: Option<u64>,
}

/// What a write to configuration space changed beyond the bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// At least one BAR answers elsewhere, begins to answer, or ends.
    pub bars: bool,
}

/// What is saved of an [`Endpoint`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointState {
    /// Configuration space: also the BARs and MSI-X control.
    pub config: ConfigState,
    /// The MSI-X table.
    pub msix: MsixState,
}

/// Puts an [`Endpoint`] together.
pub struct EndpointBuilder {
    config: ConfigSpace,
    ranges: Vec<Range>,
    msi: Option<(Arc<Msi>, usize)>,
    msix: Option<(Arc<Msix>, usize)>,
    intx: Arc<Intx>,
    pin: u8,
}

impl EndpointBuilder {
    /// A function with no BARs, no capabilities and no interrupt.
    pub fn new(identity: &Identity) -> Self {
        Self {
            config: ConfigSpace::new(identity),
            ranges: Vec::new(),
            msi: None,
            msix: None,
            intx: Arc::default(),
            pin: 0,
        }
    }

    /// Appends a capability; see [`ConfigSpace::add_capability`].
    ///
    /// # Panics
    /// If the 192 bytes for capabilities are full: the set is fixed in each device's code.
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        self.config.add_capability(id, body, writable).expect("a device's capabilities fit")
    }

    /// Appends the PCI Express capability of an integrated endpoint (PCI Express 3.0, 7.8: version 2,
    /// no link registers).
    pub fn express(&mut self) {
        const INTEGRATED_ENDPOINT: u8 = 9 << 4;
        let mut body = [0; 0x3a];
        body[0] = 2 | INTEGRATED_ENDPOINT;
        body[3] = 0x80; // device capabilities, bit 15: role-based error reporting
        let mut writable = [0; 0x3a];
        // Device control: error reporting, relaxed ordering, payload and read request sizes.
        writable[6..8].copy_from_slice(&0x78ffu16.to_le_bytes());
        self.capability(CAP_EXPRESS, &body, &writable);
    }

    /// Gives the function MSI; returns the capability's offset.
    pub fn msi(&mut self, msi: &Arc<Msi>) -> usize {
        let (body, writable) = msi.body();
        let at = self.capability(CAP_MSI, &body, &writable);
        self.msi = Some((msi.clone(), at));
        at
    }

    /// Gives the function MSI-X, with its table and pending bits at these offsets into BAR `bar`.
    /// The handler of that BAR passes accesses on to `msix`.
    pub fn msix(&mut self, msix: &Arc<Msix>, bar: u8, table: u32, pending: u32) {
        let size = msix.vectors().saturating_sub(1) & 0x7ff;
        let mut body = [0; 10];
        body[..2].copy_from_slice(&size.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let at = self.capability(CAP_MSIX, &body, &CONTROL_WRITABLE.to_le_bytes());
        self.msix = Some((msix.clone(), at));
    }

    /// Gives the function BAR `index`.
    ///
    /// # Panics
    /// If there is no such BAR, it is taken, or the size is not a possible one: all are fixed in each
    /// device's code.
    pub fn bar(&mut self, index: usize, bar: Bar) {
        let (least, most) = if bar.kind == BarKind::Io { (4, 256) } else { (16, 1 << 40) };
        assert!(bar.bytes.is_power_of_two() && (least..=most).contains(&bar.bytes), "BAR size");
        let taken = |index| {
            let is = |range: &Range| match range.place {
                Place::Bar(first) => {
                    first == index || first + 1 == index && range.bar.kind == BarKind::Memory64
                }
                _ => false,
            };
            index >= BARS || self.ranges.iter().any(is)
        };
        assert!(!taken(index), "BAR {index} exists and is free");
        let at = reg::BAR0 + 4 * index;
        self.config.set_u32(at, bar.flags());
        let mask = !(bar.bytes - 1);
        self.config.set_writable(at, &(mask as u32).to_le_bytes());
        if bar.kind == BarKind::Memory64 {
            assert!(!taken(index + 1), "a 64-bit BAR takes two");
            self.config.set_writable(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.push(Place::Bar(index), bar);
    }

    /// Gives the function an expansion ROM with these bytes, for firmware to find and run. Its range is the next
    /// power of two, from 2 KiB on (PCI Local Bus 3.0, 6.2.5.2); bytes beyond `rom` read as FFH.
    ///
    /// # Panics
    /// If the ROM has more than 16 MiB, the most that its register can say.
    pub fn rom(&mut self, rom: impl Into<Arc<[u8]>>) {
        let rom: Arc<[u8]> = rom.into();
        let bytes = (rom.len() as u64).next_power_of_two().max(2 << 10);
        assert!(bytes <= 16 << 20, "an expansion ROM has at most 16 MiB");
        let mask = !(bytes as u32 - 1) | ROM_ENABLE;
        self.config.set_writable(reg::ROM, &mask.to_le_bytes());
        let bar = Bar { kind: BarKind::Memory32, bytes, handler: Arc::new(Rom(rom)) };
        self.push(Place::Rom, bar);
    }

    /// Lets `handler` answer at `bytes` fixed ports ([`BarKind::Io`]) or addresses from `base` on, while the
    /// function decodes ports or memory: for what a PC has always had there. No base address register tells of it.
    pub fn fixed(&mut self, kind: BarKind, base: u64, bytes: u64, handler: Arc<dyn BusDevice>) {
        self.push(Place::Fixed(base), Bar { kind, bytes, handler });
    }

    fn push(&mut self, place: Place, bar: Bar) {
        self.ranges.push(Range { place, bar, mapped: None, assigned: None });
    }

    /// Gives the function an interrupt pin (1 = INTA .. 4 = INTD).
    pub fn interrupt_pin(&mut self, pin: u8) -> Arc<Intx> {
        self.pin = pin;
        self.config.set_u8(reg::INTERRUPT_PIN, pin);
        self.intx.clone()
    }

    /// The space, for registers of the function's own.
    pub fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// The finished function, not yet in a slot.
    pub fn build(self) -> Endpoint {
        let reset = self.config.clone();
        let inner = Inner { config: self.config, reset, ranges: self.ranges, bus: Weak::new() };
        let Self { msi, msix, intx, pin, .. } = self;
        Endpoint { inner: Mutex::new(inner), msi, msix, intx, pin }
    }
}

struct Inner {
    config: ConfigSpace,
    /// The space as after a reset, with the BARs that were assigned at creation.
    reset: ConfigSpace,
    ranges: Vec<Range>,
    bus: Weak<SystemBus>,
}

/// An expansion ROM: read-only, FFH beyond its end.
struct Rom(Arc<[u8]>);

impl BusDevice for Rom {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(i));
            *byte = at.and_then(|at| self.0.get(at)).copied().unwrap_or(0xff);
        }
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

impl Inner {
    /// Where the guest wants a range to answer now.
    fn wanted(&self, range: &Range) -> Option<u64> {
        let bar = &range.bar;
        let enable = if bar.kind == BarKind::Io { command::IO } else { command::MEMORY };
        if self.config.u16(reg::COMMAND) & enable == 0 {
            return None;
        }
        let at = match range.place {
            Place::Fixed(base) => return Some(base),
            Place::Rom if self.config.u32(reg::ROM) & ROM_ENABLE == 0 => return None,
            Place::Rom => reg::ROM,
            Place::Bar(index) => reg::BAR0 + 4 * index,
        };
        let mut base = u64::from(self.config.u32(at)) & !(bar.bytes - 1);
        if bar.kind == BarKind::Memory64 {
            base |= u64::from(self.config.u32(at + 4)) << 32;
        }
        // A BAR at 0 is not set up; one that ends at the limit holds the ones of a sizing write.
        (base != 0 && base.checked_add(bar.bytes)? < bar.limit()).then_some(base)
    }

    /// Makes the bus follow the registers; says whether anything moved.
    fn remap(&mut self) -> bool {
        let Some(bus) = self.bus.upgrade() else { return false };
        let wanted: Vec<Option<u64>> = self.ranges.iter().map(|range| self.wanted(range)).collect();
        let mut changed = false;
        for (range, wanted) in self.ranges.iter_mut().zip(&wanted) {
            if range.mapped != *wanted
                && let Some(base) = range.mapped.take()
            {
                range.bar.space(&bus).remove(base);
                changed = true;
            }
        }
        for (range, wanted) in self.ranges.iter_mut().zip(&wanted) {
            let Some(base) = *wanted else { continue };
            if range.mapped.is_some() {
                continue;
            }
            let handler = range.bar.handler.clone();
            match range.bar.space(&bus).insert(base, range.bar.bytes, handler) {
                Ok(()) => {
                    range.mapped = Some(base);
                    changed = true;
                }
                // The guest put it over something else; the next write to the registers tries again.
                Err(error) => tracing::debug!(%error, "a BAR is not mapped"),
            }
        }
        changed
    }

    fn unmap(&mut self) {
        if let Some(bus) = self.bus.upgrade() {
            for range in &mut self.ranges {
                if let Some(base) = range.mapped.take() {
                    range.bar.space(&bus).remove(base);
                }
            }
        }
    }
}

/// A function's configuration space with its BARs and interrupts.
pub struct Endpoint {
    inner: Mutex<Inner>,
    msi: Option<(Arc<Msi>, usize)>,
    msix: Option<(Arc<Msix>, usize)>,
    intx: Arc<Intx>,
    pin: u8,
}

impl Endpoint {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The interrupt pin.
    pub fn intx(&self) -> &Arc<Intx> {
        &self.intx
    }

    /// Reads configuration space.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let mut inner = self.lock();
        let mut status = inner.config.u16(reg::STATUS) & !status::INTERRUPT;
        if self.intx.pending() {
            status |= status::INTERRUPT;
        }
        inner.config.set_u16(reg::STATUS, status);
        inner.config.read(offset, data);
    }

    /// Writes configuration space, and makes BARs and interrupts follow.
    pub fn write(&self, offset: usize, data: &[u8]) -> Changes {
        let mut inner = self.lock();
        inner.config.write(offset, data);
        self.follow(&mut inner)
    }

    fn follow(&self, inner: &mut Inner) -> Changes {
        if let Some((msix, at)) = &self.msix {
            msix.set_control(inner.config.u16(at + 2));
        }
        if let Some((msi, at)) = &self.msi {
            msi.update(&inner.config, *at);
        }
        let disabled = inner.config.u16(reg::COMMAND) & command::INTX_DISABLE != 0;
        let messages = self.msix.as_ref().is_some_and(|(msix, _)| msix.enabled())
            || self.msi.as_ref().is_some_and(|(msi, _)| msi.enabled());
        self.intx.block(disabled || messages);
        Changes { bars: inner.remap() }
    }

    /// Where BAR `index` answers now.
    pub fn bar(&self, index: usize) -> Option<u64> {
        self.lock().ranges.iter().find(|range| range.place == Place::Bar(index))?.mapped
    }

    /// Puts the function at `at`: assigns its BARs and wires its interrupt pin.
    pub(super) fn attach(
        &self,
        at: Bdf,
        bus: &Arc<SystemBus>,
        lines: &Arc<Lines>,
        room: &mut Room,
    ) -> Result<(), Error> {
        let mut inner = self.lock();
        inner.bus = Arc::downgrade(bus);
        let Inner { config, ranges, .. } = &mut *inner;
        for range in ranges {
            let Some(register) = range.place.register() else { continue };
            let base = room.allocate(at, range.bar.kind, range.bar.bytes)?;
            range.assigned = Some(base);
            config.set_u32(register, base as u32 | range.bar.flags());
            if range.bar.kind == BarKind::Memory64 {
                config.set_u32(register + 4, (base >> 32) as u32);
            }
        }
        if self.pin != 0 {
            let gsi = intx_gsi(at.device, self.pin);
            inner.config.set_u8(reg::INTERRUPT_LINE, gsi as u8);
            self.intx.connect(lines.line(gsi));
        }
        inner.reset = inner.config.clone();
        Ok(())
    }

    /// Takes the function out of its slot.
    pub(super) fn detach(&self, room: &mut Room) {
        let mut inner = self.lock();
        inner.unmap();
        inner.bus = Weak::new();
        for range in &mut inner.ranges {
            if let Some(base) = range.assigned.take() {
                room.free(base);
            }
        }
        self.intx.connect(None);
    }

    /// As after power-on, with the BARs assigned at creation and decoding off.
    pub fn reset(&self) {
        if let Some((msix, _)) = &self.msix {
            msix.reset();
        }
        self.intx.set(false);
        let mut inner = self.lock();
        inner.config = inner.reset.clone();
        self.follow(&mut inner);
    }

    /// What is saved.
    pub fn state(&self) -> EndpointState {
        let msix = self.msix.as_ref().map(|(msix, _)| msix.state()).unwrap_or_default();
        EndpointState { config: self.lock().config.state(), msix }
    }

    /// Takes back what was saved; BARs answer where they did.
    pub fn restore(&self, state: &EndpointState) -> Result<(), Error> {
        if state.config.bytes.len() != super::config::SIZE {
            return Err(Error::State("its configuration space is not 256 bytes"));
        }
        let mut inner = self.lock();
        inner.config.restore(&state.config);
        if let Some((msix, at)) = &self.msix {
            if state.msix.vectors.len() != usize::from(msix.vectors()) {
                return Err(Error::State("its number of MSI-X vectors is another"));
            }
            msix.restore(&state.msix, inner.config.u16(at + 2));
        }
        self.follow(&mut inner);
        Ok(())
    }
}
