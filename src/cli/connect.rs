//! Reaching the daemon: by its Unix socket, or by TCP with a certificate.
//!
//! The first connection is made by hand, so that a socket that is missing, refused or forbidden is told apart by its errno, and a
//! certificate that is not believed from a host that is not there; the channel then uses it, and connects anew by itself when the daemon was
//! restarted in between. The request authority is always `localhost`: servers refuse a socket's path there, and whom we
//! speak to is proved by the certificate.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use percent_encoding::NON_ALPHANUMERIC;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Response, Status};

use super::refusal;
use crate::certificates::{self, CertificateFiles};
use crate::control::wire::OWNER_METADATA;
use crate::control::wire::checkpoints_client::CheckpointsClient;
use crate::control::wire::jobs_client::JobsClient;
use crate::control::wire::node_client::NodeClient;
use crate::error::{Error, Result};
use crate::limits;

/// The socket of the packaged service.
pub(super) const DEFAULT_ENDPOINT: &str = "unix:/run/ckptd/ckptd.sock";

/// How long a call that only looks may take: a busy disk answers in seconds, a hung daemon never.
const PROMPT: Duration = Duration::from_secs(30);

/// How long a host may take to answer to a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How the daemon is reached, and for whom is asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Way {
    /// `unix:PATH` or `https://HOST:PORT`.
    pub(crate) endpoint: String,
    /// What we show, and whom we believe, by TCP.
    pub(crate) certificates: CertificateFiles,
    /// The owner for whom is asked; `None`: for the host.
    pub(crate) owner: Option<String>,
}

/// A connected daemon.
pub(crate) struct Daemon {
    line: Line,
    endpoint: String,
}

/// The way calls go.
type Line = InterceptedService<Channel, Stating>;

/// Says with each call for whom it is.
#[derive(Clone)]
pub(crate) struct Stating(Option<MetadataValue<Ascii>>);

impl Interceptor for Stating {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        if let Some(owner) = &self.0 {
            request.metadata_mut().insert(OWNER_METADATA, owner.clone());
        }
        Ok(request)
    }
}

impl Stating {
    fn new(owner: Option<&str>) -> Result<Self> {
        let encode = |owner: &str| percent_encoding::utf8_percent_encode(owner, NON_ALPHANUMERIC).to_string().parse();
        let value = owner.map(encode).transpose();
        value.map(Self).map_err(|error| Error::internal("stating the owner").because(error))
    }
}

impl Daemon {
    /// The client of checkpoints.
    pub(crate) fn checkpoints(&self) -> CheckpointsClient<Line> {
        CheckpointsClient::new(self.line.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// The client of jobs.
    pub(crate) fn jobs(&self) -> JobsClient<Line> {
        JobsClient::new(self.line.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// The client of this host.
    pub(super) fn node(&self) -> NodeClient<Line> {
        NodeClient::new(self.line.clone())
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

/// Connects.
///
/// # Errors
/// Invalid for what is no endpoint or no certificate; unavailable or denied where nobody answers there.
pub(crate) async fn connect(way: &Way) -> Result<Daemon> {
    let endpoint = if way.endpoint.is_empty() { DEFAULT_ENDPOINT } else { &way.endpoint };
    let place = Place::of(endpoint, &way.certificates)?;
    let mut first = Some(place.connect().await.map_err(|error| place.unreachable(endpoint, error))?);
    let again = place.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (first, again) = (first.take(), again.clone());
        async move {
            match first {
                Some(stream) => Ok(stream),
                None => again.connect().await,
            }
            .map(TokioIo::new)
        }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|error| place.unreachable(endpoint, io::Error::other(error)))?;
    let stating = Stating::new(way.owner.as_deref())?;
    Ok(Daemon { line: InterceptedService::new(channel, stating), endpoint: endpoint.to_owned() })
}

/// Where the daemon is.
#[derive(Clone)]
enum Place {
    Socket(PathBuf),
    Host { address: String, name: ServerName<'static>, config: Arc<rustls::ClientConfig> },
}

/// A connection, whatever it goes over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Place {
    fn of(endpoint: &str, certificates: &CertificateFiles) -> Result<Self> {
        if let Some(path) = endpoint.strip_prefix("unix:") {
            return match path.strip_prefix("//").unwrap_or(path) {
                "" => Err(bad_endpoint(endpoint)),
                path => Ok(Self::Socket(path.into())),
            };
        }
        let (address, name) = host_of(endpoint).ok_or_else(|| bad_endpoint(endpoint))?;
        Ok(Self::Host { address, name, config: tls_config(certificates)? })
    }

    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Socket(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            Self::Host { address, name, config } => {
                let connecting = async {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
                    connector.connect(name.clone(), stream).await
                };
                let connected = tokio::time::timeout(CONNECT_WITHIN, connecting).await;
                Ok(Box::new(connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??))
            }
        }
    }

    fn unreachable(&self, endpoint: &str, error: io::Error) -> Error {
        match self {
            Self::Socket(_) => unreachable_socket(endpoint, error),
            Self::Host { .. } if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
                Error::denied("TLS_REFUSED", format!("connecting to ckptd at {endpoint}"))
                    .remedy("check --tls-ca, --tls-certificate and --tls-key")
                    .because(error)
            }
            Self::Host { .. } => Error::unavailable("NO_DAEMON", format!("connecting to ckptd at {endpoint}"))
                .remedy("does ckptd listen there (`tls.listen`)?")
                .because(error),
        }
    }
}

/// What we show and whom we believe.
fn tls_config(files: &CertificateFiles) -> Result<Arc<rustls::ClientConfig>> {
    let credentials = files
        .credentials(|path| std::fs::read(path).map_err(|error| Error::io("reading the certificate", path, error)))?;
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::internal("choosing the versions of TLS").because(error))?
        .with_root_certificates(credentials.authorities)
        .with_client_auth_cert(credentials.chain, credentials.key)
        .map_err(|error| certificates::bad(&files.certificate).because(error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Address and name of `https://HOST:PORT`.
fn host_of(endpoint: &str) -> Option<(String, ServerName<'static>)> {
    let address = endpoint.strip_prefix("https://")?;
    let address = address.strip_suffix('/').unwrap_or(address);
    let (host, port) = address.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    let name = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    Some((address.to_owned(), ServerName::try_from(name.to_owned()).ok()?))
}

fn bad_endpoint(endpoint: &str) -> Error {
    Error::invalid("BAD_ENDPOINT", format!("`{endpoint}` is not an endpoint"))
        .remedy(format!("write it as `unix:PATH`, like {DEFAULT_ENDPOINT}, or `https://HOST:PORT`"))
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
    use std::path::Path;

    use super::*;
    use crate::error::Kind;

    #[test]
    fn endpoints_are_sockets_or_hosts() {
        for (given, expected) in [("unix:/a/b", "/a/b"), ("unix:///a/b", "/a/b"), ("unix:c", "c")] {
            let place = Place::of(given, &CertificateFiles::default()).unwrap();
            assert!(matches!(place, Place::Socket(path) if path == Path::new(expected)), "{given}");
        }
        for (given, expected) in [("https://h.example:1", "h.example:1"), ("https://[::1]:7/", "[::1]:7")] {
            assert_eq!(host_of(given).unwrap().0, expected);
        }
        for (given, reason) in [
            ("https://h:1", "NO_CERTIFICATE"),
            ("https://h", "BAD_ENDPOINT"),
            ("https://:1", "BAD_ENDPOINT"),
            ("http://h:1", "BAD_ENDPOINT"),
            ("/run/x.sock", "BAD_ENDPOINT"),
            ("unix:", "BAD_ENDPOINT"),
            ("unix://", "BAD_ENDPOINT"),
        ] {
            let refused = Place::of(given, &CertificateFiles::default()).err();
            assert_eq!(refused.map(|error| error.reason().to_owned()).as_deref(), Some(reason), "{given}");
        }
    }

    #[test]
    fn an_owner_of_any_letters_is_stated_in_ascii() {
        let stated = Stating::new(Some("té am")).unwrap().0.unwrap();
        assert_eq!(stated, "t%C3%A9%20am");
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
