//! Files on the host that go into guest memory, straight and without a copy of them in ours.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use lodge_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::Error;

/// Bytes at a file's start that say what it is.
const HEAD: u64 = 4096;
/// Zeros are written in pieces of this many bytes.
const ZEROS: usize = 64 << 10;

/// A regular file, open.
#[derive(Debug)]
pub(super) struct Source {
    what: &'static str,
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Source {
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { what, path: path.into(), source };
        // Looked at before it is opened: opening a FIFO would wait for a writer.
        if !std::fs::metadata(path).map_err(read)?.is_file() {
            return Err(Error::NotAFile { what, path: path.into() });
        }
        let file = File::open(path).map_err(read)?;
        let bytes = file.metadata().map_err(read)?.len();
        Ok(Self { what, path: path.into(), file, bytes })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file's first bytes, at most 4096.
    pub(super) fn head(&mut self) -> Result<Vec<u8>, Error> {
        self.read_at(0, HEAD.min(self.bytes))
    }

    /// `len` bytes at `offset`; `len` is what the caller has bounded.
    pub(super) fn read_at(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        self.require(offset.saturating_add(len))?;
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(offset)).map_err(|e| self.failed(e))?;
        (&self.file).take(len).read_to_end(&mut bytes).map_err(|e| self.failed(e))?;
        if bytes.len() as u64 != len {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(bytes)
    }

    /// An error unless the file has at least `need` bytes.
    pub(super) fn require(&self, need: u64) -> Result<(), Error> {
        if self.bytes >= need {
            return Ok(());
        }
        let (what, path, have) = (self.what, self.path.clone(), self.bytes);
        Err(Error::Truncated { what, path, have, need })
    }

    /// Reads `len` bytes at `offset` into guest memory at `gpa`.
    pub(super) fn read_into(
        &self,
        memory: &GuestMemory,
        offset: u64,
        len: u64,
        gpa: u64,
    ) -> Result<(), Error> {
        self.require(offset.saturating_add(len))?;
        self.check_ram(memory, gpa, len)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|e| self.failed(e))?;
        // Bounded by the check above.
        let result = memory.read_exact_volatile_from(GuestAddress(gpa), &mut file, len as usize);
        result.map_err(|error| match error {
            GuestMemoryError::IOError(error) => self.failed(error),
            source => self.failed(io::Error::other(source)),
        })
    }

    /// Writes `len` zeros at `gpa` on this file's behalf (its BSS).
    pub(super) fn zero(&self, memory: &GuestMemory, gpa: u64, len: u64) -> Result<(), Error> {
        self.check_ram(memory, gpa, len)?;
        let zeros = [0; ZEROS];
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(ZEROS as u64);
            super::write(memory, self.what, gpa + done, &zeros[..chunk as usize])?;
            done += chunk;
        }
        Ok(())
    }

    fn check_ram(&self, memory: &GuestMemory, gpa: u64, len: u64) -> Result<(), Error> {
        let fits = usize::try_from(len)
            .is_ok_and(|len| len == 0 || memory.check_range(GuestAddress(gpa), len));
        if fits {
            return Ok(());
        }
        Err(self.no_room(len, format!("at {gpa:#x} there is not so much memory")))
    }

    pub(super) fn no_room(&self, bytes: u64, why: String) -> Error {
        Error::NoRoom { what: self.what, path: self.path.clone(), bytes, why }
    }

    pub(super) fn not_a_kernel(&self, reason: &'static str) -> Error {
        Error::NotAKernel { path: self.path.clone(), reason }
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Read { what: self.what, path: self.path.clone(), source }
    }
}
