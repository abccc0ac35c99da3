//! Removing checkpoints: the record at once, the bytes as soon as they are back, and an event when they are.
//!
//! A removal is refused while a job or a pin keeps the checkpoint; that and the mark `removing` are one transaction. What follows goes on whatever
//! becomes of the caller, and after a crash at the next start. Two events tell of it: `CHECKPOINT_REMOVED`, and `SPACE_FREED` with the bytes when
//! the last of them is back. How much that is depends on what others have, so the second is the operator's. Its owner is told `CHECKPOINT_GONE` then, and
//! answered, with what its own tree occupied. Bytes of files that somebody has open still are given back when they are closed, and
//! nothing tells of that.

use std::time::Duration;

use super::caller::Caller;
use super::{Floors, resolve, wire};
use crate::catalog::checkpoints::{self as rows, Record, State};
use crate::catalog::events::NewEvent;
use crate::catalog::{accounting, jobs};
use crate::error::{Error, Result};
use crate::store::Removal;
use crate::units::show_bytes;

/// How long a caller waits for the bytes of what is gone; those of some 10,000 files are back by then.
const PATIENCE: Duration = Duration::from_millis(500);

impl Floors {
    pub(super) async fn remove(
        &self,
        request: wire::RemoveCheckpointRequest,
        caller: &Caller,
    ) -> Result<wire::RemoveCheckpointResponse> {
        let (reference, asking) = (request.checkpoint, caller.clone());
        // Looking for holders and marking are one transaction, so no job can come in between.
        let mark = move |tx: &rusqlite::Connection| {
            let record = resolve::removable(tx, &reference, &asking)?;
            let holders = jobs::holders(tx, &record.id)?;
            if !holders.is_empty() {
                return Err(in_use(&record, &holders));
            }
            if record.pinned {
                return Err(pinned(&record));
            }
            let own_bytes = accounting::own_footprint(tx, &record)?.physical_bytes;
            rows::set_state(tx, &record.id, State::Removing, None)?;
            Ok((record, own_bytes))
        };
        let (record, own_bytes) = self.store.catalog().write(mark).await?;
        let (floors, marked) = (self.clone(), record.clone());
        let (removal, told) = tokio::spawn(async move {
            let removal = floors.remove_marked(&marked).await?;
            let message = format!("`{}` was removed", marked.name);
            let event = NewEvent {
                kind: "CHECKPOINT_REMOVED",
                checkpoint: marked.id.clone(),
                owner: marked.owner.clone(),
                message,
                ..Default::default()
            };
            floors.note(event).await;
            // One that was being removed already has given up its tree.
            let known_bytes = (marked.state != State::Removing).then_some(own_bytes);
            let told = floors.tell_when_freed(marked, known_bytes, removal.clone()).await;
            Ok::<_, Error>((removal, told))
        })
        .await
        .map_err(|error| Error::internal("removing ended early").because(error))??;
        // How long the bytes take tells whether others have the same.
        let (freed_bytes, freeing) = match &caller.owner {
            Some(_) => (own_bytes, false),
            None => {
                let is_freed = freed_soon(told).await?;
                (removal.so_far().freed_bytes, !is_freed)
            }
        };
        Ok(wire::RemoveCheckpointResponse { id: record.id, freed_bytes, freeing })
    }

    /// Drops a record that is marked `removing`, after a restart too; its bytes follow.
    ///
    /// # Errors
    /// Poisoned store; what was begun is finished at the next start.
    pub(super) async fn remove_marked(&self, record: &Record) -> Result<Removal> {
        self.ingests.cancel(&record.id).await;
        self.ingests.end_reading(&record.id).await;
        let removal = self.store.remove_checkpoint(&record.id).await?;
        self.ingests.note_change(&record.id);
        Ok(removal)
    }

    /// Finishes the removal of a record that a predecessor has left marked.
    ///
    /// # Errors
    /// As [`Store::remove_checkpoint`](crate::store::Store::remove_checkpoint).
    pub async fn finish_removal(&self, record: Record) -> Result<()> {
        let removal = self.remove_marked(&record).await?;
        self.tell_when_freed(record, None, removal).await;
        Ok(())
    }

    /// Gives back what interrupted removals left, in its own time, with an event if that is anything. It is under way on return, so that whoever
    /// lacks room from now on waits for it before anything else goes.
    pub async fn finish_sweeping(&self) {
        let begun = self.store.begin_sweeping().await;
        let floors = self.clone();
        tokio::spawn(async move {
            let swept = match begun {
                Ok(mut removal) => removal.end().await,
                Err(error) => Err(error),
            };
            match swept {
                Ok(swept) if swept.blobs > 0 || swept.freed_bytes > 0 => {
                    let freed = show_bytes(swept.freed_bytes);
                    let message = format!("what interrupted removals had left is gone: {freed} are free again");
                    floors.note(NewEvent { kind: "SPACE_FREED", message, ..Default::default() }).await;
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(error = %error.report(), "sweeping failed"),
            }
        });
    }

    /// Tells the owner that it has nothing of it any more, with `own_bytes` where they are known; and operators when the bytes are back.
    /// The task fails with what giving them back failed with.
    async fn tell_when_freed(
        &self,
        record: Record,
        own_bytes: Option<u64>,
        mut removal: Removal,
    ) -> tokio::task::JoinHandle<Result<()>> {
        if !record.owner.is_empty() {
            self.note(gone(&record, own_bytes)).await;
        }
        let floors = self.clone();
        tokio::spawn(async move {
            match removal.end().await {
                Ok(swept) => {
                    let mut message = format!(
                        "{} ({} bytes) of `{}` are free again",
                        show_bytes(swept.freed_bytes),
                        swept.freed_bytes,
                        record.name
                    );
                    if swept.open_bytes > 0 {
                        let open = show_bytes(swept.open_bytes);
                        message += &format!("; {open} more will be when those who have its files open close them");
                    }
                    let event = NewEvent {
                        kind: "SPACE_FREED",
                        checkpoint: record.id,
                        message,
                        operators_only: true,
                        ..Default::default()
                    };
                    floors.note(event).await;
                    Ok(())
                }
                Err(error) => {
                    let message = error.report();
                    tracing::warn!(
                        checkpoint = record.id,
                        error = message,
                        "giving bytes back failed; the next start finishes it"
                    );
                    Err(error)
                }
            }
        })
    }
}

/// Whether the bytes are back within [`PATIENCE`]: who is answered soon finds the events.
async fn freed_soon(told: tokio::task::JoinHandle<Result<()>>) -> Result<bool> {
    match tokio::time::timeout(PATIENCE, told).await {
        Ok(told) => told.map_err(|error| Error::internal("telling ended early").because(error))?.map(|()| true),
        Err(_) => Ok(false),
    }
}

/// What the owner of a removed checkpoint is told, which depends on nothing that others have.
fn gone(record: &Record, own_bytes: Option<u64>) -> NewEvent {
    let bytes = own_bytes.map_or_else(String::new, |bytes| format!(": {} ({bytes} bytes)", show_bytes(bytes)));
    NewEvent {
        kind: "CHECKPOINT_GONE",
        checkpoint: record.id.clone(),
        owner: record.owner.clone(),
        message: format!("nothing of `{}` is kept for its owner any more{bytes}", record.name),
        ..Default::default()
    }
}

fn pinned(record: &Record) -> Error {
    Error::wrong_state("CHECKPOINT_PINNED", format!("the checkpoint `{}` is pinned", record.name))
        .fact("checkpoint", &record.id)
        .remedy(format!("`ckptctl unpin {}`, then remove it", record.id))
}

fn in_use(record: &Record, holders: &[String]) -> Error {
    Error::wrong_state(
        "CHECKPOINT_IN_USE",
        format!("the checkpoint `{}` is in use by {}", record.name, jobs_in_words(holders)),
    )
    .fact("checkpoint", &record.id)
    .fact("jobs", holders.join(","))
    .remedy("release them with `ckptctl release JOB`, then remove it")
}

fn jobs_in_words(jobs: &[String]) -> String {
    let plural = if jobs.len() == 1 { "job" } else { "jobs" };
    format!("{plural} {}", jobs.join(", "))
}
