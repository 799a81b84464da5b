//! The beginning of a connection: its version and who the client is (RFC 6143, sections 7.1 and 7.2; rfbproto,
//! VeNCrypt).
//!
//! ```text
//!   server                          client
//!   RFB 003.008            ------>
//!                          <------  RFB 003.003, .007 or .008
//!   security type          ------>
//!                          <------  the same (not in 3.3)
//!   [VeNCrypt 0.2, X509None or X509Vnc, TLS]
//!   [challenge             ------>
//!                          <------  challenge, encrypted by DES with the password]
//!   result                 ------>  (3.8; in 3.3 and 3.7 only after a password)
//! ```
//!
//! One type is offered, by what the server was told:
//!
//! | certificate | password | type |
//! | --- | --- | --- |
//! | no | no | None |
//! | no | yes | VNC Authentication |
//! | yes | no | VeNCrypt, X509None |
//! | yes | yes | VeNCrypt, X509Vnc |
//!
//! VeNCrypt's TLSNone and TLSVnc are not offered: they need anonymous key exchange, which gives no protection against
//! somebody between, is gone from TLS 1.3, and rustls does not have. Clients of version 3.3 cannot use VeNCrypt.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};
use rustls::ServerConfig;

use super::peer::Peer;

/// What a program needs at most for all that it does by itself.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// What a person needs at most to type a password.
const PASSWORD: Duration = Duration::from_secs(120);
/// A wrong password is answered so late.
const PENALTY: Duration = Duration::from_secs(1);

const NONE: u8 = 1;
const VNC_AUTHENTICATION: u8 = 2;
const VENCRYPT: u8 = 19;
const X509_NONE: u32 = 260;
const X509_VNC: u32 = 261;

/// What clients must do.
#[derive(Clone, Default)]
pub struct Policy {
    /// They must know it. The protocol looks at its first 8 bytes only.
    pub password: Option<String>,
    /// They must use TLS.
    pub tls: Option<Arc<ServerConfig>>,
}

/// Versions of the protocol that differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    V3_3,
    V3_7,
    V3_8,
}

impl Version {
    /// What a client says. Versions that were never published count as the nearest below.
    fn parse(text: &[u8; 12]) -> Option<Self> {
        let text = str::from_utf8(text).ok()?;
        let (major, minor) = text.strip_prefix("RFB ")?.strip_suffix('\n')?.split_once('.')?;
        let digits = |part: &str| {
            let all = part.len() == 3 && part.bytes().all(|byte| byte.is_ascii_digit());
            all.then(|| part.parse::<u16>().ok()).flatten()
        };
        Some(match (digits(major)?, digits(minor)?) {
            (0..=2, _) => return None,
            (3, 0..=6) => Self::V3_3,
            (3, 7) => Self::V3_7,
            _ => Self::V3_8,
        })
    }
}

/// Leads a client through; `admit` has the last word about one that is who it should be.
///
/// # Errors
/// Why the client is not in. It has been told, as far as its version can be.
pub fn secure(
    peer: &Peer,
    policy: &Policy,
    admit: impl FnOnce() -> Result<(), String>,
) -> io::Result<()> {
    peer.set_time_limit(Some(HANDSHAKE))?;
    peer.write_all(b"RFB 003.008\n")?;
    let version = Version::parse(&peer.read_array()?)
        .ok_or_else(|| io::Error::other("it does not speak this protocol"))?;
    let offered = match policy {
        Policy { tls: Some(_), .. } => VENCRYPT,
        Policy { password: Some(_), .. } => VNC_AUTHENTICATION,
        _ => NONE,
    };
    choose(peer, version, offered)?;
    if let (VENCRYPT, Some(tls)) = (offered, &policy.tls) {
        vencrypt(peer, policy.password.is_some(), tls)?;
    }
    let known = match &policy.password {
        Some(password) => authenticate(peer, password)?,
        None => true,
    };
    let admitted = if known { admit() } else { Err("the password is wrong".into()) };
    let told = version == Version::V3_8 || offered != NONE;
    if let Err(reason) = admitted {
        if told {
            peer.write_all(&1_u32.to_be_bytes())?;
        }
        if version == Version::V3_8 {
            peer.write_all(&text(&reason))?;
        }
        peer.part();
        return Err(io::Error::other(reason));
    }
    if told {
        peer.write_all(&0_u32.to_be_bytes())?;
    }
    peer.set_time_limit(Some(HANDSHAKE))
}

/// Offers one security type, which the client must take.
fn choose(peer: &Peer, version: Version, offered: u8) -> io::Result<()> {
    if version == Version::V3_3 {
        if offered == VENCRYPT {
            let reason = "this server wants TLS, which version 3.3 of the protocol has not";
            peer.write_all(&[&0_u32.to_be_bytes()[..], &text(reason)].concat())?;
            peer.part();
            return Err(io::Error::other(reason));
        }
        return peer.write_all(&u32::from(offered).to_be_bytes());
    }
    peer.write_all(&[1, offered])?;
    match peer.read_array()? {
        [chosen] if chosen == offered => Ok(()),
        [other] => Err(io::Error::other(format!("it chose security type {other}, not {offered}"))),
    }
}

/// VeNCrypt 0.2 with a certificate.
fn vencrypt(peer: &Peer, password: bool, tls: &Arc<ServerConfig>) -> io::Result<()> {
    peer.write_all(&[0, 2])?;
    if peer.read_array()? != [0, 2] {
        peer.write_all(&[1])?;
        return Err(io::Error::other("it does not speak VeNCrypt 0.2"));
    }
    let subtype = if password { X509_VNC } else { X509_NONE };
    peer.write_all(&[&[0, 1][..], &subtype.to_be_bytes()].concat())?;
    if peer.read_array()? != subtype.to_be_bytes() {
        peer.write_all(&[0])?;
        return Err(io::Error::other("it does not do TLS with a certificate"));
    }
    peer.write_all(&[1])?;
    peer.start_tls(tls.clone())
}

/// VNC Authentication; whether the client knows the password.
fn authenticate(peer: &Peer, password: &str) -> io::Result<bool> {
    let mut challenge = [0; 16];
    let random = rustls::crypto::ring::default_provider().secure_random;
    random.fill(&mut challenge).map_err(|_| io::Error::other("the host has no random numbers"))?;
    peer.write_all(&challenge)?;
    peer.set_time_limit(Some(PASSWORD))?;
    let response: [u8; 16] = peer.read_array()?;
    let expected = encrypted(challenge, password);
    // Every byte is looked at, so that the time tells nothing.
    let wrong = response.iter().zip(expected).fold(0, |wrong, (a, b)| wrong | (a ^ b));
    if wrong != 0 {
        // Ends early where the client goes or the server stops.
        peer.set_time_limit(Some(PENALTY))?;
        let _ = peer.read_array::<64>();
    }
    Ok(wrong == 0)
}

/// What a client that knows the password answers.
pub fn encrypted(mut challenge: [u8; 16], password: &str) -> [u8; 16] {
    let mut key = [0; 8];
    for (key, byte) in key.iter_mut().zip(password.bytes()) {
        // The protocol counts a key's bits from the other end than DES.
        *key = byte.reverse_bits();
    }
    let cipher = Des::new(&key.into());
    for block in challenge.as_chunks_mut::<8>().0 {
        let mut cells = (*block).into();
        cipher.encrypt_block(&mut cells);
        *block = cells.into();
    }
    challenge
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        let parse = |text: &[u8; 12]| Version::parse(text);
        assert_eq!(parse(b"RFB 003.003\n"), Some(Version::V3_3));
        assert_eq!(parse(b"RFB 003.005\n"), Some(Version::V3_3));
        assert_eq!(parse(b"RFB 003.007\n"), Some(Version::V3_7));
        assert_eq!(parse(b"RFB 003.008\n"), Some(Version::V3_8));
        assert_eq!(parse(b"RFB 003.889\n"), Some(Version::V3_8));
        assert_eq!(parse(b"RFB 005.000\n"), Some(Version::V3_8));
        for bad in [
            b"RFB 003.008\r",
            b"RFB 002.001\n",
            b"GET / HTTP/1",
            b"RFB +03.008\n",
            b"RFB 003\xff008\n",
        ] {
            assert_eq!(parse(bad), None);
        }
    }

    #[test]
    fn responses_are_what_others_compute() {
        // As answered by vncdotool 1.4.2 to the challenge 00 01 .. 0f with the password "sesame".
        let challenge = std::array::from_fn(|i| i as u8);
        assert_eq!(encrypted(challenge, "sesame"), SESAME);
        assert_eq!(encrypted(challenge, "sesamesesame"), encrypted(challenge, "sesamese"));
        assert_ne!(encrypted(challenge, "sesamf"), SESAME);
    }

    const SESAME: [u8; 16] = [
        0xbc, 0x2c, 0x97, 0x74, 0xce, 0x4c, 0x8f, 0x47, 0xf2, 0xf7, 0xab, 0xf0, 0x63, 0xa6, 0xe0,
        0x32,
    ];
}
