//! Events for the driver: units that came, went, or have other parameters (section 5.6.6.3).

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::Virtqueue;
use super::super::chain::Malformed;
use super::EVENT_BYTES;

/// Events that wait for buffers at most.
const WAITING: usize = 64;
/// Flag: events were lost.
const MISSED: u32 = 1 << 31;
/// Kinds of events, and reasons of the first one.
const TRANSPORT_RESET: u32 = 1;
const PARAMETERS_CHANGED: u32 = 3;
const RESCAN: u32 = 1;
const REMOVED: u32 = 2;

/// What has happened to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Happened {
    /// It is new.
    Plugged,
    /// It is gone.
    Unplugged,
    /// It has an additional sense code and qualifier to tell.
    Changed(u8, u8),
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Target.
    pub target: u8,
    /// Logical unit.
    pub lun: u16,
    /// What has happened.
    pub happened: Happened,
}

impl Event {
    fn encode(self, missed: bool) -> [u8; EVENT_BYTES as usize] {
        let (event, reason) = match self.happened {
            Happened::Plugged => (TRANSPORT_RESET, RESCAN),
            Happened::Unplugged => (TRANSPORT_RESET, REMOVED),
            Happened::Changed(asc, ascq) => {
                (PARAMETERS_CHANGED, u32::from(asc) | u32::from(ascq) << 8)
            }
        };
        let event = event | if missed { MISSED } else { 0 };
        let flat = if self.lun > 255 { 0x4000 } else { 0 };
        let [high, low] = (self.lun | flat).to_be_bytes();
        let mut data = [0; EVENT_BYTES as usize];
        data[..4].copy_from_slice(&event.to_le_bytes());
        data[4..8].copy_from_slice(&[1, self.target, high, low]);
        data[12..].copy_from_slice(&reason.to_le_bytes());
        data
    }
}

/// What is saved of the events.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventState {
    /// Those that wait.
    pub waiting: VecDeque<Event>,
    /// Others were lost.
    pub missed: bool,
}

/// The events that wait for the driver's buffers.
pub(super) struct Events {
    state: Mutex<EventState>,
    /// Signalled when there is one more.
    pub wake: EventFd,
}

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { state: Mutex::default(), wake: EventFd::new(EFD_NONBLOCK)? })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, EventState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn push(&self, event: Event) {
        let mut state = self.lock();
        if state.waiting.len() < WAITING {
            state.waiting.push_back(event);
        } else {
            state.missed = true;
        }
        let _ = self.wake.write(1); // Fails when full: then the thread is on its way.
    }

    pub(super) fn clear(&self) {
        *self.lock() = EventState::default();
    }

    pub(super) fn state(&self) -> EventState {
        self.lock().clone()
    }

    pub(super) fn restore(&self, state: &EventState) {
        *self.lock() = state.clone();
    }

    /// Puts events into the driver's buffers, as many as there are of both.
    pub(super) fn deliver(&self, queue: &mut Virtqueue) {
        let _ = self.wake.read(); // Only resets the counter.
        let mut state = self.lock();
        while let Some(event) = state.waiting.front().copied() {
            let Some(chain) = queue.pop() else {
                // Asks for a kick with the next buffer, unless it has just come.
                if queue.unmute() {
                    continue;
                }
                break;
            };
            if chain.writable_len() < EVENT_BYTES.into() {
                queue.fail(Malformed::Request);
                break;
            }
            chain.write(queue.memory(), 0, &event.encode(state.missed));
            queue.push(chain.head, EVENT_BYTES);
            state.missed = false;
            state.waiting.pop_front();
        }
        drop(state);
        queue.notify();
    }
}
