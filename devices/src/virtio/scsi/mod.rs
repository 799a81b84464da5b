//! SCSI host controller (VIRTIO 1.2, section 5.6): disks and CD-ROM drives as targets.
//!
//! ```text
//!   queue 0 control --+                  TMFs: a message to each request queue's thread
//!   queue 1 events  --+-- Worker<Control>      |
//!   queue 2 requests ---- Worker<Requests> <---+  --> Unit --> Lane --> DiskQueue
//!   queue 3 requests ---- Worker<Requests> <---+  --> ...
//!                              ^
//!   ScsiHandle: plug, unplug --+-- Targets (shared): (target, LUN) --> Unit
//! ```
//!
//! Data goes between disks and guest RAM directly. A command that has begun cannot be taken back from the disk:
//! a task management function waits for those that it aborts, so that their memory is the guest's again
//! when it has ended.

mod control;
mod events;
mod queue;
mod request;
mod targets;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

pub use self::events::EventState;
pub use self::targets::{ScsiHandle, ScsiUnit, Taken, TargetState};

use self::control::Control;
use self::queue::Requests;
use self::targets::Shared;
use super::worker::Worker;
use super::{DeviceState, Error, QueueResources, QueueState, VirtioDevice, read_structure};

const DEVICE_TYPE: u16 = 8;
/// Queues before the request queues.
const CONTROL: u16 = 0;
const EVENT: u16 = 1;
const FIRST_REQUEST: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request, as the driver is told: what is left of a ring beside request and response.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors of a request, in units of 512 bytes.
const SECTORS: u32 = 0xffff;
/// Bytes of an event.
const EVENT_BYTES: u32 = 16;
/// Offsets of the fields that the driver may write, and their first and largest values.
const SENSE_SIZE: u64 = 20;
const CDB_SIZE: u64 = 24;
const DEFAULT_SENSE: u32 = 96;
const DEFAULT_CDB: u32 = 32;
const MOST_SENSE: u32 = 4096;
const MOST_CDB: u32 = 260;

/// Feature bits (section 5.6.3).
mod feature {
    pub const HOTPLUG: u64 = 1 << 1;
    pub const CHANGE: u64 = 1 << 2;
}

/// What is saved of a controller and its units.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScsiState {
    /// The driver's size of sense data.
    pub sense_size: u32,
    /// The driver's size of a CDB.
    pub cdb_size: u32,
    /// The units.
    pub targets: Vec<TargetState>,
    /// Events that wait for the driver.
    pub events: EventState,
}

impl Default for ScsiState {
    fn default() -> Self {
        Self {
            sense_size: DEFAULT_SENSE,
            cdb_size: DEFAULT_CDB,
            targets: Vec::new(),
            events: EventState::default(),
        }
    }
}

/// The device.
pub struct Scsi {
    shared: Arc<Shared>,
    control: Worker<Control>,
    requests: Vec<Worker<Requests>>,
}

impl Scsi {
    /// A controller without units, with `queues` (1..=64) request queues, best one for each vCPU. Threads are
    /// called `name` and the queue's number.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(name: &str, queues: u16) -> Result<Self, Error> {
        let queues = usize::from(queues.clamp(1, 64));
        let shared = Shared::new(queues).map_err(Error::host("create an eventfd"))?;
        let control = Worker::new(format!("{name}.ctl"), Control::new(shared.clone()));
        let requests = (0..queues)
            .map(|index| {
                Worker::new(format!("{name}.{index}"), Requests::new(shared.clone(), index))
            })
            .collect();
        Ok(Self { shared, control, requests })
    }

    /// The host's side, which plugs and unplugs units.
    pub fn handle(&self) -> ScsiHandle {
        ScsiHandle::new(self.shared.clone())
    }

    /// The configuration structure (section 5.6.4).
    fn config(&self) -> [u8; 36] {
        let mut config = [0; 36];
        let words = [
            self.requests.len() as u32,
            SEGMENTS,
            SECTORS,
            u32::from(QUEUE_SIZE) / 2, // commands of a unit at a time
            EVENT_BYTES,
            self.shared.sense_size.load(Ordering::Relaxed),
            self.shared.cdb_size.load(Ordering::Relaxed),
            255 << 16, // channel 0; targets 0 to 255
            targets::MOST_LUN.into(),
        ];
        for (to, word) in config.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    fn set_sizes(&self, sense: u32, cdb: u32) {
        self.shared.sense_size.store(sense, Ordering::Relaxed);
        self.shared.cdb_size.store(cdb, Ordering::Relaxed);
    }
}

impl VirtioDevice for Scsi {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        0x01_00_00
    }
    fn features(&self) -> u64 {
        feature::HOTPLUG | feature::CHANGE
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.requests.len() + usize::from(FIRST_REQUEST)]
    }
    fn set_features(&mut self, features: u64) {
        self.shared.features.store(features, Ordering::Relaxed);
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let &[a, b, c, d] = data else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            SENSE_SIZE if value <= MOST_SENSE => {
                self.shared.sense_size.store(value, Ordering::Relaxed);
            }
            CDB_SIZE if (1..=MOST_CDB).contains(&value) => {
                self.shared.cdb_size.store(value, Ordering::Relaxed);
            }
            _ => {}
        }
    }
    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        match index {
            CONTROL | EVENT => self.control.start(index.into(), &resources, state),
            _ => match self.requests.get_mut(usize::from(index - FIRST_REQUEST)) {
                Some(worker) => worker.start(0, &resources, state),
                None => Err(Error::Queue { index, reason: "there is no such queue" }),
            },
        }
    }
    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        match index {
            CONTROL | EVENT => self.control.stop(index.into()),
            _ => self.requests.get_mut(usize::from(index - FIRST_REQUEST))?.stop(0),
        }
    }
    fn reset(&mut self) {
        self.shared.features.store(0, Ordering::Relaxed);
        self.set_sizes(DEFAULT_SENSE, DEFAULT_CDB);
        self.shared.events.clear();
        self.shared.units().iter().for_each(|unit| unit.power_on());
    }
    fn state(&self) -> DeviceState {
        DeviceState::Scsi(ScsiState {
            sense_size: self.shared.sense_size.load(Ordering::Relaxed),
            cdb_size: self.shared.cdb_size.load(Ordering::Relaxed),
            targets: self.shared.state(),
            events: self.shared.events.state(),
        })
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Scsi(state) = state else {
            return Err(Error::State("it is not one of a SCSI controller"));
        };
        if state.sense_size > MOST_SENSE || !(1..=MOST_CDB).contains(&state.cdb_size) {
            return Err(Error::State("its sizes of commands and sense data are not possible"));
        }
        self.shared.restore(&state.targets).map_err(Error::State)?;
        self.set_sizes(state.sense_size, state.cdb_size);
        self.shared.events.restore(&state.events);
        Ok(())
    }
}
