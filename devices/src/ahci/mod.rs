//! AHCI 1.3.1 controller with 6 ports, as the ICH9 has it at 00:1f.2: SATA disks and ATAPI CD-ROM drives, for systems
//! without virtio drivers.
//!
//! ```text
//!   BAR 5 (ABAR, 4 KiB) --+-- Hba: CAP, GHC, IS --> INTx or MSI
//!   BAR 4 (index, data) --+-- Port 0..5: registers behind a lock
//!                               | kick                       ^ ended
//!                               v                            |
//!                             I/O thread of the port: Slot (command list in guest RAM) --> AtaDisk, CdRom --> Lane
//! ```
//!
//! A vCPU only changes registers; commands are done by the port's thread. Not offered: command completion
//! coalescing, port multipliers, asynchronous notification, enclosure management, staggered spin-up, link power
//! management.

mod ata;
mod atapi;
mod fis;
mod hba;
mod port;
mod slot;
mod text;
mod worker;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use lodge_accel::Vm;
use lodge_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::ata::{AtaDisk, AtaDiskConfig, AtaState};
pub use self::fis::TaskFile;
pub use self::hba::{HbaState, PORTS};
pub use self::port::PortState;
pub use self::worker::Drive;

use self::hba::{HR, Hba, reg};
use self::port::Port;
use self::worker::Thread;
use crate::bus::BusDevice;
use crate::pci::{
    Bar, BarKind, Bdf, Endpoint, EndpointBuilder, EndpointState, Function, Identity, Msi,
};
use crate::storage::{CdRomState, DoorEvent, Unit, UnitState, Watcher};

/// Where the ICH9 has it.
pub const PLACE: Bdf = Bdf { bus: 0, device: 31, function: 2 };
/// BARs: index and data, and the registers.
const BAR_INDEX: usize = 4;
const BAR_REGISTERS: usize = 5;
/// Offsets in the first of them.
const INDEX: u64 = 0x10;
const DATA: u64 = 0x14;
/// Bytes of the registers.
const ABAR_BYTES: u64 = 4096;
/// Serial ATA capability (Serial ATA 3.1... AHCI 1.3.1, section 2.4): revision 1.0, index at offset 10H of BAR 4.
const CAP_SATA: u8 = 0x12;
const SATA_BODY: [u8; 6] = [0x10, 0, 0x48, 0, 0, 0];
/// ICH9's address map register: AHCI mode; and port control and status: which ports are on.
const MAP: usize = 0x90;
const MAP_AHCI: u8 = 0x40;
const PCS: usize = 0x92;

/// Why a controller could not do what the machine asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port is in use, or does not exist.
    #[error("SATA port {0} is taken or does not exist; choose another (0 to 5)")]
    Port(usize),
    /// The host refused a step.
    #[error("cannot {step} for a SATA port")]
    Host {
        /// What was being done.
        step: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// What was saved does not fit.
    #[error("saved SATA state does not fit the controller: {0}")]
    State(&'static str),
    /// The PCI part of what was saved does not fit.
    #[error(transparent)]
    Pci(#[from] crate::pci::Error),
}

/// What is saved of a controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AhciState {
    /// Configuration space, with MSI.
    pub pci: EndpointState,
    /// The controller's own registers.
    pub hba: HbaState,
    /// The index register of BAR 4.
    pub index: u32,
    /// The ports.
    pub ports: Vec<PortState>,
    /// The CD-ROM drives' own states, by port.
    pub drives: Vec<(usize, CdRomState)>,
}

/// What answers in both BARs.
struct Core {
    hba: Arc<Hba>,
    ports: Vec<Arc<Port>>,
    index: Mutex<u32>,
}

/// BAR 4.
struct IndexBar(Arc<Core>);

/// A port's drive and thread.
struct Plugged {
    drive: Drive,
    /// Dropped first when the drive is taken out.
    _thread: Thread,
    _watcher: Option<Arc<dyn Watcher>>,
}

/// The controller.
pub struct Ahci {
    endpoint: Endpoint,
    core: Arc<Core>,
    name: String,
    drives: Mutex<[Option<Plugged>; PORTS]>,
}

impl Ahci {
    /// A controller without drives; its place is [`PLACE`]. Threads are called `name` and the port's number.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(name: &str, memory: Arc<GuestMemory>, vm: Arc<dyn Vm>) -> Result<Arc<Self>, Error> {
        let mut builder = EndpointBuilder::new(&Identity {
            vendor: 0x8086,
            device: 0x2922,
            class: 0x01_06_01,
            revision: 2,
            subsystem: (0x1af4, 0x1100),
            multifunction: true,
        });
        let intx = builder.interrupt_pin(1);
        let msi = Msi::new(vm, 1);
        let hba = Arc::new(Hba::new(intx, msi.clone()));
        let port = |index| {
            let kick = EventFd::new(EFD_NONBLOCK)
                .map_err(|source| Error::Host { step: "create an eventfd", source })?;
            Ok(Port::new(index, kick, hba.clone(), memory.clone()))
        };
        let ports = (0..PORTS).map(port).collect::<Result<_, Error>>()?;
        let core = Arc::new(Core { hba, ports, index: Mutex::new(0) });
        let index: Arc<dyn BusDevice> = Arc::new(IndexBar(core.clone()));
        builder.bar(BAR_INDEX, Bar { kind: BarKind::Io, bytes: 32, handler: index });
        let handler: Arc<dyn BusDevice> = core.clone();
        builder.bar(BAR_REGISTERS, Bar { kind: BarKind::Memory32, bytes: ABAR_BYTES, handler });
        builder.msi(&msi);
        builder.capability(CAP_SATA, &SATA_BODY, &[]);
        builder.config().set_u8(MAP, MAP_AHCI);
        builder.config().set_writable(PCS, &[(1 << PORTS) - 1]);
        let (endpoint, name) = (builder.build(), name.to_owned());
        Ok(Arc::new(Self { endpoint, core, name, drives: Mutex::default() }))
    }

    fn drives(&self) -> MutexGuard<'_, [Option<Plugged>; PORTS]> {
        self.drives.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Connects a drive to `port`, also while the guest runs.
    ///
    /// # Errors
    /// When the port is taken or does not exist, or the host lacks something.
    pub fn plug(&self, port: usize, drive: Drive) -> Result<(), Error> {
        let mut drives = self.drives();
        let (Some(place), Some(at)) = (drives.get_mut(port), self.core.ports.get(port)) else {
            return Err(Error::Port(port));
        };
        if place.is_some() {
            return Err(Error::Port(port));
        }
        let thread = Thread::start(format!("{}.{port}", self.name), at, drive.clone())
            .map_err(|source| Error::Host { step: "start an I/O thread", source })?;
        let watcher = match &drive {
            Drive::Disk(_) => None,
            Drive::CdRom(drive) => {
                drive.set_atapi();
                let watcher: Arc<dyn Watcher> = Arc::new(Door(at.clone()));
                drive.watch(Arc::downgrade(&watcher));
                Some(watcher)
            }
        };
        at.plug(drive.kind());
        *place = Some(Plugged { drive, _thread: thread, _watcher: watcher });
        Ok(())
    }

    /// Takes the drive of `port` out, also while the guest runs. Returns when its image is closed; `false` if there
    /// was none.
    pub fn unplug(&self, port: usize) -> bool {
        let Some(plugged) = self.drives().get_mut(port).and_then(Option::take) else {
            return false;
        };
        self.core.ports[port].unplug();
        drop(plugged);
        true
    }

    /// Takes no new commands, when the machine pauses; returns when those under way have ended.
    pub fn pause(&self) {
        self.core.ports.iter().for_each(|port| port.pause());
    }

    /// Goes on.
    pub fn resume(&self) {
        self.core.ports.iter().for_each(|port| port.resume());
    }

    /// What is saved. The controller must be paused.
    ///
    /// # Errors
    /// When it is not.
    pub fn state(&self) -> Result<AhciState, Error> {
        let ports: Option<_> = self.core.ports.iter().map(|port| port.state()).collect();
        let drives = self.drives();
        let drives = drives.iter().enumerate().filter_map(|(port, plugged)| {
            match plugged.as_ref()?.drive.unit()?.state() {
                UnitState::CdRom(state) => Some((port, state)),
                UnitState::Disk(_) => None,
            }
        });
        Ok(AhciState {
            pci: self.endpoint.state(),
            hba: self.core.hba.state(),
            index: *self.core.index(),
            ports: ports.ok_or(Error::State("the controller is not paused"))?,
            drives: drives.collect(),
        })
    }

    /// Takes back what was saved, into a controller in its slot with the same drives. It is paused afterwards.
    ///
    /// # Errors
    /// When it had other drives.
    pub fn restore(&self, state: &AhciState) -> Result<(), Error> {
        if state.ports.len() != PORTS {
            return Err(Error::State("its number of ports is another"));
        }
        let drives = self.drives();
        for (port, saved) in drives.iter().zip(&state.ports) {
            if !fits(port.as_ref().map(|plugged| &plugged.drive), saved) {
                return Err(Error::State("it had other drives"));
            }
        }
        for (port, saved) in &state.drives {
            let unit = drives.get(*port).and_then(Option::as_ref).and_then(|p| p.drive.unit());
            if !unit.is_some_and(|unit| unit.restore(&UnitState::CdRom(saved.clone()))) {
                return Err(Error::State("it had other drives"));
            }
        }
        self.core.hba.reset();
        self.endpoint.restore(&state.pci)?;
        for (port, saved) in self.core.ports.iter().zip(&state.ports) {
            port.restore(saved);
        }
        self.core.hba.restore(state.hba);
        *self.core.index() = state.index;
        Ok(())
    }
}

/// Whether a port's registers can be those of a port with this drive.
fn fits(drive: Option<&Drive>, saved: &PortState) -> bool {
    const UP: u32 = 3;
    match drive {
        // A signature is there while the link is up.
        Some(drive) => saved.ssts & 0xf != UP || saved.sig == drive.kind().sig(),
        None => saved.ssts & 0xf != UP,
    }
}

impl Drive {
    fn unit(&self) -> Option<&dyn Unit> {
        match self {
            Self::Disk(_) => None,
            Self::CdRom(drive) => Some(&**drive),
        }
    }
}

/// Makes a port's thread look when a drive's medium has changed.
struct Door(Arc<Port>);

impl Watcher for Door {
    fn door(&self, _event: DoorEvent) {
        self.0.wake();
    }
}

impl Core {
    fn index(&self) -> MutexGuard<'_, u32> {
        self.index.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The port whose registers are at `offset`, and the offset in them.
    fn port(&self, offset: u64) -> Option<(&Port, u64)> {
        let at = offset.checked_sub(reg::PORTS)?;
        let port = self.ports.get(usize::try_from(at / reg::PORT_BYTES).ok()?)?;
        Some((port, at % reg::PORT_BYTES))
    }

    /// A register, at a multiple of 4.
    fn get(&self, offset: u64) -> u32 {
        if let Some((port, offset)) = self.port(offset) {
            return port.read(offset);
        }
        let value = self.hba.read(offset);
        // A reset lasts until nothing of before it is under way.
        let resets = offset == reg::GHC && self.ports.iter().any(|port| port.is_draining());
        if resets { value | HR } else { value }
    }

    fn set(&self, offset: u64, value: u32) {
        if let Some((port, offset)) = self.port(offset) {
            return port.write(offset, value);
        }
        if offset == reg::GHC && value & HR != 0 {
            return self.reset();
        }
        self.hba.write(offset, value);
    }

    fn reset(&self) {
        self.ports.iter().for_each(|port| port.reset());
        self.hba.reset();
        // Ports with drives have something to tell, but nothing is enabled.
        self.ports.iter().for_each(|port| port.wake());
    }
}

/// Registers that are cleared or set by ones: a byte of them says nothing of the others.
fn by_ones(offset: u64) -> bool {
    use self::port::reg as port;
    if offset < reg::PORTS {
        return offset == reg::IS;
    }
    matches!(offset % reg::PORT_BYTES, port::IS | port::SERR | port::SACT | port::CI)
}

impl BusDevice for Core {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut register = (u64::MAX, [0; 4]);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            let base = at & !3;
            if register.0 != base {
                register = (base, self.get(base).to_le_bytes());
            }
            *byte = register.1[(at & 3) as usize];
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut left = data;
        while !left.is_empty() {
            let (base, skip) = (at & !3, (at & 3) as usize);
            let part = &left[..left.len().min(4 - skip)];
            let whole = part.len() == 4 || by_ones(base);
            let mut value = if whole { [0; 4] } else { self.get(base).to_le_bytes() };
            value[skip..skip + part.len()].copy_from_slice(part);
            self.set(base, u32::from_le_bytes(value));
            at = at.saturating_add(part.len() as u64);
            left = &left[part.len()..];
        }
    }
}

impl BusDevice for IndexBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset & !3 {
            INDEX => *self.0.index(),
            DATA => self.0.get(u64::from(*self.0.index())),
            _ => return,
        };
        let bytes = value.to_le_bytes();
        for (to, from) in data.iter_mut().zip(&bytes[(offset & 3) as usize..]) {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Whole registers only, as everybody does.
        let &[a, b, c, d] = data else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            INDEX => *self.0.index() = value & (ABAR_BYTES as u32 - 4),
            DATA => {
                let index = *self.0.index();
                self.0.set(index.into(), value);
            }
            _ => {}
        }
    }
}

impl Function for Ahci {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn reset(&self) {
        self.core.reset();
        self.core.ports.iter().for_each(|port| port.wait_drained());
        *self.core.index() = 0;
        for plugged in self.drives().iter().flatten() {
            if let Some(unit) = plugged.drive.unit() {
                unit.power_on();
            }
        }
        self.endpoint.reset();
    }

    fn removed(&self) {
        (0..PORTS).for_each(|port| {
            self.unplug(port);
        });
    }
}
