//! The fetchers' side of a flight: what to get next, and where what was got goes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Arriving, At, Queue, Step, Wanted, run};
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::ingest::early::Earlies;
use crate::ingest::plan::{Plan, ToFill};
use crate::limits::UNIT_BYTES;
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::names::EntryPath;
use crate::store::filling::{Filling, UnitMap};

impl Arriving {
    /// Ends every wait with `error`, and those to come, until [`Arriving::begin`].
    pub(in crate::ingest) fn fail(&self, error: &Error) {
        let message = "the checkpoint failed before these bytes had come";
        let error = Error::new(Kind::Unavailable, "CHECKPOINT_FAILED", message).because(error.share());
        let mut state = self.lock();
        state.failed = Some(Arc::new(error.share()));
        state.waits = 0;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        run(waiting.into_values().flatten().map(|waiting| (waiting.resume, Err(error.share()))).collect());
    }

    /// Takes back that it failed: another flight will bring it.
    pub(in crate::ingest) fn clear_failure(&self) {
        self.lock().failed = None;
    }

    /// Begins a run of the flight: what `plan` says is sealed is, the rest is to be fetched. `learned` is the order of an earlier reader.
    ///
    /// # Errors
    /// Internal where the plan is of another tree; the I/O error.
    pub(in crate::ingest) fn begin(&self, plan: Plan, learned: Vec<(u32, u64)>) -> Result<()> {
        let mut queue = Queue::default();
        let mut fills = HashMap::new();
        let mut found = HashMap::new();
        let mut earlies = Earlies::default();
        for file in plan.small {
            let (entry, _) = self.find(&file.path).ok_or_else(|| foreign(&file.path))?;
            queue.add_small(entry, file.file.size.unwrap_or(0));
            fills.insert(entry, Arc::new(file));
        }
        for file in plan.large {
            let (entry, _) = self.find(&file.path).ok_or_else(|| foreign(&file.path))?;
            let size = file.file.size.unwrap_or(0);
            let known = match self.lock().at.get(entry as usize) {
                // A fill that was given up is not taken up again; its file is.
                Some(At::Filling(filling)) => filling.units(),
                _ => file.units.clone().unwrap_or_else(|| UnitMap::new(size)),
            };
            let mut here = known;
            if here.here_bytes() > 0 {
                // What a row says is here is believed of a file that is there: a crash may have taken its name.
                let filling = Filling::open(self.store.disk().clone(), &self.key, file.number, here)?;
                here = filling.units();
                found.insert(entry, Arc::new(filling));
            }
            let early = earlies.of(&file.path, file.file.size);
            queue.add(entry, here.units(), file.file.ranges, early, |unit| here.contains(unit));
            fills.insert(entry, Arc::new(file));
        }
        queue.learn(learned);
        let mut state = self.lock();
        state.failed = None;
        for entry in fills.keys() {
            // Sealed by an earlier run, and lost since.
            if let Some(at @ (At::Sealing | At::Sealed(..))) = state.at.get_mut(*entry as usize) {
                *at = At::Missing;
            }
        }
        queue.set_read(state.readers > 0);
        state.queue = queue;
        state.fills = fills;
        for entry in &plan.settled {
            if let (EntryKind::File { size, digest, .. }, Some((at, _))) = (&entry.kind, self.find(&entry.path)) {
                state.at[at as usize] = At::Sealed(*digest, *size);
            }
        }
        for (entry, filling) in found {
            state.at[entry as usize] = At::Filling(filling);
        }
        let waiting: Vec<_> =
            state.waiting.iter().flat_map(|(entry, all)| all.iter().map(|one| (*entry, one.range.clone()))).collect();
        for (entry, range) in waiting {
            state.queue.want(entry, range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES));
        }
        // A run that ended in the middle of a write may have brought what it could not tell of.
        let entries: Vec<u32> = state.waiting.keys().copied().collect();
        let ready = entries.into_iter().flat_map(|entry| state.take_ready(entry)).collect();
        drop(state);
        self.work.notify_waiters();
        run(ready);
        Ok(())
    }

    /// What is to be filled for an entry.
    ///
    /// # Errors
    /// Internal where it is not to be.
    pub(in crate::ingest) fn to_fill(&self, entry: u32) -> Result<Arc<ToFill>> {
        let file = self.lock().fills.get(&entry).cloned();
        file.ok_or_else(|| Error::internal("a file is fetched that is not to be filled"))
    }

    /// The file that a large entry is filled into, opened if need be.
    ///
    /// # Errors
    /// The I/O error.
    pub(in crate::ingest) fn filling(&self, file: &ToFill, entry: u32) -> Result<Arc<Filling>> {
        if let Some(At::Filling(filling)) = self.lock().at.get(entry as usize) {
            return Ok(filling.clone());
        }
        let size = file.file.size.unwrap_or(0);
        let units = file.units.clone().unwrap_or_else(|| UnitMap::new(size));
        let opened = Arc::new(Filling::open(self.store.disk().clone(), &self.key, file.number, units)?);
        let mut state = self.lock();
        match state.at.get_mut(entry as usize) {
            Some(At::Filling(filling)) => Ok(filling.clone()),
            Some(at) => {
                *at = At::Filling(opened.clone());
                Ok(opened)
            }
            None => Err(Error::internal("a file is filled that is not in the tree")),
        }
    }

    /// Large files that are being filled now.
    pub(in crate::ingest) fn fillings(&self) -> Vec<(Arc<ToFill>, Arc<Filling>)> {
        let state = self.lock();
        let filling = |(entry, file): (&u32, &Arc<ToFill>)| match state.at.get(*entry as usize) {
            Some(At::Filling(filling)) => Some((file.clone(), filling.clone())),
            _ => None,
        };
        state.fills.iter().filter_map(filling).collect()
    }

    /// Lets the background come to a file.
    pub(in crate::ingest) fn start(&self, entry: u32) {
        self.lock().queue.start(entry);
        self.work.notify_waiters();
    }

    /// The next small file of the background, with `most` under way; waits until there may be one. `None` when none is left.
    pub(in crate::ingest) async fn next_small(self: &Arc<Self>, most: usize) -> Option<SmallTurn> {
        let mut something_waited = false;
        let next = self.when_work(|queue| {
            something_waited = queue.something_waits();
            queue.next_small(most)
        });
        let entry = next.await?;
        if something_waited {
            // It may be what the background made way for.
            self.work.notify_waiters();
        }
        Some(SmallTurn { arriving: self.clone(), entry })
    }

    /// Someone who fetches a small file for a reader waits to try again, until what is returned goes.
    pub(in crate::ingest) fn rest_with_small(&self) -> Resting<'_> {
        self.lock().queue.small_resting += 1;
        self.work.notify_waiters();
        Resting(self)
    }

    /// The next range of the background; waits until there is one.
    pub(in crate::ingest) async fn next_background(&self) -> Step {
        self.when_work(|queue| queue.next_background()).await
    }

    /// The next thing that a reader waits for; waits until there is one.
    pub(in crate::ingest) async fn next_wanted(&self) -> Wanted {
        let wanted = self.when_work(Queue::next_wanted).await;
        if matches!(wanted, Wanted::Small(_)) {
            // It was all that the background waited for, perhaps; that of units is told when they end.
            self.work.notify_waiters();
        }
        wanted
    }

    async fn when_work<T>(&self, mut next: impl FnMut(&mut Queue) -> Option<T>) -> T {
        loop {
            let mut woken = std::pin::pin!(self.work.notified());
            woken.as_mut().enable();
            let found = next(&mut self.lock().queue);
            if let Some(found) = found {
                return found;
            }
            woken.await;
        }
    }

    /// Whether a step goes on with `unit`; waits while something else is wanted more.
    pub(in crate::ingest) async fn go_on(&self, step: &Step, unit: u64) -> bool {
        self.make_way(step).await;
        self.lock().queue.go_on(step, unit)
    }

    /// Waits while a reader waits for something that another step brings.
    pub(in crate::ingest) async fn make_way(&self, step: &Step) {
        loop {
            let mut woken = std::pin::pin!(self.work.notified());
            woken.as_mut().enable();
            if !self.lock().queue.must_pause(step) {
                return;
            }
            woken.await;
        }
    }

    /// A step waits to try again.
    pub(in crate::ingest) fn rest(&self, step: &Step) {
        self.lock().queue.rest(step);
        self.work.notify_waiters();
    }

    /// Ends a step.
    pub(in crate::ingest) fn end(&self, step: &Step) {
        self.lock().queue.end(step);
        self.work.notify_waiters();
    }

    /// Notes a unit that was written, and lets those go on that waited for it.
    pub(in crate::ingest) fn arrived(&self, entry: u32, unit: u64) {
        let mut state = self.lock();
        state.queue.here(entry, unit);
        let ready = state.take_ready(entry);
        drop(state);
        self.moved.notify_waiters();
        run(ready);
    }

    /// Waits until all of a file that fills is here.
    pub(in crate::ingest) async fn filled(&self, filling: &Filling) {
        loop {
            let mut woken = std::pin::pin!(self.moved.notified());
            woken.as_mut().enable();
            if filling.here_bytes() == filling.size() {
                return;
            }
            woken.await;
        }
    }

    /// Waits until somebody reads it.
    pub(in crate::ingest) async fn until_read(&self) {
        loop {
            let mut woken = std::pin::pin!(self.work.notified());
            woken.as_mut().enable();
            if self.is_read() {
                return;
            }
            woken.await;
        }
    }

    /// Waits until every file is sealed.
    pub(in crate::ingest) async fn until_whole(&self) {
        let is_file = |entry: &Entry| matches!(entry.kind, EntryKind::File { .. });
        loop {
            let mut woken = std::pin::pin!(self.moved.notified());
            woken.as_mut().enable();
            let whole = {
                let state = self.lock();
                let mut files = self.tree.entries().iter().zip(&state.at).filter(|(entry, _)| is_file(entry));
                files.all(|(_, at)| matches!(at, At::Sealed(..)))
            };
            if whole {
                return;
            }
            woken.await;
        }
    }

    /// Before a file's digest is published: under readers its bytes must stay where they are.
    pub(in crate::ingest) fn sealing(&self, entry: u32, digest: Digest) {
        let hold = self.store.hold(digest);
        let mut state = self.lock();
        if state.readers > 0 {
            state.holds.push(hold);
        } else if let Some(at) = state.at.get_mut(entry as usize) {
            *at = At::Sealing;
        }
    }

    /// A file is a blob now.
    ///
    /// # Errors
    /// Those of the catalog.
    pub(in crate::ingest) async fn sealed(&self, entry: u32, digest: Digest, size: u64) -> Result<()> {
        let mut readable = false;
        loop {
            let reader = {
                let mut state = self.lock();
                let reader = state.reader.clone().filter(|_| !readable);
                if reader.is_none() {
                    if let Some(at) = state.at.get_mut(entry as usize) {
                        *at = At::Sealed(digest, size);
                    }
                    if size <= UNIT_BYTES {
                        // Nobody fetches any of it any more, and there may be millions.
                        state.fills.remove(&entry);
                    }
                    let ready = state.take_ready(entry);
                    drop(state);
                    self.moved.notify_waiters();
                    run(ready);
                    return Ok(());
                }
                reader
            };
            if let Some(reader) = reader {
                self.store.add_to(&reader, vec![digest]).await?;
                readable = true;
            }
        }
    }

    /// What was filled of a file is wrong: it is missing again.
    pub(in crate::ingest) fn distrust(&self, entry: u32) {
        let mut state = self.lock();
        if state.readers > 0 {
            self.distrusted.store(true, Ordering::Relaxed);
        }
        if let Some(at) = state.at.get_mut(entry as usize) {
            *at = At::Missing;
        }
    }

    /// The tree with its digests, once every file is sealed.
    ///
    /// # Errors
    /// Internal where one is not.
    pub(in crate::ingest) fn manifest(&self) -> Result<Manifest> {
        let state = self.lock();
        let entries = self.tree.entries().iter().zip(&state.at).map(|(entry, at)| match (&entry.kind, at) {
            (EntryKind::File { executable, .. }, At::Sealed(digest, size)) => Ok(Entry {
                path: entry.path.clone(),
                kind: EntryKind::File { size: *size, executable: *executable, digest: *digest },
            }),
            (EntryKind::File { .. }, _) => Err(Error::internal(format!("`{}` was not sealed", entry.path))),
            (EntryKind::Directory | EntryKind::Symlink { .. }, _) => Ok(entry.clone()),
        });
        Manifest::new(entries.collect::<Result<_>>()?)
    }
}

/// A small file that the background has taken, until it has come.
pub(in crate::ingest) struct SmallTurn {
    arriving: Arc<Arriving>,
    entry: u32,
}

impl SmallTurn {
    pub(in crate::ingest) fn entry(&self) -> u32 {
        self.entry
    }

    /// Waits for what a reader need not wait for; `None` as soon as a reader waits for the file.
    pub(in crate::ingest) async fn unless_wanted<T>(&self, waiting: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.until_wanted() => None,
            got = waiting => Some(got),
        }
    }

    async fn until_wanted(&self) {
        loop {
            let mut woken = std::pin::pin!(self.arriving.small_wanted.notified());
            woken.as_mut().enable();
            if self.arriving.lock().queue.small_is_wanted(self.entry) {
                return;
            }
            woken.await;
        }
    }
}

impl Drop for SmallTurn {
    fn drop(&mut self) {
        self.arriving.lock().queue.small_ended(self.entry);
        self.arriving.work.notify_waiters();
    }
}

/// See [`Arriving::rest_with_small`].
pub(in crate::ingest) struct Resting<'a>(&'a Arriving);

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        // Of a run that is over, perhaps, whose queue is gone.
        let resting = &mut self.0.lock().queue.small_resting;
        *resting = resting.saturating_sub(1);
    }
}

fn foreign(path: &EntryPath) -> Error {
    Error::internal(format!("`{path}` is to be filled and not in the tree"))
}
