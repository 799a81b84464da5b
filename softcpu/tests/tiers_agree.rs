//! Both tiers on the same random programs in real mode and in 16- and 32-bit protected mode: jumps, far calls, interrupts,
//! segments, code that changes itself. Whatever a program does, both must come to the same end.
//!
//! `LODGE_TIERS_CASES=N` runs N programs in each mode (default: a few seconds' worth), `LODGE_TIERS_SEED=N` begins with
//! another seed.
//!
//! ```text
//!   0 IVT or IDT   1000 GDT   1100 TSS   2000 handlers, each ends the program   1_0000 code   2_0000 data   3_0000 stack
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lodge_memory::{Bus, RamLayout, allocate};
use lodge_softcpu::shared::attention;
use lodge_softcpu::state::{Activity, Segment, TableRegister, cr, reg, seg};
use lodge_softcpu::{Exit, Shared, Tier, Vcpu};

const GDT: u64 = 0x1000;
const TSS: u64 = 0x1100;
const HANDLERS: u64 = 0x2000;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STACK: u64 = 0x3_0000;
const END: u64 = 0x4_0000;
/// A write to this port ends the program.
const STOP: u16 = 0xf4;
const PAGE: usize = 0x1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Protected16,
    Protected32,
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// Ends programs, and those that do not end.
#[derive(Default)]
struct Stop {
    shared: OnceLock<Weak<Shared>>,
    /// Counts beginnings and ends of programs.
    began: AtomicU64,
    /// The program has ended by itself.
    stopped: AtomicBool,
}

impl Stop {
    fn kick(&self) {
        if let Some(shared) = self.shared.get().and_then(Weak::upgrade) {
            shared.ports()[0].notify(attention::KICK);
        }
    }
}

impl Bus for Stop {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_write(&self, port: u16, _data: &[u8]) {
        if port == STOP {
            self.stopped.store(true, Ordering::SeqCst);
            self.kick();
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

struct Machine {
    vcpu: Vcpu,
    stop: Arc<Stop>,
}

impl Machine {
    fn new(tier: Tier) -> Self {
        let memory = allocate(&RamLayout::new(END).unwrap()).unwrap();
        let stop = Arc::new(Stop::default());
        let shared = Shared::new(memory, stop.clone(), 1);
        stop.shared.get_or_init(|| Arc::downgrade(&shared));
        let mut vcpu = Vcpu::new(shared, 0);
        vcpu.set_tier(tier);
        let watched = Arc::downgrade(&stop);
        std::thread::spawn(move || {
            let mut last = 0;
            // Until the machine is gone.
            while let Some(stop) = watched.upgrade() {
                let now = stop.began.load(Ordering::SeqCst);
                if now == last && now % 2 == 1 {
                    stop.kick();
                }
                last = now;
                drop(stop);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { vcpu, stop }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let cpu = self.vcpu.cpu();
        for (i, part) in bytes.chunks(PAGE).enumerate() {
            let at = at + (i * PAGE) as u64;
            let first = part.len().min(PAGE - (at as usize & (PAGE - 1)));
            cpu.phys_write(at, &part[..first]);
            if first < part.len() {
                cpu.phys_write(at + first as u64, &part[first..]);
            }
        }
    }

    fn memory(&mut self) -> Vec<u8> {
        let mut all = vec![0; END as usize];
        for (i, page) in all.chunks_mut(PAGE).enumerate() {
            self.vcpu.cpu().phys_read((i * PAGE) as u64, page);
        }
        all
    }

    /// Runs `program`; what it comes to, or none if it does not end.
    fn run(&mut self, program: &Program) -> Option<Outcome> {
        self.put(0, &program.memory);
        self.set_up(program);
        self.stop.stopped.store(false, Ordering::SeqCst);
        self.stop.began.fetch_add(1, Ordering::SeqCst);
        let retired = self.vcpu.retired();
        let exit = self.vcpu.run();
        self.stop.began.fetch_add(1, Ordering::SeqCst);
        let memory = self.memory();
        let retired = self.vcpu.retired() - retired;
        let cpu = self.vcpu.cpu();
        let ended = exit == Exit::Shutdown || self.stop.stopped.load(Ordering::SeqCst);
        ended.then(|| Outcome {
            exit,
            retired,
            regs: cpu.regs[..8].to_vec(),
            rip: cpu.rip,
            flags: cpu.rflags(),
            selectors: cpu.segs.map(|s| (s.selector, s.base, s.limit, s.attr)),
            cr: [cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4],
            memory,
        })
    }

    fn set_up(&mut self, program: &Program) {
        let cpu = self.vcpu.cpu();
        cpu.reset();
        // No interrupts of the timer, whatever the last program made of it.
        cpu.port_write(0x21, &[0xff]);
        cpu.port_write(0xa1, &[0xff]);
        let wide = program.mode == Mode::Protected32;
        let protected = program.mode != Mode::Real;
        let segment = |selector: u16, base: u64, kind: u16| Segment {
            base,
            limit: 0xffff,
            selector,
            attr: kind | if wide { 0x4000 } else { 0 },
        };
        let bases = [program.extra, CODE, STACK, DATA, 0, DATA + 0x8000];
        for (i, base) in bases.into_iter().enumerate() {
            let selector = if protected { 8 * (i as u16 + 1) } else { (base >> 4) as u16 };
            cpu.segs[i] = segment(selector, base, if i == seg::CS { 0x9b } else { 0x93 });
        }
        cpu.cr0 = cr::CR0_ET | if protected { cr::CR0_PE } else { 0 };
        cpu.gdtr = TableRegister { base: GDT, limit: 0x7f };
        cpu.idtr = TableRegister { base: 0, limit: if protected { 0x7ff } else { 0x3ff } };
        cpu.tr = Segment { base: TSS, limit: 0x67, selector: 0x40, attr: 0x8b };
        cpu.regs[..8].copy_from_slice(&program.regs);
        (cpu.rip, cpu.next_rip) = (program.entry, program.entry);
        cpu.set_rflags(program.flags);
        cpu.activity = Activity::Running;
        cpu.flush_tlb_all();
    }
}

struct Outcome {
    exit: Exit,
    retired: u64,
    regs: Vec<u64>,
    rip: u64,
    flags: u64,
    selectors: [(u16, u64, u32, u16); 6],
    cr: [u64; 4],
    memory: Vec<u8>,
}

impl Outcome {
    /// But for the number of instructions: a fetch that faults is one for the reference only.
    fn equals(&self, other: &Self) -> bool {
        let key = |o: &Self| (o.exit, o.rip, o.flags, o.selectors, o.cr);
        key(self) == key(other) && self.regs == other.regs && self.memory == other.memory
    }
}

struct Program {
    mode: Mode,
    entry: u64,
    regs: [u64; 8],
    flags: u64,
    /// The base of ES.
    extra: u64,
    memory: Vec<u8>,
}

/// ModRM and what follows it, of an operand in memory nearly always inside of its segment.
fn operand(rng: &mut Rng, mode: Mode, out: &mut Vec<u8>, digit: Option<u8>) {
    let reg = digit.unwrap_or(rng.below(8) as u8) << 3;
    let way = rng.below(4) as u8;
    if way == 3 {
        return out.push(0xc0 | reg | rng.below(8) as u8);
    }
    let rm = rng.below(8) as u8;
    out.push(way << 6 | reg | rm);
    let wide = mode == Mode::Protected32;
    if wide && rm == 4 {
        // No scaled index; a base.
        out.push(0x20 | rng.below(8) as u8);
    }
    let base_is_5 = rm == 5 || wide && rm == 4 && out.last().is_some_and(|sib| sib & 7 == 5);
    match (way, wide) {
        (0, true) if base_is_5 => out.extend((rng.below(0xf000) as u32).to_le_bytes()),
        (0, false) if rm == 6 => out.extend((rng.next() as u16).to_le_bytes()),
        (1, _) => out.push(rng.next() as u8),
        (2, true) => out.extend((rng.below(0x1000) as u32).to_le_bytes()),
        (2, false) => out.extend((rng.next() as u16).to_le_bytes()),
        _ => {}
    }
}

fn immediate(rng: &mut Rng, bytes: usize, out: &mut Vec<u8>) {
    let value = if rng.chance(50) { rng.below(16) } else { rng.next() };
    out.extend(&value.to_le_bytes()[..bytes]);
}

/// One instruction, most often.
fn instruction(rng: &mut Rng, mode: Mode, out: &mut Vec<u8>) {
    let mut word = if mode == Mode::Protected32 { 4 } else { 2 };
    if rng.chance(8) {
        out.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    if rng.chance(10) {
        out.push(0x66);
        word = 6 - word;
    }
    // Addresses of the other size are rare: their encoding is not this one's.
    if rng.chance(1) {
        out.push(0x67);
    }
    let r8 = |rng: &mut Rng| rng.below(8) as u8;
    match rng.below(42) {
        0..=5 => {
            out.push(r8(rng) << 3 | rng.below(4) as u8);
            operand(rng, mode, out, None);
        }
        6 => {
            out.push(r8(rng) << 3 | 5);
            immediate(rng, word, out);
        }
        7 | 8 => out.push(0x40 | rng.below(16) as u8),
        9 | 10 => out.push(0x50 | rng.below(16) as u8),
        11 => {
            let op = rng.pick(&[0x80, 0x81, 0x83, 0xc6, 0xc7]);
            out.push(op);
            operand(rng, mode, out, (op >= 0xc6).then_some(0));
            immediate(rng, if op & 3 == 1 || op == 0xc7 { word } else { 1 }, out);
        }
        12..=15 => {
            out.push(0x84 | rng.below(8) as u8);
            operand(rng, mode, out, None);
        }
        16 => {
            let op = rng.pick(&[0x8c, 0x8d, 0x8f, 0xc4, 0xc5, 0x62, 0x63]);
            out.push(op);
            operand(rng, mode, out, (op == 0x8f).then_some(0));
        }
        17 => {
            out.push(0x8e);
            operand(rng, mode, out, None);
        }
        18 => out.push(0x90 | rng.below(16) as u8 & 7),
        19 => {
            let op = rng.pick(&[0x98, 0x99, 0x9c, 0x9d, 0x9e, 0x9f, 0xd7, 0xc9, 0x60, 0x61]);
            out.push(op);
        }
        20 => {
            if rng.chance(60) {
                out.push(rng.pick(&[0xf2, 0xf3]));
            }
            out.push(rng.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]));
        }
        21 | 22 => {
            let op = 0xb0 | rng.below(16) as u8;
            out.push(op);
            immediate(rng, if op & 8 != 0 { word } else { 1 }, out);
        }
        23 => {
            let op = rng.pick(&[0xc0, 0xc1, 0xd0, 0xd1, 0xd2, 0xd3]);
            out.push(op);
            operand(rng, mode, out, None);
            if op < 0xd0 {
                out.push(rng.next() as u8);
            }
        }
        24..=27 => {
            // Forward, mostly.
            out.push(rng.pick(&[
                0x70, 0x72, 0x74, 0x75, 0x78, 0x7a, 0x7c, 0x7f, 0xe0, 0xe1, 0xe2, 0xe3, 0xeb,
            ]));
            out.push(if rng.chance(85) {
                rng.below(12) as u8
            } else {
                0u8.wrapping_sub(rng.below(24) as u8)
            });
        }
        28 => {
            out.push(rng.pick(&[0xe8, 0xe9]));
            immediate_offset(rng, word, out);
        }
        29 => out.push(rng.pick(&[0xc3, 0xcb, 0xcf, 0xcc, 0xce])),
        30 => out.extend([0xcd, rng.next() as u8]),
        31 => {
            // To a few paragraphs of the code, or through a selector.
            out.push(rng.pick(&[0x9a, 0xea]));
            let offset = rng.below(0x80);
            out.extend(&offset.to_le_bytes()[..word]);
            let selector = match mode {
                Mode::Real => 0x1000 + rng.below(3) as u16,
                _ => rng.pick(&[0x10, 0x50, 0x58, 0x60]),
            };
            out.extend(selector.to_le_bytes());
        }
        32 | 33 => {
            let op = rng.pick(&[0xf6, 0xf7, 0xfe, 0xff]);
            let digit = if op == 0xfe { rng.below(2) as u8 } else { r8(rng) };
            out.push(op);
            operand(rng, mode, out, Some(digit));
            if op < 0xfe && digit < 2 {
                immediate(rng, if op == 0xf7 { word } else { 1 }, out);
            }
        }
        34 | 35 => {
            let op = rng.pick(&[
                0x40, 0x44, 0x4c, 0x90, 0x94, 0x9f, 0xa3, 0xa5, 0xab, 0xad, 0xaf, 0xb0, 0xb1, 0xb3,
                0xb6, 0xb7, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xb2, 0xb4, 0xb5, 0x02, 0x03,
            ]);
            out.extend([0x0f, op]);
            operand(rng, mode, out, None);
        }
        36 => {
            if rng.chance(50) {
                out.push(0xf0);
            }
            out.push(rng.pick(&[0x00, 0x01, 0x28, 0x29, 0x86, 0x87]));
            operand(rng, mode, out, None);
        }
        37 => out.push(
            rng.pick(&[0xf5, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0x27, 0x2f, 0x37, 0x3f, 0xd6]),
        ),
        38 if rng.chance(50) => out.extend([rng.pick(&[0xd4, 0xd5]), rng.below(0x20) as u8]),
        // Ports of nobody's: a timer would tell each tier another time.
        38 => out.extend([rng.pick(&[0xe4, 0xe5]), 0x80 + rng.below(0x10) as u8]),
        39 => {
            // Descriptor tables, tasks, control and debug registers: mostly the end of a program, or of its mode.
            let op = rng.pick(&[0x00, 0x00, 0x01, 0x01, 0x20, 0x21, 0x22, 0x23]);
            out.extend([0x0f, op]);
            if op < 0x20 {
                operand(rng, mode, out, None);
            } else {
                out.push(0xc0 | rng.next() as u8);
            }
        }
        40 => {
            let op = rng.pick(&[0xa0, 0xa1, 0xa8, 0xa9, 0xb2, 0xb4, 0xb5, 0x06, 0x09, 0xa2]);
            out.extend([0x0f, op]);
            if op & 0xf0 == 0xb0 {
                operand(rng, mode, out, None);
            }
        }
        _ => {
            // MOV to code ahead: of CS or, where it is the code's alias, ES.
            out.extend([rng.pick(&[0x26, 0x2e]), 0xc6]);
            let at = rng.below(0x90);
            match mode {
                Mode::Protected32 => {
                    out.push(0x05);
                    out.extend((at as u32).to_le_bytes());
                }
                _ => {
                    out.push(0x06);
                    out.extend((at as u16).to_le_bytes());
                }
            }
            out.push(rng.pick(&[0x40, 0x43, 0x90, 0x48, 0xf8, 0xf9]));
        }
    }
}

/// A displacement of a near call or jump: a little ahead.
fn immediate_offset(rng: &mut Rng, bytes: usize, out: &mut Vec<u8>) {
    let ahead = if rng.chance(90) { rng.below(24) } else { 0u64.wrapping_sub(rng.below(64)) };
    out.extend(&ahead.to_le_bytes()[..bytes]);
}

fn program(mode: Mode, seed: u64) -> Program {
    let mut rng = Rng(seed);
    let mut memory = vec![0; END as usize];
    let put = |memory: &mut Vec<u8>, at: u64, bytes: &[u8]| {
        memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    for vector in 0..256u64 {
        let handler = HANDLERS + 8 * vector;
        let (at, gate) = match mode {
            Mode::Real => (4 * vector, handler.to_le_bytes()),
            // 32-bit and 16-bit gates to flat code of the same size.
            _ => {
                let kind = if vector % 2 == 0 { 0xee } else { 0xe6 };
                (8 * vector, (handler | 0x48 << 16 | kind << 40).to_le_bytes())
            }
        };
        put(&mut memory, at, if mode == Mode::Real { &gate[..4] } else { &gate });
        // OUT STOP, AL; then for ever.
        put(&mut memory, handler, &[0xe6, STOP as u8, 0xeb, 0xfc]);
    }
    let wide = mode == Mode::Protected32;
    let size = if wide { 0x40u64 } else { 0 } << 48;
    let descriptor = |base: u64, access: u64| 0xffff | base << 16 | access << 40 | size;
    let extra = if rng.chance(40) { CODE } else { DATA };
    // ES, CS, SS, DS, FS, GS; TSS; flat code; code that overlaps; conforming; read-only and absent data.
    let gdt = [
        0,
        descriptor(extra, 0x93),
        descriptor(CODE, 0x9b),
        descriptor(STACK, 0x93),
        descriptor(DATA, 0x93),
        descriptor(0, 0x93),
        descriptor(DATA + 0x8000, 0x93),
        descriptor(DATA, 0x91),
        0x67 | TSS << 16 | 0x8b << 40,
        descriptor(0, 0x9b),
        descriptor(CODE + 0x10, 0x9b),
        descriptor(CODE + 0x20, 0x9f),
        descriptor(CODE, 0x9b) & !0xffff | 0x7f,
        descriptor(DATA, 0x13),
    ];
    for (i, entry) in gdt.iter().enumerate() {
        put(&mut memory, GDT + 8 * i as u64, &u64::to_le_bytes(*entry));
    }
    for at in (DATA..END).step_by(8) {
        let value = if rng.chance(30) { rng.below(0x100) } else { rng.next() };
        put(&mut memory, at, &value.to_le_bytes());
    }
    let mut code = Vec::new();
    while code.len() < 0xa0 {
        instruction(&mut rng, mode, &mut code);
    }
    // Not RDTSC and RDTSCP, which tell each tier another time.
    for i in 1..code.len() {
        if code[i - 1] == 0x0f && code[i] == 0x31 || code[i - 1] == 0x01 && code[i] == 0xf9 {
            code[i] = 0x90;
        }
    }
    code.extend([0xcd, 0xff]);
    // Sometimes over the end of a page, or near that of the segment.
    let entry = rng.pick(&[0u64, 0, 0, 0xf80, 0xff00]);
    code.truncate(if entry == 0xff00 { 0xff } else { code.len() });
    put(&mut memory, CODE + entry, &code);
    let regs = std::array::from_fn(|i| match i {
        reg::RSP => rng.pick(&[0x8000u64, 0x8000, 0x1000, 4]),
        reg::RCX if rng.chance(60) => rng.below(6),
        _ if wide || rng.chance(50) => rng.below(0x1_0000),
        _ => rng.next() & 0xffff_ffff,
    });
    let flags = 2 | rng.next() & 0xcd5;
    Program { mode, entry, regs, flags, extra, memory }
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")),
        Err(_) => default,
    }
}

fn agree(mode: Mode) {
    let (cases, first) = (number("LODGE_TIERS_CASES", 1000), number("LODGE_TIERS_SEED", 1));
    let mut machines = [Machine::new(Tier::Reference), Machine::new(Tier::Blocks)];
    let (mut ended, mut instructions) = (0, 0);
    for seed in first..first + cases {
        let program = program(mode, seed);
        let outcomes = machines.each_mut().map(|machine| machine.run(&program));
        let [Some(reference), Some(blocks)] = outcomes else { continue };
        ended += 1;
        instructions += reference.retired;
        // Ports of timers tell each run another time: the reference may come to the same end another time.
        let same = reference.equals(&blocks)
            || (0..100)
                .any(|_| machines[0].run(&program).is_some_and(|again| again.equals(&blocks)));
        if !same {
            let differ = reference.memory.iter().zip(&blocks.memory).position(|(a, b)| a != b);
            let tell = |o: &Outcome| {
                format!(
                    "{:?} {} rip {:x} flags {:x} {:x?} {:x?} {:x?}",
                    o.exit, o.retired, o.rip, o.flags, o.regs, o.selectors, o.cr
                )
            };
            panic!(
                "{mode:?}, seed {seed}, entry {:x}:\nreference {}\nblocks    {}\nmemory differs at {differ:x?}\ncode {:02x?}",
                program.entry,
                tell(&reference),
                tell(&blocks),
                &program.memory[(CODE + program.entry) as usize..][..0xa8],
            );
        }
    }
    println!("{mode:?}: {ended} of {cases} programs ended, after {instructions} instructions");
    assert!(ended * 10 > cases * 8, "{ended} of {cases} ended");
}

#[test]
fn real_mode() {
    agree(Mode::Real);
}

#[test]
fn protected_mode_16() {
    agree(Mode::Protected16);
}

#[test]
fn protected_mode_32() {
    agree(Mode::Protected32);
}
