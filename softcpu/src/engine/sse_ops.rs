//! Handlers of SSE moves, and of instructions of the form `xmm <- op(xmm, xmm or memory)` by the host's own.
//!
//! `dst` and `src` are numbers of XMM registers, or of general-purpose ones where a form says so.

#![allow(clippy::missing_safety_doc, reason = "all handlers: `ip` points into a block")]

use super::int_ops::{ea, get, put, rd, wr};
use super::op::{Op, bail, next, place};
use crate::exec::stubs;
use crate::host;
use crate::state::Cpu;

#[inline(always)]
fn xmm(s: &mut Cpu, i: u8) -> &mut [u64; 2] {
    &mut s.fx.xmm[usize::from(i & 15)]
}

/// Loads `N` bytes (4, 8 or 16), zero-extended.
#[inline(always)]
unsafe fn load<const N: u8>(at: *const u8) -> [u64; 2] {
    // SAFETY: `at` came from `place!`.
    unsafe {
        match N {
            16 => {
                let value = host::load::<u128>(at.cast());
                [value as u64, (value >> 64) as u64]
            }
            _ => [get::<N>(at), 0],
        }
    }
}

macro_rules! handlers {
    ($($(#[$doc:meta])* fn $name:ident<$(const $c:ident: $t:ty),*>($s:ident, $ip:ident, $o:ident) $body:block)*) => {$(
        $(#[$doc])*
        pub unsafe fn $name<$(const $c: $t),*>($s: &mut Cpu, $ip: *const Op) -> *const Op {
            // SAFETY: `ip` points into a block.
            unsafe {
                if !$s.sse_ok {
                    return bail($s, $ip);
                }
                let $o = &*$ip;
                $body
                next!($s, $ip)
            }
        }
    )*};
}

/// Where the 16-byte (or shorter) memory operand lies; misaligned ones bail if they must be aligned.
macro_rules! operand {
    ($s:expr, $ip:expr, $n:expr, $aligned:expr, $write:expr) => {{
        let lin = ea($s, $ip);
        if $aligned && lin & 15 != 0 {
            return bail($s, $ip);
        }
        place!($s, $ip, $n, lin, $write)
    }};
}

handlers! {
    /// `imm` is the stub.
    fn op_rr<>(s, ip, o) {
        let src = *xmm(s, o.src);
        stubs::call_xmm(o.imm as usize, xmm(s, o.dst), &src);
    }
    fn op_rm<const N: u8, const ALIGNED: bool>(s, ip, o) {
        let src = load::<N>(operand!(s, ip, N, ALIGNED, false));
        stubs::call_xmm(o.imm as usize, xmm(s, o.dst), &src);
    }
    /// Arithmetic that goes by MXCSR.
    fn float_rr<>(s, ip, o) {
        if !s.mxcsr_plain() {
            return bail(s, ip);
        }
        let src = *xmm(s, o.src);
        float(s, o, &src);
    }
    fn float_rm<const N: u8, const ALIGNED: bool>(s, ip, o) {
        if !s.mxcsr_plain() {
            return bail(s, ip);
        }
        let src = load::<N>(operand!(s, ip, N, ALIGNED, false));
        float(s, o, &src);
    }
    fn copy<>(s, ip, o) {
        *xmm(s, o.dst) = *xmm(s, o.src);
    }
    fn load16<const ALIGNED: bool>(s, ip, o) {
        *xmm(s, o.dst) = load::<16>(operand!(s, ip, 16, ALIGNED, false));
    }
    fn store16<const ALIGNED: bool>(s, ip, o) {
        let [low, high] = *xmm(s, o.src);
        let at = operand!(s, ip, 16, ALIGNED, true);
        host::store::<u128>(at.cast(), u128::from(high) << 64 | u128::from(low));
    }
    /// MOVSS, MOVSD, MOVD, MOVQ from memory: the rest is cleared.
    fn load_low<const N: u8>(s, ip, o) {
        *xmm(s, o.dst) = load::<N>(place!(s, ip, N, ea(s, ip), false));
    }
    fn store_low<const N: u8>(s, ip, o) {
        let value = xmm(s, o.src)[0];
        put::<N>(place!(s, ip, N, ea(s, ip), true), value);
    }
    /// MOVSS, MOVSD between registers: the rest stays.
    fn merge_low<const N: u8>(s, ip, o) {
        let (low, old) = (xmm(s, o.src)[0], xmm(s, o.dst)[0]);
        xmm(s, o.dst)[0] = if N == 8 { low } else { old & !0xffff_ffff | low & 0xffff_ffff };
    }
    /// MOVQ between registers: the rest is cleared.
    fn copy_low<>(s, ip, o) {
        *xmm(s, o.dst) = [xmm(s, o.src)[0], 0];
    }
    /// MOVD, MOVQ from a general-purpose register.
    fn from_gpr<const N: u8>(s, ip, o) {
        *xmm(s, o.dst) = [rd::<N>(s, o.src), 0];
    }
    /// MOVD, MOVQ to a general-purpose register.
    fn to_gpr<const N: u8>(s, ip, o) {
        let value = crate::flags::trunc::<N>(xmm(s, o.src)[0]);
        wr::<N>(s, o.dst, value);
    }
    fn load_half<const HIGH: bool>(s, ip, o) {
        xmm(s, o.dst)[usize::from(HIGH)] = get::<8>(place!(s, ip, 8, ea(s, ip), false));
    }
    fn store_half<const HIGH: bool>(s, ip, o) {
        let value = xmm(s, o.src)[usize::from(HIGH)];
        put::<8>(place!(s, ip, 8, ea(s, ip), true), value);
    }
}

/// # Safety
/// `imm` is a stub as [`stubs::call_xmm`] wants it.
#[inline(always)]
unsafe fn float(s: &mut Cpu, o: &Op, src: &[u64; 2]) {
    let mxcsr = s.fx.mxcsr;
    let dst = xmm(s, o.dst);
    // SAFETY: the caller's promise.
    let flags = stubs::with_mxcsr(mxcsr, || unsafe { stubs::call_xmm(o.imm as usize, dst, src) });
    s.fx.mxcsr |= flags;
}
