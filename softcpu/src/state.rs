//! One vCPU's state.
//!
//! `repr(C)`, in one allocation of its own that never moves: what is used with every instruction comes first
//! (the translator addresses it relative to one register), the TLB follows.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::sync::Arc;

use crate::engine::{JUMPS, Jump, Link, Stop};
use crate::fault::Fault;
use crate::flags;
use crate::shared::{PhysMap, Shared};
use crate::tlb::{self, TlbSet};

/// Indices of general-purpose registers in [`Cpu::regs`].
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R11: usize = 11;
    /// Always zero: the base or index of an operand that has none.
    pub const ZERO: usize = 16;
    /// The linear address that an address micro-operation computed.
    pub const EA: usize = 17;
}

/// Indices of segment registers in [`Cpu::segs`] (the encoding's order).
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bits of control registers and EFER.
#[allow(missing_docs)]
pub mod cr {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_VME: u64 = 1 << 0;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

/// A segment register with its cached descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Visible selector.
    pub selector: u16,
    /// Descriptor bits 40..56 (type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15).
    pub attr: u16,
}

impl Segment {
    /// Descriptor type, 4 bits.
    pub fn kind(&self) -> u16 {
        self.attr & 15
    }
    /// Code or data rather than a system segment.
    pub fn is_user(&self) -> bool {
        self.attr & 1 << 4 != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    /// P: usable.
    pub fn present(&self) -> bool {
        self.attr & 1 << 7 != 0
    }
    /// L: a 64-bit code segment.
    pub fn long(&self) -> bool {
        self.attr & 1 << 13 != 0
    }
    /// D/B: 32-bit.
    pub fn big(&self) -> bool {
        self.attr & 1 << 14 != 0
    }
    /// G: the descriptor's limit counts pages.
    pub fn granular(&self) -> bool {
        self.attr & 1 << 15 != 0
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.is_user() && self.kind() & 8 != 0
    }
    /// A data segment that grows down.
    pub fn expand_down(&self) -> bool {
        self.is_user() && self.kind() & 12 == 4
    }
    /// Loads are allowed.
    pub fn readable(&self) -> bool {
        !self.is_code() || self.kind() & 2 != 0
    }
    /// Stores are allowed.
    pub fn writable(&self) -> bool {
        !self.is_code() && self.kind() & 2 != 0
    }
    /// What loading `selector` in real or virtual-8086 mode does: the base changes, the rest of the cache stays
    /// (which is how "unreal" mode works).
    pub fn load_real(&mut self, selector: u16) {
        self.selector = selector;
        self.base = u64::from(selector) << 4;
    }
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableRegister {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// x87, MMX and SSE state as FXSAVE lays it out (SDM volume 1, table 10-2).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct FxState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged tag word: bit `i` set means physical register `i` is not empty.
    pub ftw: u8,
    /// Reserved.
    pub reserved: u8,
    /// Last x87 opcode.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Which bits of MXCSR exist.
    pub mxcsr_mask: u32,
    /// ST(0)..ST(7) (from the top of the stack), 80 bits each; MM0..MM7 are their low 64.
    pub st: [[u8; 16]; 8],
    /// XMM0..XMM15, low half first.
    pub xmm: [[u64; 2]; 16],
    /// Not used.
    pub rest: [u8; 96],
}

/// What is running: the width of code, who runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Mode {
    /// 16, 32 or 64: the default size of the code segment.
    pub bits: u8,
    /// Current privilege level (0 in real mode, 3 in virtual-8086 mode).
    pub cpl: u8,
    /// Which part of RSP the stack uses: FFFFH, FFFF_FFFFH or all.
    pub stack_mask: u64,
    /// IA32_EFER.LMA.
    pub long: bool,
    /// CR0.PE.
    pub protected: bool,
    /// RFLAGS.VM (with CR0.PE, outside of long mode).
    pub v86: bool,
}

/// Model-specific registers that are plain storage or that the core itself reads.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
#[repr(C)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_physbase: [u64; 8],
    pub mtrr_physmask: [u64; 8],
    pub mtrr_fixed: [u64; 11],
    pub tsc_adjust: u64,
    pub spec_ctrl: u64,
    pub mcg_status: u64,
    pub mc_ctl: [u64; crate::msr::MC_BANKS],
    /// System-management base and other registers that firmware only stores and reads back.
    pub smbase: u64,
}

/// What keeps the vCPU from taking events, and where it is in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Inhibit {
    /// The instruction just executed was STI, MOV SS or POP SS: nothing interrupts the next one.
    pub shadow: bool,
    /// An NMI handler runs.
    pub nmi: bool,
}

/// A vCPU is...
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activity {
    /// executing instructions.
    #[default]
    Running,
    /// in HLT.
    Halted,
    /// after reset or INIT, waiting for a start-up IPI.
    WaitForSipi,
    /// after a triple fault.
    Shutdown,
}

/// One vCPU.
#[repr(C, align(4096))]
pub struct Cpu {
    /// General-purpose registers, then [`reg::ZERO`] and [`reg::EA`].
    pub regs: [u64; 18],
    /// Offset into CS of the current instruction.
    pub rip: u64,
    /// Offset into CS of the next one: what RIP becomes when the current one completes. Branches set it.
    pub next_rip: u64,
    /// Lazy flags: see [`crate::flags`].
    pub lf_res: u64,
    /// Lazy flags.
    pub lf_aux: u64,
    /// RFLAGS without the status flags; bit 1 set.
    pub sys_flags: u64,
    /// Instructions until the engine looks up from guest code; zero or less means now.
    pub fuel: i64,
    /// The TLB set in use.
    pub tlb: *mut TlbSet,
    /// Instructions executed, but for those that `fuel` still counts.
    pub retired: u64,
    /// Changes whenever a linear address may mean another page or other code than before.
    pub epoch: u64,
    /// Epoch and mode that a jump-cache entry must have been made under.
    pub jump_key: u64,
    /// Why decoded code was left.
    pub(crate) stop: Stop,
    /// The fault, where `stop` says so.
    pub(crate) fault: Fault,
    /// The link to be resolved, where `stop` says so, and which of its ways.
    pub(crate) link: *mut Link,
    pub(crate) link_way: usize,
    /// Leave the block after the current instruction (code was changed, an event may be due).
    pub leave: bool,
    /// SSE instructions may be executed (CR0.EM, CR0.TS and CR4.OSFXSR allow it).
    pub sse_ok: bool,
    /// Derived by [`Cpu::update_mode`].
    pub mode: Mode,
    /// ES, CS, SS, DS, FS, GS.
    pub segs: [Segment; 6],
    /// LDT register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDT register.
    pub gdtr: TableRegister,
    /// IDT register.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3, PCID included.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// The four page-directory-pointer entries that a CR3 load caches in PAE mode (SDM volume 3, 4.4.1).
    pub pdpte: [u64; 4],
    /// DR0..DR3, (unused), (unused), DR6, DR7.
    pub dr: [u64; 8],
    /// Debug-status bits (DR6) of traps that are due after the current instruction.
    pub pending_debug: u64,
    /// x87, MMX, SSE.
    pub fx: FxState,
    /// MSRs.
    pub msrs: Msrs,
    /// Guest TSC = host TSC + this.
    pub tsc_offset: u64,
    /// What holds events back.
    pub inhibit: Inhibit,
    /// Nobody else is in guest code, nor is this vCPU: it is inside of [`Shared::exclusively`].
    pub(crate) alone: bool,
    /// What the vCPU does.
    pub activity: Activity,
    /// Which vCPU this is; also its initial APIC id.
    pub index: u32,
    /// Guest-physical memory as of the last look at [`Shared`].
    pub phys: Arc<PhysMap>,
    /// What the VM's vCPUs share.
    pub shared: Arc<Shared>,
    /// Guest-physical pages whose decoded code is to be dropped before the next block.
    pub stale_code: Vec<u64>,
    /// The jump cache.
    pub(crate) jumps: [Jump; JUMPS],
    /// TLB sets by class.
    pub tlbs: [TlbSet; tlb::CLASSES],
}

// SAFETY: the raw pointer `tlb` points into the same allocation, which never moves.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A vCPU of `shared`'s VM, in the state after a hardware reset ([`Cpu::reset`]).
    pub fn new(shared: Arc<Shared>, index: u32) -> Box<Self> {
        let layout = Layout::new::<Self>();
        let phys = shared.phys();
        // SAFETY: the layout is not empty. All-zero bytes are valid for every field but the Arcs and the Vec (the
        // enums' first variant is zero): those are written before a reference is made.
        let mut cpu = unsafe {
            let cpu = alloc_zeroed(layout).cast::<Self>();
            if cpu.is_null() {
                handle_alloc_error(layout);
            }
            (&raw mut (*cpu).phys).write(phys);
            (&raw mut (*cpu).shared).write(shared);
            (&raw mut (*cpu).stale_code).write(Vec::new());
            Box::from_raw(cpu)
        };
        cpu.index = index;
        cpu.reset();
        cpu
    }

    /// A vCPU of a VM of its own with 1 MiB of RAM and no devices.
    #[cfg(test)]
    pub fn for_tests() -> Box<Self> {
        let layout = lodge_memory::RamLayout::new(1 << 20).unwrap();
        let memory = lodge_memory::allocate(&layout).unwrap();
        Self::new(Shared::new(memory, Arc::new(lodge_memory::NoBus), 1), 0)
    }

    /// The state after power-up or reset (SDM volume 3, table 9-1). TSC and general MSRs begin at their
    /// power-up values too.
    pub fn reset(&mut self) {
        self.init();
        self.cr0 = cr::CR0_CD | cr::CR0_NW | cr::CR0_ET;
        self.xcr0 = 1;
        self.msrs = Msrs {
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            smbase: 0x3_0000,
            ..Msrs::default()
        };
        self.fx = FxState {
            fcw: 0x40,
            fsw: 0,
            ftw: 0xff,
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
        self.update_mode();
    }

    /// What an INIT does (SDM volume 3, table 9-1): as reset, but caching bits of CR0, x87, SSE and most MSRs stay.
    /// The boot processor goes on at F000:FFF0, the others wait for a start-up IPI.
    pub fn init(&mut self) {
        let data = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x93 };
        self.regs = [0; 18];
        // Family, model and stepping as CPUID leaf 1 tells them.
        self.regs[reg::RDX] = u64::from(crate::cpuid::signature());
        self.rip = 0xfff0;
        self.next_rip = 0xfff0;
        self.set_status_flags(0);
        self.sys_flags = flags::FIXED;
        self.segs = [data; 6];
        self.segs[seg::CS] =
            Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attr: 0x9b };
        self.ldtr = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x82 };
        self.tr = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x8b };
        self.gdtr = TableRegister { base: 0, limit: 0xffff };
        self.idtr = TableRegister { base: 0, limit: 0xffff };
        self.cr0 = self.cr0 & (cr::CR0_CD | cr::CR0_NW) | cr::CR0_ET;
        (self.cr2, self.cr3, self.cr4, self.efer) = (0, 0, 0, 0);
        self.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        self.pending_debug = 0;
        self.inhibit = Inhibit::default();
        self.activity = if self.index == 0 { Activity::Running } else { Activity::WaitForSipi };
        self.update_mode();
        self.flush_tlb_all();
    }

    /// Derives [`Cpu::mode`] and all that hangs on it. Call it after a change of CR0, CR4, EFER, CS, SS, or of VM, AC
    /// or TF in RFLAGS.
    pub fn update_mode(&mut self) {
        let protected = self.cr0 & cr::CR0_PE != 0;
        let long = self.efer & cr::EFER_LMA != 0;
        let v86 = protected && !long && self.sys_flags & flags::VM != 0;
        let cs = self.segs[seg::CS];
        let bits = match (long && cs.long(), cs.big()) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        let cpl = match (protected, v86) {
            (false, _) => 0,
            (true, true) => 3,
            // The CPL is SS.DPL whenever it is defined at all (SDM volume 3, 3.4.3).
            (true, false) => self.segs[seg::SS].dpl(),
        };
        let stack_mask = match (bits, self.segs[seg::SS].big()) {
            (64, _) => u64::MAX,
            (_, true) => 0xffff_ffff,
            (_, false) => 0xffff,
        };
        self.mode = Mode { bits, cpl, stack_mask, long, protected, v86 };
        self.sse_ok = self.cr0 & (cr::CR0_EM | cr::CR0_TS) == 0 && self.cr4 & cr::CR4_OSFXSR != 0;
        let class = self.tlb_class();
        self.tlb = &raw mut self.tlbs[class];
        self.set_jump_key();
    }

    /// What decoded code depends on, beside its bytes and its address.
    pub(crate) fn code_mode(&self) -> u64 {
        u64::from(self.mode.bits >> 4) | u64::from(self.mode.cpl == 3) << 3
    }

    /// Base and limit of the code segment, which decoded code depends on too; 0 in 64-bit mode, where they do not count.
    #[inline]
    pub(crate) fn code_segment(&self) -> u64 {
        let cs = &self.segs[seg::CS];
        if self.mode.bits == 64 { 0 } else { cs.base & 0xffff_ffff | u64::from(cs.limit) << 32 }
    }

    fn set_jump_key(&mut self) {
        self.jump_key = self.epoch << 4 | self.code_mode();
    }

    /// Linear addresses may mean other pages, or pages hold other code, from now on.
    pub(crate) fn next_epoch(&mut self) {
        self.epoch += 1;
        self.set_jump_key();
    }

    fn tlb_class(&self) -> usize {
        let watched = self.dr[7] & 0xff != 0;
        let aligned =
            self.cr0 & cr::CR0_AM != 0 && self.sys_flags & flags::AC != 0 && self.mode.cpl == 3;
        match self.mode.cpl {
            _ if watched || aligned => tlb::NEVER,
            3 => tlb::USER,
            _ if self.cr4 & cr::CR4_SMAP != 0 && self.sys_flags & flags::AC != 0 => {
                tlb::SUPERVISOR_AC
            }
            _ => tlb::SUPERVISOR,
        }
    }

    /// Forgets all translations, global ones too.
    pub fn flush_tlb_all(&mut self) {
        self.next_epoch();
        for set in &mut self.tlbs {
            set.clear();
        }
    }

    /// Forgets all translations but the global ones (a CR3 load).
    pub fn flush_tlb_non_global(&mut self) {
        self.next_epoch();
        for set in &mut self.tlbs[..tlb::NEVER] {
            set.clear_non_global();
        }
    }

    /// Forgets one linear page in every class (INVLPG).
    pub fn flush_tlb_page(&mut self, address: u64) {
        self.next_epoch();
        for set in &mut self.tlbs[..tlb::NEVER] {
            set.clear_page(address);
        }
    }

    /// The linear address of the current instruction.
    pub fn code_address(&self) -> u64 {
        match self.mode.bits {
            64 => self.rip,
            _ => self.segs[seg::CS].base.wrapping_add(self.rip) & 0xffff_ffff,
        }
    }

    /// The guest's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        crate::clock::host_tsc().wrapping_add(self.tsc_offset)
    }
}
