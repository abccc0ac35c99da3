//! Sources against a stand-in server and against directories of this host.
//!
//! `tests/fixtures/standin.py` (Python's standard library alone) is an odd web server and a hub; each test has its own.
//! The directory tests run as root and plant links: every link leads into the test's own temporary directory, and
//! nothing is ever written through one.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod directory;
mod hub;
#[path = "../support/standin.rs"]
mod standin;
mod web;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ckptd::error::{Error, Result};
use ckptd::source::egress::EgressPolicy;
use ckptd::source::{
    Counter, Credentials, File, HttpSettings, Listing, Opened, Source, SourceContext, SourceKind, SourceSpec, What,
    connect,
};
use futures_util::StreamExt;

use standin::Standin;

/// Sources at the stand-in.
trait Sources {
    fn web(&self, path: &str) -> Arc<dyn Source>;
    fn hub(&self, id: &str, branch: &str, token: Option<&str>) -> Arc<dyn Source>;
}

impl Sources for Standin {
    fn web(&self, path: &str) -> Arc<dyn Source> {
        web(&self.url(path), &[])
    }

    fn hub(&self, id: &str, branch: &str, token: Option<&str>) -> Arc<dyn Source> {
        let options = [("endpoint", self.url("")), ("branch", branch.to_owned())];
        let secrets: Vec<_> = token.iter().map(|token| ("token", *token)).collect();
        source(SourceKind::HuggingFace, id, &options, &secrets, &loopback()).unwrap()
    }
}

const TOKEN: &str = "hf_secret_token";

fn settings() -> HttpSettings {
    HttpSettings {
        connect_timeout: Duration::from_secs(60),
        inactivity_timeout: Duration::from_secs(60),
        environment_proxy: false,
    }
}

fn loopback() -> SourceContext {
    let allowed = vec!["127.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()];
    SourceContext::new(&settings(), EgressPolicy::new(allowed)).unwrap()
}

fn source(
    kind: SourceKind,
    uri: &str,
    options: &[(&str, String)],
    secrets: &[(&str, &str)],
    context: &SourceContext,
) -> Result<Arc<dyn Source>> {
    let options = options.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let secrets: BTreeMap<_, _> = secrets.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    connect(&SourceSpec { kind, uri: uri.to_owned(), options }, &Credentials::new(secrets), context)
}

fn web(url: &str, secrets: &[(&str, &str)]) -> Arc<dyn Source> {
    source(SourceKind::Web, url, &[], secrets, &loopback()).unwrap()
}

fn directory(path: &Path) -> Arc<dyn Source> {
    source(SourceKind::Directory, path.to_str().unwrap(), &[], &[], &loopback().with_host_directories()).unwrap()
}

/// Lets a listing have as many entries as it likes.
fn any_number() -> Counter {
    Arc::new(|_| Ok(()))
}

async fn list(source: &Arc<dyn Source>) -> Result<Listing> {
    match source.open(&any_number()).await? {
        Opened::Listed(listing) => Ok(listing),
        Opened::Streamed(_) => panic!("these sources list"),
    }
}

async fn fault(source: &Arc<dyn Source>) -> Error {
    let error = list(source).await.expect_err("opening should fail");
    assert!(!format!("{error:?} {} {:?}", error.report(), error.facts()).contains("secret"), "{error:?}");
    error
}

async fn read(source: &Arc<dyn Source>, file: &File, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
    let mut stream = source.read(file, range).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}

fn file_of(listing: &Listing, path: &str) -> File {
    let found = listing.entries.iter().find(|entry| entry.path.as_bytes() == path.as_bytes());
    match &found.unwrap_or_else(|| panic!("{path} is not listed")).what {
        What::File(file) => file.clone(),
        other => panic!("{path} is {other:?}"),
    }
}

fn paths(listing: &Listing) -> Vec<String> {
    let mut paths: Vec<_> = listing.entries.iter().map(|entry| entry.path.to_string()).collect();
    paths.sort();
    paths
}

/// The only file of a listing, with its name.
fn only(listing: &Listing) -> (String, File) {
    assert_eq!(listing.entries.len(), 1);
    let path = listing.entries[0].path.to_string();
    let file = file_of(listing, &path);
    (path, file)
}

/// What the stand-in serves.
fn data() -> Vec<u8> {
    (0..200_000usize).map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap()).collect()
}
