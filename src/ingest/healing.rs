//! Filling again what is ready but for something that is lost: nothing that is right is fetched, and a failure changes nothing.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use super::{KEPT_AT_A_TIME, Shared};
use crate::catalog::checkpoints::{self, Failure, Record};
use crate::catalog::losses;
use crate::error::{Error, Kind, NO_ROOM, Result};
use crate::manifest::EntryKind;
use crate::source::{Listing, What};

impl Shared {
    /// Gives the flight `key` what is right of a damaged record's tree and is listed still.
    ///
    /// # Errors
    /// Those of the catalog.
    pub(super) async fn share_right(&self, record: &Record, key: &str, listing: &Listing) -> Result<()> {
        let Some(tree) = record.healing_manifest() else { return Ok(()) };
        let manifest = match self.store.catalog().read(move |tx| checkpoints::manifest(tx, &tree)).await {
            // It is what is lost: all is fetched.
            Err(error) if error.kind() == Kind::Corrupt => return Ok(()),
            manifest => manifest?,
        };
        let is_file = |what: &What| matches!(what, What::File(_));
        let listed: HashSet<&[u8]> =
            listing.entries.iter().filter(|entry| is_file(&entry.what)).map(|entry| entry.path.as_bytes()).collect();
        let mut files = manifest.entries().iter().filter_map(|entry| match entry.kind {
            EntryKind::File { size, digest, .. } if listed.contains(entry.path.as_bytes()) => Some(losses::Listed {
                path: entry.path.as_bytes().to_vec(),
                digest,
                size,
                number: self.next_number.fetch_add(1, Ordering::Relaxed),
            }),
            _ => None,
        });
        loop {
            let batch: Vec<_> = files.by_ref().take(KEPT_AT_A_TIME).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let key = key.to_owned();
            self.store.catalog().write(move |tx| losses::share_right(tx, &tree, &key, &batch)).await?;
        }
    }
}

/// What is recorded of a checkpoint that is still damaged, since fetching what it lost failed with `error`.
pub(super) fn still_lost(loss: &Failure, error: &Error) -> Failure {
    let why = if error.tells_of_the_host() { NO_ROOM.to_owned() } else { error.chain() };
    let lost = loss.message.split(AGAIN).next().unwrap_or_default();
    Failure { message: format!("{lost}{AGAIN}{why}"), ..loss.clone() }
}

/// Between what is lost and why it did not come.
const AGAIN: &str = "; fetching it again failed: ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_says_why_it_is_still_there_and_only_the_last_time() {
        let loss = Failure::of(&Error::corrupt("BYTES_ROTTEN", "bytes of it rotted").remedy("retry"));
        let once = still_lost(&loss, &Error::not_found("SOURCE_GONE", "it is gone"));
        assert_eq!(once.message, "bytes of it rotted; fetching it again failed: it is gone");
        assert_eq!((once.reason.as_str(), once.remedy.as_str()), ("BYTES_ROTTEN", "retry"));
        let twice = still_lost(&once, &Error::new(Kind::NoSpace, "NO_SPACE", "10 GB are left"));
        assert_eq!(twice.message, format!("bytes of it rotted; fetching it again failed: {NO_ROOM}"));
    }
}
