//! The control thread: it owns the machine, and everybody else sends it messages.
//!
//! ```text
//!  guest (ACPI, reset ports) --Power-->  +---------+  run, pause, set state   +-------+
//!  vCPU threads --------------Vcpu---->  | control | -----------------------> | vCPUs |
//!  terminal, signals ------Ask, Signal-> +---------+                          +-------+
//! ```
//!
//! What may be asked in which state is [`MachineState::after`] alone.

use std::sync::mpsc::Receiver;

use lodge_devices::legacy::PowerRequest;
use lodge_model::exit::ExitReason;
use lodge_model::state::{MachineRequest, MachineState};

use crate::error::{Error, chain};
use crate::machine::Machine;
use crate::vcpu::VcpuEvent;

/// What the control thread hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The guest asks for this.
    Power(PowerRequest),
    /// A vCPU stopped by itself.
    Vcpu(u32, VcpuEvent),
    /// Somebody outside asks for this.
    Ask(MachineRequest),
    /// SIGTERM or SIGINT: the first asks the guest to power off, the second ends the machine.
    Signal,
}

impl From<PowerRequest> for Message {
    fn from(request: PowerRequest) -> Self {
        Self::Power(request)
    }
}

/// Runs `machine` until it is over.
pub fn run(machine: Machine, messages: &Receiver<Message>) -> ExitReason {
    let mut control = Control { machine, state: MachineState::Created, asked_to_stop: false };
    let mut reason = control.ask(MachineRequest::Start);
    while reason.is_none() {
        reason = match messages.recv() {
            Ok(message) => control.hear(message),
            // The machine itself holds a sender, so this cannot happen while it exists.
            Err(_) => Some(ExitReason::Failed("nobody is left to tell of it".into())),
        };
    }
    control.machine.stop();
    reason.unwrap_or(ExitReason::Ended)
}

struct Control {
    machine: Machine,
    state: MachineState,
    asked_to_stop: bool,
}

impl Control {
    /// Gives the reason if the machine is over.
    fn hear(&mut self, message: Message) -> Option<ExitReason> {
        match message {
            Message::Power(PowerRequest::PowerOff) => Some(ExitReason::PoweredOff),
            Message::Power(PowerRequest::Reset) => self.ask(MachineRequest::Reset),
            Message::Power(PowerRequest::DebugExit(value)) => {
                Some(ExitReason::DebugExit(u8::try_from(value).unwrap_or(u8::MAX)))
            }
            Message::Vcpu(index, VcpuEvent::Shutdown) => {
                if self.machine.has_firmware() {
                    return self.ask(MachineRequest::Reset);
                }
                // A kernel that is loaded anew would do it again for ever. Linux resets by ACPI or port CF9.
                let place = self.machine.place_of(index);
                Some(ExitReason::Crashed(format!("triple fault of vCPU {index}{place}")))
            }
            Message::Vcpu(index, VcpuEvent::Failed(why)) => {
                Some(ExitReason::Crashed(format!("vCPU {index}: {why}")))
            }
            Message::Ask(request) => self.ask(request),
            Message::Signal if self.asked_to_stop => self.ask(MachineRequest::End),
            Message::Signal => self.ask(MachineRequest::PowerButton),
        }
    }

    fn ask(&mut self, request: MachineRequest) -> Option<ExitReason> {
        let after = match self.state.after(request) {
            Ok(after) => after,
            Err(refused) => {
                tracing::warn!("{refused}");
                return None;
            }
        };
        match self.carry_out(request) {
            Ok(()) => {
                self.state = after;
                (after == MachineState::Stopped).then_some(ExitReason::Ended)
            }
            Err(error) => Some(ExitReason::Failed(chain(&error))),
        }
    }

    fn carry_out(&mut self, request: MachineRequest) -> Result<(), Error> {
        match request {
            MachineRequest::Start | MachineRequest::Resume => self.machine.resume(),
            MachineRequest::Pause => self.machine.pause(),
            MachineRequest::PowerButton => {
                self.asked_to_stop = true;
                self.machine.press_power_button();
                Ok(())
            }
            MachineRequest::Reset => self.machine.reset(self.state != MachineState::Paused),
            MachineRequest::End => Ok(()),
        }
    }
}
