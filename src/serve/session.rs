//! One live FUSE connection: one served checkpoint, however many jobs see it.
//!
//! A session owns its connection's descriptor, the mount in the sessions directory, and the threads that answer the kernel. Jobs
//! get bind mounts of it ([`Session::original`]) and are no concern of it.
//!
//! Order of a start: file system made (detached), kept for a successor ([`keeping`](super::keeping)), INIT answered, read-ahead set,
//! threads running, and only then mounted where others can find it; a failure before that leaves nothing behind. Dropping a
//! session leaves the mount and the threads as they are: jobs must not notice the daemon leaving. [`Session::stop`] is the only
//! way that unmounts, and even then views that still stand are served, and kept, until they are gone.
//!
//! [`Session::adopt`] goes on with the session of a process that is gone: the ledger says what is open, the kernel is
//! asked to hand out again what that process had taken.
//!
//! **Without RESEND** (before Linux 6.9) nothing could answer those requests: a number is all that a successor could know of them, and whoever
//! made one would wait for ever, SIGKILL or not. There requests are taken through a *clone* of the connection
//! (`FUSE_DEV_IOC_CLONE`), which nobody holds but the process that serves: when it dies, the kernel ends what was taken through
//! it with ECONNABORTED. Reads through the page cache are then asked for again by whoever wants the page, unless it was that
//! page alone that was asked for; lookups, opens and `O_DIRECT` reads that were under way in that moment fail once. With RESEND there is no
//! clone, and none of it fails.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::backing::DeviceBackings;
use super::buffers::ReadBuffers;
use super::content::Content;
use super::features::{self, Features, Fresh};
use super::fuse::{self, Adapter, ReadWaits};
use super::handshake::{self, Taking};
use super::keeping::{Kept, Orphan, Outlive};
use super::ledger::Head;
use super::mount_calls::{self, Device};
use super::open_files::{Ledger, NoLedger, OpenFiles};
use super::view::View;
use crate::allocator;
use crate::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::manifest::Tree;
use crate::panics::Essential;

/// Threads that answer one session. More than the read-ahead of two readers keeps busy does not help.
pub const LOOPS_DEFAULT: usize = 3;

/// Read-ahead of a session in KiB: two requests of 1 MiB under way for a reader that goes straight on.
pub const READ_AHEAD_KIB_DEFAULT: u32 = 2048;

/// The kernel's bound on stacked file systems.
const STACK_DEPTH_MAX: u32 = 2;

/// What a session is started with.
#[derive(Clone)]
pub struct SessionConfig {
    /// Where it is mounted, in the sessions directory; made if missing.
    pub mountpoint: PathBuf,
    /// What `user.ckptd.checkpoint` says.
    pub checkpoint: String,
    /// Time of everything in it.
    pub created: SystemTime,
    /// Whether the kernel may read whole files itself, where it can.
    pub passthrough: bool,
    /// How deep file systems may stack then: [`features::stack_depth`] of the store.
    pub stack_depth: u32,
    /// Threads that answer.
    pub loops: usize,
    /// Read-ahead in KiB.
    pub read_ahead_kib: u32,
    /// Buffers that all sessions share.
    pub buffers: Arc<ReadBuffers>,
    /// Reads that wait, of all sessions.
    pub(super) waits: ReadWaits,
    /// Whether what a process had taken is to be asked for again by its successor, where the kernel can; else it ends with the process.
    pub resend: bool,
    /// Where it is kept beyond this process, if anywhere.
    pub outlive: Option<Outlive>,
}

impl SessionConfig {
    /// The defaults: passthrough where the kernel has it, no successor.
    pub fn new(mountpoint: impl Into<PathBuf>, checkpoint: impl Into<String>, buffers: Arc<ReadBuffers>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            checkpoint: checkpoint.into(),
            created: SystemTime::UNIX_EPOCH,
            passthrough: true,
            stack_depth: 1,
            loops: LOOPS_DEFAULT,
            read_ahead_kib: READ_AHEAD_KIB_DEFAULT,
            buffers,
            waits: fuse::no_waits(),
            resend: true,
            outlive: None,
        }
    }
}

/// What views of a session are made of.
#[derive(Debug)]
pub enum Original {
    /// A detached copy of its mount.
    Mount(OwnedFd),
    /// Its connection, to be mounted once more by path.
    Connection {
        /// Of the connection.
        device: Arc<OwnedFd>,
        /// The session's file system.
        number: Device,
    },
}

/// What became of a session that was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Nothing is mounted and no thread is left.
    Ended,
    /// Views or open files of it still stand; its threads answer them and end with the last.
    Serving,
}

/// A live session: see the module's page.
pub struct Session {
    mountpoint: PathBuf,
    device: Arc<OwnedFd>,
    /// `None` where an adopted session was unmounted already, and serves what is still open.
    mount: Option<OwnedFd>,
    number: Device,
    init: Vec<u8>,
    features: Features,
    passthrough: bool,
    shape: Digest,
    open: Arc<OpenFiles>,
    ended: Receiver<()>,
    kept: Option<Kept>,
}

impl Session {
    /// Mounts `tree`, whose bytes are in `content`, and serves it.
    ///
    /// # Errors
    /// `NO_FUSE`, `FUSE_NOT_PERMITTED`, `MOUNT_FAILED`, `FUSE_HANDSHAKE`; `SESSION_MOUNTED` where something is mounted at
    /// the place already.
    pub fn start(config: SessionConfig, tree: Arc<Tree>, content: Arc<dyn Content>) -> Result<Self> {
        allocator::set_up();
        let place = open_place(&config.mountpoint)?;
        let Fresh { device, mount, init } = features::make_filesystem(&config.mountpoint)?;
        let features = Features::from_init(&init).ok_or_else(features::unreadable_init)?;
        let passthrough = config.passthrough && features.passthrough;
        let number = mount
            .standing()
            .map_err(|error| Error::io("looking at the new mount for", &config.mountpoint, error))?
            .device;
        let head = Head {
            checkpoint: config.checkpoint.clone(),
            shape: tree.manifest().shape(),
            device: number,
            passthrough,
            stack_depth: config.stack_depth.clamp(1, STACK_DEPTH_MAX),
            inodes: u64::from(tree.len()) + 1,
            init,
        };
        let kept = config.outlive.as_ref().map(|outlive| outlive.keep(&head, &device)).transpose()?;
        let undo = |error| {
            kept.iter().for_each(Kept::let_go);
            error
        };
        if let Some(kept) = kept.as_ref().filter(|_| content.is_unverified()) {
            kept.ledger.doubt(true).map_err(undo)?;
        }
        let (adapter, open, device) = assemble(&config, tree, content, &head, features, device, kept.as_ref());
        let taking = Taking::of(config.resend && features.resend);
        let fuse = handshake::begin(adapter, &device, &head.init, config.loops.max(1), taking).map_err(undo)?;
        raise_read_ahead(number, config.read_ahead_kib);
        let ended = run(fuse, &device, kept.is_some()).map_err(undo)?;
        let mount =
            mount.show(&place).map_err(|error| undo(Error::io("mounting a session at", &config.mountpoint, error)))?;
        tracing::debug!(mountpoint = %config.mountpoint.display(), %number, passthrough, "a session is mounted");
        let (mountpoint, mount, init, shape) = (config.mountpoint, Some(mount), head.init, head.shape);
        Ok(Self { mountpoint, device, mount, number, init, features, passthrough, shape, open, ended, kept })
    }

    /// Goes on with `orphan`, which shows `tree`. Nothing that was mounted or open changes.
    ///
    /// # Errors
    /// `FUSE_HANDSHAKE`, `TREE_CHANGED`; no descriptors, no threads, a ledger that cannot be read. The orphan is as it was then.
    pub fn adopt(config: SessionConfig, tree: Arc<Tree>, content: Arc<dyn Content>, orphan: &Orphan) -> Result<Self> {
        allocator::set_up();
        let Orphan { device, head, kept } = orphan;
        let (head, kept) = (head.clone(), kept.clone());
        let device =
            device.try_clone().map_err(|error| Error::io("taking over the session at", &config.mountpoint, error))?;
        if tree.manifest().shape() != head.shape {
            let message = format!("the session of `{}` shows another tree than the checkpoint has", head.checkpoint);
            return Err(Error::wrong_state("TREE_CHANGED", message));
        }
        let features = Features::from_init(&head.init).ok_or_else(features::unreadable_init)?;
        let held = kept.ledger.held()?;
        // Of what was given out before it was verified the kernel may keep what turned out wrong, here or in an earlier process.
        let doubts = content.is_unverified() || kept.ledger.is_doubted();
        if content.is_unverified() {
            kept.ledger.doubt(true)?;
        }
        let (view, bytes) = (View::new(tree.clone(), content.clone(), ""), content.clone());
        let (adapter, open, device) = assemble(&config, tree, content, &head, features, device, Some(&kept));
        open.order.give_up();
        if doubts {
            open.doubt_pages();
        }
        open.restore(held, |inode| {
            let node = view.file(inode).map_err(|_| Error::internal("a ledger names an inode that is no file"))?;
            bytes.open(&node)
        });
        if kept.ledger.is_silent() {
            open.end_passthrough();
        }
        let taking = Taking::of(config.resend && features.resend);
        let fuse = handshake::resume(adapter, &device, &head.init, config.loops.max(1), taking)?;
        // From here on it takes requests.
        let _essential = Essential::new("taking a session over, which two must not serve");
        let ended = run(fuse, &device, true)?;
        // Also where this process takes through a clone: its predecessor may have been configured otherwise.
        if features.resend
            && let Err(error) = handshake::resend(&device)
        {
            tracing::warn!(checkpoint = head.checkpoint, %error, "the kernel did not hand out requests again");
        }
        let mount = mount_of(&config.mountpoint, head.device);
        let passthrough = config.passthrough && head.passthrough;
        let (mountpoint, number, init, shape) = (config.mountpoint, head.device, head.init, head.shape);
        tracing::debug!(mountpoint = %mountpoint.display(), %number, handles = open.handles(), "a session goes on");
        let kept = Some(kept);
        Ok(Self { mountpoint, device, mount, number, init, features, passthrough, shape, open, ended, kept })
    }

    /// Whether new views of it can be made.
    pub fn is_mounted(&self) -> bool {
        self.mount.is_some()
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Device number that `stat` shows of its files.
    pub fn number(&self) -> Device {
        self.number
    }

    /// Whether the kernel reads whole files itself.
    pub fn passthrough(&self) -> bool {
        self.passthrough
    }

    /// What the kernel offers.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The shape of its tree, and in which order it was first read: entries and fill units.
    pub fn read_order(&self) -> (Digest, Vec<(u32, u32)>) {
        (self.shape, self.open.order.steps())
    }

    /// Open handles of its files, of all jobs.
    pub fn open_handles(&self) -> u64 {
        self.open.handles()
    }

    /// The connection, for whoever keeps it while there is no daemon.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_ref().as_fd()
    }

    /// The kernel's INIT request, for a successor.
    pub fn init_request(&self) -> &[u8] {
        &self.init
    }

    /// Notes that what was given out while it arrived has turned out to be right: a successor may believe the kernel's pages.
    pub fn note_verified(&self) {
        if self.open.doubts_pages() {
            // Those that nobody has opened since an earlier process gave them out.
            return;
        }
        if let Some(Err(error)) = self.kept.as_ref().map(|kept| kept.ledger.doubt(false)) {
            tracing::debug!(error = %error.report(), "a successor will not believe the kernel's pages");
        }
    }

    /// What a view of it is made of.
    ///
    /// # Errors
    /// What the kernel says; out of mounts (`fs.mount-max`) mostly.
    pub fn original(&self) -> Result<Original> {
        let mount = self.mount.as_ref().ok_or_else(|| {
            Error::unavailable("SESSION_STOPPED", "the session was stopped meanwhile").remedy("attach again")
        })?;
        if mount_calls::by_descriptor() {
            let copied = mount_calls::clone_tree(mount);
            let failed = |error| Error::io("copying the mount of the session at", &self.mountpoint, error);
            return copied.map(Original::Mount).map_err(failed);
        }
        Ok(Original::Connection { device: self.device.clone(), number: self.number })
    }

    /// Unmounts, and waits up to `patience` for the threads to end. Views that stand elsewhere are not touched.
    ///
    /// # Errors
    /// What the kernel says of the unmount; the session goes on then.
    pub fn stop(self, patience: Duration) -> Result<Stopped> {
        let Self { mountpoint, mount, ended, kept, .. } = self;
        if let Some(mount) = mount {
            if stands_at(&mount, &mountpoint) {
                mount_calls::unmount_at(&mountpoint)
                    .map_err(|error| Error::io("unmounting the session at", &mountpoint, error))?;
            }
            drop(mount);
            // Something else may be in it or it may be gone; neither is worth a word.
            let _ = fs::remove_dir(&mountpoint);
        }
        match ended.recv_timeout(patience) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                kept.map(|kept| let_go_at_the_end(kept, ended)).transpose()?;
                Ok(Stopped::Serving)
            }
            Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                kept.iter().for_each(Kept::let_go);
                Ok(Stopped::Ended)
            }
        }
    }
}

/// A session that serves what is still open is kept for a successor until that is closed.
fn let_go_at_the_end(kept: Kept, ended: Receiver<()>) -> Result<()> {
    let wait = move || {
        let _ = ended.recv();
        kept.let_go();
    };
    thread::Builder::new().name("ckptd-last".to_owned()).spawn(wait).map(drop).map_err(|error| {
        Error::new(Kind::NoSpace, "TOO_MANY_THREADS", "waiting for the end of a session").because(error)
    })
}

/// The parts of a session that answer the kernel.
fn assemble(
    config: &SessionConfig,
    tree: Arc<Tree>,
    content: Arc<dyn Content>,
    head: &Head,
    features: Features,
    device: OwnedFd,
    kept: Option<&Kept>,
) -> (Adapter, Arc<OpenFiles>, Arc<OwnedFd>) {
    let device = Arc::new(device);
    let ledger: Arc<dyn Ledger> = match kept {
        Some(kept) => kept.ledger.clone(),
        None => Arc::new(NoLedger),
    };
    let passthrough = config.passthrough && head.passthrough;
    let open = Arc::new(OpenFiles::new(passthrough, Box::new(DeviceBackings(device.clone())), ledger));
    let adapter = Adapter {
        view: View::new(tree, content, config.checkpoint.clone()),
        open: open.clone(),
        buffers: config.buffers.clone(),
        waits: config.waits.clone(),
        features,
        passthrough_depth: head.passthrough.then_some(head.stack_depth),
        created: config.created,
    };
    (adapter, open, device)
}

/// What stands at `mountpoint`, if it is the file system `number`. Nobody answers for it yet, so nothing is asked of it.
fn mount_of(mountpoint: &Path, number: Device) -> Option<OwnedFd> {
    let root = open_path(mountpoint).ok()?;
    let standing = mount_calls::standing(&root).ok()?;
    (standing.is_mount_root && standing.device == number).then_some(root)
}

fn open_place(mountpoint: &Path) -> Result<OwnedFd> {
    fs::create_dir_all(mountpoint).map_err(|error| Error::io("making the directory", mountpoint, error))?;
    let place = open_path(mountpoint).map_err(|error| Error::io("opening the directory", mountpoint, error.into()))?;
    let standing =
        mount_calls::standing(&place).map_err(|error| Error::io("looking at the directory", mountpoint, error))?;
    if standing.is_mount_root {
        let message = format!("something is mounted at {} already", mountpoint.display());
        return Err(Error::wrong_state("SESSION_MOUNTED", message).remedy("remove stale mounts first"));
    }
    Ok(place)
}

fn open_path(path: &Path) -> nix::Result<OwnedFd> {
    use nix::fcntl::OFlag;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
}

fn stands_at(mount: &OwnedFd, mountpoint: &Path) -> bool {
    let there = open_path(mountpoint).ok().and_then(|place| mount_calls::standing(place).ok());
    let ours = mount_calls::standing(mount).ok();
    there.is_some() && there.map(|there| there.mount_id) == ours.map(|ours| ours.mount_id)
}

/// The answer to INIT can only lower the read-ahead; this raises it.
fn raise_read_ahead(number: Device, kib: u32) {
    let path = format!("/sys/class/bdi/{number}/read_ahead_kb");
    if let Err(error) = fs::write(&path, kib.to_string()) {
        tracing::warn!(path, %error, "the read-ahead of a session stays low; reads through the daemon are slower");
    }
}

/// Runs the loops; the receiver hears when all have ended.
///
/// Where they fail and the connection has not ended, nobody would answer its jobs any more. Somebody who holds it can have that done by another
/// process, and that is the one thing that is proven to be unnoticed: so this one ends.
fn run(fuse: fuser::Session<Adapter>, device: &Arc<OwnedFd>, is_held: bool) -> Result<Receiver<()>> {
    let (said, ended) = mpsc::channel();
    let device = Arc::clone(device);
    let work = move || {
        if let Err(error) = fuse.run() {
            let is_connected = is_connected(device.as_fd());
            tracing::error!(%error, is_connected, is_held, "the threads of a session have failed");
            if is_connected && is_held {
                std::process::abort();
            }
        }
        // Nobody waits where the session was dropped.
        let _ = said.send(());
    };
    thread::Builder::new().name("ckptd-session".to_owned()).spawn(work).map_err(|error| {
        Error::new(Kind::NoSpace, "TOO_MANY_THREADS", "starting the threads of a session")
            .remedy("raise the limit on tasks (TasksMax=)")
            .because(error)
    })?;
    Ok(ended)
}

/// Whether a connection is one still: the kernel says `POLLERR` of one that was ended (`fuse_dev_poll`).
fn is_connected(device: BorrowedFd<'_>) -> bool {
    let mut asked = [PollFd::new(device, PollFlags::POLLIN)];
    let polled = poll(&mut asked, PollTimeout::ZERO);
    polled.is_ok() && asked[0].revents().is_none_or(|said| !said.contains(PollFlags::POLLERR))
}
