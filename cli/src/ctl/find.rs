//! Which machines run: those whose control sockets are in the user's directories.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, io};

use lodge_model::control::place::{Folders, SUFFIX};
use lodge_model::control::{Request, Status};
use lodge_model::spec::DEFAULT_NAME;
use nix::unistd::geteuid;

use super::client::Client;

/// For a machine in a list.
const PATIENCE: Duration = Duration::from_secs(2);

/// A machine that runs.
pub struct Found {
    /// What its socket is called.
    pub name: String,
    /// Its control socket.
    pub path: PathBuf,
    /// What it is, or why it does not say.
    pub status: Result<Status, String>,
}

/// All machines of this user that run and that are where they are looked for, by name. What machines that were killed
/// have left is not among them.
pub fn machines() -> Vec<Found> {
    let uid = geteuid().as_raw();
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|path| is_own(path, uid));
    let mut found = Vec::new();
    for folder in Folders::new(uid, runtime.as_deref()).all() {
        // In /tmp anybody may have made it.
        if is_own(folder, uid) {
            found.extend(in_folder(folder));
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn is_own(folder: &Path, uid: u32) -> bool {
    fs::symlink_metadata(folder).is_ok_and(|data| data.is_dir() && data.uid() == uid)
}

fn in_folder(folder: &Path) -> Vec<Found> {
    // A directory that went meanwhile has no machines.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sockets = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some((name.strip_suffix(SUFFIX)?.to_owned(), entry.path()))
    });
    sockets
        .filter_map(|(name, path)| {
            let status = status(&path).transpose()?.map_err(|error| error.to_string());
            Some(Found { name, path, status })
        })
        .collect()
}

/// What the machine says of itself; nothing if nobody listens there.
fn status(path: &Path) -> io::Result<Option<Status>> {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    let mut client = match Client::connect(path) {
        Err(error) if matches!(error.kind(), ConnectionRefused | NotFound) => return Ok(None),
        connected => connected?,
    };
    client.wait_at_most(PATIENCE)?;
    let answer = client.ask(&Request::Status)?.map_err(io::Error::other)?;
    Ok(Some(serde_json::from_value(answer)?))
}

/// The socket that `name` means: a path if it has a slash, else that of a machine that runs. The name of those that were
/// given none stands for the one such machine.
pub fn socket_of(name: &OsStr, found: &[Found]) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let exact = found.iter().find(|found| OsString::from(&found.name) == name);
    if let Some(found) = exact {
        return Some(found.path.clone());
    }
    let mut unnamed = found.iter().filter(|found| {
        let number = found.name.strip_prefix(DEFAULT_NAME).and_then(|rest| rest.strip_prefix('-'));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    });
    match (unnamed.next(), unnamed.next()) {
        (Some(one), None) if name == DEFAULT_NAME => Some(one.path.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn found(name: &str) -> Found {
        Found { name: name.into(), path: format!("/{name}").into(), status: Err(String::new()) }
    }

    #[test]
    fn names_and_paths() {
        let machines = [found("guest-12"), found("web"), found("guest-x")];
        let socket = |name: &str| socket_of(name.as_ref(), &machines);
        assert_eq!(socket("web"), Some("/web".into()));
        assert_eq!(socket("./x.sock"), Some("./x.sock".into()));
        assert_eq!(socket("guest"), Some("/guest-12".into()));
        assert_eq!(socket("we"), None);
        let two = [found("guest-12"), found("guest-13")];
        assert!(socket_of("guest".as_ref(), &two).is_none());
    }

    #[test]
    fn the_dead_are_not_found_and_the_silent_are() {
        let folder = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(folder.path().join("dead.sock")).unwrap());
        fs::write(folder.path().join("file.sock"), "").unwrap();
        fs::write(folder.path().join("other"), "").unwrap();
        let _silent = UnixListener::bind(folder.path().join("silent.sock")).unwrap();
        let found = in_folder(folder.path());
        let names: Vec<_> = found.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, ["silent"]);
        assert!(found[0].status.is_err());
    }
}
