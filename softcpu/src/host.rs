//! Accesses to guest memory that lies in this process.
//!
//! Other vCPUs and devices access it at the same time. So each access is one volatile machine access of
//! its size (at any alignment; x86 does that), and what must be atomic is a locked instruction.

use std::arch::asm;

use crate::mem::Word;

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

/// Loads.
///
/// # Safety
/// `at` points at `T::SIZE` bytes of mapped guest memory.
#[inline(always)]
pub unsafe fn load<T: Word>(at: *const T) -> T {
    // SAFETY: the caller's promise; a packed struct needs no alignment.
    unsafe { at.cast::<Unaligned<T>>().read_volatile() }.0
}

/// Stores.
///
/// # Safety
/// `at` points at `T::SIZE` bytes of mapped guest memory.
#[inline(always)]
pub unsafe fn store<T: Word>(at: *mut T, value: T) {
    // SAFETY: the caller's promise; a packed struct needs no alignment.
    unsafe { at.cast::<Unaligned<T>>().write_volatile(Unaligned(value)) }
}

/// Applies `f` to `*at`, atomically if `locked`; gives the old value. Where `f` gives nothing, the old value is
/// stored again.
///
/// # Safety
/// `at` points at `T::SIZE` bytes of mapped guest memory; 16 bytes are aligned to 16.
#[inline(always)]
pub unsafe fn update<T: Word>(at: *mut T, locked: bool, mut f: impl FnMut(T) -> Option<T>) -> T {
    // SAFETY: the caller's promise.
    let mut old = unsafe { load(at) };
    loop {
        let new = f(old).unwrap_or(old);
        if !locked {
            // SAFETY: the caller's promise.
            unsafe { store(at, new) };
            return old;
        }
        // SAFETY: the caller's promise.
        match unsafe { compare_exchange(at, old, new) } {
            Ok(()) => return old,
            Err(now) => old = now,
        }
    }
}

/// `LOCK CMPXCHG` at any alignment (16 bytes: aligned).
///
/// # Safety
/// `at` points at `T::SIZE` bytes of mapped guest memory.
#[inline(always)]
pub unsafe fn compare_exchange<T: Word>(at: *mut T, old: T, new: T) -> Result<(), T> {
    let (old_word, new_word) = (old.to_u64(), new.to_u64());
    let mut now = old_word;
    match T::SIZE {
        // SAFETY: the caller's promise; the instruction touches nothing else.
        1 => unsafe {
            asm!("lock cmpxchg byte ptr [{at}], {new}", at = in(reg) at, new = in(reg_byte) new_word as u8,
                 inout("al") old_word as u8 => *(&raw mut now).cast::<u8>(), options(nostack));
        },
        // SAFETY: the caller's promise; the instruction touches nothing else.
        2 => unsafe {
            asm!("lock cmpxchg word ptr [{at}], {new:x}", at = in(reg) at, new = in(reg) new_word as u16,
                 inout("ax") old_word as u16 => *(&raw mut now).cast::<u16>(), options(nostack));
        },
        // SAFETY: the caller's promise; the instruction touches nothing else.
        4 => unsafe {
            asm!("lock cmpxchg dword ptr [{at}], {new:e}", at = in(reg) at, new = in(reg) new_word as u32,
                 inout("eax") old_word as u32 => *(&raw mut now).cast::<u32>(), options(nostack));
        },
        // SAFETY: the caller's promise; the instruction touches nothing else.
        8 => unsafe {
            asm!("lock cmpxchg qword ptr [{at}], {new}", at = in(reg) at, new = in(reg) new_word,
                 inout("rax") old_word => now, options(nostack));
        },
        // SAFETY: as above.
        _ => return unsafe { compare_exchange_16(at, old, new) },
    }
    if now == old_word { Ok(()) } else { Err(T::from_u64(now)) }
}

/// # Safety
/// As [`compare_exchange`], aligned to 16.
unsafe fn compare_exchange_16<T: Word>(at: *mut T, old: T, new: T) -> Result<(), T> {
    let half = |value: T, high: usize| {
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes);
        u64::from_bytes(&bytes[high * 8..high * 8 + 8])
    };
    let (mut low, mut high) = (half(old, 0), half(old, 1));
    // SAFETY: the caller's promise. RBX is LLVM's own, so it is exchanged around the instruction.
    unsafe {
        asm!("xchg {b}, rbx", "lock cmpxchg16b xmmword ptr [{at}]", "mov rbx, {b}",
             b = inout(reg) half(new, 0) => _, at = in(reg) at, in("rcx") half(new, 1),
             inout("rax") low, inout("rdx") high, options(nostack));
    }
    if (low, high) == (half(old, 0), half(old, 1)) {
        return Ok(());
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[8..].copy_from_slice(&high.to_le_bytes());
    Err(T::from_bytes(&bytes[..T::SIZE]))
}

/// Copies out of guest memory, in one access where the size is that of an integer.
///
/// # Safety
/// `at` points at `buf.len()` bytes of mapped guest memory.
pub unsafe fn copy_from_guest(at: *const u8, buf: &mut [u8]) {
    // SAFETY: the caller's promise.
    unsafe {
        match buf.len() {
            1 => buf[0] = load(at),
            2 => buf.copy_from_slice(&load(at.cast::<u16>()).to_le_bytes()),
            4 => buf.copy_from_slice(&load(at.cast::<u32>()).to_le_bytes()),
            8 => buf.copy_from_slice(&load(at.cast::<u64>()).to_le_bytes()),
            n => std::ptr::copy_nonoverlapping(at, buf.as_mut_ptr(), n),
        }
    }
}

/// Copies into guest memory, in one access where the size is that of an integer.
///
/// # Safety
/// `at` points at `buf.len()` bytes of mapped guest memory.
pub unsafe fn copy_to_guest(at: *mut u8, buf: &[u8]) {
    // SAFETY: the caller's promise.
    unsafe {
        match buf.len() {
            1 => store(at, buf[0]),
            2 => store(at.cast(), u16::from_bytes(buf)),
            4 => store(at.cast(), u32::from_bytes(buf)),
            8 => store(at.cast(), u64::from_bytes(buf)),
            n => std::ptr::copy_nonoverlapping(buf.as_ptr(), at, n),
        }
    }
}
