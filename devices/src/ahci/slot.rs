//! A command as it lies in guest RAM (AHCI 1.3.1, section 4.2).
//!
//! ```text
//!   PxCLB + 32 * slot: flags, PRDTL | PRDBC | table's address
//!   table: command FIS 64 | ATAPI command 16 | reserved | at 80H PRDs of 16: address, flags and bytes - 1
//! ```

use lodge_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::fis::HostFis;
use crate::dma::Scatter;

/// Bytes of a command header, and of a PRD.
const HEADER: u64 = 32;
const PRD: u64 = 16;
/// Offsets in the command table.
const PACKET: u64 = 0x40;
const PRDT: u64 = 0x80;
/// Flags of the header.
const WRITE: u16 = 1 << 6;
const CLEAR_BUSY: u16 = 1 << 10;
/// PRDs read from guest RAM at a time.
const BATCH: usize = 256;

/// Part of a command is not in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault;

/// A command.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    /// Guest-physical address of its header.
    header: u64,
    table: u64,
    flags: u16,
    prds: u16,
    /// The command FIS.
    pub fis: HostFis,
    /// The ATAPI command.
    pub packet: [u8; 16],
}

/// The data buffers of a command.
#[derive(Debug, Default)]
pub(super) struct Data {
    pub list: Scatter,
    /// One of the PRDs asks for an interrupt.
    pub interrupt: bool,
}

impl Slot {
    /// Reads slot `index` (0..32) of the list at `list`.
    pub(super) fn fetch(memory: &GuestMemory, list: u64, index: u32) -> Result<Self, Fault> {
        let header = list.checked_add(HEADER * u64::from(index)).ok_or(Fault)?;
        let head: [u8; 16] = read(memory, header)?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (first, table) = (word(0), u64::from(word(12)) << 32 | u64::from(word(8) & !0x7f));
        let fis = HostFis(read(memory, table)?);
        let packet = read(memory, table.checked_add(PACKET).ok_or(Fault)?)?;
        Ok(Self { header, table, flags: first as u16, prds: (first >> 16) as u16, fis, packet })
    }

    /// Data goes from the host to the device.
    pub(super) fn writes(&self) -> bool {
        self.flags & WRITE != 0
    }

    /// The port is not busy after this FIS was sent (a reset, to which nothing answers).
    pub(super) fn clears_busy(&self) -> bool {
        self.flags & CLEAR_BUSY != 0
    }

    /// The buffers for up to `wanted` bytes; there may be fewer.
    pub(super) fn data(&self, memory: &GuestMemory, wanted: u64) -> Result<Data, Fault> {
        let mut data = Data::default();
        let mut batch = [0u8; BATCH * PRD as usize];
        let mut left = usize::from(self.prds);
        let mut at = self.table.checked_add(PRDT).ok_or(Fault)?;
        while left > 0 && data.list.len() < wanted {
            let bytes = &mut batch[..left.min(BATCH) * PRD as usize];
            memory.read_slice(bytes, GuestAddress(at)).map_err(|_| Fault)?;
            for prd in bytes.chunks_exact(PRD as usize) {
                if data.list.len() >= wanted {
                    break;
                }
                data.push(memory, prd, wanted)?;
            }
            at = at.checked_add(bytes.len() as u64).ok_or(Fault)?;
            left -= left.min(BATCH);
        }
        Ok(data)
    }

    /// Tells how many bytes were moved (PRDBC).
    pub(super) fn moved(&self, memory: &GuestMemory, bytes: u64) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // Next to what was read of the header: it is RAM.
        let _ = memory.write_obj(bytes.to_le(), GuestAddress(self.header + 4));
    }
}

impl Data {
    fn push(&mut self, memory: &GuestMemory, prd: &[u8], wanted: u64) -> Result<(), Fault> {
        let word = |at: usize| u32::from_le_bytes([prd[at], prd[at + 1], prd[at + 2], prd[at + 3]]);
        let address = u64::from(word(4)) << 32 | u64::from(word(0) & !1);
        let last = word(12);
        self.interrupt |= last >> 31 != 0;
        // 22 bits; bit 0 is always one: the number is even.
        let bytes = ((last & 0x3f_ffff) | 1) + 1;
        let bytes = u64::from(bytes).min(wanted - self.list.len()) as u32;
        if self.list.push(memory, address, bytes) { Ok(()) } else { Err(Fault) }
    }
}

fn read<const N: usize>(memory: &GuestMemory, gpa: u64) -> Result<[u8; N], Fault> {
    let mut data = [0; N];
    // A part that is in RAM is of no use.
    if !memory.check_range(GuestAddress(gpa), N) {
        return Err(Fault);
    }
    memory.read_slice(&mut data, GuestAddress(gpa)).map_err(|_| Fault)?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_memory::{RamLayout, allocate};

    const RAM: u64 = 1 << 20;

    fn prd(address: u64, bytes: u32) -> Vec<u8> {
        [&address.to_le_bytes()[..], &[0; 4], &(bytes - 1).to_le_bytes()].concat()
    }

    fn slot(memory: &GuestMemory, table: u64, prds: u16) -> Result<Slot, Fault> {
        let flags = u32::from(prds) << 16 | 5;
        let header = [&flags.to_le_bytes()[..], &[0; 4], &table.to_le_bytes()].concat();
        memory.write_slice(&header, GuestAddress(0x1000 + 32 * 3)).unwrap();
        Slot::fetch(memory, 0x1000, 3)
    }

    #[test]
    fn buffers_are_as_many_as_wanted() {
        let memory = allocate(&RamLayout::new(RAM).unwrap()).unwrap();
        let table = [prd(0x4000, 2), prd(0x5001, 0x1000), prd(0x8000, 1 << 22)].concat();
        memory.write_slice(&table, GuestAddress(0x2080)).unwrap();
        let slot = slot(&memory, 0x2000, 3).unwrap();
        assert_eq!(slot.data(&memory, 0x2002).unwrap().list.len(), 0x2002);
        assert_eq!(slot.data(&memory, 2).unwrap().list.len(), 2);
        assert!(slot.data(&memory, 0).unwrap().list.is_empty());
        assert_eq!(slot.data(&memory, RAM).err(), Some(Fault), "over the end of RAM");
        slot.moved(&memory, 7);
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1064)).unwrap(), 7);
    }

    #[test]
    fn what_is_not_in_ram_is_a_fault() {
        let memory = allocate(&RamLayout::new(RAM).unwrap()).unwrap();
        for table in [RAM, RAM - 0x80 + 0x40, 0xc000_0000, u64::MAX] {
            if table != RAM - 0x40 {
                assert!(slot(&memory, table, 1).is_err(), "{table:#x}");
            }
        }
        let last = slot(&memory, RAM - 0x80, 1).unwrap();
        assert!(last.data(&memory, 512).is_err(), "the PRDs are beyond");
        assert!(last.data(&memory, 0).is_ok());
        for list in [RAM - 8, RAM, u64::MAX - 31, 0xb000_0000] {
            assert!(
                Slot::fetch(&memory, list, 0).is_err() && Slot::fetch(&memory, list, 31).is_err()
            );
        }
    }

    #[test]
    fn a_full_table_of_small_pieces() {
        let memory = allocate(&RamLayout::new(4 << 20).unwrap()).unwrap();
        let table: Vec<u8> = (0..0xffff).flat_map(|_| prd(0x4000, 2)).collect();
        memory.write_slice(&table, GuestAddress(0x10_0080)).unwrap();
        let slot = slot(&memory, 0x10_0000, 0xffff).unwrap();
        assert_eq!(slot.data(&memory, 1 << 25).unwrap().list.len(), 2 * 0xffff);
    }
}
