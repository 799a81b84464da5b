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

/// Where the results of `descriptors` are.
const RESULTS: u32 = 0x1_0000;

/// Looks at `count` selectors from ECX on by LAR, LSL, VERR and VERW, into memory at EDI.
fn look_at_all(g: &mut Guest, count: u32) {
    let mut again = g.label();
    x86!(&mut g.a, mov edx, count; set_label &mut again; mov ebx, 0x1111_1111u32; mov esi, 0x2222_2222u32;
        xor eax, eax; lar ebx, ecx; sete al; lsl esi, ecx; sete ah; shl eax, 8; verr cx; sete al;
        shl eax, 8; verw cx; sete al; mov dword_ptr(edi), eax; mov dword_ptr(edi + 4), ebx;
        mov dword_ptr(edi + 8), esi; mov ebx, 0x1111_1111u32; mov esi, 0x2222_2222u32; lar bx, cx; lsl si, cx;
        shl esi, 16; mov si, bx; mov dword_ptr(edi + 12), esi; add edi, 16; add ecx, 8; dec edx; jne again;);
}

/// Descriptors of all types: who sees what of them.
#[test]
fn descriptors() {
    in_modes("descriptors", &BOTH, |g| {
        let alias = g.mode.alias();
        // In long mode there are no 16-bit TSSs and call gates nor task gates, which QEMU 7.2 shows all the same (SDM
        // volume 2, LAR).
        let there = |kind: &u64| g.mode != Mode::Long || !matches!(kind, 1 | 3 | 4 | 5);
        let kinds: Vec<u64> =
            (0..32).filter(there).flat_map(|kind| [0x80, 0xe0, 0x60].map(|p| kind | p)).collect();
        for (i, kind) in kinds.iter().enumerate() {
            let granular = (i as u64 & 1) << 55;
            g.descriptor(sel::FREE + 8 * i as u32, granular | 0x0051_0000_0000_2345 | kind << 40);
        }
        let (count, mut run) = (kinds.len() as u32, 0);
        for user in [false, true] {
            for rpl in [0, 1, 3] {
                g.attempt(|g| {
                    let look = |g: &mut Guest| {
                        let base = if user { alias } else { 0 };
                        x86!(&mut g.a, mov ecx, sel::FREE | rpl; mov edi, RESULTS + run * 0x1000 + base;);
                        look_at_all(g, count);
                    };
                    match user {
                        true => g.user(2, look),
                        false => look(g),
                    }
                });
                run += 1;
            }
        }
        // A routine tells them: the program is long enough.
        let mut again = g.label();
        x86!(&mut g.a, mov ebx, RESULTS; set_label &mut again; mov eax, dword_ptr(ebx); call 0xf_c000u64;
            add ebx, 4; cmp ebx, (RESULTS + run * 0x1000) as i32; jne again;);
    });
}

/// LDS, LES, LFS, LGS and LSS.
#[test]
fn far_pointers() {
    in_modes("pointers", &BOTH, |g| {
        for selector in [
            sel::DATA,
            0,
            3,
            sel::USER_DATA,
            sel::CODE,
            sel::ABSENT_DATA,
            sel::READ_ONLY,
            sel::EXECUTE_ONLY,
            0xfff8,
        ] {
            g.poke(0xe100, 0x8f00);
            g.poke(0xe104, selector);
            g.poke(0xe110, selector << 16 | 0x8e00);
            let long = g.mode == Mode::Long;
            // In 64-bit code SS may be null, with an RPL that QEMU does not look at.
            if !long || selector != 3 {
                g.attempt(|g| {
                    x86!(&mut g.a, lss esp, fword_ptr(0xe100u32); mov eax, esp; mov ebx, ss; shl ebx, 16; add eax, ebx;
                        mov esp, 0x8f00u32;);
                    g.tell();
                });
                g.attempt(|g| {
                    x86!(&mut g.a, lss sp, dword_ptr(0xe110u32); mov eax, esp;);
                    g.tell();
                });
            }
            g.attempt(|g| {
                x86!(&mut g.a, mov ecx, -1; lfs cx, dword_ptr(0xe110u32); mov eax, ecx;);
                g.tell();
                x86!(&mut g.a, lgs ecx, fword_ptr(0xe100u32); mov eax, gs; add eax, ecx;);
                g.tell();
            });
            if !long {
                g.attempt(|g| {
                    x86!(&mut g.a, lds ecx, fword_ptr(0xe100u32); mov eax, ds; add eax, ecx; mov ebx, sel::DATA; mov ds, ebx;);
                    g.tell();
                    x86!(&mut g.a, les cx, dword_ptr(0xe110u32); mov eax, es; add eax, ecx;);
                    g.tell();
                });
            }
        }
    });
}

/// ARPL, which 64-bit code does not have.
#[test]
fn requested_levels() {
    in_modes("arpl", &[Mode::Flat], |g| {
        for (left, right) in [(0x1234u32, 3u32), (0x1237, 1), (0x1235, 2), (0x1236, 2), (3, 0xffff)]
        {
            for user in [false, true] {
                let raise = |g: &mut Guest| {
                    x86!(&mut g.a, mov eax, 0xffff_0000u32 | left; mov ecx, right; mov dword_ptr(0xe100), eax;
                        arpl ax, cx; sete dl; arpl word_ptr(0xe100), cx; sete dh; mov dword_ptr(0xe104), eax;
                        mov word_ptr(0xe108), dx;);
                };
                g.attempt(|g| match user {
                    true => g.user(2, raise),
                    false => raise(g),
                });
                for at in [0xe100, 0xe104, 0xe108] {
                    g.tell_memory(at);
                }
            }
        }
    });
}
