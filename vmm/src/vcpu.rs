//! A vCPU's thread: it owns the vCPU and does what the control thread tells it.
//!
//! ```text
//!             Run                    Exit::Shutdown, an error
//!   Paused --------> Running ---------------------------------> Paused, and an event
//!          <--------
//!            Pause                   End, in any state: the thread is over
//! ```
//!
//! A command is sent first and the vCPU kicked afterwards, and a kick that comes before the vCPU runs makes the next
//! run return at once: no command waits for the guest.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use lodge_accel::state::VcpuState;
use lodge_accel::{Exit, Kick, Vcpu};

/// Stack of a vCPU's thread: the software CPU's handlers may nest as deep as its fuel lasts.
const STACK_BYTES: usize = 8 << 20;

/// What a vCPU's thread is told.
enum Command {
    Run,
    Pause(Sender<()>),
    State(Sender<lodge_accel::Result<VcpuState>>),
    SetState(Box<VcpuState>, Sender<lodge_accel::Result<()>>),
    End,
}

/// What a vCPU's thread tells on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// A triple fault: a PC resets. The vCPU is paused.
    Shutdown,
    /// It cannot go on; the text says why. The vCPU is paused.
    Failed(String),
}

/// The control thread's end of a vCPU's thread.
pub struct VcpuThread {
    commands: Sender<Command>,
    kick: Arc<dyn Kick>,
    thread: Option<JoinHandle<()>>,
}

/// The thread is gone: it ended, or panicked.
#[derive(Debug, thiserror::Error)]
#[error("the vCPU's thread is gone")]
pub struct Gone;

impl VcpuThread {
    /// Starts a paused thread for vCPU `index`. `report` is called in it.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start(
        index: u32,
        vcpu: Box<dyn Vcpu>,
        report: impl Fn(VcpuEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let kick = vcpu.kicker();
        let (commands, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || Worker { vcpu, receiver, report }.serve())?;
        Ok(Self { commands, kick, thread: Some(thread) })
    }

    fn send(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        self.kick.kick();
        Ok(())
    }

    /// Lets it run.
    pub fn run(&self) -> Result<(), Gone> {
        self.send(Command::Run)
    }

    /// Asks it to stand still; the receiver hears when it does, with no access half done.
    pub fn pause(&self) -> Result<Receiver<()>, Gone> {
        let (done, paused) = channel();
        self.send(Command::Pause(done))?;
        Ok(paused)
    }

    /// The vCPU's state. It must be paused, and stays so.
    pub fn state(&self) -> Result<lodge_accel::Result<VcpuState>, Gone> {
        let (reply, state) = channel();
        self.send(Command::State(reply))?;
        state.recv().map_err(|_| Gone)
    }

    /// Sets the vCPU's state. It must be paused, and stays so.
    pub fn set_state(&self, state: VcpuState) -> Result<lodge_accel::Result<()>, Gone> {
        let (reply, done) = channel();
        self.send(Command::SetState(Box::new(state), reply))?;
        done.recv().map_err(|_| Gone)
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        // A thread that is gone already needs no command.
        let _ = self.send(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where the thread is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Paused,
    Running,
    Ended,
}

struct Worker<R> {
    vcpu: Box<dyn Vcpu>,
    receiver: Receiver<Command>,
    report: R,
}

impl<R: Fn(VcpuEvent)> Worker<R> {
    fn serve(mut self) {
        let mut state = State::Paused;
        while state != State::Ended {
            state = match state {
                State::Paused => match self.receiver.recv() {
                    Ok(command) => self.obey(command, state),
                    // Nobody is left to command it.
                    Err(_) => State::Ended,
                },
                _ => self.run(),
            };
        }
    }

    fn run(&mut self) -> State {
        match self.vcpu.run() {
            Ok(Exit::Kicked) => {
                let mut state = State::Running;
                while let Ok(command) = self.receiver.try_recv() {
                    state = self.obey(command, state);
                }
                state
            }
            Ok(Exit::Shutdown) => {
                (self.report)(VcpuEvent::Shutdown);
                State::Paused
            }
            Err(error) => {
                (self.report)(VcpuEvent::Failed(crate::error::chain(&error)));
                State::Paused
            }
        }
    }

    /// Carries out `command`; gives the state after it. Whoever asked and has gone away needs no answer.
    fn obey(&mut self, command: Command, state: State) -> State {
        match command {
            Command::Run => State::Running,
            Command::Pause(done) => {
                let _ = done.send(());
                State::Paused
            }
            Command::State(reply) => {
                let _ = reply.send(self.vcpu.state());
                state
            }
            Command::SetState(new, reply) => {
                let _ = reply.send(self.vcpu.set_state(&new));
                state
            }
            Command::End => State::Ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::{Condvar, Mutex};

    #[derive(Default)]
    struct Fake {
        kicked: Mutex<bool>,
        wake: Condvar,
        runs: AtomicU64,
        crash: AtomicBool,
    }
    impl Kick for Fake {
        fn kick(&self) {
            *self.kicked.lock().unwrap() = true;
            self.wake.notify_all();
        }
    }
    struct FakeVcpu(Arc<Fake>, VcpuState);
    impl Vcpu for FakeVcpu {
        fn run(&mut self) -> lodge_accel::Result<Exit> {
            self.0.runs.fetch_add(1, Ordering::SeqCst);
            if self.0.crash.load(Ordering::SeqCst) {
                return Ok(Exit::Shutdown);
            }
            let kicked = self.0.kicked.lock().unwrap();
            *self.0.wake.wait_while(kicked, |kicked| !*kicked).unwrap() = false;
            Ok(Exit::Kicked)
        }
        fn kicker(&self) -> Arc<dyn Kick> {
            self.0.clone()
        }
        fn state(&mut self) -> lodge_accel::Result<VcpuState> {
            Ok(self.1.clone())
        }
        fn set_state(&mut self, state: &VcpuState) -> lodge_accel::Result<()> {
            self.1 = state.clone();
            Ok(())
        }
    }

    fn start(fake: &Arc<Fake>) -> (VcpuThread, Receiver<VcpuEvent>) {
        let (events, heard) = channel();
        let vcpu = Box::new(FakeVcpu(fake.clone(), VcpuState::default()));
        let report = move |event| events.send(event).unwrap();
        (VcpuThread::start(0, vcpu, report).unwrap(), heard)
    }

    #[test]
    fn it_pauses_runs_and_keeps_its_state() {
        let fake = Arc::new(Fake::default());
        let (vcpu, _events) = start(&fake);
        for round in 0..100 {
            vcpu.run().unwrap();
            vcpu.pause().unwrap().recv().unwrap();
            let runs = fake.runs.load(Ordering::SeqCst);
            let state = VcpuState { rip: round, ..VcpuState::default() };
            vcpu.set_state(state.clone()).unwrap().unwrap();
            assert_eq!(vcpu.state().unwrap().unwrap(), state);
            assert_eq!(fake.runs.load(Ordering::SeqCst), runs, "a paused vCPU does not run");
        }
    }

    #[test]
    fn a_crash_is_told_once_and_the_vcpu_stands_still() {
        let fake = Arc::new(Fake::default());
        fake.crash.store(true, Ordering::SeqCst);
        let (vcpu, events) = start(&fake);
        vcpu.run().unwrap();
        assert_eq!(events.recv().unwrap(), VcpuEvent::Shutdown);
        vcpu.pause().unwrap().recv().unwrap();
        assert!(events.try_recv().is_err());
        assert_eq!(fake.runs.load(Ordering::SeqCst), 1);
        drop(vcpu);
    }
}
