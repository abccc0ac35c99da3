//! One file of the web, by HTTP or HTTPS.
//!
//! [`WebSource::open`] asks for the first byte. What comes back tells the size, whether ranges work, where redirects lead, the name, and
//! the validators that later reads are held to: a strong `ETag` is sent back as `If-Match`, and whatever validator an
//! answer bears must be the one that was opened. Servers that refuse such a request are asked with HEAD.
//!
//! The revision is the strong `ETag`, else `Last-Modified` with the size, else a mark that equals no
//! other, so that nothing resumes across bytes that nobody vouches for.
//!
//! Bodies are stored as sent. One that is compressed in transit although it was asked for plain is refused, unless the
//! file's own name says that it is compressed so.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures_util::stream;
use percent_encoding::percent_decode;
use reqwest::header::{
    CONTENT_DISPOSITION, CONTENT_ENCODING, ETAG, HeaderMap, HeaderName, IF_MATCH, LAST_MODIFIED, RANGE,
};
use reqwest::{StatusCode, Url};

use super::connect::{SourceContext, has_scheme, not_supported, parse_http, split_user_information};
use super::http::{
    Authorization, ContentRange, Failure, HttpClient, Reply, Request, Target, Wanted, announced_length, read_document,
    shown,
};
use super::{
    ByteStream, Credentials, Expected, File, Listed, Listing, Opened, Source, SourceSpec, What, source_changed,
};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::names::{EntryName, EntryPath};

/// Name of a file whose server gives it none.
const UNNAMED: &[u8] = b"download";

/// The file that `spec` means.
///
/// # Errors
/// Invalid for an address that cannot be; `SOURCE_NOT_SUPPORTED` for FTP and for directories.
pub(super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    if !has_scheme(&spec.uri, &["http", "https"]) {
        return Err(not_supported("FTP sources"));
    }
    let (plain, user_information) = split_user_information(&spec.uri);
    let url = parse_http(&plain, "the URI")?;
    if url.path().ends_with('/') {
        return Err(not_supported("web addresses of directories (ending in `/`)"));
    }
    let given = credentials
        .get("username")
        .map(|name| (name.to_owned(), credentials.get("password").unwrap_or_default().to_owned()));
    let authorization = given.or(user_information).map(|(username, password)| Authorization::Basic(username, password));
    Ok(Arc::new(WebSource { http: context.http.clone(), url, authorization, opened: Mutex::default() }))
}

/// A file at a URL.
#[derive(Debug)]
struct WebSource {
    http: HttpClient,
    url: Url,
    authorization: Option<Authorization>,
    opened: Mutex<Option<Arc<Resolved>>>,
}

/// What opening found out.
#[derive(Debug)]
struct Resolved {
    target: Target,
    size: Option<u64>,
    ranges: bool,
    etag: Option<String>,
    last_modified: Option<String>,
}

impl WebSource {
    /// Asks for the first byte, or with HEAD where that is refused.
    async fn probe(&self, target: &Target) -> Result<Probe> {
        match target.get(&self.http, &[(RANGE, "bytes=0-0".to_owned())]).await {
            Ok(reply) => Ok(Probe::of(reply, &self.http).await),
            Err(Failure::Refused(answer)) if answer.status == StatusCode::RANGE_NOT_SATISFIABLE => {
                match ContentRange::of(&answer.headers).and_then(|range| range.total) {
                    Some(0) => {
                        Ok(Probe { size: Some(0), ranges: false, headers: answer.headers, url: self.url.clone() })
                    }
                    _ => self.probe_head().await,
                }
            }
            Err(failure) if failure.status().is_some_and(|status| matches!(status.as_u16(), 400 | 405 | 501)) => {
                self.probe_head().await
            }
            Err(failure) => Err(failure.into_error()),
        }
    }

    async fn probe_head(&self) -> Result<Probe> {
        let request = Request::head(&self.url, self.authorization.as_ref());
        let reply = self.http.send(&request).await.map_err(Failure::into_error)?;
        let headers = reply.response.headers().clone();
        Ok(Probe { size: announced_length(&headers), ranges: false, headers, url: reply.url })
    }

    fn resolved(&self) -> Result<Arc<Resolved>> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.clone().ok_or_else(|| Error::internal(format!("{} was read before it was opened", shown(&self.url))))
    }
}

#[async_trait]
impl Source for WebSource {
    async fn open(&self) -> Result<Opened> {
        let target = Target::new(self.url.clone(), self.authorization.clone());
        let probe = self.probe(&target).await?;
        let name = file_name(&probe.headers, &probe.url)?;
        check_encoding(&probe.headers, name.as_bytes(), &self.url)?;
        let resolved = Resolved {
            target,
            size: probe.size,
            ranges: probe.ranges,
            etag: text_of(&probe.headers, ETAG),
            last_modified: text_of(&probe.headers, LAST_MODIFIED),
        };
        let file = File {
            locator: self.url.to_string(),
            size: resolved.size,
            executable: false,
            ranges: resolved.ranges,
            expected: Expected::default(),
        };
        let entry = Listed { path: EntryPath::root().join(&name)?, what: What::File(file) };
        let listing = Listing { one_file: true, ..Listing::new(resolved.revision(), vec![entry]) };
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(resolved));
        Ok(Opened::Listed(listing))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let resolved = self.resolved()?;
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check(&shown(&self.url))?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let mut headers: Vec<(HeaderName, String)> = Vec::new();
        headers.extend(wanted.header().map(|range| (RANGE, range)));
        headers.extend(resolved.strong_etag().map(|etag| (IF_MATCH, etag.to_owned())));
        let reply = resolved.target.get(&self.http, &headers).await.map_err(|failure| self.explain(failure))?;
        resolved.check_validators(reply.response.headers(), &shown(&self.url))?;
        wanted.accept(reply, &self.http)
    }
}

impl WebSource {
    /// An error for a read: what a refused condition or range means is known here.
    fn explain(&self, failure: Failure) -> Error {
        match failure.status().map(|status| status.as_u16()) {
            Some(412) => source_changed(&shown(&self.url), "it changed"),
            Some(416) => source_changed(&shown(&self.url), "it became shorter"),
            _ => failure.into_error(),
        }
    }
}

impl Resolved {
    fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| etag.starts_with('"'))
    }

    fn revision(&self) -> String {
        match (self.strong_etag(), &self.last_modified, self.size) {
            (Some(etag), _, _) => format!("etag:{etag}"),
            (None, Some(date), Some(size)) => format!("modified:{date};{size}"),
            _ => unpinned(),
        }
    }

    /// Whether an answer is of the file that was opened, as far as it says.
    fn check_validators(&self, headers: &HeaderMap, what: &str) -> Result<()> {
        if let (Some(then), Some(now)) = (&self.etag, text_of(headers, ETAG)) {
            let same = then.trim_start_matches("W/") == now.trim_start_matches("W/");
            return if same { Ok(()) } else { Err(source_changed(what, "its ETag changed")) };
        }
        match (&self.last_modified, text_of(headers, LAST_MODIFIED)) {
            (Some(then), Some(now)) if *then != now => Err(source_changed(what, "it was modified")),
            _ => Ok(()),
        }
    }
}

struct Probe {
    size: Option<u64>,
    ranges: bool,
    headers: HeaderMap,
    url: Url,
}

impl Probe {
    async fn of(reply: Reply, http: &HttpClient) -> Self {
        let headers = reply.response.headers().clone();
        let url = reply.url.clone();
        let given = ContentRange::of(&headers).filter(|_| reply.response.status() == StatusCode::PARTIAL_CONTENT);
        match given {
            Some(given) if given.range == Some(0..1) => {
                // One byte, read so that the connection can be used again; nothing hangs on it.
                let _ = read_document(reply, 1, http).await;
                Self { size: given.total, ranges: true, headers, url }
            }
            Some(given) => Self { size: given.total, ranges: false, headers, url },
            None => Self { size: announced_length(&headers), ranges: false, headers, url },
        }
    }
}

/// A revision that equals no other.
fn unpinned() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_nanos());
    let seed = format!("{nanos}.{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    format!("unpinned:{}", Digest::of(seed.as_bytes()))
}

fn text_of(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    let text = headers.get(name)?.to_str().ok()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Refuses a body that is not the file's own bytes.
fn check_encoding(headers: &HeaderMap, name: &[u8], url: &Url) -> Result<()> {
    let encoding = text_of(headers, CONTENT_ENCODING).unwrap_or_default().to_ascii_lowercase();
    let suffixes: &[&str] = match encoding.as_str() {
        "" | "identity" => return Ok(()),
        "gzip" | "x-gzip" => &[".gz", ".tgz"],
        "bzip2" | "x-bzip2" => &[".bz2", ".tbz2"],
        "xz" | "x-xz" => &[".xz", ".txz"],
        "zstd" => &[".zst"],
        _ => &[],
    };
    let name = name.to_ascii_lowercase();
    if suffixes.iter().any(|suffix| name.ends_with(suffix.as_bytes())) {
        return Ok(());
    }
    let message = format!("fetching {}: the server insists on encoding it as `{encoding}`", shown(url));
    Err(Error::new(Kind::Unsupported, "CONTENT_ENCODED", message).remedy("have it served as it is"))
}

/// What the server calls the file, else the end of the URL, else [`UNNAMED`].
fn file_name(headers: &HeaderMap, url: &Url) -> Result<EntryName> {
    let stated = headers.get(CONTENT_DISPOSITION).and_then(|value| name_in_disposition(value.as_bytes()));
    let last = url.path().rsplit('/').next().unwrap_or_default();
    let from_url = percent_decode(last.as_bytes()).collect();
    [stated.unwrap_or_default(), from_url]
        .into_iter()
        .filter(|name: &Vec<u8>| !name.iter().any(u8::is_ascii_control))
        .find_map(|name| EntryName::new(name).ok())
        .map_or_else(|| EntryName::new(UNNAMED), Ok)
}

/// The file name of a `Content-Disposition` (RFC 6266): `filename*` before `filename`, and only what is behind the
/// last separator of either kind.
fn name_in_disposition(value: &[u8]) -> Option<Vec<u8>> {
    let mut plain = None;
    let mut extended = None;
    for parameter in parameters(value) {
        let mut sides = parameter.splitn(2, |byte| *byte == b'=');
        let key = sides.next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
        let text = sides.next().unwrap_or_default().trim_ascii();
        match key.as_slice() {
            b"filename" => plain = Some(unquote(text)),
            b"filename*" => extended = decode_extended(text),
            _ => {}
        }
    }
    let name = extended.or(plain)?;
    let name = name.rsplit(|byte| matches!(byte, b'/' | b'\\')).next().unwrap_or_default().trim_ascii().to_vec();
    (!name.is_empty()).then_some(name)
}

/// Pieces between semicolons that are not inside quotes.
fn parameters(value: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let (mut start, mut quoted, mut escaped) = (0, false, false);
    for (at, byte) in value.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b';' if !quoted => {
                found.push(&value[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    found.push(&value[start..]);
    found
}

fn unquote(text: &[u8]) -> Vec<u8> {
    let Some(inner) = text.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) else {
        return text.to_vec();
    };
    let mut plain = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().copied();
    while let Some(byte) = bytes.next() {
        plain.push(if byte == b'\\' { bytes.next().unwrap_or(byte) } else { byte });
    }
    plain
}

/// `UTF-8'language'percent-encoded` (RFC 8187).
fn decode_extended(text: &[u8]) -> Option<Vec<u8>> {
    let mut fields = text.splitn(3, |byte| *byte == b'\'');
    let charset = fields.next()?;
    let coded = fields.nth(1)?;
    charset.eq_ignore_ascii_case(b"utf-8").then(|| percent_decode(coded).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(disposition: Option<&str>, url: &str) -> String {
        let mut headers = HeaderMap::new();
        if let Some(text) = disposition {
            headers.insert(CONTENT_DISPOSITION, text.parse().unwrap());
        }
        String::from_utf8_lossy(file_name(&headers, &Url::parse(url).unwrap()).unwrap().as_bytes()).into_owned()
    }

    #[test]
    fn the_name_is_what_the_server_says_then_the_end_of_the_url() {
        for (disposition, url, name) in [
            (None, "http://x/a/b%20c.bin?sig=1", "b c.bin"),
            (None, "http://x/a/", "download"),
            (None, "http://x/%2e%2e%2fetc", "download"),
            (None, "http://x/%00", "download"),
            (None, "http://x/a%0Ab", "download"),
            (Some("attachment; filename=\"m;1.bin\""), "http://x/u", "m;1.bin"),
            (Some("attachment; filename=m.bin"), "http://x/u", "m.bin"),
            (Some("attachment; filename=\"../../etc/passwd\""), "http://x/u", "passwd"),
            (Some("attachment; filename=\"C:\\\\x\\\\y.bin\""), "http://x/u", "y.bin"),
            (Some("attachment; filename=\"x\"; filename*=UTF-8''%e2%82%ac.bin"), "http://x/u", "€.bin"),
            (Some("attachment; filename=\"..\""), "http://x/u", "u"),
            (Some("inline"), "http://x/u", "u"),
        ] {
            assert_eq!(named(disposition, url), name, "{disposition:?} {url}");
        }
    }

    #[test]
    fn only_a_strong_validator_makes_a_revision_that_can_be_met_again() {
        let revision = |etag: Option<&str>, date: Option<&str>, size| {
            let target = Target::new(Url::parse("http://x/").unwrap(), None);
            let (etag, last_modified) = (etag.map(str::to_owned), date.map(str::to_owned));
            Resolved { target, size, ranges: true, etag, last_modified }.revision()
        };
        assert_eq!(revision(Some("\"a\""), Some("d"), Some(1)), "etag:\"a\"");
        assert_eq!(revision(Some("W/\"a\""), Some("d"), Some(1)), "modified:d;1");
        for (etag, date, size) in [(None, None, Some(1)), (Some("W/\"a\""), None, Some(1)), (None, Some("d"), None)] {
            assert_ne!(revision(etag, date, size), revision(etag, date, size));
        }
    }

    #[test]
    fn encoded_bodies_are_refused_unless_the_file_is_so_itself() {
        let url = Url::parse("http://x/").unwrap();
        let check = |encoding: &str, name: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_ENCODING, encoding.parse().unwrap());
            check_encoding(&headers, name.as_bytes(), &url).is_ok()
        };
        assert!(check("identity", "x") && check("gzip", "x.tar.GZ") && check("x-gzip", "x.tgz"));
        assert!(!check("gzip", "x.json") && !check("br", "x.gz"));
    }
}
