//! Block device (VIRTIO 1.2, section 5.2) in front of a [`Disk`].
//!
//! ```text
//!   virtqueue 0 --> Worker 0 --> DiskQueue 0 --+
//!   virtqueue 1 --> Worker 1 --> DiskQueue 1 --+--> Disk
//! ```
//!
//! Each queue has a thread and a [`lodge_disk::DiskQueue`] of its own; requests run in parallel and complete
//! in any order. Reads and writes go between the disk and guest RAM directly.

mod queue;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lodge_disk::Disk;
use serde::{Deserialize, Serialize};

use self::queue::BlockQueue;
use super::worker::Worker;
use super::{DeviceState, Error, QueueResources, QueueState, VirtioDevice, read_structure};

const DEVICE_TYPE: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// Bytes of a sector, whatever the block size.
const SECTOR: u64 = 512;
/// Data segments of a request, as the driver is told: what is left of a ring beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors of a discard or write-zeroes request at most: 2 GiB.
const RANGE_SECTORS: u32 = 1 << 22;
/// Offset of the writeback field.
const WRITEBACK: u64 = 32;

/// Feature bits (section 5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MULTI_QUEUE: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// What the guest is told of a disk beyond what the disk itself says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockConfig {
    /// The serial number, up to 20 bytes (longer ones are cut).
    pub serial: String,
    /// How many queues: 1..=64, best one for each vCPU.
    pub queues: u16,
}

/// What is saved of a block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockState {
    /// The driver's choice of cache mode: true is writeback.
    pub writeback: bool,
}

/// The device.
pub struct Block {
    disk: Arc<dyn Disk>,
    workers: Vec<Worker<BlockQueue>>,
    features: u64,
    /// Writes are durable only after a flush; otherwise each is made durable by itself.
    writeback: Arc<AtomicBool>,
}

impl Block {
    /// A block device in front of `disk`. Threads are called `name` and the queue's number.
    pub fn new(name: &str, disk: Arc<dyn Disk>, config: &BlockConfig) -> Self {
        let writeback = Arc::new(AtomicBool::new(true));
        let mut serial = [0; request::ID_BYTES];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let workers = (0..config.queues.clamp(1, 64))
            .map(|index| {
                let queue = BlockQueue::new(disk.clone(), serial, writeback.clone());
                Worker::new(format!("{name}.{index}"), queue)
            })
            .collect();
        Self { disk, workers, features: 0, writeback }
    }

    /// The cache mode without a driver's choice: with no flush there must be no cache.
    fn default_writeback(&self) -> bool {
        self.features & (feature::FLUSH | feature::CONFIG_WCE) != 0
    }

    /// The configuration structure (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let block = self.disk.block_size().max(SECTOR as u32);
        // Discards of whole pages: what images and files give back.
        let granularity = block.max(4096) / SECTOR as u32;
        put(0, &(self.disk.size() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &block.to_le_bytes());
        // Topology: physical blocks of 4 KiB, minimum and best I/O size in logical blocks.
        put(24, &[(4096 / block).max(1).trailing_zeros() as u8, 0]);
        put(26, &((4096 / block).max(1) as u16).to_le_bytes());
        put(28, &0u32.to_le_bytes());
        put(32, &[self.writeback.load(Ordering::Relaxed).into()]);
        put(34, &(self.workers.len() as u16).to_le_bytes());
        put(36, &RANGE_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &granularity.to_le_bytes());
        put(48, &RANGE_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        0x01_80_00
    }
    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE;
        if self.workers.len() > 1 {
            features |= feature::MULTI_QUEUE;
        }
        if self.disk.read_only() {
            return features | feature::READ_ONLY;
        }
        features |= feature::WRITE_ZEROES;
        if self.disk.capabilities().discard {
            features |= feature::DISCARD;
        }
        features
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.workers.len()]
    }
    fn set_features(&mut self, features: u64) {
        self.features = features;
        self.writeback.store(self.default_writeback(), Ordering::Relaxed);
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, &[value]) = (offset, data)
            && self.features & feature::CONFIG_WCE != 0
        {
            self.writeback.store(value & 1 != 0, Ordering::Relaxed);
        }
    }
    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        match self.workers.get_mut(usize::from(index)) {
            Some(worker) => worker.start(0, &resources, state),
            None => Err(Error::Queue { index, reason: "there is no such queue" }),
        }
    }
    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.workers.get_mut(usize::from(index))?.stop(0)
    }
    fn reset(&mut self) {
        self.features = 0;
        self.writeback.store(true, Ordering::Relaxed);
    }
    fn state(&self) -> DeviceState {
        DeviceState::Block(BlockState { writeback: self.writeback.load(Ordering::Relaxed) })
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Block(state) = state else {
            return Err(Error::State("it is not one of a disk"));
        };
        self.writeback.store(state.writeback, Ordering::Relaxed);
        Ok(())
    }
}
