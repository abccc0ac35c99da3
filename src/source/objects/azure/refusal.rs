//! What Azure's Blob service means by its refusals: the header `x-ms-error-code` counts, which answers to HEAD bear too.

use chrono::{DateTime, Utc};

use super::super::super::http::Answer;
use super::super::xml::Document;
use crate::error::{Error, Kind, LATER};

/// The error that a refusal means; `expires` is when the credentials do.
pub(super) fn fault(answer: &Answer, expires: Option<DateTime<Utc>>) -> Error {
    let in_body = || Document::read(&answer.body, "").and_then(|mut document| document.fields.remove("Code"));
    let code = answer.header("x-ms-error-code").map(str::to_owned).or_else(in_body).unwrap_or_default();
    let error = |kind, reason: &str, why: &str| answer.error(kind, reason, why);
    let status = answer.status.as_u16();
    match (code.as_str(), status) {
        ("ContainerNotFound", _) => error(Kind::NotFound, "NO_SUCH_BUCKET", "there is no such container")
            .remedy("check the names of account and container"),
        ("BlobNotFound", _) => {
            error(Kind::NotFound, "NO_SUCH_OBJECT", "there is no such blob").remedy("check the path and its case")
        }
        ("BlobArchived" | "BlobBeingRehydrated", _) => {
            error(Kind::WrongState, "OBJECT_ARCHIVED", "the blob is archived").remedy("rehydrate it first, then retry")
        }
        ("ServerBusy", _) => error(Kind::Unavailable, "RATE_LIMITED", "the store asks to slow down").remedy(LATER),
        ("OperationTimedOut" | "InternalError", _) => {
            error(Kind::Unavailable, "SERVER_ERROR", "the store failed").remedy(LATER)
        }
        ("PublicAccessNotPermitted" | "NoAuthenticationInformation", _) | (_, 401 | 403 | 404)
            if !answer.authorized =>
        {
            // A private container is not found by those who may not see it.
            error(Kind::Denied, "CREDENTIALS_REQUIRED", "nothing is there for those without credentials")
                .remedy("check the address, or give sas or account_key for this source")
        }
        (_, 401 | 403) if expires.is_some_and(|at| at <= Utc::now()) => {
            error(Kind::Denied, "CREDENTIALS_EXPIRED", "the shared access signature has expired")
                .remedy("retry with a fresh one")
        }
        ("AuthenticationFailed" | "InvalidAuthenticationInfo", _) => {
            error(Kind::Denied, "CREDENTIALS_REFUSED", "the credentials are not accepted")
                .remedy("check sas or account_key, the account, and this host's clock")
        }
        (_, 403) => error(Kind::Denied, "ACCESS_REFUSED", "access is refused")
            .remedy("check that the credentials may read and list it (permissions r and l)"),
        _ => answer.fault(),
    }
}
