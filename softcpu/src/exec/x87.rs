//! x87 floating point: everything that computes, loads or stores runs on the host's x87 with the guest's state.
//!
//! ```text
//!   checks (#NM, #MF) -> memory operand -> FXRSTOR, the instruction, FXSAVE -> store -> commit
//! ```
//!
//! The guest's control word is in force meanwhile, so unmasked exceptions have exactly the host's effect: the
//! instruction leaves what the manual says and sets ES, and the next waiting instruction is #MF here.
//!
//! Where CR0.NE is clear, a pending exception would be told to the interrupt controller (FERR#) and the processor
//! would wait. Here it goes on as if IGNNE# were asserted. CS and DS of the last instruction are not kept, as
//! CPUID.(7,0):EBX bit 13 lets a processor do.

use std::sync::LazyLock;

use iced_x86::{
    Code, EncodingKind, Instruction, Mnemonic, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind,
    Register,
};

use super::stubs::{self, Entry, X87Image};
use super::{operand, x87_env, xsave};
use crate::fault::{Exec, Fault, vector};
use crate::host;
use crate::state::{Cpu, FxState, cr, seg};

/// The six exception flags of the status word, and masks of the control word.
const EXCEPTIONS: u16 = 0x3f;
/// ES and B of the status word.
const SUMMARY: u16 = 0x8080;

#[derive(Debug, Clone, Copy)]
enum Form {
    /// Not x87.
    None,
    /// ST registers only. The first byte, ModRM without the register's number, the operand that has the number.
    Registers { first: u8, modrm: u8, operand: Option<u32> },
    /// A memory operand that is read.
    Load { entry: Entry, size: usize },
    /// A memory operand that is written.
    Store { entry: Entry, size: usize },
    /// What manages the state.
    Control,
}

static FORMS: LazyLock<Vec<Form>> = LazyLock::new(|| Code::values().map(form).collect());

fn of(code: Code) -> Form {
    FORMS.get(code as usize).copied().unwrap_or(Form::None)
}

/// The instruction is one that [`execute`] executes.
pub(super) fn is_x87(code: Code) -> bool {
    !matches!(of(code), Form::None)
}

fn form(code: Code) -> Form {
    use Mnemonic as M;
    let info = code.op_code();
    if code == Code::Wait {
        return Form::Control;
    }
    let first = info.op_code() >> (8 * (info.op_code_len() - 1));
    let ours = code.encoding() == EncodingKind::Legacy
        && info.is_instruction()
        && info.table() == OpCodeTableKind::Normal
        && (0xd8..=0xdf).contains(&first);
    if !ours {
        return Form::None;
    }
    match code.mnemonic() {
        M::Fldenv
        | M::Frstor
        | M::Fldcw
        | M::Fnstenv
        | M::Fnsave
        | M::Fnstcw
        | M::Fnstsw
        | M::Fnclex
        | M::Fninit
        | M::Fneni
        | M::Fndisi
        | M::Fnsetpm => Form::Control,
        // Of other times and makers, or FWAIT with the instruction after it.
        M::Frstpm
        | M::Fstdw
        | M::Fstsg
        | M::Fnstdw
        | M::Fnstsg
        | M::Fstenv
        | M::Fsave
        | M::Fstcw
        | M::Fstsw
        | M::Fclex
        | M::Finit
        | M::Feni
        | M::Fdisi
        | M::Fsetpm => Form::None,
        _ if code.cpuid_features().iter().any(|f| format!("{f:?}").contains("CYRIX")) => Form::None,
        _ => computing(info, first as u8),
    }
}

fn computing(info: &OpCodeInfo, first: u8) -> Form {
    if info.op_code_len() == 2 {
        let operand =
            (0..info.op_count()).find(|i| info.op_kind(*i) == OpCodeOperandKind::sti_opcode);
        return Form::Registers { first, modrm: info.op_code() as u8, operand };
    }
    let group = info.group_index() as u8;
    let (entry, size) = (stubs::x87_memory(first, group), info.memory_size().size());
    let stores = match first {
        0xd9 => matches!(group, 2 | 3),
        0xdb => matches!(group, 1..=3 | 7),
        0xdd => matches!(group, 1..=3),
        0xdf => matches!(group, 1..=3 | 6 | 7),
        _ => false,
    };
    if stores { Form::Store { entry, size } } else { Form::Load { entry, size } }
}

/// An exception that the control word does not mask waits to be told.
fn pending(fx: &FxState) -> bool {
    fx.fsw & !fx.fcw & EXCEPTIONS != 0
}

/// Makes ES and B what the flags and masks say.
pub(super) fn summarize(fx: &mut FxState) {
    if pending(fx) {
        fx.fsw |= SUMMARY;
    } else {
        fx.fsw &= !SUMMARY;
    }
}

/// #MF if an exception is pending.
pub(super) fn check_pending(cpu: &Cpu) -> Exec {
    if pending(&cpu.fx) && cpu.cr0 & cr::CR0_NE != 0 {
        return Err(Fault::new(vector::MF));
    }
    Ok(())
}

/// Executes an x87 instruction.
pub(super) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if insn.code() == Code::Wait {
        if cpu.cr0 & (cr::CR0_MP | cr::CR0_TS) == cr::CR0_MP | cr::CR0_TS {
            return Err(Fault::NM);
        }
        return check_pending(cpu);
    }
    if cpu.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
        return Err(Fault::NM);
    }
    match of(insn.code()) {
        Form::Registers { first, modrm, operand } => {
            check_pending(cpu)?;
            registers(cpu, insn, first, modrm | number(insn, operand))
        }
        Form::Load { entry, size } => {
            check_pending(cpu)?;
            let lin = operand::address(cpu, insn, size, false)?;
            let mut memory = [0; 16];
            load(cpu, lin, &mut memory[..size])?;
            let (image, _) = run(cpu, entry, &mut memory);
            let data = operand::offset(cpu, insn);
            commit(cpu, &image, Some(data));
            Ok(())
        }
        Form::Store { entry, size } => {
            check_pending(cpu)?;
            store_form(cpu, insn, entry, size)
        }
        Form::Control => control(cpu, insn),
        Form::None => Err(Fault::UD),
    }
}

/// The number of the ST register that operand `i` is.
fn number(insn: &Instruction, i: Option<u32>) -> u8 {
    let Some(i) = i else { return 0 };
    (insn.op_register(i) as usize).wrapping_sub(Register::ST0 as usize) as u8 & 7
}

fn registers(cpu: &mut Cpu, insn: &Instruction, first: u8, modrm: u8) -> Exec {
    let (image, flags) = run(cpu, stubs::x87_register(first, modrm), &mut [0; 16]);
    commit(cpu, &image, None);
    let compares = matches!(
        insn.mnemonic(),
        Mnemonic::Fcomi | Mnemonic::Fcomip | Mnemonic::Fucomi | Mnemonic::Fucomip
    );
    if compares {
        cpu.set_status_flags(flags);
    }
    Ok(())
}

fn store_form(cpu: &mut Cpu, insn: &Instruction, entry: Entry, size: usize) -> Exec {
    let lin = operand::address(cpu, insn, size, true)?;
    let mut memory = [0; 16];
    let (image, _) = run(cpu, entry, &mut memory);
    let (fcw, fsw) = (word(&image.head, 0), word(&image.head, 2));
    // An unmasked exception other than precision leaves memory alone (SDM volume 1, 8.5).
    if fsw & !fcw & 0x1f == 0 {
        store(cpu, lin, &memory[..size])?;
    } else {
        xsave::probe(cpu, lin, size, true)?;
    }
    let data = operand::offset(cpu, insn);
    commit(cpu, &image, Some(data));
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Runs a stub on the guest's x87 state; gives the state afterwards and RFLAGS.
fn run(cpu: &Cpu, entry: Entry, memory: &mut [u8; 16]) -> (X87Image, u64) {
    let fx = &cpu.fx;
    let mut image = X87Image { head: [0; 32], st: fx.st, rest: [0; 352] };
    // An exception that is pending but may not be told (CR0.NE) must not be raised here.
    let fcw = if pending(fx) { fx.fcw | EXCEPTIONS } else { fx.fcw };
    image.head[0..2].copy_from_slice(&fcw.to_le_bytes());
    image.head[2..4].copy_from_slice(&(fx.fsw & !SUMMARY).to_le_bytes());
    image.head[4] = fx.ftw;
    image.head[24..28].copy_from_slice(&stubs::MXCSR_DEFAULT.to_le_bytes());
    // SAFETY: `entry` is an x87 stub (the forms hold no other), whose memory operand is 10 bytes at most; no
    // unmasked exception is pending in the image.
    let flags = unsafe { stubs::call_x87(entry, &mut image, memory, cpu.status_flags()) };
    (image, flags)
}

/// Takes over the state after an instruction; `data` is the offset of its memory operand.
fn commit(cpu: &mut Cpu, image: &X87Image, data: Option<u64>) {
    let ignored = pending(&cpu.fx);
    let fx = &mut cpu.fx;
    fx.fsw = word(&image.head, 2);
    fx.ftw = image.head[4];
    fx.st = image.st;
    fx.fip = cpu.rip;
    if let Some(data) = data {
        fx.fdp = data;
    }
    if ignored {
        summarize(fx);
    } else if fx.fsw & SUMMARY != 0 {
        cpu.fx.fop = opcode(cpu).unwrap_or(0);
    }
}

/// The current instruction's FOP: the low three bits of its first byte, and ModRM (SDM volume 1, 8.1.9). The decoder
/// does not keep ModRM, so the bytes are fetched again; it is for unmasked exceptions only.
fn opcode(cpu: &mut Cpu) -> Option<u16> {
    let mut bytes = [0; 15];
    let start = cpu.segs[seg::CS].base.wrapping_add(cpu.rip);
    let lin = if cpu.mode.bits == 64 { cpu.rip } else { start & 0xffff_ffff };
    let (n, _) = cpu.fetch(lin, &mut bytes).ok()?;
    let (first, rest) = bytes.split_at(n);
    if !rest.is_empty() {
        let next = cpu.linear_plus(lin, n as u64);
        let mut more = [0; 15];
        let (m, _) = cpu.fetch(next, &mut more[..rest.len()]).unwrap_or((0, 0));
        let mut all = first.to_vec();
        all.extend_from_slice(&more[..m]);
        bytes[..all.len()].copy_from_slice(&all);
    }
    let at = bytes.iter().position(|b| (0xd8..=0xdf).contains(b))?;
    let modrm = bytes.get(at + 1)?;
    Some(u16::from(bytes[at] & 7) << 8 | u16::from(*modrm))
}

/// Reads memory that need not be the size of an integer.
pub(super) fn load(cpu: &mut Cpu, lin: u64, buf: &mut [u8]) -> Exec {
    if let Some(at) = cpu.fast(lin, buf.len() as u64, false) {
        // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory.
        unsafe { host::copy_from_guest(at, buf) };
        return Ok(());
    }
    cpu.read_lin(lin, buf, cpu.access(false))
}

/// Writes memory that need not be the size of an integer: all of it, or a fault.
pub(super) fn store(cpu: &mut Cpu, lin: u64, buf: &[u8]) -> Exec {
    if let Some(at) = cpu.fast(lin, buf.len() as u64, true) {
        // SAFETY: a TLB hit: the bytes lie in one page of mapped guest memory that may be written.
        unsafe { host::copy_to_guest(at, buf) };
        return Ok(());
    }
    cpu.write_lin(lin, buf, cpu.access(true))
}

/// The instructions that manage the state rather than compute.
fn control(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    match insn.mnemonic() {
        Mnemonic::Fninit => x87_env::init(&mut cpu.fx),
        Mnemonic::Fnclex => cpu.fx.fsw &= !(SUMMARY | EXCEPTIONS | 0x40),
        Mnemonic::Fnstcw => operand::store_operand(cpu, insn, 2, cpu.fx.fcw.into())?,
        Mnemonic::Fnstsw => operand::write(cpu, insn, 0, cpu.fx.fsw.into())?,
        Mnemonic::Fldcw => {
            check_pending(cpu)?;
            cpu.fx.fcw = x87_env::control_word(operand::load_operand(cpu, insn, 2)? as u16);
            summarize(&mut cpu.fx);
        }
        Mnemonic::Fnstenv => x87_env::store_environment(cpu, insn)?,
        Mnemonic::Fnsave => x87_env::save(cpu, insn)?,
        Mnemonic::Fldenv => {
            check_pending(cpu)?;
            x87_env::load_environment(cpu, insn)?;
        }
        Mnemonic::Frstor => {
            check_pending(cpu)?;
            x87_env::restore(cpu, insn)?;
        }
        // FNENI, FNDISI and FNSETPM do nothing since the 80387.
        _ => {}
    }
    Ok(())
}
