//! States of what takes the digests of a tar, at places from which it can be gone on with.
//!
//! The reader of a tar takes its bytes ahead of what it reads of them; so the digests follow [`LAG_BYTES`] behind what was given to it, and are brought up to
//! the very byte where a mark is made. Marks are made at ends of members and, within a large one, where a fill unit ends, [`MARK_BYTES`] apart at least;
//! each is written with the row of the next member, or within a large member with its own, once so much of it is recorded.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

use super::extract::{Piece, given_up};
use crate::archive::{Member, Passed, Runs};
use crate::error::Result;
use crate::limits::UNIT_BYTES;
use crate::names::EntryPath;
use crate::source::recorded::{self, Mark};
use crate::source::{Recorded, Verifier};

/// Bytes between two marks, and so the most that is fetched and written again.
const MARK_BYTES: u64 = 16 * UNIT_BYTES;

/// Bytes given to the reader of a tar at a time.
const RUN_BYTES: usize = 128 << 10;

/// Bytes that it may have taken ahead, and as many again.
const LAG_BYTES: u64 = 2 * RUN_BYTES as u64;

/// See the module's page.
pub(super) struct Marks(Mutex<State>);

struct State {
    /// Taken at the end.
    verifier: Option<Verifier>,
    /// Whether it takes anything.
    is_wanted: bool,
    /// How far it is.
    taken: u64,
    /// What was given behind that, and how far that goes.
    behind: VecDeque<Bytes>,
    given: u64,
    /// Marks that are not written, in the order of their bytes.
    made: VecDeque<Mark>,
    /// The last that was made at the end of a member, and the last of all.
    last_end: u64,
    last: u64,
    /// The large member that comes.
    present: Option<(u64, Member)>,
}

impl Marks {
    /// Of a tar that is read from byte `from` on, which `verifier` has taken up to there; the last member before that ends at `last_end`.
    pub(super) fn new((from, last_end): (u64, u64), verifier: Verifier) -> Self {
        let state = State {
            is_wanted: !verifier.is_empty(),
            verifier: Some(verifier),
            taken: from,
            behind: VecDeque::new(),
            given: from,
            made: VecDeque::new(),
            last_end,
            last: from,
            present: None,
        };
        Self(Mutex::new(state))
    }

    /// Notes bytes that are given to the reader.
    fn give(&self, bytes: Bytes) {
        let mut own = self.lock();
        own.given += bytes.len() as u64;
        if own.is_wanted && !bytes.is_empty() {
            own.behind.push_back(bytes);
            let until = own.given.saturating_sub(LAG_BYTES);
            own.take_until(until);
        }
    }

    /// Holds all that was given to what the source states of `path`.
    fn finish(&self, path: &EntryPath) -> Result<()> {
        let mut own = self.lock();
        let given = own.given;
        own.take_until(given);
        own.verifier.take().map_or(Ok(()), |verifier| verifier.finish(&path.to_string()))
    }

    /// Makes a mark where the reader is, if it is time for one.
    pub(super) fn passed(&self, passed: Passed) {
        let mut own = self.lock();
        let (at, last, can_be) = match passed {
            Passed::Member(at) => (at, own.last_end, true),
            Passed::Within { at, bytes_at } => (at, own.last, at.saturating_sub(bytes_at) % UNIT_BYTES == 0),
        };
        if !own.is_wanted || !can_be || at < last.saturating_add(MARK_BYTES) {
            return;
        }
        own.take_until(at);
        let state = own.verifier.as_ref().filter(|_| own.taken == at).and_then(Verifier::freeze);
        let Some(state) = state else { return };
        own.made.push_back(Mark { at, state });
        own.last = at;
        if let Passed::Member(_) = passed {
            own.last_end = at;
        }
    }

    /// The last mark that is not behind byte `at`, once.
    pub(super) fn before(&self, at: u64) -> Option<Mark> {
        let mut own = self.lock();
        let mut found = None;
        while let Some(mark) = own.made.pop_front_if(|mark| mark.at <= at) {
            found = Some(mark);
        }
        found
    }

    /// Notes the large member that comes.
    pub(super) fn within(&self, position: u64, member: &Member) {
        self.lock().present = Some((position, member.clone()));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes the digests of what was given up to byte `until`.
    fn take_until(&mut self, until: u64) {
        let Some(verifier) = &mut self.verifier else { return };
        while self.taken < until {
            let Some(first) = self.behind.front_mut() else { return };
            let most = usize::try_from(until - self.taken).unwrap_or(usize::MAX).min(first.len());
            verifier.update(&first[..most]);
            self.taken += most as u64;
            first.advance(most);
            if first.is_empty() {
                self.behind.pop_front();
            }
        }
    }
}

impl Recorded for Marks {
    fn row(&self, position: u64, bytes: u64) -> Option<Vec<u8>> {
        let present = self.lock().present.clone();
        let (_, member) = present.filter(|(present, _)| *present == position)?;
        let mark = self.before(member.span.bytes_at.saturating_add(bytes))?;
        Some(recorded::encode(&member, Some(&mark)))
    }
}

/// Reads what is fetched of a tar, and has the digests taken of it.
pub(super) struct MarkedReader {
    pieces: mpsc::Receiver<Piece>,
    present: Bytes,
    ended: bool,
    marks: Arc<Marks>,
    path: EntryPath,
}

impl MarkedReader {
    /// Reads `pieces`, which are of the file at `path`.
    pub(super) const fn new(pieces: mpsc::Receiver<Piece>, marks: Arc<Marks>, path: EntryPath) -> Self {
        Self { pieces, present: Bytes::new(), ended: false, marks, path }
    }
}

impl Runs for MarkedReader {
    fn next_run(&mut self) -> io::Result<Bytes> {
        while self.present.is_empty() && !self.ended {
            match self.pieces.blocking_recv().ok_or_else(given_up)?.map_err(io::Error::other)? {
                Some(piece) => self.present = piece,
                None => {
                    self.ended = true;
                    self.marks.finish(&self.path).map_err(io::Error::other)?;
                }
            }
        }
        let run = self.present.split_to(RUN_BYTES.min(self.present.len()));
        self.marks.give(run.clone());
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use sha2::Digest as _;

    use super::*;
    use crate::source::{Expected, Stated};

    #[test]
    fn a_mark_is_the_state_at_exactly_its_byte_whatever_was_taken_ahead() {
        let all: Vec<u8> = (0..3 * MARK_BYTES).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let size = all.len() as u64;
        let expected = Expected::from(Stated { sha256: Some(sha2::Sha256::digest(&all).into()), ..Stated::default() });
        let marks = Marks::new((0, 0), Verifier::new(&expected, size));
        let (end, within) = (MARK_BYTES + 512, 2 * MARK_BYTES + 4 * UNIT_BYTES);
        let mut at = 0;
        for piece in all.chunks(100_000) {
            marks.give(Bytes::copy_from_slice(piece));
            at += piece.len() as u64;
            // As far as its buffer is long the reader is behind what it was given.
            let read = at.saturating_sub(LAG_BYTES / 2);
            let passes = |place: u64| read >= place && read - place < piece.len() as u64;
            if passes(end) {
                marks.passed(Passed::Member(end));
            }
            if passes(within) {
                marks.passed(Passed::Within { at: within - 1, bytes_at: 2 * MARK_BYTES });
                marks.passed(Passed::Within { at: within, bytes_at: 2 * MARK_BYTES });
            }
        }
        let found = [marks.before(within - 1).unwrap(), marks.before(size).unwrap()];
        assert_eq!([found[0].at, found[1].at], [end, within]);
        for Mark { at, state } in found {
            let mut verifier = Verifier::thaw(&expected, size, &state).unwrap();
            verifier.update(&all[usize::try_from(at).unwrap()..]);
            verifier.finish("a").unwrap();
        }
        assert!(marks.before(size).is_none());
        marks.finish(&EntryPath::new(*b"a").unwrap()).unwrap();
    }
}
