//! Versions, passwords, TLS, Unix sockets.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};
use lodge_vmm::vnc::{Error, Listen, TlsFiles, VncOptions, VncServer};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::client::{Client, RAW, Stream, ZRLE};
use crate::host::{Host, PATIENCE, options, read, read_all, secured};
use crate::pictures::mixed;

/// The answer to a challenge.
fn answer(challenge: [u8; 16], password: &str) -> Vec<u8> {
    let mut key = [0; 8];
    password.bytes().zip(&mut key).for_each(|(byte, key)| *key = byte.reverse_bits());
    let cipher = Des::new(&key.into());
    let half = |half: &[u8]| {
        let mut block = <[u8; 8]>::try_from(half).unwrap().into();
        cipher.encrypt_block(&mut block);
        <[u8; 8]>::from(block)
    };
    challenge.chunks(8).flat_map(half).collect()
}

fn works(mut client: Client) {
    client.set_encodings(&[ZRLE]);
    client.ask(false);
    client.update();
    assert_eq!(client.pixels, mixed(64, 64).pixels);
}

fn with_password() -> Host {
    let options = VncOptions { password: Some("sesame".into()), ..options() };
    Host::with(&options, &mixed(64, 64))
}

/// The server's version, and this one.
fn hello(stream: &mut dyn Stream, version: &[u8; 12]) {
    assert_eq!(read::<12>(stream), *b"RFB 003.008\n");
    stream.write_all(version).unwrap();
}

#[test]
fn old_versions_are_spoken() {
    let host = Host::new(&mixed(64, 64));
    let mut stream: Box<dyn Stream> = Box::new(host.connect());
    hello(&mut stream, b"RFB 003.003\n");
    assert_eq!(read::<4>(&mut stream), [0, 0, 0, 1]);
    works(Client::start(stream, true));

    let mut stream: Box<dyn Stream> = Box::new(host.connect());
    hello(&mut stream, b"RFB 003.007\n");
    assert_eq!(read::<2>(&mut stream), [1, 1]);
    stream.write_all(&[1]).unwrap();
    works(Client::start(stream, true));
}

#[test]
fn passwords_are_asked_for_in_every_version() {
    let host = with_password();
    for version in [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n"] {
        for (password, right) in [("sesame", true), ("simsim", false), ("", false)] {
            let mut stream: Box<dyn Stream> = Box::new(host.connect());
            hello(&mut stream, version);
            if version[10] == b'3' {
                assert_eq!(read::<4>(&mut stream), [0, 0, 0, 2]);
            } else {
                assert_eq!(read::<2>(&mut stream), [1, 2]);
                stream.write_all(&[2]).unwrap();
            }
            let challenge = read::<16>(&mut stream);
            stream.write_all(&answer(challenge, password)).unwrap();
            assert_eq!(read::<4>(&mut stream), [0, 0, 0, u8::from(!right)]);
            if right {
                works(Client::start(stream, true));
                continue;
            }
            let rest = read_all(&mut stream);
            if version[10] == b'8' {
                assert_eq!(rest[..4], (rest.len() as u32 - 4).to_be_bytes());
                assert_eq!(str::from_utf8(&rest[4..]), Ok("the password is wrong"));
            } else {
                assert!(rest.is_empty());
            }
        }
    }
    host.wait_for_clients(0);
}

#[test]
fn nobody_gets_past_the_password() {
    let host = with_password();
    let mut stream: Box<dyn Stream> = Box::new(host.connect());
    hello(&mut stream, b"RFB 003.008\n");
    assert_eq!(read::<2>(&mut stream), [1, 2]);
    // Security type None was not offered.
    stream.write_all(&[1, 1]).unwrap();
    assert!(read_all(&mut stream).is_empty());
}

struct Tls {
    folder: tempfile::TempDir,
    client: Arc<ClientConfig>,
}

impl Tls {
    fn new() -> Self {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["vnc.test".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cert.pem"), cert.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), signing_key.serialize_pem()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { folder, client: Arc::new(client) }
    }

    fn files(&self) -> TlsFiles {
        let path = self.folder.path();
        TlsFiles { certificate: path.join("cert.pem"), key: path.join("key.pem") }
    }

    /// VeNCrypt with this subtype, up to what comes after TLS's handshake.
    fn connect(&self, host: &Host, subtype: u32) -> Box<dyn Stream> {
        let mut tcp = host.connect();
        hello(&mut tcp, b"RFB 003.008\n");
        assert_eq!(read::<2>(&mut tcp), [1, 19]);
        tcp.write_all(&[19]).unwrap();
        assert_eq!(read::<2>(&mut tcp), [0, 2]);
        tcp.write_all(&[0, 2]).unwrap();
        assert_eq!(read::<2>(&mut tcp), [0, 1]);
        assert_eq!(read::<4>(&mut tcp), subtype.to_be_bytes());
        tcp.write_all(&subtype.to_be_bytes()).unwrap();
        assert_eq!(read::<1>(&mut tcp), [1]);
        let name = ServerName::try_from("vnc.test").unwrap();
        let connection = ClientConnection::new(self.client.clone(), name).unwrap();
        Box::new(StreamOwned::new(connection, tcp))
    }
}

#[test]
fn tls_with_a_certificate() {
    let tls = Tls::new();
    let with_tls = VncOptions { tls: Some(tls.files()), ..options() };
    let host = Host::with(&with_tls, &mixed(64, 64));
    let mut stream = tls.connect(&host, 260);
    assert_eq!(read::<4>(&mut stream), [0; 4]);
    works(Client::start(stream, true));
    // Version 3.3 has no such thing, and is told so.
    let mut stream = host.connect();
    hello(&mut stream, b"RFB 003.003\n");
    let rest = read_all(&mut stream);
    assert_eq!(rest[..4], [0; 4]);
    assert!(str::from_utf8(&rest[8..]).unwrap().contains("TLS"));
}

#[test]
fn tls_and_a_password() {
    let tls = Tls::new();
    let password = Some("sesame".into());
    let both = VncOptions { tls: Some(tls.files()), password, ..options() };
    let host = Host::with(&both, &mixed(64, 64));
    for (password, right) in [("sesame", true), ("nothing", false)] {
        let mut stream = tls.connect(&host, 261);
        let challenge = read::<16>(&mut stream);
        stream.write_all(&answer(challenge, password)).unwrap();
        assert_eq!(read::<4>(&mut stream), [0, 0, 0, u8::from(!right)]);
        if right {
            works(Client::start(stream, true));
        }
    }
    // Both directions at once, for a while.
    let mut stream = tls.connect(&host, 261);
    let challenge = read::<16>(&mut stream);
    stream.write_all(&answer(challenge, "sesame")).unwrap();
    assert_eq!(read::<4>(&mut stream), [0; 4]);
    let mut client = Client::start(stream, true);
    client.set_encodings(&[RAW]);
    for i in 0..200 {
        client.pointer(0, i, i);
        client.ask(false);
        if i % 3 == 0 {
            client.update();
        }
    }
    works(client);
}

#[test]
fn plain_bytes_instead_of_tls_end_the_connection() {
    let tls = Tls::new();
    let with_tls = VncOptions { tls: Some(tls.files()), ..options() };
    let host = Host::with(&with_tls, &mixed(64, 64));
    let mut tcp = host.connect();
    hello(&mut tcp, b"RFB 003.008\n");
    tcp.write_all(&[19, 0, 2, 0, 0, 1, 4]).unwrap();
    tcp.write_all(&[0x55; 500]).unwrap();
    read_all(&mut tcp);
    works(Client::start(
        {
            let mut stream = tls.connect(&host, 260);
            assert_eq!(read::<4>(&mut stream), [0; 4]);
            stream
        },
        true,
    ));
}

#[test]
fn files_that_are_no_certificate_are_named() {
    let tls = Tls::new();
    let start = |files: TlsFiles| {
        let options = VncOptions { tls: Some(files), ..options() };
        let host = Host::new(&mixed(16, 16));
        VncServer::start(&options, host.display.clone(), host.sink.clone()).map(drop)
    };
    let good = tls.files();
    start(good.clone()).unwrap();
    let missing = TlsFiles { certificate: "/nowhere/cert.pem".into(), ..good.clone() };
    let error = start(missing).unwrap_err();
    assert!(error.to_string().contains("/nowhere/cert.pem"), "{error}");
    let swapped = TlsFiles { certificate: good.certificate.clone(), key: good.certificate.clone() };
    let error = start(swapped).unwrap_err();
    assert!(matches!(error, Error::TlsFile { what: "a private key", .. }), "{error}");
    let other = Tls::new();
    let mismatch = TlsFiles { key: other.files().key, ..good };
    assert!(matches!(start(mismatch).unwrap_err(), Error::Tls { .. }));
}

#[test]
fn unix_sockets_come_and_go_with_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vnc.sock");
    let options = VncOptions { listen: Listen::Unix(path.clone()), ..options() };
    let host = Host::with(&options, &mixed(64, 64));
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    works(Client::start(secured(stream), true));
    let second = VncServer::start(&options, host.display.clone(), host.sink.clone());
    let error = second.map(drop).unwrap_err();
    assert!(error.to_string().contains("vnc.sock"), "{error}");
    drop(host);
    assert!(!path.exists());
}
