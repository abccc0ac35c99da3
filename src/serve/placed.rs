//! Files that stay in a datastore as [`Content`]: every read is made there, and believed only if the file still bears its stamp.
//!
//! A descriptor is opened beneath the datastore's root at the first read and kept until the last handle is closed. Stamps are
//! compared when it is opened and after every read, before a byte is given out; so a reader gets the bytes that the digest was taken of, or
//! EIO. Pages that the kernel has from before a change stay right. The kernel is never given such a file.
//!
//! Nothing here may be asked of a thread that answers the kernel, save to hand it on: opening, reading, and closing go through
//! [`Readers`]. A descriptor that a server has forgotten (ESTALE, EIO) is opened afresh once.
//!
//! What goes wrong is an event, `SOURCE_CHANGED` or `SOURCE_UNREADABLE`, once for each file and fault and not for each read; a
//! file that reads well again and then fails again is a new one. A checkpoint says so of [`EVENTS`] files and then that
//! there are more: a directory that is gone must not drive everything else out of the list of events.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::content::{Content, FileNode, FileState, OpenFile, Resume};
use super::readers::{Lane, Readers};
use crate::catalog::events::{self, NewEvent};
use crate::catalog::{Catalog, checkpoints::Record, placements};
use crate::error::{Error, Kind, Result};
use crate::manifest::{EntryKind, Manifest};
use crate::names::EntryPath;
use crate::places::{Place, Stamp};
use crate::source::{Datastores, Trouble, check_file};
use crate::units::now_unix_ms;

/// Files of one served checkpoint that get an event of their own.
const EVENTS: usize = 100;

/// Inode of the first entry: the root is 1.
const FIRST_INODE: u64 = 2;

/// How long an attach waits for a datastore to say that it is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// What checkpoints that are served in place are served from.
pub(super) struct InPlace {
    catalog: Catalog,
    datastores: Arc<Datastores>,
    /// By datastore, with the lane of what is asked besides reads.
    readers: Mutex<HashMap<String, (Readers, Arc<Lane>)>>,
}

impl InPlace {
    pub(super) fn new(catalog: Catalog, datastores: Arc<Datastores>) -> Self {
        Self { catalog, datastores, readers: Mutex::default() }
    }

    /// Fails unless the bytes of `record` can be where they were: what is not mounted is not to be attached. One whose bytes are in the
    /// store passes.
    ///
    /// # Errors
    /// `DATASTORE_MISSING`, `DATASTORE_SILENT`.
    pub(super) async fn check(&self, record: &Record) -> Result<()> {
        let Some(place) = record.in_place.clone() else { return Ok(()) };
        let datastore = self.datastores.find(&place.datastore, &record.owner).cloned().map_err(|_| {
            let message = format!(
                "the checkpoint `{}` is in the datastore `{}`, which is not configured for its owner",
                record.name, place.datastore
            );
            Error::wrong_state("DATASTORE_MISSING", message)
                .fact("datastore", &place.datastore)
                .remedy(format!("let the operator configure it: [datastores.{}] path = \"/mnt/...\"", place.datastore))
        })?;
        let (answer, answered) = oneshot::channel();
        let (readers, lane) = self.readers_of(&place.datastore);
        let (name, filled) = (place.datastore.clone(), record.files > 0);
        readers.read(
            &lane,
            Box::new(move |turn| {
                let _ = answer.send(turn.and_then(|()| datastore.check(&place, filled)));
            }),
        );
        match tokio::time::timeout(PATIENCE, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Err(Error::unavailable(
                "DATASTORE_SILENT",
                format!("the datastore `{name}` gave no answer within {} s", PATIENCE.as_secs()),
            )
            .remedy("see to whoever serves it, then try again")),
        }
    }

    /// The files of `record`, which lie below `place`.
    ///
    /// # Errors
    /// Those of the catalog; corrupt where a file has no stamp.
    pub(super) async fn content(
        &self,
        record: &Record,
        place: Place,
        manifest: Arc<Manifest>,
    ) -> Result<PlacedContent> {
        let checkpoint = record.id.clone();
        let mut known = self.catalog.read(move |tx| placements::of_checkpoint(tx, &checkpoint)).await?;
        let mut stamp = |path: &EntryPath| {
            known.remove(path.as_bytes()).map(Some).ok_or_else(|| {
                Error::corrupt("MISSING_PLACEMENT", format!("the catalog does not say where `{path}` is"))
            })
        };
        let stamps = manifest.entries().iter().map(|entry| match entry.kind {
            EntryKind::File { .. } => stamp(&entry.path),
            EntryKind::Directory | EntryKind::Symlink { .. } => Ok(None),
        });
        let stamps = stamps.collect::<Result<_>>()?;
        Ok(PlacedContent(Arc::new(Placed {
            checkpoint: record.id.clone(),
            readers: self.readers_of(&place.datastore).0,
            place,
            datastores: self.datastores.clone(),
            manifest,
            stamps,
            catalog: self.catalog.clone(),
            faults: Mutex::default(),
            events: AtomicUsize::new(0),
        })))
    }

    fn readers_of(&self, datastore: &str) -> (Readers, Arc<Lane>) {
        lock(&self.readers).entry(datastore.to_owned()).or_default().clone()
    }
}

/// The files of one checkpoint that is served in place.
pub(super) struct PlacedContent(Arc<Placed>);

struct Placed {
    checkpoint: String,
    place: Place,
    datastores: Arc<Datastores>,
    manifest: Arc<Manifest>,
    /// By entry; directories and links have none.
    stamps: Box<[Option<Stamp>]>,
    readers: Readers,
    catalog: Catalog,
    /// What is wrong with which entry, by the text of its event.
    faults: Mutex<HashMap<usize, String>>,
    events: AtomicUsize,
}

impl Content for PlacedContent {
    fn open(&self, file: &FileNode) -> Result<Arc<dyn OpenFile>> {
        let entry = file.inode.checked_sub(FIRST_INODE).and_then(|entry| usize::try_from(entry).ok());
        let known = entry.and_then(|entry| Some((entry, (*self.0.stamps.get(entry)?)?)));
        let (entry, stamp) = known.ok_or_else(|| Error::internal("a file without a stamp is to be served in place"))?;
        Ok(Arc::new(PlacedFile {
            placed: self.0.clone(),
            entry,
            stamp,
            opened: Mutex::default(),
            lane: Arc::default(),
        }))
    }

    fn state(&self, _: &FileNode) -> FileState {
        FileState::Daemon
    }
}

struct PlacedFile {
    placed: Arc<Placed>,
    entry: usize,
    stamp: Stamp,
    opened: Mutex<Option<Arc<File>>>,
    lane: Arc<Lane>,
}

impl OpenFile for PlacedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let outcome = self.read_once(buf, offset).or_else(|trouble| {
            if !trouble.is_stale() {
                return Err(trouble);
            }
            self.forget();
            self.read_once(buf, offset)
        });
        match outcome {
            Ok(read) => {
                self.placed.note_well(self.entry);
                Ok(read)
            }
            Err(trouble) => {
                self.forget();
                Err(self.placed.note_fault(self.entry, trouble))
            }
        }
    }

    fn whole(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn here(&self, _: u64, _: usize) -> bool {
        false
    }

    fn when_here(&self, _: u64, _: usize, resume: Resume) -> Option<u64> {
        self.placed.readers.read(&self.lane, resume);
        None
    }
}

impl Drop for PlacedFile {
    /// Closing may wait as reading may.
    fn drop(&mut self) {
        if let Some(opened) = lock(&self.opened).take() {
            self.placed.readers.run(move || drop(opened));
        }
    }
}

impl PlacedFile {
    /// Fills `buf`, all of which is within the file as it was.
    fn read_once(&self, buf: &mut [u8], offset: u64) -> Result<usize, Trouble> {
        let opened = self.descriptor()?;
        let read = opened.read_exact_at(buf, offset);
        // What became of the file explains a read that failed, too.
        match (check_file(&self.stamp, &opened), read) {
            (Ok(()), Ok(())) => Ok(buf.len()),
            (Err(trouble @ Trouble::Changed(_)), _) => Err(trouble),
            (_, Err(error)) => Err(Trouble::Unreadable(error)),
            (Err(trouble), Ok(())) => Err(trouble),
        }
    }

    /// Drops the descriptor, without the lock: closing may wait.
    fn forget(&self) {
        let opened = lock(&self.opened).take();
        drop(opened);
    }

    fn descriptor(&self) -> Result<Arc<File>, Trouble> {
        if let Some(opened) = lock(&self.opened).clone() {
            return Ok(opened);
        }
        let opened = Arc::new(self.placed.open(self.entry, &self.stamp)?);
        Ok(lock(&self.opened).get_or_insert(opened).clone())
    }
}

impl Placed {
    fn open(&self, entry: usize, stamp: &Stamp) -> Result<File, Trouble> {
        let missing =
            |why: &str| Trouble::Unreadable(std::io::Error::new(std::io::ErrorKind::NotFound, why.to_owned()));
        let datastore =
            self.datastores.get(&self.place.datastore).ok_or_else(|| missing("the datastore is not configured"))?;
        let path = self.place.of(self.path(entry)).map_err(|error| missing(&error.report()))?;
        datastore.open(&path, stamp)
    }

    fn path(&self, entry: usize) -> &EntryPath {
        &self.manifest.entries()[entry].path
    }

    fn note_well(&self, entry: usize) {
        lock(&self.faults).remove(&entry);
    }

    /// Records an event unless the same is known, and says what the reader gets.
    fn note_fault(&self, entry: usize, trouble: Trouble) -> Error {
        let Place { datastore, below } = &self.place;
        let file = format!("`{}` of the checkpoint {}", self.path(entry), self.checkpoint);
        let at = format!("below /{below} of the datastore `{datastore}`");
        let (kind, message) = match trouble {
            Trouble::Changed(how) => {
                ("SOURCE_CHANGED", format!("{file} is not served any more: {at} {how} since its digest was taken"))
            }
            Trouble::Unreadable(error) => ("SOURCE_UNREADABLE", format!("{file} cannot be read {at}: {error}")),
        };
        let before = lock(&self.faults).insert(entry, message.clone());
        if before.as_ref() != Some(&message) {
            self.record(kind, message.clone());
        }
        // EIO, whatever it is: the name is there, whatever became of the bytes.
        Error::new(Kind::Unavailable, kind, message)
    }

    fn record(&self, kind: &'static str, message: String) {
        let so_far = self.events.fetch_add(1, Ordering::Relaxed);
        let message = match so_far.cmp(&EVENTS) {
            std::cmp::Ordering::Less => message,
            std::cmp::Ordering::Equal => {
                format!("more than {EVENTS} files of the checkpoint {} cannot be read", self.checkpoint)
            }
            std::cmp::Ordering::Greater => return,
        };
        let event = NewEvent { kind, checkpoint: self.checkpoint.clone(), message, ..Default::default() };
        let recorded = self.catalog.write_blocking(move |tx| events::record(tx, now_unix_ms(), &event));
        if let Err(error) = recorded {
            tracing::warn!(error = %error.report(), "recording an event failed");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
