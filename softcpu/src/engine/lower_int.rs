//! From decoded integer instructions to operations.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::atomic_ops as atomic;
use super::handlers::{kinds, sized};
use super::int_ops::{self as int, ADC, ADD, AND, CMP, OR, SBB, SUB, XOR};
use super::lower::{Lowering, address_size, cut, operand, size_of_operand};
use super::op::{Handler, Op};

impl Lowering {
    pub(super) fn emit_sized(&mut self, f: Handler) -> Option<()> {
        self.emit(self.op(f))
    }

    /// Two operands of one size, `f` by form: rr, ri, rm, mr, mi.
    pub(super) fn two(
        &mut self,
        insn: &Instruction,
        size: u8,
        f: [Handler; 5],
        write: bool,
    ) -> Option<()> {
        use OpKind::{Memory, Register as Reg};
        let (first, second) = (insn.op0_kind(), insn.op1_kind());
        let form = match (first, second) {
            (Reg, Reg) => 0,
            (Reg, Memory) => 2,
            (Memory, Reg) => 3,
            (Reg, _) => 1,
            (Memory, _) => 4,
            _ => return None,
        };
        let mut op = self.op(f[form]);
        if first == Reg {
            op.dst = operand(insn.op0_register(), size)?;
        }
        if second == Reg {
            op.src = operand(insn.op1_register(), size)?;
        }
        if matches!(form, 1 | 4) {
            op.imm = cut(insn.try_immediate(1).ok()?, size);
        }
        if form >= 2 {
            self.memory(&mut op, insn, size, write && first == Memory)?;
        }
        self.emit(op)
    }

    pub(super) fn alu(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        let f = [
            kinds!(kind, z, int::alu_rr, [0 1 2 3 4 5 6 7 8]),
            kinds!(kind, z, int::alu_ri, [0 1 2 3 4 5 6 7 8]),
            kinds!(kind, z, int::alu_rm, [0 1 2 3 4 5 6 7 8]),
            kinds!(kind, z, int::alu_mr, [0 1 2 3 4 5 6 7 8]),
            kinds!(kind, z, int::alu_mi, [0 1 2 3 4 5 6 7 8]),
        ];
        self.two(insn, z, f, kind < CMP)
    }

    pub(super) fn mov(&mut self, insn: &Instruction) -> Option<()> {
        for i in 0..2 {
            if insn.op_kind(i) == OpKind::Register && !insn.op_register(i).is_gpr() {
                return None;
            }
        }
        let z = size_of_operand(insn, 0)?;
        let f = [
            sized!(z, int::mov_rr),
            sized!(z, int::mov_ri),
            sized!(z, int::mov_rm),
            sized!(z, int::mov_mr),
            sized!(z, int::mov_mi),
        ];
        self.two(insn, z, f, true)
    }

    pub(super) fn extend(&mut self, insn: &Instruction) -> Option<()> {
        let (from, to) = (size_of_operand(insn, 1)?, size_of_operand(insn, 0)?);
        let signed = insn.mnemonic() != M::Movzx;
        let memory = insn.op1_kind() == OpKind::Memory;
        let f: Handler = match (signed, memory, from) {
            (false, false, 1) => sized!(to, int::movzx_r, 1),
            (false, false, _) => sized!(to, int::movzx_r, 2),
            (false, true, 1) => sized!(to, int::movzx_m, 1),
            (false, true, _) => sized!(to, int::movzx_m, 2),
            (true, false, 1) => sized!(to, int::movsx_r, 1),
            (true, false, 2) => sized!(to, int::movsx_r, 2),
            (true, false, _) => sized!(to, int::movsx_r, 4),
            (true, true, 1) => sized!(to, int::movsx_m, 1),
            (true, true, 2) => sized!(to, int::movsx_m, 2),
            (true, true, _) => sized!(to, int::movsx_m, 4),
        };
        let mut op = self.op(f);
        op.dst = operand(insn.op0_register(), to)?;
        if memory {
            self.memory(&mut op, insn, from, false)?;
        } else {
            op.src = operand(insn.op1_register(), from)?;
        }
        self.emit(op)
    }

    pub(super) fn lea(&mut self, insn: &Instruction) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        let address = address_size(insn);
        let f = match address {
            8 => sized!(z, int::lea),
            4 => sized!(z, int::lea_short, 4),
            _ => sized!(z, int::lea_short, 2),
        };
        let mut op = self.op(f);
        op.dst = operand(insn.op0_register(), z)?;
        self.plain_address(&mut op, insn)?;
        self.emit(op)
    }

    pub(super) fn shift(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
        if insn.op0_kind() != OpKind::Register {
            return None;
        }
        let z = size_of_operand(insn, 0)?;
        let dst = operand(insn.op0_register(), z)?;
        if insn.op1_kind() == OpKind::Register {
            if z < 4 {
                return None;
            }
            let f = kinds!(kind, z, int::shift_rc, [0 1 2 3 4]);
            return self.emit(Op { dst, ..self.op(f) });
        }
        let count = insn.try_immediate(1).ok()? & if z == 8 { 63 } else { 31 };
        if count == 0 || count >= 8 * u64::from(z) {
            return None;
        }
        let f = kinds!(kind, z, int::shift_ri, [0 1 2 3 4]);
        self.emit(Op { dst, imm: count, ..self.op(f) })
    }

    pub(super) fn unary(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        if insn.op0_kind() == OpKind::Register {
            let f = kinds!(kind, z, int::un_r, [0 1 2 3]);
            return self.emit(Op { dst: operand(insn.op0_register(), z)?, ..self.op(f) });
        }
        let mut op = self.op(kinds!(kind, z, int::un_m, [0 1 2 3]));
        self.memory(&mut op, insn, z, true)?;
        self.emit(op)
    }

    pub(super) fn imul(&mut self, insn: &Instruction) -> Option<()> {
        if insn.op_count() == 1 {
            return self.mul(insn, 1);
        }
        let z = size_of_operand(insn, 0)?;
        let memory = insn.op1_kind() == OpKind::Memory;
        let f = match (insn.op_count(), memory) {
            (3, false) => sized!(z, int::imul_rri),
            (3, true) => sized!(z, int::imul_rmi),
            (_, false) => sized!(z, int::imul_rr),
            (_, true) => sized!(z, int::imul_rm),
        };
        let mut op = self.op(f);
        op.dst = operand(insn.op0_register(), z)?;
        if insn.op_count() == 3 {
            op.imm = cut(insn.try_immediate(2).ok()?, z);
        }
        if memory {
            self.memory(&mut op, insn, z, false)?;
        } else {
            op.src = operand(insn.op1_register(), z)?;
        }
        self.emit(op)
    }

    pub(super) fn mul(&mut self, insn: &Instruction, signed: u8) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        if z < 4 {
            return None;
        }
        let f: [Handler; 2] = match (z, signed) {
            (4, 0) => [int::mul_r::<0, 4>, int::mul_m::<0, 4>],
            (4, _) => [int::mul_r::<1, 4>, int::mul_m::<1, 4>],
            (_, 0) => [int::mul_r::<0, 8>, int::mul_m::<0, 8>],
            (_, _) => [int::mul_r::<1, 8>, int::mul_m::<1, 8>],
        };
        self.one_source(insn, z, f)
    }

    pub(super) fn div(&mut self, insn: &Instruction) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        let f: [Handler; 2] = match z {
            4 => [int::div_r::<4>, int::div_m::<4>],
            8 => [int::div_r::<8>, int::div_m::<8>],
            _ => return None,
        };
        self.one_source(insn, z, f)
    }

    pub(super) fn one_source(&mut self, insn: &Instruction, z: u8, f: [Handler; 2]) -> Option<()> {
        if insn.op0_kind() == OpKind::Register {
            return self.emit(Op { src: operand(insn.op0_register(), z)?, ..self.op(f[0]) });
        }
        let mut op = self.op(f[1]);
        self.memory(&mut op, insn, z, false)?;
        self.emit(op)
    }

    pub(super) fn bt(&mut self, insn: &Instruction) -> Option<()> {
        if insn.op0_kind() != OpKind::Register {
            return None;
        }
        let z = size_of_operand(insn, 0)?;
        let dst = operand(insn.op0_register(), z)?;
        if insn.op1_kind() == OpKind::Register {
            let src = operand(insn.op1_register(), z)?;
            return self.emit(Op { dst, src, ..self.op(sized!(z, int::bt_rr)) });
        }
        let imm = insn.try_immediate(1).ok()? & (8 * u64::from(z) - 1);
        self.emit(Op { dst, imm, ..self.op(sized!(z, int::bt_ri)) })
    }

    pub(super) fn xchg(&mut self, insn: &Instruction) -> Option<()> {
        if insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
            return self.exchange(insn);
        }
        let z = size_of_operand(insn, 0)?;
        let dst = operand(insn.op0_register(), z)?;
        let src = operand(insn.op1_register(), z)?;
        self.emit(Op { dst, src, ..self.op(sized!(z, int::xchg_rr)) })
    }

    /// XCHG, XADD and CMPXCHG of memory with a register.
    pub(super) fn exchange(&mut self, insn: &Instruction) -> Option<()> {
        let register = match (insn.op0_kind(), insn.op1_kind()) {
            (OpKind::Memory, OpKind::Register) => 1,
            (OpKind::Register, OpKind::Memory) => 0,
            _ => return None,
        };
        let z = size_of_operand(insn, register)?;
        let f = match insn.mnemonic() {
            M::Xchg => sized!(z, atomic::xchg_mr),
            M::Xadd => sized!(z, atomic::xadd_mr),
            _ => sized!(z, atomic::cmpxchg_mr),
        };
        let mut op = self.op(f);
        op.src = operand(insn.op_register(register), z)?;
        self.memory(&mut op, insn, z, true)?;
        self.emit(op)
    }

    /// Instructions with a LOCK prefix; those that must not have one are left to the reference interpreter.
    pub(super) fn locked(&mut self, insn: &Instruction) -> Option<()> {
        let alu = match insn.mnemonic() {
            M::Add => ADD,
            M::Or => OR,
            M::Adc => ADC,
            M::Sbb => SBB,
            M::And => AND,
            M::Sub => SUB,
            M::Xor => XOR,
            M::Xchg | M::Xadd | M::Cmpxchg => return self.exchange(insn),
            M::Not => return self.locked_unary(insn, int::NOT),
            M::Neg => return self.locked_unary(insn, int::NEG),
            M::Inc => return self.locked_unary(insn, int::INC),
            M::Dec => return self.locked_unary(insn, int::DEC),
            _ => return None,
        };
        if insn.op0_kind() != OpKind::Memory {
            return None;
        }
        let z = size_of_operand(insn, 0)?;
        let mut op = if insn.op1_kind() == OpKind::Register {
            let src = operand(insn.op1_register(), z)?;
            let f = kinds!(alu, z, atomic::lock_alu_mr, [0 1 2 3 4 5 6]);
            Op { src, ..self.op(f) }
        } else {
            let imm = cut(insn.try_immediate(1).ok()?, z);
            let f = kinds!(alu, z, atomic::lock_alu_mi, [0 1 2 3 4 5 6]);
            Op { imm, ..self.op(f) }
        };
        self.memory(&mut op, insn, z, true)?;
        self.emit(op)
    }

    pub(super) fn locked_unary(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
        if insn.op0_kind() != OpKind::Memory {
            return None;
        }
        let z = size_of_operand(insn, 0)?;
        let mut op = self.op(kinds!(kind, z, atomic::lock_un_m, [0 1 2 3]));
        self.memory(&mut op, insn, z, true)?;
        self.emit(op)
    }

    pub(super) fn bswap(&mut self, insn: &Instruction) -> Option<()> {
        let f: Handler = match size_of_operand(insn, 0)? {
            8 => int::bswap::<8>,
            4 => int::bswap::<4>,
            _ => return None,
        };
        self.emit(Op { dst: insn.op0_register().number() as u8, ..self.op(f) })
    }

    pub(super) fn stack(&mut self, insn: &Instruction) -> Option<()> {
        match insn.code() {
            Code::Push_r64 => {
                let src = insn.op0_register().number() as u8;
                self.emit(Op { src, ..self.op(int::push_r) })
            }
            Code::Pushq_imm8 | Code::Pushq_imm32 => {
                let imm = insn.try_immediate(0).ok()?;
                self.emit(Op { imm, ..self.op(int::push_i) })
            }
            Code::Push_rm64 if insn.op0_kind() == OpKind::Memory => {
                let mut op = self.op(int::push_m);
                self.memory(&mut op, insn, 8, false)?;
                self.emit(op)
            }
            Code::Pop_r64 => {
                let dst = insn.op0_register().number() as u8;
                self.emit(Op { dst, ..self.op(int::pop_r) })
            }
            Code::Leaveq => self.emit_sized(int::leave),
            _ => None,
        }
    }
}
