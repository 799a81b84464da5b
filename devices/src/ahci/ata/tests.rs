//! What commands come to, without a port.

use std::os::unix::fs::FileExt;

use lodge_disk::{Format, OpenOptions};
use tempfile::NamedTempFile;

use super::*;

fn disk(sectors: u64) -> (NamedTempFile, AtaDisk) {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(sectors * SECTOR).unwrap();
    file.as_file().write_all_at(&[1], 0).unwrap();
    let mut options = OpenOptions::new(file.path());
    options.format = Some(Format::Raw);
    let disk = AtaDisk::new(lodge_disk::open(&options).unwrap(), &AtaDiskConfig::default());
    (file, disk)
}

fn fis(command: u8, feature: u16, lba: u64, count: u16, device: u8) -> HostFis {
    let mut fis = [0; 64];
    let lba = lba.to_le_bytes();
    fis[..4].copy_from_slice(&[0x27, 0x80, command, feature as u8]);
    fis[4..8].copy_from_slice(&[lba[0], lba[1], lba[2], device]);
    fis[8..12].copy_from_slice(&[lba[3], lba[4], lba[5], (feature >> 8) as u8]);
    fis[12..14].copy_from_slice(&count.to_le_bytes());
    HostFis(fis)
}

#[test]
fn addresses_of_every_kind() {
    let (_file, disk) = disk(1 << 20);
    let mut state = AtaState::default();
    let mut offset = |fis| match disk.decide(&fis, &mut state) {
        Plan::Read(transfer) => Ok((transfer.offset / SECTOR, transfer.len / SECTOR)),
        Plan::End(tf) => Err(tf.error),
        other => panic!("{other:?}"),
    };
    assert_eq!(offset(fis(0xc8, 0, 0x3_0201, 0, 0x40)), Ok((0x3_0201, 256)));
    assert_eq!(offset(fis(0xc8, 0, 0, 1, 0x4f)), Err(error::NOT_FOUND));
    assert_eq!(offset(fis(0x25, 0, 0, 0, 0x40)), Ok((0, 65536)));
    assert_eq!(offset(fis(0x60, 0, 5, 0, 0x40)), Ok((5, 65536)));
    assert_eq!(offset(fis(0x60, 0x102, 5, 0xf8, 0x40)), Ok((5, 0x102)));
    assert_eq!(offset(fis(0x25, 0, 0xffff_ffff_ffff, 1, 0x40)), Err(error::NOT_FOUND));
    // Cylinder 1, head 15, sector 63 and what is beyond.
    assert_eq!(offset(fis(0x20, 0, 0x13f, 1, 0x0f)), Ok((16 * 63 + 15 * 63 + 62, 1)));
    assert_eq!(offset(fis(0x20, 0, 0x140, 1, 0x0f)), Err(error::NOT_FOUND));
    assert_eq!(offset(fis(0x20, 0, 0x100, 1, 0x0f)), Err(error::NOT_FOUND));
    assert_eq!(tag(&fis(0x60, 0, 0, 0xf8, 0)), 31);
}

#[test]
fn a_host_may_count_in_its_own_geometry() {
    let (_file, disk) = disk(1 << 20);
    let mut state = AtaState::default();
    let set = disk.decide(&fis(0x91, 0, 0, 32, 0x07), &mut state);
    assert!(matches!(set, Plan::End(tf) if !tf.is_error()));
    assert_eq!(state.geometry, (8, 32));
    let read = disk.decide(&fis(0x20, 0, 0x205, 1, 0x03), &mut state);
    assert!(matches!(read, Plan::Read(t) if t.offset == ((2 * 8 + 3) * 32 + 4) * SECTOR));
    let beyond = disk.decide(&fis(0x20, 0, 0x205, 1, 0x08), &mut state);
    assert!(matches!(beyond, Plan::End(tf) if tf.error == error::NOT_FOUND));
    let none = disk.decide(&fis(0x91, 0, 0, 0, 0x07), &mut state);
    assert!(matches!(none, Plan::End(tf) if tf.is_error()));
}

#[test]
fn a_write_is_durable_when_it_shall_be() {
    let (_file, disk) = disk(64);
    let mut state = AtaState::default();
    let durable = |state: &mut AtaState, command, device| match disk
        .decide(&fis(command, 1, 0, 1, device), state)
    {
        Plan::Write(transfer) => transfer.durable,
        other => panic!("{other:?}"),
    };
    assert!(!durable(&mut state, 0x35, 0x40));
    assert!(durable(&mut state, 0x3d, 0x40) && durable(&mut state, 0xce, 0x40));
    assert!(durable(&mut state, 0x61, 0xc0) && !durable(&mut state, 0x61, 0x40));
    state.writeback = false;
    assert!(durable(&mut state, 0x35, 0x40) && durable(&mut state, 0x61, 0x40));
}

#[test]
fn ranges_of_a_trim() {
    let (_file, disk) = disk(1000);
    let entry = |first: u64, count: u64| (first | count << 48).to_le_bytes();
    let list = [entry(8, 8), entry(0, 0), entry(992, 8)].concat();
    assert_eq!(disk.ranges(&list), Ok(vec![(4096, 4096), (992 * 512, 4096)]));
    assert_eq!(disk.ranges(&entry(993, 8)), Err(error::NOT_FOUND));
    assert_eq!(disk.ranges(&entry(0xffff_ffff_ffff, 1)), Err(error::NOT_FOUND));
}

#[test]
fn the_state_survives_being_saved() {
    let state = AtaState {
        queue_error: Some((3, TaskFile { status: 0x41, error: 4, ..TaskFile::default() })),
        writeback: false,
        ..AtaState::default()
    };
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<AtaState>(&text).unwrap(), state);
    assert_eq!(serde_json::from_str::<AtaState>("{}").unwrap(), AtaState::default());
}
