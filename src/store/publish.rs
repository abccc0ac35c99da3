//! The publisher thread: seals files in batches and removes what is condemned, one command after the other.
//!
//! A batch is whatever is waiting when the thread comes round, up to `limits::PUBLISH_BATCH_FILES`: alone, a file is sealed at once;
//! under load, hundreds share two transactions and one `syncfs`. A batch fails as a whole only for faults that concern all of it (disk
//! full, poisoned, catalog); its files then stay in `filling/` and each caller gets the error.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::read::Holds;
use super::runs::{self, Run};
use super::{Command, sweep};
use crate::catalog::blobs::{self, ChunkRow, Home};
use crate::catalog::{Catalog, fills};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::names::EntryPath;

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
}

struct Pending {
    sealing: Sealing,
    answer: oneshot::Sender<Result<()>>,
}

/// A blob that got its row, and what is to be punched or shared.
struct Sealed {
    blob: i64,
    digest: Digest,
    borrowed: Vec<Run>,
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
        while let Some(command) = receiver.blocking_recv() {
            let mut batch = Vec::new();
            let mut next = Some(command);
            while let Some(command) = next.take() {
                match command {
                    Command::Publish(sealing, answer) => batch.push(Pending { sealing, answer }),
                    Command::Sweep(order, answer) => {
                        self.publish_and_answer(std::mem::take(&mut batch));
                        let _ = answer.send(sweep::carry_out(self, &order));
                    }
                }
                if batch.len() < limits::PUBLISH_BATCH_FILES {
                    next = receiver.try_recv().ok();
                }
            }
            self.publish_and_answer(batch);
        }
    }

    fn publish_and_answer(&self, batch: Vec<Pending>) {
        if batch.is_empty() {
            return;
        }
        let (batch, missing): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .partition(|pending| self.disk.filling_path(&pending.sealing.flight, pending.sealing.number).exists());
        // Files of a flight that was removed meanwhile; the others must not suffer for them.
        for pending in missing {
            let gone = Error::new(
                Kind::Cancelled,
                "FLIGHT_REMOVED",
                format!("`{}` was removed while it was sealed", pending.sealing.path),
            );
            let _ = pending.answer.send(Err(gone));
        }
        if batch.is_empty() {
            return;
        }
        let (sealings, answers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|pending| (pending.sealing, pending.answer)).unzip();
        let outcome = self.publish(sealings);
        for answer in answers {
            let _ = answer.send(outcome.as_ref().copied().map_err(Error::share));
        }
    }

    fn publish(&self, batch: Vec<Sealing>) -> Result<()> {
        self.disk.check_healthy()?;
        let batch = Arc::new(batch);
        let fresh = self.announce(&batch)?;
        self.make_durable(&batch, &fresh)?;
        // Only now: a rename may take the place of a remnant that others borrow from, so the new bytes must be durable before it.
        for &at in &fresh {
            let sealing = &batch[at];
            self.disk.publish(&sealing.flight, sealing.number, &sealing.digest)?;
        }
        if self.needs_syncfs(&batch, &fresh) {
            self.disk.sync_filesystem()?;
        } else {
            self.disk.sync_directories(fresh.iter().map(|at| &batch[*at].digest))?;
        }
        let sealed = self.enter(&batch, fresh.clone())?;
        self.drop_duplicates(&batch, &fresh)?;
        self.give_up_duplicate_bytes(&sealed)
    }

    /// Step 2: marks files whose blob is here already, and notes the rest as publishing. Returns the positions of those to be renamed: the first
    /// of each digest.
    fn announce(&self, batch: &Arc<Vec<Sealing>>) -> Result<Vec<usize>> {
        let batch = batch.clone();
        self.catalog.write_blocking(move |tx| {
            let mut fresh: HashMap<Digest, usize> = HashMap::new();
            for (at, sealing) in batch.iter().enumerate() {
                match blobs::sealed(tx, &sealing.digest)? {
                    Some(blob) => mark_sealed(tx, sealing, blob.id)?,
                    None => {
                        fresh.entry(sealing.digest).or_insert(at);
                    }
                }
            }
            let mut fresh: Vec<usize> = fresh.into_values().collect();
            fresh.sort_unstable();
            let files = fresh.iter().map(|at| (&batch[*at].digest, batch[*at].flight.as_str(), batch[*at].number));
            blobs::begin_publishing(tx, files)?;
            Ok(fresh)
        })
    }

    fn needs_syncfs(&self, batch: &[Sealing], fresh: &[usize]) -> bool {
        fresh.iter().filter(|at| !batch[**at].synced).count() >= limits::SYNCFS_FROM_FILES
    }

    /// Step 1 for files that were not flushed while they filled: each, or all at once where there are many.
    fn make_durable(&self, batch: &[Sealing], fresh: &[usize]) -> Result<()> {
        if self.needs_syncfs(batch, fresh) {
            return self.disk.sync_filesystem();
        }
        for sealing in fresh.iter().map(|at| &batch[*at]).filter(|sealing| !sealing.synced) {
            let path = self.disk.filling_path(&sealing.flight, sealing.number);
            let file = File::open(&path).map_err(|error| Error::io("opening", &path, error))?;
            self.disk.sync_file(&file, &path)?;
        }
        Ok(())
    }

    /// Step 4.
    fn enter(&self, batch: &Arc<Vec<Sealing>>, fresh: Vec<usize>) -> Result<Vec<Sealed>> {
        let stored = fresh.iter().map(|at| self.disk.stored_bytes(&batch[*at].digest)).collect::<Result<Vec<_>>>()?;
        let batch = batch.clone();
        let reflink = self.disk.reflink();
        self.catalog.write_blocking(move |tx| {
            let mut sealed = Vec::new();
            let mut ids = HashMap::new();
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

    fn drop_duplicates(&self, batch: &[Sealing], fresh: &[usize]) -> Result<()> {
        for (at, sealing) in batch.iter().enumerate() {
            if fresh.binary_search(&at).is_err() {
                self.disk.remove_filling(&sealing.flight, sealing.number)?;
            }
        }
        Ok(())
    }

    /// Step 5. Whoever reads these blobs already, of a checkpoint that is still filling, holds them: they stay whole.
    fn give_up_duplicate_bytes(&self, sealed: &[Sealed]) -> Result<()> {
        let mut changed = Vec::new();
        let mut kept = Vec::new();
        for blob in sealed {
            for (run, home) in &blob.shared {
                self.disk.share(&blob.digest, run.start..run.start + run.len, home, run.home.start)?;
            }
            if blob.borrowed.is_empty() {
                continue;
            }
            if self.holds.is_held(&blob.digest) {
                kept.push((blob.blob, self.disk.stored_bytes(&blob.digest)?));
            } else {
                let ranges: Vec<_> = blob.borrowed.iter().map(|run| run.start..run.start + run.len).collect();
                self.disk.punch(&blob.digest, &ranges)?;
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

fn mark_sealed(tx: &rusqlite::Connection, sealing: &Sealing, blob: i64) -> Result<()> {
    fills::set_sealed(tx, &sealing.flight, sealing.path.as_bytes(), sealing.number, sealing.size, blob)
}

/// Looks every chunk up, enters the new ones with this blob as home, and decides what to borrow or share.
fn enter_chunks(tx: &rusqlite::Connection, sealing: &Sealing, blob: i64, reflink: bool) -> Result<Sealed> {
    let mut homes: Vec<(ChunkRow, Option<Home>)> = Vec::with_capacity(sealing.chunks.len());
    for chunk in sealing.chunks.iter().filter(|chunk| chunk.len >= limits::CHUNK_MIN_RECORDED_BYTES) {
        let home = blobs::home_of(tx, chunk)?.filter(|home| home.blob != blob || home.start != chunk.start);
        if home.is_none() {
            blobs::enter_chunk(tx, chunk, blob)?;
        }
        homes.push((*chunk, home));
    }
    let mut sealed = Sealed { blob, digest: sealing.digest, borrowed: Vec::new(), shared: Vec::new() };
    for run in runs::borrowable(&homes) {
        if reflink && run.is_congruent() {
            sealed.shared.push((run, blobs::digest_of(tx, run.home.blob)?));
        } else {
            blobs::borrow(tx, blob, run.start, run.len, run.home)?;
            sealed.borrowed.push(run);
        }
    }
    Ok(sealed)
}
