//! Connections, from the Unix socket and by TCP, with who is at their other end.
//!
//! TCP is TLS with a certificate on both sides, always ([`tls`](super::tls)): a peer without a valid one is gone before it can say anything. A
//! handshake has a bounded time and its place among [`limits::TCP_CONNECTIONS`], so that silent peers keep nobody else out for long. Both listeners
//! feed one bounded queue, which the server takes connections from.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::caller::Peer;
use super::tls::Certificates;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::panics::Essential;

/// Longest handshake: a distant peer needs two round trips.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);

/// Pause after a connection could not be accepted: out of descriptors, most likely.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Connections that wait for the server to take them.
const QUEUED: usize = 64;

/// Where the daemon is commanded.
pub struct Listeners {
    /// The Unix socket.
    pub socket: UnixListener,
    /// TCP, where it is configured.
    pub tcp: Vec<(TcpListener, Arc<Certificates>)>,
}

/// One connection.
pub(super) struct Connection {
    stream: Stream,
    peer: Peer,
    /// Its place among those by TCP.
    _place: Option<OwnedSemaphorePermit>,
}

enum Stream {
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Connections of all listeners; they are closed when the receiver is dropped.
pub(super) fn connections(listeners: Listeners) -> mpsc::Receiver<io::Result<Connection>> {
    let (queue, taken) = mpsc::channel(QUEUED);
    tokio::spawn(accept_local(listeners.socket, queue.clone()));
    let places = Arc::new(Semaphore::new(limits::TCP_CONNECTIONS));
    for (listener, certificates) in listeners.tcp {
        tokio::spawn(accept_remote(listener, certificates, Arc::clone(&places), queue.clone()));
    }
    taken
}

type Queue = mpsc::Sender<io::Result<Connection>>;

async fn accept_local(listener: UnixListener, queue: Queue) {
    let _essential = Essential::new("the listener of the socket");
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = queue.closed() => return,
        };
        match accepted.and_then(|(stream, _)| Ok((peer_of(&stream)?, stream))) {
            Ok((peer, stream)) => {
                tracing::trace!(?peer, "a connection by the socket");
                let connection = Connection { stream: Stream::Unix(stream), peer, _place: None };
                if queue.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
            Err(error) => not_accepted(&error).await,
        }
    }
}

async fn accept_remote(listener: TcpListener, certificates: Arc<Certificates>, places: Arc<Semaphore>, queue: Queue) {
    let _essential = Essential::new("a listener by TCP");
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = queue.closed() => return,
        };
        match accepted {
            Ok((stream, from)) => {
                let (certificates, queue) = (Arc::clone(&certificates), queue.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(HANDSHAKE_WITHIN, shake_hands(stream, &certificates)).await {
                        Ok(Ok((stream, peer))) => {
                            let connection =
                                Connection { stream: Stream::Tls(Box::new(stream)), peer, _place: Some(place) };
                            // The server may be gone by now.
                            let _ = queue.send(Ok(connection)).await;
                        }
                        Ok(Err(error)) => tracing::info!(%from, %error, "a connection by TCP was refused"),
                        Err(_) => tracing::info!(%from, "a connection by TCP did not finish its handshake"),
                    }
                });
            }
            Err(error) => not_accepted(&error).await,
        }
    }
}

async fn shake_hands(stream: TcpStream, certificates: &Certificates) -> io::Result<(TlsStream<TcpStream>, Peer)> {
    // Answers are small and waited for.
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(certificates.present()).accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let names = shown.map(super::tls::names_of).transpose()?.unwrap_or_default();
    if names.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its certificate has no DNS or URI name"));
    }
    Ok((stream, Peer::Certificate(names)))
}

async fn not_accepted(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
}

/// Who connected, as the kernel noted it then.
fn peer_of(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = stream.peer_cred()?;
    let mut gids = groups_of(stream)?;
    gids.push(credentials.gid());
    Ok(Peer::Process { uid: credentials.uid(), gids })
}

/// Supplementary groups of the other end (`SO_PEERGROUPS`, Linux 4.13).
fn groups_of(stream: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; 64];
    loop {
        let mut bytes = libc::socklen_t::try_from(groups.len() * size_of::<u32>()).map_err(io::Error::other)?;
        // SAFETY: the buffer is ours and has `bytes` bytes, which the kernel does not exceed.
        let answer = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = usize::try_from(bytes).map_err(io::Error::other)? / size_of::<u32>();
        if answer == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Listens by TCP.
///
/// # Errors
/// `LISTENER_FAILED`.
pub async fn bind_tcp(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        Error::unavailable("LISTENER_FAILED", format!("listening on {address}"))
            .because(error)
            .remedy("set another `tls.listen`")
    })
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

/// Binds the socket, taking the place of one that nobody listens on. Mode 0600 from the beginning; 0666 where others than root are to be heard
/// (`open_to_others`): who they are is then asked of the kernel at each connection.
///
/// # Errors
/// `SOCKET_IN_USE` where somebody listens, `SOCKET_PATH_TAKEN` where something else is there, the I/O error.
pub async fn bind(path: &Path, open_to_others: bool) -> Result<UnixListener> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(Error::new(
                Kind::AlreadyExists,
                "SOCKET_PATH_TAKEN",
                format!("the socket path {} exists and is not a socket", path.display()),
            )
            .remedy("remove it or give another --runtime-dir"));
        }
        if UnixStream::connect(path).await.is_ok() {
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
    let mode = if open_to_others { 0o666 } else { 0o600 };
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(mode))
        .and_then(|()| std::fs::rename(&private, path))
        .map_err(|error| Error::io("binding the socket", path, error))?;
    Ok(listener)
}
