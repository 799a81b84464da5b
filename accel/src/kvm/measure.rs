//! How fast guest kernel code runs here, measured: the question behind `accel = auto`.
//!
//! Some hosts offer a `/dev/kvm` that runs only guest user code natively and emulates guest kernel
//! code at a few million instructions a second. Nothing in KVM's interface tells them apart, so a
//! loop in 64-bit mode at privilege level 0 is run against the clock.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lodge_memory::{Bus, GuestMemory, RamLayout, allocate};
use vm_memory::{Bytes, GuestAddress};

use super::vm::Options;
use super::{Kvm, refused};
use crate::error::{Error, Result};
use crate::state::{Segment, VcpuState};
use crate::vm::{Kick, Vcpu, VcpuSetup, Vm, VmSetup};

/// From here on guest kernel code counts as running natively. A host CPU does a hundred times as
/// many, emulation a hundredth.
pub const NATIVE_INSTRUCTIONS_PER_SECOND: u64 = 100_000_000;

/// The loop may run for this long.
const LIMIT: Duration = Duration::from_millis(50);
/// How often the loop goes round: some 10 ms on a host CPU.
const ROUNDS: u64 = 20_000_000;
const INSTRUCTIONS_PER_ROUND: u64 = 4;

/// `0: add rax, rcx; mov [rbx], rax; dec rcx; jnz 0b; out 80h, al; 1: hlt; jmp 1b`
const CODE: [u8; 16] = [
    0x48, 0x01, 0xc8, 0x48, 0x89, 0x03, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0xe6, 0x80, 0xf4, 0xeb, 0xfd,
];
const CODE_GPA: u64 = 0x8000;
const DATA_GPA: u64 = 0x9000;
const PML4_GPA: u64 = 0x1000;
const PDPT_GPA: u64 = 0x2000;
const PD_GPA: u64 = 0x3000;
const RAM_BYTES: u64 = 2 << 20;

/// What the measurement found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestSpeed {
    /// Guest instructions at privilege level 0 in a second of the thread's CPU time.
    pub instructions_per_second: u64,
    /// Whether that is the CPU itself ([`NATIVE_INSTRUCTIONS_PER_SECOND`]), not emulation.
    pub native: bool,
}

impl GuestSpeed {
    fn new(rounds: u64, time: Duration) -> Self {
        let instructions = u128::from(rounds) * u128::from(INSTRUCTIONS_PER_ROUND);
        let per_second = instructions * 1_000_000_000 / time.as_nanos().max(1);
        let instructions_per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
        let native = instructions_per_second >= NATIVE_INSTRUCTIONS_PER_SECOND;
        Self { instructions_per_second, native }
    }
}

/// Ends the run when the guest is done.
#[derive(Default)]
struct Done {
    kick: OnceLock<Arc<dyn Kick>>,
}

impl Bus for Done {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, _data: &[u8]) {
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

/// Runs a guest loop for at most about 50 ms and tells its speed. An error if KVM cannot be used, or
/// cannot run even this.
pub fn measure() -> Result<GuestSpeed> {
    let memory = RamLayout::new(RAM_BYTES)
        .and_then(|layout| allocate(&layout))
        .map_err(|e| refused("memory for measuring KVM")(io::Error::other(e)))?;
    load(&memory).map_err(|e| refused("loading a guest for measuring KVM")(io::Error::other(e)))?;
    let bus = Arc::new(Done::default());
    let setup = VmSetup { memory, bus: bus.clone(), vcpus: 1 };
    let vm = Kvm::open()?.new_vm(setup, Options::default())?;
    let mut vcpu = vm.create_vcpu(0, VcpuSetup::Reset)?;
    let mut state = vcpu.state()?;
    long_mode(&mut state);
    vcpu.set_state(&state)?;
    let _ = bus.kick.set(vcpu.kicker());
    let time = run_bounded(&mut *vcpu)?;
    let left = vcpu.state()?.gprs[1];
    Ok(GuestSpeed::new(ROUNDS.saturating_sub(left), time))
}

fn load(memory: &GuestMemory) -> std::result::Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&CODE, GuestAddress(CODE_GPA))?;
    memory.write_obj(PDPT_GPA | 3, GuestAddress(PML4_GPA))?;
    memory.write_obj(PD_GPA | 3, GuestAddress(PDPT_GPA))?;
    memory.write_obj(0x83u64, GuestAddress(PD_GPA)) // one page of 2 MiB, mapped to itself
}

/// 64-bit mode at privilege level 0, interrupts off, at the code.
fn long_mode(state: &mut VcpuState) {
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
    state.segments = [data; 6];
    state.segments[1] = Segment { selector: 8, attributes: 0xa09b, ..data };
    state.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    state.cr3 = PML4_GPA;
    state.cr4 = 1 << 5; // PAE
    state.efer = 1 << 10 | 1 << 8; // LMA, LME
    state.rip = CODE_GPA;
    state.rflags = 2;
    state.gprs[0] = 0;
    state.gprs[1] = ROUNDS;
    state.gprs[3] = DATA_GPA;
}

/// Runs until the guest is done or the time is over; gives this thread's CPU time.
fn run_bounded(vcpu: &mut dyn Vcpu) -> Result<Duration> {
    let kick = vcpu.kicker();
    let (done, waits) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if waits.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let start = cpu_time()?;
        let exit = vcpu.run();
        let end = cpu_time();
        drop(done);
        exit?;
        Ok(end?.saturating_sub(start))
    })
}

/// This thread's CPU time, the guest's included.
fn cpu_time() -> Result<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure it is given.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) } != 0 {
        let source = io::Error::last_os_error();
        return Err(Error::Host { accel: "kvm", step: "reading the CPU time".into(), source });
    }
    Ok(Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulation_and_silicon_are_told_apart() {
        assert!(GuestSpeed::new(ROUNDS, Duration::from_millis(10)).native);
        let slow = GuestSpeed::new(18_750, Duration::from_millis(50));
        assert_eq!(slow, GuestSpeed { instructions_per_second: 1_500_000, native: false });
        assert!(GuestSpeed::new(0, Duration::ZERO).instructions_per_second == 0);
    }
}
