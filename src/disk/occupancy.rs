//! What is taken of the disk: by what is not a blob, and in all. Blobs are counted in the catalog.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::Disk;
use crate::error::{Error, Result};

/// What is on disk in the state directory besides blobs, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupied {
    /// Files that fill.
    pub filling_bytes: u64,
    /// What was put aside.
    pub quarantine_bytes: u64,
    /// What sources keep while they are read.
    pub scratch_bytes: u64,
    /// The catalog and its log.
    pub catalog_bytes: u64,
}

impl Occupied {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.filling_bytes + self.quarantine_bytes + self.scratch_bytes + self.catalog_bytes
    }
}

/// The filesystem of the state directory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// Its size.
    pub bytes: u64,
    /// Taken by whomever.
    pub used_bytes: u64,
    /// Free for us.
    pub free_bytes: u64,
}

impl Disk {
    /// What is on disk besides blobs. Goes through what fills, which is little: files leave `filling/` as they are sealed.
    ///
    /// # Errors
    /// The I/O error; what goes away meanwhile is not counted.
    pub fn occupied(&self) -> Result<Occupied> {
        let mut catalog_bytes = 0;
        for name in ["catalog.db", "catalog.db-wal", "catalog.db-shm"] {
            catalog_bytes += file_bytes(&self.root().join(name))?;
        }
        Ok(Occupied {
            filling_bytes: tree_bytes(&self.root().join("filling"))?,
            quarantine_bytes: tree_bytes(&self.root().join("quarantine"))?,
            scratch_bytes: tree_bytes(&self.root().join("scratch"))?,
            catalog_bytes,
        })
    }

    /// What the files occupy that a flight fills; 0 where there is none.
    ///
    /// # Errors
    /// The I/O error.
    pub fn occupied_by(&self, flight: &str) -> Result<u64> {
        tree_bytes(&self.root().join("filling").join(flight))
    }

    /// What one file occupies that a flight fills; 0 where there is none.
    ///
    /// # Errors
    /// The I/O error.
    pub fn occupied_by_file(&self, flight: &str, number: u64) -> Result<u64> {
        file_bytes(&self.filling_path(flight, number))
    }

    /// The filesystem as it is now.
    ///
    /// # Errors
    /// The I/O error.
    pub fn filesystem(&self) -> Result<Filesystem> {
        let stat = nix::sys::statvfs::fstatvfs(&self.root_handle)
            .map_err(|errno| Error::io("asking for the size of", self.root(), errno.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        Ok(Filesystem {
            bytes: bytes(stat.blocks()),
            used_bytes: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
            free_bytes: bytes(stat.blocks_available()),
        })
    }
}

fn file_bytes(path: &Path) -> Result<u64> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(metadata.blocks() * 512),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::io("examining", path, error)),
    }
}

/// Bytes of all files below a directory.
fn tree_bytes(path: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|error| Error::io("listing", &directory, error))?,
        };
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("listing", &directory, error))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(entry.path());
            } else {
                bytes += file_bytes(&entry.path())?;
            }
        }
    }
    Ok(bytes)
}
