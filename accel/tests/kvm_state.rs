//! Memory slots, dirty pages, kicks, saving and restoring.

mod kvm_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use kvm_support::*;
use lodge_accel::state::Activity;
use lodge_accel::{Exit, MemorySlot, Vcpu};
use vm_memory::{Bytes, GuestAddress};

fn finish(a: &mut CodeAssembler) {
    a.out(u32::from(DONE_PORT), al).unwrap();
}

/// Page-aligned memory that a slot can show.
struct Pages(*mut u8, usize);
// SAFETY: plain memory.
unsafe impl Send for Pages {}
impl Pages {
    fn new(bytes: usize, fill: u8) -> Self {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping of this size.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: just mapped.
        unsafe { at.cast::<u8>().write_bytes(fill, bytes) };
        Self(at.cast(), bytes)
    }
    fn slot(&self, gpa: u64, readonly: bool) -> MemorySlot {
        MemorySlot { gpa, bytes: self.1 as u64, host: self.0, readonly }
    }
    fn byte(&self, at: usize) -> u8 {
        assert!(at < self.1);
        // SAFETY: inside of the mapping.
        unsafe { self.0.add(at).read_volatile() }
    }
}

fn restart(vcpu: &mut dyn Vcpu) {
    let mut state = vcpu.state().unwrap();
    state.rip = CODE;
    vcpu.set_state(&state).unwrap();
}

#[test]
fn a_slot_hides_ram_and_gives_it_back() {
    if !kvm_is_here("a_slot_hides_ram_and_gives_it_back") {
        return;
    }
    let m = Machine::new(1);
    let rom = Pages::new(0x2000, 0x5a);
    for gpa in [0x1f000u64, 0x20000, 0x22000] {
        m.write(gpa, 0x11u8);
    }
    m.load(CODE, 32, |a| {
        a.mov(al, byte_ptr(0x1f000)).unwrap();
        a.mov(ah, byte_ptr(0x20000)).unwrap();
        a.mov(bl, byte_ptr(0x21fff)).unwrap();
        a.mov(bh, byte_ptr(0x22000)).unwrap();
        a.mov(byte_ptr(0x20004), 0x77).unwrap();
        a.mov(byte_ptr(0x22004), 0x78).unwrap();
        a.mov(cl, byte_ptr(0x20004)).unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    // SAFETY: the pages stay mapped for the test's life.
    unsafe { m.vm.set_memory(2, Some(rom.slot(0x20000, true))).unwrap() };
    m.run(&mut *vcpu);
    let state = vcpu.state().unwrap();
    assert_eq!((state.gprs[0] & 0xffff, state.gprs[3] & 0xffff), (0x5a11, 0x115a));
    assert_eq!(state.gprs[1] & 0xff, 0x5a);
    assert_eq!(m.bus.take(), [Access::MmioWrite(0x20004, vec![0x77])]);
    assert_eq!((rom.byte(4), m.read::<u8>(0x20004), m.read::<u8>(0x22004)), (0x5a, 0, 0x78));

    // The same, writable; then gone.
    // SAFETY: as above.
    unsafe { m.vm.set_memory(2, Some(rom.slot(0x20000, false))).unwrap() };
    restart(&mut *vcpu);
    m.run(&mut *vcpu);
    assert_eq!((rom.byte(4), m.read::<u8>(0x20004)), (0x77, 0));
    // SAFETY: nothing is shown.
    unsafe { m.vm.set_memory(2, None).unwrap() };
    restart(&mut *vcpu);
    m.run(&mut *vcpu);
    assert_eq!(vcpu.state().unwrap().gprs[0] & 0xffff, 0x1111);
    assert_eq!(m.read::<u8>(0x20004), 0x77);
    assert!(m.bus.take().is_empty());
    // SAFETY: refused.
    unsafe {
        assert!(m.vm.set_memory(16, Some(rom.slot(0x20000, false))).is_err());
        assert!(m.vm.set_memory(0, Some(rom.slot(0x20001, false))).is_err());
    }
}

#[test]
fn a_slot_tells_which_of_its_pages_were_written() {
    if !kvm_is_here("a_slot_tells_which_of_its_pages_were_written") {
        return;
    }
    let m = Machine::new(1);
    let (shown, hidden) = (Pages::new(0x45000, 0), Pages::new(0x1000, 0));
    let write = |m: &Machine, at: &[u32]| {
        m.load(CODE, 32, |a| {
            for at in at {
                a.mov(byte_ptr(*at), 7).unwrap();
            }
            finish(a);
        });
    };
    write(&m, &[0x2_0003, 0x6_4ffc, 0x1_fffc]);
    let mut vcpu = m.start(0, protected32);
    assert!(m.vm.take_slot_dirty(1).unwrap().is_empty());
    // SAFETY: the pages stay mapped for the test's life.
    unsafe { m.vm.set_memory(1, Some(shown.slot(0x20000, false))).unwrap() };
    m.run(&mut *vcpu);
    assert_eq!(m.vm.take_slot_dirty(1).unwrap(), [1, 1 << 4]);
    assert_eq!(m.vm.take_slot_dirty(1).unwrap(), [0, 0]);
    // Again, with another slot over a page in its middle: what was written before it came is told too.
    write(&m, &[0x2_3000]);
    restart(&mut *vcpu);
    m.run(&mut *vcpu);
    // SAFETY: as above.
    unsafe { m.vm.set_memory(2, Some(hidden.slot(0x21000, false))).unwrap() };
    write(&m, &[0x2_1000, 0x2_2000, 0x2_0000]);
    restart(&mut *vcpu);
    m.run(&mut *vcpu);
    assert_eq!(m.vm.take_slot_dirty(1).unwrap(), [0b1101, 0]);
    assert_eq!(m.vm.take_slot_dirty(2).unwrap(), [1]);
}

/// While slots come and go over a page, a guest that reads it sees one or the other, never a hole.
#[test]
fn rearranging_memory_is_atomic_for_vcpus() {
    if !kvm_is_here("rearranging_memory_is_atomic_for_vcpus") {
        return;
    }
    let m = Machine::new(1);
    let shown = Pages::new(0x1000, 0x22);
    m.memory.write_slice(&[0x11; 0x1000], GuestAddress(0x20000)).unwrap();
    m.load(CODE, 32, |a| {
        let (mut again, mut bad, mut good) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut again).unwrap();
        a.inc(edi).unwrap();
        a.mov(al, byte_ptr(0x20010)).unwrap();
        a.cmp(al, 0x11).unwrap();
        a.je(good).unwrap();
        a.cmp(al, 0x22).unwrap();
        a.jne(bad).unwrap();
        a.set_label(&mut good).unwrap();
        a.cmp(byte_ptr(0x600), 0).unwrap();
        a.je(again).unwrap();
        a.set_label(&mut bad).unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    let (vm, memory) = (m.vm.clone(), m.memory.clone());
    let changer = thread::spawn(move || {
        for i in 0..300 {
            let slot = (i % 2 == 0).then(|| shown.slot(0x20000, i % 4 == 0));
            // SAFETY: the pages are never unmapped.
            unsafe { vm.set_memory(0, slot).unwrap() };
        }
        memory.write_obj(1u8, GuestAddress(0x600)).unwrap();
    });
    m.run(&mut *vcpu);
    changer.join().unwrap();
    let state = vcpu.state().unwrap();
    assert_eq!(m.read::<u8>(0x600), 1, "ended by {:#x}", state.gprs[0] & 0xff);
    assert_eq!(m.bus.take(), []);
}

#[test]
fn written_pages_are_told_once() {
    if !kvm_is_here("written_pages_are_told_once") {
        return;
    }
    let m = Machine::new(1);
    m.load(CODE, 32, |a| {
        a.mov(byte_ptr(0x30000), 1).unwrap();
        a.mov(byte_ptr(0x6f_ffff), 1).unwrap();
        a.mov(byte_ptr(0x41000), 1).unwrap();
        a.mov(al, byte_ptr(0x50000)).unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    let shown = Pages::new(0x1000, 0);
    // SAFETY: the pages stay mapped for the test's life. A hole in RAM makes two pieces of it.
    unsafe { m.vm.set_memory(0, Some(shown.slot(0x40000, false))).unwrap() };
    m.vm.set_dirty_log(true).unwrap();
    m.vm.take_dirty().unwrap();
    m.run(&mut *vcpu);
    m.write(0x60000, 1u8);
    let pages = |dirty: Vec<Vec<u64>>| -> Vec<usize> {
        let bit = |page: &usize| dirty[0][page / 64] >> (page % 64) & 1 != 0;
        (0..(RAM >> 12) as usize).filter(bit).collect()
    };
    assert_eq!(pages(m.vm.take_dirty().unwrap()), [0x30, 0x41, 0x60, 0x6ff]);
    assert!(pages(m.vm.take_dirty().unwrap()).is_empty());
    // What was noted of a piece of RAM is not lost when the pieces change.
    restart(&mut *vcpu);
    m.run(&mut *vcpu);
    // SAFETY: nothing is shown.
    unsafe { m.vm.set_memory(0, None).unwrap() };
    assert_eq!(pages(m.vm.take_dirty().unwrap()), [0x30, 0x41, 0x6ff]);
    m.vm.set_dirty_log(false).unwrap();
    restart(&mut *vcpu);
    m.run(&mut *vcpu);
    assert!(pages(m.vm.take_dirty().unwrap()).is_empty());
}

#[test]
fn a_kick_ends_a_halt_a_loop_and_a_run_to_come() {
    if !kvm_is_here("a_kick_ends_a_halt_a_loop_and_a_run_to_come") {
        return;
    }
    for halt in [true, false] {
        let m = Machine::new(1);
        m.load(CODE, 32, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            if halt {
                a.hlt().unwrap();
            }
            a.jmp(again).unwrap();
        });
        let mut vcpu = m.start(0, protected32);
        let kick = vcpu.kicker();
        let watchdog = Watchdog::new(vcpu.kicker());
        kick.kick();
        kick.kick();
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        let other = kick.clone();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            other.kick();
        });
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        thread.join().unwrap();
        assert!(!watchdog.barked());
        let activity = vcpu.state().unwrap().activity;
        assert_eq!(activity, if halt { Activity::Halted } else { Activity::Running });
        drop(vcpu);
        kick.kick(); // of nobody: harmless
    }
}

/// Each kick is answered, whenever it comes.
#[test]
fn no_kick_is_lost() {
    if !kvm_is_here("no_kick_is_lost") {
        return;
    }
    let m = Machine::new(1);
    m.load(CODE, 32, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.in_(al, 0x80u32).unwrap(); // in and out of the guest all the time
        a.jmp(again).unwrap();
    });
    let mut vcpu = m.start(0, protected32);
    let kick = vcpu.kicker();
    let (answers, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, end) = (answers.clone(), stop.clone());
    let runner = thread::spawn(move || {
        while !end.load(Ordering::SeqCst) {
            assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    for i in 0..2000 {
        kick.kick();
        let mut spins = 0u64;
        while answers.load(Ordering::SeqCst) <= i {
            thread::yield_now();
            spins += 1;
            assert!(spins < 100_000_000, "kick {i} was lost");
        }
    }
    stop.store(true, Ordering::SeqCst);
    kick.kick();
    runner.join().unwrap();
}

/// A kick in the middle of an access: the access is complete when `run` returns.
#[test]
fn a_pending_access_is_completed_before_a_pause() {
    if !kvm_is_here("a_pending_access_is_completed_before_a_pause") {
        return;
    }
    let m = Machine::new(1);
    let mut ends = Vec::new();
    m.load(CODE, 32, |a| {
        a.mov(ebx, dword_ptr(MMIO + 4)).unwrap();
        a.in_(al, 0x80u32).unwrap();
        a.mov(dword_ptr(MMIO), ebx).unwrap();
        a.mov(esi, MMIO as u32).unwrap();
        a.mov(edi, 0x10000u32).unwrap();
        a.mov(ecx, 2u32).unwrap();
        a.rep().movsd().unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    m.bus.kick_on_access.store(true, Ordering::SeqCst);
    let watchdog = Watchdog::new(vcpu.kicker());
    while !m.bus.done.load(Ordering::SeqCst) {
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        assert!(!watchdog.barked());
        let state = vcpu.state().unwrap();
        ends.push((m.bus.take(), state.clone()));
        // A restored state goes on as well as the one that was left.
        vcpu.set_state(&state).unwrap();
    }
    let (first, state) = &ends[0];
    assert_eq!(first[..], [Access::MmioRead(MMIO + 4, 4)]);
    assert_eq!(state.gprs[3], 0xa7a6_a5a4);
    assert_eq!(state.rip, CODE + 6);
    let (second, state) = &ends[1];
    assert_eq!(second[..], [Access::PioRead(0x80, 1)]);
    assert_eq!((state.gprs[0] & 0xff, state.rip), (0x20, CODE + 8));
    let (third, state) = &ends[2];
    assert_eq!(third[..], [Access::MmioWrite(MMIO, vec![0xa4, 0xa5, 0xa6, 0xa7])]);
    assert_eq!(state.rip, CODE + 14);
    let reads: Vec<_> = ends[3..].iter().flat_map(|(log, _)| log.clone()).collect();
    assert_eq!(reads, [Access::MmioRead(MMIO, 4), Access::MmioRead(MMIO + 4, 4)]);
    assert_eq!(m.read::<u64>(0x10000), 0xa7a6_a5a4_a3a2_a1a0);
}

/// Integers, SSE, x87 and memory, for as many rounds as ECX says.
fn mixture(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.mov(ebx, 0x10000u32).unwrap();
    a.mov(rax, 0x9e37_79b9_7f4a_7c15u64).unwrap();
    a.fninit().unwrap();
    a.fldpi().unwrap();
    a.xorps(xmm3, xmm3).unwrap();
    a.set_label(&mut again).unwrap();
    a.imul_2(rax, rax).unwrap();
    a.add(rax, rcx).unwrap();
    a.movq(xmm0, rax).unwrap();
    a.paddq(xmm3, xmm0).unwrap();
    a.rol(rax, 13).unwrap();
    a.xor(qword_ptr(rbx), rax).unwrap();
    a.mov(qword_ptr(rbx + 8), rcx).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(again).unwrap();
    a.movdqu(xmmword_ptr(rbx + 0x10), xmm3).unwrap();
    a.fstp(qword_ptr(rbx + 0x20)).unwrap();
    a.ud2().unwrap();
}

const ROUNDS: u64 = 10_000_000;

fn mixing_machine() -> Machine {
    let m = Machine::new(1);
    m.page_tables();
    m.load(CODE, 64, mixture);
    m.kernel_entry(0x9000);
    m.load(0x9000, 64, finish);
    m
}

#[test]
fn a_saved_machine_goes_on_elsewhere() {
    if !kvm_is_here("a_saved_machine_goes_on_elsewhere") {
        return;
    }
    let begin = |state: &mut lodge_accel::state::VcpuState| {
        user64(state);
        state.gprs[1] = ROUNDS;
    };
    let whole = mixing_machine();
    let mut vcpu = whole.start(0, begin);
    whole.run(&mut *vcpu);
    let expected: [u64; 5] = whole.read(0x10000);
    assert_ne!(expected, [0; 5]);

    let first = mixing_machine();
    let mut vcpu = first.start(0, begin);
    let watchdog = Watchdog::new(vcpu.kicker());
    let mut saves = 0;
    let state = loop {
        // Kicks of its own until it is about half through; each stop saves and restores in place.
        let kick = vcpu.kicker();
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_micros(300));
            kick.kick();
        });
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        kicker.join().unwrap();
        assert!(!watchdog.barked());
        let state = vcpu.state().unwrap();
        vcpu.set_state(&state).unwrap();
        saves += 1;
        let left = first.read::<u64>(0x10008);
        if first.bus.done.load(Ordering::SeqCst) || (left != 0 && left < ROUNDS / 2) {
            break state;
        }
    };
    let second = Machine::new(1);
    let mut ram = vec![0; RAM as usize];
    first.memory.read_slice(&mut ram, GuestAddress(0)).unwrap();
    second.memory.write_slice(&ram, GuestAddress(0)).unwrap();
    second.vm.set_chip_state(&first.vm.chip_state().unwrap()).unwrap();
    let mut other = second.start(0, |fresh| *fresh = state.clone());
    let again = other.state().unwrap();
    assert_eq!((&again.gprs, again.rip, &again.xsave), (&state.gprs, state.rip, &state.xsave));
    assert_eq!((&again.segments, &again.debug), (&state.segments, &state.debug));
    if !first.bus.done.load(Ordering::SeqCst) {
        second.run(&mut *other);
    }
    assert_eq!(second.read::<[u64; 5]>(0x10000), expected, "after {saves} saves");
}

#[test]
fn all_of_the_state_comes_back() {
    if !kvm_is_here("all_of_the_state_comes_back") {
        return;
    }
    let m = Machine::new(2);
    let mut vcpu = m.start(0, |state| {
        long64(state);
        state.gprs = std::array::from_fn(|i| 0x1111 * i as u64);
        state.cr2 = 0x1234_5000;
        state.cr8 = 5;
        state.lapic[0x80] = 0x50; // the same, in the LAPIC's page
        state.debug = [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xffff_0ff0, 0x400];
        state.events.nmi_masked = true;
        state.activity = Activity::Halted;
        for (i, byte) in state.xsave[160..416].iter_mut().enumerate() {
            *byte = i as u8; // XMM0 to XMM15
        }
        state.xsave[512] |= 3;
        set_msr(state, 0x174, 0x10);
        set_msr(state, 0x277, 0x0007_0106_0007_0106);
        set_msr(state, 0xc000_0102, 0xffff_8000_0000_0000);
        set_msr(state, 0x17, 1); // read-only everywhere: refused, and lived with
    });
    let state = vcpu.state().unwrap();
    assert_eq!(state.gprs[15], 0x1111 * 15);
    assert_eq!((state.cr2, state.cr8, state.activity), (0x1234_5000, 5, Activity::Halted));
    assert_eq!(state.debug, [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xffff_0ff0, 0x400]);
    assert!(state.events.nmi_masked);
    assert!(state.xsave[160..416].iter().enumerate().all(|(i, byte)| *byte == i as u8));
    for msr in [(0x174, 0x10), (0x277, 0x0007_0106_0007_0106), (0xc000_0102, 0xffff_8000_0000_0000)]
    {
        assert!(state.msrs.contains(&msr), "{msr:x?}");
    }
    // A second round changes nothing but time.
    vcpu.set_state(&state).unwrap();
    let mut again = vcpu.state().unwrap();
    again.msrs.retain(|(index, _)| *index != 0x10);
    let mut before = state.clone();
    before.msrs.retain(|(index, _)| *index != 0x10);
    assert_eq!(again, before);
    // Nonsense is refused, not believed.
    for spoil in [
        |state: &mut lodge_accel::state::VcpuState| state.xsave.truncate(100),
        |state: &mut lodge_accel::state::VcpuState| state.lapic.truncate(100),
        |state: &mut lodge_accel::state::VcpuState| state.xsave.resize(1 << 20, 1),
    ] {
        let mut bad = state.clone();
        spoil(&mut bad);
        assert!(vcpu.set_state(&bad).is_err());
    }
}

#[test]
fn chips_come_back() {
    if !kvm_is_here("chips_come_back") {
        return;
    }
    let m = Machine::new(1);
    let mut state = m.vm.chip_state().unwrap();
    assert_eq!(state.ioapic.redirection.len(), 24);
    state.pics[0].imr = 0xfb;
    state.pics[1].irq_base = 0x28;
    state.ioapic.redirection[7] = 0x1_0037;
    state.pit.speaker_data_on = true;
    state.clock = Some(5_000_000_000);
    m.vm.set_chip_state(&state).unwrap();
    let again = m.vm.chip_state().unwrap();
    assert_eq!(again.pics, state.pics);
    assert_eq!(again.ioapic, state.ioapic);
    assert!(again.pit.speaker_data_on);
    // The software CPU shows no kvmclock.
    assert!(again.clock >= state.clock.filter(|_| !SOFT));
    state.ioapic.redirection.pop();
    assert!(m.vm.set_chip_state(&state).is_err());
}
