//! A drive, as its initiator and its owner find it.

use super::super::testing::{Image, Initiator};
use super::*;

/// Blocks of the disc.
const BLOCKS: u32 = 1000;

fn rig() -> (Image, Arc<CdRom>, Initiator) {
    let image = Image::numbered(u64::from(BLOCKS) * BLOCK);
    let config = CdRomConfig { serial: "cd-1".into() };
    let drive = CdRom::new(&config, Some(image.open(true)));
    (image, drive, Initiator::new())
}

fn read_10(first: u32, count: u16) -> Vec<u8> {
    [&[0x28, 0][..], &first.to_be_bytes(), &[0], &count.to_be_bytes(), &[0]].concat()
}

fn event(initiator: &mut Initiator, drive: &CdRom) -> (u8, u8) {
    let data = initiator.good(drive, &[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0], &[], 8);
    assert_eq!(data[..4], [0, 6, 4, 0x10]);
    (data[4], data[5])
}

#[derive(Default)]
struct Log(Mutex<Vec<DoorEvent>>);

impl Watcher for Log {
    fn door(&self, event: DoorEvent) {
        self.0.lock().unwrap().push(event);
    }
}

#[test]
fn the_disc_is_read() {
    let (image, drive, mut initiator) = rig();
    let capacity = initiator.good(&*drive, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8);
    assert_eq!(capacity, [0, 0, 3, 0xe7, 0, 0, 8, 0]);
    assert_eq!(initiator.good(&*drive, &read_10(10, 5), &[], 10240), image.bytes(20480, 10240));
    let long = [0xa8, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0];
    assert_eq!(initiator.good(&*drive, &long, &[], 4096), image.bytes(6144, 4096));
    assert_eq!(initiator.fails(&*drive, &read_10(BLOCKS, 1), &[], 2048), (5, 0x21, 0));
    assert_eq!(initiator.fails(&*drive, &read_10(u32::MAX, 2), &[], 4096), (5, 0x21, 0));
    assert!(initiator.ask(&*drive, &read_10(0, 2), &[], 4095).0.overrun);
    drive.set_atapi();
    assert_eq!(initiator.good(&*drive, &read_10(0, 2), &[], 4000), image.bytes(0, 4000));
    for write in [0x2a, 0x0a, 0x35, 0x5e, 0x5f, 0xaa, 0xa1] {
        let cdb = [write, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(initiator.fails(&*drive, &cdb, &[0; 2048], 0), (5, 0x20, 0));
    }
}

#[test]
fn a_partial_last_block_ends_in_zeroes() {
    let image = Image::numbered(3 * 2048 + 512);
    let drive = CdRom::new(&CdRomConfig::default(), Some(image.open(true)));
    let mut initiator = Initiator::new();
    let capacity = initiator.good(&*drive, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8);
    assert_eq!(capacity[..4], [0, 0, 0, 3]);
    let data = initiator.good(&*drive, &read_10(2, 2), &[], 4096);
    assert_eq!(data[..2560], image.bytes(4096, 2560));
    assert_eq!(data[2560..], [0; 1536]);
    let whole = [0xbe, 0, 0, 0, 0, 3, 0, 0, 1, 0xf8, 0, 0];
    let data = initiator.good(&*drive, &whole, &[], 2352);
    assert_eq!(data[16..528], image.bytes(6144, 512));
    assert_eq!(data[528..2064], [0; 1536]);
}

#[test]
fn whole_sectors_are_read() {
    let (image, drive, mut initiator) = rig();
    let cdb = |flags| [0xbe, 0, 0, 0, 0, 16, 0, 2, 0x58, flags, 0, 0];
    let plain = initiator.good(&*drive, &cdb(0x10), &[], 600 * 2048);
    assert_eq!(plain, image.bytes(16 * 2048, 600 * 2048));
    let data = initiator.good(&*drive, &cdb(0xf8), &[], 600 * 2352);
    assert_eq!(data.len(), 600 * 2352);
    for (at, sector) in data.chunks(2352).enumerate() {
        assert_eq!(sector[16..2064], plain[at * 2048..][..2048]);
        let [minute, second, frame] = sector::msf(16 + at as u32);
        let bcd = |value| value / 10 * 16 + value % 10;
        assert_eq!(sector[12..16], [bcd(minute), bcd(second), bcd(frame), 1]);
    }
    // From 00:02:16 to 00:02:18.
    let time = [0xb9, 0, 0, 0, 2, 16, 0, 2, 18, 0x10, 0, 0];
    assert_eq!(initiator.good(&*drive, &time, &[], 4096), plain[..4096]);
    let mut audio = cdb(0x10);
    audio[1] = 1 << 2;
    assert_eq!(initiator.fails(&*drive, &audio, &[], 2048), (5, 0x64, 0));
    assert_eq!(initiator.fails(&*drive, &cdb(0x90), &[], 2048), (5, 0x24, 0));
    assert!(initiator.good(&*drive, &cdb(0), &[], 0).is_empty());
}

#[test]
fn table_of_contents() {
    let (_image, drive, mut initiator) = rig();
    let toc = |initiator: &mut Initiator, flags, format, track| {
        initiator.good(&*drive, &[0x43, flags, format, 0, 0, 0, track, 3, 0x24, 0], &[], 804)
    };
    assert_eq!(
        toc(&mut initiator, 0, 0, 1),
        [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 3, 0xe8]
    );
    assert_eq!(
        toc(&mut initiator, 2, 0, 0),
        [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 2, 0, 0, 0x14, 0xaa, 0, 0, 0, 15, 25]
    );
    assert_eq!(toc(&mut initiator, 0, 0, 0xaa).len(), 12);
    assert_eq!(toc(&mut initiator, 0, 1, 0), [0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    let raw = toc(&mut initiator, 2, 2, 0);
    assert_eq!((raw.len(), raw[1]), (48, 46));
    assert_eq!(raw[26..37], [1, 0x14, 0, 0xa2, 0, 0, 0, 0, 0, 15, 25]);
    for (format, track) in [(3, 0), (4, 0), (5, 0), (0, 2)] {
        let cdb = [0x43, 0, format, 0, 0, 0, track, 0, 255, 0];
        assert_eq!(initiator.fails(&*drive, &cdb, &[], 255), (5, 0x24, 0));
    }
    // The format where SFF-8020 had it.
    let old = initiator.good(&*drive, &[0x43, 0, 0, 0, 0, 0, 0, 0, 12, 0x40], &[], 12);
    assert_eq!(old[1], 10);
}

#[test]
fn configuration_and_information() {
    let (_image, drive, mut initiator) = rig();
    let cdb = |which, feature| [0x46, which, 0, feature, 0, 0, 0, 4, 0, 0];
    let all = initiator.good(&*drive, &cdb(0, 0), &[], 1024);
    assert_eq!(u32::from_be_bytes(all[..4].try_into().unwrap()) as usize + 4, all.len());
    assert_eq!(all[6..8], [0, 8], "a CD");
    assert_eq!(all[8..20], [0, 0, 3, 8, 0, 0x10, 0, 0, 0, 8, 1, 0]);
    // Features follow each other to the end, in order.
    let (mut at, mut last) = (8, -1);
    while at < all.len() {
        let code = i32::from(u16::from_be_bytes([all[at], all[at + 1]]));
        assert!(code > last);
        last = code;
        at += 4 + usize::from(all[at + 3]);
    }
    assert_eq!(at, all.len());
    let one = initiator.good(&*drive, &cdb(2, 0x1e), &[], 1024);
    assert_eq!(one[8..], [0, 0x1e, 9, 4, 0, 0, 0, 0]);
    let current = initiator.good(&*drive, &cdb(1, 0), &[], 1024);
    assert!(current.len() < all.len());
    assert_eq!(initiator.good(&*drive, &cdb(2, 0x80), &[], 1024).len(), 8);
    let disc = initiator.good(&*drive, &[0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0], &[], 34);
    assert_eq!(disc[..8], [0, 32, 0x0e, 1, 1, 1, 1, 0x20]);
    for (kind, number) in [(0, 999), (1, 1), (2, 1)] {
        let cdb = [0x52, kind, 0, 0, (number >> 8) as u8, number as u8, 0, 0, 36, 0];
        let track = initiator.good(&*drive, &cdb, &[], 36);
        assert_eq!((track[2], &track[24..28]), (1, &BLOCKS.to_be_bytes()[..]));
    }
    let beyond = [0x52, 0, 0, 0, 3, 0xe8, 0, 0, 36, 0];
    assert_eq!(initiator.fails(&*drive, &beyond, &[], 36), (5, 0x21, 0));
    let structure = [0xad, 0, 0, 0, 0, 0, 0, 0, 8, 4, 0, 0];
    assert_eq!(initiator.fails(&*drive, &structure, &[], 2052), (5, 0x30, 2));
    assert_eq!(
        initiator.good(&*drive, &[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], &[], 8),
        [0, 0, 0, 0, 0, 1, 0, 0]
    );
}

#[test]
fn a_large_disc_is_a_dvd() {
    let image = Image::empty(u64::from(CD_BLOCKS + 1) * BLOCK);
    let drive = CdRom::new(&CdRomConfig::default(), Some(image.open(true)));
    let mut initiator = Initiator::new();
    let all = initiator.good(&*drive, &[0x46, 0, 0, 0, 0, 0, 0, 4, 0, 0], &[], 1024);
    assert_eq!(all[6..8], [0, 0x10]);
    let physical = initiator.good(&*drive, &[0xad, 0, 0, 0, 0, 0, 0, 0, 8, 4, 0, 0], &[], 2052);
    assert_eq!(physical[..8], [8, 2, 0, 0, 1, 0x0f, 1, 0]);
    assert_eq!(physical[12..16], (0x3_0000 + CD_BLOCKS).to_be_bytes());
    let list = initiator.good(&*drive, &[0xad, 0, 0, 0, 0, 0, 0, 0xff, 0, 255, 0, 0], &[], 255);
    assert_eq!((list.len(), list[1]), (16, 14));
    let layer = [0xad, 0, 0, 0, 0, 0, 1, 0, 8, 4, 0, 0];
    assert_eq!(initiator.fails(&*drive, &layer, &[], 2052), (5, 0x24, 0));
}

#[test]
fn mode_pages() {
    let (_image, drive, mut initiator) = rig();
    let page = initiator.good(&*drive, &[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 128, 0], &[], 128);
    assert_eq!(page[..8], [0, 28, 1, 0, 0, 0, 0, 0]);
    assert_eq!((page[8], page[9], page[14]), (0x2a, 20, 0x29));
    initiator.good(&*drive, &[0x1e, 0, 0, 0, 1, 0], &[], 0);
    let page = initiator.good(&*drive, &[0x1a, 0, 0x2a, 0, 128, 0], &[], 128);
    assert_eq!(page[4 + 6], 0x2b, "locked");
    let all = initiator.good(&*drive, &[0x5a, 0, 0x3f, 0, 0, 0, 0, 1, 0, 0], &[], 256);
    assert_eq!(usize::from(all[1]) + 2, all.len());
    assert_eq!(initiator.fails(&*drive, &[0x5a, 0, 8, 0, 0, 0, 0, 1, 0, 0], &[], 9), (5, 0x24, 0));
    // Linux sets the block length back to 2048.
    initiator.good(&*drive, &[0x15, 0x10, 0, 0, 12, 0], &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 8, 0], 0);
    let other = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 9, 0];
    assert_eq!(initiator.fails(&*drive, &[0x15, 0x10, 0, 0, 12, 0], &other, 0), (5, 0x26, 0));
}

#[test]
fn an_empty_drive_says_so() {
    let drive = CdRom::new(&CdRomConfig::default(), None);
    let mut initiator = Initiator::new();
    for cdb in [
        vec![0; 6],
        read_10(0, 1),
        vec![0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![0x43, 0, 0, 0, 0, 0, 0, 0, 12, 0],
        vec![0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0],
        vec![0x52, 0, 0, 0, 0, 0, 0, 0, 34, 0],
        vec![0xbe, 0, 0, 0, 0, 0, 0, 0, 1, 0x10, 0, 0],
    ] {
        assert_eq!(initiator.fails(&*drive, &cdb, &[], 2048), (2, 0x3a, 1), "{cdb:02x?}");
    }
    assert_eq!(event(&mut initiator, &drive), (0, 0));
    let all = initiator.good(&*drive, &[0x46, 0, 0, 0, 0, 0, 0, 4, 0, 0], &[], 1024);
    assert_eq!(all[6..8], [0, 0]);
    initiator.good(&*drive, &[0x12, 0, 0, 0, 36, 0], &[], 36);
    let sense = initiator.good(&*drive, &[0x03, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!((sense[2], sense[12], sense[13]), (2, 0x3a, 1));
    let mode = initiator.good(&*drive, &[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 128, 0], &[], 128);
    assert_eq!(mode[2], 0x70);
}

#[test]
fn media_are_changed_while_the_guest_runs() {
    let (_image, drive, mut initiator) = rig();
    let log = Arc::new(Log::default());
    let watcher: Arc<dyn Watcher> = log.clone();
    drive.watch(Arc::downgrade(&watcher));
    assert_eq!(event(&mut initiator, &drive), (0, 2));
    drive.eject(false).unwrap();
    assert_eq!(initiator.fails(&*drive, &[0; 6], &[], 0), (2, 0x3a, 2));
    assert_eq!(event(&mut initiator, &drive), (3, 1));
    assert_eq!(event(&mut initiator, &drive), (0, 1));
    let other = Image::empty(2 << 20);
    drive.insert(other.open(true)).unwrap();
    assert_eq!(initiator.fails(&*drive, &[0; 6], &[], 0), (6, 0x28, 0), "once");
    initiator.good(&*drive, &[0; 6], &[], 0);
    assert_eq!(event(&mut initiator, &drive), (2, 2));
    assert_eq!(initiator.good(&*drive, &read_10(1, 1), &[], 2048), [0; 2048]);
    assert_eq!(*log.0.lock().unwrap(), [DoorEvent::Changed, DoorEvent::Changed]);
}

#[test]
fn a_locked_tray_keeps_its_medium() {
    let (_image, drive, mut initiator) = rig();
    let other = Image::empty(2 << 20);
    initiator.good(&*drive, &[0x1e, 0, 0, 0, 1, 0], &[], 0);
    assert_eq!(drive.eject(false), Err(Locked));
    assert_eq!(drive.insert(other.open(true)), Err(Locked));
    assert_eq!(initiator.fails(&*drive, &[0x1b, 0, 0, 0, 2, 0], &[], 0), (5, 0x53, 2));
    assert_eq!(event(&mut initiator, &drive), (1, 2), "somebody wants it out");
    // The persistent lock is another one.
    initiator.good(&*drive, &[0x1e, 0, 0, 0, 3, 0], &[], 0);
    initiator.good(&*drive, &[0x1e, 0, 0, 0, 0, 0], &[], 0);
    assert!(drive.is_locked());
    drive.eject(true).unwrap();
    assert!(!drive.is_locked() && drive.is_open() && !drive.has_medium());
    assert_eq!(event(&mut initiator, &drive), (3, 1));
    drive.insert(other.open(true)).unwrap();
    assert!(!drive.is_open());
}

#[test]
fn the_guest_opens_and_closes_the_tray() {
    let (image, drive, mut initiator) = rig();
    let log = Arc::new(Log::default());
    let watcher: Arc<dyn Watcher> = log.clone();
    drive.watch(Arc::downgrade(&watcher));
    initiator.good(&*drive, &[0x1b, 0, 0, 0, 2, 0], &[], 0);
    assert!(drive.is_open() && drive.has_medium());
    assert_eq!(initiator.fails(&*drive, &read_10(0, 1), &[], 2048), (2, 0x3a, 2));
    // A reset of the machine leaves it open: it boots from something else.
    drive.power_on();
    assert!(drive.is_open());
    let state = serde_json::to_string(&drive.state()).unwrap();
    initiator.good(&*drive, &[0x1b, 0, 0, 0, 3, 0], &[], 0);
    assert_eq!(initiator.fails(&*drive, &[0; 6], &[], 0), (6, 0x28, 0));
    assert_eq!(initiator.good(&*drive, &read_10(0, 1), &[], 2048), image.bytes(0, 2048));
    assert_eq!(*log.0.lock().unwrap(), [DoorEvent::OpenedByGuest, DoorEvent::ClosedByGuest]);
    assert!(drive.restore(&serde_json::from_str(&state).unwrap()));
    assert!(drive.is_open());
    assert!(!drive.restore(&UnitState::Disk(Default::default())));
}

#[test]
fn events_of_other_classes() {
    let (_image, drive, mut initiator) = rig();
    let none = initiator.good(&*drive, &[0x4a, 1, 0, 0, 0x40, 0, 0, 0, 8, 0], &[], 8);
    assert_eq!(none, [0, 2, 0x80, 0x10]);
    let asynchronous = [0x4a, 0, 0, 0, 0x10, 0, 0, 0, 8, 0];
    assert_eq!(initiator.fails(&*drive, &asynchronous, &[], 8), (5, 0x24, 0));
    drive.eject(false).unwrap();
    let head = initiator.good(&*drive, &[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 4, 0], &[], 8);
    assert_eq!(head, [0, 6, 4, 0x10]);
    assert_eq!(event(&mut initiator, &drive).0, 3, "the event has waited");
}

#[test]
fn random_commands_do_no_harm() {
    let (image, drive, mut initiator) = rig();
    let mut seed = 3u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as u8
    };
    for _ in 0..6000 {
        let cdb: Vec<u8> = (0..16).map(|_| next() & next()).collect();
        let out: Vec<u8> = (0..usize::from(next()) / 4).map(|_| next()).collect();
        initiator.ask(&*drive, &cdb, &out, u32::from(next()) * 16);
    }
    drive.eject(true).unwrap();
    drive.insert(image.open(true)).unwrap();
    drive.power_on();
    initiator.good(&*drive, &read_10(0, 1), &[], 2048);
}

#[test]
fn no_command_moves_more_than_its_length() {
    let (_image, drive, mut initiator) = rig();
    let mut seed = 9u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as u8
    };
    for round in 0..20_000 {
        let mut cdb = [0; 16];
        cdb[0] = (round % 256) as u8;
        cdb[1..].iter_mut().for_each(|byte| *byte = next() & next() & next());
        if round % 3 == 0 {
            cdb[3] = 0;
            cdb[6] = 0;
        }
        let (reply, data) = initiator.ask(&*drive, &cdb, &[], 1 << 20);
        let most = data_length(&super::super::Cdb::new(&cdb));
        assert!(
            data.len() as u64 <= most,
            "{cdb:02x?}: {} of {most}, {:?}",
            data.len(),
            reply.sense
        );
        let _ = drive.move_tray(false);
    }
}
