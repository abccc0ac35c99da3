//! What is kept and what may go: pins, last use, eviction, and the links of trees to blobs that are taken apart in small pieces.
//!
//! A tree's links are *rooted* while a record that is `ready` and stored has that tree, or one that fills again and is to have it. [`evict`] and a removal
//! end that in one small transaction; [`unlink`] then takes so many links at a time, and whoever calls it condemns the blobs that lost theirs in
//! the same transaction. Should the tree become rooted again meanwhile, its links are made anew and [`unlink`] finds nothing to do.
//!
//! A record that failed to fill again roots what is there of its tree while a pin or a job's right keeps it: a job may read that. Nothing sweeps the tree
//! the moment the last of these ends; the next start does, unless the record was filled or removed before.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::blobs::BlobRow;
use super::checkpoints::{Origin, State};
use super::{catalog_error, digest_at, from_sql, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Whether a record `c` roots the links of its tree.
const ROOTS: &str = "c.datastore = '' AND (c.state IN ('ready', 'filling') OR (c.state = 'failed' AND (c.pinned
     OR EXISTS (SELECT 1 FROM leases l WHERE l.checkpoint = c.id))))";

/// A record that is ready and stored, as far as keeping it is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Whose it is; empty for public ones.
    pub owner: String,
    /// Its tree.
    pub manifest: Digest,
    /// Where it came from.
    pub origin: Origin,
    /// What the source resolved to.
    pub revision: String,
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
    /// Sum of its files' sizes.
    pub logical_bytes: u64,
}

/// What becomes of the bytes that are kept, when room is needed: by the strongest reason of those who name them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// That can be given up, since they can be fetched again.
    pub evictable_bytes: u64,
    /// That jobs have a right to, or that are in use this moment.
    pub leased_bytes: u64,
    /// That an operator wants kept.
    pub pinned_bytes: u64,
    /// That were sent, captured, or filled with secrets that the daemon does not have.
    pub not_refetchable_bytes: u64,
}

/// A blob with copies of what it borrows.
#[derive(Clone, Copy, Debug)]
pub struct Duplicate {
    /// The blob.
    pub blob: BlobRow,
    /// Length of the copies in bytes.
    pub bytes: u64,
    /// The one tree that names it; `None` where several do.
    pub tree: Option<Digest>,
}

/// Every record that is ready and stored, least recently used first.
///
/// # Errors
/// Those of the catalog.
pub fn kept(tx: &Connection) -> Result<Vec<Kept>> {
    let read = || -> rusqlite::Result<Vec<(Kept, String)>> {
        tx.prepare_cached(
            "SELECT c.id, c.name, c.manifest, c.pinned, EXISTS (SELECT 1 FROM leases l WHERE l.checkpoint = c.id), c.secrets_given,
                    c.used_ms, COALESCE(f.stored_bytes - f.shared_stored_bytes, 0), c.source, c.revision,
                    c.owner, c.logical_bytes
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
                revision: row.get(9)?,
                owner: row.get(10)?,
                logical_bytes: from_sql(row.get(11)?),
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

/// Blobs that several trees name, with what they occupy, once for each tree; in order of their ids.
///
/// # Errors
/// Those of the catalog.
pub fn shared(tx: &Connection) -> Result<Vec<(i64, u64, Digest)>> {
    let read = || -> rusqlite::Result<Vec<(i64, u64, Digest)>> {
        tx.prepare_cached(
            "SELECT b.id, b.stored_bytes, m.manifest FROM blobs b INDEXED BY blobs_shared
             JOIN manifest_blobs m ON m.blob = b.id WHERE b.names > 1 ORDER BY b.id",
        )?
        .query_map([], |row| Ok((row.get(0)?, from_sql(row.get(1)?), digest_at(row, 2)?)))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Blobs with copies of what they borrow.
///
/// # Errors
/// Those of the catalog.
pub fn duplicates(tx: &Connection) -> Result<Vec<Duplicate>> {
    let read = || -> rusqlite::Result<Vec<Duplicate>> {
        tx.prepare_cached(
            "SELECT id, digest, size, duplicate_bytes, CASE names WHEN 1 THEN (SELECT manifest FROM manifest_blobs WHERE blob = id) END
             FROM blobs WHERE duplicate_bytes > 0 AND state = 'sealed' ORDER BY id",
        )?
        .query_map([], |row| {
            let blob = BlobRow { id: row.get(0)?, digest: digest_at(row, 1)?, size: from_sql(row.get(2)?) };
            let tree: Option<[u8; crate::digest::DIGEST_BYTES]> = row.get(4)?;
            Ok(Duplicate { blob, bytes: from_sql(row.get(3)?), tree: tree.map(Digest::from_bytes) })
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

/// Takes [`give_up_duplicates`] back for the copies that begin at `starts`: they are there still, and count again.
///
/// # Errors
/// Those of the catalog.
pub fn keep_duplicates(tx: &Connection, blob: i64, starts: &[u64]) -> Result<()> {
    starts.iter().try_for_each(|start| {
        execute(tx, "UPDATE borrows SET filled = 1 WHERE blob = ? AND start = ?", params![blob, to_sql(*start)])
    })
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
            "UPDATE checkpoints SET state = 'evicted', charged_bytes = 0 WHERE id = ?1 AND state = 'ready' AND datastore = '' AND NOT pinned
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
/// the blobs that lost a name, for [`condemn`](super::blobs::condemn); `None` when the tree is rooted or all are gone.
///
/// Blobs that go are taken with `most_chunks` chunks in all at most; of one that has more, so many are forgotten, and it keeps its
/// name until the rest is few. So there may be more to come though none is returned.
///
/// # Errors
/// Those of the catalog.
pub fn unlink(tx: &Connection, manifest: &Digest, most: usize, most_chunks: usize) -> Result<Option<Vec<i64>>> {
    if is_rooted(tx, manifest)? {
        return Ok(None);
    }
    let links = || -> rusqlite::Result<Vec<i64>> {
        tx.prepare_cached("SELECT blob FROM manifest_blobs WHERE manifest = ? ORDER BY blob DESC LIMIT ?")?
            .query_map(params![manifest.as_bytes(), to_sql(most as u64)], |row| row.get(0))?
            .collect()
    };
    let links = links().map_err(catalog_error)?;
    if links.is_empty() {
        return Ok(None);
    }
    let mut delete =
        tx.prepare_cached("DELETE FROM manifest_blobs WHERE manifest = ? AND blob = ?").map_err(catalog_error)?;
    let (mut taken, mut room) = (Vec::new(), most_chunks);
    for blob in links {
        let chunks = chunks_that_go(tx, blob, room + 1)?;
        if chunks > room {
            if taken.is_empty() {
                forget_chunks(tx, blob, most_chunks)?;
            }
            break;
        }
        room -= chunks;
        delete.execute(params![manifest.as_bytes(), blob]).map_err(catalog_error)?;
        taken.push(blob);
    }
    Ok(Some(taken))
}

/// Chunks of a blob that go with its one name, counted to `most`; 0 where others name it or borrow from it.
fn chunks_that_go(tx: &Connection, blob: i64, most: usize) -> Result<usize> {
    tx.prepare_cached(
        "SELECT CASE WHEN (SELECT names FROM blobs WHERE id = ?1) > 1 OR EXISTS (SELECT 1 FROM fills WHERE blob = ?1)
                       OR EXISTS (SELECT 1 FROM borrows WHERE home = ?1)
                THEN 0 ELSE (SELECT COUNT(*) FROM (SELECT 1 FROM chunks WHERE blob = ?1 LIMIT ?2)) END",
    )
    .and_then(|mut query| query.query_row(params![blob, to_sql(most as u64)], |row| row.get::<_, i64>(0)))
    .map(|count| usize::try_from(count).unwrap_or(0))
    .map_err(catalog_error)
}

/// Trees that have links and are not rooted: what an interrupted removal or eviction left.
///
/// # Errors
/// Those of the catalog.
pub fn unrooted(tx: &Connection) -> Result<Vec<Digest>> {
    let read = || -> rusqlite::Result<Vec<Digest>> {
        tx.prepare_cached(
            &format!("SELECT f.manifest FROM footprints f WHERE NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.manifest = f.manifest AND {ROOTS})"),
        )?
        .query_map([], |row| digest_at(row, 0))?
        .collect()
    };
    read().map_err(catalog_error)
}

/// Drops up to `most` chunks of a blob. Fewer chunks are less dedup to come, and nothing worse.
fn forget_chunks(tx: &Connection, blob: i64, most: usize) -> Result<usize> {
    tx.prepare_cached("DELETE FROM chunks WHERE digest IN (SELECT digest FROM chunks WHERE blob = ? LIMIT ?)")
        .and_then(|mut delete| delete.execute(params![blob, to_sql(most as u64)]))
        .map_err(catalog_error)
}

/// Some of the blobs that only this tree names, at most `most`: if one of them is not held, nothing reads the tree.
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
    tx.prepare_cached(&format!("SELECT 1 FROM checkpoints c WHERE c.manifest = ? AND {ROOTS}"))
        .and_then(|mut query| query.exists([manifest.as_bytes()]))
        .map_err(catalog_error)
}

fn execute(tx: &Connection, statement: &str, arguments: impl rusqlite::Params) -> Result<()> {
    tx.prepare_cached(statement).and_then(|mut run| run.execute(arguments)).map_err(catalog_error)?;
    Ok(())
}
