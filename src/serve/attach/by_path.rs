//! Views that are made in their place by `mount(2)`, where mounts cannot be made by descriptor.
//!
//! The session's connection is mounted once more, in whatever namespace the target is in: nothing of ours can be bound there. So a view has no
//! number before it is seen. Until that is recorded it is known by its target and by being ours ([`SOURCE`]); a start that finds it so takes
//! it away and makes it again.
//!
//! Several views stand one after the other, which the job may see; if one fails, all are taken away.
//!
//! A mount goes onto the descriptor of its target, and is found and taken away from there: in its own namespace nobody can rename a directory that
//! something is mounted on.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::super::features;
use super::super::mount_calls::{self, Device, Proc, READ_ONLY_BY_PATH, Standing};
use super::super::session::Original;
use super::super::target::{self, Whose};
use crate::error::{Error, Result};
use crate::names::{EntryName, show_bytes};

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

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
/// `TARGET_*`, or what the kernel says. Nothing is mounted then.
pub(super) fn put(views: &Views, target: &Path, whose: Whose, proc: &OwnedFd) -> Result<Standing> {
    let directory = target::open(target, whose)?;
    let failed = |error: io::Error| Error::io("mounting at", target, error);
    nix::unistd::fchdir(proc).map_err(|errno| failed(errno.into()))?;
    mount_first(views, &directory).map_err(failed)?;
    let shown = root_on(&directory, target).and_then(|root| {
        complete(views, &root)?;
        mount_calls::standing(&root).map_err(failed)
    });
    shown.inspect_err(|_| {
        if let Err(error) = mount_calls::unmount_descriptor(&directory, Proc::WorkingDirectory) {
            tracing::error!(target = %target.display(), %error, "half a view could not be taken away again");
        }
    })
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

/// The root of what was mounted on `directory`, which is at `target`, a moment ago.
fn root_on(directory: &OwnedFd, target: &Path) -> Result<OwnedFd> {
    let mut above = OsString::from("../");
    above.push(target.file_name().unwrap_or_default());
    openat(directory, above.as_os_str(), DIRECTORY, Mode::empty())
        .map_err(|errno| Error::io("opening the view at", target, errno.into()))
}

/// Does what is left when the first mount stands at `root`.
fn complete(views: &Views, root: &OwnedFd) -> Result<()> {
    let Views::Several(views) = views else { return Ok(()) };
    for (name, connection) in views {
        super::make_directory(root, name)?;
        let failed = |error: io::Error| Error::io("mounting at", show_bytes(name.as_bytes()), error);
        let directory = openat(root, name.as_bytes(), DIRECTORY, Mode::empty());
        let directory = directory.map_err(|errno| failed(errno.into()))?;
        features::mount_connection(&connection.device, &directory, Proc::WorkingDirectory).map_err(failed)?;
    }
    // The file system itself, for those that see it by propagation, too.
    mount_calls::change_mount(root, Proc::WorkingDirectory, libc::MS_REMOUNT | READ_ONLY_BY_PATH)
        .map_err(|error| Error::io("closing", "a directory of views", error))
}
