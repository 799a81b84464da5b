//! The control thread: it owns the machine, and everybody else sends it messages.
//!
//! ```text
//!  guest (ACPI, reset ports) --Power-->  +---------+  run, pause, set state   +-------+
//!  vCPU threads --------------Vcpu---->  | control | -----------------------> | vCPUs |
//!  terminal, signals ------Ask, Signal-> |         |                          +-------+
//!  control socket -----------------Call> +---------+  MachineEvent --> who watches
//! ```
//!
//! What may be asked in which state is [`MachineState::after`] alone.

use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};

use lodge_devices::legacy::PowerRequest;
use lodge_model::exit::ExitReason;
use lodge_model::state::{MachineEvent, MachineRequest, MachineState, NotNow};

use crate::error::{Error, chain};
use crate::machine::Machine;
use crate::vcpu::VcpuEvent;

/// What the control thread hears.
#[derive(Debug)]
pub enum Message {
    /// The guest asks for this.
    Power(PowerRequest),
    /// A vCPU stopped by itself.
    Vcpu(u32, VcpuEvent),
    /// Somebody outside asks for this.
    Ask(MachineRequest),
    /// SIGTERM or SIGINT: the first asks the guest to power off, the second ends the machine.
    Signal,
    /// Somebody on the control socket asks, and waits for the answer.
    Call(Call),
}

/// A task, and who waits for it to be done. Made by [`call`].
#[derive(Debug)]
pub struct Call {
    task: Task,
    /// It has room for the one reply.
    reply: SyncSender<Result<MachineState, Refused>>,
}

#[cfg(test)]
impl Call {
    /// Answers a request to watch as the control thread does.
    pub(crate) fn watch(self, state: MachineState) -> SyncSender<MachineEvent> {
        let Task::Watch(_, queue) = self.task else { panic!("{:?}", self.task) };
        self.reply.try_send(Ok(state)).expect("its asker waits");
        queue
    }

    /// Answers it.
    pub(crate) fn is(self, state: MachineState) {
        self.reply.try_send(Ok(state)).expect("its asker waits");
    }

    /// Whether it is about a watcher that has gone.
    pub(crate) fn is_unwatch(&self) -> bool {
        matches!(self.task, Task::Unwatch(_))
    }
}

/// What a [`Call`] is about; the answer is always the state after it.
#[derive(Debug)]
pub enum Task {
    /// Nothing.
    State,
    /// A request, if it can be done in this state.
    Ask(MachineRequest),
    /// The watcher with this number is to be told what happens. It is forgotten when its queue is full.
    Watch(u64, SyncSender<MachineEvent>),
    /// It wants to know no more.
    Unwatch(u64),
}

/// Why a [`Task`] was not done.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The state does not allow it.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// It did not work, and the machine ends.
    #[error("the machine cannot go on: {0}")]
    Failed(String),
    /// The machine has ended.
    #[error("the machine has ended")]
    Over,
}

/// Has the control thread do something, and waits until it is done.
///
/// # Errors
/// Why it was not done.
pub fn call(control: &Sender<Message>, task: Task) -> Result<MachineState, Refused> {
    let (reply, answer) = sync_channel(1);
    control.send(Message::Call(Call { task, reply })).map_err(|_| Refused::Over)?;
    answer.recv().unwrap_or(Err(Refused::Over))
}

impl From<PowerRequest> for Message {
    fn from(request: PowerRequest) -> Self {
        Self::Power(request)
    }
}

/// Runs `machine` until it is over.
pub fn run(machine: Machine, messages: &Receiver<Message>) -> ExitReason {
    let mut control = Control {
        machine,
        state: MachineState::Created,
        asked_to_stop: false,
        watchers: Vec::new(),
    };
    let mut reason = control.ask(MachineRequest::Start);
    while reason.is_none() {
        reason = match messages.recv() {
            Ok(message) => control.hear(message),
            // The machine itself holds a sender, so this cannot happen while it exists.
            Err(_) => Some(ExitReason::Failed("nobody is left to tell of it".into())),
        };
    }
    if tracing::enabled!(tracing::Level::DEBUG) {
        control.machine.log_places();
    }
    let Control { machine, mut watchers, .. } = control;
    machine.stop();
    let reason = reason.unwrap_or(ExitReason::Ended);
    tell(&mut watchers, &MachineEvent::Stopped(reason.clone()));
    reason
}

struct Control {
    machine: Machine,
    state: MachineState,
    asked_to_stop: bool,
    watchers: Watchers,
}

/// Those who want to know what happens, with their numbers.
type Watchers = Vec<(u64, SyncSender<MachineEvent>)>;

impl Control {
    /// Gives the reason if the machine is over.
    fn hear(&mut self, message: Message) -> Option<ExitReason> {
        match message {
            Message::Power(PowerRequest::PowerOff) => Some(ExitReason::PoweredOff),
            Message::Power(PowerRequest::Reset) => self.reset_by_guest(),
            Message::Power(PowerRequest::DebugExit(value)) => {
                Some(ExitReason::DebugExit(u8::try_from(value).unwrap_or(u8::MAX)))
            }
            Message::Vcpu(index, VcpuEvent::Shutdown) => {
                if self.machine.has_firmware() {
                    return self.reset_by_guest();
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
            Message::Call(Call { task, reply }) => {
                let answer = self.do_task(task);
                let over = over(&answer);
                // The asker may be gone.
                let _ = reply.try_send(answer);
                over
            }
        }
    }

    fn reset_by_guest(&mut self) -> Option<ExitReason> {
        let over = self.ask(MachineRequest::Reset);
        if over.is_none() {
            tell(&mut self.watchers, &MachineEvent::GuestReset);
        }
        over
    }

    fn do_task(&mut self, task: Task) -> Result<MachineState, Refused> {
        match task {
            Task::State => {}
            Task::Ask(request) => return self.try_to(request),
            Task::Watch(number, queue) => self.watchers.push((number, queue)),
            Task::Unwatch(number) => self.watchers.retain(|(other, _)| *other != number),
        }
        Ok(self.state)
    }

    fn ask(&mut self, request: MachineRequest) -> Option<ExitReason> {
        let answer = self.try_to(request);
        if let Err(Refused::NotNow(refused)) = &answer {
            tracing::warn!("{refused}");
        }
        over(&answer)
    }

    fn try_to(&mut self, request: MachineRequest) -> Result<MachineState, Refused> {
        let after = self.state.after(request)?;
        self.carry_out(request).map_err(|error| Refused::Failed(chain(&error)))?;
        // The end is told with its reason, by `run`.
        if after != self.state && after != MachineState::Stopped {
            tell(&mut self.watchers, &MachineEvent::State(after));
        }
        self.state = after;
        Ok(after)
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

/// Tells those who watch. Whoever does not keep up is not waited for.
fn tell(watchers: &mut Watchers, event: &MachineEvent) {
    watchers.retain(|(_, queue)| queue.try_send(event.clone()).is_ok());
}

/// The reason if the machine is over.
fn over(answer: &Result<MachineState, Refused>) -> Option<ExitReason> {
    match answer {
        Ok(MachineState::Stopped) => Some(ExitReason::Ended),
        Err(Refused::Failed(why)) => Some(ExitReason::Failed(why.clone())),
        Ok(_) | Err(Refused::NotNow(_) | Refused::Over) => None,
    }
}
