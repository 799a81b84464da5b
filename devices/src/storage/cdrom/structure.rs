//! READ DISC INFORMATION, READ TRACK INFORMATION and READ DISC STRUCTURE (MMC-5, sections 6.22, 6.27, 6.28).

use super::super::command::{Action, Cdb};
use super::super::sense::{Sense, key};
use super::CdRom;
use super::commands::Outcome;

/// The medium is of another kind.
const WRONG_MEDIUM: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x30, 0x02);
/// Where data begins on a DVD.
const FIRST_SECTOR: u32 = 0x3_0000;
/// Bytes of a large structure.
const STRUCTURE: usize = 2048;

impl CdRom {
    pub(super) fn read_disc_information(&self, cdb: &Cdb) -> Outcome {
        const COMPLETE: u8 = 0x0e; // disc and last session
        const UNRESTRICTED: u8 = 0x20;
        self.disc()?;
        if cdb.u8(1) & 7 != 0 {
            return Err(Sense::invalid_field(1));
        }
        let mut data = vec![0; 34];
        data[..8].copy_from_slice(&[0, 32, COMPLETE, 1, 1, 1, 1, UNRESTRICTED]);
        // No more sessions can begin or end anywhere.
        data[16..24].fill(0xff);
        Ok(Action::data(data, cdb.u16(7).into()))
    }

    pub(super) fn read_track_information(&self, cdb: &Cdb) -> Outcome {
        const BY_BLOCK: u8 = 0;
        const BY_TRACK: u8 = 1;
        const BY_SESSION: u8 = 2;
        let disc = self.disc()?;
        let wanted = cdb.u32(2);
        match cdb.u8(1) & 3 {
            BY_BLOCK if wanted < disc.blocks => {}
            BY_BLOCK => return Err(Sense::OUT_OF_RANGE.at(wanted.into())),
            BY_TRACK | BY_SESSION if wanted == 1 => {}
            _ => return Err(Sense::invalid_field(2)),
        }
        let mut data = vec![0; 36];
        data[..7].copy_from_slice(&[0, 34, 1, 1, 0, 0x04, 0x01]);
        data[24..28].copy_from_slice(&disc.blocks.to_be_bytes());
        data[28..32].copy_from_slice(&disc.blocks.saturating_sub(1).to_be_bytes());
        Ok(Action::data(data, cdb.u16(7).into()))
    }

    pub(super) fn read_disc_structure(&self, cdb: &Cdb) -> Outcome {
        const LAYER: usize = 6;
        const FORMAT: usize = 7;
        let disc = self.disc()?;
        if !disc.is_dvd() || cdb.u8(1) & 0xf != 0 {
            return Err(WRONG_MEDIUM);
        }
        let body = match cdb.u8(FORMAT) {
            0x00 if cdb.u8(LAYER) != 0 => return Err(Sense::invalid_field(LAYER as u16)),
            0x00 => physical(disc.blocks),
            0x01 => vec![0; 4], // no copy protection, no regions
            0x04 => vec![0; STRUCTURE],
            0xff => structures(),
            _ => return Err(Sense::invalid_field(FORMAT as u16)),
        };
        let mut data = (body.len() as u16 + 2).to_be_bytes().to_vec();
        data.extend_from_slice(&[0, 0]);
        data.extend_from_slice(&body);
        Ok(Action::data(data, cdb.u16(8).into()))
    }
}

/// The physical format: DVD-ROM, 120 mm, one layer.
fn physical(blocks: u32) -> Vec<u8> {
    let mut body = vec![0; STRUCTURE];
    body[..4].copy_from_slice(&[0x01, 0x0f, 0x01, 0]);
    body[4..8].copy_from_slice(&FIRST_SECTOR.to_be_bytes());
    let last = FIRST_SECTOR.saturating_add(blocks).saturating_sub(1).min(0xff_ffff);
    body[8..12].copy_from_slice(&last.to_be_bytes());
    body
}

/// Which structures there are: format, that it can be read, and its length.
fn structures() -> Vec<u8> {
    let lengths = [(0x00u8, STRUCTURE), (0x01, 4), (0x04, STRUCTURE)];
    let entry = |(format, len): (u8, usize)| {
        let [high, low] = (len as u16 + 4).to_be_bytes();
        [format, 0x40, high, low]
    };
    lengths.map(entry).concat()
}
