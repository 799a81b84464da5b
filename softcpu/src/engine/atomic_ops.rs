//! Handlers of locked instructions, and of XCHG, XADD and CMPXCHG with memory.
//!
//! XADD and CMPXCHG are locked on the host even where the guest's are not: nobody can tell the difference.

#![allow(clippy::missing_safety_doc, reason = "all handlers: `ip` points into a block")]

use super::int_ops::{self as int, CMP, alu, ea, handlers, rd, wr};
use super::op::{Op, next, place};
use crate::host;
use crate::state::Cpu;

/// Atomically replaces `Z` bytes by what `f` makes of them; gives what they were.
#[inline(always)]
unsafe fn update<const Z: u8>(at: *mut u8, mut f: impl FnMut(u64) -> u64) -> u64 {
    // SAFETY: `at` came from `place!` for writing.
    unsafe {
        match Z {
            1 => host::update::<u8>(at, true, |v| Some(f(v.into()) as u8)).into(),
            2 => host::update::<u16>(at.cast(), true, |v| Some(f(v.into()) as u16)).into(),
            4 => host::update::<u32>(at.cast(), true, |v| Some(f(v.into()) as u32)).into(),
            _ => host::update::<u64>(at.cast(), true, |v| Some(f(v))),
        }
    }
}

/// Atomically stores `new` if `Z` bytes are `old`; gives what they were.
#[inline(always)]
unsafe fn compare_exchange<const Z: u8>(at: *mut u8, old: u64, new: u64) -> u64 {
    // SAFETY: `at` came from `place!` for writing.
    unsafe {
        let now = match Z {
            1 => host::compare_exchange(at, old as u8, new as u8).map_err(u64::from),
            2 => host::compare_exchange(at.cast(), old as u16, new as u16).map_err(u64::from),
            4 => host::compare_exchange(at.cast(), old as u32, new as u32).map_err(u64::from),
            _ => host::compare_exchange(at.cast(), old, new),
        };
        now.err().unwrap_or(old)
    }
}

/// What operation `K` stores for `a` and `b`, with the flags as they are (ADC, SBB).
#[inline(always)]
fn result<const K: u8>(s: &Cpu, a: u64, b: u64) -> u64 {
    let carry = s.cf() as u64;
    match K {
        int::ADD => a.wrapping_add(b),
        int::ADC => a.wrapping_add(b).wrapping_add(carry),
        int::SUB => a.wrapping_sub(b),
        int::SBB => a.wrapping_sub(b).wrapping_sub(carry),
        int::OR => a | b,
        int::AND => a & b,
        _ => a ^ b,
    }
}

handlers! {
    fn lock_alu_mr<const K, const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let b = rd::<Z>(s, o.src);
        let old = update::<Z>(p, |a| result::<K>(s, a, b));
        alu::<K, Z>(s, old, b);
    }
    fn lock_alu_mi<const K, const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let old = update::<Z>(p, |a| result::<K>(s, a, o.imm));
        alu::<K, Z>(s, old, o.imm);
    }
    fn lock_un_m<const K, const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let old = update::<Z>(p, |a| match K {
            int::NOT => !a,
            int::NEG => a.wrapping_neg(),
            int::INC => a.wrapping_add(1),
            _ => a.wrapping_sub(1),
        });
        int::unary::<K, Z>(s, old);
    }
    fn xchg_mr<const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let new = rd::<Z>(s, o.src);
        let old = update::<Z>(p, |_| new);
        wr::<Z>(s, o.src, old);
    }
    fn xadd_mr<const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let b = rd::<Z>(s, o.src);
        let old = update::<Z>(p, |a| a.wrapping_add(b));
        alu::<{ int::ADD }, Z>(s, old, b);
        wr::<Z>(s, o.src, old);
    }
    fn cmpxchg_mr<const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let accumulator = rd::<Z>(s, 0);
        let old = compare_exchange::<Z>(p, accumulator, rd::<Z>(s, o.src));
        alu::<CMP, Z>(s, accumulator, old);
        if old != accumulator {
            wr::<Z>(s, 0, old);
        }
    }
}
