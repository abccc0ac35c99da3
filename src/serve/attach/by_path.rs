//! Views that are made in their place by `mount(2)`, where mounts cannot be made by descriptor.
//!
//! The session's connection is mounted once more, in whatever namespace the target is in: nothing of ours can be bound there. So a view has no
//! number before it is seen. Until that is recorded it is known by its target and by being ours ([`SOURCE`]); a start that finds it so takes
//! it away and makes it again.
//!
//! Several views stand one after the other, which the job may see; if one fails, all are taken away.
//!
//! A mount goes onto the descriptor of its target. Its root can only be had by the path again: if another mount is found there by then, somebody
//! has moved the directories above, and it is an error (and the view is taken away by what the kernel lists).

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::super::features;
use super::super::mount_calls::{self, Device, Proc, READ_ONLY_BY_PATH, Standing};
use super::super::namespace;
use super::super::session::Original;
use super::super::target::{self, Whose};
use crate::error::{Error, Result};
use crate::names::EntryName;

/// What mounts of ours say that they are mounted from.
pub(super) const SOURCE: &str = "ckptd";

/// No file system has it.
pub(super) const UNKNOWN: Device = Device { major: 0, minor: 0 };

/// What is to be seen at the target.
pub(super) enum Views {
    One(Connection),
    Several(Vec<(EntryName, Connection)>),
}

/// A session's connection.
pub(super) struct Connection {
    device: Arc<OwnedFd>,
    number: Device,
}

impl Views {
    pub(super) fn of(views: super::Views) -> Result<Self> {
        match views {
            super::Views::One(original) => Connection::of(original).map(Self::One),
            super::Views::Several(views) => {
                let views = views.into_iter().map(|view| Ok((view.name, Connection::of(view.original)?)));
                views.collect::<Result<_>>().map(Self::Several)
            }
        }
    }

    /// The file system at the target.
    pub(super) const fn device(&self) -> Device {
        match self {
            Self::One(connection) => connection.number,
            Self::Several(_) => UNKNOWN,
        }
    }
}

impl Connection {
    fn of(original: Original) -> Result<Self> {
        match original {
            Original::Connection { device, number } => Ok(Self { device, number }),
            Original::Mount(_) => Err(Error::internal("a mount is to be made by path")),
        }
    }
}

/// Makes the view at `target`, on a thread that is where the target is and has a working directory of its own; `proc` is our `/proc`.
///
/// # Errors
/// `TARGET_*`, `TARGET_MOVED`, or what the kernel says. Nothing is mounted then.
pub(super) fn put(views: &Views, target: &Path, whose: Whose, proc: &OwnedFd) -> Result<Standing> {
    let directory = target::open(target, whose)?;
    let failed = |error: io::Error| Error::io("mounting at", target, error);
    nix::unistd::fchdir(proc).map_err(|errno| failed(errno.into()))?;
    let before: Vec<u64> = namespace::mounts(proc)?.into_iter().map(|line| line.mount_id).collect();
    mount_first(views, &directory).map_err(failed)?;
    let shown = root_at(target, whose, views.device()).and_then(|(root, standing)| {
        complete(views, &root).map_err(failed)?;
        Ok(standing)
    });
    shown.inspect_err(|_| take_back(views, target, proc, &before))
}

fn mount_first(views: &Views, directory: &OwnedFd) -> io::Result<()> {
    match views {
        Views::One(connection) => features::mount_connection(&connection.device, directory, Proc::WorkingDirectory),
        Views::Several(views) => {
            let options = super::directory_options(views.len());
            let options = options.map(|(key, value)| format!("{}={value}", key.to_string_lossy())).join(",");
            let flags = libc::MS_NOSUID | libc::MS_NODEV;
            mount_calls::mount_on(directory, Proc::WorkingDirectory, c"tmpfs", flags, &options)
        }
    }
}

/// The root of what was mounted at `target` a moment ago.
fn root_at(target: &Path, whose: Whose, device: Device) -> Result<(OwnedFd, Standing)> {
    let root = target::walk(target, whose)?;
    let standing = mount_calls::standing(&root).map_err(|error| Error::io("looking at", target, error))?;
    if !standing.is_mount_root || (device != UNKNOWN && standing.device != device) {
        let message = format!("the target {} was moved while a view was made there", target.display());
        return Err(Error::unavailable("TARGET_MOVED", message)
            .fact("target", target.display())
            .remedy("leave the directories above it alone, and attach again"));
    }
    Ok((root, standing))
}

/// Does what is left when the first mount stands at `root`.
fn complete(views: &Views, root: &OwnedFd) -> io::Result<()> {
    let private = |root: &OwnedFd| mount_calls::change_mount(root, Proc::WorkingDirectory, libc::MS_PRIVATE);
    private(root)?;
    let Views::Several(views) = views else { return Ok(()) };
    let open = |name: &EntryName| {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(root.as_fd(), name.as_bytes(), flags, Mode::empty())
    };
    for (name, connection) in views {
        super::make_directory(root, name).map_err(io::Error::other)?;
        features::mount_connection(&connection.device, &open(name)?, Proc::WorkingDirectory)?;
        private(&open(name)?)?;
    }
    let read_only = libc::MS_REMOUNT | libc::MS_BIND | READ_ONLY_BY_PATH;
    mount_calls::change_mount(root, Proc::WorkingDirectory, read_only)
}

/// Takes away what has come at `target` since it was looked at `before`.
fn take_back(views: &Views, target: &Path, proc: &OwnedFd, before: &[u64]) {
    let lines = namespace::mounts(proc).unwrap_or_default();
    let ours = lines.into_iter().rev().filter(|line| {
        let same = views.device() == UNKNOWN || line.device == views.device();
        same && line.source == SOURCE && line.target.ends_with(target.file_name().unwrap_or_default())
    });
    for line in ours.filter(|line| !before.contains(&line.mount_id)) {
        if let Err(error) = mount_calls::unmount_at(&line.target) {
            tracing::error!(target = %line.target.display(), %error, "half a view could not be taken away again");
        }
    }
}
