//! Files of running and interrupted flights: what a flight resumes from.
//!
//! A row appears when a large file begins to fill (with the bitmap of its durable units) or when a file is sealed. Rows of a
//! flight go in the transaction that makes its checkpoint ready, or when the flight is given up.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{catalog_error, digest_at, from_sql, to_sql};
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
    /// Digest of its blob once sealed.
    pub sealed: Option<Digest>,
}

/// All rows of a flight.
///
/// # Errors
/// Those of the catalog.
pub fn of_flight(tx: &Connection, flight: &str) -> Result<Vec<FillRow>> {
    let read = || -> rusqlite::Result<Vec<FillRow>> {
        tx.prepare_cached(
            "SELECT f.path, f.number, f.size, f.units, b.digest FROM fills f LEFT JOIN blobs b ON b.id = f.blob WHERE f.flight = ?",
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

/// Notes the durable units of a file that fills.
///
/// # Errors
/// Those of the catalog.
pub fn set_units(tx: &Connection, flight: &str, path: &[u8], number: u64, size: u64, units: &[u8]) -> Result<()> {
    tx.prepare_cached(
        "INSERT INTO fills (flight, path, number, size, units) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (flight, path) DO UPDATE SET number = ?3, size = ?4, units = ?5",
    )
    .and_then(|mut upsert| upsert.execute(params![flight, path, to_sql(number), to_sql(size), units]))
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

/// Forgets a flight. Returns the blobs it had sealed.
///
/// # Errors
/// Those of the catalog.
pub fn delete(tx: &Connection, flight: &str) -> Result<Vec<i64>> {
    let delete = || -> rusqlite::Result<Vec<i64>> {
        let blobs = tx
            .prepare_cached("SELECT blob FROM fills WHERE flight = ? AND blob IS NOT NULL")?
            .query_map([flight], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        tx.prepare_cached("DELETE FROM fills WHERE flight = ?")?.execute([flight])?;
        tx.prepare_cached("DELETE FROM listings WHERE flight = ?")?.execute([flight])?;
        Ok(blobs)
    };
    delete().map_err(catalog_error)
}

/// Flights that have rows.
///
/// # Errors
/// Those of the catalog.
pub fn flights(tx: &Connection) -> Result<Vec<String>> {
    let read = || -> rusqlite::Result<Vec<String>> {
        tx.prepare_cached("SELECT flight FROM fills UNION SELECT flight FROM listings")?
            .query_map([], |row| row.get(0))?
            .collect()
    };
    read().map_err(catalog_error)
}
