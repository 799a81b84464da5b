//! A CD and DVD drive: a raw ISO image in a tray (MMC-5).
//!
//! ```text
//!            insert                      START STOP UNIT (eject)
//!   empty  ----------> closed, medium ----------------------------> open, medium
//!     ^                   |      ^------------------------------------  |
//!     |  eject            |        START STOP UNIT (load)               |  eject
//!     +-------------------+---------------------------------------------+
//! ```
//!
//! The guest may lock the tray; then [`CdRom::eject`] only asks it to let go, unless it is forced. The guest
//! hears of what happens by unit attentions and media events; the machine by [`Watcher`]s. A reset of
//! the machine leaves the tray as it is, so that an installer that ejects its disc boots from the disk.

mod commands;
mod features;
mod length;
mod mode;
pub mod sector;
mod structure;
mod toc;

pub use length::data_length;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use lodge_disk::Disk;
use serde::{Deserialize, Serialize};

use super::command::{Action, Command, Medium};
use super::lock;
use super::sense::Sense;
use super::unit::{Attentions, Unit, UnitState};

/// Bytes of a block.
const BLOCK: u64 = 2048;
/// Blocks of an 80 minute CD; what is larger is a DVD.
const CD_BLOCKS: u32 = 80 * 60 * 75;
/// Media events that wait for the guest at most.
const EVENTS: usize = 4;

/// What a drive is besides its medium.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CdRomConfig {
    /// The serial number: up to 20 characters, or empty.
    pub serial: String,
}

/// The guest has locked the tray.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest has locked its CD-ROM drive; it was asked to let go: try again, or force it")]
pub struct Locked;

/// What happened to the tray.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorEvent {
    /// The guest opened it; the medium lies in it.
    OpenedByGuest,
    /// The guest closed it.
    ClosedByGuest,
    /// There is another medium, or none.
    Changed,
}

/// Who wants to know what happens to the tray. Called from I/O threads or from whoever changed the medium, with no
/// lock of the drive held.
pub trait Watcher: Send + Sync {
    /// It happened.
    fn door(&self, event: DoorEvent);
}

/// Media events (MMC-5, table 299).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MediaEvent {
    /// Somebody wants the medium out.
    EjectRequest = 1,
    /// There is a medium.
    NewMedia = 2,
    /// There is no medium any more.
    Removal = 3,
}

/// What is saved of a drive. Which medium is in it is the machine's affair.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CdRomState {
    /// The tray is open.
    pub open: bool,
    /// The guest prevents removal.
    pub locked: bool,
    /// It prevents removal persistently, as those who use events do.
    pub locked_persistently: bool,
    /// Media events that wait for the guest.
    pub events: VecDeque<MediaEvent>,
    /// Unit attentions that wait.
    pub attentions: Attentions,
}

struct Tray {
    medium: Option<Medium>,
    state: CdRomState,
}

/// The drive. It is shared by the transport that the guest sees and by the machine, which changes its medium.
pub struct CdRom {
    serial: String,
    /// Connected by ATAPI, not SCSI.
    atapi: AtomicBool,
    tray: Mutex<Tray>,
    watchers: Mutex<Vec<Weak<dyn Watcher>>>,
}

impl Tray {
    fn locked(&self) -> bool {
        self.state.locked || self.state.locked_persistently
    }

    /// The medium, when the tray is closed.
    fn ready(&self) -> Result<&Medium, Sense> {
        match &self.medium {
            Some(medium) if !self.state.open => Ok(medium),
            _ if self.state.open => Err(Sense::NO_MEDIUM_TRAY_OPEN),
            _ => Err(Sense::NO_MEDIUM),
        }
    }

    fn event(&mut self, event: MediaEvent) {
        let events = &mut self.state.events;
        // What comes and goes cancels what the guest has not heard of.
        if event != MediaEvent::EjectRequest {
            events.clear();
        }
        if events.len() < EVENTS && !events.contains(&event) {
            events.push_back(event);
        }
    }

    /// The guest sees a medium that it has not seen before.
    fn appeared(&mut self) {
        self.event(MediaEvent::NewMedia);
        self.state.attentions.push(Sense::MEDIUM_CHANGED);
    }
}

/// Blocks of a medium. The last one may be a part: the rest of it reads as zeroes.
fn blocks(medium: &Medium) -> u32 {
    u32::try_from(medium.disk().size().div_ceil(BLOCK)).unwrap_or(u32::MAX)
}

impl CdRom {
    /// A drive, closed, with a medium or empty. Media are images that hold blocks of 2048 bytes (ISO 9660, UDF).
    pub fn new(config: &CdRomConfig, medium: Option<Arc<dyn Disk>>) -> Arc<Self> {
        let tray = Tray { medium: medium.map(Medium::new), state: CdRomState::default() };
        Arc::new(Self {
            serial: config.serial.clone(),
            atapi: AtomicBool::new(false),
            tray: Mutex::new(tray),
            watchers: Mutex::default(),
        })
    }

    /// The drive is connected by ATAPI: the guest is told so.
    pub fn set_atapi(&self) {
        self.atapi.store(true, Ordering::Relaxed);
    }

    /// The serial number.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    fn is_atapi(&self) -> bool {
        self.atapi.load(Ordering::Relaxed)
    }

    /// Adds somebody who wants to know; gone ones are forgotten.
    pub fn watch(&self, watcher: Weak<dyn Watcher>) {
        let mut watchers = lock(&self.watchers);
        watchers.retain(|other| other.strong_count() > 0);
        watchers.push(watcher);
    }

    fn tell(&self, event: DoorEvent) {
        let watchers: Vec<_> = lock(&self.watchers).iter().filter_map(Weak::upgrade).collect();
        for watcher in watchers {
            watcher.door(event);
        }
    }

    /// Takes the medium out and leaves the tray open; an empty drive only opens. Requests under way
    /// still end on it. A locked drive keeps it unless `force` is set; the guest is asked to unlock.
    ///
    /// # Errors
    /// [`Locked`].
    pub fn eject(&self, force: bool) -> Result<(), Locked> {
        {
            let mut tray = lock(&self.tray);
            if tray.locked() && !force {
                tray.event(MediaEvent::EjectRequest);
                return Err(Locked);
            }
            let was_there = tray.ready().is_ok();
            tray.medium = None;
            tray.state.open = true;
            tray.state.locked = false;
            tray.state.locked_persistently = false;
            if was_there {
                tray.event(MediaEvent::Removal);
            }
        }
        self.tell(DoorEvent::Changed);
        Ok(())
    }

    /// Puts a medium in, in place of one that may be there, and closes the tray.
    ///
    /// # Errors
    /// [`Locked`] if the guest keeps the medium that is there; [`CdRom::eject`] with force first.
    pub fn insert(&self, medium: Arc<dyn Disk>) -> Result<(), Locked> {
        {
            let mut tray = lock(&self.tray);
            if tray.locked() && tray.ready().is_ok() {
                tray.event(MediaEvent::EjectRequest);
                return Err(Locked);
            }
            tray.medium = Some(Medium::new(medium));
            tray.state.open = false;
            tray.appeared();
        }
        self.tell(DoorEvent::Changed);
        Ok(())
    }

    /// Whether there is a medium, also in an open tray.
    pub fn has_medium(&self) -> bool {
        lock(&self.tray).medium.is_some()
    }

    /// Whether the tray is open.
    pub fn is_open(&self) -> bool {
        lock(&self.tray).state.open
    }

    /// Whether the guest has locked the tray.
    pub fn is_locked(&self) -> bool {
        lock(&self.tray).locked()
    }

    /// START STOP UNIT with LOEJ: the guest opens or closes the tray.
    fn move_tray(&self, open: bool) -> Result<(), Sense> {
        {
            let mut tray = lock(&self.tray);
            if tray.state.open == open {
                return Ok(());
            }
            if open && tray.locked() {
                return Err(Sense::REMOVAL_PREVENTED);
            }
            tray.state.open = open;
            match (open, tray.medium.is_some()) {
                (true, true) => tray.event(MediaEvent::Removal),
                (false, true) => tray.appeared(),
                _ => {}
            }
        }
        self.tell(if open { DoorEvent::OpenedByGuest } else { DoorEvent::ClosedByGuest });
        Ok(())
    }
}

impl Unit for CdRom {
    fn execute(&self, command: &Command<'_>) -> Action {
        let attention = lock(&self.tray).state.attentions.take_for(command.cdb.opcode());
        let outcome = match attention {
            Some(sense) => Err(sense),
            None => self.run(command),
        };
        outcome.unwrap_or_else(|sense| Action::Done(super::Reply::check(sense)))
    }

    fn medium(&self) -> Option<u64> {
        lock(&self.tray).medium.as_ref().map(Medium::id)
    }

    fn descriptor_sense(&self) -> bool {
        false
    }

    fn reset(&self) {
        self.power_on();
        self.attention(Sense::DEVICE_RESET);
    }

    fn power_on(&self) {
        let state = &mut lock(&self.tray).state;
        *state = CdRomState { open: state.open, ..CdRomState::default() };
    }

    fn attention(&self, sense: Sense) {
        lock(&self.tray).state.attentions.push(sense);
    }

    fn state(&self) -> UnitState {
        UnitState::CdRom(lock(&self.tray).state.clone())
    }

    fn restore(&self, state: &UnitState) -> bool {
        let UnitState::CdRom(state) = state else { return false };
        lock(&self.tray).state = state.clone();
        true
    }
}

#[cfg(test)]
mod tests;
