//! Finishing an instruction that this host's KVM cannot: one step of the software CPU on the vCPU's
//! state, and more of them while vector instructions follow, as KVM lacks those next to each other.
//!
//! ```text
//!   KVM_EXIT_INTERNAL_ERROR --> state::save_for_step --> Cpu (load) --> step --> state (store)
//!                                                                    |           |
//!                                          guest RAM, slots, bus (as KVM's)       '--> restore_changes
//! ```
//!
//! The software CPU reaches the same RAM, slots and bus as the vCPU. The interrupt controllers and the
//! PIT are the kernel's, and only KVM's own emulation reaches them: an instruction that KVM lacks and that
//! reads or writes one of them cannot be finished, which [`Finished::KernelsChip`] says. None is known.

use std::sync::Arc;
use std::sync::Mutex;
use std::thread::{self, ThreadId};

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};
use lodge_memory::{Bus, PageTable};
use lodge_softcpu::events::DR6_BS;
use lodge_softcpu::exec::step::{fetch_and_decode, fetch_and_execute};
use lodge_softcpu::shared::PhysRegion;
use lodge_softcpu::state::{self as soft, Cpu, FxState};
use lodge_softcpu::{Fault, Shared as SoftShared, flags};

use super::gate::lock;
use super::slots::Slots;
use super::vm::Shared;
use crate::state::{Activity, Segment, TableRegister, VcpuState};
use crate::vm::MemorySlot;

/// XSTATE_BV in the XSAVE header (SDM volume 1, 13.4.2): x87 and SSE.
const XSTATE_BV: usize = 512;
const X87_AND_SSE: u8 = 3;

/// MSRs that instructions read or write by themselves: TSC, SYSENTER, PAT, SYSCALL, SWAPGS, RDTSCP.
pub(super) const MSRS: [u32; 11] = [
    IA32_TSC,
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
];
const IA32_TSC: u32 = 0x10;
/// At most so many instructions at a time: interrupts wait meanwhile.
const BATCH: usize = 64;
const CR4_OSXSAVE: u64 = 1 << 18;

/// How the instruction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finished {
    /// It is done, or its exception is raised.
    Done,
    /// A triple fault.
    Shutdown,
    /// It accesses this chip, which is in the kernel. The state is of no use.
    KernelsChip(&'static str),
    /// It is AVX, which the guest has and the software CPU has not. Nothing was done.
    Beyond,
}

/// The software CPUs' view of the VM.
pub(super) struct Machine {
    shared: Arc<SoftShared>,
    bus: Arc<Guard>,
}

/// The bus without what KVM has in the kernel.
struct Guard {
    bus: Arc<dyn Bus>,
    /// Which of it a thread met.
    met: Mutex<Vec<(ThreadId, &'static str)>>,
}

impl Guard {
    /// Whether the kernel has it; if so that is noted.
    fn met(&self, chip: Option<&'static str>) -> bool {
        if let Some(chip) = chip {
            lock(&self.met).push((thread::current().id(), chip));
        }
        chip.is_some()
    }

    /// What this thread met first since it last asked.
    fn take(&self) -> Option<&'static str> {
        let (mut first, me) = (None, thread::current().id());
        lock(&self.met).retain(|(thread, chip)| {
            if *thread == me {
                first = first.or(Some(*chip));
            }
            *thread != me
        });
        first
    }
}

fn chip_at(gpa: u64) -> Option<&'static str> {
    match gpa & !0xfff {
        0xfec0_0000 => Some("the I/O APIC"),
        0xfee0_0000 => Some("the local APIC"),
        _ => None,
    }
}

fn chip_at_port(port: u16) -> Option<&'static str> {
    match port {
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Some("the PIC"),
        0x40..=0x43 | 0x61 => Some("the PIT"),
        _ => None,
    }
}

impl Bus for Guard {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if !self.met(chip_at_port(port)) {
            self.bus.pio_read(port, data);
        }
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if !self.met(chip_at_port(port)) {
            self.bus.pio_write(port, data);
        }
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if !self.met(chip_at(gpa)) {
            self.bus.mmio_read(gpa, data);
        }
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if !self.met(chip_at(gpa)) {
            self.bus.mmio_write(gpa, data);
        }
    }
}

/// The software CPU of one vCPU.
pub(super) struct Finisher {
    cpu: Box<Cpu>,
    bus: Arc<Guard>,
}

impl Finisher {
    /// Makes the software CPU of vCPU `index`.
    pub(super) fn new(vm: &Shared, index: u32) -> Self {
        let slots = lock(&vm.slots);
        let mut machine = lock(&vm.machine);
        let machine = machine.get_or_insert_with(|| {
            let bus = Arc::new(Guard { bus: vm.bus.clone(), met: Mutex::default() });
            let shared = SoftShared::new(vm.memory.clone(), bus.clone(), vm.vcpus);
            shared.leave_chips_to_bus();
            shared.set_overlays(slots.extra().map(region));
            Machine { shared, bus }
        });
        Self { cpu: Cpu::new(machine.shared.clone(), index), bus: machine.bus.clone() }
    }

    /// Executes the one instruction at `state`'s RIP, in this vCPU's thread.
    pub(super) fn finish(&mut self, state: &mut VcpuState) -> Finished {
        let finished = finish_instruction(state, &mut self.cpu);
        self.bus.take().map_or(finished, Finished::KernelsChip)
    }
}

/// Shows the software CPUs, if there are any, the slots that lie over RAM. When it returns none of them
/// uses an earlier one any more: a vCPU in the middle of an instruction is waited for, one in a bus call
/// looks again afterwards.
pub(super) fn show_slots(vm: &Shared, slots: &Slots) {
    if let Some(machine) = lock(&vm.machine).as_ref() {
        machine.shared.set_overlays(slots.extra().map(region));
    }
}

fn finish_instruction(state: &mut VcpuState, cpu: &mut Cpu) -> Finished {
    let shared = cpu.shared.clone();
    shared.enter_guest(cpu.index);
    cpu.take_mail();
    load(cpu, state);
    let finished = step(cpu);
    if finished == Finished::Done {
        follow(cpu);
    }
    store(cpu, state);
    shared.leave_guest(cpu.index);
    finished
}

/// Executes one instruction, with its exception or trap if it has one.
fn step(cpu: &mut Cpu) -> Finished {
    let stepping = cpu.rflags() & flags::TF != 0;
    let mut ended = match fetch_and_execute(cpu) {
        Ok(_) => true,
        Err(Fault::UD) if beyond(cpu) => return Finished::Beyond,
        Err(fault) => cpu.raise(fault).is_ok(),
    };
    if stepping {
        cpu.pending_debug |= DR6_BS;
    }
    if ended && cpu.pending_debug != 0 {
        ended = cpu.debug_trap().is_ok();
    }
    if ended && cpu.activity != soft::Activity::Shutdown {
        Finished::Done
    } else {
        Finished::Shutdown
    }
}

/// Whether the instruction at RIP has a VEX or EVEX prefix and the guest has switched AVX on. Not for
/// programs: they get the #UD that KVM would give them, so that none of them ends the machine.
fn beyond(cpu: &mut Cpu) -> bool {
    let avx = cpu.cr4 & CR4_OSXSAVE != 0 && cpu.xcr0 & 6 == 6;
    let program = cpu.segs[soft::seg::SS].attr >> 5 & 3 == 3;
    avx && !program
        && fetch_and_decode(cpu).is_ok_and(|insn| {
            let code = insn.op_code();
            code.mnemonic() != Mnemonic::INVALID && code.encoding() != EncodingKind::Legacy
        })
}

/// Executes the vector instructions that follow. What is not a plain success is left to KVM: a fault has
/// changed nothing, and the software CPU may know less than the CPU under KVM.
fn follow(cpu: &mut Cpu) {
    for _ in 1..BATCH {
        let quiet = cpu.rflags() & flags::TF == 0
            && cpu.pending_debug == 0
            && cpu.activity == soft::Activity::Running;
        let cr2 = cpu.cr2;
        cpu.inhibit.shadow = false;
        let done = quiet
            && fetch_and_decode(cpu).is_ok_and(|insn| is_vector(&insn))
            && fetch_and_execute(cpu).is_ok();
        if !done {
            cpu.cr2 = cr2;
            return;
        }
    }
}

/// Whether it names an XMM or MMX register.
fn is_vector(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        let register = insn.op_register(i);
        insn.op_kind(i) == OpKind::Register && (register.is_xmm() || register.is_mm())
    })
}

fn region((slot, table): (&MemorySlot, &Arc<PageTable>)) -> PhysRegion {
    PhysRegion {
        gpa: slot.gpa,
        end: slot.gpa + slot.bytes,
        host: slot.host,
        readonly: slot.readonly,
        table: table.clone(),
        table_page: 0,
    }
}

fn load(cpu: &mut Cpu, state: &VcpuState) {
    cpu.regs[..16].copy_from_slice(&state.gprs);
    cpu.rip = state.rip;
    cpu.next_rip = state.rip;
    cpu.set_rflags(state.rflags);
    for (to, from) in cpu.segs.iter_mut().zip(&state.segments) {
        *to = segment_to(from);
    }
    cpu.ldtr = segment_to(&state.ldtr);
    cpu.tr = segment_to(&state.tr);
    cpu.gdtr = table_to(&state.gdtr);
    cpu.idtr = table_to(&state.idtr);
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    (cpu.efer, cpu.xcr0, cpu.dr) = (state.efer, state.xcr0, state.debug);
    cpu.pending_debug = 0;
    cpu.activity = soft::Activity::Running;
    cpu.inhibit = soft::Inhibit { shadow: false, nmi: state.events.nmi_masked };
    fx_to(&mut cpu.fx, &state.xsave);
    for (index, value) in &state.msrs {
        if MSRS.contains(index) {
            // One that the software CPU does not take keeps what it had; nothing here reads it.
            let _ = cpu.restore_msr(*index, *value);
        }
    }
    cpu.update_mode();
    cpu.flush_tlb_all();
    let pae = cpu.cr0 & soft::cr::CR0_PG != 0 && cpu.cr4 & soft::cr::CR4_PAE != 0;
    if pae && !cpu.mode.long {
        // The guest loaded CR3 with them, so they are valid, or it changed them since.
        let _ = cpu.load_pdptes(state.cr3);
    }
}

fn store(cpu: &mut Cpu, state: &mut VcpuState) {
    state.gprs.copy_from_slice(&cpu.regs[..16]);
    state.rip = cpu.rip;
    state.rflags = cpu.rflags();
    for (to, from) in state.segments.iter_mut().zip(&cpu.segs) {
        *to = segment_from(from);
    }
    state.ldtr = segment_from(&cpu.ldtr);
    state.tr = segment_from(&cpu.tr);
    state.gdtr = TableRegister { base: cpu.gdtr.base, limit: cpu.gdtr.limit };
    state.idtr = TableRegister { base: cpu.idtr.base, limit: cpu.idtr.limit };
    (state.cr0, state.cr2, state.cr3, state.cr4) = (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4);
    (state.efer, state.xcr0, state.debug) = (cpu.efer, cpu.xcr0, cpu.dr);
    state.events.nmi_masked = cpu.inhibit.nmi;
    state.events.interrupt_shadow = cpu.inhibit.shadow;
    if cpu.activity == soft::Activity::Halted {
        state.activity = Activity::Halted;
    }
    fx_from(&cpu.fx, &mut state.xsave);
    for (index, value) in &mut state.msrs {
        if *index != IA32_TSC
            && let Ok(now) = cpu.read_msr(*index)
        {
            *value = now;
        }
    }
}

fn segment_to(from: &Segment) -> soft::Segment {
    soft::Segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        attr: from.attributes,
    }
}

fn segment_from(from: &soft::Segment) -> Segment {
    Segment { selector: from.selector, base: from.base, limit: from.limit, attributes: from.attr }
}

fn table_to(from: &TableRegister) -> soft::TableRegister {
    soft::TableRegister { base: from.base, limit: from.limit }
}

/// `N` bytes at `at`, zero beyond the end.
fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    from.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

/// The legacy region of the XSAVE area (SDM volume 1, table 10-2).
fn fx_to(fx: &mut FxState, from: &[u8]) {
    fx.fcw = u16::from_le_bytes(bytes(from, 0));
    fx.fsw = u16::from_le_bytes(bytes(from, 2));
    fx.ftw = from.get(4).copied().unwrap_or(0);
    fx.fop = u16::from_le_bytes(bytes(from, 6));
    fx.fip = u64::from_le_bytes(bytes(from, 8));
    fx.fdp = u64::from_le_bytes(bytes(from, 16));
    fx.mxcsr = u32::from_le_bytes(bytes(from, 24));
    for (i, st) in fx.st.iter_mut().enumerate() {
        *st = bytes(from, 32 + i * 16);
    }
    for (i, xmm) in fx.xmm.iter_mut().enumerate() {
        let half = |at| u64::from_le_bytes(bytes(from, 160 + i * 16 + at));
        *xmm = [half(0), half(8)];
    }
}

/// Writes back what differs, so that an area that was not touched stays as it is.
fn fx_from(fx: &FxState, to: &mut [u8]) {
    let mut before = *fx;
    fx_to(&mut before, to);
    if same(&before, fx) || to.len() <= XSTATE_BV {
        return;
    }
    to[0..2].copy_from_slice(&fx.fcw.to_le_bytes());
    to[2..4].copy_from_slice(&fx.fsw.to_le_bytes());
    to[4] = fx.ftw;
    to[6..8].copy_from_slice(&fx.fop.to_le_bytes());
    to[8..16].copy_from_slice(&fx.fip.to_le_bytes());
    to[16..24].copy_from_slice(&fx.fdp.to_le_bytes());
    to[24..28].copy_from_slice(&fx.mxcsr.to_le_bytes());
    for (to, st) in to[32..160].chunks_mut(16).zip(&fx.st) {
        to.copy_from_slice(st);
    }
    let halves = fx.xmm.iter().flatten();
    for (to, half) in to[160..416].chunks_mut(8).zip(halves) {
        to.copy_from_slice(&half.to_le_bytes());
    }
    to[XSTATE_BV] |= X87_AND_SSE;
}

fn same(a: &FxState, b: &FxState) -> bool {
    (a.fcw, a.fsw, a.ftw, a.fop, a.fip, a.fdp, a.mxcsr)
        == (b.fcw, b.fsw, b.ftw, b.fop, b.fip, b.fdp, b.mxcsr)
        && (a.st, a.xmm) == (b.st, b.xmm)
}
