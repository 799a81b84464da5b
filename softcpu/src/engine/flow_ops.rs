//! Handlers that end a block: jumps, calls, returns.
//!
//! `imm` is where a branch goes, `disp` where it goes otherwise (or returns to); the block's [`Link`] follows.

#![allow(clippy::missing_safety_doc, reason = "all handlers: `ip` points into a block")]

use super::int_ops::{CMP, alu, ea, get, push, put, rd};
use super::op::{Link, Op, Stop, bail, or_bail, place};
use crate::state::Cpu;

/// Entries of the jump cache.
pub const JUMPS: usize = 4096;

/// From an instruction's address to its block, for jumps whose target is only known when they happen.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Jump {
    pub rip: u64,
    /// Epoch and mode under which the entry was made ([`Cpu::jump_key`]).
    pub key: u64,
    /// And the code segment ([`Cpu::code_segment`]): 0 in 64-bit mode, whose handlers need not look at it.
    pub segment: u64,
    pub target: *const Op,
}

/// Where the jump cache keeps `rip`.
#[inline(always)]
pub fn jump_index(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize & (JUMPS - 1)
}

/// Goes to `rip` by way `way` of the link behind `ip`.
#[inline(always)]
unsafe fn follow(s: &mut Cpu, ip: *const Op, way: usize, rip: u64) -> *const Op {
    // SAFETY: the block's link follows its last operation.
    unsafe {
        s.fuel -= i64::from((*ip).n) + 1;
        let link = ip.add(1) as *mut Link;
        if (*link).epoch[way] >= s.epoch && s.fuel > 0 {
            let target = (*link).target[way];
            return ((*target).f)(s, target);
        }
        unlinked(s, link, way, rip)
    }
}

#[cold]
#[inline(never)]
unsafe fn unlinked(s: &mut Cpu, link: *mut Link, way: usize, rip: u64) -> *const Op {
    s.rip = rip;
    s.stop = Stop::Resolve;
    s.link = link;
    s.link_way = way;
    std::ptr::null()
}

/// Goes to `rip`, known only now.
#[inline(always)]
unsafe fn jump(s: &mut Cpu, ip: *const Op, rip: u64) -> *const Op {
    // SAFETY: the index is in range; a target with the right key is a block's first operation.
    unsafe {
        s.fuel -= i64::from((*ip).n) + 1;
        let entry = *s.jumps.get_unchecked(jump_index(rip));
        if entry.rip == rip && entry.key == s.jump_key && s.fuel > 0 {
            return ((*entry.target).f)(s, entry.target);
        }
        s.rip = rip;
        s.stop = Stop::Lookup;
        std::ptr::null()
    }
}

/// The end of a block that does not branch.
pub unsafe fn fall(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block. `n` counts this operation's instruction, which it does not have.
    unsafe {
        s.fuel += 1;
        follow(s, ip, 0, (*ip).imm)
    }
}

pub unsafe fn jmp(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe { follow(s, ip, 0, (*ip).imm) }
}

pub unsafe fn jcc<const C: u8>(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        if s.condition(C) { follow(s, ip, 0, (*ip).imm) } else { follow(s, ip, 1, (*ip).disp) }
    }
}

/// Condition `C` after `a` - `b` (`K` = CMP) or `a` & `b`, without a look at the lazy flags.
#[inline(always)]
fn compares<const K: u8, const Z: u8, const C: u8>(s: &Cpu, a: u64, b: u64) -> bool {
    let signed = |v: u64| crate::flags::sext::<Z>(v) as i64;
    if K != CMP {
        return s.condition(C);
    }
    match C {
        2 => a < b,
        3 => a >= b,
        4 => a == b,
        5 => a != b,
        6 => a <= b,
        7 => a > b,
        12 => signed(a) < signed(b),
        13 => signed(a) >= signed(b),
        14 => signed(a) <= signed(b),
        15 => signed(a) > signed(b),
        _ => s.condition(C),
    }
}

/// CMP or TEST of two registers, and Jcc. `n` is the jump's; targets are in `imm` and `disp`.
pub unsafe fn cmp_jcc_rr<const K: u8, const Z: u8, const C: u8>(
    s: &mut Cpu,
    ip: *const Op,
) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let (a, b) = (rd::<Z>(s, (*ip).dst), rd::<Z>(s, (*ip).src));
        compare_and_go::<K, Z, C>(s, ip, a, b)
    }
}

/// CMP or TEST of a register with a small immediate (`base`: its low byte, sign-extended from 8 bits), and Jcc.
pub unsafe fn cmp_jcc_ri<const K: u8, const Z: u8, const C: u8>(
    s: &mut Cpu,
    ip: *const Op,
) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let b = crate::flags::trunc::<Z>((*ip).base as i8 as i64 as u64);
        compare_and_go::<K, Z, C>(s, ip, rd::<Z>(s, (*ip).dst), b)
    }
}

#[inline(always)]
unsafe fn compare_and_go<const K: u8, const Z: u8, const C: u8>(
    s: &mut Cpu,
    ip: *const Op,
    a: u64,
    b: u64,
) -> *const Op {
    alu::<K, Z>(s, a, b);
    // SAFETY: `ip` points into a block.
    unsafe {
        if compares::<K, Z, C>(s, a, b) {
            follow(s, ip, 0, (*ip).imm)
        } else {
            follow(s, ip, 1, (*ip).disp)
        }
    }
}

pub unsafe fn call(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let sp = s.regs[4].wrapping_sub(8);
        put::<8>(place!(s, ip, 8, sp, true), (*ip).disp);
        s.regs[4] = sp;
        follow(s, ip, 0, (*ip).imm)
    }
}

pub unsafe fn jmp_r(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let rip = or_bail!(s, ip, target(rd::<8>(s, (*ip).src)));
        jump(s, ip, rip)
    }
}

pub unsafe fn jmp_m(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let rip = get::<8>(place!(s, ip, 8, ea(s, ip), false));
        let rip = or_bail!(s, ip, target(rip));
        jump(s, ip, rip)
    }
}

/// CALL of a register: `imm` is the return address.
pub unsafe fn call_r(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let rip = or_bail!(s, ip, target(rd::<8>(s, (*ip).src)));
        let sp = s.regs[4].wrapping_sub(8);
        put::<8>(place!(s, ip, 8, sp, true), (*ip).imm);
        s.regs[4] = sp;
        jump(s, ip, rip)
    }
}

/// CALL of memory: `imm` is the return address.
pub unsafe fn call_m(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let rip = get::<8>(place!(s, ip, 8, ea(s, ip), false));
        let rip = or_bail!(s, ip, target(rip));
        or_bail!(s, ip, push(s, (*ip).imm));
        jump(s, ip, rip)
    }
}

pub unsafe fn ret(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let sp = s.regs[4];
        let rip = get::<8>(place!(s, ip, 8, sp, false));
        let rip = or_bail!(s, ip, target(rip));
        s.regs[4] = sp.wrapping_add(8);
        jump(s, ip, rip)
    }
}

/// A branch target, if it is one: the reference interpreter raises the fault for one that is not canonical.
#[inline(always)]
fn target(rip: u64) -> Option<u64> {
    crate::mem::canonical(rip).then_some(rip)
}

/// The end of a block after an instruction of the reference interpreter that may have changed the mode.
pub unsafe fn look_up(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block. `n` counts this operation's instruction, which it does not have.
    unsafe {
        s.fuel -= i64::from((*ip).n);
        s.rip = (*ip).imm;
    }
    s.stop = Stop::Lookup;
    std::ptr::null()
}
