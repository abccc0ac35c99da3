//! What becomes of a record when its filling ends: ready, in one transaction, or failed with its cause, an event for either.
//!
//! A failure that cannot be recorded, on a full or broken disk, is recorded again and again: nothing else may pass for the record's state.

use std::sync::Arc;
use std::time::Duration;

use super::flight::Flight;
use super::{Filled, NOT_WANTED, Shared, again, healing, quota};
use crate::catalog::checkpoints::{self, Bytes, Failure, Record, State};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::losses::{self, is_loss};
use crate::catalog::{forecasts, retention};
use crate::error::{Error, Kind, NO_ROOM, Result};
use crate::manifest::Manifest;
use crate::source::{SOURCE_CHANGED, SourceKind, empty};
use crate::units::{counted, now_unix_ms};

/// Pause before a failure is recorded again that could not be recorded: a full or broken disk.
const RECORD_AGAIN_AFTER: Duration = Duration::from_secs(5);

impl Shared {
    /// Decides the record by what came of filling it.
    ///
    /// # Errors
    /// What the record failed with, `NOT_WANTED` where it was decided before.
    pub(super) async fn conclude(self: &Arc<Self>, record: &Record, outcome: Result<Filled>) -> Result<()> {
        let result = match outcome {
            Ok((_, manifest, _)) if manifest.entries().is_empty() => Err(empty()),
            Ok((revision, manifest, flight)) => self.make_ready(record, revision, manifest, flight).await,
            Err(error) if error.reason() == NOT_WANTED => return Err(error),
            Err(error) => Err(error),
        };
        let result = result.map_err(|error| with_remedy(record, error));
        self.arrivals.forget(&record.id);
        if let Err(error) = &result {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "the checkpoint failed");
            if (is_of_no_use(record, error) || is_damaged(record)) && !self.is_shown(record).await {
                self.give_back(record).await;
            }
            while let Err(second) = self.make_failed(record, error).await {
                tracing::error!(checkpoint = record.id, error = %second.report(), "recording the failure failed");
                tokio::time::sleep(RECORD_AGAIN_AFTER).await;
            }
            // Only now: of several that fail together the last one tells.
            self.end_reading(&record.id, error).await;
        }
        let _ = self.changes.send(record.id.clone());
        result
    }

    /// A task ended in a panic, which the log has: a bug of ours.
    pub(super) async fn conclude_panic(self: &Arc<Self>, record: &Record, resumes: bool) {
        let id = record.id.clone();
        let found = self.store.catalog().read(move |tx| checkpoints::get(tx, &id)).await;
        let is_open = |found: Record| matches!(found.state, State::New | State::Filling);
        if found.is_ok_and(|found| !found.is_some_and(is_open)) {
            return;
        }
        if !resumes {
            self.give_back(record).await;
        }
        let error = Error::internal("bringing the checkpoint in ended in a panic: a bug of ours, which the log shows")
            .remedy("report it, then retry the checkpoint");
        // What it failed with is in the record.
        let _ = self.conclude(record, Err(error)).await;
        self.let_go_of_secrets(&record.id).await;
    }

    async fn make_ready(
        self: &Arc<Self>,
        record: &Record,
        revision: String,
        manifest: Arc<Manifest>,
        flight: Option<Arc<Flight>>,
    ) -> Result<()> {
        let own = record.clone();
        let own_flight = flight.as_ref().map_or_else(|| record.id.clone(), |flight| flight.key().to_owned());
        let in_place = flight.as_ref().and_then(|flight| flight.in_place().cloned());
        let (quotas, kept_bytes) =
            (self.settings.quotas.clone(), if in_place.is_none() { manifest.logical_bytes() } else { 0 });
        let bytes = in_place.map_or(Bytes::Stored, |place| Bytes::InPlace(place, own_flight.clone()));
        let (files, bytes_in_all) = (counted(manifest.files(), "file"), counted(manifest.logical_bytes(), "byte"));
        let message = format!("`{}` is ready: {files}, {bytes_in_all}", record.name);
        self.store
            .catalog()
            .write(move |tx| {
                let (id, digest) = (&own.id, manifest.digest());
                again::check_tree(tx, &own, &revision, &digest)?;
                quota::charge(tx, &quotas, id, kept_bytes)?;
                checkpoints::set_ready(tx, id, &revision, &manifest, &digest, &bytes)?;
                retention::touch(tx, id, now_unix_ms())?;
                forecasts::note_outcome(tx, id, now_unix_ms())?;
                let event = NewEvent { kind: "CHECKPOINT_READY", checkpoint: own.id, message, ..Default::default() };
                events::record(tx, now_unix_ms(), &event)
            })
            .await?;
        // It is ready, whatever becomes of what it does not need any more: the next start finds that.
        if let Err(error) = self.drop_flight_if_unneeded(own_flight).await {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "what is left of its flight stays for the next start");
        }
        Ok(())
    }

    /// What was filled of a checkpoint goes: of one that did not fit, so that something smaller can come; of one that was sent, since
    /// nobody can go on with it.
    pub(super) async fn give_back(&self, record: &Record) {
        let id = record.id.clone();
        let forget = move |tx: &rusqlite::Connection| {
            let flight = checkpoints::flight_of(tx, &id)?;
            checkpoints::clear_flight(tx, &id).map(|()| flight)
        };
        let flight = self.store.catalog().write(forget).await;
        let given_back = match flight {
            Ok(flight) if !flight.is_empty() => self.store.remove_flight(&flight).await.map(|_| ()),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = given_back {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "giving back what was filled failed");
        }
    }

    async fn make_failed(&self, record: &Record, error: &Error) -> Result<()> {
        let (id, failure) = (record.id.clone(), Failure::of(error));
        let loss = record.failure.clone().filter(is_loss).map(|loss| healing::still_lost(&loss, error));
        // Its owner reads events. How full the host is, is not for it to know; operators find it in the record.
        let why = if error.tells_of_the_host() { NO_ROOM.to_owned() } else { error.report() };
        let event = NewEvent {
            kind: "CHECKPOINT_FAILED",
            checkpoint: record.id.clone(),
            message: format!("`{}` failed: {why}", record.name),
            ..Default::default()
        };
        self.store
            .catalog()
            .write(move |tx| {
                let is_as_before = match &loss {
                    Some(loss) => losses::end_healing(tx, &id, loss)?,
                    None => false,
                };
                if is_as_before || checkpoints::set_failed(tx, &id, &failure)? {
                    events::record(tx, now_unix_ms(), &event)?;
                }
                Ok(())
            })
            .await
    }

    pub(super) async fn record_event(&self, kind: &'static str, record: &Record, message: String) -> Result<()> {
        let event = NewEvent { kind, checkpoint: record.id.clone(), message, ..Default::default() };
        self.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await
    }

    /// Forgets a flight that no record needs: rows and files, and what only it had sealed.
    pub(super) async fn drop_flight_if_unneeded(&self, flight: String) -> Result<()> {
        self.store.remove_flight(&flight).await.map(|_| ())
    }
}

/// The error with something to do about it, also where whoever met it knew nothing.
fn with_remedy(record: &Record, error: Error) -> Error {
    match error.remedy_text() {
        Some(_) => error,
        None if record.origin.kind == SourceKind::Upload.as_str() => {
            error.remedy("mend the cause, then upload it again")
        }
        None => error.remedy(format!("mend the cause, then `ckptctl retry {}`", record.id)),
    }
}

/// Whether it was to be mended, and is served as it was.
fn is_damaged(record: &Record) -> bool {
    record.failure.as_ref().is_some_and(is_loss)
}

/// Whether what was filled of a record that failed so is in the way, or can never be gone on with.
fn is_of_no_use(record: &Record, error: &Error) -> bool {
    let of_a_moment = record.origin.kind == SourceKind::Directory.as_str();
    error.kind() == Kind::NoSpace || of_a_moment && matches!(error.reason(), SOURCE_CHANGED | "NO_SUCH_PROCESS")
}
