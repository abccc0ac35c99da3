//! Views: who sees what where, how often, and how they go away.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use nix::unistd::Pid;
use support::corpus::{Random, random_file, seed};
use support::daemon::{Daemon, LOOPBACK, NO_PASSTHROUGH};
use support::files::{assert_same_file, assert_same_tree, b3sum, xattr};
use support::place::mounts_at;
use support::ran::{Ran, run, wait_until};
use support::seccomp::MOUNTS_BY_DESCRIPTOR;
use support::site::{Page, Site};
use support::still::Still;

const MIB: u64 = 1 << 20;

/// A daemon with checkpoints of these names, each of one file `w.bin` and of a directory `source-<name>`.
fn daemon_with(names: &[&str], env: &[(&'static str, &str)]) -> Daemon {
    let daemon = Daemon::start_with(env);
    keep(&daemon, names);
    daemon
}

fn keep(daemon: &Daemon, names: &[&str]) {
    for (index, name) in names.iter().enumerate() {
        let source = source(daemon, name);
        random_file(&source.join("w.bin"), seed() + index as u64, 5 * MIB + 3);
        fs::write(source.join("name"), name).unwrap();
        daemon.capture(name, &source);
    }
}

fn source(daemon: &Daemon, name: &str) -> PathBuf {
    daemon.place().dir(&format!("source-{}", name.replace('/', "-slash-")))
}

#[test]
fn several_jobs_see_one_checkpoint_through_one_session() {
    let daemon = daemon_with(&["k"], &[]);
    let targets: Vec<_> = (0..8).map(|job| daemon.attach(&format!("job-{job}"), "k")).collect();
    for target in &targets {
        assert_same_tree(&source(&daemon, "k"), target);
    }
    let status = daemon.json(&["status"]);
    assert_eq!((status["sessions"].as_u64(), status["attachments"].as_u64()), (Some(1), Some(8)), "{status}");
    daemon.ctl(&["detach", "job-0"]).ok();
    assert!(mounts_at(&targets[0]).is_empty());
    assert_same_tree(&source(&daemon, "k"), &targets[1]);
}

#[test]
fn several_checkpoints_are_directories_of_one_target() {
    let daemon = daemon_with(&["base model", "adapter"], &[]);
    let target = daemon.place().dir("at");
    daemon.attach_at("job", &["base model", "adapter"], &target).ok();
    let mut names: Vec<_> =
        fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["adapter", "base model"]);
    for name in names {
        assert_same_tree(&source(&daemon, &name), &target.join(&name));
    }
    assert!(fs::write(target.join("new"), "x").is_err(), "the target itself is read-only too");

    let job = daemon.rows("jobs").into_iter().find(|row| row["job"] == "job").unwrap();
    assert_eq!(job["checkpoints"].as_array().map(Vec::len), Some(2), "{job}");
    assert_eq!(job["checkpoints"][1]["path"].as_str(), target.join("adapter").to_str());
    daemon.ctl(&["release", "job"]).ok();
    assert!(mounts_at(&target).is_empty() && mounts_at(&target.join("adapter")).is_empty());
}

#[test]
fn two_checkpoints_that_would_be_one_directory_are_refused() {
    let daemon = daemon_with(&["a/b", "a_b"], &[]);
    let target = daemon.place().dir("at");
    daemon.attach_at("job", &["a/b", "a_b"], &target).refused(&[2], &["a_b"]);
    assert!(mounts_at(&target).is_empty());
    daemon.attach_at("job", &["a/b"], &target).ok();
    assert_same_tree(&source(&daemon, "a/b"), &target);
}

#[test]
fn attaching_again_is_answered_like_the_first_time() {
    let daemon = daemon_with(&["k", "other"], &[]);
    let target = daemon.attach("job", "k");
    for _ in 0..3 {
        daemon.attach_at("job", &["k"], &target).ok();
    }
    assert_eq!(mounts_at(&target).len(), 1, "views are not stacked");
    let elsewhere = daemon.place().dir("elsewhere");
    daemon.attach_at("job", &["k"], &elsewhere).refused(&[4], &["job"]);
    daemon.attach_at("job", &["other"], &target).refused(&[4], &["job"]);

    for _ in 0..2 {
        daemon.ctl(&["detach", "job"]).ok();
        assert!(mounts_at(&target).is_empty());
    }
    daemon.attach_at("job", &["k"], &target).ok();
    for _ in 0..2 {
        daemon.ctl(&["release", "job"]).ok();
    }
    assert!(daemon.rows("jobs").iter().all(|row| row["job"] != "job"));
}

#[test]
fn attaching_several_again_after_a_rename_is_answered_like_the_first_time() {
    let daemon = daemon_with(&["k", "other"], &[]);
    let target = daemon.place().dir("at");
    daemon.attach_at("job", &["k", "other"], &target).ok();
    daemon.ctl(&["rename", "other", "another"]).ok();
    daemon.attach_at("job", &["k", "another"], &target).ok();
    assert_same_tree(&source(&daemon, "other"), &target.join("other"));
    daemon.attach_at("job", &["another", "k"], &target).refused(&[4], &["job"]);
}

#[test]
fn without_a_target_the_view_is_in_the_runtime_directory() {
    let daemon = daemon_with(&["k"], &[]);
    let attached = daemon.json(&["attach", "job", "k"]);
    let target = daemon.place().join("run/jobs/job/checkpoint");
    assert_eq!(attached["target"].as_str(), target.to_str(), "{attached}");
    assert_same_tree(&source(&daemon, "k"), &target);
}

#[test]
fn an_open_file_stays_readable_after_detaching() {
    let daemon = daemon_with(&["k"], &[]);
    let target = daemon.attach("job", "k");
    let mut file = File::open(target.join("w.bin")).unwrap();
    daemon.ctl(&["detach", "job"]).ok();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, fs::read(source(&daemon, "k").join("w.bin")).unwrap());
}

#[test]
fn mapped_pages_are_the_bytes() {
    for env in [&[][..], &[NO_PASSTHROUGH]] {
        let daemon = daemon_with(&["k"], env);
        let target = daemon.attach("job", "k");
        let file = File::open(target.join("w.bin")).unwrap();
        // SAFETY: the mount is read-only and its content immutable; nothing truncates the file under the map.
        let mapped = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let expected = fs::read(source(&daemon, "k").join("w.bin")).unwrap();
        assert!(mapped[..] == expected[..], "{env:?}");
    }
}

#[test]
fn a_process_sees_it_in_its_own_mount_namespace() {
    let daemon = daemon_with(&["k"], &[]);
    let target = daemon.place().dir("inside");
    let container = Container::start();
    let pid = container.0.id().to_string();
    let target_text = target.to_str().unwrap();
    daemon.ctl(&["attach", "job", "k", "--at", target_text, "--pid", &pid]).ok();
    assert!(mounts_at(&target).is_empty(), "the host does not see it");
    container.shell(&format!("cmp '{target_text}/w.bin' '{}/w.bin'", source(&daemon, "k").display())).ok();
    let refused = container.shell(&format!("touch '{target_text}/new'"));
    assert_ne!(refused.code, Some(0), "{refused}");
    daemon.ctl(&["detach", "job"]).ok();
    container.shell(&format!("test ! -e '{target_text}/w.bin'")).ok();
}

#[test]
fn a_process_that_is_not_there_is_refused() {
    let daemon = daemon_with(&["k"], &[]);
    let target = daemon.place().dir("inside");
    daemon
        .ctl(&["attach", "job", "k", "--at", target.to_str().unwrap(), "--pid", "4194303"])
        .refused(&[3], &["4194303"]);
}

/// The kernel gives numbers of namespaces and mounts again, so the view that comes next may have all those of the one that went.
#[test]
fn what_is_released_of_a_process_that_is_gone_is_not_its_successors_view() {
    let daemon = daemon_with(&["k"], &[]);
    let (file, target) = (source(&daemon, "k").join("w.bin"), daemon.place().dir("inside"));
    let at = target.to_str().unwrap();
    // So that it is one session, and one file system, all along.
    daemon.attach("stays", "k");
    for round in 0..8 {
        let (first, second) = (format!("first-{round}"), format!("second-{round}"));
        let gone = Container::start();
        daemon.ctl(&["attach", &first, "k", "--at", at, "--pid", &gone.0.id().to_string()]).ok();
        drop(gone);
        let container = Container::start();
        daemon.ctl(&["attach", &second, "k", "--at", at, "--pid", &container.0.id().to_string()]).ok();
        daemon.ctl(&["release", &first]).ok();
        container.shell(&format!("cmp '{at}/w.bin' '{}'", file.display())).ok();
        daemon.ctl(&["release", &second]).ok();
    }
}

/// A process in a mount namespace of its own.
struct Container(Child);

impl Container {
    fn start() -> Self {
        let child = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sleep", "600"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let container = Self(child);
        let program = format!("/proc/{}/exe", container.0.id());
        // It begins when the namespace is all that it is to be: a new one still shares what is mounted with ours.
        wait_until("the process has a namespace of its own", Duration::from_secs(60), || {
            fs::read_link(&program).is_ok_and(|program| program.ends_with("sleep"))
        });
        container
    }

    fn shell(&self, script: &str) -> Ran {
        run(Command::new("nsenter").args(["-m", "-t", &self.0.id().to_string(), "sh", "-euc", script]))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn where_mounts_cannot_be_made_by_descriptor_they_are_made_by_path() {
    let mut daemon = Daemon::start_without("keeper", &MOUNTS_BY_DESCRIPTOR);
    assert_eq!(daemon.json(&["status"])["features"]["open_tree"], false);
    keep(&daemon, &["a", "b"]);
    let container = Container::start();
    let (pid, inside) = (container.0.id().to_string(), daemon.place().dir("inside"));
    let inside = inside.to_str().unwrap();
    container.shell(&format!("mount -t tmpfs inside '{inside}'; mkdir '{inside}/one' '{inside}/both'")).ok();
    let (one, both) = (daemon.place().dir("one"), daemon.place().dir("both"));
    daemon.attach_at("one", &["a"], &one).ok();
    daemon.attach_at("both", &["a", "b"], &both).ok();
    daemon.ctl(&["attach", "one-inside", "b", "--pid", &pid, "--at", &format!("{inside}/one")]).ok();
    daemon.ctl(&["attach", "both-inside", "a", "b", "--pid", &pid, "--at", &format!("{inside}/both")]).ok();

    let mut open = File::open(one.join("w.bin")).unwrap();
    let is_right = |daemon: &Daemon| {
        assert_same_tree(&source(daemon, "a"), &one);
        assert_same_tree(&source(daemon, "b"), &both.join("b"));
        let (a, b) = (source(daemon, "a"), source(daemon, "b"));
        let compare = |at: &str, with: &Path| format!("diff -r '{inside}/{at}' '{}'; ", with.display());
        container.shell(&[compare("one", &b), compare("both/a", &a), compare("both/b", &b)].concat()).ok();
    };
    is_right(&daemon);
    assert_eq!(xattr(&one.join("w.bin"), "user.ckptd.state"), "passthrough");
    for closed in [&one, &both, &both.join("a")] {
        assert_eq!(fs::write(closed.join("x"), "").unwrap_err().raw_os_error(), Some(nix::libc::EROFS));
        assert_eq!(mounts_at(closed).len(), 1);
    }
    container
        .shell(&format!("! touch '{inside}/both/x'; grep -c '{inside}/.* ro,nosuid,nodev' /proc/mounts | grep -x 4"))
        .ok();
    daemon.ctl(&["attach", "late", "a", "--at", one.to_str().unwrap()]).refused(&[4], &["mounted", "already"]);
    daemon.ctl(&["release", "late"]).ok();
    is_right(&daemon);

    // One of the views is as a crash leaves it that comes before its number is recorded.
    let catalog = rusqlite::Connection::open(daemon.state().join("catalog.db")).unwrap();
    catalog.busy_timeout(Duration::from_secs(60)).unwrap();
    let forget =
        "UPDATE jobs SET mounted = json_set(mounted, '$.mount_id', 0, '$.unique_id', null) WHERE job = 'both-inside'";
    assert_eq!(catalog.execute(forget, ()).unwrap(), 1);
    drop(catalog);
    let server = daemon.server();
    nix::sys::signal::kill(server, nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = || daemon.ctl(&["--json", "status"]);
    let succeeded = |status: &Ran| status.code == Some(0) && status.json()["pid"] != server.as_raw();
    wait_until("a successor answers", Duration::from_secs(180), || succeeded(&status()));
    let said = status().json()["reconciled"].as_str().unwrap().to_owned();
    assert!(said.contains("3 views were left as they were, 1 made again, 0 lost"), "{said}");
    is_right(&daemon);
    let mut found = Vec::new();
    open.read_to_end(&mut found).unwrap();
    assert!(found == fs::read(source(&daemon, "a").join("w.bin")).unwrap());

    for job in ["one", "both", "one-inside", "both-inside"] {
        daemon.ctl(&["release", job]).ok();
    }
    container.shell(&format!("! grep '{inside}/' /proc/mounts")).ok();
    assert!([&one, &both].iter().all(|target| mounts_at(target).is_empty()));
    daemon.stop();
    assert_eq!(mounts_at(&daemon.place().join("run/sessions")).len(), 0, "a daemon that nobody needs leaves a mount");
}

#[test]
fn fifty_jobs_attach_at_once() {
    let daemon = daemon_with(&["a", "b", "c"], &[]);
    let targets: Vec<_> = (0..50).map(|job| daemon.place().dir(&format!("t{job}"))).collect();
    thread::scope(|scope| {
        for (job, target) in targets.iter().enumerate() {
            let (daemon, name) = (&daemon, ["a", "b", "c"][job % 3]);
            scope.spawn(move || daemon.attach_at(&format!("job-{job}"), &[name], target).ok());
        }
    });
    for (job, target) in targets.iter().enumerate() {
        assert_same_tree(&source(&daemon, ["a", "b", "c"][job % 3]), target);
        assert_eq!(mounts_at(target).len(), 1);
    }
    let status = daemon.json(&["status"]);
    assert_eq!((status["sessions"].as_u64(), status["attachments"].as_u64()), (Some(3), Some(50)), "{status}");
    thread::scope(|scope| {
        for job in 0..50 {
            let daemon = &daemon;
            scope.spawn(move || daemon.ctl(&["release", &format!("job-{job}")]).ok());
        }
    });
    assert!(targets.iter().all(|target| mounts_at(target).is_empty()));
    assert_eq!(daemon.json(&["status"])["attachments"], 0);
}

#[test]
fn readers_of_both_kinds_at_once_get_the_same_bytes() {
    let daemon = daemon_with(&["k"], &[]);
    let target = daemon.attach("job", "k");
    let expected = b3sum(&source(&daemon, "k").join("w.bin"));
    thread::scope(|scope| {
        for _ in 0..16 {
            let (target, expected) = (&target, &expected);
            scope.spawn(move || (0..20).for_each(|_| assert_eq!(&b3sum(&target.join("w.bin")), expected)));
        }
    });
    assert!(matches!(xattr(&target.join("w.bin"), "user.ckptd.state").as_str(), "passthrough" | "daemon"));
}

#[test]
fn attaching_waits_for_a_checkpoint_that_is_filling() {
    let daemon = Daemon::start_with(&[LOOPBACK]);
    let site = Site::open();
    site.limit(16 * MIB);
    let bytes = Arc::new(Random::new(seed()).bytes(24 << 20));
    let url = site.put("/w.bin", Page::Ranged(Arc::clone(&bytes)));
    daemon.ctl(&["create", "w", "--type", "web", "--uri", &url]).ok();
    let target = daemon.attach("job", "w");
    assert_eq!(b3sum(&target.join("w.bin")), blake3::hash(&bytes).to_hex().to_string());
    assert_eq!(daemon.json(&["get", "w"])["state"], "ready");
}

#[test]
fn views_of_files_are_of_the_right_checkpoint_after_many_came_and_went() {
    let daemon = Daemon::start();
    for round in 0..30_u64 {
        let source = daemon.place().dir("changing");
        random_file(&source.join("w.bin"), seed() + round, 100_000);
        daemon.capture("k", &source);
        let target = daemon.attach("job", "k");
        assert_same_file(&source.join("w.bin"), Path::new(&target.join("w.bin")));
        daemon.ctl(&["release", "job"]).ok();
        daemon.ctl(&["remove", "k", "--yes"]).ok();
    }
    assert_eq!(daemon.json(&["status"])["attachments"], 0);
}

/// Checkpoints do not change: what a job has been told once is true for as long as the kernel remembers it.
#[test]
fn what_was_looked_at_once_is_answered_by_the_kernel_alone() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 2 * MIB);
    fs::create_dir(source.join("deep")).unwrap();
    fs::write(source.join("deep/config.json"), "{}").unwrap();
    std::os::unix::fs::symlink("deep/config.json", source.join("link")).unwrap();
    daemon.capture("k", &source);
    let target = daemon.attach("job", "k");
    let held = File::open(target.join("w.bin")).unwrap();
    let look = {
        let target = target.clone();
        move || {
            let mut seen: Vec<_> = ["", "w.bin", "deep", "deep/config.json", "link", "no-such", "deep/no-such"]
                .map(|path| {
                    format!("{:?}", target.join(path).symlink_metadata().map(|found| (found.ino(), found.len())))
                })
                .into();
            seen.push(format!("{:?}", fs::read_link(target.join("link"))));
            let names = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name());
            seen.extend(names.map(|name| format!("{name:?}")));
            seen
        }
    };
    let expected = look();
    let (say, said) = mpsc::channel();
    let stopped = Still::of(Pid::from_raw(i32::try_from(daemon.pid()).unwrap()));
    thread::spawn(move || {
        let mut bytes = Vec::new();
        (&held).read_to_end(&mut bytes).unwrap();
        let _ = say.send((look(), bytes));
    });
    let answered = said.recv_timeout(Duration::from_secs(60));
    drop(stopped);
    let (seen, bytes) = answered.expect("a question reached the daemon, which is stopped");
    assert_eq!(seen, expected);
    assert!(bytes == fs::read(source.join("w.bin")).unwrap());
}
