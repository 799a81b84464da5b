use lodge_memory::Bus;

use super::*;
use crate::pci::{Bar, EndpointBuilder, Identity};
use crate::test_vm::TestVm;

/// Answers with its name, so that a test sees which BAR it reached.
struct Named(u8);
impl BusDevice for Named {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

fn machine() -> (Arc<SystemBus>, Arc<Root>) {
    let bus = Arc::new(SystemBus::default());
    let lines = Lines::new(Arc::new(TestVm::default()));
    let root = Root::new(&bus, lines, Windows::new(1 << 30, 40)).unwrap();
    (bus, root)
}

fn device(name: u8) -> Arc<dyn Function> {
    let mut builder = EndpointBuilder::new(&Identity {
        vendor: 0x1234,
        device: 0x5678,
        class: 0xff_00_00,
        revision: 0,
        subsystem: (0, 0),
        multifunction: false,
    });
    let bar = |kind, bytes| Bar { kind, bytes, handler: Arc::new(Named(name)) };
    builder.bar(0, bar(BarKind::Memory32, 0x8000));
    builder.bar(1, bar(BarKind::Io, 32));
    builder.bar(4, bar(BarKind::Memory64, 1 << 30));
    builder.express();
    builder.interrupt_pin(1);
    Arc::new(IdentityFunction::new(builder.build()))
}

fn read(bus: &SystemBus, at: Bdf, register: u64) -> u32 {
    let mut data = [0; 4];
    bus.mmio_read(ecam(at, register), &mut data);
    u32::from_le_bytes(data)
}

fn write(bus: &SystemBus, at: Bdf, register: u64, value: u32) {
    bus.mmio_write(ecam(at, register), &value.to_le_bytes());
}

fn ecam(at: Bdf, register: u64) -> u64 {
    ECAM_BASE + (u64::from(at.device) << 15) + (u64::from(at.function) << 12) + register
}

fn who(bus: &SystemBus, gpa: u64) -> u8 {
    let mut data = [0];
    bus.mmio_read(gpa, &mut data);
    data[0]
}

#[test]
fn both_mechanisms_reach_the_chipset() {
    let (bus, _root) = machine();
    assert_eq!(read(&bus, HOST_BRIDGE, 0), 0x29c0_8086);
    assert_eq!(read(&bus, HOST_BRIDGE, 0x60), 0xb000_0001);
    assert_eq!(read(&bus, ICH9_LPC, 0), 0x2918_8086);
    assert_eq!(read(&bus, Bdf::on_root(5), 0), u32::MAX);
    assert_eq!(read(&bus, HOST_BRIDGE, 0x100), 0);
    bus.pio_write(0xcf8, &0x8000_f800u32.to_le_bytes());
    let mut word = [0; 2];
    bus.pio_read(0xcfe, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x2918);
    // Bytes do not change the latch, a cleared enable bit closes the window.
    bus.pio_write(0xcf8, &[0]);
    let mut latch = [0; 4];
    bus.pio_read(0xcf8, &mut latch);
    assert_eq!(u32::from_le_bytes(latch), 0x8000_f800);
    bus.pio_write(0xcf8, &0xf800u32.to_le_bytes());
    bus.pio_read(0xcfc, &mut latch);
    assert_eq!(latch, [0xff; 4]);
}

#[test]
fn the_reset_port_lies_inside_mechanism_1() {
    let (bus, root) = machine();
    root.set_reset_control(Arc::new(Named(0x5a)));
    let mut byte = [0];
    bus.pio_read(0xcf9, &mut byte);
    assert_eq!(byte, [0x5a]);
}

#[test]
fn slots_are_stable_and_bars_assigned() {
    let (bus, root) = machine();
    assert_eq!(root.add(Slot::FirstFree, device(1)).unwrap(), Bdf::on_root(1));
    assert_eq!(root.add(Slot::At(Bdf::on_root(3)), device(3)).unwrap(), Bdf::on_root(3));
    assert_eq!(root.add(Slot::FirstFree, device(2)).unwrap(), Bdf::on_root(2));
    assert_eq!(root.add(Slot::FirstFree, device(4)).unwrap(), Bdf::on_root(4));
    assert!(matches!(root.add(Slot::At(HOST_BRIDGE), device(0)), Err(Error::Slot(_))));
    assert!(matches!(root.add(Slot::At(Bdf::on_root(32)), device(0)), Err(Error::Slot(_))));
    let one = Bdf::on_root(1);
    assert_eq!(read(&bus, one, 0x10), 0xc000_0000);
    assert_eq!(read(&bus, Bdf::on_root(3), 0x10), 0xc000_8000);
    assert_eq!(read(&bus, one, 0x14), 0xc001);
    assert_eq!((read(&bus, one, 0x20), read(&bus, one, 0x24)), (0xc, 1));
    assert_eq!(read(&bus, one, 0x3c) & 0xffff, 0x0111);
    // Decoding is off until the guest turns it on.
    assert_eq!(who(&bus, 0xc000_0000), 0xff);
    write(&bus, one, 4, 3);
    assert_eq!(who(&bus, 0xc000_7fff), 1);
    assert_eq!(who(&bus, 1 << 32), 1);
    let mut byte = [0];
    bus.pio_read(0xc01f, &mut byte);
    assert_eq!(byte, [1]);
}

#[test]
fn bars_are_sized_and_moved() {
    let (bus, root) = machine();
    let at = root.add(Slot::FirstFree, device(7)).unwrap();
    write(&bus, at, 4, 2);
    write(&bus, at, 0x10, u32::MAX);
    assert_eq!(read(&bus, at, 0x10), 0xffff_8000);
    assert_eq!(who(&bus, 0xffff_8000), 0xff, "a sizing write maps nothing");
    assert_eq!(who(&bus, 0xc000_0000), 0xff);
    write(&bus, at, 0x10, 0xd000_0000);
    assert_eq!(who(&bus, 0xd000_0000), 7);
    write(&bus, at, 0x24, u32::MAX);
    write(&bus, at, 0x20, u32::MAX);
    assert_eq!((read(&bus, at, 0x20), read(&bus, at, 0x24)), (0xc000_000c, u32::MAX));
    write(&bus, at, 4, 0);
    assert_eq!(who(&bus, 0xd000_0000), 0xff);
    root.reset();
    assert_eq!(read(&bus, at, 0x10), 0xc000_0000, "reset brings the first assignment back");
}

#[test]
fn a_bar_over_something_else_waits() {
    let (bus, root) = machine();
    let a = root.add(Slot::FirstFree, device(1)).unwrap();
    let b = root.add(Slot::FirstFree, device(2)).unwrap();
    write(&bus, a, 4, 2);
    write(&bus, b, 4, 2);
    write(&bus, b, 0x10, 0xc000_0000);
    assert_eq!(who(&bus, 0xc000_0000), 1);
    write(&bus, a, 0x10, 0xc100_0000);
    write(&bus, b, 0x10, 0xc000_0000);
    assert_eq!(who(&bus, 0xc000_0000), 2);
    assert_eq!(who(&bus, 0xc100_0000), 1);
}

#[test]
fn a_rom_answers_when_both_bits_say_so() {
    let (bus, root) = machine();
    let mut builder = EndpointBuilder::new(&Identity {
        vendor: 0x1234,
        device: 0x1111,
        class: 0x03_00_00,
        revision: 2,
        subsystem: (0, 0),
        multifunction: false,
    });
    builder.bar(
        0,
        Bar { kind: BarKind::Memory32Prefetchable, bytes: 1 << 20, handler: Arc::new(Named(1)) },
    );
    builder.rom([&[0x55, 0xaa][..], &[7; 3000]].concat());
    builder.fixed(BarKind::Io, 0x3b0, 0x30, Arc::new(Named(2)));
    builder.fixed(BarKind::Memory32, 0xa0000, 0x20000, Arc::new(Named(3)));
    let at = root.add(Slot::FirstFree, Arc::new(IdentityFunction::new(builder.build()))).unwrap();
    assert_eq!(read(&bus, at, 0x10), 0xc000_0008);
    let rom = read(&bus, at, 0x30);
    assert_eq!(rom, 0xc010_0000);
    write(&bus, at, 0x30, !0x7ff);
    assert_eq!(read(&bus, at, 0x30), 0xffff_f000, "4 KiB");
    write(&bus, at, 0x30, rom | 1);
    assert_eq!((who(&bus, rom.into()), who(&bus, 0xa0000)), (0xff, 0xff));
    write(&bus, at, 4, 2);
    assert_eq!((who(&bus, u64::from(rom)), who(&bus, u64::from(rom) + 1)), (0x55, 0xaa));
    assert_eq!((who(&bus, u64::from(rom) + 3001), who(&bus, u64::from(rom) + 3002)), (7, 0xff));
    assert_eq!(who(&bus, 0xbffff), 3);
    let port = |port| {
        let mut data = [0];
        bus.pio_read(port, &mut data);
        data[0]
    };
    assert_eq!(port(0x3da), 0xff);
    write(&bus, at, 4, 3);
    assert_eq!(port(0x3da), 2);
    write(&bus, at, 0x30, rom);
    assert_eq!(who(&bus, rom.into()), 0xff);
    root.reset();
    assert_eq!((port(0x3da), who(&bus, 0xbffff)), (0xff, 0xff));
    assert_eq!(read(&bus, at, 0x30), rom);
    write(&bus, at, 4, 3);
    root.remove(at);
    assert_eq!((port(0x3da), who(&bus, 0xbffff)), (0xff, 0xff));
}

#[test]
fn a_removed_function_is_gone_and_its_room_free() {
    let (bus, root) = machine();
    let at = root.add(Slot::FirstFree, device(1)).unwrap();
    write(&bus, at, 4, 3);
    assert!(root.remove(at).is_some());
    assert!(root.remove(at).is_none());
    assert_eq!(who(&bus, 0xc000_0000), 0xff);
    assert_eq!(read(&bus, at, 0), u32::MAX);
    assert_eq!(root.add(Slot::FirstFree, device(2)).unwrap(), at);
    assert_eq!(read(&bus, at, 0x10), 0xc000_0000);
}

#[test]
fn a_saved_function_answers_where_it_did() {
    let (bus, root) = machine();
    let function = device(1);
    let at = root.add(Slot::FirstFree, function.clone()).unwrap();
    write(&bus, at, 0x10, 0xd000_0000);
    write(&bus, at, 4, 2);
    let state = function.endpoint().state();
    let (bus, root) = machine();
    let function = device(1);
    root.add(Slot::FirstFree, function.clone()).unwrap();
    function.endpoint().restore(&state).unwrap();
    assert_eq!(who(&bus, 0xd000_0000), 1);
    assert!(function.endpoint().restore(&Default::default()).is_err());
}

#[test]
fn random_accesses_do_no_harm() {
    let (bus, root) = machine();
    for name in 1..4 {
        root.add(Slot::FirstFree, device(name)).unwrap();
    }
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        seed >> 20
    };
    for _ in 0..200_000 {
        let len = 1usize << (random() % 4);
        let data = random().to_le_bytes();
        let register = ecam(Bdf::on_root(random() as u8 & 31), random() % 0x1000);
        bus.mmio_write(register, &data[..len]);
        bus.mmio_read(register, &mut [0; 8][..len]);
        let port = 0xcf8 + (random() % 8) as u16;
        bus.pio_write(port, &data[..len.min(4)]);
        bus.pio_read(port, &mut [0; 4][..len.min(4)]);
    }
}
