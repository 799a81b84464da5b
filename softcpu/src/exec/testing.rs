//! Small guests for unit tests, each in one mode.
//!
//! ```text
//!   1000 GDT   2000 IDT or (real mode) 0 IVT   3000 TSS   3800 second TSS   4000 handlers, 16 bytes each
//!   6000 top of the stack of ring 3   7000 top of the stack of ring 0   8000 code   10000 page tables
//! ```

use iced_x86::code_asm::CodeAssembler;

use super::seg::rpl;
use super::step::emulate_one;
use crate::fault::Exec;
use crate::flags;
use crate::state::{Activity, Cpu, TableRegister, cr, reg, seg};

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TSS2: u64 = 0x3800;
/// Exception or interrupt `v` is handled at `HANDLERS + 16 * v`.
pub const HANDLERS: u64 = 0x4000;
pub const STACK3: u64 = 0x6000;
pub const STACK0: u64 = 0x7000;
pub const CODE: u64 = 0x8000;
pub const TABLES: u64 = 0x1_0000;

pub const CODE32: u16 = 0x08;
pub const DATA32: u16 = 0x10;
pub const USER_CODE32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const CODE64: u16 = 0x28;
pub const USER_CODE64: u16 = 0x33;
pub const TSS_SELECTOR: u16 = 0x38;
pub const TSS2_SELECTOR: u16 = 0x48;
/// Free for a test's own descriptor, 16 bytes.
pub const GATE: u16 = 0x50;
pub const CODE16: u16 = 0x60;
pub const DATA16: u16 = 0x68;
const GDT_LIMIT: u16 = 0x6f;

pub struct Machine {
    pub cpu: Box<Cpu>,
}

impl Machine {
    /// Real mode, all segments 0.
    pub fn real() -> Self {
        let mut cpu = Cpu::for_tests();
        for segment in &mut cpu.segs {
            segment.load_real(0);
        }
        cpu.rip = CODE;
        cpu.regs[reg::RSP] = STACK0;
        cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
        let mut machine = Self { cpu };
        for vector in 0..=255u64 {
            machine.put(vector * 4, &((HANDLERS + 16 * vector) as u32).to_le_bytes());
        }
        machine
    }

    /// 32-bit protected mode in ring 0, flat, no paging; every gate is an interrupt gate that ring 3 may use.
    pub fn protected() -> Self {
        let mut machine = Self::real();
        machine.put_gdt();
        machine.put_u64(GDT + 0x38, system_descriptor(TSS, 0x67, 9, 0));
        machine.put_u64(GDT + 0x48, system_descriptor(TSS2, 0x67, 9, 0));
        for vector in 0..=255u8 {
            machine.put_gate32(vector, CODE32, HANDLERS + 16 * u64::from(vector), 14, 3);
        }
        machine.put(TSS + 4, &(STACK0 as u32).to_le_bytes());
        machine.put(TSS + 8, &u32::from(DATA32).to_le_bytes());
        machine.put(TSS + 0x66, &[0x68, 0]);
        let cpu = &mut machine.cpu;
        cpu.cr0 |= cr::CR0_PE | cr::CR0_NE;
        cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
        machine.load_flat(CODE32, DATA32);
        machine.load_tr(0x67);
        machine
    }

    /// 64-bit mode in ring 0, the first MiB mapped for ring 3 by 4 KiB pages (see [`Machine::pte`]).
    pub fn long() -> Self {
        let mut machine = Self::real();
        machine.put_gdt();
        machine.put_u64(GDT + 0x38, system_descriptor(TSS, 0x67, 9, 0));
        for vector in 0..=255u8 {
            machine.put_gate64(vector, 0, 14, 3);
        }
        machine.put_u64(TSS + 4, STACK0);
        machine.put(TSS + 0x66, &[0x68, 0]);
        machine.put_u64(TABLES, (TABLES + 0x1000) | 7);
        machine.put_u64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        machine.put_u64(TABLES + 0x2000, (TABLES + 0x3000) | 7);
        for page in 0..256u64 {
            machine.put_u64(TABLES + 0x3000 + 8 * page, page << 12 | 7);
        }
        let cpu = &mut machine.cpu;
        cpu.cr4 = cr::CR4_PAE;
        cpu.cr3 = TABLES;
        cpu.efer = cr::EFER_LME | cr::EFER_LMA | cr::EFER_SCE | cr::EFER_NXE;
        cpu.cr0 |= cr::CR0_PE | cr::CR0_PG | cr::CR0_WP | cr::CR0_NE;
        cpu.idtr = TableRegister { base: IDT, limit: 0xfff };
        machine.load_flat(CODE64, DATA32);
        machine.load_tr(0x67);
        machine
    }

    fn put_gdt(&mut self) {
        for (i, descriptor) in [
            0,
            0x00cf_9a00_0000_ffff,
            0x00cf_9200_0000_ffff,
            0x00cf_fa00_0000_ffff,
            0x00cf_f200_0000_ffff,
            0x00af_9a00_0000_ffff,
            0x00af_fa00_0000_ffff,
        ]
        .into_iter()
        .enumerate()
        {
            self.put_u64(GDT + 8 * i as u64, descriptor);
        }
        self.put_u64(GDT + u64::from(CODE16), 0x0000_9a00_0000_ffff);
        self.put_u64(GDT + u64::from(DATA16), 0x0000_9200_0000_ffff);
        self.cpu.gdtr = TableRegister { base: GDT, limit: GDT_LIMIT };
    }

    fn load_flat(&mut self, code: u16, data: u16) {
        self.cpu.update_mode();
        self.load_cs(code);
        self.load_data(data);
    }

    fn load_data(&mut self, data: u16) {
        for index in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
            let descriptor = self.cpu.descriptor(data).unwrap().unwrap();
            self.cpu.segs[index] = descriptor.segment(data);
            self.cpu.update_mode();
        }
    }

    fn load_cs(&mut self, code: u16) {
        let descriptor = self.cpu.descriptor(code).unwrap().unwrap();
        self.cpu.segs[seg::CS] = descriptor.segment(code);
        self.cpu.update_mode();
    }

    fn load_tr(&mut self, limit: u32) {
        let tr = &mut self.cpu.tr;
        *tr = crate::state::Segment { base: TSS, limit, selector: TSS_SELECTOR, attr: 0x8b };
        let busy = self.get_u64(GDT + u64::from(TSS_SELECTOR)) | 2 << 40;
        self.put_u64(GDT + u64::from(TSS_SELECTOR), busy);
    }

    /// Goes to ring 3, on its stack.
    pub fn user(mut self) -> Self {
        let code = if self.cpu.mode.bits == 64 { USER_CODE64 } else { USER_CODE32 };
        self.load_cs(code);
        self.load_data(USER_DATA);
        assert_eq!(self.cpu.mode.cpl, rpl(code));
        self.cpu.regs[reg::RSP] = STACK3;
        self
    }

    /// A gate of the IDT outside of long mode.
    pub fn put_gate32(&mut self, vector: u8, selector: u16, offset: u64, kind: u64, dpl: u64) {
        let at = IDT + 8 * u64::from(vector);
        self.put_u64(at, gate(selector, offset, kind, dpl));
    }

    /// A gate of long mode's IDT to the usual handler.
    pub fn put_gate64(&mut self, vector: u8, ist: u64, kind: u64, dpl: u64) {
        let at = IDT + 16 * u64::from(vector);
        let offset = HANDLERS + 16 * u64::from(vector);
        self.put_u64(at, gate(CODE64, offset, kind, dpl) | ist << 32);
        self.put_u64(at + 8, 0);
    }

    /// Where the page-table entry of `lin` lies in long mode.
    pub fn pte(lin: u64) -> u64 {
        TABLES + 0x3000 + (lin >> 12) * 8
    }

    pub fn set_pte(&mut self, lin: u64, entry: u64) {
        self.put_u64(Self::pte(lin), entry);
        self.cpu.flush_tlb_all();
    }

    pub fn put(&mut self, gpa: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            self.cpu.phys_write(gpa + i as u64, &[*byte]);
        }
    }

    pub fn put_u64(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    pub fn get<const N: usize>(&mut self, gpa: u64) -> [u8; N] {
        std::array::from_fn(|i| {
            let mut byte = [0];
            self.cpu.phys_read(gpa + i as u64, &mut byte);
            byte[0]
        })
    }

    pub fn get_u16(&mut self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.get(gpa))
    }

    pub fn get_u32(&mut self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.get(gpa))
    }

    pub fn get_u64(&mut self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.get(gpa))
    }

    /// The dwords on top of the stack (flat, physical).
    pub fn stack32<const N: usize>(&mut self) -> [u32; N] {
        let sp = self.cpu.sp();
        std::array::from_fn(|i| self.get_u32(sp + 4 * i as u64))
    }

    pub fn stack64<const N: usize>(&mut self) -> [u64; N] {
        let sp = self.cpu.sp();
        std::array::from_fn(|i| self.get_u64(sp + 8 * i as u64))
    }

    pub fn stack16<const N: usize>(&mut self) -> [u16; N] {
        let sp = self.cpu.sp();
        std::array::from_fn(|i| self.get_u16(sp + 2 * i as u64))
    }

    /// Assembles at `rip` for the machine's mode.
    pub fn asm(&mut self, f: impl FnOnce(&mut CodeAssembler)) {
        let mut assembler = CodeAssembler::new(self.cpu.mode.bits.into()).unwrap();
        f(&mut assembler);
        let at = self.cpu.code_address();
        let bytes = assembler.assemble(self.cpu.rip).unwrap();
        self.put(at, &bytes);
    }

    /// Puts raw bytes at `rip`.
    pub fn code(&mut self, bytes: &[u8]) {
        let at = self.cpu.code_address();
        self.put(at, bytes);
    }

    /// Executes `count` instructions; exceptions are delivered and count as one.
    pub fn run(&mut self, count: usize) -> &mut Self {
        for _ in 0..count {
            if self.cpu.activity == Activity::Shutdown {
                break;
            }
            self.cpu.inhibit.shadow = false;
            let _ = emulate_one(&mut self.cpu);
        }
        self
    }

    /// Executes one instruction that must not fault, or says how it does.
    pub fn step(&mut self) -> Exec {
        super::step::fetch_and_execute(&mut self.cpu).map(drop)
    }

    /// The vector whose handler is next.
    pub fn vector(&self) -> Option<u64> {
        let at = self.cpu.rip.checked_sub(HANDLERS)?;
        (at % 16 == 0 && at < 0x1000).then_some(at / 16)
    }

    pub fn flag(&self, flag: u64) -> bool {
        self.cpu.rflags() & flag != 0
    }

    pub fn set_iopl(&mut self, iopl: u64) {
        self.cpu.sys_flags = self.cpu.sys_flags & !flags::IOPL | iopl << 12;
    }
}

/// A gate descriptor, its first 8 bytes.
pub fn gate(selector: u16, offset: u64, kind: u64, dpl: u64) -> u64 {
    (offset & 0xffff)
        | u64::from(selector) << 16
        | (kind | dpl << 5 | 0x80) << 40
        | (offset >> 16 & 0xffff) << 48
}

/// A TSS or LDT descriptor.
pub fn system_descriptor(base: u64, limit: u64, kind: u64, dpl: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (kind | dpl << 5 | 0x80) << 40
        | (base >> 24 & 0xff) << 56
}
