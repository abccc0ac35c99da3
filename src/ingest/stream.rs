//! Filling from a stream of entries: uploads and archives.
//!
//! Bytes come in the sender's order, so files are taken one after the other: a small one in memory, a large one into a
//! filling file whose sealer follows; one of unknown size is held in memory until it proves large, and then sealed after its end.
//! Sealing of small files overlaps with what comes next. Hard links are resolved when all files are sealed. A stream that breaks
//! leaves the record `failed`; nothing of it becomes visible.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::task::{JoinError, JoinSet};

use super::Shared;
use super::fetch::blocking;
use super::plan;
use super::progress::Progress;
use super::publish::{Filled, GiveUp, publish};
use super::quota::Growth;
use super::seal::{self, Digested};
use crate::error::{Error, Result, TOO_MANY};
use crate::limits::{self, UNIT_BYTES};
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::names::EntryPath;
use crate::source::{EntryStream, Expected, File, What};
use crate::store::filling::{Filling, UnitMap};

/// Space that must be left before a file of unknown size grows by as much.
pub(super) const ADMIT_BYTES: u64 = 16 * UNIT_BYTES;

/// Entries whose memory is claimed at a time.
const ENTRIES_CLAIMED: u32 = 4096;

/// Large files that are sealed at a time while others come: they wait for one thread, so this bounds what waits.
const LARGE_AT_A_TIME: usize = 8;

/// Takes everything into the directory of a flight, which is begun; returns the revision and the manifest.
pub(super) async fn fill(
    shared: &Arc<Shared>,
    flight: &str,
    mut stream: Box<dyn EntryStream>,
    progress: &Arc<Progress>,
) -> Result<(String, Manifest)> {
    let growth = Growth::new(shared, flight);
    let taker = Taker { shared, flight, progress, growth: &growth };
    let mut entries = Vec::new();
    let mut links = Vec::new();
    // Small files wait until there are many, which costs one flush; a large one is sealed while the next arrives, so that a crash keeps it.
    let mut sealing = FuturesUnordered::new();
    let mut large = JoinSet::new();
    let mut bytes = 0_u64;
    let mut claimed = Vec::new();
    while let Some(listed) = stream.next_entry().await? {
        let known = entries.len() + links.len() + sealing.len() + large.len();
        if known >= claimed.len() * ENTRIES_CLAIMED as usize {
            claimed.push(shared.bounds.claim_more_entries(ENTRIES_CLAIMED)?);
        }
        if known >= limits::CHECKPOINT_ENTRIES {
            let message = format!("more than {} entries were sent", limits::CHECKPOINT_ENTRIES);
            return Err(Error::no_space("TOO_MANY_ENTRIES", message).remedy(TOO_MANY));
        }
        let file = match listed.what {
            What::Directory => {
                entries.push(Entry { path: listed.path, kind: EntryKind::Directory });
                continue;
            }
            What::Symlink(target) => {
                entries.push(Entry { path: listed.path, kind: EntryKind::Symlink { target } });
                continue;
            }
            What::SameAs(earlier) => {
                links.push((listed.path, earlier));
                continue;
            }
            What::File(file) => file,
        };
        if let Some((size, digest)) = stream.sealed() {
            bytes = bytes.saturating_add(size);
            growth.reach(bytes).await?;
            progress.resume(size);
            progress.sealed();
            let kind = EntryKind::File { size, executable: file.executable, digest };
            entries.push(Entry { path: listed.path, kind });
            continue;
        }
        let number = shared.next_number.fetch_add(1, Ordering::Relaxed);
        let taken = taker.take(&mut *stream, listed.path, &file, number, bytes).await?;
        bytes += taken.size;
        if taken.size > UNIT_BYTES {
            let (shared, flight, progress) = (Arc::clone(shared), flight.to_owned(), Arc::clone(progress));
            large.spawn(async move { publish(&shared, &flight, &progress, taken).await });
        } else {
            sealing.push(publish(shared, flight, progress, taken));
        }
        while large.len() > LARGE_AT_A_TIME {
            entries.extend(published(large.join_next().await)?);
        }
        while sealing.len() >= limits::PUBLISH_BATCH_FILES {
            entries.extend(sealing.next().await.transpose()?);
        }
    }
    while let Some(entry) = sealing.next().await {
        entries.push(entry?);
    }
    while let Some(entry) = published(large.join_next().await)? {
        entries.push(entry);
    }
    growth.reach(resolve(&mut entries, links, bytes, shared.settings.checkpoint_bytes)?).await?;
    Ok((stream.revision(), Manifest::new(entries)?))
}

/// The outcome of a task that publishes.
fn published(joined: Option<std::result::Result<Result<Entry>, JoinError>>) -> Result<Option<Entry>> {
    let ended = |error| Error::internal("publishing a file ended early").because(error);
    joined.map(|joined| joined.map_err(ended)?).transpose()
}

/// Makes files of hard links, in the order they came, so that one may lead to another. `bytes` came before; returns what there are with them.
fn resolve(entries: &mut Vec<Entry>, links: Vec<(EntryPath, EntryPath)>, bytes: u64, limit_bytes: u64) -> Result<u64> {
    if links.is_empty() {
        return Ok(bytes);
    }
    let files = entries.iter().filter(|entry| matches!(entry.kind, EntryKind::File { .. }));
    let mut files: HashMap<_, _> = files.map(|entry| (entry.path.clone(), entry.kind.clone())).collect();
    let mut bytes = bytes;
    for (path, earlier) in links {
        let kind = files.get(&earlier).cloned().ok_or_else(|| {
            Error::invalid(
                "NO_SUCH_ENTRY",
                format!("the hard link `{path}` leads to `{earlier}`, which was not sent before"),
            )
        })?;
        if let EntryKind::File { size, .. } = kind {
            bytes = bytes.saturating_add(size);
            plan::check_limit(bytes, limit_bytes)?;
        }
        files.insert(path.clone(), kind.clone());
        entries.push(Entry { path, kind });
    }
    Ok(bytes)
}

struct Taker<'a> {
    shared: &'a Arc<Shared>,
    flight: &'a str,
    progress: &'a Arc<Progress>,
    growth: &'a Growth,
}

impl Taker<'_> {
    /// Takes one file; `before` bytes came before it.
    async fn take(
        &self,
        stream: &mut dyn EntryStream,
        path: EntryPath,
        file: &File,
        number: u64,
        before: u64,
    ) -> Result<Filled> {
        let Some(size) = file.size else {
            return self.take_unsized(stream, path, file, number, before).await;
        };
        self.growth.reach(before.saturating_add(size)).await?;
        self.shared.admit_more(size).await?;
        let executable = file.executable;
        let (digested, synced) = if size <= UNIT_BYTES {
            (self.take_small(stream, &path, size, number, &file.expected).await?, false)
        } else {
            (self.take_large(stream, &path, size, number, &file.expected).await?, true)
        };
        Ok(Filled { path, number, size, executable, digested, synced })
    }

    async fn take_small(
        &self,
        stream: &mut dyn EntryStream,
        path: &EntryPath,
        size: u64,
        number: u64,
        expected: &Expected,
    ) -> Result<Digested> {
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next_bytes().await? {
            check_length(path, bytes.len() as u64 + piece.len() as u64, size, false)?;
            bytes.extend_from_slice(&piece);
        }
        check_length(path, bytes.len() as u64, size, true)?;
        self.progress.arrived(size);
        self.seal_small(bytes, path, number, expected).await
    }

    async fn seal_small(&self, bytes: Vec<u8>, path: &EntryPath, number: u64, expected: &Expected) -> Result<Digested> {
        let (disk, flight) = (self.shared.store.disk().clone(), self.flight.to_owned());
        let (path, expected) = (path.clone(), expected.clone());
        blocking(move || {
            let digested = seal::digest_small(&bytes, &path, &expected)?;
            disk.write_filling(&flight, number, &bytes)?;
            Ok(digested)
        })
        .await
    }

    async fn take_large(
        &self,
        stream: &mut dyn EntryStream,
        path: &EntryPath,
        size: u64,
        number: u64,
        expected: &Expected,
    ) -> Result<Digested> {
        let disk = self.shared.store.disk().clone();
        let filling = Arc::new(Filling::open(disk, self.flight, number, UnitMap::new(size))?);
        let _give_up = GiveUp(filling.clone());
        let sealer = {
            let (filling, path, expected) = (filling.clone(), path.clone(), expected.clone());
            blocking(move || seal::follow(&filling, &path, &expected, seal::LayoutFrom::Filling))
        };
        let filler = async {
            let filled = self.write_all(stream, path, size, &filling).await;
            if filled.is_err() {
                filling.give_up();
            }
            filled
        };
        let (filled, sealed) = tokio::join!(filler, sealer);
        filled?;
        sealed
    }

    /// Takes a file whose end alone tells its size.
    async fn take_unsized(
        &self,
        stream: &mut dyn EntryStream,
        path: EntryPath,
        file: &File,
        number: u64,
        before: u64,
    ) -> Result<Filled> {
        let executable = file.executable;
        let mut bytes = Vec::new();
        let mut ended = false;
        while !ended && bytes.len() as u64 <= UNIT_BYTES {
            match stream.next_bytes().await? {
                Some(piece) => bytes.extend_from_slice(&piece),
                None => ended = true,
            }
        }
        let mut size = bytes.len() as u64;
        self.check_growth(0, size, before).await?;
        self.progress.arrived(size);
        if size <= UNIT_BYTES {
            let digested = self.seal_small(bytes, &path, number, &file.expected).await?;
            return Ok(Filled { path, number, size, executable, digested, synced: false });
        }
        let filling = Arc::new(Filling::open_unsized(self.shared.store.disk().clone(), self.flight, number)?);
        append(&filling, bytes.into(), 0).await?;
        while let Some(piece) = stream.next_bytes().await? {
            let end = size + piece.len() as u64;
            self.check_growth(size, end, before).await?;
            append(&filling, piece, size).await?;
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
        Ok(Filled { path, number, size, executable, digested, synced: true })
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

    async fn write_all(
        &self,
        stream: &mut dyn EntryStream,
        path: &EntryPath,
        size: u64,
        filling: &Arc<Filling>,
    ) -> Result<()> {
        let mut at = 0;
        while let Some(piece) = stream.next_bytes().await? {
            check_length(path, at + piece.len() as u64, size, false)?;
            at = self.write(filling, piece, at).await?;
        }
        check_length(path, at, size, true)?;
        let filling = filling.clone();
        blocking(move || filling.flush().map(|_| ())).await
    }

    async fn write(&self, filling: &Arc<Filling>, piece: Bytes, at: u64) -> Result<u64> {
        let end = at + piece.len() as u64;
        let target = filling.clone();
        blocking(move || {
            target.check_room(piece.len() as u64)?;
            target.write_at(&piece, at)?;
            let map = target.units();
            (at / UNIT_BYTES..map.units())
                .take_while(|unit| map.range(*unit).end <= end)
                .for_each(|unit| _ = target.complete(unit));
            Ok(())
        })
        .await?;
        self.progress.arrived(end - at);
        Ok(end)
    }
}

pub(super) async fn append(filling: &Arc<Filling>, piece: Bytes, at: u64) -> Result<()> {
    let filling = filling.clone();
    blocking(move || filling.write_at(&piece, at)).await
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn path(text: &str) -> EntryPath {
        EntryPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn hard_links_become_files_and_count() {
        let kind = EntryKind::File { size: 10, executable: true, digest: Digest::of(b"0123456789") };
        let sent =
            vec![Entry { path: path("a"), kind: kind.clone() }, Entry { path: path("d"), kind: EntryKind::Directory }];
        let links = || vec![(path("b"), path("a")), (path("d/c"), path("b"))];
        let mut entries = sent.clone();
        assert_eq!(resolve(&mut entries, links(), 10, 30).unwrap(), 30);
        assert_eq!(entries[2..], [Entry { path: path("b"), kind: kind.clone() }, Entry { path: path("d/c"), kind }]);
        assert_eq!(resolve(&mut sent.clone(), links(), 10, 29).unwrap_err().reason(), "CHECKPOINT_TOO_LARGE");
        for missing in ["x", "d"] {
            let links = vec![(path("b"), path(missing))];
            assert_eq!(resolve(&mut sent.clone(), links, 10, 99).unwrap_err().reason(), "NO_SUCH_ENTRY");
        }
    }
}
