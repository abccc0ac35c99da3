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
        let compact = self.catalog().read(move |tx| blobs::compact_blobs(tx, &manifest)).await?;
        let mut outcome = Hydrated::default();
        for (blob, borrows) in compact {
            let missing: Vec<Borrow> = borrows.into_iter().filter(|borrow| !borrow.filled).collect();
            if missing.is_empty() {
                continue;
            }
            let bytes: u64 = missing.iter().map(|borrow| borrow.len).sum();
            if self.available_bytes()? < bytes.saturating_mul(2) {
                outcome.left += 1;
                continue;
            }
            self.hydrate_blob(blob, missing).await?;
            reader.set_whole(&blob.digest);
            outcome.blobs += 1;
        }
        Ok(outcome)
    }

    async fn hydrate_blob(&self, blob: BlobRow, missing: Vec<Borrow>) -> Result<()> {
        let disk = self.disk().clone();
        let stored = tokio::task::spawn_blocking(move || {
            for borrow in &missing {
                disk.bring_home(
                    &blob.digest,
                    borrow.start..borrow.start + borrow.len,
                    &borrow.home,
                    borrow.home_start,
                )?;
            }
            disk.sync_blob(&blob.digest)?;
            disk.stored_bytes(&blob.digest)
        })
        .await
        .map_err(|error| Error::internal("hydrating a blob").because(error))??;
        self.catalog().write(move |tx| blobs::set_filled(tx, blob.id, stored)).await
    }
}
