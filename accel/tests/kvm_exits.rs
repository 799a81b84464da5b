//! Guests in each mode, and every way they reach a device.

mod kvm_support;

use iced_x86::code_asm::*;
use kvm_support::*;
use lodge_accel::{Exit, Vcpu, VcpuSetup};

/// Writes and reads ports of each size, and with string instructions.
fn port_accesses(a: &mut CodeAssembler) {
    a.mov(dx, 0x123u32).unwrap();
    a.mov(al, 0x11u32).unwrap();
    a.out(dx, al).unwrap();
    a.mov(ax, 0x2222u32).unwrap();
    a.out(dx, ax).unwrap();
    a.mov(eax, 0x3333_3333u32).unwrap();
    a.out(dx, eax).unwrap();
    a.out(0x80u32, al).unwrap();
    a.in_(al, dx).unwrap();
    a.mov(byte_ptr(0x6000), al).unwrap();
    a.in_(ax, dx).unwrap();
    a.mov(word_ptr(0x6002), ax).unwrap();
    a.in_(eax, dx).unwrap();
    a.mov(dword_ptr(0x6004), eax).unwrap();
}

fn out(port: u16, bytes: &[u8]) -> Access {
    Access::PioWrite(port, bytes.to_vec())
}

fn finish(a: &mut CodeAssembler) {
    a.out(u32::from(DONE_PORT), al).unwrap();
}

#[test]
fn real_mode_ports_of_each_size() {
    if !kvm_is_here("real_mode_ports_of_each_size") {
        return;
    }
    let m = Machine::new(1);
    m.load(CODE, 16, |a| {
        port_accesses(a);
        finish(a);
    });
    let mut vcpu = m.start(0, real16);
    m.run(&mut *vcpu);
    let read = |len| Access::PioRead(0x123, len);
    assert_eq!(
        m.bus.take(),
        [
            out(0x123, &[0x11]),
            out(0x123, &[0x22; 2]),
            out(0x123, &[0x33; 4]),
            out(0x80, &[0x33]),
            read(1),
            read(2),
            read(4)
        ]
    );
    assert_eq!(m.read::<u8>(0x6000), pattern(0x123, 1)[0]);
    assert_eq!(m.read::<[u8; 2]>(0x6002)[..], pattern(0x123, 2));
    assert_eq!(m.read::<[u8; 4]>(0x6004)[..], pattern(0x123, 4));
}

#[test]
fn string_port_accesses_come_one_by_one() {
    if !kvm_is_here("string_port_accesses_come_one_by_one") {
        return;
    }
    let m = Machine::new(1);
    for i in 0..6u8 {
        m.write(0x10000 + u64::from(i), i + 1);
    }
    m.load(CODE, 32, |a| {
        a.mov(edx, 0x200u32).unwrap();
        a.mov(esi, 0x10000u32).unwrap();
        a.mov(ecx, 3u32).unwrap();
        a.rep().outsw().unwrap();
        a.mov(edi, 0x10100u32).unwrap();
        a.mov(ecx, 5u32).unwrap();
        a.rep().insb().unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    m.run(&mut *vcpu);
    let log = m.bus.take();
    assert_eq!(log[..3], [out(0x200, &[1, 2]), out(0x200, &[3, 4]), out(0x200, &[5, 6])]);
    // KVM reads ahead for INS, but never less than asked for.
    assert!(log[3..].iter().all(|access| *access == Access::PioRead(0x200, 1)));
    assert_eq!(m.read::<[u8; 5]>(0x10100), [0xa0; 5]);
    let state = vcpu.state().unwrap();
    assert_eq!((state.gprs[1], state.gprs[6], state.gprs[7]), (0, 0x10006, 0x10105));
}

#[test]
fn memory_mapped_io_of_each_size() {
    if !kvm_is_here("memory_mapped_io_of_each_size") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.load(CODE, 64, |a| {
        a.mov(rbx, MMIO).unwrap();
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(byte_ptr(rbx + 1), al).unwrap();
        a.mov(word_ptr(rbx + 2), ax).unwrap();
        a.mov(dword_ptr(rbx + 4), eax).unwrap();
        a.mov(qword_ptr(rbx + 8), rax).unwrap();
        a.movzx(ecx, byte_ptr(rbx + 0x11)).unwrap();
        a.movzx(edx, word_ptr(rbx + 0x12)).unwrap();
        a.mov(esi, dword_ptr(rbx + 0x14)).unwrap();
        a.mov(rdi, qword_ptr(rbx + 0x18)).unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, long64);
    m.run(&mut *vcpu);
    let bytes = 0x1122_3344_5566_7788u64.to_le_bytes();
    let write = |at, len: usize| Access::MmioWrite(MMIO + at, bytes[..len].to_vec());
    let read = |at, len| Access::MmioRead(MMIO + at, len);
    assert_eq!(
        m.bus.take(),
        [
            write(1, 1),
            write(2, 2),
            write(4, 4),
            write(8, 8),
            read(0x11, 1),
            read(0x12, 2),
            read(0x14, 4),
            read(0x18, 8)
        ]
    );
    let state = vcpu.state().unwrap();
    let value = |at: u64, len| {
        pattern(MMIO + at, len).iter().rev().fold(0u64, |v, byte| v << 8 | u64::from(*byte))
    };
    assert_eq!(state.gprs[1], value(0x11, 1));
    assert_eq!(state.gprs[2], value(0x12, 2));
    assert_eq!(state.gprs[6], value(0x14, 4));
    assert_eq!(state.gprs[7], value(0x18, 8));
}

#[test]
fn string_moves_to_and_from_a_device() {
    if !kvm_is_here("string_moves_to_and_from_a_device") {
        return;
    }
    let m = Machine::new(1);
    m.write(0x10000, 0x0807_0605_0403_0201u64);
    m.load(CODE, 32, |a| {
        a.mov(esi, 0x10000u32).unwrap();
        a.mov(edi, MMIO as u32).unwrap();
        a.mov(ecx, 2u32).unwrap();
        a.rep().movsd().unwrap();
        a.mov(esi, MMIO as u32 + 0x40).unwrap();
        a.mov(edi, 0x10100u32).unwrap();
        a.mov(ecx, 3u32).unwrap();
        a.rep().movsb().unwrap();
        finish(a);
    });
    let mut vcpu = m.start(0, protected32);
    m.run(&mut *vcpu);
    let read = |at| Access::MmioRead(MMIO + at, 1);
    assert_eq!(
        m.bus.take(),
        [
            Access::MmioWrite(MMIO, vec![1, 2, 3, 4]),
            Access::MmioWrite(MMIO + 4, vec![5, 6, 7, 8]),
            read(0x40),
            read(0x41),
            read(0x42)
        ]
    );
    assert_eq!(m.read::<[u8; 3]>(0x10100), [0xe0, 0xe1, 0xe2]);
}

/// Adds the numbers 1 to 1000 in user code.
fn sum(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.xor(eax, eax).unwrap();
    a.mov(ecx, 1000u32).unwrap();
    a.set_label(&mut again).unwrap();
    a.add(rax, rcx).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(again).unwrap();
}

/// What only the kernel may do: read CR3, use ports.
fn kernel(a: &mut CodeAssembler) {
    a.mov(rbx, cr3).unwrap();
    a.out(0x80u32, eax).unwrap();
    finish(a);
}

#[test]
fn user_code_runs_and_calls_the_kernel() {
    if !kvm_is_here("user_code_runs_and_calls_the_kernel") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.kernel_entry(0x9000);
    m.load(0x9000, 64, kernel);
    m.load(CODE, 64, |a| {
        sum(a);
        a.ud2().unwrap();
    });
    let mut vcpu = m.start(0, user64);
    m.run(&mut *vcpu);
    assert_eq!(m.bus.take(), [out(0x80, &500_500u32.to_le_bytes())]);
    let state = vcpu.state().unwrap();
    assert_eq!((state.gprs[3], state.segments[1].selector), (0x1000, 8));
}

#[test]
fn syscall_enters_the_kernel() {
    if !kvm_is_here("syscall_enters_the_kernel") {
        return;
    }
    if !SOFT && lodge_accel::kvm::probe().unwrap().module.contains("kvm_pvm") {
        eprintln!(
            "SKIPPED: syscall_enters_the_kernel: kvm_pvm leaves the guest at privilege level 3 \
             after SYSCALL (docs/kvm.md)"
        );
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.load(0x9000, 64, kernel);
    m.load(CODE, 64, |a| {
        sum(a);
        a.syscall().unwrap();
    });
    let mut vcpu = m.start(0, |state| {
        user64(state);
        set_msr(state, 0xc000_0081, 0x13 << 48 | 8 << 32); // STAR
        set_msr(state, 0xc000_0082, 0x9000); // LSTAR
        set_msr(state, 0xc000_0084, 0x200); // FMASK
    });
    m.run(&mut *vcpu);
    assert_eq!(m.bus.take(), [out(0x80, &500_500u32.to_le_bytes())]);
    let state = vcpu.state().unwrap();
    assert_eq!((state.gprs[3], state.segments[1].selector), (0x1000, 8));
    assert_eq!(state.segments[2].attributes >> 5 & 3, 0);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    if !kvm_is_here("a_triple_fault_is_a_shutdown") {
        return;
    }
    let m = Machine::new(1);
    m.load(CODE, 32, |a| a.ud2().unwrap());
    let mut vcpu = m.start(0, |state| {
        protected32(state);
        state.idtr.limit = 0;
    });
    let watchdog = Watchdog::new(vcpu.kicker());
    assert_eq!(vcpu.run().unwrap(), Exit::Shutdown);
    assert!(!watchdog.barked());
}

#[test]
fn after_reset_it_is_at_the_reset_vector() {
    if !kvm_is_here("after_reset_it_is_at_the_reset_vector") {
        return;
    }
    let m = Machine::new(2);
    let mut boot: Box<dyn Vcpu> = m.vm.create_vcpu(0, VcpuSetup::Reset).unwrap();
    let state = boot.state().unwrap();
    assert_eq!((state.segments[1].base, state.rip), (0xffff_0000, 0xfff0));
    assert_eq!(state.cr0, 0x6000_0010);
    assert_eq!(state.apic_base, 0xfee0_0900);
    assert_ne!(state.gprs[2], 0, "RDX holds the processor's signature");
    assert_eq!(state.activity, lodge_accel::state::Activity::Running);
    let mut other = m.vm.create_vcpu(1, VcpuSetup::Reset).unwrap();
    assert_eq!(other.state().unwrap().activity, lodge_accel::state::Activity::WaitForSipi);
    assert!(m.vm.create_vcpu(1, VcpuSetup::Reset).is_err());
    assert!(m.vm.create_vcpu(2, VcpuSetup::Reset).is_err());
}

#[test]
fn cpuid_shows_the_topology() {
    if !kvm_is_here("cpuid_shows_the_topology") {
        return;
    }
    let m = Machine::new(3);
    m.page_tables();
    m.load(CODE, 64, |a| {
        for (i, leaf) in [1u32, 0x4000_0000, 0x4000_0010].into_iter().enumerate() {
            a.mov(eax, leaf).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.cpuid().unwrap();
            let at = 0x10000 + i as u64 * 16;
            a.mov(dword_ptr(at), eax).unwrap();
            a.mov(dword_ptr(at + 4), ebx).unwrap();
            a.mov(dword_ptr(at + 8), ecx).unwrap();
            a.mov(dword_ptr(at + 12), edx).unwrap();
        }
        finish(a);
    });
    let mut vcpu = m.start(2, long64);
    m.run(&mut *vcpu);
    let leaf = |i: u64| m.read::<[u32; 4]>(0x10000 + i * 16);
    let [_, topology, features, more] = leaf(0);
    assert_eq!((topology >> 24, topology >> 16 & 0xff), (2, 4), "APIC id 2, room for 4");
    assert_eq!((features >> 31, more >> 28 & 1), (1, 1), "a hypervisor, several processors");
    assert_eq!(leaf(1)[1..], [0x4b4d_564b, 0x564b_4d56, 0x4d], "KVMKVMKVM");
    if leaf(1)[0] >= 0x4000_0010 {
        assert!(leaf(2)[0] > 100_000, "a TSC of more than 100 MHz");
    }
}
