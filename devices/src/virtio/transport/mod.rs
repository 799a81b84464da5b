//! Virtio over PCI, modern only (VIRTIO 1.2, section 4.1).
//!
//! ```text
//!   VirtioPci (pci::Function)
//!     Endpoint: configuration space --- capabilities: common, notify, ISR, device, PCI access
//!     Core: answers in BAR 0, 32 KiB
//!       0000 common configuration   --> Registers (under the lock)  --> VirtioDevice
//!       1000 ISR status             --> Interrupts
//!       2000 device configuration   --> VirtioDevice
//!       3000 notify, 4 bytes each   --> kick eventfds (ioeventfd where the accelerator can)
//!       4000 MSI-X table            --> Msix
//!       5000 MSI-X pending bits
//! ```
//!
//! A display that is a VGA too ([`VirtioPci::with_vga`]) has all of this in BAR 2, after the VGA's MMIO.

mod core;
mod interrupts;
mod registers;

use std::sync::Arc;

use lodge_accel::Vm;
use lodge_memory::GuestMemory;
use serde::{Deserialize, Serialize};

use self::core::Core;
pub use registers::QueueRegisters;

use super::{DeviceState, Error, VirtioDevice};
use crate::bus::BusDevice;
use crate::display::vga::{self, VgaState};
use crate::pci::{Bar, BarKind, Endpoint, EndpointBuilder, EndpointState, Function, Identity};

/// Where the parts lie in BAR 0.
mod layout {
    pub const BAR_BYTES: u64 = 0x8000;
    pub const COMMON: u64 = 0x0000;
    pub const ISR: u64 = 0x1000;
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
    pub const MSIX_TABLE: u64 = 0x4000;
    pub const MSIX_PENDING: u64 = 0x5000;
    /// Bytes between the notify addresses of two queues.
    pub const NOTIFY_STEP: u64 = 4;
    /// Queues whose notify address fits, minus the vector for configuration changes.
    pub const MAX_QUEUES: usize = 255;
}

/// Vendor id of virtio devices, and the id of device type 0.
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// Subsystem id of QEMU's machines.
const SUBSYSTEM: u16 = 0x1100;
/// Capability id "vendor specific", and the types of virtio's (section 4.1.4).
const CAP_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Bytes of the PCI access capability before its data window, and of the window.
const ACCESS_DATA: usize = 16;
const ACCESS_LEN: usize = 4;

/// Where virtio's registers are in a function of their own, and in one that is a VGA too, with the size of that BAR.
const ALONE: Place = Place { bar: 0, offset: 0 };
const BESIDE_VGA: Place = Place { bar: 2, offset: 0x8000 };
const VGA_BAR_BYTES: u64 = 0x10000;
const VGA_CLASS: u32 = 0x03_00_00;

/// Which BAR virtio's registers are in, and where they begin there.
#[derive(Debug, Clone, Copy)]
struct Place {
    bar: u8,
    offset: u64,
}

/// What is saved of a virtio device on PCI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Configuration space and MSI-X.
    pub pci: EndpointState,
    /// Device status.
    pub status: u8,
    /// ISR status.
    #[serde(default)]
    pub isr: u8,
    /// Configuration generation.
    #[serde(default)]
    pub generation: u8,
    /// Which half of the offered features is shown.
    #[serde(default)]
    pub device_feature_select: u32,
    /// Which half of the driver's features is written.
    #[serde(default)]
    pub driver_feature_select: u32,
    /// The driver's features.
    pub driver_features: u64,
    /// The features offered then; this device must offer all that the driver took.
    pub device_features: u64,
    /// Which queue the queue registers show.
    #[serde(default)]
    pub queue_select: u16,
    /// The vector for configuration changes.
    pub config_vector: u16,
    /// The queues, with where they stand.
    pub queues: Vec<QueueRegisters>,
    /// The device's own part.
    pub device: DeviceState,
    /// The registers of the VGA that shares the function. Its frame buffer is memory, and saved as such.
    #[serde(default)]
    pub vga: Option<VgaState>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    endpoint: Endpoint,
    core: Arc<Core>,
    /// Offset of the PCI access capability.
    access: usize,
    place: Place,
    card: Option<Arc<vga::Card>>,
}

impl VirtioPci {
    /// Puts `device` on PCI. It joins the machine by [`crate::pci::Root::add`].
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        vm: Arc<dyn Vm>,
    ) -> Result<Arc<Self>, Error> {
        let mut builder = EndpointBuilder::new(&identity(&*device, device.class()));
        let core = Core::new(device, memory, vm, builder.interrupt_pin(1))?;
        let handler: Arc<dyn BusDevice> = core.clone();
        builder.bar(0, Bar { kind: BarKind::Memory32, bytes: layout::BAR_BYTES, handler });
        Ok(Self::build(builder, core, ALONE, None))
    }

    /// Puts the display `device` on PCI as one function with the VGA `card`, which firmware and simple drivers use until
    /// the display's own driver comes (QEMU's virtio-vga). `rom` is the VGA BIOS, unless it is empty.
    ///
    /// ```text
    ///   BAR 0  frame buffer     BAR 2  0000 the VGA's MMIO, 8000 virtio     ROM, ports and memory as a VGA
    /// ```
    ///
    /// # Errors
    /// When the host has no more descriptors, or the frame buffer cannot be a BAR.
    pub fn with_vga(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        vm: Arc<dyn Vm>,
        card: Arc<vga::Card>,
        rom: Vec<u8>,
    ) -> Result<Arc<Self>, Error> {
        vga::check_frame_buffer(card.frame_buffer())?;
        let mut builder = EndpointBuilder::new(&identity(&*device, VGA_CLASS));
        let core = Core::new(device, memory, vm, builder.interrupt_pin(1))?;
        card.attach(&mut builder, rom);
        let handler = Arc::new(BothHalves { vga: card.mmio(), virtio: core.clone() });
        let bar = Bar { kind: BarKind::Memory32, bytes: VGA_BAR_BYTES, handler };
        builder.bar(BESIDE_VGA.bar.into(), bar);
        Ok(Self::build(builder, core, BESIDE_VGA, Some(card)))
    }

    fn build(
        mut builder: EndpointBuilder,
        core: Arc<Core>,
        place: Place,
        card: Option<Arc<vga::Card>>,
    ) -> Arc<Self> {
        let step = (layout::NOTIFY_STEP as u32).to_le_bytes();
        for (kind, offset, more) in [
            (CFG_COMMON, layout::COMMON, &[][..]),
            (CFG_ISR, layout::ISR, &[]),
            (CFG_DEVICE, layout::DEVICE, &[]),
            (CFG_NOTIFY, layout::NOTIFY, &step),
        ] {
            let at = Place { offset: place.offset + offset, ..place };
            capability(&mut builder, kind, at, 0x1000, more);
        }
        let access = capability(&mut builder, CFG_PCI, ALONE, 0, &[0; ACCESS_LEN]);
        builder.config().set_writable(access + 4, &[0xff]);
        builder.config().set_writable(access + 8, &[0xff; 12]);
        let table = place.offset + layout::MSIX_TABLE;
        let pending = place.offset + layout::MSIX_PENDING;
        builder.msix(core.interrupts().msix(), place.bar, table as u32, pending as u32);
        builder.express();
        Arc::new(Self { endpoint: builder.build(), core, access, place, card })
    }

    /// Where virtio's registers are now.
    fn registers(&self) -> Option<u64> {
        Some(self.endpoint.bar(self.place.bar.into())? + self.place.offset)
    }

    /// Stops all queues where they stand, when the machine pauses. Returns when nothing is in flight.
    pub fn pause(&self) {
        self.core.pause();
    }

    /// Starts the queues again.
    pub fn resume(&self) {
        self.core.resume();
    }

    /// What is saved. The device must be paused.
    ///
    /// # Errors
    /// When it is not.
    pub fn state(&self) -> Result<TransportState, Error> {
        let mut state = self.core.state(self.endpoint.state())?;
        state.vga = self.card.as_ref().map(|card| card.save());
        Ok(state)
    }

    /// Takes back what was saved, into a new device in a slot. The device is paused afterwards.
    ///
    /// # Errors
    /// When the state is of another device, or asks for what this one lacks.
    pub fn restore(&self, state: &TransportState) -> Result<(), Error> {
        if state.vga.is_some() != self.card.is_some() {
            return Err(Error::State("only one of both is a VGA too"));
        }
        self.core.restore(state)?;
        self.endpoint.restore(&state.pci)?;
        self.core.bar_moved(self.registers());
        if let (Some(card), Some(saved)) = (&self.card, &state.vga) {
            card.restore(saved);
        }
        Ok(())
    }

    /// The access that the PCI access capability's registers describe: offset into virtio's registers and length.
    fn window(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        let (mut offset, mut len) = ([0; 4], [0; 4]);
        self.endpoint.read(self.access + 4, &mut bar);
        self.endpoint.read(self.access + 8, &mut offset);
        self.endpoint.read(self.access + 12, &mut len);
        let len = u32::from_le_bytes(len);
        let offset = u64::from(u32::from_le_bytes(offset)).checked_sub(self.place.offset)?;
        let sane = bar == [self.place.bar]
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len.into())
            && offset + u64::from(len) <= layout::BAR_BYTES;
        sane.then_some((offset, len as usize))
    }

    fn is_window(&self, offset: usize) -> bool {
        (self.access + ACCESS_DATA..self.access + ACCESS_DATA + ACCESS_LEN).contains(&offset)
    }
}

/// Who a virtio device says it is on PCI.
fn identity(device: &dyn VirtioDevice, class: u32) -> Identity {
    Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + device.device_type(),
        class,
        revision: 1,
        subsystem: (VENDOR, SUBSYSTEM),
        multifunction: false,
    }
}

/// The BAR that a VGA's MMIO and virtio's registers share.
struct BothHalves {
    vga: Arc<dyn BusDevice>,
    virtio: Arc<Core>,
}

impl BusDevice for BothHalves {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(BESIDE_VGA.offset) {
            Some(offset) => self.virtio.read(offset, data),
            None if offset < vga::MMIO_BYTES => self.vga.read(offset, data),
            None => data.fill(0xff),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(BESIDE_VGA.offset) {
            Some(offset) => self.virtio.write(offset, data),
            None if offset < vga::MMIO_BYTES => self.vga.write(offset, data),
            None => {}
        }
    }
}

/// Appends a virtio capability: type, BAR and offset, length, and what follows.
fn capability(builder: &mut EndpointBuilder, kind: u8, at: Place, len: u32, more: &[u8]) -> usize {
    let mut body = vec![16 + more.len() as u8, kind, at.bar, 0, 0, 0];
    body.extend_from_slice(&(at.offset as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(more);
    builder.capability(CAP_VENDOR, &body, &[])
}

impl Function for VirtioPci {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        if self.is_window(offset)
            && let Some((at, len)) = self.window()
        {
            let mut value = [0; ACCESS_LEN];
            self.core.read(at, &mut value[..len]);
            self.endpoint.write(self.access + ACCESS_DATA, &value);
        }
        self.endpoint.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        if self.endpoint.write(offset, data).bars {
            self.core.bar_moved(self.registers());
        }
        if self.is_window(offset)
            && let Some((at, len)) = self.window()
        {
            let mut value = [0; ACCESS_LEN];
            self.endpoint.read(self.access + ACCESS_DATA, &mut value);
            self.core.write(at, &value[..len]);
        }
    }

    fn reset(&self) {
        self.core.reset();
        self.endpoint.reset();
        self.core.bar_moved(None);
        if let Some(card) = &self.card {
            card.reset();
        }
    }

    fn removed(&self) {
        self.core.reset();
        self.core.bar_moved(None);
    }
}
