//! Google Cloud Storage: `gs://bucket/path`, over its JSON interface.
//!
//! **Who.** `token` (bearer) or `service_account` (the key file's JSON) of the request; without them the file that `GOOGLE_APPLICATION_CREDENTIALS`
//! of the daemon names, if it is a service account's and Google itself is asked: never for an endpoint that the request chose; without that nobody.
//!
//! **Pinned and verified.** The generation is in every request, and answers are compared with it. The listing gives the CRC-32C of every object
//! and the MD5 of most; the first is enough.
//!
//! **Stored as put.** An object that was put with `Content-Encoding: gzip` would be unpacked on its way to whoever does not take
//! gzip ("decompressive transcoding"), with other bytes than its size, its digests and its ranges are of. So everything is asked for with
//! `Accept-Encoding: gzip`: the store then sends what it keeps, and nothing here unpacks it.
//!
//! Keys are one component of the URL here, so any key can be asked for.

mod token;

use std::sync::Arc;

use async_trait::async_trait;
use reqwest::header::{ACCEPT_ENCODING, HeaderName, RANGE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use self::token::ServiceAccount;
use super::super::connect::{SourceContext, parse_http};
use super::super::http::{
    Answer, Authorization, Failure, HttpClient, Reply, Request, Wanted, read_document, without_user_information,
};
use super::super::{ByteStream, Credentials, Source, SourceSpec, Stated, source_changed};
use super::{
    Bucket, Locator, Object, ObjectSource, PAGE_BYTES, Page, Pin, changed_by, decoded, encoded, header, shown_key,
    url_below,
};
use crate::error::{Error, Kind, Result};

/// Google itself.
const ENDPOINT: &str = "https://storage.googleapis.com";

/// What is asked of each object.
const FIELDS: &str = "name,size,generation,crc32c,md5Hash";

/// Longest key file that is read: real ones have 2 to 3 KiB.
const KEY_FILE_BYTES: u64 = 64 << 10;

/// The objects that `spec` means.
///
/// # Errors
/// Invalid for a bucket, endpoint or credentials that cannot be.
pub(in super::super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let rest = spec.uri.split_once("://").map_or("", |(_, rest)| rest);
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    let own = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if !(3..=222).contains(&name.len()) || !name.bytes().all(own) {
        let message = format!("`{}` is not the name of a bucket", shown_key(name));
        return Err(Error::invalid("BAD_URI", message).remedy("write gs://bucket/path"));
    }
    let chosen = spec.option("endpoint");
    let mut endpoint = without_user_information(parse_http(chosen.unwrap_or(ENDPOINT), "the option `endpoint`")?);
    endpoint.set_query(None);
    let (authorization, account) = authorize(credentials, chosen.is_none())?;
    let bucket = Gcs { http: context.http.clone(), endpoint, name: name.to_owned(), authorization, account };
    Ok(Arc::new(ObjectSource { bucket, path: path.to_owned() }))
}

/// What proves who asks, and the service account whose proof it is, if it is one's.
type Proof = (Option<Authorization>, Option<Arc<ServiceAccount>>);

fn authorize(credentials: &Credentials, google: bool) -> Result<Proof> {
    if let Some(token) = credentials.get("token") {
        return Ok((Some(Authorization::bearer(token)?), None));
    }
    let json = match credentials.get("service_account") {
        Some(json) => Some(json.to_owned()),
        None if google => key_file_of_environment()?,
        None => None,
    };
    let account = json.map(|json| ServiceAccount::parse(&json)).transpose()?.map(Arc::new);
    let authorization = account.clone().map(|account| Authorization::Signed(account));
    Ok((authorization, account))
}

fn key_file_of_environment() -> Result<Option<String>> {
    use std::io::Read as _;
    let Some(path) = std::env::var_os("GOOGLE_APPLICATION_CREDENTIALS").filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    let fault = |error| Error::io("reading the credentials of the environment", &path, error);
    let mut json = String::new();
    std::fs::File::open(&path).map_err(fault)?.take(KEY_FILE_BYTES).read_to_string(&mut json).map_err(fault)?;
    Ok(Some(json))
}

/// A bucket of Google's.
struct Gcs {
    http: HttpClient,
    endpoint: Url,
    name: String,
    authorization: Option<Authorization>,
    account: Option<Arc<ServiceAccount>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    name: String,
    size: String,
    generation: String,
    crc32c: Option<String>,
    md5_hash: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Items {
    #[serde(default)]
    items: Vec<Item>,
    next_page_token: Option<String>,
}

impl Gcs {
    /// Sends one request; once more with a token that was made for it where the one before is refused.
    async fn ask(
        &self,
        key: Option<&str>,
        query: &[(&str, &str)],
        headers: &[(HeaderName, String)],
    ) -> Result<Reply, Failure> {
        let key = key.map(|key| format!("/{}", encoded(key))).unwrap_or_default();
        let url = url_below(self.endpoint.as_str(), &format!("/storage/v1/b/{}/o{key}", self.name), query)?;
        let request = Request::get(&url, self.authorization.as_ref()).headers(headers).without_redirects();
        match (self.http.send(&request).await, &self.account) {
            (Err(failure), Some(account)) if failure.status() == Some(StatusCode::UNAUTHORIZED) => {
                account.forget_token();
                self.http.send(&request).await
            }
            (other, _) => other,
        }
    }

    async fn document<T: for<'de> Deserialize<'de>>(&self, reply: Reply) -> Result<T> {
        let document = read_document(reply, PAGE_BYTES, &self.http).await?;
        serde_json::from_slice(&document).map_err(|error| {
            Error::unavailable("BAD_ANSWER", format!("listing {}: the answer is no listing", self.shown()))
                .because(error)
        })
    }

    fn explain(&self, failure: Failure) -> Error {
        match failure {
            Failure::Refused(answer) => self.fault(&answer),
            Failure::Failed(error) => error,
        }
    }

    fn fault(&self, answer: &Answer) -> Error {
        match answer.status.as_u16() {
            404 => answer
                .error(Kind::NotFound, "NO_SUCH_BUCKET", "there is no such bucket")
                .remedy("check the bucket's name")
                .fact("bucket", &self.name),
            401 | 403 if !answer.authorized => answer
                .error(Kind::Denied, "CREDENTIALS_REQUIRED", "access without credentials is refused")
                .remedy("give service_account or token for this source"),
            401 => answer
                .error(Kind::Denied, "CREDENTIALS_REFUSED", "the credentials are not accepted, or have expired")
                .remedy("check the service account's key and this host's clock, or retry with a fresh token"),
            403 => answer
                .error(Kind::Denied, "ACCESS_REFUSED", "access is refused")
                .remedy("check that the account may read and list it (storage.objects.get, storage.objects.list)"),
            _ => answer.fault(),
        }
    }

    fn object(&self, item: Item) -> Result<Object> {
        let size = item.size.parse().map_err(|_| {
            let message = format!("listing {}: `{}` has no size", self.shown(), shown_key(&item.name));
            Error::corrupt("BAD_LISTING", message)
        })?;
        let crc32c = item.crc32c.as_deref().and_then(decoded).map(u32::from_be_bytes);
        let md5 = item.md5_hash.as_deref().filter(|_| crc32c.is_none()).and_then(decoded);
        let pin = Pin { version: item.generation, etag: String::new() };
        Ok(Object { key: item.name, size, pin, expected: Stated { crc32c, md5, ..Stated::default() }.into() })
    }

    async fn media(&self, object: &Locator<'_>, range: Option<String>) -> Result<Reply, Failure> {
        let mut headers = vec![(ACCEPT_ENCODING, "gzip".to_owned())];
        headers.extend(range.map(|range| (RANGE, range)));
        let query = [("alt", "media"), ("generation", object.pin.version.as_str())];
        self.ask(Some(object.key), &query, &headers).await
    }
}

#[async_trait]
impl Bucket for Gcs {
    fn shown(&self) -> String {
        format!("gs://{}", self.name)
    }

    async fn find(&self, key: &str) -> Result<Option<Object>> {
        match self.ask(Some(key), &[("fields", FIELDS)], &[]).await {
            Ok(reply) => self.object(self.document(reply).await?).map(Some),
            Err(failure) if failure.status() == Some(StatusCode::NOT_FOUND) => Ok(None),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    async fn page(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        let fields = format!("nextPageToken,items({FIELDS})");
        let mut query = vec![("fields", fields.as_str()), ("maxResults", "1000"), ("prefix", prefix)];
        query.extend(after.map(|token| ("pageToken", token)));
        let reply = self.ask(None, &query, &[]).await.map_err(|failure| self.explain(failure))?;
        let page: Items = self.document(reply).await?;
        let objects = page.items.into_iter().map(|item| self.object(item)).collect::<Result<_>>()?;
        Ok(Page { objects, next: page.next_page_token.filter(|token| !token.is_empty()) })
    }

    async fn answers_ranges(&self, object: &Locator<'_>) -> Result<bool> {
        let reply = self.media(object, Some("bytes=0-0".to_owned())).await.map_err(|failure| self.explain(failure))?;
        Ok(reply.response.status() == StatusCode::PARTIAL_CONTENT)
    }

    async fn read(&self, object: &Locator<'_>, wanted: &Wanted) -> Result<ByteStream> {
        let what = format!("{}/{}", self.shown(), shown_key(object.key));
        let reply = self.media(object, wanted.header()).await;
        let reply = reply.map_err(|failure| changed_by(&failure, &what).unwrap_or_else(|| self.explain(failure)))?;
        if header(reply.response.headers(), "x-goog-generation").is_some_and(|found| found != object.pin.version) {
            return Err(source_changed(&what, "it was replaced"));
        }
        wanted.accept(reply, &self.http)
    }
}
