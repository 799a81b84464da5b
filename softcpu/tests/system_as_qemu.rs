//! What only an operating system sees of a CPU, held against QEMU's TCG: page faults, exceptions and their frames,
//! changes of privilege, system calls, debug traps, control registers.
//!
//! Where processors differ legitimately the guests do not look, and say why.

#[path = "qemu/guest.rs"]
mod guest;
mod qemu;

use guest::{Guest, IDT, Mode, STEPS, compare, sel, x86};
use iced_x86::code_asm::*;

const PAGED: [Mode; 3] = [Mode::Paged, Mode::Pae, Mode::Long];
const BOTH: [Mode; 2] = [Mode::Flat, Mode::Long];
/// IOPL 3, so that CPL 3 may do anything that flags allow.
const IOPL3: u32 = 0x3002;

fn in_modes(name: &str, modes: &[Mode], test: impl Fn(&mut Guest)) {
    for mode in modes {
        compare(name, *mode, &test);
    }
}

/// Code at `at`: RET.
fn put_ret(g: &mut Guest, at: u32) {
    x86!(&mut g.a, mov byte_ptr(at), 0xc3;);
}

fn set_cr0(g: &mut Guest, set: u32, clear: u32) {
    match g.mode {
        Mode::Long => {
            x86!(&mut g.a, mov rax, cr0; or eax, set as i32; and eax, !clear as i32; mov cr0, rax;)
        }
        _ => {
            x86!(&mut g.a, mov eax, cr0; or eax, set as i32; and eax, !clear as i32; mov cr0, eax;)
        }
    }
}

fn set_cr4(g: &mut Guest, set: u32, clear: u32) {
    match g.mode {
        Mode::Long => {
            x86!(&mut g.a, mov rax, cr4; or eax, set as i32; and eax, !clear as i32; mov cr4, rax;)
        }
        _ => {
            x86!(&mut g.a, mov eax, cr4; or eax, set as i32; and eax, !clear as i32; mov cr4, eax;)
        }
    }
}

fn invlpg(g: &mut Guest, at: u32) {
    x86!(&mut g.a, invlpg ptr(at););
}

/// Reads, writes and runs `at`, at CPL 0 and at CPL 3.
#[derive(Clone, Copy)]
enum Touch {
    Read,
    Write,
    Run,
}
const TOUCHES: [Touch; 3] = [Touch::Read, Touch::Write, Touch::Run];

fn touch(g: &mut Guest, at: u32, how: Touch) {
    match (how, g.mode) {
        (Touch::Read, _) => x86!(&mut g.a, mov eax, dword_ptr(at + 0x10);),
        (Touch::Write, _) => x86!(&mut g.a, mov dword_ptr(at + 0x20), eax;),
        (Touch::Run, Mode::Long) => x86!(&mut g.a, mov eax, at; call rax;),
        (Touch::Run, _) => x86!(&mut g.a, mov eax, at; call eax;),
    }
}

/// Touches `at` in every way, each time with the entry at `entry` fresh, and tells the entry then.
fn touch_all(g: &mut Guest, at: u32, entry: u32, value: u64) {
    for how in TOUCHES {
        for user in [false, true] {
            g.entry(entry, value);
            invlpg(g, at);
            g.attempt(|g| match user {
                true => g.user(IOPL3, |g| touch(g, at, how)),
                false => touch(g, at, how),
            });
            g.tell_memory(entry);
        }
    }
}

// Paging.

#[test]
fn page_fault_codes() {
    in_modes("pf", &PAGED, |g| {
        let (at, [pte, pde, _]) = (g.mode.window(), g.mode.entries());
        put_ret(g, 0x10_0000);
        for bits in [0x6u64, 0x1, 0x3, 0x5, 0x7, 0x67] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
        // The directory's rights count too.
        for bits in [0u64, 1, 3, 5] {
            g.entry(pde, 0x7000 | bits);
            touch_all(g, at, pte, 0x10_0007);
        }
        g.entry(pde, 0x7007);
        set_cr0(g, 0, 1 << 16);
        for bits in [1u64, 5] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
    });
}

#[test]
fn reserved_bits_and_nx() {
    in_modes("pf-nx", &[Mode::Pae, Mode::Long], |g| {
        let (at, [pte, pde, _]) = (g.mode.window(), g.mode.entries());
        put_ret(g, 0x10_0000);
        touch_all(g, at, pte, 0x10_0007 | 1 << 63);
        touch_all(g, at, pte, 0x10_0007 | 1 << 51);
        touch_all(g, at, pte, 0x10_0001 | 1 << 45);
        if g.mode == Mode::Pae {
            touch_all(g, at, pte, 0x10_0007 | 1 << 60);
        }
        g.entry(pde, 0x7007 | 1 << 63);
        touch_all(g, at, pte, 0x10_0007);
        // A large page: its address bits below its size are reserved.
        g.entry(pde, 0x7007);
        let (large, [_, _, entry]) = (g.mode.large(), g.mode.entries());
        touch_all(g, large, entry, 0x80_0087 | 1 << 13);
        touch_all(g, large, entry, 0x80_0087 | 1 << 63);
    });
    compare("pf-no-nx", Mode::Long, |g| {
        let (at, [pte, ..]) = (g.mode.window(), g.mode.entries());
        g.wrmsr(0xc000_0080, 0x101);
        touch_all(g, at, pte, 0x10_0007 | 1 << 63);
    });
}

#[test]
fn large_pages() {
    in_modes("large", &PAGED, |g| {
        let (at, [_, _, entry]) = (g.mode.large(), g.mode.entries());
        put_ret(g, at);
        x86!(&mut g.a, mov dword_ptr(at + 0x1f_1000), 0x1234_5678;);
        for bits in [0x81u64, 0x83, 0x85, 0x87] {
            touch_all(g, at, entry, 0x80_0000 | bits);
        }
        g.entry(entry, 0x80_0087);
        invlpg(g, at);
        g.tell_memory(at + 0x1f_1000);
    });
    // PSE-36 and CR4.PSE: without it bit 7 is not looked at, and the entry leads to a table.
    compare("pse", Mode::Paged, |g| {
        let (at, [_, _, entry]) = (g.mode.large(), g.mode.entries());
        touch_all(g, at, entry, 0x80_0087 | 1 << 21);
    });
}

#[test]
fn smep_and_smap() {
    in_modes("smep", &PAGED, |g| {
        let (at, [pte, ..]) = (g.mode.window(), g.mode.entries());
        put_ret(g, 0x10_0000);
        set_cr4(g, 1 << 20, 0);
        for bits in [1u64, 5, 7] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
        set_cr4(g, 1 << 21, 1 << 20);
        for bits in [3u64, 5, 7] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
        for how in TOUCHES {
            g.attempt(|g| {
                x86!(&mut g.a, stac;);
                touch(g, at, how);
                x86!(&mut g.a, clac;);
                touch(g, at, how);
            });
        }
        set_cr4(g, 1 << 20, 1 << 21);
        touch_all(g, at, pte, 0x10_0007);
        g.attempt(|g| g.user(IOPL3, |g| x86!(&mut g.a, stac;)));
        g.attempt(|g| g.user(IOPL3, |g| x86!(&mut g.a, clac;)));
    });
}

#[test]
fn entries_change_with_invlpg() {
    in_modes("invlpg", &PAGED, |g| {
        let (at, [pte, ..]) = (g.mode.window(), g.mode.entries());
        g.poke(0x10_0000, 0x1111);
        g.poke(0x10_1000, 0x2222);
        g.entry(pte, 0x10_0003);
        invlpg(g, at);
        g.tell_memory(at);
        g.tell_memory(pte);
        g.entry(pte, 0x10_1003);
        invlpg(g, at);
        g.tell_memory(at);
        g.poke(at, 0x3333);
        g.tell_memory(pte);
        g.tell_memory(0x10_1000);
        g.entry(pte, 0x10_0002);
        // CR3 again does as well.
        match g.mode {
            Mode::Long => x86!(&mut g.a, mov rax, cr3; mov cr3, rax;),
            _ => x86!(&mut g.a, mov eax, cr3; mov cr3, eax;),
        }
        g.attempt(|g| touch(g, at, Touch::Read));
        // A store across two pages: neither half is there when the second one faults.
        g.entry(pte, 0x10_0003);
        invlpg(g, at);
        g.poke(at + 0xffc, 0);
        g.attempt(|g| x86!(&mut g.a, mov dword_ptr(at + 0xffe), -1;));
        g.tell_memory(at + 0xffc);
        // Not of a user.
        g.attempt(|g| g.user(IOPL3, |g| x86!(&mut g.a, invlpg ptr(at);)));
    });
}

// Exceptions.

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
fn segment_loads() {
    in_modes("segments", &BOTH, |g| {
        let all = [
            0,
            3,
            sel::CODE,
            sel::DATA,
            sel::DATA | 3,
            sel::DATA | 4,
            sel::CODE64,
            sel::USER_CODE,
            sel::USER_DATA,
            sel::TSS,
            sel::ABSENT_DATA,
            sel::ABSENT_CODE,
            sel::READ_ONLY,
            sel::CONFORMING,
            sel::EXECUTE_ONLY,
            sel::SMALL,
            0x800,
            0xfff8,
        ];
        for selector in all {
            g.attempt(|g| x86!(&mut g.a, mov eax, selector; mov ds, eax; mov eax, ds;));
            // In 64-bit code SS may be null, with an RPL that QEMU does not look at.
            if g.mode != Mode::Long || selector != 3 {
                g.attempt(|g| x86!(&mut g.a, mov eax, selector; mov ss, eax; mov eax, ss;));
            }
            g.attempt(|g| x86!(&mut g.a, mov eax, selector; lldt ax;));
            // QEMU takes a null task register.
            if selector > 3 {
                g.attempt(|g| x86!(&mut g.a, mov eax, selector; ltr ax;));
            }
            g.attempt(|g| g.user(2, |g| x86!(&mut g.a, mov eax, selector; mov es, eax;)));
            g.attempt(|g| g.user(2, |g| x86!(&mut g.a, mov eax, selector; mov ss, eax;)));
            // IRET to it, at CPL 0.
            g.attempt(|g| {
                let mut next = g.label();
                g.address(next);
                match g.mode {
                    Mode::Long => x86!(&mut g.a, push sel::DATA as i32; push 0x9000; push 2; push selector as i32;
                        push rax; iretq;),
                    _ => x86!(&mut g.a, push sel::USER_DATA as i32; push 0xb000; push 2; push selector as i32;
                        push eax; iretd;),
                }
                g.place(&mut next);
                x86!(&mut g.a, nop; ud2;);
            });
            // LAR, LSL, VERR, VERW.
            for user in [false, true] {
                let look = |g: &mut Guest| {
                    x86!(&mut g.a, mov ecx, selector; mov ebx, 0u32; mov esi, 0u32; lar ebx, ecx; sete al; lsl esi, ecx;
                        sete ah; shl eax, 8; verr cx; sete al; shl eax, 8; verw cx; sete al; xor eax, ebx; rol eax, 7;
                        xor eax, esi;);
                };
                g.attempt(|g| match user {
                    true => g.user(2, look),
                    false => {
                        look(g);
                        g.tell();
                    }
                });
            }
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

// System calls.

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

// Debugging.

/// Sets TF (and what else `flags` has) for what `what` writes.
fn traced(g: &mut Guest, steps: u32, what: impl FnOnce(&mut Guest)) {
    g.poke(STEPS, steps);
    g.attempt(|g| {
        x86!(&mut g.a, push 0x102;);
        match g.mode {
            Mode::Long => x86!(&mut g.a, popfq;),
            _ => x86!(&mut g.a, popfd;),
        }
        what(g);
    });
    g.poke(STEPS, 0);
}

#[test]
fn single_steps() {
    in_modes("step", &BOTH, |g| {
        traced(g, 3, |g| x86!(&mut g.a, nop; inc eax; dec eax; nop; nop;));
        traced(g, 0, |g| x86!(&mut g.a, ud2;));
        traced(g, 0, |g| x86!(&mut g.a, int 0x83;));
        traced(g, 9, |g| {
            x86!(&mut g.a, mov ecx, 3u32; mov esi, 0xe000u32; mov edi, 0xe100u32;);
            g.a.rep().movsb().unwrap();
            x86!(&mut g.a, nop; ud2;);
        });
        traced(g, 4, |g| x86!(&mut g.a, mov edx, ss; mov ss, edx; nop; nop; ud2;));
        for flags in [0x102u32, 0x3302] {
            g.poke(STEPS, 3);
            g.attempt(|g| g.user(flags, |g| x86!(&mut g.a, nop; nop; nop; nop; nop; nop; nop;)));
            g.poke(STEPS, 0);
        }
        if g.mode == Mode::Long {
            g.wrmsr(0xc000_0081, 0x0023_0008_0000_0000);
            g.wrmsr(0xc000_0084, 0x100);
            g.attempt(|g| {
                let mut entry = g.label();
                g.address(entry);
                x86!(&mut g.a, mov edx, 0u32; mov ecx, 0xc000_0082u32; wrmsr;);
                g.poke(STEPS, 2);
                g.user(0x102, |g| x86!(&mut g.a, syscall; ud2;));
                g.place(&mut entry);
                x86!(&mut g.a, nop; nop; mov esp, 0x9000u32; ud2;);
            });
        }
    });
}

// Control registers, flags, MSRs.

#[test]
fn flags_at_cpl_3() {
    in_modes("flags", &BOTH, |g| {
        for iopl in [0u32, 1, 2, 3] {
            for old in [0u32, 0x200] {
                for new in [0i32, 0x3202, 0x3002, 0x24_4402] {
                    g.attempt(|g| {
                        g.user(iopl << 12 | old | 2, |g| {
                            x86!(&mut g.a, push new;);
                            match g.mode {
                                Mode::Long => x86!(&mut g.a, popfq;),
                                _ => x86!(&mut g.a, popfd;),
                            }
                        });
                    });
                }
                // The handler's gate is a trap gate's neighbour: IRET at CPL 3 to CPL 3.
                g.attempt(|g| {
                    g.user(iopl << 12 | old | 2, |g| {
                        let mut next = g.label();
                        match g.mode {
                            Mode::Long => x86!(&mut g.a, lea rax, ptr(next); mov rcx, rsp; push sel::USER_DATA as i32;
                                push rcx; push 0x3202; push sel::USER_CODE64 as i32; push rax; iretq;),
                            _ => {
                                g.address(next);
                                x86!(&mut g.a, push 0x3202; push sel::USER_CODE as i32; push eax; iretd;);
                            }
                        }
                        g.place(&mut next);
                        x86!(&mut g.a, nop;);
                    });
                });
            }
        }
    });
}
