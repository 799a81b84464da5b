//! The software CPU as an accelerator.
//!
//! ```text
//!   SoftVm ------------------- create_vcpu --> SoftVcpu        vcpu.rs
//!   vm.rs                                        |  state.rs   save, restore
//!     |- slots.rs      memory over RAM           v
//!     |- irqfd.rs      a thread, once needed   lodge_softcpu::Vcpu --> IoEventBus --> the machine's bus
//!     '- ioevents.rs   eventfds before the bus                         ioevents.rs
//! ```
//!
//! It needs nothing of the host but x86-64, and does all that the trait asks for.

mod chips;
mod ioevents;
mod irqfd;
mod slots;
mod state;
mod vcpu;
mod vm;

pub use vm::{MAX_VCPUS, SoftVm};

use std::sync::{Mutex, MutexGuard};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
