//! The trait.

use std::sync::Arc;

use lodge_memory::{Bus, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Result;
use crate::state::{ChipState, VcpuState};

/// What a VM is made from.
pub struct VmSetup {
    /// The guest's RAM, already laid out.
    pub memory: Arc<GuestMemory>,
    /// What is not RAM. Called from the vCPUs' threads.
    pub bus: Arc<dyn Bus>,
    /// How many vCPUs there will be (1..=255); their APIC ids are 0, 1, 2, ...
    pub vcpus: u32,
}

/// Where a vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuSetup {
    /// As after a hardware reset: the boot processor at F000:FFF0, the others waiting for SIPI.
    Reset,
}

/// A message-signalled interrupt (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// The address written, 0xFEExxxxx; bits 63:32 hold the high destination bits.
    pub address: u64,
    /// The data written.
    pub data: u32,
}

/// What an irqfd raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// A global system interrupt (IOAPIC pin), as an edge.
    Gsi(u32),
    /// A message.
    Msi(Msi),
}

/// A guest write that becomes a signal on an eventfd without leaving the accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoEvent {
    /// Any write to this port.
    Pio(u16),
    /// Any write of any size to this guest-physical address.
    Mmio(u64),
}

/// Memory that the guest's CPUs see beside RAM, or over it: ROM, flash, a device's frame buffer.
#[derive(Debug, Clone, Copy)]
pub struct MemorySlot {
    /// First guest-physical address, a multiple of 4096.
    pub gpa: u64,
    /// Bytes, a multiple of 4096.
    pub bytes: u64,
    /// Where it lies in this process; stays mapped for as long as the slot exists.
    pub host: *mut u8,
    /// Guest stores go to the bus instead.
    pub readonly: bool,
}

// SAFETY: the pointer is only an address here; whoever sets a slot promises that it stays mapped.
unsafe impl Send for MemorySlot {}
// SAFETY: as above.
unsafe impl Sync for MemorySlot {}

/// What a backend can do. A thing it cannot do is a value here, never a panic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// `kvm` or `soft`.
    pub name: &'static str,
    /// Guest writes can signal an eventfd without an exit ([`Vm::add_ioeventfd`]). When false the
    /// caller signals from its own [`Bus`] handler.
    pub ioeventfd: bool,
    /// The most vCPUs a VM can have.
    pub max_vcpus: u32,
    /// Width of guest-physical addresses, as the guest's CPUID tells it.
    pub physical_bits: u8,
}

/// A virtual machine's CPUs, interrupt controllers and view of memory.
///
/// Everything takes `&self` and may be called from any thread.
pub trait Vm: Send + Sync {
    /// What this backend can do.
    fn capabilities(&self) -> Capabilities;

    /// Makes vCPU `index` (0 is the boot processor). Each index once.
    fn create_vcpu(&self, index: u32, setup: VcpuSetup) -> Result<Box<dyn Vcpu>>;

    /// Sets the level of IRQ line `gsi` (0..24). Lines 0..16 also reach the PIC pair.
    fn set_irq(&self, gsi: u32, level: bool) -> Result<()>;

    /// Delivers a message-signalled interrupt.
    fn signal_msi(&self, msi: Msi) -> Result<()>;

    /// Raises `trigger` whenever `fd` is signalled, until [`Vm::remove_irqfd`].
    fn add_irqfd(&self, fd: &EventFd, trigger: Trigger) -> Result<()>;

    /// Undoes [`Vm::add_irqfd`].
    fn remove_irqfd(&self, fd: &EventFd, trigger: Trigger) -> Result<()>;

    /// Signals `fd` on guest writes to `at`, instead of calling the bus.
    /// An error where [`Capabilities::ioeventfd`] is false.
    fn add_ioeventfd(&self, fd: &EventFd, at: IoEvent) -> Result<()>;

    /// Undoes [`Vm::add_ioeventfd`].
    fn remove_ioeventfd(&self, fd: &EventFd, at: IoEvent) -> Result<()>;

    /// Sets or clears an extra memory slot (0..16). It hides RAM below it.
    ///
    /// # Safety
    /// The slot's host memory stays mapped, readable (and writable unless `readonly`), until the
    /// slot is cleared or the VM is gone.
    unsafe fn set_memory(&self, slot: u32, memory: Option<MemorySlot>) -> Result<()>;

    /// Pages of extra slot `slot` that vCPUs wrote since the last call (or since the slot was set), and forgets them:
    /// bit `i % 64` of word `i / 64` is page `i` of the slot. Nothing for a slot that is not set. What a vCPU writes
    /// meanwhile is in this answer or in the next.
    fn take_slot_dirty(&self, slot: u32) -> Result<Vec<u64>>;

    /// Starts or stops recording which pages vCPUs write.
    fn set_dirty_log(&self, on: bool) -> Result<()>;

    /// Pages of RAM written by vCPUs or devices since the last call, and forgets them: for each region of
    /// guest memory in order, bit `i % 64` of word `i / 64` is page `i`.
    fn take_dirty(&self) -> Result<Vec<Vec<u64>>>;

    /// The interrupt controllers' state (PIC, IOAPIC, PIT). vCPUs must not be running.
    fn chip_state(&self) -> Result<ChipState>;

    /// Restores what [`Vm::chip_state`] gave. vCPUs must not be running.
    fn set_chip_state(&self, state: &ChipState) -> Result<()>;
}

/// Makes [`Vcpu::run`] return soon, from any thread.
pub trait Kick: Send + Sync {
    /// The vCPU's current or next `run` returns [`Exit::Kicked`] (once).
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Somebody kicked. No port or MMIO access is left half done.
    Kicked,
    /// Triple fault or shutdown: a PC resets.
    Shutdown,
}

/// One virtual CPU. It lives in the thread that runs it.
pub trait Vcpu: Send {
    /// Runs guest code until something outside must act. A halted vCPU waits in here.
    /// The first call binds the vCPU to its thread.
    fn run(&mut self) -> Result<Exit>;

    /// A handle that makes [`Vcpu::run`] return.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Everything that makes this vCPU what it is, between two runs.
    fn state(&mut self) -> Result<VcpuState>;

    /// Puts the vCPU into `state`.
    fn set_state(&mut self, state: &VcpuState) -> Result<()>;
}
