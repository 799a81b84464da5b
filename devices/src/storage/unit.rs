//! A logical unit, and what all kinds of it have in common: identity, sense, attentions, mode pages.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::cdrom::CdRomState;
use super::command::{Action, Cdb, Command, Reply};
use super::disk::ScsiDiskState;
use super::job::Fault;
use super::lane::Ended;
use super::opcode;
use super::sense::Sense;

/// Who made the units, as INQUIRY says it: 8 characters.
const VENDOR: &[u8; 8] = b"LODGE   ";
/// Product revision: 4 characters.
const REVISION: &[u8; 4] = b"1.0 ";
/// Unit attentions that wait at most; later ones are covered by those that wait.
const ATTENTIONS: usize = 4;

/// Peripheral device types (SPC-4, table 147).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceType {
    /// A disk.
    Block = 0x00,
    /// A CD or DVD drive.
    CdDvd = 0x05,
}

/// What is saved of a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "unit", rename_all = "kebab-case")]
pub enum UnitState {
    /// A disk.
    Disk(ScsiDiskState),
    /// A CD-ROM drive.
    CdRom(CdRomState),
}

/// A SCSI logical unit. Called from I/O threads, several at once; nothing in here blocks.
pub trait Unit: Send + Sync {
    /// What a command comes to.
    fn execute(&self, command: &Command<'_>) -> Action;

    /// The medium that is in the unit now.
    fn medium(&self) -> Option<u64>;

    /// Whether sense data has the descriptor format (the control mode page's D_SENSE).
    fn descriptor_sense(&self) -> bool;

    /// A reset by a task management function: back to the initial state, and a unit attention says so.
    fn reset(&self);

    /// Back to the state at power-on.
    fn power_on(&self);

    /// Establishes a unit attention.
    fn attention(&self, sense: Sense);

    /// What is saved.
    fn state(&self) -> UnitState;

    /// Takes back what was saved; `false` if it is another kind of unit's.
    fn restore(&self, state: &UnitState) -> bool;
}

/// The end of a command whose job has ended.
pub fn finished<T>(ended: &Ended<T>) -> Reply {
    let transferred = ended.job.transferred();
    let sense = match &ended.result {
        Ok(()) => None,
        Err(Fault::Read(_)) => Some(Sense::READ_ERROR),
        Err(Fault::Write(error)) => Some(match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Sense::NO_SPACE,
            Some(libc::EROFS) => Sense::WRITE_PROTECTED,
            _ => Sense::WRITE_ERROR,
        }),
        Err(Fault::Differs(at)) => Some(Sense::MISCOMPARE.at(*at)),
    };
    Reply { sense, transferred, ..Reply::default() }
}

/// REPORT LUNS (SPC-4, section 6.33) for a target with these units.
pub fn report_luns(cdb: &Cdb, luns: &[u16]) -> Reply {
    const ADMINISTRATIVE: u8 = 0x01;
    const ALL: u8 = 0x02;
    let luns = match cdb.u8(2) {
        0 | ALL => luns,
        // Well-known units only: there are none.
        ADMINISTRATIVE => &[],
        _ => return Reply::check(Sense::invalid_field(2)),
    };
    let allocation = cdb.u32(6);
    if allocation < 16 {
        return Reply::check(Sense::invalid_field(6));
    }
    let mut data = vec![0; 8];
    data[..4].copy_from_slice(&(luns.len() as u32 * 8).to_be_bytes());
    for lun in luns {
        // Peripheral addressing up to 255, flat addressing above.
        let flat = if *lun > 255 { 0x4000 } else { 0 };
        data.extend_from_slice(&(lun | flat).to_be_bytes());
        data.extend_from_slice(&[0; 6]);
    }
    Reply::data(data, allocation as usize)
}

/// Unit attentions that the initiator has to hear of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Attentions(VecDeque<Sense>);

impl Attentions {
    /// Adds one; one that waits already is not repeated.
    pub fn push(&mut self, sense: Sense) {
        if self.0.len() < ATTENTIONS && !self.0.contains(&sense) {
            self.0.push_back(sense);
        }
    }

    /// Takes the one that ends this command, if there is one. Some commands are executed nevertheless (SPC-4,
    /// section 5.14; MMC-5, section 4.1.6).
    pub fn take_for(&mut self, opcode: u8) -> Option<Sense> {
        match opcode {
            opcode::INQUIRY
            | opcode::REPORT_LUNS
            | opcode::REQUEST_SENSE
            | opcode::GET_EVENT_STATUS
            | opcode::GET_CONFIGURATION => None,
            _ => self.0.pop_front(),
        }
    }

    /// Takes the next one.
    pub fn take(&mut self) -> Option<Sense> {
        self.0.pop_front()
    }
}

/// REQUEST SENSE (SPC-4, section 6.39): what the transport held back, an attention, or the state.
pub fn request_sense(command: &Command<'_>, attentions: &mut Attentions, state: Sense) -> Action {
    let descriptor = command.cdb.u8(1) & 1 != 0;
    let sense = command.held_sense.or_else(|| attentions.take()).unwrap_or(state);
    Action::data(sense.encode(descriptor), command.cdb.u8(4).into())
}

/// Who a unit says it is.
pub struct Identity<'a> {
    /// What it is.
    pub device_type: DeviceType,
    /// The medium can be taken out.
    pub removable: bool,
    /// Product identification: up to 16 characters.
    pub product: &'a str,
    /// The serial number, up to 36 characters; may be empty.
    pub serial: &'a str,
    /// Standards (SPC-4, table 152), after SAM-5 and SPC-4.
    pub standard: u16,
}

impl Identity<'_> {
    fn product(&self) -> [u8; 16] {
        let mut product = [b' '; 16];
        for (to, from) in product.iter_mut().zip(self.product.bytes()) {
            *to = if from.is_ascii_graphic() { from } else { b' ' };
        }
        product
    }

    fn serial(&self) -> Vec<u8> {
        let text = self.serial.bytes().filter(u8::is_ascii_graphic);
        text.take(36).collect()
    }

    /// Standard INQUIRY data (SPC-4, section 6.6.2).
    pub fn standard(&self) -> Vec<u8> {
        const VERSION_SPC3: u8 = 5;
        const RESPONSE_FORMAT: u8 = 0x12; // HiSup, format 2
        const CMDQUE: u8 = 0x02;
        let mut data = vec![0; 66];
        data[0] = self.device_type as u8;
        data[1] = if self.removable { 0x80 } else { 0 };
        data[2] = VERSION_SPC3;
        data[3] = RESPONSE_FORMAT;
        data[4] = (data.len() - 5) as u8;
        data[7] = CMDQUE;
        data[8..16].copy_from_slice(VENDOR);
        data[16..32].copy_from_slice(&self.product());
        data[32..36].copy_from_slice(REVISION);
        // SAM-5, SPC-4, and the command set's own.
        for (at, standard) in [(58, 0x00a0u16), (60, 0x0460), (62, self.standard)] {
            data[at..at + 2].copy_from_slice(&standard.to_be_bytes());
        }
        data
    }

    /// A vital product data page: its head and `body`.
    pub fn page(&self, page: u8, body: &[u8]) -> Vec<u8> {
        let mut data = vec![self.device_type as u8, page];
        data.extend_from_slice(&(body.len() as u16).to_be_bytes());
        data.extend_from_slice(body);
        data
    }

    /// Page 80H: the serial number.
    pub fn serial_page(&self) -> Vec<u8> {
        self.page(0x80, &self.serial())
    }

    /// Page 83H: designators (SPC-4, section 7.8.6) by vendor and, where there is a serial number to make
    /// it from, a locally assigned NAA one.
    pub fn designators(&self) -> Vec<u8> {
        const ASCII_VENDOR_ID: [u8; 2] = [0x02, 0x01];
        const BINARY_NAA: [u8; 2] = [0x01, 0x03];
        let serial = self.serial();
        let mut name = VENDOR.to_vec();
        name.extend_from_slice(&self.product());
        name.extend_from_slice(&serial);
        let mut body = Vec::from(ASCII_VENDOR_ID);
        body.extend_from_slice(&[0, name.len() as u8]);
        body.extend_from_slice(&name);
        if !serial.is_empty() {
            body.extend_from_slice(&BINARY_NAA);
            body.extend_from_slice(&[0, 8]);
            body.extend_from_slice(&naa(&serial).to_be_bytes());
        }
        self.page(0x83, &body)
    }
}

/// A locally assigned name (NAA 3) made from a serial number: the same one each time.
pub fn naa(serial: &[u8]) -> u64 {
    // FNV-1a, 64 bits.
    let hash = serial.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    3 << 60 | hash >> 4
}

/// INQUIRY (SPC-4, section 6.6), with the unit's own vital product data pages beside 00H.
pub fn inquiry(
    command: &Command<'_>,
    identity: &Identity<'_>,
    pages: &[(u8, Vec<u8>)],
) -> Result<Action, Sense> {
    let (flags, page) = (command.cdb.u8(1), command.cdb.u8(2));
    let allocation = usize::from(command.cdb.u16(3));
    // CMDDT is obsolete.
    if flags & 0x02 != 0 {
        return Err(Sense::invalid_field(1));
    }
    if flags & 1 == 0 {
        if page != 0 {
            return Err(Sense::invalid_field(2));
        }
        return Ok(Action::data(identity.standard(), allocation));
    }
    if page == 0 {
        let list: Vec<u8> = std::iter::once(0).chain(pages.iter().map(|(page, _)| *page)).collect();
        return Ok(Action::data(identity.page(0, &list), allocation));
    }
    let found = pages.iter().find(|(code, _)| *code == page).ok_or(Sense::invalid_field(2))?;
    Ok(Action::data(found.1.clone(), allocation))
}

/// Which values of a mode page are asked for (the PC field).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// As they are.
    Current,
    /// Ones where MODE SELECT may change a bit.
    Changeable,
    /// As they are at power-on.
    Default,
}

/// MODE SENSE: the parts of the request, for both lengths of the command (SPC-4, sections 6.13, 6.14).
pub struct ModeSense {
    /// The short command, with a header of 4 bytes.
    pub short: bool,
    /// No block descriptors.
    pub no_descriptors: bool,
    /// Long block descriptors are accepted.
    pub long_descriptors: bool,
    /// Which values.
    pub values: Values,
    /// Page code; 3FH: all.
    pub page: u8,
    /// Bytes that the initiator takes.
    pub allocation: usize,
}

impl ModeSense {
    /// Reads the command.
    pub fn parse(cdb: &Cdb) -> Result<Self, Sense> {
        let short = cdb.opcode() == opcode::MODE_SENSE_6;
        let values = match cdb.u8(2) >> 6 {
            0 => Values::Current,
            1 => Values::Changeable,
            2 => Values::Default,
            _ => return Err(Sense::SAVING_UNSUPPORTED),
        };
        let (page, subpage) = (cdb.u8(2) & 0x3f, cdb.u8(3));
        // There are no subpages; "all of them" is what there is.
        if subpage != 0 && !(subpage == 0xff && page == 0x3f) {
            return Err(Sense::invalid_field(3));
        }
        let allocation = if short { cdb.u8(4).into() } else { cdb.u16(7).into() };
        Ok(Self {
            short,
            no_descriptors: cdb.u8(1) & 0x08 != 0,
            long_descriptors: !short && cdb.u8(1) & 0x10 != 0,
            values,
            page,
            allocation,
        })
    }

    /// The answer: header, block descriptor, and those of `pages` that were asked for.
    pub fn answer(
        &self,
        medium_type: u8,
        specific: u8,
        descriptor: &[u8],
        pages: &[Vec<u8>],
    ) -> Result<Action, Sense> {
        let descriptor = if self.no_descriptors { &[] } else { descriptor };
        let mut body = descriptor.to_vec();
        let wanted = |page: &&Vec<u8>| self.page == 0x3f || page[0] & 0x3f == self.page;
        let before = body.len();
        pages.iter().filter(wanted).for_each(|page| body.extend_from_slice(page));
        if body.len() == before && self.page != 0x3f {
            return Err(Sense::invalid_field(2));
        }
        let mut data = if self.short {
            vec![(body.len() + 3) as u8, medium_type, specific, descriptor.len() as u8]
        } else {
            let mut head = vec![0; 8];
            head[..2].copy_from_slice(&((body.len() + 6) as u16).to_be_bytes());
            head[2] = medium_type;
            head[3] = specific;
            head[4] = u8::from(descriptor.len() == 16);
            head[7] = descriptor.len() as u8;
            head
        };
        data.extend_from_slice(&body);
        Ok(Action::data(data, self.allocation))
    }
}

/// The mode pages in the parameters of MODE SELECT (SPC-4, sections 6.11, 6.12): block descriptor and pages, with
/// each page's offset in the list.
pub struct ModeSelect {
    /// The block descriptor; may be empty.
    pub descriptor: Vec<u8>,
    /// Offset and bytes of each page.
    pub pages: Vec<(u16, Vec<u8>)>,
}

impl ModeSelect {
    /// Reads and checks the list's structure. `None`: the initiator's buffer is shorter than the list.
    pub fn parse(command: &Command<'_>) -> Result<Option<Self>, Sense> {
        let cdb = &command.cdb;
        let short = cdb.opcode() == opcode::MODE_SELECT_6;
        // SP: nothing can be saved. PF=0 is the vendor's own format: there is none.
        if cdb.u8(1) & 0x01 != 0 {
            return Err(Sense::invalid_field(1));
        }
        let len = usize::from(if short { cdb.u8(4).into() } else { cdb.u16(7) });
        if command.data_out.len() < len as u64 {
            return Ok(None);
        }
        if len == 0 {
            return Ok(Some(Self { descriptor: Vec::new(), pages: Vec::new() }));
        }
        let list = command.parameters(len);
        let header = if short { 4 } else { 8 };
        if list.len() < header {
            return Err(Sense::PARAMETER_LENGTH);
        }
        let descriptors = if short {
            list[3].into()
        } else {
            usize::from(u16::from_be_bytes([list[6], list[7]]))
        };
        let mut at = header + descriptors;
        if descriptors % 8 != 0 || descriptors > 16 || at > list.len() {
            return Err(Sense::PARAMETER_LENGTH);
        }
        let descriptor = list[header..at].to_vec();
        let mut pages = Vec::new();
        while at < list.len() {
            let len = 2 + usize::from(*list.get(at + 1).ok_or(Sense::PARAMETER_LENGTH)?);
            let page = list.get(at..at + len).ok_or(Sense::PARAMETER_LENGTH)?;
            pages.push((at as u16, page.to_vec()));
            at += len;
        }
        Ok(Some(Self { descriptor, pages }))
    }
}

/// Whether a page of MODE SELECT changes only what may be changed (`changeable`) of `current`; the offset of the first
/// byte that it may not change otherwise.
pub fn check_page(page: &[u8], current: &[u8], changeable: &[u8]) -> Result<(), u16> {
    if page.len() != current.len() {
        return Err(1);
    }
    for (at, ((new, old), mask)) in page.iter().zip(current).zip(changeable).enumerate().skip(2) {
        if (new ^ old) & !mask != 0 {
            return Err(at as u16);
        }
    }
    Ok(())
}
