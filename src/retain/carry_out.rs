//! Carries plans out: one round at a time, each step by the store, with an event for what went and one for what it came to.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, broadcast};

use super::in_use::{InUse, Use};
use super::plan::{self, Eviction, Keeper, Known, Plan, Step, Wanted, Why};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::retention::{self, Kept, Standing};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::room::Room;
use crate::units::{now_unix_ms, show_bytes};

/// How long it is waited until the filesystem shows as free what was given back: some free in the background.
const SHOWN_AFTER: Duration = Duration::from_millis(200);

/// How long nothing is looked at after a look that found nothing more to give up: what makes more possible is rare, and a look at a store of very
/// many checkpoints is not cheap. Who lacks room does not wait for it.
const REST_AFTER_NOTHING: Duration = Duration::from_secs(5);

/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

type Told = Box<dyn Fn(&str) + Send + Sync>;

/// What keeps room in the store; cheap to clone.
#[derive(Clone)]
pub struct Retention(Arc<Shared>);

struct Shared {
    store: Store,
    in_use: InUse,
    /// One round at a time.
    rounds: Semaphore,
    wake: Notify,
    /// Whether it was said that nothing more can go.
    is_low: AtomicBool,
    told: OnceLock<Told>,
}

/// What is to be evicted by hand.
#[derive(Clone, Debug, Default)]
pub struct ByHand {
    /// These records, in any case.
    pub ids: Vec<String>,
    /// And others, until so many bytes can be filled.
    pub available_bytes: u64,
    /// Nothing is done; the answer is what would be.
    pub dry_run: bool,
    /// Also what was filled with secrets that the daemon does not have, or what nobody vouches for.
    pub force: bool,
}

/// What was given up.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// One after the other.
    pub steps: Vec<Step>,
    /// What came of them, or would, in bytes.
    pub freed_bytes: u64,
    /// What was wanted and could not be had.
    pub lacking_bytes: u64,
    /// What becomes of everything else that is kept.
    pub standing: Standing,
}

impl Retention {
    /// Keeps room in `store`.
    pub fn new(store: Store) -> Self {
        Self(Arc::new(Shared {
            store,
            in_use: InUse::default(),
            rounds: Semaphore::new(1),
            wake: Notify::new(),
            is_low: AtomicBool::new(false),
            told: OnceLock::new(),
        }))
    }

    /// Has `told` called with the id of each record that is evicted; once.
    pub fn tell(&self, told: impl Fn(&str) + Send + Sync + 'static) {
        let _ = self.0.told.set(Box::new(told));
    }

    /// Keeps checkpoints from being evicted for as long as what is returned lives, whether they are here yet or not. One that goes this
    /// instant goes all the same: look at its record afterwards.
    pub fn keep(&self, ids: Vec<String>) -> Use {
        self.0.in_use.keep(ids)
    }

    /// Has it looked at the watermark: something may go that could not before.
    pub fn wake(&self) {
        self.0.wake.notify_one();
    }

    /// Keeps the store below its high watermark for as long as it runs, looking whenever something changed; never ends.
    pub async fn run(&self, mut changes: broadcast::Receiver<String>) {
        loop {
            tracing::trace!("a look at the watermark");
            let relieved = self.relieve().await.unwrap_or_else(|error| {
                tracing::warn!(error = %error.report(), "keeping room in the store failed");
                false
            });
            if !relieved {
                tokio::time::sleep(REST_AFTER_NOTHING).await;
            }
            tokio::select! {
                changed = changes.recv() => if let Err(broadcast::error::RecvError::Closed) = changed {
                    std::future::pending::<()>().await;
                },
                () = self.0.wake.notified() => {}
            }
            // What changed meanwhile is seen by the same look.
            changes = changes.resubscribe();
        }
    }

    /// Gives up `bytes` or nothing; how many came of it, and what keeps the rest.
    ///
    /// # Errors
    /// Poisoned store; those of the catalog.
    pub async fn make_room(&self, bytes: u64) -> Result<(u64, Standing)> {
        // In a task of its own: who asks may go away, and what was begun is to be told.
        let retention = self.clone();
        let wanted = Wanted { bytes, why: Why::Lacking, keep_latest: false, force: false };
        let outcome = tokio::spawn(async move { retention.give_up(wanted).await })
            .await
            .map_err(|error| Error::internal("making room ended early").because(error))??;
        Ok((outcome.freed_bytes, outcome.standing))
    }

    /// What becomes of everything that is kept, when room is needed.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn standing(&self) -> Result<Standing> {
        let known = self.known(false, &BTreeSet::new()).await?;
        let nothing = Wanted { bytes: 0, why: Why::Lacking, keep_latest: false, force: false };
        Ok(plan::plan(&known, nothing, now_unix_ms()).standing)
    }

    /// Evicts what an operator names, and as much else as is asked for.
    ///
    /// # Errors
    /// `NOT_EVICTABLE` naming the first that has to stay, and why; nothing is evicted then, unless it came into use this instant. Poisoned store.
    pub async fn by_hand(&self, order: ByHand) -> Result<Outcome> {
        let mut known = self.known(true, &BTreeSet::new()).await?;
        for id in &order.ids {
            if self.0.store.is_open(id).await? {
                known.open.insert(id.clone());
            }
        }
        let named = named(&known, &order)?;
        let mut outcome = Outcome { steps: named.into_iter().map(Step::Evict).collect(), ..Outcome::default() };
        if order.dry_run {
            outcome.freed_bytes = bytes_of(&outcome.steps);
        } else {
            let _one = self.round().await?;
            let (steps, mut refused) = (std::mem::take(&mut outcome.steps), BTreeSet::new());
            self.carry_out(steps, &mut outcome, &mut refused).await?;
            self.note_round(&outcome, Why::Hand).await?;
            self.explain(&refused, order.force).await?;
        }
        let is_enough = |room: &Room| room.available_bytes() >= order.available_bytes;
        let available = self.0.store.room_when(is_enough).await?.available_bytes();
        let there = if order.dry_run { available.saturating_add(outcome.freed_bytes) } else { available };
        let bytes = order.available_bytes.saturating_sub(there);
        let wanted = Wanted { bytes, why: Why::Hand, keep_latest: false, force: order.force };
        let more = if order.dry_run {
            let gone: Vec<_> = outcome.steps.iter().filter_map(evicted).map(|eviction| eviction.id.clone()).collect();
            let mut left = known;
            left.kept.retain(|record| !gone.contains(&record.id));
            let mut planned = plan::plan(&left, wanted, now_unix_ms());
            while self.find_open(&planned, &mut left.open).await? {
                planned = plan::plan(&left, wanted, now_unix_ms());
            }
            let Plan { steps, bytes, lacking_bytes, standing } = planned;
            Outcome { steps, freed_bytes: bytes, lacking_bytes, standing }
        } else {
            self.give_up(wanted).await?
        };
        outcome.steps.extend(more.steps);
        outcome.freed_bytes += more.freed_bytes;
        Ok(Outcome { lacking_bytes: more.lacking_bytes, standing: more.standing, ..outcome })
    }

    /// Brings the store down to its low watermark where it is above the high one, as far as that goes; whether it is below the high one now.
    async fn relieve(&self) -> Result<bool> {
        let excess = self.0.store.room_when(|room| room.excess_bytes() == 0).await?.excess_bytes();
        if excess == 0 {
            self.0.is_low.store(false, Ordering::Relaxed);
            return Ok(true);
        }
        let wanted = Wanted { bytes: excess, why: Why::Watermark, keep_latest: true, force: false };
        let outcome = self.give_up(wanted).await?;
        if outcome.lacking_bytes == 0 {
            return Ok(true);
        }
        let room = self.0.store.room().await?;
        let is_relieved = room.excess_bytes() == 0;
        if !is_relieved && !self.0.is_low.swap(true, Ordering::Relaxed) {
            self.note_low(room.available_bytes(), outcome.standing).await?;
        }
        Ok(is_relieved)
    }

    /// Makes plans and carries them out until what is wanted came of it, or nothing more can. Each plan goes without what an earlier one could not
    /// have.
    async fn give_up(&self, wanted: Wanted) -> Result<Outcome> {
        let _one = self.round().await?;
        let (mut outcome, mut refused) = (Outcome::default(), BTreeSet::new());
        let mut lacking = wanted.bytes;
        while lacking > 0 {
            let wanted_now = Wanted { bytes: lacking, ..wanted };
            let Plan { steps, lacking_bytes, standing, .. } = self.plan(wanted_now, &mut refused).await?;
            outcome.standing = standing;
            if steps.is_empty() || (wanted.why == Why::Lacking && lacking_bytes > 0) {
                break;
            }
            let before = (outcome.steps.len(), refused.len());
            self.carry_out(steps, &mut outcome, &mut refused).await?;
            if (outcome.steps.len(), refused.len()) == before {
                break;
            }
            lacking = wanted.bytes.saturating_sub(outcome.freed_bytes);
        }
        outcome.lacking_bytes = lacking;
        self.note_round(&outcome, wanted.why).await?;
        Ok(outcome)
    }

    /// A plan by what is cheap to know, and by all there is to know if that does not do, without those of `open`; adds to them.
    async fn plan(&self, wanted: Wanted, open: &mut BTreeSet<String>) -> Result<Plan> {
        loop {
            let mut planned = plan::plan(&self.known(false, open).await?, wanted, now_unix_ms());
            if planned.lacking_bytes > 0 {
                planned = plan::plan(&self.known(true, open).await?, wanted, now_unix_ms());
            }
            if !self.find_open(&planned, open).await? {
                return Ok(planned);
            }
        }
    }

    /// Adds to `open` what is planned to go and is open; whether there was any. Before the first of them goes, since it may be all or nothing.
    async fn find_open(&self, planned: &Plan, open: &mut BTreeSet<String>) -> Result<bool> {
        let mut found = false;
        for eviction in planned.steps.iter().filter_map(evicted) {
            if self.0.store.is_open(&eviction.id).await? {
                found |= open.insert(eviction.id.clone());
            }
        }
        Ok(found)
    }

    async fn known(&self, with_shared: bool, refused: &BTreeSet<String>) -> Result<Known> {
        let read = move |tx: &rusqlite::Connection| {
            let shared = if with_shared { retention::shared(tx)? } else { Vec::new() };
            Ok((retention::kept(tx)?, retention::duplicates(tx)?, shared))
        };
        let (kept, mut duplicates, shared) = self.0.store.catalog().read(read).await?;
        duplicates.retain(|duplicate| !self.0.store.is_spared(&duplicate.blob.digest));
        Ok(Known { kept, in_use: self.0.in_use.ids(), open: refused.clone(), duplicates, shared })
    }

    /// Takes `steps`, and adds the ids of those that could not be evicted to `refused`.
    async fn carry_out(&self, steps: Vec<Step>, outcome: &mut Outcome, refused: &mut BTreeSet<String>) -> Result<()> {
        let disk = self.0.store.disk();
        let (free_before, freed_before) = (disk.free_bytes()?, outcome.freed_bytes);
        for step in steps {
            let freed = match &step {
                Step::Punch(blob, _) => Some(self.0.store.give_up_duplicates(*blob).await?),
                Step::Evict(eviction) => self.evict(eviction).await?,
            };
            match (freed, step) {
                (Some(freed), step) => {
                    outcome.freed_bytes += freed;
                    outcome.steps.push(step);
                }
                (None, Step::Evict(eviction)) => {
                    refused.insert(eviction.id);
                }
                (None, Step::Punch(..)) => {}
            }
        }
        // Half of it: others go on filling meanwhile.
        let expected = free_before.saturating_add((outcome.freed_bytes - freed_before) / 2);
        let waited = async {
            while disk.free_bytes().is_ok_and(|free| free < expected) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let _ = tokio::time::timeout(SHOWN_AFTER, waited).await;
        Ok(())
    }

    /// Evicts one; the bytes that came of it, or `None` where something keeps it by now.
    async fn evict(&self, eviction: &Eviction) -> Result<Option<u64>> {
        if self.0.in_use.contains(&eviction.id) {
            return Ok(None);
        }
        let Some(swept) = self.0.store.evict_checkpoint(&eviction.id).await? else { return Ok(None) };
        if let Some(told) = self.0.told.get() {
            told(&eviction.id);
        }
        tracing::info!(checkpoint = eviction.id, freed = swept.freed_bytes, "evicted {}", eviction.why);
        // What was freed tells of others: that is for the event about the round, which is nobody's.
        let message = format!(
            "`{}` was evicted {}, unused for {}: its {} are fetched again when it is wanted",
            eviction.name,
            eviction.why,
            span(eviction.idle_ms),
            show_bytes(eviction.logical_bytes)
        );
        let (checkpoint, owner) = (eviction.id.clone(), eviction.owner.clone());
        self.note(NewEvent { kind: "CHECKPOINT_EVICTED", checkpoint, owner, message, ..Default::default() }).await?;
        Ok(Some(swept.freed_bytes))
    }

    /// Says why the first of those stays that were refused when they were to go. One that is not kept any more went with another round.
    async fn explain(&self, refused: &BTreeSet<String>, force: bool) -> Result<()> {
        if refused.is_empty() {
            return Ok(());
        }
        let known = self.known(false, refused).await?;
        let Some(record) = known.kept.iter().find(|record| refused.contains(&record.id)) else { return Ok(()) };
        Err(not_evictable(record, known.keeper_of(record, force).unwrap_or(Keeper::Open)))
    }

    async fn note_round(&self, outcome: &Outcome, why: Why) -> Result<()> {
        if outcome.steps.is_empty() {
            return Ok(());
        }
        let evicted = outcome.steps.iter().filter_map(evicted).count();
        let message = format!(
            "{} were given back {why}: {evicted} checkpoints evicted, {} blobs without their copies of what they borrow",
            show_bytes(outcome.freed_bytes),
            outcome.steps.len() - evicted
        );
        self.note(NewEvent { kind: "SPACE_MADE", message, ..Default::default() }).await
    }

    async fn note_low(&self, available_bytes: u64, standing: Standing) -> Result<()> {
        let message = format!(
            "the store is above its high watermark with {} left, and nothing more can go: {} is in use by jobs, {} is pinned, {} cannot be \
             fetched again",
            show_bytes(available_bytes),
            show_bytes(standing.leased_bytes),
            show_bytes(standing.pinned_bytes),
            show_bytes(standing.not_refetchable_bytes)
        );
        tracing::warn!("{message}");
        self.note(NewEvent { kind: "SPACE_LOW", message, ..Default::default() }).await
    }

    async fn note(&self, event: NewEvent) -> Result<()> {
        self.0.store.catalog().write(move |tx| events::record(tx, now_unix_ms(), &event)).await
    }

    async fn round(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.0.rounds.acquire().await.map_err(|_| Error::internal("retention is closed"))
    }
}

/// What an operator names, with what would come of each.
fn named(known: &Known, order: &ByHand) -> Result<Vec<Eviction>> {
    let mut chosen = Vec::new();
    for id in &order.ids {
        // One that is not kept has nothing to give up.
        let Some(record) = known.kept.iter().find(|record| record.id == *id) else { continue };
        if let Some(keeper) = known.keeper_of(record, order.force) {
            return Err(not_evictable(record, keeper));
        }
        chosen.push(record);
    }
    let is_chosen = |record: &Kept| chosen.iter().any(|chosen| chosen.id == record.id);
    let others = known.kept.iter().filter(|record| !is_chosen(record)).map(|record| record.id.clone());
    let alone = Known { in_use: others.collect(), duplicates: Vec::new(), ..known.clone() };
    let all = Wanted { bytes: u64::MAX, why: Why::Hand, keep_latest: false, force: order.force };
    let now_ms = now_unix_ms();
    let planned = plan::plan(&alone, all, now_ms).steps;
    let eviction = |record: &Kept| {
        let found = planned.iter().filter_map(evicted).find(|eviction| eviction.id == record.id);
        // Others have the same tree: nothing comes of it.
        found.cloned().unwrap_or_else(|| Eviction::of(record, 0, Why::Hand, now_ms))
    };
    Ok(chosen.into_iter().map(eviction).collect())
}

fn evicted(step: &Step) -> Option<&Eviction> {
    match step {
        Step::Evict(eviction) => Some(eviction),
        Step::Punch(..) => None,
    }
}

fn bytes_of(steps: &[Step]) -> u64 {
    steps.iter().map(Step::bytes).sum()
}

fn not_evictable(record: &Kept, keeper: Keeper) -> Error {
    let error = Error::wrong_state("NOT_EVICTABLE", format!("`{}` stays: {keeper}", record.name))
        .fact("checkpoint", &record.id)
        .fact("why", format!("{keeper:?}"));
    match keeper {
        Keeper::Leased => error.remedy("release its jobs first (`ckptctl jobs`)"),
        Keeper::Pinned => error.remedy(format!("`ckptctl unpin {}` first", record.id)),
        Keeper::InUse => error.remedy("try again when the call has ended"),
        Keeper::Open => error.remedy("try again when they are closed (`ckptctl jobs` shows who reads what)"),
        Keeper::Sent => error.remedy(format!("`ckptctl remove {}` if nobody needs it any more", record.id)),
        Keeper::Secrets | Keeper::Unvouched => error.remedy("give --force if you can have it filled again"),
    }
}

/// A time for people: in its largest unit.
fn span(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_told_in_its_largest_unit() {
        for (ms, text) in [(999, "0 s"), (61_000, "1 min"), (7_200_000, "2 h"), (259_200_000, "3 days")] {
            assert_eq!(span(ms), text);
        }
    }
}
