//! Where a machine's control socket is.
//!
//! ```text
//!   the user's runtime directory   $XDG_RUNTIME_DIR/lodge/NAME.sock   (if it is there, and the user's own)
//!   root                           /run/lodge/NAME.sock
//!   everybody else                 /tmp/lodge-UID/NAME.sock
//! ```
//!
//! Machines take the first that there is. Those who look for machines look everywhere, as a session without a runtime
//! directory (cron, su) asks for the same machines.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use crate::spec::{DEFAULT_NAME, MachineSpec};

/// Where to listen for `lodge ctl`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub enum ControlPlace {
    /// Nowhere.
    None,
    /// A Unix socket.
    Path(PathBuf),
}

/// A text that is no place.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an empty path is no place for a control socket: give a path, or none")]
pub struct BadControlPlace;

impl FromStr for ControlPlace {
    type Err = BadControlPlace;

    fn from_str(text: &str) -> Result<Self, BadControlPlace> {
        match text {
            "" => Err(BadControlPlace),
            "none" => Ok(Self::None),
            path => Ok(Self::Path(path.into())),
        }
    }
}

impl TryFrom<String> for ControlPlace {
    type Error = BadControlPlace;

    fn try_from(text: String) -> Result<Self, BadControlPlace> {
        text.parse()
    }
}

impl Serialize for ControlPlace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_str("none"),
            Self::Path(path) => path.serialize(serializer),
        }
    }
}

impl fmt::Display for ControlPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// The directories of one user's control sockets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Folders {
    /// Where machines of this session put theirs.
    pub own: PathBuf,
    /// Where else those of other sessions may be.
    pub others: Vec<PathBuf>,
}

impl Folders {
    /// The directories of the user `uid`. `runtime` is `$XDG_RUNTIME_DIR` if it is a directory of that user; a variable
    /// that another user's session has left must not count.
    pub fn new(uid: u32, runtime: Option<&Path>) -> Self {
        let runtime = runtime.filter(|path| path.is_absolute()).map(|path| path.join("lodge"));
        let fixed = match uid {
            0 => PathBuf::from("/run/lodge"),
            uid => format!("/tmp/lodge-{uid}").into(),
        };
        let own = runtime.unwrap_or_else(|| fixed.clone());
        // Where systemd's logind makes the runtime directory.
        let usual = PathBuf::from(format!("/run/user/{uid}/lodge"));
        let others = [usual, fixed].into_iter().filter(|path| *path != own).collect();
        Self { own, others }
    }

    /// Everywhere, [`Self::own`] first.
    pub fn all(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(&self.own).chain(&self.others).map(PathBuf::as_path)
    }
}

/// The end of a socket's name.
pub const SUFFIX: &str = ".sock";

/// The name under which a machine is asked for: its own, or one with the process's number if it was given none, as
/// any number of such machines run side by side.
pub fn control_name(spec: &MachineSpec, pid: u32) -> String {
    if spec.name == DEFAULT_NAME { format!("{DEFAULT_NAME}-{pid}") } else { spec.name.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_a_user_find_each_others_machines() {
        let with = Folders::new(1000, Some(Path::new("/run/user/1000")));
        assert_eq!(with.own, Path::new("/run/user/1000/lodge"));
        let without = Folders::new(1000, None);
        assert_eq!(without.own, Path::new("/tmp/lodge-1000"));
        assert!(with.all().any(|path| path == without.own));
        assert!(without.all().any(|path| path == with.own));
        let root = Folders::new(0, Some(Path::new("relative")));
        assert_eq!(root.own, Path::new("/run/lodge"));
        assert_eq!(root.all().count(), 2);
    }

    #[test]
    fn machines_without_a_name_get_one() {
        let mut spec = MachineSpec::default();
        assert_eq!(control_name(&spec, 7), "guest-7");
        spec.name = "web".into();
        assert_eq!(control_name(&spec, 7), "web");
    }

    #[test]
    fn places_are_read_and_written() {
        for (text, place) in [
            ("none", ControlPlace::None),
            ("./none", ControlPlace::Path("./none".into())),
            ("/run/x.sock", ControlPlace::Path("/run/x.sock".into())),
        ] {
            assert_eq!(text.parse(), Ok(place.clone()));
            assert_eq!(place.to_string(), text);
            let json = serde_json::to_string(&place).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<ControlPlace>(&json).unwrap(), place);
        }
        assert!("".parse::<ControlPlace>().is_err());
    }
}
