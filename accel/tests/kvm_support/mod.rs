//! Small guests for the tests of the backends: a machine with a bus that notes everything, and ways to
//! start a vCPU in each mode. The test binary `soft` runs them on the software CPU, the others on KVM.
//!
//! ```text
//!   0x0000  real-mode vectors                   0x5000  GDT
//!   0x1000  PML4, 0x2000 PDPT, 0x3000 and       0x7000  stack top
//!   0xf000  PDs                                 0x8000  code
//!   0x4000  IDT                                 0xc000  TSS
//!                                               0x10000 and up: data
//! ```
#![allow(dead_code)] // each test binary uses a part

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use iced_x86::code_asm::CodeAssembler;
use lodge_accel::kvm::{Kvm, Options};
use lodge_accel::soft::SoftVm;
use lodge_accel::state::{Activity, Segment, TableRegister, VcpuState};
use lodge_accel::{Exit, Kick, Vcpu, VcpuSetup, Vm, VmSetup};
use lodge_memory::{Bus, GuestMemory, RamLayout, allocate};
use vm_memory::{Bytes, GuestAddress};

pub const CODE: u64 = 0x8000;
pub const STACK: u64 = 0x7000;
pub const IDT: u64 = 0x4000;
pub const GDT: u64 = 0x5000;
pub const TSS: u64 = 0xc000;
/// User code calls the kernel with UD2: every host brings that there (kvm_pvm loses INT and SYSCALL,
/// see docs/kvm.md).
pub const KERNEL_CALL: u64 = 6;
/// A guest writes here when it is done.
pub const DONE_PORT: u16 = 0xf4;
pub const RAM: u64 = 16 << 20;
/// A gap after RAM that only the bus answers.
pub const MMIO: u64 = 0xd000_0000;

/// Whether this test binary is for the software CPU.
pub const SOFT: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"soft");

/// Says why a test does nothing, where there is no KVM to test with.
pub fn kvm_is_here(test: &str) -> bool {
    if SOFT || Path::new("/dev/kvm").exists() {
        return true;
    }
    eprintln!("SKIPPED: {test}: there is no /dev/kvm on this host");
    false
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    PioRead(u16, usize),
    PioWrite(u16, Vec<u8>),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
}

#[derive(Default)]
pub struct TestBus {
    pub log: Mutex<Vec<Access>>,
    pub done: AtomicBool,
    /// Whom to kick: all vCPUs.
    pub kicks: Mutex<Vec<Arc<dyn Kick>>>,
    /// Kick in the middle of each access, as a pause may.
    pub kick_on_access: AtomicBool,
    /// Called on each access, before it is noted.
    pub hook: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl TestBus {
    fn note(&self, access: Access) {
        if self.kick_on_access.load(Ordering::SeqCst) {
            self.kick();
        }
        if let Some(hook) = self.hook.get() {
            hook();
        }
        self.log.lock().unwrap().push(access);
    }
    pub fn kick(&self) {
        self.kicks.lock().unwrap().iter().for_each(|kick| kick.kick());
    }
    pub fn take(&self) -> Vec<Access> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

/// What reading at `address` gives: the address's bytes, counted up.
pub fn pattern(address: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (address as u8).wrapping_add(0xa0).wrapping_add(i as u8)).collect()
}

impl Bus for TestBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.copy_from_slice(&pattern(port.into(), data.len()));
        self.note(Access::PioRead(port, data.len()));
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if port == DONE_PORT {
            self.done.store(true, Ordering::SeqCst);
            self.kick();
            return;
        }
        self.note(Access::PioWrite(port, data.to_vec()));
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.copy_from_slice(&pattern(gpa, data.len()));
        self.note(Access::MmioRead(gpa, data.len()));
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(Access::MmioWrite(gpa, data.to_vec()));
    }
}

pub struct Machine {
    pub vm: Arc<dyn Vm>,
    pub memory: Arc<GuestMemory>,
    pub bus: Arc<TestBus>,
}

impl Machine {
    pub fn new(vcpus: u32) -> Self {
        let memory = allocate(&RamLayout::new(RAM).unwrap()).unwrap();
        let bus = Arc::new(TestBus::default());
        let setup = VmSetup { memory: memory.clone(), bus: bus.clone(), vcpus };
        let vm: Arc<dyn Vm> = if SOFT {
            SoftVm::new(setup).unwrap()
        } else {
            Kvm::open().unwrap().new_vm(setup, Options::default()).unwrap()
        };
        let machine = Self { vm, memory, bus };
        machine.write(GDT + 8, 0x00cf_9b00_0000_ffffu64); // code
        machine.write(GDT + 0x10, 0x00cf_9300_0000_ffffu64); // data
        machine
    }

    /// Assembles and loads code at `gpa`.
    pub fn load(&self, gpa: u64, bits: u32, code: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bits).unwrap();
        code(&mut a);
        self.memory.write_slice(&a.assemble(gpa).unwrap(), GuestAddress(gpa)).unwrap();
    }

    pub fn write<T: vm_memory::ByteValued>(&self, gpa: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    pub fn read<T: vm_memory::ByteValued>(&self, gpa: u64) -> T {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    /// A vCPU in the state that `prepare` makes of the reset state.
    pub fn start(&self, index: u32, prepare: impl FnOnce(&mut VcpuState)) -> Box<dyn Vcpu> {
        let mut vcpu = self.vm.create_vcpu(index, VcpuSetup::Reset).unwrap();
        let mut state = vcpu.state().unwrap();
        prepare(&mut state);
        vcpu.set_state(&state).unwrap();
        self.bus.kicks.lock().unwrap().push(vcpu.kicker());
        vcpu
    }

    /// A gate of the protected-mode IDT.
    pub fn gate32(&self, vector: u64, handler: u64) {
        let low = handler & 0xffff | 8 << 16;
        let high = handler & 0xffff_0000 | 0x8e00;
        self.write(IDT + vector * 8, low | high << 32);
    }

    /// UD2 in 64-bit user code goes to `handler`.
    pub fn kernel_entry(&self, handler: u64) {
        self.write(GDT + 8, 0x00af_9b00_0000_ffffu64);
        self.write(GDT + 0x18, 0x00cf_f300_0000_ffffu64); // user data
        self.write(GDT + 0x20, 0x00af_fb00_0000_ffffu64); // user code
        let gate = IDT + KERNEL_CALL * 16;
        let high = handler & 0xffff_0000;
        self.write(gate, handler & 0xffff | 8 << 16 | (high | 0x8e00) << 32);
        self.write(gate + 8, handler >> 32);
        self.write(TSS + 4, STACK - 0x800); // RSP0
        self.write(TSS + 0x66, 0x68u16); // no bitmap of ports
    }

    /// Maps the first 1 GiB to itself, for user code too, and the last one below 4 GiB.
    pub fn page_tables(&self) {
        self.write(0x1000, 0x2007u64);
        self.write(0x2000, 0x3007u64);
        self.write(0x2018, 0xf007u64);
        for i in 0..512u64 {
            self.write(0x3000 + i * 8, i << 21 | 0x87);
            self.write(0xf000 + i * 8, 0xc000_0000 | i << 21 | 0x87);
        }
    }

    /// Runs until the guest says that it is done; a guest that never does is ended.
    pub fn run(&self, vcpu: &mut dyn Vcpu) {
        self.bus.done.store(false, Ordering::SeqCst);
        let watchdog = Watchdog::new(vcpu.kicker());
        while !self.bus.done.load(Ordering::SeqCst) {
            let exit = vcpu.run().unwrap();
            assert_eq!(exit, Exit::Kicked, "{}", registers(vcpu));
            assert!(!watchdog.barked(), "the guest hangs: {}", registers(vcpu));
        }
    }
}

fn registers(vcpu: &mut dyn Vcpu) -> String {
    let s = vcpu.state().unwrap();
    format!(
        "RIP {:#x}, GPRs {:x?}, CR0 {:#x}, CR2 {:#x}, CS {:x?}, {:x?}",
        s.rip, s.gprs, s.cr0, s.cr2, s.segments[1], s.events
    )
}

/// Kicks a vCPU that takes far too long.
pub struct Watchdog {
    barked: Arc<AtomicBool>,
    _stop: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    pub fn new(kick: Arc<dyn Kick>) -> Self {
        let barked = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let flag = barked.clone();
        std::thread::spawn(move || {
            let timeout = Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if stopped.recv_timeout(Duration::from_secs(60)) == timeout {
                flag.store(true, Ordering::SeqCst);
                kick.kick();
            }
        });
        Self { barked, _stop: stop }
    }
    pub fn barked(&self) -> bool {
        self.barked.load(Ordering::SeqCst)
    }
}

fn segments(state: &mut VcpuState, code: u16, data: u16, limit: u32) {
    let segment = Segment { selector: 0x10, base: 0, limit, attributes: data };
    state.segments = [segment; 6];
    state.segments[1] = Segment { selector: 8, attributes: code, ..segment };
    state.rip = CODE;
    state.gprs[4] = STACK;
    state.gdtr = TableRegister { base: GDT, limit: 0x17 };
    state.rflags = 2;
    state.activity = Activity::Running;
}

pub fn real16(state: &mut VcpuState) {
    segments(state, 0x9b, 0x93, 0xffff);
    state.segments.iter_mut().for_each(|s| s.selector = 0);
    state.idtr = TableRegister { base: 0, limit: 0x3ff };
}

pub fn protected32(state: &mut VcpuState) {
    segments(state, 0xc09b, 0xc093, u32::MAX);
    state.cr0 = 0x33;
    state.idtr = TableRegister { base: IDT, limit: 0x7ff };
}

/// Needs [`Machine::page_tables`].
pub fn long64(state: &mut VcpuState) {
    segments(state, 0xa09b, 0xc093, u32::MAX);
    state.cr0 = 0x8000_0033;
    state.cr3 = 0x1000;
    state.cr4 = 1 << 5 | 1 << 9 | 1 << 10; // PAE, OSFXSR, OSXMMEXCPT
    state.efer = 1 << 11 | 1 << 10 | 1 << 8 | 1; // NXE, LMA, LME, SCE
}

/// 64-bit user code. Needs [`Machine::page_tables`], and [`Machine::kernel_entry`] to come back.
pub fn user64(state: &mut VcpuState) {
    long64(state);
    for segment in &mut state.segments {
        segment.attributes |= 3 << 5;
        segment.selector = 0x1b;
    }
    state.segments[1].selector = 0x23;
    state.gdtr.limit = 0x37;
    state.idtr = TableRegister { base: IDT, limit: 0xfff };
    state.tr = Segment { selector: 0x28, base: TSS, limit: 0x67, attributes: 0x8b };
}

pub fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    state.msrs.retain(|(i, _)| *i != index);
    state.msrs.push((index, value));
}
