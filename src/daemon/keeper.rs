//! `ckptd keeper`: a small parent that holds the mounts' descriptors where there is no systemd.
//!
//! One thread, no state on disk. It starts `ckptd serve` with its own arguments, by the path that it was started by itself (so that
//! a newer binary put there is used), speaks systemd's side of the protocol of [`holder`](super::holder), and starts the
//! daemon again whenever it ends, with every descriptor that it holds. Messages are believed of its own child only, and are all dealt
//! with before a child's end is: what was handed over last is passed on.
//!
//! **A daemon that ends at once** is started again after a pause that grows to [`PAUSE_MAX`]; one that was ready for [`STEADY`] starts
//! anew without one. Its successor is told how often and why, and records an event. A first start that fails by itself
//! (a wrong configuration) ends the keeper with the same code.
//!
//! **Signals**: SIGHUP restarts the daemon (an upgrade); SIGTERM and SIGINT are passed on, and the keeper ends after it. With it
//! go the descriptors: files that the kernel reads itself go on while they are open, everything else of the mounts is dead until
//! the next start, which mounts anew. The watchdog kills a daemon that gives no sign of life.
//!
//! **Memory**: it and its daemon are the last to be killed for it, as under systemd (`OOMScoreAdjust=`): every job's reads wait for them, and they hold little. Should the
//! kernel do it all the same, that is a SIGKILL like any other.
//!
//! A keeper that is killed does not take the daemon with it: jobs need the mounts more than the daemon needs a keeper. The next keeper
//! ends at once, like its daemon, for the state directory is in use: end the orphan first, with SIGTERM, when its jobs are done.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::holder::{ENDED, FIRST, RESTARTS};
use super::notify::{self, Message};
use crate::error::{Error, Result};

/// A daemon that was ready for so long has not failed at its start.
pub(super) const STEADY: Duration = Duration::from_secs(1);

/// Pause before the third start in a row; each further one is twice as long.
const PAUSE_FIRST: Duration = Duration::from_millis(200);

/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Silence of a daemon that was ready after which it is killed.
const WATCHDOG: Duration = Duration::from_secs(30);

/// Another period, in milliseconds: for tests.
const WATCHDOG_VARIABLE: &str = "CKPTD_KEEPER_WATCHDOG_MS";

/// Descriptors that are held at most: far more than sessions can be.
const DESCRIPTORS: usize = 1 << 16;

/// Where a program says how readily it is killed for memory (`proc_pid_oom_score_adj(5)`), and what the unit says too.
const OOM_SCORE: (&str, &str) = ("/proc/self/oom_score_adj", "-900");

/// Exit code for a daemon that ended itself with SIGABRT, as shells have it.
const ABORTED: u8 = 134;

/// Exit code of a child that could not begin.
const NOT_BEGUN: i32 = 127;

/// Runs until SIGTERM or SIGINT; returns the daemon's exit code.
///
/// # Errors
/// The keeper cannot begin.
pub fn run(arguments: Vec<OsString>) -> Result<u8> {
    let mut keeper = Keeping::begin(arguments)
        .map_err(|error| Error::unavailable("KEEPER_FAILED", "beginning to keep descriptors").because(error))?;
    keeper.run().map_err(|error| Error::unavailable("KEEPER_FAILED", "waiting for the daemon").because(error))
}

struct Keeping {
    program: PathBuf,
    arguments: Vec<OsString>,
    watchdog: Duration,
    socket: UnixDatagram,
    address: String,
    signals: SignalFd,
    held: VecDeque<(String, OwnedFd)>,
    child: Option<Child>,
    start_at: Instant,
    /// Starts in a row that ended at once.
    in_a_row: u32,
    restarts: u32,
    ended: Option<String>,
    was_ready: bool,
    stopping: bool,
}

struct Child {
    pid: Pid,
    ready: Option<Instant>,
    sign_of_life: Instant,
    hung: bool,
    restarting: bool,
}

impl Keeping {
    fn begin(arguments: Vec<OsString>) -> io::Result<Self> {
        super::raise_descriptor_limit();
        // The daemon inherits it.
        if let Err(error) = std::fs::write(OOM_SCORE.0, OOM_SCORE.1) {
            tracing::warn!(%error, "jobs' memory may cost the daemon its life: its oom_score_adj stays as it is");
        }
        let name = format!("ckptd-keeper-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        setsockopt(&socket, sockopt::PassCred, &true)?;
        let mut mask = SigSet::empty();
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|one| mask.add(one));
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let watchdog = std::env::var(WATCHDOG_VARIABLE).ok().and_then(|text| text.parse().ok());
        Ok(Self {
            program: own_path()?,
            arguments,
            watchdog: watchdog.map_or(WATCHDOG, Duration::from_millis),
            socket,
            address: format!("@{name}"),
            signals,
            held: VecDeque::new(),
            child: None,
            start_at: Instant::now(),
            in_a_row: 0,
            restarts: 0,
            ended: None,
            was_ready: false,
            stopping: false,
        })
    }

    fn run(&mut self) -> io::Result<u8> {
        loop {
            if self.child.is_none() && Instant::now() >= self.start_at {
                self.start()?;
            }
            let until = match &self.child {
                Some(child) => child.sign_of_life + self.watchdog,
                None => self.start_at,
            };
            self.wait(until)?;
            while let Some(message) = notify::receive(&self.socket)? {
                self.hear(message);
            }
            while let Some(signal) = self.signals.read_signal()? {
                self.obey(signal.ssi_signo);
            }
            if let Some(code) = self.reap()? {
                return Ok(code);
            }
            self.check_life();
        }
    }

    fn wait(&self, until: Instant) -> io::Result<()> {
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut asked =
            [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, left) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn hear(&mut self, message: Message) {
        let Some(child) = self.child.as_mut().filter(|child| child.pid.as_raw() == message.sender) else { return };
        if message.get("READY") == Some("1") {
            child.ready.get_or_insert_with(Instant::now);
            self.was_ready = true;
        }
        child.sign_of_life = Instant::now();
        let name = message.get("FDNAME").unwrap_or("stored").to_owned();
        if message.get("FDSTOREREMOVE") == Some("1") {
            self.held.retain(|(held, _)| *held != name);
        } else if message.get("FDSTORE") == Some("1") {
            self.held.extend(message.descriptors.into_iter().map(|descriptor| (name.clone(), descriptor)));
            if self.held.len() > DESCRIPTORS {
                tracing::error!("too many descriptors are held; the last are dropped");
                self.held.truncate(DESCRIPTORS);
            }
        }
        // What came with BARRIER=1 is closed here: that is the answer.
    }

    fn obey(&mut self, signal: u32) {
        let signal = i32::try_from(signal).ok().and_then(|number| Signal::try_from(number).ok());
        match signal {
            Some(Signal::SIGTERM | Signal::SIGINT) => self.stopping = true,
            Some(Signal::SIGHUP) => {
                if let Some(child) = &mut self.child {
                    child.restarting = true;
                }
            }
            _ => return,
        }
        if let Some(child) = &self.child {
            let _ = kill(child.pid, Signal::SIGTERM);
        }
    }

    /// Deals with the child's end; the code to end with, if that is due.
    fn reap(&mut self) -> io::Result<Option<u8>> {
        let Some(child) = &self.child else { return Ok(self.stopping.then_some(0)) };
        let status = waitpid(child.pid, Some(WaitPidFlag::WNOHANG))?;
        let (code, ended) = match status {
            WaitStatus::Exited(_, code) => (u8::try_from(code).ok(), format!("it ended with code {code}")),
            // By itself, for a bug: as much an end of its own as a code.
            WaitStatus::Signaled(_, Signal::SIGABRT, _) => (Some(ABORTED), "it was killed by SIGABRT".to_owned()),
            WaitStatus::Signaled(_, signal, _) => (None, format!("it was killed by {signal}")),
            _ => return Ok(None),
        };
        // What it said last came before its end was known, but maybe after the socket was looked at.
        while let Some(message) = notify::receive(&self.socket)? {
            self.hear(message);
        }
        let Some(child) = self.child.take() else { return Ok(None) };
        if self.stopping || (!self.was_ready && code.is_some_and(|code| code != 0)) {
            return Ok(Some(code.unwrap_or(1)));
        }
        let steady = child.restarting || child.ready.is_some_and(|since| since.elapsed() >= STEADY);
        self.in_a_row = if steady { 0 } else { self.in_a_row.saturating_add(1) };
        self.restarts = self.restarts.saturating_add(1);
        let ended = match (child.hung, child.restarting) {
            (true, _) => format!("it gave no sign of life for {:?} and was killed", self.watchdog),
            (false, true) => "a restart was asked for".to_owned(),
            (false, false) => ended,
        };
        let pause = pause(self.in_a_row);
        self.start_at = Instant::now() + pause;
        let ended = if pause.is_zero() {
            ended
        } else {
            format!("{ended}, {} times in a row at its start, and was started again after {pause:?}", self.in_a_row)
        };
        tracing::warn!(pid = child.pid.as_raw(), restarts = self.restarts, "the daemon ended: {ended}");
        self.ended = Some(ended);
        Ok(None)
    }

    fn check_life(&mut self) {
        let watchdog = self.watchdog;
        let silent =
            |child: &&mut Child| child.ready.is_some() && child.sign_of_life.elapsed() > watchdog && !child.hung;
        if let Some(child) = self.child.as_mut().filter(silent) {
            child.hung = true;
            let _ = kill(child.pid, Signal::SIGKILL);
        }
        if let Some(child) = self.child.as_mut().filter(|child| child.ready.is_none() || child.hung) {
            // A start may take as long as it takes; the pipe is not polled in vain meanwhile.
            child.sign_of_life = Instant::now();
        }
    }

    fn start(&mut self) -> io::Result<()> {
        // SAFETY: this process has one thread, so the child may do whatever it likes before it execs.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                let sign_of_life = Instant::now();
                self.child = Some(Child { pid: child, ready: None, sign_of_life, hung: false, restarting: false });
                Ok(())
            }
            ForkResult::Child => {
                let error = self.become_daemon();
                eprintln!("ckptd keeper: starting {}: {error}", self.program.display());
                // SAFETY: ends the child without running what the parent will run at its end.
                unsafe { libc::_exit(NOT_BEGUN) }
            }
        }
    }

    /// In the child: everything held from number 3 on, the rest closed by exec. Returns only when it failed.
    fn become_daemon(&self) -> io::Error {
        if let Err(errno) = SigSet::all().thread_unblock() {
            return errno.into();
        }
        let names: Vec<_> = self.held.iter().map(|(name, _)| name.as_str()).collect();
        let passed = match self.pass() {
            Ok(passed) => passed,
            Err(error) => return error,
        };
        let mut command = Command::new(&self.program);
        command
            .arg("serve")
            .args(&self.arguments)
            .env_remove(WATCHDOG_VARIABLE)
            .env("NOTIFY_SOCKET", &self.address)
            .env("WATCHDOG_USEC", self.watchdog.as_micros().to_string())
            .env("WATCHDOG_PID", std::process::id().to_string())
            .env("LISTEN_PID", std::process::id().to_string())
            .env("LISTEN_FDS", passed.to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .env(RESTARTS, self.restarts.to_string());
        if let Some(ended) = &self.ended {
            command.env(ENDED, ended);
        }
        command.exec()
    }

    /// Places what is held at the numbers where the protocol wants it.
    fn pass(&self) -> io::Result<usize> {
        let count = self.held.len();
        let above = FIRST.saturating_add(RawFd::try_from(count).map_err(io::Error::other)?);
        let aside = self.held.iter().map(|(_, descriptor)| {
            let number = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(above))?;
            // SAFETY: the kernel has just returned this descriptor and nothing else knows it.
            Ok(unsafe { OwnedFd::from_raw_fd(number) })
        });
        let aside = aside.collect::<io::Result<Vec<_>>>()?;
        for (number, descriptor) in (FIRST..).zip(&aside) {
            // SAFETY: whatever had this number is of no use to a process that is about to exec.
            if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(count)
    }
}

/// How long a start waits after `in_a_row` that failed.
pub(super) fn pause(in_a_row: u32) -> Duration {
    match in_a_row {
        0 | 1 => Duration::ZERO,
        more => PAUSE_FIRST.saturating_mul(1 << (more - 2).min(10)).min(PAUSE_MAX),
    }
}

/// The path that we were started by: what is there at the next start may be newer.
fn own_path() -> io::Result<PathBuf> {
    match std::env::args_os().next().map(PathBuf::from) {
        Some(path) if path.components().count() > 1 => std::path::absolute(path),
        // Found by `PATH`, and will be again.
        Some(path) if path.components().count() == 1 => Ok(path),
        _ => std::env::current_exe(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let ladder: Vec<_> = (0..10).map(|count| pause(count).as_millis()).collect();
        assert_eq!(ladder, [0, 0, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(pause(u32::MAX), PAUSE_MAX);
    }
}
