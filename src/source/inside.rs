//! The root directory of a running process, held open: where the paths of a job in a container begin.
//!
//! A process is known by its number, the time it began and the boot it began in, so that its number, used again, is never taken for it:
//! not by a retry, nor by the next start of the daemon. All is read through one descriptor of `/proc/<pid>`, which stands for that process alone.
//!
//! Paths are resolved by `openat2` with `RESOLVE_IN_ROOT`: the job's own links lead where they lead the job, never outside of its
//! root, and magic links (`/proc/<pid>/root`, `/proc/<pid>/fd/<n>`), which would, are refused. Where that root is ours, so is what links lead
//! to, and none is followed. The process may end once it was opened:
//! its root stays as long as it is held here, though whoever made it may empty it.
//!
//! What the job could not read by itself it must not have us read for it. It may have mounted anything at the directory that is asked for, or
//! made it a link to anything. So all that is looked up, listed and opened in its root is so with the rights of that process over files, as they
//! were when it was opened here ([`rights`](super::rights)); only its root is reached with ours. What it mounted *below* the directory is refused
//! besides ([`Root`]'s `job`), and so is a file system whose files are the kernel's answers to whoever opens them.
//!
//! A job may be what answers behind its file system, and hold up whoever asks. A directory on FUSE is therefore refused, where the list of mounts
//! tells so before it is asked anything ([`covering`]). It does not tell of a link to it, nor of FUSE on the way to a directory that is on
//! another: there a thread may be held up for as long as the job likes. Nor does anything tell of an overlay whose layers are on FUSE, or of a server of
//! NFS, which may also answer the listing and fall silent when files are read. So many threads are lost to listings that one process holds up, and so many
//! to all of them, and no more ([`patience`](super::patience)).

use std::fmt;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, stat};
use nix::sys::statfs::fstatfs;

use super::beneath::{Root, unfit};
use super::covering;
use super::rights::Rights;
use crate::disk::boot_id;
use crate::error::{Error, Result};

/// `/proc/<pid>/stat` is some 300 bytes; the name in it, which is the process's to choose, has 64 at most.
const STAT_BYTES: u64 = 4096;

/// `/proc/<pid>/status` is some 1500 bytes, and eleven more for each group: 65,536 at most.
const STATUS_BYTES: u64 = 1 << 20;

/// Some 7,000 mounts of usual length. Where there are more nobody looks, and the file system is asked what it is.
const MOUNTS_BYTES: u64 = 1 << 20;

/// Which field of what follows the name in `/proc/<pid>/stat` is the time it began, in ticks since boot (proc(5): 22, of all).
const STARTED_FIELD: usize = 19;

/// Tries of a path in which somebody renames or mounts while it is resolved.
const RESOLVE_TRIES: u32 = 16;

/// File systems whose files are answers of the kernel, or of somebody's program, made for whoever opens them (`linux/magic.h`).
const ANSWERS: &[(i64, &str)] = &[
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x4341_5d53, "smackfs"),
    (0x27_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x0765_5821, "resctrl"),
    (0xcafe_4a11, "bpf"),
    (0x6265_6570, "configfs"),
    (0x1cd1, "devpts"),
    (0x6165_676c, "pstore"),
    (0xde5e_81e4, "efivarfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x6e73_6673, "nsfs"),
    (0x1980_0202, "mqueue"),
    (0x6573_5546, "FUSE"),
];

/// One process of this host, for ever: as text `pid.began.boot`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// Its number, as the host numbers it.
    pub pid: u32,
    /// Ticks since boot.
    began: u64,
    boot: String,
}

impl ProcessId {
    /// The process that has the number `pid` now.
    ///
    /// # Errors
    /// `NO_SUCH_PROCESS`, the I/O error.
    pub fn of(pid: u32) -> Result<Self> {
        let directory = open_directory(pid).map_err(|errno| fault(pid, errno))?;
        Self::of_directory(pid, &directory)
    }

    fn of_directory(pid: u32, directory: &OwnedFd) -> Result<Self> {
        let stat = said(pid, directory, "stat", STAT_BYTES)?;
        let began = began(&stat).ok_or_else(|| Error::internal("the kernel says nothing of when a process began"))?;
        Ok(Self { pid, began, boot: boot_id()? })
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, began, boot } = self;
        write!(f, "{pid}.{began}.{boot}")
    }
}

impl FromStr for ProcessId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let mut fields = text.splitn(3, '.');
            let (pid, began) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            Some(Self { pid, began, boot: fields.next()?.to_owned() })
        };
        parse().ok_or_else(|| Error::invalid("BAD_OPTION", "the option `process` names no process"))
    }
}

/// The root of a process and one directory in it, held open: what is mounted in the root goes away with the process, and what is held stays.
#[derive(Debug)]
pub(super) struct ProcessRoot {
    pid: u32,
    /// Its `/proc/<pid>`.
    process: OwnedFd,
    root: OwnedFd,
    rights: Arc<Rights>,
    path: PathBuf,
    directory: OnceLock<OwnedFd>,
}

impl ProcessRoot {
    /// The root of the very process `wanted`, in which the directory at the absolute `path` is meant. Does not wait for any file system.
    ///
    /// # Errors
    /// `NO_SUCH_PROCESS` once it has ended, `NOT_PERMITTED` for one whose rights are another's.
    pub(super) fn open(wanted: &ProcessId, path: &Path) -> Result<Self> {
        let pid = wanted.pid;
        let process = open_directory(pid).map_err(|errno| fault(pid, errno))?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(&process, "root", flags, Mode::empty()).map_err(|errno| fault(pid, errno))?;
        let status = said(pid, &process, "status", STATUS_BYTES)?;
        let rights = Rights::of_status(pid, &status, is_of_our_users(&process));
        // Its number may have been another's when it was opened: then so were its rights.
        if ProcessId::of_directory(pid, &process)? != *wanted {
            return Err(gone(pid));
        }
        let rights = Arc::new(rights?);
        Ok(Self { pid, process, root, rights, path: path.to_owned(), directory: OnceLock::new() })
    }

    /// The directory: the one that the first call found. May wait for the file systems that the process sees.
    ///
    /// # Errors
    /// `NOT_A_DIRECTORY`, `NOT_PLAIN_FILES`, `NOT_PERMITTED` for what the process itself may not read, the I/O error.
    pub(super) fn find(&self) -> Result<Root> {
        let known = self.directory.get();
        if known.is_none() {
            self.check_mounts()?;
        }
        let root = self.rights.act(|| match known {
            Some(found) => Root::at(&self.shown(), found).map_err(|errno| self.fault(errno)),
            None => self.find_first(),
        })?;
        Ok(Root { job: Some(Arc::clone(&self.rights)), ..root })
    }

    fn find_first(&self) -> Result<Root> {
        let shown = self.shown();
        let fault = |errno| self.fault(errno);
        let found = self.resolve().map_err(fault)?;
        check_file_system(&shown, &found)?;
        let stat = fstat(&found).map_err(fault)?;
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFDIR {
            return Err(unfit(&shown, "is not a directory").remedy("give the path of a directory"));
        }
        let root = Root::at(&shown, &found).map_err(fault)?;
        // Where two came at once, either has found what the process calls so.
        let _ = self.directory.set(found);
        Ok(root)
    }

    fn resolve(&self) -> nix::Result<OwnedFd> {
        let (root, ours) = (fstat(&self.root)?, stat("/")?);
        let is_ours = (root.st_dev, root.st_ino) == (ours.st_dev, ours.st_ino);
        let links = if is_ours { ResolveFlag::RESOLVE_NO_SYMLINKS } else { ResolveFlag::RESOLVE_NO_MAGICLINKS };
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT | links);
        let mut tries = 1;
        loop {
            match openat2(&self.root, &self.path, how) {
                // The kernel would not say whether a `..` has left the root, since something was renamed meanwhile.
                Err(Errno::EAGAIN) if tries < RESOLVE_TRIES => tries += 1,
                resolved => return resolved,
            }
        }
    }

    /// Refuses what lies on FUSE by the list of mounts. Once the process has ended there is no list, and what it had mounted is gone.
    fn check_mounts(&self) -> Result<()> {
        let mounts = said(self.pid, &self.process, "mountinfo", MOUNTS_BYTES).unwrap_or_default();
        if u64::try_from(mounts.len()).is_ok_and(|length| length >= MOUNTS_BYTES) {
            return Ok(());
        }
        match covering::kind_at(&mounts, &self.path) {
            Some(kind) if covering::is_fuse(&kind) => Err(no_plain_files(&self.shown(), "FUSE")),
            _ => Ok(()),
        }
    }

    fn fault(&self, errno: Errno) -> Error {
        let shown = self.shown();
        match errno {
            Errno::ELOOP => {
                unfit(&shown, "goes through symbolic links that lead nowhere or out of the root of the process")
                    .remedy("give the path that `realpath` prints there")
            }
            _ => {
                Error::io("opening", &shown, errno.into()).remedy("give the path of a directory as the process sees it")
            }
        }
    }

    /// Where it is on this host, for people.
    fn shown(&self) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.pid)).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }
}

fn check_file_system(shown: &Path, directory: impl AsFd) -> Result<()> {
    let kind = fstatfs(directory).map_err(|errno| Error::io("examining", shown, errno.into()))?.filesystem_type().0;
    match ANSWERS.iter().find(|(magic, _)| *magic == kind) {
        Some((_, name)) => Err(no_plain_files(shown, name)),
        None => Ok(()),
    }
}

fn no_plain_files(shown: &Path, kind: &str) -> Error {
    let message = format!(
        "reading {}: it is on a file system of type {kind}, whose files are made for whoever reads them",
        shown.display()
    );
    Error::invalid("NOT_PLAIN_FILES", message)
        .fact("path", shown.display())
        .remedy("let the job write its output to a disk, or capture it by its path on the host")
}

fn open_directory(pid: u32) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(Path::new(&format!("/proc/{pid}")), flags, Mode::empty())
}

/// What the file `name` of the process's directory says, of which `most` bytes are read.
fn said(pid: u32, directory: &OwnedFd, name: &str, most: u64) -> Result<Vec<u8>> {
    let opened = openat(directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    let opened = opened.map_err(|errno| fault(pid, errno))?;
    let mut text = Vec::new();
    match std::fs::File::from(opened).take(most).read_to_end(&mut text) {
        Ok(_) => Ok(text),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(gone(pid)),
        Err(error) => Err(Error::io("looking at", format!("/proc/{pid}/{name}"), error)),
    }
}

/// Whether the process is in our user namespace, or the kernel has none.
fn is_of_our_users(process: &OwnedFd) -> bool {
    let theirs = fstatat(process, "ns/user", AtFlags::empty()).map(|found| (found.st_dev, found.st_ino));
    theirs.ok() == stat("/proc/self/ns/user").map(|found| (found.st_dev, found.st_ino)).ok()
}

/// When the process began, by its `stat`: behind the last `)`, since its name may hold any.
fn began(stat: &[u8]) -> Option<u64> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(STARTED_FIELD)?.parse().ok()
}

fn fault(pid: u32, errno: Errno) -> Error {
    match errno {
        Errno::ENOENT | Errno::ESRCH => gone(pid),
        Errno::EACCES | Errno::EPERM => {
            Error::denied("NAMESPACE_NOT_PERMITTED", format!("looking into the root of process {pid}"))
                .remedy("run ckptd as root with CAP_SYS_PTRACE")
                .because(errno)
        }
        _ => Error::io("looking into", format!("/proc/{pid}"), errno.into()),
    }
}

fn gone(pid: u32) -> Error {
    Error::not_found("NO_SUCH_PROCESS", format!("there is no process {pid}, or it has ended"))
        .fact("pid", pid)
        .remedy("capture through another process of the job, or by the path on the host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_the_time_a_process_began() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        for name in ["sh", "a b", ") S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 (", "\n)"] {
            assert_eq!(began(format!("77 ({name}) {rest}\n").as_bytes()), Some(4711), "{name}");
        }
        for bad in ["", "77 (sh", "77 (sh) S 1", "77 (sh) \u{fffd}"] {
            assert_eq!(began(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_process_is_found_again_by_its_text_and_no_other_is_taken_for_it() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert_eq!(own.to_string().parse::<ProcessId>().unwrap(), own);
        let open = |process: &ProcessId| ProcessRoot::open(process, Path::new("/usr"));
        assert!(open(&own).unwrap().find().unwrap().job.is_some());
        for other in [
            ProcessId { began: own.began + 1, ..own.clone() },
            ProcessId { boot: String::new(), ..own.clone() },
            ProcessId { pid: 4_194_303, ..own.clone() },
        ] {
            assert_eq!(open(&other).unwrap_err().reason(), "NO_SUCH_PROCESS", "{other}");
        }
        for bad in ["", "1", "1.2", "x.2.b", "1.y.b"] {
            assert_eq!(bad.parse::<ProcessId>().unwrap_err().reason(), "BAD_OPTION", "{bad}");
        }
    }

    #[test]
    fn what_the_kernel_answers_is_no_output() {
        let own = ProcessId::of(std::process::id()).unwrap();
        let reason =
            |path: &str| ProcessRoot::open(&own, Path::new(path)).unwrap().find().unwrap_err().reason().to_owned();
        for kernel in ["/proc", "/sys", "/proc/sys"] {
            assert_eq!(reason(kernel), "NOT_PLAIN_FILES", "{kernel}");
        }
        // A root that is ours: no link is followed, magic or not.
        for link in ["/proc/self/root/usr", "/proc/self/task"] {
            assert_eq!(reason(link), "NOT_A_DIRECTORY", "{link}");
        }
        assert_eq!(reason("/none"), "NO_SUCH_FILE");
    }
}
