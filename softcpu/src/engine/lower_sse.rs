//! From decoded SSE instructions to operations.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::lower::{Lowering, operand};
use super::op::{Handler, Op};
use super::sse_ops as sse;
use crate::exec::sse_forms::{self, Kind};

impl Lowering {
    /// None: leave it to the reference interpreter.
    pub(super) fn sse(&mut self, insn: &Instruction) -> Option<()> {
        let form = sse_forms::of(insn.code());
        let memory = insn.op0_kind() == OpKind::Memory || insn.op1_kind() == OpKind::Memory;
        let aligned = form.aligned;
        let bytes = insn.memory_size().size() as u8;
        let f: Handler = match (form.kind, memory) {
            (Kind::Xmm, _) => return self.stub(insn),
            (Kind::Load16 | Kind::Store16, false) => sse::copy,
            (Kind::Load16, true) if aligned => sse::load16::<true>,
            (Kind::Load16, true) => sse::load16::<false>,
            (Kind::Store16, true) if aligned => sse::store16::<true>,
            (Kind::Store16, true) => sse::store16::<false>,
            (Kind::LoadScalar | Kind::LoadZero, true) => match bytes {
                4 => sse::load_low::<4>,
                8 => sse::load_low::<8>,
                _ => return None,
            },
            (Kind::StoreScalar | Kind::StoreLow | Kind::StoreQuad, true) => match bytes {
                4 => sse::store_low::<4>,
                8 => sse::store_low::<8>,
                _ => return None,
            },
            (Kind::LoadScalar | Kind::StoreScalar, false) => match insn.mnemonic() {
                Mnemonic::Movss => sse::merge_low::<4>,
                _ => sse::merge_low::<8>,
            },
            (Kind::LoadHalf { high }, true) if high => sse::load_half::<true>,
            (Kind::LoadHalf { .. }, true) => sse::load_half::<false>,
            (Kind::StoreHalf { high }, true) if high => sse::store_half::<true>,
            (Kind::StoreHalf { .. }, true) => sse::store_half::<false>,
            (Kind::LoadZero | Kind::StoreLow | Kind::StoreQuad, false) => {
                return self.registers(insn);
            }
            _ => return None,
        };
        let mut op = self.op(f);
        if let Some(dst) = vector(insn.op0_register()) {
            op.dst = dst;
        }
        if let Some(src) = vector(insn.op1_register()) {
            op.src = src;
        }
        if memory {
            self.memory(&mut op, insn, bytes, insn.op0_kind() == OpKind::Memory)?;
        }
        self.emit(op)
    }

    /// MOVD and MOVQ between registers.
    fn registers(&mut self, insn: &Instruction) -> Option<()> {
        let (to, from) = (insn.op0_register(), insn.op1_register());
        let (f, dst, src): (Handler, _, _) = match (vector(to), vector(from)) {
            (Some(dst), Some(src)) => (sse::copy_low, dst, src),
            (Some(dst), None) if from.size() == 8 => (sse::from_gpr::<8>, dst, operand(from, 8)?),
            (Some(dst), None) => (sse::from_gpr::<4>, dst, operand(from, 4)?),
            (None, Some(src)) if to.size() == 8 => (sse::to_gpr::<8>, operand(to, 8)?, src),
            (None, Some(src)) => (sse::to_gpr::<4>, operand(to, 4)?, src),
            (None, None) => return None,
        };
        self.emit(Op { dst, src, ..self.op(f) })
    }

    /// An instruction that the host executes.
    fn stub(&mut self, insn: &Instruction) -> Option<()> {
        let stub = crate::exec::sse::lookup(insn)?;
        let dst = vector(insn.op0_register())?;
        if insn.op1_kind() == OpKind::Register {
            let f: Handler = if stub.mxcsr { sse::float_rr } else { sse::op_rr };
            let src = vector(insn.op1_register())?;
            return self.emit(Op { dst, src, imm: stub.entry as u64, ..self.op(f) });
        }
        if insn.op1_kind() != OpKind::Memory {
            return None;
        }
        let f: Handler = match (stub.mxcsr, stub.size, stub.aligned) {
            (false, 4, _) => sse::op_rm::<4, false>,
            (false, 8, _) => sse::op_rm::<8, false>,
            (false, 16, true) => sse::op_rm::<16, true>,
            (false, 16, false) => sse::op_rm::<16, false>,
            (true, 4, _) => sse::float_rm::<4, false>,
            (true, 8, _) => sse::float_rm::<8, false>,
            (true, 16, true) => sse::float_rm::<16, true>,
            (true, 16, false) => sse::float_rm::<16, false>,
            _ => return None,
        };
        let mut op = Op { dst, imm: stub.entry as u64, ..self.op(f) };
        self.memory(&mut op, insn, stub.size, false)?;
        self.emit(op)
    }
}

fn vector(register: Register) -> Option<u8> {
    register.is_xmm().then(|| register.number() as u8)
}
