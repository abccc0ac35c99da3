//! The units, and the service under the real systemd: jobs notice nothing of kills, restarts, hangs and upgrades; stopping does what
//! the README says it does.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use support::container::Container;
use support::corpus::{Random, seed};
use support::daemon::CKPTD;
use support::place::Place;
use support::ran::{run, wait_until};
use support::steady::Readers;

const MIB: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// The view that the tests read, inside.
const VIEW: &str = "/run/ckptd/jobs/job/checkpoint";

/// What systemd 252 does not know, and says so; later ones do.
const NEWER_KEYS: &[&str] = &["FileDescriptorStorePreserve", "RestartSteps", "RestartMaxDelaySec"];

/// First version that can keep descriptors of a service that is stopped.
const KEEPS_WHEN_STOPPED: u32 = 254;

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

/// The containers want `systemd-nspawn` and the units `systemd-analyze`, which `tests/run` installs.
fn is_here(program: &str) -> bool {
    let here = run(Command::new("sh").args(["-c", "command -v \"$1\"", "sh", program])).code == Some(0);
    if !here {
        eprintln!("skipped: there is no {program}; tests/run installs it");
    }
    here
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    if !is_here("systemd-analyze") {
        return;
    }
    let place = Place::new();
    let service = fs::read_to_string(unit("ckptd.service")).unwrap();
    // Where the program will be, there is none on this host.
    assert!(service.contains("ExecStart=/usr/bin/ckptd "));
    fs::write(place.join("ckptd.service"), service.replace("/usr/bin/ckptd ", &format!("{CKPTD} "))).unwrap();
    fs::copy(unit("ckptd.socket"), place.join("ckptd.socket")).unwrap();
    let verify = ["ckptd.service", "ckptd.socket"].map(|name| place.join(name));
    let ran = run(Command::new("systemd-analyze").args(["verify", "--man=no"]).args(verify)).ok();
    let about_ours = ran.stderr.lines().filter(|line| line.contains("ckptd"));
    let complaints: Vec<_> = about_ours
        .filter(|line| !NEWER_KEYS.iter().any(|key| line.contains("Unknown key") && line.contains(key)))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn every_directive_has_its_reason() {
    for name in ["ckptd.service", "ckptd.socket"] {
        let text = fs::read_to_string(unit(name)).unwrap();
        let lines: Vec<_> = text.lines().collect();
        for (above, line) in lines.iter().zip(&lines[1..]) {
            let directive = line.contains('=') && !line.starts_with('#');
            assert!(!directive || above.starts_with("# "), "{name}: `{line}` has no comment above it");
        }
    }
}

/// A container with the service running and the random bytes of one checkpoint's file `w.bin`, attached for `job`.
fn serving(edit: &str) -> (Container, Arc<Vec<u8>>) {
    let container = Container::boot();
    if !edit.is_empty() {
        container.edit(edit);
    }
    container.systemctl(&["enable", "--now", "ckptd.service"]).ok();
    let bytes = Arc::new(Random::new(seed()).bytes(16 * MIB));
    fs::create_dir(container.path("/source")).unwrap();
    fs::write(container.path("/source/w.bin"), &*bytes).unwrap();
    container.ctl(&["capture", "maker", "--from", "/source", "--name", "k"]).ok();
    container.ctl(&["attach", "job", "k"]).ok();
    (container, bytes)
}

fn view(container: &Container) -> PathBuf {
    container.path(&format!("{VIEW}/w.bin"))
}

/// Waits until a daemon other than `before` answers; returns its process id, as the container numbers it.
fn successor(container: &Container, before: &str, after: &str) -> String {
    wait_until(&format!("the service is back after {after}"), LIMIT, || {
        let (now, active) = (container.property("MainPID"), container.property("ActiveState"));
        now != before && now != "0" && active == "active"
    });
    container.property("MainPID")
}

/// Line of the view in the container's list of mounts: the same mount has the same.
fn mount_line(container: &Container) -> String {
    let mounts = container.mounts();
    let lines: Vec<_> = mounts.lines().filter(|line| line.split(' ').nth(4) == Some(VIEW)).collect();
    assert_eq!(lines.len(), 1, "{mounts}");
    lines[0].to_owned()
}

#[test]
fn the_service_is_ready_when_it_answers_and_mounts_for_the_whole_host() {
    if !is_here("systemd-nspawn") {
        return;
    }
    let (container, bytes) = serving("");
    let status = container.json(&["status"]);
    assert_eq!(status["pid"].to_string(), container.property("MainPID"));
    assert_eq!(container.property("NFileDescriptorStore"), "1", "systemd has the connection of the one session");
    assert_eq!(container.property("UnitFileState"), "enabled");
    assert!(container.property("StatusText").len() > 1, "`systemctl status` says what it does");
    assert_eq!(fs::read(view(&container)).unwrap(), *bytes);
    mount_line(&container);
    assert_shares_the_mounts(&container);
    for (path, mode) in [
        ("/run/ckptd", 0o755),
        ("/run/ckptd/ckptd.sock", 0o600),
        ("/run/ckptd/sessions", 0o700),
        ("/var/lib/ckptd", 0o700),
        ("/etc/ckptd/credentials", 0o700),
    ] {
        let found = container.path(path).symlink_metadata().unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (mode, 0, 0), "{path}");
    }
    let inside = "mkdir -p /opt/ml/checkpoint
        unshare --mount sleep 600 & job=$!
        until readlink /proc/$job/exe | grep -q '/sleep$'; do :; done
        ckptctl attach inner k --pid $job
        nsenter --target $job --mount cmp /source/w.bin /opt/ml/checkpoint/w.bin
        kill $job";
    container.shell(inside).ok();
    // Secrets may come this way, so it must not cost the mounts.
    container.edit("LoadCredential=huggingface.toml:/etc/machine-id");
    container.systemctl(&["restart", "ckptd"]).ok();
    assert_shares_the_mounts(&container);
}

fn assert_shares_the_mounts(container: &Container) {
    let namespaces = "readlink /proc/1/ns/mnt /proc/$(systemctl show -P MainPID ckptd)/ns/mnt | uniq | wc -l";
    assert_eq!(container.shell(namespaces).ok().stdout.trim(), "1", "what the service mounts is the host's");
}

#[test]
fn jobs_whose_files_the_kernel_reads_notice_nothing() {
    notice_nothing("WatchdogSec=20s", "passthrough");
}

#[test]
fn jobs_whose_files_the_daemon_reads_notice_nothing() {
    notice_nothing("WatchdogSec=20s\nEnvironment=CKPTD_SERVE__PASSTHROUGH='\"never\"'", "daemon");
}

type Disturb = fn(&Container);

fn notice_nothing(edit: &str, state: &str) {
    if !is_here("systemd-nspawn") {
        return;
    }
    let (container, bytes) = serving(edit);
    assert_eq!(support::files::xattr(&view(&container), "user.ckptd.state"), state);
    let (jobs, mount) = (container.json(&["jobs"]), mount_line(&container));
    let readers = Readers::start(&view(&container), &bytes);
    readers.go_on("the start");
    let mut pid = container.property("MainPID");
    assert_eq!(container.json(&["status"])["restarts"], 0);
    assert!(!container.ctl(&["events"]).ok().stdout.contains("DAEMON_RESTARTED"), "a first start says nothing");
    let disturbances: [(&str, Disturb); 6] = [
        ("a kill", |container| drop(container.systemctl(&["kill", "--signal=KILL", "ckptd"]).ok())),
        ("another kill", |container| drop(container.systemctl(&["kill", "--signal=KILL", "ckptd"]).ok())),
        ("a restart", |container| drop(container.systemctl(&["restart", "ckptd"]).ok())),
        ("an upgrade", |container| {
            container.upgrade();
            container.systemctl(&["restart", "ckptd"]).ok();
        }),
        ("hanging until the watchdog bites", |container| {
            container.systemctl(&["kill", "--signal=STOP", "ckptd"]).ok();
        }),
        ("failing to start for a while", fail_to_start_for_a_while),
    ];
    for (before, (what, disturb)) in (0_u64..).zip(disturbances) {
        disturb(&container);
        pid = successor(&container, &pid, what);
        readers.go_on(what);
        assert_eq!(container.json(&["jobs"]), jobs, "after {what}");
        assert_eq!(mount_line(&container), mount, "after {what}");
        let status = container.json(&["status"]);
        assert_eq!(container.runs_upgraded(&pid), before >= UPGRADE, "after {what}");
        let restarts = status["restarts"].as_u64().unwrap();
        let last = last_restart(&container);
        if before < LAST_ORDERLY {
            assert_eq!(restarts, before + 1, "after {what}");
            assert!(last.contains(&format!("{restarts} times by now")), "after {what}: {last}");
        } else {
            assert!(restarts > before + 2, "{restarts} after {what}");
            assert!(last.contains("times in a row at its start"), "after {what}: {last}");
        }
        eprintln!("{state}, {what}: {:?} was the longest so far without an answer", readers.longest());
    }
}

/// Disturbances before the upgrade.
const UPGRADE: u64 = 3;

/// Disturbances before the one that makes starts fail.
const LAST_ORDERLY: u64 = 5;

/// What the last of the events that tell of a restart says.
fn last_restart(container: &Container) -> String {
    let events = container.ctl(&["events"]).ok().stdout;
    events.lines().rfind(|line| line.contains("DAEMON_RESTARTED")).expect("an event tells of the restart").to_owned()
}

/// A configuration with a mistake, mended when the service has tried several times.
fn fail_to_start_for_a_while(container: &Container) {
    let config = container.path("/etc/ckptd/config.toml");
    fs::write(&config, "[store]\nno_such_key = 1\n").unwrap();
    assert_ne!(container.systemctl(&["restart", "ckptd"]).code, Some(0));
    let tries = || container.property("NRestarts").parse::<u32>().unwrap();
    // More than systemd lets pass by default.
    wait_until("the service was started again and again", LIMIT, || tries() > 6);
    // Systems before 254 know no steps: it is the daemon that waits, and says so.
    wait_until("the daemon waits", LIMIT, || container.property("StatusText").contains("starts in a row have failed"));
    fs::remove_file(config).unwrap();
}

#[test]
fn stopping_leaves_the_mounts_and_starting_brings_their_bytes_back() {
    if !is_here("systemd-nspawn") {
        return;
    }
    let (container, bytes) = serving("");
    container.systemctl(&["stop", "ckptd"]).ok();
    assert_eq!(container.property("ActiveState"), "inactive");
    mount_line(&container);
    let (answer, answers) = mpsc::channel();
    let file = view(&container);
    let waiting = thread::spawn(move || answer.send(fs::read(file)));
    if version() < KEEPS_WHEN_STOPPED {
        let error = answers.recv_timeout(LIMIT).unwrap().expect_err("a connection that nobody holds is closed");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN), "{error}");
    } else {
        let early = answers.recv_timeout(Duration::from_secs(1));
        assert!(early.is_err(), "reads wait for the daemon: {early:?}");
    }
    container.systemctl(&["start", "ckptd"]).ok();
    if version() >= KEEPS_WHEN_STOPPED {
        assert_eq!(answers.recv_timeout(LIMIT).unwrap().unwrap(), *bytes);
    }
    waiting.join().unwrap().unwrap();
    assert_eq!(fs::read(view(&container)).unwrap(), *bytes);
    mount_line(&container);
    assert_eq!(container.json(&["jobs"])["jobs"][0]["state"], "attached");
}

fn version() -> u32 {
    let ran = run(Command::new("systemctl").arg("--version")).ok();
    ran.stdout.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn calls_wait_in_the_socket_while_there_is_no_daemon() {
    if !is_here("systemd-nspawn") {
        return;
    }
    let (container, bytes) = serving("");
    // A daemon that runs has a socket of its own: the unit's counts from the next start.
    assert_ne!(container.systemctl(&["start", "ckptd.socket"]).code, Some(0));
    container.systemctl(&["stop", "ckptd.service"]).ok();
    container.systemctl(&["enable", "--now", "ckptd.socket"]).ok();
    let socket = container.path("/run/ckptd/ckptd.sock").symlink_metadata().unwrap();
    assert_eq!((socket.mode() & 0o7777, socket.uid()), (0o600, 0));
    let status = container.json(&["status"]);
    assert_eq!(status["pid"].to_string(), container.property("MainPID"), "a call starts the daemon and is answered");
    let readers = Readers::start(&view(&container), &bytes);
    readers.go_on("the start");
    for _ in 0..3 {
        container.systemctl(&["restart", "--no-block", "ckptd.service"]).ok();
        container.ctl(&["status"]).ok();
        container.systemctl(&["kill", "--signal=KILL", "ckptd.service"]).ok();
        container.ctl(&["status"]).ok();
        readers.go_on("a restart and a kill");
    }
    let after = container.path("/run/ckptd/ckptd.sock").symlink_metadata().unwrap();
    assert_eq!((after.dev(), after.ino()), (socket.dev(), socket.ino()), "the daemon leaves systemd's socket alone");
}

#[test]
fn every_container_leaves_nothing() {
    if !is_here("systemd-nspawn") {
        return;
    }
    let container = Container::boot();
    let (root, name) = (container.path("/"), container.name().to_owned());
    File::open(&root).unwrap();
    drop(container);
    File::open(&root).expect_err("its processes are gone");
    let left =
        ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"].map(|at| Path::new(at).join(&name));
    assert!(left.iter().all(|path| !path.exists()), "{left:?}");
}
