//! Removal, on the publisher thread: doomed rows, then unlink or punch, then rows gone; in steps, between which others have their turn.
//!
//! A [`Sweep`] is what one caller wants given back: a list of [`Order`]s, each a walk through the catalog that remembers nothing but where it
//! is. One step is one small transaction and the files that it condemned, so nobody waits for longer than a step: not who publishes,
//! not who asks the catalog. Sweeps take turns, a step each.
//!
//! Within a step the publisher does nothing else, so what was condemned is unlinked before the same file can be published again. Rows of
//! unlinked blobs stay `doomed` until their names are durably gone, which many steps have in common; a file that is published again
//! meanwhile takes its row over, and a row that is not `doomed` is never dropped.
//!
//! A flight that nobody needs may be wanted again while its files go, which takes as long as they are large: they leave its name in the very transaction
//! that finds it unneeded, and whoever begins it after that one begins with nothing.
//!
//! A crash at any point leaves doomed rows, trees without a root, flights without a record or blobs without a name; the order
//! [`Order::Leftovers`] of the next start finds them all.

use std::collections::VecDeque;

use tokio::sync::{OwnedSemaphorePermit, watch};

use super::publish::Publisher;
use super::removal::{Ending, Progress, Swept};
use crate::catalog::blobs::{self, BlobRow, Condemned};
use crate::catalog::{checkpoints, fills, placements, retention};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::panics::guarded;

/// What is to be given back, and from where on.
#[derive(Debug)]
pub(super) enum Order {
    /// The links of a tree, and what only they named; nothing while a record roots it.
    Tree(Digest),
    /// A flight's rows and files, and what only it had sealed; nothing if a record needs it.
    Flight(String),
    /// Whatever was interrupted: becomes the orders below, and those of single trees and flights.
    Leftovers,
    /// Doomed rows after this one.
    Doomed(i64),
    /// Blobs after this one that nothing names.
    Unnamed(i64),
    /// What a crash between rows and punch (or a hydration that was cut short) left, in blobs after this one.
    Unpunched(i64),
}

/// What one caller wants given back, and how far it is.
#[derive(Debug)]
pub(super) struct Sweep {
    orders: VecDeque<Order>,
    /// Unlinked; their rows are to go once that is durable.
    unlinked: Vec<BlobRow>,
    swept: Swept,
    progress: watch::Sender<Progress>,
    _place: OwnedSemaphorePermit,
}

impl Sweep {
    /// One that has `place` among those that may be under way, and whoever watches it.
    pub(super) fn new(
        orders: impl IntoIterator<Item = Order>,
        place: OwnedSemaphorePermit,
    ) -> (Self, watch::Receiver<Progress>) {
        let (progress, watched) = watch::channel(Progress::default());
        let orders = orders.into_iter().collect();
        (Self { orders, unlinked: Vec::new(), swept: Swept::default(), progress, _place: place }, watched)
    }

    /// Takes a step; whether there is another to take.
    pub(super) fn step(&mut self, publisher: &Publisher) -> bool {
        let ended: Option<Ending> = match guarded("a step of a removal", || self.advance(publisher)) {
            Ok(true) => None,
            Ok(false) => Some(Ok(())),
            Err(error) => Some(Err(std::sync::Arc::new(error))),
        };
        let goes_on = ended.is_none();
        let swept = self.swept;
        self.progress.send_modify(|progress| *progress = Progress { swept, ended });
        goes_on
    }

    fn advance(&mut self, publisher: &Publisher) -> Result<bool> {
        publisher.disk.check_healthy()?;
        if let Some(order) = self.orders.pop_front() {
            let (condemned, next) = condemn(publisher, order)?;
            for order in next.into_iter().rev() {
                self.orders.push_front(order);
            }
            self.give_back(publisher, condemned)?;
        }
        if self.orders.is_empty() || self.unlinked.len() >= limits::REMOVAL_UNSYNCED {
            self.settle(publisher)?;
        }
        Ok(!self.orders.is_empty())
    }

    fn give_back(&mut self, publisher: &Publisher, condemned: Condemned) -> Result<()> {
        for blob in condemned.doomed {
            let stored = publisher.disk.stored_bytes(&blob.digest).unwrap_or(0);
            publisher.disk.remove_blob(&blob.digest)?;
            self.swept.blobs += 1;
            // The filesystem has them back when the last who has the file open closes it.
            let is_open = publisher.holds.is_held(&blob.digest);
            *(if is_open { &mut self.swept.open_bytes } else { &mut self.swept.freed_bytes }) += stored;
            self.unlinked.push(blob);
        }
        let mut trimmed = Vec::new();
        for (blob, gaps) in &condemned.remnants {
            if let Some((before, after)) = publisher.punch_unheld(&blob.digest, gaps)? {
                self.swept.freed_bytes += before.saturating_sub(after);
                trimmed.push((blob.id, after));
            }
        }
        if trimmed.is_empty() {
            return Ok(());
        }
        publisher.catalog.write_blocking(move |tx| {
            trimmed.iter().try_for_each(|(blob, stored)| blobs::set_stored_bytes(tx, *blob, *stored))
        })
    }

    /// Makes it durable that names are gone, and drops their rows.
    fn settle(&mut self, publisher: &Publisher) -> Result<()> {
        let unlinked = std::mem::take(&mut self.unlinked);
        publisher.disk.sync_directories(unlinked.iter().map(|blob| &blob.digest))?;
        for some in unlinked.chunks(limits::REMOVAL_STEP) {
            let some: Vec<i64> = some.iter().map(|blob| blob.id).collect();
            publisher.catalog.write_blocking(move |tx| some.iter().try_for_each(|blob| blobs::forget(tx, *blob)))?;
        }
        Ok(())
    }
}

/// The next small piece of an order: what it condemned, and the orders that follow from it.
fn condemn(publisher: &Publisher, order: Order) -> Result<(Condemned, Vec<Order>)> {
    match order {
        Order::Tree(manifest) => {
            let condemned = publisher.catalog.write_blocking(move |tx| {
                let lost = retention::unlink(tx, &manifest, limits::REMOVAL_STEP, limits::REMOVAL_STEP_CHUNKS)?;
                lost.map(|lost| blobs::condemn(tx, &lost)).transpose()
            })?;
            Ok(followed(condemned, Order::Tree(manifest)))
        }
        Order::Flight(flight) => condemn_flight(publisher, flight),
        Order::Leftovers => leftovers(publisher).map(|orders| (Condemned::default(), orders)),
        Order::Doomed(after) => {
            let doomed = publisher.catalog.read_blocking(move |tx| blobs::doomed(tx, after, limits::REMOVAL_STEP))?;
            let next = doomed.last().map(|blob| Order::Doomed(blob.id));
            Ok((Condemned { doomed, ..Default::default() }, next.into_iter().collect()))
        }
        Order::Unnamed(after) => condemn_unnamed(publisher, after),
        Order::Unpunched(after) => punch_again(publisher, after),
    }
}

/// Nothing follows where nothing was left to take.
fn followed(condemned: Option<Condemned>, next: Order) -> (Condemned, Vec<Order>) {
    condemned.map_or_else(Default::default, |condemned| (condemned, vec![next]))
}

fn condemn_flight(publisher: &Publisher, flight: String) -> Result<(Condemned, Vec<Order>)> {
    let (key, disk) = (flight.clone(), publisher.disk.clone());
    let (condemned, aside) = publisher.catalog.write_blocking(move |tx| {
        if checkpoints::flight_is_needed(tx, &key)? {
            return Ok((None, None));
        }
        let seen = placements::forget_flight(tx, &key, limits::REMOVAL_STEP)?;
        let lost = fills::forget(tx, &key, limits::REMOVAL_STEP)?;
        let lost = if seen > 0 { Some(lost.unwrap_or_default()) } else { lost };
        match lost {
            Some(lost) => Ok((Some(blobs::condemn(tx, &lost)?), None)),
            None => Ok((None, disk.set_flight_aside(&key)?)),
        }
    })?;
    if let Some(aside) = aside {
        publisher.disk.end_flight(&aside)?;
    }
    Ok(followed(condemned, Order::Flight(flight)))
}

fn leftovers(publisher: &Publisher) -> Result<Vec<Order>> {
    publisher.catalog.read_blocking(|tx| {
        let mut orders = vec![Order::Doomed(0)];
        orders.extend(retention::unrooted(tx)?.into_iter().map(Order::Tree));
        for flight in fills::flights(tx)?.into_iter().chain(placements::flights(tx)?) {
            if !checkpoints::flight_is_needed(tx, &flight)? {
                orders.push(Order::Flight(flight));
            }
        }
        orders.extend([Order::Unnamed(0), Order::Unpunched(0)]);
        Ok(orders)
    })
}

fn condemn_unnamed(publisher: &Publisher, after: i64) -> Result<(Condemned, Vec<Order>)> {
    let found = publisher.catalog.read_blocking(move |tx| {
        let until = blobs::step_after(tx, after, limits::SWEEP_STEP)?;
        until.map(|until| Ok((until, blobs::unnamed(tx, after, until)?))).transpose()
    })?;
    let Some((until, mut unnamed)) = found else { return Ok(Default::default()) };
    let next = if unnamed.len() > limits::REMOVAL_STEP {
        unnamed.truncate(limits::REMOVAL_STEP);
        unnamed.last().copied().unwrap_or(until)
    } else {
        until
    };
    let condemned = if unnamed.is_empty() {
        Condemned::default()
    } else {
        publisher.catalog.write_blocking(move |tx| blobs::condemn(tx, &unnamed))?
    };
    Ok((condemned, vec![Order::Unnamed(next)]))
}

fn punch_again(publisher: &Publisher, after: i64) -> Result<(Condemned, Vec<Order>)> {
    let found = publisher.catalog.read_blocking(move |tx| {
        let until = blobs::step_after(tx, after, limits::SWEEP_STEP)?;
        until.map(|until| Ok((until, blobs::unpunched(tx, after, until)?))).transpose()
    })?;
    let Some((until, unpunched)) = found else { return Ok(Default::default()) };
    for (blob, ranges) in unpunched {
        if let Some((_, stored)) = publisher.punch_unheld(&blob.digest, &ranges)? {
            publisher.catalog.write_blocking(move |tx| blobs::set_stored_bytes(tx, blob.id, stored))?;
        }
    }
    Ok((Condemned::default(), vec![Order::Unpunched(until)]))
}

impl Publisher {
    /// Punches a blob that nobody reads; what it occupied before and after. `None`: somebody may, and nothing was done.
    fn punch_unheld(&self, digest: &Digest, ranges: &[std::ops::Range<u64>]) -> Result<Option<(u64, u64)>> {
        if self.holds.is_spared(digest) {
            return Ok(None);
        }
        let before = match self.disk.stored_bytes(digest) {
            // It was lost: see `mend`.
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            before => before?,
        };
        self.disk.punch(digest, ranges)?;
        Ok(Some((before, self.disk.stored_bytes(digest)?)))
    }

    /// Punches the copies that a blob has of what it borrows; bytes given back, 0 where somebody holds it.
    ///
    /// The rows say that the copies do not count before the first is punched, and whoever begins to read takes its hold before it looks at the
    /// rows: so either its hold is seen here, after the rows, or the rows are seen there.
    pub(super) fn give_up_duplicates(&self, blob: BlobRow) -> Result<u64> {
        self.disk.check_healthy()?;
        if self.holds.is_spared(&blob.digest) {
            return Ok(0);
        }
        let ranges = self.catalog.write_blocking(move |tx| match blobs::sealed(tx, &blob.digest)? {
            Some(there) if there.id == blob.id => retention::give_up_duplicates(tx, blob.id),
            _ => Ok(Vec::new()),
        })?;
        if ranges.is_empty() {
            return Ok(0);
        }
        let Some((before, after)) = self.punch_unheld(&blob.digest, &ranges)? else {
            let stored = self.disk.stored_bytes(&blob.digest)?;
            self.catalog.write_blocking(move |tx| {
                let starts: Vec<u64> = ranges.iter().map(|range| range.start).collect();
                retention::keep_duplicates(tx, blob.id, &starts)?;
                blobs::set_stored_bytes(tx, blob.id, stored)
            })?;
            return Ok(0);
        };
        self.catalog.write_blocking(move |tx| blobs::set_stored_bytes(tx, blob.id, after))?;
        Ok(before.saturating_sub(after))
    }
}

/// The error of a sweep, for one of several who wait for it.
pub(super) fn shared(error: &std::sync::Arc<Error>) -> Error {
    error.share()
}
