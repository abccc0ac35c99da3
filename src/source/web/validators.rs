//! What tells that a file at an HTTP server is still the one that was listed: `ETag` and `Last-Modified`.
//!
//! A strong `ETag` pins the bytes; so does, for want of better, `Last-Modified` together with the size. Reads send the strong one back as
//! `If-Match`, and whatever validator an answer bears must be the one that was listed.

use reqwest::header::{ETAG, HeaderMap, HeaderName, IF_MATCH, LAST_MODIFIED};

use super::super::http::Failure;
use super::super::source_changed;
use super::probe::Probe;
use crate::error::{Error, Result};

/// The validators of one file: see the module's page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Validators {
    pub(super) etag: Option<String>,
    pub(super) last_modified: Option<String>,
}

impl Validators {
    /// Those that an answer bears.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        Self { etag: text_of(headers, ETAG), last_modified: text_of(headers, LAST_MODIFIED) }
    }

    /// Names exactly these bytes, as far as the server vouches for it; `None` where it does not.
    pub(super) fn pin(&self, size: Option<u64>) -> Option<String> {
        match (self.strong_etag(), &self.last_modified, size) {
            (Some(etag), _, _) => Some(format!("etag:{etag}")),
            (None, Some(date), Some(size)) => Some(format!("modified:{date};{size}")),
            _ => None,
        }
    }

    /// The header that has the server itself refuse to send another file.
    pub(super) fn condition(&self) -> Option<(HeaderName, String)> {
        self.strong_etag().map(|etag| (IF_MATCH, etag.to_owned()))
    }

    /// Whether an answer is of the file that was listed, as far as it says.
    ///
    /// # Errors
    /// `SOURCE_CHANGED`.
    pub(super) fn check(&self, headers: &HeaderMap, what: &str) -> Result<()> {
        let now = Self::of(headers);
        if let (Some(then), Some(now)) = (&self.etag, &now.etag) {
            let same = then.trim_start_matches("W/") == now.trim_start_matches("W/");
            return if same { Ok(()) } else { Err(source_changed(what, "its ETag changed")) };
        }
        match (&self.last_modified, &now.last_modified) {
            (Some(then), Some(now)) if then != now => Err(source_changed(what, "it was modified")),
            _ => Ok(()),
        }
    }

    /// Whether what a server says of a file now is of the one that was listed, of `size` bytes.
    ///
    /// # Errors
    /// `SOURCE_CHANGED`; why it could not be asked.
    pub(super) fn confirm(&self, probe: Result<Probe>, size: Option<u64>, what: &str) -> Result<()> {
        match probe {
            Ok(probe) if probe.size.is_some() && size.is_some() && probe.size != size => {
                Err(source_changed(what, "its size changed"))
            }
            Ok(probe) => self.check(&probe.headers, what),
            // Also that it is gone: what was being sent went on.
            Err(error) => Err(error),
        }
    }

    fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| etag.starts_with('"'))
    }
}

/// The error of a read: what a refused condition or range means of a file that was listed.
pub(super) fn explain(failure: Failure, what: &str) -> Error {
    match failure.status().map(|status| status.as_u16()) {
        Some(412) => source_changed(what, "it changed"),
        Some(416) => source_changed(what, "it became shorter"),
        _ => failure.into_error(),
    }
}

/// The header `name` as text; `None` where it is empty or no text.
pub(super) fn text_of(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    let text = headers.get(name)?.to_str().ok()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strong_validator_pins() {
        let pin = |etag: Option<&str>, date: Option<&str>, size| {
            Validators { etag: etag.map(str::to_owned), last_modified: date.map(str::to_owned) }.pin(size)
        };
        assert_eq!(pin(Some("\"a\""), Some("d"), Some(1)).as_deref(), Some("etag:\"a\""));
        assert_eq!(pin(Some("W/\"a\""), Some("d"), Some(1)).as_deref(), Some("modified:d;1"));
        for (etag, date, size) in [(None, None, Some(1)), (Some("W/\"a\""), None, Some(1)), (None, Some("d"), None)] {
            assert_eq!(pin(etag, date, size), None);
        }
    }

    #[test]
    fn an_answer_of_another_file_is_a_change() {
        let answer = |etag: &str| HeaderMap::from_iter([(ETAG, etag.parse().unwrap())]);
        let listed = Validators::of(&answer("W/\"a\""));
        assert!(listed.check(&answer("\"a\""), "x").is_ok());
        assert!(listed.check(&HeaderMap::new(), "x").is_ok());
        assert_eq!(listed.check(&answer("\"b\""), "x").unwrap_err().reason(), "SOURCE_CHANGED");
    }
}
