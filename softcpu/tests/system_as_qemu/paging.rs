//! Paging: faults and their codes, large pages, SMEP and SMAP, stale translations.

use crate::guest::{Guest, Mode, compare, x86};
use crate::{IOPL3, PAGED, in_modes, set_cr0, set_cr4};
use iced_x86::code_asm::*;

/// Code at `at`: RET.
fn put_ret(g: &mut Guest, at: u32) {
    x86!(&mut g.a, mov byte_ptr(at), 0xc3;);
}

fn invlpg(g: &mut Guest, at: u32) {
    x86!(&mut g.a, invlpg ptr(at););
}

/// Reads, writes and runs `at`, at CPL 0 and at CPL 3.
#[derive(Clone, Copy)]
enum Touch {
    Read,
    Write,
    Run,
}
const TOUCHES: [Touch; 3] = [Touch::Read, Touch::Write, Touch::Run];

fn touch(g: &mut Guest, at: u32, how: Touch) {
    match (how, g.mode) {
        (Touch::Read, _) => x86!(&mut g.a, mov eax, dword_ptr(at + 0x10);),
        (Touch::Write, _) => x86!(&mut g.a, mov dword_ptr(at + 0x20), eax;),
        (Touch::Run, Mode::Long) => x86!(&mut g.a, mov eax, at; call rax;),
        (Touch::Run, _) => x86!(&mut g.a, mov eax, at; call eax;),
    }
}

/// Touches `at` in every way, each time with the entry at `entry` fresh, and tells the entry then.
fn touch_all(g: &mut Guest, at: u32, entry: u32, value: u64) {
    for how in TOUCHES {
        for user in [false, true] {
            g.entry(entry, value);
            invlpg(g, at);
            g.attempt(|g| match user {
                true => g.user(IOPL3, |g| touch(g, at, how)),
                false => touch(g, at, how),
            });
            g.tell_memory(entry);
        }
    }
}

#[test]
fn page_fault_codes() {
    in_modes("pf", &PAGED, |g| {
        let (at, [pte, pde, _]) = (g.mode.window(), g.mode.entries());
        put_ret(g, 0x10_0000);
        for bits in [0x6u64, 0x1, 0x3, 0x5, 0x7, 0x67] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
        // The directory's rights count too.
        for bits in [0u64, 1, 3, 5] {
            g.entry(pde, 0x7000 | bits);
            touch_all(g, at, pte, 0x10_0007);
        }
        g.entry(pde, 0x7007);
        set_cr0(g, 0, 1 << 16);
        for bits in [1u64, 5] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
    });
}

#[test]
fn reserved_bits_and_nx() {
    in_modes("pf-nx", &[Mode::Pae, Mode::Long], |g| {
        let (at, [pte, pde, _]) = (g.mode.window(), g.mode.entries());
        put_ret(g, 0x10_0000);
        touch_all(g, at, pte, 0x10_0007 | 1 << 63);
        touch_all(g, at, pte, 0x10_0007 | 1 << 51);
        touch_all(g, at, pte, 0x10_0001 | 1 << 45);
        if g.mode == Mode::Pae {
            touch_all(g, at, pte, 0x10_0007 | 1 << 60);
        }
        g.entry(pde, 0x7007 | 1 << 63);
        touch_all(g, at, pte, 0x10_0007);
        // A large page: its address bits below its size are reserved.
        g.entry(pde, 0x7007);
        let (large, [_, _, entry]) = (g.mode.large(), g.mode.entries());
        touch_all(g, large, entry, 0x80_0087 | 1 << 13);
        touch_all(g, large, entry, 0x80_0087 | 1 << 63);
    });
    compare("pf-no-nx", Mode::Long, |g| {
        let (at, [pte, ..]) = (g.mode.window(), g.mode.entries());
        g.wrmsr(0xc000_0080, 0x101);
        touch_all(g, at, pte, 0x10_0007 | 1 << 63);
    });
}

#[test]
fn large_pages() {
    in_modes("large", &PAGED, |g| {
        let (at, [_, _, entry]) = (g.mode.large(), g.mode.entries());
        put_ret(g, at);
        x86!(&mut g.a, mov dword_ptr(at + 0x1f_1000), 0x1234_5678;);
        for bits in [0x81u64, 0x83, 0x85, 0x87] {
            touch_all(g, at, entry, 0x80_0000 | bits);
        }
        g.entry(entry, 0x80_0087);
        invlpg(g, at);
        g.tell_memory(at + 0x1f_1000);
    });
    // PSE-36 and CR4.PSE: without it bit 7 is not looked at, and the entry leads to a table.
    compare("pse", Mode::Paged, |g| {
        let (at, [_, _, entry]) = (g.mode.large(), g.mode.entries());
        touch_all(g, at, entry, 0x80_0087 | 1 << 21);
    });
}

#[test]
fn smep_and_smap() {
    in_modes("smep", &PAGED, |g| {
        let (at, [pte, ..]) = (g.mode.window(), g.mode.entries());
        put_ret(g, 0x10_0000);
        set_cr4(g, 1 << 20, 0);
        for bits in [1u64, 5, 7] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
        set_cr4(g, 1 << 21, 1 << 20);
        for bits in [3u64, 5, 7] {
            touch_all(g, at, pte, 0x10_0000 | bits);
        }
        for how in TOUCHES {
            g.attempt(|g| {
                x86!(&mut g.a, stac;);
                touch(g, at, how);
                x86!(&mut g.a, clac;);
                touch(g, at, how);
            });
        }
        set_cr4(g, 1 << 20, 1 << 21);
        touch_all(g, at, pte, 0x10_0007);
        g.attempt(|g| g.user(IOPL3, |g| x86!(&mut g.a, stac;)));
        g.attempt(|g| g.user(IOPL3, |g| x86!(&mut g.a, clac;)));
    });
}

#[test]
fn entries_change_with_invlpg() {
    in_modes("invlpg", &PAGED, |g| {
        let (at, [pte, ..]) = (g.mode.window(), g.mode.entries());
        g.poke(0x10_0000, 0x1111);
        g.poke(0x10_1000, 0x2222);
        g.entry(pte, 0x10_0003);
        invlpg(g, at);
        g.tell_memory(at);
        g.tell_memory(pte);
        g.entry(pte, 0x10_1003);
        invlpg(g, at);
        g.tell_memory(at);
        g.poke(at, 0x3333);
        g.tell_memory(pte);
        g.tell_memory(0x10_1000);
        g.entry(pte, 0x10_0002);
        // CR3 again does as well.
        match g.mode {
            Mode::Long => x86!(&mut g.a, mov rax, cr3; mov cr3, rax;),
            _ => x86!(&mut g.a, mov eax, cr3; mov cr3, eax;),
        }
        g.attempt(|g| touch(g, at, Touch::Read));
        // A store across two pages: neither half is there when the second one faults.
        g.entry(pte, 0x10_0003);
        invlpg(g, at);
        g.poke(at + 0xffc, 0);
        g.attempt(|g| x86!(&mut g.a, mov dword_ptr(at + 0xffe), -1;));
        g.tell_memory(at + 0xffc);
        // Not of a user.
        g.attempt(|g| g.user(IOPL3, |g| x86!(&mut g.a, invlpg ptr(at);)));
    });
}
