//! A disk's mode pages (SBC-3, section 6.5; SPC-4, section 7.5).

use super::super::command::{Action, Cdb, Command};
use super::super::lock;
use super::super::sense::Sense;
use super::super::unit::{ModeSelect, ModeSense, Values, check_page};
use super::{Outcome, ScsiDisk, ScsiDiskState};

/// Page codes.
const ERROR_RECOVERY: u8 = 0x01;
const GEOMETRY: u8 = 0x04;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const EXCEPTIONS: u8 = 0x1c;
/// Bit of byte 2 of the caching page, and of the control page.
const WCE: u8 = 0x04;
const D_SENSE: u8 = 0x04;
/// Bits of the device-specific parameter.
const WRITE_PROTECTED: u8 = 0x80;
const DPO_FUA: u8 = 0x10;

impl ScsiDisk {
    pub(super) fn mode_sense(&self, cdb: &Cdb) -> Outcome {
        let request = ModeSense::parse(cdb)?;
        let pages = match request.values {
            Values::Current => self.mode_pages(&lock(&self.state)),
            Values::Default => self.mode_pages(&ScsiDiskState::default()),
            Values::Changeable => self.changeable(),
        };
        let protected = if self.read_only() { WRITE_PROTECTED } else { 0 };
        let descriptor = self.block_descriptor(request.long_descriptors);
        request.answer(0, protected | DPO_FUA, &descriptor, &pages)
    }

    fn block_descriptor(&self, long: bool) -> Vec<u8> {
        if long {
            let mut data = self.blocks.to_be_bytes().to_vec();
            data.extend_from_slice(&[0; 4]);
            data.extend_from_slice(&self.block.to_be_bytes());
            return data;
        }
        let blocks = u32::try_from(self.blocks).unwrap_or(u32::MAX);
        [blocks.to_be_bytes(), self.block.to_be_bytes()].concat()
    }

    fn mode_pages(&self, state: &ScsiDiskState) -> Vec<Vec<u8>> {
        let mut recovery = page(ERROR_RECOVERY, 10);
        recovery[2] = 0x80; // AWRE: bad blocks are replaced when they are written
        let mut caching = page(CACHING, 18);
        caching[2] = if state.writeback { WCE } else { 0 };
        let mut control = page(CONTROL, 10);
        control[2] = if state.descriptor_sense { D_SENSE } else { 0 };
        control[3] = 0x10; // commands may be reordered without restriction
        let mut exceptions = page(EXCEPTIONS, 10);
        exceptions[2] = 0x08; // DEXCPT: nothing is reported
        vec![recovery, self.geometry(), caching, control, exceptions]
    }

    /// The rigid disk geometry page, for those who count in cylinders.
    fn geometry(&self) -> Vec<u8> {
        const HEADS: u64 = 255;
        const SECTORS: u64 = 63;
        let mut geometry = page(GEOMETRY, 22);
        let cylinders = (self.blocks / (HEADS * SECTORS)).clamp(1, 0xff_ffff) as u32;
        geometry[2..5].copy_from_slice(&cylinders.to_be_bytes()[1..]);
        geometry[5] = HEADS as u8;
        geometry[20..22].copy_from_slice(&5400u16.to_be_bytes());
        geometry
    }

    /// The same pages with ones where MODE SELECT may change something.
    fn changeable(&self) -> Vec<Vec<u8>> {
        let mut pages = self.mode_pages(&ScsiDiskState::default());
        for page in &mut pages {
            page[2..].fill(0);
            match page[0] {
                CACHING => page[2] = WCE,
                CONTROL => page[2] = D_SENSE,
                _ => {}
            }
        }
        pages
    }

    pub(super) fn mode_select(&self, command: &Command<'_>) -> Outcome {
        let Some(list) = ModeSelect::parse(command)? else { return Ok(Action::overrun()) };
        let block = match list.descriptor[..] {
            [_, _, _, _, _, a, b, c] => Some(u32::from_be_bytes([0, a, b, c])),
            [.., a, b, c, d] => Some(u32::from_be_bytes([a, b, c, d])),
            _ => None,
        };
        if block.is_some_and(|block| block != self.block && block != 0) {
            return Err(Sense::invalid_parameter(4));
        }
        let mut state = lock(&self.state);
        let mut next = state.clone();
        let (current, changeable) = (self.mode_pages(&state), self.changeable());
        for (offset, page) in &list.pages {
            let known = current.iter().zip(&changeable).find(|(old, _)| old[0] == page[0] & 0x7f);
            let (old, mask) = known.ok_or(Sense::invalid_parameter(*offset))?;
            check_page(page, old, mask)
                .map_err(|at| Sense::invalid_parameter(offset.saturating_add(at)))?;
            match old[0] {
                CACHING => next.writeback = page[2] & WCE != 0,
                CONTROL => next.descriptor_sense = page[2] & D_SENSE != 0,
                _ => {}
            }
        }
        let ends_cache = state.writeback && !next.writeback;
        *state = next;
        drop(state);
        // What the cache holds has to be durable when the initiator believes that there is none.
        if ends_cache {
            return self.work(super::Job::flush());
        }
        Ok(Action::good())
    }
}

/// An empty page: code, length, and zeroes.
fn page(code: u8, len: u8) -> Vec<u8> {
    let mut page = vec![0; usize::from(len) + 2];
    page[0] = code;
    page[1] = len;
    page
}
