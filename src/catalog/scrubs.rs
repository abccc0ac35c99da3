//! What scrubbing asks and notes: which blobs are to be read again, what their ranges should be, and what is lost.
//!
//! `blobs.verified_ms` is all there is of a scrub's progress: when all bytes of a blob were last read and were right. Whoever wants some read
//! now sets theirs to 0, so a scrub goes on where it was whenever and by whomever it is taken up again.
//!
//! A blob whose bytes are **lost** becomes a remnant that trees still name: nothing borrows from it any more than already does, and the same file, when it
//! is ingested again, takes the row over. What borrows from it lacks those bytes too, and becomes one likewise. Checkpoints that need
//! either stay `ready`, with a failure: what is right of them is served, what is lost is an error, and a retry fetches it.

use std::ops::Range;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::blobs::{self, BlobRow, Borrow, ChunkRow, blob_row};
use super::checkpoints::{self, Failure};
use super::{catalog_error, digest_at, from_sql, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::manifest::EntryKind;
use crate::names::EntryPath;

/// Blobs of everything, or of one tree.
pub type Scope = Option<Digest>;

const IN_SCOPE: &str = "id > ?1 AND id <= ?2 AND state = 'sealed'
     AND (?3 IS NULL OR EXISTS (SELECT 1 FROM manifest_blobs m WHERE m.manifest = ?3 AND m.blob = id))";

fn scope_value(scope: &Scope) -> Option<&[u8]> {
    scope.as_ref().map(|tree| tree.as_bytes().as_slice())
}

/// Has the blobs after `after`, up to `until`, read again.
///
/// # Errors
/// Those of the catalog.
pub fn want(tx: &Connection, scope: &Scope, after: i64, until: i64) -> Result<()> {
    tx.prepare_cached(&format!("UPDATE blobs SET verified_ms = 0 WHERE {IN_SCOPE} AND verified_ms > 0"))
        .and_then(|mut update| update.execute(params![after, until, scope_value(scope)]))
        .map_err(catalog_error)?;
    Ok(())
}

/// Those of the blobs after `after`, up to `until`, that were not found right since `before_ms`.
///
/// # Errors
/// Those of the catalog.
pub fn due(tx: &Connection, scope: &Scope, before_ms: i64, after: i64, until: i64) -> Result<Vec<BlobRow>> {
    let read = || -> rusqlite::Result<Vec<BlobRow>> {
        tx.prepare_cached(&format!(
            "SELECT id, digest, size FROM blobs WHERE {IN_SCOPE} AND verified_ms < ?4 ORDER BY id"
        ))?
        .query_map(params![after, until, scope_value(scope), before_ms], blob_row)?
        .collect()
    };
    read().map_err(catalog_error)
}

/// The next tree after `after`, in order of digests, that a ready record of `scope` has.
///
/// # Errors
/// Those of the catalog.
pub fn tree_after(tx: &Connection, scope: &Scope, after: Option<&Digest>) -> Result<Option<Digest>> {
    let after = after.map_or(&[][..], |digest| digest.as_bytes());
    tx.prepare_cached(
        "SELECT manifest FROM checkpoints WHERE manifest > ?1 AND state = 'ready' AND (?2 IS NULL OR manifest = ?2)
         ORDER BY manifest LIMIT 1",
    )
    .and_then(|mut query| query.query_row(params![after, scope_value(scope)], |row| digest_at(row, 0)).optional())
    .map_err(catalog_error)
}

/// Notes that all bytes of blobs were read and were right.
///
/// # Errors
/// Those of the catalog.
pub fn set_verified(tx: &Connection, blobs: &[i64], at_ms: i64) -> Result<()> {
    blobs
        .iter()
        .try_for_each(|blob| execute(tx, "UPDATE blobs SET verified_ms = ?2 WHERE id = ?1", params![blob, at_ms]))
}

/// The chunks that a blob is home to and that lie in `range` of it whole, in order of offset.
///
/// # Errors
/// Those of the catalog.
pub fn chunks_in(tx: &Connection, blob: i64, range: &Range<u64>) -> Result<Vec<ChunkRow>> {
    let read = || -> rusqlite::Result<Vec<ChunkRow>> {
        tx.prepare_cached(
            "SELECT digest, start, len FROM chunks WHERE blob = ? AND start >= ? AND start + len <= ? ORDER BY start",
        )?
        .query_map(params![blob, to_sql(range.start), to_sql(range.end)], |row| {
            Ok(ChunkRow { digest: digest_at(row, 0)?, start: from_sql(row.get(1)?), len: from_sql(row.get(2)?) })
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Where copies of `range` of a home are, in blobs that borrow it and have it too.
///
/// # Errors
/// Those of the catalog.
pub fn copies_of(tx: &Connection, home: i64, range: &Range<u64>) -> Result<Vec<(Digest, u64)>> {
    let read = || -> rusqlite::Result<Vec<(Digest, u64)>> {
        tx.prepare_cached(
            "SELECT b.digest, r.start + (?2 - r.home_start) FROM borrows r JOIN blobs b ON b.id = r.blob
             WHERE r.home = ?1 AND r.filled AND r.home_start <= ?2 AND r.home_start + r.len >= ?3",
        )?
        .query_map(params![home, to_sql(range.start), to_sql(range.end)], |row| {
            Ok((digest_at(row, 0)?, from_sql(row.get(1)?)))
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// The row of a blob in whatever state.
///
/// # Errors
/// Internal if there is none; those of the catalog.
pub fn row_of(tx: &Connection, digest: &Digest) -> Result<BlobRow> {
    tx.prepare_cached("SELECT id, digest, size FROM blobs WHERE digest = ?")
        .and_then(|mut query| query.query_row([digest.as_bytes()], blob_row))
        .map_err(catalog_error)
}

/// When a blob was last found right, in milliseconds since the epoch. Another file that takes its place is found right later: see [`is_file_of`].
///
/// # Errors
/// Internal if there is no such row; those of the catalog.
pub fn verified_ms(tx: &Connection, blob: i64) -> Result<i64> {
    tx.prepare_cached("SELECT verified_ms FROM blobs WHERE id = ?")
        .and_then(|mut query| query.query_row([blob], |row| row.get(0)))
        .map_err(catalog_error)
}

/// Whether the file of a blob is the one that was there when its row said `verified_ms`: whoever puts another in its place notes that before, and
/// cannot do so while this transaction of the writer lasts.
///
/// # Errors
/// Those of the catalog.
pub fn is_file_of(tx: &Connection, blob: &BlobRow, verified_ms: i64) -> Result<bool> {
    tx.prepare_cached(
        "SELECT 1 FROM blobs b WHERE id = ?1 AND digest = ?2 AND verified_ms = ?3 AND state <> 'doomed'
         AND NOT EXISTS (SELECT 1 FROM publishing p WHERE p.digest = b.digest)",
    )
    .and_then(|mut query| query.exists(params![blob.id, blob.digest.as_bytes(), verified_ms]))
    .map_err(catalog_error)
}

/// A file of a checkpoint that is ready and stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// The checkpoint's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The file's path in it.
    pub path: String,
}

/// Files whose bytes are these, one of each checkpoint.
///
/// # Errors
/// Those of the catalog.
pub fn files_of(tx: &Connection, blob: &BlobRow) -> Result<Vec<NamedFile>> {
    let read = || -> rusqlite::Result<Vec<(String, String, Digest)>> {
        tx.prepare_cached(
            "SELECT c.id, c.name, c.manifest FROM manifest_blobs m JOIN checkpoints c ON c.manifest = m.manifest
             WHERE m.blob = ? AND c.state = 'ready' AND c.datastore = ''",
        )?
        .query_map([blob.id], |row| Ok((row.get(0)?, row.get(1)?, digest_at(row, 2)?)))?
        .collect()
    };
    let named = |(id, name, tree): (String, String, Digest)| {
        let manifest = match checkpoints::manifest(tx, &tree) {
            // Its files have lost their names, and the checkpoint is told of all the same.
            Err(error) if error.kind() == Kind::Corrupt => {
                return Ok(NamedFile { id, name, path: "a file".to_owned() });
            }
            manifest => manifest?,
        };
        let is_it = |kind: &EntryKind| matches!(kind, EntryKind::File { digest, .. } if *digest == blob.digest);
        let entry = manifest.entries().iter().find(|entry| is_it(&entry.kind));
        let path = entry.map_or_else(String::new, |entry| entry.path.to_string());
        Ok(NamedFile { id, name, path })
    };
    read().map_err(catalog_error)?.into_iter().map(named).collect()
}

/// Sealed blobs that lack bytes of their own which `home` has.
///
/// # Errors
/// Those of the catalog.
pub fn in_need_of(tx: &Connection, home: i64) -> Result<Vec<BlobRow>> {
    let read = || -> rusqlite::Result<Vec<BlobRow>> {
        tx.prepare_cached(
            "SELECT DISTINCT b.id, b.digest, b.size FROM borrows r JOIN blobs b ON b.id = r.blob
             WHERE r.home = ? AND NOT r.filled AND b.state = 'sealed' ORDER BY b.id",
        )?
        .query_map([home], blob_row)?
        .collect()
    };
    read().map_err(catalog_error)
}

/// The ranges that `blob` lacks and `home` has, with the chunks of each; none where it is not sealed any more.
///
/// # Errors
/// Those of the catalog.
pub fn needed(tx: &Connection, blob: &BlobRow, home: &BlobRow) -> Result<Vec<(Borrow, Vec<ChunkRow>)>> {
    if blobs::sealed(tx, &blob.digest)?.is_none_or(|row| row.id != blob.id) {
        return Ok(Vec::new());
    }
    let lacking = blobs::borrows_of(tx, blob.id)?.into_iter();
    lacking
        .filter(|borrow| !borrow.filled && borrow.home == home.digest)
        .map(|borrow| Ok((borrow, chunks_in(tx, home.id, &(borrow.home_start..borrow.home_start + borrow.len))?)))
        .collect()
}

/// What came of losing a blob.
#[derive(Debug)]
pub struct Lost {
    /// The blob and those that borrow from it: all of them lack bytes now.
    pub broken: Vec<BlobRow>,
    /// Sealed blobs whose copies of it are their own now: to be read, for nobody knows whether they were made before the bytes rotted.
    pub copies: Vec<BlobRow>,
}

/// Notes that the bytes of a blob are lost. Copies that borrowers have become their own.
///
/// # Errors
/// Those of the catalog.
pub fn lose(tx: &Connection, blob: &BlobRow) -> Result<Lost> {
    let borrowers = |filled: bool| -> rusqlite::Result<Vec<BlobRow>> {
        tx.prepare_cached(
            "SELECT DISTINCT b.id, b.digest, b.size FROM borrows r JOIN blobs b ON b.id = r.blob WHERE r.home = ? AND r.filled = ?",
        )?
        .query_map(params![blob.id, filled], blob_row)?
        .collect()
    };
    let mut broken = borrowers(false).map_err(catalog_error)?;
    let mut copies = borrowers(true).map_err(catalog_error)?;
    copies.retain(|copy| !broken.contains(copy));
    let doubtful: Vec<i64> = copies.iter().map(|copy| copy.id).collect();
    set_verified(tx, &doubtful, 0)?;
    execute(tx, "DELETE FROM borrows WHERE home = ? AND filled", params![blob.id])?;
    execute(tx, "DELETE FROM chunks WHERE blob = ?", params![blob.id])?;
    execute(tx, "UPDATE blobs SET stored_bytes = 0 WHERE id = ?", params![blob.id])?;
    broken.insert(0, *blob);
    for blob in &broken {
        execute(tx, "UPDATE blobs SET state = 'remnant' WHERE id = ? AND state = 'sealed'", params![blob.id])?;
    }
    Ok(Lost { broken, copies })
}

/// Notes why a checkpoint that is ready is not all there.
///
/// # Errors
/// Those of the catalog.
pub fn set_failure(tx: &Connection, id: &str, failure: &Failure) -> Result<()> {
    let failure =
        serde_json::to_string(failure).map_err(|error| Error::internal("encoding a failure").because(error))?;
    execute(tx, "UPDATE checkpoints SET failure = ?2 WHERE id = ?1 AND state = 'ready'", params![id, failure])
}

/// What a flight ends with of which a file was found to be rotten after it was sealed.
pub(super) fn lost_meanwhile(path: &EntryPath) -> Error {
    let message = format!("bytes of `{path}` rotted on this host's disk before the rest of the checkpoint had come");
    Error::unavailable("BYTES_ROTTEN", message).remedy("retry the checkpoint: what is lost is fetched again")
}

fn execute(tx: &Connection, statement: &str, arguments: impl rusqlite::Params) -> Result<()> {
    tx.prepare_cached(statement).and_then(|mut run| run.execute(arguments)).map_err(catalog_error)?;
    Ok(())
}
