//! From decoded branches and conditional instructions to operations.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M, OpKind};

use super::flow_ops as flow;
use super::handlers::{conditions, sized};
use super::int_ops as int;
use super::lower::{Lowering, cut, operand, size_of_operand};
use super::op::{Handler, Op};

impl Lowering {
    pub(super) fn branch(&mut self, insn: &Instruction) -> Option<()> {
        let direct = matches!(
            insn.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        );
        if insn.mnemonic() == M::Jmp && direct && !self.short_operand(insn) {
            let to = insn.near_branch_target();
            return self.end(self.linked(flow::jmp, to, to));
        }
        if self.bits != 64 || self.short_operand(insn) {
            return None;
        }
        let back = insn.next_ip();
        match insn.code() {
            Code::Call_rel32_64 => {
                self.end(self.linked(flow::call, insn.near_branch_target(), back))
            }
            Code::Retnq => self.end(self.op(flow::ret)),
            Code::Jmp_rm64 | Code::Call_rm64 => {
                let f: [Handler; 2] = match insn.mnemonic() {
                    M::Jmp => [flow::jmp_r, flow::jmp_m],
                    _ => [flow::call_r, flow::call_m],
                };
                if insn.op0_kind() == OpKind::Register {
                    let src = insn.op0_register().number() as u8;
                    return self.end(Op { src, imm: back, ..self.op(f[0]) });
                }
                let mut op = Op { imm: back, ..self.op(f[1]) };
                self.memory(&mut op, insn, 8, false)?;
                self.end(op)
            }
            _ => None,
        }
    }

    /// A branch whose operand size is not the mode's: RIP is cut to 16 bits, or the hosts disagree.
    pub(super) fn short_operand(&self, insn: &Instruction) -> bool {
        match insn.op0_kind() {
            OpKind::NearBranch16 => self.bits != 16,
            OpKind::NearBranch32 => self.bits != 32,
            _ => false,
        }
    }

    pub(super) fn conditional(&mut self, insn: &Instruction) -> Option<()> {
        let cc = condition_number(insn)?;
        if insn.is_jcc_short_or_near() {
            return self.jcc(insn, cc);
        }
        if insn.flow_control() != FlowControl::Next {
            return None;
        }
        if insn.op_count() == 1 {
            if insn.op0_kind() == OpKind::Register {
                let f = conditions!(cc, |C| int::setcc_r::<C> as Handler);
                return self.emit(Op { dst: operand(insn.op0_register(), 1)?, ..self.op(f) });
            }
            let mut op = self.op(conditions!(cc, |C| int::setcc_m::<C> as Handler));
            self.memory(&mut op, insn, 1, true)?;
            return self.emit(op);
        }
        let z = size_of_operand(insn, 0)?;
        let dst = operand(insn.op0_register(), z)?;
        if insn.op1_kind() == OpKind::Register {
            let f = conditions!(cc, |C| sized!(z, int::cmov_rr, C));
            return self.emit(Op { dst, src: operand(insn.op1_register(), z)?, ..self.op(f) });
        }
        let mut op = self.op(conditions!(cc, |C| sized!(z, int::cmov_rm, C)));
        op.dst = dst;
        self.memory(&mut op, insn, z, false)?;
        self.emit(op)
    }

    pub(super) fn jcc(&mut self, insn: &Instruction, cc: u8) -> Option<()> {
        if self.short_operand(insn) {
            return None;
        }
        let (imm, disp) = (insn.near_branch_target(), insn.next_ip());
        if let Some(op) = self.fused(cc) {
            let offset = self.ops.last().map(|last| last.pos & 0x1ff)?;
            self.ops.pop();
            // A compare of registers raises nothing: the pair's address does not matter, but keep the first's.
            self.offset = offset;
            let linked = self.linked(op.f, imm, disp);
            let Op { dst, src, base, .. } = op;
            return self.end(Op { dst, src, base, ..linked });
        }
        let f = conditions!(cc, |C| flow::jcc::<C> as Handler);
        self.end(self.linked(f, imm, disp))
    }

    /// One operation for the compare that came last and this jump, if there is one.
    pub(super) fn fused(&self, cc: u8) -> Option<Op> {
        let last = self.ops.last().filter(|last| last.n + 1 == self.n)?;
        let is = |f: Handler| std::ptr::fn_addr_eq(last.f, f);
        macro_rules! pair {
            ($form:path, $fused:path, $k:literal, $z:literal) => {{
                use $form as form;
                use $fused as fused;
                if is(form::<$k, $z>) {
                    let f = conditions!(cc, |C| fused::<$k, $z, C> as Handler);
                    return Some(Op { f, ..*last });
                }
            }};
        }
        pair!(int::alu_rr, flow::cmp_jcc_rr, 7, 4);
        pair!(int::alu_rr, flow::cmp_jcc_rr, 7, 8);
        pair!(int::alu_rr, flow::cmp_jcc_rr, 8, 1);
        pair!(int::alu_rr, flow::cmp_jcc_rr, 8, 4);
        pair!(int::alu_rr, flow::cmp_jcc_rr, 8, 8);
        let size = [1u8, 4, 8].into_iter().find(|z| match z {
            1 => is(int::alu_ri::<7, 1>) || is(int::alu_ri::<8, 1>),
            4 => is(int::alu_ri::<7, 4>) || is(int::alu_ri::<8, 4>),
            _ => is(int::alu_ri::<7, 8>) || is(int::alu_ri::<8, 8>),
        })?;
        let small = last.imm as i8;
        if cut(small as i64 as u64, size) != last.imm {
            return None;
        }
        let last = &Op { base: small as u8, ..*last };
        macro_rules! small {
            ($k:literal, $z:literal) => {
                if is(int::alu_ri::<$k, $z>) {
                    let f = conditions!(cc, |C| flow::cmp_jcc_ri::<$k, $z, C> as Handler);
                    return Some(Op { f, ..*last });
                }
            };
        }
        small!(7, 1);
        small!(7, 4);
        small!(7, 8);
        small!(8, 1);
        small!(8, 4);
        small!(8, 8);
        None
    }
}

fn condition_number(insn: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match insn.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        C::None => return None,
    })
}
