//! A vCPU's life: events, then guest code, and again.
//!
//! ```text
//!            +--------------------------------------------------------+
//!            v                                                        |
//!   attention? --kick--> return Kicked                                |
//!      | mail, INIT, SIPI, NMI, interrupts, timers                    |
//!      v                                                              |
//!   halted? --yes--> sleep until attention or the next timer ---------+
//!      | no                                                           |
//!      v                                                              |
//!   single-step, watchpoints, interrupt shadow? --yes--> one instruction
//!      | no                                                           |
//!      v                                                              |
//!   blocks, until the fuel is gone or an instruction wants out -------+
//! ```
//!
//! Order of events after an instruction (SDM volume 3, table 6-2): reset and INIT, debug traps, NMI, interrupts, then
//! the next instruction's own faults.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use iced_x86::{FlowControl, Mnemonic};

use crate::FUEL;
use crate::chip::lapic;
use crate::clock;
use crate::engine::{Cache, Link, Op, Stop, jump_index, run_block};
use crate::events::{DR6_BS, DR6_HITS, Shutdown};
use crate::exec::step::fetch_and_execute;
use crate::fault::Fault;
use crate::flags;
use crate::shared::{Port, Shared, attention};
use crate::state::{Activity, Cpu};

/// Why [`Vcpu::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Somebody set [`attention::KICK`].
    Kicked,
    /// Triple fault.
    Shutdown,
}

/// How a vCPU executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tier {
    /// Decoded blocks, the reference interpreter for what they leave out.
    #[default]
    Blocks,
    /// The reference interpreter alone, an instruction at a time.
    Reference,
}

/// One vCPU with all it needs to run.
pub struct Vcpu {
    cpu: Box<Cpu>,
    shared: Arc<Shared>,
    cache: Cache,
    tier: Tier,
    /// The local APIC or the PIC may hold an interrupt for this vCPU.
    interrupt_due: bool,
    nmi_due: bool,
}

impl Vcpu {
    /// vCPU `index` of `shared`'s VM, after reset.
    pub fn new(shared: Arc<Shared>, index: u32) -> Self {
        Self {
            cpu: Cpu::new(shared.clone(), index),
            shared,
            cache: Cache::default(),
            tier: Tier::default(),
            interrupt_due: true,
            nmi_due: false,
        }
    }

    /// Chooses how to execute.
    pub fn set_tier(&mut self, tier: Tier) {
        self.tier = tier;
    }

    /// The state, between two runs.
    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// An NMI waits to be delivered.
    pub fn nmi_pending(&self) -> bool {
        self.nmi_due || self.port().attention.load(Ordering::SeqCst) & attention::NMI != 0
    }

    /// Sets or clears the waiting NMI.
    pub fn set_nmi_pending(&mut self, pending: bool) {
        self.port().attention.fetch_and(!attention::NMI, Ordering::SeqCst);
        self.nmi_due = pending;
    }

    /// Instructions executed since the beginning.
    pub fn retired(&self) -> u64 {
        self.cpu.retired
    }

    /// Blocks decoded since the beginning.
    pub fn decoded(&self) -> u64 {
        self.cache.decoded
    }

    fn port(&self) -> &Port {
        &self.shared.ports()[self.cpu.index as usize]
    }

    /// Runs guest code until something outside must act. A halted vCPU sleeps in here.
    pub fn run(&mut self) -> Exit {
        // The state may have been set from outside, and interrupts with it.
        self.interrupt_due = true;
        self.cpu.update_mode();
        self.enter();
        let exit = loop {
            if let Some(exit) = self.attend() {
                break exit;
            }
            if self.cpu.activity != Activity::Running {
                if self.cpu.activity == Activity::Shutdown {
                    break Exit::Shutdown;
                }
                self.sleep();
                continue;
            }
            if self.execute().is_err() {
                self.cpu.activity = Activity::Shutdown;
            }
        };
        self.shared.leave_guest(self.cpu.index);
        exit
    }

    fn enter(&mut self) {
        self.shared.enter_guest(self.cpu.index);
        self.cpu.take_mail();
    }

    /// Takes what came from outside.
    fn attend(&mut self) -> Option<Exit> {
        self.poll_timers();
        let bits = self.port().attention.load(Ordering::SeqCst);
        if bits == 0 {
            return None;
        }
        // Mail is cleared where it is taken; a kick only where it is obeyed.
        let taken = bits & !(attention::MAIL | attention::KICK);
        self.port().attention.fetch_and(!taken, Ordering::SeqCst);
        if bits & (attention::MAIL | attention::EXCLUSIVE) != 0 {
            self.shared.leave_guest(self.cpu.index);
            self.enter();
        }
        self.interrupt_due |= bits & attention::INTERRUPT != 0;
        self.nmi_due |= bits & attention::NMI != 0;
        if bits & attention::INIT != 0 {
            self.cpu.init();
            self.port().lapic.init();
            self.nmi_due = false;
        }
        if bits & attention::SIPI != 0 && self.cpu.activity == Activity::WaitForSipi {
            let vector = self.port().sipi_vector.load(Ordering::SeqCst);
            self.cpu.start_up(vector);
        }
        if bits & attention::KICK != 0 {
            self.port().attention.fetch_and(!attention::KICK, Ordering::SeqCst);
            return Some(Exit::Kicked);
        }
        None
    }

    fn poll_timers(&mut self) {
        let now = clock::host_tsc();
        let port = self.port();
        if port.lapic.deadline() <= now {
            port.lapic.poll_timer(&self.shared, now);
        }
        if self.cpu.index == 0 && self.shared.chip.deadline() <= now {
            self.shared.poll_pit(now);
        }
    }

    /// Sleeps in HLT or while waiting for a start-up IPI; wakes when an event may be due.
    fn sleep(&mut self) {
        if self.cpu.activity == Activity::Halted && self.event_due() {
            self.cpu.activity = Activity::Running;
            return;
        }
        let mut deadline = self.port().lapic.deadline();
        if self.cpu.index == 0 {
            deadline = deadline.min(self.shared.chip.deadline());
        }
        let until = (deadline != lapic::NEVER).then(|| clock::instant_of(deadline));
        self.shared.leave_guest(self.cpu.index);
        if until.is_none_or(|until| until > Instant::now()) {
            self.port().sleep(until);
        }
        self.enter();
    }

    /// Whether an event ends HLT.
    fn event_due(&mut self) -> bool {
        let interrupts = self.cpu.sys_flags & flags::IF != 0;
        self.nmi_due && !self.cpu.inhibit.nmi || interrupts && self.interrupt_waits()
    }

    /// Whether the local APIC or the PIC has an interrupt that its priority lets through.
    fn interrupt_waits(&mut self) -> bool {
        let port = &self.shared.ports()[self.cpu.index as usize];
        self.interrupt_due && (port.lapic.pending().is_some() || self.shared.extint(self.cpu.index))
    }

    /// Delivers events, then executes until the fuel is gone or something wants attention.
    fn execute(&mut self) -> Result<(), Shutdown> {
        self.cpu.leave = false;
        if self.deliver_events()? {
            return Ok(());
        }
        if self.tier == Tier::Reference || self.must_step() {
            return self.step();
        }
        self.run_blocks()
    }

    /// Delivers at most one event; true if it did.
    fn deliver_events(&mut self) -> Result<bool, Shutdown> {
        if self.cpu.inhibit.shadow {
            return Ok(false);
        }
        if self.cpu.pending_debug != 0 {
            self.cpu.debug_trap()?;
            return Ok(true);
        }
        if self.nmi_due && !self.cpu.inhibit.nmi {
            self.nmi_due = false;
            self.cpu.nmi()?;
            return Ok(true);
        }
        if !self.interrupt_due || self.cpu.sys_flags & flags::IF == 0 {
            return Ok(false);
        }
        if let Some(vector) = self.take_interrupt() {
            self.cpu.interrupt(vector)?;
            return Ok(true);
        }
        self.interrupt_due = false;
        Ok(false)
    }

    fn take_interrupt(&mut self) -> Option<u8> {
        let index = self.cpu.index;
        if self.shared.extint(index) {
            return Some(self.shared.chip.acknowledge_pic());
        }
        let lapic = &self.shared.ports()[index as usize].lapic;
        let vector = lapic.pending()?;
        lapic.acknowledge(vector);
        Some(vector)
    }

    /// Whether the next instruction must be executed by itself.
    fn must_step(&self) -> bool {
        let cpu = &self.cpu;
        cpu.inhibit.shadow
            || cpu.sys_flags & (flags::TF | flags::RF) != 0
            || cpu.dr[7] & 0xff != 0
            || cpu.mode.v86
    }

    /// One instruction by the reference interpreter, and the traps that come after it.
    fn step(&mut self) -> Result<(), Shutdown> {
        self.drop_stale();
        let cpu = &mut *self.cpu;
        let (stepping, resumed) = (cpu.sys_flags & flags::TF != 0, cpu.sys_flags & flags::RF != 0);
        let interrupts = cpu.sys_flags & flags::IF;
        let held_back = cpu.pending_debug;
        cpu.inhibit.shadow = false;
        if !resumed && cpu.code_breakpoint() {
            cpu.debug_fault()?;
            return Ok(());
        }
        cpu.retired += 1;
        match fetch_and_execute(cpu) {
            Ok(insn) => {
                // MOV SS holds the trap for one instruction (SDM volume 3, 6.8.3); STI, which changes IF, does not.
                // A software interrupt clears TF for its handler, so no trap follows it. SYSCALL and SYSRET note
                // theirs, by the flags that they leave.
                let held = cpu.inhibit.shadow && cpu.sys_flags & flags::IF == interrupts
                    || insn.flow_control() == FlowControl::Interrupt
                    || matches!(
                        insn.mnemonic(),
                        Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysretq
                    );
                if stepping && !held {
                    cpu.pending_debug |= DR6_BS;
                    cpu.inhibit.shadow = false;
                }
                Ok(())
            }
            Err(fault) => {
                // What faults has hit no data breakpoint, however far it got.
                cpu.pending_debug &= !DR6_HITS | held_back;
                cpu.raise(fault)
            }
        }
    }

    /// Blocks, until the fuel is gone or something wants attention.
    fn run_blocks(&mut self) -> Result<(), Shutdown> {
        self.cpu.fuel = FUEL;
        let result = self.blocks();
        self.cpu.retired = self.cpu.retired.wrapping_add((FUEL - self.cpu.fuel) as u64);
        result
    }

    fn blocks(&mut self) -> Result<(), Shutdown> {
        let mut link = None;
        loop {
            self.drop_stale();
            if self.cache.make_room(&mut self.cpu) {
                link = None;
            }
            let entry = match self.known(&link) {
                Some(entry) => entry,
                None => match self.find(link.take())? {
                    Found::Block(entry) => entry,
                    Found::Nothing => {
                        self.one()?;
                        if self.wants_out() {
                            return Ok(());
                        }
                        continue;
                    }
                    Found::Trouble => return Ok(()),
                },
            };
            // SAFETY: a block of this vCPU's cache, looked up under its present mode and mappings.
            unsafe { run_block(&mut self.cpu, entry) };
            match self.cpu.stop {
                Stop::Lookup => {}
                Stop::Resolve => link = Some((self.cpu.link, self.cpu.link_way)),
                Stop::Bail => self.one()?,
                Stop::Fault => {
                    let fault = self.cpu.fault;
                    return self.cpu.raise(fault);
                }
            }
            if self.wants_out() {
                return Ok(());
            }
        }
    }

    /// The block at RIP if the jump cache has it and no link waits to be led there.
    fn known(&self, link: &Option<PendingLink>) -> Option<*const Op> {
        let jump = &self.cpu.jumps[jump_index(self.cpu.rip)];
        let hit = jump.rip == self.cpu.rip
            && jump.key == self.cpu.jump_key
            && jump.segment == self.cpu.code_segment()
            && link.is_none();
        hit.then_some(jump.target)
    }

    /// The block at RIP from the cache, decoded if need be, with `link` and the jump cache leading there.
    fn find(&mut self, link: Option<PendingLink>) -> Result<Found, Shutdown> {
        let found = match self.cache.find(&mut self.cpu) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Found::Nothing),
            Err(fault) => {
                self.cpu.raise(fault)?;
                return Ok(Found::Trouble);
            }
        };
        // Decoding may have taken mail that drops what was found.
        if self.cpu.leave {
            return Ok(Found::Trouble);
        }
        self.cache.connect(&mut self.cpu, found, link);
        Ok(Found::Block(found.entry))
    }

    fn wants_out(&self) -> bool {
        self.cpu.leave
            || self.cpu.fuel <= 0
            || self.port().attention.load(Ordering::Relaxed) != 0
            || self.cpu.activity != Activity::Running
    }

    /// The instruction at RIP by the reference interpreter.
    fn one(&mut self) -> Result<(), Shutdown> {
        self.cpu.fuel -= 1;
        match fetch_and_execute(&mut self.cpu) {
            Ok(_) => Ok(()),
            Err(fault) => {
                // What follows is another context: events are looked at first.
                self.cpu.leave = true;
                self.cpu.raise(fault)
            }
        }
    }

    fn drop_stale(&mut self) {
        if self.cpu.stale_code.is_empty() {
            return;
        }
        self.cpu.next_epoch();
        for page in std::mem::take(&mut self.cpu.stale_code) {
            self.cache.drop_page(page);
        }
    }
}

/// A link of the block that was left, and which of its ways was to be gone.
type PendingLink = (*mut Link, usize);

/// What looking for a block came to.
enum Found {
    Block(*const Op),
    /// There is none to be had: the instruction is executed by itself.
    Nothing,
    /// A fault was raised, or something else is to be looked at first.
    Trouble,
}

impl Cpu {
    /// Starts at page `vector` in real mode (a start-up IPI).
    pub fn start_up(&mut self, vector: u8) {
        let cs = &mut self.segs[crate::state::seg::CS];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.next_rip = 0;
        self.activity = Activity::Running;
        self.update_mode();
    }

    /// Whether an instruction breakpoint is set at the current instruction; notes which in `pending_debug`.
    fn code_breakpoint(&mut self) -> bool {
        let lin = self.code_address();
        let hit = (0..4)
            .filter(|i| self.dr[7] >> (2 * i) & 3 != 0 && self.dr[7] >> (16 + 4 * i) & 3 == 0)
            .filter(|&i| self.dr[i] == lin)
            .fold(0, |bits, i| bits | 1 << i);
        self.pending_debug |= hit;
        hit != 0
    }

    /// #DB as a fault (an instruction breakpoint).
    fn debug_fault(&mut self) -> Result<(), Shutdown> {
        self.dr[6] |= std::mem::take(&mut self.pending_debug);
        self.raise(Fault::new(crate::fault::vector::DB))
    }
}

#[cfg(test)]
mod tests;
