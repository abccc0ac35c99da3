//! Programs at work for a source: `git` and `ssh`, started without a shell, in a world of their own, watched, and ended for certain.
//!
//! A child sees nothing of the daemon's environment but `PATH` and the proxies; no configuration of the host or of a user; what it may
//! do is in `GIT_CONFIG_*` variables (see [`Call::setting`]), so that no secret stands among its arguments, which everybody can read.
//!
//! It leads a process group, which ends whole when the guard is dropped, and dies with the daemon's thread that started it; what
//! it started itself then finds its pipes broken. Its memory, and the size of any file that it writes, are limited by the kernel.
//!
//! *Watching.* Each piece of output, and each growth of what lies in the scratch directory, is a sign of life. A child that
//! gives none for the limit is ended; so is one under which the directory outgrows its bound or the disk becomes full.

use std::ffi::{OsStr, OsString};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child as Process, Command};
use tokio::time::{Instant, timeout};

use crate::disk::Scratch;
use crate::error::{Error, Kind, LATER, Result};
use crate::limits;

/// How often the scratch directory is looked at. A disk that takes 1 GB/s takes a quarter of one in between, which the margin covers.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Room that must be left on the disk besides its reserve while a child fetches.
const MARGIN_BYTES: u64 = 256 << 20;

/// What is kept of the end of stderr: some lines of a server and of git.
const SAID_BYTES: usize = 16 << 10;

/// Where programs are looked for if the daemon was started without `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The directory that children work in, and what bounds them.
#[derive(Clone, Debug)]
pub(super) struct Workshop {
    pub(super) scratch: Arc<Scratch>,
    /// Bytes that may lie in the directory.
    pub(super) limit_bytes: u64,
    /// Longest wait for a sign of life.
    pub(super) patience: Duration,
    /// Longest silence of the other side in the middle of a transfer.
    pub(super) quiet: Duration,
    /// Whether the proxies of the environment count.
    pub(super) environment_proxy: bool,
}

/// A call that has not been made yet.
pub(super) struct Call {
    command: Command,
    settings: Vec<(String, String)>,
}

/// A child that runs; dropping it ends its whole group.
#[derive(Debug)]
pub(super) struct Child(pub(super) Process);

/// How a child ended.
pub(super) struct Ended {
    pub(super) good: bool,
    /// The end of what it wrote on stderr.
    pub(super) said: String,
}

impl Call {
    /// `program` with `arguments`, in the workshop's directory.
    pub(super) fn new<A: AsRef<OsStr>>(workshop: &Workshop, program: &str, arguments: &[A]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(workshop.scratch.path()).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| PATH.into()));
        for (key, value) in [
            ("LC_ALL", "C"),
            ("HOME", "."),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
            ("GIT_ALLOW_PROTOCOL", ""),
        ] {
            command.env(key, value);
        }
        Self { command, settings: Vec::new() }
    }

    /// Passes the environment's proxies and trust store on.
    pub(super) fn with_network(mut self, workshop: &Workshop) -> Self {
        if let Some(bundle) = std::env::var_os("SSL_CERT_FILE") {
            self.command.env("GIT_SSL_CAINFO", bundle);
        }
        if workshop.environment_proxy {
            self.command.envs(proxies(|name| std::env::var_os(name)));
        }
        self
    }

    pub(super) fn variable(mut self, key: &str, value: &str) -> Self {
        self.command.env(key, value);
        self
    }

    /// A configuration key of git for this call alone, given through the environment.
    pub(super) fn setting(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((key.into(), value.into()));
        self
    }

    /// Starts it; stdin is `input`, the rest is piped. `file_bytes` bounds every file that it writes.
    pub(super) fn start(mut self, input: Stdio, file_bytes: u64) -> Result<Child> {
        self.command.env("GIT_CONFIG_COUNT", self.settings.len().to_string());
        for (number, (key, value)) in self.settings.iter().enumerate() {
            self.command.env(format!("GIT_CONFIG_KEY_{number}"), key).env(format!("GIT_CONFIG_VALUE_{number}"), value);
        }
        self.command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).process_group(0);
        let parent = nix::unistd::getpid();
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            self.command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                if nix::unistd::getppid() != parent {
                    return Err(nix::errno::Errno::ESRCH.into());
                }
                setrlimit(Resource::RLIMIT_DATA, limits::GIT_MEMORY_BYTES, limits::GIT_MEMORY_BYTES)?;
                setrlimit(Resource::RLIMIT_FSIZE, file_bytes, file_bytes)?;
                be_killed_for_memory_first();
                // Who writes too much gets an error that it can tell, instead of a signal.
                nix::sys::signal::signal(Signal::SIGXFSZ, nix::sys::signal::SigHandler::SigIgn)?;
                Ok(())
            });
        }
        let program = self.command.as_std().get_program().to_string_lossy().into_owned();
        let child = self.command.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(
                Kind::Unsupported,
                "PROGRAM_MISSING",
                format!("git sources need the program `{program}`, which this host does not have"),
            )
            .remedy("install the packages git and openssh-client"),
            _ => Error::io("starting", &program, error),
        })?;
        Ok(Child(child))
    }

    /// Runs it to its end and hands what it writes on stdout to `take`, piece by piece. stdin is empty.
    ///
    /// # Errors
    /// `STALLED`, `CHECKPOINT_TOO_LARGE`, `NO_SPACE`, and what `take` says; how it ended is no error.
    pub(super) async fn run(self, workshop: &Workshop, take: impl FnMut(&[u8]) -> Result<()>) -> Result<Ended> {
        self.run_on(Stdio::null(), workshop, take).await
    }

    /// As [`Call::run`], with stdin.
    pub(super) async fn run_on(
        self,
        input: Stdio,
        workshop: &Workshop,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<Ended> {
        let mut watch = Watch::new(workshop.clone()).await?;
        let mut child = self.start(input, watch.file_bytes)?;
        let (mut stdout, mut stderr) = (child.0.stdout.take(), child.0.stderr.take());
        let mut look = tokio::time::interval(LOOK_EVERY);
        let (mut out, mut err) = (Vec::with_capacity(64 << 10), Vec::with_capacity(4 << 10));
        let mut said = Vec::new();
        while stdout.is_some() || stderr.is_some() {
            tokio::select! {
                read = read_some(&mut stdout, &mut out) => {
                    if read? {
                        watch.alive();
                        take(&out)?;
                    } else {
                        stdout = None;
                    }
                    out.clear();
                }
                read = read_some(&mut stderr, &mut err) => {
                    if read? { watch.alive() } else { stderr = None }
                    keep_end(&mut said, &err);
                    err.clear();
                }
                _ = look.tick() => watch.look().await?,
            }
        }
        let status = match timeout(workshop.patience, child.0.wait()).await {
            Ok(status) => status.map_err(|error| Error::io("waiting for", "git", error))?,
            Err(_) => return Err(stalled(workshop.patience)),
        };
        Ok(Ended { good: status.success(), said: String::from_utf8_lossy(&said).into_owned() })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Only as long as it has not been waited for, since until then the number is its own.
        if let Some(group) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

/// Whether bytes came; pending for ever where there is nothing to read from.
async fn read_some<R: tokio::io::AsyncRead + Unpin>(from: &mut Option<R>, into: &mut Vec<u8>) -> Result<bool> {
    match from {
        Some(from) => {
            let read = from.read_buf(into).await;
            Ok(read.map_err(|error| Error::io("reading from", "git", error))? > 0)
        }
        None => std::future::pending().await,
    }
}

fn keep_end(said: &mut Vec<u8>, more: &[u8]) {
    said.extend_from_slice(more);
    if said.len() > SAID_BYTES {
        said.drain(..said.len() - SAID_BYTES);
    }
}

/// Takes back what protects the daemon when memory runs out; best effort. For between fork and exec.
fn be_killed_for_memory_first() {
    // SAFETY: calls that are async-signal-safe, with a string and a number that live for ever; the descriptor is closed by exec if not here.
    unsafe {
        let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, c"0".as_ptr().cast(), 1);
            libc::close(file);
        }
    }
}

/// The proxies that `set`, which reads the environment, tells of, by the names that git takes them from: it knows no `HTTP_PROXY`
/// in capitals. Where both are set the capitals count, as for our own client.
fn proxies(set: impl Fn(&str) -> Option<OsString>) -> impl Iterator<Item = (&'static str, OsString)> {
    let names = [
        ("HTTP_PROXY", "http_proxy"),
        ("HTTPS_PROXY", "https_proxy"),
        ("ALL_PROXY", "all_proxy"),
        ("NO_PROXY", "no_proxy"),
    ];
    names.into_iter().filter_map(move |(capitals, name)| Some((name, set(capitals).or_else(|| set(name))?)))
}

fn stalled(limit: Duration) -> Error {
    Error::unavailable("STALLED", format!("nothing came for {} s", limit.as_secs_f64())).remedy(LATER)
}

/// Looks for signs of life and at the bounds.
struct Watch {
    workshop: Workshop,
    until: Instant,
    occupied: u64,
    /// Most that one file may become.
    file_bytes: u64,
}

impl Watch {
    async fn new(workshop: Workshop) -> Result<Self> {
        let (until, limit_bytes) = (Instant::now() + workshop.patience, workshop.limit_bytes);
        let mut watch = Self { workshop, until, occupied: 0, file_bytes: limit_bytes };
        watch.look().await?;
        let free = watch.workshop.scratch.free_bytes()?.saturating_sub(limits::DISK_RESERVE_BYTES);
        watch.file_bytes = limit_bytes.min(free);
        Ok(watch)
    }

    fn alive(&mut self) {
        self.until = Instant::now() + self.workshop.patience;
    }

    async fn look(&mut self) -> Result<()> {
        let scratch = Arc::clone(&self.workshop.scratch);
        let looked = tokio::task::spawn_blocking(move || {
            scratch.check_room(MARGIN_BYTES)?;
            Ok::<_, Error>(scratch.occupied_bytes())
        });
        let occupied =
            looked.await.map_err(|error| Error::internal("looking at a scratch directory").because(error))??;
        let limit = self.workshop.limit_bytes;
        if occupied > limit {
            return Err(Error::no_space(
                "CHECKPOINT_TOO_LARGE",
                format!("the repository has more than {limit} bytes, packed, which is what a checkpoint may have"),
            )
            .fact("limit_bytes", limit)
            .remedy("make it smaller or ask the operator to raise the limit"));
        }
        if occupied != self.occupied {
            self.occupied = occupied;
            self.alive();
        }
        if Instant::now() > self.until { Err(stalled(self.workshop.patience)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_have_the_names_that_git_knows() {
        let environment = [("HTTP_PROXY", "one"), ("https_proxy", "two"), ("NO_PROXY", "three"), ("no_proxy", "four")];
        let set = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        let given: Vec<_> = proxies(set).map(|(name, value)| format!("{name}={}", value.to_string_lossy())).collect();
        assert_eq!(given, ["http_proxy=one", "https_proxy=two", "no_proxy=three"]);
    }
}
