//! Control registers, XCR0, MSRs, and the flags that CPL 3 may change.

use crate::guest::{Mode, sel, x86};
use crate::{BOTH, in_modes, set_cr0, set_cr4};
use iced_x86::code_asm::*;

#[test]
fn control_registers() {
    in_modes("control", &[Mode::Flat, Mode::Pae, Mode::Long], |g| {
        // Not CR0.NW without CD, PG without PE, nor CR4.PAE cleared in long mode: QEMU 7.2 does as told, where there is
        // #GP (SDM volume 3, 2.5 and 4.1.2).
        // Not EFER's reserved bits nor LME while paging, which QEMU 7.2 ignores instead of #GP (SDM volume 3, 2.2.1);
        // nor MSRs that nobody has, which it reads as 0; nor CR4's reserved bits, of which it hangs.
        // LMSW sets PE but does not clear it, and the rest of it; CLTS; #NM.
        g.attempt(|g| {
            x86!(&mut g.a, mov eax, 0xau32; lmsw ax; smsw eax; and eax, 0xf;);
            g.tell();
            x86!(&mut g.a, fnop;);
        });
        g.attempt(|g| x86!(&mut g.a, wait;));
        g.attempt(|g| x86!(&mut g.a, clts; smsw eax; and eax, 0xf; fnop; wait;));
        set_cr0(g, 4, 2);
        g.attempt(|g| x86!(&mut g.a, fnop;));
        g.attempt(|g| x86!(&mut g.a, wait;));
        set_cr0(g, 0, 0xe);
        // SSE without CR4.OSFXSR.
        g.attempt(|g| x86!(&mut g.a, xorps xmm0, xmm0;));
        set_cr4(g, 1 << 9, 0);
        g.attempt(|g| x86!(&mut g.a, xorps xmm0, xmm0;));
        // XGETBV and XSETBV.
        g.attempt(|g| x86!(&mut g.a, mov ecx, 0u32; xgetbv;));
        set_cr4(g, 1 << 18, 0);
        for (index, low, high) in
            [(0u32, 3u32, 0u32), (0, 1, 0), (0, 2, 0), (0, 0, 0), (0, 3, 1 << 30), (1, 3, 0)]
        {
            g.attempt(|g| {
                x86!(&mut g.a, mov ecx, index; mov eax, low; mov edx, high; xsetbv; mov ecx, 0u32; xgetbv;);
                g.tell();
            });
        }
        g.attempt(|g| {
            g.user(2, |g| x86!(&mut g.a, mov ecx, 0u32; mov eax, 3u32; mov edx, 0u32; xsetbv;))
        });
        // UMIP.
        set_cr4(g, 1 << 11, 0);
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, smsw eax;)));
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, str eax;)));
        set_cr4(g, 1 << 2, 1 << 11);
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, str eax;)));
        g.attempt(|g| g.user(2, |g| x86!(&mut g.a, rdtsc;)));
    });
}

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
