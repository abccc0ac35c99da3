//! What a job leaves behind becomes a checkpoint: called as people expect, whole or not at all, and at once there for the next job.

#![cfg(test)]

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;

use support::corpus::{odd_names, odd_tree, random_file, seed};
use support::daemon::Daemon;
use support::files::{assert_same_tree, walk};
use support::jail::Jail;
use support::loopfs::LoopFs;
use support::ran::{Ran, wait_for, wait_until};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(180);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn capture(daemon: &Daemon, args: &[&str]) -> Ran {
    daemon.ctl(&[&["--json", "capture"], args].concat())
}

fn messages(daemon: &Daemon, kind: &str) -> Vec<String> {
    let document = daemon.json(&["events"]);
    let events = document["events"].as_array().unwrap_or_else(|| panic!("{document}"));
    let of_kind = events.iter().filter(|event| event["kind"] == kind);
    of_kind.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

/// Nothing of a capture that was not made is on disk.
fn assert_nothing_stays(daemon: &Daemon) {
    for directory in ["blobs", "filling"] {
        daemon.wait_empty(directory);
    }
}

/// Changes something again and again, until told to stop.
struct Busy {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn with(mut act: impl FnMut(u64) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            for round in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                act(round);
                thread::sleep(Duration::from_millis(3));
            }
        });
        Self { stop, thread: Some(thread) }
    }

    /// One that appends to the file at `path`.
    fn appending(path: &Path) -> Self {
        let mut file = File::options().create(true).append(true).open(path).unwrap();
        Self::with(move |round| file.write_all(format!("line {round}\n").as_bytes()).unwrap())
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn output_is_called_as_its_job_and_worker_and_can_be_attached_at_once() {
    let daemon = Daemon::start();
    let output = daemon.place().dir("output");
    odd_tree(&output, seed());
    odd_names(&output);
    let from = text(&output);
    for (args, name) in [
        (&["job-1"][..], "Job - job-1"),
        (&["job-2", "--job-name", "Fine tune"], "Job - Fine tune"),
        (&["job-3", "--job-name", "Fine tune", "--workers", "1", "--worker", "1"], "Job - Fine tune"),
        (&["job-4", "--job-name", "Fine tune", "--workers", "3", "--worker", "2"], "Job - Fine tune Worker 2"),
        (&["notebook-1", "--name", "my models"], "my models"),
    ] {
        let record = capture(&daemon, &[args, &["--from", from]].concat()).ok().json();
        assert_eq!((record["name"].as_str(), record["state"].as_str()), (Some(name), Some("ready")), "{record}");
        let id = record["id"].as_str().unwrap();
        let target = daemon.place().dir(&format!("at-{id}"));
        daemon.attach_at(id, &[id], &target).ok();
        assert_same_tree(&output, &target);
    }
    capture(&daemon, &["job-5", "--from", from, "--workers", "3", "--worker", "4"]).refused(&[2], &["4 of 3"]);
    capture(&daemon, &["job-5", "--from", from, "--workers", "3"]).refused(&[2], &["0 of 3"]);
}

#[test]
fn output_is_captured_by_the_path_that_its_process_has_for_it() {
    let daemon = Daemon::start();
    // A volume of its own at /opt/ml, and the output behind a link that is right inside only.
    let jail = Jail::start_with(
        "mount -t tmpfs volume opt/ml; mkdir -p opt/ml/checkpoint opt/ml/real; ln -s /opt/ml/real opt/ml/output",
    );
    odd_tree(&jail.inside("/opt/ml/real"), seed());
    symlink("/etc/passwd", jail.inside("/opt/ml/real/out")).unwrap();
    let pid = jail.pid_text();
    let record = capture(&daemon, &["job", "--pid", &pid, "--id", "first"]).ok().json();
    assert_eq!(record["name"], "Job - job");
    let target = daemon.attach("next", "first");
    assert_same_tree(&jail.inside("/opt/ml/real"), &target);
    assert_eq!(fs::read_link(target.join("out")).unwrap(), Path::new("/etc/passwd"));

    // A notebook's.
    let models = jail.inside("/opt/ml/models");
    fs::create_dir(&models).unwrap();
    fs::write(models.join("m"), "m").unwrap();
    capture(&daemon, &["notebook", "--pid", &pid, "--from", "/opt/ml/models", "--name", "models"]).ok();
    assert_same_tree(&models, &daemon.attach("after", "models"));

    capture(&daemon, &["job", "--pid", &pid, "--from", "/none"]).refused(&[3], &["/none"]);
    capture(&daemon, &["job", "--pid", &pid, "--from", "/opt/ml/real/config.json"]).refused(&[2, 3], &[]);
    capture(&daemon, &["job", "--pid", "4194303"]).refused(&[3], &["4194303"]);
    daemon.ctl(&["capture", "job", "--pid", &pid, "--from", "relative"]).refused(&[2], &["relative"]);
    daemon.ctl(&["capture", "job"]).refused(&[2], &["--from"]);
}

/// Begins a capture of what is in the process, and returns once there is a record of it.
fn begun(daemon: &Daemon, jail: &Jail, id: &str) -> Child {
    let mut command = daemon.ctl_command();
    let command = command.args(["capture", "job", "--pid", &jail.pid_text(), "--id", id]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("there is a record", LIMIT, || daemon.ctl(&["get", id]).code == Some(0));
    child
}

#[test]
fn a_process_may_end_while_its_output_is_captured() {
    let daemon = Daemon::start();
    let mut jail = Jail::start_with("mount -t tmpfs volume opt/ml/output");
    for file in 0..6 {
        random_file(&jail.inside(&format!("/opt/ml/output/{file}.bin")), seed() + file, 32 * MIB);
    }
    let copy = daemon.place().dir("copy");
    support::ran::shell("cp -a \"$1\"/. \"$2\"", &[&jail.inside("/opt/ml/output"), &copy]).ok();
    let pid = jail.pid_text();
    let mut child = begun(&daemon, &jail, "first");
    jail.end();
    assert_eq!(wait_for(&mut child, LIMIT), Some(0));
    assert_same_tree(&copy, &daemon.attach("next", "first"));
    // The first answer, though there is no such process any more; but only to the same question.
    let again = capture(&daemon, &["job", "--pid", &pid, "--id", "first"]).ok().json();
    assert_eq!(again["state"], "ready");
    capture(&daemon, &["job", "--pid", &pid, "--id", "second"]).refused(&[3], &[&pid]);
    assert_eq!(daemon.rows("list").len(), 1);
}

#[test]
fn a_daemon_that_starts_again_goes_on_while_the_process_runs_and_else_says_why_not() {
    let mut daemon = Daemon::start();
    let mut jail = Jail::start();
    for file in 0..8 {
        random_file(&jail.on_host(&format!("/opt/ml/output/{file}.bin")), seed() + file, 48 * MIB);
    }
    let child = begun(&daemon, &jail, "first");
    daemon.kill9();
    end(child);
    daemon.restart();
    daemon.wait_state("first", "ready", LIMIT);
    assert_same_tree(&jail.on_host("/opt/ml/output"), &daemon.attach("next", "first"));
    daemon.ctl(&["release", "next"]).ok();
    daemon.ctl(&["remove", "first", "--yes"]).ok();

    // Not ready before the kill, for sure.
    let busy = Busy::appending(&jail.on_host("/opt/ml/output/log"));
    let child = begun(&daemon, &jail, "second");
    daemon.kill9();
    end(child);
    jail.end();
    drop(busy);
    daemon.restart();
    daemon.wait_state("second", "failed", LIMIT);
    let record = daemon.json(&["get", "second"]);
    assert!(record["error"].to_string().contains("NO_SUCH_PROCESS"), "{record}");
    assert_nothing_stays(&daemon);
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_tree_that_comes_to_rest_is_captured_as_it_is_then() {
    let daemon = Daemon::start();
    let output = daemon.place().dir("output");
    random_file(&output.join("weights.bin"), seed(), 24 * MIB);
    random_file(&output.join("small.bin"), seed(), 10_000);
    let busy = Busy::appending(&output.join("log"));
    let mut child = daemon.ctl_command();
    let child = child.args(["capture", "job", "--from", text(&output), "--id", "c"]);
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("it was looked at in vain", LIMIT, || daemon.stderr().contains("will look again"));
    let mut busy = busy;
    busy.end();
    fs::write(output.join("done"), "done").unwrap();
    assert_eq!(wait_for(&mut child, LIMIT), Some(0), "{}", daemon.stderr_tail());
    assert_same_tree(&output, &daemon.attach("next", "c"));
}

#[test]
fn files_that_never_come_to_rest_are_refused_by_name_and_nothing_stays() {
    let daemon = Daemon::start();
    let output = daemon.place().dir("output");
    random_file(&output.join("weights.bin"), seed(), 24 * MIB);
    random_file(&output.join("idle.bin"), seed() + 1, 30_000);
    fs::create_dir(output.join("logs")).unwrap();
    let large = output.join("large.bin");
    random_file(&large, seed() + 2, 9 * MIB);
    let writers = [
        Busy::appending(&output.join("logs/growing")),
        Busy::appending(&large),
        Busy::with({
            let at = output.join("logs");
            move |round| {
                let name = |number: u64| at.join(format!("r{}", number % 2));
                if fs::rename(name(round), name(round + 1)).is_err() {
                    fs::write(at.join("r0"), "x").unwrap();
                }
            }
        }),
    ];
    let refused = capture(&daemon, &["job", "--from", text(&output), "--id", "c"]);
    let refused = refused.refused(&[4], &["growing", "large.bin", "still written to"]);
    assert!(!refused.stderr.contains("idle.bin") && !refused.stderr.contains("weights.bin"), "{refused}");
    drop(writers);
    assert_nothing_stays(&daemon);
    let target = daemon.place().dir("at");
    daemon.attach_at("next", &["c"], &target).refused(&[4], &[]);
    // The next attempt is not spoiled by it.
    daemon.ctl(&["retry", "c"]).ok();
    daemon.wait_state("c", "ready", LIMIT);
    assert_same_tree(&output, &daemon.attach("then", "c"));
}

#[test]
fn output_of_nothing_is_refused_and_leaves_no_record() {
    let daemon = Daemon::start();
    let output = daemon.place().dir("output");
    capture(&daemon, &["job", "--from", text(&output)]).refused(&[2], &["no files"]);
    let jail = Jail::start();
    capture(&daemon, &["job", "--pid", &jail.pid_text()]).refused(&[2], &["no files"]);
    assert!(daemon.rows("list").is_empty());
    // Nothing but what is left out.
    let _socket = std::os::unix::net::UnixListener::bind(output.join("socket")).unwrap();
    capture(&daemon, &["job", "--from", text(&output)]).refused(&[2], &["no files"]);
    assert_nothing_stays(&daemon);
    // A tree of empty directories is something.
    fs::create_dir(output.join("directory")).unwrap();
    capture(&daemon, &["job", "--from", text(&output), "--id", "c"]).ok();
    assert_eq!(walk(&daemon.attach("next", "c")).len(), 1);
}

#[test]
fn what_is_no_file_is_left_out_and_named() {
    let daemon = Daemon::start();
    let output = daemon.place().dir("output");
    fs::write(output.join("file"), "f").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(output.join("socket")).unwrap();
    support::ran::shell("mkfifo \"$1/fifo\"; mknod \"$1/zero\" c 1 5; ln \"$1/file\" \"$1/hard\"", &[&output]).ok();
    capture(&daemon, &["job", "--from", text(&output), "--id", "c"]).ok();
    let target = daemon.attach("next", "c");
    assert_eq!(walk(&target), [target.join("file"), target.join("hard")]);
    let skipped = messages(&daemon, "ENTRIES_SKIPPED");
    assert_eq!(skipped.len(), 1, "{skipped:?}");
    for named in ["socket (is a socket)", "fifo (is a FIFO)", "zero (is a device)"] {
        assert!(skipped[0].contains(named), "{named}: {skipped:?}");
    }
}

#[test]
fn output_on_the_file_system_of_the_store_shares_its_bytes() {
    let disk = LoopFs::xfs(512);
    let daemon = Daemon::start_on(disk.dir("state"), &[]);
    let here = disk.dir("output");
    random_file(&here.join("w.bin"), seed(), 64 * MIB);
    let elsewhere = daemon.place().dir("elsewhere");
    random_file(&elsewhere.join("w.bin"), seed() + 1, 40 * MIB);

    let before = disk.used_bytes();
    capture(&daemon, &["job", "--from", text(&here), "--id", "shared"]).ok();
    let grown = disk.used_bytes() - before;
    assert!(grown < 8 * MIB, "{grown} bytes more for a copy of {}", 64 * MIB);
    assert!(shares_extents(&here.join("w.bin")), "the output shares nothing");
    assert_same_tree(&here, &daemon.attach("a", "shared"));
    // Written to afterwards, the output is another file's.
    random_file(&here.join("w.bin"), seed() + 2, 64 * MIB);
    assert_ne!(support::files::b3sum(&here.join("w.bin")), file_digest(&daemon, "a"));

    let before = disk.used_bytes();
    capture(&daemon, &["job", "--from", text(&elsewhere), "--id", "copied"]).ok();
    assert!(disk.used_bytes() - before >= 40 * MIB);
    assert_same_tree(&elsewhere, &daemon.attach("b", "copied"));
    drop(daemon);
}

fn file_digest(daemon: &Daemon, job: &str) -> String {
    let served = daemon.place().join(&format!("at-{job}/w.bin"));
    let read = support::files::b3sum(&served);
    assert_eq!(read, support::files::xattr(&served, "user.ckptd.digest"));
    read
}

fn shares_extents(file: &Path) -> bool {
    let ran = support::ran::shell("filefrag -v \"$1\"", &[file]).ok();
    ran.stdout.contains("shared")
}

#[test]
fn a_record_of_a_capture_tells_where_it_came_from() {
    let daemon = Daemon::start();
    let jail = Jail::start();
    fs::write(jail.on_host("/opt/ml/output/f"), "f").unwrap();
    let record: Value = capture(&daemon, &["job", "--pid", &jail.pid_text()]).ok().json();
    assert_eq!(record["source"]["type"], "directory", "{record}");
    assert_eq!(record["source"]["uri"], "/opt/ml/output", "{record}");
}
