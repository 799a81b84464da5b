//! 16-bit protected mode, as BIOS calls and 286 programs use it: 16-bit code, stacks and gates, mixed with those of 32
//! bits.

use iced_x86::code_asm::*;

use crate::guest::{GDT, Guest, IDT, Mode, ROM, STACK, TSS, sel, x86};
use crate::in_modes;

const CODE16: u32 = sel::FREE;
const DATA16: u32 = sel::FREE + 8;
const USER_CODE16: u32 = (sel::FREE + 0x10) | 3;
const USER_DATA16: u32 = (sel::FREE + 0x18) | 3;
const GATE: u32 = sel::FREE + 0x20;
/// 32-bit code whose base is the ROM's.
const ROM_CODE: u32 = sel::FREE + 0x28;
/// A vector of its own.
const OWN: u32 = 0x90;
/// Where 16-bit code leaves its registers.
const LEFT: u32 = 0xe000;
/// Where far pointers lie.
const POINTER: u32 = 0xe100;

type Emit = fn(&mut CodeAssembler);

fn make_descriptors(g: &mut Guest) {
    g.descriptor(CODE16, 0x0000_9b0f_0000_ffff);
    g.descriptor(DATA16, 0x0000_9300_0000_ffff);
    g.descriptor(USER_CODE16, 0x0000_fb0f_0000_ffff);
    g.descriptor(USER_DATA16, 0x0000_f300_0000_ffff);
    g.descriptor(ROM_CODE, 0x0040_9b0f_0000_ffff);
}

/// The offset of `label` in the ROM's segments, in EAX.
fn offset(g: &mut Guest, label: CodeLabel) {
    g.address(label);
    x86!(&mut g.a, sub eax, ROM as i32;);
}

/// Leaves the registers, in 16-bit code.
fn leave_registers(a: &mut CodeAssembler) {
    for (i, register) in [eax, ebx, ecx, edx, esi, edi, ebp, esp].into_iter().enumerate() {
        a.mov(dword_ptr(LEFT + 4 * i as u32), register).unwrap();
    }
}

/// Runs `emit` as 16-bit code at CPL 0 on the stack `ss`, then leaves the registers, and ends.
fn narrow(g: &mut Guest, stack: u32, emit: impl FnOnce(&mut CodeAssembler)) {
    let mut there = g.label();
    // The upper half counts on a 32-bit stack only.
    let frame = if stack == DATA16 { 0xb0b0_8ff0u32 } else { 0x8ff0 };
    offset(g, there);
    x86!(&mut g.a, mov ebx, stack; mov ss, ebx; push CODE16 as i32; push eax; mov eax, 0xaaaa_0001u32;
        mov ebx, 0xbbbb_0002u32; mov ecx, 0xcccc_0003u32; mov edx, 0xdddd_0004u32; mov esi, 0x5151_0005u32;
        mov edi, 0xd1d1_0006u32; mov ebp, frame; retf;);
    g.place(&mut there);
    g.code16(|a| {
        emit(a);
        leave_registers(a);
        // The handler wants an ESP that is right in all of its bits.
        x86!(a, movzx esp, sp; int 0x80;);
    });
}

fn tell_left(g: &mut Guest) {
    for at in (LEFT..LEFT + 32).step_by(4) {
        g.tell_memory(at);
        g.poke(at, 0);
    }
    for at in (STACK - 32..STACK - 8).step_by(4) {
        g.tell_memory(at);
    }
}

#[test]
fn stacks() {
    in_modes("narrow", &[Mode::Flat], |g| {
        make_descriptors(g);
        let tell_left = g.routine(tell_left);
        let all: [Emit; 24] = [
            |a| x86!(a, push ax; push ebx; push 0x1234; pop cx; pop edx;),
            |a| x86!(a, push cs; push ss; push ds; pop bx; pop cx; pop dx;),
            |a| a.db(&[0x66, 0x0e, 0x66, 0x59]).unwrap(),
            |a| x86!(a, pusha; popa; inc bx;),
            |a| x86!(a, pushad; pop edx; popa;),
            |a| x86!(a, pushf; pop ax; and ax, 0x7700; pushfd; pop ebx; and ebx, 0x7700;),
            |a| x86!(a, enter 0x10, 0;),
            |a| x86!(a, enter 8, 3; mov bx, bp; leave;),
            |a| a.db(&[0x66, 0xc8, 0x10, 0, 2, 0x66, 0xc9]).unwrap(),
            |a| a.db(&[0xe8, 2, 0, 0xeb, 1, 0xc3]).unwrap(),
            |a| a.db(&[0x66, 0xe8, 2, 0, 0, 0, 0xeb, 2, 0x66, 0xc3]).unwrap(),
            |a| a.db(&[0x66, 0x6a, 0xfe, 0x66, 0x59, 0x6a, 0xfe, 0x5b]).unwrap(),
            |a| x86!(a, mov word_ptr(0x7000), 0x1357; push word_ptr(0x7000); pop word_ptr(0x7002); mov ax, word_ptr(0x7002);),
            |a| x86!(a, mov bp, sp; mov word_ptr(bp - 4), 0x2468; mov ax, word_ptr(bp - 4); mov ax, word_ptr(esp - 4);),
            // With an upper half of ESP that does not count, or does.
            |a| x86!(a, mov ebx, esp; rol esp, 16u32; rol esp, 16u32; push ax; pop cx; sub ebx, esp;),
            |a| x86!(a, lea sp, word_ptr(bp - 0x10); push ax;),
            |a| x86!(a, mov cx, 3; mov ax, 0; add ax, cx; db &[0xe2, 0xfc];),
            |a| x86!(a, mov word_ptr(0x7000), 0x8f80u32 as i32; mov word_ptr(0x7002), DATA16 as i32; lss sp, dword_ptr(0x7000); push 0x77;),
            |a| {
                x86!(a, mov dword_ptr(0x7000), 0x1234_8f80; mov word_ptr(0x7004), DATA16 as i32; lss esp, fword_ptr(0x7000); push 0x77;
                pushad; popa; mov bx, bp; mov bp, sp; leave; and esp, 0xffff;)
            },
            |a| x86!(a, mov ax, DATA16 as i32; mov ss, ax; mov esp, 0x4321_0000u32; push 0x55; mov ecx, esp; db &[0xe8, 0, 0]; pop dx; mov esp, 0x8f00u32;),
            |a| x86!(a, mov ax, sel::DATA as i32; mov ss, ax; mov esp, 0x11_8000u32; push 0x55; mov ecx, esp; pop dx; mov esp, 0x8f00u32;),
            |a| {
                x86!(a, mov ax, sel::DATA as i32; mov ss, ax; mov esp, 0x11_8000u32; mov ebp, 0x12_9000u32; enter 4, 0; mov ecx, esp;
                mov edx, ebp; leave; mov ebx, esp; mov esp, 0x8f00u32;)
            },
            |a| x86!(a, mov si, 0xa000u32 as i32; mov di, 0xfff8u32 as i32; mov cx, 4; db &[0xf3]; movsw;),
            |a| x86!(a, mov esi, 0xa000u32; mov edi, 0x1_0008u32; mov ecx, 4u32; db &[0xf3, 0x67]; movsb;),
        ];
        for stack in [sel::DATA, DATA16] {
            for emit in all {
                g.attempt(|g| narrow(g, stack, emit));
                x86!(&mut g.a, call tell_left;);
            }
        }
    });
}

/// Far calls between 16- and 32-bit code.
#[test]
fn between_sizes() {
    in_modes("between", &[Mode::Flat], |g| {
        make_descriptors(g);
        let tell_left = g.routine(tell_left);
        // What is called, and returns by a RETF of the caller's size.
        for stack in [sel::DATA, DATA16] {
            for wide in [false, true] {
                for to in [CODE16, ROM_CODE] {
                    g.attempt(|g| {
                        let mut callee = g.label();
                        offset(g, callee);
                        x86!(&mut g.a, mov dword_ptr(POINTER), eax;);
                        match wide {
                            true => g.poke(POINTER + 4, to),
                            false => x86!(&mut g.a, mov word_ptr(POINTER + 2), to as i32;),
                        }
                        narrow(g, stack, |a| match wide {
                            true => a.db(&[0x66, 0xff, 0x1e, POINTER as u8, (POINTER >> 8) as u8]).unwrap(),
                            false => a.db(&[0xff, 0x1e, POINTER as u8, (POINTER >> 8) as u8]).unwrap(),
                        });
                        g.place(&mut callee);
                        match to {
                            CODE16 => g.code16(|a| {
                                x86!(a, mov ax, cs; mov bx, ss; mov ecx, esp; mov edx, 0x1717_1717u32;);
                                a.db(if wide { &[0x66, 0xcb] } else { &[0xcb] }).unwrap();
                            }),
                            _ => {
                                x86!(&mut g.a, mov eax, cs; mov ebx, ss; mov ecx, esp; mov edx, 0x3232_3232u32;);
                                g.a.db(if wide { &[0xcb] } else { &[0x66, 0xcb] }).unwrap();
                            }
                        }
                    });
                    x86!(&mut g.a, call tell_left;);
                }
            }
        }
        // Direct jumps out of 16-bit code, with offsets of both sizes.
        for wide in [false, true] {
            g.attempt(|g| {
                let mut there = g.label();
                let mut begin = g.label();
                offset(g, there);
                // The instruction is made in RAM.
                x86!(&mut g.a, mov ebx, eax;);
                g.poke(0x7000, if wide { 0xea66 } else { 0xea });
                let at = 0x7000 + 1 + u32::from(wide);
                x86!(&mut g.a, mov dword_ptr(at), ebx;);
                x86!(&mut g.a, mov word_ptr(at + if wide { 4 } else { 2 }), ROM_CODE as i32;);
                g.descriptor(GATE, 0x0000_9b00_0000_ffff);
                x86!(&mut g.a, push GATE as i32; push 0x7000; set_label &mut begin; retf;);
                g.place(&mut there);
                x86!(&mut g.a, mov eax, cs; call 0xf_c000u64; ud2;);
            });
        }
    });
}

/// Interrupts of 16-bit code, through gates of both sizes to code of both.
#[test]
fn interrupts() {
    in_modes("narrow-int", &[Mode::Flat], |g| {
        make_descriptors(g);
        let tell_left = g.routine(tell_left);
        for stack in [sel::DATA, DATA16] {
            for kind in [0xeeu32, 0xef, 0xe6, 0xe7] {
                for to in [CODE16, ROM_CODE] {
                    g.attempt(|g| {
                        let mut there = g.label();
                        offset(g, there);
                        x86!(&mut g.a, or eax, (to << 16) as i32; mov dword_ptr(IDT + 8 * OWN), eax;);
                        g.poke(IDT + 8 * OWN + 4, kind << 8);
                        narrow(g, stack, |a| {
                            x86!(a, sti; stc; int OWN as i32; cli; pushf; pop si; and si, 0x7701;)
                        });
                        g.place(&mut there);
                        let wide = kind >= 0xee;
                        if to == CODE16 {
                            g.code16(|a| {
                                x86!(a, mov ecx, esp; mov ax, cs; pushf; pop dx; and dx, 0x7700; clc;);
                                a.db(if wide { &[0x66, 0xcf] } else { &[0xcf] }).unwrap();
                            });
                        } else {
                            x86!(&mut g.a, mov ecx, esp; mov eax, cs; pushfd; pop edx; and edx, 0x7700; clc;);
                            g.a.db(if wide { &[0xcf] } else { &[0x66, 0xcf] }).unwrap();
                        }
                    });
                    x86!(&mut g.a, call tell_left;);
                }
            }
        }
    });
}

/// CPL 3 of 16 bits: in by returns of both sizes, out by gates of both sizes.
#[test]
fn at_cpl_3() {
    in_modes("narrow-user", &[Mode::Flat], |g| {
        make_descriptors(g);
        let tell_left = g.routine(tell_left);
        for stack in [USER_DATA16, sel::USER_DATA] {
            for interrupt in [false, true] {
                g.attempt(|g| {
                    let mut there = g.label();
                    offset(g, there);
                    // A kernel stack above 64 KiB: its upper half is what a 16-bit stack's pointer has left of it.
                    x86!(&mut g.a, mov esp, 0x21_9000u32; mov ecx, sel::USER_DATA; mov ds, ecx; push stack as i32;
                        push 0x5678_8f00; );
                    if interrupt {
                        x86!(&mut g.a, push 0x202; push USER_CODE16 as i32; push eax; iretd;);
                    } else {
                        x86!(&mut g.a, push USER_CODE16 as i32; push eax; retf;);
                    }
                    g.place(&mut there);
                    g.code16(|a| {
                        x86!(a, mov ax, cs; mov bx, ss; mov ecx, esp;);
                        leave_registers(a);
                        x86!(a, int 0x80;);
                    });
                });
                x86!(&mut g.a, call tell_left;);
            }
        }
        // 16-bit images for a 32-bit stack.
        g.attempt(|g| {
            let mut there = g.label();
            offset(g, there);
            x86!(&mut g.a, mov esp, 0x21_9000u32; mov ecx, sel::USER_DATA; mov ds, ecx; push sel::USER_DATA as i32;);
            g.a.db(&[0x66, 0x68, 0x00, 0x8f]).unwrap(); // push word 8f00h
            x86!(&mut g.a, mov word_ptr(esp - 2).ss(), USER_CODE16 as i32; mov word_ptr(esp - 4).ss(), ax;
                mov word_ptr(esp + 2).ss(), sel::USER_DATA as i32; sub esp, 4;);
            g.a.db(&[0x66, 0xcb]).unwrap();
            g.place(&mut there);
            g.code16(|a| {
                x86!(a, mov ax, cs; mov bx, ss; mov ecx, esp;);
                leave_registers(a);
                x86!(a, int 0x80;);
            });
        });
        x86!(&mut g.a, call tell_left;);
        // Call gates of 16 and 32 bits, with parameters, from both kinds of stack, to both kinds of code.
        for stack in [USER_DATA16, sel::USER_DATA] {
            for kind in [0xe4u32, 0xec] {
                for to in [CODE16, ROM_CODE] {
                    for inner in [sel::DATA, DATA16] {
                        g.attempt(|g| {
                            let (mut there, mut user) = (g.label(), g.label());
                            g.poke(TSS + 4, 0xc000);
                            g.poke(TSS + 8, inner);
                            offset(g, there);
                            x86!(&mut g.a, or eax, (to << 16) as i32; mov dword_ptr(GDT + GATE), eax;);
                            g.poke(GDT + GATE + 4, kind << 8 | 3);
                            offset(g, user);
                            x86!(&mut g.a, mov ecx, sel::USER_DATA; mov ds, ecx; push stack as i32; push 0x8f00;
                                push USER_CODE16 as i32; push eax; retf;);
                            g.place(&mut user);
                            g.code16(|a| {
                                x86!(a, push 0x11; push 0x22; push 0x33; push 0x44; push 0x55; push 0x66;);
                                a.db(&[0x9a, 0, 0, (GATE | 3) as u8, 0]).unwrap();
                                x86!(a, mov edi, esp;);
                                leave_registers(a);
                                x86!(a, int 0x80;);
                            });
                            g.place(&mut there);
                            let wide = kind == 0xec;
                            let words = if wide { 12u8 } else { 6 };
                            if to == CODE16 {
                                g.code16(|a| {
                                    x86!(a, mov ax, ss; mov edx, esp; mov bp, sp; mov ebx, dword_ptr(bp);
                                        mov ecx, dword_ptr(bp + 4); mov esi, dword_ptr(bp + 8););
                                    if wide {
                                        a.db(&[0x66]).unwrap();
                                    }
                                    a.db(&[0xca, words, 0]).unwrap();
                                });
                            } else {
                                x86!(&mut g.a, mov eax, ss; mov edx, esp; movzx ebp, sp; mov ebx, dword_ptr(ebp);
                                    mov ecx, dword_ptr(ebp + 4); mov esi, dword_ptr(ebp + 8););
                                if !wide {
                                    g.a.db(&[0x66]).unwrap();
                                }
                                g.a.db(&[0xca, words, 0]).unwrap();
                            }
                        });
                        g.poke(TSS + 8, sel::DATA);
                        x86!(&mut g.a, call tell_left;);
                    }
                }
            }
        }
    });
}
