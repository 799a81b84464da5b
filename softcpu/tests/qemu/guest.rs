//! Guests that try things and tell what came of them: a handler for every vector tells its frame, and goes on behind
//! the attempt.
//!
//! ```text
//!   ROM  F0000 prologue   F0200 test   FA000 GDT, TSS, IDT   FC000 tell   FC100 handler   FD000 a stub a vector
//!   RAM  1000 variables   2000 GDT   2800 TSS   2a00 TSS of a task   3000 IDT   4000..8000 paging
//!        9000 stack   a000 IST1   b000 stack at CPL 3   c000 stack from CPL 3   e000 the test's
//!   linear, paged: 0 supervisor's, [`Mode::alias`] the same memory for all, [`Mode::window`] a page table at 7000H,
//!        [`Mode::large`] a large page at 8 MiB
//! ```

use iced_x86::code_asm::*;
use lodge_softcpu::Tier;

pub use crate::qemu::ROM;
use crate::qemu::{DONE, TELL, blank, here, in_qemu, qemu_for};

/// Emits instructions: `x86!(a, mov eax, 1; push eax;)`.
macro_rules! x86 {
    ($a:expr, $($op:ident $($arg:expr),*;)*) => {{
        let a: &mut iced_x86::code_asm::CodeAssembler = $a;
        $(a.$op($($arg),*).unwrap();)*
    }};
}
pub(crate) use x86;

/// What QEMU's CPU must have of ours. QEMU 7.2 looks for XSAVEOPT where CR4.OSXSAVE needs XSAVE, and hangs without.
pub const CPU: &str =
    "Nehalem,+smep,+smap,+xsave,+xsaveopt,+umip,+fsgsbase,+rdtscp,+pdpe1gb,vendor=GenuineIntel";
const TEST: u64 = ROM + 0x200;
const TABLES: u64 = ROM + 0xa000;
const TELL_AX: u64 = ROM + 0xc000;
const HANDLER: u64 = ROM + 0xc100;
const STUBS: u64 = ROM + 0xd000;
/// Where a handler goes on.
const RESUME: u32 = 0x1000;
/// How many single steps return to where they were.
pub const STEPS: u32 = 0x1010;
/// The handler keeps ECX, DS and ES here.
const SAVED: u32 = 0x1018;
const SAVED_DS: u32 = 0x101c;
const SAVED_ES: u32 = 0x1020;
pub const STACK: u32 = 0x9000;
/// The GDT, for guests that change it.
pub const GDT: u32 = 0x2000;
/// The TSS.
pub const TSS: u32 = 0x2800;
/// A second TSS, that of [`sel::TASK`].
pub const TASK: u32 = 0x2a00;
/// The IDT.
pub const IDT: u32 = 0x3000;
/// TF, IF, DF, IOPL, NT, VM, AC, VIF, VIP, ID: what is left out are results, and RF, which QEMU 7.2 does not push.
const TOLD_FLAGS: u32 = 0x3e_7700;

/// Selectors of the GDT.
pub mod sel {
    pub const CODE: u32 = 0x08;
    pub const DATA: u32 = 0x10;
    pub const CODE64: u32 = 0x18;
    pub const USER_CODE: u32 = 0x23;
    pub const USER_DATA: u32 = 0x2b;
    pub const USER_CODE64: u32 = 0x33;
    pub const TSS: u32 = 0x38;
    pub const ABSENT_DATA: u32 = 0x48;
    pub const ABSENT_CODE: u32 = 0x50;
    pub const READ_ONLY: u32 = 0x58;
    pub const TASK: u32 = 0x60;
    pub const CONFORMING: u32 = 0x70;
    pub const EXECUTE_ONLY: u32 = 0x78;
    pub const SMALL: u32 = 0x88;
    /// From here to 7F8H is room for a guest's own.
    pub const FREE: u32 = 0x90;
}

/// How the test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 32-bit, no paging.
    Flat,
    /// 32-bit paging.
    Paged,
    /// PAE paging, NX.
    Pae,
    /// 64-bit.
    Long,
}

impl Mode {
    pub fn bits(self) -> u32 {
        if self == Mode::Long { 64 } else { 32 }
    }
    pub fn alias(self) -> u32 {
        match self {
            Mode::Flat => 0,
            Mode::Paged => 0x40_0000,
            Mode::Pae | Mode::Long => 0x20_0000,
        }
    }
    pub fn window(self) -> u32 {
        2 * self.alias()
    }
    pub fn large(self) -> u32 {
        3 * self.alias()
    }
    /// Where the entries of the window's page table, of the window itself and of the large page are.
    pub fn entries(self) -> [u32; 3] {
        match self {
            Mode::Paged => [0x7000, 0x4008, 0x400c],
            _ => [0x7000, 0x6010, 0x6018],
        }
    }
    fn word(self) -> u32 {
        self.bits() / 8
    }
}

/// A guest being written.
pub struct Guest {
    pub a: CodeAssembler,
    pub mode: Mode,
    attempts: u32,
}

impl Guest {
    /// Tells EAX, in 64-bit mode RAX.
    pub fn tell(&mut self) {
        x86!(&mut self.a, call TELL_AX;);
    }

    /// Tells 32 bits of memory.
    pub fn tell_memory(&mut self, at: u32) {
        x86!(&mut self.a, mov eax, dword_ptr(at););
        self.tell();
    }

    pub fn poke(&mut self, at: u32, value: u32) {
        x86!(&mut self.a, mov dword_ptr(at), value as i32;);
    }

    pub fn poke64(&mut self, at: u32, value: u64) {
        self.poke(at, value as u32);
        self.poke(at + 4, (value >> 32) as u32);
    }

    /// Sets a paging entry of this mode's size.
    pub fn entry(&mut self, at: u32, value: u64) {
        match self.mode {
            Mode::Paged => self.poke(at, value as u32),
            _ => self.poke64(at, value),
        }
    }

    pub fn wrmsr(&mut self, index: u32, value: u64) {
        x86!(&mut self.a, mov ecx, index; mov eax, value as u32; mov edx, (value >> 32) as u32; wrmsr;);
    }

    /// The address of `label` in EAX (RAX).
    pub fn address(&mut self, label: CodeLabel) {
        match self.mode {
            Mode::Long => x86!(&mut self.a, lea rax, ptr(label);),
            // From the distance in a CALL that is only there for it.
            _ => {
                let mut over = self.label();
                x86!(&mut self.a, call over; call label; set_label &mut over; pop eax;
                    add eax, dword_ptr(eax + 1); add eax, 5;);
            }
        }
    }

    /// Sets a descriptor of the GDT.
    pub fn descriptor(&mut self, selector: u32, value: u64) {
        self.poke64(GDT + (selector & !7), value);
    }

    /// Sets a gate of the GDT that leads to `label` in `target`; `access` is P, DPL and type, `parameters` of a call gate.
    /// EAX (RAX) is lost.
    pub fn gate(
        &mut self,
        selector: u32,
        access: u32,
        target: u32,
        label: CodeLabel,
        parameters: u32,
    ) {
        let at = GDT + (selector & !7);
        self.poke64(at + 8, 0);
        self.poke(at + 4, access << 8 | parameters);
        self.address(label);
        x86!(&mut self.a, mov word_ptr(at), ax; shr eax, 16; mov word_ptr(at + 6), ax;
            mov word_ptr(at + 2), target as i32;);
    }

    /// A label for `address` and jumps.
    pub fn label(&mut self) -> CodeLabel {
        self.a.create_label()
    }

    pub fn place(&mut self, label: &mut CodeLabel) {
        self.a.set_label(label).unwrap();
    }

    /// Runs what `what` writes; tells a word of FEH if it gets to its end, else its exception. Then goes on at CPL 0 with a fresh
    /// stack. EAX and EBP are lost.
    pub fn attempt(&mut self, what: impl FnOnce(&mut Self)) {
        self.attempts += 1;
        let mut over = self.label();
        x86!(&mut self.a, mov eax, 0xa5a5_0000 | self.attempts;);
        self.tell();
        self.address(over);
        match self.mode {
            Mode::Long => x86!(&mut self.a, mov qword_ptr(RESUME), rax;),
            _ => x86!(&mut self.a, mov dword_ptr(RESUME), eax;),
        }
        x86!(&mut self.a, mov eax, 0u32;);
        what(self);
        x86!(&mut self.a, mov al, 0xfeu32;);
        for _ in 0..self.mode.word() {
            x86!(&mut self.a, out TELL, al;);
        }
        self.place(&mut over);
        x86!(&mut self.a, mov eax, sel::DATA; mov ds, eax; mov es, eax; mov ss, eax; mov esp, STACK;);
    }

    /// 16-bit code, whose jumps are relative.
    pub fn code16(&mut self, what: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(16).unwrap();
        what(&mut a);
        self.a.db(&a.assemble(0x100).unwrap()).unwrap();
    }

    /// Code to be called from the attempts.
    pub fn routine(&mut self, what: impl FnOnce(&mut Self)) -> CodeLabel {
        let (mut begin, mut over) = (self.label(), self.label());
        x86!(&mut self.a, jmp over; set_label &mut begin;);
        what(self);
        x86!(&mut self.a, ret; set_label &mut over; nop;);
        begin
    }

    /// Ends the guest.
    pub fn end(&mut self) {
        x86!(&mut self.a, mov al, 0u32; mov edx, DONE; out dx, al;);
    }

    /// To CPL 3 with `flags`, there what `what` writes, and INT 80H.
    pub fn user(&mut self, flags: u32, what: impl FnOnce(&mut Self)) {
        let mut there = self.label();
        let alias = self.mode.alias();
        if self.mode != Mode::Long {
            x86!(&mut self.a, mov eax, sel::USER_DATA; mov ds, eax; mov es, eax;);
        }
        self.address(there);
        x86!(&mut self.a, add eax, alias as i32; push sel::USER_DATA as i32; push (0xb000 + alias) as i32;
            push flags as i32;);
        match self.mode {
            Mode::Long => x86!(&mut self.a, push sel::USER_CODE64 as i32; push rax; iretq;),
            _ => x86!(&mut self.a, push sel::USER_CODE as i32; push eax; iretd;),
        }
        self.place(&mut there);
        x86!(&mut self.a, mov eax, 0u32;);
        what(self);
        x86!(&mut self.a, int 0x80;);
    }
}

fn prologue(mode: Mode) -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    x86!(&mut a, mov eax, 0x10u32; mov ds, eax; mov es, eax; mov ss, eax; mov esp, STACK;
        mov esi, TABLES as u32; mov edi, 0x2000u32; mov ecx, 0x800u32; cld;);
    a.rep().movsd().unwrap();
    x86!(&mut a, lgdt ptr(0xf_ff90); lidt ptr(0xf_ffa0););
    let mut poke = |at: u32, value: u32| x86!(&mut a, mov dword_ptr(at), value as i32;);
    let directory = if mode == Mode::Paged { 0x4000 } else { 0x6000 };
    let step = if mode == Mode::Paged { 4 } else { 8 };
    for (i, entry) in [0x83, 0x87, 0x7007, 0x80_0087].into_iter().enumerate() {
        poke(directory + step * i as u32, entry);
    }
    if mode == Mode::Long {
        poke(0x4000, 0x5007);
        poke(0x5000, 0x6007);
    } else if mode == Mode::Pae {
        poke(0x5000, 0x6001);
    }
    if matches!(mode, Mode::Pae | Mode::Long) {
        let efer = if mode == Mode::Long { 0x901u32 } else { 0x800 };
        x86!(&mut a, mov ecx, 0xc000_0080u32; mov eax, efer; xor edx, edx; wrmsr;);
    }
    if mode != Mode::Flat {
        let cr4_bits = if mode == Mode::Paged { 0x10u32 } else { 0x20 };
        let root = if mode == Mode::Pae { 0x5000u32 } else { 0x4000 };
        x86!(&mut a, mov eax, cr4_bits; mov cr4, eax; mov eax, root; mov cr3, eax;
            mov eax, cr0; or eax, 0x8001_0000u32 as i32; mov cr0, eax;);
    }
    x86!(&mut a, mov eax, sel::TSS; ltr ax;);
    let code = if mode == Mode::Long { sel::CODE64 } else { sel::CODE } as u8;
    a.db(&[0xea, 0x00, 0x02, 0x0f, 0x00, code, 0]).unwrap();
    a.assemble(ROM).unwrap()
}

/// GDT, TSS and IDT, for 2000H.
fn tables(mode: Mode) -> Vec<u8> {
    let mut all = vec![0; 0x2000];
    let long = mode == Mode::Long;
    let tss = 0x8b00_0000_0067u64 & !(2 << 40) | u64::from(TSS) << 16;
    let gdt = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        tss,
        0,
        0x00cf_1300_0000_ffff,
        0x00cf_1b00_0000_ffff,
        0x00cf_9100_0000_ffff,
        tss + (0x200 << 16),
        0,
        0x00cf_9f00_0000_ffff,
        0x00cf_9900_0000_ffff,
        tss & !(0x80 << 40),
        0x0040_9300_0000_0fff,
    ];
    for (i, entry) in gdt.iter().enumerate() {
        all[8 * i..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    let mut put = |at: u32, value: u32| {
        all[(at - GDT) as usize..][..4].copy_from_slice(&value.to_le_bytes());
    };
    put(TSS + 4, 0xc000);
    put(TSS + 0x64, 0x68 << 16);
    if long {
        put(TSS + 0x24, 0xa000);
        put(TSS + 0x2c, 0xd008);
    } else {
        put(TSS + 8, sel::DATA);
    }
    for vector in 0..256u32 {
        let at = IDT + vector * if long { 16 } else { 8 };
        let stub = STUBS as u32 + 16 * vector;
        let code = if long { sel::CODE64 } else { sel::CODE };
        let kind = match vector {
            3 | 4 | 0x80 | 0x81 | 0x84 => 0xee00,
            // Not present; a trap gate; no gate at all.
            0x82 => 0x6e00,
            0x83 => 0xef00,
            0x85 => 0xf200,
            _ => 0x8e00,
        };
        let ist = match vector {
            8 | 0x81 if long => 1,
            0x84 if long => 2,
            _ => 0,
        };
        put(at, code << 16 | stub & 0xffff);
        put(at + 4, stub & 0xffff_0000 | kind | ist);
    }
    all
}

/// Tells EAX (RAX), and keeps it.
fn tell_routine(mode: Mode) -> Vec<u8> {
    let mut a = CodeAssembler::new(mode.bits()).unwrap();
    let mut again = a.create_label();
    let long = mode == Mode::Long;
    if long {
        x86!(&mut a, push rcx;);
    } else {
        x86!(&mut a, push ecx;);
    }
    x86!(&mut a, mov ecx, mode.word(); set_label &mut again; out TELL, al;);
    if long {
        x86!(&mut a, ror rax, 8u32; dec ecx; jne again; pop rcx; ret;);
    } else {
        x86!(&mut a, ror eax, 8u32; dec ecx; jne again; pop ecx; ret;);
    }
    a.assemble(TELL_AX).unwrap()
}

/// What a stub leads to. On the stack: vector, error code (or 0), the frame.
fn handler(mode: Mode) -> Vec<u8> {
    let long = mode == Mode::Long;
    let word = mode.word();
    let mut a = CodeAssembler::new(mode.bits()).unwrap();
    if long {
        x86!(&mut a, push rax; push rbp; mov rbp, rsp; mov rax, rsp;);
    } else {
        x86!(&mut a, push eax; push ebp; mov ebp, esp; mov word_ptr(SAVED_DS).ss(), ds; mov word_ptr(SAVED_ES).ss(), es;
            mov eax, 0x10u32; mov ds, eax; mov es, eax; mov eax, esp;);
    }
    x86!(&mut a, cld; mov dword_ptr(SAVED), ecx; call TELL_AX;);
    let load = |a: &mut CodeAssembler, i: u32| match long {
        true => x86!(a, mov rax, qword_ptr(rbp + word * i);),
        false => x86!(a, mov eax, dword_ptr(ebp + word * i);),
    };
    // Vector, error code, IP, CS; flags.
    load(&mut a, 2);
    x86!(&mut a, call TELL_AX; mov ecx, eax;);
    load(&mut a, 3);
    likely_error(&mut a, long);
    for i in 4..6 {
        load(&mut a, i);
        x86!(&mut a, call TELL_AX;);
    }
    load(&mut a, 6);
    x86!(&mut a, and eax, TOLD_FLAGS as i32; call TELL_AX;);
    let (mut inner, mut outer) = (a.create_label(), a.create_label());
    if !long {
        // From virtual-8086 mode: ES, DS, FS, GS.
        let mut other = a.create_label();
        x86!(&mut a, test dword_ptr(ebp + 24), 0x2_0000; je other;);
        for i in 9..13 {
            load(&mut a, i);
            x86!(&mut a, call TELL_AX;);
        }
        x86!(&mut a, set_label &mut other;);
        x86!(&mut a, test dword_ptr(ebp + 24), 0x2_0000; jne outer; test dword_ptr(ebp + 20), 3; je inner;);
    }
    x86!(&mut a, set_label &mut outer;);
    for i in 7..9 {
        load(&mut a, i);
        x86!(&mut a, call TELL_AX;);
    }
    x86!(&mut a, set_label &mut inner; nop;);
    let (mut no_pf, mut no_db) = (a.create_label(), a.create_label());
    load(&mut a, 2);
    x86!(&mut a, cmp al, 14; jne no_pf;);
    if long {
        x86!(&mut a, mov rax, cr2;);
    } else {
        x86!(&mut a, mov eax, cr2;);
    }
    x86!(&mut a, call TELL_AX; set_label &mut no_pf; nop;);
    load(&mut a, 2);
    x86!(&mut a, cmp al, 1; jne no_db;);
    if long {
        x86!(&mut a, mov rax, dr6; call TELL_AX; mov eax, 0xffff_0ff0u32; mov dr6, rax;);
    } else {
        x86!(&mut a, mov eax, dr6; call TELL_AX; mov eax, 0xffff_0ff0u32; mov dr6, eax;);
    }
    x86!(&mut a, cmp dword_ptr(STEPS), 0; je no_db; dec dword_ptr(STEPS); mov ecx, dword_ptr(SAVED););
    if long {
        x86!(&mut a, pop rbp; pop rax; add rsp, 16; iretq;);
    } else {
        x86!(&mut a, mov es, word_ptr(SAVED_ES); mov ds, word_ptr(SAVED_DS); pop ebp; pop eax; add esp, 8; iretd;);
    }
    x86!(&mut a, set_label &mut no_db; mov eax, 0x10u32; mov ss, eax; mov esp, STACK; push 2;);
    if long {
        x86!(&mut a, popfq; jmp qword_ptr(RESUME););
    } else {
        x86!(&mut a, popfd; jmp dword_ptr(RESUME););
    }
    a.assemble(HANDLER).unwrap()
}

/// Tells the error code in EAX, of the vector in CL, without what QEMU 7.2 gets wrong: it leaves P out where a reserved
/// bit is set (SDM volume 3, 4.7: bit 3 only with bit 0), and in 64-bit mode counts entries of the IDT by 16 bytes
/// (6.13: the index is the vector).
fn likely_error(a: &mut CodeAssembler, long: bool) {
    let (mut other, mut done) = (a.create_label(), a.create_label());
    x86!(a, cmp cl, 14; jne other; test al, 8; je done; or al, 1; jmp done; set_label &mut other; nop;);
    if long {
        x86!(a, test al, 2; je done; and eax, 7;);
    }
    x86!(a, set_label &mut done; call TELL_AX;);
}

fn rom(mode: Mode, test: impl FnOnce(&mut Guest)) -> Vec<u8> {
    let mut guest = Guest { a: CodeAssembler::new(mode.bits()).unwrap(), mode, attempts: 0 };
    x86!(&mut guest.a, mov eax, sel::DATA; mov ss, eax; mov ds, eax; mov es, eax; mov esp, STACK;);
    test(&mut guest);
    let mut end = guest.label();
    guest.end();
    x86!(&mut guest.a, set_label &mut end; hlt; jmp end;);
    let mut rom = blank();
    let mut put = |at: u64, end: u64, bytes: &[u8]| {
        assert!(at + bytes.len() as u64 <= end, "{:#x} bytes at {at:#x}", bytes.len());
        rom[(at - ROM) as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    put(ROM, TEST, &prologue(mode));
    put(TEST, TABLES, &guest.a.assemble(TEST).unwrap());
    put(TABLES, TELL_AX, &tables(mode));
    put(TELL_AX, HANDLER, &tell_routine(mode));
    put(HANDLER, STUBS, &handler(mode));
    for vector in 0..256u64 {
        let at = STUBS + 16 * vector;
        let mut stub = vec![];
        if !matches!(vector, 8 | 10..=14 | 17) {
            stub.extend([0x6a, 0]);
        }
        stub.extend([0x6a, vector as u8, 0xe9]);
        stub.extend((HANDLER.wrapping_sub(at + stub.len() as u64 + 4) as u32).to_le_bytes());
        put(at, at + 16, &stub);
    }
    put(0xf_ff90, 0xf_ffa0, &[0xff, 0x07, 0x00, 0x20, 0, 0]);
    put(0xf_ffa0, 0xf_ffb0, &[0xff, 0x0f, 0x00, 0x30, 0, 0]);
    rom
}

/// What was told, one attempt a line.
fn by_attempt(told: &[u8], word: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for bytes in told.chunks(word) {
        let value = bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        if value >> 16 == 0xa5a5 {
            lines.push(String::new());
        }
        lines.last_mut().unwrap().push_str(&format!("{value:x} "));
    }
    lines
}

/// Runs `test` on both tiers of the software CPU and in QEMU.
pub fn compare(name: &str, mode: Mode, test: impl FnOnce(&mut Guest)) {
    if !qemu_for(name) {
        return;
    }
    let rom = rom(mode, test);
    let theirs = in_qemu(&format!("{name}-{mode:?}"), CPU, &rom);
    assert!(!theirs.is_empty(), "QEMU's guest told nothing");
    let word = mode.word() as usize;
    for tier in [Tier::Blocks, Tier::Reference] {
        same(&format!("{name}, {mode:?}, {tier:?}"), &here(&rom, tier), &theirs, word);
    }
}

/// Panics, with the attempts that differ, unless both told the same.
pub fn same(name: &str, ours: &[u8], theirs: &[u8], word: usize) {
    if ours == theirs {
        return;
    }
    let (ours, theirs) = (by_attempt(ours, word), by_attempt(theirs, word));
    let differ: Vec<_> = ours
        .iter()
        .zip(&theirs)
        .filter(|(a, b)| a != b)
        .take(8)
        .map(|(a, b)| format!("ours   {a}\nQEMU's {b}\n"))
        .collect();
    panic!("{name}: {} and {} attempts\n{}", ours.len(), theirs.len(), differ.concat());
}
