//! A shell on a guest's console.

use crate::guest::Guest;

/// What a command printed (both outputs), and how it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// The exit status.
    pub status: i32,
    /// What it printed.
    pub text: String,
}

impl Guest {
    /// Waits for the busybox guest's shell.
    pub fn busybox_shell(&mut self) {
        self.expect("LODGE-GUEST-READY");
        self.expect(" # ");
    }

    /// Logs in as root on the Debian guest's console and makes the shell a plain one.
    pub fn debian_login(&mut self) {
        self.expect(" login: ");
        self.send("root\n");
        self.expect("assword: ");
        self.send("root\n");
        self.expect(":~# ");
        // No line editing, no colours, no pager; the kernel keeps to itself.
        self.send("export TERM=dumb PAGER=cat; bind 'set enable-bracketed-paste off'; dmesg -n 1; PS1=; echo RE''ADY\n");
        self.expect("READY");
    }

    /// Runs a command, one line of at most some 900 bytes, in the shell.
    pub fn run(&mut self, command: &str) -> Output {
        // All in one line, so that no prompt and no echo comes between. The terminal echoes what is typed: the marks
        // look different there.
        let quoted = command.replace('\'', "'\\''");
        self.send(&format!(
            "printf 'LODGE-%s\\n' BEGIN; eval '{quoted}'; printf 'LODGE-%s=%s;\\n' END $?\n"
        ));
        self.expect("LODGE-BEGIN\n");
        let text = self.expect("LODGE-END=");
        let status = self.expect(";");
        let status = status.parse();
        let status =
            status.unwrap_or_else(|_| panic!("no status of '{command}'\n{}", self.report()));
        Output { status, text }
    }

    /// Runs a command that must succeed; gives what it printed.
    pub fn ok(&mut self, command: &str) -> String {
        let output = self.run(command);
        assert_eq!(output.status, 0, "the guest's '{command}' printed:\n{}", output.text);
        output.text
    }

    /// Has the guest power itself off; the program must end with exit code 0.
    pub fn power_off(mut self, command: &str) -> Self {
        self.send(&format!("{command}\n"));
        self.ends_with(0);
        self
    }
}
