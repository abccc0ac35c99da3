//! What a restart finds of sessions and views, and what becomes of it.
//!
//! | found | then |
//! |---|---|
//! | a held descriptor with its ledger, of a checkpoint that is known | the session goes on; views of it stand as they are |
//! | one that cannot be taken over now: no descriptors, no threads, an I/O error | its readers wait, and it is tried again; views of it stand as they are |
//! | one that cannot be taken over at all | let go: the kernel ends its connection, and goes on reading what it was given ([`strays`](super::super::strays)) |
//! | a view whose sessions all go on | left exactly as it is |
//! | another view of a known job | unmounted and made again, with an event: what the job had open is lost to it |
//! | a view that cannot be made (its process is gone, something is in the way) | the job is `lost`, with an event |
//! | a ledger without a descriptor, a directory without a session, a dead mount of ours | removed |
//! | anybody else's mount | never touched |
//!
//! Readers wait from the death of a daemon until [`Attachments::adopt`](super::adopt) has run, so it comes before anything that may take
//! long and asks nothing but the catalog and the disk. [`Attachments::recover`] comes after it and has time.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Attachments, blocking, lock, stands};
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::jobs::{self, JobRow, JobState};
use crate::error::{Error, Result};
use crate::panics::guarded_task;
use crate::serve::keeping::{self, Keeping, Orphan, Outlive};
use crate::serve::strays::Strays;
use crate::serve::{Device, Mounted, SessionConfig};
use crate::units::now_unix_ms;

/// What a start found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Sessions that went on.
    pub adopted: usize,
    /// Views that were left as they were.
    pub kept: usize,
    /// Views that were made again.
    pub remade: usize,
    /// Views that could not be.
    pub lost: usize,
    /// Held descriptors that nobody could use.
    pub dropped: usize,
    /// Dead mounts of ours that were removed.
    pub unmounted: usize,
    /// Ledgers and directories without a session that were removed.
    pub leftovers: usize,
}

impl std::fmt::Display for Reconciled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { adopted, kept, remade, lost, dropped, unmounted, leftovers } = self;
        write!(
            f,
            "{adopted} sessions went on; {kept} views were left as they were, {remade} made again, {lost} lost; {dropped} \
             descriptors, {unmounted} dead mounts and {leftovers} leftovers were removed"
        )
    }
}

/// Finds out what is left in the runtime directory and removes what is dead there.
///
/// # Errors
/// `LEDGER_TOO_NEW`: nothing has been touched then.
pub(super) fn look_around(
    runtime_dir: &Path,
    keeping: Keeping,
    strays: &Strays,
) -> Result<(Option<Outlive>, Vec<Orphan>, Reconciled)> {
    let mut reconciled = Reconciled::default();
    let ledgers = runtime_dir.join("ledgers");
    std::fs::create_dir_all(&ledgers).map_err(|error| Error::io("creating", &ledgers, error))?;
    let outlive = keeping.keeper.map(|keeper| Outlive { ledgers, keeper });
    let mut orphans = Vec::new();
    if let Some(outlive) = &outlive {
        let found = keeping::inherit(keeping.handed_over, outlive, strays)?;
        (reconciled.dropped, reconciled.leftovers) = (found.dropped, found.leftovers);
        orphans = found.orphans;
    }
    let alive: Vec<Device> = orphans.iter().map(Orphan::number).collect();
    reconciled.unmounted = crate::serve::unmount_stale_but(runtime_dir, &alive)?.len();
    Ok((outlive, orphans, reconciled))
}

impl Attachments {
    /// What this start found and did.
    pub fn reconciled(&self) -> Reconciled {
        *lock(&self.0.reconciled)
    }

    /// Has nothing punched any more: the kernel may read any blob that is here for somebody of whom nothing tells.
    pub(super) fn keep_strays(&self) {
        self.0.strays.note();
        self.0.store.punch_nothing();
    }

    pub(super) fn session_config(&self, record: &Record) -> SessionConfig {
        SessionConfig {
            created: SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(record.created_ms).unwrap_or(0)),
            passthrough: self.0.wishes.passthrough,
            resend: self.0.wishes.resend,
            stack_depth: self.0.stack_depth,
            outlive: self.0.outlive.clone(),
            waits: self.0.waits.clone(),
            ..SessionConfig::new(self.0.sessions_dir.join(&record.id), record.id.clone(), self.0.buffers.clone())
        }
    }

    /// Leaves views whose sessions went on, makes the others again, clears away leftovers, and says what came of it.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn recover(&self) -> Result<Reconciled> {
        let rows = self.0.store.catalog().read(jobs::list).await?;
        let alive = self.numbers();
        let mut done = self.reconciled();
        for row in rows.into_iter().filter(|row| matches!(row.state, JobState::Attaching | JobState::Attached)) {
            if goes_on(&row, &alive).await {
                done.kept += 1;
                continue;
            }
            // What is wrong with one must not keep the daemon from starting.
            match guarded_task("making a view again", self.make_again(&row, &alive)).await {
                Ok(()) => done.remade += 1,
                Err(error) => {
                    done.lost += 1;
                    tracing::warn!(job = row.job, target = row.target, error = %error.report(), "an attachment is lost");
                    self.note_lost(row, &error).await?;
                }
            }
        }
        let (sessions, live) = (self.0.sessions_dir.clone(), self.numbers());
        done.leftovers += blocking(move || Ok(remove_empty(&sessions, &live))).await?;
        *lock(&self.0.reconciled) = done;
        if done != Reconciled::default() {
            tracing::info!("{done}");
            let event = NewEvent { kind: "RECONCILED", message: done.to_string(), ..Default::default() };
            let noted = self.0.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await;
            if let Err(error) = noted {
                tracing::warn!(error = %error.report(), "what this start did could not be noted");
            }
        }
        Ok(done)
    }

    /// File systems of the live sessions and of those that are still to be taken over, by checkpoint.
    fn numbers(&self) -> HashMap<String, Device> {
        let waiting: Vec<_> =
            lock(&self.0.orphans).iter().map(|one| (one.checkpoint().to_owned(), one.number())).collect();
        let live = lock(&self.0.live);
        let number = |(id, served): (&String, &std::sync::Arc<super::Served>)| {
            Some((id.clone(), lock(&served.session).as_ref()?.number()))
        };
        waiting.into_iter().chain(live.iter().filter_map(number)).collect()
    }

    async fn make_again(&self, row: &JobRow, alive: &HashMap<String, Device>) -> Result<()> {
        if row.pid == 0 {
            let target = PathBuf::from(&row.target);
            let spared: Vec<Device> = alive.values().copied().collect();
            blocking(move || crate::serve::unmount_stale_but(&target, &spared).map(|_| ())).await?;
        }
        if let Some(mounted) = mounted(row) {
            let pid = row.pid;
            blocking(move || {
                crate::serve::detach(&mounted)?;
                if pid == 0 { Ok(()) } else { mounted.check_process() }
            })
            .await?;
        }
        let leases = row.leases.clone();
        let records = self.0.store.catalog().read(move |tx| records_of(tx, leases)).await?;
        self.mount(row, &records).await?;
        if row.state == JobState::Attaching {
            return Ok(());
        }
        let message = format!(
            "the view of job {} at {} was made again, since nobody had held it: what the job had open there is lost to it and has to \
             be opened anew",
            row.job, row.target
        );
        let event = NewEvent { kind: "ATTACHMENT_REPLACED", job: row.job.clone(), message, ..Default::default() };
        self.0.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await
    }

    async fn note_lost(&self, row: JobRow, error: &Error) -> Result<()> {
        self.leave_sessions(&row).await;
        let event = NewEvent {
            kind: "ATTACHMENT_LOST",
            job: row.job.clone(),
            message: format!("the view of job {} at {} was lost: {}", row.job, row.target, error.report()),
            ..Default::default()
        };
        let row = JobRow { state: JobState::Lost, mounted: None, ..row };
        self.0
            .store
            .catalog()
            .write(move |tx| {
                jobs::put(tx, &row)?;
                events::record(tx, now_unix_ms(), &event)
            })
            .await
    }
}

fn mounted(row: &JobRow) -> Option<Mounted> {
    row.mounted.as_deref().and_then(|text| serde_json::from_str(text).ok())
}

/// Whether the view of a row needs nothing.
async fn goes_on(row: &JobRow, alive: &HashMap<String, Device>) -> bool {
    // One that may be half made is made again.
    let complete = |mounted: &Mounted| row.state == JobState::Attached && !mounted.is_foretold();
    let Some(mounted) = mounted(row).filter(complete) else { return false };
    let all = row.leases.iter().all(|lease| alive.contains_key(&lease.checkpoint));
    // A view of one is its session's file system; one of several is a directory of ours with a view each.
    let same = match row.leases.as_slice() {
        [one] if one.subdir.is_empty() => alive.get(&one.checkpoint) == Some(&mounted.device),
        _ => true,
    };
    all && same && stands(row).await.unwrap_or(false)
}

fn records_of(tx: &rusqlite::Connection, leases: Vec<jobs::Lease>) -> Result<Vec<(Record, String)>> {
    let record = |lease: jobs::Lease| {
        let missing =
            || Error::not_found("NO_SUCH_CHECKPOINT", format!("there is no checkpoint `{}`", lease.checkpoint));
        let record = checkpoints::get(tx, &lease.checkpoint)?.ok_or_else(missing)?;
        Ok((record, lease.subdir))
    };
    leases.into_iter().map(record).collect()
}

/// Removes directories of sessions that are gone; says how many.
fn remove_empty(sessions: &Path, live: &HashMap<String, Device>) -> usize {
    let entries = std::fs::read_dir(sessions).into_iter().flatten().flatten();
    let others = entries.filter(|entry| entry.file_name().to_str().is_none_or(|name| !live.contains_key(name)));
    // One that something is mounted in is in use, and stays.
    others.filter(|entry| std::fs::remove_dir(entry.path()).is_ok()).count()
}
