//! Finishing an instruction that this host's KVM cannot: one step of the software CPU on the vCPU's
//! state.

use super::exits;
use super::vm::Shared;
use crate::error::{Error, Result};
use crate::state::VcpuState;

/// Executes the one instruction at `state`'s RIP. `bytes` are what KVM read there, if it says so.
pub(super) fn finish_instruction(
    state: &mut VcpuState,
    _vm: &Shared,
    index: u32,
    bytes: Option<&[u8]>,
) -> Result<()> {
    Err(Error::Guest(format!(
        "vCPU {index} {}: this host's KVM cannot execute the instruction {bytes:02x?}",
        exits::place(state)
    )))
}
