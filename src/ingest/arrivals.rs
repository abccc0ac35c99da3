//! Which checkpoints can be read while they fill, and through what.
//!
//! There is one [`Arriving`] per flight key for as long as a flight or a reader has it: a flight that begins takes the one that is being
//! read, so that a retry or a restart heals what is mounted. Of each filling checkpoint it is known, once its listing is, whether
//! it can be read yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::arriving::Arriving;
use super::{Ingests, Shared, lock};
use crate::catalog::checkpoints::{self, Record, State};
use crate::catalog::fills;
use crate::error::{Error, Result};
use crate::source::Listing;
use crate::store::Store;

/// Whether a filling checkpoint can be read.
#[derive(Clone)]
pub enum Arrival {
    /// Now, through this.
    Readable(Arc<Arriving>),
    /// Not before it is ready, and why.
    NotBefore(String),
}

#[derive(Clone)]
enum Known {
    Readable(Weak<Arriving>),
    NotBefore(String),
}

#[derive(Default)]
pub(super) struct Arrivals {
    by_key: Mutex<HashMap<String, Weak<Arriving>>>,
    by_checkpoint: Mutex<HashMap<String, Known>>,
}

impl Arrivals {
    /// The one of `key`, if somebody has it.
    pub(super) fn of_key(&self, key: &str) -> Option<Arc<Arriving>> {
        lock(&self.by_key).get(key).and_then(Weak::upgrade)
    }

    /// The one of `key` for a flight that brings `listing`: the one that is being read, or a new one.
    ///
    /// # Errors
    /// `SOURCE_CHANGED` where another tree is being read under this key; what the tree is refused for.
    pub(super) fn begin(&self, store: &Store, key: &str, listing: &Listing, is_local: bool) -> Result<Arc<Arriving>> {
        let fresh = Arriving::new(store.clone(), key.to_owned(), listing, is_local)?;
        match self.of_key(key) {
            Some(read) if read.tree() == fresh.tree() => {
                read.clear_failure();
                Ok(read)
            }
            Some(read) if read.is_read() => Err(moved_on()),
            _ => Ok(self.keep(key, Arc::new(fresh))),
        }
    }

    fn keep(&self, key: &str, arriving: Arc<Arriving>) -> Arc<Arriving> {
        let mut known = lock(&self.by_key);
        known.retain(|_, arriving| arriving.strong_count() > 0);
        if let Some(other) = known.get(key).and_then(Weak::upgrade).filter(|other| other.tree() == arriving.tree()) {
            return other;
        }
        known.insert(key.to_owned(), Arc::downgrade(&arriving));
        arriving
    }

    /// Notes what is known of a checkpoint whose listing is.
    pub(super) fn note(&self, checkpoint: &str, arriving: Option<&Arc<Arriving>>, otherwise: &str) {
        let known = match arriving {
            Some(arriving) => match arriving.obstacle() {
                None => Known::Readable(Arc::downgrade(arriving)),
                Some(why) => Known::NotBefore(why.to_owned()),
            },
            None => Known::NotBefore(otherwise.to_owned()),
        };
        lock(&self.by_checkpoint).insert(checkpoint.to_owned(), known);
    }

    /// Forgets a checkpoint that is decided.
    pub(super) fn forget(&self, checkpoint: &str) {
        lock(&self.by_checkpoint).remove(checkpoint);
    }
}

impl Ingests {
    /// Whether a checkpoint that fills can be read; `None` while its listing is not known, or once it is decided.
    pub fn arrival(&self, checkpoint: &str) -> Option<Arrival> {
        match lock(&self.0.arrivals.by_checkpoint).get(checkpoint)? {
            Known::Readable(arriving) => arriving.upgrade().map(Arrival::Readable),
            Known::NotBefore(why) => Some(Arrival::NotBefore(why.clone())),
        }
    }

    /// What a checkpoint that is not ready was shown as before: by this daemon, or by an earlier one, without asking the source.
    /// `None` where it was never shown.
    ///
    /// # Errors
    /// Those of the catalog and the store.
    pub async fn shown_before(&self, record: &Record) -> Result<Option<Arc<Arriving>>> {
        if let Some(Arrival::Readable(arriving)) = self.arrival(&record.id) {
            return Ok(Some(arriving));
        }
        let id = record.id.clone();
        let find = move |tx: &rusqlite::Connection| {
            let key = checkpoints::flight_of(tx, &id)?;
            Ok((fills::listing(tx, &key)?, key))
        };
        let (tree, key) = self.0.store.catalog().read(find).await?;
        let Some(tree) = tree else { return Ok(None) };
        if let Some(arriving) = self.0.arrivals.of_key(&key).filter(|arriving| **arriving.tree() == tree) {
            return Ok(Some(arriving));
        }
        let resumed = Arriving::resumed(self.0.store.clone(), key.clone(), tree).await?;
        let kept = self.0.arrivals.keep(&key, Arc::new(resumed));
        // Looked at again: what failed before it could be found here has told nobody.
        let id = record.id.clone();
        let now = self.0.store.catalog().read(move |tx| checkpoints::get(tx, &id)).await?;
        if let Some(failure) = now.filter(|now| now.state == State::Failed).and_then(|now| now.failure) {
            self.0.end_reading(&record.id, &failure.to_error()).await;
        }
        Ok(Some(kept))
    }

    /// Ends the reads that still wait for bytes of a checkpoint that is being removed.
    pub async fn end_reading(&self, checkpoint: &str) {
        let gone = Error::not_found("NO_SUCH_CHECKPOINT", "the checkpoint was removed");
        self.0.end_reading(checkpoint, &gone).await;
    }
}

impl Shared {
    /// Tells those who read what there is of a checkpoint that no more of it comes, unless another record has the same bytes brought. A flight
    /// tells them itself; this is for what ends before there is one, as it may after a restart, when readers wait already.
    pub(super) async fn end_reading(&self, checkpoint: &str, error: &Error) {
        let id = checkpoint.to_owned();
        let find = move |tx: &rusqlite::Connection| {
            let key = checkpoints::flight_of(tx, &id)?;
            Ok((checkpoints::others_fill(tx, &key, &id)?, key))
        };
        match self.store.catalog().read(find).await {
            Ok((false, key)) => {
                if let Some(arriving) = self.arrivals.of_key(&key) {
                    arriving.fail(error);
                }
            }
            Ok((true, _)) => {}
            Err(second) => {
                tracing::warn!(checkpoint, error = %second.report(), "whoever waits for more of it could not be told");
            }
        }
    }
}

/// Jobs see what the source no longer has: nothing else may take its place under them.
pub(super) fn moved_on() -> Error {
    Error::wrong_state("SOURCE_CHANGED", "the source has moved on from what jobs have been shown of it already")
        .remedy("release the jobs, then retry: it takes the source as it is then")
}
