//! Hands a spec to `lodge-vmm` and becomes it.
//!
//! The spec goes as JSON in an anonymous file that the new program inherits (`--spec-fd N`): no
//! temporary file to clean up, no limit on its size, and nothing of it in `ps`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use lodge_model::spec::MachineSpec;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::failure::Failure;

const VMM: &str = "lodge-vmm";

/// Becomes the `lodge-vmm` of this machine; returns only to say why it could not.
pub fn take_over(spec: &MachineSpec) -> Failure {
    let Some(program) = find(env::current_exe().ok().as_deref(), env::var_os("PATH")) else {
        return Failure::failed(
            format!("cannot start the machine: the program {VMM} is not installed"),
            format!("put {VMM} beside lodge or into a directory of PATH"),
        );
    };
    let file = match spec_file(spec) {
        Ok(file) => file,
        Err(error) => {
            return Failure::failed(
                format!("cannot hand the machine's spec to {VMM}: {error}"),
                "a path that is not UTF-8 cannot be handed over: rename it",
            );
        }
    };
    let fd = file.as_raw_fd().to_string();
    let error = Command::new(&program).args(["--spec-fd", &fd]).exec();
    Failure::failed(
        format!("cannot start '{}': {error}", program.display()),
        "check that it is a program for this host and that you may execute it",
    )
}

/// The spec as JSON in an anonymous file that survives exec, at its start.
fn spec_file(spec: &MachineSpec) -> io::Result<File> {
    let json = serde_json::to_vec(spec)?;
    // Without MFD_CLOEXEC, as it is for the program that comes.
    let mut file = File::from(memfd_create(c"lodge-spec", MFdFlags::empty())?);
    file.write_all(&json)?;
    file.rewind()?;
    Ok(file)
}

/// `lodge-vmm` beside this program, or else in the PATH.
fn find(this: Option<&Path>, path: Option<OsString>) -> Option<PathBuf> {
    let beside = this.and_then(Path::parent).map(Path::to_owned);
    let path = path.unwrap_or_default();
    let folders = beside.into_iter().chain(env::split_paths(&path));
    folders.map(|folder| folder.join(VMM)).find(|program| is_program(program))
}

/// Whether there is a file that somebody may execute.
pub fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;

    #[test]
    fn beside_first_then_path() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| {
            let sub = folder.path().join(name);
            fs::create_dir(&sub).unwrap();
            sub
        });
        let program = |folder: &Path, mode| {
            let path = folder.join(VMM);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let this = a.join("lodge");
        let path = env::join_paths([&b, &c]).unwrap();
        let found = || find(Some(&this), Some(path.clone()));
        assert_eq!(found(), None);
        program(&c, 0o755);
        program(&b, 0o644);
        assert_eq!(found(), Some(c.join(VMM)), "a file without x is no program");
        program(&a, 0o755);
        assert_eq!(found(), Some(a.join(VMM)));
        assert_eq!(find(None, None), None);
    }

    #[test]
    fn the_file_holds_the_spec_from_its_start() {
        let spec = MachineSpec { cpus: 3, ..MachineSpec::default() };
        let mut text = String::new();
        spec_file(&spec).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec);
    }
}
