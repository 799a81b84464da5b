//! The hub: which of a machine's keyboards and pointers hears of an event.
//!
//! ```text
//!   viewers, send-key --> Hub --> the first device that wants it: virtio, USB, then PS/2
//!                          |
//!                          +-- a release goes where its press went
//! ```
//!
//! Firmware has no driver for the first ones, so that it is the last one that gets the keys until a system's driver
//! is there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Button, InputDevice, InputEvent, Key};

/// More than these are not held at a time: no keyboard has as many keys.
const MOST_HELD: usize = 1024;

/// What can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Held {
    Key(Key),
    Button(Button),
}

#[derive(Default)]
struct Inner {
    devices: Vec<Arc<dyn InputDevice>>,
    /// Who heard of what is down.
    held: BTreeMap<Held, Arc<dyn InputDevice>>,
}

/// All keyboards and pointers of a machine, as one.
#[derive(Default)]
pub struct Hub(Mutex<Inner>);

impl Hub {
    /// A hub over `devices`, the preferred ones first.
    pub fn new(devices: Vec<Arc<dyn InputDevice>>) -> Self {
        Self(Mutex::new(Inner { devices, held: BTreeMap::new() }))
    }

    /// Adds a device, before all others (`true`) or after them.
    pub fn add(&self, device: Arc<dyn InputDevice>, first: bool) {
        let mut inner = self.lock();
        let at = if first { 0 } else { inner.devices.len() };
        inner.devices.insert(at, device);
    }

    /// Takes a device out again.
    pub fn remove(&self, device: &Arc<dyn InputDevice>) {
        let mut inner = self.lock();
        inner.devices.retain(|other| !Arc::ptr_eq(other, device));
        inner.held.retain(|_, other| !Arc::ptr_eq(other, device));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Who hears of `event`; nobody, if nobody wants it.
    fn route(&mut self, event: &InputEvent) -> Option<Arc<dyn InputDevice>> {
        let (what, down) = match *event {
            InputEvent::Key(key, down) => (Held::Key(key), down),
            InputEvent::Button(button, down) => (Held::Button(button), down),
            _ => return self.find(event),
        };
        if !down {
            return self.held.remove(&what);
        }
        // A repetition goes where the key is held, for as long as somebody listens there.
        let held = self.held.get(&what).filter(|device| device.wants(event)).cloned();
        if let Some(device) = held {
            return Some(device);
        }
        let device = self.find(event)?;
        if self.held.len() >= MOST_HELD && !self.held.contains_key(&what) {
            return None;
        }
        self.held.insert(what, device.clone());
        Some(device)
    }

    fn find(&self, event: &InputEvent) -> Option<Arc<dyn InputDevice>> {
        self.devices.iter().find(|device| device.wants(event)).cloned()
    }
}

impl InputDevice for Hub {
    fn wants(&self, event: &InputEvent) -> bool {
        self.lock().find(event).is_some()
    }

    fn has_places(&self) -> bool {
        self.lock().find(&InputEvent::At { x: 0, y: 0 }).is_some_and(|device| device.has_places())
    }

    fn send(&self, events: &[InputEvent]) {
        // The lock is held throughout: what two viewers send at a time does not change its order.
        let mut inner = self.lock();
        let mut run: Vec<InputEvent> = Vec::with_capacity(events.len());
        let mut target: Option<Arc<dyn InputDevice>> = None;
        for event in events {
            let Some(device) = inner.route(event) else { continue };
            if let Some(last) = &target
                && !Arc::ptr_eq(last, &device)
            {
                last.send(&run);
                run.clear();
            }
            run.push(*event);
            target = Some(device);
        }
        if let Some(last) = target {
            last.send(&run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Fake {
        keys: AtomicBool,
        pointer: AtomicBool,
        places: bool,
        batches: Mutex<Vec<Vec<InputEvent>>>,
    }

    impl Fake {
        fn new(keys: bool, pointer: bool, places: bool) -> Arc<Self> {
            Arc::new(Self {
                keys: keys.into(),
                pointer: pointer.into(),
                places,
                batches: Mutex::default(),
            })
        }
        fn take(&self) -> Vec<Vec<InputEvent>> {
            std::mem::take(&mut self.batches.lock().unwrap())
        }
    }

    impl InputDevice for Fake {
        fn wants(&self, event: &InputEvent) -> bool {
            let wanted =
                if matches!(event, InputEvent::Key(..)) { &self.keys } else { &self.pointer };
            wanted.load(Ordering::SeqCst)
        }
        fn has_places(&self) -> bool {
            self.places
        }
        fn send(&self, events: &[InputEvent]) {
            self.batches.lock().unwrap().push(events.to_vec());
        }
    }

    const A: Key = Key(30);
    const AT: InputEvent = InputEvent::At { x: 1, y: 2 };

    fn key(down: bool) -> InputEvent {
        InputEvent::Key(A, down)
    }
    fn button(down: bool) -> InputEvent {
        InputEvent::Button(Button::Left, down)
    }

    #[test]
    fn the_first_one_that_wants_it_gets_it() {
        let keyboard = Fake::new(true, false, false);
        let tablet = Fake::new(false, true, true);
        let ps2 = Fake::new(true, true, false);
        let hub = Hub::new(vec![keyboard.clone(), tablet.clone(), ps2.clone()]);
        hub.send(&[AT, button(true), key(true), AT]);
        assert_eq!(
            tablet.take(),
            [vec![AT, button(true)], vec![AT]],
            "what belongs together stays"
        );
        assert_eq!(keyboard.take(), [[key(true)]]);
        assert!(hub.has_places());
        tablet.pointer.store(false, Ordering::SeqCst);
        assert!(hub.wants(&AT) && !hub.has_places());
        hub.send(&[AT, button(false)]);
        assert_eq!(ps2.take(), [[AT]]);
        assert_eq!(tablet.take(), [[button(false)]], "where it went down");
        ps2.pointer.store(false, Ordering::SeqCst);
        hub.send(&[AT, button(true), button(false)]);
        assert!(!hub.wants(&AT));
        assert!(ps2.take().is_empty() && tablet.take().is_empty(), "nobody listens");
    }

    #[test]
    fn a_release_goes_where_its_press_went() {
        let late = Fake::new(false, false, false);
        let ps2 = Fake::new(true, true, false);
        let hub = Hub::new(vec![ps2.clone()]);
        hub.add(late.clone(), true);
        hub.send(&[key(true)]);
        late.keys.store(true, Ordering::SeqCst);
        hub.send(&[key(true)]);
        assert_eq!(ps2.take(), [[key(true)], [key(true)]], "a repetition, too");
        ps2.keys.store(false, Ordering::SeqCst);
        hub.send(&[key(false), key(false)]);
        assert_eq!(ps2.take(), [[key(false)]], "once");
        hub.send(&[key(true), key(false)]);
        assert_eq!(late.take(), [[key(true), key(false)]]);
        let device: Arc<dyn InputDevice> = late.clone();
        hub.send(&[key(true)]);
        hub.remove(&device);
        hub.send(&[key(false), key(true)]);
        assert_eq!(late.take(), [[key(true)]]);
        for code in 0..5000 {
            ps2.keys.store(true, Ordering::SeqCst);
            hub.send(&[InputEvent::Key(Key(code), true)]);
        }
        assert!(hub.lock().held.len() <= MOST_HELD);
    }
}
