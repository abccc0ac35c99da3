//! One file of the web, from servers that lie.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ckptd::error::Kind;
use ckptd::source::egress::EgressPolicy;
use ckptd::source::{Source, SourceContext, SourceKind};

use super::{Sources, Standin, data, fault, list, only, read, settings, source, web};

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
    // Ranges of what nothing pins could be of two files.
    for path in ["/no-ranges", "/head-only", "/unpinned"] {
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
    let mut settings = settings();
    settings.inactivity_timeout = Duration::from_secs(2);
    let policy = || EgressPolicy::new(vec!["127.0.0.0/8".parse().unwrap()]);
    let source = source_at(&standin.url("/stalls"), &SourceContext::new(&settings, policy()).unwrap());
    let (_, file) = only(&list(&source).await.unwrap());
    let begun = Instant::now();
    let error = read(&source, &file, 0..200_000).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (Kind::Unavailable, "STALLED"));
    assert!(begun.elapsed() < Duration::from_secs(60));
    settings.connect_timeout = Duration::from_secs(2);
    settings.inactivity_timeout = Duration::from_millis(400);
    let context = SourceContext::new(&settings, policy()).unwrap();
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
