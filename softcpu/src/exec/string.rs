//! String instructions on memory: MOVS, STOS, LODS, CMPS, SCAS.
//!
//! A repeated one goes over stretches that lie in one page and are plain memory with host pointers; what is left (page
//! crossings, devices, DF, breakpoints) goes element by element. RCX, RSI and RDI are right after each stretch, so a
//! fault in the middle leaves them exact. After 64 KiB the instruction lets interrupts in: RIP stays, and it
//! goes on from the registers.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::int::flags_sub;
use super::operand::{self, mask, reg, set_reg};
use crate::fault::Exec;
use crate::flags;
use crate::host;
use crate::mem::Word;
use crate::state::{Cpu, reg as r, seg as s};

/// [`Shape::budget`] of instructions on memory.
const BUDGET: u64 = 0x1_0000;

/// How an instruction goes over memory.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Bytes of an element.
    pub size: usize,
    /// Bytes of RSI, RDI and RCX that count.
    pub address: usize,
    /// The segment of RSI.
    pub segment: usize,
    /// DF.
    pub down: bool,
    /// Bytes that a repeated instruction handles before interrupts get a chance.
    pub budget: u64,
}

impl Shape {
    /// The shape of `insn`, with elements of `size` bytes.
    pub fn new(cpu: &Cpu, insn: &Instruction, size: usize) -> Self {
        let mut address = 8;
        let mut segment = s::DS;
        for i in 0..insn.op_count() {
            match insn.op_kind(i) {
                OpKind::MemorySegSI | OpKind::MemoryESDI => address = 2,
                OpKind::MemorySegESI | OpKind::MemoryESEDI => address = 4,
                OpKind::MemorySegRSI | OpKind::MemoryESRDI => address = 8,
                _ => {}
            }
            if matches!(
                insn.op_kind(i),
                OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI
            ) {
                segment = operand::segment(cpu, insn);
            }
        }
        let down = cpu.sys_flags & flags::DF != 0;
        Self { size, address, segment, down, budget: BUDGET }
    }

    /// The linear address of the element at RSI or RDI.
    pub fn element(&self, cpu: &Cpu, index: usize, write: bool) -> Exec<u64> {
        let offset = reg(cpu, index, self.address);
        cpu.linear(self.segment_of(index), offset, self.size as u64, write)
    }

    fn segment_of(&self, index: usize) -> usize {
        if index == r::RSI { self.segment } else { s::ES }
    }

    /// Moves RSI or RDI by `elements`.
    pub fn advance(&self, cpu: &mut Cpu, index: usize, elements: u64) {
        let bytes = elements.wrapping_mul(self.size as u64);
        let at = cpu.regs[index];
        let at = if self.down { at.wrapping_sub(bytes) } else { at.wrapping_add(bytes) };
        set_reg(cpu, index, self.address, at);
    }

    /// Where up to `count` elements from RSI or RDI lie in this process, and how many. None where the next one must be
    /// handled by itself. The fault is that of the first element.
    fn stretch(
        &self,
        cpu: &mut Cpu,
        index: usize,
        count: u64,
        write: bool,
    ) -> Exec<Option<(*mut u8, u64)>> {
        if self.down || count == 1 {
            return Ok(None);
        }
        let offset = reg(cpu, index, self.address);
        let before_wrap = (mask(self.address) - offset).saturating_add(1);
        let size = self.size as u64;
        let bytes = count.saturating_mul(size).min(before_wrap).min(4096);
        if bytes < size {
            return Ok(None);
        }
        let Ok(lin) = cpu.linear(self.segment_of(index), offset, bytes, write) else {
            return Ok(None);
        };
        let found = cpu.span(lin, bytes, write)?;
        Ok(found.map(|(at, bytes)| (at, bytes / size)).filter(|(_, elements)| *elements > 0))
    }
}

/// Runs `step` once, or with a REP prefix until RCX elements are done, `step` says stop, or the budget is used up.
/// `step` is given how many elements it may handle, handles at least one, and says how many.
pub fn repeat(
    cpu: &mut Cpu,
    insn: &Instruction,
    shape: Shape,
    mut step: impl FnMut(&mut Cpu, u64) -> Exec<(u64, bool)>,
) -> Exec {
    if !insn.has_rep_prefix() && !insn.has_repne_prefix() {
        return step(cpu, 1).map(drop);
    }
    // Single-stepping and data breakpoints trap after each element.
    let traced = cpu.sys_flags & flags::TF != 0 || cpu.dr[7] & 0xff != 0;
    let mut budget = if traced { 1 } else { shape.budget / shape.size as u64 };
    loop {
        let count = reg(cpu, r::RCX, shape.address);
        if count == 0 {
            return Ok(());
        }
        if budget == 0 {
            cpu.next_rip = cpu.rip;
            if traced {
                cpu.sys_flags |= flags::RF;
            }
            return Ok(());
        }
        let (done, stop) = step(cpu, count.min(budget))?;
        set_reg(cpu, r::RCX, shape.address, count.wrapping_sub(done));
        if stop {
            return Ok(());
        }
        budget = budget.saturating_sub(done);
    }
}

/// Executes a string instruction; none if it is not one.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Option<Exec> {
    let code = insn.code();
    Some(match insn.mnemonic() {
        M::Movsb => movs::<u8>(cpu, insn),
        M::Movsw => movs::<u16>(cpu, insn),
        M::Movsd if code == Code::Movsd_m32_m32 => movs::<u32>(cpu, insn),
        M::Movsq => movs::<u64>(cpu, insn),
        M::Stosb => stos::<u8>(cpu, insn),
        M::Stosw => stos::<u16>(cpu, insn),
        M::Stosd => stos::<u32>(cpu, insn),
        M::Stosq => stos::<u64>(cpu, insn),
        M::Lodsb => lods::<u8>(cpu, insn),
        M::Lodsw => lods::<u16>(cpu, insn),
        M::Lodsd => lods::<u32>(cpu, insn),
        M::Lodsq => lods::<u64>(cpu, insn),
        M::Cmpsb => cmps::<u8>(cpu, insn),
        M::Cmpsw => cmps::<u16>(cpu, insn),
        M::Cmpsd if code == Code::Cmpsd_m32_m32 => cmps::<u32>(cpu, insn),
        M::Cmpsq => cmps::<u64>(cpu, insn),
        M::Scasb => scas::<u8>(cpu, insn),
        M::Scasw => scas::<u16>(cpu, insn),
        M::Scasd => scas::<u32>(cpu, insn),
        M::Scasq => scas::<u64>(cpu, insn),
        _ => return None,
    })
}

fn movs<T: Word>(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let shape = Shape::new(cpu, insn, T::SIZE);
    repeat(cpu, insn, shape, |cpu, count| {
        let from = shape.stretch(cpu, r::RSI, count, false)?;
        let to = match from {
            Some(_) => shape.stretch(cpu, r::RDI, count, true)?,
            None => None,
        };
        let done = match (from, to) {
            (Some((from, first)), Some((to, second))) => {
                let done = first.min(second);
                // SAFETY: both stretches are that many elements of mapped guest memory, `to` writable.
                unsafe { copy::<T>(from, to, done as usize) };
                done
            }
            _ => {
                let from = shape.element(cpu, r::RSI, false)?;
                let value = cpu.load::<T>(from)?;
                let to = shape.element(cpu, r::RDI, true)?;
                cpu.store(to, value)?;
                1
            }
        };
        shape.advance(cpu, r::RSI, done);
        shape.advance(cpu, r::RDI, done);
        Ok((done, false))
    })
}

/// Copies upwards, one element after the other as far as anybody can tell.
///
/// # Safety
/// `from` and `to` point at `count` elements of mapped guest memory.
unsafe fn copy<T: Word>(from: *mut u8, to: *mut u8, count: usize) {
    let bytes = count * T::SIZE;
    let ahead = (to as usize).wrapping_sub(from as usize);
    // A destination that begins inside of the source repeats what was copied before.
    if ahead != 0 && ahead < bytes {
        for i in (0..bytes).step_by(T::SIZE) {
            // SAFETY: the caller's promise.
            unsafe { host::store(to.add(i).cast::<T>(), host::load(from.add(i).cast::<T>())) };
        }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy(from, to, bytes) };
}

fn stos<T: Word>(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let shape = Shape::new(cpu, insn, T::SIZE);
    let value = T::from_u64(cpu.regs[r::RAX]);
    repeat(cpu, insn, shape, |cpu, count| {
        let done = match shape.stretch(cpu, r::RDI, count, true)? {
            Some((to, done)) => {
                // SAFETY: the stretch is that many elements of mapped guest memory that may be written.
                unsafe { fill(to, value, done as usize) };
                done
            }
            None => {
                let to = shape.element(cpu, r::RDI, true)?;
                cpu.store(to, value)?;
                1
            }
        };
        shape.advance(cpu, r::RDI, done);
        Ok((done, false))
    })
}

/// # Safety
/// `to` points at `count` elements of mapped guest memory.
unsafe fn fill<T: Word>(to: *mut u8, value: T, count: usize) {
    let mut bytes = [0; 16];
    value.to_bytes(&mut bytes);
    if bytes[..T::SIZE].iter().all(|byte| *byte == bytes[0]) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(to, bytes[0], count * T::SIZE) };
        return;
    }
    for i in 0..count {
        // SAFETY: the caller's promise.
        unsafe { host::store(to.add(i * T::SIZE).cast::<T>(), value) };
    }
}

fn lods<T: Word>(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let shape = Shape::new(cpu, insn, T::SIZE);
    repeat(cpu, insn, shape, |cpu, count| {
        let (value, done) = match shape.stretch(cpu, r::RSI, count, false)? {
            Some((from, done)) => {
                let last = (done as usize - 1) * T::SIZE;
                // SAFETY: the stretch is that many elements of mapped guest memory.
                (unsafe { host::load(from.add(last).cast::<T>()) }, done)
            }
            None => {
                let from = shape.element(cpu, r::RSI, false)?;
                (cpu.load::<T>(from)?, 1)
            }
        };
        set_reg(cpu, r::RAX, T::SIZE, value.to_u64());
        shape.advance(cpu, r::RSI, done);
        Ok((done, false))
    })
}

/// How a comparison of elements goes on: REPE while they are equal, REPNE while they differ.
fn stops(insn: &Instruction) -> (bool, bool) {
    (insn.has_repe_prefix(), insn.has_repne_prefix())
}

fn compare_flags<T: Word>(cpu: &mut Cpu, a: T, b: T) {
    let (a, b) = (a.to_u64(), b.to_u64());
    flags_sub(cpu, T::SIZE, a, b, a.wrapping_sub(b) & mask(T::SIZE));
}

fn cmps<T: Word>(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let shape = Shape::new(cpu, insn, T::SIZE);
    let (repe, repne) = stops(insn);
    repeat(cpu, insn, shape, |cpu, count| {
        let left = shape.stretch(cpu, r::RSI, count, false)?;
        let right = match left {
            Some(_) => shape.stretch(cpu, r::RDI, count, false)?,
            None => None,
        };
        let (a, b, done) = match (left, right) {
            (Some((left, first)), Some((right, second))) => {
                let count = first.min(second);
                let pair = |i: u64| {
                    let at = i as usize * T::SIZE;
                    // SAFETY: `i` is below both stretches' numbers of elements.
                    unsafe {
                        (
                            host::load(left.add(at).cast::<T>()),
                            host::load(right.add(at).cast::<T>()),
                        )
                    }
                };
                until(count, repe, repne, pair)
            }
            _ => {
                let left = shape.element(cpu, r::RSI, false)?;
                let a = cpu.load::<T>(left)?;
                let right = shape.element(cpu, r::RDI, false)?;
                (a, cpu.load::<T>(right)?, 1)
            }
        };
        compare_flags(cpu, a, b);
        shape.advance(cpu, r::RSI, done);
        shape.advance(cpu, r::RDI, done);
        Ok((done, stopped(a == b, repe, repne)))
    })
}

fn scas<T: Word>(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let shape = Shape::new(cpu, insn, T::SIZE);
    let (repe, repne) = stops(insn);
    let wanted = T::from_u64(cpu.regs[r::RAX]);
    repeat(cpu, insn, shape, |cpu, count| {
        let (a, b, done) = match shape.stretch(cpu, r::RDI, count, false)? {
            Some((at, count)) => until(count, repe, repne, |i| {
                // SAFETY: `i` is below the stretch's number of elements.
                let value = unsafe { host::load(at.add(i as usize * T::SIZE).cast::<T>()) };
                (wanted, value)
            }),
            None => {
                let at = shape.element(cpu, r::RDI, false)?;
                (wanted, cpu.load::<T>(at)?, 1)
            }
        };
        compare_flags(cpu, a, b);
        shape.advance(cpu, r::RDI, done);
        Ok((done, stopped(a == b, repe, repne)))
    })
}

fn stopped(equal: bool, repe: bool, repne: bool) -> bool {
    repe && !equal || repne && equal
}

/// Compares pairs until the prefix says stop or `count` (not 0) are done; gives the last pair and how many.
fn until<T: Word>(
    count: u64,
    repe: bool,
    repne: bool,
    pair: impl Fn(u64) -> (T, T),
) -> (T, T, u64) {
    let mut i = 0;
    loop {
        let (a, b) = pair(i);
        i += 1;
        if i == count || stopped(a == b, repe, repne) {
            return (a, b, i);
        }
    }
}
