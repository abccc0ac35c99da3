//! What outlives the daemon, and how it comes back.
//!
//! Each session has one name, which is never used again, for two things: its connection's descriptor, which a
//! [`Keeper`] holds, and its [`ledger`](super::ledger) in the runtime directory. Order: the ledger is complete, then the
//! descriptor is kept, then the session is mounted where others can find it; the way back is the reverse, and only when nothing is
//! served by it any more. So whatever is mounted can be taken over, and a crash in between leaves a descriptor or a file
//! that [`inherit`] removes.
//!
//! A descriptor without its ledger, or with a damaged one, cannot be taken over: it is let go, and the kernel ends its
//! connection. One newer ledger stops everything before anything is touched.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ledger::{Head, LedgerFile};
use super::mount_calls::Device;
use super::strays::Strays;
use crate::error::{Error, Kind, Result};
use crate::units::now_unix_ms;

/// Begins the name of every session's descriptor.
const SESSION: &str = "session.";

/// Whoever holds descriptors while there is no daemon.
pub trait Keeper: Send + Sync {
    /// Hands a descriptor over under a name; it is held on return. Blocks.
    ///
    /// # Errors
    /// Nobody took it.
    fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()>;

    /// Has what is held under a name closed; done on return. Blocks.
    ///
    /// # Errors
    /// Nobody listened.
    fn forget(&self, name: &str) -> Result<()>;
}

/// A descriptor that was held.
#[derive(Debug)]
pub struct HandedOver {
    /// Its name.
    pub name: String,
    /// The descriptor.
    pub descriptor: OwnedFd,
}

/// Who holds descriptors, if anybody, and what was held when this process began.
#[derive(Default)]
pub struct Keeping {
    /// Who holds them; `None`: sessions live as long as the process.
    pub keeper: Option<Arc<dyn Keeper>>,
    /// What was held.
    pub handed_over: Vec<HandedOver>,
}

/// Where sessions are kept beyond the process.
#[derive(Clone)]
pub struct Outlive {
    /// Directory of ledgers.
    pub ledgers: PathBuf,
    /// Who holds descriptors.
    pub keeper: Arc<dyn Keeper>,
}

/// A session's descriptor with its ledger, kept.
#[derive(Clone)]
pub(super) struct Kept {
    name: String,
    keeper: Arc<dyn Keeper>,
    pub(super) ledger: Arc<LedgerFile>,
}

impl Outlive {
    /// Keeps a new session. Where nobody takes the descriptor, the session lives as long as the process.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub(super) fn keep(&self, head: &Head, device: &OwnedFd) -> Result<Kept> {
        let name = new_name();
        let ledger = Arc::new(LedgerFile::create(&self.ledgers.join(&name), head)?);
        if let Err(error) = self.keeper.keep(&name, device.as_fd()) {
            tracing::warn!(checkpoint = head.checkpoint, error = %error.report(), "a session will not outlive this process");
        }
        Ok(Kept { name, keeper: self.keeper.clone(), ledger })
    }
}

impl Kept {
    /// Lets go of a session that serves nothing any more.
    pub(super) fn let_go(&self) {
        let _ = fs::remove_file(self.ledger.path());
        if let Err(error) = self.keeper.forget(&self.name) {
            tracing::debug!(session = self.name, error = %error.report(), "a descriptor could not be given back");
        }
    }
}

/// A session whose daemon is gone, with all that is needed to go on with it.
pub struct Orphan {
    pub(super) device: OwnedFd,
    pub(super) head: Head,
    pub(super) kept: Kept,
}

impl Orphan {
    /// The checkpoint that it shows.
    pub fn checkpoint(&self) -> &str {
        &self.head.checkpoint
    }

    /// Its file system.
    pub fn number(&self) -> Device {
        self.head.device
    }

    /// Whether the kernel may read files for jobs that it was given through it, and goes on with that when it is let go.
    pub(super) fn may_have_given(&self) -> bool {
        self.kept.ledger.may_have_given()
    }

    /// Lets it go: the kernel ends its connection.
    pub fn let_go(self) {
        drop(self.device);
        self.kept.let_go();
    }
}

/// What was found of a predecessor.
#[derive(Default)]
pub(super) struct Inheritance {
    /// Sessions that can be taken over.
    pub(super) orphans: Vec<Orphan>,
    /// Descriptors that were let go.
    pub(super) dropped: usize,
    /// Ledgers without a session that were removed.
    pub(super) leftovers: usize,
}

/// Matches descriptors with ledgers, and clears away what has no counterpart.
///
/// # Errors
/// `LEDGER_TOO_NEW`, and what may pass: nothing has been touched then.
pub(super) fn inherit(handed: Vec<HandedOver>, outlive: &Outlive, strays: &Strays) -> Result<Inheritance> {
    let mut found = Inheritance::default();
    let mut useless = Vec::new();
    for HandedOver { name, descriptor } in handed.into_iter().filter(|one| one.name.starts_with(SESSION)) {
        let ledger = LedgerFile::open(&outlive.ledgers.join(&name));
        match ledger {
            Err(error) if error.reason() == "LEDGER_TOO_NEW" || error.kind().may_pass() => return Err(error),
            Ok((head, ledger)) if is_connected(&descriptor) => {
                let kept = Kept { name, keeper: outlive.keeper.clone(), ledger: Arc::new(ledger) };
                found.orphans.push(Orphan { device: descriptor, head, kept });
            }
            Ok(_) => useless.push((name, descriptor, ended())),
            Err(error) => useless.push((name, descriptor, error)),
        }
    }
    let wanted: HashSet<String> = found.orphans.iter().map(|orphan| orphan.kept.name.clone()).collect();
    let others = others(&outlive.ledgers, &wanted);
    if others.iter().any(|ledger| may_have_given(ledger)) {
        strays.note();
    }
    for (name, descriptor, why) in useless {
        tracing::warn!(session = name, error = %why.report(), "a session cannot be taken over");
        drop(descriptor);
        found.dropped += 1;
        if let Err(error) = outlive.keeper.forget(&name) {
            tracing::warn!(session = name, error = %error.report(), "a descriptor could not be given back");
        }
    }
    found.leftovers = others.iter().filter(|ledger| fs::remove_file(ledger).is_ok()).count();
    Ok(found)
}

/// At most 255 bytes without a colon: what systemd takes. Short, since those of all sessions are one variable of the environment of whoever takes
/// them over, which the kernel bounds at 128 KiB; whose session it is stands in its ledger.
fn new_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{SESSION}{:x}-{count:x}", now_unix_ms())
}

fn ended() -> Error {
    Error::new(Kind::WrongState, "SESSION_ENDED", "its connection has ended")
}

/// The kernel marks the descriptor of a dead connection with an error.
fn is_connected(device: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(device.as_fd(), PollFlags::empty())];
    match poll(&mut asked, PollTimeout::ZERO) {
        Ok(_) => !asked[0].revents().is_some_and(|found| found.contains(PollFlags::POLLERR)),
        // Nothing is known to have ended.
        Err(_) => true,
    }
}

fn others(ledgers: &Path, wanted: &HashSet<String>) -> Vec<PathBuf> {
    let entries = fs::read_dir(ledgers).into_iter().flatten().flatten();
    let others = entries.filter(|entry| entry.file_name().to_str().is_none_or(|name| !wanted.contains(name)));
    others.map(|entry| entry.path()).collect()
}

/// [`LedgerFile::may_have_given`] of a ledger that nobody goes on with. One without its final name was of a session that was not mounted yet.
fn may_have_given(ledger: &Path) -> bool {
    ledger.extension().is_none_or(|extension| extension != "new")
        && LedgerFile::open(ledger).map_or(true, |(_, ledger)| ledger.may_have_given())
}
