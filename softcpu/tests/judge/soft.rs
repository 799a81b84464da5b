//! The software CPU, set up so that it sees what a Linux process sees.
//!
//! Long mode, CPL 3, the arena of [`super::case`] mapped by page tables of its own, and Linux's GDT and the child's LDT
//! as far as user code can tell.
//!
//! ```text
//!   guest-physical   1000 page tables   8000 GDT, LDT, TSS, IDT, handlers, their stack   1_0000 CODE   1_1000 DATA   1_4000 RO
//! ```

use std::sync::{Arc, OnceLock, Weak};

use iced_x86::{Decoder, DecoderOptions};
use lodge_memory::{Bus, RamLayout};
use lodge_softcpu::shared::attention;
use lodge_softcpu::state::{Activity, Segment, TableRegister, cr, reg, seg};
use lodge_softcpu::vcpu::{Exit, Vcpu};
use lodge_softcpu::{Cpu, Fault, Shared, flags};

use super::case::{Bits, CODE, CODE_OFFSET, Case, DATA, DATA_LEN, FX, LDT, Outcome, RO, State};

/// Something that executes instructions.
pub trait Subject {
    /// For reports.
    fn name(&self) -> &'static str;
    /// Executes the case's instructions beginning at RIP, up to a fault. State and memory are those of its start.
    fn run(&mut self, vcpu: &mut Vcpu, case: &Case) -> Result<(), Fault>;
    /// The subject cannot run this case, which ends as `host` says.
    fn passes_over(&self, _case: &Case, _host: &Outcome) -> bool {
        false
    }
}

/// The reference interpreter.
pub struct Interpreter;

impl Subject for Interpreter {
    fn name(&self) -> &'static str {
        "the interpreter"
    }

    fn run(&mut self, vcpu: &mut Vcpu, case: &Case) -> Result<(), Fault> {
        for _ in 0..case.count {
            step(vcpu.cpu())?;
        }
        Ok(())
    }
}

/// Fetches, decodes and executes one instruction.
fn step(cpu: &mut Cpu) -> Result<(), Fault> {
    let bits = u32::from(cpu.mode.bits);
    let base = if bits == 64 { 0 } else { cpu.segs[seg::CS].base };
    let mut bytes = [0; 15];
    let (n, _) = cpu.fetch(base.wrapping_add(cpu.rip), &mut bytes)?;
    let insn = Decoder::with_ip(bits, &bytes[..n], cpu.rip, DecoderOptions::NONE).decode();
    if insn.is_invalid() {
        return Err(Fault::UD);
    }
    let mask = match bits {
        16 => 0xffff,
        32 => 0xffff_ffff,
        _ => u64::MAX,
    };
    cpu.next_rip = insn.next_ip() & mask;
    cpu.inhibit.shadow = false;
    lodge_softcpu::execute(cpu, &insn)?;
    cpu.rip = cpu.next_rip;
    Ok(())
}

/// Decoded blocks, as a guest would run: into the INT3 after the code, or into a fault, and through the IDT to a handler
/// that asks the vCPU to stop. What the delivery pushed says how it ended.
pub struct Blocks;

impl Subject for Blocks {
    fn name(&self) -> &'static str {
        "decoded blocks"
    }

    /// Branches into themselves, which would not end, and far ones that do not fault. And POPF that sets TF: what INT3
    /// makes of it is not seen on the host.
    fn passes_over(&self, case: &Case, host: &Outcome) -> bool {
        let branched = case.step && host.vector.is_none();
        let far = host.end.selectors[1] != case.start.selectors[1];
        let stepping = !case.step && host.end.rflags & flags::TF != 0;
        stepping || branched && (far || (case.start.rip..case.stop()).contains(&host.end.rip))
    }

    fn run(&mut self, vcpu: &mut Vcpu, case: &Case) -> Result<(), Fault> {
        let cpu = vcpu.cpu();
        // Single-stepping is the interpreter's; a branch ends where its target cannot be executed.
        cpu.set_rflags(cpu.rflags() & !flags::TF);
        assert_eq!(vcpu.run(), Exit::Kicked, "a triple fault");
        let cpu = vcpu.cpu();
        let vector = ((cpu.rip - HANDLERS) / HANDLER) as u8;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let word = |cpu: &mut Cpu, i: u64| {
            let at = cpu.regs[reg::RSP] + 8 * i;
            cpu.load_sys::<u64>(at).expect("the stack")
        };
        let error = if has_error { Some(word(cpu, 0) as u32) } else { None };
        let first = u64::from(has_error);
        let [rip, cs, rflags, rsp, ss] = [0, 1, 2, 3, 4].map(|i| word(cpu, first + i));
        cpu.rip = rip;
        cpu.regs[reg::RSP] = rsp;
        cpu.segs[seg::CS] = segment_of(cs as u16);
        cpu.segs[seg::SS] = segment_of(ss as u16);
        cpu.set_rflags(rflags);
        let base = case.code_base();
        let ended = match vector {
            3 => case.step || rip == case.stop() + 1,
            14 => case.step && error.is_some_and(|e| e & 16 != 0) && cpu.cr2 == base + rip,
            _ => false,
        };
        if vector == 3 && ended {
            cpu.rip -= 1;
        }
        if ended { Ok(()) } else { Err(Fault { vector, error }) }
    }
}

/// The only device: a port for each vector, which stops the vCPU.
#[derive(Default)]
struct StopPort {
    shared: OnceLock<Weak<Shared>>,
}

impl Bus for StopPort {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        if let Some(shared) = self.shared.get().and_then(Weak::upgrade) {
            shared.ports()[0].notify(attention::KICK);
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

const TABLES: u64 = 0x1000;
const SYSTEM: u64 = 0x8000;
const CODE_GPA: u64 = 0x1_0000;
const DATA_GPA: u64 = 0x1_1000;
const RO_GPA: u64 = 0x1_4000;
/// Linear address of the descriptor tables: among those of the kernel.
const SYSTEM_LIN: u64 = 0xffff_ff80_0000_0000;
const LDT_AT: u64 = 0x400;
const TSS_AT: u64 = 0x800;
const IDT_AT: u64 = 0xa00;
/// The handlers of exceptions, and bytes from one to the next. Their stack is the page after.
const HANDLERS: u64 = SYSTEM_LIN + 0x1000;
const HANDLER: u64 = 16;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const USED: u64 = 0x60;
const NX: u64 = 1 << 63;

/// Linux's GDT, as of 6.18.
const GDT: [u64; 16] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0x0000_8b00_0000_206f,
    0,
    0x0000_8200_0000_ffff,
    0,
    0,
    0,
    0,
    0x0040_f500_0000_0000,
];

/// The software side.
pub struct Soft {
    vcpu: Vcpu,
}

fn ldt_descriptor(entry: &super::case::LdtEntry) -> u64 {
    let kind = u64::from(!entry.restricted) << 1 | u64::from(entry.contents) << 2 | 1;
    let access = kind | 1 << 4 | 3 << 5 | u64::from(entry.present) << 7;
    let (base, limit) = (entry.base, u64::from(entry.limit));
    // Bit 1 is "writable" of data and "readable" of code.
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | u64::from(entry.big) << 54
        | (base >> 24 & 0xff) << 56
}

fn segment_of(selector: u16) -> Segment {
    let index = usize::from(selector >> 3);
    let descriptor =
        if selector & 4 != 0 { LDT.get(index).map_or(0, ldt_descriptor) } else { GDT[index & 15] };
    let granular = descriptor >> 55 & 1 != 0;
    let limit = (descriptor & 0xffff | (descriptor >> 48 & 15) << 16) as u32;
    Segment {
        base: descriptor >> 16 & 0xff_ffff | (descriptor >> 56) << 24,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector,
        attr: (descriptor >> 40 & 0xf0ff) as u16,
    }
}

impl Soft {
    /// A processor with its memory.
    pub fn new() -> Self {
        let memory =
            lodge_memory::allocate(&RamLayout::new(1 << 20).expect("a size")).expect("RAM");
        let bus = Arc::new(StopPort::default());
        let shared = Shared::new(memory, bus.clone(), 1);
        bus.shared.get_or_init(|| Arc::downgrade(&shared));
        let mut soft = Self { vcpu: Vcpu::new(shared, 0) };
        let table = |i: u64| TABLES + i * 0x1000;
        let link = PRESENT | WRITABLE | USER | USED;
        soft.write_words(table(0), &[table(1) | link]);
        soft.write_words(table(1), &[table(2) | link]);
        soft.write_words(table(2) + (CODE >> 21 & 511) * 8, &[table(3) | link]);
        soft.write_words(table(0) + (SYSTEM_LIN >> 39 & 511) * 8, &[table(4) | link]);
        soft.write_words(table(4), &[table(5) | link]);
        soft.write_words(table(5), &[table(6) | link]);
        let entry = |lin: u64| table(3) + (lin >> 12 & 511) * 8;
        soft.write_words(entry(CODE), &[CODE_GPA | PRESENT | USER | USED]);
        for page in [0, 0x1000] {
            let at = DATA_GPA + page;
            soft.write_words(entry(DATA + page), &[at | PRESENT | WRITABLE | USER | USED | NX]);
        }
        soft.write_words(entry(RO), &[RO_GPA | PRESENT | USER | USED | NX]);
        let system = [0, 0x1000, 0x2000].map(|page| (SYSTEM + page) | PRESENT | WRITABLE | USED);
        soft.write_words(table(6), &system);
        for vector in 0..32u64 {
            // OUT vector, AL; then for ever.
            let handler = HANDLER * vector;
            soft.write(SYSTEM + 0x1000 + handler, &[0xe6, vector as u8, 0xeb, 0xfe]);
            // A 64-bit interrupt gate that user code may use: INT3 is software's.
            let at = HANDLERS + handler;
            let low = at & 0xffff | 0x10 << 16 | 0xee00 << 32 | (at >> 16 & 0xffff) << 48;
            soft.write_words(SYSTEM + IDT_AT + vector * 16, &[low, at >> 32]);
        }
        let stack = HANDLERS + 0x2000;
        soft.write_words(SYSTEM + TSS_AT, &[stack << 32, stack >> 32]);
        soft.write(CODE_GPA, &[0xcc; 4096]);
        soft.write_words(SYSTEM, &GDT);
        let ldt: Vec<_> = LDT.iter().map(ldt_descriptor).collect();
        soft.write_words(SYSTEM + LDT_AT, &ldt);
        // The I/O permission map lies beyond the TSS's limit: no port is allowed.
        soft.write_words(SYSTEM + TSS_AT + 0x60, &[0x68 << 48]);
        soft
    }

    fn host(&mut self, gpa: u64) -> *mut u8 {
        let page = self.vcpu.cpu().phys.page(gpa).expect("RAM");
        // SAFETY: within the page.
        unsafe { page.host.add((gpa & 0xfff) as usize) }
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        assert!((gpa & 0xfff) as usize + bytes.len() <= 0x2000, "no more than DATA at once");
        // SAFETY: RAM is contiguous, and nobody else uses it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host(gpa), bytes.len()) };
    }

    fn write_words(&mut self, gpa: u64, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            self.write(gpa + i as u64 * 8, &word.to_le_bytes());
        }
    }

    /// Runs a case at CPL 3.
    pub fn run(&mut self, case: &Case, subject: &mut dyn Subject) -> Outcome {
        self.run_as(case, subject, false)
    }

    /// Runs a case, at CPL 0 if `privileged`.
    pub fn run_as(&mut self, case: &Case, subject: &mut dyn Subject, privileged: bool) -> Outcome {
        self.load(case);
        let cpu = self.vcpu.cpu();
        if privileged {
            cpu.segs[seg::SS].attr &= !0x60;
            cpu.segs[seg::CS].attr &= !0x60;
            cpu.update_mode();
        }
        let result = subject.run(&mut self.vcpu, case);
        let mut outcome = Outcome { vector: None, error: 0, cr2: 0, end: State::zero() };
        if let Err(fault) = result {
            outcome.vector = Some(fault.vector);
            outcome.error = fault.error.unwrap_or(0).into();
            outcome.cr2 = self.vcpu.cpu().cr2;
        }
        self.store(&mut outcome.end);
        outcome
    }

    fn load(&mut self, case: &Case) {
        let start = &case.start;
        let mut code = [0xcc; 512];
        code[..case.code_len as usize].copy_from_slice(case.code());
        self.write(CODE_GPA + CODE_OFFSET, &code);
        self.vcpu.cpu().shared.code_written(CODE_GPA, 4096);
        self.write(DATA_GPA, &start.data);
        let cpu = self.vcpu.cpu();
        cpu.cr0 = cr::CR0_PE
            | cr::CR0_MP
            | cr::CR0_ET
            | cr::CR0_NE
            | cr::CR0_WP
            | cr::CR0_AM
            | cr::CR0_PG;
        cpu.cr3 = TABLES;
        cpu.cr4 = cr::CR4_PAE
            | cr::CR4_OSFXSR
            | cr::CR4_OSXMMEXCPT
            | cr::CR4_FSGSBASE
            | cr::CR4_OSXSAVE
            | cr::CR4_PGE
            | cr::CR4_UMIP;
        cpu.efer = cr::EFER_LMA | cr::EFER_LME | cr::EFER_NXE | cr::EFER_SCE;
        cpu.xcr0 = 3;
        cpu.regs[..16].copy_from_slice(&start.regs);
        (cpu.rip, cpu.next_rip) = (start.rip, start.rip);
        for (segment, selector) in cpu.segs.iter_mut().zip(start.selectors) {
            *segment = segment_of(selector);
        }
        if case.bits == Bits::B64 {
            cpu.segs[seg::SS] = segment_of(super::case::USER_DS);
            (cpu.segs[seg::FS].base, cpu.segs[seg::GS].base) = (start.bases[0], start.bases[1]);
        }
        cpu.gdtr = TableRegister { base: SYSTEM_LIN, limit: 0x7f };
        cpu.idtr = TableRegister { base: SYSTEM_LIN + IDT_AT, limit: 0x1ff };
        let table = |at: u64, limit: u32, attr: u16, selector: u16| Segment {
            base: SYSTEM_LIN + at,
            limit,
            selector,
            attr,
        };
        cpu.ldtr = table(LDT_AT, LDT.len() as u32 * 8 - 1, 0x82, 0x50);
        cpu.tr = table(TSS_AT, 0x67, 0x8b, 0x40);
        cpu.activity = Activity::Running;
        cpu.pending_debug = 0;
        cpu.cr2 = 0;
        load_fx(cpu, &start.fx);
        cpu.set_rflags(start.rflags | 0x202 | if case.step { 0x100 } else { 0 });
    }

    fn store(&mut self, end: &mut State) {
        let data = self.host(DATA_GPA);
        let cpu = self.vcpu.cpu();
        end.regs.copy_from_slice(&cpu.regs[..16]);
        end.rip = cpu.rip;
        end.rflags = cpu.rflags();
        for (selector, segment) in end.selectors.iter_mut().zip(cpu.segs) {
            *selector = segment.selector;
        }
        end.bases = [cpu.segs[seg::FS].base, cpu.segs[seg::GS].base];
        store_fx(cpu, &mut end.fx);
        // SAFETY: DATA's two pages are contiguous RAM.
        unsafe {
            std::ptr::copy_nonoverlapping(data, end.data.as_mut_ptr(), DATA_LEN);
        }
    }
}

fn load_fx(cpu: &mut Cpu, image: &[u8; FX]) {
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let quad = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().expect("8 bytes"));
    let fx = &mut cpu.fx;
    (fx.fcw, fx.fsw, fx.ftw, fx.fop) = (word(0), word(2), image[4], word(6));
    (fx.fip, fx.fdp) = (quad(8), quad(16));
    fx.mxcsr = quad(24) as u32;
    for (i, register) in fx.st.iter_mut().enumerate() {
        *register = [0; 16];
        register[..10].copy_from_slice(&image[32 + 16 * i..42 + 16 * i]);
    }
    for (i, register) in fx.xmm.iter_mut().enumerate() {
        *register = [quad(160 + 16 * i), quad(168 + 16 * i)];
    }
}

fn store_fx(cpu: &Cpu, image: &mut [u8; FX]) {
    let fx = &cpu.fx;
    image[0..2].copy_from_slice(&fx.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fx.fsw.to_le_bytes());
    image[4] = fx.ftw;
    image[6..8].copy_from_slice(&fx.fop.to_le_bytes());
    image[8..16].copy_from_slice(&fx.fip.to_le_bytes());
    image[16..24].copy_from_slice(&fx.fdp.to_le_bytes());
    image[24..28].copy_from_slice(&fx.mxcsr.to_le_bytes());
    for (i, register) in fx.st.iter().enumerate() {
        image[32 + 16 * i..48 + 16 * i].copy_from_slice(register);
    }
    for (i, register) in fx.xmm.iter().enumerate() {
        image[160 + 16 * i..168 + 16 * i].copy_from_slice(&register[0].to_le_bytes());
        image[168 + 16 * i..176 + 16 * i].copy_from_slice(&register[1].to_le_bytes());
    }
}
