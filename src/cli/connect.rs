//! Reaching the daemon.
//!
//! The first connection is made by hand, so that a socket that is missing, refused or forbidden is told apart by its errno;
//! the channel then uses it, and connects anew by itself when the daemon was restarted in between. The request authority is
//! always `localhost`: servers refuse a socket's path there.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use super::refusal;
use crate::control::wire::checkpoints_client::CheckpointsClient;
use crate::control::wire::jobs_client::JobsClient;
use crate::control::wire::node_client::NodeClient;
use crate::error::{Error, Kind, Result};
use crate::limits;

/// The socket of the packaged service.
pub(super) const DEFAULT_ENDPOINT: &str = "unix:/run/ckptd/ckptd.sock";

/// How long a call that only looks may take: a busy disk answers in seconds, a hung daemon never.
const PROMPT: Duration = Duration::from_secs(30);

/// A connected daemon.
pub(crate) struct Daemon {
    channel: Channel,
    endpoint: String,
}

impl Daemon {
    /// The client of checkpoints.
    pub(crate) fn checkpoints(&self) -> CheckpointsClient<Channel> {
        CheckpointsClient::new(self.channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// The client of jobs.
    pub(crate) fn jobs(&self) -> JobsClient<Channel> {
        JobsClient::new(self.channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// The client of this host.
    pub(super) fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// The answer to a call that may take its time.
    pub(crate) async fn ask<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        call.await.map(Response::into_inner).map_err(|status| self.refusal(&status))
    }

    /// The answer to a call that only looks; unavailable when it does not come promptly.
    pub(super) async fn ask_promptly<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        match tokio::time::timeout(PROMPT, self.ask(call)).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::unavailable(
                "NO_ANSWER",
                format!("ckptd at {} did not answer within {} s", self.endpoint, PROMPT.as_secs()),
            )
            .remedy("look at its log, and try again")),
        }
    }

    /// What the daemon's refusal means here.
    pub(super) fn refusal(&self, status: &Status) -> Error {
        refusal::error(status, &self.endpoint)
    }
}

/// Connects to `endpoint`.
///
/// # Errors
/// Invalid or unsupported for what is not `unix:PATH`; unavailable or denied where nobody answers there.
pub(crate) async fn connect(endpoint: &str) -> Result<Daemon> {
    let endpoint = if endpoint.is_empty() { DEFAULT_ENDPOINT } else { endpoint };
    let socket = socket_of(endpoint)?;
    let fault = |error| unreachable_socket(endpoint, error);
    let mut first = Some(UnixStream::connect(&socket).await.map_err(fault)?);
    let connector = tower::service_fn(move |_: Uri| {
        let (first, socket) = (first.take(), socket.clone());
        async move { reconnect(first, &socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|error| unreachable_socket(endpoint, io::Error::other(error)))?;
    Ok(Daemon { channel, endpoint: endpoint.to_owned() })
}

fn socket_of(endpoint: &str) -> Result<PathBuf> {
    match endpoint.strip_prefix("unix:") {
        Some(path) => match path.strip_prefix("//").unwrap_or(path) {
            "" => Err(bad_endpoint(endpoint)),
            path => Ok(path.into()),
        },
        None if endpoint.starts_with("https://") => Err(Error::new(
            Kind::Unsupported,
            "TLS_NOT_SUPPORTED",
            format!("connecting to ckptd at {endpoint}: this ckptctl speaks over Unix sockets only"),
        )
        .remedy("run it on the host of the daemon, with `--endpoint unix:PATH`")),
        None => Err(bad_endpoint(endpoint)),
    }
}

fn bad_endpoint(endpoint: &str) -> Error {
    Error::invalid("BAD_ENDPOINT", format!("`{endpoint}` is not an endpoint"))
        .remedy(format!("write it as `unix:PATH`, like {DEFAULT_ENDPOINT}"))
}

async fn reconnect(first: Option<UnixStream>, socket: &Path) -> io::Result<UnixStream> {
    match first {
        Some(stream) => Ok(stream),
        None => UnixStream::connect(socket).await,
    }
}

fn unreachable_socket(endpoint: &str, error: io::Error) -> Error {
    let doing = format!("connecting to ckptd at {endpoint}");
    match error.kind() {
        io::ErrorKind::PermissionDenied => Error::denied("SOCKET_FORBIDDEN", doing)
            .remedy("run ckptctl as root or in the group that may use the socket"),
        io::ErrorKind::InvalidInput => {
            Error::invalid("BAD_ENDPOINT", doing).remedy("give the path of ckptd's socket with --endpoint")
        }
        _ => Error::unavailable("NO_DAEMON", doing)
            .remedy("is ckptd running? start it with `ckptd serve` or give --endpoint"),
    }
    .because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_unix_sockets() {
        for (given, path) in [("unix:/a/b", "/a/b"), ("unix:///a/b", "/a/b"), ("unix:c", "c")] {
            assert_eq!(socket_of(given).unwrap(), Path::new(path));
        }
        for (given, kind) in [
            ("https://h:1", Kind::Unsupported),
            ("http://h:1", Kind::Invalid),
            ("/run/x.sock", Kind::Invalid),
            ("unix:", Kind::Invalid),
            ("unix://", Kind::Invalid),
        ] {
            assert_eq!(socket_of(given).unwrap_err().kind(), kind, "{given}");
        }
    }

    #[test]
    fn why_nobody_answers_decides_what_to_do() {
        let kind = |errno| unreachable_socket("unix:/x", io::Error::from_raw_os_error(errno)).kind();
        assert_eq!(kind(libc::ENOENT), Kind::Unavailable);
        assert_eq!(kind(libc::ECONNREFUSED), Kind::Unavailable);
        assert_eq!(kind(libc::EAGAIN), Kind::Unavailable);
        assert_eq!(kind(libc::EACCES), Kind::Denied);
    }
}
