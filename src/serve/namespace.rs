//! Acting inside a mount namespace: another process's, or our own.
//!
//! A namespace belongs to a thread only if that thread shares its root and working directory with no other, so every act
//! gets a fresh thread that unshares them, enters, acts and ends. Descriptors opened before stay valid across the entry:
//! that is how mounts get in, and how `/proc` is reached where the namespace has none.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, thread};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;

use super::mountinfo::{self, MountLine};
use crate::error::{Error, Kind, Result};

/// A process's mount namespace, held open.
pub(super) struct MountNamespace {
    handle: OwnedFd,
    /// The process's root in it.
    root: OwnedFd,
    /// Its number, which is not used again while it exists.
    pub(super) inode: u64,
}

impl MountNamespace {
    /// The same, unless its process sees just what we see.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn unless_host(self) -> Result<Option<Self>> {
        let root = Path::new("/");
        let failed = |error| Error::io("looking at", root, error);
        let ours = fs::metadata(root).map_err(failed)?;
        let theirs = nix::sys::stat::fstat(&self.root).map_err(|errno| failed(errno.into()))?;
        let same_root = (theirs.st_dev, theirs.st_ino) == (ours.dev(), ours.ino());
        Ok(if same_root && self.inode == own_inode()? { None } else { Some(self) })
    }
}

/// Where a thread acts.
pub(super) enum Entrance<'a> {
    /// In our own namespace.
    Here,
    /// In a process's namespace with that process's root.
    AsProcess(&'a MountNamespace),
    /// In a process's namespace at the namespace's own root.
    AtRoot(&'a MountNamespace),
}

/// Number of our own mount namespace.
pub(super) fn own_inode() -> Result<u64> {
    inode_of(Path::new("/proc/self/ns/mnt"))
        .map_err(|error| Error::io("looking at the mount namespace", "/proc/self/ns/mnt", error))
}

/// Whether a thread is root's and in our own mount namespace now. Looks at `/proc` only: since Linux 6.12 requests need not say whose they are.
pub(super) fn is_of_our_root(thread: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    // Real, effective, saved and file system's.
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let is_root = users.is_some_and(|users| users.split_ascii_whitespace().all(|user| user == "0"));
    let theirs = inode_of(Path::new(&format!("/proc/{thread}/ns/mnt")));
    is_root && theirs.is_ok_and(|theirs| own_inode().is_ok_and(|own| own == theirs))
}

fn inode_of(path: &Path) -> std::io::Result<u64> {
    fs::metadata(path).map(|found| found.ino())
}

/// The mount namespace and root of process `pid`.
///
/// # Errors
/// `NO_SUCH_PROCESS`.
pub(super) fn of_process(pid: u32) -> Result<MountNamespace> {
    let failed = |errno: Errno| {
        let doing = format!("entering the mount namespace of process {pid}");
        match errno {
            Errno::ENOENT | Errno::ESRCH => Error::not_found("NO_SUCH_PROCESS", doing)
                .fact("pid", pid)
                .remedy("give the id of a running process, as the host numbers it")
                .because(errno),
            Errno::EACCES | Errno::EPERM => Error::denied("NAMESPACE_NOT_PERMITTED", doing)
                .remedy("run ckptd as root with CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE")
                .because(errno),
            _ => Error::unavailable("NAMESPACE_FAILED", doing).because(errno),
        }
    };
    open_process(pid).map_err(failed)
}

fn open_process(pid: u32) -> nix::Result<MountNamespace> {
    let process = format!("/proc/{pid}");
    let directory = nix::fcntl::open(Path::new(&process), OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    // Both through one descriptor: a number that is used again meanwhile is not the same process.
    let handle = openat(&directory, "ns/mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let root = openat(&directory, "root", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let inode = nix::sys::stat::fstat(&handle)?.st_ino;
    Ok(MountNamespace { handle, root, inode })
}

/// The namespace of number `inode`, through process `hint` if it is still in it, else through any process; `None` when no
/// process is in it any more.
pub(super) fn find(inode: u64, hint: Option<u32>) -> Option<MountNamespace> {
    let through = |pid| open_process(pid).ok().filter(|found| found.inode == inode);
    if let Some(found) = hint.and_then(through) {
        return Some(found);
    }
    let processes = fs::read_dir("/proc").ok()?;
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| inode_of(Path::new(&format!("/proc/{pid}/ns/mnt"))).is_ok_and(|found| found == inode))
        .find_map(through)
}

/// Runs `work` at `entrance`, on a thread of its own; blocks until it is done.
///
/// # Errors
/// Those of `work`, and of entering.
pub(super) fn act<T: Send>(entrance: &Entrance<'_>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let thread = thread::Builder::new().name("ckptd-mount".to_owned());
    thread::scope(|scope| {
        let spawned = thread.spawn_scoped(scope, || {
            enter(entrance).map_err(|errno| {
                Error::new(Kind::Unavailable, "NAMESPACE_FAILED", "entering a mount namespace").because(errno)
            })?;
            work()
        });
        let running = spawned.map_err(|error| {
            Error::new(Kind::NoSpace, "TOO_MANY_THREADS", "starting a thread that mounts").because(error)
        })?;
        running.join().unwrap_or_else(|_| Err(Error::internal("a thread that mounts has panicked")))
    })
}

fn enter(entrance: &Entrance<'_>) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    let (namespace, as_process) = match entrance {
        Entrance::Here => return Ok(()),
        Entrance::AsProcess(namespace) => (namespace, true),
        Entrance::AtRoot(namespace) => (namespace, false),
    };
    setns(&namespace.handle, CloneFlags::CLONE_NEWNS)?;
    if as_process {
        nix::unistd::fchdir(&namespace.root)?;
        nix::unistd::chroot(".")?;
    }
    Ok(())
}

/// Our `/proc`, to be opened before entering.
pub(super) fn open_proc() -> Result<OwnedFd> {
    nix::fcntl::open("/proc", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| Error::io("opening", "/proc", errno.into()))
}

/// The mounts that the calling thread sees.
pub(super) fn mounts(proc: &OwnedFd) -> Result<Vec<MountLine>> {
    let mut text = Vec::new();
    openat(proc.as_fd(), "thread-self/mountinfo", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).read_to_end(&mut text))
        .map_err(|error| Error::io("reading the list of mounts", "/proc/thread-self/mountinfo", error))?;
    Ok(mountinfo::parse(&text))
}
