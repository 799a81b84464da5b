//! What the drive can do and what has happened: GET CONFIGURATION, GET EVENT STATUS NOTIFICATION, MECHANISM STATUS
//! (MMC-5, sections 5, 6.6, 6.7, 6.13).

use super::super::command::{Action, Cdb};
use super::super::lock;
use super::super::sense::Sense;
use super::commands::Outcome;
use super::{BLOCK, CdRom};

/// Profiles.
const CD_ROM: u16 = 0x0008;
const DVD_ROM: u16 = 0x0010;
/// Flags of a feature.
const CURRENT: u8 = 1;
const PERSISTENT: u8 = 2;

/// One feature: its number, and the bytes from its flags on.
struct Feature {
    code: u16,
    version: u8,
    persistent: bool,
    current: bool,
    data: Vec<u8>,
}

impl Feature {
    fn encode(&self, out: &mut Vec<u8>) {
        let mut flags = self.version << 2;
        if self.persistent {
            flags |= PERSISTENT;
        }
        if self.current {
            flags |= CURRENT;
        }
        out.extend_from_slice(&self.code.to_be_bytes());
        out.extend_from_slice(&[flags, self.data.len() as u8]);
        out.extend_from_slice(&self.data);
    }
}

impl CdRom {
    /// The profile of what is in the drive; 0 if nothing is.
    fn profile(&self) -> u16 {
        match self.disc() {
            Ok(disc) if disc.is_dvd() => DVD_ROM,
            Ok(_) => CD_ROM,
            Err(_) => 0,
        }
    }

    fn features(&self, profile: u16) -> Vec<Feature> {
        let always = |code, version, data: &[u8]| Feature {
            code,
            version,
            persistent: true,
            current: true,
            data: data.to_vec(),
        };
        let sometimes = |code, version, current, data: &[u8]| Feature {
            code,
            version,
            persistent: false,
            current,
            data: data.to_vec(),
        };
        let mut profiles = Vec::new();
        for code in [DVD_ROM, CD_ROM] {
            profiles.extend_from_slice(&code.to_be_bytes());
            profiles.extend_from_slice(&[u8::from(code == profile), 0]);
        }
        let interface = if self.is_atapi() { 2 } else { 1 };
        let (cd, dvd) = (profile == CD_ROM, profile == DVD_ROM);
        let mut readable = (BLOCK as u32).to_be_bytes().to_vec();
        readable.extend_from_slice(&[0, if dvd { 16 } else { 1 }, 0, 0]);
        let mut serial: Vec<u8> = self.serial.bytes().filter(u8::is_ascii_graphic).collect();
        serial.resize(serial.len().min(20).next_multiple_of(4), b' ');
        vec![
            always(0x0000, 0, &profiles),
            always(0x0001, 2, &[0, 0, 0, interface, 0, 0, 0, 0]), // core
            always(0x0002, 1, &[0; 4]),                           // morphing
            always(0x0003, 1, &[0x39, 0, 0, 0]), // a tray that loads, ejects and locks
            sometimes(0x0010, 0, profile != 0, &readable),
            sometimes(0x001d, 0, cd, &[]),
            sometimes(0x001e, 2, cd, &[0; 4]),
            sometimes(0x001f, 1, dvd, &[0; 4]),
            always(0x0100, 0, &[]), // power management
            always(0x0105, 1, &[0; 4]),
            always(0x0108, 0, &serial),
        ]
    }

    pub(super) fn get_configuration(&self, cdb: &Cdb) -> Outcome {
        let (which, from) = (cdb.u8(1) & 3, cdb.u16(2));
        let profile = self.profile();
        let mut data = vec![0; 6];
        data.extend_from_slice(&profile.to_be_bytes());
        for feature in self.features(profile) {
            let wanted = match which {
                0 => feature.code >= from,
                1 => feature.code >= from && feature.current,
                2 => feature.code == from,
                _ => return Err(Sense::invalid_field(1)),
            };
            if wanted {
                feature.encode(&mut data);
            }
        }
        let len = data.len() as u32 - 4;
        data[..4].copy_from_slice(&len.to_be_bytes());
        Ok(Action::data(data, cdb.u16(7).into()))
    }

    pub(super) fn get_event_status(&self, cdb: &Cdb) -> Outcome {
        const POLLED: u8 = 1;
        const MEDIA: u8 = 4;
        const NONE: u8 = 0x80;
        if cdb.u8(1) & POLLED == 0 {
            return Err(Sense::invalid_field(1)); // There is no asynchronous mode.
        }
        let supported = 1 << MEDIA;
        let allocation = cdb.u16(7).into();
        if cdb.u8(4) & supported == 0 {
            return Ok(Action::data(vec![0, 2, NONE, supported], allocation));
        }
        let mut tray = lock(&self.tray);
        let status = u8::from(tray.state.open) | u8::from(tray.ready().is_ok()) << 1;
        // An event that does not fit stays.
        let event = if allocation > 4 { tray.state.events.pop_front() } else { None };
        let event = event.map_or(0, |event| event as u8);
        Ok(Action::data(vec![0, 6, MEDIA, supported, event, status, 0, 0], allocation))
    }

    pub(super) fn mechanism_status(&self, cdb: &Cdb) -> Action {
        let door = if lock(&self.tray).state.open { 0x10 } else { 0 };
        Action::data(vec![0, door, 0, 0, 0, 1, 0, 0], cdb.u16(8).into())
    }
}
