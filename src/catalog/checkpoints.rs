//! Records of checkpoints and their manifests.
//!
//! Lifecycle of a record:
//! ```text
//! new -> filling -> ready -> evicted -> filling (wanted again)
//!           |-> failed -> filling (retry)       any -> removing -> row gone
//! ```
//! One that was ready once keeps its digest for good: whatever fills it again must come to the same. The links of its tree to blobs
//! (`manifest_blobs`) are *rooted* while a record has that tree that is to serve it (see [`retention`](super::retention)); what is not rooted is swept.

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{catalog_error, from_sql, placements, scrubs, to_sql};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::manifest::{EntryKind, Manifest};
use crate::names::EntryPath;
use crate::places::Place;

pub use super::record::{Failure, Origin, Record, State};

const COLUMNS: &str = "id, name, owner, public, state, source, revision, manifest, files, logical_bytes, failure, created_ms, datastore, \
                       below, pinned, used_ms, secrets_given";

struct Raw {
    record: Record,
    state: String,
    source: String,
    failure: Option<String>,
    datastore: String,
    below: Vec<u8>,
}

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    let manifest: Option<[u8; crate::digest::DIGEST_BYTES]> = row.get(7)?;
    Ok(Raw {
        state: row.get(4)?,
        source: row.get(5)?,
        failure: row.get(10)?,
        datastore: row.get(12)?,
        below: row.get(13)?,
        record: Record {
            id: row.get(0)?,
            name: row.get(1)?,
            owner: row.get(2)?,
            public: row.get(3)?,
            state: State::New,
            origin: Origin { kind: String::new(), uri: String::new(), options: Default::default() },
            revision: row.get(6)?,
            manifest: manifest.map(Digest::from_bytes),
            files: from_sql(row.get(8)?),
            logical_bytes: from_sql(row.get(9)?),
            failure: None,
            created_ms: row.get(11)?,
            in_place: None,
            pinned: row.get(14)?,
            used_ms: row.get(15)?,
            secrets_given: row.get(16)?,
        },
    })
}

fn parse(raw: Raw) -> Result<Record> {
    let damaged = |error: serde_json::Error| {
        Error::corrupt("CATALOG_DAMAGED", format!("the record of checkpoint {} is damaged", raw.record.id))
            .because(error)
    };
    let failure = raw.failure.as_deref().map(serde_json::from_str).transpose().map_err(damaged)?;
    let in_place = match raw.datastore {
        none if none.is_empty() => None,
        datastore => Some(Place { datastore, below: EntryPath::new(raw.below)? }),
    };
    Ok(Record {
        in_place,
        state: raw.state.parse()?,
        origin: serde_json::from_str(&raw.source).map_err(damaged)?,
        failure,
        ..raw.record
    })
}

fn select(tx: &Connection, condition: &str, arguments: impl rusqlite::Params) -> Result<Vec<Record>> {
    let query = format!("SELECT {COLUMNS} FROM checkpoints WHERE {condition} ORDER BY seq");
    let mut statement = tx.prepare_cached(&query).map_err(catalog_error)?;
    let rows = statement.query_map(arguments, raw).map_err(catalog_error)?;
    rows.map(|row| row.map_err(catalog_error).and_then(parse)).collect()
}

/// Adds a record.
///
/// # Errors
/// Those of the catalog.
pub fn insert(tx: &Connection, record: &Record) -> Result<()> {
    let source =
        serde_json::to_string(&record.origin).map_err(|error| Error::internal("encoding a source").because(error))?;
    tx.prepare_cached(
        "INSERT INTO checkpoints (id, name, owner, public, state, source, revision, files, logical_bytes, created_ms, used_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?10)",
    )
    .and_then(|mut insert| {
        insert.execute(params![
            record.id,
            record.name,
            record.owner,
            record.public,
            record.state.as_str(),
            source,
            record.revision,
            to_sql(record.files),
            to_sql(record.logical_bytes),
            record.created_ms
        ])
    })
    .map_err(catalog_error)?;
    Ok(())
}

/// The record of an id.
///
/// # Errors
/// Those of the catalog.
pub fn get(tx: &Connection, id: &str) -> Result<Option<Record>> {
    Ok(select(tx, "id = ?", [id])?.pop())
}

/// Whose records somebody sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// All there are.
    Everything,
    /// One owner's (empty: nobody's) and public ones.
    By(String),
}

impl Seen {
    /// Whether a record is among them.
    pub fn includes(&self, record: &Record) -> bool {
        match self {
            Self::Everything => true,
            Self::By(owner) => record.public || record.owner == *owner,
        }
    }

    /// As a condition on `owner` and `public`, whose first parameter is [`Seen::owner`].
    const fn condition(&self) -> &'static str {
        match self {
            Self::Everything => "?1 = ?1",
            Self::By(_) => "(owner = ?1 OR public)",
        }
    }

    fn owner(&self) -> &str {
        match self {
            Self::Everything => "",
            Self::By(owner) => owner,
        }
    }
}

/// Records that `reference` may mean among those seen: the one of that id, else all of that name; `public` restricts to public ones.
///
/// # Errors
/// Those of the catalog.
pub fn matching(tx: &Connection, reference: &str, seen: &Seen, public: bool) -> Result<Vec<Record>> {
    let visible = format!("{} AND (NOT ?3 OR public) AND state <> 'removing'", seen.condition());
    let by_id = select(tx, &format!("id = ?2 AND {visible}"), params![seen.owner(), reference, public])?;
    if !by_id.is_empty() {
        return Ok(by_id);
    }
    select(tx, &format!("name = ?2 AND {visible}"), params![seen.owner(), reference, public])
}

/// All records among those seen, of one owner if `owner` is not empty, public ones only if `public`; in order of creation.
///
/// # Errors
/// Those of the catalog.
pub fn list(tx: &Connection, seen: &Seen, owner: &str, public: bool) -> Result<Vec<Record>> {
    // An owner's rows are found by their index.
    let of_owner = if owner.is_empty() { "?2 = ?2" } else { "owner = ?2" };
    let condition = format!("{of_owner} AND {} AND (NOT ?3 OR public)", seen.condition());
    select(tx, &condition, params![seen.owner(), owner, public])
}

/// Records in a state.
///
/// # Errors
/// Those of the catalog.
pub fn in_state(tx: &Connection, state: State) -> Result<Vec<Record>> {
    select(tx, "state = ?1", [state.as_str()])
}

/// Records that are ready, with a failure: something of them is lost.
///
/// # Errors
/// Those of the catalog.
pub fn damaged(tx: &Connection) -> Result<Vec<Record>> {
    select(tx, "state = 'ready' AND failure IS NOT NULL", [])
}

/// Records that are ready and have this tree.
///
/// # Errors
/// Those of the catalog.
pub fn ready_of(tx: &Connection, tree: &Digest) -> Result<Vec<Record>> {
    select(tx, "state = 'ready' AND manifest = ?", [tree.as_bytes()])
}

/// Changes state and failure of a record that is not being removed; whether there was one.
///
/// # Errors
/// Those of the catalog.
pub fn set_state(tx: &Connection, id: &str, state: State, failure: Option<&Failure>) -> Result<bool> {
    let failure = failure
        .map(serde_json::to_string)
        .transpose()
        .map_err(|error| Error::internal("encoding a failure").because(error))?;
    update(
        tx,
        "UPDATE checkpoints SET state = ?2, failure = ?3 WHERE id = ?1 AND state <> 'removing'",
        params![id, state.as_str(), failure],
    )
}

/// Moves a record on from `new` or `filling` to `filling`; whether it was in one of them. A loss that is being mended stays noted
/// ([`losses`](super::losses)).
///
/// # Errors
/// Those of the catalog.
pub fn begin_filling(tx: &Connection, id: &str) -> Result<bool> {
    update(tx, "UPDATE checkpoints SET state = 'filling' WHERE id = ?1 AND state IN ('new', 'filling')", [id])
}

/// Makes a record failed that is not decided yet; whether it was such a one. What nobody kept of it is not charged.
///
/// # Errors
/// Those of the catalog.
pub fn set_failed(tx: &Connection, id: &str, failure: &Failure) -> Result<bool> {
    let failure =
        serde_json::to_string(failure).map_err(|error| Error::internal("encoding a failure").because(error))?;
    update(
        tx,
        "UPDATE checkpoints SET state = 'failed', failure = ?2,
                charged_bytes = iif(EXISTS (SELECT 1 FROM fills f WHERE f.flight = checkpoints.flight), charged_bytes, 0)
         WHERE id = ?1 AND state IN ('new', 'filling')",
        params![id, failure],
    )
}

/// Notes that no flight fills a checkpoint any more, and that nothing of it is kept.
///
/// # Errors
/// Those of the catalog.
pub fn clear_flight(tx: &Connection, id: &str) -> Result<()> {
    update(tx, "UPDATE checkpoints SET flight = '', charged_bytes = 0 WHERE id = ?1", [id]).map(|_| ())
}

/// Drops manifests that no record names: what a removal in the wrong moment left. Links of their trees stay for
/// [`retention::unrooted`](super::retention::unrooted).
///
/// # Errors
/// Those of the catalog.
pub fn drop_unnamed_manifests(tx: &Connection) -> Result<()> {
    let unnamed = "NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.manifest = manifests.digest)";
    tx.execute(&format!("DELETE FROM manifests WHERE {unnamed}"), []).map_err(catalog_error)?;
    Ok(())
}

/// Notes what the listing says, and the flight that fills the checkpoint. Returns the flight it had before.
///
/// # Errors
/// Those of the catalog.
pub fn set_listing(
    tx: &Connection,
    id: &str,
    revision: &str,
    flight: &str,
    files: u64,
    logical_bytes: u64,
) -> Result<String> {
    let before = flight_of(tx, id)?;
    update(
        tx,
        "UPDATE checkpoints SET revision = ?2, flight = ?3, files = ?4, logical_bytes = ?5
         WHERE id = ?1 AND state <> 'removing'",
        params![id, revision, flight, to_sql(files), to_sql(logical_bytes)],
    )
    .and_then(still_there)?;
    Ok(before)
}

/// The flight that fills or filled a checkpoint; empty if none.
///
/// # Errors
/// Those of the catalog.
pub fn flight_of(tx: &Connection, id: &str) -> Result<String> {
    tx.prepare_cached("SELECT flight FROM checkpoints WHERE id = ?")
        .and_then(|mut query| query.query_row([id], |row| row.get(0)).optional())
        .map(Option::unwrap_or_default)
        .map_err(catalog_error)
}

/// Whether any record still needs a flight.
///
/// # Errors
/// Those of the catalog.
pub fn flight_is_needed(tx: &Connection, flight: &str) -> Result<bool> {
    tx.prepare_cached("SELECT 1 FROM checkpoints WHERE flight = ?")
        .and_then(|mut query| query.exists([flight]))
        .map_err(catalog_error)
}

/// Whether another record than `id` is still being filled by a flight.
///
/// # Errors
/// Those of the catalog.
pub fn others_fill(tx: &Connection, flight: &str, id: &str) -> Result<bool> {
    tx.prepare_cached("SELECT 1 FROM checkpoints WHERE flight = ? AND id <> ? AND state IN ('new', 'filling')")
        .and_then(|mut query| query.exists([flight, id]))
        .map_err(catalog_error)
}

/// Renames.
///
/// # Errors
/// Those of the catalog.
pub fn set_name(tx: &Connection, id: &str, name: &str) -> Result<()> {
    update(tx, "UPDATE checkpoints SET name = ?2 WHERE id = ?1", params![id, name]).map(|_| ())
}

/// Where the bytes of a checkpoint are that is made ready.
#[derive(Clone, Debug)]
pub enum Bytes {
    /// In the store: each file has a sealed blob.
    Stored,
    /// In a datastore, as the flight of this key has seen them.
    InPlace(Place, String),
}

/// Makes a checkpoint ready: the manifest, its blobs or placements, and the state in the caller's one transaction.
///
/// # Errors
/// `MISSING_BLOB`, `MISSING_PLACEMENT` (our bugs) when a file of the manifest has none; `BYTES_ROTTEN` when it was lost since it was sealed; those
/// of the catalog.
pub fn set_ready(
    tx: &Connection,
    id: &str,
    revision: &str,
    manifest: &Manifest,
    digest: &Digest,
    bytes: &Bytes,
) -> Result<()> {
    let (datastore, below) = match bytes {
        Bytes::Stored => ("", &[][..]),
        Bytes::InPlace(place, _) => (place.datastore.as_str(), place.below.as_bytes()),
    };
    let blobs_are_linked = has_stored(tx, digest, id)?;
    // First, so that a record that is gone or going takes nothing with it.
    update(
        tx,
        "UPDATE checkpoints SET state = 'ready', failure = NULL, flight = '', revision = ?2, manifest = ?3, files = ?4,
         logical_bytes = ?5, charged_bytes = iif(?6 = '', ?5, 0), datastore = ?6, below = ?7
         WHERE id = ?1 AND state <> 'removing'",
        params![
            id,
            revision,
            digest.as_bytes(),
            to_sql(manifest.files()),
            to_sql(manifest.logical_bytes()),
            datastore,
            below
        ],
    )
    .and_then(still_there)?;
    // Anew where it is there, since it may be damaged.
    tx.prepare_cached(
        "INSERT INTO manifests (digest, encoded) VALUES (?, ?) ON CONFLICT DO UPDATE SET encoded = excluded.encoded",
    )
    .and_then(|mut insert| insert.execute(params![digest.as_bytes(), manifest.encode()]))
    .map_err(catalog_error)?;
    match bytes {
        Bytes::Stored if blobs_are_linked => Ok(()),
        Bytes::Stored => link_blobs(tx, manifest, digest),
        Bytes::InPlace(_, flight) => placements::settle(tx, id, flight, manifest),
    }
}

/// Whether a checkpoint of this manifest, other than `except`, has its bytes in the store: only such ones name blobs.
fn has_stored(tx: &Connection, manifest: &Digest, except: &str) -> Result<bool> {
    tx.prepare_cached("SELECT 1 FROM checkpoints WHERE manifest = ? AND state = 'ready' AND datastore = '' AND id <> ?")
        .and_then(|mut query| query.exists(params![manifest.as_bytes(), except]))
        .map_err(catalog_error)
}

/// A change of a record that must be there.
fn still_there(changed: bool) -> Result<()> {
    if changed {
        return Ok(());
    }
    Err(Error::new(Kind::Cancelled, "CHECKPOINT_REMOVED", "the checkpoint was removed meanwhile"))
}

fn link_blobs(tx: &Connection, manifest: &Manifest, digest: &Digest) -> Result<()> {
    let mut link = tx
        .prepare_cached(
            "INSERT OR IGNORE INTO manifest_blobs (manifest, blob)
             SELECT ?1, id FROM blobs WHERE digest = ?2 AND state = 'sealed'",
        )
        .map_err(catalog_error)?;
    let mut state = tx.prepare_cached("SELECT state FROM blobs WHERE digest = ?").map_err(catalog_error)?;
    for entry in manifest.entries() {
        let EntryKind::File { digest: file, .. } = &entry.kind else { continue };
        let linked = link.execute(params![digest.as_bytes(), file.as_bytes()]).map_err(catalog_error)?;
        if linked > 0 {
            continue;
        }
        let state: Option<String> =
            state.query_row([file.as_bytes()], |row| row.get(0)).optional().map_err(catalog_error)?;
        match state.as_deref() {
            Some("sealed") => {}
            Some("remnant") => return Err(scrubs::lost_meanwhile(&entry.path)),
            _ => {
                let message = format!("`{}` is to be made ready without a sealed blob", entry.path);
                return Err(Error::new(Kind::Internal, "MISSING_BLOB", message));
            }
        }
    }
    Ok(())
}

/// The canonical manifest of a checkpoint digest.
///
/// # Errors
/// Corrupt if it is missing, has another digest, or does not decode.
pub fn manifest(tx: &Connection, digest: &Digest) -> Result<Manifest> {
    let encoded: Option<Vec<u8>> = tx
        .prepare_cached("SELECT encoded FROM manifests WHERE digest = ?")
        .and_then(|mut query| query.query_row([digest.as_bytes()], |row| row.get(0)).optional())
        .map_err(catalog_error)?;
    let encoded = encoded
        .ok_or_else(|| Error::corrupt("MISSING_MANIFEST", format!("the catalog lacks the manifest {digest}")))?;
    if Digest::of(&encoded) != *digest {
        return Err(Error::corrupt("CATALOG_DAMAGED", format!("the manifest {digest} is damaged in the catalog"))
            .remedy("retry its checkpoints, or remove them; `ckptctl scrub` finds them all"));
    }
    Manifest::decode(&encoded)
}

/// Drops a record, its placements, and its manifest if no other record has it. Returns its tree, whose links to blobs stay: they are for
/// [`retention::unlink`](super::retention::unlink) unless another record roots them.
///
/// # Errors
/// Those of the catalog.
pub fn delete(tx: &Connection, id: &str) -> Result<Option<Digest>> {
    let Some(record) = get(tx, id)? else { return Ok(None) };
    update(tx, "DELETE FROM checkpoints WHERE id = ?1", [id])?;
    placements::forget(tx, id)?;
    if let Some(manifest) = record.manifest {
        let unnamed = "NOT EXISTS (SELECT 1 FROM checkpoints WHERE manifest = ?1)";
        update(tx, &format!("DELETE FROM manifests WHERE digest = ?1 AND {unnamed}"), [manifest.as_bytes()])?;
    }
    Ok(record.manifest)
}

/// Whether any row changed.
pub(super) fn update(tx: &Connection, statement: &str, arguments: impl rusqlite::Params) -> Result<bool> {
    let changed =
        tx.prepare_cached(statement).and_then(|mut update| update.execute(arguments)).map_err(catalog_error)?;
    Ok(changed > 0)
}
