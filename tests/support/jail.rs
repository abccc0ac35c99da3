//! A process of a job: with mounts and a root of its own, as a container has them, in a directory of the test's.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::place::Place;
use super::ran::{Ran, run, wait_until};

/// The programs of the host, in the new root.
const FURNISH: &str = "mount --bind \"$1\" \"$1\"; cd \"$1\"; for d in bin lib lib64 usr; do mkdir -p $d; mount --bind /$d $d; done; \
                       mkdir -p proc dev opt/ml/checkpoint opt/ml/output tmp etc";

/// A running process; ends with the guard, and its mounts with it.
#[derive(Debug)]
pub(crate) struct Jail {
    child: Option<Child>,
    place: Place,
}

impl Jail {
    /// A process with an empty `/opt/ml/output` and `/opt/ml/checkpoint`.
    pub(crate) fn start() -> Self {
        Self::start_with("true")
    }

    /// The same after `setup`, a shell script with the host's rights and programs, in the root's directory.
    pub(crate) fn start_with(setup: &str) -> Self {
        Self::start_as("", setup)
    }

    /// The same with the rights that the options `rights` of setpriv(1) leave to the process.
    pub(crate) fn start_as(rights: &str, setup: &str) -> Self {
        let place = Place::new();
        let root = place.dir("root");
        let begin = if rights.is_empty() { String::new() } else { format!("/usr/bin/setpriv {rights}") };
        let script = format!("{FURNISH}; {setup}; exec chroot \"$1\" {begin} /usr/bin/sleep 600");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "-m", "--propagation", "private", "sh", "-euc", &script, "sh"]);
        Self::begun(command.arg(&root), place, &root)
    }

    /// A process of `user`, who is root of a user namespace of his own with the host's root, after `setup`, a shell script with what rights he has
    /// so; `$1` is a directory of the test's.
    pub(crate) fn start_own_root(user: u32, setup: &str, directory: &Path) -> Self {
        let script = format!("{setup}; exec sleep 600");
        let user = user.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "unshare", "-Urm", "sh", "-euc", &script]);
        Self::begun(command.arg("sh").arg(directory), Place::new(), Path::new("/"))
    }

    fn begun(command: &mut Command, place: Place, root: &Path) -> Self {
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut jail = Self { child: Some(child), place };
        wait_until("the process has a root of its own", Duration::from_secs(20), || {
            let ended = jail.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the process did not start");
            fs::read_link(format!("/proc/{}/exe", jail.pid())).is_ok_and(|exe| exe.ends_with("sleep"))
                && fs::read_link(format!("/proc/{}/root", jail.pid())).is_ok_and(|found| found == root)
        });
        jail
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the process is there").id()
    }

    /// Its number, for a command line.
    pub(crate) fn pid_text(&self) -> String {
        self.pid().to_string()
    }

    /// A path of its root, as the host's file system has it; what is mounted there for the process is not seen.
    pub(crate) fn on_host(&self, path: &str) -> PathBuf {
        self.place.join("root").join(path.trim_start_matches('/'))
    }

    /// The same with what is mounted there.
    pub(crate) fn inside(&self, path: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.pid())).join(path.trim_start_matches('/'))
    }

    /// Runs a script with its mounts and its root.
    pub(crate) fn shell<A: AsRef<OsStr>>(&self, script: &str, args: &[A]) -> Ran {
        let pid = self.pid_text();
        run(Command::new("nsenter").args(["-m", "-r", "-t", &pid, "sh", "-euc", script, "sh"]).args(args))
    }

    /// Ends the process.
    pub(crate) fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        self.end();
    }
}
