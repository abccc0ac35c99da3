//! A web site on loopback that serves what it is told to, as well or as badly as it is told to, and counts.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

/// Sent at a time, each piece in its turn.
const PIECE_BYTES: usize = 64 << 10;

/// Buffer of a socket that is to hold little; the kernel doubles it.
const NARROW_BYTES: usize = PIECE_BYTES;

/// How one path is answered.
#[derive(Clone, Debug)]
pub(crate) enum Page {
    /// The whole or the range that was asked for.
    Ranged(Arc<Vec<u8>>),
    /// The whole, whatever was asked for.
    Whole(Arc<Vec<u8>>),
    /// The whole, its length not stated: it ends with the connection.
    Unsized(Arc<Vec<u8>>),
    /// The whole, as HTML.
    Html(Arc<Vec<u8>>),
    /// As `Ranged`, but the first so many bodies break off in the middle.
    Short(Arc<Vec<u8>>, u64),
    /// Elsewhere, with status 302.
    Moved(String),
    /// A status without a page.
    Status(u16),
}

#[derive(Debug, Default)]
struct Shared {
    pages: Mutex<BTreeMap<String, (Page, String)>>,
    sent: AtomicU64,
    bodies: AtomicU64,
    asked: Mutex<Vec<(String, u64)>>,
    short: AtomicU64,
    delay_ms: AtomicU64,
    pace: Mutex<Pace>,
    /// Told when the limit is raised.
    raised: Condvar,
    narrow: AtomicBool,
    closed: AtomicBool,
}

/// The limit, and when the next piece may go.
#[derive(Debug, Default)]
struct Pace {
    /// 0: no limit.
    bytes_per_s: u64,
    next: Option<Instant>,
    /// How often the limit was raised.
    raised: u64,
}

/// The site; closed on drop.
#[derive(Debug)]
pub(crate) struct Site {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Site {
    /// Opens an empty site on a free port.
    pub(crate) fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let site = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if site.closed.load(Ordering::Relaxed) {
                    return;
                }
                let site = Arc::clone(&site);
                thread::spawn(move || {
                    let _ = site.converse(&stream);
                });
            }
        });
        Self { address, shared }
    }

    /// Puts a page at `path`, which begins with a slash; returns its URL.
    pub(crate) fn put(&self, path: &str, page: Page) -> String {
        let tag = page.entity_tag();
        self.shared.pages.lock().unwrap().insert(path.to_owned(), (page, tag));
        self.url(path)
    }

    /// The URL of a path, whether a page is there or not.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Limits all bodies together to so many bytes a second; 0 lifts the limit. Whoever waits his turn goes on at once where it is raised.
    pub(crate) fn limit(&self, bytes_per_s: u64) {
        let mut pace = self.shared.pace.lock().unwrap();
        if bytes_per_s == 0 || (1..bytes_per_s).contains(&pace.bytes_per_s) {
            pace.next = None;
            pace.raised += 1;
            self.shared.raised.notify_all();
        }
        pace.bytes_per_s = bytes_per_s;
    }

    /// Lets the sockets of bodies that begin from now on hold little: nearly all that counts as sent has arrived.
    pub(crate) fn narrow(&self) {
        self.shared.narrow.store(true, Ordering::Relaxed);
    }

    /// Answers so much later than it could.
    pub(crate) fn delay(&self, by: Duration) {
        self.shared.delay_ms.store(u64::try_from(by.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// Bytes of bodies sent since the last call.
    pub(crate) fn take_sent(&self) -> u64 {
        self.shared.sent.swap(0, Ordering::Relaxed)
    }

    /// What bodies were asked for so far, in order: the path, and from which byte on. One that only asks for the first byte looks what there is.
    pub(crate) fn asked(&self) -> Vec<(String, u64)> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Bodies begun so far.
    pub(crate) fn bodies(&self) -> u64 {
        self.shared.bodies.load(Ordering::Relaxed)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

/// What of a request matters here.
struct Request {
    path: String,
    head: bool,
    range: Option<(u64, Option<u64>)>,
    /// Of the page that is there now.
    tag: String,
}

impl Page {
    /// Changes with the content, as an ETag must.
    fn entity_tag(&self) -> String {
        match self {
            Self::Ranged(bytes)
            | Self::Whole(bytes)
            | Self::Unsized(bytes)
            | Self::Html(bytes)
            | Self::Short(bytes, _) => {
                format!("\"{}\"", &blake3::hash(bytes).to_hex()[..16])
            }
            Self::Moved(_) | Self::Status(_) => String::new(),
        }
    }
}

impl Shared {
    fn converse(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let Some(mut request) = read_request(&mut reader)? else { return Ok(()) };
        let (page, tag) = self.pages.lock().unwrap().get(&request.path).cloned().unzip();
        request.tag = tag.unwrap_or_default();
        if !request.head && request.range != Some((0, Some(0))) {
            let from = request.range.map_or(0, |(from, _)| from);
            self.asked.lock().unwrap().push((request.path.clone(), from));
        }
        thread::sleep(Duration::from_millis(self.delay_ms.load(Ordering::Relaxed)));
        match page {
            None => bare(stream, "404 Not Found", ""),
            Some(Page::Status(status)) => bare(stream, &format!("{status} As Told"), ""),
            Some(Page::Moved(to)) => bare(stream, "302 Found", &format!("Location: {to}\r\n")),
            Some(Page::Whole(bytes)) => self.whole(stream, &request, &bytes, &sized(&bytes)),
            Some(Page::Unsized(bytes)) => self.whole(stream, &request, &bytes, ""),
            Some(Page::Html(bytes)) => {
                self.whole(stream, &request, &bytes, &format!("{}Content-Type: text/html\r\n", sized(&bytes)))
            }
            Some(Page::Ranged(bytes)) => self.ranged(stream, &request, &bytes, u64::MAX),
            Some(Page::Short(bytes, times)) => {
                let first = !request.head && self.short.fetch_add(1, Ordering::Relaxed) < times;
                let most = if first { bytes.len() as u64 / 16 } else { u64::MAX };
                self.ranged(stream, &request, &bytes, most)
            }
        }
    }

    fn whole(&self, stream: &TcpStream, request: &Request, bytes: &[u8], fields: &str) -> std::io::Result<()> {
        head(stream, "200 OK", &format!("{fields}ETag: {}\r\n", request.tag))?;
        if request.head { Ok(()) } else { self.body(stream, bytes) }
    }

    /// Sends at most `most` bytes of what the head announces.
    fn ranged(&self, stream: &TcpStream, request: &Request, bytes: &[u8], most: u64) -> std::io::Result<()> {
        let size = bytes.len() as u64;
        let (from, last) =
            request.range.map_or((0, size - 1), |(from, last)| (from, last.unwrap_or(size - 1).min(size - 1)));
        if from > last {
            return bare(stream, "416 Range Not Satisfiable", &format!("Content-Range: bytes */{size}\r\n"));
        }
        let mut fields =
            format!("Content-Length: {}\r\nAccept-Ranges: bytes\r\nETag: {}\r\n", last - from + 1, request.tag);
        let status = if request.range.is_some() { "206 Partial Content" } else { "200 OK" };
        if request.range.is_some() {
            fields.push_str(&format!("Content-Range: bytes {from}-{last}/{size}\r\n"));
        }
        head(stream, status, &fields)?;
        if request.head {
            return Ok(());
        }
        let end = (last + 1).min(from.saturating_add(most));
        self.body(stream, &bytes[usize::try_from(from).unwrap()..usize::try_from(end).unwrap()])
    }

    fn body(&self, mut stream: &TcpStream, bytes: &[u8]) -> std::io::Result<()> {
        self.bodies.fetch_add(1, Ordering::Relaxed);
        if self.narrow.load(Ordering::Relaxed) {
            setsockopt(stream, sockopt::SndBuf, &NARROW_BYTES)?;
        }
        for piece in bytes.chunks(PIECE_BYTES) {
            self.wait_turn(piece.len() as u64);
            // Counted before whoever asked has it.
            self.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            stream.write_all(piece)?;
        }
        stream.flush()
    }

    /// Gives every piece its slot on one time line, so that all bodies together keep the rate; with a limit that is raised another begins.
    fn wait_turn(&self, bytes: u64) {
        let mut pace = self.pace.lock().unwrap();
        while pace.bytes_per_s > 0 {
            let now = Instant::now();
            let turn = pace.next.map_or(now, |at| at.max(now));
            pace.next = Some(turn + Duration::from_micros(bytes * 1_000_000 / pace.bytes_per_s));
            let (raised, left) = (pace.raised, turn.saturating_duration_since(now));
            let (woken, waited) = self.raised.wait_timeout_while(pace, left, |pace| pace.raised == raised).unwrap();
            if waited.timed_out() {
                return;
            }
            pace = woken;
        }
    }
}

fn read_request(reader: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let head = words.next() == Some("HEAD");
    let path = words.next().unwrap_or("/").to_owned();
    let mut range = None;
    loop {
        let mut field = String::new();
        if reader.read_line(&mut field)? == 0 || field.trim().is_empty() {
            return Ok(Some(Request { path, head, range, tag: String::new() }));
        }
        if let Some((name, value)) = field.split_once(':')
            && name.eq_ignore_ascii_case("range")
        {
            range = parse_range(value.trim());
        }
    }
}

fn parse_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (from, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, last.parse().ok()))
}

fn sized(bytes: &[u8]) -> String {
    format!("Content-Length: {}\r\n", bytes.len())
}

fn bare(stream: &TcpStream, status: &str, fields: &str) -> std::io::Result<()> {
    head(stream, status, &format!("Content-Length: 0\r\n{fields}"))
}

fn head(mut stream: &TcpStream, status: &str, fields: &str) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{fields}\r\n")
}
