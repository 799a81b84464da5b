//! Sees that passt ends with this process, however this one ends.
//!
//! Passt ends by itself when its socket is closed, but not while it is busy sending: Debian 12's goes on trying for ever
//! if its peer was killed then. A death signal of the kernel's is no help, as it is cleared when passt changes its user.
//! So a shell waits at a pipe whose other end only this process holds.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

/// `$0` is passt's process; its name is looked at, in case the number belongs to another process by then.
const SCRIPT: &str = "read -r _; \
                      case $(cat /proc/$0/comm 2>/dev/null) in passt*) kill -KILL $0;; esac";

/// The shell. Dropping it ends it, without harm to passt.
#[derive(Debug)]
pub(super) struct Guard {
    shell: Child,
    /// Open for as long as this process lives.
    _pipe: Option<ChildStdin>,
}

impl Guard {
    /// Guards process `passt`, a child of this one that nobody has waited for yet.
    pub(super) fn new(passt: u32) -> io::Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, &passt.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C at our terminal is not for it.
            .process_group(0)
            .spawn()?;
        let pipe = shell.stdin.take();
        Ok(Self { shell, _pipe: pipe })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It fails only for a process that ended meanwhile.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::{Duration, Instant};

    fn named(name: &str) -> (tempfile::TempDir, Child) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join(name);
        fs::copy("/bin/sleep", &program).unwrap();
        let child = Command::new(program).arg("1000").spawn().unwrap();
        (folder, child)
    }

    fn ends(child: &mut Child, within: Duration) -> bool {
        let end = Instant::now() + within;
        while Instant::now() < end {
            if child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    #[test]
    fn passt_ends_when_the_pipe_does_and_not_when_the_guard_is_dropped() {
        let (_folder, mut passt) = named("passt.avx2");
        drop(Guard::new(passt.id()).unwrap());
        assert!(!ends(&mut passt, Duration::from_millis(200)));
        let mut guard = Guard::new(passt.id()).unwrap();
        guard._pipe = None;
        assert!(ends(&mut passt, Duration::from_secs(30)));
    }

    #[test]
    fn a_process_of_another_name_is_left_alone() {
        let (_folder, mut other) = named("other");
        let mut guard = Guard::new(other.id()).unwrap();
        guard._pipe = None;
        guard.shell.wait().unwrap();
        assert!(!ends(&mut other, Duration::from_millis(200)));
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
