//! Memory for the entries of trees while they are brought in: all together take as much as `memory.budget`, [`ENTRY_MEMORY_BYTES`](crate::limits::ENTRY_MEMORY_BYTES) each.
//!
//! Room is taken while they come. A listing for which there is none is let go, room for what it had and more is waited for, and the tree is listed again:
//! nobody waits with a listed tree in memory. What is not needed after all is given back, the rest when the flight ends.
//!
//! A stream waits where it is, for room or for its turn to go *beyond*: one at a time has as much as it needs, besides all others. It is one that runs already,
//! with whatever else it must have, so it comes to its end, and after it the next; listings, which still wait for a slot when they have room, may not.
//! So all together never have more than twice the budget's worth.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::plan;
use super::{Settings, Shared, lock, retry};
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
    /// A stream has as much as it needs then.
    beyond: Option<OwnedSemaphorePermit>,
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

    /// Gives back what is more than room for `entries`.
    pub(super) fn trim(&mut self, entries: usize) {
        let surplus = self.entries().saturating_sub(entries);
        drop(self.taken.as_mut().and_then(|taken| taken.split(surplus)));
        self.given_back.notify_waiters();
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.taken.take().is_some() {
            self.given_back.notify_waiters();
        }
    }
}

/// All the room there is.
pub(super) struct Rooms {
    entries: Arc<Semaphore>,
    beyond: Arc<Semaphore>,
    given_back: Arc<Notify>,
}

impl Rooms {
    pub(super) fn new(settings: &Settings) -> Self {
        let entries = Arc::new(Semaphore::new(plan::most_entries(settings)));
        Self { entries, beyond: Arc::new(Semaphore::new(1)), given_back: Arc::default() }
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
        let mut room = self.none();
        room.taken = Some(taken);
        Some(room)
    }

    /// Room for a stream of which nothing has come yet.
    pub(super) fn none(&self) -> Room {
        Room { taken: None, beyond: None, given_back: self.given_back.clone() }
    }

    /// Whether there is room for `entries` in all, taken now if need be.
    pub(super) fn reach_at_once(&self, room: &mut Room, entries: usize) -> bool {
        let missing = entries.saturating_sub(room.entries());
        if missing == 0 || room.beyond.is_some() {
            return true;
        }
        match self.at_once(missing.max(STEP)).or_else(|| self.at_once(missing)) {
            Some(more) => room.merge(more),
            None => return false,
        }
        true
    }

    /// Waits until a stream has room for `entries` in all, or for its turn to have more than there is.
    pub(super) async fn reach(&self, room: &mut Room, entries: usize) {
        while !self.reach_at_once(room, entries) {
            let missing = entries - room.entries();
            tokio::select! {
                more = self.wait_for(missing) => room.merge(more),
                // Never closed.
                beyond = self.beyond.clone().acquire_owned() => room.beyond = beyond.ok(),
            }
        }
    }
}

impl Shared {
    /// What a source has; of a listing with room for its entries.
    ///
    /// # Errors
    /// Those of the source, once it was asked often enough; `TOO_MANY_ENTRIES`.
    pub(super) async fn open(self: &Arc<Self>, source: &Arc<dyn Source>) -> Result<(Opened, Room)> {
        let most = plan::most_entries(&self.settings);
        let mut wanted = 0;
        loop {
            let room = Arc::new(Mutex::new(self.rooms.wait_for(wanted).await));
            // Of how many it was told last that there is no room for them.
            let short = Arc::new(AtomicUsize::new(0));
            let counter = self.counter(&room, &short);
            let opened = retry::until_it_works(self.settings.attempts, || source.open(&counter)).await;
            let entries = match &opened {
                Ok(Opened::Listed(listing)) => listing.entries.len(),
                Ok(Opened::Streamed(_)) | Err(_) => 0,
            };
            let opened = opened.and_then(|opened| counter(entries).map(|()| opened));
            match (opened, short.load(Ordering::Relaxed)) {
                (Ok(opened), _) => {
                    // Of an attempt that was given up a thread may hang in its file system: it has no part in it.
                    let mut room = std::mem::replace(&mut *lock(&room), self.rooms.none());
                    room.trim(entries);
                    return Ok((opened, room));
                }
                (Err(error), 0) => return Err(error),
                (Err(_), entries) => wanted = (entries + (entries / 8).max(STEP)).min(most),
            }
        }
    }

    fn counter(self: &Arc<Self>, room: &Arc<Mutex<Room>>, short: &Arc<AtomicUsize>) -> Counter {
        let (shared, room, short) = (self.clone(), Arc::downgrade(room), short.clone());
        Arc::new(move |entries| {
            plan::check_entries(entries, &shared.settings)?;
            let room = room.upgrade().ok_or_else(|| Error::new(Kind::Cancelled, SHORT, "this was given up"))?;
            if shared.rooms.reach_at_once(&mut lock(&room), entries) {
                return Ok(());
            }
            short.store(entries, Ordering::Relaxed);
            // Not to be tried again before there is room.
            Err(Error::new(Kind::NoSpace, SHORT, "there is no room for its entries now"))
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

    #[tokio::test]
    async fn one_stream_at_a_time_goes_beyond_what_there_is() {
        let rooms = Arc::new(rooms(600));
        let (mut one, mut two) = (rooms.none(), rooms.none());
        for entries in 1..=STEP {
            rooms.reach(&mut one, entries).await;
        }
        assert_eq!(one.entries(), STEP);
        rooms.reach(&mut two, 1).await;
        // Less is left than a step: what is needed is taken.
        rooms.reach(&mut one, STEP + 1).await;
        assert_eq!((one.entries(), one.beyond.is_some()), (STEP + 1, false));
        rooms.reach(&mut one, 10_000).await;
        assert!(one.beyond.is_some());
        let other = {
            let rooms = rooms.clone();
            tokio::spawn(async move {
                rooms.reach(&mut two, 500).await;
                two
            })
        };
        tokio::task::yield_now().await;
        assert!(!other.is_finished(), "there is no room, and it is not its turn");
        drop(one);
        let two = other.await.unwrap();
        assert!(two.beyond.is_some() || two.entries() >= 500);
    }

    #[tokio::test]
    async fn what_is_not_needed_is_given_back() {
        let rooms = rooms(600);
        let mut room = rooms.at_once(500).unwrap();
        room.trim(3);
        assert_eq!(room.entries(), 3);
        assert!(rooms.at_once(597).is_some() && rooms.at_once(598).is_none());
        room.trim(0);
        assert!(rooms.at_once(600).is_some());
        room.trim(9);
        assert_eq!(room.entries(), 0);
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
