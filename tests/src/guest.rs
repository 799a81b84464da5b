//! A running `lodge run`: its process and its console.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;

use crate::console::{Console, Found};
use crate::patience;

/// A machine in a process, ended when this is dropped.
pub struct Guest {
    child: Child,
    /// What goes to the guest, and to the keys of `lodge run`.
    input: Option<Box<dyn Write + Send>>,
    console: Console,
    /// What Lodge itself says; in a terminal it is on the console.
    messages: Option<Console>,
    slave: Option<OwnedFd>,
    /// What was waited for last ends here.
    seen: usize,
    exit_code: Option<i32>,
}

/// A pseudo terminal's two ends.
pub(crate) struct Terminal {
    pub slave: OwnedFd,
    pub input: File,
    pub output: File,
}

impl Guest {
    pub(crate) fn start(mut command: Command, terminal: Option<Terminal>) -> Self {
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // The command holds copies of what it gave to the child: an end would never be seen.
        drop(command);
        let pipe = "it was asked to be a pipe";
        match terminal {
            Some(Terminal { slave, input, output }) => Self {
                input: Some(Box::new(input)),
                console: Console::collect(output),
                messages: None,
                slave: Some(slave),
                child,
                seen: 0,
                exit_code: None,
            },
            None => Self {
                input: child.stdin.take().map(|stdin| Box::new(stdin) as Box<dyn Write + Send>),
                console: Console::collect(child.stdout.take().expect(pipe)),
                messages: Some(Console::collect(child.stderr.take().expect(pipe))),
                slave: None,
                child,
                seen: 0,
                exit_code: None,
            },
        }
    }

    /// The process: `lodge run` becomes `lodge-vmm`.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that it has started, and that are not over.
    pub fn children(&self) -> Vec<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()));
        let tasks = tasks.into_iter().flatten().flatten();
        let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        lists
            .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|pid| pid.parse().ok())
            .collect()
    }

    /// Waits until the console shows `text`, behind what was waited for last. Gives what stands
    /// between the two.
    pub fn expect(&mut self, text: &str) -> String {
        let end = Instant::now() + patience();
        let mut ended = false;
        loop {
            match self.console.wait_for(text, self.seen, Duration::from_millis(250)) {
                Found::At(at) => {
                    let between = self.console.text(self.seen..at - text.len());
                    self.seen = at;
                    return between;
                }
                Found::Ended => ended = true,
                // In a terminal nothing ends; the text may have come just before the process did.
                Found::NotYet if ended || Instant::now() > end => break,
                Found::NotYet => ended = self.has_ended(),
            }
            if ended && self.slave.is_none() {
                break;
            }
        }
        panic!("the console does not show '{text}'\n{}", self.report());
    }

    /// Everything that the console has shown.
    pub fn text(&self) -> String {
        self.console.text(0..)
    }

    /// What the console has shown behind what was waited for last.
    pub fn rest(&self) -> String {
        self.console.text(self.seen..)
    }

    /// What Lodge itself has said; in a terminal, all that was shown.
    pub fn messages(&self) -> String {
        self.messages.as_ref().unwrap_or(&self.console).text(0..)
    }

    /// Waits until Lodge itself says this.
    pub fn expect_message(&mut self, text: &str) {
        let messages = self.messages.as_ref().unwrap_or(&self.console);
        if !matches!(messages.wait_for(text, 0, patience()), Found::At(_)) {
            panic!("Lodge does not say '{text}'\n{}", self.report());
        }
    }

    /// Types this.
    pub fn send(&mut self, keys: &str) {
        let input = self.input.as_mut().expect("its input is still open");
        let written = input.write_all(keys.as_bytes()).and_then(|()| input.flush());
        if let Err(error) = written {
            panic!("cannot type {keys:?}: {error}\n{}", self.report());
        }
    }

    /// Lets it read the end of its input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Forgets what was shown until now: [`Self::expect`] looks behind it.
    pub fn skip_shown(&mut self) {
        self.seen = self.console.len();
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a process has a positive number");
        kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("{signal}: {error}"));
    }

    /// How its terminal is set now.
    pub fn terminal(&self) -> Termios {
        let slave = self.slave.as_ref().expect("it runs in a terminal");
        tcgetattr(slave).expect("a terminal tells how it is set")
    }

    /// Whether the process is over.
    pub fn has_ended(&mut self) -> bool {
        if self.exit_code.is_none() {
            let status = self.child.try_wait().expect("the process can be waited for");
            // A signal's number is negative here, as in Python.
            self.exit_code = status.map(|status| {
                use std::os::unix::process::ExitStatusExt;
                status.code().or(status.signal().map(|s| -s)).unwrap_or(i32::MIN)
            });
        }
        self.exit_code.is_some()
    }

    /// Waits until the process is over. Gives its exit code, or the number of the signal that
    /// killed it, negative.
    pub fn wait(&mut self) -> i32 {
        let end = Instant::now() + patience();
        while !self.has_ended() {
            if Instant::now() > end {
                panic!("it does not end\n{}", self.report());
            }
            thread::sleep(Duration::from_millis(20));
        }
        // What it said last is still on its way through our threads.
        for console in [Some(&self.console), self.messages.as_ref()].into_iter().flatten() {
            let limit = if self.slave.is_some() { 0 } else { 10 };
            console.wait_for_end(Duration::from_secs(limit));
        }
        self.exit_code.unwrap_or(i32::MIN)
    }

    /// Waits until it is over, which must be with this exit code.
    pub fn ends_with(&mut self, code: i32) {
        let got = self.wait();
        assert_eq!(got, code, "the exit code\n{}", self.report());
    }

    /// What a test that fails shows of it.
    pub fn report(&self) -> String {
        let over = self.exit_code.map(|code| format!("over, exit code {code}"));
        let messages = self.messages.as_ref().map(Console::tail).unwrap_or_default();
        format!(
            "--- process {}: {}\n--- the console's last lines:\n{}\n--- Lodge says:\n{messages}\n---",
            self.pid(),
            over.unwrap_or("running".into()),
            self.console.tail(),
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !self.has_ended() {
            // It may end by itself meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
