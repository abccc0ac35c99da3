//! Taking one file after the other from a stream: a small one in memory, a large one into a filling file whose sealer follows; one of unknown size is
//! held in memory until it proves large, and then sealed after its end.
//!
//! A large file that a later run may go on with is recorded while it comes, every [`RECORD_BYTES`] and where it grows slower every second: its bytes are made durable, then its row says how
//! far they go, in one transaction with the rows of the entries up to it. That goes on beside the writing, and once more when the daemon is drained. Of a very large one
//! the first unit is recorded at once: whoever keeps what comes may keep it in the file itself from then on ([`Recorded::fills`]), and it is not written twice.

use std::fs::File as OpenFile;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::Shared;
use super::fetch::blocking;
use super::progress::Progress;
use super::publish::{Filled, GiveUp};
use super::quota::Growth;
use super::seal::{self, Digested};
use super::tasks::is_draining;
use crate::catalog::{fills, uploads};
use crate::error::{Error, Result};
use crate::in_place;
use crate::limits::UNIT_BYTES;
use crate::names::EntryPath;
use crate::pieces::{Whole, length_of};
use crate::source::{Begun, BeingFilled, EntryStream, Expected, File, Recorded};
use crate::store::filling::{Filling, UnitMap};

/// Space that must be left before a file of unknown size grows by as much.
pub(super) const ADMIT_BYTES: u64 = 16 * UNIT_BYTES;

/// Bytes of a large file that come between two recordings: so much of it a kill costs.
const RECORD_BYTES: u64 = 16 * UNIT_BYTES;

/// Time between them where less comes.
const RECORD_EVERY: Duration = Duration::from_secs(1);

/// Takes files into the directory of a flight.
pub(super) struct Taker<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) flight: &'a str,
    pub(super) progress: &'a Arc<Progress>,
    pub(super) growth: &'a Growth,
    /// Wants to hear of entries that are recorded.
    pub(super) recorded: Option<&'a Arc<dyn Recorded>>,
}

/// Where a file is bound for.
pub(super) struct Bound {
    pub(super) path: EntryPath,
    /// Its number in the flight's directory.
    pub(super) number: u64,
    /// Its row, where it is to be recorded and is not.
    pub(super) row: Option<uploads::Sent>,
    /// What an earlier run has of it.
    pub(super) begun: Option<Begun>,
}

impl Taker<'_> {
    /// Tells who wants to hear it that an entry is recorded.
    pub(super) fn is_recorded(&self, position: u64) {
        if let Some(recorded) = self.recorded {
            recorded.whole(position);
        }
    }

    /// Takes one file; `before` bytes came before it. Rows of entries that are to be written with it are taken from `unrecorded`, its own
    /// is added to them once it may be written.
    ///
    /// # Errors
    /// Those of the stream and the store. Where the daemon is drained, what came of a large file that is recorded has been recorded.
    pub(super) async fn take(
        &self,
        stream: &mut dyn EntryStream,
        bound: Bound,
        file: &File,
        before: u64,
        unrecorded: &mut Vec<uploads::Sent>,
    ) -> Result<Filled> {
        let Some(size) = file.size else {
            return self.take_unsized(stream, bound, file, before).await;
        };
        self.growth.reach(before.saturating_add(size)).await?;
        let here = match bound.begun {
            Some(begun) => self.shared.store.disk().occupied_by_file(self.flight, begun.number)?,
            None => 0,
        };
        self.shared.admit_more(size.saturating_sub(here)).await?;
        let executable = file.executable;
        if size <= UNIT_BYTES {
            let Bound { path, number, row, .. } = bound;
            let digested = self.take_small(stream, &path, size, number, &file.expected).await?;
            unrecorded.extend(row);
            let sent = std::mem::take(unrecorded);
            return Ok(Filled { path, number, size, executable, digested, synced: false, sent });
        }
        let digested = self.take_large(stream, &bound, size, &file.expected, unrecorded).await?;
        let Bound { path, number, .. } = bound;
        let sent = std::mem::take(unrecorded);
        Ok(Filled { path, number, size, executable, digested, synced: true, sent })
    }

    async fn take_small(
        &self,
        stream: &mut dyn EntryStream,
        path: &EntryPath,
        size: u64,
        number: u64,
        expected: &Expected,
    ) -> Result<Digested> {
        // Copied: a piece may keep the whole message alive that it came in, of which a sender may make what he likes.
        let mut bytes = Vec::new();
        while let Some(runs) = stream.next_bytes().await? {
            check_length(path, bytes.len() as u64 + length_of(&runs), size, false)?;
            runs.iter().for_each(|run| bytes.extend_from_slice(run));
        }
        check_length(path, bytes.len() as u64, size, true)?;
        self.progress.arrived(size);
        self.seal_small(bytes.into(), path, number, expected).await
    }

    async fn seal_small(&self, whole: Whole, path: &EntryPath, number: u64, expected: &Expected) -> Result<Digested> {
        let (disk, flight) = (self.shared.store.disk().clone(), self.flight.to_owned());
        let (path, expected) = (path.clone(), expected.clone());
        blocking(move || {
            disk.write_filling_with(&flight, number, whole.size(), |write| {
                seal::digest_small(&whole, &path, &expected, write)
            })
        })
        .await
    }

    async fn take_large(
        &self,
        stream: &mut dyn EntryStream,
        bound: &Bound,
        size: u64,
        expected: &Expected,
        unrecorded: &mut Vec<uploads::Sent>,
    ) -> Result<Digested> {
        let filling = self.open(bound, size).await?;
        let _give_up = GiveUp(filling.clone());
        let sealer = {
            let (filling, path, expected) = (filling.clone(), bound.path.clone(), expected.clone());
            blocking(move || seal::follow(&filling, &path, &expected, seal::LayoutFrom::Filling))
        };
        let (filled, sealed) = tokio::join!(self.fill(stream, bound, size, &filling, unrecorded), sealer);
        filled?;
        sealed
    }

    /// Takes a file as it is and seals nothing: it is to be read by whoever takes it apart. What comes is recorded as that of a large file.
    ///
    /// # Errors
    /// As [`Taker::take`].
    pub(super) async fn spool(&self, stream: &mut dyn EntryStream, bound: &Bound, size: u64) -> Result<OpenFile> {
        let filling = self.open(bound, size).await?;
        self.fill(stream, bound, size, &filling, &mut Vec::new()).await?;
        filling.file().try_clone().map_err(|error| Error::io("opening", filling.path(), error))
    }

    /// Writes what comes of a file, and records it where it has a row.
    async fn fill(
        &self,
        stream: &mut dyn EntryStream,
        bound: &Bound,
        size: u64,
        filling: &Arc<Filling>,
        unrecorded: &mut Vec<uploads::Sent>,
    ) -> Result<()> {
        let from = filling.here_bytes();
        self.progress.resume(from);
        let is_recorded = bound.row.is_some() || bound.begun.is_some();
        unrecorded.extend(bound.row.clone());
        let mut recorder = Recorder { taker: self, bound, filling, unrecorded };
        let keeper = Keeper::of(self, bound, size, filling);
        let (grown, growing) = watch::channel(from);
        let written = self.write_all(stream, &bound.path, size, (filling, &keeper), grown);
        let filled = if is_recorded {
            tokio::try_join!(written, recorder.follow(from, growing)).map(drop)
        } else {
            written.await
        };
        // Now: the sealer may be at what an earlier run brought for long. Whole is as good as sealed: what comes behind it need not wait for that.
        let filled = match filled {
            Ok(()) if is_recorded && self.recorded.is_some() => match recorder.record().await {
                // Before it is sealed: its file may be another's then.
                Ok(()) => keeper.settle().await,
                failed => failed,
            },
            Err(error) if is_recorded && is_draining(&error) => {
                if let Err(error) = recorder.record().await {
                    tracing::warn!(flight = self.flight, error = %error.report(), "what came last could not be recorded and will be sent again");
                }
                Err(error)
            }
            filled => filled,
        };
        if filled.is_err() {
            filling.give_up();
        }
        filled
    }

    /// The file that a large one is filled into, with what an earlier run has of it.
    async fn open(&self, bound: &Bound, size: u64) -> Result<Arc<Filling>> {
        let here = bound.begun.map_or(0, |begun| begun.bytes);
        let units = UnitMap::of_beginning(size, here);
        let filling = Filling::open(self.shared.store.disk().clone(), self.flight, bound.number, units)?;
        if filling.here_bytes() != here {
            // It is not believed again.
            let (flight, path) = (self.flight.to_owned(), bound.path.clone());
            let forget = move |tx: &rusqlite::Connection| fills::forget_units(tx, &flight, path.as_bytes());
            self.shared.store.catalog().write(forget).await?;
            let message = format!("what had come of `{}` is not there any more", bound.path);
            return Err(Error::internal(message).remedy("send it again"));
        }
        Ok(Arc::new(filling))
    }

    /// Takes a file whose end alone tells its size.
    async fn take_unsized(
        &self,
        stream: &mut dyn EntryStream,
        bound: Bound,
        file: &File,
        before: u64,
    ) -> Result<Filled> {
        let Bound { path, number, row, .. } = bound;
        let (executable, sent) = (file.executable, Vec::from_iter(row));
        let mut bytes = Vec::new();
        let mut ended = false;
        while !ended && bytes.len() as u64 <= UNIT_BYTES {
            match stream.next_bytes().await? {
                Some(runs) => runs.iter().for_each(|run| bytes.extend_from_slice(run)),
                None => ended = true,
            }
        }
        let mut size = bytes.len() as u64;
        self.check_growth(0, size, before).await?;
        self.progress.arrived(size);
        if size <= UNIT_BYTES {
            let digested = self.seal_small(bytes.into(), &path, number, &file.expected).await?;
            return Ok(Filled { path, number, size, executable, digested, synced: false, sent });
        }
        let filling = Arc::new(Filling::open_unsized(self.shared.store.disk().clone(), self.flight, number)?);
        append(&filling, vec![bytes.into()], 0).await?;
        while let Some(runs) = stream.next_bytes().await? {
            let end = size + length_of(&runs);
            self.check_growth(size, end, before).await?;
            append(&filling, runs, size).await?;
            self.progress.arrived(end - size);
            size = end;
        }
        let (own, expected) = (path.clone(), file.expected.clone());
        let digested = blocking(move || {
            filling.set_complete(size)?;
            filling.flush()?;
            seal::follow(&filling, &own, &expected, seal::LayoutFrom::Filling)
        })
        .await?;
        Ok(Filled { path, number, size, executable, digested, synced: true, sent })
    }

    /// Checks limit and quota for a file that grows, and the space whenever it grew by [`ADMIT_BYTES`].
    async fn check_growth(&self, from: u64, to: u64, before: u64) -> Result<()> {
        self.growth.reach(before.saturating_add(to)).await?;
        if from.div_ceil(ADMIT_BYTES) < to.div_ceil(ADMIT_BYTES) {
            let ahead = if to <= UNIT_BYTES { to } else { ADMIT_BYTES };
            self.shared.admit_more(ahead).await?;
        }
        Ok(())
    }

    /// Writes what comes of a file behind what is here; `grown` is told how far it is with every unit.
    async fn write_all(
        &self,
        stream: &mut dyn EntryStream,
        path: &EntryPath,
        size: u64,
        (filling, keeper): (&Arc<Filling>, &Keeper),
        grown: watch::Sender<u64>,
    ) -> Result<()> {
        let mut at = *grown.borrow();
        while let Some(runs) = stream.next_bytes().await? {
            let before = at;
            check_length(path, before + length_of(&runs), size, false)?;
            at = self.write(filling, runs, before, keeper.kept()).await?;
            // Nothing less than a unit is recorded.
            if before / UNIT_BYTES < at / UNIT_BYTES {
                grown.send_replace(at);
            }
        }
        check_length(path, at, size, true)?;
        let filling = filling.clone();
        blocking(move || filling.flush().map(|_| ())).await
    }

    /// Writes what is not `kept` of the runs that begin at `at`; where they end.
    async fn write(&self, filling: &Arc<Filling>, runs: Vec<Bytes>, at: u64, kept: Range<u64>) -> Result<u64> {
        let end = at + length_of(&runs);
        let parts = [at..end.min(kept.start), at.max(kept.end)..end];
        let completes = at / UNIT_BYTES < end / UNIT_BYTES || end == filling.size();
        if completes || parts.iter().any(|part| !part.is_empty()) {
            let filling = Arc::clone(filling);
            in_place::blocking(move || write_parts(&filling, &runs, at, &parts)).await?;
        }
        self.progress.arrived(end - at);
        Ok(end)
    }
}

/// Writes these parts of the runs that begin at `at`; all before their end is there then.
fn write_parts(filling: &Filling, runs: &[Bytes], mut at: u64, parts: &[Range<u64>]) -> Result<()> {
    let first = at / UNIT_BYTES;
    let bytes = parts.iter().map(|part| part.end.saturating_sub(part.start)).sum();
    if bytes > 0 {
        filling.check_room(bytes)?;
    }
    for run in runs {
        let end = at + run.len() as u64;
        for part in parts {
            let (from, until) = (part.start.max(at), part.end.min(end));
            if from < until {
                let [from_byte, until_byte] =
                    [from, until].map(|byte| usize::try_from(byte - at).unwrap_or(usize::MAX));
                filling.write_at(&run[from_byte..until_byte], from)?;
            }
        }
        at = end;
    }
    let map = filling.units();
    (first..map.units()).take_while(|unit| map.range(*unit).end <= at).for_each(|unit| _ = filling.complete(unit));
    Ok(())
}

/// Who keeps what comes of a large file, perhaps in the file itself.
struct Keeper(Option<(Arc<dyn Recorded>, u64)>);

impl Keeper {
    /// Whoever hears of entries that are recorded, told of the file.
    fn of(taker: &Taker<'_>, bound: &Bound, size: u64, filling: &Filling) -> Self {
        let position = bound.row.as_ref().map(|(position, _)| *position);
        let Some((recorded, position)) = taker.recorded.zip(position) else { return Self(None) };
        // Where there are no descriptors left, what comes is kept elsewhere.
        if let Ok(file) = filling.file().try_clone() {
            recorded.fills(position, BeingFilled { file, number: bound.number, size });
        }
        Self(Some((Arc::clone(recorded), position)))
    }

    /// The bytes that are in the file without having been written to it here.
    fn kept(&self) -> Range<u64> {
        self.0.as_ref().map_or(0..0, |(recorded, position)| recorded.kept(*position))
    }

    /// Waits until whatever follows from what is recorded is kept.
    async fn settle(self) -> Result<()> {
        let Some((recorded, _)) = self.0 else { return Ok(()) };
        let settle = move || {
            recorded.settle();
            Ok(())
        };
        blocking(settle).await
    }
}

/// Notes how much of a large file is durable.
struct Recorder<'a> {
    taker: &'a Taker<'a>,
    bound: &'a Bound,
    filling: &'a Arc<Filling>,
    /// Rows that are to be written with it, its own among them.
    unrecorded: &'a mut Vec<uploads::Sent>,
}

impl Recorder<'_> {
    /// Records what comes behind byte `recorded`, for as long as anybody writes; much may have come before this is first asked.
    async fn follow(&mut self, mut recorded: u64, mut grown: watch::Receiver<u64>) -> Result<()> {
        let mut enough = if self.filling.size() >= 2 * RECORD_BYTES { UNIT_BYTES } else { RECORD_BYTES };
        loop {
            let much = grown.wait_for(|at| *at >= recorded + enough);
            if let Ok(ended) = tokio::time::timeout(RECORD_EVERY, much).await.map(|grown| grown.is_err())
                && ended
            {
                return Ok(());
            }
            let at = *grown.borrow();
            if at / UNIT_BYTES == recorded / UNIT_BYTES {
                continue;
            }
            (recorded, enough) = (at, RECORD_BYTES);
            self.record().await?;
        }
    }

    /// Makes durable what is here, then says so.
    async fn record(&mut self) -> Result<()> {
        let flushing = self.filling.clone();
        let units = blocking(move || flushing.flush()).await?;
        let (flight, path, number) = (self.taker.flight.to_owned(), self.bound.path.clone(), self.bound.number);
        // Kept until they are written: this may be given up at any moment.
        let mut rows = self.unrecorded.clone();
        let (size, bytes) = (units.size(), units.frontier_bytes());
        let own = self.bound.row.as_ref().map(|(position, _)| *position);
        if let Some((position, recorded)) = own.zip(self.taker.recorded)
            && let Some(row) = recorded.row(position, bytes)
        {
            rows.push((position, row));
        }
        let record = move |tx: &rusqlite::Connection| {
            fills::set_units(tx, &flight, path.as_bytes(), number, units.size(), &units.to_bytes())?;
            uploads::put(tx, &flight, &rows)
        };
        self.taker.shared.store.catalog().write(record).await?;
        for (position, _) in std::mem::take(self.unrecorded) {
            if Some(position) != own {
                self.taker.is_recorded(position);
            }
        }
        match own.zip(self.taker.recorded) {
            Some((position, recorded)) if bytes < size => recorded.begun(position, bytes),
            Some((position, recorded)) => recorded.whole(position),
            None => {}
        }
        Ok(())
    }
}

/// Writes these runs from byte `at` on.
pub(super) async fn append(filling: &Arc<Filling>, runs: Vec<Bytes>, mut at: u64) -> Result<()> {
    let filling = filling.clone();
    in_place::blocking(move || {
        for run in runs {
            filling.write_at(&run, at)?;
            at += run.len() as u64;
        }
        Ok(())
    })
    .await
}

/// What to do about a file that was not as long as its sender said.
const AT_REST: &str = "let nothing write to it meanwhile, and send it again";

fn check_length(path: &EntryPath, got: u64, size: u64, ended: bool) -> Result<()> {
    if got > size {
        return Err(Error::invalid(
            "BODY_TOO_LONG",
            format!("more than the {size} bytes announced were sent for `{path}`"),
        )
        .remedy(AT_REST));
    }
    if ended && got < size {
        return Err(Error::invalid(
            "BODY_TOO_SHORT",
            format!("{got} of {size} bytes announced were sent for `{path}`"),
        )
        .remedy(AT_REST));
    }
    Ok(())
}
