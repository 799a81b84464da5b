//! The drive's commands (MMC-5, section 6), beside those that describe disc and drive.

use super::super::command::{Action, Command, Medium};
use super::super::job::Job;
use super::super::sense::Sense;
use super::super::unit::{DeviceType, Identity, ModeSelect, inquiry, report_luns, request_sense};
use super::super::{lock, opcode as op};
use super::sector::{Frame, from_msf};
use super::{BLOCK, CdRom, blocks};

/// Result of a command before it is known how it ends.
pub(super) type Outcome = Result<Action, Sense>;

/// What is in the drive, for commands that need it.
pub(super) struct Disc {
    medium: Medium,
    /// Blocks of 2048 bytes.
    pub blocks: u32,
}

impl Disc {
    /// Whether it is a DVD, by its size.
    pub fn is_dvd(&self) -> bool {
        self.blocks > super::CD_BLOCKS
    }
}

impl CdRom {
    pub(super) fn disc(&self) -> Result<Disc, Sense> {
        let tray = lock(&self.tray);
        let medium = tray.ready()?.clone();
        let blocks = blocks(&medium);
        Ok(Disc { medium, blocks })
    }

    fn identity(&self) -> Identity<'_> {
        Identity {
            device_type: DeviceType::CdDvd,
            removable: true,
            product: "CD-ROM",
            serial: &self.serial,
            standard: 0x0420, // MMC-5
        }
    }

    pub(super) fn run(&self, command: &Command<'_>) -> Outcome {
        let cdb = &command.cdb;
        match cdb.opcode() {
            op::TEST_UNIT_READY | op::SEEK_10 => self.disc().map(|_| Action::good()),
            op::SEND_DIAGNOSTIC | op::SET_CD_SPEED | op::REZERO_UNIT => Ok(Action::good()),
            op::RESERVE_6 | op::RESERVE_10 | op::RELEASE_6 | op::RELEASE_10 => Ok(Action::good()),
            op::REQUEST_SENSE => {
                let mut tray = lock(&self.tray);
                let state = tray.ready().err().unwrap_or(Sense::NONE);
                Ok(request_sense(command, &mut tray.state.attentions, state))
            }
            op::INQUIRY => {
                let identity = self.identity();
                let pages = [(0x80, identity.serial_page()), (0x83, identity.designators())];
                inquiry(command, &identity, &pages)
            }
            op::REPORT_LUNS => Ok(Action::Done(report_luns(cdb, &[0]))),
            op::START_STOP_UNIT => self.start_stop(cdb.u8(4)),
            op::PREVENT_ALLOW => self.prevent(cdb.u8(4)),
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => self.mode_sense(cdb),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => self.mode_select(command),
            op::READ_CAPACITY_10 => self.capacity(),
            op::READ_10 => self.read(command, cdb.u32(2), cdb.u16(7).into()),
            op::READ_12 => self.read(command, cdb.u32(2), cdb.u32(6)),
            op::VERIFY_10 => self.verify(command),
            op::READ_CD => self.read_cd(command, cdb.u32(2), cdb.u24(6)),
            op::READ_CD_MSF => self.read_cd_msf(command),
            op::READ_TOC => self.read_toc(cdb),
            op::READ_SUB_CHANNEL => self.read_sub_channel(cdb),
            op::GET_CONFIGURATION => self.get_configuration(cdb),
            op::GET_EVENT_STATUS => self.get_event_status(cdb),
            op::MECHANISM_STATUS => Ok(self.mechanism_status(cdb)),
            op::READ_DISC_INFORMATION => self.read_disc_information(cdb),
            op::READ_TRACK_INFORMATION => self.read_track_information(cdb),
            op::READ_DISC_STRUCTURE => self.read_disc_structure(cdb),
            _ => Err(Sense::INVALID_OPCODE),
        }
    }

    fn start_stop(&self, flags: u8) -> Outcome {
        const LOAD_EJECT: u8 = 2;
        const START: u8 = 1;
        let power_condition = flags >> 4;
        if power_condition == 0 && flags & LOAD_EJECT != 0 {
            self.move_tray(flags & START == 0)?;
        }
        Ok(Action::good())
    }

    fn prevent(&self, flags: u8) -> Outcome {
        let state = &mut lock(&self.tray).state;
        match flags & 3 {
            flag @ (0 | 1) => state.locked = flag == 1,
            flag => state.locked_persistently = flag == 3,
        }
        Ok(Action::good())
    }

    fn capacity(&self) -> Outcome {
        let last = self.disc()?.blocks.saturating_sub(1);
        let data = [last.to_be_bytes(), (BLOCK as u32).to_be_bytes()].concat();
        let all = data.len();
        Ok(Action::data(data, all))
    }

    /// Refuses blocks that the disc does not have.
    fn check(disc: &Disc, first: u32, count: u32) -> Result<(), Sense> {
        match first.checked_add(count) {
            Some(end) if end <= disc.blocks => Ok(()),
            _ => Err(Sense::OUT_OF_RANGE.at(first.into())),
        }
    }

    fn read(&self, command: &Command<'_>, first: u32, count: u32) -> Outcome {
        let disc = self.disc()?;
        Self::check(&disc, first, count)?;
        let len = u64::from(count) * BLOCK;
        if len > command.data_in.len() && !self.is_atapi() {
            return Ok(Action::overrun());
        }
        // An ATAPI device sends what it has; what the host does not take is lost.
        let len = len.min(command.data_in.len());
        if len == 0 {
            return Ok(Action::good());
        }
        let size = disc.medium.disk().size();
        let job = Job::read(u64::from(first) * BLOCK, len, command.data_in, size);
        Ok(Action::Work(disc.medium, job))
    }

    fn verify(&self, command: &Command<'_>) -> Outcome {
        const BYTE_CHECK: u8 = 0x06;
        let disc = self.disc()?;
        if command.cdb.u8(1) & BYTE_CHECK != 0 {
            return Err(Sense::invalid_field(1));
        }
        Self::check(&disc, command.cdb.u32(2), command.cdb.u16(7).into())?;
        Ok(Action::good())
    }

    /// READ CD: what is asked of each sector may be more than its data.
    fn read_cd(&self, command: &Command<'_>, first: u32, count: u32) -> Outcome {
        const ANY: u8 = 0;
        const MODE_1: u8 = 2;
        let cdb = &command.cdb;
        let disc = self.disc()?;
        if !matches!(cdb.u8(1) >> 2 & 7, ANY | MODE_1) {
            return Err(Sense::WRONG_TRACK_MODE);
        }
        let frame = Frame::parse(cdb.u8(9)).ok_or(Sense::invalid_field(9))?;
        if cdb.u8(10) & 7 != 0 {
            return Err(Sense::invalid_field(10)); // There are no sub-channels.
        }
        Self::check(&disc, first, count)?;
        if frame.only_data() {
            return self.read(command, first, count);
        }
        let bytes = frame.bytes() as u64 * u64::from(count);
        if bytes > command.data_in.len() && !self.is_atapi() {
            return Ok(Action::overrun());
        }
        let sectors = match frame.bytes() as u64 {
            0 => 0,
            each => count.min(command.data_in.len().div_ceil(each).try_into().unwrap_or(count)),
        };
        if sectors == 0 {
            return Ok(Action::good());
        }
        let size = disc.medium.disk().size();
        Ok(Action::Work(disc.medium, Job::sectors(first, sectors, frame, command.data_in, size)))
    }

    fn read_cd_msf(&self, command: &Command<'_>) -> Outcome {
        let cdb = &command.cdb;
        let from = from_msf(cdb.u8(3), cdb.u8(4), cdb.u8(5)).ok_or(Sense::OUT_OF_RANGE)?;
        let to = from_msf(cdb.u8(6), cdb.u8(7), cdb.u8(8)).ok_or(Sense::OUT_OF_RANGE)?;
        let count = to.checked_sub(from).ok_or(Sense::invalid_field(6))?;
        self.read_cd(command, from, count)
    }

    fn mode_select(&self, command: &Command<'_>) -> Outcome {
        let Some(list) = ModeSelect::parse(command)? else { return Ok(Action::overrun()) };
        if let [_, _, _, _, _, a, b, c] = list.descriptor[..] {
            let block = u32::from_be_bytes([0, a, b, c]);
            if block != 0 && u64::from(block) != BLOCK {
                return Err(Sense::invalid_parameter(4));
            }
        }
        self.check_pages(&list)?;
        Ok(Action::good())
    }
}
