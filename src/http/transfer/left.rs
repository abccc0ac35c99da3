//! Uploads that a dead daemon had under way, and their senders, who ask for it meanwhile and go on where they were told that they stood.
//!
//! What is recorded of one is taken as it is ([`Ingests::left_of`]), what was acknowledged behind that is read from its tail
//! ([`local::go_on`]). Both must meet. Where they do not, the tail is of an earlier boot, or there is no room for what it needs, the record waits for another upload, and nothing of this one is
//! left: whoever still sends it is told so.

use std::sync::Arc;

use super::upload::Upload;
use super::uploads::{Transfers, extracts, id_of};
use crate::archive::Member;
use crate::catalog::checkpoints::Record;
use crate::error::{Error, Kind, Result};
#[cfg(doc)]
use crate::ingest::Ingests;
use crate::ingest::{Decoded, Kept};
use crate::source::{local, recorded};

impl Transfers {
    /// Goes on with what an earlier run of the daemon had under way for `records`; those that nobody can go on with wait for another upload.
    pub async fn await_senders(self: &Arc<Self>, records: Vec<Record>) {
        for record in records {
            match self.left(&record).await {
                Ok(Some((id, left, kept))) => self.take_up(record, &id, left, kept),
                Ok(None) => self.ingests.start_over(&record).await,
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NoSpace) => {
                    tracing::warn!(checkpoint = record.id, error = %error.report(), "an upload cannot be gone on with");
                    self.ingests.start_over(&record).await;
                }
                // Of this moment: nothing of it is given up for that.
                Err(error) => {
                    tracing::error!(checkpoint = record.id, error = %error.report(), "an upload waits for the next start");
                }
            }
        }
    }

    /// The id of the upload of `record`, what is left of it, and what of that is recorded.
    async fn left(&self, record: &Record) -> Result<Option<(String, local::Left, Kept)>> {
        let (disk, flight) = (Arc::clone(self.store.disk()), record.id.clone());
        let opened = tokio::task::spawn_blocking(move || disk.open_tail(&flight)).await;
        let opened = opened.map_err(|error| Error::internal("opening a tail ended early").because(error))??;
        let Some((tail, said)) = opened else { return Ok(None) };
        let Some(id) = id_of(record, &said.about) else { return Ok(None) };
        let Some(recorded) = self.ingests.left_of(record, decode).await? else { return Ok(None) };
        let left = local::Left::new((tail, said), recorded.entries)?;
        Ok(Some((id, left, recorded.kept)))
    }

    fn take_up(self: &Arc<Self>, record: Record, id: &str, left: local::Left, kept: Kept) {
        let (expected, ended) = (left.end(), left.ended());
        let checkpoint = record.id.clone();
        let (feed, entries) = match local::go_on(left, extracts(&record)) {
            Ok(connected) => connected,
            Err(error) => {
                tracing::error!(checkpoint, error = %error.report(), "an upload waits for the next start");
                return;
            }
        };
        tracing::info!(checkpoint, bytes = expected, "an upload waits for its sender");
        let upload =
            self.go_on(record.clone(), Upload::left(id, record.created_ms, feed, (expected, ended)), entries, kept);
        if let Some(digest) = ended {
            tokio::spawn(async move { upload.end_again(digest).await });
        }
    }
}

fn decode(row: &[u8]) -> Result<Decoded<Member>> {
    let (member, _) = recorded::decode(row)?;
    let file = recorded::file_of(&member);
    Ok((member, file))
}
