//! Loading segment registers, looking at descriptors, limits.

use crate::guest::{Guest, Mode, sel, x86};
use crate::{BOTH, in_modes};
use iced_x86::code_asm::*;

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
