//! A `lodge run` that is being put together.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::pty::openpty;

use crate::guest::{Guest, Terminal};
use crate::host;

/// `nobody` of Debian: a user without rights.
const NOBODY: u32 = 65534;

/// The flags of a `lodge run`, and around them what it is started in.
#[derive(Clone)]
pub struct Run {
    args: Vec<OsString>,
    /// The kernel's command line, a word or more each.
    cmdline: Vec<String>,
    terminal: bool,
    nobody: bool,
    path: Option<PathBuf>,
    runtime: Option<PathBuf>,
}

impl Run {
    /// No flags at all.
    pub fn new() -> Self {
        Self {
            args: Vec::new(),
            cmdline: Vec::new(),
            terminal: false,
            nobody: false,
            path: None,
            runtime: None,
        }
    }

    /// The busybox guest on the software CPU: 256 MiB, and a shell on the console unless
    /// [`Self::commands`] says what to do instead.
    pub fn busybox() -> Self {
        let guest = host::guest("busybox");
        Self::linux(&guest.join("vmlinuz"), &guest.join("initrd.img"))
            .args(["--memory", "256M"])
            .cmdline("quiet")
    }

    /// The Debian guest with this copy of its disk.
    pub fn debian(disk: &Path) -> Self {
        let guest = host::guest("debian");
        Self::linux(&guest.join("vmlinuz"), &guest.join("initrd.img"))
            .args(["--memory", "1G"])
            .cmdline("root=LABEL=lodge-root ro")
            .disk(disk, "")
    }

    /// A Linux on the software CPU with its console on the serial port.
    pub fn linux(kernel: &Path, initrd: &Path) -> Self {
        let run = Self::kernel(kernel).arg("--initrd").arg(initrd);
        run.cmdline("console=ttyS0")
    }

    /// Any kernel on the software CPU.
    pub fn kernel(kernel: &Path) -> Self {
        Self::new().args(["--accel", "soft", "--kernel"]).arg(kernel)
    }

    /// One more word of the command line of `lodge run`.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// More words.
    pub fn args<const N: usize>(self, args: [&str; N]) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// The number of vCPUs.
    pub fn cpus(self, cpus: u32) -> Self {
        self.arg("--cpus").arg(cpus.to_string())
    }

    /// A disk, with more keys such as `,readonly`.
    pub fn disk(self, path: &Path, keys: &str) -> Self {
        let mut value = path.as_os_str().to_owned();
        value.push(keys);
        self.arg("--disk").arg(value)
    }

    /// More words for the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline.push(words.to_owned());
        self
    }

    /// What the busybox guest runs in place of a shell before it powers off; no double quotes.
    /// The exit status is in its console: `LODGE-RUN-EXIT=0`.
    pub fn commands(self, commands: &str) -> Self {
        assert!(!commands.contains('"'), "the guest's init ends the commands at a double quote");
        self.cmdline(&format!("lodge.run=\"{commands}\""))
    }

    /// In a terminal of its own, with both outputs there; otherwise in pipes.
    pub fn in_terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    /// As a user without rights; needs root.
    pub fn as_nobody(mut self) -> Self {
        self.nobody = true;
        self
    }

    /// With this PATH.
    pub fn with_path(mut self, path: &Path) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// With this runtime directory: its control socket is in it.
    pub fn with_runtime(mut self, path: &Path) -> Self {
        self.runtime = Some(path.to_owned());
        self
    }

    /// The whole command, not started.
    pub fn command(&self) -> Command {
        let mut command = Command::new(host::lodge());
        command.arg("run").args(&self.args);
        if !self.cmdline.is_empty() {
            command.arg("--cmdline").arg(self.cmdline.join(" "));
        }
        if self.nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        match &self.runtime {
            Some(path) => command.env("XDG_RUNTIME_DIR", path),
            None if self.nobody => command.env_remove("XDG_RUNTIME_DIR"),
            None => command.env("XDG_RUNTIME_DIR", host::runtime()),
        };
        command
    }

    /// Starts it.
    pub fn start(&self) -> Guest {
        let mut command = self.command();
        if !self.terminal {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            return Guest::start(command, None);
        }
        let pair = openpty(None, None).expect("the host has a pseudo terminal to give");
        let ours = || File::from(pair.master.as_fd().try_clone_to_owned().expect("a descriptor"));
        let slave = || Stdio::from(pair.slave.try_clone().expect("a descriptor"));
        command.stdin(slave()).stdout(slave()).stderr(slave());
        let (input, output) = (ours(), ours());
        Guest::start(command, Some(Terminal { slave: pair.slave, input, output }))
    }

    /// Runs it to its end, which must be an error with this exit code; gives its message. It
    /// reads nothing.
    pub fn refused(&self, code: i32) -> String {
        let mut guest = self.start();
        guest.close_input();
        let got = guest.wait();
        let message = guest.messages();
        assert_eq!(got, code, "the exit code; it said:\n{message}\n{}", guest.text());
        host::assert_no_panic(&message);
        message
    }
}

impl Default for Run {
    fn default() -> Self {
        Self::new()
    }
}
