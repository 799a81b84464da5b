//! The VGA under the BIOS that Debian ships for it (package `seabios`), run by the software CPU in real mode: the BIOS
//! sets modes and draws, and the pictures are what it says it drew.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lodge_accel::state::{Segment, TableRegister};
use lodge_accel::{Exit, Kick, Kind, Vcpu, VcpuSetup, Vm, VmSetup};
use lodge_devices::bus::{BusDevice, SystemBus};
use lodge_devices::device_ram::{Access, DeviceRam};
use lodge_devices::display::edid::edid;
use lodge_devices::display::vga::{CardConfig, Vga};
use lodge_devices::display::{Picture, Rect, Screen};
use lodge_devices::irq::Lines;
use lodge_devices::pci::{Bdf, Root, Slot, Windows};
use lodge_memory::{Bus, GuestMemory, RamLayout, allocate};
use vm_memory::{Bytes, GuestAddress};

const ROM: &str = "/usr/share/seabios/vgabios-stdvga.bin";
const VRAM: u64 = 16 << 20;
const LFB: u32 = 0xd000_0000;
/// Where the BIOS is copied to, the test's code, and its buffer.
const BIOS: u64 = 0xc_0000;
const CODE: u16 = 0x7c00;
const BUFFER: u16 = 0x8000;
const DONE_PORT: u16 = 0xf4;

/// The guest writes here when it has done a step.
#[derive(Default)]
struct Done {
    kick: OnceLock<Arc<dyn Kick>>,
    done: AtomicBool,
}

impl BusDevice for Done {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {
        self.done.store(true, Ordering::SeqCst);
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }
}

struct Pc {
    memory: Arc<GuestMemory>,
    bus: Arc<SystemBus>,
    root: Arc<Root>,
    vcpu: Box<dyn Vcpu>,
    done: Arc<Done>,
    vga: Arc<Vga>,
    picture: Picture,
}

impl Pc {
    /// A PC with RAM but for the VGA's window, after the VGA BIOS was started.
    fn new() -> Self {
        let rom = std::fs::read(ROM)
            .unwrap_or_else(|error| panic!("{ROM}: {error}; install Debian's package seabios"));
        let layout = RamLayout { regions: vec![(0, 0xa_0000), (BIOS, 0x4_0000)] };
        let memory = allocate(&layout).unwrap();
        let bus = Arc::new(SystemBus::default());
        let setup = VmSetup { memory: memory.clone(), bus: bus.clone(), vcpus: 1 };
        let (vm, _): (Arc<dyn Vm>, _) = lodge_accel::open(Kind::Soft, setup).unwrap();
        let root = Root::new(&bus, Lines::new(vm.clone()), Windows::new(1 << 20, 36)).unwrap();
        let ram = DeviceRam::new(vm.clone(), 0, VRAM, Access::ReadWrite).unwrap();
        let vga = Vga::new(ram, rom, &CardConfig { preferred: (1280, 800) }).unwrap();
        let at = Bdf::on_root(2);
        root.add(Slot::At(at), vga.clone()).unwrap();
        root.config_write(at, 0x10, &LFB.to_le_bytes());
        root.config_write(at, 4, &[3, 0]);
        let done: Arc<Done> = Arc::default();
        bus.pio.insert(DONE_PORT.into(), 1, done.clone()).unwrap();
        let mut vcpu = vm.create_vcpu(0, VcpuSetup::Reset).unwrap();
        let _ = done.kick.set(vcpu.kicker());
        real_mode(&mut *vcpu);
        let mut pc = Self { memory, bus, root, vcpu, done, vga, picture: Picture::default() };
        pc.start_bios(at);
        pc
    }

    /// Copies the ROM as firmware does, from its BAR, and calls it with its place in AX.
    fn start_bios(&mut self, at: Bdf) {
        let mut base = [0; 4];
        self.root.config_read(at, 0x30, &mut base);
        let base = u32::from_le_bytes(base);
        self.root.config_write(at, 0x30, &(base | 1).to_le_bytes());
        let mut head = [0; 4];
        self.bus.mmio_read(base.into(), &mut head);
        assert_eq!(head[..2], [0x55, 0xaa], "a ROM's signature");
        for offset in (0..u64::from(head[2]) * 512).step_by(4) {
            let mut part = [0; 4];
            self.bus.mmio_read(u64::from(base) + offset, &mut part);
            self.memory.write_slice(&part, GuestAddress(BIOS + offset)).unwrap();
        }
        self.root.config_write(at, 0x30, &base.to_le_bytes());
        let call = [0x9a, 0x03, 0x00, 0x00, 0xc0];
        let place = u16::from(at.device) << 3;
        self.run(&[&[0xb8], &place.to_le_bytes()[..], &call].concat());
    }

    /// Runs code until it is done.
    fn run(&mut self, code: &[u8]) {
        // out DONE_PORT, al; jmp to itself
        let code = [code, &[0xe6, DONE_PORT as u8, 0xeb, 0xfe]].concat();
        self.memory.write_slice(&code, GuestAddress(CODE.into())).unwrap();
        let mut state = self.vcpu.state().unwrap();
        state.rip = CODE.into();
        self.vcpu.set_state(&state).unwrap();
        self.done.done.store(false, Ordering::SeqCst);
        let (end, ended) = channel::<()>();
        let kick = self.vcpu.kicker();
        let watch = std::thread::spawn(move || {
            if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        assert_eq!(self.vcpu.run().unwrap(), Exit::Kicked);
        drop(end);
        watch.join().unwrap();
        assert!(self.done.done.load(Ordering::SeqCst), "the BIOS hangs");
    }

    /// Calls INT 10H with AX, BX, CX, DX and ES:DI = the buffer; returns AX.
    fn int10(&mut self, ax: u16, bx: u16, cx: u16, dx: u16) -> u16 {
        let mut code = vec![0x31, 0xc0, 0x8e, 0xc0]; // xor ax, ax; mov es, ax
        for (opcode, value) in [(0xb8, ax), (0xbb, bx), (0xb9, cx), (0xba, dx), (0xbf, BUFFER)] {
            code.push(opcode);
            code.extend_from_slice(&value.to_le_bytes());
        }
        code.extend_from_slice(&[0xcd, 0x10]);
        self.run(&code);
        self.vcpu.state().unwrap().gprs[0] as u16
    }

    /// A plain store to anywhere.
    fn store(&mut self, gpa: u32, value: u32) {
        // xor ax, ax; mov es, ax; mov edi, gpa; mov eax, value; mov es:[edi], eax
        let mut code = vec![0x31, 0xc0, 0x8e, 0xc0, 0x66, 0xbf];
        code.extend_from_slice(&gpa.to_le_bytes());
        code.extend_from_slice(&[0x66, 0xb8]);
        code.extend_from_slice(&value.to_le_bytes());
        code.extend_from_slice(&[0x67, 0x66, 0x26, 0x89, 0x07]);
        self.run(&code);
    }

    fn print(&mut self, text: &str) {
        for byte in text.bytes() {
            self.int10(0x0e00 | u16::from(byte), 7, 0, 0);
        }
    }

    fn refresh(&mut self) -> Vec<Rect> {
        self.vga.card().refresh(&mut self.picture).dirty
    }

    fn pixel(&self, x: u32, y: u32) -> u32 {
        self.picture.pixels[(y * self.picture.width + x) as usize]
    }

    fn size(&self) -> (u32, u32) {
        (self.picture.width, self.picture.height)
    }

    /// Bytes that the BIOS put into the buffer.
    fn buffer(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFER.into())).unwrap();
        bytes
    }

    /// The BIOS's glyph of a character in its 8 by 16 font (INT 10H, AX 1130H).
    fn glyph(&mut self, character: char) -> Vec<u8> {
        // mov ax, 1130h; mov bh, 6; int 10h: the font is at ES:BP.
        self.run(&[0xb8, 0x30, 0x11, 0xb7, 6, 0xcd, 0x10]);
        let state = self.vcpu.state().unwrap();
        let at = state.segments[0].base + (state.gprs[5] & 0xffff) + 16 * character as u64;
        let mut glyph = vec![0; 16];
        self.memory.read_slice(&mut glyph, GuestAddress(at)).unwrap();
        glyph
    }

    /// Checks that `text` is at a place of a screen with cells of 9 by 16.
    fn assert_text(&mut self, column: u32, row: u32, text: &str, color: u32) {
        for (column, character) in (column..).zip(text.chars()) {
            for (line, bits) in (0..).zip(self.glyph(character)) {
                for dot in 0..8 {
                    let expected = if bits & 0x80 >> dot != 0 { color } else { 0 };
                    let seen = self.pixel(column * 9 + dot, row * 16 + line);
                    assert_eq!(seen, expected, "{character} at {column},{row}: {dot},{line}");
                }
            }
        }
    }
}

impl Drop for Pc {
    fn drop(&mut self) {
        self.root.remove_all();
    }
}

/// Real mode with data segments that reach everywhere.
fn real_mode(vcpu: &mut dyn Vcpu) {
    let mut state = vcpu.state().unwrap();
    for (index, segment) in state.segments.iter_mut().enumerate() {
        let (attributes, limit) = if index == 1 { (0x9b, 0xffff) } else { (0x93, u32::MAX) };
        *segment = Segment { selector: 0, base: 0, limit, attributes };
    }
    state.idtr = TableRegister { base: 0, limit: 0x3ff };
    state.gprs[4] = 0x7000;
    state.rflags = 2;
    vcpu.set_state(&state).unwrap();
}

/// What IBM's default colours are as pixels.
const GREY: u32 = 0xaaaaaa;

#[test]
fn text() {
    let mut pc = Pc::new();
    pc.int10(0x0003, 0, 0, 0);
    pc.int10(0x0100, 0, 0x2000, 0); // no cursor
    pc.refresh();
    assert_eq!(pc.size(), (720, 400));
    assert!(pc.picture.pixels.iter().all(|pixel| *pixel == 0));
    pc.print("Hello");
    assert_eq!(pc.refresh().len(), 1);
    pc.assert_text(0, 0, "Hello", GREY);
    // Lines to the bottom, and one more: the screen scrolls.
    for line in 0..25 {
        pc.print(&format!("\r\nline {line}"));
    }
    pc.refresh();
    pc.assert_text(0, 0, "line 0", GREY);
    pc.assert_text(0, 24, "line 24", GREY);
    // 50 lines of 8.
    pc.int10(0x1112, 0, 0, 0);
    pc.refresh();
    assert_eq!(pc.size(), (720, 400));
    // 40 columns.
    pc.int10(0x0001, 0, 0, 0);
    pc.print("wide");
    pc.refresh();
    assert_eq!(pc.size(), (720, 400));
}

#[test]
fn graphics() {
    let mut pc = Pc::new();
    // Mode, a pixel's size on the screen, the screen, what a pixel of colour 2 looks like.
    for (mode, (wide, high), size, color) in [
        (0x13, (2, 2), (640, 400), 0x00aa00),
        (0x12, (1, 1), (640, 480), 0x00aa00),
        (0x10, (1, 1), (640, 350), 0x00aa00),
        (0x0d, (2, 2), (640, 400), 0x00aa00),
        (0x11, (1, 1), (640, 480), 0xffffff),
        (0x04, (2, 2), (640, 400), 0xff55ff),
        (0x06, (1, 2), (640, 400), 0xffffff),
    ] {
        pc.int10(mode, 0, 0, 0);
        pc.refresh();
        assert_eq!(pc.size(), size, "{mode:#x}");
        assert!(pc.picture.pixels.iter().all(|pixel| *pixel == 0), "{mode:#x} begins black");
        let number = if color == 0xffffff { 1 } else { 2 };
        pc.int10(0x0c00 | number, 0, 101, 33);
        pc.refresh();
        let lit: Vec<u32> = pc.picture.pixels.iter().copied().filter(|pixel| *pixel != 0).collect();
        assert_eq!(lit, vec![color; wide * high as usize], "{mode:#x}");
        assert_eq!(pc.pixel(101 * wide as u32, 33 * high), color, "{mode:#x}");
        // The BIOS reads it back.
        let read = pc.int10(0x0d00, 0, 101, 33) as u8;
        assert_eq!(read, number as u8, "{mode:#x}");
    }
}

#[test]
fn vbe() {
    let mut pc = Pc::new();
    assert_eq!(pc.int10(0x4f00, 0, 0, 0), 0x004f);
    assert_eq!(&pc.buffer(4), b"VESA");
    // The monitor's EDID.
    assert_eq!(pc.int10(0x4f15, 1, 0, 0), 0x004f);
    assert_eq!(pc.buffer(128), edid(1280, 800));
    // 8, 15, 16, 24 and 32 bits: the mode, and white as a pixel's bytes.
    for (mode, size, bits) in [
        (0x105, (1024, 768), 8),
        (0x116, (1024, 768), 15),
        (0x117, (1024, 768), 16),
        (0x118, (1024, 768), 24),
        (0x144, (1024, 768), 32),
        (0x11b, (1280, 1024), 24),
    ] {
        assert_eq!(pc.int10(0x4f01, 0, mode, 0), 0x004f, "{mode:#x}");
        let info = pc.buffer(256);
        let word = |at: usize| u16::from_le_bytes([info[at], info[at + 1]]);
        assert_eq!((u32::from(word(18)), u32::from(word(20))), size, "{mode:#x}");
        assert_eq!(info[25], bits, "{mode:#x}");
        assert_eq!(info[40..44], LFB.to_le_bytes(), "the linear frame buffer");
        assert_eq!(pc.int10(0x4f02, 0x4000 | mode, 0, 0), 0x004f, "{mode:#x}");
        pc.refresh();
        assert_eq!(pc.size(), size, "{mode:#x}");
        assert!(pc.picture.pixels.iter().all(|pixel| *pixel == 0));
        // Colour 15 of the palette, or all bits: white; the store is seen through the accelerator's dirty pages.
        let pitch = u32::from(word(16));
        let white = if bits == 8 { 0x0f0f_0f0f } else { u32::MAX };
        pc.store(LFB + pitch * 500, white);
        let dirty = pc.refresh();
        assert_eq!(dirty.len(), 1, "{mode:#x}");
        assert_eq!((dirty[0].x, dirty[0].y, dirty[0].height), (0, 500, 1), "{mode:#x}");
        assert_eq!(pc.pixel(0, 500), 0xffffff, "{mode:#x}");
        assert_eq!(pc.refresh(), []);
    }
    // Through the window, with banks: 100 lines of 1024 bytes are one and a half.
    pc.int10(0x4f02, 0x105, 0, 0);
    pc.int10(0x4f05, 0, 0, 1);
    pc.store(0xa_0000 + 36 * 1024, 0x0f0f_0f0f);
    pc.refresh();
    assert_eq!(pc.pixel(3, 100), 0xffffff);
    // The start of the display moves.
    pc.int10(0x4f07, 0, 2, 90);
    pc.refresh();
    assert_eq!((pc.pixel(1, 10), pc.pixel(2, 10)), (0xffffff, 0));
    // Text again.
    pc.int10(0x0003, 0, 0, 0);
    pc.print("A");
    pc.refresh();
    assert_eq!(pc.size(), (720, 400));
    pc.assert_text(0, 0, "A", GREY);
}
