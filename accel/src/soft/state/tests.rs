use std::sync::Arc;

use super::*;
use crate::soft::SoftVm;
use crate::vm::{Vcpu, VcpuSetup, Vm, VmSetup};
use lodge_memory::{NoBus, RamLayout, allocate};

fn vm(vcpus: u32) -> Arc<SoftVm> {
    let memory = allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
    SoftVm::new(VmSetup { memory, bus: Arc::new(NoBus), vcpus }).unwrap()
}

fn vcpu() -> Box<dyn Vcpu> {
    vm(1).create_vcpu(0, VcpuSetup::Reset).unwrap()
}

/// Without what moves by itself.
fn still(mut state: VcpuState) -> VcpuState {
    state.msrs.retain(|(index, _)| *index != msr::index::TSC);
    state
}

fn set(state: &mut VcpuState, index: u32, value: u64) {
    let msr = state.msrs.iter_mut().find(|(i, _)| *i == index).unwrap();
    msr.1 = value;
}

/// A 64-bit kernel's state with something in every field.
fn full() -> VcpuState {
    let mut state = vcpu().state().unwrap();
    state.gprs = std::array::from_fn(|i| 0x1111_1111_1111_1111 * i as u64);
    (state.rip, state.rflags) = (0xffff_8000_0010_2030, 0x4_0ad7);
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
    state.segments = [data; 6];
    state.segments[1] = Segment { selector: 8, attributes: 0xa09b, ..data };
    state.segments[4].base = 0x7fff_0000_1000;
    state.segments[5] = Segment { attributes: 0x13, ..Segment::default() };
    state.tr = Segment { selector: 0x40, base: 0x5000, limit: 0x67, attributes: 0x8b };
    state.gdtr = TableRegister { base: 0x6000, limit: 0x7f };
    state.idtr = TableRegister { base: 0x7000, limit: 0xfff };
    (state.cr0, state.cr2, state.cr3) = (0x8005_0033, 0xdead_b000, 0x1005);
    state.cr4 = cr::CR4_PAE | cr::CR4_PGE | cr::CR4_OSFXSR | cr::CR4_OSXSAVE | cr::CR4_PCIDE;
    (state.efer, state.xcr0, state.cr8) = (0xd01, 3, 2);
    state.debug = [1, 2, 3, 4, 0, 0, 0xffff_0ff1, 0x400];
    for (i, byte) in state.xsave[..512].iter_mut().enumerate() {
        *byte = i as u8;
    }
    // Reserved: the tag word's upper byte, MXCSR's upper half, above 80 bits of an x87 register, the rest.
    state.xsave[5] = 0;
    state.xsave[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    for register in state.xsave[32..160].chunks_mut(16) {
        register[10..].fill(0);
    }
    state.xsave[416..512].fill(0);
    state.apic_base = 0xfee0_0d00;
    state.lapic[0x80] = 0x20;
    state.lapic[0xa0] = 0x20;
    state.lapic[0xd0] = 1;
    state.lapic[0xf0..0xf2].copy_from_slice(&[0xff, 1]);
    state.lapic[0x320..0x323].copy_from_slice(&[0x40, 0, 4]);
    state.lapic[0x220] = 0x80;
    set(&mut state, msr::index::LSTAR, 0xffff_8000_0000_0000);
    set(&mut state, msr::index::TSC_ADJUST, 77);
    set(&mut state, msr::index::MTRR_DEF_TYPE, 0xc06);
    set(&mut state, msr::index::TSC_DEADLINE, 1 << 60);
    state.events = Events {
        exception: Some((14, Some(2))),
        nmi_pending: true,
        nmi_masked: true,
        interrupt_shadow: true,
        ..Events::default()
    };
    state.activity = Activity::Halted;
    state
}

#[test]
fn everything_survives_the_round_trip() {
    let state = full();
    let mut vcpu = vcpu();
    vcpu.set_state(&state).unwrap();
    let back = vcpu.state().unwrap();
    assert_eq!(still(back), still(state));
}

#[test]
fn it_serializes_and_each_event_survives() {
    for events in [
        Events { interrupt: Some(0x31), ..Events::default() },
        Events { exception: Some((13, Some(0x18))), ..Events::default() },
        Events { exception: Some((6, None)), nmi_pending: true, ..Events::default() },
    ] {
        let state = VcpuState { events, ..full() };
        let mut vcpu = vcpu();
        vcpu.set_state(&state).unwrap();
        assert_eq!(vcpu.state().unwrap().events, events);
    }
    let mut vcpu = vcpu();
    let mut state = vcpu.state().unwrap();
    state.activity = Activity::WaitForSipi;
    state.events.sipi_vector = Some(0x9a);
    vcpu.set_state(&state).unwrap();
    assert_eq!(still(vcpu.state().unwrap()), still(state));
}

#[test]
fn a_debug_trap_that_waits_survives() {
    let mut state = full();
    state.debug[6] = 0xffff_4ff0;
    state.events = Events { exception: Some((1, None)), ..Events::default() };
    let mut vcpu = vcpu();
    vcpu.set_state(&state).unwrap();
    let back = vcpu.state().unwrap();
    assert_eq!((back.debug[6], back.events), (state.debug[6], state.events));
}

#[test]
fn tscs_restored_together_are_one() {
    let vm = vm(2);
    let mut vcpus: Vec<_> = (0..2).map(|i| vm.create_vcpu(i, VcpuSetup::Reset).unwrap()).collect();
    let mut states: Vec<_> = vcpus.iter_mut().map(|v| v.state().unwrap()).collect();
    set(&mut states[0], msr::index::TSC, 1 << 50);
    set(&mut states[1], msr::index::TSC, (1 << 50) + 1_000_000);
    for (vcpu, state) in vcpus.iter_mut().zip(&states) {
        vcpu.set_state(state).unwrap();
    }
    let tsc = |vcpu: &mut Box<dyn Vcpu>| {
        let state = vcpu.state().unwrap();
        state.msrs.iter().find(|(i, _)| *i == msr::index::TSC).unwrap().1
    };
    // Read in turns, they never go back.
    let mut last = 1 << 50;
    for i in 0..100 {
        let now = tsc(&mut vcpus[i % 2]);
        assert!(now >= last, "vCPU {} is behind by {}", i % 2, last - now);
        last = now;
    }
}

#[test]
fn what_the_software_cpu_lacks_is_refused() {
    let base = full();
    let mut bad = vec![
        VcpuState { xcr0: 7, ..base.clone() },
        VcpuState { cr4: base.cr4 | 1 << 12, ..base.clone() },
        VcpuState { efer: base.efer | 1 << 12, ..base.clone() },
        VcpuState { apic_base: 0x400, ..base.clone() },
        VcpuState { lapic: vec![0; 4096], ..base.clone() },
        VcpuState { xsave: vec![0; 512], ..base.clone() },
    ];
    let mut avx = base.clone();
    avx.xsave[XSTATE_BV] = 7;
    bad.push(avx);
    let mut kvmclock = base.clone();
    kvmclock.msrs.push((0x4b56_4d01, 0x1001));
    bad.push(kvmclock);
    for (i, state) in bad.iter().enumerate() {
        assert!(vcpu().set_state(state).is_err(), "case {i}");
    }
    let mut harmless = base;
    harmless.msrs.push((0x4b56_4d01, 0));
    harmless.msrs.push((msr::index::ARCH_CAPABILITIES, 0));
    vcpu().set_state(&harmless).unwrap();
}

#[test]
fn absent_components_are_initial() {
    let mut state = full();
    state.xsave[XSTATE_BV] = 0;
    let mut vcpu = vcpu();
    vcpu.set_state(&state).unwrap();
    let area = vcpu.state().unwrap().xsave;
    assert_eq!((&area[..2], area[4], &area[24..26]), (&[0x7f, 3][..], 0, &[0x80, 0x1f][..]));
    assert!(area[32..416].iter().all(|byte| *byte == 0));
}
