//! Handlers of the common integer instructions.
//!
//! `Z` is the operand's size in bytes; `K` the kind of operation. Forms are named by operands: `r` register,
//! `m` memory, `i` immediate, destination first.

#![allow(clippy::missing_safety_doc, reason = "all handlers: `ip` points into a block")]

use super::op::{Op, bail, next, or_bail, place};
use crate::flags::{sext, trunc};
use crate::host;
use crate::state::Cpu;

pub const ADD: u8 = 0;
pub const OR: u8 = 1;
pub const ADC: u8 = 2;
pub const SBB: u8 = 3;
pub const AND: u8 = 4;
pub const SUB: u8 = 5;
pub const XOR: u8 = 6;
pub const CMP: u8 = 7;
pub const TEST: u8 = 8;

pub const SHL: u8 = 0;
pub const SHR: u8 = 1;
pub const SAR: u8 = 2;
pub const ROL: u8 = 3;
pub const ROR: u8 = 4;

pub const NOT: u8 = 0;
pub const NEG: u8 = 1;
pub const INC: u8 = 2;
pub const DEC: u8 = 3;

/// Reads `Z` bytes of a register; for one byte `i` is the byte's offset.
#[inline(always)]
pub unsafe fn rd<const Z: u8>(s: &Cpu, i: u8) -> u64 {
    let regs = s.regs.as_ptr();
    // SAFETY: lowering only makes numbers below 18, or byte offsets below 128.
    unsafe {
        match Z {
            1 => u64::from(*regs.cast::<u8>().add(i.into())),
            _ => trunc::<Z>(*regs.add(i.into())),
        }
    }
}

/// Writes `Z` bytes of a register; four bytes clear the upper half.
#[inline(always)]
pub unsafe fn wr<const Z: u8>(s: &mut Cpu, i: u8, v: u64) {
    let regs = s.regs.as_mut_ptr();
    // SAFETY: as in `rd`.
    unsafe {
        match Z {
            1 => *regs.cast::<u8>().add(i.into()) = v as u8,
            2 => *regs.add(i.into()).cast::<u16>() = v as u16,
            4 => *regs.add(i.into()) = v & 0xffff_ffff,
            _ => *regs.add(i.into()) = v,
        }
    }
}

/// The linear address of the memory operand (flat; an address operation came before if it is not).
#[inline(always)]
pub unsafe fn ea(s: &Cpu, ip: *const Op) -> u64 {
    // SAFETY: as in `rd`.
    unsafe {
        let o = &*ip;
        rd::<8>(s, o.base).wrapping_add(rd::<8>(s, o.index) << o.scale).wrapping_add(o.disp)
    }
}

#[inline(always)]
pub unsafe fn get<const Z: u8>(at: *const u8) -> u64 {
    // SAFETY: `at` came from `at::<Z>`.
    unsafe {
        match Z {
            1 => host::load::<u8>(at).into(),
            2 => host::load::<u16>(at.cast()).into(),
            4 => host::load::<u32>(at.cast()).into(),
            _ => host::load::<u64>(at.cast()),
        }
    }
}

#[inline(always)]
pub unsafe fn put<const Z: u8>(at: *mut u8, v: u64) {
    // SAFETY: `at` came from `at::<Z>` for writing.
    unsafe {
        match Z {
            1 => host::store::<u8>(at, v as u8),
            2 => host::store::<u16>(at.cast(), v as u16),
            4 => host::store::<u32>(at.cast(), v as u32),
            _ => host::store::<u64>(at.cast(), v),
        }
    }
}

/// The result of an ALU operation, and its flags.
#[inline(always)]
pub fn alu<const K: u8, const Z: u8>(s: &mut Cpu, a: u64, b: u64) -> u64 {
    let carry = if K == ADC || K == SBB { s.cf() as u64 } else { 0 };
    match K {
        ADD | ADC => {
            let res = a.wrapping_add(b).wrapping_add(carry);
            s.flags_add::<Z>(a, b, res);
            res
        }
        SUB | SBB | CMP => {
            let res = a.wrapping_sub(b).wrapping_sub(carry);
            s.flags_sub::<Z>(a, b, res);
            res
        }
        _ => {
            let res = match K {
                OR => a | b,
                XOR => a ^ b,
                _ => a & b,
            };
            s.flags_logic::<Z>(res);
            res
        }
    }
}

macro_rules! handlers {
    ($($(#[$doc:meta])* fn $name:ident<$(const $c:ident),*>($s:ident, $ip:ident, $o:ident) $body:block)*) => {$(
        $(#[$doc])*
        pub unsafe fn $name<$(const $c: u8),*>($s: &mut Cpu, $ip: *const Op) -> *const Op {
            // SAFETY: `ip` points into a block.
            unsafe {
                #[allow(unused_variables)]
                let $o = &*$ip;
                $body
                next!($s, $ip)
            }
        }
    )*};
}
pub(super) use handlers;

handlers! {
    fn alu_rr<const K, const Z>(s, ip, o) {
        let v = alu::<K, Z>(s, rd::<Z>(s, o.dst), rd::<Z>(s, o.src));
        if K < CMP { wr::<Z>(s, o.dst, v) }
    }
    fn alu_ri<const K, const Z>(s, ip, o) {
        let v = alu::<K, Z>(s, rd::<Z>(s, o.dst), o.imm);
        if K < CMP { wr::<Z>(s, o.dst, v) }
    }
    fn alu_rm<const K, const Z>(s, ip, o) {
        let m = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        let v = alu::<K, Z>(s, rd::<Z>(s, o.dst), m);
        if K < CMP { wr::<Z>(s, o.dst, v) }
    }
    fn alu_mr<const K, const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), K < CMP);
        let v = alu::<K, Z>(s, get::<Z>(p), rd::<Z>(s, o.src));
        if K < CMP { put::<Z>(p, v) }
    }
    fn alu_mi<const K, const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), K < CMP);
        let v = alu::<K, Z>(s, get::<Z>(p), o.imm);
        if K < CMP { put::<Z>(p, v) }
    }
    fn mov_rr<const Z>(s, ip, o) {
        wr::<Z>(s, o.dst, rd::<Z>(s, o.src));
    }
    fn mov_ri<const Z>(s, ip, o) {
        wr::<Z>(s, o.dst, o.imm);
    }
    fn mov_rm<const Z>(s, ip, o) {
        let m = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        wr::<Z>(s, o.dst, m);
    }
    fn mov_mr<const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        put::<Z>(p, rd::<Z>(s, o.src));
    }
    fn mov_mi<const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        put::<Z>(p, o.imm);
    }
    /// Shifts and rotates by an immediate that is not zero after masking, and for less than 4 bytes below the width.
    fn shift_ri<const K, const Z>(s, ip, o) {
        let v = shift::<K, Z>(s, rd::<Z>(s, o.dst), o.imm as u32);
        wr::<Z>(s, o.dst, v);
    }
    /// Shifts and rotates of 4 or 8 bytes by CL.
    fn shift_rc<const K, const Z>(s, ip, o) {
        let count = s.regs[1] as u32 & if Z == 8 { 63 } else { 31 };
        if count != 0 {
            let v = shift::<K, Z>(s, rd::<Z>(s, o.dst), count);
            wr::<Z>(s, o.dst, v);
        } else {
            // Even by zero bits, a 32-bit destination's upper half is cleared.
            wr::<Z>(s, o.dst, rd::<Z>(s, o.dst));
        }
    }
    fn un_r<const K, const Z>(s, ip, o) {
        let v = unary::<K, Z>(s, rd::<Z>(s, o.dst));
        wr::<Z>(s, o.dst, v);
    }
    fn un_m<const K, const Z>(s, ip, o) {
        let p = place!(s, ip, Z, ea(s, ip), true);
        let v = unary::<K, Z>(s, get::<Z>(p));
        put::<Z>(p, v);
    }
    fn imul_rr<const Z>(s, ip, o) {
        let v = imul::<Z>(s, rd::<Z>(s, o.dst), rd::<Z>(s, o.src));
        wr::<Z>(s, o.dst, v);
    }
    fn imul_rm<const Z>(s, ip, o) {
        let m = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        let v = imul::<Z>(s, rd::<Z>(s, o.dst), m);
        wr::<Z>(s, o.dst, v);
    }
    fn imul_rri<const Z>(s, ip, o) {
        let v = imul::<Z>(s, rd::<Z>(s, o.src), o.imm);
        wr::<Z>(s, o.dst, v);
    }
    fn imul_rmi<const Z>(s, ip, o) {
        let m = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        let v = imul::<Z>(s, m, o.imm);
        wr::<Z>(s, o.dst, v);
    }
    /// MUL and IMUL (`K` = 1) of RAX by a register of 4 or 8 bytes.
    fn mul_r<const K, const Z>(s, ip, o) {
        mul_wide::<K, Z>(s, rd::<Z>(s, o.src));
    }
    fn mul_m<const K, const Z>(s, ip, o) {
        let m = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        mul_wide::<K, Z>(s, m);
    }
    /// DIV of RDX:RAX by a register of 4 or 8 bytes.
    fn div_r<const Z>(s, ip, o) {
        let d = rd::<Z>(s, o.src);
        or_bail!(s, ip, div::<Z>(s, d));
    }
    fn div_m<const Z>(s, ip, o) {
        let d = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        or_bail!(s, ip, div::<Z>(s, d));
    }
    fn movzx_r<const S, const Z>(s, ip, o) {
        wr::<Z>(s, o.dst, rd::<S>(s, o.src));
    }
    fn movzx_m<const S, const Z>(s, ip, o) {
        let m = get::<S>(place!(s, ip, S, ea(s, ip), false));
        wr::<Z>(s, o.dst, m);
    }
    fn movsx_r<const S, const Z>(s, ip, o) {
        wr::<Z>(s, o.dst, sext::<S>(rd::<S>(s, o.src)));
    }
    fn movsx_m<const S, const Z>(s, ip, o) {
        let m = get::<S>(place!(s, ip, S, ea(s, ip), false));
        wr::<Z>(s, o.dst, sext::<S>(m));
    }
    fn lea<const Z>(s, ip, o) {
        let v = ea(s, ip);
        wr::<Z>(s, o.dst, v);
    }
    fn cmov_rr<const C, const Z>(s, ip, o) {
        let v = if s.condition(C) { rd::<Z>(s, o.src) } else { rd::<Z>(s, o.dst) };
        wr::<Z>(s, o.dst, v);
    }
    fn cmov_rm<const C, const Z>(s, ip, o) {
        let m = get::<Z>(place!(s, ip, Z, ea(s, ip), false));
        let v = if s.condition(C) { m } else { rd::<Z>(s, o.dst) };
        wr::<Z>(s, o.dst, v);
    }
    fn setcc_r<const C>(s, ip, o) {
        let v = s.condition(C) as u64;
        wr::<1>(s, o.dst, v);
    }
    fn setcc_m<const C>(s, ip, o) {
        let v = s.condition(C) as u64;
        let p = place!(s, ip, 1, ea(s, ip), true);
        put::<1>(p, v);
    }
    fn bt_rr<const Z>(s, ip, o) {
        let bit = rd::<Z>(s, o.src) & (8 * Z as u64 - 1);
        let v = rd::<Z>(s, o.dst);
        s.set_cf(v >> bit & 1 != 0);
    }
    fn bt_ri<const Z>(s, ip, o) {
        let v = rd::<Z>(s, o.dst);
        s.set_cf(v >> o.imm & 1 != 0);
    }
    fn xchg_rr<const Z>(s, ip, o) {
        let (a, b) = (rd::<Z>(s, o.dst), rd::<Z>(s, o.src));
        wr::<Z>(s, o.dst, b);
        wr::<Z>(s, o.src, a);
    }
    /// CBW, CWDE, CDQE: `Z` is the result's size.
    fn widen<const Z>(s, ip, o) {
        let v = match Z {
            2 => sext::<1>(s.regs[0]),
            4 => sext::<2>(s.regs[0]),
            _ => sext::<4>(s.regs[0]),
        };
        wr::<Z>(s, 0, v);
    }
    /// CWD, CDQ, CQO.
    fn sign<const Z>(s, ip, o) {
        let v = (sext::<Z>(s.regs[0]) as i64 >> 63) as u64;
        wr::<Z>(s, 2, v);
    }
    fn bswap<const Z>(s, ip, o) {
        let v = rd::<Z>(s, o.dst);
        wr::<Z>(s, o.dst, if Z == 8 { v.swap_bytes() } else { u64::from((v as u32).swap_bytes()) });
    }
}

/// Does nothing.
pub unsafe fn nop(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe { next!(s, ip) }
}

/// PUSH of a register, 64-bit mode.
pub unsafe fn push_r(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let sp = s.regs[4].wrapping_sub(8);
        put::<8>(place!(s, ip, 8, sp, true), rd::<8>(s, (*ip).src));
        s.regs[4] = sp;
        next!(s, ip)
    }
}

/// PUSH of an immediate, 64-bit mode.
pub unsafe fn push_i(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let sp = s.regs[4].wrapping_sub(8);
        put::<8>(place!(s, ip, 8, sp, true), (*ip).imm);
        s.regs[4] = sp;
        next!(s, ip)
    }
}

/// PUSH of memory, 64-bit mode.
pub unsafe fn push_m(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let v = get::<8>(place!(s, ip, 8, ea(s, ip), false));
        or_bail!(s, ip, push(s, v));
        next!(s, ip)
    }
}

/// POP into a register, 64-bit mode.
pub unsafe fn pop_r(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let sp = s.regs[4];
        let v = get::<8>(place!(s, ip, 8, sp, false));
        s.regs[4] = sp.wrapping_add(8);
        wr::<8>(s, (*ip).dst, v);
        next!(s, ip)
    }
}

/// LEAVE, 64-bit mode.
pub unsafe fn leave(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let bp = s.regs[5];
        let v = get::<8>(place!(s, ip, 8, bp, false));
        s.regs[4] = bp.wrapping_add(8);
        s.regs[5] = v;
        next!(s, ip)
    }
}

/// Stores below RSP, then moves it: the second access of an operation.
#[inline(always)]
pub fn push(s: &mut Cpu, v: u64) -> Option<()> {
    let sp = s.regs[4].wrapping_sub(8);
    let at = s.fast(sp, 8, true).or_else(|| s.fast_fill(sp, 8, true))?;
    // SAFETY: mapped guest memory that may be written.
    unsafe { put::<8>(at, v) };
    s.regs[4] = sp;
    Some(())
}

/// In front of an operation in 64-bit mode: adds the base of FS or GS (`src`).
pub unsafe fn segment_base(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block; `src` is 4 or 5.
    unsafe {
        let base = s.segs[usize::from((*ip).src)].base;
        s.regs[crate::state::reg::EA] = ea(s, ip).wrapping_add(base);
        next!(s, ip)
    }
}

/// In front of an operation outside of 64-bit mode: checks against segment `src` an access of `imm & 0xff` bytes (a
/// store if bit 8 is set) at an offset of `Z` bytes.
pub unsafe fn segment_offset<const Z: u8>(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block; `src` is a segment register.
    unsafe {
        let o = &*ip;
        let offset = trunc::<Z>(ea(s, ip));
        let write = o.imm & 0x100 != 0;
        let lin = s.linear(usize::from(o.src), offset, o.imm & 0xff, write);
        s.regs[crate::state::reg::EA] = or_bail!(s, ip, lin.ok());
        next!(s, ip)
    }
}

/// LEA outside of 64-bit mode, or with a short address: an offset of `A` bytes into a register of `Z`.
pub unsafe fn lea_short<const A: u8, const Z: u8>(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: `ip` points into a block.
    unsafe {
        let v = trunc::<A>(ea(s, ip));
        wr::<Z>(s, (*ip).dst, v);
        next!(s, ip)
    }
}

#[inline(always)]
fn shift<const K: u8, const Z: u8>(s: &mut Cpu, a: u64, count: u32) -> u64 {
    let bits = 8 * u32::from(Z);
    let top = |v: u64| v >> (bits - 1) & 1 != 0;
    match K {
        SHL => {
            let res = trunc::<Z>(a << count);
            let cf = a >> (bits - count) & 1 != 0;
            s.flags_res_cf_of::<Z>(res, cf, top(res) != cf);
            res
        }
        SHR => {
            let res = a >> count;
            s.flags_res_cf_of::<Z>(res, a >> (count - 1) & 1 != 0, top(a));
            res
        }
        SAR => {
            let wide = sext::<Z>(a) as i64;
            let res = trunc::<Z>((wide >> count) as u64);
            s.flags_res_cf_of::<Z>(res, wide >> (count - 1) & 1 != 0, false);
            res
        }
        ROL => {
            let res = trunc::<Z>(a << count | a >> (bits - count));
            let cf = res & 1 != 0;
            s.set_cf_of(cf, top(res) != cf);
            res
        }
        _ => {
            let res = trunc::<Z>(a >> count | a << (bits - count));
            s.set_cf_of(top(res), top(res) != (res >> (bits - 2) & 1 != 0));
            res
        }
    }
}

#[inline(always)]
pub fn unary<const K: u8, const Z: u8>(s: &mut Cpu, a: u64) -> u64 {
    match K {
        NOT => !a,
        NEG => alu::<SUB, Z>(s, 0, a),
        _ => {
            let cf = s.cf();
            let v = if K == INC { alu::<ADD, Z>(s, a, 1) } else { alu::<SUB, Z>(s, a, 1) };
            s.set_cf(cf);
            v
        }
    }
}

#[inline(always)]
fn imul<const Z: u8>(s: &mut Cpu, a: u64, b: u64) -> u64 {
    let (v, over) = match Z {
        8 => {
            let (v, over) = (a as i64).overflowing_mul(b as i64);
            (v as u64, over)
        }
        _ => {
            let wide = (sext::<Z>(a) as i64).wrapping_mul(sext::<Z>(b) as i64) as u64;
            (trunc::<Z>(wide), sext::<Z>(wide) != wide)
        }
    };
    s.flags_res_cf_of::<Z>(v, over, over);
    v
}

#[inline(always)]
fn mul_wide<const K: u8, const Z: u8>(s: &mut Cpu, b: u64) {
    let a = s.regs[0];
    let (low, high, over) = match (Z, K) {
        (8, 1) => {
            let wide = i128::from(a as i64) * i128::from(b as i64);
            (wide as u64, (wide >> 64) as u64, wide != i128::from(wide as i64))
        }
        (8, _) => {
            let wide = u128::from(a) * u128::from(b);
            (wide as u64, (wide >> 64) as u64, wide >> 64 != 0)
        }
        (_, 1) => {
            let wide = (i64::from(a as i32) * i64::from(b as i32)) as u64;
            (wide & 0xffff_ffff, wide >> 32, sext::<4>(wide) != wide)
        }
        _ => {
            let wide = (a & 0xffff_ffff) * (b & 0xffff_ffff);
            (wide & 0xffff_ffff, wide >> 32, wide >> 32 != 0)
        }
    };
    s.regs[0] = low;
    s.regs[2] = high;
    s.flags_res_cf_of::<Z>(low, over, over);
}

#[inline(always)]
fn div<const Z: u8>(s: &mut Cpu, d: u64) -> Option<()> {
    let (high, low) = (trunc::<Z>(s.regs[2]), trunc::<Z>(s.regs[0]));
    // Also refuses zero: the reference interpreter raises #DE.
    if high >= d {
        return None;
    }
    let (q, r);
    if Z == 8 && high != 0 {
        // SAFETY: the quotient fits, because `high` is less than the divisor.
        unsafe {
            std::arch::asm!("div {}", in(reg) d, inout("rax") low => q, inout("rdx") high => r,
                options(pure, nomem, nostack));
        }
    } else {
        let n = if Z == 8 { low } else { high << 32 | low };
        (q, r) = (n / d, n % d);
    }
    s.regs[0] = q;
    s.regs[2] = r;
    Some(())
}
