//! Getting one file's bytes here and sealed.
//!
//! Small files (one fill unit or less) are held in memory, digested there and written once. Large files are filled in units, from
//! ranges of several units in parallel where the source has ranges, else from the beginning in one stream; a sealer
//! follows on a blocking thread. Files of this host are copied by the kernel, or share extents with the store where the filesystem can.
//!
//! Durable units are recorded while a large file fills (flush, then row), at most every second and every 64 MiB: that is what `kill -9`
//! costs. Copies on this host are not recorded; copying again is as quick as checking.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Shared;
use super::copy;
use super::plan::{self, ToFill};
use super::progress::Progress;
use super::publish::{Filled, GiveUp, publish};
use super::retry::Ladder;
use super::seal::{self, Digested};
use crate::catalog::fills;
use crate::error::{Error, Kind, Result};
use crate::limits::{self, UNIT_BYTES};
use crate::manifest::Entry;
use crate::source::{File, Source};
use crate::store::filling::{Filling, UnitMap};

/// Units asked for in one range: few requests, yet several in flight for one file.
const UNITS_PER_RANGE: u64 = 8;

/// Ranges of one file under way at a time.
const RANGES_PER_FILE: usize = 4;

/// Bytes gathered before they are handed to a blocking thread to be written.
pub(super) const WRITE_BYTES: usize = 1 << 20;

/// Longest time between two recordings of durable units while bytes arrive.
const RECORD_EVERY: Duration = Duration::from_secs(1);

/// What a flight's fetchers share.
pub(super) struct Flying {
    pub(super) shared: Arc<Shared>,
    pub(super) source: Arc<dyn Source>,
    pub(super) key: String,
    pub(super) progress: Arc<Progress>,
    /// Blocking work that uses a core. A flight of its own host has its own permits: a file system that does not answer must
    /// not hold those of others.
    cores: Arc<Semaphore>,
}

impl Flying {
    pub(super) fn new(shared: Arc<Shared>, source: Arc<dyn Source>, key: String, progress: Arc<Progress>) -> Self {
        let cores = if source.is_local() { cores() } else { shared.bounds.cores.clone() };
        Self { shared, source, key, progress, cores }
    }

    pub(super) async fn core(&self) -> Result<OwnedSemaphorePermit> {
        self.cores.clone().acquire_owned().await.map_err(|_| closed())
    }

    /// The file itself where it is on this host; does not wait for its disk on a thread of the runtime.
    async fn open_local(&self, file: &File) -> Result<Option<std::fs::File>> {
        if !self.source.is_local() {
            return Ok(None);
        }
        let (source, file) = (self.source.clone(), file.clone());
        blocking(move || source.open_local(&file)).await
    }
}

/// Permits for blocking work that uses a core: some of it waits for the disk.
fn cores() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from) * 2))
}

/// What bounds all fetchers of the daemon.
pub(super) struct Bounds {
    /// Memory in KiB.
    memory: Arc<Semaphore>,
    /// Streams from sources.
    streams: Arc<Semaphore>,
    /// Blocking work that uses a core.
    cores: Arc<Semaphore>,
    budget_kib: u32,
}

impl Bounds {
    pub(super) fn new(memory_budget_bytes: u64) -> Self {
        let budget_kib = u32::try_from(memory_budget_bytes >> 10).unwrap_or(u32::MAX >> 4).max(16 << 10);
        Self {
            memory: Arc::new(Semaphore::new(budget_kib as usize)),
            streams: Arc::new(Semaphore::new(limits::FETCHES_PER_SOURCE * 4)),
            cores: cores(),
            budget_kib,
        }
    }

    /// Claims memory before it is used; more than the whole budget counts as the whole.
    pub(super) async fn claim(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(self.budget_kib);
        self.memory.clone().acquire_many_owned(kib).await.map_err(|_| closed())
    }

    pub(super) async fn stream(&self) -> Result<OwnedSemaphorePermit> {
        self.streams.clone().acquire_owned().await.map_err(|_| closed())
    }

    /// What one stream of a large file needs. Always in this order, and never while waiting to try again: a source that is down must not
    /// keep the others from being read.
    async fn large(&self) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        Ok((self.stream().await?, self.claim(2 * WRITE_BYTES as u64).await?))
    }
}

fn closed() -> Error {
    Error::new(Kind::Cancelled, "STOPPING", "ckptd is stopping")
}

impl Shared {
    /// Bytes that may be filled now: what the filesystem and the configured capacity leave.
    pub(super) async fn available_bytes(&self) -> Result<u64> {
        let available = self.store.available_bytes()?.saturating_sub(self.promised_bytes());
        if self.settings.capacity_bytes == 0 {
            return Ok(available);
        }
        let (_, physical, _) = self.store.catalog().read(crate::catalog::blobs::totals).await?;
        Ok(available.min(self.settings.capacity_bytes.saturating_sub(physical)))
    }
}

impl Shared {
    /// Bytes that flights under way still have to write: promised to them, though not taken yet.
    fn promised_bytes(&self) -> u64 {
        let flights = super::lock(&self.flights);
        let writing =
            flights.values().filter_map(std::sync::Weak::upgrade).filter(|flight| flight.in_place().is_none());
        let readings = writing.map(|flight| flight.progress().reading());
        readings.map(|reading| reading.bytes_total.saturating_sub(reading.bytes_done)).sum()
    }
}

/// Runs blocking work on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal("a blocking task ended early").because(error))?
}

/// Fetches and seals a file of at most one fill unit.
pub(super) async fn small(flying: Arc<Flying>, file: ToFill) -> Result<Entry> {
    let size = file.file.size.unwrap_or(0);
    let (bytes, memory, core) = if flying.source.is_local() {
        // Memory last: what waits for a disk must not hold it.
        let core = flying.core().await?;
        (None, flying.shared.bounds.claim(size).await?, core)
    } else {
        let (bytes, memory) = small_from_stream(&flying, &file, size).await?;
        (Some(bytes), memory, flying.core().await?)
    };
    let (work, flight) = (file.clone(), flying.clone());
    let digested = blocking(move || {
        let bytes = match bytes {
            Some(bytes) => bytes,
            None => small_from_here(flight.source.as_ref(), &work.file, size)?,
        };
        let digested = seal::digest_small(&bytes, &work.path, &work.file.expected)?;
        flight.shared.store.disk().write_filling(&flight.key, work.number, &bytes)?;
        Ok(digested)
    })
    .await?;
    drop((memory, core));
    if file.file.size.is_some() {
        flying.progress.arrived(size);
    }
    filled(&flying, file, size, digested, false).await
}

fn small_from_here(source: &dyn Source, file: &File, size: u64) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let opened = source
        .open_local(file)?
        .ok_or_else(|| Error::internal("a file of this host cannot be opened as one any more"))?;
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    (&opened).take(size + 1).read_to_end(&mut bytes).map_err(|error| Error::io("reading", &file.locator, error))?;
    source.check_unchanged(file, &opened)?;
    if bytes.len() as u64 != size {
        return Err(changed(&file.locator));
    }
    Ok(bytes)
}

pub(super) fn changed(what: &str) -> Error {
    Error::wrong_state("SOURCE_CHANGED", format!("`{what}` changed while it was read"))
        .remedy("let it come to rest, then retry")
}

/// The bytes, and the permit for the memory they are in.
async fn small_from_stream(flying: &Arc<Flying>, file: &ToFill, size: u64) -> Result<(Vec<u8>, OwnedSemaphorePermit)> {
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    loop {
        let fetched = {
            let _stream = flying.shared.bounds.stream().await?;
            let memory = flying.shared.bounds.claim(size * 2).await?;
            small_once(flying, file, size).await.map(|bytes| (bytes, memory))
        };
        match fetched {
            Ok(fetched) => return Ok(fetched),
            Err(error) => ladder.wait(error.during(format!("fetching `{}`", file.path))).await?,
        }
    }
}

async fn small_once(flying: &Arc<Flying>, file: &ToFill, size: u64) -> Result<Vec<u8>> {
    let mut stream = flying.source.read(&file.file, 0..size).await?;
    let mut bytes = Vec::with_capacity(usize::try_from(size.min(UNIT_BYTES)).unwrap_or(0));
    while let Some(piece) = stream.try_next().await? {
        if (bytes.len() + piece.len()) as u64 > size {
            return Err(too_long(size));
        }
        bytes.extend_from_slice(&piece);
    }
    if (bytes.len() as u64) < size {
        return Err(too_short(bytes.len() as u64, size));
    }
    Ok(bytes)
}

fn too_short(got: u64, size: u64) -> Error {
    Error::unavailable("BODY_TOO_SHORT", format!("the source sent {got} of {size} bytes announced"))
        .remedy("retry, or ask whoever serves it to check the file")
}

fn too_long(size: u64) -> Error {
    Error::corrupt("BODY_TOO_LONG", format!("the source sends more than the {size} bytes announced"))
}

/// Fetches and seals a large file, or one of unknown size.
pub(super) async fn large(flying: Arc<Flying>, file: ToFill) -> Result<Entry> {
    if let Some(opened) = flying.open_local(&file.file).await? {
        return copy::large_from_here(flying, file, opened).await;
    }
    match file.file.size {
        Some(size) => large_from_ranges(flying, file, size).await,
        None => large_unsized(flying, file).await,
    }
}

/// Waits for both; the copier's error explains the sealer's.
pub(super) async fn join_fill<A>(
    filler: impl Future<Output = Result<A>>,
    sealer: impl Future<Output = Result<Digested>>,
) -> Result<Digested> {
    let (filled, sealed) = tokio::join!(filler, sealer);
    filled?;
    sealed
}

async fn large_from_ranges(flying: Arc<Flying>, file: ToFill, size: u64) -> Result<Entry> {
    let disk = flying.shared.store.disk().clone();
    let units = file.units.clone().unwrap_or_else(|| UnitMap::new(size));
    let believed = units.here_bytes();
    let filling = Arc::new(Filling::open(disk, &flying.key, file.number, units)?);
    flying.progress.take_back(believed - filling.units().here_bytes());
    let _give_up = GiveUp(filling.clone());
    let sealer = {
        let (filling, path, expected) = (filling.clone(), file.path.clone(), file.file.expected.clone());
        blocking(move || seal::follow(&filling, &path, &expected, seal::LayoutFrom::Filling))
    };
    let filler = async {
        let filled = {
            let fetching = fetch_ranges(&flying, &file, &filling);
            let recording = record_units(&flying, &file, &filling);
            tokio::select! {
                fetched = fetching => fetched,
                recorded = recording => recorded,
            }
        };
        if filled.is_err() {
            filling.give_up();
        }
        filled?;
        let filling = filling.clone();
        blocking(move || filling.flush().map(|_| ())).await
    };
    match join_fill(filler, sealer).await {
        Ok(digested) => filled(&flying, file, size, digested, true).await,
        Err(error) => {
            if error.kind() == Kind::Corrupt {
                distrust(&flying, &file, size).await?;
            } else {
                record_once(&flying, &file, &filling).await?;
            }
            Err(error)
        }
    }
}

/// Wrong bytes are not resumed from.
async fn distrust(flying: &Arc<Flying>, file: &ToFill, size: u64) -> Result<()> {
    let (key, path, number) = (flying.key.clone(), file.path.clone(), file.number);
    flying
        .shared
        .store
        .catalog()
        .write(move |tx| fills::set_units(tx, &key, path.as_bytes(), number, size, &UnitMap::new(size).to_bytes()))
        .await?;
    flying.shared.store.disk().remove_filling(&flying.key, file.number)
}

async fn fetch_ranges(flying: &Arc<Flying>, file: &ToFill, filling: &Arc<Filling>) -> Result<()> {
    let missing = filling.units().missing();
    let ranges = if file.file.ranges {
        group(&missing, UNITS_PER_RANGE)
    } else if missing.is_empty() {
        Vec::new()
    } else {
        std::iter::once(0..filling.units().units()).collect()
    };
    futures_util::stream::iter(ranges)
        .map(|units| fetch_range(flying, file, filling, units))
        .buffer_unordered(RANGES_PER_FILE)
        .try_collect::<()>()
        .await
}

/// Runs of adjacent units, at most `most` long.
fn group(units: &[u64], most: u64) -> Vec<Range<u64>> {
    let mut groups: Vec<Range<u64>> = Vec::new();
    for unit in units {
        match groups.last_mut() {
            Some(group) if group.end == *unit && group.end - group.start < most => group.end += 1,
            _ => groups.push(*unit..*unit + 1),
        }
    }
    groups
}

async fn fetch_range(flying: &Arc<Flying>, file: &ToFill, filling: &Arc<Filling>, units: Range<u64>) -> Result<()> {
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    let mut next = units.start;
    loop {
        let before = next;
        let fetched = {
            let _permits = flying.shared.bounds.large().await?;
            fetch_units(flying, file, filling, &mut next, units.end).await
        };
        // A stream that breaks behind its last byte has given everything.
        let Err(error) = fetched else { return Ok(()) };
        if next == units.end {
            return Ok(());
        }
        if !file.file.ranges {
            next = units.start;
        } else if next > before {
            ladder.progressed();
        }
        ladder.wait(error.during(format!("fetching `{}`", file.path))).await?;
    }
}

/// One request: writes what arrives and completes units, moving `next`.
async fn fetch_units(
    flying: &Arc<Flying>,
    file: &ToFill,
    filling: &Arc<Filling>,
    next: &mut u64,
    end: u64,
) -> Result<()> {
    let map = filling.units();
    let range = map.range(*next).start..map.range(end - 1).end;
    let mut stream = flying.source.read(&file.file, range.clone()).await?;
    let mut at = range.start;
    let mut gathered: Vec<Bytes> = Vec::new();
    let mut gathered_bytes = 0;
    loop {
        let piece = stream.next().await;
        if let Some(Ok(piece)) = &piece {
            gathered_bytes += piece.len();
            if at + gathered_bytes as u64 > range.end {
                return Err(too_long(range.end - range.start));
            }
            gathered.push(piece.clone());
        }
        let ended = !matches!(piece, Some(Ok(_)));
        if gathered_bytes >= WRITE_BYTES || (ended && gathered_bytes > 0) {
            write(filling, std::mem::take(&mut gathered), at).await?;
            at += gathered_bytes as u64;
            gathered_bytes = 0;
            while *next < end && map.range(*next).end <= at {
                if !filling.units().contains(*next) {
                    let unit = map.range(*next);
                    filling.complete(*next);
                    flying.progress.arrived(unit.end - unit.start);
                }
                *next += 1;
            }
        }
        match piece {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error),
            None if at < range.end => return Err(too_short(at - range.start, range.end - range.start)),
            None => return Ok(()),
        }
    }
}

async fn write(filling: &Arc<Filling>, pieces: Vec<Bytes>, at: u64) -> Result<()> {
    let filling = filling.clone();
    blocking(move || {
        let mut at = at;
        filling.check_room(pieces.iter().map(|piece| piece.len() as u64).sum())?;
        for piece in pieces {
            filling.write_at(&piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    })
    .await
}

/// Records durable units for as long as it runs; ends only with an error.
async fn record_units(flying: &Arc<Flying>, file: &ToFill, filling: &Arc<Filling>) -> Result<()> {
    let mut recorded = filling.units();
    loop {
        tokio::time::sleep(RECORD_EVERY).await;
        if filling.units() != recorded {
            recorded = record_once(flying, file, filling).await?;
        }
    }
}

async fn record_once(flying: &Arc<Flying>, file: &ToFill, filling: &Arc<Filling>) -> Result<UnitMap> {
    let flushing = filling.clone();
    let units = blocking(move || flushing.flush()).await?;
    let (key, path, number) = (flying.key.clone(), file.path.clone(), file.number);
    let (size, bits) = (file.file.size.unwrap_or(0), units.to_bytes());
    flying
        .shared
        .store
        .catalog()
        .write(move |tx| fills::set_units(tx, &key, path.as_bytes(), number, size, &bits))
        .await?;
    Ok(units)
}

/// A file whose size the source does not say: one stream, sealed afterwards.
async fn large_unsized(flying: Arc<Flying>, file: ToFill) -> Result<Entry> {
    let disk = flying.shared.store.disk().clone();
    let filling = Arc::new(Filling::open_unsized(disk, &flying.key, file.number)?);
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    let size = loop {
        let fetched = {
            let _permits = flying.shared.bounds.large().await.map_err(|error| error.during("fetching"))?;
            fetch_unsized(&flying, &file, &filling).await
        };
        match fetched {
            Ok(size) => break size,
            Err((arrived, error)) => {
                flying.progress.take_back(arrived);
                ladder.wait(error.during(format!("fetching `{}`", file.path))).await?;
            }
        }
    };
    let work = (filling.clone(), file.path.clone(), file.file.expected.clone());
    let digested = blocking(move || {
        let (filling, path, expected) = work;
        filling.set_complete(size)?;
        filling.flush()?;
        seal::follow(&filling, &path, &expected, seal::LayoutFrom::Filling)
    })
    .await?;
    filled(&flying, file, size, digested, true).await
}

async fn fetch_unsized(flying: &Arc<Flying>, file: &ToFill, filling: &Arc<Filling>) -> Result<u64, (u64, Error)> {
    let mut at = 0;
    let mut stream = flying.source.read(&file.file, 0..u64::MAX).await.map_err(|error| (at, error))?;
    while let Some(piece) = stream.try_next().await.map_err(|error| (at, error))? {
        let length = piece.len() as u64;
        plan::check_limit(at + length, flying.shared.settings.checkpoint_bytes).map_err(|error| (at, error))?;
        if at / UNIT_BYTES != (at + length) / UNIT_BYTES {
            let available = flying.shared.available_bytes().await.map_err(|error| (at, error))?;
            plan::admit(UNIT_BYTES, available).map_err(|error| (at, error))?;
        }
        write(filling, vec![piece], at).await.map_err(|error| (at, error))?;
        at += length;
        flying.progress.arrived(length);
    }
    Ok(at)
}

/// Seals a file of the listing.
pub(super) async fn filled(
    flying: &Arc<Flying>,
    file: ToFill,
    size: u64,
    digested: Digested,
    synced: bool,
) -> Result<Entry> {
    let executable = file.file.executable;
    let filled = Filled { path: file.path, number: file.number, size, executable, digested, synced };
    publish(&flying.shared, &flying.key, &flying.progress, filled).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_units_are_asked_for_together() {
        assert_eq!(group(&[0, 1, 2, 5, 6, 9], 2), [0..2, 2..3, 5..7, 9..10]);
        assert!(group(&[], 4).is_empty());
    }
}
