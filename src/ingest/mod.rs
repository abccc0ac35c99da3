//! Bringing checkpoints in: one task per checkpoint, one *flight* per revision.
//!
//! A checkpoint's task opens its source, which resolves the revision, and then joins the flight that fills exactly these bytes for
//! its owner, or starts it. The flight ([`flight`]) belongs to nobody: it goes on while at least one checkpoint waits for it, whoever
//! came first, and fills each file once. When it is done every checkpoint that waited becomes `ready` in a transaction of its own. The
//! flight's rows root what it sealed until the last of them has been decided.
//!
//! A task ends in exactly one of: `ready`; `failed` with the error recorded (durable units stay, `retry` resumes); or cancelled
//! by removal. `kill -9` leaves `filling`, and the next start begins the task again. A panic is a failure. What is sent has its sender's life
//! ([`sending`]).
//!
//! What was ready once and was evicted is filled like anything else, and comes to the same tree or fails ([`again`]). Whether there is room is decided
//! before the first byte ([`admission`]).
//! A source that somebody may still be writing to is looked at until it rests ([`rest`]).
//!
//! A source may want its bytes left where they are ([`in_place`]): then the flight only takes digests, and `ready` means that each file's
//! stamp is recorded.
//!
//! Waiting: tasks wait for room for their entries ([`entries`]), then for a slot (`limits::INGESTS_AT_A_TIME`; senders, who may be slow for hours, for one of
//! `limits::SENDERS_AT_A_TIME`), fetchers for the memory budget and for permits per source, sealers
//! for the frontier on blocking threads. Nothing waits while it holds a lock.

mod admission;
mod again;
mod arrivals;
pub mod arriving;
mod conclude;
mod copy;
mod early;
mod ending;
mod entries;
pub mod estimate;
mod extract;
mod fetch;
mod flight;
mod flying;
mod healing;
mod in_place;
mod left;
mod marks;
pub mod plan;
pub mod progress;
mod publish;
pub mod quota;
mod rest;
pub mod retry;
mod seal;
pub mod secrets;
mod sending;
mod small;
mod stream;
mod taker;
mod tar;
mod tasks;
mod unpack;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Semaphore, broadcast, watch};

use crate::archive::Dictionaries;
use crate::catalog::checkpoints::{self, Record};
use crate::catalog::fills;
use crate::catalog::placements;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::manifest::Manifest;
use crate::source::{Credentials, EntryStream, Listing, Opened, SOURCE_CHANGED, Source, SourceSpec};
use crate::store::Store;
use crate::units::now_unix_ms;

pub use admission::MakeRoom;
pub use arrivals::Arrival;
use arrivals::Arrivals;
pub use ending::Ending;
use entries::{Room, Rooms};
use flight::Flight;
pub use left::{Decoded, Left};
use progress::{Progress, Reading};
use quota::Quotas;
use rest::Rest;
use secrets::{NoHolder, SecretsHolder};
pub use sending::{Announced, Kept, Survives};
pub use tasks::draining;
use tasks::{AtPause, Task};

/// Reason of an ingest that found nothing to do.
const NOT_WANTED: &str = "NOT_WANTED";

/// Files whose bytes are kept in one transaction: some milliseconds of the catalog's one writer.
const KEPT_AT_A_TIME: usize = 4096;

/// Makes a source of what a request asks for, its owner, and the secrets that came with it.
pub type Connector = Arc<dyn Fn(&SourceSpec, &str, &Credentials) -> Result<Arc<dyn Source>> + Send + Sync>;

/// What operators may set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes that fetchers may hold in memory.
    pub memory_budget_bytes: u64,
    /// For the dictionaries of archives.
    pub dictionaries: Dictionaries,
    /// Logical bytes one checkpoint may have.
    pub checkpoint_bytes: u64,
    /// Attempts without progress before a fetch is given up.
    pub attempts: u32,
    /// How much owners may keep here.
    pub quotas: Arc<Quotas>,
    /// Who holds the secrets of requests beyond the process.
    pub secrets: Arc<dyn SecretsHolder>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory_budget_bytes: limits::MEMORY_BUDGET_DEFAULT,
            dictionaries: Dictionaries::default(),
            checkpoint_bytes: limits::CHECKPOINT_BYTES_DEFAULT,
            attempts: retry::ATTEMPTS_DEFAULT,
            quotas: Arc::default(),
            secrets: Arc::new(NoHolder),
        }
    }
}

/// All ingests of the daemon; cheap to clone.
#[derive(Clone)]
pub struct Ingests(Arc<Shared>);

struct Shared {
    store: Store,
    connect: Connector,
    make_room: MakeRoom,
    settings: Settings,
    slots: Semaphore,
    /// One flight is admitted at a time.
    admission: Semaphore,
    lately: admission::Lately,
    senders: Semaphore,
    /// Numbers of filling files, never used again: a write that outlives its flight can hit nobody else's file.
    next_number: AtomicU64,
    bounds: flying::Bounds,
    rooms: Rooms,
    tasks: Mutex<HashMap<String, Task>>,
    flights: Mutex<HashMap<String, Weak<Flight>>>,
    arrivals: Arrivals,
    /// Checkpoints that jobs see of which nothing here knows yet: their sessions wait to be taken over.
    shown: Mutex<HashSet<String>>,
    changes: broadcast::Sender<String>,
    /// Nothing is begun any more.
    paused: watch::Sender<bool>,
}

impl Ingests {
    /// Ingests into `store`, where `make_room` is asked for what it has no room for.
    pub fn new(store: Store, connect: Connector, make_room: MakeRoom, settings: Settings) -> Self {
        let (changes, _) = broadcast::channel(limits::QUEUE_COMMANDS);
        let bounds = flying::Bounds::new(settings.memory_budget_bytes);
        let rooms = Rooms::new(&settings);
        Self(Arc::new(Shared {
            store,
            connect,
            make_room,
            settings,
            slots: Semaphore::new(limits::INGESTS_AT_A_TIME),
            admission: Semaphore::new(1),
            lately: admission::Lately::default(),
            senders: Semaphore::new(limits::SENDERS_AT_A_TIME),
            next_number: AtomicU64::new(u64::try_from(now_unix_ms()).unwrap_or(0) << 20),
            bounds,
            rooms,
            tasks: Mutex::default(),
            flights: Mutex::default(),
            arrivals: Arrivals::default(),
            shown: Mutex::default(),
            changes,
            paused: watch::Sender::new(false),
        }))
    }

    /// The source of a record that is to be: URI, options and named secrets, without contacting anybody.
    ///
    /// # Errors
    /// What filling would fail with at once.
    pub fn source(&self, record: &Record, credentials: &Credentials) -> Result<Arc<dyn Source>> {
        self.0.source_of(record, credentials)
    }

    /// Begins to fill a recorded checkpoint; one that is filling already is left alone.
    pub fn start(&self, record: &Record, credentials: Credentials) {
        let (shared, made_of, given) = (self.0.clone(), record.clone(), credentials.clone());
        self.start_with(record, given, move || shared.source_of(&made_of, &credentials));
    }

    /// [`Ingests::start`] from a source that was made already with these secrets of the request.
    pub fn start_from(&self, record: &Record, source: Arc<dyn Source>, credentials: Credentials) {
        self.start_with(record, credentials, move || Ok(source.clone()));
    }

    fn start_with(
        &self,
        record: &Record,
        given: Credentials,
        source: impl Fn() -> Result<Arc<dyn Source>> + Send + Sync + 'static,
    ) {
        if self.is_paused() {
            return;
        }
        let shared = self.0.clone();
        let record = record.clone();
        self.spawn(&record.clone(), AtPause::Stops, move |progress| async move {
            let secrets_given = !given.is_empty();
            shared.hold_secrets(&record, given).await;
            let outcome = shared.fill_despite_bugs(&record, &source, secrets_given, &progress).await;
            let outcome = outcome.map_err(|error| again::explain(&record, error));
            // What it failed with is in the record.
            let _ = shared.conclude(&record, outcome).await;
            shared.let_go_of_secrets(&record.id).await;
        });
    }

    /// How far a checkpoint is; `None` when it is not filling.
    pub fn progress(&self, id: &str) -> Option<Reading> {
        lock(&self.0.tasks).get(id).map(|task| task.progress.reading())
    }

    /// Ids of checkpoints whose record changed, as it happens. A receiver that lags is told so and looks at everything.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.0.changes.subscribe()
    }

    /// How much owners may keep here.
    pub fn quotas(&self) -> &Quotas {
        &self.0.settings.quotas
    }

    /// Whether jobs read what there is of a checkpoint that fills.
    pub async fn is_shown(&self, record: &Record) -> bool {
        self.0.is_shown(record).await
    }

    /// Notes that jobs see a checkpoint through a session that is not served yet, or that it is served or gone by now.
    pub fn note_shown(&self, checkpoint: &str, waits: bool) {
        let mut shown = lock(&self.0.shown);
        if waits {
            shown.insert(checkpoint.to_owned());
        } else {
            shown.remove(checkpoint);
        }
    }

    /// Tells watchers that a record changed.
    pub fn note_change(&self, id: &str) {
        let _ = self.0.changes.send(id.to_owned());
    }
}

/// What filling gives: revision, tree, and the flight that must be kept until the record is decided.
type Filled = (String, Arc<Manifest>, Option<Arc<Flight>>);

impl Shared {
    fn source_of(&self, record: &Record, credentials: &Credentials) -> Result<Arc<dyn Source>> {
        (self.connect)(&again::spec_of(record)?, &record.owner, credentials)
    }

    async fn fill_from_source(
        self: &Arc<Self>,
        record: &Record,
        source: &(impl Fn() -> Result<Arc<dyn Source>> + Sync),
        secrets_given: bool,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        self.set_filling(record).await?;
        self.note_secrets(record, secrets_given).await?;
        let source = source()?;
        let mut rest = Rest::default();
        loop {
            let error = match self.fill_once(record, &source, &mut rest, progress).await {
                // What was captured before comes back as it was or not at all: no look later helps.
                Err(error) if error.reason() == SOURCE_CHANGED && source.may_change() && record.manifest.is_none() => {
                    error
                }
                filled => return filled,
            };
            if self.is_shown(record).await {
                return Err(error);
            }
            self.arrivals.forget(&record.id);
            rest.wait(source.as_ref(), &plan::counter(&self.settings), error).await?;
            progress.restart();
        }
    }

    async fn fill_once(
        self: &Arc<Self>,
        record: &Record,
        source: &Arc<dyn Source>,
        rest: &mut Rest,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        let (opened, room) = self.open(source).await?;
        match opened {
            Opened::Listed(listing) => {
                let flight = self.join_flight(record, source.clone(), (listing, room), rest, progress).await?;
                let landed = flight.landed().await;
                // Of a bug of ours its readers are told when it has been tried again in vain.
                if let (Err(error), Some(arriving)) = (&landed, flight.arriving())
                    && error.kind() != Kind::Internal
                {
                    arriving.fail(error);
                }
                let manifest = landed?;
                Ok((flight.revision().to_owned(), manifest, Some(flight)))
            }
            Opened::Streamed(entries) => {
                drop(room);
                let _slot = self.slot().await?;
                self.note_streamed(record, 0).await?;
                self.store.disk().clear_flight(&record.id, &[])?;
                let filled = self.fill_from_entries(record, entries, 0, progress).await;
                if filled.as_ref().is_err_and(|error| error.reason() == SOURCE_CHANGED) && source.may_change() {
                    // Members of an archive that is another now.
                    self.give_back(record).await;
                }
                filled
            }
        }
    }

    /// Takes entries into the record's own flight, whose directory has nothing but what they go on with. `missing_bytes` are announced that are not
    /// on disk, less than all of it perhaps.
    async fn fill_from_entries(
        self: &Arc<Self>,
        record: &Record,
        entries: Box<dyn EntryStream>,
        missing_bytes: u64,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        if missing_bytes > 0 {
            // Refused before the first byte where it cannot fit; each file is admitted as it comes.
            self.admit_more(missing_bytes).await?;
        }
        self.store.disk().begin_flight(&record.id)?;
        let (revision, manifest) = stream::fill(self, &record.id, entries, progress).await?;
        Ok((revision, Arc::new(manifest), None))
    }

    /// # Errors
    /// `NOT_WANTED` for a record that is decided or gone: there is nothing to fill.
    async fn set_filling(&self, record: &Record) -> Result<()> {
        let id = record.id.clone();
        self.filling(record, self.store.catalog().write(move |tx| checkpoints::begin_filling(tx, &id)).await?)
    }

    /// Tells watchers that a record `is_filling`.
    ///
    /// # Errors
    /// `NOT_WANTED` where it is not.
    fn filling(&self, record: &Record, is_filling: bool) -> Result<()> {
        if !is_filling {
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
        (listing, room): (Listing, Room),
        rest: &mut Rest,
        progress: &Arc<Progress>,
    ) -> Result<Arc<Flight>> {
        let archive = extract::Archive::of(&listing, &record.origin.options);
        let revision = again::revision_of(&listing, record);
        let mut plan = plan::Sizes::of(&listing, &self.settings)?;
        if archive.is_some() {
            plan = again::sizes_of(record);
        }
        again::check_revision(record, &revision)?;
        let key = flight::key(record, &revision);
        self.check_shown(record, &key).await?;
        progress.expect(plan.known_bytes, plan.files);
        if source.may_change() {
            self.keep_unchanged(record, &key, rest.look(&listing)).await?;
        }
        let (id, shown, key_row) = (record.id.clone(), revision.clone(), key.clone());
        let (quotas, kept_bytes) =
            (self.settings.quotas.clone(), listing.in_place.is_none().then_some(plan.known_bytes));
        let before = self
            .store
            .catalog()
            .write(move |tx| {
                quota::charge_listed(tx, &quotas, &id, &key_row, kept_bytes)?;
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
        if archive.is_none() {
            self.share_right(record, &key, &listing).await?;
        }
        let skipped = if rest.is_first() { listing.skipped.clone() } else { Vec::new() };
        let flight = {
            let mut flights = lock(&self.flights);
            flights.retain(|_, flight| flight.strong_count() > 0);
            match flights.get(&key).and_then(Weak::upgrade).filter(|flight| !flight.is_over()) {
                Some(flight) => flight,
                None => {
                    let flight = self.start_flight(record, key.clone(), revision, source, (listing, room), archive)?;
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
        (listing, room): (Listing, Room),
        archive: Option<extract::Archive>,
    ) -> Result<Arc<Flight>> {
        let progress = Arc::new(Progress::default());
        let arriving = match archive {
            None if listing.in_place.is_none() => {
                Some(self.arrivals.begin(&self.store, &key, &listing, source.is_local())?)
            }
            _ => None,
        };
        let flying = Arc::new(flying::Flying::new(self.clone(), source, record, key.clone(), progress.clone()));
        let (in_place, brought) = (listing.in_place.clone(), arriving.clone());
        Ok(Flight::start(key, revision, in_place, progress, arriving, async move {
            // Members of an archive have room of their own.
            let _until_it_ends = archive.is_none().then_some(room);
            match (archive, brought) {
                (Some(archive), _) => extract::extract(&flying, &archive).await,
                (None, Some(arriving)) => {
                    let revision = listing.revision.clone();
                    let manifest = flight::fly(&flying, &arriving, listing).await?;
                    if flying.source.may_change() {
                        rest::check_unchanged(&flying, &revision).await?;
                    }
                    Ok(manifest)
                }
                (None, None) => in_place::fly(&flying, listing).await,
            }
        }))
    }

    /// What the record's last flight has sealed of `paths` is given to the flight `key`, which lists them alike.
    async fn keep_unchanged(&self, record: &Record, key: &str, paths: Vec<Vec<u8>>) -> Result<()> {
        let id = record.id.clone();
        let before = self.store.catalog().read(move |tx| checkpoints::flight_of(tx, &id)).await?;
        if before.is_empty() || before == key {
            return Ok(());
        }
        let mut paths = paths.into_iter();
        loop {
            let batch: Vec<_> = paths.by_ref().take(KEPT_AT_A_TIME).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let (before, key) = (before.clone(), key.to_owned());
            self.store.catalog().write(move |tx| fills::share_sealed(tx, &before, &key, &batch)).await?;
        }
    }

    /// Refuses to go over to another revision under jobs that read the one before.
    async fn check_shown(&self, record: &Record, key: &str) -> Result<()> {
        let id = record.id.clone();
        let before = self.store.catalog().read(move |tx| checkpoints::flight_of(tx, &id)).await?;
        let moves = before != key && self.is_seen(&record.id, &before);
        if moves { Err(arrivals::moved_on()) } else { Ok(()) }
    }

    /// Whether jobs read what there is of a checkpoint; where it cannot be told, they do.
    async fn is_shown(&self, record: &Record) -> bool {
        let id = record.id.clone();
        match self.store.catalog().read(move |tx| checkpoints::flight_of(tx, &id)).await {
            Ok(key) => self.is_seen(&record.id, &key),
            Err(_) => true,
        }
    }

    /// Whether jobs see the checkpoint as the flight `key` fills it.
    fn is_seen(&self, checkpoint: &str, key: &str) -> bool {
        lock(&self.shown).contains(checkpoint) || self.arrivals.of_key(key).is_some_and(|arriving| arriving.is_read())
    }

    async fn note_skipped(&self, record: &Record, skipped: &[(String, String)]) -> Result<()> {
        if skipped.is_empty() {
            return Ok(());
        }
        let shown: Vec<_> = skipped.iter().take(20).map(|(path, why)| format!("{path} ({why})")).collect();
        let message = format!("{} entries were left out: {}", skipped.len(), shown.join(", "));
        self.record_event("ENTRIES_SKIPPED", record, message).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
