//! SYSCALL, SYSENTER and the bases that system calls switch.

use crate::guest::{Guest, Mode, compare, sel, x86};
use crate::{BOTH, in_modes, set_cr4};
use iced_x86::code_asm::*;

/// Tells RAX, RCX, R11, RSP, CS, SS and the flags.
fn tell_state(g: &mut Guest) {
    x86!(&mut g.a, pushfq; pop rbx; and rbx, 0x3e_7700; mov rax, rsp; mov esp, 0x9000; call 0xf_c000u64;
        mov rax, rcx; call 0xf_c000u64; mov rax, r11; and rax, 0x3e_7702; call 0xf_c000u64; mov rax, rbx;
        call 0xf_c000u64; mov eax, cs; call 0xf_c000u64; mov eax, ss; call 0xf_c000u64;);
}

#[test]
fn syscall_and_sysret() {
    compare("syscall", Mode::Long, |g| {
        g.wrmsr(0xc000_0081, 0x0023_000b_0000_0000);
        for mask in [0u64, 0x4_7700, 0xffff_ffff] {
            g.wrmsr(0xc000_0084, mask);
            // Not DF, which QEMU loses.
            for flags in [0x202u32, 0x3002, 0x4_4202] {
                g.attempt(|g| {
                    let mut entry = g.label();
                    g.address(entry);
                    x86!(&mut g.a, mov rdx, rax; shr rdx, 32; mov ecx, 0xc000_0082u32; wrmsr;);
                    g.user(flags, |g| x86!(&mut g.a, syscall; ud2;));
                    g.place(&mut entry);
                    tell_state(g);
                });
            }
        }
        // Back: what of R11 comes to be flags; 64 bits and 32. With TF it traps at once. VM is never loaded, VIF and VIP
        // are, of which QEMU 7.2 does the opposite.
        for kept in [2u64, 0x202, 0x24_7602, 0x102, 0x24_0402] {
            for long in [false, true] {
                g.attempt(|g| {
                    let mut there = g.label();
                    g.address(there);
                    x86!(&mut g.a, add eax, g_alias(); mov rcx, rax; mov r11, kept;);
                    if long {
                        x86!(&mut g.a, sysretq;);
                    } else {
                        x86!(&mut g.a, sysret;);
                    }
                    g.place(&mut there);
                    x86!(&mut g.a, int 0x80;);
                });
            }
        }
        // Not to addresses that are not canonical: with Intel the fault is SYSRET's, at CPL 0.
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, sysretq;)));
        g.wrmsr(0xc000_0080, 0x900);
        g.attempt(|g| x86!(&mut g.a, syscall;));
        g.attempt(|g| x86!(&mut g.a, sysretq;));
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, syscall;)));
    });
}

fn g_alias() -> i32 {
    Mode::Long.alias() as i32
}

/// Tells EAX, ECX, EDX, ESP, CS and SS, and goes back to the stack of CPL 0.
fn tell_entry(g: &mut Guest) {
    x86!(&mut g.a, mov ebx, esp; mov esp, 0x9000;);
    g.tell();
    x86!(&mut g.a, mov eax, ebx;);
    g.tell();
    x86!(&mut g.a, mov eax, cs;);
    g.tell();
    x86!(&mut g.a, mov eax, ss;);
    g.tell();
    match g.mode {
        Mode::Long => x86!(&mut g.a, pushfq; pop rax; and eax, 0x3e_7700;),
        _ => x86!(&mut g.a, pushfd; pop eax; and eax, 0x3e_7700;),
    }
    g.tell();
}

#[test]
fn sysenter_and_sysexit() {
    in_modes("sysenter", &BOTH, |g| {
        g.attempt(|g| x86!(&mut g.a, sysenter;));
        g.attempt(|g| x86!(&mut g.a, sysexit;));
        g.wrmsr(0x174, sel::CODE.into());
        g.wrmsr(0x175, 0xd004);
        for flags in [0x202u32, 0x3002, 0x4_4602] {
            g.attempt(|g| {
                let mut entry = g.label();
                g.address(entry);
                x86!(&mut g.a, mov edx, 0; mov ecx, 0x176u32; wrmsr;);
                g.user(flags, |g| x86!(&mut g.a, sysenter; ud2;));
                g.place(&mut entry);
                x86!(&mut g.a, nop;);
                tell_entry(g);
            });
        }
        g.attempt(|g| {
            let mut there = g.label();
            g.address(there);
            let alias = g.mode.alias() as i32;
            x86!(&mut g.a, mov edx, eax; add edx, alias; mov ecx, 0xb000 + alias;);
            match g.mode {
                Mode::Long => x86!(&mut g.a, sysexitq;),
                _ => x86!(&mut g.a, sysexit;),
            }
            g.place(&mut there);
            x86!(&mut g.a, int 0x80;);
        });
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, sysexit;)));
    });
}

#[test]
fn fs_and_gs_bases() {
    compare("bases", Mode::Long, |g| {
        let bases = [0xc000_0100u32, 0xc000_0101, 0xc000_0102];
        for (i, index) in bases.into_iter().enumerate() {
            g.wrmsr(index, 0x1000 + 0x100 * i as u64);
            g.poke64(0x1000 + 0x100 * i as u32 + 0x40, 0x1111 * (i as u64 + 1));
        }
        let look = |g: &mut Guest| {
            x86!(&mut g.a, mov eax, dword_ptr(0x40).fs(););
            g.tell();
            x86!(&mut g.a, mov eax, dword_ptr(0x40).gs(););
            g.tell();
            for index in bases {
                x86!(&mut g.a, mov ecx, index; rdmsr;);
                g.tell();
            }
        };
        look(g);
        x86!(&mut g.a, swapgs;);
        look(g);
        // A selector loads the descriptor's base.
        x86!(&mut g.a, mov eax, sel::DATA; mov gs, eax;);
        g.attempt(|g| x86!(&mut g.a, mov ecx, 0xc000_0101u32; rdmsr; push rax; mov rax, rdx;));
        for index in bases {
            // Not addresses that are not canonical: QEMU 7.2 takes them.
            g.attempt(|g| g.wrmsr(index, 0xffff_8000_0000_0000));
        }
        g.attempt(|g| x86!(&mut g.a, rdfsbase rax;));
        set_cr4(g, 1 << 16, 0);
        g.attempt(|g| {
            x86!(&mut g.a, mov rax, 0x1234_5678_9abcu64; wrfsbase rax; rdfsbase rcx; mov rax, rcx;);
            g.tell();
        });
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, mov eax, 0x77u32; wrgsbase rax; rdgsbase rax;)));
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, swapgs;)));
    });
}
