//! Those who see the machine's display: from the spec to a VNC server.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use lodge_model::spec::{Vnc, VncAddress};

use crate::display::Display;
use crate::error::Error;
use crate::vnc::{InputSink, Listen, TlsFiles, VncOptions, VncServer};

/// Starts the server that the spec asks for, and says where it listens.
///
/// # Errors
/// The place, the password or the certificate, by name.
pub fn start(
    vnc: &Vnc,
    name: &str,
    display: Arc<Display>,
    input: Arc<dyn InputSink>,
) -> Result<VncServer, Error> {
    let options = VncOptions {
        listen: match &vnc.listen {
            VncAddress::Tcp(address) => Listen::Tcp(*address),
            VncAddress::Unix(path) => Listen::Unix(path.clone()),
        },
        password: vnc.password_file.as_deref().map(password).transpose()?,
        tls: match (&vnc.tls_cert, &vnc.tls_key) {
            (Some(certificate), Some(key)) => {
                Some(TlsFiles { certificate: certificate.clone(), key: key.clone() })
            }
            _ => None,
        },
        name: name.into(),
    };
    let server = VncServer::start(&options, display, input)?;
    eprintln!("lodge: the display is at vnc={}", server.local_addr());
    Ok(server)
}

/// The first line of a file.
fn password(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::Password { path: path.into(), source };
    let text = fs::read_to_string(path).map_err(failed)?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return Err(failed(std::io::Error::other("its first line is empty")));
    }
    Ok(line.into())
}
