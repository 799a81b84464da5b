//! Virtio 1.2: paravirtual devices over PCI.
//!
//! ```text
//!   vCPU threads                              I/O threads
//!   registers --> VirtioPci (transport) --start_queue(index, resources, state)--> VirtioDevice
//!                 owns the queues       <------------ stop_queue -> state ------- its workers
//!                      |                                                            |
//!   kick (eventfd) ----+-------------------------------------> Worker: epoll loop --+-- Virtqueue
//!                                                                   |
//!   MSI-X, INTx <------------- Notifier <---------------------------+
//! ```
//!
//! Starting a queue with a state and stopping it for a state is the one mechanism behind reset, pause,
//! save and restore. A stopped queue has nothing in flight: the state is two ring positions.

pub mod block;
mod chain;
pub mod console;
mod device;
pub mod gpu;
pub mod input;
pub mod net;
mod queue;
pub mod rng;
pub mod scsi;
mod transport;
mod worker;

pub use block::{Block, BlockConfig, BlockState};
pub use chain::{Chain, Malformed, Segment};
pub use console::{Console, ConsoleHandle, ConsoleOutput, ConsoleState};
pub use device::{DeviceState, Notifier, QueueResources, QueueState, VirtioDevice};
pub use gpu::{Gpu, GpuHandle, GpuState};
pub use input::{Input, InputHandle, InputKind, InputState};
pub use net::{Net, NetConfig, NetHandle, NetState};
pub use queue::Virtqueue;
pub use rng::Rng;
pub use scsi::{Scsi, ScsiHandle, ScsiState, ScsiUnit};
pub use transport::{QueueRegisters, TransportState, VirtioPci};
pub use worker::{Handler, Poll, Worker};

/// Feature bits of every device (VIRTIO 1.2, section 6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by ring index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device is not a legacy one.
    pub const VERSION_1: u64 = 1 << 32;
    /// What the transport offers for every device.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// Bits of the device status (VIRTIO 1.2, section 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready; queues run.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is finished.
    pub const FEATURES_OK: u8 = 8;
    /// The device gave up on what the driver did.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver gave up.
    pub const FAILED: u8 = 0x80;
}

/// Why a virtio device could not do what the machine asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver set a queue up in a way that cannot work.
    #[error("queue {index} cannot run: {reason}")]
    Queue {
        /// Which queue.
        index: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// The host refused a step.
    #[error("cannot {step} for a virtio device")]
    Host {
        /// What was being done.
        step: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The disk refused a queue.
    #[error("the disk gives no queue")]
    Disk(#[from] lodge_disk::Error),
    /// What was saved does not fit this device.
    #[error("saved virtio state does not fit the device: {0}")]
    State(&'static str),
    /// The PCI part of what was saved does not fit.
    #[error(transparent)]
    Pci(#[from] crate::pci::Error),
}

impl Error {
    /// An [`Error::Host`], for `map_err`.
    fn host(step: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Host { step, source }
    }
}

/// Copies the part of a device's configuration structure that a read asks for; zeroes beyond its end.
fn read_structure(structure: &[u8], offset: u64, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = usize::try_from(offset)
            .ok()
            .and_then(|offset| structure.get(offset.checked_add(i)?))
            .copied()
            .unwrap_or(0);
    }
}
