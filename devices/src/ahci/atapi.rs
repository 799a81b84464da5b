//! An ATAPI CD-ROM drive's own commands; the packets in them go to the drive as SCSI commands (ATA8-ACS, sections 7.17,
//! 7.22; MMC-5, annex on ATAPI).

use super::ata::AtaState;
use super::ata::features::set_transfer_mode;
use super::ata::identify::Words;
use super::fis::{HostFis, TaskFile, error, status};
use super::port::Kind;
use super::text;
use crate::storage::Sense;

/// Bytes of a PIO block at most, where the host sets no limit.
const MOST_BLOCK: u64 = 0xfffe;
/// Interrupt reason: the end of a command (C/D and I/O).
const ENDED: u16 = 3;

/// What a command comes to.
pub(super) enum Plan {
    /// Nothing but registers.
    End(TaskFile),
    /// Data of the device's own, by PIO.
    Send(Vec<u8>),
    /// A packet; by PIO blocks of this many bytes, or DMA.
    Packet { block: Option<u64> },
}

/// What a command comes to.
pub(super) fn decide(fis: &HostFis, serial: &str, state: &mut AtaState) -> Plan {
    const DMA: u8 = 1;
    const OVERLAPPED: u8 = 2;
    const TRANSFER_MODE: u8 = 0x03;
    let good = TaskFile::good(fis);
    let failed = Plan::End(TaskFile::failed(fis, error::ABORT));
    match fis.command() {
        0xa0 if fis.feature() & OVERLAPPED != 0 => failed,
        0xa0 if fis.feature() & DMA != 0 => Plan::Packet { block: None },
        0xa0 => Plan::Packet { block: Some(block(fis)) },
        0xa1 => Plan::Send(identify(serial, state)),
        // Who takes the drive for a disk sees its signature.
        0xec | 0x20 | 0x21 => {
            let tf = Kind::Atapi.signature();
            Plan::End(TaskFile { status: status::READY | status::ERR, error: error::ABORT, ..tf })
        }
        // Device reset and diagnostic.
        0x08 | 0x90 => Plan::End(Kind::Atapi.signature()),
        0xef => match fis.feature() {
            TRANSFER_MODE if set_transfer_mode(fis.count() as u8, state).is_ok() => Plan::End(good),
            // Defaults after a software reset.
            0x66 | 0xcc => Plan::End(good),
            _ => failed,
        },
        0xe5 | 0x98 => Plan::End(TaskFile { count: 0xff, ..good }),
        0xe0..=0xe3 | 0xe6 | 0x94..=0x97 | 0x99 => Plan::End(good),
        _ => failed,
    }
}

/// The byte count limit of a PIO packet (bits 8 to 23 of the address).
fn block(fis: &HostFis) -> u64 {
    match fis.lba() >> 8 & 0xfffe {
        0 => MOST_BLOCK,
        limit => limit,
    }
}

/// The registers at the end of a packet.
pub(super) fn ended(fis: &HostFis, sense: Option<Sense>) -> TaskFile {
    let tf = TaskFile { count: ENDED, ..TaskFile::good(fis) };
    match sense {
        None => tf,
        Some(sense) => {
            TaskFile { status: status::READY | status::ERR, error: sense.key << 4, ..tf }
        }
    }
}

/// IDENTIFY PACKET DEVICE.
fn identify(serial: &str, state: &AtaState) -> Vec<u8> {
    let mut words = Words::new();
    words.text(10, 10, serial);
    words.text(23, 4, text::FIRMWARE);
    words.text(27, 20, text::CD_ROM);
    words.transfer_modes(state.transfer_mode);
    let w = &mut words.0;
    // A packet device, a CD-ROM (type 5), removable, that answers in 50 us, with packets of 12 bytes.
    w[0] = 2 << 14 | 5 << 8 | 1 << 7 | 2 << 5;
    w[49] = 0x0f00; // DMA, LBA, IORDY
    w[50] = 0x4000;
    w[53] = 0x0007;
    w[64] = 0x0003; // PIO 3 and 4
    w[65..69].fill(120); // nanoseconds of a cycle
    w[76] = 0x000e; // 1.5, 3 and 6 Gb/s
    w[77] = 0x0006; // now 6 Gb/s
    w[80] = 0x01f0;
    w[82] = 1 << 4 | 1 << 3 | 1 << 9; // packets, power management, device reset
    w[83] = 1 << 14;
    w[84] = 1 << 14;
    w[85] = w[82];
    w[87] = 1 << 14;
    words.finish()
}
