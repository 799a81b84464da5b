//! When interrupts and NMIs are taken: after STI and POPF, in HLT, while an NMI is handled.
//!
//! They come from the local APIC, which the guest asks to interrupt itself. QEMU takes what becomes due at the end of a
//! stretch of code, so that only what was due before IF was set has a place that can be compared.

use iced_x86::code_asm::*;

use crate::guest::{Guest, IDT, Mode, sel, x86};
use crate::in_modes;

const APIC: u32 = 0xfee0_0000;
const VECTOR: u32 = 0x50;
/// A vector of its own.
const OWN: u32 = 0x90;
/// How many NMIs were taken.
const COUNT: u32 = 0xe000;

fn enable(g: &mut Guest) {
    g.poke(APIC + 0xf0, 0x1ff);
    g.poke(APIC + 0x310, 0);
}

/// Interrupts itself.
fn send(g: &mut Guest, vector: u32) {
    g.poke(APIC + 0x300, 0x4_0000 | vector);
}

fn acknowledge(g: &mut Guest) {
    x86!(&mut g.a, cli;);
    g.poke(APIC + 0xb0, 0);
    g.tell_memory(APIC + 0x200 + 0x10 * (VECTOR / 32));
}

type Emit = fn(&mut Guest);

#[test]
fn interrupt_shadow() {
    in_modes("shadow", &[Mode::Flat], |g| {
        enable(g);
        let all: [Emit; 13] = [
            |g| x86!(&mut g.a, sti; nop; nop;),
            |g| x86!(&mut g.a, nop; sti; inc ecx; nop;),
            // Never, and after HLT.
            |g| x86!(&mut g.a, sti; cli; nop;),
            |g| x86!(&mut g.a, sti; hlt; nop;),
            |g| x86!(&mut g.a, push 0x202; popfd; nop; nop;),
            |g| x86!(&mut g.a, push 2; popfd; nop; nop;),
            // The instruction in the shadow faults, or is an interrupt itself. Not through a trap gate, whose handler's
            // first instruction QEMU 7.2 has in the shadow too (SDM volume 2, STI: one instruction).
            |g| x86!(&mut g.a, sti; ud2; nop;),
            |g| x86!(&mut g.a, sti; int 0x80;),
            |g| {
                let mut there = g.label();
                g.address(there);
                x86!(&mut g.a, push 0x202; push sel::CODE as i32; push eax; iretd;);
                g.place(&mut there);
                x86!(&mut g.a, nop; nop;);
            },
            |g| g.user(0x202, |g| x86!(&mut g.a, nop; nop;)),
            |g| g.user(0x3002, |g| x86!(&mut g.a, nop; sti; nop; nop;)),
            |g| {
                let mut there = g.label();
                x86!(&mut g.a, sti; jmp there; nop;);
                g.place(&mut there);
                x86!(&mut g.a, nop; nop;);
            },
            |g| {
                x86!(&mut g.a, mov ecx, 3u32; mov esi, 0xe000u32; mov edi, 0xe100u32; sti;);
                g.a.rep().movsb().unwrap();
                x86!(&mut g.a, mov eax, ecx;);
                g.tell();
            },
        ];
        for emit in all {
            g.attempt(|g| {
                send(g, VECTOR);
                emit(g);
            });
            x86!(&mut g.a, sti; nop; cli;);
            acknowledge(g);
        }
        // The higher one first; the lower one waits for the end of the first.
        g.attempt(|g| {
            send(g, VECTOR);
            send(g, 0x60);
            x86!(&mut g.a, sti; nop; nop;);
        });
        g.attempt(|g| x86!(&mut g.a, sti; nop; nop;));
        acknowledge(g);
        g.attempt(|g| x86!(&mut g.a, sti; nop; nop;));
        acknowledge(g);
    });
}

/// An NMI to itself, and time for it to come.
fn send_nmi(g: &mut Guest) {
    g.poke(APIC + 0x300, 0x4400);
    for _ in 0..4 {
        let mut next = g.label();
        x86!(&mut g.a, jmp next;);
        g.place(&mut next);
        x86!(&mut g.a, nop;);
    }
}

/// Sets a gate of the IDT to `label`.
fn gate(g: &mut Guest, vector: u32, access: u32, label: CodeLabel) {
    g.address(label);
    x86!(&mut g.a, mov word_ptr(IDT + 8 * vector), ax; shr eax, 16; mov word_ptr(IDT + 8 * vector + 6), ax;
        mov word_ptr(IDT + 8 * vector + 2), sel::CODE as i32; mov word_ptr(IDT + 8 * vector + 4), (access << 8) as i32;);
}

fn tell_count(g: &mut Guest, what: u32) {
    x86!(&mut g.a, mov eax, dword_ptr(COUNT); add eax, what as i32;);
    g.tell();
}

#[test]
fn nmis_wait_for_iret() {
    in_modes("nmi", &[Mode::Flat], |g| {
        enable(g);
        for nested in [false, true] {
            let (mut nmi, mut own, mut over, mut out) =
                (g.label(), g.label(), g.label(), g.label());
            x86!(&mut g.a, jmp over;);
            // Another one comes at once: when it is taken?
            g.place(&mut nmi);
            x86!(&mut g.a, push eax; inc dword_ptr(COUNT););
            tell_count(g, 0x1000);
            x86!(&mut g.a, cmp dword_ptr(COUNT), 3; jae out;);
            send_nmi(g);
            tell_count(g, 0x2000);
            if nested {
                // An IRET of something else lets it in.
                x86!(&mut g.a, int OWN as i32;);
                tell_count(g, 0x3000);
            }
            g.place(&mut out);
            tell_count(g, 0x4000);
            x86!(&mut g.a, pop eax; iretd;);
            g.place(&mut own);
            x86!(&mut g.a, push eax;);
            tell_count(g, 0x5000);
            x86!(&mut g.a, pop eax; iretd;);
            g.place(&mut over);
            x86!(&mut g.a, nop;);
            gate(g, 2, 0x8e, nmi);
            gate(g, OWN, 0xee, own);
            for user in [false, true] {
                g.poke(COUNT, 0);
                g.attempt(|g| {
                    let trigger = |g: &mut Guest| {
                        send_nmi(g);
                        x86!(&mut g.a, nop; nop;);
                    };
                    match user {
                        true => g.user(0x3002, trigger),
                        false => trigger(g),
                    }
                });
                g.tell_memory(COUNT);
            }
        }
    });
}
