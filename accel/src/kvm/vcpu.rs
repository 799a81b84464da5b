//! One vCPU: made as after a hardware reset, then run.
//!
//! ```text
//!            .--------------- EINTR, no kick ---------------.
//!            v                                              |
//!   run --> kicked? --no--> gate --> KVM_RUN --> exit ------+--> port, MMIO: the bus, and again
//!             | yes                                         |--> emulation failure: finish.rs, and again
//!             v                                             '--> shutdown, failure: return
//!      access half done? --no--> return Kicked
//!             | yes
//!             '--> KVM_RUN with immediate_exit: ends the access, does not enter the guest
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    CpuId, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS,
    KVM_INTERNAL_ERROR_EMULATION, KVM_MAX_CPUID_ENTRIES, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_cpuid_entry2, kvm_run,
};
use kvm_ioctls::VcpuFd;
use lodge_memory::Bus;

use super::finish::{Finished, Finisher};
use super::gate::Handle;
use super::vm::Shared;
use super::{cpuid, exits, finish, msrs, refused, state};
use crate::error::{Error, Result};
use crate::state::VcpuState;
use crate::vm::{Exit, Kick, Vcpu};

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: libc::c_ulong = 0xae80;
/// IA32_MISC_ENABLE: fast strings (SDM volume 4, table 2-2).
const FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs on, write-back (SDM volume 3, 12.11.2.1).
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Offsets and values of the LAPIC's LINT entries (SDM volume 3, 11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTINT: u8 = 7;
const DELIVER_NMI: u8 = 4;

/// The page that KVM shares with us.
struct Page {
    run: *mut kvm_run,
    bytes: usize,
}

// SAFETY: the mapping belongs to the vCPU's descriptor and moves with it.
unsafe impl Send for Page {}

impl Page {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: valid for as long as the vCPU is; the byte is only used atomically.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run).immediate_exit) }
    }

    fn exit_reason(&self) -> u32 {
        // SAFETY: the kernel writes the page only during KVM_RUN, which this thread is not in.
        unsafe { (*self.run).exit_reason }
    }
}

/// What an exit asks for.
enum Next {
    Again,
    Return(Exit),
}

/// A vCPU of the host's KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    index: u32,
    page: Page,
    handle: Arc<Handle>,
    vm: Arc<Shared>,
    /// The last exit's access is completed by the next KVM_RUN.
    pending: bool,
    /// It was stopped, and the guest is not told of the gap yet.
    paused: bool,
    /// For instructions that KVM lacks; made when the first one comes.
    software: Option<Finisher>,
}

impl KvmVcpu {
    /// Makes vCPU `index` as it is after a hardware reset.
    pub(super) fn new(vm: Arc<Shared>, index: u32) -> Result<Self> {
        let step = |what: &str| format!("{what} vCPU {index}");
        let mut fd = vm.fd.create_vcpu(index.into()).map_err(refused(step("creating")))?;
        let page = Page { run: fd.get_kvm_run(), bytes: vm.fd.run_size() };
        // SAFETY: the page is mapped until the vCPU is dropped, which detaches first.
        let handle = unsafe { Handle::new(page.immediate_exit()) };
        let tsc_khz = fd.get_tsc_khz().ok().filter(|khz| *khz != 0);
        let mut table = cpuid::build(&vm.supported_cpuid, &vm.cpu_facts(index, tsc_khz));
        let signature = table.iter().find(|leaf| leaf.function == 1).map_or(0, |leaf| leaf.eax);
        set_cpuid(&fd, index, &table)?;
        if let Ok(shown) = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            && cpuid::take_back(&mut table, shown.as_slice())
        {
            set_cpuid(&fd, index, &table)?;
        }
        state::reset_registers(&fd, index, signature)?;
        reset_msrs(&fd)?;
        reset_lapic(&fd, index)?;
        vm.gate.add(handle.clone());
        Ok(Self { fd, index, page, handle, vm, pending: false, paused: false, software: None })
    }

    /// KVM_RUN, once.
    fn enter(&mut self) -> io::Result<()> {
        self.vm.gate.enter(&self.handle);
        // SAFETY: KVM_RUN takes no argument; what it writes is the shared page, which is read only
        // after it returned, and guest memory, which is shared by its nature.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) };
        let error = io::Error::last_os_error();
        self.vm.gate.leave(&self.handle);
        if result < 0 { Err(error) } else { Ok(()) }
    }

    fn run_until_exit(&mut self) -> Result<Exit> {
        let mut stopping = false;
        loop {
            // In this order: whoever kicks sets the kick first and immediate_exit second.
            self.page.immediate_exit().store(stopping.into(), Ordering::SeqCst);
            if !stopping && self.handle.take_kick() {
                if !self.pending {
                    return Ok(Exit::Kicked);
                }
                stopping = true;
                continue;
            }
            let entered = self.enter();
            self.pending = false;
            let next = match entered {
                Ok(()) => self.handle_exit(),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                    if stopping {
                        return Ok(Exit::Kicked);
                    }
                    Ok(Next::Again)
                }
                Err(e) => Err(refused(format!("running vCPU {}", self.index))(e)),
            };
            match next {
                Ok(Next::Again) => {}
                other => {
                    if stopping {
                        self.handle.put_back_kick();
                    }
                    return other.map(|next| match next {
                        Next::Return(exit) => exit,
                        Next::Again => Exit::Kicked,
                    });
                }
            }
        }
    }

    fn handle_exit(&mut self) -> Result<Next> {
        match self.page.exit_reason() {
            KVM_EXIT_IO => self.port_access(),
            KVM_EXIT_MMIO => self.memory_access(),
            KVM_EXIT_SHUTDOWN => return Ok(Next::Return(Exit::Shutdown)),
            KVM_EXIT_INTR
            | KVM_EXIT_IRQ_WINDOW_OPEN
            | KVM_EXIT_SET_TPR
            | KVM_EXIT_TPR_ACCESS
            | KVM_EXIT_IOAPIC_EOI => {}
            KVM_EXIT_SYSTEM_EVENT => return self.system_event(),
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit's reason says which member of the union the kernel wrote.
                let fail = unsafe { (*self.page.run).__bindgen_anon_1.fail_entry };
                let why = exits::fail_entry(fail.hardware_entry_failure_reason, fail.cpu);
                return Err(self.broken(&why));
            }
            KVM_EXIT_INTERNAL_ERROR => return self.internal_error(),
            other => return Err(self.broken(&exits::unexpected(other))),
        }
        Ok(Next::Again)
    }

    fn port_access(&mut self) {
        self.pending = true;
        // SAFETY: the exit's reason says which member of the union the kernel wrote.
        let io = unsafe { (*self.page.run).__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let bytes = size.saturating_mul(io.count as usize);
        let offset = io.data_offset as usize;
        if size == 0 || offset.checked_add(bytes).is_none_or(|end| end > self.page.bytes) {
            return;
        }
        // SAFETY: inside of the mapping, as was just checked; nobody else uses it outside of KVM_RUN.
        let data = unsafe {
            std::slice::from_raw_parts_mut(self.page.run.cast::<u8>().add(offset), bytes)
        };
        // A string instruction comes as several accesses to one port.
        for access in data.chunks_exact_mut(size) {
            if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                self.vm.bus.pio_write(io.port, access);
            } else {
                self.vm.bus.pio_read(io.port, access);
            }
        }
    }

    fn memory_access(&mut self) {
        self.pending = true;
        // SAFETY: the exit's reason says which member of the union the kernel wrote; the reference
        // ends before the next KVM_RUN.
        let mmio = unsafe { &mut (*self.page.run).__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        let write = mmio.is_write != 0;
        access_in_parts(&*self.vm.bus, mmio.phys_addr, &mut mmio.data[..len], write);
    }

    fn system_event(&self) -> Result<Next> {
        // SAFETY: the exit's reason says which member of the union the kernel wrote.
        let kind = unsafe { (*self.page.run).__bindgen_anon_1.system_event.type_ };
        match kind {
            KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => {
                Ok(Next::Return(Exit::Shutdown))
            }
            _ => Err(self.broken(&format!("system event {kind} is not known here"))),
        }
    }

    fn internal_error(&mut self) -> Result<Next> {
        // SAFETY: the exit's reason says which member of the union the kernel wrote.
        let internal = unsafe { (*self.page.run).__bindgen_anon_1.internal };
        if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
            let count = (internal.ndata as usize).min(internal.data.len());
            let why = exits::internal(internal.suberror, &internal.data[..count]);
            return Err(self.broken(&why));
        }
        // The kernel may say which bytes it failed on. They are fetched again anyway: the
        // instruction may cross a page, and old kernels say nothing.
        let before = state::save_for_step(&self.fd, &self.vm.layout, &finish::MSRS)?;
        let mut after = before.clone();
        if matches!(after.events.exception, Some((6, None))) {
            // Kernels that cannot leave the choice to us queue #UD beside the exit.
            after.events.exception = None;
        }
        let (vm, index) = (&self.vm, self.index);
        let software = self.software.get_or_insert_with(|| Finisher::new(vm, index));
        let finished = software.finish(&mut after);
        tracing::trace!(
            "vCPU {index} finished in software: {}, {}",
            exits::instruction(
                &internal.data[..(internal.ndata as usize).min(internal.data.len())]
            ),
            exits::place(&before)
        );
        match finished {
            Finished::Done => state::restore_changes(&self.fd, &self.vm.layout, &before, &after)?,
            Finished::Shutdown => return Ok(Next::Return(Exit::Shutdown)),
            Finished::KernelsChip(chip) => {
                let what = format!("accesses {chip}, which only KVM itself can do");
                return Err(self.broken(&exits::lacking(&what)));
            }
            Finished::Beyond => {
                let what = "is one of AVX, which cannot be completed in software";
                return Err(self.broken(&exits::lacking(what)));
            }
        }
        Ok(Next::Again)
    }

    /// The vCPU cannot go on.
    fn broken(&self, why: &str) -> Error {
        let place = state::save(&self.fd, &self.vm.layout)
            .map_or_else(|e| format!("(its registers cannot be read: {e})"), |s| exits::place(&s));
        Error::Guest(format!("vCPU {} {place}: {why}", self.index))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit> {
        self.handle.bind();
        if std::mem::take(&mut self.paused) {
            // Tells kvmclock's watchdogs in the guest; refused where the guest does not use it.
            let _ = self.fd.kvmclock_ctrl();
        }
        let result = self.run_until_exit();
        self.paused = matches!(result, Ok(Exit::Kicked));
        result
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.handle.clone()
    }

    fn state(&mut self) -> Result<VcpuState> {
        state::save(&self.fd, &self.vm.layout)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        self.pending = false;
        state::restore(&self.fd, &self.vm.layout, state)
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.handle.detach();
        self.vm.gate.remove(&self.handle);
    }
}

/// Gives an access of any length to the bus, in parts of 1, 2, 4 or 8 bytes.
fn access_in_parts(bus: &dyn Bus, mut gpa: u64, mut data: &mut [u8], write: bool) {
    while !data.is_empty() {
        let part = 1 << data.len().min(8).ilog2();
        let (now, rest) = data.split_at_mut(part);
        if write {
            bus.mmio_write(gpa, now);
        } else {
            bus.mmio_read(gpa, now);
        }
        gpa = gpa.wrapping_add(part as u64);
        data = rest;
    }
}

fn set_cpuid(fd: &VcpuFd, index: u32, table: &[kvm_cpuid_entry2]) -> Result<()> {
    let table = CpuId::from_entries(table)
        .map_err(|e| refused("a list of CPUID leaves")(io::Error::other(e)))?;
    fd.set_cpuid2(&table).map_err(refused(format!("setting CPUID of vCPU {index}")))
}

/// What firmware would set and direct boot relies on; a host that lacks one of them is left as it is.
fn reset_msrs(fd: &VcpuFd) -> Result<()> {
    let enable = msrs::get(fd, &[msrs::IA32_MISC_ENABLE])?;
    let mut values: Vec<_> =
        enable.into_iter().map(|(index, value)| (index, value | FAST_STRINGS)).collect();
    values.push((msrs::IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK));
    for (index, value) in msrs::set(fd, &values)? {
        tracing::debug!("the host refuses {value:#x} for model-specific register {index:#x}");
    }
    Ok(())
}

/// The boot processor takes the PIC's interrupts at LINT0, all take NMIs at LINT1 (MP specification
/// 1.4, 3.6.2.2; the MADT says the same of LINT1).
fn reset_lapic(fd: &VcpuFd, index: u32) -> Result<()> {
    let mut lapic = fd.get_lapic().map_err(refused("reading the local APIC"))?;
    let mut deliver = |register: usize, mode: u8| {
        // Bits 8 to 10 are the delivery mode, bit 16 the mask.
        lapic.regs[register + 1] = (lapic.regs[register + 1] as u8 & !7 | mode) as _;
        lapic.regs[register + 2] = (lapic.regs[register + 2] as u8 & !1) as _;
    };
    if index == 0 {
        deliver(LVT_LINT0, DELIVER_EXTINT);
    }
    deliver(LVT_LINT1, DELIVER_NMI);
    fd.set_lapic(&lapic).map_err(refused("setting the local APIC"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, usize)>>);
    impl Bus for Log {
        fn pio_read(&self, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: u16, _: &[u8]) {}
        fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
            data.fill(gpa as u8);
        }
        fn mmio_write(&self, gpa: u64, data: &[u8]) {
            self.0.lock().unwrap().push((gpa, data.len()));
        }
    }

    #[test]
    fn odd_lengths_are_split() {
        let log = Log::default();
        access_in_parts(&log, 0x10, &mut [0; 7], true);
        assert_eq!(*log.0.lock().unwrap(), [(0x10, 4), (0x14, 2), (0x16, 1)]);
        let mut data = [0; 3];
        access_in_parts(&log, 0x20, &mut data, false);
        assert_eq!(data, [0x20, 0x20, 0x22]);
    }
}
