//! A vCPU's state, out of KVM and back into it, in the order that KVM needs.
//!
//! ```text
//!   save     mp_state (handles INIT and SIPI that wait) -> registers -> LAPIC -> MSRs -> events
//!   restore  sregs (EFER, APIC base) -> regs (drops a queued exception) -> XCR0 -> XSAVE
//!            -> LAPIC (its mode is in the APIC base) -> MSRs, the TSC deadline last (needs LAPIC and
//!            TSC) -> debug registers -> events -> mp_state (sregs may have made the BSP runnable)
//! ```

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, Xsave, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::{msrs, refused};
use crate::error::{Error, Result};
use crate::state::{Activity, Events, Segment, TableRegister, VcpuState};

/// The legacy region and the header (SDM volume 1, 13.4).
const XSAVE_LEAST: usize = 576;
const RFLAGS_IF: u64 = 1 << 9;

/// What saving and restoring needs to know of the VM.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Bytes of the XSAVE area as this kernel has it; at least 4096.
    pub xsave_bytes: usize,
    /// KVM_GET_XSAVE2 exists.
    pub xsave2: bool,
    /// KVM_GET_XCRS exists (the host has XSAVE).
    pub xcrs: bool,
    /// MSRs to save.
    pub msrs: Vec<u32>,
}

pub(super) fn save(vcpu: &VcpuFd, layout: &Layout) -> Result<VcpuState> {
    let mp_state = vcpu.get_mp_state().map_err(refused("reading what a vCPU does"))?;
    let mut state = save_for_step(vcpu, layout, &layout.msrs)?;
    let lapic = vcpu.get_lapic().map_err(refused("reading the local APIC"))?;
    state.lapic = lapic.regs.iter().map(|byte| *byte as u8).collect();
    state.activity = activity_from(mp_state.mp_state);
    Ok(state)
}

/// What an instruction can depend on, of a vCPU that is running: no local APIC, and only these MSRs.
pub(super) fn save_for_step(vcpu: &VcpuFd, layout: &Layout, msrs: &[u32]) -> Result<VcpuState> {
    let regs = vcpu.get_regs().map_err(refused("reading registers"))?;
    let sregs = vcpu.get_sregs().map_err(refused("reading system registers"))?;
    let xsave = get_xsave(vcpu, layout)?;
    let xcr0 = if layout.xcrs {
        let xcrs = vcpu.get_xcrs().map_err(refused("reading XCR0"))?;
        xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value)
    } else {
        1
    };
    let debug = vcpu.get_debug_regs().map_err(refused("reading debug registers"))?;
    let msrs = msrs::get(vcpu, msrs)?;
    let events = vcpu.get_vcpu_events().map_err(refused("reading pending events"))?;
    let mut state = VcpuState { xcr0, xsave, msrs, ..Default::default() };
    regs_from(&regs, &mut state);
    sregs_from(&sregs, &mut state);
    state.debug = [debug.db[0], debug.db[1], debug.db[2], debug.db[3], 0, 0, debug.dr6, debug.dr7];
    state.events = events_from(&events);
    state.activity = Activity::Running;
    Ok(state)
}

pub(super) fn restore(vcpu: &VcpuFd, layout: &Layout, state: &VcpuState) -> Result<()> {
    vcpu.set_sregs(&sregs_to(state)).map_err(refused("setting system registers"))?;
    vcpu.set_regs(&regs_to(state)).map_err(refused("setting registers"))?;
    if layout.xcrs {
        set_xcr0(vcpu, state.xcr0)?;
    }
    set_xsave(vcpu, layout, &state.xsave)?;
    let mut lapic = kvm_lapic_state::default();
    if state.lapic.len() != lapic.regs.len() {
        return Err(Error::Invalid(format!(
            "a saved local APIC of {} bytes, not {}",
            state.lapic.len(),
            lapic.regs.len()
        )));
    }
    for (to, from) in lapic.regs.iter_mut().zip(&state.lapic) {
        *to = *from as _;
    }
    vcpu.set_lapic(&lapic).map_err(refused("setting the local APIC"))?;
    msrs::restore(vcpu, &state.msrs)?;
    set_debug(vcpu, &state.debug)?;
    vcpu.set_vcpu_events(&events_to(state)).map_err(refused("setting pending events"))?;
    let mp_state = kvm_mp_state { mp_state: activity_to(state) };
    vcpu.set_mp_state(mp_state).map_err(refused("setting what a vCPU does"))
}

/// Sets what differs from `before`, after one instruction was finished outside of KVM. Everything
/// that moves by itself meanwhile (the TSC, interrupts and NMIs on their way to the local APIC) is left
/// alone.
pub(super) fn restore_changes(
    vcpu: &VcpuFd,
    layout: &Layout,
    before: &VcpuState,
    after: &VcpuState,
) -> Result<()> {
    let sregs = sregs_to(after);
    if sregs != sregs_to(before) {
        vcpu.set_sregs(&sregs).map_err(refused("setting system registers"))?;
    }
    vcpu.set_regs(&regs_to(after)).map_err(refused("setting registers"))?;
    if layout.xcrs && after.xcr0 != before.xcr0 {
        set_xcr0(vcpu, after.xcr0)?;
    }
    if after.xsave != before.xsave {
        set_xsave(vcpu, layout, &after.xsave)?;
    }
    let changed: Vec<_> =
        after.msrs.iter().filter(|msr| !before.msrs.contains(msr)).copied().collect();
    msrs::restore(vcpu, &changed)?;
    if after.debug != before.debug {
        set_debug(vcpu, &after.debug)?;
    }
    let mut events = events_to(after);
    if after.events.nmi_pending == before.events.nmi_pending {
        events.flags &= !KVM_VCPUEVENT_VALID_NMI_PENDING;
    }
    vcpu.set_vcpu_events(&events).map_err(refused("setting pending events"))?;
    if after.activity != before.activity {
        let mp_state = kvm_mp_state { mp_state: activity_to(after) };
        vcpu.set_mp_state(mp_state).map_err(refused("setting what a vCPU does"))?;
    }
    Ok(())
}

fn set_xcr0(vcpu: &VcpuFd, value: u64) -> Result<()> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = value.max(1); // bit 0, x87, is always set
    vcpu.set_xcrs(&xcrs).map_err(refused("setting XCR0"))
}

fn set_debug(vcpu: &VcpuFd, registers: &[u64; 8]) -> Result<()> {
    let [d0, d1, d2, d3, _, _, dr6, dr7] = *registers;
    let debug = kvm_debugregs { db: [d0, d1, d2, d3], dr6, dr7, ..Default::default() };
    vcpu.set_debug_regs(&debug).map_err(refused("setting debug registers"))
}

fn get_xsave(vcpu: &VcpuFd, layout: &Layout) -> Result<Vec<u8>> {
    if !layout.xsave2 {
        let xsave = vcpu.get_xsave().map_err(refused("reading vector registers"))?;
        return Ok(xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect());
    }
    let mut xsave = empty_xsave(layout)?;
    // SAFETY: the area is as large as KVM said it would write.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(refused("reading vector registers"))?;
    let head = xsave.as_fam_struct_ref().xsave.region.iter();
    Ok(head.chain(xsave.as_slice()).flat_map(|word| word.to_le_bytes()).collect())
}

fn set_xsave(vcpu: &VcpuFd, layout: &Layout, bytes: &[u8]) -> Result<()> {
    if bytes.len() < XSAVE_LEAST {
        return Err(Error::Invalid(format!(
            "saved vector registers of {} bytes: at least {XSAVE_LEAST} are needed",
            bytes.len()
        )));
    }
    if bytes.iter().skip(layout.xsave_bytes).any(|byte| *byte != 0) {
        return Err(Error::Invalid(format!(
            "saved vector registers of {} bytes: this host has {}",
            bytes.len(),
            layout.xsave_bytes
        )));
    }
    let mut xsave = empty_xsave(layout)?;
    let words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    let mut words = words.take(layout.xsave_bytes / 4);
    // SAFETY: only words are written, the length stays.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    for (to, from) in region.iter_mut().zip(&mut words) {
        *to = from;
    }
    for (to, from) in xsave.as_mut_slice().iter_mut().zip(words) {
        *to = from;
    }
    // SAFETY: the area is as large as KVM reads.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(refused("setting vector registers"))
}

fn empty_xsave(layout: &Layout) -> Result<Xsave> {
    let extra = layout.xsave_bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    Xsave::new(extra).map_err(|e| refused("vector registers")(std::io::Error::other(e)))
}

fn regs_from(regs: &kvm_regs, state: &mut VcpuState) {
    let r = regs;
    state.gprs = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

fn regs_to(state: &VcpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gprs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags | 2,
    }
}

fn sregs_from(sregs: &kvm_sregs, state: &mut VcpuState) {
    let s = sregs;
    state.segments = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|segment| segment_from(&segment));
    state.ldtr = segment_from(&s.ldt);
    state.tr = segment_from(&s.tr);
    state.gdtr = TableRegister { base: s.gdt.base, limit: s.gdt.limit };
    state.idtr = TableRegister { base: s.idt.base, limit: s.idt.limit };
    (state.cr0, state.cr2, state.cr3, state.cr4, state.cr8) = (s.cr0, s.cr2, s.cr3, s.cr4, s.cr8);
    (state.efer, state.apic_base) = (s.efer, s.apic_base);
}

/// The pending interrupt is left to the events.
fn sregs_to(state: &VcpuState) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.map(|segment| segment_to(&segment));
    let table =
        |t: &TableRegister| kvm_dtable { base: t.base, limit: t.limit, ..Default::default() };
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: segment_to(&state.tr),
        ldt: segment_to(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base: state.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn segment_from(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    let present = bit(s.present, 7) & !bit(s.unusable, 7);
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: u16::from(s.type_ & 15)
            | bit(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | present
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15),
    }
}

fn segment_to(s: &Segment) -> kvm_segment {
    let bit = |at: u32| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 15) as u8,
        present: bit(7),
        dpl: (s.attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: 1 - bit(7),
        padding: 0,
    }
}

fn events_from(events: &kvm_vcpu_events) -> Events {
    let (interrupt, exception) = (&events.interrupt, &events.exception);
    Events {
        interrupt: (interrupt.injected != 0).then_some(interrupt.nr),
        soft_interrupt: interrupt.injected != 0 && interrupt.soft != 0,
        exception: (exception.injected != 0 || exception.pending != 0).then(|| {
            (exception.nr, (exception.has_error_code != 0).then_some(exception.error_code))
        }),
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        // One on its way is turned back to one that waits, so that it is delivered once more.
        nmi_masked: events.nmi.masked != 0 && events.nmi.injected == 0,
        interrupt_shadow: events.interrupt.shadow != 0,
        sipi_vector: None,
    }
}

fn events_to(state: &VcpuState) -> kvm_vcpu_events {
    let from = &state.events;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(vector) = from.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = from.soft_interrupt.into();
    }
    if let Some((vector, code)) = from.exception {
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = code.is_some().into();
        events.exception.error_code = code.unwrap_or(0);
    }
    events.nmi.pending = from.nmi_pending.into();
    events.nmi.masked = from.nmi_masked.into();
    if from.interrupt_shadow {
        // VT-x refuses a shadow of STI while IF is clear, and both at once (SDM volume 3, 26.3.1.5).
        let sti = state.rflags & RFLAGS_IF != 0;
        let shadow = if sti { KVM_X86_SHADOW_INT_STI } else { KVM_X86_SHADOW_INT_MOV_SS };
        events.interrupt.shadow = shadow as u8;
    }
    if let Some(vector) = from.sipi_vector {
        events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        events.sipi_vector = vector.into();
    }
    events
}

fn activity_from(mp_state: u32) -> Activity {
    match mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
        KVM_MP_STATE_HALTED => Activity::Halted,
        _ => Activity::Running,
    }
}

/// A vCPU that KVM calls uninitialized ignores a SIPI before an INIT; one that received INIT takes
/// both, as a processor after reset does.
fn activity_to(state: &VcpuState) -> u32 {
    match state.activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi if state.events.sipi_vector.is_some() => KVM_MP_STATE_SIPI_RECEIVED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    }
}

/// A processor after power-up or reset (SDM volume 3, table 10-1), with what differs from zero.
pub(super) fn reset_registers(vcpu: &VcpuFd, index: u32, signature: u32) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(refused("reading system registers"))?;
    let data = Segment { limit: 0xffff, attributes: 0x93, ..Default::default() };
    let code = Segment { selector: 0xf000, base: 0xffff_0000, attributes: 0x9b, ..data };
    let mut state = VcpuState { apic_base: sregs.apic_base, ..Default::default() };
    state.segments = [data, code, data, data, data, data];
    state.ldtr = Segment { attributes: 0x82, ..data };
    state.tr = Segment { attributes: 0x8b, ..data };
    state.gdtr = TableRegister { base: 0, limit: 0xffff };
    state.idtr = state.gdtr;
    state.cr0 = 0x6000_0010;
    state.gprs[2] = signature.into();
    state.rip = 0xfff0;
    state.apic_base = 0xfee0_0800 | u64::from(index == 0) << 8;
    let bitmap = sregs.interrupt_bitmap;
    sregs = sregs_to(&state);
    sregs.interrupt_bitmap = bitmap;
    vcpu.set_sregs(&sregs).map_err(refused("resetting system registers"))?;
    vcpu.set_regs(&regs_to(&state)).map_err(refused("resetting registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_round_trip() {
        for attributes in [0x93, 0xa09b, 0xc093, 0x8b, 0x82, 0xf0f3, 0xd0fb] {
            let segment = Segment { selector: 8, base: 0x1234, limit: 0xfffff, attributes };
            assert_eq!(segment_from(&segment_to(&segment)), segment, "{attributes:#x}");
        }
        let unusable = Segment { attributes: 0x13, ..Default::default() };
        assert_eq!(segment_to(&unusable).unusable, 1);
        let marked = kvm_segment { present: 1, unusable: 1, type_: 3, s: 1, ..Default::default() };
        assert_eq!(segment_from(&marked).attributes, 0x13);
    }

    #[test]
    fn registers_survive_the_round_trip() {
        let mut state = VcpuState { rip: 77, rflags: 0x246, ..Default::default() };
        state.gprs = std::array::from_fn(|i| i as u64 + 100);
        let mut back = VcpuState::default();
        regs_from(&regs_to(&state), &mut back);
        assert_eq!(back, state);
    }

    #[test]
    fn events_survive_the_round_trip() {
        let mut state = VcpuState { rflags: RFLAGS_IF, ..Default::default() };
        for events in [
            Events { interrupt: Some(0x30), nmi_masked: true, ..Default::default() },
            Events { interrupt: Some(0x80), soft_interrupt: true, ..Default::default() },
            Events { exception: Some((14, Some(6))), nmi_pending: true, ..Default::default() },
            Events { exception: Some((6, None)), interrupt_shadow: true, ..Default::default() },
        ] {
            state.events = events;
            assert_eq!(events_from(&events_to(&state)), events);
        }
        state.rflags = 0;
        assert_eq!(u32::from(events_to(&state).interrupt.shadow), KVM_X86_SHADOW_INT_MOV_SS);
    }

    #[test]
    fn waiting_processors_take_a_sipi() {
        let mut state = VcpuState { activity: Activity::WaitForSipi, ..Default::default() };
        assert_eq!(activity_to(&state), KVM_MP_STATE_INIT_RECEIVED);
        state.events.sipi_vector = Some(0x9a);
        assert_eq!(activity_to(&state), KVM_MP_STATE_SIPI_RECEIVED);
        assert_eq!(activity_from(KVM_MP_STATE_UNINITIALIZED), Activity::WaitForSipi);
    }
}
