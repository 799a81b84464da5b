//! Task switches: by JMP, CALL, interrupt, exception and IRET; to 32- and 16-bit tasks; what is saved, loaded and refused.
//!
//! QEMU 7.2 does not look at the T bit of a TSS, nor does it clear DR7's local bits.

use crate::guest::{GDT, Guest, IDT, Mode, STACK, TASK, TSS, compare, sel, x86};
use crate::in_modes;
use iced_x86::code_asm::*;

pub(crate) const GATE: u32 = sel::FREE;
const LDT: u32 = sel::FREE + 8;
/// 32-bit code at the ROM's base, for 16-bit instruction pointers.
pub(crate) const ROM_CODE: u32 = sel::FREE + 0x10;
const TASK16: u32 = sel::FREE + 0x18;
/// Where the 16-bit TSS is.
const TSS16: u32 = 0x2c00;
/// Flags that are told: TF, IF, DF, IOPL, NT, VM, AC, VIF, VIP, ID.
pub(crate) const TOLD: u32 = 0x3e_7700;
/// A vector that leads to a task, and one that leads there and has an error code.
pub(crate) const VECTOR: u32 = 0x88;

pub(crate) fn tss_descriptor(g: &mut Guest, selector: u32, base: u32, access: u32, limit: u32) {
    g.descriptor(selector, u64::from(access) << 40 | u64::from(base) << 16 | u64::from(limit));
}

/// What the attempts call.
#[derive(Clone, Copy)]
pub(crate) struct Routines {
    fresh: CodeLabel,
    task: CodeLabel,
    tables: CodeLabel,
}

impl Routines {
    pub(crate) fn new(g: &mut Guest) -> Self {
        let fresh = g.routine(fresh);
        let tables = g.routine(tell_tables);
        let task = g.routine(|g| tell_task(g, tables));
        Self { fresh, task, tables }
    }

    /// The first task runs, and the second one is available, to begin at `entry` at CPL 0.
    pub(crate) fn fresh(self, g: &mut Guest, entry: CodeLabel) {
        g.address(entry);
        x86!(&mut g.a, call self.fresh;);
    }

    /// Tells all registers, and what became of the tasks.
    pub(crate) fn tell_task(self, g: &mut Guest) {
        x86!(&mut g.a, call self.task;);
    }

    /// Tells the TSSs and whether they are busy.
    pub(crate) fn tell_tables(self, g: &mut Guest) {
        x86!(&mut g.a, call self.tables;);
    }
}

/// The entry is in EAX.
fn fresh(g: &mut Guest) {
    x86!(&mut g.a, mov ebx, eax;);
    tss_descriptor(g, sel::TSS, TSS, 0x89, 0x67);
    tss_descriptor(g, sel::TASK, TASK, 0x89, 0x67);
    x86!(&mut g.a, mov eax, 0u32; lldt ax; mov eax, sel::TSS; ltr ax; clts;);
    g.poke(TSS, 0);
    x86!(&mut g.a, mov eax, cr3; mov dword_ptr(TSS + 0x1c), eax;);
    for at in (0..0x64).step_by(4) {
        g.poke(TASK + at, 0);
    }
    g.poke(TASK + 0x64, 0x68 << 16);
    x86!(&mut g.a, mov eax, cr3; mov dword_ptr(TASK + 0x1c), eax;);
    x86!(&mut g.a, mov dword_ptr(TASK + 0x20), ebx;);
    g.poke(TASK + 0x24, 2);
    for i in 0..8 {
        g.poke(TASK + 0x28 + 4 * i, 0x1111_0000 * (i + 1) + i);
    }
    g.poke(TASK + 0x38, 0xd800);
    for (i, selector) in
        [sel::DATA, sel::CODE, sel::DATA, sel::DATA, sel::USER_DATA, 0].into_iter().enumerate()
    {
        g.poke(TASK + 0x48 + 4 * i as u32, selector);
    }
}

fn tell_task(g: &mut Guest, tables: CodeLabel) {
    x86!(&mut g.a, pushfd; pushad; mov ebx, esp;);
    for i in 0..8 {
        x86!(&mut g.a, mov eax, dword_ptr(ebx + 4 * i).ss(););
        g.tell();
    }
    x86!(&mut g.a, mov eax, dword_ptr(ebx + 32).ss(); and eax, TOLD as i32;);
    g.tell();
    for register in [cs, ss, ds, es, fs, gs] {
        x86!(&mut g.a, mov eax, register;);
        g.tell();
    }
    x86!(&mut g.a, mov eax, sel::DATA; mov ds, eax; str eax;);
    g.tell();
    x86!(&mut g.a, sldt eax;);
    g.tell();
    x86!(&mut g.a, smsw eax; and eax, 15;);
    g.tell();
    x86!(&mut g.a, mov eax, cr3;);
    g.tell();
    x86!(&mut g.a, call tables; popad; popfd;);
}

fn tell_tables(g: &mut Guest) {
    for base in [TSS, TASK] {
        g.tell_memory(base);
        for i in 0..16 {
            let told = match i {
                1 => TOLD,
                10..16 => 0xffff,
                _ => u32::MAX,
            };
            x86!(&mut g.a, mov eax, dword_ptr(base + 0x20 + 4 * i).ds(); and eax, told as i32;);
            g.tell();
        }
    }
    for selector in [sel::TSS, sel::TASK] {
        g.tell_memory(GDT + selector + 4);
    }
}

pub(crate) fn jump(g: &mut Guest, selector: u32) {
    g.a.db(&[0xea, 0, 0, 0, 0, selector as u8, (selector >> 8) as u8]).unwrap();
}

pub(crate) fn call(g: &mut Guest, selector: u32) {
    g.a.db(&[0x9a, 0, 0, 0, 0, selector as u8, (selector >> 8) as u8]).unwrap();
}

pub(crate) fn task_gate(g: &mut Guest, at: u32, access: u32, selector: u32) {
    g.poke64(at, u64::from(access) << 40 | u64::from(selector) << 16);
}

const MODES: [Mode; 2] = [Mode::Flat, Mode::Paged];

#[test]
fn there_and_back() {
    in_modes("tasks", &MODES, |g| {
        let r = Routines::new(g);
        task_gate(g, GDT + GATE, 0xe5, sel::TASK);
        task_gate(g, IDT + 8 * VECTOR, 0xe5, sel::TASK);
        type Leave = fn(&mut Guest);
        let ways: [Leave; 5] = [
            |g| jump(g, sel::TASK),
            |g| call(g, sel::TASK),
            |g| jump(g, GATE),
            |g| call(g, GATE),
            |g| x86!(&mut g.a, int VECTOR as i32;),
        ];
        for (i, leave) in ways.into_iter().enumerate() {
            let nested = !matches!(i, 0 | 2);
            for flags in [2u32, 0x4_3602] {
                g.attempt(|g| {
                    let (mut there, mut back) = (g.label(), g.label());
                    r.fresh(g, there);
                    x86!(&mut g.a, push flags as i32; popfd; mov ecx, 0x0c0cu32; mov edx, 0x0d0du32; mov esi, 0x0505u32;
                        mov edi, 0x0d1du32; mov ebp, 0x0b0bu32; mov eax, sel::READ_ONLY; mov gs, eax;);
                    leave(g);
                    r.tell_task(g);
                    if nested {
                        // Again: it goes on behind its IRET.
                        leave(g);
                        r.tell_task(g);
                    }
                    x86!(&mut g.a, ud2;);
                    g.place(&mut there);
                    r.tell_task(g);
                    if nested {
                        x86!(&mut g.a, mov ecx, 0xcccc_ccccu32; iretd; mov edx, 0xddddu32; iretd;);
                    } else {
                        jump(g, sel::TSS);
                    }
                    g.place(&mut back);
                    x86!(&mut g.a, ud2;);
                });
            }
        }
    });
}

#[test]
fn by_exceptions() {
    in_modes("task-faults", &MODES, |g| {
        let r = Routines::new(g);
        for vector in [6u32, 13, 8] {
            task_gate(g, IDT + 8 * vector, 0x85, sel::TASK);
            for user in [false, true] {
                g.attempt(|g| {
                    let mut there = g.label();
                    r.fresh(g, there);
                    // #DF: by a #NP whose handler is not there.
                    g.poke(IDT + 8 * 11 + 4, if vector == 8 { 0xe00 } else { 0xf_8e00 });
                    let fault = |g: &mut Guest| match vector {
                        6 => x86!(&mut g.a, ud2;),
                        13 => x86!(&mut g.a, mov eax, 0x1238u32; mov ds, eax;),
                        _ => x86!(&mut g.a, mov eax, sel::ABSENT_DATA | 3; mov ds, eax;),
                    };
                    match user {
                        true => g.user(0x3202, fault),
                        false => fault(g),
                    }
                    g.place(&mut there);
                    r.tell_task(g);
                    x86!(&mut g.a, mov eax, dword_ptr(0xd7fc););
                    g.tell();
                    // Back, to what does not fault.
                    g.poke(TSS + 0x28, 0);
                    let mut again = g.label();
                    g.address(again);
                    x86!(&mut g.a, mov dword_ptr(TSS + 0x20), eax;);
                    if user {
                        x86!(&mut g.a, add dword_ptr(TSS + 0x20), g_alias(g.mode););
                    }
                    x86!(&mut g.a, iretd; ud2;);
                    g.place(&mut again);
                    x86!(&mut g.a, int 0x80;);
                });
            }
            // The usual handler again.
            let stub = 0xf_d000 + 16 * vector;
            g.poke(IDT + 8 * vector, sel::CODE << 16 | stub & 0xffff);
            g.poke(IDT + 8 * vector + 4, stub & 0xffff_0000 | 0x8e00);
        }
    });
}

fn g_alias(mode: Mode) -> i32 {
    mode.alias() as i32
}

/// What of a task keeps it from being entered, seen by the old task.
#[test]
fn refused() {
    in_modes("task-refused", &MODES[..1], |g| {
        let r = Routines::new(g);
        type Spoil = fn(&mut Guest);
        let spoils: [Spoil; 9] = [
            |_| {},
            |g| tss_descriptor(g, sel::TASK, TASK, 0x8b, 0x67),
            |g| tss_descriptor(g, sel::TASK, TASK, 0x09, 0x67),
            |g| tss_descriptor(g, sel::TASK, TASK, 0x89, 0x66),
            |g| tss_descriptor(g, sel::TASK, TASK, 0x82, 0x67),
            |g| tss_descriptor(g, sel::TASK, TASK, 0xe9, 0x67),
            |g| task_gate(g, GDT + GATE, 0x65, sel::TASK),
            |g| task_gate(g, GDT + GATE, 0xe5, 0x7f8),
            |g| task_gate(g, GDT + GATE, 0xe5, sel::DATA),
        ];
        for spoil in spoils {
            for user in [false, true] {
                for (selector, called) in [
                    (sel::TASK, true),
                    (sel::TASK, false),
                    (sel::TASK | 3, false),
                    (GATE, true),
                    (GATE | 3, false),
                ] {
                    g.attempt(|g| {
                        let mut there = g.label();
                        r.fresh(g, there);
                        task_gate(g, GDT + GATE, 0xe5, sel::TASK);
                        spoil(g);
                        let leave = |g: &mut Guest| match called {
                            true => call(g, selector),
                            false => jump(g, selector),
                        };
                        match user {
                            true => g.user(0x3002, leave),
                            false => leave(g),
                        }
                        g.place(&mut there);
                        r.tell_task(g);
                        x86!(&mut g.a, ud2;);
                    });
                    r.tell_tables(g);
                }
            }
        }
        // Through a gate with a null selector. Not one of the LDT, of which QEMU 7.2 has #TS (SDM volume 2, CALL: #GP).
        g.attempt(|g| {
            task_gate(g, GDT + GATE, 0xe5, 0);
            call(g, GATE);
        });
    });
}

/// IRET with NT to all kinds of links.
#[test]
fn returns() {
    in_modes("task-iret", &MODES[..1], |g| {
        let r = Routines::new(g);
        for (link, access) in [
            (sel::TASK, 0x8b),
            (sel::TASK, 0x89),
            (sel::TASK, 0x0b),
            (sel::TASK | 3, 0xeb),
            (sel::TASK | 4, 0x8b),
            (sel::DATA, 0x8b),
            (0, 0x8b),
            (0x7f8, 0x8b),
            (0xfff8, 0x8b),
        ] {
            g.attempt(|g| {
                let mut there = g.label();
                r.fresh(g, there);
                tss_descriptor(g, sel::TASK, TASK, access, 0x67);
                g.poke(TSS, link);
                x86!(&mut g.a, push 0x4002; popfd; iretd;);
                g.place(&mut there);
                r.tell_task(g);
                x86!(&mut g.a, ud2;);
            });
            r.tell_tables(g);
        }
    });
    // There are no tasks in long mode.
    compare("no-tasks", Mode::Long, |g| {
        x86!(&mut g.a, push 0x4002; popfq;);
        g.attempt(|g| x86!(&mut g.a, push 0x4002; popfq; iretq;));
        for selector in [sel::TSS, sel::TASK, GATE] {
            g.poke64(GDT + GATE, 0xe500_0000_0000 | u64::from(sel::TASK) << 16);
            g.poke(0xe100, 0);
            g.poke(0xe104, selector);
            g.attempt(|g| x86!(&mut g.a, jmp fword_ptr(0xe100u32);));
            g.attempt(|g| x86!(&mut g.a, call fword_ptr(0xe100u32);));
        }
        g.poke64(IDT + 16 * VECTOR, 0xe500_0000_0000 | u64::from(sel::TASK) << 16);
        g.attempt(|g| x86!(&mut g.a, int VECTOR as i32;));
    });
}

/// The task that looks after exceptions of others, whose stacks are no good.
const DOCTOR: u32 = sel::FREE + 0x20;
const DOCTOR_TSS: u32 = 0x2d00;

/// A new doctor for #TS, #NP, #SS and #GP.
fn doctor(g: &mut Guest) {
    tss_descriptor(g, DOCTOR, DOCTOR_TSS, 0x89, 0x67);
    for at in (0..0x64).step_by(4) {
        g.poke(DOCTOR_TSS + at, 0);
    }
    for (at, value) in [
        (0x24, 2),
        (0x38, 0xdc00),
        (0x48, sel::DATA),
        (0x4c, sel::CODE),
        (0x50, sel::DATA),
        (0x54, sel::DATA),
        (0x64, 0x68 << 16),
    ] {
        g.poke(DOCTOR_TSS + at, value);
    }
    for vector in 10..14 {
        task_gate(g, IDT + 8 * vector, 0x85, DOCTOR);
    }
}

/// What is wrong inside of a TSS is the new task's fault.
#[test]
fn bad_images() {
    in_modes("task-images", &MODES[..1], |g| {
        let r = Routines::new(g);
        let new_doctor = g.routine(doctor);
        g.descriptor(LDT, 0x8200_0000_0000 | u64::from(GDT) << 16 | 0x7ff);
        for (field, values) in [
            // LDT, CS, SS, DS, GS.
            (0x60, &[LDT, LDT | 4, sel::DATA, sel::TSS, 0x7f8, 0][..]),
            (
                0x4c,
                &[
                    0,
                    sel::DATA,
                    sel::CODE | 3,
                    sel::USER_CODE,
                    sel::ABSENT_CODE,
                    sel::CONFORMING,
                    sel::EXECUTE_ONLY,
                    0xfff8,
                    sel::CODE | 4,
                ],
            ),
            (
                0x50,
                &[
                    0,
                    sel::CODE,
                    sel::DATA | 3,
                    sel::USER_DATA,
                    sel::ABSENT_DATA,
                    sel::READ_ONLY,
                    0xfff8,
                ],
            ),
            (
                0x54,
                &[
                    0,
                    3,
                    sel::CODE,
                    sel::DATA | 3,
                    sel::USER_DATA,
                    sel::ABSENT_DATA,
                    sel::EXECUTE_ONLY,
                    sel::TSS,
                    0xfff8,
                ],
            ),
            (0x5c, &[0, sel::DATA | 3, sel::ABSENT_DATA, 0xfff8]),
        ] {
            for value in values {
                g.attempt(|g| {
                    let (mut there, mut sick) = (g.label(), g.label());
                    r.fresh(g, there);
                    x86!(&mut g.a, call new_doctor;);
                    g.address(sick);
                    x86!(&mut g.a, mov dword_ptr(DOCTOR_TSS + 0x20), eax;);
                    g.poke(TASK + field, *value);
                    call(g, sel::TASK);
                    g.place(&mut there);
                    r.tell_task(g);
                    x86!(&mut g.a, ud2;);
                    g.place(&mut sick);
                    x86!(&mut g.a, pop eax;);
                    g.tell();
                    // QEMU 7.2 saves the CALL's address as the new task's.
                    g.poke(TASK + 0x20, 0);
                    r.tell_task(g);
                    g.tell_memory(DOCTOR_TSS);
                    x86!(&mut g.a, ud2;);
                });
            }
        }
        // With an LDT whose descriptors are those of the GDT.
        g.attempt(|g| {
            let mut there = g.label();
            r.fresh(g, there);
            g.poke(TASK + 0x60, LDT);
            for field in (0x48..0x58).step_by(4) {
                x86!(&mut g.a, or dword_ptr(TASK + field), 4;);
            }
            call(g, sel::TASK);
            g.place(&mut there);
            r.tell_task(g);
            x86!(&mut g.a, ud2;);
        });
    });
}

/// A task at CPL 3, which an interrupt leaves for its own stack.
#[test]
fn at_cpl_3() {
    in_modes("task-user", &MODES, |g| {
        let r = Routines::new(g);
        // Not in a conforming segment with an RPL above its DPL, which QEMU 7.2 refuses (SDM volume 3, table 7-1).
        {
            g.attempt(|g| {
                let mut there = g.label();
                r.fresh(g, there);
                let alias = g_alias(g.mode);
                x86!(&mut g.a, add dword_ptr(TASK + 0x20), alias; add dword_ptr(TASK + 0x38), alias;);
                g.poke(TASK + 0x24, 0x3202);
                g.poke(TASK + 4, 0xc800);
                g.poke(TASK + 8, sel::DATA);
                g.poke(TASK + 0x4c, sel::USER_CODE);
                for field in [0x48, 0x50, 0x54, 0x58] {
                    g.poke(TASK + field, sel::USER_DATA);
                }
                jump(g, sel::TASK);
                g.place(&mut there);
                x86!(&mut g.a, mov ecx, dword_ptr(0xe000 + alias); pushfd; int 0x80;);
            });
            x86!(&mut g.a, str eax;);
            g.tell();
            x86!(&mut g.a, mov eax, dword_ptr(0xd7fc); and eax, TOLD as i32;);
            g.tell();
            r.tell_tables(g);
        }
    });
}

/// Another page directory comes with the task.
#[test]
fn with_a_page_directory() {
    compare("task-cr3", Mode::Paged, |g| {
        let r = Routines::new(g);
        // At 11000H: as at 4000H, but the window shows another page.
        let window = g.mode.window();
        for (i, entry) in [0x83u32, 0x87, 0x1_2007, 0x80_0087].into_iter().enumerate() {
            g.poke(0x1_1000 + 4 * i as u32, entry);
        }
        g.poke(0x1_2000, 0x10_1003);
        g.entry(0x7000, 0x10_0003);
        g.poke(0x10_0000, 0x1111);
        g.poke(0x10_1000, 0x2222);
        g.tell_memory(window);
        g.attempt(|g| {
            let mut there = g.label();
            r.fresh(g, there);
            g.poke(TASK + 0x1c, 0x1_1000);
            x86!(&mut g.a, mov eax, cr3; mov dword_ptr(TSS + 0x1c), eax;);
            call(g, sel::TASK);
            g.tell_memory(window);
            x86!(&mut g.a, ud2;);
            g.place(&mut there);
            g.tell_memory(window);
            r.tell_task(g);
            x86!(&mut g.a, iretd;);
        });
    });
}

/// A 16-bit TSS, whose code is at the ROM's base.
#[test]
fn sixteen_bits() {
    in_modes("task-16", &MODES[..1], |g| {
        let r = Routines::new(g);
        g.descriptor(ROM_CODE, 0x0040_9b0f_0000_ffff);
        for nested in [true, false] {
            g.attempt(|g| {
                let mut there = g.label();
                r.fresh(g, there);
                tss_descriptor(g, TASK16, TSS16, 0x81, 0x2b);
                for at in (0..0x2c).step_by(4) {
                    g.poke(TSS16 + at, 0);
                }
                g.address(there);
                x86!(&mut g.a, mov word_ptr(TSS16 + 0xe), ax; mov word_ptr(TSS16 + 0x10), 0x3202;);
                for i in 0..8 {
                    x86!(&mut g.a, mov word_ptr(TSS16 + 0x12 + 2 * i), 0x1110 * (i as i32 + 1););
                }
                x86!(&mut g.a, mov word_ptr(TSS16 + 0x1a), 0xd800;);
                for (i, selector) in
                    [sel::DATA, ROM_CODE, sel::DATA, sel::DATA].into_iter().enumerate()
                {
                    x86!(&mut g.a, mov word_ptr(TSS16 + 0x22 + 2 * i as u32), selector as i32;);
                }
                x86!(&mut g.a, mov ecx, 0x0c0c_0c0cu32; mov edx, 0x0d0d_0d0du32; mov eax, sel::USER_DATA; mov fs, eax;);
                match nested {
                    true => call(g, TASK16),
                    false => jump(g, TASK16),
                }
                r.tell_task(g);
                for at in (0..0x2c).step_by(4) {
                    g.tell_memory(TSS16 + at);
                }
                x86!(&mut g.a, ud2;);
                g.place(&mut there);
                x86!(&mut g.a, add esp, 0; movzx esp, sp;);
                for register in [ecx, edx, esi] {
                    x86!(&mut g.a, mov eax, register; and eax, 0xffff;);
                    g.tell();
                }
                for register in [cs, ss, ds, es, fs, gs] {
                    x86!(&mut g.a, mov eax, register;);
                    g.tell();
                }
                x86!(&mut g.a, pushfd; pop eax; and eax, TOLD as i32;);
                g.tell();
                match nested {
                    true => x86!(&mut g.a, mov ecx, 0x7777u32; iretd;),
                    false => jump(g, sel::TSS),
                }
            });
        }
        x86!(&mut g.a, mov esp, STACK;);
    });
}
