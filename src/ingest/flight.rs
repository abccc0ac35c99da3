//! One flight: everything of one revision fetched and sealed once, for whoever waits.
//!
//! The flight's task is aborted when the last waiter lets go. Small files go first and overlap widely, so that their seals share batches;
//! large ones overlap a little, since each keeps a fetcher and a sealer busy.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::arriving::{Arriving, SMALL_AT_A_TIME, Wanted};
use super::fetch;
use super::flying::{Bringing, Flying};
use super::plan;
use super::progress::Progress;
use super::small::{self, For};
use crate::catalog::checkpoints::Record;
use crate::catalog::{fills, forecasts};
use crate::digest::Digester;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::manifest::{EntryKind, Manifest};
use crate::places::Place;
use crate::source::Listing;

type Outcome = Option<std::result::Result<Arc<Manifest>, Arc<Error>>>;

/// A running or landed flight. Dropping the last handle ends it.
pub(super) struct Flight {
    key: String,
    revision: String,
    in_place: Option<Place>,
    progress: Arc<Progress>,
    arriving: Option<Arc<Arriving>>,
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
        arriving: Option<Arc<Arriving>>,
        work: impl Future<Output = Result<Manifest>> + Send + 'static,
    ) -> Arc<Self> {
        let (sender, outcome) = watch::channel(None);
        let task = tokio::spawn(async move {
            let _ = sender.send(Some(work.await.map(Arc::new).map_err(Arc::new)));
        });
        Arc::new(Self { key, revision, in_place, progress, arriving, outcome, task: task.abort_handle() })
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn revision(&self) -> &str {
        &self.revision
    }

    /// What its readers see, where it can have any.
    pub(super) fn arriving(&self) -> Option<&Arc<Arriving>> {
        self.arriving.as_ref()
    }

    /// Where the bytes stay, if they do.
    pub(super) fn in_place(&self) -> Option<&Place> {
        self.in_place.as_ref()
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    /// Whether it has nothing for who joins it now: it failed, or what it saw of files that stay where they are may have been swept since, as no
    /// row named it any more.
    pub(super) fn is_over(&self) -> bool {
        match &*self.outcome.borrow() {
            Some(Ok(_)) => self.in_place.is_some(),
            Some(Err(_)) => true,
            None => self.outcome.has_changed().is_err(),
        }
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
pub(super) async fn fly(flying: &Arc<Flying>, arriving: &Arc<Arriving>, listing: Listing) -> Result<Manifest> {
    let shared = &flying.shared;
    let key = flying.key.clone();
    let rows = shared.store.catalog().read(move |tx| fills::of_flight(tx, &key)).await?;
    let sizes = plan::Sizes::of(&listing, &shared.settings)?;
    let kept: Vec<u64> = rows.iter().map(|row| row.number).collect();
    let number = || shared.next_number.fetch_add(1, Ordering::Relaxed);
    let plan = plan::plan(listing, rows, number);
    // What jobs read already does not wait for what nobody waits for.
    let _slot = tokio::select! {
        slot = shared.slot() => Some(slot?),
        () = arriving.until_read() => None,
    };
    // What an earlier run left without a row is of no use to anybody.
    shared.store.disk().clear_flight(&flying.key, &kept)?;
    let occupied = shared.store.disk().occupied_by(&flying.key)?;
    shared.admit_flight(&flying.progress, &sizes, &plan, occupied).await?;
    flying.growth.begin(plan.here_bytes + plan.missing_bytes);
    let settled = plan.settled.iter().filter(|entry| matches!(entry.kind, EntryKind::File { .. }));
    settled.for_each(|_| flying.progress.sealed());
    shared.store.disk().begin_flight(&flying.key)?;
    let shape = arriving.tree().shape();
    let owner = flying.owner.clone();
    let learned = shared.store.catalog().read(move |tx| forecasts::order(tx, &owner, &shape)).await?;
    let large: Vec<u32> = plan.large.iter().filter_map(|file| Some(arriving.find(&file.path)?.0)).collect();
    let missing_bytes = plan.missing_bytes;
    arriving.begin(plan, learned)?;
    let bringing = Bringing { flying: flying.clone(), arriving: arriving.clone() };
    let begun = Instant::now();
    let brought = bring(&bringing, large).await;
    if let Err(error) = &brought {
        keep_units(arriving, error).await;
    }
    brought?;
    shared.note_rate(&flying.owner, &flying.place, missing_bytes, begun.elapsed()).await;
    arriving.manifest()
}

/// Fetches what the queue gives until every file is sealed.
async fn bring(bringing: &Bringing, large: Vec<u32>) -> Result<()> {
    let arriving = &bringing.arriving;
    // A stream that makes way for a reader stands still and keeps its place at the source: one place must be left for what it makes way for.
    let places = bringing.flying.source.reads_at_a_time().saturating_sub(1).max(1);
    let turns = futures_util::stream::unfold(arriving.clone(), move |arriving| async move {
        let turn = arriving.next_small(SMALL_AT_A_TIME.min(places)).await?;
        Some((turn, arriving))
    });
    let small = turns
        .map(|turn| small::small(bringing.clone(), For::Background(turn)))
        .buffer_unordered(limits::PUBLISH_BATCH_FILES)
        .try_collect::<()>();
    let large = futures_util::stream::iter(large)
        .map(|entry| fetch::large(bringing.clone(), entry))
        .buffer_unordered(limits::FETCHES_PER_SOURCE)
        .try_collect::<()>();
    let streams = limits::STREAMS.min(places);
    let background = (0..streams).map(|_| async {
        loop {
            fetch::range(bringing, arriving.next_background().await).await?;
        }
    });
    let wanted = (0..limits::FETCHES_PER_SOURCE).map(|_| async {
        loop {
            match arriving.next_wanted().await {
                Wanted::Small(entry) => small::small(bringing.clone(), For::Reader(entry)).await?,
                Wanted::Units(step) => fetch::range(bringing, step).await?,
            }
        }
    });
    let sealed = async {
        tokio::try_join!(small, large)?;
        // Of what readers waited for some may still be on its way.
        arriving.until_whole().await;
        Ok(())
    };
    tokio::select! {
        outcome = sealed => outcome,
        failed = futures_util::future::try_join_all(background) => failed.map(|_: Vec<()>| ()),
        failed = futures_util::future::try_join_all(wanted) => failed.map(|_: Vec<()>| ()),
        failed = arriving.record_units() => failed,
    }
}

/// What came before a failure is for the next attempt.
async fn keep_units(arriving: &Arriving, error: &Error) {
    if error.kind() != Kind::NoSpace
        && let Err(second) = arriving.record_now().await
    {
        tracing::warn!(error = %second.report(), "what was filled before a failure could not be recorded");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::EntryPath;

    fn begin(in_place: bool, work: impl Future<Output = Result<Manifest>> + Send + 'static) -> Arc<Flight> {
        let place = in_place.then(|| Place { datastore: "models".into(), below: EntryPath::default() });
        Flight::start("k".into(), "r".into(), place, Arc::default(), None, work)
    }

    #[tokio::test]
    async fn who_comes_late_joins_only_what_has_something_for_him() {
        for (in_place, works, is_over) in
            [(false, true, false), (true, true, true), (false, false, true), (true, false, true)]
        {
            let outcome = if works { Manifest::new(Vec::new()) } else { Err(Error::unavailable("X", "x")) };
            let flight = begin(in_place, async { outcome });
            assert_eq!(flight.landed().await.is_ok(), works);
            assert_eq!(flight.is_over(), is_over, "in place: {in_place}, works: {works}");
        }
        let flight = begin(false, std::future::pending());
        assert!(!flight.is_over());
        flight.task.abort();
        assert!(flight.landed().await.is_err() && flight.is_over(), "it ended without an outcome");
    }
}
