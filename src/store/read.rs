//! Reading blobs, whole and compact, without the catalog.
//!
//! A [`Reader`] belongs to one served checkpoint and knows which of its blobs are compact. An [`OpenBlob`] reads through descriptors it
//! holds: its own file for what is here, its homes' files for what is borrowed. While any `OpenBlob` of a blob lives, the blob
//! is *held*: nothing punches it. A hydrated blob becomes whole for the next open; those open go on reading through their
//! homes, which stay as long as the rows do.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use crate::catalog::blobs::{BlobRow, Borrow};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Result};

/// Which blobs are held open, by number of holders.
#[derive(Clone, Debug, Default)]
pub struct Holds(Arc<Mutex<HashMap<Digest, usize>>>);

impl Holds {
    /// Whether anybody in this process holds the blob.
    pub fn is_held(&self, digest: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(digest)
    }

    fn hold(&self, digest: Digest) -> Hold {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(digest).or_insert(0) += 1;
        Hold { holds: self.clone(), digest }
    }
}

/// Keeps a blob from being punched.
#[derive(Debug)]
struct Hold {
    holds: Holds,
    digest: Digest,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holds = self.holds.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = holds.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                holds.remove(&self.digest);
            }
        }
    }
}

/// The reading side of one checkpoint's blobs.
#[derive(Debug)]
pub struct Reader {
    disk: Arc<Disk>,
    holds: Holds,
    /// Blobs with ranges that are not in them, and those ranges.
    compact: Mutex<HashMap<Digest, Arc<[Borrow]>>>,
}

impl Reader {
    pub(super) fn new(disk: Arc<Disk>, holds: Holds, blobs: Vec<(BlobRow, Vec<Borrow>)>) -> Self {
        let compact = blobs
            .into_iter()
            .map(|(blob, mut borrows)| {
                borrows.retain(|borrow| !borrow.filled);
                (blob.digest, Arc::from(borrows))
            })
            .filter(|(_, borrows): &(_, Arc<[Borrow]>)| !borrows.is_empty())
            .collect();
        Self { disk, holds, compact: Mutex::new(compact) }
    }

    /// Opens the blob of a file.
    ///
    /// # Errors
    /// The I/O error; a blob that is missing is corrupt.
    pub fn open(&self, digest: &Digest, size: u64) -> Result<OpenBlob> {
        let hold = self.holds.hold(*digest);
        let borrows = self.borrows(digest);
        let file = self.disk.open_blob(digest)?;
        let mut homes: HashMap<Digest, File> = HashMap::new();
        for borrow in borrows.iter() {
            if !homes.contains_key(&borrow.home) {
                homes.insert(borrow.home, self.disk.open_blob(&borrow.home)?);
            }
        }
        Ok(OpenBlob { file, size, borrows, homes, digest: *digest, _hold: hold })
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

/// A blob open for reading.
#[derive(Debug)]
pub struct OpenBlob {
    file: File,
    size: u64,
    borrows: Arc<[Borrow]>,
    homes: HashMap<Digest, File>,
    digest: Digest,
    _hold: Hold,
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
