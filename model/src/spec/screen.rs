//! The display: what the guest has, and who sees it.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The display that the guest finds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Video {
    /// No display.
    None,
    /// A VGA that every system knows, up to 2560x1600.
    Vga,
    /// The same, with a virtio GPU that follows the size of its viewer, for systems that have a driver.
    Virtio,
}

impl fmt::Display for Video {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Vga => "vga",
            Self::Virtio => "virtio",
        })
    }
}

/// Who sees the display.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Display {
    /// Nobody; screenshots can be taken.
    #[default]
    None,
    /// VNC viewers. On the command line
    /// `vnc=ADDRESS:PORT` or `vnc=unix:PATH`, then `[,password-file=F][,tls-cert=F,tls-key=F]`.
    Vnc(Vnc),
}

/// A VNC server.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Vnc {
    /// Where it listens: `ADDRESS:PORT` (port 0 takes a free one and tells it), or `unix:PATH`.
    pub listen: VncAddress,
    /// A file whose first line is the password that viewers must give. VNC looks at its first 8 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// The certificate (PEM) for TLS; needs `tls-key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// The key (PEM) of the certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
}

/// Where a VNC server listens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum VncAddress {
    /// An address and a port of the host.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// A text that is no address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{0}' is no place to listen: give ADDRESS:PORT, such as 127.0.0.1:5901, or unix:PATH")]
pub struct BadVncAddress(String);

impl FromStr for VncAddress {
    type Err = BadVncAddress;

    fn from_str(text: &str) -> Result<Self, BadVncAddress> {
        match text.strip_prefix("unix:") {
            Some("") => Err(BadVncAddress(text.into())),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|_| BadVncAddress(text.into())),
        }
    }
}

impl TryFrom<String> for VncAddress {
    type Error = BadVncAddress;

    fn try_from(text: String) -> Result<Self, BadVncAddress> {
        text.parse()
    }
}

impl From<VncAddress> for String {
    fn from(address: VncAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for VncAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyvalue;

    #[test]
    fn displays_on_the_command_line() {
        assert_eq!(keyvalue::from_str::<Display>("none").unwrap(), Display::None);
        let Display::Vnc(vnc) =
            keyvalue::from_str("vnc=[::1]:0,password-file=/p,tls-cert=/c,tls-key=/k").unwrap()
        else {
            panic!("a VNC server")
        };
        assert_eq!(vnc.listen, VncAddress::Tcp("[::1]:0".parse().unwrap()));
        assert_eq!(vnc.password_file, Some("/p".into()));
        let Display::Vnc(vnc) = keyvalue::from_str("vnc=unix:/run/x").unwrap() else {
            panic!("a VNC server")
        };
        assert_eq!(vnc.listen.to_string(), "unix:/run/x");
        for bad in ["vnc=:1", "vnc=5901", "vnc=unix:", "vnc=localhost:1", "vnc"] {
            assert!(keyvalue::from_str::<Display>(bad).is_err(), "{bad}");
        }
    }
}
