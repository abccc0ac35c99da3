//! One upload: where it is, who hands pieces over, and how it ends.
//!
//! Its position is under a mutex that is never held over an await. A piece is handed over in three steps: room is waited for; it is kept for a later
//! run of the daemon, on a thread that ends whatever becomes of the request; and, under the mutex, it is put and the position moved. While one is kept
//! no other is taken. So of two requests with the same piece one is taken, a request that is dropped while it waits for room has changed nothing, and
//! what its sender was told of is found again after a kill.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::chunk::{Body, DEFAULT_ID, Range};
use super::refusal::Refusal;
use crate::error::{Error, Result};
use crate::in_place;
use crate::ingest::Ending;
use crate::panics::Essential;
use crate::source::local::{Feed, Room, StreamDigest};

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
    /// Whether a piece is being kept.
    keeping: bool,
    /// It is for the next run of the daemon to go on with.
    held: bool,
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
    /// One that begins.
    pub(super) fn new(id: &str, took_place_of: String, created_ms: i64, feed: Feed) -> Self {
        Self::at((0, None), id, took_place_of, created_ms, feed)
    }

    /// One that an earlier run of the daemon had under way, whose next piece begins at `expected`.
    /// All of it is here where it has this digest.
    pub(super) fn left(id: &str, created_ms: i64, feed: Feed, (expected, ended): (u64, Option<StreamDigest>)) -> Self {
        Self::at((expected, ended), id, String::new(), created_ms, feed)
    }

    fn at(
        (expected, ended): (u64, Option<StreamDigest>),
        id: &str,
        took_place_of: String,
        created_ms: i64,
        feed: Feed,
    ) -> Self {
        let position = Position {
            expected,
            touched: Instant::now(),
            waiting: 0,
            keeping: false,
            held: false,
            wrong: false,
            ended,
            closed: None,
        };
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
    pub(super) async fn take(self: &Arc<Self>, range: Range, piece: Body) -> Result<u64, Refusal> {
        self.lock().admits(range)?;
        self.lock().waiting += 1;
        let waiting = Waiting(self);
        let Ok(room) = tokio::time::timeout(ROOM_PATIENCE, self.feed.room(range.start, range.length())).await else {
            return Err(Refusal::Busy("the store is slower than the network"));
        };
        drop(waiting);
        let Some(room) = room else { return Err(self.why_over().await) };
        if !room.is_to_be_kept() {
            return self.put(range, room, piece);
        }
        let keeping = Keeping::begin(self, range)?;
        let kept = in_place::blocking(move || {
            room.keep(&piece.0, range.start);
            Ok(keeping.put(range, room, piece))
        });
        // A bug of ours, which the log shows. What was kept of it is kept again.
        kept.await.map_err(|_| Refusal::Busy("keeping the piece ended early"))?
    }

    fn put(&self, range: Range, room: Room, piece: Body) -> Result<u64, Refusal> {
        self.lock().take(range, room, piece)
    }

    /// Leaves it to the next run of the daemon, if that can go on with it: whoever sends it asks again until there is one. What is here wholly is
    /// sealed meanwhile. Whether it is left.
    pub(super) fn hold(&self, why: Error) -> bool {
        if !self.feed.survives() {
            return false;
        }
        let mut position = self.lock();
        position.held = true;
        if position.ended.is_none() {
            self.feed.leave(why);
        }
        true
    }

    /// Whether it is left to the next run of the daemon.
    pub(super) fn is_held(&self) -> bool {
        self.lock().held
    }

    /// Ends one that an earlier run of the daemon knew to be all here, once what it kept was read again and is what it was.
    pub(super) async fn end_again(self: &Arc<Self>, digest: StreamDigest) {
        let Some(found) = self.feed.digest().await else { return };
        if found == digest {
            return self.say_end(digest).await;
        }
        tracing::error!("what was kept of an upload is not what it was any more: it is to be sent again");
        self.lock().ended = None;
        self.give_up_because("what was kept of the upload is not what was sent any more; start it again");
    }

    /// Says that all is sent and has `digest`; repeating it does nothing.
    pub(super) async fn end(self: &Arc<Self>, digest: StreamDigest) -> Result<(), Refusal> {
        let (expected, ended) = {
            let position = self.lock();
            if position.held && position.ended.is_none() {
                return Err(held());
            }
            (position.expected, position.ended)
        };
        if let Some(ended) = ended {
            return if ended == digest { Ok(()) } else { Err(Refusal::WrongDigest) };
        }
        let Some(found) = self.feed.digest().await else { return Err(self.why_over().await) };
        {
            let mut position = self.lock();
            if position.expected != expected || position.keeping {
                return Err(Refusal::Malformed("a piece was sent while the upload was being ended"));
            }
            if position.held {
                return Err(held());
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
        self.say_end(found).await;
        Ok(())
    }

    /// Has the entries end, also where whoever asked for it goes away: it is not asked for twice.
    async fn say_end(self: &Arc<Self>, digest: StreamDigest) {
        let upload = Arc::clone(self);
        let said = tokio::spawn(async move {
            let _essential = Essential::new("an upload that is all here and would never end");
            upload.feed.end(digest).await;
        });
        let _ = said.await;
    }

    /// Gives it up for the sake of another, unless all of it is here; whether it was.
    pub(super) fn give_up(&self) -> bool {
        self.give_up_because("another upload of this checkpoint took the place of this one")
    }

    fn give_up_because(&self, why: &'static str) -> bool {
        let given_up = self.close(why);
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
            if position.ended.is_some() || position.waiting > 0 || position.keeping || position.held {
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
        if self.is_held() {
            return held();
        }
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

/// A piece is being kept; no other is taken meanwhile.
struct Keeping(Option<Arc<Upload>>);

impl Keeping {
    fn begin(upload: &Arc<Upload>, range: Range) -> Result<Self, Refusal> {
        let mut position = upload.lock();
        position.admits(range)?;
        position.keeping = true;
        Ok(Self(Some(Arc::clone(upload))))
    }

    /// Puts the piece, which is kept.
    fn put(mut self, range: Range, room: Room, piece: Body) -> Result<u64, Refusal> {
        let Some(upload) = self.0.take() else { return Err(Error::internal("a piece is put twice").into()) };
        let mut position = upload.lock();
        position.keeping = false;
        position.take(range, room, piece)
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        if let Some(upload) = &self.0 {
            upload.lock().keeping = false;
        }
    }
}

fn held() -> Refusal {
    Refusal::Busy("ckptd is being drained and goes on with this upload when it has been restarted")
}

impl Position {
    /// Takes the next piece; where the one behind it begins.
    fn take(&mut self, range: Range, room: Room, piece: Body) -> Result<u64, Refusal> {
        self.admits(range)?;
        room.put(piece.0);
        self.expected = range.end;
        Ok(range.end)
    }

    /// Whether a piece of `range` is the next.
    fn admits(&mut self, range: Range) -> Result<(), Refusal> {
        self.touched = Instant::now();
        if self.held {
            return Err(held());
        }
        if let Some(why) = self.closed {
            return Err(Refusal::Gone(why.to_owned()));
        }
        if self.ended.is_some() {
            return Err(Refusal::Gone("everything was sent already".to_owned()));
        }
        if range.start != self.expected || self.keeping {
            return Err(Refusal::Expected(self.expected));
        }
        Ok(())
    }
}
