//! Input devices (VIRTIO 1.2, section 5.8): a keyboard, and a tablet whose pointer is where the viewer's is.
//!
//! ```text
//!   InputHandle::send --> reports --> event queue (0) --> guest     a report ends with SYN
//!   lights of the keyboard <--------- status queue (1) <-- guest
//! ```
//!
//! Events are those of Linux's `input-event-codes.h`. Each thing that happens is a report, given to the
//! guest as a whole.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::{Handler, Poll, Worker};
use super::{
    Chain, DeviceState, Error, QueueResources, QueueState, VirtioDevice, Virtqueue, read_structure,
};
use crate::input::{Button, InputDevice, InputEvent, RANGE};

const DEVICE_TYPE: u16 = 18;
const QUEUE_SIZE: u16 = 64;
const EVENTS: usize = 0;
const STATUS: usize = 1;
/// Token of the eventfd that tells of events.
const WAKE: u32 = 0;
/// Bytes of an event: type, code, value.
const EVENT: usize = 8;
/// Reports that wait for the guest at most; beyond it only what is held is let go.
const REPORTS: usize = 512;
/// Events of the longest report: a place.
const LONGEST: usize = 2;
/// Keys and buttons that can be held.
const MOST_HELD: usize = 256;

mod ev {
    pub const SYN: u16 = 0;
    pub const KEY: u16 = 1;
    pub const REL: u16 = 2;
    pub const ABS: u16 = 3;
    pub const LED: u16 = 0x11;
    pub const REL_WHEEL: u16 = 8;
    pub const ABS_X: u16 = 0;
    pub const ABS_Y: u16 = 1;
    pub const LEDS: u16 = 3;
    /// Keys that keyboards have: from KEY_ESC to the multimedia keys.
    pub const KEYS: std::ops::RangeInclusive<u16> = 1..=248;
    /// BTN_LEFT to BTN_EXTRA.
    pub const BUTTONS: std::ops::RangeInclusive<u16> = 0x110..=0x114;
}

/// What the driver asks the configuration structure for.
mod select {
    pub const NAME: u8 = 1;
    pub const SERIAL: u8 = 2;
    pub const DEVICE_IDS: u8 = 3;
    pub const PROPERTIES: u8 = 0x10;
    pub const EVENT_BITS: u8 = 0x11;
    pub const ABS_INFO: u8 = 0x12;
}

/// Bytes of the union at the structure's end, and where it begins.
const ANSWER: usize = 128;
const ANSWER_AT: usize = 8;

/// What kind of input device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    /// Keys.
    Keyboard,
    /// A pointer with places, five buttons and a wheel.
    Tablet,
}

/// One event: type, code, value.
type Event = (u16, u16, i32);

/// What is saved of an input device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InputState {
    /// A driver runs.
    pub on: bool,
    /// What the configuration structure shows.
    pub select: (u8, u8),
    /// Reports that the guest has not taken, without their SYN.
    pub reports: VecDeque<Vec<Event>>,
    /// Keys and buttons (Linux codes) that the guest knows to be down.
    pub held: BTreeSet<u16>,
    /// Bit 0 num lock, 1 caps lock, 2 scroll lock.
    pub leds: u8,
}

struct Shared {
    kind: InputKind,
    state: Mutex<InputState>,
    /// Signalled when there is a report.
    wake: EventFd,
    /// As [`InputState::on`], for who only asks.
    on: AtomicBool,
    statuses: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, InputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn takes(&self, event: &InputEvent) -> bool {
        match event {
            InputEvent::Key(key, _) => {
                self.kind == InputKind::Keyboard && ev::KEYS.contains(&key.0)
            }
            InputEvent::Moved { .. } => false,
            _ => self.kind == InputKind::Tablet,
        }
    }
}

/// Linux's code of a button.
fn button_code(button: Button) -> u16 {
    match button {
        Button::Left => 0x110,
        Button::Right => 0x111,
        Button::Middle => 0x112,
        Button::Side => 0x113,
        Button::Extra => 0x114,
    }
}

impl InputState {
    /// A key or button goes down, again or for the first time, or up.
    fn press(&mut self, code: u16, down: bool, report: &mut Vec<Event>) {
        if !down {
            if self.held.remove(&code) {
                report.push((ev::KEY, code, 0));
            }
            return;
        }
        let is_full = self.reports.len() >= REPORTS || self.held.len() >= MOST_HELD;
        if self.held.contains(&code) {
            // A repetition. The guest would make its own only if the device said so.
            if !is_full {
                report.push((ev::KEY, code, 2));
            }
        } else if !is_full {
            self.held.insert(code);
            report.push((ev::KEY, code, 1));
        }
    }

    fn event(&mut self, event: &InputEvent, report: &mut Vec<Event>) {
        match *event {
            InputEvent::Key(key, down) => self.press(key.0, down, report),
            InputEvent::Button(button, down) => self.press(button_code(button), down, report),
            InputEvent::At { x, y } => {
                report.push((ev::ABS, ev::ABS_X, x.min(RANGE).into()));
                report.push((ev::ABS, ev::ABS_Y, y.min(RANGE).into()));
            }
            InputEvent::Wheel(0) | InputEvent::Moved { .. } => {}
            InputEvent::Wheel(notches) => report.push((ev::REL, ev::REL_WHEEL, notches)),
        }
    }

    /// Puts a report behind the others. A place takes that of an older place.
    fn push(&mut self, report: Vec<Event>) {
        let is_place = |report: &[Event]| report.iter().all(|(kind, ..)| *kind == ev::ABS);
        if let Some(last) = self.reports.back_mut()
            && is_place(&report)
            && is_place(last)
        {
            *last = report;
            return;
        }
        let lets_go = |(kind, _, value): &Event| (*kind, *value) == (ev::KEY, 0);
        if self.reports.len() < REPORTS {
            self.reports.push_back(report);
        } else if report.iter().any(lets_go) {
            // As many more as there are keys that can be held.
            self.reports.push_back(report.into_iter().filter(lets_go).collect());
        }
    }
}

/// The host's side. Clones are the same device.
#[derive(Clone)]
pub struct InputHandle(Arc<Shared>);

impl InputHandle {
    /// The lights as the guest set them: bit 0 num lock, 1 caps lock, 2 scroll lock.
    pub fn leds(&self) -> u8 {
        self.0.lock().leds
    }

    /// How many events the guest sent: lights that it switched.
    pub fn statuses(&self) -> u64 {
        self.0.statuses.load(Ordering::Relaxed)
    }
}

impl InputDevice for InputHandle {
    fn wants(&self, event: &InputEvent) -> bool {
        self.0.on.load(Ordering::Acquire) && self.0.takes(event)
    }

    fn has_places(&self) -> bool {
        self.0.kind == InputKind::Tablet && self.0.on.load(Ordering::Acquire)
    }

    fn send(&self, events: &[InputEvent]) {
        let mut state = self.0.lock();
        if !state.on {
            return;
        }
        for event in events.iter().filter(|event| self.0.takes(event)) {
            let mut report = Vec::new();
            state.event(event, &mut report);
            if !report.is_empty() {
                state.push(report);
            }
        }
        drop(state);
        let _ = self.0.wake.write(1); // Fails when full: then the thread is on its way.
    }
}

/// The device.
pub struct Input {
    shared: Arc<Shared>,
    serial: String,
    worker: Worker<Port>,
}

impl Input {
    /// A keyboard or a tablet. `name` is that of its thread; the guest sees `serial`, cut to 128 bytes.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(name: &str, kind: InputKind, serial: &str) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            kind,
            state: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK).map_err(Error::host("create an eventfd"))?,
            on: AtomicBool::new(false),
            statuses: AtomicU64::new(0),
        });
        let port = Port { shared: shared.clone(), queues: [None, None], taken: Vec::new() };
        Ok(Self { shared, serial: serial.into(), worker: Worker::new(name, port) })
    }

    /// The host's side.
    pub fn handle(&self) -> InputHandle {
        InputHandle(self.shared.clone())
    }

    /// What the driver's choice of select and subsel shows (5.8.5.2).
    fn answer(&self, select: u8, subsel: u8) -> Vec<u8> {
        let is_keyboard = self.shared.kind == InputKind::Keyboard;
        let mut answer = match (select, subsel) {
            (select::NAME, 0) if is_keyboard => b"Lodge Keyboard".to_vec(),
            (select::NAME, 0) => b"Lodge Tablet".to_vec(),
            (select::SERIAL, 0) => self.serial.as_bytes().to_vec(),
            // Bus (BUS_VIRTUAL), vendor, product, version.
            (select::DEVICE_IDS, 0) => {
                let product = if is_keyboard { 1 } else { 2 };
                [6u16, 0x1af4, product, 1].iter().flat_map(|id| id.to_le_bytes()).collect()
            }
            (select::PROPERTIES, 0) => Vec::new(),
            (select::EVENT_BITS, kind) => self.event_bits(kind.into()),
            (select::ABS_INFO, 0 | 1) if !is_keyboard => {
                // Minimum, maximum, fuzz, flat, resolution.
                [0u32, RANGE.into(), 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()).collect()
            }
            _ => Vec::new(),
        };
        answer.truncate(ANSWER);
        answer
    }

    fn event_bits(&self, kind: u16) -> Vec<u8> {
        let codes: Vec<u16> = match (self.shared.kind, kind) {
            (InputKind::Keyboard, ev::KEY) => ev::KEYS.collect(),
            (InputKind::Keyboard, ev::LED) => (0..ev::LEDS).collect(),
            (InputKind::Tablet, ev::KEY) => ev::BUTTONS.collect(),
            (InputKind::Tablet, ev::REL) => vec![ev::REL_WHEEL],
            (InputKind::Tablet, ev::ABS) => vec![ev::ABS_X, ev::ABS_Y],
            _ => return Vec::new(),
        };
        let bytes = codes.iter().max().map_or(0, |code| usize::from(code / 8) + 1);
        let mut bits = vec![0; bytes];
        for code in codes {
            if let Some(byte) = bits.get_mut(usize::from(code / 8)) {
                *byte |= 1 << (code % 8);
            }
        }
        bits
    }
}

impl VirtioDevice for Input {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        match self.shared.kind {
            InputKind::Keyboard => 0x09_00_00,
            InputKind::Tablet => 0x09_80_00,
        }
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }
    fn set_features(&mut self, _features: u64) {}
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (select, subsel) = self.shared.lock().select;
        let answer = self.answer(select, subsel);
        let mut config = [0; ANSWER_AT + ANSWER];
        config[0] = select;
        config[1] = subsel;
        config[2] = answer.len() as u8; // At most ANSWER.
        config[ANSWER_AT..ANSWER_AT + answer.len()].copy_from_slice(&answer);
        read_structure(&config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut state = self.shared.lock();
        for (at, byte) in (offset..).zip(data) {
            match at {
                0 => state.select.0 = *byte,
                1 => state.select.1 = *byte,
                _ => return,
            }
        }
    }
    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        self.worker.start(index.into(), &resources, state)?;
        if usize::from(index) == EVENTS {
            self.shared.lock().on = true;
            self.shared.on.store(true, Ordering::Release);
        }
        Ok(())
    }
    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.worker.stop(index.into())
    }
    fn reset(&mut self) {
        self.shared.on.store(false, Ordering::Release);
        *self.shared.lock() = InputState::default();
    }
    fn state(&self) -> DeviceState {
        DeviceState::Input(self.shared.lock().clone())
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Input(state) = state else {
            return Err(Error::State("it is not one of an input device"));
        };
        let mut state = state.clone();
        state.reports.truncate(REPORTS + MOST_HELD);
        state.reports.iter_mut().for_each(|report| report.truncate(LONGEST));
        while state.held.len() > MOST_HELD {
            state.held.pop_last();
        }
        self.shared.on.store(state.on, Ordering::Release);
        *self.shared.lock() = state;
        Ok(())
    }
}

/// The thread's side: both queues.
struct Port {
    shared: Arc<Shared>,
    queues: [Option<Virtqueue>; 2],
    /// Chains taken from the event queue for a report that needs more of them.
    taken: Vec<Chain>,
}

impl Port {
    /// Reports go to the guest, each as a whole, for as long as it has buffers.
    fn events(&mut self) {
        let (shared, taken) = (&self.shared, &mut self.taken);
        let Some(queue) = &mut self.queues[EVENTS] else { return };
        queue.process(|queue, chain| {
            let mut state = shared.lock();
            // One that is longer than the ring would wait for ever.
            let most = usize::from(queue.size());
            while state.reports.front().is_some_and(|report| report.len() >= most) {
                state.reports.pop_front();
            }
            let Some(wanted) = state.reports.front().map(|report| report.len() + 1) else {
                return false;
            };
            taken.push(chain);
            if taken.len() < wanted {
                return true;
            }
            let report = state.reports.pop_front().unwrap_or_default();
            drop(state);
            for (chain, (kind, code, value)) in
                taken.drain(..).zip(report.into_iter().chain([(ev::SYN, 0, 0)]))
            {
                let mut event = [0; EVENT];
                event[..2].copy_from_slice(&kind.to_le_bytes());
                event[2..4].copy_from_slice(&code.to_le_bytes());
                event[4..].copy_from_slice(&value.to_le_bytes());
                let written = chain.write(queue.memory(), 0, &event);
                queue.push(chain.head, written as u32);
            }
            true
        });
        self.give_back();
    }

    /// Chains of a report that did not fit yet go back into the ring.
    fn give_back(&mut self) {
        let Some(queue) = &mut self.queues[EVENTS] else { return };
        for _ in self.taken.drain(..) {
            queue.unpop();
        }
    }

    fn statuses(&mut self) {
        let shared = &self.shared;
        let Some(queue) = &mut self.queues[STATUS] else { return };
        queue.process(|queue, chain| {
            let mut event = [0; EVENT];
            if chain.read(queue.memory(), 0, &mut event) == EVENT {
                shared.statuses.fetch_add(1, Ordering::Relaxed);
                status(&mut shared.lock(), event);
            }
            queue.push(chain.head, 0);
            true
        });
    }
}

/// An event from the guest: a light.
fn status(state: &mut InputState, event: [u8; EVENT]) {
    let [kind_low, kind_high, code_low, code_high, value @ ..] = event;
    let code = u16::from_le_bytes([code_low, code_high]);
    if u16::from_le_bytes([kind_low, kind_high]) == ev::LED && code < ev::LEDS {
        match u32::from_le_bytes(value) {
            0 => state.leds &= !(1 << code),
            _ => state.leds |= 1 << code,
        }
    }
}

impl Handler for Port {
    fn start(&mut self, slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error> {
        if slot == EVENTS {
            poll.add(self.shared.wake.as_raw_fd(), EventSet::IN, WAKE)
                .map_err(Error::host("wait for input"))?;
        }
        if let Some(place) = self.queues.get_mut(slot) {
            *place = Some(queue);
        }
        Ok(())
    }

    fn kicked(&mut self, slot: usize, _poll: &Poll) {
        if slot == EVENTS { self.events() } else { self.statuses() }
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) {
        let _ = self.shared.wake.read(); // Only resets the counter.
        self.events();
    }

    fn stop(&mut self, slot: usize, poll: &Poll) -> Option<Virtqueue> {
        if slot == EVENTS {
            poll.remove(self.shared.wake.as_raw_fd());
        }
        self.queues.get_mut(slot)?.take()
    }
}
