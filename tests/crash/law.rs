//! What holds of a state directory whenever the power fails: the order of writes, read off the catalog and the files.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::sync::Arc;

use rusqlite::{Connection, Row};

use crate::disk::{Content, Image};
use crate::support::place::Place;
use crate::support::rot::ROT;

const UNIT_BYTES: usize = 4 << 20;
/// Files that the catalog consists of.
const CATALOG: [&str; 3] = ["catalog.db", "catalog.db-wal", "catalog.db-journal"];

pub(crate) type Sum = [u8; 32];

/// What was promised of a checkpoint to whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    /// It was asked for, for the first time or after it was evicted.
    Arriving,
    Ready,
    /// Bytes of it rotted, and it is filled again: the rest of it is there.
    Damaged,
    /// Its removal was asked for.
    Leaving,
    Gone,
}

/// Promises by name.
pub(crate) type Promises = BTreeMap<String, Promise>;

/// Takes a remark of the story into account.
pub(crate) fn note(promises: &mut Promises, remark: &str) {
    let (what, name) = remark.split_once(' ').unwrap();
    let promise = match what {
        "begin" | "evict" => Promise::Arriving,
        "ready" => Promise::Ready,
        "lose" => Promise::Damaged,
        "remove" => Promise::Leaving,
        "gone" => Promise::Gone,
        "punch" | "retry" => return,
        _ => panic!("nobody says `{remark}`"),
    };
    promises.insert(name.to_owned(), promise);
}

/// What the bytes are in truth.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// The digests of a checkpoint's files, by its name.
    pub(crate) trees: BTreeMap<String, BTreeSet<Sum>>,
    /// Files that fill from a site, by their path in the checkpoint.
    pub(crate) filling: BTreeMap<String, Arc<Vec<u8>>>,
    /// What the disk does behind everybody's back.
    pub(crate) rots: Vec<Rot>,
}

/// A byte of a blob that rotted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rot {
    pub(crate) blob: Sum,
    pub(crate) at: usize,
    pub(crate) right: u8,
    /// When, in milliseconds since the epoch: a row that says that the blob was right later says that this was put right.
    pub(crate) since_ms: i64,
}

impl Rot {
    /// Whether it is in these bytes of the blob.
    pub(crate) fn is_in(&self, content: &Content) -> bool {
        content.bytes.get(self.at) == Some(&(self.right ^ ROT))
    }
}

struct Blob {
    id: i64,
    digest: Sum,
    size: usize,
    state: String,
    stored: usize,
    verified_ms: i64,
}

/// A record: see the table.
struct Checkpoint {
    name: String,
    state: String,
    manifest: Option<Sum>,
    failure: Option<String>,
}

/// Rows as (blob, start, len, digest).
type Chunk = (i64, usize, usize, Sum);

struct Borrow {
    blob: i64,
    start: usize,
    len: usize,
    home: i64,
    home_start: usize,
    filled: bool,
}

struct Fill {
    flight: String,
    path: String,
    number: u64,
    size: usize,
    units: Vec<u8>,
    blob: Option<i64>,
}

#[derive(Default)]
struct Rows {
    checkpoints: Vec<Checkpoint>,
    /// Names of those that fill and are shown to a job, and whether what it was shown is known.
    shown: Vec<(String, bool)>,
    listings: Vec<String>,
    named: Vec<(Sum, i64)>,
    blobs: Vec<Blob>,
    chunks: Vec<Chunk>,
    borrows: Vec<Borrow>,
    fills: Vec<Fill>,
    publishing: HashSet<Sum>,
}

/// Holds images against the law. It remembers what it has seen, since most of an image was in the one before.
pub(crate) struct Law {
    truth: Arc<Truth>,
    place: Place,
    rows: Option<(Vec<Option<u64>>, Rows)>,
    /// Digests of ranges, by number of the content.
    sums: HashMap<(u64, usize, usize), Sum>,
    /// Contents with what rotted of them put right, by number and how many bytes that were.
    righted: HashMap<(u64, usize), Content>,
    /// Units that a row claimed and that were there.
    pub(crate) units_seen: u64,
    /// Ranges that were borrowed and not here.
    pub(crate) borrows_seen: u64,
    /// Checkpoints that filled under a job's eyes.
    pub(crate) shown_seen: u64,
    /// Blobs whose bytes were lost, and away.
    pub(crate) lost_seen: u64,
}

type Fault = Result<(), String>;

impl Law {
    pub(crate) fn new(truth: Arc<Truth>) -> Self {
        Self {
            truth,
            place: Place::new(),
            rows: None,
            sums: HashMap::new(),
            righted: HashMap::new(),
            units_seen: 0,
            borrows_seen: 0,
            shown_seen: 0,
            lost_seen: 0,
        }
    }

    /// What of the law is broken, if anything.
    pub(crate) fn check(&mut self, image: &Image, promises: &Promises) -> Fault {
        let numbers: Vec<_> = CATALOG.iter().map(|name| image.files.get(*name).map(|file| file.number)).collect();
        let rows = match self.rows.take() {
            Some((of, rows)) if of == numbers => rows,
            _ => self.read(image)?,
        };
        self.shown_seen += rows.shown.len() as u64;
        let fault = promised(&self.truth, &rows, promises)
            .and_then(|()| self.units(image, &rows))
            .and_then(|()| self.chunks(image, &rows))
            .and_then(|()| self.blobs(image, &rows))
            .and_then(|()| strays(image, &rows));
        self.rows = Some((numbers, rows));
        fault
    }

    /// The same of a directory whose daemon has come to rest: nothing is half done.
    pub(crate) fn check_settled(&mut self, image: &Image, promises: &Promises) -> Fault {
        self.check(image, promises)?;
        let rows = &self.rows.as_ref().unwrap().1;
        ensure(rows.publishing.is_empty(), || "something is still being published".into())?;
        ensure(rows.fills.is_empty(), || "something is still filling".into())?;
        ensure(rows.listings.is_empty(), || format!("the listing of {} is left", rows.listings[0]))?;
        for blob in &rows.blobs {
            ensure(blob.state != "doomed", || format!("{} is still doomed", hex(&blob.digest)))?;
            let needed =
                rows.named.iter().any(|(_, id)| *id == blob.id) || rows.borrows.iter().any(|row| row.home == blob.id);
            ensure(needed, || format!("{} is kept and nobody needs it", hex(&blob.digest)))?;
        }
        match image.files.keys().find(|path| path.starts_with("filling/")) {
            Some(left) => Err(format!("{left} is left")),
            None => Ok(()),
        }
    }

    /// The catalog as SQLite finds it after the crash.
    fn read(&self, image: &Image) -> Result<Rows, String> {
        for name in CATALOG {
            let path = self.place.join(name);
            let _ = fs::remove_file(&path);
            if let Some(content) = image.files.get(name) {
                fs::write(&path, content.bytes.as_slice()).unwrap();
            }
        }
        let _ = fs::remove_file(self.place.join("catalog.db-shm"));
        read_rows(&Connection::open(self.place.join(CATALOG[0])).unwrap())
            .map_err(|error| format!("the catalog cannot be read: {error}"))
    }

    /// The bytes of a blob, but for what rotted of them and was not found right since: that is as if it were right, and may be away.
    fn content(&mut self, image: &Image, blob: &Blob) -> Option<Content> {
        let file = image.files.get(&blob_path(&blob.digest));
        let rots: Vec<Rot> = self.truth.rots_of(&blob.digest).filter(|rot| blob.verified_ms <= rot.since_ms).collect();
        if rots.is_empty() {
            return file.cloned();
        }
        let file = file.or_else(|| image.files.get(&format!("quarantine/{}", hex(&blob.digest))))?;
        let there: Vec<Rot> = rots.into_iter().filter(|rot| rot.is_in(file)).collect();
        let right = || there.iter().fold(file.clone(), |content, rot| content.with_byte(rot.at, rot.right));
        Some(self.righted.entry((file.number, there.len())).or_insert_with(right).clone())
    }

    fn sum(&mut self, file: &Content, start: usize, len: usize) -> Option<Sum> {
        let bytes = file.bytes.get(start..start + len)?;
        Some(*self.sums.entry((file.number, start, len)).or_insert_with(|| blake3::hash(bytes).into()))
    }

    /// 1: a unit's bytes are durable before the row that says so. Nothing is believed of a file that is not there in its size.
    fn units(&mut self, image: &Image, rows: &Rows) -> Fault {
        for fill in rows.fills.iter().filter(|fill| fill.blob.is_none()) {
            let path = format!("filling/{}/{}", fill.flight, fill.number);
            let (Some(file), Some(truth)) = (image.files.get(&path), self.truth.filling.get(&fill.path)) else {
                continue;
            };
            if file.bytes.len() != fill.size {
                continue;
            }
            for unit in 0..fill.size.div_ceil(UNIT_BYTES) {
                let range = unit * UNIT_BYTES..((unit + 1) * UNIT_BYTES).min(fill.size);
                if fill.units.get(unit / 8).is_some_and(|byte| byte & (1 << (unit % 8)) != 0) {
                    self.units_seen += 1;
                    ensure(file.bytes[range.clone()] == truth[range], || {
                        format!("unit {unit} of `{}` is claimed to be here, and other bytes are", fill.path)
                    })?;
                }
            }
        }
        Ok(())
    }

    /// 3: what a chunk's row names is in its blob.
    fn chunks(&mut self, image: &Image, rows: &Rows) -> Fault {
        let contents: HashMap<_, _> = rows.blobs.iter().map(|blob| (blob.id, self.content(image, blob))).collect();
        for (blob, start, len, digest) in &rows.chunks {
            let content = contents.get(blob).ok_or_else(|| format!("a chunk's home, {blob}, has no row"))?;
            let found = content.as_ref().and_then(|content| self.sum(content, *start, *len));
            ensure(found == Some(*digest), || format!("the chunk at {start} of blob {blob} is not there"))?;
        }
        Ok(())
    }

    /// 2 and 3: a sealed blob is there, and with what it borrows it has the bytes that it is named after. What is lost has no wrong bytes by its name.
    fn blobs(&mut self, image: &Image, rows: &Rows) -> Fault {
        let by_id: HashMap<_, _> = rows.blobs.iter().map(|blob| (blob.id, blob)).collect();
        for blob in rows.blobs.iter().filter(|blob| blob.state != "doomed") {
            let path = blob_path(&blob.digest);
            if self.truth.is_lost(blob) {
                self.lost_seen += 1;
                let found = image.files.get(&path).map(|file| self.sum(file, 0, blob.size));
                let is_right = found.is_none_or(|found| found == Some(blob.digest));
                ensure(is_right, || format!("{path} is lost, and wrong bytes bear its name"))?;
                continue;
            }
            let file = self.content(image, blob).ok_or_else(|| format!("the {} blob {path} is missing", blob.state))?;
            ensure(file.bytes.len() == blob.size, || format!("{path} has {} bytes", file.bytes.len()))?;
            if blob.state != "sealed" {
                continue;
            }
            let missing: Vec<_> = rows.borrows.iter().filter(|row| row.blob == blob.id && !row.filled).collect();
            if missing.is_empty() {
                let found = self.sum(&file, 0, blob.size);
                ensure(found == Some(blob.digest), || format!("{path} has other bytes than it is named after"))?;
                continue;
            }
            let mut bytes = file.bytes.as_ref().clone();
            for borrow in missing {
                self.borrows_seen += 1;
                let home = by_id.get(&borrow.home).filter(|home| home.state != "doomed");
                let home = home.and_then(|home| self.content(image, home));
                let range = borrow.home_start..borrow.home_start + borrow.len;
                let lent = home.as_ref().and_then(|home| home.bytes.get(range));
                let lent = lent.ok_or_else(|| format!("{path} borrows from a blob that is not there"))?;
                bytes[borrow.start..borrow.start + borrow.len].copy_from_slice(lent);
            }
            let found: Sum = blake3::hash(&bytes).into();
            ensure(found == blob.digest, || {
                format!("{path} has, with what it borrows, other bytes than it is named after")
            })?;
        }
        Ok(())
    }
}

impl Truth {
    /// What rots of a blob.
    fn rots_of(&self, digest: &Sum) -> impl Iterator<Item = Rot> {
        self.rots.iter().copied().filter(move |rot| rot.blob == *digest)
    }

    /// Whether a row says that the bytes of a blob are lost.
    fn is_lost(&self, blob: &Blob) -> bool {
        blob.state == "remnant" && blob.stored == 0 && self.rots_of(&blob.digest).next().is_some()
    }
}

/// 2: who was told that a checkpoint is ready finds it so; what is ready has all its files. 4: what is gone stays gone.
fn promised(truth: &Truth, rows: &Rows, promises: &Promises) -> Fault {
    for (name, promise) in promises {
        let row = rows.checkpoints.iter().find(|row| row.name == *name);
        let state = row.map_or("not there", |row| row.state.as_str());
        let is_whole = row.is_some_and(|row| row.failure.is_none());
        let is_kept = match promise {
            Promise::Ready => state == "ready" && is_whole,
            Promise::Damaged => state == "ready" || (state == "filling" && !is_whole),
            Promise::Gone => row.is_none(),
            Promise::Arriving | Promise::Leaving => true,
        };
        ensure(is_kept, || format!("`{name}` is {promise:?}, as was said, and it is {state}, whole: {is_whole}"))?;
    }
    let sealed: HashMap<_, _> =
        rows.blobs.iter().filter(|blob| blob.state == "sealed").map(|blob| (blob.id, blob.digest)).collect();
    for Checkpoint { name, state, manifest, failure } in &rows.checkpoints {
        let wanted = truth.trees.get(name);
        let named = rows.named.iter().filter(|(of, _)| Some(*of) == *manifest);
        let found: BTreeSet<Option<Sum>> = named.map(|(_, blob)| sealed.get(blob).copied()).collect();
        let is_there = match (state.as_str(), failure) {
            ("ready", None) => wanted.is_some_and(|wanted| wanted.iter().copied().map(Some).eq(found)),
            // Of what is damaged all is there that did not rot, while it is filled again too.
            ("ready" | "filling", Some(_)) => wanted.is_some_and(|wanted| {
                wanted.iter().all(|file| found.contains(&Some(*file)) || truth.rots_of(file).next().is_some())
            }),
            _ => true,
        };
        ensure(is_there, || format!("`{name}` is {state} and not all its files are sealed"))?;
    }
    for (name, known) in &rows.shown {
        ensure(*known, || format!("a job sees `{name}` while it fills, and what it was shown is not known"))?;
    }
    for fill in &rows.fills {
        let lost = fill.blob.is_some_and(|blob| !sealed.contains_key(&blob));
        ensure(!lost, || format!("`{}` is sealed by its flight's row and by no blob's", fill.path))?;
    }
    Ok(())
}

/// 4: what has a name among the blobs has a row, or is known to be on its way.
fn strays(image: &Image, rows: &Rows) -> Fault {
    let known: HashSet<_> = rows.blobs.iter().map(|blob| &blob.digest).chain(&rows.publishing).map(blob_path).collect();
    match image.files.keys().find(|path| path.starts_with("blobs/") && !known.contains(*path)) {
        Some(stray) => Err(format!("nobody knows {stray}")),
        None => Ok(()),
    }
}

fn read_rows(catalog: &Connection) -> rusqlite::Result<Rows> {
    // Nothing is promised before the catalog has its tables, these included.
    if catalog.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))? < 4 {
        return Ok(Rows::default());
    }
    let text = |row: &Row<'_>, at| row.get::<_, String>(at);
    let number = |row: &Row<'_>, at| row.get::<_, i64>(at).map(|value| usize::try_from(value).unwrap());
    Ok(Rows {
        checkpoints: all(catalog, "SELECT name, state, manifest, failure FROM checkpoints", |row| {
            Ok(Checkpoint { name: text(row, 0)?, state: text(row, 1)?, manifest: row.get(2)?, failure: row.get(3)? })
        })?,
        named: all(catalog, "SELECT manifest, blob FROM manifest_blobs", |row| Ok((row.get(0)?, row.get(1)?)))?,
        blobs: all(catalog, "SELECT id, digest, size, state, stored_bytes, verified_ms FROM blobs", |row| {
            let (id, digest, size, state) = (row.get(0)?, row.get(1)?, number(row, 2)?, text(row, 3)?);
            Ok(Blob { id, digest, size, state, stored: number(row, 4)?, verified_ms: row.get(5)? })
        })?,
        chunks: all(catalog, "SELECT blob, start, len, digest FROM chunks", |row| {
            Ok((row.get(0)?, number(row, 1)?, number(row, 2)?, row.get(3)?))
        })?,
        borrows: all(catalog, "SELECT blob, start, len, home, home_start, filled FROM borrows", |row| {
            let (blob, start, len) = (row.get(0)?, number(row, 1)?, number(row, 2)?);
            Ok(Borrow { blob, start, len, home: row.get(3)?, home_start: number(row, 4)?, filled: row.get(5)? })
        })?,
        fills: all(catalog, "SELECT flight, path, number, size, units, blob FROM fills", |row| {
            Ok(Fill {
                flight: text(row, 0)?,
                path: String::from_utf8(row.get(1)?).unwrap(),
                number: row.get::<_, i64>(2)?.unsigned_abs(),
                size: number(row, 3)?,
                units: row.get::<_, Option<Vec<u8>>>(4)?.unwrap_or_default(),
                blob: row.get(5)?,
            })
        })?,
        shown: all(
            catalog,
            "SELECT name, flight IN (SELECT flight FROM listings) FROM checkpoints WHERE state = 'filling' AND id IN \
             (SELECT checkpoint FROM leases JOIN jobs USING (job) WHERE jobs.state = 'attached')",
            |row| Ok((text(row, 0)?, row.get(1)?)),
        )?,
        listings: all(catalog, "SELECT flight FROM listings", |row| text(row, 0))?,
        publishing: all(catalog, "SELECT digest FROM publishing", |row| row.get(0))?.into_iter().collect(),
    })
}

fn all<T>(
    catalog: &Connection,
    query: &str,
    read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    catalog.prepare(query)?.query_map([], |row| read(row))?.collect()
}

fn ensure(holds: bool, fault: impl FnOnce() -> String) -> Fault {
    if holds { Ok(()) } else { Err(fault()) }
}

fn hex(digest: &Sum) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where a blob is in an image.
pub(crate) fn blob_path(digest: &Sum) -> String {
    let hex = hex(digest);
    format!("blobs/{}/{hex}", &hex[..2])
}
