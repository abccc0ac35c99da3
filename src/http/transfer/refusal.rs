//! Why a request of the transfer protocol is not done, as a status and a sentence that the client shows to its user.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::catalog::checkpoints::Failure;
use crate::error::{Error, Kind, NO_ROOM, NO_ROOM_REMEDY};

/// See the module's page; which status means what to the client stands in [`super`].
#[derive(Debug)]
pub(super) enum Refusal {
    /// No token, or none of ours.
    NotTheToken,
    /// The request does not keep to the protocol.
    Malformed(&'static str),
    /// The piece is larger than any may be.
    PieceTooLarge,
    /// Another piece is expected: the one that begins here.
    Expected(u64),
    /// It passes: the same may be asked again.
    Busy(&'static str),
    /// Nothing can be sent to this checkpoint, or by this upload, any more.
    Gone(String),
    /// What was sent is not what its sender says.
    WrongDigest,
    /// What the record failed with, or what kept it from being looked at.
    Failed(Error),
}

impl Refusal {
    /// Of a record that failed.
    pub(super) fn recorded(failure: &Failure) -> Self {
        Self::Failed(failure.to_error())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Never one that the client repeats (502, 503, 504) or asks the status after (409): an error is final here.
const fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid | Kind::Unsupported | Kind::Corrupt => StatusCode::UNPROCESSABLE_ENTITY,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::AlreadyExists | Kind::WrongState | Kind::Cancelled => StatusCode::GONE,
        Kind::Denied => StatusCode::FORBIDDEN,
        Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Kind::Unavailable | Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let plain = |status: StatusCode, text: String| (status, text).into_response();
        match self {
            Self::NotTheToken => {
                let text = "the token is not one of this daemon's checkpoints; ask for it again with `ckptctl get`";
                (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], text).into_response()
            }
            Self::Malformed(what) => plain(StatusCode::BAD_REQUEST, what.to_owned()),
            Self::PieceTooLarge => {
                let text = format!("a piece has {} bytes at most; send smaller ones", super::PIECE_BYTES);
                plain(StatusCode::PAYLOAD_TOO_LARGE, text)
            }
            Self::Expected(offset) => {
                let text = format!("{{\"expected_offset\": {offset}}}");
                (StatusCode::CONFLICT, [(header::CONTENT_TYPE, "application/json")], text).into_response()
            }
            Self::Busy(what) => {
                let text = format!("{what}; try again");
                (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], text).into_response()
            }
            Self::Gone(what) => plain(StatusCode::GONE, what),
            Self::WrongDigest => plain(
                StatusCode::UNPROCESSABLE_ENTITY,
                "the SHA-512 of what arrived is not the one stated; upload it again".to_owned(),
            ),
            // Whoever has the token is a tenant: how full the host is, is not for him to know.
            Self::Failed(error) if error.tells_of_the_host() => {
                plain(status(error.kind()), format!("{NO_ROOM}; {NO_ROOM_REMEDY}"))
            }
            Self::Failed(error) => plain(status(error.kind()), error.report()),
        }
    }
}
