//! A running machine: puts it together, runs it, ends it. `lodge-vmm` is this and a spec.
//!
//! ```text
//!   spec --> Resources (disks, networks of the host)
//!        --> guest memory --> accelerator --> Board (buses, PCI, the PC's parts) --> peripherals
//!        --> boot (kernel, tables) --> vCPU threads --> control (until it is over)
//! ```

mod board;
pub mod boot;
pub mod control;
pub mod display;
mod error;
mod machine;
mod peripherals;
pub mod terminal;
pub mod vcpu;
pub mod vnc;

pub use error::{Error, chain};
pub use machine::Machine;
