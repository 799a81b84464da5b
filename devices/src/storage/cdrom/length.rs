//! How much data a command can move, by its own fields: what a transport has to prepare for.

use super::super::command::Cdb;
use super::super::opcode as op;
use super::BLOCK;
use super::sector::Frame;

/// Bytes of data of a command to a drive, at most; 0 for one without data, or that is not known.
pub fn data_length(cdb: &Cdb) -> u64 {
    match cdb.opcode() {
        op::REQUEST_SENSE | op::MODE_SENSE_6 | op::MODE_SELECT_6 => cdb.u8(4).into(),
        op::INQUIRY => cdb.u16(3).into(),
        op::READ_CAPACITY_10 => 8,
        op::READ_10 => u64::from(cdb.u16(7)) * BLOCK,
        op::READ_12 => u64::from(cdb.u32(6)) * BLOCK,
        op::READ_CD => u64::from(cdb.u24(6)) * frame(cdb),
        // At most from the first to the last minute that can be said.
        op::READ_CD_MSF => 256 * 60 * 75 * frame(cdb),
        op::REPORT_LUNS => cdb.u32(6).into(),
        op::MECHANISM_STATUS | op::READ_DISC_STRUCTURE => cdb.u16(8).into(),
        op::MODE_SENSE_10
        | op::MODE_SELECT_10
        | op::READ_TOC
        | op::READ_SUB_CHANNEL
        | op::GET_CONFIGURATION
        | op::GET_EVENT_STATUS
        | op::READ_DISC_INFORMATION
        | op::READ_TRACK_INFORMATION => cdb.u16(7).into(),
        _ => 0,
    }
}

/// Bytes of a sector of READ CD; 0 if the command is wrong.
fn frame(cdb: &Cdb) -> u64 {
    Frame::parse(cdb.u8(9)).map_or(0, |frame| frame.bytes() as u64)
}
