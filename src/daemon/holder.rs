//! Whoever outlives the daemon and holds its sessions' descriptors: systemd, or [`keeper`](super::keeper). One protocol for both.
//!
//! [`take_over`] runs before there is a second thread: it takes what the process was started with (`LISTEN_FDS` with their
//! names, `NOTIFY_SOCKET`, the watchdog's period) and clears those variables, so that no child of ours believes that they are its.
//! From then on a [`Holder`] says what the daemon does (`READY=1`, `STOPPING=1`, `STATUS=`), proves that it lives (`WATCHDOG=1`),
//! and hands descriptors over (`FDSTORE=1`, with `FDPOLL=0`, without which systemd drops a descriptor that reports an error).
//!
//! A hand-over is followed by a barrier: the holder closes a pipe of ours once it has dealt with everything before it. So what
//! [`Keeper::keep`] returns for is held, whatever becomes of this process next.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::keeper::STEADY;
use super::notify;
use super::secrets::Secrets;
use super::starts::Starts;
use crate::catalog::{CATALOG_STOPPED, Catalog};
use crate::error::{Error, Result};
use crate::serve::{HandedOver, Keeper, Keeping};

/// First descriptor that is passed: `SD_LISTEN_FDS_START`.
pub(super) const FIRST: RawFd = 3;

/// How often `ckptd keeper` has restarted the daemon.
pub(super) const RESTARTS: &str = "CKPTD_KEEPER_RESTARTS";

/// How the predecessor ended, where `ckptd keeper` restarted the daemon.
pub(super) const ENDED: &str = "CKPTD_KEEPER_ENDED";

/// Variables of the protocol: none of them is for children.
const VARIABLES: &[&str] = &[
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "FDSTORE",
    RESTARTS,
    ENDED,
];

/// How long a holder may take to deal with what it was told. It does nothing else.
const BARRIER_MS: u16 = 5000;

/// Half periods of the watchdog that a write may take: a disk that is written to at full speed holds up a sync for long, and a successor would
/// wait for the same disk.
const WRITE_PERIODS: u32 = 8;

/// What the process was started with.
#[derive(Default)]
pub struct Inherited {
    /// Who holds descriptors.
    pub holder: Holder,
    /// What was held.
    pub handed_over: Vec<HandedOver>,
    /// A listening socket, where there is one already.
    pub listener: Option<UnixListener>,
}

impl Inherited {
    /// Counts this start where systemd holds descriptors, which the keeper does by itself, and waits if those before it failed. Before anything
    /// that may fail.
    pub fn count_start(&mut self) {
        let holder = &mut self.holder;
        // Of several, the first is where the sockets are.
        let given = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
        let directory = given.split(':').next().filter(|directory| !directory.is_empty());
        if holder.is_keeper || holder.notifier.is_none() {
            return;
        }
        let Some(directory) = directory else { return };
        let starts = Starts::count(Path::new(directory), |why| holder.say(&format!("STATUS={why}")));
        holder.restarts = starts.restarts();
        holder.ended = starts.ended().map(str::to_owned);
        holder.starts = Some(Arc::new(starts));
    }

    /// The part that concerns secrets of requests.
    pub(super) fn secrets(&mut self) -> Secrets {
        Secrets::of(self.holder.keeper(), &mut self.handed_over)
    }

    /// The part that concerns sessions.
    pub(super) fn keeping(&mut self) -> Keeping {
        Keeping { keeper: self.holder.keeper(), handed_over: std::mem::take(&mut self.handed_over) }
    }
}

/// Who holds descriptors, and what he has said; cheap to clone.
#[derive(Clone, Default)]
pub struct Holder {
    notifier: Option<Arc<Notifier>>,
    watchdog: Option<Duration>,
    is_keeper: bool,
    restarts: u32,
    ended: Option<String>,
    starts: Option<Arc<Starts>>,
}

struct Notifier(UnixDatagram);

/// Takes what the process was started with, and clears the variables that said so.
///
/// # Safety
/// No other thread runs.
pub unsafe fn take_over() -> Inherited {
    let read = |name: &str| std::env::var(name).ok();
    let number = |name: &str| read(name).and_then(|text| text.parse::<u64>().ok());
    let ours = |name: &str| read(name).is_none_or(|pid| pid == std::process::id().to_string());
    let descriptors = if read("LISTEN_PID").is_some() && ours("LISTEN_PID") {
        // SAFETY: we were started with these descriptors, this is the only place that takes them, and there is no other thread.
        unsafe { passed(number("LISTEN_FDS").unwrap_or(0), &read("LISTEN_FDNAMES").unwrap_or_default()) }
    } else {
        Vec::new()
    };
    let holder = Holder {
        notifier: std::env::var_os("NOTIFY_SOCKET").and_then(|socket| connect(&socket)),
        watchdog: number("WATCHDOG_USEC").filter(|_| ours("WATCHDOG_PID")).map(Duration::from_micros),
        is_keeper: read(RESTARTS).is_some(),
        restarts: number(RESTARTS).and_then(|count| u32::try_from(count).ok()).unwrap_or(0),
        ended: read(ENDED),
        starts: None,
    };
    for variable in VARIABLES {
        // SAFETY: no other thread reads the environment.
        unsafe { std::env::remove_var(variable) };
    }
    let (mut handed_over, mut listener) = (Vec::new(), None);
    for one in descriptors {
        if getsockopt(&one.descriptor, sockopt::AcceptConn).unwrap_or(false) {
            listener = Some(UnixListener::from(one.descriptor));
        } else {
            handed_over.push(one);
        }
    }
    Inherited { holder, handed_over, listener }
}

/// # Safety
/// The descriptors belong to nobody else in this process.
unsafe fn passed(count: u64, names: &str) -> Vec<HandedOver> {
    let count = RawFd::try_from(count).unwrap_or(0);
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let take = |(number, name): (RawFd, String)| {
        // SAFETY: the caller says that it is ours; a number that is not open is refused by the next line and forgotten.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
        // SAFETY: it is open and ours.
        Some(HandedOver { name, descriptor: unsafe { OwnedFd::from_raw_fd(number) } })
    };
    (FIRST..FIRST.saturating_add(count)).zip(names).filter_map(take).collect()
}

fn connect(socket: &std::ffi::OsStr) -> Option<Arc<Notifier>> {
    let connected = notify::address(socket).and_then(|address| {
        let datagrams = UnixDatagram::unbound()?;
        datagrams.connect_addr(&address)?;
        datagrams.shutdown(Shutdown::Read)?;
        Ok(datagrams)
    });
    match connected {
        Ok(datagrams) => Some(Arc::new(Notifier(datagrams))),
        Err(error) => {
            eprintln!("ckptd: nobody listens on NOTIFY_SOCKET ({error}); mounts will not outlive this process");
            None
        }
    }
}

impl Holder {
    fn keeper(&self) -> Option<Arc<dyn Keeper>> {
        self.notifier.clone().map(|notifier| notifier as Arc<dyn Keeper>)
    }

    /// `systemd`, `keeper`, or `none`.
    pub fn name(&self) -> &'static str {
        match (&self.notifier, self.is_keeper) {
            (None, _) => "none",
            (Some(_), true) => "keeper",
            (Some(_), false) => "systemd",
        }
    }

    /// How often the keeper, or systemd since the host's boot, has started the daemon again; 0 where there is neither.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// How the predecessor ended, where that is known.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Says that the daemon answers.
    pub fn ready(&self) {
        self.say("READY=1\nSTATUS=serving");
    }

    /// Says that the daemon is about to end.
    pub fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=stopping");
        if let Some(starts) = &self.starts {
            starts.stopped();
        }
    }

    /// Notes, when the daemon has answered for a while, that its start did not fail; never resolves.
    pub async fn settle(&self) {
        tokio::time::sleep(STEADY).await;
        if let Some(starts) = &self.starts {
            starts.steady();
        }
        std::future::pending::<()>().await;
    }

    /// Proves, as long as it is polled, that the runtime runs and the catalog answers who reads and who writes; a proof that is missing ends
    /// the daemon.
    pub async fn watch(self, catalog: Catalog) {
        let Some(period) = self.watchdog.map(|period| period / 2) else { return std::future::pending().await };
        let writes_hang = AtomicBool::new(false);
        let writing = async {
            loop {
                let outcome = tokio::time::timeout(period * WRITE_PERIODS, catalog.write(|_| Ok(()))).await;
                // An error of SQLite is an answer: a full disk is no reason to end.
                let hangs = match outcome {
                    Ok(answer) => answer.is_err_and(|error| error.reason() == CATALOG_STOPPED),
                    Err(_) => true,
                };
                writes_hang.store(hangs, Ordering::Relaxed);
                tokio::time::sleep(period).await;
            }
        };
        let reading = async {
            loop {
                tracing::trace!("a sign of life");
                match tokio::time::timeout(period, catalog.read(|_| Ok(()))).await {
                    _ if writes_hang.load(Ordering::Relaxed) => tracing::error!("the catalog takes no writes"),
                    Ok(Ok(())) => self.say("WATCHDOG=1"),
                    Ok(Err(error)) => tracing::error!(error = %error.report(), "the catalog does not answer"),
                    Err(_) => tracing::error!("the catalog does not answer"),
                }
                tokio::time::sleep(period).await;
            }
        };
        tokio::join!(writing, reading);
    }

    fn say(&self, text: &str) {
        if let Some(notifier) = &self.notifier
            && let Err(error) = notify::send(&notifier.0, text, &[])
        {
            tracing::warn!(%error, "the holder of descriptors does not listen any more");
        }
    }
}

impl Notifier {
    fn tell(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        notify::send(&self.0, text, descriptors)?;
        let (held, end) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        notify::send(&self.0, "BARRIER=1", &[end.as_fd()])?;
        drop(end);
        let mut asked = [PollFd::new(held.as_fd(), PollFlags::empty())];
        match poll(&mut asked, PollTimeout::from(BARRIER_MS))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

impl Keeper for Notifier {
    fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        debug_assert!(descriptor.as_raw_fd() >= 0 && name.len() <= 255 && !name.contains(':'));
        self.tell(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), &[descriptor]).map_err(|error| unheard(name, error))
    }

    fn forget(&self, name: &str) -> Result<()> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]).map_err(|error| unheard(name, error))
    }
}

fn unheard(name: &str, error: io::Error) -> Error {
    Error::unavailable("HOLDER_GONE", format!("telling the holder of descriptors about {name}"))
        .remedy("restart ckptd under systemd or `ckptd keeper` when no job needs its mounts")
        .because(error)
}
