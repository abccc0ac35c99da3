//! How many bodies of one checkpoint are in memory at a time.
//!
//! Pieces are taken in order, so a client that keeps to the protocol sends one at a time and, where a connection broke, the same again. What else
//! comes for its checkpoint waits unread in its connection: whoever has a token holds [`AT_A_TIME`] pieces of the host's memory and no more, and
//! holds up nobody but itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::refusal::Refusal;

/// Bodies of one checkpoint: one that waits to be written, one that comes.
pub(super) const AT_A_TIME: usize = 2;

/// See the module's page.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<String, Arc<Semaphore>>>);

/// A body may be in memory for as long as this lives.
pub(super) struct Place<'a> {
    places: &'a Places,
    checkpoint: &'a str,
    permit: Option<OwnedSemaphorePermit>,
}

impl Places {
    /// A place for a body of `checkpoint`, for which it waits as long as `patience`.
    pub(super) async fn take<'a>(&'a self, checkpoint: &'a str, patience: Duration) -> Result<Place<'a>, Refusal> {
        // Made first, so that nothing is left in the table by who goes away while it waits.
        let mut place = Place { places: self, checkpoint, permit: None };
        let own = {
            let mut table = self.lock();
            let own = table.entry(checkpoint.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(AT_A_TIME)));
            Arc::clone(own)
        };
        place.permit = tokio::time::timeout(patience, own.acquire_owned()).await.ok().and_then(Result::ok);
        match place.permit {
            Some(_) => Ok(place),
            None => Err(Refusal::Busy("other pieces of this checkpoint are on their way")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Semaphore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut table = self.places.lock();
        drop(self.permit.take());
        // Who has a permit or waits for one has the semaphore, too.
        if table.get(self.checkpoint).is_some_and(|own| Arc::strong_count(own) == 1) {
            table.remove(self.checkpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;

    #[tokio::test]
    async fn a_checkpoint_has_so_many_places_and_leaves_none_behind() {
        let places = Places::default();
        let first = places.take("a", AT_ONCE).await.unwrap();
        let second = places.take("a", AT_ONCE).await.unwrap();
        assert!(matches!(places.take("a", AT_ONCE).await, Err(Refusal::Busy(_))));
        drop(places.take("b", AT_ONCE).await.unwrap());
        drop(first);
        let third = places.take("a", AT_ONCE).await.unwrap();
        drop((second, third));
        assert!(places.lock().is_empty());
    }

    #[tokio::test]
    async fn who_waits_gets_the_place_that_becomes_free() {
        let places = Places::default();
        let held = (places.take("a", AT_ONCE).await.unwrap(), places.take("a", AT_ONCE).await.unwrap());
        let waiting = places.take("a", Duration::from_secs(60));
        let freed = async {
            tokio::task::yield_now().await;
            drop(held);
        };
        let (got, ()) = tokio::join!(waiting, freed);
        drop(got.unwrap());
        assert!(places.lock().is_empty());
    }
}
