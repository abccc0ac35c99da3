//! Checkpoints that somebody sends: begun, ended, and, where that is wanted, left for a later run of the daemon.
//!
//! What is sent is a flight of the checkpoint's own id. As a rule it ends with what it is sent by, and nothing of it is kept. One that survives
//! ([`Announced::survives`]) is noted as such before its first byte ([`uploads`]), in the transaction that makes the flight the record's: from then on
//! a start finds whether it is to wait for its sender, and what is recorded of it ([`stream`](super::stream)) is no other's. It is not admitted anew:
//! its charge stays, and room is asked for what is not on disk.

use std::sync::Arc;

use super::progress::Progress;
use super::tasks::{AtPause, draining, is_draining};
use super::{Filled, Ingests, NOT_WANTED, Shared, plan, unpack};
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::{fills, quotas, uploads};
use crate::disk::TAIL_NUMBER;
use crate::error::{Error, Kind, Result};
use crate::source::EntryStream;

/// What is known of what is sent before it comes.
#[derive(Clone, Debug, Default)]
pub struct Announced {
    /// Bytes in all; 0 where that is not known.
    pub bytes: u64,
    /// Set where it can be gone on with after a restart.
    pub survives: Option<Survives>,
}

/// An upload that survives the daemon.
#[derive(Clone, Debug, Default)]
pub struct Survives {
    /// Whether it is one file by its own name, and not a tree.
    pub one_file: bool,
    /// What an earlier run kept of it, where there was one.
    pub kept: Option<Kept>,
}

/// What is kept of an upload, all of which its stream begins with.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// Numbers of the files in the flight's directory that are begun.
    pub begun: Vec<u64>,
    /// Bytes of files that are sealed.
    pub sealed_bytes: u64,
}

impl Announced {
    fn kept(&self) -> Option<&Kept> {
        self.survives.as_ref().and_then(|survives| survives.kept.as_ref())
    }
}

impl Ingests {
    /// Fills a recorded checkpoint from entries that the caller sends; returns when it is decided, or left for the next run.
    ///
    /// # Errors
    /// What the stream or the store failed with; the record is then `failed`, and nothing of it is kept, since it cannot be resumed. `DRAINING` for
    /// one that survives: the record is `filling`, and what came is recorded.
    pub async fn fill_from_stream(
        &self,
        record: &Record,
        entries: Box<dyn EntryStream>,
        announced: Announced,
    ) -> Result<()> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let shared = self.0.clone();
        let record = record.clone();
        let survives = announced.survives.is_some();
        let at_pause = if survives { AtPause::Leaves } else { AtPause::Stays };
        self.spawn(&record.clone(), at_pause, move |progress| async move {
            progress.expect(announced.bytes, 0);
            let outcome = shared.fill_from_sender(&record, entries, &announced, &progress).await;
            let outcome = match outcome {
                Err(error) if survives && is_draining(&error) => Err(error),
                outcome => {
                    if outcome.as_ref().is_err_and(|error| error.reason() != NOT_WANTED) {
                        shared.give_back(&record).await;
                    }
                    shared.conclude(&record, outcome).await
                }
            };
            let _ = sender.send(outcome);
        });
        receiver.await.map_err(|_| cancelled())?
    }
}

/// Of an ingest that ended without an outcome.
fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "INGEST_CANCELLED", "the ingest was cancelled")
}

impl Shared {
    async fn fill_from_sender(
        self: &Arc<Self>,
        record: &Record,
        mut entries: Box<dyn EntryStream>,
        announced: &Announced,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        match &announced.survives {
            Some(survives) => self.begin_upload(record, announced.bytes, survives).await?,
            None => self.set_filling(record).await?,
        }
        plan::check_limit(announced.bytes, self.settings.checkpoint_bytes)?;
        let kept = announced.kept().cloned().unwrap_or_default();
        let files = announced.kept().map(|kept| [kept.begun.as_slice(), &[TAIL_NUMBER]].concat());
        self.store.disk().clear_flight(&record.id, &files.unwrap_or_default())?;
        self.store.disk().begin_flight(&record.id)?;
        // Before its turn: what is acknowledged meanwhile must not be lost.
        entries.begin(self.store.disk(), &record.id).await;
        let closed = |_| Error::internal("the senders' slots are closed");
        let _slot = tokio::select! {
            slot = self.senders.acquire() => slot.map_err(closed)?,
            () = self.until_paused(), if announced.survives.is_some() => return Err(draining()),
        };
        let entries = unpack::Unpacked::new(self.clone(), &record.id, entries, announced.survives.is_some());
        let mut known_bytes = announced.bytes;
        if announced.kept().is_some() {
            let id = record.id.clone();
            let charge = self.store.catalog().read(move |tx| quotas::of_record(tx, &id)).await?;
            known_bytes = known_bytes.max(charge.map_or(0, |charge| charge.bytes));
        }
        self.note_streamed(record, known_bytes).await?;
        let here = kept.sealed_bytes.saturating_add(self.store.disk().occupied_by(&record.id)?);
        self.fill_from_entries(record, Box::new(entries), announced.bytes.saturating_sub(here), progress).await
    }

    /// # Errors
    /// As [`Shared::set_filling`].
    async fn begin_upload(&self, record: &Record, bytes_total: u64, survives: &Survives) -> Result<()> {
        let id = record.id.clone();
        if survives.kept.is_none() && self.store.catalog().read(move |tx| fills::is_left(tx, &id)).await? {
            // Of one that had the same id, and whose removal is under way: nothing of it may pass for this one's.
            self.store.remove_flight(&record.id).await?;
        }
        let (id, begun) = (record.id.clone(), uploads::Begun { bytes_total, one_file: survives.one_file });
        let begin = move |tx: &rusqlite::Connection| {
            if !checkpoints::begin_filling(tx, &id)? {
                return Ok(false);
            }
            checkpoints::set_listing(tx, &id, "", &id, 0, 0)?;
            uploads::begin(tx, &id, begun).map(|()| true)
        };
        self.filling(record, self.store.catalog().write(begin).await?)
    }
}
