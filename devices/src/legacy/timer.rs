//! A timer with a thread of its own, which exists from the first time that it is armed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Called when the timer is due; says how long until it is to be called again.
type Callback = Box<dyn FnMut() -> Option<Duration> + Send>;

#[derive(Default)]
struct Control {
    due: Option<Instant>,
    quit: bool,
}

#[derive(Default)]
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One deadline at a time. Dropping it ends the thread.
pub(super) struct Timer {
    name: &'static str,
    shared: Arc<Shared>,
    thread: Mutex<Thread>,
}

enum Thread {
    NotStarted(Callback),
    Running(JoinHandle<()>),
    Gone,
}

impl Timer {
    /// A timer that is not armed. `callback` holds its device weakly and is called in the timer's
    /// thread (named `name`, at most 15 bytes).
    pub(super) fn new(
        name: &'static str,
        callback: impl FnMut() -> Option<Duration> + Send + 'static,
    ) -> Self {
        Self {
            name,
            shared: Arc::default(),
            thread: Mutex::new(Thread::NotStarted(Box::new(callback))),
        }
    }

    /// Sets the deadline to `after` from now, or none.
    pub(super) fn arm(&self, after: Option<Duration>) {
        let due = after.and_then(|after| Instant::now().checked_add(after));
        self.shared.lock().due = due;
        if due.is_some() {
            self.start();
        }
        self.shared.changed.notify_one();
    }

    fn start(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*thread, Thread::NotStarted(_)) {
            return;
        }
        let Thread::NotStarted(callback) = std::mem::replace(&mut *thread, Thread::Gone) else {
            return;
        };
        let shared = self.shared.clone();
        match thread::Builder::new().name(self.name.into()).spawn(move || run(&shared, callback)) {
            Ok(handle) => *thread = Thread::Running(handle),
            Err(error) => {
                tracing::error!(name = self.name, %error, "no thread for a timer: it never fires");
            }
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.changed.notify_one();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Thread::Running(handle) = std::mem::replace(thread, Thread::Gone)
            // The last owner of the device may be the callback itself.
            && handle.thread().id() != thread::current().id()
        {
            let _ = handle.join();
        }
    }
}

fn run(shared: &Shared, mut callback: Callback) {
    let mut control = shared.lock();
    while !control.quit {
        let now = Instant::now();
        control = match control.due {
            None => shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner),
            Some(due) if due > now => {
                let wait = shared.changed.wait_timeout(control, due - now);
                wait.unwrap_or_else(PoisonError::into_inner).0
            }
            Some(_) => {
                control.due = None;
                drop(control);
                let next = callback();
                let mut control = shared.lock();
                // Somebody who armed the timer meanwhile knows better.
                if control.due.is_none() {
                    control.due = next.and_then(|next| Instant::now().checked_add(next));
                }
                control
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn it_fires_again_as_its_callback_asks_and_ends_when_dropped() {
        let (sender, receiver) = mpsc::channel();
        let mut left = 3;
        let timer = Timer::new("test-timer", move || {
            left -= 1;
            sender.send(left).unwrap();
            (left > 0).then_some(Duration::from_micros(10))
        });
        timer.arm(Some(Duration::from_micros(10)));
        let wait = Duration::from_secs(30);
        assert_eq!([(); 3].map(|()| receiver.recv_timeout(wait).unwrap()), [2, 1, 0]);
        drop(timer);
        assert_eq!(receiver.recv(), Err(mpsc::RecvError));
    }

    #[test]
    fn disarmed_it_does_not_fire() {
        let (sender, receiver) = mpsc::channel();
        let timer = Timer::new("test-timer", move || {
            let _ = sender.send(());
            None
        });
        timer.arm(Some(Duration::from_secs(3600)));
        timer.arm(None);
        timer.arm(Some(Duration::from_secs(3600)));
        drop(timer);
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }
}
