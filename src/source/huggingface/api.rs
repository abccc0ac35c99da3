//! What is asked of a hub, what it answers, and what its refusals mean.
//!
//! `GET /api/models/<id>/revision/<revision>` (`datasets`, `spaces`) gives the commit; `GET /api/models/<id>/tree/<commit>?recursive=true`
//! lists it, in pages joined by `Link: <..>; rel="next"`. Refusals bear `X-Error-Code`; the hub says 401 `RepoNotFound` for a private
//! repository too, so that its existence is no news.

use reqwest::Url;
use reqwest::header::LINK;
use serde::Deserialize;

use super::super::asking::ask_again;
use super::super::http::{Answer, Authorization, Failure, HttpClient, Reply, Request, read_document};
use super::super::{Counter, Expected, File, Listed, Stated, What};
use super::{RepositoryId, component};
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::names::EntryPath;

/// One answer of the interface: a page has 1,000 entries of at most some kilobytes; the record of a large repository
/// names all its files.
const ANSWER_BYTES: usize = 64 << 20;

/// Pages of one listing: at 1,000 entries each, more than a checkpoint may have.
const PAGES: usize = 2 * limits::CHECKPOINT_ENTRIES / 1000;

/// One repository at a hub.
#[derive(Debug)]
pub(super) struct Hub {
    pub(super) http: HttpClient,
    pub(super) endpoint: Url,
    pub(super) id: RepositoryId,
    pub(super) token: Option<Authorization>,
}

#[derive(Deserialize)]
struct Record {
    sha: Option<String>,
}

/// One entry of a tree listing.
#[derive(Deserialize)]
pub(super) struct Item {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) path: String,
    #[serde(default)]
    oid: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Hub {
    /// The commit that `revision` means now.
    pub(super) async fn commit(&self, revision: &str) -> Result<String> {
        let url = self.url(&format!("api/{}/revision/{}", self.id.record(), component(revision)))?;
        let (record, _) = self.ask::<Record>(&url).await.map_err(|failure| self.explain_revision(failure, revision))?;
        record
            .sha
            .filter(|sha| decode_hex::<20>(sha).is_some())
            .ok_or_else(|| bad_listing(&self.id, "the revision has no commit"))
    }

    /// Everything in `commit`.
    pub(super) async fn tree(&self, commit: &str, counter: &Counter) -> Result<Vec<Item>> {
        let mut url = self.url(&format!("api/{}/tree/{commit}?recursive=true&expand=false", self.id.record()))?;
        let mut items = Vec::new();
        for _ in 0..PAGES {
            let (page, next) = self.page(&url).await?;
            items.extend(page);
            counter(items.len())
                .map_err(|error| error.during(format!("listing the repository {}", self.id.as_str())))?;
            match next {
                None => return Ok(items),
                Some(next) if next == url => break,
                Some(next) => url = next,
            }
        }
        Err(bad_listing(&self.id, "the listing does not end"))
    }

    async fn page(&self, url: &Url) -> Result<(Vec<Item>, Option<Url>)> {
        ask_again(|| async { self.ask(url).await.map_err(|failure| self.explain(failure)) }).await
    }

    /// Where a file of `commit` is read.
    pub(super) fn file_url(&self, commit: &str, path: &str) -> Result<Url> {
        let path: Vec<_> = path.split('/').map(component).collect();
        self.url(&format!("{}/resolve/{commit}/{}", self.id.as_str(), path.join("/")))
    }

    fn url(&self, below: &str) -> Result<Url> {
        let text = format!("{}/{below}", self.endpoint.as_str().trim_end_matches('/'));
        Url::parse(&text).map_err(|error| Error::internal("building a URL of the hub").because(error))
    }

    /// One JSON document and the page after it.
    async fn ask<T: for<'de> Deserialize<'de>>(&self, url: &Url) -> Result<(T, Option<Url>), Failure> {
        let authorization = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin());
        let reply = self.http.send(&Request::get(url, authorization)).await?;
        let next = next_page(&reply);
        let document = read_document(reply, ANSWER_BYTES, &self.http).await?;
        let answer = serde_json::from_slice(&document).map_err(|error| {
            let message =
                format!("reading what {} says of {}", self.endpoint.host_str().unwrap_or_default(), self.id.as_str());
            Error::unavailable("BAD_ANSWER", message).because(error)
        })?;
        Ok((answer, next))
    }

    /// What a refusal means, in the hub's own words where it uses them.
    pub(super) fn explain(&self, failure: Failure) -> Error {
        match failure {
            Failure::Refused(answer) => explain(&answer, &self.id, &self.endpoint),
            Failure::Failed(error) => error,
        }
    }

    fn explain_revision(&self, failure: Failure, revision: &str) -> Error {
        match failure {
            Failure::Refused(answer) if answer.header("x-error-code") == Some("RevisionNotFound") => {
                let why = format!("the repository {} has no branch, tag or commit `{revision}`", self.id.as_str());
                answer
                    .error(Kind::NotFound, "REVISION_NOT_FOUND", &why)
                    .remedy("give a `branch` that the repository has")
                    .fact("revision", revision)
            }
            other => self.explain(other),
        }
    }
}

/// What the hub's refusal means for whoever asked for `id`.
fn explain(answer: &Answer, id: &RepositoryId, endpoint: &Url) -> Error {
    let id = id.as_str();
    let page = format!("{}/{id}", super::super::http::shown(endpoint).trim_end_matches('/'));
    let fault = match (answer.header("x-error-code"), answer.status.as_u16()) {
        (Some("GatedRepo"), _) => answer
            .error(Kind::Denied, "GATED", &format!("the repository {id} is gated"))
            .remedy(format!("accept its terms at {page} and give the token of that account"))
            .fact("url", page),
        (Some("RepoNotFound"), _) | (None, 404) => answer
            .error(Kind::NotFound, "REPOSITORY_NOT_FOUND", &format!("there is no repository {id}, or it is private"))
            .remedy(if answer.authorized {
                "check the name, and that the token may read it"
            } else {
                "check the name, or give a token that may read it"
            }),
        (Some("RevisionNotFound"), _) => {
            answer.error(Kind::NotFound, "REVISION_NOT_FOUND", &format!("the repository {id} has no such revision"))
        }
        (Some("EntryNotFound"), _) => {
            answer.error(Kind::NotFound, "NO_SUCH_FILE", &format!("the repository {id} has no such file"))
        }
        (Some("DisabledRepo"), _) => {
            answer.error(Kind::Denied, "REPOSITORY_DISABLED", &format!("the hub has disabled the repository {id}"))
        }
        (_, 401) if !answer.authorized => answer
            .error(Kind::Denied, "CREDENTIALS_REQUIRED", &format!("the repository {id} asks for a token"))
            .remedy("give a Hugging Face token that may read it"),
        (_, 401) => answer
            .error(Kind::Denied, "CREDENTIALS_REFUSED", "the token is not accepted")
            .remedy("check the Hugging Face token, and that it has not expired"),
        _ => answer.fault(),
    };
    fault.fact("repository", id)
}

fn bad_listing(id: &RepositoryId, why: &str) -> Error {
    Error::corrupt("BAD_LISTING", format!("listing the repository {}: {why}", id.as_str()))
}

/// The target of `rel="next"` among the reply's links (RFC 8288).
fn next_page(reply: &Reply) -> Option<Url> {
    let links = reply.response.headers().get_all(LINK);
    links.iter().filter_map(|value| value.to_str().ok()).find_map(|text| next_link(text, &reply.url))
}

fn next_link(text: &str, base: &Url) -> Option<Url> {
    let mut rest = text;
    while let Some((_, after)) = rest.split_once('<') {
        let (target, parameters) = after.split_once('>')?;
        let end = parameters.find('<').unwrap_or(parameters.len());
        let own = &parameters[..end];
        if own.split([';', ',']).any(|field| matches!(field.trim(), "rel=\"next\"" | "rel=next")) {
            return base.join(target).ok();
        }
        rest = &parameters[end..];
    }
    None
}

/// Turns an item into an entry; every name and digest in it is checked.
pub(super) fn listed(item: Item, url: impl Fn(&str) -> Result<Url>) -> Result<Listed> {
    let path = EntryPath::new(item.path.as_bytes())?;
    if path.is_root() {
        return Err(Error::corrupt("BAD_LISTING", "the listing names an entry without a path"));
    }
    if item.kind == "directory" {
        return Ok(Listed { path, what: What::Directory });
    }
    let file = File {
        locator: url(&item.path)?.as_str().into(),
        size: item.lfs.as_ref().map(|lfs| lfs.size).or(item.size),
        executable: false,
        ranges: true,
        expected: expected(&item)?,
    };
    Ok(Listed { path, what: What::File(file) })
}

/// The digest to verify; a file without one is refused rather than believed.
fn expected(item: &Item) -> Result<Expected> {
    let bad = || Error::corrupt("BAD_LISTING", format!("the listing gives `{}` no usable digest", item.path));
    match &item.lfs {
        Some(lfs) => {
            let hex = lfs.oid.strip_prefix("sha256:").unwrap_or(&lfs.oid);
            Ok(Stated { sha256: Some(decode_hex(hex).ok_or_else(bad)?), ..Stated::default() }.into())
        }
        None => Ok(Stated { git_sha1: Some(decode_hex(&item.oid).ok_or_else(bad)?), ..Stated::default() }.into()),
    }
}

fn decode_hex<const BYTES: usize>(text: &str) -> Option<[u8; BYTES]> {
    if text.len() != 2 * BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; BYTES];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(json: &str) -> Result<Listed> {
        listed(serde_json::from_str(json).unwrap(), |path| Ok(Url::parse("http://hub/").unwrap().join(path).unwrap()))
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let base = Url::parse("https://hub/api/x").unwrap();
        let next = |text: &str| next_link(text, &base).map(String::from);
        assert_eq!(next("<https://hub/p?cursor=a,b;c>; rel=\"next\"").as_deref(), Some("https://hub/p?cursor=a,b;c"));
        assert_eq!(
            next("<https://hub/1>; rel=\"first\", </2?x=1>; rel=\"next\"").as_deref(),
            Some("https://hub/2?x=1")
        );
        assert_eq!(next("<https://hub/1>; rel=\"prev\""), None);
        assert_eq!(next("nonsense"), None);
        assert_eq!(next("<unclosed; rel=\"next\""), None);
    }

    #[test]
    fn each_file_has_the_digest_of_its_own_bytes() {
        let oid = "1".repeat(40);
        let sha = "ab".repeat(32);
        let plain = item(&format!(r#"{{"type":"file","path":"a/b","oid":"{oid}","size":3}}"#)).unwrap();
        let What::File(file) = plain.what else { panic!() };
        assert_eq!(
            (file.size, file.expected.stated().git_sha1, file.expected.stated().sha256),
            (Some(3), Some([0x11; 20]), None)
        );
        let lfs = format!(r#"{{"type":"file","path":"c","oid":"{oid}","size":134,"lfs":{{"oid":"{sha}","size":9}}}}"#);
        let What::File(file) = item(&lfs).unwrap().what else { panic!() };
        assert_eq!(
            (file.size, file.expected.stated().git_sha1, file.expected.stated().sha256),
            (Some(9), None, Some([0xab; 32]))
        );
    }

    #[test]
    fn hostile_listings_are_refused() {
        let oid = "1".repeat(40);
        for path in ["../x", "/etc/passwd", "a//b", "", "a/./b"] {
            assert!(item(&format!(r#"{{"type":"file","path":"{path}","oid":"{oid}","size":3}}"#)).is_err(), "{path}");
        }
        for oid in ["", "zz", &"é".repeat(20)] {
            let error = item(&format!(r#"{{"type":"file","path":"x","oid":"{oid}","size":3}}"#)).unwrap_err();
            assert_eq!(error.reason(), "BAD_LISTING");
        }
    }
}
