//! What is asked of Kaggle, what it answers, and what its refusals mean.
//!
//! | kind | version | bundle |
//! |---|---|---|
//! | dataset | `datasets/view/<owner>/<name>` | `datasets/download/<owner>/<name>?datasetVersionNumber=` |
//! | kernel | `kernels/pull?userName=&kernelSlug=` | `kernels/output/download/<owner>/<name>?versionNumber=` |
//! | competition | `competitions/data/list/<name>`, all pages | `competitions/data/download-all/<name>` |
//!
//! below `/api/v1/`. These are the routes that the official clients name for their calls (`kagglesdk`, `endpoint()`); the clients
//! themselves post the same fields to `api.kaggle.com`, which answers alike.

use std::fmt;

use reqwest::Url;
use serde::Deserialize;

use super::super::Counter;
use super::super::asking::ask_again;
use super::super::http::{Answer, Authorization, Failure, HttpClient, Request, read_document, shown};
use crate::digest::Digester;
use crate::error::{Error, Kind, Result};
use crate::names::show_bytes;

/// One answer of the interface: a page, or the record of a dataset with its description.
const ANSWER_BYTES: usize = 16 << 20;

/// Files asked for in one page: the most that the official clients ask for.
const PAGE_FILES: usize = 200;

/// What is meant: parsed, so that it is safe in a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A competition's data.
    Competition(String),
    /// A dataset, at a version if one is named.
    Dataset { owner: String, name: String, version: Option<u32> },
    /// What a notebook wrote, at a version if one is named.
    Kernel { owner: String, name: String, version: Option<u32> },
}

impl Item {
    /// Parses a short name of the type `kind`.
    ///
    /// # Errors
    /// `BAD_OPTION` for a type that is none, `BAD_URI` for a name that is not of its form.
    pub(super) fn parse(uri: &str, kind: Option<&str>) -> Result<Self> {
        let words: Vec<_> = uri.split('/').collect();
        let bad = |form: &str| {
            let message = format!("`{}` is not a short name of that type", show_bytes(uri.as_bytes()));
            Error::invalid("BAD_URI", message).remedy(format!("write {form}"))
        };
        let named = |form| match words.as_slice() {
            [owner, name] if is_slug(owner) && is_slug(name) => Ok(((*owner).to_owned(), (*name).to_owned(), None)),
            [owner, name, "versions", version] if is_slug(owner) && is_slug(name) => {
                let version = version.parse().ok().filter(|version| *version > 0).ok_or_else(|| bad(form))?;
                Ok(((*owner).to_owned(), (*name).to_owned(), Some(version)))
            }
            _ => Err(bad(form)),
        };
        match kind {
            Some("competition") if is_slug(uri) => Ok(Self::Competition(uri.to_owned())),
            Some("competition") => Err(bad("the name alone, as in lish-moa")),
            Some("dataset") => named("<owner>/<name>, or <owner>/<name>/versions/<number>")
                .map(|(owner, name, version)| Self::Dataset { owner, name, version }),
            Some("kernel") => named("<owner>/<name>, or <owner>/<name>/versions/<number>")
                .map(|(owner, name, version)| Self::Kernel { owner, name, version }),
            _ => Err(Error::invalid("BAD_OPTION", "a Kaggle source does not say what it is")
                .remedy("give the option `type`: competition, dataset or kernel")),
        }
    }

    /// The last word of its name.
    pub(super) fn slug(&self) -> &str {
        match self {
            Self::Competition(name) | Self::Dataset { name, .. } | Self::Kernel { name, .. } => name,
        }
    }

    /// The path of its page at the site.
    fn page(&self) -> String {
        match self {
            Self::Competition(name) => format!("c/{name}"),
            Self::Dataset { owner, name, .. } => format!("datasets/{owner}/{name}"),
            Self::Kernel { owner, name, .. } => format!("code/{owner}/{name}"),
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Competition(name) => write!(f, "the Kaggle competition {name}"),
            Self::Dataset { owner, name, .. } => write!(f, "the Kaggle dataset {owner}/{name}"),
            Self::Kernel { owner, name, .. } => write!(f, "the Kaggle kernel {owner}/{name}"),
        }
    }
}

fn is_slug(word: &str) -> bool {
    (1..=100).contains(&word.len())
        && !word.starts_with(['.', '-'])
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// An item whose revision is known.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) revision: String,
    pub(super) bundle: Url,
}

/// One item at the service.
#[derive(Debug)]
pub(super) struct Kaggle {
    pub(super) http: HttpClient,
    pub(super) endpoint: Url,
    pub(super) authorization: Option<Authorization>,
    pub(super) item: Item,
}

#[derive(Deserialize)]
struct DatasetRecord {
    #[serde(rename = "currentVersionNumber")]
    version: Option<u32>,
}

#[derive(Deserialize)]
struct KernelRecord {
    metadata: DatasetRecord,
}

#[derive(Deserialize)]
struct Page {
    files: Vec<Row>,
    #[serde(rename = "nextPageToken")]
    next: Option<String>,
}

/// One file of a competition, as listed.
#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    name: Option<String>,
    #[serde(rename = "totalBytes", default)]
    bytes: Option<u64>,
    #[serde(rename = "creationDate")]
    created: Option<String>,
}

impl Kaggle {
    /// The revision that is meant now, and where its bundle is.
    pub(super) async fn pin(&self, counter: &Counter) -> Result<Pinned> {
        match &self.item {
            Item::Competition(name) => {
                let revision = format!("files:{}", self.competition_digest(name, counter).await?);
                Ok(Pinned { revision, bundle: self.url(&format!("competitions/data/download-all/{name}"), &[])? })
            }
            Item::Dataset { owner, name, version } => {
                let path = format!("datasets/view/{owner}/{name}");
                let version = match version {
                    Some(version) => *version,
                    None => numbered(self.ask::<DatasetRecord>(&self.url(&path, &[])?).await?.version, &self.item)?,
                };
                let query = [("datasetVersionNumber", version.to_string())];
                let bundle = self.url(&format!("datasets/download/{owner}/{name}"), &query)?;
                Ok(Pinned { revision: format!("version:{version}"), bundle })
            }
            Item::Kernel { owner, name, version } => {
                let query = [("userName", owner.clone()), ("kernelSlug", name.clone())];
                let record = self.url("kernels/pull", &query)?;
                let version = match version {
                    Some(version) => *version,
                    None => numbered(self.ask::<KernelRecord>(&record).await?.metadata.version, &self.item)?,
                };
                let query = [("versionNumber", version.to_string())];
                let bundle = self.url(&format!("kernels/output/download/{owner}/{name}"), &query)?;
                Ok(Pinned { revision: format!("version:{version}"), bundle })
            }
        }
    }

    /// A digest over names, sizes and dates of all that a competition lists.
    async fn competition_digest(&self, name: &str, counter: &Counter) -> Result<String> {
        let mut rows = Vec::new();
        let mut token = String::new();
        loop {
            let mut query = vec![("pageSize", PAGE_FILES.to_string())];
            query.extend((!token.is_empty()).then(|| ("pageToken", token.clone())));
            let url = self.url(&format!("competitions/data/list/{name}"), &query)?;
            let page = ask_again(|| self.ask::<Page>(&url)).await?;
            let came = page.files.len();
            rows.extend(page.files);
            counter(rows.len()).map_err(|error| error.during(format!("listing {}", self.item)))?;
            match page.next.filter(|next| !next.is_empty()) {
                None => break,
                Some(next) if next == token || came == 0 => {
                    return Err(Error::corrupt("BAD_LISTING", format!("listing {}: it does not end", self.item)));
                }
                Some(next) => token = next,
            }
        }
        rows.sort();
        let mut digester = Digester::new();
        for row in &rows {
            let size = row.bytes.map(|bytes| bytes.to_string());
            for text in [&row.name, &size, &row.created] {
                digester.update(text.as_deref().unwrap_or_default().as_bytes());
                digester.update(b"\0");
            }
        }
        Ok(digester.finish().to_hex())
    }

    fn url(&self, below: &str, query: &[(&str, String)]) -> Result<Url> {
        let text = format!("{}/api/v1/{below}", self.endpoint.as_str().trim_end_matches('/'));
        let mut url = Url::parse(&text).map_err(|error| Error::internal("building a URL of Kaggle").because(error))?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        Ok(url)
    }

    async fn ask<T: for<'de> Deserialize<'de>>(&self, url: &Url) -> Result<T> {
        let request = Request::get(url, self.authorization.as_ref());
        let reply = self.http.send(&request).await.map_err(|failure| self.explain(failure))?;
        let document = read_document(reply, ANSWER_BYTES, &self.http).await?;
        serde_json::from_slice(&document).map_err(|error| {
            Error::unavailable("BAD_ANSWER", format!("reading what Kaggle says of {}", self.item)).because(error)
        })
    }

    /// What a refusal means.
    pub(super) fn explain(&self, failure: Failure) -> Error {
        match failure {
            Failure::Refused(answer) => self.explain_answer(&answer),
            Failure::Failed(error) => error,
        }
    }

    fn explain_answer(&self, answer: &Answer) -> Error {
        let (item, endpoint) = (&self.item, shown(&self.endpoint));
        let page = format!("{}/{}", endpoint.trim_end_matches('/'), item.page());
        let own = answer.shown.starts_with(&endpoint);
        let fault = match answer.status.as_u16() {
            401 if answer.authorized => answer
                .error(Kind::Denied, "CREDENTIALS_REFUSED", "the credentials are not accepted")
                .remedy("check the Kaggle user name and key, or the token, and that it has not expired"),
            401 => answer
                .error(Kind::Denied, "CREDENTIALS_REQUIRED", &format!("{item} asks for credentials"))
                .remedy("give the credentials `username` and `key`, or `token`"),
            403 if own && matches!(item, Item::Competition(_)) => answer
                .error(Kind::Denied, "GATED", &format!("{item} does not let this account have its data"))
                .remedy(format!("accept the rules at {page}/rules with the account whose credentials are given"))
                .fact("url", format!("{page}/rules")),
            403 if own => answer
                .error(Kind::Denied, "ACCESS_REFUSED", &format!("{item} is not open to this account"))
                .remedy(format!("look at {page} with the account whose credentials are given")),
            404 if own => answer
                .error(Kind::NotFound, "NO_SUCH_ITEM", &format!("{item} is not there, or it is private"))
                .remedy("check the name, the type and the version, and that the credentials may read it"),
            _ => answer.fault(),
        };
        fault.fact("item", item)
    }
}

fn numbered(version: Option<u32>, item: &Item) -> Result<u32> {
    version.filter(|version| *version > 0).ok_or_else(|| {
        Error::not_found("NO_VERSION", format!("{item} has no version yet")).remedy("wait until it has been published")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_have_the_form_of_their_type() {
        let reason =
            |uri: &str, kind: Option<&str>| Item::parse(uri, kind).err().map(|error| error.reason().to_owned());
        for (uri, kind) in [
            ("lish-moa", "competition"),
            ("zillow/zecon", "dataset"),
            ("zillow/zecon/versions/3", "dataset"),
            ("someone/a-notebook", "kernel"),
        ] {
            assert_eq!(reason(uri, Some(kind)), None, "{kind} {uri}");
        }
        for (uri, kind) in [
            ("zillow/zecon", "competition"),
            ("lish-moa", "dataset"),
            ("a/b/versions/0", "dataset"),
            ("a/b/versions/x", "dataset"),
            ("a/b/c", "kernel"),
            ("../b", "kernel"),
            ("a/b?x", "dataset"),
            ("a b", "competition"),
            ("", "competition"),
        ] {
            assert_eq!(reason(uri, Some(kind)).as_deref(), Some("BAD_URI"), "{kind} {uri}");
        }
        for kind in [None, Some("model")] {
            assert_eq!(reason("a/b", kind).as_deref(), Some("BAD_OPTION"));
        }
    }
}
