//! Jobs: their durable rights (leases) and where their views are mounted.
//!
//! ```text
//! reserved -> attaching -> attached -> reserved (detach)      any -> released (row gone)
//!                             |-> lost (its session died with a daemon)
//! ```
//! A right may have a time at which it ends by itself (`serve::attachments`); that is released like any other.
//!
//! `attaching` is written before the mount is made, so that a crash in between leaves a row that says where to look.

use std::fmt;
use std::str::FromStr;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{catalog_error, retention, to_sql};
use crate::error::{Error, Result};

/// State of a job's right: see the module's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Right held, nothing mounted.
    Reserved,
    /// About to be mounted.
    Attaching,
    /// Mounted.
    Attached,
    /// Was mounted, and could not be mounted again.
    Lost,
}

impl JobState {
    /// The word in rows and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for JobState {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Reserved, Self::Attaching, Self::Attached, Self::Lost]
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| Error::corrupt("CATALOG_DAMAGED", format!("the catalog has a job of state `{text}`")))
    }
}

/// One checkpoint that a job has a right to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Checkpoint id.
    pub checkpoint: String,
    /// Directory below the target; empty where it is at the root.
    pub subdir: String,
}

/// A job's row with its leases.
#[derive(Clone, Debug)]
pub struct JobRow {
    /// Job id.
    pub job: String,
    /// Owner; may be empty.
    pub owner: String,
    /// State.
    pub state: JobState,
    /// Where the view is; empty while reserved.
    pub target: String,
    /// Process whose mount namespace the target is in; 0: the host's.
    pub pid: u32,
    /// JSON of what was mounted.
    pub mounted: Option<String>,
    /// Milliseconds since the epoch.
    pub created_ms: i64,
    /// When the right ends by itself, in milliseconds since the epoch; `None`: when it is released.
    pub expires_ms: Option<i64>,
    /// What it has a right to, in the order given.
    pub leases: Vec<Lease>,
}

/// Writes a job's row and leases, replacing what was there.
///
/// # Errors
/// Those of the catalog.
pub fn put(tx: &Connection, row: &JobRow) -> Result<()> {
    let write = || -> rusqlite::Result<()> {
        tx.prepare_cached(
            "INSERT OR REPLACE INTO jobs (job, owner, state, target, pid, mounted, created_ms, expires_ms)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            row.job,
            row.owner,
            row.state.as_str(),
            row.target,
            row.pid,
            row.mounted,
            row.created_ms,
            row.expires_ms
        ])?;
        tx.prepare_cached("DELETE FROM leases WHERE job = ?")?.execute([&row.job])?;
        let mut insert =
            tx.prepare_cached("INSERT INTO leases (job, position, checkpoint, subdir) VALUES (?, ?, ?, ?)")?;
        for (position, lease) in row.leases.iter().enumerate() {
            insert.execute(params![row.job, to_sql(position as u64), lease.checkpoint, lease.subdir])?;
        }
        Ok(())
    };
    write().map_err(catalog_error)
}

/// [`put`] for rights that are new, which is a use of what they name at `now_ms`: it must still be there, so that a removal and a lease never pass
/// each other.
///
/// # Errors
/// `NO_SUCH_CHECKPOINT`; those of the catalog.
pub fn put_checked(tx: &Connection, row: &JobRow, now_ms: i64) -> Result<()> {
    for lease in &row.leases {
        retention::touch(tx, &lease.checkpoint, now_ms)?;
        let there = tx
            .prepare_cached("SELECT 1 FROM checkpoints WHERE id = ? AND state <> 'removing'")
            .and_then(|mut query| query.exists([&lease.checkpoint]))
            .map_err(catalog_error)?;
        if !there {
            return Err(Error::not_found(
                "NO_SUCH_CHECKPOINT",
                format!("the checkpoint `{}` was removed meanwhile", lease.checkpoint),
            )
            .remedy("`ckptctl list` shows what there is"));
        }
    }
    put(tx, row)
}

/// The row of a job.
///
/// # Errors
/// Those of the catalog.
pub fn get(tx: &Connection, job: &str) -> Result<Option<JobRow>> {
    let found = tx
        .prepare_cached(
            "SELECT job, owner, state, target, pid, mounted, created_ms, expires_ms FROM jobs WHERE job = ?",
        )
        .and_then(|mut query| query.query_row([job], raw).optional())
        .map_err(catalog_error)?;
    found.map(|row| complete(tx, row)).transpose()
}

/// All jobs in order of their ids.
///
/// # Errors
/// Those of the catalog.
pub fn list(tx: &Connection) -> Result<Vec<JobRow>> {
    let read = || -> rusqlite::Result<Vec<(JobRow, String)>> {
        tx.prepare_cached(
            "SELECT job, owner, state, target, pid, mounted, created_ms, expires_ms FROM jobs ORDER BY job",
        )?
        .query_map([], raw)?
        .collect()
    };
    read().map_err(catalog_error)?.into_iter().map(|row| complete(tx, row)).collect()
}

/// Sets when the right of a job ends by itself.
///
/// # Errors
/// Those of the catalog.
pub fn set_expiry(tx: &Connection, job: &str, expires_ms: Option<i64>) -> Result<()> {
    tx.prepare_cached("UPDATE jobs SET expires_ms = ? WHERE job = ?")
        .and_then(|mut update| update.execute(params![expires_ms, job]))
        .map(|_| ())
        .map_err(catalog_error)
}

/// Jobs whose right ends by itself, and when, the earliest first.
///
/// # Errors
/// Those of the catalog.
pub fn expiries(tx: &Connection) -> Result<Vec<(String, i64)>> {
    let read = || -> rusqlite::Result<Vec<(String, i64)>> {
        tx.prepare_cached("SELECT job, expires_ms FROM jobs WHERE expires_ms IS NOT NULL ORDER BY expires_ms, job")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    };
    read().map_err(catalog_error)
}

/// Forgets a job; until `now_ms` it used what it had a right to.
///
/// # Errors
/// Those of the catalog.
pub fn delete(tx: &Connection, job: &str, now_ms: i64) -> Result<()> {
    let delete = || -> rusqlite::Result<()> {
        tx.prepare_cached(
            "UPDATE checkpoints SET used_ms = ? WHERE id IN (SELECT checkpoint FROM leases WHERE job = ?)",
        )?
        .execute(params![now_ms, job])?;
        tx.prepare_cached("DELETE FROM leases WHERE job = ?")?.execute([job])?;
        tx.prepare_cached("DELETE FROM jobs WHERE job = ?")?.execute([job])?;
        Ok(())
    };
    delete().map_err(catalog_error)
}

/// Jobs that have a right to a checkpoint.
///
/// # Errors
/// Those of the catalog.
pub fn holders(tx: &Connection, checkpoint: &str) -> Result<Vec<String>> {
    let read = || -> rusqlite::Result<Vec<String>> {
        tx.prepare_cached("SELECT DISTINCT job FROM leases WHERE checkpoint = ? ORDER BY job")?
            .query_map([checkpoint], |row| row.get(0))?
            .collect()
    };
    read().map_err(catalog_error)
}

fn raw(row: &rusqlite::Row<'_>) -> rusqlite::Result<(JobRow, String)> {
    let job = JobRow {
        job: row.get(0)?,
        owner: row.get(1)?,
        state: JobState::Reserved,
        target: row.get(3)?,
        pid: row.get(4)?,
        mounted: row.get(5)?,
        created_ms: row.get(6)?,
        expires_ms: row.get(7)?,
        leases: Vec::new(),
    };
    Ok((job, row.get(2)?))
}

fn complete(tx: &Connection, (job, state): (JobRow, String)) -> Result<JobRow> {
    let read = || -> rusqlite::Result<Vec<Lease>> {
        tx.prepare_cached("SELECT checkpoint, subdir FROM leases WHERE job = ? ORDER BY position")?
            .query_map([&job.job], |row| Ok(Lease { checkpoint: row.get(0)?, subdir: row.get(1)? }))?
            .collect()
    };
    let leases = read().map_err(catalog_error)?;
    Ok(JobRow { state: state.parse()?, leases, ..job })
}
