//! The guests that tests, benchmarks and `cargo xtask up` run: built from recipes, kept in a cache.
//!
//! A recipe is a folder beside this crate with a `build.sh OUT` that fills OUT. What it made is
//! kept under `${LODGE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/lodge}/guests/NAME-HASH`, where HASH is
//! of the recipe's files: a recipe that changes is built anew, one that does not is never.
//!
//! ```text
//! guests/NAME/**  --hash-->  cache/NAME-HASH/        there: done
//!                                   ^
//!                            cache/NAME.partial/     build.sh, then renamed
//!                            cache/NAME.lock          one builder at a time, any process
//! ```
#![forbid(unsafe_code)]

mod hash;

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// A guest that can be built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recipe {
    /// Its folder's name.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Debian packages that its `build.sh` calls.
    pub packages: &'static [&'static str],
    /// Root must build it.
    needs_root: bool,
}

/// All recipes.
pub const RECIPES: [Recipe; 4] = [
    Recipe {
        name: "debian",
        about: "a Debian 12 disk (GPT, boots by BIOS, UEFI and directly), kernel and initrd",
        packages: &[
            "mmdebstrap",
            "fdisk",
            "dosfstools",
            "mtools",
            "e2fsprogs",
            "qemu-utils",
            "python3",
        ],
        needs_root: true,
    },
    Recipe {
        name: "busybox",
        about: "Debian's cloud kernel and a busybox RAM disk: ready at once",
        packages: &["mmdebstrap", "cpio", "kmod"],
        needs_root: false,
    },
    Recipe {
        name: "bench",
        about: "bare guests that run small programs and tell the time",
        packages: &["gcc", "libc6-dev"],
        needs_root: false,
    },
    Recipe {
        name: "linux-6.12",
        about: "a minimal Linux 6.12 for slow KVM hosts (4 minutes to build)",
        packages: &[
            "linux-source-6.12",
            "gcc",
            "libc6-dev",
            "make",
            "flex",
            "bison",
            "bc",
            "cpio",
            "lz4",
            "xz-utils",
            "libelf-dev",
        ],
        needs_root: false,
    },
];

/// Why a guest is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such recipe.
    #[error("there is no guest '{0}': the guests are {names}", names = names())]
    Unknown(String),
    /// A file of the recipe or of the cache could not be handled.
    #[error("cannot {what} '{path}'", path = path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// `build.sh` failed; it has said why.
    #[error(
        "guests/{name}/build.sh failed ({status}): its message is above; `cargo xtask setup` installs what it calls"
    )]
    Build {
        /// The recipe.
        name: &'static str,
        /// How it ended.
        status: ExitStatus,
    },
    /// Neither a cache folder is given nor a home.
    #[error("no folder for the guests is known: set LODGE_CACHE, XDG_CACHE_HOME or HOME")]
    NoCache,
}

fn names() -> String {
    RECIPES.map(|recipe| recipe.name).join(", ")
}

/// Turns an I/O error into one that says what was done to which file.
fn at<T>(what: &'static str, path: &Path, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::File { what, path: path.to_owned(), source })
}

/// The recipe with this name.
///
/// # Errors
/// There is none.
pub fn recipe(name: &str) -> Result<&'static Recipe, Error> {
    RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(|| Error::Unknown(name.to_owned()))
}

/// The folder with the guest called `name`; builds it first if it is not there, which takes
/// minutes, prints what it does to the error output, and needs a Debian mirror.
///
/// # Errors
/// It is unknown or could not be built.
pub fn ready(name: &str) -> Result<PathBuf, Error> {
    recipe(name)?.ready()
}

/// The folder that everything is kept in that Lodge's developers can do without, and make again.
///
/// # Errors
/// No variable says where.
pub fn cache() -> Result<PathBuf, Error> {
    let folder = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("LODGE_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("lodge")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/lodge")))
        .ok_or(Error::NoCache)
}

impl Recipe {
    /// The folder with this guest, see [`ready`].
    ///
    /// # Errors
    /// It could not be built.
    pub fn ready(&'static self) -> Result<PathBuf, Error> {
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR"));
        self.ready_in(&cache()?.join("guests"), recipes)
    }

    fn ready_in(&'static self, cache: &Path, recipes: &Path) -> Result<PathBuf, Error> {
        let hash = self.hash(recipes)?;
        let made = cache.join(format!("{}-{hash:016x}", self.name));
        if made.is_dir() {
            return Ok(made);
        }
        at("make the folder", cache, fs::create_dir_all(cache))?;
        let lock_path = cache.join(format!("{}.lock", self.name));
        let lock = at("open", &lock_path, File::create(&lock_path))?;
        at("lock", &lock_path, lock.lock())?;
        // Another process may have built it while this one waited.
        if made.is_dir() {
            return Ok(made);
        }
        let partial = cache.join(format!("{}.partial", self.name));
        if partial.exists() {
            at("remove", &partial, fs::remove_dir_all(&partial))?;
        }
        at("make the folder", &partial, fs::create_dir(&partial))?;
        self.build(recipes, &partial)?;
        at("rename", &partial, fs::rename(&partial, &made))?;
        Ok(made)
    }

    /// The hash of everything that decides what is built.
    fn hash(&self, recipes: &Path) -> Result<u64, Error> {
        let mut hash = hash::Hash::new();
        hash.tree(&recipes.join(self.name))?;
        hash.tree(&recipes.join("mirror.sh"))?;
        Ok(hash.finish())
    }

    fn build(&'static self, recipes: &Path, out: &Path) -> Result<(), Error> {
        let script = recipes.join(self.name).join("build.sh");
        let sudo = self.needs_root && !is_root();
        let mut command = match sudo {
            true => {
                eprintln!("guests/{}: needs root: calling sudo", self.name);
                let mut command = Command::new("sudo");
                command.arg("--preserve-env=LODGE_MIRROR").arg(&script);
                command
            }
            false => Command::new(&script),
        };
        command.arg(out).stdin(Stdio::null());
        // What the script prints is for the one who waits, not part of a caller's output.
        command.stdout(io::stderr());
        let status = at("run", &script, command.status())?;
        if !status.success() {
            return Err(Error::Build { name: self.name, status });
        }
        if sudo {
            self.own(out)?;
        }
        Ok(())
    }

    /// Gives what root made to the user.
    fn own(&'static self, out: &Path) -> Result<(), Error> {
        use std::os::unix::fs::MetadataExt;
        let meta = at("look at", out, fs::metadata(out))?;
        let owner = format!("{}:{}", meta.uid(), meta.gid());
        let mut chown = Command::new("sudo");
        chown.args(["chown", "-R", &owner]).arg(out);
        let status = at("give away", out, chown.status())?;
        if status.success() { Ok(()) } else { Err(Error::Build { name: self.name, status }) }
    }
}

/// Whether this process is root's: /proc/self is the effective user's.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    static TEST: Recipe = Recipe { name: "te.st", about: "", packages: &[], needs_root: false };

    fn write_script(recipes: &Path, script: &str) {
        let folder = recipes.join("te.st");
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("build.sh");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(recipes.join("mirror.sh"), "").unwrap();
    }

    #[test]
    fn a_recipe_is_built_once_until_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, recipes) = (folder.path().join("cache"), folder.path().join("recipes"));
        let log = folder.path().join("log");
        write_script(&recipes, &format!("echo built >> {}; touch $1/disk", log.display()));
        let first = TEST.ready_in(&cache, &recipes).unwrap();
        assert!(first.join("disk").is_file());
        assert_eq!(TEST.ready_in(&cache, &recipes).unwrap(), first);
        assert_eq!(fs::read_to_string(&log).unwrap(), "built\n");
        write_script(&recipes, "touch $1/other");
        let second = TEST.ready_in(&cache, &recipes).unwrap();
        assert_ne!(first, second);
        assert!(second.join("other").is_file());
    }

    #[test]
    fn a_failed_build_leaves_no_guest_and_can_be_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, recipes) = (folder.path().join("cache"), folder.path().join("recipes"));
        let flag = folder.path().join("flag");
        write_script(&recipes, &format!("touch $1/half; [ -e {} ]", flag.display()));
        for _ in 0..2 {
            let error = TEST.ready_in(&cache, &recipes).unwrap_err();
            assert!(matches!(error, Error::Build { .. }), "{error}");
        }
        fs::write(&flag, "").unwrap();
        assert!(TEST.ready_in(&cache, &recipes).unwrap().join("half").is_file());
    }

    #[test]
    fn every_recipe_has_its_script() {
        for recipe in RECIPES {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(recipe.name);
            let mode = fs::metadata(folder.join("build.sh")).unwrap().permissions().mode();
            assert_eq!(mode & 0o111, 0o111, "{}", recipe.name);
        }
        assert!(recipe("debian12").unwrap_err().to_string().contains("debian, busybox"));
    }
}
