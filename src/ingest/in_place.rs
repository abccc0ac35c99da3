//! Taking the digests of a checkpoint whose bytes stay where they are.
//!
//! Every file is read once, several at a time, and held to its stamp when it was read to its end; when all are done the whole is listed
//! again and must be of the same revision, so that the manifest shows a tree that stood. No blob is written. Digests are recorded with
//! their stamps as they come, in batches: what `kill -9` costs is the files under way and those of the last second. A later flight,
//! also one of another revision, reads only what does not bear its stamp any more.
//!
//! A file system that does not answer holds the permits of this flight alone, and a cancelled flight waits for none of its threads.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use super::fetch::{blocking, changed};
use super::flying::Flying;
use super::plan;
use super::{rest, retry};
use crate::catalog::placements::{self, Sighting};
use crate::digest::{Digest, Digester};
use crate::error::{Error, Kind, Result};
use crate::limits;
use crate::manifest::{Entry, EntryKind, Manifest};
use crate::names::EntryPath;
use crate::places::Stamp;
use crate::source::{File, Listing, What};

/// Bytes read at a time: one request of a network file system.
const READ_BYTES: usize = 1 << 20;

/// Longest time that a digest waits to be recorded.
const RECORD_EVERY: Duration = Duration::from_secs(1);

/// A listed file and what it bears.
struct Seen {
    path: EntryPath,
    file: File,
    stamp: Stamp,
}

/// Takes the digests that are missing; every file of the manifest has its sighting on return.
pub(super) async fn fly(flying: &Arc<Flying>, listing: Listing) -> Result<Manifest> {
    let shared = &flying.shared;
    let sizes = plan::Sizes::of(&listing, &shared.settings)?;
    let revision = listing.revision.clone();
    let (mut entries, files) = split(listing)?;
    let known = known(flying, &files).await?;
    flying.progress.expect(sizes.known_bytes, sizes.files);
    let mut missing = Vec::new();
    for seen in files {
        match known.get(seen.path.as_bytes()) {
            Some(digest) => {
                flying.progress.resume(seen.stamp.size);
                flying.progress.sealed();
                entries.push(entry(&seen, *digest));
            }
            None => missing.push(Arc::new(seen)),
        }
    }
    let _slot = shared.slot().await?;
    let stopped = StopOnDrop::default();
    let mut digested = futures_util::stream::iter(missing)
        .map(|seen| digest(flying.clone(), seen, stopped.0.clone()))
        .buffer_unordered(limits::FETCHES_PER_SOURCE);
    let mut recorder = Recorder { flying, waiting: Vec::new(), last: Instant::now() };
    loop {
        match tokio::time::timeout(RECORD_EVERY, digested.next()).await {
            Ok(Some(Ok((seen, digest)))) => {
                flying.progress.sealed();
                recorder.note(&seen, digest).await?;
                entries.push(entry(&seen, digest));
            }
            Ok(Some(Err(error))) => {
                recorder.record().await?;
                return Err(error);
            }
            Ok(None) => break,
            // A large file is being read; what came before it need not wait.
            Err(_) => recorder.record().await?,
        }
    }
    recorder.record().await?;
    rest::check_unchanged(flying, &revision).await?;
    Manifest::new(entries)
}

/// Entries that need no bytes, and the files.
fn split(listing: Listing) -> Result<(Vec<Entry>, Vec<Seen>)> {
    let (mut entries, mut files) = (Vec::new(), Vec::new());
    for listed in listing.entries {
        let path = listed.path;
        match listed.what {
            What::Directory => entries.push(Entry { path, kind: EntryKind::Directory }),
            What::Symlink(target) => entries.push(Entry { path, kind: EntryKind::Symlink { target } }),
            What::File(file) => files.push(Seen { stamp: file.stamp()?, path, file }),
            // Refused when the listing was counted.
            What::SameAs(_) => {}
        }
    }
    Ok((entries, files))
}

fn entry(seen: &Seen, digest: Digest) -> Entry {
    let kind = EntryKind::File { size: seen.stamp.size, executable: seen.file.executable, digest };
    Entry { path: seen.path.clone(), kind }
}

/// Digests that an earlier run has taken of files as they are now.
async fn known(flying: &Flying, files: &[Seen]) -> Result<HashMap<Vec<u8>, Digest>> {
    let wanted: HashMap<_, _> = files.iter().map(|seen| (seen.path.as_bytes().to_vec(), seen.stamp)).collect();
    let flight = flying.key.clone();
    let sightings = flying.shared.store.catalog().write(move |tx| placements::still_true(tx, &flight, &wanted)).await?;
    Ok(sightings.into_iter().map(|sighting| (sighting.path, sighting.digest)).collect())
}

async fn digest(flying: Arc<Flying>, seen: Arc<Seen>, stopped: Arc<AtomicBool>) -> Result<(Arc<Seen>, Digest)> {
    let digest = retry::until_it_works(flying.shared.settings.attempts, || async {
        let _core = flying.core().await?;
        let _memory = flying.shared.bounds.claim(READ_BYTES as u64).await?;
        let (flying, seen, stopped) = (flying.clone(), seen.clone(), stopped.clone());
        blocking(move || read_through(&flying, &seen, &stopped)).await
    })
    .await?;
    Ok((seen, digest))
}

/// Reads a file from its beginning to its end; what was counted of one that fails is taken back.
fn read_through(flying: &Flying, seen: &Seen, stopped: &AtomicBool) -> Result<Digest> {
    let mut counted = 0;
    let outcome = read_counted(flying, seen, stopped, &mut counted);
    if outcome.is_err() {
        flying.progress.take_back(counted);
    }
    outcome
}

fn read_counted(flying: &Flying, seen: &Seen, stopped: &AtomicBool, counted: &mut u64) -> Result<Digest> {
    use std::io::Read as _;
    let opened = flying
        .source
        .open_local(&seen.file)?
        .ok_or_else(|| Error::internal("a file that is to be served in place cannot be opened as one"))?;
    let size = seen.stamp.size;
    let mut buffer = vec![0; READ_BYTES.min(usize::try_from(size).unwrap_or(READ_BYTES)).max(1)];
    let mut digester = Digester::new();
    loop {
        if stopped.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Cancelled, "FILL_GIVEN_UP", "the fill was given up"));
        }
        let read = match (&opened).read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io("reading", seen.path.to_string(), error)),
        };
        digester.update(&buffer[..read]);
        *counted += read as u64;
        flying.progress.arrived(read as u64);
        if *counted > size {
            break;
        }
    }
    flying.source.check_unchanged(&seen.file, &opened)?;
    if *counted == size { Ok(digester.finish()) } else { Err(changed(&seen.path.to_string())) }
}

/// Records digests in batches.
struct Recorder<'a> {
    flying: &'a Flying,
    waiting: Vec<Sighting>,
    last: Instant,
}

impl Recorder<'_> {
    async fn note(&mut self, seen: &Seen, digest: Digest) -> Result<()> {
        self.waiting.push(Sighting { path: seen.path.as_bytes().to_vec(), stamp: seen.stamp, digest });
        if self.waiting.len() >= limits::PUBLISH_BATCH_FILES || self.last.elapsed() >= RECORD_EVERY {
            self.record().await?;
        }
        Ok(())
    }

    async fn record(&mut self) -> Result<()> {
        self.last = Instant::now();
        let (flight, sightings) = (self.flying.key.clone(), std::mem::take(&mut self.waiting));
        if sightings.is_empty() {
            return Ok(());
        }
        self.flying.shared.store.catalog().write(move |tx| placements::enter(tx, &flight, &sightings)).await
    }
}

/// Tells the blocking side that nobody waits for it any more.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
