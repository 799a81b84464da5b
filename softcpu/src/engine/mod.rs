//! Decoded code: the interpreter's fast path.
//!
//! | module | subject |
//! | --- | --- |
//! | `cache` | a vCPU's blocks: found, decoded, linked, dropped |
//! | `lower`, `lower_int`, `lower_flow`, `lower_sse` | from instructions to operations (`handlers`: macros for it) |
//! | `op` | what operations and blocks are made of |
//! | `int_ops`, `atomic_ops`, `flow_ops`, `sse_ops` | what operations do |

mod atomic_ops;
mod cache;
mod flow_ops;
mod handlers;
mod int_ops;
mod lower;
mod lower_flow;
mod lower_int;
mod lower_sse;
mod op;
mod sse_ops;

pub(crate) use cache::Cache;
pub(crate) use flow_ops::{JUMPS, Jump, jump_index};
pub(crate) use op::{Link, Op, Stop};

use crate::state::Cpu;

/// Runs decoded code from `entry` until something is to be looked at (`Cpu::stop`).
///
/// # Safety
/// `entry` is the first operation of a block of this vCPU's cache that fits its mode and mappings.
pub(crate) unsafe fn run_block(cpu: &mut Cpu, entry: *const Op) {
    let mut ip = entry;
    while !ip.is_null() {
        // SAFETY: the caller's promise; handlers give operations of the same kind.
        ip = unsafe { ((*ip).f)(cpu, ip) };
    }
}
