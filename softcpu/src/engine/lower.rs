//! From decoded instructions to operations.

use iced_x86::{FlowControl, Instruction, Mnemonic as M, OpKind, Register};

use super::flow_ops as flow;
use super::int_ops::{self as int, ADC, ADD, AND, CMP, OR, SBB, SUB, TEST, XOR};
use super::op::{Handler, Header, Link, Op, Slot, generic};
use crate::flags::trunc;
use crate::state::reg;

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
    /// Width of the code segment.
    pub(super) bits: u32,
    /// Instructions so far.
    pub(super) n: u8,
    /// Where the current instruction begins, from the block's start.
    pub(super) offset: u16,
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
    pub(super) fn linked(&self, f: Handler, imm: u64, disp: u64) -> Op {
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

    pub(super) fn push(&mut self, mut op: Op) {
        // The header is one place before the first operation.
        op.pos = self.offset | (self.ops.len() as u16 + 1) << 9;
        self.ops.push(op);
    }

    pub(super) fn end(&mut self, op: Op) -> Option<()> {
        self.push(op);
        self.ended = true;
        Some(())
    }

    pub(super) fn emit(&mut self, op: Op) -> Option<()> {
        self.push(op);
        Some(())
    }

    pub(super) fn lower_generic(&mut self, insn: &Instruction) {
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
    pub(super) fn address_before(&mut self, op: &mut Op, before: Op) {
        let zero = reg::ZERO as u8;
        let Op { disp, base, index, scale, .. } = *op;
        self.push(Op { disp, base, index, scale, ..before });
        (op.disp, op.base, op.index, op.scale) = (0, reg::EA as u8, zero, 0);
    }

    pub(super) fn plain_address(&mut self, op: &mut Op, insn: &Instruction) -> Option<()> {
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

    pub(super) fn lower(&mut self, insn: &Instruction) -> Option<()> {
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
pub(super) fn size_of_operand(insn: &Instruction, i: u32) -> Option<u8> {
    let size = match insn.op_kind(i) {
        OpKind::Register if insn.op_register(i).is_gpr() => insn.op_register(i).size(),
        OpKind::Memory => insn.memory_size().size(),
        _ => return None,
    };
    matches!(size, 1 | 2 | 4 | 8).then_some(size as u8)
}

pub(super) fn cut(value: u64, size: u8) -> u64 {
    match size {
        1 => trunc::<1>(value),
        2 => trunc::<2>(value),
        4 => trunc::<4>(value),
        _ => value,
    }
}

/// The size in bytes of the memory operand's address.
pub(super) fn address_size(insn: &Instruction) -> u8 {
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

/// Whether nothing may follow in the block: branches, and what may change the mode, paging or segments, or
/// enable interrupts.
pub(super) fn ends_block(insn: &Instruction) -> bool {
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
