//! How far what was sent is settled: found again by a later run of the daemon, so that its sender is never asked for it.
//!
//! A piece is settled in two ways: in the [tail](Tail), from before its sender is told of it until it is not needed there any more; and then by the
//! rows of the members that its bytes belong to. Members are recorded in any order ([`Recorded`]); what counts are those that are, from the first on, and
//! what is of the next one's bytes. A later run takes the digest from the last mark on that is not behind what is recorded: so every byte that it reads from
//! the tail goes through the digest again, which its sender states at the end. The tail is needed from that mark on, and room for a piece is where the
//! tail has room.
//!
//! Of a large member that is begun in the catalog, with all before it recorded, what comes is kept in the very file that it is filled into ([`Stretch`]), and not in the tail's
//! ring as well: whoever fills it has nothing to write then. Its last [`ENDS_IN_RING_BYTES`] are in the ring again: of them the mark can be made that the file is not needed
//! behind, once it is sealed ([`Recorded::settle`]).
//!
//! What cannot be settled so gives the tail up, and the upload goes on without ([`Settling::give_up`]): where the tail cannot be written, where what
//! comes is a compressed tar, one large file with holes, or an archive that was not all, and where room is waited for in vain ([`IN_VAIN`]): a tar may go
//! on for ever without a member. What an earlier run has acknowledged is read to its end all the same.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::StreamDigest;
use super::incoming::MARK_BYTES;
use super::sent::PIECE_BYTES;
use crate::archive::Span;
use crate::disk::{Disk, Stretch, TAIL_BYTES, Tail};
use crate::error::{Error, Result};
use crate::panics::guarded;
use crate::source::{BeingFilled, Recorded};

/// Bytes at the end of a large member that are in the ring: a mark is made in them, however its pieces lie.
const ENDS_IN_RING_BYTES: u64 = 4 * MARK_BYTES;

const _: () = assert!(ENDS_IN_RING_BYTES > MARK_BYTES + PIECE_BYTES as u64);

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
    /// Told when no mark is being written.
    is_marked: Condvar,
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
    /// The large member that comes, with its position.
    filling: Option<(u64, Filling)>,
}

/// A large member that is filled.
#[derive(Debug)]
struct Filling {
    /// Until what comes is kept there.
    into: Option<BeingFilled>,
    /// Where in the upload it begins, from then on.
    begins_at: u64,
    /// Which of its bytes are kept there.
    kept: Range<u64>,
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
            filling: None,
        };
        let (until, is_marked) = (watch::Sender::new(0), Condvar::new());
        Self { about, tail: OnceLock::new(), state: Mutex::new(state), until, is_marked }
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
        self.write(|tail| {
            let begins = self.lock().aside_from(at, tail.stretch());
            if let Some((stretch, file)) = begins {
                tail.set_aside(stretch, file)?;
            }
            let aside = tail.append(runs, at)?;
            self.lock().kept_aside(aside);
            Ok(())
        });
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
        let into = own.filling.as_mut().and_then(|(_, filling)| filling.into.take());
        self.make_room(&own);
        drop(own);
        let Some(tail) = self.tail.get() else { return };
        tail.give_up();
        let own = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            drop(into);
            if let Some(tail) = own.tail.get() {
                tail.end_aside();
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
            own.is_marked.notify_all();
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

    /// The stretch that begins with the piece at `at`, where what comes can be kept in the file it is bound for; `before` is the last one.
    fn aside_from(&mut self, at: u64, before: Option<Stretch>) -> Option<(Stretch, std::fs::File)> {
        let (_, filling) = self.filling.as_mut().filter(|(position, _)| *position == self.first)?;
        // With what is recorded of it its file stays, whatever becomes of the daemon.
        let front = self.entries.front().filter(|entry| entry.span.plain && entry.bytes > 0)?;
        let begins_at = front.span.bytes_at;
        let until = (begins_at + filling.into.as_ref()?.size).saturating_sub(ENDS_IN_RING_BYTES);
        if !(begins_at..until).contains(&at) || before.is_some_and(|before| self.marked < before.until) {
            return None;
        }
        let BeingFilled { file, number, .. } = filling.into.take()?;
        (filling.begins_at, filling.kept) = (begins_at, at - begins_at..at - begins_at);
        Some((Stretch { from: at, until, begins_at, number }, file))
    }

    /// Notes that these bytes of the upload were set aside.
    fn kept_aside(&mut self, bytes: Range<u64>) {
        if let Some((_, Filling { into: None, begins_at, kept })) = &mut self.filling
            && !bytes.is_empty()
        {
            kept.end = kept.end.max(bytes.end.saturating_sub(*begins_at));
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

    fn fills(&self, position: u64, into: BeingFilled) {
        let into = Some(into).filter(|_| self.0.survives());
        let before = self.0.lock().filling.replace((position, Filling { into, begins_at: 0, kept: 0..0 }));
        // Not under the lock: it may take long to close.
        drop(before);
    }

    fn kept(&self, position: u64) -> Range<u64> {
        match &self.0.lock().filling {
            Some((present, filling)) if *present == position => filling.kept.clone(),
            _ => 0..0,
        }
    }

    fn settle(&self) {
        let waited = self.0.is_marked.wait_while(self.0.lock(), |own| own.is_marking);
        let mut own = waited.unwrap_or_else(PoisonError::into_inner);
        let marked = own.marked;
        let over = own.filling.take();
        drop(own);
        drop(over);
        match self.0.tail.get().and_then(|tail| Some((tail, tail.stretch()?))) {
            Some((tail, stretch)) if stretch.until <= marked => tail.end_aside(),
            Some(_) if self.0.survives() => {
                self.0.gave_up(&Error::internal("of a file that is all here no mark was made"));
            }
            _ => {}
        }
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
    async fn what_comes_of_a_large_member_is_kept_where_it_is_filled_once_its_beginning_is_recorded() {
        const PIECE: u64 = 1 << 20;
        let directory = tempfile::tempdir().unwrap();
        let settling = begun(directory.path()).await;
        let told = Told(Arc::clone(&settling));
        let large = |number: u64, begins_at: u64| {
            let size = ENDS_IN_RING_BYTES + 4 * PIECE;
            settling.add(span(begins_at, begins_at + size));
            BeingFilled { file: tempfile::tempfile().unwrap(), number, size }
        };
        let keep = |at: u64| settling.keep(&[vec![1; usize::try_from(PIECE).unwrap()].into()], at);
        settling.add(span(512, 1024));
        told.fills(1, large(7, 1024));
        told.begun(1, 1);
        keep(1024);
        assert!(told.kept(1).is_empty(), "what came before it is not recorded");
        told.whole(0);
        keep(1024 + PIECE);
        keep(1024 + 2 * PIECE);
        assert_eq!((told.kept(1), told.kept(0)), (PIECE..3 * PIECE, 0..0));
        keep(1024 + 3 * PIECE);
        keep(1024 + 4 * PIECE);
        assert_eq!(told.kept(1), PIECE..4 * PIECE, "its end is kept in the ring");
        settling.offer(1024 + 5 * PIECE, Vec::new());
        told.whole(1);
        told.settle();
        assert!(settling.survives() && told.kept(1).is_empty(), "the mark is behind the stretch, its file may go");
        told.fills(2, large(8, 1024 + ENDS_IN_RING_BYTES + 4 * PIECE));
        told.begun(2, 1);
        keep(1024 + ENDS_IN_RING_BYTES + 4 * PIECE);
        keep(1024 + ENDS_IN_RING_BYTES + 5 * PIECE);
        assert_eq!(told.kept(2), 0..2 * PIECE);
        told.whole(2);
        told.settle();
        assert!(!settling.survives(), "without a mark it cannot be gone on with once the file goes");
        assert_eq!(told.kept(2), 0..0);
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
        disk.make_tail("f", b"me").unwrap().append(&[Bytes::from_static(b"abc")], 0).unwrap();
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
