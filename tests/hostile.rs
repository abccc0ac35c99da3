//! Tenants who try: names and paths that mean something else, links and swaps under the daemon's hands, files that are no files, and jobs
//! that do not let go. Whatever they do, nothing outside of theirs is mounted on, read, or changed, and nobody else notices.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use support::corpus::{random_file, seed};
use support::daemon::{Daemon, NO_PASSTHROUGH};
use support::faultfs::FaultFs;
use support::files::{assert_same_tree, regular_files, walk};
use support::jail::Jail;
use support::place::{mounts, mounts_at};
use support::ran::{Ran, run, run_for, shell, wait_until};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);
/// What is nobody's to read through us.
const SECRET: &str = "the secret of somebody else";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A daemon with one small checkpoint `k`, and the directory it was made of.
fn daemon_with_k() -> (Daemon, PathBuf) {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    random_file(&source.join("w.bin"), seed(), 3 * MIB);
    daemon.capture("k", &source);
    (daemon, source)
}

fn capture(daemon: &Daemon, args: &[&str]) -> Ran {
    daemon.ctl(&[&["capture"], args].concat())
}

/// Swaps two paths for each other as fast as it can, until it is dropped.
struct Swapping {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Swapping {
    fn start(one: PathBuf, other: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut swaps = 0;
            while !stopped.load(Ordering::Relaxed) {
                // A mount point on one of them refuses.
                if renameat2(AT_FDCWD, &one, AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE).is_ok() {
                    swaps += 1;
                }
                thread::sleep(Duration::from_micros(200));
            }
            swaps
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops; how often it has swapped.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn ids_that_are_no_file_names_are_refused() {
    let (daemon, source) = daemon_with_k();
    let long = "x".repeat(10_000);
    let before = walk(&daemon.place().join("run"));
    for bad in [
        "../x",
        "a/b",
        "/etc",
        ".",
        "..",
        ".hidden",
        "a\nb",
        "a\tb",
        "\u{1b}[2J",
        "",
        " ",
        "a b",
        "ü",
        "\u{202e}a",
        "%2e%2e/",
        &long,
    ] {
        let target = daemon.place().dir("at");
        for args in [
            &["attach", bad, "k", "--at", text(&target)][..],
            &["reserve", bad, "k"],
            &["capture", bad, "--from", text(&source)],
            &["capture", "job", "--id", bad, "--from", text(&source)],
        ] {
            // An id that is empty is none.
            if bad.is_empty() && args.contains(&"--id") {
                continue;
            }
            let refused = daemon.ctl(args).refused(&[2], &[]);
            assert!(!refused.stderr.contains('\u{1b}') && !refused.stderr.contains('\u{202e}'), "{refused:?}");
        }
    }
    daemon.ctl(&["attach", "--", "-rf", "k"]).refused(&[2], &["-rf"]);
    // Much is said of many, and it arrives.
    for job in 0..300 {
        daemon.ctl(&["reserve", &format!("{job:0120}"), "k"]).ok();
    }
    daemon.ctl(&["remove", "k", "--yes"]).refused(&[4], &["in use by jobs"]);
    for job in 0..300 {
        daemon.ctl(&["release", &format!("{job:0120}")]).ok();
    }
    assert!(daemon.rows("jobs").is_empty());
    assert_eq!(daemon.rows("list").len(), 1);
    assert_eq!(walk(&daemon.place().join("run")), before, "something was made for a job that cannot be");
}

#[test]
fn names_of_checkpoints_are_one_directory_each_whatever_they_are() {
    let (daemon, source) = daemon_with_k();
    let long = "n".repeat(255);
    let names = ["../../etc", "/", "..", ".", "-rf", "%2e%2e%2f", "a b\\040c", "Ünïcode 👩\u{200d}🔬", &long];
    for name in names {
        capture(&daemon, &["job", "--from", text(&source), &format!("--name={name}")]).ok();
    }
    let too_long = "n".repeat(10_000);
    for bad in ["a\nb", "a\u{1b}[31mb", "a\u{202e}gnp", "a\u{200b}", " a", &too_long] {
        capture(&daemon, &["job", "--from", text(&source), "--name", bad]).refused(&[2], &["name"]);
        daemon.ctl(&["rename", "k", bad]).refused(&[2], &["name"]);
        capture(&daemon, &["job", "--from", text(&source), "--owner", bad]).refused(&[2], &["owner"]);
    }
    let target = daemon.place().dir("several");
    // Those that begin with `-` are no options.
    let attach =
        |names: &[&str]| run(daemon.ctl_command().args(["attach", "job", "--at"]).arg(&target).arg("--").args(names));
    attach(&names).refused(&[2], &["`_`"]);
    let names = names.map(|name| if name == "." { "..." } else { name });
    capture(&daemon, &["job", "--from", text(&source), "--name=..."]).ok();
    attach(&names).ok();
    let mut found: Vec<_> =
        fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let mut expected = [".._.._etc", "_", "__", "...", "-rf", "%2e%2e%2f", "a b\\040c", "Ünïcode 👩\u{200d}🔬", &long]
        .map(str::to_owned);
    expected.sort();
    assert_eq!(found, expected);
    for directory in found {
        assert_same_tree(&source, &target.join(directory));
    }
}

#[test]
fn a_target_that_is_not_plainly_the_jobs_is_refused() {
    let (daemon, _) = daemon_with_k();
    let place = daemon.place();
    let view = daemon.attach("first", "k");
    fs::create_dir(place.join("real")).unwrap();
    symlink(place.join("real"), place.join("link")).unwrap();
    symlink(place.path(), place.join("up")).unwrap();
    fs::write(place.join("file"), "x").unwrap();
    fs::create_dir_all(place.join("run/empty")).unwrap();
    fs::create_dir_all(daemon.state().join("quarantine")).unwrap();
    let below = || mounts().into_iter().filter(|mount| mount.target.starts_with(place.path())).count();
    let before = below();
    for (target, words) in [
        (place.join("link"), "symbolic link"),
        (place.join("up/real"), "symbolic link"),
        (place.join("real/../real"), "absolute"),
        (view.clone(), "already"),
        (place.join("file"), "directory"),
        (place.join("none"), "not exist"),
        (place.join("run"), "ckptd's own"),
        (place.join("run/empty"), "ckptd's own"),
        (place.join("run/sessions"), "ckptd's own"),
        (place.join("run/jobs"), "ckptd's own"),
        (daemon.state().join("quarantine"), "ckptd's own"),
        (daemon.state().join("filling"), "ckptd's own"),
        ("/".into(), "mounted"),
        ("/proc/self/root".into(), ""),
    ] {
        daemon.attach_at("job", &["k"], &target).refused(&[2, 3, 4], &[words]);
        // A process that sees what the host sees changes nothing about it.
        let pid = std::process::id().to_string();
        let args = ["attach", "job", "k", "--pid", &pid, "--at", text(&target)];
        daemon.ctl(&args).refused(&[2, 3, 4], &[words]);
    }
    assert_eq!(below(), before);
    assert!(daemon.rows("jobs").iter().all(|row| row["job"] != "job"));
}

#[test]
fn a_target_that_is_swapped_for_a_link_is_never_followed() {
    let (daemon, _) = daemon_with_k();
    let place = daemon.place();
    // What the job has: a directory for the view. What it swaps it for, or what is above it: a link to somewhere else.
    let (own, victim) = (place.dir("own"), place.dir("victim"));
    fs::create_dir_all(own.join("a/target")).unwrap();
    fs::create_dir_all(victim.join("target")).unwrap();
    symlink(&victim, own.join("b")).unwrap();
    let swapping = Swapping::start(own.join("a"), own.join("b"));
    let target = own.join("a/target");
    let (mut shown, mut refused) = (0, 0);
    for round in 0..120 {
        let job = format!("job-{round}");
        let ran = daemon.attach_at(&job, &["k"], &target);
        match ran.code {
            Some(0) => shown += 1,
            _ => {
                refused += 1;
                ran.refused(&[2, 3, 4], &[]);
            }
        }
        assert!(
            mounts_at(&victim.join("target")).is_empty() && mounts_at(&victim).is_empty(),
            "mounted at the victim's"
        );
        daemon.ctl(&["release", &job]).ok();
        assert!(!mounts().iter().any(|mount| mount.target.starts_with(&own)), "a view is left");
    }
    let swaps = swapping.end();
    assert!(shown > 0 && refused > 0 && swaps > 100, "{shown} shown, {refused} refused, {swaps} swaps");
    assert!(fs::read_dir(victim.join("target")).unwrap().next().is_none());
}

#[test]
fn links_of_a_process_lead_it_nowhere_but_into_its_own_root() {
    let (daemon, source) = daemon_with_k();
    let host = daemon.place().dir("host");
    fs::write(host.join("secret"), SECRET).unwrap();
    let jail = Jail::start();
    let (output, pid) = (jail.on_host("/opt/ml/output"), jail.pid_text());
    // To the host's: by an absolute path, by climbing, and by what only looks like its own.
    let climb = format!("../../../../../../../../../../../..{}", host.display());
    for target in [text(&host), &climb] {
        fs::remove_dir(&output).or_else(|_| fs::remove_file(&output)).unwrap();
        symlink(target, &output).unwrap();
        capture(&daemon, &["job", "--pid", &pid]).refused(&[2, 3], &[]);
        let at = jail.on_host("/opt/ml/checkpoint");
        fs::remove_dir(&at).or_else(|_| fs::remove_file(&at)).unwrap();
        symlink(target, &at).unwrap();
        daemon.ctl(&["attach", "job", "k", "--pid", &pid]).refused(&[2, 3, 4], &[]);
        assert!(mounts_at(&host).is_empty());
    }
    // The same path in the root of the job is the job's to give.
    fs::create_dir_all(jail.on_host(text(&host))).unwrap();
    fs::write(jail.on_host(text(&host)).join("own"), "own").unwrap();
    capture(&daemon, &["job", "--pid", &pid, "--id", "c"]).ok();
    let target = daemon.attach("next", "c");
    assert_eq!(walk(&target), [target.join("own")]);
    // A process that has the host's root: its links lead to what is the host's.
    let evil = daemon.place().join("evil");
    symlink(&host, &evil).unwrap();
    let own = std::process::id().to_string();
    capture(&daemon, &["job", "--pid", &own, "--from", text(&evil)]).refused(&[2], &["symbolic link"]);
    capture(&daemon, &["job", "--pid", &own, "--from", text(&host), "--id", "plain"]).ok();
    // By a path of the host a link that the job has made is not followed at all.
    for path in [output.clone(), jail.on_host("/opt/ml/output/x")] {
        capture(&daemon, &["job", "--from", text(&path)]).refused(&[2], &["symbolic link"]);
    }
    assert_same_tree(&source, &daemon.attach("last", "k"));
}

#[test]
fn what_a_job_could_not_read_it_cannot_have_captured() {
    let (daemon, _) = daemon_with_k();
    let jail = Jail::start_with(
        "mount --bind /proc proc; mkdir opt/ml/output/inner opt/ml/output/dir opt/ml/kernel; touch opt/ml/output/inner/f opt/ml/x; \
         mount --bind /proc opt/ml/kernel; ln -s /proc/self/cwd opt/ml/magic; ln -s /proc/self/root opt/ml/own",
    );
    let pid = jail.pid_text();
    for (directory, code, word) in [
        ("/proc", 2, "proc"),
        ("/opt/ml/kernel", 2, "proc"),
        ("/proc/self/root/etc", 2, "links"),
        ("/opt/ml/magic/etc", 2, "links"),
        ("/opt/ml/own", 2, "links"),
        ("/opt/ml/x", 2, "directory"),
    ] {
        capture(&daemon, &["job", "--pid", &pid, "--from", directory]).refused(&[code], &[word]);
    }
    // Whatever is mounted inside of the output: a directory, a single file.
    let mount = |what: &str, at: &str| {
        let pid = pid.clone();
        run(Command::new("nsenter").args(["-m", "-t", &pid, "mount", "--bind", what]).arg(jail.on_host(at))).ok();
    };
    capture(&daemon, &["job", "--pid", &pid, "--id", "fine"]).ok();
    mount("/proc", "/opt/ml/output/dir");
    capture(&daemon, &["job", "--pid", &pid]).refused(&[2], &["/opt/ml/output/dir", "mounted"]);
    run(Command::new("nsenter").args(["-m", "-t", &pid, "umount"]).arg(jail.on_host("/opt/ml/output/dir"))).ok();
    mount("/etc/passwd", "/opt/ml/output/inner/f");
    capture(&daemon, &["job", "--pid", &pid]).refused(&[2], &["/opt/ml/output/inner/f", "mounted"]);
    let ready = daemon.rows("list").into_iter().filter(|row| row["state"] == "ready").count();
    assert_eq!(ready, 2);
}

/// The job's user; nobody of the host's.
const JOB: u32 = 61_234;

/// What root alone may read, in ways that a job may come to show us: bound, behind a link, in a directory that all may list.
const CLOSED: &str = "mkdir -p srv/closed mnt opt/ml/listed opt/ml/group opt/ml/bound; mount -t tmpfs other mnt; mkdir mnt/closed; \
                      for d in srv/closed mnt/closed opt/ml/listed opt/ml/group; do printf '%s' 'the secret of somebody else' > $d/key; \
                      chmod 600 $d/key; chmod 700 $d; done; mount --bind srv/closed opt/ml/bound; ln -s /mnt/closed opt/ml/link; chmod 755 opt/ml/listed; \
                      chgrp 61300 opt/ml/group opt/ml/group/key; chmod 750 opt/ml/group; chmod 640 opt/ml/group/key; \
                      printf own > opt/ml/output/own; chmod 600 opt/ml/output/own; chmod 700 opt/ml/output; chown -R 61234:61234 opt/ml/output";

/// Captures all of it through a process that may read none of it.
fn assert_closed(daemon: &Daemon, pid: &str) {
    for directory in ["/opt/ml/bound", "/opt/ml/link", "/mnt/closed", "/srv/closed", "/opt/ml/listed"] {
        let ran = capture(daemon, &["job", "--pid", pid, "--from", directory]);
        ran.refused(&[2], &[&format!("process {pid}"), directory, "may not"]);
    }
    for row in daemon.rows("list").iter().filter(|row| row["state"] != "ready") {
        daemon.ctl(&["remove", row["id"].as_str().unwrap(), "--yes"]).ok();
    }
    for file in regular_files(daemon.state()) {
        let bytes = fs::read(&file).unwrap();
        let found = bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
        assert!(!found, "{}", file.display());
    }
}

#[test]
fn a_job_that_is_not_root_has_captured_what_its_user_may_read() {
    let mut daemon = Daemon::start();
    let rights = "--reuid 61234 --regid 61234 --groups 61300";
    let jail = Jail::start_as(rights, CLOSED);
    let pid = jail.pid_text();
    assert_closed(&daemon, &pid);
    capture(&daemon, &["job", "--pid", &pid, "--id", "own"]).ok();
    assert_same_tree(&jail.inside("/opt/ml/output"), &daemon.attach("next", "own"));
    // A daemon that is started again asks who it is again.
    daemon.kill9();
    daemon.restart();
    assert_closed(&daemon, &pid);
    let group = jail.inside("/opt/ml/group");
    capture(&daemon, &["job", "--pid", &pid, "--from", "/opt/ml/group", "--id", "group"]).ok();
    assert_same_tree(&group, &daemon.attach("last", "group"));
    // Without that group.
    let other = Jail::start_as("--reuid 61234 --regid 61234 --clear-groups", CLOSED);
    let pid = other.pid_text();
    capture(&daemon, &["job", "--pid", &pid, "--from", "/opt/ml/group"]).refused(&[2], &["may not"]);
    // Root may read it all, and so had it captured before; but not root whose capabilities were taken away.
    let root = Jail::start_with(CLOSED);
    for directory in ["/opt/ml/bound", "/opt/ml/link", "/opt/ml/listed", "/opt/ml/group", "/opt/ml/output"] {
        capture(&daemon, &["job", "--pid", &root.pid_text(), "--from", directory]).ok();
    }
    let bare = Jail::start_as("--bounding-set -dac_override,-dac_read_search", CLOSED);
    let pid = bare.pid_text();
    capture(&daemon, &["job", "--pid", &pid, "--from", "/opt/ml/output"]).refused(&[2], &["may not"]);
    capture(&daemon, &["job", "--pid", &pid, "--from", "/opt/ml/bound"]).ok();
    // A program that runs with rights of its own.
    let other = Jail::start_as("--ruid 61234 --euid 0", CLOSED);
    capture(&daemon, &["job", "--pid", &other.pid_text()]).refused(&[2], &["rights of another"]);
}

#[test]
fn a_job_that_is_root_of_its_own_namespace_is_its_user_all_the_same() {
    let daemon = Daemon::start();
    let closed = daemon.place().dir("closed");
    fs::write(closed.join("key"), SECRET).unwrap();
    fs::set_permissions(closed.join("key"), fs::Permissions::from_mode(0o600)).unwrap();
    let setup = "mount -t tmpfs t /opt; mkdir -p /opt/ml/output /opt/ml/models; mount --bind \"$1\" /opt/ml/output; \
                 echo own > /opt/ml/models/own; chmod 600 /opt/ml/models/own";
    for (mode, word) in [(0o700, "/opt/ml/output"), (0o711, "/opt/ml/output"), (0o755, "/opt/ml/output/key")] {
        fs::set_permissions(&closed, fs::Permissions::from_mode(mode)).unwrap();
        let jail = Jail::start_own_root(JOB, setup, &closed);
        let ran = capture(&daemon, &["job", "--pid", &jail.pid_text()]);
        ran.refused(&[2], &[&format!("user {JOB}"), word]);
        let models = ["job", "--pid", &jail.pid_text(), "--from", "/opt/ml/models"];
        capture(&daemon, &models).ok();
    }
    for blob in regular_files(daemon.state()) {
        assert!(!fs::read(&blob).unwrap().starts_with(SECRET.as_bytes()), "{}", blob.display());
    }
}

#[test]
fn a_job_behind_its_own_file_system_is_not_asked_anything() {
    let daemon = Daemon::start();
    let silent = FaultFs::mount(vec![("f".to_owned(), b"f".to_vec())]);
    let setup = format!("mount --bind {} opt/ml; ln -s /opt/ml opt/link", silent.root().display());
    let jail = Jail::start_with(&setup);
    silent.freeze();
    for directory in ["/opt/ml", "/opt/ml/output", "/opt/link"] {
        let mut command = daemon.ctl_command();
        let command = command.args(["capture", "job", "--pid", &jail.pid_text(), "--from", directory]);
        run_for(command, LIMIT).refused(&[2], &["FUSE"]);
    }
    assert!(daemon.rows("list").is_empty());
    silent.let_go();
}

#[test]
fn links_and_odd_files_of_an_output_are_kept_or_left_out_and_nothing_is_held_up() {
    let (daemon, _) = daemon_with_k();
    let output = daemon.place().dir("output");
    let outside = daemon.place().dir("outside");
    fs::write(outside.join("secret"), SECRET).unwrap();
    fs::write(output.join("file"), "bytes").unwrap();
    fs::hard_link(output.join("file"), output.join("hard")).unwrap();
    symlink("/etc", output.join("absolute")).unwrap();
    symlink("../outside/secret", output.join("climbing")).unwrap();
    symlink("loop", output.join("loop")).unwrap();
    symlink("x".repeat(4095), output.join("long")).unwrap();
    fs::write(output.join("unreadable"), "u").unwrap();
    fs::set_permissions(output.join("unreadable"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::write(output.join("setuid"), "s").unwrap();
    fs::set_permissions(output.join("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::write(output.join("n".repeat(255)), "n").unwrap();
    fs::write(output.join("a\nb\u{1b}[2J"), "control").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(output.join("socket")).unwrap();
    shell("mkfifo \"$1/fifo\"; mknod \"$1/watchdog\" c 10 130; mknod \"$1/disk\" b 7 200", &[&output]).ok();
    run_for(daemon.ctl_command().args(["capture", "job", "--id", "c", "--from", text(&output)]), LIMIT).ok();
    let target = daemon.attach("next", "c");
    for (link, leads) in [("absolute", "/etc"), ("climbing", "../outside/secret"), ("loop", "loop")] {
        assert_eq!(fs::read_link(target.join(link)).unwrap(), Path::new(leads));
    }
    assert_eq!(fs::read(target.join("hard")).unwrap(), b"bytes");
    assert_eq!(fs::read(target.join("unreadable")).unwrap(), b"u");
    assert_eq!(target.join("setuid").metadata().unwrap().mode() & 0o7777, 0o555);
    for left_out in ["fifo", "socket", "watchdog", "disk"] {
        assert!(target.join(left_out).symlink_metadata().is_err(), "{left_out}");
    }
    assert_eq!(walk(&target).len(), walk(&output).len() - 4);

    // Deeper than anything real, and paths longer than any.
    let deep = daemon.place().dir("deep");
    shell("cd \"$1\"; n=0; while [ $n -lt 200 ]; do mkdir d; cd d; n=$((n+1)); done; echo x > f", &[&deep]).ok();
    capture(&daemon, &["job", "--from", text(&deep)]).refused(&[2], &["too deeply"]);
    let long = daemon.place().dir("long");
    let script =
        "import os, sys; os.chdir(sys.argv[1]); x = 'x' * 250; [(os.mkdir(x), os.chdir(x)) for _ in range(20)]";
    run(Command::new("python3").args(["-c", script]).arg(&long)).ok();
    capture(&daemon, &["job", "--from", text(&long)]).refused(&[2], &["longer than"]);
}

#[test]
fn a_directory_that_is_swapped_for_a_link_while_it_is_captured_gives_no_other_bytes() {
    let (daemon, _) = daemon_with_k();
    let (output, outside) = (daemon.place().dir("output"), daemon.place().dir("outside"));
    fs::create_dir_all(output.join("a")).unwrap();
    for file in 0..200 {
        fs::write(output.join(format!("a/{file}")), format!("own {file}")).unwrap();
        fs::write(outside.join(file.to_string()), SECRET).unwrap();
        fs::write(output.join(format!("f{file}")), "own").unwrap();
    }
    symlink(&outside, output.join("b")).unwrap();
    // A file for a link, too; and for a device, which must not be opened.
    symlink(outside.join("1"), output.join("link")).unwrap();
    shell("mknod \"$1/device\" c 1 5", &[&output]).ok();
    let swapping = [
        Swapping::start(output.join("a"), output.join("b")),
        Swapping::start(output.join("f1"), output.join("link")),
        Swapping::start(output.join("f2"), output.join("device")),
    ];
    // At once, since each looks for long: the swaps see to it that no two find the same.
    let captured = thread::scope(|scope| {
        let captures = ["c0", "c1", "c2"].map(|id| {
            let mut command = daemon.ctl_command();
            command.args(["capture", &format!("job-{id}"), "--id", id, "--from", text(&output)]);
            (id, scope.spawn(move || run_for(&mut command, LIMIT)))
        });
        captures.map(|(id, capture)| (id, capture.join().unwrap()))
    });
    let mut ready = 0;
    for (id, ran) in captured {
        if ran.code != Some(0) {
            // By the names of what changed, or by the one that was met where even a last listing met one.
            ran.refused(&[4], &["since"]);
            continue;
        }
        ready += 1;
        let target = daemon.attach(id, id);
        for file in regular_files(&target) {
            let bytes = fs::read_to_string(&file).unwrap();
            assert!(bytes.starts_with("own"), "{}: {bytes}", file.display());
        }
    }
    for one in swapping {
        assert!(one.end() > 100);
    }
    println!("{ready} of 3 came to rest by chance");
    for blob in regular_files(&daemon.state().join("blobs")) {
        assert!(!fs::read(&blob).unwrap().starts_with(SECRET.as_bytes()), "{}", blob.display());
    }
}

/// Reads all of an open file that a checkpoint shows, by reading and by its map.
fn assert_reads(file: &File, mapped: &memmap2::Mmap, expected: &[u8], when: &str) {
    let mut bytes = vec![0; expected.len()];
    file.read_exact_at(&mut bytes, 0).unwrap_or_else(|error| panic!("{when}: {error}"));
    assert!(bytes == expected, "{when}: other bytes are read");
    assert!(mapped[..] == expected[..], "{when}: other bytes are mapped");
}

#[test]
fn a_job_that_keeps_a_file_open_reads_on_whatever_becomes_of_the_checkpoint() {
    for env in [&[][..], &[NO_PASSTHROUGH]] {
        let mut daemon = Daemon::start_kept(env);
        let source = daemon.place().dir("source");
        random_file(&source.join("w.bin"), seed(), 24 * MIB);
        let other = daemon.place().dir("other");
        random_file(&other.join("o.bin"), seed() + 1, 6 * MIB);
        // The same bytes elsewhere, so that one of them borrows from the other.
        shell("cat \"$1/w.bin\" > \"$2/twin.bin\"; echo more >> \"$2/twin.bin\"", &[&source, &other]).ok();
        daemon.capture("k", &source);
        daemon.capture("other", &other);
        let expected = fs::read(source.join("w.bin")).unwrap();
        let target = daemon.attach("job", "k");
        let witness = daemon.attach("witness", "other");
        let held = File::open(target.join("w.bin")).unwrap();
        // SAFETY: nobody writes to a served checkpoint.
        let mapped = unsafe { memmap2::Mmap::map(&held) }.unwrap();
        let check = |when: &str| {
            // What is in the page cache tells nothing of the file.
            shell("echo 1 > /proc/sys/vm/drop_caches", &[]);
            assert_reads(&held, &mapped, &expected, &format!("{env:?} {when}"));
        };
        check("attached");
        daemon.ctl(&["detach", "job"]).ok();
        check("detached");
        daemon.ctl(&["release", "job"]).ok();
        check("released");
        daemon.ctl(&["remove", "k", "--yes"]).ok();
        check("removed");
        let before = daemon.server();
        nix::sys::signal::kill(before, nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_until("the keeper has started another", LIMIT, || {
            let ran = daemon.ctl(&["--json", "status"]);
            ran.code == Some(0) && ran.json()["pid"].as_i64() != Some(i64::from(before.as_raw()))
        });
        check("restarted");
        assert_same_tree(&other, &witness);
        daemon.capture("again", &source);
        let again = daemon.place().dir("again");
        daemon.attach_at("job", &["again"], &again).ok();
        assert_same_tree(&source, &again);
        check("attached again");
        daemon.ctl(&["release", "job"]).ok();
        daemon.ctl(&["remove", "again", "--yes"]).ok();
        drop((held, mapped));
        daemon.ctl(&["release", "witness"]).ok();
        daemon.ctl(&["remove", "other", "--yes"]).ok();
        wait_until("nothing is kept", LIMIT, || daemon.json(&["status"])["sessions"] == 0);
        wait_until("the space is free", LIMIT, || regular_files(&daemon.state().join("blobs")).is_empty());
        daemon.stop();
    }
}

#[test]
fn remove_asks_on_a_terminal_and_names_who_holds_it() {
    let (daemon, _) = daemon_with_k();
    let socket = format!("unix:{}", daemon.socket().display());
    // `script` gives it a terminal of its own.
    let on_terminal = |answer: &str| {
        let command = format!("{} --endpoint {socket} remove k", support::daemon::CKPTCTL);
        let script = format!("printf '{answer}\\n' | script -qec '{command}' /dev/null");
        run(Command::new("sh").args(["-c", &script]))
    };
    let no = on_terminal("n");
    assert!(no.stdout.contains("Remove it? [y/N]") && no.code != Some(0), "{no}");
    daemon.ctl(&["get", "k"]).ok();
    for job in ["job-1", "job-2"] {
        daemon.ctl(&["reserve", job, "k"]).ok();
    }
    let held = on_terminal("y");
    assert!(held.stdout.contains("job-1, job-2") && held.code == Some(4), "{held}");
    daemon.ctl(&["remove", "k"]).refused(&[2], &["terminal"]);
    for job in ["job-1", "job-2"] {
        daemon.ctl(&["release", job]).ok();
    }
    let yes = on_terminal("y");
    assert_eq!(yes.code, Some(0), "{yes}");
    daemon.ctl(&["get", "k"]).refused(&[3], &["k"]);
}
