//! Checkpoints of which something is lost, and their being filled again.
//!
//! Such a record is `ready` with the loss as its failure. While it is filled again it is `filling` and keeps that failure, which no other filling
//! record has: what is right of its tree stays rooted, is served to whoever had it, and is not fetched again. Where filling it fails it is ready
//! with its loss as before, so that a source that is gone, or a disk that is full, costs no byte that was right.

use rusqlite::{Connection, params};

use super::checkpoints::{Failure, Record, State, update};
use super::{catalog_error, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Bytes of a file are wrong on disk.
pub const BYTES_ROTTEN: &str = "BYTES_ROTTEN";
/// The list of files is wrong in the catalog.
pub const MANIFEST_DAMAGED: &str = "MANIFEST_DAMAGED";

/// A file of a tree that may be right.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Path in the checkpoint, as bytes.
    pub path: Vec<u8>,
    /// Digest of the whole file.
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Number that its file in the flight's directory would have.
    pub number: u64,
}

/// Whether a failure says that something is lost of what was ready.
pub fn is_loss(failure: &Failure) -> bool {
    [BYTES_ROTTEN, MANIFEST_DAMAGED].contains(&failure.reason.as_str())
}

impl Record {
    /// The tree of a record that is filled again because something of it is lost.
    pub fn healing_manifest(&self) -> Option<Digest> {
        self.manifest.filter(|_| self.state == State::Filling && self.failure.as_ref().is_some_and(is_loss))
    }
}

/// Begins to fill a damaged record again; whether it was one.
///
/// # Errors
/// Those of the catalog.
pub fn begin_healing(tx: &Connection, id: &str) -> Result<bool> {
    update(
        tx,
        "UPDATE checkpoints SET state = 'filling' WHERE id = ? AND state = 'ready' AND failure IS NOT NULL",
        [id],
    )
}

/// Makes a damaged record that could not be filled what it was: ready, with `failure`, which says what is lost. Whether it was one.
///
/// # Errors
/// Those of the catalog.
pub fn end_healing(tx: &Connection, id: &str, failure: &Failure) -> Result<bool> {
    let failure =
        serde_json::to_string(failure).map_err(|error| Error::internal("encoding a failure").because(error))?;
    update(
        tx,
        "UPDATE checkpoints SET state = 'ready', failure = ?2, charged_bytes = iif(datastore = '', logical_bytes, 0)
         WHERE id = ?1 AND state = 'filling' AND failure IS NOT NULL",
        params![id, failure],
    )
}

/// Gives a flight what is right of `tree`: those of `files` that it names and that are stored whole.
///
/// # Errors
/// Those of the catalog.
pub fn share_right(tx: &Connection, tree: &Digest, flight: &str, files: &[Listed]) -> Result<()> {
    let share = || -> rusqlite::Result<()> {
        let mut insert = tx.prepare_cached(
            "INSERT OR IGNORE INTO fills (flight, path, number, size, blob)
             SELECT ?2, ?3, ?4, b.size, b.id FROM blobs b JOIN manifest_blobs m ON m.blob = b.id AND m.manifest = ?1
             WHERE b.digest = ?5 AND b.size = ?6 AND b.state = 'sealed'",
        )?;
        for Listed { path, digest, size, number } in files {
            let (number, size) = (to_sql(*number), to_sql(*size));
            insert.execute(params![tree.as_bytes(), flight, path, number, digest.as_bytes(), size])?;
        }
        Ok(())
    };
    share().map_err(catalog_error)
}
