//! Exceptions, their frames, and exceptions on the way to a handler.

use crate::guest::{Guest, IDT, Mode, compare, x86};
use crate::{BOTH, IOPL3, in_modes};
use iced_x86::code_asm::*;

#[test]
fn faults_and_their_frames() {
    in_modes("faults", &BOTH, |g| {
        g.attempt(|g| x86!(&mut g.a, xor ecx, ecx; xor edx, edx; div ecx;));
        g.attempt(|g| x86!(&mut g.a, ud2;));
        g.attempt(|g| x86!(&mut g.a, int3;));
        g.attempt(|g| x86!(&mut g.a, int 0x81;));
        g.attempt(|g| x86!(&mut g.a, int 0x82;));
        g.attempt(|g| x86!(&mut g.a, int 0x83;));
        g.attempt(|g| x86!(&mut g.a, int 0x84;));
        g.attempt(|g| x86!(&mut g.a, int 0x85;));
        g.attempt(|g| x86!(&mut g.a, sti; int 0x83;));
        g.attempt(|g| x86!(&mut g.a, sti; int 0x80;));
        for user in [false, true] {
            for vector in [3i32, 0x40, 0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86] {
                g.attempt(|g| match user {
                    true => g.user(IOPL3 | 0x200, |g| x86!(&mut g.a, int vector;)),
                    false => x86!(&mut g.a, int vector;),
                });
            }
        }
        for flags in [2u32, 0x202, 0x3002, 0x4_0002, 0x20_0002, 0x1002, 0x402] {
            g.attempt(|g| g.user(flags, |g| x86!(&mut g.a, ud2;)));
        }
        // What CPL 3 may not do.
        type Emit = fn(&mut Guest);
        let denied: [Emit; 14] = [
            |g| x86!(&mut g.a, hlt;),
            |g| x86!(&mut g.a, clts;),
            |g| x86!(&mut g.a, wbinvd;),
            |g| x86!(&mut g.a, invd;),
            |g| x86!(&mut g.a, mov ecx, 0x10u32; rdmsr;),
            |g| x86!(&mut g.a, mov ecx, 0xc000_0100u32; wrmsr;),
            |g| x86!(&mut g.a, lmsw ax;),
            |g| x86!(&mut g.a, lgdt ptr(0x1000);),
            |g| x86!(&mut g.a, lidt ptr(0x1000);),
            |g| x86!(&mut g.a, lldt ax;),
            |g| x86!(&mut g.a, ltr ax;),
            |g| x86!(&mut g.a, cli;),
            |g| x86!(&mut g.a, sti;),
            |g| x86!(&mut g.a, in_ al, 0x80;),
        ];
        for emit in denied {
            g.attempt(|g| g.user(2, emit));
        }
    });
}

#[test]
fn double_faults() {
    in_modes("double", &BOTH, |g| {
        // #GP and #NP without handlers, #UD without one (no double fault, but #NP), #PF.
        let size = if g.mode == Mode::Long { 16 } else { 8 };
        for vector in [13, 11, 6, 0] {
            g.poke(IDT + size * vector + 4, 0xe00);
        }
        g.attempt(|g| x86!(&mut g.a, ud2;));
        g.attempt(|g| x86!(&mut g.a, int 0x82;));
        g.attempt(|g| x86!(&mut g.a, mov eax, 0xfff8u32; mov ds, eax;));
        g.attempt(|g| x86!(&mut g.a, xor ecx, ecx; div ecx;));
    });
    compare("double-pf", Mode::Long, |g| {
        g.poke(IDT + 16 * 14 + 4, 0xe00);
        g.attempt(|g| x86!(&mut g.a, mov eax, dword_ptr(0x7000_0000);));
        // The stack that #PF would be pushed to is not there.
        g.poke(IDT + 16 * 14 + 4, 0xf_8e00);
        g.attempt(|g| x86!(&mut g.a, mov rsp, 0x7000_0000u64; push rax;));
        g.attempt(|g| x86!(&mut g.a, mov rax, 0x8000_0000_0000u64; mov rax, qword_ptr(rax);));
        // Not by RBP, which is #SS, nor jumps, whose fault is the jump's: QEMU has #GP, and at the target.
        g.attempt(|g| x86!(&mut g.a, mov rax, 0x8000_0000_0000u64; mov rsp, rax; push rax;));
    });
}
