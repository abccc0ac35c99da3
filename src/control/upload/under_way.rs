//! One upload: where it stands, whose messages are heard, and how it ends.
//!
//! Calls take turns. A turn ends when its call is dropped, when its messages end or break, or when another takes its place; only messages of the
//! present turn count. Both the turn and the position are under one mutex, never held over an await, and a message counts in the moment in which
//! it is taken ([`Upload::take`]). So whoever is told a position after it ended the turn before can go on from there: nothing is lost, and nothing
//! comes twice, whatever of the turn before is still in buffers.
//!
//! ```text
//! heard --(call gone, messages broken)--> left --(resume)--> heard            with an id of the client's
//! heard --(call gone, messages broken)--> broken                              without
//! heard --(`finish`)--> finished                                              whatever becomes of the call
//! left, or awaited in vain, for the idle time; crowded out; begun anew --> ended
//! heard, left --(drain)--> paused: no message counts any more                 with an id of the client's
//! a start finds it --> left, where what was recorded ends ([`left`](super::left))
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::Messages;
use crate::catalog::checkpoints::Record;
use crate::control::wire;
use crate::control::wire::reasons;
use crate::control::wire::upload_checkpoint_request::Message;
use crate::digest::Digester;
use crate::error::{Error, Kind, Result};
use crate::ingest::Ending;

/// Reason, and kind of event, of an upload whose sender did not come back.
pub(super) const EXPIRED: &str = "UPLOAD_EXPIRED";

/// See the module's page.
#[derive(Debug)]
pub(super) struct Upload {
    id: String,
    created_ms: i64,
    /// Whether it outlives its calls.
    resumes: bool,
    state: Mutex<State>,
    /// Wakes who takes messages: the turn changed.
    turned: Notify,
    /// Wakes who watches for the end.
    changed: Notify,
    ending: Ending,
}

struct State {
    position: wire::UploadPosition,
    present: Option<wire::UploadEntry>,
    /// Of all entries that came.
    listed: Digester,
    finished: bool,
    /// The last turn that began.
    turn: u64,
    /// Tells the call whose turn it is that it is not any more; `None`: nobody's.
    heard: Option<oneshot::Sender<Error>>,
    /// Messages of a turn that nobody has taken up yet.
    next: Option<Turn>,
    /// Whether the next message is waited for.
    awaited: bool,
    /// Since when that is so, or since when it is nobody's turn.
    since: Instant,
    /// Why no message counts any more: it broke, where it cannot be resumed; or is paused.
    stopped: Option<Error>,
    /// Why it ends.
    ended: Option<Error>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("position", &self.position).field("turn", &self.turn).finish_non_exhaustive()
    }
}

/// Messages of one call.
pub(super) struct Turn {
    number: u64,
    pub(super) messages: Messages,
}

/// That a call is heard.
pub(super) struct Heard {
    pub(super) turn: u64,
    /// Says why it is not heard any more.
    pub(super) told: oneshot::Receiver<Error>,
}

impl Upload {
    /// The upload of a new record, which `messages` begin.
    pub(super) fn begin(record: &Record, resumes: bool, messages: Messages) -> (Self, Heard) {
        let mut state = State::at(wire::UploadPosition::default(), None, Digester::new());
        let heard = state.hear(messages);
        (Self::of(record, resumes, state), heard)
    }

    /// One that waits for its sender since now, at `position` behind `present`; `listed` is the digester of all entries up to there.
    pub(super) fn left(
        record: &Record,
        position: wire::UploadPosition,
        present: Option<wire::UploadEntry>,
        listed: Digester,
    ) -> Self {
        Self::of(record, true, State::at(position, present, listed))
    }

    fn of(record: &Record, resumes: bool, state: State) -> Self {
        Self {
            id: record.id.clone(),
            created_ms: record.created_ms,
            resumes,
            state: Mutex::new(state),
            turned: Notify::new(),
            changed: Notify::new(),
            ending: Ending::default(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether it is of this record, and not of one that had the same id before.
    pub(super) fn fills(&self, record: &Record) -> bool {
        self.id == record.id && self.created_ms == record.created_ms
    }

    /// Begins a turn of a sender that comes back.
    ///
    /// # Errors
    /// `UPLOAD_DESYNC` with where it stands, unless that is `at`; what it ended with.
    pub(super) fn resume(&self, at: wire::UploadPosition, messages: Messages) -> Result<Heard> {
        let mut state = self.lock();
        if let Some(ended) = &state.ended {
            return Err(ended.share());
        }
        if state.position != at {
            return Err(desync(at, state.position));
        }
        state.silence(taken_over());
        let heard = state.hear(messages);
        drop(state);
        self.turned.notify_one();
        Ok(heard)
    }

    /// Ends the present turn, if there is one, for the sake of its own sender.
    pub(super) fn take_over(&self) {
        self.lock().silence(taken_over());
        self.turned.notify_one();
        self.changed.notify_one();
    }

    /// Ends turn `number`, if it is the present one, because of `why`.
    pub(super) fn leave(&self, number: u64, why: &'static str) {
        {
            let mut state = self.lock();
            if state.turn != number || !state.silence(broken_off(why)) {
                return;
            }
            if !self.resumes && !state.finished {
                state.stopped = Some(broken_off(why));
            }
        }
        self.turned.notify_one();
        self.changed.notify_one();
    }

    /// Whether it outlives its calls, and the daemon.
    pub(super) fn resumes(&self) -> bool {
        self.resumes
    }

    /// Lets no message count any more, because of `why`. Whoever sends waits for what comes of it.
    pub(super) fn pause(&self, why: Error) {
        self.lock().stopped.get_or_insert(why);
        self.turned.notify_one();
    }

    /// Where it stands.
    pub(super) fn shown(&self) -> wire::Upload {
        let state = self.lock();
        wire::Upload {
            id: self.id.clone(),
            position: Some(state.position),
            present: state.present.clone(),
            entries_digest: state.listed.finish().as_bytes().to_vec(),
            finished: state.finished,
            connected: state.heard.is_some(),
        }
    }

    /// Since when it waits for its sender to come back.
    pub(super) fn left_since(&self) -> Option<Instant> {
        let state = self.lock();
        let waits = state.heard.is_none() && !state.finished && state.ended.is_none() && state.stopped.is_none();
        waits.then_some(state.since)
    }

    /// Ends it if it waits for its sender to come back; whether it ends.
    pub(super) fn end_if_left(&self, why: Error) -> bool {
        let mut state = self.lock();
        if state.ended.is_none() && (state.heard.is_some() || state.finished) {
            return false;
        }
        state.ended.get_or_insert(why);
        drop(state);
        self.changed.notify_one();
        true
    }

    /// Resolves when it is to end: told so, or silent for `idle`.
    pub(super) async fn ended(&self, idle: Duration) -> Error {
        loop {
            let silent_since = {
                let mut state = self.lock();
                let silent_since = state.silent_since();
                if silent_since.is_some_and(|since| since + idle <= Instant::now()) {
                    state.ended.get_or_insert(expired(idle));
                }
                if let Some(ended) = &state.ended {
                    return ended.share();
                }
                silent_since
            };
            let until = silent_since.unwrap_or_else(Instant::now) + idle;
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// What becomes of it.
    pub(super) fn ending(&self) -> &Ending {
        &self.ending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end where messages are taken.
impl Upload {
    /// Resolves when the turn may have changed.
    pub(super) async fn turned(&self) {
        self.turned.notified().await;
    }

    /// The present turn where `before` is not: taken up, or nobody's. From here on a message is waited for.
    ///
    /// # Errors
    /// There will be none: `UPLOAD_BROKEN`, or what it is paused for.
    pub(super) fn present_turn(&self, before: Option<Turn>) -> Result<Option<Turn>> {
        let mut state = self.lock();
        if let Some(why) = &state.stopped {
            return Err(why.share());
        }
        if !std::mem::replace(&mut state.awaited, true) {
            state.since = Instant::now();
        }
        let turn = state.next.take().or(before);
        Ok(turn.filter(|turn| turn.number == state.turn && state.heard.is_some()))
    }

    /// Counts a message of `turn`; whether it counts.
    pub(super) fn take(&self, turn: &Turn, message: &Message) -> bool {
        let mut state = self.lock();
        if turn.number != state.turn || state.heard.is_none() {
            return false;
        }
        state.awaited = false;
        match message {
            Message::Start(_) => {}
            Message::Entry(entry) => {
                state.listed.update(&entry.encode_length_delimited_to_vec());
                state.position.entries += 1;
                state.position.bytes = 0;
                state.present = Some(entry.clone());
            }
            Message::Data(data) => state.position.bytes += data.len() as u64,
            Message::Finish(_) => state.finished = true,
        }
        true
    }

    /// The messages of `turn` ended before `finish`, because of `why`.
    pub(super) fn lost(&self, turn: Turn, why: &'static str) {
        self.leave(turn.number, why);
    }
}

impl State {
    /// Nobody's turn yet.
    fn at(position: wire::UploadPosition, present: Option<wire::UploadEntry>, listed: Digester) -> Self {
        Self {
            position,
            present,
            listed,
            finished: false,
            turn: 0,
            heard: None,
            next: None,
            awaited: false,
            since: Instant::now(),
            stopped: None,
            ended: None,
        }
    }

    /// Begins a turn.
    fn hear(&mut self, messages: Messages) -> Heard {
        let (tell, told) = oneshot::channel();
        self.turn += 1;
        self.heard = Some(tell);
        self.next = Some(Turn { number: self.turn, messages });
        self.since = Instant::now();
        Heard { turn: self.turn, told }
    }

    /// Ends the present turn, whose call is told `why`; whether there was one.
    fn silence(&mut self, why: Error) -> bool {
        self.next = None;
        let Some(heard) = self.heard.take() else { return false };
        self.since = Instant::now();
        // It may be gone.
        let _ = heard.send(why);
        true
    }

    /// Since when nothing comes that could.
    fn silent_since(&self) -> Option<Instant> {
        let waits = !self.finished && (self.awaited || self.heard.is_none());
        waits.then_some(self.since)
    }
}

fn taken_over() -> Error {
    Error::wrong_state("UPLOAD_TAKEN_OVER", "another connection goes on with this upload")
}

pub(super) fn broken_off(why: &str) -> Error {
    Error::new(Kind::Cancelled, reasons::UPLOAD_BROKEN, format!("the upload broke off: {why}"))
        .remedy("upload it again")
}

fn desync(asked: wire::UploadPosition, stands: wire::UploadPosition) -> Error {
    let place = |at: wire::UploadPosition| format!("entry {}, byte {}", at.entries, at.bytes);
    let message = format!("the upload stands at {}, and not at {}", place(stands), place(asked));
    Error::wrong_state(reasons::UPLOAD_DESYNC, message)
        .fact("entries", stands.entries)
        .fact("bytes", stands.bytes)
        .remedy("ask where it stands, and go on from there")
}

fn expired(idle: Duration) -> Error {
    let idle_s = idle.as_secs();
    Error::new(Kind::Cancelled, EXPIRED, format!("the upload was silent for {idle_s} s and was dropped"))
        .remedy("upload it again")
}

/// Why an upload ends whose sender begins it anew.
pub(super) fn replaced() -> Error {
    Error::new(Kind::Cancelled, "UPLOAD_REPLACED", "the upload was begun anew")
}

/// Of an upload that was left, where others were left since.
pub(super) fn crowded_out() -> Error {
    let message = "the upload was left by its sender, as were many since, and was dropped for them";
    Error::new(Kind::Cancelled, EXPIRED, message).remedy("upload it again")
}
