//! Sources against a stand-in server and against directories of this host.
//!
//! `tests/fixtures/standin.py` (Python's standard library alone) is an odd web server and a hub; each test has its own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ckptd::error::{Error, Kind, Result};
use ckptd::source::egress::EgressPolicy;
use ckptd::source::{
    Credentials, File, HttpSettings, Listing, Opened, Source, SourceContext, SourceKind, SourceSpec, What, connect,
};
use futures_util::StreamExt;

/// The running stand-in; ends with the test, also with one that fails.
struct Standin {
    child: Child,
    port: u16,
}

impl Standin {
    fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/standin.py");
        let mut child =
            Command::new("python3").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { port: line.trim().parse().unwrap(), child }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What was asked so far, one line each.
    fn requests(&self) -> Vec<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(b"GET /-/requests HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.lines().map(str::to_owned).collect()
    }

    fn asked(&self, start: &str) -> usize {
        self.requests().iter().filter(|line| line.starts_with(start)).count()
    }

    fn web(&self, path: &str) -> Arc<dyn Source> {
        web(&self.url(path), &[])
    }

    fn hub(&self, id: &str, branch: &str, token: Option<&str>) -> Arc<dyn Source> {
        let options = [("endpoint", self.url("")), ("branch", branch.to_owned())];
        let secrets: Vec<_> = token.iter().map(|token| ("token", *token)).collect();
        source(SourceKind::HuggingFace, id, &options, &secrets, &loopback()).unwrap()
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const TOKEN: &str = "hf_secret_token";

fn settings() -> HttpSettings {
    HttpSettings {
        connect_timeout: Duration::from_secs(5),
        inactivity_timeout: Duration::from_millis(400),
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

async fn list(source: &Arc<dyn Source>) -> Result<Listing> {
    match source.open().await? {
        Opened::Listed(listing) => Ok(listing),
        Opened::Streamed(_) => panic!("these sources list"),
    }
}

async fn fault(source: &Arc<dyn Source>) -> Error {
    let error = list(source).await.err().expect("opening should fail");
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

// The web.

#[tokio::test]
async fn a_web_file_is_read_in_ranges_bound_to_its_etag() {
    let standin = Standin::start();
    let source = standin.web("/data.bin");
    let listing = list(&source).await.unwrap();
    let (name, file) = only(&listing);
    assert_eq!((name.as_str(), file.size, file.ranges), ("data.bin", Some(200_000), true));
    assert_eq!(listing.revision, "etag:\"v1\"");
    assert_eq!(read(&source, &file, 0..200_000).await.unwrap(), data());
    assert_eq!(read(&source, &file, 1000..2000).await.unwrap(), data()[1000..2000]);
    assert_eq!(read(&source, &file, 199_999..200_000).await.unwrap(), data()[199_999..]);
    assert!(read(&source, &file, 5..5).await.unwrap().is_empty());
    assert_eq!(standin.asked("GET /data.bin range=bytes=1000-1999 auth=- match=\"v1\""), 1);
}

#[tokio::test]
async fn a_revision_is_met_again_only_where_the_server_vouches_for_it() {
    let standin = Standin::start();
    for (path, again) in [("/data.bin", true), ("/dated", true), ("/unpinned", false)] {
        let source = standin.web(path);
        let first = list(&source).await.unwrap().revision;
        assert_eq!(first == list(&source).await.unwrap().revision, again, "{path}: {first}");
    }
}

#[tokio::test]
async fn servers_without_ranges_are_read_from_the_start() {
    let standin = Standin::start();
    for path in ["/no-ranges", "/head-only"] {
        let source = standin.web(path);
        let (_, file) = only(&list(&source).await.unwrap());
        assert_eq!((file.size, file.ranges), (Some(200_000), false), "{path}");
        assert_eq!(read(&source, &file, 0..200_000).await.unwrap(), data());
        assert_eq!(read(&source, &file, 0..1000).await.unwrap(), data()[..1000]);
    }
}

#[tokio::test]
async fn a_file_of_unknown_size_ends_where_it_ends() {
    let standin = Standin::start();
    let source = standin.web("/chunked");
    let (_, file) = only(&list(&source).await.unwrap());
    assert_eq!((file.size, file.ranges), (None, false));
    assert_eq!(read(&source, &file, 0..u64::MAX).await.unwrap(), data());
    let source = standin.web("/chunked-cut");
    let (_, file) = only(&list(&source).await.unwrap());
    assert_eq!(read(&source, &file, 0..u64::MAX).await.unwrap_err().kind(), Kind::Unavailable);
}

#[tokio::test]
async fn an_empty_file_is_one() {
    let standin = Standin::start();
    let source = standin.web("/empty");
    let (_, file) = only(&list(&source).await.unwrap());
    assert_eq!(file.size, Some(0));
    assert!(read(&source, &file, 0..0).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_body_that_is_not_what_was_asked_for_is_an_error() {
    let standin = Standin::start();
    for (path, range, kind, reason) in [
        ("/short", 0..200_000, Kind::Unavailable, "BODY_TOO_SHORT"),
        ("/forgets-ranges", 10..20, Kind::Unavailable, "RANGE_IGNORED"),
        ("/other-range", 20..30, Kind::Unavailable, "WRONG_RANGE"),
        ("/chunked-long", 10..20, Kind::Corrupt, "BODY_TOO_LONG"),
    ] {
        let source = standin.web(path);
        let (_, file) = only(&list(&source).await.unwrap());
        let error = read(&source, &file, range).await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{path}: {error:?}");
    }
}

#[tokio::test]
async fn a_whole_file_answered_for_a_range_at_the_start_is_cut() {
    let standin = Standin::start();
    let source = standin.web("/forgets-ranges");
    let (_, file) = only(&list(&source).await.unwrap());
    assert_eq!(read(&source, &file, 0..1000).await.unwrap(), data()[..1000]);
}

#[tokio::test]
async fn a_file_that_changes_under_the_reader_is_noticed() {
    let standin = Standin::start();
    for (path, range) in [
        ("/changes", 0..200_000),
        ("/changes", 5..10),
        ("/conditional", 5..10),
        ("/shrinks", 0..10),
        ("/shrinks", 0..200_000),
    ] {
        let source = standin.web(&format!("{path}/{}", range.end));
        let (_, file) = only(&list(&source).await.unwrap());
        let error = read(&source, &file, range).await.unwrap_err();
        assert_eq!(error.reason(), "SOURCE_CHANGED", "{path}: {error:?}");
    }
}

#[tokio::test]
async fn silence_ends_a_transfer() {
    let standin = Standin::start();
    let source = standin.web("/stalls");
    let (_, file) = only(&list(&source).await.unwrap());
    let begun = Instant::now();
    let error = read(&source, &file, 0..200_000).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (Kind::Unavailable, "STALLED"));
    assert!(begun.elapsed() < Duration::from_secs(10));
    let mut settings = settings();
    settings.connect_timeout = Duration::from_millis(100);
    let context = SourceContext::new(&settings, EgressPolicy::new(vec!["127.0.0.0/8".parse().unwrap()])).unwrap();
    let source = source_at(&standin.url("/silent"), &context);
    assert_eq!(fault(&source).await.reason(), "STALLED");
}

fn source_at(url: &str, context: &SourceContext) -> Arc<dyn Source> {
    source(SourceKind::Web, url, &[], &[], context).unwrap()
}

#[tokio::test]
async fn the_server_may_name_the_file() {
    let standin = Standin::start();
    assert_eq!(only(&list(&standin.web("/named")).await.unwrap()).0, "weights.bin");
    assert_eq!(fault(&standin.web("/encoded")).await.reason(), "CONTENT_ENCODED");
}

#[tokio::test]
async fn credentials_stay_with_the_host_they_are_for() {
    let standin = Standin::start();
    let source = web(&standin.url("/elsewhere"), &[("username", "user"), ("password", "secret")]);
    let (name, file) = only(&list(&source).await.unwrap());
    assert_eq!(name, "weights v2.bin");
    assert_eq!(read(&source, &file, 10..20).await.unwrap(), data()[10..20]);
    let requests = standin.requests();
    let moved: Vec<_> = requests.iter().filter(|line| line.starts_with("GET /moved")).collect();
    assert_eq!(moved.len(), 2, "{requests:?}");
    assert!(moved.iter().all(|line| line.contains("auth=- ")), "{requests:?}");
    assert!(requests.iter().any(|line| line.starts_with("GET /elsewhere") && line.contains("auth=Basic ")));
}

#[tokio::test]
async fn basic_credentials_come_with_the_request_or_in_the_uri() {
    let standin = Standin::start();
    for source in [
        web(&standin.url("/basic"), &[("username", "user"), ("password", "pass word")]),
        web(&format!("http://user:pass%20word@127.0.0.1:{}/basic", standin.port), &[]),
    ] {
        let (_, file) = only(&list(&source).await.unwrap());
        assert_eq!(read(&source, &file, 0..10).await.unwrap(), data()[..10]);
    }
    let error = fault(&web(&standin.url("/basic"), &[("username", "user"), ("password", "secret")])).await;
    assert_eq!(error.reason(), "CREDENTIALS_REFUSED");
    assert_eq!(fault(&standin.web("/basic?token=secret")).await.reason(), "CREDENTIALS_REQUIRED");
}

#[tokio::test]
async fn a_redirect_is_followed_once_and_again_when_it_lapses() {
    let standin = Standin::start();
    let source = standin.web("/expiring");
    let (_, file) = only(&list(&source).await.unwrap());
    for at in [0, 100, 200] {
        assert_eq!(read(&source, &file, at..at + 10).await.unwrap(), data()[usize::try_from(at).unwrap()..][..10]);
    }
    assert_eq!(standin.asked("GET /expiring"), 2);
}

#[tokio::test]
async fn redirects_are_bounded_and_under_the_policy() {
    let standin = Standin::start();
    for (path, kind, reason) in [
        ("/loop", Kind::Invalid, "REDIRECT_LOOP"),
        ("/to-metadata", Kind::Denied, "EGRESS_REFUSED"),
        ("/to-file", Kind::Denied, "EGRESS_REFUSED"),
        ("/nowhere", Kind::Invalid, "BAD_REDIRECT"),
    ] {
        let error = fault(&standin.web(path)).await;
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{path}: {error:?}");
    }
    assert!(standin.asked("GET /loop") <= 11);
}

#[tokio::test]
async fn names_are_judged_by_what_they_resolve_to() {
    let standin = Standin::start();
    let strict = SourceContext::new(&settings(), EgressPolicy::default()).unwrap();
    for host in ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"] {
        let source = source_at(&format!("http://{host}:{}/data.bin", standin.port), &strict);
        let error = fault(&source).await;
        assert_eq!((error.kind(), error.reason()), (Kind::Denied, "EGRESS_REFUSED"), "{host}: {error:?}");
        assert!(error.remedy_text().unwrap().contains("sources.allow_networks"));
    }
    assert_eq!(standin.requests().len(), 0);
    let only_v4 = SourceContext::new(&settings(), EgressPolicy::new(vec!["127.0.0.1".parse().unwrap()])).unwrap();
    assert!(list(&source_at(&format!("http://localhost:{}/data.bin", standin.port), &only_v4)).await.is_ok());
}

#[tokio::test]
async fn every_refusal_has_its_kind() {
    let standin = Standin::start();
    for (path, kind, reason) in [
        ("/status/401", Kind::Denied, "CREDENTIALS_REQUIRED"),
        ("/status/403", Kind::Denied, "ACCESS_REFUSED"),
        ("/status/404", Kind::NotFound, "NO_SUCH_FILE"),
        ("/status/429?after=17", Kind::Unavailable, "RATE_LIMITED"),
        ("/status/503?after=3", Kind::Unavailable, "SERVER_ERROR"),
        ("/status/500", Kind::Unavailable, "SERVER_ERROR"),
        ("/status/418", Kind::Invalid, "REQUEST_REFUSED"),
    ] {
        let error = fault(&standin.web(path)).await;
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{path}: {error:?}");
        let wait = error.facts().iter().find(|(key, _)| key == "retry_after_s").map(|(_, value)| value.as_str());
        assert_eq!(wait, path.split_once("after=").map(|(_, seconds)| seconds), "{path}");
    }
    let port = standin.port;
    drop(standin);
    let error = fault(&web(&format!("http://127.0.0.1:{port}/x?secret"), &[])).await;
    assert_eq!((error.kind(), error.reason()), (Kind::Unavailable, "CONNECT_FAILED"));
}

// The hub.

#[tokio::test]
async fn a_repository_is_listed_over_its_pages_with_the_digest_of_each_file() {
    let standin = Standin::start();
    let source = standin.hub("acme/tiny", "", None);
    let listing = list(&source).await.unwrap();
    assert_eq!(listing.revision, "a".repeat(40));
    assert_eq!(paths(&listing), ["config.json", "model.safetensors", "sub", "sub/small.bin", "sub/ä b+c%20d#e?.bin"]);
    let plain = file_of(&listing, "config.json");
    assert!(plain.expected.git_sha1.is_some() && plain.expected.sha256.is_none());
    let large = file_of(&listing, "model.safetensors");
    assert!(large.expected.git_sha1.is_none() && large.expected.sha256.is_some());
    assert_eq!((plain.size, large.size), (Some(9), Some(5 << 20)));
    assert_eq!(read(&source, &plain, 0..9).await.unwrap(), b"{\"a\": 1}\n");
    let odd = file_of(&listing, "sub/ä b+c%20d#e?.bin");
    assert_eq!(read(&source, &odd, 0..8).await.unwrap(), b"odd name");
}

#[tokio::test]
async fn a_large_file_is_resolved_once_and_the_token_stays_with_the_hub() {
    let standin = Standin::start();
    let source = standin.hub("acme/private", "main", Some(TOKEN));
    let file = file_of(&list(&source).await.unwrap(), "model.safetensors");
    let size = file.size.unwrap();
    let ranges = [0..size, 0..1000, 1000..size, (4 << 20)..size, 7..8];
    let got = futures_util::future::join_all(ranges.iter().map(|range| read(&source, &file, range.clone()))).await;
    let whole = got[0].as_ref().unwrap();
    for (range, got) in ranges.iter().zip(&got) {
        let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        assert!(got.as_ref().unwrap() == &whole[start..end], "{range:?}");
    }
    let resolve = format!("GET /acme/private/resolve/{}/model.safetensors", "a".repeat(40));
    assert_eq!(standin.asked(&resolve), 1);
    let requests = standin.requests();
    let cdn: Vec<_> = requests.iter().filter(|line| line.starts_with("GET /cdn/")).collect();
    assert_eq!(cdn.len(), 6, "the first byte at opening, and five ranges");
    assert!(cdn.iter().all(|line| line.contains("auth=- ")), "{cdn:?}");
    assert!(requests.iter().filter(|line| !line.starts_with("GET /cdn/")).all(|line| line.contains(TOKEN)));
}

#[tokio::test]
async fn readers_that_begin_together_resolve_together() {
    let standin = Standin::start();
    let source = standin.hub("acme/tiny", "main", None);
    let file = file_of(&list(&source).await.unwrap(), "sub/small.bin");
    let got = futures_util::future::join_all((0..8).map(|at| read(&source, &file, at..at + 1))).await;
    assert!(got.iter().all(Result::is_ok), "{got:?}");
    assert_eq!(standin.asked(&format!("GET /acme/tiny/resolve/{}/sub/small.bin", "a".repeat(40))), 1);
}

#[tokio::test]
async fn branches_tags_and_commits_become_the_commit() {
    let standin = Standin::start();
    let (main, other) = ("a".repeat(40), "b".repeat(40));
    for (branch, commit) in
        [("", &main), ("main", &main), ("float16", &other), ("refs/pr/1", &other), (other.as_str(), &other)]
    {
        let source = standin.hub("hf:acme/tiny", branch, None);
        assert_eq!(&list(&source).await.unwrap().revision, commit, "{branch}");
    }
    assert_eq!(list(&standin.hub("gpt2", "", None)).await.unwrap().revision, main);
}

#[tokio::test]
async fn a_hub_without_ranges_is_read_from_the_start() {
    let standin = Standin::start();
    let source = standin.hub("acme/no-ranges", "", None);
    let file = file_of(&list(&source).await.unwrap(), "model.safetensors");
    assert!(!file.ranges);
    assert_eq!(read(&source, &file, 0..5 << 20).await.unwrap().len(), 5 << 20);
}

#[tokio::test]
async fn the_hubs_refusals_say_what_to_do() {
    let standin = Standin::start();
    for (id, branch, token, kind, reason, remedy) in [
        ("acme/none", "", None, Kind::NotFound, "REPOSITORY_NOT_FOUND", "give a token"),
        ("acme/none", "", Some(TOKEN), Kind::NotFound, "REPOSITORY_NOT_FOUND", "check the name"),
        ("acme/private", "", None, Kind::NotFound, "REPOSITORY_NOT_FOUND", "give a token"),
        ("acme/stale-token", "", None, Kind::Denied, "CREDENTIALS_REQUIRED", "token"),
        ("acme/stale-token", "", Some("hf_secret_stale"), Kind::Denied, "CREDENTIALS_REFUSED", "token"),
        ("acme/gated", "", None, Kind::Denied, "GATED", "/acme/gated"),
        ("acme/gated", "", Some(TOKEN), Kind::Denied, "GATED", "accept its terms at http://127.0.0.1"),
        ("acme/tiny", "nope", None, Kind::NotFound, "REVISION_NOT_FOUND", "branch"),
    ] {
        let error = fault(&standin.hub(id, branch, token)).await;
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{id}: {error:?}");
        assert!(error.remedy_text().unwrap().contains(remedy), "{id}: {error:?}");
    }
}

#[tokio::test]
async fn a_hub_that_is_busy_or_broken_is_asked_again_later() {
    let standin = Standin::start();
    let busy = fault(&standin.hub("acme/busy", "", None)).await;
    assert_eq!(busy.kind(), Kind::Unavailable);
    assert!(busy.facts().contains(&("retry_after_s".to_owned(), "41".to_owned())), "{:?}", busy.facts());
    assert_eq!(fault(&standin.hub("acme/html", "", None)).await.kind(), Kind::Unavailable);
    assert_eq!(fault(&standin.hub("acme/endless", "", None)).await.reason(), "BAD_LISTING");
}

// Directories.

/// Writes a file of a test; never through a link, for these tests run as root and plant links.
fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NOFOLLOW);
    options.open(path).unwrap().write_all(bytes).unwrap();
}

#[tokio::test]
async fn a_directory_is_listed_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    write(&at("a b/c.bin"), b"hello");
    write(&at("run"), b"#!");
    std::fs::set_permissions(at("run"), std::fs::Permissions::from_mode(0o711)).unwrap();
    std::fs::create_dir(at("empty")).unwrap();
    symlink("../outside/secret", at("out")).unwrap();
    symlink("a b", at("in")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe%2F.\n");
    write(&root.path().join(odd), b"odd");
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let source = directory(root.path());
    let listing = list(&source).await.unwrap();
    let odd_shown = odd.as_bytes().escape_ascii().to_string();
    assert_eq!(paths(&listing), [odd_shown.as_str(), "a b", "a b/c.bin", "empty", "in", "out", "run"]);
    let skipped =
        [("fifo", "is a FIFO"), ("socket", "is a socket")].map(|(path, why)| (path.to_owned(), why.to_owned()));
    assert_eq!(listing.skipped, skipped);
    let link = listing.entries.iter().find(|entry| entry.path.as_bytes() == b"out").unwrap();
    assert!(matches!(&link.what, What::Symlink(target) if **target == *b"../outside/secret"));
    assert!(file_of(&listing, "run").executable && !file_of(&listing, "a b/c.bin").executable);
    let found = listing.entries.iter().find(|entry| entry.path.as_bytes() == odd.as_bytes()).unwrap();
    let What::File(file) = &found.what else { panic!() };
    assert_eq!(read(&source, file, 0..3).await.unwrap(), b"odd");
    let mut opened = source.open_local(file).unwrap().unwrap();
    let mut bytes = Vec::new();
    opened.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"odd");
    source.check_unchanged(file, &opened).unwrap();
}

#[tokio::test]
async fn the_revision_of_a_directory_is_met_again_only_if_nothing_was_touched() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("a/x"), b"1");
    write(&root.path().join("b"), b"2");
    let source = directory(root.path());
    let first = list(&source).await.unwrap().revision;
    assert_eq!(list(&directory(root.path())).await.unwrap().revision, first);
    write(&root.path().join("b"), b"3");
    let second = list(&source).await.unwrap().revision;
    assert_ne!(first, second);
    symlink("b", root.path().join("c")).unwrap();
    assert_ne!(list(&source).await.unwrap().revision, second);
}

#[tokio::test]
async fn a_file_of_a_directory_that_changes_is_noticed_by_name() {
    let mutations: [fn(&Path); 5] = [
        |path| write(path, b"longer than before"),
        |path| write(path, b"other"),
        |path| std::fs::remove_file(path).unwrap(),
        |path| {
            std::fs::remove_file(path).unwrap();
            std::fs::write(path.with_file_name("decoy"), b"hello").unwrap();
            symlink("decoy", path).unwrap();
        },
        |path| {
            let directory = path.parent().unwrap();
            std::fs::rename(directory, directory.with_extension("moved")).unwrap();
            symlink(directory.with_extension("moved"), directory).unwrap();
        },
    ];
    for mutate in mutations {
        // A tree of its own for each: what the one before left behind may be a link.
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("sub/x");
        write(&path, b"hello");
        let source = directory(root.path());
        let file = file_of(&list(&source).await.unwrap(), "sub/x");
        assert_eq!(read(&source, &file, 1..3).await.unwrap(), b"el");
        let opened = source.open_local(&file).unwrap().unwrap();
        mutate(&path);
        let error = read(&source, &file, 0..5).await.unwrap_err();
        assert_eq!(error.reason(), "SOURCE_CHANGED");
        assert!(error.to_string().contains("sub/x"), "{error}");
        assert_eq!(source.open_local(&file).unwrap_err().reason(), "SOURCE_CHANGED");
        let unlinked_or_written = source.check_unchanged(&file, &opened);
        let still_there = std::fs::symlink_metadata(root.path().join("sub.moved")).is_ok();
        assert_eq!(unlinked_or_written.is_ok(), still_there, "only the move left the open file as it was");
    }
}

#[tokio::test]
async fn a_file_that_is_written_while_it_is_read_is_noticed_at_its_end() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x");
    write(&path, &vec![1; 3 << 20]);
    let source = directory(root.path());
    let file = file_of(&list(&source).await.unwrap(), "x");
    let mut stream = source.read(&file, 0..3 << 20).await.unwrap();
    assert!(stream.next().await.unwrap().is_ok());
    let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all(b"2").unwrap();
    let mut last = None;
    while let Some(piece) = stream.next().await {
        last = Some(piece);
    }
    assert_eq!(last.unwrap().unwrap_err().reason(), "SOURCE_CHANGED");
}

#[tokio::test]
async fn a_single_file_is_a_checkpoint_of_that_file() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("model.bin"), b"weights");
    write(&root.path().join("other"), b"x");
    let source = directory(&root.path().join("model.bin"));
    let listing = list(&source).await.unwrap();
    let (name, file) = only(&listing);
    assert_eq!(name, "model.bin");
    assert_eq!(read(&source, &file, 0..7).await.unwrap(), b"weights");
}

#[tokio::test]
async fn a_root_that_cannot_be_listed_says_why() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("real")).unwrap();
    symlink("real", root.path().join("link")).unwrap();
    nix::unistd::mkfifo(&root.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (name, kind, reason) in [
        ("none", Kind::NotFound, "NO_SUCH_FILE"),
        ("link", Kind::Invalid, "NOT_A_DIRECTORY"),
        ("link/", Kind::Invalid, "NOT_A_DIRECTORY"),
        ("fifo", Kind::Invalid, "NOT_A_DIRECTORY"),
    ] {
        let error = list(&directory(&root.path().join(name))).await.err().unwrap();
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{error:?}");
        assert!(error.remedy_text().is_some());
    }
}

#[tokio::test]
async fn twenty_thousand_files_are_listed_quickly() {
    let root = tempfile::tempdir().unwrap();
    for directory in 0..20 {
        std::fs::create_dir(root.path().join(format!("d{directory}"))).unwrap();
        for file in 0..1000 {
            std::fs::File::create(root.path().join(format!("d{directory}/f{file}"))).unwrap();
        }
    }
    let source = directory(root.path());
    let begun = Instant::now();
    let listing = list(&source).await.unwrap();
    let took = begun.elapsed();
    assert_eq!(listing.entries.len(), 20_020);
    println!("20,000 files in {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}
