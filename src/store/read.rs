//! Reading blobs, whole and compact, without the catalog.
//!
//! A [`Reader`] belongs to one served checkpoint and knows which of its blobs are compact. An [`OpenBlob`] reads through descriptors it
//! holds: its own file for what is here, its homes' files for what is borrowed. While a `Reader` lives, all blobs of its checkpoint
//! and their homes are *held*: nothing punches them. A hydrated blob becomes whole for the next open; those open go on reading through their
//! homes, which stay as long as the rows do.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use crate::catalog::blobs::{BlobRow, Borrow};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::manifest::{EntryKind, Manifest};

/// Which blobs are held open, by number of holders.
#[derive(Clone, Debug, Default)]
pub struct Holds(Arc<Mutex<HashMap<Digest, usize>>>);

impl Holds {
    /// Whether anybody in this process holds the blob.
    pub fn is_held(&self, digest: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }

    /// Keeps blobs from being punched for as long as what is returned lives.
    pub(super) fn hold(&self, digests: Vec<Digest>) -> Hold {
        let mut holds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        digests.iter().for_each(|digest| *holds.entry(*digest).or_insert(0) += 1);
        drop(holds);
        Hold { holds: self.clone(), digests }
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
        let mut holds = self.holds.0.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in &self.digests {
            if let Some(count) = holds.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    holds.remove(digest);
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
    pub(super) fn new(disk: Arc<Disk>, holds: &Holds, manifest: &Manifest, blobs: Vec<(BlobRow, Vec<Borrow>)>) -> Self {
        let named = manifest.entries().iter().filter_map(|entry| match &entry.kind {
            EntryKind::File { digest, .. } => Some(*digest),
            EntryKind::Directory | EntryKind::Symlink { .. } => None,
        });
        let homes = blobs.iter().flat_map(|(_, borrows)| borrows.iter().map(|borrow| borrow.home));
        let hold = holds.hold(named.chain(homes).collect());
        let compact = missing_ranges(blobs).collect();
        Self { disk, holds: holds.clone(), held: Mutex::new(vec![hold]), compact: Mutex::new(compact) }
    }

    /// One that knows no blob yet: see [`Reader::add`].
    pub(super) fn growing(disk: Arc<Disk>, holds: &Holds) -> Self {
        Self { disk, holds: holds.clone(), held: Mutex::default(), compact: Mutex::default() }
    }

    /// Makes blobs readable here, of which those in `blobs` are compact.
    pub(super) fn add(&self, digests: Vec<Digest>, blobs: Vec<(BlobRow, Vec<Borrow>)>) {
        let homes = blobs.iter().flat_map(|(_, borrows)| borrows.iter().map(|borrow| borrow.home));
        let hold = self.holds.hold(digests.into_iter().chain(homes).collect());
        self.held.lock().unwrap_or_else(PoisonError::into_inner).push(hold);
        self.compact.lock().unwrap_or_else(PoisonError::into_inner).extend(missing_ranges(blobs));
    }

    /// Opens the blob of a file.
    ///
    /// # Errors
    /// Corrupt for a blob that is missing, unavailable for anything else: the name is there, whatever became of the bytes.
    pub fn open(&self, digest: &Digest, size: u64) -> Result<OpenBlob> {
        let borrows = self.borrows(digest);
        let file = self.open_file(digest)?;
        let mut homes: HashMap<Digest, File> = HashMap::new();
        for borrow in borrows.iter() {
            if let std::collections::hash_map::Entry::Vacant(home) = homes.entry(borrow.home) {
                home.insert(self.open_file(&borrow.home)?);
            }
        }
        Ok(OpenBlob { file, size, borrows, homes, digest: *digest })
    }

    fn open_file(&self, digest: &Digest) -> Result<File> {
        self.disk.open_blob(digest).map_err(|error| match error.kind() {
            Kind::NotFound => Error::corrupt("BLOB_MISSING", format!("the blob {digest} is missing")).because(error),
            _ => Error::unavailable("BLOB_UNREADABLE", format!("the blob {digest} cannot be opened")).because(error),
        })
    }

    /// Whether all bytes of the blob are in it.
    pub fn is_whole(&self, digest: &Digest) -> bool {
        !self.compact.lock().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }

    /// Notes that a blob was hydrated.
    pub fn set_whole(&self, digest: &Digest) {
        self.compact.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
    }

    fn borrows(&self, digest: &Digest) -> Arc<[Borrow]> {
        let compact = self.compact.lock().unwrap_or_else(PoisonError::into_inner);
        compact.get(digest).cloned().unwrap_or_else(|| Arc::from([]))
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

/// A blob open for reading.
#[derive(Debug)]
pub struct OpenBlob {
    file: File,
    size: u64,
    borrows: Arc<[Borrow]>,
    homes: HashMap<Digest, File>,
    digest: Digest,
}

impl OpenBlob {
    /// The file itself if all bytes are in it.
    pub fn whole(&self) -> Option<BorrowedFd<'_>> {
        self.borrows.is_empty().then(|| self.file.as_fd())
    }

    /// Reads at `offset` until `buffer` is full or the file ends; returns the bytes read.
    ///
    /// # Errors
    /// The I/O error; a blob shorter than its size is corrupt.
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

    /// The file and offset that hold the bytes at `at`, and where that ends.
    fn piece(&self, at: u64, end: u64) -> Result<(&File, u64, u64)> {
        let next = self.borrows.partition_point(|borrow| borrow.start + borrow.len <= at);
        match self.borrows.get(next) {
            Some(borrow) if borrow.start <= at => {
                let home = self.homes.get(&borrow.home).ok_or_else(|| Error::internal("a home was not opened"))?;
                Ok((home, borrow.home_start + (at - borrow.start), end.min(borrow.start + borrow.len)))
            }
            Some(borrow) => Ok((&self.file, at, end.min(borrow.start))),
            None => Ok((&self.file, at, end)),
        }
    }
}
