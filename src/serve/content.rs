//! What serving asks of the store: open a file's bytes by its digest, and say how they are here.
//!
//! Serving knows nothing of blobs, holes or catalogs. The store knows nothing of FUSE. The rules between the two:
//!
//! - A loop that answers the kernel must never wait. [`Content::open`], [`Content::state`] and [`OpenFile::read_at`] may touch
//!   the disk, never the network, SQLite, or a lock that is held over either.
//! - A read of bytes that are not here yet goes through [`OpenFile::when_here`], which returns at once and answers from
//!   a thread that may wait.
//! - While an `Arc<dyn OpenFile>` whose [`OpenFile::whole`] was given to the kernel is alive, no byte of that file is punched:
//!   the kernel reads it without asking anybody.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::Result;

/// A regular file of the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileNode {
    /// Inode number: which entry it is.
    pub inode: u64,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Length in bytes when they are all here.
    pub size: u64,
}

/// The bytes of all files that a session shows.
pub trait Content: Send + Sync + 'static {
    /// Opens the bytes of `file`.
    ///
    /// # Errors
    /// The errno that the opener sees follows from the kind.
    fn open(&self, file: &FileNode) -> Result<Arc<dyn OpenFile>>;

    /// How the bytes of `file` are here now.
    fn state(&self, file: &FileNode) -> FileState;

    /// Whether bytes are given out that may turn out to be wrong: what still arrives is unverified until it is whole.
    fn is_unverified(&self) -> bool {
        false
    }

    /// Digest of the bytes of `file`; `None` while it is not known.
    fn digest(&self, file: &FileNode) -> Option<Digest> {
        Some(file.digest)
    }
}

/// What is run once bytes are here, or cannot come.
pub type Resume = Box<dyn FnOnce(Result<()>) + Send>;

/// The bytes of one file.
pub trait OpenFile: Send + Sync {
    /// Fills `buf` from `offset`; less than asked only at the end of the file. Touches the disk only, and is called for
    /// bytes of which [`OpenFile::here`] was true or [`OpenFile::when_here`] said so.
    ///
    /// # Errors
    /// The errno that the reader sees follows from the kind.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize>;

    /// `Some` where the file is sealed and without holes: it may be given to the kernel. The `Arc` is kept as long as the kernel
    /// has it.
    fn whole(&self) -> Option<BorrowedFd<'_>>;

    /// Whether pages that the kernel has of the file from earlier opens are right.
    fn kept_pages_are_right(&self) -> bool {
        true
    }

    /// Whether `length` bytes from `offset` can be read now. Cheap.
    fn here(&self, offset: u64, length: usize) -> bool {
        let _ = (offset, length);
        true
    }

    /// Arranges that `resume` is run exactly once, on a thread that may wait, when `length` bytes from `offset` are here or
    /// have failed for good; returns at once. The bytes are wanted: they move to the head of the fetch queue. Where something waits now that
    /// can be taken back, its number is returned.
    fn when_here(&self, offset: u64, length: usize, resume: Resume) -> Option<u64> {
        let _ = (offset, length);
        resume(Ok(()));
        None
    }

    /// Drops what waits under this number: nobody is there any more. What was run or is being run is not touched.
    fn give_up(&self, waiting: u64) {
        let _ = waiting;
    }
}

/// How a file's bytes are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// Sealed and whole: the kernel may read it itself.
    Passthrough,
    /// Sealed with holes: the daemon answers until they are filled.
    Compact,
    /// The daemon answers: kept elsewhere.
    Daemon,
    /// Still arriving.
    Filling {
        /// Whole percent that is here, 0 to 99.
        percent: u8,
    },
}
