//! The transfer protocol, as the platform's own client speaks it: a checkpoint of type `local` is sent as a tar in many small `PUT`s.
//!
//! ```text
//! GET  /ping                                         200, to anybody
//! PUT  /upload         Content-Range, Upload-Id      200 {"expected_offset": n}
//! GET  /upload/status?upload_id=                     200 {"expected_offset": n}
//! POST /finalize       Upload-Id, {"hash": SHA-512}  200 {"state": "ready"}
//! ```
//! with `Authorization: Bearer <token>` ([`Tokens`]). A missing `Upload-Id` is `default`.
//!
//! # What the client makes of an answer
//! * It repeats `/ping` for 8.5 minutes unless the answer is 200, whatever the reason. So `/ping` says that a server is here and
//!   nothing else; a token that does not hold is refused at the first piece, where the client stops at once and shows why.
//! * It sends a piece again after 502, 503, 504 or a broken connection, for ever if need be: 503 is only ever said of what passes (no
//!   room for now, too many uploads for now). Whatever is final is another status with a sentence, which it shows.
//! * After 409 it asks for the status, and goes on if the expected offset is where its piece begins or ends. So a piece is taken whole or
//!   not at all: bodies are gathered first (at most [`PIECE_BYTES`], 413 above), and what a broken connection left of one is dropped.
//! * It waits 600 s for an answer. Extraction goes along with the upload, and `/finalize` waits 540 s at most for what is left of
//!   it; after that it answers 200 with `"state": "filling"`, since all bytes are here and the record tells the rest.
//!
//! # One upload at a time
//! Bytes are taken in order. A new `Upload-Id` whose first piece begins at 0 takes the place of whatever was under way: the person
//! who starts again must not wait for what was interrupted, and the interrupted client is told so if it is still there (410). So does the
//! id `default` when it begins at 0 again. Any other piece of an unknown upload is 410: it was interrupted (an expiry, a restart of the host)
//! and cannot go on. A wrong digest at `/finalize` is 422 and changes nothing: the right one may follow, or a new upload.
//!
//! An upload without a byte for `http.upload_idle_s` is dropped: its bytes go, the record waits on. A body that stops coming is given up sooner
//! (503); of a first piece that does nothing is left, for an upload begins with a whole piece. An archive that breaks the rules, or a
//! full disk, fails the record; then every request gets its sentence until the record is retried.
//!
//! # Surviving
//! A daemon that is killed, drained or replaced by a newer one goes on with every upload where its client was told that it stood: what was
//! acknowledged is in the upload's tail ([`Tail`](crate::disk::Tail)), which of a large file is the file itself, or recorded ([`left`]). The client notices a broken connection, asks again, and goes on.
//! A daemon that is drained takes no piece any more (503: the client tries until there is another daemon), and `/finalize` is left without an answer; what was
//! all here becomes ready still, or with the next daemon.
//!
//! A restart of the host ends an upload. So does a kill where what is sent is a compressed tar, or has large files with holes, as the platform's client
//! never sends it. Clients are told to start again then (410).
//!
//! # Cost
//! A piece costs one keyed hash, one look-up in memory, one queue, and one write to the page cache: for the tail, and then once more where it belongs; of a large file there at once. No row is read, and the
//! bytes are not copied otherwise between the socket's buffer and the reader of the tar, unless they come in small runs. Of one checkpoint two bodies at
//! most are in memory ([`places`]).

mod chunk;
mod left;
mod places;
mod refusal;
mod upload;
mod uploads;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Request, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};

#[cfg(doc)]
use crate::source::local::Tokens;
use crate::source::local::{Bearer, PIECE_BYTES};
use chunk::Body as Gathered;
use refusal::Refusal;
use uploads::Finalized;
pub use uploads::Transfers;

type Answer = Result<Response, Refusal>;

/// The paths of the protocol.
pub(super) fn routes() -> Router<Arc<Transfers>> {
    Router::new()
        .route("/ping", get(ping))
        .route("/upload", put(upload))
        .route("/upload/status", get(status))
        .route("/finalize", post(finalize))
}

/// `GET /ping`.
async fn ping() -> Response {
    json("{}".to_owned())
}

/// `PUT /upload`.
async fn upload(State(transfers): State<Arc<Transfers>>, request: Request<Body>) -> Answer {
    let (head, body) = request.into_parts();
    let asked = chunk::Range::of(&head.headers).and_then(|range| Ok((range, chunk::upload_id(&head.headers)?)));
    let asked = bearer(&transfers, &head.headers).and_then(|bearer| asked.map(|(range, id)| (bearer, range, id)));
    // The body is taken off the connection whatever the answer: a client that still sends would not read it.
    let (bearer, range, id) = match asked {
        Ok(asked) => asked,
        Err(refusal) => {
            chunk::pass_over(body, transfers.patience()).await;
            return Err(refusal);
        }
    };
    // Kept until the piece has been taken: it is in memory for as long.
    let _place = transfers.place(bearer).await?;
    let piece = Gathered::gather(body, range.length(), transfers.patience()).await?;
    let expected = transfers.take(bearer, id, range, piece).await?;
    Ok(json(format!("{{\"expected_offset\": {expected}}}")))
}

/// `GET /upload/status`.
async fn status(State(transfers): State<Arc<Transfers>>, address: Uri, headers: HeaderMap) -> Answer {
    let bearer = bearer(&transfers, &headers)?;
    let id = chunk::asked_upload_id(address.query().unwrap_or_default());
    let expected = transfers.expected(bearer, &id).await?;
    Ok(json(format!("{{\"expected_offset\": {expected}}}")))
}

/// `POST /finalize`.
async fn finalize(State(transfers): State<Arc<Transfers>>, request: Request<Body>) -> Answer {
    let (head, body) = request.into_parts();
    let digest = chunk::stated_digest(body, transfers.patience()).await;
    let bearer = bearer(&transfers, &head.headers)?;
    let state = match transfers.finalize(bearer, chunk::upload_id(&head.headers)?, digest?).await? {
        Finalized::Ready => "ready",
        Finalized::Filling => "filling",
    };
    Ok(json(format!("{{\"state\": \"{state}\"}}")))
}

fn bearer<'a>(transfers: &'a Transfers, headers: &'a HeaderMap) -> Result<Bearer<'a>, Refusal> {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = value.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim);
    token.and_then(|token| transfers.tokens().check(token)).ok_or(Refusal::NotTheToken)
}

fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}
