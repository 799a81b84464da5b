//! The SCSI controller as a driver uses it: commands, data, errors, task management, plugging while it runs.

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lodge_devices::storage::{CdRom, CdRomConfig, ScsiDisk, ScsiDiskConfig};
use lodge_devices::virtio::{Scsi, ScsiHandle, ScsiUnit, TransportState, status};
use lodge_disk::{Disk, Format, OpenOptions};
use support::backends::{MemoryDisk, SharedDisk};
use support::driver::{Driver, NEXT, WRITE};
use support::{Machine, Random, wait};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

const CONTROL: usize = 0;
const EVENTS: usize = 1;
const REQUESTS: usize = 2;
/// Where a request, its answer and its data are.
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;
const TMF: u64 = 0x10_2000;
const EVENT_BUFFERS: u64 = 0x10_3000;

/// Responses.
const OK: u8 = 0;
const OVERRUN: u8 = 1;
const ABORTED: u8 = 2;
const BAD_TARGET: u8 = 3;
const RESET: u8 = 4;

/// The answer to a command.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    response: u8,
    status: u8,
    resid: u32,
    sense: Vec<u8>,
}

impl Answer {
    fn key(&self) -> (u8, u8, u8) {
        assert_eq!((self.response, self.status), (OK, 2));
        (self.sense[2], self.sense[12], self.sense[13])
    }
}

struct Rig {
    driver: Driver,
    handle: ScsiHandle,
}

fn image(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..bytes / 4).flat_map(|word| (word as u32 / 128).to_le_bytes()).collect();
    file.as_file().write_all_at(&data, 0).unwrap();
    file
}

fn open(file: &NamedTempFile, read_only: bool) -> Arc<dyn Disk> {
    let mut options = OpenOptions::new(file.path());
    options.format = Some(Format::Raw);
    options.read_only = read_only;
    lodge_disk::open(&options).unwrap()
}

fn disk(disk: Arc<dyn Disk>) -> ScsiUnit {
    ScsiUnit::Disk(ScsiDisk::new(disk, &ScsiDiskConfig::default()))
}

impl Rig {
    fn new(queues: u16) -> Self {
        let device = Scsi::new("scsi", queues).unwrap();
        let handle = device.handle();
        Self { driver: Driver::new(Machine::new(Box::new(device))), handle }
    }

    fn started(queues: u16) -> Self {
        let mut rig = Self::new(queues);
        rig.driver.start_all();
        rig
    }

    fn store(&self, gpa: u64, data: &[u8]) {
        self.driver.memory().write_slice(data, GuestAddress(gpa)).unwrap();
    }

    fn load(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.driver.memory().read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }

    /// The request's bytes at `REQUEST + 64 * id`.
    fn write_request(&self, (target, lun): (u8, u16), id: u64, cdb: &[u8]) -> u64 {
        let mut request = [0; 51];
        request[..4].copy_from_slice(&[1, target, (lun >> 8) as u8 | 0x40, lun as u8]);
        request[8..16].copy_from_slice(&id.to_le_bytes());
        request[19..19 + cdb.len()].copy_from_slice(cdb);
        let at = REQUEST + 64 * id;
        self.store(at, &request);
        at
    }

    fn answer(&self, at: u64) -> Answer {
        let data = self.load(at, 108);
        let word = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
        let sense = data[12..12 + word(0) as usize].to_vec();
        Answer { response: data[11], status: data[10], resid: word(4), sense }
    }

    /// Sends a command with data pieces in one direction; returns its answer and the used length.
    fn ask(
        &mut self,
        at: (u8, u16),
        cdb: &[u8],
        data: &[(u64, u32)],
        to_guest: bool,
    ) -> (Answer, u32) {
        let request = self.write_request(at, 0, cdb);
        let mut parts = vec![(request, 51, 0)];
        if !to_guest {
            parts.extend(data.iter().map(|(gpa, len)| (*gpa, *len, 0)));
        }
        parts.push((ANSWER, 108, WRITE));
        if to_guest {
            parts.extend(data.iter().map(|(gpa, len)| (*gpa, *len, WRITE)));
        }
        let used = self.driver.ask(REQUESTS, &parts);
        (self.answer(ANSWER), used)
    }

    /// A command that must succeed, with `room` bytes for its data.
    fn good(&mut self, at: (u8, u16), cdb: &[u8], room: u32) -> Vec<u8> {
        let (answer, _) = self.ask(at, cdb, &[(DATA, room)], true);
        assert_eq!((answer.response, answer.status), (OK, 0), "{cdb:02x?}: {answer:02x?}");
        self.load(DATA, (room - answer.resid) as usize)
    }

    fn task_management(&mut self, subtype: u32, (target, lun): (u8, u16), id: u64) -> u8 {
        let mut request = vec![0; 4];
        request.extend_from_slice(&subtype.to_le_bytes());
        request.extend_from_slice(&[1, target, (lun >> 8) as u8 | 0x40, lun as u8, 0, 0, 0, 0]);
        request.extend_from_slice(&id.to_le_bytes());
        self.store(TMF, &request);
        self.store(TMF + 64, &[0xff]);
        self.driver.ask(CONTROL, &[(TMF, 24, 0), (TMF + 64, 1, WRITE)]);
        self.load(TMF + 64, 1)[0]
    }

    fn event_buffers(&mut self, count: u64) {
        for n in 0..count {
            self.driver.queues[EVENTS].add(&[(EVENT_BUFFERS + 16 * n, 16, WRITE)]);
        }
        self.driver.kick(EVENTS);
    }

    /// Waits for event buffer `n` to be used: event, target, reason.
    fn event(&mut self, n: u64) -> (u32, u8, u32) {
        wait("an event", || self.driver.queues[EVENTS].take_used().is_some());
        let data = self.load(EVENT_BUFFERS + 16 * n, 16);
        let word = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
        (word(0), data[5], word(12))
    }
}

const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];

fn read_10(block: u32, count: u16) -> Vec<u8> {
    [&[0x28, 0][..], &block.to_be_bytes(), &[0], &count.to_be_bytes(), &[0]].concat()
}

fn write_10(block: u32, count: u16) -> Vec<u8> {
    let mut cdb = read_10(block, count);
    cdb[0] = 0x2a;
    cdb
}

fn number(data: &[u8]) -> u32 {
    u32::from_le_bytes(data[..4].try_into().unwrap())
}

#[test]
fn a_bus_is_scanned() {
    let mut rig = Rig::started(1);
    let file = image(1 << 20);
    for (target, lun) in [(0, 0), (7, 0), (7, 2), (255, 0x3fff)] {
        rig.handle.plug(target, lun, disk(open(&file, true))).unwrap();
    }
    assert!(rig.handle.plug(7, 2, disk(open(&file, true))).is_err());
    assert!(rig.handle.plug(8, 0x4000, disk(open(&file, true))).is_err());
    let mut found = Vec::new();
    for target in 0..=255 {
        let (answer, _) = rig.ask((target, 0), &INQUIRY, &[(DATA, 36)], true);
        match answer.response {
            BAD_TARGET => assert_eq!(answer.resid, 36),
            _ => found.push((target, rig.load(DATA, 1)[0])),
        }
    }
    assert_eq!(found, [(0, 0), (7, 0), (255, 0x7f)]);
    let luns = rig.good((7, 5), &[0xa0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0], 1024);
    assert_eq!(luns, [0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]);
    let luns = rig.good((255, 0), &[0xa0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0], 1024);
    assert_eq!(luns[8..10], [0x7f, 0xff]);
    let (answer, _) = rig.ask((7, 1), &read_10(0, 1), &[(DATA, 512)], true);
    assert_eq!(answer.key(), (5, 0x25, 0));
    assert_eq!(rig.good((7, 1), &[3, 0, 0, 0, 18, 0], 18)[12], 0x25);
}

#[test]
fn data_goes_both_ways_in_any_pieces() {
    let mut rig = Rig::started(1);
    let file = image(4 << 20);
    rig.handle.plug(0, 0, disk(open(&file, false))).unwrap();
    let (answer, used) =
        rig.ask((0, 0), &read_10(8, 2), &[(DATA + 1, 511), (DATA + 0x5003, 513)], true);
    assert_eq!((answer.response, answer.status, answer.resid, used), (OK, 0, 0, 108 + 1024));
    assert_eq!(number(&rig.load(DATA + 1, 4)), 8);
    assert_eq!(number(&rig.load(DATA + 0x5003 + 509, 4)), 9);
    // More room than data.
    let (answer, used) = rig.ask((0, 0), &read_10(3, 1), &[(DATA, 4096)], true);
    assert_eq!((answer.resid, used), (4096 - 512, 108 + 512));
    // Less, or the wrong way, or none.
    for (cdb, data, to_guest) in [
        (read_10(3, 2), vec![(DATA, 1023)], true),
        (read_10(3, 2), vec![(DATA, 1024)], false),
        (read_10(3, 2), vec![], true),
        (write_10(3, 2), vec![(DATA, 1024)], true),
        (write_10(3, 2), vec![(DATA, 512)], false),
    ] {
        let (answer, used) = rig.ask((0, 0), &cdb, &data, to_guest);
        let room: u32 = data.iter().map(|(_, len)| len).sum();
        assert_eq!((answer.response, answer.resid, used), (OVERRUN, room, 108));
    }
    rig.store(DATA, &[0xab; 1024]);
    let (answer, used) = rig.ask((0, 0), &write_10(100, 2), &[(DATA, 1), (DATA + 1, 1023)], false);
    assert_eq!((answer.response, answer.status, answer.resid, used), (OK, 0, 0, 108));
    let mut written = [0; 1024];
    file.as_file().read_exact_at(&mut written, 100 * 512).unwrap();
    assert_eq!(written, [0xab; 1024]);
    let (answer, _) = rig.ask((0, 0), &read_10(1 << 20, 1), &[(DATA, 512)], true);
    assert_eq!(answer.key(), (5, 0x21, 0));
    assert_eq!(answer.resid, 512);
    // A command without a data buffer, and one in both directions, which was not offered.
    let (answer, _) = rig.ask((0, 0), &[0; 6], &[], true);
    assert_eq!((answer.response, answer.status, answer.resid), (OK, 0, 0));
    let request = rig.write_request((0, 0), 0, &read_10(0, 1));
    let parts = [(request, 51, 0), (DATA, 512, 0), (ANSWER, 108, WRITE), (DATA, 512, WRITE)];
    rig.driver.ask(REQUESTS, &parts);
    assert_eq!(rig.answer(ANSWER).response, 9);
}

#[test]
fn sizes_are_negotiable() {
    let mut rig = Rig::new(1);
    let file = image(1 << 20);
    rig.handle.plug(0, 0, disk(open(&file, true))).unwrap();
    let config = rig.driver.config;
    let word = |rig: &Rig, at| u32::from_le_bytes(rig.driver.read(config + at));
    assert_eq!((word(&rig, 0), word(&rig, 16), word(&rig, 20), word(&rig, 24)), (1, 16, 96, 32));
    assert_eq!((word(&rig, 28) >> 16, word(&rig, 32)), (255, 0x3fff));
    for (at, value) in [(20, 4097), (20, u32::MAX), (24, 0), (24, 261), (0, 9)] {
        rig.driver.write(config + at, &u32::to_le_bytes(value));
    }
    assert_eq!((word(&rig, 0), word(&rig, 20), word(&rig, 24)), (1, 96, 32));
    rig.driver.write(config + 20, &8u32.to_le_bytes());
    rig.driver.write(config + 24, &16u32.to_le_bytes());
    rig.driver.start_all();
    let request = rig.write_request((0, 0), 0, &read_10(1 << 20, 1));
    let parts = [(request, 35, 0), (ANSWER, 20, WRITE), (DATA, 512, WRITE)];
    assert_eq!(rig.driver.ask(REQUESTS, &parts), 20);
    let answer = rig.load(ANSWER, 20);
    assert_eq!((answer[0], answer[10], answer[14]), (8, 2, 5), "sense data is cut");
    rig.driver.reset();
    assert_eq!((word(&rig, 20), word(&rig, 24)), (96, 32));
}

#[test]
fn short_requests_need_a_reset() {
    for parts in [
        vec![(REQUEST, 50, 0), (ANSWER, 108, WRITE)],
        vec![(REQUEST, 51, 0), (ANSWER, 107, WRITE)],
        vec![(REQUEST, 51, 0)],
        vec![(ANSWER, 108, WRITE)],
    ] {
        let mut rig = Rig::started(1);
        rig.driver.queues[REQUESTS].add(&parts);
        rig.driver.kick(REQUESTS);
        wait("NEEDS_RESET", || rig.driver.status() & status::NEEDS_RESET != 0);
    }
}

/// A disk whose requests wait until the gate is open.
fn gated() -> (Arc<MemoryDisk>, ScsiUnit) {
    let memory = MemoryDisk::new(1 << 20);
    let unit = disk(Arc::new(SharedDisk(memory.clone())));
    (memory, unit)
}

#[test]
fn task_management_waits_for_what_it_ends() {
    let mut rig = Rig::started(2);
    let (memory, unit) = gated();
    rig.handle.plug(4, 0, unit).unwrap();
    assert_eq!(rig.task_management(0, (9, 0), 1), BAD_TARGET);
    assert_eq!(rig.task_management(0, (4, 1), 1), 12, "incorrect LUN");
    assert_eq!(rig.task_management(2, (4, 0), 1), 11, "rejected: CLEAR ACA");
    assert_eq!(rig.task_management(99, (4, 0), 1), 11);
    assert_eq!(rig.task_management(0, (4, 0), 77), 0, "no such task: it has ended");
    for (subtype, id, responses) in [
        (0, 2, [OK, OK, ABORTED, OK]),
        (1, 0, [ABORTED; 4]),
        (3, 0, [ABORTED; 4]),
        (5, 0, [RESET; 4]),
        (4, 0, [RESET; 4]),
    ] {
        // While the data is locked, reads are under way.
        let gate = memory.data.lock().unwrap();
        for n in 0..4 {
            let request = rig.write_request((4, 0), n, &read_10(n as u32, 1));
            let parts =
                [(request, 51, 0), (ANSWER + 128 * n, 108, WRITE), (DATA + 512 * n, 512, WRITE)];
            let queue = REQUESTS + (n % 2) as usize;
            rig.driver.queues[queue].add(&parts);
            rig.driver.kick(queue);
        }
        assert_eq!(rig.task_management(6, (4, 0), 3), 10, "it is there");
        assert_eq!(rig.task_management(6, (4, 0), 9), 0);
        assert_eq!(rig.task_management(7, (4, 0), 0), 10);
        let mut tmf = vec![0; 4];
        tmf.extend_from_slice(&u32::to_le_bytes(subtype));
        tmf.extend_from_slice(&[1, 4, 0x40, 0, 0, 0, 0, 0]);
        tmf.extend_from_slice(&u64::to_le_bytes(id));
        rig.store(TMF, &tmf);
        rig.driver.queues[CONTROL].add(&[(TMF, 24, 0), (TMF + 64, 1, WRITE)]);
        rig.driver.kick(CONTROL);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(rig.driver.queues[CONTROL].take_used().is_none(), "tasks are under way");
        drop(gate);
        wait("the function's end", || rig.driver.queues[CONTROL].take_used().is_some());
        assert_eq!(rig.load(TMF + 64, 1), [0]);
        // What it ended has ended; the rest may take its time.
        let mut ended = 0;
        wait("all commands", || {
            for queue in [REQUESTS, REQUESTS + 1] {
                while rig.driver.queues[queue].take_used().is_some() {
                    ended += 1;
                }
            }
            ended == 4
        });
        for n in 0..4 {
            assert_eq!(rig.answer(ANSWER + 128 * n).response, responses[n as usize], "{subtype}");
        }
        if matches!(subtype, 4 | 5) {
            let (answer, _) = rig.ask((4, 0), &[0; 6], &[], true);
            assert_eq!(answer.key(), (6, 0x29, 3));
        }
        assert_eq!(rig.ask((4, 0), &[0; 6], &[], true).0.status, 0);
    }
}

#[test]
fn an_abort_finds_what_lies_in_the_ring() {
    // Offered but not told of: the driver believes that it was sent.
    let mut rig = Rig::started(1);
    let (memory, unit) = gated();
    rig.handle.plug(0, 0, unit).unwrap();
    let request = rig.write_request((0, 0), 5, &write_10(0, 1));
    rig.store(DATA, &[1; 512]);
    rig.driver.queues[REQUESTS].add(&[(request, 51, 0), (DATA, 512, 0), (ANSWER, 108, WRITE)]);
    assert_eq!(rig.task_management(0, (0, 0), 5), 0);
    assert!(rig.driver.queues[REQUESTS].take_used().is_some());
    assert_eq!(memory.log.lock().unwrap().len(), 1, "it is not done later");
}

#[test]
fn units_come_and_go_while_the_guest_runs() {
    let mut rig = Rig::started(1);
    let file = image(1 << 20);
    rig.event_buffers(4);
    rig.handle.plug(2, 0, disk(open(&file, false))).unwrap();
    assert_eq!(rig.event(0), (1, 2, 1), "rescan");
    assert_eq!(number(&rig.good((2, 0), &read_10(7, 1), 512)), 7);
    assert!(rig.handle.unplug(2, 0));
    assert_eq!(rig.event(1), (1, 2, 2), "removed");
    assert!(!rig.handle.unplug(2, 0));
    assert_eq!(rig.ask((2, 0), &INQUIRY, &[(DATA, 36)], true).0.response, BAD_TARGET);
    // Nobody has the image any more: it can be opened for writing again.
    rig.handle.plug(2, 0, disk(open(&file, false))).unwrap();
    assert_eq!(rig.event(2), (1, 2, 1));
    // Another LUN: the first one tells of it too.
    rig.handle.plug(2, 1, disk(Arc::new(SharedDisk(MemoryDisk::new(4096))))).unwrap();
    assert_eq!(rig.event(3), (1, 2, 1));
    assert_eq!(rig.ask((2, 0), &[0; 6], &[], true).0.key(), (6, 0x3f, 0x0e));
    assert_eq!(rig.ask((2, 0), &[0; 6], &[], true).0.status, 0);
}

#[test]
fn events_wait_for_buffers_and_are_not_lost_silently() {
    let mut rig = Rig::started(1);
    let unit = || disk(Arc::new(SharedDisk(MemoryDisk::new(4096))));
    for target in 0..70 {
        rig.handle.plug(target, 0, unit()).unwrap();
    }
    rig.event_buffers(1);
    assert_eq!(rig.event(0), (1 | 1 << 31, 0, 1), "some were missed");
    for target in 1..64 {
        rig.event_buffers(1);
        assert_eq!(rig.event(0), (1, target, 1));
    }
    rig.event_buffers(1);
    rig.handle.unplug(3, 0);
    assert_eq!(rig.event(0), (1, 3, 2));
    // They survive a save.
    rig.handle.unplug(4, 0);
    rig.driver.machine.device.pause();
    let text = serde_json::to_string(&rig.driver.machine.device.state().unwrap()).unwrap();
    let state: TransportState = serde_json::from_str(&text).unwrap();
    assert!(text.contains("unplugged"));
    rig.driver.machine.device.restore(&state).unwrap();
    rig.driver.machine.device.resume();
    rig.event_buffers(1);
    assert_eq!(rig.event(0), (1, 4, 2));
    rig.driver.reset();
    rig.handle.unplug(5, 0);
    rig.driver.next_round();
    rig.driver.start_all();
    rig.event_buffers(1);
    rig.handle.unplug(6, 0);
    assert_eq!(rig.event(0), (1, 6, 2), "nothing from before the reset");
}

#[test]
fn a_cd_is_read_and_changed() {
    let mut rig = Rig::started(1);
    let (first, second) = (image(2 << 20), image(4 << 20));
    let drive = CdRom::new(&CdRomConfig::default(), Some(open(&first, true)));
    rig.handle.plug(1, 0, ScsiUnit::CdRom(drive.clone())).unwrap();
    rig.event_buffers(4);
    assert_eq!(rig.event(0), (1, 1, 1));
    let data = rig.good((1, 0), &read_10(16, 300), 300 * 2048);
    for (n, sector) in data.chunks(512).enumerate() {
        assert_eq!(number(sector), 64 + n as u32);
    }
    drive.eject(false).unwrap();
    assert_eq!(rig.event(1), (3, 1, 0x28));
    assert_eq!(rig.ask((1, 0), &[0; 6], &[], true).0.key(), (2, 0x3a, 2));
    // The image is free again: nobody else holds its lock.
    let mut again = OpenOptions::new(first.path());
    again.format = Some(Format::Raw);
    wait("the lock", || lodge_disk::open(&again).is_ok());
    drive.insert(open(&second, true)).unwrap();
    assert_eq!(rig.event(2), (3, 1, 0x28));
    assert_eq!(rig.ask((1, 0), &[0; 6], &[], true).0.key(), (6, 0x28, 0));
    let capacity = rig.good((1, 0), &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
    assert_eq!(capacity, [0, 0, 7, 0xff, 0, 0, 8, 0]);
}

#[test]
fn many_commands_of_many_units_end_once() {
    let mut rig = Rig::started(4);
    let memory: Vec<_> = (0..4).map(|_| MemoryDisk::new(1 << 20)).collect();
    for (target, memory) in memory.iter().enumerate() {
        rig.handle.plug(target as u8, 0, disk(Arc::new(SharedDisk(memory.clone())))).unwrap();
    }
    let handle = rig.handle.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Others come and go meanwhile, and the machine pauses.
        let device = rig.driver.machine.device.clone();
        let done = &done;
        scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                handle.plug(9, 0, disk(Arc::new(SharedDisk(MemoryDisk::new(4096))))).unwrap();
                device.pause();
                device.resume();
                handle.unplug(9, 0);
            }
        });
        for round in 0..60u32 {
            let mut open = 0;
            for n in 0..32u64 {
                let target = (n % 4) as u8;
                let block = round * 32 + n as u32;
                rig.store(DATA + 512 * n, &(block + 1).to_le_bytes().repeat(128));
                let request = rig.write_request((target, 0), n, &write_10(block, 1));
                let queue = REQUESTS + (n as usize / 4) % 4;
                let answer = ANSWER + 0x1_0000 + 128 * n;
                let parts = [(request, 51, 0), (DATA + 512 * n, 512, 0), (answer, 108, WRITE)];
                rig.driver.queues[queue].add(&parts);
                rig.driver.kick(queue);
                open += 1;
            }
            wait("all commands", || {
                for queue in REQUESTS..REQUESTS + 4 {
                    while rig.driver.queues[queue].take_used().is_some() {
                        open -= 1;
                    }
                }
                open == 0
            });
        }
        done.store(true, Ordering::SeqCst);
    });
    for (target, memory) in memory.iter().enumerate() {
        let data = memory.data.lock().unwrap();
        for block in (0..60 * 32).filter(|block| block % 4 == target) {
            assert_eq!(number(&data[block * 512..]), block as u32 + 1);
        }
        assert_eq!(memory.log.lock().unwrap().len(), 60 * 8, "each once");
    }
}

#[test]
fn random_requests_do_no_harm() {
    let mut random = Random(5);
    let file = image(1 << 20);
    let disc = image(1 << 20);
    let mut rig = Rig::new(2);
    rig.handle.plug(0, 0, disk(open(&file, false))).unwrap();
    let drive = CdRom::new(&CdRomConfig::default(), Some(open(&disc, true)));
    rig.handle.plug(1, 0, ScsiUnit::CdRom(drive.clone())).unwrap();
    for _ in 0..40 {
        rig.driver.start_all();
        for n in 0..60u64 {
            let queue = random.below(4) as usize;
            let mut request: Vec<u8> = (0..64).map(|_| random.next() as u8).collect();
            if random.below(4) != 0 {
                request[..4].copy_from_slice(&[1, random.below(3) as u8, 0x40, 0]);
            }
            if queue == 0 && random.below(2) == 0 {
                request[..8].copy_from_slice(&[0, 0, 0, 0, random.below(9) as u8, 0, 0, 0]);
            }
            rig.store(REQUEST + 64 * n, &request);
            let first = (REQUEST + 64 * n, [24, 51, 51, 64][random.below(4) as usize], 0);
            let mut parts =
                vec![first, (ANSWER, [1, 108, 108, 5][random.below(4) as usize], WRITE)];
            let bits = random.below(18);
            let room = random.below(1 << bits) as u32;
            match random.below(3) {
                0 => parts.insert(1, (DATA, room, 0)),
                1 => parts.push((DATA, room, WRITE)),
                _ => {}
            }
            let ring = &mut rig.driver.queues[queue];
            if ring.room() < parts.len() {
                break;
            }
            if random.below(20) == 0 {
                ring.set(0, (DATA, u32::MAX, NEXT, random.next() as u16));
            }
            ring.add(&parts);
            rig.driver.kick(queue);
        }
        if random.below(4) == 0 {
            let _ = drive.eject(random.below(2) == 0);
            let _ = drive.insert(open(&disc, true));
        }
        rig.driver.next_round();
    }
    rig.driver.start_all();
    assert_eq!(rig.ask((0, 0), &[0; 6], &[], true).0.response, OK);
}
