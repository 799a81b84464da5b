//! Getting vCPUs out of the guest: kicks, which [`Vcpu::run`](crate::Vcpu::run) returns, and the
//! gate, behind which they wait while memory slots are rearranged.
//!
//! A kicker stores its wish (`kicked`, or the gate's `closed`), then sets `immediate_exit` in the
//! vCPU's shared page, then sends a signal. The vCPU clears `immediate_exit`, then looks for wishes,
//! then enters. So whatever the interleaving, either it sees the wish, or KVM_RUN finds
//! `immediate_exit` set, or the signal comes while it is in KVM_RUN; nothing is lost.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};

use crate::vm::Kick;

/// The signal that takes a thread out of KVM_RUN. Its handler does nothing; a thread that runs a
/// vCPU unblocks it by itself.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// Installs the empty handler, once for the process, and unblocks the signal in this thread.
pub(super) fn prepare_thread() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid one; the handler is async-signal-safe as it does
        // nothing. SA_RESTART spares the bus handlers in this thread; KVM_RUN does not restart.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
        }
    });
    // SAFETY: plain calls on a local signal set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Target {
    immediate_exit: *const AtomicU8,
    thread: Option<libc::pid_t>,
}

// SAFETY: the pointer is to a byte in the vCPU's shared page, used only atomically and only while
// the vCPU exists (it takes the target away before the page is unmapped).
unsafe impl Send for Target {}

/// One vCPU as others see it.
pub(super) struct Handle {
    kicked: AtomicBool,
    in_guest: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl Handle {
    /// # Safety
    /// `immediate_exit` stays valid until [`Handle::detach`].
    pub(super) unsafe fn new(immediate_exit: *const AtomicU8) -> Arc<Self> {
        Arc::new(Self {
            kicked: AtomicBool::new(false),
            in_guest: AtomicBool::new(false),
            target: Mutex::new(Some(Target { immediate_exit, thread: None })),
        })
    }

    /// The calling thread runs the vCPU from now on.
    pub(super) fn bind(&self) {
        // SAFETY: gettid has no preconditions.
        let tid = unsafe { libc::gettid() };
        if let Some(target) = lock(&self.target).as_mut()
            && target.thread != Some(tid)
        {
            prepare_thread();
            target.thread = Some(tid);
        }
    }

    /// The vCPU is about to go.
    pub(super) fn detach(&self) {
        *lock(&self.target) = None;
    }

    /// Whether somebody kicked since the last call.
    pub(super) fn take_kick(&self) -> bool {
        self.kicked.load(Ordering::SeqCst) && self.kicked.swap(false, Ordering::SeqCst)
    }

    /// A kick that was taken and could not be reported yet.
    pub(super) fn put_back_kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
    }

    /// Makes a KVM_RUN that runs, or comes next, return EINTR.
    fn interrupt(&self) {
        let target = lock(&self.target);
        let Some(target) = target.as_ref() else { return };
        // SAFETY: valid until `detach`, which needs the lock that is held here.
        unsafe { &*target.immediate_exit }.store(1, Ordering::SeqCst);
        if let Some(thread) = target.thread {
            // SAFETY: signals one thread of this process with a handled signal; a thread that is
            // gone gives ESRCH, which is fine.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }
}

impl Kick for Handle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.interrupt();
    }
}

/// What all vCPUs of a VM pass on their way into the guest.
#[derive(Default)]
pub(super) struct Gate {
    closed: AtomicU32,
    vcpus: Mutex<Vec<Arc<Handle>>>,
    waiting: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn add(&self, vcpu: Arc<Handle>) {
        lock(&self.vcpus).push(vcpu);
    }

    pub(super) fn remove(&self, vcpu: &Arc<Handle>) {
        lock(&self.vcpus).retain(|other| !Arc::ptr_eq(other, vcpu));
    }

    /// Marks the vCPU as being in the guest; waits while the gate is closed.
    pub(super) fn enter(&self, vcpu: &Handle) {
        loop {
            vcpu.in_guest.store(true, Ordering::SeqCst);
            if self.closed.load(Ordering::SeqCst) == 0 {
                return;
            }
            vcpu.in_guest.store(false, Ordering::SeqCst);
            let mut guard = lock(&self.waiting);
            self.changed.notify_all();
            while self.closed.load(Ordering::SeqCst) != 0 {
                guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// The vCPU is out of the guest.
    pub(super) fn leave(&self, vcpu: &Handle) {
        vcpu.in_guest.store(false, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) != 0 {
            let _guard = lock(&self.waiting);
            self.changed.notify_all();
        }
    }

    /// Runs `work` while no vCPU is in the guest. May be called by a vCPU's thread from its bus
    /// handlers: it is out of the guest there.
    pub(super) fn closed_while<T>(&self, work: impl FnOnce() -> T) -> T {
        self.closed.fetch_add(1, Ordering::SeqCst);
        let vcpus = lock(&self.vcpus).clone();
        for vcpu in &vcpus {
            if vcpu.in_guest.load(Ordering::SeqCst) {
                vcpu.interrupt();
            }
        }
        let mut guard = lock(&self.waiting);
        while vcpus.iter().any(|vcpu| vcpu.in_guest.load(Ordering::SeqCst)) {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        let result = work();
        self.closed.fetch_sub(1, Ordering::SeqCst);
        let _guard = lock(&self.waiting);
        self.changed.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    /// Threads that go in and out of a pretended guest never are in it while the gate is closed.
    #[test]
    fn nobody_is_inside_while_the_gate_is_closed() {
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let byte: &'static AtomicU8 = Box::leak(Box::default());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                // SAFETY: the byte lives for ever.
                let handle = unsafe { Handle::new(byte) };
                gate.add(handle.clone());
                let (gate, inside, stop) = (gate.clone(), inside.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        gate.enter(&handle);
                        inside.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        gate.leave(&handle);
                    }
                })
            })
            .collect();
        for _ in 0..1000 {
            gate.closed_while(|| assert_eq!(inside.load(Ordering::SeqCst), 0));
        }
        stop.store(true, Ordering::SeqCst);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_kick_is_seen_once_and_survives_the_vcpu() {
        let byte: &'static AtomicU8 = Box::leak(Box::default());
        // SAFETY: the byte lives for ever.
        let handle = unsafe { Handle::new(byte) };
        handle.kick();
        assert_eq!(byte.load(Ordering::SeqCst), 1);
        assert!(handle.take_kick());
        assert!(!handle.take_kick());
        handle.detach();
        byte.store(0, Ordering::SeqCst);
        handle.kick();
        assert_eq!(byte.load(Ordering::SeqCst), 0);
    }
}
