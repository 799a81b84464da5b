//! x86-64 in software.
//!
//! ```text
//!            +--------------------- Vcpu::run -----------------------+
//!            |  events (interrupts, NMI, INIT, kicks), then:         |
//!            |     decoded blocks  --(anything unusual)-->  exec     |
//!            +-------|---------------------------------------|-------+
//!                    v                                       v
//!          state: Cpu (registers, lazy flags, TLB)   mem: linear memory   walk: paging
//!                    |                                       |
//!                    +--------- shared: what the VM's vCPUs share -------+
//!                               chip: LAPIC, IOAPIC, PIC, PIT
//! ```

pub mod chip;
pub mod clock;
pub mod cpuid;
mod engine;
pub mod events;
pub mod exec;
pub mod fault;
pub mod flags;
pub mod host;
pub mod mem;
pub mod msr;
pub mod shared;
pub mod state;
pub mod tlb;
pub mod vcpu;
pub mod walk;

pub use exec::execute;
pub use fault::{Exec, Fault};
pub use shared::Shared;
pub use state::Cpu;
pub use vcpu::{Exit, Tier, Vcpu};

/// At most so many instructions are executed between two looks at a vCPU's attention word.
pub const FUEL: i64 = 4000;
