//! Why KVM_RUN returned, in words, for the exits that a machine does not go on from.

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_NMI, KVM_EXIT_UNKNOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};

use crate::state::VcpuState;

/// An entry into the guest that the CPU refused: KVM_EXIT_FAIL_ENTRY.
pub(super) fn fail_entry(reason: u64, cpu: u32) -> String {
    // VT-x: the basic exit reason with bit 31 set, or the VM-instruction error (SDM volume 3,
    // 26.8 and 30.4); AMD-V: VMEXIT_INVALID (-1; APM volume 2, 15.5).
    let meaning = match reason {
        0x8000_0021 => "VT-x: the guest's registers do not fit together",
        0x8000_0022 => "VT-x: loading the guest's MSRs failed",
        0x8000_0029 => "VT-x: a machine check came on entry",
        7 => "VT-x: the controls that KVM chose are not valid",
        8 => "VT-x: the host's registers that KVM saved are not valid",
        u64::MAX | 0xffff_ffff => "AMD-V: the guest's registers do not fit together",
        _ => "a reason that is not known here",
    };
    format!("host CPU {cpu} refused to enter the guest, reason {reason:#x} ({meaning})")
}

/// An internal error other than a failed emulation: KVM_EXIT_INTERNAL_ERROR.
pub(super) fn internal(suberror: u32, data: &[u64]) -> String {
    let meaning = match suberror {
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception came while another one was being delivered",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "delivering an event to the guest failed",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the CPU left the guest for a reason that KVM does not know"
        }
        _ => "an internal error that is not known here",
    };
    format!("KVM gave up with suberror {suberror}: {meaning}; its data is {data:x?}")
}

/// The bytes of the instruction that could not be emulated, if KVM told them: flags, then a length and
/// 15 bytes (`struct kvm_run`, `emulation_failure`).
pub(super) fn instruction(data: &[u64]) -> String {
    let told = data.first().is_some_and(|flags| flags & 1 != 0);
    let bytes: Vec<u8> = data.iter().skip(1).take(2).flat_map(|word| word.to_le_bytes()).collect();
    match bytes.split_first() {
        Some((len, bytes)) if told => {
            format!("{:02x?}", &bytes[..usize::from(*len).min(bytes.len())])
        }
        _ => "bytes unknown".into(),
    }
}

/// An instruction that KVM lacks and that nobody else can do.
pub(super) fn lacking(what: &str) -> String {
    format!(
        "this host's KVM lacks the instruction there, and it {what}. Ways out: a newer host kernel, \
         or `--accel soft`"
    )
}

/// Any other exit that was not asked for.
pub(super) fn unexpected(reason: u32) -> String {
    let name = match reason {
        KVM_EXIT_UNKNOWN => "unknown",
        KVM_EXIT_EXCEPTION => "exception",
        KVM_EXIT_HYPERCALL => "hypercall",
        KVM_EXIT_DEBUG => "debug",
        KVM_EXIT_HLT => "halt, which the kernel should handle",
        KVM_EXIT_NMI => "NMI",
        KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => "MSR access",
        KVM_EXIT_MEMORY_FAULT => "memory fault",
        _ => "one that is not known here",
    };
    format!("KVM stopped it with exit {reason} ({name}), which was not asked for")
}

/// Where the vCPU is, for people.
pub(super) fn place(state: &VcpuState) -> String {
    let cs = &state.segments[1];
    let bits = |wide: bool| if wide { 32 } else { 16 };
    let default_big = cs.attributes & 1 << 14 != 0;
    let mode = if state.cr0 & 1 == 0 {
        "real mode".into()
    } else if state.rflags & 1 << 17 != 0 {
        "virtual-8086 mode".into()
    } else if state.efer & 1 << 10 != 0 && cs.attributes & 1 << 13 != 0 {
        "64-bit mode".into()
    } else if state.efer & 1 << 10 != 0 {
        format!("{}-bit compatibility mode", bits(default_big))
    } else {
        format!("{}-bit protected mode", bits(default_big))
    };
    let cpl = state.segments[2].attributes >> 5 & 3;
    format!("at {:#x}:{:#x} in {mode}, privilege level {cpl}", cs.selector, state.rip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named() {
        let mut state = VcpuState { rip: 0xfff0, ..Default::default() };
        state.segments[1].selector = 0xf000;
        assert_eq!(place(&state), "at 0xf000:0xfff0 in real mode, privilege level 0");
        state.cr0 = 1;
        state.segments[1].attributes = 1 << 14;
        assert!(place(&state).contains("32-bit protected mode"));
        state.efer = 1 << 10;
        state.segments[1].attributes = 1 << 13;
        state.segments[2].attributes = 3 << 5;
        assert!(place(&state).contains("64-bit mode, privilege level 3"));
    }

    #[test]
    fn instructions_are_named_by_their_bytes() {
        assert_eq!(instruction(&[1, 0x0102_cb01_0f03, 0]), "[0f, 01, cb]");
        assert_eq!(
            instruction(&[1, 0xff, 0]),
            "[00, 00, 00, 00, 00, 00, 00, 00, 00, 00, 00, 00, 00, 00, 00]"
        );
        for untold in [&[][..], &[0, 0xcb03], &[1]] {
            assert_eq!(instruction(untold), "bytes unknown");
        }
    }

    #[test]
    fn entry_failures_are_explained() {
        assert!(fail_entry(0x8000_0021, 3).contains("do not fit together"));
        assert!(fail_entry(u64::MAX, 0).contains("AMD-V"));
        assert!(internal(3, &[1, 2]).contains("delivering an event"));
    }
}
