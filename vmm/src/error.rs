//! Why a machine could not be put together or run, and how the program ends then.

use std::path::PathBuf;

use lodge_model::exit::ExitStatus;

/// Why a machine could not be put together or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its spec cannot be read.
    #[error("cannot read the machine's spec")]
    Spec(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Its spec asks for what cannot be.
    #[error("{0}")]
    Invalid(String),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] lodge_memory::Error),
    /// The accelerator.
    #[error(transparent)]
    Accel(#[from] lodge_accel::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] lodge_disk::Error),
    /// A network card.
    #[error(transparent)]
    Net(#[from] lodge_net::Error),
    /// PCI.
    #[error(transparent)]
    Pci(#[from] lodge_devices::pci::Error),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] lodge_devices::virtio::Error),
    /// The SATA controller.
    #[error(transparent)]
    Ahci(#[from] lodge_devices::ahci::Error),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] lodge_devices::bus::Overlap),
    /// What the guest is to start with.
    #[error(transparent)]
    Boot(#[from] crate::boot::Error),
    /// The firmware or its variables.
    #[error(transparent)]
    Firmware(#[from] crate::firmware::Error),
    /// The memory of a device.
    #[error(transparent)]
    DeviceRam(#[from] lodge_devices::device_ram::Error),
    /// The control socket.
    #[error(transparent)]
    ControlSocket(#[from] crate::control_socket::Error),
    /// The VNC server.
    #[error(transparent)]
    Vnc(#[from] crate::vnc::Error),
    /// A VNC password cannot be read.
    #[error("cannot read the VNC password from '{path}'")]
    Password {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The last picture cannot be kept.
    #[error("cannot write the screenshot '{path}'")]
    Screenshot {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The console's file.
    #[error("cannot write the console to '{path}'")]
    Console {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The host has no thread, descriptor or signal to give.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU's thread is gone.
    #[error(transparent)]
    Vcpu(#[from] crate::vcpu::Gone),
}

impl Error {
    /// How the program ends.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Spec(_) | Self::Invalid(_) | Self::Boot(_) | Self::Console { .. } => {
                ExitStatus::BadRequest
            }
            Self::Accel(lodge_accel::Error::Unavailable(_)) => ExitStatus::NoAccelerator,
            Self::Disk(lodge_disk::Error::Locked { .. })
            | Self::Firmware(crate::firmware::Error::InUse { .. })
            | Self::ControlSocket(
                crate::control_socket::Error::Taken { .. }
                | crate::control_socket::Error::InUse { .. },
            )
            | Self::Vnc(crate::vnc::Error::Listen { .. })
            | Self::Net(lodge_net::Error::TapBusy { .. } | lodge_net::Error::PortTaken { .. }) => {
                ExitStatus::Busy
            }
            Self::Disk(_)
            | Self::Net(_)
            | Self::Firmware(_)
            | Self::Vnc(_)
            | Self::ControlSocket(crate::control_socket::Error::Make { .. })
            | Self::Password { .. } => ExitStatus::BadRequest,
            _ => ExitStatus::Failed,
        }
    }
}

/// An error and its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent wrapper repeats its source.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
