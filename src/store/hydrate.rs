//! Turning compact blobs whole again, so that jobs read them by passthrough.
//!
//! Order: bytes into the blob, `fdatasync`, rows marked filled, live readers told. A crash in between leaves a blob that still
//! borrows; its extra bytes are given up at the next punch. Where the home was lost meanwhile, or another file has taken the blob's name, the rows stay as
//! they are: what was copied does not count. Hydration never takes the store above its high watermark, nor what ingests under way
//! were promised; it gives up copies that nobody reads any more to make room for those that somebody does. Compact blobs are right, only slower.

use std::sync::Arc;

use super::Store;
use super::read::Reader;
use crate::catalog::blobs::{self, BlobRow, Borrow};
use crate::catalog::fills;
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
    /// Makes the compact blobs of a manifest whole while space allows, and tells `reader`. `promised` says how many bytes others will take.
    ///
    /// # Errors
    /// The I/O error; what was hydrated before it stays.
    pub async fn hydrate(
        &self,
        manifest: Digest,
        reader: &Arc<Reader>,
        promised: impl Fn() -> u64 + Send,
    ) -> Result<Hydrated> {
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
            if !self.has_room_for(bytes, &promised).await? {
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

    /// Whether `bytes` can be added, after what nobody reads has been given up where that is needed.
    async fn has_room_for(&self, bytes: u64, promised: &(impl Fn() -> u64 + Send)) -> Result<bool> {
        let room = self.room().await?;
        // After a start what fills is known by its rows before it goes on.
        let promised = promised().max(self.admitted_before().await?);
        let lacking = bytes.saturating_add(promised).saturating_sub(room.below_high_bytes());
        if lacking == 0 {
            return Ok(true);
        }
        Ok(self.give_up_unread_duplicates(lacking).await? >= lacking)
    }

    /// Bytes that are still to come, by the rows of what fills.
    async fn admitted_before(&self) -> Result<u64> {
        let unsealed = self.catalog().read(fills::unsealed_bytes).await?;
        let disk = self.disk().clone();
        let occupied = tokio::task::spawn_blocking(move || disk.occupied())
            .await
            .map_err(|error| Error::internal("looking at the disk ended early").because(error))??;
        Ok(unsealed.saturating_sub(occupied.filling_bytes))
    }

    /// Whether the blob is whole now.
    async fn hydrate_blob(&self, blob: BlobRow, missing: Vec<Borrow>) -> Result<bool> {
        let disk = self.disk().clone();
        let file = disk.open_sealed(&blob.digest)?;
        let expected = missing.clone();
        let is_as_expected = move |tx: &rusqlite::Connection| {
            if blobs::sealed(tx, &blob.digest)?.is_none_or(|row| row.id != blob.id) {
                return Ok(false);
            }
            let present = blobs::borrows_of(tx, blob.id)?;
            Ok(present.iter().filter(|borrow| !borrow.filled).eq(expected.iter()))
        };
        if !self.catalog().read(is_as_expected.clone()).await? {
            return Ok(false);
        }
        let (file, stored) = tokio::task::spawn_blocking(move || {
            for borrow in &missing {
                let range = borrow.start..borrow.start + borrow.len;
                file.bring_home(&disk, range, &borrow.home, borrow.home_start)?;
            }
            let stored = file.flush(&disk)?;
            Ok::<_, Error>((file, stored))
        })
        .await
        .map_err(|error| Error::internal("hydrating a blob").because(error))??;
        let note = move |tx: &rusqlite::Connection| {
            if !file.bears_its_name() || !is_as_expected(tx)? {
                return Ok(false);
            }
            blobs::set_filled(tx, blob.id, stored).map(|()| true)
        };
        self.catalog().write(note).await
    }
}
