//! A virtio device's interrupts and the registers that its threads change: status, ISR, vectors.
//!
//! None of it is behind the transport's lock, because a vCPU holds that while it waits for a queue to
//! stop, and the queue's thread interrupts the guest before it does.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use super::super::{Notifier, status};
use crate::pci::{Intx, Msix};

/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Bits of the ISR status.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The way from a device to the guest.
pub(super) struct Interrupts {
    status: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// ISR status; the lock keeps the pin in step with it.
    isr: Mutex<u8>,
    msix: Arc<Msix>,
    intx: Arc<Intx>,
    /// A driver's mistakes are told once for each device: a guest can make as many as it likes.
    complained: AtomicBool,
}

impl Interrupts {
    pub(super) fn new(queues: usize, msix: Arc<Msix>, intx: Arc<Intx>) -> Self {
        Self {
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            msix,
            intx,
            complained: AtomicBool::new(false),
        }
    }

    pub(super) fn msix(&self) -> &Arc<Msix> {
        &self.msix
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets bits of the status; only a reset clears any.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn queue_vector(&self, index: usize) -> u16 {
        self.queue_vectors.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// A vector outside of the table becomes "none", by which the driver sees that it failed.
    fn checked(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.checked(vector), Ordering::SeqCst);
    }

    pub(super) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(index) {
            slot.store(self.checked(vector), Ordering::SeqCst);
        }
    }

    /// Reads the ISR status, which clears it and releases the pin.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.lock_isr();
        self.intx.set(false);
        std::mem::take(&mut *isr)
    }

    pub(super) fn isr(&self) -> u8 {
        *self.lock_isr()
    }

    fn lock_isr(&self) -> std::sync::MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Everything as after power-on. No queue runs.
    pub(super) fn reset(&self) {
        self.take_isr();
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.generation.store(0, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    /// Takes back what was saved (vectors are set one by one).
    pub(super) fn restore(&self, status: u8, isr: u8, generation: u8) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        let mut own = self.lock_isr();
        *own = isr;
        self.intx.set(isr != 0);
    }

    fn raise(&self, vector: u16, isr_bit: u8) {
        if self.msix.enabled() {
            self.msix.signal(vector);
            return;
        }
        let mut isr = self.lock_isr();
        *isr |= isr_bit;
        self.intx.set(true);
    }
}

impl Notifier for Interrupts {
    fn used(&self, index: u16) {
        self.raise(self.queue_vector(index.into()), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status() & status::DRIVER_OK != 0 {
            self.raise(self.config_vector(), ISR_CONFIG);
        }
    }

    fn needs_reset(&self) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!("a virtio device asks its driver for a reset (told once; see debug)");
        }
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK {
            self.raise(self.config_vector(), ISR_CONFIG);
        }
    }
}
