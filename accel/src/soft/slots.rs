//! Memory over RAM. A slot with a higher number lies over those with lower ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use lodge_memory::{PAGE_SIZE, PageTable};
use lodge_softcpu::Shared;
use lodge_softcpu::shared::PhysRegion;
use lodge_softcpu::walk::PHYSICAL_BITS;

use crate::error::{Error, Result};
use crate::vm::MemorySlot;

/// How many there are.
const SLOTS: u32 = 16;

struct Slot {
    memory: MemorySlot,
    /// Its pages' state.
    table: Arc<PageTable>,
}

/// What lies over RAM.
#[derive(Default)]
pub(super) struct Slots {
    slots: BTreeMap<u32, Slot>,
}

impl Slots {
    /// Sets or clears slot `index`.
    ///
    /// # Safety
    /// As [`crate::Vm::set_memory`] says.
    pub(super) unsafe fn set(
        &mut self,
        shared: &Shared,
        index: u32,
        memory: Option<MemorySlot>,
    ) -> Result<()> {
        if index >= SLOTS {
            return Err(Error::Invalid(format!(
                "memory slot {index}: there are 0 to {}",
                SLOTS - 1
            )));
        }
        match memory {
            Some(memory) => {
                check(index, &memory)?;
                let table = Arc::new(PageTable::new(memory.gpa, memory.bytes));
                self.slots.insert(index, Slot { memory, table });
            }
            None => {
                self.slots.remove(&index);
            }
        }
        shared.set_overlays(self.slots.values().map(|slot| PhysRegion {
            gpa: slot.memory.gpa,
            end: slot.memory.gpa + slot.memory.bytes,
            host: slot.memory.host,
            readonly: slot.memory.readonly,
            table: slot.table.clone(),
            table_page: 0,
        }));
        Ok(())
    }

    /// The written pages of slot `index`, forgotten; the caller revokes what lets vCPUs write unseen.
    pub(super) fn take_dirty(&self, index: u32) -> Vec<u64> {
        self.slots.get(&index).map(|slot| slot.table.take_dirty()).unwrap_or_default()
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
    let limit = 1 << PHYSICAL_BITS;
    if slot.gpa.checked_add(slot.bytes).is_none_or(|end| end > limit) {
        return Err(Error::Invalid(format!(
            "memory slot {index} ends beyond {limit:#x}, where the guest's physical addresses do"
        )));
    }
    if host.checked_add(slot.bytes).is_none() {
        return Err(Error::Invalid(format!("memory slot {index} leaves the address space")));
    }
    Ok(())
}
