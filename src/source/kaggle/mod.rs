//! A Kaggle competition, dataset or kernel (notebook), over the service's public interface.
//!
//! All files of one come as the bundle that the site's own button and `kagglehub` fetch: one archive, behind a redirect to a signed URL of a
//! storage service. The bundle is opened as *one file that is an archive*, so the ingest extracts it while it arrives and the
//! checkpoint is the tree that the site shows. Fetching file by file was looked at and left: single files come as `<name>.zip` or as they are,
//! which the listing does not say, and 20,000 files would be 20,000 requests to an interface that counts them. What
//! broke off goes on where it was as far as the bundle is a zip that is given in ranges; else it is extracted anew.
//! A zip *inside* the bundle is a file of the data and stays one.
//!
//! The revision is the version's number, for competitions, which have none, a digest over all pages of the file list; and the
//! bundle's own validator beside it. Reads are held to that validator (`If-Match`, and whatever the answer bears);
//! MD5 and CRC-32C of `X-Goog-Hash` are stated to the ingest. [`Target`] keeps where the redirect led and asks again
//! when the signature has expired; credentials stay with the service's origin.

mod api;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use base64::Engine as _;
use futures_util::stream;
use reqwest::header::{ETAG, HeaderMap, HeaderName, IF_MATCH, RANGE};
use reqwest::{StatusCode, Url};

use self::api::{Item, Kaggle};
use super::connect::{SourceContext, parse_http};
use super::http::{
    Authorization, ContentRange, Failure, Reply, Target, Wanted, announced_length, read_document,
    without_user_information,
};
use super::{
    ByteStream, Counter, Credentials, Expected, File, Listed, Listing, Opened, Source, SourceSpec, Stated, What,
    source_changed,
};
use crate::error::{Error, Result};
use crate::names::{EntryName, EntryPath};

/// The service that is meant where no endpoint is given.
const ENDPOINT: &str = "https://www.kaggle.com";

/// Bytes from which an archive's format is seen: tar has its mark at 257.
const MAGIC_BYTES: usize = 512;

/// What `spec` means at the service.
///
/// # Errors
/// Invalid for a short name, type or token that cannot be.
pub(super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let item = Item::parse(&spec.uri, spec.option("type"))?;
    let endpoint = parse_http(spec.option("endpoint").unwrap_or(ENDPOINT), "the option `endpoint`")?;
    let authorization = match (credentials.get("token"), credentials.get("username"), credentials.get("key")) {
        (Some(token), ..) => Some(Authorization::bearer(token)?),
        (None, Some(username), Some(key)) => Some(Authorization::Basic(username.to_owned(), key.to_owned())),
        (None, None, None) => None,
        (None, ..) => {
            return Err(Error::invalid("BAD_CREDENTIALS", "Kaggle's `username` and `key` go together")
                .remedy("give both, or a `token`"));
        }
    };
    let endpoint = without_user_information(endpoint);
    let service = Kaggle { http: context.http.clone(), endpoint, authorization, item };
    Ok(Arc::new(KaggleSource { service, bundle: Mutex::default() }))
}

/// One competition, dataset or kernel.
#[derive(Debug)]
struct KaggleSource {
    service: Kaggle,
    bundle: Mutex<Option<Arc<Bundle>>>,
}

/// The archive that opening found.
#[derive(Debug)]
struct Bundle {
    target: Target,
    etag: Option<String>,
}

/// What the first bytes of the bundle told.
struct Probe {
    size: Option<u64>,
    ranges: bool,
    headers: HeaderMap,
    extension: &'static str,
}

impl KaggleSource {
    async fn probe(&self, target: &Target) -> Result<Probe> {
        let first = [(RANGE, format!("bytes=0-{}", MAGIC_BYTES - 1))];
        let reply = target.get(&self.service.http, &first).await.map_err(|failure| self.service.explain(failure))?;
        let headers = reply.response.headers().clone();
        let by_name = extension_of_name(&reply.url);
        if reply.response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(Probe { size: announced_length(&headers), ranges: false, headers, extension: by_name });
        }
        let given = ContentRange::of(&headers);
        let ranges = given.as_ref().is_some_and(|given| given.range.as_ref().is_some_and(|range| range.start == 0));
        let magic = self.read_magic(reply).await?;
        let extension = extension_of_magic(&magic).unwrap_or(by_name);
        Ok(Probe { size: given.and_then(|given| given.total), ranges, headers, extension })
    }

    async fn read_magic(&self, reply: Reply) -> Result<Vec<u8>> {
        read_document(reply, MAGIC_BYTES, &self.service.http).await
    }

    fn bundle(&self) -> Result<Arc<Bundle>> {
        let bundle = self.bundle.lock().unwrap_or_else(PoisonError::into_inner);
        bundle.clone().ok_or_else(|| Error::internal(format!("{} was read before it was opened", self.service.item)))
    }

    fn explain(&self, failure: Failure) -> Error {
        match failure.status().map(|status| status.as_u16()) {
            Some(412 | 416) => source_changed(&self.service.item.to_string(), "its bundle changed"),
            _ => self.service.explain(failure),
        }
    }
}

#[async_trait]
impl Source for KaggleSource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let pinned = self.service.pin(counter).await?;
        let target = Target::new(pinned.bundle, self.service.authorization.clone());
        let probe = self.probe(&target).await?;
        let etag = text_of(&probe.headers, ETAG).filter(|etag| etag.starts_with('"'));
        let expected = stated(&probe.headers);
        let validator = match (&etag, probe.size) {
            (Some(etag), _) => format!(";etag:{etag}"),
            (None, Some(size)) => format!(";size:{size}"),
            (None, None) => String::new(),
        };
        let file = File {
            locator: target.url().as_str().into(),
            size: probe.size,
            executable: false,
            ranges: probe.ranges,
            expected,
        };
        let name = EntryName::new(format!("{}.{}", self.service.item.slug(), probe.extension).into_bytes())?;
        let entry = Listed { path: EntryPath::root().join(&name)?, what: What::File(file) };
        *self.bundle.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(Bundle { target, etag }));
        let revision = format!("{}{validator}", pinned.revision);
        Ok(Opened::Listed(Listing { one_file: true, ..Listing::new(revision, vec![entry]) }))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let bundle = self.bundle()?;
        let what = self.service.item.to_string();
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check(&what)?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let mut headers: Vec<(HeaderName, String)> = Vec::new();
        headers.extend(wanted.header().map(|range| (RANGE, range)));
        headers.extend(bundle.etag.iter().map(|etag| (IF_MATCH, etag.clone())));
        let reply = bundle.target.get(&self.service.http, &headers).await.map_err(|failure| self.explain(failure))?;
        let now = text_of(reply.response.headers(), ETAG);
        if let (Some(then), Some(now)) = (&bundle.etag, now)
            && *then != now
        {
            return Err(source_changed(&what, "its bundle changed"));
        }
        wanted.accept(reply, &self.service.http)
    }
}

fn text_of(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(|text| text.trim().to_owned())
}

/// Digests of the whole object by Google's storage: `X-Goog-Hash: crc32c=<base64>,md5=<base64>`, in one header or several.
fn stated(headers: &HeaderMap) -> Expected {
    let mut stated = Stated::default();
    let values = headers.get_all("x-goog-hash").iter().filter_map(|value| value.to_str().ok());
    for (name, text) in values.flat_map(|value| value.split(',')).filter_map(|pair| pair.trim().split_once('=')) {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default();
        match name {
            "md5" => stated.md5 = bytes.try_into().ok(),
            "crc32c" => stated.crc32c = bytes.try_into().ok().map(u32::from_be_bytes),
            _ => {}
        }
    }
    stated.into()
}

fn extension_of_magic(magic: &[u8]) -> Option<&'static str> {
    match magic {
        [b'P', b'K', 3 | 5, 4 | 6, ..] => Some("zip"),
        [0x1f, 0x8b, ..] => Some("tar.gz"),
        _ if magic.get(257..262) == Some(b"ustar") => Some("tar"),
        _ => None,
    }
}

fn extension_of_name(url: &Url) -> &'static str {
    let known = ["tar.gz", "tgz", "tar"].into_iter().find(|known| url.path().ends_with(&format!(".{known}")));
    known.unwrap_or("zip")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn digests_of_the_storage_are_read_or_left() {
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("x-goog-hash", value.parse().unwrap());
            }
            stated(&headers)
        };
        let both = Stated { md5: Some([0; 16]), crc32c: Some(0x0102_0304), ..Stated::default() }.into();
        assert_eq!(of(&["crc32c=AQIDBA==,md5=AAAAAAAAAAAAAAAAAAAAAA=="]), both);
        assert_eq!(of(&["crc32c=AQIDBA==", "md5=AAAAAAAAAAAAAAAAAAAAAA=="]), both);
        assert!(of(&["md5=short", "sha1=AAAA", "crc32c"]).is_empty());
    }

    #[test]
    fn the_bundles_format_is_seen_in_its_first_bytes() {
        assert_eq!(extension_of_magic(b"PK\x03\x04"), Some("zip"));
        assert_eq!(extension_of_magic(b"PK\x05\x06"), Some("zip"));
        assert_eq!(extension_of_magic(&[0x1f, 0x8b, 8]), Some("tar.gz"));
        assert_eq!(extension_of_magic(&[[0; 257].as_slice(), b"ustar\0"].concat()), Some("tar"));
        assert_eq!(extension_of_magic(b"<html>"), None);
    }

    #[test]
    fn half_of_a_pair_is_no_credential() {
        let context = SourceContext::new(&Default::default(), Default::default()).unwrap();
        let options = [("type".to_owned(), "dataset".to_owned())].into();
        let spec = SourceSpec { kind: super::super::SourceKind::Kaggle, uri: "a/b".to_owned(), options };
        let given = |name: &str| Credentials::new([(name.to_owned(), "secret".to_owned())].into());
        for name in ["username", "key"] {
            let error = connect(&spec, &given(name), &context).err().unwrap();
            assert_eq!((error.kind(), error.reason()), (Kind::Invalid, "BAD_CREDENTIALS"));
        }
        assert!(connect(&spec, &given("token"), &context).is_ok());
    }
}
