//! Which memory the guest's CPUs see: RAM, what lies over it, and the pages that KVM keeps.
//!
//! KVM's own slots must not overlap, so the layers are cut into disjoint pieces first:
//!
//! ```text
//!   KVM's own pages        ==                     (never ours)
//!   slot 1            ####
//!   slot 0               oooooo
//!   RAM          ..................
//!   pieces       [ RAM ][1 ][0 ]  [ RAM ]
//! ```
//!
//! Taking a piece away and adding another is two steps for the kernel. In between the guest would
//! find nothing there, so vCPUs stay out of the guest meanwhile ([`Gate`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use lodge_memory::{GuestMemory, PAGE_SIZE, PageFlags, PageTable, page_table};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::gate::Gate;
use super::refused;
use crate::error::{Error, Result};
use crate::vm::MemorySlot;

/// How many extra slots there are.
pub(super) const EXTRA_SLOTS: usize = 16;

/// A range of guest-physical addresses and what is behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    gpa: u64,
    bytes: u64,
    /// Address in this process.
    host: u64,
    readonly: bool,
    what: What,
}

/// What a piece is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Guest RAM: the index of its region.
    Ram(usize),
    /// The extra slot of this index.
    Extra(usize),
}

impl Piece {
    fn end(&self) -> u64 {
        self.gpa + self.bytes
    }

    /// The part of this piece from `from` to `to`, if any.
    fn part(&self, from: u64, to: u64) -> Option<Self> {
        let (start, end) = (self.gpa.max(from), self.end().min(to));
        (start < end).then(|| Self {
            gpa: start,
            bytes: end - start,
            host: self.host + (start - self.gpa),
            ..*self
        })
    }
}

/// Takes `from..to` out of `pieces`.
fn cut(pieces: &mut Vec<Piece>, from: u64, to: u64) {
    *pieces = pieces
        .iter()
        .flat_map(|piece| [piece.part(0, from), piece.part(to, u64::MAX)])
        .flatten()
        .collect();
}

/// Lays the layers (lowest first) over each other, and keeps `reserved` (start, end) free.
fn flatten(layers: &[Piece], reserved: (u64, u64)) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for layer in layers {
        cut(&mut pieces, layer.gpa, layer.end());
        pieces.push(*layer);
    }
    cut(&mut pieces, reserved.0, reserved.1);
    pieces.sort_by_key(|piece| piece.gpa);
    pieces
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KernelSlot {
    id: u32,
    piece: Piece,
    logged: bool,
}

#[derive(Clone)]
struct Extra {
    slot: MemorySlot,
    /// Which of its pages were written, as far as it was read from the kernel.
    table: Arc<PageTable>,
}

/// The slots as the kernel has them, and what was asked for.
pub(super) struct Slots {
    memory: Arc<GuestMemory>,
    reserved: (u64, u64),
    extra: [Option<Extra>; EXTRA_SLOTS],
    kernel: Vec<KernelSlot>,
    logging: bool,
}

impl Slots {
    pub(super) fn new(memory: Arc<GuestMemory>, reserved: (u64, u64)) -> Self {
        Self { memory, reserved, extra: Default::default(), kernel: Vec::new(), logging: false }
    }

    /// The extra slots, a later one over an earlier one, and where their written pages are noted.
    pub(super) fn extra(&self) -> impl Iterator<Item = (&MemorySlot, &Arc<PageTable>)> {
        self.extra.iter().flatten().map(|extra| (&extra.slot, &extra.table))
    }

    fn wanted(&self) -> Vec<Piece> {
        let ram = self.memory.iter().enumerate().map(|(index, region)| Piece {
            gpa: region.start_addr().0,
            bytes: region.len(),
            host: region.as_ptr() as u64,
            readonly: false,
            what: What::Ram(index),
        });
        let extra = self.extra.iter().enumerate().filter_map(|(index, extra)| {
            let slot = &extra.as_ref()?.slot;
            Some(Piece {
                gpa: slot.gpa,
                bytes: slot.bytes,
                host: slot.host as u64,
                readonly: slot.readonly,
                what: What::Extra(index),
            })
        });
        flatten(&ram.chain(extra).collect::<Vec<_>>(), self.reserved)
    }

    /// Sets or clears extra slot `index`.
    ///
    /// # Safety
    /// As for [`crate::Vm::set_memory`].
    pub(super) unsafe fn set(
        &mut self,
        vm: &VmFd,
        gate: &Gate,
        index: u32,
        slot: Option<MemorySlot>,
    ) -> Result<()> {
        let at = index as usize;
        if at >= EXTRA_SLOTS {
            return Err(Error::Invalid(format!(
                "memory slot {index}: there are {EXTRA_SLOTS}, counted from 0"
            )));
        }
        if let Some(slot) = &slot {
            check(index, slot)?;
        }
        let extra =
            slot.map(|slot| Extra { slot, table: Arc::new(PageTable::new(slot.gpa, slot.bytes)) });
        let before = std::mem::replace(&mut self.extra[at], extra);
        let result = self.apply(vm, gate);
        if result.is_err() {
            self.extra[at] = before;
            if let Err(error) = self.apply(vm, gate) {
                tracing::error!(%error, "the guest's memory could not be put back");
            }
        }
        result
    }

    /// Brings the kernel's slots in line with what is wanted.
    pub(super) fn apply(&mut self, vm: &VmFd, gate: &Gate) -> Result<()> {
        let wanted = self.wanted();
        let (kept, gone): (Vec<_>, Vec<_>) =
            self.kernel.iter().copied().partition(|slot| wanted.contains(&slot.piece));
        let new: Vec<_> = wanted
            .into_iter()
            .filter(|piece| !kept.iter().any(|slot| slot.piece == *piece))
            .collect();
        if gone.is_empty() || new.is_empty() {
            self.exchange(vm, &gone, &new)
        } else {
            gate.closed_while(|| self.exchange(vm, &gone, &new))
        }
    }

    fn exchange(&mut self, vm: &VmFd, gone: &[KernelSlot], new: &[Piece]) -> Result<()> {
        for slot in gone {
            // What the kernel noted of this piece goes with it.
            self.collect_into_tables(vm, slot)?;
            write_slot(vm, slot, 0).map_err(refused(describe("removing", &slot.piece)))?;
            self.kernel.retain(|other| other.id != slot.id);
        }
        for piece in new {
            let logged = match piece.what {
                What::Ram(_) => self.logging,
                What::Extra(_) => !piece.readonly,
            };
            let slot = KernelSlot { id: self.free_id(), piece: *piece, logged };
            write_slot(vm, &slot, piece.bytes).map_err(refused(describe("adding", piece)))?;
            self.kernel.push(slot);
        }
        Ok(())
    }

    fn free_id(&self) -> u32 {
        (0..).find(|id| self.kernel.iter().all(|slot| slot.id != *id)).unwrap_or(u32::MAX)
    }

    /// Switches the dirty log of RAM on or off.
    pub(super) fn set_logging(&mut self, vm: &VmFd, on: bool) -> Result<()> {
        self.logging = on;
        for index in 0..self.kernel.len() {
            let slot = self.kernel[index];
            if matches!(slot.piece.what, What::Extra(_)) || slot.logged == on {
                continue;
            }
            if !on {
                self.collect_into_tables(vm, &slot)?;
            }
            let changed = KernelSlot { logged: on, ..slot };
            write_slot(vm, &changed, slot.piece.bytes)
                .map_err(refused(describe("changing the dirty log of", &slot.piece)))?;
            self.kernel[index] = changed;
        }
        Ok(())
    }

    /// Everything written since the last call, by region of RAM.
    pub(super) fn take_dirty(&self, vm: &VmFd) -> Result<Vec<Vec<u64>>> {
        for slot in self.kernel.iter().filter(|slot| matches!(slot.piece.what, What::Ram(_))) {
            self.collect_into_tables(vm, slot)?;
        }
        Ok(self.memory.iter().map(|region| page_table(region).take_dirty()).collect())
    }

    /// The pages of extra slot `index` that were written since the last call.
    pub(super) fn take_slot_dirty(&self, vm: &VmFd, index: u32) -> Result<Vec<u64>> {
        let Some(Some(extra)) = self.extra.get(index as usize) else { return Ok(Vec::new()) };
        let pieces = |slot: &&KernelSlot| slot.piece.what == What::Extra(index as usize);
        for slot in self.kernel.iter().filter(pieces) {
            self.collect_into_tables(vm, slot)?;
        }
        Ok(extra.table.take_dirty())
    }

    /// Where pages of a piece are noted; none for an extra slot that was replaced.
    fn table_of(&self, piece: &Piece) -> Option<&Arc<PageTable>> {
        match piece.what {
            What::Ram(index) => self.memory.iter().nth(index).map(page_table),
            What::Extra(index) => {
                let extra = self.extra.get(index)?.as_ref()?;
                let slot = &extra.slot;
                let same =
                    piece.host.checked_sub(slot.host as u64) == piece.gpa.checked_sub(slot.gpa);
                (same && piece.end() <= slot.gpa + slot.bytes).then_some(&extra.table)
            }
        }
    }

    /// Moves what the kernel noted of `slot` to the page tables, where devices note theirs.
    fn collect_into_tables(&self, vm: &VmFd, slot: &KernelSlot) -> Result<()> {
        let piece = &slot.piece;
        let Some(table) = self.table_of(piece).filter(|_| slot.logged) else { return Ok(()) };
        let words = vm
            .get_dirty_log(slot.id, piece.bytes as usize)
            .map_err(refused(describe("reading the dirty log of", piece)))?;
        let first = ((piece.gpa - table.gpa()) / PAGE_SIZE) as usize;
        let pages = (piece.bytes / PAGE_SIZE) as usize;
        for (at, mut word) in words.into_iter().enumerate() {
            while word != 0 {
                let page = at * 64 + word.trailing_zeros() as usize;
                word &= word - 1;
                if page < pages {
                    table.page(first + page).fetch_or(PageFlags::DIRTY, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }
}

fn check(index: u32, slot: &MemorySlot) -> Result<()> {
    let whole = |n: u64| n.is_multiple_of(PAGE_SIZE);
    let host = slot.host as u64;
    if slot.bytes == 0 || !whole(slot.bytes) || !whole(slot.gpa) || !whole(host) {
        return Err(Error::Invalid(format!(
            "memory slot {index}: {:#x} bytes at {:#x} from {host:#x}: all three must be multiples \
             of 4096, and the size not 0",
            slot.bytes, slot.gpa
        )));
    }
    if slot.gpa.checked_add(slot.bytes).is_none() || host.checked_add(slot.bytes).is_none() {
        return Err(Error::Invalid(format!("memory slot {index} leaves the address space")));
    }
    Ok(())
}

fn describe(what: &str, piece: &Piece) -> String {
    let kind = match piece.what {
        What::Ram(_) => "RAM",
        What::Extra(_) => "the memory slot",
    };
    format!("{what} {kind} at {:#x}..{:#x}", piece.gpa, piece.end())
}

/// Tells the kernel of a slot; 0 bytes removes it.
fn write_slot(vm: &VmFd, slot: &KernelSlot, bytes: u64) -> std::io::Result<()> {
    let flags = if slot.piece.readonly { KVM_MEM_READONLY } else { 0 }
        | if slot.logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    let region = kvm_userspace_memory_region {
        slot: slot.id,
        flags,
        guest_phys_addr: slot.piece.gpa,
        memory_size: bytes,
        userspace_addr: slot.piece.host,
    };
    // SAFETY: the range is either guest RAM, kept mapped by the Arc that lives as long as the VM, or
    // an extra slot, whose owner promised so to `set`.
    Ok(unsafe { vm.set_user_memory_region(region) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: (u64, u64) = (0, 0);

    fn ram(gpa: u64, bytes: u64) -> Piece {
        Piece { gpa, bytes, host: 0x10_0000 + gpa, readonly: false, what: What::Ram(0) }
    }

    fn rom(gpa: u64, bytes: u64) -> Piece {
        Piece { gpa, bytes, host: 0x900_0000, readonly: true, what: What::Extra(0) }
    }

    #[test]
    fn a_slot_in_the_middle_splits_ram() {
        let pieces = flatten(&[ram(0, 0x10000), rom(0x4000, 0x2000)], NONE);
        assert_eq!(
            pieces,
            [
                ram(0, 0x4000),
                rom(0x4000, 0x2000),
                Piece { gpa: 0x6000, bytes: 0xa000, host: 0x10_6000, ..ram(0, 1) },
            ]
        );
    }

    #[test]
    fn a_later_slot_hides_an_earlier_one() {
        let later = Piece { host: 0xa00_0000, ..rom(0x3000, 0x2000) };
        let pieces = flatten(&[ram(0, 0x4000), rom(0x2000, 0x2000), later], NONE);
        assert_eq!(pieces, [ram(0, 0x2000), rom(0x2000, 0x1000), later]);
    }

    #[test]
    fn kvm_keeps_its_own_pages() {
        let pieces = flatten(&[rom(0x1000, 0x4000)], (0x2000, 0x3000));
        let tail = Piece { host: 0x900_2000, ..rom(0x3000, 0x2000) };
        assert_eq!(pieces, [rom(0x1000, 0x1000), tail]);
    }

    #[test]
    fn hiding_everything_leaves_only_the_slot() {
        let pieces = flatten(&[ram(0x1000, 0x1000), rom(0, 0x4000)], NONE);
        assert_eq!(pieces, [rom(0, 0x4000)]);
    }

    #[test]
    fn bad_slots_are_refused() {
        let slot = |gpa, bytes| MemorySlot { gpa, bytes, host: 0x1000 as *mut u8, readonly: false };
        assert!(check(0, &slot(0x1000, 0x1000)).is_ok());
        for (gpa, bytes) in [(0x1001, 0x1000), (0x1000, 0), (0x1000, 0x1001), (!0xfff, 0x1000)] {
            assert!(check(0, &slot(gpa, bytes)).is_err(), "{gpa:#x} {bytes:#x}");
        }
    }
}
