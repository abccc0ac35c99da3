//! The end of every fill: a file that is filled and digested becomes a blob and an entry of the tree.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};

use super::Shared;
use super::progress::Progress;
use super::seal::Digested;
use crate::catalog::uploads;
use crate::error::{Error, Result};
use crate::limits::{self, UNIT_BYTES};
use crate::manifest::{Entry, EntryKind};
use crate::names::EntryPath;
use crate::source::Recorded;
use crate::store::Sealing;
use crate::store::filling::Filling;

/// Large files that are sealed at a time while others come: they wait for one thread, so this bounds what waits.
const LARGE_AT_A_TIME: usize = 8;

/// Bytes of small files that wait for more: what is not sealed is lost with the daemon.
const WAITING_BYTES: u64 = 16 * UNIT_BYTES;

/// How long the first of them waits while others come.
const WAITING_FOR: Duration = Duration::from_secs(1);

/// A file of a flight that is filled and digested.
pub(super) struct Filled {
    pub(super) path: EntryPath,
    /// Its number in the flight's directory.
    pub(super) number: u64,
    pub(super) size: u64,
    pub(super) executable: bool,
    pub(super) digested: Digested,
    /// Whether its bytes are durable already.
    pub(super) synced: bool,
    /// Entries of an upload that are durable with it.
    pub(super) sent: Vec<uploads::Sent>,
}

/// Seals `filled`; durable on return.
///
/// # Errors
/// Those of the store.
pub(super) async fn publish(shared: &Shared, flight: &str, progress: &Progress, filled: Filled) -> Result<Entry> {
    let Filled { path, number, size, executable, digested: Digested { digest, chunks }, synced, sent } = filled;
    let flight = flight.to_owned();
    shared.store.publish(Sealing { flight, number, path: path.clone(), size, digest, chunks, synced, sent }).await?;
    progress.sealed();
    Ok(Entry { path, kind: EntryKind::File { size, executable, digest } })
}

/// Files of a stream on their way to be blobs while others come. Small ones wait until there are many or until it is said, which costs one
/// flush; large ones go at once. Dropping it ends what is under way.
pub(super) struct Publishing {
    shared: Arc<Shared>,
    flight: String,
    progress: Arc<Progress>,
    waiting: Vec<Filled>,
    waiting_bytes: u64,
    /// Since when the first of them does.
    since: Instant,
    small: JoinSet<Result<Entry>>,
    large: JoinSet<Result<Entry>>,
    sealed: Vec<Entry>,
    /// Wants to hear of entries that are recorded.
    recorded: Option<Arc<dyn Recorded>>,
}

impl Publishing {
    /// Files of `flight`; `recorded` is told of the entries that are recorded with them.
    pub(super) fn new(
        shared: &Arc<Shared>,
        flight: &str,
        progress: &Arc<Progress>,
        recorded: Option<Arc<dyn Recorded>>,
    ) -> Self {
        Self {
            shared: Arc::clone(shared),
            flight: flight.to_owned(),
            progress: Arc::clone(progress),
            waiting: Vec::new(),
            waiting_bytes: 0,
            since: Instant::now(),
            small: JoinSet::new(),
            large: JoinSet::new(),
            sealed: Vec::new(),
            recorded,
        }
    }

    /// How many files were added.
    pub(super) fn files(&self) -> usize {
        self.waiting.len() + self.small.len() + self.large.len() + self.sealed.len()
    }

    /// Takes a file over; waits while too many are on their way.
    ///
    /// # Errors
    /// Those of the store, of any file.
    pub(super) async fn add(&mut self, filled: Filled) -> Result<()> {
        if filled.size > UNIT_BYTES {
            self.large.spawn(self.publish(filled));
            while self.large.len() > LARGE_AT_A_TIME {
                self.sealed.extend(joined(self.large.join_next().await)?);
            }
            return Ok(());
        }
        if self.waiting.is_empty() {
            self.since = Instant::now();
        }
        self.waiting_bytes += filled.size;
        self.waiting.push(filled);
        let are_many = self.waiting.len() >= limits::PUBLISH_BATCH_FILES || self.waiting_bytes >= WAITING_BYTES;
        if are_many || self.since.elapsed() >= WAITING_FOR { self.go().await } else { Ok(()) }
    }

    /// Sends the small ones that wait on their way, once most of those before them are sealed.
    ///
    /// # Errors
    /// Those of the store, of any file.
    pub(super) async fn go(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        while self.small.len() + self.waiting.len() > limits::PUBLISH_BATCH_FILES {
            let Some(entry) = joined(self.small.join_next().await)? else { break };
            self.sealed.push(entry);
        }
        for filled in std::mem::take(&mut self.waiting) {
            self.small.spawn(self.publish(filled));
        }
        self.waiting_bytes = 0;
        Ok(())
    }

    /// Waits until every file is sealed; their entries.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn settle(&mut self) -> Result<Vec<Entry>> {
        self.go().await?;
        while let Some(entry) = joined(self.small.join_next().await)? {
            self.sealed.push(entry);
        }
        while let Some(entry) = joined(self.large.join_next().await)? {
            self.sealed.push(entry);
        }
        Ok(std::mem::take(&mut self.sealed))
    }

    fn publish(&self, filled: Filled) -> impl Future<Output = Result<Entry>> + Send + 'static {
        let (shared, flight, progress) = (Arc::clone(&self.shared), self.flight.clone(), Arc::clone(&self.progress));
        let recorded = self.recorded.clone();
        async move {
            let rows: Vec<_> = filled.sent.iter().map(|(position, _)| *position).collect();
            let entry = publish(&shared, &flight, &progress, filled).await?;
            if let Some(recorded) = recorded {
                rows.into_iter().for_each(|position| recorded.whole(position));
            }
            Ok(entry)
        }
    }
}

/// The outcome of a task that publishes.
fn joined(joined: Option<std::result::Result<Result<Entry>, JoinError>>) -> Result<Option<Entry>> {
    let ended = |error| Error::internal("publishing a file ended early").because(error);
    joined.map(|joined| joined.map_err(ended)?).transpose()
}

/// Ends the blocking side of a fill when the async side goes away.
pub(super) struct GiveUp(pub(super) Arc<Filling>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}
