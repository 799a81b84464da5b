//! The SATA controller as drivers use it: registers, commands of disks and CD-ROM drives, resets, plugging, and what
//! a hostile guest may try.

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lodge_devices::ahci::{Ahci, AhciState, AtaDisk, AtaDiskConfig, Drive, Error, PLACE};
use lodge_devices::bus::SystemBus;
use lodge_devices::irq::Lines;
use lodge_devices::pci::{ECAM_BASE, Root, Slot, Windows};
use lodge_devices::storage::{CdRom, CdRomConfig};
use lodge_disk::{Disk, Format, OpenOptions};
use lodge_memory::{Bus, GuestMemory, RamLayout, allocate};
use support::backends::{MemoryDisk, SharedDisk};
use support::test_vm::TestVm;
use support::{RAM, Random, wait};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

/// Where the guest has its lists (port 0; others 64 KiB above each other) and its data.
const LIST: u64 = 0x10_0000;
const RECEIVED: u64 = 0x10_0400;
const TABLES: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

/// Registers.
const GHC: u64 = 4;
const IS: u64 = 8;
const P_CLB: u64 = 0x00;
const P_FB: u64 = 0x08;
const P_IS: u64 = 0x10;
const P_IE: u64 = 0x14;
const P_CMD: u64 = 0x18;
const P_TFD: u64 = 0x20;
const P_SIG: u64 = 0x24;
const P_SSTS: u64 = 0x28;
const P_SCTL: u64 = 0x2c;
const P_SERR: u64 = 0x30;
const P_SACT: u64 = 0x34;
const P_CI: u64 = 0x38;
/// Bits.
const START: u32 = 1;
const RECEIVE: u32 = 1 << 4;
const RUNNING: u32 = 1 << 15;
const DHRS: u32 = 1;
const PSS: u32 = 2;
const SDBS: u32 = 8;
const OFS: u32 = 1 << 24;
const HBFS: u32 = 1 << 29;
const TFES: u32 = 1 << 30;

struct Rig {
    bus: Arc<SystemBus>,
    memory: Arc<GuestMemory>,
    vm: Arc<TestVm>,
    root: Arc<Root>,
    ahci: Arc<Ahci>,
    abar: u64,
}

/// A command for a slot.
#[derive(Clone)]
struct Request {
    fis: [u8; 20],
    packet: [u8; 16],
    flags: u32,
    prds: Vec<(u64, u32)>,
}

fn fis(command: u8, feature: u16, lba: u64, count: u16, device: u8) -> [u8; 20] {
    let (l, f, c) = (lba.to_le_bytes(), feature.to_le_bytes(), count.to_le_bytes());
    [
        0x27, 0x80, command, f[0], l[0], l[1], l[2], device, l[3], l[4], l[5], f[1], c[0], c[1], 0,
        0, 0, 0, 0, 0,
    ]
}

impl Request {
    fn ata(command: u8, feature: u16, lba: u64, count: u16) -> Self {
        let fis = fis(command, feature, lba, count, 0x40);
        Self { fis, packet: [0; 16], flags: 5, prds: Vec::new() }
    }

    /// 28 bits of address.
    fn short(command: u8, lba: u32, count: u8) -> Self {
        let device = 0x40 | (lba >> 24) as u8;
        let fis = fis(command, 0, (lba & 0xff_ffff).into(), count.into(), device);
        Self { fis, packet: [0; 16], flags: 5, prds: Vec::new() }
    }

    /// READ or WRITE FPDMA QUEUED; tag and slot are the same.
    fn queued(command: u8, tag: u32, lba: u64, count: u16) -> Self {
        Self::ata(command, count, lba, (tag << 3) as u16)
    }

    fn packet(cdb: &[u8], dma: bool) -> Self {
        let mut request = Self::ata(0xa0, dma.into(), 0x00ff_fe00, 0);
        request.packet[..cdb.len()].copy_from_slice(cdb);
        request.flags |= 1 << 5;
        request
    }

    fn data(mut self, prds: &[(u64, u32)]) -> Self {
        self.prds = prds.iter().copied().filter(|(_, bytes)| *bytes > 0).collect();
        self
    }

    fn writes(mut self) -> Self {
        self.flags |= 1 << 6;
        self
    }
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

fn disk(disk: Arc<dyn Disk>) -> Drive {
    Drive::Disk(AtaDisk::new(disk, &AtaDiskConfig { serial: "SATA-1".into() }))
}

fn number(data: &[u8]) -> u32 {
    u32::from_le_bytes(data[..4].try_into().unwrap())
}

impl Rig {
    fn new() -> Self {
        Self::over(allocate(&RamLayout::new(RAM).unwrap()).unwrap())
    }

    fn over(memory: Arc<GuestMemory>) -> Self {
        let vm = Arc::new(TestVm::default());
        let bus = Arc::new(SystemBus::default());
        let root = Root::new(&bus, Lines::new(vm.clone()), Windows::new(RAM, 40)).unwrap();
        let ahci = Ahci::new("ahci", memory.clone(), vm.clone()).unwrap();
        root.add(Slot::At(PLACE), ahci.clone()).unwrap();
        let mut rig = Self { bus, memory, vm, root, ahci, abar: 0 };
        rig.config_write(4, &[7, 0]);
        rig.abar = u64::from(rig.config(0x24) & !0xf);
        rig
    }

    /// A controller with a disk at port 0, ready for commands.
    fn with_disk(backend: Arc<dyn Disk>) -> Self {
        let rig = Self::new();
        rig.ahci.plug(0, disk(backend)).unwrap();
        rig.start(0);
        rig
    }

    fn config_address(register: u64) -> u64 {
        ECAM_BASE + (31 << 15) + (2 << 12) + register
    }

    fn config(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.mmio_read(Self::config_address(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn config_write(&self, register: u64, data: &[u8]) {
        self.bus.mmio_write(Self::config_address(register), data);
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.mmio_read(self.abar + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        self.bus.mmio_write(self.abar + register, &value.to_le_bytes());
    }

    fn port(&self, port: u64, register: u64) -> u32 {
        self.read(0x100 + 0x80 * port + register)
    }

    fn set(&self, port: u64, register: u64, value: u32) {
        self.write(0x100 + 0x80 * port + register, value);
    }

    fn store(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).unwrap();
    }

    fn load(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }

    /// As a driver starts a port.
    fn start(&self, port: u64) {
        self.write(GHC, 1 << 31 | 2);
        self.set(port, P_CLB, (LIST + 0x1_0000 * port) as u32);
        self.set(port, P_FB, (RECEIVED + 0x1_0000 * port) as u32);
        self.set(port, P_CMD, RECEIVE | 6);
        self.set(port, P_SERR, u32::MAX);
        self.set(port, P_IS, u32::MAX);
        self.set(port, P_IE, u32::MAX);
        self.set(port, P_CMD, RECEIVE | START | 6);
    }

    fn table(port: u64, slot: u32) -> u64 {
        TABLES + 0x1_0000 * port + 0x200 * u64::from(slot)
    }

    /// Writes a command into a slot.
    fn prepare(&self, port: u64, slot: u32, request: &Request) {
        let table = Self::table(port, slot);
        let header =
            [request.flags | (request.prds.len() as u32) << 16, 0, table as u32, 0, 0, 0, 0, 0];
        let header: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.store(LIST + 0x1_0000 * port + 32 * u64::from(slot), &header);
        self.store(table, &request.fis);
        self.store(table + 0x40, &request.packet);
        for (at, (gpa, bytes)) in request.prds.iter().enumerate() {
            let prd = [&gpa.to_le_bytes()[..], &[0; 4], &(bytes - 1).to_le_bytes()].concat();
            self.store(table + 0x80 + 16 * at as u64, &prd);
        }
    }

    fn issue(&self, port: u64, slot: u32, request: &Request) {
        self.prepare(port, slot, request);
        self.set(port, P_CI, 1 << slot);
    }

    fn prdbc(&self, port: u64, slot: u32) -> u32 {
        number(&self.load(LIST + 0x1_0000 * port + 32 * u64::from(slot) + 4, 4))
    }

    /// Does a command in slot 0; returns PxIS and PxTFD at its end.
    fn ask(&self, port: u64, request: &Request) -> (u32, u32) {
        self.set(port, P_IS, u32::MAX);
        self.issue(port, 0, request);
        self.ended(port)
    }

    fn ended(&self, port: u64) -> (u32, u32) {
        wait("the end of a command", || {
            self.port(port, P_CI) == 0 || self.port(port, P_IS) & (TFES | HBFS) != 0
        });
        (self.port(port, P_IS), self.port(port, P_TFD))
    }

    /// A command that must succeed.
    fn good(&self, port: u64, request: &Request) {
        let (is, tfd) = self.ask(port, request);
        assert_eq!((is & (TFES | HBFS), tfd), (0, 0x50), "{:02x?}", request.fis);
    }

    /// A command that must fail with this error; the port goes on afterwards.
    fn fails(&self, port: u64, request: &Request, error: u32) {
        let (is, tfd) = self.ask(port, request);
        assert_eq!((is & TFES, tfd), (TFES, 0x41 | error << 8), "{:02x?}", request.fis);
        assert_eq!(self.port(port, P_CI), 1, "the failed command is seen");
        self.recover(port);
    }

    /// As drivers do after an error.
    fn recover(&self, port: u64) {
        self.set(port, P_CMD, RECEIVE | 6);
        wait("CR", || self.port(port, P_CMD) & RUNNING == 0);
        assert_eq!((self.port(port, P_CI), self.port(port, P_SACT)), (0, 0));
        self.set(port, P_SERR, u32::MAX);
        self.set(port, P_IS, u32::MAX);
        self.set(port, P_CMD, RECEIVE | START | 6);
    }

    /// A packet with data for the host: what came.
    fn packet(&self, port: u64, cdb: &[u8], room: u32) -> Vec<u8> {
        let request = Request::packet(cdb, true).data(&[(DATA, room)]);
        let (is, tfd) = self.ask(port, &request);
        assert_eq!((is & TFES, tfd & 0xff), (0, 0x50), "{cdb:02x?}");
        self.load(DATA, self.prdbc(port, 0) as usize)
    }

    /// A packet that must fail: key, code, qualifier, as REQUEST SENSE tells them.
    fn packet_fails(&self, port: u64, cdb: &[u8]) -> (u8, u8, u8) {
        let (is, tfd) = self.ask(port, &Request::packet(cdb, true).data(&[(DATA, 4096)]));
        assert_eq!((is & TFES, tfd & 0xff), (TFES, 0x41), "{cdb:02x?}");
        self.recover(port);
        let sense = self.packet(port, &[3, 0, 0, 0, 18, 0], 18);
        assert_eq!(tfd >> 12, u32::from(sense[2]), "the key is in the error register");
        (sense[2], sense[12], sense[13])
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.root.remove_all();
    }
}

#[test]
fn the_controller_is_the_chipsets() {
    let rig = Rig::new();
    assert_eq!(rig.config(0), 0x2922_8086);
    assert_eq!(rig.config(8), 0x0106_0102);
    assert_eq!(rig.config(0x20) & 1, 1, "ports");
    assert_eq!(rig.config(0x3c) >> 8 & 0xff, 1, "INTA");
    assert_eq!(rig.config(0x90) & 0xff, 0x40, "AHCI mode");
    rig.config_write(0x92, &[0xff, 0xff]);
    assert_eq!(rig.config(0x90) >> 16, 0x3f, "ports that are on");
    let (cap, pi, version) = (rig.read(0), rig.read(0xc), rig.read(0x10));
    assert_eq!((cap & 0x1f, cap >> 8 & 0x1f, pi, version), (5, 31, 0x3f, 0x1_0301));
    assert_eq!(cap & (1 << 31 | 1 << 30 | 1 << 24), 1 << 31 | 1 << 30 | 1 << 24);
    // Every register by index and data too.
    let io = u64::from(rig.config(0x20) & !3);
    for register in (0..0x400).step_by(4) {
        rig.bus.pio_write((io + 0x10) as u16, &u32::to_le_bytes(register));
        let mut data = [0; 4];
        rig.bus.pio_read((io + 0x14) as u16, &mut data);
        assert_eq!(u32::from_le_bytes(data), rig.read(register.into()));
    }
    rig.bus.pio_write((io + 0x10) as u16, &[4, 0, 0, 0]);
    rig.bus.pio_write((io + 0x14) as u16, &[2, 0, 0, 0]);
    assert_eq!(rig.read(GHC), 1 << 31 | 2);
    // Without drives, ports are silent.
    for port in 0..6 {
        let registers = [P_SSTS, P_SIG, P_TFD, P_CI, P_SERR].map(|at| rig.port(port, at));
        assert_eq!(registers, [0, u32::MAX, 0x7f, 0, 0]);
    }
    // Parts of registers, and two at once.
    rig.bus.mmio_write(rig.abar + 0x100 + P_CLB, &[0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0]);
    assert_eq!((rig.port(0, P_CLB), rig.port(0, P_CLB + 4)), (0xffff_fc00, 2));
    rig.bus.mmio_write(rig.abar + 0x100 + P_CLB + 2, &[0x12]);
    assert_eq!(rig.port(0, P_CLB), 0xff12_fc00);
}

#[test]
fn drives_are_found_by_their_signatures() {
    let rig = Rig::new();
    let file = image(1 << 20);
    rig.ahci.plug(1, disk(open(&file, false))).unwrap();
    let drive = CdRom::new(&CdRomConfig { serial: "CD-1".into() }, None);
    rig.ahci.plug(2, Drive::CdRom(drive)).unwrap();
    assert!(matches!(rig.ahci.plug(1, disk(open(&image(512), true))), Err(Error::Port(1))));
    assert!(matches!(rig.ahci.plug(6, disk(open(&image(512), true))), Err(Error::Port(6))));
    for port in [1, 2] {
        rig.start(port);
        assert_eq!(rig.port(port, P_SSTS), 0x133);
    }
    assert_eq!((rig.port(1, P_SIG), rig.port(1, P_TFD)), (0x101, 0x150));
    assert_eq!((rig.port(2, P_SIG), rig.port(2, P_TFD)), (0xeb14_0101, 0x100));
    assert_eq!(
        rig.load(RECEIVED + 0x2_0000 + 0x40, 13),
        [0x34, 0, 0, 1, 1, 0x14, 0xeb, 0, 0, 0, 0, 0, 1]
    );
    let identify = |port, command| {
        let (is, tfd) = rig.ask(port, &Request::ata(command, 0, 0, 0).data(&[(DATA, 512)]));
        assert_eq!((is & (DHRS | PSS), tfd), (PSS, 0x50));
        assert_eq!(rig.prdbc(port, 0), 512);
        let setup = rig.load(RECEIVED + 0x1_0000 * port + 0x20, 18);
        assert_eq!(
            (setup[0], setup[1], setup[2], setup[15], setup[16], setup[17]),
            (0x5f, 0x60, 0x58, 0x50, 0, 2)
        );
        let data = rig.load(DATA, 512);
        assert_eq!(data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        data.chunks(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect::<Vec<_>>()
    };
    let text = |words: &[u16]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        String::from_utf8(bytes).unwrap().trim_end().to_owned()
    };
    let words = identify(1, 0xec);
    assert_eq!(
        (text(&words[10..20]), text(&words[27..47])),
        ("SATA-1".into(), "LODGE HARDDISK".into())
    );
    assert_eq!((words[60], words[61], words[100]), (2048, 0, 2048));
    assert_eq!((words[75], words[76] >> 8 & 1, words[83] >> 10 & 1, words[169]), (31, 1, 1, 1));
    let words = identify(2, 0xa1);
    assert_eq!((words[0], text(&words[27..47])), (0x85c0, "LODGE CD-ROM".into()));
    // A drive is no disk.
    let (_, tfd) = rig.ask(2, &Request::ata(0xec, 0, 0, 0).data(&[(DATA, 512)]));
    assert_eq!(tfd, 0x441);
    assert_eq!(rig.load(RECEIVED + 0x2_0040, 7)[4..], [1, 0x14, 0xeb]);
}

#[test]
fn sectors_are_read_by_every_command() {
    let file = image(40 << 20);
    let rig = Rig::with_disk(open(&file, true));
    let prds = [(DATA, 2), (DATA + 2, 510), (DATA + 0x1000, 512 * 15)];
    for (request, first, pio) in [
        (Request::short(0x20, 5, 16), 5, true),
        (Request::short(0xc4, 6, 16), 6, true),
        (Request::short(0xc8, 7, 16), 7, false),
        (Request::ata(0x24, 0, 70_000, 16), 70_000, true),
        (Request::ata(0x29, 0, 8, 16), 8, true),
        (Request::ata(0x25, 0, 81_904, 16), 81_904, false),
    ] {
        let request = request.data(&prds);
        let (is, tfd) = rig.ask(0, &request);
        assert_eq!((is & (DHRS | PSS | TFES), tfd), (if pio { PSS } else { DHRS }, 0x50));
        assert_eq!(rig.prdbc(0, 0), 16 * 512);
        assert_eq!((number(&rig.load(DATA, 4)), number(&rig.load(DATA + 508, 4))), (first, first));
        for n in 0..15 {
            assert_eq!(number(&rig.load(DATA + 0x1000 + 512 * n, 4)), first + 1 + n as u32);
        }
    }
    // Cylinder 2, head 3, sector 4.
    let mut request = Request::short(0xc8, 0, 1).data(&[(DATA, 512)]);
    request.fis[4..8].copy_from_slice(&[4, 2, 0, 0xa3]);
    rig.good(0, &request);
    assert_eq!(number(&rig.load(DATA, 4)), (2 * 16 + 3) * 63 + 3);
    // A count of 0 is the most.
    let many: Vec<_> = (0..8).map(|n| (DATA + 0x4000 * n, 0x4000)).collect();
    rig.good(0, &Request::short(0xc8, 1, 0).data(&many));
    assert_eq!((rig.prdbc(0, 0), number(&rig.load(DATA + 255 * 512, 4))), (256 * 512, 256));
    // Room for a part: the rest is lost, and told.
    let (is, tfd) = rig.ask(0, &Request::short(0xc8, 9, 4).data(&[(DATA, 1024)]));
    assert_eq!((is & (OFS | DHRS), tfd, rig.prdbc(0, 0)), (OFS | DHRS, 0x50, 1024));
    for request in [
        Request::short(0xc8, 0x0fff_ffff, 1),
        Request::ata(0x25, 0, 81_920, 1),
        Request::ata(0x25, 0, 0xffff_ffff_ffff, 0),
        Request::ata(0x24, 0, 81_919, 2),
        Request::ata(0x42, 0, 81_919, 2),
    ] {
        rig.fails(0, &request.data(&[(DATA, 1024)]), 0x10);
    }
    rig.good(0, &Request::ata(0x42, 0, 81_919, 1));
    rig.good(0, &Request::short(0x40, 1, 9));
    // A read-only disk.
    for command in [0x30, 0xc5, 0xca, 0x34, 0x39, 0x35, 0x3d, 0xce, 0x06] {
        rig.fails(0, &Request::ata(command, 1, 0, 1).data(&[(DATA, 512)]).writes(), 4);
    }
    rig.good(0, &Request::ata(0xea, 0, 0, 0));
}

#[test]
fn sectors_are_written_by_every_command() {
    let file = image(1 << 20);
    let rig = Rig::with_disk(open(&file, false));
    for (n, command) in [0x30, 0xc5, 0xca, 0x34, 0x39, 0x35, 0x3d, 0xce].into_iter().enumerate() {
        let n = n as u64;
        rig.store(DATA, &[n as u8 + 1; 1024]);
        let request = Request::ata(command, 0, 10 * n, 2).data(&[(DATA, 1000), (DATA + 1000, 24)]);
        let (is, tfd) = rig.ask(0, &request.writes());
        assert_eq!((is & DHRS, tfd, rig.prdbc(0, 0)), (DHRS, 0x50, 1024));
        let mut written = [0; 1536];
        file.as_file().read_exact_at(&mut written, 5120 * n).unwrap();
        assert_eq!(written[..1024], [n as u8 + 1; 1024], "{command:#x}");
        assert_eq!(number(&written[1024..]), 10 * n as u32 + 2);
    }
    // Less data than promised: nothing is written.
    rig.fails(0, &Request::ata(0x35, 0, 100, 2).data(&[(DATA, 512)]).writes(), 4);
    let mut sector = [0; 4];
    file.as_file().read_exact_at(&mut sector, 51_200).unwrap();
    assert_eq!(number(&sector), 100);
    // Trim: two ranges and an empty one.
    let mut list = [0; 512];
    list[..8].copy_from_slice(&(64 | 8u64 << 48).to_le_bytes());
    list[16..24].copy_from_slice(&(128 | 16u64 << 48).to_le_bytes());
    rig.store(DATA, &list);
    rig.good(0, &Request::ata(0x06, 1, 0, 1).data(&[(DATA, 512)]).writes());
    let mut data = vec![0; 1 << 20];
    file.as_file().read_exact_at(&mut data, 0).unwrap();
    assert!(data[64 * 512..72 * 512].iter().all(|byte| *byte == 0));
    assert!(data[128 * 512..144 * 512].iter().all(|byte| *byte == 0));
    assert_eq!(number(&data[144 * 512..]), 144);
    list[16..24].copy_from_slice(&(2048 | 16u64 << 48).to_le_bytes());
    rig.store(DATA, &list);
    rig.fails(0, &Request::ata(0x06, 1, 0, 1).data(&[(DATA, 512)]).writes(), 0x10);
    rig.fails(0, &Request::ata(0x06, 0, 0, 1).data(&[(DATA, 512)]).writes(), 4);
    rig.fails(0, &Request::ata(0x06, 1, 0, 9).data(&[(DATA, 4608)]).writes(), 4);
}

#[test]
fn many_queued_commands_run_at_once() {
    let memory = MemoryDisk::new(2 << 20);
    let rig = Rig::with_disk(Arc::new(SharedDisk(memory.clone())));
    for round in 0..40u32 {
        // All writes, then all reads.
        for command in [0x61, 0x60] {
            for slot in 0..32u32 {
                let block = (round * 32 + slot) % 1280;
                let at = DATA + 0x400 * u64::from(slot);
                if command == 0x61 {
                    rig.store(at, &(round * 32 + slot + 1).to_le_bytes().repeat(256));
                } else {
                    rig.store(at, &[0; 1024]);
                }
                let request = Request::queued(command, slot, u64::from(block) * 2, 2);
                let request = request.data(&[(at, 512), (at + 512, 512)]);
                rig.prepare(0, slot, &if command == 0x61 { request.writes() } else { request });
            }
            rig.set(0, P_SACT, u32::MAX);
            rig.set(0, P_CI, u32::MAX);
            wait("all queued commands", || rig.port(0, P_SACT) == 0);
            assert_eq!((rig.port(0, P_CI), rig.port(0, P_TFD)), (0, 0x50));
            assert_eq!(rig.port(0, P_IS) & (SDBS | TFES), SDBS);
        }
        for slot in 0..32u32 {
            let at = DATA + 0x400 * u64::from(slot);
            let expected = (round * 32 + slot + 1).to_le_bytes().repeat(256);
            assert_eq!(rig.load(at, 1024), expected, "slot {slot}");
        }
    }
    // FUA: durable before it ends.
    memory.log.lock().unwrap().clear();
    let mut request = Request::queued(0x61, 3, 0, 1).data(&[(DATA, 512)]).writes();
    request.fis[7] |= 0x80;
    rig.set(0, P_SACT, 8);
    rig.issue(0, 3, &request);
    wait("the write", || rig.port(0, P_SACT) == 0);
    let log: Vec<_> = memory.log.lock().unwrap().iter().map(|(name, _)| *name).collect();
    assert_eq!(log, ["write", "flush"]);
}

#[test]
fn a_queued_command_that_fails_is_told_by_the_log() {
    let file = image(1 << 20);
    let rig = Rig::with_disk(open(&file, false));
    let good = Request::queued(0x60, 0, 1, 1).data(&[(DATA, 512)]);
    rig.prepare(0, 0, &good);
    rig.prepare(0, 5, &Request::queued(0x60, 5, 0x123_4567, 1).data(&[(DATA, 512)]));
    rig.set(0, P_SACT, 0x21);
    rig.set(0, P_CI, 0x21);
    wait("an error", || rig.port(0, P_IS) & TFES != 0);
    assert_eq!(rig.port(0, P_TFD), 0x1041);
    assert_ne!(rig.port(0, P_SACT) & 0x20, 0);
    let bits = rig.load(RECEIVED + 0x58, 8);
    assert_eq!((bits[0], bits[2], bits[3]), (0xa1, 0x41, 0x10));
    rig.recover(0);
    let log = Request::ata(0x2f, 0, 0x10, 1).data(&[(DATA, 512)]);
    rig.good(0, &log);
    let data = rig.load(DATA, 512);
    assert_eq!((data[0], data[2], data[3]), (5, 0x41, 0x10));
    assert_eq!(data[4..11], [0x67, 0x45, 0x23, 0x40, 1, 0, 0]);
    assert_eq!(data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    rig.good(0, &log);
    assert_eq!(rig.load(DATA, 1), [0x80], "no error any more");
    rig.set(0, P_SACT, 1);
    rig.issue(0, 0, &good);
    wait("a read", || rig.port(0, P_SACT) == 0);
}

#[test]
fn the_disk_has_features() {
    let file = image(1 << 20);
    let rig = Rig::with_disk(open(&file, false));
    let word = |at: usize| {
        rig.good(0, &Request::ata(0xec, 0, 0, 0).data(&[(DATA, 512)]));
        u16::from_le_bytes(rig.load(DATA + 2 * at as u64, 2).try_into().unwrap())
    };
    assert_eq!(word(85) & 1 << 5, 1 << 5);
    rig.good(0, &Request::ata(0xef, 0x82, 0, 0));
    assert_eq!(word(85) & 1 << 5, 0, "write cache off");
    rig.good(0, &Request::ata(0xef, 0x02, 0, 0));
    rig.good(0, &Request::ata(0xef, 0x03, 0, 0x42));
    assert_eq!(word(88), 0x043f);
    rig.good(0, &Request::ata(0xef, 0x05, 0, 0x80));
    assert_eq!(word(91), 0x80);
    rig.fails(0, &Request::ata(0xef, 0x03, 0, 0x46), 4);
    rig.fails(0, &Request::ata(0xef, 0x99, 0, 0), 4);
    rig.good(0, &Request::ata(0xc6, 0, 0, 8));
    assert_eq!(word(59), 0x0108);
    rig.fails(0, &Request::ata(0xc6, 0, 0, 3), 4);
    rig.fails(0, &Request::ata(0xc6, 0, 0, 32), 4);
    rig.good(0, &Request::ata(0xc6, 0, 0, 0));
    rig.fails(0, &Request::ata(0xc4, 0, 0, 1).data(&[(DATA, 512)]), 4);
    for command in [0xe0, 0xe1, 0xe2, 0xe3, 0xe6, 0xe7, 0xea, 0x10, 0x70] {
        rig.good(0, &Request::ata(command, 0, 0, 0));
    }
    rig.good(0, &Request::ata(0xe5, 0, 0, 0));
    assert_eq!(rig.load(RECEIVED + 0x40 + 12, 1), [0xff], "active");
    rig.good(0, &Request::ata(0x27, 0, 0, 0));
    assert_eq!(rig.load(RECEIVED + 0x44, 3), [0xff, 7, 0]);
    rig.ask(0, &Request::ata(0x90, 0, 0, 0));
    assert_eq!(rig.port(0, P_TFD), 0x150);
    let smart =
        |feature, log| Request::ata(0xb0, feature, 0xc2_4f00u64 | log, 1).data(&[(DATA, 512)]);
    for feature in [0xd0, 0xd1, 0xd2, 0xd4, 0xd5, 0xda] {
        rig.good(0, &smart(feature, 0));
    }
    assert_eq!(rig.load(RECEIVED + 0x45, 2), [0x4f, 0xc2], "all is well");
    rig.good(0, &smart(0xd9, 0));
    rig.fails(0, &smart(0xd0, 0), 4);
    rig.good(0, &smart(0xd8, 0));
    rig.fails(0, &Request::ata(0xb0, 0xd0, 0, 1).data(&[(DATA, 512)]), 4);
    rig.good(0, &Request::ata(0x47, 0, 0, 1).data(&[(DATA, 512)]));
    assert_eq!((rig.load(DATA, 1)[0], rig.load(DATA + 32, 1)[0]), (1, 1));
    rig.fails(0, &Request::ata(0x2f, 0, 0x30, 1).data(&[(DATA, 512)]), 4);
    // NOP, security, unknown ones, packets.
    for command in [0x00, 0x08, 0x3f, 0x60 + 3, 0xa0, 0xa1, 0xf1, 0xf2, 0xf5, 0xff] {
        rig.fails(0, &Request::ata(command, 0, 0, 1), 4);
    }
}

#[test]
fn a_cd_is_read_by_packets() {
    let file = image(8 << 20);
    let rig = Rig::new();
    let drive = CdRom::new(&CdRomConfig::default(), Some(open(&file, true)));
    rig.ahci.plug(3, Drive::CdRom(drive.clone())).unwrap();
    rig.start(3);
    assert_eq!(&rig.packet(3, &[0x12, 0, 0, 0, 36, 0], 36)[8..23], b"LODGE   CD-ROM ");
    assert_eq!(rig.packet(3, &[0x25], 8), [0, 0, 0x0f, 0xff, 0, 0, 8, 0]);
    // SeaBIOS: no data, but a list of 4 MiB over the end of RAM.
    let ready = Request::packet(&[0; 6], true).data(&[(RAM - 512, 1 << 22)]);
    assert_eq!(rig.ask(3, &ready), (DHRS, 0x50));
    let read = [0x28, 0, 0, 0, 1, 0, 0, 0, 64, 0];
    let data = rig.packet(3, &read, 64 * 2048);
    for (n, sector) in data.chunks(512).enumerate() {
        assert_eq!(number(sector), 1024 + n as u32);
    }
    // The same by PIO, in blocks of 3000 bytes: the last one has what is left.
    rig.store(DATA, &[0; 4096]);
    let mut request =
        Request::packet(&read, false).data(&[(DATA, 100_000), (DATA + 100_000, 31_072)]);
    request.fis[5..7].copy_from_slice(&3000u16.to_le_bytes());
    let (is, tfd) = rig.ask(3, &request);
    assert_eq!((is & (DHRS | PSS), tfd), (DHRS | PSS, 0x50));
    assert_eq!(rig.load(DATA, 64 * 2048), data);
    let setup = rig.load(RECEIVED + 0x3_0020, 18);
    assert_eq!(u16::from_le_bytes([setup[16], setup[17]]), (64 * 2048 % 3000) as u16);
    assert_eq!(rig.load(RECEIVED + 0x3_0040 + 12, 1), [3], "interrupt reason");
    // Fewer bytes of room than the drive has.
    assert_eq!(rig.packet(3, &read, 1000).len(), 1000);
    assert_eq!(rig.packet_fails(3, &[0x28, 0, 0, 0, 0x10, 0, 0, 0, 1, 0]), (5, 0x21, 0));
    assert_eq!(rig.packet_fails(3, &[0xff]), (5, 0x20, 0));
    assert_eq!(rig.packet(3, &[3, 0, 0, 0, 18, 0], 18)[2], 0, "sense is told once");
    // MODE SELECT with data to the drive.
    rig.store(DATA, &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 8, 0]);
    let select = Request::packet(&[0x15, 0x10, 0, 0, 12, 0], true).data(&[(DATA, 12)]).writes();
    assert_eq!(rig.ask(3, &select).1, 0x50);
    // Overlapped packets and other commands.
    let mut request = Request::packet(&read, true);
    request.fis[3] = 2;
    rig.fails(3, &request, 4);
    rig.fails(3, &Request::ata(0x25, 0, 0, 1).data(&[(DATA, 512)]), 4);
    rig.good(3, &Request::ata(0xef, 3, 0, 0x45));
    let (_, tfd) = rig.ask(3, &Request::ata(0x08, 0, 0, 0));
    assert_eq!(tfd, 0x100, "device reset");
}

#[test]
fn the_medium_is_changed_while_the_guest_runs() {
    let (first, second) = (image(1 << 20), image(2 << 20));
    let rig = Rig::new();
    let drive = CdRom::new(&CdRomConfig::default(), Some(open(&first, true)));
    rig.ahci.plug(0, Drive::CdRom(drive.clone())).unwrap();
    rig.start(0);
    let ready = [0; 6];
    rig.packet(0, &ready, 0);
    rig.packet(0, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 2048);
    rig.packet(0, &[0x1e, 0, 0, 0, 1, 0], 0);
    assert!(drive.eject(false).is_err());
    assert_eq!(rig.packet(0, &[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0], 8)[4], 1, "eject request");
    rig.packet(0, &[0x1e, 0, 0, 0, 0, 0], 0);
    rig.packet(0, &[0x1b, 0, 0, 0, 2, 0], 0);
    assert!(drive.is_open());
    assert_eq!(rig.packet_fails(0, &ready), (2, 0x3a, 2));
    drive.eject(false).unwrap();
    let mut options = OpenOptions::new(first.path());
    options.format = Some(Format::Raw);
    wait("the first image's lock", || lodge_disk::open(&options).is_ok());
    drive.insert(open(&second, true)).unwrap();
    assert_eq!(rig.packet_fails(0, &ready), (6, 0x28, 0));
    assert_eq!(rig.packet(0, &[0x25], 8)[..4], [0, 0, 3, 0xff]);
}

#[test]
fn interrupts_by_pin_and_by_message() {
    let file = image(1 << 20);
    let rig = Rig::with_disk(open(&file, false));
    let gsi = rig.config(0x3c) & 0xff;
    let read = Request::short(0xc8, 0, 1).data(&[(DATA, 512)]);
    rig.good(0, &read);
    wait("the pin", || rig.vm.irqs().last() == Some(&(gsi, true)));
    rig.set(0, P_IS, u32::MAX);
    assert_eq!(rig.read(IS), 1, "IS is sticky");
    rig.write(IS, 1);
    assert_eq!(rig.vm.irqs().last(), Some(&(gsi, false)));
    // Masked at the port, then by IE.
    rig.set(0, P_IE, 0);
    rig.good(0, &read);
    assert_eq!(rig.read(IS), 0);
    rig.set(0, P_IE, DHRS);
    assert_eq!((rig.read(IS), rig.vm.irqs().last()), (1, Some(&(gsi, true))));
    rig.write(GHC, 1 << 31);
    assert_eq!(rig.vm.irqs().last(), Some(&(gsi, false)));
    rig.set(0, P_IS, u32::MAX);
    rig.write(IS, 1);
    // MSI.
    let cap = u64::from(rig.config(0x34) & 0xff);
    assert_eq!(rig.config(cap) & 0xff, 5);
    rig.config_write(cap + 4, &0xfee0_0000u32.to_le_bytes());
    rig.config_write(cap + 12, &0x4055u16.to_le_bytes());
    rig.config_write(cap + 2, &1u16.to_le_bytes());
    rig.write(GHC, 1 << 31 | 2);
    rig.good(0, &read);
    wait("a message", || rig.vm.msis().len() == 1);
    assert_eq!(rig.vm.msis()[0].data, 0x4055);
    assert_eq!(rig.vm.irqs().last(), Some(&(gsi, false)), "not the pin");
    rig.set(0, P_IS, u32::MAX);
    rig.write(IS, 1);
    rig.good(0, &read);
    wait("another message", || rig.vm.msis().len() == 2);
}

/// Commands of a disk whose requests wait while its data is locked.
fn outstanding(rig: &Rig, count: u32) {
    for slot in 0..count {
        rig.prepare(
            0,
            slot,
            &Request::queued(0x60, slot, slot.into(), 1).data(&[(DATA + 0x1000, 512)]),
        );
    }
    rig.set(0, P_SACT, (1 << count) - 1);
    rig.set(0, P_CI, (1 << count) - 1);
    wait("the device's answer", || rig.port(0, P_CI) == 0);
}

#[test]
fn resets_in_the_middle_of_io() {
    let memory = MemoryDisk::new(1 << 20);
    let rig = Rig::with_disk(Arc::new(SharedDisk(memory.clone())));
    for kind in 0..5 {
        let gate = memory.data.lock().unwrap();
        outstanding(&rig, 4);
        assert_eq!(rig.port(0, P_SACT), 15);
        match kind {
            0 => rig.set(0, P_CMD, RECEIVE | 6),
            1 => {
                rig.set(0, P_SCTL, 1);
                assert_eq!(rig.port(0, P_SSTS), 1);
                rig.set(0, P_SCTL, 0);
            }
            2 => {
                rig.write(GHC, 1 << 31 | 1);
                assert_eq!(rig.read(GHC) & 1, 1, "under way");
            }
            3 => {
                rig.set(0, P_SCTL, 4);
                assert_eq!((rig.port(0, P_SSTS), rig.port(0, P_SIG)), (4, u32::MAX));
                rig.set(0, P_SCTL, 0);
            }
            _ => {
                rig.set(0, P_CMD, RECEIVE | 6);
                rig.set(0, P_CMD, RECEIVE | START | 6);
            }
        }
        assert_eq!((rig.port(0, P_SACT), rig.port(0, P_CI)), (0, 0));
        assert_eq!(rig.port(0, P_CMD) & RUNNING, RUNNING, "guest memory is still used");
        // A new command waits for the old ones: its memory may be theirs.
        rig.start(0);
        rig.issue(0, 9, &Request::short(0xc8, 7, 1).data(&[(DATA, 512)]));
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(rig.port(0, P_CI), 1 << 9);
        drop(gate);
        let (is, tfd) = rig.ended(0);
        assert_eq!((is & (SDBS | TFES), tfd, rig.read(GHC) & 1), (0, 0x50, 0), "nothing of old");
        rig.set(0, P_CMD, RECEIVE | 6);
        assert_eq!(rig.port(0, P_CMD) & RUNNING, 0);
        rig.set(0, P_CMD, RECEIVE | START | 6);
    }
    // The machine's reset waits.
    let gate = memory.data.lock().unwrap();
    outstanding(&rig, 2);
    let root = rig.root.clone();
    let reset = std::thread::spawn(move || root.reset());
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert!(!reset.is_finished());
    drop(gate);
    reset.join().unwrap();
    rig.config_write(4, &[7, 0]);
    assert_eq!((rig.read(GHC), rig.port(0, P_CMD) & (START | RECEIVE | RUNNING)), (1 << 31, 0));
    rig.start(0);
    rig.good(0, &Request::short(0xc8, 7, 1).data(&[(DATA, 512)]));
}

#[test]
fn a_software_reset_as_linux_does_it() {
    let file = image(1 << 20);
    let rig = Rig::with_disk(open(&file, false));
    let mut control = Request::ata(0, 0, 0, 0);
    control.fis[1] = 0;
    control.fis[15] = 4;
    control.flags |= 1 << 8 | 1 << 10;
    rig.issue(0, 0, &control);
    wait("the first FIS", || rig.port(0, P_CI) == 0);
    assert_eq!(rig.port(0, P_TFD) & 0x88, 0, "busy was cleared");
    rig.store(RECEIVED + 0x40, &[0; 20]);
    control.fis[15] = 0;
    control.flags = 5;
    rig.issue(0, 0, &control);
    wait("the second FIS", || rig.port(0, P_CI) == 0);
    assert_eq!((rig.port(0, P_TFD), rig.port(0, P_SIG)), (0x150, 0x101));
    assert_eq!(rig.load(RECEIVED + 0x40, 5), [0x34, 0, 0x50, 1, 1]);
    rig.good(0, &Request::short(0xc8, 7, 1).data(&[(DATA, 512)]));
    // Command list override.
    rig.set(0, P_CMD, RECEIVE | START | 6 | 8);
    assert_eq!(rig.port(0, P_CMD) & 8, 0);
}

#[test]
fn drives_come_and_go_while_the_guest_runs() {
    let file = image(1 << 20);
    let memory = MemoryDisk::new(1 << 20);
    let rig = Rig::new();
    rig.start(0);
    let interrupts = rig.vm.irqs().len();
    rig.ahci.plug(0, disk(Arc::new(SharedDisk(memory.clone())))).unwrap();
    assert!(rig.vm.irqs().len() > interrupts, "the guest hears of it");
    assert_eq!(rig.port(0, P_IS) & (1 << 6 | 1 << 22), 1 << 6 | 1 << 22);
    rig.set(0, P_SERR, u32::MAX);
    assert_eq!(rig.port(0, P_IS) & (1 << 6 | 1 << 22), 0);
    rig.good(0, &Request::short(0xc8, 7, 1).data(&[(DATA, 512)]));
    // Out in the middle of its work.
    let gate = memory.data.lock().unwrap();
    outstanding(&rig, 4);
    let ahci = rig.ahci.clone();
    let out = std::thread::spawn(move || ahci.unplug(0));
    wait("the link to go", || rig.port(0, P_SSTS) == 0);
    drop(gate);
    assert!(out.join().unwrap());
    assert!(!rig.ahci.unplug(0) && !rig.ahci.unplug(6));
    assert_eq!((rig.port(0, P_SIG), rig.port(0, P_TFD) & 0xff), (u32::MAX, 0x7f));
    assert_ne!(rig.port(0, P_IS) & 1 << 22, 0);
    // Commands to an empty port wait for the driver to give up.
    rig.recover(0);
    rig.issue(0, 0, &Request::short(0xc8, 7, 1).data(&[(DATA, 512)]));
    assert_eq!(rig.port(0, P_CI), 1);
    rig.recover(0);
    rig.ahci.plug(0, disk(open(&file, false))).unwrap();
    rig.good(0, &Request::short(0xc8, 9, 1).data(&[(DATA, 512)]));
    assert_eq!(number(&rig.load(DATA, 4)), 9);
    assert!(rig.ahci.unplug(0));
    open(&file, false); // Nobody has it any more.
}

#[test]
fn a_paused_controller_is_saved_and_goes_on() {
    let memory = MemoryDisk::new(1 << 20);
    let disc = image(1 << 20);
    let cd = || Drive::CdRom(CdRom::new(&CdRomConfig::default(), Some(open(&disc, true))));
    let mut rig = Rig::with_disk(Arc::new(SharedDisk(memory.clone())));
    rig.ahci.plug(1, cd()).unwrap();
    rig.start(1);
    assert!(rig.ahci.state().is_err(), "only when paused");
    rig.packet(1, &[0x1e, 0, 0, 0, 1, 0], 0);
    for round in 0..8u32 {
        for slot in 0..32 {
            let block = round * 32 + slot;
            let at = DATA + 512 * u64::from(slot);
            rig.store(at, &(block + 1).to_le_bytes().repeat(128));
            let request = Request::queued(0x61, slot, block.into(), 1).data(&[(at, 512)]).writes();
            rig.prepare(0, slot, &request);
        }
        rig.set(0, P_SACT, u32::MAX);
        rig.set(0, P_CI, u32::MAX);
        if round % 2 == 0 {
            std::thread::sleep(std::time::Duration::from_micros(200 * u64::from(round)));
        }
        rig.ahci.pause();
        let text = serde_json::to_string(&rig.ahci.state().unwrap()).unwrap();
        let state: AhciState = serde_json::from_str(&text).unwrap();
        let (open_commands, done) = (state.ports[0].ci, !state.ports[0].sact);
        assert_eq!(open_commands & done, 0);
        let next = Rig::over(rig.memory.clone());
        assert!(next.ahci.restore(&state).is_err(), "it had drives");
        next.ahci.plug(0, disk(Arc::new(SharedDisk(memory.clone())))).unwrap();
        next.ahci.plug(1, cd()).unwrap();
        next.ahci.restore(&state).unwrap();
        let again = serde_json::to_string(&next.ahci.state().unwrap()).unwrap();
        assert_eq!(again, text);
        rig = next;
        rig.ahci.resume();
        wait("all commands", || rig.port(0, P_SACT) == 0 && rig.port(0, P_CI) == 0);
    }
    let data = memory.data.lock().unwrap();
    for block in 0..256 {
        assert_eq!(number(&data[block * 512..]), block as u32 + 1);
    }
    assert_eq!(memory.log.lock().unwrap().len(), 256, "each once");
    drop(data);
    let (_, tfd) = rig.ask(1, &Request::packet(&[0x1b, 0, 0, 0, 2, 0], true));
    assert_eq!(tfd, 0x5041, "the tray is locked still");
}

#[test]
fn wild_lists_and_tables_do_no_harm() {
    let file = image(1 << 20);
    let rig = Rig::with_disk(open(&file, false));
    let read = Request::short(0xc8, 7, 1).data(&[(DATA, 512)]);
    // The command list in a device, beyond RAM, over its end.
    for list in [0xc000_0000, RAM as u32, RAM as u32 - 0x400 + 0x400, 0xffff_fc00] {
        rig.set(0, P_CMD, RECEIVE | 6);
        rig.set(0, P_CLB, list);
        rig.set(0, P_CMD, RECEIVE | START | 6);
        rig.set(0, P_CI, 1);
        wait("a bus error", || rig.port(0, P_IS) & HBFS != 0);
        assert_eq!(rig.port(0, P_CI), 1);
        rig.recover(0);
    }
    rig.set(0, P_CMD, 0);
    rig.start(0);
    rig.good(0, &read);
    // The table, and the buffers.
    for table in [RAM, RAM - 0x80, 0xc000_0000, 0xffff_ffff_ffff_ff80] {
        rig.prepare(0, 0, &read);
        rig.store(LIST + 8, &table.to_le_bytes());
        rig.set(0, P_CI, 1);
        if table == RAM - 0x80 {
            // All zeroes: no FIS at all.
            wait("an error", || rig.port(0, P_IS) & (TFES | HBFS) != 0);
        } else {
            wait("a bus error", || rig.port(0, P_IS) & HBFS != 0);
        }
        rig.recover(0);
    }
    for prd in [(RAM, 512), (RAM - 256, 512), (0xb000_0000, 512), (u64::MAX - 1, 512)] {
        rig.issue(0, 0, &read.clone().data(&[prd]));
        wait("a bus error", || rig.port(0, P_IS) & HBFS != 0);
        rig.recover(0);
    }
    // No buffers at all: the data is lost.
    let (is, _) = rig.ask(0, &Request::short(0xc8, 7, 1));
    assert_eq!((is & OFS, rig.prdbc(0, 0)), (OFS, 0));
    // At the very end of RAM everything works.
    rig.good(0, &read.clone().data(&[(RAM - 512, 512)]));
    assert_eq!(number(&rig.load(RAM - 4, 4)), 7);
    // A FIS area that is not RAM.
    rig.set(0, P_CMD, 0);
    rig.set(0, P_FB, 0xc000_0000);
    rig.set(0, P_CMD, RECEIVE | START | 6);
    rig.issue(0, 0, &read);
    wait("a bus error", || rig.port(0, P_IS) & HBFS != 0);
    rig.set(0, P_CMD, 0);
    rig.start(0);
    rig.good(0, &read);
    // A tag that is in use.
    rig.prepare(0, 0, &Request::queued(0x60, 1, 0, 1).data(&[(DATA, 512)]));
    rig.prepare(0, 1, &Request::queued(0x60, 1, 0, 1).data(&[(DATA, 512)]));
    rig.set(0, P_SACT, 2);
    rig.set(0, P_CI, 3);
    wait("an end", || rig.port(0, P_SACT) == 0 || rig.port(0, P_IS) & TFES != 0);
    rig.recover(0);
    rig.good(0, &read);
}

#[test]
fn a_queued_command_comes_before_the_plain_one_after_it() {
    let memory = MemoryDisk::new(1 << 20);
    let rig = Rig::with_disk(Arc::new(SharedDisk(memory.clone())));
    let gate = memory.data.lock().unwrap();
    outstanding(&rig, 3);
    rig.issue(0, 8, &Request::ata(0xea, 0, 0, 0));
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!((rig.port(0, P_CI), rig.port(0, P_SACT)), (1 << 8, 7));
    drop(gate);
    wait("the flush", || rig.port(0, P_CI) == 0);
    assert_eq!(rig.port(0, P_SACT), 0);
    assert_eq!(memory.log.lock().unwrap().last().unwrap().0, "flush");
}

#[test]
fn random_accesses_do_no_harm() {
    let mut random = Random(23);
    let file = image(1 << 20);
    let disc = image(1 << 20);
    let rig = Rig::new();
    rig.ahci.plug(0, disk(open(&file, false))).unwrap();
    let drive = CdRom::new(&CdRomConfig::default(), Some(open(&disc, true)));
    rig.ahci.plug(1, Drive::CdRom(drive.clone())).unwrap();
    for round in 0..60 {
        if round % 2 == 0 {
            rig.start(0);
            rig.start(1);
        }
        for _ in 0..400 {
            let port = random.below(2);
            if random.below(3) == 0 {
                let slot = random.below(32) as u32;
                let mut request = match random.below(3) {
                    0 => Request::queued(0x60 | random.below(2) as u8, slot, random.below(3000), 8),
                    1 => Request::ata(
                        random.next() as u8,
                        random.next() as u16,
                        random.below(3000),
                        4,
                    ),
                    _ => Request::packet(&random.next().to_le_bytes(), random.below(2) == 0),
                };
                if random.below(4) == 0 {
                    let at = random.below(20) as usize;
                    request.fis[at] = random.next() as u8;
                }
                let prds: Vec<_> = (0..random.below(6))
                    .map(|_| (random.below(RAM + RAM / 64), random.below(8192) as u32 + 1))
                    .filter(|(at, _)| !(LIST - 0x2000..DATA).contains(at))
                    .collect();
                request.flags ^= (random.next() & random.next() & 0xffff) as u32;
                rig.prepare(port, slot, &request.data(&prds));
                rig.set(port, P_SACT, random.next() as u32 & 1 << slot);
                rig.set(port, P_CI, 1 << slot);
            }
            let len = 1usize << random.below(4);
            let offset = match random.below(3) {
                0 => random.below(0x40),
                1 => 0x100 + random.below(0x100),
                _ => random.below(0x1000),
            };
            let value = random.next().to_le_bytes();
            if random.below(2) == 0 {
                rig.bus.mmio_read(rig.abar + offset, &mut [0; 8][..len]);
            } else if random.below(8) == 0 {
                rig.bus.mmio_write(rig.abar + offset, &value[..len]);
            } else {
                // Often the lists stay where they are.
                rig.set(port, [P_IS, P_IE, P_CMD, P_SCTL, P_CI][random.below(5) as usize], {
                    random.next() as u32 & random.next() as u32 | START | RECEIVE
                });
            }
        }
        if round % 5 == 0 {
            let _ = drive.eject(random.below(2) == 0);
            let _ = drive.insert(open(&disc, true));
            rig.ahci.pause();
            let state = rig.ahci.state().unwrap();
            rig.ahci.restore(&state).unwrap();
            rig.ahci.resume();
        }
    }
    rig.root.reset();
    rig.config_write(4, &[7, 0]);
    rig.start(0);
    rig.good(0, &Request::short(0xc8, 7, 1).data(&[(DATA, 512)]));
}
