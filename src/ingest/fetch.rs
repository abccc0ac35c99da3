//! Getting one large file's bytes here and sealed ([`small`](super::small) does the others).
//!
//! They are filled in units, from ranges of several units in parallel where the source has ranges, else from the beginning in one stream, in the order that
//! [`arriving`](super::arriving) decides; a sealer follows on a blocking thread. Files of this host are copied by the kernel, or share extents with the store where the filesystem can.
//!
//! Durable units are recorded while a large file fills (flush, then row), at most every second and every 64 MiB: that is what `kill -9`
//! costs. Copies on this host are not recorded; copying again is as quick as checking.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use tokio::time::Instant;

use super::arriving::{Arriving, Step};
use super::copy;
use super::flying::{Bringing, Flying};
use super::plan::ToFill;
use super::publish::{Filled, GiveUp, publish};
use super::retry::{Ladder, until_it_works};
use super::seal::{self, Digested};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::fills;
use crate::error::{CUT_SHORT, Error, Kind, Result};
use crate::in_place;
pub(super) use crate::in_place::on_another_thread as blocking;
use crate::limits::UNIT_BYTES;
use crate::pieces::Pieces;
use crate::source::{File, SOURCE_CHANGED};
use crate::store::filling::{Filling, UnitMap};
use crate::units::now_unix_ms;

/// Bytes gathered before they are written: those of a few streams are in the processor's second-level cache then.
const WRITE_BYTES: usize = 256 << 10;

/// Memory of a stream: what is gathered, a piece more, and what is on its way.
pub(super) const STREAM_BYTES: u64 = 2 << 20;

/// What came for a reader is written after this time at the latest: a slow source must not hold memory of what others wait for.
const LULL: Duration = Duration::from_millis(500);

/// Times that a source is asked whether a file is still what was listed.
const CONFIRM_ATTEMPTS: u32 = 3;

pub(super) fn changed(what: &str) -> Error {
    Error::wrong_state(SOURCE_CHANGED, format!("`{what}` changed while it was read"))
        .remedy("let it come to rest, then retry")
}

pub(super) fn too_short(got: u64, size: u64) -> Error {
    Error::unavailable("BODY_TOO_SHORT", format!("the source sent {got} of {size} bytes announced")).remedy(CUT_SHORT)
}

pub(super) fn too_long(size: u64) -> Error {
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
    // What readers wait for comes without it.
    let _sealer = flying.shared.bounds.sealer().await?;
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

pub(super) fn is_corrupt(digested: &Result<Digested>) -> bool {
    digested.as_ref().is_err_and(|error| error.kind() == Kind::Corrupt)
}

/// Puts wrong bytes aside to be looked at, and says so; none of them is resumed from, where some of its `size` could be. What keeps it from doing so
/// is logged: why they are wrong is what counts.
pub(super) async fn put_aside(bringing: &Bringing, file: &ToFill, size: Option<u64>) {
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
            let bounds = &flying.shared.bounds;
            let _permits =
                if step.step.wanted { bounds.request().await? } else { bounds.background(STREAM_BYTES).await? };
            if !arriving.go_on(&step.step, next).await {
                return Ok(());
            }
            tracing::trace!(path = %file.path, units = ?(next..step.step.units.end), "a stretch is fetched");
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
    // A reader's: claimed when something comes, given back when it is written.
    let mut memory = None;
    loop {
        let piece = match &memory {
            Some((_, until)) => tokio::time::timeout_at(*until, stream.next()).await,
            None => Ok(stream.next().await),
        };
        if let Ok(Some(Ok(piece))) = &piece {
            if step.wanted && memory.is_none() && !piece.is_empty() {
                let claimed = flying.claim_wanted(STREAM_BYTES).await?;
                memory = Some((claimed, Instant::now() + LULL));
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
    in_place::blocking(move || {
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
            let permits = flying.shared.bounds.background(STREAM_BYTES);
            let _permits = permits.await.map_err(|error| error.during("fetching"))?;
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
