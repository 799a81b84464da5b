//! A hash of files and folders that is the same on every host and in every release.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::{Error, at};

/// FNV-1a with 64 bits: recipes change by people's hands, nobody attacks it.
pub struct Hash(u64);

impl Hash {
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub fn finish(&self) -> u64 {
        self.0
    }

    /// Adds `bytes` and their number, so that two parts never run together.
    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Adds the file at `path`, or all below the folder: names, contents, who may execute.
    pub fn tree(&mut self, path: &Path) -> Result<(), Error> {
        let meta = at("look at", path, fs::metadata(path))?;
        if meta.is_dir() {
            let entries = at("read the folder", path, fs::read_dir(path))?;
            let names: Result<Vec<_>, _> =
                entries.map(|entry| entry.map(|entry| entry.file_name())).collect();
            let mut names = at("read the folder", path, names)?;
            names.sort();
            self.add(b"folder");
            for name in names {
                self.add(name.as_encoded_bytes());
                self.tree(&path.join(name))?;
            }
        } else {
            let executable = meta.permissions().mode() & 0o100 != 0;
            self.add(if executable { b"program" } else { b"file" });
            self.add(&at("read", path, fs::read(path))?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let hash = || {
            let mut hash = Hash::new();
            hash.tree(path).unwrap();
            hash.finish()
        };
        let mut seen = vec![hash()];
        fs::write(path.join("a"), "1").unwrap();
        seen.push(hash());
        assert_eq!(hash(), hash());
        fs::write(path.join("a"), "2").unwrap();
        seen.push(hash());
        fs::rename(path.join("a"), path.join("b")).unwrap();
        seen.push(hash());
        fs::set_permissions(path.join("b"), fs::Permissions::from_mode(0o755)).unwrap();
        seen.push(hash());
        fs::create_dir(path.join("c")).unwrap();
        seen.push(hash());
        let all = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), all);
    }
}
