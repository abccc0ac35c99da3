//! A repository of a hub.

use ckptd::error::{Kind, Result};

use super::{Sources, Standin, TOKEN, fault, file_of, list, paths, read};

#[tokio::test]
async fn a_repository_is_listed_over_its_pages_with_the_digest_of_each_file() {
    let standin = Standin::start();
    let source = standin.hub("acme/tiny", "", None);
    let listing = list(&source).await.unwrap();
    assert_eq!(listing.revision, "a".repeat(40));
    assert_eq!(paths(&listing), ["config.json", "model.safetensors", "sub", "sub/small.bin", "sub/ä b+c%20d#e?.bin"]);
    let plain = file_of(&listing, "config.json");
    assert!(plain.expected.stated().git_sha1.is_some() && plain.expected.stated().sha256.is_none());
    let large = file_of(&listing, "model.safetensors");
    assert!(large.expected.stated().git_sha1.is_none() && large.expected.stated().sha256.is_some());
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
