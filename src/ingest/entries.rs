//! Memory for the entries of trees while they are brought in: all together take as much as `memory.budget`, [`limits::ENTRY_MEMORY_BYTES`] each.
//!
//! How many a tree has is known only once it is in memory, so [`limits::LISTINGS_AT_A_TIME`] are listed at a time. Where there is no room for what was
//! listed it is let go, the room is waited for, and the tree is listed again: nobody waits with a tree in memory. Whoever has room keeps it until its flight
//! ends and never waits for more, so nobody waits for who waits himself. A stream, of which only the end tells how many come, takes room while
//! they come, and ends, to be tried again, where there is none.

use std::sync::Arc;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use super::plan;
use super::{Settings, Shared, retry};
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::source::{Opened, Source};

/// Entries that a stream takes room for at a time.
const STEP: usize = 256;

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
    listings: Semaphore,
    entries: Arc<Semaphore>,
    given_back: Arc<Notify>,
}

impl Rooms {
    pub(super) fn new(settings: &Settings) -> Self {
        let entries = Arc::new(Semaphore::new(plan::most_entries(settings)));
        Self { listings: Semaphore::new(limits::LISTINGS_AT_A_TIME), entries, given_back: Arc::default() }
    }

    async fn listing(&self) -> Result<SemaphorePermit<'_>> {
        self.listings.acquire().await.map_err(|_| closed())
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

    /// Sees to it that a stream has room for `entries` in all.
    ///
    /// # Errors
    /// `MEMORY_SHORT`.
    pub(super) fn reach(&self, room: &mut Room, entries: usize) -> Result<()> {
        let Some(missing) = entries.checked_sub(room.entries()).filter(|missing| *missing > 0) else { return Ok(()) };
        let more = self.at_once(missing.max(STEP)).or_else(|| self.at_once(missing)).ok_or_else(|| {
            let message = "the trees that are being brought in have as many entries as there is memory for";
            Error::unavailable("MEMORY_SHORT", message)
                .remedy("try again when others are done, or ask the operator to raise memory.budget, of which each entry takes 1 KiB")
        })?;
        room.merge(more);
        Ok(())
    }
}

impl Shared {
    /// What a source has, with room for it where it is a listing.
    ///
    /// # Errors
    /// Those of the source, once it was asked often enough; `TOO_MANY_ENTRIES`.
    pub(super) async fn open(&self, source: &Arc<dyn Source>) -> Result<(Opened, Option<Room>)> {
        let mut room: Option<Room> = None;
        loop {
            let attempt = || async {
                let _turn = self.rooms.listing().await?;
                source.open().await
            };
            let opened = retry::until_it_works(self.settings.attempts, attempt).await?;
            let Opened::Listed(listing) = &opened else { return Ok((opened, None)) };
            let entries = listing.entries.len();
            plan::check_entries(entries, &self.settings)?;
            if room.as_ref().is_some_and(|room| room.entries() >= entries) {
                return Ok((opened, room));
            }
            drop(room.take());
            match self.rooms.at_once(entries) {
                Some(room) => return Ok((opened, Some(room))),
                None => {
                    drop(opened);
                    room = Some(self.rooms.wait_for(entries).await);
                }
            }
        }
    }
}

fn closed() -> Error {
    Error::new(Kind::Cancelled, "STOPPING", "ckptd is stopping")
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!((refused.kind(), refused.reason()), (Kind::Unavailable, "MEMORY_SHORT"));
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
