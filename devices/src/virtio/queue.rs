//! A running virtqueue, as a device's thread has it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use lodge_memory::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Malformed};
use super::{Error, Notifier, QueueResources, QueueState};

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// A running queue. Dropping it leaves the rings as they are; [`Virtqueue::state`] says where.
pub struct Virtqueue {
    queue: Queue,
    index: u16,
    indirect: bool,
    memory: Arc<GuestMemory>,
    kick: Arc<EventFd>,
    notifier: Arc<dyn Notifier>,
    /// Chains were pushed since the driver was last told.
    pushed: bool,
    /// The driver broke the rules; nothing is taken until the device is reset.
    broken: bool,
}

impl Virtqueue {
    /// A queue over `resources`, going on at `state`.
    ///
    /// # Errors
    /// When size, alignment or place of the rings are impossible.
    pub fn new(resources: &QueueResources, state: QueueState) -> Result<Self, Error> {
        let refuse = |reason| Error::Queue { index: resources.index, reason };
        let mut queue = Queue::new(resources.size)
            .map_err(|_| refuse("its size is 0, not a power of two, or above 32768"))?;
        queue
            .try_set_desc_table_address(GuestAddress(resources.descriptors))
            .map_err(|_| refuse("the descriptor table is not aligned to 16"))?;
        queue
            .try_set_avail_ring_address(GuestAddress(resources.driver))
            .map_err(|_| refuse("the available ring is not aligned to 2"))?;
        queue
            .try_set_used_ring_address(GuestAddress(resources.device))
            .map_err(|_| refuse("the used ring is not aligned to 4"))?;
        queue.set_event_idx(resources.event_idx);
        queue.set_next_avail(state.next_avail);
        queue.set_next_used(state.next_used);
        queue.set_ready(true);
        if resources.driver == 0 || !queue.is_valid(&*resources.memory) {
            return Err(refuse("a ring is outside of RAM"));
        }
        Ok(Self {
            queue,
            index: resources.index,
            indirect: resources.indirect,
            memory: resources.memory.clone(),
            kick: resources.kick.clone(),
            notifier: resources.notifier.clone(),
            pushed: false,
            broken: false,
        })
    }

    /// Guest RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Signalled by the driver.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The driver broke the rules: marks the queue and tells the driver.
    pub fn fail(&mut self, reason: Malformed) {
        if !self.broken {
            tracing::debug!(queue = self.index, %reason, "a virtio driver broke the rules");
            self.broken = true;
            self.notifier.needs_reset();
        }
    }

    /// Takes the next chain, if there is one. A malformed one stops the queue ([`Virtqueue::fail`]).
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        let head = match self.queue.iter(&*self.memory) {
            Ok(mut heads) => heads.next().map(|chain| chain.head_index()),
            Err(_) => {
                self.fail(Malformed::Ring);
                None
            }
        }?;
        let table = self.queue.desc_table();
        match Chain::walk(&self.memory, table, self.queue.size(), head, self.indirect) {
            Ok(chain) => Some(chain),
            Err(reason) => {
                self.fail(reason);
                None
            }
        }
    }

    /// Gives back the chain that the last [`Virtqueue::pop`] took, unused.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives chain `head` back to the driver with `written` bytes in its writable part.
    pub fn push(&mut self, head: u16, written: u32) {
        self.pushed = true;
        if self.queue.add_used(&*self.memory, head, written).is_err() {
            self.fail(Malformed::Ring);
        }
    }

    /// Interrupts the driver if it wants to know of what was pushed since the last call.
    pub fn notify(&mut self) {
        if !std::mem::take(&mut self.pushed) {
            return;
        }
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.memory).unwrap_or(true)
        } else {
            // The fence that must lie between the used index and the flags.
            std::sync::atomic::fence(Ordering::SeqCst);
            let flags =
                self.memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
            flags.map_or(true, |flags| u16::from_le(flags) & NO_INTERRUPT == 0)
        };
        if wanted {
            self.notifier.used(self.index);
        }
    }

    /// Asks the driver not to kick while the queue is being worked on (a hint).
    pub fn mute(&mut self) {
        if self.queue.disable_notification(&*self.memory).is_err() {
            self.fail(Malformed::Ring);
        }
    }

    /// Asks the driver to kick again; `true` if more chains came in the meantime and no kick will come
    /// for those.
    pub fn unmute(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(_) => {
                self.fail(Malformed::Ring);
                false
            }
        }
    }

    /// Works on all available chains. `work` pushes (or keeps) each one and returns `true`; or it returns
    /// `false`: the chain goes back, and kicks stay muted until somebody calls this again.
    ///
    /// A driver that is faster than the device cannot hold the thread: after a few rounds of the
    /// ring the queue kicks itself, and other events have their turn.
    pub fn process(&mut self, mut work: impl FnMut(&mut Self, Chain) -> bool) {
        let mut budget = 4 * u32::from(self.size());
        self.mute();
        loop {
            while let Some(chain) = self.pop() {
                if !work(self, chain) {
                    self.unpop();
                    self.notify();
                    return;
                }
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    self.notify();
                    let _ = self.kick.write(1); // Fails when full: then a kick is on its way.
                    return;
                }
            }
            self.notify();
            if !self.unmute() {
                return;
            }
        }
    }

    /// Where the queue stands.
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }
}
