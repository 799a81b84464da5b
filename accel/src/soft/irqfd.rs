//! Interrupts that eventfds raise: a thread waits for them. It starts with the first one.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use lodge_softcpu::Shared;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::lock;
use crate::error::{Error, Result};
use crate::vm::Trigger;

/// The token of the eventfd that ends the thread.
const END: u64 = 0;

struct Binding {
    /// The number that the eventfd was given by.
    number: RawFd,
    fd: EventFd,
    trigger: Trigger,
}

type Bindings = Arc<Mutex<HashMap<u64, Binding>>>;

/// The eventfds, and the thread that waits for them.
pub(super) struct IrqFds {
    epoll: Arc<Epoll>,
    end: EventFd,
    bindings: Bindings,
    next_token: u64,
    thread: Option<JoinHandle<()>>,
}

impl IrqFds {
    /// Starts the thread.
    pub(super) fn start(shared: Arc<Shared>) -> Result<Self> {
        let step = "starting the thread that waits for irqfds";
        let epoll = Arc::new(Epoll::new().map_err(host(step))?);
        let end = EventFd::new(libc::EFD_CLOEXEC).map_err(host(step))?;
        let event = EpollEvent::new(EventSet::IN, END);
        epoll.ctl(ControlOperation::Add, end.as_raw_fd(), event).map_err(host(step))?;
        let bindings = Bindings::default();
        let (waits, table) = (epoll.clone(), bindings.clone());
        let thread = std::thread::Builder::new()
            .name("irqfd".into())
            .spawn(move || wait(&waits, &table, &shared))
            .map_err(host(step))?;
        Ok(Self { epoll, end, bindings, next_token: END + 1, thread: Some(thread) })
    }

    pub(super) fn add(&mut self, fd: &EventFd, trigger: Trigger) -> Result<()> {
        let number = fd.as_raw_fd();
        let mut bindings = lock(&self.bindings);
        if bindings.values().any(|b| b.number == number && b.trigger == trigger) {
            return Err(Error::Invalid(format!("this eventfd raises {trigger:?} already")));
        }
        let step = "adding an irqfd";
        let copy = fd.try_clone().map_err(host(step))?;
        let token = self.next_token;
        self.next_token += 1;
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll.ctl(ControlOperation::Add, copy.as_raw_fd(), event).map_err(host(step))?;
        bindings.insert(token, Binding { number, fd: copy, trigger });
        Ok(())
    }

    pub(super) fn remove(&mut self, fd: &EventFd, trigger: Trigger) -> Result<()> {
        let number = fd.as_raw_fd();
        let mut bindings = lock(&self.bindings);
        let token = bindings
            .iter()
            .find(|(_, b)| b.number == number && b.trigger == trigger)
            .map(|(token, _)| *token)
            .ok_or_else(|| Error::Invalid(format!("this eventfd does not raise {trigger:?}")))?;
        if let Some(binding) = bindings.remove(&token) {
            let event = EpollEvent::default();
            self.epoll
                .ctl(ControlOperation::Delete, binding.fd.as_raw_fd(), event)
                .map_err(host("removing an irqfd"))?;
        }
        Ok(())
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        // Its counter cannot be full: nobody else writes to it.
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn host(step: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { accel: "soft", step: step.into(), source }
}

fn wait(epoll: &Epoll, bindings: &Bindings, shared: &Shared) {
    let mut events = [EpollEvent::default(); 32];
    loop {
        let n = match epoll.wait(-1, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                tracing::error!("waiting for irqfds failed, interrupts are lost from now on: {e}");
                return;
            }
        };
        for event in &events[..n] {
            if event.data() == END {
                return;
            }
            // Held while raising: what was removed raises nothing any more.
            let table = lock(bindings);
            if let Some(binding) = table.get(&event.data())
                && take(&binding.fd)
            {
                raise(shared, binding.trigger);
            }
        }
    }
}

/// Takes the signal. It may be gone: whoever gave the eventfd may have read it, and then reading would wait.
fn take(fd: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd of ours; with no timeout it does not wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && fd.read().is_ok()
}

/// As an edge, or as a message.
pub(super) fn raise(shared: &Shared, trigger: Trigger) {
    match trigger {
        Trigger::Gsi(gsi) => {
            shared.set_irq(gsi, true);
            shared.set_irq(gsi, false);
        }
        Trigger::Msi(msi) => {
            if !shared.signal_msi(msi.address, msi.data) {
                tracing::debug!("nobody takes {msi:x?}");
            }
        }
    }
}
