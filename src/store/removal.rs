//! Giving up bytes, as it is asked for: checkpoints removed or evicted, flights forgotten, duplicates dropped.
//!
//! Each begins with one small transaction that decides, and after which nothing shows what goes: the record is gone, or `evicted`. The bytes
//! follow in steps on the publisher thread ([`sweep`]), whoever waits for them; a crash is finished by [`Store::sweep_unnamed`].
//! At most `limits::REMOVALS_UNDER_WAY` are under way; more wait before they decide anything.
//!
//! Whoever lacks room looks at those under way first ([`Store::under_way`]): their bytes count as taken until they are back, and need nobody
//! to give up others. He waits for what had begun when he came, and for each of them no longer than `WAITED_FOR` from its beginning, so that
//! neither a removal that takes long nor ever new ones hold him up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::read::Holds;
use super::sweep::{self, Order, Sweep};
use super::{Command, Store, stopped};
use crate::catalog::blobs::BlobRow;
use crate::catalog::checkpoints::{self, State};
use crate::catalog::retention;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits;

/// For how long from its beginning a removal is waited for by whoever lacks room: that of some 500,000 files is over by then.
const WAITED_FOR: Duration = Duration::from_secs(30);

/// How often it is looked meanwhile whether there is room enough already.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long after the end of a removal the filesystem may take to show what it has back.
const SHOWN_AFTER: Duration = Duration::from_millis(100);

/// What a removal gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Blobs unlinked.
    pub blobs: u64,
    /// Bytes given back to the filesystem.
    pub freed_bytes: u64,
    /// Bytes of unlinked blobs that somebody has still open, a job whose right is gone: given back when it closes them.
    pub open_bytes: u64,
}

/// How a sweep ended.
pub(super) type Ending = Result<(), Arc<Error>>;

/// How far a sweep is.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) swept: Swept,
    pub(super) ended: Option<Ending>,
}

/// A removal whose decision is durable. Dropping it stops nothing.
#[derive(Clone, Debug)]
pub struct Removal(watch::Receiver<Progress>);

/// Removals that were under way at some moment.
#[derive(Debug, Default)]
pub struct UnderWay(Vec<(Instant, watch::Receiver<Progress>)>);

impl UnderWay {
    /// Lets them go on for a moment; `false` at once where none is left to wait for, and another look at the room would find nothing else.
    pub async fn go_on(&mut self) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let ended = async {
            for (_, progress) in &mut self.0 {
                // One that was dropped has ended too.
                let _ = progress.wait_for(|progress| progress.ended.is_some()).await;
            }
        };
        if tokio::time::timeout(LOOK_EVERY, ended).await.is_ok() {
            tokio::time::sleep(SHOWN_AFTER).await;
            self.0.clear();
        } else {
            self.0.retain(|(begun, _)| begun.elapsed() < WAITED_FOR);
        }
        true
    }
}

/// Removals that have begun, with those that ended since somebody looked last.
pub(super) type Begun = Arc<Mutex<Vec<(Instant, watch::Receiver<Progress>)>>>;

impl Removal {
    /// What was given back by now.
    pub fn so_far(&self) -> Swept {
        self.0.borrow().swept
    }

    /// Waits for the end: all that was given back.
    ///
    /// # Errors
    /// Poisoned store; what was begun is finished at the next start.
    pub async fn end(&mut self) -> Result<Swept> {
        let progress = self.0.wait_for(|progress| progress.ended.is_some()).await.map_err(|_| stopped())?;
        match &progress.ended {
            Some(Err(error)) => Err(sweep::shared(error)),
            _ => Ok(progress.swept),
        }
    }
}

impl Store {
    /// Drops a checkpoint's record, the flight that fills it and the bytes that nothing else needs. On return the record is durably gone; the
    /// bytes follow: see [`Removal`]. One that has no record is removed already.
    ///
    /// # Errors
    /// Poisoned store; those of the catalog. Where it fails or is given up half-way, the next start finishes.
    pub async fn remove_checkpoint(&self, id: &str) -> Result<Removal> {
        self.disk().check_healthy()?;
        let place = self.place().await?;
        let key = id.to_owned();
        let (tree, flight) = self
            .catalog()
            .write(move |tx| {
                let flight = checkpoints::flight_of(tx, &key)?;
                Ok((checkpoints::delete(tx, &key)?, flight))
            })
            .await?;
        // What is sent in one stream is a flight of the checkpoint's own id, whatever the record says of it.
        let flights = [flight, id.to_owned()].into_iter().filter(|flight| !flight.is_empty()).map(Order::Flight);
        self.begin(Sweep::new(tree.map(Order::Tree).into_iter().chain(flights), place)).await
    }

    /// Gives up the bytes of a checkpoint and keeps its record, `evicted`. Returns when they are given back; `None` when it is not to be: it is not
    /// ready and stored, a pin or a job's right keeps it, or nothing would come of it now ([`Store::is_open`]).
    ///
    /// What others share stays; where another ready checkpoint has the same tree, that is all of it.
    ///
    /// # Errors
    /// As [`Store::remove_checkpoint`].
    pub async fn evict_checkpoint(&self, id: &str) -> Result<Option<Swept>> {
        self.disk().check_healthy()?;
        let place = self.place().await?;
        let (key, holds) = (id.to_owned(), self.holds.clone());
        let evicted = self
            .catalog()
            .write(move |tx| {
                let Some((State::Ready, Some(tree))) = retention::tree_of(tx, &key)? else { return Ok(None) };
                if is_held(tx, &tree, &holds)? || !retention::evict(tx, &key)? {
                    return Ok(None);
                }
                Ok(Some(tree))
            })
            .await?;
        let Some(tree) = evicted else { return Ok(None) };
        self.begin(Sweep::new([Order::Tree(tree)], place)).await?.end().await.map(Some)
    }

    /// Whether nothing would come of evicting a checkpoint now: every blob that only its tree names is held. Who reads the tree holds all of
    /// them, a job whose right is gone too; who reads another that borrows from it holds what that borrows from, and a scrub what it
    /// reads. The first and the last would keep the bytes of what is unlinked; the second would keep it from being unlinked.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn is_open(&self, id: &str) -> Result<bool> {
        let (key, holds) = (id.to_owned(), self.holds.clone());
        let look = move |tx: &rusqlite::Connection| match retention::tree_of(tx, &key)? {
            Some((State::Ready, Some(tree))) => is_held(tx, &tree, &holds),
            _ => Ok(false),
        };
        self.catalog().read(look).await
    }

    /// Forgets a flight that no record needs: its filling files, its rows, and what only it had sealed; done on return.
    ///
    /// # Errors
    /// As [`Store::remove_checkpoint`].
    pub async fn remove_flight(&self, flight: &str) -> Result<Swept> {
        let place = self.place().await?;
        self.begin(Sweep::new([Order::Flight(flight.to_owned())], place)).await?.end().await
    }

    /// Finishes what interrupted removals, evictions and flights left, and gives back whatever nothing names; done on return.
    ///
    /// # Errors
    /// As [`Store::remove_checkpoint`].
    pub async fn sweep_unnamed(&self) -> Result<Swept> {
        self.begin_sweeping().await?.end().await
    }

    /// [`Store::sweep_unnamed`], which is under way on return.
    ///
    /// # Errors
    /// The store has stopped.
    pub async fn begin_sweeping(&self) -> Result<Removal> {
        let place = self.place().await?;
        self.begin(Sweep::new([Order::Leftovers], place)).await
    }

    /// The removals that are under way now, but for those that are so for long: nobody knows how much longer.
    pub fn under_way(&self) -> UnderWay {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.retain(|(_, progress)| progress.borrow().ended.is_none() && progress.has_changed().is_ok());
        UnderWay(begun.iter().filter(|(begun, _)| begun.elapsed() < WAITED_FOR).cloned().collect())
    }

    /// Punches the copies that a hydrated blob has of what it borrows; bytes given back. 0 where somebody holds the blob: the kernel may
    /// have been given it.
    ///
    /// # Errors
    /// Poisoned store, the I/O error; a crash between rows and punch is mended at the next start.
    pub async fn give_up_duplicates(&self, blob: BlobRow) -> Result<u64> {
        let (answer, receiver) = oneshot::channel();
        self.publisher.send(Command::GiveUp(blob, answer)).await.map_err(|_| stopped())?;
        receiver.await.map_err(|_| super::unanswered())?
    }

    async fn begin(&self, (sweep, watched): (Sweep, watch::Receiver<Progress>)) -> Result<Removal> {
        {
            let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
            begun.retain(|(_, progress)| progress.borrow().ended.is_none() && progress.has_changed().is_ok());
            begun.push((Instant::now(), watched.clone()));
        }
        self.publisher.send(Command::Sweep(sweep)).await.map_err(|_| stopped())?;
        Ok(Removal(watched))
    }

    async fn place(&self) -> Result<tokio::sync::OwnedSemaphorePermit> {
        self.removals.clone().acquire_owned().await.map_err(|_| stopped())
    }
}

/// Whether all blobs are held that this tree alone names, of which there are some.
fn is_held(tx: &rusqlite::Connection, tree: &Digest, holds: &Holds) -> Result<bool> {
    let own = retention::own_blobs(tx, tree, limits::REMOVAL_STEP)?;
    Ok(!own.is_empty() && own.iter().all(|blob| holds.is_held(blob)))
}

#[cfg(test)]
pub(super) mod tests;
