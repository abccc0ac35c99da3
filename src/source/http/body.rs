//! Bodies held to what was asked for.
//!
//! Servers lie: they ignore ranges, answer with others, announce lengths they do not keep. [`Wanted`] says what is
//! asked, checks the head of the answer against it and gives a stream that yields exactly those bytes or an error.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderMap};
use reqwest::{Response, StatusCode};
use tokio::time::timeout;

use super::super::{ByteStream, source_changed};
use super::{HttpClient, Reply, shown, stalled, transport_fault};
use crate::error::{CUT_SHORT, Error, Result};

/// What `Content-Range` says of the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// The bytes in the body; `None` in answers that refuse a range.
    pub(crate) range: Option<Range<u64>>,
    /// Size of the whole; `None` for `*`.
    pub(crate) total: Option<u64>,
}

impl ContentRange {
    /// Reads the header; `None` if it is missing or makes no sense.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(CONTENT_RANGE)?.to_str().ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
        let total = match total.trim() {
            "*" => None,
            digits => Some(digits.parse().ok()?),
        };
        if range.trim() == "*" {
            return Some(Self { range: None, total });
        }
        let (first, last) = range.trim().split_once('-')?;
        let range = first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?;
        let sane = !range.is_empty() && total.is_none_or(|total| range.end <= total);
        sane.then_some(Self { range: Some(range), total })
    }
}

/// `Content-Length` as the server wrote it.
pub(crate) fn announced_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// How long a body has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    /// As long as this, and then at its end.
    Exactly(u64),
    /// This many bytes are wanted of a body that may go on.
    First(u64),
    /// Up to its end.
    Whole,
}

/// A range that is wanted of a file.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The bytes; `u64::MAX` ends with the file.
    pub(crate) range: Range<u64>,
    /// Size of the file, if known.
    pub(crate) size: Option<u64>,
    /// Whether the server is known to answer ranges.
    pub(crate) ranges: bool,
}

impl Wanted {
    /// The value of the `Range` header; `None` where the whole is wanted or cannot be had in ranges.
    pub(crate) fn header(&self) -> Option<String> {
        let whole = self.range.start == 0 && (self.range.end == u64::MAX || Some(self.range.end) == self.size);
        (self.ranges && !whole).then(|| format!("bytes={}-{}", self.range.start, self.range.end.saturating_sub(1)))
    }

    /// Checks that the range can be asked for at all.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        let within = self.range.end == u64::MAX || self.size.is_none_or(|size| self.range.end <= size);
        if self.range.start <= self.range.end && within && (self.ranges || self.range.start == 0) {
            return Ok(());
        }
        Err(Error::internal(format!("the range {:?} was asked of {what}, which does not have it", self.range)))
    }

    /// Holds `reply` to what is wanted and gives its bytes.
    ///
    /// # Errors
    /// `SOURCE_CHANGED` for another size, unavailable for a range that was not asked for.
    pub(crate) fn accept(&self, reply: Reply, http: &HttpClient) -> Result<ByteStream> {
        let what = shown(&reply.url);
        let headers = reply.response.headers();
        let length = match reply.response.status() {
            StatusCode::PARTIAL_CONTENT => self.accept_part(headers, &what)?,
            StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => self.accept_whole(headers, &what)?,
            other => {
                let message = format!("reading {what}: HTTP {} is no answer with a body", other.as_u16());
                return Err(Error::invalid("UNEXPECTED_STATUS", message));
            }
        };
        Ok(stream_of(reply, length, http.inactivity))
    }

    fn accept_part(&self, headers: &HeaderMap, what: &str) -> Result<Length> {
        let asked = self.header().unwrap_or_else(|| "no range".to_owned());
        let wrong = |got: String| {
            let message = format!("reading {what}: asked for {asked}, it answers with {got}");
            Error::unavailable("WRONG_RANGE", message)
        };
        let given = ContentRange::of(headers).ok_or_else(|| wrong("an unnamed range".to_owned()))?;
        let range = given.range.ok_or_else(|| wrong("no range".to_owned()))?;
        if let (Some(size), Some(total)) = (self.size, given.total)
            && size != total
        {
            return Err(source_changed(what, &format!("its size changed from {size} to {total} bytes")));
        }
        let end = if self.range.end == u64::MAX { given.total.unwrap_or(range.end) } else { self.range.end };
        if range != (self.range.start..end) {
            return Err(wrong(format!("bytes={}-{}", range.start, range.end - 1)));
        }
        let length = range.end - range.start;
        match announced_length(headers) {
            Some(announced) if announced != length => Err(wrong(format!("{announced} bytes"))),
            _ => Ok(Length::Exactly(length)),
        }
    }

    fn accept_whole(&self, headers: &HeaderMap, what: &str) -> Result<Length> {
        if self.range.start != 0 {
            let message = format!("reading {what}: the range {:?} was answered with the whole file", self.range);
            return Err(Error::unavailable("RANGE_IGNORED", message));
        }
        if let (Some(size), Some(announced)) = (self.size, announced_length(headers))
            && size != announced
        {
            return Err(source_changed(what, &format!("its size changed from {size} to {announced} bytes")));
        }
        Ok(match self.size {
            _ if self.range.end == u64::MAX => self.size.map_or(Length::Whole, Length::Exactly),
            Some(size) if size == self.range.end => Length::Exactly(size),
            _ => Length::First(self.range.end),
        })
    }
}

/// All of a small document; its server must not decide how much memory it takes.
///
/// # Errors
/// Invalid beyond `limit` bytes; unavailable as for any body.
pub(crate) async fn read_document(mut reply: Reply, limit: usize, http: &HttpClient) -> Result<Vec<u8>> {
    let mut document = Vec::new();
    while let Some(bytes) = next_bytes(&mut reply, http.inactivity).await? {
        if document.len() + bytes.len() > limit {
            let message = format!("fetching {}: the answer is longer than {limit} bytes", shown(&reply.url));
            return Err(Error::invalid("ANSWER_TOO_LONG", message));
        }
        document.extend_from_slice(&bytes);
    }
    Ok(document)
}

async fn next_bytes(reply: &mut Reply, inactivity: Duration) -> Result<Option<Bytes>> {
    let response: &mut Response = &mut reply.response;
    match timeout(inactivity, response.chunk()).await {
        Ok(got) => got.map_err(|error| transport_fault(error, &reply.url)),
        Err(_) => Err(stalled(&reply.url, inactivity)),
    }
}

struct Reading {
    reply: Reply,
    length: Length,
    seen: u64,
    inactivity: Duration,
}

fn stream_of(reply: Reply, length: Length, inactivity: Duration) -> ByteStream {
    let reading = Reading { reply, length, seen: 0, inactivity };
    Box::pin(stream::try_unfold(reading, |mut reading| async move {
        Ok(reading.next().await?.map(|bytes| (bytes, reading)))
    }))
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Length::First(wanted) = self.length
                && self.seen >= wanted
            {
                return Ok(None);
            }
            let Some(bytes) = next_bytes(&mut self.reply, self.inactivity).await? else {
                return self.end();
            };
            if !bytes.is_empty() {
                return self.admit(bytes).map(Some);
            }
        }
    }

    fn end(&self) -> Result<Option<Bytes>> {
        match self.length {
            Length::Exactly(wanted) | Length::First(wanted) if self.seen < wanted => {
                let what = shown(&self.reply.url);
                let message =
                    format!("reading {what}: the body is shorter than announced ({} of {wanted} bytes)", self.seen);
                Err(Error::unavailable("BODY_TOO_SHORT", message).remedy(CUT_SHORT))
            }
            _ => Ok(None),
        }
    }

    fn admit(&mut self, mut bytes: Bytes) -> Result<Bytes> {
        let came = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        match self.length {
            Length::Exactly(wanted) if came > wanted - self.seen => {
                let message =
                    format!("reading {}: the body is longer than the {wanted} bytes asked for", shown(&self.reply.url));
                return Err(Error::corrupt("BODY_TOO_LONG", message));
            }
            Length::First(wanted) if came > wanted - self.seen => {
                bytes.truncate(usize::try_from(wanted - self.seen).unwrap_or(usize::MAX));
            }
            _ => {}
        }
        self.seen += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_or_refused() {
        let range = |range, total| Some(ContentRange { range: Some(range), total });
        assert_eq!(ContentRange::parse("bytes 0-0/10"), range(0..1, Some(10)));
        assert_eq!(ContentRange::parse("bytes 5-9/*"), range(5..10, None));
        assert_eq!(ContentRange::parse("bytes */10"), Some(ContentRange { range: None, total: Some(10) }));
        for junk in [
            "",
            "bytes",
            "bytes 0-0",
            "bytes 5-3/10",
            "bytes 0-10/10",
            "bytes -1-3/10",
            "items 0-0/1",
            "bytes 0-18446744073709551615/*",
        ] {
            assert_eq!(ContentRange::parse(junk), None, "{junk}");
        }
    }

    #[test]
    fn a_whole_file_is_asked_for_without_a_range() {
        let wanted = |range: Range<u64>, size, ranges| Wanted { range, size, ranges }.header();
        assert_eq!(wanted(0..10, Some(10), true), None);
        assert_eq!(wanted(0..u64::MAX, None, true), None);
        assert_eq!(wanted(0..5, Some(10), false), None);
        assert_eq!(wanted(0..5, Some(10), true).as_deref(), Some("bytes=0-4"));
        assert_eq!(wanted(5..10, Some(10), true).as_deref(), Some("bytes=5-9"));
    }

    #[test]
    fn ranges_that_cannot_be_are_our_bug() {
        let check = |range: Range<u64>, size, ranges| Wanted { range, size, ranges }.check("x").is_ok();
        assert!(check(0..10, Some(10), false) && check(5..10, Some(10), true) && check(0..u64::MAX, None, false));
        assert!(!check(5..10, Some(10), false) && !check(0..11, Some(10), true));
    }
}
