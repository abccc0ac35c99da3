//! An archive at a source, extracted while it arrives.
//!
//! Only a file that was asked for by its own address is taken apart, and only where its name says that it is an archive
//! (`extract=false` keeps it). What its members become is [`super::stream`]'s; here its bytes are brought to who reads the archive:
//!
//! * a tar or a single compressed file is read in order: a task fetches and a bounded channel carries. A connection that breaks
//!   is taken up where it broke, if the source has ranges. A tar that is not compressed is then gone on with after a restart, too ([`tar`]);
//! * a zip is read where its directory says, in ranges, a connection for the directory and one for the members. Nothing of it is on
//!   disk but its members;
//! * a zip that its source gives only whole, or of unknown size, is spooled into the flight's directory first, as a file
//!   that is unlinked before it is read.
//!
//! What cannot be taken up begins anew along the ladder, as does the whole after a restart. Members of a zip that were sealed before, of this
//! very revision, are settled by their rows and not fetched again: its directory tells where the others are. Their sums were
//! verified before they were sealed. What is compressed has to be read from its beginning, and nothing before its end says that it is
//! sound: there what is sealed is found again by its digest.
//! Digests that the source states of the archive are verified where it is read in order; members of zips have their own sums.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::AbortHandle;

use super::fetch;
use super::flying::Flying;
use super::retry::Ladder;
use super::stream;
use super::taker::{self, ADMIT_BYTES};
use super::tar;
use crate::archive::{self, About, Archived, Format, Members, Runs};
use crate::catalog::fills;
use crate::digest::Digest;
use crate::error::{CUT_SHORT, Error, Kind, Result};
use crate::layout::ReadAt;
use crate::manifest::Manifest;
use crate::names::{EntryName, EntryPath};
use crate::panics::guarded_task;
use crate::source::{ByteStream, EntryStream, File, Listed, Listing, SOURCE_CHANGED, Verifier, What, listed_member};
use crate::store::filling::Filling;

/// Pieces of an archive between who fetches and who reads: with those of HTTP (64 KiB and less) half a MiB.
pub(super) const QUEUE_PIECES: usize = 8;

/// What one extraction holds in memory: both queues and what the decoders keep.
const MEMORY_BYTES: u64 = 8 << 20;

/// Bytes read over rather than asked for anew: headers between members, which cost less than a request.
const SKIP_BYTES: u64 = 256 << 10;

/// Places of a zip that are read at a time: its directory and its members.
const CURSORS: usize = 2;

/// An archive to be extracted.
#[derive(Clone, Debug)]
pub(super) struct Archive {
    pub(super) about: About,
    pub(super) file: File,
    pub(super) path: EntryPath,
}

impl Archive {
    /// The archive that was asked for, unless what was asked for is none or is to be kept.
    pub(super) fn of(listing: &Listing, options: &BTreeMap<String, String>) -> Option<Self> {
        let kept = options.get("extract").is_some_and(|value| value == "false");
        let [Listed { path, what: What::File(file) }] = listing.entries.as_slice() else { return None };
        if kept || !listing.one_file {
            return None;
        }
        let name = EntryName::new(path.file_name()).ok()?;
        let format = Format::of_name(&name)?;
        let about = About { name, format, executable: file.executable };
        Some(Self { about, file: file.clone(), path: path.clone() })
    }
}

/// Extracts `archive` as the tree of a flight.
///
/// # Errors
/// Those of the source, the archive and the store.
pub(super) async fn extract(flying: &Arc<Flying>, archive: &Archive) -> Result<Manifest> {
    let shared = &flying.shared;
    let _slot = shared.slot().await?;
    let _memory = shared.bounds.claim(MEMORY_BYTES).await?;
    let mut ladder = Ladder::new(shared.settings.attempts);
    loop {
        flying.progress.restart();
        let attempt = async {
            let entries: Box<dyn EntryStream> = if tar::has_places(archive) {
                Box::new(tar::open(flying, archive).await?)
            } else {
                shared.store.disk().clear_flight(&flying.key, &[])?;
                shared.store.disk().begin_flight(&flying.key)?;
                Box::new(open(flying, archive, sealed(flying, archive).await?).await?)
            };
            stream::fill(shared, &flying.key, entries, &flying.progress).await
        };
        match attempt.await {
            Ok((_, manifest)) => return Ok(manifest),
            Err(error) => {
                if tar::has_places(archive) && (error.kind() == Kind::Corrupt || error.reason() == SOURCE_CHANGED) {
                    // Which of it was wrong, or of what the source has no more, is not known.
                    tar::forget(flying).await?;
                }
                ladder.wait(error).await?;
            }
        }
    }
}

/// Members that an earlier attempt has sealed, with sizes and digests.
type Sealed = Arc<HashMap<EntryPath, (u64, Digest)>>;

/// What may be left out of `archive`. Rows are of this flight, and so of this revision.
async fn sealed(flying: &Flying, archive: &Archive) -> Result<Sealed> {
    if archive.about.format != Format::Zip {
        return Ok(Sealed::default());
    }
    let key = flying.key.clone();
    let rows = flying.shared.store.catalog().read(move |tx| fills::of_flight(tx, &key)).await?;
    let rows = rows.into_iter().filter_map(|row| Some((EntryPath::new(row.path).ok()?, (row.size, row.sealed?))));
    Ok(Arc::new(rows.collect()))
}

async fn open(flying: &Arc<Flying>, archive: &Archive, sealed: Sealed) -> Result<Extracting> {
    let size = archive.file.size.filter(|_| archive.file.ranges);
    let (bytes, task) = match (archive.about.format, size) {
        (Format::Zip, Some(size)) => {
            let (asks, asked) = mpsc::channel(1);
            let task = tokio::spawn(Ranges::new(flying, archive, size).serve(asked));
            (Archived::Random(Box::new(RangedBytes { asks }), size), Some(task.abort_handle()))
        }
        (Format::Zip, None) => {
            let (file, size) = spool(flying, archive).await?;
            (Archived::Random(Box::new(file), size), None)
        }
        (Format::Tar | Format::Single(_), _) => {
            let (sender, pieces) = mpsc::channel(QUEUE_PIECES);
            let task = tokio::spawn(pump(Arc::clone(flying), archive.file.clone(), 0, sender));
            let verifier = Verifier::new(&archive.file.expected, archive.file.size.unwrap_or(0));
            let reader = PieceReader::new(pieces, verifier, archive.path.clone());
            (Archived::Stream(Box::new(reader)), Some(task.abort_handle()))
        }
    };
    let known = sealed.clone();
    let here = move |path: &EntryPath, size: u64| known.get(path).is_some_and(|(sealed, _)| *sealed == size);
    let dictionaries = flying.shared.settings.dictionaries.clone();
    let members = Members::read_rest(bytes, archive.about.clone(), dictionaries, Box::new(here));
    Ok(Extracting { members, task, sealed, present: None })
}

/// The members as entries. Dropping it ends the fetching, and with it the reading.
struct Extracting {
    members: Members,
    task: Option<AbortHandle>,
    sealed: Sealed,
    /// The present member, where it is sealed.
    present: Option<(u64, Digest)>,
}

impl Drop for Extracting {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[async_trait]
impl EntryStream for Extracting {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        let member = self.members.next().await?;
        self.present = member.as_ref().and_then(|member| match member.what {
            archive::What::File { here: true, .. } => self.sealed.get(&member.path).copied(),
            _ => None,
        });
        Ok(member.map(listed_member))
    }

    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        self.members.next_bytes().await
    }

    fn sealed(&self) -> Option<(u64, Digest)> {
        self.present
    }

    fn revision(&self, _tree: &Manifest) -> String {
        // The flight has the archive's own.
        String::new()
    }
}

/// Nobody fetches any more.
pub(super) fn given_up() -> io::Error {
    io::Error::other(Error::new(Kind::Cancelled, "ARCHIVE_GIVEN_UP", "nobody fetches it any more"))
}

/// Pieces on their way; `None` is the end, so that it can be told from a fetcher that went away.
pub(super) type Piece = Result<Option<Bytes>>;

/// Fetches a file from byte `from` to its end.
pub(super) async fn pump(flying: Arc<Flying>, file: File, from: u64, sender: mpsc::Sender<Piece>) {
    let outcome = guarded_task("fetching an archive", pump_all(&flying, &file, from, &sender)).await;
    let _ = sender.send(outcome.map(|()| None)).await;
}

async fn pump_all(flying: &Arc<Flying>, file: &File, from: u64, sender: &mpsc::Sender<Piece>) -> Result<()> {
    let mut ladder = Ladder::new(flying.shared.settings.attempts);
    let end = file.size.unwrap_or(u64::MAX);
    let mut at = from;
    loop {
        let before = at;
        let fetched = {
            let _stream = flying.shared.bounds.stream().await?;
            pump_once(flying, file, &mut at, end, sender).await
        };
        match fetched {
            // The reader ends with the archive, so it is asked before that is told.
            Ok(()) => return fetch::confirm(flying, file).await,
            Err(error) if at > 0 && !file.ranges => return Err(error),
            Err(error) => {
                if at > before {
                    ladder.progressed();
                }
                ladder.wait(error).await?;
            }
        }
    }
}

async fn pump_once(
    flying: &Arc<Flying>,
    file: &File,
    at: &mut u64,
    end: u64,
    sender: &mpsc::Sender<Piece>,
) -> Result<()> {
    if *at == end {
        return Ok(());
    }
    let mut bytes = flying.source.read(file, *at..end).await?;
    while let Some(piece) = bytes.next().await {
        let piece = piece?;
        *at += piece.len() as u64;
        if sender.send(Ok(Some(piece))).await.is_err() {
            // The reader failed, and says why itself.
            return Ok(());
        }
    }
    Ok(())
}

/// The reader's end of [`pump`].
pub(super) struct PieceReader {
    pieces: mpsc::Receiver<Piece>,
    /// Taken at the end.
    verifier: Option<Verifier>,
    path: EntryPath,
}

impl PieceReader {
    /// Reads `pieces` and holds them to what is expected of the file at `path`.
    pub(super) const fn new(pieces: mpsc::Receiver<Piece>, verifier: Verifier, path: EntryPath) -> Self {
        Self { pieces, verifier: Some(verifier), path }
    }
}

impl Runs for PieceReader {
    fn next_run(&mut self) -> io::Result<Bytes> {
        while let Some(verifier) = &mut self.verifier {
            match self.pieces.blocking_recv().ok_or_else(given_up)?.map_err(io::Error::other)? {
                Some(piece) if piece.is_empty() => {}
                Some(piece) => {
                    verifier.update(&piece);
                    return Ok(piece);
                }
                None => {
                    let whole = self.verifier.take().map_or(Ok(()), |verifier| verifier.finish(&self.path.to_string()));
                    whole.map_err(io::Error::other)?;
                }
            }
        }
        Ok(Bytes::new())
    }
}

/// A question for bytes at an offset.
struct Ask {
    offset: u64,
    most: usize,
    answer: oneshot::Sender<Result<Bytes>>,
}

/// The reader's end of [`Ranges`].
struct RangedBytes {
    asks: mpsc::Sender<Ask>,
}

impl ReadAt for RangedBytes {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let (answer, given) = oneshot::channel();
        self.asks.blocking_send(Ask { offset, most: buffer.len(), answer }).map_err(|_| given_up())?;
        let bytes = given.blocking_recv().map_err(|_| given_up())?.map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }
}

/// Answers questions for bytes of a file at a source, going on where an earlier answer ended.
struct Ranges {
    flying: Arc<Flying>,
    file: File,
    size: u64,
    /// Least recently used first.
    cursors: Vec<Cursor>,
}

/// A place that is being read.
struct Cursor {
    at: u64,
    bytes: ByteStream,
    present: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl Ranges {
    fn new(flying: &Arc<Flying>, archive: &Archive, size: u64) -> Self {
        Self { flying: Arc::clone(flying), file: archive.file.clone(), size, cursors: Vec::new() }
    }

    async fn serve(mut self, mut asked: mpsc::Receiver<Ask>) {
        while let Some(Ask { offset, most, answer }) = asked.recv().await {
            let _ = answer.send(guarded_task("fetching of an archive", self.read(offset, most)).await);
        }
    }

    async fn read(&mut self, offset: u64, most: usize) -> Result<Bytes> {
        if offset >= self.size || most == 0 {
            return Ok(Bytes::new());
        }
        let mut ladder = Ladder::new(self.flying.shared.settings.attempts);
        loop {
            match self.read_once(offset, most).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => ladder.wait(error).await?,
            }
        }
    }

    /// A cursor that fails is gone.
    async fn read_once(&mut self, offset: u64, most: usize) -> Result<Bytes> {
        let near = |cursor: &Cursor| cursor.at <= offset && offset - cursor.at <= SKIP_BYTES;
        let found = self.cursors.iter().position(near);
        let mut cursor = match found {
            Some(found) => self.cursors.remove(found),
            None => self.begin(offset).await?,
        };
        while cursor.at < offset {
            let over = usize::try_from(offset - cursor.at).unwrap_or(usize::MAX);
            cursor.take(over).await?;
        }
        let bytes = cursor.take(most).await?;
        self.cursors.push(cursor);
        Ok(bytes)
    }

    async fn begin(&mut self, offset: u64) -> Result<Cursor> {
        while self.cursors.len() >= CURSORS {
            self.cursors.remove(0);
        }
        let permit = self.flying.shared.bounds.stream().await?;
        let bytes = self.flying.source.read(&self.file, offset..self.size).await?;
        Ok(Cursor { at: offset, bytes, present: Bytes::new(), _permit: permit })
    }
}

impl Cursor {
    /// Some bytes, `most` at most; never none.
    async fn take(&mut self, most: usize) -> Result<Bytes> {
        while self.present.is_empty() {
            let ended = || {
                Error::unavailable("BODY_TOO_SHORT", "the source sent less of the archive than it announced")
                    .remedy(CUT_SHORT)
            };
            self.present = self.bytes.next().await.ok_or_else(ended)??;
        }
        let bytes = self.present.split_to(most.min(self.present.len()));
        self.at += bytes.len() as u64;
        Ok(bytes)
    }
}

/// The whole archive as a file without a name, and its size.
async fn spool(flying: &Arc<Flying>, archive: &Archive) -> Result<(std::fs::File, u64)> {
    let shared = &flying.shared;
    let number = shared.next_number.fetch_add(1, Ordering::Relaxed);
    let disk = shared.store.disk();
    let filling = Arc::new(Filling::open_unsized(disk.clone(), &flying.key, number)?);
    let file = filling.file().try_clone().map_err(|error| Error::io("opening", "a spooled archive", error))?;
    disk.remove_filling(&flying.key, number)?;
    let _stream = shared.bounds.stream().await?;
    let mut bytes = flying.source.read(&archive.file, 0..archive.file.size.unwrap_or(u64::MAX)).await?;
    let mut size = 0;
    let mut admitted = 0;
    while let Some(piece) = bytes.next().await {
        let piece = piece?;
        let end = size + piece.len() as u64;
        if end > admitted {
            flying.growth.reach(end).await?;
            shared.admit_more(ADMIT_BYTES).await?;
            admitted = end + ADMIT_BYTES;
        }
        taker::append(&filling, vec![piece], size).await?;
        size = end;
    }
    Ok((file, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Expected;

    fn listing(name: &str, one_file: bool) -> Listing {
        let file = File {
            locator: Arc::default(),
            size: None,
            executable: false,
            ranges: false,
            expected: Expected::default(),
        };
        let entry = Listed { path: EntryPath::new(name.as_bytes()).unwrap(), what: What::File(file) };
        Listing { one_file, ..Listing::new("r".into(), vec![entry]) }
    }

    #[test]
    fn only_a_file_that_was_asked_for_itself_is_taken_apart() {
        let none = BTreeMap::new();
        let kept = BTreeMap::from([("extract".to_owned(), "false".to_owned())]);
        assert!(Archive::of(&listing("a.tar.gz", true), &none).is_some());
        assert!(Archive::of(&listing("a.tar.gz", true), &kept).is_none());
        assert!(Archive::of(&listing("a.tar.gz", false), &none).is_none());
        assert!(Archive::of(&listing("a.pt", true), &none).is_none());
    }
}
