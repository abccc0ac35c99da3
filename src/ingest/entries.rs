//! Memory for the entries of trees while they are brought in: all together take as much as `memory.budget`, [`ENTRY_MEMORY_BYTES`](crate::limits::ENTRY_MEMORY_BYTES) each.
//!
//! Room is taken while they come, and not waited for then. A listing for which there is none is let go, room for twice as much as it had is waited for, and
//! the tree is listed again: nobody waits with a tree in memory, so nobody waits for who waits himself. Room is kept until the flight ends. A stream
//! ends, to be tried again, where there is none.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::plan;
use super::{Settings, Shared, retry};
use crate::error::{Error, Kind, Result};
use crate::source::{Counter, Opened, Source};

/// Entries that room is taken for at a time.
const STEP: usize = 256;

/// Reason of who found no room.
const SHORT: &str = "MEMORY_SHORT";

/// Room for so many entries; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Room {
    taken: Option<OwnedSemaphorePermit>,
    given_back: Arc<Notify>,
}

impl Room {
    fn entries(&self) -> usize {
        self.taken.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }

    fn merge(&mut self, mut other: Self) {
        match (&mut self.taken, other.taken.take()) {
            (Some(taken), Some(more)) => taken.merge(more),
            (taken, more) => *taken = taken.take().or(more),
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        drop(self.taken.take());
        self.given_back.notify_waiters();
    }
}

/// All the room there is.
pub(super) struct Rooms {
    entries: Arc<Semaphore>,
    given_back: Arc<Notify>,
}

impl Rooms {
    pub(super) fn new(settings: &Settings) -> Self {
        let entries = Arc::new(Semaphore::new(plan::most_entries(settings)));
        Self { entries, given_back: Arc::default() }
    }

    /// Not in turn: who waits for much would have all that is free meanwhile, and streams none.
    async fn wait_for(&self, entries: usize) -> Room {
        loop {
            let mut given_back = std::pin::pin!(self.given_back.notified());
            given_back.as_mut().enable();
            if let Some(room) = self.at_once(entries) {
                return room;
            }
            given_back.await;
        }
    }

    fn at_once(&self, entries: usize) -> Option<Room> {
        let taken = self.entries.clone().try_acquire_many_owned(u32::try_from(entries).ok()?).ok()?;
        Some(Room { taken: Some(taken), given_back: self.given_back.clone() })
    }

    /// Room for a stream of which nothing has come yet.
    pub(super) fn of_stream(&self) -> Room {
        Room { taken: None, given_back: self.given_back.clone() }
    }

    /// Sees to it that there is room for `entries` in all.
    ///
    /// # Errors
    /// `MEMORY_SHORT`.
    pub(super) fn reach(&self, room: &mut Room, entries: usize) -> Result<()> {
        let Some(missing) = entries.checked_sub(room.entries()).filter(|missing| *missing > 0) else { return Ok(()) };
        let more = self.at_once(missing.max(STEP)).or_else(|| self.at_once(missing)).ok_or_else(|| {
            let message = "the trees that are being brought in have as many entries as there is memory for";
            Error::unavailable(SHORT, message)
                .remedy("try again when others are done, or ask the operator to raise memory.budget, of which each entry takes 1 KiB")
        })?;
        room.merge(more);
        Ok(())
    }
}

impl Shared {
    /// What a source has, with room for its entries.
    ///
    /// # Errors
    /// Those of the source, once it was asked often enough; `TOO_MANY_ENTRIES`.
    pub(super) async fn open(self: &Arc<Self>, source: &Arc<dyn Source>) -> Result<(Opened, Arc<Mutex<Room>>)> {
        let most = plan::most_entries(&self.settings);
        let mut wanted = 0;
        loop {
            let room = Arc::new(Mutex::new(self.rooms.wait_for(wanted).await));
            // Of how many it was told last that there is no room for them.
            let short = Arc::new(AtomicUsize::new(0));
            let counter = self.counter(&room, &short);
            let opened = retry::until_it_works(self.settings.attempts, || source.open(&counter)).await;
            let opened = opened.and_then(|opened| {
                if let Opened::Listed(listing) = &opened {
                    counter(listing.entries.len())?;
                }
                Ok(opened)
            });
            match (opened, short.load(Ordering::Relaxed)) {
                (Ok(opened), _) => return Ok((opened, room)),
                (Err(error), 0) => return Err(error),
                (Err(_), entries) => wanted = (2 * entries).min(most),
            }
        }
    }

    fn counter(self: &Arc<Self>, room: &Arc<Mutex<Room>>, short: &Arc<AtomicUsize>) -> Counter {
        let (shared, room, short) = (self.clone(), room.clone(), short.clone());
        Arc::new(move |entries| {
            plan::check_entries(entries, &shared.settings)?;
            let mut room = room.lock().unwrap_or_else(PoisonError::into_inner);
            shared.rooms.reach(&mut room, entries).map_err(|error| {
                short.store(entries, Ordering::Relaxed);
                // Not to be tried again before there is room.
                Error::new(Kind::NoSpace, SHORT, "there is no room for its entries now").because(error)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    fn rooms(entries: u64) -> Rooms {
        let settings = Settings { memory_budget_bytes: entries * limits::ENTRY_MEMORY_BYTES, ..Settings::default() };
        Rooms::new(&settings)
    }

    #[test]
    fn streams_take_room_as_they_need_it_and_are_refused_where_there_is_none() {
        let rooms = rooms(600);
        let mut one = rooms.of_stream();
        let mut two = rooms.of_stream();
        (1..=STEP).for_each(|entries| rooms.reach(&mut one, entries).unwrap());
        assert_eq!(one.entries(), STEP);
        rooms.reach(&mut two, 1).unwrap();
        // Less is left than a step: what is needed is taken.
        rooms.reach(&mut one, STEP + 1).unwrap();
        assert_eq!(one.entries(), STEP + 1);
        let refused = rooms.reach(&mut one, 600).unwrap_err();
        assert_eq!((refused.kind(), refused.reason()), (Kind::Unavailable, SHORT));
        assert_eq!(one.entries(), STEP + 1, "it keeps what it has");
        drop(two);
        rooms.reach(&mut one, 600).unwrap();
    }

    #[tokio::test]
    async fn who_waits_for_room_gets_it_when_another_is_done() {
        let rooms = Arc::new(rooms(100));
        let first = rooms.at_once(60).unwrap();
        assert!(rooms.at_once(41).is_none());
        let waiting = {
            let rooms = rooms.clone();
            tokio::spawn(async move { rooms.wait_for(41).await })
        };
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert!(rooms.at_once(40).is_some(), "who waits has nothing of it");
        drop(first);
        assert_eq!(waiting.await.unwrap().entries(), 41);
    }
}
