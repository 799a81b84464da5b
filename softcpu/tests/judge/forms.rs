//! Which instruction forms are judged, and their encodings with random prefixes and operands.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, MandatoryPrefix, Mnemonic,
    OpCodeInfo, OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
};

use super::case::{Bits, USER64_CS};
use super::random::Rng;

/// What a guest may use without the CPU having been told more: x86-64-v2 and what is judged beside it.
fn shown(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::MULTIBYTENOP
            | F::CMOV
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::POPCNT
            | F::CX8
            | F::CMPXCHG16B
            | F::FXSR
            | F::XSAVE
            | F::XSAVEOPT
            | F::FSGSBASE
            | F::PAUSE
            | F::CLFSH
            | F::PREFETCHW
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
    )
}

/// Left out, each for a reason.
fn excluded(code: Code, bits: Bits) -> bool {
    use Mnemonic as M;
    let info = code.op_code();
    match code.mnemonic() {
        // Different by design: time, identification, what the kernel answers.
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Xgetbv | M::Rdrand | M::Rdseed => true,
        M::Syscall | M::Sysenter | M::Int | M::Into | M::Int1 | M::Int3 => true,
        // Linux answers for the processor (UMIP).
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => true,
        // The decoder's notation for what is two instructions; what other makers had.
        M::Fstenv
        | M::Fsave
        | M::Fstcw
        | M::Fstsw
        | M::Fclex
        | M::Finit
        | M::Feni
        | M::Fdisi
        | M::Fsetpm
        | M::Frstpm
        | M::Fstdw
        | M::Fstsg
        | M::Fnstdw
        | M::Fnstsg => true,
        // Far pointers with 64-bit offsets are Intel's alone; MOVSXD to 16 bits reads 32 on AMD.
        _ if matches!(
            code,
            Code::Jmp_m1664
                | Code::Call_m1664
                | Code::Lfs_r64_m1664
                | Code::Lgs_r64_m1664
                | Code::Lss_r64_m1664
                | Code::Movsxd_r16_rm16
        ) =>
        {
            true
        }
        // BSWAP of 16 bits is undefined.
        M::Bswap if code == Code::Bswap_r16 => true,
        // Reserved NOPs that CET and MPX have taken, and UD0's operand, differ from maker to maker.
        M::Reservednop | M::Ud0 | M::Ud1 => true,
        // In 64-bit mode an operand-size prefix on near branches means something else on AMD.
        _ if bits == Bits::B64
            && info.operand_size() == 16
            && code.op_code().flow_control_is_near() =>
        {
            true
        }
        _ => false,
    }
}

trait NearBranch {
    fn flow_control_is_near(&self) -> bool;
}

impl NearBranch for OpCodeInfo {
    fn flow_control_is_near(&self) -> bool {
        let far = self
            .op_kinds()
            .iter()
            .any(|k| matches!(k, OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2));
        self.code().flow_control() != FlowControl::Next && !far
    }
}

/// The forms that are judged in a mode.
pub fn codes(bits: Bits) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let in_mode = match bits {
                Bits::B16 => info.mode16(),
                Bits::B32 => info.mode32(),
                Bits::B64 => info.mode64(),
            };
            code.encoding() == EncodingKind::Legacy
                && info.is_instruction()
                && in_mode
                && code.cpuid_features().iter().all(|f| shown(*f))
                && !excluded(*code, bits)
        })
        .collect()
}

/// It has an explicit memory operand.
pub fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Not within a run: what makes the flags, the stack or the segments something else for the rest of it.
pub fn in_runs_unfit(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let ports = matches!(
        insn.mnemonic(),
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
    );
    ports
        || insn.is_privileged()
        || insn.code() == Code::Enterd_imm16_imm8
        || matches!(
            insn.mnemonic(),
            M::Popf
                | M::Popfd
                | M::Popfq
                | M::Lar
                | M::Lsl
                | M::Verr
                | M::Verw
                | M::Lds
                | M::Les
                | M::Lfs
                | M::Lgs
                | M::Lss
                | M::Xsave
                | M::Xsave64
                | M::Xsaveopt
                | M::Xsaveopt64
                | M::Fnstenv
                | M::Fnsave
                | M::Fxsave
                | M::Fxsave64
                | M::Bsf
                | M::Bsr
                | M::Shld
                | M::Shrd
                | M::Arpl
                | M::Xrstor
                | M::Xrstor64
                | M::Maskmovq
                | M::Maskmovdqu
                | M::Aaa
                | M::Aas
                | M::Daa
                | M::Das
        )
        || (0..insn.op_count()).any(|i| insn.op_register(i).is_segment_register())
}

/// Encodings that decode, but whose meaning the makers do not agree about.
pub fn unfit(insn: &Instruction, bits: Bits) -> bool {
    let near = matches!(
        insn.flow_control(),
        FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Call
            | FlowControl::IndirectCall
            | FlowControl::Return
    );
    let state = matches!(
        insn.mnemonic(),
        Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
    );
    let names = |register: Register| {
        insn.memory_base().full_register() == register
            || insn.memory_index().full_register() == register
    };
    // LOCK MOV CR8, an AMD extension.
    insn.has_lock_prefix() && insn.mnemonic() == Mnemonic::Mov
        // XCHG R8, RAX or PAUSE.
        || insn.mnemonic() == Mnemonic::Pause && insn.len() > 2
        // AMD lets SHA's operands be unaligned, Intel does not.
        || insn.cpuid_features() == [CpuidFeature::SHA] && has_memory(insn)
        // EDX:EAX must be what the guest may ask for.
        || state && (names(Register::RAX) || names(Register::RDX))
        || near && bits == Bits::B64 && insn.code().op_code().operand_size() == 16
        // To 64-bit code: see `operands::stay_out_of_64_bits`.
        || bits != Bits::B64 && far_selector(insn) & !3 == USER64_CS & !3
}

/// Where a direct far branch goes.
fn far_selector(insn: &Instruction) -> u16 {
    match insn.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 => insn.far_branch_selector(),
        _ => 0,
    }
}

/// Encodes `info` with random prefixes, ModRM and the rest.
pub fn encode(rng: &mut Rng, info: &OpCodeInfo, bits: Bits) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    if rng.chance(15) {
        bytes.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    let default = if bits == Bits::B16 { 16 } else { 32 };
    let other_size = match info.operand_size() {
        0 => info.mandatory_prefix() == MandatoryPrefix::None && rng.chance(6),
        64 => false,
        size => size != default,
    };
    if other_size {
        bytes.push(0x66);
    }
    let address = match bits {
        Bits::B16 => 16,
        Bits::B32 => 32,
        Bits::B64 => 64,
    };
    if if info.address_size() == 0 { rng.chance(12) } else { info.address_size() != address } {
        bytes.push(0x67);
    }
    if info.can_use_lock_prefix() && rng.chance(25) {
        bytes.push(0xf0);
    }
    if info.can_use_rep_prefix() && rng.chance(50) {
        bytes.push(0xf3);
    } else if info.can_use_repne_prefix() && rng.chance(50) {
        bytes.push(0xf2);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        _ => {}
    }
    if bits == Bits::B64 && (info.operand_size() == 64 || rng.chance(40)) {
        let wide = info.operand_size() == 64 && !(info.default_op_size64() && rng.chance(80));
        bytes.push(0x40 | u8::from(wide) << 3 | rng.next() as u8 & 7);
    }
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    use OpCodeOperandKind as K;
    let in_opcode = info.op_kinds().iter().any(|k| {
        matches!(k, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
    });
    let register = if in_opcode { rng.next() as u8 & 7 } else { 0 };
    let opcode = info.op_code();
    if info.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
    }
    bytes.push(opcode as u8 | register);
    let mut modrm = rng.next() as u8;
    if rng.chance(35) {
        modrm |= 0xc0;
    }
    if info.group_index() >= 0 {
        modrm = modrm & 0xc7 | (info.group_index() as u8) << 3;
    }
    bytes.push(modrm);
    for _ in 0..3 {
        bytes.extend(rng.next().to_le_bytes());
    }
    bytes
}
