//! The parts of a PC that are not on PCI and that every guest expects: serial ports, clock, power
//! management, the ways to reset, and a few ports for debugging.
//!
//! ```text
//!   port        part                          interrupt
//!   070..072    RTC and CMOS                  IRQ 8   (edge)
//!   080         POST code
//!   092         fast reset, A20
//!   0F4         debug exit (tests only)
//!   2F8..300    COM2                          IRQ 3   (edge)
//!   3F8..400    COM1                          IRQ 4   (edge)
//!   600..680    ACPI power management         GSI 9   (level)
//!   CF9         reset control (inside PCI's CF8..D00)
//! ```
//!
//! Each part raises its interrupt through an [`IrqLine`] and asks for an end or a reset through a
//! [`PowerSink`]; neither knows the machine. PIC, IOAPIC, LAPIC and PIT are the accelerator's.

use std::sync::mpsc::Sender;

use crate::irq::Line;

mod calendar;
mod debug;
mod output;
mod pm;
mod reset;
mod rtc;
mod serial;
mod timer;

pub use debug::{DEBUG_EXIT_PORT, DebugExit, POST_PORT, PostCode};
pub use output::SerialOutput;
pub use pm::{
    GPE0_BLOCK, GPE0_LEN, PM_BASE, PM_LEN, PM_TIMER_BLOCK, PM1_CONTROL_BLOCK, PM1_EVENT_BLOCK,
    PmState, PowerManagement, S5_SLEEP_TYPE, SCI_GSI,
};
pub use reset::{CF9_PORT, PORT_92, Port92, ResetControl};
pub use rtc::{HostClock, RTC_IRQ, RTC_PORTS, RTC_PORTS_LEN, Rtc, RtcSetup, RtcState, WallClock};
pub use serial::{COM1, COM2, SERIAL_LEN, Serial, SerialPort, SerialState};

/// An interrupt line from a device to the interrupt controllers.
pub trait IrqLine: Send + Sync {
    /// Drives the line; the same level twice changes nothing.
    fn set_level(&self, level: bool);
}

impl IrqLine for Line {
    fn set_level(&self, level: bool) {
        self.set(level);
    }
}

/// A line that leads nowhere.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set_level(&self, _level: bool) {}
}

/// What a guest asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off (ACPI S5): the machine ends.
    PowerOff,
    /// A hardware reset.
    Reset,
    /// A test guest ends with this value ([`DebugExit`]).
    DebugExit(u32),
}

/// Who hears of [`PowerRequest`]s. Called in vCPU threads: it must only pass the request on.
///
/// The vCPU that asked goes on running until it is stopped.
pub trait PowerSink: Send + Sync {
    /// The guest asks for this.
    fn request(&self, request: PowerRequest);
}

impl<T: From<PowerRequest> + Send> PowerSink for Sender<T> {
    fn request(&self, request: PowerRequest) {
        // Nobody listens any more: the machine is already being taken apart.
        let _ = self.send(request.into());
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Doubles that several devices' tests use.

    use super::*;
    use std::sync::Mutex;

    /// Remembers the level and counts rising edges.
    #[derive(Default)]
    pub struct TestLine {
        state: Mutex<(bool, usize)>,
    }

    impl TestLine {
        pub fn level(&self) -> bool {
            self.state.lock().unwrap().0
        }
        pub fn edges(&self) -> usize {
            self.state.lock().unwrap().1
        }
    }

    impl IrqLine for TestLine {
        fn set_level(&self, level: bool) {
            let mut state = self.state.lock().unwrap();
            if level && !state.0 {
                state.1 += 1;
            }
            state.0 = level;
        }
    }

    /// Remembers what was asked for.
    #[derive(Default)]
    pub struct TestPower(pub Mutex<Vec<PowerRequest>>);

    impl PowerSink for TestPower {
        fn request(&self, request: PowerRequest) {
            self.0.lock().unwrap().push(request);
        }
    }

    impl TestPower {
        pub fn take(&self) -> Vec<PowerRequest> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    /// Random accesses of every size, also ones that leave the device's range.
    pub fn hammer(device: &dyn crate::bus::BusDevice, len: u64, rounds: u32) {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..rounds {
            let r = next();
            let offset = (r >> 8) % len;
            let size = [1usize, 2, 4, 8][(r & 3) as usize];
            let mut data = next().to_le_bytes();
            if r & 4 == 0 {
                device.write(offset, &data[..size]);
            } else {
                device.read(offset, &mut data[..size]);
            }
        }
    }

    #[test]
    fn a_channel_is_a_power_sink() {
        let (sender, receiver) = std::sync::mpsc::channel::<PowerRequest>();
        sender.request(PowerRequest::Reset);
        assert_eq!(receiver.recv().unwrap(), PowerRequest::Reset);
        drop(receiver);
        sender.request(PowerRequest::PowerOff);
    }
}
