//! gRPC: the services of `proto/`, each method parse, ask, answer.
//!
//! The services hold handles to the floors below and decide nothing of their own: names are resolved here ([`resolve`]), messages become
//! domain types at the door and errors become statuses on the way out ([`refusal`]). A call that the client gives up is dropped
//! where it waits; what it had begun goes on or is undone by the part that does it, never left half-made.
//!
//! The Unix socket is the only listener of this version. It has mode 0600, and who calls is also asked of the kernel ([`peer`]): root, or
//! the daemon's own user, is the scheduler; nobody else is answered.

mod ahead;
pub mod catalogue;
mod checkpoints;
mod jobs;
mod keeping;
mod node;
mod peer;
mod records;
mod refusal;
mod resolve;
mod upload;
pub mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::Router;

use crate::catalog::events::{self, NewEvent};
use crate::error::{Error, Result};
use crate::ingest::Ingests;
use crate::limits;
use crate::serve::attachments::Attachments;
use crate::source::local::Tokens;
use crate::store::Store;
use crate::units::now_unix_ms;

use catalogue::Catalogue;
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
    /// Jobs and views.
    pub attachments: Attachments,
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
    /// Bytes the store may occupy; 0: the whole filesystem.
    pub capacity_bytes: u64,
    /// Public checkpoints that can be made by name.
    pub catalogue: Catalogue,
    /// Who holds the mounts' descriptors: `systemd`, `keeper`, `none`.
    pub holder: &'static str,
    /// How often the keeper has restarted the daemon.
    pub restarts: u32,
    /// Whether work is no longer taken.
    pub draining: AtomicBool,
}

impl Floors {
    /// Stops taking work and filling; what is mounted stays, and is served. Another start ends it.
    pub async fn drain(&self) {
        if !self.facts.draining.swap(true, Ordering::Relaxed) {
            tracing::info!("no new work is taken");
        }
        self.ingests.pause().await;
    }

    /// Whether new work may begin.
    ///
    /// # Errors
    /// `DRAINING`.
    fn admit(&self) -> Result<()> {
        if self.facts.draining.load(Ordering::Relaxed) {
            return Err(Error::unavailable("DRAINING", "ckptd takes no new work: it is being drained")
                .remedy("try again when it has been restarted"));
        }
        Ok(())
    }

    /// Records an event; a failure is logged, not passed on.
    async fn note(&self, event: NewEvent) {
        let noted = self.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await;
        if let Err(error) = noted {
            tracing::warn!(error = %error.report(), "recording an event failed");
        }
    }
}

/// Serves on `listener` until `stop` resolves, then lets running calls end.
///
/// # Errors
/// The transport failed.
pub async fn serve(floors: Floors, listener: UnixListener, stop: impl Future<Output = ()>) -> Result<()> {
    let router = router(floors).await?;
    router
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .map_err(|error| Error::unavailable("LISTENER_FAILED", "serving gRPC").because(error))
}

async fn router(floors: Floors) -> Result<Router> {
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
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(broken)?)
        .add_service(reflection().build_v1alpha().map_err(broken)?)
        .add_service(InterceptedService::new(checkpoints, peer::check))
        .add_service(InterceptedService::new(jobs, peer::check))
        .add_service(InterceptedService::new(node, peer::check)))
}

/// A socket that was listened on before we began.
///
/// # Errors
/// The I/O error.
pub fn take_listener(listener: std::os::unix::net::UnixListener) -> Result<UnixListener> {
    listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map_err(|error| Error::unavailable("LISTENER_FAILED", "taking over the socket").because(error))
}

/// Binds the socket, taking the place of one that nobody listens on. Mode 0600 from the beginning.
///
/// # Errors
/// `SOCKET_IN_USE` where somebody listens, `SOCKET_PATH_TAKEN` where something else is there, the I/O error.
pub async fn bind(path: &Path) -> Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(Error::new(
                crate::error::Kind::AlreadyExists,
                "SOCKET_PATH_TAKEN",
                format!("the socket path {} exists and is not a socket", path.display()),
            )
            .remedy("remove it or give another --runtime-dir"));
        }
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(Error::wrong_state(
                "SOCKET_IN_USE",
                format!("another process listens on the socket {}", path.display()),
            )
            .remedy("stop it or give another --runtime-dir"));
        }
        std::fs::remove_file(path).map_err(|error| Error::io("removing the stale socket", path, error))?;
    }
    // Bound under a private name first, so that the socket is never there with wider rights.
    let private = path.with_extension("sock.new");
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private).map_err(|error| Error::io("binding the socket", &private, error))?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&private, path))
        .map_err(|error| Error::io("binding the socket", path, error))?;
    Ok(listener)
}
