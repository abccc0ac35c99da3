//! The state directory: the only part of ckptd that changes the file system below it.
//!
//! ```text
//! version                      "ckptd-state 1"
//! lock                         flock(2) held by the one daemon that owns the directory; holds its pid
//! catalog.db                   owned by the catalog
//! transfer.key                 what tokens of local transfers are derived from, mode 0600
//! filling/<flight>/<n>         blobs being filled, sparse, mode 0444 from birth
//! filling/<flight>/0           what has come of an upload by HTTP, is not recorded yet, and not where it belongs
//! filling/<flight>.ended-<m>/  what is about to be removed of one; as a flight that nobody needs, it goes at a start at the latest
//! blobs/ab/<file digest>       sealed blobs
//! quarantine/                  blobs whose bytes were not what they were stated to be
//! scratch/<n>/                 what a source needs on disk while it is read; emptied at every start
//! ```
//!
//! Durability: [`Disk::sync_file`] returns after `fdatasync`, [`Disk::sync_directories`] after `fsync` of the named
//! blob directories, [`Disk::sync_filesystem`] after `syncfs`. Renames and unlinks are durable only after the
//! directory is synced; the store orders them (the law is in `store`). A sync that fails *poisons* the disk:
//! what the kernel had promised to write may be lost, so from then on every change is refused with the first
//! failure, while reads go on. A restart reads back what is really there.
//!
//! Nothing here takes a lock or waits for anything but the disk; all of it blocks and belongs on blocking threads.

mod boot;
mod extents;
mod mending;
mod occupancy;
mod ownership;
mod read_ahead;
mod scratch;
mod secret;
mod spread;
mod tail;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, Flock};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::{DISK_BLOCK_BYTES, DISK_KEPT_BYTES};
use crate::units::show_bytes;

pub use boot::boot_id;
pub use extents::{FileId, SealedFile, clone_file};
pub use occupancy::{Filesystem, Occupied};
pub use scratch::Scratch;
pub use secret::SECRET_BYTES;
pub use tail::{Stretch, TAIL_BYTES, TAIL_NUMBER, Tail, TailLeft};

/// Version of the layout of the state directory; a daemon refuses a newer one untouched.
pub const STATE_VERSION: u32 = 1;

/// The owned, locked state directory.
#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
    root_handle: File,
    _lock: Flock<File>,
    reflink: bool,
    poison: OnceLock<String>,
    /// Flights set aside so far: see [`Disk::set_flight_aside`].
    set_aside: AtomicU64,
}

impl Disk {
    /// Creates or opens the state directory, takes its lock and checks its version.
    ///
    /// # Errors
    /// `STATE_DIR_IN_USE` (another daemon holds it), `STATE_DIR_TOO_NEW`, `STATE_DIR_FOREIGN` (not empty and not ours), or
    /// the I/O error with its path.
    pub fn open(root: &Path) -> Result<Self> {
        make_directory(root)?;
        let lock = ownership::take_lock(root)?;
        ownership::check_version(root)?;
        scratch::clear(root);
        for part in ["filling", "blobs", "quarantine", "scratch"] {
            make_directory(&root.join(part))?;
        }
        spread::spread_below(&root.join("filling"));
        for byte in 0..=u8::MAX {
            make_directory(&root.join(format!("blobs/{byte:02x}")))?;
        }
        let root_handle = File::open(root).map_err(|error| Error::io("opening", root, error))?;
        let reflink = extents::probe_reflink(root).unwrap_or_else(|error| {
            tracing::warn!(error = %error.report(), "it was not found out whether extents can be shared: none are until the next start");
            false
        });
        let (poison, set_aside) = (OnceLock::new(), AtomicU64::new(0));
        let disk = Self { root: root.to_owned(), root_handle, _lock: lock, reflink, poison, set_aside };
        disk.sync_filesystem()?;
        Ok(disk)
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the filesystem shares extents between files.
    pub fn reflink(&self) -> bool {
        self.reflink
    }

    /// Raises the read-ahead of the store's disk to `bytes`, if it is lower. What cannot be raised is logged and left: reads are
    /// slower then, and right.
    pub fn raise_read_ahead(&self, bytes: u64) {
        match read_ahead::raise(&self.root_handle, bytes) {
            Ok((before, after)) if after > before => {
                tracing::info!(before_kib = before, after_kib = after, "the read-ahead of the store's disk was raised");
            }
            Ok(_) => {}
            Err(why) => {
                tracing::warn!(root = %self.root.display(), why, "the read-ahead of the store's disk stays as it is");
            }
        }
    }

    /// Why nothing is written any more, if so.
    pub fn poisoned(&self) -> Option<&str> {
        self.poison.get().map(String::as_str)
    }

    /// Stops all writing until the next start: what is on disk is not what was meant to be.
    pub fn stop_writing(&self, error: &Error) {
        let _ = self.poison.set(error.chain());
        tracing::error!(error = %error.report(), "the store stops writing");
    }

    /// Refuses work on a poisoned disk.
    ///
    /// # Errors
    /// `STORE_POISONED`.
    pub fn check_healthy(&self) -> Result<()> {
        match self.poisoned() {
            None => Ok(()),
            Some(why) => Err(Error::unavailable(
                "STORE_POISONED",
                format!("the store {} no longer writes since an earlier failure: {why}", self.root.display()),
            )
            .remedy("check the disk and restart ckptd")),
        }
    }

    /// Where the catalog lives.
    pub fn catalog_path(&self) -> PathBuf {
        self.root.join("catalog.db")
    }

    /// Path of a sealed blob.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root.join("blobs").join(&hex[..2]).join(hex)
    }

    /// Path of a blob being filled.
    pub fn filling_path(&self, flight: &str, number: u64) -> PathBuf {
        self.root.join("filling").join(flight).join(number.to_string())
    }

    /// Bytes free for us on the filesystem.
    ///
    /// # Errors
    /// The I/O error.
    pub fn free_bytes(&self) -> Result<u64> {
        let stat = nix::sys::statvfs::fstatvfs(&self.root_handle)
            .map_err(|errno| Error::io("asking for free space of", &self.root, errno.into()))?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }

    /// Refuses to write `bytes` more where that would touch what is kept free: the catalog must always be able to commit.
    ///
    /// # Errors
    /// `NO_SPACE` with the figures; the I/O error.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        let available = self.free_bytes()?.saturating_sub(DISK_KEPT_BYTES);
        if bytes <= available {
            return Ok(());
        }
        Err(Error::no_space(
            "NO_SPACE",
            format!("the filesystem of {} is full ({} left to fill)", self.root.display(), show_bytes(available)),
        )
        .fact("available_bytes", available)
        .remedy("free space or remove checkpoints, then retry"))
    }

    /// Makes the directory that a flight fills into.
    ///
    /// # Errors
    /// The I/O error.
    pub fn begin_flight(&self, flight: &str) -> Result<()> {
        self.check_healthy()?;
        make_directory(&self.root.join("filling").join(flight))
    }

    /// Whether a blob being filled is there at its full `size`.
    ///
    /// # Errors
    /// The I/O error.
    pub fn has_filling(&self, flight: &str, number: u64, size: u64) -> Result<bool> {
        let path = self.filling_path(flight, number);
        match fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(metadata.len() == size),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("examining", &path, error)),
        }
    }

    /// Creates (empty) or opens a blob being filled, sparse at its full `size`, for reading and writing. Also tells whether it was
    /// there already with that size: only then may durable units of it be believed.
    ///
    /// # Errors
    /// The I/O error; no space is taken yet.
    pub fn open_filling(&self, flight: &str, number: u64, size: u64) -> Result<(File, bool)> {
        self.check_healthy()?;
        let path = self.filling_path(flight, number);
        let was_there = path.exists();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o444)
            .open(&path)
            .map_err(|error| Error::io("creating", &path, error))?;
        let now = file.metadata().map_err(|error| Error::io("examining", &path, error))?.len();
        if now != size {
            file.set_len(size).map_err(|error| Error::io("sizing", &path, error))?;
        }
        Ok((file, was_there && now == size))
    }

    /// Writes the whole of a small file that is being filled.
    ///
    /// # Errors
    /// The I/O error; the half-written file is removed.
    pub fn write_filling(&self, flight: &str, number: u64, bytes: &[u8]) -> Result<()> {
        self.write_filling_with(flight, number, bytes.len() as u64, |write| write(bytes))
    }

    /// The same of `size` bytes that `make` hands over piece by piece. Where it fails nothing is left.
    ///
    /// # Errors
    /// As [`Disk::write_filling`]; those of `make`.
    pub fn write_filling_with<R>(
        &self,
        flight: &str,
        number: u64,
        size: u64,
        make: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<R>,
    ) -> Result<R> {
        self.check_healthy()?;
        self.check_room(size)?;
        let path = self.filling_path(flight, number);
        let wrong = |error| Error::io("writing", &path, error);
        let made = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o444)
            .open(&path)
            .map_err(wrong)
            .and_then(|mut file| make(&mut |bytes| file.write_all(bytes).map_err(wrong)));
        if made.is_err() {
            let _ = fs::remove_file(&path);
        }
        made
    }

    /// Removes one blob being filled; gone already is fine.
    ///
    /// # Errors
    /// The I/O error.
    pub fn remove_filling(&self, flight: &str, number: u64) -> Result<()> {
        remove_file(&self.filling_path(flight, number))
    }

    /// Removes the files of a flight whose numbers are not among `kept`.
    ///
    /// # Errors
    /// The I/O error.
    pub fn clear_flight(&self, flight: &str, kept: &[u64]) -> Result<()> {
        let path = self.root.join("filling").join(flight);
        let entries = match fs::read_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(|error| Error::io("listing", &path, error))?,
        };
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("listing", &path, error))?;
            let number = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
            if number.is_none_or(|number| !kept.contains(&number)) {
                remove_file(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Takes what a flight has filled out of the way of the next of the same name, which finds nothing of it. Returns the name under which
    /// it is to be ended, never used again by this process; `None` where there is nothing. One rename, whatever there is.
    ///
    /// # Errors
    /// The I/O error.
    pub fn set_flight_aside(&self, flight: &str) -> Result<Option<String>> {
        let aside = format!("{flight}.ended-{}", self.set_aside.fetch_add(1, Ordering::Relaxed));
        let path = self.root.join("filling").join(flight);
        match fs::rename(&path, path.with_file_name(&aside)) {
            Ok(()) => Ok(Some(aside)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("setting aside", &path, error)),
        }
    }

    /// Removes everything a flight has filled; gone already is fine.
    ///
    /// # Errors
    /// The I/O error.
    pub fn end_flight(&self, flight: &str) -> Result<()> {
        let path = self.root.join("filling").join(flight);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", &path, error)),
            _ => Ok(()),
        }
    }

    /// Names of the flights that have left something in `filling/`.
    ///
    /// # Errors
    /// The I/O error.
    pub fn flights(&self) -> Result<Vec<String>> {
        let path = self.root.join("filling");
        let entries = fs::read_dir(&path).map_err(|error| Error::io("listing", &path, error))?;
        entries
            .map(|entry| match entry {
                Ok(entry) => Ok(entry.file_name().to_string_lossy().into_owned()),
                Err(error) => Err(Error::io("listing", &path, error)),
            })
            .collect()
    }

    /// Flushes a file's bytes to the disk.
    ///
    /// # Errors
    /// The I/O error, after which the disk is poisoned.
    pub fn sync_file(&self, file: &File, path: &Path) -> Result<()> {
        file.sync_data().map_err(|error| self.poisoned_by(Error::io("flushing", path, error)))
    }

    /// Asks the kernel to begin writing back `range`; a hint, so failures are of no consequence here (the flush reports them).
    pub fn begin_write_back(&self, file: &File, range: Range<u64>) {
        let (Ok(offset), Ok(length)) = (i64::try_from(range.start), i64::try_from(range.end - range.start)) else {
            return;
        };
        // SAFETY: plain system call on a descriptor that `file` keeps open; no memory is passed.
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    }

    /// Makes the names in the directories of `digests` durable.
    ///
    /// # Errors
    /// The I/O error, after which the disk is poisoned.
    pub fn sync_directories<'a>(&self, digests: impl Iterator<Item = &'a Digest>) -> Result<()> {
        let mut prefixes: Vec<u8> = digests.map(|digest| digest.as_bytes()[0]).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        for prefix in prefixes {
            let path = self.root.join(format!("blobs/{prefix:02x}"));
            let directory = File::open(&path).map_err(|error| Error::io("opening", &path, error))?;
            directory.sync_all().map_err(|error| self.poisoned_by(Error::io("flushing", &path, error)))?;
        }
        Ok(())
    }

    /// Flushes everything of the state directory's filesystem.
    ///
    /// # Errors
    /// The I/O error, after which the disk is poisoned.
    pub fn sync_filesystem(&self) -> Result<()> {
        nix::unistd::syncfs(&self.root_handle)
            .map_err(|errno| self.poisoned_by(Error::io("flushing the filesystem of", &self.root, errno.into())))
    }

    /// Gives a filled blob its final name; not durable before the directory is synced. Replaces what bears the name: equal
    /// digest, equal bytes.
    ///
    /// # Errors
    /// The I/O error.
    pub fn publish(&self, flight: &str, number: u64, digest: &Digest) -> Result<()> {
        self.check_healthy()?;
        let from = self.filling_path(flight, number);
        fs::rename(&from, self.blob_path(digest)).map_err(|error| Error::io("publishing", &from, error))
    }

    /// Undoes [`Disk::publish`] of a file that got no row; whether there was anything to undo. Where the flight has made that file anew meanwhile,
    /// what was published goes.
    ///
    /// # Errors
    /// The I/O error.
    pub fn unpublish(&self, digest: &Digest, flight: &str, number: u64) -> Result<bool> {
        self.check_healthy()?;
        let (from, to) = (self.blob_path(digest), self.filling_path(flight, number));
        let is_there = |path: &Path| path.try_exists().map_err(|error| Error::io("examining", path, error));
        if !is_there(&from)? {
            return Ok(false);
        }
        if is_there(&to)? {
            return remove_file(&from).map(|()| true);
        }
        self.begin_flight(flight)?;
        fs::rename(&from, &to).map_err(|error| Error::io("taking back", &from, error))?;
        Ok(true)
    }

    /// Opens a sealed blob for reading.
    ///
    /// # Errors
    /// The I/O error.
    pub fn open_blob(&self, digest: &Digest) -> Result<File> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|error| Error::io("opening", &path, error))
    }

    /// Bytes a sealed blob occupies.
    ///
    /// # Errors
    /// The I/O error.
    pub fn stored_bytes(&self, digest: &Digest) -> Result<u64> {
        let path = self.blob_path(digest);
        let metadata = fs::metadata(&path).map_err(|error| Error::io("examining", &path, error))?;
        Ok(metadata.blocks() * 512)
    }

    /// Removes a sealed blob; gone already is fine.
    ///
    /// # Errors
    /// The I/O error.
    pub fn remove_blob(&self, digest: &Digest) -> Result<()> {
        self.check_healthy()?;
        remove_file(&self.blob_path(digest))
    }

    /// Turns the whole disk blocks inside each range into holes.
    ///
    /// # Errors
    /// The I/O error.
    pub fn punch(&self, digest: &Digest, ranges: &[Range<u64>]) -> Result<()> {
        self.check_healthy()?;
        let (file, path) = self.open_to_change(digest)?;
        for range in ranges {
            let start = range.start.next_multiple_of(DISK_BLOCK_BYTES);
            let end = range.end / DISK_BLOCK_BYTES * DISK_BLOCK_BYTES;
            if start >= end {
                continue;
            }
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            nix::fcntl::fallocate(&file, flags, offset(start)?, offset(end - start)?)
                .map_err(|errno| Error::io("punching", &path, errno.into()))?;
        }
        Ok(())
    }

    /// Moves a file that was filled wrongly out of sight for examination; returns where it is. It replaces an earlier one of the same flight
    /// and number.
    ///
    /// # Errors
    /// The I/O error.
    pub fn quarantine_filling(&self, flight: &str, number: u64) -> Result<PathBuf> {
        let from = self.filling_path(flight, number);
        let to = self.root.join("quarantine").join(format!("{flight}-{number}"));
        fs::rename(&from, &to).map_err(|error| Error::io("quarantining", &from, error))?;
        Ok(to)
    }

    /// Moves a sealed blob out of sight for examination.
    ///
    /// # Errors
    /// The I/O error.
    pub fn quarantine(&self, digest: &Digest) -> Result<()> {
        let from = self.blob_path(digest);
        let to = self.root.join("quarantine").join(digest.to_hex());
        fs::rename(&from, to).map_err(|error| Error::io("quarantining", &from, error))
    }

    fn open_to_change(&self, digest: &Digest) -> Result<(File, PathBuf)> {
        let path = self.blob_path(digest);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| Error::io("opening to change", &path, error))?;
        Ok((file, path))
    }

    fn poisoned_by(&self, error: Error) -> Error {
        self.stop_writing(&error);
        error
    }
}

fn offset(bytes: u64) -> Result<i64> {
    i64::try_from(bytes)
        .map_err(|_| Error::invalid("OFFSET_TOO_LARGE", format!("the offset {bytes} is beyond what files can have")))
}

fn make_directory(path: &Path) -> Result<()> {
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(error) => {
            Err(Error::io("creating the directory", path, error)
                .remedy("check that its parent is a writable directory"))
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_a_newer_version_and_a_foreign_directory_are_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("state");
        let disk = Disk::open(&root).unwrap();
        assert_eq!(Disk::open(&root).unwrap_err().reason(), "STATE_DIR_IN_USE");
        drop(disk);
        fs::write(root.join("version"), "ckptd-state 9\n").unwrap();
        assert_eq!(Disk::open(&root).unwrap_err().reason(), "STATE_DIR_TOO_NEW");
        fs::write(root.join("version"), "something\n").unwrap();
        assert_eq!(Disk::open(&root).unwrap_err().reason(), "STATE_DIR_FOREIGN");
        let other = temporary.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("thesis.tex"), "x").unwrap();
        assert_eq!(Disk::open(&other).unwrap_err().reason(), "STATE_DIR_FOREIGN");
    }

    #[test]
    fn punching_keeps_what_is_outside_whole_disk_blocks() {
        let temporary = tempfile::tempdir().unwrap();
        let disk = Disk::open(&temporary.path().join("state")).unwrap();
        let bytes = vec![7_u8; 64 << 10];
        let digest = Digest::of(&bytes);
        disk.begin_flight("f").unwrap();
        disk.write_filling("f", 0, &bytes).unwrap();
        disk.publish("f", 0, &digest).unwrap();
        let before = disk.stored_bytes(&digest).unwrap();
        disk.punch(&digest, std::slice::from_ref(&(100..40_000))).unwrap();
        assert!(disk.stored_bytes(&digest).unwrap() < before);
        let now = fs::read(disk.blob_path(&digest)).unwrap();
        assert!(now[..4096].iter().chain(&now[36_864..]).all(|byte| *byte == 7));
        assert!(now[4096..36_864].iter().all(|byte| *byte == 0));
    }
}
