//! Uploads that outlive the daemon: their entries in the order in which they were sent, which a restart goes on from.
//!
//! An entry's row is written with what makes the entry durable, or later: a file's in the transaction that seals it or notes its durable units
//! ([`fills`](super::fills)), that of a directory or link with the next file's. Files are sealed out of order, so a row may be here before those of
//! earlier entries. What is believed is everything up to the first that is missing; what is beyond goes ([`cut`]) before more is taken, since other
//! entries may come in its place.
//!
//! The rows go with their flight ([`fills::forget`](super::fills::forget)), that of the upload last.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{catalog_error, from_sql, to_sql};
use crate::error::Result;

/// What was said of an upload when it was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Bytes in all; 0 where that was not said.
    pub bytes_total: u64,
    /// Whether it is one file by its own name, and not a tree.
    pub one_file: bool,
}

/// An entry: its position, from 0 on, and itself as its sender put it.
pub type Sent = (u64, Vec<u8>);

/// Notes that a flight is an upload that can be gone on with; one that is known stays as it is.
///
/// # Errors
/// Those of the catalog.
pub fn begin(tx: &Connection, flight: &str, begun: Begun) -> Result<()> {
    tx.prepare_cached("INSERT OR IGNORE INTO uploads (flight, bytes_total, one_file) VALUES (?, ?, ?)")
        .and_then(|mut insert| insert.execute(params![flight, to_sql(begun.bytes_total), begun.one_file]))
        .map_err(catalog_error)?;
    Ok(())
}

/// The upload of a flight, if it is one that can be gone on with.
///
/// # Errors
/// Those of the catalog.
pub fn get(tx: &Connection, flight: &str) -> Result<Option<Begun>> {
    tx.prepare_cached("SELECT bytes_total, one_file FROM uploads WHERE flight = ?")
        .and_then(|mut query| {
            query
                .query_row([flight], |row| Ok(Begun { bytes_total: from_sql(row.get(0)?), one_file: row.get(1)? }))
                .optional()
        })
        .map_err(catalog_error)
}

/// Notes entries of an upload; nothing where that is over, or none that can be gone on with.
///
/// # Errors
/// Those of the catalog.
pub fn put(tx: &Connection, flight: &str, entries: &[Sent]) -> Result<()> {
    let put = || -> rusqlite::Result<()> {
        let mut insert = tx.prepare_cached(
            "INSERT OR REPLACE INTO sent (flight, position, entry)
             SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM uploads WHERE flight = ?1)",
        )?;
        entries.iter().try_for_each(|(at, entry)| insert.execute(params![flight, to_sql(*at), entry]).map(|_| ()))
    };
    put().map_err(catalog_error)
}

/// The entries of an upload in their order, up to the first that is missing.
///
/// # Errors
/// Those of the catalog.
pub fn entries(tx: &Connection, flight: &str) -> Result<Vec<Vec<u8>>> {
    let read = || -> rusqlite::Result<Vec<Vec<u8>>> {
        let mut query = tx.prepare_cached("SELECT position, entry FROM sent WHERE flight = ? ORDER BY position")?;
        let mut rows = query.query([flight])?;
        let mut entries = Vec::new();
        while let Some(row) = rows.next()? {
            if from_sql(row.get(0)?) != entries.len() as u64 {
                break;
            }
            entries.push(row.get(1)?);
        }
        Ok(entries)
    };
    read().map_err(catalog_error)
}

/// Forgets up to `most` entries of an upload from position `from` on; whether there were any.
///
/// # Errors
/// Those of the catalog.
pub fn cut(tx: &Connection, flight: &str, from: u64, most: usize) -> Result<bool> {
    delete(tx, flight, from, most).map_err(catalog_error)
}

/// Forgets up to `most` entries of an upload, and itself where none was left; whether one was.
pub(super) fn forget(tx: &Connection, flight: &str, most: usize) -> rusqlite::Result<bool> {
    let any = delete(tx, flight, 0, most)?;
    if !any {
        tx.prepare_cached("DELETE FROM uploads WHERE flight = ?")?.execute([flight])?;
    }
    Ok(any)
}

fn delete(tx: &Connection, flight: &str, from: u64, most: usize) -> rusqlite::Result<bool> {
    let deleted = tx
        .prepare_cached(
            "DELETE FROM sent WHERE flight = ?1 AND position IN
                 (SELECT position FROM sent WHERE flight = ?1 AND position >= ?2 LIMIT ?3)",
        )?
        .execute(params![flight, to_sql(from), to_sql(most as u64)])?;
    Ok(deleted > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{fills, schema};

    fn sent(positions: impl IntoIterator<Item = u64>) -> Vec<Sent> {
        positions.into_iter().map(|at| (at, vec![u8::try_from(at).unwrap()])).collect()
    }

    #[test]
    fn what_is_behind_a_gap_is_not_believed_and_goes() {
        let mut tx = Connection::open_in_memory().unwrap();
        schema::migrate(&mut tx).unwrap();
        let begun = Begun { bytes_total: 7, one_file: true };
        begin(&tx, "u", begun).unwrap();
        begin(&tx, "u", Begun { bytes_total: 8, one_file: false }).unwrap();
        assert_eq!((get(&tx, "u").unwrap(), get(&tx, "v").unwrap()), (Some(begun), None));
        put(&tx, "u", &sent([4, 5, 0, 1])).unwrap();
        put(&tx, "v", &sent([0])).unwrap();
        assert_eq!(entries(&tx, "u").unwrap(), [[0], [1]]);
        assert!(entries(&tx, "v").unwrap().is_empty(), "it is none");
        assert!(cut(&tx, "u", 2, 1).unwrap() && cut(&tx, "u", 2, 9).unwrap() && !cut(&tx, "u", 2, 9).unwrap());
        put(&tx, "u", &sent([2, 3])).unwrap();
        assert_eq!(entries(&tx, "u").unwrap().len(), 4, "nothing of what was there before is among them");
    }

    #[test]
    fn an_upload_goes_with_its_flight_a_step_at_a_time_and_is_found_until_then() {
        let mut tx = Connection::open_in_memory().unwrap();
        schema::migrate(&mut tx).unwrap();
        begin(&tx, "u", Begun { bytes_total: 0, one_file: false }).unwrap();
        put(&tx, "u", &sent(0..5)).unwrap();
        fills::set_units(&tx, "u", b"a", 1, 9, &[1]).unwrap();
        let mut steps = 0;
        while fills::forget(&tx, "u", 2).unwrap().is_some() {
            assert_eq!(fills::flights(&tx).unwrap(), ["u"]);
            assert!(fills::is_left(&tx, "u").unwrap());
            steps += 1;
        }
        assert_eq!(steps, 3);
        assert!(fills::flights(&tx).unwrap().is_empty() && get(&tx, "u").unwrap().is_none());
        assert!(!fills::is_left(&tx, "u").unwrap());
    }
}
