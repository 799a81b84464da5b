//! Far jumps, calls and returns, directly and through call gates, to the same and to other levels.

use crate::guest::{GDT, Guest, Mode, TSS, sel, x86};
use crate::{BOTH, IOPL3, in_modes};
use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction};

/// Where far pointers lie.
const POINTER: u32 = 0xe100;
/// What user code leaves to be told.
const LEFT: u32 = 0xe200;
const CONFORMING64: u32 = sel::FREE;
const GATE: u32 = sel::FREE + 0x10;
/// Of level 1.
const CODE1: u32 = sel::FREE + 0x20;
const DATA1: u32 = sel::FREE + 0x28;
/// P, DPL 3, a 32-bit (in long mode 64-bit) call gate.
const CALL_GATE3: u32 = 0xec;

/// The code segment that runs at CPL 0 and the one that runs at CPL 3.
fn code(g: &Guest) -> [u32; 2] {
    match g.mode {
        Mode::Long => [sel::CODE64, sel::USER_CODE64],
        _ => [sel::CODE, sel::USER_CODE],
    }
}

/// Makes a far pointer to `label` in `selector`.
fn point(g: &mut Guest, selector: u32, label: CodeLabel) {
    g.address(label);
    x86!(&mut g.a, mov dword_ptr(POINTER), eax;);
    g.poke(POINTER + 4, selector);
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    Jump,
    Call,
}

/// Far JMP or CALL through the pointer, at CPL 0 or (`alias`) from CPL 3.
fn go(g: &mut Guest, how: How, alias: u32) {
    let at = POINTER + alias;
    match how {
        How::Jump => x86!(&mut g.a, jmp fword_ptr(at);),
        How::Call => x86!(&mut g.a, call fword_ptr(at);),
    }
}

/// RETF that takes `drop` bytes of parameters off.
fn retf(g: &mut Guest, drop: u32) {
    let insn = match g.mode {
        Mode::Long => Instruction::with1(Code::Retfq_imm16, drop),
        _ => Instruction::with1(Code::Retfd_imm16, drop),
    };
    g.a.add_instruction(insn.unwrap()).unwrap();
}

/// At CPL 0: tells CS, SS, the stack pointer and `words` words of the stack.
fn tell_arrival(g: &mut Guest, words: u32) {
    x86!(&mut g.a, mov ebx, esp; mov eax, cs;);
    g.tell();
    x86!(&mut g.a, mov eax, ss;);
    g.tell();
    x86!(&mut g.a, mov eax, ebx;);
    g.tell();
    for i in 0..words {
        match g.mode {
            Mode::Long => x86!(&mut g.a, mov rax, qword_ptr(rbx + 8 * i);),
            _ => x86!(&mut g.a, mov eax, dword_ptr(ebx + 4 * i);),
        }
        g.tell();
    }
}

/// At CPL 3: leaves CS and ESP, and ends.
fn leave_arrival(g: &mut Guest, alias: u32) {
    x86!(&mut g.a, mov eax, cs; mov dword_ptr(LEFT + alias), eax; mov dword_ptr(LEFT + alias + 4), esp; int 0x80;);
}

fn tell_left(g: &mut Guest) {
    for at in [LEFT, LEFT + 4] {
        g.tell_memory(at);
        g.poke(at, 0);
    }
}

const SELECTORS: [u32; 20] = [
    0,
    3,
    sel::CODE,
    sel::CODE | 3,
    sel::CODE | 4,
    sel::DATA,
    sel::CODE64,
    sel::CODE64 | 3,
    sel::USER_CODE,
    sel::USER_CODE & !3,
    sel::USER_CODE64,
    sel::USER_DATA,
    sel::ABSENT_CODE,
    sel::CONFORMING,
    sel::CONFORMING | 3,
    sel::EXECUTE_ONLY,
    CONFORMING64,
    CONFORMING64 | 3,
    0x800,
    0xfff8,
];

/// Not to 32-bit code from 64-bit guests, whose code is 64-bit.
fn lands(g: &Guest, selector: u32) -> bool {
    let wide = [sel::CODE64, sel::USER_CODE64 & !3, CONFORMING64].contains(&(selector & !3));
    let narrow = [sel::CODE, sel::USER_CODE & !3, sel::CONFORMING, sel::EXECUTE_ONLY]
        .contains(&(selector & !3));
    match g.mode {
        Mode::Long => !narrow,
        // L means nothing outside of long mode, where the segment is then 16-bit.
        _ => !wide,
    }
}

#[test]
fn direct() {
    in_modes("far", &BOTH, |g| {
        let alias = g.mode.alias();
        g.descriptor(CONFORMING64, 0x00af_9f00_0000_ffff);
        for selector in SELECTORS {
            if !lands(g, selector) {
                continue;
            }
            for how in [How::Jump, How::Call] {
                g.attempt(|g| {
                    let mut there = g.label();
                    point(g, selector, there);
                    go(g, how, 0);
                    g.place(&mut there);
                    tell_arrival(g, 2 * u32::from(how == How::Call));
                });
                g.attempt(|g| {
                    let mut there = g.label();
                    point(g, selector, there);
                    x86!(&mut g.a, add dword_ptr(POINTER), alias as i32;);
                    g.user(2, |g| {
                        go(g, how, alias);
                        g.place(&mut there);
                        leave_arrival(g, alias);
                    });
                });
                tell_left(g);
            }
        }
    });
}

#[test]
fn call_gates() {
    in_modes("gates", &BOTH, |g| {
        let alias = g.mode.alias();
        g.descriptor(CONFORMING64, 0x00af_9f00_0000_ffff);
        for target in SELECTORS {
            if !lands(g, target) {
                continue;
            }
            for how in [How::Jump, How::Call] {
                // QEMU 7.2 has #GP for a jump's absent segment (SDM volume 2, JMP: #NP).
                if how == How::Jump && target == sel::ABSENT_CODE {
                    continue;
                }
                g.attempt(|g| {
                    let mut there = g.label();
                    g.gate(GATE, CALL_GATE3, target, there, 0);
                    point(g, GATE, there);
                    go(g, how, 0);
                    g.place(&mut there);
                    tell_arrival(g, 2 * u32::from(how == How::Call));
                });
                // From CPL 3 to where the gate leads. Not to conforming segments: their selector's RPL is the CPL (SDM
                // volume 3, 5.8.5), in QEMU 7.2 the segment's DPL.
                let conforming = [sel::CONFORMING, CONFORMING64].contains(&(target & !3));
                if conforming {
                    continue;
                }
                g.attempt(|g| {
                    let mut there = g.label();
                    g.gate(GATE, CALL_GATE3, target, there, 0);
                    point(g, GATE | 3, there);
                    g.user(2, |g| go(g, how, alias));
                    g.place(&mut there);
                    x86!(&mut g.a, clts;);
                    tell_arrival(g, 4);
                });
            }
        }
        // The gate's own rights, presence and type.
        for access in [0x8c, 0xac, 0xcc, 0x6c, 0xe4, 0xe5, 0xe0, 0xe8, 0xed, 0xee, 0xef] {
            for rpl in [0, 3] {
                // A 16-bit gate cannot lead here, a task gate is another matter.
                if g.mode == Mode::Long || !matches!(access, 0xe4 | 0xe5) {
                    let inner = code(g)[0];
                    g.attempt(|g| {
                        let mut there = g.label();
                        g.gate(GATE, access, inner, there, 0);
                        point(g, GATE | rpl, there);
                        go(g, How::Call, 0);
                        g.place(&mut there);
                        tell_arrival(g, 2);
                    });
                    g.attempt(|g| {
                        let mut there = g.label();
                        g.gate(GATE, access, inner, there, 0);
                        point(g, GATE | rpl, there);
                        g.user(2, |g| go(g, How::Call, alias));
                        g.place(&mut there);
                        tell_arrival(g, 4);
                    });
                }
            }
        }
    });
}

#[test]
fn parameters() {
    in_modes("parameters", &BOTH, |g| {
        let alias = g.mode.alias();
        let inner = code(g)[0];
        for count in [0u32, 1, 5, 31] {
            // In long mode there are none.
            if g.mode == Mode::Long && count != 0 {
                continue;
            }
            g.attempt(|g| {
                let mut there = g.label();
                g.gate(GATE, CALL_GATE3, inner, there, count);
                point(g, GATE | 3, there);
                g.user(2, |g| {
                    for i in 0..count {
                        x86!(&mut g.a, push 0x100 + i as i32;);
                    }
                    go(g, How::Call, alias);
                    leave_arrival(g, alias);
                });
                g.place(&mut there);
                tell_arrival(g, 4 + count);
                x86!(&mut g.a, mov esp, ebx;);
                retf(g, 4 * count);
            });
            tell_left(g);
        }
    });
}

/// To CPL 1, whose stack may be anything: exceptions have that of CPL 0.
#[test]
fn inner_stacks() {
    in_modes("inner", &BOTH, |g| {
        let alias = g.mode.alias();
        let wide = if g.mode == Mode::Long { 0x00af_bb00_0000_ffff } else { 0x00cf_bb00_0000_ffff };
        g.descriptor(CODE1, wide);
        g.descriptor(DATA1, 0x00cf_b300_0000_ffff);
        let call = |g: &mut Guest, count: u32| {
            g.attempt(|g| {
                let mut there = g.label();
                g.gate(GATE, CALL_GATE3, CODE1, there, count);
                point(g, GATE | 3, there);
                g.user(IOPL3, |g| go(g, How::Call, alias));
                g.place(&mut there);
                tell_arrival(g, 4 + count);
                // In long mode QEMU 7.2 gives CPL 1 the rights of CPL 0: no more is to be seen.
                match g.mode {
                    Mode::Long => g.end(),
                    _ => x86!(&mut g.a, clts;),
                }
            });
        };
        if g.mode == Mode::Long {
            g.poke64(TSS + 0xc, 0xd000);
            call(g, 0);
            return;
        }
        let stacks = [
            0,
            1,
            CODE1 | 1,
            DATA1,
            DATA1 | 1,
            DATA1 | 3,
            sel::DATA,
            sel::USER_DATA,
            sel::ABSENT_DATA | 1,
            sel::READ_ONLY | 1,
            0x801,
        ];
        for stack in stacks {
            g.poke(TSS + 0xc, 0xd000);
            g.poke(TSS + 0x10, stack);
            call(g, 2);
        }
        // Exceptions do not get there by that way, whatever the gate; and not at CPL 1 through one for CPL 0.
        g.poke(TSS + 0x10, DATA1 | 1);
        for vector in [0x80i32, 0x40] {
            g.attempt(|g| {
                let mut there = g.label();
                g.gate(GATE, CALL_GATE3, CODE1, there, 0);
                point(g, GATE | 3, there);
                g.user(IOPL3, |g| go(g, How::Call, alias));
                g.place(&mut there);
                x86!(&mut g.a, int vector;);
            });
        }
    });
}

#[test]
fn returns() {
    in_modes("retf", &BOTH, |g| {
        let alias = g.mode.alias();
        g.descriptor(CONFORMING64, 0x00af_9f00_0000_ffff);
        for selector in SELECTORS {
            if !lands(g, selector) {
                continue;
            }
            // From CPL 0: to the same level, and to CPL 3.
            g.attempt(|g| {
                let mut there = g.label();
                g.address(there);
                if selector & 3 == 3 {
                    x86!(&mut g.a, add eax, alias as i32;);
                }
                x86!(&mut g.a, push sel::USER_DATA as i32; push 0xb000 + alias as i32; push 0x11; push 0x22;
                    push selector as i32;);
                match g.mode {
                    Mode::Long => x86!(&mut g.a, push rax;),
                    _ => x86!(&mut g.a, push eax;),
                }
                retf(g, if g.mode == Mode::Long { 16 } else { 8 });
                g.place(&mut there);
                x86!(&mut g.a, int 0x80;);
            });
            // From CPL 3.
            g.attempt(|g| {
                let mut there = g.label();
                point(g, selector, there);
                x86!(&mut g.a, add dword_ptr(POINTER), alias as i32;);
                g.user(2, |g| {
                    x86!(&mut g.a, mov eax, dword_ptr(POINTER + alias); push selector as i32;);
                    match g.mode {
                        Mode::Long => x86!(&mut g.a, push rax;),
                        _ => x86!(&mut g.a, push eax;),
                    }
                    retf(g, 0);
                    g.place(&mut there);
                    x86!(&mut g.a, int 0x80;);
                });
            });
        }
        // To CPL 3 with all kinds of stacks.
        let outer = code(g)[1];
        for stack in [
            0,
            3,
            sel::DATA,
            sel::DATA | 3,
            sel::USER_DATA,
            sel::USER_DATA & !3,
            sel::USER_CODE,
            sel::ABSENT_DATA | 3,
            sel::READ_ONLY | 3,
            0x803,
        ] {
            g.attempt(|g| {
                let mut there = g.label();
                g.address(there);
                x86!(&mut g.a, add eax, alias as i32; push stack as i32; push 0xb000 + alias as i32; push outer as i32;);
                match g.mode {
                    Mode::Long => x86!(&mut g.a, push rax;),
                    _ => x86!(&mut g.a, push eax;),
                }
                retf(g, 0);
                g.place(&mut there);
                x86!(&mut g.a, int 0x80;);
            });
        }
        // The accessed bit of what was loaded.
        for selector in [sel::CODE, sel::USER_CODE & !3, sel::USER_DATA & !3, CONFORMING64] {
            g.tell_memory(GDT + selector + 4);
        }
    });
}
