//! What an answer that is no success means for the receiver.

use std::fmt;

use chrono::{DateTime, Utc};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::error::{Error, Kind, LATER, RETRY_AFTER_FACT};

/// Longest wait believed of a server: beyond a day an operator should look.
const RETRY_AFTER_MAX_S: u64 = 24 * 60 * 60;

/// Why there is no reply.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The server answered with a status that is no success.
    Refused(Box<Answer>),
    /// There is no answer, or none that may be looked at.
    Failed(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Failure {
    /// The status of the answer, if there is one.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused(answer) => Some(answer.status),
            Self::Failed(_) => None,
        }
    }

    /// The error, by HTTP's own meaning of the status.
    pub(crate) fn into_error(self) -> Error {
        match self {
            Self::Refused(answer) => answer.fault(),
            Self::Failed(error) => error,
        }
    }
}

/// Head of an answer that is no success.
pub(crate) struct Answer {
    /// Its status.
    pub(crate) status: StatusCode,
    /// Its headers.
    pub(crate) headers: HeaderMap,
    /// The beginning of its body.
    pub(crate) body: Vec<u8>,
    /// The URL that gave it, for people.
    pub(crate) shown: String,
    /// Whether credentials were sent with the request.
    pub(crate) authorized: bool,
}

impl Answer {
    /// The header `name` as text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// An error about this answer, with its status and the wait it asks for.
    pub(crate) fn error(&self, kind: Kind, reason: &str, why: &str) -> Error {
        let error = Error::new(kind, reason, format!("fetching {}: {why} (HTTP {})", self.shown, self.status.as_u16()))
            .fact("http_status", self.status.as_u16());
        match self.retry_after_s() {
            Some(seconds) if kind == Kind::Unavailable => error.fact(RETRY_AFTER_FACT, seconds),
            _ => error,
        }
    }

    /// The error by HTTP's own meaning of the status (RFC 9110): 408, 425, 429 and 5xx may pass, the rest is final.
    pub(crate) fn fault(&self) -> Error {
        match self.status.as_u16() {
            401 if self.authorized => self
                .error(Kind::Denied, "CREDENTIALS_REFUSED", "the credentials are not accepted")
                .remedy("check the credentials, and that they have not expired"),
            401 => self
                .error(Kind::Denied, "CREDENTIALS_REQUIRED", "credentials are asked for")
                .remedy("give credentials for this source"),
            403 => self
                .error(Kind::Denied, "ACCESS_REFUSED", "access is refused")
                .remedy("check that the credentials may read it"),
            404 | 410 => self.error(Kind::NotFound, "NO_SUCH_FILE", "nothing is there").remedy("check the address"),
            407 => self
                .error(Kind::Denied, "PROXY_REFUSED", "the proxy asks for credentials")
                .remedy("give the daemon's proxy variable user name and password"),
            408 | 425 => self.error(Kind::Unavailable, "SERVER_BUSY", "the server gave up waiting").remedy(LATER),
            429 => self.error(Kind::Unavailable, "RATE_LIMITED", "the server asks to slow down").remedy(LATER),
            500.. => self.error(Kind::Unavailable, "SERVER_ERROR", "the server failed").remedy(LATER),
            _ => self
                .error(Kind::Invalid, "REQUEST_REFUSED", "the server refuses the request")
                .remedy("check the address and the options"),
        }
    }

    /// Seconds to wait: `Retry-After` in either form (RFC 9110, 10.2.3), else `t` of a `RateLimit` header, as
    /// Hugging Face sends it.
    pub(crate) fn retry_after_s(&self) -> Option<u64> {
        let seconds = match self.header(RETRY_AFTER.as_str()) {
            Some(text) => seconds_until(text.trim(), Utc::now()),
            None => self.header("ratelimit").and_then(seconds_of_rate_limit),
        };
        seconds.map(|seconds| seconds.min(RETRY_AFTER_MAX_S))
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({} from {})", self.status.as_u16(), self.shown)
    }
}

fn seconds_until(text: &str, now: DateTime<Utc>) -> Option<u64> {
    if let Ok(seconds) = text.parse() {
        return Some(seconds);
    }
    let date = DateTime::parse_from_rfc2822(text).ok()?;
    Some(u64::try_from((date.with_timezone(&Utc) - now).num_seconds()).unwrap_or(0))
}

/// `"resolvers";r=0;t=123`: requests left, seconds until there are more.
fn seconds_of_rate_limit(text: &str) -> Option<u64> {
    text.split(';').find_map(|field| field.trim().strip_prefix("t=")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &str)]) -> Answer {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let status = StatusCode::from_u16(status).unwrap();
        Answer { status, headers, body: Vec::new(), shown: "http://x/".into(), authorized: false }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for status in [408, 425, 429, 500, 502, 503, 504, 522] {
            assert_eq!(answer(status, &[]).fault().kind(), Kind::Unavailable, "{status}");
        }
        for (status, kind) in [
            (300, Kind::Invalid),
            (400, Kind::Invalid),
            (401, Kind::Denied),
            (403, Kind::Denied),
            (404, Kind::NotFound),
            (410, Kind::NotFound),
            (418, Kind::Invalid),
        ] {
            assert_eq!(answer(status, &[]).fault().kind(), kind, "{status}");
        }
    }

    #[test]
    fn the_wait_is_understood_in_every_form() {
        let wait = |headers: &[(&'static str, &str)]| answer(429, headers).retry_after_s();
        assert_eq!(wait(&[("retry-after", "17")]), Some(17));
        assert_eq!(wait(&[("retry-after", "99999999")]), Some(RETRY_AFTER_MAX_S));
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]), Some(0));
        assert_eq!(wait(&[("ratelimit", "\"resolvers\";r=0;t=55")]), Some(55));
        assert_eq!(wait(&[("retry-after", "soon")]), None);
        assert_eq!(wait(&[]), None);
        let now = DateTime::parse_from_rfc2822("Wed, 21 Oct 2015 07:28:00 GMT").unwrap().with_timezone(&Utc);
        assert_eq!(seconds_until("Wed, 21 Oct 2015 07:30:00 GMT", now), Some(120));
    }
}
