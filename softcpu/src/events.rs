//! Delivery of exceptions and interrupts (SDM volume 3, chapter 6).
//!
//! ```text
//!   raise, interrupt, nmi, debug_trap           INT n, INT3, INTO, INT1 (in exec)
//!         |                                          |
//!         +----------------> deliver <---------------+
//!                               |
//!       real: IVT     legacy: IDT, TSS stacks, task gates     long: IDT, IST
//! ```
//!
//! Delivery either happens in full or changes nothing and is a fault itself: of an exception, then `combine` says
//! what comes of the two (the second, #DF, or shutdown); of an instruction, the instruction's fault.

mod long;
mod protected;
mod real;

use crate::fault::{Exec, Fault, vector};
use crate::flags;
use crate::state::{Activity, Cpu, Segment, reg};

/// A triple fault: the vCPU has stopped, and only a reset or INIT helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's processor shut down: an exception could not be delivered, nor could #DF (triple fault)"
)]
pub struct Shutdown;

/// DR6.B0 to B3: the breakpoints hit.
pub const DR6_HITS: u64 = 15;
/// DR6.BS: a single step.
pub const DR6_BS: u64 = 1 << 14;
/// DR6.BD: an access to debug registers under DR7.GD.
pub const DR6_BD: u64 = 1 << 13;
/// DR6.BT: a task switch to a TSS with its T bit set.
pub const DR6_BT: u64 = 1 << 15;
const DR7_GD: u64 = 1 << 13;

/// What is delivered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub vector: u8,
    /// Pushed last, where there is one (never in real mode).
    pub error: Option<u32>,
    /// INT n, INT3 or INTO: the gate's DPL counts, and faults on the way do not have EXT set.
    pub software: bool,
    /// Where the handler returns to.
    pub return_rip: u64,
    /// RFLAGS as it is pushed.
    pub flags: u64,
}

/// What a control transfer replaces before it can still fault.
pub(crate) struct Checkpoint {
    segs: [Segment; 6],
    rsp: u64,
    sys_flags: u64,
}

impl Cpu {
    /// Notes what [`Cpu::roll_back`] restores.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { segs: self.segs, rsp: self.regs[reg::RSP], sys_flags: self.sys_flags }
    }

    pub(crate) fn roll_back(&mut self, to: &Checkpoint) {
        self.segs = to.segs;
        self.regs[reg::RSP] = to.rsp;
        self.sys_flags = to.sys_flags;
        self.update_mode();
    }

    /// Delivers an exception that the instruction at `cpu.rip` raised; goes on with #DF where that fails.
    ///
    /// # Errors
    /// A triple fault. [`Cpu::activity`] says so too.
    pub fn raise(&mut self, fault: Fault) -> Result<(), Shutdown> {
        let mut fault = fault;
        // Each turn escalates, so this ends after a few.
        loop {
            match self.exception(fault) {
                Ok(()) => return Ok(()),
                Err(second) => match combine(fault, second) {
                    Some(next) => fault = next,
                    None => {
                        self.activity = Activity::Shutdown;
                        self.leave = true;
                        return Err(Shutdown);
                    }
                },
            }
        }
    }

    fn exception(&mut self, fault: Fault) -> Exec {
        // A fault's handler returns to the instruction, which must then get past its own breakpoint. #DB decides
        // itself, #DF does not return.
        let resume = match fault.vector {
            vector::DB | vector::DF => 0,
            _ => flags::RF,
        };
        self.arrive(Event {
            vector: fault.vector,
            error: fault.error,
            software: false,
            return_rip: self.rip,
            flags: self.rflags() | resume,
        })?;
        if fault.vector == vector::DB {
            self.dr[7] &= !DR7_GD;
        }
        Ok(())
    }

    /// Delivers an event that is not an instruction's.
    fn arrive(&mut self, event: Event) -> Exec {
        self.deliver(event)?;
        self.rip = self.next_rip;
        self.activity = Activity::Running;
        self.inhibit.shadow = false;
        Ok(())
    }

    /// Delivers external interrupt `vector` between two instructions, at `cpu.rip`. The caller has checked RFLAGS.IF
    /// and the interrupt shadow.
    ///
    /// # Errors
    /// A triple fault.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Shutdown> {
        let event = Event {
            vector,
            error: None,
            software: false,
            return_rip: self.rip,
            flags: self.rflags(),
        };
        self.arrive(event).or_else(|fault| self.raise(fault))
    }

    /// Delivers an NMI between two instructions. The next one is held back until an IRET.
    ///
    /// # Errors
    /// A triple fault.
    pub fn nmi(&mut self) -> Result<(), Shutdown> {
        self.inhibit.nmi = true;
        self.interrupt(vector::NMI)
    }

    /// Raises #DB for the traps noted in [`Cpu::pending_debug`] (data breakpoints, single steps, task switches), after
    /// the instruction that had them and at `cpu.rip`, where the next one is.
    ///
    /// # Errors
    /// A triple fault.
    pub fn debug_trap(&mut self) -> Result<(), Shutdown> {
        self.dr[6] |= std::mem::take(&mut self.pending_debug);
        self.raise(Fault::new(vector::DB))
    }

    /// INT3, INTO (`vector` 3, 4) and INT n: delivers to a handler that returns behind the instruction.
    pub(crate) fn software_interrupt(&mut self, vector: u8) -> Exec {
        self.deliver(Event {
            vector,
            error: None,
            software: true,
            return_rip: self.next_rip,
            flags: self.rflags() & !flags::RF,
        })
    }

    /// INT1: as an exception, but it returns behind the instruction.
    pub(crate) fn int1(&mut self) -> Exec {
        self.deliver(Event {
            vector: vector::DB,
            error: None,
            software: false,
            return_rip: self.next_rip,
            flags: self.rflags() & !flags::RF,
        })?;
        self.dr[7] &= !DR7_GD;
        Ok(())
    }

    /// Goes to the handler of `event`: sets CS, `next_rip`, the stack and RFLAGS.
    fn deliver(&mut self, event: Event) -> Exec {
        let delivered = match (self.mode.protected, self.mode.long) {
            (false, _) => self.deliver_real(&event),
            (true, true) => self.deliver_long(&event),
            (true, false) => self.deliver_protected(&event),
        };
        self.leave = true;
        delivered.map_err(|fault| if event.software { fault } else { external(fault) })
    }
}

/// The error code that names an entry of the IDT.
fn idt_error(vector: u8) -> u32 {
    u32::from(vector) << 3 | 2
}

/// Sets EXT in the error codes that have it: those that name a selector or a vector.
fn external(fault: Fault) -> Fault {
    match fault.vector {
        vector::TS | vector::NP | vector::SS | vector::GP => {
            Fault { error: fault.error.map(|error| error | 1), ..fault }
        }
        _ => fault,
    }
}

/// What comes of an exception `second` while `first` is being delivered (SDM volume 3, table 6-5); none is a
/// triple fault.
fn combine(first: Fault, second: Fault) -> Option<Fault> {
    let contributory = |f: Fault| {
        matches!(f.vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
    };
    let page = |f: Fault| f.vector == vector::PF;
    if first.vector == vector::DF {
        return None;
    }
    if contributory(first) && contributory(second)
        || page(first) && (page(second) || contributory(second))
    {
        return Some(Fault::with_error(vector::DF, 0));
    }
    Some(second)
}
