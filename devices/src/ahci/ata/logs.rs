//! Logs and SMART: what a disk remembers (ATA8-ACS, sections 7.25, 7.53; annex A).

use super::super::fis::{HostFis, error};
use super::{AtaState, Plan, SECTOR};

/// Logs.
const DIRECTORY: u8 = 0x00;
const SUMMARY_ERRORS: u8 = 0x01;
const SELF_TEST: u8 = 0x06;
const QUEUE_ERROR: u8 = 0x10;
/// What SMART's commands have in the address, and RETURN STATUS answers while all is well.
const SMART_KEY: u64 = 0xc2_4f;

/// The checksum that makes all 512 bytes add up to 0.
fn summed(mut data: Vec<u8>) -> Vec<u8> {
    let sum = data[..511].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    data[511] = sum.wrapping_neg();
    data
}

/// READ LOG EXT and READ LOG DMA EXT.
pub(super) fn read(fis: &HostFis, state: &mut AtaState) -> Result<Plan, u8> {
    const PIO: u8 = 0x2f;
    let lba = fis.lba();
    let (log, page) = (lba as u8, (lba >> 8) as u16 & 0xff | ((lba >> 32) as u16 & 0xff) << 8);
    // Each log here has one page.
    if page != 0 || fis.count() != 1 {
        return Err(error::ABORT);
    }
    let data = match log {
        DIRECTORY => {
            let mut data = vec![0; SECTOR as usize];
            data[0] = 1;
            data[2 * usize::from(QUEUE_ERROR)] = 1;
            data
        }
        QUEUE_ERROR => queue_error(state),
        _ => return Err(error::ABORT),
    };
    Ok(Plan::Send { data, pio: fis.command() == PIO })
}

/// The queued command error log (Serial ATA 3.1, section 13.7.5). Reading it ends the error.
fn queue_error(state: &mut AtaState) -> Vec<u8> {
    const NONE: u8 = 0x80;
    let mut data = vec![0; SECTOR as usize];
    match state.queue_error.take() {
        Some((tag, tf)) => {
            data[0] = tag;
            // The rest is laid out as in the register FIS, from the status on.
            data[2..20].copy_from_slice(&tf.to_host(false)[2..]);
        }
        None => data[0] = NONE,
    }
    summed(data)
}

/// The SMART commands.
pub(super) fn smart(fis: &HostFis, state: &mut AtaState) -> Result<Plan, u8> {
    use super::TaskFile;
    let key = fis.lba() >> 8 & 0xffff;
    let enable = fis.feature() == 0xd8;
    if key != SMART_KEY || !state.smart && !enable {
        return Err(error::ABORT);
    }
    let send = |data| Ok(Plan::Send { data, pio: true });
    match fis.feature() {
        0xd0 => return send(attributes()),
        0xd1 => return send(thresholds()),
        0xd5 => return send(log(fis.lba() as u8)?),
        0xd8 => state.smart = true,
        0xd9 => state.smart = false,
        // Autosave, offline tests, and "is all well": the address says that it is.
        0xd2 | 0xd4 | 0xda => {}
        _ => return Err(error::ABORT),
    }
    Ok(Plan::End(TaskFile::good(fis)))
}

/// Attributes: id, flags, value, worst value, raw value, threshold.
const ATTRIBUTES: [(u8, u16, u8, u8, u8, u8); 5] = [
    (0x01, 0x0003, 100, 100, 0, 6),  // raw read error rate
    (0x05, 0x0003, 100, 100, 0, 36), // reallocated sectors
    (0x09, 0x0003, 100, 100, 1, 0),  // power-on hours
    (0x0c, 0x0003, 100, 100, 0, 0),  // power cycles
    (0xbe, 0x0003, 69, 69, 31, 50),  // temperature
];

fn attributes() -> Vec<u8> {
    let mut data = vec![0; SECTOR as usize];
    data[0] = 1;
    for (entry, (id, flags, value, worst, raw, _)) in data[2..].chunks_mut(12).zip(ATTRIBUTES) {
        entry[0] = id;
        entry[1..3].copy_from_slice(&flags.to_le_bytes());
        entry[3..6].copy_from_slice(&[value, worst, raw]);
    }
    data[362] = 0x02; // the last offline collection was completed
    data[367] = 0x01; // immediate offline collection is possible
    data[368..370].copy_from_slice(&3u16.to_le_bytes()); // attributes are saved
    data[370] = 1; // there is an error log
    summed(data)
}

fn thresholds() -> Vec<u8> {
    let mut data = vec![0; SECTOR as usize];
    data[0] = 1;
    for (entry, (id, .., threshold)) in data[2..].chunks_mut(12).zip(ATTRIBUTES) {
        entry[..2].copy_from_slice(&[id, threshold]);
    }
    summed(data)
}

fn log(log: u8) -> Result<Vec<u8>, u8> {
    let mut data = vec![0; SECTOR as usize];
    data[0] = 1;
    match log {
        DIRECTORY => {
            data[2 * usize::from(SUMMARY_ERRORS)] = 1;
            data[2 * usize::from(SELF_TEST)] = 1;
            return Ok(data);
        }
        SUMMARY_ERRORS | SELF_TEST => {}
        _ => return Err(error::ABORT),
    }
    Ok(summed(data))
}
