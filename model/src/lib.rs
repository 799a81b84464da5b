//! The types that all of Lodge shares: what a machine is asked to be, what state it is in, how
//! big a thing is, and how a program ends.
//!
//! ```text
//! command line ──keyvalue──┐
//! TOML file ───────────────┼──> spec::MachineSpec ──validate(HostFacts)──> JSON to lodge-vmm
//! JSON ────────────────────┘            │
//!                                       └──reference──> docs/spec.md
//! ```
//!
//! One struct gives every form that a user meets; parsing says whether the words are right,
//! [`spec::MachineSpec::validate`] whether the machine makes sense on this host.
#![forbid(unsafe_code)]

pub mod control;
pub mod exit;
pub mod host;
pub mod keyvalue;
pub mod net;
pub mod reference;
pub mod size;
pub mod spec;
pub mod state;
pub mod validate;

pub use size::MemorySize;
pub use spec::MachineSpec;
