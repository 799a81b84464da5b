//! From decoded instructions to operations.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M, OpKind, Register};

use super::atomic_ops as atomic;
use super::flow_ops as flow;
use super::int_ops::{self as int, ADC, ADD, AND, CMP, OR, SBB, SUB, TEST, XOR};
use super::op::{Handler, Header, Link, Op, Slot, generic};
use crate::flags::trunc;
use crate::state::reg;

/// The handler of a size, after constant parameters.
macro_rules! sized {
    ($z:expr, $f:path $(, $k:expr)*) => {
        match $z {
            1 => { use $f as f; f::<$({$k},)* 1> as Handler }
            2 => { use $f as f; f::<$({$k},)* 2> as Handler }
            4 => { use $f as f; f::<$({$k},)* 4> as Handler }
            _ => { use $f as f; f::<$({$k},)* 8> as Handler }
        }
    };
}

/// The handler of one of `$k`.
macro_rules! kinds {
    ($value:expr, $z:expr, $f:path, [$($k:literal)*]) => {
        match $value {
            $($k => sized!($z, $f, $k),)*
            _ => return None,
        }
    };
}

/// The handler of a condition.
macro_rules! conditions {
    ($cc:expr, |$c:ident| $make:expr) => {
        conditions!(@ $cc, |$c| $make, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15])
    };
    (@ $cc:expr, |$c:ident| $make:expr, [$($k:literal)*]) => {
        match $cc {
            $($k => { const $c: u8 = $k; $make })*
            _ => return None,
        }
    };
}

/// A finished block.
pub struct Finished {
    /// Header, operations, link.
    pub slots: Box<[Slot]>,
    /// What the operations of the reference interpreter point at.
    pub insns: Box<[Instruction]>,
}

/// A block in the making.
pub struct Lowering {
    /// The operations.
    pub ops: Vec<Op>,
    /// Instructions left to the reference interpreter; the operations' `imm` is an index into this until the block is
    /// finished.
    insns: Vec<Instruction>,
    /// Operations whose `imm` is such an index.
    generics: Vec<usize>,
    /// Offset in CS and linear address of the first instruction.
    start: u64,
    linear: u64,
    bits: u32,
    n: u8,
    /// Where the current instruction begins, from the block's start.
    offset: u16,
    ended: bool,
}

impl Lowering {
    /// A block that begins at `rip` (linear address `linear`), of code of `bits`.
    pub fn new(rip: u64, linear: u64, bits: u32) -> Self {
        Self {
            ops: Vec::with_capacity(16),
            insns: Vec::new(),
            generics: Vec::new(),
            start: rip,
            linear,
            bits,
            n: 0,
            offset: 0,
            ended: false,
        }
    }

    /// Adds an instruction; true when the block must end with it.
    pub fn add(&mut self, insn: &Instruction) -> bool {
        self.offset = insn.ip().wrapping_sub(self.start) as u16;
        let before = self.ops.len();
        if self.lower(insn).is_none() {
            self.ops.truncate(before);
            self.lower_generic(insn);
        }
        self.n += 1;
        self.ended
    }

    /// Ends a block that goes on at `rip` without a branch. Gives header, operations and a link that leads nowhere.
    pub fn finish(mut self, rip: u64) -> Finished {
        if !self.ended {
            let op = self.linked(flow::fall, rip, rip);
            self.push(op);
        }
        let insns = self.insns.into_boxed_slice();
        for at in self.generics {
            let insn = &insns[self.ops[at].imm as usize];
            self.ops[at].imm = insn as *const Instruction as u64;
        }
        let header = Header { rip: self.start, unused: [0; 3] };
        let link = Link { target: [std::ptr::null(); 2], epoch: [0; 2] };
        let slots = std::iter::once(Slot { header })
            .chain(self.ops.into_iter().map(|op| Slot { op }))
            .chain(std::iter::once(Slot { link }))
            .collect();
        Finished { slots, insns }
    }

    /// An operation that follows the block's link, to `imm` or to `disp`.
    fn linked(&self, f: Handler, imm: u64, disp: u64) -> Op {
        let page = |rip: u64| self.linear.wrapping_add(rip.wrapping_sub(self.start)) >> 12;
        let near = |rip: u64| u8::from(page(rip) == self.linear >> 12);
        Op { imm, disp, scale: near(imm) | near(disp) << 1, ..self.op(f) }
    }

    pub(super) fn op(&self, f: Handler) -> Op {
        let zero = reg::ZERO as u8;
        Op {
            f,
            imm: 0,
            disp: 0,
            dst: 0,
            src: 0,
            base: zero,
            index: zero,
            scale: 0,
            n: self.n,
            pos: 0,
        }
    }

    fn push(&mut self, mut op: Op) {
        // The header is one place before the first operation.
        op.pos = self.offset | (self.ops.len() as u16 + 1) << 9;
        self.ops.push(op);
    }

    fn end(&mut self, op: Op) -> Option<()> {
        self.push(op);
        self.ended = true;
        Some(())
    }

    pub(super) fn emit(&mut self, op: Op) -> Option<()> {
        self.push(op);
        Some(())
    }

    fn lower_generic(&mut self, insn: &Instruction) {
        let op = Op { imm: self.insns.len() as u64, ..self.op(generic) };
        self.insns.push(*insn);
        self.generics.push(self.ops.len());
        self.push(op);
        if ends_block(insn) {
            let op = Op { imm: insn.next_ip(), n: self.n + 1, ..self.op(flow::look_up) };
            self.push(op);
            self.ended = true;
        }
    }

    /// Fills in the memory operand; operations that compute a linear address come first where it is not flat.
    /// None: leave the instruction to the reference interpreter.
    pub(super) fn memory(
        &mut self,
        op: &mut Op,
        insn: &Instruction,
        size: u8,
        write: bool,
    ) -> Option<()> {
        let segment = insn.memory_segment();
        let address = address_size(insn);
        if self.bits == 64 {
            if address != 8 {
                return None;
            }
            self.plain_address(op, insn)?;
            if matches!(segment, Register::FS | Register::GS) {
                let mut before = self.op(int::segment_base);
                before.src = segment.number() as u8;
                self.address_before(op, before);
            }
            return Some(());
        }
        self.plain_address(op, insn)?;
        let handler: Handler =
            if address == 2 { int::segment_offset::<2> } else { int::segment_offset::<4> };
        let mut before = self.op(handler);
        before.src = segment.number() as u8;
        before.imm = u64::from(size) | u64::from(write) << 8;
        self.address_before(op, before);
        Some(())
    }

    /// Moves the address to an operation of its own, and makes `op` use its result.
    fn address_before(&mut self, op: &mut Op, before: Op) {
        let zero = reg::ZERO as u8;
        let Op { disp, base, index, scale, .. } = *op;
        self.push(Op { disp, base, index, scale, ..before });
        (op.disp, op.base, op.index, op.scale) = (0, reg::EA as u8, zero, 0);
    }

    fn plain_address(&mut self, op: &mut Op, insn: &Instruction) -> Option<()> {
        let number = |r: Register| match r {
            Register::None | Register::RIP | Register::EIP => Some(reg::ZERO as u8),
            r if r.is_gpr() => Some(r.number() as u8),
            _ => None,
        };
        op.base = number(insn.memory_base())?;
        op.index = number(insn.memory_index())?;
        op.scale = insn.memory_index_scale().trailing_zeros() as u8;
        op.disp = insn.memory_displacement64();
        Some(())
    }

    fn lower(&mut self, insn: &Instruction) -> Option<()> {
        if insn.has_lock_prefix() {
            return self.locked(insn);
        }
        match insn.mnemonic() {
            M::Add => self.alu(insn, ADD),
            M::Or => self.alu(insn, OR),
            M::Adc => self.alu(insn, ADC),
            M::Sbb => self.alu(insn, SBB),
            M::And => self.alu(insn, AND),
            M::Sub => self.alu(insn, SUB),
            M::Xor => self.alu(insn, XOR),
            M::Cmp => self.alu(insn, CMP),
            M::Test => self.alu(insn, TEST),
            M::Mov => self.mov(insn),
            M::Movzx | M::Movsx | M::Movsxd => self.extend(insn),
            M::Lea => self.lea(insn),
            M::Shl | M::Sal => self.shift(insn, int::SHL),
            M::Shr => self.shift(insn, int::SHR),
            M::Sar => self.shift(insn, int::SAR),
            M::Rol => self.shift(insn, int::ROL),
            M::Ror => self.shift(insn, int::ROR),
            M::Not => self.unary(insn, int::NOT),
            M::Neg => self.unary(insn, int::NEG),
            M::Inc => self.unary(insn, int::INC),
            M::Dec => self.unary(insn, int::DEC),
            M::Imul => self.imul(insn),
            M::Mul => self.mul(insn, 0),
            M::Div => self.div(insn),
            M::Bt => self.bt(insn),
            M::Xchg => self.xchg(insn),
            M::Xadd | M::Cmpxchg => self.exchange(insn),
            M::Bswap => self.bswap(insn),
            M::Cbw => self.emit_sized(int::widen::<2>),
            M::Cwde => self.emit_sized(int::widen::<4>),
            M::Cdqe => self.emit_sized(int::widen::<8>),
            M::Cwd => self.emit_sized(int::sign::<2>),
            M::Cdq => self.emit_sized(int::sign::<4>),
            M::Cqo => self.emit_sized(int::sign::<8>),
            M::Nop | M::Endbr64 | M::Endbr32 | M::Pause => self.emit_sized(int::nop),
            M::Push | M::Pop | M::Leave if self.bits == 64 => self.stack(insn),
            M::Jmp | M::Call | M::Ret => self.branch(insn),
            _ if insn.condition_code() != iced_x86::ConditionCode::None => self.conditional(insn),
            _ => self.sse(insn),
        }
    }

    fn emit_sized(&mut self, f: Handler) -> Option<()> {
        self.emit(self.op(f))
    }

    /// Two operands of one size, `f` by form: rr, ri, rm, mr, mi.
    fn two(&mut self, insn: &Instruction, size: u8, f: [Handler; 5], write: bool) -> Option<()> {
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

    fn alu(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
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

    fn mov(&mut self, insn: &Instruction) -> Option<()> {
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

    fn extend(&mut self, insn: &Instruction) -> Option<()> {
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

    fn lea(&mut self, insn: &Instruction) -> Option<()> {
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

    fn shift(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
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

    fn unary(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        if insn.op0_kind() == OpKind::Register {
            let f = kinds!(kind, z, int::un_r, [0 1 2 3]);
            return self.emit(Op { dst: operand(insn.op0_register(), z)?, ..self.op(f) });
        }
        let mut op = self.op(kinds!(kind, z, int::un_m, [0 1 2 3]));
        self.memory(&mut op, insn, z, true)?;
        self.emit(op)
    }

    fn imul(&mut self, insn: &Instruction) -> Option<()> {
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

    fn mul(&mut self, insn: &Instruction, signed: u8) -> Option<()> {
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

    fn div(&mut self, insn: &Instruction) -> Option<()> {
        let z = size_of_operand(insn, 0)?;
        let f: [Handler; 2] = match z {
            4 => [int::div_r::<4>, int::div_m::<4>],
            8 => [int::div_r::<8>, int::div_m::<8>],
            _ => return None,
        };
        self.one_source(insn, z, f)
    }

    fn one_source(&mut self, insn: &Instruction, z: u8, f: [Handler; 2]) -> Option<()> {
        if insn.op0_kind() == OpKind::Register {
            return self.emit(Op { src: operand(insn.op0_register(), z)?, ..self.op(f[0]) });
        }
        let mut op = self.op(f[1]);
        self.memory(&mut op, insn, z, false)?;
        self.emit(op)
    }

    fn bt(&mut self, insn: &Instruction) -> Option<()> {
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

    fn xchg(&mut self, insn: &Instruction) -> Option<()> {
        if insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
            return self.exchange(insn);
        }
        let z = size_of_operand(insn, 0)?;
        let dst = operand(insn.op0_register(), z)?;
        let src = operand(insn.op1_register(), z)?;
        self.emit(Op { dst, src, ..self.op(sized!(z, int::xchg_rr)) })
    }

    /// XCHG, XADD and CMPXCHG of memory with a register.
    fn exchange(&mut self, insn: &Instruction) -> Option<()> {
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
    fn locked(&mut self, insn: &Instruction) -> Option<()> {
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

    fn locked_unary(&mut self, insn: &Instruction, kind: u8) -> Option<()> {
        if insn.op0_kind() != OpKind::Memory {
            return None;
        }
        let z = size_of_operand(insn, 0)?;
        let mut op = self.op(kinds!(kind, z, atomic::lock_un_m, [0 1 2 3]));
        self.memory(&mut op, insn, z, true)?;
        self.emit(op)
    }

    fn bswap(&mut self, insn: &Instruction) -> Option<()> {
        let f: Handler = match size_of_operand(insn, 0)? {
            8 => int::bswap::<8>,
            4 => int::bswap::<4>,
            _ => return None,
        };
        self.emit(Op { dst: insn.op0_register().number() as u8, ..self.op(f) })
    }

    fn stack(&mut self, insn: &Instruction) -> Option<()> {
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

    fn branch(&mut self, insn: &Instruction) -> Option<()> {
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
    fn short_operand(&self, insn: &Instruction) -> bool {
        match insn.op0_kind() {
            OpKind::NearBranch16 => self.bits != 16,
            OpKind::NearBranch32 => self.bits != 32,
            _ => false,
        }
    }

    fn conditional(&mut self, insn: &Instruction) -> Option<()> {
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

    fn jcc(&mut self, insn: &Instruction, cc: u8) -> Option<()> {
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
    fn fused(&self, cc: u8) -> Option<Op> {
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

/// A register's number, or the byte's offset for 8-bit registers.
pub(super) fn operand(register: Register, size: u8) -> Option<u8> {
    if !register.is_gpr() {
        return None;
    }
    if size != 1 {
        return Some(register.number() as u8);
    }
    Some(match register {
        Register::AH => 1,
        Register::CH => 9,
        Register::DH => 17,
        Register::BH => 25,
        low => low.full_register().number() as u8 * 8,
    })
}

/// The size in bytes of operand `i` if it is a general-purpose register or integer memory.
fn size_of_operand(insn: &Instruction, i: u32) -> Option<u8> {
    let size = match insn.op_kind(i) {
        OpKind::Register if insn.op_register(i).is_gpr() => insn.op_register(i).size(),
        OpKind::Memory => insn.memory_size().size(),
        _ => return None,
    };
    matches!(size, 1 | 2 | 4 | 8).then_some(size as u8)
}

fn cut(value: u64, size: u8) -> u64 {
    match size {
        1 => trunc::<1>(value),
        2 => trunc::<2>(value),
        4 => trunc::<4>(value),
        _ => value,
    }
}

/// The size in bytes of the memory operand's address.
fn address_size(insn: &Instruction) -> u8 {
    let named = [insn.memory_base(), insn.memory_index()];
    if named.contains(&Register::EIP) {
        return 4;
    }
    if named.contains(&Register::RIP) {
        return 8;
    }
    match named.iter().find(|r| **r != Register::None) {
        Some(r) => r.size() as u8,
        None => insn.memory_displ_size().max(2) as u8,
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

/// Whether nothing may follow in the block: branches, and what may change the mode, paging or segments, or
/// enable interrupts.
fn ends_block(insn: &Instruction) -> bool {
    if insn.flow_control() != FlowControl::Next {
        return true;
    }
    let segment = |i| {
        insn.op_count() > i
            && insn.op_kind(i) == OpKind::Register
            && (insn.op_register(i).is_segment_register()
                || insn.op_register(i).is_cr()
                || insn.op_register(i).is_dr())
    };
    segment(0)
        || segment(1)
        || matches!(
            insn.mnemonic(),
            M::Sti
                | M::Popf
                | M::Popfd
                | M::Popfq
                | M::Hlt
                | M::Wrmsr
                | M::Invlpg
                | M::Invpcid
                | M::Lmsw
                | M::Clts
                | M::Stac
                | M::Clac
                | M::Swapgs
                | M::Xsetbv
                | M::Lds
                | M::Les
                | M::Lss
                | M::Lfs
                | M::Lgs
                | M::In
                | M::Out
                | M::Insb
                | M::Insw
                | M::Insd
                | M::Outsb
                | M::Outsw
                | M::Outsd
                | M::Lldt
                | M::Ltr
                | M::Mwait
        )
}
