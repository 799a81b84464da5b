//! Virtual-8086 mode (SDM volume 3, chapter 20): in by IRET and by task, out by faults and interrupts, what is allowed
//! at which IOPL. Without CR4.VME, which QEMU 7.2 has in part only.

use crate::guest::{GDT, Guest, IDT, Mode, ROM, TASK, TSS, sel, x86};
use crate::in_modes;
use crate::tasks::{ROM_CODE, Routines, TOLD, VECTOR, jump, task_gate};
use iced_x86::code_asm::*;

/// Its stack: 0B00:0100.
const STACK16: u32 = 0xb100;
const VM: u32 = 0x2_0000;
/// A vector of its own.
const OWN: u32 = 0x90;

const MODES: [Mode; 2] = [Mode::Flat, Mode::Paged];

/// The memory that virtual-8086 mode reaches is the user's too.
fn let_user_in(g: &mut Guest) {
    if g.mode == Mode::Paged {
        g.poke(0x4000, 0x87);
        x86!(&mut g.a, mov eax, cr3; mov cr3, eax;);
    }
}

/// Into virtual-8086 mode with `flags`, and there what `what` writes, and HLT.
pub(crate) fn v86(g: &mut Guest, flags: u32, what: impl FnOnce(&mut CodeAssembler)) {
    let mut there = g.label();
    g.address(there);
    x86!(&mut g.a, sub eax, ROM as i32;);
    for word in [0x6666u32, 0x5555, 0x4444, 0x0c00, STACK16 >> 8 << 4, 0x100] {
        x86!(&mut g.a, push word as i32;);
    }
    x86!(&mut g.a, push (flags | VM | 2) as i32; push 0xf000; push eax; iretd;);
    g.place(&mut there);
    g.code16(|a| {
        what(a);
        a.hlt().unwrap();
    });
}

/// Tells the words below its stack's top.
fn tell_stack(g: &mut Guest) {
    for at in (STACK16 - 12..STACK16).step_by(4) {
        g.tell_memory(at);
        g.poke(at, 0);
    }
}

type Emit = fn(&mut CodeAssembler);

/// What depends on IOPL, and what does not. Not IRETD to beyond FFFFH, where QEMU 7.2 goes.
const SENSITIVE: [Emit; 21] = [
    |_| {},
    |a| a.cli().unwrap(),
    |a| a.sti().unwrap(),
    |a| a.pushf().unwrap(),
    |a| a.pushfd().unwrap(),
    |a| x86!(a, push 0x7ed7u32 as i32; popf;),
    |a| x86!(a, mov eax, 0x3f_7202u32; push eax; popfd;),
    |a| x86!(a, mov eax, 0u32; push eax; popfd;),
    |a| x86!(a, push 0x3202; push 0xf000u32 as i32; push 0x77; iret;),
    |a| x86!(a, mov eax, 0x3f_4202u32; push eax; mov eax, 0xf000u32; push eax; mov eax, 0x77u32; push eax; iretd;),
    |a| a.int3().unwrap(),
    |a| x86!(a, mov al, 0x7fu32; add al, al; into;),
    |a| a.int(0x80).unwrap(),
    |a| a.int(0x81).unwrap(),
    |a| a.int(0x40).unwrap(),
    |a| a.int(0x82).unwrap(),
    |a| a.int(0x83).unwrap(),
    |a| a.int(0x85).unwrap(),
    |a| a.in_(al, 0x80).unwrap(),
    |a| x86!(a, mov dx, 0x80; out dx, ax;),
    |a| x86!(a, sti; pushf; cli; pushf; popf; nop;),
];

const PRIVILEGED: [Emit; 20] = [
    |a| a.hlt().unwrap(),
    |a| a.clts().unwrap(),
    |a| a.wbinvd().unwrap(),
    |a| a.mov(eax, cr0).unwrap(),
    |a| a.mov(cr3, eax).unwrap(),
    |a| a.mov(eax, dr7).unwrap(),
    |a| a.lmsw(ax).unwrap(),
    |a| a.rdmsr().unwrap(),
    |a| a.invlpg(ptr(bx)).unwrap(),
    |a| a.lgdt(ptr(bx)).unwrap(),
    |a| a.lidt(ptr(bx)).unwrap(),
    |a| a.lldt(ax).unwrap(),
    |a| a.ltr(ax).unwrap(),
    |a| a.sldt(ax).unwrap(),
    |a| a.str(ax).unwrap(),
    |a| a.verr(ax).unwrap(),
    |a| a.lar(ax, bx).unwrap(),
    |a| a.lsl(ax, bx).unwrap(),
    |a| a.db(&[0x63, 0xc0]).unwrap(),
    |a| a.ud2().unwrap(),
];

#[test]
fn by_iopl() {
    in_modes("v86-iopl", &MODES, |g| {
        let tell_stack = g.routine(tell_stack);
        let_user_in(g);
        for iopl in [0u32, 1, 2, 3] {
            for flags in [0, 0x4_0200] {
                for emit in SENSITIVE {
                    g.attempt(|g| v86(g, iopl << 12 | flags, emit));
                    x86!(&mut g.a, call tell_stack;);
                }
            }
        }
    });
}

#[test]
fn whatever_iopl() {
    in_modes("v86", &MODES, |g| {
        let tell_stack = g.routine(tell_stack);
        let_user_in(g);
        for emit in PRIVILEGED {
            g.attempt(|g| v86(g, 0x3000, emit));
        }
        // Segments are paragraphs; addresses reach 10FFEFH.
        g.poke(0xc010, 0x1234_5678);
        g.poke(0x10_0010, 0x8765_4321u32);
        let plain: [Emit; 12] = [
            |a| x86!(a, mov eax, dword_ptr(0x10); push ax; shr eax, 16; push ax;),
            |a| x86!(a, mov ax, 0xffffu32 as i32; mov ds, ax; mov eax, dword_ptr(0x20); push ax; shr eax, 16; push ax;),
            |a| x86!(a, mov ax, ds; push ax; mov ax, gs; push ax; mov ax, cs; push ax;),
            |a| x86!(a, push ss; pop es; mov ax, es; push ax;),
            |a| x86!(a, smsw ax; push ax;),
            |a| a.db(&[0xea, 0x10, 0x01, 0x00, 0x0c]).unwrap(),
            |a| a.db(&[0x9a, 0x10, 0x01, 0x00, 0x0c]).unwrap(),
            |a| a.db(&[0x66, 0x9a, 0x10, 0x01, 0, 0, 0x00, 0x0c]).unwrap(),
            |a| x86!(a, push 0xc00; push 0x110; retf;),
            |a| x86!(a, push 0x11; push 0xc00; push 0x110; retf_1 2;),
            |a| x86!(a, xor cx, cx; div cx;),
            |a| x86!(a, sysenter;),
        ];
        x86!(&mut g.a, mov byte_ptr(0xc110), 0xf4;);
        for emit in plain {
            g.attempt(|g| v86(g, 0, emit));
            x86!(&mut g.a, call tell_stack;);
        }
    });
    // Without rights to the page.
    in_modes("v86-pf", &[Mode::Paged], |g| g.attempt(|g| v86(g, 0, |_| {})));
}

/// Entries that are refused, or do not lead there.
#[test]
fn entries() {
    in_modes("v86-entry", &MODES[..1], |g| {
        let enter = |g: &mut Guest, flags: u32, ip: u32| {
            for word in [0x6666u32, 0x5555, 0x4444, 0x0c00, 0xb00, 0x100, flags, 0xc00, ip] {
                x86!(&mut g.a, push word as i32;);
            }
            x86!(&mut g.a, iretd;);
        };
        // HLT at 0C00:0110.
        x86!(&mut g.a, mov byte_ptr(0xc110), 0xf4;);
        for flags in [VM | 2, VM | 0x3202, VM | 0x3f_7ed7] {
            g.attempt(|g| enter(g, flags, 0x110));
        }
        // An ESP of 32 bits is kept, though SP is what counts.
        g.attempt(|g| {
            for word in [0u32, 0, 0, 0, 0xb00, 0x1234_0100, VM | 2, 0xc00, 0x110] {
                x86!(&mut g.a, push word as i32;);
            }
            x86!(&mut g.a, iretd;);
        });
        // Not by IRETD at CPL 3, where VM stays as it is (SDM volume 2, IRET): QEMU 7.2 goes there.
        // Nor by POPF.
        g.attempt(|g| x86!(&mut g.a, push VM as i32 | 2; popfd; pushfd; pop eax; int 0x80;));
    });
}

/// Interrupts through gates of all kinds.
#[test]
fn through_gates() {
    in_modes("v86-gates", &MODES, |g| {
        let tell_stack = g.routine(tell_stack);
        let_user_in(g);
        g.descriptor(ROM_CODE, 0x0040_9b0f_0000_ffff);
        let int_own: Emit = |a| x86!(a, mov bx, 0x4321; int OWN as i32; pushf; push bx;);
        // To code at CPL 3, and to conforming code: #GP, as the level must be 0.
        for code in [sel::USER_CODE, sel::CONFORMING, sel::ABSENT_CODE, 0, sel::DATA] {
            for kind in [0xee, 0xef] {
                g.poke(IDT + 8 * OWN, code << 16 | 0x4000);
                g.poke(IDT + 8 * OWN + 4, 0xf_0000 | kind << 8);
                g.attempt(|g| v86(g, 0x3202, int_own));
            }
        }
        // There and back.
        for kind in [0xee, 0xef, 0xe6, 0xe7] {
            for flags in [0x3002, 0x3202] {
                g.attempt(|g| {
                    let mut there = g.label();
                    g.address(there);
                    x86!(&mut g.a, sub eax, ROM as i32; or eax, (ROM_CODE << 16) as i32; mov dword_ptr(IDT + 8 * OWN), eax;);
                    g.poke(IDT + 8 * OWN + 4, kind << 8);
                    v86(g, flags, int_own);
                    g.place(&mut there);
                    // Data segments are null.
                    x86!(&mut g.a, mov ecx, ds; mov edx, gs; mov eax, sel::DATA; mov ds, eax; mov es, eax;
                        shl ecx, 16; or ecx, edx; pushfd; mov ebx, esp;);
                    for i in 0..10 {
                        let told = if i == 0 { TOLD } else { u32::MAX };
                        x86!(&mut g.a, mov eax, dword_ptr(ebx + 4 * i).ss(); and eax, told as i32;);
                        g.tell();
                    }
                    x86!(&mut g.a, mov eax, ecx;);
                    g.tell();
                    x86!(&mut g.a, mov eax, ebx;);
                    g.tell();
                    x86!(&mut g.a, pop eax;);
                    match kind {
                        // A frame of words is not enough to go back by.
                        0xe6 | 0xe7 => x86!(&mut g.a, ud2;),
                        _ => x86!(&mut g.a, mov ebx, 0x8765_4321u32; iretd;),
                    }
                });
                x86!(&mut g.a, call tell_stack;);
            }
        }
        // No stack.
        g.poke(TSS + 8, sel::DATA);
    });
}

/// Through a task gate and back; a task that is in virtual-8086 mode from its beginning.
#[test]
fn by_tasks() {
    in_modes("v86-tasks", &MODES, |g| {
        let r = Routines::new(g);
        let tell_stack = g.routine(tell_stack);
        let_user_in(g);
        task_gate(g, IDT + 8 * VECTOR, 0xe5, sel::TASK);
        g.attempt(|g| {
            let mut there = g.label();
            r.fresh(g, there);
            v86(g, 0x3202, |a| x86!(a, mov bx, 0x4321; int VECTOR as i32; pushf; push bx;));
            g.place(&mut there);
            r.tell_task(g);
            x86!(&mut g.a, iretd; ud2;);
        });
        x86!(&mut g.a, call tell_stack;);
        for (cs_base, iopl) in [(0xf000u32, 0u32), (0xf000, 3)] {
            g.attempt(|g| {
                let mut there = g.label();
                r.fresh(g, there);
                x86!(&mut g.a, sub dword_ptr(TASK + 0x20), (cs_base << 4) as i32;);
                g.poke(TASK + 0x24, VM | iopl << 12 | 2);
                g.poke(TASK + 0x38, 0x100);
                g.poke(TASK + 4, 0xc800);
                g.poke(TASK + 8, sel::DATA);
                for (i, selector) in [0x0c00, cs_base, 0xb00, 0x0c00, 1, 2].into_iter().enumerate()
                {
                    g.poke(TASK + 0x48 + 4 * i as u32, selector);
                }
                jump(g, sel::TASK);
                g.place(&mut there);
                g.code16(|a| x86!(a, mov eax, dword_ptr(0x10); push ax; push fs; cli; hlt;));
            });
            x86!(&mut g.a, call tell_stack;);
            x86!(&mut g.a, str eax;);
            g.tell();
        }
        g.tell_memory(GDT + sel::TASK + 4);
    });
}
