//! A store of two trees that share bytes: what is evicted, given up and swept of it, and what is left alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::catalog::blobs::{self, ChunkRow};
use crate::catalog::checkpoints::{Bytes, Origin, Record};
use crate::catalog::jobs::{self, JobRow, JobState, Lease};
use crate::digest::Digest;
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::names::EntryPath;
use crate::store::Sealing;
use crate::store::read::Reader;

const MIB: usize = 1 << 20;

/// Checkpoint `a` is a file of weights and a note; `b` is a header, the same weights at another offset, and a file of its own.
pub(in crate::store) struct Fixture {
    pub(in crate::store) store: Store,
    pub(in crate::store) weights: Vec<u8>,
    pub(in crate::store) tuned: Vec<u8>,
    pub(in crate::store) own: Vec<u8>,
    trees: BTreeMap<&'static str, Arc<Manifest>>,
    _directory: tempfile::TempDir,
}

impl Fixture {
    pub(in crate::store) async fn new() -> Self {
        // Not in memory: holes are what it is about.
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let state = directory.path().join("state");
        let store = tokio::task::spawn_blocking(move || Store::open(&state)).await.unwrap().unwrap();
        let weights: Vec<u8> = (0..2_u32 << 20).map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[1]).collect();
        let tuned = [b"a header of odd length", weights.as_slice()].concat();
        let own = weights.iter().map(|byte| byte ^ 0x5a).collect();
        let mut fixture = Self { store, weights, tuned, own, trees: BTreeMap::new(), _directory: directory };
        fixture.bring("a", &[("weights", fixture.weights.clone(), &[0]), ("note", b"of a alone".to_vec(), &[0])]).await;
        let header = fixture.tuned.len() - fixture.weights.len();
        fixture.bring("b", &[("tuned", fixture.tuned.clone(), &[header]), ("own", fixture.own.clone(), &[0])]).await;
        fixture
    }

    /// Makes a checkpoint of files, each with its name, bytes, and where its chunks begin.
    pub(in crate::store) async fn bring(&mut self, id: &'static str, files: &[(&str, Vec<u8>, &[usize])]) {
        let disk = self.store.disk();
        disk.begin_flight(id).unwrap();
        let mut entries = Vec::new();
        for (number, (name, bytes, cuts)) in (1..).zip(files) {
            disk.write_filling(id, number, bytes).unwrap();
            let (path, digest) = (EntryPath::new(name.as_bytes()).unwrap(), Digest::of(bytes));
            let size = bytes.len() as u64;
            let chunk = |(at, start): (usize, &usize)| {
                let end = cuts.get(at + 1).copied().unwrap_or(bytes.len());
                ChunkRow { digest: Digest::of(&bytes[*start..end]), start: *start as u64, len: (end - start) as u64 }
            };
            let (flight, chunks) = (id.to_owned(), cuts.iter().enumerate().map(chunk).collect());
            let sent = Vec::new();
            let sealing = Sealing { flight, number, path: path.clone(), size, digest, chunks, synced: false, sent };
            self.store.publish(sealing).await.unwrap();
            entries.push(Entry { path, kind: EntryKind::File { size, executable: false, digest } });
        }
        let manifest = Arc::new(Manifest::new(entries).unwrap());
        let tree = manifest.clone();
        let ready = move |tx: &rusqlite::Connection| {
            checkpoints::insert(tx, &record(id))?;
            checkpoints::set_ready(tx, id, "r", &tree, &tree.digest(), &Bytes::Stored)
        };
        self.store.catalog().write(ready).await.unwrap();
        self.store.remove_flight(id).await.unwrap();
        self.trees.insert(id, manifest);
    }

    pub(in crate::store) async fn reader(&self, id: &str) -> Arc<Reader> {
        let tree = self.trees[id].clone();
        self.store.reader(tree.digest(), tree).await.unwrap()
    }

    pub(in crate::store) fn tree(&self, id: &str) -> &Arc<Manifest> {
        &self.trees[id]
    }

    pub(in crate::store) fn stored(&self, bytes: &[u8]) -> u64 {
        self.store.disk().stored_bytes(&Digest::of(bytes)).unwrap_or(0)
    }

    pub(in crate::store) async fn row(&self, bytes: &[u8]) -> BlobRow {
        let digest = Digest::of(bytes);
        self.store.catalog().read(move |tx| blobs::sealed(tx, &digest)).await.unwrap().unwrap()
    }

    async fn state(&self, id: &'static str) -> State {
        self.store.catalog().read(move |tx| checkpoints::get(tx, id)).await.unwrap().unwrap().state
    }

    pub(in crate::store) async fn change(&self, statement: &'static str) {
        let changed = self.store.catalog().write(move |tx| Ok(tx.execute(statement, []).unwrap())).await.unwrap();
        assert!(changed > 0, "{statement}");
    }
}

fn record(id: &str) -> Record {
    let origin = Origin { kind: "web".into(), uri: "https://h/x".into(), options: BTreeMap::new() };
    Record { public: true, state: State::Filling, ..Record::new(id, id, origin, 1) }
}

/// A job `j` that has a right to a checkpoint.
fn job_of(id: &str) -> JobRow {
    JobRow {
        job: "j".into(),
        owner: String::new(),
        state: JobState::Reserved,
        target: String::new(),
        pid: 0,
        mounted: None,
        created_ms: 1,
        expires_ms: None,
        leases: vec![Lease { checkpoint: id.into(), subdir: String::new() }],
    }
}

pub(in crate::store) fn read(reader: &Reader, bytes: &[u8]) -> Vec<u8> {
    let open = reader.open(&Digest::of(bytes), bytes.len() as u64).unwrap();
    let mut found = vec![0; bytes.len()];
    assert_eq!(open.read_at(&mut found, 0).unwrap(), bytes.len());
    found
}

#[tokio::test]
async fn an_evicted_checkpoint_gives_back_what_only_it_has_and_keeps_its_record() {
    let fixture = Fixture::new().await;
    let swept = fixture.store.evict_checkpoint("b").await.unwrap().unwrap();
    assert_eq!((swept.blobs, swept.open_bytes), (2, 0));
    assert!(swept.freed_bytes >= 2 * MIB as u64, "{swept:?}");
    assert_eq!(fixture.state("b").await, State::Evicted);
    assert_eq!((fixture.stored(&fixture.own), fixture.stored(&fixture.tuned)), (0, 0));
    assert!(read(&*fixture.reader("a").await, &fixture.weights) == fixture.weights);
    assert_eq!(fixture.store.evict_checkpoint("b").await.unwrap(), None, "once");
    assert_eq!(fixture.store.evict_checkpoint("nobody").await.unwrap(), None);
}

#[tokio::test]
async fn what_others_borrow_from_outlives_its_checkpoint() {
    let fixture = Fixture::new().await;
    let (before, reader) = (fixture.stored(&fixture.weights), fixture.reader("b").await);
    fixture.store.evict_checkpoint("a").await.unwrap().unwrap();
    assert_eq!(fixture.stored(&fixture.weights), before, "all of it is borrowed");
    assert!(read(&reader, &fixture.tuned) == fixture.tuned);
    drop(reader);
    let mut removal = fixture.store.remove_checkpoint("b").await.unwrap();
    assert_eq!(removal.end().await.unwrap().blobs, 3, "and goes with who borrowed it");
    assert_eq!(fixture.stored(&fixture.weights), 0);
    let left = fixture.store.catalog().read(|tx| {
        let counted =
            "SELECT (SELECT COUNT(*) FROM blobs) + (SELECT COUNT(*) FROM chunks) + (SELECT COUNT(*) FROM borrows)";
        Ok(tx.query_row(counted, [], |row| row.get::<_, i64>(0)).unwrap())
    });
    assert_eq!(left.await.unwrap(), 0);
}

#[tokio::test]
async fn a_home_goes_with_the_last_who_borrowed_though_that_one_stays_for_others() {
    let mut fixture = Fixture::new().await;
    // `c` borrows the weights from `a` and is home to its second half; `d` borrows that half from it.
    let half: Vec<u8> = fixture.weights.iter().map(|byte| byte ^ 0x33).collect();
    let both = [fixture.weights.as_slice(), half.as_slice()].concat();
    let tuned = [b"another header".as_slice(), half.as_slice()].concat();
    fixture.bring("c", &[("both", both.clone(), &[0, fixture.weights.len()])]).await;
    fixture.bring("d", &[("tuned", tuned.clone(), &[tuned.len() - half.len()])]).await;
    for id in ["b", "a"] {
        fixture.store.remove_checkpoint(id).await.unwrap().end().await.unwrap();
    }
    assert!(fixture.stored(&fixture.weights) > 0 && read(&*fixture.reader("c").await, &both) == both);
    let swept = fixture.store.remove_checkpoint("c").await.unwrap().end().await.unwrap();
    assert_eq!((swept.blobs, fixture.stored(&fixture.weights)), (1, 0), "nobody borrows from it any more");
    assert!(fixture.stored(&both) > 0, "`d` borrows from it");
    assert!(read(&*fixture.reader("d").await, &tuned) == tuned);
    assert_eq!(fixture.store.sweep_unnamed().await.unwrap(), Swept::default(), "and a start finds nothing more");
}

#[tokio::test]
async fn a_pin_a_right_and_an_open_file_each_forbid_evicting() {
    let fixture = Fixture::new().await;
    let refused = async || fixture.store.evict_checkpoint("b").await.unwrap().is_none();
    fixture.store.catalog().write(|tx| retention::set_pinned(tx, "b", true)).await.unwrap();
    assert!(refused().await, "pinned");
    fixture.store.catalog().write(|tx| retention::set_pinned(tx, "b", false)).await.unwrap();
    fixture.store.catalog().write(|tx| jobs::put(tx, &job_of("b"))).await.unwrap();
    assert!(refused().await, "leased");
    fixture.store.catalog().write(|tx| jobs::delete(tx, "j", 1)).await.unwrap();
    let reader = fixture.reader("b").await;
    assert!(refused().await, "read");
    assert_eq!(fixture.state("b").await, State::Ready);
    drop(reader);
    assert!(!refused().await);
}

#[tokio::test]
async fn what_failed_to_fill_again_is_kept_for_its_jobs_and_its_pin_and_swept_after_them() {
    let fixture = Fixture::new().await;
    let catalog = fixture.store.catalog();
    catalog.write(|tx| jobs::put(tx, &job_of("b"))).await.unwrap();
    catalog.write(|tx| checkpoints::set_state(tx, "b", State::Failed, None)).await.unwrap();
    let swept = async || fixture.store.sweep_unnamed().await.unwrap();
    assert_eq!(swept().await, Swept::default(), "a job reads it");
    // Another record of the same tree that goes takes nothing with it.
    let tree = fixture.trees["b"].clone();
    let twin = move |tx: &rusqlite::Connection| {
        checkpoints::insert(tx, &record("twin"))?;
        checkpoints::set_ready(tx, "twin", "r", &tree, &tree.digest(), &Bytes::Stored)
    };
    catalog.write(twin).await.unwrap();
    assert_eq!(fixture.store.remove_checkpoint("twin").await.unwrap().end().await.unwrap(), Swept::default());
    catalog.write(|tx| jobs::delete(tx, "j", 1)).await.unwrap();
    catalog.write(|tx| retention::set_pinned(tx, "b", true)).await.unwrap();
    assert_eq!(swept().await, Swept::default(), "it is pinned");
    assert!(fixture.stored(&fixture.own) > 0 && fixture.stored(&fixture.tuned) > 0);
    catalog.write(|tx| retention::set_pinned(tx, "b", false)).await.unwrap();
    assert_eq!(swept().await.blobs, 2);
    assert_eq!((fixture.stored(&fixture.own), fixture.state("b").await), (0, State::Failed));
}

#[tokio::test]
async fn duplicates_are_given_up_and_read_from_their_home_unless_somebody_reads_them() {
    let fixture = Fixture::new().await;
    let reader = fixture.reader("b").await;
    let tree = fixture.trees["b"].digest();
    assert_eq!(fixture.store.hydrate(tree, &reader, || 0).await.unwrap().blobs, 1);
    let (row, whole) = (fixture.row(&fixture.tuned).await, fixture.stored(&fixture.tuned));
    assert!(whole >= 2 * MIB as u64);
    assert_eq!(fixture.store.give_up_duplicates(row).await.unwrap(), 0);
    assert_eq!(fixture.stored(&fixture.tuned), whole, "somebody reads it");
    assert!(fixture.reader("b").await.is_whole(&row.digest), "and it counts as whole");
    drop(reader);
    let given = fixture.store.give_up_duplicates(row).await.unwrap();
    assert!(given > MIB as u64 && fixture.stored(&fixture.tuned) == whole - given, "{given} of {whole}");
    let reader = fixture.reader("b").await;
    assert!(!reader.is_whole(&row.digest));
    assert!(read(&reader, &fixture.tuned) == fixture.tuned);
    assert_eq!(fixture.store.give_up_duplicates(row).await.unwrap(), 0, "once");
}

#[tokio::test]
async fn nothing_is_punched_where_the_kernel_may_read_it_unknown_to_us() {
    let mut fixture = Fixture::new().await;
    let reader = fixture.reader("b").await;
    fixture.store.hydrate(fixture.trees["b"].digest(), &reader, || 0).await.unwrap();
    drop(reader);
    // `d` borrows the second half of what `c` has: a remnant when `c` goes, with more than is borrowed.
    let halves: Vec<u8> = fixture.own.iter().map(|byte| byte ^ 0x33).collect();
    let part = [b"xyz".as_slice(), &halves[MIB..]].concat();
    fixture.bring("c", &[("halves", halves.clone(), &[0, MIB])]).await;
    fixture.bring("d", &[("part", part.clone(), &[3])]).await;
    let row = fixture.row(&fixture.tuned).await;
    let before = [&halves, &fixture.tuned].map(|bytes| fixture.stored(bytes));
    fixture.store.punch_nothing();
    assert_eq!(fixture.store.give_up_duplicates(row).await.unwrap(), 0);
    assert!(fixture.store.is_spared(&row.digest) && fixture.reader("b").await.is_whole(&row.digest));
    fixture.store.remove_checkpoint("c").await.unwrap().end().await.unwrap();
    fixture.store.sweep_unnamed().await.unwrap();
    assert_eq!([&halves, &fixture.tuned].map(|bytes| fixture.stored(bytes)), before);
    assert!(read(&*fixture.reader("d").await, &part) == part);
}

#[tokio::test]
async fn a_blob_that_is_open_goes_and_its_bytes_are_told_apart() {
    let fixture = Fixture::new().await;
    let reader = fixture.reader("b").await;
    let swept = fixture.store.remove_checkpoint("b").await.unwrap().end().await.unwrap();
    assert_eq!((swept.blobs, swept.freed_bytes), (2, 0));
    assert!(swept.open_bytes >= 2 * MIB as u64, "{swept:?}");
    drop(reader);
}

#[tokio::test]
async fn what_a_crash_may_leave_is_swept() {
    let mut fixture = Fixture::new().await;
    // A record that is gone with its links left; a doomed row; a flight of nobody; a blob of nobody.
    fixture.change("DELETE FROM checkpoints WHERE id = 'b'").await;
    fixture.bring("c", &[("doomed", vec![1; MIB], &[0]), ("unnamed", vec![2; MIB], &[0])]).await;
    let (doomed, unnamed) = (fixture.row(&vec![1; MIB]).await, fixture.row(&vec![2; MIB]).await);
    fixture.change("DELETE FROM checkpoints WHERE id = 'c'").await;
    fixture.change("DELETE FROM manifest_blobs WHERE blob IN (SELECT id FROM blobs ORDER BY id DESC LIMIT 2)").await;
    let dooms = move |tx: &rusqlite::Connection| blobs::condemn(tx, &[doomed.id]);
    assert_eq!(fixture.store.catalog().write(dooms).await.unwrap().doomed.len(), 1);
    assert!(fixture.store.disk().blob_path(&doomed.digest).exists());
    fixture.store.disk().begin_flight("f").unwrap();
    fixture.store.disk().write_filling("f", 1, &[3; MIB]).unwrap();
    let (flight, path) = ("f".to_owned(), EntryPath::new("flown".as_bytes()).unwrap());
    let (size, digest) = (MIB as u64, Digest::of(&[3; MIB]));
    let (chunks, sent) = (Vec::new(), Vec::new());
    let sealing = Sealing { flight, number: 1, path, size, digest, chunks, synced: false, sent };
    fixture.store.publish(sealing).await.unwrap();

    let swept = fixture.store.sweep_unnamed().await.unwrap();
    assert_eq!(swept.blobs, 5, "{swept:?}");
    for digest in [doomed.digest, unnamed.digest, digest] {
        assert!(!fixture.store.disk().blob_path(&digest).exists());
    }
    assert!(fixture.store.disk().flights().unwrap().is_empty());
    assert!(read(&*fixture.reader("a").await, &fixture.weights) == fixture.weights);
    assert_eq!(fixture.store.sweep_unnamed().await.unwrap(), Swept::default(), "once");
}

#[tokio::test]
async fn a_flight_that_begins_again_while_its_files_go_keeps_its_own() {
    const FILES: u32 = 20_000;
    let fixture = Fixture::new().await;
    let disk = fixture.store.disk().clone();
    disk.begin_flight("f").unwrap();
    (0..FILES).for_each(|number| disk.write_filling("f", number.into(), &[]).unwrap());
    let store = fixture.store.clone();
    let removal = tokio::spawn(async move { store.remove_flight("f").await });
    // It was found unneeded: its directory is gone, or going.
    let left = || std::fs::read_dir(disk.root().join("filling/f")).map_or(0, Iterator::count) as u64;
    while left() == u64::from(FILES) {
        tokio::task::yield_now().await;
    }
    let begin = |tx: &rusqlite::Connection| {
        checkpoints::insert(tx, &record("c"))?;
        checkpoints::set_listing(tx, "c", "r", "f", 1, 1)
    };
    fixture.store.catalog().write(begin).await.unwrap();
    disk.begin_flight("f").unwrap();
    disk.write_filling("f", FILES.into(), b"of the new one").unwrap();
    removal.await.unwrap().unwrap();
    assert_eq!(std::fs::read(disk.filling_path("f", FILES.into())).unwrap(), b"of the new one");
    assert_eq!(disk.flights().unwrap(), ["f"], "nothing is left beside it");
}

#[tokio::test]
async fn a_file_that_comes_again_while_its_tree_goes_is_kept() {
    let mut fixture = Fixture::new().await;
    let mut removal = fixture.store.remove_checkpoint("b").await.unwrap();
    let again = fixture.own.clone();
    fixture.bring("c", &[("own", again, &[0])]).await;
    removal.end().await.unwrap();
    assert!(read(&*fixture.reader("c").await, &fixture.own) == fixture.own);
    assert_eq!(fixture.store.sweep_unnamed().await.unwrap(), Swept::default());
    assert!(read(&*fixture.reader("c").await, &fixture.own) == fixture.own);
}
