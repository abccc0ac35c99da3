//! Sealed blobs, the chunks they are home to, and what they borrow.
//!
//! Life of a blob's row:
//! ```text
//! (publishing) -> sealed -> doomed -> gone
//!                   |-> remnant -> doomed        nothing names it, others borrow from it: only what they borrow is kept
//!                         |-> sealed             the same file was ingested again
//! ```
//! One whose bytes rotted and are lost is a remnant that trees still name, without a file: see [`scrubs`](super::scrubs).
//! Invariants: a chunk row names bytes that are physically in its blob; a borrowed range's home is `sealed` or `remnant` and keeps those
//! bytes; a `doomed` blob has no chunk row, no borrower that is not doomed itself, and nothing names it.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{catalog_error, digest_at, from_sql, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// A range of a file whose bytes are a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRow {
    /// Digest of the range.
    pub digest: Digest,
    /// First byte in the file.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Where a known chunk's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// Row id of the home blob.
    pub blob: i64,
    /// First byte in the home blob.
    pub start: u64,
}

/// A borrowed range of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Borrow {
    /// First byte in the borrowing blob.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Digest of the home blob.
    pub home: Digest,
    /// First byte in the home blob.
    pub home_start: u64,
    /// Whether the bytes are in the borrowing blob too.
    pub filled: bool,
}

/// A blob's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobRow {
    /// Row id.
    pub id: i64,
    /// File digest.
    pub digest: Digest,
    /// Length of the file in bytes.
    pub size: u64,
}

/// The sealed blob of a file digest.
///
/// # Errors
/// Those of the catalog.
pub fn sealed(tx: &Connection, digest: &Digest) -> Result<Option<BlobRow>> {
    tx.prepare_cached("SELECT id, digest, size FROM blobs WHERE digest = ? AND state = 'sealed'")
        .and_then(|mut query| query.query_row([digest.as_bytes()], blob_row).optional())
        .map_err(catalog_error)
}

pub(super) fn blob_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<BlobRow> {
    Ok(BlobRow { id: row.get(0)?, digest: digest_at(row, 1)?, size: from_sql(row.get(2)?) })
}

/// Notes the files that are about to be renamed into place.
///
/// # Errors
/// Those of the catalog.
pub fn begin_publishing<'a>(tx: &Connection, files: impl Iterator<Item = (&'a Digest, &'a str, u64)>) -> Result<()> {
    let mut insert = tx
        .prepare_cached("INSERT OR REPLACE INTO publishing (digest, flight, number) VALUES (?, ?, ?)")
        .map_err(catalog_error)?;
    for (digest, flight, number) in files {
        insert.execute(params![digest.as_bytes(), flight, to_sql(number)]).map_err(catalog_error)?;
    }
    Ok(())
}

/// What the row of a digest says of the file of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowState {
    /// It is there to stay: a sealed blob, or a remnant that others borrow from.
    Kept,
    /// It is to be unlinked.
    Doomed,
}

/// A file between its note and its row: digest, flight, number, and the row that its digest has from before, if any.
pub type Publishing = (Digest, String, u64, Option<RowState>);

/// Files that are between their note and their row.
///
/// # Errors
/// Those of the catalog.
pub fn interrupted_publishing(tx: &Connection) -> Result<Vec<Publishing>> {
    let read = || -> rusqlite::Result<Vec<_>> {
        tx.prepare_cached(
            "SELECT p.digest, p.flight, p.number, b.state = 'doomed' FROM publishing p LEFT JOIN blobs b ON b.digest = p.digest",
        )?
        .query_map([], |row| {
            let state = |doomed: bool| if doomed { RowState::Doomed } else { RowState::Kept };
            let row_state = row.get::<_, Option<bool>>(3)?.map(state);
            Ok((digest_at(row, 0)?, row.get(1)?, from_sql(row.get(2)?), row_state))
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Forgets what was noted by [`begin_publishing`].
///
/// # Errors
/// Those of the catalog.
pub fn end_publishing(tx: &Connection, digest: &Digest) -> Result<()> {
    execute(tx, "DELETE FROM publishing WHERE digest = ?", [digest.as_bytes()])
}

/// Adds (or revives from remnant) the row of a published file; returns its id.
///
/// # Errors
/// Those of the catalog.
pub fn seal(tx: &Connection, digest: &Digest, size: u64, stored_bytes: u64) -> Result<i64> {
    end_publishing(tx, digest)?;
    // A remnant that is whole again borrows nothing.
    execute(tx, "DELETE FROM borrows WHERE blob = (SELECT id FROM blobs WHERE digest = ?)", [digest.as_bytes()])?;
    tx.prepare_cached(
        // Its digest was taken just now, so it has been verified.
        "INSERT INTO blobs (digest, size, stored_bytes, state, verified_ms)
         VALUES (?1, ?2, ?3, 'sealed', CAST(unixepoch('subsec') * 1000 AS INTEGER))
         ON CONFLICT (digest) DO UPDATE SET state = 'sealed', stored_bytes = ?3, verified_ms = excluded.verified_ms RETURNING id",
    )
    .and_then(|mut insert| {
        insert.query_row(params![digest.as_bytes(), to_sql(size), to_sql(stored_bytes)], |row| row.get(0))
    })
    .map_err(catalog_error)
}

/// Where a chunk is, if it is known.
///
/// # Errors
/// Those of the catalog.
pub fn home_of(tx: &Connection, chunk: &ChunkRow) -> Result<Option<Home>> {
    tx.prepare_cached("SELECT blob, start FROM chunks WHERE digest = ? AND len = ?")
        .and_then(|mut query| {
            query
                .query_row(params![chunk.digest.as_bytes(), to_sql(chunk.len)], |row| {
                    Ok(Home { blob: row.get(0)?, start: from_sql(row.get(1)?) })
                })
                .optional()
        })
        .map_err(catalog_error)
}

/// Enters a chunk with `blob` as its home, unless it has one.
///
/// # Errors
/// Those of the catalog.
pub fn enter_chunk(tx: &Connection, chunk: &ChunkRow, blob: i64) -> Result<()> {
    execute(
        tx,
        "INSERT OR IGNORE INTO chunks (digest, blob, start, len) VALUES (?, ?, ?, ?)",
        params![chunk.digest.as_bytes(), blob, to_sql(chunk.start), to_sql(chunk.len)],
    )
}

/// Notes that `len` bytes at `start` of `blob` are kept at `home`.
///
/// # Errors
/// Those of the catalog.
pub fn borrow(tx: &Connection, blob: i64, start: u64, len: u64, home: Home) -> Result<()> {
    execute(
        tx,
        "INSERT INTO borrows (blob, start, len, home, home_start, filled) VALUES (?1, ?2, ?3, ?4, ?5, 0)
         ON CONFLICT (blob, start) DO UPDATE SET len = ?3, home = ?4, home_start = ?5, filled = 0",
        params![blob, to_sql(start), to_sql(len), home.blob, to_sql(home.start)],
    )
}

/// The ranges of a blob that must stay in it, joined and in order: those that others borrow and those of its chunks. None of a new one. One that was
/// lost and comes back lends what it lent before, though its chunks may have found another home meanwhile.
///
/// # Errors
/// Those of the catalog.
pub fn bound(tx: &Connection, blob: i64) -> Result<Vec<std::ops::Range<u64>>> {
    let read = || -> rusqlite::Result<Vec<(u64, u64)>> {
        tx.prepare_cached(
            "SELECT home_start, len FROM borrows WHERE home = ?1 UNION SELECT start, len FROM chunks WHERE blob = ?1
             ORDER BY 1",
        )?
        .query_map([blob], |row| Ok((from_sql(row.get(0)?), from_sql(row.get(1)?))))?
        .collect()
    };
    let mut bound: Vec<std::ops::Range<u64>> = Vec::new();
    for (start, len) in read().map_err(catalog_error)? {
        match bound.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(start + len),
            _ => bound.push(start..start + len),
        }
    }
    Ok(bound)
}

/// Digest of a blob by row id.
///
/// # Errors
/// Internal if there is no such row; those of the catalog.
pub fn digest_of(tx: &Connection, blob: i64) -> Result<Digest> {
    tx.prepare_cached("SELECT digest FROM blobs WHERE id = ?")
        .and_then(|mut query| query.query_row([blob], |row| digest_at(row, 0)).optional())
        .map_err(catalog_error)?
        .ok_or_else(|| Error::internal(format!("the blob {blob} has no row")))
}

/// What a blob borrows, in order of offset.
///
/// # Errors
/// Those of the catalog.
pub fn borrows_of(tx: &Connection, blob: i64) -> Result<Vec<Borrow>> {
    let read = || -> rusqlite::Result<Vec<Borrow>> {
        tx.prepare_cached(
            "SELECT r.start, r.len, b.digest, r.home_start, r.filled FROM borrows r JOIN blobs b ON b.id = r.home
             WHERE r.blob = ? ORDER BY r.start",
        )?
        .query_map([blob], |row| {
            Ok(Borrow {
                start: from_sql(row.get(0)?),
                len: from_sql(row.get(1)?),
                home: digest_at(row, 2)?,
                home_start: from_sql(row.get(3)?),
                filled: row.get(4)?,
            })
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// The blobs of a manifest that borrow anything, with what they borrow.
///
/// # Errors
/// Those of the catalog.
pub fn compact_blobs(tx: &Connection, manifest: &Digest) -> Result<Vec<(BlobRow, Vec<Borrow>)>> {
    let read = || -> rusqlite::Result<Vec<BlobRow>> {
        tx.prepare_cached(
            "SELECT DISTINCT b.id, b.digest, b.size FROM manifest_blobs m
             JOIN borrows r ON r.blob = m.blob JOIN blobs b ON b.id = m.blob WHERE m.manifest = ?",
        )?
        .query_map([manifest.as_bytes()], blob_row)?
        .collect()
    };
    let blobs = read().map_err(catalog_error)?;
    blobs.into_iter().map(|blob| Ok((blob, borrows_of(tx, blob.id)?))).collect()
}

/// Those of the blobs `digests` that borrow anything, with what they borrow. One that is not sealed any more, since its home was lost, has its
/// holes all the same.
///
/// # Errors
/// Those of the catalog.
pub fn compact_among(tx: &Connection, digests: &[Digest]) -> Result<Vec<(BlobRow, Vec<Borrow>)>> {
    let mut compact = Vec::new();
    for digest in digests {
        let Some(blob) = present(tx, digest)? else { continue };
        let borrows = borrows_of(tx, blob.id)?;
        if !borrows.is_empty() {
            compact.push((blob, borrows));
        }
    }
    Ok(compact)
}

/// Marks everything a blob borrows as being in it too.
///
/// # Errors
/// Those of the catalog.
pub fn set_filled(tx: &Connection, blob: i64, stored_bytes: u64) -> Result<()> {
    execute(tx, "UPDATE borrows SET filled = 1 WHERE blob = ?", [blob])?;
    set_stored_bytes(tx, blob, stored_bytes)
}

/// Notes what a blob occupies.
///
/// # Errors
/// Those of the catalog.
pub fn set_stored_bytes(tx: &Connection, blob: i64, stored_bytes: u64) -> Result<()> {
    execute(tx, "UPDATE blobs SET stored_bytes = ? WHERE id = ?", params![to_sql(stored_bytes), blob])
}

/// What is to be done about blobs that lost a reference.
#[derive(Debug, Default)]
pub struct Condemned {
    /// To be unlinked; their rows are `doomed`.
    pub doomed: Vec<BlobRow>,
    /// To be trimmed to the ranges given; their rows are `remnant`.
    pub remnants: Vec<(BlobRow, Vec<std::ops::Range<u64>>)>,
}

/// Decides about `candidates` and whatever homes they may have been the last borrowers of; marks rows, drops the chunks that
/// go. Candidates that something names are left alone.
///
/// What nothing names borrows nothing any more: nobody reads it whole, and what others borrow from it is in it, since a chunk's home has
/// its bytes. So its borrowed ranges go before it is asked who is borrowed from: a home that only lent to it goes with it.
///
/// # Errors
/// Those of the catalog.
pub fn condemn(tx: &Connection, candidates: &[i64]) -> Result<Condemned> {
    let mut unnamed = std::collections::BTreeSet::new();
    let mut to_see = candidates.to_vec();
    while let Some(blob) = to_see.pop() {
        if !unnamed.contains(&blob) && !is_named(tx, blob)? {
            unnamed.insert(blob);
            to_see.extend(ids(tx, "SELECT DISTINCT home FROM borrows WHERE blob = ?", blob)?);
        }
    }
    for blob in &unnamed {
        execute(tx, "DELETE FROM borrows WHERE blob = ?", [blob])?;
    }
    let mut condemned = Condemned::default();
    for blob in unnamed {
        if lends(tx, blob)? {
            condemned.remnants.push((row_of(tx, blob)?, make_remnant(tx, blob)?));
        } else {
            execute(tx, "DELETE FROM chunks WHERE blob = ?", [blob])?;
            execute(tx, "UPDATE blobs SET state = 'doomed' WHERE id = ?", [blob])?;
            condemned.doomed.push(row_of(tx, blob)?);
        }
    }
    Ok(condemned)
}

/// Up to `most` rows after `after` that are already doomed, in order of their ids: what a crash left to be unlinked.
///
/// # Errors
/// Those of the catalog.
pub fn doomed(tx: &Connection, after: i64, most: usize) -> Result<Vec<BlobRow>> {
    let read = || -> rusqlite::Result<Vec<BlobRow>> {
        tx.prepare_cached("SELECT id, digest, size FROM blobs WHERE state = 'doomed' AND id > ? ORDER BY id LIMIT ?")?
            .query_map(params![after, to_sql(most as u64)], blob_row)?
            .collect()
    };
    read().map_err(catalog_error)
}

/// Drops the row of an unlinked blob.
///
/// # Errors
/// Those of the catalog.
pub fn forget(tx: &Connection, blob: i64) -> Result<()> {
    execute(tx, "DELETE FROM blobs WHERE id = ? AND state = 'doomed'", [blob])
}

/// The last of the `count` rows after `after`: where a walk through all blobs in small steps goes on. `None` at the end.
///
/// # Errors
/// Those of the catalog.
pub fn step_after(tx: &Connection, after: i64, count: usize) -> Result<Option<i64>> {
    tx.prepare_cached("SELECT MAX(id) FROM (SELECT id FROM blobs WHERE id > ? ORDER BY id LIMIT ?)")
        .and_then(|mut query| query.query_row(params![after, to_sql(count as u64)], |row| row.get(0)))
        .map_err(catalog_error)
}

/// Sealed blobs and remnants after `after`, up to `until`, that nothing names: what an interrupted removal or flight left.
///
/// # Errors
/// Those of the catalog.
pub fn unnamed(tx: &Connection, after: i64, until: i64) -> Result<Vec<i64>> {
    let read = || -> rusqlite::Result<Vec<i64>> {
        tx.prepare_cached(
            "SELECT id FROM blobs b WHERE id > ? AND id <= ? AND names = 0 AND state <> 'doomed'
             AND NOT EXISTS (SELECT 1 FROM fills f WHERE f.blob = b.id) ORDER BY id",
        )?
        .query_map([after, until], |row| row.get(0))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Blobs after `after`, up to `until`, that seem to occupy more than what they do not borrow, with the ranges they borrow and need not have.
///
/// # Errors
/// Those of the catalog.
pub fn unpunched(tx: &Connection, after: i64, until: i64) -> Result<Vec<(BlobRow, Vec<std::ops::Range<u64>>)>> {
    let read = || -> rusqlite::Result<Vec<BlobRow>> {
        tx.prepare_cached(
            "SELECT b.id, b.digest, b.size FROM blobs b JOIN borrows r ON r.blob = b.id
             WHERE b.id > ? AND b.id <= ? AND b.state = 'sealed' AND NOT r.filled
             GROUP BY b.id HAVING b.stored_bytes > b.size - SUM(r.len) + 16384 * COUNT(*)",
        )?
        .query_map([after, until], blob_row)?
        .collect()
    };
    let blobs = read().map_err(catalog_error)?;
    blobs
        .into_iter()
        .map(|blob| {
            let borrows = borrows_of(tx, blob.id)?;
            let ranges =
                borrows.iter().filter(|borrow| !borrow.filled).map(|borrow| borrow.start..borrow.start + borrow.len);
            Ok((blob, ranges.collect()))
        })
        .collect()
}

/// The blob of a file digest that is sealed or a remnant.
fn present(tx: &Connection, digest: &Digest) -> Result<Option<BlobRow>> {
    tx.prepare_cached("SELECT id, digest, size FROM blobs WHERE digest = ? AND state <> 'doomed'")
        .and_then(|mut query| query.query_row([digest.as_bytes()], blob_row).optional())
        .map_err(catalog_error)
}

fn is_named(tx: &Connection, blob: i64) -> Result<bool> {
    tx.prepare_cached(
        "SELECT 1 WHERE EXISTS (SELECT 1 FROM manifest_blobs WHERE blob = ?1) OR EXISTS (SELECT 1 FROM fills WHERE blob = ?1)",
    )
    .and_then(|mut query| query.exists([blob]))
    .map_err(catalog_error)
}

fn lends(tx: &Connection, home: i64) -> Result<bool> {
    tx.prepare_cached("SELECT 1 FROM borrows WHERE home = ?")
        .and_then(|mut query| query.exists([home]))
        .map_err(catalog_error)
}

fn ids(tx: &Connection, query: &str, argument: i64) -> Result<Vec<i64>> {
    let read = || -> rusqlite::Result<Vec<i64>> {
        tx.prepare_cached(query)?.query_map([argument], |row| row.get(0))?.collect()
    };
    read().map_err(catalog_error)
}

fn row_of(tx: &Connection, blob: i64) -> Result<BlobRow> {
    tx.prepare_cached("SELECT id, digest, size FROM blobs WHERE id = ?")
        .and_then(|mut query| query.query_row([blob], blob_row))
        .map_err(catalog_error)
}

/// Keeps what is borrowed from `blob`, drops the chunks outside, and returns the ranges that may be punched.
fn make_remnant(tx: &Connection, blob: i64) -> Result<Vec<std::ops::Range<u64>>> {
    let read = || -> rusqlite::Result<Vec<(u64, u64)>> {
        tx.prepare_cached("SELECT home_start, len FROM borrows WHERE home = ? ORDER BY home_start")?
            .query_map([blob], |row| Ok((from_sql(row.get(0)?), from_sql(row.get(1)?))))?
            .collect()
    };
    let kept = read().map_err(catalog_error)?;
    let size = row_of(tx, blob)?.size;
    let mut gaps = Vec::new();
    let mut at = 0;
    for (start, len) in kept {
        if start > at {
            gaps.push(at..start);
        }
        at = at.max(start + len);
    }
    if at < size {
        gaps.push(at..size);
    }
    forget_chunks_in(tx, blob, &gaps)?;
    execute(tx, "UPDATE blobs SET state = 'remnant' WHERE id = ?", [blob])?;
    Ok(gaps)
}

/// Drops the chunks that reach into one of `gaps`, which are in order.
fn forget_chunks_in(tx: &Connection, blob: i64, gaps: &[std::ops::Range<u64>]) -> Result<()> {
    let forget = || -> rusqlite::Result<()> {
        let chunks: Vec<(Digest, u64, u64)> = tx
            .prepare_cached("SELECT digest, start, len FROM chunks WHERE blob = ?")?
            .query_map([blob], |row| Ok((digest_at(row, 0)?, from_sql(row.get(1)?), from_sql(row.get(2)?))))?
            .collect::<rusqlite::Result<_>>()?;
        let mut delete = tx.prepare_cached("DELETE FROM chunks WHERE digest = ?")?;
        for (digest, start, len) in chunks {
            let next = gaps.partition_point(|gap| gap.end <= start);
            if gaps.get(next).is_some_and(|gap| gap.start < start + len) {
                delete.execute([digest.as_bytes()])?;
            }
        }
        Ok(())
    };
    forget().map_err(catalog_error)
}

fn execute(tx: &Connection, statement: &str, arguments: impl rusqlite::Params) -> Result<()> {
    tx.prepare_cached(statement).and_then(|mut run| run.execute(arguments)).map_err(catalog_error)?;
    Ok(())
}
