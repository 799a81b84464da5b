//! Network device (VIRTIO 1.2, section 5.1) in front of one [`Backend`] for each queue pair.
//!
//! ```text
//!   receive 0, transmit 0, control --> Worker 0 --> Backend 0
//!   receive 1, transmit 1          --> Worker 1 --> Backend 1
//! ```
//!
//! What the guest may leave undone in frames (checksums, segmentation) is what the backends can take.

mod control;
mod pair;

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use lodge_net::{Backend, Offloads};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::pair::Pair;
use super::worker::Worker;
use super::{
    DeviceState, Error, Notifier, QueueResources, QueueState, VirtioDevice, read_structure,
};

const DEVICE_TYPE: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Queue pairs at most.
const MOST_PAIRS: usize = 64;

/// Feature bits (section 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MERGEABLE: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CONTROL: u64 = 1 << 17;
    pub const CONTROL_RX: u64 = 1 << 18;
    pub const MULTI_QUEUE: u64 = 1 << 22;
    pub const CONTROL_MAC: u64 = 1 << 23;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;

    /// Each of these needs at least one of those.
    pub const NEEDS: [(u64, u64); 12] = [
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (GUEST_USO4, GUEST_CSUM),
        (GUEST_USO6, GUEST_CSUM),
        (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
        (HOST_USO, CSUM),
        (HOST_ECN, HOST_TSO4 | HOST_TSO6),
        (CONTROL_RX, CONTROL),
        (MULTI_QUEUE, CONTROL),
        (CONTROL_MAC, CONTROL),
    ];
}

/// What the guest is told of a card beyond what the backends say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// The card's address.
    pub mac: [u8; 6],
    /// The network's MTU, if the guest shall know (at least 1280).
    pub mtu: Option<u16>,
}

/// What is saved of a network card.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetState {
    /// The address, which the guest may have changed.
    pub mac: [u8; 6],
    /// Queue pairs in use.
    pub pairs: u16,
    /// The cable is plugged in.
    pub link: bool,
}

/// What the threads of a card share.
struct Shared {
    mac: Mutex<[u8; 6]>,
    /// The host's choice, and whether the networks are alive.
    link: AtomicBool,
    /// Queue pairs that the driver uses.
    active: AtomicU16,
    /// Signalled when `active` changed, for each pair's thread.
    update: Vec<EventFd>,
    notifier: OnceLock<Arc<dyn Notifier>>,
}

impl Shared {
    fn mac(&self) -> MutexGuard<'_, [u8; 6]> {
        self.mac.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sets how many queue pairs are in use; `false` if there are not so many.
    fn set_active(&self, pairs: u16) -> bool {
        if pairs == 0 || usize::from(pairs) > self.update.len() {
            return false;
        }
        self.active.store(pairs, Ordering::SeqCst);
        for update in &self.update {
            let _ = update.write(1); // Fails when full: then the thread is on its way.
        }
        true
    }

    fn set_link(&self, up: bool) {
        if self.link.swap(up, Ordering::SeqCst) != up
            && let Some(notifier) = self.notifier.get()
        {
            notifier.config_changed();
        }
    }
}

/// The host's side of a network card.
#[derive(Clone)]
pub struct NetHandle(Arc<Shared>);

impl NetHandle {
    /// Plugs the cable in or pulls it.
    pub fn set_link(&self, up: bool) {
        self.0.set_link(up);
    }

    /// The card's address now.
    pub fn mac(&self) -> [u8; 6] {
        *self.0.mac()
    }
}

/// The device.
pub struct Net {
    config: NetConfig,
    shared: Arc<Shared>,
    offloads: Offloads,
    features: u64,
    pairs: Vec<Worker<Pair>>,
}

impl Net {
    /// A card with one queue pair for each of `backends` (1..=64, further ones are dropped). Threads are called
    /// `name` and the pair's number.
    ///
    /// # Errors
    /// When the host has no more descriptors, or there is no backend.
    pub fn new(
        name: &str,
        mut backends: Vec<Box<dyn Backend>>,
        config: NetConfig,
    ) -> Result<Self, Error> {
        backends.truncate(MOST_PAIRS);
        if backends.is_empty() {
            return Err(Error::State("a network card needs a backend"));
        }
        let offloads =
            backends.iter().fold(Offloads::all(), |common, backend| common & backend.offloads());
        let update = backends
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()
            .map_err(Error::host("create an eventfd"))?;
        let shared = Arc::new(Shared {
            mac: Mutex::new(config.mac),
            link: AtomicBool::new(true),
            active: AtomicU16::new(1),
            update,
            notifier: OnceLock::new(),
        });
        let pairs = backends
            .into_iter()
            .enumerate()
            .map(|(index, backend)| {
                let pair = Pair::new(index, backend, shared.clone());
                Worker::new(format!("{name}.{index}"), pair)
            })
            .collect();
        Ok(Self { config, shared, offloads, features: 0, pairs })
    }

    /// The host's side.
    pub fn handle(&self) -> NetHandle {
        NetHandle(self.shared.clone())
    }

    /// The worker and its slot for queue `index`. The control queue comes after the last pair, and after
    /// the first one when the driver does not know of more (section 5.1.2).
    fn place(&mut self, index: u16) -> Option<(&mut Worker<Pair>, usize)> {
        let multi = self.features & feature::MULTI_QUEUE != 0;
        let pairs = if multi { self.pairs.len() } else { 1 };
        let index = usize::from(index);
        if index == 2 * pairs {
            return Some((self.pairs.first_mut()?, pair::CONTROL));
        }
        (index < 2 * pairs).then_some(())?;
        Some((self.pairs.get_mut(index / 2)?, index % 2))
    }

    /// The configuration structure (section 5.1.4).
    fn structure(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&*self.shared.mac());
        bytes[6..8]
            .copy_from_slice(&u16::from(self.shared.link.load(Ordering::SeqCst)).to_le_bytes());
        bytes[8..10].copy_from_slice(&(self.pairs.len() as u16).to_le_bytes());
        bytes[10..].copy_from_slice(&self.config.mtu.unwrap_or(0).to_le_bytes());
        bytes
    }
}

/// What the driver accepts in frames it receives.
fn accepted(features: u64) -> Offloads {
    let mut accepted = Offloads::empty();
    for (bits, offload) in [
        (feature::GUEST_CSUM, Offloads::CHECKSUM),
        (feature::GUEST_TSO4, Offloads::TSO4),
        (feature::GUEST_TSO6, Offloads::TSO6),
        (feature::GUEST_ECN, Offloads::ECN),
        (feature::GUEST_USO4 | feature::GUEST_USO6, Offloads::USO),
    ] {
        accepted.set(offload, features & bits == bits);
    }
    accepted
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        0x02_00_00
    }
    fn features(&self) -> u64 {
        let mut features = feature::MAC
            | feature::MERGEABLE
            | feature::STATUS
            | feature::CONTROL
            | feature::CONTROL_RX
            | feature::CONTROL_MAC;
        for (offload, bits) in [
            (Offloads::CHECKSUM, feature::CSUM | feature::GUEST_CSUM),
            (Offloads::TSO4, feature::HOST_TSO4 | feature::GUEST_TSO4),
            (Offloads::TSO6, feature::HOST_TSO6 | feature::GUEST_TSO6),
            (Offloads::ECN, feature::HOST_ECN | feature::GUEST_ECN),
            (Offloads::USO, feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6),
        ] {
            if self.offloads.contains(offload) {
                features |= bits;
            }
        }
        if self.config.mtu.is_some() {
            features |= feature::MTU;
        }
        if self.pairs.len() > 1 {
            features |= feature::MULTI_QUEUE;
        }
        features
    }
    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.pairs.len()];
        sizes.push(CONTROL_SIZE);
        sizes
    }
    fn accepts(&self, features: u64) -> bool {
        let missing = |(bit, needs): &(u64, u64)| features & bit != 0 && features & needs == 0;
        !feature::NEEDS.iter().any(missing)
    }
    fn set_features(&mut self, features: u64) {
        self.features = features;
        for worker in &mut self.pairs {
            if let Some(pair) = worker.handler() {
                pair.set_features(features & feature::MERGEABLE != 0, accepted(features));
            }
        }
    }
    fn set_notifier(&mut self, notifier: Arc<dyn Notifier>) {
        let _ = self.shared.notifier.set(notifier); // Called once.
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.structure(), offset, data);
    }
    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        match self.place(index) {
            Some((worker, slot)) => worker.start(slot, &resources, state),
            None => Err(Error::Queue { index, reason: "the driver did not negotiate so many" }),
        }
    }
    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let (worker, slot) = self.place(index)?;
        worker.stop(slot)
    }
    fn reset(&mut self) {
        self.features = 0;
        *self.shared.mac() = self.config.mac;
        self.shared.set_active(1);
        for worker in &mut self.pairs {
            if let Some(pair) = worker.handler() {
                pair.reset();
            }
        }
    }
    fn state(&self) -> DeviceState {
        DeviceState::Net(NetState {
            mac: *self.shared.mac(),
            pairs: self.shared.active.load(Ordering::SeqCst),
            link: self.shared.link.load(Ordering::SeqCst),
        })
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Net(state) = state else {
            return Err(Error::State("it is not one of a network card"));
        };
        if !self.shared.set_active(state.pairs) {
            return Err(Error::State("it had more queue pairs"));
        }
        *self.shared.mac() = state.mac;
        self.shared.link.store(state.link, Ordering::SeqCst);
        Ok(())
    }
}
