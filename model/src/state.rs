//! The states of a machine, and what may be asked of it in which.
//!
//! ```text
//!            start               pause
//! Created ──────────> Running <────────> Paused
//!    │                  │ │    resume      │
//!    │     power button │ └────────┐       │ end
//!    │                  v   end    v       v
//!    └───────────────> Stopping ──────> Stopped
//!          end          (asked)  guest
//! ```
//!
//! [`MachineState::after`] is the whole of it, a pure function: the control thread of
//! `lodge-vmm` asks it before it does anything.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::exit::ExitReason;

/// Where a machine is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// Put together, no guest instruction executed.
    Created,
    /// The guest runs.
    Running,
    /// The vCPUs stand still, nothing is lost.
    Paused,
    /// The guest was asked to power off and still runs.
    Stopping,
    /// It is over.
    Stopped,
}

/// What can be asked of a machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineRequest {
    /// Execute the guest's first instruction.
    Start,
    /// Make the vCPUs stand still.
    Pause,
    /// Let them go on.
    Resume,
    /// Press the ACPI power button: the guest is asked to power off.
    PowerButton,
    /// Start the guest anew, as the reset button does.
    Reset,
    /// End the machine now, without asking the guest.
    End,
}

/// A request came in a state in which it cannot be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot {request} a machine that is {state}")]
pub struct NotNow {
    /// What was asked.
    pub request: MachineRequest,
    /// The machine's state.
    pub state: MachineState,
}

impl MachineState {
    /// The state after `request` was done.
    ///
    /// # Errors
    /// The request makes no sense in this state; the machine stays as it is.
    pub fn after(self, request: MachineRequest) -> Result<Self, NotNow> {
        use MachineRequest as R;
        use MachineState as S;
        match (self, request) {
            (S::Created, R::Start) => Ok(S::Running),
            (S::Running | S::Stopping, R::Pause) => Ok(S::Paused),
            // A guest that was paused while it was powering off goes on with that, and stops by
            // itself; the state only says what was last asked for.
            (S::Paused, R::Resume) => Ok(S::Running),
            // A second press is a second press: some guests act on it.
            (S::Running | S::Stopping, R::PowerButton) => Ok(S::Stopping),
            (S::Running | S::Stopping, R::Reset) => Ok(S::Running),
            (S::Paused, R::Reset) => Ok(S::Paused),
            (S::Created | S::Running | S::Paused | S::Stopping, R::End) => Ok(S::Stopped),
            (state, request) => Err(NotNow { request, state }),
        }
    }
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        })
    }
}

impl fmt::Display for MachineRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::PowerButton => "press the power button of",
            Self::Reset => "reset",
            Self::End => "end",
        })
    }
}

/// What a machine tells those who watch it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MachineEvent {
    /// Its state changed to this.
    State(MachineState),
    /// The guest reset itself, and starts anew.
    GuestReset,
    /// It stopped; nothing comes after this.
    Stopped(ExitReason),
}

#[cfg(test)]
mod tests {
    use super::*;
    use MachineRequest as R;
    use MachineState as S;

    #[test]
    fn every_pair_of_state_and_request() {
        const NO: Option<S> = None;
        let table = [
            (S::Created, [Some(S::Running), NO, NO, NO, NO, Some(S::Stopped)]),
            (
                S::Running,
                [NO, Some(S::Paused), NO, Some(S::Stopping), Some(S::Running), Some(S::Stopped)],
            ),
            (S::Paused, [NO, NO, Some(S::Running), NO, Some(S::Paused), Some(S::Stopped)]),
            (
                S::Stopping,
                [NO, Some(S::Paused), NO, Some(S::Stopping), Some(S::Running), Some(S::Stopped)],
            ),
            (S::Stopped, [NO; 6]),
        ];
        let requests = [R::Start, R::Pause, R::Resume, R::PowerButton, R::Reset, R::End];
        for (state, results) in table {
            for (request, expected) in requests.into_iter().zip(results) {
                let expected = expected.ok_or(NotNow { request, state });
                assert_eq!(state.after(request), expected, "{state} {request}");
            }
        }
    }

    #[test]
    fn the_refusal_reads_well() {
        let error = S::Created.after(R::PowerButton).unwrap_err();
        assert_eq!(error.to_string(), "cannot press the power button of a machine that is created");
    }
}
