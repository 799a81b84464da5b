//! Far jumps, calls and returns.
use iced_x86::Instruction;

use crate::fault::{Exec, Fault};
use crate::state::Cpu;

pub fn jmp(_cpu: &mut Cpu, _insn: &Instruction) -> Exec {
    Err(Fault::UD)
}
pub fn call(_cpu: &mut Cpu, _insn: &Instruction) -> Exec {
    Err(Fault::UD)
}
