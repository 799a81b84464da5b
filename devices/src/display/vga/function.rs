//! The card as a PCI function: QEMU's standard VGA, 1234:1111.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Card, CardConfig, MMIO_BYTES, VgaState};
use crate::device_ram::DeviceRam;
use crate::pci::{
    Bar, BarKind, Endpoint, EndpointBuilder, EndpointState, Error, Function, Identity,
};

/// Revision 2 has the extended MMIO registers.
const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x1111,
    class: 0x03_00_00,
    revision: 2,
    subsystem: (0x1af4, 0x1100),
    multifunction: false,
};

/// Bytes that a frame buffer may have.
const FRAME_BUFFER: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;

/// What is saved of a [`Vga`]. Its frame buffer is memory, and saved as such.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VgaFunctionState {
    /// Configuration space.
    pub pci: EndpointState,
    /// Registers.
    pub card: VgaState,
}

/// The function.
///
/// ```text
///   BAR 0  frame buffer     BAR 2  4 KiB of MMIO     ROM  VGA BIOS
///   ports 3B0..3DF, 1CE..1D1 and memory A0000..BFFFF, while it decodes ports and memory
/// ```
pub struct Vga {
    endpoint: Endpoint,
    card: Arc<Card>,
}

impl Vga {
    /// A card with this frame buffer (a power of two of bytes, 1 MiB to 256 MiB), and `rom`, the VGA BIOS, unless it
    /// is empty. It joins the machine by [`crate::pci::Root::add`]; its screen is [`Vga::card`].
    ///
    /// # Errors
    /// The frame buffer has another size.
    pub fn new(
        frame_buffer: Arc<DeviceRam>,
        rom: Vec<u8>,
        config: &CardConfig,
    ) -> Result<Arc<Self>, Error> {
        check_frame_buffer(&frame_buffer)?;
        let card = Card::new(frame_buffer, config);
        let mut builder = EndpointBuilder::new(&IDENTITY);
        card.attach(&mut builder, rom);
        let mmio = Bar { kind: BarKind::Memory32, bytes: MMIO_BYTES, handler: card.mmio() };
        builder.bar(2, mmio);
        Ok(Arc::new(Self { endpoint: builder.build(), card }))
    }

    /// The card: a [`super::super::Screen`].
    pub fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// What is saved.
    pub fn save(&self) -> VgaFunctionState {
        VgaFunctionState { pci: self.endpoint.state(), card: self.card.save() }
    }

    /// Takes back what [`Vga::save`] gave, in a slot.
    ///
    /// # Errors
    /// The state is of something else.
    pub fn restore(&self, saved: &VgaFunctionState) -> Result<(), Error> {
        self.endpoint.restore(&saved.pci)?;
        self.card.restore(&saved.card);
        Ok(())
    }
}

/// Whether a BAR and the registers can tell of this frame buffer.
pub(crate) fn check_frame_buffer(memory: &DeviceRam) -> Result<(), Error> {
    let bytes = memory.bytes();
    match bytes.is_power_of_two() && FRAME_BUFFER.contains(&bytes) {
        true => Ok(()),
        false => Err(Error::FrameBuffer(bytes)),
    }
}

impl Function for Vga {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn reset(&self) {
        self.endpoint.reset();
        self.card.reset();
    }
}
