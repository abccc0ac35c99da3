//! Object stores: what S3, Azure Blob Storage and Google Cloud Storage have in common.
//!
//! An address is a bucket and a path. A path that is empty or ends in `/` is everything beneath it; any other is the object of
//! exactly that key if there is one, else everything beneath `<path>/`. The prefix is trimmed from the entries ([`keys`]).
//!
//! Keys are bytes to these stores, not paths, so requests are made here, over the client of all sources, and not by a
//! library whose paths cannot hold `a//b`. Signing is here too: the crate that would do it (`object_store`) keeps its Google accounts
//! private, panics on tokens that no header can hold, and brings nine crates; the formulas are short and published with
//! examples, and *ring*, which does the mathematics, is in the daemon for TLS anyway.
//!
//! **Pinned.** What was listed is what is read: the locator of a file carries the version or `ETag` of its object ([`Pin`]), every read
//! sends it as a condition and compares what the answer states, for servers that ignore conditions. Anything else is `SOURCE_CHANGED`.
//! The revision is a digest over key, size and pin of every object, so it is met again only if nothing changed.
//!
//! **Ranges.** The first byte of the largest file is asked for, if it is longer than a fill unit; a store that answers otherwise than with 206 is
//! read in whole files.
//!
//! **Bounded.** A page of a listing is read up to [`PAGE_BYTES`], a listing as far as its counter lets it. A page that fails in
//! passing is asked for again here, so that page 2,000 does not cost the 1,999 before it.
//!
//! Nothing is kept: after a crash everything is listed anew.

pub(super) mod azure;
pub(super) mod gcs;
mod keys;
pub(super) mod s3;
mod verified;
mod xml;

use std::ops::Range;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Url;
use reqwest::header::HeaderMap;

use super::asking::ask_again;
use super::http::{Failure, Wanted};
use super::{ByteStream, Counter, Expected, File, Listing, Opened, Source, What, source_changed};
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::limits;

/// One page of a listing: 1,000 keys of 1,024 bytes, each byte written as three, with their other fields; and as much again.
const PAGE_BYTES: usize = 16 << 20;

/// Pages of one listing: a store may give fewer entries a page than asked for, but not so few for ever.
const PAGES: usize = limits::CHECKPOINT_ENTRIES / 50;

/// Left as they are in keys and queries: RFC 3986's unreserved characters, as every signature wants it.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// One bucket or container, by its own protocol.
#[async_trait]
trait Bucket: Send + Sync {
    /// The bucket for people: `s3://name`.
    fn shown(&self) -> String;

    /// The object of exactly this key.
    async fn find(&self, key: &str) -> Result<Option<Object>>;

    /// One page of everything whose key begins with `prefix`, in any order.
    async fn page(&self, prefix: &str, after: Option<&str>) -> Result<Page>;

    /// Adds to the files what a listing does not tell: stronger pins, digests.
    async fn complete(&self, _files: Vec<&mut File>) -> Result<()> {
        Ok(())
    }

    /// Whether a range of the object is answered with that range.
    async fn answers_ranges(&self, object: &Locator<'_>) -> Result<bool>;

    /// What is wanted of the object, held to its pin.
    async fn read(&self, object: &Locator<'_>, wanted: &Wanted) -> Result<ByteStream>;
}

/// One object of a listing.
#[derive(Clone, Debug)]
struct Object {
    key: String,
    size: u64,
    pin: Pin,
    expected: Expected,
}

/// One page of a listing, and where the next begins.
#[derive(Debug, Default)]
struct Page {
    objects: Vec<Object>,
    next: Option<String>,
}

/// What an object is held to; either may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Pin {
    /// Names the bytes for ever: version id, generation.
    version: String,
    /// Names them as long as they are there: `ETag`, as it goes into `If-Match`.
    etag: String,
}

/// What [`File::locator`] holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Locator<'a> {
    pin: Pin,
    key: &'a str,
}

impl<'a> Locator<'a> {
    fn to_text(pin: &Pin, key: &str) -> String {
        format!("{}\n{}\n{key}", pin.version, pin.etag)
    }

    fn parse(text: &'a str) -> Result<Self> {
        let mut fields = text.splitn(3, '\n');
        match (fields.next(), fields.next(), fields.next()) {
            (Some(version), Some(etag), Some(key)) => {
                Ok(Self { pin: Pin { version: version.to_owned(), etag: etag.to_owned() }, key })
            }
            _ => Err(Error::internal("an object has no locator")),
        }
    }
}

/// What lies at a path of a bucket.
struct ObjectSource<B> {
    bucket: B,
    path: String,
}

#[async_trait]
impl<B: Bucket> Source for ObjectSource<B> {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let whole = self.path.is_empty() || self.path.ends_with('/');
        let found = if whole { None } else { ask_again(|| self.bucket.find(&self.path)).await? };
        let one_file = found.is_some();
        let (prefix, objects) = match found {
            Some(object) => (self.path.rsplit_once('/').map_or("", |(folder, _)| folder), vec![object]),
            None => (self.path.trim_end_matches('/'), self.list(counter).await?),
        };
        if objects.is_empty() {
            let message = format!("listing {}/{}: nothing is there", self.bucket.shown(), self.path);
            return Err(Error::not_found("NO_SUCH_OBJECT", message).remedy("check the bucket, the path and its case"));
        }
        let revision = revision_of(&objects);
        let skip = if prefix.is_empty() { 0 } else { prefix.len() + 1 };
        let mut entries = keys::entries(objects, skip)
            .map_err(|error| error.during(format!("listing {}/{}", self.bucket.shown(), self.path)))?;
        let files = entries.iter_mut().filter_map(|entry| match &mut entry.what {
            What::File(file) => Some(file),
            _ => None,
        });
        let mut files: Vec<_> = files.collect();
        if !self.answers_ranges(&files).await? {
            files.iter_mut().for_each(|file| file.ranges = false);
        }
        self.bucket.complete(files).await?;
        Ok(Opened::Listed(Listing { one_file, ..Listing::new(revision, entries) }))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let object = Locator::parse(&file.locator)?;
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check(&format!("{}/{}", self.bucket.shown(), object.key))?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        self.bucket.read(&object, &wanted).await
    }
}

impl<B: Bucket> ObjectSource<B> {
    /// Whether ranges can be read: tried with the first byte of the largest file, if it is longer than a fill unit.
    async fn answers_ranges(&self, files: &[&mut File]) -> Result<bool> {
        match files.iter().max_by_key(|file| file.size) {
            Some(largest) if largest.size > Some(limits::UNIT_BYTES) => {
                let object = Locator::parse(&largest.locator)?;
                ask_again(|| self.bucket.answers_ranges(&object)).await
            }
            _ => Ok(true),
        }
    }

    /// Everything beneath the path.
    async fn list(&self, counter: &Counter) -> Result<Vec<Object>> {
        let prefix = match self.path.as_str() {
            path if path.is_empty() || path.ends_with('/') => path.to_owned(),
            path => format!("{path}/"),
        };
        let mut objects = Vec::new();
        let mut after: Option<String> = None;
        for _ in 0..PAGES {
            let page = ask_again(|| self.bucket.page(&prefix, after.as_deref())).await?;
            objects.extend(page.objects.into_iter().filter(|object| object.key.starts_with(&prefix)));
            counter(objects.len())
                .map_err(|error| error.during(format!("listing {}/{prefix}", self.bucket.shown())))?;
            match page.next {
                None => return Ok(objects),
                Some(next) if after.as_ref() == Some(&next) => break,
                next => after = next,
            }
        }
        let message = format!("listing {}/{prefix}: the listing does not end", self.bucket.shown());
        Err(Error::corrupt("BAD_LISTING", message))
    }
}

/// A digest over what was listed, whatever the order.
fn revision_of(objects: &[Object]) -> String {
    let mut sorted: Vec<&Object> = objects.iter().collect();
    sorted.sort_unstable_by(|one, other| one.key.cmp(&other.key));
    let mut digester = Digester::new();
    for object in sorted {
        for part in [object.key.as_str(), &object.pin.version, &object.pin.etag] {
            digester.update(&(part.len() as u64).to_le_bytes());
            digester.update(part.as_bytes());
        }
        digester.update(&object.size.to_le_bytes());
    }
    format!("objects:{}", digester.finish())
}

/// A key in a URL. URLs have no place for components `.` and `..`, so a key with one is written as one component.
fn encoded_key(key: &str) -> String {
    if key.split('/').any(|part| matches!(part, "." | "..")) {
        return encoded(key);
    }
    key.split('/').map(encoded).collect::<Vec<_>>().join("/")
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, UNRESERVED).to_string()
}

/// `base` with the path `below` behind its own and this query.
fn url_below(base: &str, below: &str, query: &[(&str, &str)]) -> Result<Url> {
    let text = format!("{}{below}", base.trim_end_matches('/'));
    let mut url = Url::parse(&text).map_err(|error| Error::internal("building a URL of a bucket").because(error))?;
    if !query.is_empty() {
        let pairs: Vec<_> = query.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect();
        url.set_query(Some(&pairs.join("&")));
    }
    Ok(url)
}

/// What a refused read of an object that was listed means: it is not that object any more.
fn changed_by(failure: &Failure, what: &str) -> Option<Error> {
    match failure.status()?.as_u16() {
        404 => Some(source_changed(what, "it is gone")),
        412 => Some(source_changed(what, "it was replaced")),
        416 => Some(source_changed(what, "it became shorter")),
        _ => None,
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// Bytes of a fixed length in base64.
fn decoded<const BYTES: usize>(coded: &str) -> Option<[u8; BYTES]> {
    BASE64_STANDARD.decode(coded).ok()?.try_into().ok()
}

/// A key for people: what would break a line is escaped.
fn shown_key(key: &str) -> String {
    crate::names::show_bytes(key.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: &str, size: u64, etag: &str) -> Object {
        let pin = Pin { version: String::new(), etag: etag.to_owned() };
        Object { key: key.to_owned(), size, pin, expected: Expected::default() }
    }

    #[test]
    fn a_locator_holds_any_key() {
        let pin = Pin { version: "v".into(), etag: "\"e\"".into() };
        for key in ["a", "a\nb\n", "", "\n"] {
            let text = Locator::to_text(&pin, key);
            assert_eq!(Locator::parse(&text).unwrap(), Locator { pin: pin.clone(), key });
        }
        assert!(Locator::parse("x").is_err());
    }

    #[test]
    fn the_revision_follows_what_is_there_and_not_its_order() {
        let one = [object("a", 1, "x"), object("b", 2, "y")];
        let turned = [one[1].clone(), one[0].clone()];
        assert_eq!(revision_of(&one), revision_of(&turned));
        for other in [object("a", 1, "z"), object("a", 3, "x"), object("c", 1, "x")] {
            assert_ne!(revision_of(&one), revision_of(&[other, one[1].clone()]));
        }
        assert_ne!(revision_of(&one), revision_of(&one[..1]));
    }
}
