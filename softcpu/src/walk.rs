//! Paging: from linear to guest-physical addresses (Intel SDM volume 3, chapter 4).
//!
//! 32-bit, PAE and 4-level paging, with accessed and dirty bits set as the hardware does, SMEP, SMAP, NX, WP.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lodge_memory::PageFlags;

use crate::fault::{Exec, Fault, pf, vector};
use crate::flags;
use crate::state::{Cpu, cr};

/// Width of guest-physical addresses, as CPUID 8000_0008H tells the guest.
pub const PHYSICAL_BITS: u32 = 40;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NX: u64 = 1 << 63;
/// Bits 51:12 of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Address bits that must be zero because there is no such memory.
const BEYOND: u64 = ADDRESS & !((1 << PHYSICAL_BITS) - 1);

/// What is done at a linear address, and in whose name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// A store (or the load of a read-modify-write).
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// At CPL 3, and not the processor's own access to a descriptor table or TSS.
    pub user: bool,
    /// A supervisor access that SMAP keeps from user pages.
    pub smap: bool,
}

/// Where a linear address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address.
    pub gpa: u64,
    /// The whole page may be written now: the entry allows it and is marked dirty.
    pub writable: bool,
    /// Survives CR3 loads.
    pub global: bool,
    /// Binary logarithm of the page's size.
    pub shift: u32,
}

/// What the entries on the way allow, taken together.
struct Rights {
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl Cpu {
    /// An access of the current instruction.
    pub fn access(&self, write: bool) -> Access {
        let user = self.mode.cpl == 3;
        let smap = !user && self.cr4 & cr::CR4_SMAP != 0 && self.sys_flags & flags::AC == 0;
        Access { write, fetch: false, user, smap }
    }

    /// The processor's own access to descriptor tables and task state, whatever the CPL.
    pub fn system_access(&self, write: bool) -> Access {
        Access { write, fetch: false, user: false, smap: self.cr4 & cr::CR4_SMAP != 0 }
    }

    /// An instruction fetch.
    pub fn fetch_access(&self) -> Access {
        Access { write: false, fetch: true, user: self.mode.cpl == 3, smap: false }
    }

    /// Translates `lin`; a page fault sets CR2.
    pub fn translate(&mut self, lin: u64, access: Access) -> Exec<Mapping> {
        if self.cr0 & cr::CR0_PG == 0 {
            return Ok(Mapping {
                gpa: lin & 0xffff_ffff,
                writable: true,
                global: false,
                shift: 12,
            });
        }
        let result = match (self.mode.long, self.cr4 & cr::CR4_PAE != 0) {
            (true, _) => self.walk_long(lin, access),
            (false, true) => self.walk_pae(lin, access),
            (false, false) => self.walk_32(lin, access),
        };
        result.map_err(|mut error| {
            let nx =
                self.efer & cr::EFER_NXE != 0 && (self.mode.long || self.cr4 & cr::CR4_PAE != 0);
            if access.write {
                error |= pf::WRITE;
            }
            if access.user {
                error |= pf::USER;
            }
            if access.fetch && (nx || self.cr4 & cr::CR4_SMEP != 0) {
                error |= pf::FETCH;
            }
            self.cr2 = lin;
            Fault::with_error(vector::PF, error)
        })
    }

    fn walk_long(&mut self, lin: u64, access: Access) -> Result<Mapping, u32> {
        let root = self.cr3 & ADDRESS & !BEYOND;
        let all = Rights { writable: true, user: true, no_execute: false };
        self.walk_64(lin, access, root, 3, all)
    }

    fn walk_pae(&mut self, lin: u64, access: Access) -> Result<Mapping, u32> {
        let entry = self.pdpte[(lin >> 30 & 3) as usize];
        if entry & PRESENT == 0 {
            return Err(0);
        }
        let all = Rights { writable: true, user: true, no_execute: false };
        self.walk_64(lin & 0xffff_ffff, access, entry & ADDRESS & !BEYOND, 1, all)
    }

    /// Tables of 512 entries of 64 bits; `level` 3 is the PML4, 0 a page table.
    fn walk_64(
        &mut self,
        lin: u64,
        access: Access,
        root: u64,
        top: u32,
        mut rights: Rights,
    ) -> Result<Mapping, u32> {
        let mut table = root;
        let mut level = top;
        loop {
            let shift = 12 + 9 * level;
            let at = table + (lin >> shift & 511) * 8;
            let entry = self.read_entry_64(at)?;
            if entry & PRESENT == 0 {
                return Err(0);
            }
            let leaf = level == 0 || entry & LARGE != 0;
            self.check_reserved_64(entry, level, leaf)?;
            rights.writable &= entry & WRITABLE != 0;
            rights.user &= entry & USER != 0;
            rights.no_execute |= entry & NX != 0;
            if !leaf {
                self.set_entry_64(at, entry, ACCESSED);
                table = entry & ADDRESS;
                level -= 1;
                continue;
            }
            self.check_rights(&rights, access)?;
            let dirty = self.set_entry_64(at, entry, accessed(access)) & DIRTY != 0;
            let offset = (1u64 << shift) - 1;
            return Ok(Mapping {
                gpa: entry & ADDRESS & !offset | lin & offset,
                writable: dirty && self.may_write(&rights, access),
                global: entry & GLOBAL != 0 && self.cr4 & cr::CR4_PGE != 0,
                shift,
            });
        }
    }

    fn check_reserved_64(&self, entry: u64, level: u32, leaf: bool) -> Result<(), u32> {
        let mut reserved = BEYOND;
        if self.efer & cr::EFER_NXE == 0 {
            reserved |= NX;
        }
        if !self.mode.long {
            reserved |= 0x7ff0_0000_0000_0000;
        }
        if level == 3 {
            reserved |= LARGE;
        }
        if leaf && level > 0 {
            // Bit 12 of a large page's entry is PAT.
            reserved |= ((1u64 << (12 + 9 * level)) - 1) & !0x1fff;
        }
        if entry & reserved == 0 { Ok(()) } else { Err(pf::PRESENT | pf::RESERVED) }
    }

    /// Two levels of 1024 entries of 32 bits, 4 MiB pages with PSE-36.
    fn walk_32(&mut self, lin: u64, access: Access) -> Result<Mapping, u32> {
        let lin = lin & 0xffff_ffff;
        let at = (self.cr3 & 0xffff_f000) + (lin >> 22) * 4;
        let pde = u64::from(self.read_entry_32(at)?);
        if pde & PRESENT == 0 {
            return Err(0);
        }
        let mut rights =
            Rights { writable: pde & WRITABLE != 0, user: pde & USER != 0, no_execute: false };
        let global = self.cr4 & cr::CR4_PGE != 0;
        if pde & LARGE != 0 && self.cr4 & cr::CR4_PSE != 0 {
            let high = (pde >> 13 & 0xff) << 32;
            if pde & 1 << 21 != 0 || high & BEYOND != 0 {
                return Err(pf::PRESENT | pf::RESERVED);
            }
            self.check_rights(&rights, access)?;
            let dirty = self.set_entry_32(at, pde as u32, accessed(access)) & DIRTY != 0;
            return Ok(Mapping {
                gpa: high | pde & 0xffc0_0000 | lin & 0x3f_ffff,
                writable: dirty && self.may_write(&rights, access),
                global: global && pde & GLOBAL != 0,
                shift: 22,
            });
        }
        self.set_entry_32(at, pde as u32, ACCESSED);
        let at = (pde & 0xffff_f000) + (lin >> 12 & 1023) * 4;
        let pte = u64::from(self.read_entry_32(at)?);
        if pte & PRESENT == 0 {
            return Err(0);
        }
        rights.writable &= pte & WRITABLE != 0;
        rights.user &= pte & USER != 0;
        self.check_rights(&rights, access)?;
        let dirty = self.set_entry_32(at, pte as u32, accessed(access)) & DIRTY != 0;
        Ok(Mapping {
            gpa: pte & 0xffff_f000 | lin & 0xfff,
            writable: dirty && self.may_write(&rights, access),
            global: global && pte & GLOBAL != 0,
            shift: 12,
        })
    }

    fn may_write(&self, rights: &Rights, access: Access) -> bool {
        rights.writable || !access.user && self.cr0 & cr::CR0_WP == 0
    }

    fn check_rights(&self, rights: &Rights, access: Access) -> Result<(), u32> {
        let denied = access.user && !rights.user
            || access.write && !self.may_write(rights, access)
            || access.fetch && rights.no_execute
            || access.fetch && !access.user && rights.user && self.cr4 & cr::CR4_SMEP != 0
            || access.smap && !access.fetch && rights.user;
        if denied { Err(pf::PRESENT) } else { Ok(()) }
    }

    fn read_entry_64(&self, gpa: u64) -> Result<u64, u32> {
        // Where there is no memory the entry reads as not present.
        let page = self.phys.page(gpa).ok_or(0u32)?;
        // SAFETY: an aligned entry lies inside of its page, which is mapped guest memory.
        Ok(unsafe { entry::<AtomicU64>(page.host, gpa) }.load(Ordering::Relaxed))
    }

    fn read_entry_32(&self, gpa: u64) -> Result<u32, u32> {
        let page = self.phys.page(gpa).ok_or(0u32)?;
        // SAFETY: as above.
        Ok(unsafe { entry::<AtomicU32>(page.host, gpa) }.load(Ordering::Relaxed))
    }

    /// Sets accessed and dirty bits; gives the entry as it is then.
    fn set_entry_64(&self, gpa: u64, entry_now: u64, bits: u64) -> u64 {
        if entry_now & bits == bits {
            return entry_now;
        }
        let Some(page) = self.phys.page(gpa).filter(|p| !p.readonly) else { return entry_now };
        page.state.fetch_or(PageFlags::DIRTY, Ordering::Relaxed);
        // SAFETY: as in `read_entry_64`.
        let after = unsafe { entry::<AtomicU64>(page.host, gpa) }.fetch_or(bits, Ordering::SeqCst);
        self.table_written(page.state.load(Ordering::SeqCst), gpa, 8);
        after | bits
    }

    fn set_entry_32(&self, gpa: u64, entry_now: u32, bits: u64) -> u64 {
        if u64::from(entry_now) & bits == bits {
            return entry_now.into();
        }
        let Some(page) = self.phys.page(gpa).filter(|p| !p.readonly) else {
            return entry_now.into();
        };
        page.state.fetch_or(PageFlags::DIRTY, Ordering::Relaxed);
        // SAFETY: as in `read_entry_64`.
        let after =
            unsafe { entry::<AtomicU32>(page.host, gpa) }.fetch_or(bits as u32, Ordering::SeqCst);
        self.table_written(page.state.load(Ordering::SeqCst), gpa, 4);
        u64::from(after) | bits
    }

    fn table_written(&self, state: u8, gpa: u64, len: u64) {
        if state & PageFlags::CODE != 0 {
            self.shared.code_written(gpa, len);
        }
    }

    /// Loads the four PDPTEs that PAE paging caches (SDM volume 3, 4.4.1). #GP(0) if a present one has reserved bits
    /// set; nothing is changed then.
    pub fn load_pdptes(&mut self, cr3: u64) -> Exec {
        let mut entries = [0; 4];
        for (i, slot) in entries.iter_mut().enumerate() {
            let entry = self.read_entry_64((cr3 & 0xffff_ffe0) + i as u64 * 8).unwrap_or(0);
            if entry & PRESENT != 0 && entry & (!ADDRESS | BEYOND) & 0xffff_ffff_ffff_f1e6 != 0 {
                return Err(Fault::GP0);
            }
            *slot = entry;
        }
        self.pdpte = entries;
        Ok(())
    }
}

fn accessed(access: Access) -> u64 {
    if access.write { ACCESSED | DIRTY } else { ACCESSED }
}

/// The entry at `gpa` of the table that lies at `page`.
///
/// # Safety
/// `page` is a mapped page of guest memory that outlives the use of the reference.
unsafe fn entry<'a, T>(page: *mut u8, gpa: u64) -> &'a T {
    // SAFETY: entries are aligned to their size and tables to their own, so it lies inside of the page.
    unsafe { &*page.add((gpa & 0xfff) as usize & !(size_of::<T>() - 1)).cast::<T>() }
}
