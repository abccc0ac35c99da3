//! What a flight's fetchers share, and what bounds those of all flights: streams, requests for readers, memory, cores.
//!
//! Whoever holds a permit waits for nothing but bytes, the disk, and permits that come later in this order: a stream or a request, a
//! flight's own part of the readers' memory, memory, a core.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Shared;
use super::arriving::Arriving;
use super::estimate;
use super::fetch::{STREAM_BYTES, blocking};
use super::progress::Progress;
use super::quota::Growth;
use crate::catalog::checkpoints::Record;
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::source::{File, Source};

/// What a flight's fetchers share.
pub(super) struct Flying {
    pub(super) shared: Arc<Shared>,
    pub(super) source: Arc<dyn Source>,
    /// Whose it is.
    pub(super) owner: String,
    /// Where its bytes come from, as rates are kept by.
    pub(super) place: String,
    /// Of how many bytes it is known by now that they come.
    pub(super) growth: Growth,
    pub(super) key: String,
    pub(super) progress: Arc<Progress>,
    /// Blocking work that uses a core. A flight of its own host has its own permits: a file system that does not answer must
    /// not hold those of others.
    cores: Arc<Semaphore>,
    /// Memory in KiB for what its readers wait for, of that of all.
    wanted: Arc<Semaphore>,
}

impl Flying {
    pub(super) fn new(
        shared: Arc<Shared>,
        source: Arc<dyn Source>,
        record: &Record,
        key: String,
        progress: Arc<Progress>,
    ) -> Self {
        let (owner, place) = (record.owner.clone(), estimate::place_of(&record.origin));
        let cores = if source.is_local() { cores() } else { shared.bounds.cores.clone() };
        let growth = Growth::new(&shared, &key);
        let wanted = Arc::new(Semaphore::new(shared.bounds.wanted_of_one_kib() as usize));
        Self { shared, source, owner, place, growth, key, progress, cores, wanted }
    }

    /// Claims memory for what a reader waits for, once it comes: a source that is silent holds none, and one flight a quarter at most.
    pub(super) async fn claim_wanted(&self, bytes: u64) -> Result<Memory> {
        let kib = kib_of(bytes).min(self.shared.bounds.wanted_of_one_kib());
        let own = self.wanted.clone().acquire_many_owned(kib).await.map_err(|_| closed())?;
        Ok((Some(own), self.shared.bounds.claim_wanted(bytes).await?))
    }

    pub(super) async fn core(&self) -> Result<OwnedSemaphorePermit> {
        self.cores.clone().acquire_owned().await.map_err(|_| closed())
    }

    /// The file itself where it is on this host; does not wait for its disk on a thread of the runtime.
    pub(super) async fn open_local(&self, file: &File) -> Result<Option<std::fs::File>> {
        if !self.source.is_local() {
            return Ok(None);
        }
        let (source, file) = (self.source.clone(), file.clone());
        blocking(move || source.open_local(&file)).await
    }
}

/// A flight under way and what its readers see of it; cheap to clone.
#[derive(Clone)]
pub(super) struct Bringing {
    pub(super) flying: Arc<Flying>,
    pub(super) arriving: Arc<Arriving>,
}

/// Permits for blocking work that uses a core: some of it waits for the disk.
fn cores() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from) * 2))
}

/// For memory: of what one flight's readers may have, where one waits, and of all.
pub(super) type Memory = (Option<OwnedSemaphorePermit>, OwnedSemaphorePermit);

/// For a request and for memory. A reader's has memory when something of it has come; what is on this host needs no request.
pub(super) type Permits = (Option<OwnedSemaphorePermit>, Option<Memory>);

/// What bounds all fetchers of the daemon.
pub(super) struct Bounds {
    /// Memory in KiB.
    memory: Arc<Semaphore>,
    /// Memory in KiB for what readers wait for: a quarter of all, so that they never wait for the background.
    wanted: Arc<Semaphore>,
    /// Streams from sources.
    streams: Arc<Semaphore>,
    /// Requests for what readers wait for.
    requests: Arc<Semaphore>,
    /// Blocking work that uses a core.
    cores: Arc<Semaphore>,
    /// Threads that follow what fills.
    sealers: Arc<Semaphore>,
    budget_kib: u32,
}

impl Bounds {
    pub(super) fn new(memory_budget_bytes: u64) -> Self {
        let budget_kib = u32::try_from(memory_budget_bytes >> 10).unwrap_or(u32::MAX >> 4).max(16 << 10);
        Self {
            memory: Arc::new(Semaphore::new((budget_kib - budget_kib / 4) as usize)),
            wanted: Arc::new(Semaphore::new((budget_kib / 4) as usize)),
            streams: Arc::new(Semaphore::new(limits::STREAMS)),
            requests: Arc::new(Semaphore::new(limits::STREAMS_FOR_READERS)),
            cores: cores(),
            sealers: Arc::new(Semaphore::new(limits::SEALERS)),
            budget_kib,
        }
    }

    /// Claims memory before it is used; more than the whole budget counts as the whole.
    pub(super) async fn claim(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let kib = kib_of(bytes).min(self.budget_kib - self.budget_kib / 4);
        self.memory.clone().acquire_many_owned(kib).await.map_err(|_| closed())
    }

    /// What readers of one flight may have of it.
    fn wanted_of_one_kib(&self) -> u32 {
        (self.budget_kib / 16).max(kib_of(STREAM_BYTES))
    }

    async fn claim_wanted(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let kib = kib_of(bytes).min(self.budget_kib / 4);
        self.wanted.clone().acquire_many_owned(kib).await.map_err(|_| closed())
    }

    pub(super) async fn stream(&self) -> Result<OwnedSemaphorePermit> {
        self.streams.clone().acquire_owned().await.map_err(|_| closed())
    }

    /// For a thread that follows a file while it fills, for as long as that takes.
    pub(super) async fn sealer(&self) -> Result<OwnedSemaphorePermit> {
        self.sealers.clone().acquire_owned().await.map_err(|_| closed())
    }

    /// What one stream of `bytes` in memory needs. Always in this order, and never while waiting to try again: a source that is down must not
    /// keep the others from being read.
    pub(super) async fn background(&self, bytes: u64) -> Result<Permits> {
        let stream = self.stream().await?;
        Ok((Some(stream), Some((None, self.claim(bytes).await?))))
    }

    /// What one request for a reader needs until something comes.
    pub(super) async fn request(&self) -> Result<Permits> {
        Ok((Some(self.requests.clone().acquire_owned().await.map_err(|_| closed())?), None))
    }
}

fn kib_of(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

fn closed() -> Error {
    Error::new(Kind::Cancelled, "STOPPING", "ckptd is stopping")
}
