//! Bytes that rotted: put right in place, or put aside.

use std::fs;
use std::os::unix::fs::FileExt as _;

use super::Disk;
use crate::digest::Digest;
use crate::error::{Error, Result};

impl Disk {
    /// Writes the right bytes over wrong ones of a sealed blob; durable on return. A reader in the middle of it sees some right and some that are
    /// still wrong, and never another's: each byte was wrong or is as it was.
    ///
    /// # Errors
    /// Poisoned store, the I/O error.
    pub fn mend(&self, digest: &Digest, start: u64, bytes: &[u8]) -> Result<()> {
        self.check_healthy()?;
        let (file, path) = self.open_to_change(digest)?;
        file.write_all_at(bytes, start).map_err(|error| Error::io("mending", &path, error))?;
        self.sync_file(&file, &path)
    }

    /// Keeps what was found at `start` of a blob for examination; it replaces what was kept of the same place before.
    ///
    /// # Errors
    /// No room, the I/O error.
    pub fn keep_rotten(&self, digest: &Digest, start: u64, bytes: &[u8]) -> Result<()> {
        self.check_healthy()?;
        self.check_room(bytes.len() as u64)?;
        let path = self.root().join("quarantine").join(format!("{digest}-{start}"));
        fs::write(&path, bytes).map_err(|error| Error::io("writing", &path, error))
    }
}
