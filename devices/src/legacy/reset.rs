//! The PC's ways to reset: port CF9 and port 92. The third one is the keyboard controller's reset line
//! ([`crate::input::ps2`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// The chipset's reset control register (ICH9, 13.7.5). FADT's RESET_REG.
pub const CF9_PORT: u16 = 0xcf9;
/// System control port A.
pub const PORT_92: u16 = 0x92;

/// Port CF9H: a rising RST_CPU bit resets (ICH9, 13.7.5).
///
/// It lies inside PCI's configuration address port: `pci::Root::set_reset_control` takes it.
pub struct ResetControl {
    power: Arc<dyn PowerSink>,
    value: AtomicU8,
}

impl ResetControl {
    const SYS_RST: u8 = 1 << 1;
    const RST_CPU: u8 = 1 << 2;
    const FULL_RST: u8 = 1 << 3;

    /// What to write for a reset, as in FADT's RESET_VALUE.
    pub const RESET_VALUE: u8 = Self::SYS_RST | Self::RST_CPU | Self::FULL_RST;

    /// The register, clear.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { power, value: AtomicU8::new(0) }
    }

    /// What is saved: the register.
    pub fn save(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }

    /// Puts back what [`ResetControl::save`] gave.
    pub fn restore(&self, value: u8) {
        self.value.store(value & (Self::SYS_RST | Self::FULL_RST), Ordering::Relaxed);
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value.load(Ordering::Relaxed));
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        // RST_CPU is a trigger: it does not stay.
        self.value.store(value & (Self::SYS_RST | Self::FULL_RST), Ordering::Relaxed);
        if value & Self::RST_CPU != 0 {
            self.power.request(PowerRequest::Reset);
        }
    }
}

/// Port 92H: bit 0 resets when it rises, bit 1 is the A20 gate (always open here; kept to be read).
pub struct Port92 {
    power: Arc<dyn PowerSink>,
    value: AtomicU8,
}

impl Port92 {
    const FAST_INIT: u8 = 1;
    const A20: u8 = 1 << 1;

    /// The port with A20 open.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { power, value: AtomicU8::new(Self::A20) }
    }

    /// What is saved: the register.
    pub fn save(&self) -> u8 {
        self.value.load(Ordering::Relaxed)
    }

    /// Puts back what [`Port92::save`] gave.
    pub fn restore(&self, value: u8) {
        self.value.store(value & (Self::FAST_INIT | Self::A20), Ordering::Relaxed);
    }
}

impl BusDevice for Port92 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value.load(Ordering::Relaxed));
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let old = self.value.swap(value & (Self::FAST_INIT | Self::A20), Ordering::Relaxed);
        if value & !old & Self::FAST_INIT != 0 {
            self.power.request(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestPower, hammer};
    use super::*;

    fn byte(device: &dyn BusDevice, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn cf9_resets_on_rst_cpu() {
        let power: Arc<TestPower> = Arc::default();
        let control = ResetControl::new(power.clone());
        control.write(0, &[2]);
        assert_eq!((power.take(), byte(&control, 0)), (vec![], 2));
        control.write(0, &[6]);
        control.write(0, &[ResetControl::RESET_VALUE]);
        assert_eq!(power.take(), [PowerRequest::Reset; 2]);
        assert_eq!(byte(&control, 0), 0x0a, "RST_CPU does not stay");
        control.restore(control.save());
        hammer(&control, 1, 10_000);
    }

    #[test]
    fn port_92_resets_on_a_rising_edge() {
        let power: Arc<TestPower> = Arc::default();
        let port = Port92::new(power.clone());
        assert_eq!(byte(&port, 0), 2);
        port.write(0, &[2]);
        assert_eq!(power.take(), []);
        port.write(0, &[3]);
        port.write(0, &[3]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
        hammer(&port, 1, 10_000);
    }
}
