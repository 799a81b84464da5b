//! Guest writes that become signals on eventfds: looked up before the machine's bus is called.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use lodge_memory::Bus;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::vm::IoEvent;

struct Entry {
    at: IoEvent,
    /// The number that the eventfd was given by.
    number: RawFd,
    fd: EventFd,
}

/// The machine's bus with eventfds before it.
pub(super) struct IoEventBus {
    bus: Arc<dyn Bus>,
    /// `entries` is not empty.
    any: AtomicBool,
    entries: RwLock<Vec<Entry>>,
}

impl IoEventBus {
    pub(super) fn new(bus: Arc<dyn Bus>) -> Self {
        Self { bus, any: AtomicBool::new(false), entries: RwLock::default() }
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Entry>> {
        self.entries.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Entry>> {
        self.entries.write().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn add(&self, fd: &EventFd, at: IoEvent) -> Result<()> {
        let mut entries = self.write();
        if entries.iter().any(|e| e.at == at) {
            return Err(Error::Invalid(format!("writes to {at:x?} signal an eventfd already")));
        }
        let copy = fd.try_clone().map_err(|source| Error::Host {
            accel: "soft",
            step: format!("adding an ioeventfd at {at:x?}"),
            source,
        })?;
        entries.push(Entry { at, number: fd.as_raw_fd(), fd: copy });
        self.any.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn remove(&self, fd: &EventFd, at: IoEvent) -> Result<()> {
        let mut entries = self.write();
        let number = fd.as_raw_fd();
        let found =
            entries.iter().position(|e| e.at == at && e.number == number).ok_or_else(|| {
                Error::Invalid(format!("writes to {at:x?} do not signal this eventfd"))
            })?;
        entries.swap_remove(found);
        self.any.store(!entries.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Signals the eventfd for writes to `at`, if there is one.
    fn signal(&self, at: IoEvent) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let entries = self.read();
        let Some(entry) = entries.iter().find(|e| e.at == at) else { return false };
        // It fails only when the counter is full: then it is signalled already.
        let _ = entry.fd.write(1);
        true
    }
}

impl Bus for IoEventBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if !self.signal(IoEvent::Pio(port)) {
            self.bus.pio_write(port, data);
        }
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.bus.mmio_read(gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if !self.signal(IoEvent::Mmio(gpa)) {
            self.bus.mmio_write(gpa, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<u64>>);
    impl Bus for Log {
        fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
        fn pio_write(&self, port: u16, _data: &[u8]) {
            self.0.lock().unwrap().push(port.into());
        }
        fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, gpa: u64, _data: &[u8]) {
            self.0.lock().unwrap().push(gpa);
        }
    }

    #[test]
    fn a_write_signals_or_reaches_the_bus() {
        let log = Arc::new(Log::default());
        let bus = IoEventBus::new(log.clone());
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        bus.add(&fd, IoEvent::Mmio(0x1000)).unwrap();
        bus.add(&fd, IoEvent::Pio(0x50)).unwrap();
        assert!(bus.add(&fd, IoEvent::Pio(0x50)).is_err());
        bus.mmio_write(0x1000, &[0; 4]);
        bus.mmio_write(0x1004, &[0; 4]);
        bus.pio_write(0x50, &[0]);
        assert_eq!(fd.read().unwrap(), 2);
        assert_eq!(*log.0.lock().unwrap(), [0x1004]);
        bus.remove(&fd, IoEvent::Mmio(0x1000)).unwrap();
        assert!(bus.remove(&fd, IoEvent::Mmio(0x1000)).is_err());
        bus.mmio_write(0x1000, &[0; 4]);
        assert!(fd.read().is_err(), "nothing was signalled");
        assert_eq!(*log.0.lock().unwrap(), [0x1004, 0x1000]);
    }
}
