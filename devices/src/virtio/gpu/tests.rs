//! A driver's view of the display: requests in guest memory, and the picture that comes of them.

use std::sync::Arc;

use lodge_memory::{GuestMemory, RamLayout, allocate};
use vm_memory::{Bytes, GuestAddress};

use super::display::Display;
use super::protocol::{HEADER, Message, request};
use super::*;
use crate::display::{Rect, edid::edid};
use crate::virtio::{Chain, Segment};

const RAM: u64 = 8 << 20;
const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x2000;
const PIXELS: u64 = 0x10_0000;
const OK: u32 = 0x1100;

struct Rig {
    memory: Arc<GuestMemory>,
    display: Display,
    picture: Picture,
}

impl Rig {
    fn new() -> Self {
        let memory = allocate(&RamLayout::new(RAM).unwrap()).unwrap();
        Self { memory, display: Display::new((1280, 800)), picture: Picture::default() }
    }

    /// Sends a request with flags; returns the whole answer.
    fn send(&mut self, kind: u32, flags: u32, words: &[u32]) -> Vec<u8> {
        let header = [kind, flags, 0x1111_1111, 0x2222_2222, 0x33, 0];
        let bytes: Vec<u8> =
            header.iter().chain(words).flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        // In two pieces, as Linux does for backings.
        let head = HEADER as u32;
        let rest = bytes.len() as u32 - head;
        let mut readable = vec![Segment { gpa: REQUEST, len: head }];
        if rest > 0 {
            readable.push(Segment { gpa: REQUEST + u64::from(head), len: rest });
        }
        let chain = Chain { head: 0, readable, writable: vec![Segment { gpa: ANSWER, len: 4096 }] };
        let memory = self.memory.clone();
        let message = Message::read(&memory, &chain).unwrap();
        let written = self.display.execute(&message, true);
        let mut answer = vec![0; written as usize];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        answer
    }

    /// Sends a request; returns the answer's type.
    fn ask(&mut self, kind: u32, words: &[u32]) -> u32 {
        let answer = self.send(kind, 0, words);
        assert_eq!(answer[4..HEADER], [0; 20], "no fence was asked for");
        u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]])
    }

    fn done(&mut self, kind: u32, words: &[u32]) {
        assert_eq!(self.ask(kind, words), OK, "{kind:#x} {words:?}");
    }

    fn refresh(&mut self) -> Update {
        self.display.refresh(&mut self.picture)
    }

    /// A resource over guest memory, filled with `pixel(x, y)`, on the screen.
    fn show(&mut self, id: u32, width: u32, height: u32, pixel: impl Fn(u32, u32) -> u32) {
        self.done(request::RESOURCE_CREATE_2D, &[id, 2, width, height]);
        let bytes: Vec<u8> = (0..height)
            .flat_map(|y| (0..width).map(move |x| (x, y)))
            .flat_map(|(x, y)| pixel(x, y).to_le_bytes())
            .collect();
        self.memory.write_slice(&bytes, GuestAddress(PIXELS)).unwrap();
        let at = PIXELS as u32;
        self.done(
            request::RESOURCE_ATTACH_BACKING,
            &[id, 2, at, 0, 4096, 0, at + 4096, 0, bytes.len() as u32, 0],
        );
        self.done(request::TRANSFER_TO_HOST_2D, &[0, 0, width, height, 0, 0, id, 0]);
        self.done(request::SET_SCANOUT, &[0, 0, width, height, 0, id]);
    }

    fn pixel(&self, x: u32, y: u32) -> u32 {
        self.picture.pixels[(y * self.picture.width + x) as usize]
    }
}

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect { x, y, width, height }
}

#[test]
fn the_driver_learns_of_the_display() {
    let mut rig = Rig::new();
    let answer = rig.send(request::GET_DISPLAY_INFO, 1, &[]);
    assert_eq!(answer.len(), 408);
    assert_eq!(answer[..4], 0x1101u32.to_le_bytes());
    assert_eq!(answer[4..8], [1, 0, 0, 0], "the fence comes back");
    assert_eq!(answer[8..16], [[0x11; 4], [0x22; 4]].concat());
    assert_eq!(answer[24..44], [0u32, 0, 1280, 800, 1].map(u32::to_le_bytes).concat());
    assert!(answer[44..].iter().all(|byte| *byte == 0));
    let answer = rig.send(request::GET_EDID, 0, &[0, 0]);
    assert_eq!((answer.len(), &answer[..4]), (1056, &0x1104u32.to_le_bytes()[..]));
    assert_eq!(answer[24..28], 128u32.to_le_bytes());
    assert_eq!(answer[32..160], edid(1280, 800));
    assert_eq!(rig.ask(request::GET_EDID, &[1, 0]), 0x1202);
    assert_eq!(rig.ask(0x108, &[0, 0]), 0x1200, "no capability sets");
    assert_eq!(rig.ask(0, &[]), 0x1200);
}

#[test]
fn what_is_flushed_is_on_the_screen() {
    let mut rig = Rig::new();
    let first = rig.refresh();
    assert_eq!((rig.picture.width, rig.picture.height, first.resized), (1280, 800, true));
    assert_eq!(first.cursor, Some(None));
    rig.show(1, 64, 48, |x, y| 0xff00_0000 | x << 8 | y);
    let update = rig.refresh();
    assert_eq!((update.resized, update.dirty), (true, vec![rect(0, 0, 64, 48)]));
    assert_eq!(rig.pixel(3, 5), 0x000305);
    // Drawn and transferred, but not flushed: nothing yet.
    rig.memory.write_slice(&[9; 64 * 4 * 2], GuestAddress(PIXELS)).unwrap();
    rig.done(request::TRANSFER_TO_HOST_2D, &[0, 0, 64, 2, 0, 0, 1, 0]);
    assert_eq!(rig.refresh().dirty, []);
    rig.done(request::RESOURCE_FLUSH, &[10, 0, 20, 1, 1, 0]);
    rig.done(request::RESOURCE_FLUSH, &[20, 1, 30, 1, 1, 0]);
    rig.done(request::RESOURCE_FLUSH, &[0, 40, 64, 8, 1, 0]);
    assert_eq!(rig.refresh().dirty, [rect(10, 0, 40, 2)], "what is the same is not dirty");
    assert_eq!((rig.pixel(10, 0), rig.pixel(9, 0)), (0x090909, 0x000900));
    assert_eq!(rig.refresh().dirty, []);
    // A part of the resource is the screen.
    rig.done(request::SET_SCANOUT, &[16, 8, 32, 32, 0, 1]);
    assert!(rig.refresh().resized);
    assert_eq!((rig.picture.width, rig.pixel(0, 0)), (32, 0x001008));
    rig.memory.write_slice(&[7; 64 * 4 * 48], GuestAddress(PIXELS)).unwrap();
    rig.done(request::TRANSFER_TO_HOST_2D, &[0, 0, 64, 48, 0, 0, 1, 0]);
    rig.done(request::RESOURCE_FLUSH, &[0, 0, 20, 10, 1, 0]);
    assert_eq!(rig.refresh().dirty, [rect(0, 0, 4, 2)]);
    rig.done(request::RESOURCE_FLUSH, &[48, 0, 16, 48, 1, 0]);
    assert_eq!(rig.refresh().dirty, []);
    // Without a scanout it is black.
    rig.done(request::RESOURCE_UNREF, &[1, 0]);
    rig.refresh();
    assert!(!rig.display.active() && rig.picture == Picture::black(32, 32));
}

#[test]
fn impossible_requests_are_refused() {
    let mut rig = Rig::new();
    rig.show(1, 64, 64, |_, _| 0);
    for (kind, words, code) in [
        (request::RESOURCE_CREATE_2D, &[1, 2, 10, 10][..], 0x1203),
        (request::RESOURCE_CREATE_2D, &[2, 2, 16384, 16384], 0x1201),
        (request::RESOURCE_CREATE_2D, &[2, 77, 10, 10], 0x1205),
        (request::RESOURCE_CREATE_2D, &[2, 2, 10], 0x1205),
        (request::RESOURCE_UNREF, &[9, 0], 0x1203),
        (request::SET_SCANOUT, &[0, 0, 64, 64, 1, 1], 0x1202),
        (request::SET_SCANOUT, &[0, 0, 64, 64, 0, 9], 0x1203),
        (request::SET_SCANOUT, &[0, 0, 65, 64, 0, 1], 0x1205),
        (request::SET_SCANOUT, &[u32::MAX, 0, 2, 64, 0, 1], 0x1205),
        (request::RESOURCE_FLUSH, &[0, 0, 64, 65, 1, 0], 0x1205),
        (request::RESOURCE_FLUSH, &[0, 0, 64, 64, 9, 0], 0x1203),
        (request::TRANSFER_TO_HOST_2D, &[0, 0, 64, 64, 0, 1, 1, 0], 0x1205),
        (request::TRANSFER_TO_HOST_2D, &[0, 0, 64, 64, 0, 0, 9, 0], 0x1203),
        (request::RESOURCE_ATTACH_BACKING, &[1, 0], 0x1200),
        (request::RESOURCE_ATTACH_BACKING, &[9, 0], 0x1203),
        (request::RESOURCE_ATTACH_BACKING, &[1, u32::MAX], 0x1205),
        (request::RESOURCE_ATTACH_BACKING, &[1, 1, 0, 0, 1], 0x1205),
        (request::RESOURCE_ATTACH_BACKING, &[1, 1, RAM as u32, 0, 1, 0], 0x1205),
        (request::RESOURCE_DETACH_BACKING, &[9, 0], 0x1203),
        (request::UPDATE_CURSOR, &[0, 5, 5, 0, 9, 0, 0, 0], 0x1203),
        (request::UPDATE_CURSOR, &[1, 5, 5, 0, 1, 0, 0, 0], 0x1202),
        (request::MOVE_CURSOR, &[0, 5, 5], 0x1205),
    ] {
        assert_eq!(rig.ask(kind, words), code, "{kind:#x} {words:?}");
    }
    // A resource that is too large for the screen, but not for memory.
    rig.done(request::RESOURCE_CREATE_2D, &[3, 2, 16384, 8]);
    assert_eq!(rig.ask(request::SET_SCANOUT, &[0, 0, 16384, 8, 0, 3]), 0x1205);
    rig.done(request::RESOURCE_CREATE_2D, &[4, 2, 300, 300]);
    assert_eq!(rig.ask(request::UPDATE_CURSOR, &[0, 5, 5, 0, 4, 0, 0, 0]), 0x1205);
}

#[test]
fn the_pointer_has_a_shape() {
    let mut rig = Rig::new();
    rig.refresh();
    rig.done(request::RESOURCE_CREATE_2D, &[5, 1, 2, 2]);
    // Half transparent white, multiplied, and opaque.
    let pixels = [0x8080_8080u32, 0xff01_0203, 0, 0x4000_0040];
    let bytes: Vec<u8> = pixels.iter().flat_map(|pixel| pixel.to_le_bytes()).collect();
    rig.memory.write_slice(&bytes, GuestAddress(PIXELS)).unwrap();
    rig.done(request::RESOURCE_ATTACH_BACKING, &[5, 1, PIXELS as u32, 0, 16, 0]);
    rig.done(request::TRANSFER_TO_HOST_2D, &[0, 0, 2, 2, 0, 0, 5, 0]);
    rig.done(request::UPDATE_CURSOR, &[0, 100, 200, 0, 5, 1, 7, 0]);
    assert_eq!(rig.display.position(), (100, 200));
    let cursor = rig.refresh().cursor.unwrap().unwrap();
    assert_eq!((cursor.width, cursor.height, cursor.hot_x, cursor.hot_y), (2, 2, 1, 1));
    assert_eq!(cursor.pixels, [0x80ff_ffff, 0xff01_0203, 0, 0x4000_00ff]);
    assert_eq!(rig.refresh().cursor, None);
    rig.done(request::MOVE_CURSOR, &[0, 1, 2, 0, 5, 0, 0, 0]);
    assert_eq!((rig.display.position(), rig.refresh().cursor), ((1, 2), None));
    rig.done(request::UPDATE_CURSOR, &[0, 1, 2, 0, 0, 0, 0, 0]);
    assert_eq!(rig.refresh().cursor, Some(None));
}

#[test]
fn a_saved_display_shows_the_same() {
    let mut rig = Rig::new();
    rig.show(1, 64, 48, |x, y| x * y);
    rig.done(request::RESOURCE_CREATE_2D, &[5, 1, 2, 2]);
    rig.done(request::UPDATE_CURSOR, &[0, 100, 200, 0, 5, 1, 1, 0]);
    rig.refresh();
    rig.display.prefer(1000, 700);
    let text = serde_json::to_string(&rig.display.save()).unwrap();
    let saved: GpuState = serde_json::from_str(&text).unwrap();
    let mut other = Rig { memory: rig.memory.clone(), ..Rig::new() };
    other.display = Display::restore(&saved).unwrap();
    assert_eq!(serde_json::to_string(&other.display.save()).unwrap(), text);
    assert!(other.display.event());
    assert!(other.refresh().cursor.unwrap().is_some());
    assert_eq!(other.picture, rig.picture);
    // The driver goes on with its backing.
    other.memory.write_slice(&[1; 256], GuestAddress(PIXELS)).unwrap();
    other.done(request::TRANSFER_TO_HOST_2D, &[0, 0, 64, 1, 0, 0, 1, 0]);
    other.done(request::RESOURCE_FLUSH, &[0, 0, 64, 1, 1, 0]);
    other.refresh();
    assert_eq!(other.pixel(63, 0), 0x010101);
    // What cannot be is refused.
    let mut bad = vec![saved.clone(), saved.clone(), saved.clone(), saved.clone()];
    bad[0].scanout.as_mut().unwrap().resource = 7;
    bad[1].scanout.as_mut().unwrap().width = 65;
    bad[2].resources[0].pixels.0.pop();
    bad[3].resources[0].width = 100_000;
    for state in &bad {
        assert!(Display::restore(state).is_err());
    }
    // Nonsense in a backing is found when it is used.
    let mut wild = saved;
    wild.resources[0].backing = Some(vec![(u64::MAX - 4, u32::MAX), (RAM, 9)]);
    other.display = Display::restore(&wild).unwrap();
    let code = other.ask(request::TRANSFER_TO_HOST_2D, &[0, 0, 64, 1, 0, 0, 1, 0]);
    assert_eq!(code, 0x1205);
}

#[test]
fn wishes_are_told_and_acknowledged() {
    let mut gpu = Gpu::new("gpu", (1024, 768));
    let handle = gpu.handle();
    let events = |gpu: &Gpu| {
        let mut data = [0; 16];
        gpu.read_config(0, &mut data);
        assert_eq!(data[4..], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        data[0]
    };
    assert_eq!(events(&gpu), 0);
    assert!(!handle.suggest_size(1024, 768), "nobody listens");
    assert_eq!(events(&gpu), 0);
    gpu.set_features(F_EDID);
    assert!(handle.suggest_size(1, 1_000_000));
    assert_eq!(events(&gpu), 1);
    gpu.write_config(0, &[1, 0, 0, 0]);
    assert_eq!(events(&gpu), 1);
    gpu.write_config(4, &[1, 0, 0, 0]);
    assert_eq!(events(&gpu), 0);
    assert_eq!(handle.0.display().save().preferred, (64, 8192));
    gpu.reset();
    assert!(!handle.suggest_size(100, 100) && !handle.active());
}

/// Random requests: an answer to each, and memory within its limit.
#[test]
fn random_requests_do_no_harm() {
    let mut rig = Rig::new();
    let mut seed = 5u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed ^ seed >> 31) as u32 >> 3
    };
    let kinds =
        [0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x10a, 0x300, 0x301, 0x999];
    for round in 0..30_000 {
        let words: Vec<u32> = (0..random() % 14)
            .map(|_| match random() % 6 {
                0 => random() << 3,
                1 => u32::MAX - random() % 4,
                2 => random() % 1024,
                _ => random() % 5,
            })
            .collect();
        let kind = kinds[random() as usize % kinds.len()];
        assert!(rig.send(kind, random() & 1, &words).len() >= HEADER);
        if round % 64 == 0 {
            rig.refresh();
            assert!(rig.picture.pixels.len() <= 1 << 24);
        }
    }
}

/// The function that is a VGA too.
mod with_vga {
    use lodge_accel::IoEvent;
    use lodge_memory::Bus;

    use super::*;
    use crate::bus::SystemBus;
    use crate::device_ram::{Access, DeviceRam};
    use crate::display::vga::{Card, CardConfig};
    use crate::irq::Lines;
    use crate::pci::{Bdf, Root, Slot, Windows};
    use crate::test_vm::TestVm;
    use crate::virtio::VirtioPci;

    struct Machine {
        bus: Arc<SystemBus>,
        root: Arc<Root>,
        vm: Arc<TestVm>,
        memory: Arc<GuestMemory>,
        function: Arc<VirtioPci>,
        screen: VgaGpuScreen,
        at: Bdf,
    }

    fn machine(vram: u64) -> Machine {
        let vm = Arc::new(TestVm::new(true));
        let bus = Arc::new(SystemBus::default());
        let root = Root::new(&bus, Lines::new(vm.clone()), Windows::new(1 << 30, 40)).unwrap();
        let memory = allocate(&RamLayout::new(RAM).unwrap()).unwrap();
        let ram = DeviceRam::new(vm.clone(), 0, vram, Access::ReadWrite).unwrap();
        let card = Card::new(ram, &CardConfig::default());
        let gpu = Gpu::new("gpu", (1024, 768));
        let screen = VgaGpuScreen::new(gpu.handle(), card.clone());
        let rom = vec![0x55, 0xaa, 1];
        let function =
            VirtioPci::with_vga(Box::new(gpu), memory.clone(), vm.clone(), card, rom).unwrap();
        let at = root.add(Slot::FirstFree, function.clone()).unwrap();
        root.config_write(at, 4, &[7, 0]);
        Machine { bus, root, vm, memory, function, screen, at }
    }

    impl Machine {
        fn config(&self, offset: usize) -> u32 {
            let mut data = [0; 4];
            self.root.config_read(self.at, offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, gpa: u64, data: &[u8]) {
            self.bus.mmio_write(gpa, data);
        }

        fn read(&self, gpa: u64) -> [u8; 4] {
            let mut data = [0; 4];
            self.bus.mmio_read(gpa, &mut data);
            data
        }

        /// Where virtio's structure of a kind is.
        fn structure(&self, kind: u32) -> u64 {
            let mut at = (self.config(0x34) & 0xff) as usize;
            while at != 0 {
                let head = self.config(at);
                if head & 0xff == 9 && head >> 24 == kind {
                    let bar = (self.config(at + 4) & 0xff) as usize;
                    assert_eq!(bar, 2);
                    let base = self.config(0x10 + 4 * bar) & !15;
                    return u64::from(base) + u64::from(self.config(at + 8));
                }
                at = (head >> 8 & 0xff) as usize;
            }
            panic!("no structure {kind}");
        }

        /// The driver starts the control queue.
        fn start(&self) {
            let common = self.structure(1);
            let word = |offset, value: u32| self.write(common + offset, &value.to_le_bytes());
            for done in [1, 3] {
                self.write(common + 20, &[done]);
            }
            word(8, 1);
            word(12, 1);
            self.write(common + 20, &[11]);
            self.write(common + 22, &[0, 0]);
            for (offset, gpa) in [(32, 0x4000), (40, 0x5000), (48, 0x6000)] {
                word(offset, gpa);
            }
            self.write(common + 28, &[1, 0]);
            self.write(common + 20, &[15]);
            assert_eq!(self.read(common + 20)[0], 15);
        }

        /// Sends request number `n` (from 0 on) and waits for its end.
        fn ask(&self, n: u16, kind: u32, words: &[u32]) {
            let header = [kind, 0, 0, 0, 0, 0];
            let bytes: Vec<u8> =
                header.iter().chain(words).flat_map(|word| word.to_le_bytes()).collect();
            let memory = &self.memory;
            memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
            let mut table = [0; 32];
            table[..8].copy_from_slice(&REQUEST.to_le_bytes());
            table[8..12].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            table[12..16].copy_from_slice(&[1, 0, 1, 0]);
            table[16..24].copy_from_slice(&ANSWER.to_le_bytes());
            table[24..28].copy_from_slice(&4096u32.to_le_bytes());
            table[28] = 2;
            memory.write_slice(&table, GuestAddress(0x4000)).unwrap();
            memory.write_obj(0u16, GuestAddress(0x5004 + 2 * u64::from(n))).unwrap();
            memory.write_obj(n + 1, GuestAddress(0x5002)).unwrap();
            self.write(self.structure(2), &[0, 0]);
            let start = std::time::Instant::now();
            while memory.read_obj::<u16>(GuestAddress(0x6002)).unwrap() != n + 1 {
                assert!(start.elapsed().as_secs() < 30, "no answer");
                std::thread::yield_now();
            }
            assert_eq!(memory.read_obj::<u32>(GuestAddress(ANSWER)).unwrap(), OK);
        }
    }

    #[test]
    fn one_function_is_both() {
        let machine = machine(1 << 20);
        assert_eq!((machine.config(0), machine.config(8) >> 8), (0x1050_1af4, 0x03_00_00));
        let frame_buffer = machine.config(0x10) & !15;
        assert_eq!(machine.vm.slot(0).unwrap().gpa, u64::from(frame_buffer));
        let mmio = u64::from(machine.config(0x18));
        assert_eq!(machine.read(mmio), [0, 0xff, 0xff, 0xff], "EDID");
        assert_eq!(machine.read(mmio + 0x1000), [0xff; 4]);
        // The VGA's screen: 64x64, red.
        for (register, value) in [(1, 64u16), (2, 64), (3, 32), (4, 0x41)] {
            machine.write(mmio + 0x500 + 2 * register, &value.to_le_bytes());
        }
        machine.write(mmio + 0x400, &[0x20]);
        machine.write(u64::from(frame_buffer), &[0, 0, 0xff, 0]);
        let mut picture = Picture::default();
        assert!(machine.screen.refresh(&mut picture).resized);
        assert_eq!((picture.width, picture.pixels[0]), (64, 0xff0000));
        // The driver's.
        machine.start();
        let notify = machine.structure(2);
        assert_eq!(machine.vm.ioevents(), [IoEvent::Mmio(notify)]);
        machine.ask(0, request::RESOURCE_CREATE_2D, &[1, 2, 64, 64]);
        machine.screen.refresh(&mut picture);
        assert_eq!(picture.pixels[0], 0xff0000, "nothing is shown yet");
        machine.ask(1, request::SET_SCANOUT, &[0, 0, 64, 64, 0, 1]);
        let update = machine.screen.refresh(&mut picture);
        assert_eq!((update.dirty, update.cursor), (vec![rect(0, 0, 1, 1)], Some(None)));
        assert!(machine.screen.suggest_size(800, 600));
        // Saved and restored, it is the driver's still; a reset gives the screen back.
        machine.function.pause();
        let text = serde_json::to_string(&machine.function.state().unwrap()).unwrap();
        machine.function.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(&machine.function.state().unwrap()).unwrap(), text);
        machine.function.resume();
        machine.screen.refresh(&mut picture);
        assert_eq!(picture.pixels[0], 0);
        machine.write(machine.structure(1) + 20, &[0]);
        machine.screen.refresh(&mut picture);
        assert_eq!(picture.pixels[0], 0xff0000);
        machine.root.reset();
        machine.screen.refresh(&mut picture);
        assert_eq!(picture, Picture::black(64, 64));
        machine.root.remove_all();
        assert!(machine.vm.ioevents().is_empty());
    }
}
