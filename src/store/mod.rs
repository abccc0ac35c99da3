//! The content-addressed store: blobs on the disk and their rows in the catalog, kept in step.
//!
//! **Order of writes.** A file is sealed in this order, in batches, by one *publisher* thread:
//! 1. its bytes are durable (`fdatasync`, or one `syncfs` for a batch);
//! 2. `publishing` rows say what is about to be renamed;
//! 3. renames into `blobs/`, directories synced;
//! 4. one transaction makes the blobs `sealed`, enters their chunks, notes what they borrow, and marks the files of the flight;
//! 5. borrowed ranges are punched (or shared, where the filesystem shares extents and offsets are congruent).
//!
//! A crash before 4 is undone at start from the `publishing` rows, a failure at once; a crash before 5 leaves a blob that is whole and reads right.
//! Removal ([`removal`]) is the reverse and runs on the same thread, in small steps that never meet a publish half-way: `doomed` rows, unlink or
//! punch, rows gone.
//!
//! **Reading** ([`read`]) never touches the catalog: what a checkpoint's blobs borrow is read once when it is opened. A home is never
//! punched or unlinked while a row borrows from it. The blobs of a served checkpoint and their homes are held ([`read::Holds`]) for as
//! long as anything of its session lives, and what is held is never punched: the kernel may have been given it. Unlinking is harmless. A hold is
//! taken before the rows are read that say what is here; who punches writes the rows before it looks for holds. Where the kernel may read blobs of which no
//! hold tells, given to it by a dead predecessor, nothing is punched but what was sealed just now ([`Store::punch_nothing`]).
//!
//! **Dedup.** Equal files are one blob. Of a new file, every run of known chunks of at least `limits::BORROW_MIN_BYTES` is borrowed.
//!
//! **Dedup is no oracle.** One store keeps what all owners have, and no owner is to learn from it what another has:
//! * Nobody asks whether bytes are here. A file is known by its digest only after all of it has come, been written and been digested, so bringing in
//!   what is here takes the same requests, bytes, space and memory as what is not; what is in excess goes when it is sealed. Flights, rates, orders of
//!   reading, charges and figures are each owner's own, and how full the host is, is for operators.
//! * A file whose blob is here goes through the same steps as another, flushes and transactions included, though it is dropped then: it would
//!   be done sooner otherwise.
//! * That a blob is compact is not told to a job: `user.ckptd.state` says of it what it would say were it whole.
//!
//! What remains is time, and it is the price of keeping equal bytes of different owners once. A compact file is read through the daemon until it is
//! hydrated, in the background from the moment its checkpoint is served, so a job that measures may see a slower first reading; at rest under pressure
//! that is as true of what an owner shares with itself. Pages of a blob that another's job reads are warm for all. A file with borrowed ranges is sealed
//! a punch later than one without, one that is dropped an unlink later. Each of these takes possession of the same bytes to provoke, none gives bytes away.

pub mod filling;
pub mod hydrate;
mod mend;
mod publish;
pub mod read;
pub mod removal;
mod rescue;
pub mod room;
mod runs;
mod sweep;
pub mod verify;
mod warm;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::catalog::blobs::{BlobRow, RowState};
use crate::catalog::{Catalog, blobs, checkpoints, fills};
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::limits;
use crate::manifest::Manifest;

pub use publish::Sealing;
pub use removal::{Removal, Swept, UnderWay};

/// Handle to the store; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    disk: Arc<Disk>,
    catalog: Catalog,
    holds: read::Holds,
    publisher: mpsc::Sender<Command>,
    hydrations: Arc<Semaphore>,
    removals: Arc<Semaphore>,
    begun: removal::Begun,
    bounds: room::Bounds,
}

/// What the publisher thread is asked.
enum Command {
    Publish(Sealing, oneshot::Sender<Result<()>>),
    Sweep(sweep::Sweep),
    GiveUp(BlobRow, oneshot::Sender<Result<u64>>),
}

impl Store {
    /// Opens the state directory, finishes or undoes the publishes that a crash left, and starts the publisher. Blocks, for a short time whatever
    /// the store holds: interrupted removals are left to [`Store::sweep_unnamed`].
    ///
    /// # Errors
    /// Those of [`Disk::open`] and [`Catalog::open`]; an interrupted publish that cannot be mended.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let disk = Arc::new(Disk::open(state_dir)?);
        let catalog = Catalog::open(&disk.catalog_path())?;
        let holds = read::Holds::default();
        recover(&disk, &catalog)?;
        let publisher = publish::start(disk.clone(), catalog.clone(), holds.clone())?;
        let removals = Arc::new(Semaphore::new(limits::REMOVALS_UNDER_WAY));
        let (hydrations, bounds) = (Arc::new(Semaphore::new(1)), room::Bounds::default());
        Ok(Self { disk, catalog, holds, publisher, hydrations, removals, begun: Default::default(), bounds })
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
        receiver.await.map_err(|_| unanswered())?
    }

    /// The reading side of one manifest's blobs.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn reader(&self, digest: Digest, manifest: Arc<Manifest>) -> Result<Arc<read::Reader>> {
        let hold = self.holds.hold_files(&manifest);
        let compact = self.catalog.read(move |tx| blobs::compact_blobs(tx, &digest)).await?;
        let reader = self.growing_reader();
        reader.add(hold, compact);
        Ok(reader)
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
        let hold = self.holds.hold(digests.clone());
        let compact = self.catalog.read(move |tx| blobs::compact_among(tx, &digests)).await?;
        reader.add(hold, compact);
        Ok(())
    }

    /// Keeps all blobs that are here from being punched for as long as the process lives.
    pub fn punch_nothing(&self) {
        self.holds.spare_all();
    }

    /// Keeps a blob from being punched, also one that is still to be published, for as long as what is returned lives.
    pub fn hold(&self, digest: Digest) -> read::Hold {
        self.holds.hold(vec![digest])
    }
}

/// What was taken and is not answered: see [`guarded`](crate::panics::guarded).
fn unanswered() -> Error {
    Error::internal("a panic ended a turn of the publisher")
}

fn stopped() -> Error {
    Error::unavailable("STORE_STOPPED", "the store has stopped").remedy("restart ckptd and look at its log")
}

/// Undoes interrupted publishes and clears away the files of flights that nobody needs. Runs before anything else may. What it leaves of rows is
/// for [`Store::sweep_unnamed`]: however much it is, nothing is served of it, and nothing waits for it.
fn recover(disk: &Disk, catalog: &Catalog) -> Result<()> {
    undo_publishes(disk, catalog)?;
    disbelieve_lost_files(disk, catalog)?;
    catalog.write_blocking(checkpoints::drop_unnamed_manifests)?;
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
    Ok(())
}

/// Rows of units are durable with the bytes that they speak of, but not with the name of the file that has them: where a crash took it, nothing is
/// here. This must be known before anybody makes that file again, empty and of the right size.
fn disbelieve_lost_files(disk: &Disk, catalog: &Catalog) -> Result<()> {
    for (flight, path, number, size) in catalog.write_blocking(fills::begun)? {
        if !disk.has_filling(&flight, number, size)? {
            tracing::info!(flight, number, "a file that was being filled is gone: it is fetched anew");
            catalog.write_blocking(move |tx| fills::forget_units(tx, &flight, &path))?;
        }
    }
    Ok(())
}

/// Undoes publishes that ended between note and rows; nothing may be publishing meanwhile.
fn undo_publishes(disk: &Disk, catalog: &Catalog) -> Result<()> {
    let interrupted = catalog.write_blocking(blobs::interrupted_publishing)?;
    let mut changed = false;
    for (digest, flight, number, row) in &interrupted {
        changed |= match row {
            None => disk.unpublish(digest, flight, *number)?,
            // What has its name may be what was to be unlinked, which has holes: nothing can be gone on with.
            Some(RowState::Doomed) => disk.remove_blob(digest).map(|()| true)?,
            Some(RowState::Kept) => false,
        };
    }
    if changed {
        disk.sync_filesystem()?;
    }
    catalog.write_blocking(move |tx| interrupted.iter().try_for_each(|(digest, ..)| blobs::end_publishing(tx, digest)))
}
