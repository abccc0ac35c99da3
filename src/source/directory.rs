//! A directory of this host, or a single file: what `capture` and `quickstart` bring in.
//!
//! Opening lists everything below the root: directories, regular files, symbolic links verbatim. Sockets, devices and
//! FIFOs are skipped and named. Links are never followed, the root included, and every path below it is resolved by
//! `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`: whoever swaps a directory for a link while it is listed or read
//! gets an error, not another file's bytes.
//!
//! Nobody vouches that the tree stands still, so each file's locator carries the [`Stamp`] it was listed with
//! (size, times of modification and change, inode) and a file that no longer bears it is `SOURCE_CHANGED`. The revision is a
//! digest over all paths, stamps and link targets: it is met again only if nothing was touched. Kernels before 6.13 count
//! times in ticks of some milliseconds: there a write of equal length within the tick of the listing goes unseen.
//!
//! A root that is one archive file is streamed member by member, unless it is to be kept as it is.
//!
//! The walk is iterative, in the order of names, and bounded by `limits`; one descriptor is open at a time.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File as OpenFile;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::archived::ArchivedEntries;
use super::{ByteStream, Expected, File, Listed, Listing, Opened, Source, What, source_changed};
use crate::archive::{About, Format};
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::limits;
use crate::names::{EntryName, EntryPath, show_bytes};

/// Bytes read at a time by [`Source::read`].
const READ_BYTES: u64 = 1 << 20;

/// The root directory itself, as `openat2` names it.
const HERE: &str = ".";

/// A directory or file of this host.
#[derive(Debug)]
pub(super) struct DirectorySource {
    path: PathBuf,
    /// Whether a root that is an archive is taken apart.
    extract: bool,
    root: Mutex<Option<Arc<Root>>>,
}

impl DirectorySource {
    /// The tree at the absolute `path`, or in the archive that it names if `extract`; nothing is touched before it is opened.
    pub(super) fn new(path: &Path, extract: bool) -> Self {
        // By components, since a `/` at the end would follow a link in spite of `O_NOFOLLOW`.
        Self { path: path.components().collect(), extract, root: Mutex::default() }
    }

    /// The root as it was opened for listing, or opened now by a process that resumes without listing.
    fn root(&self) -> Result<Arc<Root>> {
        let known = self.root.lock().unwrap_or_else(PoisonError::into_inner).clone();
        known.map_or_else(|| Root::open(&self.path).map(Arc::new), Ok)
    }
}

#[async_trait]
impl Source for DirectorySource {
    async fn open(&self) -> Result<Opened> {
        let (path, extract) = (self.path.clone(), self.extract);
        let (root, listing, archive) = unblocked(move || {
            let root = Root::open(&path)?;
            let listing = list(&root)?;
            let archive = if extract { open_archive(&root, &listing)? } else { None };
            Ok((root, listing, archive))
        })
        .await?;
        if let Some(archive) = archive {
            return Ok(Opened::Streamed(Box::new(archive.read()?)));
        }
        *self.root.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(root));
        Ok(Opened::Listed(listing))
    }

    async fn read(&self, file: &File, range: Range<u64>) -> Result<ByteStream> {
        let root = self.root()?;
        let locator: Locator = file.locator.parse()?;
        let end = range.end.min(locator.stamp.size);
        let start = range.start;
        let reading = unblocked(move || Ok(Reading { opened: root.open_file(&locator)?, root, locator, end }));
        let reading = Arc::new(reading.await?);
        Ok(Box::pin(stream::try_unfold((reading, start), |(reading, at)| async move {
            let (bytes, reading) = unblocked(move || Ok((reading.piece(at)?, reading))).await?;
            Ok(bytes.map(|bytes| {
                let next = at + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                (bytes, (reading, next))
            }))
        })))
    }

    fn open_local(&self, file: &File) -> Result<Option<OpenFile>> {
        self.root()?.open_file(&file.locator.parse()?).map(Some)
    }

    fn check_unchanged(&self, file: &File, opened: &OpenFile) -> Result<()> {
        let locator: Locator = file.locator.parse()?;
        check_stamp(&locator, opened, &self.path.join(OsStr::from_bytes(locator.path.as_bytes())))
    }
}

/// Runs blocking file work off the runtime's threads.
async fn unblocked<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal("reading files").because(error))?
}

/// What tells that a file is the one that was listed, untouched. The time of change cannot be set back by its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
    inode: u64,
}

impl Stamp {
    fn of(stat: &FileStat) -> Self {
        let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Self {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            modified_ns: nanos(stat.st_mtime, stat.st_mtime_nsec),
            changed_ns: nanos(stat.st_ctime, stat.st_ctime_nsec),
            inode: stat.st_ino,
        }
    }
}

/// How a file is found again: stamp and path, as text `size.modified.changed.inode/path` with the path percent-encoded, since
/// names are bytes.
#[derive(Clone, Debug)]
struct Locator {
    stamp: Stamp,
    path: EntryPath,
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { size, modified_ns, changed_ns, inode } = self.stamp;
        write!(
            f,
            "{size}.{modified_ns}.{changed_ns}.{inode}/{}",
            percent_encode(self.path.as_bytes(), NON_ALPHANUMERIC)
        )
    }
}

impl FromStr for Locator {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (stamp, path) = text.split_once('/')?;
            let mut fields = stamp.split('.');
            let stamp = Stamp {
                size: fields.next()?.parse().ok()?,
                modified_ns: fields.next()?.parse().ok()?,
                changed_ns: fields.next()?.parse().ok()?,
                inode: fields.next()?.parse().ok()?,
            };
            let path = EntryPath::new(percent_decode_str(path).collect::<Vec<_>>()).ok()?;
            Some(Self { stamp, path })
        };
        parse().ok_or_else(|| Error::internal("a file of a directory has no locator"))
    }
}

/// The descriptor that every path is resolved beneath.
#[derive(Debug)]
struct Root {
    path: PathBuf,
    directory: OwnedFd,
    /// Set where the root is one file: its name in `directory`.
    only: Option<EntryName>,
}

impl Root {
    fn open(path: &Path) -> Result<Self> {
        let fault = |error: Errno| Error::io("opening", path, error.into());
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = open(path, flags, Mode::empty()).map_err(|error| match error {
            Errno::ENOENT | Errno::ENOTDIR => {
                fault(error).remedy("give the path of a directory or file that exists on this host")
            }
            _ => fault(error),
        })?;
        let kind = fstat(&found).map_err(fault)?.st_mode & SFlag::S_IFMT.bits();
        let directory = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        if kind == SFlag::S_IFDIR.bits() {
            let directory = openat(&found, HERE, directory, Mode::empty()).map_err(fault)?;
            return Ok(Self { path: path.to_owned(), directory, only: None });
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(unfit(path, "is not a directory"));
        };
        if kind == SFlag::S_IFLNK.bits() {
            return Err(unfit(path, "is a symbolic link").remedy("give the path that it leads to"));
        }
        if kind != SFlag::S_IFREG.bits() {
            return Err(unfit(path, "is neither a directory nor a regular file"));
        }
        let directory = open(parent, directory, Mode::empty()).map_err(fault)?;
        Ok(Self { path: parent.to_owned(), directory, only: Some(EntryName::new(name.as_bytes())?) })
    }

    fn shown(&self, path: &EntryPath) -> PathBuf {
        self.path.join(OsStr::from_bytes(path.as_bytes()))
    }

    /// Opens `path` beneath the root without following any link.
    fn open_beneath(&self, path: &EntryPath, flags: OFlag) -> Result<OwnedFd> {
        let name = if path.is_root() { HERE.as_bytes() } else { path.as_bytes() };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(&self.directory, OsStr::from_bytes(name), how).map_err(|error| self.fault("opening", path, error))
    }

    /// Opens a listed file and checks that it is still the one.
    fn open_file(&self, locator: &Locator) -> Result<OpenFile> {
        // Not to be held up by a FIFO that took the file's place; regular files do not know the flag.
        let opened = OpenFile::from(self.open_beneath(&locator.path, OFlag::O_NONBLOCK)?);
        check_stamp(locator, &opened, &self.shown(&locator.path))?;
        Ok(opened)
    }

    /// What is listed and cannot be found again has changed; anything else is the disk's.
    fn fault(&self, doing: &str, path: &EntryPath, error: Errno) -> Error {
        let shown = self.shown(path);
        match error {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV => {
                changed(&shown, "it was moved, removed or replaced").because(io::Error::from(error))
            }
            _ => Error::io(doing, shown, error.into()),
        }
    }
}

fn unfit(path: &Path, why: &str) -> Error {
    Error::invalid("NOT_A_DIRECTORY", format!("opening {}: it {why}", show_bytes(path.as_os_str().as_bytes())))
        .remedy("give the path of a directory or a regular file")
}

fn changed(path: &Path, how: &str) -> Error {
    source_changed(&show_bytes(path.as_os_str().as_bytes()), how)
}

fn check_stamp(locator: &Locator, opened: &OpenFile, shown: &Path) -> Result<()> {
    let stat = fstat(opened.as_fd()).map_err(|error| Error::io("examining", shown, error.into()))?;
    let regular = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
    let now = Stamp::of(&stat);
    if regular && now == locator.stamp {
        return Ok(());
    }
    let how = if !regular || now.inode != locator.stamp.inode {
        "it was replaced".to_owned()
    } else if now.size != locator.stamp.size {
        format!("its size changed from {} to {} bytes", locator.stamp.size, now.size)
    } else {
        "it was written to or its attributes changed".to_owned()
    };
    Err(changed(shown, &how))
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

/// A root that is an archive, opened.
struct Archive {
    opened: OpenFile,
    about: About,
    revision: String,
    locator: Locator,
    shown: PathBuf,
}

impl Archive {
    /// Begins to read the members. Needs a runtime.
    fn read(self) -> Result<ArchivedEntries> {
        let Self { opened, about, revision, locator, shown } = self;
        let check = Box::new(move |opened: &OpenFile| check_stamp(&locator, opened, &shown));
        ArchivedEntries::read(opened, about, revision, check)
    }
}

/// The one file that was listed, if its name is that of an archive.
fn open_archive(root: &Root, listing: &Listing) -> Result<Option<Archive>> {
    let Some(name) = &root.only else { return Ok(None) };
    let (Some(format), [Listed { what: What::File(file), .. }]) = (Format::of_name(name), listing.entries.as_slice())
    else {
        return Ok(None);
    };
    let locator: Locator = file.locator.parse()?;
    let opened = root.open_file(&locator)?;
    let shown = root.shown(&locator.path);
    let revision = listing.revision.replacen("directory:", "archive:", 1);
    let about = About { name: name.clone(), format, executable: file.executable };
    Ok(Some(Archive { opened, about, revision, locator, shown }))
}

/// Everything below `root`.
fn list(root: &Root) -> Result<Listing> {
    let mut walk = Walk { root, entries: Vec::new(), skipped: Vec::new(), digester: Digester::new(), open: Vec::new() };
    match &root.only {
        Some(name) => walk.enter(&EntryPath::root(), &root.directory, name, None)?,
        None => {
            walk.open.push(EntryPath::root());
            while let Some(directory) = walk.open.pop() {
                walk.list_directory(&directory)?;
            }
        }
    }
    let revision = format!("directory:{}", walk.digester.finish());
    Ok(Listing { skipped: walk.skipped, ..Listing::new(revision, walk.entries) })
}

struct Walk<'a> {
    root: &'a Root,
    entries: Vec<Listed>,
    skipped: Vec<(String, String)>,
    digester: Digester,
    /// Directories found and not yet listed.
    open: Vec<EntryPath>,
}

impl Walk<'_> {
    fn list_directory(&mut self, path: &EntryPath) -> Result<()> {
        let fault = |error| self.root.fault("listing", path, error);
        let mut directory = Dir::from_fd(self.root.open_beneath(path, OFlag::O_DIRECTORY)?).map_err(fault)?;
        let room = limits::CHECKPOINT_ENTRIES.saturating_sub(self.entries.len() + self.skipped.len());
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(fault)?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            if names.len() >= room {
                return Err(self.too_many());
            }
            names.push((EntryName::new(name)?, entry.file_type()));
        }
        names.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        for (name, kind) in names {
            self.enter(path, &directory, &name, kind)?;
        }
        Ok(())
    }

    /// Lists the one entry `name` of the directory `at`; `kind` where reading the directory told it.
    fn enter(&mut self, at: &EntryPath, directory: impl AsFd, name: &EntryName, kind: Option<Type>) -> Result<()> {
        let path = at.join(name)?;
        let kind = match kind {
            Some(Type::Directory) => SFlag::S_IFDIR,
            Some(Type::Symlink) => SFlag::S_IFLNK,
            _ => return self.enter_examined(path, &directory, name),
        };
        self.enter_as(path, &directory, name, kind)
    }

    fn enter_examined(&mut self, path: EntryPath, directory: impl AsFd, name: &EntryName) -> Result<()> {
        let stat = fstatat(&directory, OsStr::from_bytes(name.as_bytes()), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|error| self.root.fault("examining", &path, error))?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if kind != SFlag::S_IFREG {
            return self.enter_as(path, directory, name, kind);
        }
        let stamp = Stamp::of(&stat);
        self.record(b'f', &path, format!("{stamp:?}").as_bytes());
        let locator = Locator { stamp, path: path.clone() }.to_string();
        let file = File {
            locator,
            size: Some(stamp.size),
            executable: stat.st_mode & 0o111 != 0,
            ranges: true,
            expected: Expected::default(),
        };
        self.entries.push(Listed { path, what: What::File(file) });
        Ok(())
    }

    /// Lists what is not a regular file.
    fn enter_as(&mut self, path: EntryPath, directory: impl AsFd, name: &EntryName, kind: SFlag) -> Result<()> {
        if kind == SFlag::S_IFDIR {
            self.record(b'd', &path, b"");
            self.open.push(path.clone());
            self.entries.push(Listed { path, what: What::Directory });
            return Ok(());
        }
        if kind == SFlag::S_IFLNK {
            let target = readlinkat(directory, OsStr::from_bytes(name.as_bytes()))
                .map_err(|error| self.root.fault("reading the link", &path, error))?;
            let target = target.into_vec();
            self.record(b'l', &path, &target);
            self.entries.push(Listed { path, what: What::Symlink(target.into()) });
            return Ok(());
        }
        let what = match kind {
            SFlag::S_IFIFO => "is a FIFO",
            SFlag::S_IFSOCK => "is a socket",
            SFlag::S_IFBLK | SFlag::S_IFCHR => "is a device",
            _ => "is not a regular file",
        };
        self.skipped.push((path.to_string(), what.to_owned()));
        Ok(())
    }

    /// Adds one entry to the revision; lengths keep neighbours apart.
    fn record(&mut self, kind: u8, path: &EntryPath, rest: &[u8]) {
        let mut bytes = Vec::with_capacity(path.as_bytes().len() + rest.len() + 17);
        bytes.push(kind);
        for field in [path.as_bytes(), rest] {
            bytes.extend_from_slice(&u64::try_from(field.len()).unwrap_or(u64::MAX).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        self.digester.update(&bytes);
    }

    fn too_many(&self) -> Error {
        let root = show_bytes(self.root.path.as_os_str().as_bytes());
        Error::no_space(
            "TOO_MANY_ENTRIES",
            format!("listing {root}: it has more than {} entries", limits::CHECKPOINT_ENTRIES),
        )
        .remedy("choose a smaller directory")
    }
}
