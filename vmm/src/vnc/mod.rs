//! The VNC server: a machine's display for any VNC viewer (RFB 3.3, 3.7 and 3.8: RFC 6143; extensions: rfbproto).
//!
//! ```text
//!                      accept thread                          display thread
//!   TCP or Unix ---->  (server, listen)                       (crate::display)
//!                            | starts                            |        ^
//!                            v                    pulled: dirty  v        | hungry
//!                  +--> reader thread --orders--> mailbox --> writer thread --> View, to compare and copy
//!                  |    (client)                               (session)
//!   viewer <-------+        |                                      |
//!     ^                     v                                      |
//!     |               InputSink: the guest's keyboard, pointer     |
//!     +------------------- updates --------------------------------+
//! ```
//!
//! A connection's states:
//!
//! ```text
//!   newcomer --version, security type, password--> admitted --ClientInit--> client --> gone
//!      |  (security; 10 s, a password 120 s)                                  |
//!      +--> gone: wrong, late, crowded out                                    +-- wrong message, 30 s unread
//! ```
//!
//! | file | is about |
//! | --- | --- |
//! | `listen`, `peer` | sockets, TLS |
//! | `security` | who the client is |
//! | `message`, `client`, `input`, `keys` | what it says and does |
//! | `extensions`, `mailbox`, `session` | what it knows, wants and gets |
//! | `tiles`, `scroll` | what changed |
//! | `pixels`, `encode` | how it travels |
//!
//! A client can do harm only to its own connection: its messages have limits, what it does not read is not made, and the
//! guest, the display and other clients wait for nobody.
#![forbid(unsafe_code)]

mod client;
mod encode;
mod extensions;
mod input;
mod keys;
mod listen;
mod mailbox;
mod message;
mod peer;
mod pixels;
mod scroll;
mod security;
mod server;
mod session;
mod tiles;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::sys::eventfd::EventFd;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub use self::input::InputSink;
pub use self::listen::Listen;
use self::listen::Listener;
use self::security::Policy;
use self::server::Server;
use self::session::Around;
use crate::display::Display;

/// What a server needs to know. It cannot be printed: the password must not get into a log.
#[derive(Clone)]
pub struct VncOptions {
    /// Where to listen.
    pub listen: Listen,
    /// What clients must know, if anything; only its first 8 bytes count, by the protocol.
    pub password: Option<String>,
    /// With it, clients must use TLS.
    pub tls: Option<TlsFiles>,
    /// The desktop's name: the machine's.
    pub name: String,
}

/// The server's certificate, as PEM files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate, and those between it and the one that clients know.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing can listen there.
    #[error("cannot listen for VNC clients at {at}: free it or choose another place")]
    Listen {
        /// Where.
        at: Listen,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// A file of [`TlsFiles`].
    #[error("cannot use '{path}' for VNC's TLS: it must be a PEM file with {what}")]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// What it must have.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate and the key do not fit.
    #[error("cannot use the certificate '{path}' with its key for VNC's TLS")]
    Tls {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// The host has no thread or descriptor to give.
    #[error("cannot start the VNC server")]
    Host(#[source] io::Error),
}

/// A VNC server. It ends when it is dropped, with all its connections.
pub struct VncServer {
    server: Arc<Server>,
    place: Listen,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl VncServer {
    /// Begins to listen.
    ///
    /// # Errors
    /// The place, or a file of the certificate, by name.
    pub fn start(
        options: &VncOptions,
        display: Arc<Display>,
        sink: Arc<dyn InputSink>,
    ) -> Result<Self, Error> {
        let tls = options.tls.as_ref().map(tls_config).transpose()?;
        let at = |source| Error::Listen { at: options.listen.clone(), source };
        let listener = Listener::open(&options.listen).map_err(at)?;
        let place = listener.place().map_err(at)?;
        let name = Mutex::new(Arc::from(options.name.as_str()));
        let server = Arc::new(Server {
            policy: Policy { password: options.password.clone(), tls },
            around: Arc::new(Around { display, sink, name }),
            guests: Mutex::default(),
        });
        let host = |error: nix::Error| Error::Host(error.into());
        let stop = Arc::new(EventFd::new().map_err(host)?);
        let for_thread = (server.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("vnc-accept".into()).spawn(move || {
            let (server, stop) = for_thread;
            server.run(&listener, &stop);
        });
        Ok(Self { server, place, stop, thread: Some(thread.map_err(Error::Host)?) })
    }

    /// Where it listens; for port 0, which one it is.
    pub fn local_addr(&self) -> &Listen {
        &self.place
    }

    /// Clients that are connected.
    pub fn clients(&self) -> usize {
        self.server.clients()
    }

    /// Gives the desktop another name.
    pub fn set_name(&self, name: &str) {
        let mut current = self.server.around.name.lock().unwrap_or_else(PoisonError::into_inner);
        *current = name.into();
    }
}

impl Drop for VncServer {
    fn drop(&mut self) {
        // It fails only with 2^64 - 1 in it.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its own message.
            let _ = thread.join();
        }
    }
}

fn tls_config(files: &TlsFiles) -> Result<Arc<ServerConfig>, Error> {
    let bad = |path: &Path, what| {
        let path = path.to_owned();
        move |source| Error::TlsFile { path, what, source }
    };
    let no_certificate = || bad(&files.certificate, "a certificate");
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(no_certificate())?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(bad(&files.key, "a private key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|source| Error::Tls { path: files.certificate.clone(), source })?;
    // Nobody resumes a VNC session, and TigerVNC 1.12 stops at a ticket that comes together with other data.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
