//! UEFI variables: flash memory whose contents are a file of the machine's own.
//!
//! ```text
//!   guest --> Flash --changes, in order--> writer thread --> file, synced
//! ```
//!
//! The file is a firmware volume (UEFI PI 1.7, volume 3, 3.2.1) with a variable store in it. It is made from the
//! firmware's template the first time, and refused when it is damaged: firmware would quietly start over.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use lodge_accel::Vm;
use lodge_devices::bus::SystemBus;
use lodge_devices::device_ram::{Access, DeviceRam, slots};
use lodge_devices::flash::Flash;

use super::Error;

/// EFI_SYSTEM_NV_DATA_FV_GUID, fff12b8d-7696-4c8b-a985-2747075b4f50.
const VOLUME_GUID: [u8; 16] = [
    0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50,
];
/// Offsets in the volume's header.
mod header {
    pub const GUID: usize = 16;
    pub const LENGTH: usize = 32;
    pub const SIGNATURE: usize = 40;
    pub const HEADER_LENGTH: usize = 48;
    pub const LEAST: usize = 56;
}
/// In the variable store behind it: its format and its state, which say that it is whole.
const STORE_FORMAT: (usize, u8) = (20, 0x5a);
const STORE_STATE: (usize, u8) = (21, 0xfe);

/// The flash memory and its file.
pub(super) struct Variables {
    flash: Arc<Flash>,
    changes: Sender<Change>,
    writer: Option<JoinHandle<()>>,
}

enum Change {
    Store(u64, Vec<u8>),
    /// Everything before is to be durable; then the sender hears of it.
    Flush(Sender<()>),
    End,
}

impl Variables {
    /// Opens the file at `path`, made from `template` if there is none, and puts it on `bus` so that it ends at
    /// `end`.
    pub(super) fn open(
        path: &Path,
        template: &Path,
        end: u64,
        bus: &SystemBus,
        vm: &Arc<dyn Vm>,
    ) -> Result<Self, Error> {
        let (file, contents) = open_file(path, template)?;
        let bytes = contents.len() as u64;
        let ram = DeviceRam::new(vm.clone(), slots::VARIABLES, bytes, Access::ReadOnly)?;
        ram.write_at(0, &contents);
        let (changes, list) = channel();
        let shown = path.to_owned();
        let writer = thread::Builder::new()
            .name("uefi variables".into())
            .spawn(move || write(&file, &shown, &list))
            .map_err(|source| Error::Variables { path: path.into(), source })?;
        let sender = changes.clone();
        // The writer ends after the machine's last change.
        let changed = move |at, bytes: &[u8]| drop(sender.send(Change::Store(at, bytes.to_vec())));
        let flash = Flash::new(ram, Box::new(changed));
        bus.mmio.insert(end - bytes, bytes, flash.clone())?;
        Ok(Self { flash, changes, writer: Some(writer) })
    }

    pub(super) fn reset(&self) {
        self.flash.reset();
    }

    /// Waits until everything is durable.
    pub(super) fn flush(&self) {
        let (done, wait) = channel();
        if self.changes.send(Change::Flush(done)).is_ok() {
            // An error means that the writer has ended, which it told.
            let _ = wait.recv();
        }
    }
}

impl Drop for Variables {
    fn drop(&mut self) {
        let _ = self.changes.send(Change::End);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Writes changes as they come, and makes them durable when there are no more for now.
fn write(file: &File, path: &Path, changes: &Receiver<Change>) {
    while let Ok(first) = changes.recv() {
        let mut waiting = Vec::new();
        let mut ended = false;
        let mut result = Ok(());
        for change in std::iter::once(first).chain(changes.try_iter()) {
            match change {
                Change::Store(at, bytes) => {
                    result = result.and_then(|()| file.write_all_at(&bytes, at));
                }
                Change::Flush(done) => waiting.push(done),
                Change::End => ended = true,
            }
        }
        if let Err(error) = result.and_then(|()| file.sync_data()) {
            tracing::error!(%error, path = %path.display(), "UEFI variables are not kept");
        }
        // Who does not wait any more does not hear of it.
        for done in waiting {
            let _ = done.send(());
        }
        if ended {
            return;
        }
    }
}

/// Opens, locks, reads and checks the file; makes it first if there is none.
fn open_file(path: &Path, template: &Path) -> Result<(File, Vec<u8>), Error> {
    let failed = |source| Error::Variables { path: path.into(), source };
    if !path.exists() {
        make(path, template).map_err(failed)?;
    }
    let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: path.into() }),
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    let expected = fs::metadata(template).map_err(failed)?.len();
    let mut contents = Vec::new();
    // One byte more tells that it is too long, however long it is.
    (&mut file).take(expected + 1).read_to_end(&mut contents).map_err(failed)?;
    check(&contents, expected).map_err(|reason| Error::Damaged { path: path.into(), reason })?;
    Ok((file, contents))
}

/// A fresh file: written beside, synced, renamed.
fn make(path: &Path, template: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        fs::create_dir_all(folder)?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".new-{}", std::process::id()));
    let beside = PathBuf::from(beside);
    fs::write(&beside, fs::read(template)?)?;
    File::open(&beside)?.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// What is wrong with the contents, if anything.
fn check(contents: &[u8], expected: u64) -> Result<(), String> {
    if contents.len() as u64 != expected {
        let than = if contents.len() as u64 > expected { "more" } else { "fewer" };
        return Err(format!("it has {than} than the {expected} bytes of this firmware's"));
    }
    let is = |what: &str, right: bool| {
        if right { Ok(()) } else { Err(format!("the {what} is wrong")) }
    };
    let field = |at: usize, len: usize| contents.get(at..at + len).unwrap_or_default();
    is("size", contents.len() >= header::LEAST)?;
    is("volume's signature", field(header::SIGNATURE, 4) == b"_FVH")?;
    is("volume's GUID", field(header::GUID, 16) == VOLUME_GUID)?;
    is("volume's length", field(header::LENGTH, 8) == expected.to_le_bytes())?;
    let length =
        field(header::HEADER_LENGTH, 2).iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
    is("header's length", length >= header::LEAST && length.is_multiple_of(2))?;
    let words = field(0, length).chunks_exact(2).map(|w| u16::from_le_bytes([w[0], w[1]]));
    is("header's checksum", length <= contents.len() && words.fold(0, u16::wrapping_add) == 0)?;
    for (at, value) in [STORE_FORMAT, STORE_STATE] {
        is("variable store's header", field(length + at, 1) == [value])?;
    }
    Ok(())
}
