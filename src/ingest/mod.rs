//! Bringing checkpoints in: one task per checkpoint, one *flight* per revision.
//!
//! A checkpoint's task opens its source, which resolves the revision, and then joins the flight that fills exactly these bytes for
//! its owner, or starts it. The flight ([`flight`]) belongs to nobody: it goes on while at least one checkpoint waits for it, whoever
//! came first, and fills each file once. When it is done every checkpoint that waited becomes `ready` in a transaction of its own. The
//! flight's rows root what it sealed until the last of them has been decided.
//!
//! A task ends in exactly one of: `ready`; `failed` with the error recorded (durable units stay, `retry` resumes); or cancelled
//! by removal. `kill -9` leaves `filling`, and the next start begins the task again. A panic is a failure.
//!
//! A source may want its bytes left where they are ([`in_place`]): then the flight only takes digests, and `ready` means that each file's
//! stamp is recorded.
//!
//! Waiting: tasks wait for a slot (`limits::INGESTS_AT_A_TIME`; senders, who may be slow for hours, for one of
//! `limits::SENDERS_AT_A_TIME`), fetchers for the memory budget and for permits per source, sealers
//! for the frontier on blocking threads. Nothing waits while it holds a lock.

mod arrivals;
pub mod arriving;
mod copy;
pub mod estimate;
mod extract;
mod fetch;
mod flight;
mod in_place;
pub mod plan;
pub mod progress;
mod publish;
pub mod retry;
mod seal;
mod stream;
mod tasks;
mod unpack;

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Semaphore, broadcast, watch};

use crate::catalog::checkpoints::{self, Bytes, Failure, Origin, Record, State};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::forecasts;
use crate::catalog::placements;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::manifest::Manifest;
use crate::source::{Credentials, EntryStream, Opened, Source, SourceSpec};
use crate::store::Store;
use crate::units::now_unix_ms;

pub use arrivals::Arrival;
use arrivals::Arrivals;
use flight::Flight;
use progress::{Progress, Reading};
use tasks::Task;
pub use tasks::draining;

/// Reason of an ingest that found nothing to do.
const NOT_WANTED: &str = "NOT_WANTED";

/// Pause before a failure is recorded again that could not be recorded: a full or broken disk.
const RECORD_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_secs(5);

/// Makes a source of what a request asks for, its owner, and the secrets that came with it.
pub type Connector = Arc<dyn Fn(&SourceSpec, &str, &Credentials) -> Result<Arc<dyn Source>> + Send + Sync>;

/// What operators may set.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes that fetchers may hold in memory.
    pub memory_budget_bytes: u64,
    /// Logical bytes one checkpoint may have.
    pub checkpoint_bytes: u64,
    /// Attempts without progress before a fetch is given up.
    pub attempts: u32,
    /// Physical bytes the store may occupy; 0: the whole filesystem.
    pub capacity_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory_budget_bytes: limits::MEMORY_BUDGET_DEFAULT,
            checkpoint_bytes: limits::CHECKPOINT_BYTES_DEFAULT,
            attempts: retry::ATTEMPTS_DEFAULT,
            capacity_bytes: 0,
        }
    }
}

/// All ingests of the daemon; cheap to clone.
#[derive(Clone)]
pub struct Ingests(Arc<Shared>);

struct Shared {
    store: Store,
    connect: Connector,
    settings: Settings,
    slots: Semaphore,
    senders: Semaphore,
    /// Numbers of filling files, never used again: a write that outlives its flight can hit nobody else's file.
    next_number: AtomicU64,
    bounds: fetch::Bounds,
    tasks: Mutex<HashMap<String, Task>>,
    flights: Mutex<HashMap<String, Weak<Flight>>>,
    arrivals: Arrivals,
    changes: broadcast::Sender<String>,
    /// Nothing is begun any more.
    paused: watch::Sender<bool>,
}

impl Ingests {
    /// Ingests into `store`.
    pub fn new(store: Store, connect: Connector, settings: Settings) -> Self {
        let (changes, _) = broadcast::channel(limits::QUEUE_COMMANDS);
        Self(Arc::new(Shared {
            store,
            connect,
            settings,
            slots: Semaphore::new(limits::INGESTS_AT_A_TIME),
            senders: Semaphore::new(limits::SENDERS_AT_A_TIME),
            next_number: AtomicU64::new(u64::try_from(now_unix_ms()).unwrap_or(0) << 20),
            bounds: fetch::Bounds::new(settings.memory_budget_bytes),
            tasks: Mutex::default(),
            flights: Mutex::default(),
            arrivals: Arrivals::default(),
            changes,
            paused: watch::Sender::new(false),
        }))
    }

    /// Whether a source can be made of a record that is to be: URI, options and named secrets, without contacting anybody.
    ///
    /// # Errors
    /// What filling would fail with at once.
    pub fn check(&self, record: &Record, credentials: &Credentials) -> Result<()> {
        self.0.source_of(record, credentials).map(drop)
    }

    /// Begins to fill a recorded checkpoint; one that is filling already is left alone.
    pub fn start(&self, record: &Record, credentials: Credentials) {
        if self.is_paused() {
            return;
        }
        let shared = self.0.clone();
        let record = record.clone();
        self.spawn(&record.clone(), true, |progress| async move {
            let outcome = shared.fill_from_source(&record, &credentials, &progress).await;
            // What it failed with is in the record.
            let _ = shared.conclude(&record, outcome).await;
        });
    }

    /// Fills a recorded checkpoint from entries that the caller sends; returns when it is decided.
    ///
    /// # Errors
    /// What the stream or the store failed with; the record is then `failed`, and nothing of it is kept, since it cannot be resumed.
    pub async fn fill_from_stream(
        &self,
        record: &Record,
        entries: Box<dyn EntryStream>,
        bytes_total: u64,
    ) -> Result<()> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let shared = self.0.clone();
        let record = record.clone();
        self.spawn(&record.clone(), false, move |progress| async move {
            progress.expect(bytes_total, 0);
            let outcome = shared.fill_from_sender(&record, entries, &progress).await;
            if outcome.as_ref().is_err_and(|error| error.reason() != NOT_WANTED) {
                shared.give_back(&record).await;
            }
            let _ = sender.send(shared.conclude(&record, outcome).await);
        });
        receiver.await.map_err(|_| Error::new(Kind::Cancelled, "INGEST_CANCELLED", "the ingest was cancelled"))?
    }

    /// How far a checkpoint is; `None` when it is not filling.
    pub fn progress(&self, id: &str) -> Option<Reading> {
        lock(&self.0.tasks).get(id).map(|task| task.progress.reading())
    }

    /// Ids of checkpoints whose record changed, as it happens. A receiver that lags is told so and looks at everything.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.0.changes.subscribe()
    }

    /// Tells watchers that a record changed.
    pub fn note_change(&self, id: &str) {
        let _ = self.0.changes.send(id.to_owned());
    }
}

/// What filling gives: revision, tree, and the flight that must be kept until the record is decided.
type Filled = (String, Manifest, Option<Arc<Flight>>);

impl Shared {
    fn source_of(&self, record: &Record, credentials: &Credentials) -> Result<Arc<dyn Source>> {
        let Origin { kind, uri, options } = record.origin.clone();
        (self.connect)(&SourceSpec { kind: kind.parse()?, uri, options }, &record.owner, credentials)
    }

    async fn fill_from_source(
        self: &Arc<Self>,
        record: &Record,
        credentials: &Credentials,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        self.set_filling(record).await?;
        let source = self.source_of(record, credentials)?;
        match retry::until_it_works(self.settings.attempts, || source.open()).await? {
            Opened::Listed(listing) => {
                let flight = self.join_flight(record, source, listing, progress).await?;
                let landed = flight.landed().await;
                if let (Err(error), Some(arriving)) = (&landed, flight.arriving()) {
                    arriving.fail(error);
                }
                let manifest = landed?;
                Ok((flight.revision().to_owned(), manifest.as_ref().clone(), Some(flight)))
            }
            Opened::Streamed(entries) => {
                let _slot = self.slot().await?;
                self.fill_from_entries(record, entries, progress).await
            }
        }
    }

    async fn fill_from_sender(
        self: &Arc<Self>,
        record: &Record,
        entries: Box<dyn EntryStream>,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        self.set_filling(record).await?;
        let closed = |_| Error::internal("the senders' slots are closed");
        let _slot = self.senders.acquire().await.map_err(closed)?;
        let entries = unpack::Unpacked::new(self.clone(), &record.id, entries);
        self.fill_from_entries(record, Box::new(entries), progress).await
    }

    async fn fill_from_entries(
        self: &Arc<Self>,
        record: &Record,
        entries: Box<dyn EntryStream>,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        let (id, flight) = (record.id.clone(), record.id.clone());
        self.store.catalog().write(move |tx| checkpoints::set_listing(tx, &id, "", &flight, 0, 0)).await?;
        self.store.disk().clear_flight(&record.id, &[])?;
        self.store.disk().begin_flight(&record.id)?;
        let (revision, manifest) = stream::fill(self, &record.id, entries, progress).await?;
        Ok((revision, manifest, None))
    }

    /// # Errors
    /// `NOT_WANTED` for a record that is decided or gone: there is nothing to fill.
    async fn set_filling(&self, record: &Record) -> Result<()> {
        let id = record.id.clone();
        if !self.store.catalog().write(move |tx| checkpoints::begin_filling(tx, &id)).await? {
            return Err(Error::new(Kind::Cancelled, NOT_WANTED, "the checkpoint needs no filling"));
        }
        let _ = self.changes.send(record.id.clone());
        Ok(())
    }

    /// A place among those that move bytes.
    async fn slot(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.slots.acquire().await.map_err(|_| Error::internal("the ingest slots are closed"))
    }

    /// Joins the flight of these bytes for this owner, or starts it.
    async fn join_flight(
        self: &Arc<Self>,
        record: &Record,
        source: Arc<dyn Source>,
        listing: crate::source::Listing,
        progress: &Arc<Progress>,
    ) -> Result<Arc<Flight>> {
        let archive = extract::Archive::of(&listing, &record.origin.options);
        let mut revision = listing.revision.clone();
        let mut plan = plan::Sizes::of(&listing, self.settings.checkpoint_bytes)?;
        if archive.is_some() {
            revision = format!("archive:{revision}");
            plan = plan::Sizes { files: 0, known_bytes: 0 };
        }
        let key = flight::key(record, &revision);
        self.check_shown(record, &key).await?;
        progress.expect(plan.known_bytes, plan.files);
        let (id, shown, key_row) = (record.id.clone(), revision.clone(), key.clone());
        let before = self
            .store
            .catalog()
            .write(move |tx| {
                let before = checkpoints::set_listing(tx, &id, &shown, &key_row, plan.files, plan.known_bytes)?;
                if before != key_row {
                    placements::hand_over(tx, &before, &key_row)?;
                }
                Ok(before)
            })
            .await?;
        let _ = self.changes.send(record.id.clone());
        if !before.is_empty() && before != key {
            self.drop_flight_if_unneeded(before).await?;
        }
        let skipped = listing.skipped.clone();
        let flight = {
            let mut flights = lock(&self.flights);
            flights.retain(|_, flight| flight.strong_count() > 0);
            match flights.get(&key).and_then(Weak::upgrade) {
                Some(flight) => flight,
                None => {
                    let flight = self.start_flight(record, key.clone(), revision, source, listing, archive)?;
                    flights.insert(key, Arc::downgrade(&flight));
                    flight
                }
            }
        };
        progress.follow(flight.progress());
        let otherwise = if flight.in_place().is_some() { "it stays where it is" } else { "it is an archive" };
        self.note_estimate(record, plan.known_bytes.saturating_sub(flight.progress().reading().bytes_done)).await?;
        self.arrivals.note(&record.id, flight.arriving(), otherwise);
        let _ = self.changes.send(record.id.clone());
        self.note_skipped(record, &skipped).await?;
        Ok(flight)
    }

    fn start_flight(
        self: &Arc<Self>,
        record: &Record,
        key: String,
        revision: String,
        source: Arc<dyn Source>,
        listing: crate::source::Listing,
        archive: Option<extract::Archive>,
    ) -> Result<Arc<Flight>> {
        let progress = Arc::new(Progress::default());
        let arriving = match archive {
            None if listing.in_place.is_none() => {
                Some(self.arrivals.begin(&self.store, &key, &listing, source.is_local())?)
            }
            _ => None,
        };
        let flying = Arc::new(fetch::Flying::new(self.clone(), source, &record.origin, key.clone(), progress.clone()));
        let (in_place, brought) = (listing.in_place.clone(), arriving.clone());
        Ok(Flight::start(key, revision, in_place, progress, arriving, async move {
            match (archive, brought) {
                (Some(archive), _) => extract::extract(&flying, &archive).await,
                (None, Some(arriving)) => flight::fly(&flying, &arriving, listing).await,
                (None, None) => in_place::fly(&flying, listing).await,
            }
        }))
    }

    /// Refuses to go over to another revision under jobs that read the one before.
    async fn check_shown(&self, record: &Record, key: &str) -> Result<()> {
        let id = record.id.clone();
        let before = self.store.catalog().read(move |tx| checkpoints::flight_of(tx, &id)).await?;
        let moves = before != key && self.arrivals.of_key(&before).is_some_and(|arriving| arriving.is_read());
        if moves { Err(arrivals::moved_on()) } else { Ok(()) }
    }

    /// Whether jobs read what there is of a checkpoint; where it cannot be told, they do.
    async fn is_shown(&self, record: &Record) -> bool {
        let id = record.id.clone();
        match self.store.catalog().read(move |tx| checkpoints::flight_of(tx, &id)).await {
            Ok(key) => self.arrivals.of_key(&key).is_some_and(|arriving| arriving.is_read()),
            Err(_) => true,
        }
    }

    async fn note_skipped(&self, record: &Record, skipped: &[(String, String)]) -> Result<()> {
        if skipped.is_empty() {
            return Ok(());
        }
        let shown: Vec<_> = skipped.iter().take(20).map(|(path, why)| format!("{path} ({why})")).collect();
        let message = format!("{} entries were left out: {}", skipped.len(), shown.join(", "));
        self.record_event("ENTRIES_SKIPPED", record, message).await
    }

    /// Decides the record by what came of filling it.
    ///
    /// # Errors
    /// What the record failed with, `NOT_WANTED` where it was decided before.
    async fn conclude(self: &Arc<Self>, record: &Record, outcome: Result<Filled>) -> Result<()> {
        let result = match outcome {
            Ok((_, manifest, _)) if manifest.entries().is_empty() => Err(empty()),
            Ok((revision, manifest, flight)) => self.make_ready(record, revision, manifest, flight).await,
            Err(error) if error.reason() == NOT_WANTED => return Err(error),
            Err(error) => Err(error),
        };
        self.arrivals.forget(&record.id);
        if let Err(error) = &result {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "the checkpoint failed");
            if error.kind() == Kind::NoSpace && !self.is_shown(record).await {
                self.give_back(record).await;
            }
            while let Err(second) = self.make_failed(record, error).await {
                tracing::error!(checkpoint = record.id, error = %second.report(), "recording the failure failed");
                tokio::time::sleep(RECORD_AGAIN_AFTER).await;
            }
        }
        let _ = self.changes.send(record.id.clone());
        result
    }

    /// A task ended in a panic, which the log has: a bug of ours.
    async fn conclude_panic(self: &Arc<Self>, record: &Record, resumes: bool) {
        let id = record.id.clone();
        let found = self.store.catalog().read(move |tx| checkpoints::get(tx, &id)).await;
        let is_open = |found: Record| matches!(found.state, State::New | State::Filling);
        if found.is_ok_and(|found| !found.is_some_and(is_open)) {
            return;
        }
        if !resumes {
            self.give_back(record).await;
        }
        let error = Error::internal("bringing the checkpoint in ended in a panic: a bug of ours, which the log shows")
            .remedy("report it, then retry the checkpoint");
        // What it failed with is in the record.
        let _ = self.conclude(record, Err(error)).await;
    }

    async fn make_ready(
        self: &Arc<Self>,
        record: &Record,
        revision: String,
        manifest: Manifest,
        flight: Option<Arc<Flight>>,
    ) -> Result<()> {
        let id = record.id.clone();
        let own_flight = flight.as_ref().map_or_else(|| record.id.clone(), |flight| flight.key().to_owned());
        let in_place = flight.as_ref().and_then(|flight| flight.in_place().cloned());
        let bytes = in_place.map_or(Bytes::Stored, |place| Bytes::InPlace(place, own_flight.clone()));
        let message =
            format!("`{}` is ready: {} files, {} bytes", record.name, manifest.files(), manifest.logical_bytes());
        self.store
            .catalog()
            .write(move |tx| {
                let digest = manifest.digest();
                checkpoints::set_ready(tx, &id, &revision, &manifest, &digest, &bytes)?;
                forecasts::note_outcome(tx, &id, now_unix_ms())?;
                let event =
                    NewEvent { kind: "CHECKPOINT_READY", checkpoint: id.clone(), message, ..Default::default() };
                events::record(tx, now_unix_ms(), &event)
            })
            .await?;
        self.drop_flight_if_unneeded(own_flight).await
    }

    /// What was filled of a checkpoint goes: of one that did not fit, so that something smaller can come; of one that was sent, since
    /// nobody can go on with it.
    async fn give_back(&self, record: &Record) {
        let id = record.id.clone();
        let forget = move |tx: &rusqlite::Connection| {
            let flight = checkpoints::flight_of(tx, &id)?;
            checkpoints::clear_flight(tx, &id).map(|()| flight)
        };
        let flight = self.store.catalog().write(forget).await;
        let given_back = match flight {
            Ok(flight) if !flight.is_empty() => self.store.remove_flight(&flight).await.map(|_| ()),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = given_back {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "giving back what was filled failed");
        }
    }

    async fn make_failed(&self, record: &Record, error: &Error) -> Result<()> {
        let (id, failure) = (record.id.clone(), Failure::of(error));
        let event = NewEvent {
            kind: "CHECKPOINT_FAILED",
            checkpoint: record.id.clone(),
            message: format!("`{}` failed: {}", record.name, error.report()),
            ..Default::default()
        };
        self.store
            .catalog()
            .write(move |tx| {
                if checkpoints::set_state(tx, &id, State::Failed, Some(&failure))? {
                    events::record(tx, now_unix_ms(), &event)?;
                }
                Ok(())
            })
            .await
    }

    async fn record_event(&self, kind: &'static str, record: &Record, message: String) -> Result<()> {
        let event = NewEvent { kind, checkpoint: record.id.clone(), message, ..Default::default() };
        self.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await
    }

    /// Forgets a flight that no record needs: rows and files, and what only it had sealed.
    async fn drop_flight_if_unneeded(&self, flight: String) -> Result<()> {
        self.store.remove_flight(&flight).await.map(|_| ())
    }
}

/// A checkpoint of nothing is somebody's mistake.
fn empty() -> Error {
    Error::invalid("EMPTY_SOURCE", "the source has no files and no directories").remedy("check the address or path")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
