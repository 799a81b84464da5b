//! A disk as a SCSI logical unit: the block commands of SBC-3.
//!
//! ```text
//!   READ, WRITE, VERIFY, WRITE SAME, UNMAP, ...   --> transfer.rs, ranges.rs --> Job
//!   INQUIRY, READ CAPACITY, MODE SENSE/SELECT     --> identity.rs, mode.rs   --> Reply
//! ```

mod identity;
mod mode;
mod ranges;
mod transfer;

use std::sync::{Arc, Mutex};

use lodge_disk::Disk;
use serde::{Deserialize, Serialize};

use super::command::{Action, Command, Medium};
use super::job::Job;
use super::sense::Sense;
use super::unit::{Attentions, DeviceType, Identity, Unit, UnitState, inquiry, request_sense};
use super::{lock, opcode as op};

/// Service action READ CAPACITY(16).
const READ_CAPACITY_16: u8 = 0x10;

/// What the guest is told of a disk beyond what the disk itself says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScsiDiskConfig {
    /// The serial number: up to 36 characters, or empty.
    pub serial: String,
    /// Logical blocks of 4096 bytes instead of the disk's own 512. Firmware and old systems cannot boot from it.
    pub block_4k: bool,
}

/// What is saved of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScsiDiskState {
    /// The write cache is on (WCE).
    pub writeback: bool,
    /// Sense data has the descriptor format (D_SENSE).
    pub descriptor_sense: bool,
    /// Unit attentions that wait.
    pub attentions: Attentions,
}

impl Default for ScsiDiskState {
    /// As after power-on.
    fn default() -> Self {
        Self { writeback: true, descriptor_sense: false, attentions: Attentions::default() }
    }
}

/// The unit.
pub struct ScsiDisk {
    medium: Medium,
    serial: String,
    /// Bytes of a logical block.
    block: u32,
    /// Logical blocks.
    blocks: u64,
    state: Mutex<ScsiDiskState>,
}

/// Result of a command before it is known how it ends.
type Outcome = Result<Action, Sense>;

impl ScsiDisk {
    /// A unit in front of `disk`.
    pub fn new(disk: Arc<dyn Disk>, config: &ScsiDiskConfig) -> Arc<Self> {
        let block = if config.block_4k { 4096 } else { disk.block_size().clamp(512, 4096) };
        let blocks = disk.size() / u64::from(block);
        let serial = config.serial.clone();
        Arc::new(Self { medium: Medium::new(disk), serial, block, blocks, state: Mutex::default() })
    }

    fn identity(&self) -> Identity<'_> {
        Identity {
            device_type: DeviceType::Block,
            removable: false,
            product: "HARDDISK",
            serial: &self.serial,
            standard: 0x04c0, // SBC-3
        }
    }

    fn discards(&self) -> bool {
        !self.read_only() && self.medium.disk().capabilities().discard
    }

    fn read_only(&self) -> bool {
        self.medium.disk().read_only()
    }

    fn writable(&self) -> Result<(), Sense> {
        if self.read_only() { Err(Sense::WRITE_PROTECTED) } else { Ok(()) }
    }

    fn work(&self, job: Job) -> Outcome {
        Ok(Action::Work(self.medium.clone(), job))
    }

    /// `job`, and a flush after it if there is no write cache or the command wants to pass it.
    fn durable(&self, job: Job, force: bool) -> Outcome {
        let through = force || !lock(&self.state).writeback;
        self.work(if through { job.then(Job::flush()) } else { job })
    }

    fn run(&self, command: &Command<'_>) -> Outcome {
        let cdb = &command.cdb;
        match cdb.opcode() {
            op::TEST_UNIT_READY | op::REZERO_UNIT | op::SEEK_6 | op::SEEK_10 => Ok(Action::good()),
            op::SEND_DIAGNOSTIC | op::PREVENT_ALLOW => Ok(Action::good()),
            // There is one initiator: a reservation changes nothing for it.
            op::RESERVE_6 | op::RESERVE_10 | op::RELEASE_6 | op::RELEASE_10 => Ok(Action::good()),
            op::REQUEST_SENSE => {
                let attentions = &mut lock(&self.state).attentions;
                Ok(request_sense(command, attentions, Sense::NONE))
            }
            op::INQUIRY => inquiry(command, &self.identity(), &self.pages()),
            op::START_STOP_UNIT => self.start_stop(cdb.u8(4)),
            op::READ_CAPACITY_10 => Ok(self.capacity_10()),
            op::SERVICE_ACTION_IN_16 if cdb.u8(1) & 0x1f == READ_CAPACITY_16 => {
                Ok(Action::data(self.capacity_16(), cdb.u32(10) as usize))
            }
            op::SERVICE_ACTION_IN_16 => Err(Sense::invalid_field(1)),
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => self.mode_sense(cdb),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => self.mode_select(command),
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => self.read(command),
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => self.write(command),
            op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16 => {
                self.write_verify(command)
            }
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => self.verify(command),
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => self.synchronize(cdb),
            op::UNMAP if self.discards() => self.unmap(command),
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => self.write_same(command),
            _ => Err(Sense::INVALID_OPCODE),
        }
    }

    /// A stop writes the cache back first; the disk does not really stop.
    fn start_stop(&self, flags: u8) -> Outcome {
        let (power_condition, start) = (flags >> 4, flags & 1 != 0);
        if power_condition != 0 || start || self.read_only() {
            return Ok(Action::good());
        }
        self.work(Job::flush())
    }
}

impl Unit for ScsiDisk {
    fn execute(&self, command: &Command<'_>) -> Action {
        let attention = lock(&self.state).attentions.take_for(command.cdb.opcode());
        let outcome = match attention {
            Some(sense) => Err(sense),
            None => self.run(command),
        };
        outcome.unwrap_or_else(|sense| Action::Done(super::Reply::check(sense)))
    }

    fn medium(&self) -> Option<u64> {
        Some(self.medium.id())
    }

    fn descriptor_sense(&self) -> bool {
        lock(&self.state).descriptor_sense
    }

    fn reset(&self) {
        self.power_on();
        self.attention(Sense::DEVICE_RESET);
    }

    fn power_on(&self) {
        *lock(&self.state) = ScsiDiskState::default();
    }

    fn attention(&self, sense: Sense) {
        lock(&self.state).attentions.push(sense);
    }

    fn state(&self) -> UnitState {
        UnitState::Disk(lock(&self.state).clone())
    }

    fn restore(&self, state: &UnitState) -> bool {
        let UnitState::Disk(state) = state else { return false };
        *lock(&self.state) = state.clone();
        true
    }
}

#[cfg(test)]
mod tests;
