//! Guests that try things in real mode and tell what came of them, as [`crate::guest`] does in protected mode.
//!
//! ```text
//!   ROM  F000:0000 prologue   0200 test   C000 tell   C100 handler   D000 a stub a vector
//!   RAM  0 IVT   0500 variables   9000 stack   A000 and up the test's
//! ```

use iced_x86::code_asm::*;
use lodge_softcpu::Tier;

use crate::guest::{CPU, same, x86};
use crate::qemu::{DONE, ROM, TELL, blank, here, in_qemu, qemu_for};

const TEST: u64 = 0x200;
const TELL_EAX: u64 = 0xc000;
const HANDLER: u64 = 0xc100;
const STUBS: u64 = 0xd000;
/// Where a handler goes on, an offset in F000H.
const RESUME: u32 = 0x500;
/// How many single steps return to where they were.
pub const STEPS: u32 = 0x504;
/// The top of the stack, in segment 0.
pub const STACK: u32 = 0x9000;
/// Flags that are told: TF, IF, DF, IOPL, NT.
const TOLD: u32 = 0x7700;

/// A guest being written.
pub struct Guest {
    pub a: CodeAssembler,
    attempts: u32,
}

impl Guest {
    /// Tells EAX.
    pub fn tell(&mut self) {
        x86!(&mut self.a, call TELL_EAX;);
    }

    /// Tells 32 bits of segment 0, which DS must be.
    pub fn tell_memory(&mut self, at: u32) {
        x86!(&mut self.a, mov eax, dword_ptr(at););
        self.tell();
    }

    /// A label for `address` and jumps.
    pub fn label(&mut self) -> CodeLabel {
        self.a.create_label()
    }

    pub fn place(&mut self, label: &mut CodeLabel) {
        self.a.set_label(label).unwrap();
    }

    /// The offset of `label` in EAX; BX is lost.
    pub fn address(&mut self, label: CodeLabel) {
        let mut over = self.label();
        // From the distance in a CALL that is only there for it.
        x86!(&mut self.a, call over; call label; set_label &mut over; pop bx; xor eax, eax;
            mov ax, word_ptr(bx + 1).cs(); add ax, bx; add ax, 3;);
    }

    /// Bytes at `at` in segment 0, 4 at once.
    pub fn put(&mut self, at: u32, bytes: &[u8]) {
        for (i, four) in bytes.chunks(4).enumerate() {
            let mut word = [0x90; 4];
            word[..four.len()].copy_from_slice(four);
            x86!(&mut self.a, mov dword_ptr(at + 4 * i as u32), u32::from_le_bytes(word) as i32;);
        }
    }

    /// Bytes at `at`, a linear address below 1 MiB; DS and EAX are lost.
    pub fn put_far(&mut self, at: u32, bytes: &[u8]) {
        x86!(&mut self.a, mov ax, (at >> 4) as i32; mov ds, ax;);
        self.put(at & 15, bytes);
        x86!(&mut self.a, xor ax, ax; mov ds, ax;);
    }

    /// Runs what `what` writes; tells a word of FEH if it gets to its end, else its exception. Then goes on with fresh
    /// segments and a fresh stack. EAX and BX are lost.
    pub fn attempt(&mut self, what: impl FnOnce(&mut Self)) {
        self.attempts += 1;
        let mut over = self.label();
        x86!(&mut self.a, mov eax, 0xa5a5_0000 | self.attempts;);
        self.tell();
        self.address(over);
        x86!(&mut self.a, mov word_ptr(RESUME), ax; xor eax, eax;);
        what(self);
        x86!(&mut self.a, mov al, 0xfeu32;);
        for _ in 0..4 {
            x86!(&mut self.a, out TELL, al;);
        }
        self.place(&mut over);
        x86!(&mut self.a, xor ax, ax; mov ds, ax; mov es, ax; mov fs, ax; mov gs, ax; mov ss, ax; mov esp, STACK; cld;);
    }

    /// Ends the guest.
    pub fn end(&mut self) {
        x86!(&mut self.a, mov al, 0u32; mov dx, DONE as i32; out dx, al;);
    }
}

fn prologue() -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    let mut again = a.create_label();
    x86!(&mut a, cli; cld; xor ax, ax; mov ds, ax; mov es, ax; mov fs, ax; mov gs, ax; mov ss, ax; mov esp, STACK;
        mov cx, 256; xor di, di; mov eax, (ROM << 12 | STUBS) as u32; set_label &mut again; stosd; add ax, 16;
        loop_ again; jmp TEST;);
    a.assemble(0).unwrap()
}

fn tell_routine() -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    x86!(&mut a, pushf; cli;);
    for _ in 0..4 {
        x86!(&mut a, out TELL, al; ror eax, 8u32;);
    }
    x86!(&mut a, popf; ret;);
    a.assemble(TELL_EAX).unwrap()
}

/// What a stub leads to. On the stack: vector, IP, CS, FLAGS.
fn handler() -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    x86!(&mut a, push ds; push eax; push bp; mov bp, sp; xor ax, ax; mov ds, ax; mov eax, esp; call TELL_EAX;);
    for i in [8i32, 10, 12, 14] {
        x86!(&mut a, xor eax, eax; mov ax, word_ptr(bp + i););
        if i == 14 {
            x86!(&mut a, and ax, TOLD as i32;);
        }
        x86!(&mut a, call TELL_EAX;);
    }
    let (mut no_db, mut done) = (a.create_label(), a.create_label());
    x86!(&mut a, cmp word_ptr(bp + 8), 1; jne no_db; mov eax, dr6; call TELL_EAX; mov eax, 0xffff_0ff0u32;
        mov dr6, eax; set_label &mut no_db; cmp word_ptr(STEPS), 0; je done; dec word_ptr(STEPS);
        pop bp; pop eax; pop ds; add sp, 2; iret;
        set_label &mut done; xor ax, ax; mov ss, ax; mov esp, STACK; push 2; popf; push 0xf000;
        push word_ptr(RESUME); retf;);
    a.assemble(HANDLER).unwrap()
}

fn rom(test: impl FnOnce(&mut Guest)) -> Vec<u8> {
    let mut guest = Guest { a: CodeAssembler::new(16).unwrap(), attempts: 0 };
    test(&mut guest);
    guest.end();
    let mut end = guest.label();
    x86!(&mut guest.a, set_label &mut end; hlt; jmp end;);
    let mut rom = blank();
    let mut put = |at: u64, end: u64, bytes: &[u8]| {
        assert!(at + bytes.len() as u64 <= end, "{:#x} bytes at {at:#x}", bytes.len());
        rom[at as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    put(0, TEST, &prologue());
    put(TEST, TELL_EAX, &guest.a.assemble(TEST).unwrap());
    put(TELL_EAX, HANDLER, &tell_routine());
    put(HANDLER, STUBS, &handler());
    for vector in 0..256u64 {
        let at = STUBS + 16 * vector;
        // PUSH imm16, JMP rel16.
        let mut stub = vec![0x68, vector as u8, 0, 0xe9];
        stub.extend((HANDLER.wrapping_sub(at + 6) as u16).to_le_bytes());
        put(at, at + 16, &stub);
    }
    // JMP F000:0000.
    put(0xfff0, 0xfff5, &[0xea, 0, 0, 0, 0xf0]);
    rom
}

/// Runs `test` on both tiers of the software CPU and in QEMU.
pub fn compare(name: &str, test: impl FnOnce(&mut Guest)) {
    if !qemu_for(name) {
        return;
    }
    let rom = rom(test);
    let theirs = in_qemu(&format!("{name}-real"), CPU, &rom);
    assert!(!theirs.is_empty(), "QEMU's guest told nothing");
    for tier in [Tier::Blocks, Tier::Reference] {
        same(&format!("{name}, real mode, {tier:?}"), &here(&rom, tier), &theirs, 4);
    }
}
