//! The judge: a child process in which the host's CPU runs the cases.
//!
//! ```text
//!   parent                           child
//!   fills the batch  --- pipe --->   raises a signal; its handler puts the first case's state into the frame that
//!                                    the kernel restores on return
//!                                      case runs, ends with INT3, a trap or a fault: a signal again
//!                                      the handler takes the state out of the frame, puts the next case in
//!   compares         <--- pipe ---   after the last case the handler puts back what the child was doing
//! ```
//!
//! So the kernel loads and stores all registers, CS and SS included; DS, ES, FS and GS the handler does itself.
//! In the handler nothing may use thread-local storage before FS is back, nor anything that a fork of a threaded
//! process may not use.

use std::arch::asm;
use std::io::{Error, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{null_mut, write_bytes};

use super::case::{
    Bits, CODE, CODE_OFFSET, Case, DATA, DATA_LEN, FX, LDT, Outcome, RO, State, USER_DS,
};

/// Cases in a batch.
pub const BATCH: usize = 64;

/// What parent and child share.
#[repr(C)]
struct Batch {
    len: usize,
    /// The case that the child is at.
    at: usize,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The child process.
pub struct Native {
    batch: *mut Batch,
    to_child: std::fs::File,
    from_child: std::fs::File,
    child: libc::pid_t,
    code_fd: OwnedFd,
}

fn check(what: &str, result: i64) -> i64 {
    assert!(result >= 0, "{what}: {}", Error::last_os_error());
    result
}

fn map(at: u64, len: usize, prot: i32, flags: i32, fd: i32) -> *mut u8 {
    // SAFETY: a fresh mapping, at an address of the kernel's choice or one that nobody uses.
    let got = unsafe { libc::mmap(at as *mut _, len, prot, flags, fd, 0) };
    assert!(got != libc::MAP_FAILED, "mmap at {at:#x}: {}", Error::last_os_error());
    assert!(at == 0 || got as u64 == at, "mmap gave another address than {at:#x}");
    got.cast()
}

impl Native {
    /// Starts the child.
    pub fn start() -> Self {
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let batch = map(0, size_of::<Batch>(), rw, shared, -1).cast::<Batch>();
        // SAFETY: a plain system call; the descriptor is new and ours.
        let code_fd = unsafe {
            let fd = check("memfd_create", libc::memfd_create(c"code".as_ptr(), 0).into());
            OwnedFd::from_raw_fd(fd as i32)
        };
        // SAFETY: as above.
        check("ftruncate", unsafe { libc::ftruncate(code_fd.as_raw_fd(), 4096) }.into());
        let (to_child, from_child, child) = spawn(batch, code_fd.as_raw_fd());
        Self { batch, to_child, from_child, child, code_fd }
    }

    /// Runs the cases; gives how each ended. Panics, naming the case, if the child does not survive it.
    pub fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        assert!(cases.len() <= BATCH);
        // SAFETY: the child does not touch the batch until it is told to.
        let batch = unsafe { &mut *self.batch };
        batch.len = cases.len();
        batch.at = 0;
        for (slot, case) in batch.cases.iter_mut().zip(cases) {
            slot.clone_from(case);
        }
        self.to_child.write_all(&[1]).expect("the child reads");
        let mut poll =
            libc::pollfd { fd: self.from_child.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor.
        let ready = unsafe { libc::poll(&mut poll, 1, 60_000) };
        let mut byte = [0];
        let answered = ready == 1 && self.from_child.read(&mut byte).is_ok_and(|n| n == 1);
        // SAFETY: the child is done with it, or is dead or stuck.
        let at = unsafe { (&raw const (*self.batch).at).read_volatile() };
        assert!(
            answered,
            "the native side did not survive case {:#x}: {:02x?}",
            cases[at.min(cases.len() - 1)].seed,
            cases[at.min(cases.len() - 1)].code(),
        );
        // SAFETY: the child waits for the next batch.
        unsafe { &*self.batch }.outcomes[..cases.len()].to_vec()
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: the child is ours, by its id; the batch is not used any more.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, &mut status, 0);
            libc::munmap(self.batch.cast(), size_of::<Batch>());
        }
        let _ = &self.code_fd;
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: two new descriptors of our own.
    unsafe {
        check("pipe", libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC).into());
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

fn spawn(batch: *mut Batch, code_fd: i32) -> (std::fs::File, std::fs::File, libc::pid_t) {
    let (child_in, parent_out) = pipe();
    let (parent_in, child_out) = pipe();
    // SAFETY: the child calls nothing that needs a lock some other thread may hold.
    let pid = unsafe { libc::fork() };
    check("fork", pid.into());
    if pid == 0 {
        // SAFETY: dies with its parent; the descriptors are inherited.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::close(parent_out.as_raw_fd());
            libc::close(parent_in.as_raw_fd());
            child(batch, code_fd, child_in.as_raw_fd(), child_out.as_raw_fd());
        }
    }
    (parent_out.into(), parent_in.into(), pid)
}

/// What the handler needs; one child, one thread.
struct Child {
    batch: *mut Batch,
    code: *mut u8,
    fs_base: u64,
    /// What the child was doing: registers, and the floating-point frame.
    home: [i64; 23],
    running: bool,
}

static mut CHILD: Child =
    Child { batch: null_mut(), code: null_mut(), fs_base: 0, home: [0; 23], running: false };

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

#[inline(always)]
unsafe fn arch_prctl(what: u64, value: u64) {
    // SAFETY: the system call touches RAX, RCX and R11.
    unsafe {
        asm!("syscall", inout("rax") 158u64 => _, in("rdi") what, in("rsi") value,
             out("rcx") _, out("r11") _, options(nostack));
    }
}

/// # Safety
/// In the child only, once.
unsafe fn child(batch: *mut Batch, code_fd: i32, input: i32, output: i32) -> ! {
    // SAFETY: for all of it, the child is alone with its memory. The arena's addresses are below everything that the loader
    // and the kernel have placed.
    unsafe {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let fixed = libc::MAP_FIXED;
        map(CODE - 0x1_0000, 0x10_0000, libc::PROT_NONE, anonymous, -1);
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed | libc::MAP_POPULATE;
        map(DATA, DATA_LEN, rw, private, -1);
        map(RO, 4096, rw, private, -1);
        write_bytes(RO as *mut u8, 0, 4096);
        libc::mprotect(RO as *mut _, 4096, libc::PROT_READ);
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        map(CODE, 4096, rx, libc::MAP_SHARED | fixed | libc::MAP_POPULATE, code_fd);
        let code = map(0, 4096, rw, libc::MAP_SHARED | libc::MAP_POPULATE, code_fd);
        write_bytes(code, 0xcc, 4096);
        make_ldt();
        // The limit of one of Linux's segments is the processor's number: 0, where there is a choice.
        let mut first: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut first);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &first);
        let me = &raw mut CHILD;
        (*me).batch = batch;
        (*me).code = code;
        arch_prctl(ARCH_GET_FS, (&raw mut (*me).fs_base) as u64);
        catch_signals();
        let mut byte = 0u8;
        while libc::read(input, (&raw mut byte).cast(), 1) == 1 {
            if (*batch).len > 0 {
                libc::raise(libc::SIGUSR1);
            }
            if libc::write(output, (&raw const byte).cast(), 1) != 1 {
                break;
            }
        }
        libc::_exit(0)
    }
}

/// struct user_desc of the kernel.
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

fn make_ldt() {
    for (i, entry) in LDT.iter().enumerate() {
        let flags = u32::from(entry.big)
            | entry.contents << 1
            | u32::from(entry.restricted) << 3
            | u32::from(!entry.present) << 5
            | 1 << 6;
        let desc = UserDesc { entry: i as u32, base: entry.base as u32, limit: entry.limit, flags };
        // SAFETY: writes one entry of this process's LDT.
        let result = unsafe {
            libc::syscall(libc::SYS_modify_ldt, 1, &raw const desc, size_of::<UserDesc>())
        };
        check("modify_ldt", result);
    }
}

fn catch_signals() {
    const STACK: usize = 256 << 10;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let stack = map(0, STACK, libc::PROT_READ | libc::PROT_WRITE, flags, -1);
    // SAFETY: the stack stays; the handler is one.
    unsafe {
        let alternate = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: STACK };
        check("sigaltstack", libc::sigaltstack(&alternate, null_mut()).into());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for signal in
            [libc::SIGUSR1, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP]
        {
            check("sigaction", libc::sigaction(signal, &action, null_mut()).into());
        }
    }
}

/// DS, ES, FS, GS as they are, before anything else changes them.
#[inline(always)]
unsafe fn read_selectors() -> [u16; 4] {
    let (ds, es, fs, gs): (u16, u16, u16, u16);
    // SAFETY: reads selectors.
    unsafe {
        asm!("mov {0:x}, ds", "mov {1:x}, es", "mov {2:x}, fs", "mov {3:x}, gs",
             out(reg) ds, out(reg) es, out(reg) fs, out(reg) gs, options(nostack, nomem));
    }
    [ds, es, fs, gs]
}

/// # Safety
/// The selectors are valid.
#[inline(always)]
unsafe fn write_selectors([ds, es, fs, gs]: [u16; 4]) {
    // SAFETY: the caller's promise; nothing uses the segments before they are put back.
    unsafe {
        asm!("mov ds, {0:x}", "mov es, {1:x}", "mov fs, {2:x}", "mov gs, {3:x}",
             in(reg) ds, in(reg) es, in(reg) fs, in(reg) gs, options(nostack, nomem));
    }
}

/// Order of RAX..R15 in the kernel's frame.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

unsafe extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: for all of it, one thread, in its signal handler, with the frame the kernel made.
    unsafe {
        // No alignment checks, nested-task or ID flag of a case in here.
        asm!("push 0x202", "popfq");
        let selectors = read_selectors();
        let mut bases = [0u64; 2];
        arch_prctl(ARCH_GET_FS, (&raw mut bases[0]) as u64);
        arch_prctl(ARCH_GET_GS, (&raw mut bases[1]) as u64);
        let me = &mut *std::ptr::addr_of_mut!(CHILD);
        write_selectors([0; 4]);
        arch_prctl(ARCH_SET_FS, me.fs_base);
        arch_prctl(ARCH_SET_GS, 0);
        let gregs = &mut (*context).uc_mcontext.gregs;
        let frame = (*context).uc_mcontext.fpregs.cast::<u8>();
        let batch = &mut *me.batch;
        if me.running {
            record(batch, gregs, frame, selectors, bases);
            batch.at += 1;
        } else {
            me.home.copy_from_slice(&gregs[..]);
            me.running = true;
        }
        if batch.at == batch.len {
            me.running = false;
            gregs.copy_from_slice(&me.home);
            let fresh = State::zero().fx;
            std::ptr::copy_nonoverlapping(fresh.as_ptr(), frame, 28);
            return;
        }
        load(batch, me.code, gregs, frame);
    }
}

/// Takes the outcome out of the frame.
///
/// # Safety
/// In the handler.
#[inline(always)]
unsafe fn record(
    batch: &mut Batch,
    gregs: &[i64; 23],
    frame: *const u8,
    [ds, es, fs, gs]: [u16; 4],
    bases: [u64; 2],
) {
    let case = &batch.cases[batch.at];
    let out = &mut batch.outcomes[batch.at];
    let trap = gregs[libc::REG_TRAPNO as usize] as u8;
    out.vector = Some(trap);
    out.error = gregs[libc::REG_ERR as usize] as u64;
    out.cr2 = gregs[libc::REG_CR2 as usize] as u64;
    let end = &mut out.end;
    for (register, at) in end.regs.iter_mut().zip(GREGS) {
        *register = gregs[at as usize] as u64;
    }
    end.rip = gregs[libc::REG_RIP as usize] as u64;
    end.rflags = gregs[libc::REG_EFL as usize] as u64;
    let packed = gregs[libc::REG_CSGSFS as usize] as u64;
    end.selectors = [es, packed as u16, (packed >> 48) as u16, ds, fs, gs];
    end.bases = bases;
    if trap == 3 && end.rip == case.stop() + 1 {
        end.rip -= 1;
        out.vector = None;
    }
    if trap == 1 && case.step {
        out.vector = None;
    }
    // SAFETY: the frame begins with an FXSAVE image; DATA is mapped.
    unsafe {
        std::ptr::copy_nonoverlapping(frame, end.fx.as_mut_ptr(), FX);
        std::ptr::copy_nonoverlapping(DATA as *const u8, end.data.as_mut_ptr(), DATA_LEN);
    }
}

/// Puts a case into the frame and into memory.
///
/// # Safety
/// In the handler, last.
#[inline(always)]
unsafe fn load(batch: &mut Batch, code: *mut u8, gregs: &mut [i64; 23], frame: *mut u8) {
    let case = &batch.cases[batch.at];
    let State { regs, rip, rflags, selectors, bases, fx, data } = &case.start;
    for (register, at) in regs.iter().zip(GREGS) {
        gregs[at as usize] = *register as i64;
    }
    gregs[libc::REG_RIP as usize] = *rip as i64;
    gregs[libc::REG_EFL as usize] = (*rflags | if case.step { 0x100 } else { 0 }) as i64;
    let [es, cs, ss, ds, fs, gs] = *selectors;
    let ss = if case.bits == Bits::B64 { USER_DS } else { ss };
    gregs[libc::REG_CSGSFS as usize] = (u64::from(cs) | u64::from(ss) << 48) as i64;
    // SAFETY: the frame is an XSAVE image whose header has the bits of x87 and SSE; the arena is mapped; the selectors
    // are those of the case's LDT and nothing runs between here and the return but this function.
    unsafe {
        std::ptr::copy_nonoverlapping(fx.as_ptr(), frame, 24);
        std::ptr::copy_nonoverlapping(fx.as_ptr().add(24), frame.add(24), 4);
        std::ptr::copy_nonoverlapping(fx.as_ptr().add(32), frame.add(32), FX - 32);
        let header = frame.add(512).cast::<u64>();
        header.write_unaligned(header.read_unaligned() | 3);
        std::ptr::copy_nonoverlapping(data.as_ptr(), DATA as *mut u8, DATA_LEN);
        let at = code.add(CODE_OFFSET as usize);
        write_bytes(at, 0xcc, 512);
        std::ptr::copy_nonoverlapping(case.code.as_ptr(), at, case.code_len as usize);
        arch_prctl(ARCH_SET_GS, bases[1]);
        if case.bits == Bits::B64 {
            arch_prctl(ARCH_SET_FS, bases[0]);
            write_ds_es(ds, es);
        } else {
            write_selectors([ds, es, fs, gs]);
        }
    }
}

/// # Safety
/// The selectors are valid.
#[inline(always)]
unsafe fn write_ds_es(ds: u16, es: u16) {
    // SAFETY: the caller's promise; 64-bit code does not use them.
    unsafe {
        asm!("mov ds, {0:x}", "mov es, {1:x}", in(reg) ds, in(reg) es, options(nostack, nomem));
    }
}
