//! Which inodes the kernel has open, and how.
//!
//! The kernel's rules: while any handle of an inode is open, every further open must be answered with the same mode,
//! and in passthrough mode with the same backing file; otherwise it fails with EIO. So an inode is in one of two modes from its first
//! open to its last release, and [`OpenFiles`] decides the mode at the first. A file that becomes whole while it is open
//! through the daemon stays so until the last handle is closed.
//!
//! Backing ids are raw numbers of the kernel's connection: they outlive this process. Before an answer uses one, or a
//! handle more or less, the [`Ledger`] has been told, so that a successor can go on: [`OpenFiles::restore`].
//! Where a count is in doubt it errs towards keeping: a backing file kept too long costs a descriptor, one dropped too early
//! costs EIO.
//!
//! Where the ledger has no room for an inode, the daemon answers its reads: then there is no number that a successor would have to know. That such
//! handles are about it must know all the same, or it would answer the next open of one with another mode; [`Ledger::note_silence`] needs no room. It
//! gives the kernel no file then that was not given it before.
//!
//! The `Arc<dyn OpenFile>` is held from first open to last release: that is the store's sign not to punch (law 7).

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::content::OpenFile;
use super::read_order::ReadOrder;
use crate::error::{Kind, Result};

/// How an inode is open, with the number of its handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The kernel reads the backing file itself.
    Passthrough {
        /// Number of the backing file in the kernel's connection.
        backing: u32,
        /// Open handles.
        handles: u32,
    },
    /// Reads come to the daemon.
    Daemon {
        /// Open handles.
        handles: u32,
    },
}

impl Held {
    fn handles(self) -> u32 {
        match self {
            Self::Passthrough { handles, .. } | Self::Daemon { handles } => handles,
        }
    }

    fn with_handles(self, handles: u32) -> Self {
        match self {
            Self::Passthrough { backing, .. } => Self::Passthrough { backing, handles },
            Self::Daemon { .. } => Self::Daemon { handles },
        }
    }

    fn mode(self) -> Mode {
        match self {
            Self::Passthrough { backing, .. } => Mode::Passthrough { backing },
            Self::Daemon { .. } => Mode::Daemon,
        }
    }
}

/// How one open is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// With this backing file.
    Passthrough {
        /// Number of the backing file in the kernel's connection.
        backing: u32,
    },
    /// In cached mode.
    Daemon,
}

/// The kernel's table of backing files.
pub trait Backings: Send + Sync {
    /// Gives the kernel a file; the number is valid until [`Backings::withdraw`].
    ///
    /// # Errors
    /// Unsupported where it will not take any file (no right, a store on a file system that is stacked too deep): it is not
    /// asked again. Others concern this file now.
    fn register(&self, file: BorrowedFd<'_>) -> Result<u32>;

    /// Takes the number back. Handles that are open with it are not disturbed.
    fn withdraw(&self, backing: u32);
}

/// Where the table is kept so that it outlives the process.
pub trait Ledger: Send + Sync {
    /// Notes how `inode` is open from now on; `None` is closed. Returns when a successor would see it; never waits on more than
    /// memory.
    ///
    /// # Errors
    /// There is no room. An open with passthrough is then answered without it.
    fn note(&self, inode: u64, held: Option<Held>) -> Result<()>;

    /// Notes that inodes may be open through the daemon that are noted as closed, for as long as the session lives. Takes no room.
    ///
    /// # Errors
    /// The open is then refused.
    fn note_silence(&self) -> Result<()>;
}

/// A ledger for sessions that nobody takes over.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLedger;

impl Ledger for NoLedger {
    fn note(&self, _: u64, _: Option<Held>) -> Result<()> {
        Ok(())
    }

    fn note_silence(&self) -> Result<()> {
        Ok(())
    }
}

struct OpenInode {
    /// `None` for reads of the daemon after [`OpenFiles::restore`], until it is needed.
    file: Option<Arc<dyn OpenFile>>,
    held: Held,
}

/// The open inodes of one session: see the module's page.
pub struct OpenFiles {
    passthrough: AtomicBool,
    backings: Box<dyn Backings>,
    ledger: Arc<dyn Ledger>,
    inodes: Mutex<HashMap<u64, OpenInode>>,
    /// Where pages that the kernel keeps may be wrong: whose were given up since.
    doubted: Mutex<Option<HashSet<u64>>>,
    /// What was read first.
    pub(super) order: ReadOrder,
}

impl OpenFiles {
    /// Nothing open; `passthrough` says whether the connection has it.
    pub fn new(passthrough: bool, backings: Box<dyn Backings>, ledger: Arc<dyn Ledger>) -> Self {
        Self {
            passthrough: AtomicBool::new(passthrough),
            backings,
            ledger,
            inodes: Mutex::default(),
            doubted: Mutex::default(),
            order: ReadOrder::default(),
        }
    }

    /// Gives the kernel no more files.
    pub fn end_passthrough(&self) {
        self.passthrough.store(false, Ordering::Relaxed);
    }

    /// Has no page believed that the kernel has now: some may be of bytes that turned out to be wrong. The next open of each inode gives its pages
    /// up; what is read then is right.
    pub fn doubt_pages(&self) {
        *self.doubted.lock().unwrap_or_else(PoisonError::into_inner) = Some(HashSet::new());
    }

    /// Whether some of them may still be there.
    pub fn doubts_pages(&self) -> bool {
        self.doubted.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether pages that the kernel keeps of `inode`, whose bytes are `file`, are right. It is asked at an open, which gives them up otherwise.
    pub fn believes_pages(&self, inode: u64, file: &dyn OpenFile) -> bool {
        let mut doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        !doubted.as_mut().is_some_and(|given_up| given_up.insert(inode)) && file.kept_pages_are_right()
    }

    /// What a predecessor had open, before the first request is answered; `open` gets the bytes of what the kernel reads itself, so that
    /// they are held from now on.
    pub fn restore(
        &self,
        held: impl IntoIterator<Item = (u64, Held)>,
        open: impl Fn(u64) -> Result<Arc<dyn OpenFile>>,
    ) {
        let restored = held.into_iter().map(|(inode, held)| {
            let file = match held {
                Held::Daemon { .. } => None,
                Held::Passthrough { .. } => open(inode)
                    .inspect_err(|error| {
                        tracing::warn!(inode, error = %error.report(), "an open file is the kernel's alone from now on");
                    })
                    .ok(),
            };
            (inode, OpenInode { file, held })
        });
        let restored: Vec<_> = restored.collect();
        self.lock().extend(restored);
    }

    /// Counts one more handle of `inode` and says how to answer; `open` gets the bytes if they are not open yet. It is called
    /// without a lock held, and may be called in vain.
    ///
    /// # Errors
    /// Those of `open` and of the ledger; nothing is counted then.
    pub fn open(&self, inode: u64, open: impl FnOnce() -> Result<Arc<dyn OpenFile>>) -> Result<Mode> {
        self.order.note(inode, 0);
        if let Some(mode) = self.open_again(inode)? {
            return Ok(mode);
        }
        let file = open()?;
        let mut inodes = self.lock();
        if let Some(other) = inodes.get_mut(&inode) {
            return self.one_more(inode, other);
        }
        let first = self.first_hold(file.as_ref());
        let held = self.note_or_be_silent(inode, first)?;
        inodes.insert(inode, OpenInode { file: Some(file), held });
        Ok(held.mode())
    }

    /// Counts one handle of `inode` less; the last one gives the bytes and the backing file back.
    pub fn release(&self, inode: u64) {
        let mut inodes = self.lock();
        let Some(open) = inodes.get_mut(&inode) else { return };
        open.held = open.held.with_handles(open.held.handles().saturating_sub(1));
        let last = open.held.handles() == 0;
        if let Err(error) = self.ledger.note(inode, (!last).then_some(open.held)) {
            tracing::warn!(inode, error = %error.report(), "a closed file could not be noted and stays counted for a successor");
        }
        if last && let Some(closed) = inodes.remove(&inode) {
            self.withdraw(closed.held);
        }
    }

    /// The bytes of an open inode; `open` gets them where a predecessor had opened it.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn file(&self, inode: u64, open: impl FnOnce() -> Result<Arc<dyn OpenFile>>) -> Result<Arc<dyn OpenFile>> {
        if let Some(file) = self.lock().get(&inode).and_then(|open| open.file.clone()) {
            return Ok(file);
        }
        let file = open()?;
        if let Some(open) = self.lock().get_mut(&inode) {
            open.file.get_or_insert_with(|| file.clone());
        }
        Ok(file)
    }

    /// Whether the next open of `inode`, of a whole file, would be answered with passthrough.
    pub fn offers_passthrough(&self, inode: u64) -> bool {
        match self.lock().get(&inode) {
            Some(open) => matches!(open.held, Held::Passthrough { .. }),
            None => self.passthrough.load(Ordering::Relaxed),
        }
    }

    /// Whether the connection has passthrough.
    pub fn has_passthrough(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }

    /// Open handles of all inodes.
    pub fn handles(&self) -> u64 {
        self.lock().values().map(|open| u64::from(open.held.handles())).sum()
    }

    fn open_again(&self, inode: u64) -> Result<Option<Mode>> {
        self.lock().get_mut(&inode).map(|open| self.one_more(inode, open)).transpose()
    }

    fn one_more(&self, inode: u64, open: &mut OpenInode) -> Result<Mode> {
        let held = open.held.with_handles(open.held.handles().saturating_add(1));
        match held {
            Held::Passthrough { .. } => self.ledger.note(inode, Some(held))?,
            Held::Daemon { .. } => drop(self.note_or_be_silent(inode, held)?),
        }
        open.held = held;
        Ok(held.mode())
    }

    /// Notes how an inode is open, or that it is open through the daemon without a note; which it is.
    fn note_or_be_silent(&self, inode: u64, held: Held) -> Result<Held> {
        let Err(error) = self.ledger.note(inode, Some(held)) else { return Ok(held) };
        self.withdraw(held);
        self.ledger.note_silence()?;
        tracing::warn!(inode, error = %error.report(), "the daemon answers reads of a file that cannot be noted");
        Ok(Held::Daemon { handles: held.handles() })
    }

    fn first_hold(&self, file: &dyn OpenFile) -> Held {
        let daemon = Held::Daemon { handles: 1 };
        if !self.passthrough.load(Ordering::Relaxed) {
            return daemon;
        }
        let Some(whole) = file.whole() else { return daemon };
        match self.backings.register(whole) {
            Ok(backing) => Held::Passthrough { backing, handles: 1 },
            Err(error) => {
                if error.kind() == Kind::Unsupported {
                    self.passthrough.store(false, Ordering::Relaxed);
                }
                tracing::warn!(error = %error.report(), "the daemon answers reads that the kernel could have");
                daemon
            }
        }
    }

    fn withdraw(&self, held: Held) {
        if let Held::Passthrough { backing, .. } = held {
            self.backings.withdraw(backing);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, OpenInode>> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::error::Error;

    /// Hands out 1, 2, 3 ... and remembers what is registered.
    #[derive(Default)]
    struct Table(Mutex<(u32, Vec<u32>)>, AtomicBool);

    impl Backings for Arc<Table> {
        fn register(&self, _: BorrowedFd<'_>) -> Result<u32> {
            if self.1.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Unsupported, "TOO_DEEP", "too deep"));
            }
            let mut table = self.0.lock().unwrap();
            table.0 += 1;
            let id = table.0;
            table.1.push(id);
            Ok(id)
        }

        fn withdraw(&self, backing: u32) {
            self.0.lock().unwrap().1.retain(|id| *id != backing);
        }
    }

    struct Bytes(Option<File>);

    impl OpenFile for Bytes {
        fn read_at(&self, _: &mut [u8], _: u64) -> Result<usize> {
            Ok(0)
        }

        fn whole(&self) -> Option<BorrowedFd<'_>> {
            self.0.as_ref().map(AsFd::as_fd)
        }
    }

    fn whole() -> Result<Arc<dyn OpenFile>> {
        Ok(Arc::new(Bytes(Some(File::open("/dev/null").unwrap()))))
    }

    fn compact() -> Result<Arc<dyn OpenFile>> {
        Ok(Arc::new(Bytes(None)))
    }

    fn table(passthrough: bool) -> (Arc<Table>, OpenFiles) {
        let backings = Arc::new(Table::default());
        let open = OpenFiles::new(passthrough, Box::new(backings.clone()), Arc::new(NoLedger));
        (backings, open)
    }

    #[test]
    fn one_backing_file_serves_all_handles_and_goes_with_the_last() {
        let (backings, open) = table(true);
        assert_eq!(open.open(7, whole).unwrap(), Mode::Passthrough { backing: 1 });
        assert_eq!(open.open(7, || panic!("open already")).unwrap(), Mode::Passthrough { backing: 1 });
        assert_eq!(open.handles(), 2);
        open.release(7);
        assert_eq!(backings.0.lock().unwrap().1, [1]);
        open.release(7);
        assert!(backings.0.lock().unwrap().1.is_empty());
        open.release(7);
        assert_eq!(open.open(7, whole).unwrap(), Mode::Passthrough { backing: 2 });
    }

    #[test]
    fn a_mode_lasts_until_the_last_handle_is_closed() {
        let (_, open) = table(true);
        assert_eq!(open.open(7, compact).unwrap(), Mode::Daemon);
        assert_eq!(open.open(7, whole).unwrap(), Mode::Daemon);
        assert!(!open.offers_passthrough(7));
        open.release(7);
        assert_eq!(open.open(7, whole).unwrap(), Mode::Daemon);
        open.release(7);
        open.release(7);
        assert!(open.offers_passthrough(7));
        assert_eq!(open.open(7, whole).unwrap(), Mode::Passthrough { backing: 1 });
    }

    #[test]
    fn without_passthrough_or_when_the_kernel_refuses_the_daemon_answers() {
        let (_, open) = table(false);
        assert_eq!(open.open(7, whole).unwrap(), Mode::Daemon);
        let (backings, open) = table(true);
        backings.1.store(true, Ordering::Relaxed);
        assert_eq!(open.open(7, whole).unwrap(), Mode::Daemon);
        assert!(!open.offers_passthrough(8));
    }

    #[test]
    fn what_a_predecessor_held_goes_on() {
        let (_, open) = table(true);
        open.restore([(7, Held::Passthrough { backing: 40, handles: 1 }), (8, Held::Daemon { handles: 1 })], |inode| {
            assert_eq!(inode, 7, "only what the kernel reads itself is opened at once");
            whole()
        });
        assert_eq!(open.open(7, || panic!("open already")).unwrap(), Mode::Passthrough { backing: 40 });
        assert_eq!(open.open(8, || panic!("open already")).unwrap(), Mode::Daemon);
        assert!(open.file(8, whole).unwrap().whole().is_some());
        assert_eq!(open.handles(), 4);
    }

    /// Has no room; whether it can say so.
    struct Full(bool);

    impl Ledger for Full {
        fn note(&self, _: u64, _: Option<Held>) -> Result<()> {
            Err(Error::internal("full"))
        }

        fn note_silence(&self) -> Result<()> {
            if self.0 { Ok(()) } else { Err(Error::internal("not even that")) }
        }
    }

    #[test]
    fn what_a_ledger_has_no_room_for_is_read_by_the_daemon() {
        let backings = Arc::new(Table::default());
        let open = OpenFiles::new(true, Box::new(backings.clone()), Arc::new(Full(true)));
        assert_eq!(open.open(7, whole).unwrap(), Mode::Daemon);
        assert!(backings.0.lock().unwrap().1.is_empty());
        assert_eq!(open.open(7, || panic!("open already")).unwrap(), Mode::Daemon);
        assert_eq!(open.handles(), 2);
    }

    #[test]
    fn a_ledger_that_cannot_say_anything_refuses_the_open_and_nothing_is_counted() {
        let backings = Arc::new(Table::default());
        let open = OpenFiles::new(true, Box::new(backings.clone()), Arc::new(Full(false)));
        assert!(open.open(7, whole).is_err());
        assert_eq!(open.handles(), 0);
        assert!(backings.0.lock().unwrap().1.is_empty());
    }

    #[test]
    fn whoever_follows_silence_gives_the_kernel_no_more_than_it_has() {
        let (_, open) = table(true);
        open.restore([(7, Held::Passthrough { backing: 40, handles: 1 })], |_| whole());
        open.end_passthrough();
        assert_eq!(open.open(7, || panic!("open already")).unwrap(), Mode::Passthrough { backing: 40 });
        assert_eq!(open.open(8, whole).unwrap(), Mode::Daemon);
    }
}
