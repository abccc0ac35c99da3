//! Getting one file's bytes here and sealed.
//!
//! Small files (one fill unit or less) are held in memory, digested there and written once. Large files are filled in units, from
//! ranges of several units in parallel where the source has ranges, else from the beginning in one stream, in the order that
//! [`arriving`](super::arriving) decides; a sealer follows on a blocking thread. Files of this host are copied by the kernel, or share extents with the store where the filesystem can.
//!
//! Durable units are recorded while a large file fills (flush, then row), at most every second and every 64 MiB: that is what `kill -9`
//! costs. Copies on this host are not recorded; copying again is as quick as checking.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Shared;
use super::arriving::{Arriving, Step};
use super::copy;
use super::estimate;
use super::plan::ToFill;
use super::progress::Progress;
use super::publish::{Filled, GiveUp, publish};
use super::quota::Growth;
use super::retry::{Ladder, until_it_works};
use super::seal::{self, Digested};
use crate::catalog::checkpoints::Record;
use crate::catalog::events::{self, NewEvent};
use crate::catalog::fills;
use crate::error::{CUT_SHORT, Error, Kind, Result};
use crate::limits::{self, UNIT_BYTES};
use crate::pieces::{Pieces, Whole};
use crate::source::{File, SOURCE_CHANGED, Source};
use crate::store::filling::{Filling, UnitMap};
use crate::units::now_unix_ms;

/// Bytes gathered before they are handed to a blocking thread to be written.
pub(super) const WRITE_BYTES: usize = 1 << 20;

/// A source that pauses this long has what came of it written, and holds no memory of what others wait for.
const LULL: Duration = Duration::from_millis(500);

/// A small file that comes for longer than this may be written over meanwhile, as a large one may: the source is asked once more then.
const SOON: Duration = Duration::from_secs(1);

/// Times that a source is asked whether a file is still what was listed.
const CONFIRM_ATTEMPTS: u32 = 3;

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
    async fn claim_wanted(&self, bytes: u64) -> Result<Memory> {
        let kib = kib_of(bytes).min(self.shared.bounds.wanted_of_one_kib());
        let own = self.wanted.clone().acquire_many_owned(kib).await.map_err(|_| closed())?;
        Ok((Some(own), self.shared.bounds.claim_wanted(bytes).await?))
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
type Memory = (Option<OwnedSemaphorePermit>, OwnedSemaphorePermit);

/// For a stream, unless a reader waits for it, and for memory, unless nothing of it has come.
type Permits = (Option<OwnedSemaphorePermit>, Option<Memory>);

/// What bounds all fetchers of the daemon.
pub(super) struct Bounds {
    /// Memory in KiB.
    memory: Arc<Semaphore>,
    /// Memory in KiB for what readers wait for: a quarter of all, so that they never wait for the background.
    wanted: Arc<Semaphore>,
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
            memory: Arc::new(Semaphore::new((budget_kib - budget_kib / 4) as usize)),
            wanted: Arc::new(Semaphore::new((budget_kib / 4) as usize)),
            streams: Arc::new(Semaphore::new(limits::STREAMS)),
            cores: cores(),
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
        (self.budget_kib / 16).max(kib_of(2 * WRITE_BYTES as u64))
    }

    async fn claim_wanted(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let kib = kib_of(bytes).min(self.budget_kib / 4);
        self.wanted.clone().acquire_many_owned(kib).await.map_err(|_| closed())
    }

    pub(super) async fn stream(&self) -> Result<OwnedSemaphorePermit> {
        self.streams.clone().acquire_owned().await.map_err(|_| closed())
    }

    /// What one stream of a large file needs. Always in this order, and never while waiting to try again: a source that is down must not
    /// keep the others from being read.
    async fn large(&self) -> Result<Permits> {
        Ok((Some(self.stream().await?), Some((None, self.claim(2 * WRITE_BYTES as u64).await?))))
    }
}

fn kib_of(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

fn closed() -> Error {
    Error::new(Kind::Cancelled, "STOPPING", "ckptd is stopping")
}

/// Runs blocking work on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal("a blocking task ended early").because(error))?
}

/// Fetches and seals a file of at most one fill unit; `wanted` if a reader waits for it.
pub(super) async fn small(bringing: Bringing, entry: u32, wanted: bool) -> Result<()> {
    let Bringing { flying, arriving } = &bringing;
    let file = arriving.to_fill(entry)?;
    let size = file.file.size.unwrap_or(0);
    let (bytes, permits, core) = if flying.source.is_local() {
        // Memory last: what waits for a disk must not hold it.
        let core = flying.core().await?;
        (None, (None, Some((None, flying.shared.bounds.claim(size).await?))), core)
    } else {
        // The stream's permit is kept until the bytes are written: what comes faster than it is digested waits at the source, not in memory.
        let (bytes, permits) = small_from_stream(&bringing, &file, size, wanted).await?;
        (Some(bytes), permits, flying.core().await?)
    };
    let (work, flight) = (file.clone(), flying.clone());
    let digested = blocking(move || {
        let whole = match bytes {
            Some(bytes) => bytes,
            None => small_from_here(flight.source.as_ref(), &work.file, size)?.into(),
        };
        let disk = flight.shared.store.disk();
        let digested = disk.write_filling_with(&flight.key, work.number, size, |write| {
            seal::digest_small(&whole, &work.path, &work.file.expected, write)
        });
        if is_corrupt(&digested) {
            // To be put aside, if there is room.
            let _ = disk.write_filling_with(&flight.key, work.number, size, |write| whole.each_window(write));
        }
        digested
    })
    .await;
    drop((permits, core));
    if is_corrupt(&digested) {
        put_aside(&bringing, &file, None).await;
    }
    let digested = digested?;
    if file.file.size.is_some() {
        flying.progress.arrived(size);
    }
    filled(&bringing, &file, entry, size, digested, false).await
}

fn small_from_here(source: &dyn Source, file: &File, size: u64) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let opened = source
        .open_local(file)?
        .ok_or_else(|| Error::internal("a file of this host cannot be opened as one any more"))?;
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    (&opened).take(size + 1).read_to_end(&mut bytes).map_err(|error| Error::io("reading", &*file.locator, error))?;
    source.check_unchanged(file, &opened)?;
    if bytes.len() as u64 != size {
        return Err(changed(&file.locator));
    }
    Ok(bytes)
}

pub(super) fn changed(what: &str) -> Error {
    Error::wrong_state(SOURCE_CHANGED, format!("`{what}` changed while it was read"))
        .remedy("let it come to rest, then retry")
}

/// The bytes, and the permits for their stream and the memory they are in.
async fn small_from_stream(bringing: &Bringing, file: &ToFill, size: u64, wanted: bool) -> Result<(Whole, Permits)> {
    let Bringing { flying, arriving } = bringing;
    let bounds = &flying.shared.bounds;
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    loop {
        let fetched = if wanted {
            small_once(flying, file, size, (None, None)).await
        } else {
            let stream = bounds.stream().await?;
            let memory = bounds.claim(size * 2).await?;
            small_once(flying, file, size, (Some(stream), Some((None, memory)))).await
        };
        match fetched {
            Ok(fetched) => return Ok(fetched),
            Err(error) => {
                let _rests = wanted.then(|| arriving.rest_with_small());
                ladder.wait(error.during(format!("fetching `{}`", file.path))).await?;
            }
        }
    }
}

/// One request, under `permits`; without memory it is a reader's, and claims it when something comes.
async fn small_once(
    flying: &Arc<Flying>,
    file: &ToFill,
    size: u64,
    (permit, mut memory): Permits,
) -> Result<(Whole, Permits)> {
    let mut stream = flying.source.read(&file.file, 0..size).await?;
    let began = Instant::now();
    let mut bytes = Pieces::default();
    while let Some(piece) = stream.try_next().await? {
        if memory.is_none() {
            memory = Some(flying.claim_wanted(size * 2).await?);
        }
        if (bytes.len() + piece.len()) as u64 > size {
            return Err(too_long(size));
        }
        bytes.push(piece);
    }
    if (bytes.len() as u64) < size {
        return Err(too_short(bytes.len() as u64, size));
    }
    if began.elapsed() > SOON {
        confirm(flying, &file.file).await?;
    }
    Ok((bytes.whole(), (permit, memory)))
}

fn too_short(got: u64, size: u64) -> Error {
    Error::unavailable("BODY_TOO_SHORT", format!("the source sent {got} of {size} bytes announced")).remedy(CUT_SHORT)
}

fn too_long(size: u64) -> Error {
    Error::corrupt("BODY_TOO_LONG", format!("the source sends more than the {size} bytes announced"))
}

/// Seals a large file, or one of unknown size, once its bytes are here; those of this host it copies itself.
pub(super) async fn large(bringing: Bringing, entry: u32) -> Result<()> {
    let file = bringing.arriving.to_fill(entry)?;
    if let Some(opened) = bringing.flying.open_local(&file.file).await? {
        return copy::large_from_here(&bringing, &file, entry, opened).await;
    }
    match file.file.size {
        Some(size) => large_from_ranges(&bringing, &file, entry, size).await,
        None => large_unsized(&bringing, &file, entry).await,
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

async fn large_from_ranges(bringing: &Bringing, file: &Arc<ToFill>, entry: u32, size: u64) -> Result<()> {
    let Bringing { flying, arriving } = bringing;
    let believed = file.units.as_ref().map_or(0, UnitMap::here_bytes);
    let filling = arriving.filling(file, entry)?;
    flying.progress.take_back(believed.saturating_sub(filling.here_bytes()));
    let _give_up = GiveUp(filling.clone());
    arriving.start(entry);
    let sealer = {
        let (filling, path, expected) = (filling.clone(), file.path.clone(), file.file.expected.clone());
        blocking(move || seal::follow(&filling, &path, &expected, seal::LayoutFrom::Filling))
    };
    let filler = async {
        arriving.filled(&filling).await;
        if let Err(error) = confirm(flying, &file.file).await {
            // Some of it may be of one file and some of another: none of it is gone on with, whatever the source has next.
            arriving.distrust(entry);
            put_aside(bringing, file, Some(size)).await;
            return Err(error);
        }
        let filling = filling.clone();
        blocking(move || filling.flush().map(|_| ())).await
    };
    match join_fill(filler, sealer).await {
        Ok(digested) => filled(bringing, file, entry, size, digested, true).await,
        Err(error) => {
            if error.kind() == Kind::Corrupt {
                arriving.distrust(entry);
                put_aside(bringing, file, Some(size)).await;
            }
            Err(error)
        }
    }
}

/// Asks whether what has come is still what was listed. Only that it is not is an error: what cannot be asked any more, for the address has run out
/// or the server is gone, has come all the same.
pub(super) async fn confirm(flying: &Flying, file: &File) -> Result<()> {
    match until_it_works(CONFIRM_ATTEMPTS, || flying.source.confirm(file)).await {
        Err(error) if error.reason() == SOURCE_CHANGED => Err(error),
        Err(error) => {
            tracing::info!(error = %error.chain(), "whether what came is still what was listed cannot be asked");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn is_corrupt(digested: &Result<Digested>) -> bool {
    digested.as_ref().is_err_and(|error| error.kind() == Kind::Corrupt)
}

/// Puts wrong bytes aside to be looked at, and says so; none of them is resumed from, where some of its `size` could be. What keeps it from doing so
/// is logged: why they are wrong is what counts.
async fn put_aside(bringing: &Bringing, file: &ToFill, size: Option<u64>) {
    if let Err(error) = try_to_put_aside(bringing, file, size).await {
        tracing::warn!(path = %file.path, error = %error.report(), "wrong bytes could not be put aside");
    }
}

async fn try_to_put_aside(bringing: &Bringing, file: &ToFill, size: Option<u64>) -> Result<()> {
    let flying = &bringing.flying;
    let (key, path, number) = (flying.key.clone(), file.path.clone(), file.number);
    let aside = flying.shared.store.disk().quarantine_filling(&flying.key, file.number)?;
    let message =
        format!("`{}` arrived with other bytes than its source has; they are at {}", file.path, aside.display());
    let event = NewEvent { kind: "FILE_QUARANTINED", message, ..Default::default() };
    let units = size.map(|size| (size, UnitMap::new(size).to_bytes()));
    flying
        .shared
        .store
        .catalog()
        .write(move |tx| {
            if let Some((size, units)) = units {
                fills::set_units(tx, &key, path.as_bytes(), number, size, &units)?;
            }
            events::record(tx, now_unix_ms(), &event)
        })
        .await
}

/// Fetches one range, until it is here or another step has it.
pub(super) async fn range(bringing: &Bringing, step: Step) -> Result<()> {
    let Bringing { flying, arriving } = bringing;
    let step = Taken { arriving: arriving.clone(), step };
    let file = arriving.to_fill(step.step.entry)?;
    let filling = arriving.filling(&file, step.step.entry)?;
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    let mut next = step.step.units.start;
    loop {
        let before = next;
        let fetched = {
            let _permits = if step.step.wanted { None } else { Some(flying.shared.bounds.large().await?) };
            if !arriving.go_on(&step.step, next).await {
                return Ok(());
            }
            fetch_units(flying, &file, &filling, &step, &mut next).await
        };
        // A stream that breaks behind its last byte has given everything.
        let Err(error) = fetched else { return Ok(()) };
        if next == step.step.units.end {
            return Ok(());
        }
        if !file.file.ranges {
            next = step.step.units.start;
        } else if next > before {
            ladder.progressed();
        }
        arriving.rest(&step.step);
        ladder.wait(error.during(format!("fetching `{}`", file.path))).await?;
    }
}

/// A step that is being made; what it has not brought is for others when it goes away.
struct Taken {
    arriving: Arc<Arriving>,
    step: Step,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.arriving.end(&self.step);
    }
}

/// One request: writes what arrives and completes units, moving `next`. Ends before a unit that another step has taken.
async fn fetch_units(
    flying: &Arc<Flying>,
    file: &ToFill,
    filling: &Arc<Filling>,
    step: &Taken,
    next: &mut u64,
) -> Result<()> {
    let Taken { arriving, step } = step;
    let end = step.units.end;
    let map = UnitMap::new(filling.size());
    let range = map.range(*next).start..map.range(end - 1).end;
    let mut stream = flying.source.read(&file.file, range.clone()).await?;
    let mut at = range.start;
    let mut gathered = Pieces::default();
    let mut memory = None;
    loop {
        let piece = match tokio::time::timeout(LULL, stream.next()).await {
            Err(_) if gathered.len() == 0 => continue,
            came => came,
        };
        if let Ok(Some(Ok(piece))) = &piece {
            if step.wanted && memory.is_none() {
                memory = Some(flying.claim_wanted(2 * WRITE_BYTES as u64).await?);
            }
            gathered.push(piece.clone());
        }
        let until = at + gathered.len() as u64;
        if until > range.end {
            return Err(too_long(range.end - range.start));
        }
        let pauses = !matches!(piece, Ok(Some(Ok(_))));
        if until > at && (pauses || gathered.len() >= WRITE_BYTES || until == range.end) {
            let whole = *next..(*next..end).find(|unit| map.range(*unit).end > until).unwrap_or(end);
            let came = write(filling, gathered.take(), at, whole.clone()).await?;
            flying.progress.arrived(came);
            memory = None;
            at = until;
            *next = whole.end;
            let moved = !whole.is_empty();
            whole.for_each(|unit| arriving.arrived(step.entry, unit));
            if moved && *next < end && !arriving.go_on(step, *next).await {
                return Ok(());
            }
            arriving.make_way(step).await;
        }
        match piece {
            Err(_) | Ok(Some(Ok(_))) => {}
            Ok(Some(Err(error))) => return Err(error),
            Ok(None) if at < range.end => return Err(too_short(at - range.start, range.end - range.start)),
            Ok(None) => return Ok(()),
        }
    }
}

/// Writes `pieces` from `at` on, which makes the units `whole` complete; the bytes of those that were not here before.
async fn write(filling: &Arc<Filling>, pieces: Vec<Bytes>, at: u64, whole: Range<u64>) -> Result<u64> {
    let filling = filling.clone();
    blocking(move || {
        let mut at = at;
        filling.check_room(pieces.iter().map(|piece| piece.len() as u64).sum())?;
        for piece in pieces {
            filling.write_at(&piece, at)?;
            at += piece.len() as u64;
        }
        Ok(whole.map(|unit| filling.complete(unit)).sum())
    })
    .await
}

/// A file whose size the source does not say: one stream, sealed afterwards.
async fn large_unsized(bringing: &Bringing, file: &Arc<ToFill>, entry: u32) -> Result<()> {
    let flying = &bringing.flying;
    let disk = flying.shared.store.disk().clone();
    let filling = Arc::new(Filling::open_unsized(disk, &flying.key, file.number)?);
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    let size = loop {
        let fetched = {
            let _permits = flying.shared.bounds.large().await.map_err(|error| error.during("fetching"))?;
            fetch_unsized(flying, file, &filling).await
        };
        match fetched {
            Ok(size) => break size,
            Err((arrived, error)) => {
                flying.progress.take_back(arrived);
                flying.growth.take_back(arrived);
                ladder.wait(error.during(format!("fetching `{}`", file.path))).await?;
            }
        }
    };
    confirm(flying, &file.file).await?;
    let work = (filling.clone(), file.path.clone(), file.file.expected.clone());
    let digested = blocking(move || {
        let (filling, path, expected) = work;
        filling.set_complete(size)?;
        filling.flush()?;
        seal::follow(&filling, &path, &expected, seal::LayoutFrom::Filling)
    })
    .await;
    if is_corrupt(&digested) {
        put_aside(bringing, file, None).await;
    }
    filled(bringing, file, entry, size, digested?, true).await
}

async fn fetch_unsized(flying: &Arc<Flying>, file: &ToFill, filling: &Arc<Filling>) -> Result<u64, (u64, Error)> {
    let mut at = 0;
    let mut stream = flying.source.read(&file.file, 0..u64::MAX).await.map_err(|error| (at, error))?;
    while let Some(piece) = stream.try_next().await.map_err(|error| (at, error))? {
        let length = piece.len() as u64;
        // Before the piece is written; of one that cannot be written it errs on the side of refusing.
        flying.growth.add(length).await.map_err(|error| (at, error))?;
        if at / UNIT_BYTES != (at + length) / UNIT_BYTES {
            flying.shared.admit_more(UNIT_BYTES).await.map_err(|error| (at, error))?;
        }
        write(filling, vec![piece], at, 0..0).await.map_err(|error| (at, error))?;
        at += length;
        flying.progress.arrived(length);
    }
    Ok(at)
}

/// Seals a file of the listing.
pub(super) async fn filled(
    bringing: &Bringing,
    file: &ToFill,
    entry: u32,
    size: u64,
    digested: Digested,
    synced: bool,
) -> Result<()> {
    let Bringing { flying, arriving } = bringing;
    let digest = digested.digest;
    arriving.sealing(entry, digest);
    let (path, executable) = (file.path.clone(), file.file.executable);
    let filled = Filled { path, number: file.number, size, executable, digested, synced, sent: Vec::new() };
    publish(&flying.shared, &flying.key, &flying.progress, filled).await?;
    arriving.sealed(entry, digest, size).await
}
