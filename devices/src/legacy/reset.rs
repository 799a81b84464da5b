//! The PC's ways to reset: port CF9, port 92 and the keyboard controller's reset line.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// The chipset's reset control register (ICH9, 13.7.5). FADT's RESET_REG.
pub const CF9_PORT: u16 = 0xcf9;
/// System control port A.
pub const PORT_92: u16 = 0x92;
/// The keyboard controller's data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The keyboard controller's status and command port.
pub const I8042_STATUS_PORT: u16 = 0x64;

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

/// The keyboard controller of a machine without a keyboard: it takes commands, and its output port's
/// bit 0 still is the reset line. Guests that look for a keyboard find none.
pub struct I8042Reset {
    power: Arc<dyn PowerSink>,
    state: Mutex<I8042State>,
}

/// What is saved of an [`I8042Reset`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct I8042State {
    /// Waits to be read at port 60H.
    pub output: Option<u8>,
    /// The next byte at port 60H is for the output port.
    pub write_output_port: bool,
}

/// One of the controller's two ports.
struct I8042Port {
    controller: Arc<I8042Reset>,
    is_command: bool,
}

impl I8042Reset {
    const OUTPUT_FULL: u8 = 1;
    const SYSTEM: u8 = 1 << 2;
    const COMMAND: u8 = 1 << 3;
    const UNLOCKED: u8 = 1 << 4;
    const READ_OUTPUT_PORT: u8 = 0xd0;
    const WRITE_OUTPUT_PORT: u8 = 0xd1;
    /// F0..FF pulse those of the output port's low four bits that are clear in the command.
    const PULSE: u8 = 0xf0;
    /// Bit 0: not in reset; bit 1: A20 open.
    const OUTPUT_PORT: u8 = 0b11;

    /// A controller that asks `power` for resets.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { power, state: Mutex::default() }
    }

    /// What answers at [`I8042_DATA_PORT`] (one byte).
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(I8042Port { controller: self.clone(), is_command: false })
    }

    /// What answers at [`I8042_STATUS_PORT`] (one byte).
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(I8042Port { controller: self.clone(), is_command: true })
    }

    /// What is saved.
    pub fn save(&self) -> I8042State {
        *self.lock()
    }

    /// Puts back what [`I8042Reset::save`] gave.
    pub fn restore(&self, state: &I8042State) {
        *self.lock() = *state;
    }

    fn lock(&self) -> MutexGuard<'_, I8042State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, command: u8) {
        let mut state = self.lock();
        state.write_output_port = command == Self::WRITE_OUTPUT_PORT;
        match command {
            Self::READ_OUTPUT_PORT => state.output = Some(Self::OUTPUT_PORT),
            Self::PULSE..=0xff if command & 1 == 0 => {
                drop(state);
                self.power.request(PowerRequest::Reset);
            }
            _ => {}
        }
    }

    fn data(&self, value: u8) {
        let to_output_port = std::mem::take(&mut self.lock().write_output_port);
        if to_output_port && value & 1 == 0 {
            self.power.request(PowerRequest::Reset);
        }
    }

    fn status(&self) -> u8 {
        let full = if self.lock().output.is_some() { Self::OUTPUT_FULL } else { 0 };
        Self::SYSTEM | Self::COMMAND | Self::UNLOCKED | full
    }
}

impl BusDevice for I8042Port {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let value = if self.is_command {
            self.controller.status()
        } else {
            self.controller.lock().output.take().unwrap_or(0)
        };
        data.fill(value);
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(&command) if self.is_command => self.controller.command(command),
            Some(&value) => self.controller.data(value),
            None => {}
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

    #[test]
    fn the_keyboard_controller_resets() {
        let power: Arc<TestPower> = Arc::default();
        let controller = Arc::new(I8042Reset::new(power.clone()));
        let (data, command) = (controller.data_port(), controller.command_port());
        assert_eq!(byte(&*command, 0) & 3, 0, "nothing to read, ready for a command");
        command.write(0, &[0xfe]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
        command.write(0, &[0xff]);
        data.write(0, &[0]);
        assert_eq!(power.take(), [], "pulsing nothing, and a data byte");
        command.write(0, &[0xd0]);
        let saved = controller.save();
        assert_eq!((byte(&*command, 0) & 1, byte(&*data, 0), byte(&*command, 0) & 1), (1, 3, 0));
        controller.restore(&saved);
        assert_eq!(byte(&*data, 0), 3);
        command.write(0, &[0xd1]);
        data.write(0, &[0xfe]);
        assert_eq!(power.take(), [PowerRequest::Reset]);
        hammer(&*data, 1, 10_000);
        hammer(&*command, 1, 10_000);
    }
}
