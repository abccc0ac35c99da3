//! Uploads: the calls that send one, and what becomes of it and its record.
//!
//! | file | what it is about |
//! |---|---|
//! | `under_way` | one upload: where it stands, whose messages are heard, how it ends |
//! | `sent` | the messages, whoever sends them, as the stream of entries that the ingest takes |
//! | `left` | what a start finds of those that its predecessor had under way |
//!
//! Each upload has one task from its first message to its end ([`follow`]), apart from any call. A call hands its messages over and waits for what
//! comes of it; it may go at any time. Where the client chose the id, the upload then waits for the next call ([`wire::UploadStart::resume`]): silent for
//! [`Uploads::idle`] it ends. Otherwise it ends with its call.
//!
//! One that waits so survives the daemon too, however that ends: what is recorded of it as it comes is durable, and a start finds it where that ends,
//! which may be before where its sender had been told that it stood. A drain has recorded all that came, but for what was not a whole fill unit. What is
//! one archive to be taken apart is kept in no such way, and begins anew.
//!
//! However else it ends but ready, its record is removed and nothing of it is kept: by an error, a removal, and, where the client chose no id, a drain or the
//! end of the process. None of these waits for a sender.

mod left;
mod sent;
mod under_way;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tonic::Streaming;

use super::caller::Caller;
use super::checkpoints::{already, insert, new_record};
use super::wire::reasons;
use super::wire::upload_checkpoint_request::Message;
use super::{Floors, resolve, wire};
use crate::catalog::checkpoints::{self as rows, Origin, Record, State};
use crate::catalog::events::NewEvent;
use crate::error::{Error, Result};
use crate::ingest::{Announced, Survives, draining};
use crate::limits;
use crate::panics::guarded_task;
use crate::source::SourceKind;
use sent::{Sent, protocol};
use under_way::{EXPIRED, Heard, Upload};

/// The messages of one call.
type Messages = Streaming<wire::UploadCheckpointRequest>;

/// All uploads under way, by the id of their record.
#[derive(Debug)]
pub struct Uploads {
    idle: Duration,
    open: Mutex<HashMap<String, Arc<Upload>>>,
}

impl Uploads {
    /// None yet; one that is silent for `idle` is dropped.
    pub fn new(idle: Duration) -> Self {
        Self { idle, open: Mutex::default() }
    }

    /// The upload that fills `record`.
    fn of(&self, record: &Record) -> Option<Arc<Upload>> {
        self.lock().get(&record.id).filter(|upload| upload.fills(record)).cloned()
    }

    fn add(&self, upload: &Arc<Upload>) {
        self.lock().insert(upload.id().to_owned(), Arc::clone(upload));
    }

    fn forget(&self, upload: &Arc<Upload>) {
        let mut open = self.lock();
        if open.get(upload.id()).is_some_and(|present| Arc::ptr_eq(present, upload)) {
            open.remove(upload.id());
        }
    }

    /// Ends the one that was left first where too many wait for their senders: each holds a place among those that move bytes.
    fn keep_few(&self) {
        let open = self.lock();
        let mut left: Vec<_> = open.values().filter_map(|upload| Some((upload.left_since()?, upload))).collect();
        if left.len() > limits::UPLOADS_LEFT {
            left.sort_by_key(|(since, _)| *since);
            for (_, upload) in &left[..left.len() - limits::UPLOADS_LEFT] {
                upload.end_if_left(under_way::crowded_out());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Upload>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call whose messages are heard; the upload is left when it is dropped.
struct Call {
    uploads: Arc<Uploads>,
    upload: Arc<Upload>,
    heard: Heard,
}

impl Call {
    /// Waits for the end of the upload.
    ///
    /// # Errors
    /// What it ended with; `UPLOAD_TAKEN_OVER`, `UPLOAD_BROKEN` where the upload goes on without this call.
    async fn outcome(&mut self) -> Result<()> {
        tokio::select! {
            outcome = self.upload.ending().concluded() => outcome,
            Ok(unheard) = &mut self.heard.told => Err(unheard),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.upload.leave(self.heard.turn, "the connection broke");
        self.uploads.keep_few();
    }
}

/// What a call came to.
enum Begun {
    /// There is nothing to send: it is here.
    Ready(Box<Record>),
    UnderWay(Call),
}

/// What a `start` asks for.
struct Wanted {
    record: Record,
    bytes_total: u64,
    one_file: bool,
    /// Whether it outlives its connection.
    resumes: bool,
    resume: Option<wire::UploadPosition>,
}

impl Wanted {
    fn of(start: wire::UploadStart, caller: &Caller) -> Result<Self> {
        let options = start.options.into_iter().collect();
        let origin = Origin { kind: SourceKind::Upload.to_string(), uri: start.origin, options };
        let one_file = start.one_file && origin.options.get("extract").is_none_or(|value| value != "false");
        let (resumes, resume, bytes_total) = (!start.id.is_empty(), start.resume, start.bytes_total);
        if resume.is_some() && !resumes {
            return Err(protocol("`resume` needs the id of what is gone on with"));
        }
        let owner = caller.owner_of_new(start.owner, start.public)?;
        let record = new_record(start.id, start.name, owner, start.public, origin)?;
        Ok(Self { record, bytes_total, one_file, resumes, resume })
    }
}

/// Receives a checkpoint, or what is left of one; the record, ready.
pub(super) async fn receive(floors: &Floors, mut messages: Messages, caller: Caller) -> Result<wire::Checkpoint> {
    floors.admit()?;
    let Some(Message::Start(start)) = sent::first(&mut messages).await? else {
        return Err(protocol("the first message must be `start`"));
    };
    let wanted = Wanted::of(start, &caller)?;
    // In a task of its own: a sender that goes away drops this call, and what it began must go on, or go, all the same.
    let (own, asking) = (floors.clone(), caller.clone());
    let begun = tokio::spawn(async move {
        match wanted.resume {
            Some(at) => resume(&own, &wanted.record, at, messages, &asking).await,
            None => begin(&own, wanted, messages, &asking).await,
        }
    });
    match begun.await.map_err(|error| Error::internal("an upload ended early").because(error))?? {
        Begun::Ready(record) => floors.show(*record, &caller).await,
        Begun::UnderWay(mut call) => {
            call.outcome().await.map_err(|error| caller.may_know(error))?;
            floors.show(floors.find(call.upload.id().to_owned(), &caller).await?, &caller).await
        }
    }
}

/// Where an upload stands; see the protocol.
pub(super) async fn get(floors: &Floors, request: wire::GetUploadRequest, caller: &Caller) -> Result<wire::Upload> {
    let (id, asking) = (request.id, caller.clone());
    let find = move |tx: &rusqlite::Connection| {
        let seen = asking.sees();
        let found = rows::get(tx, &id)?.filter(|found| seen.includes(found) && found.state != State::Removing);
        let found = found.ok_or_else(|| resolve::no_such(&id, false))?;
        asking.check_owns(&found).map(|()| found)
    };
    let record = floors.store.catalog().read(find).await?;
    let upload = floors.uploads.of(&record).ok_or_else(|| match record.state {
        // It is left for the next start, which knows where it stands.
        State::New | State::Filling if floors.ingests.is_paused() => kept(&record, draining()),
        _ => not_under_way(&record),
    })?;
    if request.take_over {
        upload.take_over();
    }
    Ok(upload.shown())
}

async fn begin(floors: &Floors, wanted: Wanted, messages: Messages, caller: &Caller) -> Result<Begun> {
    let record = loop {
        let (record, is_new) = insert(floors, wanted.record.clone(), caller.sees()).await?;
        if is_new {
            break record;
        }
        if record.state == State::Ready {
            return Ok(Begun::Ready(Box::new(record)));
        }
        match floors.uploads.of(&record) {
            // Whoever began it knows nothing of it any more: nobody comes back for what is here.
            Some(left) if left.end_if_left(under_way::replaced()) => _ = left.ending().concluded().await,
            _ => {
                let message = format!("`{}` is being uploaded already", record.name);
                return Err(Error::wrong_state(reasons::UPLOAD_UNDER_WAY, message)
                    .remedy("wait for it, or remove it and upload it again"));
            }
        }
    };
    let (upload, heard) = Upload::begin(&record, wanted.resumes, messages);
    let upload = Arc::new(upload);
    floors.uploads.add(&upload);
    let sent = Sent::new(Arc::clone(&upload), wanted.one_file, Vec::new());
    let survives = wanted.resumes.then_some(Survives { one_file: wanted.one_file, kept: None });
    let announced = Announced { bytes: wanted.bytes_total, survives };
    tokio::spawn(follow(floors.clone(), Arc::clone(&upload), record, sent, announced));
    Ok(Begun::UnderWay(Call { uploads: Arc::clone(&floors.uploads), upload, heard }))
}

/// Hands the messages of a sender that comes back to the upload, if `at` is where it stands.
async fn resume(
    floors: &Floors,
    record: &Record,
    at: wire::UploadPosition,
    messages: Messages,
    caller: &Caller,
) -> Result<Begun> {
    let found = already(floors, record.clone(), caller.sees()).await?;
    if found.state == State::Ready {
        return Ok(Begun::Ready(Box::new(found)));
    }
    let upload = floors.uploads.of(&found).ok_or_else(|| not_under_way(&found))?;
    let heard = upload.resume(at, messages)?;
    Ok(Begun::UnderWay(Call { uploads: Arc::clone(&floors.uploads), upload, heard }))
}

/// The life of an upload, and what comes of it.
async fn follow(floors: Floors, upload: Arc<Upload>, record: Record, sent: Sent, announced: Announced) {
    let outcome = guarded_task("an upload", async { Ok(outcome_of(&floors, &upload, &record, sent, announced).await) });
    let (outcome, is_kept) = match outcome.await {
        Ok(outcome) => outcome,
        Err(bug) => (Err(bug.remedy("report it, then upload it again")), false),
    };
    if let Err(error) = &outcome
        && !is_kept
    {
        floors.drop_upload(&record, error).await;
    }
    floors.uploads.forget(&upload);
    upload.ending().conclude(outcome);
}

/// What comes of an upload, and whether it is kept for the next daemon to go on with.
async fn outcome_of(
    floors: &Floors,
    upload: &Upload,
    record: &Record,
    sent: Sent,
    announced: Announced,
) -> (Result<()>, bool) {
    tracing::debug!(checkpoint = record.id, "an upload is received");
    let filling = floors.ingests.fill_from_stream(record, Box::new(sent), announced);
    tokio::pin!(filling);
    let outcome = tokio::select! {
        outcome = &mut filling => Some(outcome),
        why = upload.ended(floors.uploads.idle) => Some(Err(why)),
        () = floors.ingests.until_paused() => None,
    };
    match outcome {
        Some(outcome) => (outcome, false),
        None if upload.resumes() => {
            upload.pause(kept(record, drained(record)));
            match filling.await {
                // The one is what it was paused for, the other that the drain did not wait for it any longer.
                Err(error) if matches!(error.reason(), "DRAINING" | "INGEST_CANCELLED") => {
                    (Err(kept(record, drained(record))), true)
                }
                outcome => (outcome, false),
            }
        }
        None => (Err(drained(record).remedy("upload it again when ckptd has been restarted")), false),
    }
}

impl Floors {
    /// Removes the record of an upload that ended with `why`, unless it is gone, or is another by now.
    async fn drop_upload(&self, record: &Record, why: &Error) {
        let own = record.clone();
        let mark = move |tx: &rusqlite::Connection| match rows::get(tx, &own.id)? {
            // Not where it became ready a moment before it was to end.
            Some(found) if found.created_ms == own.created_ms && found.state != State::Ready => {
                rows::set_state(tx, &own.id, State::Removing, None)
            }
            _ => Ok(false),
        };
        let removed = match self.store.catalog().write(mark).await {
            Ok(true) => self.remove_marked(record).await.map(|_| ()),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(checkpoint = record.id, error = %error.report(), "removing an upload failed");
        }
        if why.reason() == EXPIRED {
            self.note(NewEvent {
                kind: EXPIRED,
                checkpoint: record.id.clone(),
                owner: record.owner.clone(),
                message: format!("`{}`: {why}", record.name),
                ..Default::default()
            })
            .await;
        }
    }
}

/// That the daemon is drained while it receives `record`. The fact tells the client that it had been taken.
fn drained(record: &Record) -> Error {
    draining().during("receiving an upload").fact("checkpoint", &record.id)
}

/// `error`, which leaves what was sent of `record` where it is.
fn kept(record: &Record, error: Error) -> Error {
    let id = &record.id;
    error.remedy(format!(
        "what was sent is kept: when ckptd has been restarted the same command with `--id {id}` goes on with it"
    ))
}

fn not_under_way(record: &Record) -> Error {
    Error::wrong_state(
        reasons::UPLOAD_NOT_UNDER_WAY,
        format!("`{}` is not being uploaded: it is {}", record.name, record.state),
    )
    .fact("checkpoint", &record.id)
    .remedy("`ckptctl get` shows what became of it")
}
