//! Work on a file system that may never answer: in a thread of its own, and given up once it makes no more steps.
//!
//! A thread that waits for a server behind a mount cannot be ended. So whoever waits for *it* gives up after a while without any step; the
//! thread keeps its turn for as long as it is held up, and stops at its next step once it is not. There are few turns for
//! each datastore: that many threads are lost to one that does not answer, whoever asks how often, and none of another one's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::error::{Error, Kind, Result};
use crate::limits;

/// Looks at the steps in one patience: how much later than it a silence is noticed at most.
const LOOKS: u32 = 8;

/// The turns of all datastores, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct AllTurns(Arc<BTreeMap<String, Arc<Turns>>>);

impl AllTurns {
    /// Turns for each of `names`, none of them shared.
    pub(super) fn of<'a>(names: impl Iterator<Item = &'a String>) -> Self {
        Self(Arc::new(names.map(|name| (name.clone(), Arc::new(Turns::new()))).collect()))
    }

    pub(super) fn get(&self, name: &str) -> Option<Arc<Turns>> {
        self.0.get(name).cloned()
    }
}

/// Threads that one datastore may hold up.
#[derive(Debug)]
pub(super) struct Turns {
    free: Arc<Semaphore>,
    /// Steps of all who have a turn: those who wait for one are patient as long as others get on.
    steps: Arc<AtomicU64>,
}

/// Counts the steps of one piece of work.
#[derive(Debug, Default)]
pub(super) struct Pace {
    own: AtomicU64,
    all: Arc<AtomicU64>,
    given_up: AtomicBool,
}

impl Pace {
    /// Says that something was answered.
    ///
    /// # Errors
    /// Cancelled once nobody waits for this work any more.
    pub(super) fn step(&self) -> Result<()> {
        self.own.fetch_add(1, Ordering::Relaxed);
        self.all.fetch_add(1, Ordering::Relaxed);
        if self.given_up.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Cancelled, "LISTING_GIVEN_UP", "nobody waits for this listing any more"));
        }
        Ok(())
    }
}

impl Turns {
    fn new() -> Self {
        Self { free: Arc::new(Semaphore::new(limits::LISTINGS_PER_DATASTORE)), steps: Arc::default() }
    }

    /// What `work` gives, which runs in a thread that may be held up. Cancel-safe: the work ends with its next step then.
    ///
    /// # Errors
    /// `silent` after `patience` without a step of the work, or, before it has a turn, of anybody's. What the work fails with.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        patience: Duration,
        silent: impl Fn() -> Error,
        work: impl FnOnce(&Pace) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let free = self.free.clone();
        let turn = while_it_moves(patience, || self.steps.load(Ordering::Relaxed), free.acquire_owned()).await;
        let turn = turn.ok_or_else(&silent)?.map_err(|_| Error::internal("listing is over"))?;
        let pace = Arc::new(Pace { all: self.steps.clone(), ..Pace::default() });
        let waiting = GiveUpOnDrop(pace.clone());
        let working = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&pace)
        });
        let done = while_it_moves(patience, || waiting.0.own.load(Ordering::Relaxed), working).await;
        done.ok_or_else(&silent)?.map_err(|error| Error::internal("reading files").because(error))?
    }
}

/// Tells the thread that nobody waits for it.
struct GiveUpOnDrop(Arc<Pace>);

impl Drop for GiveUpOnDrop {
    fn drop(&mut self) {
        self.0.given_up.store(true, Ordering::Relaxed);
    }
}

/// What `awaited` gives; `None` once `steps` has not changed for `patience`.
async fn while_it_moves<T>(patience: Duration, steps: impl Fn() -> u64, awaited: impl Future<Output = T>) -> Option<T> {
    tokio::pin!(awaited);
    let (mut seen, mut silent_looks) = (steps(), 0);
    loop {
        if let Ok(done) = tokio::time::timeout(patience / LOOKS, &mut awaited).await {
            return Some(done);
        }
        let now = steps();
        silent_looks = if now == seen { silent_looks + 1 } else { 0 };
        seen = now;
        if silent_looks >= LOOKS {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(80);

    fn silent() -> Error {
        Error::unavailable("SILENT", "no answer")
    }

    #[tokio::test]
    async fn work_that_gets_on_may_take_longer_than_the_patience() {
        let work = |pace: &Pace| {
            (0..20).try_for_each(|_| {
                std::thread::sleep(PATIENCE / 8);
                pace.step()
            })
        };
        Turns::new().run(PATIENCE, silent, work).await.unwrap();
    }

    #[tokio::test]
    async fn so_many_threads_are_held_up_and_no_more_and_all_come_back() {
        let turns = Turns::new();
        let (told, began) = mpsc::channel();
        let (let_go, gates): (Vec<_>, Vec<_>) =
            (0..limits::LISTINGS_PER_DATASTORE + 3).map(|_| mpsc::channel::<()>()).unzip();
        for gate in gates {
            let told = told.clone();
            let work = move |pace: &Pace| {
                told.send(()).unwrap();
                let _ = gate.recv();
                pace.step()
            };
            assert_eq!(turns.run(PATIENCE, silent, work).await.unwrap_err().reason(), "SILENT");
        }
        assert_eq!(began.try_iter().count(), limits::LISTINGS_PER_DATASTORE);
        drop(let_go);
        turns.run(Duration::from_secs(10), silent, |pace| pace.step()).await.unwrap();
    }
}
