//! A daemon with canned answers on a Unix socket, in this process.
//!
//! What it answers depends on the name of the checkpoint: `refuse-N` is refused with gRPC code N, `bad` fails while it is watched,
//! `endless` never settles, and every other name gets ready.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ckptd::control::wire;
use ckptd::control::wire::checkpoints_server::{Checkpoints, CheckpointsServer};
use ckptd::control::wire::jobs_server::{Jobs, JobsServer};
use ckptd::control::wire::node_server::{Node, NodeServer};
use ckptd::control::wire::upload_checkpoint_request::Message;
use ckptd::control::wire::upload_entry::Kind;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::{Service as _, http};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

/// How long a call may be awaited.
const LIMIT: Duration = Duration::from_secs(60);

/// The canned record's.
pub(crate) const ID: &str = "c1";
pub(crate) const CREATED_UNIX_MS: i64 = 1_700_000_000_000;

/// An entry as an upload sent it.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Sent {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) content: Vec<u8>,
}

/// What was asked, in order.
#[derive(Default)]
pub(crate) struct Asked {
    pub(crate) calls: Vec<String>,
    pub(crate) start: Option<wire::UploadStart>,
    pub(crate) sent: Vec<Sent>,
}

/// The running stub; stops with all its connections when dropped.
pub(crate) struct Stub {
    socket: PathBuf,
    asked: Arc<Mutex<Asked>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Stub {
    pub(crate) fn start(directory: &Path) -> Self {
        let socket = directory.join("ckptd.sock");
        // A predecessor's socket, as the daemon would find it.
        drop(std::fs::remove_file(&socket));
        let (asked, (stop, stopped)) = (Arc::<Mutex<Asked>>::default(), oneshot::channel());
        let (listening, ready) = std::sync::mpsc::channel();
        let (at, answers) = (socket.clone(), Answers(Arc::clone(&asked)));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = UnixListener::bind(at).unwrap();
                listening.send(()).unwrap();
                tokio::select! {
                    served = serve(answers, listener) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        ready.recv().unwrap();
        Self { socket, asked, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    pub(crate) fn asked(&self) -> std::sync::MutexGuard<'_, Asked> {
        self.asked.lock().unwrap()
    }

    /// Waits until a call that contains `text` has come.
    pub(crate) fn await_call(&self, text: &str) {
        self.await_calls(1, text);
    }

    /// Waits for so many calls that say `text`.
    pub(crate) fn await_calls(&self, count: usize, text: &str) {
        let until = Instant::now() + LIMIT;
        while self.asked().calls.iter().filter(|call| call.contains(text)).count() < count {
            assert!(Instant::now() < until, "`{text}` was awaited {count} times in vain: {:#?}", self.asked().calls);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

async fn serve(answers: Answers, listener: UnixListener) -> Result<(), tonic::transport::Error> {
    let checkpoints = CheckpointsServer::new(answers.clone());
    let jobs = JobsServer::new(answers.clone());
    let node = NodeServer::new(answers);
    let services = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
        let (mut checkpoints, mut jobs, mut node) = (checkpoints.clone(), jobs.clone(), node.clone());
        async move {
            assert_eq!(request.uri().authority().map(|authority| authority.as_str()), Some("localhost"));
            match request.uri().path().split('/').nth(1) {
                Some("ckptd.v1.Checkpoints") => checkpoints.call(request).await,
                Some("ckptd.v1.Jobs") => jobs.call(request).await,
                _ => node.call(request).await,
            }
        }
    });
    Server::builder().serve_with_incoming(services, UnixListenerStream::new(listener)).await
}

#[derive(Clone)]
struct Answers(Arc<Mutex<Asked>>);

type Answer<T> = Result<Response<T>, Status>;

impl Answers {
    fn note(&self, request: &impl std::fmt::Debug) {
        self.0.lock().unwrap().calls.push(format!("{request:?}"));
    }
}

pub(crate) fn record(name: &str, state: wire::CheckpointState) -> wire::Checkpoint {
    wire::Checkpoint {
        id: ID.into(),
        name: name.into(),
        owner: "me".into(),
        state: state.into(),
        digest: "d".repeat(64),
        revision: "r1".into(),
        source: Some(wire::Source { r#type: "web".into(), uri: "https://x/y".into(), options: [].into() }),
        files: 3,
        logical_bytes: 3 << 30,
        unique_bytes: 2 << 30,
        physical_bytes: 1 << 30,
        created_unix_ms: CREATED_UNIX_MS,
        ..Default::default()
    }
}

fn filling(name: &str, bytes_done: u64) -> wire::Checkpoint {
    let fill = wire::Fill { bytes_done, bytes_total: 100, rate_bytes_per_s: 25, files_done: 0, files_total: 3 };
    wire::Checkpoint { fill: Some(fill), ..record(name, wire::CheckpointState::Filling) }
}

fn failed(name: &str) -> wire::Checkpoint {
    let error = wire::Failure {
        code: 8,
        reason: "DISK_FULL".into(),
        message: format!("filling {name}: 5 GiB are missing"),
        remedy: "remove a checkpoint".into(),
    };
    wire::Checkpoint { error: Some(error), ..record(name, wire::CheckpointState::Failed) }
}

/// The record called `name`, or the refusal the name asks for.
fn named(name: &str) -> Result<wire::Checkpoint, Status> {
    match name.strip_prefix("refuse-") {
        Some(code) => Err(refusal(Code::from(code.parse::<i32>().unwrap()))),
        None => Ok(record(name, wire::CheckpointState::Ready)),
    }
}

fn refusal(code: Code) -> Status {
    let facts = [("remedy".to_owned(), "do better".to_owned())];
    Status::with_error_details(code, "no such luck", ErrorDetails::with_error_info("NO_LUCK", "ckptd", facts))
}

fn attachment(job: String, state: wire::AttachmentState) -> wire::Attachment {
    let attached =
        wire::AttachedCheckpoint { id: ID.into(), name: "good".into(), path: "/t".into(), digest: "d".repeat(64) };
    wire::Attachment {
        job,
        target: "/t".into(),
        checkpoints: vec![attached],
        env: [("ML_CHECKPOINT_PATH".to_owned(), "/t".to_owned())].into(),
        state: state.into(),
        terms: vec!["a licence".into()],
        pid: 0,
        waited_for: String::new(),
        expires_unix_ms: 0,
    }
}

#[tonic::async_trait]
impl Checkpoints for Answers {
    type WatchCheckpointsStream = BoxStream<'static, Result<wire::Checkpoint, Status>>;

    async fn create_checkpoint(&self, request: Request<wire::CreateCheckpointRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        let name = request.into_inner().name;
        named(&name)?;
        Ok(Response::new(wire::Checkpoint { id: name.clone(), ..record(&name, wire::CheckpointState::New) }))
    }

    async fn get_checkpoint(&self, request: Request<wire::GetCheckpointRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        named(&request.get_ref().checkpoint).map(Response::new)
    }

    async fn list_checkpoints(
        &self,
        request: Request<wire::ListCheckpointsRequest>,
    ) -> Answer<wire::ListCheckpointsResponse> {
        self.note(request.get_ref());
        let checkpoints = vec![filling("first", 43), record("second", wire::CheckpointState::Ready)];
        Ok(Response::new(wire::ListCheckpointsResponse { checkpoints }))
    }

    async fn watch_checkpoints(
        &self,
        request: Request<wire::WatchCheckpointsRequest>,
    ) -> Answer<Self::WatchCheckpointsStream> {
        self.note(request.get_ref());
        let name = request.into_inner().checkpoint;
        named(&name)?;
        // Ids of this stub are names, so that a second watch by id means the same.
        let own = |record: wire::Checkpoint| wire::Checkpoint { id: name.clone(), ..record };
        let begun = [filling(&name, 25), filling(&name, 75)].map(own);
        let records = stream::iter(begun.map(Ok));
        let end = match name.as_str() {
            "endless" => return Ok(Response::new(records.chain(stream::pending()).boxed())),
            "bad" => failed(&name),
            _ => record(&name, wire::CheckpointState::Ready),
        };
        Ok(Response::new(records.chain(stream::iter([Ok(own(end))])).boxed()))
    }

    async fn retry_checkpoint(&self, request: Request<wire::RetryCheckpointRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        Ok(Response::new(filling(&request.get_ref().checkpoint, 1)))
    }

    async fn rename_checkpoint(&self, request: Request<wire::RenameCheckpointRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        Ok(Response::new(record(&request.get_ref().name, wire::CheckpointState::Ready)))
    }

    async fn pin_checkpoint(&self, request: Request<wire::PinCheckpointRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        let pinned = named(&request.get_ref().checkpoint)?;
        Ok(Response::new(wire::Checkpoint { pinned: true, ..pinned }))
    }

    async fn unpin_checkpoint(&self, request: Request<wire::UnpinCheckpointRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        named(&request.get_ref().checkpoint).map(Response::new)
    }

    async fn remove_checkpoint(
        &self,
        request: Request<wire::RemoveCheckpointRequest>,
    ) -> Answer<wire::RemoveCheckpointResponse> {
        self.note(request.get_ref());
        named(&request.get_ref().checkpoint)?;
        Ok(Response::new(wire::RemoveCheckpointResponse { id: ID.into(), freed_bytes: 1 << 20, freeing: false }))
    }

    async fn upload_checkpoint(
        &self,
        request: Request<Streaming<wire::UploadCheckpointRequest>>,
    ) -> Answer<wire::Checkpoint> {
        let mut messages = request.into_inner();
        while let Some(request) = messages.message().await? {
            let mut asked = self.0.lock().unwrap();
            match request.message.unwrap() {
                Message::Start(start) => {
                    named(&start.name)?;
                    asked.start = Some(start);
                }
                Message::Entry(entry) => {
                    let mut kind = entry.kind.unwrap();
                    if let Kind::File(file) = &mut kind {
                        assert_ne!(std::mem::take(&mut file.modified_unix_ns), 0);
                    }
                    asked.sent.push(Sent { path: entry.path, kind, content: Vec::new() });
                }
                Message::Data(data) => asked.sent.last_mut().unwrap().content.extend_from_slice(&data),
                Message::Finish(_) => {
                    let name = asked.start.clone().unwrap().name;
                    return Ok(Response::new(record(&name, wire::CheckpointState::Ready)));
                }
            }
        }
        self.0.lock().unwrap().calls.push("upload without an end".to_owned());
        Err(Status::invalid_argument("the stream ended without finish"))
    }

    async fn get_upload(&self, _: Request<wire::GetUploadRequest>) -> Answer<wire::Upload> {
        Err(Status::not_found("nothing is kept"))
    }

    async fn prefetch_checkpoint(
        &self,
        request: Request<wire::PrefetchCheckpointRequest>,
    ) -> Answer<wire::PrefetchCheckpointResponse> {
        self.note(request.get_ref());
        Err(Status::unimplemented("not here"))
    }

    async fn estimate_checkpoint(&self, request: Request<wire::EstimateCheckpointRequest>) -> Answer<wire::Estimate> {
        self.note(request.get_ref());
        Err(Status::unimplemented("not here"))
    }

    async fn list_catalog(&self, _: Request<wire::ListCatalogRequest>) -> Answer<wire::ListCatalogResponse> {
        let options = [("branch".to_owned(), "half".to_owned())].into();
        let source = wire::Source { r#type: "huggingface".into(), uri: "acme/tiny".into(), options };
        let terms_url = "https://hub.example/acme/tiny".into();
        let entry = wire::CatalogEntry { name: "tiny".into(), source: Some(source), terms_url };
        Ok(Response::new(wire::ListCatalogResponse { entries: vec![entry] }))
    }

    async fn capture_output(&self, request: Request<wire::CaptureOutputRequest>) -> Answer<wire::Checkpoint> {
        self.note(request.get_ref());
        Ok(Response::new(record("good", wire::CheckpointState::New)))
    }
}

#[tonic::async_trait]
impl Jobs for Answers {
    async fn reserve_checkpoints(&self, request: Request<wire::ReserveCheckpointsRequest>) -> Answer<wire::Attachment> {
        self.note(request.get_ref());
        Ok(Response::new(attachment(request.into_inner().job, wire::AttachmentState::Reserved)))
    }

    async fn attach_checkpoints(&self, request: Request<wire::AttachCheckpointsRequest>) -> Answer<wire::Attachment> {
        self.note(request.get_ref());
        Ok(Response::new(attachment(request.into_inner().job, wire::AttachmentState::Attached)))
    }

    async fn renew_lease(&self, request: Request<wire::RenewLeaseRequest>) -> Answer<wire::Attachment> {
        self.note(request.get_ref());
        let wire::RenewLeaseRequest { job, expires_unix_ms } = request.into_inner();
        let attachment = attachment(job, wire::AttachmentState::Attached);
        Ok(Response::new(wire::Attachment { expires_unix_ms, ..attachment }))
    }

    async fn detach_checkpoints(&self, request: Request<wire::DetachCheckpointsRequest>) -> Answer<wire::Attachment> {
        self.note(request.get_ref());
        Ok(Response::new(attachment(request.into_inner().job, wire::AttachmentState::Reserved)))
    }

    async fn release_job(&self, request: Request<wire::ReleaseJobRequest>) -> Answer<wire::ReleaseJobResponse> {
        self.note(request.get_ref());
        Ok(Response::new(wire::ReleaseJobResponse {}))
    }

    async fn get_job(&self, request: Request<wire::GetJobRequest>) -> Answer<wire::Attachment> {
        Ok(Response::new(attachment(request.into_inner().job, wire::AttachmentState::Attached)))
    }

    async fn list_jobs(&self, _: Request<wire::ListJobsRequest>) -> Answer<wire::ListJobsResponse> {
        let jobs = vec![attachment("j1".into(), wire::AttachmentState::Attached)];
        Ok(Response::new(wire::ListJobsResponse { jobs }))
    }
}

#[tonic::async_trait]
impl Node for Answers {
    type WatchEventsStream = BoxStream<'static, Result<wire::Event, Status>>;

    async fn get_status(&self, _: Request<wire::GetStatusRequest>) -> Answer<wire::Status> {
        let features = Some(wire::Features { passthrough: true, resend: true, reflink: false, open_tree: true });
        Ok(Response::new(wire::Status { pid: 7, version: "0.1.0".into(), features, ..Default::default() }))
    }

    async fn start_scrub(&self, request: Request<wire::StartScrubRequest>) -> Answer<wire::Scrub> {
        self.note(request.get_ref());
        Ok(Response::new(wire::Scrub { running: true, by_hand: true, started_unix_ms: 1, ..Default::default() }))
    }

    async fn drain(&self, _: Request<wire::DrainRequest>) -> Answer<wire::DrainResponse> {
        Ok(Response::new(wire::DrainResponse {}))
    }

    async fn evict_checkpoints(
        &self,
        request: Request<wire::EvictCheckpointsRequest>,
    ) -> Answer<wire::EvictCheckpointsResponse> {
        self.note(request.get_ref());
        let request = request.into_inner();
        let evicted = request.checkpoints.into_iter().map(|id| wire::Eviction {
            name: format!("name of {id}"),
            id,
            freed_bytes: 3 << 20,
            idle_ms: 61_000,
            ..Default::default()
        });
        Ok(Response::new(wire::EvictCheckpointsResponse {
            evicted: evicted.collect(),
            dry_run: request.dry_run,
            lacking_bytes: request.until_available_bytes,
            ..Default::default()
        }))
    }

    async fn get_usage(&self, _: Request<wire::GetUsageRequest>) -> Answer<wire::Usage> {
        Ok(Response::new(wire::Usage { logical_bytes: 10, unique_bytes: 5, ..Default::default() }))
    }

    async fn watch_events(&self, request: Request<wire::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        self.note(request.get_ref());
        let event = |id| wire::Event {
            id,
            kind: "CHECKPOINT_READY".into(),
            message: "m is ready".into(),
            ..Default::default()
        };
        let after = request.get_ref().after_id;
        Ok(Response::new(stream::iter((after + 1..=2).map(move |id| Ok(event(id)))).boxed()))
    }
}
