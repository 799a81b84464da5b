//! One instruction at CS:RIP: fetch, decode, execute.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use super::execute;
use crate::events::Shutdown;
use crate::fault::{Exec, Fault};
use crate::flags;
use crate::mem::canonical;
use crate::state::{Cpu, seg};

/// An instruction is at most this long; longer ones are #GP(0).
pub const MAX_LENGTH: usize = 15;

/// Why [`emulate_one`] could not go on.
#[derive(Debug, thiserror::Error)]
pub enum EmulateError {
    /// The instruction's exception could not be delivered.
    #[error("executing the instruction at {rip:#x}: {source}")]
    Shutdown {
        /// RIP of the instruction.
        rip: u64,
        /// What happened.
        #[source]
        source: Shutdown,
    },
}

/// Executes the instruction at CS:RIP in full: afterwards RIP is the next instruction's or, if it raised an
/// exception, the handler's.
///
/// What comes between two instructions is the caller's business: it clears [`crate::state::Inhibit::shadow`] before,
/// and afterwards, if RFLAGS.TF was set before the instruction (and it was not one that holds traps back), adds
/// [`crate::events::DR6_BS`] to [`Cpu::pending_debug`]; if that is not 0 it calls [`Cpu::debug_trap`]. A repeated string
/// instruction may be executed in parts: RIP is then still its own. After HLT [`Cpu::activity`] says so.
///
/// # Errors
/// A triple fault.
pub fn emulate_one(cpu: &mut Cpu) -> Result<(), EmulateError> {
    let rip = cpu.rip;
    match fetch_and_execute(cpu) {
        Ok(_) => Ok(()),
        Err(fault) => cpu.raise(fault).map_err(|source| EmulateError::Shutdown { rip, source }),
    }
}

/// As [`emulate_one`], but gives the fault instead of raising it, or the instruction. RIP is the instruction's after a
/// fault.
pub fn fetch_and_execute(cpu: &mut Cpu) -> Exec<Instruction> {
    let insn = fetch_and_decode(cpu)?;
    // EIP wraps; IP does not: behind FFFFh is the end of the segment.
    cpu.next_rip = match cpu.mode.bits {
        64 => insn.next_ip(),
        _ => insn.next_ip() & 0xffff_ffff,
    };
    // RF holds for one instruction. A fault pushes it set again.
    cpu.sys_flags &= !flags::RF;
    execute(cpu, &insn)?;
    cpu.rip = cpu.next_rip;
    Ok(insn)
}

/// Decodes the instruction at CS:RIP. Only the pages that its bytes lie in can fault.
pub fn fetch_and_decode(cpu: &mut Cpu) -> Exec<Instruction> {
    let mut bytes = [0; MAX_LENGTH];
    let mut have = 0;
    loop {
        let (lin, within) = fetch_address(cpu, have as u64)?;
        let room = (MAX_LENGTH - have).min(usize::try_from(within).unwrap_or(MAX_LENGTH));
        let (got, _) = cpu.fetch(lin, &mut bytes[have..have + room])?;
        have += got;
        let (insn, error) = decode(cpu, &bytes[..have]);
        match error {
            DecoderError::NoMoreBytes => {}
            // The decoder does not tell invalid from too long. What is too long has a prefix to spare, and needs
            // more bytes even without it.
            DecoderError::InvalidInstruction if have == MAX_LENGTH => {
                return match decode(cpu, &bytes[1..]).1 {
                    DecoderError::NoMoreBytes => Err(Fault::GP0),
                    _ => Ok(insn),
                };
            }
            _ => return Ok(insn),
        }
    }
}

fn decode(cpu: &Cpu, bytes: &[u8]) -> (Instruction, DecoderError) {
    let bits = cpu.mode.bits.into();
    let mut decoder = Decoder::with_ip(bits, bytes, cpu.rip, DecoderOptions::NONE);
    (decoder.decode(), decoder.last_error())
}

/// The linear address of the code byte `ahead` of RIP, and how many bytes from there the code segment has. #GP(0) if
/// it has none.
fn fetch_address(cpu: &Cpu, ahead: u64) -> Exec<(u64, u64)> {
    let offset = cpu.rip.wrapping_add(ahead);
    if cpu.mode.bits == 64 {
        return if canonical(offset) { Ok((offset, u64::MAX)) } else { Err(Fault::GP0) };
    }
    let cs = &cpu.segs[seg::CS];
    let limit = u64::from(cs.limit);
    if offset > limit {
        return Err(Fault::GP0);
    }
    Ok((cs.base.wrapping_add(offset) & 0xffff_ffff, limit - offset + 1))
}
