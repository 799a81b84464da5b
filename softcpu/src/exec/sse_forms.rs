//! What each SSE and MMX instruction form is: which stub, where its operands lie, what it needs.
//!
//! The table is made once, from the decoder's own description of the opcodes; see [`super::stubs`] for the stubs.

use std::sync::LazyLock;

use iced_x86::{
    Code, CpuidFeature, EncodingKind, MandatoryPrefix, OpCodeInfo, OpCodeOperandKind,
    OpCodeTableKind,
};

use super::stubs::{self, Entry};

/// How a form is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Not an instruction of these sets, or one that the host does not have.
    None,
    /// Only XMM registers and memory of 16 bytes or less, as `op0 <- op(op0, op1)`.
    Xmm,
    /// Any mixture of XMM and general-purpose registers and memory.
    Mixed,
    /// MM registers take part.
    Mmx,
    /// Shifts by an immediate; the stub is the one with the count in a register.
    ShiftImmediate,
    /// PSLLDQ and PSRLDQ.
    ShiftBytes {
        /// Towards higher bytes.
        left: bool,
    },
    /// Load 16 bytes, or copy the register.
    Load16,
    /// Store 16 bytes, or copy the register.
    Store16,
    /// MOVSS, MOVSD: a load clears the rest, a copy leaves it.
    LoadScalar,
    /// MOVSS, MOVSD to memory or a register, whose rest is left.
    StoreScalar,
    /// MOVD, MOVQ to an XMM register; the rest is cleared.
    LoadZero,
    /// MOVD, MOVQ from an XMM register to memory or a general-purpose register.
    StoreLow,
    /// MOVQ from an XMM register to memory or an XMM register, whose rest is cleared.
    StoreQuad,
    /// MOVLPS, MOVLPD, MOVHPS, MOVHPD from memory.
    LoadHalf {
        /// The high half.
        high: bool,
    },
    /// The same to memory.
    StoreHalf {
        /// The high half.
        high: bool,
    },
    /// MOVNTI.
    StoreInteger,
    /// MOVNTQ.
    StoreMmx,
    /// MASKMOVDQU, MASKMOVQ.
    MaskedStore,
    /// EMMS.
    Emms,
    /// LDMXCSR.
    Ldmxcsr,
    /// STMXCSR.
    Stmxcsr,
    /// Fences and prefetches.
    Nothing,
}

/// An instruction form.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    /// How it is executed.
    pub kind: Kind,
    /// Its stub; with an immediate the one for immediate 0.
    pub entry: Entry,
    /// The stub depends on the immediate.
    pub immediate: bool,
    /// A 16-byte memory operand must be aligned.
    pub aligned: bool,
    /// It goes by MXCSR.
    pub mxcsr: bool,
    /// It sets the status flags.
    pub flags: bool,
    /// CR4.OSFXSR must be set.
    pub osfxsr: bool,
    /// Bytes of a result element whose being denormal means underflow; 0 if results cannot underflow.
    pub underflow: u8,
    /// Result elements that `underflow` speaks of.
    pub elements: u8,
    /// DPPS or DPPD: what underflows may be a product or a partial sum.
    pub dot: bool,
    /// Operand 0 is the one that ModRM's r/m field names.
    pub to_rm: bool,
    /// Where operands 0 and 1 lie.
    pub class: [Class; 2],
    /// What is read or written beside the operands.
    pub implicit: Implicit,
}

/// The register file that an operand lies in (or would, were it not memory).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// XMM registers.
    Xmm,
    /// MM registers.
    Mm,
    /// General-purpose registers.
    Gpr,
}

/// Operands that the encoding does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implicit {
    /// None.
    None,
    /// XMM0 is read.
    Xmm0,
    /// EAX and EDX may be read, ECX is written.
    Index,
    /// EAX and EDX may be read, XMM0 is written.
    Mask,
}

const NONE: Form = Form {
    kind: Kind::None,
    entry: 0,
    immediate: false,
    aligned: false,
    mxcsr: false,
    flags: false,
    osfxsr: false,
    underflow: 0,
    elements: 0,
    dot: false,
    to_rm: false,
    class: [Class::Xmm; 2],
    implicit: Implicit::None,
};

static FORMS: LazyLock<Vec<Form>> = LazyLock::new(|| Code::values().map(form).collect());

/// The form of `code`.
#[inline]
pub fn of(code: Code) -> &'static Form {
    static NOTHING: Form = NONE;
    FORMS.get(code as usize).unwrap_or(&NOTHING)
}

fn host_has(feature: CpuidFeature) -> bool {
    match feature {
        CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 => true,
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        _ => false,
    }
}

fn form(code: Code) -> Form {
    let info = code.op_code();
    let ours = code.encoding() == EncodingKind::Legacy
        && info.is_instruction()
        && code.cpuid_features().iter().all(|feature| host_has(*feature));
    if !ours {
        return NONE;
    }
    let kind = move_kind(code).unwrap_or_else(|| stub_kind(code, info));
    let (entry, immediate) = match kind {
        Kind::Xmm | Kind::Mixed | Kind::Mmx | Kind::ShiftImmediate => match stub_of(info, kind) {
            Some(found) => found,
            None => return NONE,
        },
        _ => (0, false),
    };
    let mxcsr = uses_mxcsr(info);
    let (underflow, elements) = if mxcsr { underflow(info) } else { (0, 0) };
    let plain = matches!(
        kind,
        Kind::StoreInteger | Kind::Nothing | Kind::Emms | Kind::Ldmxcsr | Kind::Stmxcsr
    );
    let touches_xmm = info.op_kinds().iter().any(|k| class(*k) == Some(Class::Xmm));
    Form {
        kind,
        entry,
        immediate,
        aligned: info.memory_size().size() == 16 && !may_be_unaligned(code),
        mxcsr,
        flags: sets_flags(info),
        osfxsr: (touches_xmm && !plain) || matches!(kind, Kind::Ldmxcsr | Kind::Stmxcsr),
        underflow,
        elements,
        dot: info.table() == OpCodeTableKind::T0F3A && matches!(info.op_code(), 0x40 | 0x41),
        to_rm: names_rm(info),
        class: [0, 1].map(|i| operand_class(info, i)),
        implicit: implicit_operands(info),
    }
}

fn operand_class(info: &OpCodeInfo, i: u32) -> Class {
    info.try_op_kind(i).ok().and_then(class).unwrap_or(Class::Xmm)
}

fn names_rm(info: &OpCodeInfo) -> bool {
    use OpCodeOperandKind as K;
    let kind = info.try_op_kind(0).unwrap_or(K::None);
    !matches!(kind, K::xmm_reg | K::mm_reg | K::r32_reg | K::r64_reg)
}

/// Moves, and what else is done without a stub.
fn move_kind(code: Code) -> Option<Kind> {
    use Code::*;
    Some(match code {
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128
        | Movdqa_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 | Movntdqa_xmm_m128 => {
            Kind::Load16
        }
        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movaps_xmmm128_xmm | Movapd_xmmm128_xmm
        | Movdqa_xmmm128_xmm | Movdqu_xmmm128_xmm | Movntps_m128_xmm | Movntpd_m128_xmm
        | Movntdq_m128_xmm => Kind::Store16,
        Movss_xmm_xmmm32 | Movsd_xmm_xmmm64 => Kind::LoadScalar,
        Movss_xmmm32_xmm | Movsd_xmmm64_xmm => Kind::StoreScalar,
        Movd_xmm_rm32 | Movq_xmm_rm64 | Movq_xmm_xmmm64 => Kind::LoadZero,
        Movd_rm32_xmm | Movq_rm64_xmm => Kind::StoreLow,
        Movq_xmmm64_xmm => Kind::StoreQuad,
        Movlps_xmm_m64 | Movlpd_xmm_m64 => Kind::LoadHalf { high: false },
        Movhps_xmm_m64 | Movhpd_xmm_m64 => Kind::LoadHalf { high: true },
        Movlps_m64_xmm | Movlpd_m64_xmm => Kind::StoreHalf { high: false },
        Movhps_m64_xmm | Movhpd_m64_xmm => Kind::StoreHalf { high: true },
        Movnti_m32_r32 | Movnti_m64_r64 => Kind::StoreInteger,
        Movntq_m64_mm => Kind::StoreMmx,
        Maskmovq_rDI_mm_mm | Maskmovdqu_rDI_xmm_xmm => Kind::MaskedStore,
        Pslldq_xmm_imm8 => Kind::ShiftBytes { left: true },
        Psrldq_xmm_imm8 => Kind::ShiftBytes { left: false },
        Emms => Kind::Emms,
        Ldmxcsr_m32 => Kind::Ldmxcsr,
        Stmxcsr_m32 => Kind::Stmxcsr,
        Prefetchnta_m8 | Prefetcht0_m8 | Prefetcht1_m8 | Prefetcht2_m8 => Kind::Nothing,
        _ => return fence(code),
    })
}

/// All 24 encodings of the three fences.
fn fence(code: Code) -> Option<Kind> {
    let info = code.op_code();
    let fence = info.op_count() == 0 && info.op_code_len() == 2 && info.op_code() >> 8 == 0xae;
    fence.then_some(Kind::Nothing)
}

fn class(kind: OpCodeOperandKind) -> Option<Class> {
    use OpCodeOperandKind as K;
    Some(match kind {
        K::xmm_reg | K::xmm_rm | K::xmm_or_mem => Class::Xmm,
        K::mm_reg | K::mm_rm | K::mm_or_mem => Class::Mm,
        K::r32_reg | K::r64_reg | K::r32_or_mem | K::r64_or_mem => Class::Gpr,
        _ => return None,
    })
}

fn stub_kind(code: Code, info: &OpCodeInfo) -> Kind {
    if info.group_index() >= 0 {
        let shift = info.table() == OpCodeTableKind::T0F && (0x71..=0x73).contains(&info.op_code());
        return if shift { Kind::ShiftImmediate } else { Kind::None };
    }
    let classes: Vec<_> = info.op_kinds().iter().filter_map(|k| class(*k)).collect();
    // CRC32 and POPCNT are with the integer instructions.
    if classes.len() != 2 || classes == [Class::Gpr, Class::Gpr] {
        return Kind::None;
    }
    if classes.contains(&Class::Mm) {
        return Kind::Mmx;
    }
    // INSERTPS reads another element from memory than from a register.
    let plain = classes == [Class::Xmm, Class::Xmm] && code != Code::Insertps_xmm_xmmm32_imm8;
    if plain && !sets_flags(info) && implicit_operands(info) == Implicit::None {
        Kind::Xmm
    } else {
        Kind::Mixed
    }
}

fn implicit_operands(info: &OpCodeInfo) -> Implicit {
    match (info.table(), info.op_code()) {
        (OpCodeTableKind::T0F38, 0x10 | 0x14 | 0x15 | 0xcb) => Implicit::Xmm0,
        (OpCodeTableKind::T0F3A, 0x60 | 0x62) => Implicit::Mask,
        (OpCodeTableKind::T0F3A, 0x61 | 0x63) => Implicit::Index,
        _ => Implicit::None,
    }
}

fn sets_flags(info: &OpCodeInfo) -> bool {
    match info.table() {
        OpCodeTableKind::T0F => matches!(info.op_code(), 0x2e | 0x2f),
        OpCodeTableKind::T0F38 => info.op_code() == 0x17,
        OpCodeTableKind::T0F3A => matches!(info.op_code(), 0x60..=0x63),
        _ => false,
    }
}

fn may_be_unaligned(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Movups_xmm_xmmm128
            | Movupd_xmm_xmmm128
            | Movdqu_xmm_xmmm128
            | Movups_xmmm128_xmm
            | Movupd_xmmm128_xmm
            | Movdqu_xmmm128_xmm
            | Lddqu_xmm_m128
            | Pcmpestrm_xmm_xmmm128_imm8
            | Pcmpestrm64_xmm_xmmm128_imm8
            | Pcmpestri_xmm_xmmm128_imm8
            | Pcmpestri64_xmm_xmmm128_imm8
            | Pcmpistrm_xmm_xmmm128_imm8
            | Pcmpistri_xmm_xmmm128_imm8
    )
}

/// The instructions that round, convert, compare or compute floating-point numbers.
fn uses_mxcsr(info: &OpCodeInfo) -> bool {
    match info.table() {
        OpCodeTableKind::T0F => matches!(
            info.op_code(),
            0x2a | 0x2c..=0x2f | 0x51 | 0x58..=0x5f | 0x7c | 0x7d | 0xc2 | 0xd0 | 0xe6
        ),
        OpCodeTableKind::T0F3A => matches!(info.op_code(), 0x08..=0x0b | 0x40 | 0x41),
        _ => false,
    }
}

/// Size and number of result elements, for operations whose exact result may be denormal.
fn underflow(info: &OpCodeInfo) -> (u8, u8) {
    use MandatoryPrefix as P;
    let arithmetic = match (info.table(), info.op_code(), info.mandatory_prefix()) {
        (OpCodeTableKind::T0F, 0x5a, P::P66) => return (4, 2),
        (OpCodeTableKind::T0F, 0x5a, P::PF2) => return (4, 1),
        (OpCodeTableKind::T0F, 0x58 | 0x59 | 0x5c | 0x5e, _) => true,
        (OpCodeTableKind::T0F, 0x7c | 0x7d | 0xd0, P::PF2) => return (4, 4),
        (OpCodeTableKind::T0F, 0x7c | 0x7d | 0xd0, _) => return (8, 2),
        (OpCodeTableKind::T0F3A, 0x40, _) => return (4, 4),
        (OpCodeTableKind::T0F3A, 0x41, _) => return (8, 2),
        _ => false,
    };
    match info.mandatory_prefix() {
        _ if !arithmetic => (0, 0),
        P::P66 => (8, 2),
        P::PF2 => (8, 1),
        P::PF3 => (4, 1),
        _ => (4, 4),
    }
}

/// The stub, and whether an immediate selects it.
fn stub_of(info: &OpCodeInfo, kind: Kind) -> Option<(Entry, bool)> {
    let mut bytes = Vec::with_capacity(6);
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        _ => {}
    }
    let opcode = u8::try_from(info.op_code()).ok()?;
    if kind == Kind::ShiftImmediate {
        bytes.push(0x0f);
        // 71 /2 (PSRLW) is D1 with the count in a register; /4 is E1, /6 is F1; 72 and 73 alike.
        let row = [0xd0, 0xe0, 0xf0].get((info.group_index() / 2 - 1) as usize)?;
        return Some((stubs::plain(&bytes, row | opcode & 3)?, false));
    }
    // MOVMSKPS, PMOVMSKB, PEXTRW and the like give the same with and without REX.W; conversions and 64-bit elements
    // do not.
    let wide = info.operand_size() == 64;
    let escape: &[u8] = match info.table() {
        OpCodeTableKind::T0F => &[0x0f],
        OpCodeTableKind::T0F38 => &[0x0f, 0x38],
        OpCodeTableKind::T0F3A => &[0x0f, 0x3a],
        _ => return None,
    };
    let with = |rex: bool| {
        let mut all = bytes.clone();
        if rex {
            all.push(0x48);
        }
        all.extend_from_slice(escape);
        all
    };
    let takes_immediate = info.op_kinds().iter().any(|k| matches!(k, OpCodeOperandKind::imm8));
    let find = |rex: bool| {
        let mut before = with(rex);
        if takes_immediate {
            before.push(opcode);
            return stubs::immediate(&before);
        }
        stubs::plain(&before, opcode)
    };
    let entry = if wide { find(true).or_else(|| find(false)) } else { find(false) };
    Some((entry?, takes_immediate))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instruction of the sets that we have has a form; nothing else has.
    #[test]
    fn all_of_the_sets_are_there() {
        let integer = [
            CpuidFeature::SSE4_2, // CRC32
        ];
        for code in Code::values() {
            let info = code.op_code();
            let features = code.cpuid_features();
            let ours = code.encoding() == EncodingKind::Legacy
                && info.is_instruction()
                && features.iter().all(|f| host_has(*f));
            let crc = features == integer && info.op_kind(0) != OpCodeOperandKind::xmm_reg;
            assert_eq!(of(code).kind != Kind::None, ours && !crc, "{code:?}");
        }
    }

    #[test]
    fn forms_are_what_the_manual_says() {
        let paddd = of(Code::Paddd_xmm_xmmm128);
        assert!(paddd.kind == Kind::Xmm && paddd.aligned && !paddd.mxcsr && paddd.osfxsr);
        let addss = of(Code::Addss_xmm_xmmm32);
        assert!(addss.kind == Kind::Xmm && !addss.aligned && addss.mxcsr);
        assert_eq!((addss.underflow, addss.elements), (4, 1));
        assert!(of(Code::Comisd_xmm_xmmm64).flags && of(Code::Ptest_xmm_xmmm128).flags);
        assert!(!of(Code::Pcmpistri_xmm_xmmm128_imm8).aligned);
        assert!(!of(Code::Paddd_mm_mmm64).osfxsr && of(Code::Cvtpi2ps_xmm_mmm64).osfxsr);
        assert!(!of(Code::Movnti_m32_r32).osfxsr && of(Code::Ldmxcsr_m32).osfxsr);
        assert_eq!(of(Code::VEX_Vpaddd_xmm_xmm_xmmm128).kind, Kind::None);
    }
}
