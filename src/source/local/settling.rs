//! How far what was sent is settled: found again by a later run of the daemon, so that its sender is never asked for it.
//!
//! A piece is settled in two ways: in the [tail](Tail), from before its sender is told of it until it is not needed there any more; and then by the
//! rows of the members that its bytes belong to. Members are recorded in any order ([`Recorded`]); what counts are those that are, from the first on, and
//! what is of the next one's bytes. A later run takes the digest from the last mark on that is not behind what is recorded: so every byte that it reads from
//! the tail goes through the digest again, which its sender states at the end. The tail is needed from that mark on, and room for a piece is where the
//! tail has room.
//!
//! What cannot be settled so gives the tail up, and the upload goes on without ([`Settling::give_up`]): where the tail cannot be written, where what
//! comes is a compressed tar, one large file with holes, or an archive that was not all, and where room is waited for in vain ([`IN_VAIN`]): a tar may go
//! on for ever without a member. What an earlier run has acknowledged is read to its end all the same.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::StreamDigest;
use crate::archive::Span;
use crate::disk::{Disk, TAIL_BYTES, Tail};
use crate::error::{Error, Result};
use crate::panics::guarded;
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
    /// Whether anybody takes the entries: until then somebody else has his turn.
    asked: bool,
    /// Whether what an earlier run has acknowledged is still being read.
    is_replayed: bool,
    /// States of the digest that are not written, in the order of their bytes.
    marks: VecDeque<(u64, Vec<u8>)>,
    /// Whether one is being written.
    is_marking: bool,
    /// The last that is.
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

    /// Of one that an earlier run had under way, with its tail, which is to be [read](Settling::read).
    pub(super) fn left(about: Vec<u8>, tail: Tail, from: &From) -> Self {
        let settling = Self::of(about, from);
        let _ = settling.tail.set(tail);
        let mut own = settling.lock();
        own.is_replayed = true;
        settling.make_room(&own);
        drop(own);
        settling
    }

    fn of(about: Vec<u8>, from: &From) -> Self {
        let entries = from.begun.map(|(span, bytes)| Entry { span, is_whole: false, bytes }).into_iter().collect();
        let &From { members, settled, marked, .. } = from;
        let state = State {
            given_up: false,
            asked: false,
            is_replayed: false,
            marks: VecDeque::new(),
            is_marking: false,
            marked,
            settled,
            first: members,
            entries,
        };
        Self { about, tail: OnceLock::new(), state: Mutex::new(state), until: watch::Sender::new(0) }
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

    /// Notes that the entries are taken from now on.
    pub(super) fn is_asked(&self) {
        self.lock().asked = true;
    }

    /// Waits for room for a piece that ends at `end`. Cancel-safe.
    pub(super) async fn room(self: &Arc<Self>, end: u64) {
        self.room_within(end, IN_VAIN).await;
    }

    async fn room_within(self: &Arc<Self>, end: u64, patience: Duration) {
        let mut until = self.until.subscribe();
        while tokio::time::timeout(patience, until.wait_for(|until| *until >= end)).await.is_err() {
            if self.lock().asked {
                self.gave_up(&Error::unavailable("UPLOAD_UNSETTLED", "nothing of what comes is recorded"));
            }
        }
    }

    /// Keeps the piece that begins at `at` and is `runs` together, for which there was [room](Settling::room). Blocks.
    pub(super) fn keep(self: &Arc<Self>, runs: &[Bytes], at: u64) {
        self.write(|tail| tail.append(runs.iter().map(AsRef::as_ref), at));
    }

    /// Notes that all has come, and has this digest. Blocks.
    pub(super) fn set_ended(self: &Arc<Self>, digest: &StreamDigest) {
        self.write(|tail| tail.set_ended(digest));
    }

    /// Takes the state of the digest at byte `at`, to be written once that much is recorded.
    pub(super) fn offer(self: &Arc<Self>, at: u64, state: Vec<u8>) {
        let mut own = self.lock();
        if !own.given_up {
            own.marks.push_back((at, state));
            self.write_mark(&mut own);
        }
    }

    /// Reads what an earlier run has in the tail. Blocks.
    ///
    /// # Errors
    /// The I/O error; internal where there is none.
    pub(super) fn read(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let tail = self.tail.get().ok_or_else(|| Error::internal("an upload goes on without its tail"))?;
        tail.read(buffer, at)
    }

    /// Notes that all of that was read. Blocks.
    pub(super) fn is_read(&self) {
        let mut own = self.lock();
        own.is_replayed = false;
        let given_up = own.given_up;
        drop(own);
        if let Some(tail) = self.tail.get().filter(|_| given_up) {
            tail.release();
        }
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

    /// Goes on without: what comes does not outlive the daemon. Needs a runtime.
    pub(super) fn give_up(self: &Arc<Self>) {
        let mut own = self.lock();
        own.given_up = true;
        (own.entries, own.marks) = (VecDeque::new(), VecDeque::new());
        let is_replayed = own.is_replayed;
        self.make_room(&own);
        drop(own);
        let Some(tail) = self.tail.get() else { return };
        tail.give_up();
        let own = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            if let Some(tail) = own.tail.get() {
                tail.remove();
                if !is_replayed {
                    tail.release();
                }
            }
        });
    }

    fn gave_up(self: &Arc<Self>, error: &Error) {
        tracing::warn!(error = %error.report(), "an upload goes on and will not outlive the daemon");
        self.give_up();
    }

    fn write(self: &Arc<Self>, write: impl FnOnce(&Tail) -> Result<()>) {
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
            Some(_) => state.marked.saturating_add(TAIL_BYTES),
        };
        self.until.send_if_modified(|present| std::mem::replace(present, until) != until);
    }

    /// Has the last mark written that is not behind what is recorded, one at a time.
    fn write_mark(self: &Arc<Self>, state: &mut State) {
        if state.is_marking || state.given_up {
            return;
        }
        let mut last = None;
        while let Some(mark) = state.marks.pop_front_if(|(at, _)| *at <= state.settled) {
            last = Some(mark);
        }
        let Some((at, digest)) = last else { return };
        state.is_marking = true;
        let own = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            own.write(|tail| guarded("keeping a mark of an upload", || tail.mark(at, &digest)));
            let mut state = own.lock();
            state.is_marking = false;
            state.marked = at;
            own.make_room(&state);
            own.write_mark(&mut state);
        });
    }

    fn heard(self: &Arc<Self>, position: u64, note: impl FnOnce(&mut Entry)) {
        let mut own = self.lock();
        let at = position.checked_sub(own.first).and_then(|at| usize::try_from(at).ok());
        if let Some(entry) = at.and_then(|at| own.entries.get_mut(at)) {
            note(entry);
            own.settle();
            self.write_mark(&mut own);
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

/// Tells an upload what is recorded of it.
pub(super) struct Told(pub(super) Arc<Settling>);

impl Recorded for Told {
    fn whole(&self, position: u64) {
        self.0.heard(position, |entry| entry.is_whole = true);
    }

    fn begun(&self, position: u64, bytes: u64) {
        self.0.heard(position, |entry| entry.bytes = entry.bytes.max(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(bytes_at: u64, end: u64) -> Span {
        Span { at: 0, bytes_at, end, plain: true }
    }

    async fn begun(root: &std::path::Path) -> Arc<Settling> {
        let disk = Arc::new(Disk::open(root).unwrap());
        disk.begin_flight("f").unwrap();
        let settling = Arc::new(Settling::new(b"me".to_vec()));
        assert_eq!(*settling.until.borrow(), 0, "nobody is told of what is kept nowhere");
        settling.begin(&disk, "f").await;
        settling
    }

    /// Waits until there is room for what ends so much behind the length of a tail.
    async fn assert_room(settling: &Arc<Settling>, more: u64) {
        let mut until = settling.until.subscribe();
        let there = until.wait_for(|until| *until >= TAIL_BYTES + more);
        let there = tokio::time::timeout(Duration::from_secs(60), there).await.expect("there is no room").unwrap();
        assert_eq!(*there, TAIL_BYTES + more);
    }

    #[tokio::test]
    async fn room_grows_with_the_last_mark_that_is_not_behind_what_is_recorded_from_the_first_on() {
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        let told = Told(Arc::clone(&settling));
        for at in 0..4 {
            settling.add(span(1000 * at + 512, 1000 * at + 900));
        }
        (0..60).for_each(|at| settling.offer(100 * at, b"state".to_vec()));
        told.whole(1);
        assert_room(&settling, 0).await;
        told.begun(0, 100);
        assert_room(&settling, 600).await;
        told.whole(0);
        assert_room(&settling, 1900).await;
        told.whole(3);
        told.begun(2, 7);
        assert_room(&settling, 2500).await;
        told.whole(2);
        assert_room(&settling, 3900).await;
        told.whole(2);
        told.begun(1, 1);
        settling.add(Span { plain: false, ..span(4512, 5900) });
        told.begun(4, 100);
        // Where the next byte is in the tar is not known.
        assert_room(&settling, 3900).await;
        settling.give_up();
        settling.room(u64::MAX).await;
    }

    #[tokio::test]
    async fn what_is_recorded_and_not_marked_stays() {
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        settling.add(span(512, 2048));
        Told(Arc::clone(&settling)).whole(0);
        assert_eq!(*settling.until.borrow(), TAIL_BYTES);
        settling.offer(700, Vec::new());
        assert_room(&settling, 700).await;
    }

    #[tokio::test]
    async fn what_is_never_recorded_is_waited_for_a_while_once_it_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        settling.room_within(TAIL_BYTES, Duration::ZERO).await;
        let waiting = settling.room_within(TAIL_BYTES + 1, Duration::from_millis(1));
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err(), "it has no turn yet");
        assert!(settling.survives());
        settling.is_asked();
        waiting.await;
        assert!(!settling.survives());
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_read_to_its_end_also_where_the_tail_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::open(directory.path()).unwrap());
        disk.begin_flight("f").unwrap();
        disk.make_tail("f", b"me").unwrap().append([b"abc".as_slice()].into_iter(), 0).unwrap();
        let (tail, _) = disk.open_tail("f").unwrap().unwrap();
        let settling = Arc::new(Settling::left(b"me".to_vec(), tail, &From::default()));
        settling.give_up();
        while disk.open_tail("f").unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let mut read = [0; 3];
        settling.read(&mut read, 0).unwrap();
        assert_eq!(&read, b"abc");
        settling.is_read();
        assert!(settling.read(&mut read, 0).is_err(), "its space is given back");
    }
}
