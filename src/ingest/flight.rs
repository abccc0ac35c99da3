//! One flight: everything of one revision fetched and sealed once, for whoever waits.
//!
//! The flight's task is aborted when the last waiter lets go. Small files go first and overlap widely, so that their seals share batches;
//! large ones overlap a little, since each keeps a fetcher and a sealer busy.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::fetch::{self, Flying};
use super::plan::{self, Plan};
use super::progress::Progress;
use crate::catalog::checkpoints::Record;
use crate::catalog::fills;
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::limits;
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::places::Place;
use crate::source::Listing;

type Outcome = Option<std::result::Result<Arc<Manifest>, Arc<Error>>>;

/// A running or landed flight. Dropping the last handle ends it.
#[derive(Debug)]
pub(super) struct Flight {
    key: String,
    revision: String,
    in_place: Option<Place>,
    progress: Arc<Progress>,
    outcome: watch::Receiver<Outcome>,
    task: AbortHandle,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Names the bytes a record asks for at a revision, per owner: what one owner fetches tells another nothing.
pub(super) fn key(record: &Record, revision: &str) -> String {
    let mut digester = Digester::new();
    let options = record.origin.options.iter().flat_map(|(key, value)| [key.as_str(), value.as_str()]);
    for part in [record.owner.as_str(), &record.origin.kind, &record.origin.uri, revision].into_iter().chain(options) {
        digester.update(&(part.len() as u64).to_le_bytes());
        digester.update(part.as_bytes());
    }
    digester.finish().to_hex()[..32].to_owned()
}

impl Flight {
    /// Starts a flight whose tree `work` brings, or leaves `in_place`.
    pub(super) fn start(
        key: String,
        revision: String,
        in_place: Option<Place>,
        progress: Arc<Progress>,
        work: impl Future<Output = Result<Manifest>> + Send + 'static,
    ) -> Arc<Self> {
        let (sender, outcome) = watch::channel(None);
        let task = tokio::spawn(async move {
            let _ = sender.send(Some(work.await.map(Arc::new).map_err(Arc::new)));
        });
        Arc::new(Self { key, revision, in_place, progress, outcome, task: task.abort_handle() })
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn revision(&self) -> &str {
        &self.revision
    }

    /// Where the bytes stay, if they do.
    pub(super) fn in_place(&self) -> Option<&Place> {
        self.in_place.as_ref()
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    /// Waits until everything is sealed; the manifest.
    pub(super) async fn landed(&self) -> Result<Arc<Manifest>> {
        let mut outcome = self.outcome.clone();
        let landed = outcome
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Error::internal("the flight ended without an outcome (a panic, see the log)"))?;
        match landed.as_ref() {
            Some(Ok(manifest)) => Ok(manifest.clone()),
            Some(Err(error)) => Err(error.share()),
            None => Err(Error::internal("the flight ended without an outcome")),
        }
    }
}

/// Fetches and seals everything that is listed.
pub(super) async fn fly(flying: &Arc<Flying>, listing: Listing) -> Result<Manifest> {
    let shared = &flying.shared;
    let key = flying.key.clone();
    let rows = shared.store.catalog().read(move |tx| fills::of_flight(tx, &key)).await?;
    let sizes = plan::Sizes::of(&listing, shared.settings.checkpoint_bytes)?;
    let kept: Vec<u64> = rows.iter().map(|row| row.number).collect();
    let number = || shared.next_number.fetch_add(1, Ordering::Relaxed);
    let Plan { settled: mut entries, small, large, here_bytes, missing_bytes } = plan::plan(&listing, rows, number);
    drop(listing);
    let _slot = shared.slot().await?;
    // What an earlier run left without a row is of no use to anybody.
    shared.store.disk().clear_flight(&flying.key, &kept)?;
    plan::admit(missing_bytes, shared.available_bytes().await?)?;
    flying.progress.expect(sizes.known_bytes, sizes.files);
    flying.progress.resume(here_bytes);
    entries.iter().filter(|entry| matches!(entry.kind, EntryKind::File { .. })).for_each(|_| flying.progress.sealed());
    shared.store.disk().begin_flight(&flying.key)?;
    let small = futures_util::stream::iter(small)
        .map(|file| fetch::small(flying.clone(), file))
        .buffer_unordered(limits::PUBLISH_BATCH_FILES)
        .try_collect::<Vec<Entry>>();
    let large = futures_util::stream::iter(large)
        .map(|file| fetch::large(flying.clone(), file))
        .buffer_unordered(limits::FETCHES_PER_SOURCE)
        .try_collect::<Vec<Entry>>();
    let (small, large) = tokio::try_join!(small, large)?;
    entries.extend(small);
    entries.extend(large);
    Manifest::new(entries)
}
