//! What was learned about filling and reading: the order in which a job first read a tree, how fast places give, and how estimates turned out.
//!
//! All of it is advice: nothing is wrong where a row is missing, and the oldest rows are dropped.
//!
//! **Each owner's is its own.** An order of reading decides in which order a source is asked, which whoever runs the source sees; a rate is shown in
//! estimates. Learned from another owner's jobs they would tell what that owner has, and from where.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{catalog_error, from_sql, to_sql};
use crate::digest::Digest;
use crate::error::Result;
use crate::limits;

/// An estimate and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimated {
    /// Checkpoint id.
    pub checkpoint: String,
    /// When it was made, in milliseconds since the epoch.
    pub at_ms: i64,
    /// Bytes that were missing then.
    pub bytes: u64,
    /// Time that they were expected to take.
    pub expected_ms: u64,
    /// Time that they took; `None` while it is not known.
    pub took_ms: Option<u64>,
}

/// Keeps the order in which an owner's tree of `shape` was first read: entries and fill units. A later one changes nothing, unless
/// the one that is kept is of opens alone or the beginning of the other.
///
/// # Errors
/// Those of the catalog.
pub fn keep_order(tx: &Connection, owner: &str, shape: &Digest, order: &[(u32, u32)], now_ms: i64) -> Result<()> {
    // What the kernel read itself tells of opens alone: an order that knows more takes its place.
    let known = self::order(tx, owner, shape)?;
    let known_tells = known.iter().any(|(_, unit)| *unit > 0);
    let tells_more = order.iter().any(|(_, unit)| *unit > 0) && order.len() >= known.len();
    let goes_on = order.len() > known.len()
        && order.iter().zip(&known).all(|((entry, unit), before)| (*entry, u64::from(*unit)) == *before);
    if !known.is_empty() && !goes_on && (known_tells || !tells_more) {
        return Ok(());
    }
    let encoded: Vec<u8> =
        order.iter().flat_map(|(entry, unit)| entry.to_le_bytes().into_iter().chain(unit.to_le_bytes())).collect();
    tx.prepare_cached("INSERT OR REPLACE INTO orders (shape, read, at_ms) VALUES (?, ?, ?)")
        .and_then(|mut insert| insert.execute(params![of_owner(owner, shape).as_bytes(), encoded, now_ms]))
        .map_err(catalog_error)?;
    drop_oldest(tx, "orders")
}

/// The order in which an owner's tree of `shape` was first read; empty if that is not known.
///
/// # Errors
/// Those of the catalog.
pub fn order(tx: &Connection, owner: &str, shape: &Digest) -> Result<Vec<(u32, u64)>> {
    let encoded: Option<Vec<u8>> = tx
        .prepare_cached("SELECT read FROM orders WHERE shape = ?")
        .and_then(|mut query| query.query_row([of_owner(owner, shape).as_bytes()], |row| row.get(0)).optional())
        .map_err(catalog_error)?;
    let word = |four: &[u8]| four.try_into().map_or(0, u32::from_le_bytes);
    let pair = |pair: &[u8]| (word(&pair[..4]), u64::from(word(&pair[4..])));
    Ok(encoded.unwrap_or_default().chunks_exact(8).map(pair).collect())
}

/// Notes how fast `place` gave to an owner; half of what is remembered is the latest.
///
/// # Errors
/// Those of the catalog.
pub fn note_rate(tx: &Connection, owner: &str, place: &str, bytes_per_s: u64, now_ms: i64) -> Result<()> {
    tx.prepare_cached(
        "INSERT INTO rates (place, bytes_per_s, at_ms) VALUES (?1, ?2, ?3)
         ON CONFLICT (place) DO UPDATE SET bytes_per_s = (bytes_per_s + ?2) / 2, at_ms = ?3",
    )
    .and_then(|mut upsert| upsert.execute(params![place_of_owner(owner, place), to_sql(bytes_per_s), now_ms]))
    .map_err(catalog_error)?;
    drop_oldest(tx, "rates")
}

/// How fast `place` gave to an owner, in bytes a second; `None` where it has not been seen.
///
/// # Errors
/// Those of the catalog.
pub fn rate(tx: &Connection, owner: &str, place: &str) -> Result<Option<u64>> {
    tx.prepare_cached("SELECT bytes_per_s FROM rates WHERE place = ?")
        .and_then(|mut query| {
            query.query_row([place_of_owner(owner, place)], |row| row.get(0).map(from_sql)).optional()
        })
        .map_err(catalog_error)
}

/// Notes an estimate, in place of an earlier one of the same checkpoint.
///
/// # Errors
/// Those of the catalog.
pub fn note_estimate(tx: &Connection, estimated: &Estimated) -> Result<()> {
    let Estimated { checkpoint, at_ms, bytes, expected_ms, .. } = estimated;
    tx.prepare_cached(
        "INSERT OR REPLACE INTO estimates (checkpoint, at_ms, bytes, expected_ms, took_ms) VALUES (?, ?, ?, ?, NULL)",
    )
    .and_then(|mut put| put.execute(params![checkpoint, at_ms, to_sql(*bytes), to_sql(*expected_ms)]))
    .map_err(catalog_error)?;
    drop_oldest(tx, "estimates")
}

/// Notes that a checkpoint is ready, for the estimate that was made of it, if there is one without an outcome.
///
/// # Errors
/// Those of the catalog.
pub fn note_outcome(tx: &Connection, checkpoint: &str, now_ms: i64) -> Result<()> {
    tx.prepare_cached("UPDATE estimates SET took_ms = max(0, ?2 - at_ms) WHERE checkpoint = ?1 AND took_ms IS NULL")
        .and_then(|mut update| update.execute(params![checkpoint, now_ms]))
        .map_err(catalog_error)?;
    Ok(())
}

/// The latest estimates, newest first, at most `most`.
///
/// # Errors
/// Those of the catalog.
pub fn estimates(tx: &Connection, most: usize) -> Result<Vec<Estimated>> {
    let read = || -> rusqlite::Result<Vec<Estimated>> {
        tx.prepare_cached(
            "SELECT checkpoint, at_ms, bytes, expected_ms, took_ms FROM estimates ORDER BY at_ms DESC LIMIT ?",
        )?
        .query_map([to_sql(most as u64)], |row| {
            Ok(Estimated {
                checkpoint: row.get(0)?,
                at_ms: row.get(1)?,
                bytes: from_sql(row.get(2)?),
                expected_ms: from_sql(row.get(3)?),
                took_ms: row.get::<_, Option<i64>>(4)?.map(from_sql),
            })
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// The key of an owner's order; the shape itself for what nobody owns.
fn of_owner(owner: &str, shape: &Digest) -> Digest {
    if owner.is_empty() { *shape } else { Digest::of(&[shape.as_bytes(), owner.as_bytes()].concat()) }
}

/// The key of an owner's rate; owners have no control characters.
fn place_of_owner(owner: &str, place: &str) -> String {
    if owner.is_empty() { place.to_owned() } else { format!("{owner}\n{place}") }
}

fn drop_oldest(tx: &Connection, table: &str) -> Result<()> {
    let rows = to_sql(limits::FORECASTS_KEPT);
    let drop =
        format!("DELETE FROM {table} WHERE at_ms < (SELECT at_ms FROM {table} ORDER BY at_ms DESC LIMIT 1 OFFSET ?)");
    tx.prepare_cached(&drop).and_then(|mut delete| delete.execute([rows])).map_err(catalog_error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::schema;

    #[test]
    fn the_first_order_stays_and_estimates_meet_their_outcome() {
        let mut tx = Connection::open_in_memory().unwrap();
        schema::migrate(&mut tx).unwrap();
        let shape = Digest::of(b"x");
        keep_order(&tx, "a", &shape, &[(3, 7), (1, 0)], 5).unwrap();
        keep_order(&tx, "a", &shape, &[(9, 9)], 6).unwrap();
        assert_eq!(order(&tx, "a", &shape).unwrap(), [(3, 7), (1, 0)]);
        let opened = Digest::of(b"opened");
        for (read, kept) in
            [([(3, 0), (1, 0)], (3, 0)), ([(5, 0), (6, 0)], (3, 0)), ([(1, 0), (1, 4)], (1, 0)), ([(9, 9); 2], (1, 0))]
        {
            keep_order(&tx, "a", &opened, &read, 7).unwrap();
            assert_eq!(order(&tx, "a", &opened).unwrap()[0], kept, "{read:?}");
        }
        assert!(order(&tx, "a", &Digest::of(b"y")).unwrap().is_empty());
        for other in ["b", ""] {
            assert!(order(&tx, other, &shape).unwrap().is_empty(), "what a's jobs read first is known to `{other}`");
        }

        note_rate(&tx, "a", "web:h", 100, 1).unwrap();
        note_rate(&tx, "a", "web:h", 300, 2).unwrap();
        let rates = [("a", "web:h"), ("a", "other"), ("b", "web:h"), ("", "web:h")]
            .map(|(owner, place)| rate(&tx, owner, place).unwrap());
        assert_eq!(rates, [Some(200), None, None, None]);

        let estimated = Estimated { checkpoint: "c".into(), at_ms: 1000, bytes: 5, expected_ms: 40, took_ms: None };
        note_estimate(&tx, &estimated).unwrap();
        note_outcome(&tx, "c", 1050).unwrap();
        note_outcome(&tx, "c", 9999).unwrap();
        assert_eq!(estimates(&tx, 9).unwrap(), [Estimated { took_ms: Some(50), ..estimated }]);
    }

    #[test]
    fn old_rows_make_room() {
        let mut tx = Connection::open_in_memory().unwrap();
        schema::migrate(&mut tx).unwrap();
        for at in 0..limits::FORECASTS_KEPT + 5 {
            note_rate(&tx, "", &format!("p{at}"), 1, i64::try_from(at).unwrap()).unwrap();
        }
        assert_eq!(rate(&tx, "", "p0").unwrap(), None);
        assert_eq!(rate(&tx, "", &format!("p{}", limits::FORECASTS_KEPT)).unwrap(), Some(1));
    }
}
