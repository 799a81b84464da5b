//! The serial ports: a 16550A (National Semiconductor PC16550D) with nothing slow about it.
//!
//! ```text
//!   input() --> [ waiting, 4 KiB ] --> [ receive FIFO, 16 ] --> RBR      guest
//!   SerialOutput <------------------------------------------ THR
//! ```
//!
//! Bytes are sent the moment they are written; the transmitter is busy only while the output's buffer is
//! full. There is no baud rate, parity or line noise. INTR drives the line as a level, as the chip's pin
//! does, and MCR's OUT2 gates it, as on a PC.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{IrqLine, SerialOutput};
use crate::bus::BusDevice;

/// Ports that a serial port has.
pub const SERIAL_LEN: u64 = 8;
/// The first serial port: `ttyS0`.
pub const COM1: SerialPort = SerialPort { base: 0x3f8, irq: 4 };
/// The second serial port: `ttyS1`.
pub const COM2: SerialPort = SerialPort { base: 0x2f8, irq: 3 };

/// Where a PC has a serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SerialPort {
    /// First of [`SERIAL_LEN`] ports.
    pub base: u16,
    /// ISA interrupt.
    pub irq: u32,
}

const FIFO: usize = 16;
/// Bytes from outside that wait for room in the FIFO.
const WAITING: usize = 4096;

mod ier {
    pub const RECEIVED: u8 = 1;
    pub const THR_EMPTY: u8 = 1 << 1;
    pub const LINE_STATUS: u8 = 1 << 2;
    pub const MODEM_STATUS: u8 = 1 << 3;
    pub const ALL: u8 = 0x0f;
}
mod iir {
    pub const NONE: u8 = 1;
    pub const MODEM_STATUS: u8 = 0;
    pub const THR_EMPTY: u8 = 2;
    pub const RECEIVED: u8 = 4;
    pub const LINE_STATUS: u8 = 6;
    pub const TIMEOUT: u8 = 12;
    pub const FIFOS: u8 = 0xc0;
}
mod fcr {
    pub const ENABLE: u8 = 1;
    pub const CLEAR_RX: u8 = 1 << 1;
    pub const KEPT: u8 = 0xc9;
}
mod lcr {
    pub const DLAB: u8 = 1 << 7;
}
mod lsr {
    pub const DATA_READY: u8 = 1;
    pub const OVERRUN: u8 = 1 << 1;
    pub const THR_EMPTY: u8 = 1 << 5;
    pub const IDLE: u8 = 1 << 6;
}
mod mcr {
    pub const DTR: u8 = 1;
    pub const RTS: u8 = 1 << 1;
    pub const OUT1: u8 = 1 << 2;
    pub const OUT2: u8 = 1 << 3;
    pub const LOOP: u8 = 1 << 4;
    pub const ALL: u8 = 0x1f;
}
mod msr {
    pub const DELTA: u8 = 0x0f;
    pub const DELTA_RI: u8 = 1 << 2;
    pub const CTS: u8 = 1 << 4;
    pub const DSR: u8 = 1 << 5;
    pub const RI: u8 = 1 << 6;
    pub const DCD: u8 = 1 << 7;
}

/// What is saved of a serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SerialState {
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register.
    pub ier: u8,
    /// FIFO control register: enable, DMA mode, trigger level.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Delta bits of the modem status register.
    pub msr_delta: u8,
    /// Scratch register.
    pub scratch: u8,
    /// A byte came when the FIFO was full.
    pub overrun: bool,
    /// The transmitter's interrupt waits to be seen in IIR.
    pub thr_interrupt: bool,
    /// The receive FIFO.
    pub received: Vec<u8>,
    /// What waits for room in it.
    pub waiting: Vec<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr_delta: 0,
            scratch: 0,
            overrun: false,
            thr_interrupt: false,
            received: Vec::new(),
            waiting: Vec::new(),
        }
    }
}

#[derive(Default)]
struct Uart {
    state: SerialState,
    received: VecDeque<u8>,
    waiting: VecDeque<u8>,
}

/// A 16550A.
pub struct Serial {
    uart: Mutex<Uart>,
    /// `waiting` got shorter.
    taken: Condvar,
    output: SerialOutput,
    line: Arc<dyn IrqLine>,
}

impl Serial {
    /// A port that sends into `output` and interrupts through `line`.
    pub fn new(output: SerialOutput, line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            output.on_room(Arc::new(move || {
                if let Some(serial) = weak.upgrade() {
                    serial.room_again();
                }
            }));
            Self { uart: Mutex::default(), taken: Condvar::new(), output, line }
        })
    }

    /// Takes bytes from outside for the guest: as many as there is room for, which it returns.
    /// The guest gets them at its own pace.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let take = bytes.len().min(WAITING.saturating_sub(uart.waiting.len()));
        uart.waiting.extend(&bytes[..take]);
        uart.feed();
        self.drive(&uart);
        take
    }

    /// Waits until [`Serial::input`] takes at least one byte, at most `bound`; says whether it does.
    pub fn wait_for_input_room(&self, bound: Duration) -> bool {
        let uart = self.lock();
        let wait = self.taken.wait_timeout_while(uart, bound, |u| u.waiting.len() >= WAITING);
        let (uart, _) = wait.unwrap_or_else(PoisonError::into_inner);
        uart.waiting.len() < WAITING
    }

    /// Waits until the reader of the output has everything, at most `bound`; says whether it has.
    pub fn flush(&self, bound: Duration) -> bool {
        self.output.flush(bound)
    }

    /// The registers as after a hardware reset; what waits to be received is dropped.
    pub fn reset(&self) {
        let mut uart = self.lock();
        *uart = Uart::default();
        self.taken.notify_all();
        self.drive(&uart);
    }

    /// What is saved. Output that the reader has not taken yet is not part of it: call
    /// [`Serial::flush`] first.
    pub fn save(&self) -> SerialState {
        let uart = self.lock();
        SerialState {
            received: uart.received.iter().copied().collect(),
            waiting: uart.waiting.iter().copied().collect(),
            ..uart.state.clone()
        }
    }

    /// Puts back what [`Serial::save`] gave.
    pub fn restore(&self, state: &SerialState) {
        let mut uart = self.lock();
        uart.received = state.received.iter().copied().take(FIFO).collect();
        uart.waiting = state.waiting.iter().copied().take(WAITING).collect();
        uart.state = SerialState { received: Vec::new(), waiting: Vec::new(), ..state.clone() };
        uart.state.ier &= ier::ALL;
        uart.state.fcr &= fcr::KEPT;
        uart.state.mcr &= mcr::ALL;
        uart.state.msr_delta &= msr::DELTA;
        uart.feed();
        self.drive(&uart);
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the interrupt line to what the registers ask for.
    fn drive(&self, uart: &Uart) {
        let gated = uart.state.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        self.line.set_level(gated && uart.interrupt() != iir::NONE);
    }

    /// The output's buffer has room after it was full.
    fn room_again(&self) {
        let mut uart = self.lock();
        uart.state.thr_interrupt = true;
        self.drive(&uart);
    }

    fn read_register(&self, register: u64) -> u8 {
        let mut uart = self.lock();
        let dlab = uart.state.lcr & lcr::DLAB != 0;
        let value = match register {
            0 if dlab => uart.state.divisor as u8,
            1 if dlab => (uart.state.divisor >> 8) as u8,
            0 => {
                let byte = uart.received.pop_front().unwrap_or(0);
                uart.feed();
                self.taken.notify_all();
                byte
            }
            1 => uart.state.ier,
            2 => uart.identify(),
            3 => uart.state.lcr,
            4 => uart.state.mcr,
            5 => {
                let sent = self.output.has_room();
                uart.line_status(sent)
            }
            6 => uart.modem_status() | std::mem::take(&mut uart.state.msr_delta),
            7 => uart.state.scratch,
            _ => 0xff,
        };
        // Reading the scratch or a control register changes nothing, and LSR rarely does.
        if matches!(register, 0 | 2 | 5 | 6) {
            self.drive(&uart);
        }
        value
    }

    fn write_register(&self, register: u64, value: u8) {
        let mut uart = self.lock();
        let dlab = uart.state.lcr & lcr::DLAB != 0;
        match register {
            0 if dlab => uart.state.divisor = uart.state.divisor & 0xff00 | u16::from(value),
            1 if dlab => uart.state.divisor = uart.state.divisor & 0xff | u16::from(value) << 8,
            0 if uart.state.mcr & mcr::LOOP != 0 => {
                uart.receive(value);
                uart.state.thr_interrupt = true;
            }
            0 => {
                self.output.push(value);
                // When the buffer is full now, room_again() follows.
                uart.state.thr_interrupt = self.output.has_room();
            }
            1 => {
                let risen = value & !uart.state.ier;
                uart.state.ier = value & ier::ALL;
                if risen & ier::THR_EMPTY != 0 {
                    uart.state.thr_interrupt = self.output.has_room();
                }
            }
            2 => uart.fifo_control(value),
            3 => uart.state.lcr = value,
            4 => uart.modem_control(value),
            7 => uart.state.scratch = value,
            // LSR and MSR are read-only here.
            _ => return,
        }
        self.drive(&uart);
    }
}

impl Uart {
    fn fifo_len(&self) -> usize {
        if self.state.fcr & fcr::ENABLE != 0 { FIFO } else { 1 }
    }

    /// Moves what waits outside into the FIFO, as much as fits.
    fn feed(&mut self) {
        // In loopback mode the receiver is cut off from the line.
        while self.state.mcr & mcr::LOOP == 0 && self.received.len() < self.fifo_len() {
            let Some(byte) = self.waiting.pop_front() else { return };
            self.received.push_back(byte);
        }
    }

    fn receive(&mut self, byte: u8) {
        if self.received.len() < self.fifo_len() {
            self.received.push_back(byte);
        } else {
            self.state.overrun = true;
        }
    }

    /// The most urgent enabled interrupt, as IIR's low four bits (PC16550D, table IV).
    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.state.ier & bit != 0;
        if enabled(ier::LINE_STATUS) && self.state.overrun {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED) && !self.received.is_empty() {
            let trigger = [1, 4, 8, 14][usize::from(self.state.fcr >> 6)];
            let fifos = self.state.fcr & fcr::ENABLE != 0;
            // Characters have no duration here: fewer than the trigger level have timed out.
            if fifos && self.received.len() < trigger { iir::TIMEOUT } else { iir::RECEIVED }
        } else if enabled(ier::THR_EMPTY) && self.state.thr_interrupt {
            iir::THR_EMPTY
        } else if enabled(ier::MODEM_STATUS) && self.state.msr_delta != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// A read of IIR, which takes back the transmitter's interrupt if it is the one shown.
    fn identify(&mut self) -> u8 {
        let interrupt = self.interrupt();
        if interrupt == iir::THR_EMPTY {
            self.state.thr_interrupt = false;
        }
        let fifos = if self.state.fcr & fcr::ENABLE != 0 { iir::FIFOS } else { 0 };
        interrupt | fifos
    }

    fn line_status(&mut self, sent: bool) -> u8 {
        let mut value = if sent { lsr::THR_EMPTY | lsr::IDLE } else { 0 };
        if !self.received.is_empty() {
            value |= lsr::DATA_READY;
        }
        if std::mem::take(&mut self.state.overrun) {
            value |= lsr::OVERRUN;
        }
        value
    }

    /// The modem lines: a cable with everything connected, or what MCR says in loopback mode.
    fn modem_status(&self) -> u8 {
        let mcr = self.state.mcr;
        if mcr & mcr::LOOP == 0 {
            return msr::CTS | msr::DSR | msr::DCD;
        }
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .filter(|(output, _)| mcr & output != 0)
            .fold(0, |value, (_, input)| value | input)
    }

    fn modem_control(&mut self, value: u8) {
        let before = self.modem_status();
        self.state.mcr = value & mcr::ALL;
        let after = self.modem_status();
        let mut delta = (before ^ after) >> 4;
        // The ring indicator's bit is set only when it falls.
        if after & msr::RI != 0 {
            delta &= !msr::DELTA_RI;
        }
        self.state.msr_delta |= delta;
        self.feed();
    }

    fn fifo_control(&mut self, value: u8) {
        let toggled = (value ^ self.state.fcr) & fcr::ENABLE != 0;
        // Without the enable bit the others are not programmed (PC16550D, 8.5).
        self.state.fcr = if value & fcr::ENABLE != 0 { value & fcr::KEPT } else { 0 };
        if toggled || value & (fcr::ENABLE | fcr::CLEAR_RX) == fcr::ENABLE | fcr::CLEAR_RX {
            self.received.clear();
        }
        self.feed();
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = self.read_register(register);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset..).zip(data) {
            self.write_register(register, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::tests::slow;
    use super::super::testing::{TestLine, hammer};
    use super::*;
    use std::io::Write;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Arc<Serial>, Sink, Arc<TestLine>) {
        let (sink, line) = (Sink::default(), Arc::<TestLine>::default());
        let output = SerialOutput::new("test", Box::new(sink.clone())).unwrap();
        (Serial::new(output, line.clone()), sink, line)
    }

    const WAIT: Duration = Duration::from_secs(30);

    #[test]
    fn bytes_go_out() {
        let (serial, sink, _) = serial();
        for byte in *b"Hello" {
            assert_eq!(serial.read_register(5) & 0x60, 0x60);
            serial.write_register(0, byte);
        }
        assert!(serial.flush(WAIT));
        assert_eq!(*sink.0.lock().unwrap(), b"Hello");
    }

    /// What Linux's 8250 driver does to find out what the chip is (autoconfig, autoconfig_16550a,
    /// and the test for a transmitter that does not interrupt when enabled).
    #[test]
    fn linux_finds_a_16550a() {
        let (serial, _, line) = serial();
        let (read, write) = (|r| serial.read_register(r), |r, v| serial.write_register(r, v));
        write(1, 0);
        assert_eq!(read(1) & 0x0f, 0);
        write(1, 0x0f);
        assert_eq!(read(1) & 0x0f, 0x0f);
        write(1, 0);
        write(4, mcr::LOOP | mcr::OUT2 | mcr::RTS);
        assert_eq!(read(6) & 0xf0, 0x90);
        write(4, 0);
        write(3, 0xbf);
        write(2, 0);
        write(3, 0);
        write(2, 1);
        assert_eq!(read(2) >> 6, 3);
        write(3, 0x80);
        assert_ne!(read(2), 0, "no EFR");
        write(3, 0);
        write(1, 0x40);
        assert_eq!(read(1) & 0x40, 0, "not an XScale");
        write(4, mcr::OUT2);
        for _ in 0..2 {
            write(1, 2);
            assert!(line.level());
            assert_eq!(read(2) & 0x0f, iir::THR_EMPTY);
            assert!(!line.level());
            write(1, 0);
        }
    }

    #[test]
    fn input_waits_for_the_guest() {
        let (serial, _, line) = serial();
        serial.write_register(4, mcr::OUT2);
        serial.write_register(2, 0xc1);
        serial.write_register(1, 1);
        let sent: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        assert_eq!(serial.input(&sent), WAITING);
        // The FIFO took 16 of those.
        assert_eq!(serial.input(&sent[WAITING..]), 16);
        assert!(!serial.wait_for_input_room(Duration::ZERO));
        assert!(line.level());
        assert_eq!(serial.read_register(2) & 0x0f, iir::RECEIVED);
        let mut got = Vec::new();
        let mut next = WAITING + 16;
        while serial.read_register(5) & lsr::DATA_READY != 0 {
            got.push(serial.read_register(0));
            assert!(serial.wait_for_input_room(Duration::ZERO));
            next += serial.input(&sent[next..]);
        }
        assert_eq!(got, sent);
        assert!(!line.level());
        assert_eq!(serial.read_register(2) & 0x0f, iir::NONE);
        serial.input(b"x");
        assert_eq!(serial.read_register(2) & 0x0f, iir::TIMEOUT);
    }

    #[test]
    fn loopback_and_overrun() {
        let (serial, sink, line) = serial();
        serial.write_register(1, 5);
        serial.write_register(4, mcr::LOOP);
        serial.input(b"from outside");
        assert_eq!(serial.read_register(5) & lsr::DATA_READY, 0);
        serial.write_register(0, b'a');
        serial.write_register(0, b'b');
        assert_eq!(serial.read_register(2) & 0x0f, iir::LINE_STATUS);
        assert_eq!(serial.read_register(5) & 3, lsr::DATA_READY | lsr::OVERRUN);
        assert_eq!(serial.read_register(5) & 3, lsr::DATA_READY);
        assert_eq!(serial.read_register(0), b'a');
        assert!(!line.level());
        serial.write_register(4, mcr::OUT2);
        assert_eq!(serial.read_register(0), b'f');
        assert!(serial.flush(WAIT) && sink.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_full_buffer_shows_as_a_busy_transmitter_and_loses_nothing() {
        let (output, receiver) = slow();
        let line: Arc<TestLine> = Arc::default();
        let serial = Serial::new(output, line.clone());
        serial.write_register(4, mcr::OUT2);
        serial.write_register(1, 2);
        let mut sent = Vec::new();
        while serial.read_register(5) & lsr::THR_EMPTY != 0 {
            sent.push(sent.len() as u8);
            serial.write_register(0, sent[sent.len() - 1]);
        }
        serial.read_register(2);
        assert!(!line.level(), "nothing to write into");
        let mut got = Vec::new();
        while !line.level() {
            got.extend(receiver.recv_timeout(WAIT).unwrap());
        }
        assert_eq!(serial.read_register(5) & lsr::THR_EMPTY, lsr::THR_EMPTY);
        let rest = std::thread::spawn(move || receiver.iter().flatten().collect::<Vec<_>>());
        drop(serial);
        got.extend(rest.join().unwrap());
        assert_eq!(got, sent);
    }

    #[test]
    fn state_survives() {
        let (one, _, _) = serial();
        hammer(&*one, SERIAL_LEN, 500);
        one.input(b"typed ahead, more than sixteen bytes");
        let saved = one.save();
        let (two, _, _) = serial();
        two.restore(&serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap());
        assert_eq!(two.save(), saved);
        two.restore(&SerialState {
            received: vec![0; 100_000],
            waiting: vec![0; 100_000],
            ier: 0xff,
            mcr: 0xff,
            ..saved
        });
        hammer(&*two, SERIAL_LEN, 1000);
        two.reset();
        assert_eq!(two.save(), SerialState::default());
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let (serial, _, _) = serial();
        for _ in 0..50 {
            hammer(&*serial, SERIAL_LEN, 500);
            serial.input(&[7; 100]);
        }
    }
}
