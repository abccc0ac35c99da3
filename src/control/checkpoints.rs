//! The service `Checkpoints`.

use std::pin::Pin;

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::refusal::status;
use super::{Floors, resolve, upload, watch, wire};
use crate::catalog::checkpoints::{self as rows, Origin, Record, Seen, State};
use crate::catalog::events::NewEvent;
use crate::catalog::jobs;
use crate::error::{Error, Kind, Result};
use crate::names::{CheckpointId, CheckpointName, JobId, OwnerId};
use crate::source::{self, Credentials, SourceKind, SourceSpec};
use crate::units::now_unix_ms;

pub(super) struct Service {
    floors: Floors,
}

impl Service {
    pub(super) fn new(floors: Floors) -> Self {
        Self { floors }
    }

    async fn create(&self, request: wire::CreateCheckpointRequest, caller: &Caller) -> Result<wire::Checkpoint> {
        self.floors.admit()?;
        if !request.catalog.is_empty() {
            return self.create_offered(request, caller).await;
        }
        let wanted = request.source.unwrap_or_default();
        let kind = if wanted.r#type.is_empty() { SourceKind::infer(&wanted.uri)? } else { wanted.r#type.parse()? };
        if matches!(kind, SourceKind::Directory | SourceKind::Upload) {
            return Err(Error::invalid(
                "UNKNOWN_SOURCE_TYPE",
                format!("checkpoints of type `{kind}` are not made with create"),
            )
            .remedy("use `ckptctl capture` or `ckptctl upload`"));
        }
        if kind == SourceKind::Local && self.floors.tokens.is_none() {
            return Err(Error::new(
                Kind::Unsupported,
                "NO_TRANSFER_LISTENER",
                "nothing can be sent to this daemon by HTTP, which checkpoints of type `local` are",
            )
            .remedy("set `http.listen`, or use `ckptctl upload`"));
        }
        let (uri, user) = source::split_user_information(&wanted.uri);
        let (uri, signature) = source::split_signature(kind, &uri);
        source::check_uri(kind, &uri)?;
        let spec = SourceSpec { kind, uri, options: wanted.options.into_iter().collect() };
        source::check_options(&spec.options)?;
        let origin = Origin { kind: kind.to_string(), uri: spec.uri, options: spec.options };
        let mut secrets: std::collections::BTreeMap<String, String> = request.credentials.into_iter().collect();
        if let Some(signature) = signature {
            secrets.entry("sas".into()).or_insert(signature);
        }
        if let Some((username, password)) = user {
            secrets.entry("username".into()).or_insert(username);
            secrets.entry("password".into()).or_insert(password);
        }
        let owner = caller.owner_of_new(request.owner, request.public)?;
        let mut record = new_record(request.id, request.name, owner, request.public, origin)?;
        if is_sent(&record) {
            record.state = State::Filling;
        }
        self.begin(record, Credentials::new(secrets), caller).await
    }

    /// A public checkpoint of the catalogue.
    async fn create_offered(
        &self,
        request: wire::CreateCheckpointRequest,
        caller: &Caller,
    ) -> Result<wire::Checkpoint> {
        if request.source.is_some() || !request.owner.is_empty() {
            let message =
                format!("`{}` is of the catalogue, which gives its source and makes it public", request.catalog);
            return Err(Error::invalid("CATALOG_HAS_THE_SOURCE", message).remedy("give neither a source nor an owner"));
        }
        let origin = self.floors.facts.catalogue.origin(&request.catalog)?;
        let name = if request.name.is_empty() { request.catalog } else { request.name };
        let owner = caller.owner_of_new(String::new(), true)?;
        let record = new_record(request.id, name, owner, true, origin)?;
        self.begin(record, Credentials::new(request.credentials.into_iter().collect()), caller).await
    }

    /// Records and starts, in a task of its own: a caller that goes away must not leave a record that nobody fills.
    async fn begin(&self, record: Record, credentials: Credentials, caller: &Caller) -> Result<wire::Checkpoint> {
        let (floors, seen) = (self.floors.clone(), caller.sees());
        let record = tokio::spawn(async move {
            let id = record.id.clone();
            // A repeated call is answered by the record, whatever would be said of it by now.
            let known = floors.store.catalog().read(move |tx| rows::get(tx, &id)).await?.is_some();
            if !known && !is_sent(&record) {
                floors.ingests.check(&record, &credentials)?;
            }
            let (record, _) = insert(&floors, record, seen).await?;
            if matches!(record.state, State::New | State::Filling) && floors.ingests.progress(&record.id).is_none() {
                floors.start_unless_sent(&record, credentials);
            }
            Ok::<_, Error>(record)
        })
        .await
        .map_err(|error| Error::internal("recording a checkpoint ended early").because(error))??;
        self.floors.show_transfer(record, caller).await
    }

    async fn capture(&self, request: wire::CaptureOutputRequest, caller: &Caller) -> Result<wire::Checkpoint> {
        self.floors.admit()?;
        let job = JobId::new(request.job)?;
        if !request.directory.starts_with('/') {
            return Err(Error::invalid(
                "PATH_NOT_ABSOLUTE",
                format!("the directory `{}` is not an absolute path", request.directory),
            )
            .remedy("give a path that begins with `/`"));
        }
        let metadata = std::fs::metadata(&request.directory)
            .map_err(|error| Error::io("capturing", &request.directory, error).remedy("check the path"))?;
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(Error::invalid("NOT_A_DIRECTORY", format!("{} is not a directory", request.directory))
                .remedy("give the directory whose content is to be captured"));
        }
        let name = if request.name.is_empty() {
            let job_name = if request.job_name.is_empty() { job.to_string() } else { request.job_name };
            match (request.workers, request.worker) {
                (0 | 1, _) => format!("Job - {job_name}"),
                (_, worker) => format!("Job - {job_name} Worker {worker}"),
            }
        } else {
            request.name
        };
        if let Some(unknown) = request.options.keys().find(|key| *key != "extract") {
            return Err(Error::invalid("UNKNOWN_OPTION", format!("capturing has no option `{unknown}`"))
                .remedy("the only one is `extract`"));
        }
        let options = request.options.into_iter().collect();
        let origin = Origin { kind: SourceKind::Directory.to_string(), uri: request.directory, options };
        let owner = caller.owner_of_new(request.owner, false)?;
        let record = new_record(request.id, name, owner, false, origin)?;
        self.begin(record, Credentials::default(), caller).await
    }

    async fn retry(&self, request: wire::RetryCheckpointRequest, caller: &Caller) -> Result<wire::Checkpoint> {
        self.floors.admit()?;
        let credentials = Credentials::new(request.credentials.into_iter().collect());
        let (floors, asking) = (self.floors.clone(), caller.clone());
        let record = tokio::spawn(async move {
            let mark = move |tx: &rusqlite::Connection| mark_for_retry(tx, &request.checkpoint, &asking);
            let record = floors.store.catalog().write(mark).await?;
            let idle = floors.ingests.progress(&record.id).is_none();
            if record.state == State::Filling && (record.failure.is_some() || idle) {
                floors.start_unless_sent(&record, credentials);
            }
            Ok::<_, Error>(Record { failure: None, ..record })
        })
        .await
        .map_err(|error| Error::internal("retrying ended early").because(error))??;
        self.floors.show_transfer(record, caller).await
    }

    async fn rename(&self, request: wire::RenameCheckpointRequest, caller: &Caller) -> Result<wire::Checkpoint> {
        let name = CheckpointName::new(request.name)?;
        let record = self.floors.find_own(request.checkpoint, caller).await?;
        let (id, text) = (record.id.clone(), name.to_string());
        self.floors.store.catalog().write(move |tx| rows::set_name(tx, &id, &text)).await?;
        self.floors.ingests.note_change(&record.id);
        self.floors.show(Record { name: name.to_string(), ..record }, caller).await
    }

    async fn remove(
        &self,
        request: wire::RemoveCheckpointRequest,
        caller: &Caller,
    ) -> Result<wire::RemoveCheckpointResponse> {
        let (reference, caller) = (request.checkpoint, caller.clone());
        // Looking for holders and marking are one transaction, so no job can come in between.
        let (record, flight) = self
            .floors
            .store
            .catalog()
            .write(move |tx| {
                let record = resolve::removable(tx, &reference, &caller)?;
                let holders = jobs::holders(tx, &record.id)?;
                if !holders.is_empty() {
                    return Err(in_use(&record, &holders));
                }
                if record.pinned {
                    return Err(pinned(&record));
                }
                rows::set_state(tx, &record.id, State::Removing, None)?;
                let flight = rows::flight_of(tx, &record.id)?;
                Ok((record, flight))
            })
            .await?;
        let (floors, marked) = (self.floors.clone(), record.clone());
        let freed_bytes = tokio::spawn(async move { floors.remove_marked(&marked, flight).await })
            .await
            .map_err(|error| Error::internal("removing ended early").because(error))??;
        let message = format!("`{}` was removed", record.name);
        self.floors
            .note(NewEvent {
                kind: "CHECKPOINT_REMOVED",
                checkpoint: record.id.clone(),
                owner: record.owner,
                message,
                ..Default::default()
            })
            .await;
        Ok(wire::RemoveCheckpointResponse { id: record.id, freed_bytes })
    }

    async fn watch(
        &self,
        request: wire::WatchCheckpointsRequest,
        caller: Caller,
    ) -> Result<ReceiverStream<Result<wire::Checkpoint, Status>>> {
        let changes = self.floors.ingests.changes();
        let only = match request.checkpoint.as_str() {
            "" => None,
            _ => Some(self.floors.find(request.checkpoint, &caller).await?.id),
        };
        let (sender, receiver) = mpsc::channel(16);
        let floors = self.floors.clone();
        tokio::spawn(async move {
            let outcome = match only {
                Some(id) => watch::one(&floors, &caller, &id, changes, &sender).await,
                None => watch::all(&floors, &caller, changes, &sender).await,
            };
            if let Err(error) = outcome {
                let _ = sender.send(Err(status(error))).await;
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// Whether somebody sends the bytes, when they wish: such a record waits, and nothing is started for it.
fn is_sent(record: &Record) -> bool {
    record.origin.kind == SourceKind::Local.as_str()
}

impl Floors {
    /// Begins to fill a record, if that is for us to begin; tells watchers otherwise.
    pub(super) fn start_unless_sent(&self, record: &Record, credentials: Credentials) {
        if is_sent(record) {
            self.ingests.note_change(&record.id);
        } else {
            self.ingests.start(record, credentials);
        }
    }

    /// Finishes the removal of a record that is marked `removing`, and of its flight; also after a restart. Returns the bytes freed.
    ///
    /// # Errors
    /// Poisoned store; what was begun is finished at the next start.
    pub async fn remove_marked(&self, record: &Record, flight: String) -> Result<u64> {
        self.ingests.cancel(&record.id).await;
        let mut swept = self.store.remove_checkpoint(&record.id).await?.freed_bytes;
        if !flight.is_empty() {
            swept += self.store.remove_flight(&flight).await?.freed_bytes;
        }
        self.ingests.note_change(&record.id);
        Ok(swept)
    }
}

/// Finds a record and, if it failed, makes it fill again; its old failure tells that it did.
fn mark_for_retry(tx: &rusqlite::Connection, reference: &str, caller: &Caller) -> Result<Record> {
    let record = resolve::own(tx, reference, caller)?;
    match record.state {
        State::Failed | State::Evicted if record.origin.kind == SourceKind::Upload.as_str() => Err(Error::wrong_state(
            "NOT_RETRIABLE",
            format!("the checkpoint `{}` was uploaded: only the sender has its bytes", record.name),
        )
        .remedy("upload it again")),
        State::Failed | State::Evicted => {
            rows::set_state(tx, &record.id, State::Filling, None)?;
            Ok(Record { state: State::Filling, ..record })
        }
        State::New | State::Filling | State::Ready | State::Removing => Ok(record),
    }
}

fn pinned(record: &Record) -> Error {
    Error::wrong_state("CHECKPOINT_PINNED", format!("the checkpoint `{}` is pinned", record.name))
        .fact("checkpoint", &record.id)
        .remedy(format!("`ckptctl unpin {}`, then remove it", record.id))
}

fn in_use(record: &Record, holders: &[String]) -> Error {
    Error::wrong_state(
        "CHECKPOINT_IN_USE",
        format!("the checkpoint `{}` is in use by {}", record.name, jobs_in_words(holders)),
    )
    .fact("checkpoint", &record.id)
    .fact("jobs", holders.join(","))
    .remedy("release them with `ckptctl release JOB`, then remove it")
}

fn jobs_in_words(jobs: &[String]) -> String {
    let plural = if jobs.len() == 1 { "job" } else { "jobs" };
    format!("{plural} {}", jobs.join(", "))
}

/// A record as a request asks for it, checked.
pub(super) fn new_record(id: String, name: String, owner: String, public: bool, origin: Origin) -> Result<Record> {
    let id = if id.is_empty() { fresh_id()? } else { CheckpointId::new(id)? };
    if !owner.is_empty() {
        OwnerId::new(owner.clone())?;
    }
    if public && !owner.is_empty() {
        return Err(Error::invalid("PUBLIC_HAS_NO_OWNER", "a checkpoint is either public or somebody's")
            .remedy("give one of the two"));
    }
    Ok(Record {
        id: id.to_string(),
        name: CheckpointName::new(name)?.to_string(),
        owner,
        public,
        state: State::New,
        origin,
        revision: String::new(),
        manifest: None,
        files: 0,
        logical_bytes: 0,
        failure: None,
        created_ms: now_unix_ms(),
        in_place: None,
        pinned: false,
        used_ms: now_unix_ms(),
        secrets_given: false,
    })
}

/// 128 random bits in the usual shape of a UUID (version 4).
fn fresh_id() -> Result<CheckpointId> {
    let mut bytes = [0_u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut bytes))
        .map_err(|error| Error::io("reading", "/dev/urandom", error))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    CheckpointId::new(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// Adds the record, or finds that the same was asked for before; whether it is new.
pub(super) async fn insert(floors: &Floors, record: Record, seen: Seen) -> Result<(Record, bool)> {
    floors.store.disk().check_healthy()?;
    let inserted = floors
        .store
        .catalog()
        .write(move |tx| match rows::get(tx, &record.id)? {
            None => rows::insert(tx, &record).map(|()| (record, true)),
            Some(before)
                if before.name == record.name
                    && before.owner == record.owner
                    && before.public == record.public
                    && before.origin == record.origin =>
            {
                Ok((before, false))
            }
            Some(before) => {
                let name = if seen.includes(&before) { format!(", `{}`", before.name) } else { String::new() };
                let message = format!("the id `{}` belongs to another checkpoint{name}", before.id);
                Err(Error::new(Kind::AlreadyExists, "ID_TAKEN", message).remedy("choose another id or none"))
            }
        })
        .await?;
    floors.ingests.note_change(&inserted.0.id);
    Ok(inserted)
}

#[tonic::async_trait]
impl wire::checkpoints_server::Checkpoints for Service {
    type WatchCheckpointsStream = Pin<Box<dyn Stream<Item = Result<wire::Checkpoint, Status>> + Send>>;

    async fn create_checkpoint(
        &self,
        request: Request<wire::CreateCheckpointRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.create(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn get_checkpoint(
        &self,
        request: Request<wire::GetCheckpointRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        let record = self.floors.find(request.into_inner().checkpoint, &caller).await.map_err(status)?;
        self.floors.show_transfer(record, &caller).await.map(Response::new).map_err(status)
    }

    async fn list_checkpoints(
        &self,
        request: Request<wire::ListCheckpointsRequest>,
    ) -> Result<Response<wire::ListCheckpointsResponse>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        let wire::ListCheckpointsRequest { owner, public } = request.into_inner();
        let seen = caller.sees();
        let select = move |tx: &rusqlite::Connection| rows::list(tx, &seen, &owner, public);
        let checkpoints = self.floors.show_all(&caller, select).await.map_err(status)?;
        Ok(Response::new(wire::ListCheckpointsResponse { checkpoints }))
    }

    async fn watch_checkpoints(
        &self,
        request: Request<wire::WatchCheckpointsRequest>,
    ) -> Result<Response<Self::WatchCheckpointsStream>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        let stream = self.watch(request.into_inner(), caller).await.map_err(status)?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn retry_checkpoint(
        &self,
        request: Request<wire::RetryCheckpointRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.retry(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn rename_checkpoint(
        &self,
        request: Request<wire::RenameCheckpointRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.rename(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn pin_checkpoint(
        &self,
        request: Request<wire::PinCheckpointRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.pin(request.into_inner().checkpoint, true, &caller).await.map(Response::new).map_err(status)
    }

    async fn unpin_checkpoint(
        &self,
        request: Request<wire::UnpinCheckpointRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.pin(request.into_inner().checkpoint, false, &caller).await.map(Response::new).map_err(status)
    }

    async fn remove_checkpoint(
        &self,
        request: Request<wire::RemoveCheckpointRequest>,
    ) -> Result<Response<wire::RemoveCheckpointResponse>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.remove(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn upload_checkpoint(
        &self,
        request: Request<Streaming<wire::UploadCheckpointRequest>>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        upload::receive(&self.floors, request.into_inner(), caller).await.map(Response::new).map_err(status)
    }

    async fn capture_output(
        &self,
        request: Request<wire::CaptureOutputRequest>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.capture(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn prefetch_checkpoint(
        &self,
        request: Request<wire::PrefetchCheckpointRequest>,
    ) -> Result<Response<wire::PrefetchCheckpointResponse>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.prefetch(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn estimate_checkpoint(
        &self,
        request: Request<wire::EstimateCheckpointRequest>,
    ) -> Result<Response<wire::Estimate>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        self.floors.estimate(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn list_catalog(
        &self,
        _request: Request<wire::ListCatalogRequest>,
    ) -> Result<Response<wire::ListCatalogResponse>, Status> {
        Ok(Response::new(wire::ListCatalogResponse { entries: self.floors.facts.catalogue.entries() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_ids_are_uuids_and_differ() {
        let (a, b) = (fresh_id().unwrap(), fresh_id().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), 36);
        assert_eq!(&a.as_str()[14..15], "4");
    }
}
