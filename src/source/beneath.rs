//! Directories and files of this host, held to what they were when they were looked at.
//!
//! Links are never followed: every path below a [`Root`] is resolved by `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, so
//! whoever swaps a directory for a link while it is listed or read gets an error, not another file's bytes. Nor may the path of the root itself
//! have one: whoever fills a directory may have planted it. A file is looked at before it is opened for reading: opening a device does something.
//!
//! What a job shows us is looked at with the job's rights ([`rights`](super::rights)): each thing that is done with a [`Root`] sees to that itself.
//!
//! Nobody vouches that the tree stands still, so each file's [`Locator`] carries the [`Stamp`] it was listed with and a file that
//! no longer bears it is `SOURCE_CHANGED`. What a network file system believes of a file may be old: stamps are compared with what it says
//! when it is made to ask. Kernels before 6.13 count times in ticks of some milliseconds: there a write of equal length
//! within the tick of the listing goes unseen; and so does, everywhere, a store through a shared mapping to a page that was dirty already.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File as OpenFile;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::rights::Rights;
use super::source_changed;
use crate::error::{Error, Result};
use crate::names::{EntryName, EntryPath, show_bytes};
use crate::places::Stamp;

/// The root directory itself, as `openat2` names it.
const HERE: &str = ".";

/// How a directory is opened that others are resolved beneath.
const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// The stamp of a file that was just looked up.
pub(super) fn stamp_of(stat: &FileStat) -> Stamp {
    Stamp {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        modified_ns: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
        changed_ns: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(rest)
}

/// The stamp of an open file as whoever keeps it says now; `None` for what is not a regular file.
fn stamp_now(opened: &OpenFile) -> io::Result<Option<Stamp>> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC;
    let mask = libc::STATX_BASIC_STATS;
    // SAFETY: the descriptor is open, the path is an empty string with its NUL, and the answer is a live local of the right type.
    let code = unsafe { libc::statx(opened.as_raw_fd(), c"".as_ptr(), flags, mask, found.as_mut_ptr()) };
    if code != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed is a valid value of this plain structure, and the call succeeded besides.
    let found = unsafe { found.assume_init() };
    if u32::from(found.stx_mode) & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Ok(None);
    }
    let time = |at: libc::statx_timestamp| nanoseconds(at.tv_sec, at.tv_nsec.into());
    Ok(Some(Stamp {
        size: found.stx_size,
        modified_ns: time(found.stx_mtime),
        changed_ns: time(found.stx_ctime),
        inode: found.stx_ino,
    }))
}

/// How an open file differs from `stamp`; `None` if it does not.
///
/// # Errors
/// The I/O error.
pub(super) fn change_of(stamp: &Stamp, opened: &OpenFile) -> io::Result<Option<String>> {
    Ok(match stamp_now(opened)? {
        Some(now) => stamp.change(&now),
        None => Some("it was replaced".to_owned()),
    })
}

/// How a file is found again: stamp and path, as text `stamp/path` with the path percent-encoded, since names are bytes.
#[derive(Clone, Debug)]
pub(super) struct Locator {
    pub(super) stamp: Stamp,
    pub(super) path: EntryPath,
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.stamp, percent_encode(self.path.as_bytes(), NON_ALPHANUMERIC))
    }
}

impl FromStr for Locator {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (stamp, path) = text.split_once('/')?;
            let path = EntryPath::new(percent_decode_str(path).collect::<Vec<_>>()).ok()?;
            Some(Self { stamp: stamp.parse().ok()?, path })
        };
        parse().ok_or_else(|| Error::internal("a file of a directory has no locator"))
    }
}

/// The descriptor that every path is resolved beneath.
#[derive(Debug)]
pub(super) struct Root {
    /// Where it is, for people.
    pub(super) path: PathBuf,
    pub(super) directory: OwnedFd,
    /// Set where the root is one file: its name in `directory`.
    pub(super) only: Option<EntryName>,
    /// Set where it is a job's to choose: what is mounted below it is refused, and so is what these rights do not permit.
    pub(super) job: Option<Arc<Rights>>,
}

impl Root {
    /// The directory or file at `path`, in which there is no link.
    ///
    /// # Errors
    /// `NOT_A_DIRECTORY`, the I/O error.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let fault = |error: Errno| Error::io("opening", path, error.into());
        let found =
            open_plainly(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).map_err(|error| match error {
                Errno::ENOENT | Errno::ENOTDIR => {
                    fault(error).remedy("give the path of a directory or file that exists on this host")
                }
                Errno::ELOOP => {
                    unfit(path, "goes through a symbolic link").remedy("give the path that `realpath` prints")
                }
                _ => fault(error),
            })?;
        if is_directory(&found, path)? {
            return Self::at(path, &found).map_err(fault);
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(unfit(path, "is not a directory"));
        };
        let directory = open_plainly(parent, DIRECTORY).map_err(fault)?;
        let only = Some(EntryName::new(name.as_bytes())?);
        Ok(Self { path: parent.to_owned(), directory, only, job: None })
    }

    /// The directory that `found` stands for, shown as `path`.
    pub(super) fn at(path: &Path, found: impl AsFd) -> nix::Result<Self> {
        let directory = openat(found, HERE, DIRECTORY, Mode::empty())?;
        Ok(Self { path: path.to_owned(), directory, only: None, job: None })
    }

    /// The directory at `path`, wherever links in it lead: for paths that the operator gave.
    ///
    /// # Errors
    /// The I/O error.
    pub(super) fn open_trusted(path: &Path) -> io::Result<Self> {
        let directory = open(path, DIRECTORY, Mode::empty())?;
        Ok(Self { path: path.to_owned(), directory, only: None, job: None })
    }

    /// The directory or file `below` this root as a root of its own.
    ///
    /// # Errors
    /// `NOT_FOUND`, `NOT_A_DIRECTORY`, the I/O error.
    pub(super) fn descend(self, below: &EntryPath) -> Result<Self> {
        if below.is_root() {
            return Ok(self);
        }
        let shown = self.shown(below);
        let fault = |error: Errno| match error {
            Errno::ELOOP | Errno::EXDEV => unfit(&shown, "is or goes through a symbolic link"),
            _ => Error::io("opening", &shown, error.into()),
        };
        let found = self.resolve(below, OFlag::O_PATH).map_err(fault)?;
        if is_directory(&found, &shown)? {
            return Self::at(&shown, &found).map_err(fault);
        }
        let parent = below.parent().unwrap_or_default();
        let directory = self.resolve(&parent, OFlag::O_DIRECTORY).map_err(fault)?;
        let only = Some(EntryName::new(below.file_name())?);
        Ok(Self { path: self.shown(&parent), directory, only, job: self.job })
    }

    /// Whether there is nothing in the root directory.
    ///
    /// # Errors
    /// The I/O error.
    pub(super) fn is_empty(&self) -> Result<bool> {
        let fault = |error: Errno| Error::io("listing", &self.path, error.into());
        self.act(|| {
            // A descriptor of its own: listing moves it.
            let mut directory =
                self.resolve(&EntryPath::root(), OFlag::O_DIRECTORY).and_then(Dir::from_fd).map_err(fault)?;
            for entry in directory.iter() {
                if !matches!(entry.map_err(fault)?.file_name().to_bytes(), b"." | b"..") {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// What `work` gives, done with the rights that what is below may be seen with; blocks.
    ///
    /// # Errors
    /// Those of `work`, and of [`Rights::act`].
    pub(super) fn act<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.job {
            Some(rights) => rights.act(work),
            None => work(),
        }
    }

    pub(super) fn shown(&self, path: &EntryPath) -> PathBuf {
        self.path.join(OsStr::from_bytes(path.as_bytes()))
    }

    /// Opens `path` beneath the root without following any link, with the rights of the thread that calls.
    pub(super) fn resolve(&self, path: &EntryPath, flags: OFlag) -> nix::Result<OwnedFd> {
        let name = if path.is_root() { HERE.as_bytes() } else { path.as_bytes() };
        let mounts = if self.job.is_some() { ResolveFlag::RESOLVE_NO_XDEV } else { ResolveFlag::empty() };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | mounts);
        openat2(&self.directory, OsStr::from_bytes(name), how)
    }

    /// Opens a regular file for reading, with the rights of the thread that calls; nothing happens to what is none.
    ///
    /// # Errors
    /// ENXIO for what is none.
    pub(super) fn resolve_file(&self, path: &EntryPath) -> nix::Result<OpenFile> {
        let found = self.resolve(path, OFlag::O_PATH)?;
        if SFlag::from_bits_truncate(fstat(&found)?.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Err(Errno::ENXIO);
        }
        let link = format!("/proc/self/fd/{}", found.as_raw_fd());
        open(Path::new(&link), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map(OpenFile::from)
    }

    /// Opens a listed file and checks that it is still the one.
    pub(super) fn open_file(&self, locator: &Locator) -> Result<OpenFile> {
        let path = &locator.path;
        let opened = self.act(|| self.resolve_file(path).map_err(|error| self.fault("opening", path, error)))?;
        check_stamp(locator, &opened, &self.shown(path))?;
        Ok(opened)
    }

    /// What is listed and cannot be found again has changed; anything else is the disk's.
    pub(super) fn fault(&self, doing: &str, path: &EntryPath, error: Errno) -> Error {
        let shown = self.shown(path);
        if self.job.is_some() && error == Errno::EXDEV {
            return mounted(&shown);
        }
        if is_gone(error) {
            return changed(&shown, GONE).because(io::Error::from(error));
        }
        Error::io(doing, shown, error.into())
    }
}

/// How a file has changed that is not found at its path.
pub(super) const GONE: &str = "it was moved, removed or replaced";

/// Whether an error of opening says that something else, or nothing, is at the path now.
pub(super) fn is_gone(error: Errno) -> bool {
    // ENXIO: no regular file.
    matches!(error, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV | Errno::ENXIO)
}

/// Whether `found` is a directory; what is neither that nor a regular file is refused.
fn is_directory(found: impl AsFd, shown: &Path) -> Result<bool> {
    let stat = fstat(found).map_err(|error| Error::io("examining", shown, error.into()))?;
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => Ok(true),
        SFlag::S_IFREG => Ok(false),
        SFlag::S_IFLNK => Err(unfit(shown, "is a symbolic link").remedy("give the path that it leads to")),
        _ => Err(unfit(shown, "is neither a directory nor a regular file")),
    }
}

/// Opens `path`, in which no link is followed.
fn open_plainly(path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    openat2(AT_FDCWD, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS))
}

/// What a job mounts into its own tree is read with its rights, not with ours.
fn mounted(path: &Path) -> Error {
    let shown = show_bytes(path.as_os_str().as_bytes());
    Error::invalid("MOUNT_IN_SOURCE", format!("reading {shown}: something else is mounted there"))
        .fact("path", shown)
        .remedy("let the job unmount it, or capture the directory by its path on the host")
}

pub(super) fn unfit(path: &Path, why: &str) -> Error {
    Error::invalid("NOT_A_DIRECTORY", format!("opening {}: it {why}", show_bytes(path.as_os_str().as_bytes())))
        .remedy("give the path of a directory or a regular file")
}

pub(super) fn changed(path: &Path, how: &str) -> Error {
    source_changed(&show_bytes(path.as_os_str().as_bytes()), how)
}

/// # Errors
/// `SOURCE_CHANGED`, the I/O error.
pub(super) fn check_stamp(locator: &Locator, opened: &OpenFile, shown: &Path) -> Result<()> {
    match change_of(&locator.stamp, opened) {
        Ok(None) => Ok(()),
        Ok(Some(how)) => Err(changed(shown, &how)),
        Err(error) => Err(Error::io("examining", shown, error)),
    }
}
