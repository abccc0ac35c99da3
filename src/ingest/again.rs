//! Filling again what was ready before and was evicted: it comes to the same tree, or it fails and says so.
//!
//! The record keeps its revision and its digest. The source is asked for that very revision where its kind can be (a commit); it is not fetched from
//! where it gives another, and what comes is taken only if its digest is the recorded one. A failure leaves both on record, so that
//! one sees what there was, and a retry asks for the same again.

use super::plan::{self, Sizes};
use super::{Ingests, Shared, extract, quota};
use crate::catalog::checkpoints::{Origin, Record};
use crate::catalog::{checkpoints, retention};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::source::{self, Credentials, Opened, SourceSpec};

/// What to do about a source that does not give any more what there was.
const REMEDY: &str = "create a new checkpoint of what the source has now, or bring back what it had and retry";

/// What the source of a record is asked for.
pub(super) fn spec_of(record: &Record) -> Result<SourceSpec> {
    let Origin { kind, uri, options } = record.origin.clone();
    let spec = SourceSpec { kind: kind.parse()?, uri, options };
    Ok(if record.manifest.is_some() { spec.at(&record.revision) } else { spec })
}

/// What is known of an archive before it is open.
pub(super) fn sizes_of(record: &Record) -> Sizes {
    match record.manifest {
        Some(_) => Sizes { files: record.files, known_bytes: record.logical_bytes },
        None => Sizes { files: 0, known_bytes: 0 },
    }
}

/// Refuses another revision than the one on record, before anything is fetched. One that nothing vouches for is judged by its bytes.
///
/// # Errors
/// `SOURCE_CHANGED` naming both.
pub(super) fn check_revision(record: &Record, found: &str) -> Result<()> {
    if record.manifest.is_none() || record.revision == found || source::is_never_met_again(found) {
        return Ok(());
    }
    Err(changed(record, found))
}

/// Refuses another tree than the one on record.
///
/// # Errors
/// `SOURCE_CHANGED` naming both revisions; those of the catalog.
pub(super) fn check_tree(tx: &rusqlite::Connection, record: &Record, found: &str, digest: &Digest) -> Result<()> {
    match retention::tree_of(tx, &record.id)? {
        Some((_, Some(before))) if before != *digest => {
            Err(changed(record, found).fact("recorded_digest", before).fact("found_digest", digest))
        }
        _ => Ok(()),
    }
}

/// Says of a source that has nothing there that it had it once.
pub(super) fn explain(record: &Record, error: Error) -> Error {
    if record.manifest.is_none() || error.kind() != Kind::NotFound {
        return error;
    }
    let message = format!("the source of `{}` no longer has the revision {}", record.name, record.revision);
    Error::not_found("SOURCE_GONE", message).fact("recorded_revision", &record.revision).because(error).remedy(REMEDY)
}

fn changed(record: &Record, found: &str) -> Error {
    let message = format!(
        "the source of `{}` has moved on from {} to {found}, and the checkpoint stays what it was",
        record.name, record.revision
    );
    Error::wrong_state("SOURCE_CHANGED", message)
        .fact("recorded_revision", &record.revision)
        .fact("found_revision", found)
        .remedy(REMEDY)
}

impl Ingests {
    /// Whether the source of a record has its revision still, without secrets of a request, before anything is done about it. A source that
    /// streams is taken at its word.
    ///
    /// # Errors
    /// What filling would fail with at once.
    pub async fn check_again(&self, record: &Record) -> Result<()> {
        let source = self.0.source_of(record, &Credentials::default())?;
        let opened = source.open(&plan::counter(&self.0.settings)).await.map_err(|error| explain(record, error))?;
        let Opened::Listed(listing) = opened else { return Ok(()) };
        check_revision(record, &revision_of(&listing, record))
    }
}

/// The revision of what is listed for a record: of an archive's members, where that is what is wanted.
pub(super) fn revision_of(listing: &source::Listing, record: &Record) -> String {
    match extract::Archive::of(listing, &record.origin.options) {
        Some(_) => format!("archive:{}", listing.revision),
        None => listing.revision.clone(),
    }
}

impl Shared {
    /// Notes a flight that brings entries one after the other, and charges its owner what is known of their bytes; what the record
    /// says of an earlier fill stays.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub(super) async fn note_streamed(&self, record: &Record, known_bytes: u64) -> Result<()> {
        let (record, flight, quotas) = (record.clone(), record.id.clone(), self.settings.quotas.clone());
        let note = move |tx: &rusqlite::Connection| {
            let (revision, files, bytes) = match record.manifest {
                Some(_) => (record.revision.as_str(), record.files, record.logical_bytes),
                None => ("", 0, 0),
            };
            checkpoints::set_listing(tx, &record.id, revision, &flight, files, bytes)?;
            quota::charge(tx, &quotas, &record.id, known_bytes)
        };
        self.store.catalog().write(note).await
    }

    /// Notes whether what fills a record uses secrets that came with the request.
    pub(super) async fn note_secrets(&self, record: &Record, given: bool) -> Result<()> {
        let id = record.id.clone();
        if given == record.secrets_given {
            return Ok(());
        }
        self.store.catalog().write(move |tx| retention::set_secrets_given(tx, &id, given)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::checkpoints::State;

    fn record(kind: &str, revision: &str, manifest: Option<Digest>) -> Record {
        let origin = Origin { kind: kind.into(), uri: "u".into(), options: Default::default() };
        let new = Record::new("i", "n", origin, 0);
        Record { state: State::Filling, revision: revision.into(), manifest, ..new }
    }

    #[test]
    fn only_what_was_ready_before_is_bound_to_its_revision() {
        let ready = Some(Digest::of(b"x"));
        for (before, recorded, found, refused) in [
            (None, "a", "b", false),
            (ready, "a", "a", false),
            (ready, "a", "b", true),
            (ready, "unpinned:1", "unpinned:2", false),
        ] {
            let checked = check_revision(&record("web", recorded, before), found);
            assert_eq!(checked.is_err(), refused, "{before:?} {recorded} {found}");
            if let Err(error) = checked {
                assert_eq!(error.reason(), "SOURCE_CHANGED");
                assert!(error.report().contains(recorded) && error.report().contains(found), "{}", error.report());
            }
        }
    }

    #[test]
    fn a_branch_that_was_resolved_is_asked_for_by_its_commit() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let branch = |kind, revision, manifest| {
            spec_of(&record(kind, revision, manifest)).unwrap().option("branch").map(str::to_owned)
        };
        let ready = Some(Digest::of(b"x"));
        assert_eq!(branch("huggingface", commit, ready).as_deref(), Some(commit));
        assert_eq!(branch("git", commit, ready).as_deref(), Some(commit));
        assert_eq!(branch("git", commit, None), None);
        assert_eq!(branch("web", commit, ready), None);
        assert_eq!(branch("huggingface", "v1", ready), None, "it is no commit");
    }

    #[test]
    fn what_is_gone_is_told_from_what_was_never_there() {
        let missing = || Error::not_found("NO_SUCH_OBJECT", "there is none");
        assert_eq!(explain(&record("web", "r", None), missing()).reason(), "NO_SUCH_OBJECT");
        assert_eq!(explain(&record("web", "r", Some(Digest::of(b"x"))), missing()).reason(), "SOURCE_GONE");
    }
}
