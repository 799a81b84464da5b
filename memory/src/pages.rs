//! One byte of state for each page of guest RAM: was it written, does it hold decoded code.
//!
//! ```text
//!                  store by a vCPU, DMA
//!   clean --------------------------------> DIRTY
//!         <-------------------------------- take_dirty(): read and cleared together
//!
//!              a software CPU decodes code
//!   no code ------------------------------> CODE (the writer tells the CodeWatcher)
//!           <------------------------------ the software CPUs dropped that code
//! ```
//!
//! A writer stores its data first and looks at the flags after a full fence; a software CPU sets
//! `CODE` first and reads the bytes after a full fence. So either the decoder sees the new bytes
//! or the writer sees `CODE`.

use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// The bits of a page's state byte.
pub struct PageFlags;

impl PageFlags {
    /// The page was written since the dirty log was last taken.
    pub const DIRTY: u8 = 1;
    /// A software CPU holds code decoded from this page.
    pub const CODE: u8 = 2;
}

/// Told when a page that holds decoded code was written by something other than a vCPU.
pub trait CodeWatcher: Send + Sync {
    /// `len` bytes at guest-physical `gpa` have been written. Called in the writer's thread, after
    /// the data is in place.
    fn code_written(&self, gpa: u64, len: u64);
}

/// The state bytes of one contiguous region of guest RAM.
pub struct PageTable {
    gpa: u64,
    flags: Box<[AtomicU8]>,
    watcher: OnceLock<Arc<dyn CodeWatcher>>,
}

impl std::fmt::Debug for PageTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageTable({:#x}, {} pages)", self.gpa, self.flags.len())
    }
}

impl PageTable {
    /// A table for `bytes` of RAM that starts at guest-physical address `gpa`. Pages begin clean.
    pub fn new(gpa: u64, bytes: u64) -> Self {
        // Calloc'ed, so untouched pages of a large guest cost nothing.
        let pages = usize::try_from(bytes.div_ceil(PAGE_SIZE)).expect("RAM fits the address space");
        let zeroed = vec![0u8; pages].into_boxed_slice();
        // SAFETY: AtomicU8 has the same size, alignment and bit validity as u8, and the box is
        // uniquely owned here.
        let flags = unsafe { Box::from_raw(Box::into_raw(zeroed) as *mut [AtomicU8]) };
        Self { gpa, flags, watcher: OnceLock::new() }
    }

    /// The guest-physical address of the first page.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// How many pages the table covers.
    pub fn len(&self) -> usize {
        self.flags.len()
    }

    /// Whether the table covers no page.
    pub fn is_empty(&self) -> bool {
        self.flags.is_empty()
    }

    /// The state byte of page `index` (counted from the region's start).
    ///
    /// # Panics
    /// If `index` is outside of the region.
    pub fn page(&self, index: usize) -> &AtomicU8 {
        &self.flags[index]
    }

    /// Sets who hears of writes to code pages; the first call wins.
    pub fn watch_code(&self, watcher: Arc<dyn CodeWatcher>) {
        let _ = self.watcher.set(watcher);
    }

    /// Notes that `len` bytes at `offset` (from the region's start) were written by a device.
    pub fn written(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        fence(Ordering::SeqCst);
        let first = (offset >> PAGE_SHIFT) as usize;
        let last = (offset.saturating_add(len - 1) >> PAGE_SHIFT) as usize;
        let mut code = false;
        for page in self.flags.iter().take(last.saturating_add(1)).skip(first) {
            let flags = page.load(Ordering::Relaxed);
            if flags & PageFlags::DIRTY == 0 {
                page.fetch_or(PageFlags::DIRTY, Ordering::Relaxed);
            }
            code |= flags & PageFlags::CODE != 0;
        }
        if code && let Some(watcher) = self.watcher.get() {
            watcher.code_written(self.gpa + offset, len);
        }
    }

    /// Reads and clears the dirty bits: bit `i % 64` of word `i / 64` says whether page `i` was
    /// written. The caller makes vCPUs drop what lets them write without marking.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.flags
            .chunks(64)
            .map(|chunk| {
                chunk.iter().enumerate().fold(0, |word, (bit, page)| {
                    if page.load(Ordering::Relaxed) & PageFlags::DIRTY == 0 {
                        return word;
                    }
                    page.fetch_and(!PageFlags::DIRTY, Ordering::SeqCst);
                    word | 1 << bit
                })
            })
            .collect()
    }
}

/// The hook that `vm-memory` calls for every write: a [`PageTable`] and an offset into it.
#[derive(Clone, Debug)]
pub struct PageTracker {
    table: Arc<PageTable>,
    offset: usize,
}

impl PageTracker {
    /// A tracker for a whole region.
    pub fn new(table: Arc<PageTable>) -> Self {
        Self { table, offset: 0 }
    }

    /// The region's state bytes.
    pub fn table(&self) -> &Arc<PageTable> {
        &self.table
    }
}

/// A borrowed [`PageTracker`], so that slices cost no reference count.
#[derive(Clone, Copy, Debug)]
pub struct TrackerSlice<'a> {
    table: &'a PageTable,
    offset: usize,
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = TrackerSlice<'a>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }
    fn slice_at(&self, offset: usize) -> TrackerSlice<'_> {
        TrackerSlice { table: &self.table, offset: self.offset.saturating_add(offset) }
    }
}

impl<'a> WithBitmapSlice<'a> for TrackerSlice<'_> {
    type S = Self;
}

impl BitmapSlice for TrackerSlice<'_> {}

impl Bitmap for TrackerSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.table.written(self.offset.saturating_add(offset) as u64, len as u64);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        let index = self.offset.saturating_add(offset) >> PAGE_SHIFT;
        self.table
            .flags
            .get(index)
            .is_some_and(|page| page.load(Ordering::Relaxed) & PageFlags::DIRTY != 0)
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self { table: self.table, offset: self.offset.saturating_add(offset) }
    }
}
