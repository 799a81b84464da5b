//! What is on the disc: one session with one data track (MMC-5, sections 6.25 to 6.29).

use super::super::command::{Action, Cdb};
use super::super::sense::Sense;
use super::CdRom;
use super::commands::Outcome;
use super::sector::msf;

/// ADR 1 (position), control 4 (data track).
const DATA_TRACK: u8 = 0x14;
const LEAD_OUT: u8 = 0xaa;

/// A block address as four bytes, as a number or as a time.
fn address(lba: u32, time: bool) -> [u8; 4] {
    if time {
        let [minute, second, frame] = msf(lba);
        return [0, minute, second, frame];
    }
    lba.to_be_bytes()
}

impl CdRom {
    pub(super) fn read_toc(&self, cdb: &Cdb) -> Outcome {
        let disc = self.disc()?;
        let time = cdb.u8(1) & 2 != 0;
        // Older drivers have the format in the last byte.
        let format = match cdb.u8(2) & 0xf {
            0 => cdb.u8(9) >> 6,
            format => format,
        };
        let mut data = vec![0, 0, 1, 1];
        match format {
            0 => {
                let from = cdb.u8(6);
                if from > 1 && from != LEAD_OUT {
                    return Err(Sense::invalid_field(6));
                }
                if from <= 1 {
                    data.extend_from_slice(&[0, DATA_TRACK, 1, 0]);
                    data.extend_from_slice(&address(0, time));
                }
                data.extend_from_slice(&[0, DATA_TRACK, LEAD_OUT, 0]);
                data.extend_from_slice(&address(disc.blocks, time));
            }
            1 => {
                data.extend_from_slice(&[0, DATA_TRACK, 1, 0]);
                data.extend_from_slice(&address(0, time));
            }
            2 => {
                let entry =
                    |point, at: [u8; 3]| [1, DATA_TRACK, 0, point, 0, 0, 0, 0, at[0], at[1], at[2]];
                data.extend_from_slice(&entry(0xa0, [1, 0, 0])); // first track
                data.extend_from_slice(&entry(0xa1, [1, 0, 0])); // last track
                data.extend_from_slice(&entry(0xa2, msf(disc.blocks)));
                data.extend_from_slice(&entry(1, msf(0)));
            }
            _ => return Err(Sense::invalid_field(2)),
        }
        let len = data.len() as u16 - 2;
        data[..2].copy_from_slice(&len.to_be_bytes());
        Ok(Action::data(data, cdb.u16(7).into()))
    }

    pub(super) fn read_sub_channel(&self, cdb: &Cdb) -> Outcome {
        const NO_AUDIO: u8 = 0x15;
        self.disc()?;
        let time = cdb.u8(1) & 2 != 0;
        let mut data = vec![0, NO_AUDIO, 0, 0];
        if cdb.u8(2) & 0x40 != 0 {
            match cdb.u8(3) {
                1 => {
                    data.extend_from_slice(&[1, DATA_TRACK, 1, 1]);
                    data.extend_from_slice(&address(0, time));
                    data.extend_from_slice(&address(0, false));
                }
                // Catalogue number and ISRC: there is none.
                format @ (2 | 3) => {
                    let track = if format == 3 { [3, DATA_TRACK, 1] } else { [2, 0, 0] };
                    data.extend_from_slice(&track);
                    data.extend_from_slice(&[0; 17]);
                }
                _ => return Err(Sense::invalid_field(3)),
            }
        }
        let len = data.len() as u16 - 4;
        data[2..4].copy_from_slice(&len.to_be_bytes());
        Ok(Action::data(data, cdb.u16(7).into()))
    }
}
