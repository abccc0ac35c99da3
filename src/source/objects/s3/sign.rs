//! AWS Signature Version 4 for requests without a body ("Authenticating Requests: Using the Authorization Header", S3's manual).
//!
//! Signed are the host, the range and everything `x-amz-`; not what proxies rewrite. The path is signed as the key is written with plain slashes,
//! the query in the order of its names.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderName, HeaderValue, RANGE};
use ring::{digest, hmac};

use super::super::super::http::Sign;
use crate::error::{Error, Result};

/// SHA-256 of no bytes.
const NO_BODY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

const DATE: HeaderName = HeaderName::from_static("x-amz-date");
const BODY_DIGEST: HeaderName = HeaderName::from_static("x-amz-content-sha256");
const TOKEN: HeaderName = HeaderName::from_static("x-amz-security-token");

/// Who asks.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) id: String,
    pub(super) secret: String,
    /// Of temporary credentials.
    pub(super) token: Option<String>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(..)")
    }
}

/// Signs for the region that is known at the moment.
pub(super) struct Signer {
    pub(super) keys: Keys,
    pub(super) region: Arc<RwLock<String>>,
}

#[async_trait]
impl Sign for Signer {
    async fn sign(&self, request: &mut reqwest::Request) -> Result<()> {
        let region = self.region.read().unwrap_or_else(PoisonError::into_inner).clone();
        sign(request, &self.keys, &region, Utc::now())
    }
}

fn sign(request: &mut reqwest::Request, keys: &Keys, region: &str, now: DateTime<Utc>) -> Result<()> {
    let date = now.format("%Y%m%dT%H%M%SZ").to_string();
    let headers = request.headers_mut();
    headers.insert(DATE, value(&date)?);
    headers.insert(BODY_DIGEST, HeaderValue::from_static(NO_BODY));
    if let Some(token) = &keys.token {
        headers.insert(TOKEN, value(token)?);
    }
    let (names, canonical) = canonical_request(request)?;
    let scope = format!("{}/{region}/s3/aws4_request", &date[..8]);
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{date}\n{scope}\n{}",
        hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref())
    );
    let mut key = format!("AWS4{}", keys.secret).into_bytes();
    for part in scope.split('/') {
        key = mac(&key, part);
    }
    let signature = hex(&mac(&key, &to_sign));
    let authorization =
        format!("AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={signature}", keys.id);
    request.headers_mut().insert(AUTHORIZATION, value(&authorization)?);
    Ok(())
}

/// The names of the headers that are signed, and the request as it is signed.
fn canonical_request(request: &reqwest::Request) -> Result<(String, String)> {
    let mut headers = vec![("host", host(request.url()))];
    for (name, value) in request.headers() {
        if *name == RANGE || name.as_str().starts_with("x-amz-") {
            let text = value.to_str().map_err(|_| unusable())?;
            headers.push((name.as_str(), text.trim().to_owned()));
        }
    }
    headers.sort();
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let lines: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let path = request.url().path().replace("%2F", "/");
    let mut query: Vec<String> = request.url().query().unwrap_or_default().split('&').map(with_equals).collect();
    query.sort();
    let canonical = format!("{}\n{path}\n{}\n{lines}\n{names}\n{NO_BODY}", request.method(), query.join("&"));
    Ok((names, canonical))
}

fn with_equals(pair: &str) -> String {
    if pair.is_empty() || pair.contains('=') { pair.to_owned() } else { format!("{pair}=") }
}

/// The host as it stands in the request: with its port unless that is the scheme's own.
fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn value(text: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text).map_err(|_| unusable())?;
    value.set_sensitive(true);
    Ok(value)
}

fn unusable() -> Error {
    Error::invalid("BAD_CREDENTIALS", "the credentials hold characters that HTTP cannot carry")
        .remedy("check that they were given whole and each on one line")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(url: &str, range: Option<&'static str>) -> String {
        let mut request = reqwest::Request::new(reqwest::Method::GET, Url::parse(url).unwrap());
        if let Some(range) = range {
            request.headers_mut().insert(RANGE, HeaderValue::from_static(range));
        }
        let keys = Keys {
            id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            token: None,
        };
        let now = DateTime::parse_from_rfc3339("2013-05-24T00:00:00Z").unwrap().with_timezone(&Utc);
        sign(&mut request, &keys, "us-east-1", now).unwrap();
        let text = request.headers()[AUTHORIZATION].to_str().unwrap().to_owned();
        text.rsplit_once("Signature=").unwrap().1.to_owned()
    }

    #[test]
    fn the_examples_of_the_manual_come_out() {
        for (url, range, expected) in [
            (
                "https://examplebucket.s3.amazonaws.com/test.txt",
                Some("bytes=0-9"),
                "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
            ),
            (
                "https://examplebucket.s3.amazonaws.com/?lifecycle",
                None,
                "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
            ),
            (
                "https://examplebucket.s3.amazonaws.com/?max-keys=2&prefix=J",
                None,
                "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
            ),
        ] {
            assert_eq!(signature(url, range), expected, "{url}");
        }
    }

    #[test]
    fn a_slash_in_a_key_is_signed_as_a_slash_and_queries_in_order() {
        let plain = signature("https://h/b/a/c?b=2&a=1", None);
        assert_eq!(signature("https://h/b/a%2Fc?a=1&b=2", None), plain);
        assert_ne!(signature("https://h/b/a%20c?a=1&b=2", None), plain);
    }

    #[test]
    fn credentials_that_no_header_holds_are_refused_and_not_shown() {
        let mut request = reqwest::Request::new(reqwest::Method::GET, Url::parse("http://h/").unwrap());
        let keys = Keys { id: "k".into(), secret: "s".into(), token: Some("tok\nen".into()) };
        let error = sign(&mut request, &keys, "r", Utc::now()).unwrap_err();
        assert_eq!(error.reason(), "BAD_CREDENTIALS");
        assert!(!format!("{error:?} {keys:?}").contains("tok"));
    }
}
