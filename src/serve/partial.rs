//! A flight as [`Content`]: what a job sees that did not wait.
//!
//! A file is opened through what fills it, and through its blob from the first open after it was sealed; so files become the kernel's to
//! read one by one, without a remount. A handle that was opened early goes on through the daemon, whatever becomes of the file's name:
//! the kernel allows one mode at a time.
//!
//! Bytes that are not here are waited for without a thread ([`Arriving::when_here`]).

use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};

use super::content::{Content, FileNode, FileState, OpenFile, Resume};
use crate::digest::Digest;
use crate::error::Result;
use crate::ingest::arriving::{Arriving, Reading};
use crate::store::read::OpenBlob;

/// Inode of the first entry: the root is 1.
const FIRST_INODE: u64 = 2;

/// The files of a checkpoint that fills, or that was still filling when it was first shown.
pub(super) struct PartialContent {
    arriving: Arc<Arriving>,
    _reading: Reading,
}

impl PartialContent {
    /// Shows what `arriving` brings, which makes way for its readers from now on.
    ///
    /// # Errors
    /// Those of the catalog.
    pub(super) async fn new(arriving: Arc<Arriving>) -> Result<Self> {
        let reading = arriving.read().await?;
        Ok(Self { arriving, _reading: reading })
    }
}

fn entry_of(file: &FileNode) -> u32 {
    u32::try_from(file.inode.saturating_sub(FIRST_INODE)).unwrap_or(u32::MAX)
}

impl Content for PartialContent {
    fn open(&self, file: &FileNode) -> Result<Arc<dyn OpenFile>> {
        let entry = entry_of(file);
        let sealed = OnceLock::new();
        if let Some(blob) = self.arriving.open_sealed(entry)? {
            let _ = sealed.set(blob);
        }
        Ok(Arc::new(PartialFile { arriving: self.arriving.clone(), entry, size: file.size, sealed }))
    }

    fn state(&self, file: &FileNode) -> FileState {
        let entry = entry_of(file);
        match self.arriving.here_bytes(entry) {
            None if self.arriving.is_whole(entry) => FileState::Passthrough,
            None => FileState::Compact,
            Some(here) => {
                let percent = here.saturating_mul(100).checked_div(file.size).unwrap_or(0).min(99);
                FileState::Filling { percent: u8::try_from(percent).unwrap_or(99) }
            }
        }
    }

    fn is_unverified(&self) -> bool {
        true
    }

    fn digest(&self, file: &FileNode) -> Option<Digest> {
        self.arriving.digest(entry_of(file))
    }
}

struct PartialFile {
    arriving: Arc<Arriving>,
    entry: u32,
    size: u64,
    sealed: OnceLock<OpenBlob>,
}

impl PartialFile {
    fn range(&self, offset: u64, length: usize) -> std::ops::Range<u64> {
        offset..offset.saturating_add(length as u64).min(self.size)
    }
}

impl OpenFile for PartialFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        match self.sealed.get() {
            Some(blob) => blob.read_at(buf, offset),
            None => self.arriving.read_at(self.entry, buf, offset),
        }
    }

    fn whole(&self) -> Option<BorrowedFd<'_>> {
        self.sealed.get().and_then(OpenBlob::whole)
    }

    fn kept_pages_are_right(&self) -> bool {
        !self.arriving.is_distrusted()
    }

    fn here(&self, offset: u64, length: usize) -> bool {
        self.sealed.get().is_some() || self.arriving.is_here(self.entry, self.range(offset, length))
    }

    fn when_here(&self, offset: u64, length: usize, resume: Resume) -> Option<u64> {
        if self.sealed.get().is_some() {
            resume(Ok(()));
            return None;
        }
        self.arriving.when_here(self.entry, self.range(offset, length), resume)
    }

    fn give_up(&self, waiting: u64) {
        self.arriving.give_up(self.entry, waiting);
    }
}
