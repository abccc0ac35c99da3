//! Amazon S3 and what speaks its protocol: `s3://bucket/path`.
//!
//! **Where.** AWS is spoken to by the bucket's own host (`bucket.s3.region.amazonaws.com`), buckets that no certificate covers and whatever has
//! the option `endpoint` by path. The region is the option `region`, else the environment's, else us-east-1, and mended
//! once when an answer says better.
//!
//! **Who.** `key_id`, `secret` and `token` of the request; without them `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN` of the
//! daemon, for AWS itself and the endpoint that its environment names alone ([`environment`]); without those, or with the option
//! `anonymous=true`, nobody. The instance's metadata service is never asked: tenants choose what is read.
//!
//! **Digests.** A listing gives `ETag`s, and an `ETag` of 32 hexadecimal digits is the MD5 of the bytes, unless the object is
//! encrypted with keys of its own (SSE-KMS, SSE-C), which the listing does not tell. So the listing's are not believed. Large files are asked for their head
//! when the source is opened: it tells the checksums, the encryption, and the version to pin. SHA-256, CRC-64/NVME, CRC-32C
//! and CRC-32 are verified where they are of the whole object; one that is composed of those of the pieces that it was put in (`COMPOSITE`) is
//! not, since nothing says where the pieces begin: such an object without another digest comes unverified, but for its length and pin. Small files are checked against the head of the answer that brings them ([`verified`]).
//! Stores that are not AWS's may mean anything by an `ETag`: theirs are believed after one small object was read whose MD5 it is.
//!
//! **Versions.** What is pinned to a version is read whatever happens to its key. Small files have no version from the listing, and asking for each would
//! be a request each; so it is asked for when one turns out to have been replaced or removed since: a bucket that keeps versions still gives what was
//! listed ([`versions`]), and another's file is `SOURCE_CHANGED`.

mod environment;
mod refusal;
mod sign;
mod versions;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _};
use percent_encoding::percent_decode_str;
use reqwest::header::{ETAG, HeaderMap, HeaderName, IF_MATCH, RANGE};
use reqwest::{Method, StatusCode, Url};

use self::sign::{Keys, Signer};
use super::super::asking::ask_again;
use super::super::connect::{SourceContext, parse_http};
use super::super::http::{
    Answer, Authorization, ContentRange, Failure, HttpClient, Reply, Request, Wanted, announced_length, read_document,
    without_user_information,
};
use super::super::{
    ByteStream, Credentials, Expected, File, SOURCE_CHANGED, Source, SourceKind, SourceSpec, Stated, source_changed,
};
use super::verified::verified;
use super::xml::{Document, Fields};
use super::{
    Bucket, Locator, Object, ObjectSource, PAGE_BYTES, Page, Pin, changed_by, decoded, encoded_key, header, shown_key,
    url_below,
};
use crate::error::{Error, Result};
use crate::limits;

/// Heads of large files asked for at a time: one costs a round trip, and a store takes hundreds.
const HEADS_AT_A_TIME: usize = 16;

/// The region of requests to whoever has none.
const REGION: &str = "us-east-1";

/// Begins the pin of an object without an `ETag`: it tells revisions apart, and no answer is compared with it.
const MODIFIED: &str = "modified:";

const CHECKSUM_MODE: HeaderName = HeaderName::from_static("x-amz-checksum-mode");
const BUCKET_REGION: &str = "x-amz-bucket-region";

/// The objects that `spec` means.
///
/// # Errors
/// Invalid for a bucket, endpoint, region or credentials that cannot be.
pub(in super::super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let rest = spec.uri.split_once("://").map_or("", |(_, rest)| rest);
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    if !is_bucket(bucket) {
        let message = format!("`{}` is not the name of a bucket", shown_key(bucket));
        return Err(Error::invalid("BAD_URI", message).remedy("write s3://bucket/path"));
    }
    let endpoint = endpoint_of(spec)?;
    let given = spec.option("region").map(str::to_owned);
    let from_host = || endpoint.as_ref().and_then(region_of_host);
    let region = given.clone().or_else(from_host).or_else(environment_region).unwrap_or_else(|| REGION.to_owned());
    if !is_region(&region) {
        let message = format!("`{}` is not a region", shown_key(&region));
        return Err(Error::invalid("BAD_REGION", message).remedy("give the option `region` as in eu-west-1"));
    }
    let region = Arc::new(RwLock::new(region));
    let keys = if spec.option("anonymous") == Some("true") { None } else { keys_of(credentials, endpoint.as_ref())? };
    let authorization = keys.map(|keys| Authorization::Signed(Arc::new(Signer { keys, region: Arc::clone(&region) })));
    // AWS and Wasabi say in their manuals what an ETag is.
    let known = endpoint.is_none() || spec.kind == SourceKind::Wasabi;
    let bucket = S3 {
        http: context.http.clone(),
        endpoint,
        bucket: bucket.to_owned(),
        region,
        region_given: given.is_some(),
        authorization,
        etags_are_md5: AtomicBool::new(known),
    };
    Ok(Arc::new(ObjectSource { bucket, path: path.to_owned() }))
}

fn endpoint_of(spec: &SourceSpec) -> Result<Option<Url>> {
    let Some(text) = spec.option("endpoint") else {
        if spec.kind == SourceKind::Wasabi {
            return Err(Error::invalid("ENDPOINT_REQUIRED", "a source of type `wasabi` has no endpoint")
                .remedy("give the option `endpoint`, as in https://s3.us-east-1.wasabisys.com"));
        }
        return Ok(None);
    };
    parse_endpoint(text).map(Some)
}

/// The endpoint that `text` names, by https if it does not say.
fn parse_endpoint(text: &str) -> Result<Url> {
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let mut url = without_user_information(parse_http(&with_scheme, "the option `endpoint`")?);
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

/// The credentials of the request, else those of the environment that are for `endpoint`, else none.
fn keys_of(credentials: &Credentials, endpoint: Option<&Url>) -> Result<Option<Keys>> {
    let given = |names: [&str; 2]| names.into_iter().find_map(|name| credentials.get(name)).map(str::to_owned);
    let (id, secret, token) =
        (given(["key_id", "access_key_id"]), given(["secret", "secret_access_key"]), given(["token", "session_token"]));
    match (id, secret) {
        (Some(id), Some(secret)) => return Ok(Some(Keys { id, secret, token })),
        (None, None) if token.is_none() => {}
        _ => {
            return Err(Error::invalid("BAD_CREDENTIALS", "the credentials for S3 are not whole")
                .remedy("give key_id and secret, and token besides if they are temporary"));
        }
    }
    Ok(environment::keys(endpoint, |name| std::env::var(name).ok().filter(|value| !value.is_empty())))
}

fn environment_region() -> Option<String> {
    ["AWS_REGION", "AWS_DEFAULT_REGION"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|it| is_region(it)))
}

/// `s3.<region>.wasabisys.com` and the like say their region.
fn region_of_host(endpoint: &Url) -> Option<String> {
    let region = endpoint.host_str()?.strip_prefix("s3.")?.split_once('.')?.0;
    (region.contains('-') && is_region(region)).then(|| region.to_owned())
}

fn is_bucket(name: &str) -> bool {
    (3..=255).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
        && name.bytes().any(|byte| byte != b'.')
}

fn is_region(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// A bucket of S3.
struct S3 {
    http: HttpClient,
    /// `None` for AWS itself.
    endpoint: Option<Url>,
    bucket: String,
    region: Arc<RwLock<String>>,
    region_given: bool,
    authorization: Option<Authorization>,
    etags_are_md5: AtomicBool,
}

impl S3 {
    /// The address of `key`, or of the bucket.
    fn url(&self, region: &str, key: Option<&str>, query: &[(&str, &str)]) -> Result<Url> {
        let bucket = &self.bucket;
        let base = match &self.endpoint {
            Some(endpoint) => format!("{}/{bucket}", endpoint.as_str().trim_end_matches('/')),
            None => {
                let domain = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
                let own_host = bucket.len() <= 63
                    && bucket.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
                    && !bucket.starts_with('-')
                    && !bucket.ends_with('-');
                if own_host {
                    format!("https://{bucket}.s3.{region}.{domain}")
                } else {
                    format!("https://s3.{region}.{domain}/{bucket}")
                }
            }
        };
        url_below(&base, &key.map(|key| format!("/{}", encoded_key(key))).unwrap_or_default(), query)
    }

    /// Sends one request; once more if the answer says that the bucket's region is another.
    async fn ask(
        &self,
        method: Method,
        key: Option<&str>,
        query: &[(&str, &str)],
        headers: &[(HeaderName, String)],
    ) -> Result<Reply, Failure> {
        let mut moved = false;
        loop {
            let region = self.region.read().unwrap_or_else(PoisonError::into_inner).clone();
            let url = self.url(&region, key, query)?;
            let request = match method {
                Method::HEAD => Request::head(&url, self.authorization.as_ref()),
                _ => Request::get(&url, self.authorization.as_ref()),
            };
            match self.http.send(&request.headers(headers).without_redirects()).await {
                Err(Failure::Refused(answer)) if !moved && self.learn_region(&answer, &region) => moved = true,
                other => return other,
            }
        }
    }

    /// Takes the region that a refusal names, if none was asked for; whether it is another than the one that was `used`.
    fn learn_region(&self, answer: &Answer, used: &str) -> bool {
        if self.region_given || !matches!(answer.status.as_u16(), 301 | 307 | 400 | 403) {
            return false;
        }
        let named = answer.header(BUCKET_REGION).map(str::to_owned);
        let Some(named) = named.or_else(|| refusal::code_and_region(answer).1).filter(|name| is_region(name)) else {
            return false;
        };
        let news = named != used;
        *self.region.write().unwrap_or_else(PoisonError::into_inner) = named;
        news
    }

    async fn head(&self, key: &str) -> Result<Option<Head>> {
        let headers = [(CHECKSUM_MODE, "ENABLED".to_owned())];
        match self.ask(Method::HEAD, Some(key), &[], &headers).await {
            Ok(reply) => Ok(Some(Head::of(reply.response.headers(), announced_length(reply.response.headers())))),
            Err(failure) if failure.status() == Some(StatusCode::NOT_FOUND) => Ok(None),
            // A refusal of this moment says nothing of the object; an empty one has no first byte to ask for.
            Err(Failure::Refused(answer)) if !is_of_a_moment(answer.status) => self.first_byte(key).await,
            Err(failure) => Err(explain(failure)),
        }
    }

    /// The same by a GET, whose refusal says why it is one.
    async fn first_byte(&self, key: &str) -> Result<Option<Head>> {
        match self.ask(Method::GET, Some(key), &[], &[(RANGE, "bytes=0-0".to_owned())]).await {
            Ok(reply) => {
                let headers = reply.response.headers();
                let size = ContentRange::of(headers).map_or_else(|| announced_length(headers), |range| range.total);
                Ok(Some(Head::of(headers, size)))
            }
            Err(failure) if failure.status() == Some(StatusCode::NOT_FOUND) => Ok(None),
            Err(failure) => Err(explain(failure)),
        }
    }

    /// Pins `file`, and takes its digests from its head.
    async fn complete_one(&self, file: &mut File) -> Result<()> {
        let object = Locator::parse(&file.locator)?;
        let what = self.shown_object(object.key);
        let gone = || source_changed(&what, "it is gone");
        let head = ask_again(|| self.head(object.key)).await?.ok_or_else(gone)?;
        if Some(head.size) != file.size || !same_etag(&head.pin.etag, &object.pin.etag) {
            return Err(source_changed(&what, "it was replaced"));
        }
        let pin = Pin { version: head.pin.version.clone(), etag: object.pin.etag.clone() };
        file.locator = Locator::to_text(&pin, object.key).into();
        file.expected = head.expected(self.etags_are_md5.load(Ordering::Relaxed));
        Ok(())
    }

    /// Whether the ETag of `file`, a small one, is the MD5 of its bytes.
    async fn learn_etags(&self, file: &File) -> Result<()> {
        let object = Locator::parse(&file.locator)?;
        if md5_of_etag(&object.pin.etag).is_none() {
            return Ok(());
        }
        let reply = self.ask(Method::GET, Some(object.key), &[], &[]).await.map_err(explain)?;
        let stated = Head::of(reply.response.headers(), None).expected(true).stated().md5;
        let limit = usize::try_from(limits::UNIT_BYTES).unwrap_or(usize::MAX);
        let bytes = read_document(reply, limit, &self.http).await?;
        let found: [u8; 16] = <md5::Md5 as md5::Digest>::digest(&bytes).into();
        self.etags_are_md5.store(stated == Some(found), Ordering::Relaxed);
        Ok(())
    }

    fn shown_object(&self, key: &str) -> String {
        format!("{}/{}", self.shown(), shown_key(key))
    }

    fn object(&self, fields: &Fields, encoded: bool) -> Result<Object> {
        let bad = |why: &str| Error::corrupt("BAD_LISTING", format!("listing {}: {why}", self.shown()));
        let key = fields.get("Key").filter(|key| !key.is_empty()).ok_or_else(|| bad("an object has no key"))?;
        let key = if encoded { key_of_listing(key).ok_or_else(|| bad("a key is not text"))? } else { key.clone() };
        let size = fields.get("Size").and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| bad(&format!("`{}` has no size", shown_key(&key))))?;
        let date = || fields.get("LastModified").map(|date| format!("{MODIFIED}{date}"));
        let etag = fields.get("ETag").cloned().or_else(date).unwrap_or_default();
        Ok(Object { key, size, pin: Pin { version: String::new(), etag }, expected: Expected::default() })
    }
}

#[async_trait]
impl Bucket for S3 {
    fn shown(&self) -> String {
        format!("s3://{}", self.bucket)
    }

    async fn find(&self, key: &str) -> Result<Option<Object>> {
        let Some(head) = self.head(key).await? else { return Ok(None) };
        // What is pinned and verified is found out by `complete`, as for any file.
        let pin = Pin { version: String::new(), etag: head.pin.etag };
        Ok(Some(Object { key: key.to_owned(), size: head.size, pin, expected: Expected::default() }))
    }

    async fn page(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        let mut query = vec![("encoding-type", "url"), ("list-type", "2"), ("max-keys", "1000"), ("prefix", prefix)];
        query.extend(after.map(|token| ("continuation-token", token)));
        let reply = self.ask(Method::GET, None, &query, &[]).await.map_err(explain)?;
        let document = read_document(reply, PAGE_BYTES, &self.http).await?;
        let document = Document::read(&document, "Contents").ok_or_else(|| {
            Error::unavailable("BAD_ANSWER", format!("listing {}: the answer is no listing", self.shown()))
        })?;
        let encoded = document.fields.get("EncodingType").is_some_and(|kind| kind == "url");
        let objects = document.records.iter().map(|fields| self.object(fields, encoded)).collect::<Result<_>>()?;
        let truncated = document.fields.get("IsTruncated").is_some_and(|text| text == "true");
        let next = document.fields.get("NextContinuationToken").filter(|_| truncated).cloned();
        if truncated && next.is_none() {
            let message = format!("listing {}: there is more, but not where", self.shown());
            return Err(Error::corrupt("BAD_LISTING", message));
        }
        Ok(Page { objects, next })
    }

    async fn complete(&self, files: Vec<&mut File>) -> Result<()> {
        if !self.etags_are_md5.load(Ordering::Relaxed) {
            let small =
                files.iter().filter(|file| file.size.is_some_and(|size| (1..=limits::UNIT_BYTES).contains(&size)));
            if let Some(file) = small.min_by_key(|file| file.size) {
                self.learn_etags(file).await?;
            }
        }
        let mut heads = Vec::new();
        for file in files {
            if file.size > Some(limits::UNIT_BYTES) {
                heads.push(self.complete_one(file));
            }
        }
        futures_util::stream::iter(heads).buffer_unordered(HEADS_AT_A_TIME).try_collect::<()>().await
    }

    async fn answers_ranges(&self, object: &Locator<'_>) -> Result<bool> {
        let headers = [(RANGE, "bytes=0-0".to_owned())];
        let reply = self.ask(Method::GET, Some(object.key), &[], &headers).await.map_err(explain)?;
        Ok(reply.response.status() == StatusCode::PARTIAL_CONTENT)
    }

    async fn read(&self, object: &Locator<'_>, wanted: &Wanted) -> Result<ByteStream> {
        match self.read_pinned(object, wanted).await {
            Err(error) if error.reason() == SOURCE_CHANGED && object.pin.version.is_empty() => {
                let Some(version) = self.version_of(object).await? else { return Err(error) };
                let pin = Pin { version, etag: object.pin.etag.clone() };
                self.read_pinned(&Locator { pin, key: object.key }, wanted).await
            }
            other => other,
        }
    }
}

impl S3 {
    /// Reads the object as it was listed, of its version if the pin names one.
    async fn read_pinned(&self, object: &Locator<'_>, wanted: &Wanted) -> Result<ByteStream> {
        let what = self.shown_object(object.key);
        let small = wanted.size.is_some_and(|size| size <= limits::UNIT_BYTES);
        let mut headers: Vec<(HeaderName, String)> = Vec::new();
        headers.extend(wanted.header().map(|range| (RANGE, range)));
        if object.pin.etag.starts_with('"') {
            headers.push((IF_MATCH, object.pin.etag.clone()));
        }
        if wanted.header().is_none() && small {
            headers.push((CHECKSUM_MODE, "ENABLED".to_owned()));
        }
        let version = Some(object.pin.version.as_str()).filter(|version| !version.is_empty());
        let query: Vec<_> = version.map(|version| ("versionId", version)).into_iter().collect();
        let reply = self.ask(Method::GET, Some(object.key), &query, &headers).await;
        let reply = reply.map_err(|failure| changed_by(&failure, &what).unwrap_or_else(|| explain(failure)))?;
        let head = Head::of(reply.response.headers(), None);
        let other_version = !head.pin.version.is_empty() && version.is_some_and(|version| version != head.pin.version);
        if other_version || !same_etag(&head.pin.etag, &object.pin.etag) {
            return Err(source_changed(&what, "it was replaced"));
        }
        let expected = head.expected(self.etags_are_md5.load(Ordering::Relaxed));
        let bytes = wanted.accept(reply, &self.http)?;
        Ok(if wanted.header().is_none() && small { verified(bytes, &expected, what) } else { bytes })
    }
}

/// What the head of an answer says of an object.
#[derive(Debug, Default)]
struct Head {
    size: u64,
    pin: Pin,
    sha256: Option<[u8; 32]>,
    crc64nvme: Option<u64>,
    crc32c: Option<u32>,
    crc32: Option<u32>,
    md5: Option<[u8; 16]>,
}

impl Head {
    /// Reads `headers`; `size` is what they say of the whole object's.
    fn of(headers: &HeaderMap, size: Option<u64>) -> Self {
        let text = |name: &str| header(headers, name);
        let own_keys = text("x-amz-server-side-encryption").is_some_and(|kind| kind != "AES256")
            || text("x-amz-server-side-encryption-customer-algorithm").is_some();
        let etag = text(ETAG.as_str()).unwrap_or_default().to_owned();
        // An object that was put in several pieces, as its ETag tells, may have a checksum of their checksums.
        let whole = match text("x-amz-checksum-type") {
            Some(kind) => kind == "FULL_OBJECT",
            None => !etag.contains('-'),
        };
        let checksum = |name: &str| text(name).filter(|_| whole);
        Self {
            size: size.unwrap_or(0),
            sha256: checksum("x-amz-checksum-sha256").and_then(decoded),
            crc64nvme: checksum("x-amz-checksum-crc64nvme").and_then(decoded).map(u64::from_be_bytes),
            crc32c: checksum("x-amz-checksum-crc32c").and_then(decoded).map(u32::from_be_bytes),
            crc32: checksum("x-amz-checksum-crc32").and_then(decoded).map(u32::from_be_bytes),
            md5: md5_of_etag(&etag).filter(|_| !own_keys),
            pin: Pin {
                version: text("x-amz-version-id").filter(|id| *id != "null").unwrap_or_default().to_owned(),
                etag,
            },
        }
    }

    /// The one digest to verify: a SHA-256, else the longest checksum, which costs a tenth of an MD5; an MD5 only where ETags are known to be that.
    fn expected(&self, etags_are_md5: bool) -> Expected {
        let none = Stated::default();
        let stated = match self {
            Self { sha256: Some(_), .. } => Stated { sha256: self.sha256, ..none },
            Self { crc64nvme: Some(_), .. } => Stated { crc64nvme: self.crc64nvme, ..none },
            Self { crc32c: Some(_), .. } => Stated { crc32c: self.crc32c, ..none },
            Self { crc32: Some(_), .. } => Stated { crc32: self.crc32, ..none },
            _ if etags_are_md5 => Stated { md5: self.md5, ..none },
            _ => none,
        };
        stated.into()
    }
}

fn is_of_a_moment(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
}

fn explain(failure: Failure) -> Error {
    match failure {
        Failure::Refused(answer) => refusal::fault(&answer),
        Failure::Failed(error) => error,
    }
}

/// Whether two ETags name the same bytes; one that is not there says nothing.
fn same_etag(one: &str, other: &str) -> bool {
    let plain = |etag: &str| etag.trim_start_matches("W/").trim_matches('"').to_owned();
    let says_nothing = |etag: &str| etag.is_empty() || etag.starts_with(MODIFIED);
    says_nothing(one) || says_nothing(other) || plain(one) == plain(other)
}

/// The MD5 that an `ETag` may be: those of objects put in pieces have a `-`.
fn md5_of_etag(etag: &str) -> Option<[u8; 16]> {
    let hex = etag.trim_matches('"');
    if hex.len() != 32 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(hex, 16).ok().map(u128::to_be_bytes)
}

/// A key as listings with `encoding-type=url` write it: percent-encoded, with `+` for a space.
fn key_of_listing(text: &str) -> Option<String> {
    let spaced = text.replace('+', " ");
    percent_decode_str(&spaced).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}
