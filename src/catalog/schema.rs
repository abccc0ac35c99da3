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
    // 2: checkpoints that are served in place.
    "
    -- Where such a checkpoint's bytes are: datastore (empty: in the store) and the directory from its root.
    ALTER TABLE checkpoints ADD COLUMN datastore TEXT NOT NULL DEFAULT '';
    ALTER TABLE checkpoints ADD COLUMN below BLOB NOT NULL DEFAULT x'';

    -- Each file of a ready checkpoint that is served in place, by its path in the checkpoint, with the stamp that its bytes had.
    CREATE TABLE placements (
        checkpoint  TEXT NOT NULL,
        path        BLOB NOT NULL,
        stamp       TEXT NOT NULL,
        PRIMARY KEY (checkpoint, path)
    ) WITHOUT ROWID;

    -- Files that a flight has taken digests of in place: what it resumes from.
    CREATE TABLE sightings (
        flight  TEXT NOT NULL,
        path    BLOB NOT NULL,
        stamp   TEXT NOT NULL,
        digest  BLOB NOT NULL,
        PRIMARY KEY (flight, path)
    ) WITHOUT ROWID;
    ",
    // 3: checkpoints that are read while they fill.
    "
    -- The tree that a flight fills, as it was shown to jobs before its files had digests: canonical, file digests zero.
    CREATE TABLE listings (
        flight  TEXT PRIMARY KEY,
        tree    BLOB NOT NULL
    ) WITHOUT ROWID;

    -- In which order a tree of this shape was first read: u32 entry, u32 fill unit, little-endian.
    CREATE TABLE orders (
        shape  BLOB PRIMARY KEY,
        read   BLOB NOT NULL,
        at_ms  INTEGER NOT NULL
    ) WITHOUT ROWID;
    -- How fast places gave.
    CREATE TABLE rates (
        place        TEXT PRIMARY KEY,
        bytes_per_s  INTEGER NOT NULL,
        at_ms        INTEGER NOT NULL
    ) WITHOUT ROWID;
    -- What was expected of an ingest and what it took.
    CREATE TABLE estimates (
        checkpoint   TEXT PRIMARY KEY,
        at_ms        INTEGER NOT NULL,
        bytes        INTEGER NOT NULL,
        expected_ms  INTEGER NOT NULL,
        took_ms      INTEGER
    ) WITHOUT ROWID;
    ",
    // 4: how long things are kept.
    "
    -- pinned: an operator's lasting right. used_ms: when a job last took or gave up a right to it, or it became ready.
    ALTER TABLE checkpoints ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE checkpoints ADD COLUMN used_ms INTEGER NOT NULL DEFAULT 0;
    UPDATE checkpoints SET used_ms = created_ms;

    -- When the right ends by itself; NULL: when it is released.
    ALTER TABLE jobs ADD COLUMN expires_ms INTEGER;
    CREATE INDEX jobs_expires ON jobs(expires_ms) WHERE expires_ms IS NOT NULL;

    -- When all bytes at rest were last read and were right; 0: not since they were sealed.
    ALTER TABLE blobs ADD COLUMN verified_ms INTEGER NOT NULL DEFAULT 0;

    -- Whose checkpoint or job an event is about (empty: nobody's), and its number among that owner's: ascending, and no count.
    ALTER TABLE events ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    ALTER TABLE events ADD COLUMN number INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX events_owner ON events(owner, number);

    -- Secrets came with the request that filled it: the daemon cannot fetch it again by itself.
    ALTER TABLE checkpoints ADD COLUMN secrets_given INTEGER NOT NULL DEFAULT 0;

    -- Figures that the triggers below keep, so that no change can forget them; `accounting` says what each means.
    -- borrowed_bytes: sum of what it borrows; duplicate_bytes: of that, what is here too; names: trees that name it.
    ALTER TABLE blobs ADD COLUMN borrowed_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE blobs ADD COLUMN duplicate_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE blobs ADD COLUMN names INTEGER NOT NULL DEFAULT 0;
    UPDATE blobs SET
        borrowed_bytes = (SELECT COALESCE(SUM(len), 0) FROM borrows WHERE blob = id),
        duplicate_bytes = (SELECT COALESCE(SUM(len), 0) FROM borrows WHERE blob = id AND filled),
        names = (SELECT COUNT(*) FROM manifest_blobs WHERE blob = id);
    CREATE INDEX blobs_shared ON blobs(id) WHERE names > 1;
    CREATE INDEX blobs_duplicate ON blobs(id) WHERE duplicate_bytes > 0;

    -- One row for each tree that names blobs. shared: in blobs that other trees name too.
    CREATE TABLE footprints (
        manifest             BLOB PRIMARY KEY,
        blobs                INTEGER NOT NULL,
        tree_bytes           INTEGER NOT NULL,
        unique_bytes         INTEGER NOT NULL,
        shared_bytes         INTEGER NOT NULL,
        stored_bytes         INTEGER NOT NULL,
        shared_stored_bytes  INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO footprints
        SELECT m.manifest, COUNT(*), SUM(b.size), SUM(b.size - b.borrowed_bytes),
               SUM((b.names > 1) * (b.size - b.borrowed_bytes)), SUM(b.stored_bytes), SUM((b.names > 1) * b.stored_bytes)
        FROM manifest_blobs m JOIN blobs b ON b.id = m.blob GROUP BY m.manifest;

    -- One row for the store. sealed and remnant: what they occupy (a remnant is whatever is not sealed).
    CREATE TABLE totals (
        one              INTEGER PRIMARY KEY CHECK (one = 1),
        unique_bytes     INTEGER NOT NULL,
        duplicate_bytes  INTEGER NOT NULL,
        sealed_bytes     INTEGER NOT NULL,
        remnant_bytes    INTEGER NOT NULL
    );
    INSERT INTO totals
        SELECT 1, COALESCE(SUM((state = 'sealed') * (size - borrowed_bytes)), 0), COALESCE(SUM(duplicate_bytes), 0),
               COALESCE(SUM((state = 'sealed') * stored_bytes), 0), COALESCE(SUM((state <> 'sealed') * stored_bytes), 0)
        FROM blobs;

    CREATE TRIGGER borrows_added AFTER INSERT ON borrows BEGIN
        UPDATE blobs SET borrowed_bytes = borrowed_bytes + new.len, duplicate_bytes = duplicate_bytes + new.len * new.filled
            WHERE id = new.blob;
    END;
    CREATE TRIGGER borrows_gone AFTER DELETE ON borrows BEGIN
        UPDATE blobs SET borrowed_bytes = borrowed_bytes - old.len, duplicate_bytes = duplicate_bytes - old.len * old.filled
            WHERE id = old.blob;
    END;
    CREATE TRIGGER borrows_changed AFTER UPDATE OF len, filled ON borrows
        WHEN old.len <> new.len OR old.filled <> new.filled
    BEGIN
        UPDATE blobs SET borrowed_bytes = borrowed_bytes + new.len - old.len,
            duplicate_bytes = duplicate_bytes + new.len * new.filled - old.len * old.filled WHERE id = new.blob;
    END;

    CREATE TRIGGER blobs_added AFTER INSERT ON blobs BEGIN
        UPDATE totals SET
            unique_bytes = unique_bytes + (new.state = 'sealed') * (new.size - new.borrowed_bytes),
            duplicate_bytes = duplicate_bytes + new.duplicate_bytes,
            sealed_bytes = sealed_bytes + (new.state = 'sealed') * new.stored_bytes,
            remnant_bytes = remnant_bytes + (new.state <> 'sealed') * new.stored_bytes;
    END;
    CREATE TRIGGER blobs_gone AFTER DELETE ON blobs BEGIN
        UPDATE totals SET
            unique_bytes = unique_bytes - (old.state = 'sealed') * (old.size - old.borrowed_bytes),
            duplicate_bytes = duplicate_bytes - old.duplicate_bytes,
            sealed_bytes = sealed_bytes - (old.state = 'sealed') * old.stored_bytes,
            remnant_bytes = remnant_bytes - (old.state <> 'sealed') * old.stored_bytes;
    END;
    CREATE TRIGGER blobs_counted AFTER UPDATE OF state, stored_bytes, borrowed_bytes, duplicate_bytes ON blobs BEGIN
        UPDATE totals SET
            unique_bytes = unique_bytes + (new.state = 'sealed') * (new.size - new.borrowed_bytes)
                - (old.state = 'sealed') * (old.size - old.borrowed_bytes),
            duplicate_bytes = duplicate_bytes + new.duplicate_bytes - old.duplicate_bytes,
            sealed_bytes = sealed_bytes + (new.state = 'sealed') * new.stored_bytes
                - (old.state = 'sealed') * old.stored_bytes,
            remnant_bytes = remnant_bytes + (new.state <> 'sealed') * new.stored_bytes
                - (old.state <> 'sealed') * old.stored_bytes;
    END;
    CREATE TRIGGER blobs_changed AFTER UPDATE OF stored_bytes, borrowed_bytes ON blobs
        WHEN new.names > 0 AND (old.stored_bytes <> new.stored_bytes OR old.borrowed_bytes <> new.borrowed_bytes)
    BEGIN
        UPDATE footprints SET
            unique_bytes = unique_bytes + old.borrowed_bytes - new.borrowed_bytes,
            shared_bytes = shared_bytes + (new.names > 1) * (old.borrowed_bytes - new.borrowed_bytes),
            stored_bytes = stored_bytes + new.stored_bytes - old.stored_bytes,
            shared_stored_bytes = shared_stored_bytes + (new.names > 1) * (new.stored_bytes - old.stored_bytes)
            WHERE manifest IN (SELECT manifest FROM manifest_blobs WHERE blob = new.id);
    END;

    CREATE TRIGGER names_added AFTER INSERT ON manifest_blobs BEGIN
        UPDATE blobs SET names = names + 1 WHERE id = new.blob;
        INSERT INTO footprints
            SELECT new.manifest, 1, size, size - borrowed_bytes, (names > 1) * (size - borrowed_bytes), stored_bytes,
                   (names > 1) * stored_bytes FROM blobs WHERE id = new.blob
            ON CONFLICT (manifest) DO UPDATE SET
                blobs = blobs + 1,
                tree_bytes = tree_bytes + excluded.tree_bytes,
                unique_bytes = unique_bytes + excluded.unique_bytes,
                shared_bytes = shared_bytes + excluded.shared_bytes,
                stored_bytes = stored_bytes + excluded.stored_bytes,
                shared_stored_bytes = shared_stored_bytes + excluded.shared_stored_bytes;
        -- The one tree that had it for itself has not any more.
        UPDATE footprints SET
            shared_bytes = shared_bytes + (SELECT size - borrowed_bytes FROM blobs WHERE id = new.blob),
            shared_stored_bytes = shared_stored_bytes + (SELECT stored_bytes FROM blobs WHERE id = new.blob)
            WHERE manifest = (SELECT m.manifest FROM blobs b JOIN manifest_blobs m ON m.blob = b.id
                              WHERE b.id = new.blob AND b.names = 2 AND m.manifest <> new.manifest);
    END;
    CREATE TRIGGER names_gone AFTER DELETE ON manifest_blobs BEGIN
        UPDATE footprints SET (blobs, tree_bytes, unique_bytes, shared_bytes, stored_bytes, shared_stored_bytes) =
            (SELECT footprints.blobs - 1, footprints.tree_bytes - b.size,
                    footprints.unique_bytes - (b.size - b.borrowed_bytes),
                    footprints.shared_bytes - (b.names > 1) * (b.size - b.borrowed_bytes),
                    footprints.stored_bytes - b.stored_bytes,
                    footprints.shared_stored_bytes - (b.names > 1) * b.stored_bytes
             FROM blobs b WHERE b.id = old.blob)
            WHERE manifest = old.manifest;
        DELETE FROM footprints WHERE manifest = old.manifest AND blobs = 0;
        UPDATE blobs SET names = names - 1 WHERE id = old.blob;
        -- The one tree that is left has it for itself.
        UPDATE footprints SET
            shared_bytes = shared_bytes - (SELECT size - borrowed_bytes FROM blobs WHERE id = old.blob),
            shared_stored_bytes = shared_stored_bytes - (SELECT stored_bytes FROM blobs WHERE id = old.blob)
            WHERE manifest = (SELECT m.manifest FROM blobs b JOIN manifest_blobs m ON m.blob = b.id
                              WHERE b.id = old.blob AND b.names = 1);
    END;
    ",
    // 5: what counts against quotas.
    "
    -- Logical bytes that count against the owner's quota: what is kept here, or was admitted and is to come.
    ALTER TABLE checkpoints ADD COLUMN charged_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE checkpoints SET charged_bytes = logical_bytes
        WHERE datastore = '' AND (state = 'ready' OR (state IN ('filling', 'failed') AND flight <> ''));
    ",
    // 6: uploads that survive the daemon.
    "
    -- Flights that are sent and can be gone on with after a restart, with what was said of them: all bytes (0: not said), whether it is one file.
    CREATE TABLE uploads (
        flight       TEXT PRIMARY KEY,
        bytes_total  INTEGER NOT NULL,
        one_file     INTEGER NOT NULL
    ) WITHOUT ROWID;
    -- Their entries by position, each as it was sent.
    CREATE TABLE sent (
        flight    TEXT NOT NULL,
        position  INTEGER NOT NULL,
        entry     BLOB NOT NULL,
        PRIMARY KEY (flight, position)
    ) WITHOUT ROWID;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::checkpoints::{self, State};
    use crate::catalog::{accounting, blobs, events, fills, forecasts, jobs, placements, quotas, retention, uploads};
    use crate::digest::Digest;

    /// What ckptd wrote when the schema was at version 1, as `sqlite3 .dump` shows it. Never edited.
    const VERSION_1: &str = include_str!("../../tests/fixtures/catalog-1.sql");

    /// The schema of version 2 with rows as it wrote them: a datastore's checkpoint, and one that was being looked at there.
    const VERSION_2: &str = include_str!("../../tests/fixtures/catalog-2.sql");

    /// The same of version 3: besides, one that was read while it filled, with what was learned and expected.
    const VERSION_3: &str = include_str!("../../tests/fixtures/catalog-3.sql");

    /// What ckptd wrote at version 4: a file that borrows and was hydrated, a datastore's, a pin, rights with and without an end.
    const VERSION_4: &str = include_str!("../../tests/fixtures/catalog-4.sql");

    /// The same of version 5: charges, a file of the web that is half here, an upload that was under way.
    const VERSION_5: &str = include_str!("../../tests/fixtures/catalog-5.sql");

    /// The same of version 6: a pinned checkpoint that a job has a right to, and one that failed.
    const VERSION_6: &str = include_str!("../../tests/fixtures/catalog-6.sql");

    /// What an earlier ckptd wrote, as this one has it.
    fn migrated(written: &str) -> Connection {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(written).unwrap();
        migrate(&mut connection).unwrap();
        let version = connection.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(usize::try_from(version), Ok(MIGRATIONS.len()));
        connection
    }

    #[test]
    fn a_catalog_of_version_6_is_this_one() {
        let kept = migrated(VERSION_6);
        let records = checkpoints::list(&kept, &checkpoints::Seen::Everything, "", false).unwrap();
        let seen: Vec<_> = records.iter().map(|r| (r.name.as_str(), r.state, r.pinned)).collect();
        assert_eq!(seen, [("golden", State::Ready, true), ("broken", State::Failed, false)]);
        assert_eq!(jobs::holders(&kept, "golden-1").unwrap(), ["job-1"]);
        assert_eq!(accounting::footprint(&kept, &records[0]).unwrap().unique_bytes, 17);
        // Another schema is another version.
        let mut fresh = Connection::open_in_memory().unwrap();
        migrate(&mut fresh).unwrap();
        assert_eq!(schema_of(&fresh), schema_of(&kept));
    }

    fn schema_of(connection: &Connection) -> Vec<String> {
        let mut rows = connection.prepare("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY sql").unwrap();
        rows.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn a_catalog_of_version_1_is_read_and_carried_on() {
        let connection = migrated(VERSION_1);
        let records = checkpoints::list(&connection, &checkpoints::Seen::Everything, "", false).unwrap();
        let seen: Vec<_> = records.iter().map(|r| (r.name.as_str(), r.state, r.in_place.is_none())).collect();
        assert_eq!(seen, [("golden", State::Ready, true), ("broken", State::Failed, true)]);
        let manifest = records[0].manifest.unwrap();
        assert_eq!(checkpoints::manifest(&connection, &manifest).unwrap().digest(), manifest);
        let footprint = accounting::footprint(&connection, &records[0]).unwrap();
        assert_eq!((footprint.unique_bytes, footprint.shared_bytes, footprint.physical_bytes), (17, 0, 8192));
        assert_eq!(jobs::holders(&connection, &records[0].id).unwrap(), ["job-1"]);
        assert_eq!(events::after(&connection, 0, 9).unwrap().len(), 2);

        let tree = checkpoints::delete(&connection, &records[0].id).unwrap().unwrap();
        let lost = retention::unlink(&connection, &tree, 9, 99).unwrap().unwrap();
        assert_eq!(blobs::condemn(&connection, &lost).unwrap().doomed.len(), 3);
    }

    #[test]
    fn a_catalog_of_version_2_keeps_what_was_seen_in_place() {
        let connection = migrated(VERSION_2);
        let records = checkpoints::list(&connection, &checkpoints::Seen::Everything, "", false).unwrap();
        let (there, seen) = (&records[2], &records[3]);
        assert_eq!(
            (there.name.as_str(), there.state, there.in_place.as_ref().unwrap().datastore.as_str()),
            ("there", State::Ready, "models")
        );
        let placed = placements::of_checkpoint(&connection, &there.id).unwrap();
        let stamp = placed[b"x.bin".as_slice()];
        let flight = checkpoints::flight_of(&connection, &seen.id).unwrap();
        let sightings = placements::still_true(&connection, &flight, &[(b"x.bin".to_vec(), stamp)].into()).unwrap();
        assert_eq!(sightings.len(), 1);
    }

    #[test]
    fn a_catalog_of_version_3_shows_what_was_read_while_it_filled() {
        let connection = migrated(VERSION_3);
        let records = checkpoints::list(&connection, &checkpoints::Seen::Everything, "", false).unwrap();
        let slow = &records[3];
        assert_eq!((slow.name.as_str(), slow.state), ("slow", State::Filling));
        let flight = checkpoints::flight_of(&connection, &slow.id).unwrap();
        let shown = fills::listing(&connection, &flight).unwrap().unwrap();
        assert_eq!(shown.entries().iter().map(|entry| entry.path.as_bytes()).collect::<Vec<_>>(), [b"w.bin"]);
        let begun = fills::of_flight(&connection, &flight).unwrap();
        assert_eq!((begun[0].size, begun[0].units.as_slice()), (20 << 20, &[7][..]));
        let shape = Digest::from_bytes(std::array::from_fn(|at| u8::try_from(at).unwrap()));
        let learned = forecasts::order(&connection, "", &shape).unwrap();
        assert_eq!(learned, [(0, 4), (0, 0)]);
        assert_eq!(forecasts::rate(&connection, "", "web 127.0.0.1").unwrap(), Some(100_000_000));
        assert_eq!(forecasts::estimates(&connection, 9).unwrap()[0].expected_ms, 210);
    }

    #[test]
    fn a_catalog_of_version_4_keeps_its_rights_and_sums_and_gets_charges() {
        let connection = migrated(VERSION_4);
        let records = checkpoints::list(&connection, &checkpoints::Seen::Everything, "", false).unwrap();
        let seen: Vec<_> = records.iter().map(|r| (r.name.as_str(), r.state, r.in_place.is_none(), r.pinned)).collect();
        let expected = [
            ("model-1", State::Ready, true, true),
            ("model-2", State::Ready, true, false),
            ("bad", State::Failed, true, false),
            ("there", State::Ready, false, false),
            ("alice's", State::Ready, true, false),
        ];
        assert_eq!(seen, expected);
        let tuned = accounting::footprint(&connection, &records[1]).unwrap();
        assert_eq!((tuned.unique_bytes, tuned.physical_bytes), (727_668, 3_002_368));
        assert_eq!(accounting::totals(&connection).unwrap().duplicate_bytes, 2_273_332);
        assert_eq!(jobs::holders(&connection, &records[1].id).unwrap(), ["job-1", "job-2"]);
        assert_eq!(jobs::expiries(&connection).unwrap(), [("job-1".to_owned(), 4_070_908_800_000)]);
        let used = |owner| quotas::used(&connection, owner).unwrap();
        assert_eq!((used("alice"), used("")), (3_000_000, 6_001_000), "what is in place costs nothing");
        assert_eq!(events::after(&connection, 0, 9).unwrap().len(), 5);
    }

    #[test]
    fn a_catalog_of_version_5_goes_on_with_what_was_fetched_and_with_no_upload() {
        let connection = migrated(VERSION_5);
        let records = checkpoints::list(&connection, &checkpoints::Seen::Everything, "", false).unwrap();
        let seen: Vec<_> = records.iter().map(|r| (r.name.as_str(), r.state)).collect();
        let (ready, filling) = (State::Ready, State::Filling);
        assert_eq!(seen, [("golden", ready), ("sent", ready), ("slow", filling), ("half", filling)]);
        let used = |owner| quotas::used(&connection, owner).unwrap();
        assert_eq!((used("alice"), used("bob")), (3_000_003 + (20 << 20), 6 << 30));
        let flight = checkpoints::flight_of(&connection, &records[2].id).unwrap();
        let begun = fills::of_flight(&connection, &flight).unwrap();
        assert_eq!(
            begun.iter().map(|row| (row.size, row.units.as_slice())).collect::<Vec<_>>(),
            [(20 << 20, &[7][..])]
        );
        assert!(uploads::get(&connection, &records[3].id).unwrap().is_none());
    }

    #[test]
    fn a_new_catalog_has_the_tables_of_one_that_was_migrated() {
        let tables = |connection: &Connection| -> Vec<(String, String)> {
            let mut columns = connection
                .prepare(
                    "SELECT m.name, c.name FROM sqlite_schema m, pragma_table_info(m.name) c WHERE m.type = 'table'
                     ORDER BY 1, 2",
                )
                .unwrap();
            columns
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
                .unwrap()
                .collect::<rusqlite::Result<_>>()
                .unwrap()
        };
        let old = migrated(VERSION_1);
        let mut new = Connection::open_in_memory().unwrap();
        migrate(&mut new).unwrap();
        assert_eq!(tables(&old), tables(&new));
    }
}
