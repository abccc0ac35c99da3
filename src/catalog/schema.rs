//! Tables, as an append-only list of migrations. `PRAGMA user_version` counts those applied.

use rusqlite::Connection;

use super::catalog_error;
use crate::error::{Error, Result};

/// Never edited once released: a change is a new element.
const MIGRATIONS: &[&str] = &[
    // 1: the first schema.
    "
    -- Records. `seq` is the order of creation; `flight` fills it, empty when ready. `source` and `failure` are JSON; no secret is ever in them.
    CREATE TABLE checkpoints (
        seq            INTEGER PRIMARY KEY AUTOINCREMENT,
        id             TEXT NOT NULL UNIQUE,
        name           TEXT NOT NULL,
        owner          TEXT NOT NULL,
        public         INTEGER NOT NULL,
        state          TEXT NOT NULL,
        source         TEXT NOT NULL,
        revision       TEXT NOT NULL,
        flight         TEXT NOT NULL DEFAULT '',
        manifest       BLOB,
        files          INTEGER NOT NULL,
        logical_bytes  INTEGER NOT NULL,
        failure        TEXT,
        created_ms     INTEGER NOT NULL
    );
    CREATE INDEX checkpoints_name ON checkpoints(name);
    CREATE INDEX checkpoints_owner ON checkpoints(owner);
    CREATE INDEX checkpoints_manifest ON checkpoints(manifest);
    CREATE INDEX checkpoints_flight ON checkpoints(flight) WHERE flight <> '';

    -- Canonical manifests by checkpoint digest, and the blobs each names.
    CREATE TABLE manifests (
        digest   BLOB PRIMARY KEY,
        encoded  BLOB NOT NULL
    );
    CREATE TABLE manifest_blobs (
        manifest  BLOB NOT NULL,
        blob      INTEGER NOT NULL,
        PRIMARY KEY (manifest, blob)
    ) WITHOUT ROWID;
    CREATE INDEX manifest_blobs_blob ON manifest_blobs(blob);

    -- Sealed blobs. state: sealed | remnant (only what others borrow is kept) | doomed.
    -- AUTOINCREMENT: ids are never used again.
    CREATE TABLE blobs (
        id            INTEGER PRIMARY KEY AUTOINCREMENT,
        digest        BLOB NOT NULL UNIQUE,
        size          INTEGER NOT NULL,
        stored_bytes  INTEGER NOT NULL,
        state         TEXT NOT NULL
    );
    CREATE INDEX blobs_unusual ON blobs(state) WHERE state <> 'sealed';

    -- Where the bytes of a chunk are on disk: always a range that is physically in `blob`.
    CREATE TABLE chunks (
        digest  BLOB PRIMARY KEY,
        blob    INTEGER NOT NULL,
        start   INTEGER NOT NULL,
        len     INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX chunks_blob ON chunks(blob);

    -- Borrowed ranges: `len` bytes at `start` of `blob` equal those at `home_start` of `home`. filled: they are here too (hydrated).
    CREATE TABLE borrows (
        blob        INTEGER NOT NULL,
        start       INTEGER NOT NULL,
        len         INTEGER NOT NULL,
        home        INTEGER NOT NULL,
        home_start  INTEGER NOT NULL,
        filled      INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (blob, start)
    ) WITHOUT ROWID;
    CREATE INDEX borrows_home ON borrows(home);

    -- Files of running or interrupted flights. units: bitmap of durable fill units (bit n of byte n/8); blob: set once sealed.
    CREATE TABLE fills (
        flight  TEXT NOT NULL,
        path    BLOB NOT NULL,
        number  INTEGER NOT NULL,
        size    INTEGER NOT NULL,
        units   BLOB,
        blob    INTEGER,
        PRIMARY KEY (flight, path)
    ) WITHOUT ROWID;
    CREATE INDEX fills_blob ON fills(blob) WHERE blob IS NOT NULL;

    -- Blobs between rename and row: what start-up undoes after a crash.
    CREATE TABLE publishing (
        digest  BLOB PRIMARY KEY,
        flight  TEXT NOT NULL,
        number  INTEGER NOT NULL
    ) WITHOUT ROWID;

    -- Rights of jobs, and their views. mounted: JSON of what was mounted.
    CREATE TABLE jobs (
        job         TEXT PRIMARY KEY,
        owner       TEXT NOT NULL,
        state       TEXT NOT NULL,
        target      TEXT NOT NULL,
        pid         INTEGER NOT NULL,
        mounted     TEXT,
        created_ms  INTEGER NOT NULL
    );
    CREATE TABLE leases (
        job         TEXT NOT NULL,
        position    INTEGER NOT NULL,
        checkpoint  TEXT NOT NULL,
        subdir      TEXT NOT NULL,
        PRIMARY KEY (job, position)
    ) WITHOUT ROWID;
    CREATE INDEX leases_checkpoint ON leases(checkpoint);

    CREATE TABLE events (
        id          INTEGER PRIMARY KEY AUTOINCREMENT,
        at_ms       INTEGER NOT NULL,
        kind        TEXT NOT NULL,
        checkpoint  TEXT NOT NULL,
        job         TEXT NOT NULL,
        message     TEXT NOT NULL
    );
    ",
];

/// Applies what is missing.
pub(super) fn migrate(connection: &mut Connection) -> Result<()> {
    let applied: usize = connection
        .pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
        .map(|version| usize::try_from(version).unwrap_or(usize::MAX))
        .map_err(catalog_error)?;
    if applied > MIGRATIONS.len() {
        return Err(Error::wrong_state(
            "CATALOG_TOO_NEW",
            format!("the catalog is of version {applied}, this ckptd knows {}", MIGRATIONS.len()),
        )
        .remedy("run the newer ckptd"));
    }
    for (number, migration) in MIGRATIONS.iter().enumerate().skip(applied) {
        let transaction = connection.transaction().map_err(catalog_error)?;
        transaction.execute_batch(migration).map_err(catalog_error)?;
        transaction.pragma_update(None, "user_version", super::to_sql(number as u64 + 1)).map_err(catalog_error)?;
        transaction.commit().map_err(catalog_error)?;
    }
    Ok(())
}
