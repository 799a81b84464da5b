//! The machine: everything that exists while it does, and what the control thread can do to it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use lodge_accel::kvm::{RESERVED_BYTES, RESERVED_GPA};
use lodge_accel::state::{ChipState, VcpuState};
use lodge_accel::{VcpuSetup, Vm, VmSetup};
use lodge_devices::acpi::{AcpiSetup, AcpiTables};
use lodge_devices::bus::SystemBus;
use lodge_devices::display::Screen;
use lodge_devices::input::{Hub, InputDevice, InputEvent};
use lodge_devices::legacy::Serial;
use lodge_devices::pci::{ECAM_BASE, ECAM_SIZE, intx_gsi};
use lodge_devices::smbios::SmbiosSetup;
use lodge_memory::{GuestMemory, RamLayout};
use lodge_model::spec::{Accel, MachineSpec, Video};

use crate::board::Board;
use crate::boot::{self, DirectBoot, EntryState, Platform};
use crate::control::Message;
use crate::error::Error;
use crate::firmware::{self, Firmware};
use crate::peripherals::{self, Peripherals, Resources};
use crate::vcpu::VcpuThread;
use crate::vnc::InputSink;

/// What KVM keeps for itself; the guest is told so whatever runs it, so that it can move.
const KVM_RESERVED: Range<u64> = RESERVED_GPA..RESERVED_GPA + RESERVED_BYTES;

/// A machine. Nothing runs until [`Machine::resume`].
pub struct Machine {
    spec: MachineSpec,
    layout: RamLayout,
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
    board: Board,
    peripherals: Peripherals,
    input: Arc<Keys>,
    vcpus: Vec<VcpuThread>,
    acpi: AcpiTables,
    smbios: SmbiosSetup,
    start: Start,
    /// The state after power-up, to come back to with a reset.
    power_up: PowerUp,
}

/// The machine's keyboards and pointers, for those who use them.
struct Keys(Hub);

impl InputSink for Keys {
    fn send(&self, events: &[InputEvent]) {
        self.0.send(events);
    }

    fn takes_places(&self) -> bool {
        self.0.has_places()
    }
}

/// How it starts.
enum Start {
    /// A kernel is loaded, and the boot processor is put into it.
    Kernel,
    /// All processors are as after power-up, the boot processor in the firmware.
    Firmware(Firmware),
}

struct PowerUp {
    chips: ChipState,
    vcpus: Vec<VcpuState>,
}

impl Machine {
    /// Puts together what `spec` asks for; `control` hears what happens to it. Gives the machine and a line that says
    /// which accelerator runs it and why.
    ///
    /// # Errors
    /// What is missing or in use, by name, and the way out.
    pub fn new(spec: MachineSpec, control: &Sender<Message>) -> Result<(Self, String), Error> {
        let resources = Resources::open(&spec)?;
        let layout = RamLayout::pc(spec.memory.as_bytes())?;
        let memory = lodge_memory::allocate(&layout)?;
        let bus = Arc::new(SystemBus::default());
        let setup = VmSetup { memory: memory.clone(), bus: bus.clone(), vcpus: spec.cpus };
        let (vm, chosen) = lodge_accel::open(accelerator(spec.accel), setup)?;
        let physical_bits = vm.capabilities().physical_bits;
        let board = Board::new(&spec, &layout, &bus, vm.clone(), physical_bits, control)?;
        let peripherals = peripherals::plug_in(&spec, resources, &board.pci, &memory, &vm)?;
        let mut input = peripherals.input();
        input.push(board.i8042.clone());
        let input = Arc::new(Keys(Hub::new(input)));
        let acpi = AcpiTables::new(&AcpiSetup {
            vcpus: spec.cpus,
            windows: board.pci.windows().clone(),
            ecam_base: ECAM_BASE,
            intx_gsi,
            serial: Board::serial_ports(),
            vga: spec.video_kind() != Video::None,
        });
        let smbios = smbios_setup(&spec, &layout);
        let start = match spec.boot.firmware_kind() {
            None => Start::Kernel,
            Some(kind) => {
                let platform = firmware::Platform {
                    spec: &spec,
                    ram: &layout,
                    reserved: &[KVM_RESERVED],
                    acpi: &acpi,
                    smbios: &smbios,
                    serial_screen: spec.video_kind() == Video::None,
                };
                let firmware = Firmware::new(kind, &platform, &bus, &vm, &memory)?;
                firmware.set_boot_order(&peripherals.boot_order(&spec.boot, true));
                Start::Firmware(firmware)
            }
        };
        let mut machine = Self {
            start,
            power_up: PowerUp { chips: ChipState::default(), vcpus: Vec::new() },
            vcpus: Vec::new(),
            spec,
            layout,
            memory,
            vm,
            board,
            peripherals,
            input,
            acpi,
            smbios,
        };
        machine.start_threads(control)?;
        machine.boot()?;
        Ok((machine, chosen))
    }

    fn start_threads(&mut self, control: &Sender<Message>) -> Result<(), Error> {
        for index in 0..self.spec.cpus {
            let vcpu = self.vm.create_vcpu(index, VcpuSetup::Reset)?;
            let control = control.clone();
            // The control thread outlives the vCPUs; when it does not listen any more they are about to end.
            let report = move |event| drop(control.send(Message::Vcpu(index, event)));
            let thread = VcpuThread::start(index, vcpu, report)
                .map_err(|source| Error::Host { what: "start a vCPU's thread", source })?;
            self.power_up.vcpus.push(thread.state()??);
            self.vcpus.push(thread);
        }
        self.power_up.chips = self.vm.chip_state()?;
        Ok(())
    }

    /// Makes everything ready for the first instruction after power-up or a reset.
    fn boot(&mut self) -> Result<(), Error> {
        let entry = match &self.start {
            Start::Kernel => Some(self.load()?),
            Start::Firmware(firmware) => {
                firmware.power_up(&self.memory)?;
                None
            }
        };
        for (index, (vcpu, state)) in self.vcpus.iter().zip(&self.power_up.vcpus).enumerate() {
            let mut state = state.clone();
            if let Some(entry) = &entry {
                boot::prepare(&mut state);
                if index == 0 {
                    entry.apply(&mut state);
                }
            }
            vcpu.set_state(state)??;
        }
        Ok(())
    }

    fn load(&self) -> Result<EntryState, Error> {
        let kernel = self.spec.boot.kernel.as_deref().ok_or_else(|| {
            Error::Invalid("the machine has nothing to start: give it a kernel".into())
        })?;
        let boot = DirectBoot {
            kernel,
            initrd: self.spec.boot.initrd.as_deref(),
            cmdline: &self.spec.boot.cmdline,
        };
        let platform = Platform {
            ram: &self.layout,
            reserved: &[ECAM_BASE..ECAM_BASE + ECAM_SIZE, KVM_RESERVED],
            acpi: &self.acpi,
            smbios: &self.smbios,
        };
        Ok(boot::load(&self.memory, &boot, &platform)?)
    }

    /// The serial port that the console is on.
    pub fn console(&self) -> Arc<Serial> {
        self.board.com1.clone()
    }

    /// Whether firmware starts it, as in a PC, where a triple fault is a way to reset.
    pub(crate) fn has_firmware(&self) -> bool {
        matches!(self.start, Start::Firmware(_))
    }

    /// The guest's picture, if it has a display.
    pub fn screen(&self) -> Option<Arc<dyn Screen>> {
        self.peripherals.screen()
    }

    /// Where what viewers do goes.
    pub fn input(&self) -> Arc<dyn InputSink> {
        self.input.clone()
    }

    /// Lets it run, for the first time or after a pause.
    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        self.peripherals.resume();
        self.board.resume();
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        Ok(())
    }

    /// Makes it stand still: vCPUs first, so that no request is made any more, then the devices.
    pub(crate) fn pause(&mut self) -> Result<(), Error> {
        self.pause_vcpus()?;
        self.board.pause();
        self.peripherals.pause();
        if let Start::Firmware(firmware) = &self.start {
            firmware.flush();
        }
        Ok(())
    }

    fn pause_vcpus(&self) -> Result<(), Error> {
        let waiting = self.vcpus.iter().map(VcpuThread::pause).collect::<Result<Vec<_>, _>>()?;
        for paused in waiting {
            paused.recv().map_err(|_| crate::vcpu::Gone)?;
        }
        Ok(())
    }

    /// Presses the ACPI power button.
    pub(crate) fn press_power_button(&self) {
        self.board.press_power_button();
    }

    /// A hardware reset: everything as after power-up, the kernel loaded anew. Runs on if `run`.
    pub(crate) fn reset(&mut self, run: bool) -> Result<(), Error> {
        self.pause_vcpus()?;
        self.board.reset();
        self.vm.set_chip_state(&self.power_up.chips)?;
        if let Start::Firmware(firmware) = &self.start {
            firmware.set_boot_order(&self.peripherals.boot_order(&self.spec.boot, false));
        }
        self.boot()?;
        if run {
            for vcpu in &self.vcpus {
                vcpu.run()?;
            }
        }
        Ok(())
    }

    /// Tells where the vCPUs are, for those who wonder why a guest stands still.
    pub(crate) fn log_places(&self) {
        if self.pause_vcpus().is_ok() {
            for index in 0..self.spec.cpus {
                tracing::debug!("vCPU {index} is{}", self.place_of(index));
            }
        }
    }

    /// Where a stopped vCPU is, as words for a message.
    pub(crate) fn place_of(&self, index: u32) -> String {
        let state = self.vcpus.get(index as usize).and_then(|vcpu| vcpu.state().ok()?.ok());
        state
            .map(|state| format!(" at RIP {:#x}, CR3 {:#x}", state.rip, state.cr3))
            .unwrap_or_default()
    }

    /// The end: vCPUs, then devices, whose requests under way are finished, then the console.
    pub(crate) fn stop(mut self) {
        self.vcpus.clear();
        self.board.stop();
    }
}

fn accelerator(accel: Accel) -> lodge_accel::Kind {
    match accel {
        Accel::Auto => lodge_accel::Kind::Auto,
        Accel::Kvm => lodge_accel::Kind::Kvm,
        Accel::Soft => lodge_accel::Kind::Soft,
    }
}

fn smbios_setup(spec: &MachineSpec, layout: &RamLayout) -> SmbiosSetup {
    SmbiosSetup {
        uuid: uuid_of(&spec.name),
        serial: spec.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        vcpus: spec.cpus,
        ram: layout.clone(),
    }
}

/// A UUID that a machine of this name always has, of the version for private schemes (RFC 9562, 5.8).
fn uuid_of(name: &str) -> [u8; 16] {
    // FNV-1a, twice with different beginnings.
    let hash = |seed: u64| {
        name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    };
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
    uuid[8..].copy_from_slice(&hash(0x6c62_272e_07bb_0142).to_be_bytes());
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_uuid() {
        assert_eq!(uuid_of("web"), uuid_of("web"));
        assert_ne!(uuid_of("web"), uuid_of("web2"));
        assert_eq!(uuid_of("web")[6] >> 4, 8);
        assert_eq!(uuid_of("web")[8] >> 6, 2);
    }
}
