//! The software TLB: from a linear page to where it lies in this process.
//!
//! ```text
//!   index = page number % 1024
//!   hit  <=>  address - tag[index] <= 4096 - size        (one unsigned compare; a page crossing misses)
//!   host address = address + addend[index]
//! ```
//!
//! There is a set for each class of access; which one is in use changes with the mode
//! ([`crate::state::Cpu::update_mode`]), never its contents:
//!
//! | class | when |
//! | --- | --- |
//! | `USER` | CPL 3 |
//! | `SUPERVISOR` | CPL 0..2; user pages are not reachable if SMAP is on |
//! | `SUPERVISOR_AC` | CPL 0..2 with SMAP on and RFLAGS.AC set: user pages are reachable |
//! | `NEVER` | always empty: every access takes the slow path (data breakpoints, alignment checks) |
//!
//! A write tag is set only when a plain store needs no further care: the page is RAM, it is marked dirty
//! (page table and page state), and no decoded code lies in it.

/// Entries in a set.
pub const ENTRIES: usize = 1024;
/// The tag of an empty entry `i`: a page that is never looked up there, because its index is
/// another one. So no address whatever, canonical or not, hits an empty entry.
#[inline(always)]
pub const fn invalid(i: usize) -> u64 {
    ((i ^ ENTRIES / 2) as u64) << 12
}

/// CPL 3.
pub const USER: usize = 0;
/// CPL 0..2.
pub const SUPERVISOR: usize = 1;
/// CPL 0..2 with SMAP and RFLAGS.AC.
pub const SUPERVISOR_AC: usize = 2;
/// The set that stays empty.
pub const NEVER: usize = 3;
/// How many sets there are.
pub const CLASSES: usize = 4;

/// One set of translations.
#[repr(C)]
pub struct TlbSet {
    /// Linear page address if loads may take the fast path.
    pub read: [u64; ENTRIES],
    /// Linear page address if stores may take the fast path.
    pub write: [u64; ENTRIES],
    /// Host address minus linear address.
    pub addend: [u64; ENTRIES],
    /// Linear page address if instructions may be fetched.
    pub exec: [u64; ENTRIES],
    /// Guest-physical page address; valid if any tag is.
    pub gpa: [u64; ENTRIES],
    /// Whether a CR3 load leaves the entry (PGE).
    pub global: [bool; ENTRIES],
}

/// Where the page of `address` goes.
#[inline(always)]
pub fn index(address: u64) -> usize {
    (address >> 12) as usize & (ENTRIES - 1)
}

impl TlbSet {
    /// Forgets everything.
    pub fn clear(&mut self) {
        for i in 0..ENTRIES {
            self.forget(i);
        }
    }

    /// Forgets what is not global.
    pub fn clear_non_global(&mut self) {
        for i in 0..ENTRIES {
            if !self.global[i] {
                self.forget(i);
            }
        }
    }

    /// Forgets the entry of one linear page, if it is there.
    pub fn clear_page(&mut self, address: u64) {
        let (i, page) = (index(address), address & !0xfff);
        if self.read[i] == page || self.write[i] == page || self.exec[i] == page {
            self.forget(i);
        }
    }

    /// Takes away the write tags of a guest-physical page, or of all pages.
    pub fn revoke_write(&mut self, gpa: Option<u64>) {
        match gpa {
            None => self.write.iter_mut().enumerate().for_each(|(i, tag)| *tag = invalid(i)),
            Some(page) => {
                for i in 0..ENTRIES {
                    if self.gpa[i] == page {
                        self.write[i] = invalid(i);
                    }
                }
            }
        }
    }

    /// Forgets entry `i`.
    pub fn forget(&mut self, i: usize) {
        self.read[i] = invalid(i);
        self.write[i] = invalid(i);
        self.exec[i] = invalid(i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_hits_an_empty_entry() {
        for i in 0..ENTRIES {
            for address in [invalid(i), invalid(i) + 4095] {
                assert_ne!(index(address), i);
            }
        }
    }
}
