//! The guest-physical address space as everybody shares it: the guest's RAM, which of its pages
//! were written or hold code, and the [`Bus`] through which a CPU reaches what is not RAM.
//!
//! ```text
//!            vCPU threads                     device threads
//!   loads/stores      ports, MMIO             DMA (virtqueues, io_uring)
//!        |                |                        |
//!        v                v                        v
//!   +---------+       +-------+          vm-memory's Bytes, VolatileSlice
//!   | PhysMap |       |  Bus  |                    |
//!   +---------+       +-------+                    v
//!        |            (devices)        GuestMemory = GuestMemoryMmap<PageTracker>
//!        +----------> one memfd <------------------+
//! ```
//!
//! Every write a device makes goes through [`PageTracker`], which marks the page dirty and, when
//! software CPUs have decoded code from it, tells them ([`CodeWatcher`]). A writer that bypasses
//! `vm-memory` (io_uring reading straight into guest RAM) must call [`mark_written`] afterwards.

mod bus;
mod pages;
mod ram;

pub use bus::{Bus, NoBus};
pub use pages::{CodeWatcher, PAGE_SHIFT, PAGE_SIZE, PageFlags, PageTable, PageTracker};
pub use ram::{
    DISPLAY_HOLE, Error, GuestMemory, HIGH_RAM_START, LOW_RAM_END, RamLayout, allocate,
    mark_written, page_table,
};
