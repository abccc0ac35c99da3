//! What is kept and what may go: pins, last use, eviction, and the links of trees to blobs that are taken apart in small pieces.
//!
//! A tree's links are *rooted* while a record that is `ready` and stored has that tree. [`evict`] and a removal end that in one small
//! transaction; [`unlink`] then takes so many links at a time, and whoever calls it condemns the blobs that lost theirs in the same
//! transaction. Should the tree become rooted again meanwhile, its links are made anew and [`unlink`] finds nothing to do.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::blobs::BlobRow;
use super::checkpoints::{Origin, State};
use super::{catalog_error, digest_at, from_sql, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// A record that is ready and stored, as far as keeping it is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Its tree.
    pub manifest: Digest,
    /// Where it came from.
    pub origin: Origin,
    /// Whether an operator wants it kept.
    pub pinned: bool,
    /// Whether a job has a right to it.
    pub leased: bool,
    /// Whether it was filled with secrets that the daemon does not have any more.
    pub secrets_given: bool,
    /// When it was last used, in milliseconds since the epoch.
    pub used_ms: i64,
    /// What its tree alone occupies.
    pub own_bytes: u64,
}

/// A blob with copies of what it borrows.
#[derive(Clone, Copy, Debug)]
pub struct Duplicate {
    /// The blob.
    pub blob: BlobRow,
    /// Length of the copies in bytes.
    pub bytes: u64,
}

/// Every record that is ready and stored, least recently used first.
///
/// # Errors
/// Those of the catalog.
pub fn kept(tx: &Connection) -> Result<Vec<Kept>> {
    let read = || -> rusqlite::Result<Vec<(Kept, String)>> {
        tx.prepare_cached(
            "SELECT c.id, c.name, c.manifest, c.pinned, EXISTS (SELECT 1 FROM leases l WHERE l.checkpoint = c.id), c.secrets_given,
                    c.used_ms, COALESCE(f.stored_bytes - f.shared_stored_bytes, 0), c.source
             FROM checkpoints c LEFT JOIN footprints f ON f.manifest = c.manifest
             WHERE c.state = 'ready' AND c.datastore = '' ORDER BY c.used_ms, c.seq",
        )?
        .query_map([], |row| {
            let kept = Kept {
                id: row.get(0)?,
                name: row.get(1)?,
                manifest: digest_at(row, 2)?,
                origin: Origin { kind: String::new(), uri: String::new(), options: Default::default() },
                pinned: row.get(3)?,
                leased: row.get(4)?,
                secrets_given: row.get(5)?,
                used_ms: row.get(6)?,
                own_bytes: from_sql(row.get(7)?),
            };
            Ok((kept, row.get(8)?))
        })?
        .collect()
    };
    let parse = |(kept, source): (Kept, String)| match serde_json::from_str(&source) {
        Ok(origin) => Ok(Kept { origin, ..kept }),
        Err(error) => {
            let message = format!("the record of checkpoint {} is damaged", kept.id);
            Err(Error::corrupt("CATALOG_DAMAGED", message).because(error))
        }
    };
    read().map_err(catalog_error)?.into_iter().map(parse).collect()
}

/// Blobs with copies of what they borrow.
///
/// # Errors
/// Those of the catalog.
pub fn duplicates(tx: &Connection) -> Result<Vec<Duplicate>> {
    let read = || -> rusqlite::Result<Vec<Duplicate>> {
        tx.prepare_cached(
            "SELECT id, digest, size, duplicate_bytes FROM blobs WHERE duplicate_bytes > 0 AND state = 'sealed' ORDER BY id",
        )?
        .query_map([], |row| {
            let blob = BlobRow { id: row.get(0)?, digest: digest_at(row, 1)?, size: from_sql(row.get(2)?) };
            Ok(Duplicate { blob, bytes: from_sql(row.get(3)?) })
        })?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Notes that the copies which a blob has of what it borrows are no longer counted on; returns their ranges.
///
/// # Errors
/// Those of the catalog.
pub fn give_up_duplicates(tx: &Connection, blob: i64) -> Result<Vec<std::ops::Range<u64>>> {
    let change = || -> rusqlite::Result<Vec<std::ops::Range<u64>>> {
        let ranges = tx
            .prepare_cached("SELECT start, len FROM borrows WHERE blob = ? AND filled ORDER BY start")?
            .query_map([blob], |row| {
                let (start, len): (u64, u64) = (from_sql(row.get(0)?), from_sql(row.get(1)?));
                Ok(start..start + len)
            })?
            .collect::<rusqlite::Result<_>>()?;
        tx.prepare_cached("UPDATE borrows SET filled = 0 WHERE blob = ? AND filled")?.execute([blob])?;
        Ok(ranges)
    };
    change().map_err(catalog_error)
}

/// Sets or ends an operator's lasting right.
///
/// # Errors
/// Those of the catalog.
pub fn set_pinned(tx: &Connection, id: &str, pinned: bool) -> Result<()> {
    execute(tx, "UPDATE checkpoints SET pinned = ? WHERE id = ?", params![pinned, id])
}

/// Notes that a checkpoint is of use now.
///
/// # Errors
/// Those of the catalog.
pub fn touch(tx: &Connection, id: &str, now_ms: i64) -> Result<()> {
    execute(tx, "UPDATE checkpoints SET used_ms = ? WHERE id = ?", params![now_ms, id])
}

/// Notes whether what fills a checkpoint now uses secrets that came with the request.
///
/// # Errors
/// Those of the catalog.
pub fn set_secrets_given(tx: &Connection, id: &str, given: bool) -> Result<()> {
    execute(tx, "UPDATE checkpoints SET secrets_given = ? WHERE id = ?", params![given, id])
}

/// Gives up the bytes of a checkpoint: the state, in this transaction; record, revision and digest stay. Whether it was done: only one that is
/// ready and stored, and that neither a pin nor a job's right keeps.
///
/// # Errors
/// Those of the catalog.
pub fn evict(tx: &Connection, id: &str) -> Result<bool> {
    let changed = tx
        .prepare_cached(
            "UPDATE checkpoints SET state = 'evicted' WHERE id = ?1 AND state = 'ready' AND datastore = '' AND NOT pinned
             AND NOT EXISTS (SELECT 1 FROM leases WHERE checkpoint = ?1)",
        )
        .and_then(|mut update| update.execute([id]))
        .map_err(catalog_error)?;
    Ok(changed > 0)
}

/// Makes an evicted or failed checkpoint fill again; whether it was one.
///
/// # Errors
/// Those of the catalog.
pub fn fill_again(tx: &Connection, id: &str) -> Result<bool> {
    let changed = tx
        .prepare_cached(
            "UPDATE checkpoints SET state = 'filling', failure = NULL WHERE id = ? AND state IN ('evicted', 'failed')",
        )
        .and_then(|mut update| update.execute([id]))
        .map_err(catalog_error)?;
    Ok(changed > 0)
}

/// Takes up to `most` links of a tree that is not rooted any more, the latest blobs first, since they borrow from earlier ones. Returns
/// the blobs that lost a name; none when the tree is rooted or all are gone.
///
/// # Errors
/// Those of the catalog.
pub fn unlink(tx: &Connection, manifest: &Digest, most: usize) -> Result<Vec<i64>> {
    if is_rooted(tx, manifest)? {
        return Ok(Vec::new());
    }
    let take = || -> rusqlite::Result<Vec<i64>> {
        let blobs: Vec<i64> = tx
            .prepare_cached("SELECT blob FROM manifest_blobs WHERE manifest = ? ORDER BY blob DESC LIMIT ?")?
            .query_map(params![manifest.as_bytes(), to_sql(most as u64)], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        let mut delete = tx.prepare_cached("DELETE FROM manifest_blobs WHERE manifest = ? AND blob = ?")?;
        for blob in &blobs {
            delete.execute(params![manifest.as_bytes(), blob])?;
        }
        Ok(blobs)
    };
    take().map_err(catalog_error)
}

/// Trees that have links and are not rooted: what an interrupted removal or eviction left.
///
/// # Errors
/// Those of the catalog.
pub fn unrooted(tx: &Connection) -> Result<Vec<Digest>> {
    let read = || -> rusqlite::Result<Vec<Digest>> {
        tx.prepare_cached(
            "SELECT f.manifest FROM footprints f WHERE NOT EXISTS
             (SELECT 1 FROM checkpoints c WHERE c.manifest = f.manifest AND c.state = 'ready' AND c.datastore = '')",
        )?
        .query_map([], |row| digest_at(row, 0))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Drops up to `most` chunks of a blob; how many are left is not told. Fewer chunks are less dedup to come, and nothing worse.
///
/// # Errors
/// Those of the catalog.
pub fn forget_chunks(tx: &Connection, blob: i64, most: usize) -> Result<usize> {
    tx.prepare_cached("DELETE FROM chunks WHERE digest IN (SELECT digest FROM chunks WHERE blob = ? LIMIT ?)")
        .and_then(|mut delete| delete.execute(params![blob, to_sql(most as u64)]))
        .map_err(catalog_error)
}

/// Some of the blobs that only this tree names, at most `most`: if none of them is held, nothing reads the tree.
///
/// # Errors
/// Those of the catalog.
pub fn own_blobs(tx: &Connection, manifest: &Digest, most: usize) -> Result<Vec<Digest>> {
    let read = || -> rusqlite::Result<Vec<Digest>> {
        tx.prepare_cached(
            "SELECT b.digest FROM manifest_blobs m JOIN blobs b ON b.id = m.blob WHERE m.manifest = ? AND b.names = 1 LIMIT ?",
        )?
        .query_map(params![manifest.as_bytes(), to_sql(most as u64)], |row| digest_at(row, 0))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// The state of a record, and its tree.
///
/// # Errors
/// Those of the catalog.
pub fn tree_of(tx: &Connection, id: &str) -> Result<Option<(State, Option<Digest>)>> {
    let found: Option<(String, Option<[u8; crate::digest::DIGEST_BYTES]>)> = tx
        .prepare_cached("SELECT state, manifest FROM checkpoints WHERE id = ?")
        .and_then(|mut query| query.query_row([id], |row| Ok((row.get(0)?, row.get(1)?))).optional())
        .map_err(catalog_error)?;
    found.map(|(state, manifest)| Ok((state.parse()?, manifest.map(Digest::from_bytes)))).transpose()
}

fn is_rooted(tx: &Connection, manifest: &Digest) -> Result<bool> {
    tx.prepare_cached("SELECT 1 FROM checkpoints WHERE manifest = ? AND state = 'ready' AND datastore = ''")
        .and_then(|mut query| query.exists([manifest.as_bytes()]))
        .map_err(catalog_error)
}

fn execute(tx: &Connection, statement: &str, arguments: impl rusqlite::Params) -> Result<()> {
    tx.prepare_cached(statement).and_then(|mut run| run.execute(arguments)).map_err(catalog_error)?;
    Ok(())
}
