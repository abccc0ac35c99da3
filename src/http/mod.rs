//! The HTTP listener: off unless it is configured, HTTP/1 with keep-alive.
//!
//! | path | what |
//! |---|---|
//! | `/healthz` | 200 while the process answers |
//! | `/readyz` | 200 while the store takes new bytes, 503 with the reason otherwise |
//! | `/ping`, `/upload`, `/upload/status`, `/finalize` | the transfer protocol for checkpoints of type `local` ([`transfer`]) |
//!
//! It listens before the daemon is ready and answers once it is. Connections are bounded, and so is the time that one may take for
//! a head or stay silent between requests ([`connections`]); requests bound their own bodies. Nothing here is durable. TLS ends before us.

mod connections;
pub mod transfer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};
use crate::limits;
use connections::Connections;
use transfer::Transfers;

/// Pause after a connection could not be accepted: out of descriptors, most likely.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Binds the listener.
///
/// # Errors
/// `HTTP_LISTEN_FAILED`.
pub async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let fault = |error: std::io::Error| {
        Error::unavailable("HTTP_LISTEN_FAILED", format!("listening for HTTP on {address}"))
            .because(error)
            .remedy("set another `http.listen`")
    };
    let listener = TcpListener::bind(address).await.map_err(fault)?;
    let bound = listener.local_addr().map_err(fault)?;
    Ok((listener, bound))
}

/// Answers until it is dropped; connections end with it.
pub async fn serve(listener: TcpListener, transfers: Arc<Transfers>) {
    let places = Arc::new(Semaphore::new(limits::HTTP_CONNECTIONS));
    let mut connections = Connections::new(router(transfers));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        connections.begin(accept(&listener).await, place);
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Answers are small and waited for; without it they may wait too.
                let _ = stream.set_nodelay(true);
                tracing::trace!("a connection by HTTP");
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}

fn router(transfers: Arc<Transfers>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .merge(transfer::routes())
        .with_state(transfers)
}

async fn readiness(State(transfers): State<Arc<Transfers>>) -> (StatusCode, String) {
    match transfers.check_healthy() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", error.report())),
    }
}
