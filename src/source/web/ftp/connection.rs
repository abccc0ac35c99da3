//! One control connection to an FTP server: connecting, logging in, and the few commands that sources need.
//!
//! * *Egress.* The name is resolved under the policy and only what it permits is connected to. Data connections go to the address of the control
//!   connection, whatever the server says.
//! * *Time.* Connecting has a limit, and so has every silence.
//! * *TLS.* `ftps` on port 990 begins with TLS, on any other port it is asked for (`AUTH TLS`); data is protected always. The trust store is
//!   the one of the HTTP client: the host's, or what `SSL_CERT_FILE` names.
//! * *Secrets.* Errors name the server and the path, never what the server wrote and never what was sent.
//!
//! After an error, and after a transfer that was not read to its end, a connection is dropped: servers answer `ABOR` in ways that leave later
//! replies with the wrong commands.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::BytesMut;
use rustls::ClientConfig;
use rustls_platform_verifier::Verifier;
use suppaftp::tokio::{AsyncRustlsConnector, AsyncRustlsFtpStream, AsyncRustlsStream, TransferStream};
use suppaftp::tokio_rustls::TlsConnector;
use suppaftp::types::Response;
use suppaftp::{Encoding, FtpError, Mode, Status};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::super::super::egress::EgressPolicy;
use super::super::LISTING_BYTES;
use super::listing::{self, Line, Stamp, Stat, as_bytes, as_text};
use crate::error::{Error, Kind, LATER, OUT_OF_REACH, Result};

/// Bytes of a data connection.
pub(super) type Transfer = TransferStream<AsyncRustlsStream>;

/// Memory for what a data connection has to give at once.
const READ_BYTES: usize = 256 << 10;

/// How a server is reached, and how it is logged in to.
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) security: Security,
    /// User name and password; anonymous without.
    pub(super) login: Option<(String, String)>,
    pub(super) policy: Arc<EgressPolicy>,
    pub(super) connect_timeout: Duration,
    pub(super) inactivity: Duration,
    /// Whether the server knows MLSD and MLST, once that is known.
    pub(super) facts: OnceLock<bool>,
}

/// Whether and when TLS begins.
#[derive(Clone)]
pub(super) enum Security {
    Plain,
    /// After `AUTH TLS`.
    Asked(Arc<ClientConfig>),
    /// At once.
    Implicit(Arc<ClientConfig>),
}

/// What TLS of all connections to one server shares: trust, and sessions to be resumed (some servers insist on that for data).
///
/// # Errors
/// `TLS_NOT_READY` where the host has no trust store that can be read.
pub(super) fn tls() -> Result<Arc<ClientConfig>> {
    let not_ready = |error: rustls::Error| {
        Error::new(Kind::Unsupported, "TLS_NOT_READY", "setting up TLS for sources")
            .remedy("install the host's CA certificates (package ca-certificates)")
            .because(error)
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new(Arc::clone(&provider)).map_err(not_ready)?;
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    // What rustls calls dangerous is to bring one's own verifier; this one is the HTTP client's.
    let builder = builder.map_err(not_ready)?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    Ok(Arc::new(builder.with_no_client_auth()))
}

/// A connection that is logged in.
pub(super) struct Connection {
    ftp: AsyncRustlsFtpStream,
    address: Arc<Address>,
    /// The directory that login led to.
    pub(super) home: Vec<u8>,
}

/// Bytes as the characters of the same number: file names are bytes.
#[derive(Debug)]
struct Bytewise;

impl Encoding for Bytewise {
    fn decode(&self, bytes: &[u8]) -> String {
        as_text(bytes)
    }

    fn encode(&self, text: &str) -> std::io::Result<Vec<u8>> {
        as_bytes(text).ok_or_else(|| std::io::ErrorKind::InvalidInput.into())
    }
}

impl Address {
    /// The server for people.
    pub(super) fn shown(&self) -> String {
        let scheme = if matches!(self.security, Security::Plain) { "ftp" } else { "ftps" };
        format!("{scheme}://{}:{}", self.host, self.port)
    }
}

impl Connection {
    /// Connects and logs in.
    ///
    /// # Errors
    /// Denied (by the policy, the certificate, the login), unavailable.
    pub(super) async fn open(address: &Arc<Address>) -> Result<Self> {
        let what = format!("connecting to {}", address.shown());
        let mut ftp = connect(address, &what).await?;
        ftp.set_encoding(Bytewise).await;
        ftp.set_passive_nat_workaround(true);
        let six = ftp.get_ref().await.peer_addr().is_ok_and(|peer| peer.is_ipv6());
        ftp.set_mode(if six { Mode::ExtendedPassive } else { Mode::Passive });
        let mut connection = Self { ftp, address: Arc::clone(address), home: Vec::new() };
        if matches!(address.security, Security::Implicit(_)) {
            for command in ["PBSZ 0", "PROT P"] {
                connection.command(command.to_owned(), Status::CommandOk, &what).await?;
            }
        }
        connection.log_in().await?;
        connection.command("TYPE I".to_owned(), Status::CommandOk, &what).await?;
        let home = within(address.inactivity, &what, connection.ftp.pwd()).await?;
        connection.home = as_bytes(&home).unwrap_or_default();
        Ok(connection)
    }

    async fn log_in(&mut self) -> Result<()> {
        let what = format!("logging in to {}", self.address.shown());
        let address = Arc::clone(&self.address);
        let (username, password) = match &address.login {
            Some((username, password)) => (as_text(username.as_bytes()), as_text(password.as_bytes())),
            None => ("anonymous".to_owned(), "anonymous@".to_owned()),
        };
        let logged_in = timeout(address.inactivity, self.ftp.login(username, password)).await;
        match logged_in {
            Ok(Err(FtpError::UnexpectedResponse(reply))) if reply.status.code() >= 500 => {
                let reason = if address.login.is_some() { "CREDENTIALS_REFUSED" } else { "CREDENTIALS_REQUIRED" };
                Err(Error::denied(reason, format!("{what}: the server refuses it (FTP {})", reply.status.code()))
                    .remedy("check user name and password, and whether the server wants ftps://"))
            }
            Ok(Err(FtpError::ConnectionError(error))) if error.kind() == std::io::ErrorKind::InvalidInput => {
                Err(Error::invalid("BAD_CREDENTIALS", format!("{what}: the credentials hold what FTP cannot carry")))
            }
            Ok(done) => done.map_err(|error| fault(error, &what)),
            Err(_) => Err(Error::unavailable("STALLED", format!("{what}: nothing came")).remedy(LATER)),
        }
    }

    async fn command(&mut self, command: String, expected: Status, what: &str) -> Result<Response> {
        let address = Arc::clone(&self.address);
        within(address.inactivity, what, self.ftp.custom_command(command, &[expected])).await
    }

    /// Whether transfers can begin in the middle.
    pub(super) async fn restarts(&mut self) -> Result<bool> {
        let what = format!("asking {} for ranges", self.address.shown());
        match self.command("REST 0".to_owned(), Status::RequestFilePending, &what).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::Unavailable => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// What the server knows of the file at the absolute `path`.
    ///
    /// # Errors
    /// `NO_SUCH_FILE` also for a directory.
    pub(super) async fn stat(&mut self, path: &[u8]) -> Result<Stat> {
        let what = format!("looking at {}", self.shown(path));
        if self.address.facts.get() != Some(&false) {
            match self.command(format!("MLST {}", as_text(path)), Status::RequestedFileActionOk, &what).await {
                Ok(reply) => {
                    let _ = self.address.facts.set(true);
                    return facts_of(&reply, &what);
                }
                Err(error) if error.reason() == NOT_KNOWN => {
                    let _ = self.address.facts.set(false);
                }
                Err(error) => return Err(error),
            }
        }
        let size = self.number("SIZE", path, &what).await?.and_then(|text| text.parse().ok());
        Ok(Stat { size, stamp: self.stamp(path).await? })
    }

    /// When the file at the absolute `path` was modified, where the server knows MDTM.
    pub(super) async fn stamp(&mut self, path: &[u8]) -> Result<Stamp> {
        let what = format!("looking at {}", self.shown(path));
        let modified = self.number("MDTM", path, &what).await?;
        Ok(Stamp { modified, unique: None })
    }

    /// What a command answers of a file; `None` where the server does not know the command.
    async fn number(&mut self, command: &str, path: &[u8], what: &str) -> Result<Option<String>> {
        match self.command(format!("{command} {}", as_text(path)), Status::File, what).await {
            Ok(reply) => Ok(as_text(&reply.body).split_whitespace().nth(1).map(str::to_owned)),
            Err(error) if error.reason() == NOT_KNOWN => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is in the directory at the absolute `path`.
    pub(super) async fn list(&mut self, path: &[u8]) -> Result<Vec<Line>> {
        let what = format!("listing {}", self.shown(path));
        let address = Arc::clone(&self.address);
        within(address.inactivity, &what, self.ftp.cwd(as_text(path))).await?;
        if address.facts.get() != Some(&false) {
            match self.data("MLSD", &what).await {
                Ok(text) => return parse_all(&text, listing::parse_facts, &what),
                Err(error) if error.reason() == NOT_KNOWN => {
                    let _ = address.facts.set(false);
                }
                Err(error) => return Err(error),
            }
        }
        // Names that begin with a dot come with `-a` alone; a server that takes that for a name finds nothing.
        let text = match self.data("LIST -a", &what).await {
            Ok(text) if !text.is_empty() => text,
            Err(error) if error.kind() == Kind::Unavailable => return Err(error),
            _ => self.data("LIST", &what).await?,
        };
        parse_all(&text, listing::parse_list, &what)
    }

    /// All that `command` sends over a data connection.
    async fn data(&mut self, command: &str, what: &str) -> Result<Vec<u8>> {
        let address = Arc::clone(&self.address);
        let begin = self.ftp.custom_data_command(command, &[Status::AboutToSend, Status::AlreadyOpen]);
        let (_, mut transfer) = within(address.connect_timeout + address.inactivity, what, begin).await?;
        let mut buffer = BytesMut::new();
        while self.read(&mut transfer, &mut buffer, what).await? > 0 {
            if buffer.len() > LISTING_BYTES {
                let message = format!("{what}: the listing is longer than {LISTING_BYTES} bytes");
                return Err(Error::invalid("ANSWER_TOO_LONG", message));
            }
        }
        self.finish(transfer, what).await?;
        Ok(buffer.into())
    }

    /// Begins to send the file at the absolute `path` from `offset` on.
    pub(super) async fn retrieve(&mut self, path: &[u8], offset: u64) -> Result<Transfer> {
        let what = format!("reading {}", self.shown(path));
        let address = Arc::clone(&self.address);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let begin = async {
            self.ftp.resume_transfer(offset).await?;
            self.ftp.retr_as_stream(as_text(path)).await
        };
        within(address.connect_timeout + address.inactivity, &what, begin).await
    }

    /// Adds to `buffer` what has come; 0 at the end.
    pub(super) async fn read(&self, transfer: &mut Transfer, buffer: &mut BytesMut, what: &str) -> Result<usize> {
        buffer.reserve(READ_BYTES / 4);
        let read = async { transfer.read_buf(buffer).await.map_err(FtpError::ConnectionError) };
        within(self.address.inactivity, what, read).await
    }

    /// Ends a transfer that was read to its end; the server says whether it was whole.
    pub(super) async fn finish(&self, transfer: Transfer, what: &str) -> Result<()> {
        within(self.address.inactivity, what, transfer.finish()).await
    }

    /// The file or directory at `path` for people.
    pub(super) fn shown(&self, path: &[u8]) -> String {
        format!("{}{}", self.address.shown(), crate::names::show_bytes(path))
    }
}

/// A connection that has said what it is, with TLS where that is wanted.
async fn connect(address: &Address, what: &str) -> Result<AsyncRustlsFtpStream> {
    let resolving = timeout(address.connect_timeout, address.policy.resolve(&address.host, address.port));
    let found = resolving.await.map_err(|_| timed_out(what))?.map_err(|error| error.during(what.to_owned()))?;
    let mut last = timed_out(what);
    for peer in found {
        match connect_to(peer, address, what).await {
            Err(error) if error.kind() == Kind::Unavailable => last = error,
            done => return done,
        }
    }
    Err(last)
}

async fn connect_to(peer: SocketAddr, address: &Address, what: &str) -> Result<AsyncRustlsFtpStream> {
    let limit = address.connect_timeout;
    let connector = |config: &Arc<ClientConfig>| AsyncRustlsConnector::from(TlsConnector::from(Arc::clone(config)));
    if let Security::Implicit(config) = &address.security {
        let connecting = AsyncRustlsFtpStream::connect_secure_implicit(peer, connector(config), &address.host);
        return within(limit, what, connecting).await;
    }
    let tcp = timeout(limit, TcpStream::connect(peer)).await.map_err(|_| timed_out(what))?;
    let tcp =
        tcp.map_err(|error| Error::unavailable("CONNECT_FAILED", what.to_owned()).remedy(OUT_OF_REACH).because(error))?;
    let ftp = within(address.inactivity, what, AsyncRustlsFtpStream::connect_with_stream(tcp)).await?;
    let Security::Asked(config) = &address.security else { return Ok(ftp) };
    within(limit, what, ftp.into_secure(connector(config), &address.host)).await
}

/// What `work` gives within `limit`.
async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T, FtpError>>) -> Result<T> {
    match timeout(limit, work).await {
        Ok(done) => done.map_err(|error| fault(error, what)),
        Err(_) => {
            Err(Error::unavailable("STALLED", format!("{what}: nothing came for {} s", limit.as_secs_f64()))
                .remedy(LATER))
        }
    }
}

fn timed_out(what: &str) -> Error {
    Error::unavailable("CONNECT_TIMED_OUT", what.to_owned())
}

fn parse_all(text: &[u8], parse: fn(&[u8]) -> Result<Option<Line>>, what: &str) -> Result<Vec<Line>> {
    listing::lines(text)
        .filter_map(|line| parse(line).transpose())
        .collect::<Result<_>>()
        .map_err(|error| error.during(what))
}

/// The facts in the answer to MLST: the line that begins with a space.
fn facts_of(reply: &Response, what: &str) -> Result<Stat> {
    let line = listing::lines(&reply.body).find_map(|line| line.strip_prefix(b" "));
    match line.map(listing::parse_facts) {
        Some(Ok(Some(Line { kind: listing::Kind::File(stat), .. }))) => Ok(stat),
        Some(Err(error)) => Err(error.during(what)),
        _ => Err(Error::not_found("NO_SUCH_FILE", format!("{what}: there is no file"))
            .remedy("write the address of a directory with a `/` at its end")),
    }
}

/// Reason of a command that the server does not know.
const NOT_KNOWN: &str = "COMMAND_NOT_KNOWN";

/// What a failure of FTP means for the receiver. What the server wrote is left out: it may repeat what it was sent.
fn fault(error: FtpError, what: &str) -> Error {
    match error {
        FtpError::UnexpectedResponse(reply) => {
            let code = reply.status.code();
            let because = |why: &str| format!("{what}: {why} (FTP {code})");
            let says_denied = as_text(&reply.body).to_ascii_lowercase().contains("denied");
            let fault = match code {
                500 | 502 | 504 => {
                    Error::new(Kind::Unsupported, NOT_KNOWN, because("the server does not know the command"))
                }
                530 | 532 => Error::denied("CREDENTIALS_REFUSED", because("the server wants another login")),
                521 | 522 | 533 | 534 | 536 => {
                    Error::denied("ACCESS_REFUSED", because("the server wants other security"))
                }
                550 if says_denied => Error::denied("ACCESS_REFUSED", because("access is refused")),
                550 | 551 | 553 => {
                    Error::not_found("NO_SUCH_FILE", because("nothing is there")).remedy("check the address")
                }
                400..=499 => Error::unavailable("SERVER_BUSY", because("the server cannot now")),
                501..=599 => Error::invalid("REQUEST_REFUSED", because("the server refuses the request")),
                // A connection that ends instead of answering, and answers to something else.
                _ => Error::unavailable("BAD_ANSWER", because("its answer is none to what was asked")),
            };
            fault.fact("ftp_code", code)
        }
        FtpError::SecureError(why) if why.contains("certificate") => {
            Error::denied("CERTIFICATE_REFUSED", what.to_owned())
                .remedy("check the server's certificate, or add its authority to the host's trust store")
                .because(why)
        }
        FtpError::SecureError(why) => Error::unavailable("TLS_FAILED", what.to_owned()).because(why),
        FtpError::ConnectionError(error) => Error::unavailable("CONNECTION_BROKEN", what.to_owned()).because(error),
        error @ (FtpError::BadResponse | FtpError::InvalidAddress(_) | FtpError::DataConnectionAlreadyOpen) => {
            Error::unavailable("BAD_ANSWER", what.to_owned()).because(error)
        }
    }
}
