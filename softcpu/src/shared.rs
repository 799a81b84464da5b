//! What the vCPUs of one VM share: the map of guest-physical memory, which lines of it hold decoded code, and a
//! mailbox for each vCPU.
//!
//! ```text
//!  somebody (another vCPU, a device's thread, the control thread)
//!     | post(request)                      attention bits
//!     v                                         |
//!  +---------+   taken between two blocks   +---v----+
//!  | mailbox | ---------------------------> |  vCPU  |   in_guest: may hold translations and decoded code
//!  +---------+   before in_guest is set     +--------+   !in_guest: halted, paused, or inside a bus call
//! ```
//!
//! A vCPU looks at its attention word every [`crate::FUEL`] instructions at the latest. Whoever needs to know that a
//! request was carried out waits until the vCPU is out of guest code or says that it has done so.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, Weak};
use std::time::{Duration, Instant};

use lodge_memory::{Bus, CodeWatcher, GuestMemory, PAGE_SIZE, PageFlags, PageTable};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::chip::Chip;
use crate::chip::lapic::Lapic;

/// Bits of a vCPU's attention word.
#[allow(missing_docs)]
pub mod attention {
    /// `run` must return.
    pub const KICK: u32 = 1 << 0;
    /// The mailbox is not empty.
    pub const MAIL: u32 = 1 << 1;
    /// The local APIC or the PIC may have an interrupt.
    pub const INTERRUPT: u32 = 1 << 2;
    pub const NMI: u32 = 1 << 3;
    pub const INIT: u32 = 1 << 4;
    pub const SIPI: u32 = 1 << 5;
    /// Somebody wants all vCPUs out of guest code for a moment.
    pub const EXCLUSIVE: u32 = 1 << 6;
}

/// What a vCPU is asked to do between two blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Drop the code decoded from this guest-physical page.
    DropCode(u64),
    /// Make stores to this guest-physical page (or all pages) take the slow path.
    RevokeWrite(Option<u64>),
    /// Guest-physical memory looks different now.
    ReloadPhys,
}

/// One stretch of guest-physical memory.
pub struct PhysRegion {
    /// First address.
    pub gpa: u64,
    /// One past the last address.
    pub end: u64,
    /// Where it lies here.
    pub host: *mut u8,
    /// Guest stores go to the bus.
    pub readonly: bool,
    /// The pages' state; `table_page` is the index of the region's first page.
    pub table: Arc<PageTable>,
    /// Index in `table` of the region's first page.
    pub table_page: usize,
}

// SAFETY: guest memory may be accessed from any thread; whoever made the map keeps it mapped.
unsafe impl Send for PhysRegion {}
// SAFETY: as above.
unsafe impl Sync for PhysRegion {}

/// A page of guest-physical memory found in a [`PhysMap`].
#[derive(Clone, Copy)]
pub struct PhysPage<'a> {
    /// Where the page lies here.
    pub host: *mut u8,
    /// Guest stores go to the bus.
    pub readonly: bool,
    /// Its state ([`PageFlags`]).
    pub state: &'a AtomicU8,
}

/// Guest-physical memory: RAM and what lies over it. Regions ascend and do not overlap.
#[derive(Default)]
pub struct PhysMap {
    regions: Vec<PhysRegion>,
}

impl PhysMap {
    /// The page at `gpa`, or none where the bus answers.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<PhysPage<'_>> {
        let region = self.regions.iter().find(|r| gpa < r.end)?;
        let offset = gpa.checked_sub(region.gpa)? & !0xfff;
        Some(PhysPage {
            // SAFETY: `offset` is inside of the region, which is mapped in full.
            host: unsafe { region.host.add(offset as usize) },
            readonly: region.readonly,
            state: region.table.page(region.table_page + (offset >> 12) as usize),
        })
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[PhysRegion] {
        &self.regions
    }

    fn of_ram(memory: &GuestMemory) -> Self {
        let regions = memory
            .iter()
            .map(|region| PhysRegion {
                gpa: region.start_addr().0,
                end: region.start_addr().0 + region.len(),
                host: region.as_ptr(),
                readonly: false,
                table: lodge_memory::page_table(region).clone(),
                table_page: 0,
            })
            .collect();
        Self { regions }
    }

    /// Lays `over` on top, cutting what was there.
    fn overlay(&mut self, over: PhysRegion) {
        let mut cut = Vec::with_capacity(self.regions.len() + 2);
        for region in self.regions.drain(..) {
            if region.end <= over.gpa || region.gpa >= over.end {
                cut.push(region);
                continue;
            }
            if region.gpa < over.gpa {
                cut.push(region.slice(region.gpa, over.gpa));
            }
            if region.end > over.end {
                cut.push(region.slice(over.end, region.end));
            }
        }
        cut.push(over);
        cut.sort_by_key(|r| r.gpa);
        self.regions = cut;
    }
}

impl PhysRegion {
    fn slice(&self, gpa: u64, end: u64) -> Self {
        let skip = gpa - self.gpa;
        Self {
            gpa,
            end,
            // SAFETY: `gpa` is inside of the region.
            host: unsafe { self.host.add(skip as usize) },
            readonly: self.readonly,
            table: self.table.clone(),
            table_page: self.table_page + (skip >> 12) as usize,
        }
    }
}

#[derive(Default)]
struct Mail {
    requests: Vec<Request>,
    /// Requests posted, counted from the VM's beginning.
    posted: u64,
}

/// The part of a vCPU that others may touch.
pub struct Port {
    /// Bits of [`attention`].
    pub attention: AtomicU32,
    /// The vCPU may hold translations and run decoded code.
    in_guest: AtomicBool,
    mail: Mutex<Mail>,
    /// Requests carried out, counted from the VM's beginning.
    done: AtomicU64,
    /// The vCPU sleeps (HLT, wait for SIPI) under this lock.
    sleep: Mutex<()>,
    awake: Condvar,
    /// The local APIC.
    pub lapic: Lapic,
    /// The vector of the last start-up IPI.
    pub sipi_vector: AtomicU8,
}

impl Port {
    fn new(index: u32) -> Self {
        Self {
            attention: AtomicU32::new(0),
            in_guest: AtomicBool::new(false),
            mail: Mutex::default(),
            done: AtomicU64::new(0),
            sleep: Mutex::new(()),
            awake: Condvar::new(),
            lapic: Lapic::new(index),
            sipi_vector: AtomicU8::new(0),
        }
    }

    /// Sets attention bits and wakes the vCPU if it sleeps.
    pub fn notify(&self, bits: u32) {
        self.attention.fetch_or(bits, Ordering::SeqCst);
        if !self.in_guest.load(Ordering::SeqCst) {
            // Taken and released: the vCPU either has not looked at its attention word yet or waits already.
            drop(lock(&self.sleep));
            self.awake.notify_one();
        }
    }

    /// Sleeps until an attention bit is set or `deadline` (none: forever) has passed. Only the vCPU's own thread
    /// calls this, out of guest code.
    pub fn sleep(&self, deadline: Option<Instant>) {
        let mut guard = lock(&self.sleep);
        while self.attention.load(Ordering::SeqCst) == 0 {
            match deadline {
                None => guard = self.awake.wait(guard).unwrap_or_else(|e| e.into_inner()),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left == Duration::ZERO {
                        return;
                    }
                    guard =
                        self.awake.wait_timeout(guard, left).unwrap_or_else(|e| e.into_inner()).0;
                }
            }
        }
    }

    fn post(&self, request: Request) {
        let mut mail = lock(&self.mail);
        mail.posted += 1;
        if !mail.requests.contains(&request) {
            mail.requests.push(request);
        }
        drop(mail);
        self.notify(attention::MAIL);
    }

    /// Takes the requests. When they are carried out the vCPU gives the token to [`Port::mail_done`].
    pub fn take_mail(&self) -> (Vec<Request>, u64) {
        self.attention.fetch_and(!attention::MAIL, Ordering::SeqCst);
        let mut mail = lock(&self.mail);
        (std::mem::take(&mut mail.requests), mail.posted)
    }

    /// The requests that came with `token` are carried out.
    pub fn mail_done(&self, token: u64) {
        self.done.store(token, Ordering::SeqCst);
    }

    fn posted(&self) -> u64 {
        lock(&self.mail).posted
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What the vCPUs of one VM share.
pub struct Shared {
    /// Guest RAM, kept mapped for as long as anything points into it.
    pub memory: Arc<GuestMemory>,
    /// What is not memory.
    pub bus: Arc<dyn Bus>,
    /// PIC, IOAPIC, PIT.
    pub chip: Chip,
    ports: Vec<Port>,
    phys: RwLock<Arc<PhysMap>>,
    /// Which 64-byte lines of a page (by guest-physical page address) hold decoded code.
    code: Mutex<HashMap<u64, u64>>,
    exclusive: Mutex<()>,
    exclusive_wanted: AtomicBool,
    /// TSC offset that all vCPUs begin with.
    pub tsc_offset: AtomicU64,
}

struct Watcher(Weak<Shared>);

impl CodeWatcher for Watcher {
    fn code_written(&self, gpa: u64, len: u64) {
        if let Some(shared) = self.0.upgrade() {
            shared.code_written(gpa, len);
        }
    }
}

impl Shared {
    /// The shared part of a VM with `vcpus` vCPUs.
    pub fn new(memory: Arc<GuestMemory>, bus: Arc<dyn Bus>, vcpus: u32) -> Arc<Self> {
        let phys = RwLock::new(Arc::new(PhysMap::of_ram(&memory)));
        Arc::new_cyclic(|this| {
            let watcher = Arc::new(Watcher(this.clone()));
            for region in memory.iter() {
                lodge_memory::page_table(region).watch_code(watcher.clone());
            }
            Self {
                bus,
                chip: Chip::new(),
                ports: (0..vcpus).map(Port::new).collect(),
                phys,
                code: Mutex::default(),
                exclusive: Mutex::default(),
                exclusive_wanted: AtomicBool::new(false),
                tsc_offset: AtomicU64::new(crate::clock::host_tsc().wrapping_neg()),
                memory: memory.clone(),
            }
        })
    }

    /// Each vCPU's port, by index.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Guest-physical memory as it is now.
    pub fn phys(&self) -> Arc<PhysMap> {
        self.phys.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Replaces everything that lies over RAM. Waits until no vCPU sees the old map.
    pub fn set_overlays(&self, overlays: impl IntoIterator<Item = PhysRegion>) {
        let mut map = PhysMap::of_ram(&self.memory);
        for over in overlays {
            map.overlay(over);
        }
        *self.phys.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(map);
        self.post_all(Request::ReloadPhys);
        self.wait_for_mail(None);
        self.drop_all_code();
    }

    /// The same address may hold other memory now, so what was decoded before is dropped.
    fn drop_all_code(&self) {
        let mut code = lock(&self.code);
        let phys = self.phys();
        for (page, _) in code.drain() {
            if let Some(found) = phys.page(page) {
                found.state.fetch_and(!PageFlags::CODE, Ordering::SeqCst);
            }
            self.post_all(Request::DropCode(page));
        }
        drop(code);
        self.wait_for_mail(None);
    }

    /// Posts to every vCPU.
    pub fn post_all(&self, request: Request) {
        for port in &self.ports {
            port.post(request);
        }
    }

    /// Waits until every vCPU but `me` is out of guest code or has carried out what was posted to it before. A vCPU
    /// that calls this is out of guest code itself, so that two of them do not wait for each other.
    fn wait_for_mail(&self, me: Option<u32>) {
        for (index, port) in self.ports.iter().enumerate() {
            if me == Some(index as u32) {
                continue;
            }
            let mut spins = 0u32;
            let token = port.posted();
            while port.in_guest.load(Ordering::SeqCst) && port.done.load(Ordering::SeqCst) < token {
                spins += 1;
                if spins < 100 {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Called by vCPU `me` before it holds translations or runs code. Its mailbox must be emptied next: what was posted
    /// while it was out counts as done already.
    pub fn enter_guest(&self, me: u32) {
        let port = &self.ports[me as usize];
        loop {
            port.in_guest.store(true, Ordering::SeqCst);
            if !self.exclusive_wanted.load(Ordering::SeqCst) {
                return;
            }
            port.in_guest.store(false, Ordering::SeqCst);
            drop(lock(&self.exclusive));
        }
    }

    /// Called by vCPU `me` when it holds nothing any more: before it sleeps, returns, or calls the bus.
    pub fn leave_guest(&self, me: u32) {
        self.ports[me as usize].in_guest.store(false, Ordering::SeqCst);
    }

    /// Runs `f` while no other vCPU is in guest code. For what the host's atomics cannot do, such as a locked
    /// access across a page border. The vCPU's mailbox must be emptied next.
    pub fn exclusively<T>(&self, me: u32, f: impl FnOnce() -> T) -> T {
        self.leave_guest(me);
        let guard = lock(&self.exclusive);
        self.exclusive_wanted.store(true, Ordering::SeqCst);
        for (index, port) in self.ports.iter().enumerate() {
            if index as u32 == me {
                continue;
            }
            port.attention.fetch_or(attention::EXCLUSIVE, Ordering::SeqCst);
            while port.in_guest.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        let result = f();
        self.exclusive_wanted.store(false, Ordering::SeqCst);
        drop(guard);
        self.enter_guest(me);
        result
    }

    /// vCPU `me` is about to decode `len` bytes at guest-physical `gpa` (inside one page). After this returns, every
    /// store to them is noticed. The vCPU may have been out of guest code: its mailbox must be emptied next.
    pub fn watch_code(&self, me: u32, gpa: u64, len: u64, state: &AtomicU8) {
        let page = gpa & !(PAGE_SIZE - 1);
        let lines = line_mask(gpa, len);
        let mut code = lock(&self.code);
        *code.entry(page).or_default() |= lines;
        let before = state.fetch_or(PageFlags::CODE, Ordering::SeqCst);
        drop(code);
        if before & PageFlags::CODE == 0 {
            self.post_all(Request::RevokeWrite(Some(page)));
            self.leave_guest(me);
            self.wait_for_mail(Some(me));
            self.enter_guest(me);
        }
        fence(Ordering::SeqCst);
    }

    /// `len` bytes at guest-physical `gpa` were written. If code was decoded from those lines, every vCPU is told to
    /// drop the page's code; says whether.
    pub fn code_written(&self, gpa: u64, len: u64) -> bool {
        let mut any = false;
        let mut at = gpa;
        let end = gpa.saturating_add(len);
        while at < end {
            let page = at & !(PAGE_SIZE - 1);
            let stop = end.min(page + PAGE_SIZE);
            any |= self.page_written(page, line_mask(at, stop - at));
            at = stop;
        }
        any
    }

    fn page_written(&self, page: u64, lines: u64) -> bool {
        let mut code = lock(&self.code);
        match code.get(&page) {
            Some(held) if held & lines != 0 => {
                code.remove(&page);
                if let Some(found) = self.phys().page(page) {
                    found.state.fetch_and(!PageFlags::CODE, Ordering::SeqCst);
                }
                self.post_all(Request::DropCode(page));
                true
            }
            _ => false,
        }
    }

    /// Starts over the record of written pages: every vCPU's stores are noticed again, once for a page. Waits for
    /// the vCPUs.
    pub fn revoke_writes(&self) {
        self.post_all(Request::RevokeWrite(None));
        self.wait_for_mail(None);
    }
}

/// The 64-byte lines of a page that `len` bytes at `at` touch.
fn line_mask(at: u64, len: u64) -> u64 {
    let first = (at & (PAGE_SIZE - 1)) >> 6;
    let last = ((at & (PAGE_SIZE - 1)) + len.max(1) - 1).min(PAGE_SIZE - 1) >> 6;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_memory::{NoBus, RamLayout};

    fn shared() -> Arc<Shared> {
        let memory = lodge_memory::allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
        Shared::new(memory, Arc::new(NoBus), 2)
    }

    #[test]
    fn lines_of_a_page() {
        assert_eq!(line_mask(0x1000, 1), 1);
        assert_eq!(line_mask(0x103f, 2), 0b11);
        assert_eq!(line_mask(0x1000, 4096), u64::MAX);
        assert_eq!(line_mask(0x1fff, 1), 1 << 63);
    }

    #[test]
    fn a_write_to_a_line_with_code_reaches_every_vcpu() {
        let shared = shared();
        let phys = shared.phys();
        let state = phys.page(0x3000).unwrap().state;
        shared.watch_code(0, 0x3040, 10, state);
        for port in shared.ports() {
            assert_eq!(port.take_mail().0, [Request::RevokeWrite(Some(0x3000))]);
        }
        assert!(!shared.code_written(0x3000, 0x40));
        assert!(shared.code_written(0x2fff, 0x42));
        for port in shared.ports() {
            assert_eq!(port.take_mail().0, [Request::DropCode(0x3000)]);
        }
        assert_eq!(state.load(Ordering::SeqCst) & PageFlags::CODE, 0);
    }

    #[test]
    fn an_overlay_cuts_ram() {
        let shared = shared();
        let mut rom = vec![0u8; 0x2000];
        shared.set_overlays([PhysRegion {
            gpa: 0x4000,
            end: 0x6000,
            host: rom.as_mut_ptr(),
            readonly: true,
            table: Arc::new(PageTable::new(0x4000, 0x2000)),
            table_page: 0,
        }]);
        let phys = shared.phys();
        let ram = |gpa| phys.page(gpa).map(|p| p.readonly);
        assert_eq!(
            [ram(0x3fff), ram(0x4000), ram(0x5fff), ram(0x6000), ram(1 << 20)],
            [Some(false), Some(true), Some(true), Some(false), None]
        );
        let base = phys.page(0).unwrap().host as usize;
        assert_eq!(phys.page(0x7123).unwrap().host as usize, base + 0x7000);
    }

    #[test]
    fn code_does_not_outlive_its_memory() {
        let shared = shared();
        let phys = shared.phys();
        shared.watch_code(0, 0x3040, 10, phys.page(0x3000).unwrap().state);
        shared.leave_guest(0);
        shared.set_overlays([]);
        for port in shared.ports() {
            let (mail, _) = port.take_mail();
            assert!(mail.contains(&Request::DropCode(0x3000)), "{mail:?}");
        }
        let state = phys.page(0x3000).unwrap().state.load(Ordering::SeqCst);
        assert_eq!(state & PageFlags::CODE, 0);
    }
}
