//! Whose state directory it is: one lock, one version.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::STATE_VERSION;
use crate::error::{Error, Kind, Result};

const VERSION_PREFIX: &str = "ckptd-state ";

pub(super) fn take_lock(root: &Path) -> Result<Flock<File>> {
    let path = root.join("lock");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| Error::io("opening", &path, error))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            // For people who look; a full disk must not keep the daemon from starting.
            let pid = format!("{}\n", std::process::id());
            if let Err(error) = lock.set_len(0).and_then(|()| lock.write_all_at(pid.as_bytes(), 0)) {
                tracing::warn!(%error, path = %path.display(), "the pid could not be noted");
            }
            Ok(lock)
        }
        Err((_, Errno::EWOULDBLOCK)) => {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            Err(Error::wrong_state(
                "STATE_DIR_IN_USE",
                format!("the state directory {} is held by another ckptd (pid {})", root.display(), holder.trim()),
            )
            .remedy("stop that daemon or give another --state-dir"))
        }
        Err((_, errno)) => Err(Error::io("locking", &path, errno.into())),
    }
}

pub(super) fn check_version(root: &Path) -> Result<()> {
    let path = root.join("version");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let version = text.trim().strip_prefix(VERSION_PREFIX).and_then(|number| number.parse::<u32>().ok());
            match version {
                Some(version) if version <= STATE_VERSION => Ok(()),
                Some(version) => Err(Error::wrong_state(
                    "STATE_DIR_TOO_NEW",
                    format!(
                        "the state directory {} is of version {version}, this ckptd knows {STATE_VERSION}",
                        root.display()
                    ),
                )
                .remedy("run the newer ckptd or give another --state-dir")),
                None => Err(foreign(root, "its file `version` is not ours")),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let others = fs::read_dir(root)
                .map_err(|error| Error::io("listing", root, error))?
                .flatten()
                .any(|entry| !["lock", "lost+found", "version.new"].iter().any(|own| entry.file_name() == *own));
            if others {
                return Err(foreign(root, "it is not empty and has no file `version`"));
            }
            write_durably(root, &path, format!("{VERSION_PREFIX}{STATE_VERSION}\n").as_bytes())
        }
        Err(error) => Err(Error::io("reading", &path, error)),
    }
}

fn foreign(root: &Path, why: &str) -> Error {
    Error::new(
        Kind::Invalid,
        "STATE_DIR_FOREIGN",
        format!("{} is not a state directory of ckptd: {why}", root.display()),
    )
    .remedy("give an empty directory as --state-dir")
}

/// Temp, write, sync, rename, sync parent.
fn write_durably(parent: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(parent)?.sync_all()
    };
    write().map_err(|error| Error::io("writing", path, error))
}
