//! The host's KVM as an accelerator.
//!
//! ```text
//!   Kvm (/dev/kvm) --new_vm--> KvmVm ------------------- create_vcpu --> KvmVcpu
//!   host.rs                    vm.rs                                     vcpu.rs
//!                              |- slots.rs   which memory the guest sees   |- cpuid.rs, msrs.rs
//!                              |- routes.rs  interrupts from eventfds      |- state.rs   save, restore
//!                              |- chips.rs   PIC, IOAPIC, PIT, clock       |- exits.rs   why it stopped
//!                              '- gate.rs    all vCPUs out of the guest    '- finish.rs  what KVM lacks
//! ```
//!
//! Interrupt controllers, the PIT and kvmclock are the kernel's. A vCPU leaves the guest only for
//! ports and memory that devices answer, for a kick, and for its end. `docs/kvm.md` tells what is
//! set up and why, next to what other monitors set up.

mod chips;
mod cpuid;
mod exits;
mod finish;
mod gate;
mod host;
mod measure;
mod msrs;
mod routes;
mod slots;
mod state;
mod vcpu;
mod vm;

use std::io;

use crate::error::Error;

pub use gate::kick_signal;
pub use host::{HostCpu, Kvm, Probe, probe};
pub use measure::{GuestSpeed, NATIVE_INSTRUCTIONS_PER_SECOND, measure};
pub use vm::{KvmVm, Options, RESERVED_BYTES, RESERVED_GPA};

/// Names the step that the host refused.
fn refused<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { accel: "kvm", step: step.into(), source: source.into() }
}
