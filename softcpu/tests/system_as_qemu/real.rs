//! Real mode, as firmware and boot loaders use it: exceptions, flags, far control flow, wrap-around, "unreal" segments,
//! the way to protected mode and back, single steps.
//!
//! QEMU 7.2 looks at no segment limit: what is beyond one is left to unit tests and to the host's processor.

use iced_x86::code_asm::*;

use crate::guest::x86;
use crate::real_guest::{Guest, STACK, STEPS, compare};

type Emit = fn(&mut CodeAssembler);

/// Where code is put that must not be in the ROM: 1000:0000.
const SEGMENT: u32 = 0x1000;
/// Descriptors for trips to protected mode.
const GDT: u32 = 0x2000;

/// Tells all general-purpose registers but EAX, and the data segments. EAX and EBX are lost.
fn tell_registers(g: &mut Guest) {
    for register in [ebx, ecx, edx, esi, edi, ebp, esp] {
        x86!(&mut g.a, mov eax, register;);
        g.tell();
    }
    x86!(&mut g.a, xor eax, eax;);
    for register in [cs, ss, ds, es, fs, gs] {
        x86!(&mut g.a, mov ax, register;);
        g.tell();
    }
}

fn attempts(g: &mut Guest, all: &[Emit]) {
    for emit in all {
        g.attempt(|g| emit(&mut g.a));
    }
}

#[test]
fn exceptions() {
    compare("exceptions", |g| {
        attempts(
            g,
            &[
                |a| x86!(a, xor cx, cx; div cx;),
                |a| x86!(a, xor ecx, ecx; div ecx;),
                |a| x86!(a, mov ax, 0x100; mov cl, 1u32; div cl;),
                |a| x86!(a, mov ax, 0x8000; mov cl, -1; idiv cl;),
                |a| a.db(&[0xd4, 0]).unwrap(),
                |a| a.ud2().unwrap(),
                |a| a.int3().unwrap(),
                |a| a.int(0x21).unwrap(),
                |a| x86!(a, sti; int 0x10;),
                |a| x86!(a, mov al, 0x7fu32; inc al; into;),
                |a| x86!(a, xor al, al; into;),
                |a| x86!(a, mov dword_ptr(0x600), 0x0005_0003; mov ax, 2; bound ax, dword_ptr(0x600);),
                |a| x86!(a, mov dword_ptr(0x600), 0x0005_0003; mov ax, 4; bound ax, dword_ptr(0x600);),
                // What protected mode only has.
                |a| a.lldt(ax).unwrap(),
                |a| a.ltr(ax).unwrap(),
                |a| a.sldt(ax).unwrap(),
                |a| a.str(ax).unwrap(),
                |a| a.verr(ax).unwrap(),
                |a| a.verw(ax).unwrap(),
                |a| a.lar(ax, bx).unwrap(),
                |a| a.lsl(ax, bx).unwrap(),
                |a| a.db(&[0x63, 0xc0]).unwrap(),
                |a| a.db(&[0x63, 0x07]).unwrap(),
                // MOV CS; LOCK where it may not be; registers that are not there; LES of a register.
                |a| a.db(&[0x8e, 0xc8]).unwrap(),
                |a| a.db(&[0xf0, 0x90]).unwrap(),
                |a| a.db(&[0xf0, 0x01, 0xc0]).unwrap(),
                |a| a.db(&[0x8e, 0xf0]).unwrap(),
                |a| a.db(&[0x0f, 0x20, 0xc8]).unwrap(),
                |a| a.db(&[0xc4, 0xc0]).unwrap(),
                |a| a.db(&[0x0f, 0x0b]).unwrap(),
                |a| a.sysenter().unwrap(),
                |a| a.sysexit().unwrap(),
                // #NM by CR0.TS and CR0.EM.
                |a| x86!(a, smsw ax; or al, 10; lmsw ax; wait;),
                |a| x86!(a, fnop;),
                |a| x86!(a, clts; smsw ax; and al, -3; lmsw ax; fnop; wait;),
            ],
        );
    });
}

#[test]
fn flags() {
    compare("flags", |g| {
        for image in [0u32, 0xffff, 0x7fd5, 0x3246, 0x4002] {
            g.attempt(|g| {
                x86!(&mut g.a, push image as i32; popf; pushf; xor eax, eax; pop ax;);
                g.tell();
                x86!(&mut g.a, lahf; and eax, 0xff00;);
                g.tell();
            });
            // IRET takes the same; the handler's flags say what an interrupt clears.
            g.attempt(|g| {
                let mut there = g.label();
                g.address(there);
                x86!(&mut g.a, push image as i32; push cs; push ax; iret;);
                g.place(&mut there);
                x86!(&mut g.a, pushf; xor eax, eax; pop ax; call 0xc000u64; int 0x33;);
            });
        }
        // 32 bits: not VM, RF, VIF, VIP. AC and ID come and go.
        for image in [0u32, 0xffff_feff, 0x24_0002, 0x1b_0002, 0x3_0246] {
            g.attempt(|g| {
                x86!(&mut g.a, mov eax, image; push eax; popfd; pushfd; pop eax;);
                g.tell();
                x86!(&mut g.a, int 0x33;);
            });
            g.attempt(|g| {
                let mut there = g.label();
                g.address(there);
                x86!(&mut g.a, mov ecx, image; push ecx; xor ecx, ecx; mov cx, cs; push ecx; push eax; iretd;);
                g.place(&mut there);
                x86!(&mut g.a, pushfd; pop eax; call 0xc000u64; int 0x33;);
            });
        }
        x86!(&mut g.a, xor eax, eax; push eax; popfd;);
        attempts(
            g,
            &[
                |a| x86!(a, sti; pushf; cli; pop ax; int 0x33;),
                |a| x86!(a, std; int 0x33;),
                |a| x86!(a, sti; std; int 0x33;),
                |a| x86!(a, mov ah, 0xd7u32; sahf; lahf; int 0x33;),
            ],
        );
    });
}

/// Bytes of far control flow from the ROM to F010H, where the same code is 100H below.
fn far(op: &[u8], offset_bytes: usize) -> (Vec<u8>, usize) {
    (op.to_vec(), offset_bytes)
}

#[test]
fn far_control_flow() {
    compare("far", |g| {
        // JMP and CALL, direct, of 16 and 32 bits; the offset is filled in at run time.
        for (op, wide) in
            [far(&[0xea], 2), far(&[0x9a], 2), far(&[0x66, 0xea], 4), far(&[0x66, 0x9a], 4)]
        {
            g.attempt(|g| {
                let mut there = g.label();
                g.address(there);
                x86!(&mut g.a, sub ax, 0x100; mov dword_ptr(0x600), eax; mov word_ptr(0x600 + wide as u32), 0xf010u32 as i32;
                    mov eax, dword_ptr(0x600); mov ebx, dword_ptr(0x604););
                // Through a copy in RAM, which jumps back to the ROM.
                g.put(0x700, &op);
                let at = 0x700 + op.len() as u32;
                x86!(&mut g.a, mov dword_ptr(at), eax; mov dword_ptr(at + 4), ebx; push 0; push 0x700; retf;);
                g.place(&mut there);
                tell_registers(g);
                x86!(&mut g.a, pop eax;);
                g.tell();
                x86!(&mut g.a, pop eax;);
                g.tell();
                x86!(&mut g.a, int 0x33;);
            });
        }
        // Through memory, and back again.
        for wide in [false, true] {
            for call in [false, true] {
                g.attempt(|g| {
                    let mut there = g.label();
                    g.address(there);
                    x86!(&mut g.a, sub ax, 0x100; mov dword_ptr(0x600), eax;);
                    let selector = if wide { 0x604 } else { 0x602 };
                    x86!(&mut g.a, mov word_ptr(selector), 0xf010u32 as i32; mov si, 0x600;);
                    let bytes: &[u8] = match (wide, call) {
                        (false, false) => &[0xff, 0x2c],
                        (false, true) => &[0xff, 0x1c],
                        (true, false) => &[0x66, 0xff, 0x2c],
                        (true, true) => &[0x66, 0xff, 0x1c],
                    };
                    g.a.db(bytes).unwrap();
                    x86!(&mut g.a, int 0x34;);
                    g.place(&mut there);
                    tell_registers(g);
                    match (wide, call) {
                        (_, false) => {}
                        (false, _) => x86!(&mut g.a, retf;),
                        (true, _) => g.a.db(&[0x66, 0xcb]).unwrap(),
                    }
                    x86!(&mut g.a, int 0x35;);
                });
            }
        }
        // RETF that takes parameters off; near calls of 32 bits; near jumps through registers and memory.
        attempts(
            g,
            &[
                |a| x86!(a, push 0x1111; push 0x2222; push 0x700; push 0x10; mov word_ptr(0x7010), 0x33cdu32 as i32; retf_1 2;),
                |a| a.db(&[0x66, 0xe8, 0, 0, 0, 0, 0x66, 0x58, 0xcd, 0x33]).unwrap(),
                |a| a.db(&[0x66, 0xe8, 2, 0, 0, 0, 0xcd, 0x33, 0x66, 0xc3]).unwrap(),
                |a| a.db(&[0x66, 0xe8, 2, 0, 0, 0, 0xcd, 0x33, 0x66, 0xc2, 4, 0]).unwrap(),
                |a| a.db(&[0xe8, 0, 0, 0x58, 0x83, 0xc0, 0x06, 0xff, 0xe0, 0xcd, 0x33]).unwrap(),
                |a| {
                    a.db(&[0xe8, 0, 0, 0x58, 0x66, 0x83, 0xc0, 0x08, 0x66, 0xff, 0xe0, 0xcd, 0x33])
                        .unwrap()
                },
                |a| {
                    a.db(&[
                        0xe8, 0, 0, 0x5b, 0x83, 0xc3, 0x09, 0x53, 0x89, 0xe3, 0xff, 0x27, 0xcd,
                        0x33,
                    ])
                    .unwrap()
                },
                |a| {
                    a.db(&[
                        0xe8, 0, 0, 0x5b, 0x83, 0xc3, 0x0a, 0x53, 0x89, 0xe5, 0xff, 0x56, 0, 0xcd,
                        0x33,
                    ])
                    .unwrap()
                },
            ],
        );
    });
}

#[test]
fn wrapping_around() {
    compare("wrap", |g| {
        // Jumps over the end of a segment, from FFxx to 00xx and back.
        g.put_far(SEGMENT << 4, &[0xcd, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0xcd, 0x41, 0xeb, 0xe2]);
        let end = (SEGMENT << 4) + 0xfff0;
        g.put_far(end, &[0xcd, 0x42, 0x90, 0x90]);
        for (at, code) in [
            (0xfff8u32, &[0xebu8, 0x10][..]),
            (0xfff6, &[0xe9, 0x11, 0x00]),
            (0xfff6, &[0x74, 0x12]),
            (0xfff6, &[0x0f, 0x84, 0x10, 0x00]),
            (0xfff6, &[0xe2, 0x12]),
            (0xfff6, &[0xe3, 0x12]),
            (0xfff6, &[0xe8, 0x07, 0x00]),
            (0xfff6, &[0x66, 0xe9, 0x04, 0x00, 0xff, 0xff]),
            (0x000c, &[0xeb, 0xe2]),
            (0x000c, &[0xe9, 0xe1, 0xff]),
        ] {
            g.attempt(|g| {
                g.put_far((SEGMENT << 4) + at, code);
                x86!(&mut g.a, xor cx, cx; push SEGMENT as i32; push at as i32; xor ax, ax; retf;);
            });
        }
        // Effective addresses of 16 bits; linear ones above 1 MiB.
        g.put_far(0x2_0000, &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
        g.put_far(0x2_fffc, &[0x99, 0xaa, 0xbb, 0xcc]);
        attempts(
            g,
            &[
                |a| x86!(a, mov ax, 0x2000; mov ds, ax; mov bx, -1; mov si, 3; xor eax, eax; mov ax, word_ptr(bx + si); call 0xc000u64;),
                |a| x86!(a, mov ax, 0x2000; mov ds, ax; mov bx, 4; mov eax, dword_ptr(bx - 8); call 0xc000u64;),
                |a| x86!(a, mov ax, 0x2000; mov ds, ax; mov bx, -1; mov si, -1; mov eax, dword_ptr(bx + si + 2); call 0xc000u64;),
                |a| x86!(a, mov ax, 0x2000; mov ss, ax; mov bp, -1; xor eax, eax; mov al, byte_ptr(bp + 5); mov sp, 0x1000; call 0xc000u64;),
                |a| x86!(a, mov ax, 0x2000; mov ds, ax; mov eax, 0xfffcu32; mov eax, dword_ptr(eax); call 0xc000u64;),
                |a| {
                    x86!(a, mov ax, -1; mov ds, ax; mov es, ax; mov dword_ptr(0x10), 0x1357_9bdf; mov dword_ptr(0xfff0), 0x2468_ace0;
                    mov eax, dword_ptr(0x10).es(); call 0xc000u64; mov eax, dword_ptr(0xfff0); call 0xc000u64;)
                },
                // The stack: from 0 to FFFEH; the upper half of ESP stays.
                |a| {
                    x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0002u32; push bp; push bp; mov eax, esp;
                    mov sp, 0x1000; call 0xc000u64;)
                },
                |a| {
                    x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0000u32; push 0x1111; mov dword_ptr(0).ss(), 0x4444_3333;
                    pop cx; pop dx; mov eax, esp; mov sp, 0x1000; call 0xc000u64; mov ax, cx; call 0xc000u64;
                    mov ax, dx; call 0xc000u64;)
                },
                |a| {
                    x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0008u32; pusha; mov eax, esp; mov ecx, eax;
                    mov sp, 0x1000; call 0xc000u64; mov sp, cx; popa; mov eax, esp; mov sp, 0x1000; call 0xc000u64;)
                },
                |a| {
                    x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0010u32; pushad; mov eax, esp; mov ecx, eax;
                    mov sp, 0x1000; call 0xc000u64; mov sp, cx; popad; mov eax, esp; mov sp, 0x1000; call 0xc000u64;)
                },
                |a| {
                    x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0004u32; mov ebp, 0x5678_0006u32; enter 0x20, 2;
                    mov eax, esp; mov sp, 0x1000; call 0xc000u64; mov eax, ebp; call 0xc000u64; leave; mov eax, esp;
                    mov sp, 0x1000; call 0xc000u64; mov eax, ebp; call 0xc000u64;)
                },
                |a| x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0004u32; int 0x33;),
                |a| x86!(a, mov ax, 0x3000; mov ss, ax; mov esp, 0x1234_0000u32; int 0x33;),
            ],
        );
    });
}

#[test]
fn strings() {
    compare("strings", |g| {
        g.put(0xa000, b"the quick brown fox jumps over the lazy dog ABC");
        let all: [Emit; 12] = [
            |a| x86!(a, mov si, 0xa000u32 as i32; mov di, 0xb000u32 as i32; mov cx, 43;),
            |a| x86!(a, mov si, 0xa00fu32 as i32; mov di, 0xa017u32 as i32; mov cx, 8; std;),
            |a| x86!(a, mov si, 0xa000u32 as i32; mov di, 0xa001u32 as i32; mov cx, 9;),
            |a| x86!(a, mov esi, 0x5555_a000u32; mov edi, 0x6666_b000u32; mov ecx, 0x7777_0003u32;),
            |a| x86!(a, mov si, 0xa000u32 as i32; mov di, 0xb000u32 as i32; xor cx, cx;),
            |a| x86!(a, mov si, 0xa001u32 as i32; mov di, 0xb001u32 as i32; mov cx, 3; std;),
            |a| x86!(a, mov ax, 0x1000; mov es, ax; mov si, 0xa000u32 as i32; mov di, 0xfff8u32 as i32; mov cx, 8;),
            |a| x86!(a, mov ax, 0x1000; mov es, ax; mov si, 0xa000u32 as i32; mov di, 0xfffcu32 as i32; mov cx, 20;),
            |a| x86!(a, mov ax, 0x1000; mov ds, ax; mov si, 0xfff8u32 as i32; mov di, 0xb100u32 as i32; mov cx, 40;),
            |a| x86!(a, mov ax, 0x1000; mov es, ax; mov si, 0xa004u32 as i32; mov di, 4; mov cx, 8; std;),
            |a| x86!(a, mov si, 0xa000u32 as i32; mov di, 0xa000u32 as i32; mov cx, 8;),
            |a| x86!(a, mov ax, 0xa00; mov fs, ax; mov si, 0; mov di, 0xb000u32 as i32; mov cx, 5;),
        ];
        let ops: [&[u8]; 10] = [
            &[0xf3, 0xa4],
            &[0xf3, 0xa5],
            &[0xf3, 0x66, 0xa5],
            &[0xf3, 0xaa],
            &[0xf3, 0x66, 0xab],
            &[0xf3, 0xac],
            &[0xf3, 0xa6],
            &[0xf2, 0xae],
            &[0x64, 0xf3, 0xa4],
            &[0xa4],
        ];
        let tell = {
            let (mut begin, mut over) = (g.label(), g.label());
            x86!(&mut g.a, jmp over; set_label &mut begin; pushf;);
            for register in [esi, edi, ecx] {
                x86!(&mut g.a, mov eax, register;);
                g.tell();
            }
            x86!(&mut g.a, xor eax, eax; pop ax; and ax, 0x8d5;);
            g.tell();
            x86!(&mut g.a, ret; set_label &mut over; nop;);
            begin
        };
        for prepare in all {
            for op in ops {
                g.attempt(|g| {
                    x86!(&mut g.a, xor eax, eax; mov esi, eax; mov edi, eax; mov ecx, eax; mov fs, ax;);
                    prepare(&mut g.a);
                    x86!(&mut g.a, mov eax, 0x6f20_6f20u32; cmp al, 0;);
                    g.a.db(op).unwrap();
                    x86!(&mut g.a, call tell;);
                });
            }
        }
        // What came of it all.
        for at in (0xa000..0xa040).step_by(4).chain((0xaff0..0xb180).step_by(4)) {
            g.tell_memory(at);
        }
    });
}

/// A GDT at 2000H: flat data, 16-bit code at the ROM, 32-bit code, data of 64 KiB, 16-bit code at 0.
fn make_gdt(g: &mut Guest) {
    for (i, descriptor) in [
        0u64,
        0x00cf_9300_0000_ffff,
        0x0000_9b0f_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x0000_9300_0000_ffff,
        0x0000_9b00_0000_ffff,
    ]
    .into_iter()
    .enumerate()
    {
        g.put(GDT + 8 * i as u32, &descriptor.to_le_bytes());
    }
    g.put(0x600, &[0x2f, 0, 0, 0x20, 0, 0]);
    g.a.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x06]).unwrap(); // lgdtd [600h]
}

fn protected(a: &mut CodeAssembler) {
    x86!(a, mov eax, cr0; or al, 1; mov cr0, eax;);
}

fn unprotected(a: &mut CodeAssembler) {
    x86!(a, mov eax, cr0; and al, -2; mov cr0, eax;);
}

#[test]
fn unreal() {
    compare("unreal", |g| {
        make_gdt(g);
        // As everybody does it: protection on, data segments, off, without a jump in between.
        let flatten: Emit = |a| {
            protected(a);
            x86!(a, mov bx, 8; mov ds, bx; mov es, bx; mov fs, bx; mov gs, bx;);
            unprotected(a);
            x86!(a, xor ax, ax; mov ds, ax; mov es, ax; mov fs, ax; mov gs, ax;);
        };
        g.attempt(|g| {
            flatten(&mut g.a);
            x86!(&mut g.a, mov ebx, 0x20_0000u32; mov dword_ptr(ebx), 0x1234_5678; mov dword_ptr(ebx + 4).fs(), 0x2345_6789;
                mov eax, dword_ptr(ebx).es(););
            g.tell();
            x86!(&mut g.a, mov eax, 0x20_0004u32; mov eax, dword_ptr(eax).gs(););
            g.tell();
            // Loading a selector changes the base only.
            x86!(&mut g.a, mov ax, 0x100; mov ds, ax; mov eax, dword_ptr(ebx - 0x1000););
            g.tell();
            x86!(&mut g.a, push es; pop ds; mov eax, dword_ptr(ebx + 4););
            g.tell();
            x86!(&mut g.a, lds si, dword_ptr(ebx); mov eax, 0x20_0000u32 - 0x1_2340; mov eax, dword_ptr(eax););
            g.tell();
        });
        g.attempt(|g| {
            // Strings with addresses of 32 bits, above 1 MiB and over 64 KiB.
            flatten(&mut g.a);
            x86!(&mut g.a, mov edi, 0x30_0000u32; mov eax, 0x0101_0203u32; mov ecx, 0x8001u32;);
            g.a.db(&[0xf3, 0x67, 0x66, 0xab]).unwrap(); // rep stosd, 32-bit addresses
            tell_registers(g);
            x86!(&mut g.a, xor ax, ax; mov ds, ax; mov es, ax; mov esi, 0x30_0001u32; mov edi, 0x40_0000u32; mov ecx, 0x1_8000u32;);
            g.a.db(&[0xf3, 0x67, 0xa4]).unwrap(); // rep movsb
            tell_registers(g);
            x86!(&mut g.a, xor ax, ax; mov ds, ax; mov eax, 0x41_7ffcu32; mov eax, dword_ptr(eax););
            g.tell();
        });
        g.attempt(|g| {
            // A stack whose pointer has 32 bits, in real mode.
            protected(&mut g.a);
            x86!(&mut g.a, mov bx, 8; mov ss, bx; mov esp, 0x25_0000u32;);
            unprotected(&mut g.a);
            x86!(&mut g.a, xor ax, ax; mov ss, ax; push 0x1234; push ebx; call 0xc000u64; mov eax, esp; call 0xc000u64;
                pop ecx; pop dx; mov eax, esp; call 0xc000u64; mov eax, dword_ptr(esp - 8).ss(); call 0xc000u64;);
            x86!(&mut g.a, mov ebp, 0x25_0000u32; enter 8, 0; mov eax, esp; call 0xc000u64; leave; mov eax, esp; call 0xc000u64;);
            // And back to 16 bits.
            protected(&mut g.a);
            x86!(&mut g.a, mov bx, 0x20; mov ss, bx;);
            unprotected(&mut g.a);
            x86!(&mut g.a, xor ax, ax; mov ss, ax; mov esp, STACK;);
        });
        // With the segments of 64 KiB again.
        g.attempt(|g| {
            protected(&mut g.a);
            x86!(&mut g.a, mov bx, 0x20; mov ds, bx; mov es, bx; mov fs, bx; mov gs, bx;);
            unprotected(&mut g.a);
            x86!(&mut g.a, mov eax, dword_ptr(0x600););
            g.tell();
        });
    });
}

#[test]
fn to_protected_mode_and_back() {
    compare("switch", |g| {
        make_gdt(g);
        // 16-bit code between: no jump after protection, jumps to 16- and 32-bit code, interrupts back in real mode.
        for _ in 0..2 {
            g.attempt(|g| {
                let mut narrow = g.label();
                g.address(narrow);
                x86!(&mut g.a, mov word_ptr(0x610), ax; mov word_ptr(0x612), 0x10;);
                protected(&mut g.a);
                // CS is what it was, and CPL 0.
                x86!(&mut g.a, mov cx, cs; mov dx, ss; mov ax, 0x20; mov ds, ax; jmp dword_ptr(0x610););
                g.place(&mut narrow);
                x86!(&mut g.a, mov ax, 8; mov ds, ax; mov es, ax; mov ss, ax; mov eax, 0x0011_2233u32; mov ebx, 0x20_0010u32; mov dword_ptr(ebx), eax;
                    xor eax, eax; str ax; mov esi, eax; mov di, cs; push dword_ptr(ebx); pop ebp;
                    mov ax, 0x20; mov ds, ax; mov es, ax; mov ss, ax; mov ax, 0x28; mov fs, ax;);
                unprotected(&mut g.a);
                // Still the segment of protected mode: a jump loads a real one.
                let mut real = g.label();
                x86!(&mut g.a, xor ax, ax; mov ds, ax; mov ss, ax; mov es, ax; mov fs, ax;);
                g.address(real);
                x86!(&mut g.a, push 0xf000; push ax; retf;);
                g.place(&mut real);
                tell_registers(g);
                x86!(&mut g.a, sti; int 0x44;);
            });
        }
        // 32-bit code at 800H, which goes back through the 16-bit segment at 0 to 900H, and that to real mode.
        g.put(
            0x800,
            &[
                0x66, 0xb8, 0x08, 0x00, // mov ax, 8
                0x8e, 0xd8, 0x8e, 0xd0, // mov ds, eax; mov ss, eax
                0xbc, 0x00, 0x00, 0x30, 0x00, // mov esp, 300000h
                0x68, 0x78, 0x56, 0x34, 0x12, 0x5b, // push 12345678h; pop ebx
                0x89, 0xe5, // mov ebp, esp
                0x66, 0xb8, 0x20, 0x00, 0x8e, 0xd8, 0x8e,
                0xd0, // mov ax, 20h; mov ds, eax; mov ss, eax
                0xea, 0x00, 0x09, 0x00, 0x00, 0x28, 0x00, // jmp 28h:900h
            ],
        );
        g.put(
            0x900,
            &[
                0xbc, 0x00, 0x80, // mov sp, 8000h
                0x0f, 0x20, 0xc0, 0x24, 0xfe, 0x0f, 0x22,
                0xc0, // mov eax, cr0; and al, feh; mov cr0, eax
                0xea, 0x10, 0x09, 0x00, 0x00, // jmp 0000:0910h
                0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, // xor ax, ax; mov ds, ax; mov ss, ax
                0xfb, 0xcd, 0x45, // sti; int 45h
            ],
        );
        g.attempt(|g| {
            protected(&mut g.a);
            g.a.db(&[0x66, 0xea, 0x00, 0x08, 0x00, 0x00, 0x18, 0x00]).unwrap(); // jmp dword 18h:800h
        });
        tell_registers(g);
        // LMSW sets PE, and does not clear it.
        g.attempt(|g| {
            x86!(&mut g.a, mov ax, 1; lmsw ax; xor ax, ax; lmsw ax; smsw ax; and eax, 1; mov ecx, eax;);
            unprotected(&mut g.a);
            x86!(&mut g.a, mov eax, ecx; call 0xc000u64;);
        });
    });
}

#[test]
fn tables_and_registers() {
    compare("tables", |g| {
        // LGDT and LIDT of 16 bits take 24 bits of the base; SGDT and SIDT store all.
        g.put(0x600, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12]);
        for prefix in [&[][..], &[0x66]] {
            g.attempt(|g| {
                g.a.db(&[prefix, &[0x0f, 0x01, 0x16, 0x00, 0x06]].concat()).unwrap();
                g.put(0x610, &[0xee; 8]);
                g.a.db(&[0x66, 0x0f, 0x01, 0x06, 0x10, 0x06]).unwrap();
                g.tell_memory(0x610);
                g.tell_memory(0x614);
            });
        }
        // Vectors elsewhere: as many as there are, the 16 first ones but for 4 bytes.
        g.attempt(|g| {
            x86!(&mut g.a, xor si, si; mov di, 0xa000u32 as i32; mov cx, 0x200; db &[0xf3]; movsw; nop;);
            g.put(0xa000 + 4 * 0x50, &[0, 0xa8, 0, 0]);
            g.put(0xa800, &[0xcd, 0x51]);
            g.put(0x600, &[0xff, 3, 0, 0xa0, 0, 0]);
            g.a.db(&[0x0f, 0x01, 0x1e, 0x00, 0x06]).unwrap();
            x86!(&mut g.a, int 0x50;);
        });
        for limit in [0x43u8, 0x42, 0x3b] {
            g.attempt(|g| {
                g.put(0x600, &[limit, 0, 0, 0xa0, 0, 0]);
                g.a.db(&[0x0f, 0x01, 0x1e, 0x00, 0x06]).unwrap();
                x86!(&mut g.a, int 0x10;);
            });
            g.attempt(|g| x86!(&mut g.a, int 0x50;));
        }
        g.put(0x600, &[0xff, 3, 0, 0, 0, 0]);
        g.a.db(&[0x0f, 0x01, 0x1e, 0x00, 0x06]).unwrap();
        let all: [Emit; 10] = [
            |a| x86!(a, smsw eax; call 0xc000u64; mov word_ptr(0x604), -1; smsw word_ptr(0x604); mov eax, dword_ptr(0x604); call 0xc000u64;),
            |a| x86!(a, mov eax, cr0; call 0xc000u64; mov eax, cr4; call 0xc000u64; mov eax, cr3; call 0xc000u64;),
            |a| x86!(a, mov eax, 0x1234_5678u32; mov cr2, eax; xor eax, eax; mov eax, cr2; call 0xc000u64;),
            |a| {
                x86!(a, mov eax, 0x1234_5678u32; mov dr3, eax; xor eax, eax; mov eax, dr3; call 0xc000u64; mov eax, dr7; call 0xc000u64;
                mov eax, dr6; call 0xc000u64;)
            },
            |a| x86!(a, mov ecx, 0x174u32; mov eax, 0x1230u32; xor edx, edx; wrmsr; xor eax, eax; rdmsr; call 0xc000u64;),
            |a| x86!(a, mov ecx, 0xc000_0080u32; rdmsr; call 0xc000u64;),
            |a| x86!(a, les di, dword_ptr(0x600); mov eax, edi; call 0xc000u64; mov ax, es; call 0xc000u64;),
            |a| x86!(a, mov dword_ptr(0x604), 0x1234; lfs edi, fword_ptr(0x600); mov eax, edi; call 0xc000u64; mov ax, fs; call 0xc000u64;),
            |a| x86!(a, mov dword_ptr(0x600), STACK as i32; mov dword_ptr(0x604), 0; lss esp, fword_ptr(0x600); mov eax, esp; call 0xc000u64;),
            |a| {
                x86!(a, mov eax, 0xffff_1234u32; mov gs, ax; mov eax, -1; mov eax, gs; call 0xc000u64; mov eax, -1; mov ax, gs; call 0xc000u64;
                push gs; pop cx; mov eax, ecx; call 0xc000u64; mov dword_ptr(0x608), -1; mov word_ptr(0x608), gs; mov eax, dword_ptr(0x608);
                call 0xc000u64;)
            },
        ];
        attempts(g, &all);
    });
}

#[test]
fn single_steps() {
    compare("steps", |g| {
        // Not STI, after which QEMU 7.2 holds the trap back as after MOV SS (SDM volume 3, 6.8.3 knows MOV SS and POP SS).
        let all: [Emit; 13] = [
            |a| x86!(a, nop; inc ax; dec ax; nop;),
            |a| x86!(a, mov ax, ss; mov ss, ax; nop; nop;),
            |a| x86!(a, push ss; pop ss; nop; nop;),
            |a| x86!(a, pushf; popf; nop; nop;),
            |a| x86!(a, pushf; pop ax; push ax; popf; nop;),
            |a| x86!(a, push 2; popf; nop; nop; ud2;),
            |a| x86!(a, mov cx, 3; mov si, 0xa000u32 as i32; mov di, 0xb000u32 as i32; db &[0xf3]; movsb; nop; nop;),
            |a| x86!(a, mov cx, 2; mov al, 1u32; mov di, 0xb000u32 as i32; db &[0xf2]; scasb; nop; nop;),
            |a| x86!(a, xor cx, cx; db &[0xf3]; movsb; nop; nop;),
            |a| x86!(a, in_ al, 0x80; out 0x80, al; nop;),
            |a| x86!(a, smsw ax; lmsw ax; nop;),
            |a| x86!(a, ud2; nop;),
            |a| x86!(a, cpuid; nop;),
        ];
        for emit in all {
            for steps in [0, 2, 9] {
                g.put(STEPS, &[steps, 0, 0, 0]);
                g.attempt(|g| {
                    x86!(&mut g.a, push 0x102; popf;);
                    emit(&mut g.a);
                    x86!(&mut g.a, nop; push 2; popf; nop; ud2;);
                });
                g.put(STEPS, &[0; 4]);
            }
        }
        // Interrupts clear it, and IRET brings it back; far calls keep it.
        for steps in [0u8, 1, 3, 5] {
            g.put(0xa900, &[0x90, 0x90, 0xcf]);
            g.put(4 * 0x60, &[0, 0xa9, 0, 0]);
            g.put(0xaa00, &[0x90, 0xcb]);
            for code in [&[0xcd, 0x60][..], &[0x9a, 0, 0xaa, 0, 0]] {
                g.put(STEPS, &[steps, 0, 0, 0]);
                g.attempt(|g| {
                    x86!(&mut g.a, push 0x302; popf;);
                    g.a.db(code).unwrap();
                    x86!(&mut g.a, nop; push 2; popf; nop; ud2;);
                });
                g.put(STEPS, &[0; 4]);
            }
        }
    });
}

/// Code that changes code: itself, what comes next, what ran before; by itself, by strings, by the stack, through another
/// segment.
#[test]
fn self_modifying() {
    compare("modify", |g| {
        let programs: [&[u8]; 9] = [
            // mov byte [7106h], 43h; nop (inc bx); int 33h
            &[0xc6, 0x06, 0x05, 0x71, 0x43, 0x90, 0xcd, 0x33],
            // mov word [7107h], 4343h; nop; nop; nop; int 33h: the last two
            &[0xc7, 0x06, 0x07, 0x71, 0x43, 0x43, 0x90, 0x90, 0x90, 0xcd, 0x33],
            // mov cx, 4; mov di, 710ah; mov al, 43h; rep stosb; (43h *4); int 33h
            &[
                0xb9, 4, 0, 0xbf, 0x0a, 0x71, 0xb0, 0x43, 0xf3, 0xaa, 0x90, 0x90, 0x90, 0x90, 0xcd,
                0x33,
            ],
            // mov cx, 5; again: add bx, 1; inc byte [7105h]; loop again; int 33h
            &[0xb9, 5, 0, 0x83, 0xc3, 0x01, 0xfe, 0x06, 0x05, 0x71, 0xe2, 0xf7, 0xcd, 0x33],
            // mov cx, 3; again: call 7110h; mov byte [7110h], 4bh (dec bx); loop again; int 33h. 7110h: inc bx; ret
            &[
                0xb9, 3, 0, 0xe8, 0x0a, 0x00, 0xc6, 0x06, 0x10, 0x71, 0x4b, 0xe2, 0xf6, 0xcd, 0x33,
                0x90, 0x43, 0xc3,
            ],
            // mov sp, 710ah; mov ax, 4343h; push ax; (43h 43h); int 33h, whose frame comes over what is done
            &[
                0xbc, 0x0a, 0x71, 0xb8, 0x43, 0x43, 0x50, 0x90, 0x90, 0x90, 0xbc, 0x00, 0x60, 0xcd,
                0x33,
            ],
            // mov ax, 710h; mov ds, ax; mov byte [10h], 43h; nops; int 33h
            &[
                0xb8, 0x10, 0x07, 0x8e, 0xd8, 0xc6, 0x06, 0x0c, 0x00, 0x43, 0x90, 0x90, 0x90, 0xcd,
                0x33,
            ],
            // mov cx, 3; again: mov byte [7107h], 43h; nop; mov byte [7107h], 4bh; loop; int 33h
            &[
                0xb9, 3, 0, 0xc6, 0x06, 0x08, 0x71, 0x43, 0x90, 0xc6, 0x06, 0x08, 0x71, 0x4b, 0xe2,
                0xf3, 0xcd, 0x33,
            ],
            // lock inc byte [7106h] (its ModRM's neighbour is the next instruction's opcode: 42h becomes 43h)
            &[0xf0, 0xfe, 0x06, 0x05, 0x71, 0x42, 0xcd, 0x33],
        ];
        // The handler has kept BX, which counts.
        let tell = |g: &mut Guest| {
            x86!(&mut g.a, xor eax, eax; mov ax, bx;);
            g.tell();
        };
        for program in programs {
            for _ in 0..2 {
                g.attempt(|g| {
                    g.put(0x7100, program);
                    x86!(&mut g.a, xor bx, bx; xor dx, dx; push 0; push 0x7100; retf;);
                });
                tell(g);
            }
        }
        // The same over the end of a page: the code is 4 bytes before it.
        for program in programs {
            g.attempt(|g| {
                let mut moved = program.to_vec();
                for i in 0..moved.len() - 1 {
                    if moved[i + 1] == 0x71 && moved[i] < 0x20 {
                        moved[i + 1] = 0x80;
                        moved[i] = moved[i].wrapping_sub(4);
                        if moved[i] > 0x20 {
                            moved[i + 1] = 0x7f;
                        }
                    }
                }
                g.put(0x7ffc, &moved);
                x86!(&mut g.a, xor bx, bx; xor dx, dx; push 0; push 0x7ffc; retf;);
            });
            tell(g);
        }
        // And what was left of it all.
        for at in (0x7100..0x7120).step_by(4).chain((0x7ff0..0x8010).step_by(4)) {
            g.tell_memory(at);
        }
    });
}
