//! PIC, PIT, LAPIC and IOAPIC held against QEMU's: small guests tell on port E9H what they see, and
//! must see the same on both.
//!
//! RAM: 0x1000 IDT, 0x7000 stack top.

mod qemu;

use iced_x86::code_asm::*;
use lodge_softcpu::Tier;
use qemu::{DONE, ROM, TELL, blank, here, in_qemu, qemu_for};

const IDT: u32 = 0x1000;
const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;

// The guest's side.

type Asm = CodeAssembler;

fn rom(test: impl FnOnce(&mut Asm)) -> Vec<u8> {
    let mut a = Asm::new(32).unwrap();
    a.mov(eax, 0x10u32).unwrap();
    a.mov(ds, eax).unwrap();
    a.mov(es, eax).unwrap();
    a.mov(ss, eax).unwrap();
    a.mov(esp, 0x7000u32).unwrap();
    a.mov(dword_ptr(0x800), 0x7ff).unwrap();
    a.mov(dword_ptr(0x802), IDT as i32).unwrap();
    a.lidt(ptr(0x800)).unwrap();
    test(&mut a);
    outb(&mut a, DONE, 0);
    let mut end = a.create_label();
    a.set_label(&mut end).unwrap();
    a.hlt().unwrap();
    a.jmp(end).unwrap();
    let code = a.assemble(ROM).unwrap();
    assert!(code.len() < 0xf000);
    let mut rom = blank();
    rom[..code.len()].copy_from_slice(&code);
    rom
}

fn outb(a: &mut Asm, port: u32, value: u32) {
    a.mov(al, value).unwrap();
    a.mov(edx, port).unwrap();
    a.out(dx, al).unwrap();
}

/// Tells what a port gives, as far as `mask` goes.
fn tell_port(a: &mut Asm, port: u32, mask: u32) {
    a.mov(edx, port).unwrap();
    a.in_(al, dx).unwrap();
    a.and(al, mask).unwrap();
    a.out(TELL, al).unwrap();
}

fn tell_memory(a: &mut Asm, address: u32) {
    a.mov(eax, dword_ptr(address)).unwrap();
    for _ in 0..4 {
        a.out(TELL, al).unwrap();
        a.shr(eax, 8u32).unwrap();
    }
}

fn poke(a: &mut Asm, address: u32, value: u32) {
    a.mov(dword_ptr(address), value as i32).unwrap();
}

/// A handler for `vector` that tells it.
fn handler(a: &mut Asm, vector: u32) {
    let mut over = a.create_label();
    // Calling over it leaves its address on the stack.
    a.call(over).unwrap();
    a.push(eax).unwrap();
    a.mov(al, vector).unwrap();
    a.out(TELL, al).unwrap();
    a.pop(eax).unwrap();
    a.iretd().unwrap();
    a.set_label(&mut over).unwrap();
    a.pop(eax).unwrap();
    let gate = IDT + 8 * vector;
    a.mov(ebx, eax).unwrap();
    a.and(eax, 0xffff).unwrap();
    a.or(eax, 0x8_0000).unwrap();
    a.mov(dword_ptr(gate), eax).unwrap();
    a.and(ebx, 0xffff_0000u32 as i32).unwrap();
    a.or(ebx, 0x8e00).unwrap();
    a.mov(dword_ptr(gate + 4), ebx).unwrap();
}

/// Lets what waits come in.
fn open(a: &mut Asm) {
    a.sti().unwrap();
    for _ in 0..4 {
        a.nop().unwrap();
    }
    a.cli().unwrap();
}

/// Waits until `mask` shows in what `port` gives.
fn await_port(a: &mut Asm, port: u32, mask: u32) {
    let mut again = a.create_label();
    a.mov(edx, port).unwrap();
    a.set_label(&mut again).unwrap();
    a.in_(al, dx).unwrap();
    a.test(al, mask).unwrap();
    a.jz(again).unwrap();
}

/// Waits until `mask` shows in memory.
fn await_memory(a: &mut Asm, address: u32, mask: u32) {
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.test(dword_ptr(address), mask as i32).unwrap();
    a.jz(again).unwrap();
}

/// As firmware does: the LAPIC on, LINT0 the PIC's wire, the PICs initialised and masked.
fn init_pics(a: &mut Asm, icw4: u32) {
    poke(a, LAPIC + 0xf0, 0x1ff);
    poke(a, LAPIC + 0x350, 0x700);
    for (port, base, wiring) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
        outb(a, port, 0x11);
        outb(a, port + 1, base);
        outb(a, port + 1, wiring);
        outb(a, port + 1, icw4);
        outb(a, port + 1, 0xff);
    }
}

/// One tick on IRQ 0, soon.
fn shoot(a: &mut Asm) {
    outb(a, 0x43, 0x30);
    outb(a, 0x40, 20);
    outb(a, 0x40, 0);
}

fn tell_pic(a: &mut Asm) {
    outb(a, 0x20, 0x0a);
    tell_port(a, 0x20, 0xff);
    outb(a, 0x20, 0x0b);
    tell_port(a, 0x20, 0xff);
    outb(a, 0x20, 0x0a);
}

/// How often QEMU may answer otherwise.
const QEMU_TRIES: usize = 4;

/// Runs `test` on both machines.
fn compare(name: &str, test: impl FnOnce(&mut Asm)) {
    if !qemu_for(name) {
        return;
    }
    let rom = rom(test);
    let ours = here(&rom, Tier::Blocks);
    // On a busy host QEMU's timers come late, and now and then an interrupt comes twice: it is asked again then.
    let mut answers = Vec::new();
    for _ in 0..QEMU_TRIES {
        let theirs = in_qemu(name, "Nehalem", &rom);
        assert!(!theirs.is_empty(), "QEMU's guest told nothing");
        if ours == theirs {
            return;
        }
        answers.push(theirs);
    }
    panic!("ours {ours:02x?}, QEMU's {answers:02x?}");
}

// The tests.

#[test]
fn pic_requests_and_ends() {
    compare("pic", |a| {
        handler(a, 0x20);
        init_pics(a, 1);
        tell_port(a, 0x21, 0xff);
        tell_port(a, 0xa1, 0xff);
        shoot(a);
        await_port(a, 0x20, 1);
        tell_pic(a);
        outb(a, 0x21, 0xfe);
        open(a);
        tell_pic(a);
        // In service: the next one waits for the end of this one.
        shoot(a);
        await_port(a, 0x20, 1);
        open(a);
        tell_pic(a);
        outb(a, 0x20, 0x20);
        tell_pic(a);
        open(a);
        outb(a, 0x20, 0x60);
        tell_pic(a);
    });
}

#[test]
fn pic_polls_masks_and_rotates() {
    compare("pic-poll", |a| {
        handler(a, 0x20);
        init_pics(a, 1);
        outb(a, 0x20, 0x0c);
        tell_port(a, 0x20, 0x80);
        shoot(a);
        await_port(a, 0x20, 1);
        outb(a, 0x21, 0xfe);
        outb(a, 0x20, 0x0c);
        tell_port(a, 0x20, 0xff);
        tell_pic(a);
        // Rotate on the end: line 0 is the lowest now, and still served when alone.
        outb(a, 0x20, 0xa0);
        shoot(a);
        await_port(a, 0x20, 1);
        open(a);
        tell_pic(a);
        outb(a, 0x20, 0xc7);
        outb(a, 0x20, 0x20);
        // Special mask: what is masked and in service holds nobody.
        outb(a, 0x20, 0x68);
        tell_pic(a);
        outb(a, 0x20, 0x48);
        for (port, value) in [(0x4d0, 0xff), (0x4d1, 0xff), (0x4d0, 0x20), (0x4d1, 0x0e)] {
            outb(a, port, value);
            tell_port(a, port, 0xff);
        }
    });
}

#[test]
fn pic_ends_by_itself() {
    compare("pic-aeoi", |a| {
        handler(a, 0x20);
        init_pics(a, 3);
        outb(a, 0x21, 0xfe);
        for _ in 0..2 {
            shoot(a);
            await_port(a, 0x20, 1);
            open(a);
            tell_pic(a);
        }
    });
}

#[test]
fn pit_modes_and_latches() {
    compare("pit", |a| {
        for control in [0x30u32, 0x34, 0x36, 0x38, 0x35, 0x37] {
            outb(a, 0x43, control);
            outb(a, 0x40, 0x34);
            outb(a, 0x40, 0x12);
            // The status, without whether the count is loaded and what the output is.
            outb(a, 0x43, 0xe2);
            tell_port(a, 0x40, 0x3f);
        }
        for control in [0x14u32, 0x24] {
            outb(a, 0x43, control);
            outb(a, 0x40, 0xff);
            outb(a, 0x43, 0xe2);
            tell_port(a, 0x40, 0x3f);
        }
        // A count that is over: its status has the output.
        outb(a, 0x43, 0xb0);
        outb(a, 0x42, 0x01);
        outb(a, 0x42, 0x00);
        outb(a, 0x61, 1);
        await_port(a, 0x61, 0x20);
        outb(a, 0x43, 0xe8);
        tell_port(a, 0x42, 0xbf);
        // Gate and speaker read back, the output follows counter 2.
        outb(a, 0x61, 0);
        tell_port(a, 0x61, 0x03);
        outb(a, 0x61, 3);
        tell_port(a, 0x61, 0x03);
        outb(a, 0x43, 0xb0);
        outb(a, 0x42, 0xff);
        outb(a, 0x42, 0xff);
        tell_port(a, 0x61, 0x03);
        await_port(a, 0x61, 0x20);
        tell_port(a, 0x61, 0x23);
        await_port(a, 0x61, 0x10);
    });
}

fn tell_vectors(a: &mut Asm) {
    for register in [0x100, 0x180, 0x200] {
        for word in 1..8 {
            tell_memory(a, LAPIC + register + 16 * word);
        }
    }
    tell_memory(a, LAPIC + 0x80);
    tell_memory(a, LAPIC + 0xa0);
}

#[test]
fn lapic_begins_as_it_should() {
    compare("lapic-reset", |a| {
        for register in [0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0, 0x320, 0x370, 0x380, 0x390] {
            tell_memory(a, LAPIC + register);
        }
        a.mov(ecx, 0x1bu32).unwrap();
        a.rdmsr().unwrap();
        a.out(TELL, al).unwrap();
        a.mov(al, ah).unwrap();
        a.out(TELL, al).unwrap();
        poke(a, LAPIC + 0xf0, 0x1ff);
        for (register, value) in [(0x80, 0x35), (0xe0, 0x0fff_ffff), (0xd0, 0x1200_0000)] {
            poke(a, LAPIC + register, value);
            tell_memory(a, LAPIC + register);
        }
    });
}

#[test]
fn lapic_orders_by_priority() {
    compare("lapic-priority", |a| {
        for vector in [0x31, 0x51, 0x52, 0x91, 0xd0] {
            handler(a, vector);
        }
        init_pics(a, 1);
        // To itself, by shorthand.
        for vector in [0x51, 0x31, 0x91] {
            poke(a, LAPIC + 0x300, 0x4_4000 | vector);
        }
        tell_vectors(a);
        open(a);
        tell_vectors(a);
        poke(a, LAPIC + 0x300, 0x4_4052);
        open(a);
        for _ in 0..2 {
            poke(a, LAPIC + 0xb0, 0);
            tell_vectors(a);
            open(a);
        }
        tell_vectors(a);
        for _ in 0..3 {
            poke(a, LAPIC + 0xb0, 0);
            open(a);
        }
        tell_vectors(a);
        poke(a, LAPIC + 0x80, 0xd0);
        poke(a, LAPIC + 0x300, 0x4_40d0);
        open(a);
        tell_vectors(a);
        poke(a, LAPIC + 0x80, 0xcf);
        open(a);
        poke(a, LAPIC + 0xb0, 0);
        tell_vectors(a);
    });
}

#[test]
fn lapic_destinations() {
    compare("lapic-destinations", |a| {
        for vector in 0x40..0x4a {
            handler(a, vector);
        }
        handler(a, 2);
        init_pics(a, 1);
        poke(a, LAPIC + 0xd0, 0x1200_0000);
        // (DFR, destination, command): physical, all, logical flat, logical cluster, lowest priority, shorthands,
        // NMI.
        for (dfr, destination, command) in [
            (u32::MAX, 0u32, 0x4040u32),
            (u32::MAX, 0xff, 0x4041),
            (u32::MAX, 7, 0x4042),
            (u32::MAX, 0x10, 0x4843),
            (u32::MAX, 0x20, 0x4844),
            (0x0fff_ffff, 0x12, 0x4845),
            (0x0fff_ffff, 0x22, 0x4846),
            (u32::MAX, 0x02, 0x4947),
            (u32::MAX, 0, 0x8_4048),
            (u32::MAX, 0, 0xc_4049),
            (u32::MAX, 0, 0x4400),
        ] {
            poke(a, LAPIC + 0xe0, dfr);
            poke(a, LAPIC + 0x310, destination << 24);
            poke(a, LAPIC + 0x300, command);
            open(a);
            poke(a, LAPIC + 0xb0, 0);
            a.mov(al, 0xaau32).unwrap();
            a.out(TELL, al).unwrap();
        }
    });
}

#[test]
fn lapic_timer_runs_out() {
    compare("lapic-timer", |a| {
        handler(a, 0x60);
        init_pics(a, 1);
        poke(a, LAPIC + 0x3e0, 0xb);
        poke(a, LAPIC + 0x320, 0x60);
        poke(a, LAPIC + 0x380, 100_000);
        await_memory(a, LAPIC + 0x230, 1);
        tell_memory(a, LAPIC + 0x390);
        open(a);
        poke(a, LAPIC + 0xb0, 0);
        // Masked: it counts without a word.
        poke(a, LAPIC + 0x320, 0x1_0060);
        poke(a, LAPIC + 0x380, 1000);
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.cmp(dword_ptr(LAPIC + 0x390), 0).unwrap();
        a.jne(again).unwrap();
        open(a);
        tell_memory(a, LAPIC + 0x230);
        // Periodic: twice.
        poke(a, LAPIC + 0x320, 0x2_0060);
        poke(a, LAPIC + 0x380, 10_000);
        for _ in 0..2 {
            await_memory(a, LAPIC + 0x230, 1);
            open(a);
            poke(a, LAPIC + 0xb0, 0);
        }
    });
}

fn ioapic(a: &mut Asm, register: u32, value: u32) {
    poke(a, IOAPIC, register);
    poke(a, IOAPIC + 0x10, value);
    tell_memory(a, IOAPIC + 0x10);
}

#[test]
fn ioapic_routes_the_pit() {
    compare("ioapic", |a| {
        handler(a, 0x70);
        init_pics(a, 1);
        poke(a, IOAPIC, 1);
        tell_memory(a, IOAPIC + 0x10);
        for register in [0x10, 0x11, 0x3e, 0x3f] {
            poke(a, IOAPIC, register);
            tell_memory(a, IOAPIC + 0x10);
        }
        ioapic(a, 0, 0x0f00_0000);
        ioapic(a, 0x10 + 2 * 9, 0x1_a0c9);
        ioapic(a, 0x10 + 2 * 9, 0x1_00c9);
        // IRQ 0 is on pin 2, an edge.
        ioapic(a, 0x11 + 2 * 2, 0);
        ioapic(a, 0x10 + 2 * 2, 0x70);
        shoot(a);
        await_memory(a, LAPIC + 0x230, 1 << 16);
        open(a);
        tell_vectors(a);
        poke(a, LAPIC + 0xb0, 0);
        // Masked, the edge is lost to the IOAPIC; the PIC has it.
        ioapic(a, 0x10 + 2 * 2, 0x1_0070);
        outb(a, 0x20, 0x20);
        shoot(a);
        await_port(a, 0x20, 1);
        open(a);
        tell_vectors(a);
    });
}

#[test]
fn the_pic_comes_through_lint0() {
    compare("lint0", |a| {
        handler(a, 0x20);
        init_pics(a, 1);
        outb(a, 0x21, 0xfe);
        // The second request stays in the PIC while LINT0 is masked, and comes in the third round.
        for (lvt, shot, told) in [(0x700, true, 1u32), (0x1_0700, true, 2), (0x700, false, 3)] {
            poke(a, LAPIC + 0x350, lvt);
            if shot {
                shoot(a);
                await_port(a, 0x20, 1);
            }
            open(a);
            outb(a, 0x20, 0x20);
            a.mov(al, told).unwrap();
            a.out(TELL, al).unwrap();
            open(a);
        }
    });
}
