//! A vCPU of the software CPU.

use std::sync::{Arc, Mutex};

use lodge_softcpu::events::Shutdown;
use lodge_softcpu::shared::attention;
use lodge_softcpu::{self as soft, Fault, Shared};

use super::state;
use crate::error::Result;
use crate::state::VcpuState;
use crate::vm::{Exit, Kick, Vcpu};

/// What a restored vCPU delivers before anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Injected {
    Interrupt(u8),
    Exception(Fault),
}

/// A vCPU of the software CPU.
pub(super) struct SoftVcpu {
    pub(super) vcpu: soft::Vcpu,
    pub(super) shared: Arc<Shared>,
    pub(super) index: u32,
    pub(super) injected: Option<Injected>,
    /// The TSC offset that the VM's vCPUs were restored with.
    pub(super) tsc: Arc<Mutex<Option<u64>>>,
}

struct Kicker {
    shared: Arc<Shared>,
    index: u32,
}

impl Kick for Kicker {
    fn kick(&self) {
        self.shared.ports()[self.index as usize].notify(attention::KICK);
    }
}

impl SoftVcpu {
    /// After a hardware reset. `index` is below the number of vCPUs.
    pub(super) fn new(shared: Arc<Shared>, index: u32, tsc: Arc<Mutex<Option<u64>>>) -> Self {
        let vcpu = soft::Vcpu::new(shared.clone(), index);
        Self { vcpu, shared, index, injected: None, tsc }
    }

    fn deliver(&mut self, injected: Injected) -> std::result::Result<(), Shutdown> {
        // It is guest code's business: memory is read and written.
        self.shared.enter_guest(self.index);
        let cpu = self.vcpu.cpu();
        cpu.take_mail();
        let delivered = match injected {
            Injected::Interrupt(vector) => cpu.interrupt(vector),
            Injected::Exception(fault) => cpu.raise(fault),
        };
        self.shared.leave_guest(self.index);
        delivered
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<Exit> {
        if let Some(injected) = self.injected.take()
            && self.deliver(injected).is_err()
        {
            return Ok(Exit::Shutdown);
        }
        Ok(match self.vcpu.run() {
            soft::Exit::Kicked => Exit::Kicked,
            soft::Exit::Shutdown => Exit::Shutdown,
        })
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker { shared: self.shared.clone(), index: self.index })
    }

    fn state(&mut self) -> Result<VcpuState> {
        state::save(self)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        state::restore(self, state)
    }
}
