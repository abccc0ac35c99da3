//! gRPC: the services of `proto/`, each method parse, ask, answer.
//!
//! The services hold handles to the floors below and decide nothing of their own: names are resolved here ([`resolve`]), messages become
//! domain types at the door and errors become statuses on the way out ([`refusal`]). A call that the client gives up is dropped
//! where it waits; what it had begun goes on or is undone by the part that does it, never left half-made.
//!
//! Calls come by the Unix socket, and by TCP with certificates where it is configured ([`listen`], [`tls`]); each passes one door ([`access`]), which knows
//! who calls, what they may and for whom they speak ([`caller`]).

mod access;
mod ahead;
pub mod caller;
mod capture;
pub mod catalogue;
mod checkpoints;
mod evict;
mod heal;
mod jobs;
mod keeping;
pub mod listen;
mod node;
mod records;
mod refusal;
mod removal;
mod resolve;
mod scrub;
pub mod tls;
mod upload;
mod watch;
pub mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tower::layer::util::{Identity, Stack};

use crate::catalog::events::{self, NewEvent};
use crate::error::{Error, Result};
use crate::ingest::Ingests;
use crate::limits;
use crate::retain::Retention;
use crate::retain::scrub::Scrubber;
use crate::serve::attachments::Attachments;
use crate::source::local::Tokens;
use crate::store::Store;
use crate::units::now_unix_ms;

use access::{Access, Door};
use caller::Roles;
use catalogue::Catalogue;
pub use listen::{Listeners, bind, bind_tcp, take_listener};
pub use upload::Uploads;
use wire::checkpoints_server::CheckpointsServer;
use wire::jobs_server::JobsServer;
use wire::node_server::NodeServer;

/// Flow-control window: uploads come in messages of 1 to 8 MiB, and HTTP/2's own 64 KiB halves their rate.
const WINDOW_BYTES: u32 = 8 << 20;

/// Largest HTTP/2 frame: with it and the window, uploads were measured twice as fast.
const FRAME_BYTES: u32 = 1 << 20;

/// What the services stand on; cheap to clone.
#[derive(Clone)]
pub struct Floors {
    /// Blobs and rows.
    pub store: Store,
    /// Filling.
    pub ingests: Ingests,
    /// Room in the store.
    pub retention: Retention,
    /// Reading again what is at rest.
    pub scrubber: Scrubber,
    /// Jobs and views.
    pub attachments: Attachments,
    /// Uploads under way.
    pub uploads: Arc<Uploads>,
    /// Tokens of local transfers, where the daemon listens for them.
    pub tokens: Option<Arc<Tokens>>,
    /// Facts that hold as long as the process.
    pub facts: Arc<Facts>,
}

/// Facts that hold as long as the process.
#[derive(Debug)]
pub struct Facts {
    /// When it started.
    pub started: Instant,
    /// Runtime directory.
    pub runtime_dir: PathBuf,
    /// Public checkpoints that can be made by name.
    pub catalogue: Catalogue,
    /// Who holds the mounts' descriptors: `systemd`, `keeper`, `none`.
    pub holder: &'static str,
    /// How often the keeper or systemd has started the daemon again.
    pub restarts: u32,
}

impl Floors {
    /// Stops taking work and filling; what is mounted stays, and is served. Another start ends it.
    pub async fn drain(&self) {
        tracing::info!("no new work is taken");
        self.scrubber.stop();
        self.ingests.pause().await;
    }

    /// Whether new work may begin.
    ///
    /// # Errors
    /// `DRAINING`.
    fn admit(&self) -> Result<()> {
        self.ingests.admit()
    }

    /// Records an event; a failure is logged, not passed on.
    async fn note(&self, event: NewEvent) {
        let noted = self.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await;
        if let Err(error) = noted {
            tracing::warn!(error = %error.report(), "recording an event failed");
        }
    }
}

/// Serves until `stop` resolves, then lets running calls end; `roles` says who may do what.
///
/// # Errors
/// The transport failed.
pub async fn serve(floors: Floors, listeners: Listeners, roles: Roles, stop: impl Future<Output = ()>) -> Result<()> {
    let router = router(floors, roles).await?;
    router
        .serve_with_incoming_shutdown(ReceiverStream::new(listen::connections(listeners)), stop)
        .await
        .map_err(|error| Error::unavailable("LISTENER_FAILED", "serving gRPC").because(error))
}

async fn router(floors: Floors, roles: Roles) -> Result<Router<Stack<Door, Identity>>> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<CheckpointsServer<checkpoints::Service>>().await;
    health.set_serving::<JobsServer<jobs::Service>>().await;
    health.set_serving::<NodeServer<node::Service>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let broken = |error| Error::internal("building the reflection service").because(error);
    let checkpoints = CheckpointsServer::new(checkpoints::Service::new(floors.clone()))
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES);
    let jobs = JobsServer::new(jobs::Service::new(floors.clone())).max_encoding_message_size(limits::MESSAGE_BYTES);
    let node = NodeServer::new(node::Service::new(floors)).max_encoding_message_size(limits::MESSAGE_BYTES);
    Ok(Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .layer(Door(Access::new(roles)))
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(broken)?)
        .add_service(reflection().build_v1alpha().map_err(broken)?)
        .add_service(checkpoints)
        .add_service(jobs)
        .add_service(node))
}
