//! Reading blobs, whole and compact, without the catalog.
//!
//! A [`Reader`] belongs to one served checkpoint and knows which of its blobs are compact. An [`OpenBlob`] reads through descriptors it
//! holds: its own file for what is here, its homes' files for what is borrowed. While a `Reader` lives, all blobs of its checkpoint
//! and their homes are *held*: nothing punches them. A hydrated blob becomes whole for the next open; those open go on reading through their
//! homes, which stay as long as the rows do. Where a home was lost, they go on with what of it was brought into them before ([`rescue`](super::rescue)).

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::catalog::blobs::{BlobRow, Borrow};
use crate::digest::Digest;
use crate::disk::{Disk, FileId};
use crate::error::{Error, Kind, Result};
use crate::manifest::{EntryKind, Manifest};

/// Which blobs are held open, by number of holders; and which files are open.
#[derive(Clone, Debug, Default)]
pub struct Holds(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    holders: HashMap<Digest, usize>,
    /// Whether blobs that nobody holds may be read all the same.
    nothing_is_punched: bool,
    /// What whoever has the file open is to be told.
    open: HashMap<Digest, Weak<AtomicBool>>,
    forget_from: usize,
    /// Of blobs that are held, what their holders' rows do not say.
    brought: HashMap<Digest, Brought>,
}

/// Homes all of whose bytes that a blob borrowed are in its file since its rows were read.
#[derive(Debug)]
struct Brought {
    file: FileId,
    homes: Vec<Digest>,
}

/// Names of files that were open remembered before they are looked through.
const FORGET_FROM: usize = 1024;

impl Holds {
    /// Whether anybody in this process holds the blob.
    pub fn is_held(&self, digest: &Digest) -> bool {
        self.locked().holders.contains_key(digest)
    }

    /// Whether the blob must not be punched: somebody holds it, or may read it unknown to us.
    pub(super) fn is_spared(&self, digest: &Digest) -> bool {
        let held = self.locked();
        held.nothing_is_punched || held.holders.contains_key(digest)
    }

    /// Has every blob spared that there is, for as long as the process lives.
    pub(super) fn spare_all(&self) {
        self.locked().nothing_is_punched = true;
    }

    /// [`Holds::hold`] for all files of a tree.
    pub(super) fn hold_files(&self, manifest: &Manifest) -> Hold {
        let named = manifest.entries().iter().filter_map(|entry| match &entry.kind {
            EntryKind::File { digest, .. } => Some(*digest),
            EntryKind::Directory | EntryKind::Symlink { .. } => None,
        });
        self.hold(named.collect())
    }

    /// Keeps blobs from being punched for as long as what is returned lives.
    pub(super) fn hold(&self, digests: Vec<Digest>) -> Hold {
        let mut held = self.locked();
        digests.iter().for_each(|digest| *held.holders.entry(*digest).or_insert(0) += 1);
        drop(held);
        Hold { holds: self.clone(), digests }
    }

    /// Whoever has the file of this name open now is not to read it any more; one that takes its place is another.
    pub(super) fn mark_lost(&self, digest: &Digest) {
        if let Some(mark) = self.locked().open.remove(digest).and_then(|mark| mark.upgrade()) {
            mark.store(true, Ordering::Relaxed);
        }
    }

    /// Whoever reads a blob need not have what it borrows from `home` from there: it is in the blob's own file too, and stays while it is held.
    pub(super) fn set_brought(&self, digest: &Digest, file: FileId, home: &Digest) {
        let mut held = self.locked();
        if held.holders.contains_key(digest) {
            let brought = held.brought.entry(*digest).or_insert(Brought { file, homes: Vec::new() });
            if brought.file != file {
                *brought = Brought { file, homes: Vec::new() };
            }
            brought.homes.push(*home);
        }
    }

    /// Whether what a blob borrows from `home` is in `file` of it too.
    fn is_brought(&self, digest: &Digest, file: &File, home: &Digest) -> bool {
        let held = self.locked();
        let Some(brought) = held.brought.get(digest) else { return false };
        brought.homes.contains(home) && FileId::of(file).is_ok_and(|id| id == brought.file)
    }

    /// What [`Holds::mark_lost`] sets for the file that bears this name now.
    fn mark_of(&self, digest: &Digest) -> Arc<AtomicBool> {
        let mut held = self.locked();
        if let Some(mark) = held.open.get(digest).and_then(Weak::upgrade) {
            return mark;
        }
        if held.open.len() >= held.forget_from.max(FORGET_FROM) {
            held.open.retain(|_, mark| mark.strong_count() > 0);
            held.forget_from = held.open.len() * 2;
        }
        let mark = Arc::new(AtomicBool::new(false));
        held.open.insert(*digest, Arc::downgrade(&mark));
        mark
    }

    fn locked(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps blobs from being punched.
#[derive(Debug)]
pub struct Hold {
    holds: Holds,
    digests: Vec<Digest>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.holds.locked();
        for digest in &self.digests {
            if let Some(count) = held.holders.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    held.holders.remove(digest);
                    held.brought.remove(digest);
                }
            }
        }
    }
}

/// The reading side of one checkpoint's blobs.
#[derive(Debug)]
pub struct Reader {
    disk: Arc<Disk>,
    holds: Holds,
    held: Mutex<Vec<Hold>>,
    /// Blobs with ranges that are not in them, and those ranges.
    compact: Mutex<HashMap<Digest, Arc<[Borrow]>>>,
}

impl Reader {
    /// One that knows no blob yet: see [`Reader::add`].
    pub(super) fn growing(disk: Arc<Disk>, holds: &Holds) -> Self {
        Self { disk, holds: holds.clone(), held: Mutex::default(), compact: Mutex::default() }
    }

    /// Makes the blobs of `hold` readable here, of which those in `blobs`, read after the hold was taken, are compact.
    pub(super) fn add(&self, hold: Hold, blobs: Vec<(BlobRow, Vec<Borrow>)>) {
        let homes = blobs.iter().flat_map(|(_, borrows)| borrows.iter().map(|borrow| borrow.home));
        let homes = self.holds.hold(homes.collect());
        self.held.lock().unwrap_or_else(PoisonError::into_inner).extend([hold, homes]);
        self.compact.lock().unwrap_or_else(PoisonError::into_inner).extend(missing_ranges(blobs));
    }

    /// Opens the blob of a file.
    ///
    /// # Errors
    /// Corrupt for a blob that is missing, unavailable for anything else: the name is there, whatever became of the bytes.
    pub fn open(&self, digest: &Digest, size: u64) -> Result<OpenBlob> {
        let file = self.open_file(digest)?;
        let borrows = self.borrows(digest, &file.file);
        let mut homes: HashMap<Digest, Opened> = HashMap::new();
        for borrow in borrows.iter() {
            if let std::collections::hash_map::Entry::Vacant(home) = homes.entry(borrow.home) {
                home.insert(self.open_file(&borrow.home)?);
            }
        }
        Ok(OpenBlob { file, size, borrows, homes, digest: *digest, holds: self.holds.clone() })
    }

    fn open_file(&self, digest: &Digest) -> Result<Opened> {
        // Before the file: of one that is lost in between, the mark is set, or the file is not found.
        let lost = self.holds.mark_of(digest);
        let opened = self.disk.open_blob(digest).map_err(|error| match error.kind() {
            Kind::NotFound => Error::corrupt("BLOB_MISSING", format!("the blob {digest} is missing")).because(error),
            _ => Error::unavailable("BLOB_UNREADABLE", format!("the blob {digest} cannot be opened")).because(error),
        });
        Ok(Opened { file: opened?, lost })
    }

    /// Whether all bytes of the blob are in it.
    pub fn is_whole(&self, digest: &Digest) -> bool {
        !self.compact.lock().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }

    /// Notes that a blob was hydrated.
    pub fn set_whole(&self, digest: &Digest) {
        self.compact.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
    }

    /// What is not in this file of a blob.
    fn borrows(&self, digest: &Digest, file: &File) -> Arc<[Borrow]> {
        let compact = self.compact.lock().unwrap_or_else(PoisonError::into_inner);
        let borrows = compact.get(digest).cloned().unwrap_or_else(|| Arc::from([]));
        drop(compact);
        let is_brought = |borrow: &Borrow| self.holds.is_brought(digest, file, &borrow.home);
        if borrows.iter().any(is_brought) {
            return borrows.iter().filter(|borrow| !is_brought(borrow)).copied().collect();
        }
        borrows
    }
}

/// Of each blob the ranges that are not in it; blobs that are whole are left out.
fn missing_ranges(blobs: Vec<(BlobRow, Vec<Borrow>)>) -> impl Iterator<Item = (Digest, Arc<[Borrow]>)> {
    let ranges = blobs.into_iter().map(|(blob, mut borrows)| {
        borrows.retain(|borrow| !borrow.filled);
        (blob.digest, Arc::from(borrows))
    });
    ranges.filter(|(_, borrows): &(_, Arc<[Borrow]>)| !borrows.is_empty())
}

/// A blob's file.
#[derive(Debug)]
struct Opened {
    file: File,
    /// Whether its bytes were found to be rotten since it was opened.
    lost: Arc<AtomicBool>,
}

/// A blob open for reading.
#[derive(Debug)]
pub struct OpenBlob {
    file: Opened,
    size: u64,
    borrows: Arc<[Borrow]>,
    homes: HashMap<Digest, Opened>,
    digest: Digest,
    holds: Holds,
}

impl OpenBlob {
    /// The file itself if all bytes are in it.
    pub fn whole(&self) -> Option<BorrowedFd<'_>> {
        self.borrows.is_empty().then(|| self.file.file.as_fd())
    }

    /// Reads at `offset` until `buffer` is full or the file ends; returns the bytes read.
    ///
    /// # Errors
    /// The I/O error; a blob shorter than its size is corrupt, and one whose bytes are known to be rotten.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let end = self.size.min(offset.saturating_add(buffer.len() as u64));
        let mut at = offset;
        let mut done = 0;
        while at < end {
            let (source, source_at, until) = self.piece(at, end)?;
            let length = usize::try_from(until - at).unwrap_or(usize::MAX).min(buffer.len() - done);
            source
                .read_exact_at(&mut buffer[done..done + length], source_at)
                .map_err(|error| Error::io("reading the blob", self.digest.to_hex(), error))?;
            done += length;
            at += length as u64;
        }
        Ok(done)
    }

    /// The blob's digest.
    pub(super) fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Its own file and those of its homes.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        std::iter::once(&self.file).chain(self.homes.values()).map(|opened| &opened.file)
    }

    /// The file and offset that hold the bytes at `at`, and where that ends.
    pub(super) fn piece(&self, at: u64, end: u64) -> Result<(&File, u64, u64)> {
        let (opened, start, until, home) = self.place(at, end)?;
        if opened.lost.load(Ordering::Relaxed) {
            let is_brought = |home| self.holds.is_brought(&self.digest, &self.file.file, home);
            if home.is_some_and(is_brought) && !self.file.lost.load(Ordering::Relaxed) {
                return Ok((&self.file.file, at, until));
            }
            let message = format!("bytes of the blob {} rotted on the disk", self.digest);
            return Err(Error::corrupt("BYTES_ROTTEN", message).remedy("retry the checkpoint"));
        }
        Ok((&opened.file, start, until))
    }

    fn place(&self, at: u64, end: u64) -> Result<(&Opened, u64, u64, Option<&Digest>)> {
        let next = self.borrows.partition_point(|borrow| borrow.start + borrow.len <= at);
        match self.borrows.get(next) {
            Some(borrow) if borrow.start <= at => {
                let home = self.homes.get(&borrow.home).ok_or_else(|| Error::internal("a home was not opened"))?;
                let until = end.min(borrow.start + borrow.len);
                Ok((home, borrow.home_start + (at - borrow.start), until, Some(&borrow.home)))
            }
            Some(borrow) => Ok((&self.file, at, end.min(borrow.start), None)),
            None => Ok((&self.file, at, end, None)),
        }
    }
}
