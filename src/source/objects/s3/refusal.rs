//! What S3 and what speaks it mean by their refusals: the `Code` of the error's document counts, the status where there is none.

use super::super::super::http::Answer;
use super::super::xml::Document;
use crate::error::{Error, Kind, LATER};

/// Longest code that is believed and shown; real ones stay below 40.
const CODE_BYTES: usize = 64;

/// The `Code` and `Region` of a refusal's document.
pub(super) fn code_and_region(answer: &Answer) -> (String, Option<String>) {
    let mut fields = Document::read(&answer.body, "").unwrap_or_default().fields;
    let is_word = |code: &String| code.len() <= CODE_BYTES && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (fields.remove("Code").filter(is_word).unwrap_or_default(), fields.remove("Region"))
}

/// The error that a refusal means.
pub(super) fn fault(answer: &Answer) -> Error {
    let (code, _) = code_and_region(answer);
    let error = |kind, reason: &str, why: &str| answer.error(kind, reason, why);
    let fault = match (code.as_str(), answer.status.as_u16()) {
        ("NoSuchBucket", _) => error(Kind::NotFound, "NO_SUCH_BUCKET", "there is no such bucket")
            .remedy("check the bucket's name, and the endpoint or region"),
        ("NoSuchKey" | "NoSuchVersion", _) => {
            error(Kind::NotFound, "NO_SUCH_OBJECT", "there is no such object").remedy("check the path and its case")
        }
        (_, 401 | 403) | ("UnsupportedAlgorithm" | "MissingSecurityHeader" | "AuthorizationHeaderMalformed", _)
            if !answer.authorized && code != "InvalidObjectState" && code != "RequestTimeTooSkewed" =>
        {
            error(Kind::Denied, "CREDENTIALS_REQUIRED", "access without credentials is refused")
                .remedy("give key_id and secret for this source")
        }
        ("ExpiredToken" | "TokenRefreshRequired" | "ExpiredTokenException", _) => {
            error(Kind::Denied, "CREDENTIALS_EXPIRED", "the credentials have expired")
                .remedy("retry with fresh credentials")
        }
        ("RequestTimeTooSkewed", _) => error(Kind::Denied, "CLOCK_SKEWED", "this host's clock is too far off")
            .remedy("set the clock of this host, then retry"),
        ("InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "InvalidSecurity", _) => {
            error(Kind::Denied, "CREDENTIALS_REFUSED", "the credentials are not accepted")
                .remedy("check key_id, secret and, for temporary credentials, token")
        }
        ("AuthorizationHeaderMalformed", _) | ("PermanentRedirect" | "TemporaryRedirect", _) | (_, 301 | 307) => {
            error(Kind::Invalid, "WRONG_REGION", "the bucket is in another region").remedy("give the option `region`")
        }
        ("InvalidObjectState", _) => {
            error(Kind::WrongState, "OBJECT_ARCHIVED", "the object is archived").remedy("restore it first, then retry")
        }
        ("SlowDown" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded" | "TooManyRequests", _) => {
            error(Kind::Unavailable, "RATE_LIMITED", "the store asks to slow down").remedy(LATER)
        }
        ("RequestTimeout" | "InternalError" | "ServiceUnavailable" | "OperationAborted", _) => {
            error(Kind::Unavailable, "SERVER_ERROR", "the store failed").remedy(LATER)
        }
        ("AccessDenied" | "AllAccessDisabled" | "AccountProblem", _) => {
            error(Kind::Denied, "ACCESS_REFUSED", "access is refused")
                .remedy("check that the credentials may read and list it (s3:GetObject, s3:ListBucket)")
        }
        _ => answer.fault(),
    };
    if code.is_empty() {
        return fault;
    }
    let known = fault.reason() != "REQUEST_REFUSED";
    let fault = if known { fault } else { error(Kind::Invalid, "REQUEST_REFUSED", &format!("the store says {code}")) };
    fault.fact("code", code)
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;
    use reqwest::header::HeaderMap;

    use super::*;

    fn refused(status: u16, code: &str, authorized: bool) -> Error {
        let body = if code.is_empty() { String::new() } else { format!("<Error><Code>{code}</Code></Error>") };
        let status = StatusCode::from_u16(status).unwrap();
        let shown = "http://h/b/k".to_owned();
        fault(&Answer { status, headers: HeaderMap::new(), body: body.into_bytes(), shown, authorized })
    }

    #[test]
    fn refusals_are_told_apart() {
        for (status, code, authorized, kind, reason) in [
            (404, "NoSuchBucket", true, Kind::NotFound, "NO_SUCH_BUCKET"),
            (404, "NoSuchKey", true, Kind::NotFound, "NO_SUCH_OBJECT"),
            (400, "ExpiredToken", true, Kind::Denied, "CREDENTIALS_EXPIRED"),
            (403, "RequestTimeTooSkewed", true, Kind::Denied, "CLOCK_SKEWED"),
            (403, "SignatureDoesNotMatch", true, Kind::Denied, "CREDENTIALS_REFUSED"),
            (403, "AccessDenied", true, Kind::Denied, "ACCESS_REFUSED"),
            (403, "AccessDenied", false, Kind::Denied, "CREDENTIALS_REQUIRED"),
            (403, "", false, Kind::Denied, "CREDENTIALS_REQUIRED"),
            (301, "PermanentRedirect", true, Kind::Invalid, "WRONG_REGION"),
            (400, "UnsupportedAlgorithm", false, Kind::Denied, "CREDENTIALS_REQUIRED"),
            (400, "InvalidArgument", true, Kind::Invalid, "REQUEST_REFUSED"),
            (403, "InvalidObjectState", false, Kind::WrongState, "OBJECT_ARCHIVED"),
            (503, "SlowDown", true, Kind::Unavailable, "RATE_LIMITED"),
            (400, "RequestTimeout", true, Kind::Unavailable, "SERVER_ERROR"),
            (500, "", true, Kind::Unavailable, "SERVER_ERROR"),
            (429, "", true, Kind::Unavailable, "RATE_LIMITED"),
        ] {
            let error = refused(status, code, authorized);
            assert_eq!((error.kind(), error.reason()), (kind, reason), "{status} {code}");
        }
    }
}
