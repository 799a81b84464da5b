//! Guest memory as instructions see it: loads, stores, read-modify-write and fetches at linear addresses.
//!
//! ```text
//! load/store --TLB hit--> host memory
//!      |
//!      +--miss--> slow: page crossing, translation (#PF), watchpoints, alignment checks
//!                   |-- RAM: access; fill the TLB if nothing more needs care; tell of written code
//!                   +-- else: LAPIC, IOAPIC, or the bus (out of guest code meanwhile)
//! ```

use std::sync::atomic::Ordering;

use lodge_memory::PageFlags;

use crate::fault::{Exec, Fault, vector};
use crate::flags;
use crate::host;
use crate::shared::{PhysPage, Request};
use crate::state::{Cpu, Segment, cr, seg};
use crate::tlb;
use crate::walk::Access;

/// An integer that memory holds, little-endian.
pub trait Word: Copy + Eq + Default + 'static {
    /// Bytes.
    const SIZE: usize;
    /// From bytes; `bytes.len()` is [`Word::SIZE`].
    fn from_bytes(bytes: &[u8]) -> Self;
    /// Into the first [`Word::SIZE`] bytes of `out`.
    fn to_bytes(self, out: &mut [u8; 16]);
    /// Widened (or cut, for 128 bits).
    fn to_u64(self) -> u64;
    /// Cut to size.
    fn from_u64(value: u64) -> Self;
}

macro_rules! word {
    ($($t:ty),*) => {$(
        impl Word for $t {
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut all = [0; size_of::<$t>()];
                all.copy_from_slice(bytes);
                <$t>::from_le_bytes(all)
            }
            #[inline(always)]
            fn to_bytes(self, out: &mut [u8; 16]) {
                out[..Self::SIZE].copy_from_slice(&self.to_le_bytes());
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $t
            }
        }
    )*};
}
word!(u8, u16, u32, u64, u128);

/// Whether `address` is canonical (48 bits, sign-extended).
#[inline(always)]
pub fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

impl Cpu {
    /// The linear address of `size` bytes at `offset` in segment `s`, checked against the segment (SDM volume 3, 5.3
    /// to 5.5) or for being canonical. #SS(0) for the stack segment, #GP(0) for others.
    #[inline]
    pub fn linear(&self, s: usize, offset: u64, size: u64, write: bool) -> Exec<u64> {
        if self.mode.bits == 64 {
            let base = if s >= seg::FS { self.segs[s].base } else { 0 };
            let lin = base.wrapping_add(offset);
            if canonical(lin) && canonical(lin.wrapping_add(size - 1)) {
                return Ok(lin);
            }
            return Err(if s == seg::SS { Fault::SS0 } else { Fault::GP0 });
        }
        self.linear_legacy(s, offset, size, write)
    }

    fn linear_legacy(&self, s: usize, offset: u64, size: u64, write: bool) -> Exec<u64> {
        let segment = &self.segs[s];
        let fault = if s == seg::SS { Fault::SS0 } else { Fault::GP0 };
        if self.mode.protected && !self.mode.v86 {
            let allowed = if write { segment.writable() } else { segment.readable() };
            if !segment.present() || !allowed {
                return Err(fault);
            }
        }
        if !within_limit(segment, offset, size) {
            return Err(fault);
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Loads from linear address `lin`.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, lin: u64) -> Exec<T> {
        if let Some(at) = self.fast(lin, T::SIZE as u64, false) {
            // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory.
            return Ok(unsafe { host::load(at.cast::<T>()) });
        }
        let mut bytes = [0; 16];
        self.read_lin(lin, &mut bytes[..T::SIZE], self.access(false))?;
        Ok(T::from_bytes(&bytes[..T::SIZE]))
    }

    /// Stores to linear address `lin`.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, lin: u64, value: T) -> Exec {
        if let Some(at) = self.fast(lin, T::SIZE as u64, true) {
            // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory that may be written.
            unsafe { host::store(at.cast::<T>(), value) };
            return Ok(());
        }
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes);
        self.write_lin(lin, &bytes[..T::SIZE], self.access(true))
    }

    /// The processor's own load (descriptor tables, TSS), whatever the CPL.
    pub fn load_sys<T: Word>(&mut self, lin: u64) -> Exec<T> {
        if let Some(at) = self.fast_sys(lin, T::SIZE as u64, false) {
            // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory.
            return Ok(unsafe { host::load(at.cast::<T>()) });
        }
        let mut bytes = [0; 16];
        self.read_lin(lin, &mut bytes[..T::SIZE], self.system_access(false))?;
        Ok(T::from_bytes(&bytes[..T::SIZE]))
    }

    /// The processor's own store.
    pub fn store_sys<T: Word>(&mut self, lin: u64, value: T) -> Exec {
        if let Some(at) = self.fast_sys(lin, T::SIZE as u64, true) {
            // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory that may be written.
            unsafe { host::store(at.cast::<T>(), value) };
            return Ok(());
        }
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes);
        self.write_lin(lin, &bytes[..T::SIZE], self.system_access(true))
    }

    /// The host address of `size` bytes at `lin` if the TLB has it.
    #[inline(always)]
    pub fn fast(&self, lin: u64, size: u64, write: bool) -> Option<*mut u8> {
        let i = tlb::index(lin);
        // SAFETY: `tlb` points at one of this Cpu's own sets.
        let set = unsafe { &*self.tlb };
        let tag = if write { set.write[i] } else { set.read[i] };
        (lin.wrapping_sub(tag) <= 4096 - size).then(|| lin.wrapping_add(set.addend[i]) as *mut u8)
    }

    /// As [`Cpu::fast`] for the processor's own accesses: these are supervisor accesses under SMAP, as the supervisor's
    /// set has them.
    fn fast_sys(&self, lin: u64, size: u64, write: bool) -> Option<*mut u8> {
        if std::ptr::eq(self.tlb, &raw const self.tlbs[tlb::NEVER]) {
            return None;
        }
        let (set, i) = (&self.tlbs[tlb::SUPERVISOR], tlb::index(lin));
        let tag = if write { set.write[i] } else { set.read[i] };
        (lin.wrapping_sub(tag) <= 4096 - size).then(|| lin.wrapping_add(set.addend[i]) as *mut u8)
    }

    /// As [`Cpu::fast`], but walks the page tables on a miss. None if that does not lead to plain memory within
    /// one page, or faults; nothing has happened to the guest then, but for accessed bits.
    #[cold]
    #[inline(never)]
    pub fn fast_fill(&mut self, lin: u64, size: u64, write: bool) -> Option<*mut u8> {
        if (lin & 0xfff) + size > 4096 || !self.mode_allows(lin) {
            return None;
        }
        let cr2 = self.cr2;
        if self.fill(lin, self.access(write)).is_err() {
            self.cr2 = cr2;
            return None;
        }
        self.fast(lin, size, write)
    }

    fn mode_allows(&self, lin: u64) -> bool {
        self.mode.bits != 64 || canonical(lin)
    }

    /// Translates, and lets the TLB remember what it may. Gives the guest-physical address.
    fn fill(&mut self, lin: u64, access: Access) -> Exec<u64> {
        let mapping = self.translate(lin, access)?;
        let current = access == self.access(access.write) || access.fetch;
        if !current && access != self.system_access(access.write)
            || std::ptr::eq(self.tlb, &raw const self.tlbs[tlb::NEVER])
        {
            return Ok(mapping.gpa);
        }
        let class = if current {
            // SAFETY: `tlb` points at one of this Cpu's own sets.
            unsafe { &mut *self.tlb }
        } else {
            &mut self.tlbs[tlb::SUPERVISOR]
        };
        let Some(page) = self.phys.page(mapping.gpa) else { return Ok(mapping.gpa) };
        let (i, tag, gpa) = (tlb::index(lin), lin & !0xfff, mapping.gpa & !0xfff);
        let known = class.read[i] == tag || class.write[i] == tag || class.exec[i] == tag;
        if !known || class.gpa[i] != gpa {
            class.forget(i);
        }
        class.addend[i] = (page.host as u64).wrapping_sub(tag);
        class.gpa[i] = gpa;
        class.global[i] = mapping.global;
        class.set_page_size(i, lin, mapping.shift);
        if access.fetch {
            class.exec[i] = tag;
            return Ok(mapping.gpa);
        }
        class.read[i] = tag;
        if access.write && !page.readonly {
            page.state.fetch_or(PageFlags::DIRTY, Ordering::SeqCst);
        }
        let plain = PageFlags::DIRTY;
        if mapping.writable && !page.readonly && page.state.load(Ordering::SeqCst) == plain {
            class.write[i] = tag;
        }
        Ok(mapping.gpa)
    }

    /// Reads `buf.len()` bytes (at most a page) at `lin`.
    #[cold]
    #[inline(never)]
    pub fn read_lin(&mut self, lin: u64, buf: &mut [u8], access: Access) -> Exec {
        self.check_slow(lin, buf.len() as u64, access)?;
        let first = self.in_first_page(lin, buf.len());
        let gpa = self.fill(lin, access)?;
        let (head, tail) = buf.split_at_mut(first);
        if tail.is_empty() {
            self.phys_read(gpa, head);
            return Ok(());
        }
        let next = self.fill(self.wrap(lin, first), access)?;
        self.phys_read(gpa, head);
        self.phys_read(next, tail);
        Ok(())
    }

    /// Writes `buf` (at most a page) at `lin`: all of it, or nothing and a fault.
    #[cold]
    #[inline(never)]
    pub fn write_lin(&mut self, lin: u64, buf: &[u8], access: Access) -> Exec {
        self.check_slow(lin, buf.len() as u64, access)?;
        let first = self.in_first_page(lin, buf.len());
        let gpa = self.fill(lin, access)?;
        let (head, tail) = buf.split_at(first);
        if tail.is_empty() {
            self.phys_write(gpa, head);
            return Ok(());
        }
        let next = self.fill(self.wrap(lin, first), access)?;
        self.phys_write(gpa, head);
        self.phys_write(next, tail);
        Ok(())
    }

    fn in_first_page(&self, lin: u64, len: usize) -> usize {
        len.min(4096 - (lin & 0xfff) as usize)
    }

    /// Linear addresses wrap at 4 GiB outside of 64-bit mode.
    fn wrap(&self, lin: u64, by: usize) -> u64 {
        let next = lin.wrapping_add(by as u64);
        if self.mode.bits == 64 { next } else { next & 0xffff_ffff }
    }

    /// What the fast path never sees: alignment checks and data breakpoints.
    fn check_slow(&mut self, lin: u64, len: u64, access: Access) -> Exec {
        if access.user
            && self.cr0 & cr::CR0_AM != 0
            && self.sys_flags & flags::AC != 0
            && matches!(len, 2 | 4 | 8)
            && !lin.is_multiple_of(len)
        {
            return Err(Fault::with_error(vector::AC, 0));
        }
        if self.dr[7] & 0xff != 0 {
            self.watch_data(lin, len, access.write);
        }
        Ok(())
    }

    /// Notes data breakpoints that this access hits (SDM volume 3, 17.2.4); the trap comes after the instruction.
    fn watch_data(&mut self, lin: u64, len: u64, write: bool) {
        for i in 0..4 {
            if self.dr[7] >> (2 * i) & 3 == 0 {
                continue;
            }
            let control = self.dr[7] >> (16 + 4 * i);
            let hit_kind = match control & 3 {
                1 => write,
                3 => true,
                _ => false,
            };
            let bytes = [1, 2, 8, 4][(control >> 2 & 3) as usize];
            let at = self.dr[i] & !(bytes - 1);
            if hit_kind && lin < at.wrapping_add(bytes) && at < lin.wrapping_add(len) {
                self.pending_debug |= 1 << i;
                self.leave = true;
            }
        }
    }

    /// Applies `f` to what lies at `lin` and stores the result; gives what was there. With `locked` it is atomic towards
    /// other vCPUs. Where `f` gives nothing the old value is written back.
    pub fn rmw<T: Word>(
        &mut self,
        lin: u64,
        locked: bool,
        mut f: impl FnMut(T) -> Option<T>,
    ) -> Exec<T> {
        let size = T::SIZE as u64;
        let at = self.fast(lin, size, true).or_else(|| self.fast_fill(lin, size, true));
        if let Some(at) = at {
            // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory that may be written.
            return Ok(unsafe { host::update(at.cast::<T>(), locked, f) });
        }
        self.rmw_slow(lin, locked, &mut f)
    }

    #[cold]
    #[inline(never)]
    fn rmw_slow<T: Word>(
        &mut self,
        lin: u64,
        locked: bool,
        f: &mut dyn FnMut(T) -> Option<T>,
    ) -> Exec<T> {
        let access = self.access(true);
        self.check_slow(lin, T::SIZE as u64, access)?;
        let gpa = self.fill(lin, access)?;
        let first = self.in_first_page(lin, T::SIZE);
        let next = if first < T::SIZE { self.fill(self.wrap(lin, first), access)? } else { gpa };
        if first == T::SIZE
            && let Some(page) = self.phys.page(gpa).filter(|p| !p.readonly)
        {
            // SAFETY: the page is mapped guest memory, and the access lies within it.
            let old = unsafe {
                host::update(page.host.add((gpa & 0xfff) as usize).cast::<T>(), locked, f)
            };
            self.wrote(gpa, T::SIZE as u64);
            return Ok(old);
        }
        // Two pages, or a device: the host has no atomic for it, so nobody else runs meanwhile.
        let shared = self.shared.clone();
        if locked {
            self.alone = true;
            let old = shared.exclusively(self.index, || self.rmw_bytes(gpa, next, first, f));
            self.alone = false;
            self.take_mail();
            return Ok(old);
        }
        Ok(self.rmw_bytes(gpa, next, first, f))
    }

    fn rmw_bytes<T: Word>(
        &mut self,
        gpa: u64,
        next: u64,
        first: usize,
        f: &mut dyn FnMut(T) -> Option<T>,
    ) -> T {
        let mut bytes = [0; 16];
        self.phys_read(gpa, &mut bytes[..first]);
        if first < T::SIZE {
            self.phys_read(next, &mut bytes[first..T::SIZE]);
        }
        let old = T::from_bytes(&bytes[..T::SIZE]);
        if let Some(new) = f(old) {
            new.to_bytes(&mut bytes);
        }
        self.phys_write(gpa, &bytes[..first]);
        if first < T::SIZE {
            self.phys_write(next, &bytes[first..T::SIZE]);
        }
        old
    }

    /// How many bytes from `lin` (at most `len`, within one page) are plain memory, and where. None if there are none:
    /// go element by element. A fault is the one that the first byte raises.
    pub fn span(&mut self, lin: u64, len: u64, write: bool) -> Exec<Option<(*mut u8, u64)>> {
        if let Some(at) = self.fast(lin, 1, write) {
            return Ok(Some((at, len.min(4096 - (lin & 0xfff)))));
        }
        if std::ptr::eq(self.tlb, &raw const self.tlbs[tlb::NEVER]) {
            return Ok(None);
        }
        self.fill(lin, self.access(write))?;
        Ok(self.fast(lin, 1, write).map(|at| (at, len.min(4096 - (lin & 0xfff)))))
    }

    /// Fetches instruction bytes at linear address `lin` into `buf`, up to the end of the page; gives their number and
    /// the first one's guest-physical address.
    pub fn fetch(&mut self, lin: u64, buf: &mut [u8]) -> Exec<(usize, u64)> {
        let gpa = self.fetch_gpa(lin)?;
        let n = self.in_first_page(lin, buf.len());
        self.phys_read(gpa, &mut buf[..n]);
        Ok((n, gpa))
    }

    /// The guest-physical address that a fetch at `lin` goes to.
    pub fn fetch_gpa(&mut self, lin: u64) -> Exec<u64> {
        // SAFETY: `tlb` points at one of this Cpu's own sets.
        let set = unsafe { &*self.tlb };
        let i = tlb::index(lin);
        if set.exec[i] == lin & !0xfff {
            return Ok(set.gpa[i] | lin & 0xfff);
        }
        self.fill(lin, self.fetch_access())
    }

    /// Reads guest-physical memory or a device; `buf` lies within one page.
    pub fn phys_read(&mut self, gpa: u64, buf: &mut [u8]) {
        if let Some(page) = self.phys.page(gpa) {
            // SAFETY: within one mapped page of guest memory.
            unsafe { host::copy_from_guest(page.host.add((gpa & 0xfff) as usize), buf) };
            return;
        }
        if self.shared.clone().chip_mmio_read(self.index, gpa, buf) {
            return;
        }
        self.outside(|cpu| cpu.shared.bus.mmio_read(gpa, buf));
    }

    /// Writes guest-physical memory or a device; `buf` lies within one page.
    pub fn phys_write(&mut self, gpa: u64, buf: &[u8]) {
        match self.phys.page(gpa) {
            Some(PhysPage { host, readonly: false, .. }) => {
                // SAFETY: within one mapped page of guest memory.
                unsafe { host::copy_to_guest(host.add((gpa & 0xfff) as usize), buf) };
                self.wrote(gpa, buf.len() as u64);
            }
            _ => {
                if !self.shared.clone().chip_mmio_write(self.index, gpa, buf) {
                    self.outside(|cpu| cpu.shared.bus.mmio_write(gpa, buf));
                }
                self.leave = true;
            }
        }
    }

    /// `IN`.
    pub fn port_read(&mut self, port: u16, buf: &mut [u8]) {
        if !self.shared.clone().chip_pio_read(port, buf) {
            self.outside(|cpu| cpu.shared.bus.pio_read(port, buf));
        }
        self.leave = true;
    }

    /// `OUT`.
    pub fn port_write(&mut self, port: u16, buf: &[u8]) {
        if !self.shared.clone().chip_pio_write(port, buf) {
            self.outside(|cpu| cpu.shared.bus.pio_write(port, buf));
        }
        self.leave = true;
    }

    /// Runs `f` (a call to the bus, which may wait for a device's lock) out of guest code.
    fn outside<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        // It is out already, and would wait for itself to be let in again.
        if self.alone {
            return f(self);
        }
        self.shared.leave_guest(self.index);
        let result = f(self);
        self.shared.enter_guest(self.index);
        self.take_mail();
        result
    }

    /// After a store by this vCPU that took the slow path: marks the page, drops code that it changed.
    pub fn wrote(&mut self, gpa: u64, len: u64) {
        let Some(page) = self.phys.page(gpa) else { return };
        std::sync::atomic::fence(Ordering::SeqCst);
        let state = page.state.fetch_or(PageFlags::DIRTY, Ordering::SeqCst);
        if state & PageFlags::CODE != 0 && self.shared.code_written(gpa, len) {
            self.take_mail();
        }
    }

    /// Carries out what others asked for. Decoded code to be dropped is only noted: the block being executed may
    /// be part of it, so it is left after the current instruction.
    pub fn take_mail(&mut self) {
        let shared = self.shared.clone();
        let port = &shared.ports()[self.index as usize];
        let (requests, token) = port.take_mail();
        for request in requests {
            match request {
                Request::DropCode(page) => {
                    self.stale_code.push(page);
                    self.leave = true;
                }
                Request::RevokeWrite(gpa) => {
                    for set in &mut self.tlbs[..tlb::NEVER] {
                        set.revoke_write(gpa);
                    }
                }
                Request::ReloadPhys => {
                    self.phys = shared.phys();
                    self.flush_tlb_all();
                    self.leave = true;
                }
            }
        }
        port.mail_done(token);
    }
}

/// Whether `size` bytes at `offset` are inside of a segment (SDM volume 3, 5.3).
fn within_limit(segment: &Segment, offset: u64, size: u64) -> bool {
    let limit = u64::from(segment.limit);
    let last = offset + (size - 1);
    if segment.expand_down() {
        let top = if segment.big() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}
