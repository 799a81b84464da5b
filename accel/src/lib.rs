//! What runs vCPUs: one small trait, and behind it the host's KVM (`kvm`) or the software CPU
//! (`soft`).
//!
//! ```text
//!   vmm ----> Arc<dyn Vm> ---- create_vcpu ----> Box<dyn Vcpu> (moves to its thread)
//!                 |                                   |  run() -> Exit
//!   devices ------+ set_irq, signal_msi,              |
//!                   add_ioeventfd                     +--> Bus (ports and MMIO, in this thread)
//! ```
//!
//! Each VM has an interrupt controller complex of a PC inside it (LAPICs, IOAPIC with 24 pins, the
//! PIC pair, the PIT), in the kernel or in the software CPU. A vCPU that halts waits inside
//! [`Vcpu::run`]; that returns only when something outside must act.

mod choose;
mod error;
pub mod kvm;
pub mod soft;
pub mod state;
mod vm;

pub use choose::{Kind, open};
pub use error::{Error, Result};
pub use vm::{
    Capabilities, Exit, IoEvent, Kick, MemorySlot, Msi, Trigger, Vcpu, VcpuSetup, Vm, VmSetup,
};
