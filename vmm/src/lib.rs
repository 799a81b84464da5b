//! A running machine: puts it together, runs it, ends it. `lodge-vmm` is this and a spec.
//!
//! ```text
//!   spec --> Resources (disks, networks of the host)
//!        --> guest memory --> accelerator --> Board (buses, PCI, the PC's parts) --> peripherals
//!        --> boot (kernel, tables) or firmware --> vCPU threads --> control (until it is over)
//! ```

mod board;
pub mod boot;
pub mod control;
pub mod control_socket;
pub mod display;
mod error;
pub mod firmware;
mod machine;
mod peripherals;
pub mod terminal;
pub mod vcpu;
pub mod viewers;
pub mod vnc;

pub use error::{Error, chain};
pub use machine::Machine;
