//! The reference interpreter: executes any one instruction, in every mode.
//!
//! [`execute`] is the truth about each instruction; faster paths fall back on it whenever something is out of the
//! ordinary (a fault, a device, a page crossing).
//!
//! | module | subject |
//! | --- | --- |
//! | `operand` | registers, effective addresses, sized loads and stores |
//! | `int`, `shift`, `muldiv`, `bits` | integer arithmetic |
//! | `flow`, `stack`, `eflags` | near control flow, the stack, RFLAGS |
//! | `seg` | descriptors and segment registers |
//! | `far`, `iret`, `task`, `syscall` | far control flow, gates, task switches, fast system calls |
//! | `string`, `io` | string instructions, ports |
//! | `system`, `control` | system instructions, control and debug registers |
//! | `step` | one instruction at RIP: fetch, decode, execute |
//! | `sse`, `mmx`, `x87`, `xsave` | vectors and floating point, on the host's own instructions (`stubs`) |

pub mod bits;
pub mod control;
pub mod eflags;
pub mod far;
pub mod flow;
pub mod int;
pub mod io;
pub mod iret;
mod mmx;
pub mod muldiv;
pub mod operand;
pub mod seg;
pub mod shift;
pub mod sse;
pub(crate) mod sse_forms;
mod sse_move;
pub mod stack;
pub mod step;
pub mod string;
pub mod stubs;
pub mod syscall;
pub mod system;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod x87;
mod x87_env;
mod xsave;

pub use step::emulate_one;

use iced_x86::{Code, Instruction, Mnemonic as M};

use crate::fault::{Exec, Fault};
use crate::state::{Cpu, seg as s};
use int::Alu;

/// Extensions that not every guest is told of; without them their instructions are something else, or #UD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Feature {
    Movbe,
    Adx,
    Bmi1,
    Lzcnt,
    Rdtscp,
    Smap,
    Invpcid,
    Clflushopt,
    Clwb,
}

/// Executes `insn`, which lies at `cpu.rip`. `cpu.next_rip` is already the address after it; branches change it. On a
/// fault the guest's state is as before, but for the elements of a string instruction that are done, and after
/// the point of a task switch from which on the new task has the fault (RIP is then the new task's).
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    // The decoder refuses LOCK where it may not be, but not every form with a register.
    if insn.has_lock_prefix() && insn.op_count() > 0 && operand::is_register(insn, 0) {
        return Err(Fault::UD);
    }
    match insn.mnemonic() {
        M::Mov => mov(cpu, insn),
        M::Add => int::alu(cpu, insn, Alu::Add),
        M::Adc => int::alu(cpu, insn, Alu::Adc),
        M::Sub => int::alu(cpu, insn, Alu::Sub),
        M::Sbb => int::alu(cpu, insn, Alu::Sbb),
        M::And => int::alu(cpu, insn, Alu::And),
        M::Or => int::alu(cpu, insn, Alu::Or),
        M::Xor => int::alu(cpu, insn, Alu::Xor),
        M::Cmp => int::compare(cpu, insn, Alu::Sub),
        M::Test => int::compare(cpu, insn, Alu::And),
        M::Inc => int::inc_dec(cpu, insn, Alu::Add),
        M::Dec => int::inc_dec(cpu, insn, Alu::Sub),
        M::Neg => int::neg(cpu, insn),
        M::Not => int::not(cpu, insn),
        M::Movzx => int::mov(cpu, insn),
        M::Movsx | M::Movsxd => int::movsx(cpu, insn),
        M::Movbe => int::movbe(cpu, insn),
        M::Bswap => int::bswap(cpu, insn),
        M::Lea => int::lea(cpu, insn),
        M::Xchg => int::xchg(cpu, insn),
        M::Xadd => int::xadd(cpu, insn),
        M::Cmpxchg => int::cmpxchg(cpu, insn),
        M::Cmpxchg8b => int::cmpxchg8b(cpu, insn),
        M::Cmpxchg16b => int::cmpxchg16b(cpu, insn),
        M::Adcx | M::Adox => int::adcx_adox(cpu, insn),
        M::Crc32 => int::crc32(cpu, insn),
        M::Xlatb => int::xlat(cpu, insn),
        M::Bound => int::bound(cpu, insn),
        M::Lahf => int::lahf(cpu),
        M::Sahf => int::sahf(cpu),
        M::Salc => int::salc(cpu),
        M::Cbw => int::extend_accumulator(cpu, 2),
        M::Cwde => int::extend_accumulator(cpu, 4),
        M::Cdqe => int::extend_accumulator(cpu, 8),
        M::Cwd => int::extend_into_rdx(cpu, 2),
        M::Cdq => int::extend_into_rdx(cpu, 4),
        M::Cqo => int::extend_into_rdx(cpu, 8),
        M::Shl | M::Shr | M::Sar | M::Sal => shift::shift(cpu, insn),
        M::Rol | M::Ror => shift::rotate(cpu, insn),
        M::Rcl | M::Rcr => shift::rotate_through_carry(cpu, insn),
        M::Shld | M::Shrd => shift::double_shift(cpu, insn),
        M::Mul => muldiv::mul(cpu, insn),
        M::Imul => muldiv::imul(cpu, insn),
        M::Div => muldiv::div(cpu, insn),
        M::Idiv => muldiv::idiv(cpu, insn),
        M::Daa | M::Das => muldiv::daa_das(cpu, insn),
        M::Aaa | M::Aas => muldiv::aaa_aas(cpu, insn),
        M::Aam => muldiv::aam(cpu, insn),
        M::Aad => muldiv::aad(cpu, insn),
        M::Bt | M::Bts | M::Btr | M::Btc => bits::bit_test(cpu, insn),
        M::Bsf => bits::scan(cpu, insn, true),
        M::Bsr => bits::scan(cpu, insn, false),
        M::Tzcnt | M::Lzcnt => bits::count_zeros(cpu, insn),
        M::Popcnt => bits::popcnt(cpu, insn),
        M::Nop | M::Pause | M::Endbr64 | M::Endbr32 | M::Reservednop => Ok(()),
        _ => control_flow(cpu, insn),
    }
}

/// Control flow, the stack and RFLAGS.
fn control_flow(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    match insn.mnemonic() {
        M::Jmp => flow::jmp(cpu, insn),
        M::Call => flow::call(cpu, insn),
        M::Ret => flow::ret(cpu, insn),
        M::Loop => flow::loop_cc(cpu, insn, None),
        M::Loope => flow::loop_cc(cpu, insn, Some(true)),
        M::Loopne => flow::loop_cc(cpu, insn, Some(false)),
        M::Jcxz | M::Jecxz | M::Jrcxz => flow::jcxz(cpu, insn),
        M::Push => stack::push(cpu, insn),
        M::Pop => stack::pop(cpu, insn),
        M::Pusha | M::Pushad => stack::pusha(cpu, insn),
        M::Popa | M::Popad => stack::popa(cpu, insn),
        M::Enter => stack::enter(cpu, insn),
        M::Leave => stack::leave(cpu, insn),
        M::Pushf | M::Pushfd | M::Pushfq => eflags::pushf(cpu, insn),
        M::Popf | M::Popfd | M::Popfq => eflags::popf(cpu, insn),
        M::Cli => eflags::cli(cpu),
        M::Sti => eflags::sti(cpu),
        M::Clc => int::set_carry(cpu, false),
        M::Stc => int::set_carry(cpu, true),
        M::Cmc => int::set_carry(cpu, !cpu.cf()),
        M::Cld => int::set_direction(cpu, false),
        M::Std => int::set_direction(cpu, true),
        M::Lds => seg::load_far_pointer(cpu, insn, s::DS),
        M::Les => seg::load_far_pointer(cpu, insn, s::ES),
        M::Lfs => seg::load_far_pointer(cpu, insn, s::FS),
        M::Lgs => seg::load_far_pointer(cpu, insn, s::GS),
        M::Lss => seg::load_far_pointer(cpu, insn, s::SS),
        M::Rdfsbase => seg::fs_gs_base(cpu, insn, s::FS, false),
        M::Rdgsbase => seg::fs_gs_base(cpu, insn, s::GS, false),
        M::Wrfsbase => seg::fs_gs_base(cpu, insn, s::FS, true),
        M::Wrgsbase => seg::fs_gs_base(cpu, insn, s::GS, true),
        _ => conditional(cpu, insn),
    }
}

/// Jcc, SETcc, CMOVcc.
fn conditional(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let code = insn.code();
    match code {
        _ if code.is_jcc_short_or_near() => flow::jcc(cpu, insn),
        _ if code >= Code::Seto_rm8 && code <= Code::Setg_rm8 => int::setcc(cpu, insn),
        _ if code >= Code::Cmovo_r16_rm16 && code <= Code::Cmovg_r64_rm64 => int::cmov(cpu, insn),
        _ => rare(cpu, insn),
    }
}

/// String, port and system instructions.
fn rare(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    string::execute(cpu, insn)
        .or_else(|| io::execute(cpu, insn))
        .or_else(|| system::execute(cpu, insn))
        .unwrap_or_else(|| sse::execute(cpu, insn))
}

/// MOV: general-purpose, or with a segment, control or debug register.
fn mov(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    match insn.code() {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            seg::mov_from_segment(cpu, insn)
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            seg::mov_to_segment(cpu, insn)
        }
        Code::Mov_r32_cr | Code::Mov_r64_cr => control::mov_from_cr(cpu, insn),
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => control::mov_to_cr(cpu, insn),
        Code::Mov_r32_dr | Code::Mov_r64_dr => control::mov_from_dr(cpu, insn),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => control::mov_to_dr(cpu, insn),
        Code::Mov_r32_tr | Code::Mov_tr_r32 => Err(Fault::UD),
        _ => int::mov(cpu, insn),
    }
}

impl Cpu {
    /// Whether CPUID tells the guest of `feature`.
    pub fn has(&self, feature: Feature) -> bool {
        let (leaf, register, bit) = match feature {
            Feature::Movbe => (1, 2, 22),
            Feature::Bmi1 => (7, 1, 3),
            Feature::Adx => (7, 1, 19),
            Feature::Lzcnt => (0x8000_0001, 2, 5),
            Feature::Rdtscp => (0x8000_0001, 3, 27),
            Feature::Smap => (7, 1, 20),
            Feature::Invpcid => (7, 1, 10),
            Feature::Clflushopt => (7, 1, 23),
            Feature::Clwb => (7, 1, 24),
        };
        self.cpuid(leaf, 0)[register] >> bit & 1 != 0
    }
}
