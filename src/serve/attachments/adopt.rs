//! Taking over the sessions of a predecessor: at the start, or as soon as it can be.
//!
//! What keeps one from going on and may pass (no descriptors, no threads, an I/O error) keeps that one alone: it stays with whoever holds
//! it, its readers wait, its views stand, and it is tried again, at the latest when somebody attaches its checkpoint. Nothing is punched
//! as long as this daemon lives then, for the kernel may read any blob through it. What cannot pass ends the session.
//!
//! One session is taken over at a time and under its gate, so that an attach finds it either waiting or live.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{Attachments, Served, blocking, lock};
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::jobs::{self, JobRow, JobState};
use crate::error::{Error, Kind, Result};
use crate::panics::guarded_task;
use crate::serve::Session;
use crate::serve::keeping::Orphan;
use crate::units::now_unix_ms;

/// Time until those that wait are tried again, first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));

impl Attachments {
    /// Goes on with the sessions that a predecessor has left; readers of them are answered from now on.
    ///
    /// # Errors
    /// Those of the catalog. A session that cannot go on is no error: it waits or is let go.
    pub async fn adopt(&self) -> Result<()> {
        let orphans = lock(&self.0.orphans).clone();
        if orphans.is_empty() {
            return Ok(());
        }
        let rows = self.0.store.catalog().read(jobs::list).await?;
        let (mut adopted, mut dropped) = (0, 0);
        for orphan in orphans {
            let checkpoint = orphan.checkpoint().to_owned();
            // A panic of one keeps no other from being taken over.
            match guarded_task("taking a session over", self.take_over(orphan, &rows)).await {
                Ok(()) => adopted += 1,
                Err(error) if !is_final(&error) => {
                    // What it shows stays what is filled.
                    self.0.ingests.note_shown(&checkpoint, true);
                    self.note_waiting(checkpoint, &error).await;
                }
                Err(_) => dropped += 1,
            }
        }
        {
            let mut reconciled = lock(&self.0.reconciled);
            reconciled.adopted = adopted;
            reconciled.dropped += dropped;
        }
        if !lock(&self.0.orphans).is_empty() {
            self.0.store.punch_nothing();
            self.adopt_later();
        }
        Ok(())
    }

    /// The session of a checkpoint that waits to be taken over, seen by `job` too. Its gate is held.
    ///
    /// # Errors
    /// Why it still cannot be.
    pub(super) async fn adopt_for(&self, record: &Record, job: &str) -> Result<Option<Arc<Served>>> {
        let waiting = lock(&self.0.orphans).iter().find(|orphan| orphan.checkpoint() == record.id).cloned();
        let Some(orphan) = waiting else { return Ok(None) };
        let rows = self.0.store.catalog().read(jobs::list).await?;
        match self.take_over(orphan, &rows).await {
            Err(error) if !is_final(&error) => Err(error),
            _ => Ok(lock(&self.0.live).get(&record.id).cloned().inspect(|served| {
                lock(&served.jobs).insert(job.to_owned());
            })),
        }
    }

    /// Tries those that wait again and again, until none does.
    fn adopt_later(&self) {
        let attachments = self.clone();
        tokio::spawn(async move {
            let (mut wait, longest) = AGAIN;
            while !lock(&attachments.0.orphans).is_empty() {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(longest);
                let waiting: Vec<_> = lock(&attachments.0.orphans).iter().map(Arc::downgrade).collect();
                for orphan in waiting {
                    let attachments = attachments.clone();
                    // A panic of one keeps no other waiting.
                    let _ = tokio::spawn(async move { attachments.try_again(orphan).await }).await;
                }
            }
        });
    }

    async fn try_again(&self, orphan: Weak<Orphan>) {
        let Some(checkpoint) = orphan.upgrade().map(|orphan| orphan.checkpoint().to_owned()) else { return };
        let Ok(_gate) = self.0.session_gates.pass(&checkpoint).await else { return };
        // By somebody who asked for it, perhaps. Nobody else has hold of it under the gate.
        let Some(orphan) = orphan.upgrade() else { return };
        let Ok(rows) = self.0.store.catalog().read(jobs::list).await else { return };
        match self.take_over(orphan, &rows).await {
            Ok(()) => self.note("SESSION_WENT_ON", format!("the mount of checkpoint {checkpoint} goes on")).await,
            Err(error) => tracing::debug!(checkpoint, error = %error.report(), "a session still waits, or is over"),
        }
    }

    /// Goes on with one, or lets it go where it never can; else it waits on.
    async fn take_over(&self, orphan: Arc<Orphan>, rows: &[JobRow]) -> Result<()> {
        let id = orphan.checkpoint().to_owned();
        let taken = self.adopt_one(&orphan, rows).await;
        if let Err(error) = &taken
            && !is_final(error)
        {
            tracing::warn!(checkpoint = id, error = %error.report(), "a session cannot be taken over yet");
            return taken.map_err(|error| error.during(format!("taking over the mount of checkpoint {id}")));
        }
        lock(&self.0.orphans).retain(|other| !Arc::ptr_eq(other, &orphan));
        self.0.ingests.note_shown(&id, false);
        if let Err(error) = &taken {
            tracing::warn!(checkpoint = id, error = %error.report(), "a session could not go on");
            if orphan.may_have_given() {
                self.keep_strays();
            }
            let mountpoint = self.0.sessions_dir.join(&id);
            if let Some(orphan) = Arc::into_inner(orphan) {
                blocking(move || let_go(orphan, &mountpoint)).await?;
            }
        }
        taken
    }

    async fn adopt_one(&self, orphan: &Arc<Orphan>, rows: &[JobRow]) -> Result<()> {
        let id = orphan.checkpoint().to_owned();
        let wanted = id.clone();
        let record = self.0.store.catalog().read(move |tx| checkpoints::get(tx, &wanted)).await?;
        let unknown = || Error::not_found("NO_SUCH_CHECKPOINT", format!("there is no checkpoint `{id}`"));
        let record = record.ok_or_else(unknown)?;
        let (tree, content, reader) = self.content_of(&record).await?;
        let config = self.session_config(&record);
        let adopted = orphan.clone();
        let session = blocking(move || Session::adopt(config, tree, content, &adopted)).await?;
        // Who was about to see it has it made again: it may have been given up in the middle of its beginning.
        let seen_by: BTreeSet<String> = rows.iter().filter(|row| sees(row, &id)).map(|row| row.job.clone()).collect();
        if !session.is_mounted() || seen_by.is_empty() {
            // Its jobs are gone; what they still have open is answered until they close it.
            if let Err(error) = blocking(move || session.stop(Duration::ZERO)).await {
                tracing::warn!(checkpoint = id, error = %error.report(), "a session that nobody sees stays mounted");
            }
            return Ok(());
        }
        let served = self.serve(&record, session, reader, seen_by);
        lock(&self.0.live).insert(id, served);
        Ok(())
    }

    async fn note_waiting(&self, checkpoint: String, error: &Error) {
        let message = format!(
            "the mount of checkpoint {checkpoint} cannot be taken over yet, its readers wait and it is tried again: {}",
            error.report()
        );
        self.note("SESSION_WAITS", message).await;
    }

    async fn note(&self, kind: &'static str, message: String) {
        let event = NewEvent { kind, message, ..Default::default() };
        let noted = self.0.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await;
        if let Err(error) = noted {
            tracing::warn!(kind, error = %error.report(), "what became of a session could not be noted");
        }
    }
}

/// Whether a session can never go on. Whatever else keeps it from that may pass, a bug of ours with the next version.
fn is_final(error: &Error) -> bool {
    const REASONS: [&str; 3] = ["NO_SUCH_CHECKPOINT", "NOT_READY", "TREE_CHANGED"];
    matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) || REASONS.contains(&error.reason())
}

/// Whether a job sees a checkpoint.
fn sees(row: &JobRow, checkpoint: &str) -> bool {
    row.state == JobState::Attached && row.leases.iter().any(|lease| lease.checkpoint == checkpoint)
}

/// Lets a session go that nobody can serve, and unmounts it.
fn let_go(orphan: Orphan, mountpoint: &Path) -> Result<()> {
    orphan.let_go();
    crate::serve::unmount_stale(mountpoint).map(drop)
}
