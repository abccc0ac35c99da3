//! What a request of the transfer protocol says and brings: its range, its upload, its body.

use std::borrow::Cow;
use std::time::Duration;

use axum::body::{Body as Incoming, BodyDataStream};
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use futures_util::StreamExt as _;

use super::PIECE_BYTES;
use super::refusal::Refusal;
use crate::pieces::Pieces;
use crate::source::local::StreamDigest;

/// The upload of a client that names none.
pub(super) const DEFAULT_ID: &str = "default";

/// Longest id of an upload; the client's are 36 letters.
const ID_BYTES: usize = 128;

/// Largest body of `/finalize`: a digest in JSON is 150 bytes.
const FINALIZE_BYTES: usize = 4 << 10;

/// Longest silence in the middle of a body, unless uploads may not be silent for as long.
pub(super) const BODY_PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a refused body that are read and dropped, so that its sender gets to read why; more is cut off.
const PASS_OVER_BYTES: usize = 64 << 20;

/// Where in the tar a piece belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    /// Behind the last byte.
    pub(super) end: u64,
}

impl Range {
    /// Of `Content-Range: bytes <first>-<last>/<whatever>`.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Refusal> {
        let value = headers.get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let range = value
            .and_then(Self::parse)
            .ok_or(Refusal::Malformed("`Content-Range: bytes FIRST-LAST/TOTAL` is missing"))?;
        if range.length() > PIECE_BYTES {
            return Err(Refusal::PieceTooLarge);
        }
        Ok(range)
    }

    fn parse(value: &str) -> Option<Self> {
        let (first, rest) = value.strip_prefix("bytes ")?.trim().split_once('-')?;
        let (last, _) = rest.split_once('/')?;
        let (start, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        let end = last.checked_add(1).filter(|end| *end > start)?;
        Some(Self { start, end })
    }

    pub(super) fn length(self) -> usize {
        usize::try_from(self.end - self.start).unwrap_or(usize::MAX)
    }
}

/// The upload that a request is part of.
pub(super) fn upload_id(headers: &HeaderMap) -> Result<&str, Refusal> {
    let Some(value) = headers.get("upload-id") else { return Ok(DEFAULT_ID) };
    let id = value.to_str().ok().filter(|id| (1..=ID_BYTES).contains(&id.len()));
    id.ok_or(Refusal::Malformed("`Upload-Id` is not 1 to 128 visible letters"))
}

/// The upload that a query asks for.
pub(super) fn asked_upload_id(query: &str) -> Cow<'_, str> {
    let asked = query.split('&').find_map(|pair| pair.strip_prefix("upload_id="));
    asked.map_or(Cow::Borrowed(DEFAULT_ID), |id| percent_encoding::percent_decode_str(id).decode_utf8_lossy())
}

/// A whole body, in order.
pub(super) struct Body(pub(super) Vec<Bytes>);

impl Body {
    /// Takes a body that must have `length` bytes and is never silent for longer than `patience`. Holds what came, never what was announced.
    pub(super) async fn gather(body: Incoming, length: usize, patience: Duration) -> Result<Self, Refusal> {
        let mut body = body.into_data_stream();
        let mut runs = Pieces::default();
        let mut left = length;
        while let Some(run) = next(&mut body, patience).await? {
            let Some(after) = left.checked_sub(run.len()) else {
                return Err(Refusal::Malformed("the body is longer than its range"));
            };
            left = after;
            runs.push(run);
        }
        if left > 0 {
            return Err(Refusal::Malformed("the body is shorter than its range"));
        }
        Ok(Self(runs.take()))
    }
}

/// The digest that a `/finalize` states.
pub(super) async fn stated_digest(body: Incoming, patience: Duration) -> Result<StreamDigest, Refusal> {
    let mut body = body.into_data_stream();
    let mut text = Vec::new();
    while let Some(run) = next(&mut body, patience).await? {
        if text.len() + run.len() > FINALIZE_BYTES {
            return Err(Refusal::Malformed("the body is too long"));
        }
        text.extend_from_slice(&run);
    }
    let document: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
    let hex = document.as_ref().and_then(|document| document["hash"].as_str());
    hex.and_then(parse_digest).ok_or(Refusal::Malformed("the body is not {\"hash\": SHA-512 in hexadecimal digits}"))
}

fn parse_digest(hex: &str) -> Option<StreamDigest> {
    let mut digest = [0; 64];
    if !hex.is_ascii() || hex.len() != 2 * digest.len() {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(digest)
}

/// Reads what is left of a refused body, as far as that is cheap.
pub(super) async fn pass_over(body: Incoming, patience: Duration) {
    let mut body = body.into_data_stream();
    let mut passed = 0;
    while let Ok(Some(run)) = next(&mut body, patience).await {
        passed += run.len();
        if passed > PASS_OVER_BYTES {
            return;
        }
    }
}

async fn next(body: &mut BodyDataStream, patience: Duration) -> Result<Option<Bytes>, Refusal> {
    match tokio::time::timeout(patience, body.next()).await {
        Ok(Some(Ok(run))) => Ok(Some(run)),
        Ok(None) => Ok(None),
        // Nobody is there any more to read what is answered.
        Ok(Some(Err(_))) => Err(Refusal::Malformed("the body broke off")),
        Err(_) => Err(Refusal::Busy("the body stalled")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!(Range::parse("bytes 0-65535/65536"), Some(Range { start: 0, end: 65_536 }));
        assert_eq!(Range::parse("bytes 5-5/*"), Some(Range { start: 5, end: 6 }));
        for bad in ["", "bytes", "bytes 5-4/6", "bytes -4/6", "0-1/2", "bytes 1-2", "bytes 0-18446744073709551615/1"] {
            assert_eq!(Range::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn digests_are_128_digits() {
        assert_eq!(parse_digest(&"0A".repeat(64)), Some([10; 64]));
        for bad in ["0a".repeat(63), "0g".repeat(64), "é".repeat(64), String::new()] {
            assert_eq!(parse_digest(&bad), None, "{bad}");
        }
    }
}
