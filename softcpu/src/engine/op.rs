//! What decoded code is made of: micro-operations that call each other.
//!
//! ```text
//! block:  Header | Op | Op | Op ... | Op (ends the block) | Link
//!            ^      f ---> f ---> f ----> follows the link: f of another block's first Op
//!            |
//!            +-- `Op::pos` leads back here, for the address of the instruction
//! ```
//!
//! Each handler does its work and calls the next one in tail position, which an optimizing compiler makes a jump;
//! where it does not, [`crate::FUEL`] bounds the depth of the stack. A handler that meets anything out of the
//! ordinary changes nothing and *bails*: the instruction is then executed by [`crate::exec`].

use iced_x86::Instruction;

use crate::state::Cpu;

/// Executes an operation and what follows; gives null when the engine must look at `Cpu::stop`.
pub type Handler = unsafe fn(&mut Cpu, *const Op) -> *const Op;

/// A micro-operation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What to do.
    pub f: Handler,
    /// An immediate operand, a branch target, or a pointer to the `Instruction`.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: u64,
    /// Register number, or for 8-bit operands the byte's offset in `Cpu::regs`.
    pub dst: u8,
    /// As `dst`.
    pub src: u8,
    /// Memory operand: register numbers.
    pub base: u8,
    /// Memory operand: register numbers.
    pub index: u8,
    /// log2 of the index's factor. In an operation with a link: bit `way` says that the target lies in the block's
    /// (first) page.
    pub scale: u8,
    /// Instructions of the block before this one.
    pub n: u8,
    /// Bits 8:0: offset of the instruction from the block's first; bits 15:9: operations back to the header.
    pub pos: u16,
}

/// What precedes a block's first operation, in the shape of an operation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Header {
    /// Offset in CS of the first instruction.
    pub rip: u64,
    /// Fills a slot.
    pub unused: [u64; 3],
}

/// Where a block's last operation leads, in the shape of an operation. A target may be used while its epoch is not
/// smaller than the vCPU's: links inside of a page hold until they are cut (`u64::MAX`), others until a mapping
/// changes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Link {
    pub target: [*const Op; 2],
    pub epoch: [u64; 2],
}

/// A place in a block.
#[derive(Clone, Copy)]
#[repr(C)]
pub union Slot {
    pub header: Header,
    pub op: Op,
    pub link: Link,
}

const _: () = assert!(size_of::<Slot>() == 32 && size_of::<Op>() == 32);

/// The most instructions in a block; with at most three operations each `pos` has room for all.
pub const MAX_INSTRUCTIONS: usize = 32;

/// Why decoded code was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Stop {
    /// Go on at `Cpu::rip`.
    #[default]
    Lookup,
    /// Execute the instruction at `Cpu::rip` without decoded code.
    Bail,
    /// The instruction at `Cpu::rip` raised `Cpu::fault`.
    Fault,
    /// Find the block at `Cpu::rip` and let `Cpu::link` lead there.
    Resolve,
}

/// The address of the operation's instruction.
///
/// # Safety
/// `ip` points into a block.
pub unsafe fn rip_of(ip: *const Op) -> u64 {
    // SAFETY: `pos` counts the operations back to the block's header.
    unsafe {
        let pos = (*ip).pos;
        let header = ip.sub(usize::from(pos >> 9)).cast::<Header>();
        (*header).rip.wrapping_add(u64::from(pos & 0x1ff))
    }
}

/// Leaves the block before the operation's instruction.
///
/// # Safety
/// `ip` points into a block.
#[cold]
#[inline(never)]
pub unsafe fn bail(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: the caller's promise.
    unsafe {
        s.rip = rip_of(ip);
        s.fuel -= i64::from((*ip).n);
    }
    s.stop = Stop::Bail;
    std::ptr::null()
}

/// Goes on with the next operation of the block.
macro_rules! next {
    ($s:expr, $ip:expr) => {{
        let next = $ip.add(1);
        return ((*next).f)($s, next);
    }};
}
pub(super) use next;

/// The value, or leave the block.
macro_rules! or_bail {
    ($s:expr, $ip:expr, $value:expr) => {
        match $value {
            Some(value) => value,
            None => return bail($s, $ip),
        }
    };
}
pub(super) use or_bail;

/// Where `$size` bytes at `$lin` lie in this process. On a TLB miss the handler starts over when the TLB has been
/// filled, so it must not have changed anything yet, and may use this for one access only (two that share an entry
/// would evict each other for ever).
macro_rules! place {
    ($s:expr, $ip:expr, $size:expr, $lin:expr, $write:expr) => {{
        let lin = $lin;
        match $s.fast(lin, $size as u64, $write) {
            Some(at) => at,
            None => {
                return $crate::engine::op::miss($s, $ip, lin, $size as u64 | ($write as u64) << 8);
            }
        }
    }};
}
pub(super) use place;

/// A TLB miss: fills the TLB and starts the operation over, or bails.
///
/// # Safety
/// `ip` points into a block.
#[cold]
#[inline(never)]
pub unsafe fn miss(s: &mut Cpu, ip: *const Op, lin: u64, size_and_write: u64) -> *const Op {
    // SAFETY: the caller's promise.
    unsafe {
        if s.fast_fill(lin, size_and_write & 0xff, size_and_write >> 8 != 0).is_none() {
            return bail(s, ip);
        }
        ((*ip).f)(s, ip)
    }
}

/// Any instruction, by the reference interpreter. Leaves the block if the instruction branched or wants it.
///
/// # Safety
/// `ip` points into a block; its `imm` points at the block's copy of the instruction.
pub unsafe fn generic(s: &mut Cpu, ip: *const Op) -> *const Op {
    // SAFETY: the caller's promise.
    unsafe {
        let insn = &*((*ip).imm as *const Instruction);
        s.rip = insn.ip();
        let next = insn.next_ip();
        s.next_rip = next;
        let result = crate::execute(s, insn);
        if result.is_ok() && !s.leave && s.next_rip == next {
            next!(s, ip);
        }
        after_generic(s, ip, result)
    }
}

/// # Safety
/// `ip` points into a block.
#[cold]
unsafe fn after_generic(s: &mut Cpu, ip: *const Op, result: crate::Exec) -> *const Op {
    // SAFETY: the caller's promise.
    s.fuel -= unsafe { i64::from((*ip).n) } + 1;
    match result {
        Ok(()) => {
            s.rip = s.next_rip;
            s.stop = Stop::Lookup;
        }
        Err(fault) => {
            s.fault = fault;
            s.stop = Stop::Fault;
        }
    }
    std::ptr::null()
}
