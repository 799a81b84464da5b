//! What only an operating system sees of a CPU, held against QEMU's TCG: page faults, exceptions and their frames,
//! changes of privilege, system calls, debug traps, control registers.
//!
//! Where processors differ legitimately the guests do not look, and say why.

mod control;
mod debug;
mod events;
mod exceptions;
mod gates;
#[path = "../qemu/guest.rs"]
mod guest;
mod narrow;
mod paging;
mod ports;
#[path = "../qemu/mod.rs"]
mod qemu;
mod real;
#[path = "../qemu/real.rs"]
mod real_guest;
mod segments;
mod syscalls;
mod tasks;
mod v86;

use guest::{Guest, Mode, compare, x86};
use iced_x86::code_asm::*;

const PAGED: [Mode; 3] = [Mode::Paged, Mode::Pae, Mode::Long];
const BOTH: [Mode; 2] = [Mode::Flat, Mode::Long];
/// IOPL 3, so that CPL 3 may do anything that flags allow.
const IOPL3: u32 = 0x3002;

fn in_modes(name: &str, modes: &[Mode], test: impl Fn(&mut Guest)) {
    for mode in modes {
        compare(name, *mode, &test);
    }
}

fn set_cr0(g: &mut Guest, set: u32, clear: u32) {
    match g.mode {
        Mode::Long => {
            x86!(&mut g.a, mov rax, cr0; or eax, set as i32; and eax, !clear as i32; mov cr0, rax;)
        }
        _ => {
            x86!(&mut g.a, mov eax, cr0; or eax, set as i32; and eax, !clear as i32; mov cr0, eax;)
        }
    }
}

fn set_cr4(g: &mut Guest, set: u32, clear: u32) {
    match g.mode {
        Mode::Long => {
            x86!(&mut g.a, mov rax, cr4; or eax, set as i32; and eax, !clear as i32; mov cr4, rax;)
        }
        _ => {
            x86!(&mut g.a, mov eax, cr4; or eax, set as i32; and eax, !clear as i32; mov cr4, eax;)
        }
    }
}
