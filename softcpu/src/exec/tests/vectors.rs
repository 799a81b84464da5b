use iced_x86::code_asm::*;

use crate::exec::testing::*;
use crate::fault::{Fault, vector};
use crate::state::cr;

/// MXCSR with underflow unmasked.
const UNDERFLOW: u32 = 0x1780;

fn machine(mxcsr: u32, xmm: [[u64; 2]; 2]) -> Machine {
    let mut m = Machine::long();
    m.cpu.cr4 |= cr::CR4_OSFXSR | cr::CR4_OSXMMEXCPT;
    m.cpu.update_mode();
    m.cpu.fx.mxcsr = mxcsr;
    m.cpu.fx.xmm[..2].copy_from_slice(&xmm);
    m
}

#[test]
fn a_tiny_part_of_a_dot_product_underflows() {
    let xm = Err(Fault::new(vector::XM));
    // 0.5 times the smallest normal number is exact and denormal; the sum is not a number.
    let pairs = [[!14, 0x3fe0_0000_0000_0000], [0x3ed4_27e1_007f_ffff, 0x0010_0000_0000_0000]];
    for (mxcsr, immediate, expected) in [
        (UNDERFLOW, 0x7f, xm),
        (UNDERFLOW, 0x3f, xm),
        (UNDERFLOW, 0x30, xm),
        (UNDERFLOW, 0x20, xm),
        (UNDERFLOW, 0x1f, Ok(())),
        (0x1f80, 0x3f, Ok(())),
    ] {
        let mut m = machine(mxcsr, pairs);
        m.asm(|a| a.dppd(xmm0, xmm1, immediate).unwrap());
        assert_eq!(m.step(), expected, "{mxcsr:x} {immediate:x}");
        assert_eq!(m.cpu.fx.mxcsr & 0x10, if expected.is_err() { 0x10 } else { 0 });
    }
    // A tiny product underflows even where the sum takes it for zero (MXCSR.DAZ).
    let mut m = machine(UNDERFLOW | 0x40, [[0, 0xbfef_f98a_0033_5010], [0, 0x0010_0000_0000_0000]]);
    m.asm(|a| a.dppd(xmm0, xmm1, 0x22).unwrap());
    assert_eq!(m.step(), xm);
    // DPPS: a product, then the sum of two that are normal themselves.
    let half = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let one = 0x3f80_0000;
    for (left, right, expected) in [
        (half(0x3f00_0000, 0), half(0x0080_0000, 0), xm),
        (half(one, one), half(0x0080_0001, 0x8080_0000), xm),
        (half(one, one), half(0x0180_0000, 0x0080_0000), Ok(())),
    ] {
        let mut m = machine(UNDERFLOW, [[left, half(one, 0)], [right, half(one, 0)]]);
        m.asm(|a| a.dpps(xmm0, xmm1, 0xff).unwrap());
        assert_eq!(m.step(), expected, "{left:x} {right:x}");
    }
}
