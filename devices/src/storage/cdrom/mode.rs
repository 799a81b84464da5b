//! The drive's mode pages (MMC-5, section 7).

use super::super::command::Cdb;
use super::super::lock;
use super::super::sense::Sense;
use super::super::unit::{ModeSelect, ModeSense, Values, check_page};
use super::CdRom;
use super::commands::Outcome;

/// Kilobytes a second of a drive at 40 times the speed of a music CD.
const SPEED: u16 = 7056;
/// Kilobytes of the drive's buffer.
const BUFFER: u16 = 512;
/// Medium types of the header: a data disc, no disc, an open tray.
const DATA_DISC: u8 = 0x01;
const NO_DISC: u8 = 0x70;
const OPEN: u8 = 0x71;

impl CdRom {
    pub(super) fn mode_sense(&self, cdb: &Cdb) -> Outcome {
        let request = ModeSense::parse(cdb)?;
        let (medium_type, locked) = {
            let tray = lock(&self.tray);
            let medium_type = match tray.ready() {
                Ok(_) => DATA_DISC,
                Err(_) if tray.state.open => OPEN,
                Err(_) => NO_DISC,
            };
            (medium_type, tray.locked())
        };
        let mut pages = mode_pages(locked && request.values == Values::Current);
        if request.values == Values::Changeable {
            pages.iter_mut().for_each(|page| page[2..].fill(0));
        }
        request.answer(medium_type, 0, &[], &pages)
    }

    /// Nothing can be changed: what is set must be what is.
    pub(super) fn check_pages(&self, list: &ModeSelect) -> Result<(), Sense> {
        let current = mode_pages(lock(&self.tray).locked());
        for (offset, page) in &list.pages {
            let known = current.iter().find(|known| known[0] == page[0] & 0x7f);
            let known = known.ok_or(Sense::invalid_parameter(*offset))?;
            check_page(page, known, &vec![0; known.len()])
                .map_err(|at| Sense::invalid_parameter(offset.saturating_add(at)))?;
        }
        Ok(())
    }
}

fn mode_pages(locked: bool) -> Vec<Vec<u8>> {
    // Error recovery: 5 retries.
    let recovery = vec![0x01, 6, 0, 5, 0, 0, 0, 0];
    // Audio control: there is no audio output.
    let mut audio = vec![0; 16];
    audio[..3].copy_from_slice(&[0x0e, 14, 0x04]);
    // Power conditions, and timeouts: none.
    let mut power = vec![0; 12];
    power[..2].copy_from_slice(&[0x1a, 10]);
    let mut timeout = vec![0; 10];
    timeout[..2].copy_from_slice(&[0x1d, 8]);
    vec![recovery, audio, power, timeout, capabilities(locked)]
}

/// The capabilities and mechanical status page (MMC-3, section 6.3.11; what everybody still reads).
fn capabilities(locked: bool) -> Vec<u8> {
    const READS: u8 = 0x3b; // CD-R, CD-RW, DVD-ROM, DVD-R, DVD-RAM
    const FORMS: u8 = 0x70; // mode 2 forms 1 and 2, several sessions
    const LOCKS: u8 = 0x01;
    const LOCKED: u8 = 0x02;
    const EJECTS: u8 = 0x08;
    const TRAY: u8 = 0x20;
    let mut page = vec![0; 22];
    page[..2].copy_from_slice(&[0x2a, 20]);
    page[2] = READS;
    page[4] = FORMS;
    page[6] = LOCKS | EJECTS | TRAY | if locked { LOCKED } else { 0 };
    page[8..10].copy_from_slice(&SPEED.to_be_bytes());
    page[12..14].copy_from_slice(&BUFFER.to_be_bytes());
    page[14..16].copy_from_slice(&SPEED.to_be_bytes());
    page
}
