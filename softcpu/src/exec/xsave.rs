//! FXSAVE, FXRSTOR, XSAVE, XSAVEOPT and XRSTOR (SDM volume 1, chapter 13) for x87 and SSE state.
//!
//! ```text
//!      0  FCW FSW FTW FOP, FIP, FDP     x87      (16 bytes more of x87's half: FDP, MXCSR and its mask)
//!     24  MXCSR, MXCSR_MASK             SSE
//!     32  ST(0)..ST(7)                  x87
//!    160  XMM0..XMM7 (XMM15)            SSE
//!    416  not touched
//!    512  XSAVE header: XSTATE_BV, XCOMP_BV (zero), zeros
//!    576
//! ```

use iced_x86::{Code, Instruction};

use super::{operand, sse, x87, x87_env};
use crate::fault::{Exec, Fault};
use crate::state::{Cpu, FxState, cr, reg};

/// Component bits of XCR0 and XSTATE_BV.
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const HEADER: usize = 512;
const AREA: usize = 576;

/// Executes one of these; #UD if `insn` is none.
pub(super) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    match insn.code() {
        Code::Fxsave_m512byte => fxsave(cpu, insn, false),
        Code::Fxsave64_m512byte => fxsave(cpu, insn, true),
        Code::Fxrstor_m512byte => fxrstor(cpu, insn, false),
        Code::Fxrstor64_m512byte => fxrstor(cpu, insn, true),
        Code::Xsave_mem => xsave(cpu, insn, false, false),
        Code::Xsave64_mem => xsave(cpu, insn, true, false),
        Code::Xsaveopt_mem => xsave(cpu, insn, false, true),
        Code::Xsaveopt64_mem => xsave(cpu, insn, true, true),
        Code::Xrstor_mem => xrstor(cpu, insn, false),
        Code::Xrstor64_mem => xrstor(cpu, insn, true),
        _ => Err(Fault::UD),
    }
}

/// XMM registers that the instruction sees: 16 in 64-bit mode, otherwise 8.
fn xmm_count(cpu: &Cpu) -> usize {
    if cpu.mode.bits == 64 { 16 } else { 8 }
}

/// The x87 and SSE state as FXSAVE lays it out, with 64-bit pointers if `wide`.
fn image(fx: &FxState, wide: bool) -> [u8; 416] {
    let mut out = [0; 416];
    out[0..2].copy_from_slice(&fx.fcw.to_le_bytes());
    out[2..4].copy_from_slice(&fx.fsw.to_le_bytes());
    out[4] = fx.ftw;
    out[6..8].copy_from_slice(&fx.fop.to_le_bytes());
    let pointer = if wide { 8 } else { 4 };
    out[8..8 + pointer].copy_from_slice(&fx.fip.to_le_bytes()[..pointer]);
    out[16..16 + pointer].copy_from_slice(&fx.fdp.to_le_bytes()[..pointer]);
    out[24..28].copy_from_slice(&fx.mxcsr.to_le_bytes());
    out[28..32].copy_from_slice(&fx.mxcsr_mask.to_le_bytes());
    for (i, register) in fx.st.iter().enumerate() {
        out[32 + 16 * i..42 + 16 * i].copy_from_slice(&register[..10]);
    }
    for (i, [low, high]) in fx.xmm.iter().enumerate() {
        let at = 160 + 16 * i;
        out[at..at + 8].copy_from_slice(&low.to_le_bytes());
        out[at + 8..at + 16].copy_from_slice(&high.to_le_bytes());
    }
    out
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Takes the x87 part of an image over.
fn take_x87(fx: &mut FxState, bytes: &[u8], wide: bool) {
    let pointer = if wide { u64::MAX } else { 0xffff_ffff };
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    fx.fcw = x87_env::control_word(word(0));
    fx.fsw = word(2);
    fx.ftw = bytes[4];
    fx.fop = word(6) & 0x7ff;
    fx.fip = u64_at(bytes, 8) & pointer;
    fx.fdp = u64_at(bytes, 16) & pointer;
    for (i, register) in fx.st.iter_mut().enumerate() {
        *register = [0; 16];
        register[..10].copy_from_slice(&bytes[32 + 16 * i..42 + 16 * i]);
    }
    x87::summarize(fx);
}

/// Takes the first `count` XMM registers of an image over.
fn take_xmm(fx: &mut FxState, bytes: &[u8], count: usize) {
    for (i, register) in fx.xmm[..count].iter_mut().enumerate() {
        *register = [u64_at(bytes, 160 + 16 * i), u64_at(bytes, 168 + 16 * i)];
    }
}

/// The address of an area of `size` bytes, aligned to `align`.
fn area(cpu: &Cpu, insn: &Instruction, size: usize, align: u64, write: bool) -> Exec<u64> {
    sse::aligned(cpu, insn, operand::address(cpu, insn, size, write), align)
}

/// Raises the fault that an access to any of `len` bytes would raise, before the first is written.
pub(super) fn probe(cpu: &mut Cpu, lin: u64, len: usize, write: bool) -> Exec {
    let access = cpu.access(write);
    cpu.translate(lin, access)?;
    if (lin & 0xfff) + len as u64 > 4096 {
        let last = cpu.linear_plus(lin, len as u64 - 1) & !0xfff;
        cpu.translate(last, access)?;
    }
    Ok(())
}

fn check_fx(cpu: &Cpu) -> Exec {
    if cpu.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 { Err(Fault::NM) } else { Ok(()) }
}

fn fxsave(cpu: &mut Cpu, insn: &Instruction, wide: bool) -> Exec {
    check_fx(cpu)?;
    let lin = area(cpu, insn, 512, 16, true)?;
    probe(cpu, lin, 512, true)?;
    let bytes = image(&cpu.fx, wide);
    x87::store(cpu, lin, &bytes[..160 + 16 * xmm_count(cpu)])
}

fn fxrstor(cpu: &mut Cpu, insn: &Instruction, wide: bool) -> Exec {
    check_fx(cpu)?;
    let lin = area(cpu, insn, 512, 16, false)?;
    let mut bytes = [0; 512];
    x87::load(cpu, lin, &mut bytes)?;
    let mxcsr = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
    if mxcsr & !cpu.fx.mxcsr_mask != 0 {
        return Err(Fault::GP0);
    }
    let count = xmm_count(cpu);
    take_x87(&mut cpu.fx, &bytes, wide);
    cpu.fx.mxcsr = mxcsr;
    take_xmm(&mut cpu.fx, &bytes, count);
    Ok(())
}

fn check_xsave(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    if cpu.cr0 & cr::CR0_TS != 0 { Err(Fault::NM) } else { Ok(()) }
}

/// The components that EDX:EAX asks for and XCR0 has.
fn requested(cpu: &Cpu) -> u64 {
    let mask = cpu.regs[reg::RDX] << 32 | cpu.regs[reg::RAX] & 0xffff_ffff;
    mask & cpu.xcr0
}

/// The components that are not in their initial state (XINUSE).
fn in_use(cpu: &Cpu) -> u64 {
    let fx = &cpu.fx;
    let x87_initial = (fx.fcw, fx.fsw, fx.ftw, fx.fop, fx.fip, fx.fdp) == (0x37f, 0, 0, 0, 0, 0)
        && fx.st.iter().all(|r| r[..10] == [0; 10]);
    let sse_initial = fx.xmm[..xmm_count(cpu)].iter().all(|r| *r == [0, 0]);
    let x87 = if x87_initial { 0 } else { X87 };
    let sse = if sse_initial { 0 } else { SSE };
    x87 | sse
}

fn xsave(cpu: &mut Cpu, insn: &Instruction, wide: bool, optimized: bool) -> Exec {
    check_xsave(cpu)?;
    let lin = area(cpu, insn, AREA, 64, true)?;
    probe(cpu, lin, AREA, true)?;
    let at = |cpu: &Cpu, offset: usize| cpu.linear_plus(lin, offset as u64);
    let (mask, in_use) = (requested(cpu), in_use(cpu));
    let write = if optimized { mask & in_use } else { mask };
    let bytes = image(&cpu.fx, wide);
    let header = at(cpu, HEADER);
    let old = cpu.load::<u64>(header)?;
    if write & X87 != 0 {
        x87::store(cpu, lin, &bytes[..24])?;
        x87::store(cpu, at(cpu, 32), &bytes[32..160])?;
    }
    // MXCSR is not optimized away: it belongs to SSE and AVX both.
    if mask & SSE != 0 {
        x87::store(cpu, at(cpu, 24), &bytes[24..32])?;
    }
    if write & SSE != 0 {
        let end = 160 + 16 * xmm_count(cpu);
        x87::store(cpu, at(cpu, 160), &bytes[160..end])?;
    }
    cpu.store(header, old & !mask | mask & in_use)
}

fn xrstor(cpu: &mut Cpu, insn: &Instruction, wide: bool) -> Exec {
    check_xsave(cpu)?;
    let lin = area(cpu, insn, AREA, 64, false)?;
    let mut bytes = [0; AREA];
    x87::load(cpu, lin, &mut bytes)?;
    let mask = requested(cpu);
    let stored = u64_at(&bytes, HEADER);
    // The compacted form (XCOMP_BV bit 63) is not there, so that XCOMP_BV and what follows it must be zero.
    if stored & !cpu.xcr0 != 0 || bytes[HEADER + 8..HEADER + 24].iter().any(|b| *b != 0) {
        return Err(Fault::GP0);
    }
    let mxcsr = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
    if mask & SSE != 0 && mxcsr & !cpu.fx.mxcsr_mask != 0 {
        return Err(Fault::GP0);
    }
    let count = xmm_count(cpu);
    if mask & X87 != 0 {
        if stored & X87 != 0 {
            take_x87(&mut cpu.fx, &bytes, wide);
        } else {
            x87_env::init(&mut cpu.fx);
            cpu.fx.st = [[0; 16]; 8];
        }
    }
    if mask & SSE != 0 {
        cpu.fx.mxcsr = mxcsr;
        if stored & SSE != 0 {
            take_xmm(&mut cpu.fx, &bytes, count);
        } else {
            cpu.fx.xmm[..count].fill([0; 2]);
        }
    }
    Ok(())
}
