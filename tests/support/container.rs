//! systemd itself in a container, with the units and programs of this package installed in it.
//!
//! Its root is a directory of the test's own, made of nothing but links, a few files in `/etc` and the host's `/usr` (read-only, the programs and
//! units laid over it), so that it is there at once and boots in half a second. Everything in it is one tree of processes
//! with namespaces of its own: killing the first ends all the others and takes their mounts along, also when the test is killed. Its files are
//! seen from here through `/proc/PID/root`.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::daemon::{CKPTCTL, CKPTD, clean};
use super::place::Place;
use super::ran::{Ran, run, wait_for, wait_until};

const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Where the hierarchies of cgroups may be.
const HIERARCHIES: &[&str] = &["/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"];

/// Units that ask, or look for what is not there.
const MASKED: &[&str] = &["systemd-firstboot.service", "systemd-sysusers.service"];

/// A running container; ends with the guard.
#[derive(Debug)]
pub(crate) struct Container {
    outside: Child,
    nspawn: u32,
    init: u32,
    name: String,
    place: Place,
}

impl Container {
    /// Boots one; nothing of ours is started in it.
    pub(crate) fn boot() -> Self {
        let place = Place::new();
        furnish(&place);
        install(&place);
        let name = place.path().file_name().unwrap().to_string_lossy().into_owned();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/container.sh");
        let log = fs::File::create(place.join("console")).unwrap();
        let outside = clean("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["--propagation", "private", "sh"])
            .arg(script)
            .args([place.join("root"), place.join("usr"), PathBuf::from(&name)])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut container = Self { outside, nspawn: 0, init: 0, name, place };
        container.wait_for_boot();
        container
    }

    fn wait_for_boot(&mut self) {
        wait_until("the container's first process is there", BOOT_LIMIT, || {
            let ended = self.outside.try_wait().unwrap();
            assert!(ended.is_none(), "the container did not start\n{}", self.console());
            self.nspawn = only_child(self.outside.id()).unwrap_or(0);
            self.init = only_child(self.nspawn).filter(|pid| is_first_inside(*pid)).unwrap_or(0);
            self.init != 0
        });
        wait_until("the container has booted", BOOT_LIMIT, || {
            // Degraded where a unit of the host's is of no use in here.
            let state = run(self.enter().args(["systemctl", "is-system-running"])).stdout;
            matches!(state.trim(), "running" | "degraded")
        });
    }

    /// What it is called in the host's cgroups.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs a shell script in it, with `set -eu`.
    pub(crate) fn shell(&self, script: &str) -> Ran {
        run(self.enter().args(["sh", "-euc", script]))
    }

    /// Runs `systemctl` in it.
    pub(crate) fn systemctl(&self, args: &[&str]) -> Ran {
        run(self.enter().arg("systemctl").args(args))
    }

    /// A property of the service, as `systemctl show` prints it.
    pub(crate) fn property(&self, name: &str) -> String {
        self.systemctl(&["show", "--property", name, "--value", "ckptd.service"]).ok().stdout.trim().to_owned()
    }

    /// Runs `ckptctl` in it.
    pub(crate) fn ctl(&self, args: &[&str]) -> Ran {
        run(self.enter().arg("ckptctl").args(args))
    }

    /// Runs `ckptctl --json` in it, which must succeed with one document.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        run(self.enter().args(["ckptctl", "--json"]).args(args)).ok().json()
    }

    /// A path of the container as the host reaches it, through the container's mounts.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// What the service has written to the journal.
    pub(crate) fn journal(&self) -> String {
        run(self.enter().args(["journalctl", "--no-pager", "--output=short-precise", "--unit=ckptd.service"])).stdout
    }

    /// The first process's view of mounts.
    pub(crate) fn mounts(&self) -> String {
        fs::read_to_string(format!("/proc/{}/mountinfo", self.init)).unwrap()
    }

    /// Changes the service as `systemctl edit` does.
    pub(crate) fn edit(&self, lines: &str) {
        let directory = self.place.dir("root/etc/systemd/system/ckptd.service.d");
        fs::write(directory.join("test.conf"), format!("[Service]\n{lines}\n")).unwrap();
        self.systemctl(&["daemon-reload"]).ok();
    }

    /// Installs another program, as an upgrade does: a new file takes the place of the old one. It is this one and a byte that nobody reads.
    pub(crate) fn upgrade(&self) {
        let programs = self.place.join("root/opt/ckptd");
        let mut program = fs::read(CKPTD).unwrap();
        program.push(0);
        let new = programs.join("ckptd.new");
        fs::write(&new, program).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, programs.join("ckptd")).unwrap();
    }

    /// Whether a process inside runs what [`Container::upgrade`] has installed.
    pub(crate) fn runs_upgraded(&self, pid: &str) -> bool {
        let runs = fs::metadata(self.path(&format!("/proc/{pid}/exe"))).unwrap().len();
        let before = fs::metadata(CKPTD).unwrap().len();
        assert!(runs == before || runs == before + 1, "{runs} bytes are neither program, of {before}");
        runs > before
    }

    /// A command inside, still without its program.
    fn enter(&self) -> Command {
        let mut command = clean("nsenter");
        command.args(["--target", &self.init.to_string(), "--mount", "--pid", "--ipc", "--uts", "--net"]);
        command
    }

    fn console(&self) -> String {
        fs::read_to_string(self.place.join("console")).unwrap_or_default()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if thread::panicking() {
            let journal = if self.init == 0 { String::new() } else { self.journal() };
            let lines: Vec<_> = journal.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("---- console of {}\n{}\n---- journal of ckptd\n{tail}\n----", self.name, self.console());
        }
        // The first process inside; `unshare` reaps it and ends.
        let first = if self.nspawn == 0 { self.outside.id() } else { self.nspawn };
        let pid = nix::unistd::Pid::from_raw(i32::try_from(first).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        wait_for(&mut self.outside, Duration::from_secs(20));
        for hierarchy in HIERARCHIES {
            remove_cgroup(&Path::new(hierarchy).join(&self.name));
        }
    }
}

/// A root directory with what systemd wants to find.
fn furnish(place: &Place) {
    let root = place.dir("root");
    for name in ["usr", "var", "run", "proc", "sys", "dev", "tmp", "root", "opt/ckptd", "etc/ssl/certs"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["bin", "lib", "lib64", "sbin"] {
        symlink(Path::new("usr").join(name), root.join(name)).unwrap();
    }
    let etc = root.join("etc");
    for file in ["os-release", "ssl/certs/ca-certificates.crt"] {
        fs::copy(Path::new("/etc").join(file), etc.join(file)).unwrap();
    }
    fs::write(etc.join("passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(etc.join("group"), "root:x:0:\n").unwrap();
    fs::write(etc.join("machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
    let units = place.dir("root/etc/systemd/system");
    symlink("/usr/lib/systemd/system/basic.target", units.join("default.target")).unwrap();
    for unit in MASKED {
        symlink("/dev/null", units.join(unit)).unwrap();
    }
}

/// The package, as it would be unpacked.
fn install(place: &Place) {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let units = place.dir("usr/lib/systemd/system");
    for unit in ["ckptd.service", "ckptd.socket"] {
        fs::copy(ours.join(unit), units.join(unit)).unwrap();
    }
    fs::copy(ours.join("ckptd.tmpfiles"), place.dir("usr/lib/tmpfiles.d").join("ckptd.conf")).unwrap();
    let programs = place.dir("usr/bin");
    for (name, built) in [("ckptd", CKPTD), ("ckptctl", CKPTCTL)] {
        // Outside of what is laid over the host's, which must not change while it is mounted.
        fs::copy(built, place.join("root/opt/ckptd").join(name)).unwrap();
        symlink(Path::new("/opt/ckptd").join(name), programs.join(name)).unwrap();
    }
}

fn only_child(pid: u32) -> Option<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.trim().parse().ok()
}

/// Whether it is the first process of a namespace two below ours: `nspawn` forks twice until it is.
fn is_first_inside(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    numbers.split_whitespace().nth(2) == Some("1")
}

/// Removes a cgroup with those below it; no process is left in them.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}
