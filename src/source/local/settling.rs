//! How far what was sent is settled: found again by a later run of the daemon, so that its sender is never asked for it.
//!
//! A piece is settled in two ways: in the [tail](Tail), from before its sender is told of it until it is not needed there any more; and then by the
//! rows of the members that its bytes belong to. The tail is needed from the first byte on that no row brings back, and from the last mark of the
//! digest on. So room for a piece is where the tail has room, which grows as members are recorded ([`Recorded`]).
//!
//! Members are recorded in any order. What counts are those that are, from the first on, and what is of the next one's bytes.
//!
//! What cannot be settled so gives the tail up, and the upload goes on without ([`Settling::give_up`]): where the tail cannot be written, where what
//! comes is an archive to be taken apart or one large file with holes, and where room is waited for in vain ([`IN_VAIN`]): a tar may go on for ever
//! without a member.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::archive::Span;
use crate::disk::{Disk, TAIL_BYTES, Tail};
use crate::error::{Error, Result};
use crate::source::Recorded;

/// How long room in the tail is waited for: longer than a slow disk needs to record what waits.
const IN_VAIN: Duration = Duration::from_secs(60);

/// See the module's page.
#[derive(Debug)]
pub(super) struct Settling {
    /// For whom the tail is made.
    about: Vec<u8>,
    tail: OnceLock<Tail>,
    state: Mutex<State>,
    /// Pieces are taken that end here or before: nothing before there is a tail, anything once it was given up.
    until: watch::Sender<u64>,
}

/// Where an earlier run of the daemon left an upload.
#[derive(Debug, Default)]
pub(super) struct From {
    /// Members that are recorded whole.
    pub(super) members: u64,
    /// The last one besides, where it is begun.
    pub(super) begun: Option<(Span, u64)>,
    /// Where in the tar what is recorded ends.
    pub(super) settled: u64,
    /// The last mark of the digest.
    pub(super) marked: u64,
}

#[derive(Debug)]
struct State {
    given_up: bool,
    marked: u64,
    settled: u64,
    /// Position of the first of `entries`.
    first: u64,
    entries: VecDeque<Entry>,
}

#[derive(Debug)]
struct Entry {
    span: Span,
    is_whole: bool,
    bytes: u64,
}

impl Settling {
    /// Of an upload that begins, for whoever `about` says.
    pub(super) fn new(about: Vec<u8>) -> Self {
        Self::of(about, &From::default())
    }

    /// Of one that an earlier run had under way, with its tail.
    pub(super) fn left(about: Vec<u8>, tail: Tail, from: &From) -> Self {
        let settling = Self::of(about, from);
        let _ = settling.tail.set(tail);
        settling.make_room(&settling.lock());
        settling
    }

    fn of(about: Vec<u8>, from: &From) -> Self {
        let entries = from.begun.map(|(span, bytes)| Entry { span, is_whole: false, bytes }).into_iter().collect();
        let &From { members, settled, marked, .. } = from;
        let state = Mutex::new(State { given_up: false, marked, settled, first: members, entries });
        Self { about, tail: OnceLock::new(), state, until: watch::Sender::new(0) }
    }

    /// Makes the tail, where there is none, in the directory of a flight.
    pub(super) async fn begin(self: &Arc<Self>, disk: &Arc<Disk>, flight: &str) {
        if self.tail.get().is_some() || !self.survives() {
            return;
        }
        let (own, disk, flight) = (Arc::clone(self), Arc::clone(disk), flight.to_owned());
        let made = tokio::task::spawn_blocking(move || {
            match disk.make_tail(&flight, &own.about) {
                Ok(tail) => drop(own.tail.set(tail)),
                Err(error) => own.gave_up(&error),
            }
            own.make_room(&own.lock());
        });
        let _ = made.await;
    }

    /// Waits for room for a piece that ends at `end`. Cancel-safe.
    pub(super) async fn room(self: &Arc<Self>, end: u64) {
        self.room_within(end, IN_VAIN).await;
    }

    async fn room_within(self: &Arc<Self>, end: u64, patience: Duration) {
        let mut until = self.until.subscribe();
        let has_room = until.wait_for(|until| *until >= end);
        // Before there is a tail somebody else has a turn, however long.
        if tokio::time::timeout(patience, has_room).await.is_err() && self.tail.get().is_some() {
            let own = Arc::clone(self);
            let unsettled = Error::unavailable("UPLOAD_UNSETTLED", "nothing of what comes is recorded");
            let _ = tokio::task::spawn_blocking(move || own.gave_up(&unsettled)).await;
        }
        let _ = until.wait_for(|until| *until >= end).await;
    }

    /// Keeps the piece that begins at `at` and is `runs` together, for which there was [room](Settling::room). Blocks.
    pub(super) fn keep(&self, runs: &[Bytes], at: u64) {
        self.write(|tail| tail.append(runs.iter().map(AsRef::as_ref), at));
    }

    /// Notes that all has come, which ends at `end`. Blocks.
    pub(super) fn set_ended(&self, end: u64) {
        self.write(|tail| tail.set_ended(end));
    }

    /// Keeps `state` of the digest at byte `at`. Blocks.
    pub(super) fn mark(&self, at: u64, state: &[u8]) {
        self.write(|tail| tail.mark(at, state));
        let mut own = self.lock();
        own.marked = own.marked.max(at);
        self.make_room(&own);
    }

    /// Reads again what is in the tail. Blocks.
    ///
    /// # Errors
    /// The I/O error; internal where there is none.
    pub(super) fn read(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let tail = self.tail.get().ok_or_else(|| Error::internal("an upload goes on without its tail"))?;
        tail.read(buffer, at)
    }

    /// Notes the next member, which is there.
    pub(super) fn add(&self, span: Span) {
        let mut own = self.lock();
        if !own.given_up {
            own.entries.push_back(Entry { span, is_whole: false, bytes: 0 });
        }
    }

    /// Whether it outlives the daemon.
    pub(super) fn survives(&self) -> bool {
        !self.lock().given_up
    }

    /// Goes on without: what comes does not outlive the daemon. Blocks.
    pub(super) fn give_up(&self) {
        let mut own = self.lock();
        own.given_up = true;
        own.entries = VecDeque::new();
        self.make_room(&own);
        drop(own);
        if let Some(tail) = self.tail.get() {
            tail.give_up();
        }
    }

    fn gave_up(&self, error: &Error) {
        tracing::warn!(error = %error.report(), "an upload goes on and will not outlive the daemon");
        self.give_up();
    }

    fn write(&self, write: impl FnOnce(&Tail) -> Result<()>) {
        if let Some(tail) = self.tail.get()
            && let Err(error) = write(tail)
        {
            self.gave_up(&error);
        }
    }

    fn make_room(&self, state: &State) {
        let until = match self.tail.get() {
            _ if state.given_up => u64::MAX,
            None => 0,
            Some(_) => state.settled.min(state.marked).saturating_add(TAIL_BYTES),
        };
        self.until.send_if_modified(|present| std::mem::replace(present, until) != until);
    }

    fn heard(&self, position: u64, note: impl FnOnce(&mut Entry)) {
        let mut own = self.lock();
        let at = position.checked_sub(own.first).and_then(|at| usize::try_from(at).ok());
        if let Some(entry) = at.and_then(|at| own.entries.get_mut(at)) {
            note(entry);
            own.settle();
            self.make_room(&own);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Moves on over all that are recorded whole.
    fn settle(&mut self) {
        while let Some(whole) = self.entries.pop_front_if(|entry| entry.is_whole) {
            self.settled = whole.span.end;
            self.first += 1;
        }
        if let Some(Entry { span, bytes, .. }) =
            self.entries.front().filter(|entry| entry.span.plain && entry.bytes > 0)
        {
            self.settled = span.bytes_at + bytes;
        }
    }
}

impl Recorded for Settling {
    fn whole(&self, position: u64) {
        self.heard(position, |entry| entry.is_whole = true);
    }

    fn begun(&self, position: u64, bytes: u64) {
        self.heard(position, |entry| entry.bytes = entry.bytes.max(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(bytes_at: u64, end: u64) -> Span {
        Span { bytes_at, end, plain: true }
    }

    async fn begun(root: &std::path::Path) -> Arc<Settling> {
        let disk = Arc::new(Disk::open(root).unwrap());
        disk.begin_flight("f").unwrap();
        let settling = Arc::new(Settling::new(b"me".to_vec()));
        assert_eq!(*settling.until.borrow(), 0, "nobody is told of what is kept nowhere");
        settling.begin(&disk, "f").await;
        settling
    }

    #[tokio::test]
    async fn room_grows_with_what_is_recorded_from_the_first_on_and_with_the_marks() {
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        let room = || *settling.until.borrow() - TAIL_BYTES;
        assert_eq!(room(), 0);
        settling.mark(1 << 30, b"");
        for at in 0..4 {
            settling.add(span(1000 * at + 512, 1000 * at + 900));
        }
        settling.whole(1);
        assert_eq!(room(), 0, "the first is missing");
        settling.begun(0, 100);
        assert_eq!(room(), 612);
        settling.whole(0);
        assert_eq!(room(), 1900);
        settling.whole(3);
        settling.begun(2, 7);
        assert_eq!(room(), 2519);
        settling.whole(2);
        assert_eq!(room(), 3900);
        settling.whole(2);
        settling.begun(1, 1);
        assert_eq!(room(), 3900);
        settling.add(Span { plain: false, ..span(4512, 5900) });
        settling.begun(4, 100);
        assert_eq!(room(), 3900, "where the next byte is in the tar is not known");
        settling.give_up();
        settling.room(u64::MAX).await;
    }

    #[tokio::test]
    async fn what_is_read_and_not_marked_stays() {
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        settling.add(span(512, 2048));
        settling.whole(0);
        assert_eq!(*settling.until.borrow(), TAIL_BYTES);
        settling.mark(700, b"");
        assert_eq!(*settling.until.borrow(), TAIL_BYTES + 700);
    }

    #[tokio::test]
    async fn what_is_never_recorded_is_waited_for_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        settling.room_within(TAIL_BYTES, Duration::ZERO).await;
        assert!(settling.survives());
        settling.room_within(TAIL_BYTES + 1, Duration::from_millis(1)).await;
        assert!(!settling.survives());
    }
}
