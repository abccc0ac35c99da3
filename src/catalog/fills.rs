//! Files of running and interrupted flights: what a flight resumes from.
//!
//! A row appears when a large file begins to fill (with the bitmap of its durable units) or when a file is sealed. Rows of a
//! flight go in the transaction that makes its checkpoint ready, or when the flight is given up. A file whose blob was lost meanwhile
//! ([`scrubs`](super::scrubs)) is not here: the row names the blob still, which goes with the flight, and the file is filled anew.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{catalog_error, digest_at, from_sql, to_sql, uploads};
use crate::digest::Digest;
use crate::error::Result;
use crate::manifest::Manifest;

/// How far a file of a flight is.
#[derive(Clone, Debug)]
pub struct FillRow {
    /// Path in the checkpoint, as bytes.
    pub path: Vec<u8>,
    /// Number of its file in the flight's directory.
    pub number: u64,
    /// Size in bytes.
    pub size: u64,
    /// Bitmap of durable units.
    pub units: Vec<u8>,
    /// Digest of its blob once sealed, while all of that is here.
    pub sealed: Option<Digest>,
}

/// All rows of a flight.
///
/// # Errors
/// Those of the catalog.
pub fn of_flight(tx: &Connection, flight: &str) -> Result<Vec<FillRow>> {
    let read = || -> rusqlite::Result<Vec<FillRow>> {
        tx.prepare_cached(
            "SELECT f.path, f.number, f.size, CASE WHEN f.blob IS NULL THEN f.units END, b.digest
             FROM fills f LEFT JOIN blobs b ON b.id = f.blob AND b.state = 'sealed' WHERE f.flight = ?",
        )?
        .query_map([flight], |row| {
            let sealed = row.get_ref(4)?;
            Ok(FillRow {
                path: row.get(0)?,
                number: from_sql(row.get(1)?),
                size: from_sql(row.get(2)?),
                units: row.get::<_, Option<Vec<u8>>>(3)?.unwrap_or_default(),
                sealed: if sealed == rusqlite::types::ValueRef::Null { None } else { Some(digest_at(row, 4)?) },
            })
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Notes the durable units of a file that fills. One that is sealed stays so, unless its blob was lost.
///
/// # Errors
/// Those of the catalog.
pub fn set_units(tx: &Connection, flight: &str, path: &[u8], number: u64, size: u64, units: &[u8]) -> Result<()> {
    tx.prepare_cached(
        "INSERT INTO fills (flight, path, number, size, units) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (flight, path) DO UPDATE SET number = ?3, size = ?4, units = ?5,
             blob = (SELECT id FROM blobs WHERE id = fills.blob AND state = 'sealed')",
    )
    .and_then(|mut upsert| upsert.execute(params![flight, path, to_sql(number), to_sql(size), units]))
    .map_err(catalog_error)?;
    Ok(())
}

/// A file that is being filled: its flight, its path in the checkpoint, its number and its size.
pub type Begun = (String, Vec<u8>, u64, u64);

/// Files that have durable units and are not sealed, of all flights.
///
/// # Errors
/// Those of the catalog.
pub fn begun(tx: &Connection) -> Result<Vec<Begun>> {
    let read = || -> rusqlite::Result<Vec<Begun>> {
        tx.prepare_cached("SELECT flight, path, number, size FROM fills WHERE blob IS NULL AND units IS NOT NULL")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, from_sql(row.get(2)?), from_sql(row.get(3)?))))?
            .collect()
    };
    read().map_err(catalog_error)
}

/// Forgets what is durable of a file that is not sealed.
///
/// # Errors
/// Those of the catalog.
pub fn forget_units(tx: &Connection, flight: &str, path: &[u8]) -> Result<()> {
    tx.prepare_cached("UPDATE fills SET units = NULL WHERE flight = ? AND path = ? AND blob IS NULL")
        .and_then(|mut update| update.execute(params![flight, path]))
        .map_err(catalog_error)?;
    Ok(())
}

/// Notes that a file is sealed as `blob`.
///
/// # Errors
/// Those of the catalog.
pub fn set_sealed(tx: &Connection, flight: &str, path: &[u8], number: u64, size: u64, blob: i64) -> Result<()> {
    tx.prepare_cached(
        "INSERT INTO fills (flight, path, number, size, blob) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (flight, path) DO UPDATE SET blob = ?5, size = ?4",
    )
    .and_then(|mut upsert| upsert.execute(params![flight, path, to_sql(number), to_sql(size), blob]))
    .map_err(catalog_error)?;
    Ok(())
}

/// Gives flight `to` what flight `from` has sealed of `paths`, which both list alike; `from` keeps it.
///
/// # Errors
/// Those of the catalog.
pub fn share_sealed(tx: &Connection, from: &str, to: &str, paths: &[Vec<u8>]) -> Result<()> {
    let share = || -> rusqlite::Result<()> {
        let mut insert = tx.prepare_cached(
            "INSERT OR IGNORE INTO fills (flight, path, number, size, blob)
             SELECT ?2, f.path, f.number, f.size, f.blob FROM fills f JOIN blobs b ON b.id = f.blob AND b.state = 'sealed'
             WHERE f.flight = ?1 AND f.path = ?3",
        )?;
        paths.iter().try_for_each(|path| insert.execute(params![from, to, path]).map(|_| ()))
    };
    share().map_err(catalog_error)
}

/// Keeps the tree that a flight fills, for whoever must show it before the source has been asked again.
///
/// # Errors
/// Those of the catalog.
pub fn put_listing(tx: &Connection, flight: &str, tree: &Manifest) -> Result<()> {
    tx.prepare_cached("INSERT OR REPLACE INTO listings (flight, tree) VALUES (?, ?)")
        .and_then(|mut put| put.execute(params![flight, tree.encode()]))
        .map_err(catalog_error)?;
    Ok(())
}

/// The tree that a flight fills, if it was kept.
///
/// # Errors
/// Those of the catalog; corrupt where it does not decode.
pub fn listing(tx: &Connection, flight: &str) -> Result<Option<Manifest>> {
    let encoded: Option<Vec<u8>> = tx
        .prepare_cached("SELECT tree FROM listings WHERE flight = ?")
        .and_then(|mut query| query.query_row([flight], |row| row.get(0)).optional())
        .map_err(catalog_error)?;
    encoded.map(|encoded| Manifest::decode(&encoded)).transpose()
}

/// Forgets files of a flight, whatever there is of them. Blobs that nothing names by then are for the sweep of leftovers.
///
/// # Errors
/// Those of the catalog.
pub fn forget_files(tx: &Connection, flight: &str, paths: &[Vec<u8>]) -> Result<()> {
    let forget = || -> rusqlite::Result<()> {
        let mut delete = tx.prepare_cached("DELETE FROM fills WHERE flight = ? AND path = ?")?;
        paths.iter().try_for_each(|path| delete.execute(params![flight, path]).map(|_| ()))
    };
    forget().map_err(catalog_error)
}

/// Whether anything is left of a flight.
///
/// # Errors
/// Those of the catalog.
pub fn is_left(tx: &Connection, flight: &str) -> Result<bool> {
    tx.prepare_cached("SELECT 1 FROM fills WHERE flight = ?1 UNION ALL SELECT 1 FROM uploads WHERE flight = ?1")
        .and_then(|mut query| query.exists([flight]))
        .map_err(catalog_error)
}

/// Forgets up to `most` files of a flight, its listing, and as many entries of what was sent. Returns the blobs that the files were sealed as;
/// `None` when nothing is left.
///
/// # Errors
/// Those of the catalog.
pub fn forget(tx: &Connection, flight: &str, most: usize) -> Result<Option<Vec<i64>>> {
    let forget = || -> rusqlite::Result<Option<Vec<i64>>> {
        tx.prepare_cached("DELETE FROM listings WHERE flight = ?")?.execute([flight])?;
        let files: Vec<(Vec<u8>, Option<i64>)> = tx
            .prepare_cached("SELECT path, blob FROM fills WHERE flight = ? LIMIT ?")?
            .query_map(params![flight, to_sql(most as u64)], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<_>>()?;
        let were_sent = uploads::forget(tx, flight, most)?;
        if files.is_empty() && !were_sent {
            return Ok(None);
        }
        let mut delete = tx.prepare_cached("DELETE FROM fills WHERE flight = ? AND path = ?")?;
        for (path, _) in &files {
            delete.execute(params![flight, path])?;
        }
        Ok(Some(files.into_iter().filter_map(|(_, blob)| blob).collect()))
    };
    forget().map_err(catalog_error)
}

/// Flights that have rows.
///
/// # Errors
/// Those of the catalog.
pub fn flights(tx: &Connection) -> Result<Vec<String>> {
    let read = || -> rusqlite::Result<Vec<String>> {
        // From one flight to the next, not through the files of each.
        tx.prepare_cached(
            "WITH RECURSIVE each(flight) AS (SELECT MIN(flight) FROM fills UNION ALL
             SELECT (SELECT MIN(f.flight) FROM fills f WHERE f.flight > each.flight) FROM each WHERE each.flight IS NOT NULL)
             SELECT flight FROM each WHERE flight IS NOT NULL UNION SELECT flight FROM listings UNION SELECT flight FROM uploads",
        )?
        .query_map([], |row| row.get(0))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Bytes that checkpoints which fill were admitted for and that are not sealed: what is being filled, and what is still to come.
///
/// # Errors
/// Those of the catalog.
pub fn unsealed_bytes(tx: &Connection) -> Result<u64> {
    let sum = tx.query_row(
        "SELECT COALESCE(SUM(MAX(admitted - sealed, 0)), 0) FROM (
             SELECT MAX(c.charged_bytes) AS admitted,
                    (SELECT COALESCE(SUM(f.size), 0) FROM fills f WHERE f.flight = c.flight AND f.blob IS NOT NULL) AS sealed
             FROM checkpoints c WHERE c.state = 'filling' AND c.flight <> '' GROUP BY c.flight)",
        [],
        |row| row.get::<_, i64>(0),
    );
    sum.map(from_sql).map_err(catalog_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::blobs::{self, BlobRow, ChunkRow, Home};
    use crate::catalog::{schema, scrubs};

    const LEN: u64 = 1 << 20;

    #[test]
    fn what_is_lost_of_a_flight_is_to_be_filled_anew_and_its_holes_are_known() {
        let mut tx = Connection::open_in_memory().unwrap();
        schema::migrate(&mut tx).unwrap();
        let [lost, borrower] = [b"lost", b"lack"].map(|bytes| Digest::of(bytes));
        let id = blobs::seal(&tx, &lost, LEN, LEN).unwrap();
        blobs::enter_chunk(&tx, &ChunkRow { digest: Digest::of(b"chunk"), start: 0, len: LEN }, id).unwrap();
        let other = blobs::seal(&tx, &borrower, LEN, 0).unwrap();
        blobs::borrow(&tx, other, 0, LEN, Home { blob: id, start: 0 }).unwrap();
        set_units(&tx, "f", b"lost", 1, LEN, &[1]).unwrap();
        set_sealed(&tx, "f", b"lost", 1, LEN, id).unwrap();
        set_sealed(&tx, "f", b"lack", 2, LEN, other).unwrap();
        let sealed = |tx: &Connection, flight| -> Vec<Option<Digest>> {
            of_flight(tx, flight).unwrap().into_iter().map(|row| row.sealed).collect()
        };
        assert_eq!(sealed(&tx, "f"), [Some(borrower), Some(lost)]);
        scrubs::lose(&tx, &BlobRow { id, digest: lost, size: LEN }).unwrap();
        assert_eq!(sealed(&tx, "f"), [None, None]);
        assert!(of_flight(&tx, "f").unwrap().iter().all(|row| row.units.is_empty()), "nothing of them is here");
        share_sealed(&tx, "f", "g", &[b"lost".to_vec(), b"lack".to_vec()]).unwrap();
        assert!(of_flight(&tx, "g").unwrap().is_empty());
        let compact = blobs::compact_among(&tx, &[lost, borrower]).unwrap();
        assert!(compact.len() == 1 && compact[0].1[0].home == lost, "{compact:?}");

        set_units(&tx, "f", b"lost", 1, LEN, &[1]).unwrap();
        assert_eq!(of_flight(&tx, "f").unwrap()[1].units, [1], "and what comes of it counts again");
        let again = blobs::seal(&tx, &lost, LEN, LEN).unwrap();
        set_sealed(&tx, "f", b"lost", 1, LEN, again).unwrap();
        set_units(&tx, "f", b"lost", 1, LEN, &[1]).unwrap();
        assert_eq!(sealed(&tx, "f"), [None, Some(lost)], "a late note does not unseal it");
    }
}
