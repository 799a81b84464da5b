//! The control socket's file: made for one machine, and gone with it.
//!
//! ```text
//!   nothing there                     made
//!   a socket that nobody listens at   replaced: its machine was killed
//!   a socket that somebody listens at refused: that machine runs
//!   anything else                     refused, and stays
//! ```

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use lodge_model::control::place::{Folders, SUFFIX};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::geteuid;

use super::Error;

/// Where the machine `name` has its socket if its spec says nothing; makes the directory.
///
/// # Errors
/// The directory cannot be made, or is not the user's alone.
pub fn default_path(name: &str) -> Result<PathBuf, Error> {
    let uid = geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|path| is_own_folder(path, uid));
    let folder = Folders::new(uid, runtime.as_deref()).own;
    let path = folder.join(format!("{name}{SUFFIX}"));
    match make_folder(&folder, uid) {
        Ok(()) => Ok(path),
        Err(source) => Err(Error::Make { path, source }),
    }
}

fn is_own_folder(path: &Path, uid: u32) -> bool {
    fs::symlink_metadata(path).is_ok_and(|data| data.is_dir() && data.uid() == uid)
}

/// Makes a directory for one user alone. One that is there must be so already: in /tmp anybody could have made it.
fn make_folder(folder: &Path, uid: u32) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let data = fs::symlink_metadata(folder)?;
    let mode = data.permissions().mode() & 0o777;
    let what = if !data.is_dir() {
        "is no directory".to_owned()
    } else if data.uid() != uid {
        format!("belongs to the user {}", data.uid())
    } else if mode & 0o077 != 0 {
        format!("is open to other users (mode {mode:o})")
    } else {
        return Ok(());
    };
    Err(io::Error::other(format!("'{}' {what}", folder.display())))
}

/// The file of a socket at which we listen; it goes when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: another file may have taken its place.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`.
    ///
    /// # Errors
    /// [`Error::InUse`] where somebody listens there, and the host's reasons.
    pub fn claim(path: &Path) -> Result<(UnixListener, Self), Error> {
        let failed = |source| Error::Make { path: path.into(), source };
        // Two machines that find the same dead socket must not remove each other's new one.
        let _lock = lock_folder(path).map_err(failed)?;
        if is_socket(path) {
            if is_live(path).map_err(failed)? {
                return Err(Error::InUse { path: path.into() });
            }
            fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
            // Without a lock, somebody was quicker.
            ErrorKind::AddrInUse if is_socket(path) => Error::InUse { path: path.into() },
            ErrorKind::AddrInUse => failed(io::Error::other("something else is there")),
            _ => failed(error),
        })?;
        let data = fs::symlink_metadata(path).map_err(failed)?;
        let file = Self { path: path.into(), identity: (data.dev(), data.ino()) };
        // Whoever was quick enough to connect before this is looked at by the listener, too.
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        Ok((listener, file))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path).map(|data| (data.dev(), data.ino()));
        if found.is_ok_and(|found| found == self.identity) {
            // It may be gone by now.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A lock on the socket's directory, if it is the user's alone: in others anybody could keep it for ever.
fn lock_folder(path: &Path) -> io::Result<Option<Flock<File>>> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = File::open(parent.unwrap_or(Path::new(".")))?;
    let data = folder.metadata()?;
    if data.uid() != geteuid().as_raw() || data.mode() & 0o077 != 0 {
        return Ok(None);
    }
    let locked = Flock::lock(folder, FlockArg::LockExclusive);
    Ok(Some(locked.map_err(|(_, errno)| io::Error::from(errno))?))
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket())
}

/// Whether somebody listens there. Does not wait for an answer: a machine may be stopped.
fn is_live(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(std::os::fd::AsRawFd::as_raw_fd(&probe), &UnixAddr::new(path)?) {
        // Somebody listens; EAGAIN: and has many waiting.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.sock");
        // Left by a machine that was killed.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (listener, file) = SocketFile::claim(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let busy = SocketFile::claim(&path).unwrap_err();
        assert!(matches!(busy, Error::InUse { .. }), "{busy}");
        drop((listener, file));
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        let error = SocketFile::claim(&path).unwrap_err();
        assert!(matches!(error, Error::Make { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn only_its_own_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.sock");
        let (_listener, file) = SocketFile::claim(&path).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }

    #[test]
    fn one_of_many_gets_a_name_that_a_dead_machine_had() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.sock");
        drop(UnixListener::bind(&path).unwrap());
        let claims: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| SocketFile::claim(&path))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1);
        assert!(
            claims
                .iter()
                .flat_map(|claim| claim.as_ref().err())
                .all(|error| matches!(error, Error::InUse { .. }))
        );
        assert!(is_live(&path).unwrap());
    }

    #[test]
    fn a_folder_that_others_can_enter_is_not_used() {
        let above = tempfile::tempdir().unwrap();
        let uid = geteuid().as_raw();
        let folder = above.path().join("lodge");
        make_folder(&folder, uid).unwrap();
        make_folder(&folder, uid).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(make_folder(&folder, uid + 1).is_err());
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        assert!(make_folder(&folder, uid).unwrap_err().to_string().contains("mode 755"));
        let link = above.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert!(make_folder(&link, uid).unwrap_err().to_string().contains("no directory"));
    }
}
