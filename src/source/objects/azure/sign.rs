//! What proves to Azure who asks: a key of the account ("Authorize with Shared Key", Blob service, versions from 2015 on), or a shared access
//! signature, which is a query that goes behind every request's own.

use std::collections::BTreeMap;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use chrono::{DateTime, NaiveDate, Utc};
use percent_encoding::percent_decode_str;
use reqwest::header::{AUTHORIZATION, HeaderName, HeaderValue, IF_MATCH, RANGE};
use ring::hmac;

use super::super::super::http::Sign;
use crate::error::{Error, Result};

const DATE: HeaderName = HeaderName::from_static("x-ms-date");

/// A shared access signature.
pub(super) struct Sas {
    query: String,
    /// When it ends, if that can be read.
    pub(super) expires: Option<DateTime<Utc>>,
}

impl Sas {
    /// Reads a signature as the portal gives it, with or without `?`.
    ///
    /// # Errors
    /// `BAD_CREDENTIALS` for what is no query with a signature in it.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let query = text.trim().trim_start_matches('?');
        let has_signature = query.split('&').any(|pair| pair.starts_with("sig="));
        if !has_signature || !query.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
            return Err(Error::invalid("BAD_CREDENTIALS", "the shared access signature is not one")
                .remedy("give it whole and as it is, beginning with `sv=` or `?sv=`"));
        }
        let expires = query.split('&').find_map(|pair| pair.strip_prefix("se=")).and_then(moment);
        Ok(Self { query: query.to_owned(), expires })
    }
}

fn moment(coded: &str) -> Option<DateTime<Utc>> {
    let text = percent_decode_str(coded).decode_utf8().ok()?;
    let at_midnight = || Some(NaiveDate::parse_from_str(&text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0)?.and_utc());
    DateTime::parse_from_rfc3339(&text).ok().map(|at| at.with_timezone(&Utc)).or_else(at_midnight)
}

#[async_trait]
impl Sign for Sas {
    async fn sign(&self, request: &mut reqwest::Request) -> Result<()> {
        let url = request.url_mut();
        let query = match url.query() {
            Some(own) => format!("{own}&{}", self.query),
            None => self.query.clone(),
        };
        url.set_query(Some(&query));
        Ok(())
    }
}

/// A key of an account.
pub(super) struct SharedKey {
    account: String,
    key: hmac::Key,
}

impl SharedKey {
    /// Reads the key, which is base64.
    ///
    /// # Errors
    /// `BAD_CREDENTIALS`.
    pub(super) fn parse(account: &str, key: &str) -> Result<Self> {
        let bytes = BASE64_STANDARD.decode(key.trim()).ok().filter(|bytes| !bytes.is_empty()).ok_or_else(|| {
            Error::invalid("BAD_CREDENTIALS", "the account key is not one")
                .remedy("give it whole, as the portal shows it")
        })?;
        Ok(Self { account: account.to_owned(), key: hmac::Key::new(hmac::HMAC_SHA256, &bytes) })
    }

    fn sign_at(&self, request: &mut reqwest::Request, now: DateTime<Utc>) -> Result<()> {
        let unusable = |_| Error::internal("a signature does not fit in a header");
        let date = now.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        request.headers_mut().insert(DATE, HeaderValue::from_str(&date).map_err(unusable)?);
        let signature = BASE64_STANDARD.encode(hmac::sign(&self.key, self.to_sign(request).as_bytes()));
        let text = format!("SharedKey {}:{signature}", self.account);
        let mut value = HeaderValue::from_str(&text).map_err(unusable)?;
        value.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, value);
        Ok(())
    }

    /// Method, the eleven headers that are signed (of which we send two), the service's own headers, and the resource.
    fn to_sign(&self, request: &reqwest::Request) -> String {
        let header = |name: HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let own: BTreeMap<&str, &str> = request
            .headers()
            .iter()
            .filter(|(name, _)| name.as_str().starts_with("x-ms-"))
            .filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?.trim())))
            .collect();
        let own: String = own.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
        let mut query: Vec<(String, String)> =
            request.url().query_pairs().map(|(name, value)| (name.to_lowercase(), value.into_owned())).collect();
        query.sort();
        let query: String = query.iter().map(|(name, value)| format!("\n{name}:{value}")).collect();
        format!(
            "{}\n\n\n\n\n\n\n\n{}\n\n\n{}\n{own}/{}{}{query}",
            request.method(),
            header(IF_MATCH),
            header(RANGE),
            self.account,
            request.url().path(),
        )
    }
}

#[async_trait]
impl Sign for SharedKey {
    async fn sign(&self, request: &mut reqwest::Request) -> Result<()> {
        self.sign_at(request, Utc::now())
    }
}

#[cfg(test)]
mod tests {
    use reqwest::{Method, Url};

    use super::*;

    #[test]
    fn the_text_that_is_signed_is_that_of_the_manual() {
        let url = "https://acc.blob.core.windows.net/c/a%20b?restype=container&comp=list&prefix=x%2Fy";
        let mut request = reqwest::Request::new(Method::GET, Url::parse(url).unwrap());
        request.headers_mut().insert(RANGE, HeaderValue::from_static("bytes=0-9"));
        request.headers_mut().insert("x-ms-version", HeaderValue::from_static("2023-11-03"));
        let key = SharedKey::parse("acc", "c2VjcmV0").unwrap();
        let now = DateTime::parse_from_rfc3339("2026-01-02T03:04:05Z").unwrap().with_timezone(&Utc);
        key.sign_at(&mut request, now).unwrap();
        let expected = "GET\n\n\n\n\n\n\n\n\n\n\nbytes=0-9\nx-ms-date:Fri, 02 Jan 2026 03:04:05 GMT\nx-ms-version:2023-11-03\n\
            /acc/c/a%20b\ncomp:list\nprefix:x/y\nrestype:container";
        assert_eq!(key.to_sign(&request), expected);
        assert!(request.headers()[AUTHORIZATION].to_str().unwrap().starts_with("SharedKey acc:"));
    }

    #[test]
    fn signatures_are_taken_as_the_portal_gives_them() {
        let sas = Sas::parse("?sv=2022-11-02&se=2024-01-02T03%3A04%3A05Z&sr=c&sp=rl&sig=a%2Bb%3D\n").unwrap();
        assert_eq!(sas.expires.unwrap().to_rfc3339(), "2024-01-02T03:04:05+00:00");
        assert!(sas.query.starts_with("sv=") && sas.query.ends_with("%3D"));
        for junk in ["", "sv=1", "sig=a b", "sig=a#b"] {
            assert_eq!(Sas::parse(junk).err().unwrap().reason(), "BAD_CREDENTIALS", "{junk}");
        }
        assert!(SharedKey::parse("a", "!").is_err() && SharedKey::parse("a", "").is_err());
    }
}
