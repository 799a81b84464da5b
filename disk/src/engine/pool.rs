//! The fallback: blocking system calls on a few threads that all queues of a disk share.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use super::job::{Call, Job};
use super::{Done, Engine, Io};

/// Threads of one disk: enough that a slow request does not hold up the others.
const THREADS: usize = 8;

/// The threads, ended with the last handle.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    wake: Condvar,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<(Job, Arc<Output>)>,
    finished: bool,
}

/// Where the jobs of one queue end.
struct Output {
    ended: Mutex<Ended>,
    /// Signalled at each end, for who waits in `drop`.
    wake: Condvar,
    event: EventFd,
}

#[derive(Default)]
struct Ended {
    done: Vec<Done>,
    in_flight: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(crate) fn new() -> io::Result<Self> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::new() };
        for _ in 0..THREADS {
            let shared = pool.shared.clone();
            let thread = thread::Builder::new().name("disk-pool".into());
            pool.threads.push(thread.spawn(move || work(&shared))?);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.work).finished = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // An error would be the thread's panic, which it has printed.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared) {
    loop {
        let mut work = lock(&shared.work);
        let (mut job, output) = loop {
            if let Some(job) = work.jobs.pop_front() {
                break job;
            }
            if work.finished {
                return;
            }
            work = shared.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
        };
        drop(work);
        let result = loop {
            if let Some(result) = run_once(&mut job) {
                break result;
            }
        };
        output.end(Done { token: job.token, result });
    }
}

/// Makes one system call; the job's result when it was the last.
fn run_once(job: &mut Job) -> Option<io::Result<u64>> {
    // SAFETY: the descriptor is the job's own and open; the vectors belong to the job, which is not
    // touched during the call, and what they point to is valid by the contract of `Engine::submit`.
    let result = unsafe {
        match job.next() {
            Call::Readv { fd, iov, count, offset } => {
                libc::preadv(fd, iov, count as i32, offset as i64) as i64
            }
            Call::Writev { fd, iov, count, offset } => {
                libc::pwritev(fd, iov, count as i32, offset as i64) as i64
            }
            Call::Fdatasync { fd } => libc::fdatasync(fd).into(),
            Call::Fallocate { fd, mode, offset, len } => {
                libc::fallocate(fd, mode, offset as i64, len as i64).into()
            }
        }
    };
    let errno = || -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
    job.advance(if result < 0 { errno() } else { result })
}

impl Output {
    fn end(&self, done: Done) {
        let mut ended = lock(&self.ended);
        ended.done.push(done);
        ended.in_flight -= 1;
        drop(ended);
        self.wake.notify_all();
        // It can only fail when its counter is full, and then it is readable anyway.
        let _ = self.event.write(1);
    }
}

/// One queue's way to the pool.
pub(crate) struct PoolEngine {
    pool: Arc<Pool>,
    output: Arc<Output>,
}

impl PoolEngine {
    pub(crate) fn new(pool: Arc<Pool>, event: &EventFd) -> io::Result<Self> {
        let event = event.try_clone()?;
        let output = Output { ended: Mutex::default(), wake: Condvar::new(), event };
        Ok(Self { pool, output: Arc::new(output) })
    }
}

impl Engine for PoolEngine {
    unsafe fn submit(&mut self, file: &Arc<File>, token: u64, io: Io) -> io::Result<()> {
        let job = Job::new(file.clone(), token, io);
        lock(&self.output.ended).in_flight += 1;
        if job.is_empty() {
            self.output.end(Done { token, result: Ok(0) });
            return Ok(());
        }
        lock(&self.pool.shared.work).jobs.push_back((job, self.output.clone()));
        self.pool.shared.wake.notify_one();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Done>) {
        out.append(&mut lock(&self.output.ended).done);
    }
}

impl Drop for PoolEngine {
    fn drop(&mut self) {
        let mut ended = lock(&self.output.ended);
        while ended.in_flight > 0 {
            ended = self.output.wake.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
