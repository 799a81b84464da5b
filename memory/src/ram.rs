//! Guest RAM: one shared memfd, mapped once, laid out around the hole below 4 GiB.
//!
//! ```text
//!   0         A_0000  C_0000   LOW_RAM_END        4 GiB
//!   |  low RAM  |  hole  |  ...  |  PCI, ECAM, ...  |  high RAM (what did not fit below)
//! ```

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vm_memory::guest_memory::FileOffset;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::pages::{PAGE_SIZE, PageTable, PageTracker};

/// The guest's RAM. Clone the `Arc` around it, not this.
pub type GuestMemory = GuestMemoryMmap<PageTracker>;

/// RAM below 4 GiB ends here at the latest (2 GiB, as on Q35 with its ECAM at 0xB000_0000).
pub const LOW_RAM_END: u64 = 0x8000_0000;
/// RAM that does not fit below [`LOW_RAM_END`] starts here (4 GiB).
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Where a PC has its display's memory in place of RAM.
pub const DISPLAY_HOLE: Range<u64> = 0xa_0000..0xc_0000;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is zero or no multiple of a page.
    #[error("guest memory of {0} bytes: it must be a positive multiple of 4096")]
    Size(u64),
    /// The host refused.
    #[error("cannot allocate {bytes} bytes of guest memory ({step})")]
    Host {
        /// Bytes asked for.
        bytes: u64,
        /// What failed.
        step: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

/// Where RAM lies: `(gpa, bytes)` of each region, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    /// The regions; what does not fit below [`LOW_RAM_END`] starts at [`HIGH_RAM_START`].
    pub regions: Vec<(u64, u64)>,
}

impl RamLayout {
    /// The layout for `bytes` of RAM.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Size(bytes));
        }
        let low = bytes.min(LOW_RAM_END);
        let mut regions = vec![(0, low)];
        if bytes > low {
            regions.push((HIGH_RAM_START, bytes - low));
        }
        Ok(Self { regions })
    }

    /// The layout of a PC with `bytes` of RAM: what would lie in [`DISPLAY_HOLE`] is lost.
    ///
    /// # Errors
    /// As for [`RamLayout::new`].
    pub fn pc(bytes: u64) -> Result<Self, Error> {
        let mut layout = Self::new(bytes)?;
        let (hole, low) = (DISPLAY_HOLE, layout.regions[0].1);
        if low > hole.start {
            layout.regions[0].1 = hole.start;
        }
        if low > hole.end {
            layout.regions.insert(1, (hole.end, low - hole.end));
        }
        Ok(layout)
    }

    /// RAM as it is counted, without the hole: `(gpa, bytes)` of what is below 4 GiB and, if there is any, above.
    pub fn spans(&self) -> Vec<(u64, u64)> {
        let end = |high| {
            let side = self.regions.iter().filter(move |(gpa, _)| (*gpa >= HIGH_RAM_START) == high);
            side.map(|(gpa, bytes)| gpa + bytes).max()
        };
        let low = end(false).map(|end| (0, end));
        let high = end(true).map(|end| (HIGH_RAM_START, end - HIGH_RAM_START));
        low.into_iter().chain(high).collect()
    }

    /// All bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Allocates guest RAM as one memfd, shared and not reserved (pages appear when touched).
pub fn allocate(layout: &RamLayout) -> Result<Arc<GuestMemory>, Error> {
    let bytes = layout.bytes();
    let host = |step| move |source| Error::Host { bytes, step, source };
    let file = memfd(c"lodge-ram").map_err(host("memfd_create"))?;
    file.set_len(bytes).map_err(host("size of the memfd"))?;
    let file = Arc::new(file);
    let mut start = 0;
    let mut regions = Vec::new();
    for &(gpa, len) in &layout.regions {
        let tracker = PageTracker::new(Arc::new(PageTable::new(gpa, len)));
        let size = usize::try_from(len).map_err(|_| Error::Size(bytes))?;
        let mapping = MmapRegionBuilder::new_with_bitmap(size, tracker)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file.clone(), start))
            .build()
            .map_err(|e| host("mmap")(io::Error::other(e)))?;
        start += len;
        regions.push(GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or(Error::Size(bytes))?);
    }
    let memory = GuestMemory::from_regions(regions)
        .map_err(|e| host("address layout")(io::Error::other(e)))?;
    Ok(Arc::new(memory))
}

fn memfd(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a valid C string; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The state bytes of a region of guest RAM.
pub fn page_table(region: &GuestRegionMmap<PageTracker>) -> &Arc<PageTable> {
    (**region).bitmap().table()
}

/// Notes a write to guest RAM that did not go through `vm-memory` (io_uring, a tap's readv).
pub fn mark_written(memory: &GuestMemory, gpa: u64, len: u64) {
    let mut at = gpa;
    let end = gpa.saturating_add(len);
    while at < end {
        let Some(region) = memory.find_region(GuestAddress(at)) else { return };
        let start = region.start_addr().0;
        let stop = end.min(start + region.len());
        page_table(region).written(at - start, stop - at);
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CodeWatcher, PageFlags};
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;
    use vm_memory::Bytes;

    #[test]
    fn layout_splits_at_the_hole() {
        assert_eq!(RamLayout::new(1 << 30).unwrap().regions, [(0, 1 << 30)]);
        let big = RamLayout::new(3 << 30).unwrap();
        assert_eq!(big.regions, [(0, LOW_RAM_END), (HIGH_RAM_START, 1 << 30)]);
        assert_eq!(big.bytes(), 3 << 30);
        let pc = RamLayout::pc(3 << 30).unwrap();
        let low = (0xc_0000, LOW_RAM_END - 0xc_0000);
        assert_eq!(pc.regions, [(0, 0xa_0000), low, (HIGH_RAM_START, 1 << 30)]);
        assert_eq!(pc.spans(), big.spans());
        assert_eq!(pc.spans(), [(0, LOW_RAM_END), (HIGH_RAM_START, 1 << 30)]);
        assert_eq!(RamLayout::pc(0xb_0000).unwrap().regions, [(0, 0xa_0000)]);
        assert_eq!(RamLayout::pc(0x1000).unwrap().regions, [(0, 0x1000)]);
        assert!(matches!(RamLayout::new(0), Err(Error::Size(0))));
        assert!(matches!(RamLayout::new(4097), Err(Error::Size(4097))));
    }

    #[derive(Default)]
    struct Seen(Mutex<Vec<(u64, u64)>>);
    impl CodeWatcher for Seen {
        fn code_written(&self, gpa: u64, len: u64) {
            self.0.lock().unwrap().push((gpa, len));
        }
    }

    #[test]
    fn writes_mark_pages_and_tell_of_code() {
        let memory = allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
        let table = page_table(memory.iter().next().unwrap()).clone();
        let seen = Arc::new(Seen::default());
        table.watch_code(seen.clone());
        memory.write_obj(7u32, GuestAddress(0x1ffe)).unwrap();
        assert_eq!(table.take_dirty()[0], 0b110);
        assert_eq!(table.take_dirty()[0], 0);
        table.page(2).fetch_or(PageFlags::CODE, Ordering::SeqCst);
        mark_written(&memory, 0x2010, 8);
        memory.write_obj(7u8, GuestAddress(0x3000)).unwrap();
        assert_eq!(*seen.0.lock().unwrap(), [(0x2010, 8)]);
        assert_eq!(table.take_dirty()[0], 0b1100);
    }
}
