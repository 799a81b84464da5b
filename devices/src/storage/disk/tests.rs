//! A disk, as its initiator finds it.

use super::super::testing::{Image, Initiator};
use super::*;

const BLOCKS: u64 = 4096;

fn disk(image: &Image, read_only: bool) -> Arc<ScsiDisk> {
    let config = ScsiDiskConfig { serial: "serial-1".into(), block_4k: false };
    ScsiDisk::new(image.open(read_only), &config)
}

fn rig() -> (Image, Arc<ScsiDisk>, Initiator) {
    let image = Image::numbered(BLOCKS * 512);
    let disk = disk(&image, false);
    (image, disk, Initiator::new())
}

/// A CDB of 16 bytes with a block address and a count, as READ(16) has them.
fn long(opcode: u8, flags: u8, block: u64, count: u32) -> Vec<u8> {
    [&[opcode, flags][..], &block.to_be_bytes(), &count.to_be_bytes(), &[0, 0]].concat()
}

fn number(data: &[u8]) -> u32 {
    u32::from_le_bytes(data[..4].try_into().unwrap())
}

#[test]
fn identity() {
    let (_image, disk, mut initiator) = rig();
    let standard = initiator.good(&*disk, &[0x12, 0, 0, 0, 96, 0], &[], 96);
    assert_eq!(standard.len(), 66);
    assert_eq!(standard[..5], [0, 0, 5, 0x12, 61]);
    assert_eq!(&standard[8..36], b"LODGE   HARDDISK        1.0 ");
    assert_eq!(initiator.good(&*disk, &[0x12, 0, 0, 0, 36, 0], &[], 255).len(), 36);
    let pages = initiator.good(&*disk, &[0x12, 1, 0, 0, 255, 0], &[], 255);
    assert_eq!(pages, [0, 0, 0, 6, 0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    for page in &pages[5..] {
        let data = initiator.good(&*disk, &[0x12, 1, *page, 4, 0, 0], &[], 1024);
        assert_eq!(data[1], *page);
        assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])) + 4, data.len());
    }
    let serial = initiator.good(&*disk, &[0x12, 1, 0x80, 0, 255, 0], &[], 255);
    assert_eq!(&serial[4..], b"serial-1");
    let limits = initiator.good(&*disk, &[0x12, 1, 0xb0, 0, 255, 0], &[], 255);
    assert_eq!(limits.len(), 64);
    assert_eq!(limits[4..8], [1, 0, 0, 8], "granularity of 4 KiB");
    assert_eq!(limits[8..12], 0xffffu32.to_be_bytes());
    assert_eq!(limits[20..24], 0x20_0000u32.to_be_bytes(), "blocks of an unmapped range");
    assert_eq!(limits[24..28], 256u32.to_be_bytes());
    assert_eq!(limits[36..44], 0x20_0000u64.to_be_bytes(), "blocks of a write same");
    let provisioning = initiator.good(&*disk, &[0x12, 1, 0xb2, 0, 255, 0], &[], 255);
    assert_eq!(provisioning[4..], [0, 0xe0, 2, 0]);
    assert_eq!(initiator.fails(&*disk, &[0x12, 1, 0xc0, 0, 255, 0], &[], 255), (5, 0x24, 0));
    assert_eq!(initiator.fails(&*disk, &[0x12, 0, 0x80, 0, 255, 0], &[], 255), (5, 0x24, 0));
}

#[test]
fn capacity() {
    let (image, disk, mut initiator) = rig();
    let short = initiator.good(&*disk, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8);
    assert_eq!(short, [0, 0, 0x0f, 0xff, 0, 0, 2, 0]);
    let read_16 = long(0x9e, 0x10, 0, 32);
    let data = initiator.good(&*disk, &read_16, &[], 32);
    assert_eq!(data[..16], [0, 0, 0, 0, 0, 0, 0x0f, 0xff, 0, 0, 2, 0, 0, 3, 0x80, 0]);
    assert_eq!(initiator.fails(&*disk, &long(0x9e, 0x12, 0, 32), &[], 32), (5, 0x24, 0));
    drop(disk);
    let config = ScsiDiskConfig { serial: String::new(), block_4k: true };
    let large = ScsiDisk::new(image.open(false), &config);
    let data = initiator.good(&*large, &read_16, &[], 32);
    assert_eq!(data[..14], [0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0x10, 0, 0, 0]);
    let block = initiator.good(&*large, &long(0x88, 0, 3, 1), &[], 4096);
    assert_eq!((block.len(), number(&block)), (4096, 24));
}

#[test]
fn reads_of_every_length() {
    let (_image, disk, mut initiator) = rig();
    for (cdb, first, count) in [
        (vec![0x08, 0, 0x0f, 0xf0, 2, 0], 0xff0, 2),
        (vec![0x08, 0, 0, 0, 0, 0], 0, 256),
        (vec![0x28, 0, 0, 0, 0, 5, 0, 0, 7, 0], 5, 7),
        (vec![0x28, 0x18, 0, 0, 0x0f, 0xff, 0, 0, 1, 0], 4095, 1),
        (vec![0xa8, 0, 0, 0, 0, 9, 0, 0, 2, 0, 0, 0], 9, 512),
        (long(0x88, 0, 100, 3), 100, 3),
        (long(0x88, 0, 0, 4096), 0, 4096),
    ] {
        let data = initiator.good(&*disk, &cdb, &[], count * 512);
        assert_eq!(data.len() as u32, count * 512);
        for (at, sector) in data.chunks(512).enumerate() {
            assert_eq!(
                (number(sector), number(&sector[508..])),
                (first + at as u32, first + at as u32)
            );
        }
    }
    assert!(initiator.good(&*disk, &long(0x88, 0, 4096, 0), &[], 0).is_empty());
    let (reply, _) = initiator.ask(&*disk, &long(0x88, 0, 0, 2), &[], 1023);
    assert!(reply.overrun && reply.sense.is_none());
}

#[test]
fn what_is_not_there_is_out_of_range() {
    let (_image, disk, mut initiator) = rig();
    for cdb in [
        long(0x88, 0, 4096, 1),
        long(0x88, 0, u64::MAX, 1),
        long(0x88, 0, u64::MAX - 5, 8),
        long(0x88, 0, 0, 4097),
        long(0x8a, 0, 4095, 2),
        long(0x8f, 0, 4096, 1),
        long(0x91, 0, 4097, 0),
        long(0x93, 1, 4000, 97),
        vec![0x28, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0],
        vec![0xa8, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        vec![0x08, 0x1f, 0xff, 0xff, 1, 0],
    ] {
        assert_eq!(initiator.fails(&*disk, &cdb, &[], 1024), (5, 0x21, 0), "{cdb:02x?}");
    }
    let (reply, _) = initiator.ask(&*disk, &long(0x88, 0, 4096, 1), &[], 512);
    assert_eq!(reply.sense.unwrap().information, Some(4096));
    assert_eq!(initiator.fails(&*disk, &long(0x88, 0x20, 0, 1), &[], 512), (5, 0x24, 0));
}

#[test]
fn writes_of_every_length_arrive() {
    let (image, disk, mut initiator) = rig();
    let one = [1u8; 512];
    initiator.good(&*disk, &[0x0a, 0, 0, 1, 1, 0], &one, 0);
    initiator.good(&*disk, &[0x2a, 0x08, 0, 0, 0, 2, 0, 0, 1, 0], &one, 0);
    initiator.good(&*disk, &[0xaa, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0], &one, 0);
    initiator.good(&*disk, &long(0x8a, 0, 4, 1), &one, 0);
    initiator.good(&*disk, &[0x2e, 0x02, 0, 0, 0, 5, 0, 0, 1, 0], &one, 0);
    initiator.good(&*disk, &long(0x8e, 0, 6, 1), &one, 0);
    assert_eq!(image.bytes(512, 6 * 512), [1; 6 * 512]);
    assert_eq!(number(&image.bytes(7 * 512, 4)), 7);
    let (reply, _) = initiator.ask(&*disk, &long(0x8a, 0, 8, 2), &[2; 1023], 0);
    assert!(reply.overrun);
    assert_eq!(number(&image.bytes(8 * 512, 4)), 8, "not a byte was written");
}

#[test]
fn verify_compares() {
    let (image, disk, mut initiator) = rig();
    let mut data = image.bytes(512, 1024);
    initiator.good(&*disk, &[0x2f, 0x02, 0, 0, 0, 1, 0, 0, 2, 0], &data, 0);
    initiator.good(&*disk, &[0x2f, 0, 0, 0, 0, 1, 0, 0, 2, 0], &[], 0);
    data[700] ^= 1;
    let (reply, _) = initiator.ask(&*disk, &long(0x8f, 0x02, 1, 2), &data, 0);
    assert_eq!(reply.sense, Some(Sense::MISCOMPARE.at(700)));
    assert_eq!(initiator.fails(&*disk, &long(0x8f, 0x04, 1, 2), &data, 0), (5, 0x24, 0));
}

#[test]
fn a_large_compare_goes_in_pieces() {
    let image = Image::empty(4 << 20);
    let (disk, mut initiator) = (disk(&image, false), Initiator::new());
    let mut data = vec![0; 2 << 20];
    data[0x1f_ffff] = 1;
    let (reply, _) = initiator.ask(&*disk, &long(0x8f, 0x02, 1, 4096), &data, 0);
    assert_eq!(reply.sense, Some(Sense::MISCOMPARE.at(0x1f_ffff)));
}

fn unmap(ranges: &[(u64, u32)]) -> (Vec<u8>, Vec<u8>) {
    let bytes = ranges.len() as u16 * 16;
    let mut list = [(bytes + 6).to_be_bytes(), bytes.to_be_bytes()].concat();
    list.extend_from_slice(&[0; 4]);
    for (first, count) in ranges {
        list.extend_from_slice(&first.to_be_bytes());
        list.extend_from_slice(&count.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    let [high, low] = (list.len() as u16).to_be_bytes();
    (vec![0x42, 0, 0, 0, 0, 0, 0, high, low, 0], list)
}

#[test]
fn unmap_gives_ranges_back() {
    let (image, disk, mut initiator) = rig();
    let (cdb, list) = unmap(&[(8, 8), (64, 16), (0, 0)]);
    initiator.good(&*disk, &cdb, &list, 0);
    assert_eq!(image.bytes(8 * 512, 4096), [0; 4096]);
    assert_eq!(image.bytes(64 * 512, 8192), [0; 8192]);
    assert_eq!(number(&image.bytes(16 * 512, 4)), 16);
    let (cdb, list) = unmap(&[(24, 8), (4096, 1)]);
    assert_eq!(initiator.fails(&*disk, &cdb, &list, 0), (5, 0x21, 0));
    assert_eq!(number(&image.bytes(24 * 512, 4)), 24, "all or nothing");
    let (cdb, list) = unmap(&vec![(0, 1); 257]);
    assert_eq!(initiator.fails(&*disk, &cdb, &list, 0), (5, 0x26, 0));
    let (mut cdb, list) = unmap(&[(0, 1)]);
    assert_eq!(
        initiator.fails(&*disk, &[0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0], &list, 0),
        (5, 0x24, 0)
    );
    let (reply, _) = initiator.ask(&*disk, &cdb, &list[..20], 0);
    assert!(reply.overrun);
    cdb[8] = 23;
    assert_eq!(initiator.fails(&*disk, &cdb, &list, 0), (5, 0x1a, 0));
    cdb[8] = 7;
    assert_eq!(initiator.fails(&*disk, &cdb, &list, 0), (5, 0x1a, 0));
    cdb[8] = 0;
    initiator.good(&*disk, &cdb, &[], 0);
}

#[test]
fn write_same_repeats_a_block() {
    let (image, disk, mut initiator) = rig();
    let block: Vec<u8> = (0..512).map(|i| i as u8).collect();
    initiator.good(&*disk, &long(0x93, 0, 10, 4000), &block, 0);
    assert_eq!(image.bytes(10 * 512, 512), block);
    assert_eq!(image.bytes(4009 * 512, 512), block);
    assert_eq!(number(&image.bytes(4010 * 512, 4)), 4010);
    initiator.good(&*disk, &long(0x93, 0x08, 16, 8), &[0; 512], 0);
    assert_eq!(image.bytes(16 * 512, 4096), [0; 4096]);
    initiator.good(&*disk, &long(0x93, 0x01, 32, 8), &[], 0);
    assert_eq!(image.bytes(32 * 512, 4096), [0; 4096]);
    initiator.good(&*disk, &[0x41, 0, 0, 0, 0, 40, 0, 0, 2, 0], &[0; 512], 0);
    assert_eq!(image.bytes(40 * 512, 1024), [0; 1024]);
    assert_eq!(initiator.fails(&*disk, &long(0x93, 0, 0, 0), &[0; 512], 0), (5, 0x24, 0));
    assert_eq!(initiator.fails(&*disk, &long(0x93, 0x10, 0, 1), &[0; 512], 0), (5, 0x24, 0));
    let (reply, _) = initiator.ask(&*disk, &long(0x93, 0, 0, 1), &[0; 511], 0);
    assert!(reply.overrun);
}

#[test]
fn a_read_only_disk_refuses_and_says_so() {
    let image = Image::numbered(1 << 20);
    let (disk, mut initiator) = (disk(&image, true), Initiator::new());
    for cdb in
        [long(0x8a, 0, 0, 1), long(0x93, 1, 0, 1), vec![0x0a, 0, 0, 0, 1, 0], long(0x8e, 0, 0, 1)]
    {
        assert_eq!(initiator.fails(&*disk, &cdb, &[0; 512], 0), (7, 0x27, 0), "{cdb:02x?}");
    }
    let (cdb, list) = unmap(&[(0, 8)]);
    assert_eq!(initiator.fails(&*disk, &cdb, &list, 0), (5, 0x20, 0));
    let mode = initiator.good(&*disk, &[0x1a, 0, 0x3f, 0, 255, 0], &[], 255);
    assert_eq!(mode[2] & 0x80, 0x80);
    initiator.good(&*disk, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0);
    let provisioning = initiator.good(&*disk, &[0x12, 1, 0xb2, 0, 255, 0], &[], 255);
    assert_eq!(provisioning[4..], [0; 4]);
}

#[test]
fn mode_pages_are_sensed_and_selected() {
    let (_image, disk, mut initiator) = rig();
    let caching = initiator.good(&*disk, &[0x1a, 0x08, 0x08, 0, 255, 0], &[], 255);
    assert_eq!(caching.len(), 24);
    assert_eq!(caching[..7], [23, 0, 0x10, 0, 0x08, 18, 4]);
    let long_form = initiator.good(&*disk, &[0x5a, 0x10, 0x3f, 0, 0, 0, 0, 2, 0, 0], &[], 512);
    assert_eq!(usize::from(u16::from_be_bytes([long_form[0], long_form[1]])) + 2, long_form.len());
    assert_eq!((long_form[4], long_form[7]), (1, 16));
    assert_eq!(long_form[8..16], BLOCKS.to_be_bytes());
    let changeable = initiator.good(&*disk, &[0x1a, 0x08, 0x48, 0, 255, 0], &[], 255);
    assert_eq!(changeable[4..8], [8, 18, 4, 0]);
    assert_eq!(initiator.fails(&*disk, &[0x1a, 0, 0xc8, 0, 255, 0], &[], 255), (5, 0x39, 0));
    assert_eq!(initiator.fails(&*disk, &[0x1a, 0, 0x2a, 0, 255, 0], &[], 255), (5, 0x24, 0));
    assert_eq!(initiator.fails(&*disk, &[0x1a, 0, 0x08, 1, 255, 0], &[], 255), (5, 0x24, 0));
    // WCE off, as Linux does it: the page as it was read, in a list with an empty header.
    let mut list = vec![0; 4];
    list.extend_from_slice(&caching[4..]);
    list[6] = 0;
    initiator.good(&*disk, &[0x15, 0x10, 0, 0, 24, 0], &list, 0);
    let caching = initiator.good(&*disk, &[0x1a, 0x08, 0x08, 0, 255, 0], &[], 255);
    assert_eq!(caching[6], 0);
    let default = initiator.good(&*disk, &[0x1a, 0x08, 0x88, 0, 255, 0], &[], 255);
    assert_eq!(default[6], 4);
    list[7] = 1;
    assert_eq!(initiator.fails(&*disk, &[0x15, 0x10, 0, 0, 24, 0], &list, 0), (5, 0x26, 0));
    assert_eq!(initiator.fails(&*disk, &[0x15, 0x11, 0, 0, 24, 0], &list, 0), (5, 0x24, 0));
    assert_eq!(initiator.fails(&*disk, &[0x15, 0x10, 0, 0, 23, 0], &list, 0), (5, 0x1a, 0));
    assert_eq!(initiator.fails(&*disk, &[0x15, 0x10, 0, 0, 3, 0], &list, 0), (5, 0x1a, 0));
    let (reply, _) = initiator.ask(&*disk, &[0x55, 0x10, 0, 0, 0, 0, 0, 0, 99, 0], &list, 0);
    assert!(reply.overrun);
    // Sense data in descriptors.
    let mut list = vec![0; 8];
    list.extend_from_slice(&[0x0a, 10, 4, 0x10, 0, 0, 0, 0, 0, 0, 0, 0]);
    initiator.good(&*disk, &[0x55, 0x10, 0, 0, 0, 0, 0, 0, 20, 0], &list, 0);
    assert!(disk.descriptor_sense());
    let state = serde_json::to_string(&disk.state()).unwrap();
    disk.power_on();
    assert!(!disk.descriptor_sense() && lock(&disk.state).writeback);
    assert!(disk.restore(&serde_json::from_str(&state).unwrap()));
    assert!(disk.descriptor_sense() && !lock(&disk.state).writeback);
}

#[test]
fn commands_without_effect_and_commands_that_are_not_there() {
    let (_image, disk, mut initiator) = rig();
    for cdb in [
        &[0x00, 0, 0, 0, 0, 0][..],
        &[0x1b, 0, 0, 0, 0, 0],
        &[0x1b, 0, 0, 0, 1, 0],
        &[0x1e, 0, 0, 0, 1, 0],
        &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert!(initiator.good(&*disk, cdb, &[], 0).is_empty());
    }
    let sense = initiator.good(&*disk, &[0x03, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!(sense[..3], [0x70, 0, 0]);
    // PERSISTENT RESERVE IN and OUT, and everything else.
    let known = [
        0x00, 0x01, 0x03, 0x08, 0x0a, 0x0b, 0x12, 0x15, 0x16, 0x17, 0x1a, 0x1b, 0x1d, 0x1e, 0x25,
        0x28, 0x2a, 0x2b, 0x2e, 0x2f, 0x35, 0x41, 0x42, 0x55, 0x56, 0x57, 0x5a, 0x88, 0x8a, 0x8e,
        0x8f, 0x91, 0x93, 0x9e, 0xa8, 0xaa, 0xae, 0xaf,
    ];
    for opcode in (0..=255).filter(|opcode| !known.contains(opcode)) {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        assert_eq!(initiator.fails(&*disk, &cdb, &[], 255), (5, 0x20, 0), "{opcode:02x}");
    }
}

#[test]
fn a_reset_is_told_once() {
    let (_image, disk, mut initiator) = rig();
    disk.reset();
    disk.reset();
    initiator.good(&*disk, &[0x12, 0, 0, 0, 36, 0], &[], 36);
    assert_eq!(initiator.fails(&*disk, &[0; 6], &[], 0), (6, 0x29, 3));
    initiator.good(&*disk, &[0; 6], &[], 0);
    disk.attention(Sense::LUNS_CHANGED);
    let sense = initiator.good(&*disk, &[0x03, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!((sense[2], sense[12], sense[13]), (6, 0x3f, 0x0e));
    initiator.good(&*disk, &[0; 6], &[], 0);
}

#[test]
fn random_commands_do_no_harm() {
    let image = Image::numbered(1 << 20);
    let (disk, mut initiator) = (disk(&image, false), Initiator::new());
    let mut seed = 11u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as u8
    };
    for _ in 0..4000 {
        let cdb: Vec<u8> = (0..16).map(|_| next() & next()).collect();
        let out: Vec<u8> = (0..usize::from(next()) * 8).map(|_| next()).collect();
        initiator.ask(&*disk, &cdb, &out, u32::from(next()) * 16);
    }
    disk.power_on();
    initiator.good(&*disk, &long(0x88, 0, 0, 16), &[], 8192);
}
