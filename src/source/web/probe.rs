//! What a server says of one file before it is read: size, ranges, validators, and where redirects lead.
//!
//! By the first byte, which shows what ranges really do; or by HEAD, which is cheaper for servers that must open a file to send
//! of it, and all that is left where ranges are refused.

use reqwest::header::{ACCEPT_RANGES, CONTENT_ENCODING, HeaderMap, RANGE};
use reqwest::{StatusCode, Url};

use super::super::http::{
    Authorization, ContentRange, Failure, HttpClient, Reply, Request, Target, announced_length, read_document, shown,
};
use super::validators::text_of;
use crate::error::{Error, Kind, Result};

/// What was found out: see the module's page.
#[derive(Debug)]
pub(super) struct Probe {
    /// Size in bytes, if it is said.
    pub(super) size: Option<u64>,
    /// Whether ranges work, or are said to.
    pub(super) ranges: bool,
    /// All that the answer bears.
    pub(super) headers: HeaderMap,
    /// Where redirects led.
    pub(super) url: Url,
}

impl Probe {
    /// Asks for the first byte, or with HEAD where that is refused.
    pub(super) async fn first_byte(
        target: &Target,
        authorization: Option<&Authorization>,
        http: &HttpClient,
    ) -> Result<Self> {
        match target.get(http, &[(RANGE, "bytes=0-0".to_owned())]).await {
            Ok(reply) => Ok(Self::of(reply, http).await),
            Err(Failure::Refused(answer)) if answer.status == StatusCode::RANGE_NOT_SATISFIABLE => {
                match ContentRange::of(&answer.headers).and_then(|range| range.total) {
                    Some(0) => {
                        Ok(Self { size: Some(0), ranges: false, headers: answer.headers, url: target.url().clone() })
                    }
                    _ => Self::plain_head(target.url(), authorization, http).await,
                }
            }
            Err(failure) if is_refusal_of_the_method(&failure) => {
                Self::plain_head(target.url(), authorization, http).await
            }
            Err(failure) => Err(failure.into_error()),
        }
    }

    /// Asks with HEAD, or for the first byte where that is refused or tells no size. Ranges are believed as announced.
    pub(super) async fn head(url: &Url, authorization: Option<&Authorization>, http: &HttpClient) -> Result<Self> {
        match http.send(&Request::head(url, authorization)).await {
            Ok(reply) if announced_length(reply.response.headers()).is_some() => {
                let ranges = text_of(reply.response.headers(), ACCEPT_RANGES)
                    .is_some_and(|units| units.split(',').any(|unit| unit.trim().eq_ignore_ascii_case("bytes")));
                Ok(Self { ranges, ..Self::of_head(reply) })
            }
            Err(failure) if !is_refusal_of_the_method(&failure) => Err(failure.into_error()),
            _ => Self::first_byte(&Target::new(url.clone(), authorization.cloned()), authorization, http).await,
        }
    }

    async fn plain_head(url: &Url, authorization: Option<&Authorization>, http: &HttpClient) -> Result<Self> {
        http.send(&Request::head(url, authorization)).await.map(Self::of_head).map_err(Failure::into_error)
    }

    fn of_head(reply: Reply) -> Self {
        let headers = reply.response.headers().clone();
        Self { size: announced_length(&headers), ranges: false, headers, url: reply.url }
    }

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

fn is_refusal_of_the_method(failure: &Failure) -> bool {
    failure.status().is_some_and(|status| matches!(status.as_u16(), 400 | 405 | 501))
}

/// Refuses a body that is not the file's own bytes.
///
/// # Errors
/// `CONTENT_ENCODED`.
pub(super) fn check_encoding(headers: &HeaderMap, name: &[u8], url: &Url) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
