//! The content-addressed store: blobs on the disk and their rows in the catalog, kept in step.
//!
//! **Order of writes.** A file is sealed in this order, in batches, by one *publisher* thread:
//! 1. its bytes are durable (`fdatasync`, or one `syncfs` for a batch);
//! 2. `publishing` rows say what is about to be renamed;
//! 3. renames into `blobs/`, directories synced;
//! 4. one transaction makes the blobs `sealed`, enters their chunks, notes what they borrow, and marks the files of the flight;
//! 5. borrowed ranges are punched (or shared, where the filesystem shares extents and offsets are congruent).
//!
//! A crash before 4 is undone at start from the `publishing` rows; a crash before 5 leaves a blob that is whole and reads right.
//! Removal is the reverse and runs on the same thread, so it never meets a publish half-way: `doomed` rows, unlink or punch, rows gone.
//!
//! **Reading** ([`read`]) never touches the catalog: what a checkpoint's blobs borrow is read once when it is opened. A home is never
//! punched or unlinked while a row borrows from it. The blobs of a served checkpoint and their homes are held ([`read::Holds`]) for as
//! long as anything of its session lives, and what is held is never punched: the kernel may have been given it. Unlinking is harmless.
//!
//! **Dedup.** Equal files are one blob. Of a new file, every run of known chunks of at least `limits::BORROW_MIN_BYTES` is borrowed.

pub mod filling;
pub mod hydrate;
mod publish;
pub mod read;
mod runs;
mod sweep;
mod warm;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::catalog::{Catalog, blobs, checkpoints, fills, placements};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::limits;
use crate::manifest::Manifest;

pub use publish::Sealing;
pub use sweep::Swept;

/// Handle to the store; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    disk: Arc<Disk>,
    catalog: Catalog,
    holds: read::Holds,
    publisher: mpsc::Sender<Command>,
    hydrations: Arc<Semaphore>,
}

/// What the publisher thread is asked.
enum Command {
    Publish(Sealing, oneshot::Sender<Result<()>>),
    Sweep(sweep::Order, oneshot::Sender<Result<Swept>>),
}

impl Store {
    /// Opens the state directory, finishes or undoes what a crash left, and starts the publisher. Blocks.
    ///
    /// # Errors
    /// Those of [`Disk::open`] and [`Catalog::open`]; an interrupted publish or removal that cannot be mended.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let disk = Arc::new(Disk::open(state_dir)?);
        let catalog = Catalog::open(&disk.catalog_path())?;
        let holds = read::Holds::default();
        recover(&disk, &catalog)?;
        let publisher = publish::start(disk.clone(), catalog.clone(), holds.clone())?;
        Ok(Self { disk, catalog, holds, publisher, hydrations: Arc::new(Semaphore::new(1)) })
    }

    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Seals a filled file: durable, deduplicated and marked sealed in its flight on return.
    ///
    /// # Errors
    /// No space, poisoned store; the file stays where it was filled.
    pub async fn publish(&self, sealing: Sealing) -> Result<()> {
        let (answer, receiver) = oneshot::channel();
        self.publisher.send(Command::Publish(sealing, answer)).await.map_err(|_| stopped())?;
        receiver.await.map_err(|_| stopped())?
    }

    /// Drops a checkpoint's record and gives back the bytes nothing else needs; free on return.
    ///
    /// # Errors
    /// Poisoned store; what was begun is finished at the next start.
    pub async fn remove_checkpoint(&self, id: &str) -> Result<Swept> {
        self.sweep(sweep::Order::Checkpoint(id.to_owned())).await
    }

    /// Forgets a flight: its filling files, its rows, and what only it had sealed.
    ///
    /// # Errors
    /// As [`Store::remove_checkpoint`].
    pub async fn remove_flight(&self, flight: &str) -> Result<Swept> {
        self.sweep(sweep::Order::Flight(flight.to_owned())).await
    }

    /// Gives back whatever nothing names: what interrupted removals left.
    ///
    /// # Errors
    /// As [`Store::remove_checkpoint`].
    pub async fn sweep_unnamed(&self) -> Result<Swept> {
        self.sweep(sweep::Order::Unnamed).await
    }

    async fn sweep(&self, order: sweep::Order) -> Result<Swept> {
        let (answer, receiver) = oneshot::channel();
        self.publisher.send(Command::Sweep(order, answer)).await.map_err(|_| stopped())?;
        receiver.await.map_err(|_| stopped())?
    }

    /// The reading side of one manifest's blobs.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn reader(&self, digest: Digest, manifest: Arc<Manifest>) -> Result<Arc<read::Reader>> {
        let compact = self.catalog.read(move |tx| blobs::compact_blobs(tx, &digest)).await?;
        Ok(Arc::new(read::Reader::new(self.disk.clone(), &self.holds, &manifest, compact)))
    }

    /// A reading side that knows no blob yet, for files that are sealed one after the other: see [`Store::add_to`].
    pub fn growing_reader(&self) -> Arc<read::Reader> {
        Arc::new(read::Reader::growing(self.disk.clone(), &self.holds))
    }

    /// Makes sealed blobs readable through `reader`.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn add_to(&self, reader: &read::Reader, digests: Vec<Digest>) -> Result<()> {
        let asked = digests.clone();
        let compact = self.catalog.read(move |tx| blobs::compact_among(tx, &asked)).await?;
        reader.add(digests, compact);
        Ok(())
    }

    /// Keeps a blob from being punched, also one that is still to be published, for as long as what is returned lives.
    pub fn hold(&self, digest: Digest) -> read::Hold {
        self.holds.hold(vec![digest])
    }

    /// Bytes that may be taken from the filesystem now: what is free less the reserve.
    ///
    /// # Errors
    /// The I/O error.
    pub fn available_bytes(&self) -> Result<u64> {
        Ok(self.disk.free_bytes()?.saturating_sub(limits::DISK_RESERVE_BYTES))
    }
}

fn stopped() -> Error {
    Error::unavailable("STORE_STOPPED", "the store has stopped").remedy("restart ckptd and look at its log")
}

/// Undoes interrupted publishes, finishes interrupted removals, drops flights without an owner. Runs before anything else may.
fn recover(disk: &Disk, catalog: &Catalog) -> Result<()> {
    let interrupted = catalog.write_blocking(blobs::interrupted_publishing)?;
    for (digest, flight, number, has_row) in interrupted {
        if !has_row && disk.unpublish(&digest, &flight, number)? {
            disk.sync_filesystem()?;
        }
        catalog.write_blocking(move |tx| blobs::end_publishing(tx, &digest))?;
    }
    for blob in catalog.write_blocking(blobs::doomed)? {
        disk.remove_blob(&blob.digest)?;
        disk.sync_directories(std::iter::once(&blob.digest))?;
        catalog.write_blocking(move |tx| blobs::forget(tx, blob.id))?;
    }
    catalog.write_blocking(|tx| checkpoints::drop_unnamed_manifests(tx).map(|_| ()))?;
    let abandoned = catalog.write_blocking(|tx| {
        let mut abandoned = Vec::new();
        for flight in fills::flights(tx)?.into_iter().chain(placements::flights(tx)?) {
            if !checkpoints::flight_is_needed(tx, &flight)? {
                fills::delete(tx, &flight)?;
                placements::forget_flight(tx, &flight)?;
                abandoned.push(flight);
            }
        }
        Ok(abandoned)
    })?;
    let on_disk = disk.flights()?;
    let needed = catalog.write_blocking(move |tx| {
        on_disk
            .into_iter()
            .map(|flight| Ok((checkpoints::flight_is_needed(tx, &flight)?, flight)))
            .collect::<Result<Vec<_>>>()
    })?;
    for (_, flight) in needed.into_iter().filter(|(needed, _)| !needed) {
        disk.end_flight(&flight)?;
    }
    if !abandoned.is_empty() {
        tracing::info!(flights = abandoned.len(), "dropped what interrupted flights had left");
    }
    Ok(())
}
