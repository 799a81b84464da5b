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
    ((i ^ (ENTRIES / 2)) as u64) << 12
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
    /// Whether the entry is a piece of a larger page, all of which INVLPG forgets.
    pub large: [bool; ENTRIES],
    /// Which stretches of 4 MiB (hashed) may have such entries.
    large_filter: [u64; FILTER_WORDS],
    /// Which stretches of 1 GiB (hashed) may have pieces of pages of 1 GiB.
    giant_filter: [u64; FILTER_WORDS],
}

/// Words of [`TlbSet::large_filter`] and [`TlbSet::giant_filter`].
const FILTER_WORDS: usize = 64;

/// The word and the bit that stand for the 2^`shift` bytes around `address`.
fn filter_bit(address: u64, shift: u32) -> (usize, u64) {
    let stretch = address >> shift;
    ((stretch >> 6) as usize & (FILTER_WORDS - 1), 1 << (stretch & 63))
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
        self.large_filter = [0; FILTER_WORDS];
        self.giant_filter = [0; FILTER_WORDS];
    }

    /// Notes whether entry `i`, of `address`, is a piece of a page of 2^`shift` bytes.
    pub fn set_page_size(&mut self, i: usize, address: u64, shift: u32) {
        self.large[i] = shift > 12;
        if self.large[i] {
            let (word, bit) = filter_bit(address, 22);
            self.large_filter[word] |= bit;
        }
        if shift > 22 {
            let (word, bit) = filter_bit(address, 30);
            self.giant_filter[word] |= bit;
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

    /// Forgets the linear page of `address`, all pieces of it if it is a large one.
    pub fn clear_page(&mut self, address: u64) {
        let (i, page) = (index(address), address & !0xfff);
        if self.read[i] == page || self.write[i] == page || self.exec[i] == page {
            self.forget(i);
        }
        let (large, large_bit) = filter_bit(address, 22);
        let (giant, giant_bit) = filter_bit(address, 30);
        if self.large_filter[large] & large_bit != 0 || self.giant_filter[giant] & giant_bit != 0 {
            self.clear_large(address);
        }
    }

    /// Forgets the pieces of large pages in the GiB around `address`: at least those of its own page.
    fn clear_large(&mut self, address: u64) {
        for i in 0..ENTRIES {
            let near = |tag: u64| (tag ^ address) >> 30 == 0;
            let tags = [self.read[i], self.write[i], self.exec[i]];
            if self.large[i] && tags.into_iter().any(near) {
                self.forget(i);
            }
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

    #[test]
    fn a_large_page_is_forgotten_as_a_whole() {
        // SAFETY: arrays of integers and booleans may be all zero.
        let mut set: Box<TlbSet> = unsafe { Box::new_zeroed().assume_init() };
        let fill = |set: &mut TlbSet, address: u64, shift: u32| {
            let i = index(address);
            set.read[i] = address;
            set.set_page_size(i, address, shift);
        };
        let present = |set: &TlbSet, address: u64| set.read[index(address)] == address;
        for (invalidated, shift) in [(0x4020_7000, 21), (0x4000_1000, 22), (0x7fff_f000, 30)] {
            set.clear();
            fill(&mut set, 0x4020_3000, shift);
            fill(&mut set, 0x4021_5000, 12);
            fill(&mut set, 0x1_4020_6000, shift);
            set.clear_page(invalidated);
            assert!(!present(&set, 0x4020_3000));
            assert!(present(&set, 0x4021_5000) && present(&set, 0x1_4020_6000));
        }
    }
}
