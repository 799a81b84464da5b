//! The reference interpreter: executes any one instruction, in every mode.
//!
//! [`execute`] is the truth about each instruction; faster paths fall back on it whenever something is out of the
//! ordinary (a fault, a device, a page crossing).

pub mod operand;

use iced_x86::Instruction;

use crate::fault::{Exec, Fault};
use crate::state::Cpu;

/// Executes `insn`, which lies at `cpu.rip`. `cpu.next_rip` is already the address after it; branches change it. On a
/// fault the guest's state is as before.
pub fn execute(_cpu: &mut Cpu, _insn: &Instruction) -> Exec {
    Err(Fault::UD)
}
