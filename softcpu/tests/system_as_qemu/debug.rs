//! Debug traps: single steps and breakpoints.

use crate::guest::{Guest, IDT, Mode, STEPS, TASK, sel, x86};
use crate::tasks::{Routines, VECTOR, call, task_gate};
use crate::v86::v86;
use crate::{BOTH, in_modes, set_cr4};
use iced_x86::code_asm::*;

fn set_dr(g: &mut Guest, n: u32, value: u32) {
    match (g.mode, n) {
        (Mode::Long, 0) => x86!(&mut g.a, mov eax, value; mov dr0, rax;),
        (Mode::Long, 1) => x86!(&mut g.a, mov eax, value; mov dr1, rax;),
        (Mode::Long, _) => x86!(&mut g.a, mov eax, value; mov dr7, rax;),
        (_, 0) => x86!(&mut g.a, mov eax, value; mov dr0, eax;),
        (_, 1) => x86!(&mut g.a, mov eax, value; mov dr1, eax;),
        _ => x86!(&mut g.a, mov eax, value; mov dr7, eax;),
    }
}

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

/// Over what leaves the usual way: gates, changes of level, system calls, other modes, tasks.
#[test]
fn steps_over_control_flow() {
    const POINTER: u32 = 0xe100;
    const GATE: u32 = sel::FREE;
    in_modes("step-far", &BOTH, |g| {
        let alias = g.mode.alias();
        let long = g.mode == Mode::Long;
        let code = if long { sel::CODE64 } else { sel::CODE };
        let point = |g: &mut Guest, selector: u32, label: CodeLabel| {
            g.address(label);
            x86!(&mut g.a, mov dword_ptr(POINTER), eax;);
            g.poke(POINTER + 4, selector);
        };
        for steps in [0u32, 1, 2, 4] {
            // Far jumps and calls, directly and through a gate; the return.
            for gate in [false, true] {
                for call in [false, true] {
                    let mut there = g.label();
                    point(g, if gate { GATE } else { code }, there);
                    g.gate(GATE, 0xec, code, there, 0);
                    traced(g, steps, |g| {
                        match call {
                            true => x86!(&mut g.a, call fword_ptr(POINTER); nop; nop; ud2;),
                            false => x86!(&mut g.a, jmp fword_ptr(POINTER);),
                        }
                        g.place(&mut there);
                        x86!(&mut g.a, nop;);
                        match (call, long) {
                            (true, true) => x86!(&mut g.a, db &[0x48, 0xcb]; ud2;),
                            (true, false) => x86!(&mut g.a, retf; ud2;),
                            _ => x86!(&mut g.a, nop; ud2;),
                        }
                    });
                }
            }
            // From CPL 3 to CPL 0 through a gate: TF stays.
            g.poke(STEPS, steps);
            g.attempt(|g| {
                let mut there = g.label();
                g.gate(GATE, 0xec, code, there, 0);
                point(g, GATE | 3, there);
                g.user(0x102, |g| x86!(&mut g.a, call fword_ptr(POINTER + alias); nop;));
                g.place(&mut there);
                x86!(&mut g.a, nop; nop; ud2;);
            });
            // Interrupts clear it.
            for vector in [0x80i32, 0x83, 0x40, 0x82] {
                g.poke(STEPS, steps);
                g.attempt(|g| g.user(0x102, |g| x86!(&mut g.a, nop; int vector; nop;)));
            }
            // SYSENTER does not.
            g.poke(STEPS, 0);
            g.wrmsr(0x174, sel::CODE.into());
            g.wrmsr(0x175, 0xd004);
            g.attempt(|g| {
                let mut entry = g.label();
                g.address(entry);
                x86!(&mut g.a, mov edx, 0; mov ecx, 0x176u32; wrmsr;);
                g.poke(STEPS, steps);
                g.user(0x102, |g| x86!(&mut g.a, sysenter; ud2;));
                g.place(&mut entry);
                x86!(&mut g.a, nop; nop; ud2;);
            });
            g.poke(STEPS, 0);
            // Instructions that other processors would trap on, and those that load segments.
            traced(g, steps, |g| {
                x86!(&mut g.a, mov eax, ds; mov es, eax; mov ecx, 0x174u32; rdmsr; wrmsr; mov eax, 0u32; cpuid; ud2;);
            });
            traced(g, steps, |g| match long {
                true => {
                    x86!(&mut g.a, pushfq; popfq; mov rax, cr0; mov cr0, rax; invlpg ptr(0x1000u32); ud2;)
                }
                false => {
                    x86!(&mut g.a, pushfd; popfd; mov eax, cr0; mov cr0, eax; invlpg ptr(0x1000u32); ud2;)
                }
            });
            // IRET that sets it: after the next instruction. And what loads a stack, with and without a shadow.
            g.poke(STEPS, steps);
            g.attempt(|g| {
                let mut there = g.label();
                g.address(there);
                match long {
                    true => x86!(&mut g.a, mov rcx, rsp; push sel::DATA as i32; push rcx; push 0x102; push code as i32;
                        push rax; iretq;),
                    false => x86!(&mut g.a, push 0x102; push code as i32; push eax; iretd;),
                }
                g.place(&mut there);
                x86!(&mut g.a, nop; nop; nop; ud2;);
            });
            g.poke(STEPS, 0);
            // Not LSS, which QEMU 7.2 takes for one that holds traps back (SDM volume 3, 6.8.3: MOV SS and POP SS).
            traced(
                g,
                steps,
                |g| x86!(&mut g.a, mov eax, ss; mov ss, eax; mov ss, eax; nop; nop; ud2;),
            );
            traced(g, steps, |g| x86!(&mut g.a, mov eax, ss; mov ss, eax; int 0x83;));
            traced(g, steps, |g| x86!(&mut g.a, mov eax, ss; mov ss, eax; ud2;));
        }
    });
}

/// Over task switches, and in virtual-8086 mode.
#[test]
fn steps_elsewhere() {
    in_modes("step-task", &[Mode::Flat], |g| {
        let r = Routines::new(g);
        task_gate(g, IDT + 8 * VECTOR, 0xe5, sel::TASK);
        for steps in [0u32, 1, 3, 6] {
            for flags in [2u32, 0x102] {
                for way in 0..2 {
                    g.attempt(|g| {
                        let mut there = g.label();
                        r.fresh(g, there);
                        g.poke(TASK + 0x24, flags);
                        g.poke(STEPS, steps);
                        x86!(&mut g.a, push 0x102; popfd;);
                        match way {
                            0 => call(g, sel::TASK),
                            _ => x86!(&mut g.a, int VECTOR as i32;),
                        }
                        x86!(&mut g.a, nop; nop; ud2;);
                        g.place(&mut there);
                        x86!(&mut g.a, nop; nop; iretd; ud2;);
                    });
                    g.poke(STEPS, 0);
                }
            }
            g.attempt(|g| {
                let mut here = g.label();
                r.fresh(g, here);
                g.place(&mut here);
                x86!(&mut g.a, ud2;);
            });
            for iopl in [0u32, 0x3000] {
                g.poke(STEPS, steps);
                g.attempt(|g| {
                    v86(g, iopl | 0x102, |a| {
                        x86!(a, nop; mov ax, ss; mov ss, ax; nop; mov ax, ds; mov es, ax; nop; pushf; popf; nop; nop;)
                    })
                });
                g.poke(STEPS, steps);
                g.attempt(|g| v86(g, iopl | 0x102, |a| x86!(a, nop; int 0x83; nop;)));
                g.poke(STEPS, 0);
            }
        }
    });
}

#[test]
fn breakpoints() {
    in_modes("dr", &BOTH, |g| {
        // Data: 1, 2, 4 bytes; writes, reads or writes.
        for kind in [1u32, 3] {
            for (length, at) in [(0u32, 0xe001u32), (1, 0xe002), (3, 0xe004)] {
                set_dr(g, 0, at);
                for near in [at - 1, at, at + 3] {
                    for write in [false, true] {
                        set_dr(g, 7, 1 | kind << 16 | length << 18);
                        g.attempt(|g| match write {
                            true => x86!(&mut g.a, mov byte_ptr(near), 5; nop; nop;),
                            false => x86!(&mut g.a, mov al, byte_ptr(near); nop; nop;),
                        });
                    }
                }
            }
        }
        set_dr(g, 0, 0xe004);
        set_dr(g, 7, 1 | 0xd << 16);
        g.attempt(|g| x86!(&mut g.a, mov dword_ptr(0xe002), 5; nop; nop;));
        g.attempt(|g| x86!(&mut g.a, xchg dword_ptr(0xe004), eax; nop; nop;));
        g.attempt(|g| {
            x86!(&mut g.a, mov ecx, 3u32; mov eax, 0u32; mov edi, 0xe000u32;);
            g.a.rep().stosd().unwrap();
            x86!(&mut g.a, nop; nop;);
        });
        // What faults traps no more.
        if g.mode == Mode::Long {
            set_dr(g, 0, 0x7000_0000);
            g.attempt(|g| x86!(&mut g.a, mov dword_ptr(0x7000_0000), 5; nop; nop;));
            g.attempt(|g| x86!(&mut g.a, mov eax, dword_ptr(0x7000_0002); nop; nop;));
        }
        set_dr(g, 7, 0);
        // Instructions.
        g.attempt(|g| {
            let mut there = g.label();
            g.address(there);
            match g.mode {
                Mode::Long => x86!(&mut g.a, mov dr1, rax; mov eax, 4u32; mov dr7, rax;),
                _ => x86!(&mut g.a, mov dr1, eax; mov eax, 4u32; mov dr7, eax;),
            }
            x86!(&mut g.a, nop; nop;);
            g.place(&mut there);
            x86!(&mut g.a, inc ecx; nop; ud2;);
        });
        // Not with RF.
        g.attempt(|g| {
            let mut there = g.label();
            g.address(there);
            match g.mode {
                Mode::Long => x86!(&mut g.a, mov dr1, rax; mov rcx, rsp; push sel::DATA as i32; push rcx; push 0x1_0002;
                    push sel::CODE64 as i32; push rax; iretq;),
                _ => x86!(&mut g.a, mov dr1, eax; push 0x1_0002; push sel::CODE as i32; push eax; iretd;),
            }
            g.place(&mut there);
            x86!(&mut g.a, inc ecx; nop; ud2;);
        });
        set_dr(g, 7, 0);
        // Not INT1, which is #UD for QEMU.
        // DR4 and DR5 with CR4.DE.
        set_cr4(g, 8, 0);
        g.attempt(|g| match g.mode {
            Mode::Long => x86!(&mut g.a, mov rax, dr4;),
            _ => x86!(&mut g.a, mov eax, dr4;),
        });
        g.attempt(|g| {
            g.user(2, |g| match g.mode {
                Mode::Long => x86!(&mut g.a, mov rax, dr7;),
                _ => x86!(&mut g.a, mov eax, dr7;),
            })
        });
    });
}
