//! What happened, for operators: bounded, oldest dropped first.

use rusqlite::{Connection, params};

use super::{catalog_error, from_sql, to_sql};
use crate::error::Result;
use crate::limits;

/// An event to record.
#[derive(Debug, Default)]
pub struct NewEvent {
    /// SCREAMING_SNAKE.
    pub kind: &'static str,
    /// Checkpoint id; empty if not about one.
    pub checkpoint: String,
    /// Job id; empty if not about one.
    pub job: String,
    /// One sentence.
    pub message: String,
}

/// A recorded event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Ascending.
    pub id: u64,
    /// Milliseconds since the epoch.
    pub at_ms: i64,
    /// SCREAMING_SNAKE.
    pub kind: String,
    /// Checkpoint id or empty.
    pub checkpoint: String,
    /// Job id or empty.
    pub job: String,
    /// One sentence.
    pub message: String,
}

/// Adds an event and drops what is beyond `limits::EVENTS_KEPT`.
///
/// # Errors
/// Those of the catalog.
pub fn record(tx: &Connection, at_ms: i64, event: &NewEvent) -> Result<()> {
    tx.prepare_cached("INSERT INTO events (at_ms, kind, checkpoint, job, message) VALUES (?, ?, ?, ?, ?)")
        .and_then(|mut insert| insert.execute(params![at_ms, event.kind, event.checkpoint, event.job, event.message]))
        .map_err(catalog_error)?;
    let oldest = tx.last_insert_rowid() - to_sql(limits::EVENTS_KEPT);
    tx.prepare_cached("DELETE FROM events WHERE id <= ?")
        .and_then(|mut delete| delete.execute([oldest]))
        .map_err(catalog_error)?;
    Ok(())
}

/// Events after `id`, oldest first, at most `most`.
///
/// # Errors
/// Those of the catalog.
pub fn after(tx: &Connection, id: u64, most: usize) -> Result<Vec<Event>> {
    let read = || -> rusqlite::Result<Vec<Event>> {
        let mut query = tx.prepare_cached(
            "SELECT id, at_ms, kind, checkpoint, job, message FROM events WHERE id > ? ORDER BY id LIMIT ?",
        )?;
        let rows = query.query_map(params![to_sql(id), to_sql(most as u64)], |row| {
            Ok(Event {
                id: from_sql(row.get(0)?),
                at_ms: row.get(1)?,
                kind: row.get(2)?,
                checkpoint: row.get(3)?,
                job: row.get(4)?,
                message: row.get(5)?,
            })
        })?;
        rows.collect()
    };
    read().map_err(catalog_error)
}
