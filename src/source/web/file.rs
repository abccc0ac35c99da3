//! One file of the web, by HTTP or HTTPS.
//!
//! [`WebFile::open`] asks for the first byte. What comes back tells the size, whether ranges work, where redirects lead, the name, and
//! the validators that later reads are held to. Servers that refuse such a request are asked with HEAD.
//!
//! The revision is what the validators pin, else a mark that equals no other.
//!
//! Bodies are stored as sent. One that is compressed in transit although it was asked for plain is refused, unless the
//! file's own name says that it is compressed so.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures_util::stream;
use percent_encoding::percent_decode;
use reqwest::Url;
use reqwest::header::{CONTENT_DISPOSITION, HeaderMap, HeaderName, RANGE};

use super::super::http::{Authorization, HttpClient, Target, Wanted, shown};
use super::super::{ByteStream, Counter, Expected, File, Listed, Listing, Opened, Source, What};
use super::probe::{Probe, check_encoding};
use super::unpinned;
use super::validators::{Validators, explain};
use crate::error::{Error, Result};
use crate::names::{EntryName, EntryPath};

/// Name of a file whose server gives it none.
const UNNAMED: &[u8] = b"download";

/// A file at a URL.
#[derive(Debug)]
pub(super) struct WebFile {
    http: HttpClient,
    url: Url,
    authorization: Option<Authorization>,
    opened: Mutex<Option<Arc<Resolved>>>,
}

/// What opening found out.
#[derive(Debug)]
struct Resolved {
    target: Target,
    validators: Validators,
}

impl WebFile {
    /// The file at `url`; nothing is asked before it is opened.
    pub(super) fn new(http: HttpClient, url: Url, authorization: Option<Authorization>) -> Self {
        Self { http, url, authorization, opened: Mutex::default() }
    }

    fn resolved(&self) -> Result<Arc<Resolved>> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.clone().ok_or_else(|| Error::internal(format!("{} was read before it was opened", shown(&self.url))))
    }
}

#[async_trait]
impl Source for WebFile {
    async fn open(&self, _counter: &Counter) -> Result<Opened> {
        let target = Target::new(self.url.clone(), self.authorization.clone());
        let probe = Probe::first_byte(&target, self.authorization.as_ref(), &self.http).await?;
        let name = file_name(&probe.headers, &probe.url)?;
        check_encoding(&probe.headers, name.as_bytes(), &self.url)?;
        let validators = Validators::of(&probe.headers);
        let pin = validators.pin(probe.size);
        // Ranges of what nothing pins may be of two files.
        let ranges = probe.ranges && pin.is_some();
        let revision = pin.unwrap_or_else(unpinned);
        let file = File {
            locator: self.url.as_str().into(),
            size: probe.size,
            executable: false,
            ranges,
            expected: Expected::default(),
        };
        let entry = Listed { path: EntryPath::root().join(&name)?, what: What::File(file) };
        let listing = Listing { one_file: true, ..Listing::new(revision, vec![entry]) };
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(Resolved { target, validators }));
        Ok(Opened::Listed(listing))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let resolved = self.resolved()?;
        let what = shown(&self.url);
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check(&what)?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let mut headers: Vec<(HeaderName, String)> = Vec::new();
        headers.extend(wanted.header().map(|range| (RANGE, range)));
        headers.extend(resolved.validators.condition());
        let reply = resolved.target.get(&self.http, &headers).await.map_err(|failure| explain(failure, &what))?;
        resolved.validators.check(reply.response.headers(), &what)?;
        wanted.accept(reply, &self.http)
    }

    async fn confirm(&self, file: &File) -> Result<()> {
        let resolved = self.resolved()?;
        let probe = Probe::first_byte(&resolved.target, self.authorization.as_ref(), &self.http).await;
        resolved.validators.confirm(probe, file.size, &shown(&self.url))
    }
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
}
