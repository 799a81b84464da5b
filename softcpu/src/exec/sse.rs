//! SSE to SSE4.2, AES, PCLMULQDQ and SHA, and the way to MMX, x87 and XSAVE.
//!
//! Values are computed by the host's own instructions ([`super::stubs`]); here are the checks, the operands and the
//! exceptions.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::sse_forms::{self, Class, Form, Implicit, Kind};
use super::stubs::{self, Entry, Frame};
use super::{mmx, operand, sse_move, x87, xsave};
use crate::fault::{Exec, Fault, vector};
use crate::state::{Cpu, cr, reg};

/// An instruction that the engine may execute by calling its stub itself.
#[derive(Debug, Clone, Copy)]
pub struct Stub {
    /// To be called as [`stubs::call_xmm`] says, with operand 0 as `dst` and operand 1 as `src`.
    pub entry: Entry,
    /// Bytes of operand 1 if it is memory: 2, 4, 8 or 16, to be loaded into the low end of 16 zero bytes.
    pub size: u8,
    /// A memory operand must be aligned to 16, or it is #GP(0).
    pub aligned: bool,
    /// It must be called inside of [`stubs::with_mxcsr`] and the flags looked at: [`Cpu::mxcsr_plain`].
    pub mxcsr: bool,
}

/// The stub of `insn` if it is of the form `xmm <- op(xmm, xmm or memory)` and does nothing else.
/// [`Cpu::sse_ok`](crate::state::Cpu::sse_ok) must hold when it is called.
pub fn lookup(insn: &Instruction) -> Option<Stub> {
    let form = sse_forms::of(insn.code());
    (form.kind == Kind::Xmm).then(|| Stub {
        entry: entry_of(form, insn),
        size: insn.memory_size().size() as u8,
        aligned: form.aligned,
        mxcsr: form.mxcsr,
    })
}

impl Cpu {
    /// Every SSE exception is masked, so that after a call of an arithmetic stub it is enough to store the flags:
    /// `fx.mxcsr |= with_mxcsr(fx.mxcsr, ..)`.
    #[inline(always)]
    pub fn mxcsr_plain(&self) -> bool {
        self.fx.mxcsr & stubs::MXCSR_DEFAULT == stubs::MXCSR_DEFAULT
    }
}

/// Executes an SSE, MMX, x87, FXSAVE or XSAVE instruction; #UD if `insn` is none.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let form = sse_forms::of(insn.code());
    match form.kind {
        Kind::Xmm => xmm(cpu, insn, form),
        Kind::Mixed => mixed(cpu, insn, form),
        Kind::Mmx => mmx_form(cpu, insn, form),
        Kind::ShiftImmediate => shift_immediate(cpu, insn, form),
        Kind::Emms => mmx::emms(cpu),
        Kind::Ldmxcsr => ldmxcsr(cpu, insn),
        Kind::Stmxcsr => stmxcsr(cpu, insn),
        Kind::Nothing => Ok(()),
        Kind::None if x87::is_x87(insn.code()) => x87::execute(cpu, insn),
        Kind::None => xsave::execute(cpu, insn),
        _ => sse_move::execute(cpu, insn, form),
    }
}

/// #UD or #NM where the control registers forbid SSE (SDM volume 3, table 14-1).
#[inline(always)]
pub(super) fn check_sse(cpu: &Cpu) -> Exec {
    if cpu.sse_ok {
        return Ok(());
    }
    if cpu.cr0 & cr::CR0_EM != 0 || cpu.cr4 & cr::CR4_OSFXSR == 0 {
        return Err(Fault::UD);
    }
    Err(Fault::NM)
}

/// The number of an XMM register.
#[inline(always)]
pub(super) fn number(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::XMM0 as usize) & 15
}

#[inline(always)]
fn entry_of(form: &Form, insn: &Instruction) -> Entry {
    if form.immediate { form.entry + usize::from(insn.immediate8()) * 8 } else { form.entry }
}

/// The linear address of the memory operand, aligned where it must be.
#[inline]
pub(super) fn address(
    cpu: &Cpu,
    insn: &Instruction,
    form: &Form,
    size: usize,
    write: bool,
) -> Exec<u64> {
    let lin = operand::address(cpu, insn, size, write);
    if form.aligned { aligned(cpu, insn, lin, 16) } else { lin }
}

/// #GP(0) if the address is not a multiple of `align`, before anything else that is wrong with it.
pub(super) fn aligned(cpu: &Cpu, insn: &Instruction, lin: Exec<u64>, align: u64) -> Exec<u64> {
    let at = lin.unwrap_or_else(|_| {
        let segment = operand::segment(cpu, insn);
        cpu.segs[segment].base.wrapping_add(operand::offset(cpu, insn))
    });
    if at.is_multiple_of(align) { lin } else { Err(Fault::GP0) }
}

/// Loads `size` bytes (2, 4, 8 or 16) and zero-extends them.
#[inline]
pub(super) fn load(cpu: &mut Cpu, lin: u64, size: usize) -> Exec<[u64; 2]> {
    if size == 16 {
        let value = cpu.load::<u128>(lin)?;
        return Ok([value as u64, (value >> 64) as u64]);
    }
    Ok([operand::load(cpu, lin, size)?, 0])
}

#[inline(always)]
fn load_memory(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec<[u64; 2]> {
    let size = insn.memory_size().size();
    let lin = address(cpu, insn, form, size, false)?;
    load(cpu, lin, size)
}

fn xmm(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    check_sse(cpu)?;
    let src = if insn.op1_kind() == OpKind::Register {
        cpu.fx.xmm[number(insn.op1_register())]
    } else {
        load_memory(cpu, insn, form)?
    };
    let index = number(insn.op0_register());
    let mut dst = cpu.fx.xmm[index];
    let entry = entry_of(form, insn);
    if form.mxcsr {
        let first = dst;
        let on_the_way =
            |control| form.dot && dot_underflows(form, insn.immediate8(), control, &first, &src);
        // SAFETY: the forms of this kind are those that `call_xmm` is for.
        let run = || unsafe {
            stubs::call_xmm(entry, &mut dst, &src);
            dst
        };
        run_arithmetic(cpu, form, run, on_the_way)?;
    } else {
        // SAFETY: as above.
        unsafe { stubs::call_xmm(entry, &mut dst, &src) };
    }
    cpu.fx.xmm[index] = dst;
    Ok(())
}

/// Runs `f` under the guest's MXCSR; `f` gives the result that may be denormal, `on_the_way` says under the MXCSR that it
/// is given whether something was that is no result. #XM (or #UD without OSXMMEXCPT) if an exception that the guest has
/// unmasked is raised: nothing but MXCSR's flags has changed then.
fn run_arithmetic(
    cpu: &mut Cpu,
    form: &Form,
    f: impl FnOnce() -> [u64; 2],
    on_the_way: impl FnOnce(u32) -> bool,
) -> Exec {
    const IE_DE_ZE: u32 = 7;
    const UE: u32 = 1 << 4;
    const UM: u32 = 1 << 11;
    const FTZ: u32 = 1 << 15;
    let guest = cpu.fx.mxcsr;
    let mut result = [0; 2];
    if cpu.mxcsr_plain() {
        cpu.fx.mxcsr |= stubs::with_mxcsr(guest, || result = f());
        return Ok(());
    }
    // Results are flushed to zero where underflow is masked only.
    let flush = if guest & UM != 0 { FTZ } else { 0 };
    let control = guest & !stubs::MXCSR_FLAGS & !(FTZ ^ flush);
    let mut raised = stubs::with_mxcsr(control, || result = f());
    let unmasked = !(guest >> 7) & stubs::MXCSR_FLAGS;
    // Unmasked, a tiny result is an underflow even if it is exact (SDM volume 1, 4.9.1.5).
    if unmasked & UE != 0 && (any_denormal(form, result) || on_the_way(control)) {
        raised |= UE;
    }
    if raised & unmasked == 0 {
        cpu.fx.mxcsr |= raised;
        return Ok(());
    }
    // What is found before computing keeps the computing, and its exceptions, from happening.
    if raised & unmasked & IE_DE_ZE != 0 {
        raised &= IE_DE_ZE;
    }
    cpu.fx.mxcsr |= raised;
    let enabled = cpu.cr4 & cr::CR4_OSXMMEXCPT != 0;
    Err(Fault::new(if enabled { vector::XM } else { vector::UD }))
}

/// Whether DPPS or DPPD computes a denormal product or sum. The products come from a multiplication, as adding them to
/// nothing would lose them where denormals are taken for zero; the sums from the same instruction, which is told by its
/// immediate what to add.
fn dot_underflows(
    form: &Form,
    immediate: u8,
    control: u32,
    dst: &[u64; 2],
    src: &[u64; 2],
) -> bool {
    let double = form.underflow == 8;
    let lanes = [0, 1].map(|i| match double {
        true => (immediate >> (4 + i) & 1).into(),
        false => {
            u64::from(immediate >> (4 + 2 * i) & 1) | u64::from(immediate >> (5 + 2 * i) & 1) << 32
        }
    });
    let mask =
        lanes.map(|lane: u64| lane.wrapping_mul(if double { u64::MAX } else { 0xffff_ffff }));
    let chosen = |value: &[u64; 2]| [value[0] & mask[0], value[1] & mask[1]];
    let (mut products, factors) = (chosen(dst), chosen(src));
    let code = if double { Code::Mulpd_xmm_xmmm128 } else { Code::Mulps_xmm_xmmm128 };
    // SAFETY: MULPD's or MULPS's stub is one that `call_xmm` is for.
    stubs::with_mxcsr(control, || unsafe {
        stubs::call_xmm(sse_forms::of(code).entry, &mut products, &factors);
    });
    let one = Form { elements: 1, ..*form };
    any_denormal(form, products)
        || [0x30, 0xc0, 0xf0].iter().any(|part| {
            let part = usize::from(immediate & part | 1);
            let mut sum = *dst;
            // SAFETY: the stub of DPPS or DPPD with another immediate.
            stubs::with_mxcsr(control, || unsafe {
                stubs::call_xmm(form.entry + part * 8, &mut sum, src);
            });
            any_denormal(&one, sum)
        })
}

fn any_denormal(form: &Form, result: [u64; 2]) -> bool {
    let bits = |i: u8| match form.underflow {
        4 => u64::from((result[usize::from(i / 2)] >> (32 * (i % 2)) as u32) as u32) << 32,
        _ => result[usize::from(i & 1)],
    };
    let (exponent, fraction): (u64, u64) = match form.underflow {
        4 => (0x7f80_0000 << 32, 0x007f_ffff << 32),
        8 => (0x7ff << 52, (1 << 52) - 1),
        _ => return false,
    };
    (0..form.elements).any(|i| bits(i) & exponent == 0 && bits(i) & fraction != 0)
}

/// PSLLW and so on by an immediate: an XMM or MM register.
fn shift_immediate(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    let count = u64::from(insn.immediate8());
    if form.class[0] == Class::Xmm {
        check_sse(cpu)?;
        let dst = &mut cpu.fx.xmm[number(insn.op0_register())];
        // SAFETY: the stub is that of the shift of XMM1 by XMM2.
        unsafe { stubs::call_xmm(form.entry, dst, &[count, 0]) };
        return Ok(());
    }
    mmx::check(cpu)?;
    let index = mmx::number(insn.op0_register());
    let mut frame = Frame { mm: [mmx::get(cpu, index), count], ..Frame::default() };
    // SAFETY: the stub is that of the shift of MM1 by MM2.
    unsafe { stubs::call_mmx(form.entry, &mut frame) };
    mmx::enter(cpu);
    mmx::set(cpu, index, frame.mm[0]);
    Ok(())
}

/// Where an operand of class `class` lies in a frame: slot 1 is what ModRM.reg names, slot 2 what ModRM.rm names.
fn put(frame: &mut Frame, class: Class, slot: usize, value: [u64; 2]) {
    match class {
        Class::Xmm => frame.xmm[slot] = value,
        Class::Mm => frame.mm[slot - 1] = value[0],
        Class::Gpr => frame.gpr[slot] = value[0],
    }
}

fn take(frame: &Frame, class: Class, slot: usize) -> [u64; 2] {
    match class {
        Class::Xmm => frame.xmm[slot],
        Class::Mm => [frame.mm[slot - 1], 0],
        Class::Gpr => [frame.gpr[slot], 0],
    }
}

fn register(cpu: &Cpu, class: Class, register: Register) -> [u64; 2] {
    match class {
        Class::Xmm => cpu.fx.xmm[number(register)],
        Class::Mm => [mmx::get(cpu, mmx::number(register)), 0],
        Class::Gpr => [operand::gpr(cpu, register), 0],
    }
}

fn set_register(cpu: &mut Cpu, class: Class, register: Register, value: [u64; 2]) {
    match class {
        Class::Xmm => cpu.fx.xmm[number(register)] = value,
        Class::Mm => mmx::set(cpu, mmx::number(register), value[0]),
        Class::Gpr => operand::set_gpr(cpu, register, value[0]),
    }
}

/// Puts both operands into a frame.
fn gather(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec<Frame> {
    let mut frame = Frame::default();
    frame.gpr[0] = cpu.regs[reg::RAX];
    frame.gpr[2] = cpu.regs[reg::RDX];
    if form.implicit == Implicit::Xmm0 {
        frame.xmm[0] = cpu.fx.xmm[0];
    }
    let slots = if form.to_rm { [2, 1] } else { [1, 2] };
    for (i, (class, slot)) in (0..).zip(form.class.into_iter().zip(slots)) {
        let value = match insn.op_kind(i) {
            OpKind::Register => register(cpu, class, insn.op_register(i)),
            _ if i == 0 => continue,
            _ => load_memory(cpu, insn, form)?,
        };
        put(&mut frame, class, slot, value);
    }
    Ok(frame)
}

/// Writes the results in a frame back.
fn scatter(cpu: &mut Cpu, insn: &Instruction, form: &Form, frame: &Frame) -> Exec {
    let value = take(frame, form.class[0], if form.to_rm { 2 } else { 1 });
    if insn.op0_kind() == OpKind::Register {
        set_register(cpu, form.class[0], insn.op0_register(), value);
    } else {
        operand::store_operand(cpu, insn, insn.memory_size().size(), value[0])?;
    }
    match form.implicit {
        Implicit::Index => cpu.regs[reg::RCX] = frame.gpr[1],
        Implicit::Mask => cpu.fx.xmm[0] = frame.xmm[0],
        Implicit::None | Implicit::Xmm0 => {}
    }
    if form.flags {
        cpu.set_status_flags(frame.flags);
    }
    Ok(())
}

fn mixed(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    check_sse(cpu)?;
    let mut frame = gather(cpu, insn, form)?;
    let mut entry = entry_of(form, insn);
    if insn.code() == Code::Insertps_xmm_xmmm32_imm8 && insn.op1_kind() != OpKind::Register {
        // The source's number of the element, bits 7:6, counts for a register only.
        entry = form.entry + usize::from(insn.immediate8() & 0x3f) * 8;
    }
    if form.mxcsr {
        let frame = &mut frame;
        // SAFETY: the forms of this kind have no MMX operand.
        let run = || unsafe {
            stubs::call(entry, frame);
            frame.xmm[1]
        };
        run_arithmetic(cpu, form, run, |_| false)?;
    } else {
        // SAFETY: as above.
        unsafe { stubs::call(entry, &mut frame) };
    }
    scatter(cpu, insn, form, &frame)
}

fn mmx_form(cpu: &mut Cpu, insn: &Instruction, form: &Form) -> Exec {
    if form.osfxsr {
        check_sse(cpu)?;
    }
    // CVTPI2PS and CVTPI2PD with a memory operand have nothing to do with MM registers.
    let from_memory = form.class[0] == Class::Xmm && insn.op1_kind() != OpKind::Register;
    if !from_memory {
        mmx::check(cpu)?;
    }
    let mut frame = gather(cpu, insn, form)?;
    let entry = entry_of(form, insn);
    if form.mxcsr {
        let frame = &mut frame;
        // SAFETY: any SSE or MMX stub may be called so.
        let run = || unsafe {
            stubs::call_mmx(entry, frame);
            frame.xmm[1]
        };
        run_arithmetic(cpu, form, run, |_| false)?;
    } else {
        // SAFETY: as above.
        unsafe { stubs::call_mmx(entry, &mut frame) };
    }
    let x87 = (cpu.fx.fsw, cpu.fx.ftw, cpu.fx.st);
    if !from_memory {
        mmx::enter(cpu);
    }
    scatter(cpu, insn, form, &frame).inspect_err(|_| {
        // The store faulted: there was no instruction.
        (cpu.fx.fsw, cpu.fx.ftw, cpu.fx.st) = x87;
    })
}

fn ldmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    check_sse(cpu)?;
    let value = operand::load_operand(cpu, insn, 4)? as u32;
    if value & !cpu.fx.mxcsr_mask != 0 {
        return Err(Fault::GP0);
    }
    cpu.fx.mxcsr = value;
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    check_sse(cpu)?;
    operand::store_operand(cpu, insn, 4, cpu.fx.mxcsr.into())
}
