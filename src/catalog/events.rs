//! What happened: bounded, oldest dropped first.
//!
//! Operators see all, numbered as they came. An owner sees what is about its own, under numbers that tell nothing of how much happens to
//! others: milliseconds since the epoch, or one more than its event before.

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
    /// Whose checkpoint or job that is, if neither has a row any more.
    pub owner: String,
    /// One sentence.
    pub message: String,
    /// Whether it tells of more than one owner's, so that it is shown to operators only, whosever the checkpoint or job is.
    pub operators_only: bool,
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
    let owner = owner_of(tx, event)?;
    let insert =
        || -> rusqlite::Result<()> {
            let last: i64 = tx
                .prepare_cached("SELECT COALESCE(MAX(number), 0) FROM events WHERE owner = ?")?
                .query_row([&owner], |row| row.get(0))?;
            tx.prepare_cached(
            "INSERT INTO events (at_ms, kind, checkpoint, job, message, owner, number) VALUES (?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![at_ms, event.kind, event.checkpoint, event.job, event.message, owner, at_ms.max(last + 1)])?;
            Ok(())
        };
    insert().map_err(catalog_error)?;
    let oldest = tx.last_insert_rowid() - to_sql(limits::EVENTS_KEPT);
    tx.prepare_cached("DELETE FROM events WHERE id <= ?")
        .and_then(|mut delete| delete.execute([oldest]))
        .map_err(catalog_error)?;
    Ok(())
}

/// Who owns what an event is about; empty where nobody does.
fn owner_of(tx: &Connection, event: &NewEvent) -> Result<String> {
    if event.operators_only {
        return Ok(String::new());
    }
    if !event.owner.is_empty() {
        return Ok(event.owner.clone());
    }
    tx.prepare_cached(
        "SELECT COALESCE((SELECT owner FROM checkpoints WHERE id = ?1), (SELECT owner FROM jobs WHERE job = ?2), '')",
    )
    .and_then(|mut query| query.query_row([&event.checkpoint, &event.job], |row| row.get(0)))
    .map_err(catalog_error)
}

/// Events after `id`, oldest first, at most `most`.
///
/// # Errors
/// Those of the catalog.
pub fn after(tx: &Connection, id: u64, most: usize) -> Result<Vec<Event>> {
    select(tx, "id", "id > ?", params![to_sql(id), to_sql(most as u64)])
}

/// Events about what is `owner`'s after its event of number `id`, oldest first, at most `most`; their ids are those numbers.
///
/// # Errors
/// Those of the catalog.
pub fn of_owner_after(tx: &Connection, owner: &str, id: u64, most: usize) -> Result<Vec<Event>> {
    select(tx, "number", "owner = ? AND number > ?", params![owner, to_sql(id), to_sql(most as u64)])
}

fn select(tx: &Connection, id: &str, condition: &str, arguments: impl rusqlite::Params) -> Result<Vec<Event>> {
    let read = || -> rusqlite::Result<Vec<Event>> {
        let mut query = tx.prepare_cached(&format!(
            "SELECT {id}, at_ms, kind, checkpoint, job, message FROM events WHERE {condition} ORDER BY {id} LIMIT ?",
        ))?;
        let rows = query.query_map(arguments, |row| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::schema;

    #[test]
    fn an_owner_sees_its_own_events_under_numbers_that_tell_nothing_of_others() {
        let mut tx = Connection::open_in_memory().unwrap();
        schema::migrate(&mut tx).unwrap();
        let note = |at_ms, owner: &str| {
            let event = NewEvent { kind: "X", owner: owner.into(), message: owner.into(), ..Default::default() };
            record(&tx, at_ms, &event).unwrap();
        };
        for (at_ms, owner) in [(1000, "a"), (1000, "b"), (1000, ""), (1000, "a"), (900, "a"), (5000, "b"), (6000, "a")]
        {
            note(at_ms, owner);
        }
        let numbers = |owner, after| -> Vec<_> {
            of_owner_after(&tx, owner, after, 99).unwrap().into_iter().map(|event| event.id).collect()
        };
        assert_eq!(numbers("a", 0), [1000, 1001, 1002, 6000]);
        assert_eq!(numbers("a", 1001), [1002, 6000]);
        assert_eq!(numbers("b", 0), [1000, 5000]);
        assert_eq!(after(&tx, 0, 99).unwrap().len(), 7);
    }
}
