//! What a flight brings, as those see it who read it while it arrives.
//!
//! An [`Arriving`] belongs to a flight by key and outlives its runs: a retry, or the daemon's next start, goes on with the one that is
//! being read. It knows the tree (the listing's, its file digests still zero), and of each file whether it is missing, filling, being
//! sealed or sealed. Fetchers take their work from its queue (`queue.rs`) and report units; readers ask whether bytes are here
//! and otherwise leave something to be run when they are.
//!
//! **What is read when.** Units count as here once they are written, before the file's digest is known: bytes of a file that
//! is not sealed are unverified, except by what the connection itself verifies. A file whose digest turns out wrong is
//! missing again; what was read of it before was wrong, and its next open drops what the kernel kept ([`Arriving::is_distrusted`]).
//!
//! **Sealing under readers.** While somebody reads, digests are held before they are published, so that no borrowed range is
//! punched under an open file; the file that was filled stays readable by descriptor whatever becomes of its name. A file that began to be
//! sealed before the first reader came is waited for.
//!
//! **Waiting.** What waits is a closure on the heap, at most [`WAITING`] of them; no thread waits. They are run on blocking threads, in
//! the order of asking, file by file. When a flight has failed for good they hear so, and so does every later reader of missing bytes, until a
//! retry begins. When the process ends they are forgotten unanswered: the kernel asks the successor again.
//!
//! After a crash: a listing that was shown is a row (`listings`), units and sealed files are rows of the flight. The rest is asked
//! of the source again.

mod bringing;
mod queue;
mod reading;
mod recording;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

pub(in crate::ingest) use bringing::SmallTurn;
pub(super) use queue::{Queue, SMALL_AT_A_TIME, Step, Wanted};
pub use reading::Reading;

use crate::catalog::fills::{self, FillRow};
use crate::digest::{DIGEST_BYTES, Digest};
use crate::error::{Error, Result};
use crate::limits::UNIT_BYTES;
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::names::EntryPath;
use crate::source::{Listing, What};
use crate::store::Store;
use crate::store::filling::{Filling, UnitMap};
use crate::store::read::{Hold, Reader};

use super::plan::ToFill;

/// Reads that wait in one flight: some hundred bytes each.
const WAITING: usize = 1 << 16;

/// Stands for a file digest that is not known yet.
pub const UNKNOWN: Digest = Digest::from_bytes([0; DIGEST_BYTES]);

/// Run once bytes are here, or cannot come.
pub type Resume = Box<dyn FnOnce(Result<()>) + Send>;

/// The files of a flight: see the module's page.
pub struct Arriving {
    key: String,
    tree: Arc<Manifest>,
    /// Why it cannot be read before it is whole.
    obstacle: Option<String>,
    store: Store,
    state: Mutex<State>,
    /// Something may be there to fetch.
    work: Notify,
    /// Something may have been sealed or filled.
    moved: Notify,
    /// A reader may have come to wait for a small file that the background has taken.
    small_wanted: Notify,
    distrusted: AtomicBool,
}

#[derive(Default)]
struct State {
    at: Vec<At>,
    fills: HashMap<u32, Arc<ToFill>>,
    queue: Queue,
    readers: usize,
    reader: Option<Arc<Reader>>,
    holds: Vec<Hold>,
    waiting: HashMap<u32, Vec<Waiting>>,
    waits: usize,
    /// Reads that ever waited: the number of the last.
    waited: u64,
    failed: Option<Arc<Error>>,
}

/// How one entry's bytes are here.
#[derive(Clone, Default)]
enum At {
    /// Nothing of it, or no file.
    #[default]
    Missing,
    Filling(Arc<Filling>),
    /// Between its last unit and its blob, and nobody read then.
    Sealing,
    Sealed(Digest, u64),
}

struct Waiting {
    number: u64,
    range: Range<u64>,
    resume: Resume,
}

enum Ready {
    Now,
    Never(Error),
    Later,
}

impl Arriving {
    /// What `listing` will bring under `key`, nothing of it here yet.
    ///
    /// # Errors
    /// What the tree is refused for.
    pub(super) fn new(store: Store, key: String, listing: &Listing, is_local: bool) -> Result<Self> {
        let entries = listing.entries.iter().map(|listed| {
            let kind = match &listed.what {
                What::Directory | What::SameAs(_) => EntryKind::Directory,
                What::Symlink(target) => EntryKind::Symlink { target: target.clone() },
                What::File(file) => {
                    EntryKind::File { size: file.size.unwrap_or(0), executable: file.executable, digest: UNKNOWN }
                }
            };
            Entry { path: listed.path.clone(), kind }
        });
        let tree = Manifest::new(entries.collect())?;
        Ok(Self::of(store, key, tree, obstacle(listing, is_local)))
    }

    /// What an earlier daemon showed under `key`, with what is durable of it.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn resumed(store: Store, key: String, tree: Manifest) -> Result<Self> {
        let flight = key.clone();
        let rows = store.catalog().read(move |tx| fills::of_flight(tx, &flight)).await?;
        // A crash may have taken its name, and what was in it is then missing.
        store.disk().begin_flight(&key)?;
        let arriving = Self::of(store, key, tree, None);
        for row in rows {
            if let Some((entry, _)) = EntryPath::new(row.path.clone()).ok().and_then(|path| arriving.find(&path)) {
                let at = arriving.resumed_file(row)?;
                arriving.lock().at[entry as usize] = at;
            }
        }
        Ok(arriving)
    }

    fn resumed_file(&self, row: FillRow) -> Result<At> {
        if let Some(digest) = row.sealed {
            return Ok(At::Sealed(digest, row.size));
        }
        let units = UnitMap::from_bytes(row.size, &row.units);
        if units.here_bytes() == 0 {
            return Ok(At::Missing);
        }
        let filling = Filling::open(self.store.disk().clone(), &self.key, row.number, units)?;
        Ok(At::Filling(Arc::new(filling)))
    }

    fn of(store: Store, key: String, tree: Manifest, obstacle: Option<String>) -> Self {
        let state = State { at: vec![At::Missing; tree.entries().len()], ..State::default() };
        Self {
            key,
            tree: Arc::new(tree),
            obstacle,
            store,
            state: Mutex::new(state),
            work: Notify::new(),
            moved: Notify::new(),
            small_wanted: Notify::new(),
            distrusted: AtomicBool::new(false),
        }
    }

    /// The tree; file digests are [`UNKNOWN`].
    pub fn tree(&self) -> &Arc<Manifest> {
        &self.tree
    }

    /// The store that it arrives in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The entry at `path`, if it is a file's: its number and size.
    pub(super) fn find(&self, path: &EntryPath) -> Option<(u32, u64)> {
        let entries = self.tree.entries();
        let at = entries.binary_search_by(|entry| entry.path.cmp(path)).ok()?;
        match entries[at].kind {
            EntryKind::File { size, .. } => Some((u32::try_from(at).ok()?, size)),
            EntryKind::Directory | EntryKind::Symlink { .. } => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Arriving {
    /// Whoever still waits is asked for again by the kernel, of the next daemon; an answer now would be an error.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.waiting.drain().flat_map(|(_, waiting)| waiting).for_each(|waiting| std::mem::forget(waiting.resume));
    }
}

impl State {
    fn ready(&self, entry: u32, range: &Range<u64>) -> Ready {
        match self.at.get(entry as usize) {
            Some(At::Sealed(..)) => return Ready::Now,
            Some(At::Filling(filling)) if filling.has(range.clone()) => return Ready::Now,
            Some(At::Missing | At::Filling(_) | At::Sealing) | None => {}
        }
        self.failed.as_ref().map_or(Ready::Later, |error| Ready::Never(error.share()))
    }

    /// Takes those out that wait for what is here now.
    fn take_ready(&mut self, entry: u32) -> Vec<(Resume, Result<()>)> {
        let Some(waiting) = self.waiting.remove(&entry) else { return Vec::new() };
        let (ready, later): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|waiting| matches!(self.ready(entry, &waiting.range), Ready::Now));
        if !later.is_empty() {
            self.waiting.insert(entry, later);
        }
        self.waits = self.waits.saturating_sub(ready.len());
        ready.into_iter().map(|waiting| (waiting.resume, Ok(()))).collect()
    }
}

impl At {
    fn sealed(&self) -> Option<Digest> {
        match self {
            Self::Sealed(digest, _) => Some(*digest),
            Self::Missing | Self::Filling(_) | Self::Sealing => None,
        }
    }
}

/// Answers readers on a thread that may touch the disk.
fn run(ready: Vec<(Resume, Result<()>)>) {
    if ready.is_empty() {
        return;
    }
    // Dropped unrun when the process ends, and then not answered: see [`Arriving`]'s own end.
    let ready = std::mem::ManuallyDrop::new(ready);
    let answer = move || {
        std::mem::ManuallyDrop::into_inner(ready).into_iter().for_each(|(resume, outcome)| resume(outcome));
    };
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(answer)),
        Err(_) => answer(),
    }
}

/// Why a listing cannot be read before it is whole.
fn obstacle(listing: &Listing, is_local: bool) -> Option<String> {
    if is_local {
        return Some("its source is this host itself".to_owned());
    }
    listing.entries.iter().find_map(|listed| match &listed.what {
        What::File(file) if file.size.is_none() => {
            Some(format!("the source does not say how large `{}` is", listed.path))
        }
        What::File(file) if !file.ranges && file.size.is_some_and(|size| size > UNIT_BYTES) => {
            Some(format!("the source has no ranges of `{}`", listed.path))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests;
