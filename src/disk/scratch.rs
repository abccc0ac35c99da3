//! Directories that sources use while they are read, below `scratch/` of the state directory.
//!
//! Each belongs to one guard and goes with it; nothing in them is ever durable or looked at again. What a killed daemon left is removed
//! when the next one opens the directory, before anything is made. They lie on the store's filesystem, so that what
//! is fetched into them is seen by whoever asks for free space.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Disk, make_directory};
use crate::error::Result;

/// A private directory (mode 0700); removed with all it holds when the guard is dropped.
#[derive(Debug)]
pub struct Scratch {
    disk: Arc<Disk>,
    path: PathBuf,
}

impl Disk {
    /// Makes a new empty scratch directory. Blocks.
    ///
    /// # Errors
    /// Poisoned disk, or the I/O error.
    pub fn begin_scratch(self: &Arc<Self>) -> Result<Scratch> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        self.check_healthy()?;
        let name = COUNT.fetch_add(1, Ordering::Relaxed).to_string();
        let scratch = Scratch { disk: Arc::clone(self), path: self.root.join("scratch").join(name) };
        make_directory(&scratch.path)?;
        Ok(scratch)
    }
}

impl Scratch {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that what it holds occupies on the disk. Files that vanish meanwhile count nothing. Blocks.
    pub fn occupied_bytes(&self) -> u64 {
        occupied(&self.path)
    }

    /// As [`Disk::check_room`].
    ///
    /// # Errors
    /// `NO_SPACE` with the figures; the I/O error.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        self.disk.check_room(bytes)
    }

    /// As [`Disk::free_bytes`].
    ///
    /// # Errors
    /// The I/O error.
    pub fn free_bytes(&self) -> Result<u64> {
        self.disk.free_bytes()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let (path, disk) = (std::mem::take(&mut self.path), Arc::clone(&self.disk));
        // Unlinking gigabytes takes a while, and guards are dropped on the runtime's threads. The disk is held so that
        // no other daemon takes the directory over before.
        let removal = std::thread::Builder::new().name("scratch".to_owned());
        if let Err(error) = removal.spawn(move || {
            remove(&path);
            drop(disk);
        }) {
            tracing::warn!(%error, "a scratch directory stays until the next start");
        }
    }
}

fn occupied(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => occupied(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

/// Removes what an earlier daemon left. What cannot be removed must not keep this one from starting.
pub(super) fn clear(root: &Path) {
    remove(&root.join("scratch"));
}

fn remove(path: &Path) {
    // A program that was ended a moment ago may still have been making files: then once more.
    let removed = fs::remove_dir_all(path).or_else(|_| fs::remove_dir_all(path));
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "a scratch directory could not be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_directory_goes_with_its_guard_and_with_a_start() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("state");
        let disk = Arc::new(Disk::open(&root).unwrap());
        let scratch = disk.begin_scratch().unwrap();
        fs::create_dir(scratch.path().join("below")).unwrap();
        fs::write(scratch.path().join("below/file"), [1; 10_000]).unwrap();
        assert!(scratch.occupied_bytes() >= 10_000);
        let path = scratch.path().to_owned();
        drop((scratch, disk));
        // The directory's lock is free again only once the removal is over.
        let mut opened = Disk::open(&root);
        for _ in 0..500 {
            if opened.is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            opened = Disk::open(&root);
        }
        drop(opened.unwrap());
        assert!(!path.exists());
        fs::create_dir_all(root.join("scratch/7/left")).unwrap();
        drop(Disk::open(&root).unwrap());
        assert!(root.join("scratch").exists() && !root.join("scratch/7").exists());
    }
}
