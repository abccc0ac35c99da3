//! One upload: where it is, who hands pieces over, and how it ends.
//!
//! Its position is under a mutex that is never held over an await. A piece is handed over in two steps: room is waited for, then, under
//! the mutex, the offset is compared, the piece put and the position moved. So of two requests with the same piece one is taken, and a
//! request that is dropped while it waits has changed nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::chunk::{Body, DEFAULT_ID, Range};
use super::refusal::Refusal;
use crate::error::{Error, Result};
use crate::ingest::Ending;
use crate::source::local::{Feed, StreamDigest};

/// How long a piece waits for room: half of what the client waits for an answer. Then it is asked to come again.
pub(super) const ROOM_PATIENCE: Duration = Duration::from_secs(300);

/// How long the end of what is under way is waited for when nobody reads any more: it is being recorded.
const OUTCOME_PATIENCE: Duration = Duration::from_secs(60);

/// See the module's page.
pub(super) struct Upload {
    id: String,
    /// The upload whose place this one took.
    took_place_of: String,
    created_ms: i64,
    feed: Feed,
    position: Mutex<Position>,
    given_up: Notify,
    ending: Ending,
}

struct Position {
    expected: u64,
    touched: Instant,
    /// Requests that wait for room.
    waiting: u32,
    /// The digest stated at the end was another: a new upload of the same id may begin.
    wrong: bool,
    /// All is sent; the digest that it has.
    ended: Option<StreamDigest>,
    /// It takes nothing any more, because of this.
    closed: Option<&'static str>,
}

/// Counts a request that waits for room.
struct Waiting<'a>(&'a Upload);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut position = self.0.lock();
        position.waiting -= 1;
        position.touched = Instant::now();
    }
}

impl Upload {
    pub(super) fn new(id: &str, took_place_of: String, created_ms: i64, feed: Feed) -> Self {
        let position =
            Position { expected: 0, touched: Instant::now(), waiting: 0, wrong: false, ended: None, closed: None };
        Self {
            id: id.to_owned(),
            took_place_of,
            created_ms,
            feed,
            position: Mutex::new(position),
            given_up: Notify::new(),
            ending: Ending::default(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether it is of the record that was made then.
    pub(super) fn is_of(&self, created_ms: i64) -> bool {
        self.created_ms == created_ms
    }

    /// Whether `id` names the upload whose place this one took.
    pub(super) fn took_place_of(&self, id: &str) -> bool {
        self.took_place_of == id
    }

    /// Where the next piece begins.
    pub(super) fn expected(&self) -> u64 {
        self.lock().expected
    }

    /// Whether a piece of `range` under this upload's id begins a new one rather than repeat what is here.
    pub(super) fn begins_again(&self, range: Range) -> bool {
        let position = self.lock();
        let repeated = position.expected == range.end || position.expected == 0;
        range.start == 0 && (position.closed.is_some() || position.wrong || (self.id == DEFAULT_ID && !repeated))
    }

    /// Takes a piece; where the next one begins.
    pub(super) async fn take(&self, range: Range, piece: Body) -> Result<u64, Refusal> {
        self.check(range)?;
        self.lock().waiting += 1;
        let waiting = Waiting(self);
        let Ok(room) = tokio::time::timeout(ROOM_PATIENCE, self.feed.room(range.length())).await else {
            return Err(Refusal::Busy("the store is slower than the network"));
        };
        drop(waiting);
        let Some(room) = room else { return Err(self.why_over().await) };
        let mut position = self.lock();
        position.admits(range)?;
        room.put(piece.0);
        position.expected = range.end;
        Ok(range.end)
    }

    fn check(&self, range: Range) -> Result<(), Refusal> {
        self.lock().admits(range)
    }

    /// Says that all is sent and has `digest`; repeating it does nothing.
    pub(super) async fn end(&self, digest: StreamDigest) -> Result<(), Refusal> {
        let (expected, ended) = {
            let position = self.lock();
            (position.expected, position.ended)
        };
        if let Some(ended) = ended {
            return if ended == digest { Ok(()) } else { Err(Refusal::WrongDigest) };
        }
        let Some(found) = self.feed.digest().await else { return Err(self.why_over().await) };
        {
            let mut position = self.lock();
            if position.expected != expected {
                return Err(Refusal::Malformed("a piece was sent while the upload was being ended"));
            }
            if let Some(why) = position.closed {
                return Err(Refusal::Gone(why.to_owned()));
            }
            position.touched = Instant::now();
            if found != digest {
                position.wrong = true;
                return Err(Refusal::WrongDigest);
            }
            position.ended = Some(found);
        }
        self.feed.end().await;
        Ok(())
    }

    /// Gives it up for the sake of another, unless all of it is here; whether it was.
    pub(super) fn give_up(&self) -> bool {
        let given_up = self.close("another upload of this checkpoint took the place of this one");
        if given_up {
            self.given_up.notify_one();
        }
        given_up
    }

    /// Takes nothing any more because of `why`, unless all of it is here; whether it was not.
    pub(super) fn close(&self, why: &'static str) -> bool {
        let mut position = self.lock();
        if position.ended.is_some() {
            return false;
        }
        position.closed.get_or_insert(why);
        true
    }

    /// Resolves when it is given up, or was silent for `idle`; then it takes nothing any more. Whether it was silent.
    pub(super) async fn abandoned(&self, idle: Duration) -> bool {
        loop {
            let until = self.lock().touched + idle;
            tokio::select! {
                () = self.given_up.notified() => return false,
                () = tokio::time::sleep_until(until) => {}
            }
            let mut position = self.lock();
            if position.ended.is_some() || position.waiting > 0 {
                position.touched = Instant::now();
            } else if position.touched + idle <= Instant::now() {
                position.closed = Some("the upload was silent for too long and was dropped; start it again");
                return true;
            }
        }
    }

    /// What becomes of it.
    pub(super) fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Why nobody reads what is sent.
    async fn why_over(&self) -> Refusal {
        if let Some(why) = self.lock().closed {
            return Refusal::Gone(why.to_owned());
        }
        match tokio::time::timeout(OUTCOME_PATIENCE, self.ending().concluded()).await {
            Ok(Err(error)) => Refusal::Failed(error),
            Ok(Ok(())) => Refusal::Gone("everything was sent already".to_owned()),
            Err(_) => Refusal::Failed(Error::internal("what was sent is not read and it is not known why")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Position {
    /// Whether a piece of `range` is the next.
    fn admits(&mut self, range: Range) -> Result<(), Refusal> {
        self.touched = Instant::now();
        if let Some(why) = self.closed {
            return Err(Refusal::Gone(why.to_owned()));
        }
        if self.ended.is_some() {
            return Err(Refusal::Gone("everything was sent already".to_owned()));
        }
        if range.start != self.expected {
            return Err(Refusal::Expected(self.expected));
        }
        Ok(())
    }
}
