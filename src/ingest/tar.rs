//! A tar at a source, extracted while it arrives, and gone on with by a later run of the daemon, or a later attempt.
//!
//! Where the source has ranges and the tar is not compressed, its members are recorded like entries that are sent ([`stream`](super::stream)), each
//! with its place in the tar ([`recorded`]). The next run gives what is recorded and fetches from there on, also from within a large member.
//!
//! Digests that the source states are of the whole tar. Then what was taken of it before is believed only as far as there is a [`Mark`]: the state of what
//! takes the digests, exactly there, over the very bytes that were kept. Beyond the last mark all is fetched and written anew. So at the end the digest is of
//! what was kept, from the first byte to the last, however often it was gone on with.
//!
//! What is compressed, and what comes without ranges, has no places to go on from: it begins anew.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::extract::{Archive, QUEUE_PIECES, pump};
use super::flying::Flying;
use super::left::{Decoded, forget_all, forget_from, left_of};
use super::marks::{MarkedReader, Marks};
use crate::archive::{Archived, Format, Member, Members, What};
use crate::catalog::uploads;
use crate::digest::Digest;
use crate::error::Result;
use crate::limits::UNIT_BYTES;
use crate::manifest::Manifest;
use crate::source::recorded::{self, Mark, Next, RecordedMembers};
use crate::source::{Begun, EntryStream, File, Here, Listed, Recorded, Verifier, listed_member};
use crate::store::Store;

/// Whether members of `archive` have places from which it can be gone on with, as far as that is known before its first byte.
pub(super) fn has_places(archive: &Archive) -> bool {
    let File { ranges, size, expected, .. } = &archive.file;
    archive.about.format == Format::Tar && *ranges && size.is_some() && Verifier::new(expected, 0).freeze().is_some()
}

/// A member that is recorded, with a mark before it, at its end or within it.
type Marked = (Member, Option<Mark>);

/// The members of `archive` behind what is believed of them in the directory of the flight, which has nothing else then.
///
/// # Errors
/// Those of the catalog and the disk; `CATALOG_DAMAGED`.
pub(super) async fn open(flying: &Arc<Flying>, archive: &Archive) -> Result<Extracting> {
    let shared = &flying.shared;
    let (entries, verifier) = believed(flying, archive).await?;
    let begun: Vec<_> = entries.iter().filter_map(|(_, here)| number_of(*here)).collect();
    shared.store.disk().clear_flight(&flying.key, &begun)?;
    shared.store.disk().begin_flight(&flying.key)?;
    let (marked, here): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
    let (members, own): (Vec<_>, Vec<_>) = marked.into_iter().unzip();
    let own = (0..).zip(own).filter(|(at, _)| matches!(here.get(*at), Some(Here::Begun(_))));
    let own = own.filter_map(|(at, mark)| Some((at as u64, mark?))).collect();
    let entries: Vec<_> = members.into_iter().zip(here).collect();
    let given = recorded::given(&entries);
    let (from, left_bytes) = (given.until(), given.left);
    let whole = &entries[..entries.len() - usize::from(left_bytes > 0)];
    let last_end = whole.last().map_or(0, |(member, _)| member.span.end);
    let marks = Arc::new(Marks::new((from, last_end), verifier));
    let (sender, pieces) = mpsc::channel(QUEUE_PIECES);
    let task = tokio::spawn(pump(Arc::clone(flying), archive.file.clone(), from, sender)).abort_handle();
    let reader = MarkedReader::new(pieces, Arc::clone(&marks), archive.path.clone());
    let watching = Arc::clone(&marks);
    let watch = Box::new(move |passed| watching.passed(passed));
    let members = if entries.is_empty() {
        let dictionaries = shared.settings.dictionaries.clone();
        Members::read_watched(Archived::Stream(Box::new(reader)), archive.about.clone(), dictionaries, watch)
    } else {
        tracing::info!(flight = flying.key, from, "a tar is gone on with");
        Members::go_on(Box::new(reader), archive.about.name.clone(), given, watch)
    };
    let records = !entries.is_empty();
    let members = RecordedMembers::new(members, entries, left_bytes);
    let (store, flight) = (shared.store.clone(), flying.key.clone());
    Ok(Extracting { members, task, row: None, marks, own, last_end: from, records, store, flight })
}

/// Forgets what is recorded of the tar of a flight: the next attempt begins anew.
///
/// # Errors
/// Those of the catalog.
pub(super) async fn forget(flying: &Flying) -> Result<()> {
    let store = &flying.shared.store;
    forget_all(store, &flying.key).await?;
    store.begin_sweeping().await.map(drop)
}

/// What is to be gone on behind, and what has taken the digests of exactly that. Nothing else is recorded any more.
async fn believed(flying: &Arc<Flying>, archive: &Archive) -> Result<(Vec<(Marked, Here)>, Verifier)> {
    let size = archive.file.size.unwrap_or(0);
    let (store, expected) = (&flying.shared.store, &archive.file.expected);
    let left = left_of(store, &flying.key, decode).await?;
    let mut entries = left.map(|left| left.entries).unwrap_or_default();
    if expected.is_empty() {
        return Ok((entries, Verifier::new(expected, size)));
    }
    let found = last_mark(&entries);
    let thawed =
        found.and_then(|(kept, mark)| Some((kept, mark.clone(), Verifier::thaw(expected, size, &mark.state)?)));
    let Some((Kept { count, of_last }, mark, verifier)) = thawed else {
        if !entries.is_empty() {
            forget(flying).await?;
        }
        return Ok((Vec::new(), Verifier::new(expected, size)));
    };
    let beyond = entries.split_off(count);
    if let (Some(bytes), Some((_, Here::Begun(begun)))) = (of_last, entries.last_mut()) {
        begun.bytes = bytes;
    }
    if let Some(((member, own), _)) = entries.last_mut().filter(|_| !beyond.is_empty()) {
        // It may be in a row that goes.
        *own = Some(mark);
        let (key, row) = (flying.key.clone(), (count as u64 - 1, recorded::encode(member, own.as_ref())));
        store.catalog().write(move |tx| uploads::put(tx, &key, &[row])).await?;
        let files = beyond.into_iter().filter_map(|((member, _), _)| Some(recorded::file_of(&member)?.0));
        forget_from(store.catalog(), &flying.key, count as u64, files.collect()).await?;
        store.begin_sweeping().await?;
    }
    Ok((entries, verifier))
}

/// Entries that are before a mark.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kept {
    count: usize,
    /// Bytes of the last, where it is not whole.
    of_last: Option<u64>,
}

/// The last mark at which an entry ends, or that is within the last one and not behind what is here of it.
fn last_mark(entries: &[(Marked, Here)]) -> Option<(Kept, &Mark)> {
    let marks = entries.iter().rev().filter_map(|((_, mark), _)| mark.as_ref());
    marks.filter_map(|mark| Some((kept_before(entries, mark.at)?, mark))).next()
}

fn kept_before(entries: &[(Marked, Here)], at: u64) -> Option<Kept> {
    let count = entries.partition_point(|((member, _), _)| member.span.end <= at);
    if count.checked_sub(1).is_some_and(|last| entries[last].0.0.span.end == at) {
        return Some(Kept { count, of_last: None });
    }
    let [((member, _), Here::Begun(begun))] = entries.get(count..)? else { return None };
    let bytes = at.checked_sub(member.span.bytes_at)?;
    let is_here = bytes > 0 && bytes <= begun.bytes && bytes % UNIT_BYTES == 0;
    is_here.then_some(Kept { count: count + 1, of_last: Some(bytes) })
}

fn number_of(here: Here) -> Option<u64> {
    if let Here::Begun(begun) = here { Some(begun.number) } else { None }
}

fn decode(row: &[u8]) -> Result<Decoded<Marked>> {
    let (member, mark) = recorded::decode(row)?;
    let file = recorded::file_of(&member);
    Ok(((member, mark), file))
}

/// The members as entries. Dropping it ends the fetching, and with it the reading.
pub(super) struct Extracting {
    members: RecordedMembers,
    task: AbortHandle,
    row: Option<(u64, Vec<u8>)>,
    marks: Arc<Marks>,
    /// Of entries that an earlier run has begun, by their positions.
    own: HashMap<u64, Mark>,
    /// Where the last entry ended.
    last_end: u64,
    /// Whether the flight is noted as one whose entries are recorded.
    records: bool,
    store: Store,
    flight: String,
}

impl Drop for Extracting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Extracting {
    fn entry(&mut self, Next { member, position, is_recorded }: Next) -> Listed {
        // Where a byte of a large file with holes is in the tar cannot be told.
        let is_large = matches!(member.what, What::File { size, .. } if size.is_none_or(|size| size > UNIT_BYTES));
        let has_place = member.span.is_known() && (member.span.plain || !is_large);
        self.row = if is_recorded {
            let mark = self.own.remove(&position);
            self.members.begun().map(|_| (position, recorded::encode(&member, mark.as_ref())))
        } else {
            let mark = self.marks.before(self.last_end);
            has_place.then(|| (position, recorded::encode(&member, mark.as_ref())))
        };
        if self.row.is_some() && is_large {
            self.marks.within(position, &member);
        }
        self.last_end = self.last_end.max(member.span.end);
        listed_member(member)
    }
}

#[async_trait]
impl EntryStream for Extracting {
    async fn next_entry(&mut self) -> Result<Option<Listed>> {
        let Some(next) = self.members.next().await? else { return Ok(None) };
        let listed = self.entry(next);
        if self.row.is_some() && !self.records {
            let (key, begun) = (self.flight.clone(), uploads::Begun { bytes_total: 0, one_file: false });
            self.store.catalog().write(move |tx| uploads::begin(tx, &key, begun)).await?;
            self.records = true;
        }
        Ok(Some(listed))
    }

    async fn next_bytes(&mut self) -> Result<Option<Vec<Bytes>>> {
        self.members.next_bytes().await
    }

    fn sealed(&self) -> Option<(u64, Digest)> {
        self.members.sealed()
    }

    fn begun(&self) -> Option<Begun> {
        self.members.begun()
    }

    fn to_record(&self) -> Option<(u64, Vec<u8>)> {
        self.row.clone()
    }

    fn recorded(&self) -> Option<Arc<dyn Recorded>> {
        Some(Arc::clone(&self.marks) as Arc<dyn Recorded>)
    }

    fn revision(&self, _tree: &Manifest) -> String {
        // The flight has the archive's own.
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Span;
    use crate::names::EntryPath;

    fn entry(bytes_at: u64, size: u64, mark: Option<u64>, here: Here) -> (Marked, Here) {
        let span = Span { at: 0, bytes_at, end: bytes_at + size.next_multiple_of(512), plain: true };
        let path = EntryPath::new(bytes_at.to_string().into_bytes()).unwrap();
        let what = What::File { size: Some(size), executable: false, here: false };
        ((Member { path, what, span }, mark.map(|at| Mark { at, state: Vec::new() })), here)
    }

    #[test]
    fn what_is_believed_ends_with_the_last_mark_that_it_reaches() {
        let sealed = |size| Here::Sealed(size, Digest::of(b""));
        let begun = |bytes| Here::Begun(Begun { number: 1, bytes });
        let large = 9 * UNIT_BYTES;
        let from = |last_mark, last| {
            vec![
                entry(512, 700, None, sealed(700)),
                entry(2048, 512, Some(1536), sealed(512)),
                entry(3072, large, last_mark, last),
            ]
        };
        let within = 3072 + 3 * UNIT_BYTES;
        for (entries, expected) in [
            (from(Some(2560), begun(large)), (2, None, 2560)),
            (from(Some(within), begun(3 * UNIT_BYTES)), (3, Some(3 * UNIT_BYTES), within)),
            (from(Some(within), begun(2 * UNIT_BYTES)), (1, None, 1536)),
            (from(Some(within + 1), begun(large)), (1, None, 1536)),
            (from(Some(within), sealed(large)), (1, None, 1536)),
            (from(None, begun(large)), (1, None, 1536)),
        ] {
            let (kept, mark) = last_mark(&entries).unwrap();
            assert_eq!((kept.count, kept.of_last, mark.at), expected);
        }
        let mut entries = from(Some(within), begun(large));
        entries.push(entry(3584 + large, 5, None, sealed(5)));
        assert_eq!(last_mark(&entries).unwrap().0, Kept { count: 1, of_last: None }, "it is not the last any more");
        assert!(last_mark(&from(None, begun(1))[..1]).is_none() && last_mark(&[]).is_none());
    }
}
