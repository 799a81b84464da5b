//! The file as the metadata's owner uses it: few calls, so that a test can write down their order and
//! lose those that a power failure could lose.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What was done to the file.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(super) enum Event {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Sync,
}

/// The file.
pub(super) struct MetaFile {
    file: Arc<File>,
    #[cfg(test)]
    pub(super) log: std::sync::Mutex<Vec<Event>>,
}

impl MetaFile {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self {
            file,
            #[cfg(test)]
            log: std::sync::Mutex::default(),
        }
    }

    #[cfg(test)]
    fn note(&self, event: Event) {
        self.log.lock().unwrap().push(event);
    }

    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(Event::Write(offset, bytes.to_vec()));
        self.file.write_all_at(bytes, offset)
    }

    /// Everything written before is durable after this.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()?;
        #[cfg(test)]
        self.note(Event::Sync);
        Ok(())
    }

    /// Makes room for metadata now, when a full disk can still be told to who asked for it. Where that is not
    /// possible, the room is found when the metadata is written.
    pub(super) fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(0, offset, len) {
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => Err(e),
            _ => Ok(()),
        }
    }

    /// Gives room back, if the file system can.
    pub(super) fn punch(&self, offset: u64, len: u64) {
        #[cfg(test)]
        self.note(Event::Punch(offset, len));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if let Err(e) = self.fallocate(mode, offset, len) {
            tracing::debug!(error = %e, "freed clusters stay allocated on the host");
        }
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: the descriptor is open; the call touches no memory of ours.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
