//! What is judged: a state to begin with, some code, and the state that it leads to.
//!
//! Both sides see the same linear memory:
//!
//! ```text
//!   CODE   1 page    readable, executable      the instructions, then INT3
//!   DATA   2 pages   readable, writable
//!   RO     1 page    readable
//!   everything around them is unmapped
//! ```

/// Page of code.
pub const CODE: u64 = 0x1000_0000;
/// Two pages of data.
pub const DATA: u64 = 0x1001_0000;
/// Bytes of data.
pub const DATA_LEN: usize = 0x2000;
/// A page that may only be read. It holds what DATA's first page holds.
pub const RO: u64 = 0x1001_4000;
/// Where in the code page the instructions begin.
pub const CODE_OFFSET: u64 = 0x400;
/// Bytes of code a case may have.
pub const CODE_MAX: usize = 320;

/// Kinds of code segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Bits {
    /// 16-bit, through the LDT.
    B16 = 16,
    /// 32-bit compatibility mode.
    B32 = 32,
    /// 64-bit mode.
    B64 = 64,
}

/// An LDT entry, as the host's modify_ldt wants it and as a descriptor.
#[derive(Clone, Copy)]
pub struct LdtEntry {
    pub base: u64,
    pub limit: u32,
    pub big: bool,
    /// 0 data, 1 data that grows down, 2 code.
    pub contents: u32,
    /// Data that may not be written, code that may not be read.
    pub restricted: bool,
    pub present: bool,
}

const fn data(base: u64, limit: u32, big: bool) -> LdtEntry {
    LdtEntry { base, limit, big, contents: 0, restricted: false, present: true }
}

/// The LDT of both sides. Entry `i` has selector `8 * i + 7`.
pub const LDT: [LdtEntry; 10] = [
    LdtEntry { contents: 2, ..data(CODE, 0xfff, false) },
    data(DATA, 0x1fff, false),
    data(DATA, 0x1fff, true),
    data(DATA + 0x800, 0x7ff, true),
    LdtEntry { restricted: true, ..data(DATA, 0x1fff, true) },
    LdtEntry { contents: 1, ..data(DATA, 0x7ff, false) },
    LdtEntry { contents: 2, ..data(CODE, 0xfff, true) },
    LdtEntry { contents: 2, restricted: true, ..data(CODE, 0xfff, true) },
    LdtEntry { present: false, ..data(DATA, 0x1fff, true) },
    data(DATA, 0xffff, false),
];

/// Selectors in the LDT.
pub const fn ldt(index: u16) -> u16 {
    index * 8 + 7
}

/// Linux's selectors of user segments.
pub const USER32_CS: u16 = 0x23;
pub const USER_DS: u16 = 0x2b;
pub const USER64_CS: u16 = 0x33;

/// The FXSAVE image of the x87 and SSE state: 416 bytes of it.
pub const FX: usize = 416;

/// A state of the processor and memory.
#[derive(Clone)]
#[repr(C)]
pub struct State {
    /// RAX..R15.
    pub regs: [u64; 16],
    /// Offset in CS.
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// Of FS and GS; set in 64-bit cases only.
    pub bases: [u64; 2],
    pub fx: [u8; FX],
    pub data: [u8; DATA_LEN],
}

/// What is to be run.
#[derive(Clone)]
#[repr(C)]
pub struct Case {
    pub bits: Bits,
    /// One instruction, stopped by a single-step trap rather than by the INT3 after the code.
    pub step: bool,
    /// Instructions in `code`.
    pub count: u32,
    pub code_len: u32,
    pub code: [u8; CODE_MAX],
    /// Linear address that the generator meant the memory operand to have, for masks.
    pub target: u64,
    /// Number and seed, for the report.
    pub seed: u64,
    pub start: State,
}

/// How it ended.
#[derive(Clone)]
#[repr(C)]
pub struct Outcome {
    /// Ran through, or the exception's vector.
    pub vector: Option<u8>,
    pub error: u64,
    /// Of a page fault.
    pub cr2: u64,
    pub end: State,
}

impl State {
    /// All zero, but with the masks and control words of a fresh process.
    pub fn zero() -> Self {
        let mut fx = [0; FX];
        fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self {
            regs: [0; 16],
            rip: 0,
            rflags: 2,
            selectors: [0; 6],
            bases: [0; 2],
            fx,
            data: [0; DATA_LEN],
        }
    }
}

impl Case {
    /// Linear base of the code segment.
    pub fn code_base(&self) -> u64 {
        if self.bits == Bits::B16 { CODE } else { 0 }
    }

    /// The instructions.
    pub fn code(&self) -> &[u8] {
        &self.code[..self.code_len as usize]
    }

    /// Offset in CS of the INT3 after the code.
    pub fn stop(&self) -> u64 {
        self.start.rip + u64::from(self.code_len)
    }
}
