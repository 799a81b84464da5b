//! What CPUID tells a guest's kernel.

mod kvm_support;

use iced_x86::code_asm::*;
use kvm_support::*;

const LEAVES: [(u32, u32); 6] = [(0, 0), (1, 0), (7, 0), (0xd, 0), (0xd, 1), (0xd, 2)];
const OUT: u64 = 0x10000;

/// Writes the leaves' registers from OUT on.
fn ask(a: &mut CodeAssembler) {
    a.mov(rdi, OUT).unwrap();
    for (leaf, index) in LEAVES {
        a.mov(eax, leaf).unwrap();
        a.mov(ecx, index).unwrap();
        a.cpuid().unwrap();
        for (i, register) in [eax, ebx, ecx, edx].into_iter().enumerate() {
            a.mov(dword_ptr(rdi + 4 * i), register).unwrap();
        }
        a.add(rdi, 16).unwrap();
    }
}

fn answers(m: &Machine) -> Vec<[u32; 4]> {
    (0..LEAVES.len() as u64)
        .map(|i| std::array::from_fn(|j| m.read(OUT + i * 16 + j as u64 * 4)))
        .collect()
}

/// What a guest's kernel is shown must be what this host's KVM can hold; kvm_pvm adds to it (docs/kvm.md).
#[test]
fn the_kernel_is_shown_no_state_that_kvm_cannot_hold() {
    if !kvm_is_here("the_kernel_is_shown_no_state_that_kvm_cannot_hold") {
        return;
    }
    let m = Machine::new(1);
    m.page_tables();
    m.load(CODE, 64, |a| {
        ask(a);
        a.out(u32::from(DONE_PORT), al).unwrap();
    });
    let mut vcpu = m.start(0, long64);
    m.run(&mut *vcpu);
    let answers = answers(&m);
    let [max, ..] = answers[0];
    // As kernels do: a leaf behind the last one is none.
    let leaf = |i: usize| if LEAVES[i].0 <= max { answers[i] } else { [0; 4] };
    let xsave = answers[1][2] & 1 << 26 != 0 && max >= 0xd;
    let states = leaf(3)[0];
    assert_eq!(states != 0, xsave, "{states:#x}");
    // What is shown can be set: XCR0 keeps it.
    if xsave {
        assert_eq!(states & 3, 3, "x87 and SSE");
        let mut state = vcpu.state().unwrap();
        state.xcr0 = states.into();
        vcpu.set_state(&state).unwrap();
        assert_eq!(vcpu.state().unwrap().xcr0, u64::from(states));
        assert!(vcpu.state().unwrap().xsave.len() >= leaf(3)[2] as usize);
        // Each state lies inside of the whole.
        let [size, offset, ..] = leaf(5);
        assert!(states & 4 == 0 || size + offset <= leaf(3)[2]);
    }
    if !SOFT {
        let avx2 = leaf(2)[1] & 1 << 5 != 0;
        assert!(!avx2 || states & 4 != 0, "AVX2 without its registers' state");
    }
}
