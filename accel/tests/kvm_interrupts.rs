//! Interrupts by every way, and a second vCPU.

mod kvm_support;

use std::sync::atomic::Ordering;
use std::thread;

use iced_x86::code_asm::*;
use kvm_support::*;
use lodge_accel::{IoEvent, Msi, Trigger, Vcpu};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const HANDLER: u64 = 0xa000;

fn finish(a: &mut CodeAssembler) {
    a.out(u32::from(DONE_PORT), al).unwrap();
}

/// Says on port 80H that it waits, then halts with interrupts on.
fn wait(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.out(0x80u32, al).unwrap();
    a.set_label(&mut again).unwrap();
    a.sti().unwrap();
    a.hlt().unwrap();
    a.jmp(again).unwrap();
}

/// Does `raise` when the guest waits.
fn when_waiting(m: &Machine, raise: impl Fn() + Send + Sync + 'static) {
    assert!(m.bus.hook.set(Box::new(raise)).is_ok());
}

/// A protected-mode machine with its LAPIC on, whose vector 50H ends it.
fn with_lapic(setup: impl FnOnce(&mut CodeAssembler)) -> (Machine, Box<dyn Vcpu>) {
    let m = Machine::new(1);
    m.gate32(0x50, HANDLER);
    m.load(HANDLER, 32, |a| {
        a.mov(ebx, 0x5050u32).unwrap();
        a.mov(dword_ptr(LAPIC + 0xb0), 0).unwrap(); // EOI
        finish(a);
        a.iretd().unwrap();
    });
    m.load(CODE, 32, |a| {
        a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff).unwrap();
        setup(a);
        wait(a);
    });
    let vcpu = m.start(0, protected32);
    (m, vcpu)
}

/// Vector 50H came, after the guest began to wait. That the LAPIC has it in service meanwhile is not
/// looked at: `kvm_pvm` never shows it.
fn arrived(m: &Machine, vcpu: &mut dyn Vcpu) {
    m.run(vcpu);
    assert_eq!(vcpu.state().unwrap().gprs[3], 0x5050);
    assert_eq!(m.bus.take(), [Access::PioWrite(0x80, vec![0])]);
}

#[test]
fn a_line_reaches_the_pic() {
    if !kvm_is_here("a_line_reaches_the_pic") {
        return;
    }
    let m = Machine::new(1);
    m.write(0x23 * 4, 0x0000_a000u32); // IRQ 3
    m.load(HANDLER, 16, |a| {
        a.mov(al, 0x20u32).unwrap();
        a.out(0x20u32, al).unwrap();
        a.mov(bl, 0x77u32).unwrap();
        finish(a);
        a.iret().unwrap();
    });
    m.load(CODE, 16, |a| {
        for (port, value) in [(0x20u32, 0x11u32), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xf7)]
        {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
        wait(a);
    });
    let mut vcpu = m.start(0, real16);
    let vm = m.vm.clone();
    when_waiting(&m, move || {
        vm.set_irq(3, true).unwrap();
        vm.set_irq(3, false).unwrap();
    });
    m.run(&mut *vcpu);
    assert_eq!(vcpu.state().unwrap().gprs[3] & 0xff, 0x77);
    let chips = m.vm.chip_state().unwrap();
    assert_eq!((chips.pics[0].irq_base, chips.pics[0].imr), (0x20, 0xf7));
}

fn route_pin(a: &mut CodeAssembler, pin: u32) {
    a.mov(dword_ptr(IOAPIC), (0x10 + pin * 2) as i32).unwrap();
    a.mov(dword_ptr(IOAPIC + 0x10), 0x50).unwrap(); // edge, high, fixed, to APIC 0
    a.mov(dword_ptr(IOAPIC), (0x11 + pin * 2) as i32).unwrap();
    a.mov(dword_ptr(IOAPIC + 0x10), 0).unwrap();
}

#[test]
fn a_line_reaches_the_ioapic() {
    if !kvm_is_here("a_line_reaches_the_ioapic") {
        return;
    }
    let (m, mut vcpu) = with_lapic(|a| route_pin(a, 20));
    let vm = m.vm.clone();
    when_waiting(&m, move || {
        vm.set_irq(20, true).unwrap();
        vm.set_irq(20, false).unwrap();
    });
    arrived(&m, &mut *vcpu);
    assert_eq!(m.vm.chip_state().unwrap().ioapic.redirection[20] & 0xff, 0x50);
    assert!(m.vm.set_irq(24, true).is_err());
}

const MESSAGE: Msi = Msi { address: LAPIC as u64, data: 0x50 };

#[test]
fn a_message_arrives() {
    if !kvm_is_here("a_message_arrives") {
        return;
    }
    let (m, mut vcpu) = with_lapic(|_| {});
    let vm = m.vm.clone();
    when_waiting(&m, move || vm.signal_msi(MESSAGE).unwrap());
    arrived(&m, &mut *vcpu);
    // Nobody has APIC id 9: dropped, as on a PC.
    m.vm.signal_msi(Msi { address: u64::from(LAPIC) | 9 << 12, data: 0x50 }).unwrap();
}

#[test]
fn eventfds_raise_lines_and_messages() {
    if !kvm_is_here("eventfds_raise_lines_and_messages") {
        return;
    }
    for trigger in [Trigger::Msi(MESSAGE), Trigger::Gsi(21)] {
        let (m, mut vcpu) = with_lapic(|a| route_pin(a, 21));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let other = EventFd::new(EFD_NONBLOCK).unwrap();
        m.vm.add_irqfd(&event, trigger).unwrap();
        m.vm.add_irqfd(&other, Trigger::Msi(Msi { data: 0x51, ..MESSAGE })).unwrap();
        assert!(m.vm.add_irqfd(&event, trigger).is_err(), "twice");
        m.vm.remove_irqfd(&other, Trigger::Msi(Msi { data: 0x51, ..MESSAGE })).unwrap();
        let signal = event.try_clone().unwrap();
        when_waiting(&m, move || signal.write(1).unwrap());
        arrived(&m, &mut *vcpu);
        m.vm.remove_irqfd(&event, trigger).unwrap();
        assert!(m.vm.remove_irqfd(&event, trigger).is_err(), "it is gone");
        event.write(1).unwrap();
        assert_eq!(event.read().unwrap(), 1, "nobody but us reads it any more");
    }
    let m = Machine::new(1);
    let event = EventFd::new(0).unwrap();
    assert!(m.vm.add_irqfd(&event, Trigger::Gsi(24)).is_err());
}

#[test]
fn writes_signal_eventfds() {
    if !kvm_is_here("writes_signal_eventfds") {
        return;
    }
    let m = Machine::new(1);
    if !m.vm.capabilities().ioeventfd {
        eprintln!("SKIPPED: writes_signal_eventfds: this KVM has no ioeventfds of any length");
        return;
    }
    let (port, address) =
        (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
    m.vm.add_ioeventfd(&port, IoEvent::Pio(0x300)).unwrap();
    m.vm.add_ioeventfd(&address, IoEvent::Mmio(MMIO + 8)).unwrap();
    m.load(CODE, 32, |a| {
        a.mov(edx, 0x300u32).unwrap();
        a.out(dx, al).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(dword_ptr(MMIO + 8), eax).unwrap();
        a.mov(word_ptr(MMIO + 8), ax).unwrap();
        a.mov(byte_ptr(MMIO + 8), al).unwrap();
        a.mov(byte_ptr(MMIO + 9), al).unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    m.run(&mut *vcpu);
    assert_eq!((port.read().unwrap(), address.read().unwrap()), (2, 3));
    assert_eq!(m.bus.take(), [Access::MmioWrite(MMIO + 9, vec![0])]);
    m.vm.remove_ioeventfd(&port, IoEvent::Pio(0x300)).unwrap();
    m.vm.remove_ioeventfd(&address, IoEvent::Mmio(MMIO + 8)).unwrap();
    let mut state = vcpu.state().unwrap();
    state.rip = CODE;
    vcpu.set_state(&state).unwrap();
    m.run(&mut *vcpu);
    assert_eq!(m.bus.take().len(), 6, "the bus is told again");
    assert!(port.read().is_err());
}

#[test]
fn the_pit_ticks() {
    if !kvm_is_here("the_pit_ticks") {
        return;
    }
    let m = Machine::new(1);
    m.write(0x20 * 4, 0x0000_a000u32);
    m.load(HANDLER, 16, |a| {
        let mut more = a.create_label();
        a.mov(al, 0x20u32).unwrap();
        a.out(0x20u32, al).unwrap();
        a.inc(bx).unwrap();
        a.cmp(bx, 3).unwrap();
        a.jb(more).unwrap();
        finish(a);
        a.set_label(&mut more).unwrap();
        a.iret().unwrap();
    });
    m.load(CODE, 16, |a| {
        for (port, value) in [
            (0x20u32, 0x11u32),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0x21, 0xfe),
            (0x43, 0x34), // counter 0, both bytes, mode 2
            (0x40, 0x9c),
            (0x40, 0x2e), // 11932: 100 Hz
        ] {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
        a.xor(bx, bx).unwrap();
        wait(a);
    });
    let mut vcpu = m.start(0, real16);
    m.run(&mut *vcpu);
    let pit = m.vm.chip_state().unwrap().pit;
    assert_eq!((pit.channels[0].count, pit.channels[0].mode), (11932, 2));
}

/// The PIT's line is pin 2 of the IOAPIC, as the MADT says, before anybody adds an irqfd and after it.
#[test]
fn the_pit_reaches_pin_2_of_the_ioapic() {
    if !kvm_is_here("the_pit_reaches_pin_2_of_the_ioapic") {
        return;
    }
    for irqfd in [false, true] {
        let (m, mut vcpu) = with_lapic(|a| {
            route_pin(a, 2);
            // Not by way of the PIC. Counter 0, both bytes, mode 2: 100 Hz.
            for (port, value) in [(0x21u32, 0xffu32), (0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
                a.mov(al, value).unwrap();
                a.out(port, al).unwrap();
            }
        });
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        if irqfd {
            m.vm.add_irqfd(&event, Trigger::Msi(MESSAGE)).unwrap();
        }
        m.run(&mut *vcpu);
        assert_eq!(vcpu.state().unwrap().gprs[3], 0x5050, "irqfd: {irqfd}");
        assert_eq!(m.vm.chip_state().unwrap().ioapic.redirection[2] & 0xff, 0x50);
    }
}

#[test]
fn a_second_processor_is_started() {
    if !kvm_is_here("a_second_processor_is_started") {
        return;
    }
    let m = Machine::new(2);
    m.load(0x9000, 16, |a| {
        // Real mode at 0900H:0000H.
        a.xor(ax, ax).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(word_ptr(0x600), 0x1234).unwrap();
        let mut forever = a.create_label();
        a.set_label(&mut forever).unwrap();
        a.hlt().unwrap();
        a.jmp(forever).unwrap();
    });
    m.load(CODE, 32, |a| {
        a.mov(dword_ptr(LAPIC + 0xf0), 0x1ff).unwrap();
        for command in [0x4500, 0x4609] {
            a.mov(dword_ptr(LAPIC + 0x310), 1 << 24).unwrap();
            a.mov(dword_ptr(LAPIC + 0x300), command).unwrap();
        }
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.cmp(word_ptr(0x600), 0x1234).unwrap();
        a.jne(again).unwrap();
        finish(a);
    });
    let mut boot = m.start(0, protected32);
    let mut other = m.vm.create_vcpu(1, lodge_accel::VcpuSetup::Reset).unwrap();
    m.bus.kicks.lock().unwrap().push(other.kicker());
    let bus = m.bus.clone();
    let second = thread::spawn(move || {
        while !bus.done.load(Ordering::SeqCst) {
            other.run().unwrap();
        }
        other.state().unwrap()
    });
    m.run(&mut *boot);
    let state = second.join().unwrap();
    assert_eq!(state.segments[1].selector, 0x900);
    assert_eq!(m.read::<u16>(0x600), 0x1234);
}
