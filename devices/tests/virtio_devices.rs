//! What each virtio device does for its guest, seen through the driver's side.

mod support;

use std::sync::Arc;

use lodge_devices::input::{Button, InputDevice, InputEvent, Key, RANGE};
use lodge_devices::virtio::{
    Block, BlockConfig, Console, ConsoleHandle, Input, InputHandle, InputKind, Net, NetConfig,
    NetHandle, Rng, feature, status,
};
use lodge_memory::page_table;
use lodge_net::{Backend, Offloads};
use support::backends::{Cable, MemoryDisk, Plug, Screen, SharedDisk};
use support::driver::{Driver, Interrupts, WRITE, common};
use support::{Machine, wait};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const HEADER: u64 = 0x20_0000;
const DATA: u64 = 0x20_1000;
const STATUS: u64 = 0x20_3000;

mod block {
    use super::*;

    const F_FLUSH: u64 = 1 << 9;
    const F_CONFIG_WCE: u64 = 1 << 11;

    fn disk(disk: MemoryDisk, queues: u16) -> (Arc<MemoryDisk>, Driver) {
        let disk = Arc::new(disk);
        let config = BlockConfig { serial: "S3R1AL".into(), queues };
        let device = Block::new("disk", Arc::new(SharedDisk(disk.clone())), &config);
        (disk, Driver::new(Machine::new(Box::new(device))))
    }

    fn memory_disk() -> MemoryDisk {
        Arc::into_inner(MemoryDisk::new(64 * 512)).unwrap()
    }

    /// Asks; returns the status byte and the used length.
    fn ask(driver: &mut Driver, kind: u32, sector: u64, parts: &[(u64, u32, u16)]) -> (u8, u32) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        driver.memory().write_slice(&header, GuestAddress(HEADER)).unwrap();
        driver.memory().write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let chain = [&[(HEADER, 16, 0)][..], parts, &[(STATUS, 1, WRITE)]].concat();
        let len = driver.ask(0, &chain);
        (driver.memory().read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    #[test]
    fn reads_and_writes_reach_the_disk() {
        let (disk, mut driver) = disk(memory_disk(), 1);
        driver.start_all();
        driver.memory().write_slice(&[7; 1536], GuestAddress(DATA)).unwrap();
        assert_eq!(ask(&mut driver, 1, 2, &[(DATA, 1000, 0), (DATA + 1000, 24, 0)]), (0, 1));
        let expected = [vec![0; 1024], vec![7; 1024], vec![0; 512]].concat();
        assert_eq!(disk.data.lock().unwrap()[..2560], expected);
        // Reading marks the pages that the disk filled.
        let table = page_table(driver.memory().iter().next().unwrap()).clone();
        table.take_dirty();
        let parts = [(DATA + 0x1000, 512, WRITE), (DATA + 0x1200, 512, WRITE)];
        assert_eq!(ask(&mut driver, 0, 3, &parts), (0, 1025));
        let page = (DATA + 0x1000) as usize / 4096;
        assert_ne!(table.take_dirty()[page / 64] & 1 << (page % 64), 0);
        let mut data = [1; 1024];
        driver.memory().read_slice(&mut data, GuestAddress(DATA + 0x1000)).unwrap();
        assert_eq!(data[..512], [7; 512]);
        assert_eq!(data[512..], [0; 512]);
    }

    #[test]
    fn the_driver_may_cut_requests_as_it_likes() {
        let (disk, mut driver) = disk(memory_disk(), 1);
        driver.start_all();
        // Header, data and status in pieces of odd sizes.
        let header = [&1u64.to_le_bytes()[..], &5u64.to_le_bytes(), &[9; 512]].concat();
        driver.memory().write_slice(&header, GuestAddress(HEADER)).unwrap();
        driver.ask(
            0,
            &[(HEADER, 5, 0), (HEADER + 5, 30, 0), (HEADER + 35, 493, 0), (STATUS, 1, WRITE)],
        );
        assert_eq!(disk.data.lock().unwrap()[5 * 512..6 * 512], [9; 512]);
        driver.memory().write_obj(0u32, GuestAddress(HEADER)).unwrap();
        let len = driver.ask(0, &[(HEADER, 16, 0), (DATA, 100, WRITE), (DATA + 100, 413, WRITE)]);
        assert_eq!(len, 513);
        let status: u8 = driver.memory().read_obj(GuestAddress(DATA + 512)).unwrap();
        assert_eq!(status, 0);
    }

    #[test]
    fn errors_stay_with_their_request() {
        let mut bad = memory_disk();
        bad.bad = Some(8 * 512);
        let (_disk, mut driver) = disk(bad, 1);
        driver.start_all();
        assert_eq!(ask(&mut driver, 0, 8, &[(DATA, 512, WRITE)]), (1, 1));
        assert_eq!(ask(&mut driver, 0, 9, &[(DATA, 512, WRITE)]).0, 0);
        assert_eq!(ask(&mut driver, 0, 64, &[(DATA, 512, WRITE)]).0, 1, "beyond the end");
        assert_eq!(ask(&mut driver, 77, 0, &[]).0, 2, "unknown");
        assert_eq!(ask(&mut driver, 0, 0, &[(DATA, 512, WRITE)]).0, 0);
        assert_eq!(driver.status(), 15);
    }

    #[test]
    fn a_request_without_status_needs_a_reset() {
        let (_disk, mut driver) = disk(memory_disk(), 1);
        driver.start_all();
        driver.queues[0].add(&[(HEADER, 16, 0)]);
        driver.kick(0);
        wait("NEEDS_RESET", || driver.status() & status::NEEDS_RESET != 0);
    }

    #[test]
    fn identity_discard_and_zeroes() {
        let (disk, mut driver) = disk(memory_disk(), 1);
        driver.start_all();
        assert_eq!(ask(&mut driver, 8, 0, &[(DATA, 20, WRITE)]), (0, 21));
        let mut id = [1; 20];
        driver.memory().read_slice(&mut id, GuestAddress(DATA)).unwrap();
        assert_eq!(&id, b"S3R1AL\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        disk.data.lock().unwrap().fill(5);
        let range = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        driver.memory().write_slice(&range(8, 8, 0), GuestAddress(DATA)).unwrap();
        assert_eq!(ask(&mut driver, 11, 0, &[(DATA, 16, 0)]).0, 0);
        driver.memory().write_slice(&range(1, 1, 1), GuestAddress(DATA)).unwrap();
        assert_eq!(ask(&mut driver, 13, 0, &[(DATA, 16, 0)]).0, 0);
        let data = disk.data.lock().unwrap();
        assert!(data[512..1024].iter().chain(&data[4096..8192]).all(|byte| *byte == 0));
        assert!(data[..512].iter().chain(&data[1024..4096]).all(|byte| *byte == 5));
        drop(data);
        let log: Vec<_> = disk.log.lock().unwrap().iter().map(|(name, _)| *name).collect();
        assert_eq!(log, ["discard", "zero"]);
    }

    #[test]
    fn a_read_only_disk_says_so_and_is_not_written() {
        let (disk, mut driver) = disk(MemoryDisk { read_only: true, ..memory_disk() }, 1);
        let offered = driver.offered();
        assert_ne!(offered & 1 << 5, 0);
        assert_eq!(offered & (1 << 13 | 1 << 14), 0, "no discard, no write zeroes");
        driver.start_all();
        assert_eq!(ask(&mut driver, 1, 0, &[(DATA, 512, 0)]).0, 1);
        assert_eq!(ask(&mut driver, 13, 0, &[(DATA, 16, 0)]).0, 1);
        assert_eq!(ask(&mut driver, 0, 0, &[(DATA, 512, WRITE)]).0, 0);
        assert_eq!(disk.log.lock().unwrap().len(), 1);
    }

    #[test]
    fn without_a_cache_every_write_is_flushed() {
        let names = |disk: &MemoryDisk| -> Vec<&'static str> {
            std::mem::take(&mut *disk.log.lock().unwrap())
                .into_iter()
                .map(|(name, _)| name)
                .collect()
        };
        let (disk, mut driver) = disk(memory_disk(), 1);
        let offered = driver.offered();
        driver.start(offered, Interrupts::Msix);
        assert_eq!(driver.read::<1>(driver.config + 32), [1], "writeback");
        ask(&mut driver, 1, 0, &[(DATA, 512, 0)]);
        ask(&mut driver, 4, 0, &[]);
        assert_eq!(names(&disk), ["write", "flush"]);
        driver.write(driver.config + 32, &[0]);
        assert_eq!(driver.read::<1>(driver.config + 32), [0]);
        ask(&mut driver, 1, 0, &[(DATA, 512, 0)]);
        ask(&mut driver, 0, 0, &[(DATA, 512, WRITE)]);
        assert_eq!(names(&disk), ["write", "flush", "read"]);
        // A driver that cannot flush gets no cache.
        driver.next_round();
        driver.start(offered & !(F_FLUSH | F_CONFIG_WCE), Interrupts::Msix);
        ask(&mut driver, 1, 0, &[(DATA, 512, 0)]);
        assert_eq!(names(&disk), ["write", "flush"]);
        driver.next_round();
        driver.start(offered & !F_CONFIG_WCE, Interrupts::Msix);
        ask(&mut driver, 1, 0, &[(DATA, 512, 0)]);
        assert_eq!(names(&disk), ["write"]);
    }

    #[test]
    fn the_configuration_tells_size_and_queues() {
        let (_disk, driver) = disk(memory_disk(), 4);
        assert_ne!(driver.offered() & 1 << 12, 0, "multi-queue");
        assert_eq!(u64::from_le_bytes(driver.read(driver.config)), 64);
        assert_eq!(u32::from_le_bytes(driver.read(driver.config + 20)), 512);
        assert_eq!(u16::from_le_bytes(driver.read(driver.config + 34)), 4);
        assert_eq!(driver.read::<8>(driver.config + 60), [0; 8]);
    }
}

mod net {
    use super::*;

    const F_CSUM: u64 = 1 << 0;
    const F_GUEST_CSUM: u64 = 1 << 1;
    const F_GUEST_TSO4: u64 = 1 << 7;
    const F_HOST_TSO4: u64 = 1 << 11;
    const F_MERGEABLE: u64 = 1 << 15;
    const F_CONTROL: u64 = 1 << 17;
    const F_MULTI_QUEUE: u64 = 1 << 22;
    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn card(pairs: usize) -> (Vec<Arc<Cable>>, NetHandle, Driver) {
        let cables: Vec<_> = (0..pairs).map(|_| Cable::new()).collect();
        let plug = |cable: &Arc<Cable>| Box::new(Plug(cable.clone())) as Box<dyn Backend>;
        let config = NetConfig { mac: MAC, mtu: Some(9000) };
        let device = Net::new("net", cables.iter().map(plug).collect(), config).unwrap();
        let handle = device.handle();
        (cables, handle, Driver::new(Machine::new(Box::new(device))))
    }

    fn used(driver: &mut Driver, queue: usize) -> (u16, u32) {
        let mut used = None;
        wait("a used chain", || {
            used = driver.queues[queue].take_used();
            used.is_some()
        });
        used.unwrap()
    }

    fn bytes(driver: &Driver, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        driver.memory().read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }

    #[test]
    fn frames_are_spread_over_mergeable_buffers() {
        let (cables, _, mut driver) = card(1);
        driver.start_all();
        let frame: Vec<u8> = (0..2000).map(|i| i as u8).collect();
        cables[0].deliver(&frame);
        // Too few buffers: the frame waits, whole.
        let first = driver.queues[0].add(&[(DATA, 1000, WRITE)]);
        driver.kick(0);
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(driver.queues[0].used_index(), 0);
        let second = driver.queues[0].add(&[(DATA + 0x1000, 700, WRITE)]);
        driver.kick(0);
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(driver.queues[0].used_index(), 0);
        let third =
            driver.queues[0].add(&[(DATA + 0x2000, 100, WRITE), (DATA + 0x3000, 1000, WRITE)]);
        driver.queues[0].add(&[(DATA + 0x4000, 1000, WRITE)]);
        driver.kick(0);
        assert_eq!(used(&mut driver, 0), (first, 1000));
        assert_eq!(used(&mut driver, 0), (second, 700));
        assert_eq!(used(&mut driver, 0), (third, 312));
        assert!(driver.queues[0].take_used().is_none(), "the fourth is for the next frame");
        let got = [
            bytes(&driver, DATA, 1000),
            bytes(&driver, DATA + 0x1000, 700),
            bytes(&driver, DATA + 0x2000, 100),
            bytes(&driver, DATA + 0x3000, 212),
        ]
        .concat();
        assert_eq!(got[10..12], [3, 0], "number of buffers");
        assert_eq!(got[12..], frame);
    }

    #[test]
    fn without_mergeable_buffers_a_frame_has_one() {
        let (cables, _, mut driver) = card(1);
        driver.start(driver.simple_features() & !F_MERGEABLE, Interrupts::Msix);
        let small = driver.queues[0].add(&[(DATA, 100, WRITE)]);
        let large = driver.queues[0].add(&[(DATA + 0x1000, 1526, WRITE)]);
        cables[0].deliver(&[1; 1000]);
        cables[0].deliver(&[2; 1000]);
        driver.kick(0);
        assert_eq!(used(&mut driver, 0), (small, 0), "does not fit: lost");
        assert_eq!(used(&mut driver, 0), (large, 1012));
        assert_eq!(bytes(&driver, DATA + 0x1000 + 10, 3), [1, 0, 2]);
    }

    #[test]
    fn no_frame_is_lost_when_buffers_come_late() {
        let (cables, _, mut driver) = card(1);
        driver.start_all();
        for n in 0..500u16 {
            cables[0].deliver(&n.to_le_bytes().repeat(100));
        }
        // Buffers of 64 bytes: each frame needs four; they come in odd numbers, with kicks only
        // where the device asks for them.
        let mut got = Vec::new();
        let mut open = std::collections::VecDeque::new();
        let mut slot = 0u64;
        while got.len() < 500 * 212 {
            for _ in 0..3 {
                if driver.queues[0].room() == 0 {
                    break;
                }
                let gpa = 0x30_0000 + 64 * (slot % 1024);
                slot += 1;
                let old = driver.queues[0].next;
                let head = driver.queues[0].add(&[(gpa, 64, WRITE)]);
                open.push_back((head, gpa));
                let ring = &driver.queues[0];
                let event: u16 = driver
                    .memory()
                    .load(GuestAddress(ring.used + 4 + 8 * 64), std::sync::atomic::Ordering::SeqCst)
                    .unwrap();
                if ring.next.wrapping_sub(event).wrapping_sub(1) < ring.next.wrapping_sub(old) {
                    driver.kick(0);
                }
            }
            if driver.queues[0].room() == 0 {
                wait("used buffers", || driver.queues[0].used_index() != driver.queues[0].seen);
            }
            while let Some((head, len)) = driver.queues[0].take_used() {
                let (expected, gpa) = open.pop_front().unwrap();
                assert_eq!(head, expected, "in order");
                got.extend(bytes(&driver, gpa, len as usize));
            }
        }
        for (n, frame) in got.chunks(212).enumerate() {
            assert_eq!(frame[10], 4);
            assert_eq!(frame[12..], (n as u16).to_le_bytes().repeat(100));
        }
    }

    #[test]
    fn offloads_are_what_both_sides_can() {
        let (cables, _, mut driver) = card(1);
        let features = feature::VERSION_1 | F_GUEST_CSUM | F_GUEST_TSO4;
        driver.start(features, Interrupts::Msix);
        assert_eq!(*cables[0].accepted.lock().unwrap(), Offloads::CHECKSUM | Offloads::TSO4);
        driver.reset();
        assert_eq!(*cables[0].accepted.lock().unwrap(), Offloads::empty());
        for (bad, why) in [
            (F_GUEST_TSO4, "segmentation needs checksums"),
            (F_HOST_TSO4, "segmentation needs checksums"),
            (F_MULTI_QUEUE, "there is one pair"),
        ] {
            assert!(!driver.negotiate(feature::VERSION_1 | bad), "{why}");
            driver.reset();
        }
        assert!(driver.negotiate(feature::VERSION_1 | F_HOST_TSO4 | F_CSUM));
    }

    #[test]
    fn a_frame_shorter_than_its_header_is_dropped() {
        let (cables, _, mut driver) = card(1);
        driver.start_all();
        for len in [1, 11, 12] {
            driver.ask(1, &[(DATA, len, 0)]);
        }
        driver.ask(1, &[(DATA, 12, 0), (DATA, 60, 0)]);
        assert_eq!(cables[0].sent.lock().unwrap().len(), 1);
        assert_eq!(driver.status(), 15);
    }

    #[test]
    fn the_link_can_be_cut() {
        let (cables, handle, mut driver) = card(1);
        driver.start_all();
        let config = u32::from(driver.common_u16(common::NUM_QUEUES));
        assert_eq!(driver.read::<2>(driver.config + 6), [1, 0]);
        let generation = driver.common_u8(common::GENERATION);
        handle.set_link(false);
        handle.set_link(false);
        assert_eq!(driver.read::<2>(driver.config + 6), [0, 0]);
        assert_eq!(driver.interrupts(config), 1);
        assert_ne!(driver.common_u8(common::GENERATION), generation);
        driver.ask(1, &[(DATA, 72, 0)]);
        assert!(cables[0].sent.lock().unwrap().is_empty(), "goes nowhere");
        cables[0].deliver(&[1; 60]);
        wait("the frame to be dropped", || cables[0].waiting() == 0);
        handle.set_link(true);
        let head = driver.queues[0].add(&[(DATA, 2000, WRITE)]);
        driver.kick(0);
        cables[0].deliver(&[2; 60]);
        assert_eq!(used(&mut driver, 0), (head, 72));
        assert_eq!(bytes(&driver, DATA + 12, 1), [2]);
    }

    #[test]
    fn queue_pairs_are_switched_by_the_control_queue() {
        let (cables, handle, mut driver) = card(3);
        let active =
            || cables.iter().map(|cable| *cable.active.lock().unwrap()).collect::<Vec<_>>();
        assert_eq!(active(), [true, false, false]);
        assert_eq!(u16::from_le_bytes(driver.read(driver.config + 8)), 3);
        driver.start_all();
        let ask = |driver: &mut Driver, queue: usize, command: &[u8]| -> u8 {
            driver.memory().write_slice(command, GuestAddress(HEADER)).unwrap();
            let len = command.len() as u32;
            assert_eq!(
                driver.ask(queue, &[(HEADER, 2, 0), (HEADER + 2, len - 2, 0), (STATUS, 1, WRITE)]),
                1
            );
            driver.memory().read_obj(GuestAddress(STATUS)).unwrap()
        };
        assert_eq!(ask(&mut driver, 6, &[4, 0, 3, 0]), 0);
        wait("all pairs", || active() == [true; 3]);
        let head = driver.queues[4].add(&[(DATA, 2000, WRITE)]);
        driver.kick(4);
        cables[2].deliver(&[9; 60]);
        assert_eq!(used(&mut driver, 4), (head, 72));
        driver.ask(5, &[(DATA, 72, 0)]);
        assert_eq!(cables[2].sent.lock().unwrap().len(), 1);
        assert_eq!(ask(&mut driver, 6, &[4, 0, 4, 0]), 1, "so many there are not");
        assert_eq!(ask(&mut driver, 6, &[4, 0, 1, 0]), 0);
        wait("one pair", || active() == [true, false, false]);
        assert_eq!(ask(&mut driver, 6, &[1, 1, 2, 2, 2, 2, 2, 2]), 0);
        assert_eq!(driver.read::<6>(driver.config), [2; 6]);
        assert_eq!(handle.mac(), [2; 6]);
        driver.next_round();
        assert_eq!(driver.read::<6>(driver.config), MAC, "a reset brings the address back");
        // A driver that knows of one pair has its control queue after that.
        assert!(driver.negotiate(feature::VERSION_1 | F_CONTROL));
        for index in 0..3 {
            driver.set_up_queue(index, 16);
        }
        driver.set_status(15);
        assert_eq!(ask(&mut driver, 2, &[0, 0, 1]), 0);
    }
}

mod console {
    use super::*;

    fn console() -> (Screen, ConsoleHandle, Driver) {
        let screen = Screen::default();
        let device = Console::new("console", Box::new(screen.clone())).unwrap();
        let handle = device.handle();
        (screen, handle, Driver::new(Machine::new(Box::new(device))))
    }

    #[test]
    fn input_waits_for_the_guest() {
        let (_, handle, mut driver) = console();
        assert_eq!(handle.input(b"before"), 6);
        driver.start_all();
        assert_eq!(driver.ask(0, &[(DATA, 4, WRITE)]), 4);
        assert_eq!(driver.ask(0, &[(DATA + 4, 100, WRITE)]), 2);
        driver.queues[0].add(&[(DATA + 6, 100, WRITE)]);
        driver.kick(0);
        handle.input(b", after");
        wait("input", || driver.queues[0].take_used().is_some());
        let mut text = [0; 13];
        driver.memory().read_slice(&mut text, GuestAddress(DATA)).unwrap();
        assert_eq!(&text, b"before, after");
        assert!(handle.input(&[0; 1 << 20]) < 1 << 20, "a guest that does not read costs little");
    }

    #[test]
    fn the_size_and_its_changes_are_told() {
        let (screen, handle, mut driver) = console();
        driver.start_all();
        assert_eq!(driver.read::<8>(driver.config), [80, 0, 25, 0, 1, 0, 0, 0]);
        handle.resize(132, 50);
        assert_eq!(driver.read::<4>(driver.config), [132, 0, 50, 0]);
        assert_eq!(driver.interrupts(2), 1);
        driver.write(driver.config + 8, &u32::from(b'!').to_le_bytes());
        assert_eq!(*screen.0.lock().unwrap(), b"!", "emergency write");
    }

    #[test]
    fn output_keeps_its_order_across_long_chains() {
        let (screen, _, mut driver) = console();
        driver.start_all();
        let text: Vec<u8> = (0..10_000).map(|i| i as u8).collect();
        driver.memory().write_slice(&text, GuestAddress(DATA)).unwrap();
        driver.ask(1, &[(DATA, 1, 0), (DATA + 1, 9000, 0), (DATA + 9001, 999, 0)]);
        assert_eq!(*screen.0.lock().unwrap(), text);
    }
}

#[test]
fn randomness_is_random_and_bounded() {
    let mut driver = Driver::new(Machine::new(Box::new(Rng::new("rng"))));
    driver.start_all();
    assert_eq!(driver.ask(0, &[(DATA, 64, WRITE)]), 64);
    assert_eq!(driver.ask(0, &[(DATA + 64, 64, WRITE)]), 64);
    let mut bytes = [0u8; 128];
    driver.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_ne!(bytes[..64], bytes[64..]);
    assert!(bytes.iter().filter(|byte| **byte == 0).count() < 20);
    assert_eq!(driver.ask(0, &[(DATA, 1 << 20, WRITE)]), 4096, "in portions");
    assert_eq!(driver.ask(0, &[(DATA, 64, 0)]), 0, "nowhere to write");
}

mod input {
    use super::*;

    const EVENTS: u64 = 0x21_0000;

    fn device(kind: InputKind) -> (InputHandle, Driver) {
        let device = Input::new("input", kind, "S3R1AL").unwrap();
        (device.handle(), Driver::new(Machine::new(Box::new(device))))
    }

    /// Selects, and reads what the configuration structure shows.
    fn ask(driver: &Driver, select: u8, subsel: u8) -> Vec<u8> {
        driver.write(driver.config, &[select]);
        driver.write(driver.config + 1, &[subsel]);
        let size = usize::from(driver.read::<1>(driver.config + 2)[0]);
        let all: [u8; 128] = driver.read(driver.config + 8);
        assert!(all[size..].iter().all(|byte| *byte == 0));
        all[..size].to_vec()
    }

    /// Offers `count` buffers for events.
    fn offer(driver: &mut Driver, count: u64) {
        for _ in 0..count {
            // The ring has 64 entries: no buffer is there twice at a time.
            let n = u64::from(driver.queues[0].next % 64);
            driver.queues[0].add(&[(EVENTS + 8 * n, 8, WRITE)]);
        }
        driver.kick(0);
    }

    /// The next `count` events that the guest gets.
    fn take(driver: &mut Driver, count: usize) -> Vec<(u16, u16, i32)> {
        let mut events = Vec::new();
        wait("events", || {
            while events.len() < count
                && let Some(used) = driver.queues[0].used_head()
            {
                let mut event = [0; 8];
                driver.memory().read_slice(&mut event, GuestAddress(used.0)).unwrap();
                assert_eq!(used.1, 8);
                let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
                let value = i32::from_le_bytes(event[4..].try_into().unwrap());
                events.push((word(0), word(2), value));
            }
            events.len() == count
        });
        events
    }

    fn key(code: u16, down: bool) -> InputEvent {
        InputEvent::Key(Key(code), down)
    }

    #[test]
    fn linux_finds_out_what_it_is() {
        let (_, driver) = device(InputKind::Tablet);
        assert_eq!(ask(&driver, 1, 0), b"Lodge Tablet");
        assert_eq!(ask(&driver, 2, 0), b"S3R1AL");
        assert_eq!(ask(&driver, 3, 0), [6, 0, 0xf4, 0x1a, 2, 0, 1, 0]);
        assert_eq!(ask(&driver, 0x10, 0), [] as [u8; 0]);
        let buttons = ask(&driver, 0x11, 1);
        assert_eq!((buttons.len(), buttons[0x110 / 8]), (0x110 / 8 + 1, 0x1f));
        assert_eq!((ask(&driver, 0x11, 2), ask(&driver, 0x11, 3)), (vec![0, 1], vec![3]));
        let range = [&[0; 4][..], &u32::from(RANGE).to_le_bytes(), &[0; 12]].concat();
        assert_eq!((ask(&driver, 0x12, 0), ask(&driver, 0x12, 1)), (range.clone(), range));
        for (select, subsel) in [(0, 0), (1, 1), (0x11, 0x14), (0x12, 2), (0xff, 0xff)] {
            assert!(ask(&driver, select, subsel).is_empty(), "{select:#x}");
        }
        let (_, driver) = device(InputKind::Keyboard);
        assert_eq!(ask(&driver, 1, 0), b"Lodge Keyboard");
        assert_eq!(ask(&driver, 0x11, 1)[1], 0xff);
        assert_eq!(ask(&driver, 0x11, 0x11), [7]);
        assert!(ask(&driver, 0x11, 3).is_empty() && ask(&driver, 0x12, 0).is_empty());
    }

    #[test]
    fn keys_reach_the_guest_and_its_lights_come_back() {
        let (handle, mut driver) = device(InputKind::Keyboard);
        assert!(!handle.wants(&key(30, true)), "no driver");
        handle.send(&[key(30, true)]);
        driver.start_all();
        offer(&mut driver, 16);
        assert!(handle.wants(&key(30, true)) && !handle.wants(&InputEvent::Wheel(1)));
        assert!(!handle.has_places());
        handle.send(&[
            key(48, false),
            key(30, true),
            key(30, true),
            InputEvent::Wheel(1),
            key(30, false),
        ]);
        let expected = [(1, 30, 1), (0, 0, 0), (1, 30, 2), (0, 0, 0), (1, 30, 0), (0, 0, 0)];
        assert_eq!(take(&mut driver, 6), expected);
        driver.memory().write_slice(&[0x11, 0, 1, 0, 1, 0, 0, 0], GuestAddress(DATA)).unwrap();
        driver.ask(1, &[(DATA, 8, 0)]);
        assert_eq!(handle.leds(), 2, "caps lock");
        driver.reset();
        assert!(!handle.wants(&key(30, true)));
        assert_eq!(handle.leds(), 0);
    }

    #[test]
    fn the_pointer_and_reports_as_a_whole() {
        let (handle, mut driver) = device(InputKind::Tablet);
        driver.start_all();
        assert!(handle.has_places());
        offer(&mut driver, 2);
        handle.send(&[InputEvent::At { x: 1, y: 2 }, InputEvent::At { x: 3, y: u16::MAX }]);
        handle.send(&[InputEvent::Button(Button::Left, true), InputEvent::Moved { dx: 1, dy: 1 }]);
        handle.send(&[InputEvent::Wheel(-2), InputEvent::Wheel(0)]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.queues[0].used_index(), 0, "two buffers are too few for a place");
        offer(&mut driver, 10);
        let events = take(&mut driver, 7);
        assert_eq!(events[..3], [(3, 0, 3), (3, 1, RANGE.into()), (0, 0, 0)], "the last place");
        assert_eq!(events[3..], [(1, 0x110, 1), (0, 0, 0), (2, 8, -2), (0, 0, 0)]);
        // A guest that does not read: bounded, and what is held is let go.
        for _ in 0..5000 {
            handle.send(&[InputEvent::Button(Button::Left, true), InputEvent::Wheel(1)]);
        }
        for _ in 0..5000 {
            handle.send(&[InputEvent::Button(Button::Left, false), InputEvent::At { x: 0, y: 0 }]);
        }
        driver.machine.device.pause();
        let saved = driver.machine.device.state().unwrap();
        let text = serde_json::to_string(&saved).unwrap();
        assert!(text.len() < 100_000, "{}", text.len());
        driver.machine.device.resume();
        let mut last = Vec::new();
        wait("the release", || {
            while driver.queues[0].used_index() != driver.queues[0].seen {
                last.extend(take(&mut driver, 1));
            }
            if driver.queues[0].room() >= 32 {
                offer(&mut driver, 32);
            }
            last.contains(&(1, 0x110, 0))
        });
        assert!(last.len() < 5000, "{}", last.len());
    }
}
