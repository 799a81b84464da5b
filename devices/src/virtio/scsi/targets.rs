//! The units of a controller, shared by its threads and the machine, which plugs and unplugs them.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, RwLock, Weak};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::events::{Event, Events, Happened};
use super::{DEFAULT_CDB, DEFAULT_SENSE, feature};
use crate::storage::{CdRom, DoorEvent, ScsiDisk, Sense, Unit, UnitState, Watcher};

/// The largest LUN.
pub(super) const MOST_LUN: u16 = 0x3fff;

/// Where a unit is: target and LUN.
pub(super) type Address = (u8, u16);

/// What can be plugged in.
#[derive(Clone)]
pub enum ScsiUnit {
    /// A disk.
    Disk(Arc<ScsiDisk>),
    /// A CD-ROM drive.
    CdRom(Arc<CdRom>),
}

/// The place is taken or does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unit {lun} of SCSI target {target} is taken or beyond 16383; choose another")]
pub struct Taken {
    /// Target.
    pub target: u8,
    /// Logical unit.
    pub lun: u16,
}

/// What is saved of one unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetState {
    /// Target.
    pub target: u8,
    /// Logical unit.
    pub lun: u16,
    /// The unit's own part.
    pub state: UnitState,
}

/// What a request queue's thread is asked to do.
pub(super) enum Message {
    /// Something with the commands of `matches` that it has.
    Tasks { matches: Match, action: TaskAction, answer: Sender<()> },
    /// Lets go of media that are in no unit any more.
    Tidy(Sender<()>),
}

/// Which commands are meant.
#[derive(Debug, Clone, Copy)]
pub(super) struct Match {
    pub target: u8,
    /// One unit, or all of the target.
    pub lun: Option<u16>,
    /// One command, or all of the unit.
    pub id: Option<u64>,
}

/// What happens to them.
#[derive(Debug, Clone, Copy)]
pub(super) enum TaskAction {
    /// The answer says whether there is one.
    Query,
    /// The answer's sender is dropped when all of them have ended, with this response.
    End(u8),
    /// The same, but they end as they do.
    Wait,
}

/// The way to a request queue's thread.
pub(super) struct Mailbox {
    pub wake: EventFd,
    /// There while the queue runs.
    pub inbox: Mutex<Option<Sender<Message>>>,
}

impl Mailbox {
    /// Sends a message, unless the queue is stopped and has no commands.
    fn send(&self, message: Message) {
        let inbox = self.inbox.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(inbox) = &*inbox {
            let _ = inbox.send(message); // Fails only when the thread has panicked.
            let _ = self.wake.write(1); // Fails when full: then the thread is on its way.
        }
    }
}

/// What all threads of a controller share.
pub(super) struct Shared {
    units: RwLock<BTreeMap<Address, Plugged>>,
    pub mailboxes: Vec<Mailbox>,
    pub events: Events,
    pub features: AtomicU64,
    pub sense_size: AtomicU32,
    pub cdb_size: AtomicU32,
}

struct Plugged {
    unit: Arc<dyn Unit>,
    /// Keeps the drive's watcher alive.
    _watcher: Option<Arc<dyn Watcher>>,
}

/// Who a command is for.
pub(super) enum Found {
    Unit(Arc<dyn Unit>),
    /// The target has other units.
    NoUnit,
    NoTarget,
}

impl Shared {
    pub(super) fn new(queues: usize) -> io::Result<Arc<Self>> {
        let mailbox =
            |_| Ok(Mailbox { wake: EventFd::new(EFD_NONBLOCK)?, inbox: Mutex::new(None) });
        Ok(Arc::new(Self {
            units: RwLock::default(),
            mailboxes: (0..queues).map(mailbox).collect::<io::Result<_>>()?,
            events: Events::new()?,
            features: AtomicU64::new(0),
            sense_size: AtomicU32::new(DEFAULT_SENSE),
            cdb_size: AtomicU32::new(DEFAULT_CDB),
        }))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<Address, Plugged>> {
        self.units.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<Address, Plugged>> {
        self.units.write().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn find(&self, (target, lun): Address) -> Found {
        let units = self.read();
        if let Some(plugged) = units.get(&(target, lun)) {
            return Found::Unit(plugged.unit.clone());
        }
        match units.range((target, 0)..=(target, MOST_LUN)).next() {
            Some(_) => Found::NoUnit,
            None => Found::NoTarget,
        }
    }

    /// The LUNs of a target.
    pub(super) fn luns(&self, target: u8) -> Vec<u16> {
        let units = self.read();
        units.range((target, 0)..=(target, MOST_LUN)).map(|((_, lun), _)| *lun).collect()
    }

    pub(super) fn units(&self) -> Vec<Arc<dyn Unit>> {
        self.read().values().map(|plugged| plugged.unit.clone()).collect()
    }

    /// The units of a target.
    pub(super) fn units_of(&self, target: u8) -> Vec<Arc<dyn Unit>> {
        let units = self.read();
        let of_target = units.range((target, 0)..=(target, MOST_LUN));
        of_target.map(|(_, plugged)| plugged.unit.clone()).collect()
    }

    /// The media that are in units.
    pub(super) fn media(&self) -> Vec<u64> {
        self.read().values().filter_map(|plugged| plugged.unit.medium()).collect()
    }

    /// Tells the driver, if it wants to know such things.
    fn tell(&self, (target, lun): Address, happened: Happened) {
        let needed = match happened {
            Happened::Changed(..) => feature::CHANGE,
            _ => feature::HOTPLUG,
        };
        if self.features.load(Ordering::Relaxed) & needed != 0 {
            self.events.push(Event { target, lun, happened });
        }
    }

    /// Asks all request queues about commands; says whether one of them answered (to a query) and returns when
    /// all that are meant have ended (for the others).
    pub(super) fn tasks(&self, matches: Match, action: TaskAction) -> bool {
        let (answer, wait) = channel();
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tasks { matches, action, answer: answer.clone() });
        }
        drop(answer);
        // Ends when the last sender is dropped.
        wait.iter().count() > 0
    }

    /// Makes the request queues let go of media that are gone; returns when they have, if `wait` is set.
    fn tidy(&self, wait: bool) {
        let (answer, done) = channel();
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tidy(answer.clone()));
        }
        drop(answer);
        if wait {
            done.iter().for_each(drop);
        }
    }

    pub(super) fn state(&self) -> Vec<TargetState> {
        let units = self.read();
        units
            .iter()
            .map(|((target, lun), plugged)| TargetState {
                target: *target,
                lun: *lun,
                state: plugged.unit.state(),
            })
            .collect()
    }

    pub(super) fn restore(&self, saved: &[TargetState]) -> Result<(), &'static str> {
        for TargetState { target, lun, state } in saved {
            let Found::Unit(unit) = self.find((*target, *lun)) else {
                return Err("it had a SCSI unit that is not here");
            };
            if !unit.restore(state) {
                return Err("one of its SCSI units is of another kind");
            }
        }
        Ok(())
    }
}

/// Tells a controller of what happens to a drive's medium.
struct Door {
    shared: Weak<Shared>,
    at: Address,
}

impl Watcher for Door {
    fn door(&self, event: DoorEvent) {
        let (DoorEvent::Changed, Some(shared)) = (event, self.shared.upgrade()) else { return };
        let changed = Sense::MEDIUM_CHANGED;
        shared.tell(self.at, Happened::Changed(changed.asc, changed.ascq));
        shared.tidy(false);
    }
}

/// The host's side of a controller. Clones are the same controller.
#[derive(Clone)]
pub struct ScsiHandle(Arc<Shared>);

impl ScsiHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Plugs a unit in, also while the guest runs.
    ///
    /// # Errors
    /// [`Taken`].
    pub fn plug(&self, target: u8, lun: u16, unit: ScsiUnit) -> Result<(), Taken> {
        let at = (target, lun);
        let (unit, watcher): (Arc<dyn Unit>, _) = match unit {
            ScsiUnit::Disk(disk) => (disk, None),
            ScsiUnit::CdRom(drive) => {
                let watcher: Arc<dyn Watcher> =
                    Arc::new(Door { shared: Arc::downgrade(&self.0), at });
                drive.watch(Arc::downgrade(&watcher));
                (drive, Some(watcher))
            }
        };
        {
            let mut units = self.0.write();
            if lun > MOST_LUN || units.contains_key(&at) {
                return Err(Taken { target, lun });
            }
            units.insert(at, Plugged { unit, _watcher: watcher });
        }
        self.luns_changed(at);
        self.0.tell(at, Happened::Plugged);
        Ok(())
    }

    /// Takes a unit out, also while the guest runs. Returns when its commands have ended and no thread
    /// has its image open any more; `false` if there was none.
    pub fn unplug(&self, target: u8, lun: u16) -> bool {
        let at = (target, lun);
        let Some(plugged) = self.0.write().remove(&at) else { return false };
        self.luns_changed(at);
        self.0.tell(at, Happened::Unplugged);
        self.0.tasks(Match { target, lun: Some(lun), id: None }, TaskAction::Wait);
        drop(plugged);
        self.0.tidy(true);
        true
    }

    /// The units that are there: target and LUN.
    pub fn list(&self) -> Vec<(u8, u16)> {
        self.0.read().keys().copied().collect()
    }

    /// The target's other units say that there are others than before.
    fn luns_changed(&self, (target, lun): Address) {
        for (_, plugged) in
            self.0.read().range((target, 0)..=(target, MOST_LUN)).filter(|(at, _)| at.1 != lun)
        {
            plugged.unit.attention(Sense::LUNS_CHANGED);
        }
    }
}
