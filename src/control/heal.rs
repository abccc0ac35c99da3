//! What rotted comes back from its source without anybody asking, where that takes nothing that only a person has.
//!
//! A checkpoint that is ready and whose bytes or manifest are lost is filled again as by `retry`, if its source is fetched without secrets of a
//! request and vouches for what it gives. Before its record changes the source is asked whether it still has that revision, since until
//! then whoever attaches it is served at once: where it has not, the record stays as it is, for a person to decide; where it cannot be
//! reached, it is asked again later. What is right of it is not fetched again, and jobs that have it keep it. If fetching the rest fails the
//! record is ready with its loss as before, and it is tried again when the next scrub has ended or the daemon starts.
//!
//! Looked at when the daemon starts and when a scrub has ended, never while draining. One checkpoint after the other is asked for; how many fill
//! at a time is the ingests' business.

use std::time::Duration;

use super::Floors;
use crate::catalog::checkpoints::{self as rows, Record, State};
use crate::catalog::losses::{self, is_loss};
use crate::error::{Error, Kind, Result};
use crate::source::{Credentials, SourceKind, is_never_met_again};

/// How soon a source that could not be reached is asked again.
const AGAIN_AFTER: Duration = Duration::from_secs(600);

impl Floors {
    /// Fills again what is lost, for as long as it runs; never ends.
    pub async fn heal_from_sources(&self) {
        loop {
            tracing::trace!("a look for what is lost");
            let all_well = self.heal_what_is_lost().await.unwrap_or_else(|error| {
                tracing::warn!(error = %error.report(), "looking for lost bytes failed");
                false
            });
            tokio::select! {
                () = self.scrubber.until_ended() => {}
                () = tokio::time::sleep(AGAIN_AFTER), if !all_well => {}
            }
        }
    }

    /// Whether nothing is to be tried again later.
    async fn heal_what_is_lost(&self) -> Result<bool> {
        let mut all_well = true;
        for record in self.store.catalog().read(rows::damaged).await? {
            if self.ingests.is_paused() || !comes_back(&record) {
                continue;
            }
            match self.heal(&record).await {
                Ok(()) => {}
                Err(error) => {
                    all_well &= error.kind() != Kind::Unavailable;
                    tracing::warn!(checkpoint = record.id, error = %error.report(), "lost bytes do not come back");
                }
            }
        }
        Ok(all_well)
    }

    async fn heal(&self, record: &Record) -> Result<()> {
        self.ingests.check_again(record).await?;
        let (floors, id) = (self.clone(), record.id.clone());
        // In a task of its own: a stop must not come between the record and its filling.
        let begun = async move {
            let mark = move |tx: &rusqlite::Connection| {
                let Some(record) = rows::get(tx, &id)?.filter(comes_back) else { return Ok(None) };
                losses::begin_healing(tx, &id)?;
                Ok(Some(Record { state: State::Filling, ..record }))
            };
            if let Some(record) = floors.store.catalog().write(mark).await? {
                tracing::info!(checkpoint = record.id, "what is lost of it is fetched again");
                floors.start_unless_sent(&record, Credentials::default());
            }
            Ok(())
        };
        tokio::spawn(begun).await.map_err(|error| Error::internal("healing ended early").because(error))?
    }
}

/// Whether something of a record is lost that can be fetched again by itself.
fn comes_back(record: &Record) -> bool {
    record.state == State::Ready
        && record.failure.as_ref().is_some_and(is_loss)
        && record.in_place.is_none()
        && !record.secrets_given
        && record.origin.kind.parse().is_ok_and(SourceKind::is_fetched)
        && !is_never_met_again(&record.revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::checkpoints::{Failure, Origin};

    #[test]
    fn only_what_needs_nobody_comes_back_by_itself() {
        let origin = Origin { kind: "web".into(), uri: "u".into(), options: Default::default() };
        let failure = Some(Failure::of(&Error::corrupt("BYTES_ROTTEN", "x")));
        let lost = Record { state: State::Ready, revision: "etag".into(), failure, ..Record::new("i", "n", origin, 0) };
        assert!(comes_back(&lost));
        let of_kind = |kind: &str| Record {
            origin: Origin { kind: kind.into(), uri: "u".into(), options: Default::default() },
            ..lost.clone()
        };
        let other = Failure::of(&Error::corrupt("ANOTHER", "x"));
        for (why, record) in [
            ("it fills already", Record { state: State::Filling, ..lost.clone() }),
            ("nothing is lost", Record { failure: None, ..lost.clone() }),
            ("something else is wrong", Record { failure: Some(other), ..lost.clone() }),
            ("its secrets are gone", Record { secrets_given: true, ..lost.clone() }),
            ("nobody vouches for it", Record { revision: "unpinned:1".into(), ..lost.clone() }),
            ("it was uploaded", of_kind("upload")),
            ("it was captured", of_kind("directory")),
        ] {
            assert!(!comes_back(&record), "{why}");
        }
    }
}
