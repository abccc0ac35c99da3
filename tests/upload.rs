//! An upload outlives its connection and the daemon: it goes on where it broke, and what nobody goes on with goes.

#![cfg(test)]

#[path = "upload/by_hand.rs"]
mod by_hand;
#[path = "upload/starts.rs"]
mod starts;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use support::corpus::{random_file, seed};
use support::daemon::Daemon;
use support::files::assert_mounted;
use support::ran::{run, wait_until};
use support::way::{Break, Client, Way};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// What the daemon may have received of a connection and not taken when it breaks: a window of HTTP/2, and what the sockets hold.
const IN_FLIGHT: u64 = 9 * MIB;

const ID: &str = "0b5e7c1e-94a3-4f5c-8d8e-6f0c2b9a7d31";

/// A tree with a large file between small ones, and its size.
fn tree(daemon: &Daemon) -> (PathBuf, u64) {
    let source = daemon.place().dir("source");
    fs::create_dir_all(source.join("d/empty")).unwrap();
    for number in 0..40 {
        random_file(&source.join(format!("d/{number:02}")), seed() + number, MIB + number);
    }
    random_file(&source.join("e.bin"), seed() + 99, 80 * MIB + 5);
    std::os::unix::fs::symlink("e.bin", source.join("f.link")).unwrap();
    for number in 0..20 {
        random_file(&source.join(format!("g{number:02}")), seed() + 100 + number, number * 50_000);
    }
    let size = support::files::regular_files(&source).iter().map(|file| file.metadata().unwrap().len()).sum();
    (source, size)
}

fn upload<'a>(source: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["upload", "m", source.to_str().unwrap()], more].concat()
}

fn assert_arrived(daemon: &Daemon, source: &Path) {
    let record = daemon.json(&["get", "m"]);
    assert_eq!(record["state"], "ready", "{record}");
    assert_mounted(source, &daemon.attach("reader", "m"));
}

fn nothing_is_left(daemon: &Daemon) -> bool {
    daemon.rows("list").is_empty() && fs::read_dir(daemon.state().join("filling")).unwrap().next().is_none()
}

/// A client of which the daemon has `bytes` at least, and gets no more.
fn stalled(daemon: &Daemon, way: &Way, source: &Path, more: &[&str], bytes: u64) -> Client {
    let client = way.spawn(&upload(source, more));
    wait_until("some of it is here", LIMIT, || {
        let rows = daemon.rows("list");
        rows.iter().any(|row| row["name"] == "m" && row["fill"]["bytes_done"].as_u64() >= Some(bytes))
    });
    client
}

/// Waits until a start after a kill would find so much.
fn wait_recorded(daemon: &Daemon, bytes: u64) {
    wait_until("it is durable", LIMIT, || daemon.recorded_bytes("m") >= bytes);
}

#[test]
fn an_upload_goes_on_after_each_break_and_sends_nothing_again_but_what_was_in_flight() {
    let daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let cuts = [20 * MIB, 15 * MIB + 7, 30, 20 * MIB, 12 * MIB, 25 * MIB, 25 * MIB].map(Break::Cut);
    let way = Way::to(&daemon, &cuts);
    let ran = run(&mut way.command(&upload(&source, &[]))).ok();
    assert!(way.is_mended(), "{ran}");
    assert!(ran.stderr.matches("going on with the upload").count() >= 3, "{ran}");
    assert!(!ran.stderr.contains("sent again"), "{ran}");
    let most = size + size / 10 + cuts.len() as u64 * IN_FLIGHT;
    assert!(way.passed() <= most, "{} bytes passed for {size}\n{ran}", way.passed());
    assert_arrived(&daemon, &source);
}

#[test]
fn a_connection_that_only_the_client_saw_break_is_taken_over() {
    let daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::HalfOpen(50 * MIB), Break::HalfOpen(30 * MIB)]);
    let ran = run(&mut way.command(&upload(&source, &[]))).ok();
    assert_eq!(ran.stderr.matches("going on with the upload").count(), 2, "{ran}");
    assert!(way.passed() <= size + size / 10 + 2 * IN_FLIGHT, "{} bytes passed for {size}", way.passed());
    assert_arrived(&daemon, &source);
}

#[test]
fn the_same_command_goes_on_after_its_client_was_killed() {
    let daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    stalled(&daemon, &way, &source, &["--id", ID], 40 * MIB).kill();
    let before = way.passed();
    let ran = run(&mut way.command(&upload(&source, &["--id", ID]))).ok();
    assert!(ran.stderr.contains("going on with the upload"), "{ran}");
    let again = way.passed() - before;
    assert!(again <= size - 40 * MIB + MIB, "{again} bytes of {size} were sent after 40 MiB were there\n{ran}");
    assert_arrived(&daemon, &source);
    // Once more: it is there.
    run(&mut way.command(&upload(&source, &["--id", ID]))).ok();
    assert_eq!(daemon.rows("list").len(), 1);
}

#[test]
fn a_tree_that_changed_meanwhile_is_refused_and_nothing_stays() {
    let daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    // The file in the middle of which it broke; one that was sent before; a name that comes before.
    for (path, named) in [("e.bin", "e.bin changed"), ("d/05", "changed since"), ("d/01.new", "changed since")] {
        let way = Way::to(&daemon, &[Break::Stall(80 * MIB)]);
        let client = stalled(&daemon, &way, &source, &[], 56 * MIB);
        let file = fs::File::options().create(true).append(true).open(source.join(path)).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        way.cut();
        client.ended().refused(&[4], &[named, "upload it again"]);
        wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    }
}

#[test]
fn ctrl_c_ends_the_upload_and_nothing_of_it_is_kept() {
    let daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    let client = stalled(&daemon, &way, &source, &[], 40 * MIB);
    client.interrupt();
    client.ended().refused(&[130], &["interrupted", "nothing of the upload is kept"]);
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
}

#[test]
fn an_upload_that_is_left_goes_after_the_idle_time() {
    // A sender that stalls is silent too, and is to be seen before it has been for so long.
    let daemon = Daemon::start_with(&[("CKPTD_HTTP__UPLOAD_IDLE_S", "5")]);
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    stalled(&daemon, &way, &source, &["--owner", "alice"], 40 * MIB).kill();
    wait_until("it expires", LIMIT, || nothing_is_left(&daemon));
    wait_until("its owner is told", LIMIT, || {
        let events = run(daemon.ctl_command().args(["--as", "alice", "events"])).ok().stdout;
        events.contains("UPLOAD_EXPIRED") && events.contains("silent for 5 s")
    });
}

#[test]
fn an_upload_that_is_left_is_removed_at_once_and_holds_up_no_drain() {
    let mut daemon = Daemon::start();
    let (source, size) = tree(&daemon);
    let leave = |daemon: &Daemon| {
        let way = Way::to(daemon, &[Break::Stall(60 * MIB)]);
        stalled(daemon, &way, &source, &["--id", ID], 50 * MIB).kill();
        assert_eq!(daemon.json(&["get", ID])["state"], "filling");
    };
    leave(&daemon);
    daemon.ctl(&["remove", ID, "--yes"]).ok();
    assert!(daemon.rows("list").is_empty());
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    leave(&daemon);
    daemon.ctl(&["drain"]).ok();
    // But for what is no whole unit all that had come is kept.
    assert!(daemon.recorded_bytes("m") >= 46 * MIB, "{}", daemon.recorded_bytes("m"));
    daemon.ctl(&upload(&source, &["--id", ID])).refused(&[7], &["drained"]);
    daemon.ctl(&["remove", ID, "--yes"]).ok();
    wait_until("nothing is left", LIMIT, || nothing_is_left(&daemon));
    daemon.stop();
    daemon.restart();
    leave(&daemon);
    daemon.stop();
    daemon.restart();
    let way = Way::to(&daemon, &[]);
    run(&mut way.command(&upload(&source, &["--id", ID]))).ok();
    assert!(way.passed() <= size - 46 * MIB + MIB, "{} bytes of {size} passed", way.passed());
    assert_arrived(&daemon, &source);
}

#[test]
fn another_command_with_the_id_waits_for_nobody_who_still_sends() {
    let daemon = Daemon::start();
    let (source, _) = tree(&daemon);
    let way = Way::to(&daemon, &[Break::Stall(60 * MIB)]);
    let first = stalled(&daemon, &way, &source, &["--id", ID], 40 * MIB);
    daemon.ctl(&upload(&source, &["--id", ID])).refused(&[4], &["is being uploaded already"]);
    way.cut();
    first.ended().ok();
    assert_arrived(&daemon, &source);
}
