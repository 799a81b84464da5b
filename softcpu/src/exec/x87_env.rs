//! The x87 environment in memory: FNSTENV, FLDENV, FNSAVE, FRSTOR (SDM volume 1, 8.1.10).
//!
//! ```text
//!            protected, 32 bits      protected, 16    real, 32 bits                    real, 16
//!   word 0   FCW                     FCW              FCW                              FCW
//!        1   FSW                     FSW              FSW                              FSW
//!        2   tag word                tag word         tag word                         tag word
//!        3   FIP                     FIP 15:0         FIP 15:0                         FIP 15:0
//!        4   FOP 26:16, CS 15:0      CS               FIP 31:16 in 27:12, FOP 10:0     FIP 19:16 in 15:12, FOP
//!        5   FDP                     FDP 15:0         FDP 15:0                         FDP 15:0
//!        6   DS                      DS               FDP 31:16 in 27:12               FDP 19:16 in 15:12
//!            then, in FNSAVE's image, ST(0)..ST(7), 10 bytes each
//! ```
//!
//! CS and DS are zero (see [`super::x87`]).

use iced_x86::Instruction;

use super::{operand, x87};
use crate::fault::Exec;
use crate::state::{Cpu, FxState};

/// The state after FNINIT.
pub(super) fn init(fx: &mut FxState) {
    set_status(fx, 0);
    (fx.fcw, fx.ftw) = (0x37f, 0);
    (fx.fop, fx.fip, fx.fdp) = (0, 0, 0);
}

/// Sets the status word. The registers stay where they are; what changes with TOP is which of them is ST(0).
pub(super) fn set_status(fx: &mut FxState, fsw: u16) {
    let turn = (fsw >> 11).wrapping_sub(fx.fsw >> 11) & 7;
    fx.st.rotate_left(turn.into());
    fx.fsw = fsw;
}

/// A control word as the processor keeps it: bit 6 is always set, 7 and 15:13 never.
pub(super) fn control_word(value: u16) -> u16 {
    value & 0x1f3f | 0x40
}

/// The full tag word (two bits a physical register: valid, zero, special, empty) of the abridged one.
pub(super) fn tag_word(fx: &FxState) -> u16 {
    let top = usize::from(fx.fsw >> 11 & 7);
    let mut tags = 0;
    for physical in 0..8usize {
        let tag = if fx.ftw >> physical & 1 == 0 {
            3
        } else {
            classify(&fx.st[(physical + 8 - top) & 7])
        };
        tags |= tag << (2 * physical);
    }
    tags
}

fn classify(value: &[u8; 16]) -> u16 {
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    let integer = value[7] & 0x80 != 0;
    let zero = value[..8].iter().all(|b| *b == 0);
    match exponent {
        0 if zero => 1,
        0 | 0x7fff => 2,
        _ if integer => 0,
        _ => 2,
    }
}

/// The abridged tag word (a bit for each register that is not empty).
pub(super) fn abridged(tags: u16) -> u8 {
    (0..8).filter(|i| tags >> (2 * i) & 3 != 3).fold(0, |all, i| all | 1 << i)
}

fn is_wide(insn: &Instruction) -> bool {
    insn.op_code().operand_size() != 16
}

fn is_real(cpu: &Cpu) -> bool {
    !cpu.mode.protected || cpu.mode.v86
}

/// The seven words of the environment.
fn environment(cpu: &Cpu, wide: bool) -> [u32; 7] {
    let fx = &cpu.fx;
    let (fip, fdp, fop) = (fx.fip as u32, fx.fdp as u32, u32::from(fx.fop & 0x7ff));
    // The upper halves of 16-bit items read as ones.
    let item = |value: u16| 0xffff_0000 | u32::from(value);
    let [w3, w4, w5, w6] = match (is_real(cpu), wide) {
        (false, true) => [fip, fop << 16, fdp, 0xffff_0000],
        (false, false) => [fip, 0, fdp, 0],
        (true, true) => {
            [item(fip as u16), fip >> 16 << 12 | fop, item(fdp as u16), fdp >> 16 << 12]
        }
        (true, false) => [fip, fip >> 16 << 12 | fop, fdp, fdp >> 16 << 12],
    };
    [item(fx.fcw), item(fx.fsw), item(tag_word(fx)), w3, w4, w5, w6]
}

/// Writes the environment into `out`; gives its length.
fn write_environment(cpu: &Cpu, wide: bool, out: &mut [u8; 108]) -> usize {
    let size = if wide { 4 } else { 2 };
    for (i, word) in environment(cpu, wide).iter().enumerate() {
        out[i * size..(i + 1) * size].copy_from_slice(&word.to_le_bytes()[..size]);
    }
    7 * size
}

/// Takes the environment over from `bytes`.
fn read_environment(cpu: &mut Cpu, wide: bool, bytes: &[u8]) {
    let word = |i: usize| {
        if wide {
            u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        } else {
            u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).into()
        }
    };
    let (fip, fop, fdp) = match (is_real(cpu), wide) {
        (false, true) => (word(3), word(4) >> 16, word(5)),
        (false, false) => (word(3), cpu.fx.fop.into(), word(5)),
        (true, _) => (
            word(3) & 0xffff | word(4) >> 12 << 16,
            word(4),
            word(5) & 0xffff | word(6) >> 12 << 16,
        ),
    };
    let fx = &mut cpu.fx;
    fx.fcw = control_word(word(0) as u16);
    set_status(fx, word(1) as u16);
    fx.ftw = abridged(word(2) as u16);
    (fx.fip, fx.fop, fx.fdp) = (fip.into(), fop as u16 & 0x7ff, fdp.into());
    x87::summarize(fx);
}

/// FNSTENV: stores the environment, then masks all exceptions.
pub(super) fn store_environment(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let mut bytes = [0; 108];
    let len = write_environment(cpu, is_wide(insn), &mut bytes);
    let lin = operand::address(cpu, insn, len, true)?;
    x87::store(cpu, lin, &bytes[..len])?;
    cpu.fx.fcw |= 0x3f;
    x87::summarize(&mut cpu.fx);
    Ok(())
}

/// FLDENV.
pub(super) fn load_environment(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let wide = is_wide(insn);
    let mut bytes = [0; 28];
    let len = if wide { 28 } else { 14 };
    let lin = operand::address(cpu, insn, len, false)?;
    x87::load(cpu, lin, &mut bytes[..len])?;
    read_environment(cpu, wide, &bytes);
    Ok(())
}

/// FNSAVE: stores environment and registers, then does FNINIT.
pub(super) fn save(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let mut bytes = [0; 108];
    let head = write_environment(cpu, is_wide(insn), &mut bytes);
    for (i, register) in cpu.fx.st.iter().enumerate() {
        bytes[head + 10 * i..head + 10 * (i + 1)].copy_from_slice(&register[..10]);
    }
    let lin = operand::address(cpu, insn, head + 80, true)?;
    x87::store(cpu, lin, &bytes[..head + 80])?;
    init(&mut cpu.fx);
    Ok(())
}

/// FRSTOR.
pub(super) fn restore(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let wide = is_wide(insn);
    let head = if wide { 28 } else { 14 };
    let mut bytes = [0; 108];
    let lin = operand::address(cpu, insn, head + 80, false)?;
    x87::load(cpu, lin, &mut bytes[..head + 80])?;
    read_environment(cpu, wide, &bytes);
    for (i, register) in cpu.fx.st.iter_mut().enumerate() {
        *register = [0; 16];
        register[..10].copy_from_slice(&bytes[head + 10 * i..head + 10 * (i + 1)]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_follow_the_values() {
        let mut cpu = Cpu::for_tests();
        let fx = &mut cpu.fx;
        init(fx);
        assert_eq!(tag_word(fx), 0xffff);
        // TOP = 6: ST(0) is physical 6 (zero), ST(1) is 7 (one), ST(2) is 0 (infinity).
        fx.fsw = 6 << 11;
        fx.ftw = 0b1100_0001;
        fx.st[0] = [0; 16];
        fx.st[1][7..10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        fx.st[2][7..10].copy_from_slice(&[0x80, 0xff, 0x7f]);
        assert_eq!(tag_word(fx), 0b00_01_11_11_11_11_11_10);
        assert_eq!(abridged(tag_word(fx)), fx.ftw);
    }
}
