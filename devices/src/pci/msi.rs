//! MSI: up to 32 messages to one address, set up in configuration space.
//!
//! PCI Local Bus 3.0, section 6.8.1, with a 64-bit address and no masks for single vectors.
//!
//! ```text
//!   +2 control: enable, messages asked for, messages granted   +4 address   +8 upper half   +c data
//! ```

use std::sync::{Arc, Mutex, MutexGuard};

use lodge_accel::{Msi as Message, Vm};

use super::ConfigSpace;

/// Bits of message control.
const ENABLE: u16 = 1;
const GRANTED: u16 = 0x70;
const ADDRESS_64: u16 = 1 << 7;
/// Bytes of the capability after its id and link.
const BODY: usize = 12;

#[derive(Default)]
struct Registers {
    control: u16,
    address: u64,
    data: u16,
}

/// A function's MSI capability. Its registers lie in configuration space, and are saved with it.
pub struct Msi {
    vm: Arc<dyn Vm>,
    /// Log2 of the messages that the function asks for.
    wanted: u16,
    registers: Mutex<Registers>,
}

impl Msi {
    /// A capability that asks for `vectors` messages (1 to 32, rounded up to a power of two); disabled.
    pub fn new(vm: Arc<dyn Vm>, vectors: u8) -> Arc<Self> {
        let wanted = vectors.clamp(1, 32).next_power_of_two().trailing_zeros() as u16;
        Arc::new(Self { vm, wanted, registers: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The capability's bytes after reset, and which bits the guest may write.
    pub(super) fn body(&self) -> ([u8; BODY], [u8; BODY]) {
        let (mut body, mut writable) = ([0; BODY], [0xff; BODY]);
        body[..2].copy_from_slice(&(ADDRESS_64 | self.wanted << 1).to_le_bytes());
        writable[..2].copy_from_slice(&(ENABLE | GRANTED).to_le_bytes());
        writable[2] = 0xfc; // messages are double words
        (body, writable)
    }

    /// The guest has written the registers of the capability at `at`.
    pub(super) fn update(&self, config: &ConfigSpace, at: usize) {
        let address = u64::from(config.u32(at + 8)) << 32 | u64::from(config.u32(at + 4));
        let (control, data) = (config.u16(at + 2), config.u16(at + 12));
        *self.lock() = Registers { control, address, data };
    }

    /// Whether the guest enabled MSI; if not, INTx is in use.
    pub fn enabled(&self) -> bool {
        self.lock().control & ENABLE != 0
    }

    /// Sends message `vector`; does nothing while MSI is disabled. A guest that grants fewer messages than were
    /// asked for gets the last one it granted for those beyond.
    pub fn signal(&self, vector: u8) {
        let registers = self.lock();
        if registers.control & ENABLE == 0 {
            return;
        }
        let granted = ((registers.control & GRANTED) >> 4).min(self.wanted);
        let most = (1u16 << granted) - 1;
        let data = u32::from(registers.data & !most | u16::from(vector).min(most));
        let message = Message { address: registers.address, data };
        if let Err(error) = self.vm.signal_msi(message) {
            tracing::warn!(?message, %error, "cannot deliver an MSI");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{EndpointBuilder, Identity};
    use crate::test_vm::TestVm;

    fn identity() -> Identity {
        Identity {
            vendor: 0x8086,
            device: 1,
            class: 0x010601,
            revision: 0,
            subsystem: (0, 0),
            multifunction: false,
        }
    }

    #[test]
    fn the_guest_sets_it_up_in_configuration_space() {
        let vm = Arc::new(TestVm::default());
        let msi = Msi::new(vm.clone(), 3);
        let mut builder = EndpointBuilder::new(&identity());
        let intx = builder.interrupt_pin(1);
        let at = builder.msi(&msi);
        let endpoint = builder.build();
        let control = || {
            let mut control = [0; 2];
            endpoint.read(at + 2, &mut control);
            u16::from_le_bytes(control)
        };
        assert_eq!(control(), 0x84, "four messages, 64 bits");
        msi.signal(0);
        assert!(vm.msis().is_empty(), "disabled");
        endpoint.write(at + 4, &0xfee0_1003u32.to_le_bytes());
        endpoint.write(at + 12, &0x4043u16.to_le_bytes());
        endpoint.write(at + 2, &0xffffu16.to_le_bytes());
        assert_eq!(control(), 0xf5);
        msi.signal(2);
        endpoint.write(at + 2, &0x0011u16.to_le_bytes());
        msi.signal(3);
        msi.signal(0);
        let sent = vm.msis();
        assert!(sent.iter().all(|message| message.address == 0xfee0_1000));
        assert_eq!(sent.iter().map(|m| m.data).collect::<Vec<_>>(), [0x4042, 0x4043, 0x4042]);
        // It is saved, and a reset ends it.
        let state = endpoint.state();
        endpoint.reset();
        assert!(!msi.enabled());
        endpoint.restore(&state).unwrap();
        assert!(msi.enabled());
        msi.signal(0);
        assert_eq!(vm.msis()[3], sent[2]);
        assert!(!intx.pending());
    }
}
