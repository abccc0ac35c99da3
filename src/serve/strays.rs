//! Files that the kernel may still read for jobs though no session tells of them any more.
//!
//! What the kernel was given for passthrough it goes on reading for whoever has it open, also when the session has ended that it was given through: one
//! that could not be taken over, say because its checkpoint was removed and its job released, or whose descriptor nobody held. Which blobs these
//! are cannot be told then. So no blob is punched any more until the host boots (law 7): it would cost a job zeros, and not punching costs space.
//!
//! That it is so is a file in the runtime directory, with the identity of the boot that it is true for, written before the last that tells of the
//! session is removed. It is replaced whole and never synced: it need not outlive the host. What cannot be read counts as written. Sessions that nobody
//! was to hold (no keeper) leave nothing that tells of them, and are not known here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::disk::boot_id;

/// Name of the file.
const NAME: &str = "strays";

/// Whether there may be any: see the module's page.
#[derive(Debug)]
pub(super) struct Strays {
    path: PathBuf,
    boot: Option<String>,
    may_be: AtomicBool,
}

impl Strays {
    /// What is known in a runtime directory.
    pub(super) fn of(runtime_dir: &Path) -> Self {
        Self::since(runtime_dir, boot_id().ok())
    }

    fn since(runtime_dir: &Path, boot: Option<String>) -> Self {
        let path = runtime_dir.join(NAME);
        let may_be = match (fs::read_to_string(&path), &boot) {
            (Ok(written), Some(boot)) => written.trim() == boot.trim(),
            (Err(error), _) => error.kind() != io::ErrorKind::NotFound,
            (Ok(_), None) => true,
        };
        Self { path, boot, may_be: AtomicBool::new(may_be) }
    }

    /// Whether there may be any.
    pub(super) fn may_be(&self) -> bool {
        self.may_be.load(Ordering::Relaxed)
    }

    /// Notes that there may be some from now on. Where that cannot be written this process knows, and no successor.
    pub(super) fn note(&self) {
        if self.may_be.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!(
            "jobs may read files of a session that is gone: nothing shared is given back from within files until the host boots"
        );
        let beside = self.path.with_extension("new");
        let written =
            fs::write(&beside, self.boot.as_deref().unwrap_or_default()).and_then(|()| fs::rename(&beside, &self.path));
        if let Err(error) = written {
            tracing::error!(path = %self.path.display(), %error, "the next start will not know of files that jobs read");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_holds_until_the_next_boot() {
        let directory = tempfile::tempdir().unwrap();
        let since = |boot: Option<&str>| Strays::since(directory.path(), boot.map(str::to_owned));
        let first = since(Some("one\n"));
        assert!(!first.may_be());
        first.note();
        assert!(first.may_be() && since(Some("one\n")).may_be());
        assert!(since(None).may_be(), "it cannot be told which boot this is");
        let next = since(Some("two\n"));
        assert!(!next.may_be());
        next.note();
        assert!(since(Some("two\n")).may_be() && !since(Some("one\n")).may_be());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
