//! A directory of this host, or a single file: what is [`captured`](super::captured), and what datastores hold.
//!
//! Opening lists everything below the root ([`walk`](super::walk)); every path is resolved beneath it and every file is held to the stamp it
//! was listed with ([`beneath`](super::beneath)). The revision is a digest over all paths, stamps and link targets: it
//! is met again only if nothing was touched.
//!
//! A root that is one archive file is streamed member by member, unless it is to be kept as it is.

use std::fs::File as OpenFile;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;

use super::archived::ArchivedEntries;
use super::beneath::{Locator, Root, changed, check_stamp};
use super::patience::Pace;
use super::walk::{Walked, walk};
use super::{ByteStream, Counter, File, Listed, Listing, Opened, Source, What, empty};
use crate::archive::{About, Dictionaries, Format};
use crate::error::{Error, Result};

/// Bytes read at a time by [`Source::read`].
const READ_BYTES: u64 = 1 << 20;

/// Finds the root; blocks.
type Find = Arc<dyn Fn() -> Result<Root> + Send + Sync>;

/// A directory or file of this host.
pub(super) struct DirectorySource {
    /// Begins the revision.
    kind: &'static str,
    find: Find,
    /// Given where a root that is an archive is to be taken apart.
    extract: Option<Dictionaries>,
    root: Mutex<Option<Arc<Root>>>,
}

impl DirectorySource {
    /// The tree at the absolute `path`, or in the archive that it names if `extract`; nothing is touched before it is opened.
    pub(super) fn new(path: &Path, extract: Option<Dictionaries>) -> Self {
        // By components, since a `/` at the end would follow a link in spite of `O_NOFOLLOW`.
        let path: PathBuf = path.components().collect();
        Self::found_by("directory", Arc::new(move || Root::open(&path)), extract)
    }

    /// The tree at the root that `find` finds; `kind` says in revisions what it is.
    pub(super) fn found_by(kind: &'static str, find: Find, extract: Option<Dictionaries>) -> Self {
        Self { kind, find, extract, root: Mutex::default() }
    }

    /// Whether the root that was opened last is one file.
    pub(super) fn is_one_file(&self) -> bool {
        let root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
        root.as_ref().is_some_and(|root| root.only.is_some())
    }

    /// Looks whether there is anything to list; blocks.
    pub(super) fn glance(&self) -> impl FnOnce(&Pace) -> Result<()> + Send + use<> {
        let find = self.find.clone();
        move |pace| {
            let root = find()?;
            pace.step()?;
            if root.only.is_some() || !root.is_empty()? { Ok(()) } else { Err(empty()) }
        }
    }

    /// What opening does to the file system; blocks.
    pub(super) fn look(&self, counter: &Counter) -> impl FnOnce(&Pace) -> Result<Looked> + Send + use<> {
        let (find, kind, extract, counter) = (self.find.clone(), self.kind, self.extract.clone(), counter.clone());
        move |pace| {
            let root = find()?;
            pace.step()?;
            let listing = list(&root, kind, pace, &counter)?;
            let archive = extract.map(|with| open_archive(&root, &listing, kind, with)).transpose()?.flatten();
            Ok(Looked { root, listing, archive })
        }
    }

    /// What it gives. Needs a runtime.
    pub(super) fn opened(&self, looked: Looked) -> Result<Opened> {
        let Looked { root, listing, archive } = looked;
        if let Some(archive) = archive {
            return Ok(Opened::Streamed(Box::new(archive.read()?)));
        }
        *self.root.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(root));
        Ok(Opened::Listed(listing))
    }

    /// Gives the root as it was opened for listing, or opens it now for a process that resumes without listing; blocks.
    fn root(&self) -> impl FnOnce() -> Result<Arc<Root>> + Send + use<> {
        let known = self.root.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let find = self.find.clone();
        move || known.map_or_else(|| find().map(Arc::new), Ok)
    }
}

#[async_trait]
impl Source for DirectorySource {
    async fn open(&self, counter: &Counter) -> Result<Opened> {
        let look = self.look(counter);
        self.opened(unblocked(move || look(&Pace::default())).await?)
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let locator: Locator = file.locator.parse()?;
        let end = range.end.min(locator.stamp.size);
        let start = range.start;
        let root = self.root();
        let reading = unblocked(move || {
            let root = root()?;
            Ok(Reading { opened: root.open_file(&locator)?, root, locator, end })
        });
        let reading = Arc::new(reading.await?);
        Ok(Box::pin(stream::try_unfold((reading, start), |(reading, at)| async move {
            let (bytes, reading) = unblocked(move || Ok((reading.piece(at)?, reading))).await?;
            Ok(bytes.map(|bytes| {
                let next = at + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                (bytes, (reading, next))
            }))
        })))
    }

    fn is_local(&self) -> bool {
        true
    }

    fn open_local(&self, file: &File) -> Result<Option<OpenFile>> {
        self.root()()?.open_file(&file.locator.parse()?).map(Some)
    }

    fn check_unchanged(&self, file: &File, opened: &OpenFile) -> Result<()> {
        let locator: Locator = file.locator.parse()?;
        check_stamp(&locator, opened, &self.root()()?.shown(&locator.path))
    }
}

/// Runs blocking file work off the runtime's threads.
async fn unblocked<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal("reading files").because(error))?
}

/// A file that is being read in pieces.
struct Reading {
    root: Arc<Root>,
    locator: Locator,
    opened: OpenFile,
    end: u64,
}

impl Reading {
    /// The bytes from `at`; at the end, after a look whether they can be believed, `None`.
    fn piece(&self, at: u64) -> Result<Option<Bytes>> {
        let shown = || self.root.shown(&self.locator.path);
        let left = self.end.saturating_sub(at).min(READ_BYTES);
        if left == 0 {
            check_stamp(&self.locator, &self.opened, &shown())?;
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(left).unwrap_or(0)];
        match self.opened.read_at(&mut bytes, at) {
            Ok(0) => Err(changed(&shown(), "it became shorter")),
            Ok(length) => {
                bytes.truncate(length);
                Ok(Some(bytes.into()))
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(Bytes::new())),
            Err(error) => Err(Error::io("reading", shown(), error)),
        }
    }
}

/// What was found at a root.
pub(super) struct Looked {
    root: Root,
    listing: Listing,
    archive: Option<Archive>,
}

/// A root that is an archive, opened.
struct Archive {
    opened: OpenFile,
    about: About,
    dictionaries: Dictionaries,
    revision: String,
    locator: Locator,
    shown: PathBuf,
}

impl Archive {
    /// Begins to read the members. Needs a runtime.
    fn read(self) -> Result<ArchivedEntries> {
        let Self { opened, about, dictionaries, revision, locator, shown } = self;
        let check = Box::new(move |opened: &OpenFile| check_stamp(&locator, opened, &shown));
        ArchivedEntries::read(opened, about, dictionaries, revision, check)
    }
}

/// The one file that was listed, if its name is that of an archive.
fn open_archive(root: &Root, listing: &Listing, kind: &str, dictionaries: Dictionaries) -> Result<Option<Archive>> {
    let Some(name) = &root.only else { return Ok(None) };
    let (Some(format), [Listed { what: What::File(file), .. }]) = (Format::of_name(name), listing.entries.as_slice())
    else {
        return Ok(None);
    };
    let locator: Locator = file.locator.parse()?;
    let opened = root.open_file(&locator)?;
    let shown = root.shown(&locator.path);
    let revision = listing.revision.replacen(kind, "archive", 1);
    let about = About { name: name.clone(), format, executable: file.executable };
    Ok(Some(Archive { opened, about, dictionaries, revision, locator, shown }))
}

/// Everything below `root`, as a revision.
fn list(root: &Root, kind: &str, pace: &Pace, counter: &Counter) -> Result<Listing> {
    let Walked { entries, skipped, digest } = walk(root, pace, counter)?;
    Ok(Listing { skipped, ..Listing::new(format!("{kind}:{digest}"), entries) })
}
