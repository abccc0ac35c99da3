//! A Hugging Face repository (model, dataset or space), over the hub's plain HTTP interface.
//!
//! [`HuggingFaceSource::open`] turns the branch, tag or commit into the commit it means now and lists that commit; nothing after it
//! names the branch again, so the revision cannot move under an ingest. Files come from `resolve/<commit>/<path>`, which
//! for large ones redirects to a signed URL of a CDN: [`Target`] keeps where it led, so a file costs the hub one
//! request however many ranges are read, and the token never leaves the hub's origin.
//!
//! Every file has a digest to be verified against: `sha256` from LFS, or git's own object id.
//!
//! Some hubs (mirrors) ignore ranges. Opening reads the first byte of the largest file, if it is longer than a fill
//! unit, and believes what it sees; that also brings a gate or a missing right to light before anything is reserved.

mod api;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures_util::stream;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::RANGE;
use reqwest::{StatusCode, Url};

use self::api::{Hub, listed};
use super::connect::{SourceContext, branch_of, parse_http};
use super::http::{Authorization, Target, Wanted, without_user_information};
use super::{ByteStream, Counter, Credentials, File, Listing, Opened, Source, SourceSpec, What};
use crate::error::{Error, Result};
use crate::limits;

/// The hub that is meant where no endpoint is given.
const ENDPOINT: &str = "https://huggingface.co";

/// Files whose redirect is remembered: many times what is fetched at once; a signed URL is about 1.5 KiB.
const TARGETS_KEPT: usize = 256;

/// What is left as it is in one path component of a URL: RFC 3986's unreserved characters.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The repository that `spec` means.
///
/// # Errors
/// Invalid for a URI, branch or token that cannot be.
pub(super) fn connect(
    spec: &SourceSpec,
    credentials: &Credentials,
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let id = RepositoryId::parse(&spec.uri)?;
    let endpoint = parse_http(spec.option("endpoint").unwrap_or(ENDPOINT), "the option `endpoint`")?;
    let revision = branch_of(spec)?.unwrap_or("main").to_owned();
    let token = credentials.get("token").map(Authorization::bearer).transpose()?;
    let endpoint = without_user_information(endpoint);
    let hub = Hub { http: context.http.clone(), endpoint, id, token };
    Ok(Arc::new(HuggingFaceSource { hub, revision, targets: Mutex::default() }))
}

/// A repository at a hub.
#[derive(Debug)]
struct HuggingFaceSource {
    hub: Hub,
    revision: String,
    targets: Mutex<Targets>,
}

/// Redirects of files read lately, the oldest forgotten first.
#[derive(Debug, Default)]
struct Targets {
    by_url: HashMap<String, Arc<Target>>,
    order: VecDeque<String>,
}

impl HuggingFaceSource {
    fn target(&self, locator: &str) -> Result<Arc<Target>> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = targets.by_url.get(locator) {
            return Ok(Arc::clone(target));
        }
        let url = Url::parse(locator).map_err(|error| Error::internal("a file has no URL").because(error))?;
        let token = self.hub.token.clone().filter(|_| url.origin() == self.hub.endpoint.origin());
        let target = Arc::new(Target::new(url, token));
        if targets.order.len() >= TARGETS_KEPT
            && let Some(oldest) = targets.order.pop_front()
        {
            targets.by_url.remove(&oldest);
        }
        targets.order.push_back(locator.to_owned());
        targets.by_url.insert(locator.to_owned(), Arc::clone(&target));
        Ok(target)
    }

    /// Whether ranges of `file` can be read.
    async fn answers_ranges(&self, file: &File) -> Result<bool> {
        let target = self.target(&file.locator)?;
        let first = [(RANGE, "bytes=0-0".to_owned())];
        let reply = target.get(&self.hub.http, &first).await.map_err(|failure| self.hub.explain(failure))?;
        Ok(reply.response.status() == StatusCode::PARTIAL_CONTENT)
    }
}

#[async_trait]
impl Source for HuggingFaceSource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let commit = self.hub.commit(&self.revision).await?;
        let items = self.hub.tree(&commit, counter).await?;
        let mut entries = Vec::with_capacity(items.len());
        let mut skipped = Vec::new();
        for item in items {
            match item.kind.as_str() {
                "file" | "directory" => entries.push(listed(item, |path| self.hub.file_url(&commit, path))?),
                other => skipped.push((item.path, format!("is a {other}"))),
            }
        }
        let files = entries.iter().filter_map(|entry| match &entry.what {
            What::File(file) => Some(file),
            _ => None,
        });
        let ranges = match files.max_by_key(|file| file.size) {
            Some(largest) if largest.size > Some(limits::UNIT_BYTES) => self.answers_ranges(largest).await?,
            _ => true,
        };
        for entry in &mut entries {
            if let What::File(file) = &mut entry.what {
                file.ranges = ranges;
            }
        }
        Ok(Opened::Listed(Listing { skipped, ..Listing::new(commit, entries) }))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let target = self.target(&file.locator)?;
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check(target.url().path())?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let headers: Vec<_> = wanted.header().map(|range| (RANGE, range)).into_iter().collect();
        let reply = target.get(&self.hub.http, &headers).await.map_err(|failure| self.hub.explain(failure))?;
        wanted.accept(reply, &self.hub.http)
    }
}

/// What kind of repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Dataset,
    Space,
}

/// `<namespace>/<repository>` or a legacy name without a namespace, with `datasets/` or `spaces/` in front of what is no model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RepositoryId {
    kind: Kind,
    path: String,
}

impl RepositoryId {
    /// Parses an id, with or without `hf:` in front.
    ///
    /// # Errors
    /// `BAD_URI` with the form that is expected.
    pub(super) fn parse(uri: &str) -> Result<Self> {
        let path = uri.strip_prefix("hf:").unwrap_or(uri);
        let (kind, id) = match path.split_once('/') {
            Some(("datasets", id)) => (Kind::Dataset, id),
            Some(("spaces", id)) => (Kind::Space, id),
            _ => (Kind::Model, path),
        };
        let words = id.split('/').count();
        if words <= 2 && (kind != Kind::Space || words == 2) && id.split('/').all(is_repository_word) {
            return Ok(Self { kind, path: path.to_owned() });
        }
        Err(Error::invalid("BAD_URI", format!("`{uri}` does not name a Hugging Face repository")).remedy(
            "write <namespace>/<repository>, as in openai/whisper-tiny, with datasets/ or spaces/ in front of those",
        ))
    }

    /// The path of its page at the hub, and of its files below that; safe in a URL.
    pub(super) fn as_str(&self) -> &str {
        &self.path
    }

    /// The path of its record below `api/`; safe in a URL.
    pub(super) fn record(&self) -> String {
        match self.kind {
            Kind::Model => format!("models/{}", self.path),
            Kind::Dataset | Kind::Space => self.path.clone(),
        }
    }
}

/// The hub's rule for either side of the `/`.
fn is_repository_word(word: &str) -> bool {
    (1..=96).contains(&word.len())
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && !word.starts_with(['.', '-'])
        && !word.ends_with(['.', '-'])
        && !word.contains("..")
        && !word.contains("--")
}

/// One path component of a URL.
fn component(text: &str) -> String {
    utf8_percent_encode(text, COMPONENT).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_hub() {
        for (good, record) in [
            ("gpt2", "models/gpt2"),
            ("openai/whisper-tiny", "models/openai/whisper-tiny"),
            ("hf:EleutherAI/gpt-j-6B", "models/EleutherAI/gpt-j-6B"),
            ("a/b.c_d-e", "models/a/b.c_d-e"),
            ("datasets/squad", "datasets/squad"),
            ("hf:datasets/a/b", "datasets/a/b"),
            ("spaces/a/b", "spaces/a/b"),
        ] {
            assert_eq!(RepositoryId::parse(good).unwrap().record(), record, "{good}");
        }
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a/b/c",
            "datasets/",
            "datasets/a/b/c",
            "spaces/a",
            "models/a/b",
            "../a",
            "a/..",
            "a b/c",
            "https://huggingface.co/a/b",
            "a/b?x",
            "a/-b",
            "hf:",
            "a--b/c",
        ] {
            assert_eq!(RepositoryId::parse(bad).unwrap_err().reason(), "BAD_URI", "{bad}");
        }
    }

    #[test]
    fn components_are_encoded_whole() {
        assert_eq!(component("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(component("ä b+c%20d#e?\n"), "%C3%A4%20b%2Bc%2520d%23e%3F%0A");
        assert_eq!(component("model-00001-of-2.safetensors"), "model-00001-of-2.safetensors");
    }
}
