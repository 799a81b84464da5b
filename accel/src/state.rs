//! A vCPU's and the interrupt controllers' architectural state, in a form that no backend owns.

use serde::{Deserialize, Serialize};

/// A segment register with its cached descriptor (Intel SDM volume 3, 3.4.3).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// The descriptor's bits 40..56: type (0..4), S, DPL (5..7), P, ..., AVL (12), L, D/B, G. Bits
    /// 8..12 (limit 19:16) are zero. An unusable segment has P clear.
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// What a vCPU is doing between two runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running,
    /// In HLT, waiting for an interrupt.
    Halted,
    /// After reset or INIT, waiting for a start-up IPI.
    WaitForSipi,
}

/// An event on its way into the guest, and what holds others back (what KVM calls vcpu events).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An interrupt (vector) accepted but not yet delivered.
    pub interrupt: Option<u8>,
    /// That interrupt comes from an INT instruction.
    #[serde(default)]
    pub soft_interrupt: bool,
    /// An exception (vector, error code) recognised but not yet delivered.
    pub exception: Option<(u8, Option<u32>)>,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An NMI handler runs: NMIs are held until IRET.
    pub nmi_masked: bool,
    /// The instruction after STI, MOV SS or POP SS has not been executed yet.
    pub interrupt_shadow: bool,
    /// A start-up IPI waits, with its vector.
    pub sipi_vector: Option<u8>,
}

/// A vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15 (the encoding's order).
    pub gprs: [u64; 16],
    /// Instruction pointer (an offset into CS).
    pub rip: u64,
    /// RFLAGS, bit 1 set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (the encoding's order).
    pub segments: [Segment; 6],
    /// LDT register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority (bits 7:4 of the LAPIC's TPR).
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0..DR3, (unused, unused), DR6, DR7.
    pub debug: [u64; 8],
    /// The XSAVE area in its standard (not compacted) format, at least 576 bytes (legacy region and header;
    /// SDM volume 1, 13.4).
    pub xsave: Vec<u8>,
    /// Model-specific registers beside those above: `(index, value)`, IA32_TSC among them.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC's register page: 1024 bytes, register `r` at offset `r` (SDM volume 3, table
    /// 12-1).
    pub lapic: Vec<u8>,
    /// Events.
    pub events: Events,
    /// What the vCPU is doing.
    pub activity: Activity,
}

/// One 8259A of the pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// Last levels seen on the lines, for edges.
    pub last_irr: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// The line with the highest priority is this plus one, modulo 8.
    pub priority_add: u8,
    /// Vector base (ICW2).
    pub irq_base: u8,
    /// The next read of the command port gives ISR instead of IRR.
    pub read_reg_select: bool,
    /// A poll command was given.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Position in the ICW sequence (0: none).
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotate on automatic EOI.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// ICW4 is expected.
    pub init4: bool,
    /// Edge/level control register (ELCR).
    pub elcr: u8,
    /// Lines that may be level-triggered.
    pub elcr_mask: u8,
}

/// The I/O APIC (82093AA).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// APIC id.
    pub id: u32,
    /// IOREGSEL.
    pub select: u32,
    /// Lines asserted, bit for pin.
    pub irr: u32,
    /// The 24 redirection entries.
    pub redirection: Vec<u64>,
}

/// One counter of the 8254.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannelState {
    /// Reload value, 1..=65536 (0 stands for 65536).
    pub count: u32,
    /// Latched count.
    pub latched_count: u16,
    /// Which bytes of the latch remain to be read.
    pub count_latched: u8,
    /// A latched status waits.
    pub status_latched: bool,
    /// The latched status.
    pub status: u8,
    /// Which byte the next read gives.
    pub read_state: u8,
    /// Which byte the next write sets.
    pub write_state: u8,
    /// The low byte while waiting for the high one.
    pub write_latch: u8,
    /// Access mode (1 low, 2 high, 3 both).
    pub rw_mode: u8,
    /// Mode 0..=5.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: bool,
    /// The gate input.
    pub gate: bool,
    /// When the count was loaded: host CLOCK_MONOTONIC, nanoseconds.
    pub load_time: i64,
}

/// The 8254 and the speaker's gate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// The three counters.
    pub channels: [PitChannelState; 3],
    /// Port 61H bit 1.
    pub speaker_data_on: bool,
}

/// PIC pair, IOAPIC, PIT and the VM's clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipState {
    /// Master and slave.
    pub pics: [PicState; 2],
    /// The I/O APIC.
    pub ioapic: IoapicState,
    /// The PIT.
    pub pit: PitState,
    /// The guest's kvmclock, nanoseconds since it began, where the backend has one.
    pub clock: Option<u64>,
}
