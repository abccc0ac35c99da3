//! Work on a file system that may never answer: in a thread of its own, and given up once it makes no more steps.
//!
//! A thread that waits for a server behind a mount cannot be ended. So whoever waits for *it* gives up after a while without any step; the
//! thread keeps its turn for as long as it is held up, and stops at its next step once it is not. There are few turns for
//! each datastore, and for each process or path that is captured: that many threads are lost to one that does not answer, whoever asks how
//! often, and none of another one's. There is no end of what may be captured, so there are so many turns in all besides; whoever has
//! as many processes that hold us up can keep other captures of this kind from being made, and nothing else.

use std::collections::BTreeMap;
use std::iter;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
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

/// The turns of whatever is captured, by its name, as long as anybody has one or may take one.
#[derive(Clone, Debug)]
pub(super) struct TurnsAsked {
    all: Arc<Turns>,
    each: Arc<Mutex<BTreeMap<String, Weak<Turns>>>>,
}

impl Default for TurnsAsked {
    fn default() -> Self {
        Self { all: Arc::new(Turns::so_many(limits::LISTINGS_OF_CAPTURES)), each: Arc::default() }
    }
}

impl TurnsAsked {
    /// The turns of `name`: the same ones for everybody who asks while they are in use.
    pub(super) fn of(&self, name: String) -> Arc<Turns> {
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        each.retain(|_, turns| turns.strong_count() > 0);
        if let Some(turns) = each.get(&name).and_then(Weak::upgrade) {
            return turns;
        }
        let turns = Arc::new(Turns { within: Some(Arc::clone(&self.all)), ..Turns::new() });
        each.insert(name, Arc::downgrade(&turns));
        turns
    }
}

/// Threads that one datastore, or one thing that is captured, may hold up.
#[derive(Debug)]
pub(super) struct Turns {
    free: Arc<Semaphore>,
    /// Steps of all who have a turn: those who wait for one are patient as long as others get on.
    steps: Arc<AtomicU64>,
    /// Where a turn is needed as well.
    within: Option<Arc<Turns>>,
}

/// Counts the steps of one piece of work.
#[derive(Debug, Default)]
pub(super) struct Pace {
    own: AtomicU64,
    /// Of those who wait for the same turns.
    all: Vec<Arc<AtomicU64>>,
    given_up: AtomicBool,
}

impl Pace {
    /// Says that something was answered.
    ///
    /// # Errors
    /// Cancelled once nobody waits for this work any more.
    pub(super) fn step(&self) -> Result<()> {
        self.own.fetch_add(1, Ordering::Relaxed);
        for steps in &self.all {
            steps.fetch_add(1, Ordering::Relaxed);
        }
        if self.given_up.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Cancelled, "LISTING_GIVEN_UP", "nobody waits for this listing any more"));
        }
        Ok(())
    }
}

impl Turns {
    pub(super) fn new() -> Self {
        Self::so_many(limits::LISTINGS_PER_DATASTORE)
    }

    fn so_many(turns: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(turns)), steps: Arc::default(), within: None }
    }

    /// What `work` gives, which runs in a thread that may be held up. Cancel-safe: the work ends with its next step then.
    ///
    /// # Errors
    /// `silent` after `patience` without a step of the work, or, before it has a turn, of anybody's. What the work fails with.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        patience: Duration,
        silent: impl Fn() -> Error,
        work: impl FnOnce(&Pace) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut taken = Vec::new();
        let mut pace = Pace::default();
        for turns in iter::successors(Some(self), |turns| turns.within.as_ref()) {
            let free = turns.free.clone();
            let turn = while_it_moves(patience, || turns.steps.load(Ordering::Relaxed), free.acquire_owned()).await;
            taken.push(turn.ok_or_else(&silent)?.map_err(|_| Error::internal("listing is over"))?);
            pace.all.push(turns.steps.clone());
        }
        let pace = Arc::new(pace);
        let waiting = GiveUpOnDrop(pace.clone());
        // With the turns themselves: what a thread holds up must be found by those who ask for it later.
        let taken = (taken, Arc::clone(self));
        let working = tokio::task::spawn_blocking(move || {
            let _taken = taken;
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

    const PATIENCE: Duration = Duration::from_millis(500);

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
        Arc::new(Turns::new()).run(PATIENCE, silent, work).await.unwrap();
    }

    /// Work that hangs until the other end is dropped, having told that it began.
    fn hanging(told: &mpsc::Sender<()>) -> (mpsc::Sender<()>, impl FnOnce(&Pace) -> Result<()> + Send + use<>) {
        let (let_go, gate) = mpsc::channel::<()>();
        let told = told.clone();
        let work = move |pace: &Pace| {
            told.send(()).unwrap();
            let _ = gate.recv();
            pace.step()
        };
        (let_go, work)
    }

    #[tokio::test]
    async fn so_many_threads_are_held_up_and_no_more_and_all_come_back() {
        let turns = Arc::new(Turns::new());
        let (told, began) = mpsc::channel();
        let (let_go, works): (Vec<_>, Vec<_>) = (0..limits::LISTINGS_PER_DATASTORE + 3).map(|_| hanging(&told)).unzip();
        for work in works {
            assert_eq!(turns.run(PATIENCE, silent, work).await.unwrap_err().reason(), "SILENT");
        }
        assert_eq!(began.try_iter().count(), limits::LISTINGS_PER_DATASTORE);
        drop(let_go);
        turns.run(Duration::from_secs(10), silent, |pace| pace.step()).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_captured_holds_up_few_threads_of_its_own_and_all_of_it_not_many() {
        let asked = TurnsAsked::default();
        let (told, began) = mpsc::channel();
        let mut held = Vec::new();
        // Each call asks anew, as each capture does, and nobody but the threads that hang knows of those before.
        let hung = limits::LISTINGS_OF_CAPTURES / limits::LISTINGS_PER_DATASTORE;
        for call in 0..hung * (limits::LISTINGS_PER_DATASTORE + 1) {
            let (let_go, work) = hanging(&told);
            held.push(let_go);
            let name = (call % hung).to_string();
            let ran = asked.of(name).run(Duration::from_millis(8), silent, work).await;
            assert_eq!(ran.unwrap_err().reason(), "SILENT");
            if call == limits::LISTINGS_OF_CAPTURES - hung {
                asked.of("another".to_owned()).run(Duration::from_secs(10), silent, |pace| pace.step()).await.unwrap();
            }
        }
        assert_eq!(began.try_iter().count(), limits::LISTINGS_OF_CAPTURES);
        let refused = asked.of("another".to_owned()).run(PATIENCE, silent, |pace| pace.step()).await;
        assert_eq!(refused.unwrap_err().reason(), "SILENT");
        drop(held);
        asked.of("another".to_owned()).run(Duration::from_secs(10), silent, |pace| pace.step()).await.unwrap();
        let in_use = || asked.each.lock().unwrap().values().any(|turns| turns.strong_count() > 0);
        let forgotten = async {
            while in_use() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), forgotten).await.unwrap();
    }
}
