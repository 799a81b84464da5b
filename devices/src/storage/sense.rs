//! Sense data: why a command did not do what was asked (SPC-4, section 4.5).
//!
//! ```text
//!   fixed (70H)       key, information (32 bits), ASC, ASCQ, field pointer
//!   descriptor (72H)  key, ASC, ASCQ, then descriptors: information (64 bits), field pointer
//! ```

use serde::{Deserialize, Serialize};

/// Sense keys (SPC-4, table 46).
pub mod key {
    /// Nothing to say.
    pub const NO_SENSE: u8 = 0x0;
    /// No medium, or it is not spinning.
    pub const NOT_READY: u8 = 0x2;
    /// The medium could not be read or written.
    pub const MEDIUM_ERROR: u8 = 0x3;
    /// The device failed in another way.
    pub const HARDWARE_ERROR: u8 = 0x4;
    /// The command or its parameters are wrong.
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    /// Something happened that the initiator has to know first.
    pub const UNIT_ATTENTION: u8 = 0x6;
    /// Writing is not allowed.
    pub const DATA_PROTECT: u8 = 0x7;
    /// The command was aborted by the device.
    pub const ABORTED_COMMAND: u8 = 0xb;
    /// A comparison found other data.
    pub const MISCOMPARE: u8 = 0xe;
}

/// Which byte of a command or of its parameters is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Field {
    /// A byte of the command.
    Command(u16),
    /// A byte of the data sent with it.
    Parameter(u16),
}

/// One piece of sense: a key, an additional code with its qualifier, and where it applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sense {
    /// See [`key`].
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Its qualifier.
    pub ascq: u8,
    /// What the INFORMATION field says: a block address, or an offset.
    #[serde(default)]
    pub information: Option<u64>,
    /// What is wrong, when a field is.
    #[serde(default)]
    pub field: Option<Field>,
}

impl Sense {
    /// Sense without further information.
    pub const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq, information: None, field: None }
    }

    /// Nothing to say.
    pub const NONE: Self = Self::new(key::NO_SENSE, 0, 0);
    /// There is no such command.
    pub const INVALID_OPCODE: Self = Self::new(key::ILLEGAL_REQUEST, 0x20, 0);
    /// Fields go beyond the medium.
    pub const OUT_OF_RANGE: Self = Self::new(key::ILLEGAL_REQUEST, 0x21, 0);
    /// The list of parameters ends too early.
    pub const PARAMETER_LENGTH: Self = Self::new(key::ILLEGAL_REQUEST, 0x1a, 0);
    /// Parameters cannot be saved.
    pub const SAVING_UNSUPPORTED: Self = Self::new(key::ILLEGAL_REQUEST, 0x39, 0);
    /// There is no such logical unit.
    pub const NO_UNIT: Self = Self::new(key::ILLEGAL_REQUEST, 0x25, 0);
    /// The medium may not be taken out.
    pub const REMOVAL_PREVENTED: Self = Self::new(key::ILLEGAL_REQUEST, 0x53, 0x02);
    /// The sectors are not of the kind that was asked for.
    pub const WRONG_TRACK_MODE: Self = Self::new(key::ILLEGAL_REQUEST, 0x64, 0);
    /// No medium, tray closed.
    pub const NO_MEDIUM: Self = Self::new(key::NOT_READY, 0x3a, 0x01);
    /// No medium, tray open.
    pub const NO_MEDIUM_TRAY_OPEN: Self = Self::new(key::NOT_READY, 0x3a, 0x02);
    /// There may be another medium than before.
    pub const MEDIUM_CHANGED: Self = Self::new(key::UNIT_ATTENTION, 0x28, 0);
    /// The initiator asked for the medium by the drive's button.
    pub const REMOVAL_REQUESTED: Self = Self::new(key::UNIT_ATTENTION, 0x5a, 0x01);
    /// The unit was reset by a task management function.
    pub const DEVICE_RESET: Self = Self::new(key::UNIT_ATTENTION, 0x29, 0x03);
    /// Mode parameters are not what they were.
    pub const MODE_CHANGED: Self = Self::new(key::UNIT_ATTENTION, 0x2a, 0x01);
    /// The units of the target are others than before.
    pub const LUNS_CHANGED: Self = Self::new(key::UNIT_ATTENTION, 0x3f, 0x0e);
    /// The disk is read-only.
    pub const WRITE_PROTECTED: Self = Self::new(key::DATA_PROTECT, 0x27, 0);
    /// The host has no space left for the disk.
    pub const NO_SPACE: Self = Self::new(key::DATA_PROTECT, 0x27, 0x07);
    /// A read failed.
    pub const READ_ERROR: Self = Self::new(key::MEDIUM_ERROR, 0x11, 0);
    /// A write failed.
    pub const WRITE_ERROR: Self = Self::new(key::MEDIUM_ERROR, 0x0c, 0);
    /// The device cannot do what it should be able to do.
    pub const INTERNAL: Self = Self::new(key::HARDWARE_ERROR, 0x44, 0);
    /// A comparison found other data.
    pub const MISCOMPARE: Self = Self::new(key::MISCOMPARE, 0x1d, 0);

    /// Byte `at` of the command is wrong.
    pub const fn invalid_field(at: u16) -> Self {
        Self { field: Some(Field::Command(at)), ..Self::new(key::ILLEGAL_REQUEST, 0x24, 0) }
    }

    /// Byte `at` of the parameters is wrong.
    pub const fn invalid_parameter(at: u16) -> Self {
        Self { field: Some(Field::Parameter(at)), ..Self::new(key::ILLEGAL_REQUEST, 0x26, 0) }
    }

    /// The same with an INFORMATION field.
    pub const fn at(self, information: u64) -> Self {
        Self { information: Some(information), ..self }
    }

    /// The sense data's bytes, in one of the two formats.
    pub fn encode(&self, descriptor: bool) -> Vec<u8> {
        if descriptor { self.descriptors() } else { self.fixed().to_vec() }
    }

    /// The sense key specific bytes: which field is wrong (SPC-4, section 4.5.2.4.2).
    fn specific(&self) -> Option<[u8; 3]> {
        const VALID: u8 = 0x80;
        const COMMAND: u8 = 0x40;
        self.field.map(|field| {
            let (flags, at) = match field {
                Field::Command(at) => (VALID | COMMAND, at),
                Field::Parameter(at) => (VALID, at),
            };
            let [high, low] = at.to_be_bytes();
            [flags, high, low]
        })
    }

    fn fixed(&self) -> [u8; 18] {
        let mut data = [0; 18];
        data[0] = 0x70;
        data[2] = self.key;
        data[7] = 10;
        data[12] = self.asc;
        data[13] = self.ascq;
        // A value that does not fit is not valid here.
        if let Some(information) = self.information.and_then(|value| u32::try_from(value).ok()) {
            data[0] |= 0x80;
            data[3..7].copy_from_slice(&information.to_be_bytes());
        }
        if let Some(specific) = self.specific() {
            data[15..18].copy_from_slice(&specific);
        }
        data
    }

    fn descriptors(&self) -> Vec<u8> {
        let mut data = vec![0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0];
        if let Some(information) = self.information {
            data.extend_from_slice(&[0x00, 10, 0x80, 0]);
            data.extend_from_slice(&information.to_be_bytes());
        }
        if let Some([flags, high, low]) = self.specific() {
            data.extend_from_slice(&[0x02, 6, 0, 0, flags, high, low, 0]);
        }
        data[7] = (data.len() - 8) as u8;
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_say_the_same() {
        let sense = Sense::invalid_field(0x102).at(0x1_0000);
        assert_eq!(
            sense.encode(false),
            [0xf0, 0, 5, 0, 1, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xc0, 1, 2]
        );
        assert_eq!(
            sense.encode(true),
            [
                0x72, 5, 0x24, 0, 0, 0, 0, 20, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 2, 6, 0, 0,
                0xc0, 1, 2, 0
            ]
        );
        let plain = Sense::NO_MEDIUM;
        assert_eq!(
            plain.encode(false),
            [0x70, 0, 2, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x3a, 1, 0, 0, 0, 0]
        );
        assert_eq!(plain.encode(true), [0x72, 2, 0x3a, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn a_wide_information_is_left_out_of_the_fixed_format() {
        let sense = Sense::OUT_OF_RANGE.at(1 << 32);
        assert_eq!(sense.encode(false)[0], 0x70);
        assert_eq!(sense.encode(true)[12..20], (1u64 << 32).to_be_bytes());
        assert_eq!(Sense::invalid_parameter(5).encode(false)[15..], [0x80, 0, 5]);
    }
}
