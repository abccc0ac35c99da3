//! Where a view may be put: an existing, empty directory that is not a mount point, named by an absolute path.
//!
//! The path is walked once and held by descriptor; what is mounted goes onto that descriptor, so nobody can swap a
//! directory between check and mount. On the host no component may be a symbolic link: a job's root
//! directory on the host is the job's to fill, and a link in it would lead a mount of ours anywhere. Inside a process's
//! namespace the process sees nothing but its own, so links are followed there, except magic ones and the last.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::Mode;

use super::mount_calls;
use crate::error::{Error, Result};

/// Every inode of a view has it; nothing else does.
const OURS: &std::ffi::CStr = c"user.ckptd.checkpoint";

/// Whose path it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// The host's.
    Host,
    /// A process's, whose root the calling thread has.
    Process,
}

/// Directories of the daemon's own on the host, into which nothing may be put; paths without links.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Those: state, sessions, whatever else is ours.
    pub directories: Vec<PathBuf>,
    /// What is below one of them and free all the same.
    pub free: Option<PathBuf>,
}

impl Reserved {
    fn has(&self, target: &Path) -> bool {
        let is_free = self.free.as_ref().is_some_and(|free| target.starts_with(free) && target != free);
        !is_free && self.directories.iter().any(|directory| target.starts_with(directory))
    }
}

/// Checks the path itself, before anything is opened.
///
/// # Errors
/// `TARGET_NOT_ABSOLUTE`, `TARGET_RESERVED`.
pub(super) fn check_path(target: &Path, whose: Whose, reserved: &Reserved) -> Result<()> {
    let plain = |component: Component<'_>| matches!(component, Component::RootDir | Component::Normal(_));
    if !target.is_absolute() || !target.components().all(plain) {
        let message = format!("the target {} is not an absolute path without `..`", target.display());
        return Err(wrong("TARGET_NOT_ABSOLUTE", target, message).remedy("give the whole path, from /"));
    }
    if whose == Whose::Host && reserved.has(target) {
        let message = format!("the target {} is inside a directory of ckptd's own", target.display());
        return Err(wrong("TARGET_RESERVED", target, message).remedy("choose a directory outside it"));
    }
    Ok(())
}

/// Opens and checks the target, on the thread that will mount.
///
/// # Errors
/// `TARGET_MISSING`, `TARGET_NOT_DIRECTORY`, `TARGET_IS_SYMLINK`, `TARGET_IS_MOUNTPOINT`, `TARGET_NOT_EMPTY`,
/// `TARGET_IN_CHECKPOINT`.
pub(super) fn open(target: &Path, whose: Whose) -> Result<OwnedFd> {
    let directory = walk(target, whose)?;
    let standing = mount_calls::standing(&directory).map_err(|error| Error::io("looking at", target, error))?;
    if standing.is_mount_root {
        let message = format!("something is mounted at the target {} already", target.display());
        return Err(Error::wrong_state("TARGET_IS_MOUNTPOINT", message)
            .fact("target", target.display())
            .remedy("unmount it, detach what is attached there, or choose another directory"));
    }
    check_inside(target, &directory)?;
    Ok(directory)
}

/// The directory that the target's path leads to.
///
/// # Errors
/// `TARGET_MISSING`, `TARGET_NOT_DIRECTORY`, `TARGET_IS_SYMLINK`.
pub(super) fn walk(target: &Path, whose: Whose) -> Result<OwnedFd> {
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let (resolve, flags) = match whose {
        Whose::Host => (ResolveFlag::RESOLVE_NO_SYMLINKS, directory),
        Whose::Process => (ResolveFlag::RESOLVE_NO_MAGICLINKS, directory | OFlag::O_NOFOLLOW),
    };
    let opened = openat2(AT_FDCWD, target, OpenHow::new().flags(flags).resolve(resolve));
    opened.map_err(|errno| explain(target, errno))
}

fn check_inside(target: &Path, directory: &OwnedFd) -> Result<()> {
    let failed = |errno: Errno| Error::io("reading the directory", target, errno.into());
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let listing = openat(directory, c".", flags, Mode::empty()).map_err(failed)?;
    if has_attribute(&listing) {
        let message = format!("the target {} is inside a checkpoint", target.display());
        return Err(wrong("TARGET_IN_CHECKPOINT", target, message).remedy("choose a directory outside it"));
    }
    for entry in Dir::from_fd(listing).map_err(failed)?.iter() {
        let entry = entry.map_err(failed)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            let name = entry.file_name().to_string_lossy();
            let message = format!("the target {} is not empty: it holds `{name}`", target.display());
            return Err(Error::wrong_state("TARGET_NOT_EMPTY", message)
                .fact("target", target.display())
                .remedy("empty it or choose another directory; what is in it would be hidden"));
        }
    }
    Ok(())
}

fn has_attribute(directory: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: the name is a static C string; no room is given, so nothing is written.
    unsafe { libc::fgetxattr(directory.as_fd().as_raw_fd(), OURS.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

fn explain(target: &Path, errno: Errno) -> Error {
    let shown = target.display().to_string();
    let at = |error: Error| error.fact("target", &shown).because(errno);
    match errno {
        Errno::ENOENT => at(Error::not_found("TARGET_MISSING", format!("the target {shown} does not exist"))
            .remedy("create it first, as an empty directory")),
        Errno::ENOTDIR => at(Error::invalid("TARGET_NOT_DIRECTORY", format!("the target {shown} is not a directory"))
            .remedy("give an empty directory, not a file or a symbolic link")),
        Errno::ELOOP => {
            at(Error::invalid("TARGET_IS_SYMLINK", format!("the path of the target {shown} has a symbolic link"))
                .remedy("give the path that `realpath` prints"))
        }
        _ => Error::io("opening the target", target, errno.into()),
    }
}

fn wrong(reason: &str, target: &Path, message: String) -> Error {
    Error::invalid(reason, message).fact("target", target.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_is_reserved_but_for_the_views_of_jobs() {
        let reserved = Reserved {
            directories: vec!["/var/lib/ckptd".into(), "/run/ckptd".into()],
            free: Some("/run/ckptd/jobs".into()),
        };
        for ours in
            ["/var/lib/ckptd", "/var/lib/ckptd/quarantine", "/run/ckptd", "/run/ckptd/sessions/x", "/run/ckptd/jobs"]
        {
            let refused = check_path(Path::new(ours), Whose::Host, &reserved).unwrap_err();
            assert_eq!(refused.reason(), "TARGET_RESERVED", "{ours}");
            check_path(Path::new(ours), Whose::Process, &reserved).unwrap();
        }
        for free in ["/run/ckptd/jobs/j/checkpoint", "/var/lib/ckptd-other", "/var/lib", "/x"] {
            check_path(Path::new(free), Whose::Host, &reserved).unwrap();
        }
        for bad in ["x", "/a/../b", "/.."] {
            let refused = check_path(Path::new(bad), Whose::Process, &reserved).unwrap_err();
            assert_eq!(refused.reason(), "TARGET_NOT_ABSOLUTE", "{bad}");
        }
    }
}
