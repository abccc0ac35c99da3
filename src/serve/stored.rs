//! The store as [`Content`]: what serving reads.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::content::{Content, FileNode, FileState, OpenFile};
use crate::error::Result;
use crate::store::read::{OpenBlob, Reader};

/// The blobs of one checkpoint, all of them sealed.
#[derive(Debug)]
pub(super) struct StoredContent(pub(super) Arc<Reader>);

impl Content for StoredContent {
    fn open(&self, file: &FileNode) -> Result<Arc<dyn OpenFile>> {
        Ok(Arc::new(StoredFile(self.0.open(&file.digest, file.size)?)))
    }

    fn state(&self, file: &FileNode) -> FileState {
        if self.0.is_whole(&file.digest) { FileState::Passthrough } else { FileState::Compact }
    }
}

#[derive(Debug)]
struct StoredFile(OpenBlob);

impl OpenFile for StoredFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn whole(&self) -> Option<BorrowedFd<'_>> {
        self.0.whole()
    }
}
