//! The tasks of checkpoints: begun, cancelled, and paused when the daemon is drained.
//!
//! One task for each checkpoint that is being brought in; whoever begins another for the same one waits for the end of the one before.
//! A task that a bug of ours ends, a panic mostly, is begun again from what is durable, [`BEGUN_AGAIN`] times; then it fails its checkpoint like any
//! other fault: the record must not stay `filling` with nobody at work.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::task::JoinHandle;

use super::progress::Progress;
use super::{Filled, Ingests, Shared, lock};
use crate::catalog::checkpoints::Record;
use crate::error::{Error, Kind, Result};
use crate::source::{Credentials, Source};

/// How long a drain waits for what is to be recorded: longer than a disk with full buffers needs, shorter than whoever waits for the drain.
const RECORDING: Duration = Duration::from_secs(10);

/// Times that an ingest is begun again which a bug of ours has ended.
const BEGUN_AGAIN: u32 = 2;

/// Pause before it is.
const BEGUN_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What fills one checkpoint.
pub(super) struct Task {
    at_pause: AtPause,
    pub(super) progress: Arc<Progress>,
    join: JoinHandle<()>,
}

/// What becomes of a task when the daemon is drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtPause {
    /// It is stopped where it is: the next start of the daemon goes on with it.
    Stops,
    /// It ends by itself, once what came is recorded: the next start waits for its sender.
    Leaves,
    /// Whoever receives from its sender ends it.
    Stays,
}

/// Reason of what is not begun, or goes no further, since the daemon is being drained.
const DRAINING: &str = "DRAINING";

/// A daemon that is being drained begins nothing.
pub fn draining() -> Error {
    Error::unavailable(DRAINING, "ckptd takes no new work: it is being drained")
        .remedy("try again when it has been restarted")
}

/// Whether something ended for that reason.
pub(super) fn is_draining(error: &Error) -> bool {
    error.reason() == DRAINING
}

impl Ingests {
    /// Stops filling a checkpoint; returns when nothing of it runs any more. Bytes stay until the flight is removed.
    pub async fn cancel(&self, id: &str) {
        let task = lock(&self.0.tasks).remove(id);
        if let Some(task) = task {
            task.join.abort();
            let _ = task.join.await;
        }
        self.0.let_go_of_secrets(id).await;
    }

    /// Begins no filling any more and stops what can be resumed: records stay `filling` with their durable units, as after a
    /// crash but for what the last moment brought, which is recorded before, and the next start of the daemon goes on with them. So are uploads that
    /// survive. Whoever receives from a sender ends that himself ([`Ingests::until_paused`]): only he can say so to the sender.
    pub async fn pause(&self) {
        self.0.paused.send_replace(true);
        let mut changes = self.changes();
        let left = async {
            // They stay where they are found until they have ended: a removal has to wait for them.
            while self.has_tasks(AtPause::Leaves) {
                // Lagging is a change.
                let _ = changes.recv().await;
            }
        };
        let recorded = async { tokio::join!(self.record_arrived(), left) };
        if tokio::time::timeout(RECORDING, recorded).await.is_err() {
            tracing::warn!("the disk takes long: what the last moment brought will be fetched or sent again");
        }
        let mut stopped = self.take_tasks(AtPause::Stops);
        stopped.extend(self.take_tasks(AtPause::Leaves));
        stopped.iter().for_each(|task| task.join.abort());
        for task in stopped {
            let _ = task.join.await;
        }
    }

    fn has_tasks(&self, at_pause: AtPause) -> bool {
        lock(&self.0.tasks).values().any(|task| task.at_pause == at_pause)
    }

    fn take_tasks(&self, at_pause: AtPause) -> Vec<Task> {
        lock(&self.0.tasks).extract_if(|_, task| task.at_pause == at_pause).map(|(_, task)| task).collect()
    }

    /// Makes what has arrived so far durable, of every flight.
    async fn record_arrived(&self) {
        let flights: Vec<_> = lock(&self.0.flights).values().filter_map(Weak::upgrade).collect();
        for arriving in flights.iter().filter_map(|flight| flight.arriving()) {
            if let Err(error) = arriving.record_now().await {
                tracing::warn!(error = %error.report(), "what arrived last could not be recorded and will be fetched again");
            }
        }
    }

    /// Whether nothing is begun any more.
    pub fn is_paused(&self) -> bool {
        *self.0.paused.borrow()
    }

    /// Resolves when nothing is begun any more.
    pub async fn until_paused(&self) {
        self.0.until_paused().await;
    }

    /// Whether new work may begin.
    ///
    /// # Errors
    /// `DRAINING`.
    pub fn admit(&self) -> Result<()> {
        if self.is_paused() { Err(draining()) } else { Ok(()) }
    }

    /// Makes a checkpoint that was being filled by a sender as if nothing had been sent: it waits, and nothing of it is on disk.
    pub async fn start_over(&self, record: &Record) {
        self.cancel(&record.id).await;
        self.0.give_back(record).await;
        self.note_change(&record.id);
    }

    /// Lets a task stay when the daemon is drained: what it fills cannot be gone on with after all, and is all here.
    pub fn let_stay(&self, id: &str) {
        self.0.let_stay(id);
    }

    pub(super) fn spawn<F, W>(&self, record: &Record, at_pause: AtPause, work: W)
    where
        W: FnOnce(Arc<Progress>) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let progress = Arc::new(Progress::default());
        let work = work(progress.clone());
        let (shared, own) = (self.0.clone(), record.clone());
        let mut tasks = lock(&self.0.tasks);
        // One after the other: a task that finds its record decided already has nothing to do.
        let before = tasks.remove(&record.id).map(|task| task.join);
        let present = progress.clone();
        let join = tokio::spawn(async move {
            if let Some(before) = before {
                let _ = AbortOnDrop(before).await;
            }
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                shared.conclude_panic(&own, at_pause == AtPause::Stops).await;
            }
            lock(&shared.tasks).retain(|id, task| *id != own.id || !Arc::ptr_eq(&task.progress, &present));
            let _ = shared.changes.send(own.id);
        });
        tasks.insert(record.id.clone(), Task { at_pause, progress, join });
    }
}

impl Shared {
    /// [`Shared::fill_from_source`]; where a bug of ours ends it, it is begun again from what is durable of it a few times, and its readers wait.
    pub(super) async fn fill_despite_bugs(
        self: &Arc<Self>,
        record: &Record,
        source: &(impl Fn() -> Result<Arc<dyn Source>> + Sync),
        secrets_given: bool,
        progress: &Arc<Progress>,
    ) -> Result<Filled> {
        let mut left = BEGUN_AGAIN;
        loop {
            let filling = self.fill_from_source(record, source, secrets_given, progress);
            let ended = AssertUnwindSafe(filling).catch_unwind().await;
            let is_bug = ended
                .as_ref()
                .map_or(true, |filled| filled.as_ref().is_err_and(|error| error.kind() == Kind::Internal));
            if !is_bug || left == 0 {
                return ended.unwrap_or_else(|panic| resume_unwind(panic));
            }
            left -= 1;
            tracing::error!(checkpoint = record.id, "a bug of ours ended an ingest, which begins again");
            let message =
                "a bug of ours ended its filling, which the log shows; it goes on with what is durable".to_owned();
            if let Err(error) = self.record_event("INGEST_BEGUN_AGAIN", record, message).await {
                tracing::warn!(error = %error.report(), "a new beginning could not be noted");
            }
            tokio::time::sleep(BEGUN_AGAIN_AFTER).await;
            progress.restart();
        }
    }

    /// As [`Ingests::let_stay`].
    pub(super) fn let_stay(&self, id: &str) {
        if let Some(task) = lock(&self.tasks).get_mut(id) {
            task.at_pause = AtPause::Stays;
        }
        // A drain that waits for it waits no longer.
        let _ = self.changes.send(id.to_owned());
    }

    /// Has the secrets of a request held beyond the process, or what was held for the record let go where there are none.
    pub(super) async fn hold_secrets(self: &Arc<Self>, record: &Record, given: Credentials) {
        if given.is_empty() {
            return self.let_go_of_secrets(&record.id).await;
        }
        let (shared, record) = (self.clone(), record.clone());
        let hold = move || {
            let holder = &shared.settings.secrets;
            holder.hold(&record, &given);
            // Who was cancelled meanwhile has found nothing to let go of.
            if !*shared.paused.borrow() && !lock(&shared.tasks).contains_key(&record.id) {
                holder.let_go(&record.id);
            }
        };
        let _ = tokio::task::spawn_blocking(hold).await;
    }

    pub(super) async fn let_go_of_secrets(&self, id: &str) {
        let (holder, id) = (self.settings.secrets.clone(), id.to_owned());
        let _ = tokio::task::spawn_blocking(move || holder.let_go(&id)).await;
    }

    pub(super) async fn until_paused(&self) {
        // Cannot fail: the sender is ours.
        let _ = self.paused.subscribe().wait_for(|paused| *paused).await;
    }
}

/// A task that another waits for and that ends with it.
struct AbortOnDrop(JoinHandle<()>);

impl Future for AbortOnDrop {
    type Output = ();

    fn poll(mut self: std::pin::Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<()> {
        std::pin::Pin::new(&mut self.0).poll(context).map(|_| ())
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::catalog::checkpoints::{self, Origin, State};
    use crate::catalog::events;
    use crate::catalog::retention::Standing;
    use crate::ingest::{MakeRoom, Settings};
    use crate::source::{Credentials, SourceKind};
    use crate::store::Store;
    use crate::units::now_unix_ms;

    fn record(id: &str) -> Record {
        let uri = "https://example.org/x".to_owned();
        let origin = Origin { kind: SourceKind::Web.to_string(), uri, options: std::collections::BTreeMap::new() };
        Record::new(id, id, origin, now_unix_ms())
    }

    fn no_room() -> MakeRoom {
        Arc::new(|_| Box::pin(async { Ok((0, Standing::default())) }))
    }

    /// A store on a real disk: tmpfs has no holes.
    async fn opened() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap();
        let path = directory.path().to_owned();
        let store = tokio::task::spawn_blocking(move || Store::open(&path)).await.unwrap().unwrap();
        (directory, store)
    }

    async fn decided(store: &Store, id: &'static str) -> Record {
        for _ in 0..6000 {
            let found = store.catalog().read(move |tx| checkpoints::get(tx, id)).await.unwrap().unwrap();
            if !matches!(found.state, State::New | State::Filling) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("`{id}` is still not decided");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_fails_the_checkpoint_and_an_event_says_so() {
        let (_directory, store) = opened().await;
        let ingests =
            Ingests::new(store.clone(), Arc::new(|_, _, _| panic!("on purpose")), no_room(), Settings::default());
        let new = record("a");
        let row = new.clone();
        store.catalog().write(move |tx| checkpoints::insert(tx, &row)).await.unwrap();
        ingests.start(&new, Credentials::default());
        let failed = decided(&store, "a").await;
        assert_eq!(failed.state, State::Failed);
        assert!(failed.failure.unwrap().message.contains("a bug of ours"));
        let events = store.catalog().read(|tx| events::after(tx, 0, 100)).await.unwrap();
        assert!(events.iter().any(|event| event.kind == "CHECKPOINT_FAILED" && event.checkpoint == "a"), "{events:?}");
        let ended = async {
            while ingests.progress("a").is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), ended).await.expect("it is at work still");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_panic_has_ended_is_begun_again() {
        let (_directory, store) = opened().await;
        let begun = AtomicU32::new(0);
        let connect = move |_: &_, _: &_, _: &_| match begun.fetch_add(1, Ordering::Relaxed) {
            0 => panic!("on purpose"),
            _ => Err(Error::invalid("SECOND_TIME", "it was begun again")),
        };
        let ingests = Ingests::new(store.clone(), Arc::new(connect), no_room(), Settings::default());
        let new = record("a");
        let row = new.clone();
        store.catalog().write(move |tx| checkpoints::insert(tx, &row)).await.unwrap();
        ingests.start(&new, Credentials::default());
        assert_eq!(decided(&store, "a").await.failure.unwrap().reason, "SECOND_TIME");
        let events = store.catalog().read(|tx| events::after(tx, 0, 100)).await.unwrap();
        assert_eq!(events.iter().filter(|event| event.kind == "INGEST_BEGUN_AGAIN").count(), 1);
    }

    #[tokio::test]
    async fn what_is_paused_admits_nothing() {
        let (_directory, store) = opened().await;
        let ingests =
            Ingests::new(store, Arc::new(|_, _, _| panic!("nothing is begun")), no_room(), Settings::default());
        ingests.admit().unwrap();
        ingests.pause().await;
        ingests.until_paused().await;
        assert_eq!(ingests.admit().unwrap_err().reason(), "DRAINING");
        ingests.start(&record("a"), Credentials::default());
        assert!(ingests.progress("a").is_none());
    }
}
