//! Console device (VIRTIO 1.2, section 5.3): one port, `hvc0` in Linux.
//!
//! ```text
//!   ConsoleHandle::input --> buffer --> receive queue (0) --> guest
//!   ConsoleOutput <-- transmit queue (1), emergency write <-- guest
//! ```

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::{Handler, Poll, Worker};
use super::{
    DeviceState, Error, Notifier, QueueResources, QueueState, VirtioDevice, Virtqueue,
    read_structure,
};

const DEVICE_TYPE: u16 = 3;
const QUEUE_SIZE: u16 = 128;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Feature bits: columns and rows are valid; the emergency write register works.
const F_SIZE: u64 = 1 << 0;
const F_EMERGENCY_WRITE: u64 = 1 << 2;
/// Offset of the emergency write register.
const EMERGENCY_WRITE: u64 = 8;
/// Bytes of input that wait for the guest at most.
const INPUT_LIMIT: usize = 64 << 10;
/// Bytes of output handed on at a time.
const OUTPUT_PIECE: usize = 4096;
/// Token of the input's eventfd.
const INPUT: u32 = 0;

/// Where a console's output goes. Called in the device's thread (a vCPU's for emergency writes).
///
/// A writer that blocks holds back the guest's output, and also a pause or reset of the device until
/// it goes on: give it one that buffers where the reader may stall.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// What is saved of a console.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleState {
    /// Columns and rows.
    pub size: (u16, u16),
    /// Input that the guest has not taken yet.
    pub input: Vec<u8>,
}

struct Shared {
    input: Mutex<VecDeque<u8>>,
    size: Mutex<(u16, u16)>,
    /// Signalled when there is input.
    wake: EventFd,
    output: Mutex<ConsoleOutput>,
    notifier: OnceLock<Arc<dyn Notifier>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Shared {
    fn write(&self, data: &[u8]) {
        let mut output = lock(&self.output);
        // A terminal that has gone is no reason to stop the guest; its output is lost.
        if let Err(error) = output.write_all(data).and_then(|()| output.flush()) {
            tracing::debug!(%error, "console output is lost");
        }
    }
}

/// The host's side of a console. Clones are the same console.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    /// Gives input to the guest; returns how many bytes were taken (others find the buffer full).
    pub fn input(&self, data: &[u8]) -> usize {
        let mut input = lock(&self.0.input);
        let room = INPUT_LIMIT.saturating_sub(input.len()).min(data.len());
        input.extend(&data[..room]);
        let _ = self.0.wake.write(1); // Fails when full: then the thread is on its way.
        room
    }

    /// The terminal has another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        *lock(&self.0.size) = (columns, rows);
        if let Some(notifier) = self.0.notifier.get() {
            notifier.config_changed();
        }
    }
}

/// The device.
pub struct Console {
    shared: Arc<Shared>,
    worker: Worker<Port>,
}

impl Console {
    /// A console of 80 by 25. `name` is that of its thread.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(name: &str, output: ConsoleOutput) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            input: Mutex::default(),
            size: Mutex::new((80, 25)),
            wake: EventFd::new(EFD_NONBLOCK).map_err(Error::host("create an eventfd"))?,
            output: Mutex::new(output),
            notifier: OnceLock::new(),
        });
        let port = Port { shared: shared.clone(), queues: [None, None] };
        Ok(Self { shared, worker: Worker::new(name, port) })
    }

    /// The host's side.
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle(self.shared.clone())
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        0x07_80_00
    }
    fn features(&self) -> u64 {
        F_SIZE | F_EMERGENCY_WRITE
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }
    fn set_features(&mut self, _features: u64) {}
    fn set_notifier(&mut self, notifier: Arc<dyn Notifier>) {
        let _ = self.shared.notifier.set(notifier); // Called once.
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = *lock(&self.shared.size);
        let mut config = [0; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4] = 1; // max_nr_ports
        read_structure(&config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == EMERGENCY_WRITE
            && let Some(&byte) = data.first()
        {
            self.shared.write(&[byte]);
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
    fn reset(&mut self) {}
    fn state(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            size: *lock(&self.shared.size),
            input: lock(&self.shared.input).iter().copied().collect(),
        })
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Console(state) = state else {
            return Err(Error::State("it is not one of a console"));
        };
        *lock(&self.shared.size) = state.size;
        *lock(&self.shared.input) = state.input.iter().copied().take(INPUT_LIMIT).collect();
        Ok(())
    }
}

/// The thread's side: both queues.
struct Port {
    shared: Arc<Shared>,
    queues: [Option<Virtqueue>; 2],
}

impl Port {
    /// Input goes to the guest for as long as there are both bytes and buffers.
    fn receive(&mut self) {
        let Some(queue) = &mut self.queues[RECEIVE] else { return };
        let shared = &self.shared;
        queue.process(|queue, chain| {
            let mut input = lock(&shared.input);
            let room = usize::try_from(chain.writable_len()).unwrap_or(INPUT_LIMIT);
            if input.is_empty() && room > 0 {
                return false;
            }
            let data: Vec<u8> = {
                let count = room.min(input.len());
                input.drain(..count).collect()
            };
            drop(input);
            let written = chain.write(queue.memory(), 0, &data);
            queue.push(chain.head, written as u32);
            true
        });
    }

    fn transmit(&mut self) {
        let Some(queue) = &mut self.queues[TRANSMIT] else { return };
        let shared = &self.shared;
        queue.process(|queue, chain| {
            let mut piece = [0; OUTPUT_PIECE];
            let mut offset = 0;
            loop {
                let got = chain.read(queue.memory(), offset, &mut piece);
                if got == 0 {
                    break;
                }
                shared.write(&piece[..got]);
                offset += got as u64;
            }
            queue.push(chain.head, 0);
            true
        });
    }
}

impl Handler for Port {
    fn start(&mut self, slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error> {
        if slot == RECEIVE {
            poll.add(self.shared.wake.as_raw_fd(), EventSet::IN, INPUT)
                .map_err(Error::host("wait for console input"))?;
        }
        if let Some(place) = self.queues.get_mut(slot) {
            *place = Some(queue);
        }
        Ok(())
    }

    fn kicked(&mut self, slot: usize, _poll: &Poll) {
        if slot == RECEIVE { self.receive() } else { self.transmit() }
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) {
        let _ = self.shared.wake.read(); // Only resets the counter.
        self.receive();
    }

    fn stop(&mut self, slot: usize, poll: &Poll) -> Option<Virtqueue> {
        if slot == RECEIVE {
            poll.remove(self.shared.wake.as_raw_fd());
        }
        self.queues.get_mut(slot)?.take()
    }
}
