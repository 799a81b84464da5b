//! SET FEATURES and what else sets a mode (ATA8-ACS, sections 7.16, 7.47, 7.50).

use super::super::fis::{HostFis, error};
use super::{AtaState, MULTIPLE};

/// SET FEATURES.
pub(super) fn set(fis: &HostFis, state: &mut AtaState) -> Result<(), u8> {
    let count = fis.count() as u8;
    match fis.feature() {
        0x02 => state.writeback = true,
        0x82 => state.writeback = false,
        0x03 => set_transfer_mode(count, state)?,
        0x05 if (1..=0xfe).contains(&count) => state.power_level = count,
        0x85 => state.power_level = 0,
        0xaa => state.lookahead = true,
        0x55 => state.lookahead = false,
        // Defaults after a software reset: kept, or not. They are kept.
        0x66 | 0xcc => {}
        _ => return Err(error::ABORT),
    }
    Ok(())
}

/// Which transfer mode: PIO, multiword DMA up to 2, Ultra DMA up to 5.
pub(in super::super) fn set_transfer_mode(mode: u8, state: &mut AtaState) -> Result<(), u8> {
    match mode {
        0x00 | 0x01 | 0x08..=0x0c | 0x20..=0x22 | 0x40..=0x45 => state.transfer_mode = mode,
        _ => return Err(error::ABORT),
    }
    Ok(())
}

/// SET MULTIPLE MODE.
pub(super) fn set_multiple(fis: &HostFis, state: &mut AtaState) -> Result<(), u8> {
    let count = fis.count() as u8;
    if count > MULTIPLE || count != 0 && !count.is_power_of_two() {
        return Err(error::ABORT);
    }
    state.multiple = count;
    Ok(())
}

/// INITIALIZE DEVICE PARAMETERS: the host's heads and sectors of a track.
pub(super) fn set_geometry(fis: &HostFis, state: &mut AtaState) -> Result<(), u8> {
    let (heads, track) = ((fis.device() & 0xf) + 1, fis.count() as u8);
    if track == 0 {
        return Err(error::ABORT);
    }
    state.geometry = (heads, track);
    Ok(())
}
