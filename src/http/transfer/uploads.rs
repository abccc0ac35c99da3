//! All uploads under way, at most one for each checkpoint, and what becomes of their records.
//!
//! Each upload has one task from its first piece to its end: it waits until the one before has gone, fills, and when the upload is
//! given up or silent sees to it that nothing is left of it and the record waits again. The catalog is asked only when an upload begins or
//! is not known. What a dead daemon had under way goes on ([`left`](super::left)).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::chunk::{BODY_PATIENCE, Body, Range};
use super::places::{Place, Places};
use super::refusal::Refusal;
use super::upload::{ROOM_PATIENCE, Upload};
use crate::catalog::checkpoints::{self, Record, State};
use crate::catalog::events::{self, NewEvent};
use crate::error::{Error, Kind, Result};
use crate::ingest::{Announced, Ingests, Kept, Survives, draining};
use crate::panics::guarded_task;
use crate::source::SourceKind;
use crate::source::local::{self, Bearer, SentTar, StreamDigest, Tokens};
use crate::store::Store;
use crate::units::now_unix_ms;

/// Uploads under way. More than can be written at a time, so that some may wait their turn with their first pieces here.
const UPLOADS: usize = 4 * crate::limits::SENDERS_AT_A_TIME;

/// How long the end of filling is waited for: the client waits 600 s.
const FINALIZE_PATIENCE: Duration = Duration::from_secs(540);

/// Why nothing is begun by a daemon that is drained.
const DRAINED: &str = "ckptd is being drained and takes no uploads until it has been restarted";

/// See the module's page.
pub struct Transfers {
    pub(super) store: Store,
    pub(super) ingests: Ingests,
    tokens: Arc<Tokens>,
    idle: Duration,
    open: Mutex<HashMap<String, Arc<Upload>>>,
    places: Places,
}

/// How far a checkpoint is whose bytes are all here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finalized {
    Ready,
    Filling,
}

impl Transfers {
    /// Takes uploads for `ingests`; one that is silent for `idle` is dropped.
    pub fn new(store: Store, ingests: Ingests, tokens: Arc<Tokens>, idle: Duration) -> Self {
        Self { store, ingests, tokens, idle, open: Mutex::default(), places: Places::default() }
    }

    /// Whether the store takes new bytes.
    ///
    /// # Errors
    /// `STORE_POISONED`.
    pub fn check_healthy(&self) -> Result<()> {
        self.store.disk().check_healthy()
    }

    /// Longest silence in the middle of a body.
    pub(super) fn patience(&self) -> Duration {
        BODY_PATIENCE.min(self.idle)
    }

    pub(super) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Room for a body, for as long as a piece may have to wait.
    pub(super) async fn place<'a>(&'a self, bearer: Bearer<'a>) -> Result<Place<'a>, Refusal> {
        self.places.take(bearer.checkpoint, ROOM_PATIENCE).await
    }

    /// Takes a piece; where the next one begins.
    pub(super) async fn take(
        self: &Arc<Self>,
        bearer: Bearer<'_>,
        id: &str,
        range: Range,
        piece: Body,
    ) -> Result<u64, Refusal> {
        let upload = match self.of(bearer) {
            Some(upload) if upload.id() == id && !upload.begins_again(range) => upload,
            Some(upload) if upload.took_place_of(id) && upload.id() != id => {
                return Err(Refusal::Gone("another upload of this checkpoint took the place of this one".to_owned()));
            }
            present if range.start == 0 => self.begin(bearer, id, present).await?,
            _ => {
                self.awaited(bearer).await?;
                return Err(interrupted());
            }
        };
        upload.take(range, piece).await
    }

    /// Where the next piece of an upload begins; 0 for one that is not known.
    pub(super) async fn expected(&self, bearer: Bearer<'_>, id: &str) -> Result<u64, Refusal> {
        match self.of(bearer).filter(|upload| upload.id() == id) {
            Some(upload) => Ok(upload.expected()),
            None => self.awaited(bearer).await.map(|_| 0),
        }
    }

    /// Ends an upload and waits for what comes of it.
    pub(super) async fn finalize(
        &self,
        bearer: Bearer<'_>,
        id: &str,
        digest: StreamDigest,
    ) -> Result<Finalized, Refusal> {
        let Some(upload) = self.of(bearer).filter(|upload| upload.id() == id) else {
            return self.finalized_before(bearer, digest).await;
        };
        let ending = async {
            match upload.end(digest).await {
                // Any answer but that it is done would be final to the client; to a connection that ends it comes back, and finds the next daemon.
                Err(Refusal::Busy(_)) => std::future::pending().await,
                ended => ended?,
            }
            upload.ending().concluded().await.map_err(Refusal::from)
        };
        match tokio::time::timeout(FINALIZE_PATIENCE, ending).await {
            Ok(ended) => ended.map(|()| Finalized::Ready),
            Err(_) if upload.is_held() => Err(Refusal::Busy(DRAINED)),
            Err(_) => Ok(Finalized::Filling),
        }
    }

    /// What to say to who ends an upload that is not under way: it may have ended, and the answer been lost.
    async fn finalized_before(&self, bearer: Bearer<'_>, digest: StreamDigest) -> Result<Finalized, Refusal> {
        let record = self.record(bearer).await?;
        if record.state == State::Ready {
            let same = record.revision == local::revision(&digest);
            return if same { Ok(Finalized::Ready) } else { Err(Refusal::WrongDigest) };
        }
        waits(&record)?;
        Err(interrupted())
    }

    /// Begins an upload in place of `present`.
    async fn begin(
        self: &Arc<Self>,
        bearer: Bearer<'_>,
        id: &str,
        present: Option<Arc<Upload>>,
    ) -> Result<Arc<Upload>, Refusal> {
        let record = self.awaited(bearer).await?;
        if self.ingests.is_paused() {
            return Err(Refusal::Busy(DRAINED));
        }
        let (feed, entries) = local::stream(about(&record, id), extracts(&record))?;
        let before = present.as_ref().map(|upload| upload.id().to_owned()).filter(|before| before != id);
        let upload = Arc::new(Upload::new(id, before.unwrap_or_default(), bearer.created_ms, feed));
        {
            let mut open = self.lock();
            let now = open.get(bearer.checkpoint);
            if now.map(Arc::as_ptr) != present.as_ref().map(Arc::as_ptr) {
                // Another request began one meanwhile: this one, if the client sent its first piece twice.
                return now.filter(|now| now.id() == id).cloned().ok_or(Refusal::Busy("another upload is beginning"));
            }
            if now.is_none() && open.len() >= UPLOADS {
                return Err(Refusal::Busy("too many uploads are under way"));
            }
            if present.as_ref().is_some_and(|present| !present.give_up()) {
                return Err(Refusal::Gone("everything was sent already".to_owned()));
            }
            open.insert(record.id.clone(), Arc::clone(&upload));
        }
        tokio::spawn(Arc::clone(self).follow(Arc::clone(&upload), record, entries, None, present));
        Ok(upload)
    }

    /// Takes up one that an earlier run of the daemon had under way.
    pub(super) fn go_on(self: &Arc<Self>, record: Record, upload: Upload, entries: SentTar, kept: Kept) -> Arc<Upload> {
        let upload = Arc::new(upload);
        self.lock().insert(record.id.clone(), Arc::clone(&upload));
        tokio::spawn(Arc::clone(self).follow(Arc::clone(&upload), record, entries, Some(kept), None));
        upload
    }

    /// The life of an upload, and what comes of it.
    async fn follow(
        self: Arc<Self>,
        upload: Arc<Upload>,
        record: Record,
        entries: SentTar,
        kept: Option<Kept>,
        before: Option<Arc<Upload>>,
    ) {
        let outcome =
            guarded_task("an upload", async { Ok(self.outcome_of(&upload, &record, entries, kept, before).await) });
        let outcome = match outcome.await {
            Ok(outcome) => outcome,
            // What was kept of it is for the next daemon.
            Err(bug) if upload.is_held() => Err(bug),
            Err(bug) => {
                self.ingests.start_over(&record).await;
                Err(bug.remedy("report it, then start the upload again"))
            }
        };
        if outcome.is_err() && upload.is_held() {
            // Whoever sends it asks again until the next daemon is there.
            return;
        }
        self.forget(&record.id, &upload);
        upload.ending().conclude(outcome);
    }

    async fn outcome_of(
        &self,
        upload: &Arc<Upload>,
        record: &Record,
        entries: SentTar,
        kept: Option<Kept>,
        before: Option<Arc<Upload>>,
    ) -> Result<()> {
        if let Some(before) = before {
            // What came of it was told to who sent it.
            let _ = before.ending().concluded().await;
            self.note("UPLOAD_REPLACED", record, "a new upload took the place of one that was under way").await;
        }
        tracing::info!(checkpoint = record.id, goes_on = kept.is_some(), "an upload begins");
        let survives = Some(Survives { one_file: extracts(record), kept });
        let announced = Announced { bytes: 0, survives };
        tokio::select! {
            biased;
            // First: what the entries end with then is for the next daemon.
            () = self.drained(&record.id, upload) => {
                self.ingests.start_over(record).await;
                Err(draining().during("receiving an upload").remedy("start it again when ckptd has been restarted"))
            }
            outcome = self.ingests.fill_from_stream(record, Box::new(entries), announced) => outcome,
            silent = upload.abandoned(self.idle) => {
                self.ingests.start_over(record).await;
                if silent {
                    let idle_s = self.idle.as_secs();
                    let what = format!("the upload was silent for {idle_s} s and was dropped; the checkpoint waits for another");
                    self.note("UPLOAD_EXPIRED", record, &what).await;
                }
                Err(Error::new(Kind::Cancelled, "UPLOAD_DROPPED", "the upload was dropped").remedy("start it again"))
            }
        }
    }

    /// Resolves when the daemon is drained before all of `upload` is here, and no other can go on with it; then it takes nothing any more.
    async fn drained(&self, checkpoint: &str, upload: &Upload) {
        self.ingests.until_paused().await;
        if upload.hold(draining()) {
            std::future::pending::<()>().await;
        }
        if !upload.close("ckptd is being drained: start the upload again when it has been restarted") {
            // What is here is sealed.
            self.ingests.let_stay(checkpoint);
            std::future::pending::<()>().await;
        }
    }

    fn forget(&self, checkpoint: &str, upload: &Arc<Upload>) {
        let mut open = self.lock();
        if open.get(checkpoint).is_some_and(|present| Arc::ptr_eq(present, upload)) {
            open.remove(checkpoint);
        }
    }

    /// The upload under way for the record that a token was made for.
    fn of(&self, bearer: Bearer<'_>) -> Option<Arc<Upload>> {
        self.lock().get(bearer.checkpoint).filter(|upload| upload.is_of(bearer.created_ms)).cloned()
    }

    /// The record that a token was made for, if it waits for bytes.
    async fn awaited(&self, bearer: Bearer<'_>) -> Result<Record, Refusal> {
        let record = self.record(bearer).await?;
        waits(&record)?;
        Ok(record)
    }

    async fn record(&self, bearer: Bearer<'_>) -> Result<Record, Refusal> {
        let id = bearer.checkpoint.to_owned();
        let found = self.store.catalog().read(move |tx| checkpoints::get(tx, &id)).await?;
        let same = found.filter(|record| {
            record.created_ms == bearer.created_ms && record.origin.kind == SourceKind::Local.as_str()
        });
        same.ok_or_else(|| Refusal::Gone("the checkpoint was removed".to_owned()))
    }

    async fn note(&self, kind: &'static str, record: &Record, what: &str) {
        let message = format!("`{}`: {what}", record.name);
        let event = NewEvent { kind, checkpoint: record.id.clone(), message, ..Default::default() };
        let noted = self.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await;
        if let Err(error) = noted {
            tracing::warn!(error = %error.report(), "recording an event failed");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Upload>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one archive that is sent as a file is to be taken apart.
pub(super) fn extracts(record: &Record) -> bool {
    record.origin.options.get("extract").is_none_or(|value| value != "false")
}

/// Which upload of which record this is, for whoever finds what is kept of it.
fn about(record: &Record, id: &str) -> Vec<u8> {
    [record.created_ms.to_le_bytes().as_slice(), id.as_bytes()].concat()
}

/// The id of the upload that [`about`] is of, if it is of this record.
pub(super) fn id_of(record: &Record, about: &[u8]) -> Option<String> {
    let id = about.strip_prefix(record.created_ms.to_le_bytes().as_slice())?;
    String::from_utf8(id.to_vec()).ok()
}

fn waits(record: &Record) -> Result<(), Refusal> {
    let gone = |what: String| Err(Refusal::Gone(what));
    match (record.state, &record.failure) {
        (State::New | State::Filling, _) => Ok(()),
        (State::Ready, _) => gone(format!("the checkpoint `{}` is ready and takes no more", record.name)),
        (State::Failed, Some(failure)) => Err(Refusal::recorded(failure)),
        (State::Failed, None) => gone(format!("the checkpoint `{}` failed; retry it first", record.name)),
        (State::Evicted, _) => gone(format!("the bytes of `{}` were given up; retry it first", record.name)),
        (State::Removing, _) => gone("the checkpoint was removed".to_owned()),
    }
}

fn interrupted() -> Refusal {
    Refusal::Gone("the upload was interrupted, for instance by a restart of the daemon; start it again".to_owned())
}
