//! The backends' common behaviour, on the software CPU: the same guests as for KVM.

#![allow(
    clippy::duplicate_mod,
    reason = "each of the files has the support code as its own module"
)]

#[path = "kvm_exits.rs"]
mod exits;
#[path = "kvm_interrupts.rs"]
mod interrupts;
#[path = "kvm_state.rs"]
mod state;
