//! GPU device (VIRTIO 1.2, section 5.7): a display without 3D, with one screen and a pointer.
//!
//! ```text
//!   driver: create a resource, attach its memory, make it the scanout; then, again and again: draw, transfer, flush
//!
//!   control queue (0), cursor queue (1) --> Worker --> Display (under a lock) <--refresh-- GpuHandle: Screen
//!                                                          |
//!   configuration interrupt  <---- another size is wanted -+<--suggest_size--
//! ```

mod display;
mod protocol;
mod resource;
mod saved;
#[cfg(test)]
mod tests;
mod with_vga;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use vmm_sys_util::epoll::EventSet;

use self::display::Display;
use self::protocol::Message;
pub use self::saved::{GpuCursor, GpuResource, GpuScanout, GpuState, Pixels};
pub use self::with_vga::VgaGpuScreen;
use super::worker::{Handler, Poll, Worker};
use super::{
    DeviceState, Error, Notifier, QueueResources, QueueState, VirtioDevice, Virtqueue,
    read_structure,
};
use crate::display::{Picture, Screen, Update};

const DEVICE_TYPE: u16 = 16;
const CONTROL_SIZE: u16 = 256;
const CURSOR_SIZE: u16 = 64;
/// Feature bit: the driver can ask for the EDID.
const F_EDID: u64 = 1 << 1;
/// Configuration event: the display information changed.
const EVENT_DISPLAY: u32 = 1 << 0;
/// Bytes that requests may copy before other events, such as a stop, have their turn.
const MOST_AT_ONCE: u64 = 64 << 20;
/// Offset of the register that clears events.
const EVENTS_CLEAR: u64 = 4;

struct Shared {
    display: Mutex<Display>,
    notifier: OnceLock<Arc<dyn Notifier>>,
    /// A driver has negotiated with the device.
    driven: AtomicBool,
    with_edid: AtomicBool,
    /// Requests of all drivers so far.
    requests: AtomicU64,
}

impl Shared {
    fn display(&self) -> MutexGuard<'_, Display> {
        self.display.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The host's side of a display: its screen. Clones are the same display.
#[derive(Clone)]
pub struct GpuHandle(Arc<Shared>);

impl GpuHandle {
    /// Whether the driver shows something.
    pub fn active(&self) -> bool {
        self.0.display().active()
    }

    /// Where the driver has put its pointer, in pixels of the screen.
    pub fn position(&self) -> (u32, u32) {
        self.0.display().position()
    }

    /// How many requests drivers have made since the device exists.
    pub fn requests(&self) -> u64 {
        self.0.requests.load(Ordering::SeqCst)
    }

    /// The next [`Screen::refresh`] draws everything, and tells of the pointer.
    pub fn redraw(&self) {
        self.0.display().redraw();
    }
}

impl Screen for GpuHandle {
    fn refresh(&self, picture: &mut Picture) -> Update {
        self.0.display().refresh(picture)
    }

    /// False while no driver listens; it will find the size when one does.
    fn suggest_size(&self, width: u32, height: u32) -> bool {
        let changed = self.0.display().prefer(width, height);
        if changed && let Some(notifier) = self.0.notifier.get() {
            notifier.config_changed();
        }
        self.0.driven.load(Ordering::SeqCst)
    }
}

/// The device.
pub struct Gpu {
    shared: Arc<Shared>,
    worker: Worker<Queues>,
}

impl Gpu {
    /// A display that likes `preferred` (columns, rows) best until a viewer wants something else. `name` is that of
    /// its thread.
    pub fn new(name: &str, preferred: (u32, u32)) -> Self {
        let mut display = Display::new((0, 0));
        display.prefer(preferred.0, preferred.1);
        display.acknowledge();
        let shared = Arc::new(Shared {
            display: Mutex::new(display),
            notifier: OnceLock::new(),
            driven: AtomicBool::new(false),
            with_edid: AtomicBool::new(false),
            requests: AtomicU64::new(0),
        });
        let queues = Queues { shared: shared.clone(), queues: [None, None] };
        Self { shared, worker: Worker::new(name, queues) }
    }

    /// The host's side.
    pub fn handle(&self) -> GpuHandle {
        GpuHandle(self.shared.clone())
    }
}

impl VirtioDevice for Gpu {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        0x03_80_00
    }
    fn features(&self) -> u64 {
        F_EDID
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![CONTROL_SIZE, CURSOR_SIZE]
    }
    fn set_features(&mut self, features: u64) {
        self.shared.with_edid.store(features & F_EDID != 0, Ordering::SeqCst);
        self.shared.driven.store(true, Ordering::SeqCst);
    }
    fn set_notifier(&mut self, notifier: Arc<dyn Notifier>) {
        let _ = self.shared.notifier.set(notifier); // Called once.
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        let events = if self.shared.display().event() { EVENT_DISPLAY } else { 0 };
        config[..4].copy_from_slice(&events.to_le_bytes());
        config[8] = 1; // num_scanouts
        read_structure(&config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == EVENTS_CLEAR && data.first().is_some_and(|low| *low & 1 != 0) {
            self.shared.display().acknowledge();
        }
    }
    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        self.worker.start(index.into(), &resources, state)
    }
    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.worker.stop(index.into())
    }
    fn reset(&mut self) {
        self.shared.display().reset();
        self.shared.driven.store(false, Ordering::SeqCst);
    }
    fn state(&self) -> DeviceState {
        DeviceState::Gpu(self.shared.display().save())
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Gpu(state) = state else {
            return Err(Error::State("it is not one of a display"));
        };
        let restored = Display::restore(state)
            .map_err(|_| Error::State("its resources are not ones that a display can have"))?;
        *self.shared.display() = restored;
        Ok(())
    }
}

/// The thread's side: both queues, which differ in nothing but what drivers send.
struct Queues {
    shared: Arc<Shared>,
    queues: [Option<Virtqueue>; 2],
}

impl Handler for Queues {
    fn start(&mut self, slot: usize, queue: Virtqueue, _poll: &Poll) -> Result<(), Error> {
        if let Some(place) = self.queues.get_mut(slot) {
            *place = Some(queue);
        }
        Ok(())
    }

    fn kicked(&mut self, slot: usize, _poll: &Poll) {
        let Some(Some(queue)) = self.queues.get_mut(slot) else { return };
        let shared = &self.shared;
        let mut moved = 0;
        queue.process(|queue, chain| {
            if moved > MOST_AT_ONCE {
                let _ = queue.kick().write(1); // Fails when full: then a kick is on its way.
                return false;
            }
            let memory = queue.memory().clone();
            match Message::read(&memory, &chain) {
                Ok(message) => {
                    let with_edid = shared.with_edid.load(Ordering::SeqCst);
                    let mut display = shared.display();
                    let written = display.execute(&message, with_edid);
                    moved += display.take_moved();
                    drop(display);
                    shared.requests.fetch_add(1, Ordering::SeqCst);
                    queue.push(chain.head, written);
                }
                Err(malformed) => queue.fail(malformed),
            }
            true
        });
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) {}

    fn stop(&mut self, slot: usize, _poll: &Poll) -> Option<Virtqueue> {
        self.queues.get_mut(slot)?.take()
    }
}
