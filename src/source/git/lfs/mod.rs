//! Large files that a repository keeps beside itself: our own client of the LFS batch interface
//! (<https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>).
//!
//! Files are asked for in groups of neighbours, so that 20,000 of them cost 200 requests; the answers (where each file is, and what to
//! show there) are kept for the groups in use, and asked for again when the place refuses, since they expire. A file is then read
//! from its place in ranges, under the one HTTP client; what is to be shown there goes to that origin alone. Every file is verified by
//! its SHA-256, so what a server has in its place cannot come in.

mod endpoint;
mod pointer;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue, RANGE};
use reqwest::{StatusCode, Url};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::super::http::{
    Authorization, Failure, HttpClient, Request, Sign, Wanted, read_document, without_user_information,
};
use super::super::{ByteStream, File};
use crate::error::{Error, Kind, Result};

pub(super) use endpoint::{Endpoint, Place};
pub(super) use pointer::{Pointer, decode};

/// Objects in one request: what servers take, and what GitHub's own client sends.
const GROUP: usize = 100;

/// Groups whose answers are kept: more than files are read at a time. An answer is about 2 KiB for each of its objects.
const GROUPS_KEPT: usize = 64;

/// One answer: 100 objects with signed URLs and headers.
const ANSWER_BYTES: usize = 4 << 20;

const MEDIA_TYPE: &str = "application/vnd.git-lfs+json";

/// The large files of one repository.
#[derive(Debug)]
pub(super) struct Lfs {
    http: HttpClient,
    endpoint: Endpoint,
    objects: Vec<Pointer>,
    answers: Mutex<VecDeque<(usize, Arc<OnceCell<Answers>>)>>,
}

/// Where the objects of a group are, in their order.
type Answers = Vec<Result<Action, Arc<Error>>>;

/// Where an object is, and what is to be shown there.
#[derive(Debug)]
struct Action {
    url: Url,
    authorization: Option<Authorization>,
}

#[derive(Serialize)]
struct Question<'a> {
    operation: &'a str,
    transfers: [&'a str; 1],
    hash_algo: &'a str,
    objects: Vec<Asked>,
}

#[derive(Serialize)]
struct Asked {
    oid: String,
    size: u64,
}

#[derive(Deserialize)]
struct Answer {
    transfer: Option<String>,
    #[serde(default)]
    objects: Vec<Found>,
}

#[derive(Deserialize)]
struct Found {
    oid: String,
    #[serde(default)]
    actions: HashMap<String, Download>,
    error: Option<Fault>,
}

#[derive(Deserialize)]
struct Download {
    href: String,
    #[serde(default)]
    header: HashMap<String, String>,
}

#[derive(Deserialize)]
struct Fault {
    code: u16,
}

/// What a server wants to be shown, as headers.
struct Shown(Vec<(HeaderName, HeaderValue)>);

#[async_trait]
impl Sign for Shown {
    async fn sign(&self, request: &mut reqwest::Request) -> Result<()> {
        request.headers_mut().extend(self.0.iter().map(|(name, value)| (name.clone(), value.clone())));
        Ok(())
    }
}

impl Lfs {
    /// The files that `objects` stand for, at `endpoint`.
    pub(super) fn new(http: HttpClient, endpoint: Endpoint, objects: Vec<Pointer>) -> Self {
        Self { http, endpoint, objects, answers: Mutex::default() }
    }

    /// Whether the `index`-th object can be read in ranges. Brings to light what keeps it from being read at all.
    pub(super) async fn answers_ranges(&self, index: usize) -> Result<bool> {
        let reply = self.get(index, &[(RANGE, "bytes=0-0".to_owned())]).await?;
        Ok(reply.response.status() == StatusCode::PARTIAL_CONTENT)
    }

    /// The bytes `range` of the `index`-th object.
    pub(super) async fn read(&self, index: usize, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let wanted = Wanted { range, size: file.size, ranges: file.ranges };
        wanted.check("a file of LFS")?;
        if wanted.range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let headers: Vec<_> = wanted.header().map(|range| (RANGE, range)).into_iter().collect();
        let reply = self.get(index, &headers).await?;
        wanted.accept(reply, &self.http)
    }

    /// Asks the object's place; once more with a new answer, if that may have been out of date.
    async fn get(&self, index: usize, headers: &[(HeaderName, String)]) -> Result<super::super::http::Reply> {
        let mut failed = None;
        for _ in 0..2 {
            let group = index / GROUP;
            let cell = self.cell(group);
            let answers = cell.get_or_try_init(|| self.ask(group)).await?;
            let action = match answers.get(index % GROUP) {
                Some(Ok(action)) => action,
                Some(Err(error)) => {
                    self.forget(group, &cell);
                    return Err(error.share());
                }
                None => return Err(Error::internal("a file of LFS was never listed")),
            };
            let request = Request::get(&action.url, action.authorization.as_ref()).headers(headers);
            match self.http.send(&request).await {
                Ok(reply) => return Ok(reply),
                Err(failure) => {
                    self.forget(group, &cell);
                    let stale = matches!(failure.status().map(|status| status.as_u16()), Some(400..=404 | 410));
                    failed = Some(failure);
                    if !stale {
                        break;
                    }
                }
            }
        }
        Err(failed.map_or_else(|| Error::internal("no request was made"), Failure::into_error))
    }

    fn cell(&self, group: usize) -> Arc<OnceCell<Answers>> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cell)) = answers.iter().find(|(known, _)| *known == group) {
            return Arc::clone(cell);
        }
        if answers.len() >= GROUPS_KEPT {
            answers.pop_front();
        }
        let cell = Arc::default();
        answers.push_back((group, Arc::clone(&cell)));
        cell
    }

    /// Lets the next one ask anew, unless somebody else has seen to it.
    fn forget(&self, group: usize, stale: &Arc<OnceCell<Answers>>) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|(known, cell)| *known != group || !Arc::ptr_eq(cell, stale));
    }

    /// Asks for the objects of a group.
    async fn ask(&self, group: usize) -> Result<Answers> {
        let objects = self.objects.iter().skip(group * GROUP).take(GROUP);
        let asked = objects.clone().map(|object| Asked { oid: object.id(), size: object.size }).collect();
        let question = Question { operation: "download", transfers: ["basic"], hash_algo: "sha256", objects: asked };
        let mut place = self.endpoint.place().await?;
        let mut answer = self.post(&place, &question).await;
        if place.ends && answer.as_ref().is_err_and(is_refusal) {
            // What a login gave for some minutes has run out.
            self.endpoint.forget(&place);
            place = self.endpoint.place().await?;
            answer = self.post(&place, &question).await;
        }
        let answer = answer.map_err(explain)?;
        if answer.transfer.as_deref().is_some_and(|transfer| transfer != "basic") {
            return Err(Error::new(
                Kind::Unsupported,
                "LFS_TRANSFER_UNKNOWN",
                format!("{place} insists on a transfer of its own"),
            ));
        }
        let mut found: HashMap<String, Found> =
            answer.objects.into_iter().map(|found| (found.oid.to_ascii_lowercase(), found)).collect();
        Ok(objects.map(|object| action(&object.id(), found.remove(&object.id()), &place).map_err(Arc::new)).collect())
    }

    async fn post(&self, place: &Place, question: &Question<'_>) -> Result<Answer, Failure> {
        let fault = |error| Error::internal("writing a question to LFS").because(error);
        let body = Bytes::from(serde_json::to_vec(question).map_err(fault)?);
        let url = place.below("objects/batch")?;
        let headers = [(ACCEPT, MEDIA_TYPE.to_owned()), (CONTENT_TYPE, MEDIA_TYPE.to_owned())];
        let request = Request::post(&url, place.authorization.as_ref(), body).headers(&headers);
        let reply = self.http.send(&request).await?;
        let document = read_document(reply, ANSWER_BYTES, &self.http).await?;
        serde_json::from_slice(&document).map_err(|error| {
            Error::unavailable("BAD_ANSWER", format!("reading what {place} says of LFS objects")).because(error).into()
        })
    }
}

/// Whether what was shown is not accepted, or not any more.
fn is_refusal(failure: &Failure) -> bool {
    matches!(failure.status().map(|status| status.as_u16()), Some(401 | 403))
}

fn explain(failure: Failure) -> Error {
    match failure {
        Failure::Refused(answer) if answer.status == StatusCode::NOT_FOUND => answer
            .error(Kind::NotFound, "LFS_NOT_FOUND", "there is no LFS, or it has none of the files asked for")
            .remedy("push them with `git lfs push --all`, or check that the credentials may read them"),
        failure => failure.into_error(),
    }
}

/// What a server says of the object `id`.
fn action(id: &str, found: Option<Found>, place: &Place) -> Result<Action> {
    let missing = || {
        Error::not_found("LFS_OBJECT_MISSING", format!("{place} does not have the LFS object {id}"))
            .remedy("push it with `git lfs push --all`")
            .fact("oid", id)
    };
    let mut found = found.ok_or_else(missing)?;
    match found.error {
        Some(Fault { code: 404 | 410 }) => return Err(missing()),
        Some(Fault { code }) => {
            let kind = if code == 429 || code >= 500 { Kind::Unavailable } else { Kind::Denied };
            let message = format!("{place} refuses the LFS object {id} (code {code})");
            return Err(Error::new(kind, "LFS_OBJECT_REFUSED", message).fact("oid", id));
        }
        None => {}
    }
    let download = found.actions.remove("download").ok_or_else(missing)?;
    let bad = || Error::corrupt("BAD_ANSWER", format!("{place} says of the LFS object {id} what makes no sense"));
    let url = place.base().join(&download.href).map(without_user_information).map_err(|_| bad())?;
    let stated = stated(download.header).ok_or_else(bad)?;
    let ours = place.authorization.clone().filter(|_| url.origin() == place.base().origin());
    Ok(Action { url, authorization: stated.or(ours) })
}

/// Headers that a server wants to be shown, if any; `None` for what HTTP cannot carry.
fn stated(headers: HashMap<String, String>) -> Option<Option<Authorization>> {
    let mut shown = Vec::with_capacity(headers.len());
    for (name, value) in headers {
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        shown.push((name.parse::<HeaderName>().ok()?, value));
    }
    Some((!shown.is_empty()).then(|| Authorization::Signed(Arc::new(Shown(shown)))))
}
