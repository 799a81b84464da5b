//! Instructions that KVM's own emulator lacks: x87 and SSE in guest kernel code and on devices'
//! memory. Where the guest's kernel code runs natively only the latter need finishing; the results are
//! the same everywhere.

mod kvm_support;

use iced_x86::code_asm::*;
use kvm_support::*;
use lodge_accel::Exit;

fn finish(a: &mut CodeAssembler) {
    a.out(u32::from(DONE_PORT), al).unwrap();
}

#[test]
fn kernel_code_uses_x87_and_sse() {
    if !kvm_is_here("kernel_code_uses_x87_and_sse") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.write(0x10000, 3u64);
    m.write(0x10008, 4.0f64.to_bits());
    m.load(CODE, 64, |a| {
        let mut again = a.create_label();
        a.mov(rbx, 0x10000u64).unwrap();
        a.fninit().unwrap();
        a.fild(qword_ptr(rbx)).unwrap();
        a.fmul(qword_ptr(rbx + 8)).unwrap();
        a.fldpi().unwrap();
        a.faddp(st1, st0).unwrap();
        a.fstp(qword_ptr(rbx + 0x10)).unwrap();
        a.cvtsi2sd(xmm1, qword_ptr(rbx)).unwrap();
        a.mov(ecx, 10u32).unwrap();
        a.set_label(&mut again).unwrap();
        a.mulsd(xmm1, qword_ptr(rbx + 8)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.movsd_2(qword_ptr(rbx + 0x18), xmm1).unwrap();
        a.pcmpeqd(xmm2, xmm2).unwrap();
        a.movdqu(xmmword_ptr(rbx + 0x20), xmm2).unwrap();
        a.pushfq().unwrap();
        a.popcnt(rdx, qword_ptr(rbx + 0x20)).unwrap();
        a.popfq().unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, long64);
    m.run(&mut *vcpu);
    assert_eq!(f64::from_bits(m.read(0x10010)), 12.0 + std::f64::consts::PI);
    assert_eq!(f64::from_bits(m.read(0x10018)), 3.0 * 4.0f64.powi(10));
    assert_eq!(m.read::<u128>(0x10020), u128::MAX);
    let state = vcpu.state().unwrap();
    assert_eq!((state.gprs[1] & 0xffff_ffff, state.gprs[2]), (0, 64));
}

#[test]
fn vector_accesses_reach_devices() {
    if !kvm_is_here("vector_accesses_reach_devices") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.load(CODE, 64, |a| {
        a.mov(rbx, MMIO).unwrap();
        a.pcmpeqd(xmm0, xmm0).unwrap();
        a.movq(qword_ptr(rbx + 8), xmm0).unwrap();
        a.paddq(xmm0, xmmword_ptr(rbx + 0x40)).unwrap(); // KVM decodes no PADDQ
        a.movdqu(xmmword_ptr(0x10000), xmm0).unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, long64);
    m.run(&mut *vcpu);
    let low = u64::from_le_bytes(pattern(MMIO + 0x40, 8).try_into().unwrap()).wrapping_sub(1);
    assert_eq!(m.read::<u64>(0x10000), low);
    let log = m.bus.take();
    assert_eq!(log[0], Access::MmioWrite(MMIO + 8, vec![0xff; 8]));
    assert!(log[1..].iter().all(|a| matches!(a, Access::MmioRead(at, _) if (at - MMIO) / 16 == 4)));
}

/// A fault of such an instruction goes to the guest's handler, and what lies over RAM is seen.
#[test]
fn faults_and_slots_are_the_guests() {
    if !kvm_is_here("faults_and_slots_are_the_guests") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.kernel_entry(0x9000);
    m.write(0x1008, 0u64); // nothing at 512 GiB
    for (i, word) in [0x8e00_0008_a000u64, 0].into_iter().enumerate() {
        m.write(IDT + 14 * 16 + i as u64 * 8, word); // #PF
    }
    m.load(0xa000, 64, |a| {
        a.mov(r8, cr2).unwrap();
        a.pop(r9).unwrap(); // error code
        a.pop(r10).unwrap(); // RIP
        finish(a);
    });
    m.load(CODE, 64, |a| {
        a.movdqu(xmm3, xmmword_ptr(0x20000)).unwrap();
        a.paddq(xmm3, xmmword_ptr(0x20000)).unwrap();
        a.movdqu(xmmword_ptr(0x10000), xmm3).unwrap();
        a.mov(rbx, 1u64 << 39).unwrap();
        a.paddq(xmm3, xmmword_ptr(rbx)).unwrap();
    });
    let shown = vec![0x11u8; 0x2000];
    let page = shown.as_ptr().align_offset(0x1000);
    let host = shown[page..].as_ptr().cast_mut();
    let slot = lodge_accel::MemorySlot { gpa: 0x20000, bytes: 0x1000, host, readonly: true };
    // SAFETY: a whole page inside of the vector, which outlives the VM's use of it; read only.
    unsafe { m.vm.set_memory(3, Some(slot)).unwrap() };
    let mut vcpu = m.start(0, |state| {
        long64(state);
        state.idtr = lodge_accel::state::TableRegister { base: IDT, limit: 0xfff };
    });
    m.run(&mut *vcpu);
    assert_eq!(m.read::<u128>(0x10000), 0x2222_2222_2222_2222_2222_2222_2222_2222);
    let state = vcpu.state().unwrap();
    assert_eq!(state.gprs[8], 1 << 39, "CR2");
    assert_eq!(state.gprs[9], 0, "not present, read, supervisor");
    assert!((CODE..CODE + 64).contains(&state.gprs[10]), "{:#x}", state.gprs[10]);
    // SAFETY: nothing is shown any more; RAM is seen again.
    unsafe { m.vm.set_memory(3, None).unwrap() };
    m.write(0x20000, 3u64);
    let mut state = vcpu.state().unwrap();
    (state.rip, state.gprs[4]) = (CODE, STACK);
    vcpu.set_state(&state).unwrap();
    m.run(&mut *vcpu);
    assert_eq!(m.read::<u128>(0x10000), 6);
}

#[test]
fn a_triple_fault_of_such_an_instruction_is_a_shutdown() {
    if !kvm_is_here("a_triple_fault_of_such_an_instruction_is_a_shutdown") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.load(CODE, 64, |a| {
        a.mov(rbx, 1u64 << 39).unwrap();
        a.paddq(xmm3, xmmword_ptr(rbx)).unwrap();
    });
    let mut vcpu = m.start(0, |state| {
        long64(state);
        state.idtr.limit = 0;
    });
    let watchdog = Watchdog::new(vcpu.kicker());
    assert_eq!(vcpu.run().unwrap(), Exit::Shutdown);
    assert!(!watchdog.barked());
}

/// The APICs are the kernel's: an instruction that KVM lacks does not reach them, and that is said. (The
/// software CPU has its own APICs and lacks nothing.)
#[test]
fn the_kernels_chips_are_out_of_reach() {
    if SOFT || !kvm_is_here("the_kernels_chips_are_out_of_reach") {
        return;
    }
    for chip in [0xfee0_0020u32, 0xfec0_0000] {
        let m = Machine::new(1);
        m.load(CODE, 32, |a| {
            a.mov(ebx, chip).unwrap();
            a.pcmpeqd(xmm0, xmm0).unwrap();
            a.paddq(xmm0, xmmword_ptr(ebx)).unwrap(); // KVM decodes no PADDQ
            finish(a);
        });
        let mut vcpu = m.start(0, |state| {
            protected32(state);
            state.cr4 = 1 << 9 | 1 << 10; // OSFXSR, OSXMMEXCPT
        });
        let watchdog = Watchdog::new(vcpu.kicker());
        let error = vcpu.run().expect_err("it ran").to_string();
        assert!(!watchdog.barked());
        assert!(error.contains("APIC") && error.contains("--accel soft"), "{error}");
    }
}
