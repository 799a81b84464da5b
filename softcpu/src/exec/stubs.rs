//! The host's own SSE, MMX and x87 instructions, to be called on the guest's operands.
//!
//! A stub is one instruction with fixed registers, and a return:
//!
//! ```text
//!   66 0F FE CA  paddd xmm1, xmm2        66 0F 70 CA ib  pshufd xmm1, xmm2, ib     D8 C1  fadd st0, st1
//!   C3           ret                     C3              ret                       C3     ret
//!   plain tables: 8 bytes an opcode      immediate tables: 8 bytes a value         x87: 4 bytes an opcode
//! ```
//!
//! # Calling convention
//! A register that ModRM's reg field names is XMM1, MM1 or RCX; one that its r/m field names is XMM2, MM2 or RDX.
//! XMM0, RAX and RDX are what some instructions use without naming them. x87 stubs with a memory operand find it at
//! \[RDI\]. A stub changes its instruction's destination and the flags and nothing else, and needs 8 bytes of stack.
//!
//! The tables hold every opcode of a map; [`super::sse_forms`] knows which of them are ever to be called.

use std::arch::{asm, global_asm};

/// 256 stubs each, the last byte of the opcode varying.
macro_rules! plain_tables {
    ($([$($byte:literal),*])*) => {
        global_asm!(
            ".pushsection .text.lodge_sse_plain, \"ax\", @progbits",
            ".balign 64",
            ".hidden lodge_softcpu_sse_plain",
            ".globl lodge_softcpu_sse_plain",
            "lodge_softcpu_sse_plain:",
            $(concat!(
                ".set lodge_i, 0\n.rept 256\n.byte ", $($byte, ",",)* "lodge_i, 0xca, 0xc3\n",
                ".balign 8, 0xcc\n.set lodge_i, lodge_i + 1\n.endr"
            ),)*
            ".popsection",
        );
        /// The bytes before the opcode, in the tables' order.
        const PLAIN: &[&[u8]] = &[$(&[$($byte),*]),*];
    };
}
plain_tables! {
    [0x0f] [0x66, 0x0f] [0xf3, 0x0f] [0xf2, 0x0f]
    [0x48, 0x0f] [0x66, 0x48, 0x0f] [0xf3, 0x48, 0x0f] [0xf2, 0x48, 0x0f]
    [0x0f, 0x38] [0x66, 0x0f, 0x38]
}

/// 256 stubs each, the immediate byte varying.
macro_rules! immediate_tables {
    ($([$($byte:literal),*])*) => {
        global_asm!(
            ".pushsection .text.lodge_sse_immediate, \"ax\", @progbits",
            ".balign 64",
            ".hidden lodge_softcpu_sse_immediate",
            ".globl lodge_softcpu_sse_immediate",
            "lodge_softcpu_sse_immediate:",
            $(concat!(
                ".set lodge_i, 0\n.rept 256\n.byte ", $($byte, ",",)* "0xca, lodge_i, 0xc3\n",
                ".balign 8, 0xcc\n.set lodge_i, lodge_i + 1\n.endr"
            ),)*
            ".popsection",
        );
        /// The bytes before ModRM, in the tables' order.
        const IMMEDIATE: &[&[u8]] = &[$(&[$($byte),*]),*];
    };
}
immediate_tables! {
    // PSHUFW, PSHUFD, PSHUFHW, PSHUFLW
    [0x0f, 0x70] [0x66, 0x0f, 0x70] [0xf3, 0x0f, 0x70] [0xf2, 0x0f, 0x70]
    // CMPPS, CMPPD, CMPSS, CMPSD
    [0x0f, 0xc2] [0x66, 0x0f, 0xc2] [0xf3, 0x0f, 0xc2] [0xf2, 0x0f, 0xc2]
    // PINSRW, PEXTRW, SHUFPS, SHUFPD
    [0x0f, 0xc4] [0x66, 0x0f, 0xc4] [0x0f, 0xc5] [0x66, 0x0f, 0xc5] [0x0f, 0xc6] [0x66, 0x0f, 0xc6]
    // ROUNDPS, ROUNDPD, ROUNDSS, ROUNDSD, BLENDPS, BLENDPD, PBLENDW, PALIGNR
    [0x66, 0x0f, 0x3a, 0x08] [0x66, 0x0f, 0x3a, 0x09] [0x66, 0x0f, 0x3a, 0x0a] [0x66, 0x0f, 0x3a, 0x0b]
    [0x66, 0x0f, 0x3a, 0x0c] [0x66, 0x0f, 0x3a, 0x0d] [0x66, 0x0f, 0x3a, 0x0e] [0x66, 0x0f, 0x3a, 0x0f]
    [0x0f, 0x3a, 0x0f]
    // PEXTRB, PEXTRW, PEXTRD, PEXTRQ, EXTRACTPS
    [0x66, 0x0f, 0x3a, 0x14] [0x66, 0x0f, 0x3a, 0x15] [0x66, 0x0f, 0x3a, 0x16] [0x66, 0x48, 0x0f, 0x3a, 0x16]
    [0x66, 0x0f, 0x3a, 0x17]
    // PINSRB, INSERTPS, PINSRD, PINSRQ
    [0x66, 0x0f, 0x3a, 0x20] [0x66, 0x0f, 0x3a, 0x21] [0x66, 0x0f, 0x3a, 0x22] [0x66, 0x48, 0x0f, 0x3a, 0x22]
    // DPPS, DPPD, MPSADBW, PCLMULQDQ
    [0x66, 0x0f, 0x3a, 0x40] [0x66, 0x0f, 0x3a, 0x41] [0x66, 0x0f, 0x3a, 0x42] [0x66, 0x0f, 0x3a, 0x44]
    // PCMPESTRM, PCMPESTRI, both with 64-bit lengths, PCMPISTRM, PCMPISTRI
    [0x66, 0x0f, 0x3a, 0x60] [0x66, 0x0f, 0x3a, 0x61] [0x66, 0x48, 0x0f, 0x3a, 0x60] [0x66, 0x48, 0x0f, 0x3a, 0x61]
    [0x66, 0x0f, 0x3a, 0x62] [0x66, 0x0f, 0x3a, 0x63]
    // SHA1RNDS4, AESKEYGENASSIST
    [0x0f, 0x3a, 0xcc] [0x66, 0x0f, 0x3a, 0xdf]
}

global_asm!(
    ".pushsection .text.lodge_x87, \"ax\", @progbits",
    ".balign 64",
    ".hidden lodge_softcpu_x87_register",
    ".globl lodge_softcpu_x87_register",
    "lodge_softcpu_x87_register:",
    ".set lodge_e, 0xd8",
    ".rept 8",
    ".set lodge_i, 0xc0",
    ".rept 64",
    ".byte lodge_e, lodge_i, 0xc3, 0xcc",
    ".set lodge_i, lodge_i + 1",
    ".endr",
    ".set lodge_e, lodge_e + 1",
    ".endr",
    ".hidden lodge_softcpu_x87_memory",
    ".globl lodge_softcpu_x87_memory",
    "lodge_softcpu_x87_memory:",
    ".set lodge_e, 0xd8",
    ".rept 8",
    ".set lodge_i, 0x07",
    ".rept 8",
    ".byte lodge_e, lodge_i, 0xc3, 0xcc",
    ".set lodge_i, lodge_i + 8",
    ".endr",
    ".set lodge_e, lodge_e + 1",
    ".endr",
    ".popsection",
);

unsafe extern "C" {
    safe static lodge_softcpu_sse_plain: u8;
    safe static lodge_softcpu_sse_immediate: u8;
    safe static lodge_softcpu_x87_register: u8;
    safe static lodge_softcpu_x87_memory: u8;
}

/// The address of the code of a stub.
pub type Entry = usize;

/// The stub of the instruction that begins with `before` and `opcode`, if there is a table for it.
pub fn plain(before: &[u8], opcode: u8) -> Option<Entry> {
    let table = PLAIN.iter().position(|row| *row == before)?;
    Some((&raw const lodge_softcpu_sse_plain) as usize + table * 2048 + usize::from(opcode) * 8)
}

/// The stub with immediate 0 of the instruction that begins with `bytes`; the one with immediate `i` lies `8 * i`
/// bytes further on.
pub fn immediate(bytes: &[u8]) -> Option<Entry> {
    let table = IMMEDIATE.iter().position(|row| *row == bytes)?;
    Some((&raw const lodge_softcpu_sse_immediate) as usize + table * 2048)
}

/// The stub of the x87 instruction with this first byte (D8H..DFH) and ModRM C0H..FFH.
pub fn x87_register(first: u8, modrm: u8) -> Entry {
    let index = usize::from(first & 7) * 64 + usize::from(modrm & 63);
    (&raw const lodge_softcpu_x87_register) as usize + index * 4
}

/// The stub of the x87 instruction with this first byte (D8H..DFH), a memory operand and `/group`.
pub fn x87_memory(first: u8, group: u8) -> Entry {
    let index = usize::from(first & 7) * 8 + usize::from(group & 7);
    (&raw const lodge_softcpu_x87_memory) as usize + index * 4
}

/// What a stub is called with and what it leaves.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(16))]
pub struct Frame {
    /// XMM0..XMM2.
    pub xmm: [[u64; 2]; 3],
    /// MM1, MM2.
    pub mm: [u64; 2],
    /// RAX, RCX, RDX.
    pub gpr: [u64; 3],
    /// RFLAGS afterwards.
    pub flags: u64,
}

/// `dst` <- op(`dst`, `src`), XMM registers only.
///
/// # Safety
/// `entry` is the stub of an instruction that reads and writes XMM1 and reads XMM2 only. Floating-point operations
/// go by the host's MXCSR: see [`with_mxcsr`].
#[inline(always)]
pub unsafe fn call_xmm(entry: Entry, dst: &mut [u64; 2], src: &[u64; 2]) {
    // SAFETY: the caller's promise. Both operands are 16 readable bytes, and `dst` may be written.
    unsafe {
        asm!(
            "movups xmm1, [{dst}]",
            "movups xmm2, [{src}]",
            "call {entry}",
            "movups [{dst}], xmm1",
            dst = in(reg) dst,
            src = in(reg) src,
            entry = in(reg) entry,
            out("xmm0") _, out("xmm1") _, out("xmm2") _,
        );
    }
}

/// Calls a stub without MMX operands.
///
/// # Safety
/// `entry` is the stub of an SSE instruction without MMX operands.
#[inline]
pub unsafe fn call(entry: Entry, frame: &mut Frame) {
    // SAFETY: the caller's promise; the frame is laid out and aligned as the offsets say.
    unsafe {
        asm!(
            "movaps xmm0, [rdi]",
            "movaps xmm1, [rdi + 16]",
            "movaps xmm2, [rdi + 32]",
            "mov rax, [rdi + 64]",
            "mov rcx, [rdi + 72]",
            "mov rdx, [rdi + 80]",
            "call rsi",
            "pushfq",
            "pop qword ptr [rdi + 88]",
            "movaps [rdi], xmm0",
            "movaps [rdi + 16], xmm1",
            "movaps [rdi + 32], xmm2",
            "mov [rdi + 64], rax",
            "mov [rdi + 72], rcx",
            "mov [rdi + 80], rdx",
            in("rdi") frame,
            in("rsi") entry,
            out("rax") _, out("rcx") _, out("rdx") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _,
        );
    }
}

/// Calls a stub with MMX operands.
///
/// # Safety
/// `entry` is the stub of an SSE or MMX instruction.
#[inline]
pub unsafe fn call_mmx(entry: Entry, frame: &mut Frame) {
    // SAFETY: the caller's promise; the frame is laid out and aligned as the offsets say. EMMS leaves the x87
    // registers as the ABI wants them.
    unsafe {
        asm!(
            "movaps xmm1, [rdi + 16]",
            "movaps xmm2, [rdi + 32]",
            "movq mm1, [rdi + 48]",
            "movq mm2, [rdi + 56]",
            "mov rcx, [rdi + 72]",
            "mov rdx, [rdi + 80]",
            "call rsi",
            "movaps [rdi + 16], xmm1",
            "movaps [rdi + 32], xmm2",
            "movq [rdi + 48], mm1",
            "movq [rdi + 56], mm2",
            "mov [rdi + 72], rcx",
            "mov [rdi + 80], rdx",
            "emms",
            in("rdi") frame,
            in("rsi") entry,
            out("rcx") _, out("rdx") _,
            out("xmm1") _, out("xmm2") _,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
            out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

/// MXCSR with every exception masked and nothing else set: what this process runs with.
pub const MXCSR_DEFAULT: u32 = 0x1f80;
/// The six exception flags of MXCSR.
pub const MXCSR_FLAGS: u32 = 0x3f;

#[inline(always)]
fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

#[inline(always)]
fn set_mxcsr(value: u32) {
    // SAFETY: no reserved bit is set, and no exception is unmasked (the callers see to both).
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, readonly)) };
}

/// Runs `f`, which calls a stub, under the guest's rounding, flush-to-zero and denormals-are-zero controls, with every
/// exception masked. Gives the guest's exception flags and those that `f` raised.
///
/// The host's control bits are as before afterwards. Its exception flags are left where they come to be: nobody reads
/// them, and so the usual case needs no LDMXCSR.
#[inline(always)]
pub fn with_mxcsr(guest: u32, f: impl FnOnce()) -> u32 {
    let flags = guest & MXCSR_FLAGS;
    if guest & !MXCSR_FLAGS == MXCSR_DEFAULT {
        if mxcsr() & MXCSR_FLAGS & !flags != 0 {
            set_mxcsr(guest);
        }
        f();
        return flags | mxcsr() & MXCSR_FLAGS;
    }
    set_mxcsr(guest & 0xffc0 | MXCSR_DEFAULT);
    f();
    let raised = mxcsr() & MXCSR_FLAGS;
    set_mxcsr(MXCSR_DEFAULT);
    flags | raised
}

/// An FXSAVE area for [`call_x87`].
#[repr(C, align(16))]
pub struct X87Image {
    /// FCW, FSW, FTW, FOP, FIP, FDP, MXCSR, MXCSR_MASK.
    pub head: [u8; 32],
    /// ST(0)..ST(7).
    pub st: [[u8; 16]; 8],
    /// XMM registers and the rest, zero.
    pub rest: [u8; 352],
}

/// Calls an x87 stub with the x87 state of `image`, the flags CF, PF and ZF of `flags`, and RDI = `memory`. Gives
/// RFLAGS afterwards. No exception is delivered here, whatever the control word unmasks: x87 exceptions wait for the
/// next x87 instruction, and there is none before the state is saved and replaced.
///
/// # Safety
/// `entry` is an x87 stub that accesses at most `memory`; the image's status word has no unmasked exception pending,
/// and its MXCSR is [`MXCSR_DEFAULT`].
pub unsafe fn call_x87(
    entry: Entry,
    image: &mut X87Image,
    memory: &mut [u8; 16],
    flags: u64,
) -> u64 {
    let mut after = flags & 0x45 | 0x202;
    // SAFETY: the caller's promise; FNINIT leaves the x87 registers as the ABI wants them, and all others that the
    // image held are clobbers.
    unsafe {
        asm!(
            "fxrstor64 [rsi]",
            "push rdx",
            "popfq",
            "call rax",
            "pushfq",
            "pop rdx",
            "fxsave64 [rsi]",
            "fninit",
            in("rax") entry,
            in("rsi") image,
            in("rdi") memory,
            inout("rdx") after,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    after
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    /// Every stub is the instruction it is said to be, and a return.
    #[test]
    fn tables_hold_what_they_say() {
        let check = |entry: Entry, bytes: &[u8]| {
            // SAFETY: the stub's bytes are readable.
            let code = unsafe { std::slice::from_raw_parts(entry as *const u8, bytes.len() + 1) };
            assert_eq!(&code[..bytes.len()], bytes);
            assert_eq!(code[bytes.len()], 0xc3);
        };
        for before in PLAIN {
            for opcode in 0..=255 {
                check(plain(before, opcode).unwrap(), &[before, &[opcode, 0xca][..]].concat());
            }
        }
        for row in IMMEDIATE {
            for i in 0..=255u8 {
                let entry = immediate(row).unwrap() + usize::from(i) * 8;
                let bytes = [row, &[0xca, i][..]].concat();
                check(entry, &bytes);
                let insn = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
                assert_eq!(insn.len(), bytes.len(), "{insn:?}");
            }
        }
        for first in 0xd8..=0xdf {
            for modrm in 0xc0..=0xff {
                check(x87_register(first, modrm), &[first, modrm]);
            }
            for group in 0..8 {
                check(x87_memory(first, group), &[first, group << 3 | 7]);
            }
        }
        assert_eq!(plain(&[0x67], 0), None);
        assert_eq!(immediate(&[0x0f, 0x71]), None);
    }

    #[test]
    fn calls_move_operands_and_results() {
        let mut dst = [1, u64::MAX];
        // SAFETY: PADDQ XMM1, XMM2.
        unsafe { call_xmm(plain(&[0x66, 0x0f], 0xd4).unwrap(), &mut dst, &[41, 2]) };
        assert_eq!(dst, [42, 1]);
        let mut frame = Frame { mm: [5, 6], ..Frame::default() };
        // SAFETY: PADDQ MM1, MM2.
        unsafe { call_mmx(plain(&[0x0f], 0xd4).unwrap(), &mut frame) };
        assert_eq!(frame.mm, [11, 6]);
        let mut frame = Frame { gpr: [0, 0, 7], ..Frame::default() };
        // SAFETY: CVTSI2SD XMM1, RDX.
        unsafe { call(plain(&[0xf2, 0x48, 0x0f], 0x2a).unwrap(), &mut frame) };
        assert_eq!(f64::from_bits(frame.xmm[1][0]), 7.0);
    }

    #[test]
    fn exception_flags_come_from_the_stub_alone() {
        let div = plain(&[0xf2, 0x0f], 0x5e).unwrap();
        let divide = |guest: u32, a: f64, b: f64| {
            let mut dst = [a.to_bits(), 0];
            // SAFETY: DIVSD XMM1, XMM2.
            let flags = with_mxcsr(guest, || unsafe { call_xmm(div, &mut dst, &[b.to_bits(), 0]) });
            (flags, f64::from_bits(dst[0]))
        };
        assert_eq!(divide(0x1f80, 1.0, 0.0), (4, f64::INFINITY));
        assert_eq!(divide(0x1f80, 1.0, 2.0), (0, 0.5));
        assert_eq!(divide(0x1f81, 1.0, 2.0), (1, 0.5));
        // Rounding up, and with exceptions that the guest has unmasked.
        assert_eq!(divide(0x5f80, 1.0, 3.0), (0x20, 0.333_333_333_333_333_37));
        assert_eq!(divide(0x0000, 1.0, 0.0), (4, f64::INFINITY));
        assert_eq!(mxcsr() & !MXCSR_FLAGS, MXCSR_DEFAULT);
    }
}
