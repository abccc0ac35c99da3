//! Azure Blob Storage: `https://<account>.blob.core.windows.net/<container>/<path>`.
//!
//! **Where.** The address of the URI; the option `endpoint` stands in for its scheme and host (`http://127.0.0.1:10000/devstoreaccount1`).
//! The account is the option `account`, else the first label of the URI's host.
//!
//! **Who.** `sas` (a query in the URI is taken for it and stored nowhere) or `account_key` of the request; without them
//! `AZURE_STORAGE_SAS_TOKEN` or `AZURE_STORAGE_KEY` of the daemon, for the account `AZURE_STORAGE_ACCOUNT` at Azure itself and for no other; without those
//! nobody.
//!
//! **Pinned and verified.** The listing gives an `ETag` and, where whoever put the blob computed one, the MD5. `ETag`s change with
//! every change, so that is the pin; versions would take further rights.
//!
//! Accounts with a hierarchical namespace list directories too.

mod refusal;
mod sign;

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use percent_encoding::percent_decode_str;
use reqwest::header::{CONTENT_TYPE, ETAG, HeaderName, IF_MATCH, RANGE};
use reqwest::{Method, StatusCode, Url};

use self::sign::{Sas, SharedKey};
use super::super::connect::{SourceContext, parse_http};
use super::super::http::{
    Authorization, Failure, HttpClient, Reply, Request, Wanted, announced_length, read_document,
    without_user_information,
};
use super::super::{ByteStream, Credentials, Source, SourceSpec, Stated, source_changed};
use super::xml::{Document, Fields};
use super::{
    Bucket, Locator, Object, ObjectSource, PAGE_BYTES, Page, Pin, changed_by, decoded, encoded, encoded_key, header,
    shown_key, url_below,
};
use crate::error::{Error, Result};

/// The protocol's version that is spoken: listings with types of entries, shared keys of today.
const VERSION: (HeaderName, &str) = (HeaderName::from_static("x-ms-version"), "2021-12-02");

/// The host of Azure itself.
const AZURE: &str = ".blob.core.windows.net";

/// The blobs that `spec` means.
///
/// # Errors
/// Invalid for an address, endpoint or credentials that cannot be.
pub(in super::super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let mut url = without_user_information(parse_http(&spec.uri, "the URI")?);
    let sas_of_uri = url.query().map(str::to_owned);
    url.set_query(None);
    url.set_fragment(None);
    let bad = |why: &str| {
        Error::invalid("BAD_URI", why).remedy("write https://<account>.blob.core.windows.net/<container>/<path>")
    };
    let path = url.path().trim_start_matches('/').to_owned();
    let (container, path) = path.split_once('/').unwrap_or((&path, ""));
    let container = percent_decode_str(container).decode_utf8().map_err(|_| bad("the container is not text"))?;
    let path = percent_decode_str(path).decode_utf8().map_err(|_| bad("the path is not text"))?;
    if !is_container(&container) {
        return Err(bad(&format!("`{}` is not the name of a container", shown_key(&container))));
    }
    let host = url.host_str().unwrap_or_default().to_owned();
    let account = spec.option("account").unwrap_or_else(|| host.split('.').next().unwrap_or_default()).to_owned();
    let own = spec.option("endpoint").is_none() && host.strip_suffix(AZURE) == Some(account.as_str());
    let mut base = match spec.option("endpoint") {
        Some(endpoint) => without_user_information(parse_http(endpoint, "the option `endpoint`")?),
        None => url,
    };
    base.set_query(None);
    if spec.option("endpoint").is_none() {
        base.set_path("");
    }
    let (authorization, expires) = authorize(&account, own, credentials, sas_of_uri.as_deref())?;
    let http = context.http.clone();
    let bucket = Container { http, base, container: container.into_owned(), authorization, expires };
    Ok(Arc::new(ObjectSource { bucket, path: path.into_owned() }))
}

type Authorized = (Option<Authorization>, Option<DateTime<Utc>>);

fn authorize(account: &str, own: bool, credentials: &Credentials, sas_of_uri: Option<&str>) -> Result<Authorized> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let ours = own && set("AZURE_STORAGE_ACCOUNT").as_deref() == Some(account);
    let of_environment = |name: &str| if ours { set(name) } else { None };
    let given = |name: &str| credentials.get(name).map(str::to_owned);
    let with_sas = |text: String| {
        let sas = Sas::parse(&text)?;
        let expires = sas.expires;
        Ok((Some(Authorization::Signed(Arc::new(sas))), expires))
    };
    let with_key = |key: String| Ok((Some(Authorization::Signed(Arc::new(SharedKey::parse(account, &key)?))), None));
    if let Some(sas) = given("sas").or_else(|| sas_of_uri.map(str::to_owned)) {
        return with_sas(sas);
    }
    if let Some(key) = given("account_key") {
        return with_key(key);
    }
    if let Some(sas) = of_environment("AZURE_STORAGE_SAS_TOKEN") {
        return with_sas(sas);
    }
    of_environment("AZURE_STORAGE_KEY").map_or(Ok((None, None)), with_key)
}

fn is_container(name: &str) -> bool {
    name.starts_with('$')
        || ((3..=63).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'))
}

/// A container of blobs.
struct Container {
    http: HttpClient,
    base: Url,
    container: String,
    authorization: Option<Authorization>,
    expires: Option<DateTime<Utc>>,
}

impl Container {
    async fn ask(
        &self,
        method: Method,
        key: Option<&str>,
        query: &[(&str, &str)],
        headers: &[(HeaderName, String)],
    ) -> Result<Reply, Failure> {
        let path = key.map(|key| format!("/{}", encoded_key(key))).unwrap_or_default();
        let below = format!("/{}{path}", encoded(&self.container));
        let url = url_below(self.base.as_str(), &below, query)?;
        let request = match method {
            Method::HEAD => Request::head(&url, self.authorization.as_ref()),
            _ => Request::get(&url, self.authorization.as_ref()),
        };
        let request = request.headers(&[(VERSION.0, VERSION.1.to_owned())]).headers(headers);
        self.http.send(&request.without_redirects()).await
    }

    fn explain(&self, failure: Failure) -> Error {
        match failure {
            Failure::Refused(answer) => refusal::fault(&answer, self.expires),
            Failure::Failed(error) => error,
        }
    }

    fn object(&self, fields: &Fields) -> Result<Object> {
        let bad = |why: &str| Error::corrupt("BAD_LISTING", format!("listing {}: {why}", self.shown()));
        let name = fields.get("Name").ok_or_else(|| bad("a blob has no name"))?;
        let mut key = if fields.contains_key("Name-Encoded") {
            percent_decode_str(name).decode_utf8().map_err(|_| bad("a name is not text"))?.into_owned()
        } else {
            name.clone()
        };
        let is_directory = fields.get("ResourceType").is_some_and(|kind| kind == "directory");
        if is_directory && !key.ends_with('/') {
            key.push('/');
        }
        let size = fields.get("Content-Length").and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| bad(&format!("`{}` has no size", shown_key(&key))))?;
        let etag = fields.get("Etag").map(|etag| quoted(etag)).ok_or_else(|| bad("a blob has no ETag"))?;
        let md5 = fields.get("Content-MD5").and_then(|coded| decoded(coded));
        let pin = Pin { version: String::new(), etag };
        Ok(Object { key, size, pin, expected: Stated { md5, ..Stated::default() }.into() })
    }
}

#[async_trait]
impl Bucket for Container {
    fn shown(&self) -> String {
        format!("{}/{}", super::super::http::shown(&self.base).trim_end_matches('/'), self.container)
    }

    async fn find(&self, key: &str) -> Result<Option<Object>> {
        let reply = match self.ask(Method::HEAD, Some(key), &[], &[]).await {
            Ok(reply) => reply,
            Err(failure) if failure.status() == Some(StatusCode::NOT_FOUND) => return Ok(None),
            Err(failure) => return Err(self.explain(failure)),
        };
        let headers = reply.response.headers();
        if header(headers, "x-ms-resource-type") == Some("directory") {
            return Ok(None);
        }
        let what = format!("{}/{}", self.shown(), shown_key(key));
        let bad = |why: &str| Error::corrupt("BAD_ANSWER", format!("asking for {what}: {why}"));
        let size = announced_length(headers).ok_or_else(|| bad("it has no size"))?;
        let etag = header(headers, ETAG.as_str()).map(quoted).ok_or_else(|| bad("it has no ETag"))?;
        let md5 = header(headers, "content-md5").and_then(decoded);
        let pin = Pin { version: String::new(), etag };
        Ok(Some(Object { key: key.to_owned(), size, pin, expected: Stated { md5, ..Stated::default() }.into() }))
    }

    async fn page(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        let mut query = vec![("comp", "list"), ("maxresults", "1000"), ("restype", "container")];
        query.extend(Some(prefix).filter(|prefix| !prefix.is_empty()).map(|prefix| ("prefix", prefix)));
        query.extend(after.map(|marker| ("marker", marker)));
        let reply = self.ask(Method::GET, None, &query, &[]).await.map_err(|failure| self.explain(failure))?;
        let is_xml = header(reply.response.headers(), CONTENT_TYPE.as_str()).is_some_and(|kind| kind.contains("xml"));
        let document = read_document(reply, PAGE_BYTES, &self.http).await?;
        let document = Document::read(&document, "Blob").filter(|_| is_xml).ok_or_else(|| {
            Error::unavailable("BAD_ANSWER", format!("listing {}: the answer is no listing", self.shown()))
        })?;
        let objects = document.records.iter().map(|fields| self.object(fields)).collect::<Result<_>>()?;
        let next = document.fields.get("NextMarker").filter(|marker| !marker.is_empty()).cloned();
        Ok(Page { objects, next })
    }

    async fn answers_ranges(&self, object: &Locator<'_>) -> Result<bool> {
        let headers = [(RANGE, "bytes=0-0".to_owned())];
        let reply = self.ask(Method::GET, Some(object.key), &[], &headers).await;
        let reply = reply.map_err(|failure| self.explain(failure))?;
        Ok(reply.response.status() == StatusCode::PARTIAL_CONTENT)
    }

    async fn read(&self, object: &Locator<'_>, wanted: &Wanted) -> Result<ByteStream> {
        let what = format!("{}/{}", self.shown(), shown_key(object.key));
        let mut headers = vec![(IF_MATCH, object.pin.etag.clone())];
        headers.extend(wanted.header().map(|range| (RANGE, range)));
        let reply = self.ask(Method::GET, Some(object.key), &[], &headers).await;
        let reply = reply.map_err(|failure| changed_by(&failure, &what).unwrap_or_else(|| self.explain(failure)))?;
        if header(reply.response.headers(), ETAG.as_str()).is_none_or(|etag| quoted(etag) != object.pin.etag) {
            return Err(source_changed(&what, "it was replaced"));
        }
        wanted.accept(reply, &self.http)
    }
}

/// An `ETag` as conditions want it: listings leave its quotes out.
fn quoted(etag: &str) -> String {
    format!("\"{}\"", etag.trim_matches('"'))
}
