//! Filling from a stream of entries: uploads and archives.
//!
//! Bytes come in the sender's order, so files are taken one after the other ([`taker`](super::taker)). Sealing overlaps with what comes next
//! ([`Publishing`]). Hard links are resolved when all files are sealed. A stream that breaks leaves the record `failed`; nothing of it becomes visible.
//!
//! **What a later run goes on from.** Of a stream whose entries are to be recorded ([`EntryStream::to_record`]) each gets a row that says where it
//! came and what it is. The rows of directories and links wait for the next file's, and that is written in the transaction that seals the file or
//! notes its durable units: so no row is before what it speaks of, and millions of entries cost no transaction of their own. What waits is sent on its way
//! before a large file, which may take hours, and when the sender falls silent; and it is waited for where the daemon is drained. The next run is given
//! what was recorded as the stream's beginning. A stream that keeps what is not recorded yet is told what is ([`Recorded`](crate::source::Recorded)).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Shared;
use super::entries::Room;
use super::plan;
use super::progress::Progress;
use super::publish::Publishing;
use super::quota::Growth;
use super::taker::{Bound, Taker};
use super::tasks::{draining, is_draining};
use crate::catalog::uploads;
use crate::error::{Error, Result};
use crate::limits::{self, UNIT_BYTES};
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::names::EntryPath;
use crate::source::{EntryStream, File, Listed, What};

/// A sender that says nothing for so long may be gone for hours: what waits for more of it waits in vain.
const SILENCE: Duration = Duration::from_secs(1);

/// Takes everything into the directory of a flight, which is begun; returns the revision and the manifest.
///
/// # Errors
/// Those of the stream and the store. Where the daemon is drained, all that came and can be gone on with is recorded before.
pub(super) async fn fill(
    shared: &Arc<Shared>,
    flight: &str,
    mut stream: Box<dyn EntryStream>,
    progress: &Arc<Progress>,
) -> Result<(String, Manifest)> {
    let growth = Growth::new(shared, flight);
    let recorded = stream.recorded();
    let taker = Taker { shared, flight, progress, growth: &growth, recorded: recorded.as_ref() };
    let mut taken = Taken::new(&taker, shared.rooms.none());
    let all = taken.take_all(&mut *stream).await;
    match &all {
        Err(error) if is_draining(error) => {
            if let Err(error) = taken.settle().await {
                tracing::warn!(flight, error = %error.report(), "what came last could not be recorded and will be sent again");
            }
        }
        // Whoever keeps what comes lets go of it before it is removed.
        Err(_) => stream.is_not_recorded(),
        Ok(()) => {}
    }
    all?;
    taken.settle().await?;
    let Taken { mut entries, links, bytes, room: _room, .. } = taken;
    growth.reach(resolve(&mut entries, links, bytes, shared.settings.checkpoint_bytes)?).await?;
    let manifest = Manifest::new(entries)?;
    Ok((stream.revision(&manifest), manifest))
}

/// What was taken of a stream so far.
struct Taken<'a> {
    taker: &'a Taker<'a>,
    /// For the entries.
    room: Room,
    entries: Vec<Entry>,
    links: Vec<(EntryPath, EntryPath)>,
    publishing: Publishing,
    /// Of all files.
    bytes: u64,
    /// Rows of entries that are to be written with the next file.
    unrecorded: Vec<uploads::Sent>,
}

impl<'a> Taken<'a> {
    fn new(taker: &'a Taker<'a>, room: Room) -> Self {
        let recorded = taker.recorded.cloned();
        let publishing = Publishing::new(taker.shared, taker.flight, taker.progress, recorded);
        Self { taker, room, entries: Vec::new(), links: Vec::new(), publishing, bytes: 0, unrecorded: Vec::new() }
    }

    async fn take_all(&mut self, stream: &mut dyn EntryStream) -> Result<()> {
        while let Some(listed) = self.next(stream).await? {
            let known = self.entries.len() + self.links.len() + self.publishing.files();
            plan::check_entries(known + 1, &self.taker.shared.settings)?;
            self.make_room(known + 1).await?;
            let row = stream.to_record();
            let file = match listed.what {
                What::Directory => {
                    self.put(listed.path, EntryKind::Directory, row).await?;
                    continue;
                }
                What::Symlink(target) => {
                    self.put(listed.path, EntryKind::Symlink { target }, row).await?;
                    continue;
                }
                What::SameAs(earlier) => {
                    self.links.push((listed.path, earlier));
                    self.keep_row(row).await?;
                    continue;
                }
                What::File(file) => file,
            };
            if let Some((size, digest)) = stream.sealed() {
                self.bytes = self.bytes.saturating_add(size);
                self.taker.growth.reach(self.bytes).await?;
                self.taker.progress.resume(size);
                self.taker.progress.sealed();
                let kind = EntryKind::File { size, executable: file.executable, digest };
                self.entries.push(Entry { path: listed.path, kind });
                continue;
            }
            // Its first recording goes no further than what comes before it.
            if row.is_some() && file.size.is_none_or(|size| size > UNIT_BYTES) {
                self.publishing.go().await?;
            }
            let begun = stream.begun();
            let fresh = || self.taker.shared.next_number.fetch_add(1, Ordering::Relaxed);
            let bound = Bound { path: listed.path, number: begun.map_or_else(fresh, |begun| begun.number), row, begun };
            self.take(stream, bound, &file).await?;
        }
        Ok(())
    }

    /// Waits until there is room for so many entries, or the daemon is drained. What waits for more is sent on its way where that takes long.
    async fn make_room(&mut self, entries: usize) -> Result<()> {
        let shared = self.taker.shared;
        if !shared.rooms.reach_at_once(&mut self.room, entries) {
            self.publishing.go().await?;
            let mut paused = shared.paused.subscribe();
            tokio::select! {
                () = shared.rooms.reach(&mut self.room, entries) => {}
                _ = paused.wait_for(|paused| *paused) => return Err(draining()),
            }
        }
        Ok(())
    }

    /// Takes a file; what waits for more is sent on its way where that takes long.
    async fn take(&mut self, stream: &mut dyn EntryStream, bound: Bound, file: &File) -> Result<()> {
        let filled = {
            let taking = self.taker.take(stream, bound, file, self.bytes, &mut self.unrecorded);
            tokio::pin!(taking);
            match tokio::time::timeout(SILENCE, &mut taking).await {
                Ok(filled) => filled?,
                Err(_) => {
                    self.publishing.go().await?;
                    taking.await?
                }
            }
        };
        self.bytes += filled.size;
        self.publishing.add(filled).await
    }

    /// The next entry; what waits for more is sent on its way where none comes for long.
    async fn next(&mut self, stream: &mut dyn EntryStream) -> Result<Option<Listed>> {
        let mut next = stream.next_entry();
        if let Ok(listed) = tokio::time::timeout(SILENCE, &mut next).await {
            return listed;
        }
        self.publishing.go().await?;
        self.record().await?;
        next.await
    }

    /// Adds what has no bytes.
    async fn put(&mut self, path: EntryPath, kind: EntryKind, row: Option<uploads::Sent>) -> Result<()> {
        self.entries.push(Entry { path, kind });
        self.keep_row(row).await
    }

    /// Keeps the row of what has no bytes until a file takes it along, or there are many.
    async fn keep_row(&mut self, row: Option<uploads::Sent>) -> Result<()> {
        self.unrecorded.extend(row);
        if self.unrecorded.len() >= limits::PUBLISH_BATCH_FILES { self.record().await } else { Ok(()) }
    }

    /// Writes the rows that no file has taken along.
    async fn record(&mut self) -> Result<()> {
        if self.unrecorded.is_empty() {
            return Ok(());
        }
        let (flight, rows) = (self.taker.flight.to_owned(), std::mem::take(&mut self.unrecorded));
        let positions: Vec<_> = rows.iter().map(|(position, _)| *position).collect();
        self.taker.shared.store.catalog().write(move |tx| uploads::put(tx, &flight, &rows)).await?;
        positions.into_iter().for_each(|position| self.taker.is_recorded(position));
        Ok(())
    }

    /// Waits until all that came whole is sealed and recorded.
    async fn settle(&mut self) -> Result<()> {
        self.entries.extend(self.publishing.settle().await?);
        self.record().await
    }
}

/// Makes files of hard links, in the order they came, so that one may lead to another. `bytes` came before; returns what there are with them.
fn resolve(entries: &mut Vec<Entry>, links: Vec<(EntryPath, EntryPath)>, bytes: u64, limit_bytes: u64) -> Result<u64> {
    if links.is_empty() {
        return Ok(bytes);
    }
    let files = entries.iter().filter(|entry| matches!(entry.kind, EntryKind::File { .. }));
    let mut files: HashMap<_, _> = files.map(|entry| (entry.path.clone(), entry.kind.clone())).collect();
    let mut bytes = bytes;
    for (path, earlier) in links {
        let kind = files.get(&earlier).cloned().ok_or_else(|| {
            Error::invalid(
                "NO_SUCH_ENTRY",
                format!("the hard link `{path}` leads to `{earlier}`, which was not sent before"),
            )
        })?;
        if let EntryKind::File { size, .. } = kind {
            bytes = bytes.saturating_add(size);
            plan::check_limit(bytes, limit_bytes)?;
        }
        files.insert(path.clone(), kind.clone());
        entries.push(Entry { path, kind });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use bytes::Bytes;

    use super::*;
    use crate::catalog::fills;
    use crate::catalog::retention::Standing;
    use crate::digest::Digest;
    use crate::ingest::{Ingests, MakeRoom, Settings, draining};
    use crate::source::File;
    use crate::store::Store;

    fn path(text: &str) -> EntryPath {
        EntryPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn hard_links_become_files_and_count() {
        let kind = EntryKind::File { size: 10, executable: true, digest: Digest::of(b"0123456789") };
        let sent =
            vec![Entry { path: path("a"), kind: kind.clone() }, Entry { path: path("d"), kind: EntryKind::Directory }];
        let links = || vec![(path("b"), path("a")), (path("d/c"), path("b"))];
        let mut entries = sent.clone();
        assert_eq!(resolve(&mut entries, links(), 10, 30).unwrap(), 30);
        assert_eq!(entries[2..], [Entry { path: path("b"), kind: kind.clone() }, Entry { path: path("d/c"), kind }]);
        assert_eq!(resolve(&mut sent.clone(), links(), 10, 29).unwrap_err().reason(), "CHECKPOINT_TOO_LARGE");
        for missing in ["x", "d"] {
            let links = vec![(path("b"), path(missing))];
            assert_eq!(resolve(&mut sent.clone(), links, 10, 99).unwrap_err().reason(), "NO_SUCH_ENTRY");
        }
    }

    const LARGE: u64 = 5 * UNIT_BYTES + 5;

    /// Entries whose rows are their paths; in the last, when so much of it has come, drained or silent for ever.
    struct Told {
        entries: std::vec::IntoIter<(&'static str, Option<u64>)>,
        given: u64,
        present: (&'static str, u64),
        until: u64,
        falls_silent: bool,
    }

    impl Told {
        fn new(entries: &[(&'static str, Option<u64>)], until: u64, falls_silent: bool) -> Box<Self> {
            Box::new(Self { entries: Vec::from(entries).into_iter(), given: 0, present: ("", 0), until, falls_silent })
        }
    }

    #[async_trait]
    impl EntryStream for Told {
        async fn next_entry(&mut self) -> Result<Option<Listed>> {
            let Some((name, size)) = self.entries.next() else { return Err(draining()) };
            self.given += 1;
            self.present = (name, size.unwrap_or(0));
            let what = size.map_or(What::Directory, |size| What::File(File::streamed(Some(size), false)));
            Ok(Some(Listed { path: path(name), what }))
        }

        async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
            let left = &mut self.present.1;
            if self.entries.len() == 0 && *left <= LARGE - self.until {
                return if self.falls_silent { std::future::pending().await } else { Err(draining()) };
            }
            let next = (*left).min(1 << 20);
            *left -= next;
            let run = || vec![u8::try_from(*left % 251).unwrap(); usize::try_from(next).unwrap()].into();
            Ok((next > 0).then(|| vec![run()]))
        }

        fn to_record(&self) -> Option<uploads::Sent> {
            Some((self.given - 1, self.present.0.into()))
        }

        fn revision(&self, _tree: &Manifest) -> String {
            String::new()
        }
    }

    /// Refuses the row of a file of which nothing is recorded.
    const LAW: &str = "
        CREATE TRIGGER law BEFORE INSERT ON sent
        WHEN substr(CAST(new.entry AS TEXT), 1, 1) <> 'd' AND NOT EXISTS (
            SELECT 1 FROM fills f WHERE f.flight = new.flight AND f.path = new.entry
                AND (f.blob IS NOT NULL OR f.units IS NOT NULL))
        BEGIN SELECT RAISE(ABORT, 'the row comes before what it speaks of'); END";

    /// Ingests into a store below `directory`, where a flight `f` has begun and the law holds.
    async fn lawful(directory: &std::path::Path) -> Ingests {
        let place = directory.to_owned();
        let store = tokio::task::spawn_blocking(move || Store::open(&place)).await.unwrap().unwrap();
        let begun = uploads::Begun { bytes_total: 0, one_file: false };
        let prepare = move |tx: &rusqlite::Connection| {
            uploads::begin(tx, "f", begun)?;
            tx.execute_batch(LAW).map_err(crate::catalog::catalog_error)
        };
        store.catalog().write(prepare).await.unwrap();
        store.disk().begin_flight("f").unwrap();
        let make_room: MakeRoom = Arc::new(|_| Box::pin(async { Ok((0, Standing::default())) }));
        Ingests::new(store, Arc::new(|_, _, _| panic!("unused")), make_room, Settings::default())
    }

    fn place() -> tempfile::TempDir {
        tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap()
    }

    /// The rows of what was sent, and the files with whether they are sealed and what came of them.
    async fn recorded(ingests: &Ingests) -> (Vec<Vec<u8>>, Vec<(Vec<u8>, bool, Vec<u8>)>) {
        let read = |tx: &rusqlite::Connection| Ok((uploads::entries(tx, "f")?, fills::of_flight(tx, "f")?));
        let (rows, files) = ingests.0.store.catalog().read(read).await.unwrap();
        (rows, files.into_iter().map(|row| (row.path, row.sealed.is_some(), row.units)).collect())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_row_is_before_what_it_speaks_of_and_a_drain_leaves_none_unwritten() {
        let directory = place();
        let ingests = lawful(directory.path()).await;
        let entries =
            [("d", None), ("a", Some(10)), ("l", Some(LARGE)), ("d2", None), ("b", Some(0)), ("m", Some(LARGE))];
        let told = Told::new(&entries, 2 * UNIT_BYTES + 1, false);
        let ended = fill(&ingests.0, "f", told, &Arc::default()).await;
        assert_eq!(ended.unwrap_err().reason(), "DRAINING");
        let (rows, files) = recorded(&ingests).await;
        assert_eq!(rows, entries.map(|(name, _)| name.as_bytes()));
        let sealed = |name: &'static str| (name.into(), true, Vec::new());
        assert_eq!(files, [sealed("a"), sealed("b"), sealed("l"), (b"m".into(), false, vec![0b11])]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_came_at_once_before_a_sender_fell_silent_is_recorded() {
        let directory = place();
        let ingests = lawful(directory.path()).await;
        let told = Told::new(&[("m", Some(LARGE))], 2 * UNIT_BYTES, true);
        let come = async {
            while recorded(&ingests).await.1 != [(b"m".into(), false, vec![0b11])] {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        let progress = Arc::default();
        tokio::select! {
            _ = fill(&ingests.0, "f", told, &progress) => panic!("it ended"),
            waited = tokio::time::timeout(std::time::Duration::from_secs(60), come) => waited.unwrap(),
        }
    }
}
