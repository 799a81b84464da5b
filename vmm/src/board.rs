//! The parts that every machine has, and where they are: buses, PCI's root, the PC's legacy devices.

use std::fs::OpenOptions;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use lodge_accel::Vm;
use lodge_devices::bus::SystemBus;
use lodge_devices::input::ps2::{
    I8042, I8042_DATA_PORT, I8042_STATUS_PORT, KEYBOARD_IRQ, MOUSE_IRQ,
};
use lodge_devices::irq::Lines;
use lodge_devices::legacy::{
    COM1, COM2, DEBUG_EXIT_PORT, DebugExit, HostClock, IrqLine, NoIrq, PM_BASE, PM_LEN, PORT_92,
    POST_PORT, Port92, PostCode, PowerManagement, RTC_IRQ, RTC_PORTS, RTC_PORTS_LEN, ResetControl,
    Rtc, RtcSetup, SCI_GSI, SERIAL_LEN, Serial, SerialOutput, SerialPort,
};
use lodge_devices::pci::{Root, Windows};
use lodge_memory::RamLayout;
use lodge_model::spec::{Console, MachineSpec};

use crate::control::Message;
use crate::error::Error;

/// How long the end of a machine waits for the reader of its console.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The parts that every machine has.
pub struct Board {
    /// PCI.
    pub pci: Arc<Root>,
    /// COM1, where the console is.
    pub com1: Arc<Serial>,
    com2: Arc<Serial>,
    rtc: Arc<Rtc>,
    power: Arc<PowerManagement>,
    /// The keyboard and the mouse that every PC has.
    pub i8042: Arc<I8042>,
}

impl Board {
    /// Puts the parts on `bus`. The guest's requests for an end or a reset go to `control`.
    ///
    /// # Errors
    /// The console's file cannot be opened, or the host has no thread to give.
    pub fn new(
        spec: &MachineSpec,
        layout: &RamLayout,
        bus: &Arc<SystemBus>,
        vm: Arc<dyn Vm>,
        physical_bits: u8,
        control: &Sender<Message>,
    ) -> Result<Self, Error> {
        let lines = Lines::new(vm);
        let ram_end = layout.regions.iter().map(|(gpa, bytes)| gpa + bytes).max().unwrap_or(0);
        let pci = Root::new(bus, lines.clone(), Windows::new(ram_end, physical_bits))?;
        let sink = Arc::new(control.clone());
        pci.set_reset_control(Arc::new(ResetControl::new(sink.clone())));

        let com1 = Serial::new(console_output(&spec.console)?, irq(&lines, COM1.irq));
        let com2 = Serial::new(SerialOutput::none(), irq(&lines, COM2.irq));
        let spans = layout.spans();
        let bytes_of = |index: usize| spans.get(index).map_or(0, |span| span.1);
        let setup = RtcSetup {
            low_ram: bytes_of(0),
            high_ram: bytes_of(1),
            vcpus: spec.cpus,
            utc_offset: 0,
        };
        let rtc = Rtc::new(&setup, Arc::new(HostClock), irq(&lines, RTC_IRQ));
        let power = PowerManagement::new(irq(&lines, SCI_GSI), sink.clone());
        let i8042 = I8042::new(sink.clone(), irq(&lines, KEYBOARD_IRQ), irq(&lines, MOUSE_IRQ));

        let pio = &bus.pio;
        pio.insert(COM1.base.into(), SERIAL_LEN, com1.clone())?;
        pio.insert(COM2.base.into(), SERIAL_LEN, com2.clone())?;
        pio.insert(RTC_PORTS.into(), RTC_PORTS_LEN, rtc.clone())?;
        pio.insert(PM_BASE.into(), PM_LEN, power.clone())?;
        pio.insert(I8042_DATA_PORT.into(), 1, i8042.data_port())?;
        pio.insert(I8042_STATUS_PORT.into(), 1, i8042.command_port())?;
        pio.insert(PORT_92.into(), 1, Arc::new(Port92::new(sink.clone())))?;
        pio.insert(POST_PORT.into(), 1, Arc::new(PostCode::default()))?;
        if spec.debug_exit {
            pio.insert(DEBUG_EXIT_PORT.into(), 4, Arc::new(DebugExit::new(sink)))?;
        }
        Ok(Self { pci, com1, com2, rtc, power, i8042 })
    }

    /// The serial ports, in the order of the guest's names for them.
    pub fn serial_ports() -> Vec<SerialPort> {
        vec![COM1, COM2]
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Time stands still for the guest.
    pub fn pause(&self) {
        self.rtc.pause();
        self.power.pause();
    }

    /// And goes on.
    pub fn resume(&self) {
        self.power.resume();
        self.rtc.resume();
    }

    /// A hardware reset of everything on the board, PCI devices included.
    pub fn reset(&self) {
        self.pci.reset();
        for serial in [&self.com1, &self.com2] {
            serial.reset();
        }
        self.rtc.reset();
        self.power.reset();
        self.i8042.reset();
    }

    /// The machine is over: PCI devices let go of the host's resources, the console's last words get out.
    pub fn stop(&self) {
        self.pci.remove_all();
        if !self.com1.flush(LAST_WORDS) {
            tracing::warn!("the console's last words are lost: nobody reads them");
        }
    }
}

fn irq(lines: &Arc<Lines>, gsi: u32) -> Arc<dyn IrqLine> {
    match lines.line(gsi) {
        Some(line) => Arc::new(line),
        // The chipset's own lines are all below 24.
        None => Arc::new(NoIrq),
    }
}

fn console_output(console: &Console) -> Result<SerialOutput, Error> {
    let thread = |source| Error::Host { what: "start the console's thread", source };
    match console {
        Console::Stdio => SerialOutput::new("console", Box::new(io::stdout())).map_err(thread),
        Console::File(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|source| Error::Console { path: path.clone(), source })?;
            SerialOutput::new("console", Box::new(file)).map_err(thread)
        }
        Console::None => Ok(SerialOutput::none()),
    }
}
