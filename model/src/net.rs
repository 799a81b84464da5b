//! Small values of network cards: MAC addresses and port forwards.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An Ethernet address, `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MacAddr(pub [u8; 6]);

/// Why a text is not what it should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// Not six bytes in hexadecimal.
    #[error("'{0}' is not a MAC address: write six bytes in hexadecimal, as in 52:54:00:12:34:56")]
    Mac(String),
    /// Not a forward.
    #[error("'{0}' is not a port forward: write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], as in 2222:22")]
    Forward(String),
}

impl MacAddr {
    /// Whether it names one card: not a group (multicast or broadcast) and not all zero.
    pub fn is_usable(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::Mac(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

/// What a forwarded port carries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Protocol {
    /// TCP connections.
    #[default]
    Tcp,
    /// UDP datagrams.
    Udp,
}

/// A port of the host that leads to a port of the guest: `[ADDRESS:]HOSTPORT:GUESTPORT[/udp]`.
///
/// Without an address only programs on the same host can reach it (127.0.0.1); `0.0.0.0:80:80`
/// lets everybody in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PortForward {
    /// The address of the host to listen on.
    pub address: IpAddr,
    /// The port of the host.
    pub host: u16,
    /// The port of the guest.
    pub guest: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

impl PortForward {
    /// A TCP port of the loopback address that leads to a port of the guest.
    pub const fn tcp(host: u16, guest: u16) -> Self {
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self { address, host, guest, protocol: Protocol::Tcp }
    }
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(Ipv4Addr::LOCALHOST) => {}
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        write!(f, "{}:{}", self.host, self.guest)?;
        if self.protocol == Protocol::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

impl FromStr for PortForward {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::Forward(text.into());
        let (rest, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(bad()),
        };
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(bad)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
            Some((address, host)) => {
                let v6 = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let address = match v6 {
                    Some(address) => IpAddr::V6(address.parse().map_err(|_| bad())?),
                    None => IpAddr::V4(address.parse().map_err(|_| bad())?),
                };
                (address, host)
            }
        };
        let port = |text: &str| match text.parse() {
            Ok(0) | Err(_) => Err(bad()),
            Ok(port) => Ok(port),
        };
        Ok(Self { address, host: port(host)?, guest: port(guest)?, protocol })
    }
}

/// Serde and schema for a value that is written as a text.
macro_rules! text_value {
    ($type:ty, $name:literal, $expecting:literal, $example:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "title": $name, "examples": [$example] })
            }
        }
    };
}

text_value!(MacAddr, "MAC address", "a MAC address", "52:54:00:12:34:56");
text_value!(PortForward, "port forward", "a port forward", "2222:22");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mac_addresses() {
        let mac: MacAddr = "52:54:00:AB:cd:ef".parse().unwrap();
        assert_eq!(mac, MacAddr([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        assert!(mac.is_usable());
        assert!(!MacAddr([0; 6]).is_usable());
        assert!(!"01:00:5e:00:00:01".parse::<MacAddr>().unwrap().is_usable());
        for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:ef:00", "52:54:00:ab:cd:+f", "5254:00"] {
            assert_eq!(bad.parse::<MacAddr>(), Err(ParseError::Mac(bad.into())));
        }
    }

    #[test]
    fn port_forwards() {
        assert_eq!("2222:22".parse(), Ok(PortForward::tcp(2222, 22)));
        let all: PortForward = "0.0.0.0:53:5353/udp".parse().unwrap();
        assert_eq!(all.address, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        assert_eq!((all.host, all.guest, all.protocol), (53, 5353, Protocol::Udp));
        for good in ["2222:22", "0.0.0.0:80:80", "[::]:80:80/udp", "[::1]:1:65535"] {
            assert_eq!(good.parse::<PortForward>().unwrap().to_string(), good);
        }
        for bad in ["", "22", ":22", "22:", "0:22", "22:0", "1:65536", "x:1:2", "::1:1:2", "1:2/x"]
        {
            assert_eq!(bad.parse::<PortForward>(), Err(ParseError::Forward(bad.into())));
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[0-9a-f:./\\[\\]u]{0,24}") {
            let _ = text.parse::<MacAddr>();
            if let Ok(forward) = text.parse::<PortForward>() {
                prop_assert_eq!(forward.to_string().parse(), Ok(forward));
            }
        }
    }
}
