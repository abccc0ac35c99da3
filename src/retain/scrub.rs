//! Scrubbing: every blob is read again from time to time, slowly, by a thread of its own at idle priority.
//!
//! **What is due**: blobs that were not found right for so many days, and at once those that somebody asks for by hand, whose rows say so
//! ([`scrubs`]). So a pass that is cut short by a stop, a drain or a crash is taken up where it was; what was asked for by hand then goes on
//! at the usual rate. One pass goes on at a time: one by hand takes the place of the usual one.
//!
//! **What is found** is put right from another copy on this host, or else lost: `store`'s business. Copies that were made of what is lost are read in the same
//! pass, whatever its scope, since they may have been made of wrong bytes; their rows say that they are due, should the pass be cut short. Lost files are fetched from their source by
//! whoever waits for the end of a pass ([`Scrubber::until_ended`]): that is an ingest, and may take secrets.
//!
//! **Manifests** of what is ready are read after the blobs: by a pass by hand those in its scope, by the usual one all of them once in the
//! same number of days, or since the start.
//!
//! **What fails** of one blob does not end a pass: it is logged and told of, and due still. Only where the store does not write any more it does.
//!
//! Readers are never waited for and never made to wait. Progress is written every few seconds, so a crash has some blobs to read again.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::catalog::blobs::{self, BlobRow};
use crate::catalog::scrubs::{self, Scope};
use crate::error::{Error, Result};
use crate::limits;
use crate::panics::guarded;
use crate::store::Store;
use crate::store::verify::{Rot, Verdict};
use crate::units::now_unix_ms;

/// Why one is refused while another goes on.
pub const GOES_ON: &str = "SCRUB_GOES_ON";

/// After the start, before it is looked whether anything is due: others have more urgent things to do then.
const FIRST_LOOK_AFTER: Duration = Duration::from_secs(5);

/// How often it is looked whether anything is due.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// How often progress is written.
const WRITE_EVERY: Duration = Duration::from_secs(2);

/// Idle class of `ioprio_set(2)`: the disk is ours when nobody else wants it.
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// How scrubbing goes on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pacing {
    /// Bytes read a second; 0: only when asked for by hand, and then as fast as the machine allows.
    pub bytes_per_s: u64,
    /// How long bytes that were right are taken to be so.
    pub every: Duration,
}

/// The pass that goes on, or the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether it goes on.
    pub running: bool,
    /// Whether somebody asked for it.
    pub by_hand: bool,
    /// When it began, in milliseconds since the epoch; 0: there was none since the start.
    pub started_ms: i64,
    /// When it ended; 0 while it goes on.
    pub ended_ms: i64,
    /// Blobs read, or tried.
    pub blobs: u64,
    /// Of those the ones of which nothing can be said: see the log.
    pub unread: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes to be read in all; 0 until that is known.
    pub total_bytes: u64,
    /// Blobs with rotten bytes that were put right.
    pub healed: u64,
    /// Blobs with rotten bytes, and manifests, that are lost.
    pub lost: u64,
    /// Whether it was cut short.
    pub stopped: bool,
}

/// A pass to be made.
#[derive(Clone, Copy, Debug)]
struct Pass {
    /// Of all since the start.
    number: u64,
    scope: Scope,
    by_hand: bool,
    bytes_per_s: u64,
}

/// The scrubbing of a store; cheap to clone.
#[derive(Clone, Debug)]
pub struct Scrubber(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    store: Store,
    pacing: Pacing,
    state: Mutex<State>,
    changed: Condvar,
    /// Told when a pass has ended.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<Pass>,
    report: Report,
    /// The pass that the report is of: one by hand from the moment it is asked for, though the one before it has still to end.
    reported: Option<Pass>,
    /// How many there were.
    passes: u64,
    stopping: bool,
    /// When all manifests were read last.
    manifests_read: Option<Instant>,
}

impl Scrubber {
    /// Starts the thread.
    ///
    /// # Errors
    /// `NO_THREAD`.
    pub fn start(store: Store, pacing: Pacing) -> Result<Self> {
        let scrubber = Self::of(store, pacing);
        let own = scrubber.clone();
        thread::Builder::new()
            .name("scrub".to_owned())
            .spawn(move || own.run())
            .map_err(|error| Error::unavailable("NO_THREAD", "starting the scrubbing thread").because(error))?;
        Ok(scrubber)
    }

    fn of(store: Store, pacing: Pacing) -> Self {
        let (state, changed, ended) = (Mutex::default(), Condvar::new(), Notify::new());
        Self(Arc::new(Shared { store, pacing, state, changed, ended }))
    }

    /// Has the blobs of a tree, or all, read now. Where a pass by hand goes on that has them in its scope, it is that one.
    ///
    /// # Errors
    /// `SCRUB_GOES_ON` where it has not, `SCRUB_STOPPED` once there are no more.
    pub fn begin(&self, scope: Scope, full_rate: bool) -> Result<Report> {
        let mut state = self.locked();
        if state.stopping {
            return Err(Error::unavailable("SCRUB_STOPPED", "ckptd is about to stop"));
        }
        let by_hand = state.reported.filter(|pass| state.report.running && pass.by_hand);
        if by_hand.is_some_and(|pass| pass.scope.is_some() && pass.scope != scope) {
            return Err(Error::wrong_state(GOES_ON, "another checkpoint is being scrubbed")
                .remedy("wait for its end, then ask again"));
        }
        if by_hand.is_none() {
            let bytes_per_s = if full_rate { 0 } else { self.0.pacing.bytes_per_s };
            let pass = Pass { number: state.next_number(), scope, by_hand: true, bytes_per_s };
            state.wanted = Some(pass);
            state.report_of(pass);
            self.0.changed.notify_all();
        }
        Ok(state.report)
    }

    /// The pass that goes on, or the last one.
    pub fn report(&self) -> Report {
        self.locked().report
    }

    /// Waits until a pass has ended, one that ended since the last call too. For one who waits.
    pub async fn until_ended(&self) {
        self.0.ended.notified().await;
    }

    /// Ends scrubbing until the next start; what goes on ends at the next piece.
    pub fn stop(&self) {
        self.locked().stopping = true;
        self.0.changed.notify_all();
    }

    fn run(&self) {
        be_idle();
        self.make_passes(|pass| self.make(pass));
    }

    /// Has `make` make every pass that is wanted or due, until the end. A panic ends the pass, whose blobs are due still, and not the thread.
    fn make_passes(&self, make: impl Fn(&Pass) -> Result<bool>) {
        let mut look_at = Instant::now() + FIRST_LOOK_AFTER;
        while let Some(pass) = self.next_pass(look_at) {
            let is_complete = guarded("a scrub", || make(&pass)).unwrap_or_else(|error| {
                tracing::warn!(error = %error.report(), "a scrub ended early");
                false
            });
            self.note(&pass, |report| {
                report.stopped = !is_complete;
                report.running = false;
                report.ended_ms = now_unix_ms();
            });
            self.0.ended.notify_one();
            look_at = Instant::now() + LOOK_EVERY;
        }
    }

    /// Waits for something to do; `None` at the end.
    fn next_pass(&self, look_at: Instant) -> Option<Pass> {
        let bytes_per_s = self.0.pacing.bytes_per_s;
        let mut state = self.locked();
        loop {
            if state.stopping {
                // One that was asked for and not begun.
                state.report.stopped |= state.report.running;
                state.report.running = false;
                return None;
            }
            if let Some(pass) = state.wanted.take() {
                return Some(pass);
            }
            let left = look_at.saturating_duration_since(Instant::now());
            if bytes_per_s > 0 && left.is_zero() {
                return Some(Pass { number: state.next_number(), scope: None, by_hand: false, bytes_per_s });
            }
            let wait = if bytes_per_s == 0 { LOOK_EVERY } else { left };
            state = self.0.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes a pass; whether it came to its end.
    fn make(&self, pass: &Pass) -> Result<bool> {
        let catalog = self.0.store.catalog();
        let scope = pass.scope;
        let want =
            |after, until| catalog.write_blocking(move |tx| scrubs::want(tx, &scope, after, until)).map(|()| true);
        if pass.by_hand && !self.walk(want)? {
            return Ok(false);
        }
        let age_ms = i64::try_from(self.0.pacing.every.as_millis()).unwrap_or(i64::MAX);
        let before_ms = if pass.by_hand { 1 } else { now_unix_ms().saturating_sub(age_ms) };
        let due = |after, until| catalog.read_blocking(move |tx| scrubs::due(tx, &scope, before_ms, after, until));
        let mut total_bytes = 0;
        let is_counted = self.walk(|after, until| {
            total_bytes += due(after, until)?.iter().map(|blob| blob.size).sum::<u64>();
            Ok(true)
        })?;
        if !is_counted || (total_bytes == 0 && !pass.by_hand) {
            return Ok(is_counted);
        }
        self.announce(pass, total_bytes);
        let mut reading = Reading::new(*pass, self.0.store.clone());
        let is_read = self.walk(|after, until| {
            for blob in due(after, until)? {
                if !self.read_with_copies(&blob, &mut reading)? {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        reading.verified.write()?;
        Ok(is_read && self.read_manifests(pass)?)
    }

    /// Whether all were that were to be.
    fn read_manifests(&self, pass: &Pass) -> Result<bool> {
        let (store, scope) = (&self.0.store, pass.scope);
        let read_lately = |state: &State| state.manifests_read.is_some_and(|read| read.elapsed() < self.0.pacing.every);
        if !pass.by_hand && read_lately(&self.locked()) {
            return Ok(true);
        }
        let mut last = None;
        loop {
            let next = move |tx: &rusqlite::Connection| scrubs::tree_after(tx, &scope, last.as_ref());
            let Some(tree) = store.catalog().read_blocking(next)? else { break };
            if self.is_interrupted() {
                return Ok(false);
            }
            if !store.check_manifest(&tree)? {
                self.note(pass, |report| report.lost += 1);
            }
            last = Some(tree);
        }
        if scope.is_none() {
            self.locked().manifests_read = Some(Instant::now());
        }
        Ok(true)
    }

    /// Reads a blob, and where it is lost those that have copies of it; whether all of that was looked at, rather than given up half-way.
    fn read_with_copies(&self, blob: &BlobRow, reading: &mut Reading) -> Result<bool> {
        if reading.copies.contains(&blob.id) {
            self.note(&reading.pass, |report| report.total_bytes = report.total_bytes.saturating_sub(blob.size));
            return Ok(true);
        }
        let mut next = vec![*blob];
        while let Some(blob) = next.pop() {
            if self.is_interrupted() {
                return Ok(false);
            }
            let Some(copies) = self.read_again(&blob, reading)? else { return Ok(false) };
            for copy in copies.into_iter().filter(|copy| reading.copies.insert(copy.id)) {
                self.note(&reading.pass, |report| report.total_bytes += copy.size);
                next.push(copy);
            }
        }
        Ok(true)
    }

    /// Reads a blob; where it is lost, returns those that have copies of it. `None`: it was given up half-way.
    fn read_again(&self, blob: &BlobRow, reading: &mut Reading) -> Result<Option<Vec<BlobRow>>> {
        let (store, pass) = (&self.0.store, reading.pass);
        // One that always fails must not keep those behind it from being read.
        let verdict = guarded("reading a blob again", || {
            store.verify(blob, &mut |bytes| {
                self.note(&pass, |report| report.bytes += bytes);
                self.pause(reading.pacer.after(bytes, Instant::now()));
                !self.is_interrupted()
            })
        });
        let found = match verdict {
            Ok(Verdict::Stopped) => return Ok(None),
            Ok(Verdict::Rotten(rotten)) => self.put_right_or_lose(blob, &rotten, reading),
            Ok(Verdict::Right) => Ok(Found::Right),
            Ok(Verdict::Gone) => Ok(Found::Gone),
            Err(error) => Err(error),
        };
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                store.disk().check_healthy()?;
                tracing::warn!(blob = %blob.digest, error = %error.report(), "a blob could not be scrubbed");
                Found::Unread
            }
        };
        self.note(&pass, |report| {
            report.blobs += 1;
            report.healed += u64::from(matches!(found, Found::Healed));
            report.lost += u64::from(matches!(found, Found::Lost(_)));
            report.unread += u64::from(matches!(found, Found::Unread));
        });
        match found {
            Found::Right | Found::Healed => reading.verified.add(blob)?,
            Found::Lost(copies) => return Ok(Some(copies)),
            Found::Gone | Found::Unread => {}
        }
        Ok(Some(Vec::new()))
    }

    fn put_right_or_lose(&self, blob: &BlobRow, rotten: &[Rot], reading: &mut Reading) -> Result<Found> {
        let store = &self.0.store;
        tracing::error!(blob = %blob.digest, ranges = rotten.len(), "bytes at rest are rotten");
        let rotten = match store.heal(blob, rotten)? {
            Verdict::Right => return Ok(Found::Healed),
            Verdict::Gone => return Ok(Found::Gone),
            Verdict::Stopped => return Ok(Found::Unread),
            Verdict::Rotten(rotten) => rotten,
        };
        // First, since a copy may have been made after its blob was read.
        reading.verified.blobs.retain(|read| rotten.iter().all(|rot| rot.holder() != *read));
        reading.verified.write()?;
        match store.lose(blob, &rotten)? {
            Some(copies) => Ok(Found::Lost(copies)),
            None => {
                tracing::info!(blob = %blob.digest, "a file that was rotten came again meanwhile");
                Ok(Found::Unread)
            }
        }
    }

    /// Goes through all blobs, so many at a time, until `visit` says no or something else is to be done; whether it came to the last.
    fn walk(&self, mut visit: impl FnMut(i64, i64) -> Result<bool>) -> Result<bool> {
        let mut after = 0;
        loop {
            let from = after;
            let step = move |tx: &rusqlite::Connection| blobs::step_after(tx, from, limits::SWEEP_STEP);
            let Some(until) = self.0.store.catalog().read_blocking(step)? else { return Ok(true) };
            if self.is_interrupted() || !visit(after, until)? {
                return Ok(false);
            }
            after = until;
        }
    }

    fn announce(&self, pass: &Pass, total_bytes: u64) {
        let mut state = self.locked();
        // One that is to follow has begun already, for whoever asked for it.
        if !pass.by_hand && state.wanted.is_none() {
            state.report_of(*pass);
        }
        drop(state);
        self.note(pass, |report| report.total_bytes = total_bytes);
    }

    /// Changes what is told of a pass, unless another is told of by now.
    fn note(&self, pass: &Pass, change: impl FnOnce(&mut Report)) {
        let mut state = self.locked();
        if state.reported.is_some_and(|reported| reported.number == pass.number) {
            change(&mut state.report);
        }
    }

    fn is_interrupted(&self) -> bool {
        let state = self.locked();
        state.stopping || state.wanted.is_some()
    }

    /// Sleeps, unless something else is to be done.
    fn pause(&self, mut left: Duration) {
        let mut state = self.locked();
        while !left.is_zero() && !state.stopping && state.wanted.is_none() {
            let began = Instant::now();
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            left = left.saturating_sub(began.elapsed());
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next_number(&mut self) -> u64 {
        self.passes += 1;
        self.passes
    }

    /// From now on it is this pass that is told of.
    fn report_of(&mut self, pass: Pass) {
        self.reported = Some(pass);
        self.report = Report { running: true, by_hand: pass.by_hand, started_ms: now_unix_ms(), ..Default::default() };
    }
}

/// What became of a blob.
enum Found {
    Right,
    Healed,
    /// Those that have copies of it.
    Lost(Vec<BlobRow>),
    /// It was removed meanwhile.
    Gone,
    /// Nothing can be said of it: the next pass reads it again.
    Unread,
}

/// What a pass has in hand.
struct Reading {
    pass: Pass,
    pacer: Pacer,
    verified: Verified,
    /// Blobs that were read out of turn, since they have copies of what was lost.
    copies: HashSet<i64>,
}

impl Reading {
    fn new(pass: Pass, store: Store) -> Self {
        Self { pass, pacer: Pacer::new(pass.bytes_per_s), verified: Verified::new(store), copies: HashSet::new() }
    }
}

/// Blobs that were right, to be noted together.
struct Verified {
    store: Store,
    blobs: Vec<i64>,
    written: Instant,
}

impl Verified {
    fn new(store: Store) -> Self {
        Self { store, blobs: Vec::new(), written: Instant::now() }
    }

    fn add(&mut self, blob: &BlobRow) -> Result<()> {
        self.blobs.push(blob.id);
        if self.blobs.len() >= limits::REMOVAL_STEP || self.written.elapsed() > WRITE_EVERY {
            self.write()
        } else {
            Ok(())
        }
    }

    fn write(&mut self) -> Result<()> {
        self.written = Instant::now();
        let blobs = std::mem::take(&mut self.blobs);
        if blobs.is_empty() {
            return Ok(());
        }
        self.store.catalog().write_blocking(move |tx| scrubs::set_verified(tx, &blobs, now_unix_ms()))
    }
}

/// Says how long to wait so that no more than so many bytes are read in a second.
#[derive(Debug)]
struct Pacer {
    bytes_per_s: u64,
    /// When what was read so far is paid for.
    paid_at: Option<Instant>,
}

impl Pacer {
    fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, paid_at: None }
    }

    /// Time that is to pass after `bytes` more were read at `now`. Time that passed without reading buys nothing.
    fn after(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.bytes_per_s == 0 {
            return Duration::ZERO;
        }
        let price = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.bytes_per_s);
        let paid_at = self.paid_at.map_or(now, |paid_at| paid_at.max(now)) + price;
        self.paid_at = Some(paid_at);
        paid_at - now
    }
}

/// Lets everybody else go first, on the processor and on the disk; threads that this one starts are like it.
fn be_idle() {
    // SAFETY: plain system calls on the calling thread; no memory is passed. Refusals cost politeness only.
    unsafe {
        libc::syscall(libc::SYS_ioprio_set, 1, 0, IOPRIO_IDLE);
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_however_long_reading_takes() {
        let mut pacer = Pacer::new(1000);
        let start = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(pacer.after(500, start), second / 2);
        assert_eq!(pacer.after(500, start), second, "what is not waited for is owed");
        assert_eq!(pacer.after(500, start + 2 * second), second / 2, "what was waited too long buys nothing");
        assert_eq!(Pacer::new(0).after(u64::MAX, start), Duration::ZERO);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_ends_the_pass_and_the_next_one_is_made() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().to_owned();
        let store = tokio::task::spawn_blocking(move || Store::open(&path)).await.unwrap().unwrap();
        let scrubber = Scrubber::of(store, Pacing { bytes_per_s: 0, every: Duration::ZERO });
        let own = scrubber.clone();
        let thread = thread::spawn(move || {
            own.make_passes(|pass| {
                assert!(pass.number > 1, "on purpose, in the first pass");
                Ok(true)
            });
        });
        for was_stopped in [true, false] {
            assert!(scrubber.begin(None, true).unwrap().running);
            scrubber.until_ended().await;
            let report = scrubber.report();
            assert_eq!((report.running, report.stopped), (false, was_stopped));
        }
        scrubber.stop();
        thread.join().unwrap();
    }
}
