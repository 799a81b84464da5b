//! What disks and CD-ROM drives do, whatever they are connected to.
//!
//! ```text
//!   virtio-scsi ---------------+-- CDB --> Unit (ScsiDisk, CdRom) --> Action: a Reply, or a Job
//!   AHCI port, ATAPI drive ----+                                                      |
//!   AHCI port, ATA disk ---------- Job ------------------------------------------------+
//!                                                                                     v
//!                                      the transport's I/O thread: Lane --> lodge_disk::DiskQueue
//! ```
//!
//! A unit decides what a command means; it never waits. What has to wait for the disk is a [`Job`], which
//! the transport's thread runs on its [`Lane`]. Units are shared by threads; their own state (mode
//! pages, the drive's door, unit attentions) is small and behind a lock.

pub mod cdrom;
mod command;
mod disk;
mod job;
mod lane;
pub mod sense;
#[cfg(test)]
mod testing;
mod unit;

pub use cdrom::{CdRom, CdRomConfig, CdRomState, DoorEvent, Locked, Watcher};
pub use command::{Action, Cdb, Command, Medium, Reply};
pub use disk::{ScsiDisk, ScsiDiskConfig, ScsiDiskState};
pub use job::{Fault, Job};
pub use lane::{Ended, Lane};
pub use sense::Sense;
pub use unit::{DeviceType, Unit, UnitState, finished, naa, report_luns};

/// Operation codes (SPC-4, SBC-3, MMC-5).
#[allow(missing_docs)] // The names are the standards' own.
pub mod opcode {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REZERO_UNIT: u8 = 0x01;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const SEEK_6: u8 = 0x0b;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const RESERVE_6: u8 = 0x16;
    pub const RELEASE_6: u8 = 0x17;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const SEND_DIAGNOSTIC: u8 = 0x1d;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const SEEK_10: u8 = 0x2b;
    pub const WRITE_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const READ_SUB_CHANNEL: u8 = 0x42;
    pub const UNMAP: u8 = 0x42;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const READ_TRACK_INFORMATION: u8 = 0x52;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const RESERVE_10: u8 = 0x56;
    pub const RELEASE_10: u8 = 0x57;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const WRITE_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const READ_DISC_STRUCTURE: u8 = 0xad;
    pub const WRITE_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
    pub const READ_CD_MSF: u8 = 0xb9;
    pub const SET_CD_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
