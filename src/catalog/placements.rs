//! Files of checkpoints that are served in place: no blob, but the stamp that the file had while its digest was taken.
//!
//! A flight enters *sightings* as it takes digests; the transaction that makes a checkpoint ready copies them as the checkpoint's
//! *placements*, one for each file of its manifest. A flight of another revision takes over the sightings of the one before it: what still
//! bears its stamp need not be read again.

use std::collections::HashMap;

use rusqlite::{Connection, params};

use super::{catalog_error, digest_at, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::places::Stamp;

/// A file whose digest is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Path in the checkpoint, as bytes.
    pub path: Vec<u8>,
    /// What it bore meanwhile.
    pub stamp: Stamp,
    /// Digest of its bytes.
    pub digest: Digest,
}

/// Enters what a flight has seen.
///
/// # Errors
/// Those of the catalog.
pub fn enter(tx: &Connection, flight: &str, sightings: &[Sighting]) -> Result<()> {
    let mut insert = tx
        .prepare_cached("INSERT OR REPLACE INTO sightings (flight, path, stamp, digest) VALUES (?, ?, ?, ?)")
        .map_err(catalog_error)?;
    for Sighting { path, stamp, digest } in sightings {
        insert.execute(params![flight, path, stamp.to_string(), digest.as_bytes()]).map_err(catalog_error)?;
    }
    Ok(())
}

/// What a flight has seen of the files in `wanted` as they are now; forgets the rest.
///
/// # Errors
/// Those of the catalog.
pub fn still_true(tx: &Connection, flight: &str, wanted: &HashMap<Vec<u8>, Stamp>) -> Result<Vec<Sighting>> {
    let read = || -> rusqlite::Result<Vec<(Vec<u8>, String, Digest)>> {
        tx.prepare_cached("SELECT path, stamp, digest FROM sightings WHERE flight = ?")?
            .query_map([flight], |row| Ok((row.get(0)?, row.get(1)?, digest_at(row, 2)?)))?
            .collect()
    };
    let mut kept = Vec::new();
    let mut forget = tx.prepare_cached("DELETE FROM sightings WHERE flight = ? AND path = ?").map_err(catalog_error)?;
    for (path, stamp, digest) in read().map_err(catalog_error)? {
        match wanted.get(&path) {
            Some(now) if now.to_string() == stamp => kept.push(Sighting { path, stamp: *now, digest }),
            _ => {
                forget.execute(params![flight, path]).map_err(catalog_error)?;
            }
        }
    }
    Ok(kept)
}

/// Gives what `before` has seen to `flight`.
///
/// # Errors
/// Those of the catalog.
pub fn hand_over(tx: &Connection, before: &str, flight: &str) -> Result<()> {
    tx.prepare_cached(
        "INSERT OR IGNORE INTO sightings (flight, path, stamp, digest)
         SELECT ?2, path, stamp, digest FROM sightings WHERE flight = ?1",
    )
    .and_then(|mut copy| copy.execute([before, flight]))
    .map_err(catalog_error)?;
    Ok(())
}

/// Forgets up to `most` of the files that a flight has seen; returns how many.
///
/// # Errors
/// Those of the catalog.
pub fn forget_flight(tx: &Connection, flight: &str, most: usize) -> Result<usize> {
    tx.prepare_cached(
        "DELETE FROM sightings WHERE flight = ?1 AND path IN (SELECT path FROM sightings WHERE flight = ?1 LIMIT ?2)",
    )
    .and_then(|mut delete| delete.execute(params![flight, to_sql(most as u64)]))
    .map_err(catalog_error)
}

/// Flights that have seen anything.
///
/// # Errors
/// Those of the catalog.
pub fn flights(tx: &Connection) -> Result<Vec<String>> {
    let read = || -> rusqlite::Result<Vec<String>> {
        // From one flight to the next, not through the files of each.
        tx.prepare_cached(
            "WITH RECURSIVE each(flight) AS (SELECT MIN(flight) FROM sightings UNION ALL
             SELECT (SELECT MIN(s.flight) FROM sightings s WHERE s.flight > each.flight) FROM each WHERE each.flight IS NOT NULL)
             SELECT flight FROM each WHERE flight IS NOT NULL",
        )?
        .query_map([], |row| row.get(0))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Makes what `flight` has seen the placements of a checkpoint.
///
/// # Errors
/// `MISSING_PLACEMENT` (our bug) unless there is one for each file of the manifest; those of the catalog.
pub fn settle(tx: &Connection, checkpoint: &str, flight: &str, manifest: &Manifest) -> Result<()> {
    forget(tx, checkpoint)?;
    let settled = tx
        .prepare_cached(
            "INSERT INTO placements (checkpoint, path, stamp) SELECT ?1, path, stamp FROM sightings WHERE flight = ?2",
        )
        .and_then(|mut copy| copy.execute([checkpoint, flight]))
        .map_err(catalog_error)?;
    if settled as u64 == manifest.files() {
        return Ok(());
    }
    Err(Error::new(
        crate::error::Kind::Internal,
        "MISSING_PLACEMENT",
        format!("{settled} files were seen of a checkpoint of {}", manifest.files()),
    ))
}

/// Stamps of a checkpoint's files by their paths in it.
///
/// # Errors
/// Those of the catalog; corrupt for a stamp that is none.
pub fn of_checkpoint(tx: &Connection, checkpoint: &str) -> Result<HashMap<Vec<u8>, Stamp>> {
    let read = || -> rusqlite::Result<Vec<(Vec<u8>, String)>> {
        tx.prepare_cached("SELECT path, stamp FROM placements WHERE checkpoint = ?")?
            .query_map([checkpoint], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    };
    let rows = read().map_err(catalog_error)?;
    rows.into_iter().map(|(path, stamp)| Ok((path, stamp.parse()?))).collect()
}

/// Forgets a checkpoint's placements.
///
/// # Errors
/// Those of the catalog.
pub fn forget(tx: &Connection, checkpoint: &str) -> Result<()> {
    execute(tx, "DELETE FROM placements WHERE checkpoint = ?", checkpoint)
}

fn execute(tx: &Connection, statement: &str, argument: &str) -> Result<()> {
    tx.prepare_cached(statement).and_then(|mut delete| delete.execute([argument])).map_err(catalog_error)?;
    Ok(())
}
