//! The sessions directory, and what dead processes have left mounted.
//!
//! The directory is a private mount of itself: sessions mounted in it do not appear in the namespaces that share or
//! follow the host's mounts, where nobody would unmount them.
//!
//! A mount is stale when it is ours by name (`ckptd`, `fuse*`), is below the runtime directory, and its connection is dead: the kernel
//! says ENOTCONN at once. A connection that is alive but not served now (a successor is about to take it) gives no answer,
//! and is left alone.

use std::fs::{self, DirBuilder};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::mount_calls::{self, Device, Proc};
use super::mountinfo::MountLine;
use super::namespace;
use crate::error::{Error, Result};

/// How long a connection may take to say that it is dead. A dead one says so in microseconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// A mount that a dead process has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleMount {
    /// Where it is.
    pub target: PathBuf,
    /// Its file system.
    pub device: Device,
    mount_id: u64,
}

/// Makes `path` a directory for sessions: root's only, and private to this namespace. Nothing changes if it is one already.
///
/// # Errors
/// What the kernel says.
pub fn prepare_sessions_dir(path: &Path) -> Result<()> {
    let failed = |error| Error::io("preparing the sessions directory", path, error);
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    if !is_mount_root(path).map_err(failed)? {
        let here = open_directory(path).map_err(failed)?;
        bind_on_itself(&here).map_err(failed)?;
    }
    // Only now: being moved below a shared mount would make it shared again.
    open_directory(path).and_then(|root| make_private(&root)).map_err(failed)
}

fn bind_on_itself(here: &OwnedFd) -> std::io::Result<()> {
    if mount_calls::by_descriptor() {
        mount_calls::move_onto(mount_calls::clone_tree(here)?, here)
    } else {
        mount_calls::bind_on_itself(here, Proc::Here)
    }
}

fn make_private(root: &OwnedFd) -> std::io::Result<()> {
    if mount_calls::by_descriptor() {
        mount_calls::make_private(root, 0)
    } else {
        mount_calls::change_mount(root, Proc::Here, libc::MS_PRIVATE)
    }
}

/// Undoes [`prepare_sessions_dir`], once no session is in it; the directory stays.
///
/// # Errors
/// `SESSIONS_REMAIN`, or what the kernel says.
pub fn release_sessions_dir(path: &Path) -> Result<()> {
    let failed = |error| Error::io("giving up the sessions directory", path, error);
    let occupied = ours_below(path)?.len();
    if occupied > 0 {
        let message = format!("{occupied} sessions are still mounted in {}", path.display());
        return Err(Error::wrong_state("SESSIONS_REMAIN", message).remedy("stop them first"));
    }
    while path.exists() && is_mount_root(path).map_err(failed)? {
        mount_calls::unmount_at(path).map_err(failed)?;
    }
    Ok(())
}

/// Mounts of ours at or below `under` whose connection is dead, the last mounted first.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn stale_mounts(under: &Path) -> Result<Vec<StaleMount>> {
    stale_mounts_but(under, &[])
}

fn stale_mounts_but(under: &Path, spared: &[Device]) -> Result<Vec<StaleMount>> {
    let mut lines = ours_below(under)?;
    lines.retain(|line| !spared.contains(&line.device));
    Ok(lines.into_iter().rev().filter(is_dead).map(StaleMount::from).collect())
}

/// Unmounts the [`stale_mounts`] at or below `under` and says which they were.
///
/// # Errors
/// What the kernel says; the rest is left for the next time.
pub fn unmount_stale(under: &Path) -> Result<Vec<PathBuf>> {
    unmount_stale_but(under, &[])
}

/// [`unmount_stale`] without asking the file systems `spared`: they are alive and nobody serves them yet.
///
/// # Errors
/// As [`unmount_stale`].
pub fn unmount_stale_but(under: &Path, spared: &[Device]) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    // What a stale mount covers shows only when it is gone.
    loop {
        let stale = stale_mounts_but(under, spared)?;
        let before = removed.len();
        for mount in stale {
            if on_top(&mount.target, mount.mount_id).is_some() {
                mount_calls::unmount_at(&mount.target)
                    .map_err(|error| Error::io("unmounting the stale session at", &mount.target, error))?;
                tracing::info!(target = %mount.target.display(), "a stale mount was removed");
                removed.push(mount.target);
            }
        }
        if removed.len() == before {
            return Ok(removed);
        }
    }
}

impl From<MountLine> for StaleMount {
    fn from(line: MountLine) -> Self {
        Self { target: line.target, device: line.device, mount_id: line.mount_id }
    }
}

fn ours_below(under: &Path) -> Result<Vec<MountLine>> {
    // The list shows real paths.
    let under = fs::canonicalize(under).unwrap_or_else(|_| under.to_owned());
    let mut lines = namespace::mounts(&namespace::open_proc()?)?;
    lines.retain(|line| line.source == "ckptd" && line.kind.starts_with("fuse") && line.target.starts_with(&under));
    Ok(lines)
}

/// Asks on a thread of its own: a connection that is alive and unserved would keep us for ever.
fn is_dead(line: &MountLine) -> bool {
    let Some(root) = on_top(&line.target, line.mount_id) else { return false };
    let (say, answer) = mpsc::channel();
    let ask = move || {
        // Nobody listens any more if the answer is late.
        let _ = say.send(mount_calls::ask(&root));
    };
    if thread::Builder::new().name("ckptd-ask".to_owned()).spawn(ask).is_err() {
        return false;
    }
    matches!(answer.recv_timeout(ANSWER_WITHIN), Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOTCONN))
}

/// The root of mount `mount_id` if it is the one that `target` leads to.
fn on_top(target: &Path, mount_id: u64) -> Option<OwnedFd> {
    let root = open_directory(target).ok()?;
    (mount_calls::standing(&root).ok()?.mount_id == mount_id).then_some(root)
}

fn is_mount_root(path: &Path) -> std::io::Result<bool> {
    Ok(mount_calls::standing(open_directory(path)?)?.is_mount_root)
}

fn open_directory(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(Into::into)
}
