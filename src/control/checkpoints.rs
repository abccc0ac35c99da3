//! The service `Checkpoints`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::refusal::status;
use super::{Floors, capture, resolve, upload, watch, wire};
use crate::catalog::checkpoints::{self as rows, Origin, Record, Seen, State};
use crate::catalog::losses;
use crate::error::{Error, Kind, Result};
use crate::names::{CheckpointId, CheckpointName, OwnerId};
use crate::source::{self, Credentials, Source, SourceKind, SourceSpec};
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
        if let Some((name, signature)) = signature {
            secrets.entry(name.into()).or_insert(signature);
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
        self.begin(record, Credentials::new(secrets), None, caller).await
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
        self.begin(record, Credentials::new(request.credentials.into_iter().collect()), None, caller).await
    }

    /// Records and starts, in a task of its own: a caller that goes away must not leave a record that nobody fills.
    /// `made` is its source, where that is made already.
    async fn begin(
        &self,
        record: Record,
        credentials: Credentials,
        made: Option<Arc<dyn Source>>,
        caller: &Caller,
    ) -> Result<wire::Checkpoint> {
        let (floors, seen) = (self.floors.clone(), caller.sees());
        let record = tokio::spawn(async move {
            let (id, asking) = (record.id.clone(), seen.clone());
            // A repeated call is answered by the record, whatever would be said of it by now.
            let known = floors.store.catalog().read(move |tx| known(tx, &id, &asking)).await?.is_some();
            let source = match made {
                None if !known && !is_sent(&record) => Some(floors.ingests.source(&record, &credentials)?),
                made => made,
            };
            let (record, _) = insert(&floors, record, seen).await?;
            if matches!(record.state, State::New | State::Filling) && floors.ingests.progress(&record.id).is_none() {
                match source {
                    // What it holds already (the root of a process) may be gone by a second time.
                    Some(source) => floors.ingests.start_from(&record, source, credentials),
                    None => floors.start_unless_sent(&record, credentials),
                }
            }
            Ok::<_, Error>(record)
        })
        .await
        .map_err(|error| Error::internal("recording a checkpoint ended early").because(error))??;
        self.floors.show_transfer(record, caller).await
    }

    async fn capture(&self, request: wire::CaptureOutputRequest, caller: &Caller) -> Result<wire::Checkpoint> {
        self.floors.admit()?;
        let (record, source) = capture::record_of(&self.floors, request, caller).await?;
        self.begin(record, Credentials::default(), source, caller).await
    }

    async fn retry(&self, request: wire::RetryCheckpointRequest, caller: &Caller) -> Result<wire::Checkpoint> {
        self.floors.admit()?;
        let credentials = Credentials::new(request.credentials.into_iter().collect());
        let (floors, asking) = (self.floors.clone(), caller.clone());
        let record = tokio::spawn(async move {
            let mark = move |tx: &rusqlite::Connection| mark_for_retry(tx, &request.checkpoint, &asking);
            let (record, begins) = floors.store.catalog().write(mark).await?;
            let idle = floors.ingests.progress(&record.id).is_none();
            if record.state == State::Filling && (begins || idle) {
                floors.start_unless_sent(&record, credentials);
            }
            Ok::<_, Error>(record)
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
}

/// Finds a record and, if it failed or something of it is lost, makes it fill again; whether it did.
fn mark_for_retry(tx: &rusqlite::Connection, reference: &str, caller: &Caller) -> Result<(Record, bool)> {
    let record = resolve::own(tx, reference, caller)?;
    match record.state {
        State::Ready if record.failure.is_none() => Ok((record, false)),
        State::Failed | State::Evicted | State::Ready if record.origin.kind == SourceKind::Upload.as_str() => {
            Err(Error::wrong_state(
                "NOT_RETRIABLE",
                format!("the checkpoint `{}` was uploaded: only the sender has its bytes", record.name),
            )
            .remedy("upload it again"))
        }
        State::Failed | State::Evicted => {
            rows::set_state(tx, &record.id, State::Filling, None)?;
            Ok((Record { state: State::Filling, failure: None, ..record }, true))
        }
        // With a failure: bytes of it are lost.
        State::Ready => {
            losses::begin_healing(tx, &record.id)?;
            Ok((Record { state: State::Filling, ..record }, true))
        }
        State::New | State::Filling | State::Removing => Ok((record, false)),
    }
}

/// A record as a request asks for it, checked.
pub(super) fn new_record(id: String, name: String, owner: String, public: bool, origin: Origin) -> Result<Record> {
    let id = if id.is_empty() { CheckpointId::fresh()? } else { CheckpointId::new(id)? };
    if !owner.is_empty() {
        OwnerId::new(owner.clone())?;
    }
    if public && !owner.is_empty() {
        return Err(Error::invalid("PUBLIC_HAS_NO_OWNER", "a checkpoint is either public or somebody's")
            .remedy("give one of the two"));
    }
    Ok(Record {
        owner,
        public,
        ..Record::new(id.to_string(), CheckpointName::new(name)?.to_string(), origin, now_unix_ms())
    })
}

/// The record of a chosen id, if the caller sees it. One who is confined to an owner may not guess at ids: whether one is taken tells of others.
///
/// # Errors
/// `ID_NOT_A_UUID`.
pub(super) fn known(tx: &rusqlite::Connection, id: &str, seen: &Seen) -> Result<Option<Record>> {
    let known = rows::get(tx, id)?.filter(|record| seen.includes(record));
    if known.is_none() && matches!(seen, Seen::By(_)) && !is_uuid(id) {
        let message = format!("`{id}` is no UUID, and an owner's own ids must be");
        return Err(Error::invalid("ID_NOT_A_UUID", message).remedy("give a random UUID, or none"));
    }
    Ok(known)
}

fn is_uuid(id: &str) -> bool {
    id.len() == 36
        && id.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

fn id_taken(id: &str, by: &str) -> Error {
    let message = format!("the id `{id}` belongs to another checkpoint{by}");
    Error::new(Kind::AlreadyExists, "ID_TAKEN", message).remedy("choose another id or none")
}

/// Adds the record, or finds that the same was asked for before; whether it is new.
pub(super) async fn insert(floors: &Floors, record: Record, seen: Seen) -> Result<(Record, bool)> {
    floors.store.disk().check_healthy()?;
    let inserted = floors
        .store
        .catalog()
        .write(move |tx| match known(tx, &record.id, &seen)? {
            None if rows::get(tx, &record.id)?.is_some() => Err(id_taken(&record.id, "")),
            None => rows::insert(tx, &record).map(|()| (record, true)),
            Some(before) => same(before, &record).map(|before| (before, false)),
        })
        .await?;
    floors.ingests.note_change(&inserted.0.id);
    Ok(inserted)
}

/// The record that was made before of the same that `record` asks for.
///
/// # Errors
/// `NO_SUCH_CHECKPOINT`; as [`insert`].
pub(super) async fn already(floors: &Floors, record: Record, seen: Seen) -> Result<Record> {
    let find = move |tx: &rusqlite::Connection| match known(tx, &record.id, &seen)? {
        None => Err(resolve::no_such(&record.id, false)),
        Some(before) => same(before, &record),
    };
    floors.store.catalog().read(find).await
}

/// The record of an id, if it is of what is asked for now.
fn same(before: Record, asked: &Record) -> Result<Record> {
    if before.name == asked.name
        && before.owner == asked.owner
        && before.public == asked.public
        && before.origin == asked.origin
    {
        return Ok(before);
    }
    Err(id_taken(&before.id, &format!(", `{}`", before.name)))
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
        self.floors.remove(request.into_inner(), &caller).await.map(Response::new).map_err(status)
    }

    async fn upload_checkpoint(
        &self,
        request: Request<Streaming<wire::UploadCheckpointRequest>>,
    ) -> Result<Response<wire::Checkpoint>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        upload::receive(&self.floors, request.into_inner(), caller).await.map(Response::new).map_err(status)
    }

    async fn get_upload(&self, request: Request<wire::GetUploadRequest>) -> Result<Response<wire::Upload>, Status> {
        let caller = Caller::of(&request).map_err(status)?;
        upload::get(&self.floors, request.into_inner(), &caller).await.map(Response::new).map_err(status)
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
        let (a, b) = (CheckpointId::fresh().unwrap(), CheckpointId::fresh().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), 36);
        assert_eq!(&a.as_str()[14..15], "4");
        assert!(is_uuid(a.as_str()));
        for other in ["", "m", "0123456789abcdef0123456789abcdef0123", "g1234567-0123-4123-8123-0123456789ab"] {
            assert!(!is_uuid(other), "{other}");
        }
    }
}
