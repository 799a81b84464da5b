//! A SATA disk's commands (ATA8-ACS; Serial ATA 3.1 for the queued ones).
//!
//! ```text
//!   command FIS --> AtaDisk::decide --> Plan: registers, data of ours, or bytes of the disk
//! ```
//!
//! Logical sectors have 512 bytes, whatever the image's block size is: that is what firmware boots from.

pub(super) mod features;
pub(super) mod identify;
mod logs;

use std::sync::Arc;

use lodge_disk::Disk;
use serde::{Deserialize, Serialize};

use super::fis::{HostFis, TaskFile, error};
use crate::storage::Medium;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// Sectors of a block of READ MULTIPLE, after power-on and at most.
const MULTIPLE: u8 = 16;
/// Geometry for those who count in cylinders.
const HEADS: u8 = 16;
const TRACK: u8 = 63;
/// Blocks of 512 bytes that DATA SET MANAGEMENT takes at most.
pub(super) const TRIM_BLOCKS: u16 = 8;

/// What the guest is told of a disk beyond what the disk itself says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AtaDiskConfig {
    /// The serial number: up to 20 characters, or empty.
    pub serial: String,
}

/// What is saved of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AtaState {
    /// Sectors of a block of READ MULTIPLE; 0: the command is not possible.
    pub multiple: u8,
    /// The write cache is on.
    pub writeback: bool,
    /// Reading ahead is on; it has no effect.
    pub lookahead: bool,
    /// SMART is on.
    pub smart: bool,
    /// Advanced power management's level; 0: off. It has no effect.
    pub power_level: u8,
    /// The transfer mode that the host chose; it has no effect.
    pub transfer_mode: u8,
    /// The host's heads and sectors of a track.
    pub geometry: (u8, u8),
    /// The queued command that failed, and its registers, until its log is read.
    pub queue_error: Option<(u8, TaskFile)>,
}

impl Default for AtaState {
    /// As after power-on.
    fn default() -> Self {
        Self {
            multiple: MULTIPLE,
            writeback: true,
            lookahead: true,
            smart: true,
            power_level: 0,
            transfer_mode: 0x45, // Ultra DMA 5
            geometry: (HEADS, TRACK),
            queue_error: None,
        }
    }
}

impl AtaState {
    /// A software reset: what was set stays.
    pub(super) fn soft_reset(&mut self) {
        self.queue_error = None;
    }
}

/// A disk.
#[derive(Clone)]
pub struct AtaDisk {
    medium: Medium,
    serial: String,
    sectors: u64,
}

/// Bytes of the disk, and how they are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Transfer {
    pub offset: u64,
    pub len: u64,
    /// Bytes of a PIO block; `None`: DMA.
    pub block: Option<u64>,
    /// The write must be durable when it ends.
    pub durable: bool,
    /// A queued command's tag.
    pub tag: Option<u8>,
}

/// What a command comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Plan {
    /// Nothing but registers.
    End(TaskFile),
    /// Data of the device's own; by PIO, or DMA.
    Send { data: Vec<u8>, pio: bool },
    /// Sectors to the host.
    Read(Transfer),
    /// Sectors from the host.
    Write(Transfer),
    /// Makes what was written durable.
    Flush,
    /// Ranges, which the host sends: this many bytes.
    Trim(u64),
}

/// How a command has its address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    /// 28 bits, or cylinder, head and sector.
    Short,
    /// 48 bits.
    Long,
}

impl AtaDisk {
    /// A SATA disk in front of `disk`.
    pub fn new(disk: Arc<dyn Disk>, config: &AtaDiskConfig) -> Self {
        let sectors = disk.size() / SECTOR;
        Self { medium: Medium::new(disk), serial: config.serial.clone(), sectors }
    }

    pub(super) fn medium(&self) -> &Medium {
        &self.medium
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    fn read_only(&self) -> bool {
        self.medium.disk().read_only()
    }

    fn discards(&self) -> bool {
        !self.read_only() && self.medium.disk().capabilities().discard
    }

    /// What a command comes to. It changes what is kept of the device only where the command takes effect at once.
    pub(super) fn decide(&self, fis: &HostFis, state: &mut AtaState) -> Plan {
        self.command(fis, state).unwrap_or_else(|error| Plan::End(TaskFile::failed(fis, error)))
    }

    fn command(&self, fis: &HostFis, state: &mut AtaState) -> Result<Plan, u8> {
        use Width::{Long, Short};
        let done = Ok(Plan::End(TaskFile::good(fis)));
        let sectors = state.multiple;
        let multiple = || match sectors {
            0 => Err(error::ABORT),
            sectors => Ok(Some(SECTOR * u64::from(sectors))),
        };
        let single = Some(SECTOR);
        match fis.command() {
            0x20 | 0x21 => self.read(fis, Short, single, state),
            0x24 => self.read(fis, Long, single, state),
            0xc4 => self.read(fis, Short, multiple()?, state),
            0x29 => self.read(fis, Long, multiple()?, state),
            0xc8 | 0xc9 => self.read(fis, Short, None, state),
            0x25 => self.read(fis, Long, None, state),
            0x30 | 0x31 => self.write(fis, Short, single, state),
            0x34 => self.write(fis, Long, single, state),
            0xc5 => self.write(fis, Short, multiple()?, state),
            0x39 | 0xce => self.write(fis, Long, multiple()?, state),
            0xca | 0xcb => self.write(fis, Short, None, state),
            0x35 | 0x3d => self.write(fis, Long, None, state),
            0x60 | 0x61 => self.queued(fis, state.writeback),
            0x40 | 0x41 => self.range(fis, Short, state.geometry).and(done),
            0x42 => self.range(fis, Long, state.geometry).and(done),
            0xe7 | 0xea if self.read_only() => done,
            0xe7 | 0xea => Ok(Plan::Flush),
            0x06 => self.trim(fis),
            0xec => Ok(Plan::Send { data: self.identify(state), pio: true }),
            0xef => features::set(fis, state).and(done),
            0xb0 => logs::smart(fis, state),
            0x2f | 0x47 => logs::read(fis, state),
            0xc6 => features::set_multiple(fis, state).and(done),
            0x91 => features::set_geometry(fis, state).and(done),
            0xf8 | 0x27 => Ok(Plan::End(self.last_sector(fis))),
            // Device diagnostic: the signature.
            0x90 => Ok(Plan::End(super::port::Kind::Ata.signature())),
            // Power modes: it is always active.
            0xe5 | 0x98 => Ok(Plan::End(TaskFile { count: 0xff, ..TaskFile::good(fis) })),
            // Standby writes the cache back first, sleep too.
            0xe0 | 0xe2 | 0xe6 | 0x94 | 0x96 | 0x99 if !self.read_only() => Ok(Plan::Flush),
            0xe0..=0xe3 | 0xe6 | 0x94..=0x97 | 0x99 => done,
            // Recalibrate and seek.
            0x10..=0x1f | 0x70 => done,
            _ => Err(error::ABORT),
        }
    }

    /// The sectors that a command names, if the disk has them: first one and number.
    fn range(&self, fis: &HostFis, width: Width, geometry: (u8, u8)) -> Result<(u64, u64), u8> {
        let (first, count) = match width {
            Width::Long => (fis.lba(), counted(fis.count(), 1 << 16)),
            Width::Short => (short_address(fis, geometry)?, counted(fis.count() & 0xff, 256)),
        };
        self.checked(first, count)
    }

    fn checked(&self, first: u64, count: u64) -> Result<(u64, u64), u8> {
        match first.checked_add(count) {
            Some(end) if end <= self.sectors => Ok((first, count)),
            _ => Err(error::NOT_FOUND),
        }
    }

    fn transfer(
        &self,
        fis: &HostFis,
        width: Width,
        block: Option<u64>,
        state: &AtaState,
    ) -> Result<Transfer, u8> {
        let (first, count) = self.range(fis, width, state.geometry)?;
        // WRITE MULTIPLE FUA EXT and WRITE DMA FUA EXT.
        let durable = matches!(fis.command(), 0xce | 0x3d) || !state.writeback;
        Ok(Transfer { offset: first * SECTOR, len: count * SECTOR, block, durable, tag: None })
    }

    fn read(
        &self,
        fis: &HostFis,
        width: Width,
        block: Option<u64>,
        state: &AtaState,
    ) -> Result<Plan, u8> {
        self.transfer(fis, width, block, state).map(Plan::Read)
    }

    fn write(
        &self,
        fis: &HostFis,
        width: Width,
        block: Option<u64>,
        state: &AtaState,
    ) -> Result<Plan, u8> {
        if self.read_only() {
            return Err(error::ABORT);
        }
        self.transfer(fis, width, block, state).map(Plan::Write)
    }

    /// READ and WRITE FPDMA QUEUED: the count is in the features, the tag in the count.
    fn queued(&self, fis: &HostFis, writeback: bool) -> Result<Plan, u8> {
        const WRITE: u8 = 0x61;
        const FUA: u8 = 0x80;
        let (first, count) = self.checked(fis.lba(), counted(fis.features(), 1 << 16))?;
        let transfer = Transfer {
            offset: first * SECTOR,
            len: count * SECTOR,
            block: None,
            durable: fis.device() & FUA != 0 || !writeback,
            tag: Some(tag(fis)),
        };
        match fis.command() {
            WRITE if self.read_only() => Err(error::ABORT),
            WRITE => Ok(Plan::Write(transfer)),
            _ => Ok(Plan::Read(transfer)),
        }
    }

    fn trim(&self, fis: &HostFis) -> Result<Plan, u8> {
        const TRIM: u8 = 1;
        let blocks = fis.count();
        let possible = self.discards() && fis.feature() == TRIM;
        if !possible || !(1..=TRIM_BLOCKS).contains(&blocks) {
            return Err(error::ABORT);
        }
        Ok(Plan::Trim(u64::from(blocks) * SECTOR))
    }

    /// The ranges of a trim, in bytes: entries of 48 bits of address and 16 of count. An empty one means nothing.
    pub(super) fn ranges(&self, data: &[u8]) -> Result<Vec<(u64, u64)>, u8> {
        let mut ranges = Vec::new();
        for entry in data.chunks_exact(8) {
            let entry = u64::from_le_bytes([
                entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7],
            ]);
            let (first, count) = (entry & 0xffff_ffff_ffff, entry >> 48);
            if count > 0 {
                let (first, count) = self.checked(first, count)?;
                ranges.push((first * SECTOR, count * SECTOR));
            }
        }
        Ok(ranges)
    }

    /// READ NATIVE MAX ADDRESS, and its long form.
    fn last_sector(&self, fis: &HostFis) -> TaskFile {
        const LONG: u8 = 0x27;
        let last = self.sectors.saturating_sub(1);
        let tf = TaskFile::good(fis);
        if fis.command() == LONG {
            return TaskFile { lba: last & 0xffff_ffff_ffff, ..tf };
        }
        let last = last.min(0x0fff_ffff);
        let device = 0x40 | (last >> 24) as u8;
        TaskFile { lba: last & 0xff_ffff, device, ..tf }
    }
}

/// Whether a command is one of the queued ones.
pub(super) fn is_queued(fis: &HostFis) -> bool {
    matches!(fis.command(), 0x60 | 0x61)
}

/// A queued command's tag.
pub(super) fn tag(fis: &HostFis) -> u8 {
    (fis.count() >> 3) as u8 & 31
}

/// A count of which 0 means the most.
fn counted(count: u16, most: u64) -> u64 {
    if count == 0 { most } else { count.into() }
}

/// 28 bits of address, or cylinder, head and sector.
fn short_address(fis: &HostFis, (heads, track): (u8, u8)) -> Result<u64, u8> {
    const LBA: u8 = 0x40;
    let low = fis.lba() & 0xff_ffff;
    let top = u64::from(fis.device() & 0xf);
    if fis.device() & LBA != 0 {
        return Ok(top << 24 | low);
    }
    let (sector, cylinder) = (low & 0xff, low >> 8);
    if sector == 0 || sector > u64::from(track) || top >= u64::from(heads) {
        return Err(error::NOT_FOUND);
    }
    Ok((cylinder * u64::from(heads) + top) * u64::from(track) + sector - 1)
}

#[cfg(test)]
mod tests;
