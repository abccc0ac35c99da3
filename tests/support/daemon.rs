//! A private `ckptd serve` with its client.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use serde_json::Value;

use super::files::regular_files;
use super::place::{Place, unmount_below};
use super::ran::{Ran, run, wait_for, wait_until, wait_until_told};
use super::seccomp;

/// The daemon under test.
pub(crate) const CKPTD: &str = env!("CARGO_BIN_EXE_ckptd");
/// The client under test.
pub(crate) const CKPTCTL: &str = env!("CARGO_BIN_EXE_ckptctl");

/// Lets sources reach the web sites of the tests.
pub(crate) const LOOPBACK: (&str, &str) = ("CKPTD_SOURCES__ALLOW_NETWORKS", r#"["127.0.0.0/8"]"#);
/// The same where they go by the name `localhost`.
pub(crate) const LOCALHOST: (&str, &str) = ("CKPTD_SOURCES__ALLOW_NETWORKS", r#"["127.0.0.0/8", "::1/128"]"#);
/// Keeps every read in the daemon.
pub(crate) const NO_PASSTHROUGH: (&str, &str) = ("CKPTD_SERVE__PASSTHROUGH", r#""never""#);

const READY_LIMIT: Duration = Duration::from_secs(120);
/// Bytes of a fill unit.
const UNIT_BYTES: u64 = 4 << 20;

const STOP_LIMIT: Duration = Duration::from_secs(120);
/// How long a keeper may take to have another daemon answer.
const SUCCESSOR_LIMIT: Duration = Duration::from_secs(180);

/// A daemon that lives as long as the guard; what it mounted goes with it.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Option<Child>,
    place: Place,
    state: PathBuf,
    verb: &'static str,
    env: Vec<(&'static str, String)>,
    /// System calls that it finds missing.
    refused: &'static [nix::libc::c_long],
}

impl Daemon {
    /// Starts one on the built-in configuration.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts one with these environment variables (values as in TOML).
    pub(crate) fn start_with(env: &[(&'static str, &str)]) -> Self {
        let place = Place::new();
        let state = place.dir("state");
        Self::start_in(place, state, "serve", env)
    }

    /// Starts one under `ckptd keeper`.
    pub(crate) fn start_kept(env: &[(&'static str, &str)]) -> Self {
        let place = Place::new();
        let state = place.dir("state");
        Self::start_in(place, state, "keeper", env)
    }

    /// Starts one whose state directory is elsewhere, on a file system of the test's.
    pub(crate) fn start_on(state: PathBuf, env: &[(&'static str, &str)]) -> Self {
        Self::start_in(Place::new(), state, "serve", env)
    }

    /// Starts one, under the keeper where the verb says so, that finds these system calls missing, as under a filter.
    pub(crate) fn start_without(verb: &'static str, calls: &'static [nix::libc::c_long]) -> Self {
        let place = Place::new();
        let state = place.dir("state");
        place.dir("run");
        let mut daemon = Self { child: None, place, state, verb, env: Vec::new(), refused: calls };
        daemon.launch();
        daemon
    }

    fn start_in(place: Place, state: PathBuf, verb: &'static str, env: &[(&'static str, &str)]) -> Self {
        place.dir("run");
        let env = env.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        let mut daemon = Self { child: None, place, state, verb, env, refused: &[] };
        daemon.launch();
        daemon
    }

    /// Starts the daemon again on the same directories, after [`Daemon::kill9`] or [`Daemon::stop`].
    pub(crate) fn restart(&mut self) {
        assert!(self.child.is_none(), "the daemon is still there");
        self.launch();
    }

    /// Ends it as a power failure would, less the disk.
    pub(crate) fn kill9(&mut self) {
        let mut child = self.child.take().expect("the daemon is there");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The process that serves, which under a keeper is not the one that was started.
    pub(crate) fn server(&self) -> nix::unistd::Pid {
        let pid = self.json(&["status"])["pid"].as_i64().unwrap();
        nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap())
    }

    /// Kills the one that answers, under a keeper, and waits until another does: which that is.
    pub(crate) fn replace(&self) -> nix::unistd::Pid {
        let before = self.server();
        nix::sys::signal::kill(before, nix::sys::signal::Signal::SIGKILL).unwrap();
        self.successor(before)
    }

    /// The one that answers after `before`, once it does.
    pub(crate) fn successor(&self, before: nix::unistd::Pid) -> nix::unistd::Pid {
        wait_until("a successor answers", SUCCESSOR_LIMIT, || {
            let status = self.ctl(&["--json", "status"]);
            status.code == Some(0) && status.json()["pid"].as_i64() != Some(before.as_raw().into())
        });
        self.server()
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("the daemon is there");
        terminate(&child);
        let code = wait_for(&mut child, STOP_LIMIT);
        assert_eq!(code, Some(0), "the daemon did not stop well\n{}", self.stderr_tail());
    }

    /// Runs `ckptctl` with `args`.
    pub(crate) fn ctl<A: AsRef<OsStr>>(&self, args: &[A]) -> Ran {
        run(self.ctl_command().args(args))
    }

    /// Runs `ckptctl --json` with `args`, which must succeed with one document.
    pub(crate) fn json<A: AsRef<OsStr>>(&self, args: &[A]) -> Value {
        run(self.ctl_command().arg("--json").args(args)).ok().json()
    }

    /// `ckptctl` for this daemon, without a verb yet.
    pub(crate) fn ctl_command(&self) -> Command {
        let mut command = clean(CKPTCTL);
        command.arg("--endpoint").arg(format!("unix:{}", self.socket().display()));
        command
    }

    /// The rows of `list` or `jobs`.
    pub(crate) fn rows(&self, verb: &str) -> Vec<Value> {
        let key = if verb == "list" { "checkpoints" } else { verb };
        let document = self.json(&[verb]);
        document[key].as_array().unwrap_or_else(|| panic!("`{verb} --json` has no list `{key}`: {document}")).clone()
    }

    /// Captures `from` as checkpoint `name`; ready on return.
    pub(crate) fn capture(&self, name: &str, from: &Path) -> Value {
        self.ctl(&[
            OsStr::new("capture"),
            OsStr::new("maker"),
            "--from".as_ref(),
            from.as_ref(),
            "--name".as_ref(),
            name.as_ref(),
        ])
        .ok();
        let record = self.json(&["get", name]);
        assert_eq!(record["state"], "ready", "{record}");
        record
    }

    /// Attaches `checkpoint` for `job` at a new directory, which is returned.
    pub(crate) fn attach(&self, job: &str, checkpoint: &str) -> PathBuf {
        let target = self.place.dir(&format!("at-{job}"));
        self.attach_at(job, &[checkpoint], &target).ok();
        target
    }

    /// Attaches at `target`, whatever comes of it.
    pub(crate) fn attach_at(&self, job: &str, checkpoints: &[&str], target: &Path) -> Ran {
        run(self.ctl_command().arg("attach").arg(job).args(checkpoints).arg("--at").arg(target))
    }

    /// Waits until the checkpoint is in `state`.
    pub(crate) fn wait_state(&self, checkpoint: &str, state: &str, limit: Duration) {
        wait_until(&format!("checkpoint {checkpoint} is {state}"), limit, || {
            let record = self.json(&["get", checkpoint]);
            let now = record["state"].as_str().unwrap_or_default().to_owned();
            assert!(now == state || !matches!(now.as_str(), "ready" | "failed"), "{record}");
            now == state
        });
    }

    /// Bytes of the checkpoint that are here, by its record: more than any number when it is ready. Fails where it failed.
    pub(crate) fn bytes_done(&self, checkpoint: &str) -> u64 {
        self.done(checkpoint, "bytes_done")
    }

    /// Files of a checkpoint that are sealed while it fills, as [`Daemon::bytes_done`].
    pub(crate) fn files_done(&self, checkpoint: &str) -> u64 {
        self.done(checkpoint, "files_done")
    }

    fn done(&self, checkpoint: &str, figure: &str) -> u64 {
        let record = self.json(&["get", checkpoint]);
        assert_ne!(record["state"], "failed", "{record}");
        if record["state"] == "ready" { u64::MAX } else { record["fill"][figure].as_u64().unwrap_or(0) }
    }

    /// Bytes of the checkpoint that a start after a kill would find, by the catalog; else as [`Daemon::bytes_done`].
    pub(crate) fn recorded_bytes(&self, checkpoint: &str) -> u64 {
        if self.bytes_done(checkpoint) == u64::MAX {
            return u64::MAX;
        }
        let id = self.json(&["get", checkpoint])["id"].as_str().unwrap().to_owned();
        let catalog =
            Connection::open_with_flags(self.state.join("catalog.db"), OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
        catalog.busy_timeout(READY_LIMIT).unwrap();
        let mut rows = catalog
            .prepare("SELECT f.size, f.units, f.blob IS NOT NULL FROM fills f JOIN checkpoints c USING (flight) WHERE c.id = ?")
            .unwrap();
        let bytes = |row: &rusqlite::Row<'_>| {
            let (size, units, is_sealed): (i64, Option<Vec<u8>>, bool) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let size = u64::try_from(size).unwrap();
            Ok(if is_sealed { size } else { size.min(units_in(&units.unwrap_or_default()) * UNIT_BYTES) })
        };
        rows.query_map([id], bytes).unwrap().sum::<Result<u64, _>>().unwrap()
    }

    /// Waits until no file is left in a directory of the state directory: bytes may go a moment after their record.
    pub(crate) fn wait_empty(&self, directory: &str) {
        let directory = self.state.join(directory);
        wait_until_told(READY_LIMIT, || match regular_files(&directory).as_slice() {
            [] => Ok(()),
            left => Err(format!("{left:?} are left")),
        });
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon is there").id()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.place.join("run/ckptd.sock")
    }

    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// All that the daemon wrote on stderr, over its restarts.
    pub(crate) fn stderr(&self) -> String {
        let text = fs::read(self.place.join("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The last lines of it.
    pub(crate) fn stderr_tail(&self) -> String {
        let text = self.stderr();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    fn launch(&mut self) {
        let stderr = File::options().create(true).append(true).open(self.place.join("stderr")).unwrap();
        let mut command = command(self.verb, &self.state, &self.place.join("run"));
        if !self.refused.is_empty() {
            seccomp::refuse(&mut command, self.refused);
        }
        let mut child = command
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        self.child = Some(child);
        let line = first_line(stdout);
        assert!(line.is_some(), "the daemon printed no ready line within {READY_LIMIT:?}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            terminate(&child);
            let limit = if thread::panicking() { Duration::from_secs(2) } else { Duration::from_secs(10) };
            wait_for(&mut child, limit);
        }
        if thread::panicking() {
            eprintln!("---- stderr of the daemon in {}\n{}\n----", self.place.path().display(), self.stderr_tail());
        }
        unmount_below(self.place.path());
    }
}

/// `ckptd serve` on these directories, without the caller's own settings.
pub(crate) fn serve_command(state: &Path, run: &Path) -> Command {
    command("serve", state, run)
}

fn command(verb: &str, state: &Path, run: &Path) -> Command {
    let mut command = clean(CKPTD);
    command.arg(verb).arg("--state-dir").arg(state).arg("--runtime-dir").arg(run);
    command
}

/// Units that a bitmap says are here.
fn units_in(bitmap: &[u8]) -> u64 {
    bitmap.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

/// `program` without what the caller's environment says about ckptd.
pub(crate) fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("CKPTD_")) {
        command.env_remove(key);
    }
    command
}

/// The first line of a stream, read to its end in the background so that its writer never blocks.
fn first_line(from: impl std::io::Read + Send + 'static) -> Option<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver.recv_timeout(READY_LIMIT).ok()
}

fn terminate(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
}
