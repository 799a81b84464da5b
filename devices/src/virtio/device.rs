//! What a virtio device is to its transport, and the transport to it.

use std::sync::Arc;

use lodge_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{BlockState, ConsoleState, Error, GpuState, InputState, NetState, ScsiState};

/// How a device's threads reach the guest's driver.
pub trait Notifier: Send + Sync {
    /// Buffers of queue `index` were used: raises its interrupt.
    fn used(&self, index: u16);
    /// The configuration structure changed: next generation, configuration interrupt.
    fn config_changed(&self);
    /// The driver did something the device cannot go on from: sets DEVICE_NEEDS_RESET.
    fn needs_reset(&self);
}

/// What a queue runs on: where its rings are, and how both sides wake each other.
#[derive(Clone)]
pub struct QueueResources {
    /// The queue's number.
    pub index: u16,
    /// Entries: a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest-physical address of the device area (used ring).
    pub device: u64,
    /// Negotiated: VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// Negotiated: VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// Signalled when the driver notifies the queue (non-blocking).
    pub kick: Arc<EventFd>,
    /// The way back.
    pub notifier: Arc<dyn Notifier>,
}

/// Where a stopped queue goes on. Nothing is in flight: both positions are complete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueState {
    /// Index into the available ring of the next chain to take.
    pub next_avail: u16,
    /// Index into the used ring of the next element to write.
    pub next_used: u16,
}

/// What is saved of a device beside its transport and queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "device", rename_all = "kebab-case")]
pub enum DeviceState {
    /// A disk.
    Block(BlockState),
    /// A network card.
    Net(NetState),
    /// A console.
    Console(ConsoleState),
    /// A display.
    Gpu(GpuState),
    /// A source of randomness has no state.
    Rng,
    /// A SCSI controller with its units.
    Scsi(ScsiState),
    /// A keyboard or tablet.
    Input(InputState),
}

/// A virtio device without its transport.
///
/// The transport calls it with its own lock held, from vCPU threads and the control thread. Queue
/// work happens in threads of the device's own.
pub trait VirtioDevice: Send {
    /// Device type (VIRTIO 1.2, section 5).
    fn device_type(&self) -> u16;

    /// PCI class code: 0xCCSSPP.
    fn class(&self) -> u32;

    /// The device's own feature bits; the transport adds [`super::feature::TRANSPORT`].
    fn features(&self) -> u64;

    /// The largest size of each queue; fixes how many there are (1..=1024).
    fn queue_sizes(&self) -> Vec<u16>;

    /// Whether the driver's choice, a subset of what was offered, makes sense as a whole.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// The driver's choice. Called before any queue starts.
    fn set_features(&mut self, features: u64);

    /// Gives the device its way to the driver, for changes of configuration. Called once.
    fn set_notifier(&mut self, notifier: Arc<dyn Notifier>) {
        let _ = notifier;
    }

    /// Reads the configuration structure; zeroes beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration structure; read-only fields ignore it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Starts queue `index` where `state` says.
    ///
    /// # Errors
    /// When the rings are unusable or the host lacks something; the queue is not started.
    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error>;

    /// Stops queue `index`: takes no new chain, waits for what is in flight, and says where it stands.
    /// `None` if it was not running.
    fn stop_queue(&mut self, index: u16) -> Option<QueueState>;

    /// Back to what the device was at power-on. All queues are stopped.
    fn reset(&mut self);

    /// What is saved. All queues are stopped.
    fn state(&self) -> DeviceState;

    /// Takes back what was saved, after [`VirtioDevice::set_features`]. All queues are stopped.
    ///
    /// # Errors
    /// When the state is another kind of device's.
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error>;
}
