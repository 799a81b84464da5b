//! Keeps two machines from one writable image, with the kernel's open-file-description locks.
//!
//! A writer locks the whole file exclusively. A reader takes shared locks on single bytes:
//!
//! ```text
//! byte   0     every reader of ours: collides with a writer's exclusive lock
//! byte 100     "I read and want it consistent"  \
//! byte 201     "nobody else may write"           > bytes by which QEMU's tools agree on sharing
//! byte 203     "nobody else may resize"         /
//! ```
//!
//! so that `qemu-img` can read an image that machines only read, and refuses one that is written. The
//! locks belong to the open file: they go with its last descriptor, however the process ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// The bytes that a reader locks.
const READER_BYTES: [i64; 4] = [0, 100, 201, 203];
/// The bytes that QEMU's writers (101) and resizers (103) hold.
const FOREIGN_WRITER_BYTES: [i64; 2] = [101, 103];

/// How long a lock is waited for that no process holds. When a process is killed, the kernel lets go of the files in its
/// io_uring a little later than the process is gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes the lock for reading or for writing.
///
/// # Errors
/// [`Error::Locked`], naming the holder if it can be found. On file systems that know no such
/// locks there is a warning in the log, and no protection.
pub(crate) fn acquire(file: &File, path: &Path, read_only: bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let taken = loop {
        let taken = try_acquire(file, read_only);
        let busy = matches!(&taken, Err(e) if is_busy(e));
        if !busy || Instant::now() > end || find_holder(file).is_some() {
            break taken;
        }
        thread::sleep(Duration::from_millis(10));
    };
    match taken {
        Ok(()) => Ok(()),
        Err(e) if is_busy(&e) => {
            Err(Error::Locked { path: path.to_owned(), pid: find_holder(file), read_only })
        }
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS)
            ) =>
        {
            tracing::warn!(path = %path.display(), error = %e,
                "the file system has no locks: nothing keeps another machine from this disk");
            Ok(())
        }
        Err(source) => Err(Error::Io { action: "lock", path: path.to_owned(), source }),
    }
}

fn try_acquire(file: &File, read_only: bool) -> io::Result<()> {
    if !read_only {
        return lock(file, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0).map(drop);
    }
    READER_BYTES
        .iter()
        .try_for_each(|&byte| lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1).map(drop))
        .and_then(|()| foreign_writers(file))
}

fn is_busy(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Fails with `EAGAIN` when a process that locks as QEMU does has the image open for writing.
fn foreign_writers(file: &File) -> io::Result<()> {
    for byte in FOREIGN_WRITER_BYTES {
        let found = lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
        if found.l_type != libc::F_UNLCK as libc::c_short {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
    }
    Ok(())
}

fn lock(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    len: i64,
) -> io::Result<libc::flock> {
    // SAFETY: `flock` is plain numbers, for which zeroes are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    // SAFETY: the descriptor is open, and `lock` is valid for the kernel to read and write.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock),
    }
}

/// Looks for a process that has the file open and a lock on it. The kernel does not tell who holds such a lock, but
/// each descriptor's `fdinfo` lists those taken through it.
fn find_holder(file: &File) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for fd in descriptors.flatten() {
            if pid == std::process::id()
                && fd.file_name().to_str() == Some(&file.as_raw_fd().to_string())
            {
                continue;
            }
            let same = fs::metadata(fd.path())
                .is_ok_and(|m| m.dev() == wanted.dev() && m.ino() == wanted.ino());
            let info = process.path().join("fdinfo").join(fd.file_name());
            if same && fs::read_to_string(info).is_ok_and(|text| text.contains("\nlock:")) {
                return Some(pid);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::Command;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn writers_exclude_everybody_and_readers_only_writers() {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("a.img");
        fs::write(&path, [0; 512]).unwrap();
        let (one, two, three) = (open(&path), open(&path), open(&path));
        acquire(&one, &path, true).unwrap();
        acquire(&two, &path, true).unwrap();
        assert!(matches!(acquire(&three, &path, false), Err(Error::Locked { .. })));
        drop((one, two));
        acquire(&three, &path, false).unwrap();
        let four = open(&path);
        for read_only in [true, false] {
            match acquire(&four, &path, read_only) {
                Err(Error::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn qemu_img_understands_our_locks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        fs::write(&path, [0; 65536]).unwrap();
        let qemu_io = |command: &str| {
            let out =
                Command::new("qemu-io").args(["-f", "raw"]).args(mode(command)).arg(&path).output();
            out.expect("this test needs qemu-io (Debian: qemu-utils)").status.success()
        };
        let file = open(&path);
        acquire(&file, &path, true).unwrap();
        assert!(qemu_io("read 0 512"), "an image that is only read may be read");
        assert!(!qemu_io("write 0 512"), "but not written");
        drop(file);
        let file = open(&path);
        acquire(&file, &path, false).unwrap();
        assert!(!qemu_io("read 0 512"), "an image that is written may not be read");
        assert!(!qemu_io("write 0 512"));
    }

    /// What qemu-io wants for a command; only those that read open the image for reading.
    fn mode(command: &str) -> Vec<&str> {
        match command.starts_with("read") {
            true => vec!["-r", "-c", command],
            false => vec!["-c", command],
        }
    }
}
