//! Files and trees of FTP servers, plain (`ftp`) or protected (`ftps`).
//!
//! What is below an address is found by MLSD, or by LIST where the server does not know that. A file is pinned by its size and time of modification (MLST, or SIZE
//! and MDTM), checked again whenever a range of a large one is opened and when the end of any has been read: another file is `SOURCE_CHANGED`. Seconds are all that
//! FTP tells. The revision is a digest over all of them; where one is missing it equals no other.
//!
//! A range is a connection of its own, for FTP cannot end a transfer in its middle and go on: after the last byte that is wanted the connection is
//! dropped. One that has read a file to its end is kept for the next. At most [`CONNECTIONS`] are open, since servers count them.
//!
//! Paths are from the directory that login leads to; `//` or `%2F` at the beginning makes them absolute. Links that a server lists are
//! followed to files, and left out with a word where they lead to directories, which could go in circles. Proxies are not used.

mod connection;
mod listing;
mod walk;

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use reqwest::Url;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::connection::{Address, Connection, Security, Transfer};
use self::listing::{Stamp, Stat};
use super::super::connect::{SourceContext, has_scheme};
use super::super::{ByteStream, Counter, Expected, File, Listed, Listing, Opened, Source, What, source_changed};
use super::unpinned;
use crate::error::{CUT_SHORT, Error, Kind, Result};
use crate::limits;
use crate::names::{EntryName, EntryPath};

/// Connections to one server at a time: public ones often refuse the sixth.
const CONNECTIONS: usize = 4;

/// The port whose connections begin with TLS.
const IMPLICIT_PORT: u16 = 990;

/// The file or tree at `uri`, which has no user information any more.
///
/// # Errors
/// `BAD_URI` for an address that cannot be.
pub(super) fn connect(uri: &str, login: Option<(String, String)>, context: &SourceContext) -> Result<Arc<dyn Source>> {
    let bad =
        |why: &str| Error::invalid("BAD_URI", format!("the URI is not an address of a file at an FTP server: {why}"));
    let protected = has_scheme(uri, &["ftps"]);
    let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    // The URL standard knows the rules for hosts of `ftp` alone.
    let url = Url::parse(&format!("ftp://{rest}")).map_err(|error| bad(&error.to_string()))?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("it has a query or a fragment").remedy("write `?` as %3F and `#` as %23"));
    }
    let port = url.port().unwrap_or(21);
    let security = match (protected, port) {
        (false, _) => Security::Plain,
        (true, IMPLICIT_PORT) => Security::Implicit(connection::tls()?),
        (true, _) => Security::Asked(connection::tls()?),
    };
    let host = url.host_str().ok_or_else(|| bad("it names no host"))?;
    let address = Address {
        host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
        port,
        security,
        login,
        policy: Arc::clone(&context.policy),
        connect_timeout: context.settings.connect_timeout,
        inactivity: context.settings.inactivity_timeout,
        facts: OnceLock::new(),
    };
    let server =
        Server { address: Arc::new(address), permits: Arc::new(Semaphore::new(CONNECTIONS)), idle: Mutex::default() };
    Ok(Arc::new(FtpSource { server: Arc::new(server), path: Path::parse(url.path())? }))
}

/// What was asked for, at the server.
struct Path {
    absolute: bool,
    path: EntryPath,
    directory: bool,
}

impl Path {
    fn parse(path: &str) -> Result<Self> {
        let path = path.strip_prefix('/').unwrap_or(path);
        let decoded: Vec<u8> = percent_decode_str(path).collect();
        let absolute = decoded.starts_with(b"/");
        let directory = decoded.is_empty() || decoded.ends_with(b"/");
        let inner = decoded.strip_prefix(b"/").unwrap_or(&decoded);
        let inner = inner.strip_suffix(b"/").unwrap_or(inner);
        if inner.iter().any(u8::is_ascii_control) {
            return Err(Error::invalid("BAD_URI", "the path of the URI holds what FTP cannot carry"));
        }
        Ok(Self { absolute, path: EntryPath::new(inner)?, directory })
    }

    /// The path at the server, for a login that leads to `home`.
    fn from(&self, home: &[u8]) -> Vec<u8> {
        let home: &[u8] = if self.absolute { b"/" } else { home };
        below(home, self.path.as_bytes())
    }
}

/// The path of `path` below the directory `directory`.
fn below(directory: &[u8], path: &[u8]) -> Vec<u8> {
    match (path.is_empty(), directory.ends_with(b"/")) {
        (true, _) => directory.to_vec(),
        (false, true) => [directory, path].concat(),
        (false, false) => [directory, b"/", path].concat(),
    }
}

/// A file or directory at an FTP server.
struct FtpSource {
    server: Arc<Server>,
    path: Path,
}

/// A server, and the connections to it that are not in use.
struct Server {
    address: Arc<Address>,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

/// A connection in use.
struct Borrowed {
    connection: Connection,
    /// Whether it has done something else before, and may have been closed by the server since.
    used: bool,
    permit: OwnedSemaphorePermit,
}

impl Server {
    async fn connection(&self) -> Result<Borrowed> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.map_err(|_| Error::internal("the permits for connections are closed"))?;
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let used = idle.is_some();
        let connection = match idle {
            Some(connection) => connection,
            None => Connection::open(&self.address).await?,
        };
        Ok(Borrowed { connection, used, permit })
    }

    /// Keeps a connection whose last command was answered.
    fn give_back(&self, borrowed: Borrowed) {
        let Borrowed { connection, permit, .. } = borrowed;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        drop(permit);
    }

    /// A connection that sends the file from `offset` on. A file of more than one fill unit is still the one that was listed; a smaller one is
    /// sent whole, and looked at when it has been.
    async fn begin(&self, file: &Located, offset: u64) -> Result<(Borrowed, Transfer)> {
        loop {
            let mut borrowed = self.connection().await?;
            let begun = async {
                if offset > 0 || file.size.is_none_or(|size| size > limits::UNIT_BYTES) {
                    file.check(&mut borrowed.connection).await?;
                }
                borrowed.connection.retrieve(&file.path, offset).await
            };
            match begun.await {
                Ok(transfer) => return Ok((borrowed, transfer)),
                Err(error) if error.kind() == Kind::NotFound => {
                    return Err(source_changed(&borrowed.connection.shown(&file.path), "it was removed"));
                }
                Err(error) if borrowed.used && error.kind() == Kind::Unavailable => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[async_trait]
impl Source for FtpSource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let mut borrowed = self.server.connection().await?;
        let ranges = borrowed.connection.restarts().await?;
        let path = self.path.from(&borrowed.connection.home);
        if self.path.directory {
            return walk::tree(&self.server, borrowed, path, (ranges, counter)).await.map(Opened::Listed);
        }
        let name = EntryName::new(self.path.path.file_name())?;
        let stat = borrowed.connection.stat(&path).await?;
        self.server.give_back(borrowed);
        let file = Located { path, size: stat.size, stamp: stat.stamp };
        let revision = revision(std::iter::once((name.as_bytes(), &file)));
        let entry = Listed { path: EntryPath::root().join(&name)?, what: What::File(file.into_file(ranges)) };
        Ok(Opened::Listed(Listing { one_file: true, ..Listing::new(revision, vec![entry]) }))
    }

    fn reads_at_a_time(&self) -> usize {
        CONNECTIONS
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let located = Located::parse(file)?;
        if range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let (borrowed, transfer) = self.server.begin(&located, range.start).await?;
        let what = format!("reading {}", borrowed.connection.shown(&located.path));
        let (server, buffer) = (Arc::clone(&self.server), BytesMut::new());
        let sending = Some((borrowed, transfer));
        let reading = Reading { server, file: located, sending, at: range.start, end: range.end, buffer, what };
        Ok(Box::pin(stream::try_unfold(reading, |mut reading| async move {
            Ok(reading.next().await?.map(|bytes| (bytes, reading)))
        })))
    }

    async fn confirm(&self, file: &File) -> Result<()> {
        let located = Located::parse(file)?;
        let mut borrowed = self.server.connection().await?;
        located.check(&mut borrowed.connection).await?;
        self.server.give_back(borrowed);
        Ok(())
    }
}

/// A file as it was listed: what a locator says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Located {
    path: Vec<u8>,
    size: Option<u64>,
    stamp: Stamp,
}

impl Located {
    fn into_file(self, ranges: bool) -> File {
        let fact = |fact: &Option<String>| {
            fact.as_ref().map(|fact| percent_encode(fact.as_bytes(), NON_ALPHANUMERIC).to_string()).unwrap_or_default()
        };
        let path = percent_encode(&self.path, NON_ALPHANUMERIC);
        let locator = format!("{};{};{path}", fact(&self.stamp.modified), fact(&self.stamp.unique));
        // Ranges of what nothing pins may be of two files.
        let ranges = ranges && self.size.is_some() && self.stamp.modified.is_some();
        File { locator: locator.into(), size: self.size, executable: false, ranges, expected: Expected::default() }
    }

    fn parse(file: &File) -> Result<Self> {
        let mut fields = file.locator.split(';').map(|field| percent_decode_str(field).collect::<Vec<u8>>());
        let mut fact = || {
            let fact = fields.next().filter(|fact| !fact.is_empty());
            fact.map(|fact| String::from_utf8_lossy(&fact).into_owned())
        };
        let stamp = Stamp { modified: fact(), unique: fact() };
        let path = fields.next().ok_or_else(|| Error::internal("a file has no path at its server"))?;
        Ok(Self { path, size: file.size, stamp })
    }

    /// # Errors
    /// `SOURCE_CHANGED`.
    async fn check(&self, connection: &mut Connection) -> Result<()> {
        let what = connection.shown(&self.path);
        match connection.stat(&self.path).await {
            Ok(Stat { size, .. }) if size != self.size => Err(source_changed(&what, "its size changed")),
            Ok(Stat { stamp, .. }) if !stamp.agrees(&self.stamp) => Err(source_changed(&what, "it was modified")),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == Kind::NotFound => Err(source_changed(&what, "it was removed")),
            Err(error) => Err(error),
        }
    }
}

/// Names exactly these bytes if the time of each file is known.
fn revision<'a>(files: impl Iterator<Item = (&'a [u8], &'a Located)>) -> String {
    let mut digester = crate::digest::Digester::new();
    let mut add = |part: &[u8]| {
        digester.update(&(part.len() as u64).to_le_bytes());
        digester.update(part);
    };
    for (path, file) in files {
        let (Some(size), Some(modified)) = (file.size, &file.stamp.modified) else { return unpinned() };
        add(path);
        add(&size.to_le_bytes());
        add(modified.as_bytes());
        add(file.stamp.unique.as_deref().unwrap_or_default().as_bytes());
    }
    format!("listed:{}", digester.finish())
}

/// A transfer under way.
struct Reading {
    server: Arc<Server>,
    file: Located,
    sending: Option<(Borrowed, Transfer)>,
    at: u64,
    end: u64,
    buffer: BytesMut,
    what: String,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let Some((borrowed, transfer)) = &mut self.sending else { return Ok(None) };
        if self.at < self.end {
            let length = borrowed.connection.read(transfer, &mut self.buffer, &self.what).await?;
            if length > 0 {
                let mut bytes = self.buffer.split().freeze();
                let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
                if length > left && self.is_last() {
                    return Err(source_changed(&self.what, "it became longer"));
                }
                bytes.truncate(left);
                self.at += bytes.len() as u64;
                if self.at == self.end {
                    // Before the last bytes are given: whoever has them all asks no further.
                    self.conclude().await?;
                }
                return Ok(Some(bytes));
            }
        }
        self.conclude().await?;
        Ok(None)
    }

    /// Whether the range ends where the file does.
    fn is_last(&self) -> bool {
        self.end == u64::MAX || Some(self.end) == self.file.size
    }

    /// Ends the transfer: by dropping the connection if the server has more to send, else by its last word on it.
    async fn conclude(&mut self) -> Result<()> {
        let Some((mut borrowed, mut transfer)) = self.sending.take() else { return Ok(()) };
        if !self.is_last() && self.at == self.end {
            return Ok(());
        }
        let more = borrowed.connection.read(&mut transfer, &mut self.buffer, &self.what).await?;
        if more > 0 {
            return Err(source_changed(&self.what, "it became longer"));
        }
        borrowed.connection.finish(transfer, &self.what).await?;
        self.file.check(&mut borrowed.connection).await?;
        self.server.give_back(borrowed);
        if self.at < self.end && self.end != u64::MAX {
            let message = format!("{}: the transfer ended after {} bytes", self.what, self.at);
            return Err(Error::unavailable("BODY_TOO_SHORT", message).remedy(CUT_SHORT));
        }
        Ok(())
    }
}
