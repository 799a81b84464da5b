//! What every virtio device has to stand, whatever it is: resets in every state, negotiation, queues
//! that cannot work, malformed chains, stops in the middle of traffic, saving and restoring, and random
//! register accesses. VIRTIO 1.2, sections 2 to 4.
//!
//! Each device is a [`Subject`]; the macro at the end gives each of them every test.

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use lodge_devices::storage::{ScsiDisk, ScsiDiskConfig};
use lodge_devices::virtio::{
    Block, BlockConfig, Console, Gpu, GpuHandle, Input, InputHandle, InputKind, Net, NetConfig,
    Rng, Scsi, ScsiUnit, TransportState, VirtioDevice, feature, status,
};
use lodge_memory::Bus;
use support::backends::{Cable, MemoryDisk, Plug, Screen, SharedDisk};
use support::driver::{Driver, INDIRECT, Interrupts, NEXT, WRITE, common};
use support::{Machine, RAM, Random, wait};
use vm_memory::{Bytes, GuestAddress};

/// Where requests have their data: 128 pages.
const ARENA: u64 = 0x20_0000;

/// A kind of device under test, with what is behind it.
trait Subject {
    /// A device over the same things behind it each time.
    fn device(&self) -> Box<dyn VirtioDevice>;
    /// PCI device id, and how many queues.
    fn identity(&self) -> (u16, u16);
    /// The queue that requests go to, and request number `n` with its data in place.
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>);
    /// Requests 0..`count` were done, each exactly once.
    fn check(&self, count: u32);
}

fn page(n: u32) -> u64 {
    ARENA + 4096 * u64::from(n % 128)
}

fn store(driver: &Driver, gpa: u64, data: &[u8]) {
    driver.memory().write_slice(data, GuestAddress(gpa)).unwrap();
}

struct BlockSubject {
    disk: Arc<MemoryDisk>,
    queues: u16,
}

impl BlockSubject {
    fn new(queues: u16) -> Self {
        Self { disk: MemoryDisk::new(8192 * 512), queues }
    }
}

impl Subject for BlockSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let config = BlockConfig { serial: "conformance".into(), queues: self.queues };
        Box::new(Block::new("disk", Arc::new(SharedDisk(self.disk.clone())), &config))
    }
    fn identity(&self) -> (u16, u16) {
        (0x1042, self.queues)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        write_sector(driver, n, self.queues)
    }
    fn check(&self, count: u32) {
        let mut log = self.disk.log.lock().unwrap().clone();
        log.retain(|(name, _)| *name == "write");
        log.sort();
        let expected: Vec<_> = (0..count).map(|n| ("write", u64::from(n) * 512)).collect();
        assert_eq!(log, expected, "every write once");
        let data = self.disk.data.lock().unwrap();
        for n in 0..count {
            let sector = &data[n as usize * 512..][..512];
            assert_eq!(sector, (n + 1).to_le_bytes().repeat(128), "sector {n}");
        }
    }
}

/// A disk of the real kind: a raw image, through the host's io_uring or threads.
struct ImageSubject {
    path: tempfile::NamedTempFile,
    disk: Arc<dyn lodge_disk::Disk>,
}

impl ImageSubject {
    fn new() -> Self {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(8192 * 512).unwrap();
        let mut options = lodge_disk::OpenOptions::new(path.path());
        options.format = Some(lodge_disk::Format::Raw);
        let disk = lodge_disk::open(&options).unwrap();
        Self { path, disk }
    }
}

impl Subject for ImageSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let config = BlockConfig { serial: "image".into(), queues: 2 };
        Box::new(Block::new("disk", self.disk.clone(), &config))
    }
    fn identity(&self) -> (u16, u16) {
        (0x1042, 2)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        write_sector(driver, n, 2)
    }
    fn check(&self, count: u32) {
        let data = std::fs::read(self.path.path()).unwrap();
        for n in 0..count {
            let sector = &data[n as usize * 512..][..512];
            assert_eq!(sector, (n + 1).to_le_bytes().repeat(128), "sector {n}");
        }
    }
}

/// Request `n` of a disk: sector `n` gets words of `n + 1`.
fn write_sector(driver: &Driver, n: u32, queues: u16) -> (usize, Vec<(u64, u32, u16)>) {
    let at = page(n);
    let header = [&1u64.to_le_bytes()[..], &u64::from(n).to_le_bytes()].concat();
    store(driver, at, &header);
    store(driver, at + 512, &n.wrapping_add(1).to_le_bytes().repeat(128));
    let queue = (n % u32::from(queues)) as usize;
    (queue, vec![(at, 16, 0), (at + 512, 512, 0), (at + 2048, 1, WRITE)])
}

/// A disk behind a SCSI controller: target 3, LUN 0.
struct ScsiSubject {
    block: BlockSubject,
}

impl ScsiSubject {
    fn new(queues: u16) -> Self {
        Self { block: BlockSubject::new(queues) }
    }
}

impl Subject for ScsiSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let controller = Scsi::new("scsi", self.block.queues).unwrap();
        let disk = Arc::new(SharedDisk(self.block.disk.clone()));
        let disk = ScsiDisk::new(disk, &ScsiDiskConfig::default());
        controller.handle().plug(3, 0, ScsiUnit::Disk(disk)).unwrap();
        Box::new(controller)
    }
    fn identity(&self) -> (u16, u16) {
        (0x1048, self.block.queues + 2)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        let at = page(n);
        let mut command = [0; 51];
        command[..2].copy_from_slice(&[1, 3]);
        command[8..12].copy_from_slice(&n.to_le_bytes());
        // WRITE(10) of one block.
        command[19] = 0x2a;
        command[21..25].copy_from_slice(&n.to_be_bytes());
        command[27] = 1;
        store(driver, at, &command);
        store(driver, at + 512, &n.wrapping_add(1).to_le_bytes().repeat(128));
        let queue = (n % u32::from(self.block.queues)) as usize + 2;
        (queue, vec![(at, 51, 0), (at + 512, 512, 0), (at + 2048, 108, WRITE)])
    }
    fn check(&self, count: u32) {
        self.block.check(count);
    }
}

struct NetSubject {
    cables: Vec<Arc<Cable>>,
}

impl NetSubject {
    fn new(pairs: usize) -> Self {
        let cables: Vec<_> = (0..pairs).map(|_| Cable::new()).collect();
        *cables[0].room.lock().unwrap() = 3; // Now and then the network is busy.
        Self { cables }
    }
}

impl Subject for NetSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let plug =
            |cable: &Arc<Cable>| Box::new(Plug(cable.clone())) as Box<dyn lodge_net::Backend>;
        let config = NetConfig { mac: [0x52, 0x54, 0, 0, 0, 1], mtu: Some(1500) };
        Box::new(Net::new("net", self.cables.iter().map(plug).collect(), config).unwrap())
    }
    fn identity(&self) -> (u16, u16) {
        (0x1041, 2 * self.cables.len() as u16 + 1)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        let at = page(n);
        store(driver, at, &[0; 12]);
        store(driver, at + 512, &n.to_le_bytes().repeat(16));
        (1, vec![(at, 12, 0), (at + 512, 64, 0)])
    }
    fn check(&self, count: u32) {
        let sent = self.cables[0].sent.lock().unwrap();
        let numbers: Vec<u32> = sent
            .iter()
            .map(|frame| {
                assert_eq!(frame.len(), 76);
                assert!(frame[12..].chunks(4).all(|word| word == &frame[12..16]));
                u32::from_le_bytes(frame[12..16].try_into().unwrap())
            })
            .collect();
        assert_eq!(numbers, (0..count).collect::<Vec<_>>(), "every frame once, in order");
    }
}

struct ConsoleSubject(Screen);

impl Subject for ConsoleSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Console::new("console", Box::new(self.0.clone())).unwrap())
    }
    fn identity(&self) -> (u16, u16) {
        (0x1043, 2)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        store(driver, page(n), &n.to_le_bytes());
        (1, vec![(page(n), 2, 0), (page(n) + 2, 2, 0)])
    }
    fn check(&self, count: u32) {
        let expected: Vec<u8> = (0..count).flat_map(u32::to_le_bytes).collect();
        assert_eq!(*self.0.0.lock().unwrap(), expected, "every byte once, in order");
    }
}

/// A display: questions on the control queue, movements of the pointer on the other one.
#[derive(Default)]
struct GpuSubject(Mutex<Vec<GpuHandle>>);

impl Subject for GpuSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let gpu = Gpu::new("gpu", (1024, 768));
        self.0.lock().unwrap().push(gpu.handle());
        Box::new(gpu)
    }
    fn identity(&self) -> (u16, u16) {
        (0x1050, 2)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        let at = page(n);
        let (kind, queue, parts) = match n & 1 {
            0 => (0x100u32, 0, vec![(at, 24, 0), (at + 1024, 408, WRITE)]),
            _ => (0x301, 1, vec![(at, 24, 0), (at + 24, 32, 0)]),
        };
        store(driver, at, &[&kind.to_le_bytes()[..], &[0; 52]].concat());
        (queue, parts)
    }
    fn check(&self, count: u32) {
        let made: u64 = self.0.lock().unwrap().iter().map(GpuHandle::requests).sum();
        assert_eq!(made, u64::from(count), "every request once");
    }
}

/// A tablet: lights on the status queue. What it has to say is tested beside the device.
#[derive(Default)]
struct InputSubject(Mutex<Vec<InputHandle>>);

impl Subject for InputSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let input = Input::new("tablet", InputKind::Tablet, "conformance").unwrap();
        self.0.lock().unwrap().push(input.handle());
        Box::new(input)
    }
    fn identity(&self) -> (u16, u16) {
        (0x1052, 2)
    }
    fn request(&self, driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        let event = [&17u16.to_le_bytes()[..], &[0; 2], &(n & 1).to_le_bytes()].concat();
        store(driver, page(n), &event);
        (1, vec![(page(n), 3, 0), (page(n) + 3, 5, 0)])
    }
    fn check(&self, count: u32) {
        let taken: u64 = self.0.lock().unwrap().iter().map(InputHandle::statuses).sum();
        assert_eq!(taken, u64::from(count), "every light once");
    }
}

struct RngSubject;

impl Subject for RngSubject {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new("rng"))
    }
    fn identity(&self) -> (u16, u16) {
        (0x1044, 1)
    }
    fn request(&self, _driver: &Driver, n: u32) -> (usize, Vec<(u64, u32, u16)>) {
        (0, vec![(page(n), 16, WRITE), (page(n) + 32, 16, WRITE)])
    }
    fn check(&self, _count: u32) {} // The ring itself is checked by the driver.
}

fn driver(subject: &dyn Subject) -> Driver {
    Driver::new(Machine::new(subject.device()))
}

/// Requests `first`..`first + count` one after the other.
fn traffic(subject: &dyn Subject, driver: &mut Driver, first: u32, count: u32) {
    for n in first..first + count {
        let (queue, parts) = subject.request(driver, n);
        driver.ask(queue, &parts);
    }
}

/// As Linux and firmware find a device: identity, capabilities, BARs.
fn layout(subject: &dyn Subject) {
    let driver = driver(subject);
    let machine = &driver.machine;
    let (id, queues) = subject.identity();
    assert_eq!(machine.config_u32(0), u32::from(id) << 16 | 0x1af4);
    assert_eq!(machine.config_u8(8), 1, "revision of a device that is not transitional");
    assert!(machine.config_u16(0x2e) >= 0x40, "subsystem id of such a device");
    assert_eq!(machine.config_u8(0x3d), 1, "INTA");
    let vendor = machine.capabilities(9);
    let kinds: Vec<u8> = vendor.iter().map(|cap| machine.config_u8(cap + 3)).collect();
    for kind in 1..=5 {
        assert!(kinds.contains(&kind), "structure {kind}");
    }
    let bar_bytes = 0x8000;
    for cap in vendor {
        let (offset, len) = (machine.config_u32(cap + 8), machine.config_u32(cap + 12));
        assert!(machine.config_u8(cap + 2) >= 16);
        assert!(offset + len <= bar_bytes && offset % 4 == 0);
    }
    assert_eq!(machine.config_u32(0x10) % bar_bytes, 0);
    let msix = machine.capabilities(0x11)[0];
    assert_eq!(machine.config_u16(msix + 2), queues, "a vector for each queue and one more");
    assert_eq!(machine.capabilities(0x10).len(), 1, "Express");
    assert_eq!(driver.common_u16(common::NUM_QUEUES), queues);
    for index in 0..queues {
        driver.set_u16(common::QUEUE_SELECT, index);
        assert!(driver.common_u16(common::QUEUE_SIZE).is_power_of_two());
    }
    driver.set_u16(common::QUEUE_SELECT, queues);
    assert_eq!(driver.common_u16(common::QUEUE_SIZE), 0, "no such queue");
}

/// A write of 0 brings every state back to the first one, and the device works afterwards.
fn reset_in_every_state(subject: &dyn Subject) {
    let mut driver = driver(subject);
    let features = driver.offered();
    let mut done = 0;
    for state in 0..8 {
        match state {
            0 => {}
            1 => driver.set_status(status::ACKNOWLEDGE),
            2 => driver.set_status(status::ACKNOWLEDGE | status::DRIVER),
            3 => assert!(driver.negotiate(features)),
            4 => driver.start(features, Interrupts::Msix),
            5 => {
                driver.start(features, Interrupts::Msix);
                traffic(subject, &mut driver, done, 3);
                done += 3;
            }
            6 => {
                driver.start(features, Interrupts::Intx);
                driver.queues[0].set(0, (0, 16, NEXT, 0));
                driver.queues[0].offer(0);
                driver.kick(0); // A broken chain: the device may have noticed, or not yet.
            }
            _ => {
                driver.start(features, Interrupts::Msix);
                driver.set_status(driver.status() | status::FAILED);
            }
        }
        driver.reset();
        assert_eq!(driver.common_u16(common::CONFIG_VECTOR), 0xffff);
        driver.set_u16(common::QUEUE_SELECT, 0);
        assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 0);
        assert_eq!(driver.common_u16(common::QUEUE_VECTOR), 0xffff);
        assert_eq!(driver.common_u32(common::QUEUE_DESC), 0);
        assert_eq!(driver.read::<1>(driver.isr), [0]);
    }
    driver.start_all();
    traffic(subject, &mut driver, done, 20);
    subject.check(done + 20);
}

/// Bits come in order, none goes away, and nothing runs before DRIVER_OK.
fn status_order(subject: &dyn Subject) {
    let mut driver = driver(subject);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.status(), 0);
    driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK);
    assert_eq!(driver.status(), 3, "no DRIVER_OK without FEATURES_OK");
    driver.set_status(status::ACKNOWLEDGE);
    assert_eq!(driver.status(), 3, "a bit does not go away");
    driver.choose(driver.offered());
    driver.set_status(3 | status::NEEDS_RESET);
    assert_eq!(driver.status(), 3, "that bit is the device's");
    for index in 0..driver.common_u16(common::NUM_QUEUES) {
        driver.set_up_queue(index, 16);
    }
    let (queue, parts) = subject.request(&driver, 0);
    driver.queues[queue].add(&parts);
    driver.kick(queue);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.queues[queue].used_index(), 0, "nothing runs yet");
    // All remaining steps at once, as some firmware does.
    driver.set_status(15);
    assert_eq!(driver.status(), 15);
    wait("a request that was there before", || driver.queues[queue].take_used().is_some());
    subject.check(1);
}

/// Only what was offered is taken, and VERSION_1 must be.
fn features(subject: &dyn Subject) {
    let mut driver = driver(subject);
    let offered = driver.offered();
    assert_eq!(offered & feature::TRANSPORT, feature::TRANSPORT);
    driver.set_u32(common::DEVICE_FEATURE_SELECT, 2);
    assert_eq!(driver.common_u32(common::DEVICE_FEATURE), 0);
    for bit in (0..64).map(|bit| 1u64 << bit).filter(|bit| offered & bit == 0) {
        assert!(!driver.negotiate(feature::VERSION_1 | bit), "{bit:#x} is not known");
        driver.reset();
    }
    assert!(!driver.negotiate(offered & !feature::VERSION_1));
    driver.reset();
    driver.set_u32(common::DRIVER_FEATURE_SELECT, 2);
    driver.set_u32(common::DRIVER_FEATURE, 1);
    assert!(!driver.negotiate(offered), "bit 64 does not exist");
    driver.reset();
    assert!(driver.negotiate(feature::VERSION_1));
    driver.choose(offered);
    driver.set_u32(common::DRIVER_FEATURE_SELECT, 0);
    assert_eq!(driver.common_u32(common::DRIVER_FEATURE), 0, "too late");
    // A refused driver can try again with less.
    driver.reset();
    assert!(!driver.negotiate(0));
    driver.choose(offered);
    driver.set_status(11);
    assert_eq!(driver.status(), 11);
}

/// Sizes and places that cannot work are not taken, and nothing breaks.
fn queue_limits(subject: &dyn Subject) {
    let mut driver = driver(subject);
    let offered = driver.offered();
    assert!(driver.negotiate(offered));
    driver.set_u16(common::QUEUE_SELECT, 0);
    let largest = driver.common_u16(common::QUEUE_SIZE);
    for bad in [0, 3, largest + 1, largest * 2, 0x8000, 0xffff] {
        driver.set_u16(common::QUEUE_SIZE, bad);
        assert_eq!(driver.common_u16(common::QUEUE_SIZE), largest, "size {bad}");
    }
    driver.set_u16(common::QUEUE_VECTOR, driver.common_u16(common::NUM_QUEUES) + 1);
    assert_eq!(driver.common_u16(common::QUEUE_VECTOR), 0xffff, "no such vector");
    driver.set_u16(common::CONFIG_VECTOR, 0x1000);
    assert_eq!(driver.common_u16(common::CONFIG_VECTOR), 0xffff, "no such vector");
    let good = (0x10_0000, 0x10_2000, 0x10_3000);
    let (table, avail, used) = good;
    for (table, avail, used) in [
        (table + 8, avail, used),
        (table, avail + 1, used),
        (table, avail, used + 2),
        (RAM, avail, used),
        (RAM - 16, avail, used),
        (table, RAM - 4, used),
        (table, avail, RAM - 4),
        (u64::MAX - 15, avail, used),
        (table, u64::MAX - 1, used),
        (table, avail, u64::MAX - 3),
        (table, 0, used),
        (table, 0xb000_0000, used),
    ] {
        driver.place(table, avail, used);
        driver.set_u16(common::QUEUE_ENABLE, 1);
        let place = format!("{table:#x} {avail:#x} {used:#x}");
        assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 0, "{place}");
        assert_ne!(driver.status() & status::NEEDS_RESET, 0, "{place}");
        driver.reset();
        assert!(driver.negotiate(offered));
        driver.set_u16(common::QUEUE_SELECT, 0);
    }
    driver.place(table, avail, used);
    driver.set_u16(common::QUEUE_ENABLE, 1);
    assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 1);
    // An enabled queue is fixed.
    driver.place(0, 0, 0);
    driver.set_u16(common::QUEUE_SIZE, 16);
    driver.set_u16(common::QUEUE_ENABLE, 0);
    assert_eq!(driver.common_u32(common::QUEUE_DESC), table as u32);
    assert_eq!(driver.common_u16(common::QUEUE_SIZE), largest);
    assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 1);
    // Queues that do not exist ignore everything.
    driver.set_u16(common::QUEUE_SELECT, 0xffff);
    driver.set_u16(common::QUEUE_SIZE, 16);
    driver.place(table, avail, used);
    driver.set_u16(common::QUEUE_ENABLE, 1);
    assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 0);
    driver.reset();
    driver.start_all();
    traffic(subject, &mut driver, 0, 5);
    subject.check(5);
}

/// What a driver may not put into a ring makes the device ask for a reset; after it all is well.
fn malformed_chains(subject: &dyn Subject) {
    let mut driver = driver(subject);
    let features = driver.offered();
    // Descriptors of the ring's table from 0 on, and of an indirect table at ARENA.
    type Descriptors<'a> = &'a [(u64, u32, u16, u16)];
    let cases: &[(&str, Descriptors, Descriptors)] = &[
        ("loop of one", &[(ARENA, 16, NEXT, 0)], &[]),
        ("loop of two", &[(ARENA, 16, NEXT, 1), (ARENA, 16, NEXT, 0)], &[]),
        ("next outside", &[(ARENA, 16, NEXT, 64)], &[]),
        ("next far outside", &[(ARENA, 16, NEXT, 0xffff)], &[]),
        ("outside of RAM", &[(RAM, 16, 0, 0)], &[]),
        ("over the end of RAM", &[(RAM - 8, 16, WRITE, 0)], &[]),
        ("address overflow", &[(u64::MAX - 7, 16, 0, 0)], &[]),
        ("in a device", &[(0xc000_0000, 16, WRITE, 0)], &[]),
        ("huge", &[(ARENA, u32::MAX, 0, 0)], &[]),
        ("huge together", &[(0, RAM as u32, NEXT, 1), (0, u32::MAX, 0, 0)], &[]),
        ("order", &[(ARENA, 16, WRITE | NEXT, 1), (ARENA, 16, 0, 0)], &[]),
        ("indirect, odd size", &[(ARENA, 17, INDIRECT, 0)], &[]),
        ("indirect, empty", &[(ARENA, 0, INDIRECT, 0)], &[]),
        ("indirect, huge", &[(ARENA, 0xffff_fff0, INDIRECT, 0)], &[]),
        ("indirect, outside", &[(RAM - 16, 32, INDIRECT, 0)], &[]),
        ("indirect and next", &[(ARENA, 16, INDIRECT | NEXT, 1)], &[(ARENA, 16, 0, 0)]),
        ("nested", &[(ARENA, 16, INDIRECT, 0)], &[(ARENA, 16, INDIRECT, 0)]),
        ("indirect loop", &[(ARENA, 32, INDIRECT, 0)], &[(ARENA, 1, NEXT, 1), (ARENA, 1, NEXT, 0)]),
        ("indirect next outside", &[(ARENA, 16, INDIRECT, 0)], &[(ARENA, 1, NEXT, 1)]),
    ];
    let config = u32::from(driver.common_u16(common::NUM_QUEUES));
    for (round, (name, table, indirect)) in cases.iter().enumerate() {
        driver.start(features, Interrupts::Msix);
        let (queue, _) = subject.request(&driver, 0);
        for (index, descriptor) in table.iter().enumerate() {
            driver.queues[queue].set(index as u16, *descriptor);
        }
        for (index, (gpa, len, flags, next)) in indirect.iter().enumerate() {
            let at = ARENA + 16 * index as u64;
            driver.queues[queue].descriptor(at, *gpa, *len, *flags, *next);
        }
        driver.queues[queue].offer(0);
        driver.kick(queue);
        wait(name, || driver.status() & status::NEEDS_RESET != 0);
        wait(name, || driver.interrupts(config) == round + 1);
        assert_eq!(driver.queues[queue].used_index(), 0, "{name}");
        driver.next_round();
    }
    driver.start_all();
    traffic(subject, &mut driver, 0, 5);
    subject.check(5);
}

/// Rings whose indices make no sense.
fn malformed_rings(subject: &dyn Subject) {
    let mut driver = driver(subject);
    let features = driver.offered();
    for case in 0..3 {
        driver.start(features, Interrupts::Msix);
        let (queue, parts) = subject.request(&driver, 0);
        let ring = &mut driver.queues[queue];
        match case {
            0 => ring.publish(65), // More than the ring has.
            1 => ring.publish(0x8000),
            _ => ring.offer(64), // A head outside of the table.
        }
        driver.kick(queue);
        wait("NEEDS_RESET", || driver.status() & status::NEEDS_RESET != 0);
        // It takes nothing more.
        let ring = &mut driver.queues[queue];
        ring.next = 0;
        ring.add(&parts);
        driver.kick(queue);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(driver.queues[queue].used_index(), 0);
        driver.next_round();
    }
    // Descriptors without bytes are no reason to stop; what they mean is the device's affair.
    driver.start(features, Interrupts::Msix);
    let (queue, _) = subject.request(&driver, 0);
    driver.queues[queue].add(&[(ARENA, 0, 0), (ARENA, 0, WRITE)]);
    driver.kick(queue);
    let used = |driver: &mut Driver| driver.queues[queue].take_used().is_some();
    wait("an end", || used(&mut driver) || driver.status() & status::NEEDS_RESET != 0);
    driver.next_round();
    driver.start_all();
    traffic(subject, &mut driver, 0, 5);
    subject.check(5);
}

/// Indirect chains do what direct ones do, and need the feature.
fn indirect(subject: &dyn Subject) {
    let mut driver = driver(subject);
    driver.start_all();
    let table = driver.allocate(4096);
    for n in 0..10 {
        let (queue, parts) = subject.request(&driver, n);
        for (index, (gpa, len, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = if last { *flags } else { flags | NEXT };
            let at = table + 16 * index as u64;
            driver.queues[queue].descriptor(at, *gpa, *len, flags, index as u16 + 1);
        }
        driver.ask(queue, &[(table, 16 * parts.len() as u32, INDIRECT)]);
    }
    subject.check(10);
    driver.next_round();
    driver.start(driver.offered() & !feature::INDIRECT_DESC, Interrupts::Msix);
    let (queue, _) = subject.request(&driver, 0);
    driver.queues[queue].add(&[(table, 16, INDIRECT)]);
    driver.kick(queue);
    wait("NEEDS_RESET", || driver.status() & status::NEEDS_RESET != 0);
}

/// Each queue has its vector; masks hold it back; ISR and the pin work without MSI-X.
fn interrupts(subject: &dyn Subject) {
    let mut driver = driver(subject);
    driver.start(driver.simple_features(), Interrupts::Msix);
    let (queue, parts) = subject.request(&driver, 0);
    driver.ask(queue, &parts);
    wait("the queue's vector", || driver.interrupts(queue as u32) == 1);
    // Masked: pending, and sent when the mask goes.
    let (queue, parts) = subject.request(&driver, 1);
    let vector = queue as u32;
    let before = driver.interrupts(vector);
    driver.program(queue as u64, true);
    driver.ask(queue, &parts);
    wait("the pending bit", || driver.pending() == 1 << queue);
    assert_eq!(driver.interrupts(vector), before);
    driver.program(queue as u64, false);
    assert_eq!(driver.interrupts(vector), before + 1);
    assert_eq!(driver.pending(), 0);
    // The function's mask.
    let cap = driver.machine.capabilities(0x11)[0];
    driver.machine.config_write(cap + 2, &0xc000u16.to_le_bytes());
    let (queue, parts) = subject.request(&driver, 2);
    let before = driver.interrupts(queue as u32);
    driver.ask(queue, &parts);
    wait("the pending bit", || driver.pending() != 0);
    assert_eq!(driver.interrupts(queue as u32), before);
    driver.machine.config_write(cap + 2, &0x8000u16.to_le_bytes());
    assert_eq!(driver.interrupts(queue as u32), before + 1);
    // The driver may ask for silence.
    let (queue, parts) = subject.request(&driver, 3);
    let before = driver.interrupts(queue as u32);
    driver.queues[queue].set_flags(1);
    driver.ask(queue, &parts);
    driver.machine.device.pause();
    assert_eq!(driver.interrupts(queue as u32), before);
    driver.machine.device.resume();
    assert_eq!(driver.read::<1>(driver.isr), [0], "not used with MSI-X");
    // Without MSI-X: the pin, until ISR is read.
    driver.machine.config_write(cap + 2, &[0, 0]);
    driver.next_round();
    driver.start(driver.simple_features(), Interrupts::Intx);
    let (queue, parts) = subject.request(&driver, 4);
    driver.ask(queue, &parts);
    let gsi = u32::from(driver.machine.config_u8(0x3c));
    wait("the pin", || driver.machine.vm.irqs().last() == Some(&(gsi, true)));
    assert_ne!(driver.machine.config_u16(6) & 8, 0, "interrupt status");
    driver.machine.config_write(4, &[6, 4]);
    assert_eq!(driver.machine.vm.irqs().last(), Some(&(gsi, false)), "INTx disabled");
    driver.machine.config_write(4, &[6, 0]);
    assert_eq!(driver.machine.vm.irqs().last(), Some(&(gsi, true)));
    assert_eq!(driver.read::<1>(driver.isr), [1]);
    assert_eq!(driver.machine.vm.irqs().last(), Some(&(gsi, false)));
    assert_eq!(driver.read::<1>(driver.isr), [0], "reading clears");
    assert_eq!(driver.machine.config_u16(6) & 8, 0);
}

/// With EVENT_IDX there is an interrupt when the driver's index is passed, and only then.
fn event_index(subject: &dyn Subject) {
    let mut driver = driver(subject);
    driver.start_all();
    let queues = driver.queues.len();
    // Ask to hear of the fourth used chain of each queue.
    driver.queues.iter().for_each(|ring| ring.set_used_event(3));
    let mut asked = vec![0; queues];
    for n in 0..40 {
        let (queue, parts) = subject.request(&driver, n);
        driver.ask(queue, &parts);
        asked[queue] += 1;
        if asked[queue] == 4 {
            wait("the interrupt", || driver.interrupts(queue as u32) == 1);
        }
    }
    driver.machine.device.pause();
    for (queue, asked) in asked.iter().enumerate() {
        let expected = usize::from(*asked >= 4);
        assert_eq!(driver.interrupts(queue as u32), expected, "queue {queue}");
    }
    subject.check(40);
}

/// Writes to notify addresses reach the same eventfds, which follow BAR 0 and end with the queues.
fn ioeventfds(subject: &dyn Subject) {
    let memory = lodge_memory::allocate(&lodge_memory::RamLayout::new(RAM).unwrap()).unwrap();
    let mut driver = Driver::new(Machine::over(subject.device(), memory, true));
    assert!(driver.machine.vm.ioevents().is_empty());
    driver.start_all();
    let queues = driver.queues.len();
    let at = |driver: &Driver| -> Vec<u64> {
        let place = |event: &_| match event {
            lodge_accel::IoEvent::Mmio(gpa) => *gpa,
            other => panic!("{other:?}"),
        };
        driver.machine.vm.ioevents().iter().map(place).collect()
    };
    let expected: Vec<u64> = driver.queues.iter().map(|ring| ring.notify).collect();
    assert_eq!(at(&driver), expected);
    driver.machine.config_write(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(at(&driver)[0], expected[0] - 0xc000_0000 + 0xd000_0000);
    driver.machine.config_write(4, &[0, 0]);
    assert!(at(&driver).is_empty());
    driver.machine.config_write(0x10, &0xc000_0000u32.to_le_bytes());
    driver.machine.config_write(4, &[6, 0]);
    assert_eq!(at(&driver).len(), queues);
    traffic(subject, &mut driver, 0, 3);
    driver.reset();
    assert!(at(&driver).is_empty());
    subject.check(3);
}

/// The PCI access capability reaches BAR 0 where memory decoding is off.
fn pci_access(subject: &dyn Subject) {
    let driver = driver(subject);
    let machine = &driver.machine;
    machine.config_write(4, &[0, 0]);
    let cap =
        machine.capabilities(9).into_iter().find(|cap| machine.config_u8(cap + 3) == 5).unwrap();
    let select = |bar: u8, offset: u32, len: u32| {
        machine.config_write(cap + 4, &[bar]);
        machine.config_write(cap + 8, &offset.to_le_bytes());
        machine.config_write(cap + 12, &len.to_le_bytes());
    };
    select(0, common::NUM_QUEUES as u32, 2);
    assert_eq!(machine.config_u16(cap + 16), subject.identity().1);
    select(0, common::STATUS as u32, 1);
    machine.config_write(cap + 16, &[1]);
    machine.config_write(cap + 16, &[3]);
    assert_eq!(machine.config_u8(cap + 16), 3);
    for (bar, offset, len) in [(1, 0, 4), (0, 0x8000, 4), (0, 1, 2), (0, 0, 3), (0, u32::MAX, 4)] {
        select(bar, offset, len);
        machine.config_write(cap + 16, &[0xff; 4]);
        machine.config_u32(cap + 16);
    }
    machine.config_write(4, &[2, 0]);
    assert_eq!(driver.status(), 3);
}

/// Keeps the rings full until `stop`; returns how many requests were made. All have ended.
fn flood(
    subject: &dyn Subject,
    driver: &mut Driver,
    first: u32,
    stop: impl Fn(u32) -> bool,
) -> u32 {
    let mut n = first;
    let mut open: HashMap<(usize, u16), u32> = HashMap::new();
    loop {
        let end = stop(n);
        // A page of data is used again only when the request that had it has ended.
        let free = open.values().all(|older| n - older < 128);
        let (queue, parts) = match end || !free {
            true => (0, Vec::new()),
            false => subject.request(driver, n),
        };
        if !parts.is_empty() && driver.queues[queue].room() >= parts.len() {
            let head = driver.queues[queue].add(&parts);
            driver.kick(queue);
            open.insert((queue, head), n);
            n += 1;
        } else if open.is_empty() {
            return n;
        } else {
            wait("a used chain", || {
                let before = open.len();
                for (queue, ring) in driver.queues.iter_mut().enumerate() {
                    while let Some((head, _)) = ring.take_used() {
                        open.remove(&(queue, head));
                    }
                }
                open.len() < before
            });
        }
    }
}

/// Pauses in the middle of traffic lose nothing and double nothing.
fn stop_and_start(subject: &dyn Subject) {
    let mut driver = driver(subject);
    driver.start_all();
    let device = driver.machine.device.clone();
    let done = AtomicBool::new(false);
    let made = std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..60 {
                device.pause();
                if round % 3 == 0 {
                    device.pause();
                    std::thread::sleep(std::time::Duration::from_micros(200));
                }
                device.resume();
                std::thread::sleep(std::time::Duration::from_micros(500));
            }
            done.store(true, Ordering::SeqCst);
        });
        flood(subject, &mut driver, 0, |n| n >= 6000 || n >= 300 && done.load(Ordering::SeqCst))
    });
    subject.check(made);
    assert_eq!(driver.status(), 15);
    // Where the queues stand is what the rings say.
    device.pause();
    let state = device.state().unwrap();
    for (ring, saved) in driver.queues.iter().zip(&state.queues) {
        assert_eq!(saved.position.next_used, ring.used_index());
    }
}

/// A device saved in the middle of traffic goes on in another one.
fn save_and_restore(subject: &dyn Subject) {
    let mut driver = driver(subject);
    assert!(driver.machine.device.state().is_err(), "only a paused device can be saved");
    driver.start_all();
    let mut made = 0;
    for _ in 0..8 {
        // Offered, not waited for.
        let mut open = 0;
        for _ in 0..10 {
            let (queue, parts) = subject.request(&driver, made);
            driver.queues[queue].add(&parts);
            driver.kick(queue);
            made += 1;
            open += 1;
        }
        let old = &driver.machine;
        old.device.pause();
        let text = serde_json::to_string(&old.device.state().unwrap()).unwrap();
        // Chains that were offered after the pause are taken after it.
        let machine = Machine::over(subject.device(), old.memory.clone(), false);
        drop(std::mem::replace(&mut driver.machine, machine));
        let state: TransportState = serde_json::from_str(&text).unwrap();
        let new = &driver.machine;
        new.device.restore(&state).unwrap();
        assert_eq!(serde_json::to_string(&new.device.state().unwrap()).unwrap(), text);
        assert_eq!(driver.status(), 15, "BAR 0 answers again");
        driver.machine.device.resume();
        wait("all chains", || {
            open -= driver.queues.iter_mut().filter_map(|ring| ring.take_used()).count();
            open == 0
        });
    }
    subject.check(made);
    // What does not fit is refused, and the device is whole afterwards.
    driver.machine.device.pause();
    let good = driver.machine.device.state().unwrap();
    let mut bad = vec![good.clone(), good.clone(), good.clone()];
    bad[0].driver_features |= 1 << 63;
    bad[1].queues[0].size = 0x4000;
    bad[2].queues.push(good.queues[0].clone());
    for state in &bad {
        assert!(driver.machine.device.restore(state).is_err());
    }
    driver.machine.device.restore(&good).unwrap();
}

/// Random accesses to every register and random rings: no panic, no hang, and a reset helps.
fn fuzz(subject: &dyn Subject) {
    let mut driver = driver(subject);
    let features = driver.offered();
    let mut random = Random(7);
    for round in 0..40 {
        if round % 2 == 0 {
            driver.start(features, Interrupts::Msix);
        }
        for _ in 0..1500 {
            let len = 1usize << random.below(4);
            let data = random.next().to_le_bytes();
            let offset = match random.below(4) {
                0 => random.below(64),
                1 => 0x3000 + 4 * random.below(8),
                _ => random.below(0x8000),
            };
            if random.below(3) == 0 {
                driver.machine.bus.mmio_read(driver.common + offset, &mut [0; 8][..len]);
            } else {
                driver.machine.bus.mmio_write(driver.common + offset, &data[..len]);
            }
            if random.below(4) == 0 && !driver.queues.is_empty() {
                // Somewhere in a ring or its descriptors.
                let ring = &driver.queues[random.below(driver.queues.len() as u64) as usize];
                let at = ring.table + random.below(3) * 4096 + random.below(256);
                let value = [random.below(70) as u8, random.below(3) as u8];
                ring.memory.write_slice(&value, GuestAddress(at)).unwrap();
            }
            if random.below(16) == 0 {
                let register = 0x40 + random.below(0xc0);
                driver.machine.config_write(register, &data[..len.min(4)]);
            }
        }
        driver.next_round();
    }
    driver.machine.root.reset();
    driver.machine.config_write(4, &[6, 0]);
    assert_eq!(driver.status(), 0);
    driver.start_all();
    let (queue, parts) = subject.request(&driver, 0);
    driver.ask(queue, &parts);
}

/// A device that is taken out ends, also in the middle of its work.
fn removal(subject: &dyn Subject) {
    let mut driver = driver(subject);
    driver.start_all();
    for n in 0..8 {
        let (queue, parts) = subject.request(&driver, n);
        driver.queues[queue].add(&parts);
        driver.kick(queue);
    }
    assert!(driver.machine.root.remove(driver.machine.at).is_some());
    assert_eq!(driver.common_u8(common::STATUS), 0xff, "nobody answers");
    assert_eq!(driver.machine.config_u32(0), u32::MAX);
    let used: usize = driver.queues.iter().map(|ring| usize::from(ring.used_index())).sum();
    std::thread::sleep(std::time::Duration::from_millis(5));
    let later: usize = driver.queues.iter().map(|ring| usize::from(ring.used_index())).sum();
    assert_eq!(used, later, "it writes no more");
}

macro_rules! every_device {
    ($($test:ident)*) => {
        every_device!(@block: BlockSubject::new(1); $($test)*);
        every_device!(@block_multi_queue: BlockSubject::new(4); $($test)*);
        every_device!(@block_image: ImageSubject::new(); $($test)*);
        every_device!(@net: NetSubject::new(1); $($test)*);
        every_device!(@net_multi_queue: NetSubject::new(2); $($test)*);
        every_device!(@console: ConsoleSubject(Screen::default()); $($test)*);
        every_device!(@gpu: GpuSubject::default(); $($test)*);
        every_device!(@scsi: ScsiSubject::new(1); $($test)*);
        every_device!(@scsi_multi_queue: ScsiSubject::new(4); $($test)*);
        every_device!(@input: InputSubject::default(); $($test)*);
        every_device!(@rng: RngSubject; $($test)*);
    };
    (@$name:ident: $subject:expr; $($test:ident)*) => {
        mod $name {
            use super::*;
            $(
                #[test]
                fn $test() {
                    super::$test(&$subject);
                }
            )*
        }
    };
}

every_device! {
    layout reset_in_every_state status_order features queue_limits malformed_chains malformed_rings
    indirect interrupts event_index ioeventfds pci_access stop_and_start save_and_restore fuzz removal
}
