//! A vCPU's state, out of the software CPU and back into it.

use std::sync::atomic::Ordering;

use lodge_softcpu::chip::lapic;
use lodge_softcpu::cpuid::{XCR0, XSAVE_BYTES};
use lodge_softcpu::shared::{Port, attention};
use lodge_softcpu::state::{self as soft, Cpu, FxState, cr};
use lodge_softcpu::{Fault, clock, msr};

use super::lock;
use super::vcpu::{Injected, SoftVcpu};
use crate::error::{Error, Result};
use crate::state::{Activity, Events, Segment, TableRegister, VcpuState};

/// XSTATE_BV in the XSAVE header (SDM volume 1, 13.4.2).
const XSTATE_BV: usize = 512;
const X87: u64 = 1;
const SSE: u64 = 2;
/// The least saved: legacy region and header.
const XSAVE_LEAST: usize = XSAVE_BYTES as usize;
const CR4_KNOWN: u64 = cr::CR4_VME
    | cr::CR4_PVI
    | cr::CR4_TSD
    | cr::CR4_DE
    | cr::CR4_PSE
    | cr::CR4_PAE
    | cr::CR4_MCE
    | cr::CR4_PGE
    | cr::CR4_PCE
    | cr::CR4_OSFXSR
    | cr::CR4_OSXMMEXCPT
    | cr::CR4_UMIP
    | cr::CR4_FSGSBASE
    | cr::CR4_PCIDE
    | cr::CR4_OSXSAVE
    | cr::CR4_SMEP
    | cr::CR4_SMAP;
const EFER_KNOWN: u64 = cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE;
/// Bits of DR6 that say which trap it was.
const DR6_CAUSES: u64 = 0xe00f;
/// The debug exception.
const DB: u8 = 1;
/// Saved elsewhere in the state.
const ELSEWHERE: [u32; 4] =
    [msr::index::APIC_BASE, msr::index::EFER, msr::index::FS_BASE, msr::index::GS_BASE];
/// Facts that another backend saves and that cannot be set.
const FACTS: [u32; 6] = [
    msr::index::PLATFORM_ID,
    msr::index::ARCH_CAPABILITIES,
    msr::index::MTRR_CAP,
    msr::index::MCG_CAP,
    msr::index::PLATFORM_INFO,
    msr::index::BIOS_SIGN_ID,
];

fn invalid<T>(text: String) -> Result<T> {
    Err(Error::Invalid(text))
}

pub(super) fn save(vcpu: &mut SoftVcpu) -> Result<VcpuState> {
    settle_init(vcpu);
    let shared = vcpu.shared.clone();
    let port = &shared.ports()[vcpu.index as usize];
    let (nmi_pending, injected) = (vcpu.vcpu.nmi_pending(), vcpu.injected);
    let cpu = vcpu.vcpu.cpu();
    let mut state = VcpuState {
        xsave: xsave_from(&cpu.fx),
        lapic: port.lapic.page(clock::host_tsc()).to_vec(),
        apic_base: port.lapic.apic_base(),
        cr8: port.lapic.cr8(),
        activity: activity_from(cpu.activity),
        ..VcpuState::default()
    };
    registers_from(cpu, &mut state);
    for index in msr::saved() {
        if let Ok(value) = cpu.read_msr(index) {
            state.msrs.push((index, value));
        }
    }
    state.events = events_from(cpu, port, injected, nmi_pending);
    if cpu.pending_debug != 0 {
        state.debug[6] |= cpu.pending_debug;
    }
    Ok(state)
}

/// An INIT that waits is carried out first, as it undoes what else would be saved.
fn settle_init(vcpu: &mut SoftVcpu) {
    let port = &vcpu.shared.ports()[vcpu.index as usize];
    if port.attention.fetch_and(!attention::INIT, Ordering::SeqCst) & attention::INIT == 0 {
        return;
    }
    port.lapic.init();
    vcpu.vcpu.cpu().init();
    vcpu.vcpu.set_nmi_pending(false);
    vcpu.injected = None;
}

fn events_from(cpu: &Cpu, port: &Port, injected: Option<Injected>, nmi_pending: bool) -> Events {
    let waits = port.attention.load(Ordering::SeqCst) & attention::SIPI != 0
        && cpu.activity == soft::Activity::WaitForSipi;
    let trap = (cpu.pending_debug != 0).then_some((DB, None));
    Events {
        interrupt: match injected {
            Some(Injected::Interrupt(vector)) => Some(vector),
            _ => None,
        },
        exception: match injected {
            Some(Injected::Exception(fault)) => Some((fault.vector, fault.error)),
            _ => trap,
        },
        nmi_pending,
        nmi_masked: cpu.inhibit.nmi,
        interrupt_shadow: cpu.inhibit.shadow,
        sipi_vector: waits.then(|| port.sipi_vector.load(Ordering::SeqCst)),
        ..Events::default()
    }
}

fn registers_from(cpu: &Cpu, state: &mut VcpuState) {
    state.gprs.copy_from_slice(&cpu.regs[..16]);
    state.rip = cpu.rip;
    state.rflags = cpu.rflags();
    state.segments = cpu.segs.map(segment_from);
    state.ldtr = segment_from(cpu.ldtr);
    state.tr = segment_from(cpu.tr);
    state.gdtr = TableRegister { base: cpu.gdtr.base, limit: cpu.gdtr.limit };
    state.idtr = TableRegister { base: cpu.idtr.base, limit: cpu.idtr.limit };
    (state.cr0, state.cr2, state.cr3, state.cr4) = (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4);
    (state.efer, state.xcr0, state.debug) = (cpu.efer, cpu.xcr0, cpu.dr);
}

fn segment_from(s: soft::Segment) -> Segment {
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes: s.attr }
}

fn segment_to(s: Segment) -> soft::Segment {
    let attr = s.attributes & !0x0f00;
    soft::Segment { selector: s.selector, base: s.base, limit: s.limit, attr }
}

/// A triple fault is not an activity of the common form: RIP is still at the instruction that had it,
/// so a vCPU that runs has it again.
fn activity_from(activity: soft::Activity) -> Activity {
    match activity {
        soft::Activity::Running | soft::Activity::Shutdown => Activity::Running,
        soft::Activity::Halted => Activity::Halted,
        soft::Activity::WaitForSipi => Activity::WaitForSipi,
    }
}

pub(super) fn restore(vcpu: &mut SoftVcpu, state: &VcpuState) -> Result<()> {
    check(state)?;
    let page = page(state)?;
    let fx = xsave_to(&state.xsave)?;
    let shared = vcpu.shared.clone();
    let port = &shared.ports()[vcpu.index as usize];
    if !port.lapic.restore(state.apic_base, page, clock::host_tsc()) {
        return invalid(format!("a saved APIC base of {:#x}", state.apic_base));
    }
    if port.lapic.cr8() != state.cr8 {
        let _ = port.lapic.set_tpr((state.cr8 as u8) << 4);
    }
    vcpu.injected = None;
    let cpu = vcpu.vcpu.cpu();
    registers_to(state, cpu);
    cpu.fx = fx;
    restore_msrs(vcpu, state)?;
    restore_events(vcpu, port, state);
    // Whatever the LAPIC or the PIC holds is looked at.
    port.notify(attention::INTERRUPT);
    Ok(())
}

/// What the software CPU does not have cannot be restored.
fn check(state: &VcpuState) -> Result<()> {
    for (name, value, known) in [
        ("XCR0", state.xcr0, XCR0),
        ("CR4", state.cr4, CR4_KNOWN),
        ("EFER", state.efer, EFER_KNOWN),
    ] {
        if value & !known != 0 {
            return invalid(format!(
                "the saved vCPU uses features that the software CPU does not have: {name} is \
                 {value:#x}, possible are the bits of {known:#x}. Restore it with KVM"
            ));
        }
    }
    Ok(())
}

fn page(state: &VcpuState) -> Result<&[u8; lapic::PAGE]> {
    let bytes = state.lapic.len();
    state.lapic.as_slice().try_into().map_err(|_| {
        Error::Invalid(format!("a saved local APIC of {bytes} bytes, not {}", lapic::PAGE))
    })
}

fn registers_to(state: &VcpuState, cpu: &mut Cpu) {
    cpu.regs[..16].copy_from_slice(&state.gprs);
    (cpu.rip, cpu.next_rip) = (state.rip, state.rip);
    cpu.segs = state.segments.map(segment_to);
    cpu.ldtr = segment_to(state.ldtr);
    cpu.tr = segment_to(state.tr);
    cpu.gdtr = soft::TableRegister { base: state.gdtr.base, limit: state.gdtr.limit };
    cpu.idtr = soft::TableRegister { base: state.idtr.base, limit: state.idtr.limit };
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    (cpu.efer, cpu.xcr0, cpu.dr) = (state.efer, state.xcr0.max(1), state.debug);
    cpu.set_rflags(state.rflags);
    cpu.inhibit =
        soft::Inhibit { shadow: state.events.interrupt_shadow, nmi: state.events.nmi_masked };
    cpu.pending_debug = 0;
    cpu.activity = match state.activity {
        Activity::Running => soft::Activity::Running,
        Activity::Halted => soft::Activity::Halted,
        Activity::WaitForSipi => soft::Activity::WaitForSipi,
    };
    cpu.update_mode();
    cpu.flush_tlb_all();
    let pae = cr::CR4_PAE;
    if cpu.cr0 & cr::CR0_PG != 0 && cpu.cr4 & pae != 0 && cpu.efer & cr::EFER_LMA == 0 {
        // They were valid when CR3 was loaded; where memory changed since, the next load tells.
        let _ = cpu.load_pdptes(cpu.cr3);
    }
}

fn restore_msrs(vcpu: &mut SoftVcpu, state: &VcpuState) -> Result<()> {
    // The deadline is the TSC's, so it comes last.
    let (last, first): (Vec<_>, Vec<_>) =
        state.msrs.iter().partition(|(index, _)| *index == msr::index::TSC_DEADLINE);
    for (index, value) in first.into_iter().chain(last) {
        if index == msr::index::TSC {
            restore_tsc(vcpu, value);
            continue;
        }
        if ELSEWHERE.contains(&index) || FACTS.contains(&index) {
            continue;
        }
        // A register that is not there and was never used is no loss.
        if vcpu.vcpu.cpu().restore_msr(index, value).is_err() && value != 0 {
            return invalid(format!(
                "the software CPU cannot set the saved MSR {index:#x} to {value:#x}. Restore the \
                 machine with KVM"
            ));
        }
    }
    Ok(())
}

/// vCPUs are saved one after the other, so their TSCs differ by the time between. Those that are less
/// than a second apart were one.
fn restore_tsc(vcpu: &mut SoftVcpu, value: u64) {
    let mut common = lock(&vcpu.tsc);
    let cpu = vcpu.vcpu.cpu();
    let offset = value.wrapping_sub(clock::host_tsc());
    let near = |other: &u64| (offset.wrapping_sub(*other) as i64).unsigned_abs() < clock::tsc_hz();
    cpu.tsc_offset = *common.filter(near).get_or_insert(offset);
    *common = Some(cpu.tsc_offset);
}

fn restore_events(vcpu: &mut SoftVcpu, port: &Port, state: &VcpuState) {
    let events = &state.events;
    vcpu.vcpu.set_nmi_pending(events.nmi_pending);
    port.attention.fetch_and(!(attention::INIT | attention::SIPI), Ordering::SeqCst);
    if let Some(vector) = events.sipi_vector {
        port.sipi_vector.store(vector, Ordering::SeqCst);
        port.notify(attention::SIPI);
    }
    match (events.exception, events.interrupt) {
        // A trap: its cause is in DR6.
        (Some((DB, _)), _) => {
            vcpu.vcpu.cpu().pending_debug = state.debug[6] & DR6_CAUSES;
        }
        (Some((vector, error)), _) => {
            vcpu.injected = Some(Injected::Exception(Fault { vector, error }));
        }
        // An INT n that was on its way: RIP is still at it, so it is executed once more.
        (None, Some(_)) if events.soft_interrupt => {}
        (None, Some(vector)) => vcpu.injected = Some(Injected::Interrupt(vector)),
        (None, None) => {}
    }
}

fn xsave_from(fx: &FxState) -> Vec<u8> {
    let mut area = Vec::with_capacity(XSAVE_LEAST);
    area.extend_from_slice(&fx.fcw.to_le_bytes());
    area.extend_from_slice(&fx.fsw.to_le_bytes());
    area.extend_from_slice(&[fx.ftw, 0]);
    area.extend_from_slice(&fx.fop.to_le_bytes());
    area.extend_from_slice(&fx.fip.to_le_bytes());
    area.extend_from_slice(&fx.fdp.to_le_bytes());
    area.extend_from_slice(&fx.mxcsr.to_le_bytes());
    area.extend_from_slice(&fx.mxcsr_mask.to_le_bytes());
    area.extend(fx.st.iter().flatten());
    area.extend(fx.xmm.iter().flatten().flat_map(|half| half.to_le_bytes()));
    area.resize(XSTATE_BV, 0);
    area.extend_from_slice(&(X87 | SSE).to_le_bytes());
    area.resize(XSAVE_LEAST, 0);
    area
}

fn xsave_to(area: &[u8]) -> Result<FxState> {
    if area.len() < XSAVE_LEAST {
        return invalid(format!(
            "saved vector registers of {} bytes: at least {XSAVE_LEAST} are needed",
            area.len()
        ));
    }
    let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let double = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
    let quad = |at: usize| u64::from(double(at)) | u64::from(double(at + 4)) << 32;
    let present = quad(XSTATE_BV);
    let more = area[XSTATE_BV + 8..].iter().any(|byte| *byte != 0);
    if present & !(X87 | SSE) != 0 || more {
        return invalid(format!(
            "the saved vCPU holds vector registers that the software CPU does not have \
             (XSTATE_BV {present:#x}). Restore it with KVM"
        ));
    }
    // What is not present is as after FNINIT, or zero (SDM volume 1, 13.6).
    let mut fx = FxState {
        fcw: 0x37f,
        fsw: 0,
        ftw: 0,
        reserved: 0,
        fop: 0,
        fip: 0,
        fdp: 0,
        mxcsr: 0x1f80,
        mxcsr_mask: 0xffff,
        st: [[0; 16]; 8],
        xmm: [[0; 2]; 16],
        rest: [0; 96],
    };
    if present & X87 != 0 {
        (fx.fcw, fx.fsw, fx.ftw, fx.fop) = (word(0), word(2), area[4], word(6));
        (fx.fip, fx.fdp) = (quad(8), quad(16));
        for (i, register) in fx.st.iter_mut().enumerate() {
            register[..10].copy_from_slice(&area[32 + 16 * i..][..10]);
        }
    }
    if present & SSE != 0 {
        fx.mxcsr = double(24) & 0xffff;
        for (i, register) in fx.xmm.iter_mut().enumerate() {
            *register = [quad(160 + 16 * i), quad(168 + 16 * i)];
        }
    }
    Ok(fx)
}

#[cfg(test)]
mod tests;
