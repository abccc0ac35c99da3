//! Turning compact blobs whole again, so that jobs read them by passthrough.
//!
//! Order: bytes into the blob, `fdatasync`, rows marked filled, live readers told. A crash in between leaves a blob that still
//! borrows; its extra bytes are given up at the next punch. Hydration stops when space gets tight: compact blobs are right, only slower.

use std::sync::Arc;

use super::Store;
use super::read::Reader;
use crate::catalog::blobs::{self, BlobRow, Borrow};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// What hydrating a checkpoint did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hydrated {
    /// Blobs made whole.
    pub blobs: u64,
    /// Blobs left compact for want of space.
    pub left: u64,
}

impl Store {
    /// Makes the compact blobs of a manifest whole while space allows, and tells `reader`.
    ///
    /// # Errors
    /// The I/O error; what was hydrated before it stays.
    pub async fn hydrate(&self, manifest: Digest, reader: &Arc<Reader>) -> Result<Hydrated> {
        let _one_at_a_time = self.hydrations.acquire().await.map_err(|_| super::stopped())?;
        let compact = self.catalog().read(move |tx| blobs::compact_blobs(tx, &manifest)).await?;
        let mut outcome = Hydrated::default();
        for (blob, borrows) in compact {
            let missing: Vec<Borrow> = borrows.into_iter().filter(|borrow| !borrow.filled).collect();
            if missing.is_empty() {
                reader.set_whole(&blob.digest);
                continue;
            }
            let bytes: u64 = missing.iter().map(|borrow| borrow.len).sum();
            if self.available_bytes()? < bytes.saturating_mul(2) {
                outcome.left += 1;
                continue;
            }
            if self.hydrate_blob(blob, missing).await? {
                reader.set_whole(&blob.digest);
                outcome.blobs += 1;
            }
        }
        Ok(outcome)
    }

    /// Whether the blob is whole now. Removal drops a blob's rows before its name, and ids are never used again: rows that are there after the
    /// file was opened prove that it is the file they speak of.
    async fn hydrate_blob(&self, blob: BlobRow, missing: Vec<Borrow>) -> Result<bool> {
        let disk = self.disk().clone();
        let file = disk.open_sealed(&blob.digest)?;
        let present = self.catalog().read(move |tx| blobs::borrows_of(tx, blob.id)).await?;
        if present.iter().filter(|borrow| !borrow.filled).ne(missing.iter()) {
            return Ok(false);
        }
        let stored = tokio::task::spawn_blocking(move || {
            for borrow in &missing {
                let range = borrow.start..borrow.start + borrow.len;
                file.bring_home(&disk, range, &borrow.home, borrow.home_start)?;
            }
            file.flush(&disk)
        })
        .await
        .map_err(|error| Error::internal("hydrating a blob").because(error))??;
        self.catalog().write(move |tx| blobs::set_filled(tx, blob.id, stored)).await?;
        Ok(true)
    }
}
