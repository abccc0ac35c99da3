//! The publisher thread: seals files in batches and removes what is condemned, one step after the other.
//!
//! A batch is whatever is waiting when the thread comes round, up to `limits::PUBLISH_BATCH_FILES`: alone, a file is sealed at once;
//! under load, hundreds share two transactions and one `syncfs`. A batch fails as a whole only for faults that concern all of it (disk
//! full, poisoned, catalog): what was renamed of it is undone as the next start would undo it, so its files are in `filling/` again, and each caller
//! gets the error. Where they cannot be brought back, the next start does it. A file that is gone from `filling/`, since its flight was
//! removed or begins anew, fails alone: the others are published again without it.
//!
//! **A panic** costs what was being done, not the thread. A batch that it ended is undone likewise; where that fails, the disk is poisoned, since nobody
//! knows what was done, so that jobs go on reading and nothing is written. A removal is left where it is, for the next start.
//!
//! Removals are taken apart ([`sweep`](super::sweep)): after each batch the next of them takes one step, so that neither waits for the whole of the other.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::read::Holds;
use super::runs::{self, Run};
use super::sweep::Sweep;
use super::{Command, undo_publishes};
use crate::catalog::blobs::{self, ChunkRow, Home};
use crate::catalog::{Catalog, fills, uploads};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::names::EntryPath;
use crate::panics::guarded;

/// A filled file that is to be sealed.
#[derive(Debug)]
pub struct Sealing {
    /// The flight that filled it.
    pub flight: String,
    /// Its number in the flight's directory.
    pub number: u64,
    /// Where it is in the checkpoint.
    pub path: EntryPath,
    /// Exact size in bytes.
    pub size: u64,
    /// File digest of the bytes as they are on disk.
    pub digest: Digest,
    /// Its chunks in order of offset.
    pub chunks: Vec<ChunkRow>,
    /// Whether the bytes are durable already.
    pub synced: bool,
    /// Entries of an upload that are noted in the transaction that seals it: its own, and those before it that have no bytes.
    pub sent: Vec<uploads::Sent>,
}

struct Pending {
    sealing: Arc<Sealing>,
    answer: oneshot::Sender<Result<()>>,
}

/// Files that are published together.
type Batch = Arc<Vec<Arc<Sealing>>>;

/// A blob that got its row, and what is to be punched or shared.
struct Sealed {
    blob: i64,
    digest: Digest,
    borrowed: Vec<(Run, Digest)>,
    shared: Vec<(Run, Digest)>,
}

pub(super) fn start(disk: Arc<Disk>, catalog: Catalog, holds: Holds) -> Result<mpsc::Sender<Command>> {
    let (sender, receiver) = mpsc::channel(limits::QUEUE_COMMANDS);
    let publisher = Publisher { disk, catalog, holds };
    std::thread::Builder::new()
        .name("publisher".to_owned())
        .spawn(move || publisher.run(receiver))
        .map_err(|error| Error::unavailable("NO_THREAD", "starting the publisher thread").because(error))?;
    Ok(sender)
}

pub(super) struct Publisher {
    pub(super) disk: Arc<Disk>,
    pub(super) catalog: Catalog,
    pub(super) holds: Holds,
}

impl Publisher {
    fn run(&self, mut receiver: mpsc::Receiver<Command>) {
        // Bounded by `limits::REMOVALS_UNDER_WAY`.
        let mut sweeps: VecDeque<Sweep> = VecDeque::new();
        loop {
            let next = if sweeps.is_empty() { receiver.blocking_recv() } else { receiver.try_recv().ok() };
            // What is left of sweeps then is for the next start.
            if next.is_none() && (sweeps.is_empty() || receiver.is_closed()) {
                return;
            }
            // Whoever waits for what a panic ended hears that it is a bug; what can be told more exactly is, further in.
            let _ = guarded("a turn of the publisher", || {
                self.take_commands(next, &mut receiver, &mut sweeps);
                if let Some(mut sweep) = sweeps.pop_front()
                    && sweep.step(self)
                {
                    sweeps.push_back(sweep);
                }
                Ok(())
            });
        }
    }

    /// Runs what may stop between a note and its rows, and undoes it if it does; whether nothing of it is left to be undone. What was done with its
    /// rows stays.
    fn undone_if_it_fails<R>(&self, work: impl FnOnce() -> Result<R>) -> (Result<R>, bool) {
        let mut ended = false;
        let outcome = guarded("publishing a batch", || {
            let outcome = work();
            ended = true;
            outcome
        });
        if outcome.is_ok() {
            return (outcome, true);
        }
        let undone = guarded("undoing it", || undo_publishes(&self.disk, &self.catalog));
        if let Err(error) = &undone {
            if ended {
                tracing::warn!(error = %error.report(), "what was published in part is left for the next start to undo");
            } else {
                self.disk.stop_writing(error);
            }
        }
        (outcome, undone.is_ok())
    }

    /// Takes what is waiting, up to a batch, and publishes it.
    fn take_commands(
        &self,
        mut next: Option<Command>,
        receiver: &mut mpsc::Receiver<Command>,
        sweeps: &mut VecDeque<Sweep>,
    ) {
        let mut batch = Vec::new();
        while let Some(command) = next.take() {
            match command {
                Command::Publish(sealing, answer) => batch.push(Pending { sealing: Arc::new(sealing), answer }),
                Command::Sweep(sweep) => sweeps.push_back(sweep),
                Command::GiveUp(blob, answer) => {
                    let _ = answer.send(guarded("giving up duplicates", || self.give_up_duplicates(blob)));
                }
            }
            if batch.len() < limits::PUBLISH_BATCH_FILES {
                next = receiver.try_recv().ok();
            }
        }
        self.publish_and_answer(batch);
    }

    fn publish_and_answer(&self, batch: Vec<Pending>) {
        self.publish_what_is_left(self.still_there(batch));
    }

    /// Those whose files are there. The others, of a flight that was removed meanwhile, are answered.
    fn still_there(&self, batch: Vec<Pending>) -> Vec<Pending> {
        let (batch, missing): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|pending| self.disk.filling_path(&pending.sealing.flight, pending.sealing.number).exists());
        for pending in missing {
            let gone = Error::new(
                Kind::Cancelled,
                "FLIGHT_REMOVED",
                format!("`{}` was removed while it was sealed", pending.sealing.path),
            );
            let _ = pending.answer.send(Err(gone));
        }
        batch
    }

    /// Files may go at any moment until they are renamed: then all is undone, and done again for the others. Each time there are fewer.
    fn publish_what_is_left(&self, mut batch: Vec<Pending>) {
        while !batch.is_empty() {
            let sealings: Vec<_> = batch.iter().map(|pending| pending.sealing.clone()).collect();
            let sealings = Arc::new(sealings);
            let (outcome, undone) = self.undone_if_it_fails(|| self.seal(&sealings));
            if outcome.as_ref().is_err_and(|error| error.kind() == Kind::NotFound) && undone {
                let before = batch.len();
                batch = self.still_there(batch);
                if batch.len() < before {
                    continue;
                }
            }
            let outcome = outcome.and_then(|(sealed, fresh)| {
                guarded("giving up what is here twice", || {
                    self.drop_duplicates(&sealings, &fresh)?;
                    self.give_up_duplicate_bytes(&sealed)
                })
            });
            for pending in std::mem::take(&mut batch) {
                let _ = pending.answer.send(outcome.as_ref().copied().map_err(Error::share));
            }
        }
    }

    /// Steps 1 to 4: what got its row, and which of the batch these are.
    fn seal(&self, batch: &Batch) -> Result<(Vec<Sealed>, Vec<usize>)> {
        self.disk.check_healthy()?;
        let (firsts, fresh) = self.announce(batch)?;
        self.make_durable(batch, &firsts)?;
        // One that has vanished fails before any is renamed, so that the others can be published again without it.
        for &at in &fresh {
            let path = self.disk.filling_path(&batch[at].flight, batch[at].number);
            std::fs::metadata(&path).map_err(|error| Error::io("publishing", &path, error))?;
        }
        // Only now: a rename may take the place of a remnant that others borrow from, so the new bytes must be durable before it.
        for &at in &fresh {
            let sealing = &batch[at];
            self.disk.publish(&sealing.flight, sealing.number, &sealing.digest)?;
        }
        if self.needs_syncfs(batch, &firsts) {
            self.disk.sync_filesystem()?;
        } else {
            self.disk.sync_directories(firsts.iter().map(|at| &batch[*at].digest))?;
        }
        let sealed = self.enter(batch, firsts, fresh.clone())?;
        Ok((sealed, fresh))
    }

    /// Step 2: marks files whose blob is here already, and notes the first of each digest as publishing. Returns their positions, and of those
    /// among them that are to be renamed. The others are noted, and made durable, so that whoever brings them in waits as long as for new ones.
    fn announce(&self, batch: &Batch) -> Result<(Vec<usize>, Vec<usize>)> {
        let batch = batch.clone();
        self.catalog.write_blocking(move |tx| {
            let mut seen = HashSet::new();
            let (mut firsts, mut fresh) = (Vec::new(), Vec::new());
            for (at, sealing) in batch.iter().enumerate() {
                let is_first = seen.insert(sealing.digest);
                firsts.extend(is_first.then_some(at));
                match blobs::sealed(tx, &sealing.digest)? {
                    Some(blob) => mark_sealed(tx, sealing, blob.id)?,
                    None => fresh.extend(is_first.then_some(at)),
                }
            }
            let files =
                firsts.iter().map(|at: &usize| (&batch[*at].digest, batch[*at].flight.as_str(), batch[*at].number));
            blobs::begin_publishing(tx, files)?;
            Ok((firsts, fresh))
        })
    }

    fn needs_syncfs(&self, batch: &[Arc<Sealing>], firsts: &[usize]) -> bool {
        firsts.iter().filter(|at| !batch[**at].synced).count() >= limits::SYNCFS_FROM_FILES
    }

    /// Step 1 for files that were not flushed while they filled: each, or all at once where there are many.
    fn make_durable(&self, batch: &[Arc<Sealing>], firsts: &[usize]) -> Result<()> {
        if self.needs_syncfs(batch, firsts) {
            return self.disk.sync_filesystem();
        }
        for sealing in firsts.iter().map(|at| &batch[*at]).filter(|sealing| !sealing.synced) {
            let path = self.disk.filling_path(&sealing.flight, sealing.number);
            let file = File::open(&path).map_err(|error| Error::io("opening", &path, error))?;
            self.disk.sync_file(&file, &path)?;
        }
        Ok(())
    }

    /// Step 4.
    fn enter(&self, batch: &Batch, firsts: Vec<usize>, fresh: Vec<usize>) -> Result<Vec<Sealed>> {
        let stored = fresh.iter().map(|at| self.disk.stored_bytes(&batch[*at].digest)).collect::<Result<Vec<_>>>()?;
        let batch = batch.clone();
        let reflink = self.disk.reflink();
        self.catalog.write_blocking(move |tx| {
            let mut sealed = Vec::new();
            let mut ids = HashMap::new();
            firsts.iter().try_for_each(|at| blobs::end_publishing(tx, &batch[*at].digest))?;
            for (at, stored) in fresh.iter().zip(stored) {
                let sealing = &batch[*at];
                let blob = blobs::seal(tx, &sealing.digest, sealing.size, stored)?;
                ids.insert(sealing.digest, blob);
                sealed.push(enter_chunks(tx, sealing, blob, reflink)?);
            }
            for sealing in batch.iter() {
                if let Some(blob) = ids.get(&sealing.digest) {
                    mark_sealed(tx, sealing, *blob)?;
                }
            }
            Ok(sealed)
        })
    }

    fn drop_duplicates(&self, batch: &[Arc<Sealing>], fresh: &[usize]) -> Result<()> {
        for (at, sealing) in batch.iter().enumerate() {
            if fresh.binary_search(&at).is_err() {
                self.disk.remove_filling(&sealing.flight, sealing.number)?;
            }
        }
        Ok(())
    }

    /// Step 5. Whoever reads these blobs already, of a checkpoint that is still filling, holds them: they stay whole. Nobody else can: the files are new.
    /// So do those of which a home's file is missing, which nobody but a scrub has noticed: theirs may be the only bytes. What cannot be given up is
    /// right all the same and stays; only a disk that fails ends this.
    fn give_up_duplicate_bytes(&self, sealed: &[Sealed]) -> Result<()> {
        let mut changed = Vec::new();
        let mut kept = Vec::new();
        for blob in sealed {
            for (run, home) in &blob.shared {
                let shared = self.disk.share(&blob.digest, run.start..run.start + run.len, home, run.home.start);
                self.unless_it_fails(shared.map(drop))?;
            }
            if blob.borrowed.is_empty() {
                continue;
            }
            let are_there = || blob.borrowed.iter().all(|(_, home)| self.disk.blob_path(home).exists());
            if self.holds.is_held(&blob.digest) || !are_there() {
                kept.push((blob.blob, self.disk.stored_bytes(&blob.digest)?));
            } else {
                let ranges: Vec<_> = blob.borrowed.iter().map(|(run, _)| run.start..run.start + run.len).collect();
                self.unless_it_fails(self.disk.punch(&blob.digest, &ranges))?;
                changed.push((blob.blob, self.disk.stored_bytes(&blob.digest)?));
            }
        }
        if changed.is_empty() && kept.is_empty() {
            return Ok(());
        }
        self.catalog.write_blocking(move |tx| {
            kept.iter().try_for_each(|(blob, stored)| blobs::set_filled(tx, *blob, *stored))?;
            changed.iter().try_for_each(|(blob, stored)| blobs::set_stored_bytes(tx, *blob, *stored))
        })
    }
}

impl Publisher {
    /// What could not be given up is logged, unless the disk takes no changes any more.
    fn unless_it_fails(&self, given_up: Result<()>) -> Result<()> {
        let Err(error) = given_up else { return Ok(()) };
        if error.reason() == "DISK_IO_ERROR" || self.disk.poisoned().is_some() {
            return Err(error);
        }
        tracing::warn!(error = %error.report(), "bytes that are here twice stay so");
        Ok(())
    }
}

fn mark_sealed(tx: &rusqlite::Connection, sealing: &Sealing, blob: i64) -> Result<()> {
    fills::set_sealed(tx, &sealing.flight, sealing.path.as_bytes(), sealing.number, sealing.size, blob)?;
    uploads::put(tx, &sealing.flight, &sealing.sent)
}

/// Looks every chunk up, enters the new ones with this blob as home, and decides what to borrow or share: never what others have of this blob.
fn enter_chunks(tx: &rusqlite::Connection, sealing: &Sealing, blob: i64, reflink: bool) -> Result<Sealed> {
    let bound = blobs::bound(tx, blob)?;
    let mut homes: Vec<(ChunkRow, Option<Home>)> = Vec::with_capacity(sealing.chunks.len());
    for chunk in sealing.chunks.iter().filter(|chunk| chunk.len >= limits::CHUNK_MIN_RECORDED_BYTES) {
        let home = blobs::home_of(tx, chunk)?.filter(|home| home.blob != blob || home.start != chunk.start);
        if home.is_none() {
            blobs::enter_chunk(tx, chunk, blob)?;
        }
        homes.push((*chunk, home.filter(|_| !runs::reaches_into(chunk, &bound))));
    }
    let mut sealed = Sealed { blob, digest: sealing.digest, borrowed: Vec::new(), shared: Vec::new() };
    for run in runs::borrowable(&homes) {
        let home = blobs::digest_of(tx, run.home.blob)?;
        if reflink && run.is_congruent() {
            sealed.shared.push((run, home));
        } else {
            blobs::borrow(tx, blob, run.start, run.len, run.home)?;
            sealed.borrowed.push((run, home));
        }
    }
    Ok(sealed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_while_publishing_is_undone_and_the_same_file_is_published_after_it() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Arc::new(Disk::open(directory.path()).unwrap());
        let catalog = Catalog::open(&disk.catalog_path()).unwrap();
        let publisher = Publisher { disk: disk.clone(), catalog: catalog.clone(), holds: Holds::default() };
        let (bytes, digest) = (b"bytes of a file", Digest::of(b"bytes of a file"));
        disk.begin_flight("f").unwrap();
        disk.write_filling("f", 1, bytes).unwrap();
        let path = EntryPath::new(&b"w"[..]).unwrap();
        let size = bytes.len() as u64;
        let (chunks, sent) = (Vec::new(), Vec::new());
        let sealing = Sealing { flight: "f".into(), number: 1, path, size, digest, chunks, synced: false, sent };
        let (failed, _): (Result<()>, _) = publisher.undone_if_it_fails(|| {
            catalog.write_blocking(move |tx| blobs::begin_publishing(tx, [(&digest, "f", 1)].into_iter()))?;
            disk.publish("f", 1, &digest)?;
            assert!(!disk.filling_path("f", 1).exists());
            panic!("on purpose, between rename and row")
        });
        assert_eq!(failed.unwrap_err().kind(), Kind::Internal);
        assert!(disk.filling_path("f", 1).exists() && disk.poisoned().is_none());
        assert!(catalog.read_blocking(blobs::interrupted_publishing).unwrap().is_empty());
        let (answer, mut answered) = oneshot::channel();
        publisher.publish_and_answer(vec![Pending { sealing: Arc::new(sealing), answer }]);
        answered.try_recv().unwrap().unwrap();
        assert!(disk.blob_path(&digest).exists());
    }

    /// Files `number`s of the flight `f`, filled with their numbers; and who is answered.
    fn pending(disk: &Disk, numbers: &[u64]) -> (Vec<Pending>, Vec<Digest>, Vec<oneshot::Receiver<Result<()>>>) {
        let (mut batch, mut digests, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        disk.begin_flight("f").unwrap();
        for &number in numbers {
            let bytes = number.to_le_bytes();
            disk.write_filling("f", number, &bytes).unwrap();
            let path = EntryPath::new(number.to_string().as_bytes()).unwrap();
            let (size, digest, chunks) = (bytes.len() as u64, Digest::of(&bytes), Vec::new());
            let (flight, sent) = ("f".into(), Vec::new());
            let sealing = Arc::new(Sealing { flight, number, path, size, digest, chunks, synced: false, sent });
            let (answer, answered) = oneshot::channel();
            batch.push(Pending { sealing, answer });
            digests.push(digest);
            answers.push(answered);
        }
        (batch, digests, answers)
    }

    #[test]
    fn a_batch_that_fails_half_way_is_undone_and_can_be_published_again() {
        let state = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Arc::new(Disk::open(state.path()).unwrap());
        let catalog = Catalog::open(&disk.catalog_path()).unwrap();
        let publisher = Publisher { disk: disk.clone(), catalog: catalog.clone(), holds: Holds::default() };
        let (batch, digests, answers) = pending(&disk, &[1, 2, 3]);
        let path = disk.blob_path(&digests[2]);
        let directory = path.parent().unwrap();
        std::fs::remove_dir(directory).unwrap();
        publisher.publish_and_answer(batch);
        assert!(answers.into_iter().all(|mut answer| answer.try_recv().unwrap().is_err()));
        assert!((1..=3).all(|number| disk.filling_path("f", number).exists()), "each is where it was filled");
        assert!(digests[..2].iter().all(|digest| !disk.blob_path(digest).exists()));
        assert!(catalog.read_blocking(blobs::interrupted_publishing).unwrap().is_empty());
        assert!(disk.poisoned().is_none());

        std::fs::create_dir(directory).unwrap();
        let (batch, digests, answers) = pending(&disk, &[1, 2, 3]);
        publisher.publish_and_answer(batch);
        answers.into_iter().for_each(|mut answer| answer.try_recv().unwrap().unwrap());
        assert!(digests.iter().all(|digest| disk.blob_path(digest).exists()));
    }

    #[test]
    fn a_file_that_vanishes_while_its_batch_is_published_fails_alone() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Arc::new(Disk::open(directory.path()).unwrap());
        let catalog = Catalog::open(&disk.catalog_path()).unwrap();
        let publisher = Publisher { disk: disk.clone(), catalog, holds: Holds::default() };
        for synced in [false, true] {
            let (mut batch, digests, answers) = pending(&disk, &[1, 2, 3]);
            if synced {
                // Not even opened before it is renamed.
                batch = batch.into_iter().map(Pending::synced).collect();
            }
            disk.remove_filling("f", 2).unwrap();
            publisher.publish_what_is_left(batch);
            let outcomes: Vec<_> = answers.into_iter().map(|mut answer| answer.try_recv().unwrap()).collect();
            assert_eq!(outcomes[1].as_ref().unwrap_err().reason(), "FLIGHT_REMOVED");
            assert!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
            assert!(disk.blob_path(&digests[0]).exists() && disk.blob_path(&digests[2]).exists());
            assert!(!disk.blob_path(&digests[1]).exists());
        }
    }

    impl Pending {
        fn synced(self) -> Self {
            let sealing = Arc::into_inner(self.sealing).unwrap();
            let sealing = Arc::new(Sealing { synced: true, ..sealing });
            Self { sealing, ..self }
        }
    }

    #[test]
    fn a_panic_that_cannot_be_undone_stops_all_writing() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = Arc::new(Disk::open(directory.path()).unwrap());
        let catalog = Catalog::open(&disk.catalog_path()).unwrap();
        let publisher = Publisher { disk: disk.clone(), catalog: catalog.clone(), holds: Holds::default() };
        let (failed, _): (Result<()>, _) = publisher.undone_if_it_fails(|| {
            catalog.write_blocking(|tx| {
                tx.execute_batch("DROP TABLE publishing").map_err(crate::catalog::catalog_error)
            })?;
            panic!("on purpose")
        });
        assert_eq!(failed.unwrap_err().kind(), Kind::Internal);
        assert_eq!(disk.check_healthy().unwrap_err().reason(), "STORE_POISONED");
    }
}
